//! What a Consul server answers, from bytes to typed values.
//!
//! Source: Consul's HTTP API, "Blocking Queries", "Consistency Modes", "Catalog" and "Health". Whatever is not whole and
//! well formed is refused as a whole: half a catalog is no catalog.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Deserialize;

/// An answer as it came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// `X-Consul-Index`; `None` when it is missing or no number.
    pub index: Option<u64>,
    /// `X-Consul-KnownLeader`.
    pub known_leader: Option<bool>,
    /// `X-Consul-LastContact`.
    pub last_contact: Duration,
    /// `X-Consul-Results-Filtered-By-ACLs`.
    pub filtered: bool,
    /// `Retry-After`.
    pub retry_after: Option<Duration>,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Answer {
    /// An answer with the headers that `header` finds by their names in lower case.
    pub fn read<'a>(status: u16, header: impl Fn(&str) -> Option<&'a str>, body: Vec<u8>) -> Self {
        let number = |name: &str| header(name).and_then(|text| text.trim().parse::<u64>().ok());
        Self {
            status,
            index: number("x-consul-index"),
            known_leader: header("x-consul-knownleader").and_then(|text| text.trim().parse().ok()),
            last_contact: Duration::from_millis(number("x-consul-lastcontact").unwrap_or_default()),
            filtered: header("x-consul-results-filtered-by-acls").is_some_and(|text| text.trim() == "true"),
            retry_after: number("retry-after").map(Duration::from_secs),
            body,
        }
    }

    /// What the body says, when it is short enough for a log line.
    #[must_use]
    pub fn reason(&self) -> String {
        let text: String = String::from_utf8_lossy(&self.body).chars().take(120).collect();
        format!("status {}: {}", self.status, text.trim())
    }
}

/// A body that is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an answer of this API: {0}")]
pub struct Malformed(String);

impl From<serde_json::Error> for Malformed {
    fn from(error: serde_json::Error) -> Self {
        Self(error.to_string())
    }
}

/// The names of `GET /v1/catalog/services`, with the tags of all their instances.
///
/// # Errors
///
/// When the body is something else.
pub fn services(body: &[u8]) -> Result<BTreeMap<String, BTreeSet<String>>, Malformed> {
    let named: BTreeMap<String, Option<BTreeSet<String>>> = serde_json::from_slice(body)?;
    Ok(named.into_iter().map(|(name, tags)| (name, tags.unwrap_or_default())).collect())
}

/// The instances of `GET /v1/health/service/NAME`.
///
/// # Errors
///
/// When the body is something else.
pub fn instances(body: &[u8]) -> Result<Vec<Instance>, Malformed> {
    let entries: Option<Vec<wire::Entry>> = serde_json::from_slice(body)?;
    Ok(entries.unwrap_or_default().into_iter().map(Instance::from).collect())
}

/// The node of `GET /v1/catalog/node/NODE`; `None` when it is not there.
///
/// # Errors
///
/// When the body is something else.
pub fn node(body: &[u8]) -> Result<Option<Node>, Malformed> {
    let found: Option<wire::NodeServices> = serde_json::from_slice(body)?;
    Ok(found.map(|wire::NodeServices { node, services }| Node {
        index: node.modify_index,
        address: node.address,
        meta: node.meta.unwrap_or_default(),
        services: services.unwrap_or_default().into_iter().map(|(id, one)| (id, one.into())).collect(),
    }))
}

/// What of a transaction was refused, from the answer with status 409 to `PUT /v1/txn`: positions of operations, with
/// the reasons.
///
/// # Errors
///
/// When the body is something else.
pub fn refusals(body: &[u8]) -> Result<Vec<(usize, String)>, Malformed> {
    let refused: wire::Refused = serde_json::from_slice(body)?;
    Ok(refused.errors.unwrap_or_default().into_iter().map(|error| (error.op_index, error.what)).collect())
}

/// How an instance stands, from the worst of its checks and those of its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// Every check passes, or there is none.
    Passing,
    /// A check warns: still served, with the weight for it.
    Warning,
    /// A check is critical: not served.
    Critical,
    /// The operator took it, or its node, out.
    Maintenance,
}

/// What an instance is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A service.
    Typical,
    /// A sidecar, a gateway, or an instance that speaks Consul's own mTLS only: no service for clients of the mesh.
    Connect,
}

/// One port of an instance.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// Its name; empty for the one port of an instance without named ports.
    pub name: String,
    /// Its number, as it was told: 0 is none.
    pub number: u32,
    /// The one that is meant when no name is given.
    pub default: bool,
}

