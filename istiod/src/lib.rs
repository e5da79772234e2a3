//! One member of the control plane.
//!
//! [`run`] wires it in the order in which data flows: the certificate authority, the log ([`raft`]) with the state it
//! makes, snapshots of the state ([`publish`]), pushes to proxies ([`push`]), and the ports: xDS and certificates on
//! one, the operator's [`api`] on another, metrics on a third.

pub mod access;
pub mod api;
pub mod audit;
pub mod authority;
pub mod backup;
pub mod cli;
pub mod cluster;
pub mod config;
mod join;
mod liveness;
mod names;
pub mod ports;
pub mod preview;
pub mod publish;
pub mod push;
pub mod raft;
mod readiness;
mod revoked;
mod sources;
mod supervisor;
mod upkeep;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ca::renewal::Clock;
use ca::seal::SealingKey;
use ca::tls::IdentityWatch;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use xds::balance::{Fleet, Spread};
use xds::server::{Ads, Authentication, JOINS, Joined};
use xds::status::Status;

use api::Api;
use api::events::Events;
use api::gate::Gate;
use api::served::Served;
use authority::Issuing;
use cluster::boot::{self, Running};
use cluster::enrol::Serving;
use cluster::members::Members;
use cluster::{fleet, keeper};
use config::Config;
use join::Joining;
use liveness::Liveness;
use ports::Readiness;
use push::Push;
use raft::peers::links::Connected;
use raft::{Raft, RaftThread, Started};

/// Runs one member until `stop`.
///
/// # Errors
///
/// What keeps it from starting, and what makes it stop by itself: a disk that does not write, a log that is damaged
/// or of a newer program.
pub async fn run(mut config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    let clock = clock();
    let tasks = TaskTracker::new();
    // However this ends, every task ends with it.
    let stopped = stop.child_token();
    let _ends_all = stopped.clone().drop_guard();
    tracing::info!(settings = %config, "settings in force");
    make_folder(&config.data_dir)?;

    let mut metrics = Registry::default();
    let counted = raft::metrics::Metrics::registered(&mut metrics);
    let status = Status::new(xds::status::Metrics::register(&mut metrics));
    let followed = Followed {
        sources: sources::Metrics::registered(&mut metrics),
        liveness: liveness::Metrics::registered(&mut metrics),
    };

    // From the first moment on it can be asked how far it is.
    let (ready, readiness) = watch::channel(Readiness::Not("its log is being read"));
    let plain = listen(config.metrics).await?;
    tracing::info!(metrics = %plain.local_addr()?, "tells how far it is");
    ports::serve_metrics(plain, metrics, readiness, &tasks, &stopped);

    let running = boot::start(&mut config, &counted, &clock, &tasks, &stopped).await?;
    let raft = running.started.raft.clone();
    let member = Member { config: &config, clock: &clock, tasks: &tasks, stop: &stopped, ready: &ready };
    let thread = member.serve(running, status, &followed).await?;

    let fatal = tokio::select! {
        () = stopped.cancelled() => None,
        why = raft.ended() => why,
    };
    ready.send_replace(Readiness::Not("it is stopping"));
    stopped.cancel();
    tasks.close();
    tasks.wait().await;
    thread.join().await?;
    match fatal {
        Some(why) => Err(why.into()),
        None => Ok(()),
    }
}

/// What is told of what this member follows.
struct Followed {
    sources: sources::Metrics,
    liveness: liveness::Metrics,
}

/// What every part of a running member is given.
#[derive(Clone, Copy)]
struct Member<'a> {
    config: &'a Config,
    clock: &'a Clock,
    /// Where what goes on by itself has its owner.
    tasks: &'a TaskTracker,
    stop: &'a CancellationToken,
    /// Who asks whether it serves is told this.
    ready: &'a watch::Sender<Readiness>,
}

