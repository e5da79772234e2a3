//! What the service manager is told (sd_notify(3)): that this member serves, that it is alive, that it ends. Without a
//! service manager all of it is a no-op.

use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use crate::raft::Raft;

/// Tells that the member is ready, and then that it is alive for as long as the log's driver answers; until `stop`, which
/// it tells too.
pub(crate) async fn keep(raft: Raft, stop: CancellationToken) {
    tell(&[NotifyState::Ready, NotifyState::Status("serving")]);
    stop.run_until_cancelled(signs_of_life(&raft)).await;
    stop.cancelled().await;
    tell(&[NotifyState::Stopping]);
}

async fn signs_of_life(raft: &Raft) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let every = limit / 3;
    loop {
        match tokio::time::timeout(every, raft.view()).await {
            Ok(Ok(_)) => tell(&[NotifyState::Watchdog]),
            Ok(Err(error)) => tracing::error!(%error, "the log's driver has ended"),
            Err(_) => tracing::error!(waited_ms = every.as_millis(), "the log's driver does not answer"),
        }
        tokio::time::sleep(every).await;
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}
