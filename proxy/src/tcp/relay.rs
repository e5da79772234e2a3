//! Moves bytes both ways between two streams: half-close, idle timeout, counts.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::io::Stream;
use super::splice::{Pipe, cannot_splice};

/// Bytes moved at once in one direction.
const CHUNK: usize = 64 * 1024;
/// Bytes moved in one direction before others have their turn.
const TURN: usize = 16 * CHUNK;
/// Whole chunks one after the other from which on a stream is taken for one that goes on so.
const FULL: u32 = 4;
/// Fewer bytes than these at once, and it is not.
const FEW: usize = CHUNK / 4;

/// How many bytes went each way; readable while the relay runs.
#[derive(Debug, Default)]
pub struct Counts {
    /// From the client to the server.
    pub up: Cell<u64>,
    /// From the server to the client.
    pub down: Cell<u64>,
    /// How much of `up` a report has told already.
    pub told_up: Cell<u64>,
    /// How much of `down` a report has told already.
    pub told_down: Cell<u64>,
}

/// Why a relay ended.
#[derive(Debug)]
pub enum End {
    /// Both sides closed in order.
    Closed,
    /// Nothing moved for the idle timeout.
    Idle,
    /// Reading from or writing to the client failed.
    Client(io::Error),
    /// Reading from or writing to the server failed.
    Server(io::Error),
}

