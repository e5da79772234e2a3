//! What all workers share of one cluster: the counts of its circuit breakers, the health of its endpoints, and the
//! addresses that DNS gave. Workers count with relaxed atomics and never wait for each other; a lock is only taken
//! when endpoints change or one is ejected.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::check::{Checked, Standing};
use super::health::{self, Outlier};
use crate::xds::cluster::endpoint::ClusterLoadAssignment;
use crate::xds::cluster::health::OutlierDetection;
use crate::xds::decode::Address;

/// A count with a limit. On a cache line of its own, so that workers that count one thing do not slow down those
/// that read another.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Count(AtomicU32);

impl Count {
    /// One more, if there are fewer than `most`.
    #[must_use]
    pub fn try_add(&self, most: u32) -> bool {
        let fits = self.0.fetch_add(1, Ordering::Relaxed) < most;
        if !fits {
            self.sub();
        }
        fits
    }

    /// One more in any case.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// One less.
    pub fn sub(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many there are.
    #[must_use]
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What all workers share of one cluster, for as long as its configuration stays the same.
#[derive(Debug)]
pub struct State {
    /// Requests under way; counted only where a limit depends on it.
    pub requests: Count,
    /// Requests that wait for a connection.
    pub pending: Count,
    /// Connections.
    pub connections: Count,
    /// Retries under way.
    pub retries: Count,
    /// Grows when endpoints were ejected, came back, or got other addresses.
    version: AtomicU64,
    outliers: Mutex<BTreeMap<Address, Arc<Outlier>>>,
    checks: Mutex<BTreeMap<Address, Arc<Checked>>>,
    /// Whether there ever was a connection.
    traffic: AtomicBool,
    /// Whether every endpoint was checked once.
    first_round: watch::Sender<bool>,
    next_look: Mutex<Option<Instant>>,
    resolving: AtomicBool,
    resolved: watch::Sender<Option<Arc<ClusterLoadAssignment>>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            requests: Count::default(),
            pending: Count::default(),
            connections: Count::default(),
            retries: Count::default(),
            version: AtomicU64::new(0),
            outliers: Mutex::default(),
            checks: Mutex::default(),
            traffic: AtomicBool::new(false),
            first_round: watch::Sender::new(false),
            next_look: Mutex::default(),
            resolving: AtomicBool::new(false),
            resolved: watch::Sender::new(None),
        }
    }
}

