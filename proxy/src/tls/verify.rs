//! Judges a peer's certificate: a chain to a believed root, and names that are expected.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ahash::AHashMap;
use ca::tls::provider;
use ca::x509::{self, Facts};
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

/// The most chains that are remembered; beyond it the memory starts anew.
const MOST_CHAINS: usize = 1024;

/// Roots that are believed.
#[derive(Debug)]
pub struct Trust {
    roots: RootCertStore,
    clients: Arc<dyn ClientCertVerifier>,
    chains: Mutex<AHashMap<Box<[u8]>, Chain>>,
}

/// What a peer's own certificate says.
#[derive(Debug)]
pub struct Leaf {
    /// As far as the mesh looks at it.
    pub facts: Facts,
    /// Its SHA-256, in lower-case hexadecimal.
    pub fingerprint: String,
}

/// A chain that leads to a believed root. Peers come back with the same one until they renew it, and need not have its
/// signatures checked again; that they hold its key is proven anew in each handshake.
#[derive(Debug, Clone)]
struct Chain {
    leaf: Arc<Leaf>,
    /// While all of its certificates are valid.
    valid: RangeInclusive<SystemTime>,
}

/// What a certificate must be good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To be a client.
    Client,
    /// To be a server.
    Server,
}

impl Leaf {
    fn read(der: &CertificateDer<'_>) -> Result<Arc<Self>, Error> {
        let facts = facts(der)?;
        Ok(Arc::new(Self { facts, fingerprint: x509::hex(&x509::sha256(der)) }))
    }
}

impl Chain {
    fn read(leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<Self, Error> {
        let leaf = Leaf::read(leaf)?;
        let (mut from, mut until) = (leaf.facts.not_before, leaf.facts.not_after);
        for other in others {
            let other = facts(other)?;
            (from, until) = (from.max(other.not_before), until.min(other.not_after));
        }
        Ok(Self { leaf, valid: from..=until })
    }
}

fn facts(der: &CertificateDer<'_>) -> Result<Facts, Error> {
    Facts::parse(der).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))
}

/// The chain in one piece, for one role.
fn key(role: Role, leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Box<[u8]> {
    let mut key = vec![u8::from(role == Role::Client)];
    for certificate in std::iter::once(leaf).chain(others) {
        key.extend_from_slice(&certificate.len().to_be_bytes());
        key.extend_from_slice(certificate);
    }
    key.into()
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
        Ok(Self { roots, clients, chains: Mutex::default() })
    }

    fn chains(&self) -> MutexGuard<'_, AHashMap<Box<[u8]>, Chain>> {
        // nothing is left half done under this lock
        self.chains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The leaf of a chain that leads to one of these roots.
    fn check(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Arc<Leaf>, Error> {
        let (key, time) = (key(role, leaf, others), UNIX_EPOCH + Duration::from_secs(now.as_secs()));
        if let Some(chain) = self.chains().get(&key).filter(|chain| chain.valid.contains(&time)) {
            return Ok(Arc::clone(&chain.leaf));
        }
        match role {
            Role::Client => {
                self.clients.verify_client_cert(leaf, others, now)?;
            }
            Role::Server => {
                let parsed = ParsedCertificate::try_from(leaf)?;
                let algorithms = provider().signature_verification_algorithms.all;
                rustls::client::verify_server_cert_signed_by_trust_anchor(
                    &parsed,
                    &self.roots,
                    others,
                    now,
                    algorithms,
                )?;
            }
        }
        let chain = Chain::read(leaf, others)?;
        let found = Arc::clone(&chain.leaf);
        let mut chains = self.chains();
        if chains.len() >= MOST_CHAINS {
            chains.clear();
        }
        chains.insert(key, chain);
        Ok(found)
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

    /// What the certificate of a peer says that was let in.
    #[must_use]
    pub fn leaf(&self, role: Role, chain: &[CertificateDer<'_>]) -> Option<Arc<Leaf>> {
        let (leaf, others) = chain.split_first()?;
        let known = self.trust().ok().flatten();
        let known =
            known.and_then(|trust| Some(Arc::clone(&trust.chains().get(&key(role, leaf, others))?.leaf)));
        known.or_else(|| Leaf::read(leaf).ok())
    }

    fn check(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let leaf = match self.trust()? {
            Some(trust) => trust.check(role, leaf, others, now)?,
            None => Leaf::read(leaf)?,
        };
        self.check_names(&leaf.facts)
    }

    fn check_names(&self, facts: &Facts) -> Result<(), Error> {
        // one workload, one name (SPIFFE X.509-SVID, section 2)
        if matches!(self.roots, Roots::Identity(_)) && facts.uris.len() > 1 {
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        if self.names.is_empty() || self.names.iter().any(|m| san_matches(m, facts)) {
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
        self.check(Role::Server, end_entity, intermediates, now)?;
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
        self.check(Role::Client, end_entity, intermediates, now)?;
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

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
        SanType, date_time_ymd,
    };

    use super::*;

    struct Authority(CertifiedIssuer<'static, KeyPair>);

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(DnType::CommonName, "root");
            Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
        }

        fn verifier(&self) -> Verifier {
            let trust = Trust::new(&[self.0.der().clone()]).unwrap();
            Verifier::new(Roots::Fixed(Arc::new(trust)), Arc::new([]))
        }

        /// Valid in 2030, for clients alone.
        fn leaf(&self) -> CertificateDer<'static> {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/a".try_into().unwrap())];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            (params.not_before, params.not_after) = (date_time_ymd(2030, 1, 1), date_time_ymd(2031, 1, 1));
            let key = KeyPair::generate().unwrap();
            params.signed_by(&key, &self.0).unwrap().der().clone()
        }
    }

    const YEAR: u64 = 365 * 24 * 3600;

    fn at(year: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs((year - 1970) * YEAR + YEAR / 2))
    }

    #[test]
    fn a_chain_is_remembered_for_its_role_while_it_is_valid() {
        let authority = Authority::new();
        let (verifier, leaf) = (authority.verifier(), authority.leaf());
        let check = |role, now| verifier.check(role, &leaf, &[], now);
        let remembered = || match &verifier.roots {
            Roots::Fixed(trust) => trust.chains().len(),
            Roots::Identity(_) | Roots::Unverified => 0,
        };
        check(Role::Client, at(2029)).unwrap_err();
        assert_eq!(remembered(), 0);
        check(Role::Client, at(2030)).unwrap();
        check(Role::Client, at(2030)).unwrap();
        assert_eq!(remembered(), 1);
        check(Role::Client, at(2032)).unwrap_err();
        check(Role::Server, at(2030)).unwrap_err();
        let facts = &verifier.leaf(Role::Client, std::slice::from_ref(&leaf)).unwrap().facts;
        assert_eq!(facts.uris, ["spiffe://cluster.local/a"]);
    }

    #[test]
    fn what_one_authority_signed_says_nothing_to_another() {
        let (authority, other) = (Authority::new(), Authority::new());
        let leaf = authority.leaf();
        authority.verifier().check(Role::Client, &leaf, &[], at(2030)).unwrap();
        other.verifier().check(Role::Client, &leaf, &[], at(2030)).unwrap_err();
        // nor is a chain with another certificate in it the same one
        let verifier = authority.verifier();
        verifier.check(Role::Client, &leaf, &[], at(2030)).unwrap();
        let forged = other.leaf();
        verifier.check(Role::Client, &forged, std::slice::from_ref(&leaf), at(2030)).unwrap_err();
    }
}
