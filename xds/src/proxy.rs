//! One connected data plane: what `translate` may know about it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ca::identity::SpiffeId;
use envoy_types::pb::envoy::config::core::v3::{self as core, Node};
use envoy_types::pb::google::protobuf::{Struct, value};
use ipnet::Ipv4Net;
use registry::model::service::Locality;

/// Cluster id of a proxy that does not name one.
const DEFAULT_CLUSTER: &str = "default";

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

/// Why a node could not be taken for a proxy of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// The node sent no id, or one that is not `<type>~<ip>~<name>.<namespace>~<domain>`.
    #[error("node id {0:?}: must be `sidecar~<ip>~<workload>.<namespace>~<namespace>.svc.<domain>`")]
    Id(String),
    /// The node is of a type that is not served.
    #[error("node type {0:?} is not served; `sidecar` is")]
    Type(String),
    /// An address does not parse.
    #[error("{field}: {value:?} is not an IP address")]
    Address {
        /// Where it was.
        field: &'static str,
        /// What was there.
        value: String,
    },
    /// `INTERCEPTION_MODE` is not one that is known.
    #[error("INTERCEPTION_MODE: {0:?} is unknown; must be REDIRECT, TPROXY or NONE")]
    Mode(String),
    /// The loopback block of explicit mode is missing or unusable.
    #[error(
        "LOOPBACK_BLOCK: {0:?}: INTERCEPTION_MODE NONE needs an IPv4 block such as 127.240.16.0/20, /8 to /24"
    )]
    Block(String),
    /// A workload port, or where the application listens, does not parse.
    #[error("INBOUND_FORWARD: {0:?}: must map a port to an address with a port, as 9080: 127.0.0.1:19080")]
    Forward(String),
}

impl Proxy {
    /// Reads a proxy from the node that it sends on its stream; `identity` is that of its certificate.
    ///
    /// Metadata keys are Istio's; what they leave out is taken from the node id.
    ///
    /// # Errors
    ///
    /// [`NodeError`], when the id or a metadata value does not have the form that is expected.
    pub fn from_node(node: &Node, identity: Option<SpiffeId>) -> Result<Self, NodeError> {
        let id = NodeId::parse(&node.id)?;
        let metadata = Metadata(node.metadata.as_ref());
        let namespace = metadata.text("NAMESPACE").unwrap_or(id.namespace).to_owned();
        let addresses = addresses(&metadata, id.address)?;
        let labels = metadata.strings("LABELS");
        Ok(Self {
            id: node.id.clone(),
            name: metadata.text("NAME").unwrap_or(id.name).to_owned(),
            workload: metadata.text("WORKLOAD_NAME").unwrap_or(id.name).to_owned(),
            namespace,
            service_account: service_account(&metadata, identity.as_ref()),
            identity,
            labels,
            addresses,
            cluster: metadata.text("CLUSTER_ID").unwrap_or(DEFAULT_CLUSTER).to_owned(),
            network: metadata.text("NETWORK").unwrap_or_default().to_owned(),
            locality: node.locality.as_ref().map(locality).unwrap_or_default(),
            interception: interception(&metadata)?,
            inbound_forward: inbound_forward(&metadata)?,
            native: metadata.text("PROXY_KIND") == Some("istio-proxy"),
        })
    }
}

/// The parts of a node id.
struct NodeId<'a> {
    address: &'a str,
    name: &'a str,
    namespace: &'a str,
}

impl<'a> NodeId<'a> {
    fn parse(id: &'a str) -> Result<Self, NodeError> {
        let wrong = || NodeError::Id(id.to_owned());
        let mut parts = id.split('~');
        let kind = parts.next().ok_or_else(wrong)?;
        let (Some(address), Some(name), Some(_), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong());
        };
        if kind != "sidecar" {
            return Err(NodeError::Type(kind.to_owned()));
        }
        let (name, namespace) = name.rsplit_once('.').ok_or_else(wrong)?;
        if name.is_empty() || namespace.is_empty() {
            return Err(wrong());
        }
        Ok(Self { address, name, namespace })
    }
}

/// Node metadata, read field by field.
struct Metadata<'a>(Option<&'a Struct>);

impl<'a> Metadata<'a> {
    fn get(&self, key: &str) -> Option<&'a value::Kind> {
        self.0?.fields.get(key)?.kind.as_ref()
    }

    /// A string that is not empty.
    fn text(&self, key: &str) -> Option<&'a str> {
        match self.get(key) {
            Some(value::Kind::StringValue(text)) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    /// A struct of strings; other values are left out.
    fn strings(&self, key: &str) -> BTreeMap<String, String> {
        let Some(value::Kind::StructValue(fields)) = self.get(key) else { return BTreeMap::new() };
        let sorted: BTreeMap<&String, _> = fields.fields.iter().collect();
        sorted
            .into_iter()
            .filter_map(|(key, value)| match &value.kind {
                Some(value::Kind::StringValue(text)) => Some((key.clone(), text.clone())),
                _ => None,
            })
            .collect()
    }
}

fn addresses(metadata: &Metadata<'_>, of_id: &str) -> Result<Vec<IpAddr>, NodeError> {
    let (field, listed) = match metadata.text("INSTANCE_IPS") {
        Some(listed) => ("INSTANCE_IPS", listed),
        None => ("node id", of_id),
    };
    listed
        .split(',')
        .map(str::trim)
        .map(|text| text.parse().map_err(|_| NodeError::Address { field, value: text.to_owned() }))
        .collect()
}

