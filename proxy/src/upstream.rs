//! A cluster at run time, on one worker: its endpoints with their load, health and connections.
//!
//! An [`Upstream`] lives as long as the configuration of its cluster stays the same; when only endpoints change,
//! those that stay keep their connections and their health. [`send`] carries requests.

pub mod check;
mod connect;
pub mod dns;
pub mod h1;
pub mod h2;
pub mod health;
pub mod host;
pub mod pool;
pub mod proxy_protocol;
pub mod send;
mod set;
pub mod state;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::metrics::standard::{Numbered, Service, Standard};
use crate::metrics::{Counter, Registry};
use crate::tls::Connector;
use crate::xds::cluster::endpoint::{ClusterLoadAssignment, Endpoint};
use crate::xds::cluster::{Cluster, Discovery};
use crate::xds::decode::Address;
use crate::xds::tls::UpstreamTls;
use check::{Checked, Checks, Standing, Verdict};
use health::Signal;
pub use host::Host;
use host::Known;
pub use send::{Failure, FailureKind};
use set::{HostSet, Placed};
use state::State;

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
    /// Connections that a circuit breaker refused.
    pub cx_overflow: Rc<Counter>,
    /// Connections that did not come about.
    pub cx_connect_fail: Rc<Counter>,
    /// Retries.
    pub rq_retry: Rc<Counter>,
    /// Retries that a circuit breaker refused.
    pub rq_retry_overflow: Rc<Counter>,
    /// Requests that a circuit breaker refused.
    pub rq_pending_overflow: Rc<Counter>,
    /// Requests that timed out.
    pub rq_timeout: Rc<Counter>,
    /// Ejections.
    pub ejections: Rc<Counter>,
    /// Responses by class: 1xx to 5xx.
    pub rq_xx: [Rc<Counter>; 5],
    /// Active health checks, if it has any.
    pub checks: Option<check::Stats>,
}

