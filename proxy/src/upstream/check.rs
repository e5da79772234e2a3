//! Active health checks: endpoints are asked whether they serve. [`Session`] is pure: results go in, what is known of the
//! endpoint and when to ask again come out. `probe` asks once; `run` drives both for one endpoint.

mod probe;

use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};

use super::host::Known;
use super::{Host, Upstream};
use crate::metrics::{Counter, Registry};
use crate::xds::cluster::endpoint::{ClusterLoadAssignment, Endpoint};
use crate::xds::cluster::health_check::{HealthCheck, Pace};
use crate::xds::decode::Address;
use probe::Kept;

/// What Envoy counts of a cluster's checks.
#[derive(Debug)]
pub struct Stats {
    attempt: Rc<Counter>,
    success: Rc<Counter>,
    failure: Rc<Counter>,
    network_failure: Rc<Counter>,
    healthy: Rc<Counter>,
    degraded: Rc<Counter>,
}

impl Stats {
    pub(super) fn new(registry: &Registry, cluster: &str) -> Self {
        let labels = [("cluster_name", cluster)];
        Self {
            attempt: registry.counter("envoy_cluster_health_check_attempt", &labels),
            success: registry.counter("envoy_cluster_health_check_success", &labels),
            failure: registry.counter("envoy_cluster_health_check_failure", &labels),
            network_failure: registry.counter("envoy_cluster_health_check_network_failure", &labels),
            healthy: registry.gauge("envoy_cluster_health_check_healthy", &labels),
            degraded: registry.gauge("envoy_cluster_health_check_degraded", &labels),
        }
    }

    fn count(&self, verdict: Verdict) {
        match verdict {
            Verdict::Serves { .. } => self.success.inc(),
            Verdict::Refuses | Verdict::Retriable => self.failure.inc(),
            Verdict::Silent | Verdict::Late => {
                self.failure.inc();
                self.network_failure.inc();
            }
        }
    }

    /// The gauges in which an endpoint counts.
    fn gauges(&self, standing: Standing) -> [Option<&Rc<Counter>>; 2] {
        match standing {
            Standing::Healthy => [Some(&self.healthy), None],
            Standing::Degraded => [Some(&self.healthy), Some(&self.degraded)],
            Standing::Failed | Standing::Late | Standing::Unknown => [None, None],
        }
    }
}

/// An endpoint's place in gauges, until it is dropped.
#[derive(Default)]
struct Gauged([Option<Rc<Counter>>; 2]);

impl Gauged {
    fn set(&mut self, gauges: [Option<&Rc<Counter>>; 2]) {
        self.0.iter().flatten().for_each(|old| old.sub(1));
        self.0 = gauges.map(Option::<&Rc<Counter>>::cloned);
        self.0.iter().flatten().for_each(|new| new.inc());
    }
}

impl Drop for Gauged {
    fn drop(&mut self) {
        self.set([None, None]);
    }
}

/// The checks of a cluster's endpoints, each by a task of its own.
#[derive(Debug, Default)]
pub(super) struct Checks(BTreeMap<Address, Check>);

#[derive(Debug)]
struct Check {
    endpoint: Arc<Endpoint>,
    checked: Arc<Checked>,
    _stop: DropGuard,
}

impl Checks {
    /// Begins to check endpoints that are new, and lets go of those that went.
    pub(super) fn follow(&mut self, upstream: &Upstream, endpoints: &ClusterLoadAssignment) {
        let checked = endpoints.endpoints().filter(|e| !e.disable_health_check);
        let wanted: BTreeMap<&Address, &Arc<Endpoint>> = checked.map(|e| (&e.address, e)).collect();
        self.0
            .retain(|address, check| wanted.get(address).is_some_and(|e| is_checked_as(&check.endpoint, e)));
        for (address, endpoint) in wanted {
            if !self.0.contains_key(address) {
                self.0.insert(address.clone(), start(upstream, endpoint));
            }
        }
    }

