//! What the service manager is told, and what it keeps while one process follows another.
//!
//! The protocol is systemd's: readiness, signs of life and the end (sd_notify(3)), and listening sockets that stay open
//! in the manager's hands between two processes (sd_pid_notify_with_fds(3), `FDSTORE=1`), so that whoever connects in
//! between waits in their queues instead of being refused. Without a service manager all of it is a no-op.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::drain::Drain;
use crate::tables::TableStore;
use crate::telemetry::State;
use crate::worker::Asker;

/// Name of listening sockets in the manager's store.
const STORED: &str = "listener";
/// Most descriptors in one message (`SCM_MAX_FD` of unix(7)).
const MOST_FDS: usize = 253;
/// How long a start may wait for the control plane before it counts as done without.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long sockets wait for their listener after the proxy has heard the control plane.
const UNCLAIMED: Duration = Duration::from_secs(30);

/// Listening sockets that the process before this one left, by the address they listen on. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Inherited {
    sockets: Arc<Mutex<Left>>,
    /// Ends when the process that left them is gone, or accepts nothing more; `None`: it is gone.
    gone: Option<CancellationToken>,
}

#[derive(Debug, Default)]
struct Left {
    tcp: BTreeMap<SocketAddr, Vec<TcpListener>>,
    unix: BTreeMap<PathBuf, UnixListener>,
}

impl Inherited {
    /// What the service manager passed to this process (`LISTEN_FDS`), or nothing. To be asked once, at the start.
    #[must_use]
    pub fn from_manager() -> Self {
        let mut passed = listenfd::ListenFd::from_env();
        let mut sockets = Vec::new();
        for index in 0..passed.len() {
            match passed.take_tcp_listener(index) {
                Ok(socket) => sockets.extend(socket),
                Err(error) => tracing::warn!(%error, index, "what the service manager passed is no listener"),
            }
        }
        if !sockets.is_empty() {
            // They are ours again; what we close is to be closed.
            tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(STORED)]);
            tracing::info!(sockets = sockets.len(), "took over listening sockets");
        }
        Self::new(sockets)
    }

    /// These sockets.
    #[must_use]
    pub fn new(sockets: impl IntoIterator<Item = TcpListener>) -> Self {
        let mut left = Left::default();
        sockets.into_iter().for_each(|socket| left.add(socket));
        Self { sockets: Arc::new(Mutex::new(left)), gone: None }
    }

    /// What a process left that goes on until `gone`.
    pub(crate) fn from_predecessor(sockets: Vec<OwnedFd>, gone: CancellationToken) -> Self {
        let mut left = Left::default();
        for socket in sockets.into_iter().map(socket2::Socket::from) {
            let Ok(address) = socket.local_addr() else { continue };
            match address.as_pathname() {
                Some(path) => drop(left.unix.insert(path.to_owned(), OwnedFd::from(socket).into())),
                None => left.add(socket.into()),
            }
        }
        Self { sockets: Arc::new(Mutex::new(left)), gone: Some(gone) }
    }

    /// Ends when the process that left them is gone, or accepts nothing more.
    pub(crate) async fn alone(&self) {
        if let Some(gone) = &self.gone {
            gone.cancelled().await;
        }
    }

    fn left(&self) -> MutexGuard<'_, Left> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sockets on this very address, and nobody gets them again.
    pub(crate) fn take(&self, address: SocketAddr) -> Vec<TcpListener> {
        self.left().tcp.remove(&address).unwrap_or_default()
    }

    /// The Unix socket of this very path, and nobody gets it again.
    pub(crate) fn take_unix(&self, path: &Path) -> Option<UnixListener> {
        self.left().unix.remove(path)
    }

    /// Closes what nobody took: nobody shall wait in the queue of a listener that is gone.
    pub fn close(&self) {
        let rest = std::mem::take(&mut *self.left());
        for address in rest.tcp.keys() {
            tracing::info!(%address, "closing a socket whose listener is gone");
        }
        for path in rest.unix.keys() {
            tracing::info!(path = %path.display(), "closing a socket whose listener is gone");
        }
    }
}

impl Left {
    fn add(&mut self, socket: TcpListener) {
        if let Ok(address) = socket.local_addr() {
            self.tcp.entry(address).or_default().push(socket);
        }
    }
}

