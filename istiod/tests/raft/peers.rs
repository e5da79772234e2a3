//! Members over real sockets with their own certificates: what they carry, and whom they refuse.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ca::authority::{Lifetimes, PluggedIn, Serial, SigningRoot};
use ca::client::{CertificateSource, Local};
use ca::identity::TrustDomain;
use ca::renewal::Clock;
use ca::tls::IdentityWatch;
use istiod::raft::disk::{Disk, RealDisk};
use istiod::raft::metrics::Metrics;
use istiod::raft::node::files::Beginning;
use istiod::raft::node::files::open;
use istiod::raft::node::thread::{Ending, Node, RequestError};
use istiod::raft::node::{Driver, Event, Fatal, Refusal, Settings};
use istiod::raft::peers::links::{self, Connected, Links};
use istiod::raft::peers::service::{Closed, PeerService, serve};
use istiod::raft::peers::{Directory, tls};
use istiod::raft::snapshots::Snapshots;
use istiod::raft::store::sled::SledStore;
use istiod::raft::wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::toy::{Toy, busy, now};

/// A loaded machine may be slow; nothing waits this long otherwise.
const PATIENCE: Duration = Duration::from_secs(60);

#[expect(clippy::disallowed_methods, reason = "the one clock of these tests")]
fn clock() -> Clock {
    Arc::new(SystemTime::now)
}

struct Member {
    node: Node<Toy>,
    thread: Ending,
    connected: Connected,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Cluster {
    folder: tempfile::TempDir,
    root: PluggedIn,
    directory: watch::Sender<Arc<Directory>>,
    members: BTreeMap<u64, Member>,
    voters: Vec<u64>,
}

impl Cluster {
    async fn start(voters: &[u64]) -> Self {
        let root = SigningRoot::generate(&tls::domain(), clock()(), Serial::random().unwrap()).unwrap();
        let mut cluster = Self {
            folder: tempfile::tempdir().unwrap(),
            root: root.to_files(),
            directory: watch::Sender::new(Arc::default()),
            members: BTreeMap::new(),
            voters: voters.to_vec(),
        };
        for id in voters {
            cluster.start_member(*id).await;
        }
        cluster
    }

    fn root(&self) -> SigningRoot {
        self.root.check(clock()()).unwrap()
    }

