//! What an operator's command changed: the things it names, seen before and after.

use std::collections::BTreeMap;
use std::sync::Arc;

use ca::authn::Hash;
use ca::node::NodeId;
use ca::state::CaCommand;
use registry::config::Object;
use registry::state::{Batch, Command as Change, ObjectKey, Registration, WorkloadKey};
use serde_json::Value;

use super::{Command, View};
use crate::audit::AuditObject;
use crate::raft::part::Part;

/// What a command may change.
pub(super) enum Named {
    Object(ObjectKey),
    Mesh,
    Token(String),
    Node(NodeId),
    Bundle,
    History,
    Members,
    Access,
    Retention,
    /// Whether its agent is believed to come back.
    Workload(WorkloadKey),
}

/// Things by name. Objects are compared by address first: what is shared was not changed.
pub(super) type Seen = BTreeMap<String, Thing>;

/// A thing at one moment.
pub(super) enum Thing {
    Object(Arc<Object>),
    Json(Value),
    Bytes(Vec<u8>),
}

impl Thing {
    /// SHA-256 of the thing as compact JSON; of an object, of its Kubernetes form.
    fn digest(&self) -> Hash {
        match self {
            Self::Object(object) => object.written().digest,
            Self::Json(json) => Hash::of(json.to_string().as_bytes()),
            Self::Bytes(bytes) => Hash::of(bytes),
        }
    }

    fn is(&self, other: &Self) -> bool {
        matches!((self, other), (Self::Object(a), Self::Object(b)) if Arc::ptr_eq(a, b))
    }
}

/// What `command` may change, apart from what only sources and agents do.
pub(super) fn named(command: &Command) -> Vec<Named> {
    match command {
        Command::Registry(batch) => in_batch(batch),
        Command::Ca(command) => in_ca(command),
        Command::Join { redeem, register } => {
            let mut named = in_ca(redeem);
            named.extend(in_batch(register));
            named
        }
        Command::Cluster(_) => vec![Named::Members],
        Command::Access(_) => vec![Named::Access],
        Command::Audit(_) => vec![Named::Retention],
    }
}

fn in_batch(batch: &Batch) -> Vec<Named> {
    let mut named = Vec::new();
    for change in &batch.commands {
        match change {
            Change::Change { puts, deletes } => {
                let puts = puts.iter().map(|put| ObjectKey::of(&put.object));
                named.extend(puts.chain(deletes.iter().map(|delete| delete.key.clone())).map(Named::Object));
            }
            Change::PutMesh { .. } => named.push(Named::Mesh),
            Change::SetHistoryLimit { .. } | Change::SetHistoryRetention { .. } => named.push(Named::History),
            Change::PutService { .. }
            | Change::RemoveService { .. }
            | Change::ReplaceEndpoints { .. }
            | Change::RegisterWorkload { .. }
            | Change::WorkloadHealth { .. }
            | Change::RemoveWorkload { .. } => {}
            Change::WorkloadPresence { key, .. } => named.push(Named::Workload(key.clone())),
        }
    }
    named
}

fn in_ca(command: &CaCommand) -> Vec<Named> {
    match command {
        CaCommand::AddJoinToken(record) => vec![Named::Token(record.id.clone())],
        CaCommand::RevokeJoinToken { id } | CaCommand::Redeem { id, .. } => vec![Named::Token(id.clone())],
        CaCommand::RevokeNode(revocation) => vec![Named::Node(revocation.node)],
        CaCommand::SetBundle(_) => vec![Named::Bundle],
        CaCommand::Prune { .. } => Vec::new(),
    }
}

/// The named things as they are in `view`.
pub(super) fn see(view: &View, named: &[Named]) -> Seen {
    let mut seen = Seen::new();
    for named in named {
        match named {
            Named::Object(key) => {
                let object = view.registry.object(key).cloned();
                seen.extend(object.map(|object| (key.to_string(), Thing::Object(object))));
            }
            Named::Mesh => {
                let mesh = view.registry.mesh();
                seen.extend(mesh.map(|mesh| ("MeshConfig".to_owned(), Thing::Json(Value::clone(mesh)))));
            }
            Named::Token(id) => {
                let token = view.ca.token(id).and_then(|token| serde_json::to_value(token).ok());
                seen.extend(token.map(|token| (format!("JoinToken/{id}"), Thing::Json(token))));
            }
            Named::Node(node) => {
                let revoked = view.ca.revoked().get(node).and_then(|node| serde_json::to_value(node).ok());
                seen.extend(revoked.map(|revoked| (format!("RevokedNode/{node}"), Thing::Json(revoked))));
            }
            Named::Workload(key) => {
                let workload = view.registry.workload(key);
                let presence = |workload: &Arc<Registration>| Value::from(format!("{:?}", workload.presence));
                seen.extend(workload.map(|w| (format!("Workload/{key}"), Thing::Json(presence(w)))));
            }
            Named::Bundle => {
                let bundle = serde_json::to_value(view.ca.bundle()).ok();
                seen.extend(bundle.map(|bundle| ("Bundle".to_owned(), Thing::Json(bundle))));
            }
            Named::History => {
                let history = view.registry.history();
                let limit = serde_json::json!([history.limit(), history.age_ms()]);
                seen.insert("History/retention".to_owned(), Thing::Json(limit));
            }
            Named::Members => seen.extend(pairs("Member", &*view.cluster)),
            Named::Access => seen.extend(pairs("Access", &*view.access)),
            Named::Retention => {
                let retention = serde_json::to_value(view.audit.retention()).unwrap_or_default();
                seen.insert("Audit/retention".to_owned(), Thing::Json(retention));
            }
        }
    }
    seen
}

fn pairs(of: &str, part: &impl Part) -> Seen {
    let pairs = part.pairs().into_iter();
    pairs
        .map(|(key, value)| (format!("{of}/{}", String::from_utf8_lossy(&key)), Thing::Bytes(value)))
        .collect()
}

/// What differs, by name.
pub(super) fn changed(before: Seen, mut after: Seen) -> Vec<AuditObject> {
    let mut objects = BTreeMap::new();
    for (what, old) in before {
        let new = after.remove(&what);
        if new.as_ref().is_some_and(|new| old.is(new)) {
            continue;
        }
        let before = Some(old.digest());
        let after = new.map(|new| new.digest());
        if before != after {
            objects.insert(what, (before, after));
        }
    }
    for (what, new) in after {
        let after = Some(new.digest());
        objects.insert(what, (None, after));
    }
    objects.into_iter().map(|(what, (before, after))| AuditObject { what, before, after }).collect()
}
