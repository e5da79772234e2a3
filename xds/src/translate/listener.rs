//! Outbound listeners: where the application's calls enter the proxy.
//!
//! Captured, every call arrives at one port and its original destination chooses the listener, so that services
//! which share a port share a listener. In explicit mode each service has an address of its own, and nothing is shared.

pub(super) mod inspectors;
mod tcp;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::{Address, TrafficDirection};
use envoy_types::pb::envoy::config::listener::v3 as pb_listener;
use ipnet::IpNet;
use registry::model::service::{Protocol, Resolution, Service, ServicePort};

use self::tcp::Matching;
pub(super) use self::tcp::tcp_proxy;
use super::http::{self, Manager};
use super::route::Table;
use super::view::View;
use super::{names, pb};
use crate::proxy::Interception;

/// ALPN names that the HTTP inspector gives plain HTTP.
pub(super) const PLAIN_HTTP: &[&str] = &["http/1.0", "http/1.1", "h2c"];

/// The outbound listeners of a proxy, and the route configurations that they name.
pub(super) fn outbound(view: &View<'_>) -> (Vec<pb_listener::Listener>, BTreeSet<Table>) {
    match view.proxy.interception {
        Interception::Captured => captured(view),
        Interception::Explicit { .. } => explicit(view),
    }
}

/// What all listeners of a direction have in common.
pub(super) fn common(direction: TrafficDirection, view: &View<'_>) -> pb_listener::Listener {
    let timeout = view.mesh.protocol_detection_timeout().unwrap_or_default();
    pb_listener::Listener {
        traffic_direction: direction.into(),
        listener_filters_timeout: Some(pb::duration(timeout)),
        continue_on_listener_filters_timeout: true,
        ..Default::default()
    }
}

/// All addresses of the proxy's family.
pub(super) fn wildcard(view: &View<'_>, port: u16) -> Address {
    pb::socket_address(wildcard_host(view), port)
}

fn wildcard_host(view: &View<'_>) -> &'static str {
    let v4 = view.proxy.addresses.is_empty() || view.proxy.addresses.iter().any(IpAddr::is_ipv4);
    if v4 { "0.0.0.0" } else { "::" }
}

/// All addresses of the proxy's other family, when it has both.
pub(super) fn wildcard_besides(view: &View<'_>, port: u16) -> Vec<pb_listener::AdditionalAddress> {
    let both = [true, false].map(|v4| view.proxy.addresses.iter().any(|address| address.is_ipv4() == v4));
    let address = Some(pb::socket_address("::", port));
    both.iter()
        .all(|has| *has)
        .then(|| pb_listener::AdditionalAddress { address, ..Default::default() })
        .into_iter()
        .collect()
}

/// A chain that ends connections to `port` itself, which would otherwise go round in a circle.
pub(super) fn to_nowhere(name: &str, port: u16) -> pb_listener::FilterChain {
    pb_listener::FilterChain {
        name: name.to_owned(),
        filter_chain_match: Some(pb_listener::FilterChainMatch {
            destination_port: pb::u32v(port.into()),
            ..Default::default()
        }),
        filters: vec![tcp_proxy(names::BLACKHOLE, Vec::new())],
        ..Default::default()
    }
}

fn http_manager(view: &View<'_>, label: &str, table: &Table) -> pb_listener::Filter {
    http::manager(Manager {
        stat_prefix: format!("outbound_{label}"),
        inbound: false,
        routes: http::rds(&table.name()),
        first: Vec::new(),
        path_form: view.path_form(),
        access_log: &view.client_log,
    })
}

/// The chain of connections that turned out to be plain HTTP.
fn sniffed_http(view: &View<'_>, label: &str, table: &Table) -> pb_listener::FilterChain {
    pb_listener::FilterChain {
        filter_chain_match: Some(pb_listener::FilterChainMatch {
            transport_protocol: "raw_buffer".to_owned(),
            application_protocols: PLAIN_HTTP.iter().map(|&name| name.to_owned()).collect(),
            ..Default::default()
        }),
        filters: vec![http_manager(view, label, table)],
        ..Default::default()
    }
}

fn explicit(view: &View<'_>) -> (Vec<pb_listener::Listener>, BTreeSet<Table>) {
    let mut tables = BTreeSet::new();
    let mut out = Vec::new();
    for service in &view.services {
        // Without an original destination, a listener for these would call itself.
        if matches!(service.resolution, Resolution::None | Resolution::DynamicDns) {
            continue;
        }
        let Some(address) = names::explicit_address(view.proxy, service) else { continue };
        for port in service.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
            let name = format!("{address}_{}", port.number);
            let table = Table::Port(port.number);
            let (filter_chains, listener_filters) = explicit_chains(view, service, port, &name);
            if port.protocol.is_http() || port.protocol == Protocol::Auto {
                tables.insert(table);
            }
            out.push(pb_listener::Listener {
                address: Some(pb::socket_address(&address.to_string(), port.number)),
                filter_chains,
                listener_filters,
                name,
                ..common(TrafficDirection::Outbound, view)
            });
        }
    }
    (out, tables)
}

fn explicit_chains(
    view: &View<'_>,
    service: &Service,
    port: &ServicePort,
    label: &str,
) -> (Vec<pb_listener::FilterChain>, Vec<pb_listener::ListenerFilter>) {
    let table = Table::Port(port.number);
    if port.protocol.is_http() {
        let chain = pb_listener::FilterChain {
            filters: vec![http_manager(view, label, &table)],
            ..Default::default()
        };
        return (vec![chain], Vec::new());
    }
    let bytes = tcp::chains(view, service, port, &Matching::default());
    if port.protocol == Protocol::Auto {
        let mut chains = vec![sniffed_http(view, label, &table)];
        chains.extend(bytes);
        return (chains, vec![inspectors::tls(None), inspectors::http(None)]);
    }
    let by_name = bytes.iter().any(has_server_names);
    (bytes, by_name.then(|| inspectors::tls(None)).into_iter().collect())
}

