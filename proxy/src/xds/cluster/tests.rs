//! Tables of what is taken and what is refused.

use super::endpoint::{ClusterLoadAssignment, Health};
use super::http::HttpVersion;
use super::lb::LbPolicy;
use super::*;
use crate::xds::proxy_protocol::{PassTlvs, Version};

fn parse(fields: &str) -> Result<Cluster, Rejected> {
    let yaml = format!("{{name: c, {fields}}}");
    let pb: pb::Cluster = wire::json::message_from_yaml(&yaml).unwrap_or_else(|e| panic!("{e}\n{yaml}"));
    Cluster::try_from(pb)
}

fn endpoints(yaml: &str) -> Result<ClusterLoadAssignment, Rejected> {
    ClusterLoadAssignment::try_from(
        wire::json::message_from_yaml::<envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment>(
            yaml,
        )
        .unwrap_or_else(|e| panic!("{e}\n{yaml}")),
    )
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Rejected>, expected: &str) {
    let error = result.expect_err(expected).to_string();
    assert!(error.contains(expected), "`{error}` does not say `{expected}`");
}

const EDS: &str = "type: EDS, eds_cluster_config: {eds_config: {ads: {}}}";
const H2: &str = r#"typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}"#;

#[test]
fn defaults_are_envoys() {
    let cluster = parse("load_assignment: {cluster_name: c}").unwrap();
    assert!(matches!(cluster.discovery, Discovery::Static(_)));
    assert_eq!(cluster.connect_timeout, Duration::from_secs(5));
    assert_eq!(cluster.limits.max_retries, 3);
    assert_eq!(cluster.http.version, HttpVersion::Http1);
    assert_eq!(cluster.lb, LbPolicy::RoundRobin { slow_start: None });
    assert!(cluster.transport.tls.is_none() && cluster.outlier.is_none());
}

#[test]
fn an_istio_outbound_cluster_is_taken() {
    let cluster = parse(&format!(
        r#"{EDS}, {H2}, lb_policy: LEAST_REQUEST, connect_timeout: 10s,
        circuit_breakers: {{thresholds: [{{max_connections: 4294967295, max_retries: 4294967295}}]}},
        outlier_detection: {{consecutive_5xx: 3, interval: 1s, base_ejection_time: 3s, max_ejection_percent: 100, enforcing_success_rate: 0}},
        metadata: {{filter_metadata: {{istio: {{services: [{{host: h, name: n, namespace: ns}}]}}}}}},
        transport_socket_matches: [
          {{name: tlsMode-istio, match: {{tlsMode: istio}}, transport_socket: {{name: envoy.transport_sockets.tls, typed_config: {{
            "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: outbound_.80_._.h,
            common_tls_context: {{alpn_protocols: [istio], tls_certificate_sds_secret_configs: [{{name: default}}],
              combined_validation_context: {{default_validation_context: {{match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: "spiffe://a/b"}}}}]}},
                validation_context_sds_secret_config: {{name: ROOTCA}}}}}}}}}}}},
          {{name: tlsMode-disabled, match: {{}}, transport_socket: {{name: envoy.transport_sockets.raw_buffer}}}}]"#
    ))
    .unwrap();
    assert_eq!(&**cluster.eds_service().unwrap(), "c");
    assert_eq!(cluster.http.version, HttpVersion::Http2);
    assert_eq!(cluster.limits.max_connections, u32::MAX);
    assert_eq!(cluster.outlier.as_ref().unwrap().consecutive_5xx, 3);
    let assignment = endpoints(
        "{cluster_name: c, endpoints: [{locality: {region: r}, lb_endpoints: [
           {endpoint: {address: {socket_address: {address: 10.0.0.1, port_value: 80}}}, load_balancing_weight: 2, health_status: DRAINING,
            metadata: {filter_metadata: {envoy.transport_socket_match: {tlsMode: istio}, istio: {workload: 'w;ns;n;v1;k'}}}},
           {endpoint: {address: {socket_address: {address: 10.0.0.2, port_value: 80}}}}]}]}",
    )
    .unwrap();
    let both: Vec<_> = assignment.endpoints().collect();
    assert!(
        cluster
            .transport_for(both[0].transport_metadata())
            .tls
            .as_ref()
            .is_some_and(|t| t.sni.as_deref() == Some("outbound_.80_._.h"))
    );
    assert!(cluster.transport_for(both[1].transport_metadata()).tls.is_none());
    assert!(both[0].mesh_tls && !both[1].mesh_tls);
    assert_eq!((both[0].health, both[0].weight), (Health::Draining, 2));
    let workload = both[0].workload.as_ref().unwrap();
    assert_eq!((&*workload.name, &*workload.canonical_revision, &*workload.cluster), ("w", "v1", "k"));
}

