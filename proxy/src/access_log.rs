//! Access logs: one line per request or connection, made of operators that were parsed with the configuration.
//!
//! Lines gather in a buffer of the worker and go to the writer's thread in batches, so that no request waits for a
//! disk.

pub mod writer;

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use http::{HeaderMap, HeaderValue, StatusCode, Version};
use serde_json::{Map, Value as Json};

use crate::http::exchange::{Exchange, Told};
use crate::http::flags::Flags;
use crate::http::headers;
use crate::listener::connection::Connection;
use crate::metrics::Counter;
use crate::upstream::send::Link;
use crate::upstream::{Host, Upstream};
use crate::worker::Worker;
use crate::xds::access_log::{AccessLog, Filter, LineFormat};
use crate::xds::decode::Metadata;
use crate::xds::format::{AddressPart, Format, JsonFormat, MetadataOf, Operator, Part, Side};
use crate::xds::matcher::HeaderKey;

/// A batch goes to the writer when it has this many bytes, or at the worker's next tick.
const BATCH: usize = 32 * 1024;

/// The access logs of one place.
#[derive(Debug, Default)]
pub struct Logs {
    logs: Vec<Rc<Log>>,
    config: Option<Arc<[AccessLog]>>,
}

/// One destination on one worker.
#[derive(Debug)]
pub struct Log {
    buffer: RefCell<Vec<u8>>,
    sender: SyncSender<Vec<u8>>,
    lines: Cell<u64>,
    dropped: Rc<Counter>,
}

impl Log {
    /// A destination whose lost lines are counted by `dropped`.
    #[must_use]
    pub fn new(sender: SyncSender<Vec<u8>>, dropped: Rc<Counter>) -> Self {
        Self { buffer: RefCell::default(), sender, lines: Cell::new(0), dropped }
    }

    fn line(&self, text: &str) {
        let mut buffer = self.buffer.borrow_mut();
        buffer.extend_from_slice(text.as_bytes());
        self.lines.set(self.lines.get() + 1);
        if buffer.len() >= BATCH {
            drop(buffer);
            self.flush();
        }
    }

    /// Hands what has gathered to the writer.
    pub fn flush(&self) {
        let batch = std::mem::take(&mut *self.buffer.borrow_mut());
        let lines = self.lines.replace(0);
        if !batch.is_empty() && self.sender.try_send(batch).is_err() {
            self.dropped.add(lines);
        }
    }
}

