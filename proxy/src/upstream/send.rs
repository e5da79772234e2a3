//! Carries a request to an endpoint: a pooled or a new connection, HTTP/1 or HTTP/2, plain or TLS.

use std::cell::{Cell, OnceCell};
use std::rc::Rc;

use ::h2::ext::Protocol;
use http::header::{CONNECTION, CONTENT_LENGTH, UPGRADE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version, response};
use http_body::Body as _;
use tokio::time::Instant;

use super::h1::{H1, SendError};
use super::h2::H2;
use super::pool::{Pool, Reply};
use super::{Active, Host, Upstream};
use crate::http::body::RequestBody;
use crate::listener::connection::Origin;
use crate::metrics::standard::{Numbered, Principals};
use crate::tcp::io::Io;
use crate::tls::Peer;
use crate::xds::cluster::http::HttpVersion;

/// How often a request waits for a connection that is made for all before it makes one of its own.
const SHARED_DIALS: u32 = 3;

/// A request on its way out, in no version's form yet.
#[derive(Debug)]
pub struct Outgoing {
    /// Method.
    pub method: Method,
    /// Path and query.
    pub path: PathAndQuery,
    /// Host, with port if there is one.
    pub authority: HeaderValue,
    /// Whether the client came over https.
    pub https: bool,
    /// Headers, without `host`.
    pub headers: HeaderMap,
    /// Body.
    pub body: RequestBody,
    /// The client speaks HTTP/2.
    pub client_h2: bool,
    /// It asks to leave HTTP, in HTTP/1's way: by `upgrade` and `connection`.
    pub upgrade: bool,
    /// Who called, for an endpoint that is told.
    pub origin: Option<Rc<Origin>>,
}

/// Why there was no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// No connection came about.
    Connect,
    /// None came about in time.
    ConnectTimeout,
    /// The connection broke before a response; `sent`: after the request was written.
    Termination {
        /// Whether the request was written.
        sent: bool,
    },
    /// The server reset the stream.
    Reset,
    /// The server refused the stream unseen.
    Refused,
    /// The server broke the protocol.
    Protocol,
    /// A circuit breaker is open.
    Overflow,
    /// The client broke off while its body was sent.
    Client,
}

/// A request that got no response.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{kind:?} {reason}")]
pub struct Failure {
    /// What happened.
    pub kind: FailureKind,
    /// The transport's own words, empty if it had none.
    pub reason: String,
}

impl Failure {
    fn new(kind: FailureKind, reason: impl std::fmt::Display) -> Self {
        Self { kind, reason: reason.to_string() }
    }

    /// Envoy's name for it.
    #[must_use]
    pub fn reset_reason(&self) -> &'static str {
        match self.kind {
            FailureKind::Connect => "remote connection failure",
            FailureKind::ConnectTimeout => "connection timeout",
            FailureKind::Termination { .. } => "connection termination",
            FailureKind::Reset => "remote reset",
            FailureKind::Refused => "remote refused stream reset",
            FailureKind::Protocol => "protocol error",
            FailureKind::Overflow => "overflow",
            FailureKind::Client => "local reset",
        }
    }
}

/// The head of a response and what brings its body.
pub type Answer = (http::response::Parts, Box<Reply>);

/// Where a request goes: the endpoint, and which of its connections may carry it.
struct To<'a> {
    host: &'a Rc<Host>,
    pool: Rc<Pool>,
    /// The request's authority; a connection's server name may depend on it.
    name: HeaderValue,
    /// Who called, for an endpoint that is told.
    origin: Option<Rc<Origin>>,
}

