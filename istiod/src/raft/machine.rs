//! What the log drives: a state machine, seen from the driver.

use std::time::Instant;

use super::store::{Pairs, Write};

/// A replicated state. The same commands at the same indexes give the same state on every member.
pub trait StateMachine: Send + 'static {
    /// What the proposer of a command is told.
    type Answer: Send + 'static;

    /// Applies one command. `index` is the entry's, and the revision of what it makes.
    ///
    /// # Errors
    ///
    /// [`Halt`] if this program does not know the command, because a newer one wrote it: the member stops before it
    /// differs from the others. Nothing else may fail.
    fn apply(&mut self, index: u64, command: &[u8]) -> Result<Self::Answer, Halt>;

    /// The pairs that changed since the last call, for the store.
    fn take_writes(&mut self) -> Writes;

    /// All pairs, for a store that is built anew; they count as written.
    fn all_writes(&mut self) -> Writes;

    /// Shows the state to readers. Called after a run of commands, before their proposers are answered, and once at
    /// start; `index` is the last applied, `now` when the step began in which it was.
    fn publish(&mut self, index: u64, now: Instant);

    /// The state as it is now, to be encoded elsewhere while commands go on.
    fn freeze(&self) -> Frozen;

    /// Takes the state from an encoded snapshot.
    ///
    /// # Errors
    ///
    /// [`Halt`] if the bytes are not a state that this program knows.
    fn restore(&mut self, index: u64, snapshot: &[u8]) -> Result<(), Halt>;

    /// Takes the state from stored pairs.
    ///
    /// # Errors
    ///
    /// [`Halt`] if the pairs are not a state that this program knows.
    fn load(&mut self, index: u64, pairs: Pairs) -> Result<(), Halt>;
}

/// Pairs as they were when they were asked for, to be encoded on another thread.
pub type Writes = Box<dyn FnOnce() -> Vec<Write> + Send>;

/// A state that can be encoded on another thread.
pub type Frozen = Box<dyn FnOnce() -> Result<Vec<u8>, Halt> + Send>;

/// This member cannot go on without differing from the others.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("entry {index} cannot be applied: {reason}")]
pub struct Halt {
    /// The entry, or the snapshot's index.
    pub index: u64,
    /// What is wrong with it, and what to do.
    pub reason: String,
}
