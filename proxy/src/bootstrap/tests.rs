//! Files as people have them.

use super::*;
use crate::tables::TableStore;
use crate::xds::client::Protocol;
use crate::xds::decode::Address;
use crate::xds::listener::chain::Terminal;
use crate::xds::route::action::Action;

const HTTP: &str = r#"
# role single
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 18900}}}
static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: HTTP2
          generate_request_id: false
          route_config:
            name: r
            virtual_hosts:
            - {name: v, domains: ["*"], routes: [{match: {prefix: "/"}, route: {cluster: up, timeout: 0s}}]}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router, suppress_envoy_headers: true, dynamic_stats: false}
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            alpn_protocols: ["h2"]
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            tls_certificates: [{certificate_chain: {filename: DIR/server.pem}, private_key: {filename: DIR/server.key}}]
            validation_context:
              trusted_ca: {filename: DIR/ca.pem}
              match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: "spiffe://cluster.local/ns/default/sa/client"}}]
  clusters:
  - name: up
    type: STATIC
    connect_timeout: 5s
    circuit_breakers: {thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}]}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http_protocol_options: {}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: localhost
        common_tls_context:
          alpn_protocols: ["http/1.1"]
          tls_certificates: [{certificate_chain: {filename: DIR/client.pem}, private_key: {filename: DIR/client.key}}]
          validation_context:
            trusted_ca: {filename: DIR/ca.pem}
            match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: "spiffe://cluster.local/ns/default/sa/server"}}]
    load_assignment: {cluster_name: up, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 18001}}}}]}]}
"#;

fn parsed(text: &str) -> Result<Config, BootstrapError> {
    parse(text, jiff::Timestamp::UNIX_EPOCH)
}

fn certificates() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |file: &str, text: String| std::fs::write(dir.path().join(file), text).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
    for name in ["server", "client", "ca"] {
        write(&format!("{name}.pem"), certificate.pem());
        write(&format!("{name}.key"), key.serialize_pem());
    }
    dir
}

#[test]
fn the_benchs_http_file_is_taken_unchanged() {
    let dir = certificates();
    let config = parsed(&HTTP.replace("DIR", dir.path().to_str().unwrap())).unwrap();
    assert_eq!(config.admin, Some(Address::Socket("127.0.0.1:18900".parse().unwrap())));
    assert!(config.xds.is_none());
    let (store, mut writer) = TableStore::new(1);
    assert_eq!(writer.apply(&config.static_resources), []);
    let tables = store.load();
    let listener = &tables.listeners["in"];
    assert_eq!(listener.sockets.local().len(), 1);
    let Terminal::Http(hcm) = &listener.listener.chains[0].terminal else { panic!() };
    let routes = listener.routes(&hcm.routes).unwrap();
    let Action::Forward(forward) = &routes.virtual_hosts[0].routes[0].action else { panic!() };
    assert_eq!(forward.timeout, None);
    assert!(tables.clusters["up"].cluster.transport.tls.is_some());
}

#[test]
fn the_benchs_tcp_file_is_taken_unchanged() {
    let config = parsed(
        r#"
static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: in
          cluster: up
  clusters:
  - name: up
    type: STATIC
    connect_timeout: 5s
    load_assignment: {cluster_name: up, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 1}}}}]}]}
"#,
    )
    .unwrap();
    assert_eq!(config.static_resources.changes.len(), 2);
}

fn dynamic(api_type: &str) -> String {
    format!(
        r#"
node: {{id: sidecar~1.1.1.1~a.b~b.svc.cluster.local, cluster: a.b, metadata: {{NAMESPACE: b, WORKLOAD_NAME: a, LABELS: {{app: a, version: v1}}}}}}
dynamic_resources:
  ads_config: {{api_type: {api_type}, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: xds-grpc}}}}]}}
  cds_config: {{ads: {{}}, resource_api_version: V3}}
  lds_config: {{ads: {{}}, resource_api_version: V3}}
static_resources:
  clusters:
  - name: xds-grpc
    type: STRICT_DNS
    http2_protocol_options: {{}}
    load_assignment: {{cluster_name: xds-grpc, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: istiod.example, port_value: 15012}}}}}}}}]}}]}}
"#
    )
}

#[test]
fn a_control_plane_is_found_behind_its_cluster() {
    let config = parsed(&dynamic("DELTA_GRPC")).unwrap();
    let xds = config.xds.unwrap();
    assert_eq!(xds.protocol, Protocol::Delta);
    assert_eq!(xds.servers, [Address::Name("istiod.example".into(), 15012)]);
    assert_eq!(parsed(&dynamic("GRPC")).unwrap().xds.unwrap().protocol, Protocol::Sotw);
    let facts = crate::config::NodeFacts::new(&config.node);
    assert!(facts.is_mesh);
    assert_eq!((&*facts.workload, facts.label("version").map(|v| &**v)), ("a", Some("v1")));
}

#[track_caller]
fn refused(text: &str, expected: &str) {
    let error = parsed(text).expect_err(expected);
    let mut told = error.to_string();
    if let Some(source) = std::error::Error::source(&error) {
        told.push_str(&format!(": {source}"));
    }
    assert!(told.contains(expected), "`{told}` does not say `{expected}`");
}

#[test]
fn mistakes_are_told_all_together_and_by_name() {
    refused("{stattic_resources: {}}", "stattic_resources");
    refused("[", "not an Envoy v3 bootstrap");
    refused(&dynamic("REST"), "dynamic_resources.ads_config.api_type: must be GRPC or DELTA_GRPC");
    refused(
        &dynamic("GRPC").replace("cluster_name: xds-grpc}}]", "cluster_name: nobody}}]"),
        "no static cluster `nobody`",
    );
    let two = "static_resources: {clusters: [{name: a, lb_policy: MAGLEV, maglev_lb_config: {table_size: 4}}, {name: b, type: EDS}]}";
    refused(two, "Cluster a: table_size: 4 is not a prime");
    refused(two, "Cluster b: eds_cluster_config: must be set");
    assert!(load(Path::new("/no/such/file"), jiff::Timestamp::UNIX_EPOCH).is_err());
}
