//! Requests that begin on time, whatever became of those before, over connections of several kinds; every failure is kept
//! in words, and how long the others took.
//!
//! A lane sends one request after the other, each at its own moment. One that is behind catches up, and gives up what it
//! did not begin within a second: time that a request waited for its lane counts as the time that it took.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ::http::{Request, Response};
use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A lane that is this far behind leaves out what it did not send.
const BEHIND: Duration = Duration::from_secs(1);
/// An answer is waited for this long.
const PATIENCE: Duration = Duration::from_secs(15);
/// A request that no connection took is offered to so many.
const OFFERS: u32 = 4;
/// Failures that are kept in words.
const KEPT: usize = 50;
/// The header in which answers tell the generation of the routes that they came by.
pub const GENERATION: &str = "x-generation";

/// A connection, and how long it is used.
#[derive(Debug, Clone, Copy)]
pub enum Connected {
    /// HTTP/1.1: one lane.
    Http1 {
        /// Requests until it is closed and another one opened.
        requests: u64,
    },
    /// HTTP/2: as many lanes.
    Http2 {
        /// Lanes that share it.
        lanes: usize,
        /// Requests until another one is opened.
        requests: u64,
    },
}

impl Connected {
    fn lanes(self) -> usize {
        match self {
            Self::Http1 { .. } => 1,
            Self::Http2 { lanes, .. } => lanes,
        }
    }
}

/// What is sent.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where to.
    pub address: SocketAddr,
    /// Paths, one after the other.
    pub paths: Arc<[String]>,
    /// Over what.
    pub connections: Vec<Connected>,
    /// Requests a second, all lanes together; 0: each lane sends as soon as it has its answer.
    pub rate: f64,
    /// Nobody need take new connections: a lane that needs one ends instead of failing.
    pub may_be_refused: bool,
}

/// What came of the requests.
#[derive(Debug)]
pub struct Counts {
    good: AtomicU64,
    failed: AtomicU64,
    left_out: AtomicU64,
    connections: AtomicU64,
    closings: AtomicU64,
    took: [AtomicU64; BUCKETS],
    words: Mutex<Vec<String>>,
    /// Answers have at least this generation.
    pub generation: AtomicU64,
    begun: Instant,
}

/// Powers of two of microseconds, each in eight parts: up to minutes.
const BUCKETS: usize = 8 * 28;

impl Default for Counts {
    fn default() -> Self {
        Self {
            good: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            closings: AtomicU64::new(0),
            took: std::array::from_fn(|_| AtomicU64::new(0)),
            words: Mutex::default(),
            generation: AtomicU64::new(0),
            begun: Instant::now(),
        }
    }
}

/// [`Counts`] at a moment.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Requests that were answered as they should be.
    pub good: u64,
    /// Others.
    pub failed: u64,
    /// Requests that were not begun because their lane was too far behind.
    pub left_out: u64,
    /// Connections that were opened.
    pub connections: u64,
    /// Connections that the proxy asked to end.
    pub closings: u64,
    took: Vec<u64>,
}

impl Seen {
    /// What came since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            good: self.good - before.good,
            failed: self.failed - before.failed,
            left_out: self.left_out - before.left_out,
            connections: self.connections - before.connections,
            closings: self.closings - before.closings,
            took: self.took.iter().zip(&before.took).map(|(now, before)| now - before).collect(),
        }
    }

    /// The time that this share of the answers took at most, within an eighth.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a number of requests"
    )]
    pub fn percentile(&self, share: f64) -> Duration {
        let mut left = (self.good as f64 * share).ceil() as u64;
        for (bucket, count) in self.took.iter().enumerate() {
            if *count >= left {
                return upper(bucket);
            }
            left -= count;
        }
        Duration::MAX
    }
}

/// Which bucket a time falls into.
fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(8);
    let power = micros.ilog2();
    let part = (micros >> (power - 3)) & 7;
    (usize::try_from((power - 3) * 8).unwrap_or(usize::MAX) + usize::try_from(part).unwrap_or_default())
        .min(BUCKETS - 1)
}

