//! The operator API: one service layer, called by [`rest`] and, through the same routes, by [`grpc`].
//!
//! Every function is given its [`Caller`]. Reads come from the newest snapshot of this member, by default after a read
//! index, so that they are linearizable; writes are proposed to the log and answered after they are applied here. All
//! checks are made before a proposal: what is in the log is a fact. Who may call what is decided once, in [`gate`], by
//! the table in [`routes`].

mod access;

pub mod audit;
mod backup;
pub mod caller;
mod change;
pub mod diff;
pub mod events;
pub mod gate;
pub mod grpc;
pub mod history;
pub mod limits;
mod members;
mod mesh;
mod nodes;
mod objects;
pub mod openapi;
pub mod page;
pub mod preview;
mod problem;
mod prune;
pub mod rest;
pub mod routes;
pub mod select;
pub mod served;
mod trust;
pub mod types;
mod view;
pub mod watch;

pub(crate) use view::waited;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use ca::authority::Authority;
use ca::renewal::Clock;
use registry::snapshot::Snapshot;
use registry::state::Revision;
use tokio::sync::Semaphore;
use tokio::sync::watch::Receiver;
use tokio::time::Instant;
use xds::balance::Fleet;
use xds::status::Status;

use self::page::Kept;
use self::served::Served;
use self::types::Consistency;
use crate::access::AccessState;
use crate::cluster::members::Members;
use crate::raft::{Command, Origin, Outcome, Raft, View};

pub use self::caller::{Caller, Source};
pub use self::change::{Mode, Plan};
pub(crate) use self::nodes::NODE_ANNOTATION;
pub use self::problem::ApiError;
pub(crate) use self::view::rfc3339;

/// Longest time that a caller may wait for a revision.
pub const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// The operator API of one member.
#[derive(Clone)]
pub struct Api {
    /// The log.
    pub raft: Raft,
    /// The newest snapshot.
    pub snapshots: Receiver<Arc<Snapshot>>,
    /// Tokens and roles.
    pub access: Receiver<Arc<AccessState>>,
    /// What proxies have acknowledged.
    pub status: Status,
    /// This member's authority.
    pub issuing: Arc<ArcSwap<Authority>>,
    /// What time it is.
    pub clock: Clock,
    /// Where agents reach the xDS port, `host:port`.
    pub xds: String,
    /// Who serves agents: the members, this one among them.
    pub fleet: Receiver<Fleet>,
    /// What happened lately.
    pub events: events::Events,
    /// Places for those who watch.
    pub watches: Arc<Semaphore>,
    /// The members of the control plane.
    pub members: Members,
    /// Snapshots that lists in pages go on in.
    pub kept: Arc<Mutex<Kept>>,
}

impl Api {
    /// The addresses of the xDS and certificate port of all members.
    fn addresses(&self) -> Vec<String> {
        self.fleet.borrow().addresses().map(str::to_owned).collect()
    }

    /// The proxies of this member.
    fn served(&self) -> Served {
        let (raft, snapshots) = (self.raft.clone(), self.snapshots.clone());
        Served { raft, snapshots, status: self.status.clone() }
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// The newest snapshot, as new as the caller wants it.
    async fn read(&self, consistency: Consistency) -> Result<Arc<Snapshot>, ApiError> {
        if consistency == Consistency::Linearizable {
            self.raft.read_index().await?;
        }
        Ok(self.snapshot())
    }

    /// The snapshot in which a list goes on, or the newest to begin one in.
    async fn read_page(
        &self,
        after: Option<&page::After>,
        consistency: Consistency,
    ) -> Result<Arc<Snapshot>, ApiError> {
        let now = Instant::now().into_std();
        let Some(after) = after else { return self.read(consistency).await };
        let newest = self.snapshot();
        if newest.revision().0 == after.revision {
            return Ok(newest);
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(after.revision, now);
        kept.ok_or_else(|| {
            ApiError::Gone(format!(
                "revision {} is not kept any more, or not by this member; list again from the beginning",
                after.revision
            ))
        })
    }

    /// A page that ends before the end: its snapshot is kept for the next.
    fn keep(&self, snapshot: &Arc<Snapshot>) {
        let now = Instant::now().into_std();
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).put(snapshot, now);
    }

    fn time_ms(&self) -> i64 {
        let since = (self.clock)().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }

    fn seconds(&self) -> u64 {
        ca::state::unix_seconds((self.clock)())
    }

    /// Has a caller's command committed and applied. `action` is what the caller did, for the audit log.
    async fn propose(
        &self,
        caller: &Caller,
        action: &str,
        command: &Command,
    ) -> Result<(Revision, Outcome), ApiError> {
        let origin = self.origin(caller, action);
        Ok(self.raft.propose_as(command, &origin).await?)
    }

    fn origin(&self, caller: &Caller, action: &str) -> Origin {
        Origin {
            who: caller.name.clone(),
            from: caller.from.to_string(),
            at_ms: self.time_ms(),
            action: action.to_owned(),
        }
    }

    async fn view(&self) -> Result<View, ApiError> {
        Ok(self.raft.view().await?)
    }
}

/// Work on this many objects, or on so many bytes, takes less time than to hand it to another thread and back would
/// cost both.
const LITTLE: usize = 256;
const LITTLE_BYTES: usize = 8 << 10;

/// Work that takes as long as its input is large: [`aside`], unless it is `little`.
async fn aside_unless<T: Send + 'static>(
    little: bool,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if little { work() } else { aside(work).await }
}

/// Work that takes as long as its input is large: off the tasks that serve everybody.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::Internal("the work was not finished".to_owned())))
}
