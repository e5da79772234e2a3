//! The data plane, wired in the order in which things flow.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ca::tls::IdentityWatch;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::Admin;
use crate::admin::serve::{Port, Socket, serve};
use crate::config::Config;
use crate::drain::Drain;
use crate::metrics::Snapshot;
use crate::overload::Overload;
use crate::supervisor::{Inherited, Supervised};
use crate::tables::{TableStore, TableWriter};
use crate::telemetry::{LogLevel, Scrape, State, Traffic};
use crate::tls::Identity;
use crate::worker::{self, Asker};
use crate::xds::client::Client;
use crate::xds::decode::{Address, Rejected, json};
use crate::xds::transport::{Status, Transport};

/// The pause after which freed pages may go back.
const SETTLE_AFTER: std::time::Duration = std::time::Duration::from_millis(500);
/// How often they are looked at.
const SETTLE_TIMES: u32 = 4;
/// An allocation that is so large that the allocator gets and returns it as a whole.
const SETTLE_BYTES: usize = 4 << 20;

/// Why a proxy does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Static resources do not fit together, or their addresses cannot be bound.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Resources(Vec<Rejected>),
    /// The admin, statistics or readiness port cannot be bound.
    #[error("cannot bind the {port} port {address}")]
    Port {
        /// Which.
        port: &'static str,
        /// Where.
        address: Address,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The workload's certificate cannot be used.
    #[error("the certificate cannot be used")]
    Identity(#[source] crate::tls::TlsError),
    /// A worker cannot be started.
    #[error("cannot start a worker")]
    Worker(#[source] std::io::Error),
}

/// Where the proxy's own ports are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bound {
    /// Admin.
    pub admin: Option<SocketAddr>,
    /// Statistics.
    pub stats: Option<SocketAddr>,
    /// Readiness.
    pub ready: Option<SocketAddr>,
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    bound: Bound,
    tables: Arc<TableStore>,
    state: watch::Receiver<State>,
    xds: watch::Receiver<Status>,
    drain: Drain,
    grace: std::time::Duration,
    quit: CancellationToken,
    /// Ends what looks after the workers, when they are gone.
    control: CancellationToken,
    tasks: TaskTracker,
    workers: Vec<worker::Handle>,
    inherited: Inherited,
    /// The sockets of its own ports, and what ends their service.
    own: (Arc<[OwnedFd]>, CancellationToken),
}

/// Runs a proxy until `stop`, and drains it then.
///
/// # Errors
///
/// As [`Proxy::start`].
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), StartError> {
    Proxy::start(config, None).await?.run(stop).await;
    Ok(())
}

impl Proxy {
    /// Starts a proxy: when this returns, its ports are bound and static listeners accept. `log` lets the admin port
    /// change the level of the log.
    ///
    /// # Errors
    ///
    /// Something in the configuration that cannot be done.
    pub async fn start(config: Config, log: Option<LogLevel>) -> Result<Self, StartError> {
        let config = Arc::new(config);
        let (tasks, control) = (TaskTracker::new(), CancellationToken::new());
        let (drain, quit) = (Drain::new(), CancellationToken::new());

        // 1. The tables, with what is there from the start.
        let workers = worker_count(config.workers);
        let (tables, mut writer) = TableStore::new(workers);
        writer.inherit(config.inherited.clone());
        let rejected = writer.apply(&config.static_resources);
        if !rejected.is_empty() {
            return Err(StartError::Resources(rejected));
        }

        // 2. Our certificate.
        let identity = Arc::new(Identity::default());
        if let Some(source) = &config.identity {
            publish(&identity, source).map_err(StartError::Identity)?;
            tasks.spawn(renew(Arc::clone(&identity), source.clone(), control.clone()));
        }

        // 3. The ports, so that a taken one stops the start.
        let (ports, sockets, bound) = bind_ports(&config, &drain).await?;
        let own = (sockets.into(), control.child_token());

        // 4. The workers.
        let overload = Arc::new(Overload::new(config.overload.clone(), descriptors()));
        let mut options = worker::Options::new(Arc::clone(&tables), identity, drain.clone());
        options.overload = Arc::clone(&overload);
        let handles = start_workers(&config, workers, options)?;
        tasks.spawn(overload.watch(control.clone()));

        // 5. The stream to the control plane, which writes the tables from now on.
        let xds = start_xds(&config, writer, &tasks, &control).await;
        let state = watch_state(config.xds.is_some(), &xds, &drain, &tasks, &control);

        tasks.spawn(settle(control.clone()));

        // 6. What can be seen from outside.
        let admin = Admin {
            tables: Arc::clone(&tables),
            xds: xds.clone(),
            state: state.clone(),
            scrape: scrape(handles.iter().map(worker::Handle::asker).collect()),
            drain: drain.clone(),
            quit: quit.clone(),
            log,
            started: Instant::now(),
            workers,
            config: Arc::clone(&config),
        };
        for (socket, port) in ports {
            let (inherited, admin, stop) = (config.inherited.clone(), admin.clone(), own.1.clone());
            tasks.spawn(async move {
                // What was asked at these ports is asked of one process at a time.
                stop.run_until_cancelled(inherited.alone()).await;
                serve(socket, port, admin, stop).await;
            });
        }
        let (grace, inherited) = (config.drain, config.inherited.clone());
        let workers = handles;
        Ok(Self { bound, tables, state, xds, drain, grace, quit, control, tasks, workers, inherited, own })
    }

