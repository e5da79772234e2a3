//! Bytes from one socket to another without a copy: by way of a pipe, which the kernel only writes down in (splice(2)).
//!
//! A pipe is two descriptors and two more system calls to make, so it pays for a stream that is full for a while.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Bytes that a pipe may hold.
const SIZE: usize = 256 * 1024;
/// Empty pipes that a thread keeps.
const KEPT: usize = 8;

thread_local! {
    static SPARE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe on the way from one socket to another.
#[derive(Debug)]
pub struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

impl Pipe {
    /// An empty pipe; `None` when there is none to be had.
    #[must_use]
    pub fn get() -> Option<Self> {
        if let Some(spare) = SPARE.with_borrow_mut(Vec::pop) {
            return Some(spare);
        }
        let (out, into) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).ok()?;
        if let Err(error) = fcntl_setpipe_size(&into, SIZE) {
            tracing::debug!(%error, "a pipe stays as small as pipes are");
        }
        Some(Self { out, into })
    }

    /// Gives an empty pipe back.
    pub fn put_back(self) {
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < KEPT {
                spare.push(self);
            }
        });
    }

    /// Takes in what a socket has; the pipe must be empty.
    ///
    /// # Errors
    ///
    /// Those of reading; [`cannot_splice`] tells whether it is only that splicing is not possible here.
    pub fn poll_fill(&self, cx: &mut Context<'_>, from: &TcpStream) -> Poll<io::Result<usize>> {
        loop {
            ready!(from.poll_read_ready(cx))?;
            let step = || Ok(splice(from, None, &self.into, None, SIZE, flags())?);
            match from.try_io(Interest::READABLE, step) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    /// Hands up to `n` bytes on to a socket.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn poll_drain(&self, cx: &mut Context<'_>, to: &TcpStream, n: usize) -> Poll<io::Result<usize>> {
        loop {
            ready!(to.poll_write_ready(cx))?;
            let step = || Ok(splice(&self.out, None, to, None, n, flags())?);
            match to.try_io(Interest::WRITABLE, step) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

/// Whether an error says that these descriptors cannot be spliced, or that nothing may be here; no byte was moved then.
#[must_use]
pub fn cannot_splice(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported | ErrorKind::PermissionDenied)
}
