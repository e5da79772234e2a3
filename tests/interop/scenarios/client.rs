//! The client: asks as a scenario says, and tells in lines what came back.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tests::{PATIENCE, eventually};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::scenario::Ask;
use super::server::http2::{download, map, send};
use super::wire::{Body, Fields, Wire, field};

/// An answer comes within this time, or there is none.
const QUIET: Duration = Duration::from_secs(10);
/// What is sent when HTTP has been left.
const MESSAGE: &[u8] = b"there and back";
/// The host of requests that name none.
const HOST: &str = "s.example";

/// What came of an [`Ask`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    pub(crate) lines: Vec<String>,
    /// How many answers came from which server, where they are counted.
    pub(crate) spread: BTreeMap<String, usize>,
    /// Under which its lines in the access log are, if not under its name.
    pub(crate) port: Option<u16>,
}

/// Asks, and tells what came back.
pub(crate) async fn ask(ask: &Ask, address: SocketAddr, case: &str) -> Told {
    if let Some(wanted) = &ask.until {
        let shown = eventually(PATIENCE, "the answer changes", || async {
            let lines = once(ask, address, case).await.lines;
            anyhow::ensure!(lines.join("\n").contains(wanted), "{lines:?}");
            Ok(())
        });
        let line = if shown.await.is_ok() { format!("at last: {wanted}") } else { "never".to_owned() };
        return Told { lines: vec![line], ..Told::default() };
    }
    if let Some(times) = ask.times {
        let mut told = Told::default();
        for _ in 0..times {
            let lines = once(ask, address, case).await.lines;
            let server = lines.iter().find_map(|line| line.strip_prefix("body server "));
            *told.spread.entry(server.unwrap_or("none").to_owned()).or_default() += 1;
        }
        return told;
    }
    if let Some(count) = ask.at_once {
        let all = (0..count).map(|_| once(ask, address, case));
        let all = futures::future::join_all(all).await;
        let mut lines: Vec<String> = all.into_iter().map(|told| told.lines.join("; ")).collect();
        lines.sort();
        return Told { lines, ..Told::default() };
    }
    once(ask, address, case).await
}

async fn once(ask: &Ask, address: SocketAddr, case: &str) -> Told {
    let began = Instant::now();
    let told = tokio::time::timeout(QUIET, async {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                stream.set_nodelay(true).unwrap_or_default();
                if ask.tcp.is_some() || ask.hello.is_some() || !ask.hex.is_empty() {
                    tcp(ask, stream).await
                } else if ask.http2 {
                    let lines = match http2(ask, stream, case).await {
                        Ok(lines) => lines,
                        Err(error) => vec![format!("no answer: {}", reason(&error))],
                    };
                    Told { lines, ..Told::default() }
                } else {
                    Told { lines: http1(ask, stream, case).await, ..Told::default() }
                }
            }
            Err(error) => Told { lines: vec![format!("no connection: {error}")], ..Told::default() },
        }
    });
    let mut told =
        told.await.unwrap_or_else(|_| Told { lines: vec!["silence".to_owned()], ..Told::default() });
    if let Some(slow) = ask.slow {
        // Envoy's clock stands still while it works, so its timers pass a little early
        let took = began.elapsed().as_millis() * 5 / 4;
        told.lines.push(format!("it took {slow} ms or more: {}", took >= slow.into()));
    }
    told
}

fn reason(error: &h2::Error) -> String {
    let by = if error.is_remote() { "the proxy" } else { "the client" };
    error.reason().map_or_else(|| error.to_string(), |reason| format!("{reason:?} by {by}"))
}

/// The lines of headers, without what differs from one request to the next.
fn header_lines(kind: &str, fields: &Fields, lines: &mut Vec<String>) {
    let mut fields: Vec<_> = fields.iter().filter(|(name, _)| name != "date").collect();
    fields.sort();
    lines.extend(fields.into_iter().map(|(name, value)| match name.as_str() {
        "x-envoy-upstream-service-time" | "x-request-id" => format!("{kind} {name}"),
        "set-cookie" => format!("{kind} {name}: {}", without_made(value)),
        _ => format!("{kind} {name}: {value}"),
    }));
}

/// A cookie without the value that a proxy made.
fn without_made(cookie: &str) -> String {
    let parts: Vec<&str> = cookie.splitn(3, '"').collect();
    match parts.as_slice() {
        [name, value, rest] if value.len() == 16 => format!("{name}\"made\"{rest}"),
        _ => cookie.to_owned(),
    }
}

