//! Chance that a seed decides.

use std::ops::Range;

/// Draws in an order that the seed decides.
#[derive(Debug)]
pub(crate) struct Dice(fastrand::Rng);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// With this chance.
    pub(crate) fn one_in(&mut self, n: u32) -> bool {
        self.0.u32(..n) == 0
    }

    /// A number of this range, which is not empty.
    pub(crate) fn from(&mut self, range: Range<usize>) -> usize {
        self.0.usize(range)
    }

    /// One of these, which are some.
    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.0.usize(..from.len())]
    }
}