impl ClusterStats {
    fn new(registry: &Registry, cluster: &Cluster) -> Self {
        let name = &*cluster.stat_name;
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
            cx_overflow: counter("envoy_cluster_upstream_cx_overflow"),
            cx_connect_fail: counter("envoy_cluster_upstream_cx_connect_fail"),
            rq_retry: counter("envoy_cluster_upstream_rq_retry"),
            rq_retry_overflow: counter("envoy_cluster_upstream_rq_retry_overflow"),
            rq_pending_overflow: counter("envoy_cluster_upstream_rq_pending_overflow"),
            rq_timeout: counter("envoy_cluster_upstream_rq_timeout"),
            ejections: counter("envoy_cluster_outlier_detection_ejections_total"),
            rq_xx: ["1", "2", "3", "4", "5"].map(class),
            checks: cluster.health_check.as_ref().map(|_| check::Stats::new(registry, name)),
        }
    }
}

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
    /// What all workers share of it.
    state: Arc<State>,
    /// The version of the shared state that `set` goes by.
    version: Cell<u64>,
    endpoints: RefCell<Arc<ClusterLoadAssignment>>,
    set: RefCell<Rc<HostSet>>,
    original: RefCell<BTreeMap<SocketAddr, Rc<Host>>>,
    connectors: RefCell<Vec<(Arc<UpstreamTls>, Connector)>>,
    freed: Notify,
    /// This, for tasks that must not keep it.
    me: Weak<Self>,
    /// The checks of its endpoints, on the worker that carries them out.
    checks: RefCell<Checks>,
    /// Whether a limit depends on how many requests are under way.
    counts_requests: bool,
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
    /// Whether endpoints are checked here: one worker does so for all.
    pub checks: bool,
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
    pub fn new(
        config: Arc<Cluster>,
        endpoints: Arc<ClusterLoadAssignment>,
        state: Arc<State>,
        shared: Rc<Shared>,
    ) -> Rc<Self> {
        let service = shared.standard.number(service_of(&config));
        let stats = ClusterStats::new(&shared.registry, &config);
        let limits = config.limits;
        let this = Rc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            checks: RefCell::default(),
            service,
            stats,
            shared,
            version: Cell::new(state.version()),
            endpoints: RefCell::default(),
            set: RefCell::default(),
            original: RefCell::default(),
            connectors: RefCell::default(),
            freed: Notify::new(),
            counts_requests: limits.max_requests < u32::MAX || limits.retry_budget.is_some(),
            state,
            config,
        });
        let first = match &this.config.discovery {
            Discovery::StrictDns(..) | Discovery::LogicalDns(..) => {
                dns::start(&this.config, &this.state, &this.shared.tasks);
                this.state.resolved()
            }
            Discovery::Static(_) | Discovery::Eds { .. } | Discovery::OriginalDst(_) => Some(endpoints),
        };
        match first {
            Some(first) => this.update(&first),
            None => this.update_when_resolved(),
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

    /// Checks begin before the first request asks for what DNS gave.
    fn update_when_resolved(&self) {
        if self.is_checker() {
            let (me, state) = (Weak::clone(&self.me), Arc::clone(&self.state));
            self.shared.tasks.spawn_local(async move {
                state.was_resolved().await;
                if let Some(this) = me.upgrade() {
                    this.catch_up();
                }
            });
        }
    }

    fn is_checker(&self) -> bool {
        self.shared.checks && self.config.health_check.is_some()
    }

    /// All endpoints.
    #[must_use]
    pub fn hosts(&self) -> Vec<Rc<Host>> {
        self.set.borrow().hosts.clone()
    }

    /// Ends when the cluster has endpoints, or it is known that it has none: those of some come from DNS.
    pub async fn warm(&self) {
        if dns::is_asked(&self.config.discovery) {
            self.state.was_resolved().await;
        }
        if self.is_unchecked() {
            self.state.first_round().await;
        }
    }

    /// Whether its endpoints are still asked for, for the first time, or checked.
    #[must_use]
    pub fn is_cold(&self) -> bool {
        (dns::is_asked(&self.config.discovery) && self.state.resolved().is_none()) || self.is_unchecked()
    }

    fn is_unchecked(&self) -> bool {
        self.config.health_check.is_some() && !self.state.had_first_round()
    }

    fn known(&self, endpoint: &Endpoint) -> Known {
        let checked = self.config.health_check.is_some() && !endpoint.disable_health_check;
        Known {
            outlier: self.state.outlier(&endpoint.address),
            checked: checked.then(|| self.state.checked(&endpoint.address)),
        }
    }

    /// Takes the result of a check.
    fn on_check(&self, host: &Host, checked: &Checked, verdict: Verdict, standing: Standing) {
        let pardons = self.config.outlier.as_ref().is_some_and(|outlier| outlier.uneject);
        let serves = matches!(verdict, Verdict::Serves { .. });
        let is_new = checked.set(standing);
        if is_new {
            tracing::info!(cluster = %self.config.name, host = %host.text, ?standing, "endpoint checked");
        }
        // only an endpoint that is in again as far as checks go
        if is_new | (serves && standing.serves() && pardons && host.outlier.pardon()) {
            self.state.changed();
            self.catch_up();
        }
        self.look_at_first_round();
    }

    fn look_at_first_round(&self) {
        if self.checks.borrow().are_known() {
            self.state.end_first_round();
        }
    }

    fn rebuild(&self, endpoints: &ClusterLoadAssignment) {
        let old = Rc::clone(&self.set.borrow());
        let mut known: BTreeMap<&Address, &Rc<Host>> = old.hosts.iter().map(|h| (&h.address, h)).collect();
        let (cluster, standard) = (&*self.config, &self.shared.standard);
        let mut placed = Vec::new();
        for locality in &endpoints.localities {
            let hosts = locality.endpoints.iter().map(|e| match known.remove(&e.address) {
                Some(host) if host.endpoint == *e => Rc::clone(host),
                Some(host) => host.with(e, cluster, self.known(e), standard),
                None => Host::new(e, cluster, self.known(e), standard),
            });
            placed.push((locality.priority, locality.weight, hosts.collect::<Vec<_>>()));
        }
        for gone in known.into_values() {
            gone.pools.close();
        }
        self.arrange(&placed, endpoints);
        self.state.forget_unused();
        if self.is_checker() {
            self.checks.borrow_mut().follow(self, endpoints);
            self.look_at_first_round();
        }
    }

    fn arrange(&self, placed: &[Placed], endpoints: &ClusterLoadAssignment) {
        if let Some(slow) = set::slow_start(&self.config.lb) {
            let now = Instant::now();
            placed.iter().flat_map(|(_, _, hosts)| hosts).for_each(|h| h.warm_up(slow, now));
        }
        let factor = endpoints.overprovisioning_factor;
        let mut rng = self.shared.rng.borrow_mut();
        let next = Rc::new(HostSet::arrange(placed, &self.config, factor, &mut rng));
        drop(rng);
        *self.set.borrow_mut() = next;
    }

    /// Takes over what other workers found out about the endpoints.
    fn catch_up(&self) {
        let version = self.state.version();
        if self.version.replace(version) == version {
            return;
        }
        if dns::is_asked(&self.config.discovery)
            && let Some(resolved) = self.state.resolved()
        {
            self.update(&resolved);
        }
        self.rearrange();
    }

    /// An endpoint for a request.
    #[must_use]
    pub fn pick(&self, ask: Ask<'_>) -> Option<Rc<Host>> {
        if let Discovery::OriginalDst(settings) = &self.config.discovery {
            let mut address = ask.original;
            address.set_port(settings.port.unwrap_or(address.port()));
            return Some(self.original_host(address));
        }
        self.catch_up();
        let set = self.set.borrow();
        let mut rng = self.shared.rng.borrow_mut();
        let mut picked = set.pick(ask.hash, &mut rng)?;
        let tried = |h: &Rc<Host>| ask.avoid.iter().any(|a| a.address == h.address);
        for _ in 1..ask.attempts {
            if !tried(picked) {
                break;
            }
            picked = set.pick(ask.hash, &mut rng)?;
        }
        if tried(picked)
            && let Some(other) = set.other_than(ask.avoid, &mut rng)
        {
            picked = other; // chance kept to what failed, but there is another one
        }
        Some(Rc::clone(picked))
    }

    fn original_host(&self, address: SocketAddr) -> Rc<Host> {
        let mut original = self.original.borrow_mut();
        let host = original.entry(address).or_insert_with(|| {
            let endpoint = Arc::new(dns::endpoint_at(address));
            Host::new(&endpoint, &self.config, Known::default(), &self.shared.standard)
        });
        Rc::clone(host)
    }

    /// Notes how a request to an endpoint ended.
    pub fn on_result(&self, host: &Rc<Host>, signal: Signal) {
        let Some(settings) = &self.config.outlier else { return };
        let draw = self.shared.rng.borrow_mut().u32(..100);
        if !host.outlier.on_result(signal, settings, draw) || host.is_ejected() {
            return;
        }
        let jitter = settings.max_jitter.mul_f64(self.shared.rng.borrow_mut().f64());
        let (set, now) = (Rc::clone(&self.set.borrow()), Instant::now().into_std());
        let all = set.hosts.iter().map(|h| &h.outlier);
        if self.state.eject(&host.outlier, all, settings, now, jitter) {
            self.stats.ejections.inc();
            tracing::info!(cluster = %self.config.name, host = %host.text, "endpoint ejected");
        }
    }

    fn rearrange(&self) {
        let endpoints = Arc::clone(&self.endpoints.borrow());
        let old = Rc::clone(&self.set.borrow());
        let by_address: BTreeMap<&Address, &Rc<Host>> = old.hosts.iter().map(|h| (&h.address, h)).collect();
        let placed = endpoints.localities.iter().map(|l| {
            let hosts = l.endpoints.iter().filter_map(|e| by_address.get(&e.address).map(|h| Rc::clone(h)));
            (l.priority, l.weight, hosts.collect())
        });
        self.arrange(&placed.collect::<Vec<_>>(), &endpoints);
    }

    /// The regular look: ejections that are over, connections that are idle for too long, endpoints that are new.
    pub fn sweep(&self, now: Instant) {
        let idle = self.config.http.idle_timeout;
        if self.is_checker() {
            self.catch_up(); // DNS may have given others to check
        }
        let set = Rc::clone(&self.set.borrow());
        for host in &set.hosts {
            host.pools.sweep(idle, now);
        }
        if let Some(settings) = &self.config.outlier
            && self.state.is_due(now.into_std(), settings.interval)
        {
            self.state.look(set.hosts.iter().map(|h| &h.outlier), now.into_std());
        }
        if let Some(slow) = set::slow_start(&self.config.lb)
            && set.hosts.iter().any(|h| h.is_warming(slow, now))
        {
            self.rearrange();
        }
        self.original.borrow_mut().retain(|_, host| {
            host.pools.sweep(idle, now);
            !host.pools.is_empty() || host.load.active.get() > 0
        });
    }

    /// Lets go of all connections: the cluster is gone or has another configuration.
    pub fn close(&self) {
        for host in self.hosts() {
            host.pools.close();
        }
        for host in self.original.borrow().values() {
            host.pools.close();
        }
        drop(self.checks.take());
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
                let share = (f64::from(self.state.requests.get() + self.state.pending.get()) * percent
                    / 100.0) as u32;
                share.max(least)
            }
            None => limits.max_retries,
        };
        if !self.state.retries.try_add(most) {
            self.stats.rq_retry_overflow.inc();
            return None;
        }
        self.stats.rq_retry.inc();
        Some(Retrying(Rc::clone(self)))
    }
}

/// A retry under way, counted until it is dropped.
#[derive(Debug)]
pub struct Retrying(Rc<Upstream>);

impl Drop for Retrying {
    fn drop(&mut self) {
        self.0.state.retries.sub();
    }
}

/// A request under way, counted until it is dropped.
#[derive(Debug)]
pub struct Active {
    upstream: Rc<Upstream>,
    host: Rc<Host>,
}

impl Active {
    /// Counts a request, if the circuit breaker has room for it.
    fn start(upstream: &Rc<Upstream>, host: &Rc<Host>) -> Option<Self> {
        if upstream.counts_requests && !upstream.state.requests.try_add(upstream.config.limits.max_requests) {
            return None;
        }
        upstream.stats.rq_total.inc();
        upstream.stats.rq_active.inc();
        host.load.active.set(host.load.active.get() + 1);
        Some(Self { upstream: Rc::clone(upstream), host: Rc::clone(host) })
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if self.upstream.counts_requests {
            self.upstream.state.requests.sub();
        }
        self.upstream.stats.rq_active.sub(1);
        self.host.load.active.set(self.host.load.active.get().saturating_sub(1));
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
