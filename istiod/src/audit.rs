//! Who changed what, from where: a trail that nobody can rewrite without it being seen.
//!
//! Every command that an operator caused carries its [`Origin`] in the log. When it is applied, every member appends
//! the same [`AuditEntry`]: the origin, and the digest of each thing that the command changed, before and after.
//! Entries are a chain: each holds the hash of the one before it, and its own hash is over that and all it says.
//! [`verify`] follows the chain. Retention drops the oldest entries and keeps the hash of the newest dropped one, the
//! [`Anchor`], so that what is left can be verified, and so can an older export: it must end where the anchor is.

mod chain;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ca::authn::Hash;
use registry::chunks::Chunks;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::chain::{Broken, verify};
use crate::raft::part::{Part, PartError};

/// How many entries are kept unless the operator says otherwise.
pub const DEFAULT_ENTRIES: u32 = 20_000;

/// For how long entries are kept unless the operator says otherwise, in milliseconds: 400 days.
pub const DEFAULT_AGE_MS: u64 = 400 * 24 * 3600 * 1000;

/// The most bytes of entries that are kept, in their canonical form; the newest entry is kept whatever its size.
pub const MAX_BYTES: usize = 32 << 20;

/// Key of what is not an entry.
const META_KEY: &[u8] = b"meta";
/// Beginning of an entry's key; sixteen digits follow, so that the order of keys is the order of revisions.
const ENTRY_KEY: &str = "entry/";

/// The operator behind a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Origin {
    /// The authenticated name.
    pub who: String,
    /// The address that the call came from.
    pub from: String,
    /// When it was asked for, in milliseconds since 1970, by the clock of the member that was asked.
    pub at_ms: i64,
    /// What was asked for, in the words of the API.
    pub action: String,
}

/// One thing that a command changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditObject {
    /// `Kind/namespace/name` of an object, or `Part/key` of anything else.
    pub what: String,
    /// SHA-256 of the stored value before; none when it did not exist.
    #[schemars(with = "Option<String>")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Hash>,
    /// SHA-256 of the stored value after; none when it does not exist any more.
    #[schemars(with = "Option<String>")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Hash>,
}

/// One command of an operator, as it was applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditEntry {
    /// The revision of the command.
    pub revision: u64,
    /// Who caused it.
    pub origin: Origin,
    /// What it changed, by name; empty when it was refused or everything was so already.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub objects: Vec<AuditObject>,
    /// The hash of the entry before.
    #[schemars(with = "String")]
    pub previous: Hash,
    /// The hash of this entry: over the one before and all of the above.
    #[schemars(with = "String")]
    pub hash: Hash,
}

/// Where a chain begins: what was before its first entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Anchor {
    /// How many entries were dropped before it.
    pub dropped: u64,
    /// The revision of the newest dropped one; 0 when nothing was dropped.
    pub revision: u64,
    /// The hash of the newest dropped one; [`Anchor::default`]'s when nothing was dropped.
    #[schemars(with = "String")]
    pub hash: Hash,
}

impl Default for Anchor {
    fn default() -> Self {
        Self { dropped: 0, revision: 0, hash: Hash::of(chain::FORM) }
    }
}

/// How much of the trail is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Retention {
    /// Number of entries.
    pub entries: u32,
    /// Milliseconds between an entry and the newest one; 0 keeps them whatever their age.
    pub age_ms: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { entries: DEFAULT_ENTRIES, age_ms: DEFAULT_AGE_MS }
    }
}

/// A change of the trail's own settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditCommand {
    /// From now on so much is kept.
    SetRetention(Retention),
}

/// What became of an [`AuditCommand`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditOutcome {
    /// False when it was so already.
    pub changed: bool,
}

/// The trail.
#[derive(Debug, Clone, Default)]
pub struct AuditState {
    retention: Retention,
    anchor: Anchor,
    /// By revision, each with the bytes of its canonical form.
    entries: Chunks<u64, (Arc<AuditEntry>, usize)>,
    bytes: usize,
    /// The newest time of all entries there ever were, in milliseconds since 1970: ages are measured from it.
    newest_ms: i64,
    /// Keys that changed and are not written.
    unwritten: BTreeSet<Vec<u8>>,
}

/// What is stored beside the entries.
#[derive(Serialize, Deserialize)]
struct Meta {
    retention: Retention,
    anchor: Anchor,
    newest_ms: i64,
}

