//! Shared resources: proxies that see the same hold the same memory.
//!
//! A [`View`] is what one proxy should hold at one revision. [`Interner`] makes equal resources, and equal maps
//! of resources, one value, so that ten thousand proxies with the same clusters keep one copy of them, and so
//! that "nothing changed" is a comparison of pointers.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use xxhash_rust::xxh3::Xxh3;

use crate::resources::{Resource, Resources, Type};

/// The resources of one type by name, shared.
pub type Map = Arc<BTreeMap<String, Arc<Resource>>>;

/// Everything one proxy should hold at one revision.
#[derive(Debug, Clone, Default)]
pub struct View {
    revision: u64,
    committed: Option<Instant>,
    clusters: Map,
    endpoints: Map,
    listeners: Map,
    routes: Map,
}

impl View {
    /// The view of `resources` at `revision`, sharing nothing yet.
    #[must_use]
    pub fn new(revision: u64, mut resources: Resources) -> Self {
        let mut take = |t| Arc::new(resources.by_type.remove(&t).unwrap_or_default());
        Self {
            revision,
            committed: None,
            clusters: take(Type::Cluster),
            endpoints: take(Type::Endpoint),
            listeners: take(Type::Listener),
            routes: take(Type::Route),
        }
    }

    /// The same resources at a later revision.
    #[must_use]
    pub fn at(&self, revision: u64) -> Self {
        Self { revision, ..self.clone() }
    }

    /// Says when the oldest change in this view was committed, for convergence times.
    #[must_use]
    pub fn committed_at(self, committed: Option<Instant>) -> Self {
        Self { committed, ..self }
    }

    /// The same view with other resources of one type.
    #[must_use]
    pub fn with(mut self, t: Type, map: Map) -> Self {
        *self.slot(t) = map;
        self
    }

    /// The revision of the snapshot that this was translated from.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// When the oldest change that this view brings was committed, if a change caused it.
    #[must_use]
    pub fn committed(&self) -> Option<Instant> {
        self.committed
    }

    /// The resources of one type.
    #[must_use]
    pub fn of(&self, t: Type) -> &Map {
        match t {
            Type::Cluster => &self.clusters,
            Type::Endpoint => &self.endpoints,
            Type::Listener => &self.listeners,
            Type::Route => &self.routes,
        }
    }

    /// Whether both hold the same resources. Exact for views of one [`Interner`], else it may say no for equals.
    #[must_use]
    pub fn shares_all(&self, other: &Self) -> bool {
        Type::ALL.into_iter().all(|t| Arc::ptr_eq(self.of(t), other.of(t)))
    }

    fn slot(&mut self, t: Type) -> &mut Map {
        match t {
            Type::Cluster => &mut self.clusters,
            Type::Endpoint => &mut self.endpoints,
            Type::Listener => &mut self.listeners,
            Type::Route => &mut self.routes,
        }
    }
}

/// Keys are hashes of content already; hashing them again would gain nothing.
#[derive(Debug, Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

type Table<T> = std::collections::HashMap<u64, Weak<T>, BuildHasherDefault<AsIs>>;

/// Makes equal values one value. Holds nothing alive: what no proxy has any more is freed.
#[derive(Debug, Default)]
pub struct Interner {
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    resources: Table<Resource>,
    maps: Table<BTreeMap<String, Arc<Resource>>>,
    hosts: Table<BTreeSet<String>>,
    /// Entries at the last sweep; dead entries are dropped when the tables have doubled.
    swept: usize,
}

/// Below this many entries no sweep is worth its time.
const SWEEP_FLOOR: usize = 1024;

impl Interner {
    /// The view with every resource and every map that somebody else already holds replaced by theirs.
    #[must_use]
    pub fn share(&self, view: View) -> View {
        Type::ALL.into_iter().fold(view, |view, t| {
            let map = self.map(t, view.of(t));
            view.with(t, map)
        })
    }

    /// The same for the map of one type.
    #[must_use]
    pub fn map(&self, t: Type, map: &Map) -> Map {
        let mut hash = Xxh3::new();
        hash.update(t.url().as_bytes());
        for (name, resource) in map.iter() {
            hash.update(name.as_bytes());
            hash.update(&resource.version.to_le_bytes());
        }
        let key = hash.digest();
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tables.maps.get(&key).and_then(Weak::upgrade)
            && known == *map
        {
            return known;
        }
        let shared: BTreeMap<_, _> =
            map.iter().map(|(name, resource)| (name.clone(), tables.resource(t, resource))).collect();
        let shared = Arc::new(shared);
        tables.maps.insert(key, Arc::downgrade(&shared));
        tables.sweep();
        shared
    }

