//! A member's folder: `member`, `log/`, `snapshot/`, `db/`.

use std::path::Path;
use std::sync::Arc;

use super::start::Parts;
use super::{FOUNDING_INDEX, Fatal, Settings, found};
use crate::raft::disk::Disk;
use crate::raft::log::Log;
use crate::raft::log::wal::Wal;
use crate::raft::machine::StateMachine;
use crate::raft::member::{self, MemberError};
use crate::raft::snapshots::Snapshots;
use crate::raft::store::{KvStore, StoreError};
use crate::raft::wire::MemberIdentity;

const LOG: &str = "log";
const SNAPSHOTS: &str = "snapshot";
const STORE: &str = "db";

/// Opens the store of applied state in a folder, for an incarnation.
pub type OpenStore<'a> = &'a dyn Fn(&Path, u64) -> Result<Box<dyn KvStore>, StoreError>;

/// How a member begins its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning<'a> {
    /// With these voters, all of which begin like this.
    Found(&'a [u64]),
    /// The same, but with a state that was restored into the machine, and of which this is the revision.
    Restore(&'a [u64], u64),
    /// Empty, to be fed by a leader.
    Join,
}

/// Opens a member's folder, making its first files if it is new.
///
/// `random` draws what must not repeat: the incarnation, the cluster's number and the name of this run.
///
/// # Errors
///
/// [`Fatal`] if the folder is another member's, is damaged where that matters, or the disk refuses.
pub fn open<M: StateMachine>(
    disk: &Arc<dyn Disk>,
    open_store: OpenStore<'_>,
    dir: &Path,
    (settings, beginning): (Settings, Beginning<'_>),
    machine: M,
    random: &mut fastrand::Rng,
) -> Result<Parts<M>, Fatal> {
    let mut identity = identity(disk.as_ref(), dir, settings.id, random)?;
    let log_dir = dir.join(LOG);
    if !identity.ready {
        clear(disk.as_ref(), &log_dir)?;
    }
    let snapshots = Snapshots::open(disk.clone(), &dir.join(SNAPSHOTS))?;
    if !identity.ready {
        snapshots.clear()?;
    }
    let wal = Wal::open(disk.clone(), &log_dir, identity.incarnation, settings.segment_bytes)?;
    let mut log: Box<dyn Log> = Box::new(wal);
    if !identity.ready {
        match beginning {
            Beginning::Found(voters) => {
                found(&machine, (voters, FOUNDING_INDEX), log.as_mut(), &snapshots)?;
            }
            Beginning::Restore(voters, index) => {
                found(&machine, (voters, index), log.as_mut(), &snapshots)?;
            }
            Beginning::Join => {}
        }
        identity.ready = true;
        member::write(disk.as_ref(), dir, &identity)?;
    }
    let store = open_store(&dir.join(STORE), identity.incarnation)?;
    let (incarnation, client) = (identity.incarnation, random.u64(..));
    Ok(Parts { settings, incarnation, client, log, snapshots, store, machine, guard: None })
}

/// The identity in `dir`, made first if the folder is new.
fn identity(
    disk: &dyn Disk,
    dir: &Path,
    id: u64,
    random: &mut fastrand::Rng,
) -> Result<MemberIdentity, MemberError> {
    let path = member::path(dir);
    let io = |source| MemberError::Io { path: path.clone(), source };
    disk.create_dir(dir).map_err(io)?;
    let found = match member::read(disk, dir)? {
        Some(found) => {
            // A process that was killed may have named the file and not synced its name.
            disk.sync_dir(dir).map_err(io)?;
            found
        }
        None => {
            let log = dir.join(LOG);
            disk.create_dir(&log).map_err(io)?;
            if !disk.list(&log).map_err(io)?.is_empty() {
                return Err(MemberError::Missing { path });
            }
            let identity =
                MemberIdentity { id, incarnation: random.u64(1..), cluster: random.u64(1..), ready: false };
            member::write(disk, dir, &identity)?;
            identity
        }
    };
    if found.id != id {
        return Err(MemberError::OtherMember { path, expected: id, found: found.id });
    }
    Ok(found)
}

/// Removes what a crash left while the first files were made. Nothing in them was ever acknowledged.
fn clear(disk: &dyn Disk, dir: &Path) -> Result<(), MemberError> {
    let io = |source| MemberError::Io { path: dir.to_owned(), source };
    disk.create_dir(dir).map_err(io)?;
    for name in disk.list(dir).map_err(io)? {
        disk.remove(&dir.join(name)).map_err(io)?;
    }
    disk.sync_dir(dir).map_err(io)
}
