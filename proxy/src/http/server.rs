//! HTTP/1 and HTTP/2 from the client: one task per connection, its requests through [`forward`].

use std::cell::RefCell;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::{Instant, Sleep};

use super::exchange::Exchange;
use super::flood::Metered;
use super::{Http, forward};
use crate::listener::connection::Connection;
use crate::listener::detect::H2_PREFACE;
use crate::listener::slot::Place;
use crate::tcp::io::Io;
use crate::tcp::relay::{Counts, relay};
use crate::upstream::h1::H1;
use crate::worker::Worker;
use crate::xds::listener::hcm::Codec;

/// How long an idle HTTP/1 connection outlives the order to end. A request may be on its way to us; HTTP/1 has no
/// word to say beforehand that it would not be answered.
const IDLE_LINGER: Duration = Duration::from_secs(1);

/// Serves a connection until it ends, is idle for too long, or is cut.
pub async fn serve(http: Rc<Http>, place: Place, connection: Rc<Connection>, mut io: Io) {
    let alpn = connection.peer.as_ref().and_then(|p| p.alpn.as_deref());
    let h2 = match http.config.codec {
        Codec::Http1 => false,
        Codec::Http2 => true,
        Codec::Auto => match alpn {
            Some(b"h2") => true,
            Some(b"http/1.1" | b"http/1.0" | b"istio-http/1.1") => false,
            _ => {
                let idle = http.config.timeouts.idle;
                match sniff(io, idle).await {
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
        serve_h2(http, place, connection, io).await;
    } else {
        serve_h1(http, place, connection, io).await;
    }
}

/// Looks whether the connection begins with the HTTP/2 preface.
async fn sniff(mut io: Io, idle: Option<Duration>) -> Option<(Io, bool)> {
    use tokio::io::AsyncReadExt as _;
    let mut ahead = Vec::with_capacity(H2_PREFACE.len());
    while H2_PREFACE.starts_with(&ahead) && ahead.len() < H2_PREFACE.len() {
        let mut piece = [0; 24];
        let room = piece.get_mut(..H2_PREFACE.len() - ahead.len())?;
        let read = io.read(room);
        let n = match idle {
            Some(idle) => tokio::time::timeout(idle, read).await.ok()?.ok()?,
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
}

/// The timers of a connection: idle, longest life, a client that takes nothing.
struct Limits {
    idle: Option<Duration>,
    stall: Option<Duration>,
    until: Option<Instant>,
    /// The connection was told to end gently.
    told: bool,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Limits {
    fn new(http: &Http, now: Instant) -> Self {
        let timeouts = &http.config.timeouts;
        let until = timeouts.max_connection_duration.map(|d| now + d);
        let (idle, stall) = (timeouts.idle, timeouts.stream_idle);
        let first = [idle.map(|d| now + d), stall.map(|d| now + d), until].into_iter().flatten().min();
        let sleep = first.map(|at| Box::pin(tokio::time::sleep_until(at)));
        Self { idle, stall, until, told: false, sleep }
    }

    /// When the connection ends if nothing more happens, and how.
    fn next(&self, connection: &Connection, now: Instant) -> Option<(Instant, End)> {
        let quiet = connection.quiet_since();
        let busy = quiet.is_none();
        let idle = self.idle.map(|d| quiet.unwrap_or(now) + d);
        let gently = [idle, self.until].into_iter().flatten().filter(|_| !self.told).min();
        let stall = self.stall.filter(|_| busy || !self.told);
        let stall = stall.map(|d| connection.held_since().filter(|_| busy).unwrap_or(now) + d);
        let ends = [gently.map(|at| (at, End::Gently)), stall.map(|at| (at, End::Now))];
        ends.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Ready when the connection should end. The timer is moved when it fires, not with every request.
    fn poll(&mut self, connection: &Connection, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            let Some(sleep) = &mut self.sleep else { return Poll::Pending };
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            let next = self.next(connection, now);
            match (next, &mut self.sleep) {
                (Some((at, _)), Some(sleep)) if now < at => sleep.as_mut().reset(at),
                (Some((_, End::Gently)), _) => {
                    self.told = true;
                    cx.waker().wake_by_ref(); // what else is limited is looked at next
                    return Poll::Ready(End::Gently);
                }
                (Some((_, end @ End::Now)), _) => {
                    self.sleep = None;
                    return Poll::Ready(end);
                }
                (None, _) => {
                    self.sleep = None;
                    return Poll::Pending;
                }
            }
        }
    }
}

/// Handles one request of a connection; the connection manager may have been replaced since the last one.
async fn request(
    worker: Rc<Worker>,
    place: Rc<Place>,
    connection: Rc<Connection>,
    request: Request<Incoming>,
) -> Result<super::HttpResponse, std::convert::Infallible> {
    worker.refresh();
    let response = match place.http(&connection) {
        Ok(http) => forward(http, connection, request).await,
        Err(http) => {
            let exchange = Exchange::new(http, connection, Instant::now(), request.version());
            let gone = super::reply::Local::text(http::StatusCode::SERVICE_UNAVAILABLE, "");
            gone.details("filter_chain_removed").into_response(Box::new(exchange))
        }
    };
    Ok(response)
}

async fn serve_h1(http: Rc<Http>, place: Place, connection: Rc<Connection>, io: Io) {
    let worker = Rc::clone(&http.worker);
    let place = Rc::new(place);
    let outlived = Rc::clone(&place);
    let mut outlived = pin!(outlived.outlived());
    let mut limits = Limits::new(&http, Instant::now());
    let service = {
        let (worker, connection) = (Rc::clone(&worker), Rc::clone(&connection));
        service_fn(move |r| request(Rc::clone(&worker), Rc::clone(&place), Rc::clone(&connection), r))
    };
    let mut builder = http1::Builder::new();
    builder
        .max_headers(usize::try_from(http.config.max_headers_count).unwrap_or(100))
        .max_buf_size(http.config.max_request_headers.max(8192))
        .title_case_headers(http.config.http1.proper_case);
    if let Some(timeout) = http.config.timeouts.request_headers {
        builder.timer(TokioTimer::new()).header_read_timeout(timeout);
    }
    let server = builder.serve_connection(TokioIo::new(io), service).with_upgrades();
    let mut server = pin!(server);
    let mut draining = pin!(worker.drain.draining());
    let mut cut = pin!(worker.drain.cut());
    let mut lingers: Option<Pin<Box<Sleep>>> = None;
    let mut drained = false;
    let outcome = std::future::poll_fn(|cx| {
        if let Poll::Ready(result) = server.as_mut().poll(cx) {
            return Poll::Ready(Some(result));
        }
        if cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        if lingers.is_none()
            && (draining.as_mut().poll(cx).is_ready() || outlived.as_mut().poll(cx).is_ready())
        {
            lingers = Some(Box::pin(tokio::time::sleep(IDLE_LINGER)));
        }
        // a connection with a request tells so in its response and ends after it
        let drains = !drained
            && lingers.as_mut().is_some_and(|linger| {
                connection.quiet_since().is_none() || linger.as_mut().poll(cx).is_ready()
            });
        let end = limits.poll(&connection, cx);
        if end == Poll::Ready(End::Now) {
            stalled(&http, &connection);
            return Poll::Ready(None);
        }
        if drains || end.is_ready() {
            drained = true;
            server.as_mut().graceful_shutdown();
            return server.as_mut().poll(cx).map(Some);
        }
        Poll::Pending
    })
    .await;
    if let Some(Err(error)) = outcome {
        tracing::debug!(%error, connection = connection.id, "http/1 connection ended");
    }
}

/// A client takes nothing of what waits for it: its connection is closed, and its requests end as idle ones.
fn stalled(http: &Http, connection: &Connection) {
    http.stats.stalled.inc();
    connection.stall();
}

/// Relays bytes after an upgrade, once the client has the response.
pub async fn tunnel(worker: Rc<Worker>, client: OnUpgrade, stream: Box<H1>, mut exchange: Box<Exchange>) {
    let (mut server, _opened) = stream.into_io();
    let Ok(client) = client.await else { return };
    let mut client = TokioIo::new(client);
    let counts = Counts::default();
    let idle = exchange.timing.idle();
    tokio::select! {
        end = relay(&mut client, &mut server, idle, &counts) => {
            tracing::debug!(?end, "upgraded connection ended");
        }
        () = worker.drain.cut() => {}
    }
    exchange.sent_bytes += counts.down.get();
    let progress = exchange.progress.get_or_insert_default();
    progress.bytes.set(progress.bytes.get() + counts.up.get());
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

async fn serve_h2(http: Rc<Http>, place: Place, connection: Rc<Connection>, io: Io) {
    let worker = Rc::clone(&http.worker);
    let place = Rc::new(place);
    let outlived = Rc::clone(&place);
    let mut outlived = pin!(outlived.outlived());
    let mut limits = Limits::new(&http, Instant::now());
    let service = {
        let (worker, connection) = (Rc::clone(&worker), Rc::clone(&connection));
        service_fn(move |r| request(Rc::clone(&worker), Rc::clone(&place), Rc::clone(&connection), r))
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
        .max_send_buf_size(1 << 20);
    if let Some((interval, timeout)) = settings.keepalive {
        builder.timer(TokioTimer::new()).keep_alive_interval(interval).keep_alive_timeout(timeout);
    }
    let io = Metered::new(io, Instant::now());
    let server = builder.serve_connection(TokioIo::new(io), service);
    let mut server = pin!(server);
    let mut draining = pin!(worker.drain.draining());
    let mut cut = pin!(worker.drain.cut());
    let drained = RefCell::new(false);
    let result = std::future::poll_fn(|cx| {
        if let Poll::Ready(result) = server.as_mut().poll(cx) {
            return Poll::Ready(Some(result));
        }
        if cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        let mut drained = drained.borrow_mut();
        let drains = !*drained
            && (connection.is_draining()
                || draining.as_mut().poll(cx).is_ready()
                || outlived.as_mut().poll(cx).is_ready());
        let end = limits.poll(&connection, cx);
        if end == Poll::Ready(End::Now) {
            stalled(&http, &connection);
            return Poll::Ready(None);
        }
        if connection.resets.get().are_too_many() {
            http.stats.too_many_resets.inc();
            return Poll::Ready(None);
        }
        if drains || end.is_ready() {
            *drained = true;
            server.as_mut().graceful_shutdown();
            return server.as_mut().poll(cx).map(Some);
        }
        Poll::Pending
    })
    .await;
    if let Some(Err(error)) = result {
        tracing::debug!(%error, connection = connection.id, "http/2 connection ended");
    }
}