    /// Whether each was checked once.
    pub(super) fn are_known(&self) -> bool {
        self.0.values().all(|check| check.checked.standing() != Standing::Unknown)
    }
}

fn is_checked_as(old: &Endpoint, new: &Endpoint) -> bool {
    old.health_check_port == new.health_check_port
        && old.health_check_hostname == new.health_check_hostname
        && old.transport_metadata() == new.transport_metadata()
}

fn start(upstream: &Upstream, endpoint: &Arc<Endpoint>) -> Check {
    let checked = upstream.state.checked(&endpoint.address);
    let stop = CancellationToken::new();
    let check = Check {
        endpoint: Arc::clone(endpoint),
        checked: Arc::clone(&checked),
        _stop: stop.clone().drop_guard(),
    };
    let (me, host) = (Weak::clone(&upstream.me), target(upstream, endpoint));
    upstream.shared.tasks.spawn_local(async move {
        stop.run_until_cancelled(run(me, host, checked)).await;
    });
    check
}

/// The endpoint, where it is checked.
fn target(upstream: &Upstream, endpoint: &Arc<Endpoint>) -> Rc<Host> {
    let port = endpoint.health_check_port.or(upstream.config.health_check.as_ref().and_then(|c| c.port));
    let known = Known { outlier: upstream.state.outlier(&endpoint.address), checked: None };
    let mut host = Host::new(endpoint, &upstream.config, known, &upstream.shared.standard);
    if let (Some(port), Some(host)) = (port, Rc::get_mut(&mut host)) {
        match &mut host.address {
            Address::Socket(address) => address.set_port(port),
            Address::Name(_, own) => *own = port,
            Address::Pipe(_) => {}
        }
    }
    host
}

/// Checks an endpoint again and again, until its cluster is gone.
async fn run(upstream: Weak<Upstream>, host: Rc<Host>, checked: Arc<Checked>) {
    let Some(config) = upstream.upgrade().map(|u| Arc::clone(&u.config)) else { return };
    let Some(settings) = &config.health_check else { return };
    let mut session = Session::resume(checked.standing());
    let (mut gauged, mut kept, mut rng) = (Gauged::default(), Kept::default(), fastrand::Rng::new());
    tokio::time::sleep(settings.pace.initial_jitter.mul_f64(rng.f64())).await;
    loop {
        let pause = {
            let Some(upstream) = upstream.upgrade() else { return };
            let verdict = once(&upstream, &host, settings, &mut kept).await;
            let step = session.on_verdict(verdict, settings, upstream.state.had_traffic());
            if let Some(stats) = &upstream.stats.checks {
                stats.count(verdict);
                gauged.set(stats.gauges(step.standing));
            }
            upstream.on_check(&host, &checked, verdict, step.standing);
            step.pause
        };
        tokio::time::sleep(jittered(pause, &settings.pace, (rng.f64(), rng.f64()))).await;
    }
}

async fn once(upstream: &Upstream, host: &Host, settings: &HealthCheck, kept: &mut Kept) -> Verdict {
    if let Some(stats) = &upstream.stats.checks {
        stats.attempt.inc();
    }
    let asked = Box::pin(probe::ask(upstream, host, &settings.kind, kept));
    let verdict = match tokio::time::timeout(settings.timeout, asked).await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(error)) => {
            tracing::debug!(cluster = %upstream.config.name, host = %host.text, error, "no answer to a check");
            Verdict::Silent
        }
        Err(_) => Verdict::Late,
    };
    if !settings.reuse_connection {
        *kept = Kept::Nothing;
    }
    verdict
}

impl Standing {
    /// Whether it gets requests, if only where no other endpoint is healthy.
    #[must_use]
    pub fn serves(self) -> bool {
        matches!(self, Self::Healthy | Self::Degraded)
    }
}

/// What checks found out about one endpoint; all workers read it.
#[derive(Debug)]
pub struct Checked(AtomicU8);

