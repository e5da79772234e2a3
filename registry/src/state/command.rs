//! What may be asked of the state: whole new values, so that replay and duplicates do no harm.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::config::{Kind, Object};
use crate::model::service::{Endpoint, Hostname, Locality, Service, SourceId};

/// The version of the mesh: the index of the log entry that made it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What identifies a configuration object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Kind, independent of the API version it was written in.
    pub kind: Kind,
    /// Namespace.
    pub namespace: String,
    /// Name, unique in its namespace and kind.
    pub name: String,
}

impl ObjectKey {
    /// The key of `object`.
    #[must_use]
    pub fn of(object: &Object) -> Self {
        Self { kind: object.kind, namespace: object.namespace.clone(), name: object.name.clone() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind.as_str(), self.namespace, self.name)
    }
}

/// What identifies a workload: its namespace and the name of its entry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkloadKey {
    /// Namespace.
    pub namespace: String,
    /// Name of the entry.
    pub name: String,
}

impl fmt::Display for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One object to be created or replaced.
#[derive(Debug, Clone, PartialEq)]
pub struct Put {
    /// The whole new object. Its creation time, revision and generation are set by `apply`.
    pub object: Arc<Object>,
    /// Apply only if the object is at this revision now; `Revision(0)`: only if it does not exist.
    pub expected: Option<Revision>,
}

/// One object to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delete {
    /// Which.
    pub key: ObjectKey,
    /// Apply only if the object is at this revision now.
    pub expected: Option<Revision>,
}

/// Whether a workload's agent is heard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Presence {
    /// It is, or has just registered.
    #[default]
    Heard,
    /// It has been silent for longer than its lease: the workload is sent no traffic, and is removed later.
    Silent,
    /// It was lost together with many others, which says more about the network than about the workload: everything
    /// stays as it was.
    Unknown,
    /// It was lost like that, and is not believed to come back any more: from now on it is silent.
    Released,
}

/// A workload as its agent registered it: the fields of a `WorkloadEntry`, and who may speak for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Namespace of the workload.
    pub namespace: String,
    /// Name of its entry.
    pub name: String,
    /// IP address, DNS name, or `unix:///path`.
    pub address: String,
    /// Service port name to workload port.
    pub ports: BTreeMap<String, u16>,
    /// Labels, which selectors match on.
    pub labels: BTreeMap<String, String>,
    /// Annotations, kept for the user.
    pub annotations: BTreeMap<String, String>,
    /// Network; empty is the default one.
    pub network: String,
    /// Where it runs.
    pub locality: Locality,
    /// Load-balancing weight; 0 stands for 1.
    pub weight: u32,
    /// Service account; its identity follows from it.
    pub service_account: String,
    /// Cluster id that its agent told.
    pub cluster: String,
    /// The `WorkloadGroup` it joined, in the same namespace; empty when none.
    pub group: String,
    /// Stable id of the instance, kept when the agent comes back.
    pub instance: String,
    /// The agent's session: reports of another session change nothing.
    pub session: String,
    /// How long the registration outlives the last sign of life, in milliseconds.
    pub lease_ms: u64,
    /// May it be sent traffic, as far as its agent said.
    pub healthy: bool,
    /// Whether its agent is heard; set by `apply`.
    pub presence: Presence,
    /// When its agent was lost, or given up after that, in milliseconds since 1970; 0 while it is heard.
    pub lost_ms: i64,
    /// Why it is not healthy, as its agent said; empty when it is, or nobody said.
    pub reason: String,
}

impl Registration {
    /// May it be sent traffic: its agent said so, and is not known to be gone.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.healthy && matches!(self.presence, Presence::Heard | Presence::Unknown)
    }

    /// The key of the workload.
    #[must_use]
    pub fn key(&self) -> WorkloadKey {
        WorkloadKey { namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

/// A change of the mesh. Every variant carries the whole new value of what it names.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Objects created, replaced and removed together: all of them, or none when one `expected` does not hold.
    Change {
        /// Created or replaced.
        puts: Vec<Put>,
        /// Removed, after the puts.
        deletes: Vec<Delete>,
    },
    /// This is now what `service.source` says about `service.hostname`. The VIP index is chosen by `apply`.
    PutService {
        /// The whole value.
        service: Arc<Service>,
    },
    /// `source` knows no service `host` any more, nor endpoints of it.
    RemoveService {
        /// The host.
        host: Hostname,
        /// Who says so.
        source: SourceId,
    },
    /// These are now the endpoints of `host` according to `source`.
    ReplaceEndpoints {
        /// The host.
        host: Hostname,
        /// Who says so.
        source: SourceId,
        /// All of them, in any order.
        endpoints: Vec<Endpoint>,
    },
    /// A workload is there; the registration of the newest session stands.
    RegisterWorkload {
        /// The whole value.
        registration: Arc<Registration>,
    },
    /// A workload's health, says its agent of `session`, who is heard by that.
    WorkloadHealth {
        /// Which workload.
        key: WorkloadKey,
        /// Who says so; another session than the registered one changes nothing.
        session: String,
        /// May it be sent traffic.
        healthy: bool,
        /// Why not, for people.
        reason: String,
    },
    /// Whether a workload's agent is heard, says whoever holds the leases, of `session`.
    WorkloadPresence {
        /// Which workload.
        key: WorkloadKey,
        /// Whose agent's; another session than the registered one changes nothing.
        session: String,
        /// Whether it is heard.
        presence: Presence,
    },
    /// A workload is gone, says `session`.
    RemoveWorkload {
        /// Which workload.
        key: WorkloadKey,
        /// Who says so; another session than the registered one changes nothing.
        session: String,
    },
    /// The mesh-wide settings (Istio `MeshConfig`), as the user wrote them.
    PutMesh {
        /// The whole value.
        config: serde_json::Value,
    },
    /// How many entries of history are kept.
    SetHistoryLimit {
        /// Number of log entries.
        entries: u32,
    },
    /// How many entries of history are kept, and for how long.
    SetHistoryRetention {
        /// Number of log entries.
        entries: u32,
        /// Milliseconds between an entry and the newest one; 0 keeps them whatever their age.
        age_ms: u64,
    },
}

/// One entry of the log: applied as a whole, at one revision.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// When it was proposed, in milliseconds since 1970, by the proposer's clock.
    pub time_ms: i64,
    /// Who asked for it.
    pub author: String,
    /// Applied in order.
    pub commands: Vec<Command>,
}

impl Batch {
    /// A batch that creates or replaces `objects` as one change.
    #[must_use]
    pub fn put_objects(time_ms: i64, author: &str, objects: impl IntoIterator<Item = Object>) -> Self {
        let puts = objects.into_iter().map(|o| Put { object: Arc::new(o), expected: None }).collect();
        Self {
            time_ms,
            author: author.to_owned(),
            commands: vec![Command::Change { puts, deletes: Vec::new() }],
        }
    }

    /// A batch that removes objects as one change.
    #[must_use]
    pub fn delete_objects(time_ms: i64, author: &str, keys: impl IntoIterator<Item = ObjectKey>) -> Self {
        let deletes = keys.into_iter().map(|key| Delete { key, expected: None }).collect();
        Self {
            time_ms,
            author: author.to_owned(),
            commands: vec![Command::Change { puts: Vec::new(), deletes }],
        }
    }
}
