//! A part of the state in its place: shared with readers, with what must be written of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::raft::part::Part;
use crate::raft::store::Write;

/// A part of the state.
#[derive(Debug)]
pub(super) struct Slot<P> {
    /// What its keys in the store begin with.
    prefix: &'static [u8],
    /// Copied on the next change only while somebody still holds it.
    part: Arc<P>,
    writes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl<P: Part> Slot<P> {
    pub(super) fn new(prefix: &'static [u8], part: Arc<P>) -> Self {
        Self { prefix, part, writes: BTreeMap::new() }
    }

    pub(super) fn get(&self) -> Arc<P> {
        self.part.clone()
    }

    pub(super) fn apply(&mut self, index: u64, command: P::Command) -> P::Outcome {
        self.change(|part| part.apply(index, command))
    }

    pub(super) fn change<T>(&mut self, change: impl FnOnce(&mut P) -> T) -> T {
        let part = Arc::make_mut(&mut self.part);
        let result = change(part);
        self.writes.extend(part.take_writes());
        result
    }

    /// What changed since the last call.
    pub(super) fn take_writes(&mut self) -> impl Iterator<Item = Write> + use<P> {
        let prefix = self.prefix;
        let writes = std::mem::take(&mut self.writes).into_iter();
        writes.map(move |(key, value)| Write { key: [prefix, &key].concat(), value })
    }

    /// Everything; it counts as written.
    pub(super) fn all_writes(&mut self) -> impl Iterator<Item = Write> + use<P> {
        self.writes.clear();
        let prefix = self.prefix;
        let pairs = self.part.pairs().into_iter();
        pairs.map(move |(key, value)| Write { key: [prefix, &key].concat(), value: Some(value) })
    }
}
