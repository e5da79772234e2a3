//! One connected data plane: what `translate` may know about it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ca::identity::SpiffeId;
use registry::model::service::Locality;

/// How traffic reaches the proxy (node metadata `INTERCEPTION_MODE`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Interception {
    /// Captured on 15001 and 15006; the original destination decides.
    Captured,
    /// No capture: listeners on addresses of a loopback block (node metadata `LOOPBACK_BLOCK`).
    Explicit {
        /// Network address of the block.
        base: std::net::Ipv4Addr,
        /// Prefix length of the block, 8 to 24.
        prefix: u8,
    },
}

/// A connected proxy, as its node metadata and its certificate describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Node id, `sidecar~<ip>~<workload>.<namespace>~<domain>`.
    pub id: String,
    /// Workload instance name.
    pub name: String,
    /// Workload name, for telemetry.
    pub workload: String,
    /// Namespace whose configuration applies.
    pub namespace: String,
    /// Service account of the workload.
    pub service_account: String,
    /// The identity of its certificate, when it authenticated with one.
    pub identity: Option<SpiffeId>,
    /// Workload labels: selectors match on them.
    pub labels: BTreeMap<String, String>,
    /// Addresses of the workload; services whose endpoints have one of them are inbound.
    pub addresses: Vec<IpAddr>,
    /// Cluster id.
    pub cluster: String,
    /// Network.
    pub network: String,
    /// Where it runs.
    pub locality: Locality,
    /// How traffic reaches it.
    pub interception: Interception,
    /// Workload port to the address where the application listens, when it is not the port itself.
    pub inbound_forward: BTreeMap<u16, String>,
    /// Our own proxy, which needs no filters of Istio's build of Envoy and knows features beyond stock Envoy.
    pub native: bool,
}
