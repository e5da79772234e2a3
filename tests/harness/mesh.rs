//! A mesh on loopback addresses: istiod, echoes behind proxies, and clients' proxies.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::echo::Echo;
use crate::envoy::{Envoy, Form};
use crate::http::{self, Answer};
use crate::istiod::Istiod;
use crate::workload::{Workload, WorkloadSpec};
use crate::{PATIENCE, eventually};

/// A mesh with all its processes; they end when it is dropped.
///
/// A test ends with [`Mesh::finish`], which looks at the logs; a mesh that is dropped before shows their last lines.
#[derive(Debug)]
pub struct Mesh {
    /// The control plane.
    pub istiod: Istiod,
    workloads: BTreeMap<String, Workload>,
    echoes: BTreeMap<String, Echo>,
    envoys: BTreeMap<String, Envoy>,
    finished: bool,
    folder: TempDir,
}

impl Mesh {
    /// Starts istiod with further flags, a service on port 80 for each server (`app-version`; an [`Echo`] of that
    /// name behind a proxy), and a proxy for each client; all are synced and the servers healthy when it returns.
    ///
    /// # Errors
    ///
    /// What did not start.
    pub async fn start(flags: &[&str], servers: &[&str], clients: &[&str]) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
        let istiod = Istiod::start(folder.path(), flags).await;
        let istiod = istiod.inspect_err(|_| last_words(folder.path()))?;
        let mut mesh = Self {
            istiod,
            workloads: BTreeMap::new(),
            echoes: BTreeMap::new(),
            envoys: BTreeMap::new(),
            finished: false,
            folder,
        };
        let apps: BTreeMap<&str, u64> = servers.iter().fold(BTreeMap::new(), |mut apps, server| {
            *apps.entry(app_of(server)).or_default() += 1;
            apps
        });
        if !apps.is_empty() {
            mesh.istiod.apply(&apps.keys().map(|app| service(app)).collect::<String>()).await?;
        }
        for server in servers {
            mesh.server(server).await?;
        }
        for client in clients {
            mesh.workload(&WorkloadSpec::client(client)).await?;
        }
        for workload in servers.iter().chain(clients) {
            mesh.istiod.synced(&format!("{workload}.default")).await?;
        }
        for (app, endpoints) in apps {
            mesh.istiod.healthy(app, endpoints).await?;
        }
        Ok(mesh)
    }

    /// Starts an echo and its proxy.
    ///
    /// # Errors
    ///
    /// When one cannot be started.
    pub async fn server(&mut self, name: &str) -> anyhow::Result<()> {
        self.serve(name, Echo::start(name).await?).await
    }

    /// Starts a proxy in front of an application on port 80.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub async fn serve(&mut self, name: &str, echo: Echo) -> anyhow::Result<()> {
        let version = name.rsplit_once('-').map_or("", |(_, version)| version);
        let spec = WorkloadSpec::server(app_of(name), version, echo.address);
        self.echoes.insert(name.to_owned(), echo);
        self.workload(&spec).await
    }

    /// Keeps an application that runs.
    pub fn hold(&mut self, name: &str, echo: Echo) {
        self.echoes.insert(name.to_owned(), echo);
    }

    /// Starts a workload.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub async fn workload(&mut self, spec: &WorkloadSpec) -> anyhow::Result<()> {
        let workload = Workload::start(&self.istiod, self.folder.path(), spec).await?;
        self.workloads.insert(spec.name.clone(), workload);
        Ok(())
    }

    /// Starts a workload behind a stock Envoy, with an echo of its name when it is to be a server.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn seat_envoy(&mut self, mut spec: WorkloadSpec, form: Form) -> anyhow::Result<()> {
        if spec.labels.contains_key("app") {
            let echo = Echo::start(&spec.name).await?;
            spec.forward = [(80, echo.address)].into();
            self.echoes.insert(spec.name.clone(), echo);
        }
        let envoy = Envoy::start(&self.istiod, self.folder.path(), &spec, form).await?;
        envoy.ready().await?;
        self.envoys.insert(spec.name.clone(), envoy);
        self.istiod.synced(&format!("{}.default", spec.name)).await
    }

    /// A stock Envoy by the name of its workload.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn envoy(&self, name: &str) -> anyhow::Result<&Envoy> {
        self.envoys.get(name).with_context(|| format!("no envoy {name}"))
    }

    /// A workload by its name.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn of(&self, name: &str) -> anyhow::Result<&Workload> {
        self.workloads.get(name).with_context(|| format!("no workload {name}"))
    }

    /// A workload by its name, to end or to restart it.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn of_mut(&mut self, name: &str) -> anyhow::Result<&mut Workload> {
        self.workloads.get_mut(name).with_context(|| format!("no workload {name}"))
    }

    /// The application behind the proxy of a workload.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn echo(&self, name: &str) -> anyhow::Result<&Echo> {
        self.echoes.get(name).with_context(|| format!("no echo {name}"))
    }

    /// Folder of all data and logs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Address of a service, for the application behind the proxy of `from`.
    ///
    /// # Errors
    ///
    /// When there is no such workload or service.
    pub async fn address(&self, from: &str, service: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let block =
            self.workloads.get(from).map(|w| w.block).or_else(|| self.envoys.get(from).map(|e| e.block));
        self.istiod.address(block.with_context(|| format!("no workload {from}"))?, service, port).await
    }

    /// `GET` of a service on port 80, through the proxy of `from`.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub async fn get(
        &self,
        from: &str,
        service: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Answer> {
        http::get(self.address(from, service, 80).await?, service, path, headers).await
    }

    /// Waits until a service answers 200 through the proxy of `from`.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn answers(&self, from: &str, service: &str) -> anyhow::Result<Answer> {
        eventually(PATIENCE, "a service answers", || async {
            let answer = self.get(from, service, "/", &[]).await?;
            ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
            Ok(answer)
        })
        .await
    }

    /// The end of a test: no program may have written a warning or an error, but for those that contain one of
    /// `expected`.
    ///
    /// # Errors
    ///
    /// The first unexpected line.
    pub fn finish(mut self, expected: &[&str]) -> anyhow::Result<()> {
        for (name, log) in logs(self.folder.path())? {
            let warned = |line: &&str| ["WARN", "ERROR"].iter().any(|level| line.contains(level));
            let unexpected =
                log.lines().filter(warned).find(|line| !expected.iter().any(|e| line.contains(e)));
            ensure!(unexpected.is_none(), "{name}: {}", unexpected.unwrap_or_default());
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if !self.finished {
            last_words(self.folder.path());
        }
    }
}