impl Upstream {
    /// Sends a request to an endpoint, from `now` on, and waits for the head of the response. `ready` tells when there
    /// was a connection for it.
    ///
    /// # Errors
    ///
    /// When no response came; the failure says how far it got.
    pub async fn send(
        self: &Rc<Self>,
        host: &Rc<Host>,
        outgoing: Outgoing,
        now: Instant,
        ready: &Cell<Option<Instant>>,
    ) -> Result<Answer, Failure> {
        let Some(active) = Active::start(self, host) else {
            self.stats.rq_pending_overflow.inc();
            return Err(Failure::new(FailureKind::Overflow, ""));
        };
        let origin = outgoing.origin.clone();
        let pool = host.pool(&outgoing.authority, origin.as_ref());
        let to = To { host, pool, name: outgoing.authority.clone(), origin };
        if self.config.http.version == HttpVersion::Alpn && host.pools.alpn_h2.get().is_none() {
            self.learn_version(&to).await?;
        }
        if self.wants_h2(host, outgoing.client_h2) {
            self.send_h2(&to, outgoing, active, (now, ready)).await
        } else {
            self.send_h1(&to, outgoing, active, (now, ready)).await
        }
    }

    fn wants_h2(&self, host: &Host, client_h2: bool) -> bool {
        match self.config.http.version {
            HttpVersion::Http1 => false,
            HttpVersion::Http2 => true,
            HttpVersion::Downstream => client_h2,
            // until a handshake has told: whoever does not agree on h2 speaks HTTP/1
            HttpVersion::Alpn => host.pools.alpn_h2.get().unwrap_or(false),
        }
    }

    async fn send_h1(
        self: &Rc<Self>,
        to: &To<'_>,
        outgoing: Outgoing,
        active: Active,
        (mut now, ready): (Instant, &Cell<Option<Instant>>),
    ) -> Result<Answer, Failure> {
        let mut connection = loop {
            if let Some(connection) = to.pool.take_h1(self.config.http.max_connection_duration) {
                break connection;
            }
            let dialed = self.dial_h1(to).await?;
            now = Instant::now();
            if let Some(connection) = dialed {
                break connection;
            }
            // one came back to the pool while this request waited
        };
        ready.set(Some(now));
        let parts = connection.send(outgoing).await.map_err(|e| h1_failure(&e))?;
        Ok((parts, Box::new(Reply::h1(connection, Rc::clone(&to.pool), to.host.max_uses, active))))
    }

    /// Makes the first connection to an endpoint whose version of HTTP only the handshake tells.
    async fn learn_version(self: &Rc<Self>, to: &To<'_>) -> Result<(), Failure> {
        let open = self.admit(&to.pool).await?;
        let (io, link) = self.connect(to.host, Some(&to.name), to.origin.as_deref()).await?;
        let is_h2 = link.peer.as_ref().is_some_and(|p| p.alpn.as_deref() == Some(b"h2"));
        open.tell(link);
        let refused = |e: &dyn std::error::Error| Failure::new(FailureKind::Connect, e);
        if is_h2 {
            let connection = H2::start(io, open, &self.config.http.http2, &self.shared.tasks).await;
            to.pool.put_h2(connection.map_err(|e| refused(&e))?, Instant::now());
        } else {
            let connection = H1::new(io, open, self.config.http.http1.proper_case);
            to.pool.put_h1(Box::new(connection), Instant::now());
        }
        to.host.pools.alpn_h2.set(Some(is_h2));
        Ok(())
    }

    /// A new connection; `None` when a pooled one became free before there was room for it.
    async fn dial_h1(self: &Rc<Self>, to: &To<'_>) -> Result<Option<Box<H1>>, Failure> {
        self.may_wait()?;
        let Some(open) = self.try_admit(&to.pool) else {
            self.wait_for_room(&to.pool).await?;
            return Ok(None);
        };
        let (io, link) = self.connect(to.host, Some(&to.name), to.origin.as_deref()).await?;
        open.tell(link);
        Ok(Some(Box::new(H1::new(io, open, self.config.http.http1.proper_case))))
    }

