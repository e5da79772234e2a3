//! Heads of requests: written to endpoints, read from clients. Without IO.
//!
//! What can be read in two ways is not read at all: whoever is behind or before this proxy might choose the other one.

use std::mem::MaybeUninit;

use bytes::BytesMut;
use http::header::{self, CONTENT_LENGTH, HeaderMap, HeaderValue, TRANSFER_ENCODING};
use http::{Method, Uri, Version};

use super::body::{Decoder, Framing};
use super::head::{
    self, Malformed, Place, Places, connection, decimal, length, lines_end_whole, place, write_line,
};

/// The longest target that the types of what comes behind can hold.
const LONGEST_TARGET: usize = 65_534;
/// The most headers of a request whose lines take no room of their own.
const USUAL_HEADERS: usize = 100;
/// The shortest line of a header, in bytes: `a:` and its end.
const SHORTEST_LINE: usize = 4;

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
            if !matches!(*name, TRANSFER_ENCODING | CONTENT_LENGTH) {
                self.line(out, name.as_str(), value.as_bytes());
            }
        }
        let framing = match told.or(self.length.filter(|_| !self.bodiless)) {
            Some(length) => {
                self.line(out, CONTENT_LENGTH.as_str(), decimal(length, &mut [0; 20]));
                Framing::Length(if self.bodiless { 0 } else { length })
            }
            None if self.bodiless => Framing::Length(0),
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

/// The head of a request that was read.
#[derive(Debug)]
pub struct Request {
    /// Method.
    pub method: Method,
    /// Target: a path, or an absolute URI, or what CONNECT names.
    pub uri: Uri,
    /// HTTP/1.0 or 1.1.
    pub version: Version,
    /// Headers.
    pub headers: HeaderMap,
    /// What finds its body in what follows.
    pub body: Decoder,
    /// Whether the client wants to send another request after this one.
    pub keep_alive: bool,
    /// The client waits for a `100 Continue` before it sends the body.
    pub expects: bool,
    /// The client reads trailers.
    pub takes_trailers: bool,
}

/// How long the head of a request may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Lines.
    pub headers: usize,
    /// Bytes.
    pub bytes: usize,
}

/// Takes the head of a request off the front of `bytes`; `None` while it is not whole. Empty lines before it are
/// skipped (RFC 9112, section 2.2).
///
/// # Errors
///
/// When it is none, is too long, or can be read in two ways.
pub fn read_request(bytes: &mut BytesMut, limits: Limits) -> Result<Option<Request>, Malformed> {
    let empty = empty_lines(bytes);
    if empty > 0 {
        drop(bytes.split_to(empty));
    }
    if bytes.is_empty() {
        return Ok(None);
    }
    let mut places = Places::new();
    let parsed = if limits.headers <= USUAL_HEADERS {
        let mut lines = [const { MaybeUninit::uninit() }; USUAL_HEADERS];
        parse(bytes, limits.bytes, lines.get_mut(..limits.headers).unwrap_or_default(), &mut places)
    } else {
        let lines = limits.headers.min(bytes.len() / SHORTEST_LINE + 1);
        parse(bytes, limits.bytes, &mut vec![MaybeUninit::uninit(); lines], &mut places)
    };
    let Some(parsed) = parsed? else { return Ok(None) };
    let head = head::split(bytes, parsed.length);
    let target = head::piece(&head, parsed.target);
    if target.len() > LONGEST_TARGET {
        return Err(Malformed::TargetTooLong);
    }
    let uri = Uri::from_maybe_shared(target).map_err(|_| Malformed::Target)?;
    let headers = head::headers(&head, &mut places)?;
    let told = Told::of(&headers)?;
    let keep_alive = !told.closes && (parsed.version == Version::HTTP_11 || told.keeps);
    let (body, keep_alive) = match (told.codings, told.length) {
        (0, length) => (Decoder::Length(length.unwrap_or(0)), keep_alive),
        (_, Some(_)) => return Err(Malformed::Ambiguous),
        // nobody can know what the client means: whoever is asked next refuses it
        _ if parsed.version == Version::HTTP_10 => (Decoder::Length(0), false),
        (1, None) if told.chunked => (Decoder::chunked(), keep_alive),
        _ => return Err(Malformed::Unknown),
    };
    Ok(Some(Request {
        method: parsed.method,
        uri,
        version: parsed.version,
        headers,
        body,
        keep_alive,
        expects: told.expects && parsed.version == Version::HTTP_11,
        takes_trailers: told.takes_trailers && parsed.version == Version::HTTP_11,
    }))
}

