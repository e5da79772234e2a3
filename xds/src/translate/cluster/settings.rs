//! Policy blocks as settings of a cluster.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb_cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{LbConfig, LbPolicy as PbLbPolicy};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as http;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options as options;
use registry::model::mesh::{MeshConfig, MeshH2UpgradePolicy};
use registry::model::service::Protocol;
use registry::model::traffic::{
    ConnectionPoolSettings, H2UpgradePolicy, HashAlgorithm, HttpSettings, LbPolicy, LoadBalancerSettings,
    OutlierDetection, RetryBudget, SimpleLb, TcpKeepalive,
};

use super::super::pb;

/// Key of the HTTP options among a cluster's extensions.
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Istio's limit of streams per HTTP/2 connection.
const MAX_STREAMS: u32 = 1_073_741_824;

/// Limits, timeouts and keepalive.
pub(in crate::translate) fn connection_pool(
    cluster: &mut pb_cluster::Cluster,
    pool: Option<&ConnectionPoolSettings>,
    retry_budget: Option<&RetryBudget>,
    mesh: &MeshConfig,
) {
    let tcp = pool.and_then(|pool| pool.tcp.as_ref());
    let http = pool.and_then(|pool| pool.http.as_ref());
    let timeout = tcp.and_then(|tcp| tcp.connect_timeout).unwrap_or_else(|| mesh.connect_timeout());
    cluster.connect_timeout = Some(pb::duration(timeout));
    let limit = |value: Option<i32>| {
        pb::u32v(value.and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(u32::MAX))
    };
    cluster.circuit_breakers = Some(pb_cluster::CircuitBreakers {
        thresholds: vec![pb_cluster::circuit_breakers::Thresholds {
            max_connections: limit(tcp.and_then(|tcp| tcp.max_connections)),
            max_pending_requests: limit(http.and_then(|http| http.http1_max_pending_requests)),
            max_requests: limit(http.and_then(|http| http.http2_max_requests)),
            max_retries: limit(http.and_then(|http| http.max_retries)),
            track_remaining: true,
            retry_budget: retry_budget.map(budget),
            ..Default::default()
        }],
        ..Default::default()
    });
    let alive = tcp.and_then(|tcp| tcp.tcp_keepalive.as_ref()).or(mesh.tcp_keepalive.as_ref());
    cluster.upstream_connection_options = alive.map(|alive| pb_cluster::UpstreamConnectionOptions {
        tcp_keepalive: Some(keepalive(alive)),
        ..Default::default()
    });
}

fn budget(budget: &RetryBudget) -> pb_cluster::circuit_breakers::thresholds::RetryBudget {
    let concurrency = if budget.min_retry_concurrency == 0 { 3 } else { budget.min_retry_concurrency };
    pb_cluster::circuit_breakers::thresholds::RetryBudget {
        budget_percent: Some(pb::percent(budget.percent.as_ref().map_or(20.0, |p| p.value))),
        budget_interval: budget.budget_interval.map(pb::duration),
        min_retry_concurrency: pb::u32v(concurrency),
    }
}

fn keepalive(keepalive: &TcpKeepalive) -> core::TcpKeepalive {
    let seconds = |d: Duration| pb::u32v(u32::try_from(d.as_secs()).unwrap_or(u32::MAX));
    core::TcpKeepalive {
        keepalive_probes: (keepalive.probes > 0).then_some(keepalive.probes).and_then(pb::u32v),
        keepalive_time: keepalive.time.and_then(seconds),
        keepalive_interval: keepalive.interval.and_then(seconds),
    }
}

/// What HTTP to speak to the endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::translate) enum Upstream {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// What the client spoke.
    AsClient,
    /// The port is not HTTP.
    Opaque,
}

/// What HTTP to speak on a port, given its policy.
pub(in crate::translate) fn upstream(
    protocol: Protocol,
    pool: Option<&ConnectionPoolSettings>,
    mesh: &MeshConfig,
) -> Upstream {
    let http = pool.and_then(|pool| pool.http.as_ref());
    let upgrade = match http.map(|http| http.h2_upgrade_policy).unwrap_or_default() {
        H2UpgradePolicy::Upgrade => true,
        H2UpgradePolicy::DoNotUpgrade => false,
        H2UpgradePolicy::Default => {
            protocol == Protocol::Http && mesh.h2_upgrade_policy == MeshH2UpgradePolicy::Upgrade
        }
    };
    match protocol {
        Protocol::Http2 | Protocol::Grpc | Protocol::GrpcWeb => Upstream::Http2,
        _ if http.is_some_and(|http| http.use_client_protocol) => Upstream::AsClient,
        Protocol::Http if upgrade => Upstream::Http2,
        Protocol::Http => Upstream::Http1,
        Protocol::Auto => Upstream::AsClient,
        Protocol::Https
        | Protocol::Tls
        | Protocol::Tcp
        | Protocol::Udp
        | Protocol::Mongo
        | Protocol::MySql
        | Protocol::Redis => Upstream::Opaque,
    }
}

