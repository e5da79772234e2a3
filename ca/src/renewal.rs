//! When to renew a leaf, and when to try again: a pure schedule.
//!
//! A leaf is renewed at half of the time that was left when it was obtained, give or take one per cent, so that
//! workloads started together do not renew together. A failed attempt is repeated with growing pauses. The schedule
//! never ends: after expiry it goes on trying.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What time it is: the one clock of each program, passed to whatever needs it.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Pause after the first failure.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Shortest time between an answer and the next request, however short leaves are.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);

/// When a leaf was obtained and when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// When it was obtained.
    pub obtained_at: SystemTime,
    /// Last moment at which it is valid.
    pub not_after: SystemTime,
}

impl Validity {
    fn lifetime(self) -> Duration {
        self.not_after.duration_since(self.obtained_at).unwrap_or_default()
    }
}

/// What to prove one's identity with in the next request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// The certificate that it had until it ended, or else what the workload was given to join with.
    Initial,
    /// The certificate it has.
    Certificate,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Ask for a certificate now.
    Request(Credential),
    /// Nothing before this moment.
    Wait(SystemTime),
    /// The authority has refused for good, and there is no certificate to fall back on.
    GiveUp,
}

/// The schedule of one leaf and its successors.
#[derive(Debug)]
pub struct Schedule {
    leaf: Option<Validity>,
    next: SystemTime,
    failures: u32,
    refused: bool,
}

impl Schedule {
    /// Begins with the leaf that was found on disk, if any.
    pub fn new(leaf: Option<Validity>, now: SystemTime, rng: &mut fastrand::Rng) -> Self {
        let leaf = leaf.filter(|leaf| now < leaf.not_after);
        let next = leaf.map_or(now, |leaf| renew_at(leaf, rng));
        Self { leaf, next, failures: 0, refused: false }
    }

    /// What is to be done at `now`.
    #[must_use]
    pub fn step(&self, now: SystemTime) -> Step {
        if self.refused && self.leaf.is_none() {
            return Step::GiveUp;
        }
        if now < self.next {
            return Step::Wait(self.next);
        }
        match self.leaf {
            Some(leaf) if now < leaf.not_after => Step::Request(Credential::Certificate),
            Some(_) | None => Step::Request(Credential::Initial),
        }
    }

    /// The request was answered.
    pub fn on_obtained(&mut self, leaf: Validity, rng: &mut fastrand::Rng) {
        *self = Self { leaf: Some(leaf), next: renew_at(leaf, rng), failures: 0, refused: false };
    }

    /// The request failed at `now`; `refused` when trying again cannot help.
    pub fn on_failed(&mut self, refused: bool, now: SystemTime, rng: &mut fastrand::Rng) {
        self.refused = refused;
        let most =
            self.leaf.map_or(LONGEST_PAUSE, |leaf| leaf.lifetime() / 10).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(10)).min(most);
        self.failures = self.failures.saturating_add(1);
        self.next = now + pause.mul_f64(0.5 + rng.f64() / 2.0);
    }
}

