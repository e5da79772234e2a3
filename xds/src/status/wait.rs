//! Waiting until every proxy runs a revision.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio::time::error::Elapsed;

use super::{Entry, Status, Table};
use crate::proxy::Proxy;
use crate::resources::Type;
use crate::stream::{Nack, Sync};

/// Who runs a revision, and who does not.
#[derive(Debug, Clone, Default)]
pub struct WaitReport {
    /// The revision that was waited for.
    pub revision: u64,
    /// Node ids of the connected proxies for which it changed something, as far as is known.
    pub affected: Vec<String>,
    /// Node ids of the connected proxies that run it.
    pub acknowledged: Vec<String>,
    /// The connected proxies that do not.
    pub pending: Vec<Pending>,
}

/// A proxy that does not run a revision.
#[derive(Debug, Clone)]
pub struct Pending {
    /// The proxy.
    pub proxy: Arc<Proxy>,
    /// Types of which something is missing; empty when the push side has not got to it.
    pub types: Vec<Type>,
    /// What it refuses, with its words.
    pub nacks: Vec<Nack>,
    /// It was connected when the waiting began, and has not come back.
    pub gone: bool,
}

/// A proxy whose stream ends while somebody waits has this long to come back.
const ABSENCE: Duration = Duration::from_secs(2);

impl Status {
    /// Waits until every connected proxy runs `revision`, or refuses it, or until the deadline; then says who does.
    /// A proxy that is connected at the beginning and leaves may have been ended by the very change: it counts as
    /// pending, and is waited for a little.
    pub async fn wait(&self, revision: u64, deadline: Instant) -> WaitReport {
        let mut changed = self.shared.changed.subscribe();
        let present: Vec<_> = self.table().live().map(|entry| entry.proxy.clone()).collect();
        let mut missed = None;
        loop {
            changed.mark_unchanged();
            let (decided, complete) = {
                let table = self.table();
                (table.is_decided(revision), table.gone(&present).next().is_none())
            };
            let now = Instant::now();
            missed = if complete { None } else { missed.or(Some(now + ABSENCE)) };
            if decided && missed.is_none_or(|until| until <= now) {
                break;
            }
            let until = missed.filter(|_| decided).unwrap_or(deadline).min(deadline);
            tokio::select! {
                () = tokio::time::sleep_until(until) => if until == deadline { break },
                result = changed.changed() => if result.is_err() { break },
            }
        }
        self.table().wait_report(revision, &present)
    }

    /// Waits until every proxy that is connected runs `revision`, or refuses it, or until the deadline. Those that
    /// leave meanwhile are not waited for.
    pub async fn decided(&self, revision: u64, deadline: Instant) {
        let mut changed = self.shared.changed.subscribe();
        let decided =
            async { while !self.table().is_decided(revision) && changed.changed().await.is_ok() {} };
        // late is as good as never: the caller goes on
        let _in_time: Result<(), Elapsed> = tokio::time::timeout_at(deadline, decided).await;
    }
}

impl Table {
    /// Nothing that is on its way could change the report for the better.
    fn is_decided(&self, revision: u64) -> bool {
        self.processed >= revision && self.live().all(|entry| entry.runs(revision) || entry.refuses(revision))
    }

    fn wait_report(&self, revision: u64, present: &[Arc<Proxy>]) -> WaitReport {
        let mut report = WaitReport { revision, ..WaitReport::default() };
        for entry in self.live() {
            if entry.was_changed_by(revision) {
                report.affected.push(entry.proxy.id.clone());
            }
            if self.processed >= revision && entry.runs(revision) {
                report.acknowledged.push(entry.proxy.id.clone());
            } else {
                report.pending.push(entry.pending());
            }
        }
        report.pending.extend(self.gone(present).map(|proxy| Pending {
            proxy: proxy.clone(),
            types: Vec::new(),
            nacks: Vec::new(),
            gone: true,
        }));
        report.affected.sort_unstable();
        report.acknowledged.sort_unstable();
        report.pending.sort_by(|a, b| a.proxy.id.cmp(&b.proxy.id));
        report
    }

    /// Those that have no stream now.
    fn gone<'a>(&'a self, present: &'a [Arc<Proxy>]) -> impl Iterator<Item = &'a Arc<Proxy>> {
        let same = |a: &Proxy, b: &Proxy| a.id == b.id && a.identity == b.identity;
        present.iter().filter(move |proxy| !self.live().any(|entry| same(&entry.proxy, proxy)))
    }

    fn live(&self) -> impl Iterator<Item = &Entry> {
        self.connections.values().filter(|entry| !entry.superseded)
    }
}

impl Entry {
    fn pending(&self) -> Pending {
        let types = self.report.types.iter();
        let missing = types.clone().filter(|(_, of_type)| of_type.sync != Sync::Synced);
        Pending {
            proxy: self.proxy.clone(),
            types: missing.map(|(t, _)| *t).collect(),
            nacks: types.filter_map(|(_, of_type)| of_type.nack.clone()).collect(),
            gone: false,
        }
    }
}
