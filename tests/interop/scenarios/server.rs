//! Servers that do as a request says, and note what they saw. Both proxies have the same ones, so that hashes of their
//! addresses are the same.
//!
//! The header `x-do-NAME` for the server of that name, or else `x-do`, says what is done at each attempt.
//! Names tell other servers: `tcp...` answers with what it got when that has ended, `echo...` sends every byte back,
//! `banner...` speaks first, `tls...` only tells its name, `secure...` speaks TLS behind the PROXY protocol and tells what
//! came, nobody listens behind `closed...`, and nobody takes
//! connections behind `full...`.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "each version of HTTP does some deeds in a way of its own"
)]

pub(crate) mod http2;
mod proxied;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tests::workload::free_port;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::wire::{Body, Fields, Wire, field};

/// Between what is sent and what breaks it off.
const PAUSE: Duration = Duration::from_millis(50);

/// What a server saw of a request.
#[derive(Debug, Clone)]
pub(crate) struct Sighting {
    /// The request's name.
    pub(crate) case: String,
    /// The server's.
    pub(crate) server: String,
    /// Which of the server's connections.
    pub(crate) connection: usize,
    pub(crate) lines: Vec<String>,
}

/// What the servers of a scenario saw.
pub(crate) type Book = Arc<Mutex<Vec<Sighting>>>;

/// A running server; it ends when it is dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    _held: Vec<TcpStream>,
    _stop: DropGuard,
}

/// What is done at one attempt: words joined by `+`. A number is the status; `name=value` is a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deed {
    status: u16,
    /// `wait300`: so many milliseconds before anything else.
    wait: Duration,
    headers: Fields,
    /// `length5000`: the length of the body.
    length: Option<usize>,
    /// `hint`: a 103 comes first.
    hint: bool,
    /// `close`: the connection takes no more requests.
    close: bool,
    /// `own`: 200 if the connection was told to be the proxy's own, else 500.
    own: bool,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// An answer.
    Answer,
    /// `reset`: the stream is reset, over HTTP/1 the connection ends.
    Reset,
    /// `refuse`: it is reset as one that was not looked at.
    Refuse,
    /// `gone`: the connection ends.
    Gone,
    /// `hang`: nothing.
    Hang,
    /// `cut`: half the body, and then the end.
    Cut,
    /// `stall`: half the body, and then nothing.
    Stall,
    /// `grpc14`: a gRPC status without a message.
    Grpc(u16),
    /// `grpcend14`: a message, and the status behind it.
    GrpcEnd(u16),
    /// `trailers`: the answer has some.
    Trailers,
    /// `leave`: HTTP is left, and every byte comes back.
    Leave,
    /// `early`: the answer comes before the request's body is read.
    Early,
    /// `raw=NAME`: bytes of the scenario, and then the end.
    Raw(String),
}

impl Deed {
    fn parse(text: &str) -> Self {
        let mut deed = Self {
            status: 200,
            wait: Duration::ZERO,
            headers: Fields::new(),
            length: None,
            hint: false,
            close: false,
            own: false,
            kind: Kind::Answer,
        };
        for word in text.split('+') {
            let number = |name: &str| word.strip_prefix(name).and_then(|n| n.parse::<u16>().ok());
            if let Ok(status) = word.parse() {
                deed.status = status;
            } else if let Some(ms) = number("wait") {
                deed.wait = Duration::from_millis(ms.into());
            } else if let Some(length) = word.strip_prefix("length").and_then(|n| n.parse().ok()) {
                deed.length = Some(length);
            } else if let Some(status) = number("grpcend") {
                deed.kind = Kind::GrpcEnd(status);
            } else if let Some(status) = number("grpc") {
                deed.kind = Kind::Grpc(status);
            } else if let Some(name) = word.strip_prefix("raw=") {
                deed.kind = Kind::Raw(name.to_owned());
            } else if let Some((name, value)) = word.split_once('=') {
                deed.headers.push((name.to_owned(), value.to_owned()));
            } else {
                match word {
                    "hint" => deed.hint = true,
                    "close" => deed.close = true,
                    "own" => deed.own = true,
                    "reset" => deed.kind = Kind::Reset,
                    "refuse" => deed.kind = Kind::Refuse,
                    "gone" => deed.kind = Kind::Gone,
                    "hang" => deed.kind = Kind::Hang,
                    "cut" => deed.kind = Kind::Cut,
                    "stall" => deed.kind = Kind::Stall,
                    "trailers" => deed.kind = Kind::Trailers,
                    "leave" => deed.kind = Kind::Leave,
                    "early" => deed.kind = Kind::Early,
                    other => panic!("a server knows no `{other}`"),
                }
            }
        }
        deed
    }

