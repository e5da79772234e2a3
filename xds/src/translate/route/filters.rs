//! What a route tells the filters in front of the router: header changes, faults and CORS.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as common_fault;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3 as cors;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as fault;
use registry::model::traffic::{
    CorsPolicy, ErrorType, FaultAbort, FaultDelay, HeaderOperations, Headers, HttpDelayType,
    HttpFaultInjection, UnmatchedPreflights, grpc_status,
};

use super::super::pb;
use super::matching;

/// Header changes in the form in which routes, weighted clusters and virtual hosts have them.
#[derive(Debug, Default)]
pub(super) struct HeaderChanges {
    pub(super) request_add: Vec<core::HeaderValueOption>,
    pub(super) request_remove: Vec<String>,
    pub(super) response_add: Vec<core::HeaderValueOption>,
    pub(super) response_remove: Vec<String>,
    /// The host that `Host` or `:authority` was set to.
    pub(super) authority: Option<String>,
}

impl HeaderChanges {
    pub(super) fn new(headers: Option<&Headers>) -> Self {
        let mut out = Self::default();
        let Some(headers) = headers else { return out };
        if let Some(request) = &headers.request {
            out.request_add = additions(request);
            out.request_remove = removals(request);
            out.authority =
                request.set.iter().find(|(name, _)| is_authority(name)).map(|(_, value)| value.clone());
        }
        if let Some(response) = &headers.response {
            out.response_add = additions(response);
            out.response_remove = removals(response);
        }
        out
    }

    /// These changes, then those of the only destination.
    pub(super) fn then(mut self, inner: Self) -> Self {
        self.request_add.extend(inner.request_add);
        self.request_remove.extend(inner.request_remove);
        self.response_add.extend(inner.response_add);
        self.response_remove.extend(inner.response_remove);
        self.authority = self.authority.or(inner.authority);
        self
    }
}

fn additions(operations: &HeaderOperations) -> Vec<core::HeaderValueOption> {
    let of = |values: &BTreeMap<String, String>, action: HeaderAppendAction| {
        let usable = values.iter().filter(|(name, _)| !is_internal(name));
        usable
            .map(|(name, value)| core::HeaderValueOption {
                header: Some(core::HeaderValue {
                    key: name.clone(),
                    value: value.clone(),
                    ..Default::default()
                }),
                append_action: action.into(),
                ..Default::default()
            })
            .collect::<Vec<_>>()
    };
    let mut out = of(&operations.set, HeaderAppendAction::OverwriteIfExistsOrAdd);
    out.extend(of(&operations.add, HeaderAppendAction::AppendIfExistsOrAdd));
    out
}

fn removals(operations: &HeaderOperations) -> Vec<String> {
    operations.remove.iter().filter(|name| !is_internal(name)).cloned().collect()
}

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name == ":authority"
}

fn is_internal(name: &str) -> bool {
    name.starts_with(':') || name.eq_ignore_ascii_case("host")
}

/// The fault of a route, if it injects any.
pub(super) fn http_fault(injection: &HttpFaultInjection) -> Option<fault::HttpFault> {
    let delay = injection.delay.as_ref().and_then(delay);
    let abort = injection.abort.as_ref().and_then(abort);
    (delay.is_some() || abort.is_some()).then(|| fault::HttpFault { delay, abort, ..Default::default() })
}

fn delay(delay: &FaultDelay) -> Option<common_fault::FaultDelay> {
    let duration = match delay.http_delay_type.as_ref()? {
        HttpDelayType::FixedDelay(duration) => *duration,
        HttpDelayType::ExponentialDelay(_) => return None,
    };
    let percentage = delay.percentage.as_ref().map_or(f64::from(delay.percent), |p| p.value);
    Some(common_fault::FaultDelay {
        percentage: Some(pb::fraction(percentage)),
        fault_delay_secifier: Some(common_fault::fault_delay::FaultDelaySecifier::FixedDelay(pb::duration(
            duration,
        ))),
    })
}

fn abort(abort: &FaultAbort) -> Option<fault::FaultAbort> {
    let error_type = match abort.error_type.as_ref()? {
        ErrorType::HttpStatus(status) => {
            fault::fault_abort::ErrorType::HttpStatus(u32::try_from(*status).ok()?)
        }
        ErrorType::GrpcStatus(name) => fault::fault_abort::ErrorType::GrpcStatus(grpc_status(name)?),
        ErrorType::Http2Error(_) => return None,
    };
    Some(fault::FaultAbort {
        percentage: Some(pb::fraction(abort.percentage.as_ref().map_or(0.0, |p| p.value))),
        error_type: Some(error_type),
        ..Default::default()
    })
}

/// The CORS policy of a route.
pub(super) fn cors_policy(policy: &CorsPolicy) -> cors::CorsPolicy {
    let exact = policy.allow_origin.iter().map(pb::exact);
    let patterns =
        policy.allow_origins.iter().map(|origin| matching::string(origin).unwrap_or_else(|| pb::regex(".*")));
    cors::CorsPolicy {
        allow_origin_string_match: exact.chain(patterns).collect(),
        allow_methods: policy.allow_methods.join(","),
        allow_headers: policy.allow_headers.join(","),
        expose_headers: policy.expose_headers.join(","),
        max_age: policy.max_age.map(|age| age.as_secs().to_string()).unwrap_or_default(),
        allow_credentials: policy.allow_credentials.and_then(pb::boolv),
        filter_enabled: Some(pb::runtime_fraction(100.0)),
        forward_not_matching_preflights: pb::boolv(
            policy.unmatched_preflights != UnmatchedPreflights::Ignore,
        ),
        ..Default::default()
    }
}
