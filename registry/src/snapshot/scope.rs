//! What a workload's Sidecar lets its proxy see.
//!
//! Source: Istio, `SidecarScope`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::scoped::Scoped as _;
use super::scoped::{Typed, selects};
use super::{MESH_GATEWAY, Snapshot, host_match};
use crate::merge::declare::Labels;
use crate::model::service::{Hostname, Service};
use crate::model::traffic::{Destination, IstioEgressListener, Sidecar, VirtualService};

pub(super) fn sidecar<'a>(
    snapshot: &'a Snapshot,
    namespace: &str,
    labels: &Labels,
) -> Option<&'a Typed<Sidecar>> {
    let own = snapshot.sidecars.in_namespace(namespace);
    let without = |list: &'a [Typed<Sidecar>]| list.iter().find(|(_, sidecar)| sidecar.selector().is_none());
    own.iter()
        .find(|(_, sidecar)| sidecar.selector().is_some() && selects(&**sidecar, labels))
        .or_else(|| without(own))
        .or_else(|| without(snapshot.sidecars.in_namespace(snapshot.root_namespace())))
}

pub(super) fn services(snapshot: &Snapshot, namespace: &str, labels: &Labels) -> Vec<Arc<Service>> {
    let Some(listeners) = listeners(snapshot, namespace, labels) else {
        return snapshot.visible_services(namespace);
    };
    let exported: Vec<&Arc<Service>> = snapshot.services.exported(namespace).collect();
    let mut imported: BTreeMap<(&str, &str), Imported> = BTreeMap::new();
    for listener in &listeners {
        for service in
            exported.iter().filter(|service| listener.imports(&service.namespace, &service.hostname))
        {
            let ports = imported.entry(id(service)).or_insert_with(|| Imported::Ports(BTreeSet::new()));
            ports.add(listener.port);
        }
    }
    let mut chosen: BTreeMap<&str, &str> = BTreeMap::new();
    for (host, _) in imported.keys() {
        chosen.entry(host).or_insert_with(|| choose(snapshot, host, namespace, &imported));
    }
    for (_, routes) in listeners.iter().flat_map(|listener| listener.virtual_services(snapshot, namespace)) {
        for host in destinations(&routes) {
            let Some(best) = snapshot.service(&host, Some(namespace)) else { continue };
            let owner = *chosen.entry(&best.hostname).or_insert(&best.namespace);
            imported.insert((&best.hostname, owner), Imported::All);
        }
    }
    let take = |service: &Arc<Service>| {
        let owner = chosen.get(service.hostname.as_str())?;
        imported.get(&id(service)).filter(|_| *owner == service.namespace)?.of(service)
    };
    exported.into_iter().filter_map(take).collect()
}

/// Whose service stands for `host` among the imported ones: the client's own, else the best.
fn choose<'a>(
    snapshot: &'a Snapshot,
    host: &str,
    own: &str,
    imported: &BTreeMap<(&str, &str), Imported>,
) -> &'a str {
    let candidates = snapshot.candidates(host).iter().map(|candidate| candidate.service.namespace.as_str());
    let mut imported = candidates.filter(|namespace| imported.contains_key(&(host, *namespace))).peekable();
    let best = imported.peek().copied().unwrap_or_default();
    imported.find(|namespace| *namespace == own).unwrap_or(best)
}

pub(super) fn virtual_services(
    snapshot: &Snapshot,
    namespace: &str,
    labels: &Labels,
) -> Vec<Typed<VirtualService>> {
    let Some(listeners) = listeners(snapshot, namespace, labels) else {
        return snapshot.virtual_services_for(namespace, MESH_GATEWAY);
    };
    let all = snapshot.virtual_services_for(namespace, MESH_GATEWAY);
    all.into_iter()
        .filter(|routes| listeners.iter().any(|listener| listener.imports_routes(routes)))
        .collect()
}

fn id(service: &Service) -> (&str, &str) {
    (&service.hostname, &service.namespace)
}

/// Which ports of a service are imported.
enum Imported {
    All,
    Ports(BTreeSet<u16>),
}

impl Imported {
    fn add(&mut self, port: Option<u16>) {
        match (self, port) {
            (Self::All, _) => {}
            (Self::Ports(ports), Some(port)) => {
                ports.insert(port);
            }
            (all @ Self::Ports(_), None) => *all = Self::All,
        }
    }

