//! What several workers know together: limits, ejections, and what DNS gave.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::backend::{Backend, listen};
use crate::harness::{Running, bootstrap, cluster, eventually, get, raw};

const TO_UP: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 0s}}";

/// A cluster of one name that DNS is asked for.
fn named(kind: &str, name: &str, port: u16, extra: &str) -> String {
    format!(
        "  - name: up\n    type: {kind}\n    dns_lookup_family: V4_ONLY\n{extra}\n    load_assignment: {{cluster_name: up, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {name}, port_value: {port}}}}}}}}}]}}]}}\n"
    )
}

#[tokio::test]
async fn limits_hold_for_all_workers_together() {
    let backend = Backend::start("a").await;
    let three = "    circuit_breakers: {thresholds: [{max_requests: 3}]}";
    let text = bootstrap(TO_UP, "", &cluster("up", &[backend.address], three));
    let proxy = Running::start_with(&text, 4).await;
    let mut open = Vec::new();
    let mut refused = 0;
    for _ in 0..20 {
        let before = backend.hits();
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: h\r\nx-want-silence: 1\r\n\r\n").await.unwrap();
        let mut head = [0; 12];
        tokio::select! {
            read = client.read_exact(&mut head) => {
                read.unwrap();
                assert_eq!(&head, b"HTTP/1.1 503");
                refused += 1;
            }
            () = async { while backend.hits() == before { tokio::task::yield_now().await } } => open.push(client),
        }
    }
    assert_eq!((open.len(), refused), (3, 17));
    let refused = raw(proxy.address(), "GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await;
    assert!(
        refused.contains("x-envoy-overloaded: true") && refused.ends_with("reset reason: overflow"),
        "{refused}"
    );
    drop(open);
    eventually(&proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 0").await;
    assert_eq!(get(proxy.address(), "/", &[]).await.status, 200);
    proxy.end().await;
}

#[tokio::test]
async fn what_one_worker_ejects_no_other_tries() {
    let good = Backend::start("good").await;
    let (listener, bad) = listen().await;
    drop(listener);
    let outlier = "    lb_policy: ROUND_ROBIN\n    outlier_detection: {consecutive_5xx: 4, max_ejection_percent: 100, base_ejection_time: 300s}\n    common_lb_config: {healthy_panic_threshold: {value: 0}}";
    let text = bootstrap(TO_UP, "", &cluster("up", &[good.address, bad], outlier));
    let proxy = Running::start_with(&text, 4).await;
    let mut failed = 0;
    for _ in 0..60 {
        failed += usize::from(get(proxy.address(), "/", &[]).await.status == 503);
    }
    assert_eq!(failed, 4);
    let line = "envoy_cluster_outlier_detection_ejections_total{cluster_name=\"up\"} 1";
    eventually(&proxy, line).await;
    proxy.end().await;
}

#[tokio::test]
async fn the_first_request_waits_for_dns() {
    let backend = Backend::start("a").await;
    for kind in ["STRICT_DNS", "LOGICAL_DNS"] {
        let text = bootstrap(TO_UP, "", &named(kind, "localhost", backend.address.port(), ""));
        let proxy = Running::start_with(&text, 2).await;
        for _ in 0..4 {
            assert_eq!(get(proxy.address(), "/", &[]).await.text(), "hello from a", "{kind}");
        }
        proxy.end().await;
    }
}

#[tokio::test]
async fn a_name_that_does_not_exist_leads_nowhere() {
    let text = bootstrap(TO_UP, "", &named("STRICT_DNS", "nothing.invalid", 80, ""));
    let proxy = Running::start_with(&text, 2).await;
    let got = get(proxy.address(), "/", &[]).await;
    assert_eq!((got.status, got.text().as_str()), (503, "no healthy upstream"));
    proxy.end().await;
}

#[tokio::test]
async fn a_retry_never_goes_to_the_dead_one_of_two() {
    let good = Backend::start("good").await;
    let (listener, bad) = listen().await;
    drop(listener);
    let route = "              - {match: {prefix: \"/\"}, route: {cluster: up, retry_policy: {retry_on: connect-failure, num_retries: 1, retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}]}}}";
    for policy in ["RANDOM", "LEAST_REQUEST", "ROUND_ROBIN"] {
        let text =
            bootstrap(route, "", &cluster("up", &[bad, good.address], &format!("    lb_policy: {policy}")));
        let proxy = Running::start(&text).await;
        for n in 0..40 {
            assert_eq!(get(proxy.address(), "/", &[]).await.status, 200, "{policy} {n}");
        }
        proxy.end().await;
    }
}
