//! What the mesh writes into a Consul catalog, so that Consul's clients find its services. A machine without IO.
//!
//! All of it is on one node of its own, which no agent has, and says who owns it and since which epoch. What says
//! otherwise is somebody else's and is told, never removed. Only differences are written, in transactions of at most
//! [`OPERATIONS`]; nothing is removed before all sources of the mesh have been read, and then not much at once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::answer::Registered;
use super::convert::OWNER;
use crate::model::service::{Health, Location, SourceId};
use crate::snapshot::Snapshot;

/// Metadata: the epoch of the owner that wrote an entry.
pub const EPOCH: &str = "mesh-epoch";
/// Metadata: until when the entry holds, in seconds since 1970.
pub const LEASE: &str = "mesh-lease-expires";
/// Operations of one transaction; Consul takes no more.
pub const OPERATIONS: usize = 64;
/// Entries that are removed in a minute, at most,
const LEAST_REMOVALS: usize = 50;
/// or this part of them, if that is more.
const SHARE_REMOVED: usize = 10;
const MINUTE: Duration = Duration::from_secs(60);

/// Where and how the mesh writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Id of the mesh; the owner of its entries.
    pub owner: String,
    /// Before the name of a service.
    pub prefix: String,
    /// Entries written in a second.
    pub rate: u32,
    /// How long an entry holds if nobody renews it.
    pub lease: Duration,
    /// Clusters whose endpoints Consul has already.
    pub foreign_clusters: BTreeSet<String>,
}

impl Settings {
    /// The usual settings of a mesh.
    #[must_use]
    pub fn new(owner: &str) -> Self {
        Self {
            owner: owner.to_owned(),
            prefix: String::new(),
            rate: 50,
            lease: Duration::from_secs(300),
            foreign_clusters: BTreeSet::new(),
        }
    }

    /// The node that holds the mesh's entries.
    #[must_use]
    pub fn node(&self) -> String {
        format!("mesh-{}", self.owner)
    }
}

/// An entry as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name of the service in Consul.
    pub service: String,
    /// Where it is reached.
    pub address: String,
    /// Its port.
    pub port: u16,
    /// Its tags.
    pub tags: BTreeSet<String>,
    /// Its own metadata, without the owner's.
    pub meta: BTreeMap<String, String>,
    /// Its weight.
    pub weight: u32,
    /// May it be sent traffic.
    pub healthy: bool,
}

/// What should be in the catalog, by id.
pub type Desired = BTreeMap<String, Entry>;

/// What the mesh has to offer: the healthy and unhealthy endpoints of its own services, but not what came from Consul.
/// The second value are services that cannot be written, with the reason.
#[must_use]
pub fn desired(snapshot: &Snapshot, settings: &Settings) -> (Desired, Vec<String>) {
    let (mut all, mut problems) = (Desired::new(), Vec::new());
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    for declared in snapshot.services() {
        let foreign = matches!(declared.source, SourceId::Consul(_));
        if foreign || declared.location != Location::Internal {
            continue;
        }
        let name = format!("{}{}", settings.prefix, declared.name.replace('.', "-")).to_ascii_lowercase();
        let host = format!("{}/{}", declared.namespace, declared.hostname);
        if !crate::config::validate::grammar::is_label(&name) {
            problems.push(format!("{host}: {name} is no DNS label"));
            continue;
        }
        // Both are kept when two have one name; the later one is told apart by its namespace.
        let name = match names.get(&name) {
            Some(other) if *other != host => {
                problems.push(format!("{host}: {name} is also {other}"));
                format!("{name}-{}", declared.namespace)
            }
            _ => name,
        };
        names.insert(name.clone(), host);
        let Some(port) = declared.ports.first() else { continue };
        for endpoint in snapshot.endpoints_of(declared).iter() {
            let echo = settings.foreign_clusters.contains(&endpoint.cluster);
            if echo || endpoint.address.parse::<std::net::IpAddr>().is_err() {
                continue;
            }
            let number = endpoint.ports.get(&port.name).copied().or(port.target_port).unwrap_or(port.number);
            let meta = [
                ("mesh-namespace", &declared.namespace),
                ("mesh-service-account", &endpoint.service_account),
            ];
            let meta = meta.into_iter().filter(|(_, value)| !value.is_empty());
            let entry = Entry {
                service: name.clone(),
                address: endpoint.address.clone(),
                port: number,
                tags: BTreeSet::new(),
                meta: meta.map(|(key, value)| (key.to_owned(), value.clone())).collect(),
                weight: endpoint.weight.max(1),
                healthy: endpoint.health == Health::Healthy,
            };
            all.insert(format!("{name}-{}-{number}", endpoint.address.replace(':', "-")), entry);
        }
    }
    (all, problems)
}

