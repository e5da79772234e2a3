//! HTTP filters and their settings per route.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as fault_common;
use envoy_types::pb::envoy::extensions::filters::http as pb;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::google::protobuf::Any;
use http::{HeaderValue, StatusCode};

use super::decode::{
    Fraction, Invalid, Under as _, fraction, header_value, is, opt_duration, runtime_fraction, u32_or, unpack,
};
use super::jwt::{JwtAuthn, JwtOverride};
use super::matcher::{HeaderMatcher, StringMatcher, headers};
use super::mutation::HeaderOps;
use super::rbac::Rbac;

/// One filter of a chain, in its place.
#[derive(Debug, Clone)]
pub struct HttpFilter {
    /// The name under which routes may change its settings.
    pub name: Arc<str>,
    /// What it does.
    pub config: FilterConfig,
    /// Off unless a route turns it on.
    pub disabled: bool,
}

/// What a filter does.
#[derive(Debug, Clone)]
pub enum FilterConfig {
    /// Sends the request on its way; always the last.
    Router(Router),
    /// Delays and aborts.
    Fault(Arc<Fault>),
    /// Who may do what.
    Rbac(Arc<Rbac>),
    /// Cross-origin requests; the policy is the route's.
    Cors,
    /// Tokens.
    JwtAuthn(Arc<JwtAuthn>),
    /// A token bucket.
    LocalRateLimit(Arc<LocalRateLimit>),
    /// Between gRPC-Web and gRPC.
    GrpcWeb,
    /// Counts gRPC messages.
    GrpcStats,
}

/// The router's own settings.
#[derive(Debug, Clone, Copy, Default)]
pub struct Router {
    /// Leave out `x-envoy-*` headers.
    pub suppress_envoy_headers: bool,
}

/// Injected faults.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Wait before the request goes on.
    pub delay: Option<(Fraction, Duration)>,
    /// Answer instead of the server.
    pub abort: Option<(Fraction, Abort)>,
    /// Only requests with all of these headers.
    pub headers: Box<[HeaderMatcher]>,
    /// Only requests to this cluster.
    pub upstream_cluster: Option<Box<str>>,
    /// Only callers with one of these node names (`x-envoy-downstream-service-node`).
    pub downstream_nodes: Box<[Box<str>]>,
    /// How many requests may be held at once.
    pub max_active: Option<u32>,
}

/// How an aborted request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    /// With an HTTP status.
    Http(StatusCode),
    /// With a gRPC status.
    Grpc(u32),
}

/// Which origins may call, and how.
#[derive(Debug, Clone)]
pub struct Cors {
    /// Origins that may.
    pub origins: Box<[StringMatcher]>,
    /// `access-control-allow-methods`
    pub allow_methods: Option<HeaderValue>,
    /// `access-control-allow-headers`
    pub allow_headers: Option<HeaderValue>,
    /// `access-control-expose-headers`
    pub expose_headers: Option<HeaderValue>,
    /// `access-control-max-age`
    pub max_age: Option<HeaderValue>,
    /// `access-control-allow-credentials: true`
    pub allow_credentials: Option<bool>,
    /// `access-control-allow-private-network: true`
    pub allow_private_network: Option<bool>,
    /// For which share of requests the policy holds.
    pub enabled: Fraction,
    /// Send preflight requests of other origins on to the server instead of answering them.
    pub forward_not_matching_preflights: Option<bool>,
}

impl Cors {
    /// What this policy does not say, the one above says.
    fn under(self, above: &Self) -> Self {
        let or = |own: Option<HeaderValue>, above: &Option<HeaderValue>| own.or_else(|| above.clone());
        Self {
            origins: if self.origins.is_empty() { above.origins.clone() } else { self.origins },
            allow_methods: or(self.allow_methods, &above.allow_methods),
            allow_headers: or(self.allow_headers, &above.allow_headers),
            expose_headers: or(self.expose_headers, &above.expose_headers),
            max_age: or(self.max_age, &above.max_age),
            allow_credentials: self.allow_credentials.or(above.allow_credentials),
            allow_private_network: self.allow_private_network.or(above.allow_private_network),
            enabled: self.enabled,
            forward_not_matching_preflights: self
                .forward_not_matching_preflights
                .or(above.forward_not_matching_preflights),
        }
    }
}

