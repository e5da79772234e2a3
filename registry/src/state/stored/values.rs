//! Stored forms of what sources say and of history, in version 1.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Labels, is_zero_i64};
use crate::config::Object;
use crate::model::service::{
    Endpoint, Health, Locality, Location, Protocol, Resolution, Service, ServicePort, SourceId, TlsMode,
};
use crate::state::command::{Presence, Registration, Revision};
use crate::state::history;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::state) enum SourceV1 {
    Config,
    Workload,
    Kubernetes(String),
    Consul(String),
    File(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::state) struct ServiceV1 {
    hostname: String,
    name: String,
    namespace: String,
    ports: Vec<PortV1>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<String>,
    resolution: ResolutionV1,
    external: bool,
    export_to: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    subject_alt_names: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: Labels,
    #[serde(default, skip_serializing_if = "is_zero_i64")]
    created: i64,
    source: SourceV1,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct PortV1 {
    name: String,
    number: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target_port: Option<u16>,
    protocol: ProtocolV1,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ProtocolV1 {
    Http,
    Http2,
    Grpc,
    GrpcWeb,
    Https,
    Tls,
    Tcp,
    Udp,
    Mongo,
    MySql,
    Redis,
    Auto,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ResolutionV1 {
    None,
    Static,
    Dns,
    DnsRoundRobin,
    DynamicDns,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::state) struct EndpointV1 {
    address: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    ports: BTreeMap<String, u16>,
    weight: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    locality: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    network: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: Labels,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    workload: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    namespace: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    cluster: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    service_account: String,
    mtls: bool,
    health: HealthV1,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum HealthV1 {
    Healthy,
    Unhealthy,
    Draining,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::state) struct RegistrationV1 {
    namespace: String,
    name: String,
    address: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    ports: BTreeMap<String, u16>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: Labels,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: Labels,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    network: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    locality: String,
    #[serde(default)]
    weight: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    service_account: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    cluster: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    group: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    instance: String,
    session: String,
    #[serde(default)]
    lease_ms: u64,
    healthy: bool,
    /// Of command version 2 and later, as is the next.
    #[serde(default, skip_serializing_if = "PresenceV1::is_heard")]
    presence: PresenceV1,
    #[serde(default, skip_serializing_if = "is_zero_i64")]
    lost_ms: i64,
    /// Of command version 4 and later.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    reason: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::state) enum PresenceV1 {
    #[default]
    Heard,
    Silent,
    Unknown,
    Released,
}

impl PresenceV1 {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
    fn is_heard(&self) -> bool {
        *self == Self::Heard
    }
}

/// One entry of history; its values are borrowed when they are written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::state) struct HistoryV1<V = Value> {
    revision: u64,
    time_ms: i64,
    author: String,
    changes: Vec<HistoryChangeV1<V>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct HistoryChangeV1<V> {
    what: String,
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    before: Option<V>,
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    after: Option<V>,
}

impl From<&SourceId> for SourceV1 {
    fn from(source: &SourceId) -> Self {
        match source {
            SourceId::Config => Self::Config,
            SourceId::Workload => Self::Workload,
            SourceId::Kubernetes(id) => Self::Kubernetes(id.clone()),
            SourceId::Consul(id) => Self::Consul(id.clone()),
            SourceId::File(id) => Self::File(id.clone()),
        }
    }
}

impl From<SourceV1> for SourceId {
    fn from(stored: SourceV1) -> Self {
        match stored {
            SourceV1::Config => Self::Config,
            SourceV1::Workload => Self::Workload,
            SourceV1::Kubernetes(id) => Self::Kubernetes(id),
            SourceV1::Consul(id) => Self::Consul(id),
            SourceV1::File(id) => Self::File(id),
        }
    }
}

/// Two enums with the same variants, mapped onto each other.
macro_rules! mirror {
    ($ours:ident, $stored:ident { $($variant:ident),* $(,)? }) => {
        impl From<$ours> for $stored {
            fn from(value: $ours) -> Self {
                match value { $($ours::$variant => Self::$variant),* }
            }
        }
        impl From<$stored> for $ours {
            fn from(value: $stored) -> Self {
                match value { $($stored::$variant => Self::$variant),* }
            }
        }
    };
}

mirror!(Protocol, ProtocolV1 { Http, Http2, Grpc, GrpcWeb, Https, Tls, Tcp, Udp, Mongo, MySql, Redis, Auto });
mirror!(Resolution, ResolutionV1 { None, Static, Dns, DnsRoundRobin, DynamicDns });
mirror!(Health, HealthV1 { Healthy, Unhealthy, Draining });
mirror!(Presence, PresenceV1 { Heard, Silent, Unknown, Released });

impl From<&Service> for ServiceV1 {
    fn from(s: &Service) -> Self {
        let port = |p: &ServicePort| PortV1 {
            name: p.name.clone(),
            number: p.number,
            target_port: p.target_port,
            protocol: p.protocol.into(),
        };
        Self {
            hostname: s.hostname.clone(),
            name: s.name.clone(),
            namespace: s.namespace.clone(),
            ports: s.ports.iter().map(port).collect(),
            addresses: s.addresses.clone(),
            resolution: s.resolution.into(),
            external: s.location == Location::External,
            export_to: s.export_to.clone(),
            subject_alt_names: s.subject_alt_names.clone(),
            labels: s.labels.clone(),
            created: s.created,
            source: (&s.source).into(),
        }
    }
}

impl From<ServiceV1> for Service {
    fn from(s: ServiceV1) -> Self {
        let port = |p: PortV1| ServicePort {
            name: p.name,
            number: p.number,
            target_port: p.target_port,
            protocol: p.protocol.into(),
        };
        Self {
            hostname: s.hostname,
            name: s.name,
            namespace: s.namespace,
            ports: s.ports.into_iter().map(port).collect(),
            addresses: s.addresses,
            vip_index: 0,
            resolution: s.resolution.into(),
            location: if s.external { Location::External } else { Location::Internal },
            export_to: s.export_to,
            subject_alt_names: s.subject_alt_names,
            labels: s.labels,
            created: s.created,
            source: s.source.into(),
        }
    }
}

impl From<&Endpoint> for EndpointV1 {
    fn from(e: &Endpoint) -> Self {
        Self {
            address: e.address.clone(),
            ports: e.ports.clone(),
            weight: e.weight,
            locality: locality_text(&e.locality),
            network: e.network.clone(),
            labels: e.labels.clone(),
            workload: e.workload.clone(),
            namespace: e.namespace.clone(),
            cluster: e.cluster.clone(),
            service_account: e.service_account.clone(),
            mtls: e.tls_mode == TlsMode::Istio,
            health: e.health.into(),
        }
    }
}

impl From<EndpointV1> for Endpoint {
    fn from(e: EndpointV1) -> Self {
        Self {
            address: e.address,
            ports: e.ports,
            weight: e.weight,
            locality: Locality::parse(&e.locality),
            network: e.network,
            labels: e.labels,
            workload: e.workload,
            namespace: e.namespace,
            cluster: e.cluster,
            service_account: e.service_account,
            tls_mode: if e.mtls { TlsMode::Istio } else { TlsMode::Disabled },
            health: e.health.into(),
        }
    }
}

/// All three parts, so that an empty region before a zone survives.
fn locality_text(locality: &Locality) -> String {
    if *locality == Locality::default() {
        return String::new();
    }
    format!("{}/{}/{}", locality.region, locality.zone, locality.subzone)
}

impl From<&Registration> for RegistrationV1 {
    fn from(r: &Registration) -> Self {
        Self {
            namespace: r.namespace.clone(),
            name: r.name.clone(),
            address: r.address.clone(),
            ports: r.ports.clone(),
            labels: r.labels.clone(),
            annotations: r.annotations.clone(),
            network: r.network.clone(),
            locality: locality_text(&r.locality),
            weight: r.weight,
            service_account: r.service_account.clone(),
            cluster: r.cluster.clone(),
            group: r.group.clone(),
            instance: r.instance.clone(),
            session: r.session.clone(),
            lease_ms: r.lease_ms,
            healthy: r.healthy,
            presence: r.presence.into(),
            lost_ms: r.lost_ms,
            reason: r.reason.clone(),
        }
    }
}

impl From<RegistrationV1> for Registration {
    fn from(r: RegistrationV1) -> Self {
        Self {
            namespace: r.namespace,
            name: r.name,
            address: r.address,
            ports: r.ports,
            labels: r.labels,
            annotations: r.annotations,
            network: r.network,
            locality: Locality::parse(&r.locality),
            weight: r.weight,
            service_account: r.service_account,
            cluster: r.cluster,
            group: r.group,
            instance: r.instance,
            session: r.session,
            lease_ms: r.lease_ms,
            healthy: r.healthy,
            presence: r.presence.into(),
            lost_ms: r.lost_ms,
            reason: r.reason,
        }
    }
}

impl<'a> From<&'a history::Entry> for HistoryV1<&'a history::Value> {
    fn from(entry: &'a history::Entry) -> Self {
        let change = |c: &'a history::Change| HistoryChangeV1 {
            what: c.what.clone(),
            before: c.before.as_ref(),
            after: c.after.as_ref(),
        };
        Self {
            revision: entry.revision.0,
            time_ms: entry.time_ms,
            author: entry.author.clone(),
            changes: entry.changes.iter().map(change).collect(),
        }
    }
}

impl From<HistoryV1> for history::Entry {
    fn from(stored: HistoryV1) -> Self {
        let change = |c: HistoryChangeV1<Value>| history::Change {
            before: c.before.map(|value| remembered(&c.what, value)),
            after: c.after.map(|value| remembered(&c.what, value)),
            what: c.what,
        };
        Self {
            revision: Revision(stored.revision),
            time_ms: stored.time_ms,
            author: stored.author,
            changes: stored.changes.into_iter().map(change).collect(),
        }
    }
}

/// Mesh-wide settings are remembered as they were written, objects with their metadata.
fn remembered(what: &str, value: Value) -> history::Value {
    let object = (what != history::MESH).then(|| Object::from_stored(&value).ok()).flatten();
    object.map_or_else(|| history::Value::Json(Arc::new(value)), |o| history::Value::Object(Arc::new(o)))
}
