//! Sockets that listen: one per worker and address, shared by `SO_REUSEPORT`.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UnixListener};

use crate::xds::decode::Address;
use crate::xds::listener::Listener;

/// Connections that wait to be accepted, unless the listener says otherwise.
const BACKLOG: u32 = 1024;

/// Where listeners really listen: the first worker that binds port 0 finds the port for all.
#[derive(Debug, Default)]
pub struct Bound(Mutex<BTreeMap<(Arc<str>, Address), SocketAddr>>);

impl Bound {
    /// The address of a listener's first socket, once it is bound.
    #[must_use]
    pub fn address(&self, listener: &str) -> Option<SocketAddr> {
        let bound = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bound.iter().find(|((name, _), _)| **name == *listener).map(|(_, address)| *address)
    }

    fn forget(&self, listener: &str) {
        let mut bound = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bound.retain(|(name, _), _| **name != *listener);
    }

    /// A listener is gone.
    pub fn remove(&self, listener: &str) {
        self.forget(listener);
    }

    /// Binds a TCP socket of a listener.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound.
    pub fn tcp(&self, listener: &Listener, address: SocketAddr) -> io::Result<TcpListener> {
        let mut bound = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (Arc::clone(&listener.name), Address::Socket(address));
        let at = bound.get(&key).copied().unwrap_or(address);
        let socket = listen(listener, at)?;
        bound.insert(key, socket.local_addr()?);
        Ok(socket)
    }
}

fn listen(listener: &Listener, address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if listener.freebind {
        socket.set_freebind_v4(true)?;
    }
    if listener.transparent {
        socket.set_ip_transparent_v4(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(listener.backlog.unwrap_or(BACKLOG)).unwrap_or(i32::MAX))?;
    TcpListener::from_std(socket.into())
}

/// Binds a Unix socket, in place of one that a former process left behind.
///
/// # Errors
///
/// When the path cannot be bound.
pub fn unix(path: &std::path::Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(e);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}
