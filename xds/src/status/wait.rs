//! Waiting until every proxy runs a revision.

use std::sync::Arc;

use tokio::time::Instant;

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
}

impl Status {
    /// Waits until every connected proxy runs `revision`, or refuses it, or until the deadline; then says who does.
    pub async fn wait(&self, revision: u64, deadline: Instant) -> WaitReport {
        let mut changed = self.shared.changed.subscribe();
        loop {
            changed.mark_unchanged();
            if self.table().is_decided(revision) {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => break,
                result = changed.changed() => if result.is_err() { break },
            }
        }
        self.table().wait_report(revision)
    }
}

impl Table {
    /// Nothing that is on its way could change the report for the better.
    fn is_decided(&self, revision: u64) -> bool {
        self.processed >= revision && self.live().all(|entry| entry.runs(revision) || entry.refuses(revision))
    }

    fn wait_report(&self, revision: u64) -> WaitReport {
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
        report.affected.sort_unstable();
        report.acknowledged.sort_unstable();
        report.pending.sort_by(|a, b| a.proxy.id.cmp(&b.proxy.id));
        report
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
        }
    }
}
