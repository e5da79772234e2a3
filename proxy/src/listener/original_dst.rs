//! Where a redirected connection wanted to go.

use std::net::SocketAddr;

use tokio::net::TcpStream;

/// The original destination of a connection that a packet filter redirected here; `None` when it was not.
#[must_use]
pub fn of(stream: &TcpStream) -> Option<SocketAddr> {
    let socket = socket2::SockRef::from(stream);
    let v4 = socket.original_dst_v4().ok().and_then(|a| a.as_socket());
    v4.or_else(|| socket.original_dst_v6().ok().and_then(|a| a.as_socket()))
}
