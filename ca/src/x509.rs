//! Certificates, certificate requests and chains: DER and PEM, names, lifetimes (RFC 5280).

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use x509_parser::prelude::{
    FromDer as _, GeneralName, ParsedCriAttribute, ParsedExtension, X509Certificate, X509CertificationRequest,
};
use x509_parser::public_key::PublicKey;

use crate::identity::{IdentityError, SpiffeId};
use crate::node::NodeId;

/// Longest certificate request that is looked at, in bytes of DER.
pub const MAX_CSR_LEN: usize = 16 * 1024;
/// Shortest RSA key that gets a certificate, in bits.
pub const MIN_RSA_BITS: usize = 2048;

/// Why bytes are not a certificate, a key or a certificate request that we can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum X509Error {
    /// The PEM text is broken, or has no block of the wanted kind.
    #[error("not PEM with a {wanted}: {reason}")]
    Pem {
        /// What was looked for.
        wanted: &'static str,
        /// What the parser found instead.
        reason: String,
    },
    /// The DER bytes are not a certificate.
    #[error("not a certificate: {0}")]
    Certificate(String),
    /// The certificate has a name that is not text, or that has a NUL byte in it.
    #[error("a subject alternative name is malformed")]
    MalformedName,
    /// The certificate does not have exactly one URI name (SPIFFE X.509-SVID, section 2).
    #[error("{0} URI names in the certificate, exactly one is allowed")]
    UriNames(usize),
    /// The URI name of the certificate is not a SPIFFE identity.
    #[error("the URI name of the certificate is no SPIFFE identity")]
    Identity(#[from] IdentityError),
    /// The certificate request is longer than [`MAX_CSR_LEN`].
    #[error("the certificate request has {0} bytes, at most {MAX_CSR_LEN} are allowed")]
    CsrTooLong(usize),
    /// The bytes are not a certificate request.
    #[error("not a certificate request: {0}")]
    Csr(String),
    /// The request is not signed by the key it asks a certificate for.
    #[error("the certificate request is not signed by its own key")]
    CsrSignature,
    /// The public key is of a kind that gets no certificate here.
    #[error(
        "key type {0} is not allowed; use ECDSA P-256 or P-384, Ed25519, or RSA of at least {MIN_RSA_BITS} bits"
    )]
    KeyType(String),
}

/// What a certificate says, as far as the mesh looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// First moment of validity.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
    /// URI names, in the certificate's order.
    pub uris: Vec<String>,
    /// DNS names, in the certificate's order.
    pub dns: Vec<String>,
    /// IP address names, in the certificate's order.
    pub ips: Vec<IpAddr>,
    /// Whether the certificate may sign others (basic constraints).
    pub is_ca: bool,
    /// Whether key usage, if it is there, allows to sign certificates.
    pub can_sign: bool,
    /// How many further authorities may stand below this one; no limit when `None`.
    pub path_len: Option<u32>,
    /// Subject, for display.
    pub subject: String,
    /// Serial number in lower-case hexadecimal.
    pub serial: String,
    /// The public key, as `SubjectPublicKeyInfo` in DER.
    pub public_key: Vec<u8>,
}

