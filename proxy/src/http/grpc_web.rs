//! gRPC-Web, what browsers speak in place of gRPC: a request becomes one of gRPC, and its answer one of gRPC-Web, whose
//! trailers are at the end of its body. [`codec`] has the bytes; here are heads, and what moves bytes through it.

pub mod codec;

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, TE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, response};
use http_body::{Body as _, Frame};
use tokio::time::Instant;

use self::codec::{Decoder, NotBase64};
use super::attempts::{self, Answered};
use super::body::{BodyError, RequestBody};
use super::call::Call;
use super::flags::Flags;
use super::headers::{GRPC_MESSAGE, GRPC_STATUS};
use super::reply::{Local, grpc_of, message};
use crate::router;
use crate::upstream::pool::Reply;

/// How much of an answer that is none of gRPC goes into its message, in bytes.
const MOST: usize = 16 << 10;
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// A request that came as gRPC-Web.
#[derive(Debug)]
pub struct GrpcWeb {
    /// Its body is base64.
    text: bool,
    /// Its answer's body shall be base64.
    pub wants_text: bool,
    /// Its body was no base64, and in which way.
    broken: Rc<Cell<Option<&'static str>>>,
}

fn is_text(kind: Option<&HeaderValue>) -> bool {
    let kind = kind.map(HeaderValue::as_bytes);
    matches!(kind, Some(b"application/grpc-web-text" | b"application/grpc-web-text+proto"))
}

impl GrpcWeb {
    /// Makes the head of a gRPC-Web request one of gRPC; `None`: it is none.
    pub fn take(headers: &mut HeaderMap) -> Option<Self> {
        let kind = headers.get(CONTENT_TYPE)?;
        let text = is_text(Some(kind));
        if !text && !matches!(kind.as_bytes(), b"application/grpc-web" | b"application/grpc-web+proto") {
            return None;
        }
        let wants_text = is_text(headers.get(ACCEPT));
        headers.remove(CONTENT_LENGTH); // that of another body
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.entry(ACCEPT_ENCODING).or_insert(HeaderValue::from_static("identity"));
        Some(Self { text, wants_text, broken: Rc::default() })
    }

    /// The body towards the server, of the client's.
    #[must_use]
    pub fn upload(&self, body: RequestBody) -> RequestBody {
        let decoder = self.text.then(Decoder::default);
        RequestBody::Web(Box::new(Upload { body, decoder, broken: Rc::clone(&self.broken) }))
    }

    /// The same, for a copy of the request, which breaks nothing.
    #[must_use]
    pub fn copied(&self) -> Self {
        Self { text: self.text, wants_text: self.wants_text, broken: Rc::default() }
    }

    /// The answer to a request whose body was no base64.
    #[must_use]
    pub fn refusal(&self) -> Option<Box<Local>> {
        self.broken.get().map(|how| {
            let text = "Bad gRPC-web request, invalid base64 data.";
            Box::new(Local::text(StatusCode::BAD_REQUEST, text).details(how))
        })
    }

    /// Makes the head of an answer one of gRPC-Web. `told`: the body of an answer that is none of gRPC, which becomes its
    /// message.
    pub fn finish_headers(&self, status: StatusCode, headers: &mut HeaderMap, told: Option<&[u8]>) {
        headers.remove(CONTENT_LENGTH);
        let kind =
            if self.wants_text { "application/grpc-web-text+proto" } else { "application/grpc-web+proto" };
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Some(told) = told {
            headers.insert(GRPC_MESSAGE, message(told));
            headers.insert(GRPC_STATUS, grpc_of(status).into());
            headers.insert(CONTENT_LENGTH, 0.into());
        }
    }
}

/// Whether an answer, which may have ended with its head, has a body that no client of gRPC-Web understands.
fn is_foreign(parts: &response::Parts, is_end: bool) -> bool {
    let kind = parts.headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let bare = kind.split(|c| *c == b';').next().unwrap_or_default().trim_ascii_end();
    let is_web = |name: &[u8]| bare.eq_ignore_ascii_case(name);
    let known = router::is_grpc_type(kind)
        || is_web(b"application/grpc-web")
        || is_web(b"application/grpc-web+proto");
    !(is_end || (parts.status == StatusCode::OK && known))
}

