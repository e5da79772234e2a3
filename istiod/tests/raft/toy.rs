//! A state machine of texts, and members made of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use istiod::raft::disk::Disk;
use istiod::raft::machine::{Frozen, Halt, StateMachine, Writes};
use istiod::raft::node::files::{Beginning, OpenStore, open};
use istiod::raft::node::{Driver, Fatal, Settings};
use istiod::raft::store::{Pairs, Write};

/// `key=value` sets a key; the answer is the index at which it was set before.
#[derive(Default, Clone)]
pub(crate) struct Toy {
    pub(crate) map: BTreeMap<String, (u64, String)>,
    dirty: BTreeSet<String>,
    /// What readers were shown last.
    pub(crate) shown: Arc<Mutex<(u64, usize)>>,
}

impl StateMachine for Toy {
    type Answer = u64;

    fn apply(&mut self, index: u64, command: &[u8]) -> Result<u64, Halt> {
        let text = std::str::from_utf8(command).unwrap_or_default();
        let Some((key, value)) = text.split_once('=') else {
            return Err(Halt { index, reason: format!("{text:?} is from a newer program") });
        };
        self.dirty.insert(key.to_owned());
        let before = self.map.insert(key.to_owned(), (index, value.to_owned()));
        Ok(before.map_or(0, |(index, _)| index))
    }

    fn take_writes(&mut self) -> Writes {
        let dirty = std::mem::take(&mut self.dirty);
        let value =
            |key: &str| self.map.get(key).map(|(index, value)| format!("{index} {value}").into_bytes());
        let write = |key: String| Write { value: value(&key), key: key.into_bytes() };
        let writes = dirty.into_iter().map(write).collect();
        Box::new(move || writes)
    }

    fn all_writes(&mut self) -> Writes {
        self.dirty = self.map.keys().cloned().collect();
        self.take_writes()
    }

    fn publish(&mut self, index: u64, _now: Instant) {
        *self.shown.lock().expect("not poisoned") = (index, self.map.len());
    }

    fn freeze(&self) -> Frozen {
        let map = self.map.clone();
        Box::new(move || Ok(serde_json::to_vec(&map).expect("encodes")))
    }

    fn restore(&mut self, _index: u64, snapshot: &[u8]) -> Result<(), Halt> {
        self.map = serde_json::from_slice(snapshot).expect("decodes");
        Ok(())
    }

    fn load(&mut self, _index: u64, pairs: Pairs) -> Result<(), Halt> {
        self.map.clear();
        for (key, value) in pairs {
            let value = String::from_utf8(value).expect("is text");
            let (index, value) = value.split_once(' ').expect("has an index");
            let index = index.parse().expect("is a number");
            self.map.insert(String::from_utf8(key).expect("is text"), (index, value.to_owned()));
        }
        Ok(())
    }
}

#[expect(clippy::disallowed_methods, reason = "the clock of tests whose driver looks at no clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Settings with which everything happens often.
pub(crate) fn busy(id: u64, seed: u64) -> Settings {
    Settings {
        snapshot_entries: 40,
        keep_entries: 10,
        segment_bytes: 8 << 10,
        answer_within: std::time::Duration::from_secs(20),
        ..Settings::new(id, seed)
    }
}

/// Opens a member's folder and starts its driver.
pub(crate) fn start(
    disk: &Arc<dyn Disk>,
    open_store: OpenStore<'_>,
    dir: &Path,
    (settings, beginning): (Settings, Beginning<'_>),
    random: &mut fastrand::Rng,
) -> Result<Driver<Toy>, Fatal> {
    Driver::start(open(disk, open_store, dir, (settings, beginning), Toy::default(), random)?, now())
}
