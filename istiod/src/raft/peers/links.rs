//! Connections to the other members: one for each, kept up as long as it is a member.
//!
//! [`PeerTransport`] is the raft thread's end: it never waits. What cannot be taken is dropped, and the driver is told
//! where that matters; Raft sends its messages again, and forwards are given again by the driver.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use raft::eraftpb::{self, MessageType};
use rustls::ClientConfig;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{Directory, MESSAGE_LIMIT, snapshot, tls};
use crate::raft::machine::StateMachine;
use crate::raft::metrics::Metrics;
use crate::raft::node::thread::Node;
use crate::raft::node::{Event, Forward, Refusal, Transport};
use crate::raft::snapshots::Snapshots;
use crate::raft::wire::peers_client::PeersClient;
use crate::raft::wire::{ForwardRequest, ForwardVerdict, Message};

/// Messages waiting for one peer. Full means that it reads slower than we write: more is dropped, and
/// `istiod_raft_messages_dropped_total` counts.
const MESSAGES: usize = 1024;
/// Snapshots waiting to be sent. Full means that several are under way: Raft is told that this one was not sent.
const SNAPSHOTS: usize = 16;
/// Proposals waiting for the leader. Full means that it does not answer: the driver gives them again later.
const FORWARDS: usize = 4096;
/// First pause after a connection that failed; doubled each time,
const PAUSE: Duration = Duration::from_millis(50);
/// up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A connection that lasted this long makes the next pause a short one again.
const LASTED: Duration = Duration::from_secs(5);
/// The leader answers a forward as soon as the proposal is in its queue; longer means that it is gone.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(2);

/// A client of one peer.
pub type Client = PeersClient<Channel>;

type Queues = ArcSwap<BTreeMap<u64, mpsc::Sender<Message>>>;
type Tell = Box<dyn Fn(Event) + Send + Sync>;

/// Those peers that are connected at present. Clones see the same.
#[derive(Clone, Default)]
pub struct Connected {
    clients: Arc<ArcSwap<BTreeMap<u64, Client>>>,
}

impl Connected {
    /// A client of member `id`, if it is connected.
    #[must_use]
    pub fn client(&self, id: u64) -> Option<Client> {
        self.clients.load().get(&id).cloned()
    }

    /// All connected members.
    #[must_use]
    pub fn all(&self) -> BTreeMap<u64, Client> {
        BTreeMap::clone(&self.clients.load())
    }
}

/// The raft thread's way to its peers.
pub struct PeerTransport {
    queues: Arc<Queues>,
    snapshots: mpsc::Sender<Message>,
    forwards: mpsc::Sender<Forward>,
    tell: Arc<OnceLock<Tell>>,
    metrics: Metrics,
}

impl PeerTransport {
    fn tell(&self, event: Event) {
        if let Some(tell) = self.tell.get() {
            tell(event);
        }
    }
}

impl Transport for PeerTransport {
    fn send(&mut self, messages: Vec<eraftpb::Message>) {
        let queues = self.queues.load();
        for message in messages {
            let to = message.to;
            if message.get_msg_type() == MessageType::MsgSnapshot {
                if self.snapshots.try_send(Message::from(&message)).is_err() {
                    self.tell(Event::SnapshotSent { to, delivered: false });
                }
                continue;
            }
            // Who is not connected was reported as unreachable when the connection ended.
            let Some(queue) = queues.get(&to) else { continue };
            if queue.try_send(Message::from(&message)).is_err() {
                self.metrics.dropped();
            }
        }
    }

    fn forward(&mut self, forwards: Vec<Forward>) {
        for forward in forwards {
            let sequence = forward.sequence;
            if self.forwards.try_send(forward).is_err() {
                self.tell(Event::ForwardAnswered { sequence, result: Err(Refusal::Unknown) });
            }
        }
    }
}

/// Keeps the connections. Made with its [`PeerTransport`], started when the raft thread runs.
pub struct Links {
    connected: Connected,
    queues: Arc<Queues>,
    snapshots: mpsc::Receiver<Message>,
    forwards: mpsc::Receiver<Forward>,
    tell: Arc<OnceLock<Tell>>,
}

