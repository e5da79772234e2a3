//! One core's share of the data plane: its own runtime, sockets, connections and counters.
//!
//! Workers share the tables, which they only read, and nothing else that a request needs. A worker is told what
//! changed by the generation of the tables, and compares it again at each request, so that a request is never
//! served by older tables than were acknowledged before it came.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use ahash::AHashMap;
use http::HeaderValue;
use serde_json::{Map, Value as Json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::access_log::Log;
use crate::access_log::writer::Writers;
use crate::drain::Drain;
use crate::http::timing::{OF_WORKER, Spare};
use crate::listener::connection::Connection;
use crate::listener::slot::Slot;
use crate::metrics::standard::{Numbered, Principals, Service, Standard, Workload, peer_header};
use crate::metrics::{Registry, Snapshot};
use crate::overload::Overload;
use crate::ratelimit::Buckets;
use crate::router::Routes;
use crate::router::split::Split;
use crate::signal::Signal;
use crate::tables::{TableStore, Tables};
use crate::tls::{Identity, Secrets};
use crate::upstream::{Shared, Upstream};
use crate::xds::access_log::Sink;
use crate::xds::filter::LocalRateLimit;
use crate::xds::route::{ClusterRef, RouteConfiguration};

/// Questions waiting for a worker. Full means it is stuck: whoever asks waits.
const ASKS: usize = 16;
/// Between two looks at idle connections and ejections.
const SWEEP: Duration = Duration::from_secs(1);
/// Between two hand-overs of access log lines that did not fill a batch.
const FLUSH: Duration = Duration::from_millis(250);

/// What workers are started with; the same for all of them.
#[derive(Clone, Debug)]
pub struct Options {
    /// The tables.
    pub tables: Arc<TableStore>,
    /// The proxy's own certificate.
    pub identity: Arc<Identity>,
    /// The node's id.
    pub node_id: String,
    /// The node's metadata.
    pub metadata: Map<String, Json>,
    /// How the proxy ends.
    pub drain: Drain,
    /// Where access logs go.
    pub writers: Writers,
    /// Token buckets of rate limits.
    pub buckets: Arc<Buckets>,
    /// Whether listeners without a direction report standard metrics, too.
    pub reports_all: bool,
    /// What is shed.
    pub overload: Arc<Overload>,
}

impl Options {
    /// Options without a node's metadata.
    #[must_use]
    pub fn new(tables: Arc<TableStore>, identity: Arc<Identity>, drain: Drain) -> Self {
        Self {
            tables,
            identity,
            node_id: String::new(),
            metadata: Map::new(),
            drain,
            writers: Writers::default(),
            buckets: Arc::default(),
            reports_all: false,
            overload: Arc::default(),
        }
    }
}

/// What may be asked of a worker.
#[derive(Debug)]
enum Ask {
    Alive(oneshot::Sender<()>),
    Snapshot(oneshot::Sender<Snapshot>),
    Endpoints(oneshot::Sender<Vec<EndpointStatus>>),
}

/// An endpoint as one worker sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointStatus {
    /// Its cluster.
    pub cluster: String,
    /// Its address.
    pub address: String,
    /// Whether it was ejected.
    pub ejected: bool,
    /// Requests under way.
    pub active: u32,
}

/// A handle to a running worker.
#[derive(Debug)]
pub struct Handle {
    asks: mpsc::Sender<Ask>,
    last: Last,
    ended: oneshot::Receiver<()>,
}

/// A handle that only asks.
#[derive(Clone, Debug)]
pub struct Asker(mpsc::Sender<Ask>, Last);

/// What a worker had counted when it ended.
type Last = Arc<OnceLock<Snapshot>>;

impl Asker {
    /// What the worker counted so far; when it has ended, what it had counted then.
    pub async fn snapshot(&self) -> Snapshot {
        let (reply, answer) = oneshot::channel();
        if self.0.send(Ask::Snapshot(reply)).await.is_ok()
            && let Ok(snapshot) = answer.await
        {
            return snapshot;
        }
        self.1.get().cloned().unwrap_or_default()
    }

    /// Answers when the worker does: whether it still runs.
    pub async fn is_alive(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.0.send(Ask::Alive(reply)).await.is_ok() && answer.await.is_ok()
    }

    /// The endpoints of clusters that the worker has used; empty when it has ended.
    pub async fn endpoints(&self) -> Vec<EndpointStatus> {
        let (reply, answer) = oneshot::channel();
        if self.0.send(Ask::Endpoints(reply)).await.is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }
}

impl Handle {
    /// What can be asked of the worker while it runs.
    #[must_use]
    pub fn asker(&self) -> Asker {
        Asker(self.asks.clone(), Arc::clone(&self.last))
    }

