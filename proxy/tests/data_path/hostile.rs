//! Servers that say what none should: no client gets another's answer, and the proxy lives on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::backend::{background, listen};
use crate::h2spec::{ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, SETTINGS, field, frame};
use crate::harness::{Running, bootstrap, cluster, get, raw, request, send_h2};

const HTTP2: &str = "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
                     \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
                     explicit_http_config: {http2_protocol_options: {}}";
const TO_UP: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 5s}}";

/// A server that answers whatever comes with these bytes, and how many connections it got.
async fn server(answer: &'static [u8]) -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let (listener, address) = listen().await;
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    background(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            counted.fetch_add(1, Ordering::SeqCst);
            background(async move {
                let mut piece = [0; 4096];
                while stream.read(&mut piece).await.is_ok_and(|n| n > 0) {
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, connections)
}

#[tokio::test]
async fn an_answer_with_two_meanings_is_no_answer() {
    for answer in [
        &b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcde"[..],
        b"HTTP/1.1 200 OK\r\ncontent-length: -4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\ncontent-length: 4, 5\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\nx-a: 1\x002\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx a: 1\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nabcd",
        b"HTTP/9.9 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"200 OK\r\n\r\n",
        b"\0\0\0\0",
    ] {
        let (address, _) = server(answer).await;
        let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[address], ""))).await;
        let got = raw(proxy.address(), "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        let told = answer.escape_ascii();
        assert!(got.starts_with("HTTP/1.1 50") && got.matches("HTTP/1.1 ").count() == 1, "{told}: {got}");
        proxy.end().await;
    }
}

#[tokio::test]
async fn what_a_server_sends_ahead_is_no_answer_to_the_next_request() {
    let answer =
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
    let (address, connections) = server(answer).await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[address], ""))).await;
    for _ in 0..20 {
        let got = get(proxy.address(), "/", &[]).await;
        assert!(got.status != 200 || got.text() == "ok", "{got:?}");
    }
    assert!(connections.load(Ordering::SeqCst) > 1, "such a connection is used no more");
    proxy.end().await;
}

/// A server of HTTP/2 that answers the first request of each connection with these frames.
async fn http2_server(answer: Vec<u8>) -> std::net::SocketAddr {
    let (listener, address) = listen().await;
    background(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            let answer = answer.clone();
            background(async move {
                let mut head = [0; 9];
                let _preface = stream.read_exact(&mut [0; 24]).await;
                let _sent = stream.write_all(&frame(SETTINGS, 0, 0, &[])).await;
                while stream.read_exact(&mut head).await.is_ok() {
                    let [a, b, c, kind, ..] = head;
                    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
                    let _read = stream.read_exact(&mut payload).await;
                    if kind == HEADERS {
                        let _sent = stream.write_all(&answer).await;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_server_of_http2_cannot_say_what_http1_has_no_words_for() {
    let ok = || vec![0x88];
    let head = frame(HEADERS, END_HEADERS | END_STREAM, 1, &[ok(), field("x\"", "1")].concat());
    let trailers = [
        frame(HEADERS, END_HEADERS, 1, &ok()),
        frame(DATA, 0, 1, b"told"),
        frame(HEADERS, END_HEADERS | END_STREAM, 1, &field("x\"", "1")),
    ];
    let length = frame(HEADERS, END_HEADERS | END_STREAM, 1, &[ok(), field("content-length", "")].concat());
    for (answer, expected) in
        [(head, "HTTP/1.1 502"), (length, "HTTP/1.1 502"), (trailers.concat(), "HTTP/1.1 200")]
    {
        let address = http2_server(answer).await;
        let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[address], HTTP2))).await;
        let got = raw(proxy.address(), "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(got.starts_with(expected) && !got.contains('"') && !got.ends_with("0\r\n\r\n"), "{got}");
        proxy.end().await;
    }
}

#[tokio::test]
async fn a_server_that_takes_no_stream_and_goes_away_is_told_as_unavailable() {
    let none = frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 0]);
    let end = frame(GOAWAY, 0, 0, &[0; 8]);
    let ack = frame(SETTINGS, ACK, 0, &[]);
    for start in [
        [none.clone(), end.clone()].concat(),
        [end.clone(), none.clone()].concat(),
        [none.clone(), ack.clone(), end.clone(), end.clone(), none].concat(),
        [frame(SETTINGS, 0, 0, &[]), ack, end.repeat(3)].concat(),
        frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 0]),
        frame(SETTINGS, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff]),
        frame(5, 4, 1, &[0, 0, 0, 2, 0x82, 0x84, 0x86]),
        vec![0xff; 100],
    ] {
        let (listener, address) = listen().await;
        let told = format!("{start:?}");
        background(async move {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { return };
                let start = start.clone();
                background(async move {
                    let mut piece = [0; 4096];
                    let _sent = stream.write_all(&start).await;
                    while stream.read(&mut piece).await.is_ok_and(|n| n > 0) {}
                });
            }
        });
        let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[address], HTTP2))).await;
        for _ in 0..3 {
            let got = get(proxy.address(), "/", &[]).await;
            assert!((500..=504).contains(&got.status), "{told}: {got:?}");
        }
        let got = send_h2(proxy.address(), vec![request("http://h.local/", &[])]).await;
        assert!((500..=504).contains(&got[0].status), "{told}: {got:?}");
        proxy.end().await;
    }
}
