//! One HTTP/1 connection to an endpoint, driven by whoever uses it.
//!
//! It is polled in the task of the request that holds it, so a request costs no second task, no channel and no wake-up
//! between two. While it is idle nobody polls it: [`H1::is_alive`] looks before it is used again. What is written and
//! how what is read is understood is decided in [`head`] and [`body`]; here bytes are moved.

pub mod body;
pub mod head;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use http::header::{HeaderName, TRAILER};
use http::{Method, Response, response};
use http_body::{Body as _, Frame, SizeHint};
use tokio::io::AsyncWrite as _;
use tokio::time::Instant;
use tokio_util::io::poll_read_buf;

use self::body::{Decoder, Piece};
use self::head::{BadResponse, Framing, RequestHead, read_response, write_chunk, write_trailers};
use super::send::{Link, Opened, Outgoing};
use crate::http::body::{BodyError, RequestBody};
use crate::tcp::io::Io;

/// The first read of a connection takes this much, in bytes; reads that are filled make the next one larger.
const FIRST_READ: usize = 8 * 1024;
/// The most that one read takes.
const LARGEST_READ: usize = 128 * 1024;

/// An HTTP/1 connection and what is under way on it.
#[derive(Debug)]
pub struct H1 {
    io: Io,
    proper_case: bool,
    outbox: Outbox,
    upload: Option<Upload>,
    /// Something of the request under way was written.
    sent: bool,
    inbox: BytesMut,
    /// How much the next read may take.
    room: usize,
    /// That has been more than at first.
    grown: bool,
    /// The method of the request under way.
    method: Method,
    /// What is to come of its response.
    decoder: Decoder,
    /// Whether the connection can take another request after that.
    keep_alive: bool,
    /// The server has ended its side.
    ended: bool,
    /// Requests sent so far.
    pub uses: u32,
    /// When it was made.
    pub born: Instant,
    opened: Opened,
}

/// What waits to be written: bytes of our own, a piece of a body, and what follows it.
#[derive(Debug, Default)]
struct Outbox {
    head: Vec<u8>,
    written: usize,
    data: Bytes,
    tail: &'static [u8],
}

/// A request's body on its way.
#[derive(Debug)]
struct Upload {
    body: RequestBody,
    framing: Framing,
    /// Trailers that the head has announced.
    announced: Vec<HeaderName>,
}

/// Why a request got no response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The connection broke.
    #[error("connection closed before a response")]
    Closed {
        /// Something of the request was written.
        sent: bool,
    },
    /// What came is no response.
    #[error(transparent)]
    Bad(#[from] BadResponse),
    /// The client broke off while its body was sent.
    #[error("{0}")]
    Client(BodyError),
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.written == self.head.len() && self.data.is_empty() && self.tail.is_empty()
    }

    fn advance(&mut self, mut n: usize) {
        let of_head = n.min(self.head.len() - self.written);
        self.written += of_head;
        n -= of_head;
        let of_data = n.min(self.data.len());
        self.data.advance(of_data);
        n -= of_data;
        self.tail = self.tail.get(n..).unwrap_or_default();
    }

    /// Room for what comes next; all before is written.
    fn start(&mut self) -> &mut Vec<u8> {
        self.head.clear();
        self.written = 0;
        &mut self.head
    }
}

