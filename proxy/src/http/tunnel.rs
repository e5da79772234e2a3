//! What follows a request to leave HTTP that both sides agreed to: bytes both ways, over a connection or over a stream
//! of one on either side.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::Version;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::exchange::Exchange;
use super::flags::Flags;
use super::timing::Late;
use crate::tcp::relay::{Counts, End, relay};
use crate::upstream::pool::{Left, LeftStream};
use crate::worker::Worker;

/// Relays once the client has the response. Whichever side breaks off, the other one's connection or stream ends, too.
pub async fn run(worker: Rc<Worker>, client: OnUpgrade, server: Left, mut exchange: Box<Exchange>) {
    let Ok(client) = client.await else { return exchange.client_left() };
    let mut client = Client::new(client, exchange.version);
    let counts = Counts::default();
    let idle = exchange.timing.idle();
    let end = tokio::select! {
        end = carry(&mut client, server, idle, &counts) => Some(end),
        () = worker.drain.cut() => None,
    };
    tracing::debug!(?end, "upgraded connection ended");
    exchange.sent_bytes += counts.down.get();
    let progress = exchange.progress.get_or_insert_default();
    progress.bytes.set(progress.bytes.get() + counts.up.get());
    match end {
        Some(End::Idle) => exchange.cut_short(Late::Idle),
        Some(End::Client(_)) => exchange.client_left(),
        Some(End::Server(_)) => exchange.flags.insert(Flags::UPSTREAM_TERMINATION),
        Some(End::Closed) | None => {}
    }
}

async fn carry(client: &mut Client, server: Left, idle: Option<Duration>, counts: &Counts) -> End {
    match server.stream {
        LeftStream::H1(mut io, _opened) => {
            let end = relay(client, &mut io, idle, counts).await;
            if !matches!(end, End::Closed) {
                io.break_off();
            }
            end
        }
        LeftStream::H2(mut stream) => relay(client, &mut stream, idle, counts).await,
    }
}

/// The client's side. The codec tells the end of an HTTP/2 stream and its reset in the same way when it is read; a
/// reset shows on the other half only.
struct Client {
    io: TokioIo<Upgraded>,
    /// How often a stream that seems to have ended is looked at again.
    looks: u8,
}

impl Client {
    fn new(io: Upgraded, version: Version) -> Self {
        Self { io: TokioIo::new(io), looks: u8::from(version == Version::HTTP_2) }
    }
}

impl AsyncRead for Client {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            return Poll::Ready(Ok(()));
        }
        if this.looks > 0 {
            // the codec's task that learns of a reset was woken together with this one
            this.looks -= 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match Pin::new(&mut this.io).poll_flush(cx) {
            Poll::Ready(Err(error)) => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)))
            }
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for Client {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
