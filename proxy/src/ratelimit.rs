//! Token buckets of local rate limits, one for all workers of a process.
//!
//! The limit holds for the listener, not for a core, so this is the one place where requests of several workers
//! meet; only routes with a rate limit come here, and the lock is held for an addition.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::xds::filter::LocalRateLimit;

/// A bucket that is filled at intervals.
#[derive(Debug)]
pub struct Bucket {
    tokens: u64,
    filled: Instant,
}

impl Bucket {
    /// A full bucket.
    #[must_use]
    pub fn new(config: &LocalRateLimit, now: Instant) -> Self {
        Self { tokens: config.max_tokens.into(), filled: now }
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, config: &LocalRateLimit, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled);
        let interval = config.fill_interval.max(Duration::from_millis(1));
        let fills = u64::try_from(passed.as_nanos() / interval.as_nanos()).unwrap_or(u64::MAX);
        if fills > 0 {
            let new = fills.saturating_mul(config.tokens_per_fill.into());
            self.tokens = self.tokens.saturating_add(new).min(config.max_tokens.into());
            let whole = interval.saturating_mul(u32::try_from(fills).unwrap_or(u32::MAX));
            self.filled += whole.min(passed);
        }
        let some = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        some
    }
}

type Entry = (Weak<LocalRateLimit>, Arc<Mutex<Bucket>>);

/// The buckets of a process.
#[derive(Debug, Default)]
pub struct Buckets(Mutex<Vec<Entry>>);

impl Buckets {
    /// The bucket of a configuration; made at its first use.
    pub fn of(&self, config: &Arc<LocalRateLimit>, now: Instant) -> Arc<Mutex<Bucket>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(config, _)| config.strong_count() > 0);
        let found = known.iter().find(|(c, _)| c.as_ptr() == Arc::as_ptr(config));
        if let Some((_, bucket)) = found {
            return Arc::clone(bucket);
        }
        let bucket = Arc::new(Mutex::new(Bucket::new(config, now)));
        known.push((Arc::downgrade(config), Arc::clone(&bucket)));
        bucket
    }

    /// Takes a token from a configuration's bucket.
    pub fn take(&self, config: &Arc<LocalRateLimit>, now: Instant) -> bool {
        let bucket = self.of(config, now);
        let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.take(config, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xds::decode::Fraction;
    use crate::xds::mutation::HeaderOps;
    use http::StatusCode;

    #[test]
    fn tokens_come_back_at_intervals_and_never_beyond_the_most() {
        let config = LocalRateLimit {
            max_tokens: 2,
            tokens_per_fill: 1,
            fill_interval: Duration::from_secs(10),
            enabled: Fraction::ALL,
            enforced: Fraction::ALL,
            status: StatusCode::TOO_MANY_REQUESTS,
            response_headers: HeaderOps::default(),
            per_connection: false,
            resource_exhausted: false,
        };
        #[expect(clippy::disallowed_methods, reason = "any point in time does")]
        let t0 = Instant::now();
        let at = |s| t0 + Duration::from_secs(s);
        let mut bucket = Bucket::new(&config, t0);
        let taken: Vec<bool> =
            [0, 0, 0, 9, 10, 10, 100, 100, 100].map(|s| bucket.take(&config, at(s))).into();
        assert_eq!(taken, [true, true, false, false, true, false, true, true, false]);
    }
}