/// A running proxy as its service manager sees it.
#[derive(Debug, Clone)]
pub struct Supervised {
    pub(crate) state: watch::Receiver<State>,
    pub(crate) workers: Vec<Asker>,
    pub(crate) inherited: Inherited,
    pub(crate) tables: Arc<TableStore>,
    pub(crate) drain: Drain,
    /// The sockets of the proxy's own ports, and what ends their service.
    pub(crate) ports: (Arc<[OwnedFd]>, CancellationToken),
}

impl Supervised {
    /// Tells the manager that the proxy is ready, once it has all that it needs or the control plane is not to be had,
    /// and gives signs of life for as long as every worker answers. Until `stop`, which it tells too.
    pub async fn keep(self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            self.started().await;
            tokio::join!(self.heard_at_last(), signs_of_life(&self.workers));
        })
        .await;
        tell(&[NotifyState::Stopping]);
    }

    /// Gives the listening sockets into the manager's hands: when the proxy ends now, they stay open, and the process
    /// that follows takes them over. Without a manager the proxy ends as it always does. Returns how many.
    ///
    /// # Errors
    ///
    /// The manager cannot be told; the proxy then closes them as it always does.
    pub fn hand_over(&self) -> std::io::Result<usize> {
        if !has_manager() {
            return Ok(0);
        }
        let tables = self.tables.load();
        let sockets: Vec<BorrowedFd<'_>> =
            tables.sockets().flat_map(|of_listener| of_listener.tcp()).map(AsFd::as_fd).collect();
        for some in sockets.chunks(MOST_FDS) {
            sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(STORED)], some)?;
        }
        self.drain.leave_sockets_open();
        Ok(sockets.len())
    }

    /// All listening sockets, once more.
    pub(crate) fn sockets(&self) -> std::io::Result<Vec<OwnedFd>> {
        let tables = self.tables.load();
        let of_listeners = tables.sockets().flat_map(|of_listener| of_listener.all());
        let own = self.ports.0.iter().map(AsFd::as_fd);
        of_listeners.chain(own).map(|socket| socket.try_clone_to_owned()).collect()
    }

    /// Another process accepts on all sockets: this one stops, and leaves them open.
    pub(crate) fn is_followed(&self) {
        self.drain.leave_sockets_open();
        self.ports.1.cancel();
    }

    pub(crate) async fn has_all(&self) {
        // An error means that the proxy has ended, and this with it.
        let _state = self.state.clone().wait_for(|state| *state != State::Initializing).await.map(drop);
    }

    async fn started(&self) {
        let status = match tokio::time::timeout(PATIENCE, self.has_all()).await {
            Ok(()) => "serving",
            Err(_) => "the control plane has not been heard yet",
        };
        tell(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    async fn heard_at_last(&self) {
        self.has_all().await;
        tell(&[NotifyState::Status("serving")]);
        // What this workload listens on may come after all the rest.
        tokio::time::sleep(UNCLAIMED).await;
        self.inherited.close();
    }
}

/// Tells the manager, as often as it wants to hear it, that every worker answers.
async fn signs_of_life(workers: &[Asker]) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let every = limit / 3;
    loop {
        let answers = futures::future::join_all(workers.iter().map(Asker::is_alive));
        match tokio::time::timeout(every, answers).await {
            Ok(answers) if answers.iter().all(|alive| *alive) => tell(&[NotifyState::Watchdog]),
            Ok(_) => tracing::error!("a worker has ended"),
            Err(_) => tracing::error!(waited_ms = every.as_millis(), "a worker does not answer"),
        }
        tokio::time::sleep(every).await;
    }
}

#[expect(clippy::disallowed_methods, reason = "whether there is a manager, as sd_notify(3) has it")]
fn has_manager() -> bool {
    std::env::var("NOTIFY_SOCKET").is_ok()
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_taken_over_once_and_by_its_very_address() {
        let sockets = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [first, second] = sockets.each_ref().map(|s| s.local_addr().unwrap());
        let inherited = Inherited::new(sockets);
        let wildcard = SocketAddr::from(([0, 0, 0, 0], first.port()));
        assert!(inherited.take(wildcard).is_empty());
        assert_eq!(inherited.take(first).len(), 1);
        assert!(inherited.take(first).is_empty());
        inherited.close();
        assert!(inherited.take(second).is_empty());
        assert!(TcpListener::bind(second).is_ok(), "what nobody took is closed");
    }
}
