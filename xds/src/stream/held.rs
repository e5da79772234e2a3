//! What a client has of one type, as far as the server knows.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::cache::Map;
use crate::resources::Resource;

/// One resource that the client has.
#[derive(Debug, Clone)]
enum Copy {
    /// It accepted this one on this stream.
    Sent(Arc<Resource>),
    /// It says that it has this version from an earlier stream.
    Claimed(u64),
}

impl Copy {
    fn version(&self) -> u64 {
        match self {
            Self::Sent(resource) => resource.version,
            Self::Claimed(version) => *version,
        }
    }
}

/// The resources a client has: a map shared with other streams, and where this client differs from it.
///
/// A client that is up to date differs nowhere, so ten thousand of them cost one map.
#[derive(Debug, Default)]
pub(super) struct Held {
    base: Map,
    differs: BTreeMap<String, Option<Copy>>,
}

impl Held {
    /// The version of `name` that the client has.
    pub(super) fn version(&self, name: &str) -> Option<u64> {
        match self.differs.get(name) {
            Some(copy) => copy.as_ref().map(Copy::version),
            None => self.base.get(name).map(|resource| resource.version),
        }
    }

    /// The client accepted this resource.
    pub(super) fn accept(&mut self, resource: &Arc<Resource>) {
        self.differs.insert(resource.name.clone(), Some(Copy::Sent(resource.clone())));
    }

    /// The client says it has this version.
    pub(super) fn claim(&mut self, name: String, version: u64) {
        self.differs.insert(name, Some(Copy::Claimed(version)));
    }

    /// The client does not have it (any more).
    pub(super) fn remove(&mut self, name: &str) {
        if self.base.contains_key(name) {
            self.differs.insert(name.to_owned(), None);
        } else {
            self.differs.remove(name);
        }
    }

    /// Drops what `keep` refuses.
    pub(super) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        let gone: Vec<String> = self.names().filter(|name| !keep(name)).map(str::to_owned).collect();
        for name in gone {
            self.remove(&name);
        }
    }

    /// The client has exactly `map`: share it.
    pub(super) fn settle(&mut self, map: &Map) {
        self.base = map.clone();
        self.differs.clear();
    }

    /// Whether the client is known to have exactly `map`, without looking at its entries.
    pub(super) fn is(&self, map: &Map) -> bool {
        self.differs.is_empty() && Arc::ptr_eq(&self.base, map)
    }

    /// Whether the client has had exactly what some map has.
    pub(super) fn is_shared(&self) -> bool {
        !self.base.is_empty()
    }

    /// All names about which the client may differ from `map`, which hold few when it shares most of its resources with
    /// what the client has: then most pairs are the same pointer, and no name is compared.
    pub(super) fn may_differ<'a>(&'a self, map: &'a Map) -> BTreeSet<&'a str> {
        let mut names: BTreeSet<&str> = self.differs.keys().map(String::as_str).collect();
        if Arc::ptr_eq(&self.base, map) {
            return names;
        }
        let (mut base, mut wanted) = (self.base.iter().peekable(), map.iter().peekable());
        loop {
            let order = match (base.peek(), wanted.peek()) {
                (Some((_, has)), Some((_, wants))) if Arc::ptr_eq(has, wants) => {
                    base.next();
                    wanted.next();
                    continue;
                }
                (Some((has, _)), Some((wants, _))) => has.cmp(wants),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return names,
            };
            let has = if order.is_le() { base.next() } else { None };
            let wants = if order.is_ge() { wanted.next() } else { None };
            names.extend(has.or(wants).map(|(name, _)| name.as_str()));
        }
    }

    /// The names of what the client has, in no particular order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let base = self.base.keys().filter(|name| !self.differs.contains_key(*name));
        let differs = self.differs.iter().filter(|(_, copy)| copy.is_some()).map(|(name, _)| name);
        base.chain(differs).map(String::as_str)
    }

    /// How many resources the client has.
    pub(super) fn len(&self) -> usize {
        self.names().count()
    }

    /// The resources the client has and whose content is known, by name.
    pub(super) fn resources(&self) -> BTreeMap<&str, &Arc<Resource>> {
        let base = self.base.iter().filter(|(name, _)| !self.differs.contains_key(*name));
        let mut all: BTreeMap<&str, &Arc<Resource>> = base.map(|(name, r)| (name.as_str(), r)).collect();
        for (name, copy) in &self.differs {
            if let Some(Copy::Sent(resource)) = copy {
                all.insert(name, resource);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::Any;

    use super::*;

    fn resource(name: &str, version: u64) -> (String, Arc<Resource>) {
        let body = Any { type_url: String::new(), value: Vec::new() };
        (name.to_owned(), Arc::new(Resource { name: name.to_owned(), version, body }))
    }

    #[test]
    fn only_what_is_not_shared_may_differ() {
        let all = ["a", "b", "c", "d", "f"].map(|name| resource(name, 1));
        let base: Map = Arc::new(all.clone().into());
        let mut held = Held::default();
        assert_eq!(held.may_differ(&base).len(), 5, "of what is new all");
        held.settle(&base);
        assert!(held.may_differ(&base).is_empty());
        held.remove("d");
        assert_eq!(held.may_differ(&base), ["d"].into());

        let [a, _, c, d, f] = all;
        let next: Map = Arc::new([a, resource("bb", 1), resource("c", 2), d, resource("e", 1), f].into());
        assert_eq!(held.may_differ(&next), ["b", "bb", "c", "d", "e"].into());
        held.settle(&next);
        let fewer: Map = Arc::new([c].into());
        assert_eq!(held.may_differ(&fewer), ["a", "bb", "c", "d", "e", "f"].into());
        assert_eq!(held.may_differ(&Map::default()).len(), 6);
    }
}