    /// Returns when the worker has ended: after a drain, when its last connection is over.
    pub async fn ended(self) {
        // an error means that the thread is gone, which is the same
        let _over: Result<(), oneshot::error::RecvError> = self.ended.await;
    }
}

/// Starts a worker on a thread of its own. The first one (`index` 0) also serves what cannot be shared, such as
/// Unix sockets.
///
/// # Errors
///
/// When the thread or its runtime cannot be made.
pub fn start(index: usize, options: Options) -> io::Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (asks, questions) = mpsc::channel(ASKS);
    let (over, ended) = oneshot::channel();
    let last = Last::default();
    let end = Arc::clone(&last);
    std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, run(index, options, questions, &end));
        drop(local);
        // nobody may wait for it
        let _told: Result<(), ()> = over.send(());
    })?;
    Ok(Handle { asks, last, ended })
}

async fn run(index: usize, options: Options, mut questions: mpsc::Receiver<Ask>, last: &Last) {
    let mut generation = options.tables.watch();
    let worker = Worker::new(index, options);
    worker.refresh();
    let mut sweep = tokio::time::interval(SWEEP);
    let mut flush = tokio::time::interval(FLUSH);
    let mut asking = true;
    loop {
        tokio::select! {
            () = worker.drain.draining() => {
                worker.ending.raise();
                break;
            }
            changed = generation.changed() => {
                if changed.is_err() {
                    break;
                }
                worker.refresh();
            }
            ask = questions.recv(), if asking => match ask {
                Some(ask) => worker.answer(ask),
                None => asking = false,
            },
            _ = sweep.tick() => worker.sweep(),
            _ = flush.tick() => worker.flush(),
        }
    }
    worker.connections.close();
    let mut cut = false;
    loop {
        tokio::select! {
            () = worker.connections.wait() => break,
            () = worker.drain.cut(), if !cut => {
                cut = true;
                worker.ending.raise();
            }
            ask = questions.recv(), if asking => match ask {
                Some(ask) => worker.answer(ask),
                None => asking = false,
            },
            _ = flush.tick() => worker.flush(),
        }
    }
    worker.end();
    // before nobody answers any more
    last.get_or_init(|| worker.shared.registry.snapshot());
}

/// A route configuration on one worker, with its clusters resolved.
#[derive(Debug)]
pub struct RouteTable {
    /// The routes.
    pub routes: Routes,
    clusters: RefCell<Vec<Option<Rc<Upstream>>>>,
    generation: Cell<u64>,
}

impl RouteTable {
    /// Indexes a configuration.
    #[must_use]
    pub fn new(config: Arc<RouteConfiguration>) -> Self {
        Self { routes: Routes::new(config), clusters: RefCell::default(), generation: Cell::new(u64::MAX) }
    }

    /// The cluster behind a number; `None` when it does not exist.
    #[must_use]
    pub fn upstream(&self, worker: &Rc<Worker>, cluster: ClusterRef) -> Option<Rc<Upstream>> {
        if self.generation.get() != worker.generation.get() {
            let names = self.routes.config.clusters.iter();
            *self.clusters.borrow_mut() = names.map(|n| worker.upstream(n)).collect();
            self.generation.set(worker.generation.get());
        }
        self.clusters.borrow().get(cluster.0)?.clone()
    }
}

/// A worker.
#[derive(Debug)]
pub struct Worker {
    /// Its number.
    pub index: usize,
    /// What its clusters share.
    pub shared: Rc<Shared>,
    /// How the proxy ends.
    pub drain: Drain,
    /// Told with each step of that.
    pub ending: Rc<Signal>,
    /// `date` of this second.
    pub date: RefCell<HeaderValue>,
    /// What is shed.
    pub overload: Arc<Overload>,
    /// The tasks of clients' connections.
    pub connections: TaskTracker,
    /// A peer of whom nothing is known.
    pub nobody: Rc<Numbered<Workload>>,
    /// A service of which nothing is known.
    pub no_service: Rc<Numbered<Service>>,
    /// No identities.
    pub no_principals: Rc<Numbered<Principals>>,
    /// How this proxy tells its peers who it is: metadata and id.
    pub peer_headers: Option<(HeaderValue, HeaderValue)>,
    /// Whether listeners without a direction report standard metrics, too.
    pub reports_all: bool,
    store: Arc<TableStore>,
    tables: RefCell<Arc<Tables>>,
    generation: Cell<u64>,
    upstreams: RefCell<AHashMap<Arc<str>, Rc<Upstream>>>,
    slots: RefCell<BTreeMap<Arc<str>, Rc<Slot>>>,
    /// Listeners by their addresses; of several on one address the first by name.
    addresses: RefCell<AHashMap<SocketAddr, Rc<Slot>>>,
    writers: Writers,
    logs: RefCell<BTreeMap<Sink, Rc<Log>>>,
    buckets: Arc<Buckets>,
    next_connection: Cell<u64>,
    /// Draws the clusters of weighted routes.
    pub split: Split,
}

