//! WebSockets over either version of HTTP on either side of the proxy (RFC 8441).

use std::net::SocketAddr;

use ::h2::client::SendRequest;
use ::h2::ext::Protocol;
use ::h2::{RecvStream, SendStream};
use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::backend::{Backend, background, listen};
use crate::harness::{Running, bootstrap, cluster, eventually};

const TO_UP: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 2s}}";
const H2: &str = "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        explicit_http_config: {http2_protocol_options: {allow_connect: true}}";
const ALLOW: &str = "          http2_protocol_options: {allow_connect: true}";

/// A piece of what is much.
static PIECE: [u8; 16_384] = [b'x'; 16_384];

/// A proxy in front of `to`, that speaks HTTP/2 to it or HTTP/1.
async fn proxy(to: SocketAddr, h2: bool, hcm: &str) -> Running {
    Running::start(&bootstrap(TO_UP, hcm, &cluster("up", &[to], if h2 { H2 } else { "" }))).await
}

/// A client's WebSocket.
enum Socket {
    H1(TcpStream),
    H2(SendStream<Bytes>, RecvStream),
}

/// Status and headers of the answer, and the bytes if it leads to any.
struct Opened {
    status: u16,
    headers: HeaderMap,
    socket: Socket,
}

async fn h2(to: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(to).await.unwrap();
    let (send, mut connection) = ::h2::client::handshake(stream).await.unwrap();
    let mut ping = connection.ping_pong().unwrap();
    background(async move {
        let _over = connection.await;
    });
    // the settings of the server come before the answer
    ping.ping(::h2::Ping::opaque()).await.unwrap();
    send
}

async fn open(to: SocketAddr, over_h2: bool, protocol: &'static str, more: &[(&str, &str)]) -> Opened {
    if over_h2 { open_h2(to, protocol, more).await } else { open_h1(to, protocol, more).await }
}

async fn open_h2(to: SocketAddr, protocol: &'static str, more: &[(&str, &str)]) -> Opened {
    let mut client = h2(to).await;
    assert!(client.is_extended_connect_protocol_enabled());
    let mut request = Request::builder().method(Method::CONNECT).uri("http://w/ws?a=b");
    for (name, value) in more {
        request = request.header(*name, *value);
    }
    let request = request.extension(Protocol::from_static(protocol)).body(()).unwrap();
    let (response, send) = client.send_request(request, false).unwrap();
    let (parts, receive) = response.await.unwrap().into_parts();
    let socket = Socket::H2(send, receive);
    Opened { status: parts.status.as_u16(), headers: parts.headers, socket }
}

