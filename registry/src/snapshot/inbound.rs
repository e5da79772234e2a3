//! Which service ports a workload serves.

use std::net::IpAddr;
use std::sync::Arc;

use super::services::Services;
use crate::merge::declare::Labels;
use crate::model::service::{Endpoint, Service, ServicePort};

/// Every port of a service of `namespace` with an endpoint at one of `addresses`, and the workload's port behind it.
pub(super) fn services(
    services: &Services,
    namespace: &str,
    addresses: &[IpAddr],
    labels: &Labels,
) -> Vec<(Arc<Service>, ServicePort, u16)> {
    let mut served: Vec<(&Arc<Service>, &Endpoint)> = Vec::new();
    for address in addresses {
        let text = address.to_string();
        for (_, host) in services.at_address(*address) {
            for candidate in host.candidates.iter().filter(|c| c.service.namespace == namespace) {
                let mut own =
                    candidate.endpoints.iter().filter(|e| e.address == text && same_workload(e, labels));
                if let Some(endpoint) = own.next() {
                    served.push((&candidate.service, endpoint));
                }
            }
        }
    }
    served.sort_by(|(a, _), (b, _)| {
        (a.created, &a.name, &a.namespace, &a.hostname).cmp(&(b.created, &b.name, &b.namespace, &b.hostname))
    });
    served.dedup_by(|(a, _), (b, _)| Arc::ptr_eq(a, b));
    let ports = |(service, endpoint): (&Arc<Service>, &Endpoint)| {
        let port = |port: &ServicePort| (Arc::clone(service), port.clone(), workload_port(port, endpoint));
        service.ports.iter().map(port).collect::<Vec<_>>()
    };
    served.into_iter().flat_map(ports).collect()
}

/// The endpoint's own port for this service port.
fn workload_port(port: &ServicePort, endpoint: &Endpoint) -> u16 {
    endpoint.ports.get(&port.name).copied().or(port.target_port).unwrap_or(port.number)
}

/// Several workloads may share an address: a label that both name with different values tells them apart.
fn same_workload(endpoint: &Endpoint, labels: &Labels) -> bool {
    endpoint.labels.iter().all(|(key, value)| labels.get(key).is_none_or(|own| own == value))
}
