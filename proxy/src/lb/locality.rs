//! Which priority and which locality serve a request: failover by health, and locality weights. Pure.

/// How many times over a partly healthy group still counts as able to carry its whole load (Envoy's 140 %).
const DEFAULT_OVERPROVISIONING: u32 = 140;

/// Health of one priority level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Endpoints in all.
    pub total: usize,
    /// Endpoints that may be used.
    pub healthy: usize,
    /// Endpoints that are used when the healthy ones cannot carry everything.
    pub degraded: usize,
}

/// Share of the traffic for each priority, and which of them ignore health.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PriorityLoad {
    /// Percent per priority for its healthy endpoints; with `degraded` they add up to 100 when any can be used.
    pub percent: Vec<u32>,
    /// Percent per priority for its degraded endpoints.
    pub degraded: Vec<u32>,
    /// Priorities that are in panic: traffic goes to all of their endpoints.
    pub panic: Vec<bool>,
}

/// Splits traffic over priorities: each takes what its health allows, the rest flows to the next, and what no healthy
/// endpoint can take to the degraded ones.
///
/// `panic_below` is the percentage of healthy endpoints below which health is ignored; 0 turns panic off.
#[must_use]
pub fn priority_load(levels: &[Level], panic_below: u32, overprovisioning: Option<u32>) -> PriorityLoad {
    let factor = overprovisioning.unwrap_or(DEFAULT_OVERPROVISIONING);
    let able = |part: fn(&Level) -> usize| levels.iter().map(move |l| scaled(part(l), l.total, factor));
    let (healthy, degraded) = (able(|l| l.healthy), able(|l| l.degraded));
    let sum: u32 = healthy.clone().chain(degraded.clone()).sum::<u32>().min(100);
    let mut left = 100;
    let mut take = |able: u32| {
        let share = (able * 100).checked_div(sum).unwrap_or(0).min(left);
        left -= share;
        share
    };
    let mut percent: Vec<u32> = healthy.map(&mut take).collect();
    let mut degraded: Vec<u32> = degraded.map(&mut take).collect();
    // rounding leaves a few percent: they go to the first that carries anything
    if let Some(first) = percent.iter_mut().chain(&mut degraded).find(|p| **p > 0) {
        *first += left;
    }
    let low = |l: &Level| share_of(l.healthy + l.degraded, l.total) < panic_below;
    if sum < 100 && levels.iter().all(low) {
        spread_over_all(levels, &mut percent);
        degraded.fill(0);
    }
    let panic = levels.iter().map(|l| l.total > 0 && sum < 100 && low(l)).collect();
    PriorityLoad { percent, degraded, panic }
}

fn scaled(part: usize, total: usize, factor: u32) -> u32 {
    (share_of(part, total).saturating_mul(factor) / 100).min(100)
}

fn share_of(part: usize, whole: usize) -> u32 {
    if whole == 0 {
        return 0;
    }
    u32::try_from(part.saturating_mul(100) / whole).unwrap_or(100)
}

fn spread_over_all(levels: &[Level], percent: &mut [u32]) {
    let total: usize = levels.iter().map(|l| l.total).sum();
    let mut left = 100;
    for (p, level) in percent.iter_mut().zip(levels) {
        *p = share_of(level.total, total);
        left -= *p;
    }
    if let Some(first) = percent.iter_mut().find(|p| **p > 0) {
        *first += left;
    }
}

impl PriorityLoad {
    /// The priority for this draw out of 0..100, and whether its degraded endpoints are meant; `None` when nothing can
    /// serve.
    #[must_use]
    pub fn choose(&self, draw: u32) -> Option<(usize, bool)> {
        let mut sum = 0;
        let at = self.percent.iter().chain(&self.degraded).position(|p| {
            sum += p;
            draw < sum
        })?;
        let count = self.percent.len();
        Some(if at < count { (at, false) } else { (at - count, true) })
    }
}

/// The effective weight of a locality: its weight, scaled down when too few of its endpoints are healthy.
#[must_use]
pub fn locality_weight(weight: u32, level: Level) -> u64 {
    if level.total == 0 {
        return 0;
    }
    u64::from(weight) * u64::from(scaled(level.healthy, level.total, DEFAULT_OVERPROVISIONING))
}

