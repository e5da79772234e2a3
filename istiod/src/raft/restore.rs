//! The first member of a new cluster, from the state of a backup.
//!
//! It is written to disk as a founder's first files are, and started like any other member afterwards. The log begins
//! after the backup's revision, so no revision comes twice: what proxies and operators remember of the old cluster
//! stays true.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ca::identity::TrustDomain;
use registry::snapshot::Snapshot;
use registry::state::State;

use super::disk::{Disk, RealDisk};
use super::machine::StateMachine as _;
use super::node::files::{self, Beginning};
use super::node::{FOUNDING_INDEX, Fatal, Settings};
use super::state_machine::Mesh;
use super::store::sled::SledStore;
use super::{FOLDER, LOCK, StartError, lock};
use crate::backup;
use crate::publish::Publisher;

/// Where a backup is restored to.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The data folder of the new member.
    pub data_dir: &'a Path,
    /// Its id, never 0.
    pub id: u64,
    /// Trust domain of the mesh.
    pub trust_domain: &'a TrustDomain,
    /// Move the data of an earlier member aside instead of refusing.
    pub force: bool,
}

/// Why a backup is not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is a member already.
    #[error("{} holds the data of a member already; restore into an empty data folder, or force it", path.display())]
    NotEmpty {
        /// Its folder.
        path: PathBuf,
    },
    /// The files cannot be made.
    #[error(transparent)]
    Start(#[from] StartError),
}

impl From<Fatal> for RestoreError {
    fn from(error: Fatal) -> Self {
        Self::Start(error.into())
    }
}

/// Makes the files of a member that begins with this state; gives where the data of an earlier one is now, if there
/// was one.
///
/// # Errors
///
/// [`RestoreError`]. Nothing is left half done that a second call would take for a member.
pub fn restore(
    target: Target<'_>,
    state: &backup::State,
    random: &mut fastrand::Rng,
) -> Result<Option<PathBuf>, RestoreError> {
    let dir = target.data_dir.join(FOLDER);
    let io = |path: &Path, source| RestoreError::Start(StartError::Io { path: path.to_owned(), source });
    std::fs::create_dir_all(target.data_dir).map_err(|source| io(target.data_dir, source))?;
    let aside = make_room(&dir, target.force)?;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    disk.create_dir(&dir).map_err(|source| io(&dir, source))?;
    let locked = lock(&dir.join(LOCK))?;
    let empty = Snapshot::build_issued(target.trust_domain, &State::default());
    let (publisher, _) = Publisher::starting_at(Arc::new(empty));
    let mut mesh = Mesh::new(publisher);
    mesh.restore(state.revision, &state.bytes).map_err(Fatal::from)?;
    let voters = [target.id];
    let beginning = Beginning::Restore(&voters, state.revision.max(FOUNDING_INDEX));
    let settings = Settings::new(target.id, 0);
    let open_store =
        |path: &Path, incarnation| Ok(Box::new(SledStore::open_or_move_aside(path, incarnation)?) as Box<_>);
    // The applied state is built from the snapshot when the member starts.
    drop(files::open(&disk, &open_store, &dir, (settings, beginning), mesh, random)?);
    drop(locked);
    Ok(aside)
}

/// Moves what is there aside, or refuses.
fn make_room(dir: &Path, force: bool) -> Result<Option<PathBuf>, RestoreError> {
    let io = |source| RestoreError::Start(StartError::Io { path: dir.to_owned(), source });
    let used = match std::fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(io(error)),
    };
    if !used {
        return Ok(None);
    }
    if !force {
        return Err(RestoreError::NotEmpty { path: dir.to_owned() });
    }
    // Not under the feet of one that runs.
    let locked = lock(&dir.join(LOCK))?;
    let free = |number: &u64| !aside_path(dir, *number).exists();
    let aside = aside_path(dir, (1..).find(free).unwrap_or(u64::MAX));
    std::fs::rename(dir, &aside).map_err(io)?;
    drop(locked);
    Ok(Some(aside))
}

fn aside_path(dir: &Path, number: u64) -> PathBuf {
    dir.with_extension(format!("before-restore-{number}"))
}
