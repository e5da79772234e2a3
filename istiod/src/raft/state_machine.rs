//! The mesh as what the log drives: the parts of the replicated state, side by side.
//!
//! A [`Command`] is for one of them, or for two at once when a workload joins. Each part is applied by its own
//! crate or module; here they are only told apart, stored under their own keys, and shown to the publisher. A command
//! that an operator caused leaves an entry in the audit trail.

mod command;
mod slot;
mod witness;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use ca::node::Revocations;
use ca::state::{CaCommand, CaOutcome, CaState};
use prost::Message as _;
use registry::state::{Batch, Changes, Outcome as RegistryOutcome, Presence, Revision, State};
use tokio::sync::watch;

pub(crate) use self::command::REASONS;
pub use self::command::{Command, Outcome, VERSION};
use self::slot::Slot;
use super::machine::{Frozen, Halt, StateMachine, Writes};
use super::part::{Part as _, PartError, from_wire, to_wire};
use super::store::{Pairs, Write};
use super::wire::MeshState;
use crate::access::AccessState;
use crate::audit::AuditState;
use crate::cluster::ClusterState;
use crate::publish::Publisher;

/// Keys of the registry in the store.
const REGISTRY_KEYS: &[u8] = b"r/";
/// Keys of the certificate authority in the store.
const CA_KEYS: &[u8] = b"c/";
/// Keys of the members in the store.
const CLUSTER_KEYS: &[u8] = b"m/";
/// Keys of access in the store.
const ACCESS_KEYS: &[u8] = b"a/";
/// Keys of the audit trail in the store.
const AUDIT_KEYS: &[u8] = b"t/";

/// The whole state at one point: values that nobody changes.
#[derive(Debug, Clone)]
pub struct View {
    /// The last applied index.
    pub revision: Revision,
    /// The mesh.
    pub registry: Arc<State>,
    /// The certificate authority's state.
    pub ca: Arc<CaState>,
    /// The members of the control plane.
    pub cluster: Arc<ClusterState>,
    /// Who may use the admin API.
    pub access: Arc<AccessState>,
    /// Who changed what.
    pub audit: Arc<AuditState>,
}

impl View {
    /// The whole state as a snapshot carries it. Equal states give equal bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (cluster, access, audit) =
            (to_wire(&*self.cluster), to_wire(&*self.access), to_wire(&*self.audit));
        // What an older program can read is written so that it does.
        let heard = self.registry.workloads().all(|(_, workload)| workload.presence == Presence::Heard);
        let reasons = self.registry.workloads().any(|(_, workload)| !workload.reason.is_empty());
        let lost = !self.ca.revoked().is_empty() || !heard;
        let old = cluster.is_none() && access.is_none() && audit.is_none();
        let bound = self.ca.tokens().any(|token| !token.cidrs.is_empty());
        let version = match (reasons || bound, lost, old) {
            (true, _, _) => 4,
            (false, true, _) => 3,
            (false, false, false) => 2,
            (false, false, true) => 1,
        };
        let (registry, ca) = (self.registry.encode().into(), self.ca.encode().into());
        MeshState { version, registry, ca, cluster, access, audit }.encode_to_vec()
    }

    /// The state that [`View::encode`] wrote, as it was at `index`.
    ///
    /// # Errors
    ///
    /// [`Halt`] if a newer program wrote it, or the bytes are no state.
    pub fn decode(index: u64, bytes: &[u8]) -> Result<Self, Halt> {
        let halt = |reason: String| Halt { index, reason };
        let stored = MeshState::decode(bytes).map_err(|error| halt(format!("not a state: {error}")))?;
        if stored.version > VERSION {
            return Err(halt(command::newer("the snapshot", stored.version)));
        }
        let part = |error: PartError| halt(error.to_string());
        Ok(Self {
            revision: Revision(index),
            registry: Arc::new(State::decode(&stored.registry).map_err(|error| halt(error.to_string()))?),
            ca: Arc::new(CaState::decode(&stored.ca).map_err(|error| halt(error.to_string()))?),
            cluster: Arc::new(from_wire(stored.cluster).map_err(part)?),
            access: Arc::new(from_wire(stored.access).map_err(part)?),
            audit: Arc::new(from_wire(stored.audit).map_err(part)?),
        })
    }
}

