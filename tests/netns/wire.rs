//! What goes over the wire, byte for byte.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::anyhow;
use nix::sys::socket::MsgFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use tests::netns::Machine;
use tokio_util::sync::CancellationToken;

/// Every frame that a machine sees, until it is dropped.
pub(crate) struct Tap {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: CancellationToken,
    reader: Option<JoinHandle<()>>,
}

impl Tap {
    /// Listens on all devices of a machine.
    pub(crate) fn on(machine: &Machine) -> anyhow::Result<Self> {
        let socket: OwnedFd = machine.inside(|| {
            let all = SockProtocol::EthAll;
            Ok(socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all)?)
        })?;
        setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
        let (frames, stop) = (Arc::<Mutex<Vec<Vec<u8>>>>::default(), CancellationToken::new());
        let (seen, stopped) = (frames.clone(), stop.clone());
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 17];
            while !stopped.is_cancelled() {
                match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    Ok(length) => {
                        let frame = buffer.get(..length).unwrap_or_default().to_vec();
                        seen.lock().unwrap_or_else(PoisonError::into_inner).push(frame);
                    }
                    Err(error)
                        if matches!(
                            std::io::Error::from(error).kind(),
                            ErrorKind::WouldBlock | ErrorKind::Interrupted
                        ) => {}
                    Err(_) => return,
                }
            }
        });
        Ok(Self { frames, stop, reader: Some(reader) })
    }

    /// How many frames have these bytes in them, among all so far.
    pub(crate) fn frames_with(&self, text: &str) -> (usize, usize) {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let with = frames.iter().filter(|frame| frame.windows(text.len()).any(|w| w == text.as_bytes()));
        (with.count(), frames.len())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.stop.cancel();
        let ended = self.reader.take().map(|reader| reader.join().map_err(|_| anyhow!("the tap panicked")));
        drop(ended);
    }
}

/// A while in which frames that were sent have been read.
pub(crate) const SETTLE: Duration = Duration::from_secs(5);