impl Member<'_> {
    /// Opens the ports over a log that runs, once it is replayed and the member can sign; nothing is opened if it is
    /// stopped before. Answers the log's thread, to be waited for at the end.
    async fn serve(
        self,
        Running { started, seat }: Running,
        status: Status,
        followed: &Followed,
    ) -> anyhow::Result<RaftThread> {
        let Self { config, clock, tasks, stop, ready } = self;
        let serves = seat.as_ref().map(|seat| seat.serving.clone()).unwrap_or_default();
        let key = seat.as_ref().map(|seat| seat.secrets.key.clone());
        let peers = seat.map(|seat| seat.take(&started, config, clock, tasks, stop)).transpose()?;
        // Nobody is served before everything that was acknowledged earlier is applied again: no proxy goes back in time.
        ready.send_replace(Readiness::Not("what was committed before it started is not applied here yet"));
        if !self.replayed(&started.raft).await? {
            return Ok(started.thread);
        }
        ready.send_replace(Readiness::Not("it has no authority to sign with yet"));
        let Some((issuing, identity)) = self.identity(key.as_ref(), &started.raft).await? else {
            return Ok(started.thread);
        };
        let connected = peers.as_ref().map(|peers| peers.connected.clone());
        let liveness = Liveness::new(config.silence, followed.liveness.clone());
        let watched =
            liveness.clone().watch(started.raft.clone(), connected.clone(), clock.clone(), stop.clone());
        tasks.spawn(watched);
        upkeep::start(config, &started, &followed.sources, clock, tasks, stop);

        // Snapshots to proxies.
        let Started { raft, updates, snapshots, access, revoked, thread, .. } = started;
        let (joins, joined) = mpsc::channel(JOINS);
        let push = Push::new(config.push(), updates, joined, status.clone(), tasks.clone());
        tasks.spawn(push.run(stop.clone()));

        // The ports.
        let (xds, admin) = (listen(config.xds).await?, listen(config.admin).await?);
        let advertised =
            config.advertise.clone().map_or_else(|| xds.local_addr().map(|a| a.to_string()), Ok)?;
        let fleet = self.fleet(&raft, connected, &advertised);
        let ads = serving(joins, &status, fleet.clone(), tasks, stop);
        let heard = {
            let liveness = liveness.clone();
            Box::new(move |within| liveness.spoke(within))
        };
        let served = Served { raft: raft.clone(), snapshots: snapshots.clone(), status: status.clone() };
        if serves.set(Serving { streams: ads.spread.streams(), served, heard }).is_err() {
            tracing::warn!("what this member serves was told twice");
        }
        let joining = Joining {
            raft: raft.clone(),
            snapshots: snapshots.clone(),
            status: status.clone(),
            issuing: issuing.clone(),
            liveness,
            clock: clock.clone(),
            fleet: fleet.clone(),
            revoked: revoked.clone(),
            dormancy: config.dormancy,
            stop: stop.clone(),
        };
        let events = Events::default();
        tasks.spawn(api::events::observe(
            events.clone(),
            snapshots.clone(),
            status.clone(),
            raft.status(),
            clock.clone(),
            stop.clone(),
        ));
        let api = Api {
            raft: raft.clone(),
            snapshots,
            status,
            issuing,
            clock: clock.clone(),
            xds: advertised,
            fleet,
            access: access.clone(),
            watches: Arc::new(Semaphore::new(api::watch::MOST)),
            events,
            members: Members::new(raft.clone(), peers, clock.clone()),
            kept: Arc::default(),
        };
        let gate = Gate::new(ports::access(config)?, (access, revoked), clock.clone(), config.rates);
        tasks.spawn(upkeep::note_use(gate.clone(), raft.clone(), clock.clone(), stop.clone()));
        tracing::info!(xds = %xds.local_addr()?, admin = %admin.local_addr()?, "ready");
        ports::serve_agents(xds, identity.clone(), ads, joining, tasks, stop)?;
        ports::serve_operators(admin, config.admin_tls.then_some(identity), api, &gate, tasks, stop)?;
        tasks.spawn(supervisor::keep(raft, stop.clone()));
        ready.send_replace(Readiness::Ready);
        Ok(thread)
    }

    /// Waits until all that was acknowledged earlier is applied; false if the member ends before.
    async fn replayed(self, raft: &Raft) -> anyhow::Result<bool> {
        let ready = async {
            tokio::select! {
                ready = upkeep::ready(raft) => Some(ready),
                // Not ready, and never will be.
                _ = raft.ended() => None,
            }
        };
        let Some(Some(revision)) = self.stop.run_until_cancelled(ready).await else { return Ok(false) };
        tracing::info!(revision = revision.context("the log does not become ready")?.0, "log replayed");
        Ok(true)
    }

    /// The authority, and this member's own certificate of it; nothing if the member is stopped before it can sign.
    /// `key`: the cluster's, where there are peers, who are told of this member.
    async fn identity(
        self,
        key: Option<&SealingKey>,
        raft: &Raft,
    ) -> anyhow::Result<Option<(Issuing, IdentityWatch)>> {
        let Self { config, clock, tasks, stop, .. } = self;
        if let Some(key) = key
            && !shared_root(config, key, raft, stop).await?
        {
            return Ok(None);
        }
        let issuing = authority::open(&config.authority(), clock())?;
        tasks.spawn(authority::keep(config.clone(), issuing.clone(), clock.clone(), stop.clone()));
        let own =
            authority::own_identity(issuing.clone(), config.names(), clock.clone(), tasks, stop.clone());
        let own = own.await?;
        if let Some(key) = key {
            let said = boot::description(config);
            let sealed = sealed_root(config, key)?;
            tasks.spawn(boot::introduce(raft.clone(), config.member_id, said, sealed, stop.clone()));
            tasks.spawn(keeper::keep(raft.clone(), stop.clone()));
        }
        Ok(Some((issuing, own)))
    }

    /// Who serves proxies, as it changes. Without peers nobody else ever does, and the fleet stays as it is.
    fn fleet(self, raft: &Raft, connected: Option<Connected>, advertised: &str) -> watch::Receiver<Fleet> {
        let (fleet, known) = watch::channel(Fleet::alone(advertised));
        match connected {
            Some(connected) => {
                self.tasks.spawn(fleet::keep(raft.clone(), connected, fleet, self.stop.clone()));
            }
            None => {
                let stop = self.stop.clone();
                self.tasks.spawn(async move {
                    stop.cancelled().await;
                    drop(fleet);
                });
            }
        }
        known
    }
}

