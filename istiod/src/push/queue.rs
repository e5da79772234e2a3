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

/// Below this many targets nobody looks for those that are gone, until something changes.
const PRUNE_FLOOR: usize = 64;

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
    /// So many targets are worth a look for those that are gone.
    prune_at: usize,
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
            prune_at: PRUNE_FLOOR,
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
        if self.targets.len() >= self.prune_at {
            self.prune();
        }
        self.targets.insert(joined.key, target);
        self.waiting.push_back(joined.key);
    }

    /// The mesh changed; who is concerned is decided at the next flush.
    pub fn update(&mut self, update: Update) {
        self.latest = update.snapshot;
        self.changes.merge(update.changes);
        self.committed.get_or_insert(update.committed);
    }

    /// Decides whom the changes since the last flush concern, and queues them.
    pub fn flush(&mut self, now: Instant) -> Decision {
        self.prune();
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

    /// A translation ended without a result: everything is translated again when something changes.
    pub fn failed(&mut self, key: u64) {
        self.rest(key);
        if let Some(target) = self.targets.get_mut(&key) {
            // What it covered is lost; endpoints alone, put on the old view, would pass for all of it.
            target.due = Affected::Full;
        }
    }

    fn prune(&mut self) {
        self.targets.retain(|_, target| !target.views.is_closed());
        self.prune_at = PRUNE_FLOOR.max(self.targets.len() * 2);
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
            Place::Idle | Place::Queued | Place::Running { full: false } => {
                impact.on(&self.proxy, &self.hosts)
            }
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
    /// The connection.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.key
    }

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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use registry::state::{Batch, Revision, State};
    use serde_json::json;

    use super::*;

    struct Mesh {
        state: State,
        queue: Queue,
        snapshot: Arc<Snapshot>,
        now: Instant,
        views: BTreeMap<u64, watch::Receiver<Option<Arc<View>>>>,
        interner: Interner,
    }

    impl Mesh {
        fn new() -> Self {
            let state = State::default();
            let snapshot = Arc::new(Snapshot::build(&state));
            Self {
                queue: Queue::new(snapshot.clone()),
                state,
                snapshot,
                now: tokio::time::Instant::now().into_std(),
                views: BTreeMap::new(),
                interner: Interner::default(),
            }
        }

        fn join(&mut self, key: u64, namespace: &str) {
            let node =
                json!({"id": format!("sidecar~10.0.0.{key}~app.{namespace}~{namespace}.svc.cluster.local")});
            let proxy = Proxy::from_node(&wire::json::message_from_json(&node).unwrap(), None).unwrap();
            let (views, receiver) = watch::channel(None);
            self.views.insert(key, receiver);
            self.queue.join(Joined { key, proxy: Arc::new(proxy), views }, self.now);
        }

        /// Applies a service with this endpoint, exported to these namespaces.
        fn apply(&mut self, name: &str, address: &str, export: &str) {
            let yaml = format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: a}}\n\
                 spec: {{hosts: [{name}.example.com], exportTo: [\"{export}\"], resolution: STATIC, \
                 ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: {address}}}]}}\n"
            );
            let (objects, _) = registry::config::parse("test.yaml", &yaml).unwrap();
            let revision = Revision(self.state.revision().0 + 1);
            let (changes, _) = self.state.apply(revision, &Batch::put_objects(1, "test", objects));
            self.snapshot = Arc::new(Snapshot::next(&self.snapshot, &self.state, &changes));
            self.queue.update(Update { snapshot: self.snapshot.clone(), changes, committed: self.now });
        }

        fn jobs(&mut self) -> Vec<Job> {
            std::iter::from_fn(|| self.queue.next_job()).collect()
        }

        fn run(&mut self, job: Job) {
            let done = job.run(&self.interner);
            self.queue.done(done);
        }

        fn run_all(&mut self) {
            while let Some(job) = self.queue.next_job() {
                self.run(job);
            }
        }

        fn revision(&self, key: u64) -> u64 {
            self.views[&key].borrow().as_ref().map_or(0, |view| view.revision())
        }
    }

    #[test]
    fn who_waits_longest_is_next_and_has_one_place() {
        let mut mesh = Mesh::new();
        mesh.join(1, "a");
        mesh.join(2, "a");
        mesh.run_all();
        mesh.apply("x", "10.1.0.1", "*");
        assert_eq!(mesh.queue.flush(mesh.now), Decision { revision: 1, concerned: vec![1, 2] });
        mesh.join(3, "a");
        mesh.apply("x", "10.1.0.2", "*");
        mesh.apply("y", "10.1.0.2", "*");
        mesh.queue.flush(mesh.now + Duration::from_secs(1));
        let keys: Vec<u64> = mesh.jobs().iter().map(Job::key).collect();
        assert_eq!(keys, [1, 2, 3]);
    }

    #[test]
    fn endpoints_alone_are_translated_alone_and_equal_a_full_translation() {
        let mut mesh = Mesh::new();
        mesh.join(1, "a");
        mesh.apply("x", "10.1.0.1", "*");
        mesh.queue.flush(mesh.now);
        mesh.run_all();
        mesh.apply("x", "10.1.0.2", "*");
        mesh.queue.flush(mesh.now);
        let job = mesh.queue.next_job().unwrap();
        assert_eq!(job.kind(), "endpoint");
        mesh.run(job);
        let view = mesh.views[&1].borrow().clone().unwrap();
        let proxy = mesh.queue.targets[&1].proxy.clone();
        let full = mesh.interner.share(View::new(2, xds::translate::translate(&mesh.snapshot, &proxy)));
        assert!(view.shares_all(&full));
    }

    #[test]
    fn what_changes_during_a_translation_is_done_after_it() {
        let mut mesh = Mesh::new();
        mesh.join(1, "a");
        let first = mesh.queue.next_job().unwrap();
        // The running translation knows nothing of this host; its endpoints change before it is done.
        mesh.apply("x", "10.1.0.1", "*");
        mesh.queue.flush(mesh.now);
        assert!(mesh.queue.next_job().is_none());
        mesh.run(first);
        assert_eq!(mesh.revision(1), 0);
        mesh.run_all();
        assert_eq!(mesh.revision(1), 1);
        mesh.apply("x", "10.1.0.2", "*");
        mesh.queue.flush(mesh.now);
        let second = mesh.queue.next_job().unwrap();
        mesh.apply("x", "10.1.0.3", "*");
        mesh.queue.flush(mesh.now);
        mesh.run(second);
        mesh.run_all();
        assert_eq!(mesh.revision(1), 3);
        assert!(mesh.queue.next_job().is_none());
    }

    #[test]
    fn after_a_translation_that_failed_the_next_covers_everything() {
        let mut mesh = Mesh::new();
        mesh.join(1, "a");
        mesh.apply("x", "10.1.0.1", "*");
        mesh.queue.flush(mesh.now);
        mesh.run_all();
        mesh.apply("y", "10.1.0.2", "*");
        mesh.queue.flush(mesh.now);
        let failing = mesh.queue.next_job().unwrap();
        mesh.queue.failed(failing.key());
        assert!(mesh.queue.next_job().is_none(), "not again before something changes");
        mesh.apply("x", "10.1.0.3", "*");
        mesh.queue.flush(mesh.now);
        assert_eq!(mesh.queue.next_job().unwrap().kind(), "full");
    }

    #[test]
    fn only_namespaces_that_see_a_service_are_concerned_by_it() {
        let mut mesh = Mesh::new();
        mesh.join(1, "a");
        mesh.join(2, "b");
        mesh.run_all();
        mesh.apply("x", "10.1.0.1", "b");
        assert_eq!(mesh.queue.flush(mesh.now).concerned, [2]);
        mesh.apply("x", "10.1.0.1", ".");
        assert_eq!(mesh.queue.flush(mesh.now).concerned, [1, 2]);
        // The workload behind an endpoint serves it, seen or not.
        mesh.run_all();
        mesh.apply("y", "10.0.0.2", ".");
        assert_eq!(mesh.queue.flush(mesh.now).concerned, [1, 2]);
        mesh.apply("z", "10.1.0.9", "c");
        assert!(mesh.queue.flush(mesh.now).concerned.is_empty());
    }

    #[test]
    fn a_proxy_that_has_gone_is_not_translated_for() {
        let mut mesh = Mesh::new();
        mesh.join(1, "a");
        mesh.join(2, "a");
        mesh.views.remove(&1);
        let keys: Vec<u64> = mesh.jobs().iter().map(Job::key).collect();
        assert_eq!(keys, [2]);
    }
}
