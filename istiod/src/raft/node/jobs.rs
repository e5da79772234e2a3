//! Slow work that a step leaves to another thread. What it comes to is an event.

use std::panic::{AssertUnwindSafe, catch_unwind};

use prost::Message as _;

use super::thread::panic_text;
use super::{Event, Fatal, MACHINE_KEYS};
use crate::raft::machine::{Frozen, Writes};
use crate::raft::snapshots::Snapshots;
use crate::raft::store::{KvStore, Write};
use crate::raft::wire::{self, AppliedMark, SnapshotBody, SnapshotMetadata};

/// Work for another thread, with all that it needs.
pub enum Job {
    /// A snapshot is to be written.
    Snapshot(SnapshotJob),
    /// The store of applied state is to be brought up to date.
    Store(StoreJob),
}

impl Job {
    /// Does it; the driver is to be given the event. A panic is an event too.
    #[must_use]
    pub fn run(self) -> Event {
        match self {
            Self::Snapshot(job) => Event::SnapshotSaved(guarded(|| job.run())),
            Self::Store(job) => Event::Stored(guarded(|| job.run())),
        }
    }
}

fn guarded<R>(action: impl FnOnce() -> Result<R, Fatal>) -> Result<R, Fatal> {
    let result = catch_unwind(AssertUnwindSafe(action));
    result.unwrap_or_else(|panic| Err(Fatal::Panicked(panic_text(panic.as_ref()))))
}

/// A snapshot on its way to disk.
pub struct SnapshotJob {
    pub(super) metadata: SnapshotMetadata,
    pub(super) sessions: wire::Sessions,
    pub(super) frozen: Frozen,
    pub(super) snapshots: Snapshots,
}

impl SnapshotJob {
    /// Encodes the state and writes the file.
    fn run(self) -> Result<SnapshotMetadata, Fatal> {
        let body = SnapshotBody { sessions: Some(self.sessions), machine: (self.frozen)()?.into() };
        self.snapshots.save(&self.metadata, &body.encode_to_vec())?;
        Ok(self.metadata)
    }
}

/// What was applied, on its way to the store.
pub struct StoreJob {
    pub(super) store: Box<dyn KvStore>,
    /// What the store has is of no use: it is emptied first.
    pub(super) anew: bool,
    pub(super) machine: Writes,
    pub(super) sessions: Vec<Write>,
    pub(super) mark: AppliedMark,
}

impl StoreJob {
    /// Encodes what changed and stores it with the mark in one batch; gives the store back.
    pub(super) fn run(mut self) -> Result<Box<dyn KvStore>, Fatal> {
        let mut writes = (self.machine)();
        for write in &mut writes {
            write.key.splice(..0, MACHINE_KEYS.iter().copied());
        }
        writes.extend(self.sessions);
        if self.anew {
            self.store.clear()?;
        }
        self.store.batch(&writes, &self.mark)?;
        Ok(self.store)
    }
}
