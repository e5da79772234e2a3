//! Answers that the proxy gives itself, in Envoy's words.

use std::borrow::Cow;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Response, StatusCode, Version};
use tokio::time::Instant;

use super::body::ResponseBody;
use super::exchange::Exchange;
use super::flags::Flags;
use super::headers::{GRPC_MESSAGE, GRPC_STATUS};

/// What is escaped in a gRPC message, besides what is not ASCII: controls, the sign of an escape, and, as Envoy
/// has it, the tilde.
const IN_MESSAGE: &percent_encoding::AsciiSet = &percent_encoding::CONTROLS.add(b'%').add(b'~');

/// An answer of the proxy's own.
#[derive(Debug)]
pub struct Local {
    /// Status for HTTP callers.
    pub status: StatusCode,
    /// Body for HTTP callers; the message for gRPC callers.
    pub text: Cow<'static, str>,
    /// Further headers.
    pub headers: HeaderMap,
    flags: Flags,
    details: Cow<'static, str>,
    grpc: Option<u32>,
}

impl Local {
    /// An answer with this status and text.
    #[must_use]
    pub fn text(status: StatusCode, text: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            text: text.into(),
            headers: HeaderMap::new(),
            flags: Flags::NONE,
            details: Cow::Borrowed(""),
            grpc: None,
        }
    }

    /// Sets response flags.
    #[must_use]
    pub fn flag(mut self, flags: Flags) -> Self {
        self.flags.insert(flags);
        self
    }

    /// Sets the response code details.
    #[must_use]
    pub fn details(mut self, details: impl Into<Cow<'static, str>>) -> Self {
        self.details = details.into();
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: http::HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// Answers gRPC callers with this status.
    #[must_use]
    pub fn grpc_when_grpc(mut self, status: u32) -> Self {
        self.grpc = Some(status);
        self
    }

    /// Tells the exchange why it gets this answer.
    pub fn explain(&self, exchange: &mut Exchange) {
        exchange.flags.insert(self.flags);
        if !self.details.is_empty() {
            exchange.details.clone_from(&self.details);
        }
    }

    /// Ends an exchange with this answer.
    #[must_use]
    pub fn into_response(self, mut exchange: Box<Exchange>) -> Response<ResponseBody> {
        self.explain(&mut exchange);
        let mut headers = self.headers;
        let (status, body) = if let Some(web) = &exchange.web {
            let told = (!self.text.is_empty()).then_some(self.text.as_bytes());
            web.finish_headers(self.status, &mut headers, told);
            (self.status, Bytes::new())
        } else if exchange.is_grpc {
            let code = self.grpc.unwrap_or_else(|| grpc_of(self.status).into());
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(GRPC_STATUS, HeaderValue::from(code));
            if !self.text.is_empty() && !exchange.is_head {
                headers.insert(GRPC_MESSAGE, message(self.text.as_bytes()));
            }
            (StatusCode::OK, Bytes::new())
        } else {
            if self.text.is_empty() {
                // a route's operations may have named one, and there is no content
                headers.remove(CONTENT_TYPE);
            } else if !headers.contains_key(CONTENT_TYPE) {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            let body = match self.text {
                Cow::Borrowed(text) => Bytes::from_static(text.as_bytes()),
                Cow::Owned(text) => Bytes::from(text),
            };
            (self.status, body)
        };
        // the codec drops such a body unseen, which must not look like a client that left
        let bodiless = exchange.is_head || matches!(status.as_u16(), 204 | 304);
        if exchange.is_head {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        let body = if bodiless { Bytes::new() } else { body };
        exchange.http.finish_headers(&exchange, &mut headers);
        if exchange.version < Version::HTTP_2 && exchange.upload().whole.is_none() {
            headers.insert(CONNECTION, HeaderValue::from_static("close")); // nobody reads the rest
        }
        exchange.respond(status, &headers, Instant::now());
        let mut response = Response::new(ResponseBody::local(body, Some(exchange)));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }
}

/// A text as a gRPC message.
#[must_use]
pub fn message(text: &[u8]) -> HeaderValue {
    let text = percent_encoding::percent_encode(text, IN_MESSAGE).to_string();
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""))
}

/// The HTTP status that a gRPC status means.
#[must_use]
pub fn http_of(grpc: u16) -> u16 {
    match grpc {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

/// The gRPC status for an HTTP status (gRPC's HTTP mapping).
#[must_use]
pub fn grpc_of(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_statuses_map_to_grpc_as_its_specification_says() {
        for (http, grpc) in [(400, 13), (401, 16), (403, 7), (404, 12), (503, 14), (500, 2), (418, 2)] {
            assert_eq!(grpc_of(StatusCode::from_u16(http).unwrap()), grpc, "{http}");
        }
    }
}
