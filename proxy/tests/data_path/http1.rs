//! A client's HTTP/1 connection: requests ahead of their answers, bodies that nobody reads, the ends of either side.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::backend::{Backend, background, listen};
use crate::harness::{Running, bootstrap, cluster, eventually, raw};

const TO_UP: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 5s}}";
const DIRECT: &str =
    "              - {match: {prefix: \"/\"}, direct_response: {status: 200, body: {inline_string: hello}}}";
const LAST: &str = "GET /last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

const EJECTS: &str = "    outlier_detection: {consecutive_5xx: 1, consecutive_local_origin_failure: 1, \
    split_external_local_origin_errors: true, max_ejection_percent: 100}\n    common_lb_config: {healthy_panic_threshold: {value: 0}}";
const HTTP2: &str = "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
    \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
    explicit_http_config: {http2_protocol_options: {}}";

async fn to(backend: &Backend, routes: &str, hcm: &str) -> Running {
    Running::start(&bootstrap(routes, hcm, &cluster("up", &[backend.address], ""))).await
}

/// Reads until what came ends like this.
async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut came = Vec::new();
    let reading = async {
        while !came.ends_with(end.as_bytes()) {
            let byte = stream.read_u8().await.expect("more");
            came.push(byte);
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), reading).await.expect(end);
    String::from_utf8(came).unwrap()
}