impl Logs {
    /// Opens the destinations of a configuration on this worker.
    #[must_use]
    pub fn new(config: &Arc<[AccessLog]>, worker: &Rc<Worker>) -> Self {
        let logs: Option<Vec<_>> = config.iter().map(|c| worker.log(&c.sink)).collect();
        match logs {
            Some(logs) if !logs.is_empty() => Self { logs, config: Some(Arc::clone(config)) },
            _ => Self::default(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.logs.is_empty()
    }

    /// Logs a request that is over.
    pub fn write(&self, exchange: &Exchange) {
        self.write_facts(&exchange.facts(exchange.told.as_deref()), &exchange.http.worker);
    }

    /// Logs a connection or request that is over.
    pub fn write_facts(&self, facts: &Facts<'_>, worker: &Worker) {
        let Some(config) = &self.config else { return };
        for (log, config) in self.logs.iter().zip(config.iter()) {
            if config.filter.as_ref().is_none_or(|f| wanted(f, facts, worker)) {
                log.line(&line(config, facts));
            }
        }
    }
}

fn line(config: &AccessLog, facts: &Facts<'_>) -> String {
    let missing = if config.omit_empty { "" } else { "-" };
    match &config.format {
        LineFormat::Text(format) => text(format, facts, missing),
        LineFormat::Json(format) => {
            let mut line = json(format, facts, config.omit_empty).unwrap_or(Json::Null).to_string();
            line.push('\n');
            line
        }
    }
}

fn wanted(filter: &Filter, facts: &Facts<'_>, worker: &Worker) -> bool {
    match filter {
        Filter::Status(op, n) => op.holds(facts.status.map_or(0, |s| u64::from(s.as_u16())), u64::from(*n)),
        Filter::Duration(op, n) => op.holds(facts.duration_ms, u64::from(*n)),
        Filter::NotHealthCheck => true,
        Filter::Share(share) => share.hits(worker.random()),
        Filter::Header(matcher) => {
            let value = facts.header(Side::Request, &matcher.key);
            matcher.matches(value.as_deref().map(str::as_bytes))
        }
        Filter::ResponseFlags(flags) if flags.is_empty() => !facts.flags.is_empty(),
        Filter::ResponseFlags(flags) => facts.flags.names().any(|n| flags.iter().any(|f| **f == *n)),
        Filter::GrpcStatus(statuses, exclude) => {
            let among = facts.grpc_status.is_some_and(|g| statuses.contains(&i32::from(g)));
            among != *exclude
        }
        Filter::And(all) => all.iter().all(|f| wanted(f, facts, worker)),
        Filter::Or(any) => any.iter().any(|f| wanted(f, facts, worker)),
    }
}

/// What a line may tell.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The client's connection.
    pub connection: &'a Connection,
    /// The client's address, with forwarding headers taken into account.
    pub remote: std::net::SocketAddr,
    /// When it began.
    pub began: std::time::SystemTime,
    /// How long it took.
    pub duration_ms: u64,
    /// Until the last byte of the request.
    pub request_ms: Option<u64>,
    /// Until the first byte of the response.
    pub response_ms: Option<u64>,
    /// The request's head.
    pub told: Option<&'a Told>,
    /// Its version of HTTP; `None` for TCP.
    pub version: Option<Version>,
    /// The response's headers.
    pub response: Option<&'a HeaderMap>,
    /// The response's trailers.
    pub trailers: Option<&'a HeaderMap>,
    /// Its status.
    pub status: Option<StatusCode>,
    /// Its gRPC status.
    pub grpc_status: Option<u16>,
    /// How it ended.
    pub flags: Flags,
    /// Why it has this status.
    pub details: &'a str,
    /// The transport's words about a failure.
    pub failure: &'a str,
    /// Bytes from the client.
    pub received: u64,
    /// Bytes to the client.
    pub sent: u64,
    /// The cluster.
    pub upstream: Option<&'a Rc<Upstream>>,
    /// The endpoint.
    pub host: Option<&'a Rc<Host>>,
    /// The connection to it.
    pub link: Option<&'a Link>,
    /// How often it was sent.
    pub attempts: u32,
    /// The route's name.
    pub route: &'a str,
    /// The route's metadata.
    pub route_metadata: Option<&'a Metadata>,
    /// What filters found out.
    pub dynamic: Option<&'a Map<String, Json>>,
}

impl<'a> Facts<'a> {
    /// What a line may tell of a connection that was turned away, and why.
    #[must_use]
    pub fn refused(connection: &'a Connection, flags: Flags, details: &'a str) -> Self {
        Self {
            connection,
            remote: connection.remote,
            began: crate::worker::wall_clock(),
            duration_ms: 0,
            request_ms: None,
            response_ms: None,
            told: None,
            version: None,
            response: None,
            trailers: None,
            status: None,
            grpc_status: None,
            flags,
            details,
            failure: "",
            received: 0,
            sent: 0,
            upstream: None,
            host: None,
            link: None,
            attempts: 0,
            route: "",
            route_metadata: None,
            dynamic: None,
        }
    }
}

impl Exchange {
    /// What a line may tell of this exchange.
    #[must_use]
    pub fn facts<'a>(&'a self, told: Option<&'a Told>) -> Facts<'a> {
        let elapsed = self.started.elapsed();
        let ms = |d: std::time::Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        Facts {
            connection: &self.connection,
            remote: self.remote,
            began: crate::worker::wall_clock().checked_sub(elapsed).unwrap_or(std::time::UNIX_EPOCH),
            duration_ms: ms(elapsed),
            request_ms: match &self.progress {
                Some(progress) => progress.ended.get().map(|at| ms(at.duration_since(self.started))),
                None => Some(0),
            },
            response_ms: self.responded.map(|at| ms(at.duration_since(self.started))),
            told,
            version: Some(self.version),
            response: self.response_headers.as_deref(),
            trailers: self.trailers.as_deref(),
            status: self.status,
            grpc_status: self.grpc_status,
            flags: self.flags,
            details: &self.details,
            failure: &self.failure,
            received: self.progress.as_ref().map_or(0, |p| p.bytes.get()),
            sent: self.sent_bytes,
            upstream: self.upstream.as_ref(),
            host: self.host.as_ref(),
            link: self.link.as_deref(),
            attempts: self.attempts,
            route: self.route.as_ref().map_or("", |r| &r.name),
            route_metadata: self.route.as_ref().map(|r| &r.metadata),
            dynamic: self.metadata.as_deref(),
        }
    }
}

/// A value made from a request that is under way, and from the headers of its response; what is not known is empty.
#[must_use]
pub fn render(format: &Format, exchange: &Exchange, told: &Told, response: Option<&HeaderMap>) -> String {
    text(format, &Facts { response, ..exchange.facts(Some(told)) }, "")
}

fn text(format: &Format, facts: &Facts<'_>, missing: &str) -> String {
    let mut out = String::with_capacity(256);
    for part in &format.0 {
        match part {
            Part::Text(text) => out.push_str(text),
            Part::Operator(operator, limit) => match facts.value(operator) {
                Some(value) => out.push_str(shortened(&value, *limit)),
                None => out.push_str(missing),
            },
        }
    }
    out
}

fn shortened(value: &str, limit: Option<usize>) -> &str {
    match limit {
        Some(limit) if limit < value.len() => value.get(..value.floor_char_boundary(limit)).unwrap_or(value),
        _ => value,
    }
}

/// `None` for a field that is left out.
fn json(format: &JsonFormat, facts: &Facts<'_>, omit_empty: bool) -> Option<Json> {
    match format {
        JsonFormat::Constant(value) => Some(value.clone()),
        JsonFormat::Value(format) => match &*format.0 {
            [Part::Operator(operator, limit)] => match facts.value(operator) {
                Some(value) if is_number(operator) => {
                    let value = shortened(&value, *limit).to_owned();
                    Some(value.parse::<u64>().map_or(Json::String(value), Json::from))
                }
                Some(value) => Some(Json::String(shortened(&value, *limit).to_owned())),
                None if omit_empty => None,
                None => Some(Json::Null),
            },
            _ => Some(Json::String(text(format, facts, if omit_empty { "" } else { "-" }))),
        },
        JsonFormat::Object(fields) => {
            let filled =
                fields.iter().filter_map(|(k, f)| Some((k.to_string(), json(f, facts, omit_empty)?)));
            Some(Json::Object(filled.collect::<Map<_, _>>()))
        }
        JsonFormat::List(items) => Some(items.iter().filter_map(|f| json(f, facts, omit_empty)).collect()),
    }
}

fn is_number(operator: &Operator) -> bool {
    matches!(
        operator,
        Operator::ResponseCode
            | Operator::BytesReceived
            | Operator::BytesSent
            | Operator::Duration
            | Operator::RequestDuration
            | Operator::ResponseDuration
            | Operator::ResponseTxDuration
            | Operator::UpstreamAttempts
            | Operator::ConnectionId
            | Operator::GrpcStatus(false)
    )
}

impl Facts<'_> {
    fn header(&self, side: Side, key: &HeaderKey) -> Option<String> {
        let map = match side {
            Side::Request => {
                let told = self.told?;
                match key {
                    HeaderKey::Method => return Some(told.method.to_string()),
                    HeaderKey::Path => return Some(told.path.clone()),
                    HeaderKey::Authority => return string(&told.authority),
                    HeaderKey::Scheme => {
                        return Some(
                            if self.connection.peer.is_some() { "https" } else { "http" }.to_owned(),
                        );
                    }
                    HeaderKey::Name(_) => &told.headers,
                }
            }
            Side::Response => self.response?,
            Side::Trailer => self.trailers?,
        };
        let HeaderKey::Name(name) = key else { return None };
        map.get(name).and_then(string)
    }

