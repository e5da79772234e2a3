//! `Cluster` from its proto, validated once.

pub mod endpoint;
pub mod health;
pub mod health_check;
pub mod http;
pub mod lb;
pub mod transport;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::network::dns_resolver::cares::v3::CaresDnsResolverConfig;

use self::endpoint::ClusterLoadAssignment;
use self::health::OutlierDetection;
use self::health_check::HealthCheck;
use self::http::{HttpVersion, UpstreamHttp, upstream_http};
use self::lb::{LbCommon, LbPolicy, lb_common, lb_policy};
use self::transport::{Transport, transport};
use super::decode::{
    Address, Invalid, Kind, Metadata, Rejected, Under as _, address, ads_only, is, json, opt_duration,
    timeout, u32_or, unpack,
};

/// One cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Its name.
    pub name: Arc<str>,
    /// The name in its statistics.
    pub stat_name: Arc<str>,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// How one is picked.
    pub lb: LbPolicy,
    /// What holds for every way of picking.
    pub lb_common: LbCommon,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// Circuit breakers.
    pub limits: Limits,
    /// Passive health checks.
    pub outlier: Option<OutlierDetection>,
    /// Active health checks.
    pub health_check: Option<HealthCheck>,
    /// Which version of HTTP, and how.
    pub http: UpstreamHttp,
    /// Transport for endpoints that fit none of `transport_matches`.
    pub transport: Transport,
    /// Transport by endpoint metadata (`envoy.transport_socket_match`); the first that fits.
    pub transport_matches: Box<[TransportMatch]>,
    /// Bind upstream sockets to the first of these that is of the endpoint's family.
    pub source_addresses: Box<[std::net::IpAddr]>,
    /// TCP keepalive of upstream connections.
    pub keepalive: Option<TcpKeepalive>,
    /// How many bytes of one connection may wait in memory.
    pub buffer_limit: u32,
    /// Free-form data.
    pub metadata: Metadata,
}

/// Where endpoints come from.
#[derive(Debug)]
pub enum Discovery {
    /// They are part of the cluster.
    Static(Arc<ClusterLoadAssignment>),
    /// From the tables, by this name, and how long the cluster waits for them.
    Eds {
        /// The name of the `ClusterLoadAssignment`.
        service: Arc<str>,
        /// How long the cluster waits before it starts without; `None`: for ever.
        fetch_timeout: Option<Duration>,
    },
    /// Every address that DNS gives for these names.
    StrictDns(Arc<ClusterLoadAssignment>, Dns),
    /// The first address that DNS gives for this name, whenever a connection is made.
    LogicalDns(Arc<ClusterLoadAssignment>, Dns),
    /// Wherever the connection wanted to go.
    OriginalDst(OriginalDst),
}

/// How names are resolved.
#[derive(Debug, Clone)]
pub struct Dns {
    /// How often.
    pub refresh: Duration,
    /// How soon after a failure: the first pause, which doubles with each further one, and the longest.
    pub failure_refresh: Option<(Duration, Duration)>,
    /// Which addresses.
    pub family: DnsFamily,
    /// In place of `refresh`, how long the answer may be kept.
    pub respect_ttl: bool,
    /// Up to this more by chance.
    pub jitter: Duration,
    /// The name servers; none: the system's.
    pub servers: Box<[SocketAddr]>,
}

/// Which addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsFamily {
    /// IPv6 ones if there are any, else IPv4.
    Auto,
    /// IPv4.
    V4Only,
    /// IPv6.
    V6Only,
    /// IPv4 ones if there are any, else IPv6.
    V4Preferred,
    /// All.
    All,
}

/// How an original destination is found.
#[derive(Debug, Clone, Default)]
pub struct OriginalDst {
    /// Another port than the original one.
    pub port: Option<u16>,
}

/// Circuit breakers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Connections.
    pub max_connections: u32,
    /// Requests that wait for one.
    pub max_pending: u32,
    /// Requests at once.
    pub max_requests: u32,
    /// Retries at once.
    pub max_retries: u32,
    /// In place of `max_retries`: the share of all requests (percent) that may be retries, and at least how many.
    pub retry_budget: Option<(f64, u32)>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_pending: 1024,
            max_requests: 1024,
            max_retries: 3,
            retry_budget: None,
        }
    }
}

/// A transport for some endpoints.
#[derive(Debug)]
pub struct TransportMatch {
    /// Its name.
    pub name: Arc<str>,
    /// What the endpoint's metadata must say; empty: nothing.
    pub matches: serde_json::Map<String, serde_json::Value>,
    /// It.
    pub transport: Transport,
}

