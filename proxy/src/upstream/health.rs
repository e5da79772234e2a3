//! Passive health checks: endpoints that fail in a row are left out for a while. Pure: the clock is an argument.

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

/// What one endpoint did lately.
#[derive(Clone, Debug, Default)]
pub struct Outlier {
    errors: u32,
    gateway_errors: u32,
    local_failures: u32,
    ejections: u32,
    until: Option<Instant>,
}

impl Outlier {
    /// Notes a result; `true` asks for an ejection, which [`may_eject`] must allow. `draw` is a number below 100.
    pub fn on_result(&mut self, signal: Signal, settings: &OutlierDetection, draw: u32) -> bool {
        let local = signal == Signal::LocalFailure;
        if local && settings.split_external_local {
            self.local_failures += 1;
            return reached(
                &mut self.local_failures,
                settings.consecutive_local,
                settings.enforcing_local,
                draw,
            );
        }
        let status = match signal {
            Signal::Status(status) => status,
            Signal::LocalFailure => 503,
        };
        if settings.split_external_local {
            self.local_failures = 0;
        }
        if status < 500 {
            (self.errors, self.gateway_errors) = (0, 0);
            return false;
        }
        let mut eject = false;
        if matches!(status, 502..=504) {
            self.gateway_errors += 1;
            let (limit, share) = (settings.consecutive_gateway, settings.enforcing_gateway);
            eject |= reached(&mut self.gateway_errors, limit, share, draw);
        } else {
            self.gateway_errors = 0;
        }
        self.errors += 1;
        eject | reached(&mut self.errors, settings.consecutive_5xx, settings.enforcing_5xx, draw)
    }

    /// Ejects the endpoint; each further time lasts longer.
    pub fn eject(&mut self, settings: &OutlierDetection, now: Instant, jitter: Duration) {
        self.ejections += 1;
        let time = settings.base_ejection.saturating_mul(self.ejections).min(settings.max_ejection);
        self.until = Some(now + time + jitter);
    }

    /// The look at each interval; `true` when an ejection is over.
    pub fn tick(&mut self, now: Instant) -> bool {
        match self.until {
            Some(until) if now >= until => {
                *self = Self { ejections: self.ejections, ..Self::default() };
                true
            }
            Some(_) => false,
            None => {
                self.ejections = self.ejections.saturating_sub(1);
                false
            }
        }
    }

    /// Whether the endpoint is out.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.until.is_some()
    }
}

fn reached(count: &mut u32, limit: u32, enforcing: u32, draw: u32) -> bool {
    if limit == 0 || *count < limit {
        return false;
    }
    *count = 0;
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
        let mut outlier = Outlier::default();
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
        let mut outlier = Outlier::default();
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
