//! One stream as bytes both ways, once the server has agreed to leave HTTP (RFC 8441, section 5).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ::h2::{Reason, RecvStream, SendStream};
use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Open;
use crate::tcp::io::Stream;

/// The most bytes that one write copies.
const PIECE: usize = 64 * 1024;

/// A stream as bytes both ways. Each side's end is told by itself; whoever drops it earlier resets the stream.
#[derive(Debug)]
pub struct Tunnel {
    receive: RecvStream,
    send: SendStream<Bytes>,
    /// What came and was not read yet.
    ahead: Bytes,
    received_all: bool,
    sent_all: bool,
    _open: Open,
}

impl Tunnel {
    pub(super) fn new(receive: RecvStream, send: SendStream<Bytes>, open: Open) -> Self {
        Self { receive, send, ahead: Bytes::new(), received_all: false, sent_all: false, _open: open }
    }
}

impl Stream for Tunnel {}

impl AsyncRead for Tunnel {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.ahead.is_empty() && !this.received_all {
            match ready!(this.receive.poll_data(cx)) {
                Some(Ok(data)) => this.ahead = data,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => this.received_all = true,
            }
        }
        let n = this.ahead.len().min(buf.remaining());
        buf.put_slice(this.ahead.get(..n).unwrap_or_default());
        this.ahead.advance(n);
        if n > 0 {
            this.receive.flow_control().release_capacity(n).map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        this.send.reserve_capacity(buf.len().min(PIECE));
        while this.send.capacity() == 0 {
            match ready!(this.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let n = buf.len().min(this.send.capacity());
        let piece = Bytes::copy_from_slice(buf.get(..n).unwrap_or_default());
        this.send.send_data(piece, false).map_err(broken)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // the connection writes by itself
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !std::mem::replace(&mut this.sent_all, true) {
            this.send.send_data(Bytes::new(), true).map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if !(self.received_all && self.sent_all) {
            self.send.send_reset(Reason::CANCEL);
        }
    }
}

fn broken(error: ::h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