/// The longest time of a bucket.
fn upper(bucket: usize) -> Duration {
    let (power, part) = (bucket / 8, u64::try_from(bucket % 8).unwrap_or_default());
    Duration::from_micros((part + 9) << power)
}

impl Counts {
    /// What came until now.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Seen {
            good: of(&self.good),
            failed: of(&self.failed),
            left_out: of(&self.left_out),
            connections: of(&self.connections),
            closings: of(&self.closings),
            took: self.took.iter().map(of).collect(),
        }
    }

    /// The first failures, in words.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        self.words.lock().map(|words| words.clone()).unwrap_or_default()
    }

    fn note(&self, outcome: anyhow::Result<()>, took: Duration) {
        match outcome {
            Ok(()) => {
                self.good.fetch_add(1, Ordering::Relaxed);
                if let Some(count) = self.took.get(bucket(took)) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                if let Ok(mut words) = self.words.lock()
                    && words.len() < KEPT
                {
                    words.push(format!("{:.2?} after the start: {error:#}", self.begun.elapsed()));
                }
            }
        }
    }
}

/// A load that runs until it is stopped.
#[derive(Debug)]
pub struct Paced {
    counts: Arc<Counts>,
    stop: CancellationToken,
    lanes: TaskTracker,
    /// What drives connections.
    drivers: TaskTracker,
}

impl Paced {
    /// Starts to send.
    #[must_use]
    pub fn start(plan: &Plan, counts: Arc<Counts>) -> Self {
        let paced = Self {
            counts,
            stop: CancellationToken::new(),
            lanes: TaskTracker::new(),
            drivers: TaskTracker::new(),
        };
        let all: usize = plan.connections.iter().map(|c| c.lanes()).sum();
        let all = u32::try_from(all).unwrap_or(u32::MAX);
        let every = (plan.rate > 0.0).then(|| Duration::from_secs_f64(f64::from(all) / plan.rate));
        let (begun, mut number) = (Instant::now(), 0_u32);
        for connected in &plan.connections {
            let line = Arc::new(Line {
                address: plan.address,
                connected: *connected,
                counts: Arc::clone(&paced.counts),
                drivers: paced.drivers.clone(),
                may_be_refused: plan.may_be_refused,
                current: tokio::sync::Mutex::default(),
                number: AtomicU64::new(0),
            });
            for _ in 0..connected.lanes() {
                // They do not begin all at once.
                let first = begun + every.unwrap_or_default() * number / all;
                let lane = Lane {
                    line: Arc::clone(&line),
                    paths: Arc::clone(&plan.paths),
                    next: usize::try_from(number).unwrap_or_default(),
                    stop: paced.stop.clone(),
                };
                paced.lanes.spawn(lane.run(first, every));
                number += 1;
            }
        }
        paced
    }

    /// Waits until no lane sends any more, because nobody takes its connections.
    pub async fn refused(&self) {
        self.lanes.close();
        self.lanes.wait().await;
    }

    /// Begins nothing more, and waits for what is under way.
    pub async fn stop(self) -> Seen {
        self.stop.cancel();
        self.lanes.close();
        self.lanes.wait().await;
        self.drivers.close();
        self.drivers.wait().await;
        self.counts.seen()
    }
}

/// A connection and those that come after it.
#[derive(Debug)]
struct Line {
    address: SocketAddr,
    connected: Connected,
    counts: Arc<Counts>,
    drivers: TaskTracker,
    may_be_refused: bool,
    /// The connection in use, and for how many requests it has been.
    current: tokio::sync::Mutex<Option<(Sender, u64)>>,
    /// Its number.
    number: AtomicU64,
}

/// Takes requests to one connection.
#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// Where a failure was: there was no connection yet.
#[derive(Debug, Clone, Copy)]
struct Connect;

impl std::fmt::Display for Connect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("connect")
    }
}

