//! What each connected proxy holds and has acknowledged.
//!
//! The server writes what each stream reports, the push side writes which revisions concern which proxy, and
//! the API reads: the rows of `proxy-status`, and [`Status::wait`] for `apply --wait`.

mod metrics;
mod wait;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use crate::cache::View;
use crate::proxy::Proxy;
use crate::resources::{Resources, Type};
use crate::stream::{Action, Nack, Report, Sync, TypeReport, Variant};

pub use metrics::{Metrics, Sum, TypeLabel};
pub use wait::{Pending, WaitReport};

/// Changed revisions remembered per proxy, to tell which revisions changed something for it.
const REMEMBERED: usize = 64;

/// Requests for a dump that wait for one stream. Full means that the stream is busy; callers wait.
const DUMPS: usize = 4;

/// A connected proxy, as a reader sees it.
#[derive(Debug, Clone)]
pub struct ProxyStatus {
    /// The proxy.
    pub proxy: Arc<Proxy>,
    /// Delta or state of the world.
    pub variant: Variant,
    /// The version it tells.
    pub version: String,
    /// How long it has been connected.
    pub connected: Duration,
    /// The newest revision that it runs: all that it must have for it is acknowledged.
    pub revision: u64,
    /// By type, all of them.
    pub types: BTreeMap<Type, TypeReport>,
}

impl ProxyStatus {
    /// What the proxy has rejected and not made good since.
    pub fn rejections(&self) -> impl Iterator<Item = &Nack> {
        self.types.values().filter_map(|of_type| of_type.nack.as_ref())
    }
}

/// What is known of all connected proxies. A handle; clones see the same.
#[derive(Debug, Clone)]
pub struct Status {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    changed: watch::Sender<u64>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    processed: u64,
    connections: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    proxy: Arc<Proxy>,
    variant: Variant,
    version: String,
    since: Instant,
    report: Report,
    /// Spans of revisions (from, to] that may concern this proxy, oldest first: who has `to` runs all of them. Empty
    /// before the push side knows the proxy.
    required: VecDeque<(u64, u64)>,
    /// Spans of revisions (from, to] that changed what this proxy should hold, oldest first.
    changes: VecDeque<(u64, u64)>,
    /// A newer stream of the same node exists: this one is dead and does not know yet.
    superseded: bool,
    dumps: mpsc::Sender<oneshot::Sender<Resources>>,
}

impl Entry {
    /// Whether the proxy runs `revision`, given that all its requirements up to there are known.
    fn runs(&self, revision: u64) -> bool {
        let synced = self.report.synced_revision;
        synced > 0 && (synced >= revision || self.due(revision).is_some_and(|due| synced >= due))
    }

    /// What the proxy must have to run `revision`; the oldest that is remembered, if that is newer.
    fn due(&self, revision: u64) -> Option<u64> {
        let before = self.required.iter().rev().find(|(from, _)| *from < revision);
        before.or_else(|| self.required.front()).map(|(_, to)| *to)
    }

    fn require(&mut self, from: u64, to: u64) {
        if self.required.back().is_some_and(|(_, newest)| *newest >= to) {
            return;
        }
        if self.required.len() == REMEMBERED {
            self.required.pop_front();
        }
        self.required.push_back((from, to));
    }

    /// The newest revision it runs.
    fn revision(&self, processed: u64) -> u64 {
        if self.runs(processed) {
            processed.max(self.report.synced_revision)
        } else {
            self.report.synced_revision
        }
    }

    /// Rejects something, and nothing is on its way that could make it good.
    fn refuses(&self, revision: u64) -> bool {
        let due = self.due(revision).map_or(revision, |due| due.min(revision));
        self.report.at_rest
            && self.report.view_revision >= due
            && self.report.types.values().any(|of_type| of_type.sync == Sync::Nacked)
    }

    fn was_changed_by(&self, revision: u64) -> bool {
        self.changes.iter().any(|(from, to)| *from < revision && revision <= *to)
    }
}

impl Status {
    /// Nobody connected.
    #[must_use]
    pub fn new(metrics: Metrics) -> Self {
        let shared = Shared { table: Mutex::default(), changed: watch::Sender::new(0), metrics };
        Self { shared: Arc::new(shared) }
    }

    /// The metrics that streams and pushes count in.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// A stream was opened. It is connected until the [`Connection`] is dropped.
    #[must_use]
    pub fn connect(&self, proxy: Arc<Proxy>, variant: Variant, version: String, now: Instant) -> Connection {
        let (dumps, dump_requests) = mpsc::channel(DUMPS);
        let key = self.change(|table| {
            // The node id is the client's word: a stream of another identity does not take this one's place.
            let known = (proxy.id.as_str(), proxy.identity.as_ref());
            for entry in table.connections.values_mut() {
                entry.superseded |= (entry.proxy.id.as_str(), entry.proxy.identity.as_ref()) == known;
            }
            table.next += 1;
            let entry = Entry {
                proxy,
                variant,
                version,
                since: now,
                report: Report::default(),
                required: VecDeque::new(),
                changes: VecDeque::new(),
                superseded: false,
                dumps,
            };
            table.connections.insert(table.next, entry);
            table.next
        });
        self.shared.metrics.connected.inc();
        Connection {
            key,
            status: self.clone(),
            seen: 0,
            sent: 0,
            refused: [false; Type::ALL.len()],
            dump_requests,
        }
    }

