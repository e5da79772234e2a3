//! Whether a failed attempt is tried again, and after what pause. Pure: the policy, the attempts so far and chance
//! go in.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use crate::http::head::Head;
use crate::xds::matcher::{HeaderKey, HeaderMatcher};
use crate::xds::route::retry::{RetryOn, RetryPolicy};

/// How an attempt ended, as far as retries look at it.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// No connection came about.
    ConnectFailure,
    /// The connection or stream broke before a response; `sent` tells whether the request went out.
    Reset {
        /// Whether the request's head was written.
        sent: bool,
    },
    /// The server refused the stream without looking at it.
    Refused,
    /// The attempt's own timeout passed.
    Timeout,
    /// A circuit breaker did not let it through.
    Overflow,
    /// A response came.
    Response(StatusCode, &'a HeaderMap),
}

/// What happens after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Try again after a pause.
    Again {
        /// The pause.
        after: Duration,
    },
    /// This outcome is the answer.
    Done,
    /// It would be tried again, but the policy allows no more attempts.
    LimitReached,
}

/// Whether the policy is for this request at all (`retriable_request_headers`).
#[must_use]
pub fn applies(policy: &RetryPolicy, head: &Head<'_>) -> bool {
    !policy.on.is_empty()
        && (policy.request_headers.is_empty() || policy.request_headers.iter().any(|m| head.fulfils(m)))
}

/// Decides after the attempt number `attempts`, the first being 1.
#[must_use]
pub fn next_attempt(
    policy: &RetryPolicy,
    attempts: u32,
    outcome: Outcome<'_>,
    rng: &mut fastrand::Rng,
) -> Next {
    if !is_retriable(policy, outcome) {
        return Next::Done;
    }
    if attempts > policy.num_retries {
        return Next::LimitReached;
    }
    Next::Again { after: pause(policy, attempts, rng) }
}

fn is_retriable(policy: &RetryPolicy, outcome: Outcome<'_>) -> bool {
    let on = policy.on;
    // a reset ends as a 5xx, so policies on those include it
    let any_reset = on.intersects(RetryOn::RESET.union(RetryOn::FIVE_XX).union(RetryOn::GATEWAY_ERROR));
    match outcome {
        Outcome::Overflow => false,
        Outcome::ConnectFailure => {
            any_reset || on.intersects(RetryOn::CONNECT_FAILURE.union(RetryOn::RESET_BEFORE_REQUEST))
        }
        Outcome::Reset { sent } => any_reset || (!sent && on.contains(RetryOn::RESET_BEFORE_REQUEST)),
        Outcome::Refused => any_reset || on.contains(RetryOn::REFUSED_STREAM),
        Outcome::Timeout => any_reset,
        Outcome::Response(status, headers) => is_retriable_response(policy, status, headers),
    }
}

fn is_retriable_response(policy: &RetryPolicy, status: StatusCode, headers: &HeaderMap) -> bool {
    let on = policy.on;
    // who asks for less is not asked again, whatever its status, unless the policy says so
    if headers.contains_key("x-envoy-ratelimited") {
        return on.contains(RetryOn::ENVOY_RATELIMITED);
    }
    let gateway = matches!(status.as_u16(), 502..=504);
    (on.contains(RetryOn::FIVE_XX) && status.is_server_error())
        || (on.contains(RetryOn::GATEWAY_ERROR) && gateway)
        || (on.contains(RetryOn::RETRIABLE_4XX) && status == StatusCode::CONFLICT)
        || (on.contains(RetryOn::RETRIABLE_STATUS_CODES) && policy.status_codes.contains(&status))
        || (on.contains(RetryOn::RETRIABLE_HEADERS) && has_retriable_header(policy, headers))
        || is_retriable_grpc(on, headers)
}

fn has_retriable_header(policy: &RetryPolicy, headers: &HeaderMap) -> bool {
    policy.response_headers.iter().any(|m: &HeaderMatcher| {
        let HeaderKey::Name(name) = &m.key else { return false };
        m.matches(headers.get(name).map(http::HeaderValue::as_bytes))
    })
}

