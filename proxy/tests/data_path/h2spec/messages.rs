//! Requests (RFC 9113, section 8): those that are none, of which the server behind sees nothing, and those that are.

use super::*;

fn pseudo(fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, WHOLE, 1, &with(Vec::new(), fields))
}

fn request(fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, WHOLE, 1, &with(get(), fields))
}

fn body(fields: &[(&str, &str)], pieces: &[&[u8]]) -> Vec<u8> {
    let mut bytes = frame(HEADERS, END_HEADERS, 1, &with(post(), fields));
    for (at, piece) in pieces.iter().enumerate() {
        let last = if at + 1 == pieces.len() { END_STREAM } else { 0 };
        bytes.extend(frame(DATA, last, 1, piece));
    }
    bytes
}

#[tokio::test]
async fn malformed_requests_end_their_stream_and_reach_no_server() {
    let refused = Outcome::Stream(1, PROTOCOL_ERROR);
    let bad = Outcome::Answer(1, 400);
    // the library takes what no field can hold for a head that cannot be decompressed
    let cut = Outcome::Connection(PROTOCOL_ERROR);
    let value = |value: &[u8]| frame(HEADERS, WHOLE, 1, &[get(), raw_field(b"x-a", value)].concat());
    let name = |name: &[u8]| frame(HEADERS, WHOLE, 1, &[get(), raw_field(name, b"1")].concat());
    let (method, scheme, path) = ((":method", "GET"), (":scheme", "http"), (":path", "/"));
    let host = (":authority", "a");
    let rows = [
        ("8.2 a name in capitals", name(b"X-A"), cut),
        ("8.2.1 an empty name", name(b""), cut),
        ("8.2.1 a space in a name", name(b"x a"), cut),
        ("8.2.1 a colon in a name", name(b"x:a"), cut),
        ("8.2.1 a line feed in a name", name(b"x\na: b"), cut),
        ("8.2.1 a quotation mark in a name", name(b"x\""), bad),
        ("8.2.1 a null in a name", name(b"x\0"), cut),
        ("8.2.1 a byte above 127 in a name", name(b"x\xff"), cut),
        ("8.2.1 a line feed in a value", value(b"1\nx-b: 2"), cut),
        ("8.2.1 a carriage return in a value", value(b"1\rx-b: 2"), cut),
        ("8.2.1 a whole line in a value", value(b"1\r\ncontent-length: 3"), cut),
        ("8.2.1 a null in a value", value(b"1\x002"), cut),
        ("8.2.2 connection", request(&[("connection", "keep-alive")]), refused),
        ("8.2.2 keep-alive", request(&[("keep-alive", "5")]), refused),
        ("8.2.2 proxy-connection", request(&[("proxy-connection", "close")]), refused),
        ("8.2.2 transfer-encoding", request(&[("transfer-encoding", "chunked")]), refused),
        ("8.2.2 upgrade", request(&[("upgrade", "websocket")]), refused),
        ("8.2.2 te other than trailers", request(&[("te", "gzip")]), refused),
        ("8.3 a field that nobody knows", request(&[(":unknown", "1")]), cut),
        ("8.3 a field of responses", request(&[(":status", "200")]), refused),
        (
            "8.3 behind the others",
            frame(HEADERS, WHOLE, 1, &with([&[0x82, 0x86], &*field("x-a", "1"), &[0x84]].concat(), &[host])),
            refused,
        ),
        ("8.3.1 no method", pseudo(&[scheme, path, host]), refused),
        ("8.3.1 no scheme", pseudo(&[method, path, host]), refused),
        ("8.3.1 no path", pseudo(&[method, scheme, host]), refused),
        ("8.3.1 an empty path", pseudo(&[method, scheme, (":path", ""), host]), refused),
        ("8.3.1 two methods", pseudo(&[method, method, scheme, path, host]), refused),
        ("8.3.1 two schemes", pseudo(&[method, scheme, scheme, path, host]), refused),
        ("8.3.1 two paths", pseudo(&[method, scheme, path, path, host]), refused),
        ("8.3.1 two authorities", pseudo(&[method, scheme, path, host, host]), refused),
        ("8.3.1 no authority and no host", pseudo(&[method, scheme, path]), bad),
        ("8.3.1 a path without a slash", pseudo(&[method, scheme, (":path", "x"), host]), refused),
        ("8.3.1 a path that is a URI", pseudo(&[method, scheme, (":path", "http://b/"), host]), refused),
        ("8.3.1 a line feed in the path", pseudo(&[method, scheme, (":path", "/\nx"), host]), refused),
        ("8.3.1 a space in the path", pseudo(&[method, scheme, (":path", "/ HTTP/1.1"), host]), refused),
        (
            "8.3.1 a line in the path",
            pseudo(&[method, scheme, (":path", "/ HTTP/1.1\r\nx: y"), host]),
            refused,
        ),
        ("8.3.1 a space in the method", pseudo(&[(":method", "GET /x HTTP/1.1"), scheme, path, host]), cut),
        (
            "8.3.1 a line in the authority",
            pseudo(&[method, scheme, path, (":authority", "a\r\nx: y")]),
            refused,
        ),
        ("8.3.1 an empty authority", pseudo(&[method, scheme, path, (":authority", "")]), refused),
        ("8.5 CONNECT with a path", pseudo(&[(":method", "CONNECT"), scheme, path, host]), refused),
        ("8.5 CONNECT without an authority", pseudo(&[(":method", "CONNECT")]), bad),
        ("8.1.1 a length that is no number", body(&[("content-length", "three")], &[b"abc"]), refused),
        ("8.1.1 an empty length", body(&[("content-length", "")], &[b"abc"]), refused),
        ("8.1.1 an empty length of nothing", body(&[("content-length", "")], &[b""]), bad),
        ("8.1.1 two lengths", body(&[("content-length", "3"), ("content-length", "4")], &[b"abc"]), refused),
        ("8.1.1 a length with a plus", body(&[("content-length", "+3")], &[b"abc"]), refused),
        ("8.1.1 a list of lengths", body(&[("content-length", "3, 3")], &[b"abc"]), refused),
        ("8.1.1 a length without a body", request(&[("content-length", "3")]), refused),
    ];
    check(&rows, Some(0)).await;
}

