//! Keeps the mesh's services like those of Consul datacenters, while this member leads.
//!
//! What to ask and what to believe is decided by [`Datacenter`]; here it meets the log. A member that begins to lead
//! begins with what the state holds, so that it repeats nothing and removes nothing that it has not seen go.

use ca::renewal::Clock;
use prometheus_client::registry::Registry;
use registry::source::Catalog;
use registry::source::consul::convert::Mapping;
use registry::source::consul::datacenter::{Datacenter, Settings, Status};
use registry::source::consul::drive::{self, Connection, Proposal};
use registry::state::Batch;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Counters, Gauges, Labels, Turns};
use crate::config::consul::Consul;
use crate::raft::{Command, Raft};

/// The metrics of all datacenters.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    following: Gauges,
    age: Gauges,
    services: Gauges,
    endpoints: Gauges,
    held: Gauges,
    frozen: Gauges,
    problems: Gauges,
    questions: Counters,
    failures: Counters,
    published: Counters,
}

impl Metrics {
    /// Metrics that `registry` shows, under names that begin with `istiod_consul_`.
    pub(crate) fn registered(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let gauges = [
            ("following", "1 on the member that follows the datacenter", &metrics.following),
            (
                "age_seconds",
                "Time for which nothing was heard of the datacenter, while it does not answer",
                &metrics.age,
            ),
            ("services", "Services of the datacenter", &metrics.services),
            ("endpoints", "Endpoints of the datacenter's services", &metrics.endpoints),
            ("held_services", "Services that have vanished and are held until servers agree", &metrics.held),
            (
                "frozen",
                "1 while nothing is removed because the token does not allow to see everything",
                &metrics.frozen,
            ),
            ("problems", "Services and instances that have no place in the mesh", &metrics.problems),
        ];
        let counters = [
            ("questions", "Questions asked", &metrics.questions),
            ("failures", "Questions that failed, or whose answers were refused", &metrics.failures),
            ("published_services", "Changes of services that went into the log", &metrics.published),
        ];
        super::register(registry, "istiod_consul", &gauges, &counters);
        metrics
    }

    fn show(&self, labels: &Labels, before: &Status, status: &Status) {
        let gauges = [
            (&self.age, usize::try_from(status.age.as_secs()).unwrap_or(usize::MAX)),
            (&self.services, status.services),
            (&self.endpoints, status.endpoints),
            (&self.held, status.held),
            (&self.frozen, usize::from(status.frozen.is_some())),
            (&self.problems, status.problems.len()),
        ];
        let counters = [
            (&self.questions, before.questions, status.questions),
            (&self.failures, before.failures, status.failures),
            (&self.published, before.published, status.published),
        ];
        super::show(labels, &gauges, &counters);
    }
}

/// Follows every datacenter of the settings, on `tasks` until `stop`.
pub(crate) fn start(
    consul: Option<&Consul>,
    raft: &Raft,
    clock: &Clock,
    metrics: &Metrics,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    for (mapping, connection) in consul.into_iter().flat_map(Consul::datacenters) {
        let mut settings = Settings::new(mapping, connection.servers.len());
        if let Some(consul) = consul {
            (settings.watches, settings.fetches) = consul.questions();
            settings.wait = consul.wait;
        }
        let source = Source {
            settings,
            connection,
            raft: raft.clone(),
            clock: clock.clone(),
            metrics: metrics.clone(),
        };
        tasks.spawn(source.follow(stop.clone()));
    }
}

/// One datacenter, and where it goes.
struct Source {
    settings: Settings,
    connection: Connection,
    raft: Raft,
    clock: Clock,
    metrics: Metrics,
}

impl Source {
    /// Follows the datacenter whenever this member leads, until `stop`.
    async fn follow(self, stop: CancellationToken) {
        let Mapping { cluster, datacenter, .. } = &self.settings.mapping;
        let labels = Labels { datacenter: format!("{cluster}/{datacenter}") };
        let mut turns = Turns { leads: self.raft.status(), stop };
        while let Some((term, turn)) = turns.begin().await {
            self.metrics.following.get_or_create(&labels).set(1);
            tracing::info!(datacenter = labels.datacenter, term, "following a Consul datacenter");
            let ((), goes_on) = tokio::join!(self.turn(&labels, turn.clone()), turns.end(term, turn));
            self.metrics.following.get_or_create(&labels).set(0);
            if !goes_on {
                return;
            }
        }
    }