    fn body(&self, server: &str) -> Vec<u8> {
        match (self.length, self.status, &self.kind) {
            (Some(length), ..) => vec![b'x'; length],
            (None, 204 | 304, _) | (None, _, Kind::Grpc(_)) => Vec::new(),
            // an empty message
            (None, _, Kind::GrpcEnd(_)) => vec![0; 5],
            (None, ..) => format!("server {server}").into_bytes(),
        }
    }

    /// Headers, and trailers if there are some.
    fn fields(&self) -> (Fields, Option<Fields>) {
        let mut headers = self.headers.clone();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let trailers = match self.kind {
            Kind::Grpc(status) => {
                headers.push(pair("content-type", "application/grpc"));
                headers.push(pair("grpc-status", &status.to_string()));
                None
            }
            Kind::GrpcEnd(status) => {
                headers.push(pair("content-type", "application/grpc"));
                Some(vec![pair("grpc-status", &status.to_string()), pair("grpc-message", "told")])
            }
            Kind::Trailers => Some(vec![pair("x-trailer", "behind")]),
            _ => None,
        };
        (headers, trailers)
    }
}

/// What every connection of a server knows.
struct Place {
    name: String,
    book: Book,
    bytes: BTreeMap<String, String>,
    /// What connections began with, by their numbers, where that was the PROXY protocol.
    told: Mutex<BTreeMap<usize, String>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// A request as a server sees it.
struct Asked {
    method: String,
    path: String,
    version: &'static str,
    authority: String,
    headers: Fields,
    connection: usize,
}

impl Server {
    pub(crate) async fn start(
        name: &str,
        bytes: &BTreeMap<String, String>,
        book: &Book,
    ) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let socket = TcpSocket::new_v4()?;
        if name.starts_with("closed") {
            let address = ([127, 0, 0, 1], free_port()?).into();
            return Ok(Self { address, _held: Vec::new(), _stop: stop.drop_guard() });
        }
        socket.bind(([127, 0, 0, 1], 0).into())?;
        let full = name.starts_with("full");
        let listener = socket.listen(if full { 0 } else { 1024 })?;
        let address = listener.local_addr()?;
        let mut held = Vec::new();
        if full {
            // the queue of a listener that takes nothing holds one
            held.push(TcpStream::connect(address).await?);
        }
        let place = Arc::new(Place {
            name: name.to_owned(),
            book: book.clone(),
            bytes: bytes.clone(),
            told: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: stop.clone(),
        });
        let serving = place.clone();
        place.tasks.spawn(async move {
            if full {
                // it is open for as long as the scenario is
                serving.stop.cancelled().await;
                drop(listener);
            } else {
                serving.stop.clone().run_until_cancelled(accept(serving, listener)).await;
            }
        });
        Ok(Self { address, _held: held, _stop: stop.drop_guard() })
    }
}

async fn accept(place: Arc<Place>, listener: TcpListener) {
    let mut connection = 0;
    while let Ok((stream, _)) = listener.accept().await {
        connection += 1;
        let (of_it, stop) = (place.clone(), place.stop.clone());
        let each = async move {
            stream.set_nodelay(true).unwrap_or_default();
            of_it.serve(stream, connection).await;
        };
        place.tasks.spawn(async move { stop.run_until_cancelled(each).await });
    }
}

