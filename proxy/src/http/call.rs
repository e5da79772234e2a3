//! A request as it came, made fit for policies and routes: one authority, one normalised path, no header that is
//! not its own.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{PathAndQuery, Scheme};
use http::{Method, Request, StatusCode, Version, request};
use http_body::Body as _;
use hyper::ext::Protocol;
use tokio::time::Instant;

use super::body::{Progress, Received, Replay, RequestBody};
use super::exchange::{Exchange, Told, head_bytes};
use super::flags::Flags;
use super::head::Head;
use super::headers::{self, CertFacts, Found};
use super::path::{Normalized, normalize};
use super::reply::Local;
use super::tunnel::Shadow;
use super::{Http, HttpResponse};
use crate::access_log;
use crate::h1::head::Malformed;
use crate::listener::connection::Connection;
use crate::metrics::standard::Reporter;
use crate::router::{self, ClientCertificate};
use crate::upstream::send::Outgoing;
use crate::xds::filter::Cors;
use crate::xds::format::Format;
use crate::xds::listener::hcm::{ForwardClientCert, StripPort, Underscores};

/// A request on its way through the proxy.
#[derive(Debug)]
pub struct Call {
    /// What is told of it at its end.
    pub exchange: Box<Exchange>,
    /// Its head, without `host`.
    pub parts: request::Parts,
    /// Its body, until the first attempt takes it.
    pub body: Option<Received>,
    /// What later attempts send again.
    pub replay: Option<Replay>,
    /// Path and query, normalised.
    pub path: PathAndQuery,
    /// Authority.
    pub authority: HeaderValue,
    /// Whether it is for https: what it says itself, or the proxy before this one, or else its connection.
    pub https: bool,
    /// Whether it asks to leave HTTP.
    pub upgrade: bool,
    /// Its headers are still read when it has been sent on.
    pub keep_headers: bool,
    /// Where the bytes go that follow a request to leave HTTP, besides its server.
    pub shadows: Vec<Shadow>,
    /// The cross-origin policy that its response must tell.
    pub cors: Option<(Arc<Cors>, HeaderValue)>,
}

