//! Who is who on the peer port.
//!
//! The peers' authority signs for a trust domain of its own. All members have the control plane's identity there, so
//! that a machine with a ticket can verify any of them by the fingerprint of the root; which member it is says a DNS
//! name in the certificate.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use ca::authority::{Authority, Lifetimes, Serial, SignError, SigningRoot};
use ca::client::{CertificateSource, Local, SourceError};
use ca::identity::{SpiffeId, TrustDomain};
use ca::renewal::Clock;
use ca::tls::accept::PeerCertificates;
use ca::tls::{
    ClientAuth, ClientTls, ExpectedIdentities, IdentityWatch, MinVersion, Own, ServerTls, Trust, Verify,
};
use ca::x509::Facts;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint, Uri};

/// The trust domain of the peers' authority.
pub const DOMAIN: &str = "istiod-peers";

/// A connection to a peer that takes longer is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection on which nothing was heard is asked whether it lives; so often,
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// and is given up after this long without an answer.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes under way to one peer before it acknowledges some.
const WINDOW: u32 = 8 << 20;

/// The trust domain of the peers' authority.
#[must_use]
#[expect(clippy::expect_used, reason = "the constant is a trust domain, as a test shows")]
pub fn domain() -> TrustDomain {
    TrustDomain::parse(DOMAIN).expect("is a trust domain")
}

/// The name of a member in its certificate.
#[must_use]
pub fn server_name(id: u64) -> String {
    format!("member-{id}.{DOMAIN}")
}

/// The member that presented a verified certificate.
#[must_use]
pub fn member_of(peer: &PeerCertificates) -> Option<u64> {
    let facts = Facts::parse(peer.chain().first()?).ok()?;
    let id =
        |name: &String| name.strip_prefix("member-")?.strip_suffix(DOMAIN)?.strip_suffix('.')?.parse().ok();
    facts.dns.iter().find_map(id)
}

/// Signs this member's own peer certificate: from the root to a leaf in this process.
struct Issuer {
    root: SigningRoot,
    id: u64,
    clock: Clock,
    current: ArcSwap<Authority>,
}

impl Issuer {
    fn issue(root: &SigningRoot, id: u64, now: SystemTime) -> Result<Authority, SignError> {
        root.member(&domain(), &format!("peer {id}"), Lifetimes::default(), now, Serial::random()?)
    }

    /// The intermediate, a new one when it has lived half its life.
    fn authority(&self) -> Arc<Authority> {
        let current = self.current.load_full();
        let ((begin, end), now) = (current.validity(), (self.clock)());
        if now < begin + end.duration_since(begin).unwrap_or_default() / 2 {
            return current;
        }
        match Self::issue(&self.root, self.id, now) {
            Ok(next) => {
                let next = Arc::new(next);
                self.current.store(Arc::clone(&next));
                next
            }
            Err(error) => {
                tracing::error!(%error, "this member's intermediate for peers is not renewed");
                current
            }
        }
    }
}

/// The certificate of member `id` towards its peers, renewed on `tasks` until `stop`.
///
/// # Errors
///
/// When the peers' root cannot sign it.
pub async fn identity(
    root: SigningRoot,
    id: u64,
    clock: Clock,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> Result<IdentityWatch, IdentityError> {
    let first = Issuer::issue(&root, id, clock())?;
    let issuer = Issuer { root, id, clock: clock.clone(), current: ArcSwap::from_pointee(first) };
    let local = Local {
        authority: Box::new(move || issuer.authority()),
        dns_names: vec![server_name(id)],
        clock: clock.clone(),
    };
    let source = CertificateSource {
        issuance: local,
        clock,
        store: None,
        lifetime: None,
        expected: Some(SpiffeId::control_plane(&domain())),
        rng: fastrand::Rng::new(),
    };
    Ok(source.start(tasks, stop).await?)
}

/// Why there is no certificate for the peer port.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The root does not sign an intermediate.
    #[error("the peers' certificate authority cannot sign")]
    Sign(#[from] SignError),
    /// There is no leaf.
    #[error("there is no certificate for the peer port")]
    Source(#[from] SourceError),
}

/// TLS of the peer port. Clients without a certificate get in, to enrol; all other calls refuse them.
///
/// # Errors
///
/// When rustls does not accept the combination.
pub fn server_config(identity: IdentityWatch) -> Result<Arc<ServerConfig>, rustls::Error> {
    let expected = ExpectedIdentities::one(SpiffeId::control_plane(&domain()));
    let verify = Verify::Peer { trust: Trust::Current(identity.clone()), expected };
    ServerTls {
        own: Own::CurrentWithRoots(identity),
        client_auth: ClientAuth::Optional,
        verify,
        alpn: vec![b"h2".to_vec()],
        min_version: MinVersion::Tls13,
    }
    .build()
}

/// TLS towards peers.
///
/// # Errors
///
/// When rustls does not accept the combination.
pub fn client_config(identity: IdentityWatch) -> Result<Arc<ClientConfig>, rustls::Error> {
    let verify =
        Verify::Peer { trust: Trust::Current(identity.clone()), expected: ExpectedIdentities::ServerName };
    ClientTls {
        own: Own::Current(identity),
        verify,
        alpn: vec![b"h2".to_vec()],
        min_version: MinVersion::Tls13,
    }
    .build()
}

/// Connects to member `id` at `HOST:PORT`. A connection that goes silent is closed within seconds.
///
/// # Errors
///
/// What keeps it from being connected, for people.
pub async fn connect(address: &str, id: u64, tls: Arc<ClientConfig>) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| error.to_string())?;
    let endpoint = endpoint
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(WINDOW);
    let (target, name) = (address.to_owned(), server_name(id));
    let connector = tower::service_fn(move |_: Uri| {
        let (target, name, tls) = (target.clone(), name.clone(), Arc::clone(&tls));
        async move {
            let socket = TcpStream::connect(&target).await?;
            socket.set_nodelay(true)?;
            let name = ServerName::try_from(name).map_err(io::Error::other)?;
            Ok::<_, io::Error>(TokioIo::new(TlsConnector::from(tls).connect(name, socket).await?))
        }
    });
    match tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(with_causes(&error)),
        Err(_) => Err("no connection in time".to_owned()),
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// How the peer port's server is set up.
pub(super) fn server() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(WINDOW)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[tokio::test]
    async fn a_certificate_says_which_member_presents_it() {
        assert_eq!(domain().as_str(), DOMAIN);
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let root = SigningRoot::generate(&domain(), now, Serial::random().unwrap()).unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let clock: Clock = Arc::new(move || now);
        let watch = identity(root, 12, clock, &tasks, stop.clone()).await.unwrap();
        let chain = watch.borrow().certified().cert.clone();
        assert_eq!(member_of(&PeerCertificates::new(&chain)), Some(12));
        assert_eq!(member_of(&PeerCertificates::default()), None);
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
