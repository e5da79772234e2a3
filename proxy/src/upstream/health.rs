//! Passive health checks: endpoints that fail in a row are left out for a while. Pure: the clock is an argument.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::xds::cluster::health::OutlierDetection;

/// How a request to an endpoint ended, as far as its health is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// A response with this status.
    Status(u16),
    /// No connection, a reset, or a timeout.
    LocalFailure,
}

/// What one endpoint did lately; all workers tell it and ask it.
#[derive(Debug, Default)]
pub struct Outlier {
    errors: AtomicU32,
    gateway_errors: AtomicU32,
    local_failures: AtomicU32,
    ejected: AtomicBool,
    ejection: Mutex<Ejection>,
}

#[derive(Debug, Default)]
struct Ejection {
    times: u32,
    until: Option<Instant>,
}

impl Outlier {
    /// Notes a result; `true` asks for an ejection, which [`may_eject`] must allow. `draw` is a number below 100.
    pub fn on_result(&self, signal: Signal, settings: &OutlierDetection, draw: u32) -> bool {
        if signal == Signal::LocalFailure && settings.split_external_local {
            let (limit, share) = (settings.consecutive_local, settings.enforcing_local);
            return reached(&self.local_failures, limit, share, draw);
        }
        let status = match signal {
            Signal::Status(status) => status,
            Signal::LocalFailure => 503,
        };
        if settings.split_external_local {
            clear(&self.local_failures);
        }
        if status < 500 {
            clear(&self.errors);
            clear(&self.gateway_errors);
            return false;
        }
        let mut eject = false;
        if matches!(status, 502..=504) {
            let (limit, share) = (settings.consecutive_gateway, settings.enforcing_gateway);
            eject |= reached(&self.gateway_errors, limit, share, draw);
        } else {
            clear(&self.gateway_errors);
        }
        eject | reached(&self.errors, settings.consecutive_5xx, settings.enforcing_5xx, draw)
    }

    fn ejection(&self) -> MutexGuard<'_, Ejection> {
        // nothing is left half done under this lock
        self.ejection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ejects the endpoint; each further time lasts longer.
    pub fn eject(&self, settings: &OutlierDetection, now: Instant, jitter: Duration) {
        let mut ejection = self.ejection();
        ejection.times += 1;
        let time = settings.base_ejection.saturating_mul(ejection.times).min(settings.max_ejection);
        ejection.until = Some(now + time + jitter);
        self.ejected.store(true, Ordering::Release);
    }

    /// The look at each interval; `true` when an ejection is over.
    pub fn tick(&self, now: Instant) -> bool {
        let mut ejection = self.ejection();
        match ejection.until {
            Some(until) if now >= until => {
                ejection.until = None;
                for count in [&self.errors, &self.gateway_errors, &self.local_failures] {
                    clear(count);
                }
                self.ejected.store(false, Ordering::Release);
                true
            }
            Some(_) => false,
            None => {
                ejection.times = ejection.times.saturating_sub(1);
                false
            }
        }
    }

    /// Ends an ejection: the endpoint was seen to serve. Tells whether there was one.
    pub fn pardon(&self) -> bool {
        self.ejection().until = None;
        self.ejected.swap(false, Ordering::AcqRel)
    }

    /// Whether the endpoint is out.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Ordering::Acquire)
    }
}

/// Written only where it changes something: most results are good ones, and the count is shared.
fn clear(count: &AtomicU32) {
    if count.load(Ordering::Relaxed) != 0 {
        count.store(0, Ordering::Relaxed);
    }
}

fn reached(count: &AtomicU32, limit: u32, enforcing: u32, draw: u32) -> bool {
    let now = count.fetch_add(1, Ordering::Relaxed).saturating_add(1);
    if limit == 0 || now < limit {
        return false;
    }
    count.store(0, Ordering::Relaxed);
    draw < enforcing
}

