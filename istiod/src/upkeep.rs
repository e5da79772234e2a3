//! What a member does by itself: waits for its log, forgets ended tokens, follows watched folders and catalogs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ca::renewal::Clock;
use ca::state::{CaCommand, unix_seconds};
use registry::snapshot::Snapshot;
use registry::source::file::{self, Folder};
use registry::state::{Batch, Revision};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::AccessCommand;
use crate::api::gate::Gate;
use crate::config::Config;
use crate::raft::{Command, ProposeError, Raft, Started};
use crate::sources;

/// How often ended tokens are looked for.
const PRUNE: Duration = Duration::from_secs(3600);
/// How often the use of operators' tokens is noted.
const NOTE: Duration = Duration::from_secs(60);
/// How often a watched folder is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Pause between questions to a log that is not ready.
const PAUSE: Duration = Duration::from_millis(100);

/// Waits until all that was ever acknowledged is applied: a long log may take longer than one question waits.
///
/// # Errors
///
/// When this member has stopped.
pub(crate) async fn ready(raft: &Raft) -> Result<Revision, ProposeError> {
    loop {
        match raft.read_index().await {
            Err(ProposeError::Refused(reason)) => {
                tracing::info!(%reason, "the log is not ready yet");
                tokio::time::sleep(PAUSE).await;
            }
            decided => return decided,
        }
    }
}

/// What goes on by itself, on `tasks` until `stop`.
pub(crate) fn start(
    config: &Config,
    started: &Started,
    metrics: &sources::Metrics,
    clock: &Clock,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    tasks.spawn(prune(started.raft.clone(), clock.clone(), stop.clone()));
    let consul = config.consul.as_ref();
    sources::consul::start(consul, &started.raft, clock, &metrics.consul, tasks, stop);
    let mesh = (&started.raft, &started.snapshots);
    sources::export::start(consul, mesh, clock, &metrics.export, tasks, stop);
    for folder in &config.folders {
        let log = (started.raft.clone(), started.snapshots.clone());
        watch_folder(folder.clone(), log, clock.clone(), tasks, stop);
    }
}

/// Removes join tokens that have ended, and revocations that nothing depends on any more, until `stop`.
async fn prune(raft: Raft, clock: Clock, stop: CancellationToken) {
    let mut looks = tokio::time::interval(PRUNE);
    while stop.run_until_cancelled(looks.tick()).await.is_some() {
        let before = unix_seconds(clock());
        let Ok(view) = raft.view().await else { return };
        let ended = view.ca.has_ended(before);
        drop(view);
        if ended && let Err(error) = raft.propose(&Command::Ca(CaCommand::Prune { before })).await {
            tracing::info!(%error, "ended join tokens are removed later");
        }
    }
}

/// Notes which tokens of operators were used, until `stop`: at most once an hour for each.
pub(crate) async fn note_use(gate: Gate, raft: Raft, clock: Clock, stop: CancellationToken) {
    let mut looks = tokio::time::interval(NOTE);
    while stop.run_until_cancelled(looks.tick()).await.is_some() {
        let ids = gate.take_used();
        if ids.is_empty() {
            continue;
        }
        let used = AccessCommand::Used { ids, at: unix_seconds(clock()) };
        // What is not noted now is noted at the next use.
        if let Err(error) = raft.propose(&Command::Access(used)).await {
            tracing::info!(%error, "the use of tokens is noted later");
        }
    }
}

/// Keeps the mesh's objects like the files of a folder, on `tasks` until `stop`. Only the leader's word counts.
fn watch_folder(
    path: PathBuf,
    (raft, snapshots): (Raft, watch::Receiver<Arc<Snapshot>>),
    clock: Clock,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let name = path.display().to_string();
    let author = format!("folder {name}");
    let (commands, mut due) = mpsc::channel(1);
    tasks.spawn(file::watch(Folder::of_objects(&name), path, LOOK, snapshots, commands, stop.clone()));
    let stop = stop.clone();
    tasks.spawn(async move {
        while let Some(Some(command)) = stop.run_until_cancelled(due.recv()).await {
            if !raft.status().borrow().leading {
                continue;
            }
            let since = clock().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            let time_ms = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
            let batch = Batch { time_ms, author: author.clone(), commands: vec![command] };
            match raft.propose(&Command::Registry(batch)).await {
                Ok((revision, _)) => tracing::info!(folder = name, revision = revision.0, "folder followed"),
                // The next look finds the same difference.
                Err(error) => tracing::warn!(folder = name, %error, "folder not followed yet"),
            }
        }
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;
    use std::time::SystemTime;

    use ca::identity::TrustDomain;

    use super::*;
    use crate::raft::Place;
    use crate::raft::metrics::Metrics;
    use crate::raft::node::Settings;

    #[expect(clippy::disallowed_methods, reason = "a test's one clock")]
    pub(crate) fn clock() -> Clock {
        Arc::new(SystemTime::now)
    }

    /// A log in a folder, ready.
    pub(crate) async fn log(data_dir: &Path, stop: &CancellationToken) -> Started {
        let place = Place { data_dir, trust_domain: &TrustDomain::default() };
        let metrics = Metrics::registered(&mut prometheus_client::registry::Registry::default());
        let (mut random, now) = (fastrand::Rng::new(), tokio::time::Instant::now().into_std());
        let started =
            crate::raft::Raft::start(place, Settings::new(1, 1), metrics, &mut random, now, stop.clone());
        let started = started.unwrap();
        ready(&started.raft).await.unwrap();
        started
    }

    #[tokio::test]
    async fn the_mesh_follows_a_watched_folder() {
        let (data, watched) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let started = log(data.path(), &stop).await;
        let log = (started.raft.clone(), started.snapshots.clone());
        watch_folder(watched.path().to_owned(), log, clock(), &tasks, &stop);
        let yaml = "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: a}, spec: {host: a}}";
        std::fs::write(watched.path().join("a.yaml"), yaml).unwrap();
        let mut snapshots = started.snapshots;
        let followed = snapshots.wait_for(|snapshot| snapshot.objects().count() == 1);
        assert!(tokio::time::timeout(LOOK * 20, followed).await.unwrap().is_ok());
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        started.thread.join().await.unwrap();
    }
}
