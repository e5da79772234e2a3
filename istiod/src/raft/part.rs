//! A part of the replicated state: a pure value with commands of its own.
//!
//! The registry and the certificate authority have crates of their own; what is istiod's alone (members, access,
//! audit) lives in modules of this shape, and [`state_machine`](super::state_machine) applies, stores and restores
//! them all in the same way.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::wire::{Pair, PartState};

/// A part of the replicated state. The same commands at the same indexes give the same part on every member.
pub trait Part: Clone + Default + Debug + Send + Sync + 'static {
    /// What the log holds for this part, as JSON. Variants are only ever added, fields are added with a default.
    type Command: Serialize + DeserializeOwned + Clone + Debug + PartialEq + Send + 'static;

    /// What became of a command.
    type Outcome: Clone + Debug + PartialEq + Eq + Send + 'static;

    /// Applies one command. Cannot fail, reads no clock and draws nothing: a command that does not apply is answered
    /// so and changes nothing. `index` is the entry's, and the revision of what it makes.
    fn apply(&mut self, index: u64, command: Self::Command) -> Self::Outcome;

    /// The keys whose pairs changed since the last call.
    fn take_changed(&mut self) -> BTreeSet<Vec<u8>>;

    /// The value under a key; nothing if there is no such pair.
    fn value(&self, key: &[u8]) -> Option<Vec<u8>>;

    /// All pairs: what [`Part::from_pairs`] makes an equal part from. Equal parts give equal bytes.
    fn pairs(&self) -> BTreeMap<Vec<u8>, Vec<u8>>;

    /// The part that these pairs make, with no changed pairs.
    ///
    /// # Errors
    ///
    /// [`PartError`] at the first pair that this program does not know.
    fn from_pairs<'a>(pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, PartError>;
}

/// Stored pairs that are not the part's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the stored pair `{key}` cannot be read: {reason}")]
pub struct PartError {
    /// The key, as far as it is text.
    pub key: String,
    /// What is wrong with it.
    pub reason: String,
}

impl PartError {
    /// The pair under `key` is wrong because of `reason`.
    #[must_use]
    pub fn new(key: &[u8], reason: impl ToString) -> Self {
        Self { key: String::from_utf8_lossy(key).into_owned(), reason: reason.to_string() }
    }
}

/// A part as a snapshot carries it; nothing when it is empty.
pub(super) fn to_wire(part: &impl Part) -> Option<PartState> {
    let pair = |(key, value): (Vec<u8>, Vec<u8>)| Pair { key: key.into(), value: value.into() };
    let pairs: Vec<_> = part.pairs().into_iter().map(pair).collect();
    (!pairs.is_empty()).then_some(PartState { pairs })
}

/// A part from a snapshot.
///
/// # Errors
///
/// [`PartError`].
pub(super) fn from_wire<P: Part>(stored: Option<PartState>) -> Result<P, PartError> {
    let pairs = stored.unwrap_or_default().pairs;
    P::from_pairs(pairs.iter().map(|pair| (pair.key.as_ref(), pair.value.as_ref())))
}
