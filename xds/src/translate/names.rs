//! Names and addresses that proxies, dashboards and filters rely on: Istio's, letter for letter.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use registry::model::service::{Endpoint, Resolution, Service};

use crate::proxy::{Interception, Proxy};

/// Where traffic to unknown destinations goes when it is allowed.
pub const PASSTHROUGH: &str = "PassthroughCluster";
/// Where traffic goes that must not go anywhere.
pub const BLACKHOLE: &str = "BlackHoleCluster";
/// Where captured traffic to undeclared ports of the workload goes.
pub const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";
/// The listener that receives captured outgoing connections.
pub const VIRTUAL_OUTBOUND: &str = "virtualOutbound";
/// The listener that receives captured incoming connections.
pub const VIRTUAL_INBOUND: &str = "virtualInbound";
/// Port of [`VIRTUAL_OUTBOUND`].
pub const OUTBOUND_PORT: u16 = 15001;
/// Port of [`VIRTUAL_INBOUND`].
pub const INBOUND_PORT: u16 = 15006;

/// First of the loopback block's addresses that stand for services; those below are the workload's own.
const FIRST_SERVICE: u32 = 256;

/// Name of the cluster towards one port (and subset) of a host.
#[must_use]
pub fn outbound_cluster(port: u16, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// Name of the cluster towards the application behind this proxy.
#[must_use]
pub fn inbound_cluster(port: u16) -> String {
    format!("inbound|{port}||")
}

/// Server name that one proxy sends to another.
#[must_use]
pub fn sni(port: u16, subset: &str, host: &str) -> String {
    format!("outbound_.{port}_.{subset}_.{host}")
}

/// The parts of an outbound cluster's name: port, subset, host.
#[must_use]
pub fn parse_outbound_cluster(name: &str) -> Option<(u16, &str, &str)> {
    let mut parts = name.strip_prefix("outbound|")?.splitn(3, '|');
    Some((parts.next()?.parse().ok()?, parts.next()?, parts.next()?))
}

/// The addresses clients use for a service: those it declares, else the automatic ones.
///
/// Source: Istio, "ServiceEntry address allocation".
#[must_use]
pub fn service_addresses(service: &Service) -> Vec<IpNet> {
    let declared: Vec<IpNet> =
        service.addresses.iter().filter_map(|address| super::pb::parse_net(address)).collect();
    if declared.is_empty() && allocates(service) { automatic_addresses(service.vip_index) } else { declared }
}

fn allocates(service: &Service) -> bool {
    service.resolution != Resolution::None
        && !service.hostname.starts_with('*')
        && service.labels.get("networking.istio.io/enable-autoallocate-ip").is_none_or(|v| v != "false")
}

/// 240.240.0.0/16 and 2001:2::/48, counted from one. An index beyond the IPv4 range has no address there.
fn automatic_addresses(index: u32) -> Vec<IpNet> {
    let number = index.saturating_add(1);
    let v4 = (number < 0xffff)
        .then(|| IpNet::from(IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(240, 240, 0, 0)) + number))));
    let base = u128::from(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0));
    let v6 = IpNet::from(IpAddr::V6(Ipv6Addr::from(base + u128::from(number))));
    v4.into_iter().chain([v6]).collect()
}

/// The loopback address at which this proxy's application reaches the service, in explicit mode.
#[must_use]
pub fn explicit_address(proxy: &Proxy, service: &Service) -> Option<Ipv4Addr> {
    let Interception::Explicit { base, prefix } = proxy.interception else { return None };
    block_address(base, prefix, service.vip_index)
}

/// The address of the service with this index in a loopback block, when the block has room for it.
#[must_use]
pub fn block_address(base: Ipv4Addr, prefix: u8, vip_index: u32) -> Option<Ipv4Addr> {
    let size = 1_u32.checked_shl(32_u32.saturating_sub(prefix.into()))?;
    let offset = FIRST_SERVICE.checked_add(vip_index)?;
    (offset < size).then(|| Ipv4Addr::from(u32::from(base).saturating_add(offset)))
}

/// Every name and address under which a client in `namespace` may call a service over HTTP.
///
/// Hosts of the mesh's own domain have their Kubernetes short forms, relative to the client's namespace.
#[must_use]
pub fn domains(host: &str, namespace: &str, domain_suffix: &str) -> Vec<String> {
    let mut out = vec![host.to_owned()];
    let Some(short) = host.strip_suffix(domain_suffix).and_then(|rest| rest.strip_suffix(".svc.")) else {
        return out;
    };
    let mut parts = short.rsplitn(2, '.');
    if let (Some(service_namespace), Some(name)) = (parts.next(), parts.next()) {
        if service_namespace == namespace && !name.starts_with('*') {
            out.push(name.to_owned());
        }
        out.push(short.to_owned());
        out.push(format!("{short}.svc"));
    }
    out
}

/// The workload's canonical service name, for telemetry (Istio, "Canonical Service").
#[must_use]
pub fn canonical_name<'a>(labels: &'a BTreeMap<String, String>, workload: &'a str) -> &'a str {
    first_label(labels, &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
        .unwrap_or(workload)
}

/// The workload's canonical revision, for telemetry.
#[must_use]
pub fn canonical_revision(labels: &BTreeMap<String, String>) -> &str {
    first_label(labels, &["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
        .unwrap_or("latest")
}

fn first_label<'a>(labels: &'a BTreeMap<String, String>, keys: &[&str]) -> Option<&'a str> {
    keys.iter().find_map(|key| labels.get(*key)).map(String::as_str).filter(|value| !value.is_empty())
}

/// The port on which an endpoint serves a port of its service.
#[must_use]
pub fn endpoint_port(endpoint: &Endpoint, port: &registry::model::service::ServicePort) -> u16 {
    endpoint.ports.get(&port.name).copied().or(port.target_port).unwrap_or(port.number)
}

/// Whether `pattern` (a host, or a wildcard with a leading `*`) covers the whole of `host`.
#[must_use]
pub fn covers(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        None => pattern == host,
        Some(tail) => {
            let inner = host.strip_prefix('*').unwrap_or(host);
            inner.ends_with(tail) && (host.starts_with('*') || host.len() > tail.len() || tail.is_empty())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_relative_to_the_clients_namespace() {
        let of = |namespace| domains("reviews.default.svc.cluster.local", namespace, "cluster.local");
        let full = "reviews.default.svc.cluster.local";
        assert_eq!(of("default"), [full, "reviews", "reviews.default", "reviews.default.svc"]);
        assert_eq!(of("shop"), [full, "reviews.default", "reviews.default.svc"]);
        assert_eq!(domains("api.example.com", "default", "cluster.local"), ["api.example.com"]);
    }

    #[test]
    fn wildcards_cover_subdomains_only() {
        assert!(covers("*.foo.com", "a.foo.com"));
        assert!(!covers("*.foo.com", "foo.com"));
        assert!(covers("*", "anything"));
        assert!(covers("*.com", "*.foo.com"));
        assert!(!covers("*.foo.com", "*.com"));
    }

    #[test]
    fn automatic_addresses_do_not_repeat_and_stay_in_their_range() {
        let last = automatic_addresses(65_533);
        assert_eq!(last.first().map(ToString::to_string).as_deref(), Some("240.240.255.254/32"));
        assert_eq!(automatic_addresses(70_000).len(), 1);
    }

    #[test]
    fn cluster_names_parse_back() {
        assert_eq!(parse_outbound_cluster("outbound|80|v1|a.b"), Some((80, "v1", "a.b")));
        assert_eq!(parse_outbound_cluster("inbound|80||"), None);
    }
}
