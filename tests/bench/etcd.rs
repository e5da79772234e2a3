//! etcd of Debian, three members on loopback addresses, and what is needed of its API.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use tests::program::Program;
use tests::workload::{free_block, own_address};
use tests::{PATIENCE, eventually};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

/// Three members; they end when this is dropped.
pub(crate) struct Etcd {
    clients: Vec<String>,
    _members: Vec<Program>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(string, tag = "2")]
    version: String,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

impl Etcd {
    /// Starts the members with their data below `folder`.
    pub(crate) async fn start(folder: &Path) -> anyhow::Result<(Self, String)> {
        let program = program()?;
        let addresses: anyhow::Result<Vec<Ipv4Addr>> =
            (0..3).map(|_| Ok(own_address(free_block()?))).collect();
        let addresses = addresses?;
        let named = || addresses.iter().enumerate().map(|(number, address)| (format!("m{number}"), address));
        let peers: Vec<String> =
            named().map(|(name, address)| format!("{name}=http://{address}:2380")).collect();
        let mut members = Vec::new();
        for (name, address) in named() {
            let (client, peer) = (format!("http://{address}:2379"), format!("http://{address}:2380"));
            let data = folder.join(&name).display().to_string();
            let args = [
                ("--name", name.as_str()),
                ("--data-dir", &data),
                ("--listen-client-urls", &client),
                ("--advertise-client-urls", &client),
                ("--listen-peer-urls", &peer),
                ("--initial-advertise-peer-urls", &peer),
                ("--initial-cluster", &peers.join(",")),
                ("--initial-cluster-state", "new"),
                ("--log-level", "error"),
            ]
            .into_iter()
            .flat_map(|(flag, value)| [flag.to_owned(), value.to_owned()])
            .collect::<Vec<_>>();
            members.push(Program::start(&program, folder, &name, &args)?);
        }
        let etcd = Self {
            clients: addresses.iter().map(|address| format!("http://{address}:2379")).collect(),
            _members: members,
        };
        let version =
            eventually(PATIENCE, "etcd has a leader", || async { Ok(etcd.leader().await?.1) }).await?;
        Ok((etcd, version))
    }

    /// The member that leads, and its version.
    async fn leader(&self) -> anyhow::Result<(&String, String)> {
        for client in &self.clients {
            let mut writer = Writer::connect(client).await?;
            let status: StatusResponse =
                writer.call("/etcdserverpb.Maintenance/Status", StatusRequest {}).await?;
            let id = status.header.context("no header")?.member_id;
            if id == status.leader {
                return Ok((client, status.version));
            }
        }
        anyhow::bail!("nobody leads")
    }

    /// A connection to the leader for each writer.
    pub(crate) async fn writers(&self, count: usize) -> anyhow::Result<Vec<Writer>> {
        let (leader, _) = self.leader().await?;
        let mut writers = Vec::new();
        for _ in 0..count {
            writers.push(Writer::connect(leader).await?);
        }
        Ok(writers)
    }
}

/// A connection.
pub(crate) struct Writer(Grpc<Channel>);

impl Writer {
    async fn connect(address: &str) -> anyhow::Result<Self> {
        let endpoint = Endpoint::from_shared(address.to_owned())?.tcp_nodelay(true);
        Ok(Self(Grpc::new(endpoint.connect().await?)))
    }

    async fn call<Q, A>(&mut self, path: &'static str, request: Q) -> anyhow::Result<A>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.0.ready().await?;
        let codec = ProstCodec::default();
        let request = tonic::Request::new(request);
        Ok(self.0.unary(request, PathAndQuery::from_static(path), codec).await?.into_inner())
    }

    pub(crate) async fn put(&mut self, key: &str, value: &str) -> anyhow::Result<()> {
        let request = PutRequest { key: key.into(), value: value.into() };
        self.call::<_, PutResponse>("/etcdserverpb.KV/Put", request).await.map(drop)
    }
}

/// The program: the system's, or unpacked from Debian's package into the folder of peers, as `tests/run` does.
fn program() -> anyhow::Result<PathBuf> {
    let system = PathBuf::from("/usr/bin/etcd");
    if system.exists() {
        return Ok(system);
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no workspace")?;
    let folder = target.join("target/peers/etcd");
    let unpacked = folder.join("usr/bin/etcd");
    if !unpacked.exists() {
        std::fs::create_dir_all(&folder)?;
        let script = "apt-get -qq download etcd-server && dpkg -x etcd-server_*.deb .";
        let status = Command::new("sh").args(["-c", script]).current_dir(&folder).status()?;
        ensure!(
            status.success() && unpacked.exists(),
            "no etcd: `apt-get install etcd-server` brings it, or `apt-get update` so that it can be fetched"
        );
    }
    Ok(unpacked)
}
