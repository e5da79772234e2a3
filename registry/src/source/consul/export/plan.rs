//! What leads from what is in a catalog to what should be. A machine without IO.
//!
//! Only differences are written, in transactions of at most [`OPERATIONS`], not too many in a second; and not much is
//! removed at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::desired::Desired;
use super::{EPOCH, HEALTHY, LEASE, Settings};
use crate::source::consul::answer::{Node, Registered};
use crate::source::consul::convert::OWNER;

/// Operations of one transaction; Consul takes no more.
pub const OPERATIONS: usize = 64;
/// Entries that are removed in a minute, at most,
const LEAST_REMOVALS: usize = 50;
/// or this part of them, if that is more.
const SHARE_REMOVED: usize = 10;
const MINUTE: Duration = Duration::from_secs(60);
/// The node stands for no machine; entries have addresses of their own.
const ADDRESS: &str = "127.0.0.1";
/// Metadata by which Consul's own tools leave the node alone.
const EXTERNAL: [(&str, &str); 2] = [("external-node", "true"), ("external-probe", "false")];

/// What is to be done about the catalog.
#[derive(Debug, Clone, PartialEq)]
pub enum Plan {
    /// Nothing, for somebody else writes there: who, and why that is so.
    Leave(String),
    /// Our node is claimed by this body for `PUT /v1/txn`; only then anything else is known to hold.
    Claim(Value),
    /// What differs is written.
    Write(Work),
}

/// Differences, and what stands in their way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Work {
    /// In this order. Each is whole in itself.
    pub transactions: Vec<Transaction>,
    /// Entries of our node that are not ours, and why.
    pub conflicts: Vec<String>,
    /// Entries that should go, but not yet.
    pub deferred: usize,
    /// Entries that should be written, but not yet.
    pub waiting: usize,
}

/// Some differences that are written together, or not at all.
#[derive(Debug, Clone, PartialEq)]
pub struct Transaction {
    /// Body for `PUT /v1/txn`. Its first operation is refused when our claim does not hold any more.
    pub body: Value,
    /// What it changes, in the order of its operations.
    pub changes: Vec<Change>,
}

/// What becomes of an entry.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Its id.
    pub id: String,
    /// What it is then; `None` when it goes.
    pub becomes: Option<Registered>,
    operations: Vec<Value>,
}

impl Transaction {
    /// The entry that the operation at a position is about; none for the claim.
    #[must_use]
    pub fn entry_of(&self, position: usize) -> Option<&Change> {
        let mut from = 1;
        self.changes.iter().find(|change| {
            let own = from..from + change.operations.len();
            from = own.end;
            own.contains(&position)
        })
    }
}

/// The planner of one catalog.
#[derive(Debug, Clone)]
pub struct Export {
    settings: Settings,
    epoch: u64,
    tokens: f64,
    removals: Vec<Instant>,
    last: Option<Instant>,
}

impl Export {
    /// A planner that has written nothing yet, for the owner of `epoch`.
    #[must_use]
    pub fn new(settings: Settings, epoch: u64) -> Self {
        Self { tokens: f64::from(settings.rate), settings, epoch, removals: Vec::new(), last: None }
    }

    /// What leads from `node`, which is ours or is not there, to what is desired. `unix` is the time in seconds since
    /// 1970, for the lease.
    pub fn plan(&mut self, desired: &Desired, node: Option<&Node>, unix: u64, now: Instant) -> Plan {
        match node {
            None if desired.is_empty() => Plan::Write(Work::default()),
            None => Plan::Claim(Value::Array(vec![self.claim(0, unix)])),
            Some(node) => match self.standing(node, unix) {
                Err(reason) => Plan::Leave(format!("{}: {reason}", self.settings.node())),
                Ok(false) => Plan::Claim(Value::Array(vec![self.claim(node.index, unix)])),
                Ok(true) => Plan::Write(self.work(desired, node, now)),
            },
        }
    }

    /// An entry was removed.
    pub fn on_removed(&mut self, now: Instant) {
        self.removals.push(now);
    }

    /// From when on the claim of `node` is to be renewed, in seconds since 1970.
    #[must_use]
    pub fn renewal(&self, node: &Node) -> u64 {
        lease(node).saturating_sub(self.settings.lease.as_secs() / 2)
    }

