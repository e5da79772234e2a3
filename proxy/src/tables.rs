//! The tables that decide what happens to traffic: immutable, swapped whole.
//!
//! [`Tables::with`] makes the next tables out of the present ones and an [`Update`]; what did not change is shared,
//! so that `Arc::ptr_eq` tells a worker what it may keep. A cluster is active once its endpoints are known, a
//! listener once its routes are; until then the active one of before stays in use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arc_swap::ArcSwap;
use envoy_types::pb::google::protobuf::Any;
use tokio::sync::watch;

use crate::sockets::Sockets;
use crate::supervisor::Inherited;
use crate::upstream::state::State;
use crate::xds::cluster::Cluster;
use crate::xds::cluster::endpoint::ClusterLoadAssignment;
use crate::xds::decode::{Invalid, Kind, Rejected};
use crate::xds::listener::Listener;
use crate::xds::listener::hcm::RouteSource;
use crate::xds::route::RouteConfiguration;
use crate::xds::tls::Secret;

/// A resource and what was said about it.
#[derive(Debug)]
pub struct Held<T> {
    /// The resource.
    pub value: Arc<T>,
    /// As it came, for the configuration dump.
    pub raw: Arc<Any>,
    /// Its version; empty for a static resource.
    pub version: Arc<str>,
    /// When it was taken.
    pub updated: jiff::Timestamp,
    /// It came from the bootstrap file, and discovery does not change it.
    pub is_static: bool,
}

impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        Self {
            value: Arc::clone(&self.value),
            raw: Arc::clone(&self.raw),
            version: Arc::clone(&self.version),
            updated: self.updated,
            is_static: self.is_static,
        }
    }
}

/// One step from tables to the next.
#[derive(Debug, Default, Clone)]
pub struct Update {
    /// What changes, in this order.
    pub changes: Vec<Change>,
}

/// One change.
#[derive(Debug, Clone)]
pub enum Change {
    /// A cluster is new or other than before.
    Cluster(Held<Cluster>),
    /// The endpoints of a cluster are new or others.
    Endpoints(Held<ClusterLoadAssignment>),
    /// A listener is new or other than before.
    Listener(Held<Listener>),
    /// A route configuration is new or other than before.
    Routes(Held<RouteConfiguration>),
    /// A static secret.
    Secret(Arc<str>, Arc<Secret>),
    /// A cluster or listener is gone.
    Remove(Kind, Arc<str>),
    /// Endpoints or routes that something waits for do not exist; it goes on without them.
    Absent(Kind, Arc<str>),
}

/// What decides about traffic.
#[derive(Debug, Default)]
pub struct Tables {
    /// How many updates led here. Equal generations are equal tables.
    pub generation: u64,
    /// Listeners that accept, by name.
    pub listeners: BTreeMap<Arc<str>, Arc<ActiveListener>>,
    /// Clusters that can be sent to, by name.
    pub clusters: BTreeMap<Arc<str>, Arc<ActiveCluster>>,
    /// Static secrets by name.
    pub secrets: BTreeMap<Arc<str>, Arc<Secret>>,
    /// All that was said, active or not.
    pub known: Known,
}

/// Everything that was said and still counts, by name.
#[derive(Debug, Default, Clone)]
pub struct Known {
    /// Clusters.
    pub clusters: BTreeMap<Arc<str>, Held<Cluster>>,
    /// Endpoints, by the name of their resource.
    pub endpoints: BTreeMap<Arc<str>, Held<ClusterLoadAssignment>>,
    /// Listeners.
    pub listeners: BTreeMap<Arc<str>, Held<Listener>>,
    /// Route configurations.
    pub routes: BTreeMap<Arc<str>, Held<RouteConfiguration>>,
    /// Sockets of listeners, by the listener's name.
    sockets: BTreeMap<Arc<str>, Arc<Sockets>>,
    /// Endpoints and routes that do not exist.
    absent: BTreeSet<(Kind, Arc<str>)>,
}

