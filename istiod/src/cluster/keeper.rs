//! The leader's hand: does what [`plan`] says. Runs on every member and acts while it leads.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::ClusterOutcome;
use super::plan::{self, Step};
use crate::raft::node::{Progress, Status};
use crate::raft::{Command, Outcome, Raft};

/// How often the leader looks.
const LOOK: Duration = Duration::from_millis(200);
/// A member that was heard within this time is there: Raft itself forgets it in every election timeout.
const HEARD: Duration = Duration::from_secs(3);

/// Keeps Raft's members as the log says, until `stop`.
pub async fn keep(raft: Raft, stop: CancellationToken) {
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (status, cluster) = (raft.status(), raft.cluster());
    let mut heard = Heard::default();
    let mut told = None;
    while stop.run_until_cancelled(looks.tick()).await.is_some() {
        // The log's members may be newer than Raft's, never older: so Raft's are looked at first.
        let status = status.borrow().clone();
        if !status.leading {
            heard = Heard::default();
            continue;
        }
        let progress = heard.see(&status, Instant::now());
        let members = cluster.borrow().clone();
        let step = plan::next(&members, &status, &progress);
        if let Step::Wait(why) = &step
            && told != *why
        {
            if let Some(why) = why {
                tracing::warn!(reason = why, "the members do not change yet");
            }
            told.clone_from(why);
        }
        if stop.run_until_cancelled(act(&raft, step)).await.is_none() {
            return;
        }
    }
}

async fn act(raft: &Raft, step: Step) {
    match step {
        Step::Wait(_) => {}
        Step::Change(change) => {
            if let Err(error) = raft.change_members(change).await {
                tracing::info!(%error, "the members are changed later");
            }
        }
        Step::Transfer(to) => {
            tracing::info!(member = to, "leadership moves, because this member shall not vote");
            raft.transfer(to);
        }
        Step::Propose(command) => match raft.propose(&Command::Cluster(command)).await {
            Ok((_, Outcome::Cluster(ClusterOutcome::Refused(refusal)))) => {
                tracing::info!(error = %refusal, "other voters are asked for later");
            }
            Ok(_) => {}
            Err(error) => tracing::info!(%error, "other voters are asked for later"),
        },
    }
}

/// When each member was last known to be there.
#[derive(Default)]
struct Heard {
    at: BTreeMap<u64, Instant>,
}

impl Heard {
    /// How far the members are, with those as active that were heard of late.
    fn see(&mut self, status: &Status, now: Instant) -> BTreeMap<u64, Progress> {
        let active = status.progress.iter().filter(|(_, progress)| progress.active);
        self.at.extend(active.map(|(id, _)| (*id, now)));
        let seen = |id: &u64| self.at.get(id).is_some_and(|at| now.duration_since(*at) <= HEARD);
        let progress = status.progress.iter();
        progress.map(|(id, progress)| (*id, Progress { active: seen(id), ..*progress })).collect()
    }
}