    /// The service with these ports only; none when it has none of them.
    fn of(&self, service: &Arc<Service>) -> Option<Arc<Service>> {
        let Self::Ports(wanted) = self else { return Some(Arc::clone(service)) };
        let ports: Vec<_> =
            service.ports.iter().filter(|port| wanted.contains(&port.number)).cloned().collect();
        match ports.len() {
            0 => None,
            all if all == service.ports.len() => Some(Arc::clone(service)),
            _ => Some(Arc::new(Service { ports, ..Service::clone(service) })),
        }
    }
}

/// One egress listener.
struct Listener {
    /// Namespace and host patterns that are seen.
    hosts: Vec<(String, String)>,
    /// Namespace and host patterns that are not.
    excluded: Vec<(String, String)>,
    /// Only this port of a service.
    port: Option<u16>,
}

/// The egress listeners of the workload's Sidecar; none when it sees everything.
fn listeners(snapshot: &Snapshot, namespace: &str, labels: &Labels) -> Option<Vec<Listener>> {
    let (_, sidecar) = sidecar(snapshot, namespace, labels)?;
    if sidecar.egress.is_empty() {
        return None;
    }
    Some(sidecar.egress.iter().map(|listener| Listener::new(listener, namespace)).collect())
}

impl Listener {
    fn new(declared: &IstioEgressListener, own: &str) -> Self {
        let mut listener = Self {
            hosts: Vec::new(),
            excluded: Vec::new(),
            port: declared.port.as_ref().map(|port| port.number).filter(|port| *port != 0),
        };
        for text in &declared.hosts {
            let Some((namespace, host)) = text.split_once('/') else { continue };
            let host = host.to_ascii_lowercase();
            match namespace {
                "~" => {}
                "." => listener.hosts.push((own.to_owned(), host)),
                name => match name.strip_prefix('~') {
                    Some(".") => listener.excluded.push((own.to_owned(), host)),
                    Some(excluded) => listener.excluded.push((excluded.to_owned(), host)),
                    None => listener.hosts.push((name.to_owned(), host)),
                },
            }
        }
        listener
    }

    fn imports(&self, namespace: &str, host: &str) -> bool {
        let among = |patterns: &[(String, String)]| {
            patterns.iter().any(|(ns, pattern)| covers(ns, namespace) && host_match::subset_of(host, pattern))
        };
        among(&self.hosts) && !among(&self.excluded)
    }

    /// A VirtualService of an imported namespace, with a host that an import names or that names an import.
    fn imports_routes(&self, (object, routes): &Typed<VirtualService>) -> bool {
        let imported = |host: &String| {
            let named = |(ns, pattern): &(String, String)| {
                covers(ns, &object.namespace) && host_match::matches(host, pattern)
            };
            let excluded = |(ns, pattern): &(String, String)| {
                covers(ns, &object.namespace) && host_match::subset_of(host, pattern)
            };
            self.hosts.iter().any(named) && !self.excluded.iter().any(excluded)
        };
        routes.hosts.iter().any(imported)
    }

    fn virtual_services(&self, snapshot: &Snapshot, namespace: &str) -> Vec<Typed<VirtualService>> {
        let mut routes = snapshot.virtual_services_for(namespace, MESH_GATEWAY);
        routes.retain(|routes| self.imports_routes(routes));
        routes
    }
}

fn covers(pattern: &str, namespace: &str) -> bool {
    pattern == "*" || pattern == namespace
}

/// Every host that the routes may send to.
fn destinations(routes: &VirtualService) -> BTreeSet<Hostname> {
    let http = routes.http.iter().flat_map(|route| {
        let weighted = route.route.iter().filter_map(|route| route.destination.as_ref());
        let mirrors = route.mirrors.iter().filter_map(|mirror| mirror.destination.as_ref());
        weighted.chain(mirrors).chain(route.mirror.as_ref())
    });
    let tls = routes.tls.iter().flat_map(|route| &route.route);
    let tcp = routes.tcp.iter().flat_map(|route| &route.route);
    let streams = tls.chain(tcp).filter_map(|route| route.destination.as_ref());
    http.chain(streams).map(|destination: &Destination| destination.host.clone()).collect()
}
