//! Which endpoint gets a request: round robin, random, least request, ring hash, Maglev. Pure: chance is an
//! argument, and what an endpoint is stays with the caller.
//!
//! [`locality`] first decides the priority and locality, [`Balancer::pick`] then picks inside that list.

pub mod hash;
pub mod locality;

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::rc::Rc;

use hash::Table;

/// What a balancer may know about an endpoint.
#[derive(Debug)]
pub struct Load {
    /// Share of the traffic relative to the other endpoints, at least 1.
    pub weight: Cell<u32>,
    /// Requests in flight from this worker.
    pub active: Rc<Cell<u32>>,
}

impl Load {
    /// An endpoint of this weight with nothing in flight; a weight of 0 counts as 1.
    #[must_use]
    pub fn new(weight: u32) -> Self {
        Self::like(weight, &Rc::default())
    }

    /// An endpoint of this weight in place of one whose requests in flight are these.
    #[must_use]
    pub fn like(weight: u32, active: &Rc<Cell<u32>>) -> Self {
        Self { weight: Cell::new(weight.max(1)), active: Rc::clone(active) }
    }
}

impl AsRef<Load> for Load {
    fn as_ref(&self) -> &Load {
        self
    }
}

/// A balancing policy with its settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// In turn, by weight.
    RoundRobin,
    /// Uniformly at random.
    Random,
    /// The least loaded of `choices` random endpoints; by weight over load when weights differ.
    LeastRequest {
        /// How many endpoints are looked at, at least 2.
        choices: u32,
    },
    /// Consistent hashing on a ring of at least `min_size` points.
    RingHash {
        /// Smallest number of points.
        min_size: usize,
        /// Largest number of points.
        max_size: usize,
    },
    /// Consistent hashing through a Maglev table.
    Maglev {
        /// Slots, a prime.
        table_size: usize,
    },
}

/// The state of one policy over one fixed list of endpoints.
///
/// Rebuilt when the list changes; what it keeps (a cursor, a schedule, a ring) is only about that list.
#[derive(Debug)]
pub struct Balancer {
    policy: Policy,
    weighted: bool,
    cursor: Cell<usize>,
    schedule: RefCell<Schedule>,
    table: Option<Table>,
}

impl Balancer {
    /// Prepares `policy` for these endpoints; `keys` are their addresses, used by the hashing policies.
    ///
    /// `start` is where round robin begins, so that workers do not march in step.
    pub fn new<H: AsRef<Load>>(policy: Policy, hosts: &[H], keys: &[String], start: usize) -> Self {
        let first = hosts.first().map_or(1, |h| h.as_ref().weight.get());
        let weighted = hosts.iter().any(|h| h.as_ref().weight.get() != first);
        let weights: Vec<u32> = hosts.iter().map(|h| h.as_ref().weight.get()).collect();
        let table = table(policy, keys, &weights);
        let schedule = RefCell::new(Schedule::default());
        let balancer = Self { policy, weighted, cursor: Cell::new(start), schedule, table };
        if weighted && matches!(policy, Policy::RoundRobin | Policy::LeastRequest { .. }) {
            balancer.schedule.borrow_mut().fill(hosts);
        }
        balancer
    }

    /// Prepares a hashing policy for endpoints with these keys, by weights that are not their own.
    #[must_use]
    pub fn hashing(policy: Policy, keys: &[String], weights: &[u32]) -> Self {
        let table = table(policy, keys, weights);
        Self { policy, weighted: false, cursor: Cell::new(0), schedule: RefCell::default(), table }
    }

    /// The index of the endpoint to use; `None` only when there is none.
    ///
    /// `hash` is the request's hash for the hashing policies; without one they pick at random.
    pub fn pick<H: AsRef<Load>>(
        &self,
        hosts: &[H],
        hash: Option<u64>,
        rng: &mut fastrand::Rng,
    ) -> Option<usize> {
        match hosts.len() {
            0 => return None,
            1 => return Some(0),
            _ => {}
        }
        match self.policy {
            Policy::Random => Some(rng.usize(..hosts.len())),
            Policy::RoundRobin if self.weighted => self.schedule.borrow_mut().next(hosts, weight),
            Policy::RoundRobin => {
                let at = self.cursor.get();
                self.cursor.set(at.wrapping_add(1));
                Some(at % hosts.len())
            }
            Policy::LeastRequest { .. } if self.weighted => {
                self.schedule.borrow_mut().next(hosts, |l| weight(l) / f64::from(l.active.get() + 1))
            }
            Policy::LeastRequest { choices } => Some(least_of(hosts, choices, rng)),
            Policy::RingHash { .. } | Policy::Maglev { .. } => {
                let hash = hash.unwrap_or_else(|| rng.u64(..));
                self.table.as_ref().and_then(|t| t.lookup(hash)).filter(|i| *i < hosts.len())
            }
        }
    }
}

