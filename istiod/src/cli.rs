//! What can be asked of the control plane.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cluster::secrets::Kept;
use crate::cluster::ticket::Ticket;
use crate::config::{Config, Dev};

/// One member of the control plane.
#[derive(Debug, Clone, Parser)]
#[command(name = "istiod", version, about = "One member of the mesh's control plane")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Subcommand)]
enum Command {
    /// Run a member with the settings of a file
    Run {
        /// YAML file with the settings
        #[arg(long)]
        config: PathBuf,
        /// Ticket of `istioctl members add`, with which a new machine joins; afterwards it is not needed any more
        #[arg(long)]
        join: Option<String>,
    },
    /// Write the settings of a member; of the first one, make the keys of its cluster too
    Init(InitArgs),
    /// Run one member on loopback to try things out: no root, no settings, an open admin API
    Dev(DevArgs),
}

#[derive(Debug, Clone, Args)]
struct InitArgs {
    /// File to be written
    #[arg(long, default_value = "/etc/istio/istiod.yaml")]
    config: PathBuf,
    /// Folder for the member's data
    #[arg(long, default_value = "/var/lib/istiod")]
    data_dir: PathBuf,
    /// How other members reach this one, HOST:PORT; the port is 15019 usually
    #[arg(long)]
    peer: String,
    /// How agents and proxies reach this one, HOST:PORT; the port is 15012 usually
    #[arg(long)]
    xds: String,
    /// Trust domain of the mesh
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// What people call this member
    #[arg(long)]
    name: Option<String>,
    /// Ticket of `istioctl members add`: the member joins that cluster at its first start, and founds none
    #[arg(long)]
    join: Option<String>,
}

#[derive(Debug, Clone, Args)]
struct DevArgs {
    /// Folder for the member's data; a temporary one, removed at the end, when not given
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Address of the admin API
    #[arg(long, default_value = "127.0.0.1:15080")]
    admin: SocketAddr,
    /// Address of xDS and certificates
    #[arg(long, default_value = "127.0.0.1:15012")]
    xds: SocketAddr,
    /// Address of `/metrics`
    #[arg(long, default_value = "127.0.0.1:15014")]
    metrics: SocketAddr,
    /// Lifetime of workload certificates in seconds
    #[arg(long, default_value_t = 24 * 3600)]
    leaf_lifetime: u64,
    /// Seconds after the end of its certificate in which a machine may come back with its key
    #[arg(long, default_value_t = 7 * 24 * 3600)]
    dormancy: u64,
    /// Seconds without a sign of life after which a workload is sent no traffic
    #[arg(long, default_value_t = 30)]
    lease: u64,
    /// YAML file with the `sources` of the settings, and nothing else
    #[arg(long)]
    sources: Option<PathBuf>,
}

/// Runs the program; its exit code (64 for wrong settings, 1 when it cannot go on).
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    if let Command::Init(args) = cli.command {
        return init(&args);
    }
    let (config, scratch) = match settings(cli.command) {
        Ok(settings) => settings,
        Err(mistakes) => {
            init_logging("info", false);
            for mistake in mistakes {
                tracing::error!(error = mistake, "wrong settings");
            }
            return ExitCode::from(64);
        }
    };
    init_logging(&config.log_level, config.log_json);
    let outcome = run_until_signal(config);
    drop(scratch);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "this member ends");
            ExitCode::FAILURE
        }
    }
}

/// Writes the settings of a member, and founds a cluster unless it is to join one.
fn init(args: &InitArgs) -> ExitCode {
    init_logging("info", false);
    match founded(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(mistakes) => {
            for mistake in mistakes {
                tracing::error!(error = mistake, "nothing was founded");
            }
            ExitCode::from(64)
        }
    }
}

