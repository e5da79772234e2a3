//! Heads of responses: read from endpoints, written to clients. Without IO.

use std::mem::MaybeUninit;

use bytes::BytesMut;
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, TRANSFER_ENCODING};
use http::{Method, StatusCode, Version};

use super::body::{Decoder, Framing};
use super::head::{self, Malformed, Places, connection, decimal, one_length, write_line};

/// The most headers of a response.
const MOST_HEADERS: usize = 100;
/// The longest head of a response, in bytes.
const LONGEST: usize = 256 * 1024;

/// The head of a response.
#[derive(Debug)]
pub struct Response {
    /// Status.
    pub status: StatusCode,
    /// HTTP/1.0 or 1.1.
    pub version: Version,
    /// Headers.
    pub headers: HeaderMap,
    /// What finds its body in what follows.
    pub body: Decoder,
    /// Whether the connection can take another request when the body is over.
    pub keep_alive: bool,
}

/// Takes the head of the final response to a request of this method off the front of `bytes`; `None` while it is not
/// whole. Interim responses are skipped.
///
/// # Errors
///
/// When it is none, or can be read in two ways.
pub fn read_response(bytes: &mut BytesMut, method: &Method) -> Result<Option<Response>, Malformed> {
    while !bytes.is_empty() {
        let Some(head) = read_one(bytes, method)? else { return Ok(None) };
        if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some(head));
        }
    }
    Ok(None)
}

fn read_one(bytes: &mut BytesMut, method: &Method) -> Result<Option<Response>, Malformed> {
    let mut lines = [const { MaybeUninit::uninit() }; MOST_HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    let found =
        httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, bytes, &mut lines);
    let length = match found.map_err(Malformed::Syntax)? {
        httparse::Status::Complete(length) if length <= LONGEST => length,
        httparse::Status::Partial if bytes.len() <= LONGEST => return Ok(None),
        httparse::Status::Complete(_) | httparse::Status::Partial => return Err(Malformed::TooLong(LONGEST)),
    };
    let status = StatusCode::from_u16(parsed.code.unwrap_or_default()).map_err(|_| Malformed::Value)?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let mut places = Places::new();
    head::find(bytes, parsed.headers, &mut places)?;
    let head = head::split(bytes, length);
    let headers = head::headers(&head, &mut places)?;
    let (body, keep_alive) = body_of(status, version, &headers, method)?;
    Ok(Some(Response { status, version, headers, body, keep_alive }))
}

/// Where the body of a response ends (RFC 9112, section 6.3), and whether the connection stays.
fn body_of(
    status: StatusCode,
    version: Version,
    headers: &HeaderMap,
    method: &Method,
) -> Result<(Decoder, bool), Malformed> {
    let (mut closes, mut keeps) = (false, version == Version::HTTP_11);
    let (mut codings, mut chunked, mut length) = (0, false, None);
    for (name, value) in headers {
        match *name {
            CONNECTION => {
                let told = connection([value]);
                (closes, keeps) = (closes || told.0, keeps || told.1);
            }
            TRANSFER_ENCODING => {
                codings += 1;
                chunked = value.as_bytes().eq_ignore_ascii_case(b"chunked");
            }
            CONTENT_LENGTH => {
                let new = one_length(value);
                length = Some(length.map_or(new, |first| new.filter(|_| new == first)));
            }
            _ => {}
        }
    }
    let keep_alive = keeps && !closes;
    if codings > 0 && length.is_some() {
        return Err(Malformed::Ambiguous);
    }
    if status == StatusCode::SWITCHING_PROTOCOLS || (method == Method::CONNECT && status.is_success()) {
        return Ok((Decoder::Length(0), false));
    }
    // the header goes no further, and what else was done to the body would be lost with it
    if codings > 1 || (codings == 1 && !chunked) {
        return Err(Malformed::Unknown);
    }
    if !has_body(status) || method == Method::HEAD {
        return Ok((Decoder::Length(0), keep_alive));
    }
    match length {
        None if !chunked => Ok((Decoder::UntilClose, false)),
        None if version == Version::HTTP_10 => Err(Malformed::Encoding),
        None => Ok((Decoder::chunked(), keep_alive)),
        Some(length) => Ok((Decoder::Length(length.ok_or(Malformed::Length)?), keep_alive)),
    }
}

/// Whether responses with this status have bodies (RFC 9110, section 6.4.1).
#[must_use]
pub fn has_body(status: StatusCode) -> bool {
    !(status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED))
}

/// The head of a response that is to be written.
#[derive(Clone, Copy, Debug)]
pub struct ResponseHead<'a> {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: &'a HeaderMap,
    /// The response is written as one of HTTP/1.0.
    pub old: bool,
    /// The request was HEAD: the headers are those of a body that does not follow.
    pub is_head: bool,
    /// The length of the body, if it is known.
    pub length: Option<u64>,
    /// Whether the connection can take another request.
    pub keep_alive: bool,
    /// Whether names are written `Like-This`.
    pub proper_case: bool,
}