/// Name and content of every log below a folder.
fn logs(folder: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "log") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            logs.push((name, String::from_utf8_lossy(&std::fs::read(&path)?).into_owned()));
        }
    }
    logs.sort();
    Ok(logs)
}

/// Shows the end of every log, for a test that has failed.
#[expect(clippy::print_stderr, reason = "a test that failed says why")]
pub fn last_words(folder: &Path) {
    for (name, log) in logs(folder).unwrap_or_default() {
        let lines: Vec<&str> = log.lines().collect();
        for line in lines.get(lines.len().saturating_sub(30)..).unwrap_or_default() {
            eprintln!("{name}: {}", line.get(..600).unwrap_or(line));
        }
    }
}

fn app_of(server: &str) -> &str {
    server.rsplit_once('-').map_or(server, |(app, _)| app)
}

/// YAML of a mesh-internal HTTP service on port 80 whose endpoints have label `app: NAME`.
#[must_use]
pub fn service(name: &str) -> String {
    service_with(name, "{number: 80, name: http, protocol: HTTP}")
}

/// YAML of a mesh-internal service with these ports whose endpoints have label `app: NAME`.
#[must_use]
pub fn service_with(name: &str, ports: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec:\n  \
         hosts: [{name}.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
         ports: [{ports}]\n  workloadSelector: {{labels: {{app: {name}}}}}\n---\n"
    )
}

/// YAML of STRICT mTLS in the namespace.
#[must_use]
pub fn strict() -> &'static str {
    "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default}\nspec: {mtls: {mode: STRICT}}\n---\n"
}

/// YAML of a VirtualService with these `http` routes (YAML, flow or block style at indentation 2).
#[must_use]
pub fn routes(host: &str, http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {host}}}\nspec:\n  hosts: [{host}]\n  http:\n{http}\n---\n"
    )
}

/// YAML of a DestinationRule with a subset for each version, and further fields of its spec.
#[must_use]
pub fn subsets(host: &str, versions: &[&str]) -> String {
    let subsets: Vec<String> =
        versions.iter().map(|v| format!("{{name: {v}, labels: {{version: {v}}}}}")).collect();
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {host}}}\nspec:\n  host: {host}\n  \
         subsets: [{}]\n---\n",
        subsets.join(", ")
    )
}
