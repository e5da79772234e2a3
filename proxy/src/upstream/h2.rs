//! One HTTP/2 connection to an endpoint, shared by many requests.

mod tunnel;

use std::cell::{Cell, RefCell};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use ::h2::client::{self, SendRequest};
use ::h2::ext::Protocol;
use ::h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body as _, Frame};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use super::send::{FailureKind, Link, Opened};
use crate::h1::head::Malformed;
use crate::http::body::{BodyError, RequestBody};
use crate::http::headers::are_clear;
use crate::tcp::gather::Gathered;
use crate::tcp::io::Io;
use crate::xds::listener::hcm::Http2;

pub use tunnel::Tunnel;

/// Largest window of one stream, in bytes: memory that a fast server and a slow client may bind.
const STREAM_WINDOW: u32 = 1 << 20;
/// Largest window of one connection, in bytes.
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Largest header block of a response, in bytes.
const MAX_HEADERS: u32 = 60 * 1024;

/// A handle to an HTTP/2 connection; the connection itself is a task of the worker.
#[derive(Clone, Debug)]
pub struct H2 {
    send: SendRequest<Bytes>,
    open: Rc<Cell<usize>>,
    link: Option<Rc<Link>>,
    settings: Rc<Settings>,
}

/// Whether the server's settings are known. They are its first frame, so whoever has an answer to a ping has them.
#[derive(Debug)]
struct Settings {
    ping: RefCell<Option<PingPong>>,
    known: Cell<bool>,
    told: Notify,
}

/// One stream, counted until it is dropped.
#[derive(Debug)]
struct Open(Rc<Cell<usize>>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

/// A response under way.
#[derive(Debug)]
pub struct Streams {
    body: RecvStream,
    upload: Option<Upload>,
    /// Our side of a stream that leaves HTTP.
    tunnel: Option<SendStream<Bytes>>,
    ended: bool,
    /// What is known of the connection.
    pub link: Option<Rc<Link>>,
    open: Open,
}

/// A request body under way.
#[derive(Debug)]
struct Upload {
    body: RequestBody,
    stream: SendStream<Bytes>,
}

/// Why an HTTP/2 request got no response.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StreamError {
    /// The error of the codec.
    #[source]
    pub error: BodyError,
    /// Whose doing it was.
    pub kind: FailureKind,
}

impl From<::h2::Error> for StreamError {
    fn from(error: ::h2::Error) -> Self {
        let ends = error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR);
        let kind = if error.reason() == Some(Reason::REFUSED_STREAM) || ends {
            FailureKind::Refused // the server has not looked at the request
        } else if error.is_reset() && error.is_remote() {
            FailureKind::Reset
        } else if error.is_library() && error.reason().is_some() {
            FailureKind::Protocol
        } else {
            FailureKind::Termination { sent: true }
        };
        Self { kind, error: error.into() }
    }
}

impl H2 {
    /// Starts HTTP/2 on a connected stream; the connection runs on `tasks` until it ends.
    ///
    /// # Errors
    ///
    /// When the handshake cannot be written.
    pub async fn start(
        io: Io,
        opened: Opened,
        settings: &Http2,
        tasks: &TaskTracker,
    ) -> Result<Self, ::h2::Error> {
        let gathered = Gathered::new(io);
        let (send, mut connection) = client::Builder::new()
            .enable_push(false)
            .initial_window_size(settings.initial_stream_window.min(STREAM_WINDOW))
            .initial_connection_window_size(settings.initial_connection_window.min(CONNECTION_WINDOW))
            .initial_max_send_streams(100)
            .max_header_list_size(MAX_HEADERS)
            .max_send_buffer_size(1 << 20)
            .handshake(gathered.clone())
            .await?;
        let link = opened.link();
        let settings = Settings {
            ping: RefCell::new(connection.ping_pong()),
            known: Cell::new(false),
            told: Notify::new(),
        };
        tasks.spawn_local(async move {
            let _opened = opened;
            let mut connection = pin!(connection);
            let ended = std::future::poll_fn(|cx| {
                let ended = connection.as_mut().poll(cx);
                gathered.send(cx);
                ended
            });
            if let Err(error) = ended.await {
                tracing::debug!(%error, "upstream http/2 connection ended");
            }
        });
        Ok(Self { send, open: Rc::default(), link, settings: Rc::new(settings) })
    }

