//! The issuing policy: what a caller gets signed, and under which names and limits. Pure.
//!
//! [`SigningRoot`] is the top of a mesh: made here, or plugged in from files. Each member of the control plane gets an
//! intermediate of its own from it, an [`Authority`], which signs leaves.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use zeroize::Zeroizing;

use crate::authn::Caller;
use crate::identity::{SpiffeId, TrustDomain};
use crate::node::NodeId;
use crate::svid::{Chain, PrivateKey};
use crate::x509::{self, Facts, X509Error};

mod plugged;
pub use plugged::{PluggedError, PluggedIn};

/// How far certificates are dated back, so that a peer whose clock is a little slow accepts them.
pub const BACK_DATE: Duration = Duration::from_secs(60);
/// Lifetime of a root made here.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The most names of a refused request that are told.
const NAMES_TOLD: usize = 8;
/// The most characters of each.
const NAME_TOLD: usize = 256;
/// Longest lifetime of a member's intermediate.
pub const MAX_MEMBER_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// A certificate's serial number: 127 random bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serial([u8; 16]);

impl Serial {
    /// A new one from the system's randomness.
    ///
    /// # Errors
    ///
    /// When the system has no randomness.
    pub fn random() -> Result<Self, SignError> {
        let mut bytes = [0; 16];
        rand::fill(&mut bytes).map_err(|_| SignError::NoRandomness)?;
        Ok(Self::from_bytes(bytes))
    }

    /// A new one for a certificate of `node`: the node's name, and 63 random bits.
    ///
    /// # Errors
    ///
    /// When the system has no randomness.
    pub fn of_node(node: NodeId) -> Result<Self, SignError> {
        let Self(mut bytes) = Self::random()?;
        bytes[..8].copy_from_slice(&node.bytes());
        Ok(Self::from_bytes(bytes))
    }

    /// The number, most significant byte first.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// A given one; the first bit is cleared and the last is set, so that it is positive (RFC 5280, 4.1.2.2).
    #[must_use]
    pub fn from_bytes(mut bytes: [u8; 16]) -> Self {
        bytes[0] &= 0x7f;
        bytes[15] |= 1;
        Self(bytes)
    }
}

/// How long leaves live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    /// What a caller gets that asks for nothing.
    pub default: Duration,
    /// The longest that a caller gets.
    pub max: Duration,
}

impl Default for Lifetimes {
    /// Istio's: 24 hours, at most 90 days.
    fn default() -> Self {
        Self { default: Duration::from_secs(24 * 3600), max: Duration::from_secs(90 * 24 * 3600) }
    }
}

