//! Sends a request until there is an answer: pick, send under timeouts, judge, and perhaps again.

use std::cell::Cell;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use http::header::HeaderValue;
use http::{StatusCode, Version, response};
use http_body::Body as _;
use tokio::time::Instant;

use super::call::{Call, refusal_of_body};
use super::exchange::grpc_status;
use super::flags::Flags;
use super::headers;
use super::reply::{Local, http_of};
use super::timing::{Attempt, Late};
use super::tunnel;
use super::{Decision, Http};
use crate::metrics::standard::Reporter;
use crate::retry::{self, Next, Outcome};
use crate::upstream::health::Signal;
use crate::upstream::pool::Reply;
use crate::upstream::send::{Answer, Outgoing};
use crate::upstream::{Ask, Failure, FailureKind, Host, Upstream};
use crate::xds::route::VirtualHost;
use crate::xds::route::action::{Forward, HashOn, HostRewrite, MirrorPolicy};
use crate::xds::route::retry::RetryPolicy;

/// The longest life of a mirrored request: a server that never answers must not collect them.
const MIRROR_LIFE: Duration = Duration::from_secs(300);

/// An upstream's answer.
#[derive(Debug)]
pub struct Answered {
    /// Its head.
    pub parts: response::Parts,
    /// What brings its body.
    pub reply: Box<Reply>,
    /// When the last attempt began.
    pub began: Instant,
    /// When its head was here.
    pub at: Instant,
    /// A cookie that ties the client to an endpoint.
    pub cookie: Option<HeaderValue>,
}

/// How an attempt ended without an answer.
enum Miss {
    Failed(Failure),
    Late(Late),
}

/// Sends the request.
///
/// # Errors
///
/// The proxy's own answer when there is none of an upstream.
pub async fn run(
    http: &Rc<Http>,
    decision: &Decision,
    upstream: &Rc<Upstream>,
    call: &mut Call,
) -> Result<Answered, Box<Local>> {
    let Some(forward) = decision.forward() else { return Err(Box::new(unrouted())) };
    let policy = forward.retry.as_deref().filter(|p| !call.upgrade && retry::applies(p, &call.head()));
    let timeout = timeout_of(forward, call);
    // nothing before this waits but an injected delay
    let delayed = call.exchange.flags.contains(Flags::DELAY_INJECTED);
    let mut now = if delayed { Instant::now() } else { call.exchange.started };
    call.exchange.timing.forward(now, timeout);
    // it holds for the only try, too
    let per_try = forward.retry.as_deref().filter(|_| !call.upgrade).and_then(|p| p.per_try_timeout);
    let (hash, cookie) = hash_of(http, forward, call);
    if upstream.is_cold() {
        if let Some(late) = warm(upstream, call).await {
            return Err(Box::new(too_late(call, late)));
        }
        now = Instant::now();
    }
    let mut tried: Vec<Rc<Host>> = Vec::new();
    loop {
        let attempt = call.exchange.attempts + 1;
        let ask = ask(policy, hash, &tried, call);
        call.exchange.attempts = attempt;
        let Some(endpoint) = upstream.pick(ask) else { return Err(Box::new(no_healthy_upstream())) };
        call.exchange.host = Some(Rc::clone(&endpoint));
        if attempt == 1 {
            super::mirror(http, decision, call);
            tell_timeout(http, [per_try, timeout].into_iter().flatten().min(), call);
        }
        let more = policy.is_some_and(|p| attempt <= p.num_retries);
        let keep = more || call.replay.is_some();
        let limit = usize::try_from(upstream.config.buffer_limit).unwrap_or(usize::MAX);
        let Some(mut outgoing) = call.outgoing(keep, limit) else { return Err(Box::new(unrepeatable())) };
        dress(http, &decision.host, forward, &endpoint, attempt, &mut outgoing);
        outgoing.origin = endpoint.origin(&call.exchange.connection);
        let result = one(upstream, &endpoint, outgoing, (now, per_try), call).await;
        if let Some(refusal) = call.exchange.web.as_ref().and_then(|web| web.refusal()) {
            return Err(refusal);
        }
        note(upstream, &endpoint, &result, call.exchange.is_grpc);
        let next = judge(http, policy, attempt, &result);
        if let Next::Again { after } = next
            && let Some(retrying) = may_retry(upstream, call)
        {
            call.exchange.retrying = Some(retrying);
            if let Err(miss) = &result {
                call.exchange.failure = miss.reason();
            }
            tried.push(endpoint);
            // an answer that is complete leaves a connection that the next attempt can use
            if let Ok((_, mut reply)) = result
                && reply.is_end()
            {
                reply.release(Instant::now());
            }
            match pause(after, call).await {
                None => {
                    now = Instant::now();
                    continue;
                }
                Some(late) => return Err(Box::new(too_late(call, late))),
            }
        }
        call.exchange.retrying = None;
        return conclude(call, next, result, now, cookie).map_err(Box::new);
    }
}