    /// The push side: whatever `revision` changes, it may concern this connection; until the stream has reported
    /// it, the proxy does not run it.
    pub fn require(&self, key: u64, revision: u64) {
        self.change(|table| {
            if let Some(entry) = table.connections.get_mut(&key) {
                entry.require(0, revision);
            }
        });
    }

    /// The push side: the revisions after `from` up to `to` changed what this connection should hold.
    pub fn note_change(&self, key: u64, from: u64, to: u64) {
        self.change(|table| {
            if let Some(entry) = table.connections.get_mut(&key) {
                if entry.changes.len() == REMEMBERED {
                    entry.changes.pop_front();
                }
                entry.changes.push_back((from, to));
            }
        });
    }

    /// The push side: of all changes up to `revision`, those that were not decided before may concern these
    /// connections and no others.
    pub fn decide(&self, revision: u64, concerned: &[u64]) {
        self.change(|table| {
            let from = table.processed.min(revision.saturating_sub(1));
            for key in concerned {
                if let Some(entry) = table.connections.get_mut(key) {
                    entry.require(from, revision);
                }
            }
            table.processed = table.processed.max(revision);
        });
    }

    /// Waits until the push side has decided about `revision`: whoever connects after that gets it or a later one.
    pub async fn reached(&self, revision: u64) {
        let mut changed = self.shared.changed.subscribe();
        // The sender lives as long as this handle.
        drop(changed.wait_for(|_| self.table().processed >= revision).await);
    }

    /// Every connected proxy, by node id.
    #[must_use]
    pub fn proxies(&self, now: Instant) -> Vec<ProxyStatus> {
        let table = self.table();
        let entries = table.connections.values().filter(|entry| !entry.superseded);
        let mut rows: Vec<_> = entries.map(|entry| entry.status(table.processed, now)).collect();
        rows.sort_by(|a, b| a.proxy.id.cmp(&b.proxy.id));
        rows
    }

    /// What the proxy with this node id has accepted, as far as this server sent it; none if it is not connected.
    pub async fn resources(&self, node_id: &str) -> Option<Resources> {
        let dumps = {
            let table = self.table();
            let mut entries = table.connections.values();
            entries.find(|entry| entry.proxy.id == node_id && !entry.superseded)?.dumps.clone()
        };
        let (reply, answer) = oneshot::channel();
        dumps.send(reply).await.ok()?;
        answer.await.ok()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let result = change(&mut self.table());
        self.shared.changed.send_modify(|count| *count = count.wrapping_add(1));
        result
    }
}

impl Entry {
    fn status(&self, processed: u64, now: Instant) -> ProxyStatus {
        let unasked = TypeReport::default();
        let of = |t| (t, self.report.types.get(&t).unwrap_or(&unasked).clone());
        ProxyStatus {
            proxy: self.proxy.clone(),
            variant: self.variant,
            version: self.version.clone(),
            connected: now.saturating_duration_since(self.since),
            revision: self.revision(processed),
            types: Type::ALL.into_iter().map(of).collect(),
        }
    }
}

/// One open stream's handle on the [`Status`]. Dropping it says that the stream has ended.
#[derive(Debug)]
pub struct Connection {
    key: u64,
    status: Status,
    seen: u64,
    sent: u64,
    refused: [bool; Type::ALL.len()],
    dump_requests: mpsc::Receiver<oneshot::Sender<Resources>>,
}

impl Connection {
    /// Names this connection to the push side.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.key
    }

    /// The next reader who wants to know what the proxy has. Cancel safe.
    pub async fn dump_request(&mut self) -> Option<oneshot::Sender<Resources>> {
        self.dump_requests.recv().await
    }

    /// The stream did something.
    pub fn update(&mut self, report: Report, actions: &[Action], view: Option<&View>, now: Instant) {
        let metrics = self.status.metrics();
        actions.iter().for_each(|action| metrics.count(action));
        let committed = view.and_then(View::committed);
        let waited = committed.map(|at| now.saturating_duration_since(at).as_secs_f64());
        let sends = actions.iter().any(|action| matches!(action, Action::Send(_)));
        if sends && report.view_revision > self.sent {
            self.sent = report.view_revision;
            waited.into_iter().for_each(|seconds| metrics.convergence.observe(seconds));
        }
        if report.synced_revision > self.seen {
            self.seen = report.synced_revision;
            waited.into_iter().for_each(|seconds| metrics.push_convergence.observe(seconds));
        }
        for (slot, t) in self.refused.iter_mut().zip(Type::ALL) {
            let refuses = report.types.get(&t).is_some_and(|of_type| of_type.sync == Sync::Nacked);
            metrics.refusing(t, *slot, refuses);
            *slot = refuses;
        }
        self.status.change(|table| {
            if let Some(entry) = table.connections.get_mut(&self.key) {
                entry.report = report;
            }
        });
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for (refused, t) in self.refused.iter().zip(Type::ALL) {
            self.status.metrics().refusing(t, *refused, false);
        }
        self.status.metrics().connected.dec();
        self.status.change(|table| table.connections.remove(&self.key));
    }
}
