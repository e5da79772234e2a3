//! Conditions of a `VirtualService` as route matchers.

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::config::route::v3::query_parameter_matcher::QueryParameterMatchSpecifier;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use registry::model::traffic::{HttpMatchRequest, StringMatch};

use super::super::{authz, pb};
use crate::proxy::Proxy;

/// Prefix of header names that stand for claims of the verified token.
const CLAIMS: &str = "@request.auth.claims";

/// The client for which a match is decided while translating.
#[derive(Debug, Clone, Copy)]
pub(in crate::translate) struct Client<'a> {
    pub(in crate::translate) proxy: &'a Proxy,
    pub(in crate::translate) port: u16,
}

/// Whether the conditions that do not depend on the request hold: gateway, port, and who the client is.
pub(super) fn applies(request: &HttpMatchRequest, client: Client<'_>) -> bool {
    let gateways = &request.gateways;
    let source = !gateways.is_empty()
        || client_matches(&request.source_labels, &request.source_namespace, client.proxy);
    let gateway = gateways.is_empty() || gateways.iter().any(|gateway| gateway == "mesh");
    gateway && source && (request.port == 0 || request.port == client.port)
}

/// Whether a client has these labels and is in this namespace; empty conditions hold.
pub(in crate::translate) fn client_matches(
    labels: &std::collections::BTreeMap<String, String>,
    namespace: &str,
    proxy: &Proxy,
) -> bool {
    labels.iter().all(|(k, v)| proxy.labels.get(k) == Some(v))
        && (namespace.is_empty() || namespace == proxy.namespace)
}

/// The conditions on the request. Without any, every request matches.
pub(super) fn route_match(request: Option<&HttpMatchRequest>) -> route::RouteMatch {
    let Some(request) = request else {
        return route::RouteMatch { path_specifier: Some(any_path()), ..Default::default() };
    };
    let pseudo =
        [(":method", &request.method), (":authority", &request.authority), (":scheme", &request.scheme)];
    let mut headers: Vec<route::HeaderMatcher> = Vec::new();
    let mut dynamic_metadata = Vec::new();
    for (name, value) in &request.headers {
        match name.strip_prefix(CLAIMS) {
            Some(path) => dynamic_metadata.push(claim(path, value, false)),
            None => headers.push(header(name, value)),
        }
    }
    for (name, value) in &request.without_headers {
        match name.strip_prefix(CLAIMS) {
            Some(path) => dynamic_metadata.push(claim(path, value, true)),
            None => headers.push(without_header(name, value)),
        }
    }
    headers.extend(pseudo.into_iter().filter_map(|(name, value)| Some(header(name, value.as_ref()?))));
    route::RouteMatch {
        case_sensitive: request.ignore_uri_case.then_some(false).and_then(pb::boolv),
        path_specifier: Some(request.uri.as_ref().map_or_else(any_path, path)),
        headers,
        query_parameters: request.query_params.iter().map(|(name, value)| query(name, value)).collect(),
        dynamic_metadata,
        ..Default::default()
    }
}

/// Whether no request can get past this match.
pub(super) fn is_catch_all(route_match: &route::RouteMatch) -> bool {
    let any = match &route_match.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => prefix == "/",
        Some(PathSpecifier::SafeRegex(regex)) => matches!(regex.regex.as_str(), "*" | ".*" | "/.*"),
        _ => false,
    };
    any && route_match.headers.is_empty()
        && route_match.query_parameters.is_empty()
        && route_match.dynamic_metadata.is_empty()
}

fn any_path() -> PathSpecifier {
    PathSpecifier::Prefix("/".to_owned())
}

fn path(value: &StringMatch) -> PathSpecifier {
    match value {
        StringMatch::Exact(text) => PathSpecifier::Path(text.clone()),
        StringMatch::Prefix(text) => PathSpecifier::Prefix(text.clone()),
        StringMatch::Regex(text) => PathSpecifier::SafeRegex(pb::regex_matcher(text)),
        StringMatch::Present => any_path(),
    }
}

/// A string matcher, or `None` for "is there".
pub(super) fn string(value: &StringMatch) -> Option<matcher::StringMatcher> {
    match value {
        StringMatch::Exact(text) => Some(pb::exact(text)),
        StringMatch::Prefix(text) => Some(pb::prefix(text)),
        StringMatch::Regex(text) if text == "*" => None,
        StringMatch::Regex(text) => Some(pb::regex(text)),
        StringMatch::Present => None,
    }
}

fn header(name: &str, value: &StringMatch) -> route::HeaderMatcher {
    let specifier = match string(value) {
        Some(value) => HeaderMatchSpecifier::StringMatch(value),
        None => HeaderMatchSpecifier::PresentMatch(true),
    };
    route::HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(specifier),
        ..Default::default()
    }
}

fn without_header(name: &str, value: &StringMatch) -> route::HeaderMatcher {
    route::HeaderMatcher {
        invert_match: true,
        treat_missing_header_as_empty: string(value).is_some(),
        ..header(name, value)
    }
}

fn query(name: &str, value: &StringMatch) -> route::QueryParameterMatcher {
    let specifier = match string(value) {
        Some(value) => QueryParameterMatchSpecifier::StringMatch(value),
        None => QueryParameterMatchSpecifier::PresentMatch(true),
    };
    route::QueryParameterMatcher { name: name.to_owned(), query_parameter_match_specifier: Some(specifier) }
}

/// `.a.b` or `[a][b]` behind the prefix.
fn claim(path: &str, value: &StringMatch, invert: bool) -> matcher::MetadataMatcher {
    let segments: Vec<&str> = match path.strip_prefix('[').and_then(|path| path.strip_suffix(']')) {
        Some(inner) => inner.split("][").collect(),
        None => path.split('.').filter(|part| !part.is_empty()).collect(),
    };
    let value = string(value).unwrap_or_else(|| pb::regex(".+"));
    matcher::MetadataMatcher { invert, ..authz::claim(&segments, value) }
}
