//! The driver's settings.

use std::time::Duration;

use crate::raft::log::wal::SEGMENT_BYTES;

/// How a member behaves. Times are in ticks of [`Settings::tick`] where they say so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// This member; never 0.
    pub id: u64,
    /// The length of a tick.
    pub tick: Duration,
    /// A follower that hears nothing for this many ticks, or up to twice as many, asks for votes.
    pub election_ticks: usize,
    /// A leader makes itself heard each time so many ticks have passed.
    pub heartbeat_ticks: usize,
    /// Bytes of entries in one message to a peer.
    pub message_bytes: u64,
    /// Messages with entries under way to one peer.
    pub messages_in_flight: usize,
    /// Bytes of entries that wait to be committed; beyond it proposals are refused.
    pub uncommitted_bytes: u64,
    /// Bytes of committed entries applied in one go.
    pub apply_bytes: u64,
    /// A snapshot is taken after so many entries,
    pub snapshot_entries: u64,
    /// or after so many bytes of entries.
    pub snapshot_bytes: u64,
    /// Entries that stay in the log behind a snapshot, for peers that are a little behind.
    pub keep_entries: u64,
    /// A file of the log is about this large.
    pub segment_bytes: u64,
    /// A request without an answer in this time is answered with "unknown".
    pub answer_within: Duration,
    /// A read that was not confirmed in this time is asked again: Raft drops such requests without a word.
    pub read_retry: Duration,
    /// Messages that announce a snapshot carry it; otherwise only its point, and the transport reads the file.
    pub inline_snapshots: bool,
    /// A disk is slow whose every sync takes at least this long
    pub slow_sync: Duration,
    /// for this long: a leader then hands leadership over.
    pub slow_sync_for: Duration,
    /// With less than this free on its disk a leader takes no proposals, and a follower no commands: the log must not be
    /// what fills it.
    pub least_free_bytes: u64,
    /// Where the spread of election timeouts comes from.
    pub election_seed: u64,
}

impl Settings {
    /// The settings of member `id` in production; the seed makes its elections differ from those of others.
    #[must_use]
    pub fn new(id: u64, election_seed: u64) -> Self {
        Self {
            id,
            tick: Duration::from_millis(100),
            // With a draw of up to twice this, two members agree on a new leader well within 2 s.
            election_ticks: 8,
            heartbeat_ticks: 2,
            message_bytes: 1 << 20,
            messages_in_flight: 128,
            uncommitted_bytes: 64 << 20,
            apply_bytes: 8 << 20,
            snapshot_entries: 50_000,
            snapshot_bytes: 64 << 20,
            keep_entries: 5_000,
            segment_bytes: SEGMENT_BYTES,
            answer_within: Duration::from_secs(5),
            read_retry: Duration::from_millis(200),
            inline_snapshots: true,
            slow_sync: Duration::from_secs(1),
            slow_sync_for: Duration::from_secs(10),
            least_free_bytes: 64 << 20,
            election_seed,
        }
    }

    /// As the raft crate wants them; its own defaults are not safe.
    pub(super) fn raft(&self, applied: u64) -> raft::Config {
        raft::Config {
            id: self.id,
            election_tick: self.election_ticks,
            heartbeat_tick: self.heartbeat_ticks,
            applied,
            max_size_per_msg: self.message_bytes,
            max_inflight_msgs: self.messages_in_flight,
            check_quorum: true,
            pre_vote: true,
            min_election_tick: self.election_ticks,
            max_election_tick: self.election_ticks * 2,
            read_only_option: raft::ReadOnlyOption::Safe,
            // The next append says it, or the driver when there is none.
            skip_bcast_commit: true,
            // Not safe in 0.7: the driver joins appends itself.
            batch_append: false,
            priority: 0,
            max_uncommitted_size: self.uncommitted_bytes,
            max_committed_size_per_ready: self.apply_bytes,
        }
    }

    /// Between once and twice [`Settings::election_ticks`], by seed, member and term.
    pub(super) fn election_timeout(&self, id: u64, term: u64) -> usize {
        let mixed = self.election_seed ^ id.rotate_left(32) ^ term.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.election_ticks + fastrand::Rng::with_seed(mixed).usize(0..self.election_ticks.max(1))
    }
}
