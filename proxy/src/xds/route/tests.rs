//! Tables of what is taken and what is refused.

use super::action::{Action, ClusterChoice, HashOn, HostRewrite, PathRewrite};
use super::*;
use crate::xds::filter::FilterOverride;

fn parse(yaml: &str) -> Result<RouteConfiguration, Rejected> {
    let pb: pb::RouteConfiguration =
        wire::json::message_from_yaml(yaml).unwrap_or_else(|e| panic!("{e}\n{yaml}"));
    RouteConfiguration::try_from(pb)
}

fn with_route(route: &str) -> Result<RouteConfiguration, Rejected> {
    parse(&format!("{{name: r, virtual_hosts: [{{name: v, domains: ['*'], routes: [{route}]}}]}}"))
}

#[track_caller]
fn route(yaml: &str) -> Arc<Route> {
    Arc::clone(&with_route(yaml).unwrap().virtual_hosts[0].routes[0])
}

fn forward(fields: &str) -> Box<action::Forward> {
    let routes = with_route(&format!("{{match: {{prefix: /}}, route: {{{fields}}}}}")).unwrap();
    let route = Arc::clone(&routes.virtual_hosts[0].routes[0]);
    drop(routes);
    match Arc::into_inner(route).unwrap().action {
        Action::Forward(f) => f,
        other @ (Action::Redirect(_) | Action::Direct(_) | Action::NonForwarding) => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(result: Result<RouteConfiguration, Rejected>, expected: &str) {
    let error = result.expect_err(expected).to_string();
    assert!(error.contains(expected), "`{error}` does not say `{expected}`");
}

#[test]
fn paths_match_by_kind() {
    for (spec, path, expected) in [
        ("prefix: /a", "/ab", true),
        ("prefix: /a", "/b", false),
        ("path: /a", "/a", true),
        ("path: /a", "/a/", false),
        ("path_separated_prefix: /a", "/a", true),
        ("path_separated_prefix: /a", "/a/b", true),
        ("path_separated_prefix: /a", "/ab", false),
        ("safe_regex: {regex: '/a.*'}", "/abc", true),
        ("safe_regex: {regex: '/a'}", "/ab", false),
        ("prefix: /A, case_sensitive: false", "/aB", true),
    ] {
        let route = route(&format!("{{match: {{{spec}}}, route: {{cluster: c}}}}"));
        assert_eq!(route.matches.path.matches(path), expected, "{spec} {path}");
    }
}

#[test]
fn defaults_are_envoys() {
    let forward = forward("cluster: c");
    assert_eq!(forward.timeout, Some(std::time::Duration::from_secs(15)));
    assert!(forward.retry.is_none() && forward.idle_timeout.is_none());
    assert_eq!(forward.cluster_not_found, http::StatusCode::SERVICE_UNAVAILABLE);
    assert!(self::forward("cluster: c, timeout: 0s").timeout.is_none());
}

#[test]
fn weights_are_cumulated_and_clusters_numbered() {
    let routes = with_route(
        "{match: {prefix: /}, route: {weighted_clusters: {clusters: [{name: a, weight: 90}, {name: b, weight: 10}, {name: a, weight: 0}]}}}",
    )
    .unwrap();
    assert_eq!(routes.clusters.iter().map(|n| &**n).collect::<Vec<_>>(), ["a", "b"]);
    let Action::Forward(forward) = &routes.virtual_hosts[0].routes[0].action else { panic!() };
    let ClusterChoice::Weighted(weighted) = &forward.cluster else { panic!() };
    assert_eq!(weighted.total, 100);
    let to_b = (0..1000).filter(|n| weighted.pick(*n).unwrap().cluster == ClusterRef(1)).count();
    assert_eq!(to_b, 100);
}

#[test]
fn retries_rewrites_hashes_and_redirects_are_taken() {
    let forward = forward(
        "cluster: c, prefix_rewrite: /x, host_rewrite_literal: h.example, timeout: 3s,
         retry_policy: {retry_on: 'connect-failure,503', num_retries: 2, per_try_timeout: 1s, host_selection_retry_max_attempts: 5,
           retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts}]},
         hash_policy: [{header: {header_name: x-user}}, {cookie: {name: c, ttl: 0s}, terminal: true}],
         request_mirror_policies: [{cluster: m, runtime_fraction: {default_value: {numerator: 50}}}],
         max_stream_duration: {max_stream_duration: 0s, grpc_timeout_header_max: 0s}",
    );
    let retry = forward.retry.as_ref().unwrap();
    assert!(retry.on.contains(retry::RetryOn::RETRIABLE_STATUS_CODES) && retry.avoid_previous_hosts);
    assert_eq!((retry.num_retries, retry.host_selection_attempts), (2, 5));
    assert!(matches!(&forward.path_rewrite, PathRewrite::Prefix(p) if &**p == "/x"));
    assert!(matches!(&forward.host_rewrite, HostRewrite::Literal(h) if h == "h.example"));
    assert!(matches!(&forward.hash[0].on, HashOn::Header(..)) && forward.hash[1].terminal);
    assert_eq!(forward.mirrors[0].fraction.numerator, 50);
    assert_eq!(forward.grpc_timeout.unwrap().max, None);
    let route = route(
        "{match: {prefix: /}, redirect: {https_redirect: true, port_redirect: 444, path_redirect: /y}}",
    );
    let Action::Redirect(redirect) = &route.action else { panic!() };
    assert_eq!((redirect.status.as_u16(), redirect.port), (301, Some(444)));
    let route =
        self::route("{match: {prefix: /}, direct_response: {status: 418, body: {inline_string: tea}}}");
    assert!(matches!(&route.action, Action::Direct(d) if d.status == 418 && d.body == "tea"));
}