/// Tells the endpoint how long its answer is waited for.
fn tell_timeout(http: &Http, limit: Option<Duration>, call: &mut Call) {
    if let Some(limit) = limit.filter(|_| !http.router.suppress_envoy_headers) {
        let ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        call.parts.headers.insert(headers::EXPECTED_TIMEOUT, headers::number(ms));
    }
}

/// One attempt, within its own timeout and the limits of the stream.
async fn one(
    upstream: &Rc<Upstream>,
    endpoint: &Rc<Host>,
    outgoing: Outgoing,
    (now, per_try): (Instant, Option<Duration>),
    call: &mut Call,
) -> Result<Answer, Miss> {
    let ready = Cell::new(None);
    let mut sending = std::pin::pin!(upstream.send(endpoint, outgoing, now, &ready));
    std::future::poll_fn(|cx| {
        if let Poll::Ready(result) = sending.as_mut().poll(cx) {
            return Poll::Ready(result.map_err(Miss::Failed));
        }
        let attempt = Attempt { timeout: per_try, ready: ready.get() };
        call.exchange.poll_late(Some(attempt), cx).map(|late| Err(Miss::Late(late)))
    })
    .await
}

/// Waits until the cluster knows its endpoints; tells which limit of the stream passed meanwhile, if one did.
async fn warm(upstream: &Upstream, call: &mut Call) -> Option<Late> {
    let mut warm = std::pin::pin!(upstream.warm());
    std::future::poll_fn(|cx| {
        if warm.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        call.exchange.poll_late(Some(Attempt::default()), cx).map(Some)
    })
    .await
}

/// Waits before the next attempt; tells which limit of the stream passed meanwhile, if one did.
pub async fn pause(after: Duration, call: &mut Call) -> Option<Late> {
    let mut sleep = std::pin::pin!(tokio::time::sleep(after));
    std::future::poll_fn(|cx| {
        if sleep.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        call.exchange.poll_late(None, cx).map(Some)
    })
    .await
}

impl Miss {
    fn reason(&self) -> String {
        match self {
            Self::Failed(failure) => failure.reason.clone(),
            Self::Late(_) => String::new(),
        }
    }
}

fn judge(http: &Http, policy: Option<&RetryPolicy>, attempt: u32, result: &Result<Answer, Miss>) -> Next {
    let Some(policy) = policy else { return Next::Done };
    let outcome = match result {
        Ok((parts, _)) => Outcome::Response(parts.status, &parts.headers),
        Err(Miss::Late(Late::Try)) => Outcome::Timeout,
        Err(Miss::Late(Late::Route | Late::Idle | Late::Request)) => return Next::Done,
        Err(Miss::Failed(failure)) => match failure.kind {
            FailureKind::Connect | FailureKind::ConnectTimeout => Outcome::ConnectFailure,
            FailureKind::Termination { sent } => Outcome::Reset { sent },
            FailureKind::Reset | FailureKind::Protocol => Outcome::Reset { sent: true },
            FailureKind::Refused => Outcome::Refused,
            FailureKind::Overflow => Outcome::Overflow,
            FailureKind::Client => return Next::Done,
        },
    };
    retry::next_attempt(policy, attempt, outcome, &mut http.worker.shared.rng.borrow_mut())
}

/// A retry needs room in the circuit breaker, and the whole body again.
fn may_retry(upstream: &Rc<Upstream>, call: &mut Call) -> Option<crate::upstream::Retrying> {
    if call.replay.as_ref().is_some_and(|r| r.again().is_none()) {
        return None;
    }
    call.exchange.retrying = None;
    let retrying = upstream.start_retry();
    if retrying.is_none() {
        call.exchange.flags.insert(Flags::UPSTREAM_OVERFLOW);
    }
    retrying
}

