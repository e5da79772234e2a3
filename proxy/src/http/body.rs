//! Bodies on their way: streamed through as they come, and remembered up to a limit when a retry or a mirror may
//! need them again.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::h1::head::Malformed;
use crate::http::exchange::Exchange;
use crate::http::grpc_web::Upload;
use crate::http::grpc_web::codec::Encoder;
use crate::http::h1;
use crate::http::headers::are_clear;
use crate::upstream::pool::Reply;

/// What ends a body early.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// What is known of a request's body while it is sent.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes seen so far.
    pub bytes: Cell<u64>,
    /// Whether the whole body was seen.
    pub complete: Cell<bool>,
    /// When it was.
    pub ended: Cell<Option<Instant>>,
    /// When the last piece came.
    pub last: Cell<Option<Instant>>,
    /// Whether the client's side broke off.
    pub broken: Cell<bool>,
    /// What the client sent that is no body.
    pub malformed: Cell<Option<Malformed>>,
    /// Told at each step.
    pub moved: Notify,
}

/// A request's body, as the client's codec brings it.
#[derive(Debug, Default)]
pub enum Received {
    /// There is none.
    #[default]
    Empty,
    /// Over HTTP/1.
    H1(h1::Body),
    /// Over HTTP/2.
    H2(Incoming),
}

impl Body for Received {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::H1(body) => body.poll(cx),
            Self::H2(body) => Pin::new(body).poll_frame(cx).map(|frame| match frame? {
                Ok(frame) if !frame.trailers_ref().is_none_or(are_clear) => {
                    Some(Err(Malformed::Trailers.into()))
                }
                frame => Some(frame.map_err(Into::into)),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::H1(body) => body.is_end(),
            Self::H2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::H1(body) => body.hint(),
            Self::H2(body) => body.size_hint(),
        }
    }
}

/// A request body towards an upstream.
#[derive(Debug, Default)]
pub enum RequestBody {
    /// No body.
    #[default]
    Empty,
    /// Bytes that are all here.
    Full(Bytes),
    /// Streamed from the client.
    Stream(Received, Rc<Progress>),
    /// Streamed from the client and remembered, so that another attempt can send it again.
    Replay(Replay),
    /// One of gRPC-Web, as gRPC has it.
    Web(Box<Upload>),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Stream(incoming, progress) => poll_client(incoming, progress, cx),
            Self::Replay(replay) => replay.poll(cx),
            Self::Web(upload) => upload.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Stream(incoming, _) => incoming.is_end_stream(),
            Self::Replay(replay) => replay.is_end(),
            Self::Web(upload) => upload.is_end(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Stream(incoming, _) => incoming.size_hint(),
            Self::Replay(replay) => replay.shared.borrow().hint,
            Self::Web(_) => SizeHint::default(),
        }
    }
}

fn poll_client(
    incoming: &mut Received,
    progress: &Progress,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
    let frame = ready!(Pin::new(&mut *incoming).poll_frame(cx));
    match &frame {
        Some(Ok(frame)) => {
            let n = frame.data_ref().map_or(0, Bytes::len);
            progress.bytes.set(progress.bytes.get() + n as u64);
            // nothing comes behind trailers, and who cannot send them reads no further
            progress.complete.set(frame.is_trailers() || incoming.is_end_stream());
        }
        Some(Err(error)) => {
            progress.broken.set(true);
            let malformed = error.downcast_ref::<Malformed>().filter(|why| **why != Malformed::Cut);
            progress.malformed.set(malformed.copied());
        }
        None => progress.complete.set(true),
    }
    let now = Some(Instant::now());
    progress.last.set(now);
    if progress.complete.get() && progress.ended.get().is_none() {
        progress.ended.set(now);
    }
    progress.moved.notify_waiters();
    Poll::Ready(frame)
}

/// The remembered part of a request body, and the client's stream behind it.
#[derive(Debug)]
struct Remembered {
    incoming: Received,
    hint: SizeHint,
    frames: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    size: usize,
    limit: usize,
    /// More came than may be remembered: only the attempt under way can finish.
    overflowed: bool,
    ended: bool,
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.progress.moved.notify_waiters();
    }
}

/// One attempt's view of a remembered body.
#[derive(Debug)]
pub struct Replay {
    shared: Rc<RefCell<Remembered>>,
    progress: Rc<Progress>,
    next: usize,
    trailers_sent: bool,
}

