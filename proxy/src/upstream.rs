//! A cluster at run time, on one worker: its endpoints with their load, health and connections.
//!
//! An [`Upstream`] lives as long as the configuration of its cluster stays the same; when only endpoints change,
//! those that stay keep their connections and their health. [`send`] carries requests.

pub mod dns;
pub mod h1;
pub mod h2;
pub mod health;
pub mod pool;
pub mod send;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::lb::locality::{self, Level, PriorityLoad};
use crate::lb::{Balancer, Load, Policy};
use crate::metrics::standard::{Numbered, Service, Standard, Workload};
use crate::metrics::{Counter, Registry};
use crate::tls::Connector;
use crate::xds::cluster::endpoint::{ClusterLoadAssignment, Endpoint, Health};
use crate::xds::cluster::lb::LbPolicy;
use crate::xds::cluster::{Cluster, Discovery};
use crate::xds::decode::Address;
use crate::xds::tls::UpstreamTls;
use health::{Outlier, Signal};
use pool::Pool;
pub use send::{Failure, FailureKind};

/// One endpoint on one worker.
#[derive(Debug)]
pub struct Host {
    /// Where it is.
    pub address: Address,
    /// Its address as text.
    pub text: Rc<str>,
    /// What discovery says of it.
    pub endpoint: Arc<Endpoint>,
    /// Weight and requests under way.
    pub load: Load,
    /// Its connections.
    pub pool: Pool,
    /// TLS towards it.
    pub tls: Option<Arc<UpstreamTls>>,
    /// The workload behind it, for metrics.
    pub workload: Rc<Numbered<Workload>>,
    /// The most requests on one connection.
    pub max_uses: Option<u32>,
    outlier: RefCell<Outlier>,
    ejected: Cell<bool>,
    /// Whether TLS agreed on HTTP/2, for clusters that leave it to ALPN.
    alpn_h2: Cell<Option<bool>>,
}

/// An endpoint as the balancer sees it.
#[derive(Debug, Clone)]
struct Candidate(Rc<Host>);

impl AsRef<Load> for Candidate {
    fn as_ref(&self) -> &Load {
        &self.0.load
    }
}

impl Host {
    fn is_healthy(&self) -> bool {
        !self.ejected.get() && self.endpoint.health == Health::Healthy
    }

    fn is_degraded(&self) -> bool {
        !self.ejected.get() && self.endpoint.health == Health::Degraded
    }

    /// Whether passive health checks left it out.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.ejected.get()
    }
}

/// The endpoints that get requests: healthy ones; degraded ones only where the whole cluster has no healthy one.
fn usable(hosts: &[Rc<Host>], any_healthy: bool) -> Vec<Rc<Host>> {
    hosts.iter().filter(|h| h.is_healthy() || (!any_healthy && h.is_degraded())).cloned().collect()
}

/// Endpoints that are picked from together.
#[derive(Debug)]
struct Group {
    hosts: Vec<Candidate>,
    balancer: Balancer,
}

/// The endpoints of one priority.
#[derive(Debug)]
struct PriorityHosts {
    all: Group,
    usable: Group,
    /// By locality, with weights, when localities are weighted.
    localities: Vec<(u64, Group)>,
    locality_total: u64,
}

/// The endpoints of a cluster, arranged for picking. Replaced as a whole when an endpoint or its health changes.
#[derive(Debug, Default)]
struct HostSet {
    hosts: Vec<Rc<Host>>,
    priorities: Vec<PriorityHosts>,
    load: PriorityLoad,
}

/// What Envoy counts of a cluster.
#[derive(Debug)]
pub struct ClusterStats {
    /// Requests sent.
    pub rq_total: Rc<Counter>,
    /// Requests under way.
    pub rq_active: Rc<Counter>,
    /// Connections made.
    pub cx_total: Rc<Counter>,
    /// Connections open.
    pub cx_active: Rc<Counter>,
    /// Connections that did not come about.
    pub cx_connect_fail: Rc<Counter>,
    /// Retries.
    pub rq_retry: Rc<Counter>,
    /// Requests that a circuit breaker refused.
    pub rq_pending_overflow: Rc<Counter>,
    /// Requests that timed out.
    pub rq_timeout: Rc<Counter>,
    /// Ejections.
    pub ejections: Rc<Counter>,
    /// Responses by class: 1xx to 5xx.
    pub rq_xx: [Rc<Counter>; 5],
}

