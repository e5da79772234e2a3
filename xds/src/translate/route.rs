//! Route configurations: what a proxy does with each HTTP request of its application.

mod action;
mod filters;
pub(super) mod matching;
pub(super) mod retry;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::route_action::ClusterSpecifier;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use registry::model::service::{Protocol, Service};
use registry::model::traffic::HttpRoute;

pub(super) use self::action::cluster_name;
use self::matching::Client;
use super::view::{RoutingRule, View};
use super::{names, pb};
use crate::proxy::Interception;

/// Longest body of a direct response.
const MAX_DIRECT_RESPONSE: u32 = 1 << 20;
/// The port on which hosts that are no service of the mesh may be routed.
const DEFAULT_HTTP_PORT: u16 = 80;

/// One route configuration to build.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    /// Everything that clients may call on this port.
    Port(u16),
    /// One service alone, on a port whose protocol is only known from its first bytes.
    Service(String, u16),
}

impl Table {
    /// The name by which listeners ask for it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Port(port) => port.to_string(),
            Self::Service(host, port) => format!("{host}:{port}"),
        }
    }

    fn port(&self) -> u16 {
        match self {
            Self::Port(port) | Self::Service(_, port) => *port,
        }
    }

    fn holds(&self, service: &Service) -> bool {
        let http = |protocol: Protocol| protocol.is_http() || protocol == Protocol::Auto;
        match self {
            Self::Port(port) => service.ports.iter().any(|p| p.number == *port && http(p.protocol)),
            Self::Service(host, _) => service.hostname == *host,
        }
    }
}

/// The route configuration of a table.
pub(super) fn configuration(view: &View<'_>, table: &Table) -> route::RouteConfiguration {
    let port = table.port();
    let mut taken = BTreeSet::new();
    let mut virtual_hosts: Vec<route::VirtualHost> = view
        .services
        .iter()
        .filter(|service| table.holds(service))
        .filter_map(|service| virtual_host(view, service, port, &mut taken))
        .collect();
    if *table == Table::Port(DEFAULT_HTTP_PORT) {
        virtual_hosts.extend(foreign_hosts(view, &mut taken));
    }
    virtual_hosts.extend((!taken.contains("*")).then(|| catch_all(view)));
    route::RouteConfiguration {
        name: table.name(),
        virtual_hosts,
        validate_clusters: pb::boolv(false),
        max_direct_response_body_size_bytes: pb::u32v(MAX_DIRECT_RESPONSE),
        ignore_port_in_host_matching: true,
        ..Default::default()
    }
}

/// The virtual host of a service; `None` when all its domains belong to others already.
fn virtual_host(
    view: &View<'_>,
    service: &Service,
    port: u16,
    taken: &mut BTreeSet<String>,
) -> Option<route::VirtualHost> {
    let mut domains = names::domains(&service.hostname, &view.proxy.namespace, view.domain_suffix());
    domains.extend(names::service_addresses(service).into_iter().filter_map(|net| {
        let whole = net.prefix_len() == net.max_prefix_len();
        whole.then(|| domain_of(net.addr()))
    }));
    domains.extend(names::explicit_address(view.proxy, service).map(|address| address.to_string()));
    domains.retain(|domain| taken.insert(domain.to_ascii_lowercase()));
    if domains.is_empty() {
        return None;
    }
    let routes = match view.routing_of(&service.hostname) {
        Some(rule) => routes(view, rule, port),
        None => vec![default_route(view, service, port)],
    };
    Some(named_host(&service.hostname, port, domains, routes))
}

fn domain_of(address: std::net::IpAddr) -> String {
    if address.is_ipv6() { format!("[{address}]") } else { address.to_string() }
}

fn named_host(host: &str, port: u16, domains: Vec<String>, routes: Vec<route::Route>) -> route::VirtualHost {
    route::VirtualHost {
        name: format!("{host}:{port}"),
        domains,
        routes,
        include_request_attempt_count: true,
        ..Default::default()
    }
}

