//! Who a peer must be: the roots that are believed and the identities that are expected.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};

use super::{IdentityWatch, NameMatcher, provider};
use crate::authn::Hash;
use crate::identity::{SpiffeId, TrustDomain};
use crate::x509::{self, Facts, X509Error};

/// Roots, ready to verify with.
#[derive(Debug)]
pub struct Anchors(Vec<TrustAnchor<'static>>);

impl Anchors {
    /// From certificates.
    ///
    /// # Errors
    ///
    /// When one of them cannot be a root.
    pub fn new(roots: &[CertificateDer<'_>]) -> Result<Self, webpki::Error> {
        let anchor = |root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned());
        Ok(Self(roots.iter().map(anchor).collect::<Result<_, _>>()?))
    }

    /// From a PEM text.
    ///
    /// # Errors
    ///
    /// When it holds no certificate, or one that cannot be a root.
    pub fn from_pem(pem: &[u8]) -> Result<Self, X509Error> {
        let roots = x509::certificates_from_pem(pem)?;
        Self::new(&roots).map_err(|e| X509Error::Certificate(e.to_string()))
    }

    /// Whether a chain leads from `leaf` to one of these roots, is valid at `now`, and is meant for `usage`.
    ///
    /// # Errors
    ///
    /// What is wrong with the chain.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), webpki::Error> {
        let algorithms = provider().signature_verification_algorithms.all;
        EndEntityCert::try_from(leaf)?
            .verify_for_usage(algorithms, &self.0, intermediates, now, usage, None, None)
            .map(drop)
    }
}

/// Whose signatures are believed.
#[derive(Clone)]
pub enum Trust {
    /// Always these roots.
    Fixed(Arc<Anchors>),
    /// The roots that came with the identity that is current.
    Current(IdentityWatch),
}

impl Trust {
    fn anchors(&self) -> Arc<Anchors> {
        match self {
            Self::Fixed(anchors) => Arc::clone(anchors),
            Self::Current(watch) => Arc::clone(watch.borrow().anchors()),
        }
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fixed(_) => "Fixed",
            Self::Current(_) => "Current",
        })
    }
}

/// Which names a peer's certificate may have.
#[derive(Debug, Clone)]
pub enum ExpectedIdentities {
    /// Exactly one URI name, which is one of these identities. An empty set accepts nobody.
    Exactly(BTreeSet<SpiffeId>),
    /// Exactly one URI name, an identity of one of these trust domains.
    TrustDomains(BTreeSet<TrustDomain>),
    /// The DNS name or IP address that the client wanted to reach (clients only).
    ServerName,
    /// Some name matches some matcher; without matchers, any certificate of the roots is accepted.
    Names(Vec<NameMatcher>),
}

impl ExpectedIdentities {
    /// Exactly this identity.
    #[must_use]
    pub fn one(identity: SpiffeId) -> Self {
        Self::Exactly([identity].into())
    }

    fn check(&self, leaf: &CertificateDer<'_>, server: Option<&ServerName<'_>>) -> Result<(), rustls::Error> {
        let facts = || Facts::parse(leaf).map_err(PeerRefused::Certificate);
        let identity = || facts()?.spiffe_id().map_err(PeerRefused::Certificate);
        let accepted = match self {
            Self::Exactly(expected) => {
                let found = identity()?;
                if expected.contains(&found) { Ok(()) } else { Err(PeerRefused::Identity { found }) }
            }
            Self::TrustDomains(domains) => {
                let found = identity()?;
                if domains.iter().any(|domain| domain.as_str() == found.trust_domain_str()) {
                    Ok(())
                } else {
                    Err(PeerRefused::TrustDomain { found })
                }
            }
            Self::ServerName => {
                let name = server.ok_or(PeerRefused::Names)?;
                return EndEntityCert::try_from(leaf)
                    .and_then(|cert| cert.verify_is_valid_for_subject_name(name))
                    .map_err(refused);
            }
            Self::Names(matchers) => {
                let facts = facts()?;
                let matches = matchers.is_empty() || matchers.iter().any(|matcher| matcher.matches(&facts));
                if matches { Ok(()) } else { Err(PeerRefused::Names) }
            }
        };
        Ok(accepted?)
    }
}

