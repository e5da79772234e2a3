//! One request, one answer.

use std::net::SocketAddr;
use std::time::Duration;

use ::http::{HeaderMap, Method, Request, StatusCode, Version};
use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// An answer is waited for this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// An answer, whole.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
    /// Trailers.
    pub trailers: HeaderMap,
}

impl Answer {
    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header, empty when there is none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    /// The body as JSON.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn json<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        serde_json::from_slice(&self.body).with_context(|| format!("{}: {}", self.status, self.text()))
    }
}

/// Sends one HTTP/1.1 request over a connection of its own.
///
/// # Errors
///
/// When there is no answer.
pub async fn send(address: SocketAddr, request: Request<Full<Bytes>>) -> anyhow::Result<Answer> {
    let exchange = async { over(connect(address).await?, request).await };
    tokio::time::timeout(PATIENCE, exchange).await.with_context(|| format!("no answer from {address}"))?
}

/// Sends one HTTP/1.1 request over this connection.
///
/// # Errors
///
/// When there is no answer.
pub async fn over(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> anyhow::Result<Answer> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    driven(connection, async { whole(sender.send_request(request).await?).await }).await
}

/// Sends one HTTP/2 request with prior knowledge over a connection of its own. The URI is the whole one.
///
/// # Errors
///
/// When there is no answer.
pub async fn send_http2(address: SocketAddr, request: Request<Full<Bytes>>) -> anyhow::Result<Answer> {
    let exchange = async {
        let io = TokioIo::new(connect(address).await?);
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
        driven(connection, async { whole(sender.send_request(request).await?).await }).await
    };
    tokio::time::timeout(PATIENCE, exchange).await.with_context(|| format!("no answer from {address}"))?
}

async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What comes of an exchange, while its connection's bytes are moved.
pub async fn driven<T, E>(
    connection: impl Future<Output = Result<(), E>>,
    exchange: impl Future<Output = T>,
) -> T {
    let drive = async {
        // What went wrong is told by the exchange.
        connection.await.unwrap_or_default();
        std::future::pending().await
    };
    tokio::select! {
        biased;
        answer = exchange => answer,
        never = drive => never,
    }
}

async fn whole(response: ::http::Response<hyper::body::Incoming>) -> anyhow::Result<Answer> {
    let (parts, body) = response.into_parts();
    let body = body.collect().await?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    Ok(Answer { status: parts.status, headers: parts.headers, body: body.to_bytes(), trailers })
}

/// `GET` of a path with a host and further headers.
///
/// # Errors
///
/// When there is no answer.
pub async fn get(
    address: SocketAddr,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> anyhow::Result<Answer> {
    send(address, request("GET", host, path, headers)?).await
}

/// A request without a body.
///
/// # Errors
///
/// When it is none.
pub fn request(
    method: &str,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> anyhow::Result<Request<Full<Bytes>>> {
    let mut request = Request::builder().method(method).uri(path).header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    Ok(request.body(Full::default())?)
}

/// `POST` of a JSON body.
///
/// # Errors
///
/// When there is no answer.
pub async fn post(address: SocketAddr, path: &str, body: &serde_json::Value) -> anyhow::Result<Answer> {
    let request =
        Request::post(path).header("host", address.to_string()).header("content-type", "application/json");
    send(address, request.body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?).await
}

/// Sends bytes as they are, and gives all that comes back until the peer closes or is silent for `quiet`.
///
/// # Errors
///
/// When there is no connection.
pub async fn raw(address: SocketAddr, bytes: &[u8], quiet: Duration) -> anyhow::Result<Vec<u8>> {
    let mut stream = connect(address).await?;
    // The peer may close before it has read everything; what it said is what counts.
    stream.write_all(bytes).await.unwrap_or_default();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(Ok(read @ 1..)) = tokio::time::timeout(quiet, stream.read(&mut buffer)).await {
        answer.extend_from_slice(buffer.get(..read).unwrap_or_default());
    }
    Ok(answer)
}

/// Asks for an upgrade to WebSocket, sends a message and gives what comes back: the 101 head's `x-name`, the message.
///
/// # Errors
///
/// When there is no upgrade.
pub async fn websocket(address: SocketAddr, host: &str, message: &[u8]) -> anyhow::Result<(String, Vec<u8>)> {
    let exchange = async {
        let mut stream = connect(address).await?;
        let head = format!(
            "GET /chat HTTP/1.1\r\nhost: {host}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer
                .push(stream.read_u8().await.with_context(|| String::from_utf8_lossy(&answer).into_owned())?);
        }
        let answer = String::from_utf8_lossy(&answer).to_lowercase();
        ensure!(answer.starts_with("http/1.1 101"), "{answer}");
        stream.write_all(message).await?;
        let mut back = vec![0; message.len()];
        stream.read_exact(&mut back).await?;
        let name = answer.lines().find_map(|l| l.strip_prefix("x-name: ")).unwrap_or_default().to_owned();
        Ok((name, back))
    };
    tokio::time::timeout(PATIENCE, exchange).await.with_context(|| format!("no answer from {address}"))?
}

/// Asks to leave HTTP, over HTTP/1.1 or, by CONNECT, over HTTP/2 (RFC 8441). After an upgrade the answer's body is what
/// comes back for `message`: as many bytes, or all until the server's end.
///
/// # Errors
///
/// When there is no answer.
pub async fn upgrade(
    address: SocketAddr,
    request: Request<Empty<Bytes>>,
    message: &[u8],
    until_end: bool,
) -> anyhow::Result<Answer> {
    let exchange = async {
        let io = TokioIo::new(connect(address).await?);
        if request.method() == Method::CONNECT {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
            let asked = async { Ok(sender.send_request(request).await?) };
            driven(connection, left(asked, message, until_end)).await
        } else {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
            let asked = async { Ok(sender.send_request(request).await?) };
            driven(connection.with_upgrades(), left(asked, message, until_end)).await
        }
    };
    tokio::time::timeout(PATIENCE, exchange).await.with_context(|| format!("no answer from {address}"))?
}

async fn left(
    asked: impl Future<Output = anyhow::Result<::http::Response<hyper::body::Incoming>>>,
    message: &[u8],
    until_end: bool,
) -> anyhow::Result<Answer> {
    let mut response = asked.await?;
    let (status, headers) = (response.status(), response.headers().clone());
    let over_http2 = response.version() == Version::HTTP_2;
    if status != StatusCode::SWITCHING_PROTOCOLS && !(over_http2 && status.is_success()) {
        return whole(response).await;
    }
    let upgraded = hyper::upgrade::on(&mut response).await?;
    let mut io = TokioIo::new(upgraded);
    // a peer that is gone shows when its bytes are read
    io.write_all(message).await.unwrap_or_default();
    let mut back = Vec::new();
    let mut buffer = [0; 4096];
    while until_end || back.len() < message.len() {
        let Ok(read @ 1..) = io.read(&mut buffer).await else { break };
        back.extend_from_slice(buffer.get(..read).unwrap_or_default());
    }
    Ok(Answer { status, headers, body: back.into(), trailers: HeaderMap::new() })
}
