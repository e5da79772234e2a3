//! Requests and bytes without TLS.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::backend::{Backend, shouting};
use crate::harness::{Running, bootstrap, cluster, get, raw, request, send, send_h2};

const TO_UP: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up}}";
const H2: &str = "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        explicit_http_config: {http2_protocol_options: {}}";

#[tokio::test]
async fn a_request_goes_through_with_its_headers_put_right() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))).await;
    let headers =
        [("x-mine", "1"), ("connection", "x-hop, keep-alive"), ("x-hop", "1"), ("x-envoy-retry-on", "5xx")];
    let got = get(proxy.address(), "/a/b?c=d", &headers).await;
    assert_eq!((got.status, got.text().as_str()), (200, "hello from a"));
    assert_eq!(got.header("x-path"), "/a/b?c=d");
    assert_eq!(got.header("x-got-x-mine"), "1");
    assert_eq!(got.header("x-got-host"), "test.local");
    assert_eq!(got.header("x-got-x-forwarded-proto"), "http");
    assert_eq!(got.header("x-got-x-envoy-attempt-count"), "1");
    assert_eq!(got.header("x-got-x-envoy-expected-rq-timeout-ms"), "15000");
    assert_eq!(got.header("x-got-x-request-id").len(), 36);
    assert_eq!(got.header("server"), "envoy");
    assert!(!got.header("x-envoy-upstream-service-time").is_empty());
    for gone in ["x-got-x-hop", "x-got-x-envoy-retry-on", "x-got-connection"] {
        assert_eq!(got.header(gone), "", "{gone}");
    }
    let metrics = proxy.metrics().await;
    assert!(metrics.contains("envoy_cluster_upstream_rq_total{cluster_name=\"up\"} 1"), "{metrics}");
    proxy.end().await;
}

#[tokio::test]
async fn all_versions_meet_all_versions() {
    let backend = Backend::start("a").await;
    for extra in ["", H2] {
        let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], extra))).await;
        let post = |uri: &str| {
            Request::post(uri)
                .header("host", "h.local")
                .body(Full::new(Bytes::from(vec![7; 300_000])))
                .unwrap()
        };
        let got = send(proxy.address(), post("/x")).await;
        assert_eq!((got.status, got.body.len()), (200, 300_000));
        let mut requests = vec![request("http://h2.local/y", &[])];
        requests
            .push(Request::post("http://h2.local/z").body(Full::new(Bytes::from(vec![7; 300_000]))).unwrap());
        let got = send_h2(proxy.address(), requests).await;
        assert_eq!(got[0].text(), "hello from a");
        let seen = [got[0].header("x-authority"), got[0].header("x-got-host")].concat();
        assert_eq!(seen, "h2.local");
        assert_eq!(got[1].body.len(), 300_000);
        proxy.end().await;
    }
}

#[tokio::test]
async fn grpc_trailers_come_through() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], H2))).await;
    let call = Request::post("http://g.local/s/m")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from_static(b"\0\0\0\0\x02hi")))
        .unwrap();
    let got = send_h2(proxy.address(), vec![call]).await.remove(0);
    assert_eq!(got.body, "\0\0\0\0\x02hi");
    assert_eq!(got.trailers.unwrap()["grpc-status"], "0");
    assert_eq!(got.headers["x-got-te"], "trailers");
    proxy.end().await;
}

#[tokio::test]
async fn connections_are_kept_on_both_sides() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    for _ in 0..5 {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: k\r\n\r\n").await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"hello from a") {
            assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
        }
    }
    let metrics = proxy.metrics().await;
    assert!(metrics.contains("envoy_cluster_upstream_cx_total{cluster_name=\"up\"} 1\n"), "{metrics}");
    assert!(metrics.contains("envoy_cluster_upstream_rq_total{cluster_name=\"up\"} 5\n"), "{metrics}");
    proxy.end().await;
}

#[tokio::test]
async fn a_websocket_carries_bytes_both_ways() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    let ask = b"GET /ws HTTP/1.1\r\nhost: w\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(ask).await.unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"ready") {
        assert!(stream.read_buf(&mut seen).await.unwrap() > 0, "{}", String::from_utf8_lossy(&seen));
    }
    assert!(seen.starts_with(b"HTTP/1.1 101"));
    stream.write_all(b"ping").await.unwrap();
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"ping");
    drop(stream);
    let refused = raw(
        proxy.address(),
        "GET / HTTP/1.1\r\nhost: w\r\nconnection: upgrade, close\r\nupgrade: other\r\n\r\n",
    )
    .await;
    assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
    proxy.end().await;
}

