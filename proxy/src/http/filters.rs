//! What stands before the router: limits of the whole proxy, access rules, tokens, faults, rate limits, cross-origin
//! rules. Each filter lets a request pass or answers it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use serde_json::{Map, Value as Json};

use super::call::Call;
use super::flags::Flags;
use super::grpc_web::GrpcWeb;
use super::reply::Local;
use super::{Http, headers};
use crate::authz::jwt::{self, Place, Problem, Verified};
use crate::authz::{self, Subject, Verdict};
use crate::listener::connection::Connection;
use crate::router;
use crate::xds::filter::{
    Abort, Cors, Fault, FilterConfig, FilterOverride, HttpFilter, LocalRateLimit, PerFilter,
};
use crate::xds::jwt::{JwtAuthn, JwtOverride};
use crate::xds::matcher::StringMatcher;
use crate::xds::rbac::{Rbac, Rules};
use crate::xds::route::action::Action;

/// What a filter says.
#[derive(Debug)]
pub enum Pass {
    /// Go on.
    On,
    /// Answer this.
    Answer(Box<Local>),
    /// Answer this to a preflight request, with nothing of what the route says about responses.
    Preflight(Box<Local>),
    /// Wait, then ask [`abort`].
    Delay(Duration, Arc<Fault>),
}

/// The answer to a request that is too much; it may also be the last one of its connection.
pub fn shed(http: &Http, connection: &Connection) -> Option<Local> {
    let (worker, levels) = (&http.worker, http.worker.overload.levels());
    if levels.are_none() {
        return None;
    }
    if levels.end_connection(|| worker.random()) && !connection.is_draining() {
        http.stats.keepalive_disabled.inc();
        connection.drain();
    }
    levels.shed(|| worker.random()).then(|| {
        http.stats.shed.inc();
        let text = "envoy overloaded";
        Local::text(StatusCode::SERVICE_UNAVAILABLE, text).details("overload")
    })
}

/// Asks one filter; `levels` are the settings of the route that was found, if one was.
pub fn ask(http: &Http, filter: &HttpFilter, per_route: Option<&PerFilter>, call: &mut Call) -> Pass {
    let own = per_route.and_then(|p| p.get(&filter.name));
    if matches!(own, Some(FilterOverride::Disabled)) || (filter.disabled && own.is_none()) {
        return Pass::On;
    }
    match (&filter.config, own) {
        (FilterConfig::Rbac(_), Some(FilterOverride::Rbac(rbac))) | (FilterConfig::Rbac(rbac), _) => {
            access(http, rbac, call)
        }
        (FilterConfig::Fault(_), Some(FilterOverride::Fault(fault))) | (FilterConfig::Fault(fault), _) => {
            inject(http, fault, call)
        }
        (FilterConfig::LocalRateLimit(_), Some(FilterOverride::LocalRateLimit(limit)))
        | (FilterConfig::LocalRateLimit(limit), _) => rate_limit(http, limit, call),
        (FilterConfig::Cors, Some(FilterOverride::Cors(cors))) => cross_origin(http, cors, call),
        (FilterConfig::JwtAuthn(authn), own) => tokens(http, authn, own, call),
        (FilterConfig::GrpcWeb, _) => grpc_web(call),
        (FilterConfig::Router(_) | FilterConfig::Cors | FilterConfig::GrpcStats, _) => Pass::On,
    }
}

fn grpc_web(call: &mut Call) -> Pass {
    if let Some(web) = GrpcWeb::take(&mut call.parts.headers) {
        call.exchange.web = Some(Box::new(web));
        call.exchange.is_grpc = true;
    }
    Pass::On
}

fn access(http: &Http, rbac: &Rbac, call: &Call) -> Pass {
    if let Some(shadow) = &rbac.shadow_rules
        && let Verdict::Deny(_) = judge(shadow, call)
    {
        http.stats.rbac_shadow_denied.inc();
    }
    let Some(rules) = &rbac.rules else { return Pass::On };
    let Verdict::Deny(policy) = judge(rules, call) else {
        http.stats.rbac_allowed.inc();
        return Pass::On;
    };
    http.stats.rbac_denied.inc();
    let details = format!("rbac_access_denied_matched_policy[{}]", policy.unwrap_or("none"));
    Pass::Answer(Box::new(Local::text(StatusCode::FORBIDDEN, "RBAC: access denied").details(details)))
}

fn judge<'r>(rules: &'r Rules, call: &Call) -> Verdict<'r> {
    let connection = &call.exchange.connection;
    let subject = Subject {
        destination: connection.local,
        direct_remote: connection.direct_remote,
        remote: call.exchange.remote,
        peer: connection.peer.as_ref(),
        server_name: connection.server_name.as_deref(),
        request: Some(call.head()),
        metadata: call.exchange.metadata.as_deref(),
    };
    authz::allow(rules, &subject)
}

