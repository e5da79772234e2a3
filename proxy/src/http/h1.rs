//! One HTTP/1 connection of a client: its requests, one after the other, each with its response.
//!
//! All of it is polled in the connection's task. A request's body reads from the connection when it is asked, so nothing
//! is read that nobody wants; while a response is made only the client's end is looked for. How bytes are understood is
//! decided in [`crate::h1`].

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, Version};
use http_body::{Body as _, Frame, SizeHint};

use super::HttpResponse;
use super::body::{BodyError, Received, ResponseBody};
use crate::h1::body::{Decoder, Encoder, Piece, announced};
use crate::h1::head::Malformed;
use crate::h1::request::{self, Limits, may_be_whole, read_request};
use crate::h1::response::{ResponseHead, has_body};
use crate::h1::wire::Wire;
use crate::listener::connection::Connection;
use crate::tcp::io::Io;

/// For so long a connection that ends still takes what its client sends: a client that is not listened to any more may
/// never see the response that tells it so.
const LINGER: Duration = Duration::from_secs(1);

/// What a connection must know of its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long heads may be.
    pub limits: Limits,
    /// HTTP/1.0 is served, in its own version.
    pub old: bool,
    /// Whether names are written `Like-This`.
    pub proper_case: bool,
}

/// A client's HTTP/1 connection.
#[derive(Debug)]
pub struct H1 {
    settings: Settings,
    state: RefCell<State>,
    /// Where an answer is put to a request whose head does not end.
    late: RefCell<Option<HttpResponse>>,
    /// No request is taken any more.
    ending: Cell<bool>,
}

#[derive(Debug)]
struct State {
    /// Gone when the connection has left HTTP.
    wire: Option<Wire>,
    /// Which request is under way, or the last that was.
    turn: u64,
    /// One is under way.
    busy: bool,
    /// What is to come of its body.
    decoder: Decoder,
    /// Somebody may still read its body.
    held: bool,
    /// Its body cannot be read.
    broken: bool,
    /// The client waits for a word before it sends the body.
    expects: bool,
    /// How much was read of a head that is not whole.
    seen: usize,
    /// The connection's task, where a body may be read in another one.
    driver: Option<Waker>,
}

/// What comes next on a connection.
enum Next {
    Ask(Asked, Result<Request<Received>, Malformed>),
    /// Time is up for a head that does not end.
    Late(HttpResponse),
    /// Nothing.
    Over,
}

/// What a response must know of its request.
#[derive(Clone, Copy)]
struct Asked {
    old: bool,
    is_head: bool,
    keep_alive: bool,
    takes_trailers: bool,
}

impl Asked {
    /// No request that could be read.
    const NOTHING: Self = Self { old: false, is_head: false, keep_alive: false, takes_trailers: false };
}

/// A response on its way to the client.
struct Download {
    body: Option<ResponseBody>,
    encoder: Encoder,
    /// Why the body did not come to its end.
    failed: Option<BodyError>,
    keep_alive: bool,
    leaves: bool,
}

impl H1 {
    /// Starts HTTP/1 on a client's stream.
    #[must_use]
    pub fn new(io: Io, settings: Settings) -> Rc<Self> {
        let state = State {
            wire: Some(Wire::new(io)),
            turn: 0,
            busy: false,
            decoder: Decoder::Length(0),
            held: false,
            broken: false,
            expects: false,
            seen: 0,
            driver: None,
        };
        Rc::new(Self {
            settings,
            state: RefCell::new(state),
            late: RefCell::default(),
            ending: Cell::new(false),
        })
    }

    /// Takes no further request; one that has begun is answered. The connection must be polled after this.
    pub fn end(&self) {
        self.ending.set(true);
    }

    /// Answers a request whose head does not end. The connection must be polled after this.
    pub fn end_with(&self, response: HttpResponse) {
        *self.late.borrow_mut() = Some(response);
    }

    /// How many bytes have come of a head that is not whole; 0 between requests and during one.
    #[must_use]
    pub fn head_waiting(&self) -> usize {
        let state = self.state.borrow();
        if state.busy { 0 } else { state.wire.as_ref().map_or(0, |wire| wire.inbox.len()) }
    }