/// What follows a head that was whole may be malformed only after the server was asked; it gets no second request of it.
#[tokio::test]
async fn bodies_that_are_not_as_long_as_they_say_end_their_stream() {
    let refused = Outcome::Stream(1, PROTOCOL_ERROR);
    let trailers = |flags, fields: &[(&str, &str)]| {
        let head = frame(HEADERS, END_HEADERS, 1, &post());
        all(&[head, frame(DATA, 0, 1, b"abc"), frame(HEADERS, flags, 1, &with(Vec::new(), fields))])
    };
    let rows = [
        ("8.1.1 shorter, in one piece", body(&[("content-length", "4")], &[b"abc"]), refused),
        ("8.1.1 longer, in one piece", body(&[("content-length", "1")], &[b"abc"]), refused),
        ("8.1.1 longer, in two pieces", body(&[("content-length", "4")], &[b"abc", b"abc"]), refused),
        ("8.1.1 shorter, in two pieces", body(&[("content-length", "9")], &[b"abc", b"abc"]), refused),
        ("8.1 a second head that ends nothing", trailers(END_HEADERS, &[("x-t", "1")]), refused),
        // the library leaves such a field out
        ("8.1 a method in the trailers", trailers(WHOLE, &[(":method", "GET")]), Outcome::Answer(1, 200)),
        (
            "8.1 a name in capitals in the trailers",
            trailers(WHOLE, &[("X-T", "1")]),
            Outcome::Connection(PROTOCOL_ERROR),
        ),
        (
            "8.1 a quotation mark in a name in the trailers",
            trailers(WHOLE, &[("x\"", "1")]),
            Outcome::Answer(1, 400),
        ),
        (
            "8.1 a line in the trailers",
            trailers(WHOLE, &[("x-t", "1\r\ny: 2")]),
            Outcome::Connection(PROTOCOL_ERROR),
        ),
    ];
    check(&rows, None).await;
}

#[tokio::test]
async fn requests_that_are_well_formed_are_answered() {
    let good = Outcome::Answer(1, 200);
    let trailers = all(&[
        frame(HEADERS, END_HEADERS, 1, &post()),
        frame(DATA, 0, 1, b"abc"),
        frame(HEADERS, WHOLE, 1, &field("x-t", "1")),
    ]);
    let rows = [
        ("8.1 GET", request(&[]), good),
        ("8.1 POST", body(&[], &[b"abc"]), good),
        ("8.1 POST without a body", frame(HEADERS, WHOLE, 1, &post()), good),
        ("8.1 trailers", trailers, good),
        ("8.1.1 the right length", body(&[("content-length", "6")], &[b"abc", b"abc"]), good),
        ("8.1.1 no length", body(&[("content-length", "0")], &[b""]), good),
        ("8.2.2 te of trailers", request(&[("te", "trailers")]), good),
        ("8.2.3 crumbs of a cookie", request(&[("cookie", "a=1"), ("cookie", "b=2")]), good),
        (
            "8.3.1 a host in place of an authority",
            pseudo(&[(":method", "GET"), (":scheme", "http"), (":path", "/"), ("host", "a")]),
            good,
        ),
        ("8.3.1 the same host", request(&[("host", "a")]), good),
        (
            "8.3.1 HEAD",
            pseudo(&[(":method", "HEAD"), (":scheme", "http"), (":path", "/"), (":authority", "a")]),
            good,
        ),
    ];
    check(&rows, Some(rows.len())).await;
}

#[tokio::test]
async fn the_server_is_told_one_host_and_that_is_the_authority() {
    let (proxy, backend) = start("").await;
    let asked = [crate::harness::request("http://a.local/", &[("host", "b.local")])];
    let got = crate::harness::send_h2(proxy.address(), asked.into()).await;
    let hosts: Vec<_> = got[0].headers.get_all("x-got-host").iter().collect();
    assert_eq!((got[0].status, &*hosts), (200, &[&"a.local".parse().unwrap()][..]));
    assert_eq!(backend.hits(), 1);
    proxy.end().await;
}