/// TCP keepalive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpKeepalive {
    /// Probes without an answer before the connection is dead.
    pub probes: Option<u32>,
    /// Silence before the first probe.
    pub time: Option<Duration>,
    /// Between probes.
    pub interval: Option<Duration>,
}

impl Cluster {
    /// The transport for an endpoint with this metadata (of `envoy.transport_socket_match`).
    #[must_use]
    pub fn transport_for(&self, metadata: Option<&serde_json::Map<String, serde_json::Value>>) -> &Transport {
        let fits = |m: &&TransportMatch| {
            m.matches.iter().all(|(k, v)| metadata.and_then(|metadata| metadata.get(k)) == Some(v))
        };
        match self.transport_matches.iter().find(fits) {
            Some(m) => &m.transport,
            None => &self.transport,
        }
    }

    /// The name of its endpoints' resource, if they come from one.
    #[must_use]
    pub fn eds_service(&self) -> Option<&Arc<str>> {
        match &self.discovery {
            Discovery::Eds { service, .. } => Some(service),
            Discovery::Static(_)
            | Discovery::StrictDns(..)
            | Discovery::LogicalDns(..)
            | Discovery::OriginalDst(_) => None,
        }
    }
}

impl TryFrom<pb::Cluster> for Cluster {
    type Error = Rejected;

    fn try_from(pb: pb::Cluster) -> Result<Self, Rejected> {
        let name = pb.name.clone();
        cluster(pb).map_err(|invalid| Rejected { kind: Kind::Cluster, name, invalid })
    }
}