/// A token bucket.
#[derive(Debug, Clone)]
pub struct LocalRateLimit {
    /// Most tokens at once.
    pub max_tokens: u32,
    /// Tokens that come at each interval.
    pub tokens_per_fill: u32,
    /// The interval.
    pub fill_interval: Duration,
    /// Which share of requests takes a token.
    pub enabled: Fraction,
    /// Which share of those without a token is turned away.
    pub enforced: Fraction,
    /// The answer to those.
    pub status: StatusCode,
    /// Headers of that answer.
    pub response_headers: HeaderOps,
    /// A bucket for each connection instead of one for the listener.
    pub per_connection: bool,
    /// gRPC callers get RESOURCE_EXHAUSTED instead of UNAVAILABLE.
    pub resource_exhausted: bool,
}

/// What a route, virtual host or weighted cluster says about one filter.
#[derive(Debug, Clone)]
pub enum FilterOverride {
    /// The filter does nothing here.
    Disabled,
    /// These faults instead.
    Fault(Arc<Fault>),
    /// These rules instead.
    Rbac(Arc<Rbac>),
    /// This policy.
    Cors(Arc<Cors>),
    /// Another requirement for tokens.
    Jwt(Arc<JwtOverride>),
    /// This bucket instead.
    LocalRateLimit(Arc<LocalRateLimit>),
}

/// Settings per filter name; the most specific level that names a filter wins as a whole.
pub type PerFilter = BTreeMap<Arc<str>, FilterOverride>;

/// The filters of a connection manager, in order.
///
/// # Errors
///
/// A filter this proxy does not have and may not leave out, or a chain whose last filter is no router.
pub fn http_filters(pb: Vec<hcm::HttpFilter>) -> Result<Box<[HttpFilter]>, Invalid> {
    let mut filters = Vec::with_capacity(pb.len());
    for (i, filter) in pb.into_iter().enumerate() {
        filters.extend(http_filter(filter).at("http_filters", i)?);
    }
    let routers = filters.iter().filter(|f| matches!(f.config, FilterConfig::Router(_))).count();
    if routers != 1 || !filters.last().is_some_and(|f| matches!(f.config, FilterConfig::Router(_))) {
        return Err(Invalid::new(
            "http_filters",
            "the last filter, and no other, must be `envoy.filters.http.router`",
        ));
    }
    Ok(filters.into())
}

fn http_filter(pb: hcm::HttpFilter) -> Result<Option<HttpFilter>, Invalid> {
    if pb.name.is_empty() {
        return Err(Invalid::missing("name"));
    }
    let named = |e: Invalid| Invalid { reason: format!("filter `{}`: {}", pb.name, e.reason), ..e };
    let any = match pb.config_type {
        Some(hcm::http_filter::ConfigType::TypedConfig(any)) => any,
        _ if pb.is_optional => return Ok(None),
        Some(hcm::http_filter::ConfigType::ConfigDiscovery(_)) => {
            return Err(named(Invalid::unsupported("config_discovery")));
        }
        None => return Err(named(Invalid::missing("typed_config"))),
    };
    match filter_config(&any).map_err(named).under("typed_config")? {
        Some(config) => {
            if pb.disabled && matches!(config, FilterConfig::Router(_)) {
                return Err(named(Invalid::new("disabled", "the router cannot be off")));
            }
            Ok(Some(HttpFilter { name: pb.name.into(), config, disabled: pb.disabled }))
        }
        None if pb.is_optional => Ok(None),
        None => {
            let reason = format!("filter `{}` of type `{}` is not one this proxy has", pb.name, any.type_url);
            Err(Invalid::new("typed_config", reason))
        }
    }
}

