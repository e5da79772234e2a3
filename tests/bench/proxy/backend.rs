//! The servers behind the proxies: they do as little as a server can.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

/// How long bodies and messages are, in bytes.
pub(crate) const LENGTH: usize = 1024;

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaks {
    Http1,
    /// HTTP/2, and gRPC where it is asked for.
    Http2,
    /// Every byte comes back.
    Bytes,
}

/// Starts a server, which runs for as long as this process.
pub(crate) async fn start(speaks: Speaks, tasks: &TaskTracker) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let each = tasks.clone();
    tasks.spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap_or_default();
            let tasks = each.clone();
            each.spawn_local(async move {
                // a connection that breaks off is told by the client's count
                match speaks {
                    Speaks::Http1 => http1(stream).await.unwrap_or_default(),
                    Speaks::Http2 => drop(http2(stream, &tasks).await),
                    Speaks::Bytes => echo(stream).await.unwrap_or_default(),
                }
            });
        }
    });
    Ok(address)
}

async fn http1(mut stream: TcpStream) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {LENGTH}\r\n\r\n");
    let answer = [head.as_bytes(), &[b'x'; LENGTH]].concat();
    let mut asked = Vec::new();
    while stream.read_buf(&mut asked).await? > 0 {
        // requests have no bodies, and the next comes behind the answer
        if asked.ends_with(b"\r\n\r\n") {
            asked.clear();
            stream.write_all(&answer).await?;
        }
    }
    Ok(())
}

async fn http2(stream: TcpStream, tasks: &TaskTracker) -> Result<(), h2::Error> {
    let mut builder = h2::server::Builder::new();
    builder.initial_connection_window_size(1 << 24).max_concurrent_streams(1000);
    let mut connection = builder.handshake::<_, Bytes>(stream).await?;
    while let Some(asked) = connection.accept().await {
        let (request, respond) = asked?;
        tasks.spawn_local(async move {
            // a stream that breaks off is told by the client, too
            answer(request, respond).await.unwrap_or_default();
        });
    }
    Ok(())
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<(), h2::Error> {
    let grpc = request.headers().get("content-type").is_some_and(|kind| kind == "application/grpc");
    let kind = if grpc { "application/grpc" } else { "text/plain" };
    // who answers before everything has come resets the stream
    let mut asked = request.into_body();
    while let Some(piece) = asked.data().await {
        asked.flow_control().release_capacity(piece?.len())?;
    }
    let mut response = Response::new(());
    response.headers_mut().insert("content-type", HeaderValue::from_static(kind));
    let mut stream = respond.send_response(response, false)?;
    if !grpc {
        return stream.send_data(Bytes::from_static(&[b'x'; LENGTH]), true);
    }
    stream.send_data(message(), false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    stream.send_trailers(trailers)
}

/// A gRPC message in its frame.
pub(crate) fn message() -> Bytes {
    let length = u32::try_from(LENGTH).unwrap_or_default().to_be_bytes();
    [&[0], length.as_slice(), &[b'x'; LENGTH]].concat().into()
}

async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await.map(drop)
}
