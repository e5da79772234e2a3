//! Clients that ask again as soon as they are answered.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use http::{Request, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::backend::{LENGTH, message};

/// Connections of HTTP/1 and of bytes.
const CONNECTIONS: usize = 64;
/// Connections of HTTP/2, and requests at once on each.
const MULTIPLEXED: (usize, usize) = (8, 16);
/// Connections that are made at once.
const MAKERS: usize = 16;

/// What clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asks {
    Http1,
    Http2,
    Grpc,
    /// A kibibyte there and back.
    Bytes,
    /// The same on a new connection each time.
    Connections,
}

/// What is counted.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    pub(crate) is_open: Cell<bool>,
    /// Microseconds that each answer took.
    pub(crate) took: RefCell<Vec<u32>>,
}

impl Meter {
    fn note(&self, began: Instant) {
        if self.is_open.get() {
            let took = u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX);
            self.took.borrow_mut().push(took);
        }
    }
}

/// Asks for ever; ends when something fails.
pub(crate) async fn run(asks: Asks, to: SocketAddr, meter: Rc<Meter>) -> anyhow::Result<()> {
    match asks {
        Asks::Http1 => many(CONNECTIONS, || http1(to, &meter)).await,
        Asks::Http2 => many(MULTIPLEXED.0, || http2(to, false, &meter)).await,
        Asks::Grpc => many(MULTIPLEXED.0, || http2(to, true, &meter)).await,
        Asks::Bytes => many(CONNECTIONS, || bytes(to, u64::MAX, &meter)).await,
        Asks::Connections => {
            many(MAKERS, || async {
                loop {
                    bytes(to, 1, &meter).await?;
                }
            })
            .await
        }
    }
}

async fn many<F: Future<Output = anyhow::Result<()>>>(
    count: usize,
    one: impl Fn() -> F,
) -> anyhow::Result<()> {
    try_join_all((0..count).map(|_| one())).await.map(drop)
}

/// A connection over which one request was answered.
pub(crate) async fn opened(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    get(&mut stream, &mut Vec::new()).await?;
    Ok(stream)
}

async fn get(stream: &mut TcpStream, answer: &mut Vec<u8>) -> anyhow::Result<()> {
    stream
        .write_all(b"GET /bench HTTP/1.1\r\nhost: s.example\r\nuser-agent: bench\r\naccept: */*\r\n\r\n")
        .await?;
    answer.clear();
    loop {
        ensure!(stream.read_buf(answer).await? > 0, "the connection ended");
        let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
        if head.is_some_and(|head| answer.len() >= head + 4 + LENGTH) {
            ensure!(answer.starts_with(b"HTTP/1.1 200"), "{}", answer.escape_ascii());
            return Ok(());
        }
        ensure!(answer.len() < 64 * LENGTH, "no answer: {}", answer.escape_ascii());
    }
}

async fn http1(to: SocketAddr, meter: &Meter) -> anyhow::Result<()> {
    let (mut stream, mut answer) = (opened(to).await?, Vec::new());
    loop {
        let began = Instant::now();
        get(&mut stream, &mut answer).await?;
        meter.note(began);
    }
}

async fn http2(to: SocketAddr, grpc: bool, meter: &Meter) -> anyhow::Result<()> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let mut builder = h2::client::Builder::new();
    builder.initial_connection_window_size(1 << 24).initial_max_send_streams(MULTIPLEXED.1);
    let (sender, connection) = builder.handshake::<_, Bytes>(stream).await?;
    let lanes = many(MULTIPLEXED.1, || async {
        let mut sender = sender.clone().ready().await?;
        loop {
            let began = Instant::now();
            sender = exchange(sender, grpc).await?;
            meter.note(began);
        }
    });
    tokio::select! {
        ended = connection => ended.context("the connection")?,
        ended = lanes => ended?,
    }
    anyhow::bail!("the connection ended")
}

type Sender = h2::client::SendRequest<Bytes>;

async fn exchange(mut sender: Sender, grpc: bool) -> anyhow::Result<Sender> {
    let request = Request::builder().version(Version::HTTP_2).uri("http://s.example/bench");
    let (answer, mut upload) = if grpc {
        let request =
            request.method("POST").header("content-type", "application/grpc").header("te", "trailers");
        sender.send_request(request.body(())?, false)?
    } else {
        sender.send_request(request.body(())?, true)?
    };
    if grpc {
        upload.send_data(message(), true)?;
    }
    let answer = answer.await?;
    ensure!(answer.status() == 200, "{}", answer.status());
    let (mut body, mut length) = (answer.into_body(), 0);
    while let Some(piece) = body.data().await {
        let piece = piece?;
        length += piece.len();
        body.flow_control().release_capacity(piece.len())?;
    }
    ensure!(length >= LENGTH, "{length} bytes");
    if grpc {
        let trailers = body.trailers().await?.context("no trailers")?;
        ensure!(trailers.get("grpc-status").is_some_and(|status| status == "0"), "{trailers:?}");
    }
    Ok(sender.ready().await?)
}

async fn bytes(to: SocketAddr, times: u64, meter: &Meter) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let mut back = [0; LENGTH];
    for time in 0..times {
        // the first one has the time of the connection in it
        let began = if time == 0 { began } else { Instant::now() };
        stream.write_all(&[b'x'; LENGTH]).await?;
        stream.read_exact(&mut back).await?;
        meter.note(began);
    }
    Ok(())
}
