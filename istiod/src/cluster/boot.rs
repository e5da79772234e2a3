//! From a data folder to a running member of a cluster: founding, joining with a ticket, and coming back after the
//! data was lost.
//!
//! A member whose log or identity is damaged must not vote again under its number, because it may have forgotten what
//! it promised. Its data is moved aside for study, it asks its peers for a new number with its certificate, is fed like
//! any new member, and takes its old place in one joint change. That needs a quorum without it, since its enrolment is
//! an entry of the log. A member that stands alone has nobody to be rebuilt from: it stops and says so.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use ca::renewal::Clock;
use ca::tls::IdentityWatch;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::enrol::{self, Door, Serving};
use super::members::Peers;
use super::secrets::{Kept, Membership, Secrets};
use super::{ClusterCommand, Description};
use crate::config::Config;
use crate::raft::log::LogError;
use crate::raft::member::MemberError;
use crate::raft::metrics::Metrics;
use crate::raft::node::files::Beginning;
use crate::raft::node::thread::NoPeers;
use crate::raft::node::{Fatal, Transport};
use crate::raft::peers::links::{self, Links};
use crate::raft::peers::service::{PeerService, serve};
use crate::raft::peers::{Directory, tls};
use crate::raft::snapshots::SnapshotError;
use crate::raft::{self, Command, Place, Raft, StartError, Started};

/// Pause before the log is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// What a member says of itself.
#[must_use]
pub fn description(config: &Config) -> Description {
    let advertised = config.peer_advertise.clone().unwrap_or_default();
    let xds = config.advertise.clone().unwrap_or_else(|| config.xds.to_string());
    let host = xds.rsplit_once(':').map_or("", |(host, _)| host);
    let admin = if config.admin.ip().is_unspecified() {
        format!("{host}:{}", config.admin.port())
    } else {
        config.admin.to_string()
    };
    let name = config.name.clone().unwrap_or_else(|| advertised.clone());
    Description {
        name,
        peer: advertised,
        xds,
        admin,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        reads: raft::state_machine::VERSION,
    }
}

/// A member whose log runs.
pub(crate) struct Running {
    /// What it started.
    pub(crate) started: Started,
    /// What it needs for its peers; nothing if it stands alone.
    pub(crate) seat: Option<Seat>,
}

/// A member's place among its peers.
pub(crate) struct Seat {
    kept: Kept,
    membership: Membership,
    /// What all members hold.
    pub(crate) secrets: Secrets,
    identity: IdentityWatch,
    links: Links,
    listener: TcpListener,
    /// What this member serves, once it does.
    pub(crate) serving: Arc<OnceLock<Serving>>,
}

/// The parts of a seat that a lost folder changes.
struct Lodging {
    membership: Membership,
    secrets: Secrets,
}

