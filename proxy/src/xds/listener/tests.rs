//! Tables of what is taken and what is refused.

use envoy_types::pb::envoy::config::listener::v3 as pb;

use super::chain::Terminal;
use super::hcm::{Codec, ForwardClientCert, RouteSource};
use super::*;
use crate::xds::filter::FilterConfig;
use crate::xds::format::Part;
use crate::xds::tls::{CertSource, RootSource, TlsVersion};

const HCM: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = r#"{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}"#;

fn parse(yaml: &str) -> Result<Listener, Rejected> {
    let pb: pb::Listener = wire::json::message_from_yaml(yaml).unwrap_or_else(|e| panic!("{e}\n{yaml}"));
    Listener::try_from(pb)
}

fn with_chain(chain: &str) -> Result<Listener, Rejected> {
    parse(&format!(
        "{{name: l, address: {{socket_address: {{address: 127.0.0.1, port_value: 80}}}}, filter_chains: [{chain}]}}"
    ))
}

fn with_hcm(fields: &str) -> Result<Listener, Rejected> {
    with_chain(&format!(
        r#"{{filters: [{{name: http, typed_config: {{"@type": {HCM}, stat_prefix: s, {fields}}}}}]}}"#
    ))
}

fn hcm(fields: &str) -> Arc<hcm::HttpConnectionManager> {
    let fields = format!(
        "rds: {{route_config_name: r, config_source: {{ads: {{}}}}}}, http_filters: [{ROUTER}], {fields}"
    );
    match with_hcm(&fields).unwrap().chains[0].terminal.clone() {
        Terminal::Http(hcm) => hcm,
        other @ (Terminal::Tcp(_) | Terminal::Close) => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(result: Result<Listener, Rejected>, expected: &str) {
    let error = result.expect_err(expected).to_string();
    assert!(error.contains(expected), "`{error}` does not say `{expected}`");
}

#[test]
fn defaults_are_envoys() {
    let hcm = hcm("");
    assert_eq!(hcm.codec, Codec::Auto);
    assert_eq!(hcm.server_name, "envoy");
    assert!(hcm.request_id.generate && !hcm.client.use_remote_address && !hcm.path.normalize);
    assert_eq!(hcm.timeouts.stream_idle, Some(Duration::from_secs(300)));
    assert_eq!(hcm.timeouts.idle, Some(Duration::from_secs(3600)));
    assert_eq!(hcm.timeouts.request, None);
    assert_eq!((hcm.max_request_headers, hcm.max_headers_count), (60 * 1024, 100));
    assert!(matches!(hcm.routes, RouteSource::Rds(hcm::Rds(0))));
}

fn istio_inbound() -> String {
    format!(
        r#"
name: virtualInbound
address: {{socket_address: {{address: 0.0.0.0, port_value: 15006}}}}
traffic_direction: INBOUND
use_original_dst: true
continue_on_listener_filters_timeout: true
listener_filters:
- {{name: o, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}}}
- {{name: t, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}}}
- name: h
  filter_disabled: {{destination_port_range: {{start: 3306, end: 3307}}}}
  typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector}}
filter_chains:
- filter_chain_match:
    destination_port: 9080
    transport_protocol: tls
    application_protocols: [istio-http/1.1, istio-h2, istio, istio-peer-exchange]
  transport_socket:
    name: envoy.transport_sockets.tls
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
      require_client_certificate: true
      common_tls_context:
        alpn_protocols: [h2, http/1.1]
        tls_params: {{tls_minimum_protocol_version: TLSv1_2}}
        tls_certificate_sds_secret_configs:
        - name: default
          sds_config: {{api_config_source: {{api_type: GRPC, grpc_services: [{{envoy_grpc: {{cluster_name: sds-grpc}}}}]}}}}
        combined_validation_context:
          default_validation_context: {{match_typed_subject_alt_names: [{{san_type: URI, matcher: {{prefix: "spiffe://cluster.local/"}}}}]}}
          validation_context_sds_secret_config: {{name: ROOTCA}}
  filters:
  - name: rbac
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC
      stat_prefix: tcp.
      rules: {{action: DENY, policies: {{p: {{permissions: [{{destination_port: 9080}}], principals: [{{authenticated: {{principal_name: {{exact: spiffe://a/b}}}}}}]}}}}}}
  - name: http
    typed_config:
      "@type": {HCM}
      stat_prefix: inbound_0.0.0.0_9080;
      server_name: istio-envoy
      forward_client_cert_details: APPEND_FORWARD
      set_current_client_cert_details: {{subject: true, dns: true, uri: true}}
      upgrade_configs: [{{upgrade_type: websocket}}]
      normalize_path: true
      path_with_escaped_slashes_action: KEEP_UNCHANGED
      access_log:
      - name: file
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
          path: /dev/stdout
          log_format: {{text_format_source: {{inline_string: "%REQ(:METHOD)% %RESPONSE_CODE%\n"}}}}
      route_config: {{name: inbound, virtual_hosts: [{{name: v, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: "inbound|9080||"}}}}]}}]}}
      http_filters:
      - {{name: unknown, is_optional: true, typed_config: {{"@type": type.googleapis.com/envoy.config.core.v3.Locality}}}}
      - {{name: envoy.filters.http.fault, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault}}}}
      - {{name: envoy.filters.http.cors, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors}}}}
      - {{name: envoy.filters.http.grpc_stats, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.grpc_stats.v3.FilterConfig}}}}
      - {ROUTER}
default_filter_chain:
  filters:
  - name: tcp
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
      stat_prefix: t
      weighted_clusters: {{clusters: [{{name: a, weight: 1}}, {{name: b, weight: 3}}]}}
"#
    )
}

