//! HTTP/2 as RFC 9113 and RFC 7541 have it, frame by frame: what a client sends on a new connection, and what comes of
//! it. The cases are those that h2spec groups by the sections of the RFCs, written anew, and some about what an HTTP/1
//! server behind the proxy would make of a request.

mod connection;
mod hpack;
mod messages;
mod streams;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::backend::Backend;
use crate::floods::PREFACE;
pub(crate) use crate::floods::frame;
use crate::harness::{Running, bootstrap, cluster};

/// Kinds of frames.
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PUSH_PROMISE: u8 = 5;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

/// Flags.
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const PADDED: u8 = 8;
pub(crate) const PRIORITIZED: u8 = 0x20;
/// A whole request without a body.
pub(crate) const WHOLE: u8 = END_HEADERS | END_STREAM;

/// Error codes (RFC 9113, section 7).
pub(crate) const PROTOCOL_ERROR: u32 = 1;
pub(crate) const FLOW_CONTROL_ERROR: u32 = 3;
pub(crate) const STREAM_CLOSED: u32 = 5;
/// What the library says in place of most other codes, such as those for a frame of a wrong length and for a head that
/// cannot be decompressed: the connection ends as it must, with a code that tells less.
pub(crate) const COARSE: u32 = PROTOCOL_ERROR;
pub(crate) const FRAME_SIZE_ERROR: u32 = 6;
pub(crate) const REFUSED_STREAM: u32 = 7;

const LONG: Duration = Duration::from_secs(20);
const TO_UP: &str = "              - {match: {prefix: \"/\"}, route: {cluster: up, timeout: 0s}}";
const PROBE: [u8; 8] = *b"question";

/// What comes of what a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The connection goes on, and nothing else happens.
    Alive,
    /// The request of this stream is answered with this status, and the connection goes on.
    Answer(u32, u16),
    /// This stream alone ends with this error, and the connection goes on.
    Stream(u32, u32),
    /// The connection ends with this error.
    Connection(u32),
    /// The connection ends without a word.
    Closed,
}

/// A case: its name begins with its section.
pub(crate) type Row = (&'static str, Vec<u8>, Outcome);

/// Something that the proxy said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Settings,
    SettingsAck,
    /// The payload.
    PingAck(Vec<u8>),
    /// Stream and status.
    Head(u32, u16),
    /// Stream, length, and whether it is the last.
    Data(u32, usize, bool),
    /// Stream and error.
    Reset(u32, u32),
    /// Error.
    GoAway(u32),
    /// Kind of another frame.
    Other(u8),
    Closed,
    /// Nothing more, and no end either.
    Silent,
}

/// A field that goes into no table, in plain letters (RFC 7541, section 6.2.2).
pub(crate) fn field(name: &str, value: &str) -> Vec<u8> {
    raw_field(name.as_bytes(), value.as_bytes())
}

pub(crate) fn raw_field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let length = |text: &[u8]| u8::try_from(text.len()).ok().filter(|n| *n < 127).unwrap();
    [&[0, length(name)], name, &[length(value)], value].concat()
}

/// `GET /`, `http`, `:authority: a`.
pub(crate) fn get() -> Vec<u8> {
    [&[0x82, 0x86, 0x84][..], &field(":authority", "a")].concat()
}

/// `POST /`, `http`, `:authority: a`.
pub(crate) fn post() -> Vec<u8> {
    [&[0x83, 0x86, 0x84][..], &field(":authority", "a")].concat()
}

/// The head of a request and more fields.
pub(crate) fn with(head: Vec<u8>, fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().fold(head, |head, (name, value)| [head, field(name, value)].concat())
}

/// Frames one after the other.
pub(crate) fn all(frames: &[Vec<u8>]) -> Vec<u8> {
    frames.concat()
}

/// A connection on which frames are sent and read one by one.
pub(crate) struct Client {
    stream: TcpStream,
    bytes: Vec<u8>,
}

impl Client {
    /// Sends the preface and these settings.
    pub(crate) async fn open(to: SocketAddr, settings: &[u8]) -> Self {
        let mut stream = TcpStream::connect(to).await.unwrap();
        let start = [PREFACE, &frame(SETTINGS, 0, 0, settings)].concat();
        stream.write_all(&start).await.unwrap();
        Self { stream, bytes: Vec::new() }
    }

