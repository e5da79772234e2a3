//! Requests that come near the rules of a scenario. Pure.

use std::fmt;

use bytes::Bytes;

use super::dice::Dice;
use super::scenario::{Hint, NAMES, PARAMETERS, Scenario, VALUES};

/// Names that are odd and legal (RFC 9110, section 5.6.2).
const ODD: [&str; 9] = ["x!a", "x#a", "x'a", "x.a", "x|a", "x~a", "X_A", "1", "x-a-"];
/// Bytes that paths hold, rightly or wrongly.
const MARKS: [&str; 22] = [
    "%2F", "%2f", "%5C", "\\", "%61", "%2e", "%zz", "%", "%7E", "%20", "%25", "%2561", ";p=1", ":", "@", "'",
    "\"", "|", "^", "{x}", "<", "`",
];

/// A request as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: &'static str,
    /// The target: a path, or a whole URI.
    pub(crate) target: Vec<u8>,
    /// `host` and all others, but `content-length`.
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    pub(crate) body: Option<usize>,
    /// Whether the length of the body is told before it.
    pub(crate) told: bool,
    /// Whether trailers follow the body; over HTTP/1 only where its length is not told.
    pub(crate) trailers: bool,
    /// Over HTTP/2, and how it names its host.
    pub(crate) http2: Option<Named>,
}

/// How a request over HTTP/2 says to whom it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Named {
    /// By `:authority`.
    Authority,
    /// By `host` alone.
    Host,
    /// By `:authority`, beside a `host` that says something else.
    Both,
}

impl Request {
    /// One that asks for nothing in particular.
    pub(crate) fn plain() -> Self {
        let headers = vec![("host".to_owned(), b"x".to_vec())];
        let target = b"/".to_vec();
        Self { method: "GET", target, headers, body: None, told: true, trailers: false, http2: None }
    }

    /// The requests of a seed.
    pub(crate) fn some(scenario: &Scenario, seed: u64, count: usize) -> Vec<Self> {
        // Other draws than the scenario's.
        let mut dice = Dice::new(seed ^ 0x5eed_0000_0000_0000);
        (0..count).map(|_| Self::new(scenario, &mut dice)).collect()
    }

    fn new(scenario: &Scenario, dice: &mut Dice) -> Self {
        let nowhere = Hint { host: "none.example".to_owned(), path: "/a".to_owned(), ..Hint::default() };
        let hint = if scenario.hints.is_empty() { &nowhere } else { dice.pick(&scenario.hints) };
        let method = match hint.method {
            Some(method) if !dice.one_in(4) => method,
            _ => {
                *dice.pick(&["GET", "GET", "GET", "GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH"])
            }
        };
        let host = host(dice, &hint.host);
        let mut headers = headers(dice, hint);
        let preflight = method == "OPTIONS" && dice.one_in(2);
        if preflight || dice.one_in(6) {
            let origins = [
                "https://good.example",
                "https://x.fine.example",
                "https://bad.test",
                "https://a.b",
                "",
                "null",
            ];
            headers.push(("origin".to_owned(), dice.pick(&origins).as_bytes().to_vec()));
        }
        if preflight {
            headers.push(("access-control-request-method".to_owned(), b"PUT".to_vec()));
            if dice.one_in(3) {
                headers.push(("access-control-request-private-network".to_owned(), b"true".to_vec()));
            }
        }
        let (mut target, mut sent) = (path(dice, &hint.path), host.clone());
        target.extend(query(dice, hint).into_bytes());
        if dice.one_in(12) {
            let scheme = dice.pick(&["http", "http", "HTTP", "https"]);
            if dice.one_in(6) {
                target = query(dice, hint).into_bytes();
            }
            target.splice(0..0, format!("{scheme}://{host}").into_bytes());
            sent = (*dice.pick(&["other.example", &host])).to_owned();
        }
        headers.insert(dice.from(0..headers.len() + 1), ("host".to_owned(), sent.into_bytes()));
        let body =
            matches!(method, "POST" | "PUT" | "PATCH").then(|| dice.from(0..40)).filter(|_| dice.one_in(2));
        let told = dice.one_in(2);
        let trailers = body.is_some() && !told && dice.one_in(4);
        let mut request = Self { method, target, headers, body, told, trailers, http2: None };
        request.http2 = dice.one_in(3).then(|| match dice.from(0..16) {
            0 => Named::Host,
            1 => Named::Both,
            _ => Named::Authority,
        });
        if request.over_http2("").is_none() {
            request.http2 = None;
        }
        request
    }

