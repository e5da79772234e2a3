//! Bytes that are no call end their connection and nothing else.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::member::{ADMIN, Member, PATIENCE};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Sends bytes and reads until the end.
async fn send(member: &Member, bytes: &[u8]) -> Vec<u8> {
    let exchange = async {
        let mut stream = TcpStream::connect(member.address).await.unwrap();
        let mut answer = Vec::new();
        // A server that has seen enough may have closed before all is sent: that is an end too.
        let sent = stream.write_all(bytes).await;
        if sent.is_ok() && stream.shutdown().await.is_ok() {
            stream.read_to_end(&mut answer).await.unwrap_or_default();
        }
        answer
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_ends_its_own_connection_only() {
    let member = Member::start().await;
    let mut random = fastrand::Rng::with_seed(7);
    let mut texts: Vec<Vec<u8>> = vec![
        Vec::new(),
        b"\n".to_vec(),
        b"GET".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"GET /api/v1/version HTTP/1.1\r\nhost: a\r\nhost: b\r\ncontent-length: x\r\n\r\n".to_vec(),
        b"POST /api/v1/apply HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        b"POST /api/v1/apply HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            .to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        [&b"GET /"[..], &[b'a'; 1 << 20], &b" HTTP/1.1\r\n\r\n"[..]].concat(),
        [&b"GET / HTTP/1.1\r\n"[..], &b"x: y\r\n".repeat(10_000), &b"\r\n"[..]].concat(),
        [PREFACE, &[0xff; 64]].concat(),
        [PREFACE, b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00"].concat(),
        [PREFACE, b"\x00\x00\x00\x04\x01\x00\x00\x00\x00"].concat(),
        PREFACE[..10].to_vec(),
    ];
    for _ in 0..200 {
        let junk: Vec<u8> = (0..random.usize(1..2000)).map(|_| random.u8(..)).collect();
        texts.push(if random.bool() { [PREFACE, &junk].concat() } else { junk });
    }
    let mut open = TcpStream::connect(member.address).await.unwrap();
    open.write_all(b"GET /ready HT").await.unwrap();
    for text in &texts {
        let answer = send(&member, text).await;
        assert!(
            !answer.starts_with(b"HTTP/1.1 2") && !answer.starts_with(b"HTTP/1.1 5"),
            "{text:?}: {answer:?}"
        );
    }
    // Who was in the middle of a call goes on, and so does everybody else.
    open.write_all(b"TP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, open.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(member.call(http::Method::GET, "/api/v1/version", Some(ADMIN), "").await.status, 200);
    member.stop().await;
}
