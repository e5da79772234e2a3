//! Services by host, by age, and by the addresses of their endpoints.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use crate::chunks::Chunks;
use crate::merge::{Candidate, Host};
use crate::model::service::{Endpoint, Hostname, Service};

/// Creation time, short name, namespace, host: the order of services in listeners and routes.
type Age = (i64, String, String, Hostname);

static NO_ENDPOINTS: LazyLock<Arc<[Endpoint]>> = LazyLock::new(|| Arc::from([]));
static NO_IDENTITIES: BTreeSet<String> = BTreeSet::new();

/// All hosts. A copy shares them.
#[derive(Debug, Clone, Default)]
pub(super) struct Services {
    by_host: Chunks<Hostname, Arc<Host>>,
    /// With each service whether it is the only one of its host.
    by_age: Chunks<Age, (Arc<Service>, bool)>,
    by_address: Chunks<(String, Hostname), ()>,
}

impl Services {
    /// Replaces what is known about `host`.
    pub(super) fn set(&mut self, host: &str, merged: Option<Host>) {
        let old = self.by_host.get(host).cloned();
        let new = merged.map(|new| Arc::new(keep_same(new, old.as_deref())));
        let candidates =
            |host: &Option<Arc<Host>>| host.as_ref().map_or(Vec::new(), |h| h.candidates.clone());
        let (before, after) = (candidates(&old), candidates(&new));

        for service in before.iter().map(|c| &c.service) {
            self.by_age.remove(&age(service));
        }
        for service in after.iter().map(|c| &c.service) {
            self.by_age.insert(age(service), (Arc::clone(service), after.len() == 1));
        }
        let (was, is) = (addresses(&before), addresses(&after));
        for gone in was.difference(&is) {
            self.by_address.remove(&((*gone).to_owned(), host.to_owned()));
        }
        for come in is.difference(&was) {
            self.by_address.insert(((*come).to_owned(), host.to_owned()), ());
        }
        match new {
            Some(new) => self.by_host.insert(host.to_owned(), new),
            None => drop(self.by_host.remove(host)),
        }
    }

    pub(super) fn get(&self, host: &str) -> Option<&Arc<Host>> {
        self.by_host.get(host)
    }

    pub(super) fn hosts(&self) -> impl Iterator<Item = (&Hostname, &Arc<Host>)> {
        self.by_host.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.by_host.len()
    }

    pub(super) fn candidate(&self, host: &str, namespace: Option<&str>) -> Option<&Candidate> {
        let candidates = &self.get(host)?.candidates;
        match namespace {
            None => candidates.first(),
            Some(namespace) => choose(candidates, namespace),
        }
    }

    pub(super) fn endpoints(&self, host: &str) -> &Arc<[Endpoint]> {
        self.candidate(host, None).map_or(&NO_ENDPOINTS, |c| &c.endpoints)
    }

    pub(super) fn identities(&self, host: &str) -> &BTreeSet<String> {
        self.candidate(host, None).map_or(&NO_IDENTITIES, |c| &c.identities)
    }

    fn of(&self, service: &Service) -> Option<&Candidate> {
        let candidates = &self.get(&service.hostname)?.candidates;
        candidates.iter().find(|c| c.service.namespace == service.namespace)
    }

    pub(super) fn endpoints_of(&self, service: &Service) -> &Arc<[Endpoint]> {
        self.of(service).map_or(&NO_ENDPOINTS, |c| &c.endpoints)
    }

    pub(super) fn identities_of(&self, service: &Service) -> &BTreeSet<String> {
        self.of(service).map_or(&NO_IDENTITIES, |c| &c.identities)
    }

    pub(super) fn same_service(&self, previous: &Self, host: &str) -> bool {
        let (Some(a), Some(b)) = (self.get(host), previous.get(host)) else {
            return self.get(host).is_none() && previous.get(host).is_none();
        };
        let same = |(a, b): (&Candidate, &Candidate)| a.service == b.service && a.identities == b.identities;
        a.candidates.len() == b.candidates.len() && a.candidates.iter().zip(&b.candidates).all(same)
    }

    /// The services that `namespace` sees, oldest first; one per host.
    pub(super) fn visible<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Service>> {
        let sees = move |service: &Service, alone: bool| {
            if alone {
                return exported(service, namespace);
            }
            let Some(host) = self.get(&service.hostname) else { return false };
            choose(&host.candidates, namespace)
                .is_some_and(|chosen| chosen.service.namespace == service.namespace)
        };
        self.by_age.iter().filter_map(move |(_, (service, alone))| sees(service, *alone).then_some(service))
    }

    /// Every service that is exported to `namespace`, oldest first; several of one host when namespaces declare it.
    pub(super) fn exported<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Service>> {
        self.by_age
            .iter()
            .map(|(_, (service, _))| service)
            .filter(move |service| exported(service, namespace))
    }

    /// The hosts with an endpoint at `address`.
    pub(super) fn at_address(&self, address: IpAddr) -> impl Iterator<Item = (&Hostname, &Arc<Host>)> {
        let address = address.to_string();
        let from = self.by_address.iter_from(&(address.clone(), Hostname::new()));
        from.take_while(move |((found, _), ())| *found == address)
            .filter_map(|((_, host), ())| Some((host, self.get(host)?)))
    }
}

/// A client's own namespace outranks the others that it sees.
fn choose<'a>(candidates: &'a [Candidate], namespace: &str) -> Option<&'a Candidate> {
    let mut seen = candidates.iter().filter(|c| exported(&c.service, namespace)).peekable();
    let best = seen.peek().copied();
    seen.find(|c| c.service.namespace == namespace).or(best)
}

/// The service is exported to `namespace`.
fn exported(service: &Service, namespace: &str) -> bool {
    service.export_to.iter().any(|to| match to.as_str() {
        "*" => true,
        "." => service.namespace == namespace,
        "~" => false,
        name => name == namespace,
    })
}

fn age(service: &Service) -> Age {
    (service.created, service.name.clone(), service.namespace.clone(), service.hostname.clone())
}

fn addresses(candidates: &[Candidate]) -> BTreeSet<&str> {
    candidates.iter().flat_map(|c| c.endpoints.iter()).map(|endpoint| endpoint.address.as_str()).collect()
}

/// Parts that did not change stay the same allocation, so that readers can tell by looking at the pointer.
fn keep_same(mut new: Host, old: Option<&Host>) -> Host {
    for candidate in &mut new.candidates {
        let namespace = &candidate.service.namespace;
        let old = old.and_then(|old| old.candidates.iter().find(|c| c.service.namespace == *namespace));
        let Some(old) = old else { continue };
        if candidate.service == old.service {
            candidate.service = Arc::clone(&old.service);
        }
        if candidate.identities == old.identities {
            candidate.identities = Arc::clone(&old.identities);
        }
        if candidate.endpoints == old.endpoints {
            candidate.endpoints = Arc::clone(&old.endpoints);
        }
    }
    new
}