    /// As it is asked at this port.
    pub(crate) fn on(&self, port: u16) -> Self {
        let port = port.to_string();
        let mut request = self.clone();
        request.target = replaced(&request.target, &port);
        request.headers.iter_mut().for_each(|(_, value)| *value = replaced(value, &port));
        request
    }

    /// Its body's bytes.
    pub(crate) fn content(&self) -> Option<Bytes> {
        self.body.map(|length| vec![b'x'; length].into())
    }

    /// Its head as it goes over HTTP/2; `None` when the library would send something else.
    pub(crate) fn over_http2(&self, name: &str) -> Option<http::Request<()>> {
        let host = std::str::from_utf8(self.header("host")?).ok()?;
        let target = std::str::from_utf8(&self.target).ok().filter(|target| target.starts_with('/'))?;
        let mut request = http::Request::builder().method(self.method);
        request = match self.http2? {
            Named::Authority => request.uri(format!("http://{host}{target}")),
            Named::Both => request.uri(format!("http://{host}{target}")).header("host", "other.example"),
            // a request of HTTP/2 needs an authority, for the library; one of HTTP/1 that goes over it does not
            Named::Host => request.uri(target).header("host", host).version(http::Version::HTTP_11),
        };
        for (name, value) in self.headers.iter().filter(|(name, _)| name != "host") {
            let hop_by_hop = matches!(name.as_str(), "connection" | "keep-alive");
            if hop_by_hop || (name == "te" && value != b"trailers") {
                return None;
            }
            request = request.header(name, value.as_slice());
        }
        if let Some(length) = self.body.filter(|_| self.told) {
            request = request.header("content-length", length);
        }
        let request = request.header("x-case", name).body(()).ok()?;
        let uri = request.uri();
        let kept = uri.authority().is_none_or(|a| a.as_str() == host)
            && uri.path_and_query().is_some_and(|p| p.as_str() == target);
        kept.then_some(request)
    }

