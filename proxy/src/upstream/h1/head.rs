//! Heads of HTTP/1 messages (RFC 9112): requests are written, responses are read. Without IO.

use std::io::Write as _;
use std::mem::MaybeUninit;

use bytes::BytesMut;
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{Method, StatusCode, Version};

use super::body::Decoder;

/// The most headers of a response.
const MOST_HEADERS: usize = 100;
/// The longest head of a response, in bytes.
const LONGEST: usize = 256 * 1024;

/// How a server knows where the body of a request ends (RFC 9112, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// After so many bytes more.
    Length(u64),
    /// In chunks.
    Chunked,
}

/// The head of a request that is to be written.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// Method.
    pub method: &'a Method,
    /// Path and query.
    pub path: &'a str,
    /// `host`
    pub authority: &'a HeaderValue,
    /// All other headers.
    pub headers: &'a HeaderMap,
    /// Whether there is no body.
    pub bodiless: bool,
    /// The length of the body, if it is known.
    pub length: Option<u64>,
    /// Whether names are written `Like-This`.
    pub proper_case: bool,
}

impl RequestHead<'_> {
    /// Writes the head; tells how its body is to follow.
    pub fn write(self, out: &mut Vec<u8>) -> Framing {
        out.extend_from_slice(self.method.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.path.as_bytes());
        out.extend_from_slice(b" HTTP/1.1\r\n");
        self.line(out, "host", self.authority.as_bytes());
        let told = self.headers.get(CONTENT_LENGTH).and_then(length);
        for (name, value) in self.headers {
            if *name != TRANSFER_ENCODING {
                self.line(out, name.as_str(), value.as_bytes());
            }
        }
        let framing = match told.or(self.length) {
            _ if self.bodiless => Framing::Length(0),
            Some(length) => {
                if told.is_none() {
                    self.line(out, CONTENT_LENGTH.as_str(), length.to_string().as_bytes());
                }
                Framing::Length(length)
            }
            None => {
                self.line(out, TRANSFER_ENCODING.as_str(), b"chunked");
                Framing::Chunked
            }
        };
        out.extend_from_slice(b"\r\n");
        framing
    }

    fn line(self, out: &mut Vec<u8>, name: &str, value: &[u8]) {
        write_line(out, name, value, self.proper_case);
    }
}

/// Writes one header.
fn write_line(out: &mut Vec<u8>, name: &str, value: &[u8], proper_case: bool) {
    if proper_case {
        let mut begins = true;
        for byte in name.bytes() {
            out.push(if begins { byte.to_ascii_uppercase() } else { byte });
            begins = byte == b'-';
        }
    } else {
        out.extend_from_slice(name.as_bytes());
    }
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Writes the line before the data of a chunk.
pub fn write_chunk(out: &mut Vec<u8>, length: usize) {
    // a vector takes everything
    let _written: std::io::Result<()> = write!(out, "{length:x}\r\n");
}

/// Writes the end of a body in chunks, with those trailers that the request's head has announced.
pub fn write_trailers(out: &mut Vec<u8>, trailers: &HeaderMap, announced: &[HeaderName], proper_case: bool) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.iter().filter(|(name, _)| announced.contains(name)) {
        write_line(out, name.as_str(), value.as_bytes(), proper_case);
    }
    out.extend_from_slice(b"\r\n");
}

/// Why a response cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadResponse {
    /// It is no HTTP/1.
    #[error("malformed response head: {0}")]
    Syntax(httparse::Error),
    /// Its head has no end.
    #[error("response head longer than {LONGEST} bytes")]
    TooLong,
    /// Its length is no number, or two.
    #[error("invalid content-length")]
    Length,
    /// It tells its length twice: others might believe the other one.
    #[error("two lengths of one body")]
    Ambiguous,
    /// Chunks are not known to HTTP/1.0.
    #[error("transfer-encoding in a response of HTTP/1.0")]
    Encoding,
    /// A status or a header that cannot be passed on.
    #[error("invalid status or header")]
    Value,
    /// Something is wrong with a chunk.
    #[error("malformed chunk")]
    Chunk,
    /// Something is wrong with its trailers.
    #[error("malformed trailers")]
    Trailers,
    /// The connection ended before it did.
    #[error("connection closed in the middle of a response")]
    Cut,
}

