//! What the log and the store hold: types of their own, with a version, so that old entries decode for ever.
//!
//! Nothing else of the crate is serialised. A field is only ever added, with a default; anything more is a new version
//! next to this one, lifted to today's form in its `From`.

mod values;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(super) use self::values::{EndpointV1, HistoryV1, PresenceV1, RegistrationV1, ServiceV1, SourceV1};
use super::DecodeError;
use super::command::{Batch, Command, Delete, ObjectKey, Put, Revision, WorkloadKey};
use crate::config::{Kind, Object};
use crate::model::service::{Endpoint, SourceId};

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
            1 => serde_json::from_slice::<BatchV1>(bytes)?.try_into(),
            found => Err(DecodeError::Version { found, newest: 1 }),
        }
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Serialize)]
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
        /// Of command version 4 and later.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        reason: String,
    },
    RemoveWorkload {
        namespace: String,
        name: String,
        session: String,
    },
    /// Written by programs of command version 2 and later.
    WorkloadPresence {
        namespace: String,
        name: String,
        session: String,
        presence: PresenceV1,
    },
    PutMesh {
        config: Value,
    },
    SetHistoryLimit {
        entries: u32,
    },
    /// Written by programs of command version 2 and later.
    SetHistoryRetention {
        entries: u32,
        age_ms: u64,
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
            Command::WorkloadHealth { key, session, healthy, reason } => Self::WorkloadHealth {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                session: session.clone(),
                healthy: *healthy,
                reason: reason.clone(),
            },
            Command::WorkloadPresence { key, session, presence } => Self::WorkloadPresence {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                session: session.clone(),
                presence: (*presence).into(),
            },
            Command::RemoveWorkload { key, session } => Self::RemoveWorkload {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                session: session.clone(),
            },
            Command::PutMesh { config } => Self::PutMesh { config: config.clone() },
            Command::SetHistoryLimit { entries } => Self::SetHistoryLimit { entries: *entries },
            Command::SetHistoryRetention { entries, age_ms } => {
                Self::SetHistoryRetention { entries: *entries, age_ms: *age_ms }
            }
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
            CommandV1::WorkloadHealth { namespace, name, session, healthy, reason } => {
                Self::WorkloadHealth { key: WorkloadKey { namespace, name }, session, healthy, reason }
            }
            CommandV1::WorkloadPresence { namespace, name, session, presence } => Self::WorkloadPresence {
                key: WorkloadKey { namespace, name },
                session,
                presence: presence.into(),
            },
            CommandV1::RemoveWorkload { namespace, name, session } => {
                Self::RemoveWorkload { key: WorkloadKey { namespace, name }, session }
            }
            CommandV1::PutMesh { config } => Self::PutMesh { config },
            CommandV1::SetHistoryLimit { entries } => Self::SetHistoryLimit { entries },
            CommandV1::SetHistoryRetention { entries, age_ms } => {
                Self::SetHistoryRetention { entries, age_ms }
            }
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
