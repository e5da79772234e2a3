//! Keeps catalogs of Consul like the mesh's own services, while this member leads.
//!
//! What is asked and written is decided by [`Writer`]. A member begins to write when it has read everything that was
//! committed before its turn, so that what its mesh lacks really is not there; the term of its turn is the epoch of what
//! it writes.

use std::sync::Arc;

use ca::renewal::Clock;
use prometheus_client::registry::Registry;
use registry::snapshot::Snapshot;
use registry::source::consul::drive::Connection;
use registry::source::consul::export::Settings;
use registry::source::consul::export::drive::{self, World};
use registry::source::consul::export::writer::{Status, Writer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Counters, Gauges, Labels, Turns};
use crate::config::consul::Consul;
use crate::raft::Raft;
use crate::upkeep;

/// The metrics of all datacenters.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    writing: Gauges,
    synced: Gauges,
    entries: Gauges,
    waiting: Gauges,
    deferred: Gauges,
    conflicts: Gauges,
    problems: Gauges,
    written: Counters,
    removed: Counters,
    failures: Counters,
}

impl Metrics {
    /// Metrics that `registry` shows, under names that begin with `istiod_consul_export_`.
    pub(crate) fn registered(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let gauges = [
            ("writing", "1 on the member that writes into the datacenter", &metrics.writing),
            ("synced", "1 while everything is in the catalog that should be", &metrics.synced),
            ("entries", "Entries of the mesh that should be in the catalog", &metrics.entries),
            ("waiting_entries", "Entries that wait for the rate", &metrics.waiting),
            (
                "deferred_entries",
                "Entries that should go, and wait because not much goes at once",
                &metrics.deferred,
            ),
            (
                "conflicts",
                "Entries on the mesh's node, or the node itself, that are somebody else's",
                &metrics.conflicts,
            ),
            ("problems", "Services and entries that are not written as they are", &metrics.problems),
        ];
        let counters = [
            ("written_entries", "Entries that were written", &metrics.written),
            ("removed_entries", "Entries that were removed", &metrics.removed),
            ("failures", "Questions and transactions that failed", &metrics.failures),
        ];
        super::register(registry, "istiod_consul_export", &gauges, &counters);
        metrics
    }

    fn show(&self, labels: &Labels, before: &Status, status: &Status) {
        let gauges = [
            (&self.synced, usize::from(status.synced)),
            (&self.entries, status.entries),
            (&self.waiting, status.waiting),
            (&self.deferred, status.deferred),
            (&self.conflicts, status.conflicts.len()),
            (&self.problems, status.problems.len()),
        ];
        let counters = [
            (&self.written, before.written, status.written),
            (&self.removed, before.removed, status.removed),
            (&self.failures, before.failures, status.failures),
        ];
        super::show(labels, &gauges, &counters);
    }
}

/// Writes into every datacenter of the settings, on `tasks` until `stop`.
pub(crate) fn start(
    consul: Option<&Consul>,
    (raft, snapshots): (&Raft, &watch::Receiver<Arc<Snapshot>>),
    clock: &Clock,
    metrics: &Metrics,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    for (settings, connection) in consul.into_iter().flat_map(Consul::exports) {
        let cluster = consul.map(|consul| consul.cluster.clone()).unwrap_or_default();
        let labels = Labels { datacenter: format!("{cluster}/{}", settings.datacenter) };
        let export = Export {
            settings,
            labels,
            connection,
            raft: raft.clone(),
            snapshots: snapshots.clone(),
            clock: clock.clone(),
            metrics: metrics.clone(),
        };
        tasks.spawn(export.follow(stop.clone()));
    }
}

/// One datacenter, and what goes there.
struct Export {
    settings: Settings,
    labels: Labels,
    connection: Connection,
    raft: Raft,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    clock: Clock,
    metrics: Metrics,
}

impl Export {
    /// Writes whenever this member leads, until `stop`.
    async fn follow(self, stop: CancellationToken) {
        let mut turns = Turns { leads: self.raft.status(), stop };
        while let Some((term, turn)) = turns.begin().await {
            let ((), goes_on) = tokio::join!(self.turn(term, turn.clone()), turns.end(term, turn));
            // The next one tells how it stands then.
            self.metrics.show(&self.labels, &Status::default(), &Status::default());
            self.metrics.writing.get_or_create(&self.labels).set(0);
            if !goes_on {
                return;
            }
        }
    }

    /// Writes until `stop`.
    async fn turn(&self, term: u64, stop: CancellationToken) {
        let known = stop.run_until_cancelled(upkeep::ready(&self.raft)).await;
        if !matches!(known, Some(Ok(_))) {
            return;
        }
        self.metrics.writing.get_or_create(&self.labels).set(1);
        tracing::info!(datacenter = self.labels.datacenter, term, "writing into a Consul datacenter");
        let now = tokio::time::Instant::now().into_std();
        let writer = Writer::new(self.settings.clone(), term, fastrand::Rng::new(), now);
        let world = World {
            connection: self.connection.clone(),
            snapshots: self.snapshots.clone(),
            clock: self.clock.clone(),
        };
        let (told, status) = watch::channel(Status::default());
        tokio::join!(drive::write(writer, world, told, stop.clone()), self.tell(status, stop));
    }

    /// Shows the status in metrics, and its turns in the log.
    async fn tell(&self, mut status: watch::Receiver<Status>, stop: CancellationToken) {
        let mut before = Status::default();
        while let Some(Ok(())) = stop.run_until_cancelled(status.changed()).await {
            let now = status.borrow_and_update().clone();
            self.metrics.show(&self.labels, &before, &now);
            report(&self.labels.datacenter, &before, &now);
            before = now;
        }
    }
}

/// One line for each turn of the writing's fortune.
fn report(datacenter: &str, before: &Status, now: &Status) {
    if now.synced && !before.synced && before.written == 0 {
        tracing::info!(datacenter, entries = now.entries, "Consul datacenter has the mesh's services");
    }
    match (&before.failure, &now.failure) {
        (None, Some(error)) => {
            tracing::warn!(
                datacenter,
                error,
                "the mesh's services are not written into the Consul datacenter"
            )
        }
        (Some(_), None) => tracing::info!(datacenter, "the mesh's services are written into Consul again"),
        _ => {}
    }
    match (before.deferred, now.deferred) {
        (0, deferred) if deferred > 0 => tracing::warn!(
            datacenter,
            deferred,
            "many of the mesh's entries should go at once; the rest of them stays for a while"
        ),
        (deferred, 0) if deferred > 0 => {
            tracing::info!(datacenter, "no entries stay longer than they should")
        }
        _ => {}
    }
    for conflict in now.conflicts.iter().filter(|conflict| !before.conflicts.contains(conflict)) {
        tracing::warn!(datacenter, conflict, "somebody else writes where the mesh writes; it is left alone");
    }
    for problem in now.problems.iter().filter(|problem| !before.problems.contains(problem)) {
        tracing::info!(datacenter, problem, "something of the mesh is not written into Consul as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_count_on_from_what_was_shown() {
        let metrics = Metrics::registered(&mut Registry::default());
        let labels = Labels { datacenter: "c/dc1".to_owned() };
        let first = Status { written: 5, entries: 2, ..Status::default() };
        metrics.show(&labels, &Status::default(), &first);
        metrics.show(&labels, &first, &Status { written: 7, synced: true, ..first.clone() });
        assert_eq!(metrics.written.get_or_create(&labels).get(), 7);
        assert_eq!(metrics.synced.get_or_create(&labels).get(), 1);
        assert_eq!(metrics.entries.get_or_create(&labels).get(), 2);
    }
}
