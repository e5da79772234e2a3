//! HTTP/1 and HTTP/2 from the client: one task per connection, its requests through [`forward`].

use std::cell::{Cell, RefCell};
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

/// What a connection does just now; shared by its task and its requests.
#[derive(Debug)]
struct Activity {
    open: Cell<u32>,
    last: Cell<Instant>,
}

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

impl Activity {
    fn new() -> Rc<Self> {
        Rc::new(Self { open: Cell::new(0), last: Cell::new(Instant::now()) })
    }

    fn begin(self: &Rc<Self>) -> Open {
        self.open.set(self.open.get() + 1);
        Open(Rc::clone(self))
    }
}

struct Open(Rc<Activity>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get().saturating_sub(1));
        self.0.last.set(Instant::now());
    }
}

/// The timers of a connection: idle, longest life.
struct Limits {
    idle: Option<Duration>,
    until: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Limits {
    fn new(http: &Http, now: Instant) -> Self {
        let timeouts = &http.config.timeouts;
        let until = timeouts.max_connection_duration.map(|d| now + d);
        let first = [timeouts.idle.map(|d| now + d), until].into_iter().flatten().min();
        let sleep = first.map(|at| Box::pin(tokio::time::sleep_until(at)));
        Self { idle: timeouts.idle, until, sleep }
    }

    /// Ready when the connection should end. The timer is moved when it fires, not with every request.
    fn poll(&mut self, activity: &Activity, cx: &mut Context<'_>) -> Poll<()> {
        let Some(sleep) = &mut self.sleep else { return Poll::Pending };
        while sleep.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if self.until.is_some_and(|u| now >= u) {
                self.sleep = None;
                return Poll::Ready(());
            }
            let idle =
                self.idle.map(|d| if activity.open.get() > 0 { now + d } else { activity.last.get() + d });
            if idle.is_some_and(|at| now >= at) {
                self.sleep = None;
                return Poll::Ready(());
            }
            match [idle, self.until].into_iter().flatten().min() {
                Some(at) => sleep.as_mut().reset(at),
                None => return Poll::Pending,
            }
        }
        Poll::Pending
    }
}

/// Handles one request of a connection; the connection manager may have been replaced since the last one.
async fn request(
    worker: Rc<Worker>,
    place: Rc<Place>,
    connection: Rc<Connection>,
    activity: Rc<Activity>,
    request: Request<Incoming>,
) -> Result<super::HttpResponse, std::convert::Infallible> {
    let open = activity.begin();
    worker.refresh();
    let response = match place.http(&connection) {
        Ok(http) => forward(http, connection, request).await,
        Err(http) => {
            let exchange = Exchange::new(http, connection, Instant::now(), request.version());
            let gone = super::reply::Local::text(http::StatusCode::SERVICE_UNAVAILABLE, "");
            gone.details("filter_chain_removed").into_response(Box::new(exchange))
        }
    };
    drop(open);
    Ok(response)
}

async fn serve_h1(http: Rc<Http>, place: Place, connection: Rc<Connection>, io: Io) {
    let worker = Rc::clone(&http.worker);
    let (activity, place) = (Activity::new(), Rc::new(place));
    let outlived = Rc::clone(&place);
    let mut outlived = pin!(outlived.outlived());
    let mut limits = Limits::new(&http, Instant::now());
    let service = {
        let (worker, connection, activity) =
            (Rc::clone(&worker), Rc::clone(&connection), Rc::clone(&activity));
        service_fn(move |r| {
            request(Rc::clone(&worker), Rc::clone(&place), Rc::clone(&connection), Rc::clone(&activity), r)
        })
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
            && lingers
                .as_mut()
                .is_some_and(|linger| activity.open.get() > 0 || linger.as_mut().poll(cx).is_ready());
        if drains || limits.poll(&activity, cx).is_ready() {
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

/// Relays bytes after an upgrade, once the client has the response.
pub async fn tunnel(worker: Rc<Worker>, client: OnUpgrade, stream: Box<H1>, mut exchange: Box<Exchange>) {
    let (mut server, _opened) = stream.into_io();
    let Ok(client) = client.await else { return };
    let mut client = TokioIo::new(client);
    let counts = Counts::default();
    let idle = exchange.http.config.timeouts.stream_idle;
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
    let (activity, place) = (Activity::new(), Rc::new(place));
    let outlived = Rc::clone(&place);
    let mut outlived = pin!(outlived.outlived());
    let mut limits = Limits::new(&http, Instant::now());
    let service = {
        let (worker, connection, activity) =
            (Rc::clone(&worker), Rc::clone(&connection), Rc::clone(&activity));
        service_fn(move |r| {
            request(Rc::clone(&worker), Rc::clone(&place), Rc::clone(&connection), Rc::clone(&activity), r)
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
        .max_send_buf_size(1 << 20);
    if let Some((interval, timeout)) = settings.keepalive {
        builder.timer(TokioTimer::new()).keep_alive_interval(interval).keep_alive_timeout(timeout);
    }
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
        if drains || limits.poll(&activity, cx).is_ready() {
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