/// Whether one more of `total` endpoints may be ejected when `ejected` are already out.
#[must_use]
pub fn may_eject(settings: &OutlierDetection, ejected: usize, total: usize) -> bool {
    let most = usize::try_from(settings.max_ejection_percent).unwrap_or(100);
    // the share is looked at before the ejection, so a share above 0 lets at least one out, as Istio documents it
    (settings.always_eject_one && ejected == 0) || (most > 0 && ejected * 100 < most * total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xds::cluster::health::{FailurePercentage, SuccessRate};

    fn settings() -> OutlierDetection {
        OutlierDetection {
            consecutive_5xx: 3,
            enforcing_5xx: 100,
            consecutive_gateway: 2,
            enforcing_gateway: 0,
            split_external_local: false,
            consecutive_local: 2,
            enforcing_local: 100,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_secs(70),
            max_jitter: Duration::ZERO,
            max_ejection_percent: 50,
            always_eject_one: false,
            uneject: true,
            success_rate: SuccessRate {
                enforcing: 0,
                minimum_hosts: 5,
                request_volume: 100,
                stdev_factor: 1900,
            },
            failure_percentage: FailurePercentage {
                enforcing: 0,
                threshold: 85,
                minimum_hosts: 5,
                request_volume: 50,
            },
        }
    }

    #[track_caller]
    fn check(settings: &OutlierDetection, signals: &[Signal], expected: bool) {
        let outlier = Outlier::default();
        let last = signals.iter().fold(false, |_, s| outlier.on_result(*s, settings, 50));
        assert_eq!(last, expected, "{signals:?}");
    }

    #[test]
    fn errors_in_a_row_eject_and_a_success_between_them_does_not() {
        use Signal::{LocalFailure, Status};
        check(&settings(), &[Status(500), Status(500)], false);
        check(&settings(), &[Status(500), Status(503), Status(500)], true);
        check(&settings(), &[Status(500), Status(200), Status(500), Status(500)], false);
        check(&settings(), &[LocalFailure, LocalFailure, LocalFailure], true);
        check(&settings(), &[Status(404), Status(404), Status(404)], false);
    }

    #[test]
    fn gateway_and_local_errors_have_their_own_counts() {
        use Signal::{LocalFailure, Status};
        let gateway = OutlierDetection { enforcing_gateway: 100, enforcing_5xx: 0, ..settings() };
        check(&gateway, &[Status(503), Status(502)], true);
        check(&gateway, &[Status(503), Status(500), Status(503)], false);
        let split = OutlierDetection { split_external_local: true, ..settings() };
        check(&split, &[LocalFailure, LocalFailure], true);
        check(&split, &[LocalFailure, Status(200), LocalFailure], false);
    }

    #[test]
    fn ejections_end_and_each_lasts_longer_up_to_a_limit() {
        #[expect(clippy::disallowed_methods, reason = "any point in time does")]
        let t0 = Instant::now();
        let at = |s| t0 + Duration::from_secs(s);
        let outlier = Outlier::default();
        outlier.eject(&settings(), t0, Duration::ZERO);
        assert!(!outlier.tick(at(29)) && outlier.is_ejected());
        assert!(outlier.tick(at(30)) && !outlier.is_ejected());
        outlier.eject(&settings(), at(30), Duration::ZERO);
        assert!(!outlier.tick(at(89)));
        assert!(outlier.tick(at(90)));
        outlier.eject(&settings(), at(90), Duration::ZERO);
        assert!(outlier.tick(at(160)), "never longer than the longest ejection");
    }

    #[test]
    fn only_a_share_is_ejected() {
        assert!(may_eject(&settings(), 1, 4));
        assert!(!may_eject(&settings(), 2, 4));
        let none = OutlierDetection { max_ejection_percent: 0, ..settings() };
        assert!(!may_eject(&none, 0, 4));
        assert!(may_eject(&OutlierDetection { always_eject_one: true, ..none }, 0, 4));
    }
}