/// gRPC statuses that come in the head of a response (trailers-only).
fn is_retriable_grpc(on: RetryOn, headers: &HeaderMap) -> bool {
    let wanted = match headers.get("grpc-status").map(http::HeaderValue::as_bytes) {
        Some(b"1") => RetryOn::CANCELLED,
        Some(b"4") => RetryOn::DEADLINE_EXCEEDED,
        Some(b"8") => RetryOn::RESOURCE_EXHAUSTED,
        Some(b"13") => RetryOn::INTERNAL,
        Some(b"14") => RetryOn::UNAVAILABLE,
        _ => return false,
    };
    on.contains(wanted)
}

/// A random share of base x (2^n - 1), up to the longest pause.
fn pause(policy: &RetryPolicy, attempts: u32, rng: &mut fastrand::Rng) -> Duration {
    let factor = 1_u32.checked_shl(attempts).map_or(u32::MAX, |f| f - 1).max(1);
    let most = policy.base_interval.saturating_mul(factor).min(policy.max_interval);
    let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
    Duration::from_micros(rng.u64(0..=micros))
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::route::v3 as pb;

    fn policy(on: &str, retries: u32) -> RetryPolicy {
        let pb = pb::RetryPolicy {
            retry_on: on.into(),
            num_retries: Some(envoy_types::pb::google::protobuf::UInt32Value { value: retries }),
            ..Default::default()
        };
        RetryPolicy::new(pb).unwrap()
    }

    #[track_caller]
    fn check(on: &str, outcome: Outcome<'_>, again: bool) {
        let next = next_attempt(&policy(on, 2), 1, outcome, &mut fastrand::Rng::with_seed(1));
        assert_eq!(matches!(next, Next::Again { .. }), again, "{on}: {outcome:?}");
    }

    #[test]
    fn conditions_choose_outcomes() {
        let istio = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes,503";
        let none = HeaderMap::new();
        let status = |code| Outcome::Response(StatusCode::from_u16(code).unwrap(), &none);
        check(istio, Outcome::ConnectFailure, true);
        check(istio, Outcome::Refused, true);
        check(istio, Outcome::Reset { sent: true }, false);
        check(istio, status(503), true);
        check(istio, status(500), false);
        check("5xx", status(500), true);
        check("5xx", Outcome::Timeout, true);
        check("gateway-error", status(500), false);
        check("gateway-error", status(502), true);
        check("reset-before-request", Outcome::Reset { sent: false }, true);
        check("reset-before-request", Outcome::Reset { sent: true }, false);
        check("reset", Outcome::Reset { sent: true }, true);
        check("retriable-4xx", status(409), true);
        check("5xx", Outcome::Overflow, false);
        check("", status(503), false);
    }

    #[test]
    fn who_asks_for_less_is_asked_again_only_where_the_policy_says_so() {
        let mut headers = HeaderMap::new();
        headers.insert("x-envoy-ratelimited", "true".parse().unwrap());
        let limited = Outcome::Response(StatusCode::SERVICE_UNAVAILABLE, &headers);
        check("5xx,retriable-status-codes,503", limited, false);
        check("envoy-ratelimited", limited, true);
    }

    #[test]
    fn grpc_statuses_in_the_head_count() {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", "14".parse().unwrap());
        check("unavailable", Outcome::Response(StatusCode::OK, &headers), true);
        check("cancelled", Outcome::Response(StatusCode::OK, &headers), false);
    }

    #[test]
    fn attempts_are_counted() {
        let mut rng = fastrand::Rng::with_seed(1);
        let policy = policy("connect-failure", 2);
        let mut next = |n| next_attempt(&policy, n, Outcome::ConnectFailure, &mut rng);
        assert!(matches!(next(2), Next::Again { .. }));
        assert_eq!(next(3), Next::LimitReached);
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let mut rng = fastrand::Rng::with_seed(1);
        let policy = policy("5xx", 100);
        for (attempt, most) in [(1, 25), (2, 75), (3, 175), (4, 250), (40, 250)] {
            for _ in 0..200 {
                assert!(pause(&policy, attempt, &mut rng) <= Duration::from_millis(most));
            }
        }
    }
}