    /// Takes requests and writes the responses that `answer` gives, until either side ends or the connection leaves
    /// HTTP.
    ///
    /// # Errors
    ///
    /// The connection broke, or a response did not come to its end.
    pub async fn run<F: Future<Output = HttpResponse> + Unpin>(
        self: &Rc<Self>,
        connection: &Connection,
        answer: impl Fn(Result<Request<Received>, Malformed>) -> F,
    ) -> Result<(), BodyError> {
        loop {
            let next = std::future::poll_fn(|cx| self.poll_next(cx)).await;
            let (asked, response) = match next {
                Next::Over => return Ok(()),
                Next::Late(response) => (Asked::NOTHING, response),
                Next::Ask(asked, request) => {
                    let mut answering = answer(request);
                    let answered = std::future::poll_fn(|cx| match Pin::new(&mut answering).poll(cx) {
                        Poll::Ready(response) => Poll::Ready(Some(response)),
                        Poll::Pending => self.poll_end(cx).map(|()| None),
                    });
                    let Some(response) = answered.await else { return Ok(()) }; // nobody is there to get one
                    (asked, response)
                }
            };
            let mut download = self.begin(asked, response);
            std::future::poll_fn(|cx| self.poll_response(&mut download, cx)).await?;
            if download.leaves {
                let wire = self.state.borrow_mut().wire.take();
                wire.into_iter().for_each(|wire| connection.leave_with(wire.into_io()));
                return Ok(());
            }
            if !self.settle(download.keep_alive).await {
                return Ok(());
            }
        }
    }

    fn poll_next(self: &Rc<Self>, cx: &mut Context<'_>) -> Poll<Next> {
        if let Some(response) = self.late.borrow_mut().take() {
            return Poll::Ready(Next::Late(response));
        }
        let state = &mut *self.state.borrow_mut();
        let Some(wire) = &mut state.wire else { return Poll::Ready(Next::Over) };
        let limits = self.settings.limits;
        loop {
            let may_be_whole =
                state.seen == 0 || wire.inbox.len() > limits.bytes || may_be_whole(&wire.inbox, state.seen);
            if may_be_whole {
                match read_request(&mut wire.inbox, limits) {
                    Ok(Some(request)) => {
                        (state.seen, state.busy) = (0, true);
                        let has_body = !request.body.is_over();
                        (state.decoder, state.expects) = (request.body, request.expects && has_body);
                        state.held = has_body;
                        state.driver = has_body.then(|| cx.waker().clone());
                        let (asked, request) = self.request(request, state.turn);
                        return Poll::Ready(Next::Ask(asked, Ok(request)));
                    }
                    Ok(None) => {}
                    Err(why) => {
                        // where the next request would begin is not known
                        (state.busy, state.broken) = (true, true);
                        return Poll::Ready(Next::Ask(Asked::NOTHING, Err(why)));
                    }
                }
            }
            state.seen = wire.inbox.len();
            if wire.ended || (self.ending.get() && wire.inbox.is_empty()) {
                return Poll::Ready(Next::Over);
            }
            if ready!(wire.poll_read(cx)).is_err() {
                return Poll::Ready(Next::Over);
            }
        }
    }

    /// A request in the form in which it is handed on.
    fn request(self: &Rc<Self>, read: request::Request, turn: u64) -> (Asked, Request<Received>) {
        let asked = Asked {
            old: self.settings.old && read.version == Version::HTTP_10,
            is_head: read.method == Method::HEAD,
            keep_alive: read.keep_alive,
            takes_trailers: read.takes_trailers,
        };
        let body = if read.body.is_over() {
            Received::Empty
        } else {
            Received::H1(Body { connection: Rc::clone(self), turn, over: false })
        };
        let mut request = Request::new(body);
        *request.method_mut() = read.method;
        *request.uri_mut() = read.uri;
        *request.version_mut() = read.version;
        *request.headers_mut() = read.headers;
        (asked, request)
    }

    /// Looks for the client's end while its request is under way. What it sends ahead is taken once and waits.
    fn poll_end(&self, cx: &mut Context<'_>) -> Poll<()> {
        let state = &mut *self.state.borrow_mut();
        let Some(wire) = &mut state.wire else { return Poll::Ready(()) };
        if !wire.outbox.is_empty() && matches!(wire.poll_write(cx), Poll::Ready(Err(_))) {
            return Poll::Ready(());
        }
        if !state.decoder.is_over() || state.broken || !wire.inbox.is_empty() {
            return Poll::Pending;
        }
        match ready!(wire.poll_read(cx)) {
            Ok(()) if !wire.ended => Poll::Pending,
            Ok(()) | Err(_) => Poll::Ready(()),
        }
    }

