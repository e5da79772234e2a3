//! Endpoints of a cluster: who serves a port, where it runs, and how it may be reached.

mod locality;

use std::collections::BTreeMap;
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb_endpoint;
use envoy_types::pb::google::protobuf::Struct;
use registry::model::service::{Endpoint, Health, ServicePort, TlsMode};

pub(super) use locality::{Spread, covers};

use super::{names, pb};
use crate::proxy::Proxy;

/// Filter name of the metadata by which a cluster chooses a transport socket per endpoint.
pub(super) const SOCKET_MATCH: &str = "envoy.transport_socket_match";

/// Everything that the endpoints of one cluster depend on.
pub(super) struct Inputs<'a> {
    /// Name of the cluster.
    pub(super) cluster: &'a str,
    /// The service's port.
    pub(super) port: &'a ServicePort,
    /// All endpoints of the service.
    pub(super) endpoints: &'a [Endpoint],
    /// Labels an endpoint must have (those of the subset).
    pub(super) labels: &'a BTreeMap<String, String>,
    /// How load is spread over localities.
    pub(super) spread: Spread<'a>,
    /// Whether endpoints that do not serve are told to the proxy, marked as such, for its panic threshold.
    pub(super) unhealthy: bool,
    /// Whether names are allowed as addresses (the cluster resolves them).
    pub(super) resolves: bool,
    /// Whether an endpoint is to be reached by mTLS.
    pub(super) mtls: &'a dyn Fn(&Endpoint, u16) -> bool,
}

/// One endpoint of a load assignment, with what decides about its group.
pub(super) struct Member<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) lb: pb_endpoint::LbEndpoint,
}

/// The load assignment of a cluster: localities in order, in each the endpoints in the order of the snapshot.
pub(super) fn load_assignment(inputs: &Inputs<'_>, proxy: &Proxy) -> pb_endpoint::ClusterLoadAssignment {
    let members: Vec<Member<'_>> = inputs
        .endpoints
        .iter()
        .filter(|e| selected(e, inputs))
        .filter_map(|e| Some(Member { endpoint: e, lb: lb_endpoint(e, inputs)? }))
        .collect();
    pb_endpoint::ClusterLoadAssignment {
        cluster_name: inputs.cluster.to_owned(),
        endpoints: locality::groups(members, &inputs.spread, proxy),
        ..Default::default()
    }
}

fn selected(endpoint: &Endpoint, inputs: &Inputs<'_>) -> bool {
    let serves = match endpoint.health {
        Health::Healthy => true,
        Health::Unhealthy => inputs.unhealthy,
        Health::Draining => false,
    };
    serves && inputs.labels.iter().all(|(k, v)| endpoint.labels.get(k) == Some(v))
}

fn lb_endpoint(endpoint: &Endpoint, inputs: &Inputs<'_>) -> Option<pb_endpoint::LbEndpoint> {
    let port = names::endpoint_port(endpoint, inputs.port);
    let address = address(&endpoint.address, port, inputs.resolves)?;
    let status = match endpoint.health {
        Health::Healthy => core::HealthStatus::Healthy,
        Health::Unhealthy => core::HealthStatus::Unhealthy,
        Health::Draining => core::HealthStatus::Draining,
    };
    Some(pb_endpoint::LbEndpoint {
        health_status: status.into(),
        metadata: Some(metadata(endpoint, (inputs.mtls)(endpoint, port))),
        load_balancing_weight: pb::u32v(endpoint.weight.max(1)),
        host_identifier: Some(pb_endpoint::lb_endpoint::HostIdentifier::Endpoint(pb_endpoint::Endpoint {
            address: Some(address),
            ..Default::default()
        })),
    })
}

fn address(address: &str, port: u16, resolves: bool) -> Option<core::Address> {
    if let Some(path) = address.strip_prefix("unix://") {
        return Some(pb::pipe(path));
    }
    (resolves || address.parse::<IpAddr>().is_ok()).then(|| pb::socket_address(address, port))
}

/// What the client's proxy needs to know of an endpoint: whether to speak mTLS, and whom it reached, for metrics.
fn metadata(endpoint: &Endpoint, mtls: bool) -> core::Metadata {
    let mut out = pb::metadata([("istio", workload(endpoint))]);
    if mtls {
        let tls_mode = pb::structure([("tlsMode", pb::text("istio"))]);
        out.filter_metadata.insert(SOCKET_MATCH.to_owned(), tls_mode);
    }
    out
}

/// `<workload>;<namespace>;<canonical name>;<canonical revision>;<cluster>`.
fn workload(endpoint: &Endpoint) -> Struct {
    let parts = [
        endpoint.workload.as_str(),
        endpoint.namespace.as_str(),
        names::canonical_name(&endpoint.labels, &endpoint.workload),
        names::canonical_revision(&endpoint.labels),
        endpoint.cluster.as_str(),
    ];
    pb::structure([("workload", pb::text(parts.join(";")))])
}

/// Whether the endpoint has a proxy that speaks mTLS.
pub(super) fn has_proxy(endpoint: &Endpoint) -> bool {
    match endpoint.tls_mode {
        TlsMode::Istio => true,
        TlsMode::Disabled => false,
    }
}
