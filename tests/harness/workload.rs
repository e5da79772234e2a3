//! A workload as a process: the agent with our proxy inside.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex};

use anyhow::bail;
use serde_json::Value;

use crate::http;
use crate::istiod::Istiod;
use crate::program::{self, Program};

/// Loopback blocks: 512 of /20 in 127.192.0.0/11.
const BLOCKS: u32 = 512;

/// Whoever listens on this port of a block's own address has the block.
const RESERVED: u16 = 15999;
/// Whoever listens on a port of this address has the port of `127.0.0.1`; no block has it.
const PORT_HOLDER: Ipv4Addr = Ipv4Addr::new(127, 191, 255, 254);

/// A workload behind one of our proxies.
#[derive(Debug)]
pub struct Workload {
    /// `name.namespace`
    pub name: String,
    /// Its loopback block.
    pub block: Ipv4Addr,
    /// Folder of its key and certificate.
    pub data: PathBuf,
    /// The agent with the proxy inside.
    pub agent: Program,
    folder: PathBuf,
    args: Vec<String>,
}

/// What to start a [`Workload`] with.
#[derive(Debug, Clone, Default)]
pub struct WorkloadSpec {
    /// Workload name.
    pub name: String,
    /// Service account.
    pub service_account: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Workload port to the application behind it; empty for a client only.
    pub forward: BTreeMap<u16, SocketAddr>,
    /// Further flags of the agent.
    pub flags: Vec<String>,
}

impl WorkloadSpec {
    /// A server with label `app`, one port 80 and an application behind it.
    #[must_use]
    pub fn server(app: &str, version: &str, behind: SocketAddr) -> Self {
        let labels = [("app", app), ("version", version)].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let forward = [(80, behind)].into();
        Self {
            name: format!("{app}-{version}"),
            service_account: app.to_owned(),
            labels,
            forward,
            ..Self::default()
        }
    }

    /// A client without an application.
    #[must_use]
    pub fn client(name: &str) -> Self {
        Self { name: name.to_owned(), service_account: name.to_owned(), ..Self::default() }
    }

    /// The flags that tell an agent who it is and what is behind it.
    #[must_use]
    pub fn member(&self, data: &Path, address: Ipv4Addr) -> Vec<String> {
        let mut args: Vec<String> =
            ["--name", &self.name, "--data-dir", &data.display().to_string()].map(str::to_owned).to_vec();
        args.extend(["--address".to_owned(), address.to_string()]);
        if self.forward.is_empty() {
            args.push("--no-register".to_owned());
        }
        if !self.labels.is_empty() {
            args.extend(["--labels".to_owned(), self.label_list()]);
        }
        for (port, behind) in &self.forward {
            args.extend(["--forward".to_owned(), format!("{port}={behind}")]);
        }
        args
    }

    /// `app=reviews,version=v1`
    #[must_use]
    pub fn label_list(&self) -> String {
        self.labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
    }
}

impl Workload {
    /// Starts an agent with its proxy; it joins with a token of its own.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub async fn start(istiod: &Istiod, folder: &Path, spec: &WorkloadSpec) -> anyhow::Result<Self> {
        let token = istiod.token("default", &spec.service_account).await?;
        Self::start_with(folder, spec, &token)
    }

    /// Starts an agent with its proxy and this token.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start_with(folder: &Path, spec: &WorkloadSpec, token: &str) -> anyhow::Result<Self> {
        let block = free_block()?;
        let own = own_address(block);
        let data = folder.join(&spec.name);
        let mut args = vec!["run".to_owned()];
        args.extend(spec.member(&data, own));
        for (flag, value) in [
            ("--loopback-block", format!("{block}/20")),
            ("--admin", format!("{own}:15000")),
            ("--stats", format!("{own}:15090")),
            ("--readiness", format!("{own}:15021")),
            ("--workers", "1".to_owned()),
        ] {
            args.extend([flag.to_owned(), value]);
        }
        args.extend(spec.flags.iter().cloned());
        let mut first = args.clone();
        first.extend(["--token".to_owned(), token.to_owned()]);
        let agent = Program::start(&program::ours("istio-agent")?, folder, &spec.name, &first)?;
        Ok(Self {
            name: format!("{}.default", spec.name),
            block,
            data,
            agent,
            folder: folder.to_owned(),
            args,
        })
    }

    /// Starts the ended agent again, as it is started after it has joined: without a token.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        let name = self.name.split('.').next().unwrap_or_default();
        self.agent = Program::start(&program::ours("istio-agent")?, &self.folder, name, &self.args)?;
        Ok(())
    }

    /// Where other proxies reach this workload.
    #[must_use]
    pub fn inbound(&self, port: u16) -> SocketAddr {
        SocketAddr::from((own_address(self.block), port))
    }

    /// The proxy's metrics, as Prometheus' text.
    ///
    /// # Errors
    ///
    /// When it does not tell them.
    pub async fn metrics(&self) -> anyhow::Result<String> {
        Ok(http::get(self.inbound(15090), "proxy", "/stats/prometheus", &[]).await?.text())
    }

    /// Begin of the validity of the proxy's certificate, as it tells itself.
    ///
    /// # Errors
    ///
    /// When it tells none.
    pub async fn certificate_since(&self) -> anyhow::Result<String> {
        let certs: Value = http::get(self.inbound(15000), "proxy", "/certs", &[]).await?.json()?;
        let since = crate::text(&certs, "/certificates/0/cert_chain/0/valid_from").to_owned();
        anyhow::ensure!(!since.is_empty(), "no certificate in {certs}");
        Ok(since)
    }
}

/// The workload's own address: the first of its block.
#[must_use]
pub fn own_address(block: Ipv4Addr) -> Ipv4Addr {
    Ipv4Addr::from_bits(block.to_bits() + 1)
}

/// A loopback block that nobody uses. Each process begins at a random one, and holds what it took to its end, so that
/// several can run at once; the demo takes its blocks elsewhere.
///
/// # Errors
///
/// When all are taken.
pub fn free_block() -> anyhow::Result<Ipv4Addr> {
    static NEXT: LazyLock<AtomicU32> = LazyLock::new(|| AtomicU32::new(fastrand::u32(..BLOCKS)));
    static HELD: Mutex<Vec<TcpListener>> = Mutex::new(Vec::new());
    for _ in 0..BLOCKS {
        let index = NEXT.fetch_add(1, Ordering::Relaxed) % BLOCKS;
        let block = Ipv4Addr::from_bits(Ipv4Addr::new(127, 192, 0, 0).to_bits() + index * 4096);
        if let Ok(held) = TcpListener::bind((own_address(block), RESERVED)) {
            HELD.lock().map_err(|_| anyhow::anyhow!("a test failed while it took a block"))?.push(held);
            return Ok(block);
        }
    }
    bail!("no free loopback block")
}

/// A loopback port below those that the system gives to clients. The process holds what it took to its end, at an address
/// where nobody listens, so that several can run at once.
///
/// # Errors
///
/// When none can be had.
pub fn free_port() -> anyhow::Result<u16> {
    static HELD: Mutex<Vec<TcpListener>> = Mutex::new(Vec::new());
    for port in std::iter::repeat_with(|| fastrand::u16(20_000..32_000)).take(100) {
        let Ok(held) = TcpListener::bind((PORT_HOLDER, port)) else { continue };
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            HELD.lock().map_err(|_| anyhow::anyhow!("a test failed while it took a port"))?.push(held);
            return Ok(port);
        }
    }
    bail!("no free port")
}
