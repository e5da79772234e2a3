//! Traffic: VirtualService, DestinationRule, Gateway, ServiceEntry and Sidecar (`networking.istio.io`).

use std::collections::BTreeMap;

use crate::config::decode::{Decode, Decoder, OneOf, enumeration, message, oneof};
use crate::config::node::Node;

mod destination_rule;
mod gateway;
mod service_entry;
mod sidecar;
mod virtual_service;

pub use destination_rule::*;
pub use gateway::*;
pub use service_entry::*;
pub use sidecar::*;
pub use virtual_service::*;

/// How a text is compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// Begins with.
    Prefix(String),
    /// The whole text matches this RE2 expression.
    Regex(String),
    /// Nothing was asked for: the value only has to be there.
    #[default]
    Present,
}

oneof! {
    /// The one field of a [`StringMatch`] that may be set.
    pub enum StringMatchType {
        /// Equal.
        Exact(String) = "exact",
        /// Begins with.
        Prefix(String) = "prefix",
        /// The whole text matches.
        Regex(String) = "regex",
    }
}

impl Decode for StringMatch {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        let mut choice: Option<StringMatchType> = None;
        for entry in cx.map(node)? {
            if StringMatchType::NAMES.contains(&entry.key.as_str()) {
                cx.one_of(&entry.key, entry, &mut choice);
            } else {
                cx.unknown(entry, StringMatchType::NAMES);
            }
        }
        Some(match choice {
            Some(StringMatchType::Exact(text)) => Self::Exact(text),
            Some(StringMatchType::Prefix(text)) => Self::Prefix(text),
            Some(StringMatchType::Regex(text)) => Self::Regex(text),
            None => Self::Present,
        })
    }
}

message! {
    /// Selects workloads by label; used by the kinds whose field is `workloadSelector` with `labels`.
    pub struct LabelsSelector {
        /// All of these must be on the workload; none selects every workload in scope.
        labels: BTreeMap<String, String> = "labels";
    }

    /// Selects workloads by label; used by the kinds whose selector has `matchLabels`.
    pub struct WorkloadSelector {
        /// All of these must be on the workload; none selects every workload in scope.
        match_labels: BTreeMap<String, String> = "matchLabels";
    }

    /// The object a policy is attached to.
    pub struct PolicyTargetReference {
        /// API group; empty is the core group.
        group: String = "group";
        /// Kind: `Gateway`, `GatewayClass`, `Service` or `ServiceEntry`.
        kind: String = "kind";
        /// Name.
        name: String = "name";
        /// Namespace; must be that of the policy when set.
        namespace: String = "namespace";
    }

    /// Where traffic is sent.
    pub struct Destination {
        /// Host of a service in the registry; a short name belongs to the namespace of the object.
        host: String = "host";
        /// A subset that a DestinationRule of this host names.
        subset: String = "subset";
        /// The port; may be absent when the service has one port only.
        port: Option<PortSelector> = "port";
    }

    /// A port by number.
    pub struct PortSelector {
        /// Port, 1 to 65535.
        number: u16 = "number";
    }

    /// A share of requests, 0 to 100.
    pub struct Percent {
        /// In percent.
        value: f64 = "value";
    }

    /// A port of a service, a gateway or a sidecar's listener.
    pub struct Port {
        /// Port, 1 to 65535.
        number: u16 = "number";
        /// HTTP, HTTPS, GRPC, HTTP2, MONGO, TCP, TLS and so on.
        protocol: String = "protocol";
        /// Name, unique among its neighbours.
        name: String = "name";
        /// Port of the endpoints, when it differs; 0 when it does not. Only services have one.
        target_port: u16 = "targetPort";
    }
}

enumeration! {
    /// Which traffic a listener captures.
    pub enum CaptureMode {
        /// As the environment does.
        Default = "DEFAULT",
        /// By the redirection of iptables.
        Iptables = "IPTABLES",
        /// None: the application connects to the listener itself.
        None = "NONE",
    }
}
