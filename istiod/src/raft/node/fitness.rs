//! Whether this member's disk is fit to lead and to take writes (pure; what was measured and the time are arguments).

use std::time::{Duration, Instant};

use super::Settings;

/// A disk that is slow or full everywhere must not make leadership go round in circles: a member hands it over at most
/// once in so many times [`Settings::slow_sync_for`].
const REST: u32 = 6;
/// A snapshot for which there was no room is tried again after this time.
const NO_ROOM: Duration = Duration::from_secs(60);

/// What is known of the disk under a member's log.
#[derive(Debug, Clone, Default)]
pub(super) struct Fitness {
    /// Every sync since then was slow.
    slow_since: Option<Instant>,
    /// Every sync was slow for long enough.
    slow: bool,
    /// Bytes that are free, where that is known.
    free: Option<u64>,
    handed_over: Option<Instant>,
    no_room: Option<Instant>,
}

impl Fitness {
    /// The log was synced in a step that began at `now`.
    pub(super) fn synced(&mut self, took: Duration, now: Instant, settings: &Settings) {
        if took < settings.slow_sync {
            (self.slow_since, self.slow) = (None, false);
            return;
        }
        let since = *self.slow_since.get_or_insert(now);
        self.slow = now.saturating_duration_since(since) >= settings.slow_sync_for;
    }

    /// So many bytes are free. True if that changes whether writes are taken.
    pub(super) fn has_free(&mut self, free: Option<u64>, settings: &Settings) -> bool {
        let before = self.is_full(settings);
        self.free = free;
        self.is_full(settings) != before
    }

    /// Bytes that are free, where that is known.
    pub(super) fn free(&self) -> Option<u64> {
        self.free
    }

    /// Every sync has been slow for some time.
    pub(super) fn is_slow(&self) -> bool {
        self.slow
    }

    /// Less is free than a member needs that goes on writing.
    pub(super) fn is_full(&self, settings: &Settings) -> bool {
        self.free.is_some_and(|free| free < settings.least_free_bytes)
    }

    /// Somebody else should lead. True once; then it is left at that for some time.
    pub(super) fn hands_over(&mut self, now: Instant, settings: &Settings) -> bool {
        let rest = settings.slow_sync_for * REST;
        let rested = self.handed_over.is_none_or(|at| now.saturating_duration_since(at) >= rest);
        let unfit = rested && (self.slow || self.is_full(settings));
        if unfit {
            self.handed_over = Some(now);
        }
        unfit
    }

    /// There was no room for a snapshot.
    pub(super) fn found_no_room(&mut self, now: Instant) {
        self.no_room = Some(now);
    }

    /// There may be room for a snapshot.
    pub(super) fn has_room(&self, now: Instant, settings: &Settings) -> bool {
        let waited = self.no_room.is_none_or(|at| now.saturating_duration_since(at) >= NO_ROOM);
        waited && !self.is_full(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Duration = Duration::from_secs(2);
    const QUICK: Duration = Duration::from_millis(2);

    fn start() -> (Fitness, Settings, Instant) {
        (Fitness::default(), Settings::new(1, 1), tokio::time::Instant::now().into_std())
    }

    #[test]
    fn a_disk_is_slow_when_every_sync_was_for_the_whole_time() {
        let (mut fitness, settings, start) = start();
        for (seconds, took, slow) in [
            (0, SLOW, false),
            (9, SLOW, false),
            (10, SLOW, true),
            (11, QUICK, false),
            (12, SLOW, false),
            (22, SLOW, true),
        ] {
            fitness.synced(took, start + Duration::from_secs(seconds), &settings);
            assert_eq!(fitness.is_slow(), slow, "after {seconds} s");
        }
    }

    #[test]
    fn leadership_is_handed_over_once_and_then_left_for_some_time() {
        let (mut fitness, settings, start) = start();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!fitness.hands_over(start, &settings));
        fitness.synced(SLOW, start, &settings);
        fitness.synced(SLOW, at(10), &settings);
        assert!(fitness.hands_over(at(10), &settings) && !fitness.hands_over(at(60), &settings));
        assert!(fitness.hands_over(at(70), &settings));
    }

    #[test]
    fn below_its_floor_a_disk_is_full_and_has_no_room_for_snapshots() {
        let (mut fitness, settings, start) = start();
        let floor = settings.least_free_bytes;
        assert!(!fitness.has_free(Some(floor), &settings) && fitness.has_room(start, &settings));
        assert!(fitness.has_free(Some(floor - 1), &settings) && fitness.is_full(&settings));
        assert!(fitness.hands_over(start, &settings) && !fitness.has_room(start, &settings));
        assert!(fitness.has_free(None, &settings), "what is not known refuses nothing");
        fitness.found_no_room(start);
        assert!(!fitness.has_room(start, &settings) && fitness.has_room(start + NO_ROOM, &settings));
    }
}
