//! Real Consul servers of several datacenters, closed as they should be: gossip with a key, TLS with client
//! certificates, and nothing allowed without a token.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use http::Method;
use registry::source::consul::answer::{self, Answer};
use serde_json::{Value, json};

use super::real::Secured;
use crate::netns::Machine;
use crate::program::Program;
use crate::workload::{free_block, own_address};
use crate::{PATIENCE, eventually, peers};

const HTTPS: u16 = 8501;
/// Of 16 bytes, as Consul wants it.
const GOSSIP: &str = "bWVzaC1tZXNoLW1lc2gtbQ==";

/// Where a server is: an address on which nobody else listens.
#[derive(Debug, Clone)]
pub struct Site {
    address: Ipv4Addr,
    machine: Option<Machine>,
}

impl Site {
    /// A loopback address.
    ///
    /// # Errors
    ///
    /// When all are taken.
    pub fn loopback() -> anyhow::Result<Self> {
        Ok(Self { address: own_address(free_block()?), machine: None })
    }

    /// A machine of its own.
    #[must_use]
    pub fn of(machine: &Machine) -> Self {
        Self { address: machine.v4, machine: Some(machine.clone()) }
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        match &self.machine {
            Some(machine) => machine.inside(work),
            None => work(),
        }
    }
}

/// Servers; they are killed when this is dropped.
#[derive(Debug)]
pub struct Servers {
    secured: Secured,
    folder: PathBuf,
    each: Vec<Server>,
}

/// One of them.
#[derive(Debug)]
struct Server {
    name: String,
    datacenter: String,
    site: Site,
    program: Program,
}

impl Servers {
    /// Starts the servers of each datacenter, with their data and logs in `folder`, and waits until all answer. The
    /// first datacenter has the tokens.
    ///
    /// # Errors
    ///
    /// When one does not start.
    pub async fn start(folder: &Path, datacenters: &[(&str, Vec<Site>)]) -> anyhow::Result<Self> {
        let mut servers =
            Self { secured: Secured::new(folder)?, folder: folder.to_owned(), each: Vec::new() };
        let (primary, first) = datacenters.first().context("no datacenter")?;
        for (datacenter, sites) in datacenters {
            for (number, site) in (1..).zip(sites) {
                let name = format!("{datacenter}-{number}");
                let mut settings = servers.settings(&name, site.address, sites);
                settings["datacenter"] = json!(datacenter);
                settings["primary_datacenter"] = json!(primary);
                settings["retry_join_wan"] = first.iter().map(|site| site.address.to_string()).collect();
                std::fs::write(servers.folder.join(format!("{name}.json")), settings.to_string())?;
                let program = launch(folder, &name, site)?;
                let (datacenter, site) = ((*datacenter).to_owned(), site.clone());
                servers.each.push(Server { name, datacenter, site, program });
            }
        }
        servers.ready().await?;
        Ok(servers)
    }

    fn settings(&self, name: &str, address: Ipv4Addr, sites: &[Site]) -> Value {
        let token = Secured::TOKEN;
        let file = |name: &str| self.folder.join(name).display().to_string();
        let others: Vec<String> = sites.iter().map(|site| site.address.to_string()).collect();
        json!({
            "server": true, "bootstrap_expect": sites.len(), "node_name": name, "data_dir": file(name),
            "bind_addr": address, "client_addr": address, "retry_join": others, "retry_interval": "200ms",
            "retry_interval_wan": "200ms", "encrypt": GOSSIP, "performance": {"raft_multiplier": 1},
            "ports": {"http": -1, "https": HTTPS, "dns": -1, "grpc": -1},
            "ca_file": file("ca.pem"), "cert_file": file("cert.pem"), "key_file": file("key.pem"),
            "verify_incoming": true, "verify_outgoing": true, "verify_server_hostname": true,
            "acl": {"enabled": true, "default_policy": "deny", "enable_token_replication": true,
                "tokens": {"master": token, "agent": token, "replication": token}},
            "disable_update_check": true, "log_level": "warn",
        })
    }