type Refusal = (StatusCode, &'static str, Flags);

const BAD: StatusCode = StatusCode::BAD_REQUEST;

impl Call {
    /// Takes a request in.
    ///
    /// # Errors
    ///
    /// The answer to a request that is malformed or not allowed here.
    pub fn begin(
        http: &Rc<Http>,
        connection: &Rc<Connection>,
        request: Request<Received>,
    ) -> Result<Box<Self>, Box<HttpResponse>> {
        let (mut parts, body) = request.into_parts();
        let started = Instant::now();
        connection.requests.set(connection.requests.get().saturating_add(1));
        let mut exchange =
            Box::new(Exchange::new(Rc::clone(http), Rc::clone(connection), started, parts.version));
        from_connect(&mut parts);
        let found = headers::look_over(&parts.headers);
        if found.has(Found::SPACE) {
            headers::trim(&mut parts.headers);
        }
        exchange.is_head = parts.method == Method::HEAD;
        exchange.is_grpc = found.has(Found::CONTENT_TYPE)
            && parts.headers.get(header::CONTENT_TYPE).is_some_and(|v| router::is_grpc_type(v.as_bytes()));
        let taken = target(&parts)
            .and_then(|()| names(&parts, found, http))
            .and_then(|()| scheme_fits(&parts, connection, http))
            .and_then(|()| authority(&mut parts, http, connection.local.port()))
            .and_then(|a| framing(&parts, found, http).map(|()| a));
        let authority = match taken {
            Ok(authority) => authority,
            Err(refusal) => return Err(refuse(exchange, refusal)),
        };
        let path = match clean_path(&parts, http) {
            Ok(path) => path,
            Err(mut local) => {
                if !http.logs.is_empty() {
                    exchange.told = Some(Box::new(told_as_it_came(&parts, &authority)));
                }
                if http.config.request_id.in_response {
                    exchange.request_id = parts.headers.get(headers::REQUEST_ID).cloned();
                }
                if local.status == BAD && exchange.version < Version::HTTP_2 {
                    local.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                return Err(Box::new(local.into_response(exchange)));
            }
        };
        let https = connection.peer.is_some();
        let mut call = Box::new(Self {
            exchange,
            parts,
            body: Some(body),
            replay: None,
            path,
            authority,
            https,
            upgrade: false,
            keep_headers: false,
            shadows: Vec::new(),
            cors: None,
        });
        if let Err(refusal) = call.clean_headers(http, found) {
            if !http.logs.is_empty() {
                call.exchange.told = Some(Box::new(call.told()));
            }
            return Err(refuse(call.exchange, refusal));
        }
        call.add_headers(http, found);
        if !http.logs.is_empty() {
            call.exchange.told = Some(Box::new(call.told()));
        }
        if http.reporter.is_some() {
            call.exchange.head_bytes = head_bytes(&call.parts.headers);
        }
        Ok(call)
    }

    /// The head as policies and routes see it.
    #[must_use]
    pub fn head(&self) -> Head<'_> {
        Head {
            method: &self.parts.method,
            path_and_query: self.path.as_str(),
            authority: self.authority.to_str().unwrap_or_default(),
            scheme: self.scheme(),
            headers: &self.parts.headers,
        }
    }

    /// `http` or `https`.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        if self.https { "https" } else { "http" }
    }

    /// What routes may ask about the client's certificate.
    #[must_use]
    pub fn certificate(&self) -> ClientCertificate {
        let shown = self.exchange.connection.is_mutual_tls();
        ClientCertificate { presented: shown, validated: shown }
    }

    /// A value made from the request, and from the headers of its response; `request` stands for headers that have
    /// been taken out.
    #[must_use]
    pub fn render(
        &self,
        format: &Format,
        request: Option<&HeaderMap>,
        response: Option<&HeaderMap>,
    ) -> String {
        let headers = request.unwrap_or(&self.parts.headers).clone();
        let told = Told { headers, ..self.told_without_headers() };
        access_log::render(format, &self.exchange, &told, response)
    }

    /// Access logs tell a request as it is sent on.
    pub fn note_changes(&mut self) {
        if self.exchange.told.is_some() {
            self.exchange.told = Some(Box::new(self.told()));
        }
    }

    fn told(&self) -> Told {
        Told { headers: self.parts.headers.clone(), ..self.told_without_headers() }
    }

    fn told_without_headers(&self) -> Told {
        Told {
            method: self.parts.method.clone(),
            path: self.path.as_str().to_owned(),
            authority: self.authority.clone(),
            headers: HeaderMap::new(),
        }
    }

    /// Takes out what is not for the next hop and what a client may not say.
    fn clean_headers(&mut self, http: &Http, found: Found) -> Result<(), Refusal> {
        let map = &mut self.parts.headers;
        if http.config.underscores == Underscores::Drop {
            for name in underscored(map).cloned().collect::<Vec<_>>() {
                map.remove(name);
            }
        }
        if self.parts.version == Version::HTTP_2 {
            headers::join_cookies(map);
        }
        if self.parts.version < Version::HTTP_2 && self.parts.method == Method::CONNECT {
            self.exchange.connection.drain();
        }
        headers::join_lines(map);
        if found.has(Found::UPGRADE) && wants_upgrade(map) {
            let name = map.get(header::UPGRADE).and_then(|v| v.to_str().ok()).unwrap_or_default();
            let over_h1 = self.parts.version < Version::HTTP_2;
            if !(over_h1 && name.eq_ignore_ascii_case("h2c")) {
                let allowed = http.config.upgrades.iter().any(|(n, on)| *on && name.eq_ignore_ascii_case(n));
                // what a client sent ahead was meant for another protocol: only a 101 leads on from here
                if over_h1 {
                    self.exchange.connection.drain();
                }
                if !allowed {
                    return Err((StatusCode::FORBIDDEN, "upgrade_failed", Flags::NONE));
                }
                self.upgrade = true;
                self.exchange.leaves = true;
            }
        }
        headers::strip_hop_by_hop(map, found, self.upgrade);
        headers::strip_internal(map, found);
        if found.has(Found::PEER_METADATA) {
            if let Some(told) = map.remove(headers::PEER_METADATA)
                && http.reporter == Some(Reporter::Destination)
            {
                let standard = &http.worker.shared.standard;
                self.exchange.peer = self.exchange.connection.peer_workload(&told, standard);
            }
            map.remove(headers::PEER_METADATA_ID);
        }
        if found.has(Found::EXPECT) {
            map.remove(header::EXPECT);
        }
        Ok(())
    }

    /// Adds what the next hop should know of the client.
    fn add_headers(&mut self, http: &Http, found: Found) {
        let config = &http.config;
        let connection = Rc::clone(&self.exchange.connection);
        let map = &mut self.parts.headers;
        let client = &config.client;
        if client.use_remote_address {
            // the nearest trusted proxy is the other end of the connection, and has not written itself
            if let Some(before) = client.xff_num_trusted_hops.checked_sub(1)
                && let Some(ip) = headers::forwarded_for(map, before)
            {
                self.exchange.remote = SocketAddr::new(ip, 0);
            }
            if !client.skip_xff_append {
                headers::append_forwarded_for(map, connection.remote.ip());
            }
            let trusted = client.xff_num_trusted_hops > 0 && map.contains_key(headers::FORWARDED_PROTO);
            if !trusted {
                map.insert(headers::FORWARDED_PROTO, proto(self.https));
            }
            if let Ok(value) = HeaderValue::try_from(self.exchange.remote.ip().to_string()) {
                map.insert(headers::EXTERNAL_ADDRESS, value);
            }
        } else {
            if found.has(Found::FORWARDED_FOR)
                && let Some(ip) = headers::forwarded_for(map, client.xff_num_trusted_hops)
            {
                self.exchange.remote = SocketAddr::new(ip, 0);
            }
            if !found.has(Found::FORWARDED_PROTO) {
                map.insert(headers::FORWARDED_PROTO, proto(self.https));
            }
        }
        self.https = match (&config.scheme_overwrite, self.parts.uri.scheme()) {
            (Some(scheme), _) => {
                map.insert(headers::FORWARDED_PROTO, proto(*scheme == Scheme::HTTPS));
                *scheme == Scheme::HTTPS
            }
            (None, Some(scheme)) => *scheme == Scheme::HTTPS,
            (None, None) if !found.has(Found::FORWARDED_PROTO) => self.https,
            (None, None) => match map.get(headers::FORWARDED_PROTO).map(HeaderValue::as_bytes) {
                Some(b"https") => true,
                Some(b"http") => false,
                _ => self.https,
            },
        };
        let id = &config.request_id;
        let outside = client.use_remote_address && !id.preserve_external;
        if id.generate
            && (outside || !(found.has(Found::REQUEST_ID) && map.contains_key(headers::REQUEST_ID)))
        {
            map.insert(headers::REQUEST_ID, headers::request_id(&mut http.worker.shared.rng.borrow_mut()));
        }
        if id.in_response {
            self.exchange.request_id = map.get(headers::REQUEST_ID).cloned();
        }
        if let Some(via) = &config.via {
            map.append(header::VIA, via.clone());
        }
        let may_tell = !client.use_remote_address || client.xff_num_trusted_hops > 0;
        let told = may_tell && map.contains_key(headers::FORWARDED_PORT);
        if config.append_x_forwarded_port && !told {
            map.insert(headers::FORWARDED_PORT, HeaderValue::from(connection.local.port()));
        }
        forward_certificate(http, &connection, found, map);
    }

    /// One attempt's request. `keep` says that another attempt may follow, so its parts are copied.
    pub fn outgoing(&mut self, keep: bool, limit: usize) -> Option<Outgoing> {
        let mut body = self.next_body(keep, limit)?;
        if let Some(web) = &self.exchange.web {
            body = web.upload(body);
        }
        let headers = if keep || self.keep_headers {
            self.parts.headers.clone()
        } else {
            std::mem::take(&mut self.parts.headers)
        };
        Some(Outgoing {
            method: self.parts.method.clone(),
            path: self.path.clone(),
            authority: self.authority.clone(),
            https: self.https,
            headers,
            body,
            client_h2: self.parts.version == Version::HTTP_2,
            upgrade: self.upgrade,
            origin: None,
        })
    }

    fn next_body(&mut self, keep: bool, limit: usize) -> Option<RequestBody> {
        if let Some(replay) = &self.replay {
            return replay.again().map(RequestBody::Replay);
        }
        let Some(body) = self.body.take() else { return Some(RequestBody::Empty) };
        if body.is_end_stream() {
            return Some(RequestBody::Empty);
        }
        let progress = Rc::new(Progress { bytes: Cell::new(0), ..Progress::default() });
        self.exchange.progress = Some(Rc::clone(&progress));
        if !keep {
            return Some(RequestBody::Stream(body, progress));
        }
        let replay = Replay::new(body, limit, progress);
        let first = replay.again();
        self.replay = Some(replay);
        first.map(RequestBody::Replay)
    }
}

