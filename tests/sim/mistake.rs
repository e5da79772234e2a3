//! Known mistakes, to be planted one at a time: what the simulation must find.
//!
//! None of them is in istiod: each is made by one of the parts between which its driver works (the disk, the log, the
//! store, the state machine, the network, the caller), in the way in which a mistake of the driver would show there.

use std::fmt;

/// One mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// Votes and acknowledgements leave before the log is synced.
    SendBeforePersist,
    /// The log's fdatasync says yes and does nothing.
    LoseFsync,
    /// The vote is not part of the stored hard state: after a restart a member votes again in the same term.
    VoteTwice,
    /// Entries are applied when they are appended, not when they are committed.
    ApplyBeforeCommit,
    /// A write is acknowledged when the leader has it, not when a quorum has.
    AcknowledgeBeforeQuorum,
    /// A read is answered from the member's state as it is, without asking the leader for its read index.
    ReadWithoutIndex,
    /// The table of applied proposals is not restored at start, so one that was sent twice takes effect twice.
    ForgetSessions,
    /// A request without an answer is tried again under another number, so that it may take effect twice.
    RetryUnderNewNumber,
    /// The log is compacted past the newest snapshot.
    SnapshotOlderThanLog,
    /// A restart cuts the last entry off the log, as if it had been torn.
    TruncateCommitted,
    /// The outgoing half of a joint configuration is not stored: after a restart its quorum is ignored.
    IgnoreJointQuorum,
    /// The time of a batch is taken from the clock of the member that applies it.
    LocalClockInApply,
    /// A snapshot from the leader is installed beside what the store holds, not in its place.
    MixSnapshotWithStore,
}

impl Mistake {
    /// All of them.
    pub(crate) const ALL: [Self; 13] = [
        Self::SendBeforePersist,
        Self::LoseFsync,
        Self::VoteTwice,
        Self::ApplyBeforeCommit,
        Self::AcknowledgeBeforeQuorum,
        Self::ReadWithoutIndex,
        Self::ForgetSessions,
        Self::RetryUnderNewNumber,
        Self::SnapshotOlderThanLog,
        Self::TruncateCommitted,
        Self::IgnoreJointQuorum,
        Self::LocalClockInApply,
        Self::MixSnapshotWithStore,
    ];
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
