//! Resources: what one proxy should hold, by type and name.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::google::protobuf::Any;

/// The resource types we serve, in the order in which a push sends them (make before break: clusters and
/// endpoints exist before the listeners and routes that name them).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Type {
    /// `envoy.config.cluster.v3.Cluster`
    Cluster,
    /// `envoy.config.endpoint.v3.ClusterLoadAssignment`
    Endpoint,
    /// `envoy.config.listener.v3.Listener`
    Listener,
    /// `envoy.config.route.v3.RouteConfiguration`
    Route,
}

impl Type {
    /// Every type, in push order.
    pub const ALL: [Self; 4] = [Self::Cluster, Self::Endpoint, Self::Listener, Self::Route];

    /// The type URL on the wire.
    #[must_use]
    pub fn url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoint => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        }
    }

    /// The type of a URL, if we serve it.
    #[must_use]
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.url() == url)
    }
}

/// One encoded resource. Immutable and shared between the proxies that see the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Name, unique in its type.
    pub name: String,
    /// Hash of the resource's content, equal on every member; deterministic (maps are encoded in key order).
    pub version: u64,
    /// The resource, ready to be sent.
    pub body: Any,
}

/// Everything one proxy should hold at one revision.
#[derive(Debug, Clone, Default)]
pub struct Resources {
    /// By type, then by name.
    pub by_type: BTreeMap<Type, BTreeMap<String, Arc<Resource>>>,
}
