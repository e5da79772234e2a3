//! Passive health checks of a cluster.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::google::protobuf::UInt32Value;

use crate::xds::decode::{Invalid, bool_or, opt_duration, u32_or};

/// Passive health checks: endpoints that fail are left out for a while. Percentages are 0 to 100.
#[derive(Debug, Clone, PartialEq)]
pub struct OutlierDetection {
    /// 5xx in a row until ejection; 0: never.
    pub consecutive_5xx: u32,
    /// How surely that ejects.
    pub enforcing_5xx: u32,
    /// 502, 503 and 504 in a row until ejection; 0: never.
    pub consecutive_gateway: u32,
    /// How surely that ejects.
    pub enforcing_gateway: u32,
    /// Count failures to connect by themselves.
    pub split_external_local: bool,
    /// Failures to connect in a row until ejection.
    pub consecutive_local: u32,
    /// How surely that ejects.
    pub enforcing_local: u32,
    /// Between two looks at all endpoints.
    pub interval: Duration,
    /// The first ejection's time; each further one takes that much longer.
    pub base_ejection: Duration,
    /// The longest ejection.
    pub max_ejection: Duration,
    /// Up to this much more by chance, so that not all come back at once.
    pub max_jitter: Duration,
    /// At most this share of endpoints is out.
    pub max_ejection_percent: u32,
    /// One may be out even if that is more than the share.
    pub always_eject_one: bool,
    /// An active check that succeeds ends an ejection.
    pub uneject: bool,
    /// Ejection by success rate: how surely, and by how many standard deviations (thousandths).
    pub success_rate: SuccessRate,
    /// Ejection by share of failures.
    pub failure_percentage: FailurePercentage,
}

/// Ejection by success rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuccessRate {
    /// How surely.
    pub enforcing: u32,
    /// Fewest endpoints with enough requests.
    pub minimum_hosts: u32,
    /// Enough requests in one interval.
    pub request_volume: u32,
    /// Thousandths of a standard deviation below the mean.
    pub stdev_factor: u32,
}

/// Ejection by share of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailurePercentage {
    /// How surely.
    pub enforcing: u32,
    /// The share of failures that ejects.
    pub threshold: u32,
    /// Fewest endpoints with enough requests.
    pub minimum_hosts: u32,
    /// Enough requests in one interval.
    pub request_volume: u32,
}

impl OutlierDetection {
    pub(super) fn new(pb: pb::OutlierDetection) -> Result<Self, Invalid> {
        if !pb.monitors.is_empty() {
            return Err(Invalid::unsupported("monitors"));
        }
        // Ejection by comparison is not carried out. Where nothing is said about it, it is left out; asked for by name,
        // it is refused.
        for (share, field) in [
            (pb.enforcing_success_rate, "enforcing_success_rate"),
            (pb.enforcing_failure_percentage, "enforcing_failure_percentage"),
            (pb.enforcing_local_origin_success_rate, "enforcing_local_origin_success_rate"),
            (pb.enforcing_failure_percentage_local_origin, "enforcing_failure_percentage_local_origin"),
        ] {
            if share.is_some_and(|n| n.value > 0) {
                return Err(Invalid::unsupported(field));
            }
        }
        let percent = |n: Option<UInt32Value>, default: u32, field: &str| {
            let n = u32_or(n, default);
            if n > 100 { Err(Invalid::new(field, format!("{n} is above 100"))) } else { Ok(n) }
        };
        let time = |d, default: u64, field: &str| -> Result<Duration, Invalid> {
            match opt_duration(d, field)? {
                Some(d) if d.is_zero() => Err(Invalid::new(field, "must be more than 0")),
                Some(d) => Ok(d),
                None => Ok(Duration::from_secs(default)),
            }
        };
        let base_ejection = time(pb.base_ejection_time, 30, "base_ejection_time")?;
        Ok(Self {
            consecutive_5xx: u32_or(pb.consecutive_5xx, 5),
            enforcing_5xx: percent(pb.enforcing_consecutive_5xx, 100, "enforcing_consecutive_5xx")?,
            consecutive_gateway: u32_or(pb.consecutive_gateway_failure, 5),
            enforcing_gateway: percent(
                pb.enforcing_consecutive_gateway_failure,
                0,
                "enforcing_consecutive_gateway_failure",
            )?,
            split_external_local: pb.split_external_local_origin_errors,
            consecutive_local: u32_or(pb.consecutive_local_origin_failure, 5),
            enforcing_local: percent(
                pb.enforcing_consecutive_local_origin_failure,
                100,
                "enforcing_consecutive_local_origin_failure",
            )?,
            interval: time(pb.interval, 10, "interval")?,
            max_ejection: time(pb.max_ejection_time, 300, "max_ejection_time")?.max(base_ejection),
            base_ejection,
            max_jitter: opt_duration(pb.max_ejection_time_jitter, "max_ejection_time_jitter")?
                .unwrap_or_default(),
            max_ejection_percent: percent(pb.max_ejection_percent, 10, "max_ejection_percent")?,
            always_eject_one: bool_or(pb.always_eject_one_host, false),
            uneject: bool_or(pb.successful_active_health_check_uneject_host, true),
            success_rate: SuccessRate {
                enforcing: percent(pb.enforcing_success_rate, 100, "enforcing_success_rate")?,
                minimum_hosts: u32_or(pb.success_rate_minimum_hosts, 5),
                request_volume: u32_or(pb.success_rate_request_volume, 100),
                stdev_factor: u32_or(pb.success_rate_stdev_factor, 1900),
            },
            failure_percentage: FailurePercentage {
                enforcing: percent(pb.enforcing_failure_percentage, 0, "enforcing_failure_percentage")?,
                threshold: percent(pb.failure_percentage_threshold, 85, "failure_percentage_threshold")?,
                minimum_hosts: u32_or(pb.failure_percentage_minimum_hosts, 5),
                request_volume: u32_or(pb.failure_percentage_request_volume, 50),
            },
        })
    }
}
