//! Chains that forward bytes: by destination, by server name, by what a `VirtualService` says.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::listener::v3 as pb_listener;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy as inner;
use envoy_types::pb::envoy::r#type::v3 as kind;
use ipnet::IpNet;
use registry::model::service::{Service, ServicePort};
use registry::model::traffic::{HashKey, L4MatchAttributes, RouteDestination, TlsMatchAttributes};

use super::super::policy::Policy;
use super::super::route::{self, matching};
use super::super::view::View;
use super::super::{names, pb};

const TCP_PROXY: &str = "envoy.filters.network.tcp_proxy";

/// Bytes to one cluster.
pub(in crate::translate) fn tcp_proxy(cluster: &str, access_log: Vec<AccessLog>) -> pb_listener::Filter {
    let config = tcp::TcpProxy {
        stat_prefix: cluster.to_owned(),
        access_log,
        cluster_specifier: Some(inner::ClusterSpecifier::Cluster(cluster.to_owned())),
        ..Default::default()
    };
    pb::network_filter(TCP_PROXY, &config)
}

/// What a chain that forwards bytes is chosen by.
#[derive(Debug, Clone, Default)]
pub(super) struct Matching {
    /// Destination addresses; empty takes all.
    pub(super) destinations: Vec<IpNet>,
    /// Server names; empty takes all.
    pub(super) server_names: Vec<String>,
}

impl Matching {
    pub(super) fn pb(&self) -> Option<pb_listener::FilterChainMatch> {
        if self.destinations.is_empty() && self.server_names.is_empty() {
            return None;
        }
        let tls = !self.server_names.is_empty();
        Some(pb_listener::FilterChainMatch {
            prefix_ranges: self.destinations.iter().map(|net| pb::cidr(*net)).collect(),
            server_names: self.server_names.clone(),
            transport_protocol: if tls { "tls".to_owned() } else { String::new() },
            ..Default::default()
        })
    }
}

/// The chains of a service's port; `base` is what leads to the service at all. The last one takes what no
/// `VirtualService` does.
pub(super) fn chains(
    view: &View<'_>,
    service: &Service,
    port: &ServicePort,
    base: &Matching,
) -> Vec<pb_listener::FilterChain> {
    let client = matching::Client { proxy: view.proxy, port: port.number };
    let mut out = Vec::new();
    for rule in view
        .virtual_services
        .iter()
        .filter(|rule| rule.spec.hosts.iter().any(|host| names::covers(host, &service.hostname)))
    {
        for tls_route in &rule.spec.tls {
            for request in tls_route.r#match.iter().filter(|m| tls_applies(m, client)) {
                let matching = Matching {
                    destinations: subnets(&request.destination_subnets, base),
                    server_names: request.sni_hosts.clone(),
                };
                out.push(chain(view, service, port, &matching, &tls_route.route));
            }
        }
        for tcp_route in &rule.spec.tcp {
            if tcp_route.r#match.is_empty() {
                out.push(chain(view, service, port, base, &tcp_route.route));
                return distinct(out);
            }
            for request in tcp_route.r#match.iter().filter(|m| tcp_applies(m, client)) {
                let matching =
                    Matching { destinations: subnets(&request.destination_subnets, base), ..base.clone() };
                let everything = request.destination_subnets.is_empty();
                out.push(chain(view, service, port, &matching, &tcp_route.route));
                if everything {
                    return distinct(out);
                }
            }
        }
    }
    out.push(chain(view, service, port, base, &[]));
    distinct(out)
}

/// Envoy refuses two chains with one match; the first decides.
pub(super) fn distinct(chains: Vec<pb_listener::FilterChain>) -> Vec<pb_listener::FilterChain> {
    let mut out: Vec<pb_listener::FilterChain> = Vec::with_capacity(chains.len());
    for chain in chains {
        if !out.iter().any(|other| other.filter_chain_match == chain.filter_chain_match) {
            out.push(chain);
        }
    }
    out
}

