//! The mesh of the demo: one istiod, six services with a proxy each, and the proxy that traffic enters by. Every
//! program is a process of its own, and all of them live on loopback addresses.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use istiod::api::types::{
    ApplyReport, ApplyRequest, ProxyRow, ServiceRow, SourceFile, TokenCreated, TokenRequest, Version,
    WaitReport, WorkloadRow,
};
use tokio::time::Instant;

use super::process::Process;
use crate::cli::Server;
use crate::client::Client;

/// Every wait of the demo ends after this time.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often something that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// The port of every service.
const PORT: u16 = 9080;

/// Loopback addresses of one proxy: a /20 out of 127.240.0.0/12.
const BLOCK_SIZE: u32 = 4096;

/// The services, `(name, version, services it calls)`. The one without a version has no application: traffic
/// enters by its proxy.
const WORKLOADS: [(&str, &str, &[&str]); 7] = [
    ("ingress", "", &[]),
    ("productpage", "v1", &["details", "reviews"]),
    ("details", "v1", &[]),
    ("ratings", "v1", &[]),
    ("reviews", "v1", &[]),
    ("reviews", "v2", &["ratings"]),
    ("reviews", "v3", &["ratings"]),
];

/// A running mesh.
pub(crate) struct Mesh {
    /// Its control plane.
    pub(crate) client: Client,
    /// URL of the admin API.
    pub(crate) url: String,
    /// Time from the first start of a process to the first answer that came over mTLS.
    pub(crate) first_answer: Duration,
    blocks: BTreeMap<String, Ipv4Addr>,
    indexes: BTreeMap<String, u32>,
    istiod: Process,
    processes: Vec<Process>,
}

impl Mesh {
    /// Starts everything and waits for the first request to be answered through it.
    ///
    /// # Errors
    ///
    /// What did not start, with the last lines of its log.
    pub(crate) async fn start(folder: &Path, keep_ports: bool) -> anyhow::Result<Self> {
        let started = Instant::now();
        let admin = port(keep_ports, 15080)?;
        let xds = port(keep_ports, 15012)?;
        let metrics = port(keep_ports, 15014)?;
        let data = folder.join("istiod").display().to_string();
        let args = strings(&[
            "istiod",
            "dev",
            "--data-dir",
            &data,
            "--admin",
            &admin.to_string(),
            "--xds",
            &xds.to_string(),
            "--metrics",
            &metrics.to_string(),
        ]);
        let istiod = Process::start(folder, "istiod", &args)?;
        let url = format!("http://{admin}");
        let server = Server { server: url.clone(), token: None, token_file: None, ca: None };
        let mut mesh = Self {
            client: Client::new(&server)?,
            url,
            first_answer: Duration::ZERO,
            blocks: blocks()?,
            indexes: BTreeMap::new(),
            istiod,
            processes: Vec::new(),
        };
        mesh.ready().await?;
        mesh.apply("1-services.yaml", include_str!("mesh/1-services.yaml")).await?;
        mesh.apply("2-strict.yaml", include_str!("mesh/2-strict.yaml")).await?;
        let services: Vec<ServiceRow> = mesh.client.rows("/services").await?;
        mesh.indexes = services.into_iter().map(|s| (short(&s.hostname), s.vip_index)).collect();
        for (service, version, calls) in WORKLOADS {
            mesh.workload(folder, service, version, calls).await?;
        }
        mesh.first_answer(started).await?;
        mesh.settled().await?;
        Ok(mesh)
    }

    /// Commits a file, and returns when every proxy runs it: the revision, and how long that took.
    ///
    /// # Errors
    ///
    /// What was refused, or which proxies do not run it.
    pub(crate) async fn apply(&mut self, name: &str, text: &str) -> anyhow::Result<(u64, Duration)> {
        let files = vec![SourceFile { name: name.to_owned(), text: text.to_owned() }];
        let namespace = "default".to_owned();
        let request = ApplyRequest { files, namespace, dry_run: false, force: false, prune: None };
        let started = Instant::now();
        let report: ApplyReport = self.client.post("/apply", &request).await?;
        self.run_everywhere(name, report.revision).await?;
        Ok((report.revision, started.elapsed()))
    }

    /// Address of a service for what runs behind the proxy of `workload`.
    ///
    /// # Errors
    ///
    /// When there is no such service or workload.
    pub(crate) fn address(&self, workload: &str, service: &str) -> anyhow::Result<SocketAddr> {
        let block = self.blocks.get(workload).with_context(|| format!("no workload {workload}"))?;
        let index = self.indexes.get(service).with_context(|| format!("no service {service}"))?;
        let address =
            xds::translate::names::block_address(*block, 20, *index).context("the block is too small")?;
        Ok(SocketAddr::V4(SocketAddrV4::new(address, PORT)))
    }

    /// Address at which the proxy of `workload` takes traffic from other proxies.
    ///
    /// # Errors
    ///
    /// When there is no such workload.
    pub(crate) fn inbound(&self, workload: &str) -> anyhow::Result<SocketAddr> {
        let block = self.blocks.get(workload).with_context(|| format!("no workload {workload}"))?;
        Ok(SocketAddr::V4(SocketAddrV4::new(own_address(*block), PORT)))
    }

    /// The proxies as the control plane sees them.
    ///
    /// # Errors
    ///
    /// When the control plane does not answer.
    pub(crate) async fn proxies(&self) -> anyhow::Result<Vec<ProxyRow>> {
        self.client.rows("/proxies").await
    }

    /// Ends every process.
    pub(crate) async fn stop(self) {
        futures::future::join_all(self.processes.into_iter().map(Process::stop)).await;
        self.istiod.stop().await;
    }

