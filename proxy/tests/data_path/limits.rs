//! Limits of connections, and clients that leave.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::backend::Backend;
use crate::harness::{Running, bootstrap, cluster, eventually, get, raw};

const TO_UP: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 0s}}";

#[tokio::test]
async fn requests_that_wait_for_a_connection_take_the_one_that_comes_back() {
    let backend = Backend::start("a").await;
    let one = "    circuit_breakers: {thresholds: [{max_connections: 1}]}";
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], one))).await;
    let to = proxy.address();
    let asking = futures::future::join_all((0..8).map(|_| get(to, "/", &[])));
    let got = tokio::time::timeout(Duration::from_secs(10), asking).await.expect("nobody waits for ever");
    assert!(got.iter().all(|g| g.status == 200), "{got:?}");
    let metrics = proxy.metrics().await;
    assert!(metrics.contains("envoy_cluster_upstream_cx_total{cluster_name=\"up\"} 1\n"), "{metrics}");
    proxy.end().await;
}

#[tokio::test]
async fn connections_to_one_endpoint_do_not_make_another_unreachable() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let one = "    lb_policy: ROUND_ROBIN\n    circuit_breakers: {thresholds: [{max_connections: 1}]}";
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[a.address, b.address], one))).await;
    for _ in 0..4 {
        let asking = get(proxy.address(), "/", &[]);
        let got = tokio::time::timeout(Duration::from_secs(10), asking).await.expect("an answer");
        assert_eq!(got.status, 200);
    }
    assert_eq!((a.hits(), b.hits()), (2, 2));
    proxy.end().await;
}

#[tokio::test]
async fn a_client_that_left_ends_its_request_to_the_server() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))).await;
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: h\r\nx-want-silence: 1\r\n\r\n").await.unwrap();
    eventually(&proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 1").await;
    drop(client);
    eventually(&proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 0").await;
    eventually(&proxy, "envoy_cluster_upstream_cx_active{cluster_name=\"up\"} 0").await;
    proxy.end().await;
}

#[tokio::test]
async fn an_answer_to_head_tells_the_length_and_has_no_body() {
    let backend = Backend::start("a").await;
    let direct = "              - {match: {prefix: \"/\"}, direct_response: {status: 200, body: {inline_string: hello}}}";
    let proxy = Running::start(&bootstrap(direct, "", &cluster("up", &[backend.address], ""))).await;
    let got = raw(proxy.address(), "HEAD / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await;
    assert!(got.starts_with("HTTP/1.1 200 OK\r\n"), "{got}");
    assert!(got.contains("content-length: 5\r\n") && got.ends_with("\r\n\r\n"), "{got}");
    proxy.end().await;
}

#[tokio::test]
async fn a_connection_to_a_server_gets_no_requests_beyond_its_life() {
    let backend = Backend::start("a").await;
    for version in ["http_protocol_options", "http2_protocol_options"] {
        let life = format!(
            "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        common_http_protocol_options: {{max_connection_duration: 0.3s}}\n        explicit_http_config: {{{version}: {{}}}}"
        );
        let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], &life))).await;
        let line = "envoy_cluster_upstream_cx_total{cluster_name=\"up\"} 3";
        let asking = async {
            while !proxy.metrics().await.lines().any(|l| l == line) {
                assert_eq!(get(proxy.address(), "/", &[]).await.status, 200);
            }
        };
        tokio::time::timeout(Duration::from_secs(20), asking).await.expect(version);
        proxy.end().await;
    }
}
