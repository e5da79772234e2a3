//! VirtualServices with their names resolved and their delegates merged, in the order in which they take effect.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::scoped::Typed;
use super::{delegate, host_match};
use crate::chunks::Chunks;
use crate::config::{Kind, Object, Spec};
use crate::merge::Settings;
use crate::model::traffic::{Destination, HttpRoute, VirtualService};
use crate::state::{ObjectKey, State};

/// The gateway that stands for all sidecars.
pub const MESH_GATEWAY: &str = "mesh";

/// Creation time, name, namespace: oldest first.
type Age = (i64, String, String);

/// A root VirtualService, ready to be read.
#[derive(Debug)]
struct Root {
    object: Arc<Object>,
    resolved: Arc<VirtualService>,
    /// Never empty.
    export_to: Vec<String>,
    /// What it delegates to.
    delegates: BTreeSet<ObjectKey>,
}

/// All root VirtualServices. A copy shares them.
#[derive(Debug, Clone, Default)]
pub(super) struct Routing {
    by_age: Chunks<Age, Arc<Root>>,
    ages: Chunks<ObjectKey, i64>,
}

impl Routing {
    pub(super) fn build(state: &State, settings: &Settings) -> Self {
        let mut routing = Self::default();
        let keys = state.objects_of(Kind::VirtualService).map(|(key, _)| key.clone()).collect();
        routing.update(state, settings, &keys);
        routing
    }

    /// Reads these VirtualServices again, and those that delegate to them.
    pub(super) fn update(&mut self, state: &State, settings: &Settings, changed: &BTreeSet<ObjectKey>) {
        if changed.is_empty() {
            return;
        }
        let delegating = self.by_age.iter().filter(|(_, root)| !root.delegates.is_disjoint(changed));
        let mut again: BTreeSet<ObjectKey> =
            delegating.map(|(_, root)| ObjectKey::of(&root.object)).collect();
        again.extend(changed.iter().cloned());
        for key in again {
            if let Some(created) = self.ages.remove(&key) {
                self.by_age.remove(&(created, key.name.clone(), key.namespace.clone()));
            }
            let Some(root) = state.object(&key).and_then(|object| root(state, settings, object)) else {
                continue;
            };
            let created = root.object.created;
            self.by_age.insert((created, key.name.clone(), key.namespace.clone()), Arc::new(root));
            self.ages.insert(key, created);
        }
    }

    /// The VirtualServices of `gateway` that a client of `namespace` sees: its namespace's private ones, then those
    /// exported to it by name, then the public ones; each group oldest first.
    pub(super) fn visible(&self, namespace: &str, gateway: &str) -> Vec<Typed<VirtualService>> {
        let mut groups: [Vec<Typed<VirtualService>>; 3] = Default::default();
        for (_, root) in self.by_age.iter() {
            if !root.resolved.gateways.iter().any(|name| name == gateway) {
                continue;
            }
            let group = group(&root.export_to, &root.object.namespace, namespace);
            if let Some(list) = group.and_then(|group| groups.get_mut(group)) {
                list.push((Arc::clone(&root.object), Arc::clone(&root.resolved)));
            }
        }
        groups.into_iter().flatten().collect()
    }
}

/// Which group of the order; none when it is not seen.
fn group(export_to: &[String], owner: &str, client: &str) -> Option<usize> {
    if export_to.iter().any(|to| to == "*") {
        return Some(2);
    }
    if export_to.iter().any(|to| to == "~") {
        return None;
    }
    if owner == client && export_to.iter().any(|to| to == "." || to == owner) {
        return Some(0);
    }
    export_to.iter().any(|to| to == client).then_some(1)
}

