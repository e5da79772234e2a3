//! An issued identity: what a signing gives back, and what a workload holds while it runs.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use zeroize::Zeroizing;

use crate::identity::SpiffeId;
use crate::tls::{self, Anchors};
use crate::x509::{self, Facts, X509Error};

/// What an authority answers: a leaf, the intermediates above it, and the roots to believe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The certificate that was asked for.
    pub leaf: CertificateDer<'static>,
    /// Certificates between the leaf and the root, lowest first, without the root.
    pub intermediates: Vec<CertificateDer<'static>>,
    /// Roots to believe, the active one first.
    pub roots: Vec<CertificateDer<'static>>,
}

impl Chain {
    /// The wire form of the certificate service: one PEM text per certificate, and all roots in the last one.
    #[must_use]
    pub fn to_reply(&self) -> Vec<String> {
        let below = std::iter::once(&self.leaf).chain(&self.intermediates);
        let mut reply: Vec<_> = below.map(|cert| x509::to_pem("CERTIFICATE", cert)).collect();
        reply.push(x509::certificates_to_pem(&self.roots));
        reply
    }

    /// Reads the wire form of the certificate service.
    ///
    /// # Errors
    ///
    /// When an element is not PEM, or there are not at least a leaf and a root.
    pub fn from_reply(reply: &[String]) -> Result<Self, X509Error> {
        let missing =
            || X509Error::Pem { wanted: "certificate", reason: "leaf or root is missing".to_owned() };
        let (roots, below) = reply.split_last().ok_or_else(missing)?;
        let below: Vec<_> =
            below.iter().map(|pem| x509::certificates_from_pem(pem.as_bytes())).collect::<Result<_, _>>()?;
        let mut below = below.into_iter().flatten();
        Ok(Self {
            leaf: below.next().ok_or_else(missing)?,
            intermediates: below.collect(),
            roots: x509::certificates_from_pem(roots.as_bytes())?,
        })
    }

    /// The leaf and its intermediates, as they are presented in a handshake.
    #[must_use]
    pub fn presented(&self) -> Vec<CertificateDer<'static>> {
        std::iter::once(&self.leaf).chain(&self.intermediates).cloned().collect()
    }
}

/// A private key in PKCS#8 DER that is wiped from memory when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey(Zeroizing<Vec<u8>>);

impl PrivateKey {
    /// Makes a new ECDSA P-256 key from the system's randomness.
    ///
    /// # Errors
    ///
    /// When the system has no randomness.
    pub fn generate() -> Result<Self, rcgen::Error> {
        Ok(Self::from_key_pair(&rcgen::KeyPair::generate()?))
    }

    /// Takes the key out of a key pair.
    #[must_use]
    pub fn from_key_pair(pair: &rcgen::KeyPair) -> Self {
        Self(Zeroizing::new(pair.serialize_der()))
    }

    /// Reads a key in PKCS#8 PEM.
    ///
    /// # Errors
    ///
    /// When there is none in the text.
    pub fn from_pem(pem: &[u8]) -> Result<Self, X509Error> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem)
            .map_err(|e| X509Error::Pem { wanted: "private key", reason: e.to_string() })?;
        Ok(Self(Zeroizing::new(key.secret_pkcs8_der().to_vec())))
    }

    /// The key in PKCS#8 PEM.
    #[must_use]
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(x509::to_pem("PRIVATE KEY", &self.0))
    }

    /// The key as rustls takes it.
    #[must_use]
    pub fn to_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.0.to_vec()).into()
    }

    /// The key as a signer.
    ///
    /// # Errors
    ///
    /// When the bytes are not a key of a kind that can sign.
    pub fn key_pair(&self) -> Result<rcgen::KeyPair, rcgen::Error> {
        rcgen::KeyPair::try_from(self.0.as_slice())
    }

    /// A certificate request for this key, without any wish in it: the authority chooses the names.
    ///
    /// # Errors
    ///
    /// When the key cannot sign.
    pub fn request(&self) -> Result<rcgen::CertificateSigningRequest, rcgen::Error> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.serialize_request(&self.key_pair()?)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// The identity that a process holds at present: its name, certificate, key and the roots it believes.
