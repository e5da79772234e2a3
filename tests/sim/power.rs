//! The power supply of one member: where it ends, the member ends.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Every write, sync and message of a member draws on it; when it is cut, whatever comes next fails. What the member
/// does in memory after that is seen by nobody. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Power(Arc<Mutex<Supply>>);

#[derive(Default)]
struct Supply {
    /// Draws that are left before it is cut.
    left: Option<u64>,
    out: bool,
    /// How much of the write in which it is cut still happens, in parts of 256.
    last_write: u8,
    /// How long a sync takes, in microseconds of simulated time.
    sync_us: u64,
    /// Simulated time spent in syncs since this was last asked.
    spent_us: u64,
}

impl Power {
    fn supply(&self) -> MutexGuard<'_, Supply> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One step that the outside can see.
    pub(crate) fn draw(&self) -> io::Result<()> {
        let mut supply = self.supply();
        if supply.left == Some(0) {
            supply.out = true;
        }
        if supply.out {
            return Err(io::Error::other("the power is cut"));
        }
        supply.left = supply.left.map(|left| left - 1);
        Ok(())
    }

    /// Like [`Power::draw`] for a write of `length` bytes; at the cut itself, how many of them are still written.
    pub(crate) fn draw_write(&self, length: usize) -> Result<(), usize> {
        let was_out = self.is_out();
        self.draw()
            .map_err(|_| if was_out { 0 } else { length * usize::from(self.supply().last_write) / 256 })
    }

    /// Cuts it after so many draws.
    pub(crate) fn cut_after(&self, draws: u64, last_write: u8) {
        let mut supply = self.supply();
        (supply.left, supply.last_write) = (Some(draws), last_write);
    }

    /// Back again, for the next life.
    pub(crate) fn restore(&self) {
        let mut supply = self.supply();
        (supply.left, supply.out, supply.spent_us) = (None, false, 0);
    }

    pub(crate) fn is_out(&self) -> bool {
        self.supply().out
    }

    /// How long a sync takes from now on, in microseconds.
    pub(crate) fn set_sync_us(&self, sync_us: u64) {
        self.supply().sync_us = sync_us;
    }

    /// A sync takes its time.
    pub(crate) fn spend_sync(&self) {
        let mut supply = self.supply();
        supply.spent_us += supply.sync_us;
    }

    /// How long a sync takes.
    pub(crate) fn sync_time(&self) -> Duration {
        Duration::from_micros(self.supply().sync_us)
    }

    /// Microseconds spent so far in this step.
    pub(crate) fn spent_us(&self) -> u64 {
        self.supply().spent_us
    }

    /// The same, and a new step begins.
    pub(crate) fn take_spent_us(&self) -> u64 {
        std::mem::take(&mut self.supply().spent_us)
    }
}
