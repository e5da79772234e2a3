//! An installed agent: it joins once, by hand, and serves from then on as its files say.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use ca::authn::JoinToken;
use clap::Args;
use nix::unistd::{Gid, Uid, geteuid, gethostname, setgid, setgroups, setuid};
use proxy::supervisor::Inherited;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{block, new_session};
use crate::capture::INBOUND_PORT;
use crate::config::{Config, ProxySeat, Seat};
use crate::dns::Dns;
use crate::join;
use crate::probe::{Checks, Place};
use crate::register::Workload;
use crate::settings::{Service, Settings};
use crate::vault;

/// Flags of `serve`.
#[derive(Debug, Clone, Args)]
pub(super) struct Serve {
    /// YAML file with the settings
    #[arg(long, default_value = "/etc/istio/agent.yaml")]
    config: PathBuf,
}

/// Flags of `join`.
#[derive(Debug, Clone, Args)]
pub(super) struct Join {
    /// Join token, as `istioctl token create` prints it; `-` reads it from standard input
    #[arg(env = "ISTIO_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// YAML file with the settings
    #[arg(long, default_value = "/etc/istio/agent.yaml")]
    config: PathBuf,
}

impl Serve {
    /// What the files say.
    pub(super) fn config(&self) -> anyhow::Result<Config> {
        config(&Settings::read(&self.config)?, None)
    }
}

impl Join {
    /// Uses the token up: afterwards key, certificate and membership are in the agent's folder, as its own.
    pub(super) fn join(&self) -> anyhow::Result<()> {
        let mut text = self.token.clone();
        if text == "-" {
            text.clear();
            std::io::stdin().read_to_string(&mut text).context("cannot read the token")?;
        }
        let config = config(&Settings::read(&self.config)?, Some(JoinToken::parse(&text)?))?;
        become_owner(&config.data_dir)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
            join::identity(&config, &tasks, stop.clone()).await?;
            stop.cancel();
            tasks.close();
            tasks.wait().await;
            Ok(())
        })
    }
}

/// The agent that the files describe.
fn config(settings: &Settings, token: Option<JoinToken>) -> anyhow::Result<Config> {
    // Whoever joins is still root here.
    let key = vault::handed_over()?;
    let service = settings.service()?;
    let address = match settings.address {
        Some(address) => address,
        None => {
            let members = match &token {
                Some(token) => token.endpoints.clone(),
                None => join::endpoints(&settings.data_dir, key.clone())?,
            };
            own_address(&members)?
        }
    };
    let block = settings.loopback_block.as_deref().map(block).transpose();
    let loopback_block = block.map_err(|told| anyhow::anyhow!("loopbackBlock: {told}"))?;
    let name = match &service {
        Some(service) => service.name.clone(),
        None => gethostname()?.to_string_lossy().into_owned(),
    };
    let labels = service.as_ref().map(|service| service.labels.clone()).unwrap_or_default();
    let forward = service.as_ref().map(|service| service.forward.clone()).unwrap_or_default();
    let workers = match settings.workers {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        workers => workers,
    };
    Ok(Config {
        data_dir: settings.data_dir.clone(),
        key,
        token,
        endpoints: Vec::new(),
        node: format!("{name}@{address}"),
        certificate_lifetime: None,
        dns: Dns::new(settings.dns.clone(), settings.dns_upstreams.clone()).context("/etc/resolv.conf")?,
        workload: service.map(|service| workload(service, address, settings)),
        seat: Seat::Proxy(Box::new(ProxySeat {
            name,
            addresses: vec![address],
            labels,
            loopback_block,
            forward,
            admin: settings.admin,
            stats: settings.stats,
            readiness: settings.readiness,
            workers,
            drain: Duration::from_secs(settings.drain_seconds),
            inherited: Inherited::from_manager(),
        })),
    })
}

fn workload(service: Service, address: IpAddr, settings: &Settings) -> Workload {
    let captured = settings.loopback_block.is_none();
    let place = Place { address, captured, forward: service.forward.clone() };
    Workload {
        name: service.name,
        address,
        labels: service.labels,
        ports: service.ports,
        locality: settings.locality.clone(),
        network: settings.network.clone(),
        awaited_ports: if captured { vec![INBOUND_PORT] } else { service.forward.into_keys().collect() },
        checks: Checks { own: service.probe, exec: settings.exec_probes, place },
        session: new_session(),
    }
}

/// The address from which this machine reaches the control plane, by its routes. Nothing is sent.
fn own_address(members: &[String]) -> anyhow::Result<IpAddr> {
    let mut last = None;
    for member in members {
        match towards(member) {
            Ok(address) => return Ok(address),
            Err(error) => last = Some(error.context(format!("no way to {member}"))),
        }
    }
    match last {
        Some(error) => Err(error.context("which address this machine has is not known; say it as `address`")),
        None => bail!("no address of a control plane is known; say this machine's own as `address`"),
    }
}

fn towards(member: &str) -> anyhow::Result<IpAddr> {
    let to = member.to_socket_addrs()?.next().context("the name has no address")?;
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

/// What is written from now on belongs to the owner of the agent's folder, who serves from it.
fn become_owner(folder: &Path) -> anyhow::Result<()> {
    let Ok(owner) = std::fs::metadata(folder) else { return Ok(()) };
    if !geteuid().is_root() || owner.uid() == 0 {
        return Ok(());
    }
    let cannot = || format!("cannot act for the owner of {}", folder.display());
    setgroups(&[]).with_context(cannot)?;
    setgid(Gid::from_raw(owner.gid())).with_context(cannot)?;
    setuid(Uid::from_raw(owner.uid())).with_context(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_address_is_the_one_towards_the_control_plane() {
        let members = ["no-such-host.invalid:15012".to_owned(), "127.0.0.1:15012".to_owned()];
        assert_eq!(own_address(&members).unwrap(), IpAddr::from([127, 0, 0, 1]));
        let told = format!("{:#}", own_address(&members[..1]).unwrap_err());
        assert!(told.contains("`address`") && told.contains("no-such-host.invalid"), "{told}");
    }

    #[test]
    fn the_files_make_an_agent() {
        let service = Service {
            name: "billing".to_owned(),
            labels: [("app".to_owned(), "billing".to_owned())].into(),
            ports: [("http".to_owned(), 8080)].into(),
            forward: [(8080, SocketAddr::from(([127, 0, 0, 1], 80)))].into(),
            probe: None,
        };
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            services: folder.path().join("services.d"),
            address: Some(IpAddr::from([10, 0, 0, 7])),
            loopback_block: Some("127.240.16.0/20".to_owned()),
            ..Settings::default()
        };
        let made = config(&settings, None).unwrap();
        assert!(made.workload.is_none(), "without a service there is a proxy and no workload");
        let workload = workload(service, IpAddr::from([10, 0, 0, 7]), &settings);
        assert_eq!(
            (workload.name.as_str(), workload.awaited_ports.as_slice()),
            ("billing", [8080].as_slice())
        );
        let wrong = Settings { loopback_block: Some("10.0.0.0/8".to_owned()), ..settings };
        assert!(config(&wrong, None).unwrap_err().to_string().starts_with("loopbackBlock: "));
    }
}