    /// Follows it until `stop`.
    async fn turn(&self, labels: &Labels, stop: CancellationToken) {
        let Ok(view) = self.raft.view().await else { return };
        let seed = Catalog::of(&view.registry, &self.settings.mapping.source());
        drop(view);
        let now = tokio::time::Instant::now().into_std();
        let machine = Datacenter::new(self.settings.clone(), seed, fastrand::Rng::new(), now);
        let (proposals, due) = mpsc::channel(1);
        let (told, status) = watch::channel(Status::default());
        tokio::join!(
            drive::watch(machine, self.connection.clone(), proposals, told, stop.clone()),
            self.propose(labels, due, stop.clone()),
            self.tell(labels, status, stop),
        );
    }

    async fn propose(&self, labels: &Labels, mut due: mpsc::Receiver<Proposal>, stop: CancellationToken) {
        let author = format!("consul {}", labels.datacenter);
        while let Some(Some(Proposal { commands, done })) = stop.run_until_cancelled(due.recv()).await {
            let since = (self.clock)().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            let time_ms = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
            let batch = Batch { time_ms, author: author.clone(), commands };
            let proposed = self.raft.propose(&Command::Registry(batch)).await;
            if let Err(error) = &proposed {
                tracing::info!(datacenter = labels.datacenter, %error, "not followed yet");
            }
            // Whoever asked may have ended meanwhile.
            done.send(proposed.is_ok()).unwrap_or_default();
        }
    }

    /// Shows the status in metrics, and its turns in the log.
    async fn tell(&self, labels: &Labels, mut status: watch::Receiver<Status>, stop: CancellationToken) {
        let mut before = Status::default();
        while let Some(Ok(())) = stop.run_until_cancelled(status.changed()).await {
            let now = status.borrow_and_update().clone();
            self.metrics.show(labels, &before, &now);
            report(&labels.datacenter, &before, &now);
            before = now;
        }
    }
}

/// One line for each turn of a datacenter's fortune.
fn report(datacenter: &str, before: &Status, now: &Status) {
    if now.synced && !before.synced {
        tracing::info!(
            datacenter,
            services = now.services,
            endpoints = now.endpoints,
            "Consul datacenter is read"
        );
    }
    match (&before.failure, &now.failure) {
        (None, Some(error)) => {
            tracing::warn!(datacenter, error, "Consul datacenter does not answer; what is known of it stays")
        }
        (Some(_), None) => tracing::info!(datacenter, "Consul datacenter answers again"),
        _ => {}
    }
    match (&before.frozen, &now.frozen) {
        (None, Some(error)) => {
            tracing::warn!(datacenter, error, "the token does not show everything; nothing is removed")
        }
        (Some(_), None) => tracing::info!(datacenter, "the token shows everything again"),
        _ => {}
    }
    match (before.held, now.held) {
        (0, held) if held > 0 => tracing::warn!(
            datacenter,
            held,
            "many services vanished at once; they are held until servers agree"
        ),
        (held, 0) if held > 0 => tracing::info!(datacenter, "no services are held any more"),
        _ => {}
    }
    for problem in now.problems.iter().filter(|problem| !before.problems.contains(problem)) {
        tracing::info!(datacenter, problem, "something of Consul has no place in the mesh");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_count_on_from_what_was_shown() {
        let metrics = Metrics::registered(&mut Registry::default());
        let labels = Labels { datacenter: "c/dc1".to_owned() };
        let first = Status { questions: 5, services: 2, ..Status::default() };
        metrics.show(&labels, &Status::default(), &first);
        metrics.show(&labels, &first, &Status { questions: 7, frozen: Some("403".into()), ..first.clone() });
        assert_eq!(metrics.questions.get_or_create(&labels).get(), 7);
        assert_eq!(metrics.frozen.get_or_create(&labels).get(), 1);
        assert_eq!(metrics.services.get_or_create(&labels).get(), 2);
    }
}