impl Replay {
    /// Starts to remember `incoming`, up to `limit` bytes.
    #[must_use]
    pub fn new(incoming: Received, limit: usize, progress: Rc<Progress>) -> Self {
        let hint = incoming.size_hint();
        let remembered = Remembered {
            incoming,
            hint,
            frames: Vec::new(),
            trailers: None,
            size: 0,
            limit,
            overflowed: false,
            ended: false,
        };
        Self { shared: Rc::new(RefCell::new(remembered)), progress, next: 0, trailers_sent: false }
    }

    /// The same body from its beginning; `None` when it was too long to be remembered.
    #[must_use]
    pub fn again(&self) -> Option<Self> {
        (!self.shared.borrow().overflowed).then(|| Self {
            shared: Rc::clone(&self.shared),
            progress: Rc::clone(&self.progress),
            next: 0,
            trailers_sent: false,
        })
    }

    /// The whole body as one piece, once an attempt has taken all of it from the client; `None` when it became too
    /// long or the client broke off.
    pub async fn wait(&self) -> Option<Bytes> {
        loop {
            let told = {
                let shared = self.shared.borrow();
                if shared.overflowed || self.progress.broken.get() {
                    return None;
                }
                if shared.ended || self.progress.complete.get() {
                    return Some(shared.frames.concat().into());
                }
                if Rc::strong_count(&self.shared) == 1 {
                    None // nobody else reads it any more
                } else {
                    Some(Rc::clone(&self.progress))
                }
            };
            match told {
                Some(told) => told.moved.notified().await,
                None => return self.rest().await,
            }
        }
    }

    /// The whole body, of which this one reads what nobody has read.
    async fn rest(&self) -> Option<Bytes> {
        std::future::poll_fn(|cx| {
            let mut shared = self.shared.borrow_mut();
            let mut read = shared.frames.len();
            while !shared.ended && !shared.overflowed {
                match ready!(poll_client(&mut shared.incoming, &self.progress, cx)) {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(bytes) => shared.remember(&bytes, &mut read),
                        Err(_) => shared.ended = true,
                    },
                    Some(Err(_)) => return Poll::Ready(None),
                    None => shared.ended = true,
                }
            }
            Poll::Ready((!shared.overflowed).then(|| shared.frames.concat().into()))
        })
        .await
    }

    fn is_end(&self) -> bool {
        let shared = self.shared.borrow();
        let sent_all = self.next >= shared.frames.len();
        let over = shared.ended || (shared.incoming.is_end_stream());
        over && sent_all && (shared.trailers.is_none() || self.trailers_sent)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut shared = self.shared.borrow_mut();
        if let Some(bytes) = shared.frames.get(self.next) {
            self.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(bytes.clone()))));
        }
        if !shared.ended {
            match ready!(poll_client(&mut shared.incoming, &self.progress, cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => {
                        shared.remember(&bytes, &mut self.next);
                        return Poll::Ready(Some(Ok(Frame::data(bytes))));
                    }
                    Err(frame) => shared.trailers = frame.into_trailers().ok(),
                },
                Some(Err(e)) => return Poll::Ready(Some(Err(e))),
                None => {}
            }
            shared.ended = true;
        }
        if self.trailers_sent {
            return Poll::Ready(None);
        }
        self.trailers_sent = true;
        Poll::Ready(shared.trailers.clone().map(|t| Ok(Frame::trailers(t))))
    }
}

impl Remembered {
    fn remember(&mut self, bytes: &Bytes, next: &mut usize) {
        self.size += bytes.len();
        if self.overflowed || self.size > self.limit {
            self.overflowed = true;
            self.frames = Vec::new();
            *next = 0;
        } else {
            self.frames.push(bytes.clone());
            *next += 1;
        }
        self.ended = self.incoming.is_end_stream();
    }
}

/// A response body towards the client.
#[derive(Debug, Default)]
pub struct ResponseBody {
    source: Source,
    /// Told when the body ends, however it ends.
    exchange: Option<Box<Exchange>>,
    /// A piece was handed on, and the next one was not asked for yet.
    held: bool,
    /// For a client that speaks gRPC-Web.
    web: Option<Box<Encoder>>,
}

#[derive(Debug, Default)]
enum Source {
    #[default]
    Empty,
    Full(Bytes),
    Upstream(Box<Reply>),
}