#[derive(Debug)]
pub struct Identity {
    /// The name, from the leaf's one URI name.
    pub spiffe_id: SpiffeId,
    /// The leaf and its intermediates, as presented in a handshake.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKey,
    /// Roots to believe, the active one first.
    pub roots: Vec<CertificateDer<'static>>,
    /// When it was obtained; half-life is counted from here.
    pub obtained_at: SystemTime,
    /// Last moment at which the leaf is valid.
    pub not_after: SystemTime,
    anchors: Arc<Anchors>,
    certified: Arc<CertifiedKey>,
    certified_with_roots: Arc<CertifiedKey>,
}

impl Identity {
    /// Puts an answer and the key it belongs to together, and checks that peers will accept it.
    ///
    /// # Errors
    ///
    /// When the leaf is not for this key, does not have exactly one SPIFFE identity, or does not lead to one of the
    /// roots at `obtained_at`.
    pub fn new(chain: Chain, key: PrivateKey, obtained_at: SystemTime) -> Result<Self, IdentityMismatch> {
        let facts = Facts::parse(&chain.leaf)?;
        let public = rcgen::PublicKeyData::subject_public_key_info(&key.key_pair()?);
        if public != facts.public_key {
            return Err(IdentityMismatch::Key);
        }
        let spiffe_id = facts.spiffe_id()?;
        let anchors = Anchors::new(&chain.roots).map_err(IdentityMismatch::Path)?;
        let now = UnixTime::since_unix_epoch(obtained_at.duration_since(UNIX_EPOCH).unwrap_or_default());
        anchors
            .verify(&chain.leaf, &chain.intermediates, now, webpki::KeyUsage::client_auth())
            .map_err(IdentityMismatch::Path)?;
        let (chain, roots) = (chain.presented(), chain.roots);
        let with_roots = chain.iter().chain(&roots).cloned().collect();
        Ok(Self {
            spiffe_id,
            certified: Arc::new(tls::certified_key(chain.clone(), &key.to_der())?),
            certified_with_roots: Arc::new(tls::certified_key(with_roots, &key.to_der())?),
            anchors: Arc::new(anchors),
            chain,
            key,
            roots,
            obtained_at,
            not_after: facts.not_after,
        })
    }

    /// Chain and key as rustls presents them in a handshake.
    #[must_use]
    pub fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }

    /// The same with the roots at the end, for clients that know no more than a root's fingerprint.
    #[must_use]
    pub fn certified_with_roots(&self) -> &Arc<CertifiedKey> {
        &self.certified_with_roots
    }

    /// The roots, ready to verify peers with.
    #[must_use]
    pub fn anchors(&self) -> &Arc<Anchors> {
        &self.anchors
    }

    /// The chain in PEM, leaf first.
    #[must_use]
    pub fn chain_pem(&self) -> String {
        x509::certificates_to_pem(&self.chain)
    }

    /// The roots in PEM, the active one first.
    #[must_use]
    pub fn roots_pem(&self) -> String {
        x509::certificates_to_pem(&self.roots)
    }
}

/// Why a certificate and a key are no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityMismatch {
    /// The certificate was issued for another key.
    #[error("the certificate is not for this key")]
    Key,
    /// The certificate cannot be used.
    #[error("the certificate cannot be used")]
    Certificate(#[from] X509Error),
    /// The certificate does not lead to one of the roots at this time.
    #[error(
        "the certificate does not lead to a root that is believed; are the clocks of both machines right?"
    )]
    Path(#[source] webpki::Error),
    /// The key cannot present the certificate.
    #[error("the key cannot be used for TLS")]
    Tls(#[from] rustls::Error),
    /// The key cannot be used.
    #[error("the key cannot be used")]
    BadKey(#[from] rcgen::Error),
}
