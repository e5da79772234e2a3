//! One request, one answer.

use std::net::SocketAddr;
use std::time::Duration;

use ::http::{HeaderMap, Request, StatusCode};
use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

/// An answer is waited for this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// An answer, whole.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Answer {
    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
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

/// Sends one request over a connection of its own.
///
/// # Errors
///
/// When there is no answer.
pub async fn send(address: SocketAddr, request: Request<Full<Bytes>>) -> anyhow::Result<Answer> {
    let exchange = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let (parts, body) = response.into_parts();
            anyhow::Ok(Answer { status: parts.status, headers: parts.headers, body: body.collect().await?.to_bytes() })
        };
        let drive = async {
            connection.await.unwrap_or_default();
            std::future::pending().await
        };
        tokio::select! {
            answer = exchange => answer,
            never = drive => never,
        }
    };
    tokio::time::timeout(PATIENCE, exchange).await.with_context(|| format!("no answer from {address}"))?
}

/// `GET` of a path with a host and further headers.
///
/// # Errors
///
/// When there is no answer.
pub async fn get(address: SocketAddr, host: &str, path: &str, headers: &[(&str, &str)]) -> anyhow::Result<Answer> {
    let mut request = Request::get(path).header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(address, request.body(Full::default())?).await
}

/// `POST` of a JSON body.
///
/// # Errors
///
/// When there is no answer.
pub async fn post(address: SocketAddr, path: &str, body: &serde_json::Value) -> anyhow::Result<Answer> {
    let request = Request::post(path).header("host", address.to_string()).header("content-type", "application/json");
    send(address, request.body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?).await
}
