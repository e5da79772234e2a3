//! Which of weighted clusters comes next.

use std::cell::Cell;

/// 2^64 divided by the golden ratio, odd.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// A sequence whose every stretch is spread evenly over the weights.
///
/// Each step is the golden part of a turn, of all irrational parts the one whose multiples, and whose every k-th
/// multiples, keep the most distance from each other (Knuth, The Art of Computer Programming, volume 3, section 6.4).
/// So a split of 90 to 10 holds over hundreds of requests as well as over millions, where independent draws would be
/// off by a point or two.
#[derive(Debug)]
pub struct Split(Cell<u64>);

impl Split {
    /// A sequence that begins anywhere.
    #[must_use]
    pub fn new(start: u64) -> Self {
        Self(Cell::new(start))
    }

    /// The next number below `total`; 0 when `total` is 0.
    pub fn next(&self, total: u64) -> u64 {
        let turn = self.0.get().wrapping_add(STEP);
        self.0.set(turn);
        u64::try_from((u128::from(turn) * u128::from(total)) >> 64).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `count` numbers, of which every `k`-th is looked at, are below `share` of 100.
    fn below(start: u64, count: u32, k: usize, share: u64) -> u32 {
        let split = Split::new(start);
        let seen = (0..count as usize * k).map(|_| split.next(100)).step_by(k);
        u32::try_from(seen.filter(|n| *n < share).count()).unwrap()
    }

    #[test]
    fn every_stretch_has_its_share() {
        for start in [0, 1, u64::MAX / 3, u64::MAX] {
            for share in [1, 10, 50, 90, 99] {
                let got = below(start, 1000, 1, share);
                assert!(
                    got.abs_diff(u32::try_from(share).unwrap() * 10) <= 5,
                    "{got} for {share} of 100 from {start}"
                );
            }
        }
    }

    #[test]
    fn requests_that_take_turns_have_their_share_each() {
        for k in 2..=8 {
            let got = below(7, 1000, k, 10);
            assert!((85..=115).contains(&got), "{got} of 100 for every {k}th");
        }
    }

    #[test]
    fn numbers_stay_below_the_total() {
        let split = Split::new(u64::MAX);
        assert!((0..1000).all(|_| split.next(3) < 3));
        assert_eq!((split.next(1), split.next(0)), (0, 0));
    }
}
