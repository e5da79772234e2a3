//! The durable log: entries and hard state, behind one trait.
//!
//! [`wal::Wal`] is ours: segments of checksummed frames, one frame and one fdatasync per batch, about a quarter of
//! the cost of an embedded store's commit. TiKV's `raft-engine` was weighed against it on paper: it brings some
//! eighty crates (an unmaintained `prometheus` 0.13 and a second `protobuf` among them) and compresses and indexes
//! many Raft groups, where one group needs neither.
//!
//! What a log promises: after [`Log::sync`] returns, everything given to it before is there after a power cut. An
//! error of `sync` is final: the member stops, because nobody knows what the disk holds. At start a frame that was
//! being written when the power went is cut off with a log line; damage to anything that was once durable is a
//! typed error with file and offset, never a shorter log.

mod segment;
pub mod wal;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use raft::eraftpb::{Entry, HardState};

/// A log of entries, contiguous from [`Log::first_index`] to [`Log::last_index`], and the hard state.
pub trait Log: Send {
    /// Term, vote and commit index, as last set.
    fn hard_state(&self) -> &HardState;

    /// The point after which the log begins: its index and term.
    fn start(&self) -> (u64, u64);

    /// The index of the first entry, present or to come.
    fn first_index(&self) -> u64 {
        self.start().0 + 1
    }

    /// The index of the last entry, or of the start if there is none.
    fn last_index(&self) -> u64;

    /// The term of the entry at `index`, or of the start; nothing outside.
    fn term(&self, index: u64) -> Option<u64>;

    /// The entries from `low` up to but not including `high`, cut after `max_bytes`, but at least one.
    ///
    /// # Errors
    ///
    /// [`LogError::Compacted`] or [`LogError::Unavailable`] if one of them is not here.
    fn entries(&self, low: u64, high: u64, max_bytes: Option<u64>) -> Result<Vec<Entry>, LogError>;

    /// Adds entries; they replace what the log has from the first one's index on. Durable after [`Log::sync`].
    ///
    /// # Errors
    ///
    /// [`LogError::Unavailable`] if the entries would leave a gap, [`LogError::Compacted`] if they begin before the
    /// log does.
    fn append(&mut self, entries: Vec<Entry>) -> Result<(), LogError>;

    /// Replaces the hard state. Durable after [`Log::sync`].
    fn set_hard_state(&mut self, state: HardState);

    /// Makes everything given before durable: one write and one fdatasync, or nothing if there is nothing new.
    ///
    /// # Errors
    ///
    /// The disk's. Final: the member must stop.
    fn sync(&mut self) -> Result<(), LogError>;

    /// Forgets the entries up to and including `index`, durably; their files are removed.
    ///
    /// # Errors
    ///
    /// The disk's, final; [`LogError::Unavailable`] if `index` is past the end.
    fn compact(&mut self, index: u64) -> Result<(), LogError>;

    /// Forgets all entries; the log then begins after `index`, whose term is `term`. Durable on return.
    ///
    /// # Errors
    ///
    /// The disk's, final.
    fn reset(&mut self, index: u64, term: u64) -> Result<(), LogError>;

    /// Bytes of the entries held.
    fn bytes(&self) -> u64;

    /// The longest that the disk took to make something durable since this was asked last; nothing if it did not have
    /// to.
    fn take_sync_time(&mut self) -> Option<Duration>;

    /// Bytes that are free on the log's disk; nothing if that is not known.
    fn free(&self) -> Option<u64>;
}

/// What can be wrong with a log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something that was once durable is damaged. The log is left as it is.
    #[error(
        "{} is damaged at byte {offset}: {what}; this member's log cannot be trusted: keep the folder for study, \
         remove this member and let it join again under a new id",
        path.display()
    )]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What was found.
        what: &'static str,
    },
    /// A file of another member or of an earlier life of this one.
    #[error("{} belongs to another store: it carries {found:016x}, this member is {expected:016x}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The incarnation of this member.
        expected: u64,
        /// The incarnation in the file.
        found: u64,
    },
    /// Written by a newer program.
    #[error("{} has format {found}, this program reads up to {}", path.display(), segment::VERSION)]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The entry has been compacted away.
    #[error("entry {0} is before the start of the log")]
    Compacted(u64),
    /// The entry is past the end of the log.
    #[error("entry {0} is past the end of the log")]
    Unavailable(u64),
}