/// An instance of a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance {
    /// Name of its service.
    pub service: String,
    /// Name of its node.
    pub node: String,
    /// Its id, unique on its node.
    pub id: String,
    /// The service's address, else the node's. It may be empty or no address at all.
    pub address: String,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Its tags, in order.
    pub tags: BTreeSet<String>,
    /// Its own metadata.
    pub meta: BTreeMap<String, String>,
    /// Metadata of its node.
    pub node_meta: BTreeMap<String, String>,
    /// Region and zone that were declared, the service's before the node's.
    pub locality: Option<(String, String)>,
    /// Weight while passing.
    pub passing_weight: u32,
    /// Weight while warning.
    pub warning_weight: u32,
    /// How it stands.
    pub condition: Condition,
    /// What it is.
    pub kind: Kind,
}

/// A node, with its services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Index of its last change; what happens to its services does not move it.
    pub index: u64,
    /// Its address.
    pub address: String,
    /// Its metadata.
    pub meta: BTreeMap<String, String>,
    /// What is registered on it, by id.
    pub services: BTreeMap<String, Registered>,
}

/// A service of one node, as the catalog has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    /// Its id, unique on its node.
    pub id: String,
    /// Name of the service.
    pub service: String,
    /// Its address.
    pub address: String,
    /// Its port.
    pub port: u16,
    /// Its tags.
    pub tags: BTreeSet<String>,
    /// Its metadata.
    pub meta: BTreeMap<String, String>,
    /// Weight while passing.
    pub weight: u32,
}

impl From<wire::Entry> for Instance {
    fn from(entry: wire::Entry) -> Self {
        let wire::Entry { node, service, checks } = entry;
        let condition = condition(&checks.unwrap_or_default(), &service.id);
        let connect = !matches!(service.kind.as_str(), "" | "typical")
            || service.connect.as_ref().is_some_and(|connect| connect.native);
        let address = if service.address.is_empty() { node.address } else { service.address };
        let named = service.ports.unwrap_or_default().into_iter();
        let mut ports: Vec<Port> =
            named.map(|p| Port { name: p.name, number: p.port, default: p.default }).collect();
        if ports.is_empty() {
            ports.push(Port { name: String::new(), number: service.port, default: true });
        }
        let weights = service.weights.unwrap_or_default();
        Self {
            service: service.service,
            node: node.node,
            id: service.id,
            address,
            ports,
            tags: service.tags.unwrap_or_default(),
            meta: service.meta.unwrap_or_default(),
            node_meta: node.meta.unwrap_or_default(),
            locality: service.locality.or(node.locality).map(|l| (l.region, l.zone)),
            passing_weight: weights.passing,
            warning_weight: weights.warning,
            condition,
            kind: if connect { Kind::Connect } else { Kind::Typical },
        }
    }
}

impl From<wire::Service> for Registered {
    fn from(service: wire::Service) -> Self {
        Self {
            id: service.id,
            service: service.service,
            address: service.address,
            port: u16::try_from(service.port).unwrap_or_default(),
            tags: service.tags.unwrap_or_default(),
            meta: service.meta.unwrap_or_default(),
            weight: service.weights.unwrap_or_default().passing,
        }
    }
}

/// The worst of the checks; maintenance is worse than critical, for it was meant.
fn condition(checks: &[wire::Check], id: &str) -> Condition {
    let of_this = |check: &&wire::Check| check.service_id.is_empty() || check.service_id == id;
    let each = checks.iter().filter(of_this).map(|check| {
        let failing = check.status == "critical";
        match (check.check_id.as_str(), check.status.as_str()) {
            ("_node_maintenance", _) if failing => Condition::Maintenance,
            (name, _) if failing && name.starts_with("_service_maintenance:") => Condition::Maintenance,
            (_, "passing") => Condition::Passing,
            (_, "warning") => Condition::Warning,
            // What is not known to pass does not.
            _ => Condition::Critical,
        }
    });
    each.max().unwrap_or(Condition::Passing)
}

