//! Clusters towards the application behind the proxy.

use std::net::SocketAddr;

use envoy_types::pb::envoy::config::cluster::v3 as pb_cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb_endpoint;
use registry::model::mesh::InboundTrafficPolicyMode;

use super::super::inbound::{ApplicationEndpoint, InboundPort};
use super::super::view::View;
use super::super::{names, pb};
use super::settings::{self, AutoSni, Upstream};
use crate::proxy::Interception;

/// Source address of connections to the application, which capture leaves alone.
const LOOP_BREAKER_V4: &str = "127.0.0.6";
const LOOP_BREAKER_V6: &str = "::6";

/// The cluster for one port of the application.
pub(in crate::translate) fn application(view: &View<'_>, port: &InboundPort) -> pb_cluster::Cluster {
    let name = names::inbound_cluster(port.workload_port);
    let mut cluster = match destination(view, port) {
        Some(address) => fixed(name, address),
        None => original(view, name),
    };
    let pool = view.inbound_connection_pool(port);
    settings::connection_pool(&mut cluster, pool, None, view.mesh);
    // A policy's time to connect is about the network, not about the way to one's own application.
    cluster.connect_timeout = Some(pb::duration(view.mesh.connect_timeout()));
    let upstream = settings::upstream(port.port.protocol, None, view.mesh_without_upgrade());
    settings::http_options(&mut cluster, upstream, pool, AutoSni::default());
    let of_service = pb::structure([
        ("host", pb::text(&port.service.hostname)),
        ("name", pb::text(&port.service.name)),
        ("namespace", pb::text(&port.service.namespace)),
    ]);
    cluster.metadata = Some(pb::metadata([(
        "istio",
        pb::structure([("services", pb::list(vec![pb::nested(of_service)]))]),
    )]));
    cluster
}

/// The cluster for captured connections to ports that no service declares.
pub(in crate::translate) fn passthrough(view: &View<'_>) -> pb_cluster::Cluster {
    let mut cluster = original(view, names::INBOUND_PASSTHROUGH.to_owned());
    settings::connection_pool(&mut cluster, None, None, view.mesh);
    settings::http_options(&mut cluster, Upstream::AsClient, None, AutoSni::default());
    cluster
}

/// Where the application listens, when that is not the connection's own destination.
fn destination(view: &View<'_>, port: &InboundPort) -> Option<core::Address> {
    if let Some(target) = view.proxy.inbound_forward.get(&port.workload_port) {
        return forwarded(target);
    }
    let local = |port| pb::socket_address("127.0.0.1", port);
    match &port.endpoint {
        Some(ApplicationEndpoint::Loopback(port)) => return Some(local(*port)),
        Some(ApplicationEndpoint::Own(port)) => {
            return view.proxy.addresses.first().map(|own| pb::socket_address(&own.to_string(), *port));
        }
        Some(ApplicationEndpoint::Socket(path)) => return Some(pb::pipe(path)),
        None => {}
    }
    match (&view.proxy.interception, view.mesh.inbound_traffic_mode()) {
        (Interception::Explicit { .. }, _) | (_, InboundTrafficPolicyMode::Localhost) => {
            Some(local(port.workload_port))
        }
        (Interception::Captured, InboundTrafficPolicyMode::Passthrough) => None,
    }
}

fn forwarded(target: &str) -> Option<core::Address> {
    if let Some(path) = target.strip_prefix("unix://") {
        return Some(pb::pipe(path));
    }
    let address: SocketAddr = target.parse().ok()?;
    Some(pb::socket_address(&address.ip().to_string(), address.port()))
}

fn fixed(name: String, address: core::Address) -> pb_cluster::Cluster {
    let endpoint = pb_endpoint::LbEndpoint {
        host_identifier: Some(pb_endpoint::lb_endpoint::HostIdentifier::Endpoint(pb_endpoint::Endpoint {
            address: Some(address),
            ..Default::default()
        })),
        ..Default::default()
    };
    pb_cluster::Cluster {
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        load_assignment: Some(pb_endpoint::ClusterLoadAssignment {
            cluster_name: name.clone(),
            endpoints: vec![pb_endpoint::LocalityLbEndpoints {
                lb_endpoints: vec![endpoint],
                ..Default::default()
            }],
            ..Default::default()
        }),
        name,
        ..Default::default()
    }
}

fn original(view: &View<'_>, name: String) -> pb_cluster::Cluster {
    pb_cluster::Cluster {
        name,
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())),
        lb_policy: LbPolicy::ClusterProvided.into(),
        upstream_bind_config: Some(bind(view)),
        ..Default::default()
    }
}

fn bind(view: &View<'_>) -> core::BindConfig {
    let source = |address: &str| core::SocketAddress {
        address: address.to_owned(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(0)),
        ..Default::default()
    };
    let has = |v6: bool| view.proxy.addresses.iter().any(|address| address.is_ipv6() == v6);
    let only_v6 = has(true) && !has(false);
    core::BindConfig {
        source_address: Some(source(if only_v6 { LOOP_BREAKER_V6 } else { LOOP_BREAKER_V4 })),
        extra_source_addresses: (has(true) && has(false))
            .then(|| core::ExtraSourceAddress {
                address: Some(source(LOOP_BREAKER_V6)),
                ..Default::default()
            })
            .into_iter()
            .collect(),
        ..Default::default()
    }
}