impl Upload {
    /// Puts the next piece after what is in the outbox; `true` when it was the last.
    fn poll(
        &mut self,
        outbox: &mut Outbox,
        proper_case: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Result<bool, BodyError>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose()?;
        let ends = frame.is_none() || self.body.is_end_stream();
        match &mut self.framing {
            Framing::Length(left) => {
                let data = frame.and_then(|f| f.into_data().ok()).unwrap_or_default();
                *left = left.checked_sub(data.len() as u64).ok_or("the body is longer than its length")?;
                if ends && *left > 0 {
                    return Poll::Ready(Err("the body is shorter than its length".into()));
                }
                outbox.data = data;
            }
            Framing::Chunked => match frame.map(Frame::into_data) {
                Some(Ok(data)) if data.is_empty() && !ends => {}
                Some(Ok(data)) if !data.is_empty() => {
                    write_chunk(&mut outbox.head, data.len());
                    outbox.data = data;
                    outbox.tail = if ends { b"\r\n0\r\n\r\n" } else { b"\r\n" };
                }
                Some(Err(trailers)) => {
                    let trailers = trailers.into_trailers().unwrap_or_default();
                    write_trailers(&mut outbox.head, &trailers, &self.announced, proper_case);
                    return Poll::Ready(Ok(true));
                }
                Some(Ok(_)) | None => outbox.tail = b"0\r\n\r\n",
            },
        }
        Poll::Ready(Ok(ends))
    }
}

impl H1 {
    /// Starts HTTP/1 on a connected stream.
    #[must_use]
    pub fn new(io: Io, opened: Opened, proper_case: bool) -> Self {
        Self {
            io,
            proper_case,
            outbox: Outbox::default(),
            upload: None,
            sent: false,
            inbox: BytesMut::new(),
            room: FIRST_READ,
            grown: false,
            method: Method::GET,
            decoder: Decoder::Length(0),
            keep_alive: true,
            ended: false,
            uses: 0,
            born: Instant::now(),
            opened,
        }
    }

    /// Gives back room for large reads after an exchange; tells whether the connection is fit for another one.
    pub fn settle(&mut self) -> bool {
        if self.inbox.is_empty() && std::mem::take(&mut self.grown) {
            (self.inbox, self.room) = (BytesMut::new(), FIRST_READ);
        }
        self.is_reusable()
    }

    /// Whether the last exchange is over and left the connection fit for another one.
    fn is_reusable(&self) -> bool {
        self.keep_alive
            && !self.ended
            && self.decoder.is_over()
            && self.upload.is_none()
            && self.outbox.is_empty()
            && self.inbox.is_empty()
    }