async fn open_h1(to: SocketAddr, protocol: &'static str, more: &[(&str, &str)]) -> Opened {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let mut ask =
        format!("GET /ws?a=b HTTP/1.1\r\nhost: w\r\nconnection: Upgrade\r\nupgrade: {protocol}\r\n");
    for (name, value) in more {
        ask.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all((ask + "\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let mut headers = HeaderMap::new();
    for line in head.lines().skip(1).filter(|l| !l.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        headers.append(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
    }
    let status = head[9..12].parse().unwrap();
    Opened { status, headers, socket: Socket::H1(stream) }
}

impl Socket {
    async fn write(&mut self, bytes: &'static [u8]) {
        match self {
            Self::H1(stream) => stream.write_all(bytes).await.unwrap(),
            Self::H2(send, _) => send.send_data(Bytes::from_static(bytes), false).unwrap(),
        }
    }

    async fn end(&mut self) {
        match self {
            Self::H1(stream) => stream.shutdown().await.unwrap(),
            Self::H2(send, _) => send.send_data(Bytes::new(), true).unwrap(),
        }
    }

    /// The next bytes, so many.
    async fn read(&mut self, n: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < n {
            let piece = self.piece().await;
            assert!(!piece.is_empty(), "ended after {all:?}");
            all.extend_from_slice(&piece);
        }
        all
    }

    /// All bytes until the server's end.
    async fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let piece = self.piece().await;
            if piece.is_empty() {
                return all;
            }
            all.extend_from_slice(&piece);
        }
    }

    /// The next piece; empty at the end, however it ends.
    async fn piece(&mut self) -> Bytes {
        match self {
            Self::H1(stream) => {
                let mut piece = vec![0; 1000];
                let n = stream.read(&mut piece).await.unwrap_or_default();
                piece.truncate(n);
                piece.into()
            }
            Self::H2(_, receive) => match receive.data().await {
                Some(Ok(data)) => {
                    receive.flow_control().release_capacity(data.len()).unwrap();
                    data
                }
                Some(Err(_)) | None => Bytes::new(),
            },
        }
    }
}

/// Both versions towards the proxy, and both behind it.
const PAIRS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

/// Two proxies behind each other, with either version between them.
async fn chain(app: SocketAddr, between_h2: bool, hcm: &str) -> (Running, Running) {
    let inner = proxy(app, false, ALLOW).await;
    let outer = proxy(inner.address(), between_h2, &format!("{ALLOW}\n{hcm}")).await;
    (outer, inner)
}

#[tokio::test]
async fn a_websocket_crosses_every_pair_of_versions() {
    let backend = Backend::start("a").await;
    for (before, between) in PAIRS {
        let (outer, inner) = chain(backend.address, between, "").await;
        let mut opened = open(outer.address(), before, "websocket", &[("sec-websocket-key", "abc")]).await;
        assert_eq!(opened.status, if before { 200 } else { 101 }, "{before} {between}");
        let upgrade = opened.headers.get("upgrade").map(|v| v.to_str().unwrap());
        assert_eq!(upgrade, (!before).then_some("websocket"));
        assert_eq!(opened.headers.contains_key("connection"), !before);
        assert_eq!(opened.socket.read(5).await, b"ready");
        opened.socket.write(b"ping").await;
        assert_eq!(opened.socket.read(4).await, b"ping");
        for proxy in [&outer, &inner] {
            eventually(proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 1").await;
        }
        opened.socket.end().await;
        assert_eq!(opened.socket.rest().await, b"");
        for proxy in [&outer, &inner] {
            eventually(proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 0").await;
            eventually(proxy, "envoy_http_downstream_rq_active{envoy_http_conn_manager_prefix=\"in\"} 0")
                .await;
            let ones = "envoy_http_downstream_rq_xx{envoy_http_conn_manager_prefix=\"in\",envoy_response_code_class=\"1\"} 1";
            eventually(proxy, ones).await;
        }
        outer.end().await;
        inner.end().await;
    }
}

#[tokio::test]
async fn a_mirror_is_sent_what_the_server_is_sent() {
    const MIRRORED: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 2s, request_mirror_policies: [{cluster: copy}]}}";
    let backend = Backend::start("a").await;
    let (mut heard, mirror) = listening().await;
    let clusters = cluster("up", &[backend.address], "") + "\n" + &cluster("copy", &[mirror], "");
    let proxy = Running::start(&bootstrap(MIRRORED, ALLOW, &clusters)).await;
    for over_h2 in [false, true] {
        let mut opened = open(proxy.address(), over_h2, "websocket", &[]).await;
        assert_eq!(opened.socket.read(5).await, b"ready");
        let head = heard.recv().await.unwrap();
        assert!(head.starts_with("GET /ws?a=b HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("-shadow\r\n") && head.contains("upgrade: websocket\r\n"), "{head}");
        opened.socket.write(b"ping").await;
        assert_eq!(opened.socket.read(4).await, b"ping");
        opened.socket.write(b"pong").await;
        opened.socket.end().await;
        assert_eq!(opened.socket.rest().await, b"pong");
        assert_eq!(heard.recv().await.unwrap(), "pingpong");
    }
    // a server that is not asked to leave HTTP any more has no copy either
    let refused = [("x-want-refusal", "1"), ("x-want-status", "404")];
    assert_eq!(open(proxy.address(), false, "websocket", &refused).await.status, 404);
    assert!(heard.recv().await.unwrap().starts_with("GET /ws?a=b"));
    assert_eq!(heard.recv().await.unwrap(), "");
    eventually(&proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"copy\"} 0").await;
    proxy.end().await;
}

/// A server that agrees to every upgrade, and tells the head of each request and all that comes after it.
async fn listening() -> (tokio::sync::mpsc::Receiver<String>, SocketAddr) {
    let (listener, address) = listen().await;
    let (tell, told) = tokio::sync::mpsc::channel(10);
    background(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let head = agree(&mut stream).await;
            tell.send(String::from_utf8(head).unwrap()).await.unwrap();
            let mut rest = String::new();
            let _over = stream.read_to_string(&mut rest).await;
            tell.send(rest).await.unwrap();
        }
    });
    (told, address)
}

#[tokio::test]
async fn much_goes_both_ways_at_once() {
    let backend = Backend::start("a").await;
    for (before, between) in PAIRS {
        let (outer, inner) = chain(backend.address, between, "").await;
        let mut opened = open(outer.address(), before, "websocket", &[]).await;
        assert_eq!(opened.socket.read(5).await, b"ready");
        // more than any window on the way
        for _ in 0..200 {
            opened.socket.write(&PIECE).await;
            assert_eq!(opened.socket.read(PIECE.len()).await.len(), PIECE.len());
        }
        drop(opened);
        outer.end().await;
        inner.end().await;
    }
}

#[tokio::test]
async fn extended_connect_is_offered_only_where_it_is_allowed() {
    let backend = Backend::start("a").await;
    let (with, without) =
        (proxy(backend.address, false, ALLOW).await, proxy(backend.address, false, "").await);
    assert!(h2(with.address()).await.is_extended_connect_protocol_enabled());
    assert!(!h2(without.address()).await.is_extended_connect_protocol_enabled());
    // whoever asks all the same is refused by the codec, and the connection goes on
    let mut client = h2(without.address()).await;
    let ask = Request::builder().method(Method::CONNECT).uri("http://w/");
    let ask = ask.extension(Protocol::from_static("websocket")).body(()).unwrap();
    let error = client.send_request(ask, true).unwrap().0.await.unwrap_err();
    assert_eq!(error.reason(), Some(::h2::Reason::PROTOCOL_ERROR));
    let get = Request::get("http://w/").body(()).unwrap();
    assert_eq!(client.send_request(get, true).unwrap().0.await.unwrap().status(), 200);
    with.end().await;
    without.end().await;
}

#[tokio::test]
async fn a_server_that_takes_no_extended_connect_is_sent_none() {
    let backend = Backend::start("a").await;
    let proxy = proxy(backend.address, true, ALLOW).await;
    for over_h2 in [false, true] {
        let opened = open(proxy.address(), over_h2, "websocket", &[]).await;
        assert_eq!(opened.status, 502);
    }
    assert_eq!(backend.hits(), 0);
    proxy.end().await;
}

#[tokio::test]
async fn refusals_come_through_and_what_is_not_allowed_is_refused_here() {
    let backend = Backend::start("a").await;
    for (before, between) in PAIRS {
        let (outer, inner) = chain(backend.address, between, "").await;
        let refused = [("x-want-refusal", "1"), ("x-want-status", "404")];
        let mut opened = open(outer.address(), before, "websocket", &refused).await;
        assert_eq!(opened.status, 404, "{before} {between}");
        assert_eq!(opened.headers["x-method"], "GET");
        assert_eq!(opened.headers["x-got-upgrade"], "websocket");
        assert_eq!(opened.headers["x-path"], "/ws?a=b");
        assert_eq!(opened.socket.read(12).await, b"hello from a");
        let hits = backend.hits();
        assert_eq!(open(outer.address(), before, "other", &[]).await.status, 403);
        assert_eq!(backend.hits(), hits);
        // over HTTP/2 the 200 of a server that stays with HTTP would say the contrary
        let stays = open(outer.address(), before, "websocket", &[("x-want-refusal", "1")]).await;
        assert_eq!(stays.status, if before || between { 502 } else { 200 }, "{before} {between}");
        outer.end().await;
        inner.end().await;
    }
}

/// A server that agrees to every upgrade, says what comes until the client's end, then `and more` and ends.
async fn patient() -> SocketAddr {
    let (listener, address) = listen().await;
    background(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            background(async move {
                agree(&mut stream).await;
                let mut said = Vec::new();
                let _n = stream.read_to_end(&mut said).await;
                said.extend_from_slice(b" and more");
                let _sent = stream.write_all(&said).await;
            });
        }
    });
    address
}

