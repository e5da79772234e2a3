//! Endpoints that are names: asked for again and again, and kept while the answer is missing.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use super::Upstream;
use crate::xds::cluster::endpoint::{ClusterLoadAssignment, Endpoint, Health, LocalityEndpoints};
use crate::xds::cluster::{Discovery, Dns, DnsFamily};
use crate::xds::decode::{Address, Metadata};

/// An endpoint at an address about which nothing else is known.
#[must_use]
pub fn endpoint_at(address: SocketAddr) -> Endpoint {
    Endpoint {
        address: Address::Socket(address),
        additional_addresses: Box::default(),
        hostname: Box::default(),
        health: Health::Healthy,
        weight: 1,
        metadata: Metadata::default(),
        mesh_tls: false,
        workload: None,
        health_check_port: None,
        disable_health_check: false,
    }
}

/// Resolves the names of `named` until the upstream is gone.
pub(super) fn start(upstream: &Rc<Upstream>, named: Arc<ClusterLoadAssignment>, how: Dns) {
    let tasks = upstream.shared.tasks.clone();
    let upstream = Rc::downgrade(upstream);
    tasks.spawn_local(async move {
        while let Some(this) = upstream.upgrade() {
            drop(this);
            let resolved = resolve(&named, how).await;
            let Some(this) = upstream.upgrade() else { return };
            match resolved {
                Ok(endpoints) => this.update(&Arc::new(endpoints)),
                Err(error) => {
                    // the last answer stays: unknown is not empty
                    tracing::warn!(cluster = %this.config.name, %error, "name not resolved");
                }
            }
            drop(this);
            tokio::time::sleep(how.refresh).await;
        }
    });
}

async fn resolve(named: &ClusterLoadAssignment, how: Dns) -> std::io::Result<ClusterLoadAssignment> {
    let mut localities = Vec::new();
    for locality in &named.localities {
        let mut endpoints = Vec::new();
        for endpoint in &locality.endpoints {
            let Address::Name(name, port) = &endpoint.address else {
                endpoints.push(Arc::clone(endpoint));
                continue;
            };
            let found = tokio::net::lookup_host((&**name, *port)).await?;
            for address in of_family(found.collect(), how.family) {
                endpoints.push(Arc::new(at(endpoint, name, address)));
            }
        }
        localities.push(LocalityEndpoints {
            locality: locality.locality.clone(),
            priority: locality.priority,
            weight: locality.weight,
            endpoints: endpoints.into(),
        });
    }
    Ok(ClusterLoadAssignment {
        name: Arc::clone(&named.name),
        localities: localities.into(),
        overprovisioning_factor: named.overprovisioning_factor,
    })
}

fn at(endpoint: &Endpoint, name: &str, address: SocketAddr) -> Endpoint {
    let hostname = if endpoint.hostname.is_empty() { name.into() } else { endpoint.hostname.clone() };
    Endpoint {
        hostname,
        health: endpoint.health,
        weight: endpoint.weight,
        metadata: endpoint.metadata.clone(),
        mesh_tls: endpoint.mesh_tls,
        workload: endpoint.workload.clone(),
        health_check_port: endpoint.health_check_port,
        disable_health_check: endpoint.disable_health_check,
        ..endpoint_at(address)
    }
}

fn of_family(mut found: Vec<SocketAddr>, family: DnsFamily) -> Vec<SocketAddr> {
    found.sort_unstable();
    found.dedup();
    let (v4, v6): (Vec<_>, Vec<_>) = found.into_iter().partition(SocketAddr::is_ipv4);
    match family {
        DnsFamily::V4Only => v4,
        DnsFamily::V6Only => v6,
        DnsFamily::All => v4.into_iter().chain(v6).collect(),
        DnsFamily::V4Preferred => {
            if v4.is_empty() {
                v6
            } else {
                v4
            }
        }
        DnsFamily::Auto => {
            if v6.is_empty() {
                v4
            } else {
                v6
            }
        }
    }
}

/// Whether endpoints of this kind come from the tables.
#[must_use]
pub fn comes_from_tables(discovery: &Discovery) -> bool {
    matches!(discovery, Discovery::Static(_) | Discovery::Eds { .. })
}