/// The answer to what cannot be read as a request.
#[must_use]
pub fn refuse_unread(exchange: Box<Exchange>, why: Malformed) -> HttpResponse {
    *refuse(exchange, unread(why))
}

fn unread(why: Malformed) -> Refusal {
    let (status, details) = match why {
        Malformed::Syntax(httparse::Error::TooManyHeaders) => {
            (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "http1.too_many_headers")
        }
        Malformed::Version => (StatusCode::UPGRADE_REQUIRED, "low_version"),
        Malformed::Syntax(httparse::Error::HeaderValue) => (BAD, "http1.invalid_characters"),
        Malformed::Target => (BAD, "http1.invalid_url"),
        Malformed::TooLong(_) => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "http1.headers_too_large"),
        Malformed::TargetTooLong => (StatusCode::URI_TOO_LONG, "http1.codec_error"),
        Malformed::Unknown => (StatusCode::NOT_IMPLEMENTED, "http1.invalid_transfer_encoding"),
        Malformed::Ambiguous => (BAD, "http1.content_length_and_chunked_not_allowed"),
        Malformed::Syntax(_)
        | Malformed::Length
        | Malformed::Encoding
        | Malformed::Value
        | Malformed::Chunk
        | Malformed::Trailers
        | Malformed::Cut => (BAD, "http1.codec_error"),
    };
    (status, details, Flags::DOWNSTREAM_PROTOCOL)
}

