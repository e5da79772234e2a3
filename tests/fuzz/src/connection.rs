//! Whole connections through a whole proxy: what a client sends as HTTP/1 or HTTP/2, and what a server of HTTP/1 behind
//! the proxy gets of it. Whatever the bytes are, the server sees requests that have one meaning, and none that the client
//! did not send.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proxy::Proxy;
use proxy::listener::detect::H2_PREFACE;
use tokio_util::sync::CancellationToken;

/// After so long without a byte nothing more comes.
const QUIET: Duration = Duration::from_millis(20);

/// A request: its method, and its body if that was whole.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Request {
    method: String,
    body: Option<Vec<u8>>,
}

/// What the server got, by the client that asked.
static SEEN: Mutex<BTreeMap<String, Vec<Request>>> = Mutex::new(BTreeMap::new());

fn seen() -> MutexGuard<'static, BTreeMap<String, Vec<Request>>> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the proxy listens.
static PROXY: LazyLock<SocketAddr> = LazyLock::new(|| {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = server.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for stream in server.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut config =
                proxy::bootstrap::parse(&bootstrap(port), jiff::Timestamp::UNIX_EPOCH).expect("valid");
            config.workers = 1;
            let proxy = Proxy::start(config, None).await.expect("a proxy");
            tell.send(proxy.tables().load().listeners["in"].sockets.local()[0]).expect("a listener");
            proxy.run(CancellationToken::new()).await;
        });
    });
    told.recv().expect("an address")
});

fn bootstrap(port: u16) -> String {
    format!(
        r#"
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: h
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          normalize_path: true
          merge_slashes: true
          route_config:
            name: r
            request_headers_to_add: [{{header: {{key: x-from, value: "%DOWNSTREAM_REMOTE_ADDRESS%"}}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}}]
            virtual_hosts:
            - {{name: v, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: up, timeout: 1s}}}}]}}
          http_filters:
          - name: r
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: up
    type: STATIC
    load_assignment: {{cluster_name: up, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}
"#
    )
}

/// How a head says that its body ends.
enum Framing {
    None,
    Length(usize),
    Chunks,
}

/// The one way to read a head; nothing if there are two.
fn framing(headers: &[httparse::Header<'_>]) -> Option<Framing> {
    let all = |name: &str| {
        let values = headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value);
        values.collect::<Vec<_>>()
    };
    match (&*all("content-length"), &*all("transfer-encoding")) {
        ([], []) => Some(Framing::None),
        ([length], []) if !length.is_empty() && length.iter().all(u8::is_ascii_digit) => {
            std::str::from_utf8(length).ok()?.parse().ok().map(Framing::Length)
        }
        ([], [coding]) if coding.eq_ignore_ascii_case(b"chunked") => Some(Framing::Chunks),
        _ => None,
    }
}

/// What a chunked body holds, and how long it is; `Err(true)` when it is not whole yet.
fn chunks(mut bytes: &[u8]) -> Result<(Vec<u8>, usize), bool> {
    let whole = bytes.len();
    let mut out = Vec::new();
    loop {
        let end = bytes.windows(2).position(|w| w == b"\r\n").ok_or(bytes.len() < 8192)?;
        let (line, rest) = (&bytes[..end], &bytes[end + 2..]);
        let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let extended = line[digits..].trim_ascii_start();
        if !(1..=15).contains(&digits) || !(extended.is_empty() || extended.starts_with(b";")) {
            return Err(false);
        }
        let text = std::str::from_utf8(&line[..digits]).map_err(|_| false)?;
        let size = usize::from_str_radix(text, 16).map_err(|_| false)?;
        bytes = rest;
        if size == 0 {
            break;
        }
        let data = bytes.get(..size).ok_or(true)?;
        out.extend_from_slice(data);
        match bytes.get(size..size + 2) {
            Some(b"\r\n") => bytes = &bytes[size + 2..],
            Some(_) => return Err(false),
            None => return Err(true),
        }
    }
    // trailers
    loop {
        let end = bytes.windows(2).position(|w| w == b"\r\n").ok_or(true)?;
        bytes = &bytes[end + 2..];
        if end == 0 {
            return Ok((out, whole - bytes.len()));
        }
    }
}

/// The requests in what a client sends, up to the first that has no single meaning.
fn reference(mut bytes: &[u8]) -> Vec<Request> {
    let mut all = Vec::new();
    loop {
        let mut fields = [httparse::EMPTY_HEADER; 100];
        let mut head = httparse::Request::new(&mut fields);
        let Ok(httparse::Status::Complete(length)) = head.parse(bytes) else { return all };
        let method = head.method.unwrap_or_default().to_owned();
        let Some(framing) = framing(head.headers) else { return all };
        if bytes[..length].windows(2).any(|w| w[1] == b'\n' && w[0] != b'\r') {
            return all;
        }
        bytes = &bytes[length..];
        let (body, length) = match framing {
            Framing::None => (Some(Vec::new()), 0),
            Framing::Length(n) => (bytes.get(..n).map(<[u8]>::to_vec), n),
            Framing::Chunks => match chunks(bytes) {
                Ok((body, length)) => (Some(body), length),
                Err(_) => (None, 0),
            },
        };
        let over = body.is_none();
        all.push(Request { method, body });
        if over {
            return all;
        }
        bytes = bytes.get(length..).unwrap_or_default();
    }
}