impl ClusterStats {
    fn new(registry: &Registry, name: &str) -> Self {
        let labels = [("cluster_name", name)];
        let counter = |metric| registry.counter(metric, &labels);
        let class = |code| {
            let labels = [("cluster_name", name), ("response_code_class", code)];
            registry.counter("envoy_cluster_upstream_rq_xx", &labels)
        };
        Self {
            rq_total: counter("envoy_cluster_upstream_rq_total"),
            rq_active: registry.gauge("envoy_cluster_upstream_rq_active", &labels),
            cx_total: counter("envoy_cluster_upstream_cx_total"),
            cx_active: registry.gauge("envoy_cluster_upstream_cx_active", &labels),
            cx_connect_fail: counter("envoy_cluster_upstream_cx_connect_fail"),
            rq_retry: counter("envoy_cluster_upstream_rq_retry"),
            rq_pending_overflow: counter("envoy_cluster_upstream_rq_pending_overflow"),
            rq_timeout: counter("envoy_cluster_upstream_rq_timeout"),
            ejections: counter("envoy_cluster_outlier_detection_ejections_total"),
            rq_xx: ["1", "2", "3", "4", "5"].map(class),
        }
    }
}

/// The endpoints of a locality: priority, weight, endpoints.
type Placed = (u32, Option<u32>, Vec<Rc<Host>>);

/// A cluster on one worker.
#[derive(Debug)]
pub struct Upstream {
    /// Its configuration.
    pub config: Arc<Cluster>,
    /// The service behind it, for metrics.
    pub service: Rc<Numbered<Service>>,
    /// What Envoy counts of it.
    pub stats: ClusterStats,
    /// What all upstreams of the worker share.
    shared: Rc<Shared>,
    endpoints: RefCell<Arc<ClusterLoadAssignment>>,
    set: RefCell<Rc<HostSet>>,
    original: RefCell<BTreeMap<SocketAddr, Rc<Host>>>,
    connectors: RefCell<Vec<(Arc<UpstreamTls>, Connector)>>,
    requests: Cell<u32>,
    retries: Cell<u32>,
    connections: Cell<u32>,
    pending: Cell<u32>,
    freed: Notify,
    next_tick: Cell<Option<Instant>>,
}

/// What the upstreams of one worker share.
#[derive(Debug)]
pub struct Shared {
    /// Connections' tasks.
    pub tasks: tokio_util::task::TaskTracker,
    /// Chance.
    pub rng: RefCell<fastrand::Rng>,
    /// Metrics.
    pub registry: Rc<Registry>,
    /// Istio's standard metrics.
    pub standard: Standard,
    /// Certificates by name.
    pub secrets: Arc<crate::tls::Secrets>,
    /// Timers for streams.
    pub timers: crate::http::timing::Spare,
}

/// What a pick depends on.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The request's hash.
    pub hash: Option<u64>,
    /// Endpoints that were tried already and should be avoided.
    pub avoid: &'a [Rc<Host>],
    /// How often a pick is repeated to avoid them.
    pub attempts: u32,
    /// Where the client wanted to go.
    pub original: SocketAddr,
}

impl Upstream {
    /// A cluster with these endpoints.
    #[must_use]
    pub fn new(config: Arc<Cluster>, endpoints: Arc<ClusterLoadAssignment>, shared: Rc<Shared>) -> Rc<Self> {
        let service = shared.standard.number(service_of(&config));
        let stats = ClusterStats::new(&shared.registry, &config.stat_name);
        let this = Rc::new(Self {
            service,
            stats,
            shared,
            endpoints: RefCell::new(Arc::clone(&endpoints)),
            set: RefCell::default(),
            original: RefCell::default(),
            connectors: RefCell::default(),
            requests: Cell::new(0),
            retries: Cell::new(0),
            connections: Cell::new(0),
            pending: Cell::new(0),
            freed: Notify::new(),
            next_tick: Cell::new(None),
            config,
        });
        match &this.config.discovery {
            Discovery::StrictDns(named, how) | Discovery::LogicalDns(named, how) => {
                dns::start(&this, Arc::clone(named), *how);
            }
            Discovery::Static(_) | Discovery::Eds { .. } | Discovery::OriginalDst(_) => {
                this.rebuild(&endpoints);
            }
        }
        this
    }

