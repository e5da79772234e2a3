//! Listening sockets: bound by the writer of the tables before a listener counts as taken, one for each worker.
//!
//! Each worker accepts on a socket of its own (`SO_REUSEPORT`), so the kernel spreads connections and workers share
//! nothing. A socket lives as long as a listener in the tables, or a worker, holds it.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::supervisor::Inherited;
use crate::xds::decode::Address;
use crate::xds::listener::Listener;

/// How many connections may wait to be accepted on one socket, unless the listener says otherwise.
const BACKLOG: i32 = 1024;

/// The sockets of one listener.
#[derive(Debug, Default)]
pub struct Sockets {
    addresses: Box<[Address]>,
    local: Box<[SocketAddr]>,
    /// By worker, then by address.
    tcp: Box<[Box<[std::net::TcpListener]>]>,
    /// All workers share these.
    unix: Box<[UnixListener]>,
}

/// One socket, for one worker: it listens and does not block.
#[derive(Debug)]
pub enum Listening {
    /// TCP.
    Tcp(std::net::TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

/// An address that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot bind {address}: {source}")]
pub struct BindError {
    /// Which.
    pub address: Address,
    /// Why.
    pub source: std::io::Error,
}

impl Sockets {
    /// Binds all addresses of a listener, for this many workers, or takes over the sockets that listen there already. A
    /// listener without sockets of its own has none.
    ///
    /// # Errors
    ///
    /// The first address that cannot be bound.
    pub fn bind(listener: &Listener, workers: usize, inherited: &Inherited) -> Result<Self, BindError> {
        let mut sockets = Self::default();
        if !listener.bind_to_port {
            return Ok(sockets);
        }
        let mut local = Vec::new();
        let mut by_worker: Vec<Vec<std::net::TcpListener>> = (0..workers).map(|_| Vec::new()).collect();
        let mut unix = Vec::new();
        for address in &listener.addresses {
            let failed = |source| BindError { address: address.clone(), source };
            match address {
                Address::Socket(wanted) => {
                    let mut at = *wanted;
                    // Connections wait in the queue of each, so each needs a worker, whatever their number was.
                    let left = inherited.take(at);
                    let served = left.len().min(workers);
                    for (index, socket) in left.into_iter().enumerate() {
                        socket.set_nonblocking(true).map_err(failed)?;
                        if let Some(of_worker) = by_worker.get_mut(index % workers.max(1)) {
                            of_worker.push(socket);
                        }
                    }
                    for of_worker in by_worker.iter_mut().skip(served) {
                        let socket = tcp(at, listener).map_err(failed)?;
                        // Port 0 is chosen by the first; the others join it there.
                        at = socket.local_addr().map_err(failed)?;
                        of_worker.push(socket);
                    }
                    local.push(at);
                }
                Address::Pipe(path) => {
                    let left = inherited.take_unix(path).map_or_else(|| unix_listener(path), Ok);
                    unix.push(left.map_err(failed)?);
                }
                Address::Name(..) => return Err(failed(std::io::Error::other("is not an IP address"))),
            }
        }
        sockets.addresses = listener.addresses.clone();
        sockets.local = local.into();
        sockets.tcp = by_worker.into_iter().map(Into::into).collect();
        sockets.unix = unix.into();
        Ok(sockets)
    }

    /// Whether they serve this listener as well as new ones would.
    #[must_use]
    pub fn fit(&self, listener: &Listener) -> bool {
        let wanted: &[Address] = if listener.bind_to_port { &listener.addresses } else { &[] };
        *self.addresses == *wanted
    }

    /// All of them that are not Unix sockets.
    pub fn tcp(&self) -> impl Iterator<Item = &std::net::TcpListener> {
        self.tcp.iter().flatten()
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.tcp().map(AsFd::as_fd).chain(self.unix.iter().map(AsFd::as_fd))
    }

    /// Bound IP addresses and ports.
    #[must_use]
    pub fn local(&self) -> &[SocketAddr] {
        &self.local
    }

    /// The sockets of one worker.
    ///
    /// # Errors
    ///
    /// The process has no file descriptors left.
    pub fn of(&self, worker: usize) -> std::io::Result<Vec<Listening>> {
        let tcp = self.tcp.get(worker).into_iter().flatten().map(|l| l.try_clone().map(Listening::Tcp));
        let unix = self.unix.iter().map(|l| l.try_clone().map(Listening::Unix));
        tcp.chain(unix).collect()
    }
}

fn tcp(address: SocketAddr, listener: &Listener) -> std::io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    #[cfg(target_os = "linux")]
    {
        if listener.freebind {
            if address.is_ipv6() { socket.set_freebind_v6(true)? } else { socket.set_freebind_v4(true)? }
        }
        if listener.transparent {
            if address.is_ipv6() {
                return Err(std::io::Error::other("transparent IPv6 listeners are not supported"));
            }
            socket.set_ip_transparent_v4(true)?;
        }
    }
    socket.bind(&SockAddr::from(address))?;
    let backlog = listener.backlog.map_or(BACKLOG, |n| i32::try_from(n).unwrap_or(i32::MAX));
    socket.listen(backlog)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn unix_listener(path: &Path) -> std::io::Result<UnixListener> {
    // What a process that was killed left behind; a socket that somebody serves answers.
    if path.exists() && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
