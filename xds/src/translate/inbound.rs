//! Listeners in front of the application: who may connect, over what, and what is asked of each request.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3 as pb_listener;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use registry::config::Object;
use registry::model::security::MutualTlsMode;
use registry::model::service::{Location, Protocol, Resolution, Service, ServicePort, SourceId};
use registry::model::traffic::{ConnectionPoolSettings, Sidecar};
use registry::snapshot::PeerPolicy;

use super::http::{self, Manager};
use super::listener::{self, inspectors};
use super::tls::{self, Alpn};
use super::view::{self, View};
use super::{authz, jwt, names, pb, route};
use crate::proxy::Interception;

/// ALPN of mesh connections that carry HTTP.
const MESH_HTTP: &[&str] = &["istio-http/1.0", "istio-http/1.1", "istio-h2"];
/// ALPN of mesh connections that carry anything.
const MESH_TCP: &[&str] = &["istio", "istio-peer-exchange"];

/// A port that the application serves.
#[derive(Debug, Clone)]
pub(super) struct InboundPort {
    /// The service through which it is called.
    pub(super) service: Arc<Service>,
    /// That service's port.
    pub(super) port: ServicePort,
    /// The application's port.
    pub(super) workload_port: u16,
    /// Where the application listens, when a Sidecar says so.
    pub(super) endpoint: Option<ApplicationEndpoint>,
    /// The connection pool that a Sidecar gives to this port.
    pub(super) pool: Option<ConnectionPoolSettings>,
}

/// Where an application listens (Istio `Sidecar`, `ingress.defaultEndpoint`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ApplicationEndpoint {
    /// On loopback.
    Loopback(u16),
    /// On the workload's own address.
    Own(u16),
    /// On a Unix socket.
    Socket(String),
}

impl ApplicationEndpoint {
    fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix://") {
            return Some(Self::Socket(path.to_owned()));
        }
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok()?;
        match host {
            "0.0.0.0" | "[::]" => Some(Self::Own(port)),
            _ => Some(Self::Loopback(port)),
        }
    }
}

/// The ports that a Sidecar's ingress listens for, under the name of the service in front, if there is one.
pub(super) fn ingress_ports(
    object: &Object,
    sidecar: &Sidecar,
    served: &[(Arc<Service>, ServicePort, u16)],
) -> Vec<InboundPort> {
    let of = |number: u16| served.iter().find(|(_, port, own)| port.number == number || *own == number);
    sidecar
        .ingress
        .iter()
        .filter_map(|listener| {
            let port = listener.port.as_ref()?;
            let service = match of(port.number).or(served.first()) {
                Some((service, ..)) => Arc::clone(service),
                None => Arc::new(nameless(object)),
            };
            Some(InboundPort {
                service,
                port: ServicePort {
                    name: port.name.clone(),
                    number: port.number,
                    target_port: None,
                    protocol: Protocol::parse(&port.name, Some(&port.protocol), port.number),
                },
                workload_port: port.number,
                endpoint: ApplicationEndpoint::parse(&listener.default_endpoint),
                pool: listener.connection_pool.clone(),
            })
        })
        .collect()
}

/// What stands for the service of a workload that has none.
fn nameless(object: &Object) -> Service {
    Service {
        hostname: format!("{}.{}", object.name, object.namespace),
        name: object.name.clone(),
        namespace: object.namespace.clone(),
        ports: Vec::new(),
        addresses: Vec::new(),
        vip_index: 0,
        resolution: Resolution::Static,
        location: Location::Internal,
        export_to: vec!["~".to_owned()],
        subject_alt_names: Vec::new(),
        labels: std::collections::BTreeMap::new(),
        created: object.created,
        source: SourceId::Config,
    }
}

/// What a port carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carries {
    Http,
    Tcp,
    /// The first bytes will tell.
    Either,
}

impl Carries {
    fn of(protocol: Protocol) -> Self {
        if protocol.is_http() {
            Self::Http
        } else if protocol == Protocol::Auto {
            Self::Either
        } else {
            Self::Tcp
        }
    }
}