/// What the connections are made with.
#[derive(Clone)]
pub struct Settings {
    /// This member.
    pub id: u64,
    /// TLS towards peers.
    pub tls: Arc<ClientConfig>,
    /// Where they are.
    pub directory: watch::Receiver<Arc<Directory>>,
    /// This member's snapshots, to be sent from.
    pub snapshots: Snapshots,
}

impl Links {
    /// Both ends, not connected to anybody yet.
    #[must_use]
    pub fn new(metrics: Metrics) -> (PeerTransport, Self) {
        let (snapshots, snapshot_queue) = mpsc::channel(SNAPSHOTS);
        let (forwards, forward_queue) = mpsc::channel(FORWARDS);
        let (queues, tell) = (Arc::new(Queues::default()), Arc::new(OnceLock::new()));
        let transport = PeerTransport {
            queues: Arc::clone(&queues),
            snapshots,
            forwards,
            tell: Arc::clone(&tell),
            metrics,
        };
        let connected = Connected::default();
        (transport, Self { connected, queues, snapshots: snapshot_queue, forwards: forward_queue, tell })
    }

    /// Those peers that are connected, now and later.
    #[must_use]
    pub fn connected(&self) -> Connected {
        self.connected.clone()
    }

    /// Connects to every member of the directory but this one, and carries what the transport is given, on `tasks`
    /// until `stop`.
    pub fn start<M: StateMachine>(
        self,
        node: &Node<M>,
        settings: Settings,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) {
        let told = node.clone();
        if self.tell.set(Box::new(move |event| told.tell(event))).is_err() {
            tracing::warn!("the links were started twice");
        }
        let shared = Shared {
            id: settings.id,
            tls: settings.tls,
            tell: self.tell,
            queues: self.queues,
            connected: self.connected,
        };
        let spawn = tasks.clone();
        let (links, until) = (shared.clone(), stop.clone());
        tasks.spawn(async move { links.follow(settings.directory, &spawn, &until).await });
        let (spawn, links) = (tasks.clone(), shared.clone());
        let (mut queue, until, files) = (self.snapshots, stop.clone(), settings.snapshots);
        tasks.spawn(async move {
            while let Some(Some(message)) = until.run_until_cancelled(queue.recv()).await {
                let (links, files, until) = (links.clone(), files.clone(), until.clone());
                spawn.spawn(async move { links.send_snapshot(message, files, &until).await });
            }
        });
        let (spawn, mut queue, until) = (tasks.clone(), self.forwards, stop.clone());
        tasks.spawn(async move {
            while let Some(Some(forward)) = until.run_until_cancelled(queue.recv()).await {
                let links = shared.clone();
                spawn.spawn(async move { links.forward(forward).await });
            }
        });
    }
}

#[derive(Clone)]
struct Shared {
    id: u64,
    tls: Arc<ClientConfig>,
    tell: Arc<OnceLock<Tell>>,
    queues: Arc<Queues>,
    connected: Connected,
}

impl Shared {
    fn tell(&self, event: Event) {
        if let Some(tell) = self.tell.get() {
            tell(event);
        }
    }

    /// One task for each member of the directory; a member that goes, or whose address changes, ends its task.
    async fn follow(
        self,
        mut directory: watch::Receiver<Arc<Directory>>,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) {
        let mut running: BTreeMap<u64, (String, CancellationToken)> = BTreeMap::new();
        loop {
            let wanted = Arc::clone(&directory.borrow_and_update());
            running.retain(|id, (address, stop)| {
                let stays = wanted.addresses.get(id) == Some(address);
                if !stays {
                    stop.cancel();
                }
                stays
            });
            for (id, address) in wanted.addresses.iter().filter(|(id, _)| **id != self.id) {
                if !running.contains_key(id) {
                    let until = stop.child_token();
                    running.insert(*id, (address.clone(), until.clone()));
                    let (links, id, address) = (self.clone(), *id, address.clone());
                    tasks.spawn(async move {
                        until.run_until_cancelled(links.keep(id, &address)).await;
                        links.forget(id);
                    });
                }
            }
            match stop.run_until_cancelled(directory.changed()).await {
                Some(Ok(())) => {}
                Some(Err(_)) => return stop.cancelled().await,
                None => return,
            }
        }
    }