/// Waits until this member can sign: with a root of its own, or the one that the log has under the cluster's key. False
/// if it is stopped first.
async fn shared_root(
    config: &Config,
    key: &SealingKey,
    raft: &Raft,
    stop: &CancellationToken,
) -> anyhow::Result<bool> {
    let mut members = raft.cluster();
    let founder = members.borrow().members().keys().all(|id| *id == config.member_id);
    if founder || authority::is_here(&config.authority())? {
        return Ok(true);
    }
    let known = stop.run_until_cancelled(members.wait_for(|members| members.sealed(cluster::ROOT).is_some()));
    let Some(Ok(members)) = known.await else { return Ok(false) };
    let sealed = STANDARD.decode(members.sealed(cluster::ROOT).unwrap_or_default())?;
    drop(members);
    let exported = key.open(cluster::ROOT, &sealed).context("the root of the mesh in the log")?;
    authority::import(&config.data_dir, &exported)?;
    Ok(true)
}

/// This member's root for the others; nothing if the authority is plugged in, as it is there on every member.
fn sealed_root(config: &Config, key: &SealingKey) -> anyhow::Result<Option<String>> {
    if config.ca_directory.is_some() {
        return Ok(None);
    }
    let exported = authority::export(&config.data_dir)?;
    let sealed = exported.map(|exported| key.seal(cluster::ROOT, &exported)).transpose()?;
    Ok(sealed.map(|sealed| STANDARD.encode(sealed)))
}

/// A socket for an address.
async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// The xDS service, which keeps to its share of all streams.
fn serving(
    joins: mpsc::Sender<Joined>,
    status: &Status,
    fleet: watch::Receiver<Fleet>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Ads {
    let spread = Spread::new(fleet);
    tasks.spawn(spread.clone().keep(stop.clone()));
    Ads {
        joins,
        status: status.clone(),
        spread,
        authentication: Authentication::Required,
        tasks: tasks.clone(),
        stop: stop.clone(),
    }
}

/// Makes the data folder. Its entry in the folder above must be as durable as what is put into it.
fn make_folder(path: &Path) -> anyhow::Result<()> {
    let new: Vec<_> = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
    let made = std::fs::create_dir_all(path).and_then(|()| {
        let above = new.iter().filter_map(|made| made.parent());
        let named = above.map(|above| if above.as_os_str().is_empty() { Path::new(".") } else { above });
        named.into_iter().try_for_each(|above| std::fs::File::open(above)?.sync_all())
    });
    made.with_context(|| format!("cannot make {}", path.display()))
}

/// The member's one clock.
#[expect(clippy::disallowed_methods, reason = "the member's one clock; everything else is given the time")]
pub(crate) fn clock() -> Clock {
    Arc::new(SystemTime::now)
}
