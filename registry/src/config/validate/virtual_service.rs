//! Rules of `VirtualService`.

use std::collections::BTreeMap;

use super::{Checker, grammar};
use crate::config::node::Segment;
use crate::model::traffic::{
    CorsPolicy, Delegate, Destination, ErrorType, FaultAbort, FaultDelay, GRPC_STATUS, HeaderOperations,
    Headers, HttpBodySpecifier, HttpDelayType, HttpDirectResponse, HttpFaultInjection, HttpMatchRequest,
    HttpRedirect, HttpRetry, HttpRewrite, HttpRoute, HttpRouteDestination, L4MatchAttributes, Percent,
    RedirectPort, RouteDestination, StringMatch, TcpRoute, TlsRoute, VirtualService, grpc_status,
};

/// Largest body of a direct response, in bytes.
const MAX_BODY: usize = 1 << 20;

pub(super) fn check(cx: &mut Checker, service: &VirtualService) {
    let delegate = service.hosts.is_empty();
    let mesh = service.gateways.is_empty() || service.gateways.iter().any(|gateway| gateway == "mesh");
    check_hosts(cx, service, mesh);
    check_gateways(cx, &service.gateways);
    cx.export_to(&service.export_to);
    if service.http.is_empty() && service.tcp.is_empty() && service.tls.is_empty() {
        cx.error("must have at least one route in http, tcp or tls");
    }
    if delegate {
        check_delegate_service(cx, service);
    }
    cx.each("http", &service.http, |cx, route| check_http(cx, route, delegate));
    unreachable_rules(cx, &service.http);
    cx.each("tls", &service.tls, |cx, route| check_tls(cx, route, &service.hosts));
    cx.each("tcp", &service.tcp, check_tcp);
}

fn check_hosts(cx: &mut Checker, service: &VirtualService, mesh: bool) {
    cx.each("hosts", &service.hosts, |cx, host| {
        if !grammar::is_wildcard_host(host) && !grammar::is_ip(host) {
            cx.error("must be a host name, a host name with a leading *., or an IP address");
        } else if mesh && host == "*" {
            cx.error("* is not allowed for sidecars; name the hosts, or name gateways without mesh");
        } else if !mesh && !host.contains(['.', ':']) && host != "*" {
            cx.warn(
                "a gateway gets requests for full names; this short name belongs to the object's namespace",
            );
        }
    });
    cx.unique("hosts", service.hosts.iter().map(String::as_str), "host");
}

fn check_gateways(cx: &mut Checker, gateways: &[String]) {
    cx.each("gateways", gateways, |cx, gateway| {
        let fits = match gateway.split_once('/') {
            Some((namespace, name)) => {
                (namespace == "." || grammar::is_label(namespace)) && grammar::is_subdomain(name)
            }
            None => grammar::is_host(gateway),
        };
        if !fits {
            cx.error("must be mesh, the name of a gateway, or namespace/name");
        }
    });
}

/// A VirtualService without hosts is only good to be named in `delegate`.
fn check_delegate_service(cx: &mut Checker, service: &VirtualService) {
    if service.http.is_empty() && !(service.tcp.is_empty() && service.tls.is_empty()) {
        cx.error_at("hosts", "is required: at least one host");
        return;
    }
    let message = "a VirtualService without hosts is a delegate, which has http routes only; add hosts";
    cx.refuse(!service.gateways.is_empty(), "gateways", message);
    cx.refuse(!service.tcp.is_empty(), "tcp", message);
    cx.refuse(!service.tls.is_empty(), "tls", message);
}