impl AuditState {
    /// The entries that are kept, oldest first.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = &Arc<AuditEntry>> {
        self.entries.iter().map(|(_, (entry, _))| entry)
    }

    /// Where the kept entries begin.
    #[must_use]
    pub fn anchor(&self) -> Anchor {
        self.anchor
    }

    /// The hash of the newest entry, or the anchor's.
    #[must_use]
    pub fn head(&self) -> Hash {
        self.entries.last().map_or(self.anchor.hash, |(_, (entry, _))| entry.hash)
    }

    /// How much is kept.
    #[must_use]
    pub fn retention(&self) -> Retention {
        self.retention
    }

    /// Appends what the command at `revision` did, in the name of `origin`.
    pub fn append(&mut self, revision: u64, origin: Origin, objects: Vec<AuditObject>) {
        let previous = self.head();
        let (hash, bytes) = chain::hash(previous, revision, &origin, &objects);
        self.newest_ms = self.newest_ms.max(origin.at_ms);
        let entry = AuditEntry { revision, origin, objects, previous, hash };
        self.unwritten.extend([entry_key(revision), META_KEY.to_vec()]);
        self.push(entry, bytes);
        self.trim();
    }

    fn push(&mut self, entry: AuditEntry, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.entries.insert(entry.revision, (Arc::new(entry), bytes));
    }

    fn trim(&mut self) {
        let keep = usize::try_from(self.retention.entries).unwrap_or(usize::MAX).max(1);
        let oldest = match i64::try_from(self.retention.age_ms) {
            Ok(0) | Err(_) => i64::MIN,
            Ok(age) => self.newest_ms.saturating_sub(age),
        };
        while let Some((entry, bytes)) =
            self.entries.first().map(|(_, (entry, bytes))| (entry.clone(), *bytes))
        {
            let surplus = self.entries.len() > keep || self.bytes > MAX_BYTES;
            if self.entries.len() == 1 || !(surplus || entry.origin.at_ms < oldest) {
                break;
            }
            self.entries.pop_first();
            self.bytes = self.bytes.saturating_sub(bytes);
            let dropped = self.anchor.dropped.saturating_add(1);
            self.anchor = Anchor { dropped, revision: entry.revision, hash: entry.hash };
            self.unwritten.extend([entry_key(entry.revision), META_KEY.to_vec()]);
        }
    }

    fn meta(&self) -> Vec<u8> {
        to_json(&Meta { retention: self.retention, anchor: self.anchor, newest_ms: self.newest_ms })
    }

    fn is_new(&self) -> bool {
        self.entries.is_empty() && self.anchor == Anchor::default() && self.retention == Retention::default()
    }
}

impl Part for AuditState {
    type Command = AuditCommand;
    type Outcome = AuditOutcome;

    fn apply(&mut self, _index: u64, command: AuditCommand) -> AuditOutcome {
        let AuditCommand::SetRetention(retention) = command;
        if self.retention == retention {
            return AuditOutcome { changed: false };
        }
        self.retention = retention;
        self.unwritten.insert(META_KEY.to_vec());
        self.trim();
        AuditOutcome { changed: true }
    }

    fn take_changed(&mut self) -> BTreeSet<Vec<u8>> {
        std::mem::take(&mut self.unwritten)
    }

    fn value(&self, key: &[u8]) -> Option<Vec<u8>> {
        if key == META_KEY {
            return (!self.is_new()).then(|| self.meta());
        }
        let revision = std::str::from_utf8(key.strip_prefix(ENTRY_KEY.as_bytes())?).ok()?;
        let (entry, _) = self.entries.get(&u64::from_str_radix(revision, 16).ok()?)?;
        Some(to_json(&**entry))
    }

    fn pairs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        if self.is_new() {
            return BTreeMap::new();
        }
        let entries = self.entries().map(|entry| (entry_key(entry.revision), to_json(&**entry)));
        entries.chain([(META_KEY.to_vec(), self.meta())]).collect()
    }

    fn from_pairs<'a>(pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, PartError> {
        let mut state = Self::default();
        let mut entries = BTreeMap::new();
        for (key, value) in pairs {
            let failed = |error: serde_json::Error| PartError::new(key, error);
            if key == META_KEY {
                let meta: Meta = serde_json::from_slice(value).map_err(failed)?;
                (state.retention, state.anchor) = (meta.retention, meta.anchor);
                state.newest_ms = meta.newest_ms;
            } else if key.starts_with(ENTRY_KEY.as_bytes()) {
                let entry: AuditEntry = serde_json::from_slice(value).map_err(failed)?;
                entries.insert(entry.revision, entry);
            } else {
                return Err(PartError::new(key, "unknown key"));
            }
        }
        for entry in entries.into_values() {
            let (_, bytes) = chain::hash(entry.previous, entry.revision, &entry.origin, &entry.objects);
            state.push(entry, bytes);
        }
        Ok(state)
    }
}

