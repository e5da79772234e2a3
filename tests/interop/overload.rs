//! Too much: our proxy and a stock Envoy, from the same file, shed the same and serve the same.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::http::{self, Answer};
use tests::program::{self, Program};
use tests::workload::free_port;
use tests::{PATIENCE, eventually, peers};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::alone::socket;

/// Who is not accepted hears nothing for so long.
const QUIET: Duration = Duration::from_millis(300);

/// A proxy that answers everything with 200, and its access log.
struct Seat {
    address: SocketAddr,
    log: std::path::PathBuf,
    program: Program,
}

impl Seat {
    fn start(
        program: &Path,
        folder: &Path,
        (name, args): (&str, &[&str]),
        limits: &str,
    ) -> anyhow::Result<Self> {
        let at = || anyhow::Ok(SocketAddr::from(([127, 0, 0, 1], free_port()?)));
        let (address, admin) = (at()?, at()?);
        let (file, log) = (folder.join(format!("{name}.yaml")), folder.join(format!("{name}-access.log")));
        std::fs::write(&file, bootstrap(address, admin, &log, limits))?;
        let mut all: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        all.push(file.display().to_string());
        Ok(Self { address, log, program: Program::start(program, folder, name, &all)? })
    }

    /// Waits until a request is answered with this status; `None`: until none is.
    async fn answers(&self, status: Option<u16>) -> anyhow::Result<()> {
        eventually(PATIENCE, "the proxy does as its limits say", || async {
            let asked = http::get(self.address, "a", "/", &[]);
            let answer = tokio::time::timeout(QUIET, asked).await.ok().and_then(Result::ok);
            let answer = answer.map(|a| a.status.as_u16());
            ensure!(answer == status, "{answer:?} instead of {status:?}: {}", self.program.output());
            Ok(())
        })
        .await
    }

    /// The line of the access log for a path.
    async fn logged(&self, path: &str) -> anyhow::Result<String> {
        eventually(PATIENCE, "the request is logged", || async {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            log.lines().find(|l| l.starts_with(path)).map(str::to_owned).context(log.clone())
        })
        .await
    }
}

fn bootstrap(address: SocketAddr, admin: SocketAddr, log: &Path, limits: &str) -> String {
    format!(
        r#"
admin: {{address: {}}}
static_resources:
  listeners:
  - name: in
    address: {}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          server_header_transformation: PASS_THROUGH
          access_log:
          - name: file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {}
              log_format: {{text_format_source: {{inline_string: "%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %ROUTE_NAME%\n"}}}}
          route_config: {{name: in, virtual_hosts: [{{name: v, domains: ["*"], routes: [{{name: all, match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: served}}}}}}]}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
{limits}"#,
        socket(admin),
        socket(address),
        log.display(),
    )
}

/// An overload manager in which memory is all in use from the start, and carries out one action then.
fn saturated(action: &str) -> String {
    format!(
        r#"
overload_manager:
  refresh_interval: 0.05s
  resource_monitors:
  - name: envoy.resource_monitors.fixed_heap
    typed_config: {{"@type": type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig, max_heap_size_bytes: 1000}}
  actions:
  - name: envoy.overload_actions.{action}
    triggers: [{{name: envoy.resource_monitors.fixed_heap, threshold: {{value: 0.95}}}}]
"#
    )
}

/// What an answer is, without the time of it.
fn shown(answer: &Answer) -> Vec<String> {
    let mut lines = vec![answer.status.to_string(), answer.text()];
    let headers = answer.headers.iter().filter(|(name, _)| *name != "date");
    let mut headers: Vec<_> =
        headers.map(|(n, v)| format!("{n}: {}", String::from_utf8_lossy(v.as_bytes()))).collect();
    headers.sort();
    lines.extend(headers);
    lines
}

/// Requests of each kind, and what is logged of them.
async fn asked(seat: &Seat) -> anyhow::Result<Vec<String>> {
    let mut lines = shown(&http::get(seat.address, "a", "/http1", &[]).await?);
    let uri = format!("http://{}/http2", seat.address);
    let request = ::http::Request::get(uri).body(http_body_util::Full::default())?;
    lines.extend(shown(&http::send_http2(seat.address, request).await?));
    lines.extend(shown(
        &http::get(seat.address, "a", "/grpc", &[("content-type", "application/grpc")]).await?,
    ));
    for path in ["/http1", "/http2", "/grpc"] {
        lines.push(seat.logged(path).await?);
    }
    Ok(lines)
}

async fn stops_requests(seat: &Seat) -> anyhow::Result<Vec<String>> {
    seat.answers(Some(503)).await?;
    asked(seat).await
}