/// A listener with its routes.
#[derive(Debug)]
pub struct ActiveListener {
    /// The listener.
    pub listener: Arc<Listener>,
    /// Its route configurations, by [`crate::xds::listener::hcm::Rds`].
    pub routes: Box<[Arc<RouteConfiguration>]>,
    /// Its sockets; none if it only gets connections from other listeners.
    pub sockets: Arc<Sockets>,
}

impl ActiveListener {
    /// The routes of one of its connection managers.
    #[must_use]
    pub fn routes<'a>(&'a self, source: &'a RouteSource) -> Option<&'a Arc<RouteConfiguration>> {
        match source {
            RouteSource::Inline(routes) => Some(routes),
            RouteSource::Rds(rds) => self.routes.get(rds.0),
        }
    }

    fn is(&self, listener: &Arc<Listener>, routes: &[Arc<RouteConfiguration>]) -> bool {
        // Sockets change only with the listener.
        Arc::ptr_eq(&self.listener, listener)
            && self.routes.len() == routes.len()
            && self.routes.iter().zip(routes).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

/// A cluster with its endpoints.
#[derive(Debug)]
pub struct ActiveCluster {
    /// The cluster.
    pub cluster: Arc<Cluster>,
    /// Its endpoints: its own or from discovery; for DNS clusters names that are still to be resolved, for
    /// original-destination clusters none.
    pub endpoints: Arc<ClusterLoadAssignment>,
    /// What all workers share of it.
    pub state: Arc<State>,
}

impl Tables {
    /// The next tables, and the resources of the update that do not fit in: they are left out, and what they would
    /// have replaced stays. `bound`: the sockets of the update's listeners.
    #[must_use]
    pub fn with(&self, update: &Update, bound: &BoundSockets) -> (Self, Vec<Rejected>) {
        let mut next = Self {
            generation: self.generation + 1,
            listeners: self.listeners.clone(),
            clusters: self.clusters.clone(),
            secrets: self.secrets.clone(),
            known: self.known.clone(),
        };
        let mut touched = Touched::default();
        let mut rejected = Vec::new();
        // Removals first: what takes the place of a removed listener may use its address. Secrets, too: others name
        // them.
        let (removals, rest): (Vec<_>, Vec<_>) =
            update.changes.iter().partition(|c| matches!(c, Change::Remove(..) | Change::Secret(..)));
        for change in removals.into_iter().chain(rest) {
            rejected.extend(next.take(change, bound, &mut touched));
        }
        next.activate_clusters(&touched);
        next.activate_listeners(&touched);
        if touched.references {
            next.forget_unreferenced();
        }
        (next, rejected)
    }

    /// The sockets of all listeners.
    pub fn sockets(&self) -> impl Iterator<Item = &Arc<Sockets>> {
        self.known.sockets.values()
    }

    /// Names of clusters and listeners that wait for endpoints or routes.
    #[must_use]
    pub fn warming(&self) -> (Vec<Arc<str>>, Vec<Arc<str>>) {
        let clusters = self.known.clusters.iter().filter(|(name, held)| {
            !self.clusters.get(*name).is_some_and(|active| Arc::ptr_eq(&active.cluster, &held.value))
        });
        let listeners = self.known.listeners.iter().filter(|(name, held)| {
            !self.listeners.get(*name).is_some_and(|active| Arc::ptr_eq(&active.listener, &held.value))
        });
        (clusters.map(|(n, _)| Arc::clone(n)).collect(), listeners.map(|(n, _)| Arc::clone(n)).collect())
    }

    fn take(&mut self, change: &Change, bound: &BoundSockets, touched: &mut Touched) -> Option<Rejected> {
        let known = &mut self.known;
        match change {
            Change::Cluster(held) => {
                let name = Arc::clone(&held.value.name);
                if !replaceable(known.clusters.get(&name), held)
                    || unchanged(known.clusters.get_mut(&name), held)
                {
                    return None;
                }
                if let Err(invalid) = crate::tls::check_cluster(&held.value, &self.secrets) {
                    return Some(Rejected { kind: Kind::Cluster, name: name.to_string(), invalid });
                }
                touched.references = true;
                touched.clusters.insert(Arc::clone(&name));
                known.clusters.insert(name, held.clone());
            }
            Change::Listener(held) => {
                let name = &held.value.name;
                if !replaceable(known.listeners.get(name), held)
                    || unchanged(known.listeners.get_mut(name), held)
                {
                    return None;
                }
                let unfit = crate::tls::check_listener(&held.value, &self.secrets).err();
                if let Some(invalid) = unfit.or_else(|| known.address_taken(&held.value)) {
                    return Some(Rejected { kind: Kind::Listener, name: name.to_string(), invalid });
                }
                touched.references = true;
                touched.listeners.insert(Arc::clone(&held.value.name));
                if let Some(sockets) = bound.get(&held.value.name) {
                    known.sockets.insert(Arc::clone(&held.value.name), Arc::clone(sockets));
                }
                known.listeners.insert(Arc::clone(&held.value.name), held.clone());
            }
            Change::Endpoints(held) => {
                let name = Arc::clone(&held.value.name);
                known.absent.remove(&(Kind::Endpoints, Arc::clone(&name)));
                if unchanged(known.endpoints.get_mut(&name), held) {
                    return None;
                }
                touched.services.insert(Arc::clone(&name));
                known.endpoints.insert(name, held.clone());
            }
            Change::Routes(held) => {
                let name = Arc::clone(&held.value.name);
                known.absent.remove(&(Kind::Routes, Arc::clone(&name)));
                if unchanged(known.routes.get_mut(&name), held) {
                    return None;
                }
                touched.routes.insert(Arc::clone(&name));
                known.routes.insert(name, held.clone());
            }
            Change::Secret(name, secret) => {
                self.secrets.insert(Arc::clone(name), Arc::clone(secret));
            }
            Change::Remove(kind, name) => self.remove(*kind, name, touched),
            Change::Absent(kind, name) => {
                known.absent.insert((*kind, Arc::clone(name)));
                touched.services.insert(Arc::clone(name));
                touched.routes.insert(Arc::clone(name));
            }
        }
        None
    }

    fn remove(&mut self, kind: Kind, name: &Arc<str>, touched: &mut Touched) {
        match kind {
            Kind::Cluster if self.known.clusters.get(name).is_some_and(|h| !h.is_static) => {
                touched.references = true;
                self.known.clusters.remove(name);
                self.clusters.remove(name);
            }
            Kind::Listener if self.known.listeners.get(name).is_some_and(|h| !h.is_static) => {
                touched.references = true;
                self.known.listeners.remove(name);
                self.known.sockets.remove(name);
                self.listeners.remove(name);
            }
            // Endpoints and routes go when nothing names them any more.
            Kind::Cluster | Kind::Listener | Kind::Endpoints | Kind::Routes | Kind::Secret => {}
        }
    }

    fn activate_clusters(&mut self, touched: &Touched) {
        for (name, held) in &self.known.clusters {
            let service = held.value.eds_service();
            if !touched.clusters.contains(name) && !service.is_some_and(|s| touched.services.contains(s)) {
                continue;
            }
            let Some(endpoints) = self.known.endpoints_of(&held.value) else { continue };
            let same = |active: &Arc<ActiveCluster>| {
                Arc::ptr_eq(&active.cluster, &held.value) && Arc::ptr_eq(&active.endpoints, &endpoints)
            };
            let before = self.clusters.get(name);
            if !before.is_some_and(same) {
                let state = match before {
                    Some(active) if Arc::ptr_eq(&active.cluster, &held.value) => Arc::clone(&active.state),
                    Some(active) => Arc::new(State::after(&active.state)),
                    None => Arc::default(),
                };
                let active = ActiveCluster { cluster: Arc::clone(&held.value), endpoints, state };
                self.clusters.insert(Arc::clone(name), Arc::new(active));
            }
        }
    }

    fn activate_listeners(&mut self, touched: &Touched) {
        for (name, held) in &self.known.listeners {
            let listener = &held.value;
            if !touched.listeners.contains(name)
                && !listener.rds.iter().any(|r| touched.routes.contains(&r.name))
            {
                continue;
            }
            let found = listener.rds.iter().map(|r| self.known.routes_named(&r.name));
            let Some(routes) = found.collect::<Option<Box<[_]>>>() else { continue };
            if !self.listeners.get(name).is_some_and(|active| active.is(listener, &routes)) {
                let sockets = self.known.sockets.get(name).cloned().unwrap_or_default();
                let active = ActiveListener { listener: Arc::clone(listener), routes, sockets };
                self.listeners.insert(Arc::clone(name), Arc::new(active));
            }
        }
    }

    /// Endpoints and routes live as long as something names them.
    fn forget_unreferenced(&mut self) {
        let known = &mut self.known;
        let services: BTreeSet<_> = known.clusters.values().filter_map(|h| h.value.eds_service()).collect();
        let routes: BTreeSet<_> =
            known.listeners.values().flat_map(|h| h.value.rds.iter().map(|r| &r.name)).collect();
        known.endpoints.retain(|name, _| services.contains(name));
        known.routes.retain(|name, _| routes.contains(name));
        known.absent.retain(|(kind, name)| match kind {
            Kind::Endpoints => services.contains(name),
            Kind::Routes => routes.contains(name),
            Kind::Cluster | Kind::Listener | Kind::Secret => false,
        });
    }
}

/// Sockets by the name of their listener.
pub type BoundSockets = BTreeMap<Arc<str>, Arc<Sockets>>;

/// What an update changed, so that only what depends on it is looked at again.
#[derive(Default)]
struct Touched {
    clusters: BTreeSet<Arc<str>>,
    listeners: BTreeSet<Arc<str>>,
    services: BTreeSet<Arc<str>>,
    routes: BTreeSet<Arc<str>>,
    /// What is named may be other than before.
    references: bool,
}

fn replaceable<T>(old: Option<&Held<T>>, new: &Held<T>) -> bool {
    let keep = old.is_some_and(|old| old.is_static) && !new.is_static;
    if keep {
        tracing::warn!("discovery may not change a static resource of the same name; left as it is");
    }
    !keep
}

/// A resource that came again as it is held: only its version is new, so that nothing that hangs on the value
/// (connections, ejections, token buckets) begins anew.
fn unchanged<T>(old: Option<&mut Held<T>>, new: &Held<T>) -> bool {
    let Some(old) = old.filter(|old| old.raw == new.raw && old.is_static == new.is_static) else {
        return false;
    };
    old.version = Arc::clone(&new.version);
    true
}

impl Known {
    /// The cluster's endpoints, if they are known (to be none, perhaps).
    fn endpoints_of(&self, cluster: &Cluster) -> Option<Arc<ClusterLoadAssignment>> {
        use crate::xds::cluster::Discovery;
        match &cluster.discovery {
            Discovery::Static(own) | Discovery::StrictDns(own, _) | Discovery::LogicalDns(own, _) => {
                Some(Arc::clone(own))
            }
            Discovery::OriginalDst(_) => Some(Arc::new(ClusterLoadAssignment::empty(&cluster.name))),
            Discovery::Eds { service, .. } => match self.endpoints.get(service) {
                Some(held) => Some(Arc::clone(&held.value)),
                None => self
                    .absent
                    .contains(&(Kind::Endpoints, Arc::clone(service)))
                    .then(|| Arc::new(ClusterLoadAssignment::empty(service))),
            },
        }
    }

    /// Names of this kind that something waits for no more, because they do not exist.
    pub(crate) fn absent(&self, kind: Kind) -> impl Iterator<Item = &Arc<str>> {
        self.absent.iter().filter(move |(of, _)| *of == kind).map(|(_, name)| name)
    }

    fn routes_named(&self, name: &Arc<str>) -> Option<Arc<RouteConfiguration>> {
        match self.routes.get(name) {
            Some(held) => Some(Arc::clone(&held.value)),
            None => self
                .absent
                .contains(&(Kind::Routes, Arc::clone(name)))
                .then(|| Arc::new(RouteConfiguration::empty(name))),
        }
    }

    /// Two listeners with sockets of their own cannot be on one address.
    fn address_taken(&self, listener: &Listener) -> Option<Invalid> {
        if !listener.bind_to_port {
            return None;
        }
        let others =
            self.listeners.values().filter(|h| h.value.bind_to_port && h.value.name != listener.name);
        for other in others {
            let shared = listener
                .addresses
                .iter()
                .find(|a| other.value.addresses.contains(a) && a.socket().is_none_or(|a| a.port() != 0));
            if let Some(address) = shared {
                let reason = format!("{address} is taken by listener `{}`", other.value.name);
                return Some(Invalid::new("address", reason));
            }
        }
        None
    }
}

/// The tables of this moment. Written by one [`TableWriter`], read by everybody.
#[derive(Debug)]
pub struct TableStore {
    current: ArcSwap<Tables>,
    generation: watch::Sender<u64>,
}

impl TableStore {
    /// Empty tables, and the one handle that can write them. Listeners get sockets for this many workers.
    #[must_use]
    pub fn new(workers: usize) -> (Arc<Self>, TableWriter) {
        let store = Arc::new(Self {
            current: ArcSwap::from_pointee(Tables::default()),
            generation: watch::Sender::new(0),
        });
        (Arc::clone(&store), TableWriter { store, workers, inherited: Inherited::default() })
    }

    /// The tables of this moment; whoever holds them keeps this version.
    #[must_use]
    pub fn load(&self) -> Arc<Tables> {
        self.current.load_full()
    }

    /// The swap itself, for a worker's [`arc_swap::Cache`].
    #[must_use]
    pub fn shared(&self) -> &ArcSwap<Tables> {
        &self.current
    }

    /// Tells the generation of the tables; changes after they did.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}

/// The only handle that can write; not `Clone`, so there is one writer.
#[derive(Debug)]
pub struct TableWriter {
    store: Arc<TableStore>,
    workers: usize,
    inherited: Inherited,
}

impl TableWriter {
    /// Listeners from now on take over these sockets where they fit.
    pub fn inherit(&mut self, sockets: Inherited) {
        self.inherited = sockets;
    }

    /// Carries out an update: all the work happens on a copy, readers see the old or the new. Tells which resources
    /// did not fit in: among them listeners whose addresses cannot be bound.
    pub fn apply(&mut self, update: &Update) -> Vec<Rejected> {
        if update.changes.is_empty() {
            return Vec::new();
        }
        let now = self.store.load();
        let mut update = update.clone();
        let (bound, mut rejected) = self.bind(&now, &mut update);
        let (next, refused) = now.with(&update, &bound);
        rejected.extend(refused);
        let generation = next.generation;
        self.store.current.store(Arc::new(next));
        self.store.generation.send_replace(generation);
        rejected
    }

    /// Sockets for the update's listeners; a listener whose address cannot be bound leaves the update.
    fn bind(&self, now: &Tables, update: &mut Update) -> (BoundSockets, Vec<Rejected>) {
        let mut bound = BoundSockets::new();
        let mut rejected = Vec::new();
        update.changes.retain(|change| {
            let Change::Listener(held) = change else { return true };
            let listener = &held.value;
            let known = now.known.sockets.get(&listener.name).filter(|s| s.fit(listener));
            let sockets = match known {
                Some(sockets) => Arc::clone(sockets),
                None => match Sockets::bind(listener, self.workers, &self.inherited) {
                    Ok(sockets) => Arc::new(sockets),
                    Err(error) => {
                        let (kind, name) = (Kind::Listener, listener.name.to_string());
                        let invalid = Invalid::new("address", error.to_string());
                        rejected.push(Rejected { kind, name, invalid });
                        return false;
                    }
                },
            };
            bound.insert(Arc::clone(&listener.name), sockets);
            true
        });
        (bound, rejected)
    }

    /// The store that it writes.
    #[must_use]
    pub fn store(&self) -> &Arc<TableStore> {
        &self.store
    }
}

#[cfg(test)]
pub(crate) mod tests;