#[test]
fn every_kind_of_discovery_and_balancing_is_taken() {
    let host = "load_assignment: {endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: a.example, port_value: 80}}}}]}]}";
    assert!(matches!(
        parse(&format!("type: STRICT_DNS, {host}")).unwrap().discovery,
        Discovery::StrictDns(..)
    ));
    assert!(matches!(
        parse(&format!("type: LOGICAL_DNS, {host}")).unwrap().discovery,
        Discovery::LogicalDns(..)
    ));
    let original = parse("type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED").unwrap();
    assert!(matches!(original.discovery, Discovery::OriginalDst(_)));
    assert_eq!(parse("lb_policy: RANDOM").unwrap().lb, LbPolicy::Random);
    assert_eq!(parse("lb_policy: MAGLEV").unwrap().lb, LbPolicy::Maglev { table_size: 65_537 });
    assert!(matches!(parse("lb_policy: RING_HASH").unwrap().lb, LbPolicy::RingHash { min_size: 1024, .. }));
    let policy = r#"load_balancing_policy: {policies: [
        {typed_extension_config: {name: x, typed_config: {"@type": type.googleapis.com/envoy.config.core.v3.Locality}}},
        {typed_extension_config: {name: w, typed_config: {"@type": type.googleapis.com/envoy.extensions.load_balancing_policies.wrr_locality.v3.WrrLocality,
          endpoint_picking_policy: {policies: [{typed_extension_config: {name: r, typed_config: {"@type": type.googleapis.com/envoy.extensions.load_balancing_policies.random.v3.Random}}}]}}}}]}"#;
    let cluster = parse(policy).unwrap();
    assert_eq!(cluster.lb, LbPolicy::Random);
    assert!(cluster.lb_common.locality_weighted);
}

/// A transport socket that tells endpoints who called.
fn told(fields: &str) -> String {
    let kind = "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport";
    format!(
        r#"transport_socket: {{name: p, typed_config: {{"@type": type.googleapis.com/{kind}, {fields}}}}}"#
    )
}

#[test]
fn endpoints_may_be_told_who_called() {
    let raw = "transport_socket: {name: envoy.transport_sockets.raw_buffer}";
    let cluster =
        parse(&told(&format!("config: {{version: V2, added_tlvs: [{{type: 224, value: b3du}}]}}, {raw}")));
    let settings = cluster.unwrap().transport.proxy_protocol.clone().unwrap();
    assert_eq!((settings.version, settings.added[0].value.as_ref()), (Version::V2, &b"own"[..]));
    assert_eq!(settings.pass, PassTlvs::None);
    let inner = r#"transport_socket: {name: t, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: a}}"#;
    let transport = parse(&told(inner)).unwrap().transport.clone();
    assert_eq!(transport.proxy_protocol.unwrap().version, Version::V1);
    assert_eq!(transport.tls.unwrap().sni.as_deref(), Some("a"));
}

