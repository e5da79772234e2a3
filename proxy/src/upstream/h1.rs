//! One HTTP/1 connection to an endpoint, driven by whoever uses it.
//!
//! The codec's connection is polled in the task of the request that holds it, so a request costs no second task
//! and no wake-up between two. While it is idle nobody polls it: [`H1::is_alive`] looks before it is used again.

use std::future::Future as _;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as _, Frame};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use super::send::{Link, Opened};
use crate::http::body::{BodyError, RequestBody};
use crate::tcp::io::Io;

type Connection = http1::Connection<TokioIo<Io>, RequestBody>;

/// An HTTP/1 connection and what is needed to send on it.
#[derive(Debug)]
pub struct H1 {
    send: http1::SendRequest<RequestBody>,
    connection: Connection,
    over: bool,
    /// Requests sent so far.
    pub uses: u32,
    /// When it was made.
    pub born: Instant,
    opened: Opened,
}

/// Why a request got no response.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct SendError {
    /// The codec's or the transport's error.
    #[source]
    pub error: BodyError,
    /// The request, when nothing of it was written.
    pub unsent: Option<Box<Request<RequestBody>>>,
}

impl H1 {
    /// Starts HTTP/1 on a connected stream.
    ///
    /// # Errors
    ///
    /// When the codec refuses the stream.
    pub async fn start(io: Io, opened: Opened, proper_case: bool) -> hyper::Result<Self> {
        let (send, connection) = http1::Builder::new()
            .max_buf_size(1 << 18)
            .title_case_headers(proper_case)
            .handshake(TokioIo::new(io))
            .await?;
        Ok(Self { send, connection, over: false, uses: 0, born: Instant::now(), opened })
    }

    /// Whether the connection can take a request now: the last exchange is over and the server has not closed.
    pub fn is_alive(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.drive(&mut cx);
        !self.over && self.send.is_ready()
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        if !self.over {
            self.over = self.connection.poll_without_shutdown(cx).is_ready();
        }
    }

    /// Sends a request and waits for the head of the response.
    ///
    /// # Errors
    ///
    /// When the connection ends first; the request comes back if nothing of it was written.
    pub async fn send(&mut self, request: Request<RequestBody>) -> Result<Response<Incoming>, SendError> {
        self.uses += 1;
        let Self { send, connection, over, .. } = self;
        let mut response = pin!(send.try_send_request(request));
        std::future::poll_fn(|cx| {
            if !*over {
                *over = connection.poll_without_shutdown(cx).is_ready();
            }
            // only the connection above can complete the response, and it was polled with the real waker
            let mut nobody = Context::from_waker(Waker::noop());
            response.as_mut().poll(&mut nobody)
        })
        .await
        .map_err(|mut e| SendError { unsent: e.take_message().map(Box::new), error: e.into_error().into() })
    }

    /// The next piece of the response's body.
    pub fn poll_body(
        &mut self,
        body: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut nobody = Context::from_waker(Waker::noop());
        let mut polled = Pin::new(&mut *body).poll_frame(&mut nobody);
        if polled.is_pending() {
            self.drive(cx);
            polled = Pin::new(body).poll_frame(&mut nobody);
            if polled.is_pending() && self.over {
                return Poll::Ready(Some(Err("connection closed in the middle of a response".into())));
            }
        }
        polled.map(|frame| frame.map(|f| f.map_err(Into::into)))
    }

    /// What is known of the connection.
    #[must_use]
    pub fn link(&self) -> Option<Rc<Link>> {
        self.opened.link()
    }

    /// The stream below after a `101 Switching Protocols`, with bytes that were read beyond the response.
    #[must_use]
    pub fn into_io(mut self) -> (Io, Opened) {
        let mut cx = Context::from_waker(Waker::noop());
        self.drive(&mut cx);
        let parts = self.connection.into_parts();
        (parts.io.into_inner().resumed(parts.read_buf), self.opened)
    }
}
