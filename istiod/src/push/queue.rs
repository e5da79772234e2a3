//! Who waits for which translation: the decisions of the push side, without threads or clocks.
//!
//! Fair: whoever waits longest is next, and a proxy has one place in the queue, however much changes meanwhile.
//! A translation reads the newest snapshot there is when it starts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use registry::snapshot::Snapshot;
use registry::state::Changes;
use tokio::sync::watch;
use xds::affected::{Affected, Impact};
use xds::cache::{Interner, View};
use xds::proxy::Proxy;
use xds::resources::Type;
use xds::server::Joined;

use crate::publish::Update;

/// A connected proxy.
#[derive(Debug)]
struct Target {
    proxy: Arc<Proxy>,
    views: watch::Sender<Option<Arc<View>>>,
    view: Option<Arc<View>>,
    /// Hosts of which it has endpoints.
    hosts: Arc<BTreeSet<String>>,
    due: Affected,
    /// When the oldest change that is due was committed.
    committed: Option<Instant>,
    queued_at: Instant,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Idle,
    Queued,
    /// Being translated; if everything is, its hosts are not known before the end.
    Running {
        full: bool,
    },
}

/// The connected proxies and what each is due.
#[derive(Debug)]
pub struct Queue {
    /// The newest snapshot.
    latest: Arc<Snapshot>,
    /// The snapshot of the last flush, and what changed since.
    flushed: Arc<Snapshot>,
    changes: Changes,
    committed: Option<Instant>,
    targets: BTreeMap<u64, Target>,
    waiting: VecDeque<u64>,
}

/// Whom a revision concerns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// All changes up to this revision were looked at.
    pub revision: u64,
    /// Connections that it may concern.
    pub concerned: Vec<u64>,
}

impl Queue {
    /// Nobody connected, nothing changed.
    #[must_use]
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            latest: snapshot.clone(),
            flushed: snapshot,
            changes: Changes::default(),
            committed: None,
            targets: BTreeMap::new(),
            waiting: VecDeque::new(),
        }
    }

    /// The newest revision.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.latest.revision().0
    }

    /// A proxy connected: it is due everything.
    pub fn join(&mut self, joined: Joined, now: Instant) {
        let target = Target {
            proxy: joined.proxy,
            views: joined.views,
            view: None,
            hosts: Arc::default(),
            due: Affected::Full,
            committed: None,
            queued_at: now,
            place: Place::Queued,
        };
        self.targets.insert(joined.key, target);
        self.waiting.push_back(joined.key);
    }

    /// The mesh changed; who is concerned is decided at the next flush.
    pub fn update(&mut self, update: Update) {
        self.latest = update.snapshot;
        self.changes.merge(&update.changes);
        self.committed.get_or_insert(update.committed);
    }

    /// Decides whom the changes since the last flush concern, and queues them.
    pub fn flush(&mut self, now: Instant) -> Decision {
        self.targets.retain(|_, target| !target.views.is_closed());
        let changes = std::mem::take(&mut self.changes);
        let impact = Impact::of(&changes, &self.flushed, &self.latest);
        let committed = self.committed.take();
        let mut concerned = Vec::new();
        for (key, target) in &mut self.targets {
            let affected = target.affected(&impact, &changes);
            if affected == Affected::Nothing {
                continue;
            }
            concerned.push(*key);
            target.due = std::mem::take(&mut target.due).and(affected);
            target.committed = target.committed.or(committed);
            if target.place == Place::Idle {
                target.place = Place::Queued;
                target.queued_at = now;
                self.waiting.push_back(*key);
            }
        }
        self.flushed = self.latest.clone();
        Decision { revision: self.revision(), concerned }
    }

    /// The translation that is to be done next.
    pub fn next_job(&mut self) -> Option<Job> {
        while let Some(key) = self.waiting.pop_front() {
            let Some(target) = self.targets.get_mut(&key) else { continue };
            if target.views.is_closed() {
                self.targets.remove(&key);
                continue;
            }
            let mut scope = std::mem::take(&mut target.due);
            if target.view.is_none() {
                scope = Affected::Full;
            }
            target.place = Place::Running { full: scope == Affected::Full };
            return Some(Job {
                key,
                proxy: target.proxy.clone(),
                snapshot: self.latest.clone(),
                scope,
                previous: target.view.clone(),
                hosts: target.hosts.clone(),
                committed: target.committed.take(),
                queued_at: target.queued_at,
            });
        }
        None
    }

    /// A translation is done: its view goes out, and if more has changed meanwhile, the proxy queues again.
    pub fn done(&mut self, done: Done) {
        let Some(target) = self.targets.get_mut(&done.key) else { return };
        target.view = Some(done.view.clone());
        target.hosts = done.hosts;
        target.views.send_replace(Some(done.view));
        self.rest(done.key);
    }

    /// A translation ended without a result (which one is not known): those that run are done again when something
    /// changes.
    pub fn failed(&mut self) {
        let running = self.targets.iter().filter(|(_, target)| matches!(target.place, Place::Running { .. }));
        for key in running.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.rest(key);
        }
    }

    fn rest(&mut self, key: u64) {
        let Some(target) = self.targets.get_mut(&key) else { return };
        if target.due == Affected::Nothing {
            target.place = Place::Idle;
        } else {
            target.place = Place::Queued;
            self.waiting.push_back(key);
        }
    }
}

