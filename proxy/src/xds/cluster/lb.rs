//! How an endpoint is picked.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::load_balancing_policies as policy;

use crate::xds::decode::{Invalid, Under as _, is, timeout, u32_or, unpack};

/// How an endpoint is picked.
#[derive(Debug, Clone, PartialEq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin {
        /// New endpoints start with less.
        slow_start: Option<SlowStart>,
    },
    /// The one with the fewest open requests of a few chosen by chance.
    LeastRequest {
        /// Of how many.
        choices: u32,
        /// With unequal weights: how much open requests count.
        active_request_bias: f64,
        /// New endpoints start with less.
        slow_start: Option<SlowStart>,
    },
    /// By chance.
    Random,
    /// A hash ring.
    RingHash {
        /// Fewest points on the ring.
        min_size: u64,
        /// Most points on the ring.
        max_size: u64,
    },
    /// A Maglev table.
    Maglev {
        /// Its size, a prime number.
        table_size: u64,
    },
    /// As the discovery type says (original destination).
    ClusterProvided,
}

/// New endpoints start with less than their share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// For how long.
    pub window: Duration,
    /// How fast the share grows.
    pub aggression: f64,
    /// What they start with, in percent.
    pub min_weight_percent: f64,
}

/// What holds for every way of picking.
#[derive(Debug, Clone, PartialEq)]
pub struct LbCommon {
    /// Below this share of healthy endpoints (percent) health is not looked at any more; 0: never.
    pub panic_threshold: f64,
    /// Localities are picked by their weights.
    pub locality_weighted: bool,
    /// Hash host names, not addresses.
    pub hash_hostname: bool,
    /// Endpoints that were not checked yet do not count when health is weighed.
    pub ignore_unchecked: bool,
}

impl Default for LbCommon {
    fn default() -> Self {
        Self {
            panic_threshold: 50.0,
            locality_weighted: false,
            hash_hostname: false,
            ignore_unchecked: false,
        }
    }
}

fn slow_start(
    window: Option<envoy_types::pb::google::protobuf::Duration>,
    aggression: Option<core::RuntimeDouble>,
    min_weight: Option<envoy_types::pb::envoy::r#type::v3::Percent>,
) -> Result<Option<SlowStart>, Invalid> {
    Ok(timeout(window, None, "slow_start_window").under("slow_start_config")?.map(|window| SlowStart {
        window,
        aggression: aggression.map_or(1.0, |a| a.default_value),
        min_weight_percent: min_weight.map_or(10.0, |p| p.value),
    }))
}

pub(super) fn lb_policy(pb: &pb::Cluster, common: &mut LbCommon) -> Result<LbPolicy, Invalid> {
    use pb::cluster::{LbConfig, LbPolicy as Pb};
    if let Some(policy) = &pb.load_balancing_policy {
        return extension_policy(policy, common, 4).under("load_balancing_policy");
    }
    Ok(match Pb::try_from(pb.lb_policy) {
        Ok(Pb::RoundRobin) => LbPolicy::RoundRobin {
            slow_start: match &pb.lb_config {
                Some(LbConfig::RoundRobinLbConfig(c)) => match c.slow_start_config.clone() {
                    Some(s) => slow_start(s.slow_start_window, s.aggression, s.min_weight_percent)?,
                    None => None,
                },
                _ => None,
            },
        },
        Ok(Pb::LeastRequest) => match &pb.lb_config {
            Some(LbConfig::LeastRequestLbConfig(c)) => LbPolicy::LeastRequest {
                choices: u32_or(c.choice_count, 2).max(2),
                active_request_bias: c.active_request_bias.as_ref().map_or(1.0, |b| b.default_value),
                slow_start: match c.slow_start_config.clone() {
                    Some(s) => slow_start(s.slow_start_window, s.aggression, s.min_weight_percent)?,
                    None => None,
                },
            },
            _ => LbPolicy::LeastRequest { choices: 2, active_request_bias: 1.0, slow_start: None },
        },
        Ok(Pb::Random) => LbPolicy::Random,
        Ok(Pb::RingHash) => {
            let (min, max) = match &pb.lb_config {
                Some(LbConfig::RingHashLbConfig(c)) if c.hash_function != 0 => {
                    return Err(Invalid::unsupported("ring_hash_lb_config.hash_function"));
                }
                Some(LbConfig::RingHashLbConfig(c)) => (c.minimum_ring_size, c.maximum_ring_size),
                _ => (None, None),
            };
            ring_hash(min.map(|n| n.value), max.map(|n| n.value))?
        }
        Ok(Pb::Maglev) => match &pb.lb_config {
            Some(LbConfig::MaglevLbConfig(c)) => maglev(c.table_size.map(|n| n.value))?,
            _ => maglev(None)?,
        },
        Ok(Pb::ClusterProvided) => LbPolicy::ClusterProvided,
        Ok(Pb::LoadBalancingPolicyConfig) => return Err(Invalid::missing("load_balancing_policy")),
        Err(_) => return Err(Invalid::new("lb_policy", format!("unknown value {}", pb.lb_policy))),
    })
}