    /// Takes new endpoints. Those that stay keep connections and health; those that went drain.
    pub fn update(&self, endpoints: &Arc<ClusterLoadAssignment>) {
        if !Arc::ptr_eq(&self.endpoints.borrow(), endpoints) {
            *self.endpoints.borrow_mut() = Arc::clone(endpoints);
            self.rebuild(endpoints);
        }
    }

    /// All endpoints.
    #[must_use]
    pub fn hosts(&self) -> Vec<Rc<Host>> {
        self.set.borrow().hosts.clone()
    }

    fn rebuild(&self, endpoints: &ClusterLoadAssignment) {
        let old = Rc::clone(&self.set.borrow());
        let mut known: BTreeMap<&Address, &Rc<Host>> = old.hosts.iter().map(|h| (&h.address, h)).collect();
        let mut placed = Vec::new();
        for locality in &endpoints.localities {
            let hosts = locality.endpoints.iter().map(|e| match known.remove(&e.address) {
                Some(host) if host.endpoint == *e => Rc::clone(host),
                Some(host) => self.host_like(e, host),
                None => self.host(e, Outlier::default()),
            });
            placed.push((locality.priority, locality.weight, hosts.collect::<Vec<_>>()));
        }
        for gone in known.into_values() {
            gone.pool.close();
        }
        self.arrange(placed, endpoints);
    }

    /// The same address with other attributes: its health stays, its connections are made anew.
    fn host_like(&self, endpoint: &Arc<Endpoint>, old: &Rc<Host>) -> Rc<Host> {
        old.pool.close();
        self.host(endpoint, old.outlier.borrow().clone())
    }

    fn host(&self, endpoint: &Arc<Endpoint>, outlier: Outlier) -> Rc<Host> {
        let workload = match &endpoint.workload {
            Some(w) => Workload::from_endpoint(
                &[&*w.name, &w.namespace, &w.canonical_name, &w.canonical_revision, &w.cluster].join(";"),
            ),
            None => Workload::default(),
        };
        let tls = self.config.transport(endpoint.transport_metadata()).cloned();
        let http = &self.config.http;
        // a connection whose server name is the request's must not serve another request
        let per_request = http.auto_sni || tls.as_ref().is_some_and(|t| t.auto_host_sni);
        Rc::new(Host {
            address: endpoint.address.clone(),
            text: endpoint.address.to_string().into(),
            endpoint: Arc::clone(endpoint),
            load: Load::new(endpoint.weight),
            pool: Pool::default(),
            tls,
            workload: self.shared.standard.workload(workload),
            max_uses: if per_request { Some(1) } else { http.max_requests_per_connection },
            ejected: Cell::new(outlier.is_ejected()),
            outlier: RefCell::new(outlier),
            alpn_h2: Cell::new(None),
        })
    }

