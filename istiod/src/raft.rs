//! The replicated log of the control plane: what every member agrees on.
//!
//! From the ground up: [`disk`] is the few file operations that matter, [`log`] and [`snapshots`] are durable on it,
//! [`store`] keeps the applied state between runs, [`machine`] is what the log drives, [`node`] moves them in the
//! safe order, [`peers`] carries what members say to each other, and [`state_machine`] is the mesh itself as such a
//! machine. [`Raft`] is the handle that the rest of
//! istiod uses.
//!
//! What [`Raft::propose`] promises: when it returns, the command is durable on a quorum and applied here, its
//! snapshot is published, and its revision, which is its index in the log, is higher than that of everything
//! answered before.

pub mod disk;
pub mod log;
pub mod machine;
pub mod member;
pub mod metrics;
pub mod node;
pub mod part;
pub mod peers;
pub mod restore;
pub mod sessions;
pub mod snapshots;
pub mod state_machine;
pub mod store;
pub mod wire;

use std::fs::{File, TryLockError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ca::identity::TrustDomain;
use ca::node::Revocations;
use registry::snapshot::Snapshot;
use registry::state::{Revision, State};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::disk::{Disk, RealDisk};
use self::metrics::Metrics;
use self::node::files::{self, Beginning};
use self::node::thread::{Ending, NoPeers, Node, RequestError, panic_text};
use self::node::{Driver, Event, Fatal, Refusal, Settings, Status, Transport};
use self::snapshots::Snapshots;
pub use self::state_machine::{Command, Mesh, Outcome, View};
use self::store::sled::SledStore;
use crate::access::AccessState;
pub use crate::audit::Origin;
use crate::cluster::ClusterState;
use crate::publish::{Publisher, Updates};

/// The log, the snapshots and the applied state lie in this folder of the data folder.
pub(crate) const FOLDER: &str = "raft";
/// Locked while a member runs on the folder.
const LOCK: &str = "lock";
/// How often the lock is tried. A process that was started by the last holder has it too, until it runs a program of its
/// own.
const LOOKS: u32 = 20;
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// The way into the log. Clones lead to the same one.
#[derive(Clone)]
pub struct Raft {
    node: Node<Mesh>,
    cluster: watch::Receiver<Arc<ClusterState>>,
}

/// What a member is started with.
pub struct Starting<'a> {
    /// Where it keeps its data.
    pub place: Place<'a>,
    /// How it behaves.
    pub settings: Settings,
    /// How it begins its life, if it is new.
    pub beginning: Beginning<'a>,
    /// What carries its messages.
    pub transport: Box<dyn Transport>,
    /// What it tells Prometheus.
    pub metrics: Metrics,
}

/// Everything that starting gives.
pub struct Started {
    /// The handle.
    pub raft: Raft,
    /// What changes, for the push side.
    pub updates: Updates,
    /// The newest snapshot, for readers.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Who may use the admin API.
    pub access: watch::Receiver<Arc<AccessState>>,
    /// The revoked nodes.
    pub revoked: watch::Receiver<Arc<Revocations>>,
    /// The files of the whole state, for members that lack it.
    pub files: Snapshots,
    /// The thread, to be waited for at the end.
    pub thread: RaftThread,
}

/// Where a member keeps its data, and for which mesh.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The data folder.
    pub data_dir: &'a Path,
    /// Trust domain of the identities that this mesh's authority issues.
    pub trust_domain: &'a TrustDomain,
}

/// The thread that drives the log.
pub struct RaftThread {
    handle: Ending,
}

impl RaftThread {
    /// Waits for the thread to end, off the async workers.
    ///
    /// # Errors
    ///
    /// Why it ended, if it was not told to.
    pub async fn join(self) -> Result<(), Arc<Fatal>> {
        let joined = tokio::task::spawn_blocking(move || self.handle.join()).await;
        match joined {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(Arc::new(Fatal::Panicked("see above".to_owned()))),
        }
    }
}