    async fn workload(
        &mut self,
        folder: &Path,
        service: &str,
        version: &str,
        calls: &[&str],
    ) -> anyhow::Result<()> {
        let name = workload_name(service, version);
        let block = *self.blocks.get(&name).context("every workload has a block")?;
        let own = own_address(block);
        let request = TokenRequest {
            namespace: "default".to_owned(),
            service_account: service.to_owned(),
            ttl_seconds: 600,
            uses: 1,
            cidrs: Vec::new(),
        };
        let token: TokenCreated = self.client.post("/tokens", &request).await?;
        let data = folder.join(&name).display().to_string();
        let mut args =
            strings(&["agent", "run", "--name", &name, "--data-dir", &data, "--token", &token.token]);
        args.extend(strings(&["--address", &own.to_string(), "--loopback-block", &format!("{block}/20")]));
        args.extend(strings(&["--admin", &format!("{own}:15000"), "--stats", &format!("{own}:15090")]));
        args.extend(strings(&["--readiness", &format!("{own}:15021"), "--workers", "1"]));
        if version.is_empty() {
            args.push("--no-register".to_owned());
        } else {
            let app = self.application(folder, service, version, &name, calls).await?;
            args.extend(strings(&["--labels", &format!("app={service},version={version}")]));
            args.extend(strings(&["--forward", &format!("{PORT}={app}")]));
        }
        self.processes.push(Process::start(folder, &format!("proxy-{name}"), &args)?);
        Ok(())
    }

    async fn application(
        &mut self,
        folder: &Path,
        service: &str,
        version: &str,
        name: &str,
        calls: &[&str],
    ) -> anyhow::Result<SocketAddr> {
        let mut args = strings(&["service", "--name", service, "--version", version]);
        for call in calls {
            args.push("--call".to_owned());
            args.push(format!("{call}={}", self.address(name, call)?));
        }
        let mut process = Process::start(folder, &format!("app-{name}"), &args)?;
        let address = process.address().await?;
        self.processes.push(process);
        Ok(address)
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.istiod.check()?;
            match self.client.get::<serde_json::Value>("/version").await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error.context("istiod is not ready")),
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Waits until every workload is healthy, and every proxy is connected and knows it.
    async fn settled(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let served = WORKLOADS.iter().filter(|(_, version, _)| !version.is_empty()).count();
        loop {
            self.processes.iter_mut().try_for_each(Process::check)?;
            let workloads: Vec<WorkloadRow> = self.client.rows("/workloads").await?;
            let healthy = workloads.iter().filter(|w| w.health == "Healthy").count();
            let connected = self.proxies().await?.len();
            if healthy == served && connected == WORKLOADS.len() {
                break;
            }
            if Instant::now() > deadline {
                bail!(
                    "{healthy} of {served} workloads are healthy, {connected} of {} proxies connected",
                    WORKLOADS.len()
                );
            }
            tokio::time::sleep(LOOK).await;
        }
        let version: Version = self.client.get("/version").await?;
        self.run_everywhere("the start", version.revision).await
    }

    /// Waits until every proxy runs a revision.
    async fn run_everywhere(&self, what: &str, revision: u64) -> anyhow::Result<()> {
        let path = format!("/wait/{revision}?timeoutMilliseconds={}", PATIENCE.as_millis());
        let waited: WaitReport = self.client.get_patiently(&path, PATIENCE).await?;
        match waited.pending.first() {
            None => Ok(()),
            Some(pending) => {
                bail!("{what}: {} does not run revision {revision}: {:?}", pending.proxy, pending.rejected)
            }
        }
    }

    async fn first_answer(&mut self, started: Instant) -> anyhow::Result<()> {
        let address = self.address("ingress", "productpage")?;
        let load =
            super::load::Load { address, host: "productpage", user: None, requests: 1, concurrency: 1 };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let tally = super::load::send(&load).await;
            if tally.failed == 0
                && tally.callers.values().flatten().all(|caller| caller.starts_with("spiffe://"))
            {
                self.first_answer = started.elapsed();
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("no request was answered: {}", tally.first_failure.unwrap_or_default());
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|a| (*a).to_owned()).collect()
}

fn short(hostname: &str) -> String {
    hostname.split('.').next().unwrap_or_default().to_owned()
}

fn workload_name(service: &str, version: &str) -> String {
    if version.is_empty() { service.to_owned() } else { format!("{service}-{version}") }
}

/// The workload's own address: the first of its block.
fn own_address(block: Ipv4Addr) -> Ipv4Addr {
    Ipv4Addr::from_bits(block.to_bits() + 1)
}

/// A loopback address with the wanted port when it is free and wanted, else with any free port.
fn port(wanted: bool, number: u16) -> anyhow::Result<SocketAddr> {
    let fixed = SocketAddr::from((Ipv4Addr::LOCALHOST, number));
    if wanted && TcpListener::bind(fixed).is_ok() {
        return Ok(fixed);
    }
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// A free block for each workload, beginning at a random one, so that several demos can run at once.
fn blocks() -> anyhow::Result<BTreeMap<String, Ipv4Addr>> {
    let first = fastrand::u32(..256);
    let candidates = (0..256).map(|i| {
        Ipv4Addr::from_bits(Ipv4Addr::new(127, 240, 0, 0).to_bits() + (first + i) % 256 * BLOCK_SIZE)
    });
    let mut free = candidates.filter(|block| TcpListener::bind((own_address(*block), 15021)).is_ok());
    WORKLOADS
        .iter()
        .map(|(service, version, _)| {
            Ok((workload_name(service, version), free.next().context("no free loopback addresses")?))
        })
        .collect()
}
