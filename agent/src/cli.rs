//! What can be asked of the agent.

mod installed;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use ca::authn::JoinToken;
use clap::{Args, Parser, Subcommand};
use proxy::supervisor::Inherited;
use proxy::telemetry::LogLevel;
use tokio::signal::unix::{SignalKind, signal};

use crate::Orders;
use crate::capture::{Block, INBOUND_PORT, Plan};
use crate::config::{Config, ProxySeat, Seat};
use crate::dns::Dns;
use crate::join;
use crate::probe::{Checks, Place};
use crate::register::Workload;
use crate::resolved::{self, Domain};
use crate::tool::ToolError;
use crate::vault;

/// The node agent.
#[derive(Debug, Clone, Parser)]
#[command(name = "istio-agent", version, about = "The node agent of the mesh, with the proxy inside")]
pub struct Cli {
    /// Level of the log, or levels by module: `info,proxy::xds=debug`
    #[arg(long, global = true, env = "ISTIO_LOG_LEVEL", default_value = "info")]
    log_level: String,
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Subcommand)]
enum Command {
    /// Use a join token up, so that `serve` needs none
    Join(installed::Join),
    /// Run the proxy of this machine, which has joined, as the files in /etc/istio say
    Serve(installed::Serve),
    /// Join the mesh and run the proxy of one workload
    Run(Run),
    /// Join the mesh and hand the certificate of one workload to a stock Envoy
    Secrets(Secrets),
    /// Redirect this machine's traffic to the proxy, or stop it; needs root
    #[command(subcommand)]
    Capture(Capture),
    /// Have systemd-resolved ask this machine's agent for names of the mesh, or stop it; needs root
    #[command(subcommand)]
    Resolved(Resolved),
}

#[derive(Debug, Clone, Subcommand)]
enum Resolved {
    /// Tell systemd-resolved, in place of what it was told before
    On(Names),
    /// Have systemd-resolved forget the agent
    Off,
}

/// Which names, and who answers them.
#[derive(Debug, Clone, Args)]
struct Names {
    /// Address at which the agent answers
    #[arg(long, default_value = "127.0.0.1:15053")]
    server: SocketAddr,
    /// Domain whose names are asked of the agent; may be repeated
    #[arg(long = "domain", default_values = ["svc.cluster.local", "service.consul"])]
    domains: Vec<Domain>,
}

#[derive(Debug, Clone, Subcommand)]
enum Capture {
    /// Put the rules into place, all at once, in place of earlier ones
    On(Rules),
    /// Remove the rules, all at once
    Off,
    /// Show the rules that `on` would put into place
    Show(Rules),
}

/// What is captured.
#[derive(Debug, Clone, Args)]
struct Rules {
    /// Numeric user of the proxy, whose own traffic is left alone
    #[arg(long)]
    user: u32,
    /// Port of the proxy for what the machine's applications send
    #[arg(long, default_value_t = 15001)]
    outbound_port: u16,
    /// Port of the proxy for what comes to the machine
    #[arg(long, default_value_t = 15006)]
    inbound_port: u16,
    /// Port of the machine that is not captured; may be repeated. ssh and the agent's own never are
    #[arg(long)]
    exclude_inbound: Vec<u16>,
    /// Port elsewhere that is not captured; may be repeated
    #[arg(long)]
    exclude_outbound: Vec<u16>,
    /// Redirect DNS queries, UDP and TCP, to the agent at this port
    #[arg(long)]
    dns: Option<u16>,
    /// Addresses that are captured, `10.0.0.0/8`; all when not given; may be repeated
    #[arg(long)]
    include: Vec<Block>,
    /// Addresses that are not captured, `10.0.5.0/24`; may be repeated
    #[arg(long)]
    exclude: Vec<Block>,
}

/// What both need to join and to register.
#[derive(Debug, Clone, Args)]
struct Member {
    /// Name of the workload
    #[arg(long)]
    name: String,
    /// Folder for key, certificate and membership
    #[arg(long, default_value = "/var/lib/istio-agent")]
    data_dir: PathBuf,
    /// Join token, as `istioctl token create` prints it; only needed the first time
    #[arg(long, env = "ISTIO_JOIN_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    token: Option<String>,
    /// File with the join token
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Address of the control plane, HOST:PORT, in place of the token's; may be repeated
    #[arg(long = "xds")]
    endpoints: Vec<String>,
    /// Address of the workload, the one first at which other proxies reach it; may be repeated
    #[arg(long = "address", default_value = "127.0.0.1")]
    addresses: Vec<IpAddr>,
    /// Labels of the workload, `app=reviews,version=v1`
    #[arg(long, value_delimiter = ',', value_parser = key_value)]
    labels: Vec<(String, String)>,
    /// Workload port of a service port, `http=8080`, where they differ; may be repeated
    #[arg(long = "port", value_parser = key_value)]
    ports: Vec<(String, String)>,
    /// Where the workload runs, `region/zone/subzone`
    #[arg(long, default_value = "")]
    locality: String,
    /// Network of the workload
    #[arg(long, default_value = "")]
    network: String,
    /// Where the application listens, `9080=127.0.0.1:8080`; may be repeated
    #[arg(long, value_parser = key_value)]
    forward: Vec<(String, String)>,
    /// Let probes of the control plane run commands on this machine, with the agent's rights
    #[arg(long)]
    exec_probes: bool,
    /// Lifetime of certificates in seconds; the control plane's default when not given
    #[arg(long)]
    certificate_lifetime: Option<u64>,
    /// Address at which names of the mesh are answered, `127.0.0.1:15053`; may be repeated
    #[arg(long)]
    dns: Vec<SocketAddr>,
    /// DNS server for all other names, in place of those in /etc/resolv.conf; may be repeated
    #[arg(long)]
    dns_upstream: Vec<SocketAddr>,
    /// There is no application: do not become an endpoint
    #[arg(long)]
    no_register: bool,
}