/// The answer to a request that turns out to be none when its body is read.
#[must_use]
pub fn refusal_of_body(why: Malformed) -> Local {
    refusal(unread(why))
}

fn refusal((status, details, flags): Refusal) -> Local {
    let text = if flags.contains(Flags::DOWNSTREAM_PROTOCOL) { status.canonical_reason() } else { None };
    Local::text(status, text.unwrap_or_default()).flag(flags).details(details)
}

fn refuse(mut exchange: Box<Exchange>, why: Refusal) -> Box<HttpResponse> {
    let (_, _, flags) = why;
    let mut local = refusal(why);
    // what is no HTTP is no call either: its answer is plain
    exchange.is_grpc &= !flags.contains(Flags::DOWNSTREAM_PROTOCOL);
    if exchange.version < Version::HTTP_2 {
        local.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Box::new(local.into_response(exchange))
}

/// The one authority of a request: HTTP/2's, or that of an absolute target, or `host`.
fn authority(parts: &mut request::Parts, http: &Http, port: u16) -> Result<HeaderValue, Refusal> {
    if parts.version == Version::HTTP_10 && !http.config.http1.accept_http_10
        || parts.version == Version::HTTP_09
    {
        return Err((StatusCode::UPGRADE_REQUIRED, "low_version", Flags::DOWNSTREAM_PROTOCOL));
    }
    if parts.headers.get_all(header::HOST).iter().nth(1).is_some() {
        return Err((BAD, "multiple_host_headers", Flags::NONE));
    }
    if parts.uri.scheme_str().is_some_and(|s| s != "http" && s != "https") {
        return Err((BAD, "invalid_scheme", Flags::NONE));
    }
    let host = parts.headers.remove(header::HOST);
    let value = match parts.uri.authority() {
        // credentials in a target are nobody's business further on; `:authority` has none (RFC 9113, section 8.3.1)
        Some(a) if parts.version < Version::HTTP_2 => {
            let text = a.as_str();
            let host = text.rsplit_once('@').map_or(text, |(_, host)| host);
            HeaderValue::from_str(host).ok()
        }
        Some(a) => HeaderValue::from_str(a.as_str()).ok(),
        None => host.or_else(|| http.config.http1.default_host_for_http_10.clone()),
    };
    let value = value.filter(|v| !v.is_empty()).ok_or((BAD, "missing_host_header", Flags::NONE))?;
    let Ok(text) = value.to_str() else { return Err((BAD, "invalid_authority", Flags::NONE)) };
    if text.contains(['/', '?', '#', '\\', '@', ' ']) {
        return Err((BAD, "invalid_authority", Flags::NONE));
    }
    let clean = clean_authority(text, http, port).ok_or((BAD, "invalid_authority", Flags::NONE))?;
    if clean == text {
        return Ok(value);
    }
    HeaderValue::from_str(&clean).map_err(|_| (BAD, "invalid_authority", Flags::NONE))
}

fn clean_authority<'a>(text: &'a str, http: &Http, port: u16) -> Option<std::borrow::Cow<'a, str>> {
    let clean = router::canonical_authority(text)?;
    let bare = router::without_port(&clean);
    let strip = match http.config.strip_port {
        StripPort::Never => false,
        StripPort::Any => true,
        StripPort::Matching => {
            let written = clean.get(bare.len()..).and_then(|p| p.strip_prefix(':'));
            written.and_then(|p| p.parse().ok()) == Some(port)
        }
    };
    if strip && bare.len() < clean.len() { Some(bare.to_owned().into()) } else { Some(clean) }
}

