//! Accepting TLS connections, and telling the services behind them who called.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::{Acceptor, ClientHello};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;

use crate::identity::SpiffeId;
use crate::node::NodeId;
use crate::x509;

/// A handshake that takes longer is cut.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at the same time. Full means that new connections wait in the kernel's queue.
const HANDSHAKES: usize = 512;
/// Connections that are ready and not yet taken. Full means that the server is slower than its clients.
const READY: usize = 64;
/// Pause after the system refused to accept, for example because there are too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The certificates that a client presented and the handshake verified, leaf first; empty when it had none. And from
/// where it called.
///
/// In the extensions of every tonic request that came over a [`TlsConnection`].
#[derive(Debug, Clone, Default)]
pub struct PeerCertificates {
    chain: Arc<[CertificateDer<'static>]>,
    address: Option<IpAddr>,
}

impl PeerCertificates {
    /// From a chain, leaf first.
    #[must_use]
    pub fn new(chain: &[CertificateDer<'_>]) -> Self {
        Self { chain: chain.iter().map(|cert| cert.clone().into_owned()).collect(), address: None }
    }

    /// The chain, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The client's address, as far as it is known.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.address
    }

    /// The client's node, when its leaf tells one.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        x509::Facts::parse(self.chain.first()?).ok()?.node()
    }

    /// The client's identity, when its leaf has exactly one.
    #[must_use]
    pub fn identity(&self) -> Option<SpiffeId> {
        x509::spiffe_id(self.chain.first()?).ok()
    }
}

/// A server configuration that also serves clients whose protocols (ALPN) it does not know.
///
/// As Envoy does, it goes on without a protocol then, where rustls would refuse.
#[derive(Debug, Clone)]
pub struct ServerContext {
    config: Arc<ServerConfig>,
    without_alpn: Arc<ServerConfig>,
}

impl ServerContext {
    /// The configuration for a client, by the protocols it offers.
    #[must_use]
    pub fn config_for(&self, hello: &ClientHello<'_>) -> Arc<ServerConfig> {
        let known = |protocol: &[u8]| self.config.alpn_protocols.iter().any(|ours| ours == protocol);
        let overlap = hello.alpn().is_none_or(|mut offered| offered.any(known));
        Arc::clone(if overlap { &self.config } else { &self.without_alpn })
    }

    /// The configuration for clients that offer a known protocol, or none.
    #[must_use]
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }
}

impl From<Arc<ServerConfig>> for ServerContext {
    fn from(config: Arc<ServerConfig>) -> Self {
        let mut without_alpn = ServerConfig::clone(&config);
        without_alpn.alpn_protocols.clear();
        Self { config, without_alpn: Arc::new(without_alpn) }
    }
}

/// An accepted TLS connection that knows who called.
#[derive(Debug)]
pub struct TlsConnection<IO> {
    stream: TlsStream<IO>,
    peer: PeerCertificates,
}

impl<IO> TlsConnection<IO> {
    /// Who called.
    #[must_use]
    pub fn peer(&self) -> &PeerCertificates {
        &self.peer
    }

    /// The TLS stream.
    #[must_use]
    pub fn into_stream(self) -> TlsStream<IO> {
        self.stream
    }
}

impl<IO> Connected for TlsConnection<IO> {
    type ConnectInfo = PeerCertificates;

    fn connect_info(&self) -> PeerCertificates {
        self.peer.clone()
    }
}

/// Accepts one TLS connection.
///
/// # Errors
///
/// When the handshake fails or the client closes.
pub async fn accept<IO>(io: IO, context: &ServerContext) -> io::Result<TlsConnection<IO>>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let start = LazyConfigAcceptor::new(Acceptor::default(), io).await?;
    let config = context.config_for(&start.client_hello());
    let stream = start.into_stream(config).await?;
    let peer = PeerCertificates::new(stream.get_ref().1.peer_certificates().unwrap_or_default());
    Ok(TlsConnection { stream, peer })
}

/// Accepts TLS connections until `stop`, several handshakes at a time, for tonic's `serve_with_incoming`.
///
/// A handshake that fails or takes too long is logged at debug level and ends only that connection.
#[must_use]
pub fn incoming(
    listener: TcpListener,
    context: ServerContext,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> ReceiverStream<io::Result<TlsConnection<TcpStream>>> {
    let (ready, connections) = mpsc::channel(READY);
    let handshakes = tasks.clone();
    tasks.spawn(async move {
        let limit = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let Ok(permit) = Arc::clone(&limit).acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                () = ready.closed() => return,
                accepted = listener.accept() => accepted,
            };
            let (socket, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (context, ready, stop) = (context.clone(), ready.clone(), stop.clone());
            handshakes.spawn(async move {
                let handshake = async {
                    socket.set_nodelay(true)?;
                    let accepted = accept(socket, &context);
                    let mut connection = tokio::time::timeout(HANDSHAKE_TIMEOUT, accepted).await??;
                    connection.peer.address = Some(address.ip());
                    Ok::<_, io::Error>(connection)
                };
                tokio::select! {
                    () = stop.cancelled() => {}
                    result = handshake => match result {
                        // a closed receiver means that the server has ended: the connection ends too
                        Ok(connection) => drop(ready.send(Ok(connection)).await),
                        Err(error) => tracing::debug!(peer = %address, %error, "TLS handshake failed"),
                    },
                }
                drop(permit);
            });
        }
    });
    ReceiverStream::new(connections)
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsConnection<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsConnection<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
