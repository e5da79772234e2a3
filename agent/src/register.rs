//! Registration: the workload becomes an endpoint, and is sent traffic once its proxy takes connections and its
//! application is healthy.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tonic::{Code, Status};
use wire::mesh::{DeregisterRequest, HealthRequest, HealthResponse, RegisterRequest};

use crate::control_plane::{Client, ControlPlane};
use crate::probe::{self, Checks, Health, Readiness};
use crate::{Never, Orders};

/// A call to the control plane that takes longer is given up.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// At the end nobody waits longer than this for the control plane, which answers when the other proxies know.
const FAREWELL: Duration = Duration::from_secs(5);
/// Pause after a first failure; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause between looks at whether the proxy takes connections.
const LONGEST_LOOK: Duration = Duration::from_millis(250);

/// How long a registration lives without a sign of life, when the control plane does not say.
const USUAL_LEASE: Duration = Duration::from_secs(30);
/// A shorter lease is not kept up.
const SHORTEST_LEASE: Duration = Duration::from_millis(300);

/// What the control plane made of a registration.
#[derive(Debug)]
struct Entered {
    /// Name of the entry.
    name: String,
    /// How often it wants a sign of life.
    every: Duration,
    /// What it holds the workload for.
    health: Health,
}

/// Where what is found out of the application meets what is told of it.
#[derive(Debug)]
struct Told {
    /// How it is checked, as the control plane says; nothing before it said so.
    readiness: watch::Sender<Option<Readiness>>,
    /// What was found out; nothing before there is something.
    health: watch::Receiver<Option<Health>>,
}

/// What is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Name, unique in its namespace.
    pub name: String,
    /// Address other proxies connect to.
    pub address: std::net::IpAddr,
    /// Labels: services select on them.
    pub labels: BTreeMap<String, String>,
    /// Service port name to workload port, where they differ.
    pub ports: BTreeMap<String, u16>,
    /// `region/zone/subzone`
    pub locality: String,
    /// Network.
    pub network: String,
    /// Ports at which the proxy must take connections before the workload is healthy.
    pub awaited_ports: Vec<u16>,
    /// What this machine says of how the application is checked.
    pub checks: Checks,
    /// Random identifier of this start.
    pub session: String,
}

/// One workload's registration.
#[derive(Debug, Clone)]
pub struct Registration {
    workload: Workload,
    control_plane: ControlPlane,
}

impl Registration {
    /// A registration that has not been made yet.
    #[must_use]
    pub fn new(workload: Workload, control_plane: ControlPlane) -> Self {
        Self { workload, control_plane }
    }

    /// The session that speaks for the workload.
    #[must_use]
    pub fn session(&self) -> &str {
        &self.workload.session
    }

    /// Registers, reports what is found out of the application, once the proxy takes connections, repeats that as a sign
    /// of life, and takes the workload out again when the agent is told to leave. What fails is tried again until then.
    ///
    /// A hand-over leaves it as it is: the process that follows goes on with this session.
    pub async fn keep(self, orders: &Orders) {
        let entry = Mutex::new(None);
        let (readiness, said) = watch::channel(self.workload.checks.decide(None));
        let (found, health) = watch::channel(None);
        tokio::select! {
            never = self.stay(&entry, Told { readiness, health }) => match never {},
            never = self.find_out(said, &found) => match never {},
            () = orders.leave.cancelled() => {}
            () = orders.hand_over.cancelled() => return,
        }
        let entry = entry.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = entry else { return };
        if tokio::time::timeout(FAREWELL, self.leave(&entry)).await.is_err() {
            tracing::warn!(workload = %self.workload.name, "left without telling the control plane");
        }
    }

    /// Whether the application is healthy, from when its proxy takes connections.
    async fn find_out(
        &self,
        readiness: watch::Receiver<Option<Readiness>>,
        found: &watch::Sender<Option<Health>>,
    ) -> Never {
        for port in &self.workload.awaited_ports {
            takes_connections(SocketAddr::new(self.workload.address, *port)).await;
        }
        probe::follow(&self.workload.checks.place, readiness, found).await
    }

    /// Registers, and again whenever the control plane knows nothing of it any more.
    async fn stay(&self, entry: &Mutex<Option<String>>, mut told: Told) -> Never {
        loop {
            let (entered, readiness) = self.insist("register", |turn| self.register(turn)).await;
            *entry.lock().unwrap_or_else(PoisonError::into_inner) = Some(entered.name.clone());
            // A member that says nothing of it knows no checks.
            let unknown = told.readiness.borrow().is_none();
            told.readiness(readiness.or(unknown.then_some(Readiness::Unchecked)));
            self.stay_known(entered, &mut told).await;
            tracing::info!(workload = %self.workload.name, "the control plane does not know this session, registering again");
        }
    }