impl Target {
    fn affected(&self, impact: &Impact, changes: &Changes) -> Affected {
        match self.place {
            // It may come to have endpoints of any host that changed.
            Place::Running { full: true } => impact.on(&self.proxy, &changes.hosts),
            _ => impact.on(&self.proxy, &self.hosts),
        }
    }
}

/// One translation for one proxy.
#[derive(Debug)]
pub struct Job {
    key: u64,
    proxy: Arc<Proxy>,
    snapshot: Arc<Snapshot>,
    scope: Affected,
    previous: Option<Arc<View>>,
    hosts: Arc<BTreeSet<String>>,
    committed: Option<Instant>,
    queued_at: Instant,
}

impl Job {
    /// Since when the proxy has waited.
    #[must_use]
    pub fn queued_at(&self) -> Instant {
        self.queued_at
    }

    /// What it covers, for metrics: `full` or `endpoint`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.scope {
            Affected::Full => "full",
            Affected::Endpoints(_) | Affected::Nothing => "endpoint",
        }
    }

    /// Does it. Pure, and the slow part.
    #[must_use]
    pub fn run(self, interner: &Interner) -> Done {
        let revision = self.snapshot.revision().0;
        let (view, hosts) = match (&self.scope, &self.previous) {
            (Affected::Endpoints(hosts), Some(previous)) => {
                (self.with_endpoints(previous, hosts, interner), self.hosts.clone())
            }
            (Affected::Nothing, Some(previous)) => (View::clone(previous), self.hosts.clone()),
            (Affected::Full, _) | (_, None) => {
                let resources = xds::translate::translate(&self.snapshot, &self.proxy);
                let view = interner.share(View::new(revision, resources));
                let hosts = interner.hosts(view.of(Type::Endpoint));
                (view, hosts)
            }
        };
        let before = self.previous.as_ref().map_or(0, |previous| previous.revision());
        let changed = self.previous.as_ref().is_none_or(|previous| !view.shares_all(previous));
        let view = view.at(revision).committed_at(self.committed.filter(|_| changed));
        Done { key: self.key, view: Arc::new(view), hosts, changed: changed.then_some((before, revision)) }
    }

    fn with_endpoints(&self, previous: &View, hosts: &BTreeSet<String>, interner: &Interner) -> View {
        let fresh = xds::translate::endpoints(&self.snapshot, &self.proxy, hosts);
        let before = previous.of(Type::Endpoint);
        // What the proxy has no cluster for, it must not be given.
        let known = fresh.into_iter().filter(|resource| before.contains_key(&resource.name));
        let mut map = BTreeMap::clone(before);
        map.extend(known.map(|resource| (resource.name.clone(), resource)));
        let shared = interner.map(Type::Endpoint, &Arc::new(map));
        previous.clone().with(Type::Endpoint, shared)
    }
}

/// A translation's result.
#[derive(Debug)]
pub struct Done {
    key: u64,
    view: Arc<View>,
    hosts: Arc<BTreeSet<String>>,
    changed: Option<(u64, u64)>,
}

impl Done {
    /// The connection.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.key
    }

    /// The revisions (from, to] that changed something for it, if any did.
    #[must_use]
    pub fn changed(&self) -> Option<(u64, u64)> {
        self.changed
    }
}
