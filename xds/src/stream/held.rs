//! What a client has of one type, as far as the server knows.

use std::collections::BTreeMap;
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