    /// How many more requests the server takes on this connection just now; `None` when it is over.
    #[must_use]
    pub fn room(&mut self) -> Option<usize> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match self.send.poll_ready(&mut cx) {
            Poll::Ready(Err(_)) => None,
            Poll::Ready(Ok(())) | Poll::Pending => {
                Some(self.send.current_max_send_streams().saturating_sub(self.open.get()))
            }
        }
    }

    /// Whether requests are under way.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.open.get() > 0
    }

    /// Whether the server takes extended CONNECT (RFC 8441, section 3); waits for its settings if need be.
    pub async fn takes_tunnels(&self, tasks: &TaskTracker) -> bool {
        if let Some(mut ping) = self.settings.ping.take() {
            let settings = Rc::clone(&self.settings);
            // a task of its own: whoever asks first may leave before the answer
            tasks.spawn_local(async move {
                if let Err(error) = ping.ping(Ping::opaque()).await {
                    tracing::debug!(%error, "the server does not answer a ping");
                }
                settings.known.set(true);
                settings.told.notify_waiters();
            });
        }
        let told = self.settings.told.notified();
        if !self.settings.known.get() {
            told.await;
        }
        self.send.is_extended_connect_protocol_enabled()
    }

    /// Sends a request and waits for the head of the response. The stream of an extended CONNECT stays open on our
    /// side when the server agrees to it.
    ///
    /// # Errors
    ///
    /// When the stream or the connection ends first.
    pub async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<(Response<()>, Streams), StreamError> {
        let (parts, body) = request.into_parts();
        self.open.set(self.open.get() + 1);
        let open = Open(Rc::clone(&self.open));
        std::future::poll_fn(|cx| self.send.poll_ready(cx)).await?;
        let leaves = parts.extensions.get::<Protocol>().is_some();
        let end = body.is_end_stream() && !leaves;
        let (mut response, stream) = self.send.send_request(Request::from_parts(parts, ()), end)?;
        let (mut upload, mut tunnel) = match (leaves, end) {
            (true, _) => (None, Some(stream)),
            (false, true) => (None, None),
            (false, false) => (Some(Upload { body, stream }), None),
        };
        let response = std::future::poll_fn(|cx| {
            if let Some(running) = &mut upload
                && let Poll::Ready(outcome) = running.poll(cx)
            {
                upload = None;
                if let Err(error) = outcome {
                    return Poll::Ready(Err(error));
                }
            }
            Pin::new(&mut response).poll(cx).map_err(StreamError::from)
        })
        .await?;
        let (parts, body) = response.into_parts();
        if !are_clear(&parts.headers) {
            return Err(StreamError { error: Malformed::Value.into(), kind: FailureKind::Protocol });
        }
        if parts.status != StatusCode::OK
            && let Some(mut refused) = tunnel.take()
            && let Err(error) = refused.send_data(Bytes::new(), true)
        {
            tracing::debug!(%error, "the server has ended a stream that it refused");
        }
        let link = self.link.clone();
        let streams = Streams { body, upload, tunnel, ended: false, link, open };
        Ok((Response::from_parts(parts, ()), streams))
    }
}

impl Upload {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        loop {
            self.stream.reserve_capacity(1);
            while self.stream.capacity() == 0 {
                match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(e)) => return Poll::Ready(Err(e.into())),
                    None => return Poll::Ready(Ok(())), // the server wants no more of it
                }
            }
            if let Poll::Ready(reason) = self.stream.poll_reset(cx)? {
                // a server may answer early and say it needs no more
                let done = reason == Reason::NO_ERROR;
                return Poll::Ready(if done { Ok(()) } else { Err(::h2::Error::from(reason).into()) });
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => return Poll::Ready(Ok(self.stream.send_data(Bytes::new(), true)?)),
                Some(Err(error)) => {
                    self.stream.send_reset(Reason::CANCEL);
                    return Poll::Ready(Err(StreamError { error, kind: FailureKind::Client }));
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let end = self.body.is_end_stream();
                        self.stream.send_data(data, end)?;
                        if end {
                            return Poll::Ready(Ok(()));
                        }
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        return Poll::Ready(Ok(self.stream.send_trailers(trailers)?));
                    }
                },
            }
        }
    }
}

impl Streams {
    /// The bytes of both ways, when the server has agreed to an extended CONNECT.
    #[must_use]
    pub fn into_tunnel(self) -> Option<Tunnel> {
        Some(Tunnel::new(self.body, self.tunnel?, self.open))
    }

    /// Whether nothing more will come.
    #[must_use]
    pub fn is_end(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }

    /// The next piece of the response's body.
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(upload) = &mut self.upload
            && let Poll::Ready(outcome) = upload.poll(cx)
        {
            self.upload = None;
            if let Err(e) = outcome {
                return Poll::Ready(Some(Err(e.into())));
            }
        }
        if self.ended {
            return Poll::Ready(None);
        }
        match ready!(self.body.poll_data(cx)) {
            Some(Ok(data)) => {
                // the window opens as soon as the piece is handed on: the client's window holds it from there
                if let Err(e) = self.body.flow_control().release_capacity(data.len()) {
                    return Poll::Ready(Some(Err(e.into())));
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Some(Err(e)) if e.reason() == Some(Reason::NO_ERROR) => {
                self.ended = true;
                Poll::Ready(None)
            }
            Some(Err(e)) => Poll::Ready(Some(Err(e.into()))),
            None => {
                let trailers = ready!(self.body.poll_trailers(cx));
                self.ended = true;
                match trailers {
                    Ok(Some(trailers)) if are_clear(&trailers) => {
                        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
                    }
                    Ok(Some(_)) => Poll::Ready(Some(Err(Malformed::Trailers.into()))),
                    Ok(None) => Poll::Ready(None),
                    Err(e) => Poll::Ready(Some(Err(e.into()))),
                }
            }
        }
    }
}