/// What became of a request that was offered to a connection.
enum Offered {
    Answered(Response<Incoming>),
    /// The connection had ended before: the server did nothing for it.
    Unsent(Request<Full<Bytes>>),
}

impl Line {
    async fn open(&self) -> anyhow::Result<Sender> {
        let stream = TcpStream::connect(self.address).await.context(Connect)?;
        stream.set_nodelay(true)?;
        self.counts.connections.fetch_add(1, Ordering::Relaxed);
        let io = TokioIo::new(stream);
        // What goes wrong on a connection is told by its requests.
        Ok(match self.connected {
            Connected::Http1 { .. } => {
                let (sender, connection) = http1::handshake(io).await.context("handshake")?;
                self.drivers.spawn(async move { connection.await.unwrap_or_default() });
                Sender::Http1(sender)
            }
            Connected::Http2 { .. } => {
                let (sender, connection) =
                    http2::handshake(TokioExecutor::new(), io).await.context("handshake")?;
                self.drivers.spawn(async move { connection.await.unwrap_or_default() });
                Sender::Http2(sender)
            }
        })
    }

    /// Sends over the connection of this moment, or over a new one where that does not take it.
    async fn send(&self, mut request: Request<Full<Bytes>>) -> anyhow::Result<Response<Incoming>> {
        for _ in 0..OFFERS {
            let offered = match self.connected {
                Connected::Http1 { requests } => self.over_http1(request, requests).await,
                Connected::Http2 { requests, .. } => self.over_http2(request, requests).await,
            }?;
            match offered {
                Offered::Answered(response) => return Ok(response),
                Offered::Unsent(unsent) => request = unsent,
            }
        }
        anyhow::bail!("{OFFERS} connections took no request")
    }

    async fn over_http1(&self, request: Request<Full<Bytes>>, requests: u64) -> anyhow::Result<Offered> {
        // There is one lane, so nobody waits for this.
        let mut current = self.current.lock().await;
        let (mut sender, used) = match current.take() {
            Some((Sender::Http1(sender), used)) if used < requests => (sender, used),
            _ => match self.open().await? {
                Sender::Http1(sender) => (sender, 0),
                Sender::Http2(_) => anyhow::bail!("another protocol"),
            },
        };
        if sender.ready().await.is_err() {
            return Ok(Offered::Unsent(request));
        }
        let offered = offered(sender.try_send_request(request).await)?;
        *current = Some((Sender::Http1(sender), used + 1));
        Ok(offered)
    }

    async fn over_http2(&self, request: Request<Full<Bytes>>, requests: u64) -> anyhow::Result<Offered> {
        let (mut sender, number) = {
            let mut current = self.current.lock().await;
            if current.as_ref().is_none_or(|(_, used)| *used >= requests) {
                *current = Some((self.open().await?, 0));
                self.number.fetch_add(1, Ordering::Relaxed);
            }
            let Some((Sender::Http2(sender), used)) = current.as_mut() else {
                anyhow::bail!("another protocol")
            };
            *used += 1;
            (sender.clone(), self.number.load(Ordering::Relaxed))
        };
        let offered = match sender.ready().await {
            Ok(()) => {
                let same = request.clone();
                match sender.try_send_request(request).await {
                    Err(error) if is_unprocessed(error.error()) => Offered::Unsent(same),
                    sent => offered(sent)?,
                }
            }
            Err(_) => Offered::Unsent(request),
        };
        if matches!(offered, Offered::Unsent(_)) {
            let mut current = self.current.lock().await;
            // Unless another lane has opened the next one already.
            if self.number.load(Ordering::Relaxed) == number {
                *current = None;
            }
        }
        Ok(offered)
    }
}

fn offered(sent: Result<Response<Incoming>, TrySendError<Request<Full<Bytes>>>>) -> anyhow::Result<Offered> {
    match sent {
        Ok(response) => Ok(Offered::Answered(response)),
        Err(mut error) => match error.take_message() {
            Some(unsent) => Ok(Offered::Unsent(unsent)),
            None => Err(error.into_error().into()),
        },
    }
}