/// What is known of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is not checked, or it serves.
    Healthy,
    /// It serves, and says that others serve better.
    Degraded,
    /// It does not serve.
    Failed,
    /// It does not serve, and its last check got no answer in time.
    Late,
    /// It was not checked yet.
    Unknown,
}

impl Checked {
    /// An endpoint of which this is known when its checks begin.
    #[must_use]
    pub fn new(standing: Standing) -> Self {
        Self(AtomicU8::new(standing as u8))
    }

    /// What is known.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let all = [Standing::Healthy, Standing::Degraded, Standing::Failed, Standing::Late];
        let known = self.0.load(Ordering::Acquire);
        all.into_iter().find(|s| *s as u8 == known).unwrap_or(Standing::Unknown)
    }

    /// Notes what is known; tells whether that is new.
    pub fn set(&self, standing: Standing) -> bool {
        self.0.swap(standing as u8, Ordering::AcqRel) != standing as u8
    }
}

/// How one check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The endpoint serves; `degraded`: it says that others serve better.
    Serves {
        /// Whether it says so.
        degraded: bool,
    },
    /// It says that it does not serve.
    Refuses,
    /// It gave an answer that may pass.
    Retriable,
    /// No answer: no connection, or a reset.
    Silent,
    /// No answer in time.
    Late,
}

/// What a check changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is known now.
    pub standing: Standing,
    /// When the next check begins, before chance.
    pub pause: Duration,
}

/// The checks of one endpoint so far.
#[derive(Debug)]
pub struct Session {
    standing: Standing,
    successes: u32,
    failures: u32,
}

impl Session {
    /// The checks of an endpoint of which this is known.
    #[must_use]
    pub fn resume(standing: Standing) -> Self {
        Self { standing, successes: 0, failures: 0 }
    }

    /// Takes the result of a check. `traffic`: the cluster has had a connection.
    pub fn on_verdict(&mut self, verdict: Verdict, settings: &HealthCheck, traffic: bool) -> Step {
        let pending = match verdict {
            Verdict::Serves { degraded } => self.on_success(degraded, settings),
            Verdict::Refuses => self.on_failure(Standing::Failed, 1),
            Verdict::Retriable | Verdict::Silent => {
                self.on_failure(Standing::Failed, settings.unhealthy_threshold)
            }
            Verdict::Late => self.on_failure(Standing::Late, settings.unhealthy_threshold),
        };
        let served = matches!(verdict, Verdict::Serves { .. });
        Step { standing: self.standing, pause: pause(&settings.pace, served, pending, traffic) }
    }

    /// `true` when a change needs more results.
    fn on_success(&mut self, degraded: bool, settings: &HealthCheck) -> bool {
        self.failures = 0;
        if matches!(self.standing, Standing::Failed | Standing::Late) {
            self.successes += 1;
            if self.successes < settings.healthy_threshold {
                return true;
            }
        }
        // the first success of all is enough
        self.standing = if degraded { Standing::Degraded } else { Standing::Healthy };
        false
    }

    /// As [`Self::on_success`]. So many failures in a row put an endpoint that serves out; one that never served is out
    /// in any case.
    fn on_failure(&mut self, out: Standing, threshold: u32) -> bool {
        self.successes = 0;
        if self.standing.serves() {
            self.failures += 1;
            if self.failures < threshold {
                return true;
            }
        }
        self.standing = out;
        false
    }
}

/// `served` is the check's own result, whatever is known of the endpoint.
fn pause(pace: &Pace, served: bool, pending: bool, traffic: bool) -> Duration {
    match (traffic, served, pending) {
        (true, true, false) => pace.healthy,
        (true, true, true) => pace.healthy_edge,
        (true, false, false) => pace.unhealthy,
        (true, false, true) => pace.unhealthy_edge,
        (false, true, false) => pace.no_traffic_healthy,
        (false, _, _) => pace.no_traffic,
    }
}

