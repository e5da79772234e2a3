//! The gRPC certificate service: who is calling, then what is signed, then the reply.
//!
//! `istio.v1.auth.IstioCertificateService`, on the wire compatible with agents of Istio. A caller proves itself with
//! a join token (`authorization: Bearer istio-join.v1...`), with the client certificate of its connection, or, after that
//! has ended, with the certificate in [`ENDED_CERTIFICATE`] and a request for the key of that certificate.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};

use crate::authn::{AuthnError, Caller, Hash, JoinToken, PresentedToken, TOKEN_PREFIX};
use crate::authority::{Authority, Serial, SignError, names_are_of};
use crate::dormancy::{self, DormancyRefused};
use crate::identity::SpiffeId;
use crate::renewal::Clock;
use crate::state::{RedeemRefused, TokenRefused};
use crate::tls::{Anchors, PeerCertificates};
use crate::x509;

/// The wire types of the service.
#[expect(missing_docs, reason = "generated; proto/istio_ca.proto says what each part is")]
#[expect(clippy::allow_attributes_without_reason, reason = "generated")]
pub mod pb {
    tonic::include_proto!("istio.v1.auth");
}

use pb::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use pb::{IstioCertificateRequest, IstioCertificateResponse};

/// Metadata in which a caller presents its certificate that has ended: the chain in PEM, leaf first.
pub const ENDED_CERTIFICATE: &str = "istio-ended-certificate-bin";

/// Longest request that is read, in bytes.
const MAX_REQUEST: usize = 64 * 1024;

/// Why a token was not redeemed.
#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    /// The token is refused.
    #[error(transparent)]
    Refused(#[from] RedeemRefused),
    /// The identity that it is bound to is refused.
    #[error(transparent)]
    Identity(#[from] TokenRefused),
    /// It cannot be decided now; the caller may try again.
    #[error("join tokens cannot be redeemed at this time: {0}")]
    Unavailable(String),
}

/// Why a caller that has proved who it is gets no certificate.
#[derive(Debug, thiserror::Error)]
pub enum NotAdmitted {
    /// Its node was revoked.
    #[error("{0}")]
    Revoked(String),
    /// It cannot be decided now; the caller may try again.
    #[error("whether this machine may come back cannot be decided at this time: {0}")]
    Unavailable(String),
}

/// What the service needs of the control plane behind it.
pub trait Backend: Send + Sync + 'static {
    /// Redeems a token for the public key with this hash, of a machine that calls from there; repeated with the same
    /// key, it succeeds again.
    ///
    /// # Errors
    ///
    /// When the token is refused, or it cannot be decided now.
    fn redeem(
        &self,
        token: PresentedToken,
        key_hash: Hash,
        from: Option<IpAddr>,
    ) -> impl Future<Output = Result<Caller, RedeemError>> + Send;

    /// Whether a caller may have a certificate, whose proof holds: its node may have been revoked.
    ///
    /// # Errors
    ///
    /// When it was, or it cannot be decided now.
    fn admit(&self, caller: &Caller) -> impl Future<Output = Result<(), NotAdmitted>> + Send;

    /// How long after the end of its certificate a machine may come back with it.
    fn dormancy(&self) -> Duration;

    /// The authority that signs at present.
    fn authority(&self) -> Arc<Authority>;
}

/// The certificate service.
#[derive(Clone)]
pub struct CertificateService<B> {
    backend: Arc<B>,
    clock: Clock,
}

impl<B: Backend> CertificateService<B> {
    /// A service over `backend`.
    pub fn new(backend: Arc<B>, clock: Clock) -> Self {
        Self { backend, clock }
    }

    /// The service as tonic serves it, with its limit on the size of requests.
    #[must_use]
    pub fn into_server(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }

    async fn create(&self, request: Request<IstioCertificateRequest>) -> Result<Vec<String>, Status> {
        let credential = Credential::of(&request)?;
        let from = request.extensions().get::<PeerCertificates>().and_then(PeerCertificates::address);
        let request = request.into_inner();
        let csr = x509::csr_from_pem(request.csr.as_bytes()).map_err(|e| invalid(&e))?;
        let public_key = x509::csr_public_key(&csr).map_err(|e| invalid(&e))?;
        let authority = self.backend.authority();
        let caller = match credential {
            Credential::Token { presented, says } => {
                // A request that will not be signed does not use the token up.
                names_are_of(&csr, &says).map_err(|e| sign_status(&e))?;
                let key = Hash::of(&public_key);
                self.backend.redeem(presented, key, from).await.map_err(redeem_status)?.with_key(key)
            }
            Credential::Certificate(peer) => {
                Caller::from_certificate(peer.chain(), (self.clock)()).map_err(|e| authn_status(&e))?
            }
            Credential::Ended(pem) => {
                let chain = x509::certificates_from_pem(&pem).map_err(|e| invalid(&e))?;
                let anchors = Anchors::new(authority.roots()).map_err(|e| Status::internal(e.to_string()))?;
                dormancy::returning(&chain, &public_key, &anchors, self.backend.dormancy(), (self.clock)())
                    .map_err(|e| dormancy_status(&e))?
            }
        };
        self.backend.admit(&caller).await.map_err(|e| admit_status(&e))?;
        let requested = u64::try_from(request.validity_duration).ok().map(Duration::from_secs);
        let serial =
            caller.node().map_or_else(Serial::random, Serial::of_node).map_err(|e| sign_status(&e))?;
        let chain =
            authority.sign(&csr, &caller, requested, (self.clock)(), serial).map_err(|e| sign_status(&e))?;
        tracing::info!(peer = %caller.identity(), node = ?caller.node(), proof = ?caller.proof(), "certificate issued");
        Ok(chain.to_reply())
    }
}

