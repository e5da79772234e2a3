//! Tokens that are good, and the many ways in which they are not.

use super::*;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{self as sig, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use base64::prelude::BASE64_STANDARD;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use http::{HeaderMap, Method};
use serde_json::json;

const NOW: u64 = 1_000_000;

fn b64(bytes: &[u8]) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

struct Issuer {
    ec: EcdsaKeyPair,
    ed: Ed25519KeyPair,
}

impl Issuer {
    fn new() -> Self {
        let kind = &sig::ECDSA_P256_SHA256_FIXED_SIGNING;
        let rng = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(kind, &rng).unwrap();
        let ed = Ed25519KeyPair::generate_pkcs8(&rng).unwrap();
        Self {
            ec: EcdsaKeyPair::from_pkcs8(kind, pkcs8.as_ref()).unwrap(),
            ed: Ed25519KeyPair::from_pkcs8(ed.as_ref()).unwrap(),
        }
    }

    fn jwks(&self) -> String {
        let point = self.ec.public_key().as_ref();
        json!({ "keys": [
            { "kty": "EC", "crv": "P-256", "kid": "ec", "x": b64(&point[1..33]), "y": b64(&point[33..]) },
            { "kty": "OKP", "crv": "Ed25519", "kid": "ed", "alg": "EdDSA", "x": b64(self.ed.public_key().as_ref()) },
            { "kty": "from the future", "kid": "?" },
        ]})
        .to_string()
    }

    fn token(&self, header: Json, claims: Json) -> String {
        let signed = format!("{}.{}", b64(header.to_string().as_bytes()), b64(claims.to_string().as_bytes()));
        let signature = if header["alg"] == "EdDSA" {
            self.ed.sign(signed.as_bytes()).as_ref().to_vec()
        } else {
            self.ec.sign(&SystemRandom::new(), signed.as_bytes()).unwrap().as_ref().to_vec()
        };
        format!("{signed}.{}", b64(&signature))
    }

    fn good(&self, claims: Json) -> String {
        self.token(json!({ "alg": "ES256", "kid": "ec" }), claims)
    }
}

/// The form that Istio's control plane emits: any of the issuers, or no token at all.
fn authn(issuer: &Issuer, more: Json) -> JwtAuthn {
    let mut provider = json!({
        "issuer": "i", "local_jwks": { "inline_string": issuer.jwks() }, "payload_in_metadata": "payload",
        "normalize_payload_in_metadata": { "space_delimited_claims": ["scope"] },
    });
    provider.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let yaml = json!({
        "providers": { "p": provider },
        "rules": [{ "match": { "prefix": "/" }, "requires": { "requires_any": { "requirements":
            [{ "provider_name": "p" }, { "allow_missing": {} }] } } }],
    });
    JwtAuthn::new(wire::json::message_from_yaml::<pb::JwtAuthentication>(&yaml.to_string()).unwrap()).unwrap()
}

fn ask<'a>(authn: &'a JwtAuthn, path: &str, headers: &HeaderMap) -> Result<Vec<Verified<'a>>, Problem> {
    let head = Head { method: &Method::GET, path_and_query: path, authority: "h", scheme: "http", headers };
    check(authn, authn.rules[0].requires.as_ref().unwrap(), &head, NOW)
}

fn bearer(token: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
    headers
}

#[track_caller]
fn verdict(authn: &JwtAuthn, token: &str, expected: Result<(), Problem>) {
    assert_eq!(ask(authn, "/", &bearer(token)).map(|_| ()), expected, "{token}");
}

