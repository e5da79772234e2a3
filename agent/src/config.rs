//! What an agent is told.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use ca::authn::JoinToken;
use ca::identity::SpiffeId;
use ca::seal::SealingKey;
use ca::tls::{ExpectedIdentities, IdentityWatch};
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
use proxy::supervisor::Inherited;
use proxy::xds::client::Protocol;
use proxy::xds::decode::Address;
use proxy::xds::transport::{ServerTls, Settings};
use tokio::sync::watch;
use wire::mesh::WatchNamesRequest;

use crate::dns::Dns;
use crate::register::Workload;

/// Name that is sent to the control plane (SNI); who answers is decided by its identity.
const CONTROL_PLANE_NAME: &str = "istiod.istio-system.svc";

/// One agent.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder for key, certificate and membership; only its owner may read it.
    pub data_dir: PathBuf,
    /// Key under which the folder is sealed, when somebody hands it over; otherwise the folder has its own.
    pub key: Option<SealingKey>,
    /// Join token; not needed after the first start.
    pub token: Option<JoinToken>,
    /// Addresses of the control plane that replace the token's, until it tells its members.
    pub endpoints: Vec<String>,
    /// What sets this agent apart from others: its order of preference among members depends on it.
    pub node: String,
    /// Lifetime to ask certificates for; the control plane's default when `None`.
    pub certificate_lifetime: Option<Duration>,
    /// What is answered to DNS queries.
    pub dns: Dns,
    /// What to register; `None` for a proxy without an application.
    pub workload: Option<Workload>,
    /// What sits in the data plane's seat.
    pub seat: Seat,
}

impl Config {
    /// Which names are asked for.
    #[must_use]
    pub fn names(&self) -> WatchNamesRequest {
        match &self.seat {
            Seat::Proxy(proxy) => WatchNamesRequest {
                labels: proxy.labels.clone().into_iter().collect(),
                loopback_block: proxy
                    .loopback_block
                    .map_or_else(String::new, |(base, prefix)| format!("{base}/{prefix}")),
            },
            Seat::Secrets { .. } => WatchNamesRequest::default(),
        }
    }
}

/// What sits in the data plane's seat.
#[derive(Debug, Clone)]
pub enum Seat {
    /// Our proxy, in this process.
    Proxy(Box<ProxySeat>),
    /// A stock Envoy, which gets its certificate from this Unix socket.
    Secrets {
        /// Path of the socket.
        socket: PathBuf,
    },
}

impl Seat {
    /// Whether the proxy in it takes captured traffic, on one port for all.
    #[must_use]
    pub fn is_captured(&self) -> bool {
        matches!(self, Self::Proxy(proxy) if proxy.loopback_block.is_none())
    }
}

/// Our proxy beside one workload.
#[derive(Debug, Clone)]
pub struct ProxySeat {
    /// Workload name.
    pub name: String,
    /// Addresses of the workload; other proxies reach it at the first.
    pub addresses: Vec<IpAddr>,
    /// Labels of the workload.
    pub labels: BTreeMap<String, String>,
    /// Network address and prefix length of the loopback block; `None` when traffic is captured.
    pub loopback_block: Option<(Ipv4Addr, u8)>,
    /// Workload port to the address where the application listens.
    pub forward: BTreeMap<u16, SocketAddr>,
    /// Admin address.
    pub admin: SocketAddr,
    /// Address of `/stats/prometheus`.
    pub stats: SocketAddr,
    /// Address of `/healthz/ready`.
    pub readiness: SocketAddr,
    /// Worker threads.
    pub workers: usize,
    /// How long open requests may take to finish at the end.
    pub drain: Duration,
    /// Listening sockets that the process before this one left.
    pub inherited: Inherited,
}

impl ProxySeat {
    /// What the proxy is told: who it is, and a control plane of these members that it trusts by its identity.
    ///
    /// # Errors
    ///
    /// An address that is none, or an identity that TLS cannot use.
    pub fn config(
        self,
        members: watch::Receiver<Vec<String>>,
        identity: IdentityWatch,
    ) -> anyhow::Result<proxy::config::Config> {
        let spiffe_id = identity.borrow().spiffe_id.clone();
        let (namespace, service_account) = spiffe_id.workload_parts().unwrap_or_default();
        let control_plane = ExpectedIdentities::one(SpiffeId::control_plane(&spiffe_id.trust_domain()));
        let tls = ca::tls::client_config(identity.clone(), control_plane, &[b"h2"])?;
        let servers = members.borrow().iter().map(|e| address(e)).collect::<anyhow::Result<_>>()?;
        let name = rustls::pki_types::ServerName::try_from(CONTROL_PLANE_NAME)?;
        let mut config = proxy::config::Config::new(self.node(namespace, service_account));
        config.xds = Some(Settings {
            servers,
            members: Some(members),
            tls: Some(ServerTls { config: tls, name: Some(name) }),
            protocol: Protocol::Delta,
            authority: None,
        });
        config.identity = Some(identity);
        config.admin = Some(Address::Socket(self.admin));
        config.stats = Some(self.stats);
        config.ready = Some(self.readiness);
        config.workers = self.workers;
        config.drain = self.drain;
        config.inherited = self.inherited;
        Ok(config)
    }

    fn node(&self, namespace: &str, service_account: &str) -> Node {
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        let first = addresses.first().map_or("127.0.0.1", String::as_str);
        let mut metadata = vec![
            ("NAME", text(&self.name)),
            ("NAMESPACE", text(namespace)),
            ("WORKLOAD_NAME", text(&self.name)),
            ("SERVICE_ACCOUNT", text(service_account)),
            ("CLUSTER_ID", text("default")),
            ("ISTIO_VERSION", text(env!("CARGO_PKG_VERSION"))),
            ("PROXY_KIND", text("istio-proxy")),
            ("LABELS", fields(self.labels.iter().map(|(k, v)| (k.clone(), text(v))))),
            ("INSTANCE_IPS", text(&addresses.join(","))),
        ];
        match self.loopback_block {
            None => metadata.push(("INTERCEPTION_MODE", text("REDIRECT"))),
            Some((base, prefix)) => {
                metadata.push(("INTERCEPTION_MODE", text("NONE")));
                metadata.push(("LOOPBACK_BLOCK", text(&format!("{base}/{prefix}"))));
            }
        }
        let forward = self.forward.iter().map(|(port, to)| (port.to_string(), text(&to.to_string())));
        metadata.push(("INBOUND_FORWARD", fields(forward)));
        Node {
            id: format!("sidecar~{first}~{}.{namespace}~{namespace}.svc.cluster.local", self.name),
            cluster: format!("{}.{namespace}", self.labels.get("app").unwrap_or(&self.name)),
            metadata: Some(Struct { fields: metadata.into_iter().map(|(k, v)| (k.to_owned(), v)).collect() }),
            ..Node::default()
        }
    }
}

fn address(endpoint: &str) -> anyhow::Result<Address> {
    Address::parse(endpoint).with_context(|| format!("`{endpoint}` is not HOST:PORT"))
}

fn text(value: &str) -> Value {
    Value { kind: Some(Kind::StringValue(value.to_owned())) }
}

fn fields(fields: impl Iterator<Item = (String, Value)>) -> Value {
    Value { kind: Some(Kind::StructValue(Struct { fields: fields.collect() })) }
}
