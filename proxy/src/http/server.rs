//! HTTP/1 and HTTP/2 from the client: one task per connection, its requests through [`forward`].

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::{Instant, Sleep};

use super::body::Received;
use super::call::refuse_unread;
use super::exchange::Exchange;
use super::flags::Flags;
use super::flood::Metered;
use super::h1::{H1, Settings};
use super::reply::Local as Reply;
use super::timing::Alarm;
use super::{Http, HttpResponse, forward};
use crate::h1::head::Malformed;
use crate::h1::request as head;
use crate::listener::connection::Connection;
use crate::listener::detect::H2_PREFACE;
use crate::listener::slot::Place;
use crate::signal::Subscription;
use crate::tcp::gather::Gathered;
use crate::tcp::io::Io;
use crate::worker::Worker;
use crate::xds::listener::hcm::Codec;

/// How long an idle HTTP/1 connection outlives the order to end. A request may be on its way to us; HTTP/1 has no
/// word to say beforehand that it would not be answered.
const IDLE_LINGER: Duration = Duration::from_secs(1);
/// The least room for a head, in bytes.
const LEAST_HEAD: usize = 8192;

/// Serves a connection until it ends, is idle for too long, or is cut.
pub async fn serve(http: Rc<Http>, place: Place, connection: Rc<Connection>, mut io: Io) {
    let mut ending = Ending::new(&http.worker, place);
    let alpn = connection.peer.as_ref().and_then(|p| p.alpn.as_deref());
    let h2 = match http.config.codec {
        Codec::Http1 => false,
        Codec::Http2 => true,
        Codec::Auto => match alpn {
            Some(b"h2") => true,
            Some(b"http/1.1" | b"http/1.0" | b"istio-http/1.1") => false,
            _ => {
                let ends = async {
                    ending.begun().await;
                    tokio::time::sleep(IDLE_LINGER).await;
                };
                let found = tokio::select! {
                    found = sniff(io, &http) => found,
                    () = ends => None,
                };
                match found {
                    Some((found, is_h2)) => {
                        io = found;
                        is_h2
                    }
                    None => return,
                }
            }
        },
    };
    if h2 {
        serve_h2(http, ending, connection, io).await;
    } else {
        serve_h1(http, ending, connection, io).await;
    }
}

/// Looks whether the connection begins with the HTTP/2 preface.
async fn sniff(mut io: Io, http: &Http) -> Option<(Io, bool)> {
    use tokio::io::AsyncReadExt as _;
    let mut ahead = Vec::with_capacity(H2_PREFACE.len());
    while H2_PREFACE.starts_with(&ahead) && ahead.len() < H2_PREFACE.len() {
        let mut piece = [0; 24];
        let room = piece.get_mut(..H2_PREFACE.len() - ahead.len())?;
        let read = io.read(room);
        let timeouts = &http.config.timeouts;
        let begun = [timeouts.stream_idle, timeouts.request, timeouts.request_headers];
        let limit = if ahead.is_empty() {
            timeouts.idle
        } else {
            begun.into_iter().flatten().min().or(timeouts.idle)
        };
        let n = match limit {
            Some(limit) => tokio::time::timeout(limit, read).await.ok()?.ok()?,
            None => read.await.ok()?,
        };
        if n == 0 {
            return None;
        }
        ahead.extend_from_slice(room.get(..n)?);
    }
    let is_h2 = ahead == H2_PREFACE;
    Some((io.resumed(ahead.into()), is_h2))
}

/// How a connection ends before its client ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Its requests may end first.
    Gently,
    /// At once.
    Now,
    /// With an answer to a request whose head does not end.
    Head(HeadLate),
}

/// A limit on the head of a request that has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HeadLate {
    Idle,
    Request,
    Headers,
}

/// A head that has begun.
#[derive(Clone, Copy, Debug)]
struct Head {
    began: Instant,
    moved: Instant,
    length: usize,
}

/// The timers of a connection: idle, longest life, a client that takes nothing.
struct Limits {
    idle: Option<Duration>,
    stall: Option<Duration>,
    until: Option<Instant>,
    /// The connection was told to end gently.
    told: bool,
    /// Until the whole request is here, and until its headers are.
    request: Option<Duration>,
    headers: Option<Duration>,
    head: Option<Head>,
    alarm: Option<Alarm>,
}