fn body_lines(body: &Body, lines: &mut Vec<String>) {
    if body.bytes.len() > 300 {
        lines.push(format!("body of {} bytes", body.bytes.len()));
    } else {
        lines.push(format!("body {}", body.bytes.escape_ascii()));
    }
    header_lines("trailer", &body.trailers, lines);
    if !body.whole {
        lines.push("the answer broke off".to_owned());
    }
}

async fn http1(ask: &Ask, stream: TcpStream, case: &str) -> Vec<String> {
    let mut wire = Wire::new(stream);
    let (method, head, body) = match &ask.raw {
        Some(raw) => {
            let method = raw.split(' ').next().unwrap_or_default().to_owned();
            (method, raw.replace("CASE", case).into_bytes(), Vec::new())
        }
        None => written(ask, case),
    };
    let mut lines = Vec::new();
    let expects = field(&ask.headers(case), "expect").is_some();
    let mut sent = if expects { head } else { [head, body.clone()].concat() };
    loop {
        // a proxy that answers early may have closed
        wire.write(&sent).await;
        sent.clear();
        let Some(status) = wire.line().await else {
            lines.push(if wire.broken { "broken off" } else { "closed" }.to_owned());
            return lines;
        };
        let (version, status) = status.split_once(' ').unwrap_or((&status, ""));
        let code: u16 = status.get(..3).and_then(|c| c.parse().ok()).unwrap_or_default();
        let Some(fields) = wire.fields().await else {
            lines.push("no head".to_owned());
            return lines;
        };
        if code < 200 && code != 101 {
            lines.push(format!("informational {code}"));
            header_lines("informational", &fields, &mut lines);
            if code == 100 {
                sent.clone_from(&body);
            }
            continue;
        }
        lines.push(format!("status {code} {version}"));
        header_lines("header", &fields, &mut lines);
        if code == 101 || (method == "CONNECT" && code == 200) {
            wire.write(MESSAGE).await;
            let back = wire.exact(MESSAGE.len()).await;
            lines.push(format!("came back: {}", back.escape_ascii()));
            return lines;
        }
        let framed = method != "HEAD" && !matches!(code, 204 | 304);
        let body = match framed {
            true => wire.body(&fields, true).await,
            false => Body { whole: true, ..Body::default() },
        };
        body_lines(&body, &mut lines);
        return lines;
    }
}

