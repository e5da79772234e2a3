//! Two proxies with mutual TLS between them: identities, policies, peers and their metrics.

use std::net::SocketAddr;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};

use crate::backend::Backend;
use crate::harness::{Got, Running, cluster, get, raw};

/// An authority that names workloads.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, PEM in one line for YAML.
struct Leaf {
    chain: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn leaf(&self, account: &str) -> Leaf {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(id(account).try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let chain = params.signed_by(&key, &self.0).unwrap();
        Leaf { chain: quoted(&chain.pem()), key: quoted(&key.serialize_pem()) }
    }

    fn root(&self) -> String {
        quoted(&self.0.pem())
    }
}

fn id(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

fn quoted(pem: &str) -> String {
    format!("\"{}\"", pem.replace('\n', "\\n"))
}

fn common(leaf: &Leaf, root: &str, peer: &str, alpn: &str) -> String {
    format!(
        "common_tls_context: {{alpn_protocols: {alpn}, tls_certificates: [{{certificate_chain: {{inline_string: {}}}, private_key: {{inline_string: {}}}}}], \
         validation_context: {{trusted_ca: {{inline_string: {root}}}, match_typed_subject_alt_names: [{{san_type: URI, matcher: {peer}}}]}}}}",
        leaf.chain, leaf.key
    )
}

/// The server's proxy: mutual TLS in, plain to the application; `rbac` are its rules.
async fn inbound(ca: &Authority, application: SocketAddr, alpn: &str) -> Running {
    let tls = common(&ca.leaf("server"), &ca.root(), "{prefix: \"spiffe://cluster.local/\"}", alpn);
    let text = format!(
        r#"
node:
  id: sidecar~127.0.0.1~server.shop~shop.svc.cluster.local
  metadata: {{NAMESPACE: shop, WORKLOAD_NAME: server-v1, CLUSTER_ID: east, LABELS: {{app: server, version: v1}}}}
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    traffic_direction: INBOUND
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          {tls}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          forward_client_cert_details: APPEND_FORWARD
          set_current_client_cert_details: {{uri: true}}
          route_config:
            virtual_hosts:
            - {{name: v, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: "inbound|80||"}}}}]}}
          http_filters:
          - name: envoy.filters.http.rbac
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
              rules:
                action: ALLOW
                policies:
                  shop:
                    permissions: [{{url_path: {{path: {{prefix: "/open"}}}}}}]
                    principals: [{{authenticated: {{principal_name: {{exact: "{friend}"}}}}}}]
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
{cluster}"#,
        friend = id("friend"),
        cluster = cluster("inbound|80||", &[application], "")
    );
    Running::start(&text).await
}

/// The client's proxy: plain in, mutual TLS out, as `account`; it expects the server to be `expected`.
async fn outbound(
    ca: &Authority,
    server: SocketAddr,
    account: &str,
    expected: &str,
    alpn: &str,
    http: &str,
) -> Running {
    let tls = common(&ca.leaf(account), &ca.root(), &format!("{{exact: \"{}\"}}", id(expected)), alpn);
    let text = format!(
        r#"
node:
  id: sidecar~127.0.0.1~client.shop~shop.svc.cluster.local
  metadata: {{NAMESPACE: shop, WORKLOAD_NAME: client-v2, CLUSTER_ID: west, LABELS: {{app: client, version: v2}}}}
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    traffic_direction: OUTBOUND
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: out
          route_config:
            virtual_hosts:
            - {{name: v, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: up}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: up
    type: STATIC
    metadata: {{filter_metadata: {{istio: {{services: [{{host: server.shop.svc.cluster.local, name: server, namespace: shop}}]}}}}}}
    transport_socket_matches:
    - name: tlsMode-istio
      match: {{tlsMode: istio}}
      transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
          sni: outbound_.80_._.server.shop.svc.cluster.local
          {tls}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{{http}: {{}}}}
    load_assignment:
      cluster_name: up
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {ip}, port_value: {port}}}}}}}
          metadata:
            filter_metadata:
              envoy.transport_socket_match: {{tlsMode: istio}}
              istio: {{workload: "server-v1;shop;server;v1;east"}}
"#,
        ip = server.ip(),
        port = server.port()
    );
    Running::start(&text).await
}

async fn call(account: &str, expected: &str, path: &str) -> (Got, String, String) {
    let ca = Authority::new();
    let backend = Backend::start("app").await;
    let b = inbound(&ca, backend.address, "[h2, http/1.1]").await;
    let a = outbound(&ca, b.address(), account, expected, "[istio-http/1.1, istio]", "http_protocol_options")
        .await;
    let got = get(a.address(), path, &[("x-envoy-peer-metadata", "forged")]).await;
    let metrics = (a.metrics().await, b.metrics().await);
    a.end().await;
    b.end().await;
    (got, metrics.0, metrics.1)
}