    fn arrange(&self, placed: Vec<Placed>, endpoints: &ClusterLoadAssignment) {
        let hosts: Vec<Rc<Host>> = placed.iter().flat_map(|(_, _, h)| h.iter().cloned()).collect();
        let count = placed.iter().map(|(p, _, _)| p + 1).max().unwrap_or(0);
        let any_healthy = hosts.iter().any(|h| h.is_healthy());
        let mut priorities = Vec::new();
        let mut levels = Vec::new();
        for priority in 0..count {
            let of: Vec<_> = placed.iter().filter(|(p, _, _)| *p == priority).collect();
            let all: Vec<Rc<Host>> = of.iter().flat_map(|(_, _, h)| h.iter().cloned()).collect();
            let usable = usable(&all, any_healthy);
            levels.push(Level { total: all.len(), healthy: usable.len() });
            let localities = if self.config.lb_common.locality_weighted {
                self.localities(&of, any_healthy)
            } else {
                Vec::new()
            };
            let locality_total = localities.iter().map(|(w, _)| w).sum();
            priorities.push(PriorityHosts {
                all: self.group(all),
                usable: self.group(usable),
                localities,
                locality_total,
            });
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a percentage from 0 to 100"
        )]
        let panic_below = self.config.lb_common.panic_threshold.clamp(0.0, 100.0) as u32;
        let factor = Some(endpoints.overprovisioning_factor).filter(|f| *f > 0);
        let load = locality::priority_load(&levels, panic_below, factor);
        *self.set.borrow_mut() = Rc::new(HostSet { hosts, priorities, load });
    }

    fn localities(&self, of: &[&Placed], any_healthy: bool) -> Vec<(u64, Group)> {
        of.iter()
            .map(|(_, weight, hosts)| {
                let usable = usable(hosts, any_healthy);
                let level = Level { total: hosts.len(), healthy: usable.len() };
                (locality::locality_weight(weight.unwrap_or(0), level), self.group(usable))
            })
            .filter(|(weight, _)| *weight > 0)
            .collect()
    }

    fn group(&self, hosts: Vec<Rc<Host>>) -> Group {
        let policy = policy_of(&self.config.lb);
        let by_name = self.config.lb_common.hash_hostname;
        let keys: Vec<String> = match policy {
            Policy::RingHash { .. } | Policy::Maglev { .. } => hosts
                .iter()
                .map(|h| {
                    if by_name && !h.endpoint.hostname.is_empty() {
                        h.endpoint.hostname.to_string()
                    } else {
                        h.text.to_string()
                    }
                })
                .collect(),
            Policy::RoundRobin | Policy::Random | Policy::LeastRequest { .. } => Vec::new(),
        };
        let start = self.shared.rng.borrow_mut().usize(..1 << 16);
        let hosts: Vec<Candidate> = hosts.into_iter().map(Candidate).collect();
        let balancer = Balancer::new(policy, &hosts, &keys, start);
        Group { hosts, balancer }
    }

    /// An endpoint for a request.
    #[must_use]
    pub fn pick(&self, ask: Ask<'_>) -> Option<Rc<Host>> {
        if let Discovery::OriginalDst(settings) = &self.config.discovery {
            let mut address = ask.original;
            address.set_port(settings.port.unwrap_or(address.port()));
            return Some(self.original_host(address));
        }
        let set = self.set.borrow();
        let mut rng = self.shared.rng.borrow_mut();
        let mut picked = set.pick(ask.hash, &mut rng)?;
        for _ in 1..ask.attempts {
            if !ask.avoid.iter().any(|h| Rc::ptr_eq(h, picked)) {
                break;
            }
            picked = set.pick(ask.hash, &mut rng)?;
        }
        Some(Rc::clone(picked))
    }

    fn original_host(&self, address: SocketAddr) -> Rc<Host> {
        let mut original = self.original.borrow_mut();
        let host = original.entry(address).or_insert_with(|| {
            let endpoint = dns::endpoint_at(address);
            self.host(&Arc::new(endpoint), Outlier::default())
        });
        Rc::clone(host)
    }

    /// Notes how a request to an endpoint ended.
    pub fn on_result(&self, host: &Rc<Host>, signal: Signal) {
        let Some(settings) = &self.config.outlier else { return };
        let draw = self.shared.rng.borrow_mut().u32(..100);
        let wants = host.outlier.borrow_mut().on_result(signal, settings, draw);
        if !wants || host.ejected.get() {
            return;
        }
        let hosts = self.hosts();
        let ejected = hosts.iter().filter(|h| h.ejected.get()).count();
        if !health::may_eject(settings, ejected, hosts.len()) {
            return;
        }
        let jitter = settings.max_jitter.mul_f64(self.shared.rng.borrow_mut().f64());
        host.outlier.borrow_mut().eject(settings, Instant::now().into_std(), jitter);
        host.ejected.set(true);
        self.stats.ejections.inc();
        tracing::info!(cluster = %self.config.name, host = %host.text, "endpoint ejected");
        self.rearrange();
    }

    fn rearrange(&self) {
        let endpoints = Arc::clone(&self.endpoints.borrow());
        let old = Rc::clone(&self.set.borrow());
        let by_address: BTreeMap<&Address, &Rc<Host>> = old.hosts.iter().map(|h| (&h.address, h)).collect();
        let placed = endpoints.localities.iter().map(|l| {
            let hosts = l.endpoints.iter().filter_map(|e| by_address.get(&e.address).map(|h| Rc::clone(h)));
            (l.priority, l.weight, hosts.collect())
        });
        self.arrange(placed.collect(), &endpoints);
    }

    /// The regular look: ejections that are over, connections that are idle for too long.
    pub fn sweep(&self, now: Instant) {
        let idle = self.config.http.idle_timeout;
        let mut back = false;
        let tick = self.config.outlier.as_ref().is_some_and(|settings| {
            let due = self.next_tick.get().is_none_or(|t| now >= t);
            if due {
                self.next_tick.set(Some(now + settings.interval.min(Duration::from_secs(3600))));
            }
            due
        });
        for host in self.hosts() {
            host.pool.sweep(idle, now);
            if tick && host.outlier.borrow_mut().tick(now.into_std()) {
                host.ejected.set(false);
                back = true;
            }
        }
        if back {
            self.rearrange();
        }
        self.original.borrow_mut().retain(|_, host| {
            host.pool.sweep(idle, now);
            !host.pool.is_empty() || host.load.active.get() > 0
        });
    }

    /// Lets go of all connections: the cluster is gone or has another configuration.
    pub fn close(&self) {
        for host in self.hosts() {
            host.pool.close();
        }
        for host in self.original.borrow().values() {
            host.pool.close();
        }
    }

    /// A retry, if the circuit breaker has room for one.
    #[must_use]
    pub fn start_retry(self: &Rc<Self>) -> Option<Retrying> {
        let limits = &self.config.limits;
        let most = match limits.retry_budget {
            Some((percent, least)) => {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a share of a u32"
                )]
                let share = (f64::from(self.requests.get()) * percent / 100.0) as u32;
                share.max(least)
            }
            None => limits.max_retries,
        };
        if self.retries.get() >= most {
            return None;
        }
        self.retries.set(self.retries.get() + 1);
        self.stats.rq_retry.inc();
        Some(Retrying(Rc::clone(self)))
    }
}

