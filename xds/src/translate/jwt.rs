//! Request authentication: which tokens are believed. A request without a token passes; a bad token does not.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{HttpUri, http_uri};
use envoy_types::pb::envoy::config::route::v3::{RouteMatch, route_match};
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::google::protobuf::Empty;
use registry::model::security::JwtRule;

use super::{names, pb};

/// Name of the filter, under which the claims of a verified token are found.
pub(super) const FILTER: &str = "envoy.filters.http.jwt_authn";

/// A fetch of keys takes no longer.
const FETCH_TIMEOUT: Duration = Duration::from_secs(1);

/// The filter for all rules that apply to the workload, or none when there is no rule.
pub(super) fn filter(rules: &[&JwtRule]) -> Option<HttpFilter> {
    if rules.is_empty() {
        return None;
    }
    let mut rules = rules.to_vec();
    rules.sort_by(|a, b| a.issuer.cmp(&b.issuer));
    let named = || rules.iter().enumerate().map(|(index, rule)| (format!("origins-{index}"), rule));
    let any_token = named().map(|(name, _)| jwt::jwt_requirement::RequiresType::ProviderName(name));
    let requirements = any_token
        .chain([jwt::jwt_requirement::RequiresType::AllowMissing(Empty {})])
        .map(|kind| jwt::JwtRequirement { requires_type: Some(kind) })
        .collect();
    let requirement = jwt::JwtRequirement {
        requires_type: Some(jwt::jwt_requirement::RequiresType::RequiresAny(jwt::JwtRequirementOrList {
            requirements,
        })),
    };
    let config = jwt::JwtAuthentication {
        providers: named().map(|(name, rule)| (name, provider(rule))).collect(),
        rules: vec![jwt::RequirementRule {
            r#match: Some(RouteMatch {
                path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
                ..Default::default()
            }),
            requirement_type: Some(jwt::requirement_rule::RequirementType::Requires(requirement)),
        }],
        bypass_cors_preflight: true,
        ..Default::default()
    };
    Some(pb::http_filter(FILTER, &config))
}

fn provider(rule: &JwtRule) -> jwt::JwtProvider {
    let from_headers = rule
        .from_headers
        .iter()
        .map(|header| jwt::JwtHeader { name: header.name.clone(), value_prefix: header.prefix.clone() })
        .collect();
    let claim_to_headers = rule
        .output_claim_to_headers
        .iter()
        .map(|claim| jwt::JwtClaimToHeader {
            header_name: claim.header.clone(),
            claim_name: claim.claim.clone(),
            ..Default::default()
        })
        .collect();
    jwt::JwtProvider {
        issuer: rule.issuer.clone(),
        audiences: rule.audiences.clone(),
        forward: rule.forward_original_token,
        from_headers,
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        forward_payload_header: rule.output_payload_to_header.clone(),
        payload_in_metadata: "payload".to_owned(),
        normalize_payload_in_metadata: Some(jwt::jwt_provider::NormalizePayload {
            space_delimited_claims: space_delimited(rule),
        }),
        claim_to_headers,
        jwks_source_specifier: Some(keys(rule)),
        ..Default::default()
    }
}

/// Keys that are not written down are asked of nobody: a fetch that cannot succeed refuses every token of the issuer,
/// and needs no key that could be somebody's.
fn keys(rule: &JwtRule) -> jwt::jwt_provider::JwksSourceSpecifier {
    if !rule.jwks.is_empty() {
        return jwt::jwt_provider::JwksSourceSpecifier::LocalJwks(pb::inline_string(&rule.jwks));
    }
    let uri = if rule.jwks_uri.is_empty() { rule.issuer.clone() } else { rule.jwks_uri.clone() };
    jwt::jwt_provider::JwksSourceSpecifier::RemoteJwks(jwt::RemoteJwks {
        http_uri: Some(HttpUri {
            uri,
            timeout: Some(pb::duration(FETCH_TIMEOUT)),
            http_upstream_type: Some(http_uri::HttpUpstreamType::Cluster(names::BLACKHOLE.to_owned())),
        }),
        ..Default::default()
    })
}

/// Claims that hold several values in one string: the usual two, and those that the rule names.
fn space_delimited(rule: &JwtRule) -> Vec<String> {
    let mut out = vec!["scope".to_owned(), "permission".to_owned()];
    out.extend(rule.space_delimited_claims.iter().filter(|c| *c != "scope" && *c != "permission").cloned());
    out
}