#[track_caller]
fn check_metric(metrics: &str, name: &str, labels: &[&str]) {
    let found = metrics.lines().any(|l| l.starts_with(name) && labels.iter().all(|w| l.contains(w)));
    assert!(found, "no {name} with {labels:?} in\n{metrics}");
}

#[tokio::test]
async fn both_ends_know_each_other() {
    let (got, a, b) = call("friend", "server", "/open/x").await;
    assert_eq!((got.status, got.text().as_str()), (200, "hello from app"));
    let xfcc = got.header("x-got-x-forwarded-client-cert");
    assert!(xfcc.starts_with(&format!("By={};Hash=", id("server"))), "{xfcc}");
    assert!(xfcc.ends_with(&format!(";URI={}", id("friend"))), "{xfcc}");
    assert_eq!(got.header("x-got-x-envoy-peer-metadata"), "");
    let both = [
        "source_workload=\"client-v2\"",
        "source_version=\"v2\"",
        "destination_workload=\"server-v1\"",
        "destination_version=\"v1\"",
        "destination_canonical_service=\"server\"",
        "destination_cluster=\"east\"",
        "response_code=\"200\"",
        "response_flags=\"-\"",
    ];
    check_metric(&a, "istio_requests_total", &both);
    check_metric(&b, "istio_requests_total", &both);
    let service = "destination_service=\"server.shop.svc.cluster.local\"";
    check_metric(&a, "istio_requests_total", &["reporter=\"source\"", service]);
    let who = [
        format!("source_principal=\"{}\"", id("friend")),
        format!("destination_principal=\"{}\"", id("server")),
    ];
    check_metric(&a, "istio_requests_total", &["reporter=\"source\"", &who[0], &who[1]]);
    let secured = ["reporter=\"destination\"", "connection_security_policy=\"mutual_tls\"", &who[0], &who[1]];
    check_metric(&b, "istio_requests_total", &secured);
    check_metric(&b, "istio_request_duration_milliseconds_count", &secured);
}

#[tokio::test]
async fn a_denied_caller_and_a_denied_path_get_403() {
    let (got, a, _) = call("stranger", "server", "/open").await;
    assert_eq!((got.status, got.text().as_str()), (403, "RBAC: access denied"));
    check_metric(&a, "istio_requests_total", &["response_code=\"403\""]);
    let (got, _, _) = call("friend", "server", "/closed").await;
    assert_eq!(got.status, 403);
}

#[tokio::test]
async fn a_server_with_another_identity_is_refused() {
    let (got, a, _) = call("friend", "somebody-else", "/open").await;
    assert_eq!(got.status, 503);
    // What was wrong with the certificate is for the access log, not for the caller.
    assert!(got.text().ends_with("reset reason: remote connection failure"), "{}", got.text());
    check_metric(&a, "istio_requests_total", &["response_code=\"503\"", "response_flags=\"UF\""]);
}

#[tokio::test]
async fn a_client_without_or_with_a_foreign_certificate_is_refused() {
    let ca = Authority::new();
    let backend = Backend::start("app").await;
    let b = inbound(&ca, backend.address, "[h2, http/1.1]").await;
    let stranger = Authority::new();
    let tls = common(&stranger.leaf("friend"), &ca.root(), "{prefix: \"spiffe\"}", "[istio]");
    assert!(tls.contains("BEGIN"));
    let foreign = Foreign { leaf: stranger.leaf("friend"), root: ca.root() };
    let a = foreign.proxy(b.address()).await;
    assert_eq!(get(a.address(), "/open", &[]).await.status, 503);
    let plain = raw(b.address(), "GET /open HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!plain.contains("200"), "{plain}");
    assert_eq!(backend.hits(), 0);
    a.end().await;
    b.end().await;
}

/// A client whose certificate comes from elsewhere.
struct Foreign {
    leaf: Leaf,
    root: String,
}

impl Foreign {
    async fn proxy(&self, server: SocketAddr) -> Running {
        let tls = common(&self.leaf, &self.root, "{prefix: \"spiffe\"}", "[istio-http/1.1]");
        let extra = format!(
            "    transport_socket:\n      name: tls\n      typed_config:\n        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext\n        {tls}"
        );
        let routes = "              - {match: {prefix: \"/\"}, route: {cluster: up}}";
        Running::start(&crate::harness::bootstrap(routes, "", &cluster("up", &[server], &extra))).await
    }
}

#[tokio::test]
async fn http_2_goes_between_the_proxies() {
    let ca = Authority::new();
    let backend = Backend::start("app").await;
    let b = inbound(&ca, backend.address, "[h2, http/1.1]").await;
    let a = outbound(&ca, b.address(), "friend", "server", "[istio-h2, istio, h2]", "http2_protocol_options")
        .await;
    for _ in 0..3 {
        assert_eq!(get(a.address(), "/open", &[]).await.status, 200);
    }
    let metrics = b.metrics().await;
    check_metric(&metrics, "envoy_http_downstream_rq_total", &["\"in\"} 3"]);
    a.end().await;
    b.end().await;
}