impl Place {
    async fn serve(self: Arc<Self>, mut stream: TcpStream, connection: usize) {
        let is = |kind: &str| self.name.starts_with(kind);
        if is("secure") {
            // what went wrong is told by what the client gets
            return proxied::secure(stream, &self.name).await.unwrap_or_default();
        }
        if is("tcp") || is("banner") || is("tls") || is("echo") {
            return self.bytes(stream).await;
        }
        let mut first = [0; 3];
        while let Ok(length @ 1..) = stream.peek(&mut first).await {
            if length == first.len() {
                if proxied::begins(first) {
                    let Ok(told) = proxied::take(&mut stream).await else { return };
                    self.told.lock().expect("a lock").insert(connection, told);
                    continue;
                }
                if first == *b"PRI" {
                    self.http2(stream, connection).await;
                } else {
                    self.http1(stream, connection).await;
                }
                return;
            }
        }
    }

    async fn bytes(&self, mut stream: TcpStream) {
        if self.name.starts_with("echo") {
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await.unwrap_or_default();
            return;
        }
        if self.name.starts_with("banner") {
            stream.write_all(b"welcome;").await.unwrap_or_default();
        }
        let mut got = Vec::new();
        let answer = if self.name.starts_with("tls") {
            stream.read_buf(&mut got).await.unwrap_or_default();
            format!("server {}", self.name)
        } else {
            stream.read_to_end(&mut got).await.unwrap_or_default();
            format!("server {} got {}", self.name, got.escape_ascii())
        };
        stream.write_all(answer.as_bytes()).await.unwrap_or_default();
        stream.shutdown().await.unwrap_or_default();
        // what is left unread would reset the connection
        stream.read_to_end(&mut got).await.unwrap_or_default();
    }

    /// Notes a request, and tells what is done.
    fn note(&self, asked: &Asked, body: &Body) -> Deed {
        let case = field(&asked.headers, "x-case").unwrap_or_default().to_owned();
        let own = field(&asked.headers, &format!("x-do-{}", self.name));
        let plan = own.or_else(|| field(&asked.headers, "x-do")).unwrap_or("200");
        let mut lines = vec![format!(
            "server {} saw {} {} {} {}",
            self.name, asked.method, asked.path, asked.version, asked.authority
        )];
        let noted = |name: &str| !name.starts_with("x-do") && name != "x-case" && name != "host";
        let mut headers: Vec<_> = asked.headers.iter().filter(|(name, _)| noted(name)).collect();
        headers.sort();
        lines.extend(headers.into_iter().map(|(n, v)| {
            // one that was made, not the client's own
            let made = n == "x-request-id" && v.len() == 36;
            let value = if made { "made" } else { v };
            format!("  {}'s header {n}: {value}", self.name)
        }));
        let told = self.told.lock().expect("a lock").get(&asked.connection).cloned();
        lines.extend(told.iter().map(|told| format!("  {}'s connection told {told}", self.name)));
        lines.push(format!("  {}'s body {}", self.name, body.bytes.len()));
        let trailers = body.trailers.iter().map(|(n, v)| format!("  {}'s trailer {n}: {v}", self.name));
        lines.extend(trailers);
        if !body.whole {
            lines.push(format!("  {}'s body broke off", self.name));
        }
        let Ok(mut book) = self.book.lock() else { return Deed::parse("200") };
        let before = |s: &&Sighting| s.case == case && (own.is_none() || s.server == self.name);
        let attempt = book.iter().filter(before).count();
        book.push(Sighting { case, server: self.name.clone(), connection: asked.connection, lines });
        let deeds: Vec<&str> = plan.split_whitespace().collect();
        let mut deed = Deed::parse(deeds.get(attempt).or(deeds.last()).copied().unwrap_or("200"));
        if deed.own {
            deed.status = if told.as_deref() == Some(proxied::OWN) { 200 } else { 500 };
        }
        deed
    }