    /// Waits until every server that runs knows a leader and its datacenter's catalog.
    ///
    /// # Errors
    ///
    /// When one does not.
    pub async fn ready(&self) -> anyhow::Result<()> {
        for place in (0..self.each.len()).filter(|place| self.runs(*place)) {
            eventually(PATIENCE * 2, "a server knows its catalog", || async {
                let answer = self.call(place, Method::GET, "/v1/catalog/services", None).await?;
                ensure!(answer::services(&answer.body)?.contains_key("consul"), "{answer:?}");
                Ok(())
            })
            .await
            .with_context(|| {
                self.each.get(place).map(|server| server.program.output()).unwrap_or_default()
            })?;
        }
        Ok(())
    }

    /// The settings by which a control plane follows these datacenters through the servers of the first.
    #[must_use]
    pub fn sources(&self) -> String {
        let first = self.each.first().map(|server| server.datacenter.as_str()).unwrap_or_default();
        let near = self.each.iter().filter(|server| server.datacenter == first);
        let addresses: Vec<String> =
            near.map(|server| format!("https://{}:{HTTPS}", server.site.address)).collect();
        let mut datacenters: Vec<&str> = self.each.iter().map(|server| server.datacenter.as_str()).collect();
        datacenters.dedup();
        let file = |name: &str| self.folder.join(name).display().to_string();
        let consul = json!({
            "addresses": addresses, "datacenters": datacenters, "tokenFile": file("token"), "caFile": file("ca.pem"),
            "certFile": file("cert.pem"), "keyFile": file("key.pem"), "serverName": "server.dc1.consul",
        });
        format!("sources: {}\n", json!({ "consul": consul }))
    }

    /// The places of the servers of a datacenter that run.
    #[must_use]
    pub fn running(&self, datacenter: &str) -> Vec<usize> {
        let of =
            |(_, server): &(usize, &Server)| server.datacenter == datacenter && server.program.is_running();
        self.each.iter().enumerate().filter(of).map(|(place, _)| place).collect()
    }

    fn runs(&self, place: usize) -> bool {
        self.each.get(place).is_some_and(|server| server.program.is_running())
    }

    /// The answer of a server, by its place, which must be a good one.
    ///
    /// # Errors
    ///
    /// When it does not answer, or refuses.
    pub async fn call(
        &self,
        place: usize,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Answer> {
        let site = self.each.get(place).context("no such server")?.site.clone();
        let client = self.secured.client(SocketAddr::from((site.address, HTTPS)))?;
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let told = path.to_owned();
        // On its machine, where the sockets of this runtime are not.
        let asking = tokio::task::spawn_blocking(move || {
            site.inside(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                Ok(runtime.block_on(async { client.send(0, method, &told, body).await })?)
            })
        });
        let answer = asking.await??;
        ensure!(answer.status == 200, "{path}: {}: {}", answer.status, answer.reason());
        Ok(answer)
    }

    /// The place of the server that leads a datacenter.
    ///
    /// # Errors
    ///
    /// When there is none, or nobody says.
    pub async fn leader(&self, datacenter: &str) -> anyhow::Result<usize> {
        let asked = *self.running(datacenter).first().context("no server")?;
        let answer = self.call(asked, Method::GET, "/v1/status/leader", None).await?;
        let leader: String = serde_json::from_slice(&answer.body)?;
        let leads = |server: &Server| leader.starts_with(&format!("{}:", server.site.address));
        self.each.iter().position(leads).with_context(|| format!("no leader among them: {leader:?}"))
    }

    /// `kill -9` of a server, by its place.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled.
    pub fn kill(&mut self, place: usize) -> anyhow::Result<()> {
        self.each.get_mut(place).context("no such server")?.program.kill()
    }

    /// Starts servers that were killed again, with their data.
    ///
    /// # Errors
    ///
    /// When one does not start.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        let folder = self.folder.clone();
        for server in self.each.iter_mut().filter(|server| !server.program.is_running()) {
            server.program = launch(&folder, &server.name, &server.site)?;
        }
        self.ready().await
    }
}

fn launch(folder: &Path, name: &str, site: &Site) -> anyhow::Result<Program> {
    let consul = peers::find("consul/consul")?;
    let file = folder.join(format!("{name}.json")).display().to_string();
    let args = ["agent".to_owned(), format!("-config-file={file}")];
    site.inside(|| Program::start(&consul, folder, name, &args))
}