    /// Whether the node is claimed by us, and for long enough; why it must be left alone when it is not ours to claim.
    fn standing(&mut self, node: &Node, unix: u64) -> Result<bool, String> {
        match node.meta.get(OWNER) {
            None => return Err("was written by somebody else".to_owned()),
            Some(owner) if *owner != self.settings.owner => return Err(format!("is owned by {owner}")),
            Some(_) => {}
        }
        let theirs = epoch(&node.meta);
        if theirs > self.epoch {
            if lease(node) >= unix {
                let ours = self.epoch;
                return Err(format!("is of the later epoch {theirs}, ours is {ours}, and its lease holds"));
            }
            // Nobody renews it: that owner was of a control plane that is gone, such as one before a restore.
            self.epoch = theirs + 1;
        }
        let external = EXTERNAL.iter().all(|(key, value)| node.meta.get(*key).is_some_and(|is| is == value));
        Ok(theirs == self.epoch && external && node.address == ADDRESS && unix < self.renewal(node))
    }

    /// The differences, as the owner of `node`.
    fn work(&mut self, desired: &Desired, node: &Node, now: Instant) -> Work {
        let mut work = Work::default();
        self.refill(now);
        let mut ours: BTreeMap<&str, &Registered> = BTreeMap::new();
        let mut foreign: BTreeMap<&str, String> = BTreeMap::new();
        for entry in node.services.values() {
            match self.ours(entry) {
                Ok(()) => drop(ours.insert(&entry.id, entry)),
                Err(reason) => drop(foreign.insert(&entry.id, reason)),
            }
        }
        let mut changes = Vec::new();
        for (id, entry) in desired.iter().filter(|(id, _)| !foreign.contains_key(id.as_str())) {
            if ours.get(id.as_str()).is_some_and(|known| same(entry, known)) {
                continue;
            }
            if self.tokens < 1.0 {
                work.waiting += 1;
                continue;
            }
            self.tokens -= 1.0;
            changes.push(self.put(entry));
        }
        let gone: Vec<&Registered> =
            ours.values().copied().filter(|entry| !desired.contains_key(&entry.id)).collect();
        let room = self.room_to_remove(ours.len(), now);
        work.deferred = gone.len().saturating_sub(room);
        changes.extend(gone.into_iter().take(room).map(|entry| self.delete(entry)));
        let told = |(id, reason): (&str, String)| format!("{id} of {}: {reason}", self.settings.node());
        work.conflicts = foreign.into_iter().map(told).collect();
        work.transactions = self.transactions(changes, node);
        work
    }

    /// Only what we wrote is ours, and what a later owner wrote is not ours any more.
    fn ours(&self, entry: &Registered) -> Result<(), String> {
        match entry.meta.get(OWNER) {
            None => return Err("was written by somebody else".to_owned()),
            Some(owner) if *owner != self.settings.owner => return Err(format!("is owned by {owner}")),
            Some(_) => {}
        }
        match epoch(&entry.meta) {
            theirs if theirs > self.epoch => {
                Err(format!("is of the later epoch {theirs}, ours is {}", self.epoch))
            }
            _ => Ok(()),
        }
    }

    /// The operation that makes the node ours, if it is still what it was at `index`; 0 when it was not there.
    fn claim(&self, index: u64, unix: u64) -> Value {
        let until = unix + self.settings.lease.as_secs();
        let mut meta: BTreeMap<&str, String> =
            EXTERNAL.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        meta.insert(OWNER, self.settings.owner.clone());
        meta.insert(EPOCH, self.epoch.to_string());
        meta.insert(LEASE, until.to_string());
        self.check_and_set(index, ADDRESS, &json!(meta))
    }

    fn check_and_set(&self, index: u64, address: &str, meta: &Value) -> Value {
        json!({"Node": {"Verb": "cas", "Node": {
            "Node": self.settings.node(), "Address": address, "Meta": meta, "ModifyIndex": index,
        }}})
    }

    fn put(&self, entry: &Registered) -> Change {
        let node = self.settings.node();
        let Registered { id, service, address, port, tags, meta, weight } = entry;
        let mut meta = meta.clone();
        meta.insert(OWNER.to_owned(), self.settings.owner.clone());
        meta.insert(EPOCH.to_owned(), self.epoch.to_string());
        let healthy = meta.get(HEALTHY).is_some_and(|healthy| healthy == "true");
        let body = json!({
            "ID": id, "Service": service, "Address": address, "Port": port, "Tags": tags, "Meta": meta,
            "Weights": {"Passing": weight, "Warning": 1},
        });
        let check = json!({
            "Node": node, "CheckID": format!("mesh:{id}"), "Name": "in the mesh", "ServiceID": id,
            "Status": if healthy { "passing" } else { "critical" },
        });
        Change {
            id: id.clone(),
            becomes: Some(Registered { meta, ..entry.clone() }),
            operations: vec![
                json!({"Service": {"Verb": "set", "Node": node, "Service": body}}),
                json!({"Check": {"Verb": "set", "Check": check}}),
            ],
        }
    }

