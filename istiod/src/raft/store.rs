//! The applied state on disk: pairs of key and value, and the mark that says how far they have come.
//!
//! Nothing of Raft's safety hangs on it. What it loses is replayed from the log, because the log is compacted only
//! up to a snapshot file; what is doubtful about it is moved aside, and it is built anew from that snapshot.
//! [`sled::SledStore`] is the one that istiod uses.

pub mod memory;
pub mod sled;

use std::path::PathBuf;

use super::wire::AppliedMark;

/// One change of one pair: the new value, or nothing if the pair goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The key.
    pub key: Vec<u8>,
    /// The value that it has from now on.
    pub value: Option<Vec<u8>>,
}

/// Pairs in the order of their keys.
pub type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Pairs on disk.
pub trait KvStore: Send {
    /// How far the pairs have come; nothing if the store is new or was not completed.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    fn mark(&self) -> Result<Option<AppliedMark>, StoreError>;

    /// The value of one key.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// All pairs whose key begins with `prefix`, in order.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    fn range(&self, prefix: &[u8]) -> Result<Pairs, StoreError>;

    /// Changes pairs and mark in one atomic step. After a crash all or none of it is there.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; the member must stop.
    fn batch(&mut self, writes: &[Write], mark: &AppliedMark) -> Result<(), StoreError>;

    /// Removes the mark first, then everything, so that a crash in between leaves a store without a mark.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    fn clear(&mut self) -> Result<(), StoreError>;

    /// Makes all batches so far durable.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; the member must stop.
    fn sync(&mut self) -> Result<(), StoreError>;
}

/// Why a store cannot be used as it is.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// sled says no.
    #[error("the store of applied state failed")]
    Sled(#[from] ::sled::Error),
    /// sled panicked, as it does on some damage.
    #[error("the store of applied state panicked: {0}")]
    Panicked(String),
    /// What it holds is not what was written.
    #[error("the store of applied state is damaged: {0}")]
    Damaged(String),
    /// Written by a newer program.
    #[error("the store of applied state has values of format {0}, which this program does not know")]
    Version(u8),
}
