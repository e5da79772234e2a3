//! Every setting of a proxy, its default and its unit.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ca::tls::IdentityWatch;
use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
use envoy_types::pb::envoy::config::core::v3::Node;

use crate::overload;
use crate::supervisor::Inherited;
use crate::tables::Update;
use crate::xds::decode::{Address, json};
use crate::xds::last_good::LastGood;
use crate::xds::transport;

/// How long open requests may take to end, unless said otherwise (Istio's `terminationDrainDuration`).
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(5);

/// Everything a proxy is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who this proxy is.
    pub node: Node,
    /// Where its control plane is; `None`: only static resources count.
    pub xds: Option<transport::Settings>,
    /// Where what the control plane said last is kept; `None`: nowhere.
    pub last_good: Option<LastGood>,
    /// Resources that are there from the start.
    pub static_resources: Update,
    /// The certificate that the secrets `default` and `ROOTCA` stand for, with its renewals.
    pub identity: Option<IdentityWatch>,
    /// Where the admin port listens; `None`: nowhere. Loopback or a Unix socket.
    pub admin: Option<Address>,
    /// Where `/stats/prometheus` is served for everybody; `None`: nowhere.
    pub stats: Option<SocketAddr>,
    /// Where `/healthz/ready` is served for everybody; `None`: nowhere.
    pub ready: Option<SocketAddr>,
    /// How many data workers; 0: one per core.
    pub workers: usize,
    /// How long open requests may take to end.
    pub drain: Duration,
    /// What is too much, and what is done then.
    pub overload: overload::Config,
    /// Listening sockets that the process before this one left.
    pub inherited: Inherited,
    /// Whether listeners without a `traffic_direction` report Istio's standard metrics, too.
    pub reports_all: bool,
    /// The bootstrap file, for the configuration dump.
    pub bootstrap: Option<Arc<Bootstrap>>,
    /// Where the bootstrap file is, for `/server_info`.
    pub bootstrap_path: Option<PathBuf>,
}

impl Config {
    /// A proxy with this node, without resources, servers or ports.
    #[must_use]
    pub fn new(node: Node) -> Self {
        Self {
            node,
            xds: None,
            last_good: None,
            static_resources: Update::default(),
            identity: None,
            admin: None,
            stats: None,
            ready: None,
            workers: 0,
            drain: DEFAULT_DRAIN,
            overload: overload::Config::default(),
            inherited: Inherited::default(),
            reports_all: false,
            bootstrap: None,
            bootstrap_path: None,
        }
    }
}

/// What a node says about its workload, read once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's id.
    pub id: Arc<str>,
    /// The node's cluster (`app.namespace`).
    pub cluster: Arc<str>,
    /// The workload instance's name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// The workload's name.
    pub workload: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// The cluster that it belongs to.
    pub cluster_id: Arc<str>,
    /// The mesh that it belongs to.
    pub mesh_id: Arc<str>,
    /// Its labels, in order.
    pub labels: Vec<(Arc<str>, Arc<str>)>,
    /// It is a workload of a mesh: its node says a namespace. Only then peers are told who it is.
    pub is_mesh: bool,
}

impl NodeFacts {
    /// From a node's proto. What is not said stays empty.
    #[must_use]
    pub fn new(node: &Node) -> Self {
        let metadata = json(node.metadata.clone().unwrap_or_default());
        let text =
            |key: &str| -> Arc<str> { metadata.get(key).and_then(|v| v.as_str()).unwrap_or_default().into() };
        let labels = metadata.get("LABELS").and_then(|l| l.as_object());
        let labels = labels.into_iter().flatten();
        let labels = labels.filter_map(|(k, v)| Some((k.as_str().into(), v.as_str()?.into()))).collect();
        Self {
            id: node.id.as_str().into(),
            cluster: node.cluster.as_str().into(),
            name: text("NAME"),
            namespace: text("NAMESPACE"),
            workload: text("WORKLOAD_NAME"),
            service_account: text("SERVICE_ACCOUNT"),
            cluster_id: text("CLUSTER_ID"),
            mesh_id: text("MESH_ID"),
            labels,
            is_mesh: metadata.contains_key("NAMESPACE"),
        }
    }

    /// The value of a label.
    #[must_use]
    pub fn label(&self, name: &str) -> Option<&Arc<str>> {
        self.labels.iter().find(|(k, _)| **k == *name).map(|(_, v)| v)
    }
}
