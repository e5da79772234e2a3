//! A part of the state in its place: shared with readers, with what must be written of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::raft::machine::Writes;
use crate::raft::part::Part;
use crate::raft::store::Write;

/// A part of the state.
#[derive(Debug)]
pub(super) struct Slot<P> {
    /// What its keys in the store begin with.
    prefix: &'static [u8],
    /// Copied on the next change only while somebody still holds it.
    part: Arc<P>,
    /// Keys to be written.
    changed: BTreeSet<Vec<u8>>,
}

impl<P: Part> Slot<P> {
    pub(super) fn new(prefix: &'static [u8], part: Arc<P>) -> Self {
        Self { prefix, part, changed: BTreeSet::new() }
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
        self.changed.extend(part.take_changed());
        result
    }

    /// What changed since the last call.
    pub(super) fn take_writes(&mut self) -> Writes {
        let (prefix, part, changed) = (self.prefix, self.part.clone(), std::mem::take(&mut self.changed));
        Box::new(move || {
            let write = |key: Vec<u8>| Write { value: part.value(&key), key: [prefix, &key].concat() };
            changed.into_iter().map(write).collect()
        })
    }

    /// Everything; it counts as written.
    pub(super) fn all_writes(&mut self) -> Writes {
        self.changed.clear();
        let (prefix, part) = (self.prefix, self.part.clone());
        Box::new(move || {
            let pairs = part.pairs().into_iter();
            pairs.map(|(key, value)| Write { key: [prefix, &key].concat(), value: Some(value) }).collect()
        })
    }
}
