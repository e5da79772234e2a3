//! Who is calling: a client certificate or a join token.

use std::fmt;
use std::time::SystemTime;

use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

use crate::identity::{SpiffeId, TrustDomain};
use crate::node::NodeId;
use crate::x509::{self, Facts, X509Error};

/// Beginning of every join token.
pub const TOKEN_PREFIX: &str = "istio-join.v1.";
/// Longest join token that is looked at, in bytes.
pub const MAX_TOKEN_LEN: usize = 8 * 1024;

/// An authenticated caller: the identity it gets certificates for, and how it proved it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    identity: SpiffeId,
    proof: Proof,
    node: Option<NodeId>,
}

/// How a caller proved who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// With a client certificate, verified by the TLS handshake.
    Certificate,
    /// With a join token that was redeemed.
    JoinToken {
        /// The token's public id.
        id: String,
    },
    /// With a certificate that has ended, and a request that is signed by its key.
    EndedCertificate,
}

/// Why a client certificate does not tell who is calling.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthnError {
    /// There is neither a certificate nor a token.
    #[error("no client certificate and no token")]
    Missing,
    /// The certificate has no single SPIFFE identity.
    #[error("the client certificate is refused")]
    Certificate(#[from] X509Error),
    /// The certificate has ended since the connection was opened.
    #[error("the client certificate is not valid at this time")]
    NotValid,
}

impl Caller {
    /// The caller behind a TLS connection whose handshake verified `chain`, leaf first.
    ///
    /// A connection may outlive the certificate it was opened with, so validity is checked again.
    ///
    /// # Errors
    ///
    /// When there is no certificate, it has no single SPIFFE identity, or is not valid at `now`.
    pub fn from_certificate(chain: &[CertificateDer<'_>], now: SystemTime) -> Result<Self, AuthnError> {
        let facts = Facts::parse(chain.first().ok_or(AuthnError::Missing)?)?;
        if !facts.is_valid_at(now) {
            return Err(AuthnError::NotValid);
        }
        Ok(Self { identity: facts.spiffe_id()?, proof: Proof::Certificate, node: facts.node() })
    }

    pub(crate) fn new(identity: SpiffeId, proof: Proof, node: Option<NodeId>) -> Self {
        Self { identity, proof, node }
    }

    /// The caller that redeemed the token `id`, which was bound to `identity`.
    #[must_use]
    pub fn from_redeemed_token(identity: SpiffeId, id: impl Into<String>) -> Self {
        Self { identity, proof: Proof::JoinToken { id: id.into() }, node: None }
    }

    /// The same caller, that joins with the public key of this hash.
    #[must_use]
    pub fn with_key(self, key: Hash) -> Self {
        Self { node: Some(NodeId::of_key(key)), ..self }
    }

    /// Who is calling.
    #[must_use]
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// How it was proved.
    #[must_use]
    pub fn proof(&self) -> &Proof {
        &self.proof
    }

    /// Which node it is, if that is known.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        self.node
    }
}

/// SHA-256 of a secret or of a public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash([u8; 32]);

impl Hash {
    /// Hashes `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(x509::sha256(bytes))
    }

    /// The first eight bytes.
    pub(crate) fn first_bytes(&self) -> [u8; 8] {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        [a, b, c, d, e, f, g, h]
    }

    /// Whether both are equal, in a time that does not tell where they differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&x509::hex(&self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> Self {
        hash.to_string()
    }
}

impl TryFrom<String> for Hash {
    type Error = TokenError;

    fn try_from(text: String) -> Result<Self, TokenError> {
        let digits: Option<Vec<_>> = text.chars().map(|c| c.to_digit(16)).collect();
        let digits = digits.ok_or(TokenError::Fingerprint)?;
        let bytes: Vec<_> = digits
            .chunks(2)
            .map(|pair| pair.iter().fold(0_u8, |byte, digit| byte << 4 | u8::try_from(*digit).unwrap_or(0)))
            .collect();
        match <[u8; 32]>::try_from(bytes) {
            Ok(bytes) if digits.len() == 64 => Ok(Self(bytes)),
            Ok(_) | Err(_) => Err(TokenError::Fingerprint),
        }
    }
}

/// Why a text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin with [`TOKEN_PREFIX`].
    #[error("a join token begins with `{TOKEN_PREFIX}`")]
    Prefix,
    /// It is longer than [`MAX_TOKEN_LEN`].
    #[error("the join token is too long")]
    TooLong,
    /// What follows the prefix cannot be read; most often it was cut while copying.
    #[error("the join token is damaged or incomplete")]
    Damaged,
    /// A SHA-256 is not 64 hexadecimal digits.
    #[error("a SHA-256 fingerprint has 64 hexadecimal digits")]
    Fingerprint,
    /// The system has no randomness for a new secret.
    #[error("the system has no randomness")]
    NoRandomness,
}

