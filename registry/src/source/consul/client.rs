//! The bytes: requests to a Consul server over HTTP/1.1, or over HTTP/2 where TLS agrees on it.
//!
//! It decides nothing. A name is looked up again for every connection, for servers are replaced behind it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::answer::Answer;

/// The largest body that is read, in bytes: 100 000 instances of one service.
const MOST_BODY: usize = 64 << 20;
/// Requests at the same time over one HTTP/2 connection; Go's servers allow 250.
const STREAMS: usize = 100;
/// Connections of HTTP/1.1 that are kept for later.
const IDLE: usize = 32;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// Files for TLS, all PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Authorities that the server's certificate must be of.
    pub ca: PathBuf,
    /// Our certificate and its key, when the server wants one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in the server's certificate, such as `server.dc1.consul`; the host when `None`.
    pub server_name: Option<String>,
}

/// What is read from files, and may change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// ACL token; empty for none.
    pub token: String,
    ca: Vec<u8>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl Credentials {
    /// A token alone.
    #[must_use]
    pub fn token(token: &str) -> Self {
        Self { token: token.to_owned(), ..Self::default() }
    }

    /// Reads the files there are.
    ///
    /// # Errors
    ///
    /// When one cannot be read, with its name.
    pub fn read(token: Option<&PathBuf>, tls: Option<&TlsFiles>) -> Result<Self, String> {
        let file = |path: &PathBuf| {
            std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
        };
        let token = token.map(file).transpose()?.unwrap_or_default();
        let identity = tls.and_then(|tls| tls.identity.as_ref());
        Ok(Self {
            token: String::from_utf8_lossy(&token).trim().to_owned(),
            ca: tls.map(|tls| file(&tls.ca)).transpose()?.unwrap_or_default(),
            identity: identity.map(|(chain, key)| Ok::<_, String>((file(chain)?, file(key)?))).transpose()?,
        })
    }

    fn tls(&self) -> Result<ClientConfig, String> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&self.ca) {
            let certificate = certificate.map_err(|error| format!("certificate authority: {error}"))?;
            roots.add(certificate).map_err(|error| format!("certificate authority: {error}"))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>();
                let chain = chain.map_err(|error| format!("certificate: {error}"))?;
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("key: {error}"))?;
                builder.with_client_auth_cert(chain, key).map_err(|error| format!("certificate: {error}"))?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// A request that has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// There is no connection.
    #[error("cannot connect to {server}")]
    Connect {
        /// Which server.
        server: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The server took a connection, and closed it before it answered anything on it.
    #[error(
        "{server} closed a connection before its first answer, as Consul does when it stops, and to an address with more \
         connections than its limits.http_max_conns_per_client, 200 unless set"
    )]
    Unanswered {
        /// Which server.
        server: String,
        /// How it ended.
        #[source]
        source: hyper::Error,
    },
    /// The connection ended, or speaks something else.
    #[error("the exchange failed")]
    Http(#[from] hyper::Error),
    /// The body did not come to its end, or is longer than anything that is meant.
    #[error("the body is cut or too long: {0}")]
    Body(String),
    /// The request cannot be made.
    #[error("no request can be made: {0}")]
    Request(#[from] http::Error),
    /// There is no such server.
    #[error("no such server")]
    NoServer,
}

/// Connections to the servers of a datacenter.
#[derive(Debug)]
pub struct Client {
    servers: Vec<Pool>,
    tls: Option<Arc<ClientConfig>>,
    server_name: Option<String>,
    token: Option<HeaderValue>,
    tasks: TaskTracker,
    stop: CancellationToken,
    _ends_all: DropGuard,
}

/// The connections to one server.
#[derive(Debug)]
struct Pool {
    server: Server,
    idle: Mutex<Vec<http1::SendRequest<Full<Bytes>>>>,
    shared: Mutex<Vec<Shared>>,
    /// One connection is made at a time where others may share it.
    connecting: Semaphore,
}

#[derive(Debug, Clone)]
struct Shared {
    sender: http2::SendRequest<Full<Bytes>>,
    streams: Arc<AtomicUsize>,
}

/// Counts a stream while it lives.
struct Stream(Arc<AtomicUsize>);

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Sender {
    Kept(http1::SendRequest<Full<Bytes>>),
    New(http1::SendRequest<Full<Bytes>>),
    Shared(http2::SendRequest<Full<Bytes>>, Stream),
}

impl Client {
    /// Connections are made when they are needed.
    ///
    /// # Errors
    ///
    /// When the credentials cannot be used.
    pub fn new(
        servers: &[Server],
        tls: Option<&TlsFiles>,
        credentials: &Credentials,
    ) -> Result<Self, String> {
        let config = tls.map(|_| credentials.tls()).transpose()?.map(Arc::new);
        let token = match credentials.token.as_str() {
            "" => None,
            token => {
                let mut value =
                    HeaderValue::from_str(token).map_err(|_| "the token is no header".to_owned())?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let pool = |server: &Server| Pool {
            server: server.clone(),
            idle: Mutex::default(),
            shared: Mutex::default(),
            connecting: Semaphore::new(if tls.is_some() { 1 } else { IDLE }),
        };
        let stop = CancellationToken::new();
        Ok(Self {
            servers: servers.iter().map(pool).collect(),
            tls: config,
            server_name: tls.and_then(|tls| tls.server_name.clone()),
            token,
            tasks: TaskTracker::new(),
            _ends_all: stop.clone().drop_guard(),
            stop,
        })
    }

    /// Asks a server, by its position.
    ///
    /// # Errors
    ///
    /// [`Broken`] when there is no whole answer.
    pub async fn get(&self, server: usize, path: &str) -> Result<Answer, Broken> {
        self.send(server, Method::GET, path, Vec::new()).await
    }

    /// Sends a request to a server, by its position.
    ///
    /// # Errors
    ///
    /// [`Broken`] when there is no whole answer.
    pub async fn send(
        &self,
        server: usize,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Answer, Broken> {
        let pool = self.servers.get(server).ok_or(Broken::NoServer)?;
        let body = Full::new(Bytes::from(body));
        match self.sender(pool).await? {
            Sender::Kept(mut sender) => {
                let request = self.request(pool, method, path, false, body)?;
                let answer = read(sender.send_request(request).await?).await?;
                pool.keep(sender);
                Ok(answer)
            }
            Sender::New(mut sender) => {
                let request = self.request(pool, method, path, false, body)?;
                let response = sender.send_request(request).await.map_err(|error| pool.unanswered(error))?;
                let answer = read(response).await?;
                pool.keep(sender);
                Ok(answer)
            }
            Sender::Shared(mut sender, _stream) => {
                let request = self.request(pool, method, path, true, body)?;
                read(sender.send_request(request).await?).await
            }
        }
    }

    fn request(
        &self,
        pool: &Pool,
        method: Method,
        path: &str,
        absolute: bool,
        body: Full<Bytes>,
    ) -> Result<Request<Full<Bytes>>, http::Error> {
        let Server { host, port } = &pool.server;
        let authority =
            if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let uri = if absolute { format!("https://{authority}{path}") } else { path.to_owned() };
        let mut request = Request::builder().method(method).uri(uri);
        if !absolute {
            request = request.header(http::header::HOST, authority);
        }
        if let Some(token) = &self.token {
            request = request.header("x-consul-token", token.clone());
        }
        request.body(body)
    }

    /// A connection with room for a request.
    async fn sender(&self, pool: &Pool) -> Result<Sender, Broken> {
        if let Some(sender) = pool.kept() {
            return Ok(sender);
        }
        let _turn = pool.connecting.acquire().await.map_err(|_| Broken::NoServer)?;
        // Whoever had the turn before may have made one for all.
        if let Some(sender) = pool.kept() {
            return Ok(sender);
        }
        let Server { host, port } = &pool.server;
        let failed = |source| Broken::Connect { server: format!("{host}:{port}"), source };
        let tcp = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
        tcp.set_nodelay(true).map_err(failed)?;
        let Some(tls) = &self.tls else { return self.one(tcp).await };
        let name = self.server_name.clone().unwrap_or_else(|| host.clone());
        let name = ServerName::try_from(name).map_err(|error| failed(io::Error::other(error)))?;
        let stream = TlsConnector::from(Arc::clone(tls)).connect(name, tcp).await.map_err(failed)?;
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            self.shared(pool, stream).await
        } else {
            self.one(stream).await
        }
    }

    async fn one(&self, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Sender, Broken> {
        let (sender, connection) = http1::handshake(TokioIo::new(io)).await?;
        let stop = self.stop.clone();
        // How a connection ends is told to whoever has a request on it.
        self.tasks.spawn(async move { stop.run_until_cancelled(connection).await.is_some() });
        Ok(Sender::New(sender))
    }

    async fn shared(
        &self,
        pool: &Pool,
        io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Sender, Broken> {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(std::time::Duration::from_secs(15))
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(io))
            .await?;
        let stop = self.stop.clone();
        self.tasks.spawn(async move { stop.run_until_cancelled(connection).await.is_some() });
        let shared = Shared { sender, streams: Arc::new(AtomicUsize::new(1)) };
        let mut all = pool.shared.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(shared.clone());
        Ok(Sender::Shared(shared.sender, Stream(shared.streams)))
    }
}

impl Pool {
    fn keep(&self, sender: http1::SendRequest<Full<Bytes>>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE && !sender.is_closed() {
            idle.push(sender);
        }
    }

    /// Why the first request of a connection has no answer.
    fn unanswered(&self, error: hyper::Error) -> Broken {
        let Server { host, port } = &self.server;
        match error.is_parse() {
            true => Broken::Http(error),
            false => Broken::Unanswered { server: format!("{host}:{port}"), source: error },
        }
    }

    fn kept(&self) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|sender| !sender.is_closed());
        if let Some(sender) =
            idle.iter().position(http1::SendRequest::is_ready).map(|at| idle.swap_remove(at))
        {
            return Some(Sender::Kept(sender));
        }
        drop(idle);
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|shared| !shared.sender.is_closed());
        let free = shared.iter().find(|shared| shared.streams.load(Ordering::Relaxed) < STREAMS)?;
        free.streams.fetch_add(1, Ordering::Relaxed);
        Some(Sender::Shared(free.sender.clone(), Stream(Arc::clone(&free.streams))))
    }
}

async fn read(response: Response<Incoming>) -> Result<Answer, Broken> {
    let (head, body) = response.into_parts();
    let body =
        Limited::new(body, MOST_BODY).collect().await.map_err(|error| Broken::Body(error.to_string()))?;
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    Ok(Answer::read(head.status.as_u16(), header, body.to_bytes().to_vec()))
}
