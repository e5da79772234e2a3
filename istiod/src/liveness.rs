//! Which agents are alive: signs of life stay in memory, and only what follows from their absence enters the log.
//!
//! The member that serves the agents holds their leases. It starts with a fresh lease for every registered workload:
//! who was not heard yet is not known to be silent.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ca::renewal::Clock;
use registry::lease::Leases;
use registry::state::{Batch, Command as Change, State, WorkloadKey};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Silence;
use crate::raft::{Command, Raft};

/// Pause after the log could not be written.
const PAUSE: Duration = Duration::from_secs(1);

/// The leases of the workloads whose agents talk to this member. A handle; clones see the same.
#[derive(Debug, Clone)]
pub(crate) struct Liveness {
    term: Duration,
    leases: Arc<Mutex<Leases>>,
    added: Arc<Notify>,
}

impl Liveness {
    /// A fresh lease for every workload that is registered.
    pub(crate) fn new(silence: Silence, state: &State) -> Self {
        let leases = Arc::new(Mutex::new(Leases::new(silence.remove_after)));
        let liveness = Self { term: silence.lease, leases, added: Arc::default() };
        for (key, registration) in state.workloads() {
            liveness.hold(key.clone(), registration.session.clone());
        }
        liveness
    }

    /// How long an agent may be silent.
    pub(crate) fn term(&self) -> Duration {
        self.term
    }

    /// The agent of `key` registered.
    pub(crate) fn hold(&self, key: WorkloadKey, session: String) {
        self.leases().hold(key, session, self.term, now());
        self.added.notify_one();
    }

    /// The agent of a registered workload was heard.
    pub(crate) fn heard(&self, key: &WorkloadKey, session: &str) {
        let known = self.leases().renew(key, session, now());
        if !known {
            self.hold(key.clone(), session.to_owned());
        }
    }

    /// The agent of `key` said good-bye.
    pub(crate) fn release(&self, key: &WorkloadKey, session: &str) {
        self.leases().release(key, session);
    }

    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Proposes what follows from silence, until `stop`.
    pub(crate) async fn watch(self, raft: Raft, clock: Clock, stop: CancellationToken) {
        loop {
            let next = self.leases().next_due().map(Instant::from_std);
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.added.notified() => continue,
                () = due => {}
            }
            let commands = self.leases().due(now());
            if commands.is_empty() {
                continue;
            }
            tell(&commands);
            if stop.run_until_cancelled(propose(&raft, &clock, commands)).await.is_none() {
                return;
            }
        }
    }
}

fn tell(commands: &[Change]) {
    for command in commands {
        if let Change::WorkloadHealth { key, .. } = command {
            tracing::warn!(workload = %key.name, namespace = %key.namespace, "the agent is silent, its workload is sent no traffic");
        } else if let Change::RemoveWorkload { key, .. } = command {
            tracing::warn!(workload = %key.name, namespace = %key.namespace, "the agent stayed silent, its workload is removed");
        }
    }
}

/// Tries until the log has it: every command names its session, so a late one does no harm.
async fn propose(raft: &Raft, clock: &Clock, commands: Vec<Change>) {
    let since = clock().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let time_ms = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
    let command = Command::Registry(Batch { time_ms, author: "leases".to_owned(), commands });
    while let Err(error) = raft.propose(&command).await {
        tracing::warn!(%error, "what follows from silent agents is not in the log yet");
        tokio::time::sleep(PAUSE).await;
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use registry::source::vm::{self, Join};
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::upkeep::tests::{clock, log};

    #[tokio::test]
    async fn a_registration_without_signs_of_life_is_unhealthy_and_then_gone_also_after_a_restart() {
        let data = tempfile::tempdir().unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let started = log(data.path(), &stop).await;
        let join = Join {
            namespace: "shop".into(),
            service_account: "pay".into(),
            workload: "w".into(),
            address: IpAddr::from([10, 0, 0, 1]),
            ports: [].into(),
            labels: [].into(),
            network: String::new(),
            locality: String::new(),
            cluster: String::new(),
            instance: String::new(),
            session: "s".into(),
            lease: Duration::ZERO,
        };
        let registration = Arc::new(vm::register(None, &join).unwrap());
        let key = registration.key();
        let commands = vec![Change::RegisterWorkload { registration }];
        let batch = Batch { time_ms: 0, author: String::new(), commands };
        started.raft.propose(&Command::Registry(batch)).await.unwrap();

        let short = Duration::from_millis(200);
        let silence = Silence { lease: short, remove_after: short };
        // As after a restart: nobody has been heard.
        let liveness = Liveness::new(silence, &started.raft.view().await.unwrap().registry);
        tasks.spawn(liveness.watch(started.raft.clone(), clock(), stop.clone()));
        let mut snapshots = started.snapshots;
        let healthy = |snapshot: &registry::snapshot::Snapshot| {
            let workload = snapshot.workload(&key);
            workload.and_then(|workload| workload.registration.as_ref().map(|r| r.healthy))
        };
        assert_eq!(healthy(&snapshots.borrow()), Some(true));
        let patience = Duration::from_secs(20);
        for expected in [Some(false), None] {
            let reached = snapshots.wait_for(|snapshot| healthy(snapshot) == expected);
            assert!(tokio::time::timeout(patience, reached).await.unwrap().is_ok());
        }
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        started.thread.join().await.unwrap();
    }
}