fn note(upstream: &Upstream, endpoint: &Rc<Host>, result: &Result<Answer, Miss>, is_grpc: bool) {
    let signal = match result {
        Ok((parts, _)) => {
            let status = parts.status.as_u16();
            if let Some(class) = upstream.stats.rq_xx.get(usize::from(status / 100).wrapping_sub(1)) {
                class.inc();
            }
            // to a gRPC client an endpoint is as healthy as its gRPC status says
            let told = grpc_status(&parts.headers).filter(|_| is_grpc);
            Signal::Status(told.map_or(status, http_of))
        }
        Err(Miss::Late(Late::Try | Late::Route)) => {
            upstream.stats.rq_timeout.inc();
            Signal::Status(504)
        }
        // that is the client's doing, or nobody's
        Err(Miss::Late(Late::Idle | Late::Request)) => return,
        Err(Miss::Failed(failure)) => match failure.kind {
            FailureKind::Overflow | FailureKind::Client => return,
            FailureKind::Connect
            | FailureKind::ConnectTimeout
            | FailureKind::Termination { .. }
            | FailureKind::Reset
            | FailureKind::Refused
            | FailureKind::Protocol => Signal::LocalFailure,
        },
    };
    upstream.on_result(endpoint, signal);
}

#[expect(clippy::result_large_err, reason = "boxed by the one caller")]
fn conclude(
    call: &mut Call,
    next: Next,
    result: Result<Answer, Miss>,
    began: Instant,
    cookie: Option<HeaderValue>,
) -> Result<Answered, Local> {
    if next == Next::LimitReached {
        call.exchange.flags.insert(Flags::RETRY_LIMIT);
    }
    match result {
        Ok((parts, reply)) => {
            call.exchange.link = reply.link();
            if parts.status == StatusCode::SWITCHING_PROTOCOLS && !call.upgrade {
                return Err(Local::text(StatusCode::BAD_GATEWAY, "").flag(Flags::UPSTREAM_PROTOCOL));
            }
            // over HTTP/2 it would say that the client has left HTTP, and the endpoint has not
            if parts.status.is_success() && call.upgrade && call.parts.version == Version::HTTP_2 {
                let local = Local::text(StatusCode::BAD_GATEWAY, "").flag(Flags::UPSTREAM_PROTOCOL);
                return Err(local.details("upgrade_not_taken"));
            }
            Ok(Answered { parts, reply, began, at: Instant::now(), cookie })
        }
        Err(Miss::Late(late)) => Err(too_late(call, late)),
        Err(Miss::Failed(failure)) => {
            if failure.kind == FailureKind::Client {
                let malformed = call.exchange.progress.as_ref().and_then(|p| p.malformed.get());
                if let Some(why) = malformed {
                    return Err(refusal_of_body(why));
                }
                call.exchange.client_left();
            }
            if failure.kind == FailureKind::Overflow {
                call.exchange.host = None; // it was not sent to any
            }
            call.exchange.failure.clone_from(&failure.reason);
            Err(failed(&failure, call.exchange.attempts))
        }
    }
}

/// Envoy's answer to an upstream that gave none.
fn failed(failure: &Failure, attempts: u32) -> Local {
    let reset = failure.reset_reason();
    let retried = if attempts > 1 { "retried and the latest reset reason" } else { "reset reason" };
    // why the connection failed is for the operator's log, not for the caller
    let text = format!("upstream connect error or disconnect/reset before headers. {retried}: {reset}");
    // the codec's words about a stream are for the log of failures
    let of_transport = matches!(failure.kind, FailureKind::Connect | FailureKind::ConnectTimeout);
    let details = if failure.reason.is_empty() || !of_transport {
        format!("upstream_reset_before_response_started{{{}}}", reset.replace(' ', "_"))
    } else {
        let reason = failure.reason.replace(' ', "_");
        format!("upstream_reset_before_response_started{{{}|{reason}}}", reset.replace(' ', "_"))
    };
    let (status, flags) = match failure.kind {
        FailureKind::Connect | FailureKind::ConnectTimeout => {
            (StatusCode::SERVICE_UNAVAILABLE, Flags::UPSTREAM_CONNECTION_FAILURE)
        }
        FailureKind::Termination { .. } => (StatusCode::SERVICE_UNAVAILABLE, Flags::UPSTREAM_TERMINATION),
        FailureKind::Reset | FailureKind::Refused => (StatusCode::SERVICE_UNAVAILABLE, Flags::UPSTREAM_RESET),
        FailureKind::Protocol => (StatusCode::BAD_GATEWAY, Flags::UPSTREAM_PROTOCOL),
        FailureKind::Overflow => (StatusCode::SERVICE_UNAVAILABLE, Flags::UPSTREAM_OVERFLOW),
        FailureKind::Client => (StatusCode::BAD_REQUEST, Flags::DOWNSTREAM_TERMINATION),
    };
    let local = Local::text(status, text).flag(flags).details(details);
    if failure.kind == FailureKind::Overflow {
        return local.header(headers::OVERLOADED, HeaderValue::from_static("true"));
    }
    local
}

