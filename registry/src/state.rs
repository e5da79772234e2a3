//! The applied state: what every member computes from the log, the same way.
//!
//! [`State::apply`] takes one log entry, a [`Batch`], and cannot fail: every check that needs more than the state
//! itself is made before the entry is proposed. It returns the [`Changes`], from which the next
//! [`Snapshot`](crate::snapshot::Snapshot) is built and what must be written is known, and the [`Outcome`] for the
//! author of the entry. [`encode`] turns the state into bytes and back; [`State::past`] is the configuration as it was.

mod apply;
pub mod changes;
pub mod command;
pub mod encode;
pub mod history;
mod past;
mod stored;
mod vip;

use std::sync::Arc;

use serde_json::Value;

pub use self::changes::{Changes, CommandOutcome, ObjectOutcome, ObjectResult, Outcome};
pub use self::command::{
    Batch, Command, Delete, ObjectKey, Presence, Put, Registration, Revision, WorkloadKey,
};
use self::history::History;
pub use self::past::{Past, PastError};
pub use self::stored::StoredCommand;
use self::vip::VipTable;
use crate::chunks::Chunks;
use crate::config::{Kind, Object};
use crate::model::service::{Endpoint, Hostname, Service, SourceId};

/// Why stored bytes are not what they should be.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A newer program wrote them.
    #[error("stored in version {found}, this program knows up to {newest}; upgrade it before it goes on")]
    Version {
        /// The version found.
        found: u32,
        /// The newest version known.
        newest: u32,
    },
    /// An object of a kind that this program does not know.
    #[error("stored object of the unknown kind {found:?}; upgrade this program before it goes on")]
    Kind {
        /// The kind found.
        found: String,
    },
    /// Not the form that was stored.
    #[error("stored value is malformed")]
    Malformed(#[from] serde_json::Error),
    /// A key that nothing is stored under.
    #[error("unknown key {key:?} in the store")]
    Key {
        /// The key, as far as it is text.
        key: String,
    },
    /// The bytes were cut or changed.
    #[error("stored state is damaged: {what}")]
    Damaged {
        /// What does not fit.
        what: &'static str,
    },
}

/// The mesh as the log made it. A copy costs next to nothing, and so does a change while there is one: it shares all
/// but what changes.
#[derive(Debug, Clone, Default)]
pub struct State {
    revision: Revision,
    objects: Chunks<ObjectKey, Arc<Object>>,
    services: Chunks<(Hostname, SourceId), Arc<Service>>,
    endpoints: Chunks<(Hostname, SourceId), Arc<[Endpoint]>>,
    workloads: Chunks<WorkloadKey, Arc<Registration>>,
    vips: VipTable,
    mesh: Option<Arc<Value>>,
    history: History,
    /// Derived: which `ServiceEntry` objects declare a host.
    declared: Chunks<(Hostname, ObjectKey), ()>,
    /// Derived: the `ServiceEntry` objects with a workload selector.
    selecting: Chunks<ObjectKey, ()>,
}

impl State {
    /// The revision of the last entry that was applied.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// One object.
    #[must_use]
    pub fn object(&self, key: &ObjectKey) -> Option<&Arc<Object>> {
        self.objects.get(key)
    }

    /// All objects, by kind, namespace and name.
    pub fn objects(&self) -> impl Iterator<Item = (&ObjectKey, &Arc<Object>)> {
        self.objects.iter()
    }

    /// The objects of one kind, by namespace and name.
    pub fn objects_of(&self, kind: Kind) -> impl Iterator<Item = (&ObjectKey, &Arc<Object>)> {
        let first = first_of(kind, "");
        self.objects.iter_from(&first).take_while(move |(key, _)| key.kind == kind)
    }

    /// The objects of one kind in one namespace, by name.
    pub fn objects_in<'a>(
        &'a self,
        kind: Kind,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a ObjectKey, &'a Arc<Object>)> + use<'a> {
        let first = first_of(kind, namespace);
        let namespace = namespace.to_owned();
        self.objects
            .iter_from(&first)
            .take_while(move |(key, _)| key.kind == kind && key.namespace == namespace)
    }

