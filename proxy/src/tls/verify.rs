//! Judges a peer's certificate: a chain to a believed root, and names that are expected.

use std::sync::Arc;

use ca::tls::provider;
use ca::x509::Facts;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};

use super::{Identity, TlsError, root_store};
use crate::xds::matcher::StringMatcher;
use crate::xds::tls::{SanKind, SanMatcher};

/// Roots that are believed.
#[derive(Debug)]
pub struct Trust {
    roots: RootCertStore,
    clients: Arc<dyn ClientCertVerifier>,
}

impl Trust {
    /// From certificates.
    ///
    /// # Errors
    ///
    /// When there is none, or one does not parse.
    pub fn new(roots: &[CertificateDer<'static>]) -> Result<Self, TlsError> {
        let roots = root_store(roots)?;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), provider())
            .build()
            .map_err(|e| TlsError::Certificates(e.to_string()))?;
        Ok(Self { roots, clients })
    }
}

/// Where roots come from.
#[derive(Clone, Debug)]
pub enum Roots {
    /// From the proxy's own identity, as they are at the handshake.
    Identity(Arc<Identity>),
    /// Fixed ones.
    Fixed(Arc<Trust>),
    /// None: any certificate is taken, and no name of it is believed.
    Unverified,
}

/// Judges certificates of peers.
#[derive(Clone, Debug)]
pub struct Verifier {
    roots: Roots,
    /// One of them must hold, if there is any.
    names: Arc<[SanMatcher]>,
    required: bool,
    algorithms: WebPkiSupportedAlgorithms,
    hints: Arc<[DistinguishedName]>,
}

impl Verifier {
    /// A verifier that wants a chain to `roots` and one of `names`.
    #[must_use]
    pub fn new(roots: Roots, names: Arc<[SanMatcher]>) -> Self {
        let algorithms = provider().signature_verification_algorithms;
        Self { roots, names, required: true, algorithms, hints: Arc::new([]) }
    }

    /// The same with other names.
    #[must_use]
    pub fn with_names(self, names: Arc<[SanMatcher]>) -> Self {
        Self { names, ..self }
    }

    /// Whether names of a peer that passes are believed.
    #[must_use]
    pub fn is_verifying(&self) -> bool {
        !matches!(self.roots, Roots::Unverified)
    }

    /// Whether a client without a certificate is turned away.
    #[must_use]
    pub fn client_required(mut self, required: bool) -> Self {
        self.required = required;
        self
    }

    fn trust(&self) -> Result<Option<Arc<Trust>>, Error> {
        match &self.roots {
            Roots::Fixed(trust) => Ok(Some(Arc::clone(trust))),
            Roots::Identity(identity) => {
                identity.trust().map(Some).ok_or_else(|| Error::General("no roots yet".into()))
            }
            Roots::Unverified => Ok(None),
        }
    }

    fn check_names(&self, leaf: &CertificateDer<'_>) -> Result<(), Error> {
        let facts =
            Facts::parse(leaf).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        // one workload, one name (SPIFFE X.509-SVID, section 2)
        if matches!(self.roots, Roots::Identity(_)) && facts.uris.len() > 1 {
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        if self.names.is_empty() || self.names.iter().any(|m| san_matches(m, &facts)) {
            return Ok(());
        }
        Err(Error::InvalidCertificate(CertificateError::NotValidForName))
    }
}

fn san_matches(matcher: &SanMatcher, facts: &Facts) -> bool {
    let value = &matcher.value;
    let any = |names: &[String]| names.iter().any(|n| value.matches(n.as_bytes()));
    let ips = || facts.ips.iter().any(|ip| value.matches(ip.to_string().as_bytes()));
    match matcher.kind {
        SanKind::Uri => any(&facts.uris),
        SanKind::Dns => dns_matches(value, &facts.dns),
        SanKind::Ip => ips(),
        SanKind::Email => false, // no certificate of the mesh has one, and none is read
        SanKind::Any => any(&facts.uris) || dns_matches(value, &facts.dns) || ips(),
    }
}

/// An expected DNS name may stand behind a wildcard in the certificate (RFC 6125, section 6.4.3).
fn dns_matches(matcher: &StringMatcher, names: &[String]) -> bool {
    names.iter().any(|name| {
        if matcher.matches(name.as_bytes()) {
            return true;
        }
        match (matcher, name.strip_prefix("*.")) {
            (StringMatcher::Exact(expected), Some(parent)) => expected
                .split_once('.')
                .is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(parent)),
            _ => false,
        }
    })
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(trust) = self.trust()? {
            let parsed = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.algorithms.all;
            rustls::client::verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &trust.roots,
                intermediates,
                now,
                algorithms,
            )?;
        }
        self.check_names(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if let Some(trust) = self.trust()? {
            trust.clients.verify_client_cert(end_entity, intermediates, now)?;
        }
        self.check_names(end_entity)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
