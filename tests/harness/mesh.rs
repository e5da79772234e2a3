//! A mesh on loopback addresses: istiod, and workloads with their proxies.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use crate::program::{self, Program};
use crate::{eventually, http};

/// Everything a mesh is waited for happens within this time.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// An istiod with its data folder.
#[derive(Debug)]
pub struct Istiod {
    /// Admin API.
    pub admin: SocketAddr,
    /// xDS and certificates.
    pub xds: SocketAddr,
    /// Metrics.
    pub metrics: SocketAddr,
    folder: PathBuf,
    extra: Vec<String>,
    program: Program,
}

impl Istiod {
    /// Starts `istiod dev` with its data and log in `folder`, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn start(folder: &Path, extra: &[&str]) -> anyhow::Result<Self> {
        let (admin, xds, metrics) = (free_port()?, free_port()?, free_port()?);
        let extra: Vec<String> = extra.iter().map(|a| (*a).to_owned()).collect();
        let program = Self::launch(folder, admin, xds, metrics, &extra)?;
        let mut istiod = Self { admin, xds, metrics, folder: folder.to_owned(), extra, program };
        istiod.ready().await?;
        Ok(istiod)
    }

    fn launch(folder: &Path, admin: SocketAddr, xds: SocketAddr, metrics: SocketAddr, extra: &[String]) -> anyhow::Result<Program> {
        let data = folder.join("istiod-data").display().to_string();
        let mut args: Vec<String> = ["dev", "--data-dir", &data].map(str::to_owned).to_vec();
        args.extend(["--admin".to_owned(), admin.to_string(), "--xds".to_owned(), xds.to_string()]);
        args.extend(["--metrics".to_owned(), metrics.to_string()]);
        args.extend_from_slice(extra);
        Program::start(&program::ours("istiod")?, folder, "istiod", &args)
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            self.program.check()?;
            match http::get(self.admin, "istiod", "/ready", &[]).await {
                Ok(answer) if answer.status == 200 => return Ok(()),
                other if tokio::time::Instant::now() > deadline => bail!("istiod is not ready: {other:?}"),
                _ => tokio::time::sleep(Duration::from_millis(5)).await, // eventually
            }
        }
    }

    /// `kill -9`.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.program.kill()
    }

    /// Starts it again, with the same data and addresses.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.program = Self::launch(&self.folder, self.admin, self.xds, self.metrics, &self.extra)?;
        self.ready().await
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// What istiod wrote to its log.
    #[must_use]
    pub fn log(&self) -> String {
        self.program.output()
    }

    /// URL of the admin API, for `ISTIOCTL_SERVER`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.admin)
    }

    /// Runs `istioctl` against this istiod: exit code, standard output, standard error.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub async fn istioctl(&self, args: &[&str]) -> anyhow::Result<(i32, String, String)> {
        let url = self.url();
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        tokio::task::spawn_blocking(move || {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            program::run("istioctl", &[("ISTIOCTL_SERVER", &url)], &args)
        })
        .await?
    }

    /// Commits YAML; the revision.
    ///
    /// # Errors
    ///
    /// What was refused.
    pub async fn apply(&self, yaml: &str) -> anyhow::Result<u64> {
        let body = json!({ "files": [{ "name": "test.yaml", "text": yaml }], "namespace": "default" });
        let answer = http::post(self.admin, "/api/v1/apply", &body).await?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
        answer.json::<Value>()?.get("revision").and_then(Value::as_u64).context("no revision")
    }

    /// Commits YAML and waits until every connected proxy runs it.
    ///
    /// # Errors
    ///
    /// What was refused, or which proxies do not run it.
    pub async fn apply_and_wait(&self, yaml: &str) -> anyhow::Result<u64> {
        let revision = self.apply(yaml).await?;
        let path = format!("/wait/{revision}?timeoutMilliseconds={}", PATIENCE.as_millis());
        let report: Value = self.api(&path).await?;
        let pending = report.get("pending").and_then(Value::as_array).context("no report")?;
        ensure!(pending.is_empty(), "revision {revision} does not run on {pending:?}");
        Ok(revision)
    }

    /// `GET` below `/api/v1`.
    ///
    /// # Errors
    ///
    /// When the answer is not 200 and JSON.
    pub async fn api<T: serde::de::DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let answer = http::get(self.admin, "istiod", &format!("/api/v1{path}"), &[]).await?;
        ensure!(answer.status == 200, "{path}: {}: {}", answer.status, answer.text());
        answer.json()
    }

    /// A join token for one workload.
    ///
    /// # Errors
    ///
    /// What was refused.
    pub async fn token(&self, namespace: &str, service_account: &str) -> anyhow::Result<String> {
        let body = json!({ "namespace": namespace, "serviceAccount": service_account, "ttlSeconds": 600, "uses": 1 });
        let answer = http::post(self.admin, "/api/v1/tokens", &body).await?;
        ensure!(answer.status == 200 || answer.status == 201, "{}: {}", answer.status, answer.text());
        Ok(answer.json::<Value>()?.get("token").and_then(Value::as_str).context("no token")?.to_owned())
    }

    /// Waits until the named proxies (`name.namespace`) are connected and hold everything.
    pub async fn synced(&self, names: &[&str]) {
        eventually(PATIENCE, "proxies are synced", || async {
            let rows: Vec<Value> = self.api("/proxies").await.map_err(|e| e.to_string())?;
            let synced = |name: &&str| {
                let row = rows.iter().find(|r| r.get("name").and_then(Value::as_str) == Some(name));
                let types = row.and_then(|r| r.get("types")).and_then(Value::as_object);
                types.is_some_and(|t| !t.is_empty() && t.values().all(|s| s == "SYNCED"))
            };
            match names.iter().find(|name| !synced(name)) {
                None => Ok(()),
                Some(name) => Err(format!("{name} is not: {rows:?}")),
            }
        })
        .await;
    }

    /// Address of a service (short name) for the application behind a proxy with this loopback block.
    ///
    /// # Errors
    ///
    /// When there is no such service.
    pub async fn address(&self, block: Ipv4Addr, service: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let services: Vec<Value> = self.api("/services").await?;
        let named = |s: &&Value| s.get("hostname").and_then(Value::as_str).is_some_and(|h| h == service || h.split('.').next() == Some(service));
        let found = services.iter().find(named).with_context(|| format!("no service {service}"))?;
        let index = found.get("vipIndex").and_then(Value::as_u64).context("no index")?;
        let address = xds::translate::explicit_address(block, u32::try_from(index)?).context("the block is too small")?;
        Ok(SocketAddr::from((address, port)))
    }
}

