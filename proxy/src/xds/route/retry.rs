//! Retry policies.

use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as pb;
use http::StatusCode;

use crate::xds::decode::{Invalid, Under as _, opt_duration, timeout, u32_or};
use crate::xds::filter::status;
use crate::xds::matcher::{HeaderMatcher, headers};

/// A set of conditions for a retry, one bit each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetryOn(u32);

macro_rules! conditions {
    ($($bit:expr => $constant:ident $name:literal $doc:literal),* $(,)?) => {
        impl RetryOn {
            $(#[doc = $doc] pub const $constant: Self = Self(1 << $bit);)*

            /// The condition of this name.
            fn named(name: &str) -> Option<Self> {
                Some(match name {
                    $($name => Self::$constant,)*
                    _ => return None,
                })
            }
        }
    };
}

conditions! {
    0 => FIVE_XX "5xx" "Any 5xx response, or no response at all.",
    1 => GATEWAY_ERROR "gateway-error" "502, 503 or 504.",
    2 => RESET "reset" "The server gave no response: disconnect, reset, read timeout.",
    3 => RESET_BEFORE_REQUEST "reset-before-request" "As `reset`, and the request's headers were not sent yet.",
    4 => CONNECT_FAILURE "connect-failure" "No connection came about.",
    5 => REFUSED_STREAM "refused-stream" "HTTP/2 REFUSED_STREAM.",
    6 => RETRIABLE_4XX "retriable-4xx" "409.",
    7 => RETRIABLE_STATUS_CODES "retriable-status-codes" "One of the policy's own statuses.",
    8 => RETRIABLE_HEADERS "retriable-headers" "A response with one of the policy's own headers.",
    9 => ENVOY_RATELIMITED "envoy-ratelimited" "A response with `x-envoy-ratelimited`.",
    10 => HTTP3_POST_CONNECT_FAILURE "http3-post-connect-failure" "Never happens: no HTTP/3.",
    11 => CANCELLED "cancelled" "gRPC status CANCELLED.",
    12 => DEADLINE_EXCEEDED "deadline-exceeded" "gRPC status DEADLINE_EXCEEDED.",
    13 => INTERNAL "internal" "gRPC status INTERNAL.",
    14 => RESOURCE_EXHAUSTED "resource-exhausted" "gRPC status RESOURCE_EXHAUSTED.",
    15 => UNAVAILABLE "unavailable" "gRPC status UNAVAILABLE.",
}

impl RetryOn {
    /// From the list with commas that configuration and the header `x-envoy-retry-on` use. Names that are not
    /// known are left out, as in Envoy; a number is a status (Istio's form) and comes back beside the set.
    #[must_use]
    pub fn parse(list: &str) -> (Self, Vec<StatusCode>) {
        let mut on = Self::default();
        let mut codes = Vec::new();
        for name in list.split(',').map(str::trim) {
            if let Some(condition) = Self::named(name) {
                on.0 |= condition.0;
            } else if let Ok(code) = name.parse().map_err(|_| ()).and_then(|n| status(n, "").map_err(|_| ()))
            {
                codes.push(code);
                on.0 |= Self::RETRIABLE_STATUS_CODES.0;
            }
        }
        (on, codes)
    }

    /// Whether all of `other`'s conditions are in this set.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether one of `other`'s conditions is in this set.
    #[must_use]
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both sets together.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether there is no condition at all.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// When and how a request is tried again.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// After what.
    pub on: RetryOn,
    /// Statuses for `retriable-status-codes`.
    pub status_codes: Box<[StatusCode]>,
    /// Response headers for `retriable-headers`.
    pub response_headers: Box<[HeaderMatcher]>,
    /// Only requests with one of these headers are tried again; empty: all.
    pub request_headers: Box<[HeaderMatcher]>,
    /// How often at most, after the first time.
    pub num_retries: u32,
    /// How long one attempt may take; `None`: as long as the whole request.
    pub per_try_timeout: Option<Duration>,
    /// The first pause; it doubles each time, and a random share of it is waited.
    pub base_interval: Duration,
    /// The longest pause.
    pub max_interval: Duration,
    /// Do not pick a host that was tried already, if there is another.
    pub avoid_previous_hosts: bool,
    /// How often a host is picked anew to fulfil the above.
    pub host_selection_attempts: u32,
}

impl RetryPolicy {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// Anything in it that is not valid or not carried out by this proxy.
    pub fn new(pb: pb::RetryPolicy) -> Result<Self, Invalid> {
        if pb.rate_limited_retry_back_off.is_some() {
            return Err(Invalid::unsupported("rate_limited_retry_back_off"));
        }
        // `retry_priority` says which localities a retry prefers. It goes by health alone here, and a host that
        // failed is left out by `retry_host_predicate`.
        if pb.per_try_idle_timeout.is_some() {
            return Err(Invalid::unsupported("per_try_idle_timeout"));
        }
        if !pb.retry_options_predicates.is_empty() {
            return Err(Invalid::unsupported("retry_options_predicates"));
        }
        let (on, mut codes) = RetryOn::parse(&pb.retry_on);
        for code in pb.retriable_status_codes {
            codes.push(status(code, "retriable_status_codes")?);
        }
        let (base_interval, max_interval) = match pb.retry_back_off {
            None => (Duration::from_millis(25), Duration::from_millis(250)),
            Some(b) => back_off(b).under("retry_back_off")?,
        };
        let mut avoid_previous_hosts = false;
        for (i, predicate) in pb.retry_host_predicate.into_iter().enumerate() {
            match predicate.name.as_str() {
                "envoy.retry_host_predicates.previous_hosts" => avoid_previous_hosts = true,
                // Canary hosts do not exist here, so leaving them out changes nothing.
                "envoy.retry_host_predicates.omit_canary_hosts" => {}
                other => {
                    let reason = format!("`{other}` is not a predicate this proxy has");
                    return Err(Invalid::new(format!("retry_host_predicate[{i}]"), reason));
                }
            }
        }
        Ok(Self {
            on,
            status_codes: codes.into(),
            response_headers: headers(pb.retriable_headers, "retriable_headers")?,
            request_headers: headers(pb.retriable_request_headers, "retriable_request_headers")?,
            num_retries: u32_or(pb.num_retries, 1),
            per_try_timeout: timeout(pb.per_try_timeout, None, "per_try_timeout")?,
            base_interval,
            max_interval,
            avoid_previous_hosts,
            host_selection_attempts: u32::try_from(pb.host_selection_retry_max_attempts.max(1))
                .unwrap_or(u32::MAX),
        })
    }
}

fn back_off(pb: pb::retry_policy::RetryBackOff) -> Result<(Duration, Duration), Invalid> {
    let base = opt_duration(pb.base_interval, "base_interval")?.unwrap_or_default();
    if base.is_zero() {
        return Err(Invalid::new("base_interval", "must be more than 0"));
    }
    // Envoy rounds anything below a millisecond up to one.
    let base = base.max(Duration::from_millis(1));
    let max = opt_duration(pb.max_interval, "max_interval")?.unwrap_or_else(|| base.saturating_mul(10));
    if max < base {
        return Err(Invalid::new("max_interval", "is below base_interval"));
    }
    Ok((base, max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istios_list_parses() {
        let (on, codes) =
            RetryOn::parse("connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes,503");
        assert!(on.contains(RetryOn::CONNECT_FAILURE.union(RetryOn::UNAVAILABLE)));
        assert!(!on.intersects(RetryOn::FIVE_XX.union(RetryOn::GATEWAY_ERROR)));
        assert_eq!(codes, [StatusCode::SERVICE_UNAVAILABLE]);
        assert!(RetryOn::parse("").0.is_empty());
    }
}