/// Method, head and body.
fn written(ask: &Ask, case: &str) -> (String, Vec<u8>, Vec<u8>) {
    let (method, path) = ask.target();
    let headers = ask.headers(case);
    let mut head = format!("{method} {path} HTTP/1.1\r\n");
    if field(&headers, "host").is_none() {
        head.push_str(&format!("host: {HOST}\r\n"));
    }
    for (name, value) in &headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let mut body = ask.content().unwrap_or_default();
    if !ask.trailers.is_empty() {
        head.push_str("transfer-encoding: chunked\r\n");
        let mut chunks = format!("{:x}\r\n", body.len()).into_bytes();
        chunks.append(&mut body);
        chunks.extend(b"\r\n0\r\n");
        for (name, value) in &ask.trailers {
            chunks.extend(format!("{name}: {value}\r\n").into_bytes());
        }
        chunks.extend(b"\r\n");
        body = chunks;
    } else if ask.content().is_some() {
        head.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    (method.to_owned(), head.into_bytes(), body)
}

async fn http2(ask: &Ask, stream: TcpStream, case: &str) -> Result<Vec<String>, h2::Error> {
    let (mut sender, mut connection) =
        h2::client::Builder::new().initial_window_size(1 << 20).handshake(stream).await?;
    // settings tell whether extended CONNECT is taken
    let settled = async {
        while ask.protocol.is_some() && !sender.is_extended_connect_protocol_enabled() {
            let look = std::future::poll_fn(|cx| {
                let ended = Pin::new(&mut connection).poll(cx).is_ready();
                Poll::Ready(ended)
            });
            if look.await {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), settled).await.unwrap_or_default();
    tests::http::driven(connection, Box::pin(exchange(ask, &mut sender, case))).await
}

async fn exchange(
    ask: &Ask,
    sender: &mut h2::client::SendRequest<Bytes>,
    case: &str,
) -> Result<Vec<String>, h2::Error> {
    let (method, path) = ask.target();
    let headers = ask.headers(case);
    let authority = field(&headers, "host").unwrap_or(HOST).to_owned();
    let plain = method == "CONNECT" && ask.protocol.is_none();
    let uri =
        if plain { path.trim_start_matches('/').to_owned() } else { format!("http://{authority}{path}") };
    let mut request = Request::new(());
    *request.uri_mut() = uri.parse().expect("a URI");
    *request.method_mut() = method.parse().expect("a method");
    let others: Fields = headers.into_iter().filter(|(name, _)| name != "host").collect();
    *request.headers_mut() = map(&others);
    if let Some(protocol) = &ask.protocol {
        request.extensions_mut().insert(h2::ext::Protocol::from(protocol.as_str()));
    }
    if let Some(content) = ask.content() {
        request.headers_mut().insert("content-length", content.len().into());
    }
    let leaves = request.method() == Method::CONNECT;
    let ends = ask.content().is_none() && ask.trailers.is_empty() && !leaves;
    *sender = sender.clone().ready().await?;
    let (response, mut upload) = sender.send_request(request, ends)?;
    let trailers: Fields = ask.trailers.clone().into_iter().collect();
    let content = ask.content().unwrap_or_default();
    let sending = async {
        if !ends && !leaves {
            send(&mut upload, content.into(), trailers.is_empty()).await?;
            if !trailers.is_empty() {
                upload.send_trailers(map(&trailers))?;
            }
        }
        if leaves {
            send(&mut upload, MESSAGE.into(), false).await?;
        }
        Ok::<_, h2::Error>(())
    };
    // an early answer may end what is sent
    let (_, lines) = futures::join!(sending, answered(response, leaves));
    lines
}

/// What comes first of an answer.
enum Step {
    Hint(Result<Response<()>, h2::Error>),
    Head(Result<Response<h2::RecvStream>, h2::Error>),
}

async fn answered(mut response: h2::client::ResponseFuture, leaves: bool) -> Result<Vec<String>, h2::Error> {
    let mut lines = Vec::new();
    let response = loop {
        let step = std::future::poll_fn(|cx| match response.poll_informational(cx) {
            Poll::Ready(Some(hint)) => Poll::Ready(Step::Hint(hint)),
            Poll::Ready(None) | Poll::Pending => Pin::new(&mut response).poll(cx).map(Step::Head),
        });
        match step.await {
            Step::Hint(hint) => {
                let hint = hint?;
                lines.push(format!("informational {}", hint.status().as_u16()));
                header_lines("informational", &fields(hint.headers()), &mut lines);
            }
            Step::Head(head) => break head?,
        }
    };
    let (parts, mut download_stream) = response.into_parts();
    lines.push(format!("status {} HTTP/2", parts.status.as_u16()));
    header_lines("header", &fields(&parts.headers), &mut lines);
    if leaves && parts.status.is_success() {
        let mut back = Vec::new();
        while back.len() < MESSAGE.len() {
            match download_stream.data().await {
                Some(Ok(data)) => back.extend_from_slice(&data),
                Some(Err(_)) | None => break,
            }
        }
        lines.push(format!("came back: {}", back.escape_ascii()));
        return Ok(lines);
    }
    body_lines(&download(&mut download_stream).await, &mut lines);
    Ok(lines)
}

fn fields(headers: &http::HeaderMap) -> Fields {
    let text = |v: &http::HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
    headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect()
}

async fn tcp(ask: &Ask, stream: TcpStream) -> Told {
    let port = stream.local_addr().ok().map(|a| a.port());
    let mut wire = Wire::new(stream);
    let mut bytes = from_hex(&ask.hex);
    bytes.extend_from_slice(ask.tcp.as_deref().unwrap_or_default().as_bytes());
    if let Some((name, protocols)) = &ask.hello {
        bytes.extend(hello(name, protocols));
    }
    wire.write(&bytes).await;
    let mut got = match ask.end_after {
        Some(length) => wire.exact(length).await,
        None => Vec::new(),
    };
    if !ask.open && ask.hello.is_none() {
        wire.end().await;
    }
    got.extend(wire.rest().await);
    let end = if wire.broken { "broken off" } else { "ended" };
    Told { lines: vec![format!("got {}", got.escape_ascii()), end.to_owned()], port, ..Told::default() }
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<char> = text.chars().filter(char::is_ascii_hexdigit).collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).expect("base 16");
    digits.chunks(2).map(byte).collect()
}

/// The first bytes of a TLS client.
fn hello(name: &str, protocols: &[String]) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config =
        config.expect("versions").with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
    let name = rustls_pki_types::ServerName::try_from(name.to_owned()).expect("a name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).expect("bytes");
    bytes
}

#[test]
fn made_cookies_are_compared_without_their_value() {
    assert_eq!(without_made("s=\"0123456789abcdef\"; Path=/"), "s=\"made\"; Path=/");
    assert_eq!(without_made("s=own; Path=/"), "s=own; Path=/");
}

#[test]
fn a_client_hello_is_a_handshake_record() {
    assert_eq!(hello("a.example", &["h2".to_owned()])[0], 0x16);
    assert_eq!(from_hex("0d 0a"), b"\r\n");
}