/// The root that `object` is; a VirtualService without hosts is a delegate and no root.
fn root(state: &State, settings: &Settings, object: &Arc<Object>) -> Option<Root> {
    let Spec::VirtualService(declared) = &*object.spec else { return None };
    if declared.hosts.is_empty() {
        return None;
    }
    let mut resolved = VirtualService::clone(declared);
    let mut delegates = BTreeSet::new();
    resolved.http = Vec::with_capacity(declared.http.len());
    for route in &declared.http {
        let route = resolve_route(route, object, settings);
        let Some(delegate) = &route.delegate else {
            resolved.http.push(route);
            continue;
        };
        let namespace = if delegate.namespace.is_empty() { &object.namespace } else { &delegate.namespace };
        let key = ObjectKey {
            kind: Kind::VirtualService,
            namespace: namespace.clone(),
            name: delegate.name.clone(),
        };
        resolved.http.extend(delegated(state, settings, &route, &key, object));
        delegates.insert(key);
    }
    let suffix = &settings.domain_suffix;
    for host in &mut resolved.hosts {
        *host = host_match::resolve(host, &object.namespace, suffix);
    }
    resolved.gateways = gateways(&declared.gateways, &object.namespace);
    if resolved.gateways.is_empty() {
        resolved.gateways.push(MESH_GATEWAY.to_owned());
    }
    for tls in &mut resolved.tls {
        tls.r#match.iter_mut().for_each(|m| m.gateways = gateways(&m.gateways, &object.namespace));
        let destinations = tls.route.iter_mut().filter_map(|route| route.destination.as_mut());
        destinations.for_each(|destination| resolve_destination(destination, object, settings));
    }
    for tcp in &mut resolved.tcp {
        tcp.r#match.iter_mut().for_each(|m| m.gateways = gateways(&m.gateways, &object.namespace));
        let destinations = tcp.route.iter_mut().filter_map(|route| route.destination.as_mut());
        destinations.for_each(|destination| resolve_destination(destination, object, settings));
    }
    let export_to = if declared.export_to.is_empty() {
        settings.virtual_service_export_to.clone()
    } else {
        declared.export_to.clone()
    };
    Some(Root { object: Arc::clone(object), resolved: Arc::new(resolved), export_to, delegates })
}

/// The routes that `route` of `root` delegates to `key`; none when that is missing, hidden, or no delegate.
fn delegated(
    state: &State,
    settings: &Settings,
    route: &HttpRoute,
    key: &ObjectKey,
    root: &Object,
) -> Vec<HttpRoute> {
    let Some(object) = state.object(key) else { return Vec::new() };
    let Spec::VirtualService(declared) = &*object.spec else { return Vec::new() };
    let export_to =
        if declared.export_to.is_empty() { &settings.virtual_service_export_to } else { &declared.export_to };
    if !declared.hosts.is_empty() || group(export_to, &object.namespace, &root.namespace).is_none() {
        return Vec::new();
    }
    let routes: Vec<_> = declared.http.iter().map(|own| resolve_route(own, object, settings)).collect();
    delegate::merge_routes(route, &routes)
}

/// The route with its names as seen from the namespace of its object.
fn resolve_route(route: &HttpRoute, object: &Object, settings: &Settings) -> HttpRoute {
    let mut route = route.clone();
    for condition in &mut route.r#match {
        condition.gateways = gateways(&condition.gateways, &object.namespace);
    }
    let weighted = route.route.iter_mut().filter_map(|route| route.destination.as_mut());
    let mirrors = route.mirrors.iter_mut().filter_map(|mirror| mirror.destination.as_mut());
    for destination in weighted.chain(mirrors).chain(route.mirror.as_mut()) {
        resolve_destination(destination, object, settings);
    }
    route
}

fn resolve_destination(destination: &mut Destination, object: &Object, settings: &Settings) {
    destination.host = host_match::resolve(&destination.host, &object.namespace, &settings.domain_suffix);
}

/// `namespace/name` for every gateway; `mesh` stays.
fn gateways(names: &[String], namespace: &str) -> Vec<String> {
    let full = |name: &String| match name.split_once('/') {
        Some((".", name)) => format!("{namespace}/{name}"),
        Some(_) => name.clone(),
        None if name == MESH_GATEWAY => name.clone(),
        None => format!("{namespace}/{name}"),
    };
    names.iter().map(full).collect()
}
