//! Clients and servers that take their time.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::backend::{Backend, background, listen};
use crate::harness::{Running, bootstrap, cluster, eventually, get};

const LONG: Duration = Duration::from_secs(20);
/// A request whose body never comes whole.
const SLOW: &str = "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 10\r\n\r\nabc";

fn route(rest: &str) -> String {
    format!("              - {{match: {{prefix: \"/\"}}, route: {{cluster: up{rest}}}}}")
}

/// A connection on which these bytes were sent.
async fn sent(proxy: &Running, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    stream
}

/// All that comes until the proxy closes, which must not take long.
async fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    let reading = tokio::time::timeout(LONG, stream.read_to_end(&mut bytes));
    // a connection with unread bytes may be reset
    let _closed = reading.await.expect("an end");
    String::from_utf8_lossy(&bytes).into_owned()
}

#[track_caller]
fn check(answer: &str, status: &str, body: &str) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.ends_with(body), "{answer}");
}

#[tokio::test]
async fn a_body_that_stops_coming_ends_its_request() {
    let backend = Backend::start("a").await;
    let text = |route: &str, hcm: &str| bootstrap(route, hcm, &cluster("up", &[backend.address], ""));
    let idle = "          stream_idle_timeout: 0.2s";
    for (route, hcm, body) in [
        (route(""), idle, "stream timeout"),
        (route(", idle_timeout: 0.2s"), "", "stream timeout"),
        (
            route(", idle_timeout: 0s"),
            "          stream_idle_timeout: 0.1s\n          request_timeout: 0.3s",
            "request timeout",
        ),
        (route(""), "          request_timeout: 0.2s", "request timeout"),
    ] {
        let proxy = Running::start(&text(&route, hcm)).await;
        check(&rest(sent(&proxy, SLOW).await).await, "408", body);
        let counter = body.replace("stream timeout", "idle_timeout").replace("request timeout", "timeout");
        let line = format!("envoy_http_downstream_rq_{counter}{{envoy_http_conn_manager_prefix=\"in\"}} 1");
        eventually(&proxy, &line).await;
        eventually(&proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 0").await;
        proxy.end().await;
    }
}

#[tokio::test]
async fn a_server_that_is_silent_for_too_long_is_given_up() {
    let backend = Backend::start("a").await;
    let hcm = "          stream_idle_timeout: 0.2s";
    let text = bootstrap(&route(", timeout: 0s"), hcm, &cluster("up", &[backend.address], ""));
    let proxy = Running::start(&text).await;
    let got = get(proxy.address(), "/", &[("x-want-silence", "1")]).await;
    assert_eq!((got.status, got.text().as_str()), (504, "stream timeout"));
    proxy.end().await;
}

#[tokio::test]
async fn a_routes_timeout_begins_with_the_end_of_the_request() {
    let backend = Backend::start("a").await;
    let retry = ", timeout: 0.3s, retry_policy: {retry_on: 5xx, per_try_timeout: 0.2s}";
    for options in [", timeout: 0.2s", retry] {
        let text = bootstrap(&route(options), "", &cluster("up", &[backend.address], ""));
        let proxy = Running::start(&text).await;
        let mut client = sent(&proxy, &SLOW.replace("host: h", "host: h\r\nconnection: close")).await;
        let mut byte = [0];
        let early = tokio::time::timeout(Duration::from_millis(600), client.read(&mut byte)).await;
        assert!(early.is_err(), "answered before the request was whole: {options}");
        client.write_all(b"defghij").await.unwrap();
        check(&rest(client).await, "200", "abcdefghij");
        let got = get(proxy.address(), "/", &[("x-want-silence", "1")]).await;
        assert_eq!((got.status, got.text().as_str()), (504, "upstream request timeout"));
        proxy.end().await;
    }
}

#[tokio::test]
async fn an_injected_delay_is_no_part_of_a_routes_timeout() {
    let backend = Backend::start("a").await;
    let routes = r#"
              - match: {prefix: "/"}
                route: {cluster: up, timeout: 0.5s}
                typed_per_filter_config:
                  envoy.filters.http.fault:
                    "@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault
                    delay: {fixed_delay: 0.8s, percentage: {numerator: 100}}"#;
    let proxy = Running::start(&bootstrap(routes, "", &cluster("up", &[backend.address], ""))).await;
    assert_eq!(get(proxy.address(), "/", &[]).await.status, 200);
    proxy.end().await;
}

/// A server that begins an answer of this length and sends so many bytes of it.
async fn begins(length: usize, sends: usize) -> std::net::SocketAddr {
    let (listener, address) = listen().await;
    background(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            background(async move {
                let mut head = [0; 4096];
                let _head = stream.read(&mut head).await;
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
                let _sent = stream.write_all(answer.as_bytes()).await;
                let _sent = stream.write_all(&vec![b'x'; sends]).await;
                let _held = stream.read(&mut head).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn an_answer_that_stops_in_the_middle_ends_with_its_stream() {
    let address = begins(100, 10).await;
    for (options, hcm) in [(", timeout: 0.2s", ""), (", timeout: 0s", "          stream_idle_timeout: 0.2s")]
    {
        let proxy = Running::start(&bootstrap(&route(options), hcm, &cluster("up", &[address], ""))).await;
        let answer = rest(sent(&proxy, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await).await;
        check(&answer, "200", "\r\n\r\nxxxxxxxxxx");
        eventually(&proxy, "envoy_cluster_upstream_cx_active{cluster_name=\"up\"} 0").await;
        proxy.end().await;
    }
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_off() {
    let length = 64 << 20; // more than all buffers on the way
    let address = begins(length, length).await;
    let hcm = "          stream_idle_timeout: 2s";
    let text = bootstrap(&route(", timeout: 0s"), hcm, &cluster("up", &[address], ""));
    let proxy = Running::start(&text).await;
    let client = sent(&proxy, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
    eventually(&proxy, "envoy_http_downstream_flush_timeout{envoy_http_conn_manager_prefix=\"in\"} 1").await;
    eventually(&proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 0").await;
    drop(client);
    proxy.end().await;
}

#[tokio::test]
async fn a_head_that_does_not_end_is_answered() {
    let backend = Backend::start("a").await;
    for (hcm, text) in [
        ("          request_headers_timeout: 0.2s", "request header timeout"),
        ("          request_timeout: 0.2s", "request timeout"),
        ("          stream_idle_timeout: 0.2s", "stream timeout"),
    ] {
        let proxy = Running::start(&bootstrap(&route(""), hcm, &cluster("up", &[backend.address], ""))).await;
        let answer = rest(sent(&proxy, "GET / HTTP/1.1\r\nhost: h\r\n").await).await;
        check(&answer, "408", text);
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        // nor does a connection without a request end
        let mut quiet = sent(&proxy, "").await;
        let mut byte = [0];
        assert!(tokio::time::timeout(Duration::from_millis(500), quiet.read(&mut byte)).await.is_err());
        assert_eq!(get(proxy.address(), "/", &[]).await.status, 200);
        proxy.end().await;
    }
}