/// Envoy's answer when a limit passes before there is a response. Whose fault it is follows from whether the whole
/// request is here.
pub fn too_late(call: &Call, late: Late) -> Local {
    let whole = call.exchange.upload().whole.is_some();
    let status = if whole { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::REQUEST_TIMEOUT };
    let stats = &call.exchange.http.stats;
    match late {
        Late::Idle => {
            stats.rq_idle_timeout.inc();
            Local::text(status, "stream timeout").flag(Flags::STREAM_IDLE).details("stream_idle_timeout")
        }
        Late::Request => {
            stats.rq_timeout.inc();
            Local::text(status, "request timeout").details("request_overall_timeout")
        }
        Late::Route => timed_out("response_timeout"),
        Late::Try => timed_out("upstream_per_try_timeout"),
    }
}

fn timed_out(details: &'static str) -> Local {
    Local::text(StatusCode::GATEWAY_TIMEOUT, "upstream request timeout")
        .flag(Flags::UPSTREAM_TIMEOUT)
        .details(details)
}

fn unrouted() -> Local {
    Local::text(StatusCode::NOT_FOUND, "").flag(Flags::NO_ROUTE)
}

fn no_healthy_upstream() -> Local {
    Local::text(StatusCode::SERVICE_UNAVAILABLE, "no healthy upstream")
        .flag(Flags::NO_HEALTHY_UPSTREAM)
        .details("no_healthy_upstream")
}

fn unrepeatable() -> Local {
    Local::text(StatusCode::INTERNAL_SERVER_ERROR, "")
        .flag(Flags::LOCAL_RESET)
        .details("request_payload_exceeded_retry_buffer_limit")
}

fn ask<'a>(policy: Option<&RetryPolicy>, hash: Option<u64>, tried: &'a [Rc<Host>], call: &Call) -> Ask<'a> {
    let (avoid, attempts) = match policy {
        Some(p) if p.avoid_previous_hosts => (tried, p.host_selection_attempts),
        _ => (&[] as &[_], 1),
    };
    Ask { hash, avoid, attempts, original: call.exchange.connection.local }
}

/// What an attempt says of itself to the endpoint.
fn dress(
    http: &Http,
    host: &VirtualHost,
    forward: &Forward,
    endpoint: &Host,
    attempt: u32,
    outgoing: &mut Outgoing,
) {
    if host.include_request_attempt_count {
        outgoing.headers.insert(headers::ATTEMPT_COUNT, headers::number(attempt.into()));
    }
    if matches!(forward.host_rewrite, HostRewrite::Auto)
        && !endpoint.endpoint.hostname.is_empty()
        && let Ok(name) = HeaderValue::from_str(&endpoint.endpoint.hostname)
    {
        let old = std::mem::replace(&mut outgoing.authority, name);
        if !http.router.suppress_envoy_headers {
            outgoing.headers.insert(headers::ORIGINAL_HOST, old);
        }
    }
    if endpoint.endpoint.mesh_tls
        && http.reporter == Some(Reporter::Source)
        && let Some((metadata, id)) = &http.worker.peer_headers
    {
        outgoing.headers.insert(headers::PEER_METADATA, metadata.clone());
        outgoing.headers.insert(headers::PEER_METADATA_ID, id.clone());
    }
}

fn timeout_of(forward: &Forward, call: &Call) -> Option<Duration> {
    let Some(bound) = forward.grpc_timeout.filter(|_| call.exchange.is_grpc) else { return forward.timeout };
    let asked = headers::grpc_timeout(&call.parts.headers);
    let timeout = match (asked, bound.max) {
        (Some(asked), Some(max)) => Some(asked.min(max)),
        (asked, max) => asked.or(max),
    };
    timeout.map(|t| t.checked_sub(bound.offset).unwrap_or(t))
}

