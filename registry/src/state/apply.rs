//! One log entry applied: deterministic, infallible, and silent about what does not change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;

use super::changes::{Changes, CommandOutcome, ObjectOutcome, ObjectResult, Outcome};
use super::command::{Batch, Command, Delete, ObjectKey, Presence, Put, Registration, Revision, WorkloadKey};
use super::encode::StoreKey;
use super::{State, history};
use crate::config::{Kind, Object};
use crate::merge::declare;
use crate::model::service::{Endpoint, Service, SourceId};

impl State {
    /// Applies one entry of the log.
    ///
    /// The same entries in the same order give the same state on every member; an entry that sets what is set already
    /// changes nothing but the revision.
    pub fn apply(&mut self, revision: Revision, batch: &Batch) -> (Changes, Outcome) {
        self.revision = revision;
        let mut entry = Entry {
            state: self,
            revision,
            time_ms: batch.time_ms,
            changes: Changes::default(),
            remembered: Vec::new(),
        };
        let commands = batch.commands.iter().map(|command| entry.apply(command)).collect();
        let changes = entry.finish(batch);
        (changes, Outcome { commands })
    }
}

/// The entry that is being applied.
struct Entry<'a> {
    state: &'a mut State,
    revision: Revision,
    /// When it was proposed, in milliseconds since 1970.
    time_ms: i64,
    changes: Changes,
    remembered: Vec<history::Change>,
}

