//! Endpoints that are names: asked for again and again, and kept while the answer is missing. `client` asks name
//! servers where it matters how long their answers may be kept.

mod client;
mod message;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use super::state::State;
use crate::xds::cluster::endpoint::{ClusterLoadAssignment, Endpoint, Health, LocalityEndpoints};
use crate::xds::cluster::{Cluster, Discovery, Dns, DnsFamily};
use crate::xds::decode::{Address, Metadata};

const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";

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
        health_check_hostname: Box::default(),
        disable_health_check: false,
        tlvs: Box::default(),
    }
}

/// Resolves the names of a cluster whose endpoints come from DNS, for all workers, until the cluster is gone; unless
/// somebody does so already.
pub fn start(cluster: &Arc<Cluster>, state: &Arc<State>, tasks: &TaskTracker) {
    let (named, how, most) = match &cluster.discovery {
        Discovery::StrictDns(named, how) => (Arc::clone(named), how.clone(), usize::MAX),
        Discovery::LogicalDns(named, how) => (Arc::clone(named), how.clone(), 1),
        Discovery::Static(_) | Discovery::Eds { .. } | Discovery::OriginalDst(_) => return,
    };
    if !state.start_resolving() {
        return;
    }
    let (name, state) = (Arc::clone(&cluster.name), Arc::downgrade(state));
    tasks.spawn_local(async move {
        let (mut failures, mut rng) = (0, fastrand::Rng::new());
        while state.strong_count() > 0 {
            let resolved = resolve(&named, &how, most).await;
            let Some(state) = state.upgrade() else { return };
            let pause = match resolved {
                Ok((endpoints, ttl)) => {
                    failures = 0;
                    if state.resolved().is_none_or(|old| *old != endpoints) {
                        state.resolve(Arc::new(endpoints));
                    }
                    after_answer(&how, ttl, rng.f64())
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

/// The pause after an answer that may be kept for so long, if that is known and counts. `draw` is from 0 to 1.
fn after_answer(how: &Dns, ttl: Option<Duration>, draw: f64) -> Duration {
    // what may not be kept at all is asked for at the usual rate, as Envoy does
    let ttl = ttl.filter(|ttl| how.respect_ttl && !ttl.is_zero());
    ttl.unwrap_or(how.refresh) + how.jitter.mul_f64(draw)
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

/// The addresses of a name.
async fn addresses(name: &str, port: u16, how: &Dns) -> std::io::Result<(Vec<SocketAddr>, Option<Duration>)> {
    if how.respect_ttl || !how.servers.is_empty() {
        let asked = ask(name, how).await;
        let is_answer = !how.servers.is_empty() || asked.as_ref().is_ok_and(|(found, _)| !found.is_empty());
        if is_answer {
            let (found, ttl) = asked?;
            return Ok((found.into_iter().map(|ip| SocketAddr::new(ip, port)).collect(), ttl));
        }
    }
    // the system may ask others than name servers
    Ok((tokio::net::lookup_host((name, port)).await?.collect(), None))
}

async fn ask(name: &str, how: &Dns) -> std::io::Result<client::Found> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok((vec![address], None));
    }
    // both files may change at any time, and may be missing
    let hosts = tokio::fs::read_to_string(HOSTS).await.unwrap_or_default();
    let here = client::in_hosts(&hosts, name);
    if !here.is_empty() {
        return Ok((here, None));
    }
    let mut settings =
        client::Settings::parse(&tokio::fs::read_to_string(RESOLV_CONF).await.unwrap_or_default());
    if !how.servers.is_empty() {
        settings.servers = how.servers.to_vec();
    }
    client::lookup(&settings, name, how.family).await
}

/// At most so many addresses of each name, and how long they may be kept if that is known.
async fn resolve(
    named: &ClusterLoadAssignment,
    how: &Dns,
    most: usize,
) -> std::io::Result<(ClusterLoadAssignment, Option<Duration>)> {
    let (mut localities, mut least) = (Vec::new(), None);
    for locality in &named.localities {
        let mut endpoints = Vec::new();
        for endpoint in &locality.endpoints {
            let Address::Name(name, port) = &endpoint.address else {
                endpoints.push(Arc::clone(endpoint));
                continue;
            };
            let (found, ttl) = addresses(name, *port, how).await?;
            least = least.into_iter().chain(ttl).min();
            let mut addresses = of_family(found, how.family);
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
    let found = ClusterLoadAssignment {
        name: Arc::clone(&named.name),
        localities: localities.into(),
        overprovisioning_factor: named.overprovisioning_factor,
    };
    Ok((found, least))
}

fn at(endpoint: &Endpoint, name: &str, address: SocketAddr) -> Endpoint {
    let hostname = if endpoint.hostname.is_empty() { name.into() } else { endpoint.hostname.clone() };
    Endpoint {
        hostname,
        health: endpoint.health,
        weight: endpoint.weight,
        tlvs: endpoint.tlvs.clone(),
        metadata: endpoint.metadata.clone(),
        mesh_tls: endpoint.mesh_tls,
        workload: endpoint.workload.clone(),
        health_check_port: endpoint.health_check_port,
        health_check_hostname: endpoint.health_check_hostname.clone(),
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

    fn settings() -> Dns {
        Dns {
            refresh: Duration::from_secs(60),
            failure_refresh: None,
            family: DnsFamily::All,
            respect_ttl: false,
            jitter: Duration::ZERO,
            servers: Box::default(),
        }
    }

    #[test]
    fn an_answer_is_kept_as_long_as_it_says_where_that_counts() {
        let (usual, jitter) = (settings(), Duration::from_secs(4));
        let respects = Dns { respect_ttl: true, ..settings() };
        for (how, ttl, expected) in [
            (&usual, Some(5), 60),
            (&respects, Some(5), 5),
            (&respects, Some(0), 60),
            (&respects, None, 60),
            (&Dns { jitter, ..respects.clone() }, Some(5), 7),
        ] {
            let ttl = ttl.map(Duration::from_secs);
            assert_eq!(after_answer(how, ttl, 0.5), Duration::from_secs(expected), "{how:?} {ttl:?}");
        }
    }

    #[test]
    fn failures_in_a_row_are_asked_again_more_and_more_slowly() {
        let (base, max) = (Duration::from_secs(2), Duration::from_secs(10));
        let refresh = Duration::from_secs(60);
        let how = Dns { refresh, failure_refresh: Some((base, max)), ..settings() };
        let mut rng = fastrand::Rng::with_seed(1);
        for (failures, most) in [(1, 2), (2, 4), (3, 8), (4, 10), (60, 10)] {
            for _ in 0..100 {
                assert!(after_failure(&how, failures, &mut rng) <= Duration::from_secs(most), "{failures}");
            }
        }
        assert_eq!(after_failure(&Dns { failure_refresh: None, ..how }, 3, &mut rng), refresh);
    }
}