    async fn start_member(&mut self, id: u64) {
        let beginning =
            if self.voters.contains(&id) { Beginning::Found(&self.voters) } else { Beginning::Join };
        let settings = Settings { inline_snapshots: false, ..busy(id, id) };
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let identity = tls::identity(self.root(), id, clock(), &tasks, stop.clone()).await.unwrap();
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
        let open_store = |dir: &Path, life| Ok(Box::new(SledStore::open_or_move_aside(dir, life)?) as Box<_>);
        let dir = self.folder.path().join(id.to_string());
        let parts =
            open(&disk, &open_store, &dir, (settings, beginning), Toy::default(), &mut fastrand::Rng::new());
        let parts = parts.unwrap();
        let snapshots = parts.snapshots.clone();
        let (transport, links) = Links::new(Metrics::default());
        let driver = Driver::start(parts, now()).unwrap();
        let (node, thread) =
            Node::spawn(driver, Box::new(transport), Metrics::default(), stop.clone()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        self.directory.send_modify(|directory| {
            Arc::make_mut(directory).addresses.insert(id, address);
        });
        let connected = links.connected();
        links.start(&node, self.settings(id, &identity, &snapshots), &tasks, &stop);
        let service = PeerService {
            id,
            node: node.clone(),
            directory: self.directory.subscribe(),
            snapshots,
            host: Arc::new(Closed),
            tasks: tasks.clone(),
            stop: stop.clone(),
        };
        serve(listener, tls::server_config(identity).unwrap(), service);
        self.members.insert(id, Member { node, thread, connected, tasks, stop });
    }

    fn settings(&self, id: u64, identity: &IdentityWatch, snapshots: &Snapshots) -> links::Settings {
        links::Settings {
            id,
            tls: tls::client_config(identity.clone()).unwrap(),
            directory: self.directory.subscribe(),
            snapshots: snapshots.clone(),
        }
    }

    fn node(&self, id: u64) -> &Node<Toy> {
        &self.members[&id].node
    }

    fn address(&self, id: u64) -> SocketAddr {
        self.directory.borrow().addresses[&id].parse().unwrap()
    }

    /// Stops a member and gives what its thread says.
    async fn stop_member(&mut self, id: u64) -> Result<(), Arc<Fatal>> {
        let Member { thread, tasks, stop, .. } = self.members.remove(&id).unwrap();
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap()
    }

    async fn stop(mut self) {
        for id in self.members.keys().copied().collect::<Vec<_>>() {
            self.stop_member(id).await.unwrap();
        }
    }

    async fn leader(&self) -> u64 {
        let some = self.members.values().next().unwrap();
        let mut status = some.node.status();
        let gone = |id: u64| !self.members.contains_key(&id);
        let known = status.wait_for(|status| status.leader.is_some_and(|id| !gone(id)));
        let known = tokio::time::timeout(PATIENCE, known).await.expect("a leader in time").unwrap();
        known.leader.unwrap()
    }

    fn followers(&self, leader: u64) -> Vec<u64> {
        self.members.keys().copied().filter(|id| *id != leader).collect()
    }

    /// Waits until `id` has applied `index`.
    async fn applied(&self, id: u64, index: u64) {
        let mut status = self.node(id).status();
        let reached = status.wait_for(|status| status.applied >= index);
        tokio::time::timeout(PATIENCE, reached).await.expect("catches up in time").unwrap();
    }
}

/// Writes until it is acknowledged: an answer may be lost with a leader.
async fn write(node: &Node<Toy>, text: &str) -> u64 {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match node.propose(text.as_bytes().to_vec()).await {
            Ok((index, _)) => return index,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{text}: {error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_takes_writes_and_reads_and_the_loss_of_the_leader_loses_nothing() {
    let mut cluster = Cluster::start(&[1, 2, 3]).await;
    let mut last = 0;
    for id in [1, 2, 3, 1, 2, 3] {
        last = write(cluster.node(id), &format!("k{id}=before")).await;
        // Answered after it was applied on the member that was asked.
        let seen = cluster.node(id).inspect(move |toy| toy.map[&format!("k{id}")].0).await.unwrap();
        assert_eq!(seen, last);
    }
    for id in [1, 2, 3] {
        assert!(cluster.node(id).read_index().await.unwrap() >= last);
    }
    let leader = cluster.leader().await;
    // Proposals that are on their way when the leader goes are given to the next one.
    let survivor = cluster.followers(leader)[0];
    let node = cluster.node(survivor).clone();
    let writing = spawn(async move {
        let mut applied = Vec::new();
        for number in 0..60 {
            applied.push((format!("w{number}"), write(&node, &format!("w{number}=x")).await));
        }
        applied
    });
    cluster.stop_member(leader).await.unwrap();
    let applied = writing.await.unwrap();
    for id in cluster.followers(leader) {
        let index = applied.last().unwrap().1;
        cluster.applied(id, index).await;
        let map = cluster.node(id).inspect(|toy| toy.map.clone()).await.unwrap();
        for (key, index) in &applied {
            assert_eq!(map[key].0, *index, "member {id}: {key}");
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_is_sent_the_snapshot_file_and_a_new_one_joins_by_it() {
    let mut cluster = Cluster::start(&[1, 2, 3]).await;
    write(cluster.node(1), "a=1").await;
    let leader = cluster.leader().await;
    let away = cluster.followers(leader)[0];
    cluster.stop_member(away).await.unwrap();
    let value = "x".repeat(20_000);
    let mut last = 0;
    for number in 0..150 {
        last = write(cluster.node(leader), &format!("k{number}={value}")).await;
    }
    let first = cluster.node(leader).status().borrow().first_index;
    assert!(first > 30, "the log begins at {first}: the member needs a snapshot");
    cluster.start_member(away).await;
    cluster.applied(away, last).await;
    // Somebody new is nothing until it is made a learner.
    cluster.start_member(4).await;
    let changes =
        vec![wire::ConfChangeSingle { change_type: wire::ConfChangeType::AddLearnerNode.into(), node_id: 4 }];
    let change = wire::ConfChangeV2 { changes, ..wire::ConfChangeV2::default() };
    let leader = cluster.leader().await;
    let (index, members) = cluster.node(leader).change_members(change).await.unwrap();
    assert_eq!(members.learners, [4]);
    cluster.applied(4, index).await;
    let count = cluster.node(4).inspect(|toy| toy.map.len()).await.unwrap();
    assert_eq!(count, 151);
    let index = write(cluster.node(4), "from=learner").await;
    assert!(cluster.node(4).read_index().await.unwrap() >= index);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_a_write_is_told_and_a_removed_member_stops() {
    let mut cluster = Cluster::start(&[1, 2, 3]).await;
    write(cluster.node(1), "a=1").await;
    let leader = cluster.leader().await;
    let followers = cluster.followers(leader);
    // The others say that it was removed: its connections are refused, and it ends with the reason.
    let gone = followers[0];
    cluster.directory.send_modify(|directory| {
        Arc::make_mut(directory).retired.insert(gone);
    });
    let mut ended = cluster.node(gone).ended();
    let told = tokio::time::timeout(PATIENCE, ended.wait_for(Option::is_some)).await.expect("in time");
    let why = told.unwrap().clone().unwrap();
    assert!(matches!(*why, Fatal::Removed(id) if id == gone), "{why}");
    drop(ended);
    assert!(cluster.stop_member(gone).await.is_err());
    write(cluster.node(leader), "b=1").await;
    cluster.stop_member(leader).await.unwrap();
    let error = cluster.node(followers[1]).propose(b"c=1".to_vec()).await.unwrap_err();
    assert!(matches!(error, RequestError::Refused(Refusal::NoLeader | Refusal::Unknown)), "{error}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_certificates_of_the_mesh_are_refused_and_garbage_harms_nobody() {
    let cluster = Cluster::start(&[1, 2, 3]).await;
    write(cluster.node(1), "a=1").await;
    let address = cluster.address(1).to_string();
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());

    // The certificate of a workload, or of the control plane itself, from the mesh's own authority.
    let domain = TrustDomain::default();
    let mesh = SigningRoot::generate(&domain, clock()(), Serial::random().unwrap()).unwrap();
    let authority = Arc::new(
        mesh.member(&domain, "1", Lifetimes::default(), clock()(), Serial::random().unwrap()).unwrap(),
    );
    let local = Local {
        authority: Box::new(move || Arc::clone(&authority)),
        dns_names: vec![tls::server_name(2)],
        clock: clock(),
    };
    let source = CertificateSource {
        issuance: local,
        clock: clock(),
        store: None,
        lifetime: None,
        expected: None,
        rng: fastrand::Rng::new(),
    };
    let foreign = source.start(&tasks, stop.clone()).await.unwrap();
    let call = async |identity: IdentityWatch, believed: Option<IdentityWatch>| {
        let own = ca::tls::Own::Current(identity.clone());
        let trust = ca::tls::Trust::Current(believed.unwrap_or(identity));
        let verify = ca::tls::Verify::Peer { trust, expected: ca::tls::ExpectedIdentities::ServerName };
        let alpn = vec![b"h2".to_vec()];
        let config = ca::tls::ClientTls { own, verify, alpn, min_version: ca::tls::MinVersion::Tls13 };
        let channel = tls::connect(&address, 1, config.build().unwrap()).await?;
        let mut client = wire::peers_client::PeersClient::new(channel);
        client.load(wire::LoadRequest::default()).await.map(drop).map_err(|status| status.to_string())
    };
    let peer = tls::identity(cluster.root(), 2, clock(), &tasks, stop.clone()).await.unwrap();
    call(peer.clone(), None).await.expect("a peer may ask");
    let refused = call(foreign, Some(peer.clone())).await.expect_err("a certificate of the mesh is refused");
    assert!(!refused.is_empty());

    // A peer speaks for itself only.
    let channel = tls::connect(&address, 1, tls::client_config(peer).unwrap()).await.unwrap();
    let mut client = wire::peers_client::PeersClient::new(channel);
    let forged = wire::Message {
        msg_type: wire::MessageType::Append.into(),
        from: 3,
        to: 1,
        term: u64::MAX / 2,
        ..wire::Message::default()
    };
    let status = client.messages(tokio_stream::iter([forged])).await.expect_err("is refused");
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
    let status = client
        .forward(wire::ForwardRequest { proposal: vec![0xff; 40].into() })
        .await
        .map(|reply| reply.into_inner().verdict());
    assert_ne!(status.unwrap(), wire::ForwardVerdict::Accepted, "what is no proposal is not logged");

    // Garbage, before and instead of TLS.
    let mut rng = fastrand::Rng::with_seed(5);
    for _ in 0..50 {
        let mut socket = TcpStream::connect(&address).await.unwrap();
        let bytes: Vec<u8> = (0..rng.usize(1..4000)).map(|_| rng.u8(..)).collect();
        socket.write_all(&bytes).await.unwrap_or_default();
        socket.shutdown().await.unwrap_or_default();
        let mut rest = Vec::new();
        tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest)).await.unwrap().unwrap_or_default();
    }
    let term = cluster.node(1).status().borrow().term;
    assert!(term < 1000, "nobody believed the forged term");
    write(cluster.node(2), "b=2").await;
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_on_request() {
    let cluster = Cluster::start(&[1, 2, 3]).await;
    write(cluster.node(1), "a=1").await;
    let before = cluster.leader().await;
    let next = cluster.followers(before)[0];
    cluster.node(before).tell(Event::Transfer(next));
    let mut status = cluster.node(before).status();
    let moved = status.wait_for(|status| status.leader == Some(next));
    tokio::time::timeout(PATIENCE, moved).await.expect("moves in time").unwrap();
    assert!(cluster.members[&before].connected.all().len() <= 2);
    write(cluster.node(before), "a=2").await;
    cluster.stop().await;
}

#[expect(clippy::disallowed_methods, reason = "the test awaits it")]
fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
    tokio::spawn(future)
}
