//! Servers that say what they got.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// A server; it ends with its runtime.
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    pub(crate) hits: Arc<AtomicUsize>,
}

impl Backend {
    /// An HTTP/1 and HTTP/2 server that tells `name` in `x-backend`.
    pub(crate) async fn start(name: &'static str) -> Self {
        let (listener, address) = listen().await;
        let hits = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&hits);
        background(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let hits = Arc::clone(&counted);
                background(serve(stream, name, hits));
            }
        });
        Self { address, hits }
    }

    pub(crate) fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }
}

pub(crate) async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[expect(clippy::disallowed_methods, reason = "ends with the test's runtime")]
pub(crate) fn background(task: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(task);
}

async fn serve(stream: TcpStream, name: &'static str, hits: Arc<AtomicUsize>) {
    let service = service_fn(move |request| {
        let n = hits.fetch_add(1, Ordering::SeqCst) + 1;
        answer(request, name, n)
    });
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    let _over = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
}

type Body = BoxBody<Bytes, std::convert::Infallible>;

async fn answer(
    mut request: Request<Incoming>,
    name: &'static str,
    n: usize,
) -> Result<Response<Body>, std::convert::Infallible> {
    let wants = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let mut response = Response::builder().header("x-backend", name);
    if let Some(status) = wants("x-want-status") {
        response = response.status(status.parse::<u16>().unwrap());
    }
    if wants("x-fail-first").is_some() && n == 1 {
        response = response.status(503);
    }
    if wants("x-want-silence").is_some() {
        std::future::pending::<()>().await;
    }
    if request.headers().contains_key("upgrade") && wants("x-want-refusal").is_none() {
        return Ok(upgrade(request));
    }
    for (k, v) in request.headers() {
        response = response.header(format!("x-got-{k}"), v);
    }
    let authority = request.uri().authority().map(ToString::to_string).unwrap_or_default();
    response = response
        .header("x-method", request.method().as_str())
        .header("x-authority", authority)
        .header("x-path", request.uri().path_and_query().map_or("", |p| p.as_str()));
    if request.headers().get("content-type").is_some_and(|v| v == "application/grpc") {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let data = request.body_mut().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let frames = [Ok(Frame::data(data)), Ok(Frame::trailers(trailers))];
        let body = StreamBody::new(futures::stream::iter(frames)).boxed();
        return Ok(response.header("content-type", "application/grpc").body(body).unwrap());
    }
    let got = request.body_mut().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let body = if got.is_empty() { Bytes::from(format!("hello from {name}")) } else { got };
    Ok(response.body(Full::new(body).boxed()).unwrap())
}

/// Says `ready`, then echoes bytes.
fn upgrade(request: Request<Incoming>) -> Response<Body> {
    background(async move {
        let upgraded = hyper::upgrade::on(request).await.unwrap();
        let mut io = TokioIo::new(upgraded);
        io.write_all(b"ready").await.unwrap();
        let mut buffer = [0; 100];
        while let Ok(n) = io.read(&mut buffer).await {
            if n == 0 || io.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    });
    Response::builder()
        .status(101)
        .header("upgrade", "websocket")
        .header("connection", "upgrade")
        .body(Full::default().boxed())
        .unwrap()
}

/// A TCP server that answers every connection's bytes in capitals, after the client's end of stream.
pub(crate) async fn shouting() -> SocketAddr {
    let (listener, address) = listen().await;
    background(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            background(async move {
                let mut text = String::new();
                let _n = stream.read_to_string(&mut text).await;
                let _sent = stream.write_all(text.to_uppercase().as_bytes()).await;
            });
        }
    });
    address
}