fn has_server_names(chain: &pb_listener::FilterChain) -> bool {
    chain.filter_chain_match.as_ref().is_some_and(|m| !m.server_names.is_empty())
}

/// A captured listener while services are added to it.
#[derive(Default)]
struct Shared {
    /// Routes of what turns out to be HTTP.
    http: Option<Table>,
    /// Chains of everything else, first come first served.
    bytes: Vec<pb_listener::FilterChain>,
}

/// Where a captured listener is bound, in the order in which listeners are sent.
type Key = (String, u16);

fn captured(view: &View<'_>) -> (Vec<pb_listener::Listener>, BTreeSet<Table>) {
    let own = [view.mesh.outbound_port(), view.mesh.inbound_port()];
    let mut shared: BTreeMap<Key, Shared> = BTreeMap::new();
    for service in &view.services {
        for port in service.ports.iter().filter(|p| p.protocol != Protocol::Udp && !own.contains(&p.number)) {
            if port.protocol.is_http() {
                let key = (wildcard_host(view).to_owned(), port.number);
                shared.entry(key).or_default().http = Some(Table::Port(port.number));
            } else {
                add_bytes(view, &mut shared, service, port);
            }
        }
    }
    let tables = shared.values().filter_map(|listener| listener.http.clone()).collect();
    let mut out = vec![virtual_outbound(view)];
    out.extend(shared.into_iter().map(|(key, parts)| captured_listener(view, key, parts)));
    (out, tables)
}

/// Adds a port that is not, or may not be, HTTP: bound to the service's addresses, or to all when it has none, where
/// address blocks and server names tell services apart.
fn add_bytes(view: &View<'_>, shared: &mut BTreeMap<Key, Shared>, service: &Service, port: &ServicePort) {
    let addresses = reachable(view, names::service_addresses(service));
    let (single, blocks): (Vec<IpNet>, Vec<IpNet>) =
        addresses.into_iter().partition(|net| net.prefix_len() == net.max_prefix_len());
    for address in &single {
        let listener = shared.entry((address.addr().to_string(), port.number)).or_default();
        if !listener.bytes.is_empty() {
            continue; // an older service has this address and port
        }
        listener.bytes = tcp::chains(view, service, port, &Matching::default());
        if port.protocol == Protocol::Auto {
            listener.http = Some(Table::Service(service.hostname.clone(), port.number));
        }
    }
    if blocks.is_empty() && !single.is_empty() {
        return;
    }
    let server_names = if port.protocol.is_tls() { vec![service.hostname.clone()] } else { Vec::new() };
    let base = Matching { destinations: blocks, server_names };
    let listener = shared.entry((wildcard_host(view).to_owned(), port.number)).or_default();
    listener.bytes.extend(tcp::chains(view, service, port, &base));
    if port.protocol == Protocol::Auto {
        listener.http = Some(Table::Port(port.number));
    }
}

/// The addresses of the proxy's own families.
fn reachable(view: &View<'_>, addresses: Vec<IpNet>) -> Vec<IpNet> {
    let has = |v6: bool| view.proxy.addresses.iter().any(|address| address.is_ipv6() == v6);
    addresses.into_iter().filter(|net| has(net.addr().is_ipv6())).collect()
}

fn captured_listener(view: &View<'_>, (host, port): Key, parts: Shared) -> pb_listener::Listener {
    let name = format!("{host}_{port}");
    let on_wildcard = host == wildcard_host(view);
    let bytes = tcp::distinct(parts.bytes);
    let needs_tls = parts.http.is_some() || bytes.iter().any(has_server_names);
    let mut listener_filters = Vec::new();
    if needs_tls {
        listener_filters.push(inspectors::tls(None));
    }
    if parts.http.is_some() {
        listener_filters.push(inspectors::http(None));
    }
    let open = bytes.iter().all(|chain| chain.filter_chain_match.is_some());
    let mut filter_chains: Vec<pb_listener::FilterChain> =
        parts.http.iter().map(|table| sniffed_http(view, &name, table)).collect();
    filter_chains.extend(bytes);
    pb_listener::Listener {
        address: Some(pb::socket_address(&host, port)),
        additional_addresses: if on_wildcard { wildcard_besides(view, port) } else { Vec::new() },
        filter_chains,
        default_filter_chain: (open && on_wildcard).then(|| fallback(view, "PassthroughFilterChain")),
        listener_filters,
        bind_to_port: pb::boolv(false),
        name,
        ..common(TrafficDirection::Outbound, view)
    }
}

/// To wherever the client wanted, if that is allowed.
fn fallback(view: &View<'_>, name: &str) -> pb_listener::FilterChain {
    let cluster = if view.allow_any { names::PASSTHROUGH } else { names::BLACKHOLE };
    pb_listener::FilterChain {
        name: name.to_owned(),
        filters: vec![tcp_proxy(cluster, view.client_log.clone())],
        ..Default::default()
    }
}

fn virtual_outbound(view: &View<'_>) -> pb_listener::Listener {
    let port = view.mesh.outbound_port();
    pb_listener::Listener {
        name: names::VIRTUAL_OUTBOUND.to_owned(),
        address: Some(wildcard(view, port)),
        additional_addresses: wildcard_besides(view, port),
        use_original_dst: pb::boolv(true),
        filter_chains: vec![
            to_nowhere("virtualOutbound-trap", port),
            fallback(view, "virtualOutbound-catchall-tcp"),
        ],
        traffic_direction: TrafficDirection::Outbound.into(),
        ..Default::default()
    }
}
