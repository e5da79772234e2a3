//! From files to a running member: founding, and every start after it.

use std::cell::Cell;
use std::time::Instant;

use prost::Message as _;
use raft::RawNode;

use super::fitness::Fitness;
use super::storage::LogStorage;
use super::stored::Stored;
use super::{
    Driver, Fatal, MACHINE_KEYS, Proposals, Reads, SESSION_KEYS, Settings, Waiting, decode_body, drain,
};
use crate::raft::log::Log;
use crate::raft::machine::StateMachine;
use crate::raft::sessions::Sessions;
use crate::raft::snapshots::Snapshots;
use crate::raft::store::{KvStore, StoreError};
use crate::raft::wire::{AppliedMark, ConfState, HardState, SnapshotBody, SnapshotMetadata};

/// The index of the snapshot from which every founder of a new mesh starts. A member that joins later is always fed a
/// snapshot, because the log begins after it.
pub const FOUNDING_INDEX: u64 = 1;
/// The term of that snapshot.
const FOUNDING_TERM: u64 = 1;

/// What a member is made of.
pub struct Parts<M> {
    /// How it behaves.
    pub settings: Settings,
    /// Which life of its data this is.
    pub incarnation: u64,
    /// The name of this run in its proposals; no other run of any member has it.
    pub client: u64,
    /// Its log.
    pub log: Box<dyn Log>,
    /// Its snapshots.
    pub snapshots: Snapshots,
    /// Its applied state.
    pub store: Box<dyn KvStore>,
    /// An empty state machine.
    pub machine: M,
    /// What is to be held while the member lives: the lock on its folder.
    pub guard: Guard,
}

/// Something that is let go when the member ends.
pub type Guard = Option<Box<dyn std::any::Any + Send>>;

/// Makes the first files of a founder: the snapshot from which all founders start, and the log after it.
///
/// Every founder must call this with the same members and the same machine, which is empty, or has the state of a
/// backup of which `index` is the revision. Doing it again after a crash is safe, as long as the member has not run.
///
/// # Errors
///
/// The disk's.
pub fn found<M: StateMachine>(
    machine: &M,
    (voters, index): (&[u64], u64),
    log: &mut dyn Log,
    snapshots: &Snapshots,
) -> Result<(), Fatal> {
    let term = FOUNDING_TERM;
    let conf_state = ConfState { voters: voters.to_vec(), ..ConfState::default() };
    let metadata = SnapshotMetadata { index, term, conf_state: Some(conf_state) };
    let body = SnapshotBody { sessions: None, machine: machine.freeze()()?.into() };
    snapshots.save(&metadata, &body.encode_to_vec())?;
    log.set_hard_state(HardState { term, vote: 0, commit: index }.into());
    Ok(log.reset(index, term)?)
}

impl<M: StateMachine> Driver<M> {
    /// Starts a member on what its last life left: the applied state from the store, or, if the store is new,
    /// doubtful or too old, from the newest snapshot; the rest is replayed from the log once it is known to be
    /// committed.
    ///
    /// # Errors
    ///
    /// [`Fatal`] if the files do not make a member.
    pub fn start(parts: Parts<M>, now: Instant) -> Result<Self, Fatal> {
        let Parts { settings, incarnation, client, mut log, snapshots, store, machine, guard } = parts;
        let newest = snapshots.newest()?;
        mend_log(log.as_mut(), newest)?;
        let mut restored = Restored { machine, sessions: Sessions::default(), mark: AppliedMark::default() };
        let mark = store.mark()?.filter(|mark| mark.index >= log.start().0);
        // What is restored from a snapshot is stored once the member runs.
        let stored = match mark {
            Some(mark) => Some(restored.load(store.as_ref(), mark)?),
            // A member that is about to join: the leader will send it a snapshot.
            None if newest.is_none() && log.last_index() == 0 => Some(0),
            None => {
                restored.rebuild(incarnation, &snapshots, log.start().0)?;
                None
            }
        };
        let mark = restored.mark;
        check(&mark, log.as_ref())?;
        if log.hard_state().commit < mark.index {
            // What is applied was committed; the commit index itself is not worth an fdatasync.
            let mut state = log.hard_state().clone();
            state.commit = mark.index;
            log.set_hard_state(state);
        }
        let conf_state = mark.conf_state.unwrap_or_default().into();
        let config = settings.raft(mark.index);
        let inline = settings.inline_snapshots;
        let storage = LogStorage { log, snapshots, conf_state, inline, wanted: Cell::new(false) };
        let raw = RawNode::new(&config, storage, &drain::logger())?;
        let mut driver = Self {
            raw,
            stored: Stored::new(store, stored),
            machine: restored.machine,
            sessions: restored.sessions,
            settings,
            incarnation,
            client,
            applied: (mark.index, mark.term),
            shown: 0,
            proposals: Proposals::default(),
            waiting: Waiting::default(),
            reads: Reads::new(client),
            snapshot: (newest.map_or(0, |(index, _)| index), false, 0),
            leading: false,
            fitness: Fitness::default(),
            handed_over: 0,
            heir: None,
            told: (0, false),
            _guard: guard,
        };
        driver.show(now);
        driver.lead_if_alone()?;
        Ok(driver)
    }