/// Answers a request for an upgrade, and tells its head.
async fn agree(stream: &mut TcpStream) -> Vec<u8> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(answer).await.unwrap();
    head
}

#[tokio::test]
async fn one_side_may_end_before_the_other() {
    let app = patient().await;
    for (before, between) in PAIRS {
        let (outer, inner) = chain(app, between, "").await;
        let mut opened = open(outer.address(), before, "websocket", &[]).await;
        opened.socket.write(b"this").await;
        opened.socket.end().await;
        assert_eq!(opened.socket.rest().await, b"this and more", "{before} {between}");
        outer.end().await;
        inner.end().await;
    }
}

/// A server that agrees to an upgrade and then neither speaks nor ends, until it is told to break off.
async fn silent(break_off: CancellationToken) -> SocketAddr {
    let (listener, address) = listen().await;
    background(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            let break_off = break_off.clone();
            background(async move {
                agree(&mut stream).await;
                break_off.cancelled().await;
                stream.set_zero_linger().unwrap();
            });
        }
    });
    address
}

#[tokio::test]
async fn a_client_that_breaks_off_ends_the_whole_way_to_a_silent_server() {
    let app = silent(CancellationToken::new()).await;
    for (before, between) in PAIRS {
        let (outer, inner) = chain(app, between, "").await;
        let mut opened = open(outer.address(), before, "websocket", &[]).await;
        match &mut opened.socket {
            Socket::H1(stream) => stream.set_zero_linger().unwrap(),
            Socket::H2(send, _) => send.send_reset(::h2::Reason::CANCEL),
        }
        drop(opened);
        for proxy in [&outer, &inner] {
            eventually(proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 0").await;
        }
        eventually(&inner, "envoy_cluster_upstream_cx_active{cluster_name=\"up\"} 0").await;
        outer.end().await;
        inner.end().await;
    }
}

#[tokio::test]
async fn a_server_that_breaks_off_ends_the_whole_way_to_a_silent_client() {
    for (before, between) in PAIRS {
        let break_off = CancellationToken::new();
        let app = silent(break_off.clone()).await;
        let (outer, inner) = chain(app, between, "").await;
        let mut opened = open(outer.address(), before, "websocket", &[]).await;
        break_off.cancel();
        assert_eq!(opened.socket.rest().await, b"");
        drop(opened);
        for proxy in [&outer, &inner] {
            eventually(proxy, "envoy_cluster_upstream_rq_active{cluster_name=\"up\"} 0").await;
        }
        outer.end().await;
        inner.end().await;
    }
}

#[tokio::test]
async fn a_websocket_on_which_nothing_moves_ends() {
    let app = silent(CancellationToken::new()).await;
    for (before, between) in PAIRS {
        let (outer, inner) = chain(app, between, "          stream_idle_timeout: 0.2s").await;
        let mut opened = open(outer.address(), before, "websocket", &[]).await;
        assert_eq!(opened.socket.rest().await, b"");
        eventually(&outer, "envoy_http_downstream_rq_idle_timeout{envoy_http_conn_manager_prefix=\"in\"} 1")
            .await;
        eventually(&inner, "envoy_cluster_upstream_cx_active{cluster_name=\"up\"} 0").await;
        outer.end().await;
        inner.end().await;
    }
}
