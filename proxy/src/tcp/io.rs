//! One byte stream of any kind we serve: plain TCP, a Unix socket, TLS over either, with first bytes put back.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;

/// A stream that bytes are relayed from and to.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// The TCP connection, when what is read from it next and written to it is what this stream is.
    fn as_plain(&self) -> Option<&TcpStream> {
        None
    }
}

/// The socket below a stream, with bytes that were read ahead to look at them.
#[derive(Debug)]
pub struct Socket {
    ahead: Bytes,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// A TCP connection.
    #[must_use]
    pub fn tcp(stream: TcpStream) -> Self {
        Self { ahead: Bytes::new(), kind: Kind::Tcp(stream) }
    }

    /// A Unix connection.
    #[must_use]
    pub fn unix(stream: UnixStream) -> Self {
        Self { ahead: Bytes::new(), kind: Kind::Unix(stream) }
    }

    /// Puts back bytes that were read ahead; they are read again first.
    pub fn put_back(&mut self, bytes: Bytes) {
        self.ahead = bytes;
    }

    /// The TCP stream, when it is one.
    #[must_use]
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &self.kind {
            Kind::Tcp(stream) => Some(stream),
            Kind::Unix(_) => None,
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ahead.is_empty() {
            let n = this.ahead.len().min(buf.remaining());
            buf.put_slice(&this.ahead.split_to(n));
            return Poll::Ready(Ok(()));
        }
        match &mut this.kind {
            Kind::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Kind::Unix(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().kind {
            Kind::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Kind::Unix(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // sockets keep nothing back
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().kind {
            Kind::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Kind::Unix(s) => Pin::new(s).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().kind {
            Kind::Tcp(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Kind::Unix(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

/// A stream as the protocols above see it.
#[derive(Debug)]
pub enum Io {
    /// Bytes as they are.
    Plain(Socket),
    /// Bytes under TLS.
    Tls(Box<TlsStream<Socket>>),
    /// A stream whose first bytes an HTTP codec has already read.
    Resumed(Box<Resumed>),
}

/// A stream and the bytes that come before what it will read.
#[derive(Debug)]
pub struct Resumed {
    ahead: Bytes,
    io: Io,
}

impl Io {
    /// Our own address of it, when it goes over TCP.
    #[must_use]
    pub fn local_addr(&self) -> Option<std::net::SocketAddr> {
        match self {
            Self::Plain(s) => s.as_tcp()?.local_addr().ok(),
            Self::Tls(s) => s.get_ref().0.as_tcp()?.local_addr().ok(),
            Self::Resumed(r) => r.io.local_addr(),
        }
    }

    /// Lets a TCP connection end with a reset when it is dropped, so that nobody takes that for an end in order.
    pub fn break_off(&self) {
        let socket = match self {
            Self::Plain(s) => s.as_tcp(),
            Self::Tls(s) => s.get_ref().0.as_tcp(),
            Self::Resumed(r) => return r.io.break_off(),
        };
        if let Some(Err(error)) = socket.map(TcpStream::set_zero_linger) {
            tracing::debug!(%error, "a connection ends in order in place of a reset");
        }
    }

    /// This stream, reading `ahead` first.
    #[must_use]
    pub fn resumed(self, ahead: Bytes) -> Self {
        if ahead.is_empty() { self } else { Self::Resumed(Box::new(Resumed { ahead, io: self })) }
    }
}

impl Stream for Io {
    fn as_plain(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(socket) if socket.ahead.is_empty() => socket.as_tcp(),
            Self::Plain(_) | Self::Tls(_) => None,
            Self::Resumed(r) if r.ahead.is_empty() => r.io.as_plain(),
            Self::Resumed(_) => None,
        }
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_read(cx, buf),
            Self::Resumed(r) if r.ahead.is_empty() => Pin::new(&mut r.io).poll_read(cx, buf),
            Self::Resumed(r) => {
                let n = r.ahead.len().min(buf.remaining());
                buf.put_slice(r.ahead.get(..n).unwrap_or_default());
                r.ahead.advance(n);
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_write(cx, buf),
            Self::Resumed(r) => Pin::new(&mut r.io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_flush(cx),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_flush(cx),
            Self::Resumed(r) => Pin::new(&mut r.io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_shutdown(cx),
            Self::Resumed(r) => Pin::new(&mut r.io).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_write_vectored(cx, bufs),
            Self::Resumed(r) => Pin::new(&mut r.io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}
