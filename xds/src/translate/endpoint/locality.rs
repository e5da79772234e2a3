//! Endpoints by locality: groups, weights and failover priorities (Istio, "Locality Load Balancing").

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb_endpoint;
use registry::model::service::{Endpoint, Locality};

use super::{Member, pb};
use crate::proxy::Proxy;

/// How load is spread over localities.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::translate) struct Spread<'a> {
    /// Shares per locality pattern, for clients where this proxy runs; endpoints elsewhere get nothing.
    pub(in crate::translate) distribute: Option<&'a BTreeMap<String, u32>>,
    /// Nearer endpoints first. Only sensible with outlier detection, which notices that they fail.
    pub(in crate::translate) failover: bool,
    /// The region that takes over when this proxy's own fails.
    pub(in crate::translate) failover_to: Option<&'a str>,
    /// Labels (`key` or `key=value`), in the order of their importance, which an endpoint shares with this proxy.
    pub(in crate::translate) failover_priority: &'a [String],
}

/// Groups members by priority and locality.
pub(super) fn groups(
    members: Vec<Member<'_>>,
    spread: &Spread<'_>,
    proxy: &Proxy,
) -> Vec<pb_endpoint::LocalityLbEndpoints> {
    let mut groups: BTreeMap<(u32, &Locality), Vec<pb_endpoint::LbEndpoint>> = BTreeMap::new();
    for member in members {
        let priority = priority(member.endpoint, spread, proxy);
        groups.entry((priority, &member.endpoint.locality)).or_default().push(member.lb);
    }
    let mut levels: Vec<u32> = groups.keys().map(|(priority, _)| *priority).collect();
    levels.dedup();
    let total_weights = totals(&groups);
    groups
        .into_iter()
        .filter_map(|((priority, locality), lb_endpoints)| {
            let weight = match spread.distribute {
                None => sum(&lb_endpoints),
                Some(shares) => share(shares, locality, &total_weights, sum(&lb_endpoints))?,
            };
            let level = levels.iter().position(|l| *l == priority).unwrap_or_default();
            Some(pb_endpoint::LocalityLbEndpoints {
                locality: Some(core_locality(locality)),
                load_balancing_weight: pb::u32v(weight),
                priority: u32::try_from(level).unwrap_or_default(),
                lb_endpoints,
                ..Default::default()
            })
        })
        .collect()
}

fn sum(endpoints: &[pb_endpoint::LbEndpoint]) -> u32 {
    endpoints
        .iter()
        .filter_map(|e| e.load_balancing_weight)
        .fold(0_u32, |sum, w| sum.saturating_add(w.value))
        .max(1)
}

fn totals(groups: &BTreeMap<(u32, &Locality), Vec<pb_endpoint::LbEndpoint>>) -> Vec<(Locality, u32)> {
    groups.iter().map(|((_, locality), endpoints)| ((*locality).clone(), sum(endpoints))).collect()
}

/// The share of one locality: that of the most specific pattern which covers it, divided among the localities that
/// the same pattern covers in proportion to their endpoints.
fn share(
    shares: &BTreeMap<String, u32>,
    locality: &Locality,
    totals: &[(Locality, u32)],
    own: u32,
) -> Option<u32> {
    let best = best_pattern(shares, locality)?;
    let among: u64 = totals
        .iter()
        .filter(|(other, _)| best_pattern(shares, other) == Some(best))
        .map(|(_, weight)| u64::from(*weight))
        .sum();
    let weight = u64::from(*shares.get(best)?) * u64::from(own) * 100 / among.max(1);
    u32::try_from(weight).ok().filter(|w| *w > 0)
}

fn best_pattern<'a>(shares: &'a BTreeMap<String, u32>, locality: &Locality) -> Option<&'a str> {
    shares
        .keys()
        .filter(|pattern| covers(pattern, locality))
        .max_by_key(|p| specificity(p))
        .map(String::as_str)
}

fn specificity(pattern: &str) -> usize {
    pattern.split('/').filter(|part| *part != "*").count()
}

/// Whether `region/zone/subzone`, in which `*` stands for anything and missing parts too, covers a locality.
pub(in crate::translate) fn covers(pattern: &str, locality: &Locality) -> bool {
    let parts = [&locality.region, &locality.zone, &locality.subzone];
    pattern.split('/').zip(parts).all(|(wanted, found)| wanted == "*" || wanted == found)
}

/// Lower is nearer; made dense by the caller.
fn priority(endpoint: &Endpoint, spread: &Spread<'_>, proxy: &Proxy) -> u32 {
    if !spread.failover {
        return 0;
    }
    let by_labels = by_labels(endpoint, spread.failover_priority, proxy);
    if spread.failover_priority.is_empty() || spread.failover_to.is_some() {
        by_labels * 5 + by_locality(&endpoint.locality, spread.failover_to, &proxy.locality)
    } else {
        by_labels
    }
}

fn by_locality(endpoint: &Locality, failover_to: Option<&str>, proxy: &Locality) -> u32 {
    if endpoint.region != proxy.region {
        return if failover_to.is_some_and(|to| to != endpoint.region) { 4 } else { 3 };
    }
    match (endpoint.zone == proxy.zone, endpoint.subzone == proxy.subzone) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => 2,
    }
}

fn by_labels(endpoint: &Endpoint, keys: &[String], proxy: &Proxy) -> u32 {
    let matching = keys
        .iter()
        .take_while(|key| {
            let (key, wanted) = match key.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (key.as_str(), label(key, &proxy.labels, &proxy.locality)),
            };
            label(key, &endpoint.labels, &endpoint.locality) == wanted
        })
        .count();
    u32::try_from(keys.len() - matching).unwrap_or_default()
}

/// A label, or the locality where a node's topology labels would tell it.
fn label<'a>(key: &str, labels: &'a BTreeMap<String, String>, locality: &'a Locality) -> Option<&'a str> {
    let value = labels.get(key).map(String::as_str);
    value.or(match key {
        "topology.kubernetes.io/region" => Some(locality.region.as_str()),
        "topology.kubernetes.io/zone" => Some(locality.zone.as_str()),
        "topology.istio.io/subzone" => Some(locality.subzone.as_str()),
        _ => None,
    })
}

fn core_locality(locality: &Locality) -> core::Locality {
    core::Locality {
        region: locality.region.clone(),
        zone: locality.zone.clone(),
        sub_zone: locality.subzone.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_locality_has_the_lower_priority() {
        let here = Locality::parse("eu/eu-1/a");
        let of = |text, to| by_locality(&Locality::parse(text), to, &here);
        assert_eq!(["eu/eu-1/a", "eu/eu-1/b", "eu/eu-2/a", "us/us-1/a"].map(|l| of(l, None)), [0, 1, 2, 3]);
        assert_eq!(of("us/us-1/a", Some("us")), 3);
        assert_eq!(of("ap/ap-1/a", Some("us")), 4);
    }

    #[test]
    fn locality_patterns_cover_what_they_leave_open() {
        let here = Locality::parse("eu/eu-1/a");
        assert!(covers("eu/*", &here));
        assert!(covers("eu", &here));
        assert!(covers("*", &here));
        assert!(!covers("eu/eu-2/*", &here));
    }
}