fn entry_key(revision: u64) -> Vec<u8> {
    format!("{ENTRY_KEY}{revision:016x}").into_bytes()
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    // Texts, numbers and lists of them always have a JSON form.
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(at_ms: i64) -> Origin {
        let text = |text: &str| text.to_owned();
        Origin { who: text("admin"), from: text("127.0.0.1:5"), at_ms, action: text("apply") }
    }

    fn object(name: &str) -> AuditObject {
        AuditObject { what: format!("Gateway/default/{name}"), before: None, after: Some(Hash::of(b"x")) }
    }

    fn state_of(entries: u64) -> AuditState {
        let mut state = AuditState::default();
        for number in 1..=entries {
            state.append(number * 3, origin(number.cast_signed() * 1000), vec![object("a")]);
        }
        state
    }

    fn verified(state: &AuditState) -> Result<Hash, Broken> {
        verify(&state.anchor(), state.entries().map(AsRef::as_ref))
    }

    #[test]
    fn a_chain_verifies_and_every_change_breaks_it() {
        let state = state_of(5);
        assert_eq!(verified(&state), Ok(state.head()));
        type Change = fn(&mut Vec<AuditEntry>);
        let changes: [(&str, Change); 8] = [
            ("who", |e| e[2].origin.who = "eve".to_owned()),
            ("from", |e| e[2].origin.from.clear()),
            ("when", |e| e[2].origin.at_ms += 1),
            ("action", |e| e[2].origin.action.push(' ')),
            ("object", |e| e[2].objects[0].before = Some(Hash::of(b"y"))),
            ("left out", |e| drop(e.remove(2))),
            ("order", |e| e.swap(2, 3)),
            ("revision", |e| e[2].revision += 1),
        ];
        for (what, change) in changes {
            let mut entries: Vec<_> = state.entries().map(|entry| AuditEntry::clone(entry)).collect();
            change(&mut entries);
            let broken = verify(&state.anchor(), &entries).expect_err(what);
            assert!((9..=12).contains(&broken.revision()), "{what}: {broken}");
        }
    }

    #[test]
    fn what_is_dropped_leaves_its_hash_so_that_the_rest_verifies() {
        let mut state = state_of(10);
        let whole = verified(&state).unwrap();
        let outcome =
            Part::apply(&mut state, 99, AuditCommand::SetRetention(Retention { entries: 4, age_ms: 0 }));
        assert!(outcome.changed);
        assert_eq!((state.entries().count(), state.anchor().dropped, state.anchor().revision), (4, 6, 18));
        assert_eq!(verified(&state), Ok(whole));
        // By age, measured by the entries' own times.
        Part::apply(&mut state, 100, AuditCommand::SetRetention(Retention { entries: 100, age_ms: 1500 }));
        assert_eq!(state.entries().map(|e| e.origin.at_ms).collect::<Vec<_>>(), [9000, 10_000]);
        state.append(200, origin(20_000), Vec::new());
        assert_eq!(state.entries().count(), 1);
        assert_eq!(verified(&state), Ok(state.head()));
        // A clock that goes back makes nothing young again, and the newest entry always stays.
        state.append(201, origin(5), Vec::new());
        assert_eq!(state.entries().map(|e| e.revision).collect::<Vec<_>>(), [200, 201]);
    }

    #[test]
    fn stored_pairs_make_the_same_trail_however_they_were_written() {
        let mut state = state_of(3);
        let mut stored: BTreeMap<_, _> = BTreeMap::new();
        let mut store = |state: &mut AuditState| {
            for key in state.take_changed() {
                match state.value(&key) {
                    Some(value) => drop(stored.insert(key, value)),
                    None => drop(stored.remove(&key)),
                }
            }
            assert_eq!(stored, state.pairs());
            stored.clone()
        };
        store(&mut state);
        Part::apply(&mut state, 9, AuditCommand::SetRetention(Retention { entries: 2, age_ms: 0 }));
        state.append(12, origin(9), vec![object("b")]);
        let pairs = store(&mut state);
        let mut again = AuditState::from_pairs(pairs.iter().map(|(k, v)| (&**k, &**v))).unwrap();
        assert_eq!((again.pairs(), again.head(), again.bytes), (state.pairs(), state.head(), state.bytes));
        again.append(13, origin(10), Vec::new());
        state.append(13, origin(10), Vec::new());
        assert_eq!(again.pairs(), state.pairs());
        assert!(AuditState::default().pairs().is_empty());
        assert!(AuditState::from_pairs([(&b"x"[..], &b""[..])].into_iter()).is_err());
    }
}
