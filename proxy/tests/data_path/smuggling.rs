//! Requests that two readers could read in two ways. Each has one answer here, and the server behind gets what was
//! answered for, or nothing. Where a stock Envoy answers otherwise the row says so.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::backend::Backend;
use crate::harness::{Running, bootstrap, cluster};

/// What is sent after a head that ends a request, where only one request should be seen.
const NEXT: &str = "GET /smuggled HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

/// Statuses of all answers, and whether the proxy then closed.
async fn statuses(to: std::net::SocketAddr, bytes: &[u8]) -> (Vec<String>, bool) {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let _sent = stream.write_all(bytes).await;
    let mut all = Vec::new();
    let reading = tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut all));
    let closed = reading.await.is_ok();
    let text = String::from_utf8_lossy(&all).into_owned();
    let found = text.match_indices("HTTP/1.1 ").map(|(at, _)| text[at + 9..at + 12].to_owned());
    (found.collect(), closed)
}

async fn check(rows: &[(&str, String, &[&str], usize)], hcm: &str) {
    let backend = Backend::start("a").await;
    let route = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 0s}}";
    let proxy = Running::start(&bootstrap(route, hcm, &cluster("up", &[backend.address], ""))).await;
    let to = proxy.address();
    let asked = rows.iter().map(|(_, bytes, ..)| statuses(to, bytes.as_bytes()));
    let answers = futures::future::join_all(asked).await;
    for ((name, bytes, expected, _), (got, closed)) in rows.iter().zip(answers) {
        assert!(got == *expected, "{name}: {bytes:?} was answered {got:?}, not {expected:?}");
        let refuses = expected.last().is_some_and(|s| s.starts_with('4') || s.starts_with('5'));
        assert!(!refuses || closed, "{name}: the connection stays open");
    }
    let expected: usize = rows.iter().map(|(.., hits)| hits).sum();
    assert_eq!(backend.hits(), expected, "requests that came through");
    proxy.end().await;
}

fn post(lines: &str, body: &str) -> String {
    format!("POST /x HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n{body}")
}

fn chunked(body: &str) -> String {
    post("transfer-encoding: chunked\r\nconnection: close", body)
}

#[tokio::test]
async fn lengths_that_contradict_each_other_are_refused() {
    let both = "0\r\n\r\n".to_owned() + NEXT;
    let rows = [
        ("length, chunks", post("content-length: 4\r\ntransfer-encoding: chunked", &both), &["400"][..], 0),
        ("chunks, length", post("transfer-encoding: chunked\r\ncontent-length: 99", &both), &["400"], 0),
        ("twice the same", post("content-length: 3\r\ncontent-length: 3", "abc"), &["400"], 0),
        ("two lengths", post("content-length: 3\r\ncontent-length: 4", "abcd"), &["400"], 0),
        ("a list", post("content-length: 3, 3", "abc"), &["400"], 0),
        ("plus", post("content-length: +3", "abc"), &["400"], 0),
        ("minus", post("content-length: -3", "abc"), &["400"], 0),
        ("hexadecimal", post("content-length: 0x3", "abc"), &["400"], 0),
        ("with a space", post("content-length: 1 0", "abc"), &["400"], 0),
        ("empty", post("content-length:", "abc"), &["400"], 0),
        ("beyond 64 bits", post("content-length: 99999999999999999999", "abc"), &["400"], 0),
        ("one", post("content-length: 3\r\nconnection: close", "abc"), &["200"], 1),
    ];
    check(&rows, "").await;
}

#[tokio::test]
async fn only_chunked_is_an_encoding() {
    let end = "0\r\n\r\n";
    let te = |value: &str| post(&format!("transfer-encoding:{value}\r\nconnection: close"), end);
    let rows = [
        ("unknown", te(" xchunked"), &["501"][..], 0),
        ("chunked is not last", te(" chunked, identity"), &["501"], 0),
        ("quoted", te(" \"chunked\""), &["501"], 0),
        ("identity after it", te(" chunked\r\ntransfer-encoding: identity"), &["501"], 0),
        ("identity before it", te(" identity, chunked"), &["501"], 0),
        ("another before it", te(" gzip, chunked"), &["501"], 0),
        ("twice", te(" chunked\r\ntransfer-encoding: chunked"), &["501"], 0),
        ("none", te(""), &["501"], 0),
        ("a vertical tab", te(" \x0bchunked"), &["400"], 0),
        // Envoy unfolds it
        ("folded", te("\r\n chunked"), &["400"], 0),
        ("a space before the colon", post("transfer-encoding : chunked", end), &["400"], 0),
        (
            "in HTTP/1.0",
            format!("POST /x HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{end}"),
            &["426"],
            0,
        ),
        ("in capitals", te(" CHUNKED"), &["200"], 1),
        ("after a tab", te("\tchunked"), &["200"], 1),
    ];
    check(&rows, "").await;
}

#[tokio::test]
async fn chunks_are_read_as_they_are_written() {
    let rows = [
        ("an extension", chunked("3;a=b\r\nabc\r\n0\r\n\r\n"), &["200"][..], 1),
        ("trailers", chunked("3\r\nabc\r\n0\r\nx-t: 1\r\n\r\n"), &["200"], 1),
        (
            "a length in the trailers",
            chunked("3\r\nabc\r\n0\r\ncontent-length: 5\r\nhost: b\r\n\r\n"),
            &["200"],
            1,
        ),
        ("a size in other digits", chunked("0x3\r\nabc\r\n0\r\n\r\n"), &["400"], 1),
        ("a negative size", chunked("-3\r\nabc\r\n0\r\n\r\n"), &["400"], 1),
        ("beyond 64 bits", chunked("fffffffffffffffff\r\nabc\r\n0\r\n\r\n"), &["400"], 1),
        // Envoy takes a line feed for the end of a trailer
        ("a line feed in the trailers", chunked("3\r\nabc\r\n0\r\nx-t: 1\n\r\n"), &["400"], 1),
        // Envoy takes it for the end of the body
        ("more than its size", chunked("3\r\nabcd\r\n0\r\n\r\n"), &["400"], 1),
    ];
    let backend = Backend::start("a").await;
    let route = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 0s}}";
    let proxy = Running::start(&bootstrap(route, "", &cluster("up", &[backend.address], ""))).await;
    for (name, bytes, expected, _) in rows {
        let (got, closed) = statuses(proxy.address(), bytes.as_bytes()).await;
        assert!(got == expected && closed, "{name}: {got:?}");
    }
    proxy.end().await;
}

