//! HTTP/2 clients that make work for nothing, frame by frame.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::backend::{Backend, background};
use crate::harness::{Running, bootstrap, cluster, get};

const TO_UP: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 0s}}";
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const LONG: Duration = Duration::from_secs(20);

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// `GET / HTTP/2`, `:authority: a`, in indexed and literal fields (RFC 7541).
fn head() -> Vec<u8> {
    [&[0x82, 0x84, 0x86, 0x41, 1][..], b"a"].concat()
}

/// Whether the proxy closes a connection on which these frames come again and again.
async fn closes(proxy: &Running, first: &[u8], again: &[u8]) -> bool {
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    let start = [PREFACE, &frame(4, 0, 0, &[]), first].concat();
    client.write_all(&start).await.unwrap();
    let (mut read, mut write) = client.split();
    let flooding = async {
        let many = again.repeat(64);
        while write.write_all(&many).await.is_ok() {}
    };
    let reading = async {
        let mut piece = [0; 4096];
        while read.read(&mut piece).await.is_ok_and(|n| n > 0) {}
    };
    let over = async {
        tokio::select! {
            () = flooding => {}
            () = reading => {}
        }
    };
    tokio::time::timeout(LONG, over).await.is_ok()
}

#[tokio::test]
async fn each_kind_of_flood_closes_its_connection_and_no_other() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))).await;
    let open = frame(1, 4, 1, &head());
    for (name, first, again) in [
        ("ping", vec![], frame(6, 0, 0, &[0; 8])),
        ("settings", vec![], frame(4, 0, 0, &[])),
        ("priority", vec![], frame(2, 0, 1, &[0, 0, 0, 0, 16])),
        ("window update", open.clone(), frame(8, 0, 0, &[0, 0, 0, 1])),
        ("empty data", open.clone(), frame(0, 0, 1, &[])),
        ("continuation", frame(1, 0, 1, &head()), frame(9, 0, 1, &[0x40, 1, b'a', 1, b'b'])),
        ("empty continuation", frame(1, 0, 1, &head()), frame(9, 0, 1, &[])),
    ] {
        assert!(closes(&proxy, &first, &again).await, "{name}");
        assert_eq!(get(proxy.address(), "/", &[]).await.status, 200, "{name}");
    }
    proxy.end().await;
}

#[tokio::test]
async fn requests_that_are_given_up_at_once_close_the_connection() {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, "", &cluster("up", &[backend.address], ""))).await;
    let stream = TcpStream::connect(proxy.address()).await.unwrap();
    let (mut send, connection) = h2::client::handshake(stream).await.unwrap();
    background(async move {
        let _over = connection.await;
    });
    let mut sent = 0;
    while sent < 5000 {
        let Ok(mut ready) = send.ready().await else { break };
        let request = Request::get("http://h.local/").header("x-want-silence", "1").body(()).unwrap();
        let Ok((_response, mut body)) = ready.send_request(request, true) else { break };
        // the proxy has taken it when it has been sent on
        let before = backend.hits();
        let taken = async {
            while backend.hits() == before && ready.clone().ready().await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        let _taken = tokio::time::timeout(LONG, taken).await;
        body.send_reset(h2::Reason::CANCEL);
        send = ready;
        sent += 1;
    }
    assert!((240..600).contains(&sent), "closed after {sent}");
    let line = "envoy_http_downstream_rq_too_many_premature_resets{envoy_http_conn_manager_prefix=\"in\"} 1";
    crate::harness::eventually(&proxy, line).await;
    let answer =
        crate::harness::send_h2(proxy.address(), vec![crate::harness::request("http://h.local/", &[])]);
    assert_eq!(answer.await.remove(0).body, Bytes::from_static(b"hello from a"));
    proxy.end().await;
}
