//! The TCP proxy filter.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as pb;

use crate::xds::access_log::{AccessLog, access_logs};
use crate::xds::decode::{Invalid, Under as _, bool_or, timeout, u32_or};
use crate::xds::route::{ClusterNames, ClusterRef};

/// Bytes from here to a cluster and back.
#[derive(Debug)]
pub struct TcpProxy {
    /// The name in its statistics.
    pub stat_prefix: Box<str>,
    /// Where: clusters of the listener's [`ClusterNames`] and the sum of weights up to each.
    pub clusters: Box<[(ClusterRef, u64)]>,
    /// How long nothing may move in either direction; `None`: for ever.
    pub idle_timeout: Option<Duration>,
    /// How long a connection may live.
    pub max_connection_duration: Option<Duration>,
    /// How often a connection is tried.
    pub max_connect_attempts: u32,
    /// Hash the client's address for hash balancers.
    pub hash_source_ip: bool,
    /// Lines about each connection.
    pub access_logs: Arc<[AccessLog]>,
}

impl TcpProxy {
    pub(super) fn new(pb: pb::TcpProxy, names: &mut ClusterNames) -> Result<Self, Invalid> {
        use pb::tcp_proxy::ClusterSpecifier;
        for (set, field) in [
            (pb.on_demand.is_some(), "on_demand"),
            (pb.metadata_match.is_some(), "metadata_match"),
            (pb.tunneling_config.is_some(), "tunneling_config"),
            (pb.backoff_options.is_some(), "backoff_options"),
            (!pb.proxy_protocol_tlvs.is_empty(), "proxy_protocol_tlvs"),
            (pb.upstream_connect_mode != 0, "upstream_connect_mode"),
            (bool_or(pb.check_drain_close, false), "check_drain_close"),
        ] {
            if set {
                return Err(Invalid::unsupported(field));
            }
        }
        let mut total = 0_u64;
        let clusters: Box<[_]> = match pb.cluster_specifier {
            Some(ClusterSpecifier::Cluster(name)) if !name.is_empty() => Box::new([(names.intern(&name), 1)]),
            Some(ClusterSpecifier::WeightedClusters(w)) => w
                .clusters
                .into_iter()
                .map(|c| {
                    if c.metadata_match.is_some() {
                        return Err(Invalid::unsupported("metadata_match"));
                    }
                    if c.weight == 0 || c.name.is_empty() {
                        return Err(Invalid::new("", "needs a name and a weight of 1 or more"));
                    }
                    total += u64::from(c.weight);
                    Ok((names.intern(&c.name), total))
                })
                .enumerate()
                .map(|(i, c)| c.at("weighted_clusters.clusters", i))
                .collect::<Result<_, _>>()?,
            Some(ClusterSpecifier::Cluster(_)) | None => return Err(Invalid::missing("cluster")),
        };
        if clusters.is_empty() {
            return Err(Invalid::missing("weighted_clusters.clusters"));
        }
        let hash_source_ip = pb.hash_policy.iter().any(|h| {
            use envoy_types::pb::envoy::r#type::v3::hash_policy::PolicySpecifier;
            matches!(h.policy_specifier, Some(PolicySpecifier::SourceIp(_)))
        });
        let hour = Some(Duration::from_secs(3600));
        let field = "max_downstream_connection_duration";
        Ok(Self {
            stat_prefix: pb.stat_prefix.into(),
            clusters,
            idle_timeout: timeout(pb.idle_timeout, hour, "idle_timeout")?,
            max_connection_duration: timeout(pb.max_downstream_connection_duration, None, field)?,
            max_connect_attempts: u32_or(pb.max_connect_attempts, 1).max(1),
            hash_source_ip,
            access_logs: access_logs(pb.access_log)?.into(),
        })
    }

    /// The cluster for a random number.
    #[must_use]
    pub fn pick(&self, random: u64) -> Option<ClusterRef> {
        let total = self.clusters.last().map_or(1, |(_, until)| *until);
        let at = random % total;
        self.clusters.iter().find(|(_, until)| at < *until).map(|(cluster, _)| *cluster)
    }
}