#[test]
fn a_good_token_passes_with_its_claims_and_a_missing_one_without() {
    let issuer = Issuer::new();
    let authn = authn(&issuer, json!({}));
    let token = issuer.good(json!({ "iss": "i", "sub": "s", "scope": "a b", "deep": { "er": 7 } }));
    let headers = bearer(&token);
    let good = ask(&authn, "/", &headers).unwrap();
    assert_eq!(good[0].listed_claims()["scope"], json!(["a", "b"]));
    assert_eq!(good[0].claim_text("deep.er").as_deref(), Some("7"));
    assert_eq!(good[0].claim_text("deep").unwrap(), BASE64_STANDARD.encode(r#"{"er":7}"#));
    assert!(ask(&authn, "/", &HeaderMap::new()).unwrap().is_empty());
    verdict(&authn, &issuer.token(json!({ "alg": "EdDSA", "kid": "ed" }), json!({ "iss": "i" })), Ok(()));
    verdict(&authn, &issuer.token(json!({ "alg": "ES256" }), json!({ "iss": "i" })), Ok(()));
}

#[test]
fn a_bad_token_is_refused_with_the_reason() {
    let issuer = Issuer::new();
    let authn = authn(&issuer, json!({ "audiences": ["me"] }));
    let claims = json!({ "iss": "i", "aud": ["you", "https://me/"], "nbf": NOW + 60, "exp": NOW - 60 });
    verdict(&authn, &issuer.good(claims.clone()), Ok(()));
    let with = |name: &str, value: Json| {
        let mut claims = claims.clone();
        claims[name] = value;
        issuer.good(claims)
    };
    verdict(&authn, &with("iss", json!("other")), Err(Problem::Issuer));
    verdict(&authn, &with("iss", json!(7)), Err(Problem::Payload));
    verdict(&authn, &with("aud", json!("you")), Err(Problem::Audience));
    verdict(&authn, &with("aud", Json::Null), Err(Problem::Payload));
    verdict(&authn, &with("exp", json!(NOW - 61)), Err(Problem::Expired));
    verdict(&authn, &with("nbf", json!(NOW + 61)), Err(Problem::NotYet));
    verdict(&authn, "a.b", Err(Problem::Form));
    verdict(&authn, "a.b.c.d", Err(Problem::Form));
    verdict(&authn, "a.b.c", Err(Problem::HeaderEncoding));
    verdict(&authn, "e30.a.c", Err(Problem::Header));
    verdict(&authn, &Issuer::new().good(claims.clone()), Err(Problem::Forged));
    let changed = {
        let good = issuer.good(claims.clone());
        let (head, rest) = good.split_once('.').unwrap();
        let signature = rest.split_once('.').unwrap().1;
        let mut claims = claims.clone();
        claims["sub"] = json!("root");
        format!("{head}.{}.{signature}", b64(claims.to_string().as_bytes()))
    };
    verdict(&authn, &changed, Err(Problem::Forged));
    verdict(
        &authn,
        &issuer.token(json!({ "alg": "ES256", "kid": "x" }), claims.clone()),
        Err(Problem::NoKey),
    );
    verdict(
        &authn,
        &issuer.token(json!({ "alg": "ES256", "crit": ["x"] }), claims.clone()),
        Err(Problem::Header),
    );
}

#[test]
fn the_key_says_how_a_signature_is_checked_not_the_token() {
    let issuer = Issuer::new();
    let authn = authn(&issuer, json!({}));
    let claims = json!({ "iss": "i" });
    let header = |alg: &str| b64(json!({ "alg": alg }).to_string().as_bytes());
    let payload = b64(claims.to_string().as_bytes());
    verdict(&authn, &format!("{}.{payload}.", header("none")), Err(Problem::Algorithm));
    // a public key is no secret: who signs with it proves nothing
    let signed = format!("{}.{payload}", header("HS256"));
    let public = issuer.ec.public_key().as_ref().to_vec();
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &public);
    let tag = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
    verdict(&authn, &format!("{signed}.{}", b64(tag.as_ref())), Err(Problem::NoKey));
}

#[test]
fn every_token_of_a_request_must_be_good() {
    let issuer = Issuer::new();
    let authn = authn(&issuer, json!({}));
    let good = issuer.good(json!({ "iss": "i" }));
    let bad = Issuer::new().good(json!({ "iss": "i" }));
    let path = format!("/?access_token={bad}");
    assert_eq!(ask(&authn, &path, &bearer(&good)).map(|_| ()), Err(Problem::Forged));
    let mut two = bearer(&good);
    two.append("authorization", format!("Bearer {bad}").parse().unwrap());
    assert_eq!(ask(&authn, "/", &two).map(|_| ()), Err(Problem::Forged));
}

#[test]
fn tokens_are_found_only_where_they_may_be() {
    let issuer = Issuer::new();
    let authn = authn(
        &issuer,
        json!({ "from_headers": [{ "name": "x-jwt", "value_prefix": "T " }], "from_params": ["t"], "from_cookies": ["c"] }),
    );
    let token = issuer.good(json!({ "iss": "i" }));
    let place = |path: &str, headers: &HeaderMap| {
        ask(&authn, path, headers).unwrap().first().map(|v| v.place.clone())
    };
    assert_eq!(place("/", &bearer(&token)), None);
    assert_eq!(place(&format!("/?a=b&t={token}"), &HeaderMap::new()), Some(Place::Parameter("t".into())));
    let header = |name: &'static str, value: String| {
        HeaderMap::from_iter([(HeaderName::from_static(name), value.parse().unwrap())])
    };
    assert_eq!(place("/", &header("cookie", format!("a=b; c={token}"))), Some(Place::Cookie));
    let found = place("/", &header("x-jwt", format!("T {token}")));
    assert_eq!(found, Some(Place::Header(HeaderName::from_static("x-jwt"))));
    assert_eq!(without_parameter("/p?a=b&t=x&c", "t"), "/p?a=b&c");
    assert_eq!(without_parameter("/p?t=x", "t"), "/p");
}

#[test]
fn keys_that_must_be_fetched_are_refused_unless_they_come_from_nowhere() {
    let from = |cluster: &str| {
        let yaml = json!({ "providers": { "p": { "issuer": "i", "remote_jwks": { "http_uri":
            { "uri": "https://i", "cluster": cluster, "timeout": "1s" } } } },
            "rules": [{ "match": { "prefix": "/" }, "requires": { "provider_name": "p" } }] });
        JwtAuthn::new(wire::json::message_from_yaml::<pb::JwtAuthentication>(&yaml.to_string()).unwrap())
    };
    assert!(from("i").unwrap_err().to_string().contains("remote_jwks"));
    let nowhere = from("BlackHoleCluster").unwrap();
    verdict(&nowhere, &Issuer::new().good(json!({ "iss": "i" })), Err(Problem::NoKeys));
    assert_eq!(ask(&nowhere, "/", &HeaderMap::new()).map(|_| ()), Err(Problem::Missing));
}
