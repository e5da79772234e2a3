//! `ClusterLoadAssignment` from its proto, validated once.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use serde_json::{Map, Value as Json};

use crate::xds::decode::{Address, Invalid, Kind, Metadata, Rejected, Under as _, address, u32_or, unpack};
use crate::xds::proxy_protocol::{self, Tlv};

/// Metadata that picks an endpoint's transport.
const TRANSPORT_MATCH: &str = "envoy.transport_socket_match";
/// Metadata with what an endpoint is told by the PROXY protocol.
const PROXY_PROTOCOL: &str = "envoy.transport_sockets.proxy_protocol";

/// The endpoints of one cluster.
#[derive(Debug, Default, PartialEq)]
pub struct ClusterLoadAssignment {
    /// Its name.
    pub name: Arc<str>,
    /// Localities; priorities have no gaps.
    pub localities: Box<[LocalityEndpoints]>,
    /// How much less than all healthy endpoints carry all traffic, in percent (140 unless set).
    pub overprovisioning_factor: u32,
}

/// The endpoints of one locality at one priority.
#[derive(Debug, PartialEq)]
pub struct LocalityEndpoints {
    /// Where.
    pub locality: Locality,
    /// 0 is used first.
    pub priority: u32,
    /// Its weight among localities of its priority; `None`: not set.
    pub weight: Option<u32>,
    /// Its endpoints.
    pub endpoints: Box<[Arc<Endpoint>]>,
}

/// Where something runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Locality {
    /// The region.
    pub region: Box<str>,
    /// The zone.
    pub zone: Box<str>,
    /// The part of the zone.
    pub sub_zone: Box<str>,
}

/// What discovery says about an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It may be used.
    Healthy,
    /// It may be used if there are not enough healthy ones.
    Degraded,
    /// It is used only in a panic.
    Unhealthy,
    /// It is about to go: no new connections.
    Draining,
}

/// One endpoint.
#[derive(Debug, PartialEq)]
pub struct Endpoint {
    /// Where it is.
    pub address: Address,
    /// More addresses of the same endpoint; only the first is used.
    pub additional_addresses: Box<[Address]>,
    /// Its name, for host rewrites and hashing.
    pub hostname: Box<str>,
    /// What discovery says about it.
    pub health: Health,
    /// Its weight among endpoints of its locality, 1 or more.
    pub weight: u32,
    /// What it is told besides addresses, where it is spoken to with the PROXY protocol.
    pub tlvs: Box<[Tlv]>,
    /// Free-form data.
    pub metadata: Metadata,
    /// It takes the mesh's mTLS (`tlsMode: istio`), and so peer metadata in headers.
    pub mesh_tls: bool,
    /// What Istio's metadata says about the workload behind it.
    pub workload: Option<WorkloadLabel>,
    /// Where it is checked, if not at its own address.
    pub health_check_port: Option<u16>,
    /// Its name for checks, if it has one of its own.
    pub health_check_hostname: Box<str>,
    /// It is not checked.
    pub disable_health_check: bool,
}

/// The workload behind an endpoint: `name;namespace;canonical-name;canonical-revision;cluster`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkloadLabel {
    /// The workload's name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// The service it belongs to.
    pub canonical_name: Arc<str>,
    /// That service's revision.
    pub canonical_revision: Arc<str>,
    /// Its cluster.
    pub cluster: Arc<str>,
}

impl WorkloadLabel {
    fn parse(text: &str) -> Self {
        let mut parts = text.split(';').map(Arc::from);
        let mut next = || parts.next().unwrap_or_default();
        Self {
            name: next(),
            namespace: next(),
            canonical_name: next(),
            canonical_revision: next(),
            cluster: next(),
        }
    }
}

impl Endpoint {
    /// What its metadata says about transports.
    #[must_use]
    pub fn transport_metadata(&self) -> Option<&Map<String, Json>> {
        self.metadata.filter(TRANSPORT_MATCH)
    }
}

impl ClusterLoadAssignment {
    /// No endpoints at all.
    #[must_use]
    pub fn empty(name: &str) -> Self {
        Self { name: name.into(), overprovisioning_factor: 140, ..Self::default() }
    }

    /// All endpoints, of all localities.
    pub fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.localities.iter().flat_map(|l| l.endpoints.iter())
    }
}

impl TryFrom<pb::ClusterLoadAssignment> for ClusterLoadAssignment {
    type Error = Rejected;

    fn try_from(pb: pb::ClusterLoadAssignment) -> Result<Self, Rejected> {
        let name = pb.cluster_name.clone();
        let named =
            if name.is_empty() { Err(Invalid::missing("cluster_name")) } else { assignment(pb, false) };
        named.map_err(|invalid| Rejected { kind: Kind::Endpoints, name, invalid })
    }
}