/// `None`: a type that this proxy does not know.
fn filter_config(any: &Any) -> Result<Option<FilterConfig>, Invalid> {
    Ok(Some(if is::<pb::router::v3::Router>(any) {
        FilterConfig::Router(router(unpack(any)?)?)
    } else if is::<pb::fault::v3::HttpFault>(any) {
        FilterConfig::Fault(Arc::new(fault(unpack(any)?)?))
    } else if is::<pb::rbac::v3::Rbac>(any) {
        FilterConfig::Rbac(Arc::new(Rbac::http(unpack(any)?)?))
    } else if is::<pb::cors::v3::Cors>(any) {
        FilterConfig::Cors
    } else if is::<pb::jwt_authn::v3::JwtAuthentication>(any) {
        FilterConfig::JwtAuthn(Arc::new(JwtAuthn::new(unpack(any)?)?))
    } else if is::<pb::local_ratelimit::v3::LocalRateLimit>(any) {
        let pb: pb::local_ratelimit::v3::LocalRateLimit = unpack(any)?;
        FilterConfig::LocalRateLimit(Arc::new(local_rate_limit(pb)?))
    } else if is::<pb::grpc_web::v3::GrpcWeb>(any) {
        FilterConfig::GrpcWeb
    } else if is::<pb::grpc_stats::v3::FilterConfig>(any) {
        FilterConfig::GrpcStats
    } else {
        return Ok(None);
    }))
}

fn router(pb: pb::router::v3::Router) -> Result<Router, Invalid> {
    if !pb.strict_check_headers.is_empty() {
        return Err(Invalid::unsupported("strict_check_headers"));
    }
    if !pb.upstream_log.is_empty() {
        return Err(Invalid::unsupported("upstream_log"));
    }
    if pb.respect_expected_rq_timeout {
        return Err(Invalid::unsupported("respect_expected_rq_timeout"));
    }
    let codec = "envoy.filters.http.upstream_codec";
    if pb.upstream_http_filters.iter().any(|f| f.name != codec) {
        return Err(Invalid::unsupported("upstream_http_filters"));
    }
    Ok(Router { suppress_envoy_headers: pb.suppress_envoy_headers })
}

fn fault(pb: pb::fault::v3::HttpFault) -> Result<Fault, Invalid> {
    if pb.response_rate_limit.is_some() {
        return Err(Invalid::unsupported("response_rate_limit"));
    }
    let delay = pb.delay.map(delay).transpose().under("delay")?;
    let abort = pb.abort.map(abort).transpose().under("abort")?;
    Ok(Fault {
        delay,
        abort,
        headers: headers(pb.headers, "headers")?,
        upstream_cluster: (!pb.upstream_cluster.is_empty()).then(|| pb.upstream_cluster.into()),
        downstream_nodes: pb.downstream_nodes.into_iter().map(Into::into).collect(),
        max_active: pb.max_active_faults.map(|n| n.value),
    })
}

fn delay(pb: fault_common::FaultDelay) -> Result<(Fraction, Duration), Invalid> {
    use fault_common::fault_delay::FaultDelaySecifier as Pb;
    let share = pb.percentage.map_or(Ok(Fraction::NONE), fraction).under("percentage")?;
    match pb.fault_delay_secifier {
        Some(Pb::FixedDelay(d)) => {
            let delay = opt_duration(Some(d), "fixed_delay")?.unwrap_or_default();
            if delay.is_zero() {
                return Err(Invalid::new("fixed_delay", "must be more than 0"));
            }
            Ok((share, delay))
        }
        Some(Pb::HeaderDelay(_)) => Err(Invalid::unsupported("header_delay")),
        None => Err(Invalid::missing("fixed_delay")),
    }
}

