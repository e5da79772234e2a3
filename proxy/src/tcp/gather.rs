//! Gathers what a codec writes piece by piece in one turn, so that it leaves in one piece: [`Gathered`].
//!
//! The HTTP/2 codec writes each DATA frame by itself. A connection that many streams share would pay a system call,
//! and under TLS a record, for each of their answers.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How many bytes are gathered at most: what one TLS record holds (RFC 8446, section 5.1).
const MOST: usize = 16 * 1024;
/// How many slices go out together.
const SLICES: usize = 8;

thread_local! {
    /// Room that no stream needs just now. Most give theirs back at the end of the turn in which they took it.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A stream that a codec writes to, and whose other handle sends at the end of each turn of the codec: whoever polls
/// the codec calls [`Gathered::send`] afterwards.
#[derive(Debug)]
pub struct Gathered<S>(Rc<RefCell<Inner<S>>>);

#[derive(Debug)]
struct Inner<S> {
    io: S,
    waiting: Vec<u8>,
    /// How much of `waiting` has left.
    sent: usize,
    /// How sending failed, for the codec to see.
    failed: Option<ErrorKind>,
}

impl<S> Clone for Gathered<S> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    /// Gathers for `io`.
    pub fn new(io: S) -> Self {
        Self(Rc::new(RefCell::new(Inner { io, waiting: Vec::new(), sent: 0, failed: None })))
    }

    /// Sends what waits. What does not fit now is sent when the codec's task is woken for it; the codec learns of an
    /// error when it reads or writes next.
    pub fn send(&self, cx: &mut Context<'_>) {
        let mut inner = self.0.borrow_mut();
        if inner.failed.is_some() {
            return;
        }
        if let Poll::Ready(Err(error)) = inner.poll_send(cx) {
            inner.failed = Some(error.kind());
            cx.waker().wake_by_ref();
        }
    }
}

impl<S: AsyncWrite + Unpin> Inner<S> {
    fn check(&self) -> io::Result<()> {
        self.failed.map_or(Ok(()), |kind| Err(kind.into()))
    }

    fn waits(&self) -> &[u8] {
        self.waiting.get(self.sent..).unwrap_or_default()
    }