    async fn send_h2(
        self: &Rc<Self>,
        to: &To<'_>,
        outgoing: Outgoing,
        active: Active,
        (mut now, ready): (Instant, &Cell<Option<Instant>>),
    ) -> Result<Answer, Failure> {
        let upgrade = outgoing.upgrade;
        let (mut request, life) = (h2_request(outgoing)?, self.config.http.max_connection_duration);
        let upgrade = if upgrade { Some(into_connect(&mut request)?) } else { None };
        let mut connection = match to.pool.get_h2(to.host.max_uses, life, now) {
            Some(connection) => connection,
            None => {
                let connection = self.dial_h2(to).await?;
                now = Instant::now();
                connection
            }
        };
        if upgrade.is_some() {
            if !connection.takes_tunnels(&self.shared.tasks).await {
                return Err(Failure::new(FailureKind::Protocol, "the server takes no extended CONNECT"));
            }
            now = Instant::now();
        }
        ready.set(Some(now));
        match connection.send(request).await {
            Ok((response, streams)) => {
                let (mut parts, ()) = response.into_parts();
                if let Some(protocol) = upgrade {
                    into_upgraded(&mut parts, protocol);
                }
                Ok((parts, Box::new(Reply::h2(streams, Rc::clone(&to.pool), active))))
            }
            Err(e) => Err(Failure::new(e.kind, e)),
        }
    }

    /// One connection is made for all requests that wait for it; it is made to the end even if they give up.
    async fn dial_h2(self: &Rc<Self>, to: &To<'_>) -> Result<H2, Failure> {
        self.may_wait()?;
        let To { host, pool, name, origin } = to;
        let life = self.config.http.max_connection_duration;
        for _ in 0..SHARED_DIALS {
            let (dial, mine) = pool.dial();
            if mine {
                let (this, host, pool, name, dial) =
                    (Rc::clone(self), Rc::clone(host), Rc::clone(pool), name.clone(), Rc::clone(&dial));
                let origin = origin.clone();
                self.shared.tasks.spawn_local(async move {
                    match this.start_h2(&host, &pool, &name, origin.as_deref()).await {
                        Ok(connection) => pool.put_h2(connection, Instant::now()),
                        Err(failure) => *dial.failure.borrow_mut() = Some(Rc::new(failure)),
                    }
                    dial.done.set(true);
                    dial.over.notify_waiters();
                });
            }
            let over = dial.over.notified();
            if !dial.done.get() {
                over.await;
            }
            if let Some(failure) = &*dial.failure.borrow() {
                return Err(Failure::clone(failure));
            }
            if let Some(connection) = pool.get_h2(host.max_uses, life, Instant::now()) {
                return Ok(connection);
            }
            if pool.is_closed() {
                break; // the endpoint is gone for others; this request still goes to it
            }
        }
        // others were faster each time, or no connection is kept: one of this request's own
        let connection = self.start_h2(host, pool, name, origin.as_deref()).await?;
        pool.put_h2_used(connection.clone(), Instant::now());
        Ok(connection)
    }

    async fn start_h2(
        self: &Rc<Self>,
        host: &Host,
        pool: &Pool,
        name: &HeaderValue,
        origin: Option<&Origin>,
    ) -> Result<H2, Failure> {
        let open = self.admit(pool).await?;
        let (io, link) = self.connect(host, Some(name), origin).await?;
        open.tell(link);
        H2::start(io, open, &self.config.http.http2, &self.shared.tasks)
            .await
            .map_err(|e| Failure::new(FailureKind::Connect, e))
    }

    /// Whether the circuit breaker allows another connection at all.
    pub(crate) fn takes_connections(&self) -> bool {
        let takes = self.state.connections.get() < self.config.limits.max_connections;
        if !takes {
            self.stats.cx_overflow.inc();
        }
        takes
    }