    /// Connects to a peer again and again.
    async fn keep(&self, id: u64, address: &str) {
        let mut pause = PAUSE;
        loop {
            let began = Instant::now();
            match tls::connect(address, id, Arc::clone(&self.tls)).await {
                Ok(channel) => {
                    tracing::debug!(peer = id, address, "connected to a peer");
                    let ended = self.carry(id, channel).await;
                    self.forget(id);
                    self.tell(Event::Unreachable(id));
                    tracing::debug!(peer = id, address, error = %ended, "a peer's connection ended");
                    if ended.code() == Code::PermissionDenied && ended.message() == super::REMOVED {
                        self.tell(Event::Removed);
                    }
                }
                Err(error) => tracing::debug!(peer = id, address, error, "no connection to a peer"),
            }
            if began.elapsed() > LASTED {
                pause = PAUSE;
            }
            tokio::time::sleep(pause + pause.mul_f64(fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Carries messages to a peer until the connection ends, and tells why.
    async fn carry(&self, id: u64, channel: Channel) -> Status {
        let client = PeersClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        let (queue, messages) = mpsc::channel(MESSAGES);
        self.queues.rcu(|queues| {
            let mut next = BTreeMap::clone(queues);
            next.insert(id, queue.clone());
            next
        });
        self.connected.clients.rcu(|clients| {
            let mut next = BTreeMap::clone(clients);
            next.insert(id, client.clone());
            next
        });
        let mut client = client;
        match client.messages(ReceiverStream::new(messages)).await {
            Ok(_) => Status::ok("the peer closed the stream"),
            Err(status) => status,
        }
    }

    fn forget(&self, id: u64) {
        self.queues.rcu(|queues| {
            let mut next = BTreeMap::clone(queues);
            next.remove(&id);
            next
        });
        self.connected.clients.rcu(|clients| {
            let mut next = BTreeMap::clone(clients);
            next.remove(&id);
            next
        });
    }

    async fn send_snapshot(&self, message: Message, files: Snapshots, stop: &CancellationToken) {
        let to = message.to;
        let sent = match self.connected.client(to) {
            None => Err("it is not connected".to_owned()),
            Some(client) => {
                let sending = snapshot::send(client, files, message);
                stop.run_until_cancelled(sending).await.unwrap_or_else(|| Err("stopped".to_owned()))
            }
        };
        match &sent {
            Ok(bytes) => tracing::info!(peer = to, bytes, "sent a snapshot to a peer"),
            Err(error) => tracing::info!(peer = to, error, "a snapshot for a peer was not sent"),
        }
        self.tell(Event::SnapshotSent { to, delivered: sent.is_ok() });
    }

    async fn forward(&self, Forward { to, sequence, proposal }: Forward) {
        let result = match self.connected.client(to) {
            None => Err(Refusal::NoLeader),
            Some(mut client) => {
                let asked = client.forward(ForwardRequest { proposal });
                match tokio::time::timeout(FORWARD_TIMEOUT, asked).await {
                    Ok(Ok(reply)) => {
                        let reply = reply.into_inner();
                        verdict(reply.verdict(), reply.leader, reply.reason)
                    }
                    Ok(Err(_)) | Err(_) => Err(Refusal::Unknown),
                }
            }
        };
        self.tell(Event::ForwardAnswered { sequence, result });
    }
}

fn verdict(verdict: ForwardVerdict, leader: u64, reason: String) -> Result<(), Refusal> {
    match verdict {
        ForwardVerdict::Accepted => Ok(()),
        ForwardVerdict::NotLeader => Err(Refusal::NotLeader(Some(leader).filter(|id| *id != 0))),
        ForwardVerdict::Busy => Err(Refusal::Busy),
        ForwardVerdict::Refused => Err(Refusal::Invalid(reason)),
        ForwardVerdict::NoSpace => Err(Refusal::NoSpace(reason)),
        ForwardVerdict::Unknown => Err(Refusal::Unknown),
    }
}