#[tonic::async_trait]
impl<B: Backend> IstioCertificateService for CertificateService<B> {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let result = self.create(request).await;
        match result {
            Ok(cert_chain) => Ok(Response::new(IstioCertificateResponse { cert_chain })),
            Err(status) => {
                tracing::debug!(code = ?status.code(), error = status.message(), "certificate refused");
                Err(status)
            }
        }
    }
}

/// What the caller showed. A token goes before a certificate: who shows one wants the token's identity.
enum Credential {
    Token {
        presented: PresentedToken,
        /// The identity that the token's text says, which whoever presents it may have written.
        says: SpiffeId,
    },
    Certificate(PeerCertificates),
    /// A chain in PEM.
    Ended(Vec<u8>),
}

impl Credential {
    fn of(request: &Request<IstioCertificateRequest>) -> Result<Self, Status> {
        if let Some(header) = request.metadata().get("authorization") {
            let text = header.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
            let token = text.filter(|text| text.starts_with(TOKEN_PREFIX)).ok_or_else(|| {
                Status::unauthenticated(format!(
                    "the bearer token must be a join token (`{TOKEN_PREFIX}...`)"
                ))
            })?;
            let token = JoinToken::parse(token).map_err(|e| Status::unauthenticated(e.to_string()))?;
            let says = SpiffeId::workload(&token.trust_domain, &token.namespace, &token.service_account);
            let says = says.map_err(|e| redeem_status(TokenRefused::from(e).into()))?;
            return Ok(Self::Token { presented: token.presented(), says });
        }
        if let Some(chain) = request.metadata().get_bin(ENDED_CERTIFICATE) {
            let chain = chain.to_bytes();
            let chain = chain.map_err(|_| Status::invalid_argument("the certificate is not base64"))?;
            return Ok(Self::Ended(chain.to_vec()));
        }
        match request.extensions().get::<PeerCertificates>() {
            Some(peer) if !peer.chain().is_empty() => Ok(Self::Certificate(peer.clone())),
            Some(_) | None => Err(authn_status(&AuthnError::Missing)),
        }
    }
}

fn invalid(error: &x509::X509Error) -> Status {
    Status::invalid_argument(error.to_string())
}

fn authn_status(error: &AuthnError) -> Status {
    let text = with_cause(error);
    match error {
        AuthnError::Missing | AuthnError::NotValid => Status::unauthenticated(text),
        AuthnError::Certificate(_) => Status::permission_denied(text),
    }
}

fn redeem_status(error: RedeemError) -> Status {
    let text = with_cause(&error);
    match error {
        RedeemError::Refused(RedeemRefused::Unknown) => Status::unauthenticated(text),
        RedeemError::Refused(
            RedeemRefused::Expired
            | RedeemRefused::UsedUp
            | RedeemRefused::Elsewhere(_)
            | RedeemRefused::Revoked(_),
        )
        | RedeemError::Identity(_) => Status::permission_denied(text),
        RedeemError::Unavailable(_) => Status::unavailable(text),
    }
}

fn dormancy_status(error: &DormancyRefused) -> Status {
    match error {
        DormancyRefused::Certificate(_) => Status::invalid_argument(error.to_string()),
        DormancyRefused::Root(_) | DormancyRefused::Key | DormancyRefused::TooLong { .. } => {
            Status::permission_denied(error.to_string())
        }
    }
}

fn admit_status(error: &NotAdmitted) -> Status {
    match error {
        NotAdmitted::Revoked(_) => Status::permission_denied(error.to_string()),
        NotAdmitted::Unavailable(_) => Status::unavailable(error.to_string()),
    }
}

fn sign_status(error: &SignError) -> Status {
    let text = with_cause(error);
    match error {
        SignError::Csr(_) | SignError::ForeignNames { .. } => Status::invalid_argument(text),
        SignError::Reserved(_) | SignError::TrustDomain { .. } | SignError::Name(_) => {
            Status::permission_denied(text)
        }
        SignError::IssuerNotValid
        | SignError::Issuer(_)
        | SignError::NoRandomness
        | SignError::Signing(_) => {
            tracing::error!(error = %text, "the certificate authority cannot sign");
            Status::unavailable(text)
        }
    }
}

fn with_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
#[path = "service/tests.rs"]
mod tests;
