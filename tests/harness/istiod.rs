//! The control plane as a process.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use crate::program::{self, Program};
use crate::workload::{free_block, own_address};
use crate::{PATIENCE, eventually, http, text};

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
    /// Starts `istiod dev` on a loopback address of its own, with its data and log in `folder`, and waits until it
    /// is ready.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn start(folder: &Path, extra: &[&str]) -> anyhow::Result<Self> {
        let own = own_address(free_block()?);
        let [admin, xds, metrics] = [15080, 15012, 15014].map(|port| SocketAddr::from((own, port)));
        let extra: Vec<String> = extra.iter().map(|a| (*a).to_owned()).collect();
        let program = Self::launch(folder, [admin, xds, metrics], &extra)?;
        let mut istiod = Self { admin, xds, metrics, folder: folder.to_owned(), extra, program };
        istiod.ready().await?;
        Ok(istiod)
    }

    fn launch(
        folder: &Path,
        [admin, xds, metrics]: [SocketAddr; 3],
        extra: &[String],
    ) -> anyhow::Result<Program> {
        let data = folder.join("istiod-data").display().to_string();
        let mut args = vec!["dev".to_owned(), "--data-dir".to_owned(), data];
        for (flag, address) in [("--admin", admin), ("--xds", xds), ("--metrics", metrics)] {
            args.extend([flag.to_owned(), address.to_string()]);
        }
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
                _ => tokio::time::sleep(std::time::Duration::from_millis(5)).await, // eventually
            }
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.program.pid()
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
        self.program = Self::launch(&self.folder, [self.admin, self.xds, self.metrics], &self.extra)?;
        self.ready().await
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
        let ran = tokio::task::spawn_blocking(move || {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            program::run("istioctl", &[("ISTIOCTL_SERVER", &url)], &args)
        });
        ran.await?
    }

    /// Runs `istioctl`, which must succeed; its standard output.
    ///
    /// # Errors
    ///
    /// When it does not, with what it said.
    pub async fn istioctl_ok(&self, args: &[&str]) -> anyhow::Result<String> {
        let (code, out, err) = self.istioctl(args).await?;
        ensure!(code == 0, "istioctl {args:?}: exit code {code}: {err}{out}");
        Ok(out)
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
        let answer = http::get(self.admin, &self.admin.to_string(), &format!("/api/v1{path}"), &[]).await?;
        ensure!(answer.status == 200, "{path}: {}: {}", answer.status, answer.text());
        answer.json()
    }

    /// All rows of a list below `/api/v1`.
    ///
    /// # Errors
    ///
    /// When the answer is not a list.
    pub async fn rows(&self, path: &str) -> anyhow::Result<Vec<Value>> {
        let list: Value = self.api(path).await?;
        list.get("items").and_then(Value::as_array).cloned().with_context(|| format!("{path}: no items"))
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
        let token = text(&answer.json::<Value>()?, "/token").to_owned();
        ensure!(!token.is_empty(), "no token in {}", answer.text());
        Ok(token)
    }

    /// The row of `proxy-status` of a proxy (`name.namespace`).
    ///
    /// # Errors
    ///
    /// When it is not connected.
    pub async fn proxy(&self, name: &str) -> anyhow::Result<Value> {
        let rows = self.rows("/proxies").await?;
        rows.iter()
            .find(|r| text(r, "/name") == name)
            .cloned()
            .with_context(|| format!("{name} is not among {rows:?}"))
    }

    /// Waits until a proxy (`name.namespace`) is connected and holds everything.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn synced(&self, name: &str) -> anyhow::Result<()> {
        eventually(PATIENCE, "a proxy is synced", || async {
            let row = self.proxy(name).await?;
            let types = row.get("types").and_then(Value::as_object).context("no types")?;
            let held = |name: &str| types.get(name).and_then(Value::as_str).unwrap_or_default();
            // A proxy without routes or endpoints asks for none.
            let synced = ["CDS", "LDS"].iter().all(|name| held(name) == "SYNCED");
            ensure!(synced && !types.values().any(|s| s == "STALE" || s == "NACKED"), "{row}");
            Ok(())
        })
        .await
    }

    /// Waits until a service (short name or host) has so many healthy endpoints.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn healthy(&self, service: &str, endpoints: u64) -> anyhow::Result<()> {
        eventually(PATIENCE, "endpoints are healthy", || async {
            let row = self.service(service).await?;
            let healthy = row.get("healthy").and_then(Value::as_u64).unwrap_or_default();
            ensure!(healthy == endpoints, "{healthy} of {endpoints}: {row}");
            Ok(())
        })
        .await
    }

    /// The row of `services` of a service, by its host or the first part of it.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub async fn service(&self, name: &str) -> anyhow::Result<Value> {
        let services = self.rows("/services").await?;
        let named =
            |s: &&Value| text(s, "/hostname") == name || text(s, "/hostname").split('.').next() == Some(name);
        services.iter().find(named).cloned().with_context(|| format!("no service {name} among {services:?}"))
    }

    /// Index of a service in the loopback blocks of proxies.
    ///
    /// # Errors
    ///
    /// When there is no such service.
    pub async fn vip_index(&self, service: &str) -> anyhow::Result<u32> {
        let row = self.service(service).await?;
        Ok(u32::try_from(row.get("vipIndex").and_then(Value::as_u64).context("no index")?)?)
    }

    /// Address of a service for the application behind a proxy with this loopback block.
    ///
    /// # Errors
    ///
    /// When there is no such service.
    pub async fn address(
        &self,
        block: std::net::Ipv4Addr,
        service: &str,
        port: u16,
    ) -> anyhow::Result<SocketAddr> {
        let index = self.vip_index(service).await?;
        let address =
            xds::translate::names::block_address(block, 20, index).context("the block is too small")?;
        Ok(SocketAddr::from((address, port)))
    }

    /// Sum of the samples of one metric whose labels contain `with`.
    ///
    /// # Errors
    ///
    /// When istiod does not tell its metrics.
    pub async fn metric(&self, name: &str, with: &str) -> anyhow::Result<f64> {
        let answer = http::get(self.metrics, "istiod", "/metrics", &[]).await?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
        Ok(sum(&answer.text(), name, with))
    }
}

/// Sum of the samples of one metric in Prometheus' text whose labels contain `with`.
#[must_use]
pub fn sum(metrics: &str, name: &str, with: &str) -> f64 {
    let samples = metrics.lines().filter_map(|line| line.rsplit_once(' '));
    let ours = samples.filter(|(series, _)| {
        let (found, labels) = series.split_once('{').unwrap_or((series, ""));
        found == name && labels.contains(with)
    });
    ours.filter_map(|(_, value)| value.parse::<f64>().ok()).fold(0.0, |all, one| all + one)
}