/// Asks for a token, and notes what a good one says.
fn tokens(http: &Http, authn: &JwtAuthn, own: Option<&FilterOverride>, call: &mut Call) -> Pass {
    for name in authn.own_headers() {
        call.parts.headers.remove(name);
    }
    let preflight = call.parts.method == Method::OPTIONS
        && call.parts.headers.contains_key(header::ORIGIN)
        && call.parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if authn.bypass_cors_preflight && preflight {
        return Pass::On;
    }
    let wanted = match own {
        Some(FilterOverride::Jwt(own)) => match &**own {
            JwtOverride::Disabled => None,
            JwtOverride::Requirement(name) => match authn.requirements.get(name) {
                Some(requirement) => Some(requirement),
                None => return no_token(StatusCode::FORBIDDEN, "Failed JWT authentication", call, false),
            },
        },
        _ => {
            let (head, certificate) = (call.head(), call.certificate());
            let random = http.worker.random();
            let rule = authn.rules.iter().find(|r| router::fits(&r.matches, &head, certificate, random));
            rule.and_then(|r| r.requires.as_ref())
        }
    };
    let Some(wanted) = wanted else { return Pass::On };
    let since = crate::worker::wall_clock().duration_since(std::time::UNIX_EPOCH);
    let now = since.map(|d| d.as_secs()).unwrap_or_default();
    match jwt::check(authn, wanted, &call.head(), now) {
        Ok(good) => {
            good.into_iter().for_each(|token| take_token(token, call));
            Pass::On
        }
        Err(problem) => {
            let elsewhere = problem == Problem::Audience;
            let status = if elsewhere { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
            no_token(status, &problem.to_string(), call, problem != Problem::Missing)
        }
    }
}

fn no_token(status: StatusCode, reason: &str, call: &Call, invalid: bool) -> Pass {
    let head = call.head();
    let mut challenge =
        format!("Bearer realm=\"{}://{}{}\"", head.scheme, head.authority, head.path_and_query);
    if invalid {
        challenge.push_str(", error=\"invalid_token\"");
    }
    let mut local = Local::text(status, reason.to_owned())
        .details(format!("jwt_authn_access_denied{{{}}}", reason.replace(' ', "_")));
    if let Ok(value) = HeaderValue::try_from(challenge) {
        local.headers.insert(header::WWW_AUTHENTICATE, value);
    }
    Pass::Answer(Box::new(local))
}

/// What a good token says goes where it is asked for; the token itself goes on only where it may.
fn take_token(token: Verified<'_>, call: &mut Call) {
    let provider = token.provider;
    if let Some(key) = &provider.payload_in_metadata {
        let metadata = call.exchange.metadata.get_or_insert_default();
        let ours = metadata.entry(jwt::NAMESPACE).or_insert_with(|| Json::Object(Map::new()));
        if let Json::Object(ours) = ours {
            ours.insert(key.to_string(), Json::Object(token.listed_claims()));
        }
    }
    let headers = &mut call.parts.headers;
    if let Some((name, padded)) = &provider.forward_payload
        && let Ok(value) = HeaderValue::try_from(token.payload_text(*padded))
    {
        headers.append(name, value);
    }
    for (name, claim) in &provider.claims_to_headers {
        if let Some(Ok(value)) = token.claim_text(claim).map(HeaderValue::try_from) {
            headers.append(name, value);
        }
    }
    if provider.forward {
        return;
    }
    match &token.place {
        Place::Header(name) => drop(headers.remove(name)),
        Place::Parameter(name) => {
            if let Ok(path) = jwt::without_parameter(call.path.as_str(), name).as_str().try_into() {
                call.path = path;
            }
        }
        // other cookies share the header
        Place::Cookie => {}
    }
}

fn inject(http: &Http, fault: &Arc<Fault>, call: &Call) -> Pass {
    let head = call.head();
    if !fault.headers.iter().all(|m| head.fulfils(m)) || !fault_is_for(fault, call) {
        return Pass::On;
    }
    let limit = fault.max_active.map_or(u64::MAX, u64::from);
    if http.stats.faults_active.get() >= limit {
        return Pass::On;
    }
    if let Some((share, delay)) = fault.delay
        && share.hits(http.worker.random())
    {
        return Pass::Delay(delay, Arc::clone(fault));
    }
    abort(http, fault)
}

fn fault_is_for(fault: &Fault, call: &Call) -> bool {
    let cluster = || call.exchange.upstream.as_ref().map(|u| &*u.config.name);
    if fault.upstream_cluster.as_deref().is_some_and(|wanted| cluster() != Some(wanted)) {
        return false;
    }
    let node = || call.parts.headers.get("x-envoy-downstream-service-node").map(HeaderValue::as_bytes);
    fault.downstream_nodes.is_empty() || fault.downstream_nodes.iter().any(|n| node() == Some(n.as_bytes()))
}

/// The answer in place of the server's, if this request is one of the share.
#[must_use]
pub fn abort(http: &Http, fault: &Fault) -> Pass {
    let Some((share, how)) = fault.abort else { return Pass::On };
    if !share.hits(http.worker.random()) {
        return Pass::On;
    }
    let text = "fault filter abort";
    let local = match how {
        Abort::Http(status) => Local::text(status, text),
        Abort::Grpc(code) => Local::text(StatusCode::OK, text).grpc_when_grpc(code),
    };
    Pass::Answer(Box::new(local.flag(Flags::FAULT_INJECTED).details("fault_filter_abort")))
}

fn rate_limit(http: &Http, limit: &Arc<LocalRateLimit>, call: &Call) -> Pass {
    if !limit.enabled.hits(http.worker.random()) || http.worker.take_token(limit, &call.exchange.connection) {
        return Pass::On;
    }
    if !limit.enforced.hits(http.worker.random()) {
        return Pass::On;
    }
    let mut local = Local::text(limit.status, "local_rate_limited")
        .flag(Flags::RATE_LIMITED)
        .details("local_rate_limited")
        .grpc_when_grpc(if limit.resource_exhausted { 8 } else { 14 });
    headers::apply(&limit.response_headers, &mut local.headers, &|f, now| call.render(f, None, Some(now)));
    local.headers.insert(headers::RATELIMITED, HeaderValue::from_static("true"));
    Pass::Answer(Box::new(local))
}

const ALLOW_ORIGIN: HeaderName = header::ACCESS_CONTROL_ALLOW_ORIGIN;

/// The origin of a request, if the policy allows it.
fn allowed_origin(cors: &Cors, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let fits = |m: &StringMatcher| {
        m.matches(origin.as_bytes()) || matches!(m, StringMatcher::Exact(s) if &**s == "*")
    };
    cors.origins.iter().any(fits).then(|| origin.clone())
}

fn cross_origin(http: &Http, cors: &Arc<Cors>, call: &mut Call) -> Pass {
    let told = call.parts.headers.get(header::ORIGIN).is_some_and(|origin| !origin.is_empty());
    let forwards = call.exchange.route.as_ref().is_some_and(|r| matches!(r.action, Action::Forward(_)));
    if !told || !forwards || !cors.enabled.hits(http.worker.random()) {
        return Pass::On;
    }
    let origin = allowed_origin(cors, &call.parts.headers);
    let preflight = call.parts.method == Method::OPTIONS
        && call.parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if !preflight {
        call.cors = origin.map(|origin| (Arc::clone(cors), origin));
        return Pass::On;
    }
    if origin.is_none() && cors.forward_not_matching_preflights.unwrap_or(true) {
        return Pass::On;
    }
    let mut local = Local::text(StatusCode::OK, "").details("cors_response");
    match origin {
        Some(origin) => cors_response(cors, origin, &mut local.headers),
        None => tell_credentials(cors, &mut local.headers),
    }
    let lists = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, &cors.allow_methods),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, &cors.allow_headers),
        (header::ACCESS_CONTROL_MAX_AGE, &cors.max_age),
    ];
    for (name, value) in lists {
        if let Some(value) = value {
            local.headers.insert(name, value.clone());
        }
    }
    let private = HeaderName::from_static("access-control-request-private-network");
    let asks = call.parts.headers.get(private).is_some_and(|value| value == "true");
    if asks && cors.allow_private_network == Some(true) {
        let name = HeaderName::from_static("access-control-allow-private-network");
        local.headers.insert(name, HeaderValue::from_static("true"));
    }
    Pass::Preflight(Box::new(local))
}

fn tell_credentials(cors: &Cors, headers: &mut HeaderMap) {
    if cors.allow_credentials == Some(true) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
}

/// Adds what a cross-origin response must say to an origin that is allowed.
pub fn cors_response(cors: &Cors, origin: HeaderValue, headers: &mut HeaderMap) {
    headers.insert(ALLOW_ORIGIN, origin);
    tell_credentials(cors, headers);
    if let Some(expose) = &cors.expose_headers {
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
    }
}

/// Why a filter answered, as the access log tells it.
pub type Details = Cow<'static, str>;