/// Starts the log of the member in the data folder, after it has joined a cluster if it was told to, and sets the
/// number in `config` to the member's.
///
/// # Errors
///
/// What keeps it from starting.
pub(crate) async fn start(
    config: &mut Config,
    metrics: &Metrics,
    clock: &Clock,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<Running> {
    if config.peer_advertise.is_none() {
        let started = start_log(config, true, Box::new(NoPeers), metrics, stop).await?;
        return Ok(Running { started, seat: None });
    }
    let listener = TcpListener::bind(config.peer).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", config.peer))?;
    let kept = Kept::open(&config.data_dir)?;
    let membership = membership(config, &kept, clock).await?;
    let mut place = Lodging { membership, secrets: kept.secrets()? };
    let mut rebuilt = false;
    loop {
        let lost = place.membership.started && !has_log(&config.data_dir);
        let id = place.membership.id;
        config.member_id = id;
        let root = place.secrets.root(clock())?;
        let identity = tls::identity(root, id, clock.clone(), tasks, stop.clone()).await?;
        let (transport, links) = Links::new(metrics.clone());
        let founded = place.membership.founded;
        let begun = if lost {
            let path = raft::member::path(&config.data_dir.join(raft::FOLDER));
            Err(StartError::Fatal(Fatal::Member(MemberError::Missing { path })))
        } else {
            start_log(config, founded, Box::new(transport), metrics, stop).await
        };
        match begun {
            Ok(started) => {
                let Lodging { mut membership, secrets } = place;
                membership.started = true;
                kept.note(&membership)?;
                let serving = Arc::default();
                let seat = Seat { kept, membership, secrets, identity, links, listener, serving };
                return Ok(Running { started, seat: Some(seat) });
            }
            // Of the life before this number was given; it was to be moved aside.
            Err(StartError::Fatal(Fatal::Member(MemberError::OtherMember { .. })))
                if !founded && !place.membership.started =>
            {
                move_aside(&config.data_dir)?;
            }
            Err(error) if !rebuilt && is_damage(&error) => {
                rebuilt = true;
                let told = format!("{:#}", anyhow::Error::from(error));
                place = rebuild(config, &kept, &place.membership, identity, (told, clock)).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Who this member is: it founded a cluster, or has joined one, or does so now.
async fn membership(config: &Config, kept: &Kept, clock: &Clock) -> anyhow::Result<Membership> {
    if let Some(membership) = kept.membership()? {
        if config.join.is_some() {
            tracing::info!(
                member = membership.id,
                "this machine is a member already; the ticket is not used"
            );
        }
        return Ok(membership);
    }
    let kept_ticket = kept.ticket()?;
    if let Some(ticket) = config.join.as_ref().or(kept_ticket.as_ref()) {
        let description = description(config);
        let instance = kept.instance(&ticket.id)?;
        tracing::info!(members = ?ticket.peers, "joining a cluster");
        let reply = enrol::join(ticket, &instance, &description).await?;
        anyhow::ensure!(
            reply.trust_domain == config.trust_domain.as_str(),
            "the cluster's trust domain is {}, the settings say {}",
            reply.trust_domain,
            config.trust_domain.as_str()
        );
        let membership = kept.joined(reply, clock())?;
        tracing::info!(member = membership.id, "taken in by the cluster");
        return Ok(membership);
    }
    // A member that stood alone until now becomes the founder of a cluster.
    anyhow::ensure!(
        has_log(&config.data_dir),
        "there is no member in {} yet: `istiod init` founds a cluster, `istiod init --join TICKET` joins one",
        config.data_dir.display()
    );
    kept.found(config.member_id, clock())?;
    kept.membership()?.context("what was just founded is gone")
}

async fn start_log(
    config: &Config,
    founded: bool,
    transport: Box<dyn Transport>,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> Result<Started, StartError> {
    let mut random = fastrand::Rng::new();
    let (config, metrics, stop) = (config.clone(), metrics.clone(), stop.clone());
    let mut settings = config.raft(random.u64(..));
    settings.inline_snapshots = config.peer_advertise.is_none();
    let now = tokio::time::Instant::now().into_std();
    let start = move || {
        let place = Place { data_dir: &config.data_dir, trust_domain: &config.trust_domain };
        let voters = [settings.id];
        let beginning = if founded { Beginning::Found(&voters) } else { Beginning::Join };
        let starting = raft::Starting { place, settings, beginning, transport, metrics };
        Raft::start_among(starting, &mut random, now, stop)
    };
    match tokio::task::spawn_blocking(start).await {
        Ok(started) => started,
        Err(error) => Err(Fatal::Panicked(error.to_string()).into()),
    }
}

/// Whether the data is lost, so that only peers can give it back.
fn is_damage(error: &StartError) -> bool {
    match error {
        StartError::Fatal(fatal) => matches!(
            fatal,
            Fatal::Log(LogError::Corrupt { .. } | LogError::Foreign { .. })
                | Fatal::Member(MemberError::Corrupt { .. } | MemberError::Missing { .. })
                | Fatal::Snapshot(SnapshotError::Corrupt { .. } | SnapshotError::None { .. })
                | Fatal::Contradiction(_)
        ),
        StartError::InUse { .. } | StartError::Io { .. } => false,
    }
}

async fn rebuild(
    config: &Config,
    kept: &Kept,
    old: &Membership,
    identity: IdentityWatch,
    (why, clock): (String, &Clock),
) -> anyhow::Result<Lodging> {
    let peers: Vec<(u64, String)> = old.peers.clone().into_iter().filter(|(id, _)| *id != old.id).collect();
    anyhow::ensure!(
        !peers.is_empty(),
        "{why}; this member stands alone, so nobody can give its data back: restore a backup"
    );
    tracing::error!(
        member = old.id,
        error = why,
        "this member's data is damaged; its peers are asked to rebuild it under a new number"
    );
    let instance = kept.instance(&format!("instead of {}", old.id))?;
    let reply = enrol::rejoin(&peers, identity, &instance, &description(config)).await?;
    // The new number first: under the old one this machine must not begin again.
    let membership = kept.joined(reply, clock())?;
    let aside = move_aside(&config.data_dir)?;
    tracing::warn!(
        member = membership.id,
        old = old.id,
        moved_to = %aside.display(),
        "the damaged data was moved aside; this member is rebuilt by its peers and takes its old place"
    );
    Ok(Lodging { membership, secrets: kept.secrets()? })
}

/// Whether a log was begun in the data folder.
fn has_log(data_dir: &Path) -> bool {
    raft::member::path(&data_dir.join(raft::FOLDER)).exists()
}

/// Gives the log's folder another name, which none had before.
fn move_aside(data_dir: &Path) -> anyhow::Result<PathBuf> {
    let from = data_dir.join(raft::FOLDER);
    let mut names = (1_u32..).map(|number| data_dir.join(format!("{}.damaged-{number}", raft::FOLDER)));
    let to = names.find(|path| !path.exists()).context("no name is free")?;
    if !from.exists() {
        return Ok(to);
    }
    std::fs::rename(&from, &to)
        .and_then(|()| std::fs::File::open(data_dir)?.sync_all())
        .with_context(|| format!("cannot move {} to {}", from.display(), to.display()))?;
    Ok(to)
}

impl Seat {
    /// Opens the peer port and connects to the peers, on `tasks` until `stop`.
    ///
    /// All of it is one thread's: a message of Raft is little work, and a runtime of several threads wakes another one for
    /// each, on every member that the message reaches.
    ///
    /// # Errors
    ///
    /// When TLS cannot be set up, or the operating system gives no thread.
    pub(crate) fn take(
        self,
        started: &Started,
        config: &Config,
        clock: &Clock,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> anyhow::Result<Peers> {
        let Self { kept, membership, secrets, identity, links, listener, serving } = self;
        let (id, ca) = (membership.id, secrets.fingerprint()?);
        let known = Directory { addresses: membership.peers.clone(), retired: [].into() };
        let (send, directory) = watch::channel(Arc::new(known));
        tasks.spawn(follow(started.raft.clone(), send, (kept, membership), stop.clone()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let connected = links.connected();
        let settings = links::Settings {
            id,
            tls: tls::client_config(identity.clone())?,
            directory: directory.clone(),
            snapshots: started.files.clone(),
        };
        links.start(started.raft.node(), settings, tasks, stop);
        let door = Door {
            raft: started.raft.clone(),
            secrets,
            trust_domain: config.trust_domain.clone(),
            clock: clock.clone(),
            serving,
        };
        let service = PeerService {
            id,
            node: started.raft.node().clone(),
            directory,
            snapshots: started.files.clone(),
            host: Arc::new(door),
            tasks: tasks.clone(),
            stop: stop.clone(),
        };
        serve(listener, tls::server_config(identity)?, service);
        drop(entered);
        let ended = tasks.clone();
        let thread = std::thread::Builder::new().name("peers".to_owned());
        thread.spawn(move || runtime.block_on(async move { ended.wait().await }))?;
        Ok(Peers { connected, ca })
    }
}

/// Keeps the directory as the log has the members, and on disk where they were last, until `stop`.
async fn follow(
    raft: Raft,
    directory: watch::Sender<Arc<Directory>>,
    (kept, mut membership): (Kept, Membership),
    stop: CancellationToken,
) {
    let mut cluster = raft.cluster();
    loop {
        let now = cluster.borrow_and_update().directory();
        // Before it has the log, a member knows only whom it was told of when it was taken in.
        if !now.addresses.is_empty() {
            if membership.peers != now.addresses {
                membership.peers.clone_from(&now.addresses);
                let (kept, membership) = (kept.clone(), membership.clone());
                let noted = tokio::task::spawn_blocking(move || kept.note(&membership)).await;
                if let Ok(Err(error)) = noted {
                    tracing::warn!(%error, "where the peers are is not noted");
                }
            }
            directory.send_if_modified(|known| {
                let changed = **known != now;
                *known = Arc::new(now);
                changed
            });
        }
        match stop.run_until_cancelled(cluster.changed()).await {
            Some(Ok(())) => {}
            Some(Err(_)) => return stop.cancelled().await,
            None => return,
        }
    }
}

/// Enters this member into the log, or says there who it is now, and seals what all members share; until it is done
/// or `stop`.
pub(crate) async fn introduce(
    raft: Raft,
    id: u64,
    description: Description,
    sealed: Option<String>,
    stop: CancellationToken,
) {
    let mut commands = Vec::new();
    let cluster = raft.cluster().borrow().clone();
    match cluster.member(id) {
        None if cluster.members().is_empty() => {
            commands.push(ClusterCommand::Found { id, description });
        }
        Some(member) if member.description != description => {
            commands.push(ClusterCommand::Describe { id, description });
        }
        None | Some(_) => {}
    }
    if let Some(sealed) = sealed.filter(|_| cluster.sealed(super::ROOT).is_none()) {
        commands.push(ClusterCommand::Seal { name: super::ROOT.to_owned(), sealed });
    }
    for command in commands {
        loop {
            let asked = stop.run_until_cancelled(raft.propose(&Command::Cluster(command.clone()))).await;
            match asked {
                None => return,
                Some(Ok(_)) => break,
                Some(Err(error)) => tracing::info!(%error, "this member enters itself into the log later"),
            }
            if stop.run_until_cancelled(tokio::time::sleep(PAUSE)).await.is_none() {
                return;
            }
        }
    }
}