/// What the codec leaves to be refused, because a version that is not accepted comes first, or for it is HTTP/2's.
fn framing(parts: &request::Parts, found: Found, http: &Http) -> Result<(), Refusal> {
    if found.has(Found::TRANSFER_ENCODING) && parts.version == Version::HTTP_10 {
        return Err((BAD, "http1.invalid_transfer_encoding", Flags::DOWNSTREAM_PROTOCOL));
    }
    if found.has(Found::CONTENT_LENGTH) && !headers::have_clear_length(&parts.headers) {
        return Err((BAD, "http2.violation.of.messaging.rule", Flags::DOWNSTREAM_PROTOCOL));
    }
    let most = usize::try_from(http.config.max_headers_count).unwrap_or(usize::MAX);
    if parts.headers.len() > most {
        return Err((StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "http1.too_many_headers", Flags::NONE));
    }
    Ok(())
}

/// At the edge, who asks for https must have come over TLS.
fn scheme_fits(parts: &request::Parts, connection: &Connection, http: &Http) -> Result<(), Refusal> {
    let asks = parts.version < Version::HTTP_2 && parts.uri.scheme() == Some(&Scheme::HTTPS);
    let client = &http.config.client;
    let edge = client.use_remote_address && client.xff_num_trusted_hops == 0;
    if asks && edge && connection.peer.is_none() {
        return Err((StatusCode::FORBIDDEN, "http1.invalid_scheme", Flags::DOWNSTREAM_PROTOCOL));
    }
    Ok(())
}

/// A path of characters that a path may have (RFC 3986, section 3.3).
fn target(parts: &request::Parts) -> Result<(), Refusal> {
    let target = parts.uri.path_and_query().map_or("", PathAndQuery::as_str);
    if !target.is_ascii() {
        return Err((BAD, "http1.codec_error", Flags::DOWNSTREAM_PROTOCOL));
    }
    Ok(())
}

fn underscored(headers: &HeaderMap) -> impl Iterator<Item = &HeaderName> {
    headers.keys().filter(|name| name.as_str().contains('_'))
}

/// Names of headers, without `_` where those are refused.
fn names(parts: &request::Parts, found: Found, http: &Http) -> Result<(), Refusal> {
    if found.has(Found::NO_NAME) {
        return Err((BAD, "http2.invalid.header.field", Flags::DOWNSTREAM_PROTOCOL));
    }
    if http.config.underscores == Underscores::Reject && underscored(&parts.headers).next().is_some() {
        return Err((BAD, "http1.unexpected_underscore", Flags::DOWNSTREAM_PROTOCOL));
    }
    Ok(())
}