#[tokio::test]
async fn malformed_requests_are_refused() {
    let backend = Backend::start("a").await;
    let hcm = "          normalize_path: true\n          merge_slashes: true";
    let proxy = Running::start(&bootstrap(TO_UP, hcm, &cluster("up", &[backend.address], ""))).await;
    for (bytes, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", "400"),
        ("GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("GET / HTTP/1.0\r\nhost: a\r\n\r\n", "426"),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc", "400"),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\nabc", "501"),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost : a\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\n folded: 1\r\n\r\n", "400"),
    ] {
        let answer = raw(proxy.address(), bytes).await;
        assert_eq!(answer.get(9..12), Some(status), "{bytes:?}: {answer}");
    }
    assert_eq!(backend.hits(), 0);
    let got = get(proxy.address(), "//a/./b/../%61dmin?x=//", &[]).await;
    assert_eq!(got.header("x-path"), "/a/admin?x=//");
    proxy.end().await;
}

#[tokio::test]
async fn routes_split_rewrite_redirect_and_answer() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let routes = r#"
              - match: {prefix: "/split"}
                route: {weighted_clusters: {clusters: [{name: a, weight: 80}, {name: b, weight: 20}]}}
              - match: {prefix: "/old"}
                route: {cluster: a, prefix_rewrite: "/new", host_rewrite_literal: other.local}
                request_headers_to_add: [{header: {key: x-from, value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}}]
                request_headers_to_remove: [x-secret]
                response_headers_to_add: [{header: {key: x-added, value: "yes"}}]
              - {match: {path: "/away"}, redirect: {host_redirect: new.local, https_redirect: true, response_code: FOUND}}
              - {match: {path: "/direct"}, direct_response: {status: 418, body: {inline_string: "short and stout"}}}
              - {match: {path: "/lost"}, route: {cluster: nowhere}}"#;
    let clusters = cluster("a", &[a.address], "") + &cluster("b", &[b.address], "");
    let proxy = Running::start(&bootstrap(routes, "", &clusters)).await;
    let to = proxy.address();
    let split: Vec<_> = (0..400).map(|_| request("http://s.local/split", &[])).collect();
    let answers = send_h2(to, split).await;
    let on_b = answers.iter().filter(|g| g.header("x-backend") == "b").count();
    assert!((50..=110).contains(&on_b), "about 80 of 400, got {on_b}");
    let got = get(to, "/old/x?y", &[("x-secret", "s")]).await;
    assert_eq!((got.header("x-path"), got.header("x-got-host")), ("/new/x?y", "other.local"));
    assert_eq!(got.header("x-got-x-envoy-original-path"), "/old/x?y");
    assert_eq!((got.header("x-got-x-from"), got.header("x-got-x-secret")), ("127.0.0.1", ""));
    assert_eq!(got.header("x-added"), "yes");
    let got = get(to, "/away", &[]).await;
    assert_eq!((got.status, got.header("location")), (302, "https://new.local/away"));
    let got = get(to, "/direct", &[]).await;
    assert_eq!((got.status, got.text().as_str()), (418, "short and stout"));
    assert_eq!((get(to, "/lost", &[]).await.status, get(to, "/none", &[]).await.status), (503, 404));
    proxy.end().await;
}

#[tokio::test]
async fn tcp_carries_bytes_and_half_closes() {
    let server = shouting().await;
    let text = format!(
        r#"
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: t
          cluster: up
  clusters:
{}"#,
        cluster("up", &[server], "")
    );
    let proxy = Running::start(&text).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    stream.write_all(b"some words").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "SOME WORDS");
    proxy.end().await;
}

