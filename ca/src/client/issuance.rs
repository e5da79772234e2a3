//! Whom certificates are asked of: a certificate service over the network, or the authority in this process.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::{CertificateSigningRequestDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::metadata::{BinaryMetadataValue, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

use super::{Issuance, Presented, RequestError};
use crate::authn::{Hash, JoinToken};
use crate::authority::{Authority, Serial, SignError};
use crate::identity::{SpiffeId, TrustDomain};
use crate::renewal::Clock;
use crate::service::ENDED_CERTIFICATE;
use crate::service::pb::IstioCertificateRequest;
use crate::service::pb::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::svid::{Chain, Identity};
use crate::tls::verify::FingerprintVerifier;
use crate::tls::{self, ClientTls, ExpectedIdentities, MinVersion, Own, Trust, Verify};
use crate::x509;

/// A connection to the certificate service that takes longer is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A request that takes longer is given up.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Name that is asked for in handshakes (SNI); who answers is decided by its SPIFFE identity.
const SERVER_NAME: &str = "istiod.istio-system.svc";

/// TLS to a control plane of which only the fingerprint of its root is known, as join tokens have it.
///
/// The server's chain must contain the root with this SHA-256, lead to it, and be the control plane's.
///
/// # Errors
///
/// When rustls does not accept the combination.
pub fn bootstrap_tls(root_sha256: Hash, domain: &TrustDomain) -> Result<Arc<ClientConfig>, rustls::Error> {
    let verifier = FingerprintVerifier::new(root_sha256, SpiffeId::control_plane(domain));
    let tls = ClientTls {
        own: Own::Nothing,
        verify: Verify::Nothing,
        alpn: vec![b"h2".to_vec()],
        min_version: MinVersion::Tls12,
    };
    tls.build_with(Arc::new(verifier))
}

/// A certificate service over the network: first with a join token, then with the current certificate.
#[derive(Debug)]
pub struct Remote {
    endpoints: watch::Receiver<Vec<String>>,
    token: Option<JoinToken>,
    next: usize,
}

impl Remote {
    /// Joins with a token, at the addresses in the token.
    #[must_use]
    pub fn with_token(token: JoinToken) -> Self {
        Self { endpoints: fixed(token.endpoints.clone()), token: Some(token), next: 0 }
    }

    /// Only renews what a key store holds, at these addresses (`host:port`).
    #[must_use]
    pub fn renew_only(endpoints: Vec<String>) -> Self {
        Self { endpoints: fixed(endpoints), token: None, next: 0 }
    }

    /// Asks at the addresses that `endpoints` has at the time, the first one first.
    #[must_use]
    pub fn following(self, endpoints: watch::Receiver<Vec<String>>) -> Self {
        Self { endpoints, ..self }
    }

    fn credentials(&self, presented: &Presented) -> Result<(Arc<ClientConfig>, MetadataMap), RequestError> {
        let mut shown = MetadataMap::new();
        let tls_error = |e: rustls::Error| RequestError::Unavailable(e.to_string());
        match (presented, &self.token) {
            (Presented::Certificate(identity), _) => {
                Ok((renewal_tls(Arc::clone(identity)).map_err(tls_error)?, shown))
            }
            (Presented::Ended(identity), _) => {
                let chain = BinaryMetadataValue::from_bytes(identity.chain_pem().as_bytes());
                shown.insert_bin(ENDED_CERTIFICATE, chain);
                Ok((returning_tls(identity).map_err(tls_error)?, shown))
            }
            (Presented::Initial, Some(token)) => {
                let header = format!("Bearer {}", token.to_text());
                let mut header = MetadataValue::try_from(header)
                    .map_err(|_| RequestError::Refused("the join token is damaged".to_owned()))?;
                header.set_sensitive(true);
                let tls = bootstrap_tls(token.root_sha256, &token.trust_domain).map_err(tls_error)?;
                shown.insert("authorization", header);
                Ok((tls, shown))
            }
            (Presented::Initial, None) => {
                Err(RequestError::Refused("there is neither a valid certificate nor a join token".to_owned()))
            }
        }
    }
}

impl Issuance for Remote {
    async fn request(
        &mut self,
        csr: &CertificateSigningRequestDer<'static>,
        presented: &Presented,
        lifetime: Option<Duration>,
    ) -> Result<Chain, RequestError> {
        let endpoint = {
            let endpoints = self.endpoints.borrow();
            endpoints.get(self.next.checked_rem(endpoints.len()).unwrap_or(0)).cloned()
        };
        let endpoint = endpoint.ok_or_else(|| RequestError::Refused("no address to ask at".to_owned()))?;
        // the next attempt asks the next member, also after an answer: members share the work
        self.next = self.next.wrapping_add(1);
        let (tls, shown) = self.credentials(presented)?;
        let channel = connect(&endpoint, tls).await.map_err(|e| match (presented, e) {
            // What a token is pinned to does not change, nor what a machine knew when it was switched off; a control
            // plane may be restored in the course of time.
            (Presented::Initial | Presented::Ended(_), ConnectError::Stranger(text)) => {
                RequestError::Refused(text)
            }
            (_, e) => RequestError::Unavailable(e.into()),
        })?;
        let seconds = lifetime.map_or(0, |lifetime| lifetime.as_secs());
        let mut request = Request::new(IstioCertificateRequest {
            csr: x509::to_pem("CERTIFICATE REQUEST", csr),
            validity_duration: i64::try_from(seconds).unwrap_or(i64::MAX),
            metadata: None,
        });
        *request.metadata_mut() = shown;
        let mut client = IstioCertificateServiceClient::new(channel);
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, client.create_certificate(request))
            .await
            .map_err(|_| RequestError::Unavailable(format!("{endpoint}: no answer in time")))?
            .map_err(|status| from_status(&endpoint, &status))?;
        Chain::from_reply(&answer.into_inner().cert_chain)
            .map_err(|e| RequestError::Unavailable(format!("{endpoint}: {e}")))
    }

    fn can_join(&self) -> bool {
        self.token.is_some()
    }
}