/// The replicated mesh.
#[derive(Debug)]
pub struct Mesh {
    applied: u64,
    /// Copied on the next change only while somebody still holds a [`View`].
    registry: Arc<State>,
    ca: Arc<CaState>,
    cluster: Slot<ClusterState>,
    access: Slot<AccessState>,
    audit: Slot<AuditState>,
    publisher: Publisher,
    /// Who may use the admin API, for whoever decides it.
    shown_access: watch::Sender<Arc<AccessState>>,
    /// The members, for those who follow them.
    members: watch::Sender<Arc<ClusterState>>,
    /// The revoked nodes, for whoever serves nodes.
    revoked: watch::Sender<Arc<Revocations>>,
    /// They may be others than those that are shown.
    unshown_revoked: bool,
    /// Since the last publication; the revision that was published.
    unshown: Changes,
    shown: Revision,
    /// The state did not come from the one before: the next snapshot is built from nothing.
    replaced: bool,
    /// Since the last writes.
    unwritten: Changes,
    ca_writes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Mesh {
    /// An empty mesh that shows itself through `publisher`.
    #[must_use]
    pub fn new(publisher: Publisher) -> Self {
        Self {
            applied: 0,
            registry: Arc::default(),
            ca: Arc::default(),
            cluster: Slot::new(CLUSTER_KEYS, Arc::default()),
            access: Slot::new(ACCESS_KEYS, Arc::default()),
            audit: Slot::new(AUDIT_KEYS, Arc::default()),
            publisher,
            shown_access: watch::Sender::new(Arc::default()),
            members: watch::Sender::new(Arc::default()),
            revoked: watch::Sender::new(Arc::default()),
            unshown_revoked: false,
            unshown: Changes::default(),
            shown: Revision(0),
            replaced: false,
            unwritten: Changes::default(),
            ca_writes: BTreeMap::new(),
        }
    }

    /// Who may use the admin API, always the latest that is published.
    #[must_use]
    pub fn watch_access(&self) -> watch::Receiver<Arc<AccessState>> {
        self.shown_access.subscribe()
    }

    /// The members, always the latest.
    #[must_use]
    pub fn members(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.members.subscribe()
    }

    /// The revoked nodes, always the latest.
    #[must_use]
    pub fn revoked(&self) -> watch::Receiver<Arc<Revocations>> {
        self.revoked.subscribe()
    }

    /// The state as it is now.
    #[must_use]
    pub fn view(&self) -> View {
        View {
            revision: Revision(self.applied),
            registry: self.registry.clone(),
            ca: self.ca.clone(),
            cluster: self.cluster.get(),
            access: self.access.get(),
            audit: self.audit.get(),
        }
    }

    fn apply_registry(&mut self, index: u64, batch: &Batch) -> RegistryOutcome {
        let (mut changes, outcome) = Arc::make_mut(&mut self.registry).apply(Revision(index), batch);
        self.unwritten.merge(changes.split_written());
        self.unshown.merge(changes);
        outcome
    }

    fn apply_ca(&mut self, command: CaCommand) -> CaOutcome {
        self.unshown_revoked |= matches!(command, CaCommand::RevokeNode(_) | CaCommand::Prune { .. });
        let effect = Arc::make_mut(&mut self.ca).apply(command);
        self.note_ca(effect.writes);
        effect.outcome
    }

    fn note_ca(&mut self, writes: Vec<ca::state::Write>) {
        self.ca_writes.extend(writes.into_iter().map(|write| (write.key.into_bytes(), write.value)));
    }

    fn apply_command(&mut self, index: u64, command: Command) -> Outcome {
        match command {
            Command::Registry(batch) => Outcome::Registry(self.apply_registry(index, &batch)),
            Command::Ca(command) => Outcome::Ca(self.apply_ca(command)),
            Command::Join { redeem, register } => {
                let redeemed = self.apply_ca(redeem);
                let welcome = matches!(redeemed, CaOutcome::Redeemed { .. });
                let registered = welcome.then(|| self.apply_registry(index, &register));
                Outcome::Join { redeemed, registered }
            }
            Command::Cluster(command) => Outcome::Cluster(self.cluster.apply(index, command)),
            Command::Access(command) => Outcome::Access(self.access.apply(index, command)),
            Command::Audit(command) => Outcome::Audit(self.audit.apply(index, command)),
        }
    }

    /// Another state in place of this one.
    fn replace(&mut self, view: View) {
        self.applied = view.revision.0;
        self.registry = view.registry;
        self.ca = view.ca;
        self.cluster = Slot::new(CLUSTER_KEYS, view.cluster);
        self.access = Slot::new(ACCESS_KEYS, view.access);
        self.audit = Slot::new(AUDIT_KEYS, view.audit);
        self.unshown = Changes::default();
        self.unwritten = Changes::default();
        self.ca_writes.clear();
        self.replaced = true;
        self.unshown_revoked = true;
    }
}

impl StateMachine for Mesh {
    type Answer = Outcome;

    fn apply(&mut self, index: u64, command: &[u8]) -> Result<Outcome, Halt> {
        let (command, origin) = Command::decode_as(index, command)?;
        self.applied = index;
        let Some(origin) = origin else { return Ok(self.apply_command(index, command)) };
        let named = witness::named(&command);
        let before = witness::see(&self.view(), &named);
        let outcome = self.apply_command(index, command);
        let objects = witness::changed(before, witness::see(&self.view(), &named));
        self.audit.change(|audit| audit.append(index, origin, objects));
        Ok(outcome)
    }