    /// Puts the head of a response in the outbox.
    fn begin(&self, asked: Asked, response: HttpResponse) -> Download {
        let (parts, body) = response.into_parts();
        let state = &mut *self.state.borrow_mut();
        // who waits for a word before the body may send it or not: what comes next could be either
        let unclear = std::mem::take(&mut state.expects) || state.broken;
        let head = ResponseHead {
            status: parts.status,
            headers: &parts.headers,
            old: asked.old,
            is_head: asked.is_head,
            length: if body.is_end_stream() { Some(0) } else { body.size_hint().exact() },
            keep_alive: asked.keep_alive && !unclear && !self.ending.get(),
            proper_case: self.settings.proper_case,
        };
        let mut unwritten = Vec::new();
        let out = state.wire.as_mut().map_or(&mut unwritten, |wire| wire.outbox.head());
        let (framing, keep_alive) = head.write(out);
        let trailers = if asked.takes_trailers { announced(&parts.headers) } else { Vec::new() };
        Download {
            body: Some(body).filter(|_| has_body(parts.status) && !asked.is_head),
            encoder: Encoder::new(framing, trailers, self.settings.proper_case),
            failed: None,
            keep_alive,
            leaves: parts.status == StatusCode::SWITCHING_PROTOCOLS,
        }
    }