/// How many bytes of empty lines come first.
fn empty_lines(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    while let Some(next) = rest.strip_prefix(b"\r\n") {
        rest = next;
    }
    bytes.len() - rest.len()
}

/// Whether the bytes from here on have an empty line: only then a head that was not whole can be.
#[must_use]
pub fn may_be_whole(bytes: &[u8], seen: usize) -> bool {
    let new = bytes.get(seen.saturating_sub(3)..).unwrap_or_default();
    let ends = |at: usize| matches!(new.get(at + 1..), Some([b'\n', ..] | [b'\r', b'\n', ..]));
    new.iter().enumerate().any(|(at, byte)| *byte == b'\n' && ends(at))
}

/// A head's parts, but its headers.
struct Parsed {
    method: Method,
    target: Place,
    version: Version,
    length: usize,
}

fn parse<'b>(
    bytes: &'b [u8],
    longest: usize,
    lines: &mut [MaybeUninit<httparse::Header<'b>>],
    places: &mut Places,
) -> Result<Option<Parsed>, Malformed> {
    let mut request = httparse::Request::new(&mut []);
    let found =
        httparse::ParserConfig::default().parse_request_with_uninit_headers(&mut request, bytes, lines);
    let length = match found.map_err(|error| told(error, bytes))? {
        httparse::Status::Complete(length) if length > longest => return Err(Malformed::TooLong(longest)),
        httparse::Status::Complete(length) if !lines_end_whole(bytes, length) => {
            return Err(Malformed::Syntax(httparse::Error::NewLine));
        }
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial if bytes.len() <= longest => return Ok(None),
        httparse::Status::Partial => return Err(Malformed::TooLong(longest)),
    };
    let method = Method::from_bytes(request.method.unwrap_or_default().as_bytes());
    head::find(bytes, request.headers, places)?;
    Ok(Some(Parsed {
        method: method.map_err(|_| Malformed::Value)?,
        target: place(bytes, request.path.unwrap_or_default().as_bytes()),
        version: if request.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 },
        length,
    }))
}

/// What is wrong with a head.
fn told(error: httparse::Error, bytes: &[u8]) -> Malformed {
    let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default().trim_ascii_end();
    let mut words = line.split(|b| *b == b' ');
    let version = words.nth(2).filter(|_| words.next().is_none());
    let other = error == httparse::Error::Version && version.is_some_and(|v| v.starts_with(b"HTTP/"));
    if other { Malformed::Version } else { Malformed::Syntax(error) }
}

/// What the headers of a request say about its body and its connection.
#[derive(Default)]
struct Told {
    codings: u32,
    chunked: bool,
    length: Option<u64>,
    closes: bool,
    keeps: bool,
    expects: bool,
    takes_trailers: bool,
}