/// A server that reads a head and then says these bytes, and closes.
async fn saying(answer: &'static str) -> SocketAddr {
    let (listener, address) = listen().await;
    background(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            background(async move {
                let mut head = [0; 4096];
                let _read = stream.read(&mut head).await;
                let _sent = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn requests_that_are_sent_ahead_are_answered_in_their_order() {
    let backend = Backend::start("a").await;
    let proxy = to(&backend, TO_UP, "").await;
    let mut ahead: String = (0..50).map(|n| format!("GET /{n} HTTP/1.1\r\nhost: a\r\n\r\n")).collect();
    ahead += "POST /50 HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc";
    ahead += "POST /51 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let answers = raw(proxy.address(), &(ahead + LAST)).await;
    let paths: Vec<&str> = answers.lines().filter_map(|l| l.strip_prefix("x-path: /")).collect();
    let expected: Vec<String> = (0..52).map(|n| n.to_string()).chain(["last".to_owned()]).collect();
    assert_eq!(paths, expected);
    assert_eq!(answers.matches("HTTP/1.1 200 OK\r\n").count(), 53, "{answers}");
    proxy.end().await;
}

#[tokio::test]
async fn a_head_may_come_byte_by_byte() {
    let backend = Backend::start("a").await;
    let proxy = to(&backend, TO_UP, "").await;
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    client.set_nodelay(true).unwrap();
    let request = "\r\nPOST /slow HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x\r\nc\r\n0\r\n\r\n";
    for byte in (request.to_owned() + LAST).bytes() {
        client.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut answers = String::new();
    client.read_to_string(&mut answers).await.unwrap();
    assert!(
        answers.contains("x-path: /slow\r\n") && answers.contains("\r\n\r\nabcHTTP/1.1 200 OK\r\n"),
        "{answers}"
    );
    proxy.end().await;
}

#[tokio::test]
async fn a_body_is_asked_for_when_it_is_wanted() {
    let backend = Backend::start("a").await;
    let asks = "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n";
    let proxy = to(&backend, TO_UP, "").await;
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    client.write_all(asks.as_bytes()).await.unwrap();
    assert_eq!(until(&mut client, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"abc").await.unwrap();
    let answer = until(&mut client, "abc").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && !answer.contains("x-got-expect"), "{answer}");
    // who does not wait is told nothing
    let answer = raw(proxy.address(), &(asks.to_owned() + "abc" + LAST)).await;
    assert!(!answer.contains("100 Continue") && answer.matches("200 OK").count() == 2, "{answer}");
    proxy.end().await;
    // nor who is answered without it, and what follows is not read as a request
    let proxy = to(&backend, DIRECT, "").await;
    let answer = raw(proxy.address(), &(asks.to_owned() + LAST)).await;
    assert!(answer.contains("connection: close\r\n") && answer.matches("HTTP/1.1 ").count() == 1, "{answer}");
    proxy.end().await;
}

#[tokio::test]
async fn a_body_that_nobody_wants_is_passed_over_or_ends_the_connection() {
    let backend = Backend::start("a").await;
    let proxy = to(&backend, DIRECT, "").await;
    let post = |framing: &str, body: &str| format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n{body}");
    for unwanted in [
        post("content-length: 40", &LAST.repeat(2)[..40]),
        post("content-length: 100000", &LAST.repeat(10_000)[..100_000]),
        post("transfer-encoding: chunked", "3\r\nabc\r\n0\r\nx: y\r\n\r\n"),
    ] {
        let answers = raw(proxy.address(), &(unwanted + LAST)).await;
        assert_eq!(answers.matches("HTTP/1.1 200 OK\r\n").count(), 2, "{answers}");
    }
    for cut in [post("content-length: 4000", "abc"), post("transfer-encoding: chunked", "3\r\nabcX")] {
        let answers = raw(proxy.address(), &(cut + LAST)).await;
        assert_eq!(answers.matches("HTTP/1.1 ").count(), 1, "{answers}");
    }
    proxy.end().await;
}

#[tokio::test]
async fn a_malformed_body_is_answered_for_and_is_not_the_servers_fault() {
    let backend = Backend::start("a").await;
    for rest in [EJECTS.to_owned(), format!("{EJECTS}\n{HTTP2}")] {
        let up = cluster("up", &[backend.address], &rest);
        let proxy = Running::start(&bootstrap(TO_UP, "", &up)).await;
        malformed(&proxy).await;
        let got = raw(proxy.address(), LAST).await;
        assert!(got.starts_with("HTTP/1.1 200 OK\r\n"), "{got}");
        proxy.end().await;
    }
}

async fn malformed(proxy: &Running) {
    for body in ["\r\n\r\n", "x\r\nabc\r\n", "3\r\nabcd\r\n", "3;a\nb\r\nabc\r\n", "0\r\na b: c\r\n\r\n"] {
        let post = format!("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{body}");
        let answer = raw(proxy.address(), &(post + LAST)).await;
        assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{body:?}: {answer}");
        assert!(
            answer.contains("connection: close\r\n") && answer.ends_with("\r\n\r\nBad Request"),
            "{body:?}: {answer}"
        );
    }
}

#[tokio::test]
async fn http_1_0_is_answered_in_its_own_version() {
    let backend = Backend::start("a").await;
    let old = "          http_protocol_options: {accept_http_10: true}";
    let proxy = to(&backend, TO_UP, old).await;
    let get = |lines: &str| format!("GET / HTTP/1.0\r\nhost: a\r\n{lines}\r\n");
    let once = raw(proxy.address(), &get("")).await;
    assert!(once.starts_with("HTTP/1.0 200 OK\r\n") && once.contains("connection: close\r\n"), "{once}");
    let twice = raw(proxy.address(), &(get("connection: keep-alive\r\n") + &get(""))).await;
    assert!(twice.contains("connection: keep-alive\r\n") && twice.matches("200 OK").count() == 2, "{twice}");
    proxy.end().await;
    // without chunks the end of the connection is that of the body
    let chunks = saying("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n").await;
    let proxy = Running::start(&bootstrap(TO_UP, old, &cluster("up", &[chunks], ""))).await;
    let answer = raw(proxy.address(), &get("connection: keep-alive\r\n")).await;
    assert!(answer.contains("connection: close\r\n") && answer.ends_with("\r\n\r\nabc"), "{answer}");
    proxy.end().await;
}

#[tokio::test]
async fn a_response_that_is_cut_does_not_look_whole() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ] {
        let cut = saying(answer).await;
        let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[cut], ""))).await;
        let got = raw(proxy.address(), "GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert!(got.starts_with("HTTP/1.1 200 OK\r\n") && got.contains("abc"), "{got}");
        assert!(!got.ends_with("0\r\n\r\n"), "{got}");
        proxy.end().await;
    }
}

#[tokio::test]
async fn what_is_malformed_is_counted_and_a_cut_request_is_no_request() {
    let backend = Backend::start("a").await;
    let proxy = to(&backend, TO_UP, "").await;
    let got = raw(proxy.address(), "GET / HTTP/1.1\r\nno colon\r\n\r\n").await;
    assert!(got.starts_with("HTTP/1.1 400 Bad Request\r\n") && got.contains("server: envoy\r\n"), "{got}");
    eventually(&proxy, "envoy_http_downstream_rq_xx{envoy_http_conn_manager_prefix=\"in\",envoy_response_code_class=\"4\"} 1").await;
    for piece in ["", "GET / HT", "GET / HTTP/1.1\r\nhost: a\r\n"] {
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        client.write_all(piece.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).await.unwrap();
        assert!(said.is_empty(), "{piece:?}");
    }
    assert_eq!(backend.hits(), 0);
    proxy.end().await;
}
