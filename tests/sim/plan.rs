//! What a seed decides before the run begins.

use std::time::Duration;

use istiod::raft::node::Settings;

use crate::mistake::Mistake;

/// What can go wrong, as parts of a whole.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weights {
    /// A member ends at once.
    pub(crate) crash: u32,
    /// A member ends at one of its next writes, syncs or messages.
    pub(crate) crash_point: u32,
    /// A member is stopped politely and started again.
    pub(crate) restart: u32,
    /// The members are parted.
    pub(crate) partition: u32,
    /// The partition ends.
    pub(crate) mend: u32,
    /// Loss, delay and doubles change.
    pub(crate) weather: u32,
    /// A disk becomes slow, or fast again.
    pub(crate) slow_disk: u32,
    /// A clock jumps, drifts, or a member stands still for a while.
    pub(crate) clock: u32,
    /// Leadership is to move.
    pub(crate) transfer: u32,
    /// The members change.
    pub(crate) members: u32,
    /// A store writes what it has to its disk.
    pub(crate) store_sync: u32,
    /// A disk becomes nearly full, or has space again.
    pub(crate) full_disk: u32,
}

impl Weights {
    /// Which of them comes next.
    pub(crate) fn all(&self) -> [u32; 12] {
        [
            self.crash,
            self.crash_point,
            self.restart,
            self.partition,
            self.mend,
            self.weather,
            self.slow_disk,
            self.clock,
            self.transfer,
            self.members,
            self.store_sync,
            self.full_disk,
        ]
    }
}

/// A run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) founders: u64,
    pub(crate) clients: usize,
    pub(crate) keys: usize,
    /// Proxies with a stream; translation for them costs time, so not every run has some.
    pub(crate) proxies: usize,
    /// How long things go wrong, in simulated microseconds.
    pub(crate) chaos_us: u64,
    /// The mean time between two of them.
    pub(crate) fault_each_us: u64,
    /// The mean time between two operations of a client.
    pub(crate) operation_each_us: u64,
    pub(crate) weights: Weights,
    pub(crate) mistake: Option<Mistake>,
    settings: Settings,
}

impl Plan {
    /// The plan of a seed. Of the faults a run has some and not others, so that it goes deep where it goes.
    pub(crate) fn new(seed: u64, mistake: Option<Mistake>) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x5EED);
        let mut weight = |most: u32| if rng.bool() { rng.u32(1..=most) } else { 0 };
        let mut weights = Weights {
            crash: weight(10),
            crash_point: weight(30),
            restart: weight(4),
            partition: weight(15),
            mend: 6,
            weather: weight(10),
            slow_disk: weight(8),
            clock: weight(10),
            transfer: weight(10),
            members: weight(15),
            store_sync: 4,
            // What nobody can write is not known to be written; a checker of many such histories never ends.
            full_disk: if mistake.is_none() { weight(6) } else { 0 },
        };
        let mut plan = Self {
            seed,
            founders: if rng.u32(0..3) == 0 { 5 } else { 3 },
            clients: rng.usize(2..=4),
            keys: rng.usize(2..=6),
            proxies: if mistake.is_none() && rng.u32(0..4) == 0 { 2 } else { 0 },
            chaos_us: rng.u64(4_000_000..12_000_000),
            fault_each_us: rng.u64(80_000..900_000),
            operation_each_us: rng.u64(60_000..300_000),
            weights,
            mistake,
            settings: settings(&mut rng, seed),
        };
        if let Some(mistake) = mistake {
            lean(&mut weights, mistake);
            plan.weights = weights;
            plan.lean(mistake);
        }
        plan
    }

    /// The settings of a member.
    pub(crate) fn settings(&self, id: u64) -> Settings {
        Settings { id, ..self.settings.clone() }
    }

    fn lean(&mut self, mistake: Mistake) {
        match mistake {
            Mistake::IgnoreJointQuorum => self.fault_each_us = 150_000,
            Mistake::SendBeforePersist | Mistake::VoteTwice | Mistake::LoseFsync => {
                self.founders = 3;
                self.fault_each_us = self.fault_each_us.min(250_000);
            }
            Mistake::ForgetSessions => {
                self.operation_each_us = 60_000;
                self.fault_each_us = 100_000;
                self.keys = 2;
            }
            Mistake::RetryUnderNewNumber
            | Mistake::ApplyBeforeCommit
            | Mistake::AcknowledgeBeforeQuorum
            | Mistake::ReadWithoutIndex
            | Mistake::SnapshotOlderThanLog
            | Mistake::TruncateCommitted
            | Mistake::LocalClockInApply
            | Mistake::MixSnapshotWithStore => {}
        }
    }
}

/// Makes more of what brings a mistake to light.
fn lean(weights: &mut Weights, mistake: Mistake) {
    match mistake {
        Mistake::SendBeforePersist | Mistake::VoteTwice => {
            (weights.crash_point, weights.partition, weights.members) = (30, 10, 0);
        }
        Mistake::LoseFsync | Mistake::TruncateCommitted | Mistake::SnapshotOlderThanLog => {
            (weights.crash, weights.partition) = (20, 5);
        }
        Mistake::ApplyBeforeCommit | Mistake::AcknowledgeBeforeQuorum | Mistake::ReadWithoutIndex => {
            weights.partition = 15;
        }
        Mistake::ForgetSessions => {
            (weights.restart, weights.weather, weights.transfer) = (30, 20, 10);
        }
        Mistake::RetryUnderNewNumber => weights.partition = 20,
        Mistake::LocalClockInApply | Mistake::MixSnapshotWithStore => {
            weights.crash = 10;
        }
        Mistake::IgnoreJointQuorum => {
            (weights.members, weights.crash, weights.partition) = (30, 15, 15);
        }
    }
}

/// Settings with which everything happens often.
fn settings(rng: &mut fastrand::Rng, seed: u64) -> Settings {
    let either = |rng: &mut fastrand::Rng, small: u64, large: u64| if rng.bool() { small } else { large };
    Settings {
        tick: Duration::from_millis(rng.u64(40..=100)),
        election_ticks: rng.usize(5..=10),
        heartbeat_ticks: rng.usize(1..=2),
        message_bytes: either(rng, 300, 1 << 20),
        messages_in_flight: usize::try_from(either(rng, 2, 128)).unwrap_or(2),
        apply_bytes: either(rng, 400, 8 << 20),
        snapshot_entries: rng.u64(8..60),
        keep_entries: rng.u64(0..12),
        segment_bytes: either(rng, 1 << 10, 8 << 10),
        answer_within: Duration::from_millis(rng.u64(500..3000)),
        read_retry: Duration::from_millis(rng.u64(50..300)),
        // What a run calls a slow disk takes at least so long, and a run is short.
        slow_sync: Duration::from_millis(20),
        slow_sync_for: Duration::from_secs(1),
        ..Settings::new(1, seed)
    }
}