#[test]
fn refused_clusters_name_the_field() {
    for (fields, expected) in [
        ("type: EDS", "Cluster c: eds_cluster_config: must be set"),
        (
            "type: EDS, eds_cluster_config: {eds_config: {path: x}}",
            "eds_cluster_config.eds_config: only `ads`",
        ),
        ("type: ORIGINAL_DST", "lb_policy: CLUSTER_PROVIDED goes with ORIGINAL_DST"),
        ("type: LOGICAL_DNS", "LOGICAL_DNS needs exactly one endpoint"),
        ("connect_timeout: 0s", "connect_timeout: must be more than 0"),
        (
            "type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, original_dst_lb_config: {use_http_header: true}",
            "original_dst_lb_config.use_http_header: not supported",
        ),
        ("outlier_detection: {enforcing_success_rate: 100}", "enforcing_success_rate: not supported"),
        (
            r#"transport_socket: {name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, common_tls_context: {alpn_protocols: [""]}}}"#,
            "alpn_protocols: a name has 1 to 255 bytes",
        ),
        ("lb_policy: MAGLEV, maglev_lb_config: {table_size: 10}", "table_size: 10 is not a prime"),
        (&told("config: {version: V2}"), "transport_socket.typed_config.transport_socket: must be set"),
        (
            &told(
                "config: {added_tlvs: [{type: 256}]}, transport_socket: {name: envoy.transport_sockets.raw_buffer}",
            ),
            "transport_socket.typed_config.config.added_tlvs[0].type: 256 is above 255",
        ),
        (
            &told(
                "config: {pass_through_tlvs: {match_type: INCLUDE, tlv_type: [1, 300]}}, transport_socket: {name: envoy.transport_sockets.raw_buffer}",
            ),
            "config.pass_through_tlvs.tlv_type[1]: 300 is above 255",
        ),
        (
            "lb_policy: RING_HASH, ring_hash_lb_config: {minimum_ring_size: 10, maximum_ring_size: 5}",
            "ring_hash_lb_config",
        ),
        ("lb_subset_config: {subset_selectors: [{keys: [v]}]}", "lb_subset_config: not supported"),
        ("outlier_detection: {max_ejection_percent: 101}", "outlier_detection.max_ejection_percent: 101"),
        (
            "health_checks: [{timeout: 1s, interval: 0s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {}}]",
            "health_checks[0].interval: must be more than 0",
        ),
        (
            "health_checks: [{timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 0, tcp_health_check: {}}]",
            "health_checks[0].healthy_threshold: must be more than 0",
        ),
        (
            "health_checks: [{timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {send: {text: 0g}}}]",
            "tcp_health_check.send.text: `0g` is not hexadecimal",
        ),
        (
            "health_checks: [{timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, http_health_check: {path: /, expected_statuses: [{start: 600, end: 700}]}}]",
            "expected_statuses[0]: [600, 700) is no range",
        ),
        (
            r#"transport_socket: {name: x, typed_config: {"@type": type.googleapis.com/envoy.config.core.v3.Locality}}"#,
            "transport_socket.typed_config",
        ),
        (
            "load_assignment: {endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: a.b, port_value: 1}}}}]}]}",
            "names need a DNS cluster",
        ),
    ] {
        refused(parse(fields), expected);
    }
    refused(
        endpoints("{cluster_name: c, endpoints: [{priority: 1}]}"),
        "priority 0 is missing below priority 1",
    );
    refused(
        endpoints(
            "{cluster_name: c, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 10.0.0.1, port_value: 1}}}, load_balancing_weight: 0}]}]}",
        ),
        "endpoints[0].lb_endpoints[0].load_balancing_weight",
    );
}

#[test]
fn requests_are_not_dropped_at_the_word_of_discovery_without_being_told() {
    let yaml =
        "{cluster_name: c, policy: {drop_overloads: [{category: x, drop_percentage: {numerator: 5}}]}}";
    refused(endpoints(yaml), "policy.drop_overloads: not supported");
}

#[test]
fn endpoints_of_each_family_have_their_own_source() {
    let bound = |extra: &str| {
        parse(&format!(
            "{EDS}, upstream_bind_config: {{source_address: {{address: 127.0.0.6, port_value: 0}}, \
             extra_source_addresses: [{{address: {{address: '{extra}', port_value: 0}}}}]}}"
        ))
    };
    let sources: [std::net::IpAddr; 2] = ["127.0.0.6".parse().unwrap(), "::6".parse().unwrap()];
    assert_eq!(*bound("::6").unwrap().source_addresses, sources);
    refused(bound("x"), "`x` is not an IP address");
}
