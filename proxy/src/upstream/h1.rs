//! One HTTP/1 connection to an endpoint, driven by whoever uses it.
//!
//! It is polled in the task of the request that holds it, so a request costs no second task, no channel and no wake-up
//! between two. While it is idle nobody polls it: [`H1::is_alive`] looks before it is used again. What is written and
//! how what is read is understood is decided in [`crate::h1`]; here bytes are moved.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::{Method, Response, response};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::Instant;

use super::send::{Link, Opened, Outgoing};
use crate::h1::body::{Decoder, Encoder, Piece, announced};
use crate::h1::head::Malformed;
use crate::h1::request::RequestHead;
use crate::h1::response::read_response;
use crate::h1::wire::{Outbox, Wire};
use crate::http::body::{BodyError, RequestBody};
use crate::tcp::io::Io;

/// An HTTP/1 connection and what is under way on it.
#[derive(Debug)]
pub struct H1 {
    wire: Wire,
    proper_case: bool,
    upload: Option<Upload>,
    /// The method of the request under way.
    method: Method,
    /// What is to come of its response.
    decoder: Decoder,
    /// Whether the connection can take another request after that.
    keep_alive: bool,
    /// Requests sent so far.
    pub uses: u32,
    /// When it was made.
    pub born: Instant,
    opened: Opened,
}

/// A request's body on its way.
#[derive(Debug)]
struct Upload {
    body: RequestBody,
    encoder: Encoder,
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
    Bad(#[from] Malformed),
    /// The client broke off while its body was sent.
    #[error("{0}")]
    Client(BodyError),
}

impl Upload {
    /// Puts the next piece after what is in the outbox; `true` when it was the last.
    fn poll(&mut self, outbox: &mut Outbox, cx: &mut Context<'_>) -> Poll<Result<bool, BodyError>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose()?;
        let ends = self.body.is_end_stream();
        self.encoder.put(frame, ends, outbox)?;
        Poll::Ready(Ok(self.encoder.is_over()))
    }
}

impl H1 {
    /// Starts HTTP/1 on a connected stream.
    #[must_use]
    pub fn new(io: Io, opened: Opened, proper_case: bool) -> Self {
        Self {
            wire: Wire::new(io),
            proper_case,
            upload: None,
            method: Method::GET,
            decoder: Decoder::Length(0),
            keep_alive: true,
            uses: 0,
            born: Instant::now(),
            opened,
        }
    }

    /// Gives back room for long messages after an exchange; tells whether the connection is fit for another one.
    pub fn settle(&mut self) -> bool {
        self.wire.settle();
        self.is_reusable()
    }

    /// Whether the last exchange is over and left the connection fit for another one.
    fn is_reusable(&self) -> bool {
        self.keep_alive
            && !self.wire.ended
            && self.decoder.is_over()
            && self.upload.is_none()
            && self.wire.outbox.is_empty()
            && self.wire.inbox.is_empty()
    }

    /// Whether the connection can take a request now: nothing came since the last exchange, and no end.
    pub fn is_alive(&mut self) -> bool {
        self.is_reusable() && self.wire.poll_read(&mut Context::from_waker(Waker::noop())).is_pending()
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
        let framing = head.write(self.wire.outbox.head());
        if !bodiless {
            let encoder = Encoder::new(framing, announced(&request.headers), self.proper_case);
            self.upload = Some(Upload { body: request.body, encoder });
        }
        (self.method, self.wire.sent) = (request.method, false);
        std::future::poll_fn(|cx| self.poll_head(cx)).await
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, SendError>> {
        // where only the connection is broken the server may have answered before
        if let Poll::Ready(Err(Broken::Client(error))) = self.poll_write(cx) {
            return Poll::Ready(Err(SendError::Client(error)));
        }
        loop {
            if let Some(head) = read_response(&mut self.wire.inbox, &self.method)? {
                (self.decoder, self.keep_alive) = (head.body, head.keep_alive);
                let (mut parts, ()) = Response::new(()).into_parts();
                (parts.status, parts.version, parts.headers) = (head.status, head.version, head.headers);
                return Poll::Ready(Ok(parts));
            }
            if self.wire.ended {
                return Poll::Ready(Err(SendError::Closed { sent: self.wire.sent }));
            }
            // how it ended is no more than that it has
            if ready!(self.wire.poll_read(cx)).is_err() {
                self.wire.ended = true;
            }
        }
    }

    /// Writes what waits, and the request's body as it comes; ready when all is written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            // the first pieces of a body go with the head, if they are here
            let mut waits = false;
            while let Some(upload) = &mut self.upload
                && self.wire.outbox.has_room()
                && !waits
            {
                match upload.poll(&mut self.wire.outbox, cx) {
                    Poll::Ready(Ok(true)) => self.upload = None,
                    Poll::Ready(Ok(false)) => {}
                    Poll::Ready(Err(error)) => {
                        self.keep_alive = false;
                        return Poll::Ready(Err(Broken::Client(error)));
                    }
                    Poll::Pending => waits = true,
                }
            }
            if ready!(self.wire.poll_write(cx)).is_err() {
                // nothing more is sent on it
                (self.upload, self.wire.outbox, self.keep_alive) = (None, Outbox::default(), false);
                return Poll::Ready(Err(Broken::Io));
            }
            match &self.upload {
                None => return Poll::Ready(Ok(())),
                Some(_) if waits => return Poll::Pending,
                Some(_) => {}
            }
        }
    }

    /// The next piece of the response's body.
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if (self.upload.is_some() || !self.wire.outbox.is_empty())
            && let Poll::Ready(Err(Broken::Client(error))) = self.poll_write(cx)
        {
            return Poll::Ready(Some(Err(error)));
        }
        loop {
            match self.decoder.next(&mut self.wire.inbox, self.wire.ended) {
                Err(error) => {
                    self.keep_alive = false;
                    return Poll::Ready(Some(Err(error.into())));
                }
                Ok(Piece::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Piece::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Piece::Over) => return Poll::Ready(None),
                Ok(Piece::NeedMore) => {
                    if let Err(error) = ready!(self.wire.poll_read(cx)) {
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
        (self.wire.into_io(), self.opened)
    }
}

/// Why nothing more can be written.
enum Broken {
    Io,
    Client(BodyError),
}