    /// What each source says about `host`, by source.
    pub fn services_of<'a>(
        &'a self,
        host: &str,
    ) -> impl Iterator<Item = (&'a SourceId, &'a Arc<Service>)> + use<'a> {
        let host = host.to_owned();
        self.services
            .iter_from(&(host.clone(), SourceId::Config))
            .take_while(move |((h, _), _)| *h == host)
            .map(|((_, source), service)| (source, service))
    }

    /// All that sources say about services, by host and source.
    pub fn services(&self) -> impl Iterator<Item = (&Hostname, &SourceId, &Arc<Service>)> {
        self.services.iter().map(|((host, source), service)| (host, source, service))
    }

    /// The endpoints of `host` according to each source, by source.
    pub fn endpoints_of<'a>(
        &'a self,
        host: &str,
    ) -> impl Iterator<Item = (&'a SourceId, &'a Arc<[Endpoint]>)> + use<'a> {
        let host = host.to_owned();
        self.endpoints
            .iter_from(&(host.clone(), SourceId::Config))
            .take_while(move |((h, _), _)| *h == host)
            .map(|((_, source), endpoints)| (source, endpoints))
    }

    /// The endpoints of every host and source.
    pub fn endpoints(&self) -> impl Iterator<Item = (&Hostname, &SourceId, &Arc<[Endpoint]>)> {
        self.endpoints.iter().map(|((host, source), endpoints)| (host, source, endpoints))
    }

    /// One registered workload.
    #[must_use]
    pub fn workload(&self, key: &WorkloadKey) -> Option<&Arc<Registration>> {
        self.workloads.get(key)
    }

    /// All registered workloads, by namespace and name.
    pub fn workloads(&self) -> impl Iterator<Item = (&WorkloadKey, &Arc<Registration>)> {
        self.workloads.iter()
    }

    /// The registered workloads of one namespace, by name.
    pub fn workloads_in<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a WorkloadKey, &'a Arc<Registration>)> + use<'a> {
        let namespace = namespace.to_owned();
        let first = WorkloadKey { namespace: namespace.clone(), name: String::new() };
        self.workloads.iter_from(&first).take_while(move |(key, _)| key.namespace == namespace)
    }

    /// The mesh-wide settings as the user wrote them.
    #[must_use]
    pub fn mesh(&self) -> Option<&Arc<Value>> {
        self.mesh.as_ref()
    }

    /// The `ServiceEntry` objects that declare `host`, by key.
    pub fn declaring(&self, host: &str) -> impl Iterator<Item = &Arc<Object>> {
        self.declarations(host).filter_map(|key| self.objects.get(key))
    }

    /// The keys of the `ServiceEntry` objects that declare `host`, in order.
    fn declarations<'a>(&'a self, host: &str) -> impl Iterator<Item = &'a ObjectKey> + use<'a> {
        let first = (host.to_owned(), first_of(Kind::ServiceEntry, ""));
        let host = first.0.clone();
        let declared = self.declared.iter_from(&first).map(|(declared, ())| declared);
        declared.take_while(move |(declared, _)| *declared == host).map(|(_, key)| key)
    }

    /// The keys of the `ServiceEntry` objects of a namespace that have a workload selector, in order.
    fn selecting_in<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a ObjectKey> + use<'a> {
        let first = first_of(Kind::ServiceEntry, namespace);
        let namespace = namespace.to_owned();
        let keys = self.selecting.iter_from(&first).map(|(key, ())| key);
        keys.take_while(move |key| key.namespace == namespace)
    }

    /// The stable index of `host` among the automatic virtual addresses, while the host exists.
    #[must_use]
    pub fn vip_index(&self, host: &str) -> Option<u32> {
        self.vips.get(host)
    }

    /// Every host that a source or a `ServiceEntry` declares, in order.
    pub fn hosts(&self) -> impl Iterator<Item = &Hostname> {
        self.vips.iter().map(|(host, _)| host)
    }

    /// The configuration changes that are remembered, oldest first.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }
}

/// No key of this kind and namespace comes before this one.
fn first_of(kind: Kind, namespace: &str) -> ObjectKey {
    ObjectKey { kind, namespace: namespace.to_owned(), name: String::new() }
}