/// A pause with its chance. `draws` are two numbers from 0 to 1.
#[must_use]
pub fn jittered(pause: Duration, pace: &Pace, draws: (f64, f64)) -> Duration {
    let share = f64::from(pace.jitter_percent) / 100.0 * draws.0;
    pause + pause.mul_f64(share) + pace.jitter.mul_f64(draws.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xds::cluster::health_check::CheckKind;

    fn settings() -> HealthCheck {
        let secs = Duration::from_secs;
        let pace = Pace {
            healthy: secs(1),
            healthy_edge: secs(2),
            unhealthy: secs(3),
            unhealthy_edge: secs(4),
            no_traffic_healthy: secs(5),
            no_traffic: secs(6),
            initial_jitter: secs(0),
            jitter: secs(2),
            jitter_percent: 50,
        };
        let kind = CheckKind::Tcp { send: bytes::Bytes::new(), receive: Box::default() };
        HealthCheck {
            timeout: secs(1),
            pace,
            unhealthy_threshold: 3,
            healthy_threshold: 2,
            port: None,
            reuse_connection: true,
            kind,
        }
    }

    const GOOD: Verdict = Verdict::Serves { degraded: false };

    /// Each verdict with what is known after it, and the seconds until the next check.
    #[track_caller]
    fn check(traffic: bool, steps: &[(Verdict, Standing, u64)]) {
        let (settings, mut session) = (settings(), Session::resume(Standing::Unknown));
        for (i, (verdict, standing, pause)) in steps.iter().enumerate() {
            let expected = Step { standing: *standing, pause: Duration::from_secs(*pause) };
            assert_eq!(session.on_verdict(*verdict, &settings, traffic), expected, "step {i}");
        }
    }

    #[test]
    fn the_first_result_of_all_is_enough() {
        check(true, &[(GOOD, Standing::Healthy, 1)]);
        check(true, &[(Verdict::Silent, Standing::Failed, 3)]);
        check(true, &[(Verdict::Late, Standing::Late, 3)]);
        check(
            true,
            &[(Verdict::Serves { degraded: true }, Standing::Degraded, 1), (GOOD, Standing::Healthy, 1)],
        );
    }

    #[test]
    fn failures_in_a_row_put_an_endpoint_out_and_successes_in_a_row_bring_it_back() {
        use Verdict::{Late, Retriable, Silent};
        check(
            true,
            &[
                (GOOD, Standing::Healthy, 1),
                (Silent, Standing::Healthy, 4),
                (Retriable, Standing::Healthy, 4),
                (GOOD, Standing::Healthy, 1),
                (Silent, Standing::Healthy, 4),
                (Late, Standing::Healthy, 4),
                (Silent, Standing::Failed, 3),
                (GOOD, Standing::Failed, 2),
                (Late, Standing::Late, 3),
                (GOOD, Standing::Late, 2),
                (GOOD, Standing::Healthy, 1),
            ],
        );
    }

    #[test]
    fn an_answer_that_says_so_puts_an_endpoint_out_at_once() {
        check(true, &[(GOOD, Standing::Healthy, 1), (Verdict::Refuses, Standing::Failed, 3)]);
    }

    #[test]
    fn a_cluster_that_nobody_uses_is_checked_seldom() {
        check(
            false,
            &[
                (GOOD, Standing::Healthy, 5),
                (Verdict::Refuses, Standing::Failed, 6),
                (GOOD, Standing::Failed, 6),
                (GOOD, Standing::Healthy, 5),
            ],
        );
    }

    #[test]
    fn chance_is_a_share_and_a_time_on_top() {
        let pace = settings().pace;
        let pause = |draws| jittered(Duration::from_secs(10), &pace, draws).as_secs();
        assert_eq!(
            [pause((0.0, 0.0)), pause((1.0, 0.0)), pause((0.0, 1.0)), pause((1.0, 1.0))],
            [10, 15, 12, 17]
        );
    }
}
