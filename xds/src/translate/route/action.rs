//! What a route of a `VirtualService` does with a request.

use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::route_action::{ClusterSpecifier, HostRewriteSpecifier};
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use registry::model::traffic::{
    Destination, HashKey, HttpBodySpecifier, HttpDirectResponse, HttpRedirect, HttpRewrite, HttpRoute,
    HttpRouteDestination, RedirectPort, RedirectPortSelection,
};

use super::super::view::View;
use super::super::{http, names, pb};
use super::filters::{self, HeaderChanges};
use super::retry;

/// Name of a cluster that a destination stands for; `port` is the listener's.
pub(in crate::translate) fn cluster_name(view: &View<'_>, destination: &Destination, port: u16) -> String {
    let port = destination_port(view, destination, port);
    names::outbound_cluster(port, &destination.subset, &destination.host)
}

/// The port that is named, else the only one of the service, else the listener's.
fn destination_port(view: &View<'_>, destination: &Destination, port: u16) -> u16 {
    if let Some(selector) = destination.port.as_ref().filter(|selector| selector.number != 0) {
        return selector.number;
    }
    match view.service(&destination.host).map(|service| service.ports.as_slice()) {
        Some([only]) => only.number,
        Some(_) | None => port,
    }
}

/// Fills in a route's action, header changes and filter settings.
pub(super) fn apply(out: &mut route::Route, view: &View<'_>, http_route: &HttpRoute, port: u16) {
    if let Some(cors) = &http_route.cors_policy {
        let cors = pb::any(&filters::cors_policy(cors));
        out.typed_per_filter_config.insert(http::CORS.to_owned(), cors);
    }
    if let Some(fault) = http_route.fault.as_ref().and_then(filters::http_fault) {
        out.typed_per_filter_config.insert(http::FAULT.to_owned(), pb::any(&fault));
    }
    let mut changes = HeaderChanges::new(http_route.headers.as_ref());
    out.action = Some(if let Some(redirect) = &http_route.redirect {
        route::route::Action::Redirect(redirect_action(redirect, port))
    } else if let Some(response) = &http_route.direct_response {
        route::route::Action::DirectResponse(direct_response(response))
    } else {
        let destinations = weighted(&http_route.route);
        if let [only] = destinations.as_slice() {
            changes = changes.then(HeaderChanges::new(only.headers.as_ref()));
        }
        let authority = changes.authority.clone();
        forward(view, http_route, &destinations, out.r#match.as_ref(), (port, authority))
    });
    out.request_headers_to_add = changes.request_add;
    out.request_headers_to_remove = changes.request_remove;
    out.response_headers_to_add = changes.response_add;
    out.response_headers_to_remove = changes.response_remove;
}

/// The destinations that get requests: the only one, whatever its weight, or those with a weight.
fn weighted(destinations: &[HttpRouteDestination]) -> Vec<&HttpRouteDestination> {
    match destinations {
        [only] => vec![only],
        several => several.iter().filter(|destination| destination.weight > 0).collect(),
    }
}

fn forward(
    view: &View<'_>,
    http_route: &HttpRoute,
    destinations: &[&HttpRouteDestination],
    route_match: Option<&route::RouteMatch>,
    (port, authority): (u16, Option<String>),
) -> route::route::Action {
    let hash_policy = hash_policies(view, destinations, port);
    let specifier = match destinations {
        [] => return unavailable(),
        [only] => match &only.destination {
            Some(destination) => ClusterSpecifier::Cluster(cluster_name(view, destination, port)),
            None => return unavailable(),
        },
        several => ClusterSpecifier::WeightedClusters(route::WeightedCluster {
            clusters: several.iter().filter_map(|d| cluster_weight(view, d, port)).collect(),
            ..Default::default()
        }),
    };
    let mut action = simple_action(specifier, http_route.timeout.unwrap_or(Duration::ZERO));
    let mesh_retries = view.mesh.default_http_retry_policy.as_ref();
    action.retry_policy = retry::policy(http_route.retries.as_ref(), mesh_retries, !hash_policy.is_empty());
    action.hash_policy = hash_policy;
    action.request_mirror_policies = mirrors(view, http_route, port);
    let rewritten = http_route.rewrite.as_ref().map(|r| r.authority.as_str()).filter(|a| !a.is_empty());
    action.host_rewrite_specifier =
        rewritten.map(str::to_owned).or(authority).map(HostRewriteSpecifier::HostRewriteLiteral);
    if let Some(rewrite) = &http_route.rewrite {
        rewrite_path(&mut action, rewrite, route_match);
    }
    route::route::Action::Route(action)
}

/// An action without retries; no timeout unless one is given, which then also caps `grpc-timeout`.
#[expect(deprecated, reason = "the field that replaces it limits the stream, not the wait for the response")]
pub(super) fn simple_action(specifier: ClusterSpecifier, timeout: Duration) -> route::RouteAction {
    route::RouteAction {
        cluster_specifier: Some(specifier),
        timeout: Some(pb::duration(timeout)),
        max_grpc_timeout: Some(pb::duration(timeout)),
        ..Default::default()
    }
}

fn unavailable() -> route::route::Action {
    route::route::Action::DirectResponse(route::DirectResponseAction { status: 503, ..Default::default() })
}

fn cluster_weight(
    view: &View<'_>,
    destination: &HttpRouteDestination,
    port: u16,
) -> Option<route::weighted_cluster::ClusterWeight> {
    use route::weighted_cluster::cluster_weight::HostRewriteSpecifier as Literal;
    let changes = HeaderChanges::new(destination.headers.as_ref());
    Some(route::weighted_cluster::ClusterWeight {
        name: cluster_name(view, destination.destination.as_ref()?, port),
        weight: u32::try_from(destination.weight).ok().and_then(pb::u32v),
        request_headers_to_add: changes.request_add,
        request_headers_to_remove: changes.request_remove,
        response_headers_to_add: changes.response_add,
        response_headers_to_remove: changes.response_remove,
        host_rewrite_specifier: changes.authority.map(Literal::HostRewriteLiteral),
        ..Default::default()
    })
}

fn rewrite_path(
    action: &mut route::RouteAction,
    rewrite: &HttpRewrite,
    route_match: Option<&route::RouteMatch>,
) {
    if let Some(regex) = &rewrite.uri_regex_rewrite {
        action.regex_rewrite = Some(matcher::RegexMatchAndSubstitute {
            pattern: Some(pb::regex_matcher(&regex.r#match)),
            substitution: regex.rewrite.clone(),
        });
    } else if !rewrite.uri.is_empty() {
        match route_match.and_then(|m| m.path_specifier.as_ref()) {
            Some(PathSpecifier::SafeRegex(regex)) => {
                action.regex_rewrite = Some(matcher::RegexMatchAndSubstitute {
                    pattern: Some(regex.clone()),
                    substitution: rewrite.uri.clone(),
                });
            }
            _ => action.prefix_rewrite = rewrite.uri.clone(),
        }
    }
}

fn redirect_action(redirect: &HttpRedirect, port: u16) -> route::RedirectAction {
    use route::redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};
    let response_code = match redirect.redirect_code {
        302 => RedirectResponseCode::Found,
        303 => RedirectResponseCode::SeeOther,
        307 => RedirectResponseCode::TemporaryRedirect,
        308 => RedirectResponseCode::PermanentRedirect,
        _ => RedirectResponseCode::MovedPermanently,
    };
    let wanted = match &redirect.redirect_port {
        Some(RedirectPort::Port(port)) => Some(*port),
        Some(RedirectPort::DerivePort(RedirectPortSelection::FromRequestPort)) => Some(port),
        Some(RedirectPort::DerivePort(RedirectPortSelection::FromProtocolDefault)) => {
            (!redirect.scheme.is_empty()).then_some(if redirect.scheme == "https" { 443 } else { 80 })
        }
        None => None,
    };
    // The scheme's own port goes without saying.
    let implied = |port: &u16| {
        (*port == 80 && matches!(redirect.scheme.as_str(), "" | "http"))
            || (*port == 443 && redirect.scheme == "https")
    };
    let path = if !redirect.prefix_rewrite.is_empty() {
        Some(PathRewriteSpecifier::PrefixRewrite(redirect.prefix_rewrite.clone()))
    } else if !redirect.uri.is_empty() {
        Some(PathRewriteSpecifier::PathRedirect(redirect.uri.clone()))
    } else {
        None
    };
    route::RedirectAction {
        host_redirect: redirect.authority.clone(),
        port_redirect: wanted.filter(|port| !implied(port)).map_or(0, u32::from),
        response_code: response_code.into(),
        scheme_rewrite_specifier: (!redirect.scheme.is_empty())
            .then(|| SchemeRewriteSpecifier::SchemeRedirect(redirect.scheme.clone())),
        path_rewrite_specifier: path,
        ..Default::default()
    }
}

fn direct_response(response: &HttpDirectResponse) -> route::DirectResponseAction {
    let body = response.body.as_ref().and_then(|body| body.specifier.as_ref());
    route::DirectResponseAction {
        status: response.status,
        body: body.map(|body| match body {
            HttpBodySpecifier::String(text) => pb::inline_string(text),
            HttpBodySpecifier::Bytes(bytes) => pb::inline_bytes(bytes.0.clone()),
        }),
        ..Default::default()
    }
}

fn mirrors(
    view: &View<'_>,
    http_route: &HttpRoute,
    port: u16,
) -> Vec<route::route_action::RequestMirrorPolicy> {
    let old = http_route.mirror.as_ref().map(|destination| {
        let percent = http_route.mirror_percentage.as_ref().map(|p| p.value);
        (Some(destination), percent.or(http_route.mirror_percent.map(f64::from)))
    });
    let new = http_route
        .mirrors
        .iter()
        .map(|mirror| (mirror.destination.as_ref(), mirror.percentage.as_ref().map(|p| p.value)));
    old.into_iter()
        .chain(new)
        .filter_map(|(destination, percent)| Some((destination?, percent.unwrap_or(100.0))))
        .filter(|(_, percent)| *percent > 0.0)
        .map(|(destination, percent)| route::route_action::RequestMirrorPolicy {
            cluster: cluster_name(view, destination, port),
            runtime_fraction: Some(pb::runtime_fraction(percent)),
            disable_shadow_host_suffix_append: true,
            ..Default::default()
        })
        .collect()
}

fn hash_policies(
    view: &View<'_>,
    destinations: &[&HttpRouteDestination],
    port: u16,
) -> Vec<route::route_action::HashPolicy> {
    let mut out: Vec<route::route_action::HashPolicy> = Vec::new();
    for destination in destinations.iter().filter_map(|d| d.destination.as_ref()) {
        let port = destination_port(view, destination, port);
        let policy = view.policy(&destination.host, port, &destination.subset);
        out.extend(policy.hash_key().and_then(hash_policy).filter(|policy| !out.contains(policy)));
    }
    out
}

/// The route's side of a consistent hash.
pub(super) fn hash_policy(key: &HashKey) -> Option<route::route_action::HashPolicy> {
    use route::route_action::hash_policy as pb_hash;
    let specifier = match key {
        HashKey::HttpHeaderName(name) => pb_hash::PolicySpecifier::Header(pb_hash::Header {
            header_name: name.clone(),
            regex_rewrite: None,
        }),
        HashKey::HttpCookie(cookie) => pb_hash::PolicySpecifier::Cookie(pb_hash::Cookie {
            name: cookie.name.clone(),
            ttl: cookie.ttl.map(pb::duration),
            path: cookie.path.clone(),
            attributes: cookie
                .attributes
                .iter()
                .map(|a| pb_hash::CookieAttribute { name: a.name.clone(), value: a.value.clone() })
                .collect(),
        }),
        HashKey::UseSourceIp(true) => {
            pb_hash::PolicySpecifier::ConnectionProperties(pb_hash::ConnectionProperties { source_ip: true })
        }
        HashKey::UseSourceIp(false) => return None,
        HashKey::HttpQueryParameterName(name) => {
            pb_hash::PolicySpecifier::QueryParameter(pb_hash::QueryParameter { name: name.clone() })
        }
    };
    Some(route::route_action::HashPolicy { terminal: false, policy_specifier: Some(specifier) })
}
