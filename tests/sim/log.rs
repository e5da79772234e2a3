//! The log of one member as the rig sees it: istiod's own log inside, its entries in view outside.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use istiod::raft::log::{Log, LogError};
use istiod::raft::wire;
use prost::Message as _;
use raft::eraftpb::{Entry, EntryType, HardState};
use xxhash_rust::xxh3::xxh3_64;

use crate::journal::{Fact, Journal};
use crate::machine::SimMachine;
use crate::mistake::Mistake;

/// Term and hash of the entries that a log holds, and the point after which it begins.
#[derive(Default)]
struct Mirror {
    start: (u64, u64),
    entries: VecDeque<(u64, u64)>,
}

impl Mirror {
    fn of(log: &dyn Log) -> Self {
        let entries = log.entries(log.first_index(), log.last_index() + 1, None).unwrap_or_default();
        Self { start: log.start(), entries: entries.iter().map(|entry| (entry.term, hash(entry))).collect() }
    }

    fn place(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.start.0 + 1)?).ok()
    }

    fn cut_from(&mut self, index: u64) {
        self.entries.truncate(self.place(index).unwrap_or(0));
    }
}

/// What an entry says.
fn hash(entry: &Entry) -> u64 {
    xxh3_64(&entry.data) ^ xxh3_64(&entry.context).rotate_left(1)
}

/// A look into a member's log from outside.
#[derive(Clone)]
pub(crate) struct LogView {
    mirror: Arc<Mutex<Mirror>>,
    inner: Arc<Mutex<Box<dyn Log>>>,
    /// A sync that was promised and has not been made.
    due: Arc<Mutex<bool>>,
}

fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LogView {
    /// Term and hash of an entry, if the log holds it.
    pub(crate) fn entry(&self, index: u64) -> Option<(u64, u64)> {
        let mirror = locked(&self.mirror);
        mirror.entries.get(mirror.place(index)?).copied()
    }

    /// The point after which the log begins.
    pub(crate) fn start(&self) -> (u64, u64) {
        locked(&self.mirror).start
    }

    /// Makes a sync that was put off.
    pub(crate) fn sync_due(&self) -> Result<(), LogError> {
        if std::mem::take(&mut *locked(&self.due)) { locked(&self.inner).sync() } else { Ok(()) }
    }
}

/// A log that notes what is appended to it, and makes mistakes if it is asked to.
pub(crate) struct SimLog {
    view: LogView,
    hard_state: HardState,
    journal: Journal,
    machine: SimMachine,
    mistake: Option<Mistake>,
}

impl SimLog {
    /// Around a log that was just opened.
    pub(crate) fn new(
        mut inner: Box<dyn Log>,
        journal: Journal,
        machine: SimMachine,
        mistake: Option<Mistake>,
    ) -> Result<Self, LogError> {
        if mistake == Some(Mistake::TruncateCommitted) && inner.last_index() > inner.start().0 + 1 {
            // Writing the entry before the last once more forgets the last.
            let last = inner.last_index();
            let before = inner.entries(last - 1, last, None)?;
            inner.append(before)?;
            inner.sync()?;
        }
        let mirror = Arc::new(Mutex::new(Mirror::of(inner.as_ref())));
        let hard_state = inner.hard_state().clone();
        let view = LogView { mirror, inner: Arc::new(Mutex::new(inner)), due: Arc::default() };
        Ok(Self { view, hard_state, journal, machine, mistake })
    }

    /// A look into it from outside.
    pub(crate) fn view(&self) -> LogView {
        self.view.clone()
    }

    fn note(&self, entries: &[Entry]) {
        let mut mirror = locked(&self.view.mirror);
        if let Some(first) = entries.first() {
            mirror.cut_from(first.index);
        }
        for entry in entries {
            let before = match entry.index.checked_sub(1) {
                Some(index) if index == mirror.start.0 => Some(mirror.start.1),
                Some(_) => mirror.entries.back().map(|(term, _)| *term),
                None => None,
            };
            let hash = hash(entry);
            mirror.entries.push_back((entry.term, hash));
            self.journal.note(Fact::Appended { index: entry.index, term: entry.term, before, hash });
        }
    }

    /// The mistake of applying what may never be committed.
    fn apply_early(&mut self, entries: &[Entry]) {
        for entry in entries {
            if entry.get_entry_type() != EntryType::EntryNormal || entry.data.is_empty() {
                continue;
            }
            if let Ok(proposal) = wire::Proposal::decode(entry.data.clone()) {
                self.machine.apply_early(entry.index, &proposal.command);
            }
        }
    }
}

impl Log for SimLog {
    fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    fn start(&self) -> (u64, u64) {
        locked(&self.view.inner).start()
    }

    fn last_index(&self) -> u64 {
        locked(&self.view.inner).last_index()
    }

    fn term(&self, index: u64) -> Option<u64> {
        locked(&self.view.inner).term(index)
    }

    fn entries(&self, low: u64, high: u64, max_bytes: Option<u64>) -> Result<Vec<Entry>, LogError> {
        locked(&self.view.inner).entries(low, high, max_bytes)
    }

    fn append(&mut self, entries: Vec<Entry>) -> Result<(), LogError> {
        self.note(&entries);
        if self.mistake == Some(Mistake::ApplyBeforeCommit) {
            self.apply_early(&entries);
        }
        locked(&self.view.inner).append(entries)
    }

    fn set_hard_state(&mut self, state: HardState) {
        let mut stored = state.clone();
        if self.mistake == Some(Mistake::VoteTwice) {
            stored.vote = 0;
        }
        self.hard_state = state;
        locked(&self.view.inner).set_hard_state(stored);
    }

    fn sync(&mut self) -> Result<(), LogError> {
        if self.mistake == Some(Mistake::SendBeforePersist) {
            *locked(&self.view.due) = true;
            return Ok(());
        }
        locked(&self.view.inner).sync()
    }

    fn compact(&mut self, index: u64) -> Result<(), LogError> {
        let mut inner = locked(&self.view.inner);
        let index = match self.mistake {
            Some(Mistake::SnapshotOlderThanLog) => self.machine.applied().max(index),
            _ => index,
        };
        inner.compact(index)?;
        *locked(&self.view.mirror) = Mirror::of(inner.as_ref());
        Ok(())
    }

    fn reset(&mut self, index: u64, term: u64) -> Result<(), LogError> {
        let mut inner = locked(&self.view.inner);
        inner.reset(index, term)?;
        *locked(&self.view.mirror) = Mirror::of(inner.as_ref());
        Ok(())
    }

    fn take_sync_time(&mut self) -> Option<Duration> {
        locked(&self.view.inner).take_sync_time()
    }

    fn free(&self) -> Option<u64> {
        locked(&self.view.inner).free()
    }

    fn bytes(&self) -> u64 {
        locked(&self.view.inner).bytes()
    }
}