    /// A service goes with its checks. Consul wants its name too.
    fn delete(&self, entry: &Registered) -> Change {
        let service = json!({"ID": entry.id, "Service": entry.service});
        let operation =
            json!({"Service": {"Verb": "delete", "Node": self.settings.node(), "Service": service}});
        Change { id: entry.id.clone(), becomes: None, operations: vec![operation] }
    }

    /// An entry is never divided between two transactions, and each begins with our claim.
    fn transactions(&self, changes: Vec<Change>, node: &Node) -> Vec<Transaction> {
        let claim = self.check_and_set(node.index, &node.address, &json!(node.meta));
        let mut groups: Vec<(usize, Vec<Change>)> = Vec::new();
        for change in changes {
            let own = change.operations.len();
            match groups.last_mut().filter(|(count, _)| count + own <= OPERATIONS) {
                Some((count, group)) => {
                    *count += own;
                    group.push(change);
                }
                None => groups.push((1 + own, vec![change])),
            }
        }
        let whole = |(_, changes): (usize, Vec<Change>)| {
            let operations = changes.iter().flat_map(|change| change.operations.iter().cloned());
            Transaction { body: std::iter::once(claim.clone()).chain(operations).collect(), changes }
        };
        groups.into_iter().map(whole).collect()
    }

    fn refill(&mut self, now: Instant) {
        let rate = f64::from(self.settings.rate);
        let since = self.last.map_or(0.0, |last| now.saturating_duration_since(last).as_secs_f64());
        self.tokens = (self.tokens + since * rate).min(rate);
        self.last = Some(now);
    }

    fn room_to_remove(&mut self, known: usize, now: Instant) -> usize {
        self.removals.retain(|at| now.saturating_duration_since(*at) < MINUTE);
        LEAST_REMOVALS.max(known / SHARE_REMOVED).saturating_sub(self.removals.len())
    }
}

fn epoch(meta: &BTreeMap<String, String>) -> u64 {
    meta.get(EPOCH).and_then(|text| text.parse().ok()).unwrap_or_default()
}

