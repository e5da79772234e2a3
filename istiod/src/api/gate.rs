//! In front of every route: who calls, whether they may, how often, and for how long.
//!
//! [`authorize`] is the one decision, and pure; the rest finds out what it decides about.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::{FromRequestParts, RawPathParams, Request, State};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use ca::authn::Hash;
use ca::node::Revocations;
use ca::renewal::Clock;
use ca::tls::accept::PeerCertificates;
use tokio::sync::{Semaphore, watch};

use super::caller::{Caller, Source};
use super::limits::{Buckets, Rates};
use super::problem::refusal;
use super::routes::{Form, Route, Scope};
use crate::access::{AccessState, ApiSecret, Grant, Permission, Role, USE_GRAIN};
use crate::revoked::{self, Revoked};

/// Calls that are answered at the same time. Full means overload: more are told to come again.
const AT_ONCE: usize = 1024;

/// Who may call.
#[derive(Clone)]
pub enum Access {
    /// Anybody who reaches the port: only for a member on loopback that was started to try things out.
    Open,
    /// Whoever has this bearer token, a token from the log, or a certificate that has a role.
    Bearer(Arc<str>),
}

/// Who is at the other end of a connection; in the extensions of each of its requests.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    /// Its address.
    pub address: Option<SocketAddr>,
    /// The certificates that it presented and the handshake verified; none without TLS.
    pub certificates: PeerCertificates,
}

/// The state by which callers are known, as applied here: tokens and roles, and revoked nodes.
pub type Known = (watch::Receiver<Arc<AccessState>>, watch::Receiver<Arc<Revocations>>);

/// What decides about calls. Clones are the same.
#[derive(Clone)]
pub struct Gate {
    shared: Arc<Shared>,
}

struct Shared {
    access: Access,
    state: watch::Receiver<Arc<AccessState>>,
    revoked: Revoked,
    clock: Clock,
    rates: Mutex<Limits>,
    /// Tokens of the log that were used since the last [`Gate::take_used`].
    used: Mutex<BTreeSet<String>>,
    at_once: Arc<Semaphore>,
}

struct Limits {
    calls: Buckets,
    guesses: Buckets,
}

/// Why a call is not let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// Nobody known calls; with what would be needed.
    Unauthenticated(String),
    /// The caller may not do this.
    Forbidden(String),
    /// The caller calls too often; seconds to wait.
    TooOften(u64),
    /// Too many calls are open.
    Overloaded,
    /// The path has no words.
    Unreadable(String),
}

impl Denied {
    /// Status and words.
    fn told(&self) -> (StatusCode, &str) {
        match self {
            Self::Unauthenticated(why) => (StatusCode::UNAUTHORIZED, why),
            Self::Forbidden(why) => (StatusCode::FORBIDDEN, why),
            Self::Unreadable(why) => (StatusCode::BAD_REQUEST, why),
            Self::TooOften(_) => (StatusCode::TOO_MANY_REQUESTS, "too many calls; come again later"),
            Self::Overloaded => {
                (StatusCode::SERVICE_UNAVAILABLE, "too many calls at the same time; come again later")
            }
        }
    }

    /// The same for a gRPC service of its own.
    fn status(&self) -> tonic::Status {
        let (_, why) = self.told();
        match self {
            Self::Unauthenticated(_) => tonic::Status::unauthenticated(why),
            Self::Forbidden(_) => tonic::Status::permission_denied(why),
            Self::TooOften(_) => tonic::Status::resource_exhausted(why),
            Self::Overloaded => tonic::Status::unavailable(why),
            Self::Unreadable(_) => tonic::Status::invalid_argument(why),
        }
    }

    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Unauthenticated(_) => Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            Self::Forbidden(_) | Self::Unreadable(_) => None,
            Self::TooOften(seconds) => Some((header::RETRY_AFTER, HeaderValue::from(*seconds))),
            Self::Overloaded => Some((header::RETRY_AFTER, HeaderValue::from(1_u64))),
        }
    }
}