/// Hosts that only `VirtualService`s know.
fn foreign_hosts(view: &View<'_>, taken: &mut BTreeSet<String>) -> Vec<route::VirtualHost> {
    let mut out = Vec::new();
    for rule in view.virtual_services.iter().filter(|rule| !rule.spec.http.is_empty()) {
        for host in &rule.spec.hosts {
            let known = view.services.iter().any(|service| names::covers(host, &service.hostname));
            if known || !taken.insert(host.to_ascii_lowercase()) {
                continue;
            }
            let mut domains = names::domains(host, &view.proxy.namespace, view.domain_suffix());
            domains.retain(|domain| domain == host || taken.insert(domain.clone()));
            let routes = routes(view, rule, DEFAULT_HTTP_PORT);
            out.push(named_host(host, DEFAULT_HTTP_PORT, domains, routes));
        }
    }
    out
}

/// The routes of a `VirtualService` on a port, in order, up to the first that takes every request.
fn routes(view: &View<'_>, rule: &RoutingRule, port: u16) -> Vec<route::Route> {
    let client = Client { proxy: view.proxy, port };
    let mut out = Vec::new();
    for http_route in &rule.spec.http {
        let mut requests: Vec<_> = http_route.r#match.iter().map(Some).collect();
        if requests.is_empty() {
            requests.push(None);
        }
        for request in requests {
            if request.is_some_and(|request| !matching::applies(request, client)) {
                continue;
            }
            let route_match = matching::route_match(request);
            let last = matching::is_catch_all(&route_match);
            let mut built = route::Route {
                name: route_name(&http_route.name, request.map(|r| r.name.as_str())),
                stat_prefix: request.map(|r| r.stat_prefix.clone()).unwrap_or_default(),
                decorator: Some(decorator(http_route, &route_match, port)),
                r#match: Some(route_match),
                metadata: Some(config_metadata(&rule.path)),
                ..Default::default()
            };
            action::apply(&mut built, view, http_route, port);
            out.push(built);
            if last {
                return out;
            }
        }
    }
    out
}

fn route_name(route: &str, request: Option<&str>) -> String {
    match request.filter(|name| !name.is_empty()) {
        Some(name) if route.is_empty() => name.to_owned(),
        Some(name) => format!("{route}.{name}"),
        None => route.to_owned(),
    }
}

/// The operation's name in traces: whom the route calls, and on which paths.
fn decorator(http_route: &HttpRoute, route_match: &route::RouteMatch, port: u16) -> route::Decorator {
    let path = match &route_match.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => format!("{prefix}*"),
        Some(PathSpecifier::Path(path)) => path.clone(),
        Some(PathSpecifier::SafeRegex(regex)) => regex.regex.clone(),
        _ => "/*".to_owned(),
    };
    let first = http_route.route.iter().find_map(|d| d.destination.as_ref());
    let operation = first.map_or_else(|| path.clone(), |d| format!("{}:{port}{path}", d.host));
    route::Decorator { operation, propagate: None }
}

/// Names the object from which a route came.
fn config_metadata(path: &str) -> envoy_types::pb::envoy::config::core::v3::Metadata {
    pb::metadata([("istio", pb::structure([("config", pb::text(path))]))])
}

/// Every request to the service itself, with the mesh's retries and no timeout.
fn default_route(view: &View<'_>, service: &Service, port: u16) -> route::Route {
    let name = names::outbound_cluster(port, "", &service.hostname);
    let mut forward = action::simple_action(ClusterSpecifier::Cluster(name), Duration::ZERO);
    let key = view.policy(&service.hostname, port, "").hash_key();
    forward.hash_policy = key.and_then(action::hash_policy).into_iter().collect();
    let hashed = !forward.hash_policy.is_empty();
    forward.retry_policy = retry::policy(None, view.mesh.default_http_retry_policy.as_ref(), hashed);
    route::Route {
        name: "default".to_owned(),
        r#match: Some(matching::route_match(None)),
        decorator: Some(route::Decorator {
            operation: format!("{}:{port}/*", service.hostname),
            propagate: None,
        }),
        action: Some(route::route::Action::Route(forward)),
        ..Default::default()
    }
}

