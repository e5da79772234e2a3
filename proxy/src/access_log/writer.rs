//! Threads that write access log lines, one per destination, fed by batches through bounded queues.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::xds::access_log::Sink;

/// Batches waiting for a destination. Full means the disk is slower than the traffic: the newest batch is dropped,
/// and its lines are counted by the worker.
const QUEUE: usize = 256;

/// All destinations of a process. Asked when a listener starts, never for a request.
#[derive(Clone, Debug, Default)]
pub struct Writers {
    open: Arc<Mutex<BTreeMap<Sink, SyncSender<Vec<u8>>>>>,
}

impl Writers {
    /// Where batches for `sink` go; opens it on first use.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened or the thread cannot be started.
    pub fn sender(&self, sink: &Sink) -> io::Result<SyncSender<Vec<u8>>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = open.get(sink) {
            return Ok(sender.clone());
        }
        let output: Box<dyn Write + Send> = match sink {
            Sink::File(path) if path.as_os_str() == "/dev/stdout" => Box::new(io::stdout()),
            Sink::File(path) if path.as_os_str() == "/dev/stderr" => Box::new(io::stderr()),
            Sink::File(path) => Box::new(OpenOptions::new().create(true).append(true).open(path)?),
            Sink::Stdout => Box::new(io::stdout()),
            Sink::Stderr => Box::new(io::stderr()),
        };
        let (sender, batches) = sync_channel(QUEUE);
        let name = "access-log".to_owned();
        std::thread::Builder::new().name(name).spawn(move || write_all(output, &batches))?;
        open.insert(sink.clone(), sender.clone());
        Ok(sender)
    }
}

/// Ends when the last sender is gone.
fn write_all(mut output: Box<dyn Write + Send>, batches: &Receiver<Vec<u8>>) {
    let mut failing = false;
    while let Ok(batch) = batches.recv() {
        match output.write_all(&batch).and_then(|()| output.flush()) {
            Ok(()) => failing = false,
            Err(error) if !failing => {
                failing = true;
                tracing::warn!(%error, "access log cannot be written");
            }
            Err(_) => {}
        }
    }
}