    /// Its bytes, with the name by which access logs tell it.
    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        let mut bytes = [self.method.as_bytes(), b" ", &self.target, b" HTTP/1.1\r\n"].concat();
        let name = ("x-case".to_owned(), name.as_bytes().to_vec());
        let framing = self.body.map(|body| match self.told {
            true => ("content-length".to_owned(), body.to_string().into_bytes()),
            false => ("transfer-encoding".to_owned(), b"chunked".to_vec()),
        });
        for (name, value) in self.headers.iter().chain([&name]).chain(&framing) {
            bytes.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
        }
        bytes.extend(b"\r\n");
        let body = self.content().unwrap_or_default();
        if self.told || self.body.is_none() {
            return [bytes, body.to_vec()].concat();
        }
        if !body.is_empty() {
            bytes.extend([format!("{:x}\r\n", body.len()).as_bytes(), &body, b"\r\n"].concat());
        }
        bytes.extend(b"0\r\n");
        bytes.extend(if self.trailers { b"x-trailer: behind\r\n".as_slice() } else { b"" });
        bytes.extend(b"\r\n");
        bytes
    }

    /// The value of a header that is there once.
    pub(crate) fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_slice())
    }

    /// The path, without the query and what may stand before it.
    pub(crate) fn path(&self) -> &[u8] {
        let whole = self.target.split(|b| *b == b'?').next().unwrap_or_default();
        let before = if whole.starts_with(b"/") {
            0
        } else {
            whole.splitn(4, |b| *b == b'/').take(3).map(|p| p.len() + 1).sum()
        };
        whole.get(before.saturating_sub(1)..).filter(|_| before > 0).unwrap_or(whole)
    }

    /// Whether it has user information in its host, which is not taken from a whole URI.
    pub(crate) fn has_user(&self) -> bool {
        let host = self.header("host").unwrap_or_default();
        self.target.starts_with(b"/") && host.contains(&b'@')
    }

    /// Whether the name of one of its headers has `_`.
    pub(crate) fn has_underscore(&self) -> bool {
        self.headers.iter().any(|(name, _)| name.contains('_'))
    }

    /// Whether its authority has capital letters.
    pub(crate) fn has_host_in_capitals(&self) -> bool {
        let host = self.header("host").unwrap_or_default();
        let whole = self.target.split(|b| *b == b'/').nth(2).filter(|_| self.target.contains(&b':'));
        whole.into_iter().chain([host]).any(|host| host.iter().any(u8::is_ascii_uppercase))
    }

    /// Requests that ask for a little less.
    pub(crate) fn smaller(&self) -> Vec<Self> {
        let without = (0..self.headers.len()).filter(|at| self.headers[*at].0 != "host").map(|at| {
            let mut less = self.clone();
            less.headers.remove(at);
            less
        });
        let cut = |target: Vec<u8>| Self { target, ..self.clone() };
        let query = self.target.iter().position(|b| *b == b'?').map(|at| cut(self.target[..at].to_vec()));
        let body = self.body.map(|_| Self { body: None, trailers: false, ..self.clone() });
        let told = (!self.told).then(|| Self { told: true, trailers: false, ..self.clone() });
        let bare = self.trailers.then(|| Self { trailers: false, ..self.clone() });
        let get = (self.method != "GET").then(|| Self { method: "GET", ..self.clone() });
        let http1 = self.http2.map(|_| Self { http2: None, ..self.clone() });
        let named = self.http2.filter(|named| *named != Named::Authority);
        let named = named.map(|_| Self { http2: Some(Named::Authority), ..self.clone() });
        let simpler = [bare, told, body, get, named, http1];
        without.chain(query).chain(simpler.into_iter().flatten()).collect()
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over =
            self.http2.map_or_else(|| "HTTP/1".to_owned(), |named| format!("HTTP/2, named by {named:?}"));
        writeln!(f, "{} {} ({over})", self.method, self.target.escape_ascii())?;
        for (name, value) in &self.headers {
            writeln!(f, "{name}: {}", value.escape_ascii())?;
        }
        let told = if self.told { "told" } else { "not told" };
        let trailers = if self.trailers { ", trailers" } else { "" };
        self.body.map_or(Ok(()), |body| writeln!(f, "({body} bytes of a body, {told}{trailers})"))
    }
}

/// With the port in its place.
fn replaced(bytes: &[u8], port: &str) -> Vec<u8> {
    match bytes.windows(4).position(|w| w == b"PORT") {
        Some(at) => [&bytes[..at], port.as_bytes(), &bytes[at + 4..]].concat(),
        None => bytes.to_vec(),
    }
}

fn host(dice: &mut Dice, host: &str) -> String {
    let bare = host.split(':').next().unwrap_or_default();
    if dice.one_in(60) {
        return format!("{}@{host}", dice.pick(&["user", "user:pass", ""]));
    }
    match dice.from(0..16) {
        0 => host.to_ascii_uppercase(),
        1 => format!("{bare}:8080"),
        2 => format!("{bare}:80"),
        3 => format!("y.{host}"),
        4 => bare.to_owned(),
        5 => "none.test".to_owned(),
        6 => "[::1]:8080".to_owned(),
        // Its port is filled in when it is sent.
        7 => format!("{bare}:PORT"),
        _ => host.to_owned(),
    }
}

fn path(dice: &mut Dice, path: &str) -> Vec<u8> {
    let mut path = path.as_bytes().to_vec();
    for _ in 0..dice.from(0..3) {
        let at = dice.from(0..path.len()) + 1;
        let piece = match dice.from(0..14) {
            0 => "/",
            1 => "/.",
            2 => "/..",
            3 => "/./",
            4 => "/../a",
            5 => "/x",
            6 => "x",
            7 | 8 => dice.pick(&MARKS),
            9 if dice.one_in(6) => "é",
            10 => {
                path[at - 1] = path[at - 1].to_ascii_uppercase();
                ""
            }
            11 => {
                let escaped = if at > 1 { format!("%{:02x}", path[at - 1]) } else { "/".to_owned() };
                path.splice(at - 1..at, escaped.into_bytes());
                ""
            }
            12 if path.len() > 1 => {
                path.pop();
                ""
            }
            _ => "/b",
        };
        let at = if dice.one_in(2) { path.len() } else { at.min(path.len()) };
        path.splice(at..at, piece.bytes());
    }
    path
}

