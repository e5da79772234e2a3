//! What the log and the store hold: types of their own, with a version, so that old entries decode for ever.
//!
//! Nothing else of the crate is serialised. A field is only ever added, with a default; anything more is a new version
//! next to this one, lifted to today's form in its `From`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::command::{Batch, Command, Delete, ObjectKey, Put, Registration, Revision, WorkloadKey};
use super::{DecodeError, history};
use crate::config::{Kind, Object};
use crate::model::service::{
    Endpoint, Health, Locality, Location, Protocol, Resolution, Service, ServicePort, SourceId, TlsMode,
};

type Labels = BTreeMap<String, String>;

/// One log entry of the registry, in the version it was written in.
#[derive(Debug, Clone)]
pub enum StoredCommand {
    /// The first form.
    V1(BatchV1),
}

impl StoredCommand {
    /// The bytes of `batch` in the newest form.
    #[must_use]
    pub fn encode(batch: &Batch) -> Vec<u8> {
        let stored = Versioned { version: 1, body: BatchV1::from(batch) };
        serde_json::to_vec(&stored).unwrap_or_default()
    }

    /// The batch that `bytes` hold, in whatever version.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Version`] when a newer program wrote it: this member must stop, for it cannot know what the entry
    /// does. [`DecodeError::Malformed`] and [`DecodeError::Kind`] when the bytes are not such an entry.
    pub fn decode(bytes: &[u8]) -> Result<Batch, DecodeError> {
        let Version { version } = serde_json::from_slice(bytes)?;
        match version {
            1 => {
                let stored: Versioned<BatchV1> = serde_json::from_slice(bytes)?;
                stored.body.try_into()
            }
            found => Err(DecodeError::Version { found, newest: 1 }),
        }
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    body: T,
}

/// [`Batch`] in version 1.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BatchV1 {
    time_ms: i64,
    #[serde(default)]
    author: String,
    commands: Vec<CommandV1>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CommandV1 {
    Change {
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        puts: Vec<PutV1>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        deletes: Vec<DeleteV1>,
    },
    PutService(ServiceV1),
    RemoveService {
        host: String,
        source: SourceV1,
    },
    ReplaceEndpoints {
        host: String,
        source: SourceV1,
        endpoints: Vec<EndpointV1>,
    },
    RegisterWorkload(RegistrationV1),
    WorkloadHealth {
        namespace: String,
        name: String,
        session: String,
        healthy: bool,
    },
    RemoveWorkload {
        namespace: String,
        name: String,
        session: String,
    },
    PutMesh {
        config: Value,
    },
    SetHistoryLimit {
        entries: u32,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct PutV1 {
    object: ObjectV1,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expected: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct DeleteV1 {
    kind: String,
    namespace: String,
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expected: Option<u64>,
}

/// An object as the user wrote it. The state's own fields are added where it is stored, not where it is proposed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ObjectV1 {
    kind: String,
    api_version: String,
    namespace: String,
    name: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: Labels,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: Labels,
    spec: Value,
    #[serde(default, skip_serializing_if = "is_zero_i64")]
    created: i64,
    #[serde(default, skip_serializing_if = "is_zero_u64")]
    revision: u64,
    #[serde(default, skip_serializing_if = "is_zero_u64")]
    generation: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_zero_i64(value: &i64) -> bool {
    *value == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_zero_u64(value: &u64) -> bool {
    *value == 0
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SourceV1 {
    Config,
    Workload,
    Kubernetes(String),
    Consul(String),
    File(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ServiceV1 {
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
pub(super) struct EndpointV1 {
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
pub(super) struct RegistrationV1 {
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
}

/// One entry of history.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct HistoryV1 {
    revision: u64,
    time_ms: i64,
    author: String,
    changes: Vec<HistoryChangeV1>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct HistoryChangeV1 {
    what: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after: Option<Value>,
}

impl From<&Batch> for BatchV1 {
    fn from(batch: &Batch) -> Self {
        Self {
            time_ms: batch.time_ms,
            author: batch.author.clone(),
            commands: batch.commands.iter().map(CommandV1::from).collect(),
        }
    }
}

impl TryFrom<BatchV1> for Batch {
    type Error = DecodeError;

    fn try_from(stored: BatchV1) -> Result<Self, DecodeError> {
        let commands = stored.commands.into_iter().map(Command::try_from).collect::<Result<_, _>>()?;
        Ok(Self { time_ms: stored.time_ms, author: stored.author, commands })
    }
}

impl From<&Command> for CommandV1 {
    fn from(command: &Command) -> Self {
        match command {
            Command::Change { puts, deletes } => Self::Change {
                puts: puts
                    .iter()
                    .map(|p| PutV1 {
                        object: ObjectV1::proposed(&p.object),
                        expected: p.expected.map(|r| r.0),
                    })
                    .collect(),
                deletes: deletes.iter().map(DeleteV1::from).collect(),
            },
            Command::PutService { service } => Self::PutService(ServiceV1::from(&**service)),
            Command::RemoveService { host, source } => {
                Self::RemoveService { host: host.clone(), source: source.into() }
            }
            Command::ReplaceEndpoints { host, source, endpoints } => Self::ReplaceEndpoints {
                host: host.clone(),
                source: source.into(),
                endpoints: endpoints.iter().map(EndpointV1::from).collect(),
            },
            Command::RegisterWorkload { registration } => {
                Self::RegisterWorkload(RegistrationV1::from(&**registration))
            }
            Command::WorkloadHealth { key, session, healthy } => Self::WorkloadHealth {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                session: session.clone(),
                healthy: *healthy,
            },
            Command::RemoveWorkload { key, session } => Self::RemoveWorkload {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                session: session.clone(),
            },
            Command::PutMesh { config } => Self::PutMesh { config: config.clone() },
            Command::SetHistoryLimit { entries } => Self::SetHistoryLimit { entries: *entries },
        }
    }
}

impl TryFrom<CommandV1> for Command {
    type Error = DecodeError;

    fn try_from(stored: CommandV1) -> Result<Self, DecodeError> {
        Ok(match stored {
            CommandV1::Change { puts, deletes } => Self::Change {
                puts: puts.into_iter().map(Put::try_from).collect::<Result<_, _>>()?,
                deletes: deletes.into_iter().map(Delete::try_from).collect::<Result<_, _>>()?,
            },
            CommandV1::PutService(service) => Self::PutService { service: Arc::new(service.into()) },
            CommandV1::RemoveService { host, source } => Self::RemoveService { host, source: source.into() },
            CommandV1::ReplaceEndpoints { host, source, endpoints } => Self::ReplaceEndpoints {
                host,
                source: source.into(),
                endpoints: endpoints.into_iter().map(Endpoint::from).collect(),
            },
            CommandV1::RegisterWorkload(registration) => {
                Self::RegisterWorkload { registration: Arc::new(registration.into()) }
            }
            CommandV1::WorkloadHealth { namespace, name, session, healthy } => {
                Self::WorkloadHealth { key: WorkloadKey { namespace, name }, session, healthy }
            }
            CommandV1::RemoveWorkload { namespace, name, session } => {
                Self::RemoveWorkload { key: WorkloadKey { namespace, name }, session }
            }
            CommandV1::PutMesh { config } => Self::PutMesh { config },
            CommandV1::SetHistoryLimit { entries } => Self::SetHistoryLimit { entries },
        })
    }
}

impl From<&Delete> for DeleteV1 {
    fn from(delete: &Delete) -> Self {
        let ObjectKey { kind, namespace, name } = &delete.key;
        Self {
            kind: kind.as_str().to_owned(),
            namespace: namespace.clone(),
            name: name.clone(),
            expected: delete.expected.map(|r| r.0),
        }
    }
}

fn kind_of(text: &str) -> Result<Kind, DecodeError> {
    let named = Kind::ALL.iter().copied().find(|kind| kind.as_str() == text);
    named.ok_or_else(|| DecodeError::Kind { found: text.to_owned() })
}

impl ObjectV1 {
    /// As it is proposed: what the state adds is left out.
    fn proposed(object: &Object) -> Self {
        Self { created: 0, revision: 0, generation: 0, ..Self::stored(object) }
    }

    /// As the state has it.
    pub(super) fn stored(object: &Object) -> Self {
        Self {
            kind: object.kind.as_str().to_owned(),
            api_version: object.api_version.clone(),
            namespace: object.namespace.clone(),
            name: object.name.clone(),
            labels: object.labels.clone(),
            annotations: object.annotations.clone(),
            spec: object.raw.clone(),
            created: object.created,
            revision: object.revision,
            generation: object.generation,
        }
    }
}

impl TryFrom<ObjectV1> for Object {
    type Error = DecodeError;

    fn try_from(stored: ObjectV1) -> Result<Self, DecodeError> {
        let mut object = Self::new(kind_of(&stored.kind)?, &stored.namespace, &stored.name, stored.spec);
        object.api_version = stored.api_version;
        object.labels = stored.labels;
        object.annotations = stored.annotations;
        object.created = stored.created;
        object.revision = stored.revision;
        object.generation = stored.generation;
        Ok(object)
    }
}

/// A source as part of a key: no two sources share it.
pub(super) fn source_text(source: &SourceId) -> String {
    match source {
        SourceId::Config => "config".to_owned(),
        SourceId::Workload => "workload".to_owned(),
        SourceId::Kubernetes(id) => format!("kubernetes/{id}"),
        SourceId::Consul(id) => format!("consul/{id}"),
        SourceId::File(id) => format!("file/{id}"),
    }
}

impl TryFrom<DeleteV1> for Delete {
    type Error = DecodeError;

    fn try_from(stored: DeleteV1) -> Result<Self, DecodeError> {
        let key = ObjectKey { kind: kind_of(&stored.kind)?, namespace: stored.namespace, name: stored.name };
        Ok(Self { key, expected: stored.expected.map(Revision) })
    }
}

impl TryFrom<PutV1> for Put {
    type Error = DecodeError;

    fn try_from(stored: PutV1) -> Result<Self, DecodeError> {
        Ok(Self { object: Arc::new(stored.object.try_into()?), expected: stored.expected.map(Revision) })
    }
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
        }
    }
}

impl From<&history::Entry> for HistoryV1 {
    fn from(entry: &history::Entry) -> Self {
        let change = |c: &history::Change| HistoryChangeV1 {
            what: c.what.clone(),
            before: c.before.clone(),
            after: c.after.clone(),
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
        let change = |c: HistoryChangeV1| history::Change { what: c.what, before: c.before, after: c.after };
        Self {
            revision: Revision(stored.revision),
            time_ms: stored.time_ms,
            author: stored.author,
            changes: stored.changes.into_iter().map(change).collect(),
        }
    }
}
