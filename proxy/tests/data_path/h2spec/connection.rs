//! Connections as a whole: prefaces, frames, settings, pings, ends (RFC 9113, sections 3.4, 4, 5.4, 5.5, 6.5, 6.7, 6.8).

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

fn setting(id: u16, value: u32) -> Vec<u8> {
    let bytes = [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    frame(SETTINGS, 0, 0, &bytes)
}

/// A frame whose length is told apart from its payload.
fn lying(length: u32, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = length.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

#[tokio::test]
async fn frames_are_what_the_rfc_lets_them_be() {
    use Outcome::{Alive, Answer, Connection};
    let request = || frame(HEADERS, WHOLE, 1, &get());
    let long = vec![b'x'; 16_384];
    let rows = [
        ("4.1 a frame of an unknown kind", frame(0x16, 0, 0, b"????"), Alive),
        (
            "4.1 a frame of an unknown kind on a stream",
            all(&[frame(0x16, 0, 1, b"????"), request()]),
            Answer(1, 200),
        ),
        ("4.1 flags that mean nothing", frame(PING, 0xfe, 0, b"12345678"), Alive),
        ("4.1 the reserved bit of a stream", frame(PING, 0, 1 << 31, b"12345678"), Alive),
        (
            "4.2 the longest frame",
            all(&[frame(HEADERS, END_HEADERS, 1, &post()), frame(DATA, END_STREAM, 1, &long)]),
            Answer(1, 200),
        ),
        (
            "4.2 a longer frame of data",
            all(&[frame(HEADERS, END_HEADERS, 1, &post()), frame(DATA, END_STREAM, 1, &[b'x'; 16_385])]),
            Connection(FRAME_SIZE_ERROR),
        ),
        (
            "4.2 a longer frame of headers",
            lying(16_385, HEADERS, WHOLE, 1, &[0; 16_385]),
            Connection(FRAME_SIZE_ERROR),
        ),
        ("4.2 the longest length there is", lying(0xff_ffff, DATA, 0, 1, b"x"), Connection(FRAME_SIZE_ERROR)),
        (
            "5.5 an extension in the middle of a head",
            all(&[frame(HEADERS, END_STREAM, 1, &get()), frame(0x16, 0, 0, b"????")]),
            Connection(PROTOCOL_ERROR),
        ),
        ("5.5 a setting of an extension", setting(0xff, 1), Alive),
        ("6.5 an acknowledgement with content", frame(SETTINGS, ACK, 0, &[0]), Connection(COARSE)),
        ("6.5 settings of a stream", frame(SETTINGS, 0, 1, &[0, 3, 0, 0, 0, 10]), Connection(PROTOCOL_ERROR)),
        ("6.5 half a setting", frame(SETTINGS, 0, 0, &[0, 3, 0]), Connection(COARSE)),
        ("6.5.2 push is neither on nor off", setting(2, 2), Connection(PROTOCOL_ERROR)),
        ("6.5.2 a window beyond 31 bits", setting(4, 1 << 31), Connection(COARSE)),
        ("6.5.2 frames shorter than any", setting(5, 16_383), Connection(PROTOCOL_ERROR)),
        ("6.5.2 frames longer than any", setting(5, 1 << 24), Connection(PROTOCOL_ERROR)),
        ("6.5.2 a setting that nobody knows", setting(0x7777, 7), Alive),
        ("6.5.2 the largest window", setting(4, (1 << 31) - 1), Alive),
        (
            "6.5.3 the same setting twice",
            all(&[setting(4, 100), setting(4, 1), setting(4, 65_535), request()]),
            Answer(1, 200),
        ),
        ("6.5.2 no table for heads", all(&[setting(1, 0), request()]), Answer(1, 200)),
        ("6.7 a ping on a stream", frame(PING, 0, 1, &[0; 8]), Connection(PROTOCOL_ERROR)),
        ("6.7 a short ping", frame(PING, 0, 0, &[0; 6]), Connection(COARSE)),
        ("6.7 a long ping", frame(PING, 0, 0, &[0; 9]), Connection(COARSE)),
        ("6.7 an answer to no ping", frame(PING, ACK, 0, &[7; 8]), Alive),
        ("6.8 an end of a stream's", frame(GOAWAY, 0, 1, &[0; 8]), Connection(PROTOCOL_ERROR)),
        ("6.8 a short end", frame(GOAWAY, 0, 0, &[0; 4]), Connection(COARSE)),
        (
            "8.4 a push from a client",
            frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2], &*get()].concat()),
            Connection(PROTOCOL_ERROR),
        ),
    ];
    check(&rows, None).await;
}

#[tokio::test]
async fn a_connection_begins_with_the_preface() {
    let (proxy, backend) = start("          codec_type: HTTP2").await;
    for start in [&b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r"] {
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        stream.write_all(start).await.unwrap();
        let mut said = Vec::new();
        let reading = stream.read_to_end(&mut said);
        // a reset is an end, too
        let _read = tokio::time::timeout(LONG, reading).await.expect("the connection ends");
        assert!(!said.windows(5).any(|w| w == b"hello"), "{start:?}");
    }
    assert_eq!(backend.hits(), 0);
    proxy.end().await;
}

#[tokio::test]
async fn settings_and_pings_are_acknowledged_with_what_they_held() {
    let (proxy, _backend) = start("").await;
    let mut client = Client::open(proxy.address(), &[]).await;
    client.send(&frame(PING, 0, 0, b"abcdefgh")).await;
    let mut said = Vec::new();
    while !(said.contains(&Said::SettingsAck) && said.contains(&Said::PingAck(b"abcdefgh".to_vec()))) {
        said.push(client.said().await);
        assert_ne!(said.last(), Some(&Said::Closed));
    }
    assert_eq!(said[0], Said::Settings, "the server's preface comes first");
    proxy.end().await;
}

#[tokio::test]
async fn a_client_that_says_it_ends_gets_what_it_asked_for() {
    // 6.8, and 7: error codes that nobody knows mean nothing special
    for code in [0, 0xff] {
        let (proxy, _backend) = start("").await;
        let mut client = Client::open(proxy.address(), &[]).await;
        let end = [0, 0, 0, 0, 0, 0, 0, code];
        client.send(&all(&[frame(HEADERS, WHOLE, 1, &get()), frame(GOAWAY, 0, 0, &end)])).await;
        let said = client.until(Outcome::Closed).await;
        assert!(said.contains(&Said::Head(1, 200)), "{code}: {said:?}");
        proxy.end().await;
    }
}
