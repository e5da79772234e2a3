//! A proxy that another one follows, or that ends, while requests come at a rate and streams stay open.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ::http::{Request, Version};
use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::signal::Signal;
use tests::echo::Echo;
use tests::fleet::{Fleet, Speaks};
use tests::paced::{Connected, Counts, Paced, Plan};
use tests::program::{Program, ours};
use tests::workload::free_port;
use tests::{PATIENCE, eventually, http};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Requests a second.
const RATE: f64 = 2000.0;
/// Between two messages on a stream that stays open.
const BEAT: Duration = Duration::from_millis(20);
/// Open streams may take so long to end, in seconds.
const DRAIN: &str = "60";

/// The seconds of load around each step, a few unless `UPGRADE_SECONDS` says another number.
#[expect(clippy::disallowed_methods, reason = "how long a test runs is said by its environment")]
fn seconds() -> u64 {
    std::env::var("UPGRADE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

/// A place for proxies, one after the other, in front of endpoints of both protocols.
struct Seat {
    folder: tempfile::TempDir,
    listener: SocketAddr,
    admin: SocketAddr,
    bootstrap: PathBuf,
    _fleet: Fleet,
    _echo: Echo,
    started: usize,
}

impl Seat {
    async fn new() -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("upgrade-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let at = || anyhow::Ok(SocketAddr::from(([127, 0, 0, 1], free_port()?)));
        let (listener, admin) = (at()?, at()?);
        let (fleet, echo) = (Fleet::start().await?, Echo::start("echo").await?);
        let clusters = [
            ("http1", fleet.add(Speaks::Http1), "http_protocol_options: {}"),
            ("http2", fleet.add(Speaks::Http2), "http2_protocol_options: {}"),
            ("echo", echo.address, "http_protocol_options: {}"),
            ("grpc", echo.address, "http2_protocol_options: {}"),
        ];
        let bootstrap = folder.path().join("bootstrap.yaml");
        std::fs::write(&bootstrap, configuration(listener, admin, &clusters))?;
        Ok(Self { folder, listener, admin, bootstrap, _fleet: fleet, _echo: echo, started: 0 })
    }

    /// Starts a proxy that takes over from whoever serves, and waits until it is the one that serves.
    async fn start(&mut self) -> anyhow::Result<Program> {
        self.started += 1;
        let name = format!("proxy-{}", self.started);
        let door = self.folder.path().join("handover");
        let args = [
            "--bootstrap",
            &self.bootstrap.display().to_string(),
            "--concurrency",
            "2",
            "--drain-time-s",
            DRAIN,
            "--handover",
            &door.display().to_string(),
        ];
        let program =
            Program::start(&ours("istio-proxy")?, self.folder.path(), &name, &args.map(str::to_owned))?;
        eventually(PATIENCE, "the new process serves", || async {
            let log = program.output();
            ensure!(log.contains("another process may take over"), "{log}");
            ensure!(http::get(self.admin, "proxy", "/ready", &[]).await?.status == 200, "{log}");
            Ok(())
        })
        .await?;
        Ok(program)
    }

    fn load(&self, counts: &Arc<Counts>, may_be_refused: bool) -> Paced {
        let mut connections = vec![Connected::Http1 { requests: u64::MAX }; 12];
        connections.extend([Connected::Http1 { requests: 5 }; 8]);
        connections.extend([Connected::Http2 { lanes: 6, requests: u64::MAX }; 3]);
        connections.extend([Connected::Http2 { lanes: 2, requests: 50 }; 2]);
        let paths = ["/http1/".to_owned(), "/http2/".to_owned()].into();
        let plan = Plan { address: self.listener, paths, connections, rate: RATE, may_be_refused };
        Paced::start(&plan, Arc::clone(counts))
    }
}

/// Waits until so many more requests were answered.
async fn more(counts: &Counts, answers: u64) -> anyhow::Result<()> {
    let wanted = counts.seen().good + answers;
    eventually(PATIENCE * 60, "requests are answered", || async {
        let seen = counts.seen();
        ensure!(seen.good >= wanted || seen.failed > 0, "{} of {wanted}", seen.good);
        Ok(())
    })
    .await
}

/// Fails when a request did.
fn all_good(counts: &Counts) -> anyhow::Result<()> {
    let seen = counts.seen();
    ensure!(seen.failed == 0, "{} of {} failed: {:#?}", seen.failed, seen.good, counts.words());
    Ok(())
}

fn configuration(listener: SocketAddr, admin: SocketAddr, clusters: &[(&str, SocketAddr, &str)]) -> String {
    let socket =
        |at: SocketAddr| format!("{{socket_address: {{address: {}, port_value: {}}}}}", at.ip(), at.port());
    let route = |(name, _, _): &(&str, SocketAddr, &str)| {
        format!("{{match: {{prefix: /{name}/}}, route: {{cluster: {name}, timeout: 0s}}}}")
    };
    let cluster = |(name, at, protocol): &(&str, SocketAddr, &str)| {
        format!(
            r"
  - name: {name}
    type: STATIC
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{{protocol}}}
    load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {}}}}}]}}]}}",
            socket(*at)
        )
    };
    let routes: Vec<String> = clusters.iter().map(route).collect();
    let clusters: String = clusters.iter().map(cluster).collect();
    format!(
        r"
admin: {{address: {}}}
static_resources:
  listeners:
  - name: in
    address: {}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          upgrade_configs: [{{upgrade_type: websocket}}]
          route_config: {{name: in, virtual_hosts: [{{name: v, domains: ['*'], routes: [{}]}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:{clusters}
",
        socket(admin),
        socket(listener),
        routes.join(", ")
    )
}

/// A WebSocket and a gRPC stream that stay open, with a message on each now and then, until they are told to end.
struct Streams {
    end: CancellationToken,
    tasks: TaskTracker,
    outcome: mpsc::Receiver<anyhow::Result<u64>>,
    beats: tokio::sync::watch::Receiver<u64>,
}

impl Streams {
    fn open(address: SocketAddr) -> Self {
        let (end, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (told, outcome) = mpsc::channel(2);
        let (beat, beats) = tokio::sync::watch::channel(0);
        let (stop, tell) = (end.clone(), told.clone());
        tasks.spawn(async move {
            let outcome = websocket(address, &stop, &beat).await.context("the WebSocket");
            tell.send(outcome).await.unwrap_or_default();
        });
        let stop = end.clone();
        tasks.spawn(async move {
            let outcome = grpc(address, &stop).await.context("the gRPC stream");
            told.send(outcome).await.unwrap_or_default();
        });
        tasks.close();
        Self { end, tasks, outcome, beats }
    }

    /// Waits until so many more messages have come back.
    async fn more(&mut self, messages: u64) -> anyhow::Result<()> {
        let wanted = *self.beats.borrow() + messages;
        let beats = self.beats.wait_for(|beats| *beats >= wanted);
        match tokio::time::timeout(PATIENCE, beats).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(self.outcome.recv().await.and_then(Result::err).unwrap_or(anyhow::anyhow!("silent"))),
        }
    }

    /// Ends them as they should end.
    async fn finish(mut self) -> anyhow::Result<()> {
        self.end.cancel();
        self.tasks.wait().await;
        for _ in 0..2 {
            let messages = self.outcome.recv().await.context("a stream was lost")??;
            ensure!(messages > 0, "nothing came back");
        }
        Ok(())
    }
}

/// Sends messages over a WebSocket, each of which comes back, until `end`; then the server's end is waited for.
async fn websocket(
    address: SocketAddr,
    end: &CancellationToken,
    beat: &tokio::sync::watch::Sender<u64>,
) -> anyhow::Result<u64> {
    let mut stream = TcpStream::connect(address).await?;
    let head = "GET /echo/chat HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.context("no answer")?);
    }
    ensure!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
    let mut beats = tokio::time::interval(BEAT);
    let mut messages = 0_u64;
    while end.run_until_cancelled(beats.tick()).await.is_some() {
        let message = messages.to_be_bytes();
        stream.write_all(&message).await.with_context(|| format!("message {messages}"))?;
        let mut back = [0; 8];
        stream.read_exact(&mut back).await.with_context(|| format!("answer {messages}"))?;
        ensure!(back == message, "{back:?} came back for {message:?}");
        messages += 1;
        beat.send_replace(messages);
    }
    stream.shutdown().await?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.context("the end")?;
    ensure!(rest.is_empty(), "{rest:?}");
    Ok(messages)
}

/// Sends messages in one call over HTTP/2 until `end`; all of it comes back with the status in the trailers.
async fn grpc(address: SocketAddr, end: &CancellationToken) -> anyhow::Result<u64> {
    let io = TokioIo::new(TcpStream::connect(address).await?);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
    let ticks = tokio_stream::wrappers::IntervalStream::new(tokio::time::interval(BEAT));
    let messages = ticks.take_until(end.clone().cancelled_owned());
    let frames =
        messages.map(|_| Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from_static(&[7; 8]))));
    let request = Request::post(format!("http://{address}/grpc/echo.Echo/0"))
        .version(Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(frames).boxed_unsync())?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        ensure!(response.status() == 200, "{response:?}");
        let body = response.into_body().collect().await?;
        let status = body.trailers().and_then(|t| t.get("grpc-status")).cloned();
        ensure!(status.as_ref().is_some_and(|s| s == "0"), "{status:?}");
        Ok(body.to_bytes().len() as u64 / 8)
    };
    // The connection takes no more requests when it is told to end; this one is not over then.
    http::driven(connection, exchange).await
}