fn table(policy: Policy, keys: &[String], weights: &[u32]) -> Option<Table> {
    match policy {
        Policy::RingHash { min_size, max_size } => Some(Table::ring(keys, weights, min_size, max_size)),
        Policy::Maglev { table_size } => Some(Table::maglev(keys, weights, table_size)),
        Policy::RoundRobin | Policy::Random | Policy::LeastRequest { .. } => None,
    }
}

fn weight(load: &Load) -> f64 {
    f64::from(load.weight.get())
}

fn least_of<H: AsRef<Load>>(hosts: &[H], choices: u32, rng: &mut fastrand::Rng) -> usize {
    let active = |i: usize| hosts.get(i).map_or(u32::MAX, |h| h.as_ref().active.get());
    let mut best = rng.usize(..hosts.len());
    for _ in 1..choices.max(2) {
        let other = rng.usize(..hosts.len());
        if active(other) < active(best) {
            best = other;
        }
    }
    best
}

/// Earliest deadline first: each endpoint is due again after 1/weight.
#[derive(Debug, Default)]
struct Schedule {
    queue: BinaryHeap<Due>,
    now: f64,
    order: u64,
}

#[derive(Debug)]
struct Due {
    at: f64,
    order: u64,
    index: usize,
}

impl Schedule {
    fn fill<H: AsRef<Load>>(&mut self, hosts: &[H]) {
        for (index, host) in hosts.iter().enumerate() {
            self.push(index, weight(host.as_ref()));
        }
    }

    fn push(&mut self, index: usize, weight: f64) {
        self.order += 1;
        self.queue.push(Due { at: self.now + 1.0 / weight, order: self.order, index });
    }

    fn next<H: AsRef<Load>>(&mut self, hosts: &[H], weight: impl Fn(&Load) -> f64) -> Option<usize> {
        let due = self.queue.pop()?;
        self.now = due.at;
        let host = hosts.get(due.index)?;
        self.push(due.index, weight(host.as_ref()));
        Some(due.index)
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    /// Reversed, so that the heap's greatest is the earliest.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.total_cmp(&self.at).then(other.order.cmp(&self.order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(policy: Policy, weights: &[u32], requests: usize) -> Vec<usize> {
        let hosts: Vec<Load> = weights.iter().map(|w| Load::new(*w)).collect();
        let keys: Vec<String> = (0..hosts.len()).map(|i| format!("10.0.0.{i}:80")).collect();
        let balancer = Balancer::new(policy, &hosts, &keys, 0);
        let mut rng = fastrand::Rng::with_seed(7);
        let mut counts = vec![0; hosts.len()];
        for _ in 0..requests {
            let hash = Some(rng.u64(..));
            counts[balancer.pick(&hosts, hash, &mut rng).unwrap()] += 1;
        }
        counts
    }

    #[track_caller]
    fn check(policy: Policy, weights: &[u32], expected: &[usize], slack: usize) {
        let got = spread(policy, weights, expected.iter().sum());
        for (g, e) in got.iter().zip(expected) {
            assert!(g.abs_diff(*e) <= slack, "{policy:?} {weights:?}: {got:?}, expected {expected:?}");
        }
    }

    #[test]
    fn equal_weights_share_equally() {
        check(Policy::RoundRobin, &[1, 1, 1], &[100, 100, 100], 0);
        check(Policy::Random, &[1, 1], &[5000, 5000], 250);
        check(Policy::LeastRequest { choices: 2 }, &[1, 1, 1, 1], &[2500; 4], 200);
    }

    #[test]
    fn weights_are_kept_exactly_by_the_schedule() {
        check(Policy::RoundRobin, &[3, 1], &[300, 100], 1);
        check(Policy::LeastRequest { choices: 2 }, &[5, 3, 2], &[500, 300, 200], 1);
    }

    #[test]
    fn hashing_policies_spread_by_weight() {
        check(Policy::RingHash { min_size: 1024, max_size: 8192 }, &[1, 1], &[5000, 5000], 900);
        check(Policy::Maglev { table_size: 65537 }, &[3, 1], &[7500, 2500], 250);
    }

    #[test]
    fn least_request_avoids_the_loaded_endpoint() {
        let hosts = [Load::new(1), Load::new(1)];
        hosts[0].active.set(50);
        let balancer = Balancer::new(Policy::LeastRequest { choices: 2 }, &hosts, &[], 0);
        let mut rng = fastrand::Rng::with_seed(1);
        let loaded = (0..1000).filter(|_| balancer.pick(&hosts, None, &mut rng) == Some(0)).count();
        assert!((200..300).contains(&loaded), "only when both choices fall on it, got {loaded}");
    }

    #[test]
    fn nothing_to_pick_from_is_none() {
        let hosts: [Load; 0] = [];
        let balancer = Balancer::new(Policy::Random, &hosts, &[], 0);
        assert_eq!(balancer.pick(&hosts, None, &mut fastrand::Rng::with_seed(1)), None);
    }
}
