//! Endpoints that are names: asked for again and again, and kept while the answer is missing.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use super::state::State;
use crate::xds::cluster::endpoint::{ClusterLoadAssignment, Endpoint, Health, LocalityEndpoints};
use crate::xds::cluster::{Cluster, Discovery, Dns, DnsFamily};
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

/// Resolves the names of a cluster whose endpoints come from DNS, for all workers, until the cluster is gone; unless
/// somebody does so already.
pub fn start(cluster: &Arc<Cluster>, state: &Arc<State>, tasks: &TaskTracker) {
    let (named, how, most) = match &cluster.discovery {
        Discovery::StrictDns(named, how) => (Arc::clone(named), *how, usize::MAX),
        Discovery::LogicalDns(named, how) => (Arc::clone(named), *how, 1),
        Discovery::Static(_) | Discovery::Eds { .. } | Discovery::OriginalDst(_) => return,
    };
    if !state.start_resolving() {
        return;
    }
    let (name, state) = (Arc::clone(&cluster.name), Arc::downgrade(state));
    tasks.spawn_local(async move {
        let (mut failures, mut rng) = (0, fastrand::Rng::new());
        while state.strong_count() > 0 {
            let resolved = resolve(&named, how, most).await;
            let Some(state) = state.upgrade() else { return };
            let pause = match resolved {
                Ok(endpoints) => {
                    failures = 0;
                    if state.resolved().is_none_or(|old| *old != endpoints) {
                        state.resolve(Arc::new(endpoints));
                    }
                    how.refresh
                }
                Err(error) => {
                    // the last answer stays: unknown is not empty; without one, nobody waits for it any longer
                    if failures == 0 {
                        tracing::warn!(cluster = %name, %error, "name not resolved");
                    }
                    if state.resolved().is_none() {
                        state.resolve(Arc::new(ClusterLoadAssignment::empty(&name)));
                    }
                    failures += 1;
                    after_failure(&how, failures, &mut rng)
                }
            };
            drop(state);
            tokio::time::sleep(pause).await;
        }
    });
}

/// The pause after so many failures in a row: without settings of its own the usual one, else a random share of a
/// time that doubles.
fn after_failure(how: &Dns, failures: u32, rng: &mut fastrand::Rng) -> Duration {
    let Some((base, max)) = how.failure_refresh else { return how.refresh };
    let factor = 1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
    let most = base.saturating_mul(factor).min(max);
    let least = Duration::from_millis(1);
    most.mul_f64(rng.f64()).max(least)
}

/// At most so many addresses of each name.
async fn resolve(
    named: &ClusterLoadAssignment,
    how: Dns,
    most: usize,
) -> std::io::Result<ClusterLoadAssignment> {
    let mut localities = Vec::new();
    for locality in &named.localities {
        let mut endpoints = Vec::new();
        for endpoint in &locality.endpoints {
            let Address::Name(name, port) = &endpoint.address else {
                endpoints.push(Arc::clone(endpoint));
                continue;
            };
            let found = tokio::net::lookup_host((&**name, *port)).await?;
            let mut addresses = of_family(found.collect(), how.family);
            addresses.truncate(most);
            addresses.sort_unstable(); // servers turn their answers round, which changes nothing
            for address in addresses {
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

/// The addresses that count, each once, in the order of the answer: the first one has a meaning.
fn of_family(mut found: Vec<SocketAddr>, family: DnsFamily) -> Vec<SocketAddr> {
    let mut seen = BTreeSet::new();
    found.retain(|address| seen.insert(*address));
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

/// Whether endpoints of this kind come from DNS.
#[must_use]
pub fn is_asked(discovery: &Discovery) -> bool {
    matches!(discovery, Discovery::StrictDns(..) | Discovery::LogicalDns(..))
}

/// Whether endpoints of this kind come from the tables.
#[must_use]
pub fn comes_from_tables(discovery: &Discovery) -> bool {
    matches!(discovery, Discovery::Static(_) | Discovery::Eds { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_keep_the_order_of_the_answer() {
        let found: Vec<SocketAddr> = ["10.0.0.2:1", "[::1]:1", "10.0.0.1:1", "10.0.0.2:1"]
            .iter()
            .map(|a| a.parse().unwrap())
            .collect();
        for (family, expected) in [
            (DnsFamily::V4Only, vec!["10.0.0.2:1", "10.0.0.1:1"]),
            (DnsFamily::Auto, vec!["[::1]:1"]),
            (DnsFamily::All, vec!["10.0.0.2:1", "10.0.0.1:1", "[::1]:1"]),
        ] {
            let got: Vec<String> = of_family(found.clone(), family).iter().map(ToString::to_string).collect();
            assert_eq!(got, expected, "{family:?}");
        }
    }

    #[test]
    fn failures_in_a_row_are_asked_again_more_and_more_slowly() {
        let (base, max) = (Duration::from_secs(2), Duration::from_secs(10));
        let refresh = Duration::from_secs(60);
        let how = Dns { refresh, failure_refresh: Some((base, max)), family: DnsFamily::All };
        let mut rng = fastrand::Rng::with_seed(1);
        for (failures, most) in [(1, 2), (2, 4), (3, 8), (4, 10), (60, 10)] {
            for _ in 0..100 {
                assert!(after_failure(&how, failures, &mut rng) <= Duration::from_secs(most), "{failures}");
            }
        }
        assert_eq!(after_failure(&Dns { failure_refresh: None, ..how }, 3, &mut rng), refresh);
    }
}