fn check_http(cx: &mut Checker, route: &HttpRoute, delegate: bool) {
    check_http_action(cx, route, delegate);
    cx.each("match", &route.r#match, check_http_match);
    cx.each("route", &route.route, check_http_destination);
    check_weights(cx, route.route.iter().map(|to| to.weight));
    cx.opt("redirect", route.redirect.as_ref(), check_redirect);
    cx.opt("directResponse", route.direct_response.as_ref(), check_direct_response);
    cx.opt("delegate", route.delegate.as_ref(), check_delegate);
    cx.opt("rewrite", route.rewrite.as_ref(), check_rewrite);
    cx.duration_or_zero("timeout", route.timeout);
    cx.opt("retries", route.retries.as_ref(), check_retries);
    cx.opt("fault", route.fault.as_ref(), check_fault);
    cx.opt("mirror", route.mirror.as_ref(), check_destination);
    cx.each("mirrors", &route.mirrors, |cx, mirror| {
        check_needed_destination(cx, mirror.destination.as_ref());
        check_percent(cx, "percentage", mirror.percentage.as_ref());
    });
    cx.refuse(
        route.mirror.is_some() && !route.mirrors.is_empty(),
        "mirrors",
        "only one of mirror and mirrors may be set",
    );
    cx.refuse(route.mirror_percent.is_some_and(|p| p > 100), "mirrorPercent", "must be between 0 and 100");
    check_percent(cx, "mirrorPercentage", route.mirror_percentage.as_ref());
    cx.opt("corsPolicy", route.cors_policy.as_ref(), check_cors);
    cx.opt("headers", route.headers.as_ref(), check_headers);
}

fn check_http_action(cx: &mut Checker, route: &HttpRoute, delegate: bool) {
    let actions = [
        ("route", !route.route.is_empty()),
        ("redirect", route.redirect.is_some()),
        ("directResponse", route.direct_response.is_some()),
        ("delegate", route.delegate.is_some()),
    ];
    let set: Vec<&str> = actions.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
    match set.as_slice() {
        [] => cx.error("must have one of route, redirect, directResponse and delegate"),
        [_] => {}
        several => {
            cx.error(format!(
                "must have only one of route, redirect, directResponse and delegate, not {}",
                several.join(" and ")
            ));
        }
    }
    cx.refuse(delegate && route.delegate.is_some(), "delegate", "a delegate may not delegate again");
    if route.route.is_empty() && (route.redirect.is_some() || route.direct_response.is_some()) {
        let message = "has no effect on a route that answers by itself; remove it, or use route";
        cx.refuse(route.fault.is_some(), "fault", message);
        cx.refuse(route.rewrite.is_some(), "rewrite", message);
        cx.refuse(route.retries.is_some(), "retries", message);
    }
}

fn check_http_match(cx: &mut Checker, conditions: &HttpMatchRequest) {
    for (field, value) in [
        ("uri", &conditions.uri),
        ("scheme", &conditions.scheme),
        ("method", &conditions.method),
        ("authority", &conditions.authority),
    ] {
        cx.opt(field, value.as_ref(), |cx, value| {
            if matches!(value, StringMatch::Present) {
                cx.error("must have one of exact, prefix and regex");
            }
            check_string_match(cx, value);
        });
    }
    for (field, map) in [("headers", &conditions.headers), ("withoutHeaders", &conditions.without_headers)] {
        cx.entries(field, map, |cx, name, value| {
            let claim = name.starts_with("@request.auth.claims");
            if !claim && !grammar::is_header_name(name) {
                cx.error("must be the name of a header");
            } else if matches!(name, "uri" | ":path") {
                cx.warn("match the path with uri instead");
            }
            check_string_match(cx, value);
        });
    }
    cx.entries("queryParams", &conditions.query_params, |cx, name, value| {
        if name.is_empty() {
            cx.error("must be the name of a parameter");
        }
        if matches!(value, StringMatch::Prefix(_)) {
            cx.warn("a prefix of a query parameter is matched as written; Istio ignores it before 1.20");
        }
        check_string_match(cx, value);
    });
    if conditions.ignore_uri_case && matches!(conditions.uri, Some(StringMatch::Regex(_))) {
        cx.at("ignoreUriCase", |cx| cx.warn("has no effect on regex; write (?i) into the expression"));
    }
    check_source(cx, &conditions.source_labels, &conditions.source_namespace, &conditions.gateways);
}

fn check_string_match(cx: &mut Checker, value: &StringMatch) {
    match value {
        // Istio's own way to write "is there".
        StringMatch::Regex(pattern) if pattern == "*" => {}
        StringMatch::Regex(pattern) => cx.regex("regex", pattern),
        StringMatch::Exact(_) | StringMatch::Prefix(_) | StringMatch::Present => {}
    }
}

fn check_source(cx: &mut Checker, labels: &BTreeMap<String, String>, namespace: &str, gateways: &[String]) {
    cx.selector("sourceLabels", labels);
    cx.refuse(
        !namespace.is_empty() && !grammar::is_label(namespace),
        "sourceNamespace",
        "must be the name of a namespace",
    );
    check_gateways(cx, gateways);
}

fn check_http_destination(cx: &mut Checker, to: &HttpRouteDestination) {
    check_needed_destination(cx, to.destination.as_ref());
    cx.opt("headers", to.headers.as_ref(), check_headers);
    cx.refuse(to.weight < 0, "weight", "must not be negative");
}

fn check_weights(cx: &mut Checker, weights: impl Iterator<Item = i32>) {
    let weights: Vec<i64> = weights.map(i64::from).collect();
    if weights.len() > 1 && weights.iter().all(|weight| *weight == 0) {
        cx.error_at("route", "at least one of several destinations must have a weight above 0");
    }
    if weights.iter().sum::<i64>() > i64::from(u32::MAX) {
        cx.error_at("route", "the weights must add up to at most 4294967295");
    }
}

fn check_needed_destination(cx: &mut Checker, destination: Option<&Destination>) {
    match destination {
        None => cx.error_at("destination", "is required"),
        Some(destination) => cx.at("destination", |cx| check_destination(cx, destination)),
    }
}

pub(super) fn check_destination(cx: &mut Checker, destination: &Destination) {
    if cx.required("host", &destination.host) {
        let host = destination.host.as_str();
        if host.contains('*') {
            cx.error_at("host", "must be one service, without a wildcard");
        } else if !grammar::is_host(host) {
            cx.error_at("host", "must be the host name of a service");
        }
    }
    if !destination.subset.is_empty() && !grammar::is_subset_name(&destination.subset) {
        cx.error_at("subset", "must be a name of letters, digits and -");
    }
    cx.opt("port", destination.port.as_ref(), |cx, port| cx.port("number", port.number));
}

fn check_redirect(cx: &mut Checker, redirect: &HttpRedirect) {
    let empty = redirect.uri.is_empty()
        && redirect.prefix_rewrite.is_empty()
        && redirect.authority.is_empty()
        && redirect.scheme.is_empty()
        && redirect.redirect_code == 0
        && redirect.redirect_port.is_none();
    if empty {
        cx.error("must have at least one of uri, prefixRewrite, authority, scheme, port, derivePort and redirectCode");
    }
    cx.refuse(
        !redirect.uri.is_empty() && !redirect.prefix_rewrite.is_empty(),
        "prefixRewrite",
        "only one of uri and prefixRewrite may be set",
    );
    cx.refuse(
        !matches!(redirect.redirect_code, 0 | 301 | 302 | 303 | 307 | 308),
        "redirectCode",
        "must be 301, 302, 303, 307 or 308",
    );
    cx.refuse(!matches!(redirect.scheme.as_str(), "" | "http" | "https"), "scheme", "must be http or https");
    if let Some(RedirectPort::Port(port)) = redirect.redirect_port {
        cx.port("port", port);
    }
}

fn check_direct_response(cx: &mut Checker, response: &HttpDirectResponse) {
    cx.refuse(!(200..=599).contains(&response.status), "status", "must be a status code, 200 to 599");
    cx.opt("body", response.body.as_ref(), |cx, body| {
        let length = match &body.specifier {
            None => {
                cx.error("must have one of string and bytes");
                0
            }
            Some(HttpBodySpecifier::String(text)) => text.len(),
            Some(HttpBodySpecifier::Bytes(bytes)) => bytes.0.len(),
        };
        if length > MAX_BODY {
            cx.error(format!("must have at most {MAX_BODY} bytes, it has {length}"));
        } else if length > 100 << 10 {
            cx.warn("a body above 100 KiB is kept in every proxy; serve it from a service");
        }
    });
}

fn check_delegate(cx: &mut Checker, delegate: &Delegate) {
    if cx.required("name", &delegate.name) {
        cx.refuse(!grammar::is_subdomain(&delegate.name), "name", "must be the name of a VirtualService");
    }
    cx.refuse(
        !delegate.namespace.is_empty() && !grammar::is_label(&delegate.namespace),
        "namespace",
        "must be the name of a namespace",
    );
}

fn check_rewrite(cx: &mut Checker, rewrite: &HttpRewrite) {
    if rewrite.uri.is_empty() && rewrite.authority.is_empty() && rewrite.uri_regex_rewrite.is_none() {
        cx.error("must have at least one of uri, authority and uriRegexRewrite");
    }
    cx.refuse(
        !rewrite.uri.is_empty() && rewrite.uri_regex_rewrite.is_some(),
        "uriRegexRewrite",
        "only one of uri and uriRegexRewrite may be set",
    );
    cx.opt("uriRegexRewrite", rewrite.uri_regex_rewrite.as_ref(), |cx, rewrite| {
        if cx.required("match", &rewrite.r#match) {
            cx.regex("match", &rewrite.r#match);
        }
        cx.required("rewrite", &rewrite.rewrite);
    });
}

/// What `retryOn` may name, besides status codes (Envoy, `x-envoy-retry-on` and `x-envoy-retry-grpc-on`).
const RETRY_ON: &[&str] = &[
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

pub(super) fn check_retries(cx: &mut Checker, retries: &HttpRetry) {
    cx.refuse(retries.attempts < 0, "attempts", "must not be negative; 0 switches retries off");
    let others =
        !retries.retry_on.is_empty() || retries.per_try_timeout.is_some() || retries.backoff.is_some();
    if retries.attempts == 0 && others {
        cx.error_at("attempts", "must be at least 1 when other fields of retries are set");
    }
    cx.duration_or_zero("perTryTimeout", retries.per_try_timeout);
    cx.duration("backoff", retries.backoff);
    for condition in retries.retry_on.split(',').map(str::trim).filter(|c| !c.is_empty()) {
        let code = condition.parse::<u16>().is_ok_and(|code| (100..=599).contains(&code));
        if !code && !RETRY_ON.contains(&condition) {
            let hint = super::super::decode::nearest(condition, RETRY_ON).map_or_else(
                || format!("conditions are: {}", RETRY_ON.join(", ")),
                |near| format!("did you mean {near}?"),
            );
            cx.error_at("retryOn", format!("{condition} is no condition and no status code; {hint}"));
        }
    }
}

fn check_fault(cx: &mut Checker, fault: &HttpFaultInjection) {
    if fault.delay.is_none() && fault.abort.is_none() {
        cx.error("must have at least one of delay and abort");
    }
    cx.opt("delay", fault.delay.as_ref(), check_delay);
    cx.opt("abort", fault.abort.as_ref(), check_abort);
    let without = [
        ("delay", fault.delay.as_ref().is_some_and(|delay| delay.percentage.is_none() && delay.percent == 0)),
        ("abort", fault.abort.as_ref().is_some_and(|abort| abort.percentage.is_none())),
    ];
    for (field, without) in without {
        if without {
            cx.at(field, |cx| cx.warn("has no effect without percentage: it is for no request"));
        }
    }
}

fn check_delay(cx: &mut Checker, delay: &FaultDelay) {
    match &delay.http_delay_type {
        None => cx.error("must have fixedDelay"),
        Some(HttpDelayType::FixedDelay(duration)) => cx.duration("fixedDelay", Some(*duration)),
        Some(HttpDelayType::ExponentialDelay(duration)) => cx.duration("exponentialDelay", Some(*duration)),
    }
    check_percent(cx, "percentage", delay.percentage.as_ref());
    cx.refuse(!(0..=100).contains(&delay.percent), "percent", "must be between 0 and 100");
}

fn check_abort(cx: &mut Checker, abort: &FaultAbort) {
    match &abort.error_type {
        None => cx.error("must have one of httpStatus and grpcStatus"),
        Some(ErrorType::HttpStatus(status)) => {
            cx.refuse(!(200..=599).contains(status), "httpStatus", "must be a status code, 200 to 599");
        }
        Some(ErrorType::GrpcStatus(status)) => {
            if grpc_status(status).is_none() {
                cx.error_at("grpcStatus", format!("must be a gRPC status: {}", GRPC_STATUS.join(", ")));
            }
        }
        Some(ErrorType::Http2Error(_)) => {
            cx.error_at("http2Error", "is not supported; use httpStatus or grpcStatus")
        }
    }
    check_percent(cx, "percentage", abort.percentage.as_ref());
}

pub(super) fn check_percent(cx: &mut Checker, field: &str, percent: Option<&Percent>) {
    cx.opt(field, percent, |cx, percent| cx.percent("value", Some(percent.value)));
}

const METHODS: &[&str] =
    &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"];

fn check_cors(cx: &mut Checker, cors: &CorsPolicy) {
    cx.each("allowOrigins", &cors.allow_origins, |cx, origin| {
        if matches!(origin, StringMatch::Present) {
            cx.error("must have one of exact, prefix and regex");
        }
        check_string_match(cx, origin);
    });
    cx.refuse(
        !cors.allow_origin.is_empty() && !cors.allow_origins.is_empty(),
        "allowOrigin",
        "only one of allowOrigin and allowOrigins may be set",
    );
    cx.each("allowMethods", &cors.allow_methods, |cx, method| {
        if !METHODS.contains(&method.as_str()) {
            cx.error(format!("must be a method in upper case: {}", METHODS.join(", ")));
        }
    });
    for (field, names) in [("allowHeaders", &cors.allow_headers), ("exposeHeaders", &cors.expose_headers)] {
        cx.each(field, names, |cx, name| {
            if !grammar::is_header_name(name) {
                cx.error("must be the name of a header");
            }
        });
    }
    cx.duration_or_zero("maxAge", cors.max_age);
    cx.refuse(
        cors.max_age.is_some_and(|age| age.subsec_nanos() != 0),
        "maxAge",
        "must be a duration of whole seconds",
    );
}

fn check_headers(cx: &mut Checker, headers: &Headers) {
    cx.opt("request", headers.request.as_ref(), check_header_operations);
    cx.opt("response", headers.response.as_ref(), check_header_operations);
}

fn check_header_operations(cx: &mut Checker, operations: &HeaderOperations) {
    for (field, map) in [("set", &operations.set), ("add", &operations.add)] {
        cx.entries(field, map, |cx, name, _| check_header_name(cx, name));
    }
    cx.each("remove", &operations.remove, |cx, name| check_header_name(cx, name));
}

fn check_header_name(cx: &mut Checker, name: &str) {
    if !grammar::is_header_name(name) {
        cx.error("must be the name of a header");
    } else if name.starts_with(':') && name != ":authority" {
        cx.warn("has no effect: of the headers that begin with a colon only :authority can be changed");
    }
}

fn check_tls(cx: &mut Checker, route: &TlsRoute, hosts: &[String]) {
    cx.refuse(route.r#match.is_empty(), "match", "is required: at least one match with sniHosts");
    cx.each("match", &route.r#match, |cx, conditions| {
        cx.refuse(conditions.sni_hosts.is_empty(), "sniHosts", "is required: at least one server name");
        cx.each("sniHosts", &conditions.sni_hosts, |cx, name| {
            if !grammar::is_wildcard_host(name) {
                cx.error("must be a host name, or a host name with a leading *.");
            } else if !hosts.iter().any(|host| grammar::covers(host, name)) {
                cx.error("must be one of the hosts of this VirtualService, or below one of its wildcards");
            }
        });
        check_subnets(cx, &conditions.destination_subnets);
        check_source(cx, &conditions.source_labels, &conditions.source_namespace, &conditions.gateways);
    });
    check_l4_destinations(cx, &route.route);
}

fn check_tcp(cx: &mut Checker, route: &TcpRoute) {
    cx.each("match", &route.r#match, |cx, conditions: &L4MatchAttributes| {
        check_subnets(cx, &conditions.destination_subnets);
        check_source(cx, &conditions.source_labels, &conditions.source_namespace, &conditions.gateways);
    });
    check_l4_destinations(cx, &route.route);
}

fn check_subnets(cx: &mut Checker, subnets: &[String]) {
    cx.each("destinationSubnets", subnets, |cx, subnet| {
        if !grammar::is_subnet(subnet) {
            cx.error("must be an IP address or a range such as 10.0.0.0/8");
        }
    });
}

fn check_l4_destinations(cx: &mut Checker, destinations: &[RouteDestination]) {
    cx.refuse(destinations.is_empty(), "route", "is required: at least one destination");
    cx.each("route", destinations, |cx, to| {
        check_needed_destination(cx, to.destination.as_ref());
        cx.refuse(to.weight < 0, "weight", "must not be negative");
    });
    check_weights(cx, destinations.iter().map(|to| to.weight));
}

/// Rules after one that matches everything, and matches that an earlier rule has word for word.
fn unreachable_rules(cx: &mut Checker, routes: &[HttpRoute]) {
    let mut all: Option<usize> = None;
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    cx.at("http", |cx| {
        for (index, route) in routes.iter().enumerate() {
            cx.step(Segment::Index(index), |cx| {
                if let Some(first) = all {
                    cx.warn(format!("is never reached: http[{first}] matches every request"));
                }
                for (at, conditions) in route.r#match.iter().enumerate() {
                    let first = *seen.entry(format!("{:?}", unnamed(conditions))).or_insert(index);
                    if first != index {
                        let message = format!("is never reached: http[{first}] has the same match");
                        cx.at("match", |cx| cx.step(Segment::Index(at), |cx| cx.warn(message)));
                    }
                }
            });
            let catches = route.r#match.is_empty() || route.r#match.iter().any(catches_all);
            if catches && all.is_none() {
                all = Some(index);
            }
        }
    });
}

/// The conditions without what does not decide.
fn unnamed(conditions: &HttpMatchRequest) -> HttpMatchRequest {
    HttpMatchRequest { name: String::new(), stat_prefix: String::new(), ..conditions.clone() }
}

fn catches_all(conditions: &HttpMatchRequest) -> bool {
    let uri = match &conditions.uri {
        None => true,
        Some(StringMatch::Prefix(prefix)) => prefix == "/",
        Some(StringMatch::Regex(pattern)) => pattern == ".*" || pattern == "*",
        Some(StringMatch::Exact(_) | StringMatch::Present) => false,
    };
    let rest = HttpMatchRequest { uri: None, ignore_uri_case: false, ..unnamed(conditions) };
    uri && rest == HttpMatchRequest::default()
}
