//! One member of the simulated cluster: what survives its lives, and the life it is in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use istiod::raft::disk::Disk;
use istiod::raft::disk::memory::MemoryDisk;
use istiod::raft::node::files::{self, Beginning};
use istiod::raft::node::{Driver, Event, Settings};
use istiod::raft::store::KvStore as _;
use istiod::raft::store::memory::MemoryStore;
use tests::history::Ticket;

use crate::disk::SimDisk;
use crate::journal::Journal;
use crate::ledger::Broken;
use crate::log::{LogView, SimLog};
use crate::machine::SimMachine;
use crate::mistake::Mistake;
use crate::power::Power;
use crate::store::SimStore;

/// Where the numbers of requests that are no proposals begin.
const OTHERS: u64 = 1 << 63;

/// One member.
pub(crate) struct Member {
    pub(crate) id: u64,
    disk: MemoryDisk,
    store: MemoryStore,
    pub(crate) power: Power,
    /// Counts its starts.
    pub(crate) life: u64,
    pub(crate) running: Option<Running>,
    /// It was removed from the cluster and does not come back.
    pub(crate) retired: bool,
    /// How far its clock is ahead, in microseconds.
    pub(crate) ahead_us: u64,
    /// How long its tick is, in parts of a hundred of the true one.
    pub(crate) tick_percent: u64,
}

/// A member's present life.
pub(crate) struct Running {
    pub(crate) driver: Driver<SimMachine>,
    pub(crate) log: LogView,
    pub(crate) machine: SimMachine,
    pub(crate) journal: Journal,
    /// What waits until the member is done with its last step.
    pub(crate) inbox: Vec<Event>,
    /// The member is busy until then, in simulated microseconds.
    pub(crate) busy_until: u64,
    /// It will be woken when it is done.
    pub(crate) wakes: bool,
    /// Numbers of proposals, which have no gaps,
    pub(crate) proposals: u64,
    /// and of everything else.
    pub(crate) others: u64,
    /// Who waits for which answer.
    pub(crate) waiting: BTreeMap<u64, Waiter>,
    /// Everything up to here was checked against what others committed.
    pub(crate) checked: u64,
    /// The term in which it was last seen to lead.
    pub(crate) led: u64,
    /// The last published revision that a watcher of this member has seen.
    pub(crate) watched: u64,
}

/// Who waits for an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Waiter {
    /// A client, for the end of an operation; and the hash of the command, if it wrote.
    Client(usize, Ticket, u64),
    /// Whoever changes the members.
    Operator,
    /// A member that forwarded a proposal: it, its life, and the proposal's number there.
    Peer(u64, u64, u64),
    /// Nobody in particular.
    Nobody,
}

/// What a member needs to start.
pub(crate) struct Start<'a> {
    pub(crate) settings: Settings,
    pub(crate) founders: &'a [u64],
    pub(crate) mistake: Option<Mistake>,
    pub(crate) now: Instant,
}

impl Member {
    pub(crate) fn new(id: u64) -> Self {
        Self {
            id,
            disk: MemoryDisk::new(),
            store: MemoryStore::new(),
            power: Power::default(),
            life: 0,
            running: None,
            retired: false,
            ahead_us: 0,
            tick_percent: 100,
        }
    }

    /// Begins a life; false if the power went before it had begun.
    pub(crate) fn start(&mut self, start: Start<'_>, rng: &mut fastrand::Rng) -> Result<bool, Broken> {
        self.life += 1;
        let refused = |error: &dyn std::fmt::Debug| {
            Broken::new("members start again", format!("{}: {error:?}", self.id))
        };
        let (journal, power, mistake) = (Journal::default(), self.power.clone(), start.mistake);
        let machine = SimMachine::new(journal.clone(), mistake, self.id + self.life);
        let disk: Arc<dyn Disk> =
            Arc::new(SimDisk { inner: self.disk.clone(), power: power.clone(), mistake });
        let (store, store_journal) = (self.store.clone(), journal.clone());
        let open_store = move |_: &Path, _| {
            let (inner, power, journal) = (store.clone(), power.clone(), store_journal.clone());
            Ok(Box::new(SimStore { inner, power, journal, mistake }) as Box<_>)
        };
        let founder = start.founders.contains(&self.id);
        let beginning = if founder { Beginning::Found(start.founders) } else { Beginning::Join };
        let begun = (start.settings, beginning);
        let opened = files::open(&disk, &open_store, &PathBuf::from("/m"), begun, machine.clone(), rng);
        let mut parts = match opened {
            Err(_) if self.power.is_out() => return Ok(false),
            opened => opened.map_err(|error| refused(&error))?,
        };
        let log = SimLog::new(parts.log, journal.clone(), machine.clone(), mistake);
        let log = log.map_err(|error| refused(&error))?;
        let view = log.view();
        parts.log = Box::new(log);
        let driver = match Driver::start(parts, start.now) {
            Err(_) if self.power.is_out() => return Ok(false),
            driver => driver.map_err(|error| refused(&error))?,
        };
        self.running = Some(Running {
            driver,
            log: view,
            machine,
            journal,
            inbox: Vec::new(),
            busy_until: 0,
            wakes: false,
            proposals: 0,
            others: OTHERS,
            waiting: BTreeMap::new(),
            checked: 0,
            led: 0,
            watched: 0,
        });
        Ok(true)
    }

    /// Ends the life. With `chance` the machine loses its power, too: what was not synced is kept or lost as it says.
    pub(crate) fn end(&mut self, chance: Option<&mut dyn FnMut() -> bool>) {
        self.running = None;
        if let Some(chance) = chance {
            self.disk.power_cut(chance);
            if chance() {
                self.store.power_cut();
            }
        }
        self.power.restore();
    }

    /// Ends the life as an operator would.
    pub(crate) fn stop_politely(&mut self) -> Result<(), Broken> {
        let closed = self.running.take().map_or(Ok(()), |running| running.driver.close([]));
        let out = self.power.is_out();
        self.power.restore();
        match closed {
            Err(error) if !out => Err(Broken::new("members stop", format!("{}: {error:?}", self.id))),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// From now on so many bytes are free on its disk.
    pub(crate) fn leave_free(&self, bytes: u64) {
        self.disk.leave_free(bytes);
    }

    /// The store writes what it has to its disk, as it does from time to time.
    pub(crate) fn sync_store(&mut self) -> Result<(), Broken> {
        self.store.sync().map_err(|error| Broken::new("the store syncs", error.to_string()))
    }
}