impl Limits {
    fn new(http: &Http, now: Instant) -> Self {
        let timeouts = &http.config.timeouts;
        let until = timeouts.max_connection_duration.map(|d| now + d);
        let (idle, stall) = (timeouts.idle, timeouts.stream_idle);
        let first = [idle.map(|d| now + d), stall.map(|d| now + d), until].into_iter().flatten().min();
        let alarm = first.map(Alarm::new);
        let (request, headers) = (timeouts.request, timeouts.request_headers);
        Self { idle, stall, until, told: false, request, headers, head: None, alarm }
    }

    /// When the connection ends if nothing more happens, and how.
    fn next(&self, connection: &Connection, now: Instant) -> Option<(Instant, End)> {
        let quiet = connection.quiet_since();
        let busy = quiet.is_none();
        let idle = self.idle.map(|d| quiet.unwrap_or(now) + d);
        let gently = [idle, self.until].into_iter().flatten().filter(|_| !self.told).min();
        let stall = self.stall.filter(|_| busy || !self.told);
        let stall = stall.map(|d| connection.held_since().filter(|_| busy).unwrap_or(now) + d);
        let ends = [gently.map(|at| (at, End::Gently)), stall.map(|at| (at, End::Now)), self.head_ends()];
        ends.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn head_ends(&self) -> Option<(Instant, End)> {
        let head = self.head?;
        let ends = [
            self.headers.map(|d| (head.began + d, HeadLate::Headers)),
            self.request.map(|d| (head.began + d, HeadLate::Request)),
            self.stall.map(|d| (head.moved + d, HeadLate::Idle)),
        ];
        ends.into_iter().flatten().min_by_key(|(at, _)| *at).map(|(at, late)| (at, End::Head(late)))
    }

    /// Looks whether a head has begun, of which so much has come, and sets the timer to its end if that comes first.
    fn look_at_head(&mut self, length: usize) {
        if length == 0 {
            self.head = None;
            return;
        }
        if self.head.is_some_and(|head| head.length == length) {
            return;
        }
        let now = Instant::now();
        let began = self.head.map_or(now, |head| head.began);
        self.head = Some(Head { began, moved: now, length });
        if let Some((at, _)) = self.head_ends() {
            match &mut self.alarm {
                Some(alarm) if at < alarm.deadline() => alarm.reset(at),
                Some(_) => {}
                None => self.alarm = Some(Alarm::new(at)),
            }
        }
    }

    /// Ready when the connection should end. The timer is moved when it fires, not with every request. `head`: bytes of
    /// a head that is not whole.
    fn poll(&mut self, connection: &Connection, head: usize, cx: &mut Context<'_>) -> Poll<End> {
        self.look_at_head(head);
        loop {
            let Some(alarm) = &mut self.alarm else { return Poll::Pending };
            if alarm.poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            let next = self.next(connection, now);
            match (next, &mut self.alarm) {
                (Some((at, _)), Some(alarm)) if now < at => alarm.reset(at),
                (Some((_, End::Gently)), _) => {
                    self.told = true;
                    cx.waker().wake_by_ref(); // what else is limited is looked at next
                    return Poll::Ready(End::Gently);
                }
                (Some((_, end @ (End::Now | End::Head(_)))), _) => {
                    self.alarm = None;
                    return Poll::Ready(end);
                }
                (None, _) => {
                    self.alarm = None;
                    return Poll::Pending;
                }
            }
        }
    }
}

/// What ends a connection from outside: the proxy's own end, and that of its listener.
struct Ending {
    worker: Rc<Worker>,
    place: Rc<Place>,
    of_worker: Subscription,
    of_place: Subscription,
    /// Its requests may end first.
    gently: bool,
    /// At once.
    cut: bool,
}

impl Ending {
    fn new(worker: &Rc<Worker>, place: Place) -> Self {
        let (of_worker, of_place) = (worker.ending.subscribe(), place.changes());
        let (worker, place) = (Rc::clone(worker), Rc::new(place));
        Self { worker, place, of_worker, of_place, gently: false, cut: false }
    }

