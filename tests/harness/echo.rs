//! The application behind a proxy: it answers with its name and what it was sent, and misbehaves when asked to.
//!
//! The query of a request says how: `status=503`, with `fail=2&key=K` only for the first two requests with that key;
//! `delay_ms=200`; `reset=1` closes the connection instead of answering; `set=name:value` adds a header to the
//! answer. A request with an `upgrade` header is answered with 101 and then every byte comes back, unless it says
//! `stay=1`; one of gRPC gets its message back and a status in the trailers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use anyhow::bail;
use bytes::Bytes;
use futures::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::io::copy;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// What an [`Echo`] answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Name of the echo.
    pub name: String,
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// `HTTP/1.1`, `HTTP/2.0`
    pub version: String,
    /// Headers; several values of one name are joined by `, `. Over HTTP/2 also `:authority` and `:scheme`.
    pub headers: BTreeMap<String, String>,
    /// Length of the body in bytes.
    pub body: usize,
}

impl Seen {
    /// A header of the request, empty when there was none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// A running echo; it stops when dropped.
#[derive(Debug)]
pub struct Echo {
    /// Where it listens.
    pub address: SocketAddr,
    app: Arc<App>,
    _stop: DropGuard,
}

#[derive(Debug)]
struct App {
    name: String,
    requests: AtomicU64,
    /// Of answers to requests that ask for none.
    status: AtomicU16,
    failed: Mutex<BTreeMap<String, u32>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

type Answered = Response<BoxBody<Bytes, std::convert::Infallible>>;

impl Echo {
    /// Listens on a free loopback port and speaks HTTP/1.1 and HTTP/2 with prior knowledge.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn start(name: &str) -> anyhow::Result<Self> {
        Self::on(name, std::net::TcpListener::bind("127.0.0.1:0")?)
    }

    /// As [`Echo::start`], on a socket that is bound already.
    ///
    /// # Errors
    ///
    /// When the socket cannot be used.
    pub fn on(name: &str, listener: std::net::TcpListener) -> anyhow::Result<Self> {
        Self::serve(name, listener, |app, stream| async move {
            let service = hyper::service::service_fn(move |request| app.clone().answer(request));
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            // A client that goes away ends its own connection and nothing else.
            builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await.unwrap_or_default();
        })
    }

    /// Listens on a free loopback port and sends every byte back.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn tcp(name: &str) -> anyhow::Result<Self> {
        Self::tcp_on(name, std::net::TcpListener::bind("127.0.0.1:0")?)
    }

    /// As [`Echo::tcp`], on a socket that is bound already.
    ///
    /// # Errors
    ///
    /// When the socket cannot be used.
    pub fn tcp_on(name: &str, listener: std::net::TcpListener) -> anyhow::Result<Self> {
        Self::serve(name, listener, |app, mut stream| async move {
            app.requests.fetch_add(1, Ordering::Relaxed);
            let (mut read, mut write) = stream.split();
            copy(&mut read, &mut write).await.unwrap_or_default();
        })
    }

    fn serve<F>(
        name: &str,
        listener: std::net::TcpListener,
        each: impl Fn(Arc<App>, TcpStream) -> F + Send + 'static,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let app = Arc::new(App {
            name: name.to_owned(),
            requests: AtomicU64::new(0),
            status: AtomicU16::new(200),
            failed: Mutex::default(),
            stop: stop.clone(),
            tasks: TaskTracker::new(),
        });
        let serving = app.clone();
        app.tasks.spawn(async move {
            while let Some(Ok((stream, _))) =
                serving.stop.run_until_cancelled(serving.accepted(&listener)).await
            {
                let (connection, stop) = (each(serving.clone(), stream), serving.stop.clone());
                serving.tasks.spawn(async move { stop.run_until_cancelled(connection).await });
            }
        });
        Ok(Self { address, app, _stop: stop.drop_guard() })
    }

    /// From now on answers with this status whoever asks for none.
    pub fn turn(&self, status: u16) {
        self.app.status.store(status, Ordering::Relaxed);
    }

    /// Requests so far, connections for TCP.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.app.requests.load(Ordering::Relaxed)
    }
}