    /// The hosts whose endpoints are in `map`: the last part of each `outbound|port|subset|host`.
    #[must_use]
    pub fn hosts(&self, map: &Map) -> Arc<BTreeSet<String>> {
        let hosts: BTreeSet<&str> = map.keys().filter_map(|name| host_of(name)).collect();
        let mut hash = Xxh3::new();
        for host in &hosts {
            hash.update(host.as_bytes());
            hash.update(&[0]);
        }
        let key = hash.digest();
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tables.hosts.get(&key).and_then(Weak::upgrade)
            && known.iter().map(String::as_str).eq(hosts.iter().copied())
        {
            return known;
        }
        let shared: Arc<BTreeSet<String>> = Arc::new(hosts.into_iter().map(str::to_owned).collect());
        tables.hosts.insert(key, Arc::downgrade(&shared));
        shared
    }
}

impl Tables {
    fn resource(&mut self, t: Type, resource: &Arc<Resource>) -> Arc<Resource> {
        let mut hash = Xxh3::with_seed(resource.version);
        hash.update(t.url().as_bytes());
        hash.update(resource.name.as_bytes());
        let key = hash.digest();
        if let Some(known) = self.resources.get(&key).and_then(Weak::upgrade)
            && known == *resource
        {
            return known;
        }
        self.resources.insert(key, Arc::downgrade(resource));
        resource.clone()
    }

    fn sweep(&mut self) {
        let entries = self.resources.len() + self.maps.len() + self.hosts.len();
        if entries < SWEEP_FLOOR.max(self.swept * 2) {
            return;
        }
        self.resources.retain(|_, weak| weak.strong_count() > 0);
        self.maps.retain(|_, weak| weak.strong_count() > 0);
        self.hosts.retain(|_, weak| weak.strong_count() > 0);
        self.swept = self.resources.len() + self.maps.len() + self.hosts.len();
    }
}

/// The host that a cluster name ends with: `outbound|9080|v1|reviews.default.svc.cluster.local`.
#[must_use]
pub fn host_of(cluster: &str) -> Option<&str> {
    cluster.rsplit_once('|').map(|(_, host)| host).filter(|host| !host.is_empty())
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::Any;

    use super::*;

    fn view(clusters: &[(&str, u64)]) -> View {
        let map = clusters
            .iter()
            .map(|(name, version)| {
                let body = Any { type_url: String::new(), value: version.to_le_bytes().to_vec() };
                ((*name).to_owned(), Arc::new(Resource { name: (*name).to_owned(), version: *version, body }))
            })
            .collect();
        View::new(1, Resources { by_type: BTreeMap::from([(Type::Cluster, map)]) })
    }

    #[test]
    fn equal_views_share_their_maps() {
        let interner = Interner::default();
        let a = interner.share(view(&[("a", 1), ("b", 2)]));
        let b = interner.share(view(&[("a", 1), ("b", 2)]));
        assert!(a.shares_all(&b));
    }

    #[test]
    fn views_that_differ_share_the_resources_they_have_in_common() {
        let interner = Interner::default();
        let a = interner.share(view(&[("a", 1), ("b", 2)]));
        let b = interner.share(view(&[("a", 1), ("b", 3)]));
        assert!(!a.shares_all(&b));
        let of = |view: &View, name: &str| view.of(Type::Cluster).get(name).cloned().unwrap();
        assert!(Arc::ptr_eq(&of(&a, "a"), &of(&b, "a")));
        assert!(!Arc::ptr_eq(&of(&a, "b"), &of(&b, "b")));
    }

    #[test]
    fn what_nobody_holds_is_forgotten() {
        let interner = Interner::default();
        for version in 0..4096 {
            drop(interner.share(view(&[("a", version)])));
        }
        let tables = interner.tables.lock().unwrap();
        assert!(tables.resources.len() + tables.maps.len() <= 2 * SWEEP_FLOOR + 2);
    }

    #[test]
    fn hosts_are_the_last_part_of_the_names() {
        let interner = Interner::default();
        let a = view(&[("outbound|80||a.example", 1), ("outbound|81|v1|a.example", 1), ("inbound|80||", 1)]);
        let hosts = interner.hosts(a.of(Type::Cluster));
        assert_eq!(hosts.iter().collect::<Vec<_>>(), ["a.example"]);
        assert!(Arc::ptr_eq(&hosts, &interner.hosts(a.of(Type::Cluster))));
    }
}