impl Worker {
    fn new(index: usize, options: Options) -> Rc<Self> {
        let registry = Rc::new(Registry::default());
        let standard = Standard::new(Rc::clone(&registry), &options.metadata);
        let (nobody, no_service, no_principals) = (
            standard.number(Workload::default()),
            standard.number(Service::default()),
            standard.number(Principals::default()),
        );
        let id = HeaderValue::try_from(options.node_id).ok().filter(|id| !id.is_empty());
        let secrets = Secrets { identity: options.identity, tables: Arc::clone(&options.tables) };
        Rc::new(Self {
            index,
            shared: Rc::new(Shared {
                tasks: TaskTracker::new(),
                rng: RefCell::new(fastrand::Rng::new()),
                registry,
                standard,
                secrets: Arc::new(secrets),
                timers: Spare::new(OF_WORKER),
                checks: index == 0,
            }),
            drain: options.drain,
            ending: Rc::default(),
            date: RefCell::new(date()),
            overload: options.overload,
            connections: TaskTracker::new(),
            nobody,
            no_service,
            no_principals,
            peer_headers: peer_header(&options.metadata).zip(id),
            reports_all: options.reports_all,
            tables: RefCell::new(Arc::default()),
            generation: Cell::new(u64::MAX),
            store: options.tables,
            upstreams: RefCell::default(),
            slots: RefCell::default(),
            addresses: RefCell::default(),
            writers: options.writers,
            logs: RefCell::default(),
            buckets: options.buckets,
            split: Split::new(fastrand::u64(..)),
            next_connection: Cell::new(0),
        })
    }

    /// Takes over the newest tables, if they changed.
    pub fn refresh(self: &Rc<Self>) {
        let newest = self.store.shared().load();
        if newest.generation != self.generation.get() {
            let newest = Arc::clone(&newest);
            self.generation.set(newest.generation);
            *self.tables.borrow_mut() = Arc::clone(&newest);
            self.refresh_upstreams(&newest);
            self.refresh_listeners(&newest);
        }
    }

    fn refresh_upstreams(&self, tables: &Tables) {
        // the first worker asks DNS for all of them, and before anybody needs the answer
        if self.index == 0 {
            for active in tables.clusters.values() {
                crate::upstream::dns::start(&active.cluster, &active.state, &self.shared.tasks);
            }
        }
        self.upstreams.borrow_mut().retain(|name, upstream| match tables.clusters.get(name) {
            Some(active) if Arc::ptr_eq(&active.cluster, &upstream.config) => {
                if crate::upstream::dns::comes_from_tables(&upstream.config.discovery) {
                    upstream.update(&active.endpoints);
                }
                true
            }
            Some(_) | None => {
                upstream.close();
                false
            }
        });
        // and the first worker checks the endpoints of all of them
        if self.shared.checks {
            for active in tables.clusters.values().filter(|a| a.cluster.health_check.is_some()) {
                drop(self.upstream(&active.cluster.name));
            }
        }
    }

    fn refresh_listeners(self: &Rc<Self>, tables: &Tables) {
        let mut slots = self.slots.borrow_mut();
        slots.retain(|name, slot| {
            let stays = tables.listeners.contains_key(name);
            if !stays {
                slot.close();
            }
            stays
        });
        for (name, active) in &tables.listeners {
            match slots.get(name) {
                Some(slot) => slot.update(active),
                None => {
                    slots.insert(Arc::clone(name), Slot::open(self, active));
                }
            }
        }
        let mut addresses = AHashMap::new();
        for slot in slots.values() {
            for address in slot.addresses() {
                addresses.entry(address).or_insert_with(|| Rc::clone(slot));
            }
        }
        *self.addresses.borrow_mut() = addresses;
    }

    /// A cluster by name; made at its first use.
    #[must_use]
    pub fn upstream(&self, name: &str) -> Option<Rc<Upstream>> {
        if let Some(upstream) = self.upstreams.borrow().get(name) {
            return Some(Rc::clone(upstream));
        }
        let tables = Arc::clone(&self.tables.borrow());
        let active = tables.clusters.get(name)?;
        let (config, endpoints) = (Arc::clone(&active.cluster), Arc::clone(&active.endpoints));
        let (state, shared) = (Arc::clone(&active.state), Rc::clone(&self.shared));
        let upstream = Upstream::new(config, endpoints, state, shared);
        self.upstreams.borrow_mut().insert(Arc::clone(&active.cluster.name), Rc::clone(&upstream));
        Some(upstream)
    }