    /// Ends when it has begun.
    async fn begun(&mut self) {
        std::future::poll_fn(|cx| {
            self.look(cx);
            if self.gently || self.cut { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Looks whether it ends; the task is woken when that may have changed.
    fn look(&mut self, cx: &Context<'_>) {
        if self.of_worker.changed(cx) {
            self.cut = self.worker.drain.is_cut();
            self.gently |= self.worker.is_draining();
        }
        if self.of_place.changed(cx) {
            self.gently |= self.place.is_outlived();
        }
    }
}

/// Handles one request of a connection; the connection manager may have been replaced since the last one.
async fn request(
    worker: Rc<Worker>,
    place: Rc<Place>,
    connection: Rc<Connection>,
    request: Request<Received>,
) -> HttpResponse {
    worker.refresh();
    match place.http(&connection) {
        Ok(http) => forward(http, connection, request).await,
        Err(http) => {
            let exchange = Exchange::new(http, connection, Instant::now(), request.version());
            let gone = Reply::text(http::StatusCode::SERVICE_UNAVAILABLE, "");
            gone.details("filter_chain_removed").into_response(Box::new(exchange))
        }
    }
}

async fn serve_h1(http: Rc<Http>, mut ending: Ending, connection: Rc<Connection>, io: Io) {
    let worker = Rc::clone(&http.worker);
    let mut limits = Limits::new(&http, Instant::now());
    let config = &http.config;
    let server = H1::new(
        io,
        Settings {
            limits: head::Limits {
                headers: usize::try_from(config.max_headers_count).unwrap_or(usize::MAX),
                bytes: config.max_request_headers.max(LEAST_HEAD),
            },
            old: config.http1.accept_http_10,
            proper_case: config.http1.proper_case,
        },
    );
    let place = Rc::clone(&ending.place);
    // boxed, so that a connection that waits has no room for a request; begun in there, because it would be moved
    let answer = |asked: Result<Request<Received>, Malformed>| {
        let (worker, place, connection) = (Rc::clone(&worker), Rc::clone(&place), Rc::clone(&connection));
        Box::pin(async move {
            match asked {
                Ok(asked) => request(worker, place, connection, asked).await,
                Err(why) => {
                    let http = place.http(&connection).unwrap_or_else(|http| http);
                    let exchange = Exchange::new(http, connection, Instant::now(), http::Version::HTTP_11);
                    refuse_unread(Box::new(exchange), why)
                }
            }
        })
    };
    let mut run = pin!(server.run(&connection, answer));
    let mut lingers: Option<Pin<Box<Sleep>>> = None;
    let mut drained = false;
    let outcome = std::future::poll_fn(|cx| {
        if let Poll::Ready(result) = run.as_mut().poll(cx) {
            return Poll::Ready(Some(result));
        }
        ending.look(cx);
        if ending.cut {
            return Poll::Ready(None);
        }
        if lingers.is_none() && ending.gently {
            lingers = Some(Box::pin(tokio::time::sleep(IDLE_LINGER)));
        }
        // a connection with a request tells so in its response and ends after it
        let drains = !drained
            && lingers.as_mut().is_some_and(|linger| {
                connection.quiet_since().is_none() || linger.as_mut().poll(cx).is_ready()
            });
        let end = limits.poll(&connection, server.head_waiting(), cx);
        match end {
            Poll::Ready(End::Now) => {
                stalled(&http, &connection);
                return Poll::Ready(None);
            }
            Poll::Ready(End::Head(late)) => {
                server.end_with(head_answer(&http, &connection, late));
                return run.as_mut().poll(cx).map(Some);
            }
            Poll::Ready(End::Gently) | Poll::Pending => {}
        }
        if drains || end.is_ready() {
            drained = true;
            server.end();
            return run.as_mut().poll(cx).map(Some);
        }
        Poll::Pending
    })
    .await;
    if let Some(Err(error)) = outcome {
        tracing::debug!(%error, connection = connection.id, "http/1 connection ended");
    }
}

/// The answer to a request whose head does not end.
fn head_answer(http: &Rc<Http>, connection: &Rc<Connection>, late: HeadLate) -> HttpResponse {
    let (text, details, flags) = match late {
        HeadLate::Idle => ("stream timeout", "stream_idle_timeout", Flags::STREAM_IDLE),
        HeadLate::Request => ("request timeout", "request_overall_timeout", Flags::NONE),
        HeadLate::Headers => ("request header timeout", "request_header_timeout", Flags::NONE),
    };
    let counter = if late == HeadLate::Idle { &http.stats.rq_idle_timeout } else { &http.stats.rq_timeout };
    counter.inc();
    let now = Instant::now();
    let exchange = Exchange::new(Rc::clone(http), Rc::clone(connection), now, http::Version::HTTP_11);
    let local = Reply::text(http::StatusCode::REQUEST_TIMEOUT, text).flag(flags).details(details);
    local.into_response(Box::new(exchange))
}

/// A client takes nothing of what waits for it: its connection is closed, and its requests end as idle ones.
fn stalled(http: &Http, connection: &Connection) {
    http.stats.stalled.inc();
    connection.stall();
}

/// Runs hyper's tasks of one connection on the worker.
#[derive(Clone, Debug)]
struct Local(tokio_util::task::TaskTracker);

impl<F: Future + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, task: F) {
        self.0.spawn_local(async move {
            task.await;
        });
    }
}

async fn serve_h2(http: Rc<Http>, mut ending: Ending, connection: Rc<Connection>, io: Io) {
    let worker = Rc::clone(&http.worker);
    let mut limits = Limits::new(&http, Instant::now());
    let service = {
        let (worker, connection) = (Rc::clone(&worker), Rc::clone(&connection));
        let place = Rc::clone(&ending.place);
        // boxed, because the codec moves it several times on its way into a task; begun in there, because it would be
        // moved once more
        service_fn(move |asked: Request<Incoming>| {
            let (worker, place, connection) = (Rc::clone(&worker), Rc::clone(&place), Rc::clone(&connection));
            Box::pin(async move {
                let answered = request(worker, place, connection, asked.map(Received::H2)).await;
                Ok::<_, std::convert::Infallible>(answered)
            })
        })
    };
    let settings = &http.config.http2;
    let mut builder = http2::Builder::new(Local(worker.shared.tasks.clone()));
    builder
        .max_concurrent_streams(settings.max_concurrent_streams)
        .initial_stream_window_size(settings.initial_stream_window.min(1 << 20))
        .initial_connection_window_size(settings.initial_connection_window.min(8 << 20))
        .max_header_list_size(u32::try_from(http.config.max_request_headers).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(Some(20))
        .max_local_error_reset_streams(Some(1024))
        .max_send_buf_size(1 << 20)
        .auto_date_header(false);
    if settings.allow_connect {
        builder.enable_connect_protocol();
    }
    if let Some((interval, timeout)) = settings.keepalive {
        builder.timer(TokioTimer::new()).keep_alive_interval(interval).keep_alive_timeout(timeout);
    }
    let gathered = Gathered::new(io);
    let io = Metered::new(gathered.clone(), Instant::now());
    let server = builder.serve_connection(TokioIo::new(io), service);
    let mut server = pin!(server);
    let mut drained = false;
    let mut turn = |cx: &mut Context<'_>| {
        if let Poll::Ready(result) = server.as_mut().poll(cx) {
            return Poll::Ready(Some(result));
        }
        ending.look(cx);
        if ending.cut {
            return Poll::Ready(None);
        }
        let drains = !drained && (connection.is_draining() || ending.gently);
        let end = limits.poll(&connection, 0, cx);
        if end == Poll::Ready(End::Now) {
            stalled(&http, &connection);
            return Poll::Ready(None);
        }
        if connection.resets.get().are_too_many() {
            http.stats.too_many_resets.inc();
            return Poll::Ready(None);
        }
        if drains || end.is_ready() {
            drained = true;
            server.as_mut().graceful_shutdown();
            return server.as_mut().poll(cx).map(Some);
        }
        Poll::Pending
    };
    let result = std::future::poll_fn(|cx| {
        let result = turn(cx);
        gathered.send(cx);
        result
    })
    .await;
    if let Some(Err(error)) = result {
        tracing::debug!(%error, connection = connection.id, "http/2 connection ended");
    }
}
