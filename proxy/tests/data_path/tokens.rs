//! Tokens of requests: what they allow, what goes on, and what does not.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use crate::backend::Backend;
use crate::harness::{Running, bootstrap, cluster, get};

const KEY: &[u8] = b"a secret of thirty-two bytes....";

fn b64(bytes: &[u8]) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn token(claims: &str, key: &[u8]) -> String {
    let signed = format!("{}.{}", b64(br#"{"alg":"HS256"}"#), b64(claims.as_bytes()));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), signed.as_bytes());
    format!("Bearer {signed}.{}", b64(tag.as_ref()))
}

/// Whoever has a token of `i` for `alice` may pass; a bad token passes nowhere.
fn filters() -> String {
    let jwks = format!(r#"{{"keys":[{{"kty":"oct","k":"{}"}}]}}"#, b64(KEY));
    format!(
        r#"
          - name: envoy.filters.http.jwt_authn
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication
              providers:
                p: {{issuer: i, local_jwks: {{inline_string: '{jwks}'}}, payload_in_metadata: payload, claim_to_headers: [{{header_name: x-sub, claim_name: sub}}]}}
              rules: [{{match: {{prefix: /}}, requires: {{requires_any: {{requirements: [{{provider_name: p}}, {{allow_missing: {{}}}}]}}}}}}]
          - name: envoy.filters.http.rbac
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
              rules:
                policies:
                  alice:
                    permissions: [{{any: true}}]
                    principals: [{{metadata: {{filter: envoy.filters.http.jwt_authn, path: [{{key: payload}}, {{key: sub}}], value: {{string_match: {{exact: alice}}}}}}}}]"#
    )
}

#[tokio::test]
async fn claims_of_a_good_token_decide_and_the_token_stays_here() {
    let backend = Backend::start("a").await;
    let routes = "              - {match: {prefix: \"/\"}, route: {cluster: up}}";
    let text = bootstrap(routes, "", &cluster("up", &[backend.address], ""));
    let text = text.replace("          http_filters:", &format!("          http_filters:{}", filters()));
    let proxy = Running::start(&text).await;
    let address = proxy.address();
    let ask = |token: String| async move { get(address, "/x", &[("authorization", &token)]).await };
    let (alice, bob) = (r#"{"iss":"i","sub":"alice"}"#, r#"{"iss":"i","sub":"bob"}"#);
    let got = ask(token(alice, KEY)).await;
    assert_eq!((got.status, got.header("x-got-x-sub")), (200, "alice"));
    assert_eq!(got.header("x-got-authorization"), "");
    assert_eq!(ask(token(bob, KEY)).await.status, 403);
    let got = ask(token(alice, b"somebody else's")).await;
    assert_eq!((got.status, got.text().as_str()), (401, "Jwt verification fails"));
    let challenge = "Bearer realm=\"http://test.local/x\", error=\"invalid_token\"";
    assert_eq!(got.header("www-authenticate"), challenge);
    // nobody can say of himself who he is
    assert_eq!(ask("Basic YTpi".to_owned()).await.status, 403);
    assert_eq!(backend.hits(), 1);
    proxy.end().await;
}
