//! The store of applied state of one member, drawing on the member's power.

use std::io;
use std::path::PathBuf;

use istiod::raft::store::memory::MemoryStore;
use istiod::raft::store::{KvStore, Pairs, StoreError, Write};
use istiod::raft::wire::AppliedMark;

use crate::journal::Journal;
use crate::mistake::Mistake;
use crate::power::Power;

/// istiod's memory store, which keeps what was synced; it notes who the members are as of which index.
pub(crate) struct SimStore {
    pub(crate) inner: MemoryStore,
    pub(crate) power: Power,
    pub(crate) journal: Journal,
    pub(crate) mistake: Option<Mistake>,
}

fn io(source: io::Error) -> StoreError {
    StoreError::Io { action: "write", path: PathBuf::from("db"), source }
}

impl KvStore for SimStore {
    fn mark(&self) -> Result<Option<AppliedMark>, StoreError> {
        self.inner.mark()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.get(key)
    }

    fn range(&self, prefix: &[u8]) -> Result<Pairs, StoreError> {
        if prefix == b"s/" && self.mistake == Some(Mistake::ForgetSessions) {
            return Ok(Pairs::new());
        }
        self.inner.range(prefix)
    }

    fn batch(&mut self, writes: &[Write], mark: &AppliedMark) -> Result<(), StoreError> {
        self.power.draw().map_err(io)?;
        if let Some(members) = &mark.conf_state {
            self.journal.members(mark.index, members);
        }
        let mut mark = mark.clone();
        if self.mistake == Some(Mistake::IgnoreJointQuorum)
            && let Some(members) = &mut mark.conf_state
        {
            members.voters_outgoing.clear();
            members.auto_leave = false;
        }
        self.inner.batch(writes, &mark)
    }

    fn clear(&mut self) -> Result<(), StoreError> {
        self.power.draw().map_err(io)?;
        if self.mistake == Some(Mistake::MixSnapshotWithStore) {
            return Ok(());
        }
        self.inner.clear()
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.power.draw().map_err(io)?;
        self.inner.sync()
    }
}