impl Lifetimes {
    fn grant(self, requested: Option<Duration>) -> Duration {
        requested.filter(|wanted| !wanted.is_zero()).unwrap_or(self.default).min(self.max)
    }
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The certificate request is malformed, not signed by its own key, or its key is of a kind not allowed.
    #[error("the certificate request is refused")]
    Csr(#[source] X509Error),
    /// The request asks for names that are not its caller's.
    #[error("the certificate request asks for names that are not `{identity}`'s: {names}")]
    ForeignNames {
        /// The caller's identity.
        identity: SpiffeId,
        /// The names, the first few of them.
        names: String,
    },
    /// The caller asks for an identity that callers never get.
    #[error("`{0}` is the control plane's own identity")]
    Reserved(SpiffeId),
    /// The caller belongs to another trust domain.
    #[error("`{identity}` is not in the trust domain `{ours}`")]
    TrustDomain {
        /// The caller's identity.
        identity: SpiffeId,
        /// The authority's trust domain.
        ours: TrustDomain,
    },
    /// The authority's own certificate has ended or is not valid yet.
    #[error("the issuing certificate is not valid at this time")]
    IssuerNotValid,
    /// The authority's certificate or key cannot be used.
    #[error("the issuing certificate cannot be used")]
    Issuer(#[source] X509Error),
    /// A name cannot stand in a certificate.
    #[error("`{0}` cannot stand in a certificate")]
    Name(String),
    /// The system has no randomness.
    #[error("the system has no randomness")]
    NoRandomness,
    /// The signing itself failed.
    #[error("signing failed")]
    Signing(#[from] rcgen::Error),
}

/// The top of a mesh's certificates: a root made here, or an authority plugged in from files.
#[derive(Debug)]
pub struct SigningRoot {
    cert: CertificateDer<'static>,
    key: PrivateKey,
    /// Certificates above `cert`, without the root; empty when `cert` is the root.
    above: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    facts: Facts,
}

impl SigningRoot {
    /// Makes a root that signs itself: P-256, ten years.
    ///
    /// # Errors
    ///
    /// When the system has no randomness.
    pub fn generate(domain: &TrustDomain, now: SystemTime, serial: Serial) -> Result<Self, SignError> {
        let pair = KeyPair::generate()?;
        // a name of its own, so that a chain can be told from one of another root of the same mesh
        let name = format!("root {}", x509::hex(serial.0.get(..4).unwrap_or_default()));
        let mut params = authority_params(domain, &name, BasicConstraints::Unconstrained);
        set_validity(&mut params, now, now + ROOT_LIFETIME, serial);
        let cert = params.self_signed(&pair)?.der().clone();
        let facts = Facts::parse(&cert).map_err(SignError::Issuer)?;
        let key = PrivateKey::from_key_pair(&pair);
        Ok(Self { roots: vec![cert.clone()], above: Vec::new(), cert, key, facts })
    }

    /// The signing certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.cert
    }

    /// The roots to believe.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Last moment at which the signing certificate is valid.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.facts.not_after
    }

    /// The four files from which [`PluggedIn::check`] makes the same root again.
    #[must_use]
    pub fn to_files(&self) -> PluggedIn {
        PluggedIn {
            ca_cert: x509::certificates_to_pem([&self.cert]),
            ca_key: self.key.to_pem(),
            cert_chain: x509::certificates_to_pem(&self.above),
            root_cert: x509::certificates_to_pem(&self.roots),
        }
    }

    /// Makes the intermediate of one member of the control plane, with a new key of its own.
    ///
    /// It lives at most a year and no longer than this root. When the plugged-in authority may have no authority
    /// below it (path length 0), the member signs with the plugged-in certificate itself.
    ///
    /// # Errors
    ///
    /// When this root is not valid at `now`, or the system has no randomness.
    pub fn member(
        &self,
        domain: &TrustDomain,
        name: &str,
        lifetimes: Lifetimes,
        now: SystemTime,
        serial: Serial,
    ) -> Result<Authority, SignError> {
        let above = std::iter::once(&self.cert).chain(&self.above).cloned();
        let above: Vec<_> = above.filter(|cert| !self.roots.contains(cert)).collect();
        if !self.facts.is_valid_at(now) {
            return Err(SignError::IssuerNotValid);
        }
        if self.facts.path_len == Some(0) {
            let chain = std::iter::once(self.cert.clone()).chain(self.above.clone()).collect();
            return Authority::new(domain.clone(), chain, self.key.clone(), self.roots.clone(), lifetimes);
        }
        let issuer = Issuer::from_ca_cert_der(&self.cert, self.key.key_pair()?)?;
        let pair = KeyPair::generate()?;
        let mut params =
            authority_params(domain, &format!("member {name}"), BasicConstraints::Constrained(0));
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, self.facts.not_after.min(now + MAX_MEMBER_LIFETIME), serial);
        let cert = params.signed_by(&pair, &issuer)?.der().clone();
        let chain = std::iter::once(cert).chain(above).collect();
        let key = PrivateKey::from_key_pair(&pair);
        Authority::new(domain.clone(), chain, key, self.roots.clone(), lifetimes)
    }
}

/// The authority of one member: signs leaves with its own intermediate.
#[derive(Debug)]
pub struct Authority {
    domain: TrustDomain,
    /// The issuing certificate and those above it.
    chain: Vec<CertificateDer<'static>>,
    /// Those of `chain` that peers do not have already because they are roots.
    presented: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    key: PrivateKey,
    issuer: Issuer<'static, KeyPair>,
    facts: Facts,
    lifetimes: Lifetimes,
}

impl Authority {
    /// An authority from its parts: `chain` begins with the issuing certificate, `key` is that certificate's.
    ///
    /// # Errors
    ///
    /// When the chain is empty, its first certificate may not sign, or is not for this key.
    pub fn new(
        domain: TrustDomain,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKey,
        roots: Vec<CertificateDer<'static>>,
        lifetimes: Lifetimes,
    ) -> Result<Self, SignError> {
        let unusable = |reason: &str| SignError::Issuer(X509Error::Certificate(reason.to_owned()));
        let cert = chain.first().ok_or_else(|| unusable("there is none"))?;
        let facts = Facts::parse(cert).map_err(SignError::Issuer)?;
        if !facts.is_ca || !facts.can_sign {
            return Err(unusable("it may not sign others"));
        }
        let pair = key.key_pair()?;
        if rcgen::PublicKeyData::subject_public_key_info(&pair) != facts.public_key {
            return Err(unusable("it is not for this key"));
        }
        let issuer = Issuer::from_ca_cert_der(cert, pair)?;
        let presented = chain.iter().filter(|cert| !roots.contains(cert)).cloned().collect();
        Ok(Self { domain, chain, presented, roots, key, issuer, facts, lifetimes })
    }

    /// Trust domain of all identities that are signed here.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// Roots that every answer carries.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The issuing certificate and those above it.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The longest that a leaf lives.
    #[must_use]
    pub fn longest_lifetime(&self) -> Duration {
        self.lifetimes.max
    }

    /// The issuing key in PEM, for the member's own key store.
    #[must_use]
    pub fn key_pem(&self) -> Zeroizing<String> {
        self.key.to_pem()
    }

    /// First and last moment at which the issuing certificate is valid.
    #[must_use]
    pub fn validity(&self) -> (SystemTime, SystemTime) {
        (self.facts.not_before, self.facts.not_after)
    }

    /// The same authority with other roots in its answers (a rotation is going on).
    ///
    /// # Errors
    ///
    /// Never for an authority that exists; the result is checked like a new one.
    pub fn with_roots(&self, roots: Vec<CertificateDer<'static>>) -> Result<Self, SignError> {
        Self::new(self.domain.clone(), self.chain.clone(), self.key.clone(), roots, self.lifetimes)
    }