impl Told {
    fn of(headers: &HeaderMap) -> Result<Self, Malformed> {
        let mut told = Self::default();
        for (name, value) in headers {
            let is = |word: &[u8]| value.as_bytes().eq_ignore_ascii_case(word);
            match *name {
                header::TRANSFER_ENCODING => {
                    told.codings += 1;
                    told.chunked = is(b"chunked");
                }
                header::CONTENT_LENGTH => {
                    let length = length(value).ok_or(Malformed::Length)?;
                    if told.length.replace(length).is_some() {
                        return Err(Malformed::Length);
                    }
                }
                header::CONNECTION => {
                    let (closes, keeps) = connection([value]);
                    told.closes |= closes;
                    told.keeps |= keeps;
                }
                header::EXPECT => told.expects = is(b"100-continue"),
                header::TE => told.takes_trailers |= is(b"trailers"),
                _ => {}
            }
        }
        Ok(told)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

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
        let none = written(&Method::POST, &[("content-length", "0")], None, true);
        assert!(none.0.ends_with("content-length: 0\r\n\r\n") && none.1 == Framing::Length(0));
        let unclear = written(&Method::POST, &[("content-length", "")], None, false);
        assert!(!unclear.0.contains("content-length") && unclear.1 == Framing::Chunked);
        let unknown = written(&Method::GET, &[("transfer-encoding", "gzip")], None, false);
        assert!(unknown.0.ends_with("a:80\r\ntransfer-encoding: chunked\r\n\r\n"), "{}", unknown.0);
        assert_eq!(unknown.1, Framing::Chunked);
    }

    const LIMITS: Limits = Limits { headers: 100, bytes: 8192 };

    fn from_client(text: &str) -> Result<Option<Request>, Malformed> {
        read_request(&mut BytesMut::from(text), LIMITS)
    }

    fn whole(lines: &str) -> Result<Request, Malformed> {
        Ok(from_client(&format!("POST /x?y HTTP/1.1\r\nhost: a\r\n{lines}\r\n"))?.unwrap())
    }