    /// Nobody can object, so a member that is alone need not wait for its election timeout.
    fn lead_if_alone(&mut self) -> Result<(), Fatal> {
        let state = &self.raw.store().conf_state;
        if state.voters == [self.settings.id] && state.voters_outgoing.is_empty() {
            self.raw.campaign()?;
        }
        Ok(())
    }
}

/// A snapshot that is past the end of the log was installed just before a crash: the log starts after it.
fn mend_log(log: &mut dyn Log, newest: Option<(u64, u64)>) -> Result<(), Fatal> {
    let Some((index, term)) = newest else { return Ok(()) };
    let known = index <= log.start().0 || log.term(index) == Some(term);
    if !known {
        tracing::warn!(
            index,
            term,
            "a snapshot was being installed when the member stopped; the log starts after it"
        );
        let mut state = log.hard_state().clone();
        state.commit = state.commit.max(index);
        state.term = state.term.max(term);
        log.set_hard_state(state);
        log.reset(index, term)?;
    }
    Ok(())
}

/// The applied state and the log must fit: the log holds everything that was ever applied.
fn check(mark: &AppliedMark, log: &dyn Log) -> Result<(), Fatal> {
    if mark.index > log.last_index() {
        return Err(Fatal::Contradiction(format!(
            "entry {} is applied, but the log ends at {}: the log was replaced by an older one",
            mark.index,
            log.last_index()
        )));
    }
    if log.term(mark.index) != Some(mark.term) {
        return Err(Fatal::Contradiction(format!(
            "entry {} was applied in term {}, but the log has it in term {:?}",
            mark.index,
            mark.term,
            log.term(mark.index)
        )));
    }
    Ok(())
}

struct Restored<M> {
    machine: M,
    sessions: Sessions,
    mark: AppliedMark,
}

impl<M: StateMachine> Restored<M> {
    /// From the store; gives its index.
    fn load(&mut self, store: &dyn KvStore, mark: AppliedMark) -> Result<u64, Fatal> {
        let sessions = store.range(SESSION_KEYS)?;
        self.sessions = Sessions::from_values(sessions.iter().map(|(_, value)| value.as_slice()))
            .map_err(|error| StoreError::Damaged(format!("the table of sessions: {error}")))?;
        let mut pairs = store.range(MACHINE_KEYS)?;
        for (key, _) in &mut pairs {
            key.drain(..MACHINE_KEYS.len());
        }
        self.machine.load(mark.index, pairs)?;
        let index = mark.index;
        self.mark = mark;
        Ok(index)
    }

    fn rebuild(&mut self, incarnation: u64, snapshots: &Snapshots, least: u64) -> Result<(), Fatal> {
        let (metadata, data) = snapshots.load(least)?;
        let body = decode_body(metadata.index, data)?;
        tracing::info!(index = metadata.index, "building the applied state from a snapshot");
        self.machine.restore(metadata.index, &body.machine)?;
        self.sessions = Sessions::from_wire(body.sessions.unwrap_or_default());
        self.mark = AppliedMark {
            index: metadata.index,
            term: metadata.term,
            conf_state: metadata.conf_state,
            incarnation,
            ..AppliedMark::default()
        };
        Ok(())
    }
}
