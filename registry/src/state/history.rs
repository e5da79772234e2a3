//! The last changes of the configuration, for `istioctl history`, `diff` and `rollback`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::command::Revision;
use crate::chunks::Chunks;
use crate::config::Object;

/// How many entries are kept unless the operator says otherwise.
pub const DEFAULT_LIMIT: u32 = 1000;

/// The most bytes of values, as JSON, that are kept; the newest entry is kept whatever its size.
pub const MAX_BYTES: usize = 64 << 20;

/// What a change of the settings set by command is about.
pub(super) const MESH: &str = "MeshConfig";

/// One log entry that changed configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its revision.
    pub revision: Revision,
    /// When it was proposed, in milliseconds since 1970.
    pub time_ms: i64,
    /// Who asked for it.
    pub author: String,
    /// What it changed, in the order of the commands.
    pub changes: Vec<Change>,
}

/// One object before and after.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// `Kind/namespace/name`, or `MeshConfig`.
    pub what: String,
    /// What was before; none when it was created.
    pub before: Option<Value>,
    /// What is after; none when it was deleted.
    pub after: Option<Value>,
}

/// A value that history shares with the state.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An object.
    Object(Arc<Object>),
    /// Mesh-wide settings as they were written, or an object that this program cannot read.
    Json(Arc<serde_json::Value>),
}

impl Value {
    /// Bytes as JSON.
    fn weight(&self) -> usize {
        match self {
            Self::Object(object) => object.written().bytes,
            // Texts and numbers always have a JSON form.
            Self::Json(json) => serde_json::to_vec(json).unwrap_or_default().len(),
        }
    }
}

/// An object in its Kubernetes form.
impl Serialize for Value {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Object(object) => object.serialize(to),
            Self::Json(json) => json.serialize(to),
        }
    }
}

impl Entry {
    /// Bytes of its values as JSON: the same on every member.
    fn weight(&self) -> usize {
        let values = self.changes.iter().flat_map(|change| [&change.before, &change.after]);
        values.flatten().map(Value::weight).sum()
    }

    /// One line: what was created (`+`), changed (`~`) and deleted (`-`).
    #[must_use]
    pub fn summary(&self) -> String {
        let words = self.changes.iter().map(|change| {
            let sign = match (&change.before, &change.after) {
                (None, _) => '+',
                (Some(_), Some(_)) => '~',
                (Some(_), None) => '-',
            };
            format!("{sign}{}", change.what)
        });
        words.collect::<Vec<_>>().join(" ")
    }
}

/// How much of history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Retention {
    /// Number of entries.
    pub(super) entries: u32,
    /// Milliseconds between an entry and the newest one; 0 keeps them whatever their age.
    pub(super) age_ms: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { entries: DEFAULT_LIMIT, age_ms: 0 }
    }
}

/// The remembered entries, oldest first, bounded in number, in age and in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    retention: Retention,
    /// The newest revision that was forgotten; 0 when none was.
    forgotten: Revision,
    /// Each with its bytes; and the bytes of all.
    entries: Chunks<Revision, (Arc<Entry>, usize)>,
    bytes: usize,
}

impl History {
    /// How many entries are kept.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.retention.entries
    }

    /// How much older than the newest an entry may be, in milliseconds; 0: as old as it likes.
    #[must_use]
    pub fn age_ms(&self) -> u64 {
        self.retention.age_ms
    }

    /// The newest revision that was forgotten; 0 when none was. The configuration at this revision is still known,
    /// for everything after it is remembered.
    #[must_use]
    pub fn forgotten(&self) -> Revision {
        self.forgotten
    }

    /// The entries, oldest first.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = &Arc<Entry>> {
        self.entries.iter().map(|(_, (entry, _))| entry)
    }

    /// The entry of `revision`, if it is remembered.
    #[must_use]
    pub fn entry(&self, revision: Revision) -> Option<&Arc<Entry>> {
        self.entries.get(&revision).map(|(entry, _)| entry)
    }

    /// The history with these entries.
    pub(super) fn restore(
        retention: Retention,
        forgotten: Revision,
        entries: BTreeMap<Revision, Entry>,
    ) -> Self {
        let mut history = Self { retention, forgotten, ..Self::default() };
        entries.into_values().for_each(|entry| history.add(entry));
        history
    }

    /// Remembers `entry`; returns the revisions that are forgotten for it.
    pub(super) fn push(&mut self, entry: Entry) -> Vec<Revision> {
        self.add(entry);
        self.trim()
    }

    fn add(&mut self, entry: Entry) {
        let weight = entry.weight();
        self.bytes = self.bytes.saturating_add(weight);
        self.entries.insert(entry.revision, (Arc::new(entry), weight));
    }

    /// Sets the bounds; returns the revisions that are forgotten.
    pub(super) fn set_retention(&mut self, entries: u32, age_ms: u64) -> Vec<Revision> {
        self.retention = Retention { entries, age_ms };
        self.trim()
    }

    /// The age is between the times that entries carry, so that every member forgets the same.
    fn trim(&mut self) -> Vec<Revision> {
        let keep = usize::try_from(self.retention.entries).unwrap_or(usize::MAX);
        let mut forgotten = Vec::new();
        while self.entries.len() > keep
            || self.bytes > MAX_BYTES && self.entries.len() > 1
            || self.oldest_is_too_old()
        {
            let Some((entry, weight)) = self.entries.pop_first() else { break };
            self.bytes = self.bytes.saturating_sub(weight);
            self.forgotten = entry.revision;
            forgotten.push(entry.revision);
        }
        forgotten
    }

    fn oldest_is_too_old(&self) -> bool {
        let mut entries = self.entries();
        let Some(oldest) = entries.next() else { return false };
        let newest = entries.next_back().unwrap_or(oldest);
        let age = u64::try_from(newest.time_ms.saturating_sub(oldest.time_ms)).unwrap_or(0);
        self.retention.age_ms != 0 && age > self.retention.age_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_is_bounded_in_bytes_and_keeps_the_newest() {
        let mut history = History::default();
        let mut push = |revision: u64, bytes: usize| {
            let after = Some(Value::Json(Arc::new("x".repeat(bytes).into())));
            let changes = vec![Change { what: "a".to_owned(), before: None, after }];
            history.push(Entry { revision: Revision(revision), time_ms: 0, author: String::new(), changes })
        };
        assert_eq!(push(1, MAX_BYTES / 2), []);
        assert_eq!(push(2, MAX_BYTES / 4), []);
        assert_eq!(push(3, MAX_BYTES / 2), [Revision(1)]);
        assert_eq!(push(4, MAX_BYTES * 2), [Revision(2), Revision(3)]);
        assert_eq!(history.entries().count(), 1);
        assert_eq!(history.set_retention(0, 0), [Revision(4)]);
        assert_eq!((history.bytes, history.entries.len(), history.forgotten()), (0, 0, Revision(4)));
    }

    #[test]
    fn history_is_bounded_in_age_by_the_times_that_entries_carry() {
        let mut history = History::default();
        let mut push = |revision: u64, time_ms: i64| {
            let entry =
                Entry { revision: Revision(revision), time_ms, author: String::new(), changes: Vec::new() };
            history.push(entry)
        };
        assert_eq!((push(1, 1000), push(2, 2000), push(3, 9000)), (vec![], vec![], vec![]));
        assert_eq!(history.set_retention(10, 7000), [Revision(1)]);
        assert_eq!(history.forgotten(), Revision(1));
    }
}
