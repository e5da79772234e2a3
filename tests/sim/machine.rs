//! The mesh as the driver's state machine, noting what it applies and shows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ca::identity::TrustDomain;
use istiod::publish::Publisher;
use istiod::raft::machine::{Frozen, Halt, StateMachine, Writes};
use istiod::raft::store::Pairs;
use istiod::raft::{Command, Mesh, Outcome, View};
use registry::snapshot::Snapshot;
use registry::state::State;
use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

use crate::journal::{Fact, Journal};
use crate::mistake::Mistake;

/// The whole state is encoded and compared at every index that this divides.
const ENCODE_EACH: u64 = 16;

/// istiod's state machine of one member. Clones share it, so that the rig can look at it from outside.
#[derive(Clone)]
pub(crate) struct SimMachine {
    inner: Arc<Mutex<Inner>>,
    journal: Journal,
    /// What the member takes for the time, for a mistake.
    local_clock: Option<u64>,
}

struct Inner {
    mesh: Mesh,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    applied: u64,
    published: u64,
    /// Applied before it was committed, by mistake.
    early: BTreeMap<u64, Outcome>,
}

impl SimMachine {
    /// An empty mesh. With the mistake of a local clock, that clock is `clock`.
    pub(crate) fn new(journal: Journal, mistake: Option<Mistake>, clock: u64) -> Self {
        let empty = Snapshot::build_issued(&TrustDomain::default(), &State::default());
        let (publisher, _updates) = Publisher::starting_at(Arc::new(empty));
        let snapshots = publisher.subscribe();
        let mesh = Mesh::new(publisher);
        let inner = Inner { mesh, snapshots, applied: 0, published: 0, early: BTreeMap::new() };
        let local_clock = (mistake == Some(Mistake::LocalClockInApply)).then_some(clock);
        Self { inner: Arc::new(Mutex::new(inner)), journal, local_clock }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state as it is now.
    pub(crate) fn view(&self) -> View {
        self.inner().mesh.view()
    }

    /// What readers are shown now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.inner().snapshots.borrow().clone()
    }

    /// The last applied index.
    pub(crate) fn applied(&self) -> u64 {
        self.inner().applied
    }

    /// The mistake of applying what is only appended.
    pub(crate) fn apply_early(&self, index: u64, command: &[u8]) {
        let mut inner = self.inner();
        if let Ok(outcome) = inner.mesh.apply(index, command) {
            inner.early.insert(index, outcome);
        }
    }

    /// Encodes the state and notes it.
    pub(crate) fn encode(&self) -> Result<(), Halt> {
        let (frozen, index) = {
            let inner = self.inner();
            (inner.mesh.freeze(), inner.applied)
        };
        self.journal.note(Fact::Encoded { index, hash: xxh3_64(&frozen()?) });
        Ok(())
    }

    fn with_local_clock(clock: u64, index: u64, command: &[u8]) -> Option<Vec<u8>> {
        let Command::Registry(mut batch) = Command::decode(index, command).ok()? else { return None };
        batch.time_ms = i64::try_from(clock).unwrap_or(0);
        Command::Registry(batch).encode().ok()
    }
}

/// What a snapshot holds, as far as it can differ: names, revisions and labels of its objects, and its services.
fn hash(snapshot: &Snapshot) -> u64 {
    let mut hash = snapshot.host_count() as u64;
    let mut add = |text: &[u8]| hash = hash.rotate_left(7) ^ xxh3_64(text);
    for object in snapshot.objects() {
        add(object.name.as_bytes());
        add(&object.revision.to_le_bytes());
        object.labels.values().for_each(|value| add(value.as_bytes()));
    }
    snapshot.services().for_each(|service| add(service.hostname.as_bytes()));
    hash
}

impl StateMachine for SimMachine {
    type Answer = Outcome;

    fn apply(&mut self, index: u64, command: &[u8]) -> Result<Outcome, Halt> {
        let local = self.local_clock.and_then(|clock| Self::with_local_clock(clock, index, command));
        let outcome = {
            let mut inner = self.inner();
            inner.applied = index;
            match inner.early.remove(&index) {
                Some(outcome) => outcome,
                None => inner.mesh.apply(index, local.as_deref().unwrap_or(command))?,
            }
        };
        let told = xxh3_64(format!("{outcome:?}").as_bytes());
        self.journal.note(Fact::Applied { index, hash: xxh3_64(command), outcome: told });
        if index.is_multiple_of(ENCODE_EACH) {
            self.encode()?;
        }
        Ok(outcome)
    }

    fn take_writes(&mut self) -> Writes {
        self.inner().mesh.take_writes()
    }

    fn all_writes(&mut self) -> Writes {
        self.inner().mesh.all_writes()
    }

    fn publish(&mut self, index: u64, now: Instant) {
        let mut inner = self.inner();
        inner.applied = index;
        inner.mesh.publish(index, now);
        let snapshot = inner.snapshots.borrow_and_update().clone();
        let revision = snapshot.revision().0;
        if revision != inner.published {
            inner.published = revision;
            self.journal.note(Fact::Published { revision, hash: hash(&snapshot) });
        }
    }

    fn freeze(&self) -> Frozen {
        self.inner().mesh.freeze()
    }

    fn restore(&mut self, index: u64, snapshot: &[u8]) -> Result<(), Halt> {
        let mut inner = self.inner();
        inner.applied = index;
        inner.early.clear();
        inner.mesh.restore(index, snapshot)
    }

    fn load(&mut self, index: u64, pairs: Pairs) -> Result<(), Halt> {
        let mut inner = self.inner();
        inner.applied = index;
        inner.mesh.load(index, pairs)
    }
}
