//! When the store of applied state is brought up to date, and who has it meanwhile.
//!
//! That is with every snapshot, and when nothing has been applied for a while. In between the log has what the store
//! lacks: a member that stops without storing it applies it again. What changed often is written once, which makes a
//! store that follows late far cheaper than one that follows at once.

use crate::raft::store::KvStore;

/// It is quiet when nothing has been applied for so many ticks.
const QUIET: u32 = 3;

/// The store and what it lacks.
pub(super) struct Stored {
    /// Nothing while a [`StoreJob`](super::jobs::StoreJob) has it.
    store: Option<Box<dyn KvStore>>,
    /// The index up to which it has, or will soon have, what was applied; nothing when it must be built anew.
    index: Option<u64>,
    /// Ticks since something was applied.
    quiet: u32,
}

impl Stored {
    /// A store that has what was applied up to `index`, or that must be built anew.
    pub(super) fn new(store: Box<dyn KvStore>, index: Option<u64>) -> Self {
        Self { store: Some(store), index, quiet: 0 }
    }

    /// What the store has counts no more: the state was replaced.
    pub(super) fn replaced(&mut self) {
        self.index = None;
    }

    /// Something was applied.
    pub(super) fn applied(&mut self) {
        self.quiet = 0;
    }

    pub(super) fn tick(&mut self) {
        self.quiet = self.quiet.saturating_add(1);
    }

    /// A job gives the store back.
    pub(super) fn back(&mut self, store: Box<dyn KvStore>) {
        self.store = Some(store);
    }

    /// The store, if it is here.
    pub(super) fn here(&mut self) -> Option<&mut Box<dyn KvStore>> {
        self.store.as_mut()
    }

    /// The store, if it is here and it is time to bring it up to `applied`; and whether it is to be built anew.
    /// `snapshot`: one is taken now.
    pub(super) fn due(&mut self, applied: u64, snapshot: bool) -> Option<(Box<dyn KvStore>, bool)> {
        let due = snapshot || self.index.is_none() || self.quiet >= QUIET;
        if due { self.take(applied) } else { None }
    }

    /// The store, if it is here and lacks anything.
    pub(super) fn take(&mut self, applied: u64) -> Option<(Box<dyn KvStore>, bool)> {
        if self.index == Some(applied) {
            return None;
        }
        let store = self.store.take()?;
        Some((store, self.index.replace(applied).is_none()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::store::memory::MemoryStore;

    fn store() -> Box<dyn KvStore> {
        Box::new(MemoryStore::new())
    }

    #[test]
    fn the_store_follows_with_a_snapshot_or_when_it_is_quiet() {
        let mut stored = Stored::new(store(), Some(10));
        assert!(stored.due(10, true).is_none(), "it lacks nothing");
        assert!(stored.due(11, false).is_none());
        assert!(matches!(stored.due(11, true), Some((_, false))));
        assert!(stored.due(12, true).is_none(), "it is away");
        stored.back(store());
        stored.applied();
        for _ in 0..QUIET {
            assert!(stored.due(12, false).is_none());
            stored.tick();
        }
        assert!(matches!(stored.due(12, false), Some((_, false))));
        stored.back(store());
        stored.tick();
        assert!(stored.due(12, false).is_none(), "it lacks nothing");
    }

    #[test]
    fn a_store_whose_state_was_replaced_is_built_anew_once() {
        let mut stored = Stored::new(store(), None);
        assert!(matches!(stored.due(1, false), Some((_, true))));
        stored.replaced();
        assert!(stored.due(7, false).is_none(), "it is away");
        stored.back(store());
        assert!(matches!(stored.due(7, false), Some((_, true))));
        stored.back(store());
        assert!(stored.due(7, false).is_none() && stored.take(7).is_none());
        assert!(matches!(stored.take(8), Some((_, false))));
    }
}