    /// An operator's value; `None` when there is none.
    fn value(&self, operator: &Operator) -> Option<String> {
        let number = |n: u64| Some(n.to_string());
        let filled = |t: &str| (!t.is_empty()).then(|| t.to_owned());
        let peer = self.connection.peer.as_ref();
        match operator {
            Operator::Header(side, first, second) => self
                .header(*side, first)
                .or_else(|| second.as_ref().and_then(|second| self.header(*side, second))),
            Operator::StartTime(format) => start_time(self.began, format.as_deref()),
            Operator::Protocol => self.version.map(|v| protocol(v).to_owned()),
            Operator::ResponseCode => number(self.status.map_or(0, |s| u64::from(s.as_u16()))),
            // none have a text, too
            Operator::ResponseFlags if self.flags.is_empty() => Some("-".to_owned()),
            Operator::ResponseFlags => Some(self.flags.text()),
            Operator::ResponseCodeDetails => self.version.and_then(|_| filled(self.details)),
            // a connection has no response, but may have been ended for a reason of its own
            Operator::ConnectionTerminationDetails if self.version.is_none() => filled(self.details),
            Operator::StreamId => self.header(Side::Request, &HeaderKey::Name(headers::REQUEST_ID)),
            Operator::UpstreamTransportFailureReason => filled(self.failure),
            Operator::BytesReceived => number(self.received),
            Operator::BytesSent => number(self.sent),
            Operator::Duration => number(self.duration_ms),
            Operator::RequestDuration => self.request_ms.and_then(number),
            Operator::ResponseDuration => self.response_ms.and_then(number),
            Operator::ResponseTxDuration => {
                self.response_ms.and_then(|first| number(self.duration_ms.saturating_sub(first)))
            }
            Operator::UpstreamHost => self.host.map(|h| h.text.to_string()),
            Operator::UpstreamRemote(part) => {
                self.host.and_then(|h| h.address.socket()).map(|a| address(a, *part))
            }
            Operator::UpstreamCluster => self.upstream.map(|u| u.config.stat_name.to_string()),
            Operator::UpstreamClusterRaw => self.upstream.map(|u| u.config.name.to_string()),
            Operator::UpstreamLocal(part) => self.link?.local.map(|a| address(a, *part)),
            Operator::UpstreamPeerUriSan => filled(&self.link?.peer.as_ref()?.uris.join(",")),
            Operator::UpstreamAttempts => number(self.attempts.into()),
            Operator::DownstreamLocal(part) => Some(address(self.connection.local, *part)),
            Operator::DownstreamRemote(part) => Some(address(self.remote, *part)),
            Operator::DownstreamDirectRemote(part) => Some(address(self.connection.direct_remote, *part)),
            Operator::RequestedServerName => self.connection.server_name.clone(),
            Operator::RouteName => filled(self.route),
            Operator::Hostname => hostname(),
            Operator::ConnectionId => number(self.connection.id),
            Operator::PeerUriSan => peer.map(|p| p.uris.join(",")).filter(|t| !t.is_empty()),
            Operator::PeerSubject => peer.and_then(|p| filled(&p.subject)),
            Operator::PeerFingerprint => peer.and_then(|p| filled(&p.fingerprint)),
            Operator::LocalUriSan => filled(&self.connection.own_uris.join(",")),
            Operator::TlsVersion => peer.and_then(|p| filled(p.version)),
            Operator::TlsCipher => peer.and_then(|p| filled(&p.cipher)),
            Operator::Metadata(of, filter, keys) => self.metadata(*of, filter, keys),
            Operator::GrpcStatus(false) => self.grpc_status.map(|g| g.to_string()),
            Operator::GrpcStatus(true) => self.grpc_status.map(grpc_name),
            Operator::ConnectionTerminationDetails
            | Operator::DownstreamTransportFailureReason
            | Operator::FilterState(_) => None,
        }
    }