#[test]
fn levels_above_are_folded_into_routes() {
    let fault = r#"{"@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault, abort: {http_status: 500, percentage: {numerator: 100}}}"#;
    let routes = parse(&format!(
        r#"
name: r
virtual_hosts:
- name: v
  domains: ["A.example", "*.b"]
  retry_policy: {{retry_on: 5xx}}
  typed_per_filter_config: {{envoy.filters.http.fault: {fault}}}
  routes:
  - {{match: {{prefix: /a}}, route: {{cluster: c}}}}
  - match: {{prefix: /b}}
    route: {{cluster: c, retry_policy: {{retry_on: reset}}}}
    typed_per_filter_config:
      envoy.filters.http.fault: {{"@type": type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}}
      other: {{"@type": type.googleapis.com/envoy.config.route.v3.FilterConfig, is_optional: true, config: {{"@type": type.googleapis.com/envoy.config.core.v3.Locality}}}}
"#
    ))
    .unwrap();
    let host = &routes.virtual_hosts[0];
    assert_eq!(&*host.domains[0], "a.example");
    let of = |n: usize| {
        let Action::Forward(f) = &host.routes[n].action else { panic!() };
        (host.routes[n].per_filter.get("envoy.filters.http.fault").cloned(), f.retry.clone().unwrap())
    };
    let (above, retry) = of(0);
    assert!(matches!(above, Some(FilterOverride::Fault(_))) && retry.on == retry::RetryOn::FIVE_XX);
    let (own, retry) = of(1);
    assert!(matches!(own, Some(FilterOverride::Disabled)) && retry.on == retry::RetryOn::RESET);
}

#[test]
fn the_older_cors_field_is_the_filters_policy() {
    let route = route(
        "{match: {prefix: /}, route: {cluster: c, cors: {allow_origin_string_match: [{exact: a}], allow_methods: GET}}}",
    );
    let Some(FilterOverride::Cors(cors)) = route.per_filter.get("envoy.filters.http.cors") else { panic!() };
    assert_eq!(cors.allow_methods.as_ref().unwrap(), "GET");
}

#[test]
fn refused_routes_name_the_field() {
    let at = "RouteConfiguration r: virtual_hosts[0].routes[0]";
    for (route, expected) in [
        ("{route: {cluster: c}}", format!("{at}.match: must be set")),
        ("{match: {}, route: {cluster: c}}", format!("{at}.match.path_specifier: must be set")),
        ("{match: {prefix: /}}", format!("{at}.action: must be set")),
        ("{match: {prefix: /}, route: {}}", format!("{at}.route.cluster: must be set")),
        ("{match: {safe_regex: {regex: '['}}, route: {cluster: c}}", format!("{at}.match.safe_regex.regex")),
        ("{match: {path_separated_prefix: /a/}, route: {cluster: c}}", "path_separated_prefix".into()),
        (
            "{match: {prefix: /, headers: [{name: 'a b'}]}, route: {cluster: c}}",
            "match.headers[0].name".into(),
        ),
        (
            "{match: {prefix: /}, route: {cluster: c, prefix_rewrite: /a, path_rewrite: /b}}",
            "only one of".into(),
        ),
        (
            "{match: {prefix: /}, route: {cluster: c, hedge_policy: {}}}",
            "route.hedge_policy: not supported".into(),
        ),
        ("{match: {connect_matcher: {}}, route: {cluster: c}}", "connect_matcher: not supported".into()),
        (
            "{match: {prefix: /}, route: {cluster: c, upgrade_configs: [{upgrade_type: websocket}]}}",
            "route.upgrade_configs: not supported".into(),
        ),
        ("{match: {prefix: /}, route: {cluster: c, timeout: -1s}}", "route.timeout: -1s".into()),
        (
            "{match: {prefix: /}, route: {weighted_clusters: {clusters: [{name: a, weight: 0}]}}}",
            "sum of weights is 0".into(),
        ),
        (
            "{match: {prefix: /}, route: {cluster: c, retry_policy: {retry_back_off: {base_interval: 0s}}}}",
            "base_interval".into(),
        ),
        ("{match: {prefix: /}, direct_response: {status: 99}}", "direct_response.status: 99".into()),
        (
            "{match: {prefix: /}, request_headers_to_add: [{header: {key: ':path', value: x}}], route: {cluster: c}}",
            "use a rewrite".into(),
        ),
        (
            r#"{match: {prefix: /}, route: {cluster: c}, typed_per_filter_config: {x: {"@type": type.googleapis.com/envoy.config.core.v3.Locality}}}"#,
            "typed_per_filter_config[x]".into(),
        ),
    ] {
        refused(with_route(route), &expected);
    }
    refused(parse("{name: r, virtual_hosts: [{name: v, domains: ['a*b']}]}"), "virtual_hosts[0].domains[0]");
    refused(
        parse("{name: r, virtual_hosts: [{name: v, domains: ['a']}, {name: w, domains: ['A']}]}"),
        "virtual_hosts[1].domains: `a` is also a domain of virtual host `v`",
    );
}