/// A server that is strict, and answers each request with 200.
struct Server {
    stream: TcpStream,
    bytes: Vec<u8>,
}

fn serve(stream: TcpStream) {
    let mut server = Server { stream, bytes: Vec::new() };
    while server.request().is_some() {}
}

impl Server {
    fn more(&mut self) -> Option<()> {
        let mut piece = [0; 4096];
        let n = self.stream.read(&mut piece).ok().filter(|n| *n > 0)?;
        self.bytes.extend_from_slice(&piece[..n]);
        Some(())
    }

    /// Reads and answers one request; nothing when the connection is over.
    fn request(&mut self) -> Option<()> {
        let (length, (method, from, framing)) = loop {
            let mut fields = [httparse::EMPTY_HEADER; 200];
            let mut head = httparse::Request::new(&mut fields);
            match head.parse(&self.bytes).unwrap_or_else(|e| panic!("{e}: {}", self.bytes.escape_ascii())) {
                httparse::Status::Complete(length) => break (length, checked(&self.bytes[..length], &head)),
                httparse::Status::Partial => self.more()?,
            }
        };
        self.bytes.drain(..length);
        let at = {
            let mut seen = seen();
            let all = seen.entry(from.clone()).or_default();
            all.push(Request { method, body: None });
            all.len() - 1
        };
        let (body, length) = loop {
            match &framing {
                Framing::None => break (Vec::new(), 0),
                Framing::Length(n) if self.bytes.len() >= *n => break (self.bytes[..*n].to_vec(), *n),
                Framing::Length(_) => {}
                Framing::Chunks => match chunks(&self.bytes) {
                    Ok(whole) => break whole,
                    Err(true) => {}
                    Err(false) => panic!("no chunks: {}", self.bytes.escape_ascii()),
                },
            }
            self.more()?;
        };
        self.bytes.drain(..length);
        if let Some(request) = seen().get_mut(&from).and_then(|all| all.get_mut(at)) {
            request.body = Some(body);
        }
        self.stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").ok()
    }
}

/// The method of a head, who asked, and how its body ends. A head that has two meanings, or that HTTP does not have, is
/// a finding.
fn checked(bytes: &[u8], head: &httparse::Request<'_, '_>) -> (String, String, Framing) {
    let told = bytes.escape_ascii();
    let only = |name: &str| {
        let values: Vec<_> = head.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name)).collect();
        let [one] = &*values else { panic!("{} of {name}: {told}", values.len()) };
        String::from_utf8_lossy(one.value).into_owned()
    };
    let bare = |w: &[u8]| (w[1] == b'\n') != (w[0] == b'\r');
    assert!(!bytes.windows(2).any(bare), "a bare line end: {told}");
    assert!(!bytes.contains(&0), "{told}");
    assert_eq!(head.version, Some(1), "{told}");
    let host = only("host");
    assert!(!host.is_empty() && !host.contains(['@', '/', ' ', '#', '?']), "{told}");
    let path = head.path.unwrap_or_default();
    assert!(path.starts_with('/') || path == "*", "{told}");
    assert!(!path.contains(['#', ' ']), "{told}");
    // a query is passed on as it is
    assert!(!path.split('?').next().unwrap_or_default().contains('\\'), "{told}");
    let framing = framing(head.headers).unwrap_or_else(|| panic!("two meanings: {told}"));
    (head.method.unwrap_or_default().to_owned(), only("x-from"), framing)
}

/// Sends bytes, and waits until nothing more comes. What the server saw of them.
fn exchange(bytes: &[u8]) -> Vec<Request> {
    let mut stream = TcpStream::connect(*PROXY).expect("a connection");
    let from = stream.local_addr().expect("an address").to_string();
    stream.set_read_timeout(Some(QUIET)).expect("a limit");
    let _sent = stream.write_all(bytes);
    let mut piece = [0; 16 * 1024];
    while stream.read(&mut piece).is_ok_and(|n| n > 0) {}
    let _shut = stream.shutdown(Shutdown::Both);
    let mut seen = seen();
    let mine = seen.remove(&from).unwrap_or_default();
    seen.clear();
    mine
}

/// HTTP/1.
pub fn http1(bytes: &[u8]) {
    if H2_PREFACE.starts_with(bytes) || bytes.starts_with(H2_PREFACE) {
        return;
    }
    let bytes = [bytes, b"\r\n\r\nGET /end HTTP/1.1\r\nhost: end\r\nconnection: close\r\n\r\n"].concat();
    let sent = reference(&bytes);
    let got = exchange(&bytes);
    assert!(got.len() <= sent.len(), "{got:?} of {sent:?}");
    // some are answered by the proxy
    let mut left = sent.iter();
    for one in &got {
        let is = |sent: &Request| one.method == sent.method && (one.body.is_none() || one.body == sent.body);
        assert!(left.any(is), "{one:?} in {got:?} of {sent:?}");
    }
}

/// HTTP/2, after the preface.
pub fn http2(bytes: &[u8]) {
    const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    let got = exchange(&[H2_PREFACE, SETTINGS, bytes].concat());
    let mut heads = 0;
    let mut rest = bytes;
    while let Some(([a, b, c, kind, ..], tail)) = rest.split_first_chunk::<9>() {
        heads += usize::from(*kind == 1);
        rest = tail.get(usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c)..).unwrap_or_default();
    }
    assert!(got.len() <= heads, "{got:?} of {heads} heads");
}