/// What is to be done about the catalog.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// Bodies for `PUT /v1/txn`, in this order. Each is whole in itself.
    pub transactions: Vec<Value>,
    /// Entries of our node that are not ours, and why.
    pub conflicts: Vec<String>,
    /// Entries that should go, but not yet.
    pub deferred: usize,
    /// Entries that should be written, but not yet.
    pub waiting: usize,
}

/// The writer of one catalog.
#[derive(Debug, Clone)]
pub struct Export {
    settings: Settings,
    tokens: f64,
    removals: Vec<Instant>,
    last: Option<Instant>,
}

impl Export {
    /// A writer that has written nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { tokens: f64::from(settings.rate), settings, removals: Vec::new(), last: None }
    }

    /// What leads from what is `seen` on our node to what is desired, as the owner of `epoch`.
    ///
    /// `synced`: all sources of the mesh have been read, so that what is not desired really is not. `unix` is the time
    /// in seconds since 1970, for leases.
    pub fn plan(
        &mut self,
        desired: &Desired,
        seen: &[Registered],
        (epoch, synced): (u64, bool),
        unix: u64,
        now: Instant,
    ) -> Plan {
        let mut plan = Plan::default();
        self.refill(now);
        let mut ours: BTreeMap<&str, &Registered> = BTreeMap::new();
        let mut foreign: BTreeSet<&str> = BTreeSet::new();
        for entry in seen {
            match self.standing(entry, epoch) {
                Ok(()) => drop(ours.insert(&entry.id, entry)),
                Err(reason) => {
                    foreign.insert(&entry.id);
                    plan.conflicts.push(format!("{} of {}: {reason}", entry.id, self.settings.node()));
                }
            }
        }
        let mut operations = Vec::new();
        for (id, entry) in desired.iter().filter(|(id, _)| !foreign.contains(id.as_str())) {
            if ours.get(id.as_str()).is_some_and(|known| self.same(entry, known, epoch, unix)) {
                continue;
            }
            if self.tokens < 1.0 {
                plan.waiting += 1;
                continue;
            }
            self.tokens -= 1.0;
            operations.push(self.put(id, entry, epoch, unix));
        }
        let gone: Vec<&Registered> =
            ours.values().copied().filter(|entry| !desired.contains_key(&entry.id)).collect();
        let room = self.room_to_remove(ours.len(), synced, now);
        plan.deferred = gone.len().saturating_sub(room);
        for entry in gone.into_iter().take(room) {
            self.removals.push(now);
            operations.push(self.delete(entry));
        }
        plan.transactions = self.transactions(operations);
        plan
    }

    /// Only what we wrote is ours, and what a later owner wrote is not ours any more.
    fn standing(&self, entry: &Registered, epoch: u64) -> Result<(), String> {
        match entry.meta.get(OWNER) {
            None => return Err("was written by somebody else".to_owned()),
            Some(owner) if *owner != self.settings.owner => return Err(format!("is owned by {owner}")),
            Some(_) => {}
        }
        match entry.meta.get(EPOCH).and_then(|text| text.parse::<u64>().ok()) {
            Some(theirs) if theirs > epoch => Err(format!("is of the later epoch {theirs}, ours is {epoch}")),
            Some(_) | None => Ok(()),
        }
    }

    /// The catalog has it already. A lease is renewed in its last half, an older epoch at once.
    fn same(&self, entry: &Entry, known: &Registered, epoch: u64, unix: u64) -> bool {
        let mut meta = known.meta.clone();
        let lease = meta.remove(LEASE).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
        let owned = meta.remove(OWNER).is_some_and(|owner| owner == self.settings.owner)
            && meta.remove(EPOCH).is_some_and(|theirs| theirs == epoch.to_string());
        owned
            && lease >= unix + self.settings.lease.as_secs() / 2
            && meta.remove(HEALTH).is_some_and(|health| health == entry.healthy.to_string())
            && meta == entry.meta
            && known.service == entry.service
            && known.address == entry.address
            && known.port == entry.port
            && known.tags == entry.tags
            && known.weight == entry.weight
    }

    fn put(&self, id: &str, entry: &Entry, epoch: u64, unix: u64) -> Operation {
        let node = self.settings.node();
        let mut meta = entry.meta.clone();
        let lease = unix + self.settings.lease.as_secs();
        for (key, value) in [
            (OWNER, self.settings.owner.clone()),
            (EPOCH, epoch.to_string()),
            (LEASE, lease.to_string()),
            (HEALTH, entry.healthy.to_string()),
        ] {
            meta.insert(key.to_owned(), value);
        }
        let service = json!({
            "ID": id, "Service": entry.service, "Address": entry.address, "Port": entry.port, "Tags": entry.tags,
            "Meta": meta, "Weights": {"Passing": entry.weight, "Warning": 1},
        });
        let status = if entry.healthy { "passing" } else { "critical" };
        let check = json!({
            "Node": node, "CheckID": format!("mesh:{id}"), "Name": "in the mesh", "Status": status, "ServiceID": id,
        });
        vec![
            json!({"Service": {"Verb": "set", "Node": node, "Service": service}}),
            json!({"Check": {"Verb": "set", "Check": check}}),
        ]
    }

    /// A service goes with its checks. Consul wants its name too.
    fn delete(&self, entry: &Registered) -> Operation {
        let service = json!({"ID": entry.id, "Service": entry.service});
        vec![json!({"Service": {"Verb": "delete", "Node": self.settings.node(), "Service": service}})]
    }

    /// An entry is never divided between two transactions; each makes sure that the node is there.
    fn transactions(&self, operations: Vec<Operation>) -> Vec<Value> {
        let meta = json!({"external-node": "true", "external-probe": "false", OWNER: self.settings.owner});
        let node = json!({"Node": {"Verb": "set", "Node": {
            "Node": self.settings.node(), "Address": "127.0.0.1", "Meta": meta,
        }}});
        let mut transactions: Vec<Vec<Value>> = Vec::new();
        for operation in operations {
            match transactions.last_mut().filter(|last| last.len() + operation.len() <= OPERATIONS) {
                Some(last) => last.extend(operation),
                None => transactions.push(std::iter::once(node.clone()).chain(operation).collect()),
            }
        }
        transactions.into_iter().map(Value::from).collect()
    }

    fn refill(&mut self, now: Instant) {
        let rate = f64::from(self.settings.rate);
        let since = self.last.map_or(0.0, |last| now.saturating_duration_since(last).as_secs_f64());
        self.tokens = (self.tokens + since * rate).min(rate);
        self.last = Some(now);
    }

    fn room_to_remove(&mut self, known: usize, synced: bool, now: Instant) -> usize {
        self.removals.retain(|at| now.saturating_duration_since(*at) < MINUTE);
        let most = LEAST_REMOVALS.max(known / SHARE_REMOVED);
        if synced { most.saturating_sub(self.removals.len()) } else { 0 }
    }
}