    fn take_writes(&mut self) -> Writes {
        let (registry, changes) = (self.registry.clone(), std::mem::take(&mut self.unwritten));
        let ca = std::mem::take(&mut self.ca_writes);
        let parts = [self.cluster.take_writes(), self.access.take_writes(), self.audit.take_writes()];
        Box::new(move || {
            let registry = registry.writes(&changes).into_iter();
            let mut writes: Vec<Write> =
                registry.map(|(key, value)| Write { key: [REGISTRY_KEYS, &key].concat(), value }).collect();
            let ca = ca.into_iter();
            writes.extend(ca.map(|(key, value)| Write { key: [CA_KEYS, &key].concat(), value }));
            writes.extend(parts.into_iter().flat_map(|part| part()));
            writes
        })
    }

    fn all_writes(&mut self) -> Writes {
        self.unwritten = Changes::default();
        self.ca_writes.clear();
        let (registry, ca) = (self.registry.clone(), self.ca.clone());
        let parts = [self.cluster.all_writes(), self.access.all_writes(), self.audit.all_writes()];
        Box::new(move || {
            let registry = registry.pairs().into_iter();
            let mut writes: Vec<Write> = registry
                .map(|(key, value)| Write { key: [REGISTRY_KEYS, &key].concat(), value: Some(value) })
                .collect();
            let ca = ca.entries().into_iter();
            writes.extend(
                ca.map(|entry| Write { key: [CA_KEYS, entry.key.as_bytes()].concat(), value: entry.value }),
            );
            writes.extend(parts.into_iter().flat_map(|part| part()));
            writes
        })
    }

    fn publish(&mut self, index: u64, now: Instant) {
        self.applied = index;
        let changes = std::mem::take(&mut self.unshown);
        if std::mem::take(&mut self.replaced) {
            // Everything may be different: the mesh-wide settings stand for all that depends on them.
            let mut everything = Changes::default();
            everything.mesh = true;
            let snapshot = self.publisher.rebuild(&self.registry);
            self.publisher.publish_snapshot(snapshot, everything, now);
        } else if self.registry.revision() != self.shown {
            self.publisher.publish(&self.registry, changes, now);
        }
        self.shown = self.registry.revision();
        let access = self.access.get();
        self.shown_access.send_if_modified(|shown| {
            let changed = !Arc::ptr_eq(shown, &access);
            *shown = access;
            changed
        });
        if std::mem::take(&mut self.unshown_revoked) {
            self.revoked.send_if_modified(|shown| {
                let changed = **shown != *self.ca.revoked();
                if changed {
                    *shown = Arc::new(self.ca.revoked().clone());
                }
                changed
            });
        }
        let cluster = self.cluster.get();
        self.members.send_if_modified(|shown| {
            let changed = !Arc::ptr_eq(shown, &cluster) && **shown != *cluster;
            *shown = cluster;
            changed
        });
    }

    fn freeze(&self) -> Frozen {
        let view = self.view();
        Box::new(move || Ok(view.encode()))
    }

    fn restore(&mut self, index: u64, snapshot: &[u8]) -> Result<(), Halt> {
        self.replace(View::decode(index, snapshot)?);
        Ok(())
    }

    fn load(&mut self, index: u64, pairs: Pairs) -> Result<(), Halt> {
        let halt = |reason: String| Halt { index, reason };
        let stored = |prefix: &'static [u8]| {
            let pairs = pairs.iter();
            pairs.filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?, value.as_slice())))
        };
        let registry = State::from_pairs(stored(REGISTRY_KEYS)).map_err(|error| halt(error.to_string()))?;
        let ca: Result<Vec<_>, _> =
            stored(CA_KEYS).map(|(key, value)| Ok((std::str::from_utf8(key)?, value))).collect();
        let ca = ca.map_err(|error: std::str::Utf8Error| halt(error.to_string()))?;
        let ca = CaState::from_entries(ca).map_err(|error| halt(error.to_string()))?;
        let part = |error: PartError| halt(error.to_string());
        self.replace(View {
            revision: Revision(index),
            registry: Arc::new(registry),
            ca: Arc::new(ca),
            cluster: Arc::new(ClusterState::from_pairs(stored(CLUSTER_KEYS)).map_err(part)?),
            access: Arc::new(AccessState::from_pairs(stored(ACCESS_KEYS)).map_err(part)?),
            audit: Arc::new(AuditState::from_pairs(stored(AUDIT_KEYS)).map_err(part)?),
        });
        Ok(())
    }
}
