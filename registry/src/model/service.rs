//! Services and their endpoints, as every source describes them and as `translate` reads them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A fully qualified host name in lower case: `reviews.default.svc.cluster.local`, `api.example.com`,
/// or a wildcard with a leading `*.`.
pub type Hostname = String;

/// The application protocol of a port, from `appProtocol` or from the port's name.
///
/// Source: Istio, "Protocol Selection".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// HTTP/1.1, with upgrade to whatever the client speaks when the port is shared.
    Http,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC over HTTP/2.
    Grpc,
    /// gRPC-Web over HTTP/1.1 or HTTP/2.
    GrpcWeb,
    /// TLS that carries HTTP; routed by SNI, not terminated.
    Https,
    /// TLS routed by SNI.
    Tls,
    /// Opaque bytes.
    Tcp,
    /// Datagrams; known, but not proxied.
    Udp,
    /// MongoDB wire protocol, treated as TCP.
    Mongo,
    /// MySQL wire protocol, treated as TCP.
    MySql,
    /// Redis wire protocol, treated as TCP.
    Redis,
    /// Nothing was declared: the first bytes decide.
    Auto,
}

impl Protocol {
    /// HTTP/1, HTTP/2 or gRPC, readable by the proxy.
    #[must_use]
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// Spoken as HTTP/2 towards the endpoint.
    #[must_use]
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc)
    }

    /// TLS that the proxy passes through.
    #[must_use]
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }
}

/// One port of a [`Service`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// The port's name, unique in its service.
    pub name: String,
    /// The port number that clients use, 1 to 65535.
    pub number: u16,
    /// The port of the endpoints, when it differs from `number` and an endpoint does not name its own.
    pub target_port: Option<u16>,
    /// What is spoken on it.
    pub protocol: Protocol,
}

/// How the endpoints of a service are found (Istio `ServiceEntry.resolution`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Resolution {
    /// The original destination of the connection.
    None,
    /// The endpoints we know.
    Static,
    /// Every address that DNS returns.
    Dns,
    /// One address that DNS returns, chosen at connect time.
    DnsRoundRobin,
    /// Resolved by the request's host.
    DynamicDns,
}

/// Whether a service belongs to the mesh (Istio `ServiceEntry.location`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Location {
    /// Outside: no automatic mTLS, no identity check.
    External,
    /// Inside.
    Internal,
}

/// Where an object came from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SourceId {
    /// A `ServiceEntry` or `WorkloadEntry` in the configuration store.
    Config,
    /// A registered workload (VM agent).
    Workload,
    /// A Kubernetes cluster, by cluster id.
    Kubernetes(String),
    /// A Consul datacenter, as `cluster/datacenter`.
    Consul(String),
    /// A folder of files, by name.
    File(String),
}

/// A service of the mesh: what clients name, before any endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The host clients use.
    pub hostname: Hostname,
    /// Short name for labels and metrics: the first label of a mesh host, else the whole host.
    pub name: String,
    /// Namespace of the object that declared it.
    pub namespace: String,
    /// Ports in the order of their declaration.
    pub ports: Vec<ServicePort>,
    /// Declared virtual addresses: IPs or CIDRs.
    pub addresses: Vec<String>,
    /// Stable index, unique among services, from which the automatic addresses are made:
    /// 240.240.0.0/16 + index (Istio's range), and the loopback block of proxies without capture.
    pub vip_index: u32,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Mesh-internal or external.
    pub location: Location,
    /// Namespaces that may see it: `*`, `.`, `~` or names, as Istio's `exportTo`; never empty.
    pub export_to: Vec<String>,
    /// Subject alternative names that replace the endpoints' identities when the client verifies the server.
    pub subject_alt_names: Vec<String>,
    /// Labels of the declaring object.
    pub labels: BTreeMap<String, String>,
    /// Creation time of the declaring object in seconds since 1970; the oldest wins conflicts.
    pub created: i64,
    /// Who declared it.
    pub source: SourceId,
}

/// Region, zone and subzone.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Locality {
    /// Region, for example a data centre.
    pub region: String,
    /// Zone within the region.
    pub zone: String,
    /// Subzone within the zone, for example a rack.
    pub subzone: String,
}

impl Locality {
    /// Parses `region/zone/subzone`; missing parts are empty.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '/').map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        Self { region: next(), zone: next(), subzone: next() }
    }
}

impl fmt::Display for Locality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.zone.is_empty(), self.subzone.is_empty()) {
            (_, false) => write!(f, "{}/{}/{}", self.region, self.zone, self.subzone),
            (false, true) => write!(f, "{}/{}", self.region, self.zone),
            (true, true) => f.write_str(&self.region),
        }
    }
}

/// Whether an endpoint may be sent traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Health {
    /// Serving.
    Healthy,
    /// Known and not serving.
    Unhealthy,
    /// Finishing what it has.
    Draining,
}

/// Whether an endpoint's proxy speaks mTLS (label `security.istio.io/tlsMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TlsMode {
    /// A proxy is in front of it: mTLS with SPIFFE identities.
    Istio,
    /// Plain text.
    Disabled,
}

/// One address that serves one or more ports of a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Endpoint {
    /// IP address, DNS name, or `unix:///path`.
    pub address: String,
    /// Service port name to endpoint port, where they differ from the service's own.
    pub ports: BTreeMap<String, u16>,
    /// Load-balancing weight, 1 or more.
    pub weight: u32,
    /// Where it runs.
    pub locality: Locality,
    /// Network it is reachable in; empty is the default network.
    pub network: String,
    /// Labels of the workload, for subsets and telemetry.
    pub labels: BTreeMap<String, String>,
    /// Name of the workload, for telemetry.
    pub workload: String,
    /// Namespace of the workload.
    pub namespace: String,
    /// Cluster id of the source.
    pub cluster: String,
    /// Service account, from which the expected SPIFFE identity follows; empty when it has none.
    pub service_account: String,
    /// mTLS or not.
    pub tls_mode: TlsMode,
    /// May it be sent traffic.
    pub health: Health,
}
