//! The admin API of one member, called over a connection that is kept.

use std::net::SocketAddr;
use std::time::Duration;

use ::http::Request;
use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;

use crate::http::Answer;
use crate::netns::Machine;

/// A connection that does not come about in this time is given up.
const CONNECT: Duration = Duration::from_secs(1);

/// The way to the admin API of a member, whether it runs or not. Clones lead to the same one.
#[derive(Debug, Clone)]
pub struct Door {
    /// The member's name.
    pub member: String,
    /// The address, on its machine.
    pub address: SocketAddr,
    /// The machine, if it is not this one.
    pub machine: Option<Machine>,
    /// What the caller presents.
    pub token: String,
}

impl Door {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When nobody takes the connection in time.
    pub async fn open(&self) -> anyhow::Result<Admin> {
        let connecting = async {
            match &self.machine {
                Some(machine) => machine.connect(self.address).await,
                None => Ok(TcpStream::connect(self.address).await?),
            }
        };
        let stream = tokio::time::timeout(CONNECT, connecting).await??;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the sender; what went wrong is told to whoever waits for an answer.
        TaskTracker::new().spawn(async move { connection.await.unwrap_or_default() });
        Ok(Admin { sender, host: self.address.to_string(), bearer: format!("Bearer {}", self.token) })
    }

    /// One call over a connection of its own.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub async fn call(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Answer> {
        self.open().await?.call(method, path, body).await.with_context(|| format!("{method} {path}"))
    }
}

/// An open connection.
#[derive(Debug)]
pub struct Admin {
    sender: SendRequest<Full<Bytes>>,
    host: String,
    bearer: String,
}

impl Admin {
    /// Whether the member has not closed it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// One call, with a JSON body where there is one.
    ///
    /// # Errors
    ///
    /// When there is no answer: it is not known then whether the call was carried out.
    pub async fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Answer> {
        let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("authorization", &self.bearer)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        self.sender.ready().await?;
        let (parts, body) = self.sender.send_request(request).await?.into_parts();
        let body = body.collect().await?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        Ok(Answer { status: parts.status, headers: parts.headers, body: body.to_bytes(), trailers })
    }
}