impl Facts {
    /// Reads one certificate.
    ///
    /// # Errors
    ///
    /// When it is not a certificate, has trailing bytes, or has a name that is malformed or holds a NUL byte.
    pub fn parse(der: &CertificateDer<'_>) -> Result<Self, X509Error> {
        let cert = parse_certificate(der)?;
        let mut facts = Self {
            not_before: from_timestamp(cert.validity().not_before.timestamp()),
            not_after: from_timestamp(cert.validity().not_after.timestamp()),
            uris: Vec::new(),
            dns: Vec::new(),
            ips: Vec::new(),
            is_ca: cert.is_ca(),
            can_sign: key_usage_allows_signing(&cert)?,
            path_len: path_len(&cert)?,
            subject: cert.subject().to_string(),
            serial: hex(cert.raw_serial()),
            public_key: cert.public_key().raw.to_vec(),
        };
        let names = cert.subject_alternative_name().map_err(|e| X509Error::Certificate(e.to_string()))?;
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            facts.add_name(name)?;
        }
        Ok(facts)
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "other kinds of names carry no meaning in the mesh")]
    fn add_name(&mut self, name: &GeneralName<'_>) -> Result<(), X509Error> {
        match name {
            GeneralName::URI(uri) => self.uris.push(without_nul(uri)?),
            GeneralName::DNSName(dns) => self.dns.push(without_nul(dns)?),
            GeneralName::RFC822Name(mail) => without_nul(mail).map(drop)?,
            GeneralName::IPAddress(bytes) => self.ips.push(ip_from(bytes)?),
            GeneralName::Invalid(..) => return Err(X509Error::MalformedName),
            _ => {}
        }
        Ok(())
    }

    /// The SPIFFE identity of the certificate: its one URI name.
    ///
    /// # Errors
    ///
    /// When there is not exactly one URI name, or it is not a SPIFFE identity.
    pub fn spiffe_id(&self) -> Result<SpiffeId, X509Error> {
        match self.uris.as_slice() {
            [uri] => Ok(SpiffeId::parse(uri)?),
            uris => Err(X509Error::UriNames(uris.len())),
        }
    }

    /// The node that the certificate belongs to, see [`crate::node`].
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        NodeId::of_serial(&self.serial)
    }

    /// Whether `now` is within the certificate's validity.
    #[must_use]
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }
}

/// The SPIFFE identity of a certificate, see [`Facts::spiffe_id`].
///
/// # Errors
///
/// When the bytes are not a certificate, or it does not have exactly one SPIFFE identity.
pub fn spiffe_id(der: &CertificateDer<'_>) -> Result<SpiffeId, X509Error> {
    Facts::parse(der)?.spiffe_id()
}

/// All certificates of a PEM text, in its order. Other blocks are skipped.
///
/// # Errors
///
/// When a block is broken, or there is no certificate at all.
pub fn certificates_from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, X509Error> {
    let wanted = "certificate";
    let certs: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| X509Error::Pem { wanted, reason: e.to_string() })?;
    if certs.is_empty() {
        return Err(X509Error::Pem { wanted, reason: "no certificate in it".to_owned() });
    }
    Ok(certs)
}

/// The first private key of a PEM text (PKCS#8, PKCS#1 or SEC1).
///
/// # Errors
///
/// When there is none, or the block is broken.
pub fn key_from_pem(pem: &[u8]) -> Result<PrivateKeyDer<'static>, X509Error> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|e| X509Error::Pem { wanted: "private key", reason: e.to_string() })
}

/// The first certificate request of a PEM text.
///
/// # Errors
///
/// When there is none, the block is broken, or it is longer than [`MAX_CSR_LEN`].
pub fn csr_from_pem(pem: &[u8]) -> Result<CertificateSigningRequestDer<'static>, X509Error> {
    if pem.len() > MAX_CSR_LEN * 2 {
        return Err(X509Error::CsrTooLong(pem.len()));
    }
    CertificateSigningRequestDer::from_pem_slice(pem)
        .map_err(|e| X509Error::Pem { wanted: "certificate request", reason: e.to_string() })
}

/// Certificates as PEM text, one block after the other.
#[must_use]
pub fn certificates_to_pem<'a>(certs: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> String {
    certs.into_iter().map(|cert| to_pem("CERTIFICATE", cert)).collect()
}

/// One PEM block (RFC 7468).
#[must_use]
pub fn to_pem(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = tail;
    }
    pem.push_str("-----END ");
    pem.push_str(label);
    pem.push_str("-----\n");
    pem
}

/// SHA-256.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(digest::digest(&digest::SHA256, bytes).as_ref()) {
        *to = *from;
    }
    out
}