impl ResponseHead<'_> {
    /// Writes the head; tells how its body is to follow, and whether the connection stays.
    pub fn write(self, out: &mut Vec<u8>) -> (Framing, bool) {
        out.extend_from_slice(if self.old { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
        out.extend_from_slice(self.status.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.status.canonical_reason().unwrap_or("Unknown").as_bytes());
        out.extend_from_slice(b"\r\n");
        let (mut told, mut closes, mut keeps, mut connection_told) = (None, !self.keep_alive, false, false);
        for (name, value) in self.headers {
            match *name {
                TRANSFER_ENCODING => continue,
                CONTENT_LENGTH => {
                    told = told.or(one_length(value));
                    continue;
                }
                CONNECTION => {
                    connection_told = true;
                    let (close, keep) = connection([value]);
                    (closes, keeps) = (closes || close, keeps || keep);
                }
                _ => {}
            }
            self.line(out, name.as_str(), value.as_bytes());
        }
        let framing = self.framing(told, out);
        closes |= framing == Framing::UntilClose;
        if closes && !connection_told {
            self.line(out, CONNECTION.as_str(), b"close");
        } else if !closes && self.old && !keeps {
            self.line(out, CONNECTION.as_str(), b"keep-alive");
        }
        out.extend_from_slice(b"\r\n");
        (framing, !closes)
    }

    /// Writes the header that tells where the body ends, if one does. `told`: by the response itself.
    fn framing(self, told: Option<u64>, out: &mut Vec<u8>) -> Framing {
        let none = Framing::Length(0);
        if self.status.is_informational() || self.status == StatusCode::NO_CONTENT {
            return none;
        }
        let bodiless = self.is_head || !has_body(self.status);
        match told.or(self.length.filter(|_| !bodiless)) {
            Some(length) => {
                let mut digits = [0; 20];
                self.line(out, CONTENT_LENGTH.as_str(), decimal(length, &mut digits));
                if bodiless { none } else { Framing::Length(length) }
            }
            None if bodiless => none,
            None if self.old => Framing::UntilClose,
            None => {
                self.line(out, TRANSFER_ENCODING.as_str(), b"chunked");
                Framing::Chunked
            }
        }
    }

    fn line(self, out: &mut Vec<u8>, name: &str, value: &[u8]) {
        write_line(out, name, value, self.proper_case);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, method: &Method) -> Result<Option<Response>, Malformed> {
        read_response(&mut BytesMut::from(text), method)
    }

    #[track_caller]
    fn check(text: &str, method: &Method, status: u16, body: &Decoder, keep_alive: bool) {
        let head = read(text, method).unwrap().unwrap();
        assert_eq!(head.status.as_u16(), status, "{text:?}");
        assert_eq!(head.body, *body, "{text:?}");
        assert_eq!(head.keep_alive, keep_alive, "{text:?}");
    }

    #[test]
    fn the_end_of_a_body_is_found_as_the_rfc_says() {
        let ok = |lines: &str| format!("HTTP/1.1 200 OK\r\n{lines}\r\n");
        let (get, length, close) = (&Method::GET, Decoder::Length, &Decoder::UntilClose);
        check(&ok("content-length: 5\r\n"), get, 200, &length(5), true);
        check(&ok("content-length: 5, 5\r\ncontent-length: 5\r\n"), get, 200, &length(5), true);
        check(&ok("content-length: 5\r\n"), &Method::HEAD, 200, &length(0), true);
        check(&ok("transfer-encoding: Chunked\r\n"), get, 200, &Decoder::chunked(), true);
        check(&ok(""), get, 200, close, false);
        check("HTTP/1.1 204 No\r\ncontent-length: 5\r\n\r\n", get, 204, &length(0), true);
        check("HTTP/1.1 304 No\r\ncontent-length: 5\r\n\r\n", get, 304, &length(0), true);
        check("HTTP/1.1 101 Go\r\nupgrade: x\r\n\r\n", get, 101, &length(0), false);
    }

    #[test]
    fn connections_stay_unless_somebody_says_otherwise() {
        let get = &Method::GET;
        let zero = &Decoder::Length(0);
        check("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: x, Close\r\n\r\n", get, 200, zero, false);
        check("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", get, 200, zero, false);
        check("HTTP/1.0 200 OK\r\ncontent-length: 0\r\nconnection: Keep-Alive\r\n\r\n", get, 200, zero, true);
        let both =
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\nconnection: keep-alive\r\n\r\n";
        check(both, get, 200, zero, false);
    }

    #[test]
    fn interim_responses_are_skipped_and_parts_wait() {
        let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 404 No\r\ncontent-length: 1\r\n\r\nx";
        let mut bytes = BytesMut::from(text);
        let head = read_response(&mut bytes, &Method::GET).unwrap().unwrap();
        assert_eq!((head.status.as_u16(), &bytes[..]), (404, &b"x"[..]));
        assert_eq!(head.headers.len(), 1);
        for cut in 0..text.len() - 1 {
            assert!(read(&text[..cut], &Method::GET).unwrap().is_none(), "{cut}");
        }
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        let bad = |text: &str| read(text, &Method::GET).unwrap_err();
        for length in ["5\r\ncontent-length: 6", "5, 6", "+5", "5x", "", "99999999999999999999999"] {
            assert_eq!(
                bad(&format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n")),
                Malformed::Length
            );
        }
        for coding in ["gzip, chunked", "chunked, gzip", "gzip", "", "chunked\r\ntransfer-encoding: chunked"]
        {
            let text = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: {coding}\r\n\r\n");
            assert_eq!(bad(&text), Malformed::Unknown, "{coding}");
        }
        let both = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n";
        assert_eq!(bad(both), Malformed::Ambiguous);
        assert_eq!(bad("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"), Malformed::Encoding);
        for text in ["HTTP/2 200 OK\r\n\r\n", "nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\na b: c\r\n\r\n", "\0"] {
            assert!(matches!(bad(text), Malformed::Syntax(_)), "{text:?}");
        }
        assert_eq!(bad("HTTP/1.1 099 No\r\n\r\n"), Malformed::Value);
        let many = "a: b\r\n".repeat(MOST_HEADERS + 1);
        let many = format!("HTTP/1.1 200 OK\r\n{many}\r\n");
        assert_eq!(bad(&many), Malformed::Syntax(httparse::Error::TooManyHeaders));
        let long = format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(LONGEST));
        assert_eq!(bad(&long), Malformed::TooLong(LONGEST));
    }
}