    /// The proxy may have closed already.
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let _sent = self.stream.write_all(bytes).await;
    }

    /// The next that the proxy says.
    pub(crate) async fn said(&mut self) -> Said {
        loop {
            if let Some(said) = self.take() {
                return said;
            }
            let mut piece = [0; 4096];
            match tokio::time::timeout(LONG, self.stream.read(&mut piece)).await {
                Ok(Ok(n @ 1..)) => self.bytes.extend_from_slice(&piece[..n]),
                Ok(_) => return Said::Closed,
                Err(_) => return Said::Silent,
            }
        }
    }

    fn take(&mut self) -> Option<Said> {
        let [a, b, c, kind, flags, s @ ..] = *self.bytes.first_chunk::<9>()?;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let payload = self.bytes.get(9..9 + length)?.to_vec();
        self.bytes.drain(..9 + length);
        let stream = u32::from_be_bytes(s);
        let code = |at: usize| u32::from_be_bytes(*payload[at..].first_chunk().unwrap());
        Some(match kind {
            SETTINGS if flags & ACK != 0 => Said::SettingsAck,
            SETTINGS => Said::Settings,
            PING if flags & ACK != 0 => Said::PingAck(payload),
            HEADERS => Said::Head(stream, status(&payload)),
            DATA => Said::Data(stream, length, flags & END_STREAM != 0),
            RST_STREAM => Said::Reset(stream, code(0)),
            GOAWAY => Said::GoAway(code(4)),
            other => Said::Other(other),
        })
    }

    /// All that the proxy says until the connection ends or all that a case asks for has come.
    async fn until(&mut self, expected: Outcome) -> Vec<Said> {
        let mut all = Vec::new();
        loop {
            let said = self.said().await;
            let ends = matches!(said, Said::Closed | Said::Silent);
            if !matches!(said, Said::Settings | Said::SettingsAck | Said::Other(_)) {
                all.push(said);
            }
            let answered = all.contains(&Said::PingAck(PROBE.to_vec()));
            let enough = match expected {
                Outcome::Alive => answered,
                Outcome::Answer(stream, status) => answered && all.contains(&Said::Head(stream, status)),
                Outcome::Stream(stream, code) => answered && all.contains(&Said::Reset(stream, code)),
                Outcome::Connection(_) | Outcome::Closed => false,
            };
            if ends || enough {
                return all;
            }
        }
    }
}

/// The status that a response's head begins with (RFC 7541, appendix A), among those that the cases know.
fn status(block: &[u8]) -> u16 {
    let block = if block.first().is_some_and(|b| b & 0xe0 == 0x20) { &block[1..] } else { block };
    match block.first() {
        Some(0x88) => 200,
        Some(0x8c) => 400,
        Some(0x8d) => 404,
        Some(0x8e) => 500,
        _ => 0,
    }
}

/// Whether what was said is what was expected. The answer to a request may be under way when its stream or connection
/// ends.
fn is_so(said: &[Said], expected: Outcome) -> bool {
    let reset = |s: &Said| matches!(s, Said::Reset(..));
    let over = |s: &Said| matches!(s, Said::GoAway(_) | Said::Closed | Said::Silent);
    match expected {
        Outcome::Alive => !said.iter().any(|s| reset(s) || over(s)),
        Outcome::Answer(stream, status) => {
            said.contains(&Said::Head(stream, status)) && !said.iter().any(|s| reset(s) || over(s))
        }
        Outcome::Stream(stream, code) => said.contains(&Said::Reset(stream, code)) && !said.iter().any(over),
        Outcome::Connection(code) => said.contains(&Said::GoAway(code)) && said.last() == Some(&Said::Closed),
        Outcome::Closed => {
            !said.iter().any(|s| matches!(s, Said::GoAway(_))) && said.last() == Some(&Said::Closed)
        }
    }
}

/// A proxy with a server of HTTP/1 behind it.
pub(crate) async fn start(hcm: &str) -> (Running, Backend) {
    let backend = Backend::start("a").await;
    let proxy = Running::start(&bootstrap(TO_UP, hcm, &cluster("up", &[backend.address], ""))).await;
    (proxy, backend)
}

async fn ask(to: SocketAddr, bytes: &[u8], expected: Outcome) -> Vec<Said> {
    let mut client = Client::open(to, &[]).await;
    client.send(&[bytes, &frame(PING, 0, 0, &PROBE)].concat()).await;
    client.until(expected).await
}

/// Sends each row on a connection of its own and tells all that were answered otherwise.
pub(crate) async fn check(rows: &[Row], hits: Option<usize>) {
    let (proxy, backend) = start("").await;
    let to = proxy.address();
    let asked = rows.iter().map(|(_, bytes, expected)| ask(to, bytes, *expected));
    let said = futures::future::join_all(asked).await;
    let wrong: Vec<String> = rows
        .iter()
        .zip(said)
        .filter(|((_, _, expected), said)| !is_so(said, *expected))
        .map(|((name, _, expected), said)| format!("{name}: {expected:?} was expected, {said:?} came"))
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    if let Some(hits) = hits {
        assert_eq!(backend.hits(), hits, "requests that came through");
    }
    proxy.end().await;
}
