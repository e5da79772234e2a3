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
}

/// Share of the traffic for each priority, and which of them ignore health.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PriorityLoad {
    /// Percent per priority; they add up to 100 when there is any endpoint.
    pub percent: Vec<u32>,
    /// Priorities that are in panic: traffic goes to all of their endpoints.
    pub panic: Vec<bool>,
}

/// Splits traffic over priorities: each takes what its health allows, the rest flows to the next.
///
/// `panic_below` is the percentage of healthy endpoints below which health is ignored; 0 turns panic off.
#[must_use]
pub fn priority_load(levels: &[Level], panic_below: u32, overprovisioning: Option<u32>) -> PriorityLoad {
    let factor = overprovisioning.unwrap_or(DEFAULT_OVERPROVISIONING);
    let health: Vec<u32> = levels.iter().map(|l| scaled_health(*l, factor)).collect();
    let sum: u32 = health.iter().sum::<u32>().min(100);
    let mut left = 100;
    let mut percent: Vec<u32> = Vec::with_capacity(levels.len());
    for h in &health {
        let share = (h * 100).checked_div(sum).unwrap_or(0).min(left);
        left -= share;
        percent.push(share);
    }
    // rounding leaves a few percent: they go to the first priority that carries anything
    if let Some(first) = percent.iter_mut().find(|p| **p > 0) {
        *first += left;
    }
    let total_panic = sum == 0;
    if total_panic && panic_below > 0 {
        spread_over_all(levels, &mut percent);
    }
    let panic = levels
        .iter()
        .map(|l| {
            let low = l.total > 0 && share_of(l.healthy, l.total) < panic_below;
            low && (sum < 100 || total_panic)
        })
        .collect();
    PriorityLoad { percent, panic }
}

fn scaled_health(level: Level, factor: u32) -> u32 {
    (share_of(level.healthy, level.total).saturating_mul(factor) / 100).min(100)
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
    /// The priority for this draw out of 0..100; `None` when nothing can serve.
    #[must_use]
    pub fn choose(&self, draw: u32) -> Option<usize> {
        let mut sum = 0;
        self.percent.iter().position(|p| {
            sum += p;
            draw < sum
        })
    }
}

/// The effective weight of a locality: its weight, scaled down when too few of its endpoints are healthy.
#[must_use]
pub fn locality_weight(weight: u32, level: Level) -> u64 {
    if level.total == 0 {
        return 0;
    }
    u64::from(weight) * u64::from(scaled_health(level, DEFAULT_OVERPROVISIONING))
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

    #[track_caller]
    fn check(levels: &[(usize, usize)], panic_below: u32, percent: &[u32], panic: &[bool]) {
        let levels: Vec<Level> =
            levels.iter().map(|(healthy, total)| Level { total: *total, healthy: *healthy }).collect();
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