#[tokio::test]
async fn a_connection_that_rules_turn_away_is_counted_and_logged() {
    let server = shouting().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let text = format!(
        r#"
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.rbac
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC
          stat_prefix: t
          rules: {{action: DENY, policies: {{all: {{permissions: [{{any: true}}], principals: [{{any: true}}]}}}}}}
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: t
          cluster: up
          access_log: [{{name: f, typed_config: {{"@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: {{text_format_source: {{inline_string: "%CONNECTION_TERMINATION_DETAILS% %UPSTREAM_HOST%\n"}}}}}}}}]
  clusters:
{}"#,
        path.display(),
        cluster("up", &[server], "")
    );
    let proxy = Running::start(&text).await;
    assert_eq!(raw(proxy.address(), "").await, "");
    assert!(proxy.metrics().await.contains("envoy_tcp_rbac_denied 1\n"));
    proxy.end().await;
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    let mut line = String::new();
    while line.is_empty() && tokio::time::Instant::now() < deadline {
        tokio::task::yield_now().await;
        line = std::fs::read_to_string(&path).unwrap_or_default();
    }
    assert_eq!(line, "rbac_access_denied_matched_policy[all] -\n");
}

#[tokio::test]
async fn a_request_under_way_ends_before_the_proxy_does() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nhost: k\r\ncontent-length: 4\r\n\r\nab").await.unwrap();
    while backend.hits() == 0 {
        tokio::task::yield_now().await;
    }
    let ending = proxy.end();
    let finishing = async {
        stream.write_all(b"cd").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let ((), answer) = tokio::join!(ending, finishing);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("abcd"), "{answer}");
}

#[tokio::test]
async fn a_coding_that_is_not_understood_is_refused() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))).await;
    for codings in
        ["Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"]
    {
        let request = format!("POST / HTTP/1.1\r\nhost: a\r\n{codings}\r\n\r\n0\r\n\r\n");
        let answer = raw(proxy.address(), &request).await;
        assert!(answer.starts_with("HTTP/1.1 501"), "{answer}");
    }
    assert_eq!(backend.hits(), 0);
    proxy.end().await;
}

#[tokio::test]
async fn every_spelling_of_a_host_finds_its_route_and_is_sent_on_in_one_form() {
    let backend = Backend::start("a").await;
    let text = bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))
        .replace("domains: [\"*\"]", "domains: [\"a.local\"]");
    let proxy = Running::start(&text).await;
    for host in ["a.local", "a.local.", "a.local..", "a.local:", "a.local.:"] {
        let got = get(proxy.address(), "/", &[("host", host)]).await;
        assert_eq!((got.status, got.header("x-got-host")), (200, "a.local"), "{host}");
    }
    assert_eq!(get(proxy.address(), "/", &[("host", "A.Local")]).await.status, 200);
    assert_eq!(get(proxy.address(), "/", &[("host", "b.local")]).await.status, 404);
    proxy.end().await;
}

#[tokio::test]
async fn each_request_leaves_one_line_in_the_access_log() {
    let backend = Backend::start("a").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let format = "[%START_TIME%] \\\"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\\\" %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %BYTES_RECEIVED% %BYTES_SENT% \\\"%REQ(:AUTHORITY)%\\\" \\\"%UPSTREAM_HOST%\\\" %UPSTREAM_CLUSTER_RAW% %ROUTE_NAME% %UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%\\n";
    let hcm = format!(
        "          access_log: [{{name: f, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: {{text_format_source: {{inline_string: \"{format}\"}}}}}}}}]",
        path.display()
    );
    let routes = "              - {name: known, match: {prefix: \"/yes\"}, route: {cluster: up}}";
    let proxy = Running::start(&bootstrap(routes, &hcm, &cluster("up", &[backend.address], ""))).await;
    let post =
        Request::post("/yes?x").header("host", "log.local").body(Full::new(Bytes::from("four"))).unwrap();
    assert_eq!(send(proxy.address(), post).await.status, 200);
    assert_eq!(get(proxy.address(), "/no", &[]).await.status, 404);
    proxy.end().await;
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    let lines = loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.lines().count() == 2 || tokio::time::Instant::now() > deadline {
            break text;
        }
        tokio::task::yield_now().await;
    };
    let lines: Vec<&str> = lines.lines().map(|l| l.split_once("] ").unwrap().1).collect();
    let host = backend.address;
    assert_eq!(
        lines,
        [
            format!(
                "\"POST /yes?x HTTP/1.1\" 200 - via_upstream 4 4 \"log.local\" \"{host}\" up known 127.0.0.1"
            ),
            "\"GET /no HTTP/1.1\" 404 NR route_not_found 0 0 \"test.local\" \"-\" - - -".to_owned(),
        ]
    );
}

#[tokio::test]
async fn headers_of_a_response_can_be_made_from_its_request() {
    let backend = Backend::start("a").await;
    let routes = r#"
              - match: {prefix: "/"}
                route: {cluster: up}
                response_headers_to_add: [{header: {key: x-was, value: "%REQ(x-mine)% %REQ(:path)% %REQ(:authority)%"}}]"#;
    let proxy = Running::start(&bootstrap(routes, "", &cluster("up", &[backend.address], ""))).await;
    let got = get(proxy.address(), "/p", &[("x-mine", "1")]).await;
    assert_eq!((got.header("x-was"), got.header("x-got-x-mine")), ("1 /p test.local", "1"));
    proxy.end().await;
}
