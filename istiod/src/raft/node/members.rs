//! Who the members are: changes of them, and what becomes of leadership with them.

use std::time::Instant;

use prost::Message as _;
use raft::StateRole;
use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType};

use super::{Answer, Driver, Fatal, Output, Refusal, decode_proposal};
use crate::raft::machine::{Halt, StateMachine};
use crate::raft::wire;

impl<M: StateMachine> Driver<M> {
    /// A leader whose disk is not fit hands leadership to the voter that is the furthest among those that were heard of
    /// late, if there is one.
    fn step_down_if_unfit(&mut self, now: Instant) {
        if self.raw.raft.state != StateRole::Leader {
            return;
        }
        let Some(next) = self.heir() else { return };
        if self.fitness.hands_over(now, &self.settings) {
            let (slow, free) = (self.fitness.is_slow(), self.fitness.free());
            tracing::warn!(
                member = self.settings.id,
                to = next,
                slow,
                free,
                "the disk is not fit: leadership is handed over"
            );
            self.handed_over += 1;
            self.raw.transfer_leader(next);
        }
    }

    /// Notices how long the log's disk took in the step that began at `now`.
    pub(super) fn look_at_syncs(&mut self, now: Instant) {
        let Some(took) = self.raw.mut_store().log.take_sync_time() else { return };
        self.fitness.synced(took, now, &self.settings);
        self.step_down_if_unfit(now);
    }

    /// Notices how much is free on the log's disk.
    pub(super) fn look_at_space(&mut self, now: Instant) {
        let free = self.raw.store().log.free();
        if self.fitness.has_free(free, &self.settings) {
            let least = self.settings.least_free_bytes;
            if self.fitness.is_full(&self.settings) {
                tracing::error!(
                    free,
                    least,
                    "the disk is nearly full: no writes are taken until some space is freed"
                );
            } else {
                tracing::info!(free, least, "the disk has space again");
            }
        }
        self.step_down_if_unfit(now);
    }

    /// A follower whose disk is nearly full takes no more commands and no snapshot: it votes and falls behind until there is
    /// space, where a write that failed would stop it. It takes the empty entry with which a leader begins, so that reads go
    /// on where nobody has space.
    pub(super) fn would_fill(&self, message: &Message) -> bool {
        let kind = message.get_msg_type();
        let grows = kind == MessageType::MsgSnapshot
            || kind == MessageType::MsgAppend
                && message.get_entries().iter().any(|entry| !entry.data.is_empty());
        grows && self.fitness.is_full(&self.settings)
    }

    /// The log must not be what fills the disk.
    pub(super) fn must_have_space(&self) -> Result<(), Refusal> {
        if !self.fitness.is_full(&self.settings) {
            return Ok(());
        }
        let [free, least] =
            [self.fitness.free().unwrap_or(0), self.settings.least_free_bytes].map(|b| b >> 20);
        Err(Refusal::NoSpace(format!(
            "the disk of member {}, which leads, is nearly full ({free} MiB are free, less than {least}): free some \
             space there",
            self.settings.id
        )))
    }

    /// A leader that does not vote any more stops leading at once: the raft crate would look in vain for its own
    /// progress. Its heir is told when the messages before it have left.
    fn stop_leading(&mut self) {
        if self.raw.raft.state != StateRole::Leader {
            return;
        }
        self.heir = self.heir();
        let raft = &mut self.raw.raft;
        raft.become_follower(raft.term, raft::INVALID_ID);
        // What a leader would have sent is nothing that a follower may send, and Raft says it again.
        raft.msgs.clear();
    }

    /// Asks a voter to stand for election at once (Raft thesis, section 3.10).
    pub(super) fn hand_over(&self, heir: u64) -> Message {
        let mut message = Message { to: heir, from: self.settings.id, ..Message::default() };
        message.set_msg_type(MessageType::MsgTimeoutNow);
        message.term = self.raw.raft.term;
        message
    }

    /// The voter that is the furthest among those that were heard of late, but not this member.
    fn heir(&self) -> Option<u64> {
        let raft = &self.raw.raft;
        let voters = &self.raw.store().conf_state.voters;
        let others = raft
            .prs()
            .iter()
            .filter(|(id, progress)| **id != raft.id && progress.recent_active && voters.contains(id));
        others.max_by_key(|(id, progress)| (progress.matched, **id)).map(|(id, _)| *id)
    }

    pub(super) fn change_members(
        &mut self,
        sequence: u64,
        change: wire::ConfChangeV2,
    ) -> Result<(), Refusal> {
        self.must_lead()?;
        if self.raw.raft.has_pending_conf() {
            // The raft crate would turn it into an empty entry without a word.
            return Err(Refusal::Invalid("another change of members is under way".to_owned()));
        }
        let change = raft::eraftpb::ConfChangeV2::try_from(change);
        let change = change.map_err(|error| Refusal::Invalid(error.to_string()))?;
        self.possible(&change).map_err(|error| Refusal::Invalid(error.to_string()))?;
        let name = wire::Proposal { client: self.client, sequence, command: bytes::Bytes::new() };
        match self.raw.propose_conf_change(name.encode_to_vec(), change) {
            Ok(()) => Ok(()),
            Err(raft::Error::ProposalDropped) => Err(Refusal::Busy),
            Err(error) => Err(Refusal::Invalid(error.to_string())),
        }
    }

    /// Whether the members can change like this as they are now. An entry that cannot be applied would halt every
    /// member, and what the raft crate refuses itself it turns into an empty entry without a word.
    fn possible(&self, change: &raft::eraftpb::ConfChangeV2) -> raft::Result<()> {
        let mut changer = raft::Changer::new(self.raw.raft.prs());
        let changed = match change.enter_joint() {
            _ if change.leave_joint() => changer.leave_joint(),
            Some(auto_leave) if !change.changes.is_empty() => {
                changer.enter_joint(auto_leave, &change.changes)
            }
            Some(_) => Err(raft::Error::ConfChangeError("no change is asked for".to_owned())),
            None => changer.simple(&change.changes),
        };
        changed.map(drop)
    }

    pub(super) fn apply_members(&mut self, entry: &Entry, out: &mut Output<M::Answer>) -> Result<(), Fatal> {
        let malformed = |reason: String| Halt { index: entry.index, reason };
        if entry.get_entry_type() == EntryType::EntryConfChange {
            return Err(malformed("a change of members in the old form".to_owned()).into());
        }
        let change = wire::ConfChangeV2::decode(entry.data.clone()).map_err(|e| malformed(e.to_string()))?;
        let change = raft::eraftpb::ConfChangeV2::try_from(change).map_err(|e| malformed(e.to_string()))?;
        let state = in_order(self.raw.apply_conf_change(&change)?);
        tracing::info!(index = entry.index, voters = ?state.voters, learners = ?state.learners, "members changed");
        self.raw.mut_store().conf_state = state.clone();
        if ![&state.voters, &state.voters_outgoing].iter().any(|voters| voters.contains(&self.settings.id)) {
            self.stop_leading();
        }
        if !entry.context.is_empty() {
            let proposal = decode_proposal(entry.index, &entry.context)?;
            if proposal.client == self.client {
                self.waiting.ended(proposal.sequence, Answer::Members(entry.index, state), out);
            }
        }
        Ok(())
    }
}

/// The raft crate lists members in the order of a hash table; what is stored must be the same on all of them.
fn in_order(mut state: ConfState) -> ConfState {
    state.voters.sort_unstable();
    state.learners.sort_unstable();
    state.voters_outgoing.sort_unstable();
    state.learners_next.sort_unstable();
    state
}
