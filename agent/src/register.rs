//! Registration: the workload becomes an endpoint, and is sent traffic once its proxy takes connections.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tonic::{Code, Status};
use wire::mesh::{DeregisterRequest, HealthRequest, RegisterRequest};

use crate::Orders;
use crate::control_plane::{Client, ControlPlane};

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
}

/// Whether the control plane knows this session's registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Yes,
    No,
}

/// Of what does not end by itself.
#[derive(Debug)]
enum Never {}

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

    /// Registers, reports healthy when the proxy takes connections, repeats that as a sign of life, and takes the
    /// workload out again when the agent is told to leave. What fails is tried again until then.
    ///
    /// A hand-over leaves it as it is: the process that follows goes on with this session.
    pub async fn keep(self, orders: &Orders) {
        let entry = Mutex::new(None);
        tokio::select! {
            never = self.stay(&entry) => match never {},
            () = orders.leave.cancelled() => {}
            () = orders.hand_over.cancelled() => return,
        }
        let entry = entry.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = entry else { return };
        if tokio::time::timeout(FAREWELL, self.leave(&entry)).await.is_err() {
            tracing::warn!(workload = %self.workload.name, "left without telling the control plane");
        }
    }

    /// Registers, and again whenever the control plane knows nothing of it any more.
    async fn stay(&self, entry: &Mutex<Option<String>>) -> Never {
        loop {
            let entered = self.insist("register", |turn| self.register(turn)).await;
            *entry.lock().unwrap_or_else(PoisonError::into_inner) = Some(entered.name.clone());
            let listening = async {
                for port in &self.workload.awaited_ports {
                    takes_connections(SocketAddr::new(self.workload.address, *port)).await;
                }
                self.insist("report healthy", |turn| self.report_healthy(&entered.name, turn)).await
            };
            // The proxy may learn only later what to listen on; the registration must live until then.
            let known = tokio::select! {
                known = listening => known,
                () = self.stay_known(&entered, false) => Known::No,
            };
            if known == Known::Yes {
                self.stay_known(&entered, true).await;
            }
            tracing::info!(workload = %self.workload.name, "the control plane does not know this session, registering again");
        }
    }

    /// Gives signs of life until the control plane does not know the registration.
    async fn stay_known(&self, entered: &Entered, healthy: bool) {
        let (mut held, mut turn) = (None, 0_usize);
        let mut pause = entered.every;
        loop {
            tokio::time::sleep(pause).await;
            let sign = self.sign_of_life((&entered.name, healthy), turn, &mut held);
            let outcome = tokio::time::timeout(CALL_TIMEOUT, sign).await;
            match outcome.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time"))) {
                Ok(Known::Yes) => pause = entered.every,
                Ok(Known::No) => return,
                Err(status) => {
                    tracing::debug!(error = status.message(), "no sign of life given");
                    (held, turn) = (None, turn.wrapping_add(1));
                    pause = LONGEST_PAUSE.min(entered.every / 4);
                }
            }
        }
    }

    /// Over one connection as long as it lasts.
    async fn sign_of_life(
        &self,
        said: (&str, bool),
        turn: usize,
        held: &mut Option<Client>,
    ) -> Result<Known, Status> {
        let client = match held {
            Some(client) => client,
            None => held.insert(self.control_plane.client(turn).await?),
        };
        self.tell(client, said).await
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

    async fn register(&self, turn: usize) -> Result<Entered, Status> {
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
        Ok(Entered { name: answer.name, every: (lease / 3).max(SHORTEST_LEASE / 3) })
    }

    async fn report_healthy(&self, entry: &str, turn: usize) -> Result<Known, Status> {
        self.tell(&mut self.control_plane.client(turn).await?, (entry, true)).await
    }

    async fn tell(&self, client: &mut Client, (entry, healthy): (&str, bool)) -> Result<Known, Status> {
        let (namespace, _) = self.control_plane.namespace_and_account();
        let (name, session) = (entry.to_owned(), self.workload.session.clone());
        match client.report_health(HealthRequest { name, namespace, session, healthy }).await {
            Ok(_) => Ok(Known::Yes),
            Err(status) if status.code() == Code::FailedPrecondition => Ok(Known::No),
            Err(status) => Err(status),
        }
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

/// Waits until something takes connections at this address.
async fn takes_connections(address: SocketAddr) {
    let mut pause = FIRST_PAUSE;
    while TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_LOOK);
    }
}
