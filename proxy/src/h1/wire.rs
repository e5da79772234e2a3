//! A connection that HTTP/1 goes over: what was read of it and not used yet, and what waits to be written to it.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::tcp::io::Io;

/// A read of a body takes at least this much, in bytes; reads that are filled make the next one larger.
const FIRST_READ: usize = 16 * 1024;
/// The most that one read takes.
const LARGEST_READ: usize = 128 * 1024;
/// Pieces up to this length are copied behind what waits already; longer ones are written from where they are.
const COPIED: usize = 4 * 1024;
/// With so much waiting nothing more is put into an outbox.
const ENOUGH: usize = 16 * 1024;
/// Room for written bytes that a connection keeps between two messages.
const KEPT: usize = 2 * 1024;

thread_local! {
    /// Where the first bytes of a message are read: most messages are short, and a connection that waits for one needs
    /// no room of its own.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; FIRST_READ].into_boxed_slice());
}

/// A connection and its two buffers.
#[derive(Debug)]
pub struct Wire {
    io: Io,
    /// What was read and not used.
    pub inbox: BytesMut,
    /// How much the next read may take.
    room: usize,
    /// The other side has ended.
    pub ended: bool,
    /// What waits to be written.
    pub outbox: Outbox,
    /// Something was written; whoever wants to know sets it back.
    pub sent: bool,
}

/// What waits to be written: bytes of our own, a piece of a body, and what follows it.
#[derive(Debug, Default)]
pub struct Outbox {
    head: Vec<u8>,
    written: usize,
    data: Bytes,
    tail: &'static [u8],
}

impl Outbox {
    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.written == self.head.len() && self.data.is_empty() && self.tail.is_empty()
    }

    /// Whether another piece may be put in.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.data.is_empty() && self.tail.is_empty() && self.head.len() - self.written < ENOUGH
    }

    /// Where bytes of our own go, behind what waits; only where there is room.
    pub fn head(&mut self) -> &mut Vec<u8> {
        if self.written == self.head.len() {
            self.head.clear();
            self.written = 0;
        }
        &mut self.head
    }

    /// Puts a piece behind what waits, and a few bytes after it; only where there is room.
    pub fn put(&mut self, data: Bytes, tail: &'static [u8]) {
        if data.len() <= COPIED {
            let head = self.head();
            head.extend_from_slice(&data);
            head.extend_from_slice(tail);
        } else {
            (self.data, self.tail) = (data, tail);
        }
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
}

impl Wire {
    /// A connection on which nothing was read or written.
    #[must_use]
    pub fn new(io: Io) -> Self {
        Self {
            io,
            inbox: BytesMut::new(),
            room: FIRST_READ,
            ended: false,
            outbox: Outbox::default(),
            sent: false,
        }
    }

    /// Reads once; at the end of the stream notes it.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let n = ready!(if self.inbox.is_empty() && self.room == FIRST_READ {
            self.poll_read_first(cx)
        } else {
            self.inbox.reserve(self.room);
            poll_read_buf(Pin::new(&mut self.io), cx, &mut self.inbox)
        })?;
        self.ended = n == 0;
        self.room = if n >= self.room { (self.room * 2).min(LARGEST_READ) } else { n.max(FIRST_READ) };
        Poll::Ready(Ok(()))
    }

    /// Reads into no more room than what came takes.
    fn poll_read_first(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buf = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut buf))?;
            self.inbox = BytesMut::from(buf.filled());
            Poll::Ready(Ok(buf.filled().len()))
        })
    }

    /// Writes what waits; ready when all is written.
    pub fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, outbox, .. } = self;
        while !outbox.is_empty() {
            let head = outbox.head.get(outbox.written..).unwrap_or_default();
            let n = ready!(if outbox.data.is_empty() && outbox.tail.is_empty() {
                Pin::new(&mut *io).poll_write(cx, head)
            } else {
                let slices = [IoSlice::new(head), IoSlice::new(&outbox.data), IoSlice::new(outbox.tail)];
                Pin::new(&mut *io).poll_write_vectored(cx, &slices)
            })?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent = true;
            outbox.advance(n);
        }
        Pin::new(io).poll_flush(cx)
    }

    /// Gives back what only long messages need, between two of them.
    pub fn settle(&mut self) {
        if self.inbox.is_empty() {
            (self.inbox, self.room) = (BytesMut::new(), FIRST_READ);
        }
        if self.outbox.is_empty() && self.outbox.head.capacity() > KEPT {
            self.outbox = Outbox::default();
        }
    }

    /// Tells the other side that nothing more comes.
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    /// Lets the connection end so that nobody takes that for an end in order.
    pub fn break_off(&self) {
        self.io.break_off();
    }

    /// The stream below, which reads first what was not used.
    #[must_use]
    pub fn into_io(self) -> Io {
        self.io.resumed(self.inbox.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(outbox: &Outbox) -> Vec<u8> {
        [&outbox.head[outbox.written..], &outbox.data, outbox.tail].concat()
    }

    #[test]
    fn short_pieces_wait_together_and_a_long_one_waits_alone() {
        let mut outbox = Outbox::default();
        outbox.head().extend_from_slice(b"head ");
        outbox.put(Bytes::from_static(b"piece"), b"\r\n");
        assert!(outbox.has_room() && outbox.data.is_empty());
        outbox.put(Bytes::from(vec![b'x'; COPIED + 1]), b"end");
        assert!(!outbox.has_room());
        let all = waiting(&outbox);
        assert!(all.starts_with(b"head piece\r\nxxx") && all.ends_with(b"xxxend"));
        for step in [1, 20, COPIED - 10] {
            let left = waiting(&outbox);
            outbox.advance(step);
            assert_eq!(waiting(&outbox), left[step..]);
        }
        outbox.advance(waiting(&outbox).len());
        assert!(outbox.is_empty() && outbox.has_room());
        assert!(outbox.head().is_empty());
    }

    #[test]
    fn an_outbox_with_enough_takes_no_more() {
        let mut outbox = Outbox::default();
        let mut pieces = 0;
        while outbox.has_room() {
            outbox.put(Bytes::from(vec![0; COPIED]), b"");
            pieces += 1;
        }
        assert_eq!(pieces, ENOUGH / COPIED);
    }
}