impl Entry<'_> {
    fn apply(&mut self, command: &Command) -> CommandOutcome {
        match command {
            Command::Change { puts, deletes } => CommandOutcome::Objects(self.change(puts, deletes)),
            Command::PutService { service } => applied(self.put_service(service)),
            Command::RemoveService { host, source } => applied(self.remove_service(host, source)),
            Command::ReplaceEndpoints { host, source, endpoints } => {
                applied(self.replace_endpoints(host, source, endpoints))
            }
            Command::RegisterWorkload { registration } => self.register(registration),
            Command::WorkloadHealth { key, session, healthy, reason } => {
                self.health(key, session, *healthy, reason)
            }
            Command::WorkloadPresence { key, session, presence } => self.presence(key, session, *presence),
            Command::RemoveWorkload { key, session } => self.remove_workload(key, session),
            Command::PutMesh { config } => applied(self.put_mesh(config)),
            Command::SetHistoryLimit { entries } => {
                let age_ms = self.state.history.age_ms();
                applied(self.set_history_retention(*entries, age_ms))
            }
            Command::SetHistoryRetention { entries, age_ms } => {
                applied(self.set_history_retention(*entries, *age_ms))
            }
        }
    }

    /// Creation time of what this entry creates, in seconds since 1970.
    fn created(&self) -> i64 {
        self.time_ms.div_euclid(1000)
    }

    fn finish(mut self, batch: &Batch) -> Changes {
        if !self.remembered.is_empty() {
            self.changes.written.insert(StoreKey::History(self.revision));
            let forgotten = self.state.history.push(history::Entry {
                revision: self.revision,
                time_ms: batch.time_ms,
                author: batch.author.clone(),
                changes: self.remembered,
            });
            self.changes.written.extend(forgotten.into_iter().map(StoreKey::History));
        }
        self.changes.written.insert(StoreKey::Meta);
        self.changes
    }

    // ---- objects ------------------------------------------------------------------

    fn change(&mut self, puts: &[Put], deletes: &[Delete]) -> Vec<ObjectOutcome> {
        let conflicts: Vec<_> = puts
            .iter()
            .map(|put| (ObjectKey::of(&put.object), put.expected, Some(&put.object)))
            .chain(deletes.iter().map(|delete| (delete.key.clone(), delete.expected, None)))
            .map(|(key, expected, value)| {
                let conflict = expected.and_then(|expected| self.conflict(&key, expected, value));
                (key, conflict)
            })
            .collect();
        if conflicts.iter().any(|(_, conflict)| conflict.is_some()) {
            let told = |(key, conflict): (_, Option<_>)| ObjectOutcome {
                key,
                result: conflict.unwrap_or(ObjectResult::NotApplied),
            };
            return conflicts.into_iter().map(told).collect();
        }
        // Who names an object twice means the last.
        let last: BTreeMap<ObjectKey, usize> =
            conflicts.into_iter().enumerate().map(|(at, (key, _))| (key, at)).collect();
        let mut outcomes = Vec::with_capacity(puts.len() + deletes.len());
        for (at, put) in puts.iter().enumerate() {
            let key = ObjectKey::of(&put.object);
            let result = match last.get(&key) {
                Some(last) if *last != at => ObjectResult::NotApplied,
                Some(_) | None => self.put_object(&key, &put.object),
            };
            outcomes.push(ObjectOutcome { key, result });
        }
        for delete in deletes {
            let result = self.delete_object(&delete.key);
            outcomes.push(ObjectOutcome { key: delete.key.clone(), result });
        }
        outcomes
    }

    /// The conflict, when the object is not at `expected`; a value that is there already conflicts with nothing.
    fn conflict(
        &self,
        key: &ObjectKey,
        expected: Revision,
        value: Option<&Arc<Object>>,
    ) -> Option<ObjectResult> {
        let found = self.state.objects.get(key);
        let at = Revision(found.map_or(0, |object| object.revision));
        let same = match (found, value) {
            (Some(found), Some(value)) => same_object(found, value),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        (at != expected && !same).then_some(ObjectResult::Conflict { expected, found: at })
    }

    fn put_object(&mut self, key: &ObjectKey, object: &Arc<Object>) -> ObjectResult {
        let old = self.state.objects.get(key).cloned();
        if let Some(old) = old.as_ref().filter(|old| same_object(old, object)) {
            return ObjectResult::Unchanged(Revision(old.revision));
        }
        let mut new = Object::clone(object);
        new.created = old.as_ref().map_or(self.created(), |old| old.created);
        new.revision = self.revision.0;
        new.generation = match &old {
            Some(old) if old.raw == new.raw => old.generation,
            Some(old) => old.generation.saturating_add(1),
            None => 1,
        };
        let result = if old.is_some() { ObjectResult::Configured } else { ObjectResult::Created };
        self.replace_object(key, old, Some(Arc::new(new)));
        result
    }

    fn delete_object(&mut self, key: &ObjectKey) -> ObjectResult {
        let Some(old) = self.state.objects.get(key).cloned() else { return ObjectResult::NotFound };
        self.replace_object(key, Some(old), None);
        ObjectResult::Deleted
    }

    fn replace_object(&mut self, key: &ObjectKey, old: Option<Arc<Object>>, new: Option<Arc<Object>>) {
        self.remembered.push(history::Change {
            what: key.to_string(),
            before: old.clone().map(history::Value::Object),
            after: new.clone().map(history::Value::Object),
        });
        match &new {
            Some(object) => self.state.objects.insert(key.clone(), Arc::clone(object)),
            None => drop(self.state.objects.remove(key)),
        }
        self.changes.objects.insert(key.clone());
        self.changes.written.insert(StoreKey::Object(key.clone()));
        if key.kind == Kind::ServiceEntry {
            self.redeclare(key, old.as_deref(), new.as_deref());
        }
        if key.kind == Kind::WorkloadEntry {
            let entries = [old, new];
            let labels = entries.iter().flatten().filter_map(|object| declare::workload_labels(object));
            // A registration of the same name is hidden by the entry, and comes back without it.
            let registered = WorkloadKey { namespace: key.namespace.clone(), name: key.name.clone() };
            let hidden =
                self.state.workloads.get(&registered).map(|registration| registration.labels.clone());
            for labels in labels.chain(hidden).collect::<Vec<_>>() {
                self.touch_selecting(&key.namespace, &labels);
            }
        }
    }

    /// A `ServiceEntry` declares other hosts, or selects otherwise.
    fn redeclare(&mut self, key: &ObjectKey, old: Option<&Object>, new: Option<&Object>) {
        self.state.index_service_entry(key, old, new);
        let hosts = |object: Option<&Object>| object.map(declare::hosts).unwrap_or_default();
        let (before, after) = (hosts(old), hosts(new));
        for host in before.union(&after) {
            self.settle_vip(host);
            self.changes.hosts.insert(host.clone());
        }
    }

    /// The hosts whose selectors match a workload with these labels may have other endpoints.
    fn touch_selecting(&mut self, namespace: &str, labels: &declare::Labels) {
        let keys = self.state.selecting_in(namespace);
        for object in keys.filter_map(|key| self.state.objects.get(key)) {
            if declare::selects(object, labels) {
                self.changes.hosts.extend(declare::hosts(object));
            }
        }
    }

    /// A host has an index exactly while somebody declares it.
    fn settle_vip(&mut self, host: &str) {
        let exists =
            self.state.declarations(host).next().is_some() || self.state.services_of(host).next().is_some();
        let changed = if exists { self.state.vips.allocate(host) } else { self.state.vips.release(host) };
        if changed {
            self.changes.written.insert(StoreKey::Vip(host.to_owned()));
        }
    }

    // ---- services and endpoints of sources ----------------------------------------

    fn put_service(&mut self, service: &Arc<Service>) -> bool {
        let mut new = Service::clone(service);
        new.hostname.make_ascii_lowercase();
        let host = new.hostname.clone();
        let key = (host.clone(), new.source.clone());
        let old = self.state.services.get(&key);
        if new.created == 0 {
            new.created = old.map_or(self.created(), |old| old.created);
        }
        new.vip_index = 0;
        if old.is_some_and(|old| **old == new) {
            return false;
        }
        self.changes.written.insert(StoreKey::Service(key.0.clone(), key.1.clone()));
        self.state.services.insert(key, Arc::new(new));
        self.settle_vip(&host);
        self.changes.hosts.insert(host);
        true
    }

    fn remove_service(&mut self, host: &str, source: &SourceId) -> bool {
        let host = host.to_ascii_lowercase();
        let key = (host.clone(), source.clone());
        let service = self.state.services.remove(&key).is_some();
        let endpoints = self.state.endpoints.remove(&key).is_some();
        if service {
            self.changes.written.insert(StoreKey::Service(key.0.clone(), key.1.clone()));
            self.settle_vip(&host);
        }
        if endpoints {
            self.changes.written.insert(StoreKey::Endpoints(key.0, key.1));
        }
        if service || endpoints {
            self.changes.hosts.insert(host);
        }
        service || endpoints
    }

    fn replace_endpoints(&mut self, host: &str, source: &SourceId, endpoints: &[Endpoint]) -> bool {
        let host = host.to_ascii_lowercase();
        let unique: BTreeSet<Endpoint> = endpoints.iter().cloned().collect();
        let new: Arc<[Endpoint]> = unique.into_iter().collect();
        let key = (host.clone(), source.clone());
        let old = self.state.endpoints.get(&key);
        if old.map_or(new.is_empty(), |old| **old == *new) {
            return false;
        }
        self.changes.written.insert(StoreKey::Endpoints(key.0.clone(), key.1.clone()));
        if new.is_empty() {
            self.state.endpoints.remove(&key);
        } else {
            self.state.endpoints.insert(key, new);
        }
        self.changes.hosts.insert(host);
        true
    }

    // ---- registered workloads -----------------------------------------------------

    /// An entry belongs to the service account that made it, until it is removed.
    fn register(&mut self, registration: &Arc<Registration>) -> CommandOutcome {
        let key = registration.key();
        let old = self.state.workloads.get(&key).cloned();
        if old.as_ref().is_some_and(|old| old.service_account != registration.service_account) {
            return CommandOutcome::Fenced;
        }
        if old.as_ref().is_some_and(|old| *old == *registration) {
            return applied(false);
        }
        self.state.workloads.insert(key.clone(), Arc::clone(registration));
        self.touch_workload(key, old.as_deref(), Some(registration));
        applied(true)
    }

    fn health(&mut self, key: &WorkloadKey, session: &str, healthy: bool, reason: &str) -> CommandOutcome {
        self.of_session(key, session, |old| Registration {
            healthy,
            reason: reason.to_owned(),
            presence: Presence::Heard,
            lost_ms: 0,
            ..old.clone()
        })
    }

    fn presence(&mut self, key: &WorkloadKey, session: &str, presence: Presence) -> CommandOutcome {
        let now = self.time_ms;
        self.of_session(key, session, |old| {
            let lost_ms = match (old.presence, presence) {
                (_, Presence::Heard) => 0,
                (before, after) if before == after => old.lost_ms,
                // That it is held does not make it lost later.
                (Presence::Silent, Presence::Unknown) => old.lost_ms,
                (_, Presence::Silent | Presence::Unknown | Presence::Released) => now,
            };
            Registration { presence, lost_ms, ..old.clone() }
        })
    }

    /// Changes what is registered of a session.
    fn of_session(
        &mut self,
        key: &WorkloadKey,
        session: &str,
        change: impl FnOnce(&Registration) -> Registration,
    ) -> CommandOutcome {
        let Some(old) = self.state.workloads.get(key).filter(|w| w.session == session).cloned() else {
            return CommandOutcome::Fenced;
        };
        let new = change(&old);
        if new == *old {
            return CommandOutcome::Applied { changed: false };
        }
        self.touch_workload(key.clone(), Some(&old), Some(&new));
        self.state.workloads.insert(key.clone(), Arc::new(new));
        CommandOutcome::Applied { changed: true }
    }

    fn remove_workload(&mut self, key: &WorkloadKey, session: &str) -> CommandOutcome {
        match self.state.workloads.get(key) {
            None => return CommandOutcome::Applied { changed: false },
            Some(workload) if workload.session != session => return CommandOutcome::Fenced,
            Some(_) => {}
        }
        let old = self.state.workloads.remove(key);
        self.touch_workload(key.clone(), old.as_deref(), None);
        CommandOutcome::Applied { changed: true }
    }

    fn touch_workload(&mut self, key: WorkloadKey, old: Option<&Registration>, new: Option<&Registration>) {
        self.changes.written.insert(StoreKey::Workload(key.clone()));
        let namespace = key.namespace.clone();
        self.touch_entry_of(&key);
        if !same_endpoint(old, new) {
            for labels in [old, new].into_iter().flatten().map(|registration| &registration.labels) {
                self.touch_selecting(&namespace, labels);
            }
        }
        self.changes.workloads.insert(key);
    }

    /// A registration tells the health of the `WorkloadEntry` object of the same name, whose labels select.
    fn touch_entry_of(&mut self, key: &WorkloadKey) {
        let entry =
            ObjectKey { kind: Kind::WorkloadEntry, namespace: key.namespace.clone(), name: key.name.clone() };
        if let Some(labels) = self.state.objects.get(&entry).and_then(|o| declare::workload_labels(o)) {
            self.touch_selecting(&key.namespace, &labels);
        }
    }

    // ---- settings -----------------------------------------------------------------

    fn put_mesh(&mut self, config: &Value) -> bool {
        if self.state.mesh.as_deref() == Some(config) {
            return false;
        }
        let config = Arc::new(config.clone());
        let before = self.state.mesh.replace(Arc::clone(&config));
        self.remembered.push(history::Change {
            what: history::MESH.to_owned(),
            before: before.map(history::Value::Json),
            after: Some(history::Value::Json(config)),
        });
        self.changes.mesh = true;
        self.changes.written.insert(StoreKey::Mesh);
        true
    }

    fn set_history_retention(&mut self, entries: u32, age_ms: u64) -> bool {
        let history = &mut self.state.history;
        if (history.limit(), history.age_ms()) == (entries, age_ms) {
            return false;
        }
        let forgotten = history.set_retention(entries, age_ms);
        self.changes.written.extend(forgotten.into_iter().map(StoreKey::History));
        true
    }
}

