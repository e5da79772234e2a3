//! What follows a request to leave HTTP that both sides agreed to: bytes both ways, over a connection or over a stream
//! of one on either side.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::exchange::Exchange;
use super::flags::Flags;
use super::timing::Late;
use crate::tcp::io::{Io, Stream};
use crate::tcp::relay::{Counts, End, relay};
use crate::upstream::pool::{Left, LeftStream};
use crate::upstream::send::Outgoing;
use crate::upstream::{Host, Upstream};
use crate::worker::Worker;

/// Pieces of up to 64 KiB on their way to a copy. Full means that the copy's server takes less than the client sends:
/// the copy ends there, as Envoy's does when its buffer is full.
const COPY_QUEUE: usize = 16;
/// The longest time in which a copy's server neither answers nor takes anything.
const COPY_PATIENCE: Duration = Duration::from_secs(300);

/// Where a copy of the client's bytes goes.
pub type Shadow = mpsc::Sender<Bytes>;

/// A way for the client's bytes to [`feed`].
pub(super) fn shadow() -> (Shadow, mpsc::Receiver<Bytes>) {
    mpsc::channel(COPY_QUEUE)
}

/// Asks a copy's server to leave HTTP, too, and sends it what the client sends after that; what it says is thrown away.
/// Ends when the client ends, or when that server does not leave HTTP.
pub(super) async fn feed(
    upstream: Rc<Upstream>,
    host: Rc<Host>,
    request: Outgoing,
    mut bytes: mpsc::Receiver<Bytes>,
) {
    let dialed = Cell::new(None);
    let asked = upstream.send(&host, request, Instant::now(), &dialed);
    let Ok(Ok((parts, reply))) = tokio::time::timeout(COPY_PATIENCE, asked).await else { return };
    if parts.status != StatusCode::SWITCHING_PROTOCOLS {
        return;
    }
    let result = match reply.into_left().map(|left| left.stream) {
        Some(LeftStream::H1(io, _opened)) => give(io, &mut bytes).await,
        Some(LeftStream::H2(tunnel)) => give(tunnel, &mut bytes).await,
        None => return,
    };
    tracing::debug!(?result, "copy of an upgraded connection ended");
}

async fn give(server: impl AsyncRead + AsyncWrite, bytes: &mut mpsc::Receiver<Bytes>) -> io::Result<()> {
    let (mut said, mut taken) = tokio::io::split(server);
    let mut nothing = tokio::io::sink();
    let giving = async {
        while let Some(piece) = bytes.recv().await {
            let write = async {
                taken.write_all(&piece).await?;
                taken.flush().await
            };
            tokio::time::timeout(COPY_PATIENCE, write).await??;
        }
        taken.shutdown().await
    };
    tokio::select! {
        given = giving => given,
        over = tokio::io::copy(&mut said, &mut nothing) => over.map(|_| ()),
    }
}

/// A client that leaves HTTP once it has the response.
#[derive(Debug)]
pub enum Leaving {
    /// Its connection does.
    H1(oneshot::Receiver<Io>),
    /// A stream of its connection does.
    H2(OnUpgrade),
}

/// Relays once the client has the response. Whichever side breaks off, the other one's connection or stream ends, too.
pub async fn run(
    worker: Rc<Worker>,
    client: Leaving,
    server: Left,
    shadows: Vec<Shadow>,
    mut exchange: Box<Exchange>,
) {
    let left = match client {
        Leaving::H1(io) => io.await.ok().map(ClientIo::H1),
        Leaving::H2(stream) => stream.await.ok().map(|stream| ClientIo::H2(TokioIo::new(stream))),
    };
    let Some(io) = left else { return exchange.client_left() };
    let mut client = Client::new(io, shadows);
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
    io: ClientIo,
    /// How often a stream that seems to have ended is looked at again.
    looks: u8,
    /// Who gets the same bytes.
    shadows: Vec<Shadow>,
}

enum ClientIo {
    H1(Io),
    H2(TokioIo<Upgraded>),
}

impl Client {
    fn new(io: ClientIo, shadows: Vec<Shadow>) -> Self {
        let looks = u8::from(matches!(io, ClientIo::H2(_)));
        Self { io, looks, shadows }
    }

    /// Gives the copies what came.
    fn tell(&mut self, came: &[u8]) {
        if !self.shadows.is_empty() {
            let piece = Bytes::copy_from_slice(came);
            self.shadows.retain(|copy| copy.try_send(piece.clone()).is_ok());
        }
    }
}

impl Stream for Client {
    fn as_plain(&self) -> Option<&TcpStream> {
        match &self.io {
            ClientIo::H1(io) if self.shadows.is_empty() => io.as_plain(),
            ClientIo::H1(_) | ClientIo::H2(_) => None,
        }
    }
}

impl AsyncRead for Client {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(match &mut this.io {
            ClientIo::H1(io) => Pin::new(io).poll_read(cx, buf),
            ClientIo::H2(io) => Pin::new(io).poll_read(cx, buf),
        })?;
        if let Some(came) = buf.filled().get(before..)
            && !came.is_empty()
        {
            this.tell(came);
            return Poll::Ready(Ok(()));
        }
        if this.looks > 0 {
            // the codec's task that learns of a reset was woken together with this one
            this.looks -= 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        this.shadows.clear();
        match Pin::new(this).poll_flush(cx) {
            Poll::Ready(Err(error)) => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)))
            }
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for Client {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            ClientIo::H1(io) => Pin::new(io).poll_write(cx, buf),
            ClientIo::H2(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            ClientIo::H1(io) => Pin::new(io).poll_flush(cx),
            ClientIo::H2(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            ClientIo::H1(io) => Pin::new(io).poll_shutdown(cx),
            ClientIo::H2(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
