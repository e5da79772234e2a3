//! The fake catalog behind HTTP: what blocks waits for a change.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::Context;
use bytes::Bytes;
use http::{Request as HttpRequest, Response as HttpResponse};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::catalog::{Catalog, Request, Response};
use super::real::Secured;

/// A fake Consul that listens; it ends when it is dropped.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _ends: DropGuard,
}

#[derive(Debug)]
struct Shared {
    catalog: Mutex<Catalog>,
    waiting: Mutex<Vec<Waiting>>,
    questions: AtomicUsize,
}

/// A question whose answer waits for a change.
#[derive(Debug)]
struct Waiting {
    request: Request,
    known: u64,
    tell: oneshot::Sender<()>,
}

impl Server {
    /// Serves a catalog over HTTP/1.1 on a port of its own.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn start(catalog: Catalog) -> anyhow::Result<Self> {
        Self::serve(catalog, None).await
    }

    /// Serves a catalog over TLS, with HTTP/2 for those who speak it, as Consul does.
    ///
    /// # Errors
    ///
    /// When no port can be had, or the certificate is none.
    pub async fn secured(catalog: Catalog, secured: &Secured) -> anyhow::Result<Self> {
        let (chain, key) = secured.tls.identity.as_ref().context("no certificate")?;
        let chain = CertificateDer::pem_file_iter(chain)?.collect::<Result<_, _>>()?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, PrivateKeyDer::from_pem_file(key)?)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self::serve(catalog, Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn serve(catalog: Catalog, tls: Option<TlsAcceptor>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let shared = Shared {
            catalog: Mutex::new(catalog),
            waiting: Mutex::default(),
            questions: AtomicUsize::default(),
        };
        let shared = Arc::new(shared);
        tasks.spawn(accept(listener, tls, shared.clone(), tasks.clone(), stop.clone()));
        Ok(Self { address, shared, _ends: stop.drop_guard() })
    }

    /// Changes the catalog, and wakes whoever waits for that.
    pub fn change<T>(&self, change: impl FnOnce(&mut Catalog) -> T) -> T {
        let mut catalog = self.shared.catalog.lock().unwrap();
        let done = change(&mut catalog);
        self.shared.wake(&catalog);
        done
    }

    /// Requests so far.
    #[must_use]
    pub fn questions(&self) -> usize {
        self.shared.questions.load(Ordering::Relaxed)
    }
}

impl Shared {
    /// Wakes those whose question has another answer now, and forgets those who have gone.
    fn wake(&self, catalog: &Catalog) {
        let mut waiting = self.waiting.lock().unwrap();
        for one in std::mem::take(&mut *waiting) {
            if catalog.index_of(&one.request) > one.known {
                // Who does not listen any more asks again.
                one.tell.send(()).unwrap_or_default();
            } else if !one.tell.is_closed() {
                waiting.push(one);
            }
        }
    }

    /// The answer to a question, when there is something new.
    async fn wait(&self, request: &Request) -> Response {
        let deadline = tokio::time::Instant::now() + request.wait();
        loop {
            let told = {
                let catalog = self.catalog.lock().unwrap();
                let (Some(known), index) = (request.index(), catalog.index_of(request)) else {
                    return catalog.read(request).0;
                };
                if index > known {
                    return catalog.read(request).0;
                }
                let (tell, told) = oneshot::channel();
                self.waiting.lock().unwrap().push(Waiting { request: request.clone(), known, tell });
                told
            };
            if tokio::time::timeout_at(deadline, told).await.is_err() {
                return self.catalog.lock().unwrap().read(request).0;
            }
        }
    }
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    while let Some(Ok((stream, _))) = stop.run_until_cancelled(listener.accept()).await {
        let (shared, stop, tls) = (shared.clone(), stop.clone(), tls.clone());
        let connection = async move {
            stream.set_nodelay(true)?;
            match tls {
                Some(tls) => converse(tls.accept(stream).await?, shared).await,
                None => converse(stream, shared).await,
            }
        };
        // How a connection ends is for its client to see.
        tasks.spawn(async move { stop.run_until_cancelled(connection).await.is_some() });
    }
}

async fn converse(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    shared: Arc<Shared>,
) -> anyhow::Result<()> {
    let service = service_fn(move |request| answer(shared.clone(), request));
    let served = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(io), service).await;
    served.map_err(|error| anyhow::anyhow!("{error}"))
}

async fn answer(
    shared: Arc<Shared>,
    request: HttpRequest<Incoming>,
) -> Result<HttpResponse<Full<Bytes>>, Infallible> {
    shared.questions.fetch_add(1, Ordering::Relaxed);
    let token = request.headers().get("x-consul-token").and_then(|t| t.to_str().ok()).unwrap_or_default();
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let (method, token) = (request.method().as_str().to_owned(), token.to_owned());
    let body = request.into_body().collect().await.map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    let request = Request::new(&method, &target, &token, body);
    let changed = {
        let mut catalog = shared.catalog.lock().unwrap();
        let changed = catalog.change(&request);
        if changed.is_some() {
            shared.wake(&catalog);
        }
        changed
    };
    let response = match changed {
        Some(response) => response,
        None => shared.wait(&request).await,
    };
    Ok(written(response))
}

fn written(response: Response) -> HttpResponse<Full<Bytes>> {
    let Response { status, headers, body } = response;
    let mut written = HttpResponse::builder().status(status);
    for (name, value) in BTreeMap::into_iter(headers) {
        written = written.header(name, value);
    }
    written.body(Full::new(Bytes::from(body))).unwrap()
}