/// The request's hash, and the cookie that must be set to get the same one again.
fn hash_of(http: &Http, forward: &Forward, call: &Call) -> (Option<u64>, Option<HeaderValue>) {
    let (mut hash, mut cookie) = (None, None);
    for policy in &forward.hash {
        let part = match &policy.on {
            HashOn::Header(key, rewrite) => call.head().value(key).map(|v| match rewrite {
                Some(r) => hash_bytes(r.apply(&String::from_utf8_lossy(v)).as_bytes()),
                None => hash_bytes(v),
            }),
            HashOn::Cookie { name, path, ttl, attributes } => match cookie_value(call, name) {
                Some(value) => Some(hash_bytes(value.as_bytes())),
                None => ttl.map(|ttl| {
                    let value = format!("{:016x}", http.worker.random());
                    cookie = set_cookie(name, &value, path.as_deref(), ttl, attributes);
                    hash_bytes(value.as_bytes())
                }),
            },
            HashOn::SourceIp => Some(hash_bytes(call.exchange.remote.ip().to_string().as_bytes())),
            HashOn::Query(name) => call
                .head()
                .query()
                .into_iter()
                .flat_map(|q| q.split('&'))
                .find_map(|pair| {
                    Some(pair.split_once('=').unwrap_or((pair, ""))).filter(|(n, _)| *n == &**name)
                })
                .map(|(_, value)| hash_bytes(value.as_bytes())),
        };
        if let Some(part) = part {
            hash = Some(hash.map_or(part, |h: u64| h.rotate_left(1) ^ part));
            if policy.terminal {
                break;
            }
        }
    }
    (hash, cookie)
}

fn hash_bytes(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh64::xxh64(bytes, 0)
}

fn cookie_value<'a>(call: &'a Call, name: &str) -> Option<&'a str> {
    call.parts
        .headers
        .get_all(http::header::COOKIE)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(';'))
        .find_map(|pair| pair.trim().split_once('=').filter(|(n, _)| *n == name))
        .map(|(_, value)| value.trim_matches('"'))
}

fn set_cookie(
    name: &str,
    value: &str,
    path: Option<&str>,
    ttl: Duration,
    attributes: &str,
) -> Option<HeaderValue> {
    let mut text = format!("{name}=\"{value}\"");
    if !ttl.is_zero() {
        text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
    }
    if let Some(path) = path {
        text.push_str(&format!("; Path={path}"));
    }
    text.push_str(attributes);
    text.push_str("; HttpOnly");
    HeaderValue::try_from(text).ok()
}

/// Sends a copy of the request elsewhere; its answer is read and thrown away.
pub fn shadow(http: &Rc<Http>, policy: &MirrorPolicy, upstream: &Rc<Upstream>, call: &mut Call) {
    let has_body = call.body.as_ref().is_some_and(|b| !b.is_end_stream());
    let limit = usize::try_from(upstream.config.buffer_limit).unwrap_or(usize::MAX);
    let Some(mut copy) = (if has_body || call.replay.is_some() {
        call.outgoing(true, limit)
    } else {
        let body = call.body.take();
        let copy = call.outgoing(true, limit);
        call.body = body;
        copy
    }) else {
        return;
    };
    if let Some(host) = &policy.host_rewrite {
        copy.authority = host.clone();
    } else if !policy.keep_host
        && let Ok(text) = copy.authority.to_str()
    {
        let bare = crate::router::without_port(text);
        let port = text.get(bare.len()..).unwrap_or_default();
        if let Ok(host) = HeaderValue::try_from(format!("{bare}-shadow{port}")) {
            copy.authority = host;
        }
    }
    let ask = Ask { hash: None, avoid: &[], attempts: 1, original: call.exchange.connection.local };
    let Some(endpoint) = upstream.pick(ask) else { return };
    let upstream = Rc::clone(upstream);
    if call.upgrade {
        // what follows goes there, too, from when that server has left HTTP, as Envoy has it
        let (sender, bytes) = tunnel::shadow();
        call.shadows.push(sender);
        http.worker.shared.tasks.spawn_local(tunnel::feed(upstream, endpoint, copy, bytes));
        return;
    }
    let buffered = call.replay.as_ref().and_then(super::body::Replay::again);
    if buffered.is_some() {
        // the copy must not count as somebody who still reads the client's body
        copy.body = super::body::RequestBody::Empty;
    }
    let web = call.exchange.web.as_ref().map(|web| web.copied());
    let copying = async move {
        if let Some(replay) = buffered {
            // the copy goes when the whole request is here, as Envoy has it
            let Some(bytes) = replay.wait().await else { return };
            copy.body = super::body::RequestBody::Full(bytes);
            if let Some(web) = web {
                copy.body = web.upload(copy.body);
            }
        }
        let Ok((_, mut reply)) = upstream.send(&endpoint, copy, Instant::now(), &Cell::new(None)).await
        else {
            return;
        };
        while let Some(Ok(_)) = std::future::poll_fn(|cx| reply.poll_frame(cx)).await {}
        reply.release(Instant::now());
    };
    http.worker.shared.tasks.spawn_local(async move {
        // nobody waits for a copy, so whether it came to its end is nobody's business either
        let _over: Result<(), tokio::time::error::Elapsed> = tokio::time::timeout(MIRROR_LIFE, copying).await;
    });
}