    /// A request for which a connection must be made is one that waits.
    fn may_wait(&self) -> Result<(), Failure> {
        if self.state.pending.get() < self.config.limits.max_pending {
            return Ok(());
        }
        self.stats.rq_pending_overflow.inc();
        Err(Failure::new(FailureKind::Overflow, ""))
    }

    /// Room for one more connection: waits while the circuit breaker lets requests wait.
    pub(crate) async fn admit(self: &Rc<Self>, pool: &Pool) -> Result<Opened, Failure> {
        loop {
            if let Some(opened) = self.try_admit(pool) {
                return Ok(opened);
            }
            self.wait_for_room(pool).await?;
        }
    }

    /// Room for one more connection, if there is some now. A pool without any gets one in any case, as Envoy has
    /// it: connections to other endpoints, or of other workers, must not make it unreachable.
    fn try_admit(self: &Rc<Self>, pool: &Pool) -> Option<Opened> {
        self.state.note_traffic();
        let of_host = pool.connections();
        if of_host.get() == 0 {
            self.state.connections.add();
        } else if !self.state.connections.try_add(self.config.limits.max_connections) {
            self.stats.cx_overflow.inc();
            return None;
        }
        of_host.set(of_host.get() + 1);
        self.stats.cx_total.inc();
        self.stats.cx_active.inc();
        Some(Opened { upstream: Rc::clone(self), of_host: Rc::clone(of_host), link: OnceCell::new() })
    }

    /// Waits until a connection has ended or came back to the pool. A pool that has to wait has a connection, so
    /// there is one on this worker whose end it will see.
    async fn wait_for_room(&self, pool: &Pool) -> Result<(), Failure> {
        if !self.state.pending.try_add(self.config.limits.max_pending) {
            self.stats.rq_pending_overflow.inc();
            return Err(Failure::new(FailureKind::Overflow, ""));
        }
        let _waiting = Waiting(self);
        tokio::select! {
            () = self.freed.notified() => {}
            () = pool.returned() => {}
        }
        Ok(())
    }

    /// A new connection to an endpoint, with TLS where it takes it; `origin`: for whom, where it is told.
    ///
    /// # Errors
    ///
    /// When none comes about within the cluster's connect timeout.
    pub async fn connect(
        &self,
        host: &Host,
        authority: Option<&HeaderValue>,
        origin: Option<&Origin>,
    ) -> Result<(Io, Rc<Link>), Failure> {
        let attempt = Box::pin(self.connect_now(host, authority, origin));
        let outcome = match tokio::time::timeout(self.config.connect_timeout, attempt).await {
            Ok(Ok((io, peer, own))) => {
                let link = Rc::new(self.link(&io, peer, &own));
                return Ok((io, link));
            }
            Ok(Err(error)) => Failure::new(FailureKind::Connect, describe(&error)),
            Err(_) => Failure::new(FailureKind::ConnectTimeout, ""),
        };
        self.stats.cx_connect_fail.inc();
        Err(outcome)
    }

    /// A connection for a check: no limit holds it up, and it counts nowhere.
    pub(super) async fn dial(&self, host: &Host, name: &HeaderValue) -> std::io::Result<Io> {
        let (io, _, _) = Box::pin(self.connect_now(host, Some(name), None)).await?;
        Ok(io)
    }

    fn link(&self, io: &Io, peer: Option<Peer>, own: &[String]) -> Link {
        let principals = peer.as_ref().map(|p| {
            self.shared.standard.principals(Principals {
                source: own.first().cloned(),
                destination: p.spiffe_id().map(str::to_owned),
            })
        });
        Link { local: io.local_addr(), peer, principals }
    }
}

/// An open connection, counted until it is dropped.
#[derive(Debug)]
pub struct Opened {
    upstream: Rc<Upstream>,
    /// Open connections of the endpoint.
    of_host: Rc<Cell<u32>>,
    link: OnceCell<Rc<Link>>,
}

