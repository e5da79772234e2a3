//! Whether the application is ready, found out as by Kubernetes' readiness probes. [`Checked`] is pure: outcomes go in,
//! when to check again and what has changed come out. `ask` and `exec` check once; [`follow`] drives both.
//!
//! What is checked is the application and not its proxy: see [`Place`].

mod ask;
mod exec;
mod form;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use wire::mesh;

pub use self::form::{Check, Headers, HttpGet, Malformed, Probe};
use crate::Never;

/// When to check, and how much of what is found counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Before the first check.
    pub initial_delay: Duration,
    /// Time for one check.
    pub timeout: Duration,
    /// From the begin of one check to that of the next.
    pub period: Duration,
    /// Successes in a row until the application is healthy.
    pub successes: u32,
    /// Failures in a row until it is not.
    pub failures: u32,
}

/// What a check found; a failure says what.
pub type Outcome = Result<(), String>;

/// May the workload be sent traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// It may.
    pub healthy: bool,
    /// Why not; empty when it may, or nothing is known.
    pub reason: String,
}

impl Health {
    fn of(outcome: Outcome) -> Self {
        Self { healthy: outcome.is_ok(), reason: outcome.err().unwrap_or_default() }
    }
}

/// What is known of an application that is checked.
#[derive(Debug)]
pub struct Checked {
    pace: Pace,
    due: Instant,
    /// What the last checks found alike, and how many they were.
    run: (bool, u32),
    /// As it was told; nothing before.
    healthy: Option<bool>,
}

impl Checked {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(pace: Pace, now: Instant) -> Self {
        Self { pace, due: now + pace.initial_delay, run: (true, 0), healthy: None }
    }

    /// When to check next.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.due
    }

    /// The check that began at `begun` has ended. What is different from what was told before, if anything is.
    pub fn on_outcome(&mut self, outcome: Outcome, begun: Instant, now: Instant) -> Option<Health> {
        let good = outcome.is_ok();
        // A check that took longer than a period is not made up for.
        self.due = (begun + self.pace.period).max(now);
        let before = if self.run.0 == good { self.run.1 } else { 0 };
        self.run = (good, before.saturating_add(1));
        let enough = if good { self.pace.successes } else { self.pace.failures };
        if self.run.1 < enough || self.healthy == Some(good) {
            return None;
        }
        self.healthy = Some(good);
        Some(Health::of(outcome))
    }
}

/// Where the application is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The workload's address.
    pub address: IpAddr,
    /// Whether the proxy takes what comes to that address.
    pub captured: bool,
    /// Workload port to the address where the application listens.
    pub forward: BTreeMap<u16, SocketAddr>,
}

impl Place {
    /// Whom a probe of this host and port asks. Without a host it is the application itself: where its port is forwarded
    /// to; else with capture the workload's address, as Istio's agent has it; else the loopback address, since at the
    /// other one the proxy may listen.
    fn target(&self, host: &str, port: u16) -> (String, u16) {
        if !host.is_empty() {
            return (host.to_owned(), port);
        }
        match self.forward.get(&port) {
            Some(to) => (to.ip().to_string(), to.port()),
            None if self.captured => (self.address.to_string(), port),
            None if self.address.is_ipv6() => (Ipv6Addr::LOCALHOST.to_string(), port),
            None => (Ipv4Addr::LOCALHOST.to_string(), port),
        }
    }
}

/// What this machine says of checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checks {
    /// Its own probe, which outranks the group's.
    pub own: Option<Probe>,
    /// Whether commands may be run that the control plane names.
    pub exec: bool,
    /// Where the application is.
    pub place: Place,
}

/// How the application is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Not at all: it is healthy.
    Unchecked,
    /// By this.
    Checked(Probe),
    /// It would have to be, and cannot, for this reason: it is not healthy.
    Refused(String),
}

impl Checks {
    /// How the application is checked, when the control plane said this of it; nothing when nobody says anything.
    #[must_use]
    pub fn decide(&self, told: Option<mesh::Readiness>) -> Option<Readiness> {
        if let Some(own) = &self.own {
            return Some(Readiness::Checked(own.clone()));
        }
        let Some(probe) = told?.probe else { return Some(Readiness::Unchecked) };
        Some(match Probe::try_from(probe) {
            Ok(Probe { check: Check::Exec(_), .. }) if !self.exec => Readiness::Refused(
                "the probe of the group runs a command, which this machine does not allow (execProbes)"
                    .to_owned(),
            ),
            Ok(probe) => Readiness::Checked(probe),
            Err(malformed) => {
                Readiness::Refused(format!("the probe of the group cannot be carried out: {malformed}"))
            }
        })
    }
}

/// Checks the application as `readiness` says, always the latest, and tells `health` what changes.
pub(crate) async fn follow(
    place: &Place,
    mut readiness: watch::Receiver<Option<Readiness>>,
    health: &watch::Sender<Option<Health>>,
) -> Never {
    loop {
        let said = readiness.borrow_and_update().clone();
        tokio::select! {
            never = carry_out(place, said, health) => return never,
            // The other end is held by whoever holds this future.
            Ok(()) = readiness.changed() => {}
        }
    }
}

async fn carry_out(
    place: &Place,
    readiness: Option<Readiness>,
    health: &watch::Sender<Option<Health>>,
) -> Never {
    let outcome = match readiness {
        None => return std::future::pending().await,
        Some(Readiness::Checked(probe)) => return again_and_again(place, &probe, health).await,
        Some(Readiness::Unchecked) => Ok(()),
        Some(Readiness::Refused(reason)) => Err(reason),
    };
    tell(health, Health::of(outcome));
    std::future::pending().await
}

async fn again_and_again(place: &Place, probe: &Probe, health: &watch::Sender<Option<Health>>) -> Never {
    let mut checked = Checked::new(probe.pace, Instant::now());
    loop {
        tokio::time::sleep_until(checked.due()).await;
        let begun = Instant::now();
        let outcome = once(place, probe).await;
        tracing::debug!(?outcome, "probed");
        if let Some(changed) = checked.on_outcome(outcome, begun, Instant::now()) {
            tell(health, changed);
        }
    }
}

fn tell(health: &watch::Sender<Option<Health>>, changed: Health) {
    if changed.healthy {
        tracing::info!("the application is healthy");
    } else {
        tracing::warn!(reason = changed.reason, "the application is not healthy");
    }
    health.send_replace(Some(changed));
}

/// Checks once.
async fn once(place: &Place, probe: &Probe) -> Outcome {
    let asked = async {
        match &probe.check {
            Check::Http(get) => ask::http(place, get).await,
            Check::Tcp { host, port } => ask::tcp(place, host, *port).await,
            Check::Grpc { port, service } => ask::grpc(place, *port, service).await,
            Check::Exec(command) => exec::run(command).await,
        }
    };
    let outcome = tokio::time::timeout(probe.pace.timeout, asked).await;
    outcome.unwrap_or_else(|_| Err(format!("{}: no answer within {:?}", probe.check, probe.pace.timeout)))
}

#[cfg(test)]
#[path = "probe/tests.rs"]
mod tests;