/// Addresses that do not change: the last value of a `watch` stays when its sender has gone.
fn fixed(endpoints: Vec<String>) -> watch::Receiver<Vec<String>> {
    watch::channel(endpoints).1
}

fn renewal_tls(identity: Arc<Identity>) -> Result<Arc<ClientConfig>, rustls::Error> {
    let control_plane = SpiffeId::control_plane(&identity.spiffe_id.trust_domain());
    let (_, fixed) = watch::channel(identity);
    tls::client_config(fixed, ExpectedIdentities::one(control_plane), &[b"h2"])
}

/// TLS without a certificate, to the control plane of a machine whose own has ended.
fn returning_tls(identity: &Identity) -> Result<Arc<ClientConfig>, rustls::Error> {
    let expected = ExpectedIdentities::one(SpiffeId::control_plane(&identity.spiffe_id.trust_domain()));
    let verify = Verify::Peer { trust: Trust::Fixed(Arc::clone(identity.anchors())), expected };
    ClientTls { own: Own::Nothing, verify, alpn: vec![b"h2".to_vec()], min_version: MinVersion::Tls12 }
        .build()
}

/// Why there is no connection to the control plane; names the address and the cause.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody could be reached, or nothing was agreed on.
    #[error("{0}")]
    Failed(String),
    /// Who answers is not who should: its certificate says so.
    #[error("{0}")]
    Stranger(String),
}

impl From<ConnectError> for String {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Failed(text) | ConnectError::Stranger(text) => text,
        }
    }
}

/// Connects to the control plane at `host:port`, for any of its gRPC services.
///
/// # Errors
///
/// When the address is malformed, nobody answers in time, or the handshake fails.
pub async fn connect(endpoint: &str, tls: Arc<ClientConfig>) -> Result<Channel, ConnectError> {
    let told = |e: &dyn std::error::Error| {
        let mut text = format!("{endpoint}: {e}");
        let (mut cause, mut stranger) = (e.source(), false);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            stranger |= is_stranger(error);
            cause = error.source();
        }
        if stranger { ConnectError::Stranger(text) } else { ConnectError::Failed(text) }
    };
    let uri = Endpoint::from_shared(format!("http://{endpoint}")).map_err(|e| told(&e))?;
    let address = endpoint.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (address, tls) = (address.clone(), Arc::clone(&tls));
        async move {
            let socket = TcpStream::connect(&address).await?;
            socket.set_nodelay(true)?;
            let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
            let stream = TlsConnector::from(tls).connect(name, socket).await?;
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    let connecting = uri.connect_with_connector(connector);
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(told(&error)),
        Err(_) => Err(ConnectError::Failed(format!("{endpoint}: no connection in time"))),
    }
}

fn is_stranger(error: &(dyn std::error::Error + 'static)) -> bool {
    let of_tls = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    of_tls.and_then(|e| e.downcast_ref()).is_some_and(|e| matches!(e, rustls::Error::InvalidCertificate(_)))
}

#[expect(clippy::wildcard_enum_match_arm, reason = "all other codes may pass")]
fn from_status(endpoint: &str, status: &Status) -> RequestError {
    let text = format!("{endpoint}: {}", status.message());
    match status.code() {
        Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated | Code::Unimplemented => {
            RequestError::Refused(text)
        }
        _ => RequestError::Unavailable(text),
    }
}

/// The authority in the same process: how the control plane gets its own identity.
pub struct Local {
    /// The authority that signs at present.
    pub authority: Box<dyn Fn() -> Arc<Authority> + Send + Sync>,
    /// DNS names and IP addresses by which clients call the control plane.
    pub dns_names: Vec<String>,
    /// What time it is.
    pub clock: Clock,
}

impl Issuance for Local {
    async fn request(
        &mut self,
        csr: &CertificateSigningRequestDer<'static>,
        _: &Presented,
        lifetime: Option<Duration>,
    ) -> Result<Chain, RequestError> {
        let failed = |e: SignError| RequestError::Unavailable(e.to_string());
        let serial = Serial::random().map_err(failed)?;
        let (authority, now) = ((self.authority)(), (self.clock)());
        authority.sign_control_plane(csr, &self.dns_names, lifetime, now, serial).map_err(failed)
    }

    fn can_join(&self) -> bool {
        true
    }
}