fn query(dice: &mut Dice, hint: &Hint) -> String {
    let mut parts: Vec<String> = hint
        .query
        .iter()
        .filter(|_| !dice.one_in(5))
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    if dice.one_in(4) {
        let (name, value) = (*dice.pick(&PARAMETERS), *dice.pick(&["1", "one", "%31", "a+b", "a b"]));
        let value = value.replace(' ', "%20");
        let odd = [
            format!("{name}={value}"),
            format!("{name}=={value}"),
            name.to_owned(),
            format!("={value}"),
            format!("{name}={value};v=1"),
            format!("%71={value}"),
            String::new(),
            format!("{name}={value}?x=/../"),
        ];
        parts.insert(dice.from(0..parts.len() + 1), dice.pick(&odd).clone());
    }
    // What the server is asked to do.
    match dice.from(0..14) {
        0 => parts.push(format!(
            "status={}&fail={}&key={}",
            dice.pick(&[404, 409, 500, 502, 503]),
            dice.from(0..4),
            dice.from(0..1 << 30)
        )),
        1 => parts.push(format!("status={}", dice.pick(&[204, 301, 304, 404, 409, 500, 503]))),
        2 => {
            let set = [
                "x-u:told",
                "server:own",
                "x-a:own",
                "x-again:yes",
                "content-type:text/x",
                "set-cookie:s=1",
                "x-envoy-upstream-service-time:9",
            ];
            parts.push(format!("set={}", dice.pick(&set)));
        }
        3 if dice.one_in(3) => parts.push(format!("reset=1&fail=1&key={}", dice.from(0..1 << 30))),
        _ => {}
    }
    match (parts.is_empty(), dice.from(0..30)) {
        (true, 0) => "?".to_owned(),
        (true, 1) if dice.one_in(4) => "#part".to_owned(),
        (true, _) => String::new(),
        (false, 0) if dice.one_in(4) => format!("?{}#part?x", parts.join("&")),
        (false, _) => format!("?{}", parts.join("&")),
    }
}

fn headers(dice: &mut Dice, hint: &Hint) -> Vec<(String, Vec<u8>)> {
    let mut headers: Vec<(String, Vec<u8>)> = Vec::new();
    for (name, value) in &hint.headers {
        let value = if dice.one_in(4) { *dice.pick(&VALUES) } else { value };
        if !dice.one_in(6) {
            headers.push((name.clone(), value.as_bytes().to_vec()));
        }
        if dice.one_in(6) {
            headers.push((name.clone(), dice.pick(&VALUES).as_bytes().to_vec()));
        }
    }
    for _ in 0..dice.from(0..3) {
        let name = *dice.pick(&NAMES);
        headers.push((name.to_owned(), dice.pick(&VALUES).as_bytes().to_vec()));
    }
    if dice.one_in(6) {
        let values: [&[u8]; 5] = [b"", b"1", b"\xe9", b"a\tb", b"a  "];
        headers.push(((*dice.pick(&ODD)).to_owned(), dice.pick(&values).to_vec()));
    }
    if dice.one_in(6) {
        let (name, value) = *dice.pick(&[
            ("x-forwarded-for", "10.1.2.3"),
            ("x-forwarded-for", "1.2.3.4, 5.6.7.8"),
            ("x-forwarded-proto", "https"),
            ("x-request-id", "mine"),
            ("x-envoy-ip-tags", "forged"),
            ("x-envoy-attempt-count", "7"),
            ("x-envoy-retry-on", "5xx"),
            ("x-envoy-decorator-operation", "op"),
            ("te", "trailers"),
            ("te", "gzip, trailers"),
            ("connection", "close"),
            ("connection", "x-a"),
            ("keep-alive", "timeout=5"),
            ("accept-encoding", "gzip"),
            ("via", "1.1 first"),
            ("server", "client"),
            ("content-type", "text/plain"),
            ("content-type", "application/grpc"),
            ("content-type", "application/grpc+proto"),
            ("content-type", "application/grpc-web"),
            ("content-type", "application/json"),
            ("x-forwarded-port", "1"),
        ]);
        headers.push((name.to_owned(), value.as_bytes().to_vec()));
    }
    headers
}