/// Operations that belong together.
type Operation = Vec<Value>;

/// Metadata: whether the entry's check passes, so that reading services alone shows all differences.
const HEALTH: &str = "mesh-healthy";

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn entry(n: usize) -> (String, Entry) {
        let entry = Entry {
            service: format!("s{n}"),
            address: format!("10.0.{}.{}", n / 256, n % 256),
            port: 80,
            tags: BTreeSet::new(),
            meta: BTreeMap::new(),
            weight: 1,
            healthy: true,
        };
        (format!("s{n}-1"), entry)
    }

    fn entries(count: usize) -> Desired {
        (0..count).map(entry).collect()
    }

    /// A catalog's node.
    #[derive(Default, Clone)]
    struct Node(BTreeMap<String, Registered>);

    impl Node {
        fn seen(&self) -> Vec<Registered> {
            self.0.values().cloned().collect()
        }

        /// Applies a transaction; all of its services carry `node`.
        fn transact(&mut self, transaction: &Value) {
            assert!(transaction.as_array().unwrap().len() <= OPERATIONS);
            for operation in transaction.as_array().unwrap() {
                let Some(service) = operation.get("Service") else { continue };
                let id = service["Service"]["ID"].as_str().unwrap();
                if service["Verb"] == "delete" {
                    self.0.remove(id);
                    continue;
                }
                let node = json!({"Node": {}, "Services": {id: service["Service"]}}).to_string();
                let registered = super::super::answer::node_services(node.as_bytes()).unwrap().remove(0);
                self.0.insert(id.to_owned(), registered);
            }
        }
    }

    fn export(rate: u32) -> Export {
        Export::new(Settings { rate, ..Settings::new("m1") })
    }

    fn settle(export: &mut Export, desired: &Desired, node: &mut Node, epoch: u64, now: Instant) -> Plan {
        let plan = export.plan(desired, &node.seen(), (epoch, true), 1_000, now);
        plan.transactions.iter().for_each(|transaction| node.transact(transaction));
        plan
    }

    #[test]
    fn only_differences_are_written_and_leases_are_renewed_in_their_last_half() {
        let t0 = origin();
        let (mut export, mut node) = (export(1_000), Node::default());
        let mut desired = entries(100);
        assert_eq!(settle(&mut export, &desired, &mut node, 1, t0).transactions.len(), 4);
        assert_eq!(node.0.len(), 100);
        assert_eq!(settle(&mut export, &desired, &mut node, 1, t0), Plan::default());
        desired.get_mut("s7-1").unwrap().healthy = false;
        let plan = settle(&mut export, &desired, &mut node, 1, t0);
        assert_eq!(plan.transactions[0].as_array().unwrap().len(), 3, "the node, the service and its check");
        assert_eq!(plan.transactions[0][2]["Check"]["Check"]["Status"], "critical");
        let later = export.plan(&desired, &node.seen(), (1, true), 1_000 + 200, t0 + MINUTE);
        assert!(!later.transactions.is_empty(), "the lease ends at 1300");
    }

    #[test]
    fn what_is_not_ours_is_told_and_never_touched() {
        let t0 = origin();
        let (mut export, mut node) = (export(1_000), Node::default());
        settle(&mut export, &entries(3), &mut node, 5, t0);
        let owner = |node: &mut Node, id: &str, key: &str, value: &str| {
            node.0.get_mut(id).unwrap().meta.insert(key.to_owned(), value.to_owned());
        };
        owner(&mut node, "s0-1", OWNER, "m2");
        owner(&mut node, "s1-1", EPOCH, "6");
        node.0.get_mut("s2-1").unwrap().meta.remove(OWNER);
        let before = node.clone().seen();
        for desired in [entries(3), Desired::new()] {
            let plan = settle(&mut export, &desired, &mut node, 5, t0);
            assert_eq!((plan.conflicts.len(), plan.transactions.len()), (3, 0), "{plan:?}");
        }
        assert_eq!(node.seen(), before);
    }

    #[test]
    fn nothing_is_removed_before_all_sources_are_read_and_then_not_much_at_once() {
        let t0 = origin();
        let (mut export, mut node) = (export(1_000), Node::default());
        settle(&mut export, &entries(300), &mut node, 1, t0);
        let unsynced = export.plan(&Desired::new(), &node.seen(), (1, false), 1_000, t0);
        assert_eq!((unsynced.deferred, unsynced.transactions.len()), (300, 0));
        let first = settle(&mut export, &Desired::new(), &mut node, 1, t0);
        assert_eq!((first.deferred, node.0.len()), (250, 250));
        settle(&mut export, &Desired::new(), &mut node, 1, t0 + MINUTE / 2);
        assert_eq!(node.0.len(), 250, "in the same minute");
        for minute in 1..6 {
            settle(&mut export, &Desired::new(), &mut node, 1, t0 + MINUTE * minute);
        }
        assert_eq!(node.0.len(), 0);
    }

    #[test]
    fn writes_are_limited_in_a_second() {
        let t0 = origin();
        let (mut export, mut node) = (export(50), Node::default());
        assert_eq!(settle(&mut export, &entries(120), &mut node, 1, t0).waiting, 70);
        assert_eq!(node.0.len(), 50);
        settle(&mut export, &entries(120), &mut node, 1, t0 + Duration::from_secs(1));
        settle(&mut export, &entries(120), &mut node, 1, t0 + Duration::from_secs(2));
        assert_eq!(node.0.len(), 120);
    }

    #[test]
    fn of_two_owners_the_later_one_wins_and_nothing_is_missing_after_its_cycle() {
        let t0 = origin();
        let (mut old, mut new, mut node) = (export(1_000), export(1_000), Node::default());
        let desired = entries(200);
        // The old owner is stopped between its transactions, and the new one begins.
        let plan = old.plan(&desired, &node.seen(), (1, true), 1_000, t0);
        let (first, late) = plan.transactions.split_at(3);
        first.iter().for_each(|transaction| node.transact(transaction));
        settle(&mut new, &desired, &mut node, 2, t0);
        assert_eq!(node.0.len(), 200);
        assert!(node.seen().iter().all(|entry| entry.meta[EPOCH] == "2"));
        // What it had under way arrives late: the next cycle of the new owner repairs it.
        late.iter().for_each(|transaction| node.transact(transaction));
        settle(&mut new, &desired, &mut node, 2, t0);
        assert!(node.seen().iter().all(|entry| entry.meta[EPOCH] == "2"));
        // The old one comes back and sees what the later epoch wrote: it changes nothing.
        let plan = old.plan(&Desired::new(), &node.seen(), (1, true), 1_000, t0 + MINUTE);
        assert_eq!((plan.transactions.len(), plan.conflicts.len()), (0, 200));
    }

    #[test]
    fn a_catalog_restored_to_before_is_whole_after_one_cycle() {
        let t0 = origin();
        let (mut export, mut node) = (export(1_000), Node::default());
        let foreign =
            json!([{"Service": {"Verb": "set", "Service": {"ID": "theirs", "Service": "x", "Meta": {}}}}]);
        node.transact(&foreign);
        let before = node.clone();
        settle(&mut export, &entries(100), &mut node, 1, t0);
        let mut restored = before;
        settle(&mut export, &entries(100), &mut restored, 1, t0 + MINUTE);
        assert_eq!(restored.seen(), node.seen());
        assert!(restored.0.contains_key("theirs"));
    }
}