async fn ends_connections(seat: &Seat) -> anyhow::Result<Vec<String>> {
    eventually(PATIENCE, "a connection is to end", || async {
        let answer = http::get(seat.address, "a", "/", &[]).await?;
        ensure!(answer.header("connection") == "close", "{answer:?}");
        Ok(())
    })
    .await?;
    asked(seat).await
}

async fn turns_away(seat: &Seat) -> anyhow::Result<Vec<String>> {
    seat.answers(None).await?;
    Ok(vec![one_more(seat).await])
}

/// Says what becomes of one more connection.
async fn one_more(seat: &Seat) -> String {
    match tokio::time::timeout(QUIET, Open::new(seat.address)).await {
        Ok(Ok(_)) => "served".to_owned(),
        Ok(Err(_)) => "turned away".to_owned(),
        Err(_) => "silent".to_owned(),
    }
}

/// Two connections are let in; what is not let in after them is let in when one of them has ended.
async fn two_at_once(seat: &Seat) -> anyhow::Result<Vec<String>> {
    seat.answers(Some(200)).await?;
    let mut open = Vec::new();
    while open.len() < 2 {
        // Of the ones before, the last may count still.
        open.push(eventually(PATIENCE, "a connection is let in", || Open::new(seat.address)).await?);
    }
    let mut lines = vec![one_more(seat).await, one_more(seat).await];
    for connection in &mut open {
        connection.ask().await.context("a connection that was let in")?;
    }
    open.pop();
    drop(eventually(PATIENCE, "another one is let in", || Open::new(seat.address)).await?);
    lines.push("another one is let in".to_owned());
    Ok(lines)
}

/// A connection that was served.
struct Open(TcpStream);

impl Open {
    async fn new(address: SocketAddr) -> anyhow::Result<Self> {
        let mut open = Self(TcpStream::connect(address).await?);
        open.ask().await?;
        Ok(open)
    }

    async fn ask(&mut self) -> anyhow::Result<()> {
        self.0.write_all(b"GET /open HTTP/1.1\r\nhost: a\r\n\r\n").await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"served") {
            answer.push(self.0.read_u8().await?);
        }
        Ok(())
    }
}

// On one thread: hyper's client loses an answer over HTTP/2 when another thread reads a GOAWAY just after the request went.
#[tokio::test]
async fn what_is_too_much_is_shed_as_envoy_sheds_it_and_what_is_open_goes_on() -> anyhow::Result<()> {
    let of_listener = "layered_runtime: {layers: [{name: a, static_layer: {envoy.resource_limits.listener.in.connection_limit: 2}}]}";
    let of_all = "layered_runtime: {layers: [{name: a, static_layer: {overload: {global_downstream_max_connections: 2}}}]}";
    let monitor = r#"
overload_manager:
  resource_monitors:
  - name: envoy.resource_monitors.global_downstream_max_connections
    typed_config: {"@type": type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig, max_active_downstream_connections: 2}
"#;
    let folder = tempfile::Builder::new().prefix("overload-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let ours = program::ours("istio-proxy")?;
    let theirs = peers::find("envoy/envoy")?;
    let scenarios = [
        ("requests", saturated("stop_accepting_requests")),
        ("keepalive", saturated("disable_http_keepalive")),
        ("reject", saturated("reject_incoming_connections")),
        ("stop", saturated("stop_accepting_connections")),
        ("shrink", saturated("shrink_heap")),
        ("of-listener", of_listener.to_owned()),
        ("of-all", of_all.to_owned()),
        ("monitor", monitor.to_owned()),
    ];
    let mut differences = Vec::new();
    for (name, limits) in &scenarios {
        let mut both = Vec::new();
        for (who, program, args) in [
            ("ours", &ours, ["--concurrency", "2", "--bootstrap"].as_slice()),
            ("theirs", &theirs, &["--disable-hot-restart", "--concurrency", "2", "-l", "warning", "-c"]),
        ] {
            let seat = Seat::start(program, folder.path(), (&format!("{name}-{who}"), args), limits)?;
            let seen = match *name {
                "requests" => stops_requests(&seat).await,
                "keepalive" => ends_connections(&seat).await,
                "reject" | "stop" => turns_away(&seat).await,
                "shrink" => {
                    seat.answers(Some(200)).await?;
                    asked(&seat).await
                }
                _ => two_at_once(&seat).await,
            };
            both.push(seen.with_context(|| format!("{name}: {who}"))?);
        }
        if both.first() != both.last() {
            differences.push(format!("{name}: {both:#?}"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}