fn lease(node: &Node) -> u64 {
    node.meta.get(LEASE).and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// The catalog has it already, whoever of us wrote it.
fn same(entry: &Registered, known: &Registered) -> bool {
    let Registered { id, service, address, port, tags, meta, weight } = known;
    let told = meta.iter().filter(|(key, _)| ![OWNER, EPOCH].contains(&key.as_str()));
    told.eq(entry.meta.iter())
        && (id, service, address) == (&entry.id, &entry.service, &entry.address)
        && (port, tags, weight) == (&entry.port, &entry.tags, &entry.weight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn entry(n: usize) -> Registered {
        Registered {
            id: format!("s{n}-1"),
            service: format!("s{n}"),
            address: format!("10.0.{}.{}", n / 256, n % 256),
            port: 80,
            tags: ["a".to_owned()].into(),
            meta: [(HEALTHY.to_owned(), "true".to_owned())].into(),
            weight: 1,
        }
    }

    fn entries(count: usize) -> Desired {
        (0..count).map(entry).map(|entry| (entry.id.clone(), entry)).collect()
    }

    /// The node in a catalog, and how often it has changed.
    #[derive(Default, Clone, Debug, PartialEq)]
    struct Catalog {
        node: Option<Node>,
        index: u64,
    }

    impl Catalog {
        /// Whether it took all operations of a body.
        fn transact(&mut self, body: &Value) -> bool {
            let operations = body.as_array().unwrap();
            assert!(operations.len() <= OPERATIONS);
            let set = &operations[0]["Node"]["Node"];
            if set["ModifyIndex"] != self.node.as_ref().map_or(0, |node| node.index) {
                return false;
            }
            let told = json!({"Node": set, "Services": {}}).to_string();
            let told = crate::source::consul::answer::node(told.as_bytes()).unwrap().unwrap();
            self.index += 1;
            let node = self.node.get_or_insert_default();
            if (&node.meta, &node.address) != (&told.meta, &told.address) {
                *node = Node { index: self.index, services: std::mem::take(&mut node.services), ..told };
            }
            for service in operations.iter().filter_map(|operation| operation.get("Service")) {
                let id = service["Service"]["ID"].as_str().unwrap().to_owned();
                if service["Verb"] == "delete" {
                    node.services.remove(&id);
                } else {
                    let told = json!({"Node": set, "Services": {&id: service["Service"]}}).to_string();
                    let told = crate::source::consul::answer::node(told.as_bytes()).unwrap().unwrap();
                    node.services.extend(told.services);
                }
            }
            true
        }

        fn meta(&mut self, id: &str) -> &mut BTreeMap<String, String> {
            &mut self.node.as_mut().unwrap().services.get_mut(id).unwrap().meta
        }

        fn count(&self) -> usize {
            self.node.as_ref().map_or(0, |node| node.services.len())
        }
    }

    fn export(rate: u32, epoch: u64) -> Export {
        Export::new(Settings { rate, ..Settings::new("m1", "dc1", 1) }, epoch)
    }

    /// Claims the node if that is to be done, and plans; the time is `seconds` after 1000.
    fn planned(
        export: &mut Export,
        desired: &Desired,
        catalog: &mut Catalog,
        t0: Instant,
        seconds: u64,
    ) -> Work {
        let now = t0 + Duration::from_secs(seconds);
        for _ in 0..2 {
            match export.plan(desired, catalog.node.as_ref(), 1_000 + seconds, now) {
                Plan::Claim(claim) => assert!(catalog.transact(&claim)),
                Plan::Write(work) => return work,
                Plan::Leave(reason) => panic!("{reason}"),
            }
        }
        panic!("a claim that is made is not seen");
    }

    fn done(export: &mut Export, catalog: &mut Catalog, transaction: &Transaction, now: Instant) -> bool {
        let taken = catalog.transact(&transaction.body);
        transaction
            .changes
            .iter()
            .filter(|c| taken && c.becomes.is_none())
            .for_each(|_| export.on_removed(now));
        taken
    }

    fn settle(
        export: &mut Export,
        desired: &Desired,
        catalog: &mut Catalog,
        t0: Instant,
        seconds: u64,
    ) -> Work {
        let work = planned(export, desired, catalog, t0, seconds);
        for transaction in &work.transactions {
            assert!(done(export, catalog, transaction, t0 + Duration::from_secs(seconds)));
        }
        work
    }

    #[test]
    fn only_differences_are_written_and_the_lease_is_renewed_in_its_last_half() {
        let t0 = origin();
        let (mut export, mut catalog) = (export(1_000, 1), Catalog::default());
        let mut desired = entries(100);
        assert_eq!(settle(&mut export, &desired, &mut catalog, t0, 0).transactions.len(), 4);
        assert_eq!(catalog.count(), 100);
        assert_eq!(settle(&mut export, &desired, &mut catalog, t0, 299), Work::default());
        desired.get_mut("s7-1").unwrap().meta.insert(HEALTHY.to_owned(), "false".to_owned());
        let work = settle(&mut export, &desired, &mut catalog, t0, 299);
        let body = work.transactions[0].body.as_array().unwrap();
        assert_eq!(body.len(), 3, "the claim, the service and its check");
        assert_eq!(body[2]["Check"]["Check"]["Status"], "critical");
        assert_eq!(work.transactions[0].entry_of(0), None);
        assert_eq!(work.transactions[0].entry_of(2).unwrap().id, "s7-1");
        let index = catalog.node.as_ref().unwrap().index;
        let renewed = planned(&mut export, &desired, &mut catalog, t0, 300);
        assert_eq!((renewed, catalog.node.as_ref().unwrap().index > index), (Work::default(), true));
    }

    #[test]
    fn nothing_is_written_into_an_empty_catalog_by_an_empty_mesh() {
        let (mut export, mut catalog) = (export(1_000, 1), Catalog::default());
        assert_eq!(planned(&mut export, &Desired::new(), &mut catalog, origin(), 0), Work::default());
        assert_eq!(catalog, Catalog::default());
    }

    #[test]
    fn what_is_not_ours_is_told_and_never_touched() {
        let t0 = origin();
        let (mut export, mut catalog) = (export(1_000, 5), Catalog::default());
        settle(&mut export, &entries(3), &mut catalog, t0, 0);
        catalog.meta("s0-1").insert(OWNER.to_owned(), "m2".to_owned());
        catalog.meta("s1-1").insert(EPOCH.to_owned(), "6".to_owned());
        catalog.meta("s2-1").remove(OWNER);
        let before = catalog.clone();
        for desired in [entries(3), Desired::new()] {
            let work = settle(&mut export, &desired, &mut catalog, t0, 1);
            assert_eq!((work.conflicts.len(), work.transactions.len()), (3, 0), "{work:?}");
        }
        assert_eq!(catalog, before);
        for (key, value) in [(OWNER, Some("m2")), (OWNER, None), (EPOCH, Some("6"))] {
            let mut node = before.node.clone().unwrap();
            match value {
                Some(value) => drop(node.meta.insert(key.to_owned(), value.to_owned())),
                None => drop(node.meta.remove(key)),
            }
            let plan = export.plan(&entries(9), Some(&node), 1_000, t0);
            assert!(matches!(plan, Plan::Leave(_)), "{key} {value:?}: {plan:?}");
        }
    }

    #[test]
    fn not_much_is_removed_at_once() {
        let t0 = origin();
        let (mut export, mut catalog) = (export(1_000, 1), Catalog::default());
        settle(&mut export, &entries(300), &mut catalog, t0, 0);
        let first = settle(&mut export, &Desired::new(), &mut catalog, t0, 0);
        assert_eq!((first.deferred, catalog.count()), (250, 250));
        settle(&mut export, &Desired::new(), &mut catalog, t0, 30);
        assert_eq!(catalog.count(), 250, "in the same minute");
        for minute in 1..6 {
            settle(&mut export, &Desired::new(), &mut catalog, t0, 60 * minute);
        }
        assert_eq!(catalog.count(), 0);
    }

    #[test]
    fn writes_are_limited_in_a_second() {
        let t0 = origin();
        let (mut export, mut catalog) = (export(50, 1), Catalog::default());
        assert_eq!(settle(&mut export, &entries(120), &mut catalog, t0, 0).waiting, 70);
        assert_eq!(catalog.count(), 50);
        settle(&mut export, &entries(120), &mut catalog, t0, 1);
        settle(&mut export, &entries(120), &mut catalog, t0, 2);
        assert_eq!(catalog.count(), 120);
    }

    #[test]
    fn of_two_owners_the_later_one_wins_and_nothing_is_missing_after_its_cycle() {
        let t0 = origin();
        let (mut old, mut new, mut catalog) = (export(1_000, 1), export(1_000, 2), Catalog::default());
        let desired = entries(200);
        // The old owner is stopped between its transactions, and the new one begins.
        let work = planned(&mut old, &desired, &mut catalog, t0, 0);
        let (first, late) = work.transactions.split_at(3);
        assert!(first.iter().all(|transaction| catalog.transact(&transaction.body)));
        assert_eq!(catalog.count(), 93);
        settle(&mut new, &desired, &mut catalog, t0, 0);
        assert_eq!(catalog.count(), 200);
        // What it had under way arrives late, and comes to nothing.
        let before = catalog.clone();
        assert!(late.iter().all(|transaction| !catalog.transact(&transaction.body)));
        // The old one comes back and sees the later owner: it changes nothing.
        let plan = old.plan(&Desired::new(), catalog.node.as_ref(), 1_060, t0 + MINUTE);
        assert!(matches!(plan, Plan::Leave(_)), "{plan:?}");
        assert_eq!(catalog, before);
    }

    #[test]
    fn an_owner_of_a_later_epoch_that_is_gone_is_succeeded_when_its_lease_has_ended() {
        let t0 = origin();
        let mut catalog = Catalog::default();
        settle(&mut export(1_000, 70), &entries(3), &mut catalog, t0, 0);
        // A control plane that was restored begins with lower terms.
        let mut restored = export(1_000, 2);
        let early = restored.plan(&entries(2), catalog.node.as_ref(), 1_600, t0);
        assert!(matches!(early, Plan::Leave(_)), "{early:?}");
        settle(&mut restored, &entries(2), &mut catalog, t0, 601);
        assert_eq!((catalog.count(), catalog.node.unwrap().meta[EPOCH].as_str()), (2, "71"));
    }

    #[test]
    fn a_catalog_restored_to_before_is_whole_after_one_cycle() {
        let t0 = origin();
        let (mut export, mut catalog) = (export(1_000, 1), Catalog::default());
        settle(&mut export, &entries(3), &mut catalog, t0, 0);
        catalog.meta("s0-1").remove(OWNER);
        let mut restored = catalog.clone();
        settle(&mut export, &entries(100), &mut catalog, t0, 0);
        settle(&mut export, &entries(100), &mut restored, t0, 60);
        assert_eq!(restored.count(), 100);
        assert!(!restored.meta("s0-1").contains_key(OWNER), "somebody else's is what it was");
    }
}