    /// Where the proxy's own ports are.
    #[must_use]
    pub fn bound(&self) -> Bound {
        self.bound
    }

    /// The tables.
    #[must_use]
    pub fn tables(&self) -> &Arc<TableStore> {
        &self.tables
    }

    /// How far the proxy has come.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// The stream to the control plane.
    #[must_use]
    pub fn xds(&self) -> watch::Receiver<Status> {
        self.xds.clone()
    }

    /// What the service manager of this process wants to know of it.
    #[must_use]
    pub fn supervised(&self) -> Supervised {
        Supervised {
            state: self.state.clone(),
            workers: self.workers.iter().map(worker::Handle::asker).collect(),
            inherited: self.inherited.clone(),
            tables: Arc::clone(&self.tables),
            drain: self.drain.clone(),
            ports: self.own.clone(),
        }
    }

    /// Serves until `stop`, or until the admin port ends it; then drains: nothing new is accepted, what is open may
    /// end within the configuration's time, and nothing is left when this returns.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.quit.cancelled() => {}
        }
        tracing::info!(grace_ms = self.grace.as_millis(), "draining");
        let workers = self.workers;
        let ended = async move {
            for worker in workers {
                worker.ended().await;
            }
        };
        self.drain.shut_down(self.grace, ended).await;
        self.control.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Reading the configuration took far more memory than keeping it. The allocator gives pages back only while it is
/// used, a while after they were freed, and a proxy that waits for traffic does not use it: so it is used once.
async fn settle(control: CancellationToken) {
    for _ in 0..SETTLE_TIMES {
        tokio::select! {
            () = tokio::time::sleep(SETTLE_AFTER) => {}
            () = control.cancelled() => return,
        }
        drop(std::hint::black_box(Vec::<u8>::with_capacity(SETTLE_BYTES)));
    }
}

/// How many descriptors this process may have, once it has asked for all that it can get.
fn descriptors() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((now, most)) = getrlimit(Resource::RLIMIT_NOFILE) else { return u64::MAX };
    match setrlimit(Resource::RLIMIT_NOFILE, most, most) {
        Ok(()) => most,
        Err(error) => {
            tracing::debug!(%error, now, most, "the limit on open files stays");
            now
        }
    }
}

fn worker_count(configured: usize) -> usize {
    match configured {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

fn publish(identity: &Identity, source: &IdentityWatch) -> Result<(), crate::tls::TlsError> {
    let (chain, key, roots) = {
        let current = source.borrow();
        (current.chain.clone(), current.key.to_der(), current.roots.clone())
    };
    identity.publish(chain, key, &roots)
}

/// Takes each renewed certificate into use.
async fn renew(identity: Arc<Identity>, mut source: IdentityWatch, stop: CancellationToken) {
    source.mark_unchanged();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = source.changed() => if changed.is_err() {
                return; // nobody renews it any more; the last one stays in use
            },
        }
        match publish(&identity, &source) {
            Ok(()) => tracing::info!("certificate renewed"),
            Err(error) => {
                tracing::error!(%error, "the renewed certificate cannot be used; the old one stays")
            }
        }
    }
}