fn ring_hash(min: Option<u64>, max: Option<u64>) -> Result<LbPolicy, Invalid> {
    const MOST: u64 = 8 << 20;
    let (min_size, max_size) = (min.unwrap_or(1024), max.unwrap_or(MOST));
    if min_size > max_size || max_size > MOST || min_size == 0 {
        let reason = format!("ring sizes from {min_size} to {max_size} are not within 1 to {MOST}");
        return Err(Invalid::new("ring_hash_lb_config", reason));
    }
    Ok(LbPolicy::RingHash { min_size, max_size })
}

fn maglev(table_size: Option<u64>) -> Result<LbPolicy, Invalid> {
    let table_size = table_size.unwrap_or(65_537);
    let prime =
        table_size > 1 && (2..).take_while(|d| d * d <= table_size).all(|d| !table_size.is_multiple_of(d));
    if table_size > 5_000_011 || !prime {
        return Err(Invalid::new("table_size", format!("{table_size} is not a prime number up to 5000011")));
    }
    Ok(LbPolicy::Maglev { table_size })
}

/// The first policy of the list that this proxy has, as Envoy reads it.
fn extension_policy(
    pb: &pb::LoadBalancingPolicy,
    common: &mut LbCommon,
    depth: u8,
) -> Result<LbPolicy, Invalid> {
    let Some(depth) = depth.checked_sub(1) else { return Err(Invalid::new("", "nested too deep")) };
    let configs = pb.policies.iter().filter_map(|p| p.typed_extension_config.as_ref()?.typed_config.as_ref());
    for any in configs {
        if is::<policy::round_robin::v3::RoundRobin>(any) {
            let c: policy::round_robin::v3::RoundRobin = unpack(any)?;
            let s = c.slow_start_config.unwrap_or_default();
            let slow_start = slow_start(s.slow_start_window, s.aggression, s.min_weight_percent)?;
            return Ok(LbPolicy::RoundRobin { slow_start });
        } else if is::<policy::least_request::v3::LeastRequest>(any) {
            let c: policy::least_request::v3::LeastRequest = unpack(any)?;
            let s = c.slow_start_config.unwrap_or_default();
            return Ok(LbPolicy::LeastRequest {
                choices: u32_or(c.choice_count, 2).max(2),
                active_request_bias: c.active_request_bias.map_or(1.0, |b| b.default_value),
                slow_start: slow_start(s.slow_start_window, s.aggression, s.min_weight_percent)?,
            });
        } else if is::<policy::random::v3::Random>(any) {
            return Ok(LbPolicy::Random);
        } else if is::<policy::ring_hash::v3::RingHash>(any) {
            let c: policy::ring_hash::v3::RingHash = unpack(any)?;
            return ring_hash(c.minimum_ring_size.map(|n| n.value), c.maximum_ring_size.map(|n| n.value));
        } else if is::<policy::maglev::v3::Maglev>(any) {
            let c: policy::maglev::v3::Maglev = unpack(any)?;
            return maglev(c.table_size.map(|n| n.value));
        } else if is::<policy::cluster_provided::v3::ClusterProvided>(any) {
            return Ok(LbPolicy::ClusterProvided);
        } else if is::<policy::wrr_locality::v3::WrrLocality>(any) {
            let c: policy::wrr_locality::v3::WrrLocality = unpack(any)?;
            common.locality_weighted = true;
            let inner =
                c.endpoint_picking_policy.ok_or_else(|| Invalid::missing("endpoint_picking_policy"))?;
            return extension_policy(&inner, common, depth).under("endpoint_picking_policy");
        }
    }
    Err(Invalid::new("policies", "none of them is one this proxy has"))
}

pub(super) fn lb_common(pb: Option<pb::cluster::CommonLbConfig>) -> Result<LbCommon, Invalid> {
    use pb::cluster::common_lb_config::LocalityConfigSpecifier as Locality;
    let Some(pb) = pb else { return Ok(LbCommon::default()) };
    if pb.override_host_status.is_some() {
        return Err(Invalid::unsupported("override_host_status"));
    }
    // Zone awareness needs a local cluster, which a bootstrap of ours never names; Envoy ignores it then, too.
    let locality_weighted =
        matches!(pb.locality_config_specifier, Some(Locality::LocalityWeightedLbConfig(_)));
    let hashing = pb.consistent_hashing_lb_config.unwrap_or_default();
    if u32_or(hashing.hash_balance_factor, 0) > 0 {
        return Err(Invalid::unsupported("consistent_hashing_lb_config.hash_balance_factor"));
    }
    if pb.close_connections_on_host_set_change {
        return Err(Invalid::unsupported("close_connections_on_host_set_change"));
    }
    Ok(LbCommon {
        panic_threshold: pb.healthy_panic_threshold.map_or(50.0, |p| p.value),
        locality_weighted,
        hash_hostname: hashing.use_hostname_for_hashing,
        ignore_unchecked: pb.ignore_new_hosts_until_first_hc,
    })
}