/// The head of a response.
#[derive(Debug)]
pub struct ResponseHead {
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
pub fn read_response(bytes: &mut BytesMut, method: &Method) -> Result<Option<ResponseHead>, BadResponse> {
    while !bytes.is_empty() {
        let Some(head) = read_one(bytes, method)? else { return Ok(None) };
        if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some(head));
        }
    }
    Ok(None)
}

fn read_one(bytes: &mut BytesMut, method: &Method) -> Result<Option<ResponseHead>, BadResponse> {
    let mut lines = [const { MaybeUninit::uninit() }; MOST_HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    let found =
        httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, bytes, &mut lines);
    let length = match found.map_err(BadResponse::Syntax)? {
        httparse::Status::Complete(length) if length <= LONGEST => length,
        httparse::Status::Partial if bytes.len() <= LONGEST => return Ok(None),
        httparse::Status::Complete(_) | httparse::Status::Partial => return Err(BadResponse::TooLong),
    };
    let status = StatusCode::from_u16(parsed.code.unwrap_or_default()).map_err(|_| BadResponse::Value)?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let count = parsed.headers.len();
    let start = bytes.as_ptr() as usize;
    // names are looked up now; values become pieces of these very bytes, so only their places are kept
    let mut places = smallvec::SmallVec::<[(HeaderName, usize, usize); 24]>::with_capacity(count);
    for line in parsed.headers.iter() {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| BadResponse::Value)?;
        places.push((name, line.value.as_ptr() as usize - start, line.value.len()));
    }
    let head = bytes.split_to(length).freeze();
    let mut headers = HeaderMap::with_capacity(count);
    for (name, at, length) in places {
        let value = if length == 0 {
            HeaderValue::from_static("")
        } else {
            let piece = head.slice(at..at + length);
            HeaderValue::from_maybe_shared(piece).map_err(|_| BadResponse::Value)?
        };
        headers.append(name, value);
    }
    let (body, keep_alive) = body_of(status, version, &headers, method)?;
    Ok(Some(ResponseHead { status, version, headers, body, keep_alive }))
}

/// Where the body of a response ends (RFC 9112, section 6.3), and whether the connection stays.
fn body_of(
    status: StatusCode,
    version: Version,
    headers: &HeaderMap,
    method: &Method,
) -> Result<(Decoder, bool), BadResponse> {
    if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) {
        return Err(BadResponse::Ambiguous);
    }
    let mut keep_alive = version == Version::HTTP_11;
    let mut closes = false;
    for value in headers.get_all(CONNECTION) {
        closes |= has_token(value, "close");
        keep_alive |= has_token(value, "keep-alive");
    }
    keep_alive &= !closes;
    if status == StatusCode::SWITCHING_PROTOCOLS || (method == Method::CONNECT && status.is_success()) {
        return Ok((Decoder::Length(0), false));
    }
    let bodiless = status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || method == Method::HEAD;
    if bodiless {
        return Ok((Decoder::Length(0), keep_alive));
    }
    if let Some(coding) = headers.get_all(TRANSFER_ENCODING).iter().next_back() {
        if version == Version::HTTP_10 {
            return Err(BadResponse::Encoding);
        }
        let last = coding.as_bytes().rsplit(|b| *b == b',').next().unwrap_or_default();
        if last.trim_ascii().eq_ignore_ascii_case(b"chunked") {
            return Ok((Decoder::chunked(), keep_alive));
        }
        return Ok((Decoder::UntilClose, false));
    }
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = lengths.next() else { return Ok((Decoder::UntilClose, false)) };
    let first = one_length(first).ok_or(BadResponse::Length)?;
    if lengths.any(|other| one_length(other) != Some(first)) {
        return Err(BadResponse::Length);
    }
    Ok((Decoder::Length(first), keep_alive))
}