/// The proxy at its end, after streams of before have ended: it wrote no warning.
async fn ends_well(mut program: Program) -> anyhow::Result<()> {
    let status = program.ended().await?;
    let log = program.output();
    ensure!(status.success(), "{status}: {log}");
    ensure!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_one_process_follows_another_and_long_streams_end_on_the_old_one()
-> anyhow::Result<()> {
    let mut seat = Seat::new().await?;
    let mut current = seat.start().await?;
    let counts = Arc::new(Counts::default());
    let load = seat.load(&counts, false);
    let between = 2000 * seconds();
    for _ in 0..3 {
        let mut streams = Streams::open(seat.listener);
        streams.more(5).await?;
        more(&counts, between).await?;
        let mut old = std::mem::replace(&mut current, seat.start().await?);
        more(&counts, between).await?;
        old.check().context("the old process has streams to serve")?;
        streams.more(10).await?;
        all_good(&counts)?;
        streams.finish().await?;
        ends_well(old).await?;
    }
    let seen = load.stop().await;
    all_good(&counts)?;
    ensure!(seen.closings > 0, "no connection was told to end");
    println!(
        "{} requests over {} connections, none failed, p99 {:?}",
        seen.good,
        seen.connections,
        seen.percentile(0.99)
    );
    current.signal(Signal::SIGTERM)?;
    ends_well(current).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_leaves_before_it_serves_changes_nothing() -> anyhow::Result<()> {
    let mut seat = Seat::new().await?;
    let current = seat.start().await?;
    let counts = Arc::new(Counts::default());
    let load = seat.load(&counts, false);
    more(&counts, 500).await?;
    let door = seat.folder.path().join("handover");
    drop(tokio::net::UnixStream::connect(&door).await?);
    more(&counts, 500).await?;
    // Another one is given the sockets, and serves.
    let next = seat.start().await?;
    let left = "nobody took over; this process goes on";
    ensure!(current.output().contains(left), "{}", current.output());
    more(&counts, 500).await?;
    load.stop().await;
    all_good(&counts)?;
    next.signal(Signal::SIGTERM)?;
    ends_well(next).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_a_proxy_drains_and_long_streams_end() -> anyhow::Result<()> {
    for by_signal in [false, true] {
        let mut seat = Seat::new().await?;
        let proxy = seat.start().await?;
        let counts = Arc::new(Counts::default());
        let load = seat.load(&counts, true);
        let mut streams = Streams::open(seat.listener);
        streams.more(5).await?;
        more(&counts, 2000 * seconds()).await?;
        if by_signal {
            proxy.signal(Signal::SIGTERM)?;
        } else {
            let drained =
                http::send(seat.admin, http::request("POST", "proxy", "/drain_listeners", &[])?).await?;
            ensure!(drained.status == 200, "{drained:?}");
        }
        tokio::time::timeout(PATIENCE, load.refused()).await.context("connections stay open")?;
        streams.more(10).await?;
        let seen = load.stop().await;
        all_good(&counts)?;
        ensure!(seen.closings > 0, "no connection was told to end");
        streams.finish().await?;
        if !by_signal {
            proxy.signal(Signal::SIGTERM)?;
        }
        ends_well(proxy).await?;
        println!("{} requests, none failed, {} connections were told to end", seen.good, seen.closings);
    }
    Ok(())
}