/// The endpoints of a cluster; `dns`: their addresses may be names.
pub(super) fn assignment(pb: pb::ClusterLoadAssignment, dns: bool) -> Result<ClusterLoadAssignment, Invalid> {
    if !pb.named_endpoints.is_empty() {
        return Err(Invalid::unsupported("named_endpoints"));
    }
    let policy = pb.policy.unwrap_or_default();
    if policy.weighted_priority_health {
        return Err(Invalid::unsupported("policy.weighted_priority_health"));
    }
    if !policy.drop_overloads.is_empty() {
        return Err(Invalid::unsupported("policy.drop_overloads"));
    }
    let localities = pb
        .endpoints
        .into_iter()
        .enumerate()
        .map(|(i, l)| locality(l, dns).at("endpoints", i))
        .collect::<Result<Box<[_]>, _>>()?;
    let mut priorities: Vec<u32> = localities.iter().map(|l| l.priority).collect();
    priorities.sort_unstable();
    priorities.dedup();
    if let Some((want, got)) = (0..).zip(priorities).find(|(want, got)| want != got) {
        let reason = format!("priority {want} is missing below priority {got}");
        return Err(Invalid::new("endpoints", reason));
    }
    Ok(ClusterLoadAssignment {
        name: pb.cluster_name.into(),
        localities,
        overprovisioning_factor: u32_or(policy.overprovisioning_factor, 140).max(100),
    })
}

fn locality(pb: pb::LocalityLbEndpoints, dns: bool) -> Result<LocalityEndpoints, Invalid> {
    use pb::locality_lb_endpoints::LbConfig;
    let endpoints = match pb.lb_config {
        None => pb.lb_endpoints,
        #[expect(deprecated, reason = "configuration may still use it")]
        Some(LbConfig::LoadBalancerEndpoints(list)) => list.lb_endpoints,
        Some(LbConfig::LedsClusterLocalityConfig(_)) => {
            return Err(Invalid::unsupported("leds_cluster_locality_config"));
        }
    };
    if pb.priority > 128 {
        return Err(Invalid::new("priority", format!("{} is above 128", pb.priority)));
    }
    let endpoints = endpoints
        .into_iter()
        .enumerate()
        .map(|(i, e)| endpoint(e, dns).map(Arc::new).at("lb_endpoints", i))
        .collect::<Result<_, _>>()?;
    let place = pb.locality.unwrap_or_default();
    Ok(LocalityEndpoints {
        locality: Locality {
            region: place.region.into(),
            zone: place.zone.into(),
            sub_zone: place.sub_zone.into(),
        },
        priority: pb.priority,
        weight: pb.load_balancing_weight.map(|w| w.value),
        endpoints,
    })
}

fn endpoint(pb: pb::LbEndpoint, dns: bool) -> Result<Endpoint, Invalid> {
    use core::HealthStatus;
    use pb::lb_endpoint::HostIdentifier;
    let inner = match pb.host_identifier {
        Some(HostIdentifier::Endpoint(e)) => e,
        Some(HostIdentifier::EndpointName(_)) => return Err(Invalid::unsupported("endpoint_name")),
        None => return Err(Invalid::missing("endpoint")),
    };
    let usable = |address: Address| match address {
        Address::Name(name, _) if !dns => {
            Err(Invalid::new("address", format!("`{name}` is not an IP address; names need a DNS cluster")))
        }
        address @ (Address::Name(..) | Address::Socket(_) | Address::Pipe(_)) => Ok(address),
    };
    let own = address(inner.address).under("address").and_then(usable).under("endpoint")?;
    let additional_addresses = inner
        .additional_addresses
        .into_iter()
        .map(|a| address(a.address).and_then(usable))
        .collect::<Result<_, _>>()
        .under("endpoint.additional_addresses")?;
    let health = match HealthStatus::try_from(pb.health_status) {
        Ok(HealthStatus::Unknown | HealthStatus::Healthy) => Health::Healthy,
        Ok(HealthStatus::Degraded) => Health::Degraded,
        Ok(HealthStatus::Draining) => Health::Draining,
        Ok(HealthStatus::Unhealthy | HealthStatus::Timeout) => Health::Unhealthy,
        Err(_) => return Err(Invalid::new("health_status", format!("unknown value {}", pb.health_status))),
    };
    let weight = u32_or(pb.load_balancing_weight, 1);
    if weight == 0 {
        return Err(Invalid::new("load_balancing_weight", "must be 1 or more"));
    }
    let check = inner.health_check_config.unwrap_or_default();
    if check.address.is_some() {
        return Err(Invalid::unsupported("endpoint.health_check_config.address"));
    }
    let health_check_port = match check.port_value {
        0 => None,
        p => Some(crate::xds::decode::port(p, "endpoint.health_check_config.port_value")?),
    };
    let tlvs = tlvs(pb.metadata.as_ref()).under("metadata")?;
    let metadata = Metadata::new(pb.metadata);
    Ok(Endpoint {
        tlvs,
        address: own,
        additional_addresses,
        hostname: inner.hostname.into(),
        health,
        weight,
        mesh_tls: metadata.str(TRANSPORT_MATCH, "tlsMode") == Some("istio"),
        workload: metadata.str("istio", "workload").map(WorkloadLabel::parse),
        metadata,
        health_check_port,
        health_check_hostname: check.hostname.into(),
        disable_health_check: check.disable_active_health_check,
    })
}

fn tlvs(metadata: Option<&core::Metadata>) -> Result<Box<[Tlv]>, Invalid> {
    let Some(any) = metadata.and_then(|m| m.typed_filter_metadata.get(PROXY_PROTOCOL)) else {
        return Ok(Box::default());
    };
    let own = unpack::<core::PerHostConfig>(any).and_then(|own| proxy_protocol::added(own.added_tlvs));
    own.under("typed_filter_metadata").under(PROXY_PROTOCOL)
}