    /// Reports what is found out, and gives signs of life, until the control plane does not know the registration.
    async fn stay_known(&self, entered: Entered, told: &mut Told) {
        let Entered { name, every, health: mut known } = entered;
        let (mut held, mut turn) = (None, 0_usize);
        let mut failed: Option<Duration> = None;
        loop {
            match failed {
                Some(pause) => tokio::time::sleep(pause).await,
                None => tokio::select! {
                    () = told.differs(&known) => {}
                    () = tokio::time::sleep(every) => {}
                },
            }
            let health = told.health.borrow_and_update().clone().unwrap_or_else(|| known.clone());
            let sign = self.sign_of_life((&name, &health), turn, &mut held);
            let outcome = tokio::time::timeout(CALL_TIMEOUT, sign).await;
            match outcome.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time"))) {
                Ok(Some(answer)) => {
                    if health != known {
                        let Health { healthy, reason } = &health;
                        tracing::info!(workload = %self.workload.name, healthy, reason, "reported");
                    }
                    (known, failed) = (health, None);
                    told.readiness(answer.readiness.and_then(|said| self.workload.checks.decide(Some(said))));
                }
                Ok(None) => return,
                Err(status) => {
                    if health != known && status.code() != Code::Unavailable {
                        tracing::warn!(workload = %self.workload.name, error = status.message(), "cannot report health");
                    } else {
                        tracing::debug!(error = status.message(), "no sign of life given");
                    }
                    (held, turn) = (None, turn.wrapping_add(1));
                    failed =
                        Some(failed.map_or(FIRST_PAUSE, |pause| pause * 2).min(LONGEST_PAUSE).min(every / 4));
                }
            }
        }
    }

    /// Over one connection as long as it lasts. No answer: the control plane does not know the session.
    async fn sign_of_life(
        &self,
        (entry, health): (&str, &Health),
        turn: usize,
        held: &mut Option<Client>,
    ) -> Result<Option<HealthResponse>, Status> {
        let client = match held {
            Some(client) => client,
            None => held.insert(self.control_plane.client(turn).await?),
        };
        let (namespace, _) = self.control_plane.namespace_and_account();
        let (name, session) = (entry.to_owned(), self.workload.session.clone());
        let Health { healthy, reason } = health.clone();
        match client.report_health(HealthRequest { name, namespace, session, healthy, reason }).await {
            Ok(answer) => Ok(Some(answer.into_inner())),
            Err(status) if status.code() == Code::FailedPrecondition => Ok(None),
            Err(status) => Err(status),
        }
    }

    /// Tries until it succeeds, asking one member after the other.
    async fn insist<T, F>(&self, doing: &'static str, attempt: impl Fn(usize) -> F) -> T
    where
        F: Future<Output = Result<T, Status>>,
    {
        let (mut pause, mut turn) = (FIRST_PAUSE, 0);
        loop {
            let outcome = tokio::time::timeout(CALL_TIMEOUT, attempt(turn)).await;
            match outcome.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time"))) {
                Ok(answer) => {
                    tracing::info!(workload = %self.workload.name, "{doing}: done");
                    return answer;
                }
                Err(status) if pause >= LONGEST_PAUSE || status.code() != Code::Unavailable => {
                    tracing::warn!(workload = %self.workload.name, error = status.message(), "cannot {doing}");
                }
                Err(status) => tracing::debug!(error = status.message(), "cannot {doing} yet"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            turn = turn.wrapping_add(1);
        }
    }

    async fn register(&self, turn: usize) -> Result<(Entered, Option<Readiness>), Status> {
        let (namespace, service_account) = self.control_plane.namespace_and_account();
        let workload = self.workload.clone();
        let request = RegisterRequest {
            name: workload.name,
            namespace,
            service_account,
            address: workload.address.to_string(),
            labels: workload.labels,
            ports: workload.ports.into_iter().map(|(name, port)| (name, u32::from(port))).collect(),
            locality: workload.locality,
            network: workload.network,
            weight: 0,
            session: workload.session,
        };
        let answer = self.control_plane.client(turn).await?.register(request).await?.into_inner();
        let lease = Duration::from_millis(answer.lease_milliseconds);
        let lease = if lease.is_zero() { USUAL_LEASE } else { lease };
        let health = Health { healthy: answer.healthy, reason: String::new() };
        let entered = Entered { name: answer.name, every: (lease / 3).max(SHORTEST_LEASE / 3), health };
        Ok((entered, self.workload.checks.decide(answer.readiness)))
    }

    /// Tells one member after the other until one knows.
    async fn leave(&self, entry: &str) {
        let (mut pause, mut turn) = (FIRST_PAUSE, 0);
        loop {
            match self.deregister(entry, turn).await {
                Ok(()) => {
                    tracing::info!(workload = %self.workload.name, "left the mesh");
                    return;
                }
                Err(status) if status.code() == Code::Unavailable => {
                    tracing::debug!(error = status.message(), "cannot leave yet");
                }
                Err(status) => {
                    tracing::warn!(workload = %self.workload.name, error = status.message(), "cannot leave");
                    return;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            turn = turn.wrapping_add(1);
        }
    }

    async fn deregister(&self, entry: &str, turn: usize) -> Result<(), Status> {
        let (namespace, _) = self.control_plane.namespace_and_account();
        let (name, session) = (entry.to_owned(), self.workload.session.clone());
        let mut client = self.control_plane.client(turn).await?;
        client.deregister(DeregisterRequest { name, namespace, session }).await.map(|_| ())
    }
}

impl Told {
    /// The control plane says how the application is checked; nothing: as before.
    fn readiness(&self, said: Option<Readiness>) {
        let Some(said) = said else { return };
        self.readiness.send_if_modified(|before| {
            let modified = before.as_ref() != Some(&said);
            *before = Some(said);
            modified
        });
    }

    /// Waits until something else was found out than the control plane knows.
    async fn differs(&mut self, known: &Health) {
        let differs = |found: &Option<Health>| found.as_ref().is_some_and(|found| found != known);
        // Who finds out lives as long as who tells.
        drop(self.health.wait_for(differs).await);
    }
}

/// Waits until something takes connections at this address.
async fn takes_connections(address: SocketAddr) {
    let mut pause = FIRST_PAUSE;
    while TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_LOOK);
    }
}