fn founded(args: &InitArgs) -> Result<(), Vec<String>> {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let port = |text: &str| text.rsplit_once(':').map_or("0", |(_, port)| port).to_owned();
    let data_dir = quoted(&args.data_dir.display().to_string());
    let mut text = format!("dataDir: {data_dir}\ntrustDomain: {}\n", quoted(&args.trust_domain));
    if let Some(name) = &args.name {
        text.push_str(&format!("name: {}\n", quoted(name)));
    }
    for (section, advertised) in [("peers", &args.peer), ("xds", &args.xds)] {
        let address = quoted(&format!("0.0.0.0:{}", port(advertised)));
        text.push_str(&format!("{section}:\n  address: {address}\n  advertise: {}\n", quoted(advertised)));
    }
    let name = args.config.display().to_string();
    let config = Config::parse(&name, &text)?;
    if let Some(ticket) = &args.join {
        Ticket::parse(ticket).map_err(|error| vec![format!("--join: {error}")])?;
    }
    let io = |error: std::io::Error| vec![format!("cannot write {name}: {error}")];
    if let Some(folder) = args.config.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    // A file that is there was written by somebody with something in mind.
    let mut file = std::fs::File::create_new(&args.config).map_err(io)?;
    std::io::Write::write_all(&mut file, text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
    keys(args, &config).map_err(|error| vec![format!("cannot keep what makes a member: {error:#}")])?;
    tracing::info!(config = name, next = format!("istiod run --config {name}"), "initialized");
    Ok(())
}

/// Makes the keys of a cluster, or keeps the ticket for another. Root makes them for whom the data folder is.
fn keys(args: &InitArgs, config: &Config) -> anyhow::Result<()> {
    std::fs::create_dir_all(&config.data_dir)?;
    let kept = Kept::open(&config.data_dir)?;
    match &args.join {
        None => kept.found(config.member_id, (crate::clock())())?,
        Some(ticket) => kept.keep_ticket(ticket)?,
    }
    let owner = std::fs::metadata(&config.data_dir)?;
    for made in [kept.folder().to_owned()].into_iter().chain(files(kept.folder())?) {
        // Nothing changes for who is not root, as the folder is their own then.
        std::os::unix::fs::lchown(made, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}

fn files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect()
}

/// The settings, and a folder that is removed when it is dropped.
fn settings(command: Command) -> Result<(Config, Option<Scratch>), Vec<String>> {
    match command {
        Command::Run { config, join } => {
            let mut config = Config::read(&config)?;
            if let Some(text) = join {
                let ticket = Ticket::parse(&text).map_err(|error| vec![format!("--join: {error}")])?;
                if config.peer_advertise.is_none() {
                    return Err(vec!["peers.advertise: is required to join a cluster".to_owned()]);
                }
                config.join = Some(ticket);
            }
            Ok((config, None))
        }
        Command::Init(_) => Err(vec!["`init` runs nothing".to_owned()]),
        Command::Dev(args) => {
            let scratch = match &args.data_dir {
                Some(_) => None,
                None => Some(Scratch::make().map_err(|e| vec![format!("no temporary folder: {e}")])?),
            };
            let data_dir =
                args.data_dir.or_else(|| scratch.as_ref().map(|s| s.0.clone())).unwrap_or_default();
            let leaf_lifetime = Duration::from_secs(args.leaf_lifetime);
            let (lease, dormancy) = (Duration::from_secs(args.lease), Duration::from_secs(args.dormancy));
            let DevArgs { admin, xds, metrics, sources, .. } = args;
            let dev = Dev { data_dir, admin, xds, metrics, leaf_lifetime, dormancy, lease, sources };
            Ok((Config::dev(dev)?, scratch))
        }
    }
}

/// A folder of a member that nobody will ask for again.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> std::io::Result<Self> {
        let path =
            std::env::temp_dir().join(format!("istiod-{}-{:08x}", std::process::id(), fastrand::u32(..)));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "the temporary folder stays");
        }
    }
}

fn init_logging(level: &str, json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // A second subscriber in one process (a test) is not wanted and does no harm.
    if json { builder.json().try_init() } else { builder.try_init() }.unwrap_or_default();
}

fn run_until_signal(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut member = std::pin::pin!(crate::run(config, stop.clone()));
        tokio::select! {
            ended = &mut member => return ended,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        stop.cancel();
        member.await
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
}