    fn poll_response(&self, download: &mut Download, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            // the first pieces of a body go with the head, if they are here
            let mut waits = false;
            while let Some(body) = &mut download.body
                && !waits
            {
                if !self.has_room() {
                    break;
                }
                // the body may read the request's from this very connection
                let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) else {
                    waits = true;
                    continue;
                };
                let ends = body.is_end_stream();
                let put = frame.transpose().and_then(|frame| self.put(&mut download.encoder, frame, ends));
                if put.is_err() || download.encoder.is_over() {
                    download.body = None;
                    download.failed = put.err();
                }
            }
            let written = match &mut self.state.borrow_mut().wire {
                Some(wire) => wire.poll_write(cx),
                None => return Poll::Ready(Ok(())),
            };
            if waits && self.poll_end(cx).is_ready() {
                return Poll::Ready(Err("the client has left".into()));
            }
            ready!(written)?;
            if download.body.is_none() {
                return Poll::Ready(download.failed.take().map_or(Ok(()), |error| {
                    self.broken_off(download);
                    Err(error)
                }));
            }
            if waits {
                return Poll::Pending;
            }
        }
    }

    fn has_room(&self) -> bool {
        self.state.borrow().wire.as_ref().is_some_and(|wire| wire.outbox.has_room())
    }

    fn put(&self, encoder: &mut Encoder, frame: Option<Frame<Bytes>>, ends: bool) -> Result<(), BodyError> {
        match &mut self.state.borrow_mut().wire {
            Some(wire) => Ok(encoder.put(frame, ends, &mut wire.outbox)?),
            None => Err(Malformed::Cut.into()),
        }
    }

    /// A response that is cut must not look whole.
    fn broken_off(&self, download: &Download) {
        if download.encoder.is_until_close()
            && let Some(wire) = &self.state.borrow().wire
        {
            wire.break_off();
        }
    }

    /// Gets ready for the next request; `false` where there is none. Whoever still reads the last one's body has a little
    /// time for it; what nobody reads is passed over.
    async fn settle(&self, keep_alive: bool) -> bool {
        let (unread, held) = {
            let state = self.state.borrow();
            (!state.decoder.is_over() || state.broken, state.held)
        };
        let whole = if unread && (keep_alive || held) {
            let rest = std::future::poll_fn(|cx| self.poll_rest(cx));
            tokio::time::timeout(LINGER, rest).await.unwrap_or(false)
        } else {
            !unread
        };
        self.state.borrow_mut().turn += 1;
        let ready = whole && keep_alive;
        if !ready {
            self.close().await;
            return false;
        }
        let state = &mut *self.state.borrow_mut();
        state.busy = false;
        state.driver = None;
        if let Some(wire) = &mut state.wire {
            wire.settle();
        }
        true
    }

    /// Passes over the rest of a body, unless somebody reads it; `true` at its end.
    fn poll_rest(&self, cx: &mut Context<'_>) -> Poll<bool> {
        let state = &mut *self.state.borrow_mut();
        let Some(wire) = &mut state.wire else { return Poll::Ready(false) };
        while !state.broken {
            if state.held && !state.decoder.is_over() {
                state.driver = Some(cx.waker().clone());
                return Poll::Pending;
            }
            match state.decoder.next(&mut wire.inbox, wire.ended) {
                Ok(Piece::Data(_) | Piece::Trailers(_)) => {}
                Ok(Piece::Over) => return Poll::Ready(true),
                Ok(Piece::NeedMore) => {
                    if ready!(wire.poll_read(cx)).is_err() {
                        return Poll::Ready(false);
                    }
                }
                Err(_) => state.broken = true,
            }
        }
        Poll::Ready(false)
    }

    /// Says that nothing more comes. To a client that still sends it listens for a while, so that the client can read
    /// what it was told.
    async fn close(&self) {
        let mut said = false;
        let listening = std::future::poll_fn(|cx| {
            let state = &mut *self.state.borrow_mut();
            let Some(wire) = &mut state.wire else { return Poll::Ready(()) };
            if !said {
                if ready!(wire.poll_shutdown(cx)).is_err() {
                    return Poll::Ready(());
                }
                said = true;
            }
            let mut sends = !wire.inbox.is_empty() || !state.decoder.is_over() || state.broken;
            loop {
                wire.inbox.clear();
                match wire.poll_read(cx) {
                    Poll::Ready(Ok(())) if !wire.ended => sends = true,
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending if sends => return Poll::Pending,
                    Poll::Pending => return Poll::Ready(()),
                }
            }
        });
        // whoever sends for longer is not listening
        let _ended = tokio::time::timeout(LINGER, listening).await;
    }

    fn poll_body(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let state = &mut *self.state.borrow_mut();
        let Some(wire) = &mut state.wire else { return Poll::Ready(None) };
        loop {
            let piece = state.decoder.next(&mut wire.inbox, wire.ended);
            if state.decoder.is_over()
                && let Some(driver) = state.driver.take()
                && !driver.will_wake(cx.waker())
            {
                driver.wake(); // from now on it looks for the client's end
            }
            return Poll::Ready(match piece {
                Err(error) => {
                    state.broken = true;
                    Some(Err(error.into()))
                }
                Ok(Piece::Data(data)) => {
                    state.expects = false;
                    Some(Ok(Frame::data(data)))
                }
                Ok(Piece::Trailers(trailers)) => Some(Ok(Frame::trailers(trailers))),
                Ok(Piece::Over) => None,
                Ok(Piece::NeedMore) => {
                    if std::mem::take(&mut state.expects) {
                        wire.outbox.head().extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                        // what is not written now is written with the rest, and an error shows when it is read
                        let _begun = wire.poll_write(cx);
                    }
                    if let Err(error) = ready!(wire.poll_read(cx)) {
                        state.broken = true;
                        return Poll::Ready(Some(Err(error.into())));
                    }
                    continue;
                }
            });
        }
    }
}

/// The body of a request.
#[derive(Debug)]
pub struct Body {
    connection: Rc<H1>,
    turn: u64,
    over: bool,
}

impl Body {
    /// Whether nothing more comes.
    #[must_use]
    pub fn is_end(&self) -> bool {
        self.over || self.is_current(Decoder::is_over)
    }

    /// How much is to come.
    #[must_use]
    pub fn hint(&self) -> SizeHint {
        let state = self.connection.state.borrow();
        let left = state.decoder.left().filter(|_| state.turn == self.turn);
        left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    /// The next piece.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if !self.is_current(|_| true) {
            return Poll::Ready(Some(Err(Malformed::Cut.into()))); // the response did not wait for it
        }
        let piece = ready!(self.connection.poll_body(cx));
        self.over = self.is_current(Decoder::is_over) || !matches!(piece, Some(Ok(_)));
        Poll::Ready(piece)
    }

    fn is_current(&self, and: impl Fn(&Decoder) -> bool) -> bool {
        let state = self.connection.state.borrow();
        state.turn == self.turn && and(&state.decoder)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let state = &mut *self.connection.state.borrow_mut();
        if state.turn == self.turn {
            state.held = false;
            state.driver.take().into_iter().for_each(Waker::wake);
        }
    }
}