/// The weights of endpoints among those of all localities, where the endpoints of each locality share its weight by their
/// own. In whole numbers, as exactly as 32 bits hold them.
#[must_use]
pub fn shared_weights(localities: &[(u32, Vec<u32>)]) -> Vec<u32> {
    let sum = |hosts: &[u32]| hosts.iter().map(|h| u128::from(*h)).sum::<u128>().max(1);
    let common = localities.iter().fold(1_u128, |common, (_, hosts)| {
        let sum = sum(hosts);
        common.saturating_mul(sum / divisor(common, sum))
    });
    let exact: Vec<u128> = localities
        .iter()
        .flat_map(|(weight, hosts)| {
            let each = common / sum(hosts) * u128::from(*weight);
            hosts.iter().map(move |host| each.saturating_mul(u128::from(*host)))
        })
        .collect();
    let whole = exact.iter().fold(0, |whole, weight| divisor(whole, *weight)).max(1);
    let largest = exact.iter().max().copied().unwrap_or(0) / whole;
    let shrink = largest.div_ceil(u128::from(u32::MAX)).max(1);
    exact.into_iter().map(|w| u32::try_from((w / whole / shrink).max(1)).unwrap_or(u32::MAX)).collect()
}

/// The greatest common divisor.
fn divisor(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { divisor(b, a % b) }
}

/// The index whose cumulated weight covers `draw`, a number below the sum of all weights.
#[must_use]
pub fn weighted_index(weights: &[u64], draw: u64) -> Option<usize> {
    let mut sum = 0;
    weights.iter().position(|w| {
        sum += w;
        draw < sum
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(healthy: usize, degraded: usize, total: usize) -> Level {
        Level { total, healthy, degraded }
    }

    #[track_caller]
    fn check(levels: &[(usize, usize)], panic_below: u32, percent: &[u32], panic: &[bool]) {
        let levels: Vec<Level> = levels.iter().map(|(healthy, total)| level(*healthy, 0, *total)).collect();
        let got = priority_load(&levels, panic_below, None);
        assert_eq!((got.percent.as_slice(), got.panic.as_slice()), (percent, panic), "{levels:?}");
    }

    #[test]
    fn a_healthy_first_priority_takes_all() {
        check(&[(10, 10), (10, 10)], 50, &[100, 0], &[false, false]);
        check(&[(72, 100), (10, 10)], 50, &[100, 0], &[false, false]);
    }

    #[test]
    fn what_the_first_cannot_carry_flows_to_the_next() {
        check(&[(50, 100), (10, 10)], 50, &[70, 30], &[false, false]);
        check(&[(0, 10), (10, 10)], 50, &[0, 100], &[false, false]);
    }

    #[test]
    fn when_nothing_is_healthy_panic_decides() {
        check(&[(0, 10)], 50, &[100], &[true]);
        check(&[(0, 10)], 0, &[0], &[false]);
        check(&[(0, 5), (0, 5)], 50, &[50, 50], &[true, true]);
    }

    #[test]
    fn all_share_when_every_priority_is_ill() {
        check(&[(1, 3), (0, 1)], 50, &[75, 25], &[true, true]);
        check(&[(1, 3), (1, 1)], 50, &[46, 54], &[false, false]);
    }

    #[test]
    fn degraded_endpoints_take_what_healthy_ones_cannot() {
        let load = priority_load(&[level(1, 1, 2)], 50, None);
        assert_eq!((load.percent.as_slice(), load.degraded.as_slice()), ([70].as_slice(), [30].as_slice()));
        assert_eq!((load.choose(69), load.choose(70)), (Some((0, false)), Some((0, true))));
        let load = priority_load(&[level(3, 1, 4)], 50, None);
        assert_eq!((load.percent.as_slice(), load.degraded.as_slice()), ([100].as_slice(), [0].as_slice()));
        let load = priority_load(&[level(0, 2, 2), level(1, 0, 1)], 50, None);
        assert_eq!(
            (load.percent.as_slice(), load.degraded.as_slice()),
            ([0, 100].as_slice(), [0, 0].as_slice())
        );
    }

    #[test]
    fn endpoints_share_the_weight_of_their_locality() {
        assert_eq!(shared_weights(&[(80, vec![1]), (20, vec![1]), (20, vec![1])]), [4, 1, 1]);
        assert_eq!(shared_weights(&[(50, vec![1, 3]), (50, vec![1])]), [1, 3, 4]);
        let large = shared_weights(&[(u32::MAX, vec![1]), (u32::MAX - 1, vec![1, 1])]);
        assert_eq!(large, [u32::MAX, u32::MAX / 2, u32::MAX / 2]);
    }

    #[test]
    fn an_absent_priority_carries_nothing() {
        check(&[], 50, &[], &[]);
        assert_eq!(priority_load(&[], 50, None).choose(3), None);
    }

    #[test]
    fn draws_fall_by_weight() {
        assert_eq!(weighted_index(&[2, 0, 3], 1), Some(0));
        assert_eq!(weighted_index(&[2, 0, 3], 2), Some(2));
        assert_eq!(weighted_index(&[2, 0, 3], 5), None);
    }
}
