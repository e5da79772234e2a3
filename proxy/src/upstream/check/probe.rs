//! Asks an endpoint once whether it serves.

use bytes::{Bytes, BytesMut};
use http::header::{HOST, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::Verdict;
use crate::http::body::BodyError;
use crate::http::headers::GRPC_STATUS;
use crate::tcp::io::Io;
use crate::upstream::{Host, Upstream};
use crate::xds::cluster::health_check::{CheckKind, HttpCheck};

/// The longest answer that is read, in bytes.
const MOST: usize = 64 * 1024;
/// Says that others serve better.
const DEGRADED: &str = "x-envoy-degraded";
/// What checks call themselves, as Envoy's do.
const AGENT: HeaderValue = HeaderValue::from_static("Envoy/HC");
/// `SERVING`
const SERVING: i32 = 1;

/// `grpc.health.v1.HealthCheckRequest`
#[derive(Clone, PartialEq, prost::Message)]
struct GrpcRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`
#[derive(Clone, PartialEq, prost::Message)]
struct GrpcResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// A connection that the next check may use.
#[derive(Debug, Default)]
pub(super) enum Kept {
    #[default]
    Nothing,
    H1(hyper::client::conn::http1::SendRequest<Empty<Bytes>>),
    H2(::h2::client::SendRequest<Bytes>),
    Tcp(Io),
}

/// Asks once. `kept` is the last check's connection, and becomes this one's.
///
/// # Errors
///
/// When there is no answer.
pub(super) async fn ask(
    upstream: &Upstream,
    host: &Host,
    kind: &CheckKind,
    kept: &mut Kept,
) -> Result<Verdict, BodyError> {
    match kind {
        CheckKind::Http(check) if check.h2 => over_h2(upstream, host, check, kept).await,
        CheckKind::Http(check) => over_h1(upstream, host, check, kept).await,
        CheckKind::Tcp { send, receive } => over_tcp(upstream, host, send, receive, kept).await,
        CheckKind::Grpc { service, authority, headers } => {
            let ask = GrpcRequest { service: service.to_string() };
            over_grpc(upstream, host, &ask, (authority.as_ref(), headers), kept).await
        }
    }
}

/// Whom a check asks for: the endpoint's own name, or the check's, or the cluster's.
fn authority(upstream: &Upstream, host: &Host, configured: Option<&HeaderValue>) -> HeaderValue {
    let own = &host.endpoint.health_check_hostname;
    let own = HeaderValue::from_str(own).ok().filter(|v| !v.is_empty());
    let name = || HeaderValue::from_str(&upstream.config.name).unwrap_or(HeaderValue::from_static(""));
    own.or_else(|| configured.cloned()).unwrap_or_else(name)
}

fn head(check: &HttpCheck) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(USER_AGENT, AGENT);
    headers.extend(check.add.clone());
    for name in &check.remove {
        headers.remove(name);
    }
    headers
}

fn judge(check: &HttpCheck, status: StatusCode, headers: &HeaderMap) -> Verdict {
    let is_in = |ranges: &[std::ops::Range<i64>]| ranges.iter().any(|r| r.contains(&status.as_u16().into()));
    if is_in(&check.expected) {
        return Verdict::Serves { degraded: headers.contains_key(DEGRADED) };
    }
    if is_in(&check.retriable) { Verdict::Retriable } else { Verdict::Refuses }
}

async fn over_h1(
    upstream: &Upstream,
    host: &Host,
    check: &HttpCheck,
    kept: &mut Kept,
) -> Result<Verdict, BodyError> {
    let name = authority(upstream, host, check.host.as_ref());
    let mut send = match std::mem::take(kept) {
        Kept::H1(send) if send.is_ready() => send,
        Kept::Nothing | Kept::H1(_) | Kept::H2(_) | Kept::Tcp(_) => {
            let io = upstream.dial(host, &name).await?;
            let (send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
            upstream.shared.tasks.spawn_local(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "health check connection ended");
                }
            });
            send
        }
    };
    let mut request = Request::new(Empty::new());
    *request.method_mut() = check.method.clone();
    *request.uri_mut() = Uri::from(check.path.clone());
    *request.headers_mut() = head(check);
    request.headers_mut().entry(HOST).or_insert(name);
    let response = send.send_request(request).await?;
    let verdict = judge(check, response.status(), response.headers());
    let mut body = response.into_body();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        length += frame?.data_ref().map_or(0, Bytes::len);
        if length > MOST {
            return Ok(verdict); // the connection goes with what is left
        }
    }
    *kept = Kept::H1(send);
    Ok(verdict)
}

async fn h2_connection(
    upstream: &Upstream,
    host: &Host,
    name: &HeaderValue,
    kept: &mut Kept,
) -> Result<::h2::client::SendRequest<Bytes>, BodyError> {
    if let Kept::H2(send) = std::mem::take(kept)
        && let Ok(ready) = send.ready().await
    {
        return Ok(ready);
    }
    let io = upstream.dial(host, name).await?;
    let (send, connection) = ::h2::client::handshake(io).await?;
    upstream.shared.tasks.spawn_local(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "health check connection ended");
        }
    });
    Ok(send.ready().await?)
}

fn h2_request(
    host: &Host,
    name: &HeaderValue,
    method: Method,
    path: http::uri::PathAndQuery,
    headers: HeaderMap,
) -> Result<Request<()>, BodyError> {
    let scheme = if host.transport.tls.is_some() { "https" } else { "http" };
    let uri = Uri::builder().scheme(scheme).authority(name.as_bytes()).path_and_query(path).build()?;
    let mut request = Request::builder().method(method).uri(uri).body(())?;
    *request.headers_mut() = headers;
    Ok(request)
}

async fn over_h2(
    upstream: &Upstream,
    host: &Host,
    check: &HttpCheck,
    kept: &mut Kept,
) -> Result<Verdict, BodyError> {
    let name = authority(upstream, host, check.host.as_ref());
    let mut send = h2_connection(upstream, host, &name, kept).await?;
    let request = h2_request(host, &name, check.method.clone(), check.path.clone(), head(check))?;
    let (parts, body) = send.send_request(request, true)?.0.await?.into_parts();
    let verdict = judge(check, parts.status, &parts.headers);
    read(body).await?;
    *kept = Kept::H2(send);
    Ok(verdict)
}

async fn over_grpc(
    upstream: &Upstream,
    host: &Host,
    ask: &GrpcRequest,
    (configured, metadata): (Option<&HeaderValue>, &HeaderMap),
    kept: &mut Kept,
) -> Result<Verdict, BodyError> {
    let name = authority(upstream, host, configured);
    let mut send = h2_connection(upstream, host, &name, kept).await?;
    let mut headers = metadata.clone();
    headers.insert(USER_AGENT, AGENT);
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let request = h2_request(host, &name, Method::POST, path, headers)?;
    let (response, mut upload) = send.send_request(request, false)?;
    let message = ask.encode_to_vec();
    let length = u32::try_from(message.len())?.to_be_bytes();
    upload.send_data([&[0], length.as_slice(), &message].concat().into(), true)?;
    let (parts, body) = response.await?.into_parts();
    let at_once = parts.headers.get(GRPC_STATUS).cloned();
    let (bytes, trailers) = read(body).await?;
    *kept = Kept::H2(send);
    let status = at_once.or_else(|| trailers.get(GRPC_STATUS).cloned());
    if parts.status != StatusCode::OK || status.is_none_or(|s| s != "0") {
        return Ok(Verdict::Refuses);
    }
    // one message, not compressed
    let answer = match bytes.split_first_chunk::<5>() {
        Some(([0, ..], message)) => GrpcResponse::decode(message).unwrap_or_default(),
        _ => GrpcResponse::default(),
    };
    Ok(if answer.status == SERVING { Verdict::Serves { degraded: false } } else { Verdict::Refuses })
}

async fn read(mut body: ::h2::RecvStream) -> Result<(BytesMut, HeaderMap), BodyError> {
    let mut bytes = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        if bytes.len() + data.len() > MOST {
            return Err("the answer is too long".into());
        }
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, body.trailers().await?.unwrap_or_default()))
}

async fn over_tcp(
    upstream: &Upstream,
    host: &Host,
    send: &Bytes,
    receive: &[Bytes],
    kept: &mut Kept,
) -> Result<Verdict, BodyError> {
    let mut io = match std::mem::take(kept) {
        Kept::Tcp(io) => io,
        Kept::Nothing | Kept::H1(_) | Kept::H2(_) => {
            upstream.dial(host, &authority(upstream, host, None)).await?
        }
    };
    io.write_all(send).await?;
    io.flush().await?;
    let mut bytes = BytesMut::new();
    while !holds(&bytes, receive) {
        if io.read_buf(&mut bytes).await? == 0 {
            return Err("the endpoint has closed the connection".into());
        }
        if bytes.len() > MOST {
            return Err("the answer is too long".into());
        }
    }
    if !receive.is_empty() {
        *kept = Kept::Tcp(io);
    }
    Ok(Verdict::Serves { degraded: false })
}

/// Whether these pieces are in the bytes in their order, whatever is between them.
fn holds(mut bytes: &[u8], pieces: &[Bytes]) -> bool {
    pieces.iter().all(|piece| {
        let at = bytes.windows(piece.len().max(1)).position(|w| w == piece);
        let after = at.and_then(|at| bytes.get(at + piece.len()..));
        bytes = after.unwrap_or_default();
        after.is_some()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_must_come_in_their_order() {
        let pieces: Vec<Bytes> = ["ab", "cd"].map(Bytes::from).into();
        for (bytes, expected) in
            [("abcd", true), ("xabxxcdx", true), ("cdab", false), ("abc", false), ("", false)]
        {
            assert_eq!(holds(bytes.as_bytes(), &pieces), expected, "{bytes}");
        }
        assert!(holds(b"", &[]));
    }
}