/// Requests to hosts that nobody declares: let through where the mesh allows it, else 502.
///
/// Without capture there is no original destination to let them through to.
fn catch_all(view: &View<'_>) -> route::VirtualHost {
    let captured = view.proxy.interception == Interception::Captured;
    let (name, action) = if view.allow_any && captured {
        let cluster = ClusterSpecifier::Cluster(names::PASSTHROUGH.to_owned());
        ("allow_any", route::route::Action::Route(action::simple_action(cluster, Duration::ZERO)))
    } else {
        let refuse = route::DirectResponseAction { status: 502, ..Default::default() };
        ("block_all", route::route::Action::DirectResponse(refuse))
    };
    route::VirtualHost {
        name: name.to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![route::Route {
            name: name.to_owned(),
            r#match: Some(matching::route_match(None)),
            action: Some(action),
            ..Default::default()
        }],
        include_request_attempt_count: true,
        ..Default::default()
    }
}

/// The route configuration in front of the application: everything to it.
pub(super) fn inbound(
    view: &View<'_>,
    cluster: &str,
    host: &str,
    port: u16,
    grpc: bool,
) -> route::RouteConfiguration {
    let specifier = ClusterSpecifier::Cluster(cluster.to_owned());
    let mut forward = action::simple_action(specifier, Duration::ZERO);
    if !grpc {
        forward.retry_policy = retry::inbound(view.mesh.default_inbound_http_retry_policy.as_ref());
    }
    let decorator = (!host.is_empty())
        .then(|| route::Decorator { operation: format!("{host}:{port}/*"), propagate: None });
    route::RouteConfiguration {
        name: cluster.to_owned(),
        virtual_hosts: vec![route::VirtualHost {
            name: format!("inbound|http|{port}"),
            domains: vec!["*".to_owned()],
            routes: vec![route::Route {
                name: "default".to_owned(),
                r#match: Some(matching::route_match(None)),
                decorator,
                action: Some(route::route::Action::Route(forward)),
                ..Default::default()
            }],
            ..Default::default()
        }],
        validate_clusters: pb::boolv(false),
        // Our proxy reads them first, and removes them itself.
        request_headers_to_remove: if view.proxy.native {
            Vec::new()
        } else {
            PEER_HEADERS.map(str::to_owned).to_vec()
        },
        ..Default::default()
    }
}

/// What one proxy tells another of itself; no application sees it.
const PEER_HEADERS: [&str; 2] = ["x-envoy-peer-metadata", "x-envoy-peer-metadata-id"];

/// Which `VirtualService` routes the HTTP of each service: the one whose host is the most specific, the first among equals.
pub(super) fn owners(services: &[std::sync::Arc<Service>], rules: &[RoutingRule]) -> BTreeMap<String, usize> {
    let mut exact: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wildcards: Vec<(&str, usize)> = Vec::new();
    for (index, rule) in rules.iter().enumerate().filter(|(_, rule)| !rule.spec.http.is_empty()) {
        for host in &rule.spec.hosts {
            if host.starts_with('*') {
                wildcards.push((host, index));
            } else {
                exact.entry(host).or_insert(index);
            }
        }
    }
    wildcards.sort_by_key(|(host, index)| (std::cmp::Reverse(host.len()), *index));
    services
        .iter()
        .filter_map(|service| {
            let host = service.hostname.as_str();
            let by_wildcard =
                || wildcards.iter().find(|(p, _)| names::covers(p, host)).map(|(_, index)| *index);
            let index = exact.get(host).copied().or_else(by_wildcard)?;
            Some((host.to_owned(), index))
        })
        .collect()
}
