//! The messages of Raft as members send and keep them, and their conversion to and from those of the raft crate.
//!
//! The raft crate's own messages are protobuf 2.28, whose parser can be driven into the ground by nested groups
//! (RUSTSEC-2024-0437). Bytes from a peer or from disk are therefore parsed as the prost mirror in
//! `proto/raft.proto` and converted here, field by field; the raft crate never sees foreign bytes.

use raft::eraftpb;

#[expect(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    reason = "generated from proto/raft.proto and proto/peers.proto"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/istiod.raft.v1.rs"));
}

pub use generated::*;

/// A message that parsed but means nothing to Raft.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Invalid {
    /// An enum holds a number that this version does not know.
    #[error("unknown {what} {value}")]
    Unknown {
        /// Which enum.
        what: &'static str,
        /// The number found.
        value: i32,
    },
    /// A message that a member may only send to itself.
    #[error("message type {0} may not come from a peer")]
    Local(i32),
}

impl From<&eraftpb::Entry> for Entry {
    fn from(entry: &eraftpb::Entry) -> Self {
        let entry_type = match entry.get_entry_type() {
            eraftpb::EntryType::EntryNormal => EntryType::Normal,
            eraftpb::EntryType::EntryConfChange => EntryType::ConfChange,
            eraftpb::EntryType::EntryConfChangeV2 => EntryType::ConfChangeV2,
        };
        Self {
            entry_type: entry_type.into(),
            term: entry.term,
            index: entry.index,
            data: entry.data.clone(),
            context: entry.context.clone(),
        }
    }
}

impl TryFrom<Entry> for eraftpb::Entry {
    type Error = Invalid;

    fn try_from(entry: Entry) -> Result<Self, Invalid> {
        let value = entry.entry_type;
        let kind = EntryType::try_from(value).map_err(|_| Invalid::Unknown { what: "entry type", value })?;
        let mut out = Self::default();
        out.set_entry_type(match kind {
            EntryType::Normal => eraftpb::EntryType::EntryNormal,
            EntryType::ConfChange => eraftpb::EntryType::EntryConfChange,
            EntryType::ConfChangeV2 => eraftpb::EntryType::EntryConfChangeV2,
        });
        out.term = entry.term;
        out.index = entry.index;
        out.data = entry.data;
        out.context = entry.context;
        Ok(out)
    }
}

impl From<&eraftpb::ConfState> for ConfState {
    fn from(state: &eraftpb::ConfState) -> Self {
        Self {
            voters: state.voters.clone(),
            learners: state.learners.clone(),
            voters_outgoing: state.voters_outgoing.clone(),
            learners_next: state.learners_next.clone(),
            auto_leave: state.auto_leave,
        }
    }
}

impl From<ConfState> for eraftpb::ConfState {
    fn from(state: ConfState) -> Self {
        Self {
            voters: state.voters,
            learners: state.learners,
            voters_outgoing: state.voters_outgoing,
            learners_next: state.learners_next,
            auto_leave: state.auto_leave,
            ..Self::default()
        }
    }
}

impl From<&eraftpb::HardState> for HardState {
    fn from(state: &eraftpb::HardState) -> Self {
        Self { term: state.term, vote: state.vote, commit: state.commit }
    }
}

impl From<HardState> for eraftpb::HardState {
    fn from(state: HardState) -> Self {
        Self { term: state.term, vote: state.vote, commit: state.commit, ..Self::default() }
    }
}

impl From<&eraftpb::SnapshotMetadata> for SnapshotMetadata {
    fn from(metadata: &eraftpb::SnapshotMetadata) -> Self {
        Self {
            conf_state: Some(metadata.get_conf_state().into()),
            index: metadata.index,
            term: metadata.term,
        }
    }
}

impl From<SnapshotMetadata> for eraftpb::SnapshotMetadata {
    fn from(metadata: SnapshotMetadata) -> Self {
        let mut out = Self::default();
        out.set_conf_state(metadata.conf_state.unwrap_or_default().into());
        out.index = metadata.index;
        out.term = metadata.term;
        out
    }
}

impl From<&eraftpb::Snapshot> for Snapshot {
    fn from(snapshot: &eraftpb::Snapshot) -> Self {
        Self { data: snapshot.data.clone(), metadata: Some(snapshot.get_metadata().into()) }
    }
}