fn has_token(value: &HeaderValue, token: &str) -> bool {
    value.as_bytes().split(|b| *b == b',').any(|t| t.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// A length; several of them in one line must be the same (RFC 9110, section 8.6).
fn one_length(value: &HeaderValue) -> Option<u64> {
    let mut all = value.as_bytes().split(|b| *b == b',').map(|part| digits(part.trim_ascii()));
    let first = all.next()??;
    all.all(|other| other == Some(first)).then_some(first)
}

fn length(value: &HeaderValue) -> Option<u64> {
    digits(value.as_bytes())
}

fn digits(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() || !bytes.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(
        method: &Method,
        headers: &[(&str, &str)],
        length: Option<u64>,
        bodiless: bool,
    ) -> (String, Framing) {
        let authority = HeaderValue::from_static("a:80");
        let headers: HeaderMap = headers
            .iter()
            .map(|(n, v)| (HeaderName::try_from(*n).unwrap(), HeaderValue::try_from(*v).unwrap()))
            .collect();
        let mut out = Vec::new();
        let (path, proper_case) = ("/x?y", false);
        let head = RequestHead {
            method,
            path,
            authority: &authority,
            headers: &headers,
            bodiless,
            length,
            proper_case,
        };
        let framing = head.write(&mut out);
        (String::from_utf8(out).unwrap(), framing)
    }

    #[test]
    fn a_requests_head_tells_where_its_body_ends() {
        let get = written(&Method::GET, &[("x-a", "1")], None, true);
        assert_eq!(get, ("GET /x?y HTTP/1.1\r\nhost: a:80\r\nx-a: 1\r\n\r\n".to_owned(), Framing::Length(0)));
        let told = written(&Method::POST, &[("content-length", "3")], Some(9), false);
        assert_eq!(told.1, Framing::Length(3));
        assert_eq!(told.0.matches("content-length").count(), 1);
        let known = written(&Method::POST, &[], Some(4), false);
        assert!(known.0.ends_with("content-length: 4\r\n\r\n") && known.1 == Framing::Length(4));
        let unknown = written(&Method::GET, &[("transfer-encoding", "gzip")], None, false);
        assert!(unknown.0.ends_with("a:80\r\ntransfer-encoding: chunked\r\n\r\n"), "{}", unknown.0);
        assert_eq!(unknown.1, Framing::Chunked);
    }

    #[test]
    fn names_can_be_written_in_proper_case() {
        let mut out = Vec::new();
        write_line(&mut out, "x-request-id", b"1", true);
        assert_eq!(out, b"X-Request-Id: 1\r\n");
    }

    #[test]
    fn only_announced_trailers_are_written() {
        let trailers = HeaderMap::from_iter([
            (HeaderName::from_static("x-sum"), HeaderValue::from_static("1")),
            (HeaderName::from_static("x-other"), HeaderValue::from_static("2")),
        ]);
        let mut out = Vec::new();
        write_trailers(&mut out, &trailers, &[HeaderName::from_static("x-sum")], false);
        assert_eq!(out, b"0\r\nx-sum: 1\r\n\r\n");
    }

    fn read(text: &str, method: &Method) -> Result<Option<ResponseHead>, BadResponse> {
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
        check(&ok("transfer-encoding: gzip, Chunked\r\n"), get, 200, &Decoder::chunked(), true);
        check(&ok("transfer-encoding: chunked, gzip\r\n"), get, 200, close, false);
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
                BadResponse::Length
            );
        }
        let both = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n";
        assert_eq!(bad(both), BadResponse::Ambiguous);
        assert_eq!(bad("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"), BadResponse::Encoding);
        for text in ["HTTP/2 200 OK\r\n\r\n", "nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\na b: c\r\n\r\n", "\0"] {
            assert!(matches!(bad(text), BadResponse::Syntax(_)), "{text:?}");
        }
        assert_eq!(bad("HTTP/1.1 099 No\r\n\r\n"), BadResponse::Value);
        let many = "a: b\r\n".repeat(MOST_HEADERS + 1);
        let many = format!("HTTP/1.1 200 OK\r\n{many}\r\n");
        assert_eq!(bad(&many), BadResponse::Syntax(httparse::Error::TooManyHeaders));
        let long = format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(LONGEST));
        assert_eq!(bad(&long), BadResponse::TooLong);
    }
}
