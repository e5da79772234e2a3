//! The driver: one member of Raft, from events to a safe order of disk, network and state.
//!
//! [`Driver::step`] is the only way in. It hands the event to the raft crate and then runs [`Driver::settle`], the
//! one function that persists, sends, applies and advances in the order in which that is safe. It starts no thread,
//! reads no clock and knows no channel: [`thread`] wraps it for production, tests and simulation step it by hand.

mod appends;
mod drain;
mod event;
pub mod files;
mod fitness;
mod jobs;
mod members;
mod proposals;
mod settings;
mod start;
mod storage;
mod stored;
pub mod thread;
mod waiting;

use std::time::Instant;

use prost::Message as _;
use raft::eraftpb::{Entry, EntryType, Message, Snapshot};
use raft::{RawNode, SnapshotStatus, StateRole};

pub use self::event::{Answer, Event, Fatal, Forward, Output, Progress, Refusal, Status};
use self::fitness::Fitness;
pub use self::jobs::Job;
use self::jobs::{SnapshotJob, StoreJob};
use self::proposals::Proposals;
pub use self::settings::Settings;
pub use self::start::{FOUNDING_INDEX, Guard, Parts, found};
use self::storage::LogStorage;
use self::stored::Stored;
use self::waiting::{Reads, Waiting};
use super::machine::{Halt, StateMachine};
use super::sessions::Sessions;
use super::snapshots::SnapshotError;
use super::store::KvStore;
use super::wire::{self, AppliedMark, SnapshotBody, SnapshotMetadata};

/// Keys of the session table in the store.
const SESSION_KEYS: &[u8] = b"s/";
/// Keys of the state machine in the store.
const MACHINE_KEYS: &[u8] = b"m/";

/// Carries messages to peers.
pub trait Transport: Send {
    /// Takes messages to be sent. Never blocks; what cannot be sent is dropped, Raft sends it again.
    fn send(&mut self, messages: Vec<Message>);

    /// Takes proposals for the leader. Never blocks; what cannot be sent is told by [`Event::ForwardAnswered`].
    fn forward(&mut self, forwards: Vec<Forward>);
}

/// One member of Raft.
pub struct Driver<M: StateMachine> {
    raw: RawNode<LogStorage>,
    stored: Stored,
    machine: M,
    sessions: Sessions,
    settings: Settings,
    incarnation: u64,
    client: u64,
    applied: (u64, u64),
    shown: u64,
    proposals: Proposals,
    waiting: Waiting,
    reads: Reads,
    /// The newest snapshot's index; whether one is being written; bytes applied since.
    snapshot: (u64, bool, u64),
    leading: bool,
    fitness: Fitness,
    /// How often leadership was handed over because of the disk.
    handed_over: u64,
    /// Who is to lead next, because this member led and was removed.
    heir: Option<u64>,
    /// What others were told to be committed, while this member leads; and whether one of them waits for what is.
    told: (u64, bool),
    /// Held while the member lives.
    _guard: Guard,
}

impl<M: StateMachine> Driver<M> {
    /// Takes one event and does everything that follows from it.
    ///
    /// # Errors
    ///
    /// [`Fatal`]: this member must not be stepped again. What it answered before holds.
    pub fn step(
        &mut self,
        event: Event,
        now: Instant,
        transport: &mut dyn Transport,
        out: &mut Output<M::Answer>,
    ) -> Result<(), Fatal> {
        self.steps(std::iter::once(event), now, transport, out)
    }

    /// Takes several events at once: their entries share one fdatasync.
    ///
    /// # Errors
    ///
    /// As [`Driver::step`].
    pub fn steps(
        &mut self,
        events: impl Iterator<Item = Event>,
        now: Instant,
        transport: &mut dyn Transport,
        out: &mut Output<M::Answer>,
    ) -> Result<(), Fatal> {
        for event in events {
            self.take(event, now, out)?;
        }
        self.give_proposals(out);
        self.ask_reads(now);
        self.settle(transport, out)?;
        if std::mem::take(&mut self.told.1) {
            self.tell_committed();
            self.settle(transport, out)?;
        }
        if self.ask_reads(now) {
            self.settle(transport, out)?;
        }
        self.look_at_syncs(now);
        self.show(now);
        self.reads.answer(self.applied.0, out);
        self.give_jobs(now, out);
        Ok(())
    }

