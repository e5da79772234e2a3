//! `istio-proxy`: the proxy alone, for gateways and for any xDS server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use futures::FutureExt as _;
use proxy::supervisor::Inherited;
use proxy::telemetry::{LogLevel, init};
use proxy::{Proxy, bootstrap, handover};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code for a configuration that cannot be used (sysexits: EX_USAGE).
const BAD_CONFIGURATION: u8 = 64;

/// A service mesh proxy that reads Envoy's configuration.
#[derive(Debug, Parser)]
#[command(name = "istio-proxy", version)]
struct Arguments {
    /// Envoy v3 bootstrap file, YAML or JSON.
    #[arg(long, short = 'c', visible_alias = "config-path", value_name = "FILE")]
    bootstrap: PathBuf,
    /// Level of the log, or levels by module: `info,proxy::xds=debug`.
    #[arg(long, short = 'l', default_value = "info", value_name = "LEVEL")]
    log_level: String,
    /// Form of the log.
    #[arg(long, default_value = "text")]
    log_format: LogFormat,
    /// Data workers; 0: one for each core this process may use.
    #[arg(long, default_value_t = 0, value_name = "N")]
    concurrency: usize,
    /// How long open requests may take to end when the proxy ends, in seconds.
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    drain_time_s: u64,
    /// Serve `/stats/prometheus` here for everybody, such as 0.0.0.0:15090.
    #[arg(long, value_name = "ADDRESS")]
    stats_address: Option<SocketAddr>,
    /// Serve `/healthz/ready` here for everybody, such as 0.0.0.0:15021.
    #[arg(long, value_name = "ADDRESS")]
    ready_address: Option<SocketAddr>,
    /// Report Istio's standard metrics also for listeners without a `traffic_direction`: as the server's side where
    /// clients must show a certificate, as the client's elsewhere.
    #[arg(long)]
    standard_metrics: bool,
    /// Take over the listening sockets of the process that waits at this Unix socket, which then drains and ends, and
    /// wait there for the next: an upgrade in place.
    #[arg(long, value_name = "PATH")]
    handover: Option<PathBuf>,
    /// Serve traffic, or only check the bootstrap file.
    #[arg(long, default_value = "serve")]
    mode: Mode,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Serve traffic.
    Serve,
    /// Check the bootstrap file and end.
    Validate,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = match init(&arguments.log_level, matches!(arguments.log_format, LogFormat::Json)) {
        Ok(log) => log,
        Err(_) => return ExitCode::from(BAD_CONFIGURATION),
    };
    let config = match bootstrap::load(&arguments.bootstrap, jiff::Timestamp::now()) {
        Ok(config) => config,
        Err(error) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::error!(file = %arguments.bootstrap.display(), error, "the bootstrap cannot be used");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    if arguments.mode == Mode::Validate {
        tracing::info!(file = %arguments.bootstrap.display(), "the bootstrap can be used");
        return ExitCode::SUCCESS;
    }
    let config = proxy::config::Config {
        workers: arguments.concurrency,
        drain: Duration::from_secs(arguments.drain_time_s),
        stats: arguments.stats_address,
        ready: arguments.ready_address,
        reports_all: arguments.standard_metrics,
        inherited: Inherited::from_manager(),
        ..config
    };
    match serve(config, log, arguments.handover) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the proxy ends");
            ExitCode::FAILURE
        }
    }
}

/// Runs the control side on this thread; data workers have their own.
#[tokio::main(flavor = "current_thread")]
async fn serve(
    mut config: proxy::config::Config,
    log: LogLevel,
    handover: Option<PathBuf>,
) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
    let mut hang_up = signal(SignalKind::hangup()).context("signals")?;
    let mut predecessor = None;
    if let Some(path) = &handover
        && let Some((inherited, found)) = handover::take_over(path).await.context("cannot take over")?
    {
        (config.inherited, predecessor) = (inherited, Some(found));
    }
    let proxy = Proxy::start(config, Some(log)).await?;
    let supervised = proxy.supervised();
    let followed = async {
        let Some(path) = &handover else { return std::future::pending().await };
        if let Err(error) = handover::relay(path, predecessor, &supervised).await {
            tracing::error!(%error, path = %path.display(), "no other process can take over");
            std::future::pending::<()>().await;
        }
    };
    let watched = supervised.clone().keep(stop.clone()).then(|()| std::future::pending::<()>());
    let served = proxy.run(stop.clone());
    let running = async { tokio::select!(() = served => {}, () = watched => {}) };
    tokio::pin!(running);
    tokio::select! {
        () = &mut running => return Ok(()),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = followed => tracing::info!("the next process serves"),
        _ = hang_up.recv() => {
            let sockets = supervised.hand_over().context("cannot hand over")?;
            tracing::info!(sockets, "handing over to the next process");
        }
    }
    stop.cancel();
    running.await;
    Ok(())
}