fn tls_applies(request: &TlsMatchAttributes, client: matching::Client<'_>) -> bool {
    let gateway = request.gateways.is_empty() || request.gateways.iter().any(|g| g == "mesh");
    let source = !request.gateways.is_empty()
        || matching::client_matches(&request.source_labels, &request.source_namespace, client.proxy);
    gateway && source && (request.port == 0 || request.port == client.port)
}

fn tcp_applies(request: &L4MatchAttributes, client: matching::Client<'_>) -> bool {
    let gateway = request.gateways.is_empty() || request.gateways.iter().any(|g| g == "mesh");
    let source = !request.gateways.is_empty()
        || matching::client_matches(&request.source_labels, &request.source_namespace, client.proxy);
    gateway && source && (request.port == 0 || request.port == client.port)
}

fn subnets(own: &[String], base: &Matching) -> Vec<IpNet> {
    if own.is_empty() {
        return base.destinations.clone();
    }
    own.iter().filter_map(|subnet| pb::parse_net(subnet)).collect()
}

/// One chain to these destinations, or to the service itself when there are none.
fn chain(
    view: &View<'_>,
    service: &Service,
    port: &ServicePort,
    matching: &Matching,
    destinations: &[RouteDestination],
) -> pb_listener::FilterChain {
    let own = names::outbound_cluster(port.number, "", &service.hostname);
    let clusters: Vec<(String, u32)> = destinations
        .iter()
        .filter_map(|d| {
            let name = route::cluster_name(view, d.destination.as_ref()?, port.number);
            Some((name, u32::try_from(d.weight).unwrap_or_default()))
        })
        .collect();
    let (stat_prefix, specifier) = match clusters.as_slice() {
        [] => (own.clone(), inner::ClusterSpecifier::Cluster(own)),
        [(only, _)] => (only.clone(), inner::ClusterSpecifier::Cluster(only.clone())),
        several => (format!("{}.{}", service.name, port.number), weighted(several)),
    };
    let policy = view.policy(&service.hostname, port.number, "");
    let config = with_policy(
        tcp::TcpProxy {
            stat_prefix,
            access_log: view.client_log.clone(),
            cluster_specifier: Some(specifier),
            ..Default::default()
        },
        &policy,
    );
    pb_listener::FilterChain {
        filter_chain_match: matching.pb(),
        filters: vec![pb::network_filter(TCP_PROXY, &config)],
        ..Default::default()
    }
}

fn weighted(clusters: &[(String, u32)]) -> inner::ClusterSpecifier {
    let clusters = clusters
        .iter()
        .filter(|(_, weight)| *weight > 0)
        .map(|(name, weight)| inner::weighted_cluster::ClusterWeight {
            name: name.clone(),
            weight: *weight,
            metadata_match: None,
        })
        .collect();
    inner::ClusterSpecifier::WeightedClusters(inner::WeightedCluster { clusters })
}

fn with_policy(mut config: tcp::TcpProxy, policy: &Policy<'_>) -> tcp::TcpProxy {
    let settings = policy.connection_pool.and_then(|pool| pool.tcp.as_ref());
    config.idle_timeout = settings.and_then(|tcp| tcp.idle_timeout).map(pb::duration);
    config.max_downstream_connection_duration =
        settings.and_then(|tcp| tcp.max_connection_duration).map(pb::duration);
    if let Some(HashKey::UseSourceIp(true)) = policy.hash_key() {
        config.hash_policy = vec![kind::HashPolicy {
            policy_specifier: Some(kind::hash_policy::PolicySpecifier::SourceIp(
                kind::hash_policy::SourceIp {},
            )),
        }];
    }
    config.tunneling_config = policy.tunnel.map(|tunnel| inner::TunnelingConfig {
        hostname: format!("{}:{}", tunnel.target_host, tunnel.target_port),
        use_post: tunnel.protocol == "POST",
        ..Default::default()
    });
    config
}