impl App {
    async fn accepted(&self, listener: &TcpListener) -> std::io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = listener.accept().await?;
        stream.set_nodelay(true)?;
        Ok((stream, peer))
    }

    async fn answer(self: Arc<Self>, mut request: Request<Incoming>) -> anyhow::Result<Answered> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let stays = request.uri().query().is_some_and(|q| q.contains("stay=1"));
        if request.headers().contains_key("upgrade") && !stays {
            return self.upgrade(&mut request);
        }
        if request
            .headers()
            .get("content-type")
            .is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"))
        {
            return grpc(request).await;
        }
        let query: BTreeMap<String, String> = request.uri().query().map(pairs).unwrap_or_default();
        let number = |name: &str| query.get(name).and_then(|v| v.parse().ok());
        if let Some(delay) = number("delay_ms") {
            // paced: an application that is slow because it was asked to be
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if query.contains_key("reset") && self.fails(&query) {
            bail!("asked to close the connection");
        }
        let status = number("status")
            .filter(|_| self.fails(&query))
            .and_then(|s| u16::try_from(s).ok())
            .unwrap_or_else(|| self.status.load(Ordering::Relaxed));
        // over HTTP/2 the library sends every body, also where there is none
        let bare = request.version() == Version::HTTP_2
            && (request.method() == Method::HEAD || matches!(status, 204 | 304));
        let seen = self.seen(request).await;
        let body = if bare { Vec::new() } else { serde_json::to_vec(&seen)? };
        let mut response = Response::new(Full::new(Bytes::from(body)).boxed());
        *response.status_mut() = StatusCode::from_u16(status)?;
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
        if let Some((name, value)) = query.get("set").and_then(|s| s.split_once(':')) {
            response.headers_mut().insert(name.parse::<HeaderName>()?, value.parse()?);
        }
        Ok(response)
    }

    /// Whether this request is among the first `fail` of its `key`; without `fail` every one is.
    fn fails(&self, query: &BTreeMap<String, String>) -> bool {
        let Some(limit) = query.get("fail").and_then(|n| n.parse::<u32>().ok()) else { return true };
        let Ok(mut failed) = self.failed.lock() else { return false };
        let count = failed.entry(query.get("key").cloned().unwrap_or_default()).or_default();
        *count += 1;
        *count <= limit
    }

    async fn seen(&self, request: Request<Incoming>) -> Seen {
        let mut headers = BTreeMap::<String, String>::new();
        if request.version() == Version::HTTP_2 {
            let authority = request.uri().authority().map(ToString::to_string);
            headers.extend(authority.map(|authority| (":authority".to_owned(), authority)));
            headers.extend(request.uri().scheme().map(|scheme| (":scheme".to_owned(), scheme.to_string())));
        }
        for (key, value) in request.headers() {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            let entry = headers.entry(key.to_string());
            entry.and_modify(|all| *all = format!("{all}, {value}")).or_insert(value);
        }
        Seen {
            name: self.name.clone(),
            method: request.method().to_string(),
            path: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
            version: format!("{:?}", request.version()),
            headers,
            body: request.into_body().collect().await.map(|b| b.to_bytes().len()).unwrap_or_default(),
        }
    }

    fn upgrade(&self, request: &mut Request<Incoming>) -> anyhow::Result<Answered> {
        let upgraded = hyper::upgrade::on(&mut *request);
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let echo = async {
                if let Ok(io) = upgraded.await {
                    let (mut read, mut write) = tokio::io::split(TokioIo::new(io));
                    copy(&mut read, &mut write).await.unwrap_or_default();
                }
            };
            stop.run_until_cancelled(echo).await
        });
        let response = Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header("connection", "upgrade")
            .header(
                "upgrade",
                request.headers().get("upgrade").cloned().unwrap_or(HeaderValue::from_static("websocket")),
            )
            .header("x-name", self.name.as_str());
        Ok(response.body(Empty::new().boxed())?)
    }
}

/// The message back, and the status in the trailers: 0, or the number that the path ends with.
async fn grpc(request: Request<Incoming>) -> anyhow::Result<Answered> {
    let status =
        request.uri().path().rsplit('/').next().and_then(|s| s.parse::<u32>().ok()).unwrap_or_default();
    let message = request.into_body().collect().await?.to_bytes();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(status));
    trailers.insert("grpc-message", HeaderValue::from_static("echoed"));
    let frames = [Ok(Frame::data(message)), Ok(Frame::trailers(trailers))];
    let response = Response::builder().header("content-type", "application/grpc");
    Ok(response.body(BodyExt::boxed(StreamBody::new(stream::iter(frames))))?)
}

fn pairs(query: &str) -> BTreeMap<String, String> {
    query
        .split('&')
        .map(|p| p.split_once('=').unwrap_or((p, "")))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect()
}