/// What is known of a connection to an endpoint, for metrics and access logs.
#[derive(Debug)]
pub struct Link {
    /// Our own address.
    pub local: Option<std::net::SocketAddr>,
    /// Who is at the other end of TLS.
    pub peer: Option<Peer>,
    /// The identities of both ends of TLS.
    pub principals: Option<Rc<Numbered<Principals>>>,
}

impl Opened {
    /// Notes what came about.
    pub(crate) fn tell(&self, link: Rc<Link>) {
        self.link.get_or_init(|| link);
    }

    /// What is known of the connection.
    #[must_use]
    pub fn link(&self) -> Option<Rc<Link>> {
        self.link.get().map(Rc::clone)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.of_host.set(self.of_host.get().saturating_sub(1));
        self.upstream.state.connections.sub();
        self.upstream.stats.cx_active.sub(1);
        self.upstream.freed.notify_one();
    }
}

struct Waiting<'a>(&'a Upstream);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state.pending.sub();
    }
}

/// Envoy's words for the usual reasons.
fn describe(error: &std::io::Error) -> String {
    if let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        return format!("TLS_error: {tls}");
    }
    let known = [
        (std::io::ErrorKind::ConnectionRefused, "delayed connect error: Connection refused"),
        (std::io::ErrorKind::HostUnreachable, "delayed connect error: No route to host"),
        (std::io::ErrorKind::NetworkUnreachable, "immediate connect error: Network is unreachable"),
    ];
    let words = known.iter().find(|(kind, _)| *kind == error.kind());
    words.map_or_else(|| error.to_string(), |(_, words)| (*words).to_owned())
}

fn h2_request(outgoing: Outgoing) -> Result<Request<RequestBody>, Failure> {
    let mut parts = http::uri::Parts::default();
    let authority = Authority::try_from(outgoing.authority.as_bytes());
    parts.authority = Some(authority.map_err(|e| Failure::new(FailureKind::Protocol, e))?);
    parts.scheme = Some(if outgoing.https { Scheme::HTTPS } else { Scheme::HTTP });
    parts.path_and_query = Some(outgoing.path);
    let uri = Uri::from_parts(parts).map_err(|e| Failure::new(FailureKind::Protocol, e))?;
    let mut request = Request::new(outgoing.body);
    *request.method_mut() = outgoing.method;
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = outgoing.headers;
    Ok(request)
}

/// Asks to leave HTTP in HTTP/2's way (RFC 8441, section 5); gives the protocol that is asked for.
fn into_connect(request: &mut Request<RequestBody>) -> Result<HeaderValue, Failure> {
    if !request.body().is_end_stream() {
        return Err(Failure::new(FailureKind::Protocol, "an upgrade with a body has no form in HTTP/2"));
    }
    let headers = request.headers_mut();
    headers.remove(CONNECTION);
    headers.remove(CONTENT_LENGTH);
    let protocol = headers.remove(UPGRADE).unwrap_or(HeaderValue::from_static(""));
    let name = protocol.to_str().map_err(|e| Failure::new(FailureKind::Protocol, e))?;
    let name = Protocol::from(name);
    *request.method_mut() = Method::CONNECT;
    request.extensions_mut().insert(name);
    Ok(protocol)
}

/// The answer to an extended CONNECT in HTTP/1's way, as all behind here understands it.
fn into_upgraded(parts: &mut response::Parts, protocol: HeaderValue) {
    if parts.status == StatusCode::OK {
        parts.status = StatusCode::SWITCHING_PROTOCOLS;
        parts.headers.remove(CONTENT_LENGTH);
        parts.headers.insert(UPGRADE, protocol);
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

fn h1_failure(error: &SendError) -> Failure {
    match error {
        SendError::Closed { sent } => Failure::new(FailureKind::Termination { sent: *sent }, ""),
        SendError::Bad(bad) => Failure::new(FailureKind::Protocol, bad),
        SendError::Client(_) => Failure::new(FailureKind::Client, ""),
    }
}