    fn gather(&mut self, pieces: &[IoSlice<'_>]) {
        if self.waiting.capacity() == 0 {
            self.waiting = SPARE.take();
        }
        if self.sent >= MOST {
            self.waiting.drain(..self.sent);
            self.sent = 0;
        }
        for piece in pieces {
            self.waiting.extend_from_slice(piece);
        }
    }

    /// Notes that the first `n` bytes of what waits have left.
    fn left(&mut self, n: usize) {
        self.sent += n;
        if self.sent == self.waiting.len() {
            self.sent = 0;
            self.waiting.clear();
            SPARE.set(std::mem::take(&mut self.waiting));
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.waits().is_empty() {
            let waits = self.waiting.get(self.sent..).unwrap_or_default();
            match ready!(Pin::new(&mut self.io).poll_write(cx, waits))? {
                0 => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                n => self.left(n),
            }
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_pieces(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let new = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        loop {
            let waits = self.waits().len();
            if waits + new <= MOST {
                self.gather(pieces);
                return Poll::Ready(Ok(new));
            }
            if waits == 0 {
                return Pin::new(&mut self.io).poll_write_vectored(cx, pieces);
            }
            let mut slices = [IoSlice::new(&[]); SLICES];
            let waiting = IoSlice::new(self.waiting.get(self.sent..).unwrap_or_default());
            let all = std::iter::once(&waiting).chain(pieces);
            let used = slices.iter_mut().zip(all).map(|(slot, piece)| *slot = *piece).count();
            let slices = slices.get(..used).unwrap_or_default();
            let n = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices))?;
            if n == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.left(n.min(waits));
            if n > waits {
                return Poll::Ready(Ok(n - waits));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        inner.check()?;
        Pin::new(&mut inner.io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    /// What was gathered goes out when the turn is over, see [`Gathered::send`].
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.borrow().check())
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        inner.check()?;
        ready!(inner.poll_send(cx))?;
        Pin::new(&mut inner.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.0.borrow_mut();
        inner.check()?;
        inner.poll_pieces(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes `room` bytes, and then so many again after each time it was full.
    #[derive(Debug)]
    struct Narrow {
        room: usize,
        left: usize,
        writes: usize,
        took: Vec<u8>,
        broken: bool,
    }

    impl Narrow {
        fn new(room: usize) -> Self {
            Self { room, left: room, writes: 0, took: Vec::new(), broken: false }
        }
    }

    impl AsyncWrite for Narrow {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let this = self.get_mut();
            if this.broken {
                return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
            }
            if this.left == 0 {
                this.left = this.room;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let n = buf.len().min(this.left);
            this.left -= n;
            this.writes += 1;
            this.took.extend_from_slice(&buf[..n]);
            Poll::Ready(Ok(n))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn cx() -> Context<'static> {
        Context::from_waker(std::task::Waker::noop())
    }

    #[test]
    fn the_pieces_of_a_turn_leave_together() {
        let mut gathered = Gathered::new(Narrow::new(usize::MAX));
        for piece in [&b"one "[..], b"two ", b"three"] {
            let written = Pin::new(&mut gathered).poll_write(&mut cx(), piece);
            assert!(matches!(written, Poll::Ready(Ok(n)) if n == piece.len()));
            assert!(matches!(Pin::new(&mut gathered).poll_flush(&mut cx()), Poll::Ready(Ok(()))));
        }
        assert_eq!(gathered.0.borrow().io.writes, 0);
        gathered.send(&mut cx());
        let inner = gathered.0.borrow();
        assert_eq!((inner.io.writes, &inner.io.took[..]), (1, &b"one two three"[..]));
    }

    #[test]
    fn an_error_of_sending_is_the_codecs() {
        let mut gathered = Gathered::new(Narrow { broken: true, ..Narrow::new(1) });
        let written = Pin::new(&mut gathered).poll_write(&mut cx(), b"lost");
        assert!(matches!(written, Poll::Ready(Ok(4))));
        gathered.send(&mut cx());
        let next = Pin::new(&mut gathered).poll_write(&mut cx(), b"more");
        assert!(matches!(next, Poll::Ready(Err(e)) if e.kind() == ErrorKind::BrokenPipe));
        assert!(matches!(Pin::new(&mut gathered).poll_flush(&mut cx()), Poll::Ready(Err(_))));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_told_twice(
            turns in proptest::collection::vec(proptest::collection::vec(0_usize..40_000, 0..6), 0..8),
            room in 1_usize..50_000,
        ) {
            let mut gathered = Gathered::new(Narrow::new(room));
            let (mut expected, mut next) = (Vec::new(), 0_u8);
            for length in turns.iter().flat_map(|turn| turn.iter().copied().chain([0])) {
                let bytes: Vec<u8> = (0..length).map(|_| { next = next.wrapping_add(1); next }).collect();
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (a, b) = rest.split_at(rest.len() / 3);
                    let pieces = [IoSlice::new(a), IoSlice::new(b)];
                    match Pin::new(&mut gathered).poll_write_vectored(&mut cx(), &pieces) {
                        Poll::Ready(Ok(n)) => rest = &rest[n..],
                        Poll::Ready(Err(e)) => panic!("{e}"),
                        Poll::Pending => {}
                    }
                    let waits = gathered.0.borrow().waits().len();
                    prop_assert!(waits <= MOST);
                }
                expected.extend(bytes);
                if length == 0 {
                    gathered.send(&mut cx());
                }
            }
            while Pin::new(&mut gathered).poll_shutdown(&mut cx()).is_pending() {}
            prop_assert!(gathered.0.borrow().io.took == expected);
        }
    }
}
