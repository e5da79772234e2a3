//! A store in memory, for tests and simulation.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::{KvStore, Pairs, StoreError, Write};
use crate::raft::wire::AppliedMark;

#[derive(Debug, Clone, Default)]
struct Content {
    pairs: BTreeMap<Vec<u8>, Vec<u8>>,
    mark: Option<AppliedMark>,
}

#[derive(Debug, Default)]
struct Inner {
    now: Content,
    synced: Content,
}

/// Pairs in memory. Clones share them, so that a member can be started again on what the last one left.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    inner: Arc<Mutex<Inner>>,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets what was not synced.
    pub fn power_cut(&self) {
        self.with(|inner| inner.now = inner.synced.clone());
    }

    fn with<R>(&self, action: impl FnOnce(&mut Inner) -> R) -> R {
        action(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl KvStore for MemoryStore {
    fn mark(&self) -> Result<Option<AppliedMark>, StoreError> {
        Ok(self.with(|inner| inner.now.mark.clone()))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.with(|inner| inner.now.pairs.get(key).cloned()))
    }

    fn range(&self, prefix: &[u8]) -> Result<Pairs, StoreError> {
        Ok(self.with(|inner| {
            let from = inner.now.pairs.range(prefix.to_vec()..);
            from.take_while(|(key, _)| key.starts_with(prefix)).map(|(k, v)| (k.clone(), v.clone())).collect()
        }))
    }

    fn batch(&mut self, writes: &[Write], mark: &AppliedMark) -> Result<(), StoreError> {
        self.with(|inner| {
            for write in writes {
                match &write.value {
                    Some(value) => inner.now.pairs.insert(write.key.clone(), value.clone()),
                    None => inner.now.pairs.remove(&write.key),
                };
            }
            inner.now.mark = Some(mark.clone());
        });
        Ok(())
    }

    fn clear(&mut self) -> Result<(), StoreError> {
        self.with(|inner| inner.now = Content::default());
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.with(|inner| inner.synced = inner.now.clone());
        Ok(())
    }
}
