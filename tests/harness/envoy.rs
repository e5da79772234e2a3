//! A stock Envoy in a sidecar's seat: an agent that serves its secrets, and Envoy with a bootstrap of `istioctl`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::istiod::Istiod;
use crate::program::{self, Program};
use crate::workload::{WorkloadSpec, free_block, free_port, own_address};
use crate::{PATIENCE, eventually, http, peers};

/// A workload behind a stock Envoy.
#[derive(Debug)]
pub struct Envoy {
    /// Its loopback block.
    pub block: Ipv4Addr,
    /// Envoy itself.
    pub envoy: Program,
    /// The agent that serves its secrets.
    pub agent: Program,
    admin: SocketAddr,
}

/// Which form of xDS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Incremental.
    Delta,
    /// State of the world.
    Sotw,
}

impl Envoy {
    /// Starts the agent and Envoy.
    ///
    /// # Errors
    ///
    /// When Envoy is not installed, or something does not start.
    pub async fn start(
        istiod: &Istiod,
        folder: &Path,
        spec: &WorkloadSpec,
        form: Form,
    ) -> anyhow::Result<Self> {
        let peer = peers::find("envoy/envoy")?;
        let block = free_block()?;
        let own = own_address(block);
        let socket = folder.join(format!("{}.sock", spec.name));
        let token = istiod.token("default", &spec.service_account).await?;
        let mut args = vec!["secrets".to_owned()];
        args.extend(spec.member(&folder.join(&spec.name), own));
        args.extend(["--socket".to_owned(), socket.display().to_string(), "--token".to_owned(), token]);
        let mut agent =
            Program::start(&program::ours("istio-agent")?, folder, &format!("{}-agent", spec.name), &args)?;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !socket.exists() {
            agent.check()?;
            ensure!(tokio::time::Instant::now() < deadline, "no secrets: {}", agent.output());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await; // eventually
        }

        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let bootstrap = bootstrap(istiod, spec, form, block, &socket, admin.port()).await?;
        let file = folder.join(format!("{}.json", spec.name));
        std::fs::write(&file, bootstrap)?;
        let file = file.display().to_string();
        let args =
            ["-c", &file, "--disable-hot-restart", "--concurrency", "1", "-l", "warning"].map(str::to_owned);
        let envoy = Program::start(&peer, folder, &spec.name, &args)?;
        Ok(Self { block, envoy, agent, admin })
    }

    /// `GET` of a path of the admin port.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub async fn admin(&self, path: &str) -> anyhow::Result<String> {
        let answer = http::get(self.admin, "envoy", path, &[]).await?;
        ensure!(answer.status == 200, "{path}: {}", answer.status);
        Ok(answer.text())
    }

    /// Waits until Envoy takes traffic.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn ready(&self) -> anyhow::Result<()> {
        eventually(PATIENCE, "envoy is ready", || self.admin("/ready"))
            .await
            .with_context(|| self.envoy.output())?;
        Ok(())
    }

    /// Fails when Envoy has refused anything.
    ///
    /// # Errors
    ///
    /// Which statistics tell so, with Envoy's log.
    pub async fn refused_nothing(&self) -> anyhow::Result<()> {
        let stats = self.admin("/stats?filter=update_rejected|update_failure").await?;
        let rejected: Vec<&str> =
            stats.lines().filter(|l| l.contains("update_rejected") && !l.ends_with(": 0")).collect();
        ensure!(
            rejected.is_empty() && stats.contains("update_rejected"),
            "{rejected:?}: {}",
            self.envoy.output()
        );
        Ok(())
    }

    /// Serial number of the certificate in use.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub async fn certificate(&self) -> anyhow::Result<String> {
        let certs: Value = serde_json::from_str(&self.admin("/certs").await?)?;
        let chains = certs.pointer("/certificates").and_then(Value::as_array).context("no certificates")?;
        let serial =
            chains.iter().map(|c| crate::text(c, "/cert_chain/0/serial_number")).find(|s| !s.is_empty());
        serial.map(str::to_owned).with_context(|| certs.to_string())
    }
}

async fn bootstrap(
    istiod: &Istiod,
    spec: &WorkloadSpec,
    form: Form,
    block: Ipv4Addr,
    socket: &Path,
    admin: u16,
) -> anyhow::Result<String> {
    let workload = format!("{}.default", spec.name);
    let (own, labels) = (own_address(block).to_string(), spec.label_list());
    let (block, admin) = (format!("{block}/20"), admin.to_string());
    let socket = socket.display().to_string();
    let mut args = vec!["-o", "json", "proxy-config", "bootstrap", "--envoy", &workload, "--address", &own];
    args.extend(["--service-account", &spec.service_account, "--loopback-block", &block]);
    args.extend(["--secrets", &socket, "--admin-port", &admin]);
    if !labels.is_empty() {
        args.extend(["--labels", &labels]);
    }
    let forwards: Vec<String> =
        spec.forward.iter().map(|(port, behind)| format!("{port}={behind}")).collect();
    for forward in &forwards {
        args.extend(["--forward", forward]);
    }
    if form == Form::Sotw {
        args.push("--sotw");
    }
    istiod.istioctl_ok(&args).await
}