/// Bytes in lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| half + if half < 10 { b'0' } else { b'a' - 10 };
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(digit(byte >> 4)));
        text.push(char::from(digit(byte & 15)));
    }
    text
}

/// The public key of a certificate request whose signature is right and whose key is of an allowed kind.
///
/// Nothing else of a request is ever used for what is signed: no subject, no names, no extensions. The result is a
/// `SubjectPublicKeyInfo` in DER.
///
/// # Errors
///
/// When it is not a request, is too long, is not signed by its own key, or its key is of a kind not allowed.
pub fn csr_public_key(csr: &CertificateSigningRequestDer<'_>) -> Result<Vec<u8>, X509Error> {
    let csr = parse_request(csr)?;
    let key = &csr.certification_request_info.subject_pki;
    check_key_type(key)?;
    csr.verify_signature().map_err(|_| X509Error::CsrSignature)?;
    Ok(key.raw.to_vec())
}

/// The alternative names that a certificate request asks for, each with its kind: `URI:spiffe://..`, `DNS:a.example`.
///
/// # Errors
///
/// When it is not a request, is too long, or a name is malformed.
pub fn csr_names(csr: &CertificateSigningRequestDer<'_>) -> Result<Vec<String>, X509Error> {
    let csr = parse_request(csr)?;
    let mut names = Vec::new();
    for attribute in csr.certification_request_info.iter_attributes() {
        let ParsedCriAttribute::ExtensionRequest(wanted) = attribute.parsed_attribute() else { continue };
        for extension in &wanted.extensions {
            let extension = extension.parsed_extension();
            if let ParsedExtension::SubjectAlternativeName(wanted) = extension {
                names.extend(wanted.general_names.iter().map(name_text));
            } else if matches!(extension, ParsedExtension::ParseError { .. }) {
                return Err(X509Error::MalformedName);
            }
        }
    }
    Ok(names)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "other kinds of names are told as what they are")]
fn name_text(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::URI(uri) => format!("URI:{uri}"),
        GeneralName::DNSName(dns) => format!("DNS:{dns}"),
        GeneralName::RFC822Name(mail) => format!("email:{mail}"),
        GeneralName::IPAddress(bytes) => match ip_from(bytes) {
            Ok(address) => format!("IP:{address}"),
            Err(_) => format!("IP:{}", hex(bytes)),
        },
        other => other.to_string(),
    }
}

/// Whether `issuer` has signed `cert` and is named as its issuer.
///
/// # Errors
///
/// When one of the two is not a certificate.
pub fn is_issued_by(cert: &CertificateDer<'_>, issuer: &CertificateDer<'_>) -> Result<bool, X509Error> {
    let (cert, issuer) = (parse_certificate(cert)?, parse_certificate(issuer)?);
    let named = cert.issuer().as_raw() == issuer.subject().as_raw();
    Ok(named && cert.verify_signature(Some(issuer.public_key())).is_ok())
}

fn parse_request<'a>(
    csr: &'a CertificateSigningRequestDer<'_>,
) -> Result<X509CertificationRequest<'a>, X509Error> {
    if csr.len() > MAX_CSR_LEN {
        return Err(X509Error::CsrTooLong(csr.len()));
    }
    let (rest, csr) = X509CertificationRequest::from_der(csr).map_err(|e| X509Error::Csr(e.to_string()))?;
    if rest.is_empty() { Ok(csr) } else { Err(X509Error::Csr("trailing bytes".to_owned())) }
}

fn parse_certificate<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, X509Error> {
    let (rest, cert) = X509Certificate::from_der(der).map_err(|e| X509Error::Certificate(e.to_string()))?;
    if rest.is_empty() { Ok(cert) } else { Err(X509Error::Certificate("trailing bytes".to_owned())) }
}