impl From<Snapshot> for eraftpb::Snapshot {
    fn from(snapshot: Snapshot) -> Self {
        let mut out = Self { data: snapshot.data, ..Self::default() };
        out.set_metadata(snapshot.metadata.unwrap_or_default().into());
        out
    }
}

impl From<&eraftpb::Message> for Message {
    fn from(message: &eraftpb::Message) -> Self {
        Self {
            msg_type: message_type(message.get_msg_type()).into(),
            to: message.to,
            from: message.from,
            term: message.term,
            log_term: message.log_term,
            index: message.index,
            entries: message.entries.iter().map(Entry::from).collect(),
            commit: message.commit,
            commit_term: message.commit_term,
            snapshot: message.snapshot.as_ref().map(Snapshot::from),
            request_snapshot: message.request_snapshot,
            reject: message.reject,
            reject_hint: message.reject_hint,
            context: message.context.clone(),
            priority: message.priority,
        }
    }
}

impl TryFrom<Message> for eraftpb::Message {
    type Error = Invalid;

    fn try_from(message: Message) -> Result<Self, Invalid> {
        let value = message.msg_type;
        let kind =
            MessageType::try_from(value).map_err(|_| Invalid::Unknown { what: "message type", value })?;
        let mut out = Self::default();
        out.set_msg_type(raft_message_type(kind)?);
        out.to = message.to;
        out.from = message.from;
        out.term = message.term;
        out.log_term = message.log_term;
        out.index = message.index;
        let entries: Result<Vec<_>, _> = message.entries.into_iter().map(eraftpb::Entry::try_from).collect();
        out.set_entries(entries?.into());
        out.commit = message.commit;
        out.commit_term = message.commit_term;
        if let Some(snapshot) = message.snapshot {
            out.set_snapshot(snapshot.into());
        }
        out.request_snapshot = message.request_snapshot;
        out.reject = message.reject;
        out.reject_hint = message.reject_hint;
        out.context = message.context;
        out.priority = message.priority;
        Ok(out)
    }
}

fn message_type(kind: eraftpb::MessageType) -> MessageType {
    use eraftpb::MessageType as Raft;
    match kind {
        Raft::MsgHup => MessageType::Hup,
        Raft::MsgBeat => MessageType::Beat,
        Raft::MsgPropose => MessageType::Propose,
        Raft::MsgAppend => MessageType::Append,
        Raft::MsgAppendResponse => MessageType::AppendResponse,
        Raft::MsgRequestVote => MessageType::RequestVote,
        Raft::MsgRequestVoteResponse => MessageType::RequestVoteResponse,
        Raft::MsgSnapshot => MessageType::Snapshot,
        Raft::MsgHeartbeat => MessageType::Heartbeat,
        Raft::MsgHeartbeatResponse => MessageType::HeartbeatResponse,
        Raft::MsgUnreachable => MessageType::Unreachable,
        Raft::MsgSnapStatus => MessageType::SnapStatus,
        Raft::MsgCheckQuorum => MessageType::CheckQuorum,
        Raft::MsgTransferLeader => MessageType::TransferLeader,
        Raft::MsgTimeoutNow => MessageType::TimeoutNow,
        Raft::MsgReadIndex => MessageType::ReadIndex,
        Raft::MsgReadIndexResp => MessageType::ReadIndexResp,
        Raft::MsgRequestPreVote => MessageType::RequestPreVote,
        Raft::MsgRequestPreVoteResponse => MessageType::RequestPreVoteResponse,
    }
}

/// A peer may not send what a member says only to itself, nor proposals: those are forwarded with their answer.
fn raft_message_type(kind: MessageType) -> Result<eraftpb::MessageType, Invalid> {
    use eraftpb::MessageType as Raft;
    Ok(match kind {
        MessageType::Hup
        | MessageType::Beat
        | MessageType::Propose
        | MessageType::Unreachable
        | MessageType::SnapStatus
        | MessageType::CheckQuorum => return Err(Invalid::Local(kind.into())),
        MessageType::Append => Raft::MsgAppend,
        MessageType::AppendResponse => Raft::MsgAppendResponse,
        MessageType::RequestVote => Raft::MsgRequestVote,
        MessageType::RequestVoteResponse => Raft::MsgRequestVoteResponse,
        MessageType::Snapshot => Raft::MsgSnapshot,
        MessageType::Heartbeat => Raft::MsgHeartbeat,
        MessageType::HeartbeatResponse => Raft::MsgHeartbeatResponse,
        MessageType::TransferLeader => Raft::MsgTransferLeader,
        MessageType::TimeoutNow => Raft::MsgTimeoutNow,
        MessageType::ReadIndex => Raft::MsgReadIndex,
        MessageType::ReadIndexResp => Raft::MsgReadIndexResp,
        MessageType::RequestPreVote => Raft::MsgRequestPreVote,
        MessageType::RequestPreVoteResponse => Raft::MsgRequestPreVoteResponse,
    })
}