/// Nothing is left half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// The state of a cluster that takes the place of another one of its name. What DNS gave for the old one serves
    /// until there is an answer for the new one, and so does what its checks found out.
    #[must_use]
    pub fn after(old: &Self) -> Self {
        let checks = lock(&old.checks);
        let copied = checks.iter().map(|(a, c)| (a.clone(), Arc::new(Checked::new(c.standing())))).collect();
        Self {
            resolved: watch::Sender::new(old.resolved()),
            first_round: watch::Sender::new(old.had_first_round()),
            checks: Mutex::new(copied),
            ..Self::default()
        }
    }

    /// Changes when what workers know of the endpoints is out of date.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Lets workers look at the endpoints' health again.
    pub(super) fn changed(&self) {
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The health of the endpoint at an address.
    #[must_use]
    pub fn outlier(&self, address: &Address) -> Arc<Outlier> {
        Arc::clone(lock(&self.outliers).entry(address.clone()).or_default())
    }

    /// What checks found out about the endpoint at an address.
    #[must_use]
    pub fn checked(&self, address: &Address) -> Arc<Checked> {
        let unknown = || Arc::new(Checked::new(Standing::Unknown));
        Arc::clone(lock(&self.checks).entry(address.clone()).or_insert_with(unknown))
    }

    /// What checks found out about the endpoint at an address, for whoever only looks on; `None`: it is not checked.
    #[must_use]
    pub fn standing(&self, address: &Address) -> Option<Standing> {
        lock(&self.checks).get(address).map(|checked| checked.standing())
    }

    /// Whether the endpoint at an address is ejected, for whoever only looks on.
    #[must_use]
    pub fn is_ejected(&self, address: &Address) -> bool {
        lock(&self.outliers).get(address).is_some_and(|outlier| outlier.is_ejected())
    }

    /// Notes a connection.
    pub fn note_traffic(&self) {
        if !self.traffic.load(Ordering::Relaxed) {
            self.traffic.store(true, Ordering::Relaxed);
        }
    }

    /// Whether there ever was a connection.
    #[must_use]
    pub fn had_traffic(&self) -> bool {
        self.traffic.load(Ordering::Relaxed)
    }

    /// Notes that every endpoint was checked once, or that there is none.
    pub fn end_first_round(&self) {
        if !*self.first_round.borrow() {
            self.first_round.send_replace(true);
        }
    }

    /// Whether every endpoint was checked once.
    #[must_use]
    pub fn had_first_round(&self) -> bool {
        *self.first_round.borrow()
    }

    /// Ends when every endpoint was checked once.
    pub async fn first_round(&self) {
        let mut over = self.first_round.subscribe();
        // an error means that nobody checks any more, so there is nothing to wait for
        let _over = over.wait_for(|over| *over).await;
    }

    /// Forgets endpoints that no worker has any more.
    pub fn forget_unused(&self) {
        lock(&self.checks).retain(|_, checked| Arc::strong_count(checked) > 1);
        lock(&self.outliers).retain(|_, outlier| Arc::strong_count(outlier) > 1);
    }

    /// Ejects one of these endpoints, if that leaves enough of them; tells whether it did. `jitter` is added to the
    /// time.
    pub fn eject<'a>(
        &self,
        outlier: &Outlier,
        all: impl Iterator<Item = &'a Arc<Outlier>>,
        settings: &OutlierDetection,
        now: Instant,
        jitter: Duration,
    ) -> bool {
        // one at a time, so that no two workers eject the last two together
        let _one = lock(&self.next_look);
        if outlier.is_ejected() {
            return false;
        }
        let (ejected, total) = all.fold((0, 0), |(e, t), o| (e + usize::from(o.is_ejected()), t + 1));
        if !health::may_eject(settings, ejected, total) {
            return false;
        }
        outlier.eject(settings, now, jitter);
        self.changed();
        true
    }

    /// Whether it is time for the regular look at all endpoints; `true` for one worker in each interval.
    #[must_use]
    pub fn is_due(&self, now: Instant, interval: Duration) -> bool {
        let mut next = lock(&self.next_look);
        let due = next.is_none_or(|at| now >= at);
        if due {
            *next = Some(now + interval.min(Duration::from_secs(3600)));
        }
        due
    }

    /// The regular look; what was ejected for long enough comes back.
    pub fn look<'a>(&self, outliers: impl Iterator<Item = &'a Arc<Outlier>>, now: Instant) {
        let back = outliers.fold(false, |back, outlier| outlier.tick(now) | back);
        if back {
            self.changed();
        }
    }

    /// `true` for the first who asks: whoever it is resolves the cluster's names for all.
    #[must_use]
    pub fn start_resolving(&self) -> bool {
        !self.resolving.swap(true, Ordering::Relaxed)
    }

    /// What DNS gave last; `None` before there was an answer.
    #[must_use]
    pub fn resolved(&self) -> Option<Arc<ClusterLoadAssignment>> {
        self.resolved.borrow().clone()
    }

    /// Takes what DNS gave.
    pub fn resolve(&self, endpoints: Arc<ClusterLoadAssignment>) {
        // whoever is woken by this must find the new version
        self.resolved.send_modify(|resolved| {
            *resolved = Some(endpoints);
            self.changed();
        });
    }

    /// Ends when DNS has answered, if only that there is nothing.
    pub async fn was_resolved(&self) {
        let mut resolved = self.resolved.subscribe();
        // an error means that nobody resolves any more, so there is nothing to wait for
        let _answered = resolved.wait_for(Option::is_some).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_never_goes_beyond_its_limit_however_many_count() {
        let count = Count::default();
        let let_in = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        let_in.fetch_add(u32::from(count.try_add(700)), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(count.get(), let_in.load(Ordering::Relaxed));
        assert!(count.get() <= 700, "{count:?}");
        assert!(count.try_add(u32::MAX));
    }

    #[test]
    fn what_dns_gave_serves_until_the_successor_has_its_own_answer() {
        let old = State::default();
        let answer = Arc::new(ClusterLoadAssignment::default());
        old.resolve(Arc::clone(&answer));
        let new = State::after(&old);
        assert!(new.resolved().is_some_and(|a| Arc::ptr_eq(&a, &answer)));
        assert!(new.start_resolving() && !new.start_resolving());
    }
}