fn check_key_type(key: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> Result<(), X509Error> {
    const RSA: &str = "1.2.840.113549.1.1.1";
    const EC: &str = "1.2.840.10045.2.1";
    const ED25519: &str = "1.3.101.112";
    const CURVES: [&str; 2] = ["1.2.840.10045.3.1.7", "1.3.132.0.34"];
    let algorithm = key.algorithm.algorithm.to_id_string();
    let curve = || {
        let oid = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
        Some(oid.to_id_string())
    };
    match algorithm.as_str() {
        ED25519 => Ok(()),
        EC => match curve() {
            Some(curve) if CURVES.contains(&curve.as_str()) => Ok(()),
            curve => Err(X509Error::KeyType(format!("EC on curve {}", curve.unwrap_or_default()))),
        },
        RSA => match key.parsed() {
            Ok(PublicKey::RSA(rsa)) if rsa_bits(rsa.modulus) >= MIN_RSA_BITS => Ok(()),
            Ok(PublicKey::RSA(rsa)) => {
                Err(X509Error::KeyType(format!("RSA of {} bits", rsa_bits(rsa.modulus))))
            }
            Ok(_) | Err(_) => Err(X509Error::KeyType("malformed RSA".to_owned())),
        },
        other => Err(X509Error::KeyType(other.to_owned())),
    }
}

fn rsa_bits(modulus: &[u8]) -> usize {
    let significant = modulus.iter().position(|byte| *byte != 0).map_or(0, |at| modulus.len() - at);
    let first = modulus.iter().find(|byte| **byte != 0).copied().unwrap_or(0);
    (significant * 8).saturating_sub(first.leading_zeros() as usize)
}

fn key_usage_allows_signing(cert: &X509Certificate<'_>) -> Result<bool, X509Error> {
    let usage = cert.key_usage().map_err(|e| X509Error::Certificate(e.to_string()))?;
    Ok(usage.is_none_or(|usage| usage.value.key_cert_sign()))
}

fn path_len(cert: &X509Certificate<'_>) -> Result<Option<u32>, X509Error> {
    let constraints = cert.basic_constraints().map_err(|e| X509Error::Certificate(e.to_string()))?;
    Ok(constraints.and_then(|constraints| constraints.value.path_len_constraint))
}

fn without_nul(name: &str) -> Result<String, X509Error> {
    if name.contains('\0') { Err(X509Error::MalformedName) } else { Ok(name.to_owned()) }
}

fn ip_from(bytes: &[u8]) -> Result<IpAddr, X509Error> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(bytes).map(IpAddr::from).map_err(|_| X509Error::MalformedName)
}