    fn metadata(&self, of: MetadataOf, filter: &str, keys: &[Box<str>]) -> Option<String> {
        let fields = match of {
            MetadataOf::Dynamic => self.dynamic?.get(filter)?.as_object()?,
            MetadataOf::Cluster => self.upstream?.config.metadata.filter(filter)?,
            MetadataOf::Upstream => self.host?.endpoint.metadata.filter(filter)?,
            MetadataOf::Route => self.route_metadata?.filter(filter)?,
        };
        let Some((first, rest)) = keys.split_first() else {
            return Some(Json::Object(fields.clone()).to_string());
        };
        let found = rest.iter().try_fold(fields.get(&**first)?, |at, key| at.get(&**key))?;
        Some(found.as_str().map_or_else(|| found.to_string(), str::to_owned))
    }
}

fn string(value: &HeaderValue) -> Option<String> {
    Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        _ => "HTTP/1.1",
    }
}

fn address(address: std::net::SocketAddr, part: AddressPart) -> String {
    match part {
        AddressPart::Whole => address.to_string(),
        AddressPart::Ip => address.ip().to_string(),
        AddressPart::Port => address.port().to_string(),
    }
}

fn hostname() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|name| name.trim().to_owned())
}

fn start_time(at: std::time::SystemTime, format: Option<&str>) -> Option<String> {
    let at = jiff::Timestamp::try_from(at).ok()?;
    match format {
        None => Some(format!("{:.3}", at.round(jiff::Unit::Millisecond).ok()?)),
        Some(format) => {
            let mut out = String::new();
            write!(out, "{}", at.strftime(format)).ok()?;
            Some(out)
        }
    }
}

fn grpc_name(status: u16) -> String {
    const NAMES: [&str; 17] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    NAMES.get(usize::from(status)).map_or_else(|| status.to_string(), |n| (*n).to_owned())
}
