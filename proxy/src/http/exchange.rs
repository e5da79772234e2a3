//! One request and its response, from its first header to its last byte: what metrics and access logs tell of it.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use http_body::Frame;
use tokio::time::Instant;

use super::Http;
use super::body::{BodyError, Progress};
use super::flags::Flags;
use super::grpc_web::GrpcWeb;
use super::headers::GRPC_STATUS;
use super::reply::grpc_of;
use super::timing::{Attempt, Late, Timer, Timing, Upload};
use crate::listener::connection::Connection;
use crate::metrics::standard::{Numbered, Parties, Principals, Reporter, RequestKey, Workload};
use crate::upstream::send::Link;
use crate::upstream::{Host, Retrying, Upstream};
use crate::xds::route::Route;

/// The request's head as it came, kept for access logs and values made from it.
#[derive(Clone, Debug)]
pub struct Told {
    /// Method.
    pub method: Method,
    /// Path and query, normalised.
    pub path: String,
    /// Authority.
    pub authority: HeaderValue,
    /// Headers, as they are sent on.
    pub headers: HeaderMap,
}

/// One request and its response.
#[derive(Debug)]
pub struct Exchange {
    /// Where it came in.
    pub http: Rc<Http>,
    /// The client's connection.
    pub connection: Rc<Connection>,
    /// When its head was here.
    pub started: Instant,
    /// Its version of HTTP.
    pub version: Version,
    /// Whether its response can have no body, because of its method.
    pub is_head: bool,
    /// Its head, when an access log will ask.
    pub told: Option<Box<Told>>,
    /// Its id, when the response tells it.
    pub request_id: Option<HeaderValue>,
    /// Whether it is gRPC.
    pub is_grpc: bool,
    /// How it came, when that was as gRPC-Web.
    pub web: Option<Box<GrpcWeb>>,
    /// Bytes of its head, about.
    pub head_bytes: u64,
    /// Its body so far.
    pub progress: Option<Rc<Progress>>,
    /// Who the client says it is.
    pub peer: Option<Rc<Numbered<Workload>>>,
    /// The route it took.
    pub route: Option<Arc<Route>>,
    /// The cluster it went to.
    pub upstream: Option<Rc<Upstream>>,
    /// The endpoint it went to.
    pub host: Option<Rc<Host>>,
    /// The connection to it.
    pub link: Option<Rc<Link>>,
    /// How often it was sent.
    pub attempts: u32,
    /// The retry under way.
    pub retrying: Option<Retrying>,
    /// The transport's words about the last failure.
    pub failure: String,
    /// The response's status; `None` before there is one.
    pub status: Option<StatusCode>,
    /// How it ended.
    pub flags: Flags,
    /// Why it has this status.
    pub details: Cow<'static, str>,
    /// The response's headers, when an access log will ask.
    pub response_headers: Option<Box<HeaderMap>>,
    /// When the response's head was here.
    pub responded: Option<Instant>,
    /// Bytes of the response's body so far.
    pub sent_bytes: u64,
    /// Bytes of the response's head, about.
    pub response_head_bytes: u64,
    /// The response's gRPC status.
    pub grpc_status: Option<u16>,
    /// The response's trailers, when an access log will ask.
    pub trailers: Option<Box<HeaderMap>>,
    /// Whether it asks to leave HTTP: it does not end by itself.
    pub leaves: bool,
    /// How long it may take.
    pub timing: Timing,
    timer: Timer,
    /// When the last byte was here.
    pub over: Option<Instant>,
    left: bool,
    /// What filters found out about it, by their names.
    pub metadata: Option<Box<serde_json::Map<String, serde_json::Value>>>,
    /// What the access log calls the client's address.
    pub remote: std::net::SocketAddr,
}