    async fn http1(&self, stream: TcpStream, connection: usize) {
        let mut wire = Wire::new(stream);
        while let Some(line) = wire.line().await {
            let mut words = line.split(' ').map(str::to_owned);
            let mut word = || words.next().unwrap_or_default();
            let (method, path) = (word(), word());
            let version = if word() == "HTTP/1.0" { "HTTP/1.0" } else { "HTTP/1.1" };
            let Some(headers) = wire.fields().await else { return };
            let authority = field(&headers, "host").unwrap_or_default().to_owned();
            let asked = Asked { method, path, version, authority, headers, connection };
            let plan = field(&asked.headers, "x-do").unwrap_or_default().to_owned();
            let early = plan.contains("early");
            let leaves = field(&asked.headers, "upgrade").is_some() || asked.method == "CONNECT";
            let mut body = Body { whole: true, ..Body::default() };
            if !early && !leaves {
                body = wire.body(&asked.headers, false).await;
            }
            let deed = self.note(&asked, &body);
            if !self.do1(&mut wire, &asked, &deed).await {
                // who has not read all that was sent resets the connection, and the answer is lost
                wire.end().await;
                return;
            }
            if early {
                wire.body(&asked.headers, false).await;
            }
        }
    }

    /// Answers over HTTP/1; `false`: the connection ends.
    async fn do1(&self, wire: &mut Wire, asked: &Asked, deed: &Deed) -> bool {
        // paced: a server that is slow because it was asked to be
        tokio::time::sleep(deed.wait).await;
        match &deed.kind {
            Kind::Reset | Kind::Refuse | Kind::Gone => return false,
            Kind::Hang => {
                wire.rest().await;
                return false;
            }
            Kind::Raw(name) => {
                let bytes = self.bytes.get(name).map(String::as_bytes).unwrap_or_default();
                wire.write(bytes).await;
                return false;
            }
            _ => {}
        }
        if deed.hint {
            wire.write(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n").await;
        }
        if deed.kind == Kind::Leave {
            let head = match field(&asked.headers, "upgrade") {
                Some(protocol) => format!(
                    "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n\r\n"
                ),
                None => "HTTP/1.1 200 OK\r\n\r\n".to_owned(),
            };
            wire.write(head.as_bytes()).await;
            loop {
                let some = wire.some().await;
                if some.is_empty() || !wire.write(&some).await {
                    return false;
                }
            }
        }
        let (mut headers, trailers) = deed.fields();
        let body = deed.body(&self.name);
        let mut pair = |name: &str, value: &str| headers.push((name.to_owned(), value.to_owned()));
        if trailers.is_some() {
            pair("transfer-encoding", "chunked");
        } else if !matches!(deed.status, 204 | 304) {
            pair("content-length", &body.len().to_string());
        }
        if deed.close {
            pair("connection", "close");
        }
        let mut bytes = format!("HTTP/1.1 {} Told\r\n", deed.status).into_bytes();
        for (name, value) in &headers {
            bytes.extend(format!("{name}: {value}\r\n").into_bytes());
        }
        bytes.extend(b"\r\n");
        let half = body.len() / 2;
        let sent = match deed.kind {
            _ if asked.method == "HEAD" => &[],
            Kind::Cut | Kind::Stall => &body[..half],
            _ => &body[..],
        };
        if let Some(trailers) = trailers {
            bytes.extend(format!("{:x}\r\n", sent.len()).into_bytes());
            bytes.extend(sent);
            bytes.extend(b"\r\n0\r\n");
            for (name, value) in trailers {
                bytes.extend(format!("{name}: {value}\r\n").into_bytes());
            }
            bytes.extend(b"\r\n");
        } else {
            bytes.extend(sent);
        }
        let written = wire.write(&bytes).await;
        if deed.kind == Kind::Cut {
            // paced: what was sent is on its way before the end comes
            tokio::time::sleep(PAUSE).await;
        }
        if deed.kind == Kind::Stall {
            wire.rest().await;
        }
        written && !deed.close && !matches!(deed.kind, Kind::Cut | Kind::Stall)
    }
}

#[test]
fn deeds_are_words() {
    let deed = Deed::parse("503+wait20+x-a=b+length7+close");
    assert_eq!((deed.status, deed.wait.as_millis(), deed.length, deed.close), (503, 20, Some(7), true));
    assert_eq!(deed.fields().0, [("x-a".to_owned(), "b".to_owned())]);
    assert_eq!(Deed::parse("grpcend14").kind, Kind::GrpcEnd(14));
    assert_eq!(Deed::parse("raw=odd").kind, Kind::Raw("odd".to_owned()));
}
