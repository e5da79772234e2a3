//! Which agents are alive: signs of life stay in memory, and only what follows from their absence enters the log.
//!
//! Every member notes whom it heard. The leader holds the leases, and asks the others now and then whom they heard; a
//! new leader begins with a fresh lease for every registered workload: who was not heard yet is not known to be silent.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ca::renewal::Clock;
use registry::lease::Leases;
use registry::state::{Batch, Command as Change, State, WorkloadKey};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Silence;
use crate::raft::peers::links::Connected;
use crate::raft::wire::{HeardAgent, LoadRequest};
use crate::raft::{Command, Raft};

/// The leader asks the others at least this often whom they heard.
const ASK: Duration = Duration::from_secs(5);
/// Pause after the log could not be written.
const PAUSE: Duration = Duration::from_secs(1);

/// The leases of the workloads whose agents talk to this member. A handle; clones see the same.
#[derive(Debug, Clone)]
pub(crate) struct Liveness {
    term: Duration,
    leases: Arc<Mutex<Leases>>,
    /// When this member itself heard each agent last, and in which session.
    spoken: Arc<Mutex<BTreeMap<WorkloadKey, (String, Instant)>>>,
    added: Arc<Notify>,
}

impl Liveness {
    /// A fresh lease for every workload that is registered.
    pub(crate) fn new(silence: Silence, state: &State) -> Self {
        let leases = Arc::new(Mutex::new(Leases::new(silence.remove_after)));
        let liveness = Self { term: silence.lease, leases, spoken: Arc::default(), added: Arc::default() };
        liveness.begin(state);
        liveness
    }

    /// A fresh lease for every workload that is registered.
    fn begin(&self, state: &State) {
        for (key, registration) in state.workloads() {
            self.leases().hold(key.clone(), registration.session.clone(), self.term, now());
        }
        self.added.notify_one();
    }

    /// How long an agent may be silent.
    pub(crate) fn term(&self) -> Duration {
        self.term
    }

    /// The agent of `key` registered.
    pub(crate) fn hold(&self, key: WorkloadKey, session: String) {
        self.spoken().insert(key.clone(), (session.clone(), Instant::now()));
        self.leases().hold(key, session, self.term, now());
        self.added.notify_one();
    }

    /// The agent of a registered workload was heard.
    pub(crate) fn heard(&self, key: &WorkloadKey, session: &str) {
        self.spoken().insert(key.clone(), (session.to_owned(), Instant::now()));
        self.renew(key, session);
    }

    /// The agent of a registered workload was heard here or elsewhere.
    fn renew(&self, key: &WorkloadKey, session: &str) {
        let known = self.leases().renew(key, session, now());
        if !known {
            self.leases().hold(key.clone(), session.to_owned(), self.term, now());
            self.added.notify_one();
        }
    }

    /// The agents that this member itself heard within a time.
    pub(crate) fn spoke(&self, within: Duration) -> Vec<HeardAgent> {
        let (mut spoken, now) = (self.spoken(), Instant::now());
        // Who was silent for longer than anybody asks for is not remembered.
        spoken.retain(|_, (_, at)| now.duration_since(*at) <= within.max(self.term));
        let heard = spoken.iter().filter(|(_, (_, at))| now.duration_since(*at) <= within);
        let agent = |(key, (session, _)): (&WorkloadKey, &(String, Instant))| HeardAgent {
            namespace: key.namespace.to_string(),
            workload: key.name.to_string(),
            session: session.clone(),
        };
        heard.map(agent).collect()
    }

    /// The agent of `key` said good-bye.
    pub(crate) fn release(&self, key: &WorkloadKey, session: &str) {
        self.spoken().remove(key);
        self.leases().release(key, session);
    }

    fn spoken(&self) -> MutexGuard<'_, BTreeMap<WorkloadKey, (String, Instant)>> {
        self.spoken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While this member leads, proposes what follows from silence; until `stop`.
    pub(crate) async fn watch(
        self,
        raft: Raft,
        peers: Option<Connected>,
        clock: Clock,
        stop: CancellationToken,
    ) {
        let mut status = raft.status();
        loop {
            let leads = async { status.wait_for(|status| status.leading).await.is_ok() };
            if stop.run_until_cancelled(leads).await != Some(true) {
                return;
            }
            let Ok(view) = raft.view().await else { return };
            self.begin(&view.registry);
            drop(view);
            let mut role = raft.status();
            tokio::select! {
                () = stop.cancelled() => return,
                () = async { drop(role.wait_for(|status| !status.leading).await) } => {}
                () = self.ask(peers.clone()) => {}
                () = self.decide(&raft, &clock) => {}
            }
        }
    }

    /// Proposes what follows from silence.
    async fn decide(&self, raft: &Raft, clock: &Clock) {
        loop {
            let next = self.leases().next_due().map(Instant::from_std);
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.added.notified() => continue,
                () = due => {}
            }
            let commands = self.leases().due(now());
            if !commands.is_empty() {
                tell(&commands);
                propose(raft, clock, commands).await;
            }
        }
    }

    /// Asks the other members whom they heard, again and again.
    async fn ask(&self, peers: Option<Connected>) {
        let Some(peers) = peers else { return std::future::pending().await };
        let every = (self.term / 4).min(ASK);
        // What was said between two questions is told twice rather than never.
        let within = u64::try_from((every * 3).as_millis()).unwrap_or(u64::MAX);
        let mut asks = tokio::time::interval(every.max(Duration::from_millis(1)));
        loop {
            asks.tick().await;
            let answers = peers.all().into_values().map(|mut client| async move {
                let asked = client.load(LoadRequest { heard_within_ms: within });
                tokio::time::timeout(every, asked).await.ok()?.ok()
            });
            for reply in futures::future::join_all(answers).await.into_iter().flatten() {
                for agent in reply.into_inner().heard {
                    let key = WorkloadKey { namespace: agent.namespace, name: agent.workload };
                    self.renew(&key, &agent.session);
                }
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
        tasks.spawn(liveness.watch(started.raft.clone(), None, clock(), stop.clone()));
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