/// Which connections a chain takes, and what it makes of them.
#[derive(Debug, Clone, Copy)]
struct Shape {
    http: bool,
    mtls: bool,
    transport: &'static str,
    protocols: &'static [&'static [&'static str]],
}

const TLS: &str = "tls";
const RAW: &str = "raw_buffer";

/// The chains of a port, given what it carries and what it accepts.
fn shapes(mode: MutualTlsMode, carries: Carries) -> Vec<Shape> {
    let http = |mtls, transport, protocols| Shape { http: true, mtls, transport, protocols };
    let tcp = |mtls, transport, protocols| Shape { http: false, mtls, transport, protocols };
    match (mode, carries) {
        (MutualTlsMode::Strict, Carries::Http) => vec![http(true, TLS, &[])],
        (MutualTlsMode::Strict, Carries::Tcp) => vec![tcp(true, TLS, &[])],
        (MutualTlsMode::Strict, Carries::Either) => {
            vec![http(true, TLS, &[MESH_HTTP]), tcp(true, TLS, &[])]
        }
        (MutualTlsMode::Disable, Carries::Http) => vec![http(false, "", &[])],
        (MutualTlsMode::Disable, Carries::Tcp) => vec![tcp(false, "", &[])],
        (MutualTlsMode::Disable, Carries::Either) => {
            vec![http(false, RAW, &[listener::PLAIN_HTTP]), tcp(false, "", &[])]
        }
        (MutualTlsMode::Permissive | MutualTlsMode::Unset, Carries::Http) => {
            vec![http(true, TLS, &[MESH_HTTP, MESH_TCP]), http(false, RAW, &[])]
        }
        (MutualTlsMode::Permissive | MutualTlsMode::Unset, Carries::Tcp) => {
            vec![tcp(true, TLS, &[MESH_HTTP, MESH_TCP]), tcp(false, TLS, &[]), tcp(false, RAW, &[])]
        }
        (MutualTlsMode::Permissive | MutualTlsMode::Unset, Carries::Either) => vec![
            http(true, TLS, &[MESH_HTTP]),
            http(false, RAW, &[listener::PLAIN_HTTP]),
            tcp(true, TLS, &[MESH_TCP]),
            tcp(false, TLS, &[]),
            tcp(false, RAW, &[]),
        ],
    }
}

/// What every inbound chain of a proxy shares.
struct Guard {
    http: Vec<HttpFilter>,
    network: Vec<pb_listener::Filter>,
    trust_domains: Vec<String>,
    peers: PeerPolicy,
}

impl Guard {
    fn new(view: &View<'_>) -> Self {
        let (found, tokens) = (view.authorization_policies(), view.request_authentications());
        let (policies, rules) = (view::policies(&found), view::jwt_rules(&tokens));
        let trust_domains = view.trust_domains();
        let mut http: Vec<HttpFilter> = jwt::filter(&rules).into_iter().collect();
        http.extend(authz::http_filters(&policies, &trust_domains));
        let network = authz::network_filters(&policies, &trust_domains);
        Self { http, network, trust_domains, peers: view.peer_policy() }
    }
}

/// One set of chains: towards one cluster of the application.
struct Destination<'a> {
    /// Names chains and statistics.
    label: String,
    cluster: String,
    /// The service's host, for telemetry; empty for undeclared ports.
    host: &'a str,
    /// Port of the workload; none for all that are not declared.
    port: Option<u16>,
    carries: Carries,
    protocol: Protocol,
}

/// The inbound listeners of a proxy.
pub(super) fn listeners(view: &View<'_>, ports: &[InboundPort]) -> Vec<pb_listener::Listener> {
    let guard = Guard::new(view);
    match view.proxy.interception {
        Interception::Captured => vec![virtual_inbound(view, ports, &guard)],
        Interception::Explicit { .. } => view
            .proxy
            .addresses
            .iter()
            .flat_map(|address| ports.iter().map(move |port| (address.to_string(), port)))
            .map(|(address, port)| explicit(view, &address, port, &guard))
            .collect(),
    }
}

fn explicit(view: &View<'_>, address: &str, port: &InboundPort, guard: &Guard) -> pb_listener::Listener {
    let name = format!("{address}_{}", port.workload_port);
    let destination = Destination { label: name.clone(), ..declared(port) };
    let mode = guard.peers.mode_of(port.workload_port);
    let mut filters = Vec::new();
    if mode != MutualTlsMode::Disable || destination.carries == Carries::Either {
        filters.push(inspectors::tls(None));
    }
    if destination.carries == Carries::Either {
        filters.push(inspectors::http(None));
    }
    pb_listener::Listener {
        address: Some(pb::socket_address(address, port.workload_port)),
        filter_chains: chains(view, &destination, mode, guard, false),
        listener_filters: filters,
        name,
        ..listener::common(TrafficDirection::Inbound, view)
    }
}

fn declared(port: &InboundPort) -> Destination<'_> {
    Destination {
        label: format!("0.0.0.0_{}", port.workload_port),
        cluster: names::inbound_cluster(port.workload_port),
        host: &port.service.hostname,
        port: Some(port.workload_port),
        carries: Carries::of(port.port.protocol),
        protocol: port.port.protocol,
    }
}