/// The body of an answer that must be told in its head: to a client of gRPC-Web, when the answer is none of gRPC.
///
/// # Errors
///
/// The answer in its place when it does not come to its end.
pub async fn told(answered: &mut Answered, call: &mut Call) -> Result<Option<Vec<u8>>, Box<Local>> {
    if call.exchange.web.is_some() && is_foreign(&answered.parts, answered.reply.is_end()) {
        // most requests do not need the room for what reads
        return Box::pin(read(&mut answered.reply, call)).await.map(Some);
    }
    Ok(None)
}

async fn read(reply: &mut Reply, call: &mut Call) -> Result<Vec<u8>, Box<Local>> {
    let mut text = Vec::new();
    loop {
        let step = std::future::poll_fn(|cx| match reply.poll_frame(cx) {
            Poll::Ready(frame) => Poll::Ready(Ok(frame)),
            Poll::Pending => call.exchange.poll_late(None, cx).map(Err),
        });
        match step.await {
            Ok(Some(Ok(frame))) => {
                let Some(data) = frame.data_ref() else { break };
                let room = MOST.saturating_sub(text.len()).min(data.len());
                text.extend_from_slice(data.get(..room).unwrap_or_default());
                call.exchange.timing.on_move(Instant::now());
            }
            Ok(None) => break,
            Ok(Some(Err(error))) => {
                call.exchange.failure = error.to_string();
                let local = Local::text(StatusCode::SERVICE_UNAVAILABLE, "");
                return Err(Box::new(local.flag(Flags::UPSTREAM_TERMINATION)));
            }
            Err(late) => return Err(Box::new(attempts::too_late(call, late))),
        }
    }
    reply.release(Instant::now());
    Ok(text)
}

/// A request's body on its way to the server.
#[derive(Debug)]
pub struct Upload {
    body: RequestBody,
    decoder: Option<Decoder>,
    broken: Rc<Cell<Option<&'static str>>>,
}

impl Upload {
    /// Whether nothing more will come.
    #[must_use]
    pub fn is_end(&self) -> bool {
        self.body.is_end_stream() && self.decoder.as_ref().is_none_or(Decoder::is_whole)
    }

    /// The next piece.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)?);
            let Some(decoder) = &mut self.decoder else { return Poll::Ready(frame.map(Ok)) };
            let ended = !frame.as_ref().is_some_and(Frame::is_data);
            let decoded = match frame.map(Frame::into_data) {
                Some(Ok(data)) => decoder.piece(&data),
                Some(Err(trailers)) if decoder.is_whole() => return Poll::Ready(Some(Ok(trailers))),
                None if decoder.is_whole() => return Poll::Ready(None),
                Some(Err(_)) | None => Err(NotBase64),
            };
            match decoded {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Err(error) => {
                    let how = if ended {
                        "grpc_base_64_decode_failed_bad_size"
                    } else {
                        "grpc_base_64_decode_failed"
                    };
                    self.broken.set(Some(how));
                    return Poll::Ready(Some(Err(error.into())));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(kind: &str, accept: &str, expected: Option<(bool, bool)>) {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, kind.parse().unwrap());
        headers.insert(ACCEPT, accept.parse().unwrap());
        headers.insert(CONTENT_LENGTH, 5.into());
        let taken = GrpcWeb::take(&mut headers);
        assert_eq!(taken.map(|web| (web.text, web.wants_text)), expected, "{kind}");
        let became = if expected.is_some() { "application/grpc" } else { kind };
        assert_eq!(headers[CONTENT_TYPE], became);
        assert_eq!(headers.contains_key(TE), expected.is_some());
    }

    #[test]
    fn four_content_types_are_grpc_web() {
        check("application/grpc-web", "*/*", Some((false, false)));
        check("application/grpc-web+proto", "application/grpc-web-text", Some((false, true)));
        check("application/grpc-web-text", "application/grpc-web-text+proto", Some((true, true)));
        check("application/grpc-web-text+proto", "application/grpc-web", Some((true, false)));
        check("application/grpc", "*/*", None);
        check("application/grpc-web+json", "*/*", None);
    }

    #[test]
    fn an_answer_is_foreign_unless_its_status_and_type_are_of_grpc() {
        let of = |status: u16, kind: &str, is_end| {
            let response = http::Response::builder().status(status).header(CONTENT_TYPE, kind);
            is_foreign(&response.body(()).unwrap().into_parts().0, is_end)
        };
        assert!(!of(200, "application/grpc", false) && !of(200, "application/grpc+proto", false));
        assert!(!of(200, "Application/gRPC-Web ; x=y", false) && !of(503, "text/html", true));
        assert!(of(503, "application/grpc", false) && of(200, "text/html", false));
    }
}