#[tokio::test]
async fn heads_are_made_of_lines() {
    let get = |lines: &str| format!("GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{lines}\r\n\r\n");
    let rows = [
        // Envoy drops the carriage return
        ("a carriage return in a value", get("x-a: 1\r2"), &["400"][..], 0),
        ("a carriage return in place of a line", get("x-a: 1\rcontent-length: 3"), &["400"], 0),
        ("a null", get("x-a: 1\x002"), &["400"], 0),
        // Envoy takes a line feed for the end of a line
        ("a line feed after a value", get("x-a: 1\nx-b: 2"), &["400"], 0),
        ("a line feed before the last line", get("x-a: 1").replace("1\r\n", "1\n"), &["400"], 0),
        ("line feeds only", get("x-a: 1").replace('\r', ""), &["400"], 0),
        ("a line feed first", "\n".to_owned() + &get("x-a: 1"), &["400"], 0),
        ("a space in a name", get("x a: 1"), &["400"], 0),
        ("no name", get(": 1"), &["400"], 0),
        ("a folded line first", "GET /x HTTP/1.1\r\n host: a\r\n\r\n".to_owned(), &["400"], 0),
        ("no host", "GET /x HTTP/1.1\r\n\r\n".to_owned(), &["400"], 0),
        ("two hosts", get("host: b"), &["400"], 0),
        ("HTTP/2's preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned() + NEXT, &[], 0),
    ];
    let http1 = "          codec_type: HTTP1";
    let (last, rows) = rows.split_last().unwrap();
    check(rows, http1).await;
    let backend = Backend::start("a").await;
    let route = "              - {match: {prefix: \"/\"}, route: {cluster: up}}";
    let proxy = Running::start(&bootstrap(route, http1, &cluster("up", &[backend.address], ""))).await;
    let (got, closed) = statuses(proxy.address(), last.1.as_bytes()).await;
    assert!(closed && !got.iter().any(|s| s == "200") && backend.hits() == 0, "{got:?}");
    proxy.end().await;
}

#[tokio::test]
async fn white_space_around_a_value_is_no_part_of_it() {
    let backend = Backend::start("a").await;
    let route = "              - {match: {prefix: \"/\"}, route: {cluster: up}}";
    let proxy = Running::start(&bootstrap(route, "", &cluster("up", &[backend.address], ""))).await;
    for host in ["a", " a", "\ta", "a ", "a\t", " \t a \t "] {
        let request = format!("GET / HTTP/1.1\r\nhost:{host}\r\nx-a:{host}\r\nconnection: close\r\n\r\n");
        let answer = crate::harness::raw(proxy.address(), &request).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{host:?}: {answer}");
        assert!(
            answer.contains("x-got-host: a\r\n") && answer.contains("x-got-x-a: a\r\n"),
            "{host:?}: {answer}"
        );
    }
    // HTTP/2 has no white space there either (RFC 9113, section 8.2.1)
    let asked = [crate::harness::request("http://a.local/", &[("x-a", " \t a "), ("x-b", " ")])];
    let got = crate::harness::send_h2(proxy.address(), asked.into()).await;
    assert_eq!((got[0].header("x-got-x-a"), got[0].header("x-got-x-b")), ("a", ""), "{got:?}");
    proxy.end().await;
}

#[tokio::test]
async fn what_is_sent_ahead_of_another_protocol_is_no_request() {
    let ahead = |head: &str| format!("{head}\r\n\r\n{NEXT}");
    let rows = [
        (
            "an upgrade that is not allowed",
            ahead("GET /x HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: other"),
            &["403"][..],
            0,
        ),
        (
            "an upgrade that the server refuses",
            ahead(
                "GET /x HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\nx-want-status: 404",
            ),
            &["404"],
            1,
        ),
        ("a tunnel", ahead("CONNECT a:80 HTTP/1.1\r\nhost: a:80"), &["404"], 0),
    ];
    // this server refuses upgrades by its status alone
    let refusing = rows.map(|(name, bytes, statuses, hits)| {
        (name, bytes.replace("upgrade: websocket", "upgrade: websocket\r\nx-want-refusal: 1"), statuses, hits)
    });
    check(&refusing, "").await;
}

#[tokio::test]
async fn a_body_goes_through_whatever_the_method() {
    let backend = Backend::start("a").await;
    let route = "              - {match: {prefix: \"/\"}, route: {cluster: up}}";
    let proxy = Running::start(&bootstrap(route, "", &cluster("up", &[backend.address], ""))).await;
    for method in ["GET", "DELETE", "OPTIONS", "POST"] {
        let head = format!("{method} /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n");
        for rest in
            ["transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "content-length: 3\r\n\r\nabc"]
        {
            let answer = crate::harness::raw(proxy.address(), &(head.clone() + rest)).await;
            assert!(
                answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nabc"),
                "{method}: {answer}"
            );
        }
    }
    proxy.end().await;
}
