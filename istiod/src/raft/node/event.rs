//! What goes into a driver and what comes out of it.

use std::collections::BTreeMap;

use bytes::Bytes;
use raft::eraftpb::{ConfState, Message};

use super::Job;
use crate::raft::log::LogError;
use crate::raft::machine::Halt;
use crate::raft::member::MemberError;
use crate::raft::snapshots::SnapshotError;
use crate::raft::store::{KvStore, StoreError};
use crate::raft::wire::{self, SnapshotMetadata};

/// What can happen to a member.
pub enum Event {
    /// One tick of the clock has passed.
    Tick,
    /// A peer says something. Messages that a member may only send to itself are refused.
    Message(Box<Message>),
    /// Somebody here wants a command applied. `sequence` is the proposer's, never used twice in this life.
    Propose {
        /// The number under which the answer comes.
        sequence: u64,
        /// The command's bytes.
        command: Vec<u8>,
    },
    /// Another member wants its proposal in this leader's log; answered with [`Answer::Accepted`].
    Forwarded {
        /// The number under which the answer comes.
        sequence: u64,
        /// The encoded [`wire::Proposal`].
        proposal: Bytes,
    },
    /// What the leader did with a [`Forward`] of this member. [`Refusal::Unknown`] if it was not heard from.
    ForwardAnswered {
        /// Of the forward.
        sequence: u64,
        /// It is in the leader's log, or why not.
        result: Result<(), Refusal>,
    },
    /// Somebody here wants the members changed.
    ChangeMembers {
        /// The number under which the answer comes.
        sequence: u64,
        /// The change.
        change: wire::ConfChangeV2,
    },
    /// Somebody here wants to read what was committed when this was asked.
    Read {
        /// The number under which the answer comes.
        sequence: u64,
    },
    /// A message to a peer could not be sent.
    Unreachable(u64),
    /// A snapshot has been sent to a peer, or could not be.
    SnapshotSent {
        /// The peer.
        to: u64,
        /// Whether it got it.
        delivered: bool,
    },
    /// A snapshot is on disk, or could not be written.
    SnapshotSaved(Result<SnapshotMetadata, Fatal>),
    /// The store of applied state has what it was given, and is given back.
    Stored(Result<Box<dyn KvStore>, Fatal>),
    /// Leadership is to move.
    Transfer(u64),
    /// A peer says that this member was removed from the cluster.
    Removed,
    /// Others are to be told what is committed, if this member leads and has not said it by then.
    TellCommitted,
}

/// What a step asks the thread to do, besides what went to the transport.
pub struct Output<A> {
    /// Answers by sequence.
    pub answers: Vec<(u64, Answer<A>)>,
    /// Slow work, for other threads or to be done at once; what each gives is an event for the driver.
    pub jobs: Vec<Job>,
    /// Proposals for the leader; what became of each is told by [`Event::ForwardAnswered`].
    pub forwards: Vec<Forward>,
}

/// A proposal on its way to the leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// The leader.
    pub to: u64,
    /// The proposal's number.
    pub sequence: u64,
    /// The encoded [`wire::Proposal`]. Sent twice it takes effect once.
    pub proposal: Bytes,
}

impl<A> Default for Output<A> {
    fn default() -> Self {
        Self { answers: Vec::new(), jobs: Vec::new(), forwards: Vec::new() }
    }
}

/// The end of a request.
#[derive(Debug)]
pub enum Answer<A> {
    /// The command is applied at this index.
    Applied(u64, A),
    /// A forwarded proposal is in this leader's log.
    Accepted,
    /// The members have changed at this index.
    Members(u64, ConfState),
    /// Everything committed before the read was asked for is applied; the index that it covers.
    Readable(u64),
    /// It was not, or perhaps not, done.
    Refused(Refusal),
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not done: only the leader may, and this member is not it.
    #[error("this member is not the leader{}", .0.map(|id| format!("; member {id} is")).unwrap_or_default())]
    NotLeader(Option<u64>),
    /// Not done: no leader was known for as long as the request waited.
    #[error("the control plane has no leader at present")]
    NoLeader,
    /// Not done: too much is waiting to be committed.
    #[error("the control plane is overloaded, try again")]
    Busy,
    /// Not done: the leader's disk is nearly full.
    #[error("{0}")]
    NoSpace(String),
    /// Not done: another change of members, or a refusal by Raft.
    #[error("refused: {0}")]
    Invalid(String),
    /// Perhaps done: no answer in time.
    #[error("no answer in time; it is not known whether the command was applied")]
    Unknown,
    /// Done before: this very proposal was applied earlier.
    #[error("this proposal was applied before")]
    Duplicate,
}

/// This member has stopped and says why.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The log.
    #[error("the log failed")]
    Log(#[from] LogError),
    /// The applied state.
    #[error("the applied state failed")]
    Store(#[from] StoreError),
    /// A snapshot.
    #[error("the snapshot failed")]
    Snapshot(#[from] SnapshotError),
    /// The identity.
    #[error("the member's identity is not usable")]
    Member(#[from] MemberError),
    /// A command or state that this program does not know.
    #[error("this member has halted")]
    Halt(#[from] Halt),
    /// The raft crate.
    #[error("raft failed")]
    Raft(#[from] raft::Error),
    /// What the files say together makes no sense.
    #[error("the files of this member contradict each other: {0}")]
    Contradiction(String),
    /// Its peers have removed this member.
    #[error(
        "member {0} was removed from the cluster; its number is never used again: clear its data folder and let it \
         join anew with a ticket of `istioctl members add`"
    )]
    Removed(u64),
    /// A panic, in the raft crate most likely.
    #[error("the raft thread panicked: {0}")]
    Panicked(String),
}

/// How a member stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// This member.
    pub id: u64,
    /// The current term.
    pub term: u64,
    /// The leader, if one is known.
    pub leader: Option<u64>,
    /// Whether this member leads.
    pub leading: bool,
    /// The highest index known to be committed.
    pub committed: u64,
    /// The highest index applied.
    pub applied: u64,
    /// The highest index in the log.
    pub last_index: u64,
    /// The first index in the log.
    pub first_index: u64,
    /// Bytes of the entries in the log.
    pub log_bytes: u64,
    /// The index of the newest snapshot.
    pub snapshot: u64,
    /// The members that vote.
    pub voters: Vec<u64>,
    /// The members that only follow.
    pub learners: Vec<u64>,
    /// The voters of the other side while a change of members is under way.
    pub outgoing: Vec<u64>,
    /// Bytes that are free on the disk of the log, where that is known.
    pub free_bytes: Option<u64>,
    /// Every sync of the log has been slow for some time.
    pub slow_disk: bool,
    /// How often this member has handed leadership over because of its disk.
    pub handed_over: u64,
    /// On the leader: how far each other member is.
    pub progress: BTreeMap<u64, Progress>,
}

/// How far another member is, as the leader knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The highest index that its log is known to hold.
    pub matched: u64,
    /// It was heard within the last election timeout.
    pub active: bool,
}