/// Consul's JSON. Fields that are `null` count as missing, as Go writes empty lists and maps.
mod wire {
    use super::{BTreeMap, BTreeSet, Deserialize};

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Entry {
        pub(super) node: Node,
        pub(super) service: Service,
        pub(super) checks: Option<Vec<Check>>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Node {
        pub(super) node: String,
        #[serde(default)]
        pub(super) address: String,
        pub(super) meta: Option<BTreeMap<String, String>>,
        pub(super) locality: Option<Locality>,
        #[serde(default)]
        pub(super) modify_index: u64,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Locality {
        #[serde(default)]
        pub(super) region: String,
        #[serde(default)]
        pub(super) zone: String,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Service {
        #[serde(default)]
        pub(super) kind: String,
        #[serde(rename = "ID")]
        pub(super) id: String,
        pub(super) service: String,
        pub(super) tags: Option<BTreeSet<String>>,
        pub(super) meta: Option<BTreeMap<String, String>>,
        #[serde(default)]
        pub(super) address: String,
        #[serde(default)]
        pub(super) port: u32,
        pub(super) ports: Option<Vec<NamedPort>>,
        pub(super) weights: Option<Weights>,
        pub(super) connect: Option<Connect>,
        pub(super) locality: Option<Locality>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct NamedPort {
        pub(super) name: String,
        pub(super) port: u32,
        #[serde(default)]
        pub(super) default: bool,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Weights {
        pub(super) passing: u32,
        pub(super) warning: u32,
    }

    impl Default for Weights {
        fn default() -> Self {
            Self { passing: 1, warning: 1 }
        }
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Connect {
        #[serde(default)]
        pub(super) native: bool,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Check {
        #[serde(rename = "CheckID", default)]
        pub(super) check_id: String,
        #[serde(default)]
        pub(super) status: String,
        #[serde(rename = "ServiceID", default)]
        pub(super) service_id: String,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct NodeServices {
        pub(super) node: Node,
        pub(super) services: Option<BTreeMap<String, Service>>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Refused {
        pub(super) errors: Option<Vec<Refusal>>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    pub(super) struct Refusal {
        pub(super) op_index: usize,
        #[serde(default)]
        pub(super) what: String,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(checks: &str, expect: Condition) {
        let body = format!(
            r#"[{{"Node":{{"Node":"n","Address":"10.0.0.1"}},"Service":{{"ID":"web-1","Service":"web","Port":80,"Tags":null}},"Checks":{checks}}}]"#
        );
        assert_eq!(instances(body.as_bytes()).unwrap()[0].condition, expect, "{checks}");
    }

    #[test]
    fn an_instance_stands_as_its_worst_check() {
        check("null", Condition::Passing);
        check(r#"[{"Status":"passing"},{"Status":"warning"}]"#, Condition::Warning);
        check(r#"[{"Status":"critical"},{"Status":"warning"}]"#, Condition::Critical);
        check(r#"[{"Status":"critical","ServiceID":"another"}]"#, Condition::Passing);
        check(r#"[{"CheckID":"_node_maintenance","Status":"critical"}]"#, Condition::Maintenance);
        let service = r#"[{"CheckID":"_service_maintenance:web-1","ServiceID":"web-1","Status":"critical"}]"#;
        check(service, Condition::Maintenance);
        check(r#"[{"Status":"something new"}]"#, Condition::Critical);
    }

    #[test]
    fn an_answer_that_is_not_whole_is_refused_as_a_whole() {
        for body in
            [&b"[{\"Node\":{\"Node\":\"n\"},\"Serv"[..], b"", b"{}", b"<html>", b"[{}]", b"[\"\xff\"]"]
        {
            assert!(instances(body).is_err(), "{}", String::from_utf8_lossy(body));
        }
        assert_eq!(instances(b"[]").unwrap(), []);
        assert_eq!(instances(b"null").unwrap(), []);
        for body in [&b"[]"[..], b"{\"web\":1}", b"{\"web\":[\"a\"]", b"{\"w\xff\":[]}"] {
            assert!(services(body).is_err(), "{}", String::from_utf8_lossy(body));
        }
        assert_eq!(services(b"{}").unwrap().len(), 0);
        assert_eq!(services(br#"{"web":null,"db":["b","a"]}"#).unwrap()["db"].len(), 2);
        for body in [&b"[]"[..], b"{}", b"{\"Node\":{\"Node\":\"n\"},\"Services\":[]}", b"\xff"] {
            assert!(node(body).is_err(), "{}", String::from_utf8_lossy(body));
        }
        assert_eq!(node(b"null").unwrap(), None);
    }

    #[test]
    fn a_node_comes_with_its_services_and_a_transaction_with_what_was_refused() {
        let body = br#"{"Node":{"Node":"n","Address":"10.0.0.1","Meta":{"a":"b"},"ModifyIndex":7},
            "Services":{"w":{"ID":"w","Service":"web","Port":80,"Meta":null,"Weights":{"Passing":3,"Warning":1}}}}"#;
        let node = node(body).unwrap().unwrap();
        assert_eq!((node.index, node.meta["a"].as_str(), node.services["w"].weight), (7, "b", 3));
        let refused = refusals(br#"{"Results":null,"Errors":[{"OpIndex":2,"What":"no"}]}"#).unwrap();
        assert_eq!(refused, [(2, "no".to_owned())]);
    }

    #[test]
    fn headers_that_are_no_numbers_are_missing() {
        let header = |name: &str| match name {
            "x-consul-index" => Some("many"),
            "x-consul-lastcontact" => Some("12"),
            "x-consul-knownleader" => Some("true"),
            _ => None,
        };
        let answer = Answer::read(200, header, Vec::new());
        assert_eq!((answer.index, answer.known_leader), (None, Some(true)));
        assert_eq!(answer.last_contact, Duration::from_millis(12));
    }
}
