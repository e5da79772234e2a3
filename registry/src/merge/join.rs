//! Two declarations of one service, by a catalog and by the configuration, become one.

use super::{Declaration, Family};
use crate::model::service::{Endpoint, Location, Protocol, Resolution, Service, ServicePort};

/// Both describe one service inside the mesh, one of them for a catalog whose instances the other cannot know.
pub(super) fn may(winner: &Declaration, other: &Declaration) -> bool {
    let consul = |declaration: &Declaration| declaration.family == Family::Consul;
    let platform = [winner, other].iter().any(|declaration| declaration.family == Family::Kubernetes);
    let known = |declaration: &Declaration| {
        declaration.service.resolution == Resolution::Static
            && declaration.service.location == Location::Internal
    };
    (consul(winner) || consul(other)) && !platform && known(winner) && known(other)
}

/// Adds the endpoints of `other` to those of `winner`, whose ports hold. What differs is told.
pub(super) fn join(winner: &mut Declaration, other: &Declaration) -> Vec<&'static str> {
    // A service of a catalog that has no instance yet declares no port.
    if winner.service.ports.is_empty() {
        winner.service.ports.clone_from(&other.service.ports);
    }
    if other.service.ports.is_empty() {
        return Vec::new();
    }
    let pairs: Vec<_> =
        winner.service.ports.iter().map(|port| (port, same(port, &winner.service, &other.service))).collect();
    if pairs.iter().any(|(_, theirs)| theirs.is_none()) {
        return vec!["lacks a port that the older declaration has; its endpoints are left out"];
    }
    let pairs: Vec<(&ServicePort, &ServicePort)> =
        pairs.into_iter().filter_map(|(port, theirs)| Some((port, theirs?))).collect();
    let mut told = Vec::new();
    let declared = |port: &ServicePort| port.protocol != Protocol::Auto;
    if pairs.iter().any(|(a, b)| declared(a) && declared(b) && a.protocol != b.protocol) {
        told.push("says another protocol of a port; the older declaration's holds");
    }
    if pairs.iter().any(|(a, b)| a.number != b.number) {
        told.push("says another number of a port; the older declaration's holds");
    }
    let moved: Vec<Endpoint> = other.endpoints.iter().map(|endpoint| moved(endpoint, &pairs)).collect();
    winner.endpoints.extend(moved);
    told
}

/// The port of `other` that is meant by `port`: of the same number, else of the same name, else the only one of both.
fn same<'a>(port: &ServicePort, winner: &Service, other: &'a Service) -> Option<&'a ServicePort> {
    let by_number = other.ports.iter().find(|theirs| theirs.number == port.number);
    let by_name = || other.ports.iter().find(|theirs| theirs.name == port.name);
    let only = || other.ports.first().filter(|_| winner.ports.len() == 1 && other.ports.len() == 1);
    by_number.or_else(by_name).or_else(only)
}

/// The endpoint with its ports under the names of the winner.
fn moved(endpoint: &Endpoint, pairs: &[(&ServicePort, &ServicePort)]) -> Endpoint {
    let mut moved = endpoint.clone();
    moved.weight = moved.weight.max(1);
    moved.ports.clear();
    for (port, theirs) in pairs {
        let own = endpoint.ports.get(&theirs.name).copied();
        let number = own.or(theirs.target_port).unwrap_or(theirs.number);
        if number != port.target_port.unwrap_or(port.number) {
            moved.ports.insert(port.name.clone(), number);
        }
    }
    moved
}