impl HostSet {
    fn pick(&self, hash: Option<u64>, rng: &mut fastrand::Rng) -> Option<&Rc<Host>> {
        let index = match self.load.percent.as_slice() {
            [100] => 0,
            _ => self.load.choose(rng.u32(..100))?,
        };
        let priority = self.priorities.get(index)?;
        let group = if self.load.panic.get(index).copied().unwrap_or(false) {
            &priority.all
        } else if priority.locality_total > 0 {
            let weights: Vec<u64> = priority.localities.iter().map(|(w, _)| *w).collect();
            let at = locality::weighted_index(&weights, rng.u64(..priority.locality_total))?;
            &priority.localities.get(at)?.1
        } else {
            &priority.usable
        };
        let picked = group.balancer.pick(&group.hosts, hash, rng)?;
        group.hosts.get(picked).map(|candidate| &candidate.0)
    }
}

/// A retry under way, counted until it is dropped.
#[derive(Debug)]
pub struct Retrying(Rc<Upstream>);

impl Drop for Retrying {
    fn drop(&mut self) {
        self.0.retries.set(self.0.retries.get().saturating_sub(1));
    }
}

/// A request under way, counted until it is dropped.
#[derive(Debug)]
pub struct Active {
    upstream: Rc<Upstream>,
    host: Rc<Host>,
}

impl Active {
    fn start(upstream: &Rc<Upstream>, host: &Rc<Host>) -> Self {
        upstream.requests.set(upstream.requests.get() + 1);
        upstream.stats.rq_total.inc();
        upstream.stats.rq_active.inc();
        host.load.active.set(host.load.active.get() + 1);
        Self { upstream: Rc::clone(upstream), host: Rc::clone(host) }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.upstream.requests.set(self.upstream.requests.get().saturating_sub(1));
        self.upstream.stats.rq_active.sub(1);
        self.host.load.active.set(self.host.load.active.get().saturating_sub(1));
    }
}

fn policy_of(lb: &LbPolicy) -> Policy {
    let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    match lb {
        LbPolicy::RoundRobin { .. } | LbPolicy::ClusterProvided => Policy::RoundRobin,
        LbPolicy::LeastRequest { choices, .. } => Policy::LeastRequest { choices: *choices },
        LbPolicy::Random => Policy::Random,
        LbPolicy::RingHash { min_size, max_size } => {
            Policy::RingHash { min_size: size(*min_size), max_size: size(*max_size) }
        }
        LbPolicy::Maglev { table_size } => Policy::Maglev { table_size: size(*table_size) },
    }
}

/// The service of a cluster, out of the metadata that Istio gives it; the cluster's name where there is none.
fn service_of(config: &Cluster) -> Service {
    let services = config.metadata.get("istio", "services").and_then(serde_json::Value::as_array);
    let first = services.and_then(|s| s.first()).and_then(serde_json::Value::as_object);
    let text = |key: &str| {
        first.and_then(|s| s.get(key)).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
    };
    if first.is_some() {
        return Service { host: text("host"), name: text("name"), namespace: text("namespace") };
    }
    let host = config.name.rsplit_once('|').map_or(&*config.name, |(_, host)| host).to_owned();
    Service { name: host.clone(), host, namespace: String::new() }
}
