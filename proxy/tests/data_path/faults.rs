//! Upstreams that fail, faults that are injected, and what the client gets then.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;

use crate::backend::{Backend, background, listen};
use crate::harness::{Running, bootstrap, cluster, get, send};

fn route(rest: &str) -> String {
    format!("              - {{match: {{prefix: \"/\"}}, route: {{cluster: up{rest}}}}}")
}

#[tokio::test]
async fn a_refused_connection_is_told_in_envoys_words() {
    let (listener, address) = listen().await;
    drop(listener);
    let proxy = Running::start(&bootstrap(&route(""), "", &cluster("up", &[address], ""))).await;
    let got = get(proxy.address(), "/", &[]).await;
    assert_eq!(got.status, 503);
    assert_eq!(
        got.text(),
        "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure"
    );
    proxy.end().await;
}

#[tokio::test]
async fn nothing_healthy_is_told() {
    let proxy = Running::start(&bootstrap(&route(""), "", &cluster("up", &[], ""))).await;
    let got = get(proxy.address(), "/", &[]).await;
    assert_eq!((got.status, got.text().as_str()), (503, "no healthy upstream"));
    proxy.end().await;
}

#[tokio::test]
async fn a_retry_finds_another_endpoint() {
    let good = Backend::start("good").await;
    let (listener, bad) = listen().await;
    drop(listener);
    let retry = ", retry_policy: {retry_on: connect-failure, num_retries: 3, retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}], host_selection_retry_max_attempts: 5}";
    let text =
        bootstrap(&route(retry), "", &cluster("up", &[bad, good.address], "    lb_policy: ROUND_ROBIN"));
    let proxy = Running::start(&text).await;
    for n in 0..6 {
        let request = Request::post("/").header("host", "h").body(Full::new(Bytes::from("again"))).unwrap();
        let got = send(proxy.address(), request).await;
        assert_eq!((got.status, got.text().as_str()), (200, "again"), "request {n}");
    }
    proxy.end().await;
}

#[tokio::test]
async fn a_retriable_status_is_tried_again() {
    let backend = Backend::start("a").await;
    let retry = ", retry_policy: {retry_on: 5xx, num_retries: 2}";
    let proxy = Running::start(&bootstrap(&route(retry), "", &cluster("up", &[backend.address], ""))).await;
    let got = get(proxy.address(), "/", &[("x-fail-first", "1")]).await;
    assert_eq!((got.status, got.header("x-got-x-envoy-attempt-count")), (200, "2"));
    let got = get(proxy.address(), "/", &[("x-want-status", "503")]).await;
    assert_eq!((got.status, backend.hits()), (503, 2 + 3));
    proxy.end().await;
}

#[tokio::test]
async fn a_silent_upstream_times_out() {
    let backend = Backend::start("a").await;
    let text = bootstrap(&route(", timeout: 0.2s"), "", &cluster("up", &[backend.address], ""));
    let proxy = Running::start(&text).await;
    let got = get(proxy.address(), "/", &[("x-want-silence", "1")]).await;
    assert_eq!((got.status, got.text().as_str()), (504, "upstream request timeout"));
    proxy.end().await;
}

#[tokio::test]
async fn an_upstream_that_closes_without_an_answer_is_told() {
    let (listener, address) = listen().await;
    background(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.readable().await.unwrap();
            drop(stream);
        }
    });
    let proxy = Running::start(&bootstrap(&route(""), "", &cluster("up", &[address], ""))).await;
    let got = get(proxy.address(), "/", &[]).await;
    assert_eq!(got.status, 503);
    let text = got.text();
    assert!(text.ends_with("reset reason: connection termination"), "{text}");
    proxy.end().await;
}

#[tokio::test]
async fn faults_delay_and_abort() {
    let backend = Backend::start("a").await;
    let routes = r#"
              - match: {prefix: "/abort"}
                route: {cluster: up}
                typed_per_filter_config:
                  envoy.filters.http.fault:
                    "@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault
                    abort: {http_status: 555, percentage: {numerator: 100}}
              - match: {prefix: "/delay"}
                route: {cluster: up}
                typed_per_filter_config:
                  envoy.filters.http.fault:
                    "@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault
                    delay: {fixed_delay: 0.3s, percentage: {numerator: 100}}"#;
    let proxy = Running::start(&bootstrap(routes, "", &cluster("up", &[backend.address], ""))).await;
    let got = get(proxy.address(), "/abort", &[]).await;
    assert_eq!((got.status, got.text().as_str(), backend.hits()), (555, "fault filter abort", 0));
    let started = tokio::time::Instant::now();
    let got = get(proxy.address(), "/delay", &[]).await;
    assert_eq!(got.status, 200);
    assert!(started.elapsed() >= Duration::from_millis(300));
    proxy.end().await;
}

#[tokio::test]
async fn an_endpoint_that_fails_is_left_out() {
    let good = Backend::start("good").await;
    let (listener, bad) = listen().await;
    drop(listener);
    let outlier = "    lb_policy: ROUND_ROBIN\n    outlier_detection: {consecutive_5xx: 2, max_ejection_percent: 100, base_ejection_time: 300s}\n    common_lb_config: {healthy_panic_threshold: {value: 0}}";
    let text = bootstrap(&route(""), "", &cluster("up", &[good.address, bad], outlier));
    let proxy = Running::start(&text).await;
    let mut failed = 0;
    for _ in 0..20 {
        failed += usize::from(get(proxy.address(), "/", &[]).await.status == 503);
    }
    assert_eq!(failed, 2);
    proxy.end().await;
}