#[test]
fn an_istio_inbound_chain_is_taken() {
    let listener = parse(&istio_inbound()).unwrap();
    assert_eq!(listener.direction, Direction::Inbound);
    assert!(listener.use_original_dst && listener.bind_to_port);
    assert_eq!(listener.filters.len(), 3);
    assert!(listener.filters[2].disabled.as_ref().unwrap().matches(3306));
    let chain = &listener.chains[0];
    assert_eq!(chain.matches.destination_port, Some(9080));
    let tls = chain.tls.as_ref().unwrap();
    assert_eq!(tls.common.certificate, Some(CertSource::Sds("default".into())));
    assert_eq!(tls.common.validation.as_ref().unwrap().roots, RootSource::Sds("ROOTCA".into()));
    assert_eq!((tls.common.min_version, tls.common.max_version), (TlsVersion::V1_2, TlsVersion::V1_3));
    assert_eq!(chain.rbac.len(), 1);
    let Terminal::Http(hcm) = &chain.terminal else { panic!() };
    assert_eq!(hcm.client_cert.forward, ForwardClientCert::AppendForward);
    assert_eq!(hcm.filters.len(), 4, "the optional unknown filter is left out");
    assert!(matches!(hcm.filters.last().unwrap().config, FilterConfig::Router(_)));
    let crate::xds::access_log::LineFormat::Text(line) = &hcm.access_logs[0].format else { panic!() };
    assert!(matches!(line.0.last(), Some(Part::Text(t)) if &**t == "\n"));
    let Terminal::Tcp(tcp) = &listener.default_chain.as_ref().unwrap().terminal else { panic!() };
    let picked: Vec<_> = (0..4).map(|n| &**listener.clusters.name(tcp.pick(n).unwrap()).unwrap()).collect();
    assert_eq!(picked, ["a", "b", "b", "b"]);
}

#[test]
fn refused_listeners_name_the_field() {
    refused(parse("{name: l}"), "Listener l: address: must be set");
    refused(
        parse("{name: l, address: {socket_address: {address: a.b, port_value: 80}}}"),
        "`a.b` is not an IP address",
    );
    refused(
        parse("{name: l, address: {socket_address: {address: 127.0.0.1, port_value: 80}}}"),
        "filter_chains: must be set",
    );
    refused(
        parse("{name: l, address: {socket_address: {protocol: UDP, address: 127.0.0.1, port_value: 80}}}"),
        "address.socket_address.protocol: not supported",
    );
    refused(
        with_chain("{}, {}"),
        "filter_chains[1].filter_chain_match: is the same as that of filter_chains[0]",
    );
    refused(
        with_chain(
            r#"{filters: [{name: x, typed_config: {"@type": type.googleapis.com/envoy.config.core.v3.Locality}}]}"#,
        ),
        "filter_chains[0].filters[0].typed_config: filter `x` of type `type.googleapis.com/envoy.config.core.v3.Locality`",
    );
    refused(with_chain("{filter_chain_match: {server_names: ['a.*']}}"), "only a leading `*.`");
    refused(
        with_chain("{filter_chain_match: {destination_port: 70000}}"),
        "destination_port: 70000 is not a port",
    );
    refused(
        with_chain("{filter_chain_match: {prefix_ranges: [{address_prefix: 10.0.0.0, prefix_len: 33}]}}"),
        "prefix_ranges[0].prefix_len",
    );
}

