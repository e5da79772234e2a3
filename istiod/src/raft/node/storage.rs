//! The log and the snapshots as the raft crate wants to see them.

use std::cell::Cell;

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use crate::raft::log::{Log, LogError};
use crate::raft::snapshots::Snapshots;
use crate::raft::wire::SnapshotMetadata;

/// What the raft crate reads from.
pub(super) struct LogStorage {
    pub(super) log: Box<dyn Log>,
    pub(super) snapshots: Snapshots,
    /// The members as of the applied index.
    pub(super) conf_state: ConfState,
    /// Whether a snapshot for a peer is read here, or by the transport.
    pub(super) inline: bool,
    /// A peer needs a newer snapshot than there is.
    pub(super) wanted: Cell<bool>,
}

impl Storage for LogStorage {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.log.hard_state().clone(), conf_state: self.conf_state.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        self.log.entries(low, high, max_size.into()).map_err(|error| match error {
            LogError::Compacted(_) => StorageError::Compacted.into(),
            LogError::Unavailable(_) => StorageError::Unavailable.into(),
            other @ (LogError::Io { .. }
            | LogError::Corrupt { .. }
            | LogError::Foreign { .. }
            | LogError::Version { .. }) => StorageError::Other(Box::new(other)).into(),
        })
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.log.term(index).ok_or_else(|| {
            if index < self.log.start().0 { StorageError::Compacted } else { StorageError::Unavailable }
                .into()
        })
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.log.first_index())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.log.last_index())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let least = request_index.max(self.log.start().0);
        let found = if self.inline {
            self.snapshots.load(least)
        } else {
            self.snapshots.point_at(least).map(|metadata| (metadata, Bytes::new()))
        };
        match found {
            Ok((metadata, _)) if !knows(&metadata, to) => {
                // The peer became a member later; it refuses a snapshot in which it is none.
                self.wanted.set(true);
                Err(StorageError::SnapshotTemporarilyUnavailable.into())
            }
            Ok((metadata, data)) => {
                let mut snapshot = Snapshot { data, ..Snapshot::default() };
                snapshot.set_metadata(metadata.into());
                Ok(snapshot)
            }
            Err(error) => {
                tracing::debug!(%error, "a snapshot is needed for a peer");
                self.wanted.set(true);
                Err(StorageError::SnapshotTemporarilyUnavailable.into())
            }
        }
    }
}

fn knows(metadata: &SnapshotMetadata, member: u64) -> bool {
    let Some(state) = &metadata.conf_state else { return false };
    [&state.voters, &state.learners, &state.voters_outgoing, &state.learners_next]
        .into_iter()
        .any(|members| members.contains(&member))
}