/// Why a peer with a valid chain is refused.
#[derive(Clone, thiserror::Error)]
pub enum PeerRefused {
    /// Its certificate does not have a single SPIFFE identity.
    #[error("the peer's certificate has no identity: {0}")]
    Certificate(X509Error),
    /// It is somebody else than expected.
    #[error("the peer is `{found}`, which is none of the expected identities")]
    Identity {
        /// Who it is.
        found: SpiffeId,
    },
    /// It belongs to a trust domain that is not accepted.
    #[error("the peer `{found}` is of a trust domain that is not accepted")]
    TrustDomain {
        /// Who it is.
        found: SpiffeId,
    },
    /// None of its names matches.
    #[error("no name of the peer's certificate is among the expected ones")]
    Names,
    /// The chain of a server does not contain the root whose fingerprint was given.
    #[error("the server's chain does not contain the root with the expected fingerprint")]
    Fingerprint,
}

/// rustls prints what is inside its errors with `Debug`: operators read the sentence there.
impl fmt::Debug for PeerRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<PeerRefused> for rustls::Error {
    fn from(reason: PeerRefused) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(reason))))
    }
}

/// How a peer's certificate is verified.
#[derive(Debug, Clone)]
pub enum Verify {
    /// Not at all: only that the peer has the key of what it presents. For servers of which nothing is known.
    Nothing,
    /// A chain to a root that is believed, and a name that is expected.
    Peer {
        /// Whose signatures are believed.
        trust: Trust,
        /// Which names are expected.
        expected: ExpectedIdentities,
    },
}

/// The verifier of both sides.
#[derive(Debug)]
pub struct PeerVerifier {
    verify: Verify,
    mandatory: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PeerVerifier {
    /// A verifier; `mandatory` tells whether a client must present a certificate.
    #[must_use]
    pub fn new(verify: Verify, mandatory: bool) -> Self {
        Self { verify, mandatory, algorithms: provider().signature_verification_algorithms }
    }

    fn check(
        &self,
        chain: (&CertificateDer<'_>, &[CertificateDer<'_>]),
        server: Option<&ServerName<'_>>,
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), rustls::Error> {
        let (leaf, intermediates) = chain;
        match &self.verify {
            Verify::Nothing => Ok(()),
            Verify::Peer { trust, expected } => {
                trust.anchors().verify(leaf, intermediates, now, usage).map_err(refused)?;
                expected.check(leaf, server)
            }
        }
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check((leaf, intermediates), None, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check((leaf, intermediates), Some(server), now, KeyUsage::server_auth())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies a server of which only the fingerprint of its root is known: the root must be in the chain it presents.
#[derive(Debug)]
pub(crate) struct FingerprintVerifier {
    root_sha256: Hash,
    expected: ExpectedIdentities,
    algorithms: WebPkiSupportedAlgorithms,
}

impl FingerprintVerifier {
    pub(crate) fn new(root_sha256: Hash, expected: SpiffeId) -> Self {
        let algorithms = provider().signature_verification_algorithms;
        Self { root_sha256, expected: ExpectedIdentities::one(expected), algorithms }
    }
}

impl ServerCertVerifier for FingerprintVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let root = intermediates.iter().find(|cert| Hash::of(cert).matches(&self.root_sha256));
        let root = root.ok_or(PeerRefused::Fingerprint)?;
        let anchors = Anchors::new(std::slice::from_ref(root)).map_err(refused)?;
        anchors.verify(leaf, intermediates, now, KeyUsage::server_auth()).map_err(refused)?;
        self.expected.check(leaf, Some(server))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The alert that fits what webpki found.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "all other faults of a chain have one meaning to the peer"
)]
fn refused(error: webpki::Error) -> rustls::Error {
    use webpki::Error as E;
    let reason = match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertExpired { .. } | E::InvalidCertValidity => CertificateError::Expired,
        E::CertNotValidYet { .. } => CertificateError::NotValidYet,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::CertNotValidForName(_) => CertificateError::NotValidForName,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    rustls::Error::InvalidCertificate(reason)
}