fn service_account(metadata: &Metadata<'_>, identity: Option<&SpiffeId>) -> String {
    let of_identity = identity.and_then(SpiffeId::service_account);
    metadata.text("SERVICE_ACCOUNT").or(of_identity).unwrap_or_default().to_owned()
}

fn locality(locality: &core::Locality) -> Locality {
    Locality {
        region: locality.region.clone(),
        zone: locality.zone.clone(),
        subzone: locality.sub_zone.clone(),
    }
}

fn interception(metadata: &Metadata<'_>) -> Result<Interception, NodeError> {
    match metadata.text("INTERCEPTION_MODE").unwrap_or("REDIRECT") {
        "REDIRECT" | "TPROXY" => return Ok(Interception::Captured),
        "NONE" => {}
        other => return Err(NodeError::Mode(other.to_owned())),
    }
    let block = metadata.text("LOOPBACK_BLOCK").unwrap_or_default();
    let net: Ipv4Net = block.parse().map_err(|_| NodeError::Block(block.to_owned()))?;
    if !(8..=24).contains(&net.prefix_len()) {
        return Err(NodeError::Block(block.to_owned()));
    }
    Ok(Interception::Explicit { base: net.network(), prefix: net.prefix_len() })
}

fn inbound_forward(metadata: &Metadata<'_>) -> Result<BTreeMap<u16, String>, NodeError> {
    metadata
        .strings("INBOUND_FORWARD")
        .into_iter()
        .map(|(port, target)| {
            let usable = target.parse::<std::net::SocketAddr>().is_ok() || target.starts_with("unix://");
            match port.parse() {
                Ok(port) if usable && port != 0 => Ok((port, target)),
                _ => Err(NodeError::Forward(format!("{port}: {target}"))),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(id: &str, metadata: serde_json::Value) -> Node {
        let node = json!({"id": id, "metadata": metadata, "locality": {"region": "eu", "subZone": "a"}});
        wire::json::message_from_json(&node).expect("a node")
    }

    const ID: &str = "sidecar~10.0.0.7~reviews-v1-abc.shop~shop.svc.cluster.local";

    #[test]
    fn metadata_outranks_the_node_id() {
        let metadata = json!({
            "NAMESPACE": "prod", "WORKLOAD_NAME": "reviews-v1", "CLUSTER_ID": "east", "PROXY_KIND": "istio-proxy",
            "LABELS": {"app": "reviews", "odd": 3}, "INSTANCE_IPS": "10.0.0.7, fd00::7", "SERVICE_ACCOUNT": "rev"
        });
        let proxy = Proxy::from_node(&node(ID, metadata), None).expect("a proxy");
        assert_eq!((proxy.namespace.as_str(), proxy.workload.as_str()), ("prod", "reviews-v1"));
        assert_eq!(proxy.name, "reviews-v1-abc");
        assert_eq!(proxy.addresses.len(), 2);
        assert_eq!(proxy.labels, BTreeMap::from([("app".to_owned(), "reviews".to_owned())]));
        assert_eq!((proxy.locality.region.as_str(), proxy.locality.subzone.as_str()), ("eu", "a"));
        assert!(proxy.native);
        assert_eq!(proxy.interception, Interception::Captured);
    }

    #[test]
    fn what_metadata_leaves_out_comes_from_the_node_id() {
        let proxy = Proxy::from_node(&node(ID, json!({})), None).expect("a proxy");
        assert_eq!((proxy.namespace.as_str(), proxy.workload.as_str()), ("shop", "reviews-v1-abc"));
        assert_eq!(proxy.addresses, ["10.0.0.7".parse::<IpAddr>().expect("an address")]);
        assert_eq!((proxy.cluster.as_str(), proxy.native), ("default", false));
    }

    #[test]
    fn explicit_mode_needs_a_block() {
        let explicit = |block| {
            let metadata = json!({"INTERCEPTION_MODE": "NONE", "LOOPBACK_BLOCK": block});
            Proxy::from_node(&node(ID, metadata), None).map(|proxy| proxy.interception)
        };
        let base = "127.240.16.0".parse().expect("an address");
        assert_eq!(explicit("127.240.16.0/20"), Ok(Interception::Explicit { base, prefix: 20 }));
        assert_eq!(explicit(""), Err(NodeError::Block(String::new())));
        assert_eq!(explicit("127.240.16.0/28"), Err(NodeError::Block("127.240.16.0/28".to_owned())));
    }

    #[test]
    fn what_does_not_parse_is_refused_by_name() {
        let of = |id: &str, metadata| Proxy::from_node(&node(id, metadata), None).expect_err("refused");
        assert_eq!(of("envoy-1", json!({})), NodeError::Id("envoy-1".to_owned()));
        assert_eq!(of("router~10.0.0.7~a.b~c", json!({})), NodeError::Type("router".to_owned()));
        let forward = json!({"INBOUND_FORWARD": {"9080": "nowhere"}});
        assert_eq!(of(ID, forward), NodeError::Forward("9080: nowhere".to_owned()));
        let mode = json!({"INTERCEPTION_MODE": "MAGIC"});
        assert_eq!(of(ID, mode), NodeError::Mode("MAGIC".to_owned()));
    }
}