impl Exchange {
    /// A request that has just come.
    #[must_use]
    pub fn new(http: Rc<Http>, connection: Rc<Connection>, started: Instant, version: Version) -> Self {
        let remote = connection.remote;
        http.stats.rq_active.inc();
        http.stats.rq_total.inc();
        connection.begin();
        let timeouts = &http.config.timeouts;
        let timing = Timing::new(started, timeouts.stream_idle, timeouts.request);
        Self {
            http,
            connection,
            started,
            version,
            is_head: false,
            told: None,
            request_id: None,
            is_grpc: false,
            web: None,
            head_bytes: 0,
            progress: None,
            peer: None,
            route: None,
            upstream: None,
            host: None,
            link: None,
            attempts: 0,
            retrying: None,
            failure: String::new(),
            status: None,
            flags: Flags::NONE,
            details: Cow::Borrowed(""),
            response_headers: None,
            responded: None,
            sent_bytes: 0,
            response_head_bytes: 0,
            grpc_status: None,
            trailers: None,
            leaves: false,
            timing,
            timer: Timer::default(),
            over: None,
            left: false,
            metadata: None,
            remote,
        }
    }

    /// Notes the head of the response that the client gets, and when it was here.
    pub fn respond(&mut self, status: StatusCode, headers: &HeaderMap, at: Instant) {
        if self.left {
            return; // nobody gets it
        }
        self.status = Some(status);
        self.responded = Some(at);
        self.response_head_bytes = head_bytes(headers);
        if self.is_grpc {
            self.grpc_status = grpc_status(headers);
        }
        if !self.http.logs.is_empty() {
            self.response_headers = Some(Box::new(headers.clone()));
        }
    }

    /// Notes bytes of the response's body.
    pub fn sent(&mut self, n: usize) {
        self.sent_bytes += n as u64;
    }