    /// Signs a leaf for `caller`. Of the request only the public key is used; it may ask for the caller's identity as
    /// its name, or for no name.
    ///
    /// The leaf has an empty subject, the caller's identity as its one name, both extended key usages, begins
    /// [`BACK_DATE`] before `now`, and lives as long as was requested, within the limits and no longer than the
    /// issuing certificate.
    ///
    /// # Errors
    ///
    /// When the request is refused or asks for names of others, the caller's identity is the control plane's or of
    /// another trust domain, or the issuing certificate is not valid at `now`.
    pub fn sign(
        &self,
        csr: &CertificateSigningRequestDer<'_>,
        caller: &Caller,
        requested: Option<Duration>,
        now: SystemTime,
        serial: Serial,
    ) -> Result<Chain, SignError> {
        let identity = caller.identity();
        if identity.trust_domain_str() != self.domain.as_str() {
            return Err(SignError::TrustDomain { identity: identity.clone(), ours: self.domain.clone() });
        }
        if *identity == SpiffeId::control_plane(&self.domain) {
            return Err(SignError::Reserved(identity.clone()));
        }
        names_are_of(csr, identity)?;
        self.issue(csr, vec![uri_name(identity)?], requested, now, serial)
    }

    /// Signs the control plane's own leaf: its identity, and DNS names and IP addresses by which other clients call it.
    ///
    /// Only for use in the member's own process; the certificate service never calls it.
    ///
    /// # Errors
    ///
    /// When the request or a name is refused, or the issuing certificate is not valid at `now`.
    pub fn sign_control_plane(
        &self,
        csr: &CertificateSigningRequestDer<'_>,
        dns_names: &[String],
        requested: Option<Duration>,
        now: SystemTime,
        serial: Serial,
    ) -> Result<Chain, SignError> {
        let mut names = vec![uri_name(&SpiffeId::control_plane(&self.domain))?];
        for name in dns_names {
            names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => {
                    SanType::DnsName(name.as_str().try_into().map_err(|_| SignError::Name(name.clone()))?)
                }
            });
        }
        self.issue(csr, names, requested, now, serial)
    }

    fn issue(
        &self,
        csr: &CertificateSigningRequestDer<'_>,
        names: Vec<SanType>,
        requested: Option<Duration>,
        now: SystemTime,
        serial: Serial,
    ) -> Result<Chain, SignError> {
        let public_key = x509::csr_public_key(csr).map_err(SignError::Csr)?;
        let public_key = SubjectPublicKeyInfo::from_der(&public_key)?;
        if !self.facts.is_valid_at(now) {
            return Err(SignError::IssuerNotValid);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let ends = now.checked_add(self.lifetimes.grant(requested)).unwrap_or(self.facts.not_after);
        set_validity(&mut params, now, ends.min(self.facts.not_after), serial);
        let leaf = params.signed_by(&public_key, &self.issuer)?.der().clone();
        Ok(Chain { leaf, intermediates: self.presented.clone(), roots: self.roots.clone() })
    }
}

/// Whether a request asks for no other name than this identity.
///
/// # Errors
///
/// [`SignError::ForeignNames`] if it does, [`SignError::Csr`] if it cannot be read.
pub fn names_are_of(csr: &CertificateSigningRequestDer<'_>, identity: &SpiffeId) -> Result<(), SignError> {
    let own = format!("URI:{identity}");
    let mut foreign = x509::csr_names(csr).map_err(SignError::Csr)?;
    foreign.retain(|name| *name != own);
    if foreign.is_empty() {
        return Ok(());
    }
    let more = foreign.len().saturating_sub(NAMES_TOLD);
    let told = foreign.iter().take(NAMES_TOLD).map(|name| name.chars().take(NAME_TOLD).collect::<String>());
    let mut names = told.collect::<Vec<_>>().join(", ");
    if more > 0 {
        names = format!("{names}, and {more} more");
    }
    Err(SignError::ForeignNames { identity: identity.clone(), names })
}

fn authority_params(domain: &TrustDomain, name: &str, constraints: BasicConstraints) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, domain.as_str());
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn set_validity(params: &mut CertificateParams, now: SystemTime, ends: SystemTime, serial: Serial) {
    /// Seconds from 1970 to the end of 9999, the last moment that a certificate can name.
    const LAST: u64 = 253_402_300_799;
    let date = |time: SystemTime| {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().min(LAST);
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(since)
    };
    params.not_before = date(now.checked_sub(BACK_DATE).unwrap_or(UNIX_EPOCH));
    params.not_after = date(ends);
    params.serial_number = Some(SerialNumber::from_slice(&serial.0));
}

fn uri_name(identity: &SpiffeId) -> Result<SanType, SignError> {
    let text = identity.as_str().try_into().map_err(|_| SignError::Name(identity.to_string()))?;
    Ok(SanType::URI(text))
}

#[cfg(test)]
#[path = "authority/tests.rs"]
mod tests;
