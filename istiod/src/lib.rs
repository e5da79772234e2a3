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
pub mod ports;
pub mod preview;
pub mod publish;
pub mod push;
pub mod raft;
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
use ca::seal::ClusterKey;
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
use api::limits::Rates;
use cluster::boot::{self, Running};
use cluster::enrol::Serving;
use cluster::members::Members;
use cluster::{fleet, keeper};
use config::Config;
use join::Joining;
use liveness::Liveness;
use push::Push;
use raft::Raft;

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
    let mut metrics = Registry::default();
    make_folder(&config.data_dir)?;

    // Commands to log to state to snapshots.
    let status = Status::new(xds::status::Metrics::register(&mut metrics));
    let counted = raft::metrics::Metrics::registered(&mut metrics);
    let Running { started, seat } = boot::start(&mut config, &counted, &clock, &tasks, &stopped).await?;
    let serves = seat.as_ref().map(|seat| seat.serving.clone()).unwrap_or_default();
    let key = seat.as_ref().map(|seat| seat.secrets.key.clone());
    let peers = seat.map(|seat| seat.take(&started, &config, &clock, &tasks, &stopped)).transpose()?;
    // Nobody is served before everything that was acknowledged earlier is applied again: no proxy goes back in time.
    let ready = async {
        tokio::select! {
            ready = upkeep::ready(&started.raft) => Some(ready),
            // Not ready, and never will be.
            _ = started.raft.ended() => None,
        }
    };
    let Some(Some(revision)) = stopped.run_until_cancelled(ready).await else {
        stopped.cancel();
        return Ok(started.thread.join().await?);
    };
    tracing::info!(revision = revision.context("the log does not become ready")?.0, "log replayed");

    // Who may be issued what.
    if let Some(key) = &key
        && !shared_root(&config, key, &started.raft, &stopped).await?
    {
        return Ok(started.thread.join().await?);
    }
    let issuing = authority::open(&config.authority(), clock())?;
    tasks.spawn(authority::keep(config.clone(), issuing.clone(), clock.clone(), stopped.clone()));
    let (names, until) = (config.names(), stopped.clone());
    let identity = authority::own_identity(issuing.clone(), names, clock.clone(), &tasks, until).await?;
    if let Some(key) = &key {
        let said = boot::description(&config);
        let sealed = sealed_root(&config, key)?;
        let (raft, until) = (started.raft.clone(), stopped.clone());
        tasks.spawn(boot::introduce(raft.clone(), config.member_id, said, sealed, until.clone()));
        tasks.spawn(keeper::keep(raft, until));
    }
    let liveness = Liveness::new(config.silence, &started.raft.view().await?.registry);
    let connected = peers.as_ref().map(|peers| peers.connected.clone());
    tasks.spawn(liveness.clone().watch(
        started.raft.clone(),
        connected.clone(),
        clock.clone(),
        stopped.clone(),
    ));
    upkeep::start(&config, &started, &mut metrics, &clock, &tasks, &stopped);

    // Snapshots to proxies.
    let (joins, joined) = mpsc::channel(JOINS);
    let push = Push::new(config.push(), started.updates, joined, status.clone(), tasks.clone());
    tasks.spawn(push.run(stopped.clone()));

    // The ports.
    let [xds, admin, plain] = listen([config.xds, config.admin, config.metrics]).await?;
    let advertised = config.advertise.clone().map_or_else(|| xds.local_addr().map(|a| a.to_string()), Ok)?;
    let (fleet, known) = watch::channel(Fleet::alone(&advertised));
    let ads = serving(joins, &status, known.clone(), &tasks, &stopped);
    let heard = {
        let liveness = liveness.clone();
        Box::new(move |within| liveness.spoke(within))
    };
    if serves.set(Serving { streams: ads.spread.streams(), status: status.clone(), heard }).is_err() {
        tracing::warn!("what this member serves was told twice");
    }
    // Without peers nobody else ever serves: the fleet stays as it is.
    let _alone = match connected {
        Some(connected) => {
            tasks.spawn(fleet::keep(started.raft.clone(), connected, fleet, stopped.clone()));
            None
        }
        None => Some(fleet),
    };
    let members = Members::new(started.raft.clone(), peers, clock.clone());
    let joining = Joining {
        raft: started.raft.clone(),
        snapshots: started.snapshots.clone(),
        status: status.clone(),
        issuing: issuing.clone(),
        liveness,
        clock: clock.clone(),
        fleet: known.clone(),
        stop: stopped.clone(),
    };
    let events = Events::default();
    let (seen, held) = (started.snapshots.clone(), status.clone());
    let member = started.raft.status();
    tasks.spawn(api::events::observe(events.clone(), seen, held, member, clock.clone(), stopped.clone()));
    let api = Api {
        raft: started.raft.clone(),
        snapshots: started.snapshots,
        status,
        issuing,
        clock: clock.clone(),
        xds: advertised,
        fleet: known,
        access: started.access.clone(),
        watches: Arc::new(Semaphore::new(api::watch::MOST)),
        events: events.clone(),
        members,
        kept: Arc::default(),
    };
    let gate = Gate::new(ports::access(&config)?, started.access, clock.clone(), Rates::default());
    tasks.spawn(upkeep::note_use(gate.clone(), started.raft.clone(), clock.clone(), stopped.clone()));
    tracing::info!(xds = %xds.local_addr()?, admin = %admin.local_addr()?, metrics = %plain.local_addr()?, "ready");
    ports::serve_agents(xds, identity.clone(), ads, joining, &tasks, &stopped)?;
    ports::serve_operators(admin, config.admin_tls.then_some(identity), api, &gate, &tasks, &stopped)?;
    ports::serve_metrics(plain, metrics, &tasks, &stopped);

    tasks.spawn(supervisor::keep(started.raft.clone(), stopped.clone()));

    let fatal = tokio::select! {
        () = stopped.cancelled() => None,
        why = started.raft.ended() => why,
    };
    stopped.cancel();
    tasks.close();
    tasks.wait().await;
    started.thread.join().await?;
    match fatal {
        Some(why) => Err(why.into()),
        None => Ok(()),
    }
}

/// Waits until this member can sign: with a root of its own, or the one that the log has under the cluster's key. False
/// if it is stopped first.
async fn shared_root(
    config: &Config,
    key: &ClusterKey,
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
fn sealed_root(config: &Config, key: &ClusterKey) -> anyhow::Result<Option<String>> {
    if config.ca_directory.is_some() {
        return Ok(None);
    }
    let exported = authority::export(&config.data_dir)?;
    let sealed = exported.map(|exported| key.seal(cluster::ROOT, &exported)).transpose()?;
    Ok(sealed.map(|sealed| STANDARD.encode(sealed)))
}

/// A socket for each address.
async fn listen<const N: usize>(addresses: [SocketAddr; N]) -> anyhow::Result<[TcpListener; N]> {
    let bound = addresses.map(async |address| {
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
    });
    let bound = futures::future::try_join_all(bound).await?;
    bound.try_into().map_err(|_| anyhow::anyhow!("a socket is missing"))
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