/// The server has said that it ends the connection and did nothing for this request (RFC 9113, section 6.8).
fn is_unprocessed(error: &hyper::Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|e| e.is_go_away() && e.is_remote() && e.reason() == Some(h2::Reason::NO_ERROR))
}

/// Sends one request after the other.
#[derive(Debug)]
struct Lane {
    line: Arc<Line>,
    paths: Arc<[String]>,
    next: usize,
    stop: CancellationToken,
}

impl Lane {
    async fn run(mut self, first: Instant, every: Option<Duration>) {
        let mut begins = first;
        loop {
            // paced: requests begin when their time comes, not when the last one is over
            let due = tokio::time::sleep_until(begins);
            if self.stop.is_cancelled() || self.stop.run_until_cancelled(due).await.is_none() {
                return;
            }
            let answered = tokio::time::timeout(PATIENCE, self.one()).await;
            let counts = &self.line.counts;
            if self.line.may_be_refused
                && let Ok(Err(error)) = &answered
                && error.downcast_ref::<Connect>().is_some()
            {
                return;
            }
            let outcome = answered.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {PATIENCE:?}")));
            counts.note(outcome, begins.elapsed());
            let Some(every) = every else {
                begins = Instant::now();
                continue;
            };
            begins += every;
            let behind = begins.elapsed();
            if behind > BEHIND {
                let missed = behind.div_duration_f64(every);
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a small number"
                )]
                counts.left_out.fetch_add(missed as u64, Ordering::Relaxed);
                begins = Instant::now();
            }
        }
    }

    async fn one(&mut self) -> anyhow::Result<()> {
        self.next += 1;
        let path = self.paths.get(self.next % self.paths.len()).context("no path")?;
        let counts = &self.line.counts;
        let wanted = counts.generation.load(Ordering::Relaxed);
        let over = match self.line.connected {
            Connected::Http1 { .. } => "HTTP/1",
            Connected::Http2 { .. } => "HTTP/2",
        };
        let asked = || format!("{path} over {over}");
        let response = self.line.send(self.request(path)?).await.with_context(asked)?;
        let (head, body) = response.into_parts();
        if head.headers.get("connection").is_some_and(|v| v == "close") {
            counts.closings.fetch_add(1, Ordering::Relaxed);
        }
        let body = body.collect().await.with_context(asked)?.to_bytes();
        let text =
            || String::from_utf8_lossy(body.get(..200.min(body.len())).unwrap_or_default()).into_owned();
        anyhow::ensure!(head.status == 200, "{}: {} {}", asked(), head.status, text());
        let length = head.headers.get("content-length").and_then(|v| v.to_str().ok()?.parse().ok());
        anyhow::ensure!(length == Some(body.len()), "{}: {length:?} bytes became {}", asked(), body.len());
        let generation = head.headers.get(GENERATION).and_then(|v| v.to_str().ok()?.parse().ok());
        let generation: u64 = generation.unwrap_or_default();
        anyhow::ensure!(generation >= wanted, "{}: routes {generation} after {wanted}", asked());
        Ok(())
    }

    /// Every eighth has a body.
    fn request(&self, path: &str) -> anyhow::Result<Request<Full<Bytes>>> {
        let request = Request::builder();
        let request = match self.line.connected {
            Connected::Http1 { .. } => request.uri(path).header("host", "paced"),
            Connected::Http2 { .. } => request.uri(format!("http://paced{path}")),
        };
        Ok(if self.next.is_multiple_of(8) {
            request.method("POST").body(Full::new(Bytes::from_static(&[b'x'; 1024])))?
        } else {
            request.body(Full::default())?
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_within_an_eighth() {
        for micros in [8, 9, 100, 1_000, 1_023, 1_024, 65_000, 14_000_000] {
            let took = Duration::from_micros(micros);
            let told = upper(bucket(took));
            assert!(told > took && told <= took * 9 / 8 + Duration::from_micros(1), "{took:?} {told:?}");
        }
    }
}