/// A workload behind one of our proxies.
#[derive(Debug)]
pub struct Workload {
    /// `name.namespace`
    pub name: String,
    /// Its loopback block.
    pub block: Ipv4Addr,
    /// The agent with the proxy inside.
    pub agent: Program,
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
}

impl WorkloadSpec {
    /// A server with label `app`, one port 80 and an application behind it.
    #[must_use]
    pub fn server(app: &str, version: &str, behind: SocketAddr) -> Self {
        let labels = [("app", app), ("version", version)].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        Self { name: format!("{app}-{version}"), service_account: app.to_owned(), labels, forward: [(80, behind)].into() }
    }

    /// A client without an application.
    #[must_use]
    pub fn client(name: &str) -> Self {
        Self { name: name.to_owned(), service_account: name.to_owned(), ..Self::default() }
    }
}

impl Workload {
    /// Starts an agent with its proxy.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub async fn start(istiod: &Istiod, folder: &Path, spec: &WorkloadSpec) -> anyhow::Result<Self> {
        let token = istiod.token("default", &spec.service_account).await?;
        let block = free_block()?;
        let own = own_address(block);
        let data = folder.join(&spec.name).display().to_string();
        let mut args: Vec<String> = ["run", "--name", &spec.name, "--data-dir", &data, "--token", &token].map(str::to_owned).to_vec();
        for (flag, value) in [
            ("--address", own.to_string()),
            ("--loopback-block", format!("{block}/20")),
            ("--admin", format!("{own}:15000")),
            ("--stats", format!("{own}:15090")),
            ("--readiness", format!("{own}:15021")),
            ("--workers", "1".to_owned()),
        ] {
            args.extend([flag.to_owned(), value]);
        }
        if spec.forward.is_empty() {
            args.push("--no-register".to_owned());
        }
        if !spec.labels.is_empty() {
            let labels: Vec<String> = spec.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            args.extend(["--labels".to_owned(), labels.join(",")]);
        }
        for (port, behind) in &spec.forward {
            args.extend(["--forward".to_owned(), format!("{port}={behind}")]);
        }
        let agent = Program::start(&program::ours("istio-agent")?, folder, &spec.name, &args)?;
        Ok(Self { name: format!("{}.default", spec.name), block, agent })
    }

    /// Where other proxies reach this workload.
    #[must_use]
    pub fn inbound(&self, port: u16) -> SocketAddr {
        SocketAddr::from((own_address(self.block), port))
    }

    /// The proxy's admin port.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        SocketAddr::from((own_address(self.block), 15000))
    }

    /// The proxy's metrics.
    #[must_use]
    pub fn stats(&self) -> SocketAddr {
        SocketAddr::from((own_address(self.block), 15090))
    }
}

/// YAML of a mesh-internal HTTP service on port 80 whose endpoints have label `app: NAME`.
#[must_use]
pub fn service(name: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec:\n  hosts: [{name}.default.svc.cluster.local]\n  \
         location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  \
         workloadSelector: {{labels: {{app: {name}}}}}\n---\n"
    )
}

/// The workload's own address: the first of its block.
#[must_use]
pub fn own_address(block: Ipv4Addr) -> Ipv4Addr {
    Ipv4Addr::from_bits(block.to_bits() + 1)
}

/// A loopback block that nobody uses.
///
/// # Errors
///
/// When all are taken.
pub fn free_block() -> anyhow::Result<Ipv4Addr> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    static FIRST: std::sync::LazyLock<u32> = std::sync::LazyLock::new(|| fastrand::u32(..256));
    for _ in 0..256 {
        let index = (*FIRST + NEXT.fetch_add(1, Ordering::Relaxed)) % 256;
        let block = Ipv4Addr::from_bits(Ipv4Addr::new(127, 240, 0, 0).to_bits() + index * 4096);
        if TcpListener::bind((own_address(block), 15021)).is_ok() {
            return Ok(block);
        }
    }
    bail!("no free loopback block")
}

/// A loopback port that was free just now.
///
/// # Errors
///
/// When none can be had.
pub fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