#[derive(Debug, Clone, Args)]
struct Run {
    #[command(flatten)]
    member: Member,
    /// Loopback addresses for listeners without traffic capture, `127.240.16.0/20`
    #[arg(long, value_parser = block)]
    loopback_block: Option<(Ipv4Addr, u8)>,
    /// Address of the proxy's admin port
    #[arg(long, default_value = "127.0.0.1:15000")]
    admin: SocketAddr,
    /// Address of `/stats/prometheus`
    #[arg(long, default_value = "0.0.0.0:15090")]
    stats: SocketAddr,
    /// Address of `/healthz/ready`
    #[arg(long, default_value = "0.0.0.0:15021")]
    readiness: SocketAddr,
    /// Worker threads; one for each core when not given
    #[arg(long)]
    workers: Option<usize>,
    /// Seconds that open requests may take to finish at the end
    #[arg(long, default_value_t = 5)]
    drain: u64,
}

#[derive(Debug, Clone, Args)]
struct Secrets {
    #[command(flatten)]
    member: Member,
    /// Path of the Unix socket
    #[arg(long)]
    socket: PathBuf,
}

/// Runs the program; its exit code (64 for wrong usage, 1 when it cannot go on).
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    // A second log in one process (a test) is not wanted and does no harm.
    let log = proxy::telemetry::init(&cli.log_level, false).ok();
    let config = match cli.command {
        Command::Join(join) => return done(join.join(), "this machine has not joined"),
        Command::Serve(serve) => serve.config(),
        Command::Run(run) => run.config(),
        Command::Secrets(secrets) => secrets.config(),
        Command::Capture(command) => return capture(command),
        Command::Resolved(Resolved::On(Names { server, domains })) => {
            let told = resolved::Plan { server, domains }.apply();
            return done(told.map_err(anyhow::Error::from), "systemd-resolved does not ask the agent");
        }
        Command::Resolved(Resolved::Off) => {
            let told = resolved::Plan::remove();
            return done(told.map_err(anyhow::Error::from), "systemd-resolved asks the agent as before");
        }
    };
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "wrong usage");
            return ExitCode::from(64);
        }
    };
    done(run_until_signal(config, log), "the agent ends")
}

fn done(outcome: anyhow::Result<()>, otherwise: &'static str) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "{otherwise}");
            ExitCode::FAILURE
        }
    }
}

fn capture(command: Capture) -> ExitCode {
    let done = match command {
        Capture::On(rules) => rules.plan().apply(),
        Capture::Off => Plan::remove(),
        Capture::Show(rules) => {
            let text = rules.plan().text();
            std::io::stdout().write_all(text.as_bytes()).map_err(ToolError::from)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "traffic is captured as before");
            ExitCode::FAILURE
        }
    }
}

impl Rules {
    fn plan(self) -> Plan {
        Plan {
            user: self.user,
            outbound_port: self.outbound_port,
            inbound_port: self.inbound_port,
            dns: self.dns,
            exclude_inbound: self.exclude_inbound.into_iter().collect(),
            exclude_outbound: self.exclude_outbound.into_iter().collect(),
            include: self.include,
            exclude: self.exclude,
        }
    }
}

fn run_until_signal(config: Config, log: Option<LogLevel>) -> anyhow::Result<()> {
    // The data plane has threads of its own; this runtime joins, registers and renews.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let orders = Orders::default();
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut hang_up = signal(SignalKind::hangup())?;
        let mut agent = std::pin::pin!(crate::run(config, log, orders.clone()));
        loop {
            tokio::select! {
                ended = &mut agent => return ended,
                _ = terminate.recv() => orders.leave.cancel(),
                _ = interrupt.recv() => orders.leave.cancel(),
                _ = hang_up.recv() => orders.hand_over.cancel(),
            }
        }
    })
}