    /// Notes a piece of the response's body.
    pub fn on_frame(&mut self, frame: &Option<Result<Frame<Bytes>, BodyError>>) {
        match frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.sent(data.len());
                } else if let Some(trailers) = frame.trailers_ref() {
                    if self.is_grpc {
                        self.grpc_status = grpc_status(trailers).or(self.grpc_status);
                    }
                    if !self.http.logs.is_empty() {
                        self.trailers = Some(Box::new(trailers.clone()));
                    }
                }
            }
            Some(Err(error)) => {
                let reset = error.downcast_ref::<h2::Error>().is_some_and(h2::Error::is_reset);
                let (flag, details) = if reset {
                    (Flags::UPSTREAM_RESET, "upstream_reset_after_response_started{remote_reset}")
                } else {
                    let details = "upstream_reset_after_response_started{connection_termination}";
                    (Flags::UPSTREAM_TERMINATION, details)
                };
                self.flags.insert(flag);
                self.failure = error.to_string();
                self.details = Cow::Borrowed(details);
            }
            None => {}
        }
    }

    /// Ready when one of the stream's limits has passed.
    pub fn poll_late(&mut self, attempt: Option<Attempt>, cx: &mut Context<'_>) -> Poll<Late> {
        let upload = self.upload();
        let Some((at, late)) = self.timing.next(upload, attempt) else { return Poll::Pending };
        let spare = [&self.connection.timers, &self.http.worker.shared.timers];
        self.timer.poll(at, spare, cx).map(|()| late)
    }

    /// How far the request has come.
    #[must_use]
    pub fn upload(&self) -> Upload {
        match &self.progress {
            None if self.leaves => Upload { whole: None, moved: None },
            None => Upload { whole: Some(self.started), moved: None },
            Some(progress) => Upload { whole: progress.ended.get(), moved: progress.last.get() },
        }
    }

    /// Notes that a limit has passed after the response began, and why the stream ends.
    pub fn cut_short(&mut self, late: Late) {
        let (flags, details) = match late {
            Late::Idle => {
                self.http.stats.rq_idle_timeout.inc();
                (Flags::STREAM_IDLE, "stream_idle_timeout")
            }
            Late::Request => {
                self.http.stats.rq_timeout.inc();
                (Flags::NONE, "request_overall_timeout")
            }
            Late::Route | Late::Try => (Flags::UPSTREAM_TIMEOUT, "response_timeout"),
        };
        self.flags.insert(flags);
        self.details = Cow::Borrowed(details);
    }

    /// The client went away before the end.
    pub fn client_left(&mut self) {
        if self.connection.is_stalled() {
            return self.cut_short(Late::Idle);
        }
        self.left = true;
        self.flags.insert(Flags::DOWNSTREAM_TERMINATION);
        self.details = Cow::Borrowed("downstream_remote_disconnect");
    }

    /// Milliseconds since the head was here.
    #[must_use]
    pub fn duration_ms(&self) -> f64 {
        milliseconds(self.started, Instant::now())
    }

    fn count(&self, now: Instant) {
        let http = &self.http;
        http.stats.rq_active.sub(1);
        let status = self.status.map_or(0, |s| s.as_u16());
        if let Some(class) = http.stats.rq_xx.get(usize::from(status / 100).wrapping_sub(1)) {
            class.inc();
        }
        let Some(reporter) = http.reporter else { return };
        let standard = &http.worker.shared.standard;
        let nobody = &http.worker.nobody;
        let (peer, principals): (_, Rc<Numbered<Principals>>) = match reporter {
            Reporter::Source => {
                let principals = self.link.as_ref().and_then(|l| l.principals.as_ref());
                let principals = principals.unwrap_or(&http.worker.no_principals);
                (self.host.as_ref().map(|h| &h.workload), Rc::clone(principals))
            }
            Reporter::Destination => (self.peer.as_ref(), self.connection.principals(standard)),
        };
        let parties = Parties {
            peer: peer.unwrap_or(nobody),
            service: self.upstream.as_ref().map_or(&http.worker.no_service, |u| &u.service),
            principals: &principals,
        };
        let key = RequestKey {
            reporter,
            peer: 0,
            service: 0,
            principals: 0,
            status,
            flags: self.flags,
            grpc: self.grpc_status,
            is_grpc: self.is_grpc,
            mutual_tls: self.connection.is_mutual_tls(),
        };
        let series = standard.request(key, parties);
        series.requests.inc();
        series.duration.observe(milliseconds(self.started, now));
        let body = self.progress.as_ref().map_or(0, |p| p.bytes.get());
        #[expect(clippy::cast_precision_loss, reason = "a histogram of sizes")]
        {
            series.request_bytes.observe((self.head_bytes + body) as f64);
            series.response_bytes.observe((self.response_head_bytes + self.sent_bytes) as f64);
        }
    }
}

impl Drop for Exchange {
    /// However an exchange ends, also by being dropped before there is a response, it is counted once.
    fn drop(&mut self) {
        if self.status.is_none() {
            self.client_left();
        }
        let now = self.over.unwrap_or_else(Instant::now);
        self.connection.end(now);
        if self.version == Version::HTTP_2 {
            let mut resets = self.connection.resets.get();
            resets.on_end(self.left.then(|| now.duration_since(self.started)));
            self.connection.resets.set(resets);
        }
        self.timer.leave([&self.connection.timers, &self.http.worker.shared.timers]);
        if self.is_grpc && self.grpc_status.is_none() && !self.left {
            // an answer that is none of gRPC means one of its statuses
            self.grpc_status = self.status.map(grpc_of);
        }
        self.count(now);
        if !self.http.logs.is_empty() {
            self.http.logs.write(self);
        }
    }
}

fn milliseconds(from: Instant, to: Instant) -> f64 {
    to.duration_since(from).as_secs_f64() * 1000.0
}

/// How many bytes these headers take, about.
#[must_use]
pub fn head_bytes(headers: &HeaderMap) -> u64 {
    headers.iter().map(|(n, v)| (n.as_str().len() + v.len() + 4) as u64).sum()
}

/// The gRPC status that these say.
#[must_use]
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}