    /// The listener on this very address, or on its port of any address.
    #[must_use]
    pub fn listener_at(&self, address: SocketAddr) -> Option<Rc<Slot>> {
        let known = self.addresses.borrow();
        let any = |ip: IpAddr| known.get(&SocketAddr::new(ip, address.port()));
        let v4 = || any(Ipv4Addr::UNSPECIFIED.into());
        let v6 = || any(Ipv6Addr::UNSPECIFIED.into());
        known.get(&address).or_else(v4).or_else(v6).map(Rc::clone)
    }

    /// An access log's destination; `None` when it cannot be opened.
    #[must_use]
    pub fn log(&self, sink: &Sink) -> Option<Rc<Log>> {
        if let Some(log) = self.logs.borrow().get(sink) {
            return Some(Rc::clone(log));
        }
        match self.writers.sender(sink) {
            Ok(sender) => {
                let dropped = self.shared.registry.counter("proxy_access_log_dropped_lines_total", &[]);
                let log = Rc::new(Log::new(sender, dropped));
                self.logs.borrow_mut().insert(sink.clone(), Rc::clone(&log));
                Some(log)
            }
            Err(error) => {
                tracing::warn!(%error, ?sink, "access log cannot be opened");
                None
            }
        }
    }

    /// A random number.
    #[must_use]
    pub fn random(&self) -> u64 {
        self.shared.rng.borrow_mut().u64(..)
    }

    /// The number of a new connection.
    #[must_use]
    pub fn connection_id(&self) -> u64 {
        let id = self.next_connection.get();
        self.next_connection.set(id.wrapping_add(1));
        id
    }

    /// Whether the proxy is ending.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.drain.is_draining()
    }

    /// Takes a token of a rate limit.
    #[must_use]
    pub fn take_token(&self, limit: &Arc<LocalRateLimit>, connection: &Connection) -> bool {
        let now = Instant::now().into_std();
        if limit.per_connection { connection.take_token(limit, now) } else { self.buckets.take(limit, now) }
    }

    fn answer(&self, ask: Ask) {
        // whoever asked may have left
        match ask {
            Ask::Alive(reply) => drop(reply.send(())),
            Ask::Snapshot(reply) => drop(reply.send(self.shared.registry.snapshot())),
            Ask::Endpoints(reply) => drop(reply.send(self.endpoints())),
        }
    }

    fn endpoints(&self) -> Vec<EndpointStatus> {
        let upstreams = self.upstreams.borrow();
        let sorted: BTreeMap<_, _> = upstreams.iter().collect();
        let mut all = Vec::new();
        for upstream in sorted.values() {
            all.extend(upstream.hosts().iter().map(|h| EndpointStatus {
                cluster: upstream.config.name.to_string(),
                address: h.text.to_string(),
                ejected: h.is_ejected(),
                active: h.load.active.get(),
            }));
        }
        all
    }

    fn sweep(&self) {
        let now = Instant::now();
        *self.date.borrow_mut() = date();
        let upstreams: Vec<Rc<Upstream>> = {
            let known = self.upstreams.borrow();
            let sorted: BTreeMap<_, _> = known.iter().collect();
            sorted.values().map(|u| Rc::clone(u)).collect()
        };
        for upstream in upstreams {
            upstream.sweep(now);
        }
    }

    fn flush(&self) {
        for log in self.logs.borrow().values() {
            log.flush();
        }
    }

    /// Lets go of everything, so that nothing keeps anything alive in a circle.
    fn end(&self) {
        self.flush();
        let slots = std::mem::take(&mut *self.slots.borrow_mut());
        for slot in slots.values() {
            slot.close();
        }
        self.addresses.borrow_mut().clear();
        let upstreams = std::mem::take(&mut *self.upstreams.borrow_mut());
        drop(upstreams);
    }
}

/// The time of day as a header has it (RFC 9110, section 5.6.7).
fn date() -> HeaderValue {
    let now = jiff::Timestamp::try_from(wall_clock()).unwrap_or_default();
    let text = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&now);
    text.ok().and_then(|t| HeaderValue::try_from(t).ok()).unwrap_or(HeaderValue::from_static(""))
}

/// The time of day, for access logs.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one clock of access log lines")]
pub fn wall_clock() -> SystemTime {
    SystemTime::now()
}