fn from_timestamp(seconds: i64) -> SystemTime {
    match u64::try_from(seconds) {
        Ok(after) => UNIX_EPOCH + Duration::from_secs(after),
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, CustomExtension, KeyPair, SanType};

    fn cert(names: Vec<SanType>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[track_caller]
    fn check(names: Vec<SanType>, expected: Result<&str, X509Error>) {
        let found = spiffe_id(&cert(names));
        assert_eq!(found.as_ref().map(SpiffeId::as_str), expected.as_ref().copied());
    }

    #[test]
    fn identity_is_the_one_uri_name() {
        let id = "spiffe://td/ns/a/sa/b";
        check(vec![uri(id)], Ok(id));
        check(vec![SanType::DnsName("x.y".try_into().unwrap()), uri(id)], Ok(id));
        check(vec![], Err(X509Error::UriNames(0)));
        check(vec![uri(id), uri(id)], Err(X509Error::UriNames(2)));
        check(vec![uri(id), uri("spiffe://td/ns/a/sa/admin")], Err(X509Error::UriNames(2)));
        check(vec![uri("https://a.b/")], Err(X509Error::Identity(IdentityError::Scheme)));
    }

    /// rcgen refuses to write such names, so the extension is written by hand: SEQUENCE of one [6] or [2] name.
    fn with_raw_name(tag: u8, name: &[u8]) -> CertificateDer<'static> {
        let mut content =
            vec![0x30, u8::try_from(name.len() + 2).unwrap(), tag, u8::try_from(name.len()).unwrap()];
        content.extend_from_slice(name);
        let mut params = CertificateParams::default();
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], content)];
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn a_nul_byte_in_a_name_is_refused() {
        assert_eq!(spiffe_id(&with_raw_name(0x86, b"spiffe://td/a")).unwrap().path(), "/a");
        assert_eq!(spiffe_id(&with_raw_name(0x86, b"spiffe://td/a\0b")), Err(X509Error::MalformedName));
        assert_eq!(Facts::parse(&with_raw_name(0x82, b"good.example\0.evil")), Err(X509Error::MalformedName));
        assert_eq!(Facts::parse(&with_raw_name(0x82, b"\xff\xfe")), Err(X509Error::MalformedName));
        assert_eq!(Facts::parse(&with_raw_name(0x87, b"\x01\x02\x03")), Err(X509Error::MalformedName));
    }

    #[test]
    fn pem_round_trips() {
        let certs = vec![cert(vec![uri("spiffe://td/a")]), cert(vec![uri("spiffe://td/b")])];
        let pem = certificates_to_pem(&certs);
        assert!(pem.lines().all(|line| line.len() <= 64));
        assert_eq!(certificates_from_pem(pem.as_bytes()).unwrap(), certs);
        assert!(certificates_from_pem(b"").is_err());
        assert!(
            certificates_from_pem(b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n").is_err()
        );
        assert!(key_from_pem(pem.as_bytes()).is_err());
    }

    fn csr(key: &KeyPair) -> CertificateSigningRequestDer<'static> {
        CertificateParams::default().serialize_request(key).unwrap().der().clone()
    }

    #[test]
    fn allowed_kinds_of_keys_and_no_others() {
        let keys = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
        for alg in keys {
            let key = KeyPair::generate_for(alg).unwrap();
            assert!(csr_public_key(&csr(&key)).is_ok(), "{alg:?}");
        }
        let key = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
        assert!(csr_public_key(&csr(&key)).is_ok());
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
        assert!(matches!(csr_public_key(&csr(&key)), Err(X509Error::KeyType(_))));
    }

    #[test]
    fn rsa_length_counts_significant_bits() {
        assert_eq!(rsa_bits(&[0, 0x80, 0, 0]), 24);
        assert_eq!(rsa_bits(&[0x01, 0]), 9);
        assert_eq!(rsa_bits(&[]), 0);
    }

    #[test]
    fn a_request_must_be_signed_by_its_own_key() {
        let good = csr(&KeyPair::generate().unwrap());
        let mut bytes = good.to_vec();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        assert_eq!(csr_public_key(&bytes.into()), Err(X509Error::CsrSignature));
        let mut bytes = good.to_vec();
        bytes.push(0);
        assert!(matches!(csr_public_key(&bytes.into()), Err(X509Error::Csr(_))));
        assert!(matches!(csr_public_key(&vec![0; 5].into()), Err(X509Error::Csr(_))));
        assert_eq!(
            csr_public_key(&vec![0; MAX_CSR_LEN + 1].into()),
            Err(X509Error::CsrTooLong(MAX_CSR_LEN + 1))
        );
    }

    proptest::proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>, cut in 0..2000_usize, flip in 0..2000_usize) {
            drop(Facts::parse(&bytes.clone().into()));
            drop(csr_public_key(&bytes.clone().into()));
            drop(csr_names(&bytes.clone().into()));
            drop(certificates_from_pem(&bytes));
            let mut der = cert(vec![uri("spiffe://td/a")]).to_vec();
            der.truncate(cut);
            if let Some(byte) = der.get_mut(flip) { *byte ^= 0x55; }
            drop(Facts::parse(&der.into()));
        }
    }
}