/// The normalised path, or the answer to one that has none.
fn clean_path(parts: &request::Parts, http: &Http) -> Result<PathAndQuery, Box<Local>> {
    let refused = |status, details| Box::new(Local::text(status, "").details(details));
    let malformed = || refused(BAD, "path_normalization_failed");
    let Some(given) = parts.uri.path_and_query() else {
        // a CONNECT request names no path
        let connects = parts.method == Method::CONNECT;
        return if connects { Ok(PathAndQuery::from_static("/")) } else { Err(malformed()) };
    };
    if given.as_str().starts_with('?') {
        return Err(refused(StatusCode::NOT_FOUND, "absolute_path_rejected"));
    }
    match normalize(given.as_str(), http.config.path) {
        Normalized::Path(std::borrow::Cow::Borrowed(same)) if same.len() == given.as_str().len() => {
            Ok(given.clone())
        }
        Normalized::Path(other) => PathAndQuery::try_from(other.as_ref()).map_err(|_| malformed()),
        Normalized::Redirect(location) => {
            let mut local = refused(StatusCode::TEMPORARY_REDIRECT, "path_normalization_failed");
            if let Ok(value) = HeaderValue::try_from(location) {
                local.headers.insert(header::LOCATION, value);
            }
            Err(local)
        }
        Normalized::Invalid => Err(malformed()),
    }
}

fn told_as_it_came(parts: &request::Parts, authority: &HeaderValue) -> Told {
    Told {
        method: parts.method.clone(),
        path: parts.uri.path_and_query().map_or("", PathAndQuery::as_str).to_owned(),
        authority: authority.clone(),
        headers: parts.headers.clone(),
    }
}

/// A request to leave HTTP in HTTP/2's way (RFC 8441) becomes one in HTTP/1's way, as all behind here understands it.
/// The codec lets neither header through that this adds.
fn from_connect(parts: &mut request::Parts) {
    let Some(protocol) = parts.extensions.remove::<Protocol>() else { return };
    if let Ok(name) = HeaderValue::from_bytes(protocol.as_ref()) {
        parts.method = Method::GET;
        parts.headers.insert(header::UPGRADE, name);
        parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

fn wants_upgrade(map: &HeaderMap) -> bool {
    map.contains_key(header::UPGRADE)
        && map
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .flat_map(|v| v.split(','))
            .any(|token| token.trim().eq_ignore_ascii_case("upgrade"))
}

fn proto(https: bool) -> HeaderValue {
    HeaderValue::from_static(if https { "https" } else { "http" })
}

/// Tells, or keeps from telling, who the client is by its certificate.
fn forward_certificate(http: &Http, connection: &Connection, found: Found, map: &mut HeaderMap) {
    let config = &http.config.client_cert;
    let mutual = connection.is_mutual_tls();
    let name = headers::FORWARDED_CLIENT_CERT;
    let keep = match config.forward {
        ForwardClientCert::Sanitize | ForwardClientCert::SanitizeSet => false,
        ForwardClientCert::ForwardOnly | ForwardClientCert::AppendForward => mutual,
        ForwardClientCert::AlwaysForwardOnly => true,
    };
    if !keep && found.has(Found::CLIENT_CERT) {
        map.remove(&name);
    }
    let adds = matches!(config.forward, ForwardClientCert::AppendForward | ForwardClientCert::SanitizeSet);
    let Some(peer) = connection.peer.as_ref().filter(|_| adds && mutual) else { return };
    let facts = CertFacts { subject: config.subject, uri: config.uri, dns: config.dns };
    let mut text: String =
        map.get_all(&name).iter().filter_map(|v| v.to_str().ok()).collect::<Vec<_>>().join(",");
    if !text.is_empty() {
        text.push(',');
    }
    text.push_str(&headers::client_cert_element(peer, &connection.own_uris, facts));
    if let Ok(value) = HeaderValue::try_from(text) {
        map.insert(name, value);
    }
}
