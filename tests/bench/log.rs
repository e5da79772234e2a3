//! istiod's log alone: three members of the same driver, log, store and peer port, under a state machine that only
//! keeps values. They run in this process and are proposed to directly: what is missing is the way of a client
//! to them, and all that istiod does for a change of the configuration besides.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::Context;
use ca::authority::{PluggedIn, Serial, SigningRoot};
use ca::renewal::Clock;
use istiod::raft::disk::{Disk, RealDisk};
use istiod::raft::machine::{Frozen, Halt, StateMachine, Writes};
use istiod::raft::metrics::Metrics;
use istiod::raft::node::files::{Beginning, open};
use istiod::raft::node::thread::Node;
use istiod::raft::node::{Driver, Settings};
use istiod::raft::peers::links::{self, Links};
use istiod::raft::peers::service::{Closed, PeerService, serve};
use istiod::raft::peers::{Directory, tls};
use istiod::raft::store::sled::SledStore;
use istiod::raft::store::{Pairs, Write};
use tests::{PATIENCE, eventually};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const VOTERS: [u64; 3] = [1, 2, 3];

/// Values by name; a command is `name=value`.
#[derive(Default)]
pub(crate) struct Values {
    held: BTreeMap<String, String>,
    unwritten: BTreeSet<String>,
}

impl StateMachine for Values {
    type Answer = ();

    fn apply(&mut self, index: u64, command: &[u8]) -> Result<(), Halt> {
        let pair = std::str::from_utf8(command).ok().and_then(|text| text.split_once('='));
        let (name, value) = pair.ok_or_else(|| halt(index, "not a pair"))?;
        self.unwritten.insert(name.to_owned());
        self.held.insert(name.to_owned(), value.to_owned());
        Ok(())
    }

    fn take_writes(&mut self) -> Writes {
        let names = std::mem::take(&mut self.unwritten).into_iter();
        let value = |name: &String| self.held.get(name).map(|value| value.clone().into_bytes());
        let writes = names.map(|name| Write { value: value(&name), key: name.into_bytes() }).collect();
        Box::new(move || writes)
    }

    fn all_writes(&mut self) -> Writes {
        self.unwritten = self.held.keys().cloned().collect();
        self.take_writes()
    }

    fn publish(&mut self, _: u64, _: Instant) {}

    fn freeze(&self) -> Frozen {
        let held = self.held.clone();
        Box::new(move || serde_json::to_vec(&held).map_err(|error| halt(0, error)))
    }

    fn restore(&mut self, index: u64, snapshot: &[u8]) -> Result<(), Halt> {
        self.held = serde_json::from_slice(snapshot).map_err(|error| halt(index, error))?;
        Ok(())
    }

    fn load(&mut self, index: u64, pairs: Pairs) -> Result<(), Halt> {
        let text = |bytes| String::from_utf8(bytes).map_err(|error| halt(index, error));
        self.held.clear();
        for (name, value) in pairs {
            self.held.insert(text(name)?, text(value)?);
        }
        Ok(())
    }
}

fn halt(index: u64, reason: impl ToString) -> Halt {
    Halt { index, reason: reason.to_string() }
}

/// Three members. They end with the process.
pub(crate) struct Log {
    nodes: BTreeMap<u64, Node<Values>>,
    directory: watch::Sender<Arc<Directory>>,
}

#[expect(clippy::disallowed_methods, reason = "the clock of the members' certificates")]
fn clock() -> Clock {
    Arc::new(SystemTime::now)
}

impl Log {
    pub(crate) async fn start(folder: &Path) -> anyhow::Result<Self> {
        let root = SigningRoot::generate(&tls::domain(), clock()(), Serial::random()?)?.to_files();
        let mut log = Self { nodes: BTreeMap::new(), directory: watch::Sender::new(Arc::default()) };
        for id in VOTERS {
            let node = log.member(&folder.join(format!("log-{id}")), id, &root).await?;
            log.nodes.insert(id, node);
        }
        Ok(log)
    }

    async fn member(&self, dir: &Path, id: u64, root: &PluggedIn) -> anyhow::Result<Node<Values>> {
        let settings = Settings { inline_snapshots: false, ..Settings::new(id, id) };
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let identity = tls::identity(root.check(clock()())?, id, clock(), &tasks, stop.clone()).await?;
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
        let open_store = |dir: &Path, life| Ok(Box::new(SledStore::open_or_move_aside(dir, life)?) as Box<_>);
        let beginning = (settings, Beginning::Found(&VOTERS));
        let parts = open(&disk, &open_store, dir, beginning, Values::default(), &mut fastrand::Rng::new())?;
        let snapshots = parts.snapshots.clone();
        let (transport, links) = Links::new(Metrics::default());
        let driver = Driver::start(parts, tokio::time::Instant::now().into_std())?;
        let (node, _) = Node::spawn(driver, Box::new(transport), Metrics::default(), stop.clone())?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        self.directory.send_modify(|directory| {
            Arc::make_mut(directory).addresses.insert(id, address);
        });
        let settings = links::Settings {
            id,
            tls: tls::client_config(identity.clone())?,
            directory: self.directory.subscribe(),
            snapshots: snapshots.clone(),
        };
        links.start(&node, settings, &tasks, &stop);
        let service = PeerService {
            id,
            node: node.clone(),
            directory: self.directory.subscribe(),
            snapshots,
            host: Arc::new(Closed),
            tasks,
            stop,
        };
        serve(listener, tls::server_config(identity)?, service);
        Ok(node)
    }

    /// The member that leads.
    pub(crate) async fn leader(&self) -> anyhow::Result<Node<Values>> {
        eventually(PATIENCE, "the log has a leader", || async {
            let leads = self.nodes.values().find(|node| node.status().borrow().leading);
            leads.cloned().context("nobody leads")
        })
        .await
    }
}