/// Half of the lifetime after the leaf was obtained, give or take one per cent of the lifetime.
fn renew_at(leaf: Validity, rng: &mut fastrand::Rng) -> SystemTime {
    let share = 0.49 + rng.f64() * 0.02;
    leaf.obtained_at + leaf.lifetime().mul_f64(share).max(SHORTEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    const DAY: Duration = Duration::from_secs(86_400);

    fn leaf(from: u64, lifetime: Duration) -> Validity {
        let obtained_at = UNIX_EPOCH + Duration::from_secs(from);
        Validity { obtained_at, not_after: obtained_at + lifetime }
    }

    #[test]
    fn renewed_at_half_life_give_or_take_one_per_cent() {
        let mut earliest = 1.0_f64;
        let mut latest = 0.0_f64;
        for seed in 0..2_000 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let leaf = leaf(1_000_000, DAY);
            let Step::Wait(at) = Schedule::new(Some(leaf), leaf.obtained_at, &mut rng).step(leaf.obtained_at)
            else {
                panic!("a fresh leaf is not renewed at once");
            };
            let share = at.duration_since(leaf.obtained_at).unwrap().as_secs_f64() / DAY.as_secs_f64();
            assert!((0.49..=0.51).contains(&share), "seed {seed}: {share}");
            earliest = earliest.min(share);
            latest = latest.max(share);
        }
        assert!(earliest < 0.491 && latest > 0.509, "jitter is used: {earliest} {latest}");
    }

    #[test]
    fn the_certificate_is_the_credential_until_it_ends() {
        let mut rng = fastrand::Rng::with_seed(1);
        let leaf = leaf(1_000_000, DAY);
        let schedule = Schedule::new(Some(leaf), leaf.obtained_at, &mut rng);
        let at = |share: f64| schedule.step(leaf.obtained_at + DAY.mul_f64(share));
        assert!(matches!(at(0.4), Step::Wait(_)));
        assert_eq!(at(0.6), Step::Request(Credential::Certificate));
        assert_eq!(at(0.999), Step::Request(Credential::Certificate));
        assert_eq!(at(1.0), Step::Request(Credential::Initial));
        assert_eq!(at(9.0), Step::Request(Credential::Initial), "it never stops trying");
    }

    #[test]
    fn an_expired_leaf_from_disk_counts_as_none() {
        let mut rng = fastrand::Rng::with_seed(1);
        let leaf = leaf(1_000_000, DAY);
        let now = leaf.not_after;
        let mut schedule = Schedule::new(Some(leaf), now, &mut rng);
        assert_eq!(schedule.step(now), Step::Request(Credential::Initial));
        schedule.on_failed(true, now, &mut rng);
        assert_eq!(schedule.step(now), Step::GiveUp);
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let mut schedule = Schedule::new(None, now, &mut rng);
        let mut pauses = Vec::new();
        for _ in 0..40 {
            assert_eq!(schedule.step(now), Step::Request(Credential::Initial));
            schedule.on_failed(false, now, &mut rng);
            let Step::Wait(at) = schedule.step(now) else { panic!("a pause follows a failure") };
            pauses.push(at.duration_since(now).unwrap());
            now = at;
        }
        assert!(pauses[0] <= FIRST_PAUSE);
        assert!(pauses.iter().all(|pause| *pause <= LONGEST_PAUSE));
        assert!(pauses[20..].iter().all(|pause| *pause >= LONGEST_PAUSE / 2));
    }

    #[test]
    fn a_short_leaf_is_tried_again_often_enough_to_survive() {
        let mut rng = fastrand::Rng::with_seed(7);
        let leaf = leaf(1_000_000, Duration::from_secs(20));
        let mut schedule = Schedule::new(Some(leaf), leaf.obtained_at, &mut rng);
        let mut now = leaf.obtained_at;
        let mut attempts = 0;
        while now < leaf.not_after {
            match schedule.step(now) {
                Step::Wait(at) => now = at,
                Step::Request(_) => {
                    attempts += 1;
                    schedule.on_failed(true, now, &mut rng);
                }
                Step::GiveUp => panic!("a refusal while the leaf is valid is no reason to stop"),
            }
        }
        assert!(attempts >= 5, "{attempts}");
    }

    #[test]
    fn success_ends_the_pauses() {
        let mut rng = fastrand::Rng::with_seed(7);
        let first = leaf(1_000_000, DAY);
        let mut schedule = Schedule::new(None, first.obtained_at, &mut rng);
        schedule.on_failed(true, first.obtained_at, &mut rng);
        schedule.on_obtained(first, &mut rng);
        let Step::Wait(at) = schedule.step(first.obtained_at) else { panic!("waits") };
        assert!(at > first.obtained_at + DAY / 3);
    }
}