impl TryFrom<ConfChangeV2> for eraftpb::ConfChangeV2 {
    type Error = Invalid;

    fn try_from(change: ConfChangeV2) -> Result<Self, Invalid> {
        let value = change.transition;
        let transition = ConfChangeTransition::try_from(value)
            .map_err(|_| Invalid::Unknown { what: "transition of members", value })?;
        let mut out = Self::default();
        out.set_transition(match transition {
            ConfChangeTransition::Auto => eraftpb::ConfChangeTransition::Auto,
            ConfChangeTransition::Implicit => eraftpb::ConfChangeTransition::Implicit,
            ConfChangeTransition::Explicit => eraftpb::ConfChangeTransition::Explicit,
        });
        let changes: Result<Vec<_>, _> =
            change.changes.into_iter().map(eraftpb::ConfChangeSingle::try_from).collect();
        out.set_changes(changes?.into());
        out.context = change.context;
        Ok(out)
    }
}

impl TryFrom<ConfChangeSingle> for eraftpb::ConfChangeSingle {
    type Error = Invalid;

    fn try_from(change: ConfChangeSingle) -> Result<Self, Invalid> {
        let value = change.change_type;
        let kind = ConfChangeType::try_from(value)
            .map_err(|_| Invalid::Unknown { what: "change of members", value })?;
        let mut out = Self::default();
        out.set_change_type(match kind {
            ConfChangeType::AddNode => eraftpb::ConfChangeType::AddNode,
            ConfChangeType::RemoveNode => eraftpb::ConfChangeType::RemoveNode,
            ConfChangeType::AddLearnerNode => eraftpb::ConfChangeType::AddLearnerNode,
        });
        out.node_id = change.node_id;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_both_ways() {
        let mut message = eraftpb::Message::default();
        message.set_msg_type(eraftpb::MessageType::MsgAppend);
        (message.to, message.from, message.term, message.index) = (2, 1, 7, 41);
        (message.commit, message.commit_term, message.log_term) = (40, 6, 6);
        message.context = vec![1, 2].into();
        let mut entry = eraftpb::Entry::default();
        entry.set_entry_type(eraftpb::EntryType::EntryConfChangeV2);
        (entry.term, entry.index, entry.data) = (7, 42, vec![9; 30].into());
        message.mut_entries().push(entry);
        let back = eraftpb::Message::try_from(Message::from(&message)).expect("converts");
        assert_eq!(back, message);
    }

    #[test]
    fn a_peer_may_not_send_what_a_member_says_to_itself() {
        for kind in
            [MessageType::Hup, MessageType::Propose, MessageType::SnapStatus, MessageType::Unreachable]
        {
            let message = Message { msg_type: kind.into(), ..Message::default() };
            assert_eq!(eraftpb::Message::try_from(message), Err(Invalid::Local(kind.into())));
        }
        let message = Message { msg_type: 99, ..Message::default() };
        let error = Invalid::Unknown { what: "message type", value: 99 };
        assert_eq!(eraftpb::Message::try_from(message), Err(error));
    }

    #[test]
    fn the_change_of_members_that_raft_writes_is_what_the_mirror_reads() {
        use prost::Message as _;
        use protobuf::Message as _;
        let mut single = eraftpb::ConfChangeSingle::default();
        single.set_change_type(eraftpb::ConfChangeType::AddLearnerNode);
        single.node_id = 4;
        let mut change = eraftpb::ConfChangeV2::default();
        change.set_transition(eraftpb::ConfChangeTransition::Explicit);
        change.mut_changes().push(single);
        let bytes = change.write_to_bytes().expect("writes");
        let mirror = ConfChangeV2::decode(bytes.as_slice()).expect("reads");
        assert_eq!(eraftpb::ConfChangeV2::try_from(mirror).expect("converts"), change);
    }
}
