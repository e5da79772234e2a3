//! Retries: Istio's defaults, a mesh's, a route's.

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::retry_policy;
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use envoy_types::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;
use registry::model::traffic::HttpRetry;

use super::super::pb;

const DEFAULT_CONDITIONS: &str = "connect-failure,refused-stream,unavailable,cancelled";
const DEFAULT_ATTEMPTS: u32 = 2;
/// Hosts looked at before one that was tried already is taken again.
const HOST_SELECTIONS: i64 = 5;

/// The retry policy of a route, or of the mesh, or Istio's; `None` when retries are switched off. With a consistent
/// hash the same host is right again, so hosts are not excluded.
pub(super) fn policy(
    own: Option<&HttpRetry>,
    mesh: Option<&HttpRetry>,
    consistent_hash: bool,
) -> Option<route::RetryPolicy> {
    let Some(retry) = own.or(mesh) else { return Some(with_hosts(default(), consistent_hash)) };
    let attempts = u32::try_from(retry.attempts).ok().filter(|attempts| *attempts > 0)?;
    let (retry_on, retriable_status_codes) = conditions(&retry.retry_on);
    let priority = PreviousPrioritiesConfig { update_frequency: 2 };
    let policy = route::RetryPolicy {
        retry_on,
        retriable_status_codes,
        num_retries: pb::u32v(attempts),
        per_try_timeout: retry.per_try_timeout.map(pb::duration),
        retry_priority: (retry.retry_remote_localities == Some(true)).then(|| retry_policy::RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".to_owned(),
            config_type: Some(retry_policy::retry_priority::ConfigType::TypedConfig(pb::any(&priority))),
        }),
        retry_back_off: retry.backoff.map(|base| retry_policy::RetryBackOff {
            base_interval: Some(pb::duration(base)),
            max_interval: None,
        }),
        ..Default::default()
    };
    let same_host = consistent_hash || retry.retry_ignore_previous_hosts == Some(false);
    Some(with_hosts(policy, same_host))
}

/// Retries of a sidecar towards its own application: only what never reached it.
pub(super) fn inbound(mesh: Option<&HttpRetry>) -> Option<route::RetryPolicy> {
    match mesh {
        None => Some(route::RetryPolicy {
            retry_on: "reset-before-request".to_owned(),
            num_retries: pb::u32v(DEFAULT_ATTEMPTS),
            ..Default::default()
        }),
        Some(retry) => policy(Some(retry), None, true),
    }
}

fn default() -> route::RetryPolicy {
    route::RetryPolicy {
        retry_on: DEFAULT_CONDITIONS.to_owned(),
        num_retries: pb::u32v(DEFAULT_ATTEMPTS),
        ..Default::default()
    }
}

fn with_hosts(mut policy: route::RetryPolicy, same_host: bool) -> route::RetryPolicy {
    if !same_host {
        policy.host_selection_retry_max_attempts = HOST_SELECTIONS;
        policy.retry_host_predicate = vec![retry_policy::RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
            config_type: Some(retry_policy::retry_host_predicate::ConfigType::TypedConfig(pb::any(
                &PreviousHostsPredicate {},
            ))),
        }];
    }
    policy
}

/// Conditions by name; the integers among them are status codes.
fn conditions(text: &str) -> (String, Vec<u32>) {
    if text.trim().is_empty() {
        return (DEFAULT_CONDITIONS.to_owned(), Vec::new());
    }
    let mut names = Vec::new();
    let mut codes = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        match part.parse::<u32>() {
            Ok(code) => codes.push(code),
            Err(_) => names.push(part),
        }
    }
    if !codes.is_empty() && !names.contains(&"retriable-status-codes") {
        names.push("retriable-status-codes");
    }
    (names.join(","), codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_among_the_conditions_are_status_codes() {
        assert_eq!(conditions("5xx,503, 429"), ("5xx,retriable-status-codes".to_owned(), vec![503, 429]));
        assert_eq!(conditions("").0, DEFAULT_CONDITIONS);
    }

    #[test]
    fn no_attempts_means_no_retries() {
        let off = HttpRetry { attempts: 0, ..HttpRetry::default() };
        assert_eq!(policy(Some(&off), None, false), None);
        assert_eq!(policy(None, Some(&off), false), None);
        assert!(policy(None, None, false).is_some_and(|p| p.host_selection_retry_max_attempts == 5));
        assert!(policy(None, None, true).is_some_and(|p| p.retry_host_predicate.is_empty()));
    }
}
