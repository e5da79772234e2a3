//! Claims and what was measured of them, and the two clients that must be refused.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use ca::authn::Caller;
use ca::authority::{Lifetimes, Serial, SigningRoot};
use ca::client::Identity;
use ca::identity::{SpiffeId, TrustDomain};
use ca::svid::PrivateKey;
use ca::tls::{ClientTls, MinVersion, Own, Verify};
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
            broken => format!(
                "\n{} of {} claims do not hold: {}\n",
                broken.len(),
                broken.len() + self.held,
                broken.join("; ")
            ),
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

async fn ask(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
) -> anyhow::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: reviews\r\nconnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    ensure!(!answer.is_empty(), "connection closed without an answer");
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// A client with an identity of the mesh's form, from a root that the mesh does not know; it believes any server.
fn foreign_client() -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let domain = TrustDomain::parse("cluster.local")?;
    let now = now();
    let root = SigningRoot::generate(&domain, now, Serial::random()?)?;
    let authority = root.member(&domain, "foreign", Lifetimes::default(), now, Serial::random()?)?;
    let key = PrivateKey::generate()?;
    let request = key.request()?;
    let caller =
        Caller::from_redeemed_token(SpiffeId::workload(&domain, "default", "productpage")?, "foreign");
    let chain = authority.sign(request.der(), &caller, None, now, Serial::random()?)?;
    let identity = Identity::new(chain, key, now)?;
    let own = Own::Fixed(identity.certified().clone());
    let tls = ClientTls {
        own,
        verify: Verify::Nothing,
        alpn: vec![b"istio-http/1.1".to_vec()],
        min_version: MinVersion::Tls12,
    };
    Ok(tls.build()?)
}

#[expect(clippy::disallowed_methods, reason = "certificates of a client of the demo begin now")]
fn now() -> SystemTime {
    SystemTime::now()
}