    /// Whether the connection can take a request now: nothing came since the last exchange, and no end.
    pub fn is_alive(&mut self) -> bool {
        self.is_reusable() && self.poll_read(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Sends a request and waits for the head of the response.
    ///
    /// # Errors
    ///
    /// When none comes.
    pub async fn send(&mut self, request: Outgoing) -> Result<response::Parts, SendError> {
        self.uses += 1;
        let bodiless = request.body.is_end_stream();
        let head = RequestHead {
            method: &request.method,
            path: request.path.as_str(),
            authority: &request.authority,
            headers: &request.headers,
            bodiless,
            length: request.body.size_hint().exact(),
            proper_case: self.proper_case,
        };
        let framing = head.write(self.outbox.start());
        if !bodiless {
            let announced = announced(&request);
            self.upload = Some(Upload { body: request.body, framing, announced });
        }
        (self.method, self.sent) = (request.method, false);
        std::future::poll_fn(|cx| self.poll_head(cx)).await
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, SendError>> {
        // where only the connection is broken the server may have answered before
        if let Poll::Ready(Err(Broken::Client(error))) = self.poll_write(cx) {
            return Poll::Ready(Err(SendError::Client(error)));
        }
        loop {
            if let Some(head) = read_response(&mut self.inbox, &self.method)? {
                (self.decoder, self.keep_alive) = (head.body, head.keep_alive);
                let (mut parts, ()) = Response::new(()).into_parts();
                (parts.status, parts.version, parts.headers) = (head.status, head.version, head.headers);
                return Poll::Ready(Ok(parts));
            }
            if self.ended {
                return Poll::Ready(Err(SendError::Closed { sent: self.sent }));
            }
            // how it ended is no more than that it has
            if ready!(self.poll_read(cx)).is_err() {
                self.ended = true;
            }
        }
    }

    /// Writes what waits, and the request's body as it comes; ready when all is written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            // the first piece of a body goes with the head, if it is here
            if let Some(upload) = &mut self.upload
                && self.outbox.data.is_empty()
                && self.outbox.tail.is_empty()
            {
                if self.outbox.written == self.outbox.head.len() {
                    self.outbox.start();
                }
                match upload.poll(&mut self.outbox, self.proper_case, cx) {
                    Poll::Ready(Ok(true)) => self.upload = None,
                    Poll::Ready(Ok(false)) => {}
                    Poll::Ready(Err(error)) => {
                        self.keep_alive = false;
                        return Poll::Ready(Err(Broken::Client(error)));
                    }
                    Poll::Pending if self.outbox.is_empty() => return Poll::Pending,
                    Poll::Pending => {}
                }
            }
            if self.outbox.is_empty() {
                if self.upload.is_some() {
                    continue; // a piece without content
                }
                return Pin::new(&mut self.io).poll_flush(cx).map_err(|_| Broken::Io);
            }
            let slices = [
                IoSlice::new(self.outbox.head.get(self.outbox.written..).unwrap_or_default()),
                IoSlice::new(&self.outbox.data),
                IoSlice::new(self.outbox.tail),
            ];
            match ready!(Pin::new(&mut self.io).poll_write_vectored(cx, &slices)) {
                Ok(0) | Err(_) => {
                    // nothing more is sent on it
                    (self.upload, self.outbox, self.keep_alive) = (None, Outbox::default(), false);
                    return Poll::Ready(Err(Broken::Io));
                }
                Ok(n) => {
                    self.sent = true;
                    self.outbox.advance(n);
                }
            }
        }
    }

    /// Reads once; at the end of the stream notes it.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inbox.reserve(self.room);
        let n = ready!(poll_read_buf(Pin::new(&mut self.io), cx, &mut self.inbox))?;
        self.ended = n == 0;
        self.room = if n >= self.room { (self.room * 2).min(LARGEST_READ) } else { n.max(FIRST_READ) };
        self.grown |= self.room > FIRST_READ;
        Poll::Ready(Ok(()))
    }

    /// The next piece of the response's body.
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if (self.upload.is_some() || !self.outbox.is_empty())
            && let Poll::Ready(Err(Broken::Client(error))) = self.poll_write(cx)
        {
            return Poll::Ready(Some(Err(error)));
        }
        loop {
            match self.decoder.next(&mut self.inbox, self.ended) {
                Err(error) => {
                    self.keep_alive = false;
                    return Poll::Ready(Some(Err(error.into())));
                }
                Ok(Piece::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Piece::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Piece::Over) => return Poll::Ready(None),
                Ok(Piece::NeedMore) => {
                    if let Err(error) = ready!(self.poll_read(cx)) {
                        self.keep_alive = false;
                        return Poll::Ready(Some(Err(error.into())));
                    }
                }
            }
        }
    }

    /// Whether all of the response's body was taken.
    #[must_use]
    pub fn is_body_over(&self) -> bool {
        self.decoder.is_over()
    }

    /// How much of the response's body is to come.
    #[must_use]
    pub fn body_hint(&self) -> SizeHint {
        self.decoder.left().map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    /// What is known of the connection.
    #[must_use]
    pub fn link(&self) -> Option<Rc<Link>> {
        self.opened.link()
    }

    /// The stream below after a `101 Switching Protocols`, with bytes that were read beyond the response.
    #[must_use]
    pub fn into_io(self) -> (Io, Opened) {
        (self.io.resumed(self.inbox.freeze()), self.opened)
    }
}

/// Why nothing more can be written.
enum Broken {
    Io,
    Client(BodyError),
}

/// The trailers that a request's head tells of.
fn announced(request: &Outgoing) -> Vec<HeaderName> {
    let told = request.headers.get_all(TRAILER).iter();
    told.flat_map(|v| v.as_bytes().split(|b| *b == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect()
}
