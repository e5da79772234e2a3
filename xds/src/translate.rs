//! From a snapshot and a proxy to everything the proxy should hold: pure, and the same bytes every time.
//!
//! [`translate`] is the whole of it, [`endpoints`] the part that changes most often. `View` is what the proxy sees
//! of the mesh; clusters, endpoints, routes and listeners are each made from it in a module of their own.

mod access_log;
mod authz;
mod cluster;
mod endpoint;
mod http;
mod inbound;
mod jwt;
mod listener;
pub mod names;
mod pb;
mod policy;
mod route;
mod tls;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::DiscoveryType;
use prost::{Message, Name};
use registry::model::service::Hostname;
use registry::snapshot::Snapshot;
use xxhash_rust::xxh3::xxh3_64;

pub use self::tls::{CERTIFICATE_SECRET, ROOT_SECRET, SDS_CLUSTER};
use self::view::View;
use crate::proxy::{Interception, Proxy};
use crate::resources::{Resource, Resources, Type};

/// Everything that `proxy` should hold at this snapshot.
#[must_use]
pub fn translate(snapshot: &Snapshot, proxy: &Proxy) -> Resources {
    let view = View::new(snapshot, proxy);
    let ports = view.inbound_ports();
    let (mut listeners, tables) = listener::outbound(&view);
    listeners.extend(inbound::listeners(&view, &ports));
    let routes = tables.iter().map(|table| route::configuration(&view, table)).map(|r| (r.name.clone(), r));
    Resources {
        by_type: BTreeMap::from([
            (Type::Cluster, by_name(clusters(&view, &ports).into_iter().map(|c| (c.name.clone(), c)))),
            (Type::Endpoint, collect(assignments(&view))),
            (Type::Listener, by_name(listeners.into_iter().map(|l| (l.name.clone(), l)))),
            (Type::Route, by_name(routes)),
        ]),
    }
}

/// The endpoints of these hosts' clusters, of those that `proxy` may see.
#[must_use]
pub fn endpoints(snapshot: &Snapshot, proxy: &Proxy, hosts: &BTreeSet<Hostname>) -> Vec<Arc<Resource>> {
    assignments(&View::of_hosts(snapshot, proxy, hosts))
}

/// The hosts of which `proxy` holds clusters: a change of any other does not concern it.
#[must_use]
pub fn visible_hosts(snapshot: &Snapshot, proxy: &Proxy) -> BTreeSet<Hostname> {
    let services = snapshot.services_for(&proxy.namespace, &proxy.labels);
    services.iter().map(|service| service.hostname.clone()).collect()
}

fn clusters(view: &View<'_>, ports: &[inbound::InboundPort]) -> Vec<Cluster> {
    let mut out: Vec<Cluster> = cluster::fallbacks(view).into();
    for service in &view.services {
        out.extend(cluster::targets(view, service).into_iter().filter_map(|t| cluster::outbound(view, t)));
    }
    out.extend(ports.iter().map(|port| cluster::inbound::application(view, port)));
    if view.proxy.interception == Interception::Captured {
        out.push(cluster::inbound::passthrough(view));
    }
    out
}

fn assignments(view: &View<'_>) -> Vec<Arc<Resource>> {
    let mut out = Vec::new();
    for service in &view.services {
        for target in cluster::targets(view, service) {
            let policy = view.policy(&service.hostname, target.port.number, target.subset);
            if cluster::discovery(service, &policy) == DiscoveryType::Eds {
                let assignment = cluster::load_assignment(view, target);
                out.push(resource(assignment.cluster_name.clone(), &assignment));
            }
        }
    }
    out
}

fn by_name<M: Message + Name>(
    messages: impl IntoIterator<Item = (String, M)>,
) -> BTreeMap<String, Arc<Resource>> {
    collect(messages.into_iter().map(|(name, message)| resource(name, &message)))
}

fn collect(resources: impl IntoIterator<Item = Arc<Resource>>) -> BTreeMap<String, Arc<Resource>> {
    resources.into_iter().map(|resource| (resource.name.clone(), resource)).collect()
}

/// Encodes a message once; its version is a hash of the bytes, equal on every member.
fn resource<M: Message + Name>(name: String, message: &M) -> Arc<Resource> {
    let body = wire::canonical::any(message);
    Arc::new(Resource { name, version: xxh3_64(&body.value), body })
}