/// A secret that is wiped from memory when dropped and never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// A new secret of 256 random bits.
    ///
    /// # Errors
    ///
    /// When the system has no randomness.
    pub fn random() -> Result<Self, TokenError> {
        let mut bytes = [0; 32];
        rand::fill(&mut bytes).map_err(|_| TokenError::NoRandomness)?;
        let secret = Self(URL_SAFE_NO_PAD.encode(bytes));
        bytes.zeroize();
        Ok(secret)
    }

    /// The secret itself, for the one place that must show or keep it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What is stored in its place.
    #[must_use]
    pub fn hash(&self) -> Hash {
        Hash::of(self.0.as_bytes())
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A join token: all that a machine needs to become a member of the mesh, as one line of text.
///
/// It carries a secret; whoever has it can join once as the named service account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Public id, under which the control plane knows the token.
    pub id: String,
    /// The secret; only its hash is stored by the control plane.
    pub secret: Secret,
    /// Addresses of the certificate service, `host:port`.
    pub endpoints: Vec<String>,
    /// SHA-256 of the root certificate that the control plane's own chain ends in.
    pub root_sha256: Hash,
    /// Namespace of the identity that the token gives.
    pub namespace: String,
    /// Service account of the identity that the token gives.
    pub service_account: String,
    /// Trust domain of the mesh.
    pub trust_domain: TrustDomain,
}

/// Whom a new join token is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBinding {
    /// Namespace of the identity that the token gives.
    pub namespace: String,
    /// Service account of the identity that the token gives.
    pub service_account: String,
    /// Trust domain of the mesh.
    pub trust_domain: TrustDomain,
}

impl JoinToken {
    /// A new token with a random id and secret.
    ///
    /// # Errors
    ///
    /// When the system has no randomness.
    pub fn generate(
        binding: TokenBinding,
        endpoints: Vec<String>,
        root_sha256: Hash,
    ) -> Result<Self, TokenError> {
        let mut id = [0; 8];
        rand::fill(&mut id).map_err(|_| TokenError::NoRandomness)?;
        let TokenBinding { namespace, service_account, trust_domain } = binding;
        let (id, secret) = (x509::hex(&id), Secret::random()?);
        Ok(Self { id, secret, endpoints, root_sha256, namespace, service_account, trust_domain })
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// When it is not a join token, or is damaged.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_LEN {
            return Err(TokenError::TooLong);
        }
        let body = text.strip_prefix(TOKEN_PREFIX).ok_or(TokenError::Prefix)?;
        let json = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Damaged)?;
        serde_json::from_slice(&json).map_err(|_| TokenError::Damaged)
    }

    /// The text form: [`TOKEN_PREFIX`] and base64url of JSON.
    #[must_use]
    pub fn to_text(&self) -> String {
        // a struct of strings always has a JSON form
        let mut json = serde_json::to_vec(self).unwrap_or_default();
        let text = format!("{TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(&json));
        json.zeroize();
        text
    }

    /// What the token shows to the control plane.
    #[must_use]
    pub fn presented(&self) -> PresentedToken {
        PresentedToken { id: self.id.clone(), secret_hash: self.secret.hash() }
    }
}

/// A token as a caller presented it: what a redemption is decided on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PresentedToken {
    /// The token's public id.
    pub id: String,
    /// Hash of the presented secret.
    pub secret_hash: Hash,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        let binding = TokenBinding {
            namespace: "shop".to_owned(),
            service_account: "payments".to_owned(),
            trust_domain: TrustDomain::default(),
        };
        let endpoints = vec!["istiod.example:15012".to_owned()];
        JoinToken::generate(binding, endpoints, Hash::of(b"root")).unwrap()
    }

    #[test]
    fn tokens_differ_in_id_and_secret() {
        let (one, two) = (token(), token());
        assert_ne!(one.id, two.id);
        assert_ne!(one.presented().secret_hash, two.presented().secret_hash);
    }

    proptest::proptest! {
        #[test]
        fn foreign_texts_never_panic(text: String, body in "[A-Za-z0-9_=-]{0,80}") {
            drop(JoinToken::parse(&text));
            drop(JoinToken::parse(&format!("{TOKEN_PREFIX}{body}")));
            drop(Hash::try_from(text));
        }
    }

    #[test]
    fn text_form_round_trips_and_is_one_line() {
        let token = token();
        let text = token.to_text();
        assert!(text.starts_with("istio-join.v1.") && !text.contains(char::is_whitespace));
        assert_eq!(JoinToken::parse(&format!(" {text}\n")).unwrap(), token);
    }

    #[test]
    fn damaged_texts_are_refused() {
        let text = token().to_text();
        assert_eq!(JoinToken::parse("ey.J.x"), Err(TokenError::Prefix));
        assert_eq!(JoinToken::parse(&text[..text.len() - 9]), Err(TokenError::Damaged));
        assert_eq!(JoinToken::parse(TOKEN_PREFIX), Err(TokenError::Damaged));
        assert_eq!(JoinToken::parse(&format!("{TOKEN_PREFIX}e30")), Err(TokenError::Damaged));
        assert_eq!(JoinToken::parse(&"x".repeat(MAX_TOKEN_LEN + 1)), Err(TokenError::TooLong));
    }

    #[test]
    fn a_secret_is_never_printed() {
        let token = token();
        let secret = serde_json::to_value(&token.secret).unwrap();
        assert!(!format!("{token:?}").contains(secret.as_str().unwrap()));
    }

    #[test]
    fn hashes_have_64_hexadecimal_digits() {
        let hash = Hash::of(b"abc");
        assert_eq!(hash.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(Hash::try_from(hash.to_string()).unwrap(), hash);
        for text in [String::new(), "ab".repeat(31), "ab".repeat(33), "g".repeat(64), "a".repeat(63)] {
            assert_eq!(Hash::try_from(text), Err(TokenError::Fingerprint));
        }
        assert!(hash.matches(&Hash::of(b"abc")) && !hash.matches(&Hash::of(b"abd")));
    }
}