#[test]
fn refused_connection_managers_name_the_field() {
    let rds = "rds: {route_config_name: r, config_source: {ads: {}}}";
    for (fields, expected) in [
        (format!("http_filters: [{ROUTER}]"), "route_specifier: must be set"),
        (
            format!("{rds}, http_filters: []"),
            "the last filter, and no other, must be `envoy.filters.http.router`",
        ),
        (format!("{rds}, http_filters: [{ROUTER}, {ROUTER}]"), "the last filter, and no other"),
        (format!("{rds}, codec_type: HTTP3, http_filters: [{ROUTER}]"), "codec_type: not supported"),
        (format!("{rds}, max_request_headers_kb: 9000, http_filters: [{ROUTER}]"), "max_request_headers_kb"),
        (format!("{rds}, stream_idle_timeout: -1s, http_filters: [{ROUTER}]"), "stream_idle_timeout"),
        (
            format!("{rds}, proxy_status_config: {{}}, http_filters: [{ROUTER}]"),
            "proxy_status_config: not supported",
        ),
        (
            format!(
                r#"{rds}, http_filters: [{{name: lua, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua}}}}, {ROUTER}]"#
            ),
            "http_filters[0].typed_config: filter `lua`",
        ),
        (
            format!("rds: {{route_config_name: r, config_source: {{path: /x}}}}, http_filters: [{ROUTER}]"),
            "rds.config_source: only `ads`",
        ),
    ] {
        refused(with_hcm(&fields), expected);
    }
}

#[test]
fn tls_that_cannot_be_met_is_refused() {
    let tls = |fields: &str| {
        with_chain(&format!(
            r#"{{transport_socket: {{name: t, typed_config: {{"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, {fields}}}}}}}"#
        ))
    };
    refused(tls("common_tls_context: {}"), "tls_certificates: must be set");
    refused(
        tls(
            "common_tls_context: {tls_certificates: [{certificate_chain: {filename: /no/such}, private_key: {inline_string: k}}]}",
        ),
        "tls_certificates[0].certificate_chain.filename: cannot read /no/such",
    );
    let sds = "tls_certificate_sds_secret_configs: [{name: default}]";
    refused(
        tls(&format!("require_client_certificate: true, common_tls_context: {{{sds}}}")),
        "validation_context: must be set when a client certificate is required",
    );
    refused(
        tls(&format!("common_tls_context: {{{sds}, tls_params: {{tls_maximum_protocol_version: TLSv1_1}}}}")),
        "TLS before 1.2",
    );
    assert!(
        tls(&format!(
            "common_tls_context: {{{sds}, tls_params: {{ecdh_curves: [X25519MLKEM768, P-521, P-256]}}}}"
        ))
        .is_ok()
    );
    refused(
        tls(&format!("common_tls_context: {{{sds}, tls_params: {{ecdh_curves: [X25519, P-1]}}}}")),
        "tls_params.ecdh_curves[1]: is no group",
    );
    refused(
        tls(&format!("common_tls_context: {{{sds}, tls_params: {{ecdh_curves: [P-521]}}}}")),
        "tls_params.ecdh_curves: one of X25519",
    );
    refused(
        tls(&format!("common_tls_context: {{{sds}, validation_context: {{verify_certificate_hash: [x]}}}}")),
        "verify_certificate_hash: not supported",
    );
}

#[test]
fn rules_that_cannot_be_evaluated_are_refused() {
    let rbac = |rules: &str| {
        let fields = format!(
            r#"rds: {{route_config_name: r, config_source: {{ads: {{}}}}}}, http_filters: [{{name: envoy.filters.http.rbac, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {rules}}}}}, {ROUTER}]"#
        );
        with_hcm(&fields)
    };
    assert!(rbac("{policies: {p: {permissions: [{any: true}], principals: [{any: true}]}}}").is_ok());
    refused(
        rbac("{policies: {p: {permissions: [], principals: [{any: true}]}}}"),
        "rules.policies[p]: filter `envoy.filters.http.rbac`: needs at least",
    );
    refused(
        rbac("{policies: {p: {permissions: [{}], principals: [{any: true}]}}}"),
        "permissions[0].rule: filter `envoy.filters.http.rbac`: must be set",
    );
    refused(
        rbac(
            "{policies: {p: {permissions: [{url_path: {path: {safe_regex: {regex: '('}}}}], principals: [{any: true}]}}}",
        ),
        "permissions[0].url_path.path.safe_regex.regex",
    );
    refused(
        rbac("{policies: {p: {permissions: [{any: true}], principals: [{any: true}], condition: {id: 1}}}}"),
        "condition: filter `envoy.filters.http.rbac`: not supported",
    );
}