    /// Asks Raft what the waiting reads may see; true if it was asked. A leader that has not committed anything in its
    /// term would drop the question without a word, so it waits for that.
    fn ask_reads(&mut self, now: Instant) -> bool {
        let raft = &self.raw.raft;
        if raft.state == StateRole::Leader && !raft.commit_to_current_term() {
            return false;
        }
        let round = self.reads.next_round(now, self.settings.read_retry);
        let asked = round.is_some();
        if let Some(context) = round {
            self.raw.read_index(context);
        }
        asked
    }

    /// Everything that the raft crate has ready, in the order that keeps Raft's promises:
    ///
    /// 1. a leader's messages may leave while its own disk is still busy (Raft thesis, section 10.2.1);
    /// 2. a received snapshot, entries and hard state are made durable with one fdatasync;
    /// 3. only then leaves what promises them to others: votes and acknowledgements;
    /// 4. committed entries are applied, in order; the store follows later;
    /// 5. the raft crate is told, which may commit and release more.
    fn settle(&mut self, transport: &mut dyn Transport, out: &mut Output<M::Answer>) -> Result<(), Fatal> {
        let most = self.settings.message_bytes;
        while self.raw.has_ready() {
            let mut ready = self.raw.ready();
            send(transport, most, ready.take_messages());

            if !ready.snapshot().is_empty() {
                let snapshot = ready.snapshot().clone();
                self.install(&snapshot)?;
            }
            let must_sync = ready.must_sync();
            let log = &mut self.raw.mut_store().log;
            log.append(ready.take_entries())?;
            if let Some(state) = ready.hs() {
                log.set_hard_state(state.clone());
            }
            if must_sync {
                log.sync()?;
            }

            send(transport, most, ready.take_persisted_messages());
            for read in ready.take_read_states() {
                self.reads.confirmed(&read.request_ctx, read.index);
            }

            self.apply(ready.take_committed_entries(), out)?;

            let mut light = self.raw.advance(ready);
            if let Some(commit) = light.commit_index() {
                let log = &mut self.raw.mut_store().log;
                let mut state = log.hard_state().clone();
                state.commit = commit;
                log.set_hard_state(state);
            }
            send(transport, most, light.take_messages());
            self.apply(light.take_committed_entries(), out)?;
            self.raw.advance_apply();
            let heir = self.heir.take().map(|heir| self.hand_over(heir));
            send(transport, most, heir.into_iter().collect());
        }
        self.tell_role();
        Ok(())
    }

    /// Whether this member leads and has committed more than it has told others. The next proposal tells them; if there is none
    /// soon, [`Event::TellCommitted`] must.
    #[must_use]
    pub fn owes_committed(&self) -> bool {
        self.raw.raft.state == StateRole::Leader && self.raw.raft.raft_log.committed > self.told.0
    }

    /// Tells others what is committed, without any entries.
    fn tell_committed(&mut self) {
        if self.owes_committed() {
            self.told.0 = self.raw.raft.raft_log.committed;
            self.raw.raft.bcast_append();
        }
    }