impl IntoResponse for Denied {
    fn into_response(self) -> Response {
        let (status, detail) = self.told();
        let mut response = refusal(status, detail);
        if let Some((name, value)) = self.header() {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

/// Whether this caller may call this route; `namespace` is the one that the path names.
///
/// # Errors
///
/// [`Denied::Unauthenticated`] and [`Denied::Forbidden`].
pub fn authorize(route: &Route, namespace: Option<&str>, caller: Option<&Caller>) -> Result<(), Denied> {
    if route.needs == Permission::Open {
        return Ok(());
    }
    let Some(caller) = caller else { return Err(Denied::Unauthenticated(NEEDED.to_owned())) };
    if !caller.role.grants(route.needs) {
        return Err(Denied::Forbidden(format!("{} is {}, which may not do this", caller.name, caller.role)));
    }
    let covered = match (route.scope, namespace) {
        (Scope::Nobody | Scope::Each, _) => true,
        (Scope::Path, Some(namespace)) => caller.covers(namespace),
        (Scope::Path, None) | (Scope::Mesh, _) => caller.is_unlimited(),
    };
    if covered {
        return Ok(());
    }
    let what = match (route.scope, namespace) {
        (Scope::Path, Some(namespace)) => {
            format!("{} may do nothing in namespace `{namespace}`", caller.name)
        }
        _ => format!("the rights of {} are limited to some namespaces, this needs all", caller.name),
    };
    Err(Denied::Forbidden(what))
}

/// What a member's own token, which is none of the log's, is told by the other members.
const ELSEWHERE: &str = "; the one in a member's data folder opens that member alone, `istioctl auth token create` makes one for all";

const NEEDED: &str = "a bearer token is needed, or a client certificate that has a role; istioctl takes a token with --token-file";

impl Gate {
    /// A gate that knows tokens and roles, and the revoked nodes, from `state`, and lets callers call at `rates`.
    #[must_use]
    pub fn new(access: Access, state: Known, clock: Clock, rates: Rates) -> Self {
        let (state, revoked) = state;
        let rates = Limits { calls: Buckets::new(rates.calls), guesses: Buckets::new(rates.guesses) };
        let shared = Shared {
            access,
            state,
            revoked,
            clock,
            rates: Mutex::new(rates),
            used: Mutex::default(),
            at_once: Arc::new(Semaphore::new(AT_ONCE)),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The tokens that were used since the last call, and whose use is not known yet.
    #[must_use]
    pub fn take_used(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.shared.used.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Who calls; nobody when nothing is presented.
    fn caller(&self, headers: &HeaderMap, peer: &Peer) -> Result<Option<Caller>, Denied> {
        let from = peer.address.map_or(Source::Local, Source::Address);
        let presented = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let presented = presented.and_then(|v| v.strip_prefix("Bearer ")).unwrap_or_default();
        match &self.shared.access {
            Access::Open if is_loopback(headers) => {
                Ok(Some(Caller::new("local", Grant::everywhere(Role::Admin), from)))
            }
            // A page of a browser on this machine reaches the port by a name of its own site (DNS rebinding).
            Access::Open => {
                Err(Denied::Forbidden("the open API is only for callers of a loopback address".to_owned()))
            }
            // An empty token, of a file that was cut, is what a caller without one presents.
            Access::Bearer(_) if presented.is_empty() => self.certified(peer, from),
            Access::Bearer(token) => {
                if Hash::of(presented.as_bytes()).matches(&Hash::of(token.as_bytes())) {
                    return Ok(Some(Caller::new("admin", Grant::everywhere(Role::Admin), from)));
                }
                self.with_token(presented, from).map(Some)
            }
        }
    }

    fn with_token(&self, presented: &str, from: Source) -> Result<Caller, Denied> {
        let told = |why: String| Denied::Unauthenticated(why);
        let secret =
            ApiSecret::parse(presented).map_err(|_| told(format!("the token is not known{ELSEWHERE}")))?;
        let now = ca::state::unix_seconds((self.shared.clock)());
        let state = self.shared.state.borrow().clone();
        let token = state.open(&secret, now).map_err(|e| told(e.to_string()))?;
        if token.last_used.is_none_or(|before| now - now % USE_GRAIN > before) {
            let mut used = self.shared.used.lock().unwrap_or_else(PoisonError::into_inner);
            used.insert(token.id.clone());
        }
        Ok(Caller::new(format!("token/{}", token.id), token.grant.clone(), from))
    }

    /// The role of the certificate that the handshake verified.
    fn certified(&self, peer: &Peer, from: Source) -> Result<Option<Caller>, Denied> {
        let Some(identity) = peer.certificates.identity() else { return Ok(None) };
        // The connection may have outlived its certificate.
        let now = (self.shared.clock)();
        let caller = ca::authn::Caller::from_certificate(peer.certificates.chain(), now)
            .map_err(|e| Denied::Unauthenticated(e.to_string()))?;
        let revoked =
            caller.node().and_then(|node| self.shared.revoked.borrow().get(&node).map(revoked::told));
        if let Some(told) = revoked {
            return Err(Denied::Unauthenticated(told));
        }
        let state = self.shared.state.borrow().clone();
        let Some(binding) = state.binding(&identity) else {
            return Err(Denied::Unauthenticated(format!("{identity} has no role; {NEEDED}")));
        };
        Ok(Some(Caller::new(identity.to_string(), binding.grant.clone(), from)))
    }

    /// Finds out who calls and whether it is not too often. Who presents something wrong is counted by address.
    fn admit(&self, headers: &HeaderMap, peer: &Peer) -> Result<Option<Caller>, Denied> {
        let now = tokio::time::Instant::now().into_std();
        let address = peer.address.map(|a| a.ip().to_string()).unwrap_or_default();
        let caller = self.caller(headers, peer);
        let mut rates = self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = match &caller {
            Ok(Some(_)) if matches!(self.shared.access, Access::Open) => Ok(()),
            Ok(Some(caller)) => rates.calls.take(&caller.name, now),
            Ok(None) => rates.calls.take(&format!("ip {address}"), now),
            Err(_) => rates.guesses.take(&address, now),
        };
        taken.map_err(|wait| Denied::TooOften(wait.as_secs().max(1)))?;
        caller
    }
}

/// One route's share of the gate.
#[derive(Clone)]
pub(super) struct Guarded {
    pub(super) gate: Gate,
    pub(super) route: &'static Route,
}

/// The one check in front of every route.
pub(super) async fn guard(State(guarded): State<Guarded>, request: Request, next: Next) -> Response {
    let Guarded { gate, route } = guarded;
    let Ok(_permit) = gate.shared.at_once.clone().try_acquire_owned() else {
        return Denied::Overloaded.into_response();
    };
    let (mut parts, body) = request.into_parts();
    let caller = match admitted(&gate, route, &mut parts).await {
        Ok(caller) => caller,
        Err(denied) if matches!(route.answer, Form::Grpc) => {
            return denied.status().into_http::<Body>().into_response();
        }
        Err(denied) => return denied.into_response(),
    };
    parts.extensions.insert(caller);
    match tokio::time::timeout(route.within, next.run(Request::from_parts(parts, body))).await {
        Ok(response) => response,
        Err(_) => refusal(StatusCode::GATEWAY_TIMEOUT, "the call took too long"),
    }
}

async fn admitted(gate: &Gate, route: &Route, parts: &mut Parts) -> Result<Option<Caller>, Denied> {
    let peer = parts.extensions.get::<Peer>().cloned().unwrap_or_default();
    let open = route.needs == Permission::Open;
    let caller = match gate.admit(&parts.headers, &peer) {
        Ok(caller) => caller,
        Err(Denied::TooOften(seconds)) => return Err(Denied::TooOften(seconds)),
        // What everybody may see is not refused to who presents too much.
        Err(_) if open => None,
        Err(denied) => return Err(denied),
    };
    let params = RawPathParams::from_request_parts(parts, &()).await;
    let params = params.map_err(|e| Denied::Unreadable(e.body_text()))?;
    let namespace = params.iter().find(|(name, _)| *name == "namespace").map(|(_, value)| value);
    authorize(route, namespace, caller.as_ref())?;
    Ok(caller)
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Response;

    /// The caller that the gate let through; a route that everybody may call has none.
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        let caller = parts.extensions.get::<Option<Self>>().cloned().flatten();
        caller.ok_or_else(|| Denied::Unauthenticated(NEEDED.to_owned()).into_response())
    }
}

/// The caller calls this host by a loopback address, or by `localhost`; none is no browser.
fn is_loopback(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(authority) = host.to_str().unwrap_or_default().parse::<Authority>() else { return false };
    let host = authority.host().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_open_api_is_called_by_a_loopback_address() {
        let called = |host: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static(host));
            is_loopback(&headers)
        };
        for host in ["localhost:15080", "127.0.0.1", "127.3.2.1:80", "[::1]:15080", "LOCALHOST"] {
            assert!(called(host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:80", "10.0.0.1:15080", "", "127.0.0.1.nip.io"] {
            assert!(!called(host), "{host}");
        }
        assert!(is_loopback(&HeaderMap::new()));
    }
}
