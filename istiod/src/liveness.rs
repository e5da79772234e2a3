//! Which agents are alive: signs of life stay in memory, and only what follows from their absence enters the log.
//!
//! Every member notes whom it heard. The leader holds the leases ([`Leases`] decides), asks the others now and then whom
//! they heard, and follows the state: who registered, who left, and whom an operator gave up. A new leader takes over
//! from the state what is known of those who are lost, and gives everybody else a fresh lease: who was not heard yet is
//! not known to be silent.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ca::renewal::Clock;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use registry::lease::{Count, Leases, Terms};
use registry::state::{Batch, Command as Change, Presence, WorkloadKey};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::raft::peers::links::Connected;
use crate::raft::wire::{HeardAgent, LoadRequest};
use crate::raft::{Command, Raft};

/// The leader asks the others at least this often whom they heard, and looks as often at who is registered.
const ASK: Duration = Duration::from_secs(5);
/// Pause after the log could not be read or written.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    agent: &'static str,
}

/// What the leader tells Prometheus of the leases. Clones count together.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    workloads: Family<Labels, Gauge>,
    held: Counter,
}

impl Metrics {
    /// Metrics that `registry` shows, under names that begin with `istiod_workloads`.
    pub(crate) fn registered(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let help = "Registered workloads by whether their agents are heard; told by the leader";
        registry.register("istiod_workloads", help, metrics.workloads.clone());
        let help = "Workloads that were held as unknown since their agents were lost with many others";
        registry.register("istiod_workloads_held", help, metrics.held.clone());
        metrics
    }

