//! An issuer's keys (RFC 7517), and what each can check (RFC 7518).

use aws_lc_rs::hmac;
use aws_lc_rs::signature::{self as sig, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey};
use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value as Json};

use super::Problem;

/// Key sets are written with and without padding.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The public keys of an issuer.
#[derive(Clone)]
pub struct KeySet(Box<[Jwk]>);

impl std::fmt::Debug for KeySet {
    /// Some keys are secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ids: Vec<_> = self.0.iter().map(|k| &k.id).collect();
        f.debug_tuple("KeySet").field(&ids).finish()
    }
}

#[derive(Clone)]
struct Jwk {
    id: Option<Box<str>>,
    algorithm: Option<Box<str>>,
    key: Key,
}

#[derive(Clone)]
enum Key {
    Rsa { n: Box<[u8]>, e: Box<[u8]> },
    Ec(Curve, Box<[u8]>),
    Ed25519(Box<[u8]>),
    Secret(Box<[u8]>),
}

#[derive(Clone, Copy)]
enum Curve {
    P256,
    P384,
    P521,
}

/// Whether any key could check such a signature.
pub(super) fn is_known(algorithm: &str) -> bool {
    const KNOWN: [&str; 13] = [
        "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256",
        "HS384", "HS512",
    ];
    KNOWN.contains(&algorithm)
}

impl KeySet {
    /// From its JSON. Keys of unknown kinds, and those that are not for signatures, are left out.
    ///
    /// # Errors
    ///
    /// When it is no key set.
    pub fn parse(text: &str) -> Result<Self, String> {
        let json: Json = serde_json::from_str(text).map_err(|e| format!("is not JSON: {e}"))?;
        let keys = json.get("keys").and_then(Json::as_array).ok_or("has no list `keys`")?;
        Ok(Self(keys.iter().filter_map(Json::as_object).filter_map(Jwk::new).collect()))
    }

    /// Whether one of the keys that a token may mean made this signature.
    ///
    /// # Errors
    ///
    /// When there is no such key, or none of them did.
    pub(super) fn verify(
        &self,
        algorithm: &str,
        id: Option<&str>,
        signed: &[u8],
        signature: &[u8],
    ) -> Result<(), Problem> {
        let mut problem = Problem::NoKey;
        for jwk in &self.0 {
            let other = jwk.id.as_deref().zip(id).is_some_and(|(a, b)| a != b);
            if other || jwk.algorithm.as_deref().is_some_and(|a| a != algorithm) {
                continue;
            }
            match jwk.key.made(algorithm, signed, signature) {
                Some(true) => return Ok(()),
                Some(false) => problem = Problem::Forged,
                None => {}
            }
        }
        Err(problem)
    }
}

impl Jwk {
    fn new(jwk: &Map<String, Json>) -> Option<Self> {
        let text = |name: &str| jwk.get(name).and_then(Json::as_str);
        if text("use").is_some_and(|u| u != "sig") {
            return None;
        }
        let bytes = |name: &str| text(name).and_then(|t| LENIENT.decode(t).ok());
        let number = |name: &str| {
            let bytes = bytes(name)?;
            let zeros = bytes.iter().take_while(|b| **b == 0).count();
            bytes.get(zeros..).filter(|rest| !rest.is_empty()).map(Box::from)
        };
        let key = match text("kty")? {
            "RSA" => Key::Rsa { n: number("n")?, e: number("e")? },
            "EC" => {
                let (curve, width) = match text("crv")? {
                    "P-256" => (Curve::P256, 32),
                    "P-384" => (Curve::P384, 48),
                    "P-521" => (Curve::P521, 66),
                    _ => return None,
                };
                let mut point = vec![4];
                for coordinate in [number("x")?, number("y")?] {
                    let coordinate: Box<[u8]> = coordinate;
                    point.resize(point.len() + width - coordinate.len().min(width), 0);
                    point.extend_from_slice(&coordinate);
                }
                Key::Ec(curve, point.into())
            }
            "OKP" if text("crv") == Some("Ed25519") => Key::Ed25519(bytes("x")?.into()),
            "oct" => Key::Secret(bytes("k").filter(|k| !k.is_empty())?.into()),
            _ => return None,
        };
        Some(Self { id: text("kid").map(Into::into), algorithm: text("alg").map(Into::into), key })
    }
}

impl Key {
    /// Whether it made the signature; `None` when it makes no signatures of this kind.
    fn made(&self, algorithm: &str, signed: &[u8], signature: &[u8]) -> Option<bool> {
        match self {
            Self::Rsa { n, e } => {
                let key = RsaPublicKeyComponents { n: &**n, e: &**e };
                Some(key.verify(rsa(algorithm)?, signed, signature).is_ok())
            }
            Self::Ec(curve, point) => {
                let kind = match (curve, algorithm) {
                    (Curve::P256, "ES256") => &sig::ECDSA_P256_SHA256_FIXED,
                    (Curve::P384, "ES384") => &sig::ECDSA_P384_SHA384_FIXED,
                    (Curve::P521, "ES512") => &sig::ECDSA_P521_SHA512_FIXED,
                    _ => return None,
                };
                Some(UnparsedPublicKey::new(kind, point).verify(signed, signature).is_ok())
            }
            Self::Ed25519(key) if algorithm == "EdDSA" => {
                Some(UnparsedPublicKey::new(&sig::ED25519, key).verify(signed, signature).is_ok())
            }
            Self::Ed25519(_) => None,
            Self::Secret(key) => {
                let kind = match algorithm {
                    "HS256" => hmac::HMAC_SHA256,
                    "HS384" => hmac::HMAC_SHA384,
                    "HS512" => hmac::HMAC_SHA512,
                    _ => return None,
                };
                Some(hmac::verify(&hmac::Key::new(kind, key), signed, signature).is_ok())
            }
        }
    }
}

fn rsa(algorithm: &str) -> Option<&'static RsaParameters> {
    Some(match algorithm {
        "RS256" => &sig::RSA_PKCS1_2048_8192_SHA256,
        "RS384" => &sig::RSA_PKCS1_2048_8192_SHA384,
        "RS512" => &sig::RSA_PKCS1_2048_8192_SHA512,
        "PS256" => &sig::RSA_PSS_2048_8192_SHA256,
        "PS384" => &sig::RSA_PSS_2048_8192_SHA384,
        "PS512" => &sig::RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}