/// Whether the server name is taken from the request, and the certificate checked against it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::translate) struct AutoSni {
    pub(in crate::translate) sni: bool,
    pub(in crate::translate) san: bool,
}

/// The HTTP side of a cluster.
pub(in crate::translate) fn http_options(
    cluster: &mut pb_cluster::Cluster,
    upstream: Upstream,
    pool: Option<&ConnectionPoolSettings>,
    auto_sni: AutoSni,
) {
    let settings = pool.and_then(|pool| pool.http.as_ref());
    let tcp = pool.and_then(|pool| pool.tcp.as_ref());
    let http2 = || http2_options(settings);
    let protocol = match upstream {
        Upstream::Opaque => return,
        Upstream::Http1 => explicit(options::explicit_http_config::ProtocolConfig::HttpProtocolOptions(
            core::Http1ProtocolOptions::default(),
        )),
        Upstream::Http2 => {
            explicit(options::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(http2()))
        }
        Upstream::AsClient => {
            options::UpstreamProtocolOptions::UseDownstreamProtocolConfig(options::UseDownstreamHttpConfig {
                http_protocol_options: Some(core::Http1ProtocolOptions::default()),
                http2_protocol_options: Some(http2()),
                ..Default::default()
            })
        }
    };
    let idle = settings.and_then(|s| s.idle_timeout);
    let longest = tcp.and_then(|tcp| tcp.max_connection_duration);
    let per_connection = settings
        .and_then(|s| s.max_requests_per_connection)
        .and_then(|max| u32::try_from(max).ok())
        .filter(|max| *max > 0);
    let common = (idle.is_some() || longest.is_some() || per_connection.is_some()).then(|| {
        core::HttpProtocolOptions {
            idle_timeout: idle.map(pb::duration),
            max_connection_duration: longest.map(pb::duration),
            max_requests_per_connection: per_connection.and_then(pb::u32v),
            ..Default::default()
        }
    });
    let config = http::HttpProtocolOptions {
        common_http_protocol_options: common,
        upstream_http_protocol_options: (auto_sni != AutoSni::default()).then(|| {
            core::UpstreamHttpProtocolOptions {
                auto_sni: auto_sni.sni,
                auto_san_validation: auto_sni.san,
                ..Default::default()
            }
        }),
        upstream_protocol_options: Some(protocol),
        ..Default::default()
    };
    cluster.typed_extension_protocol_options.insert(HTTP_OPTIONS.to_owned(), pb::any(&config));
}

fn explicit(config: options::explicit_http_config::ProtocolConfig) -> options::UpstreamProtocolOptions {
    options::UpstreamProtocolOptions::ExplicitHttpConfig(options::ExplicitHttpConfig {
        protocol_config: Some(config),
    })
}

fn http2_options(settings: Option<&HttpSettings>) -> core::Http2ProtocolOptions {
    let streams = settings
        .and_then(|s| s.max_concurrent_streams)
        .and_then(|max| u32::try_from(max).ok())
        .filter(|max| *max > 0)
        .unwrap_or(MAX_STREAMS);
    core::Http2ProtocolOptions {
        // so that WebSockets have a form over it (RFC 8441)
        allow_connect: true,
        max_concurrent_streams: pb::u32v(streams),
        connection_keepalive: settings.and_then(|s| s.http2_keep_alive.as_ref()).map(|alive| {
            core::KeepaliveSettings {
                interval: alive.interval.map(pb::duration),
                timeout: alive.timeout.map(pb::duration),
                ..Default::default()
            }
        }),
        ..Default::default()
    }
}

/// Ejection of endpoints that fail.
pub(in crate::translate) fn outlier_detection(
    cluster: &mut pb_cluster::Cluster,
    outlier: Option<&OutlierDetection>,
) {
    let Some(outlier) = outlier else { return };
    let enforce = |value: Option<u32>| value.and_then(|v| pb::u32v(if v > 0 { 100 } else { 0 }));
    let gateway = outlier.consecutive_gateway_errors;
    let consecutive = outlier
        .consecutive_5xx_errors
        .or_else(|| u32::try_from(outlier.consecutive_errors).ok().filter(|n| *n > 0));
    let percent = u32::try_from(outlier.max_ejection_percent).ok().filter(|p| *p > 0);
    let split = outlier.split_external_local_origin_errors;
    let local = outlier.consecutive_local_origin_failures.filter(|_| split);
    cluster.outlier_detection = Some(pb_cluster::OutlierDetection {
        consecutive_5xx: consecutive.filter(|n| *n > 0).and_then(pb::u32v),
        enforcing_consecutive_5xx: enforce(consecutive),
        consecutive_gateway_failure: gateway.filter(|n| *n > 0).and_then(pb::u32v),
        enforcing_consecutive_gateway_failure: enforce(gateway),
        interval: outlier.interval.map(pb::duration),
        base_ejection_time: outlier.base_ejection_time.map(pb::duration),
        max_ejection_percent: percent.and_then(pb::u32v),
        enforcing_success_rate: pb::u32v(0),
        split_external_local_origin_errors: split,
        consecutive_local_origin_failure: local.filter(|n| *n > 0).and_then(pb::u32v),
        enforcing_consecutive_local_origin_failure: enforce(local),
        enforcing_local_origin_success_rate: split.then_some(0).and_then(pb::u32v),
        ..Default::default()
    });
    let healthy = f64::from(outlier.min_health_percent.clamp(0, 100));
    common_lb(cluster).healthy_panic_threshold = Some(pb::percent(healthy));
}