fn abort(pb: pb::fault::v3::FaultAbort) -> Result<(Fraction, Abort), Invalid> {
    use pb::fault::v3::fault_abort::ErrorType;
    let share = pb.percentage.map_or(Ok(Fraction::NONE), fraction).under("percentage")?;
    let abort = match pb.error_type {
        Some(ErrorType::HttpStatus(code)) => Abort::Http(status(code, "http_status")?),
        Some(ErrorType::GrpcStatus(code)) => Abort::Grpc(code),
        Some(ErrorType::HeaderAbort(_)) => return Err(Invalid::unsupported("header_abort")),
        None => return Err(Invalid::missing("http_status")),
    };
    Ok((share, abort))
}

/// A status that a final response may have: 200 to 599.
pub(super) fn status(code: u32, field: &str) -> Result<StatusCode, Invalid> {
    u16::try_from(code)
        .ok()
        .filter(|c| (200..600).contains(c))
        .and_then(|c| StatusCode::from_u16(c).ok())
        .ok_or_else(|| Invalid::new(field, format!("{code} is not a status from 200 to 599")))
}

/// A cross-origin policy, in the form of the filter's own settings per route.
fn cors(pb: pb::cors::v3::CorsPolicy) -> Result<Cors, Invalid> {
    let origins = pb
        .allow_origin_string_match
        .into_iter()
        .enumerate()
        .map(|(i, m)| StringMatcher::new(m).at("allow_origin_string_match", i))
        .collect::<Result<_, _>>()?;
    let value = |s: &str, field: &str| -> Result<Option<HeaderValue>, Invalid> {
        if s.is_empty() { Ok(None) } else { header_value(s, field).map(Some) }
    };
    Ok(Cors {
        origins,
        allow_methods: value(&pb.allow_methods, "allow_methods")?,
        allow_headers: value(&pb.allow_headers, "allow_headers")?,
        expose_headers: value(&pb.expose_headers, "expose_headers")?,
        max_age: value(&pb.max_age, "max_age")?,
        allow_credentials: pb.allow_credentials.map(|b| b.value),
        allow_private_network: pb.allow_private_network_access.map(|b| b.value),
        enabled: runtime_fraction(pb.filter_enabled, "filter_enabled")?.unwrap_or(Fraction::ALL),
        forward_not_matching_preflights: pb.forward_not_matching_preflights.map(|b| b.value),
    })
}

/// A cross-origin policy, in the older form of a field of the route.
pub(super) fn route_cors(pb: route::CorsPolicy) -> Result<Cors, Invalid> {
    let filter_enabled = pb.enabled_specifier.map(|route::cors_policy::EnabledSpecifier::FilterEnabled(f)| f);
    cors(pb::cors::v3::CorsPolicy {
        allow_origin_string_match: pb.allow_origin_string_match,
        allow_methods: pb.allow_methods,
        allow_headers: pb.allow_headers,
        expose_headers: pb.expose_headers,
        max_age: pb.max_age,
        allow_credentials: pb.allow_credentials,
        filter_enabled,
        shadow_enabled: pb.shadow_enabled,
        allow_private_network_access: pb.allow_private_network_access,
        forward_not_matching_preflights: pb.forward_not_matching_preflights,
    })
}

