//! What a change would do to proxies, before it is committed.
//!
//! Nothing is guessed: the entry is applied to a copy of the state, the snapshot that would follow is built as the
//! publisher builds it, and it is translated for each proxy as the push side does. What differs between the two
//! translations is what the proxy would be sent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use registry::snapshot::Snapshot;
use registry::state::{Batch, Outcome, Revision, State};
use xds::affected::{Affected, Impact};
use xds::proxy::Proxy;
use xds::resources::{Resource, Resources, Type};
use xds::server::resource_len;
use xds::stream::Variant;
use xds::translate::translate;

/// A change that was applied to a copy.
#[derive(Debug)]
pub struct Foreseen {
    /// What would become of the commands.
    pub outcome: Outcome,
    /// Whether anything at all would be different.
    pub changes: bool,
    before: Arc<Snapshot>,
    after: Arc<Snapshot>,
    impact: Impact,
    hosts: BTreeSet<String>,
}

/// What one proxy would be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyChange {
    /// By type and name.
    pub resources: BTreeMap<(Type, String), ResourceChange>,
    /// Bytes of resources on the wire, without the envelopes of messages.
    pub bytes: u64,
}

/// How one resource of a proxy differs.
#[derive(Debug, Clone, PartialEq)]
pub enum ResourceChange {
    /// The proxy does not have it yet.
    Added(Arc<Resource>),
    /// It has another value.
    Changed {
        /// What it has.
        before: Arc<Resource>,
        /// What it would be sent.
        after: Arc<Resource>,
    },
    /// It would be told to drop it.
    Removed(Arc<Resource>),
    /// It has this value already and would be sent it again: a stock Envoy waits for the endpoints of a cluster that
    /// was updated.
    Resent(Arc<Resource>),
}

impl Foreseen {
    /// Applies `batch` to a copy of `state`, whose snapshot is `before`.
    #[must_use]
    pub fn of(state: &State, before: Arc<Snapshot>, batch: &Batch) -> Self {
        let mut copy = state.clone();
        let (changes, outcome) = copy.apply(Revision(state.revision().0.saturating_add(1)), batch);
        let after = Arc::new(Snapshot::next(&before, &copy, &changes));
        let impact = Impact::of(&changes, &before, &after);
        Self { outcome, changes: !changes.is_empty(), before, after, impact, hosts: changes.hosts }
    }

    /// What `proxy` would be sent on a stream of this form; nothing if the change does not concern it.
    #[must_use]
    pub fn on(&self, proxy: &Proxy, variant: Variant) -> Option<ProxyChange> {
        if self.impact.on(proxy, &self.hosts) == Affected::Nothing {
            return None;
        }
        let [before, after] = [&self.before, &self.after].map(|snapshot| translate(snapshot, proxy));
        let mut resources = differing(&before, &after);
        if !proxy.native {
            resent(&mut resources, &after);
        }
        (!resources.is_empty()).then(|| ProxyChange { bytes: bytes(&resources, &after, variant), resources })
    }
}

fn differing(before: &Resources, after: &Resources) -> BTreeMap<(Type, String), ResourceChange> {
    let none = BTreeMap::new();
    let mut changes = BTreeMap::new();
    for kind in Type::ALL {
        let [old, new] = [before, after].map(|resources| resources.by_type.get(&kind).unwrap_or(&none));
        for (name, resource) in new {
            let change = match old.get(name) {
                None => ResourceChange::Added(resource.clone()),
                Some(known) if known.version == resource.version => continue,
                Some(known) => ResourceChange::Changed { before: known.clone(), after: resource.clone() },
            };
            changes.insert((kind, name.clone()), change);
        }
        for (name, resource) in old.iter().filter(|(name, _)| !new.contains_key(*name)) {
            changes.insert((kind, name.clone()), ResourceChange::Removed(resource.clone()));
        }
    }
    changes
}

/// Adds the endpoints of changed clusters that are sent although they are the same.
fn resent(changes: &mut BTreeMap<(Type, String), ResourceChange>, after: &Resources) {
    let updated = changes.iter().filter_map(|((kind, name), change)| {
        let updated = *kind == Type::Cluster && matches!(change, ResourceChange::Changed { .. });
        updated.then(|| name.clone())
    });
    for name in updated.collect::<Vec<_>>() {
        let endpoints = after.by_type.get(&Type::Endpoint).and_then(|of_type| of_type.get(&name));
        if let Some(resource) = endpoints {
            let change = changes.entry((Type::Endpoint, name));
            change.or_insert_with(|| ResourceChange::Resent(resource.clone()));
        }
    }
}

/// A delta stream carries what differs; on the other form a type that differs is sent whole, and what is gone is
/// left out of clusters and listeners only.
fn bytes(changes: &BTreeMap<(Type, String), ResourceChange>, after: &Resources, variant: Variant) -> u64 {
    let total: usize = match variant {
        Variant::Delta => changes
            .values()
            .map(|change| match change {
                ResourceChange::Added(resource)
                | ResourceChange::Changed { after: resource, .. }
                | ResourceChange::Resent(resource) => resource_len(variant, resource),
                ResourceChange::Removed(_) => 0,
            })
            .sum(),
        Variant::StateOfTheWorld => {
            let sent = changes.iter().filter(|((kind, _), change)| {
                matches!(kind, Type::Cluster | Type::Listener)
                    || !matches!(change, ResourceChange::Removed(_))
            });
            let kinds: BTreeSet<Type> = sent.map(|((kind, _), _)| *kind).collect();
            let whole = kinds.iter().filter_map(|kind| after.by_type.get(kind)).flat_map(BTreeMap::values);
            whole.map(|resource| resource_len(variant, resource)).sum()
        }
    };
    total as u64
}
