//! A client's connections, over which one request follows the other: of HTTP/1, and of HTTP/2 with prior knowledge.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use h2::client::{Connection as Driver, SendRequest};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tests::http::{Answer, driven};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::request::Request;

/// A malformed request is answered within this time.
const QUIET: Duration = Duration::from_secs(10);

/// A client's end of HTTP/2, and what moves its bytes.
type Http2 = (SendRequest<Bytes>, Driver<TcpStream>);

/// Connections that are kept for as long as the proxy keeps them.
pub(crate) struct Connection {
    address: SocketAddr,
    stream: Option<TcpStream>,
    http2: Option<Http2>,
}

impl Connection {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, stream: None, http2: None }
    }

    pub(crate) async fn ask(&mut self, request: &Request, name: &str) -> anyhow::Result<Answer> {
        let request = request.on(self.address.port());
        if request.http2.is_some() {
            return tokio::time::timeout(QUIET, self.ask_http2(&request, name)).await.context("silence")?;
        }
        let bytes = request.bytes(name);
        if let Some(stream) = self.stream.take()
            && let Some(answer) = self.exchange(stream, &bytes, request.method).await?
        {
            return Ok(answer);
        }
        // The proxy had closed the last one, or there was none.
        let stream = self.connect().await?;
        self.exchange(stream, &bytes, request.method).await?.context("closed without an answer")
    }

    async fn connect(&self) -> anyhow::Result<TcpStream> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn ask_http2(&mut self, request: &Request, name: &str) -> anyhow::Result<Answer> {
        if let Some(mut kept) = self.http2.take()
            && let Ok(answer) = over_http2(&mut kept, request, name).await
        {
            self.http2 = Some(kept);
            return Ok(answer);
        }
        // The proxy had closed the last one, or there was none.
        let mut made = h2::client::handshake(self.connect().await?).await?;
        let answer = over_http2(&mut made, request, name).await?;
        self.http2 = Some(made);
        Ok(answer)
    }

    /// `None` when the proxy closes before it answers.
    async fn exchange(
        &mut self,
        mut stream: TcpStream,
        bytes: &[u8],
        method: &str,
    ) -> anyhow::Result<Option<Answer>> {
        let exchange = async {
            if stream.write_all(bytes).await.is_err() {
                return Ok(None);
            }
            let mut read = Vec::new();
            loop {
                let more = stream.read_buf(&mut read).await.unwrap_or_default();
                if more == 0 && read.is_empty() {
                    return Ok(None);
                }
                if let Some((answer, keep)) = answer(&read, method, more == 0)? {
                    return Ok(Some((answer, keep)));
                }
                ensure!(more > 0, "closed within an answer: {}", read.escape_ascii());
            }
        };
        let answered: Option<(Answer, bool)> =
            tokio::time::timeout(QUIET, exchange).await.context("silence")??;
        let Some((answer, keep)) = answered else { return Ok(None) };
        self.stream = keep.then_some(stream);
        Ok(Some(answer))
    }
}

/// Asks over a connection of HTTP/2, and moves its bytes for as long.
async fn over_http2((sender, driver): &mut Http2, request: &Request, name: &str) -> anyhow::Result<Answer> {
    driven(driver, exchange_http2(sender, request, name)).await
}

async fn exchange_http2(
    sender: &mut SendRequest<Bytes>,
    request: &Request,
    name: &str,
) -> anyhow::Result<Answer> {
    let head = request.over_http2(name).context("not for HTTP/2")?;
    *sender = sender.clone().ready().await?;
    let (response, mut upload) = sender.send_request(head, request.body.is_none())?;
    if let Some(body) = request.content() {
        // who answers early may take no body
        let sent = upload.send_data(body, !request.trailers);
        if sent.is_ok() && request.trailers {
            let trailers = HeaderMap::from_iter([(
                HeaderName::from_static("x-trailer"),
                HeaderValue::from_static("behind"),
            )]);
            upload.send_trailers(trailers).unwrap_or_default();
        }
    }
    let (parts, mut download) = response.await?.into_parts();
    let mut body = Vec::new();
    while let Some(data) = download.data().await {
        let data = data?;
        download.flow_control().release_capacity(data.len())?;
        body.extend_from_slice(&data);
    }
    let trailers = download.trailers().await?.unwrap_or_default();
    if matches!(parts.status.as_u16(), 204 | 304) {
        // Envoy sends a direct response's body in any case.
        body.clear();
    }
    Ok(Answer { status: parts.status, headers: parts.headers, body: body.into(), trailers })
}

/// An answer, when all of it has come, and whether its connection goes on.
fn answer(bytes: &[u8], method: &str, ended: bool) -> anyhow::Result<Option<(Answer, bool)>> {
    let mut room = [httparse::EMPTY_HEADER; 100];
    let mut head = httparse::Response::new(&mut room);
    let httparse::Status::Complete(length) =
        head.parse(bytes).with_context(|| bytes.escape_ascii().to_string())?
    else {
        return Ok(None);
    };
    let mut headers = HeaderMap::new();
    for header in head.headers.iter() {
        headers
            .append(HeaderName::from_bytes(header.name.as_bytes())?, HeaderValue::from_bytes(header.value)?);
    }
    let status = StatusCode::from_u16(head.code.context("no status")?)?;
    let rest = &bytes[length..];
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let (body, framed) = if method == "HEAD" {
        // What Envoy's codec refuses gets a body in any case.
        (Vec::new(), rest.is_empty() && !status.is_client_error())
    } else if matches!(status.as_u16(), 204 | 304) {
        // Envoy sends a direct response's body in any case.
        (Vec::new(), rest.is_empty() && matches!(text("content-length"), "" | "0"))
    } else if text("transfer-encoding") == "chunked" {
        match unchunked(rest)? {
            Some(body) => (body, true),
            None => return Ok(None),
        }
    } else if let Ok(length) = text("content-length").parse::<usize>() {
        ensure!(rest.len() <= length, "more than its length: {}", bytes.escape_ascii());
        if rest.len() < length {
            return Ok(None);
        }
        (rest.to_vec(), true)
    } else if ended {
        (rest.to_vec(), false)
    } else {
        return Ok(None);
    };
    let keep = framed && text("connection") != "close";
    Ok(Some((Answer { status, headers, body: Bytes::from(body), trailers: HeaderMap::new() }, keep)))
}

/// The body in chunks, when its last one has come.
fn unchunked(mut bytes: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        let httparse::Status::Complete((start, size)) =
            httparse::parse_chunk_size(bytes).map_err(|_| anyhow::anyhow!("no chunk"))?
        else {
            return Ok(None);
        };
        let end = start + usize::try_from(size)?;
        if bytes.len() < end + 2 {
            return Ok(None);
        }
        ensure!(&bytes[end..end + 2] == b"\r\n", "a chunk without its end");
        body.extend_from_slice(&bytes[start..end]);
        if size == 0 {
            return Ok(Some(body));
        }
        bytes = &bytes[end + 2..];
    }
}