impl State {
    /// Keeps the derived indexes in step with a `ServiceEntry`.
    pub(super) fn index_service_entry(
        &mut self,
        key: &ObjectKey,
        old: Option<&Object>,
        new: Option<&Object>,
    ) {
        for host in old.map(declare::hosts).unwrap_or_default() {
            self.declared.remove(&(host, key.clone()));
        }
        for host in new.map(declare::hosts).unwrap_or_default() {
            self.declared.insert((host, key.clone()), ());
        }
        if new.is_some_and(declare::has_selector) {
            self.selecting.insert(key.clone(), ());
        } else {
            self.selecting.remove(key);
        }
    }
}

fn applied(changed: bool) -> CommandOutcome {
    CommandOutcome::Applied { changed }
}

/// The user wrote the same: what the state adds does not count.
fn same_object(a: &Object, b: &Object) -> bool {
    a.api_version == b.api_version && a.labels == b.labels && a.annotations == b.annotations && a.raw == b.raw
}

/// Both make the same endpoint, whoever speaks for them.
fn same_endpoint(a: Option<&Registration>, b: Option<&Registration>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return false };
    let bare = |r: &Registration| Registration {
        session: String::new(),
        instance: String::new(),
        group: String::new(),
        annotations: Default::default(),
        lease_ms: 0,
        healthy: r.serves(),
        presence: Presence::Heard,
        lost_ms: 0,
        reason: String::new(),
        ..r.clone()
    };
    bare(a) == bare(b)
}
