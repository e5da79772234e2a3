//! How often one caller may call: a bucket of tokens for each (pure; time is an argument).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The most callers that have a bucket of their own. Full means many callers at once: the rest share one.
const MOST: usize = 4096;

/// The name of the bucket that callers without one share.
const SHARED: &str = "";

/// How fast a bucket fills, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Calls in a second, on average.
    pub per_second: u32,
    /// Calls at once after a pause.
    pub burst: u32,
}

impl Default for Rate {
    fn default() -> Self {
        Self { per_second: 1000, burst: 2000 }
    }
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Thousandths of a call that are left.
    millis: u64,
    at: Instant,
}

/// How often callers may call, and how often one address may present something wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Calls of one caller, or from one address without one.
    pub calls: Rate,
    /// Wrong credentials from one address. Who guesses is slowed down long before there is anything to find.
    pub guesses: Rate,
}

impl Default for Rates {
    fn default() -> Self {
        Self { calls: Rate::default(), guesses: Rate { per_second: 5, burst: 50 } }
    }
}

/// The buckets of all callers.
#[derive(Debug)]
pub struct Buckets {
    rate: Rate,
    by: BTreeMap<String, Bucket>,
}

impl Buckets {
    /// No bucket yet: each begins full.
    #[must_use]
    pub fn new(rate: Rate) -> Self {
        Self { rate, by: BTreeMap::new() }
    }

    /// Takes one call of `caller`'s.
    ///
    /// # Errors
    ///
    /// How long to wait until there is one.
    pub fn take(&mut self, caller: &str, now: Instant) -> Result<(), Duration> {
        let caller = if self.by.contains_key(caller) || self.has_room(now) { caller } else { SHARED };
        let full = u64::from(self.rate.burst) * 1000;
        let rate = u64::from(self.rate.per_second).max(1);
        let bucket = self.by.entry(caller.to_owned()).or_insert(Bucket { millis: full, at: now });
        *bucket = filled(*bucket, rate, full, now);
        match bucket.millis.checked_sub(1000) {
            Some(left) => {
                bucket.millis = left;
                Ok(())
            }
            None => Err(Duration::from_millis((1000 - bucket.millis).div_ceil(rate))),
        }
    }

    /// Full buckets say nothing that a new one would not.
    fn has_room(&mut self, now: Instant) -> bool {
        if self.by.len() < MOST {
            return true;
        }
        let (full, rate) = (u64::from(self.rate.burst) * 1000, u64::from(self.rate.per_second).max(1));
        self.by.retain(|_, bucket| filled(*bucket, rate, full, now).millis < full);
        self.by.len() < MOST
    }
}

/// The bucket at `now`: a call per second is a thousandth of a call per millisecond.
fn filled(bucket: Bucket, rate: u64, full: u64, now: Instant) -> Bucket {
    let passed = now.saturating_duration_since(bucket.at);
    let passed = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
    if passed == 0 {
        return bucket;
    }
    let millis = bucket.millis.saturating_add(passed.saturating_mul(rate)).min(full);
    Bucket { millis, at: bucket.at + Duration::from_millis(passed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets() -> (Buckets, Instant) {
        (Buckets::new(Rate { per_second: 10, burst: 3 }), tokio::time::Instant::now().into_std())
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let (mut buckets, start) = buckets();
        assert!((0..3).all(|_| buckets.take("a", start).is_ok()));
        assert_eq!(buckets.take("a", start), Err(Duration::from_millis(100)));
        assert!(buckets.take("b", start).is_ok(), "another caller is not held up");
        let later = start + Duration::from_secs(1);
        assert_eq!((0..10).filter(|_| buckets.take("a", later).is_ok()).count(), 3, "no more than the burst");
        let steady = (1..=100).filter(|n| buckets.take("a", later + Duration::from_millis(n * 50)).is_ok());
        assert_eq!(steady.count(), 50);
    }

    #[test]
    fn time_that_goes_in_small_steps_is_not_lost() {
        let (mut buckets, start) = buckets();
        (0..3).for_each(|_| buckets.take("a", start).unwrap());
        let refused = (1..100).all(|n| buckets.take("a", start + Duration::from_micros(n * 999)).is_err());
        assert!(refused && buckets.take("a", start + Duration::from_millis(101)).is_ok());
    }

    #[test]
    fn many_callers_share_a_bucket_and_memory_is_bounded() {
        let (mut buckets, start) = buckets();
        let allowed = (0..3 * MOST).filter(|n| buckets.take(&n.to_string(), start).is_ok()).count();
        assert_eq!(allowed, MOST + 3);
        assert!(buckets.by.len() <= MOST + 1);
        assert!(buckets.take("new", start + Duration::from_secs(1)).is_ok());
        assert_eq!(buckets.by.len(), 1);
    }
}