    #[test]
    fn a_request_is_read_as_it_is_written() {
        let text = "\r\n\r\nPOST /x?y HTTP/1.1\r\nHost: a\r\nx-a:  1 \r\nX-A: 2\r\nx-b:\r\n\r\nnext";
        let mut bytes = BytesMut::from(text);
        let request = read_request(&mut bytes, LIMITS).unwrap().unwrap();
        assert_eq!((request.method, request.uri.to_string()), (Method::POST, "/x?y".to_owned()));
        assert_eq!(request.headers.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(
            (&request.headers["host"], &request.headers["x-b"]),
            (&"a".parse().unwrap(), &"".parse().unwrap())
        );
        assert_eq!((request.body, request.keep_alive), (Decoder::Length(0), true));
        assert_eq!(&bytes[..], b"next");
        for cut in 0..text.len() - 4 {
            assert!(from_client(&text[..cut]).unwrap().is_none(), "{cut}");
        }
    }

    #[test]
    fn a_body_ends_in_one_way_or_the_request_is_refused() {
        let body = |lines: &str| whole(lines).map(|r| r.body);
        assert_eq!(body(""), Ok(Decoder::Length(0)));
        assert_eq!(body("content-length: 3\r\n"), Ok(Decoder::Length(3)));
        assert_eq!(body("transfer-encoding: CHUNKED\r\n"), Ok(Decoder::chunked()));
        for twice in [
            "3\r\ncontent-length: 3",
            "3\r\nContent-Length: 4",
            "3, 3",
            "+3",
            "",
            "1 0",
            "99999999999999999999",
        ] {
            assert_eq!(body(&format!("content-length: {twice}\r\n")), Err(Malformed::Length), "{twice}");
        }
        for both in [
            "content-length: 3\r\ntransfer-encoding: chunked",
            "Transfer-Encoding: chunked\r\ncontent-length: 3",
            "content-length: 0\r\ntransfer-encoding: x",
        ] {
            assert_eq!(body(&format!("{both}\r\n")), Err(Malformed::Ambiguous), "{both}");
        }
        for coding in [
            "gzip",
            "gzip, chunked",
            "chunked, chunked",
            "chunked\r\ntransfer-encoding: chunked",
            "chunked\r\ntransfer-encoding: identity",
            "identity",
            "",
        ] {
            assert_eq!(
                body(&format!("transfer-encoding: {coding}\r\n")),
                Err(Malformed::Unknown),
                "{coding}"
            );
        }
        let old = from_client("POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n").unwrap().unwrap();
        assert_eq!((old.body, old.keep_alive), (Decoder::Length(0), false));
    }

    #[test]
    fn a_client_says_what_it_wants_of_its_connection() {
        let keeps = |version: &str, lines: &str| {
            from_client(&format!("GET / HTTP/1.{version}\r\n{lines}\r\n")).unwrap().unwrap().keep_alive
        };
        assert!(
            keeps("1", "") && keeps("1", "connection: x\r\n") && keeps("0", "connection: Keep-Alive\r\n")
        );
        assert!(!keeps("0", "") && !keeps("1", "connection: x, Close\r\n"));
        assert!(!keeps("1", "connection: close\r\nconnection: keep-alive\r\n"));
        assert!(
            whole("expect: 100-Continue\r\n").unwrap().expects && !whole("expect: x\r\n").unwrap().expects
        );
        assert!(
            whole("te: trailers\r\n").unwrap().takes_trailers
                && !whole("te: gzip\r\n").unwrap().takes_trailers
        );
    }

    #[test]
    fn what_is_no_head_or_too_long_is_refused() {
        for text in [
            "GE T / HTTP/1.1\r\n\r\n",
            "\rGET / HTTP/1.1\r\n\r\n",
            "GET  / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\na b: c\r\n\r\n",
            "\0",
            "\nGET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\na: b\r\n\r\n",
            "GET / HTTP/1.1\r\na: b\n\r\n",
            "GET / HTTP/1.1\r\na: b\r\n\n",
            "GET / HTTP/1.1\r\na: b\r\n c\r\n\r\n",
        ] {
            assert!(matches!(from_client(text), Err(Malformed::Syntax(_))), "{text:?}");
        }
        assert_eq!(from_client("GET / HTTP/2.0\r\n\r\n").unwrap_err(), Malformed::Version);
        assert_eq!(from_client("GET http:// HTTP/1.1\r\n\r\n").unwrap_err(), Malformed::Target);
        let long = format!("GET / HTTP/1.1\r\na: {}", "b".repeat(LIMITS.bytes));
        assert_eq!(from_client(&long).unwrap_err(), Malformed::TooLong(LIMITS.bytes));
        assert_eq!(from_client(&(long + "\r\n\r\n")).unwrap_err(), Malformed::TooLong(LIMITS.bytes));
        let many = |n: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(n));
        assert!(from_client(&many(LIMITS.headers)).unwrap().is_some());
        assert_eq!(
            from_client(&many(LIMITS.headers + 1)).unwrap_err(),
            Malformed::Syntax(httparse::Error::TooManyHeaders)
        );
        for headers in [5, 200] {
            let limits = Limits { headers, ..LIMITS };
            assert!(read_request(&mut BytesMut::from(&*many(headers)), limits).unwrap().is_some());
            assert!(read_request(&mut BytesMut::from(&*many(headers + 1)), limits).is_err());
        }
        let most = Limits { headers: usize::MAX, ..LIMITS };
        let short = format!("GET / HTTP/1.1\r\n{}\r\n", "a:\r\n".repeat(2000));
        assert_eq!(read_request(&mut BytesMut::from(&*short), most).unwrap().unwrap().headers.len(), 2000);
        let target = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(LONGEST_TARGET));
        let limits = Limits { bytes: usize::MAX, ..LIMITS };
        assert_eq!(
            read_request(&mut BytesMut::from(&*target), limits).unwrap_err(),
            Malformed::TargetTooLong
        );
    }

    proptest::proptest! {
        #[test]
        fn a_head_is_whole_only_where_a_line_is_empty(
            bytes in proptest::collection::vec(proptest::sample::select(b"GET / HTTP/1.1\r\n\n\r\na: b".to_vec()), 0..60),
            seen in 0_usize..60,
        ) {
            let text = [&b"GET / HTTP/1.1\r\na: b\r\n"[..], &bytes].concat();
            let seen = seen.min(text.len());
            let before = read_request(&mut BytesMut::from(&text[..seen]), LIMITS);
            let after = read_request(&mut BytesMut::from(&text[..]), LIMITS);
            if matches!(before, Ok(None)) && matches!(after, Ok(Some(_))) {
                proptest::prop_assert!(may_be_whole(&text, seen));
            }
        }
    }
}