/// The proxy's own ports, their sockets once more, and where they are.
async fn bind_ports(
    config: &Config,
    drain: &Drain,
) -> Result<(Vec<(Socket, Port)>, Vec<OwnedFd>, Bound), StartError> {
    let (mut ports, mut sockets) = (Vec::new(), Vec::new());
    let mut bound = Bound::default();
    let wanted = [
        ("admin", Port::Admin, config.admin.clone(), &mut bound.admin),
        ("statistics", Port::Stats, config.stats.map(Address::Socket), &mut bound.stats),
        ("readiness", Port::Ready, config.ready.map(Address::Socket), &mut bound.ready),
    ];
    for (name, port, address, local) in wanted {
        let Some(address) = address else { continue };
        if port == Port::Admin && address.socket().is_some_and(|a| !a.ip().is_loopback()) {
            tracing::warn!(%address, "the admin port is open to other machines; it has no protection of its own");
        }
        let failed = |source| StartError::Port { port: name, address: address.clone(), source };
        let socket = Socket::bind(&address, &config.inherited, drain).await.map_err(failed)?;
        sockets.push(socket.once_more().map_err(failed)?);
        *local = socket.local();
        ports.push((socket, port));
    }
    Ok((ports, sockets, bound))
}

fn start_workers(
    config: &Config,
    count: usize,
    mut options: worker::Options,
) -> Result<Vec<worker::Handle>, StartError> {
    options.node_id = config.node.id.clone();
    options.reports_all = config.reports_all;
    options.metadata = json(config.node.metadata.clone().unwrap_or_default());
    (0..count).map(|index| worker::start(index, options.clone()).map_err(StartError::Worker)).collect()
}

async fn start_xds(
    config: &Config,
    writer: TableWriter,
    tasks: &TaskTracker,
    control: &CancellationToken,
) -> watch::Receiver<Status> {
    let (status, receiver) = watch::channel(Status::default());
    if let Some(settings) = config.xds.clone() {
        let client = Client::new(config.node.clone(), settings.protocol);
        let rng = fastrand::Rng::new();
        let store = Arc::clone(writer.store());
        let mut transport = Transport { settings, client, writer, status, rng, clock: jiff::Timestamp::now };
        if let Some(last_good) = config.last_good.clone() {
            let responses = last_good.responses().await;
            if !responses.is_empty() {
                transport.resume(responses);
                let revision = receiver.borrow().revision;
                tracing::info!(revision, "serving as before, until a control plane answers");
            }
            tasks.spawn(last_good.keep(store, receiver.clone(), control.clone()));
        }
        tasks.spawn(transport.run(control.clone()));
    }
    receiver
}

/// Follows how far the proxy has come.
fn watch_state(
    dynamic: bool,
    xds: &watch::Receiver<Status>,
    drain: &Drain,
    tasks: &TaskTracker,
    control: &CancellationToken,
) -> watch::Receiver<State> {
    let first = if dynamic { State::Initializing } else { State::Live };
    let (sender, receiver) = watch::channel(first);
    let (mut xds, drain, control) = (xds.clone(), drain.clone(), control.clone());
    tasks.spawn(async move {
        if dynamic {
            tokio::select! {
                // An error means that the stream's task is gone, and with it the proxy.
                initialized = xds.wait_for(|s| s.initialized) => if initialized.is_err() {
                    return;
                },
                () = drain.draining() => {}
                () = control.cancelled() => return,
            }
            sender.send_replace(State::Live);
            tracing::info!("the proxy has all that it needs");
        }
        tokio::select! {
            () = drain.draining() => { sender.send_replace(State::Draining); }
            () = control.cancelled() => {}
        }
    });
    receiver
}

fn scrape(workers: Vec<Asker>) -> Scrape {
    Arc::new(move || {
        let workers = workers.clone();
        Box::pin(async move {
            let mut all = Snapshot::default();
            for worker in &workers {
                all.merge(worker.snapshot().await);
            }
            let named = all.values().map(|(name, labels, value)| match labels {
                "" => (name.to_owned(), value),
                labels => (format!("{name}{{{labels}}}"), value),
            });
            Traffic { values: named.collect(), prometheus: all.prometheus() }
        })
    })
}

#[cfg(test)]
mod tests;