    fn show(&self, count: Count) {
        let Count { heard, silent, unknown } = count;
        for (agent, count) in [("heard", heard), ("silent", silent), ("unknown", unknown)] {
            self.workloads.get_or_create(&Labels { agent }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Only who leads knows.
    fn hide(&self) {
        self.workloads.clear();
    }
}

/// The leases of the registered workloads, and whom this member heard. A handle; clones see the same.
#[derive(Debug, Clone)]
pub(crate) struct Liveness {
    terms: Terms,
    /// Empty unless this member leads.
    leases: Arc<Mutex<Leases>>,
    /// When this member itself heard each agent last, and in which session.
    spoken: Arc<Mutex<BTreeMap<WorkloadKey, (String, Instant)>>>,
    metrics: Metrics,
}

impl Liveness {
    /// Nobody was heard yet.
    pub(crate) fn new(terms: Terms, metrics: Metrics) -> Self {
        let leases = Arc::new(Mutex::new(Leases::new(terms)));
        Self { terms, leases, spoken: Arc::default(), metrics }
    }

    /// How long an agent may be silent.
    pub(crate) fn term(&self) -> Duration {
        self.terms.lease
    }

    /// The agent of a registered workload was heard.
    pub(crate) fn heard(&self, key: &WorkloadKey, session: &str) {
        self.spoken().insert(key.clone(), (session.to_owned(), Instant::now()));
        self.leases().renew(key, session, now());
    }

    /// The agents that this member itself heard within a time.
    pub(crate) fn spoke(&self, within: Duration) -> Vec<HeardAgent> {
        let (mut spoken, now) = (self.spoken(), Instant::now());
        // Who was silent for longer than anybody asks for is not remembered.
        spoken.retain(|_, (_, at)| now.duration_since(*at) <= within.max(self.term()));
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
            let mut role = raft.status();
            let ended = tokio::select! {
                () = stop.cancelled() => true,
                () = async { drop(role.wait_for(|status| !status.leading).await) } => false,
                () = self.ask(peers.clone()) => false,
                () = self.decide(&raft, &clock) => true,
            };
            *self.leases() = Leases::new(self.terms);
            self.metrics.hide();
            if ended {
                return;
            }
        }
    }

    /// Proposes what follows from silence. Ends with the member.
    async fn decide(&self, raft: &Raft, clock: &Clock) {
        // What others committed may not be applied here yet, and who is lost is read from it.
        while let Err(error) = raft.read_index().await {
            tracing::debug!(%error, "the leases are not taken over yet");
            tokio::time::sleep(PAUSE).await;
        }
        loop {
            let Ok(view) = raft.view().await else { return };
            let time_ms = unix_ms(clock);
            let since =
                |then: i64| Duration::from_millis(u64::try_from(time_ms.saturating_sub(then)).unwrap_or(0));
            let (commands, next, count) = {
                let mut leases = self.leases();
                leases.follow(view.registry.workloads(), since, now());
                (leases.due(now()), leases.next_due(), leases.count())
            };
            drop(view);
            self.metrics.show(count);
            if !commands.is_empty() {
                self.tell(&commands);
                propose(raft, clock, commands).await;
                continue;
            }
            let look = Instant::now() + self.every();
            tokio::time::sleep_until(next.map_or(look, |next| look.min(Instant::from_std(next)))).await;
        }
    }

    fn tell(&self, commands: &[Change]) {
        let mut held = 0_u64;
        for command in commands {
            if let Change::WorkloadPresence { key, presence, .. } = command {
                let (workload, namespace) = (&key.name, &key.namespace);
                match presence {
                    Presence::Heard => {}
                    Presence::Unknown => held += 1,
                    Presence::Silent => {
                        tracing::warn!(%workload, %namespace, "the agent is silent, its workload is sent no traffic");
                    }
                    Presence::Released => {
                        tracing::warn!(%workload, %namespace, "the agent was lost for too long, its workload is sent no traffic");
                    }
                }
            } else if let Change::RemoveWorkload { key, .. } = command {
                tracing::warn!(workload = %key.name, namespace = %key.namespace, "the agent stayed silent, its workload is removed");
            }
        }
        if held > 0 {
            tracing::warn!(
                workloads = held,
                "many agents were lost at the same time, their workloads are held as unknown"
            );
            self.metrics.held.inc_by(held);
        }
    }

    /// How often the others are asked.
    fn every(&self) -> Duration {
        (self.term() / 4).min(ASK).max(Duration::from_millis(1))
    }

    /// Asks the other members whom they heard, again and again.
    async fn ask(&self, peers: Option<Connected>) {
        let Some(peers) = peers else { return std::future::pending().await };
        let every = self.every();
        // What was said between two questions is told twice rather than never.
        let within = u64::try_from((every * 3).as_millis()).unwrap_or(u64::MAX);
        let mut asks = tokio::time::interval(every);
        loop {
            asks.tick().await;
            let answers = peers.all().into_values().map(|mut client| async move {
                let asked = client.load(LoadRequest { heard_within_ms: within });
                tokio::time::timeout(every, asked).await.ok()?.ok()
            });
            for reply in futures::future::join_all(answers).await.into_iter().flatten() {
                for agent in reply.into_inner().heard {
                    let key = WorkloadKey { namespace: agent.namespace, name: agent.workload };
                    // Who is not known yet registers elsewhere at this moment, and is given a fresh lease.
                    self.leases().renew(&key, &agent.session, now());
                }
            }
        }
    }
}

/// Tries until the log has it: every command names its session, so a late one does no harm.
async fn propose(raft: &Raft, clock: &Clock, commands: Vec<Change>) {
    let command = Command::Registry(Batch { time_ms: unix_ms(clock), author: "leases".to_owned(), commands });
    while let Err(error) = raft.propose(&command).await {
        tracing::warn!(%error, "what follows from silent agents is not in the log yet");
        tokio::time::sleep(PAUSE).await;
    }
}

/// Milliseconds since 1970.
fn unix_ms(clock: &Clock) -> i64 {
    let since = clock().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::path::Path;

    use registry::lease::MassLoss;
    use registry::snapshot::Snapshot;
    use registry::source::vm::{self, Join};
    use tokio::sync::watch;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::raft::RaftThread;
    use crate::upkeep::tests::{clock, log};

    /// A member that leads and has heard nobody, as after a restart.
    struct Member {
        raft: Raft,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        liveness: Liveness,
        thread: RaftThread,
        tasks: TaskTracker,
        stop: CancellationToken,
    }

    impl Member {
        async fn start(folder: &Path, terms: Terms) -> Self {
            let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
            let started = log(folder, &stop).await;
            let liveness = Liveness::new(terms, Metrics::default());
            let (raft, snapshots, thread) = (started.raft, started.snapshots, started.thread);
            tasks.spawn(liveness.clone().watch(raft.clone(), None, clock(), stop.clone()));
            Self { raft, snapshots, liveness, thread, tasks, stop }
        }

        async fn commit(&self, commands: Vec<Change>) {
            let batch = Batch { time_ms: unix_ms(&clock()), author: String::new(), commands };
            self.raft.propose(&Command::Registry(batch)).await.unwrap();
        }

        /// Waits until the agents of so many workloads are like this, and all others are gone.
        async fn until(&mut self, presence: Presence, workloads: usize) {
            let all = |snapshot: &Arc<Snapshot>| {
                let registered = snapshot.workloads().filter_map(|workload| workload.registration.as_ref());
                let all: Vec<Presence> = registered.map(|registration| registration.presence).collect();
                all == vec![presence; workloads]
            };
            let reached = tokio::time::timeout(Duration::from_secs(20), self.snapshots.wait_for(all)).await;
            assert!(reached.is_ok_and(|reached| reached.is_ok()), "{workloads} {presence:?}");
        }

        async fn stop(self) {
            self.stop.cancel();
            self.tasks.close();
            self.tasks.wait().await;
            self.thread.join().await.unwrap();
        }
    }

    fn register(number: u8) -> Change {
        let join = Join {
            namespace: "shop".into(),
            service_account: "pay".into(),
            workload: format!("w{number}"),
            address: IpAddr::from([10, 0, 0, number]),
            ports: [].into(),
            labels: [].into(),
            network: String::new(),
            locality: String::new(),
            cluster: String::new(),
            instance: String::new(),
            session: "s".into(),
            lease: Duration::ZERO,
        };
        Change::RegisterWorkload { registration: Arc::new(vm::register(None, &join).unwrap()) }
    }

    fn terms(least: usize) -> Terms {
        let short = Duration::from_millis(200);
        let mass_loss = MassLoss { share: 20, window: short, least, hold: Duration::from_secs(3600) };
        Terms { lease: short, remove_after: short, mass_loss }
    }

    #[tokio::test]
    async fn a_registration_without_signs_of_life_is_silent_and_then_gone() {
        let data = tempfile::tempdir().unwrap();
        let mut member = Member::start(data.path(), terms(2)).await;
        member.commit(vec![register(1)]).await;
        member.until(Presence::Heard, 1).await;
        member.until(Presence::Silent, 1).await;
        member.until(Presence::Heard, 0).await;
        member.stop().await;
    }

    #[tokio::test]
    async fn what_is_held_stays_held_after_a_restart_until_it_is_heard_or_given_up() {
        let data = tempfile::tempdir().unwrap();
        let mut member = Member::start(data.path(), terms(3)).await;
        member.commit((1..=3).map(register).collect()).await;
        member.until(Presence::Unknown, 3).await;
        assert_eq!(member.liveness.metrics.held.get(), 3);
        member.stop().await;

        let mut member = Member::start(data.path(), terms(3)).await;
        member.until(Presence::Unknown, 3).await;
        let view = member.raft.view().await.unwrap();
        let keys: Vec<WorkloadKey> = view.registry.workloads().map(|(key, _)| key.clone()).collect();
        drop(view);
        let session = || "s".to_owned();
        let heard = |key: &WorkloadKey| {
            member.liveness.heard(key, "s");
            Change::WorkloadHealth {
                key: key.clone(),
                session: session(),
                healthy: true,
                reason: String::new(),
            }
        };
        // One is heard, and falls silent for itself; the others are given up.
        let told = vec![heard(&keys[0])];
        member.commit(told).await;
        let given_up = keys[1..].iter().map(|key| Change::WorkloadPresence {
            key: key.clone(),
            session: session(),
            presence: Presence::Released,
        });
        member.commit(given_up.collect()).await;
        member.until(Presence::Heard, 0).await;
        member.stop().await;
    }
}
