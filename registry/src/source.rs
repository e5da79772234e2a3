//! From what a registry says to commands.
//!
//! A source reads the whole of what it knows, compares it with what the state holds of it, and proposes the difference:
//! unchanged values are never proposed, and a new leader that starts from the state repeats nothing. [`diff`] and
//! [`diff_objects`] are that comparison; [`mod@file`] watches a folder, [`vm`] makes workloads of joining machines.

pub mod consul;
pub mod file;
pub mod vm;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::config::Object;
use crate::model::service::{Endpoint, Hostname, Service, SourceId};
use crate::state::{Command, Delete, ObjectKey, Put, State};

/// Everything that one source knows about services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalog {
    /// Services by host, in lower case.
    pub services: BTreeMap<Hostname, Service>,
    /// Endpoints by host, in lower case.
    pub endpoints: BTreeMap<Hostname, BTreeSet<Endpoint>>,
}

impl Catalog {
    /// What `state` holds of `source`: where a source begins.
    #[must_use]
    pub fn of(state: &State, source: &SourceId) -> Self {
        let services = state.services().filter(|(_, owner, _)| *owner == source);
        let endpoints = state.endpoints().filter(|(_, owner, _)| *owner == source);
        Self {
            services: services.map(|(host, _, service)| (host.clone(), Service::clone(service))).collect(),
            endpoints: endpoints
                .map(|(host, _, all)| (host.clone(), all.iter().cloned().collect()))
                .collect(),
        }
    }
}

/// The commands that lead from `previous` to `next`: services before their endpoints, then what is gone.
#[must_use]
pub fn diff(source: &SourceId, previous: &Catalog, next: &Catalog) -> Vec<Command> {
    let mut commands = Vec::new();
    for (host, service) in &next.services {
        if previous.services.get(host).is_none_or(|known| !same_service(known, service)) {
            let service = Service { source: source.clone(), hostname: host.clone(), ..service.clone() };
            commands.push(Command::PutService { service: Arc::new(service) });
        }
    }
    let none = BTreeSet::new();
    let hosts: BTreeSet<&Hostname> = next.endpoints.keys().chain(previous.endpoints.keys()).collect();
    for host in hosts {
        let (known, now) =
            (previous.endpoints.get(host).unwrap_or(&none), next.endpoints.get(host).unwrap_or(&none));
        let leaves = previous.services.contains_key(host) && !next.services.contains_key(host);
        if known != now && !(leaves && now.is_empty()) {
            commands.push(Command::ReplaceEndpoints {
                host: host.clone(),
                source: source.clone(),
                endpoints: now.iter().cloned().collect(),
            });
        }
    }
    for host in previous.services.keys().filter(|host| !next.services.contains_key(*host)) {
        commands.push(Command::RemoveService { host: host.clone(), source: source.clone() });
    }
    commands
}

/// The state chooses the index, and the age where the source tells none.
fn same_service(known: &Service, now: &Service) -> bool {
    let created = if now.created == 0 { known.created } else { now.created };
    let bare = |service: &Service| Service {
        vip_index: 0,
        created,
        source: known.source.clone(),
        ..service.clone()
    };
    known.created == created && bare(known) == bare(now)
}

/// One change that leads from `previous` to `next`; nothing when they are equal.
#[must_use]
pub fn diff_objects(
    previous: &BTreeMap<ObjectKey, Arc<Object>>,
    next: &BTreeMap<ObjectKey, Arc<Object>>,
) -> Option<Command> {
    let differs =
        |key: &ObjectKey, object: &Object| previous.get(key).is_none_or(|known| !same_object(known, object));
    let puts: Vec<Put> = next
        .iter()
        .filter(|(key, object)| differs(key, object))
        .map(|(_, object)| Put { object: Arc::clone(object), expected: None })
        .collect();
    let gone = previous.keys().filter(|key| !next.contains_key(*key));
    let deletes: Vec<Delete> = gone.map(|key| Delete { key: key.clone(), expected: None }).collect();
    (!puts.is_empty() || !deletes.is_empty()).then_some(Command::Change { puts, deletes })
}

/// The same was written, whatever the state added.
fn same_object(a: &Object, b: &Object) -> bool {
    a.api_version == b.api_version && a.labels == b.labels && a.annotations == b.annotations && a.raw == b.raw
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::service::{Health, Locality, Location, Resolution, TlsMode};
    use crate::state::{Batch, Revision};

    fn service(host: &str) -> Service {
        Service {
            hostname: host.to_owned(),
            name: host.to_owned(),
            namespace: "a".to_owned(),
            ports: Vec::new(),
            addresses: Vec::new(),
            vip_index: 0,
            resolution: Resolution::Static,
            location: Location::Internal,
            export_to: Vec::new(),
            subject_alt_names: Vec::new(),
            labels: BTreeMap::new(),
            created: 0,
            source: SourceId::Config,
        }
    }

    fn endpoint(address: &str) -> Endpoint {
        Endpoint {
            address: address.to_owned(),
            ports: BTreeMap::new(),
            weight: 1,
            locality: Locality::default(),
            network: String::new(),
            labels: BTreeMap::new(),
            workload: String::new(),
            namespace: "a".to_owned(),
            cluster: String::new(),
            service_account: String::new(),
            tls_mode: TlsMode::Disabled,
            health: Health::Healthy,
        }
    }

    fn catalog(entries: &[(&str, &[&str])]) -> Catalog {
        let mut catalog = Catalog::default();
        for (host, addresses) in entries {
            catalog.services.insert((*host).to_owned(), service(host));
            catalog.endpoints.insert((*host).to_owned(), addresses.iter().map(|a| endpoint(a)).collect());
        }
        catalog
    }

    #[test]
    fn what_is_proposed_leads_to_what_the_source_knows_and_then_nothing_is() {
        let source = SourceId::Consul("c/dc".to_owned());
        let mut state = State::default();
        let mut revision = 0;
        for next in [
            catalog(&[("x.com", &["10.0.0.1", "10.0.0.2"]), ("y.com", &[])]),
            catalog(&[("x.com", &["10.0.0.2"]), ("z.com", &["10.0.0.3"])]),
            catalog(&[("x.com", &[])]),
            catalog(&[]),
        ] {
            let commands = diff(&source, &Catalog::of(&state, &source), &next);
            revision += 1;
            let batch = Batch { time_ms: 1_000_000, author: String::new(), commands };
            state.apply(Revision(revision), &batch);
            let hosts: Vec<_> = state.services().map(|(host, _, _)| host.clone()).collect();
            assert_eq!(hosts, next.services.keys().cloned().collect::<Vec<_>>());
            let known: usize = state.endpoints().map(|(_, _, all)| all.len()).sum();
            assert_eq!(known, next.endpoints.values().map(BTreeSet::len).sum::<usize>());
            assert_eq!(diff(&source, &Catalog::of(&state, &source), &next), vec![]);
        }
    }

    #[test]
    fn a_source_sees_only_what_is_its_own() {
        let mut state = State::default();
        let (mine, other) = (SourceId::Consul("c/1".to_owned()), SourceId::Consul("c/2".to_owned()));
        let commands = diff(&other, &Catalog::default(), &catalog(&[("x.com", &["10.0.0.1"])]));
        state.apply(Revision(1), &Batch { time_ms: 0, author: String::new(), commands });
        assert_eq!(Catalog::of(&state, &mine), Catalog::default());
        assert_eq!(diff(&mine, &Catalog::of(&state, &mine), &Catalog::default()), vec![]);
    }
}
