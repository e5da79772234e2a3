//! The traffic policy of one port of one subset: what a `DestinationRule` says, block by block, and what the mesh
//! says where it is silent.

use registry::model::mesh::MeshConfig;
use registry::model::traffic::{
    ClientTlsSettings, ConnectionPoolSettings, DestinationRule, HashKey, LbPolicy, LoadBalancerSettings,
    OutlierDetection, ProxyProtocol, RetryBudget, TrafficPolicy, TunnelSettings,
};

/// The blocks that hold.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Policy<'a> {
    pub(super) load_balancer: Option<&'a LoadBalancerSettings>,
    pub(super) connection_pool: Option<&'a ConnectionPoolSettings>,
    pub(super) outlier_detection: Option<&'a OutlierDetection>,
    pub(super) tls: Option<&'a ClientTlsSettings>,
    pub(super) tunnel: Option<&'a TunnelSettings>,
    pub(super) proxy_protocol: Option<&'a ProxyProtocol>,
    pub(super) retry_budget: Option<&'a RetryBudget>,
}

impl<'a> Policy<'a> {
    /// The policy for `port` of `subset` (empty for the whole host).
    pub(super) fn new(
        rule: Option<&'a DestinationRule>,
        mesh: &'a MeshConfig,
        port: u16,
        subset: &str,
    ) -> Self {
        let of_host = rule.and_then(|rule| rule.traffic_policy.as_ref());
        let of_subset = rule
            .and_then(|rule| rule.subsets.iter().find(|s| !subset.is_empty() && s.name == subset))
            .and_then(|subset| subset.traffic_policy.as_ref());
        let mut out = Self::default().overlaid(of_host, port).overlaid(of_subset, port);
        if let Some(default) = &mesh.default_traffic_policy {
            out.connection_pool = out.connection_pool.or(default.connection_pool.as_ref());
            out.outlier_detection = out.outlier_detection.or(default.outlier_detection.as_ref());
        }
        out
    }

    /// Blocks of `policy` replace ours. Settings for the port replace everything: a block they leave out falls to its
    /// default, not to the parent's.
    fn overlaid(self, policy: Option<&'a TrafficPolicy>, port: u16) -> Self {
        let Some(policy) = policy else { return self };
        let of_port = policy
            .port_level_settings
            .iter()
            .find(|settings| settings.port.as_ref().is_some_and(|p| p.number == port));
        if let Some(settings) = of_port {
            return Self {
                load_balancer: settings.load_balancer.as_ref(),
                connection_pool: settings.connection_pool.as_ref(),
                outlier_detection: settings.outlier_detection.as_ref(),
                tls: settings.tls.as_ref(),
                ..Self::default()
            };
        }
        Self {
            load_balancer: policy.load_balancer.as_ref().or(self.load_balancer),
            connection_pool: policy.connection_pool.as_ref().or(self.connection_pool),
            outlier_detection: policy.outlier_detection.as_ref().or(self.outlier_detection),
            tls: policy.tls.as_ref().or(self.tls),
            tunnel: policy.tunnel.as_ref().or(self.tunnel),
            proxy_protocol: policy.proxy_protocol.as_ref().or(self.proxy_protocol),
            retry_budget: policy.retry_budget.as_ref().or(self.retry_budget),
        }
    }

    /// By what requests are kept on one endpoint, if they are.
    pub(super) fn hash_key(&self) -> Option<&'a HashKey> {
        match self.load_balancer?.lb_policy.as_ref()? {
            LbPolicy::ConsistentHash(hash) => hash.hash_key.as_ref(),
            LbPolicy::Simple(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use registry::model::traffic::{PortSelector, PortTrafficPolicy, Subset};

    fn pool() -> Option<ConnectionPoolSettings> {
        Some(ConnectionPoolSettings::default())
    }

    fn outlier() -> Option<OutlierDetection> {
        Some(OutlierDetection::default())
    }

    #[test]
    fn settings_for_a_port_replace_the_whole_policy() {
        let rule = DestinationRule {
            traffic_policy: Some(TrafficPolicy {
                connection_pool: pool(),
                outlier_detection: outlier(),
                port_level_settings: vec![PortTrafficPolicy {
                    port: Some(PortSelector { number: 80 }),
                    connection_pool: pool(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        };
        let mesh = MeshConfig::default();
        let of = |port| Policy::new(Some(&rule), &mesh, port, "");
        assert!(of(80).connection_pool.is_some() && of(80).outlier_detection.is_none());
        assert!(of(81).connection_pool.is_some() && of(81).outlier_detection.is_some());
    }

    #[test]
    fn a_subset_replaces_block_by_block() {
        let rule = DestinationRule {
            traffic_policy: Some(TrafficPolicy { connection_pool: pool(), ..Default::default() }),
            subsets: vec![Subset {
                name: "v1".to_owned(),
                traffic_policy: Some(TrafficPolicy { outlier_detection: outlier(), ..Default::default() }),
                ..Default::default()
            }],
            ..Default::default()
        };
        let mesh = MeshConfig::default();
        let v1 = Policy::new(Some(&rule), &mesh, 80, "v1");
        assert!(v1.connection_pool.is_some() && v1.outlier_detection.is_some());
        assert!(Policy::new(Some(&rule), &mesh, 80, "").outlier_detection.is_none());
    }
}