fn local_rate_limit(pb: pb::local_ratelimit::v3::LocalRateLimit) -> Result<LocalRateLimit, Invalid> {
    if !pb.descriptors.is_empty() || !pb.rate_limits.is_empty() {
        return Err(Invalid::unsupported("descriptors"));
    }
    if pb.local_cluster_rate_limit.is_some() {
        return Err(Invalid::unsupported("local_cluster_rate_limit"));
    }
    let status = match pb.status {
        Some(s) if s.code != 0 => status(u32::try_from(s.code).unwrap_or(0), "status")?,
        _ => StatusCode::TOO_MANY_REQUESTS,
    };
    // Without a bucket the filter lets everything through.
    let (max_tokens, tokens_per_fill, fill_interval) = match pb.token_bucket {
        None => (u32::MAX, u32::MAX, Duration::from_secs(1)),
        Some(b) => {
            let interval = opt_duration(b.fill_interval, "token_bucket.fill_interval")?.unwrap_or_default();
            if interval < Duration::from_millis(50) {
                return Err(Invalid::new("token_bucket.fill_interval", "must be at least 50ms"));
            }
            if b.max_tokens == 0 {
                return Err(Invalid::new("token_bucket.max_tokens", "must be more than 0"));
            }
            (b.max_tokens, u32_or(b.tokens_per_fill, 1), interval)
        }
    };
    Ok(LocalRateLimit {
        max_tokens,
        tokens_per_fill,
        fill_interval,
        enabled: runtime_fraction(pb.filter_enabled, "filter_enabled")?.unwrap_or(Fraction::NONE),
        enforced: runtime_fraction(pb.filter_enforced, "filter_enforced")?.unwrap_or(Fraction::NONE),
        status,
        response_headers: HeaderOps::new(pb.response_headers_to_add, &[], "response")?,
        per_connection: pb.local_rate_limit_per_downstream_connection,
        resource_exhausted: pb.rate_limited_as_resource_exhausted,
    })
}

/// What one level of a route configuration says about filters, on top of what the level above said.
///
/// # Errors
///
/// Settings for a filter of a kind this proxy does not have, unless they are marked as optional.
pub fn per_filter(above: &Arc<PerFilter>, pb: HashMap<String, Any>) -> Result<Arc<PerFilter>, Invalid> {
    if pb.is_empty() {
        return Ok(Arc::clone(above));
    }
    let mut all = PerFilter::clone(above);
    let mut sorted: Vec<_> = pb.into_iter().collect();
    sorted.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    for (name, any) in sorted {
        let field = format!("typed_per_filter_config[{name}]");
        let own = filter_override(&any, false).under(&field)?;
        match (own, all.get(name.as_str())) {
            (None, _) => {}
            (Some(FilterOverride::Cors(own)), Some(FilterOverride::Cors(above))) => {
                let both = Arc::unwrap_or_clone(own).under(above);
                all.insert(name.into(), FilterOverride::Cors(Arc::new(both)));
            }
            (Some(own), _) => {
                all.insert(name.into(), own);
            }
        }
    }
    Ok(Arc::new(all))
}

fn filter_override(any: &Any, optional: bool) -> Result<Option<FilterOverride>, Invalid> {
    Ok(Some(if is::<route::FilterConfig>(any) {
        let wrapper: route::FilterConfig = unpack(any)?;
        match wrapper.config {
            _ if wrapper.disabled => FilterOverride::Disabled,
            // A wrapper in a wrapper means nothing, and would let a message nest without end.
            Some(inner) if !is::<route::FilterConfig>(&inner) => {
                return filter_override(&inner, wrapper.is_optional).under("config");
            }
            _ => return Ok(None),
        }
    } else if is::<pb::fault::v3::HttpFault>(any) {
        FilterOverride::Fault(Arc::new(fault(unpack(any)?)?))
    } else if is::<pb::rbac::v3::RbacPerRoute>(any) {
        let per_route: pb::rbac::v3::RbacPerRoute = unpack(any)?;
        match per_route.rbac {
            Some(rbac) => FilterOverride::Rbac(Arc::new(Rbac::http(rbac).under("rbac")?)),
            None => FilterOverride::Disabled,
        }
    } else if is::<pb::cors::v3::CorsPolicy>(any) {
        FilterOverride::Cors(Arc::new(cors(unpack(any)?)?))
    } else if is::<pb::jwt_authn::v3::PerRouteConfig>(any) {
        FilterOverride::Jwt(Arc::new(JwtOverride::new(unpack(any)?)?))
    } else if is::<pb::local_ratelimit::v3::LocalRateLimit>(any) {
        FilterOverride::LocalRateLimit(Arc::new(local_rate_limit(unpack(any)?)?))
    } else if optional {
        return Ok(None);
    } else {
        return Err(Invalid::new("", format!("`{}` belongs to no filter this proxy has", any.type_url)));
    }))
}