/// Why a member does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another process runs on the same folder.
    #[error("{} is in use: another istiod runs on this data folder", path.display())]
    InUse {
        /// The lock.
        path: PathBuf,
    },
    /// The operating system refuses.
    #[error("cannot use {}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The files do not make a member.
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

/// Why a command was not answered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProposeError {
    /// Raft refused, or has not answered in time.
    #[error(transparent)]
    Refused(Refusal),
    /// This member has stopped; whether the command was applied is not known.
    #[error("this member has stopped")]
    Stopped(#[source] Option<Arc<Fatal>>),
    /// Some member would not understand it.
    #[error(
        "not every member reads this yet: it needs version {needs} of commands, some member knows up to {level}; \
         upgrade all members first"
    )]
    Level {
        /// What the command needs.
        needs: u32,
        /// What all members read.
        level: u32,
    },
    /// The command has no stored form.
    #[error("the command cannot be stored: {0}")]
    Unstorable(String),
}

impl From<RequestError> for ProposeError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Refused(refusal) => Self::Refused(refusal),
            RequestError::Stopped(why) => Self::Stopped(why),
        }
    }
}

impl Raft {
    /// Starts a control plane of one member on a data folder, founding it if the folder is new.
    ///
    /// Blocks while the state is read. `random` draws what must not repeat; `now` is the time of the first snapshot.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn start(
        place: Place<'_>,
        settings: Settings,
        metrics: Metrics,
        random: &mut fastrand::Rng,
        now: Instant,
        stop: CancellationToken,
    ) -> Result<Started, StartError> {
        let voters = [settings.id];
        let beginning = Beginning::Found(&voters);
        let starting = Starting { place, settings, beginning, transport: Box::new(NoPeers), metrics };
        Self::start_among(starting, random, now, stop)
    }

    /// Starts a member that may have peers. As [`Raft::start`] otherwise.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn start_among(
        starting: Starting<'_>,
        random: &mut fastrand::Rng,
        now: Instant,
        stop: CancellationToken,
    ) -> Result<Started, StartError> {
        let Starting { place, settings, beginning, transport, metrics } = starting;
        let dir = place.data_dir.join(FOLDER);
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::measured(metrics.sync_seconds()));
        let io = |path: &Path, source| StartError::Io { path: path.to_owned(), source };
        disk.create_dir(&dir).map_err(|source| io(&dir, source))?;
        let lock = lock(&dir.join(LOCK))?;
        let empty = Snapshot::build_issued(place.trust_domain, &State::default());
        let (publisher, updates) = Publisher::starting_at(Arc::new(empty));
        let snapshots = publisher.subscribe();
        let open_store = |path: &Path, incarnation| {
            Ok(Box::new(SledStore::open_or_move_aside(path, incarnation)?) as Box<_>)
        };
        let mesh = Mesh::new(publisher);
        let (cluster, access, revoked) = (mesh.members(), mesh.watch_access(), mesh.revoked());
        let mut parts = files::open(&disk, &open_store, &dir, (settings, beginning), mesh, random)?;
        parts.guard = Some(Box::new(lock));
        let files = parts.snapshots.clone();
        // The raft crate asserts what the files of a sane member satisfy.
        let driver = catch_unwind(AssertUnwindSafe(|| Driver::start(parts, now)))
            .unwrap_or_else(|panic| Err(Fatal::Panicked(panic_text(panic.as_ref()))))?;
        let (node, handle) = Node::spawn(driver, transport, metrics, stop).map_err(|e| io(&dir, e))?;
        let raft = Self { node, cluster };
        Ok(Started { raft, updates, snapshots, access, revoked, files, thread: RaftThread { handle } })
    }

    /// The raft thread, for the links to peers.
    #[must_use]
    pub fn node(&self) -> &Node<Mesh> {
        &self.node
    }

    /// The members of the control plane as applied here, always the latest.
    #[must_use]
    pub fn cluster(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.cluster.clone()
    }

    /// Changes Raft's own members; only the leader can. What operators want goes through
    /// [`Members`](crate::cluster::members::Members).
    ///
    /// # Errors
    ///
    /// [`ProposeError`].
    pub async fn change_members(&self, change: wire::ConfChangeV2) -> Result<Revision, ProposeError> {
        Ok(Revision(self.node.change_members(change).await?.0))
    }

    /// Asks for another leader; [`Raft::status`] tells when it leads.
    pub fn transfer(&self, to: u64) {
        self.node.tell(Event::Transfer(to));
    }

    /// Has a command committed and applied; gives its revision and what became of it. The queue is bounded: under
    /// load this waits.
    ///
    /// # Errors
    ///
    /// [`ProposeError`]; after [`Refusal::Unknown`] and [`ProposeError::Stopped`] the command may have been applied.
    pub async fn propose(&self, command: &Command) -> Result<(Revision, Outcome), ProposeError> {
        self.check_level(command.version())?;
        self.propose_bytes(command.encode()).await
    }

    /// [`Raft::propose`] for an operator: the audit trail will say who it was.
    ///
    /// # Errors
    ///
    /// As [`Raft::propose`].
    pub async fn propose_as(
        &self,
        command: &Command,
        origin: &Origin,
    ) -> Result<(Revision, Outcome), ProposeError> {
        // With an origin, a command is of the second version at least.
        self.check_level(command.version().max(2))?;
        self.propose_bytes(command.encode_as(origin)).await
    }

    /// A command that some member does not read would halt it.
    fn check_level(&self, needs: u32) -> Result<(), ProposeError> {
        match self.cluster.borrow().level() {
            Some(level) if needs > level => Err(ProposeError::Level { needs, level }),
            Some(_) | None => Ok(()),
        }
    }

    async fn propose_bytes(
        &self,
        bytes: Result<Vec<u8>, serde_json::Error>,
    ) -> Result<(Revision, Outcome), ProposeError> {
        let bytes = bytes.map_err(|error| ProposeError::Unstorable(error.to_string()))?;
        let (index, outcome) = self.node.propose(bytes).await?;
        Ok((Revision(index), outcome))
    }

    /// Waits until everything is applied here that was committed anywhere when this was called, so that what is read
    /// afterwards is linearizable; gives that revision.
    ///
    /// # Errors
    ///
    /// [`ProposeError`].
    pub async fn read_index(&self) -> Result<Revision, ProposeError> {
        Ok(Revision(self.node.read_index().await?))
    }

    /// The state as it is on this member now: a read that may be behind others, with its revision. After
    /// [`Raft::read_index`] it is not.
    ///
    /// While a view is held, the next command copies the state's index; so let it go soon.
    ///
    /// # Errors
    ///
    /// [`ProposeError::Stopped`].
    pub async fn view(&self) -> Result<View, ProposeError> {
        Ok(self.node.inspect(Mesh::view).await?)
    }

    /// How this member stands, always the latest.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.node.status()
    }

    /// Waits until `revision` is applied here.
    ///
    /// # Errors
    ///
    /// [`ProposeError::Stopped`].
    pub async fn applied(&self, revision: Revision) -> Result<(), ProposeError> {
        let mut status = self.node.status();
        let reached = status.wait_for(|status| status.applied >= revision.0).await.map(drop);
        reached.map_err(|_| ProposeError::Stopped(self.node.ended().borrow().clone()))
    }

    /// Waits until the thread ends by itself, and tells why: this member must then stop.
    pub async fn ended(&self) -> Option<Arc<Fatal>> {
        let mut ended = self.node.ended();
        let why = ended.wait_for(Option::is_some).await;
        why.ok().and_then(|why| why.clone())
    }
}

/// Takes the lock of a folder; it is let go with the file.
fn lock(path: &Path) -> Result<File, StartError> {
    let io = |source| StartError::Io { path: path.to_owned(), source };
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(io)?;
    for _ in 0..LOOKS {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => std::thread::park_timeout(PAUSE),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
    }
    Err(StartError::InUse { path: path.to_owned() })
}