impl Member {
    fn config(&self, seat: Seat) -> anyhow::Result<Config> {
        let text = match &self.token_file {
            Some(file) => match std::fs::read_to_string(file) {
                Ok(text) => Some(text),
                // Whoever is a member already needs no token, and its file may have been removed.
                Err(error) if error.kind() == ErrorKind::NotFound && join::is_member(&self.data_dir) => None,
                Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
            },
            None => self.token.clone(),
        };
        let token = text.map(|text| JoinToken::parse(&text)).transpose()?;
        Ok(Config {
            data_dir: self.data_dir.clone(),
            key: vault::handed_over()?,
            token,
            endpoints: self.endpoints.clone(),
            node: format!("{}@{}", self.name, self.address()?),
            certificate_lifetime: self.certificate_lifetime.map(Duration::from_secs),
            dns: Dns::new(self.dns.clone(), self.dns_upstream.clone()).context("/etc/resolv.conf")?,
            workload: if self.no_register { None } else { Some(self.workload(seat.is_captured())?) },
            seat,
        })
    }

    fn workload(&self, captured: bool) -> anyhow::Result<Workload> {
        let ports = self.ports.iter().map(|(name, port)| {
            Ok((name.clone(), port.parse().with_context(|| format!("`{port}` is not a port"))?))
        });
        let place = Place { address: self.address()?, captured, forward: self.forward()? };
        Ok(Workload {
            name: self.name.clone(),
            address: place.address,
            labels: self.labels.iter().cloned().collect(),
            ports: ports.collect::<anyhow::Result<_>>()?,
            locality: self.locality.clone(),
            network: self.network.clone(),
            awaited_ports: match captured {
                true => vec![INBOUND_PORT],
                false => place.forward.keys().copied().collect(),
            },
            checks: Checks { own: None, exec: self.exec_probes, place },
            session: new_session(),
        })
    }

    /// Where other proxies reach the workload.
    fn address(&self) -> anyhow::Result<IpAddr> {
        self.addresses.first().copied().context("--address: at least one")
    }

    fn forward(&self) -> anyhow::Result<BTreeMap<u16, SocketAddr>> {
        let parse = |(port, address): &(String, String)| {
            let port: u16 = port.parse().with_context(|| format!("`{port}` is not a port"))?;
            ensure!(port > 0, "0 is not a port");
            Ok((port, address.parse().with_context(|| format!("`{address}` is not ADDRESS:PORT"))?))
        };
        self.forward.iter().map(parse).collect()
    }
}

impl Run {
    fn config(&self) -> anyhow::Result<Config> {
        let workers =
            self.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        ensure!(workers > 0, "--workers: at least 1");
        self.member.config(Seat::Proxy(Box::new(ProxySeat {
            name: self.member.name.clone(),
            addresses: self.member.addresses.clone(),
            labels: self.member.labels.iter().cloned().collect(),
            loopback_block: self.loopback_block,
            forward: self.member.forward()?,
            admin: self.admin,
            stats: self.stats,
            readiness: self.readiness,
            workers,
            drain: Duration::from_secs(self.drain),
            inherited: Inherited::from_manager(),
        })))
    }
}

impl Secrets {
    fn config(&self) -> anyhow::Result<Config> {
        self.member.config(Seat::Secrets { socket: self.socket.clone() })
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place where a start of the agent gets its identifier")]
fn new_session() -> String {
    uuid::Uuid::new_v4().to_string()
}

fn key_value(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned()))
        .ok_or_else(|| format!("`{text}`: write `key=value`"))
}

fn block(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let parsed =
        text.split_once('/').and_then(|(base, prefix)| Some((base.parse().ok()?, prefix.parse().ok()?)));
    parsed
        .filter(|(base, prefix): &(Ipv4Addr, u8)| base.is_loopback() && (8..=24).contains(prefix))
        .ok_or_else(|| {
            format!("`{text}` is not a block of loopback addresses; write one like `127.240.16.0/20`")
        })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn blocks_are_loopback() {
        assert_eq!(block("127.240.16.0/20"), Ok((Ipv4Addr::new(127, 240, 16, 0), 20)));
        for wrong in ["127.240.16.0", "10.0.0.0/20", "127.0.0.0/30", "x/20"] {
            assert!(block(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_forward_is_a_port_and_an_address() {
        let parse = |forward: &str| {
            let cli = Cli::parse_from([
                "istio-agent",
                "run",
                "--name",
                "a",
                "--data-dir",
                "/x",
                "--forward",
                forward,
            ]);
            let Command::Run(run) = cli.command else { panic!("not run") };
            run.config()
        };
        assert!(parse("9080=127.0.0.1:8080").is_ok());
        assert!(parse("0=127.0.0.1:8080").is_err());
        assert!(parse("9080=localhost").is_err());
    }
}