pub(in crate::translate) fn common_lb(
    cluster: &mut pb_cluster::Cluster,
) -> &mut pb_cluster::cluster::CommonLbConfig {
    cluster.common_lb_config.get_or_insert_default()
}

/// Whether the policy leaves the choice of the endpoint to the client (`PASSTHROUGH`).
pub(in crate::translate) fn is_passthrough(settings: Option<&LoadBalancerSettings>) -> bool {
    matches!(settings.and_then(|s| s.lb_policy.as_ref()), Some(LbPolicy::Simple(SimpleLb::Passthrough)))
}

/// How an endpoint is chosen. Least requests, unless the policy says otherwise.
pub(in crate::translate) fn load_balancer(
    cluster: &mut pb_cluster::Cluster,
    settings: Option<&LoadBalancerSettings>,
) {
    let slow_start = settings.and_then(slow_start);
    let policy = settings.and_then(|s| s.lb_policy.as_ref());
    let (lb_policy, lb_config) = match policy {
        Some(LbPolicy::ConsistentHash(hash)) => hash_policy(hash),
        Some(LbPolicy::Simple(SimpleLb::Random)) => (PbLbPolicy::Random, None),
        Some(LbPolicy::Simple(SimpleLb::Passthrough)) => (PbLbPolicy::ClusterProvided, None),
        Some(LbPolicy::Simple(SimpleLb::RoundRobin)) => {
            let config = slow_start.map(|slow_start_config| {
                LbConfig::RoundRobinLbConfig(pb_cluster::cluster::RoundRobinLbConfig {
                    slow_start_config: Some(slow_start_config),
                })
            });
            (PbLbPolicy::RoundRobin, config)
        }
        Some(LbPolicy::Simple(SimpleLb::Unspecified | SimpleLb::LeastConn | SimpleLb::LeastRequest))
        | None => {
            let config = slow_start.map(|slow_start_config| {
                LbConfig::LeastRequestLbConfig(pb_cluster::cluster::LeastRequestLbConfig {
                    slow_start_config: Some(slow_start_config),
                    ..Default::default()
                })
            });
            (PbLbPolicy::LeastRequest, config)
        }
    };
    cluster.lb_policy = lb_policy.into();
    cluster.lb_config = lb_config;
}

fn hash_policy(hash: &registry::model::traffic::ConsistentHashLb) -> (PbLbPolicy, Option<LbConfig>) {
    if let Some(HashAlgorithm::Maglev(maglev)) = &hash.hash_algorithm {
        let config = pb_cluster::cluster::MaglevLbConfig { table_size: maglev.table_size.and_then(pb::u64v) };
        return (PbLbPolicy::Maglev, Some(LbConfig::MaglevLbConfig(config)));
    }
    let own = match &hash.hash_algorithm {
        Some(HashAlgorithm::RingHash(ring)) => ring.minimum_ring_size,
        Some(HashAlgorithm::Maglev(_)) | None => None,
    };
    let size = own.or(hash.minimum_ring_size).filter(|size| *size > 0).unwrap_or(1024);
    let config =
        pb_cluster::cluster::RingHashLbConfig { minimum_ring_size: pb::u64v(size), ..Default::default() };
    (PbLbPolicy::RingHash, Some(LbConfig::RingHashLbConfig(config)))
}

fn slow_start(settings: &LoadBalancerSettings) -> Option<pb_cluster::cluster::SlowStartConfig> {
    let warmup = settings.warmup.as_ref();
    let window = warmup.and_then(|w| w.duration).or(settings.warmup_duration_secs)?;
    let aggression = warmup.and_then(|w| w.aggression).unwrap_or(1.0);
    Some(pb_cluster::cluster::SlowStartConfig {
        slow_start_window: Some(pb::duration(window)),
        aggression: Some(core::RuntimeDouble { default_value: aggression, runtime_key: String::new() }),
        min_weight_percent: Some(pb::percent(warmup.and_then(|w| w.minimum_percent).unwrap_or(10.0))),
    })
}
