//! The sockets of the admin, statistics and readiness ports.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use http::{Request, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Admin, Asked, answer, ready_answer, stats_answer};
use crate::drain::Drain;
use crate::supervisor::Inherited;
use crate::xds::decode::Address;

/// Connections at once on one of these ports. Full means that somebody scrapes without end: others wait.
const CONNECTIONS: usize = 128;
/// How long a client may take for its request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a connection could not be accepted, for example because there are too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Which of the ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// Everything.
    Admin,
    /// Statistics and readiness.
    Stats,
    /// Readiness.
    Ready,
}

/// A socket that is bound and not served yet.
#[derive(Debug)]
pub enum Socket {
    /// An IP address.
    Tcp(TcpListener),
    /// A Unix socket, which is removed when this is dropped.
    Unix(UnixListener, Remove),
}

/// Removes a Unix socket's file, unless the socket is another process' now.
#[derive(Debug)]
pub struct Remove(PathBuf, Drain);

impl Drop for Remove {
    fn drop(&mut self) {
        if self.1.leaves_sockets_open() {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "cannot remove the socket");
        }
    }
}

impl Socket {
    /// Binds, or takes over the socket that listens there already.
    ///
    /// # Errors
    ///
    /// The address cannot be bound, or is a name.
    pub async fn bind(address: &Address, inherited: &Inherited, drain: &Drain) -> std::io::Result<Self> {
        match address {
            Address::Socket(address) => Ok(Self::Tcp(match inherited.take(*address).pop() {
                Some(left) => {
                    left.set_nonblocking(true)?;
                    TcpListener::from_std(left)?
                }
                None => TcpListener::bind(address).await?,
            })),
            Address::Name(..) => Err(std::io::Error::other("needs an IP address or a Unix socket")),
            Address::Pipe(path) => {
                let remove = || Remove(path.clone(), drain.clone());
                if let Some(left) = inherited.take_unix(path) {
                    left.set_nonblocking(true)?;
                    return Ok(Self::Unix(UnixListener::from_std(left)?, remove()));
                }
                // What a process that was killed left behind; a socket that somebody serves answers.
                if path.exists() && tokio::net::UnixStream::connect(path).await.is_err() {
                    std::fs::remove_file(path)?;
                }
                let listener = UnixListener::bind(path)?;
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                std::fs::set_permissions(path, mode)?;
                Ok(Self::Unix(listener, remove()))
            }
        }
    }

    /// The same socket once more.
    ///
    /// # Errors
    ///
    /// The process has no file descriptors left.
    pub fn once_more(&self) -> std::io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => listener.as_fd().try_clone_to_owned(),
            Self::Unix(listener, _) => listener.as_fd().try_clone_to_owned(),
        }
    }

    /// The bound IP address and port, if it is one.
    #[must_use]
    pub fn local(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(..) => None,
        }
    }
}

/// Serves a port until `stop`.
pub async fn serve(socket: Socket, port: Port, admin: Admin, stop: CancellationToken) {
    let tasks = TaskTracker::new();
    let slots = std::sync::Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let slot = tokio::select! {
            () = stop.cancelled() => break,
            slot = std::sync::Arc::clone(&slots).acquire_owned() => slot,
        };
        let Ok(slot) = slot else { break };
        let accepted: std::io::Result<Box<dyn Connection>> = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&socket) => accepted,
        };
        match accepted {
            Ok(connection) => {
                let (admin, stop) = (admin.clone(), stop.clone());
                tasks.spawn(async move {
                    connection_task(connection, port, admin, stop).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(?port, %error, "cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

async fn accept(socket: &Socket) -> std::io::Result<Box<dyn Connection>> {
    Ok(match socket {
        Socket::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        Socket::Unix(listener, _) => Box::new(listener.accept().await?.0),
    })
}

async fn connection_task(io: Box<dyn Connection>, port: Port, admin: Admin, stop: CancellationToken) {
    let service = service_fn(|request: Request<Incoming>| {
        let admin = admin.clone();
        async move {
            let asked = asked(&request);
            Ok::<_, Infallible>(match port {
                Port::Admin => answer(&admin, &asked).await,
                Port::Stats => stats_answer(&admin, &asked).await,
                Port::Ready => ready_answer(&admin, &asked),
            })
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(io), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(?port, %error, "admin connection ended");
    }
}

fn asked(request: &Request<Incoming>) -> Asked {
    let decode = |text: &str| {
        let spaced = text.replace('+', " ");
        percent_encoding::percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
    };
    let query = request.uri().query().unwrap_or_default();
    let query = query.split('&').filter(|pair| !pair.is_empty());
    Asked {
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        query: query
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .map(|(name, value)| (decode(name), decode(value)))
            .collect(),
        has_origin: request.headers().contains_key(header::ORIGIN),
    }
}
