//! Claims and what was measured of them, and the two clients that must be refused.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use owo_colors::Style;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::output::paint;

/// A refused client waits no longer than this for an answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// What was claimed, and whether it holds.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    held: usize,
    broken: Vec<String>,
}

impl Claims {
    /// Records one claim, and gives the line that tells it.
    pub(crate) fn add(&mut self, what: &str, expected: &str, holds: bool, seen: String) -> String {
        if holds {
            self.held += 1;
            return format!("{} {what}: {seen}", paint("ok  ", Style::new().green()));
        }
        self.broken.push(what.to_owned());
        format!("{} {what}: expected {expected}, seen {seen}", paint("FAIL", Style::new().red().bold()))
    }

    /// Whether all claims hold.
    pub(crate) fn all_hold(&self) -> bool {
        self.broken.is_empty() && self.held > 0
    }

    /// One line about all of them.
    pub(crate) fn summary(&self) -> String {
        match self.broken.as_slice() {
            [] => format!("\nall {} claims hold\n", self.held),
            broken => format!("\n{} of {} claims do not hold: {}\n", broken.len(), broken.len() + self.held, broken.join("; ")),
        }
    }
}

/// A refusal in words.
pub(crate) fn words(outcome: &anyhow::Result<String>) -> String {
    match outcome {
        Ok(answer) => format!("answered {}", answer.lines().next().unwrap_or_default()),
        Err(error) => format!("refused ({error:#})"),
    }
}

/// Sends a plaintext request; the first bytes of the answer.
///
/// # Errors
///
/// When the connection ends without an answer.
pub(crate) async fn plaintext(address: SocketAddr) -> anyhow::Result<String> {
    let stream = TcpStream::connect(address).await?;
    tokio::time::timeout(PATIENCE, ask(stream)).await.context("no answer")?
}

/// Sends a request over mTLS with the right identity, but signed by a CA of our own.
///
/// # Errors
///
/// When the connection ends without an answer.
pub(crate) async fn foreign_certificate(address: SocketAddr) -> anyhow::Result<String> {
    let config = foreign_client()?;
    let connector = tokio_rustls::TlsConnector::from(config);
    let exchange = async {
        let tcp = TcpStream::connect(address).await?;
        let name = rustls::pki_types::ServerName::try_from("reviews.default.svc.cluster.local")?;
        ask(connector.connect(name, tcp).await?).await
    };
    tokio::time::timeout(PATIENCE, exchange).await.context("no answer")?
}

async fn ask(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) -> anyhow::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: reviews\r\nconnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    ensure!(!answer.is_empty(), "connection closed without an answer");
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
