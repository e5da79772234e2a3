//! Applied state to [`Snapshot`] to the push queue: the one writer.
//!
//! Whoever applies the log calls [`Publisher::publish`] after every entry. It never waits: readers get the newest
//! snapshot, and the push side gets the newest snapshot with the changes of all entries since it last looked.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use registry::snapshot::Snapshot;
use registry::state::{Changes, State};
use tokio::sync::{Notify, watch};

/// A snapshot, and what led to it from the one before.
#[derive(Debug, Clone)]
pub struct Update {
    /// The mesh now.
    pub snapshot: Arc<Snapshot>,
    /// Everything that differs from the snapshot of the update before.
    pub changes: Changes,
    /// When the oldest of the changes was committed.
    pub committed: Instant,
}

impl Update {
    fn merge(&mut self, later: Self) {
        self.changes.merge(later.changes);
        self.snapshot = later.snapshot;
    }
}

#[derive(Debug, Default)]
struct Slot {
    update: Mutex<(Option<Update>, bool)>,
    filled: Notify,
}

impl Slot {
    fn change<T>(&self, change: impl FnOnce(&mut (Option<Update>, bool)) -> T) -> T {
        change(&mut self.update.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Makes the snapshots. Not `Clone`: there is one.
#[derive(Debug)]
pub struct Publisher {
    current: watch::Sender<Arc<Snapshot>>,
    slot: Arc<Slot>,
}

impl Publisher {
    /// Starts from the state that was restored.
    #[must_use]
    pub fn new(state: &State) -> (Self, Updates) {
        Self::starting_at(Arc::new(Snapshot::build(state)))
    }

    /// Starts from a snapshot.
    #[must_use]
    pub fn starting_at(snapshot: Arc<Snapshot>) -> (Self, Updates) {
        let slot = Arc::new(Slot::default());
        let current = watch::Sender::new(snapshot);
        let updates = Updates { slot: slot.clone(), current: current.subscribe() };
        (Self { current, slot }, updates)
    }

    /// The newest snapshot, for readers.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.current.subscribe()
    }

    /// A snapshot of `state` from scratch, of the same mesh as the newest one.
    #[must_use]
    pub fn rebuild(&self, state: &State) -> Arc<Snapshot> {
        Arc::new(self.current.borrow().rebuild(state))
    }

    /// An entry of the log was applied: `changes` led to `state`. Returns its snapshot.
    pub fn publish(&mut self, state: &State, changes: Changes, committed: Instant) -> Arc<Snapshot> {
        let previous = self.current.borrow().clone();
        let next = Arc::new(Snapshot::next(&previous, state, &changes));
        self.publish_snapshot(next.clone(), changes, committed);
        next
    }

    /// The same with a snapshot that was built already.
    pub fn publish_snapshot(&mut self, snapshot: Arc<Snapshot>, changes: Changes, committed: Instant) {
        self.current.send_replace(snapshot.clone());
        let update = Update { snapshot, changes, committed };
        self.slot.change(|(waiting, _)| match waiting {
            Some(waiting) => waiting.merge(update),
            None => *waiting = Some(update),
        });
        self.slot.filled.notify_one();
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.slot.change(|(_, closed)| *closed = true);
        self.slot.filled.notify_one();
    }
}

/// The push side's end.
#[derive(Debug)]
pub struct Updates {
    slot: Arc<Slot>,
    current: watch::Receiver<Arc<Snapshot>>,
}

impl Updates {
    /// The newest snapshot.
    #[must_use]
    pub fn current(&self) -> Arc<Snapshot> {
        self.current.borrow().clone()
    }

    /// The next update: all that changed since the one before. None when the publisher is gone. Cancel safe.
    pub async fn next(&mut self) -> Option<Update> {
        loop {
            let (update, closed) = self.slot.change(|(update, closed)| (update.take(), *closed));
            if update.is_some() || closed {
                return update;
            }
            self.slot.filled.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn change(host: &str) -> Changes {
        let mut changes = Changes::default();
        changes.hosts.insert(host.to_owned());
        changes
    }

    #[tokio::test]
    async fn what_was_not_taken_is_merged_and_the_oldest_commit_counts() {
        let state = State::default();
        let (mut publisher, mut updates) = Publisher::new(&state);
        let start = tokio::time::Instant::now().into_std();
        publisher.publish(&state, change("a"), start);
        publisher.publish(&state, change("b"), start + Duration::from_secs(1));
        let update = updates.next().await.unwrap();
        assert_eq!(update.changes.hosts.into_iter().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(update.committed, start);
        assert!(Arc::ptr_eq(&update.snapshot, &updates.current()));
        publisher.publish(&state, change("c"), start);
        assert_eq!(updates.next().await.unwrap().changes, change("c"));
    }

    #[tokio::test]
    async fn the_last_update_comes_also_after_the_publisher_is_gone() {
        let state = State::default();
        let (mut publisher, mut updates) = Publisher::new(&state);
        publisher.publish(&state, change("a"), tokio::time::Instant::now().into_std());
        drop(publisher);
        assert!(updates.next().await.is_some());
        assert!(updates.next().await.is_none());
    }
}
