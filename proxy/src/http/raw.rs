//! The head of an HTTP/1 request as its bytes came. The codec tells one interpretation of a head; two headers that
//! contradict each other, or a head that never ends, can only be seen here. What is refused here is refused whole;
//! nothing here changes what the codec reads.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use http::Method;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Heads are kept up to this length; the codec has its own limit, and both together bound a connection's memory.
const MOST: usize = 64 * 1024;
/// What a connection keeps of the room for a head, once a request has been taken.
const KEEP: usize = 1024;

/// What a head says about the length of its body more than once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ambiguous {
    /// `content-length` and `transfer-encoding`.
    LengthAndChunks,
    /// `content-length` twice.
    TwoLengths,
}

/// The bytes since a connection was quiet last: the head of its next request, for as long as its client does not send
/// requests ahead. The codec wants to own a stream that could go to another thread, so this could, too; the lock is
/// never waited for.
#[derive(Debug, Default)]
pub struct RawHead {
    busy: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    /// A request was taken out of these bytes, or out of what came before them.
    taken: bool,
    answer: Option<Bytes>,
}

impl RawHead {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        // nothing is left half done under this lock
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While requests are under way, what comes is theirs.
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    fn on_read(&self, new: &[u8]) {
        let mut seen = self.seen();
        if std::mem::take(&mut seen.taken) {
            seen.bytes.clear();
        }
        let room = MOST.saturating_sub(seen.bytes.len()).min(new.len());
        seen.bytes.extend_from_slice(new.get(..room).unwrap_or_default());
    }

    /// How many bytes have come of a head that is not whole; 0 between requests.
    #[must_use]
    pub fn waiting(&self) -> usize {
        if self.busy.load(Ordering::Relaxed) {
            return 0;
        }
        let seen = self.seen();
        // empty lines before a request are nothing (RFC 9112, section 2.2)
        let begun = !seen.taken && seen.bytes.iter().any(|b| !matches!(b, b'\r' | b'\n'));
        if begun { seen.bytes.len() } else { 0 }
    }

    /// Notes that the codec has taken a request, and looks over its head if the codec found a body.
    ///
    /// # Errors
    ///
    /// The head can be read in two ways. A request that was sent ahead of the response before it is not looked
    /// over: there the codec's reading holds, which is that of RFC 9112, section 6.3, and ends the connection.
    pub fn take(&self, method: &Method, has_body: bool) -> Result<(), Ambiguous> {
        let mut seen = self.seen();
        let first = !std::mem::replace(&mut seen.taken, true);
        let outcome = if first && has_body { look(&seen.bytes, method) } else { Ok(()) };
        seen.bytes.clear();
        seen.bytes.shrink_to(KEEP);
        outcome
    }

    /// The connection ends with this answer; what comes after it is not read.
    pub fn end_with(&self, answer: Bytes) {
        self.seen().answer = Some(answer);
    }
}

fn look(bytes: &[u8], method: &Method) -> Result<(), Ambiguous> {
    let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n')).unwrap_or(bytes.len());
    let head = bytes.get(start..).unwrap_or_default();
    if !head.starts_with(method.as_str().as_bytes()) {
        return Ok(()); // it began in bytes that came earlier
    }
    let (mut lengths, mut chunks) = (0, false);
    for line in head.split(|b| *b == b'\n').skip(1) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            break;
        }
        lengths += u32::from(is_header(line, b"content-length"));
        chunks |= is_header(line, b"transfer-encoding");
    }
    match (lengths, chunks) {
        (1.., true) => Err(Ambiguous::LengthAndChunks),
        (2.., false) => Err(Ambiguous::TwoLengths),
        (0 | 1, false) | (0, true) => Ok(()),
    }
}

fn is_header(line: &[u8], name: &[u8]) -> bool {
    line.get(..name.len()).is_some_and(|n| n.eq_ignore_ascii_case(name))
        && line.get(name.len()) == Some(&b':')
}

/// A client's stream, whose heads are noted on its connection.
#[derive(Debug)]
pub struct Noted<S> {
    io: S,
    head: Arc<RawHead>,
}

impl<S> Noted<S> {
    /// A stream whose next bytes begin a request.
    pub fn new(io: S, head: Arc<RawHead>) -> Self {
        Self { io, head }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Noted<S> {
    /// Writes the last answer; then there is nothing more to read.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut seen = self.head.seen();
        let Some(bytes) = &mut seen.answer else { return Poll::Ready(Ok(())) };
        while !bytes.is_empty() {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            bytes.advance(n);
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Noted<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.head.busy.load(Ordering::Relaxed) {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        if this.head.seen().answer.is_some() {
            return this.poll_answer(cx);
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        let new = buf.filled().get(before..).unwrap_or_default();
        if !new.is_empty() {
            this.head.on_read(new);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noted<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(head: &str, expected: Result<(), Ambiguous>) {
        let raw = RawHead::default();
        // in two pieces, as a network may bring it
        let (a, b) = head.as_bytes().split_at(head.len() / 2);
        raw.on_read(a);
        raw.on_read(b);
        assert_eq!(raw.take(&Method::POST, true), expected, "{head:?}");
    }

    #[test]
    fn two_lengths_and_lengths_with_chunks_are_seen() {
        let post = |lines: &str| format!("POST / HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n");
        check(&post("content-length: 3"), Ok(()));
        check(&post("x: content-length: 3\r\ncontent-length: 3"), Ok(()));
        check(&post("transfer-encoding: chunked"), Ok(()));
        check(&post("Content-Length: 3\r\nTransfer-Encoding: chunked"), Err(Ambiguous::LengthAndChunks));
        check(&post("transfer-encoding: chunked\r\ncontent-length: 3"), Err(Ambiguous::LengthAndChunks));
        check(&post("content-length: 3\r\nCONTENT-LENGTH: 3"), Err(Ambiguous::TwoLengths));
        check("\r\n\nPOST / HTTP/1.1\ncontent-length: 3\ncontent-length: 3\n\n", Err(Ambiguous::TwoLengths));
        // in a body it means nothing
        check(&(post("content-length: 40") + "\r\ncontent-length: 3\r\ncontent-length: 3\r\n"), Ok(()));
    }

    #[test]
    fn a_head_is_waited_for_until_its_request_is_taken() {
        let raw = RawHead::default();
        assert_eq!(raw.waiting(), 0);
        raw.on_read(b"GET / HT");
        assert_eq!(raw.waiting(), 8);
        raw.on_read(b"TP/1.1\r\n\r\n");
        assert_eq!(raw.take(&Method::GET, false), Ok(()));
        assert_eq!(raw.waiting(), 0);
        raw.on_read(b"\r\n");
        assert_eq!(raw.waiting(), 0);
        raw.on_read(b"G");
        assert_eq!(raw.waiting(), 3);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_in_any_pieces_are_looked_over_the_same(
            bytes in proptest::collection::vec(
                proptest::sample::select(b"POST content-length:transfer-encoding:\r\n\0".to_vec()),
                0..400,
            ),
            cut in 0_usize..400,
        ) {
            let (whole, parts) = (RawHead::default(), RawHead::default());
            whole.on_read(&bytes);
            let (a, b) = bytes.split_at(cut.min(bytes.len()));
            parts.on_read(a);
            parts.on_read(b);
            proptest::prop_assert_eq!(whole.waiting(), parts.waiting());
            proptest::prop_assert_eq!(whole.take(&Method::POST, true), parts.take(&Method::POST, true));
        }
    }
}