fn undeclared(port: Option<u16>) -> Destination<'static> {
    Destination {
        label: port.map_or_else(|| names::VIRTUAL_INBOUND.to_owned(), |port| format!("0.0.0.0_{port}")),
        cluster: names::INBOUND_PASSTHROUGH.to_owned(),
        host: "",
        port,
        carries: Carries::Either,
        protocol: Protocol::Auto,
    }
}

/// The listener of all captured connections: declared ports, ports of which only a policy knows, then the others.
fn virtual_inbound(view: &View<'_>, ports: &[InboundPort], guard: &Guard) -> pb_listener::Listener {
    let own_port = view.mesh.inbound_port();
    let declares = |port: u16| ports.iter().any(|p| p.workload_port == port);
    let mut destinations: Vec<Destination<'_>> =
        ports.iter().filter(|port| port.workload_port != own_port).map(declared).collect();
    destinations.extend(
        guard
            .peers
            .port_level
            .keys()
            .copied()
            .filter(|p| !declares(*p) && *p != own_port)
            .map(|p| undeclared(Some(p))),
    );
    let mut filter_chains = vec![listener::to_nowhere("virtualInbound-blackhole", own_port)];
    for destination in &destinations {
        let mode = destination.port.map_or(guard.peers.mode, |port| guard.peers.mode_of(port));
        filter_chains.extend(chains(view, destination, mode, guard, true));
    }
    filter_chains.extend(chains(view, &undeclared(None), guard.peers.mode, guard, true));
    // Servers that speak first hang when their client is waited for, so what needs no inspection gets none.
    let known = destinations.iter().filter(|d| d.carries != Carries::Either).filter_map(|d| d.port).collect();
    let plain = destinations
        .iter()
        .filter(|d| d.carries != Carries::Either)
        .filter_map(|d| d.port)
        .filter(|port| guard.peers.mode_of(*port) == MutualTlsMode::Disable)
        .collect();
    pb_listener::Listener {
        name: names::VIRTUAL_INBOUND.to_owned(),
        address: Some(listener::wildcard(view, own_port)),
        additional_addresses: listener::wildcard_besides(view, own_port),
        filter_chains,
        listener_filters: vec![
            inspectors::original_destination(),
            inspectors::tls(inspectors::not_on(plain)),
            inspectors::http(inspectors::not_on(known)),
        ],
        ..listener::common(TrafficDirection::Inbound, view)
    }
}

fn chains(
    view: &View<'_>,
    destination: &Destination<'_>,
    mode: MutualTlsMode,
    guard: &Guard,
    shared: bool,
) -> Vec<pb_listener::FilterChain> {
    shapes(mode, destination.carries)
        .into_iter()
        .map(|shape| {
            let alpn = if shape.http { Alpn::Http2 } else { Alpn::Tcp };
            pb_listener::FilterChain {
                name: destination.label.clone(),
                filter_chain_match: chain_match(shape, destination.port.filter(|_| shared)),
                filters: filters(view, destination, shape, guard),
                transport_socket: shape
                    .mtls
                    .then(|| tls::downstream_mesh(alpn, view.mesh_tls(), &guard.trust_domains)),
                ..Default::default()
            }
        })
        .collect()
}

fn chain_match(shape: Shape, port: Option<u16>) -> Option<pb_listener::FilterChainMatch> {
    if shape.transport.is_empty() && port.is_none() {
        return None;
    }
    Some(pb_listener::FilterChainMatch {
        destination_port: port.and_then(|port| pb::u32v(port.into())),
        transport_protocol: shape.transport.to_owned(),
        application_protocols: shape.protocols.concat().into_iter().map(str::to_owned).collect(),
        ..Default::default()
    })
}

fn filters(
    view: &View<'_>,
    destination: &Destination<'_>,
    shape: Shape,
    guard: &Guard,
) -> Vec<pb_listener::Filter> {
    if !shape.http {
        let mut filters = guard.network.clone();
        filters.push(listener::tcp_proxy(&destination.cluster, view.server_log.clone()));
        return filters;
    }
    let port = destination.port.unwrap_or_default();
    let grpc = matches!(destination.protocol, Protocol::Grpc | Protocol::GrpcWeb);
    let routes = route::inbound(view, &destination.cluster, destination.host, port, grpc);
    let mut first = guard.http.clone();
    first.extend((destination.protocol == Protocol::GrpcWeb).then(http::grpc_web));
    vec![http::manager(Manager {
        stat_prefix: format!("inbound_{}", destination.label),
        inbound: true,
        routes: http::inline(routes),
        first,
        path_form: view.path_form(),
        access_log: &view.server_log,
    })]
}
