//! What Raft tells Prometheus.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::node::{Event, Job, Status};

/// The metrics of one member. Clones count together.
#[derive(Debug, Clone)]
pub struct Metrics {
    term: Gauge,
    leading: Gauge,
    leader_changes: Counter,
    committed_index: Gauge,
    applied_index: Gauge,
    log_entries: Gauge,
    log_bytes: Gauge,
    snapshot_index: Gauge,
    members: Gauge,
    free_bytes: Gauge,
    slow_disk: Gauge,
    handed_over: Counter,
    commit_seconds: Histogram,
    sync_seconds: Histogram,
    snapshot_seconds: Histogram,
    store_seconds: Histogram,
    refused: Counter,
    dropped: Counter,
    last_leader: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let quick = || Histogram::new(exponential_buckets(0.000_1, 2.0, 16));
        Self {
            term: Gauge::default(),
            leading: Gauge::default(),
            leader_changes: Counter::default(),
            committed_index: Gauge::default(),
            applied_index: Gauge::default(),
            log_entries: Gauge::default(),
            log_bytes: Gauge::default(),
            snapshot_index: Gauge::default(),
            members: Gauge::default(),
            free_bytes: Gauge::default(),
            slow_disk: Gauge::default(),
            handed_over: Counter::default(),
            commit_seconds: quick(),
            sync_seconds: quick(),
            snapshot_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            store_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            refused: Counter::default(),
            dropped: Counter::default(),
            last_leader: std::sync::Arc::default(),
        }
    }
}

impl Metrics {
    /// Metrics that `registry` shows, under names that begin with `istiod_raft_`.
    #[must_use]
    pub fn registered(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let raft = registry.sub_registry_with_prefix("istiod_raft");
        let all: [(&str, &str, Gauge); 10] = [
            ("term", "The current term", metrics.term.clone()),
            ("leading", "1 while this member leads", metrics.leading.clone()),
            ("committed_index", "The highest committed index", metrics.committed_index.clone()),
            (
                "applied_index",
                "The highest applied index, which is the revision",
                metrics.applied_index.clone(),
            ),
            ("log_entries", "Entries in the log", metrics.log_entries.clone()),
            ("log_size_bytes", "Bytes of the entries in the log", metrics.log_bytes.clone()),
            ("snapshot_index", "The index of the newest snapshot", metrics.snapshot_index.clone()),
            ("members", "Voters and learners", metrics.members.clone()),
            ("disk_free_bytes", "Bytes that are free on the disk of the log", metrics.free_bytes.clone()),
            ("disk_slow", "1 while every sync of the log is slow", metrics.slow_disk.clone()),
        ];
        for (name, help, gauge) in all {
            raft.register(name, help, gauge);
        }
        raft.register("leader_changes", "Leaders seen after the first", metrics.leader_changes.clone());
        let help = "Leadership handed over because the disk was slow or nearly full";
        raft.register("disk_handovers", help, metrics.handed_over.clone());
        raft.register("refused_requests", "Requests that were not done", metrics.refused.clone());
        raft.register("messages_dropped", "Messages to peers that were not sent", metrics.dropped.clone());
        let durations = [
            ("commit", "From a proposal to its answer", metrics.commit_seconds.clone()),
            ("log_sync", "One fdatasync of the log", metrics.sync_seconds.clone()),
            ("snapshot", "Writing one snapshot", metrics.snapshot_seconds.clone()),
            ("store", "Bringing the store of applied state up to date", metrics.store_seconds.clone()),
        ];
        for (name, help, histogram) in durations {
            raft.register_with_unit(name, help, Unit::Seconds, histogram);
        }
        metrics
    }

    /// The histogram of the log's fdatasync, for the disk.
    #[must_use]
    pub fn sync_seconds(&self) -> Histogram {
        self.sync_seconds.clone()
    }

    /// Shows how the member stands.
    pub fn show(&self, status: &Status) {
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.term.set(signed(status.term));
        self.leading.set(i64::from(status.leading));
        self.committed_index.set(signed(status.committed));
        self.applied_index.set(signed(status.applied));
        self.log_entries.set(signed((status.last_index + 1).saturating_sub(status.first_index)));
        self.log_bytes.set(signed(status.log_bytes));
        self.snapshot_index.set(signed(status.snapshot));
        self.members.set(signed((status.voters.len() + status.learners.len()) as u64));
        self.free_bytes.set(status.free_bytes.map_or(-1, signed));
        self.slow_disk.set(i64::from(status.slow_disk));
        self.handed_over.inc_by(status.handed_over.saturating_sub(self.handed_over.get()));
        if let Some(leader) = status.leader {
            let before = self.last_leader.swap(leader, std::sync::atomic::Ordering::Relaxed);
            if before != 0 && before != leader {
                self.leader_changes.inc();
            }
        }
    }

    /// A proposal was answered.
    pub fn committed(&self, took: Duration) {
        self.commit_seconds.observe(took.as_secs_f64());
    }

    /// A request was not done.
    pub fn refused(&self) {
        self.refused.inc();
    }

    /// A message to a peer was dropped, because its queue was full.
    pub fn dropped(&self) {
        self.dropped.inc();
    }

    /// Does slow work, and notes how long it took.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "measures the job; nothing is decided by it")]
    pub fn timed(&self, job: Job) -> Event {
        let seconds = match job {
            Job::Snapshot(_) => &self.snapshot_seconds,
            Job::Store(_) => &self.store_seconds,
        };
        let before = std::time::Instant::now();
        let event = job.run();
        seconds.observe(before.elapsed().as_secs_f64());
        event
    }
}