fn refuse_unsupported(pb: &pb::Cluster) -> Result<(), Invalid> {
    let per_host = pb.circuit_breakers.as_ref().is_some_and(|b| !b.per_host_thresholds.is_empty());
    for (set, field) in [
        (pb.transport_socket_matcher.is_some(), "transport_socket_matcher"),
        (pb.lb_subset_config.as_ref().is_some_and(|s| !s.subset_selectors.is_empty()), "lb_subset_config"),
        (!pb.filters.is_empty(), "filters"),
        (pb.upstream_config.is_some(), "upstream_config"),
        (pb.queuing_policies.is_some(), "queuing_policies"),
        (pb.health_checks.len() > 1, "health_checks: more than one"),
        (pb.close_connections_on_host_health_failure, "close_connections_on_host_health_failure"),
        (pb.connection_pool_per_downstream_connection, "connection_pool_per_downstream_connection"),
        (per_host, "circuit_breakers.per_host_thresholds"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    Ok(())
}

fn cluster(mut pb: pb::Cluster) -> Result<Cluster, Invalid> {
    if pb.name.is_empty() {
        return Err(Invalid::missing("name"));
    }
    refuse_unsupported(&pb)?;
    let name: Arc<str> = pb.name.as_str().into();
    let mut lb_common = lb_common(pb.common_lb_config.take()).under("common_lb_config")?;
    let lb = lb_policy(&pb, &mut lb_common)?;
    let discovery = discovery(&mut pb)?;
    if matches!(discovery, Discovery::OriginalDst(_)) != (lb == LbPolicy::ClusterProvided) {
        return Err(Invalid::new("lb_policy", "CLUSTER_PROVIDED goes with ORIGINAL_DST, and only with it"));
    }
    let breakers = pb.circuit_breakers.take().unwrap_or_default();
    let transport_matches = std::mem::take(&mut pb.transport_socket_matches)
        .into_iter()
        .enumerate()
        .map(|(i, m)| transport_match(m).at("transport_socket_matches", i))
        .collect::<Result<_, _>>()?;
    let default = Some(Duration::from_secs(5));
    let connect_timeout = match timeout(pb.connect_timeout, default, "connect_timeout")? {
        Some(t) => t,
        None => return Err(Invalid::new("connect_timeout", "must be more than 0")),
    };
    let http = upstream_http(&mut pb)?;
    let health_check = pb.health_checks.pop().map(HealthCheck::new).transpose().under("health_checks[0]")?;
    if health_check.as_ref().is_some_and(HealthCheck::is_grpc) && http.version == HttpVersion::Http1 {
        return Err(Invalid::new("health_checks[0].grpc_health_check", "needs endpoints that speak HTTP/2"));
    }
    Ok(Cluster {
        stat_name: if pb.alt_stat_name.is_empty() {
            Arc::clone(&name)
        } else {
            pb.alt_stat_name.as_str().into()
        },
        name,
        discovery,
        lb,
        lb_common,
        connect_timeout,
        limits: limits(&breakers),
        outlier: pb
            .outlier_detection
            .take()
            .map(OutlierDetection::new)
            .transpose()
            .under("outlier_detection")?,
        health_check,
        http,
        transport: transport(pb.transport_socket.take()).under("transport_socket")?,
        transport_matches,
        source_addresses: source_addresses(pb.upstream_bind_config.take()).under("upstream_bind_config")?,
        keepalive: pb.upstream_connection_options.and_then(|o| o.tcp_keepalive).map(keepalive),
        buffer_limit: u32_or(pb.per_connection_buffer_limit_bytes, 1 << 20),
        metadata: Metadata::new(pb.metadata),
    })
}

fn discovery(pb: &mut pb::Cluster) -> Result<Discovery, Invalid> {
    use pb::cluster::ClusterDiscoveryType as Type;
    use pb::cluster::DiscoveryType as Pb;
    let kind = match &pb.cluster_discovery_type {
        None => Pb::Static,
        Some(Type::Type(t)) => {
            Pb::try_from(*t).map_err(|_| Invalid::new("type", format!("unknown value {t}")))?
        }
        Some(Type::ClusterType(_)) => return Err(Invalid::unsupported("cluster_type")),
    };
    let assignment = pb.load_assignment.take();
    let inline = |dns| -> Result<Arc<ClusterLoadAssignment>, Invalid> {
        let assignment = assignment.clone().unwrap_or_default();
        endpoint::assignment(assignment, dns).map(Arc::new).under("load_assignment")
    };
    match kind {
        Pb::Static => Ok(Discovery::Static(inline(false)?)),
        Pb::StrictDns => Ok(Discovery::StrictDns(inline(true)?, dns(pb)?)),
        Pb::LogicalDns => {
            let endpoints = inline(true)?;
            if endpoints.endpoints().count() != 1 {
                return Err(Invalid::new("load_assignment", "LOGICAL_DNS needs exactly one endpoint"));
            }
            Ok(Discovery::LogicalDns(endpoints, dns(pb)?))
        }
        Pb::Eds => {
            let eds = pb.eds_cluster_config.take().ok_or_else(|| Invalid::missing("eds_cluster_config"))?;
            let fetch_timeout = ads_only(eds.eds_config, "eds_config").under("eds_cluster_config")?;
            let service = if eds.service_name.is_empty() { &pb.name } else { &eds.service_name };
            Ok(Discovery::Eds { service: service.as_str().into(), fetch_timeout })
        }
        Pb::OriginalDst => {
            if assignment.is_some_and(|a| !a.endpoints.is_empty()) {
                return Err(Invalid::new("load_assignment", "ORIGINAL_DST has no endpoints of its own"));
            }
            original_dst(pb).map(Discovery::OriginalDst)
        }
    }
}

/// The servers of Envoy's usual resolver, c-ares.
fn name_servers(pb: &pb::Cluster) -> Result<Box<[SocketAddr]>, Invalid> {
    let typed = pb.typed_dns_resolver_config.as_ref().and_then(|config| config.typed_config.as_ref());
    let Some(typed) = typed.filter(|typed| is::<CaresDnsResolverConfig>(typed)) else {
        return Ok(Box::default());
    };
    let server = |(i, server)| match address(Some(server)).at("resolvers", i)? {
        Address::Socket(address) => Ok(address),
        Address::Name(..) | Address::Pipe(_) => Err(Invalid::unsupported(format!("resolvers[{i}]"))),
    };
    unpack::<CaresDnsResolverConfig>(typed)?.resolvers.into_iter().enumerate().map(server).collect()
}

fn dns(pb: &mut pb::Cluster) -> Result<Dns, Invalid> {
    use pb::cluster::DnsLookupFamily as Pb;
    let family = match Pb::try_from(pb.dns_lookup_family) {
        Ok(Pb::Auto) => DnsFamily::Auto,
        Ok(Pb::V4Only) => DnsFamily::V4Only,
        Ok(Pb::V6Only) => DnsFamily::V6Only,
        Ok(Pb::V4Preferred) => DnsFamily::V4Preferred,
        Ok(Pb::All) => DnsFamily::All,
        Err(_) => {
            return Err(Invalid::new("dns_lookup_family", format!("unknown value {}", pb.dns_lookup_family)));
        }
    };
    let default = Duration::from_secs(5);
    #[expect(deprecated, reason = "configuration files still use it")]
    let refresh = timeout(pb.dns_refresh_rate, Some(default), "dns_refresh_rate")?.unwrap_or(default);
    #[expect(deprecated, reason = "configuration files still use it")]
    let failure_refresh = pb.dns_failure_refresh_rate.as_ref().map(failure_refresh).transpose();
    #[expect(deprecated, reason = "configuration files still use them")]
    let (respect_ttl, jitter) = (pb.respect_dns_ttl, pb.dns_jitter.take());
    Ok(Dns {
        refresh: refresh.max(Duration::from_millis(1)),
        failure_refresh: failure_refresh.under("dns_failure_refresh_rate")?,
        family,
        respect_ttl,
        jitter: opt_duration(jitter, "dns_jitter")?.unwrap_or_default(),
        servers: name_servers(pb).under("typed_dns_resolver_config")?,
    })
}

fn failure_refresh(pb: &pb::cluster::RefreshRate) -> Result<(Duration, Duration), Invalid> {
    let base = timeout(pb.base_interval, None, "base_interval")?;
    let base = base.ok_or_else(|| Invalid::missing("base_interval"))?;
    let max = timeout(pb.max_interval, None, "max_interval")?.unwrap_or_else(|| base.saturating_mul(10));
    if max < base {
        return Err(Invalid::new("max_interval", "is below base_interval"));
    }
    Ok((base, max))
}

fn original_dst(pb: &pb::Cluster) -> Result<OriginalDst, Invalid> {
    use pb::cluster::LbConfig;
    let Some(LbConfig::OriginalDstLbConfig(config)) = &pb.lb_config else {
        return Ok(OriginalDst::default());
    };
    let field = "original_dst_lb_config";
    if config.metadata_key.is_some() {
        return Err(Invalid::unsupported(format!("{field}.metadata_key")));
    }
    // A client must not choose where its request goes.
    if config.use_http_header {
        return Err(Invalid::unsupported(format!("{field}.use_http_header")));
    }
    let port = config.upstream_port_override.map(|p| super::decode::port(p.value, "upstream_port_override"));
    Ok(OriginalDst { port: port.transpose().under(field)? })
}

fn limits(pb: &pb::CircuitBreakers) -> Limits {
    let priority = core::RoutingPriority::Default;
    let mut limits = Limits::default();
    if let Some(t) = pb.thresholds.iter().find(|t| t.priority == priority as i32) {
        limits.max_connections = u32_or(t.max_connections, 1024);
        limits.max_pending = u32_or(t.max_pending_requests, 1024);
        limits.max_requests = u32_or(t.max_requests, 1024);
        limits.max_retries = u32_or(t.max_retries, 3);
        limits.retry_budget = t.retry_budget.as_ref().map(|b| {
            (b.budget_percent.as_ref().map_or(20.0, |p| p.value), u32_or(b.min_retry_concurrency, 3))
        });
    }
    limits
}

fn transport_match(pb: pb::cluster::TransportSocketMatch) -> Result<TransportMatch, Invalid> {
    Ok(TransportMatch {
        matches: json(pb.r#match.unwrap_or_default()),
        transport: transport(pb.transport_socket).under("transport_socket")?,
        name: pb.name.into(),
    })
}

fn source_addresses(pb: Option<core::BindConfig>) -> Result<Box<[std::net::IpAddr]>, Invalid> {
    let Some(pb) = pb else { return Ok(Box::default()) };
    if !pb.socket_options.is_empty() || pb.extra_source_addresses.iter().any(|e| e.socket_options.is_some()) {
        return Err(Invalid::unsupported("socket_options"));
    }
    let extra = pb.extra_source_addresses.into_iter().filter_map(|extra| extra.address);
    let parse = |source: core::SocketAddress| {
        let wrong = |_| Invalid::new("source_address", format!("`{}` is not an IP address", source.address));
        source.address.parse().map_err(wrong)
    };
    pb.source_address.into_iter().chain(extra).map(parse).collect()
}

fn keepalive(pb: core::TcpKeepalive) -> TcpKeepalive {
    let secs = |n: envoy_types::pb::google::protobuf::UInt32Value| Duration::from_secs(n.value.into());
    TcpKeepalive {
        probes: pb.keepalive_probes.map(|n| n.value),
        time: pb.keepalive_time.map(secs),
        interval: pb.keepalive_interval.map(secs),
    }
}

#[cfg(test)]
mod tests;