    fn take(&mut self, event: Event, now: Instant, out: &mut Output<M::Answer>) -> Result<(), Fatal> {
        match event {
            Event::Tick => self.tick(now, out),
            Event::Message(message) if self.would_fill(&message) => {
                tracing::debug!("a peer's message was dropped: the disk is nearly full");
            }
            Event::Message(message) => {
                // A message that Raft refuses is the sender's mistake or too old; this member goes on.
                if let Err(error) = self.raw.step(*message) {
                    tracing::debug!(%error, "a peer's message was refused");
                }
            }
            Event::Propose { sequence, command } => {
                let proposal = wire::Proposal { client: self.client, sequence, command: command.into() };
                let deadline = now + self.settings.answer_within;
                self.proposals.add(sequence, proposal.encode_to_vec().into(), deadline);
            }
            Event::Forwarded { sequence, proposal } => {
                let result = self.take_forwarded(proposal);
                out.answers.push((sequence, result.map_or_else(Answer::Refused, |()| Answer::Accepted)));
            }
            Event::ForwardAnswered { sequence, result } => match result {
                Ok(()) => {}
                Err(Refusal::NotLeader(_) | Refusal::NoLeader | Refusal::Unknown) => {
                    self.proposals.give_later(sequence);
                }
                Err(refusal) => self.proposals.refused(sequence, refusal, out),
            },
            Event::ChangeMembers { sequence, change } => {
                let result = self.change_members(sequence, change);
                self.waiting.started(sequence, result, now + self.settings.answer_within, out);
            }
            Event::Read { sequence } => self.reads.add(sequence, now + self.settings.answer_within),
            Event::Unreachable(peer) => self.raw.report_unreachable(peer),
            Event::SnapshotSent { to, delivered } => {
                let status = if delivered { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
                self.raw.report_snapshot(to, status);
            }
            Event::SnapshotSaved(result) => self.snapshot_ended(result, now)?,
            Event::Stored(store) => self.stored.back(store?),
            Event::Transfer(to) => self.raw.transfer_leader(to),
            Event::Removed => return Err(Fatal::Removed(self.settings.id)),
            Event::TellCommitted => self.tell_committed(),
        }
        Ok(())
    }

    fn tick(&mut self, now: Instant, out: &mut Output<M::Answer>) {
        // The raft crate draws its election timeout from the thread's generator; drawing it from our seed makes a
        // run repeatable. Only `tick` reads it.
        let timeout = self.settings.election_timeout(self.raw.raft.id, self.raw.raft.term);
        self.raw.raft.set_randomized_election_timeout(timeout);
        self.raw.tick();
        self.tell_committed();
        self.look_at_space(now);
        self.proposals.tick();
        self.proposals.expire(now, out);
        self.waiting.expire(now, out);
        self.reads.expire(now, out);
        self.stored.tick();
    }

    /// Gives the leader, if there is one, the proposals that it does not have yet.
    fn give_proposals(&mut self, out: &mut Output<M::Answer>) {
        let Some(leader) = self.leader() else { return };
        let (id, term) = (self.raw.raft.id, self.raw.raft.term);
        for (sequence, proposal) in self.proposals.give(term) {
            if leader != id {
                out.forwards.push(Forward { to: leader, sequence, proposal });
                continue;
            }
            match self.append(&proposal) {
                Ok(()) => {}
                Err(Refusal::NotLeader(_)) => self.proposals.give_later(sequence),
                Err(refusal) => self.proposals.refused(sequence, refusal, out),
            }
        }
    }

    fn take_forwarded(&mut self, proposal: bytes::Bytes) -> Result<(), Refusal> {
        // What cannot be decoded would halt every member once it is in the log.
        let decoded = wire::Proposal::decode(proposal.clone());
        decoded.map_err(|error| Refusal::Invalid(format!("not a proposal: {error}")))?;
        self.append(&proposal)
    }

    /// Puts a proposal into the log that this member leads.
    fn append(&mut self, proposal: &[u8]) -> Result<(), Refusal> {
        self.must_lead()?;
        self.must_have_space()?;
        match self.raw.propose(Vec::new(), proposal.to_vec()) {
            Ok(()) => {
                self.told.0 = self.raw.raft.raft_log.committed;
                Ok(())
            }
            // The next leader will take it.
            Err(raft::Error::ProposalDropped) if self.raw.raft.lead_transferee.is_some() => {
                Err(Refusal::NotLeader(None))
            }
            Err(raft::Error::ProposalDropped) => Err(Refusal::Busy),
            Err(error) => Err(Refusal::Invalid(error.to_string())),
        }
    }

    fn must_lead(&self) -> Result<(), Refusal> {
        if self.raw.raft.state == StateRole::Leader { Ok(()) } else { Err(Refusal::NotLeader(self.leader())) }
    }

    fn leader(&self) -> Option<u64> {
        Some(self.raw.raft.leader_id).filter(|id| *id != raft::INVALID_ID)
    }

    /// Applies committed entries.
    fn apply(&mut self, entries: Vec<Entry>, out: &mut Output<M::Answer>) -> Result<(), Fatal> {
        let mut members = false;
        for entry in entries {
            let (index, term) = (entry.index, entry.term);
            self.snapshot.2 += entry.data.len() as u64;
            match entry.get_entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {}
                EntryType::EntryNormal => self.apply_command(&entry, out)?,
                EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
                    self.apply_members(&entry, out)?;
                    members = true;
                }
            }
            self.applied = (index, term);
            self.stored.applied();
        }
        if members {
            // Whoever was removed may be gone from now on. Those who stay elect nobody without them if a power cut makes all
            // forget that the change is committed.
            self.raw.mut_store().log.sync()?;
        }
        Ok(())
    }

    fn apply_command(&mut self, entry: &Entry, out: &mut Output<M::Answer>) -> Result<(), Fatal> {
        let proposal = decode_proposal(entry.index, &entry.data)?;
        let answer = if self.sessions.admit(proposal.client, proposal.sequence, entry.index) {
            Answer::Applied(entry.index, self.machine.apply(entry.index, &proposal.command)?)
        } else {
            Answer::Refused(Refusal::Duplicate)
        };
        if proposal.client == self.client {
            self.proposals.ended(proposal.sequence, answer, out);
        } else {
            // Whoever proposed it answers when it has applied it.
            self.told.1 = true;
        }
        Ok(())
    }

    fn store_job(&mut self, store: Box<dyn KvStore>, anew: bool) -> StoreJob {
        let machine = if anew { self.machine.all_writes() } else { self.machine.take_writes() };
        // After a replacement all sessions count as changed.
        let sessions = self.sessions.take_writes(SESSION_KEYS);
        StoreJob { store, anew, machine, sessions, mark: self.mark() }
    }

    fn mark(&self) -> AppliedMark {
        AppliedMark {
            index: self.applied.0,
            term: self.applied.1,
            conf_state: Some((&self.raw.store().conf_state).into()),
            incarnation: self.incarnation,
            ..AppliedMark::default()
        }
    }

    /// Takes the place of everything this member had: the file first, then the log, so that a crash in between is mended
    /// at the next start from the file. So is a crash before the store has the new state: what it has is older than the
    /// log's start.
    fn install(&mut self, snapshot: &Snapshot) -> Result<(), Fatal> {
        let metadata = wire::SnapshotMetadata::from(snapshot.get_metadata());
        let (index, term) = (metadata.index, metadata.term);
        tracing::info!(index, term, bytes = snapshot.data.len(), "installing a snapshot from the leader");
        let body = decode_body(index, snapshot.data.clone())?;
        self.raw.store().snapshots.save(&metadata, &snapshot.data)?;
        self.machine.restore(index, &body.machine)?;
        self.sessions = Sessions::from_wire(body.sessions.unwrap_or_default());
        let storage = self.raw.mut_store();
        storage.conf_state = metadata.conf_state.unwrap_or_default().into();
        self.applied = (index, term);
        self.stored.replaced();
        self.raw.mut_store().log.reset(index, term)?;
        self.snapshot = (index, self.snapshot.1, 0);
        Ok(())
    }

    /// Lets readers see the state, if it has moved.
    fn show(&mut self, now: Instant) {
        if self.shown != self.applied.0 {
            self.shown = self.applied.0;
            self.machine.publish(self.applied.0, now);
        }
    }

    fn give_jobs(&mut self, now: Instant, out: &mut Output<M::Answer>) {
        let snapshot = self.snapshot_is_due(now);
        if snapshot {
            (self.snapshot.1, self.snapshot.2) = (true, 0);
            out.jobs.push(Job::Snapshot(self.snapshot_job()));
        }
        if !self.fitness.is_full(&self.settings)
            && let Some((store, anew)) = self.stored.due(self.applied.0, snapshot)
        {
            out.jobs.push(Job::Store(self.store_job(store, anew)));
        }
    }

    fn snapshot_is_due(&self, now: Instant) -> bool {
        let (last, running, bytes) = self.snapshot;
        // A store that lost what it had not synced starts behind the newest snapshot.
        let behind = self.applied.0.saturating_sub(last);
        let wanted = self.raw.store().wanted.replace(false) && behind > 0;
        let due = behind >= self.settings.snapshot_entries || bytes >= self.settings.snapshot_bytes;
        !running && (due || wanted) && self.fitness.has_room(now, &self.settings)
    }

    fn snapshot_job(&self) -> SnapshotJob {
        let metadata = SnapshotMetadata {
            index: self.applied.0,
            term: self.applied.1,
            conf_state: Some((&self.raw.store().conf_state).into()),
        };
        SnapshotJob {
            metadata,
            sessions: self.sessions.to_wire(),
            frozen: self.machine.freeze(),
            snapshots: self.raw.store().snapshots.clone(),
        }
    }

    /// Without room for a snapshot a member goes on: it has its log, and takes no writes if that grows too large.
    fn snapshot_ended(&mut self, result: Result<SnapshotMetadata, Fatal>, now: Instant) -> Result<(), Fatal> {
        match result {
            Err(Fatal::Snapshot(SnapshotError::Io { source, .. }))
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                tracing::error!(error = %source, "no room for a snapshot: free some space on this member's disk");
                self.snapshot.1 = false;
                self.fitness.found_no_room(now);
                Ok(())
            }
            result => self.snapshot_saved(&result?),
        }
    }

    /// The log may go up to the snapshot that is now durable; some of it stays for peers that are a little behind.
    fn snapshot_saved(&mut self, metadata: &SnapshotMetadata) -> Result<(), Fatal> {
        self.snapshot.1 = false;
        self.snapshot.0 = self.snapshot.0.max(metadata.index);
        let log = &mut self.raw.mut_store().log;
        let mut until = metadata.index.saturating_sub(self.settings.keep_entries);
        if log.bytes() > self.settings.snapshot_bytes.saturating_mul(2) {
            until = metadata.index;
        }
        if until > log.start().0 {
            log.compact(until)?;
            tracing::debug!(index = until, "log compacted");
        }
        Ok(())
    }

    fn tell_role(&mut self) {
        let leading = self.raw.raft.state == StateRole::Leader;
        if leading != self.leading {
            self.leading = leading;
            let term = self.raw.raft.term;
            if leading {
                tracing::info!(member = self.raw.raft.id, term, "leader");
            } else {
                tracing::info!(member = self.raw.raft.id, term, "no longer leader");
            }
        }
    }

    /// How this member stands.
    #[must_use]
    pub fn status(&self) -> Status {
        let raft = &self.raw.raft;
        let storage = self.raw.store();
        Status {
            id: raft.id,
            term: raft.term,
            leader: self.leader(),
            leading: raft.state == StateRole::Leader,
            committed: raft.raft_log.committed,
            applied: self.applied.0,
            last_index: storage.log.last_index(),
            first_index: storage.log.first_index(),
            log_bytes: storage.log.bytes(),
            snapshot: self.snapshot.0,
            voters: storage.conf_state.voters.clone(),
            learners: storage.conf_state.learners.clone(),
            outgoing: storage.conf_state.voters_outgoing.clone(),
            free_bytes: self.fitness.free(),
            slow_disk: self.fitness.is_slow(),
            handed_over: self.handed_over,
            progress: self.progress(),
        }
    }

    fn progress(&self) -> std::collections::BTreeMap<u64, Progress> {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            return std::collections::BTreeMap::new();
        }
        let others = raft.prs().iter().filter(|(id, _)| **id != raft.id);
        let told = |progress: &raft::Progress| Progress {
            matched: progress.matched,
            active: progress.recent_active,
        };
        others.map(|(id, progress)| (*id, told(progress))).collect()
    }

    /// The state machine.
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// Makes what is only in memory durable, before a polite stop. `late` are events of jobs that nobody will step any
    /// more: one may bring the store back.
    ///
    /// # Errors
    ///
    /// [`Fatal`]. Nothing acknowledged is lost by it.
    pub fn close(mut self, late: impl IntoIterator<Item = Event>) -> Result<(), Fatal> {
        for event in late {
            if let Event::Stored(store) = event {
                self.stored.back(store?);
            }
        }
        self.raw.mut_store().log.sync()?;
        if let Some((store, anew)) = self.stored.take(self.applied.0) {
            let store = self.store_job(store, anew).run()?;
            self.stored.back(store);
        }
        Ok(self.stored.here().map_or(Ok(()), |store| store.sync())?)
    }
}

fn send(transport: &mut dyn Transport, most_bytes: u64, messages: Vec<Message>) {
    if !messages.is_empty() {
        transport.send(appends::join(messages, most_bytes));
    }
}

fn decode_proposal(index: u64, bytes: &[u8]) -> Result<wire::Proposal, Halt> {
    wire::Proposal::decode(bytes).map_err(|error| Halt { index, reason: format!("not a proposal: {error}") })
}

fn decode_body(index: u64, bytes: bytes::Bytes) -> Result<SnapshotBody, Halt> {
    SnapshotBody::decode(bytes).map_err(|error| Halt { index, reason: format!("not a snapshot: {error}") })
}