impl ResponseBody {
    /// A short body made here; the exchange ends when it is taken.
    #[must_use]
    pub fn local(bytes: Bytes, exchange: Option<Box<Exchange>>) -> Self {
        let source = if bytes.is_empty() { Source::Empty } else { Source::Full(bytes) };
        let mut body = Self { source, exchange, held: false, web: None };
        if matches!(body.source, Source::Empty) {
            body.finish();
        }
        body
    }

    /// An upstream's body.
    #[must_use]
    pub fn upstream(reply: Box<Reply>, exchange: Box<Exchange>) -> Self {
        let now = exchange.responded;
        let web = exchange.web.as_ref().map(|web| Box::new(Encoder::new(web.wants_text)));
        let mut body = Self { source: Source::Upstream(reply), exchange: Some(exchange), held: false, web };
        if let Some(now) = now {
            body.finish_at_end(now);
        }
        body
    }

    fn finish_at_end(&mut self, now: Instant) {
        if matches!(&self.source, Source::Upstream(reply) if reply.is_end()) {
            self.end(now);
        }
    }

    /// Nothing comes any more.
    fn end(&mut self, now: Instant) {
        if let Source::Upstream(reply) = &mut self.source {
            reply.release(now);
        }
        if let Some(exchange) = &mut self.exchange {
            exchange.over = Some(now);
        }
        self.finish();
    }

    fn finish(&mut self) {
        self.took();
        self.exchange = None; // counts and logs itself
    }

    fn took(&mut self) {
        if std::mem::take(&mut self.held)
            && let Some(exchange) = &self.exchange
        {
            exchange.connection.take();
        }
    }
}

impl Drop for ResponseBody {
    /// A body that is dropped before its end was abandoned by the client, but for that of a HEAD: there is none to take.
    fn drop(&mut self) {
        self.took();
        if let Some(mut exchange) = self.exchange.take()
            && !exchange.is_head
        {
            exchange.client_left();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        this.took();
        match &mut this.source {
            Source::Empty => Poll::Ready(None),
            Source::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                this.source = Source::Empty;
                if let Some(exchange) = &mut this.exchange {
                    exchange.sent(bytes.len());
                }
                this.finish();
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Source::Upstream(reply) => {
                let frame = match &mut this.exchange {
                    None => return Poll::Ready(None),
                    Some(exchange) => {
                        let Poll::Ready(frame) = reply.poll_frame(cx) else {
                            let late = ready!(exchange.poll_late(None, cx));
                            exchange.cut_short(late);
                            this.source = Source::Empty;
                            this.finish();
                            return Poll::Ready(Some(Err("the stream took too long".into())));
                        };
                        exchange.on_frame(&frame);
                        frame
                    }
                };
                let wanted = match (&mut this.web, &frame, &mut this.exchange) {
                    (Some(web), Some(Ok(frame)), Some(exchange)) => Some(translated(web, frame, exchange)),
                    _ => None,
                };
                match &frame {
                    Some(Ok(frame)) => {
                        let now = Instant::now();
                        // nothing comes behind trailers, and not every codec asks
                        if frame.is_trailers() {
                            this.end(now);
                        } else {
                            this.finish_at_end(now);
                        }
                        if let Some(exchange) = &mut this.exchange {
                            exchange.timing.on_move(now);
                            exchange.connection.hold(now);
                            this.held = true;
                        }
                    }
                    Some(Err(_)) => {
                        this.source = Source::Empty;
                        this.finish();
                    }
                    None => this.end(Instant::now()),
                }
                Poll::Ready(wanted.map(Ok).or(frame))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::Full(bytes) => bytes.is_empty(),
            Source::Upstream(_) => self.exchange.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Upstream(_) if self.web.is_some() => SizeHint::default(),
            Source::Upstream(reply) => reply.size_hint(),
        }
    }
}

/// A piece as a client of gRPC-Web gets it.
fn translated(web: &mut Encoder, frame: &Frame<Bytes>, exchange: &mut Exchange) -> Frame<Bytes> {
    let bytes = match (frame.data_ref(), frame.trailers_ref()) {
        (Some(data), _) => {
            exchange.sent_bytes -= data.len() as u64;
            web.piece(data.clone())
        }
        (None, trailers) => web.trailers(trailers.unwrap_or(&HeaderMap::new())),
    };
    exchange.sent(bytes.len());
    Frame::data(bytes)
}