/// Relays until both directions are closed, one side fails, or nothing moves for `idle`.
///
/// Each side's end of stream is passed on as a half-close, and the other direction goes on.
pub async fn relay<C, S>(client: &mut C, server: &mut S, idle: Option<Duration>, counts: &Counts) -> End
where
    C: Stream,
    S: Stream,
{
    let (mut up, mut down) = (Half::default(), Half::default());
    let timer = idle.map(tokio::time::sleep);
    let mut timer = std::pin::pin!(timer);
    let mut last = Instant::now();
    std::future::poll_fn(|cx| {
        let before = counts.up.get() + counts.down.get();
        let a = up.poll(cx, client, server, &counts.up);
        let b = down.poll(cx, server, client, &counts.down);
        match (a, b) {
            (Poll::Ready(Err(Side::Read(e))), _) | (_, Poll::Ready(Err(Side::Write(e)))) => {
                return Poll::Ready(End::Client(e));
            }
            (Poll::Ready(Err(Side::Write(e))), _) | (_, Poll::Ready(Err(Side::Read(e)))) => {
                return Poll::Ready(End::Server(e));
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(End::Closed),
            _ => {}
        }
        let (Some(idle), Some(timer)) = (idle, timer.as_mut().as_pin_mut()) else { return Poll::Pending };
        if counts.up.get() + counts.down.get() != before {
            last = Instant::now();
        }
        poll_idle(timer, last, idle, cx)
    })
    .await
}

/// The timer runs from the last time it was armed; it is only moved when it fires, not for every byte.
fn poll_idle(mut timer: Pin<&mut Sleep>, last: Instant, idle: Duration, cx: &mut Context<'_>) -> Poll<End> {
    while timer.as_mut().poll(cx).is_ready() {
        let due = last + idle;
        if Instant::now() >= due {
            return Poll::Ready(End::Idle);
        }
        timer.as_mut().reset(due);
    }
    Poll::Pending
}

enum Side {
    Read(io::Error),
    Write(io::Error),
}

/// One direction. The buffer, or the pipe in its place, exists only while it holds bytes, so an idle connection costs
/// none.
#[derive(Default)]
struct Half {
    buffer: Vec<u8>,
    pipe: Option<Pipe>,
    /// Whole chunks read one after the other.
    full: u32,
    /// Splicing was tried, and is not possible.
    copies: bool,
    filled: usize,
    written: usize,
    ended: bool,
    unflushed: bool,
    closed: bool,
}

thread_local! {
    /// A buffer that no connection of this thread needs just now.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Half {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        count: &Cell<u64>,
    ) -> Poll<Result<(), Side>>
    where
        R: Stream,
        W: Stream,
    {
        let mut moved = 0;
        loop {
            if self.closed {
                return Poll::Ready(Ok(()));
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if self.written < self.filled {
                let n = ready!(self.poll_drain(cx, to)).map_err(Side::Write)?;
                if n == 0 {
                    return Poll::Ready(Err(Side::Write(io::ErrorKind::WriteZero.into())));
                }
                self.written += n;
                moved += n;
                self.unflushed = true;
                count.set(count.get() + u64::try_from(n).unwrap_or(0));
                continue;
            }
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(Side::Write)?;
                self.closed = true;
                continue;
            }
            match self.poll_fill(cx, from, to) {
                Poll::Ready(result) => result.map_err(Side::Read)?,
                Poll::Pending => {
                    if self.unflushed {
                        ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(Side::Write)?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    fn poll_drain<W: Stream>(&self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<usize>> {
        if let (Some(pipe), Some(to)) = (&self.pipe, to.as_plain()) {
            return pipe.poll_drain(cx, to, self.filled - self.written);
        }
        let rest = self.buffer.get(self.written..self.filled).unwrap_or_default();
        Pin::new(to).poll_write(cx, rest)
    }

    fn poll_fill<R: Stream, W: Stream>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &W,
    ) -> Poll<io::Result<()>> {
        (self.written, self.filled) = (0, 0);
        let emptied = self.pipe.take();
        let plain = from.as_plain().filter(|_| to.as_plain().is_some());
        let Some(plain) = plain.filter(|_| self.full >= FULL && !self.copies) else {
            if let Some(pipe) = emptied {
                pipe.put_back();
            }
            return self.poll_buffer(cx, from);
        };
        let Some(pipe) = emptied.or_else(Pipe::get) else { return self.poll_buffer(cx, from) };
        if !self.buffer.is_empty() {
            SPARE.set(std::mem::take(&mut self.buffer));
        }
        let polled = self.poll_pipe(cx, pipe, plain);
        if let Poll::Ready(Err(error)) = &polled
            && cannot_splice(error)
        {
            self.copies = true;
            return self.poll_buffer(cx, from);
        }
        polled
    }

    fn poll_pipe(&mut self, cx: &mut Context<'_>, pipe: Pipe, from: &TcpStream) -> Poll<io::Result<()>> {
        let polled = pipe.poll_fill(cx, from);
        match &polled {
            Poll::Ready(Ok(n)) if *n > 0 => {
                self.filled = *n;
                self.pipe = Some(pipe);
                if *n < FEW {
                    self.full = 0;
                }
            }
            Poll::Ready(Ok(_)) => {
                self.ended = true;
                pipe.put_back();
            }
            Poll::Pending => pipe.put_back(),
            Poll::Ready(Err(_)) => {}
        }
        polled.map_ok(|_| ())
    }

    fn poll_buffer<R: Stream>(&mut self, cx: &mut Context<'_>, from: &mut R) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() {
            self.buffer = SPARE.take();
            self.buffer.resize(CHUNK, 0);
        }
        let mut window = ReadBuf::new(&mut self.buffer);
        let polled = Pin::new(from).poll_read(cx, &mut window);
        self.filled = window.filled().len();
        if self.filled == 0 {
            SPARE.set(std::mem::take(&mut self.buffer));
            self.ended = matches!(polled, Poll::Ready(Ok(())));
        }
        match self.filled {
            CHUNK => self.full = self.full.saturating_add(1),
            0 => {}
            _ => self.full = 0,
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::net::TcpListener;

    use crate::tcp::io::{Io, Socket};

    impl Stream for DuplexStream {}

    /// Both ends of a TCP connection.
    async fn connected() -> (TcpStream, Io) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (ours, theirs) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (ours.unwrap(), Io::Plain(Socket::tcp(theirs.unwrap().0)))
    }

    /// `n` bytes that tell their places.
    fn pattern(n: usize) -> Vec<u8> {
        (0..n).map(|at| u8::try_from(at % 251).unwrap()).collect()
    }

    #[tokio::test]
    async fn plain_sockets_are_relayed_the_same_in_bulk_and_byte_by_byte() {
        let (mut client, mut a) = connected().await;
        let (mut server, mut b) = connected().await;
        let counts = Counts::default();
        let (bulk, few) = (pattern(20 << 20), pattern(1000));
        let sends = async {
            // much, a little, much again: the pipe is taken up twice
            for piece in [&bulk[..], &few, &bulk] {
                server.write_all(piece).await.unwrap();
            }
            server.shutdown().await.unwrap();
            let mut asked = Vec::new();
            server.read_to_end(&mut asked).await.unwrap();
            asked
        };
        let reads = async {
            client.write_all(&few).await.unwrap();
            let mut came = Vec::new();
            client.read_to_end(&mut came).await.unwrap();
            client.write_all(&bulk).await.unwrap();
            client.shutdown().await.unwrap();
            came
        };
        let relayed = relay(&mut a, &mut b, None, &counts);
        let (end, asked, came) = tokio::join!(relayed, sends, reads);
        assert!(matches!(end, End::Closed), "{end:?}");
        assert!(asked == [&few[..], &bulk].concat());
        assert!(came == [&bulk[..], &few, &bulk].concat());
        let sizes = (asked.len() as u64, came.len() as u64);
        assert_eq!((counts.up.get(), counts.down.get()), sizes);
    }

    #[tokio::test]
    async fn a_side_that_breaks_off_in_bulk_is_told() {
        let (client, mut a) = connected().await;
        let (mut server, mut b) = connected().await;
        let counts = Counts::default();
        let bulk = pattern(1 << 20);
        let sends = async { while server.write_all(&bulk).await.is_ok() {} };
        let leaves = async {
            let mut client = client;
            let mut some = vec![0; 4 << 20];
            client.read_exact(&mut some).await.unwrap();
            client.set_zero_linger().unwrap();
        };
        let relayed = async {
            let end = relay(&mut a, &mut b, None, &counts).await;
            b.break_off();
            drop(b);
            end
        };
        let (end, (), ()) = tokio::join!(relayed, sends, leaves);
        assert!(matches!(end, End::Client(_)), "{end:?}");
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_a_half_close_is_passed_on() {
        let (mut client, mut a) = duplex(100);
        let (mut server, mut b) = duplex(100);
        let counts = Counts::default();
        let peer = async move {
            client.write_all(b"ping").await.unwrap();
            client.shutdown().await.unwrap();
            let mut seen = String::new();
            server.read_to_string(&mut seen).await.unwrap();
            server.write_all(b"answer after end").await.unwrap();
            drop(server);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            (seen, answer)
        };
        let (end, (seen, answer)) = tokio::join!(relay(&mut a, &mut b, None, &counts), peer);
        assert!(matches!(end, End::Closed));
        assert_eq!((seen.as_str(), answer.as_str()), ("ping", "answer after end"));
        assert_eq!((counts.up.get(), counts.down.get()), (4, 16));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_relay_ends_after_the_timeout_since_the_last_byte() {
        let (mut client, mut a) = duplex(100);
        let (_server, mut b) = duplex(100);
        let counts = Counts::default();
        let started = Instant::now();
        let peer = async move {
            tokio::time::sleep(Duration::from_secs(5)).await;
            client.write_all(b"x").await.unwrap();
            client
        };
        let (end, _client) = tokio::join!(relay(&mut a, &mut b, Some(Duration::from_secs(8)), &counts), peer);
        assert!(matches!(end, End::Idle));
        assert_eq!(started.elapsed().as_secs(), 13);
    }
}
