//! When to push: at once if it has been quiet, else when it is quiet again, and never later than a limit.
//!
//! One change reaches the proxies without delay. A storm of changes is merged: each waits until nothing has come
//! for the quiet time, but the oldest waits no longer than the longest delay. Pure; the clock is passed in.

use std::time::{Duration, Instant};

/// How long changes are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A push waits until nothing has changed for so long.
    pub quiet: Duration,
    /// No change waits longer than this.
    pub longest: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { quiet: Duration::from_millis(10), longest: Duration::from_secs(1) }
    }
}

/// Decides when pending changes are due.
#[derive(Debug)]
pub struct Debounce {
    limits: Limits,
    /// The last change or push: before `quiet` has passed since, changes are merged.
    busy_at: Option<Instant>,
    /// The oldest change that was not pushed, and when it is due.
    pending: Option<(Instant, Instant)>,
}

impl Debounce {
    /// Nothing pending.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, busy_at: None, pending: None }
    }

    /// Something changed.
    pub fn on_change(&mut self, now: Instant) {
        let oldest = self.pending.map_or(now, |(oldest, _)| oldest);
        let calm = self.busy_at.is_none_or(|at| now.saturating_duration_since(at) >= self.limits.quiet);
        let due = match self.pending {
            None if calm => now,
            _ => (now + self.limits.quiet).min(oldest + self.limits.longest),
        };
        self.pending = Some((oldest, due));
        self.busy_at = Some(now);
    }

    /// When the pending changes are due, if there are any.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.pending.map(|(_, due)| due)
    }

    /// Whether to push now; if so, nothing is pending any more. Returns how long the oldest change has waited.
    pub fn fire(&mut self, now: Instant) -> Option<Duration> {
        let (oldest, _) = self.pending.take_if(|(_, due)| *due <= now)?;
        self.busy_at = Some(now);
        Some(now.saturating_duration_since(oldest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays changes at these milliseconds and returns when pushes happen.
    fn pushes(changes: &[u64]) -> Vec<u64> {
        let start = tokio::time::Instant::now().into_std();
        let limits = Limits { quiet: Duration::from_millis(10), longest: Duration::from_millis(100) };
        let mut debounce = Debounce::new(limits);
        let mut at = Vec::new();
        for ms in 0..1_000 {
            let now = start + Duration::from_millis(ms);
            if changes.contains(&ms) {
                debounce.on_change(now);
            }
            if debounce.fire(now).is_some() {
                at.push(ms);
            }
        }
        assert_eq!(debounce.deadline(), None);
        at
    }

    #[test]
    fn the_first_change_goes_at_once() {
        assert_eq!(pushes(&[5]), [5]);
        assert_eq!(pushes(&[5, 500]), [5, 500]);
    }

    #[test]
    fn changes_that_follow_are_merged_until_it_is_quiet() {
        assert_eq!(pushes(&[5, 8, 12, 20]), [5, 30]);
        assert_eq!(pushes(&[5, 15, 25]), [5, 15, 25]);
    }

    #[test]
    fn a_storm_does_not_hold_a_change_longer_than_the_limit() {
        let storm: Vec<u64> = (0..300).collect();
        assert_eq!(pushes(&storm), [0, 101, 202, 303]);
    }
}
