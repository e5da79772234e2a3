//! The node agent: what runs beside an application so that it is a member of the mesh.
//!
//! [`cli`] says what can be asked of it, [`settings`] what files say; [`join`] gets the identity, with a token the first
//! time, and keeps it in the [`vault`]; [`members`] follows who the members of the control plane are, and [`control_plane`]
//! calls them; [`register`] makes the workload an endpoint and says when it may be sent traffic, in a [`session`], which
//! [`probe`] finds out; [`dns`]
//! answers its applications, and [`resolved`] has the machine's resolver ask it; [`secrets`] hands the certificate to a
//! stock Envoy; [`capture`] redirects a machine's traffic to the proxy. For both, [`tool`] runs the system's programs.
//! The proxy itself is the crate `proxy`, run in this process.

pub mod capture;
pub mod cli;
pub mod config;
pub mod control_plane;
pub mod dns;
pub mod join;
pub mod members;
pub mod probe;
pub mod register;
pub mod resolved;
pub mod secrets;
pub mod session;
pub mod settings;
pub mod tool;
pub mod vault;

use anyhow::Context;
use ca::keystore::KeyStore;
use proxy::Proxy;
use proxy::supervisor::Supervised;
use proxy::telemetry::LogLevel;
use proxy::xds::last_good::LastGood;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use config::{Config, Seat};

/// Of what does not end by itself.
#[derive(Debug)]
pub(crate) enum Never {}

/// How the agent is told to end.
#[derive(Debug, Clone, Default)]
pub struct Orders {
    /// Leave the mesh, then end.
    pub leave: CancellationToken,
    /// End for a process that goes on in this one's place: stay registered, and leave listening sockets open.
    pub hand_over: CancellationToken,
}

impl Orders {
    /// Ends when either is told.
    async fn told(&self) {
        tokio::select! {
            () = self.leave.cancelled() => {}
            () = self.hand_over.cancelled() => {}
        }
    }
}

/// Runs the agent until it is told to end: identity, then the data plane and the registration; backwards at the end. `log` lets
/// the proxy's admin port change the level of the log.
///
/// # Errors
///
/// When there is no identity to be had, or the data plane cannot start. What fails later is tried again.
pub async fn run(config: Config, log: Option<LogLevel>, orders: Orders) -> anyhow::Result<()> {
    let tasks = TaskTracker::new();
    // The identity is renewed until the data plane has drained.
    let ended = CancellationToken::new();
    let joined = join::identity(&config, &tasks, ended.clone()).await?;
    let members = joined.members.list();
    let control_plane = control_plane::ControlPlane::new(members.clone(), joined.identity.clone());
    tasks.spawn(joined.members.follow(control_plane.clone(), ended.clone()));
    let asked = control_plane.clone();
    let registration = config.workload.clone().map(|mut workload| {
        workload.session = session::take(&joined.store).unwrap_or(workload.session);
        register::Registration::new(workload, control_plane)
    });

    if !config.dns.listen.is_empty() {
        let names = dns::names::Followed::remembered(config.names(), joined.store.clone());
        let server =
            dns::server::Server::bind(&config.dns, names.table()).await.context("cannot answer DNS")?;
        server.start(&tasks, &ended);
        tasks.spawn(names.follow(asked, ended.clone()));
    }

    let mut ending = Ending { orders, registration, store: joined.store, proxy: None };
    let data_plane = CancellationToken::new();
    let drain = data_plane.clone().drop_guard();
    let outcome = match config.seat {
        Seat::Proxy(proxy) => {
            let mut config = proxy.config(members, joined.identity)?;
            let until = ending.orders.leave.clone();
            config.last_good = Some(LastGood { store: ending.store.clone(), until });
            match Proxy::start(config, log).await {
                Ok(proxy) => {
                    let supervised = proxy.supervised();
                    tasks.spawn(supervised.clone().keep(data_plane.clone()));
                    ending.proxy = Some(supervised);
                    tasks.spawn(ending.keep(drain));
                    proxy.run(data_plane.clone()).await;
                    // Whatever ended it, its service manager is told.
                    data_plane.cancel();
                    Ok(())
                }
                Err(error) => Err(error.into()),
            }
        }
        Seat::Secrets { socket } => {
            tasks.spawn(ending.keep(drain));
            secrets::serve(&socket, joined.identity, data_plane).await
        }
    };
    ended.cancel();
    tasks.close();
    if outcome.is_ok() {
        tasks.wait().await;
    }
    outcome
}

/// What happens when the agent is told to end, before the data plane drains.
struct Ending {
    orders: Orders,
    registration: Option<register::Registration>,
    store: KeyStore,
    proxy: Option<Supervised>,
}

impl Ending {
    /// Keeps the registration until the agent is told to end; then leaves the mesh or hands over, and drops `drain`.
    async fn keep(self, drain: DropGuard) {
        let session = self.registration.as_ref().map(|registration| registration.session().to_owned());
        match self.registration {
            Some(registration) => registration.keep(&self.orders).await,
            None => self.orders.told().await,
        }
        if self.orders.hand_over.is_cancelled() && !self.orders.leave.is_cancelled() {
            if let Some(Err(error)) = session.map(|session| session::leave(&self.store, &session)) {
                tracing::warn!(%error, "the next process will register anew");
            }
            match self.proxy.map_or(Ok(0), |proxy| proxy.hand_over()) {
                Ok(sockets) => tracing::info!(sockets, "handing over to the next process"),
                Err(error) => tracing::warn!(%error, "listening sockets cannot be handed over"),
            }
        }
        drop(drain);
    }
}
