//! Rules of `RequestAuthentication`.

use serde_json::Value;

use super::{Checker, grammar};
use crate::model::security::{JwtRule, RequestAuthentication};

pub(super) fn check(cx: &mut Checker, namespace: &str, policy: &RequestAuthentication) {
    cx.targets(namespace, policy.selector.as_ref(), policy.target_ref.as_ref(), &policy.target_refs);
    cx.each("jwtRules", &policy.jwt_rules, check_rule);
    cx.refuse(policy.jwt_rules.len() > 4096, "jwtRules", "must have at most 4096 entries");
}

fn check_rule(cx: &mut Checker, rule: &JwtRule) {
    cx.required("issuer", &rule.issuer);
    for (field, texts) in [
        ("audiences", &rule.audiences),
        ("fromParams", &rule.from_params),
        ("fromCookies", &rule.from_cookies),
        ("spaceDelimitedClaims", &rule.space_delimited_claims),
    ] {
        cx.each(field, texts, |cx, text| {
            if text.is_empty() {
                cx.error("must not be empty");
            }
        });
    }
    check_keys(cx, rule);
    cx.each("fromHeaders", &rule.from_headers, |cx, header| {
        if cx.required("name", &header.name) {
            cx.refuse(!grammar::is_header_name(&header.name), "name", "must be the name of a header");
        }
    });
    let header = rule.output_payload_to_header.as_str();
    cx.refuse(
        !header.is_empty() && !grammar::is_header_name(header),
        "outputPayloadToHeader",
        "must be the name of a header",
    );
    cx.each("outputClaimToHeaders", &rule.output_claim_to_headers, |cx, output| {
        if cx.required("header", &output.header) {
            let plain = output.header.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
            cx.refuse(!plain, "header", "must be the name of a header of letters, digits, - and _");
        }
        cx.required("claim", &output.claim);
    });
    cx.duration("timeout", rule.timeout);
    let places = [rule.from_headers.len(), rule.from_params.len(), rule.from_cookies.len()];
    if places.iter().sum::<usize>() > 1 {
        cx.warn("a request with tokens in several of these places is refused only if one of them is invalid");
    }
}

fn check_keys(cx: &mut Checker, rule: &JwtRule) {
    cx.refuse(
        !rule.jwks.is_empty() && !rule.jwks_uri.is_empty(),
        "jwks",
        "only one of jwks and jwksUri may be set",
    );
    if rule.jwks.is_empty() && rule.jwks_uri.is_empty() {
        cx.warn(
            "the issuer's OpenID configuration is not fetched yet: without jwks, tokens of this issuer are refused",
        );
    }
    if !rule.jwks_uri.is_empty() && !grammar::is_http_url(&rule.jwks_uri) {
        cx.error_at("jwksUri", "must be a URL that begins with https:// or http://");
    }
    if !rule.jwks_uri.is_empty() && rule.jwks.is_empty() {
        cx.warn("jwksUri is not fetched yet: tokens of this issuer are refused; give its keys in jwks");
    }
    if !rule.jwks.is_empty() {
        let keys = serde_json::from_str::<Value>(&rule.jwks).ok();
        let keys = keys.as_ref().and_then(|value| value.get("keys")).and_then(Value::as_array);
        match keys {
            None => cx.error_at("jwks", "must be a JSON object with a list keys"),
            Some(keys) if keys.is_empty() => cx.error_at("jwks", "must have at least one key"),
            Some(keys) if keys.iter().any(|key| key.get("kty").and_then(Value::as_str).is_none()) => {
                cx.error_at("jwks", "must have kty in every key");
            }
            Some(_) => {}
        }
    }
}
