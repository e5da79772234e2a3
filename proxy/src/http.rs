//! The path of a request, top to bottom: [`forward`].
//!
//! One [`Http`] is one connection manager on one worker; everything that its configuration decides is prepared in
//! it. [`call`] takes a request in, [`filters`] may answer it, the route is found, [`attempts`] send it on, and
//! [`body`] streams the response back; [`exchange`] counts and logs it when it is over, however it ends.

pub mod attempts;
pub mod body;
pub mod call;
pub mod exchange;
pub mod filters;
pub mod flags;
pub mod flood;
pub mod grpc_web;
pub mod h1;
pub mod head;
pub mod headers;
pub mod path;
pub mod reply;
pub mod server;
pub mod stats;
pub mod timing;
pub mod tunnel;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, Version};
use hyper::upgrade::OnUpgrade;

use crate::access_log::Logs;
use crate::listener::connection::Connection;
use crate::metrics::Counter;
use crate::metrics::standard::Reporter;
use crate::router::{self, rewrite};
use crate::worker::{RouteTable, Worker};
use crate::xds::filter::{FilterConfig, PerFilter, Router};
use crate::xds::listener::hcm::{HttpConnectionManager, ServerHeader};
use crate::xds::mutation::HeaderOps;
use crate::xds::route::action::{Action, ClusterChoice, Forward, PathRewrite, WeightedCluster};
use crate::xds::route::{PathMatch, RequireTls, Route, RouteConfiguration, VirtualHost};

use body::{Received, ResponseBody};
use call::Call;
use exchange::Exchange;
use filters::Pass;
use flags::Flags;
use reply::Local;
use stats::HttpStats;
use tunnel::Leaving;

/// A response on its way to the client.
pub type HttpResponse = Response<ResponseBody>;

/// A connection manager on one worker.
#[derive(Debug)]
pub struct Http {
    /// Its configuration.
    pub config: Arc<HttpConnectionManager>,
    /// The worker.
    pub worker: Rc<Worker>,
    /// Its access logs.
    pub logs: Logs,
    /// From which side it reports standard metrics, if from any.
    pub reporter: Option<Reporter>,
    /// What Envoy counts of it.
    pub stats: HttpStats,
    router: Router,
    routes: RefCell<Option<Rc<RouteTable>>>,
}

impl Http {
    /// Prepares a connection manager.
    #[must_use]
    pub fn new(
        config: Arc<HttpConnectionManager>,
        worker: &Rc<Worker>,
        reporter: Option<Reporter>,
    ) -> Rc<Self> {
        let router = config
            .filters
            .iter()
            .find_map(|f| if let FilterConfig::Router(router) = f.config { Some(router) } else { None });
        Rc::new(Self {
            logs: Logs::new(&config.access_logs, worker),
            reporter,
            stats: HttpStats::new(&worker.shared.registry, &config.stat_prefix),
            router: router.unwrap_or_default(),
            routes: RefCell::new(None),
            worker: Rc::clone(worker),
            config,
        })
    }

    /// Takes other routes, from the next request on.
    pub fn set_routes(&self, routes: &Arc<RouteConfiguration>) {
        let mut current = self.routes.borrow_mut();
        if !current.as_ref().is_some_and(|table| Arc::ptr_eq(&table.routes.config, routes)) {
            *current = Some(Rc::new(RouteTable::new(Arc::clone(routes))));
        }
    }

    /// The last touch on a response's headers.
    pub fn finish_headers(&self, exchange: &Exchange, map: &mut HeaderMap) {
        let (connection, version) = (&exchange.connection, exchange.version);
        match self.config.server_header {
            ServerHeader::Overwrite => {
                map.insert(header::SERVER, self.config.server_name.clone());
            }
            ServerHeader::AppendIfAbsent => {
                map.entry(header::SERVER).or_insert_with(|| self.config.server_name.clone());
            }
            ServerHeader::PassThrough => {}
        }
        map.entry(header::DATE).or_insert_with(|| self.worker.date.borrow().clone());
        if let Some(id) = &exchange.request_id {
            map.insert(headers::REQUEST_ID, id.clone());
        }
        if let Some(via) = &self.config.via {
            headers::append(map, &header::VIA, via.clone());
        }
        let most = self.config.max_requests_per_connection;
        let used_up = most.is_some_and(|m| connection.requests.get() >= m);
        if version < Version::HTTP_2 && (used_up || self.worker.is_draining() || connection.is_draining()) {
            map.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// The route of a request and where it leads.
#[derive(Debug)]
pub struct Decision {
    table: Rc<RouteTable>,
    host: Arc<VirtualHost>,
    route: Arc<Route>,
    /// Which of the route's weighted clusters was drawn.
    drawn: Option<usize>,
}

impl Decision {
    fn forward(&self) -> Option<&Forward> {
        match &self.route.action {
            Action::Forward(forward) => Some(forward),
            Action::Redirect(_) | Action::Direct(_) | Action::NonForwarding => None,
        }
    }

    fn weighted(&self) -> Option<&WeightedCluster> {
        match &self.forward()?.cluster {
            ClusterChoice::Weighted(w) => w.clusters.get(self.drawn?),
            ClusterChoice::One(_) | ClusterChoice::Header(_) => None,
        }
    }

    /// Whether headers of the response are made from the request.
    fn response_reads_request(&self) -> bool {
        let weighted = self.weighted().is_some_and(|w| w.response_headers.from_request);
        weighted
            || self.route.response_headers.from_request
            || self.host.response_headers.from_request
            || self.table.routes.config.response_headers.from_request
    }

    fn per_filter(&self) -> &PerFilter {
        self.weighted().map_or(&self.route.per_filter, |w| &w.per_filter)
    }
}

/// An injected delay under way, counted until it is over or the client has left.
struct Delayed(Rc<Counter>);

impl Delayed {
    fn start(active: &Rc<Counter>) -> Self {
        active.inc();
        Self(Rc::clone(active))
    }
}

impl Drop for Delayed {
    fn drop(&mut self) {
        self.0.sub(1);
    }
}

/// The whole path of a request, in order.
pub async fn forward(http: Rc<Http>, connection: Rc<Connection>, request: Request<Received>) -> HttpResponse {
    let mut call = match Call::begin(&http, &connection, request) {
        Ok(call) => call,
        Err(answer) => return *answer,
    };
    if let Some(local) = filters::shed(&http, &connection) {
        return local.into_response(call.exchange);
    }
    let decided = decide(&http, &mut call);
    let decision = if let Decided::Route(decision) = &decided { Some(decision) } else { None };
    for filter in &http.config.filters {
        let per_route = decision.map(Decision::per_filter);
        let mut pass = filters::ask(&http, filter, per_route, &mut call);
        if let Pass::Delay(delay, fault) = pass {
            call.exchange.flags.insert(Flags::DELAY_INJECTED);
            let delayed = Delayed::start(&http.stats.faults_active);
            let late = attempts::pause(delay, &mut call).await;
            drop(delayed);
            pass = match late {
                None => filters::abort(&http, &fault),
                Some(late) => Pass::Answer(Box::new(attempts::too_late(&call, late))),
            };
        }
        if let Pass::Preflight(local) = pass {
            call.exchange.is_grpc = false; // it is no call yet
            return local.into_response(call.exchange);
        }
        if let Pass::Answer(local) = pass {
            // what a route says of the answers of servers holds for those of filters, too
            return match decision.filter(|d| d.forward().is_some()) {
                Some(decision) => answer(decision, call, *local),
                None => local.into_response(call.exchange),
            };
        }
    }
    let decision = match decided {
        Decided::Route(decision) => decision,
        Decided::NeedsTls => {
            let location = format!("https://{}{}", call.head().authority, call.path);
            return redirect(location, StatusCode::MOVED_PERMANENTLY).into_response(call.exchange);
        }
        Decided::Nothing => {
            let local =
                Local::text(StatusCode::NOT_FOUND, "").flag(Flags::NO_ROUTE).details("route_not_found");
            return local.into_response(call.exchange);
        }
    };
    if let Some(local) = answer_here(&http, &decision, &mut call) {
        return answer(&decision, call, local);
    }
    let Some(upstream) = call.exchange.upstream.clone() else {
        let status = decision.forward().map_or(StatusCode::SERVICE_UNAVAILABLE, |f| f.cluster_not_found);
        let local = Local::text(status, "").flag(Flags::NO_CLUSTER).details("cluster_not_found");
        return answer(&decision, call, local);
    };
    if let Err(local) = prepare(&http, &decision, &mut call) {
        return answer(&decision, call, *local);
    }
    call.keep_headers = decision.response_reads_request();
    match attempts::run(&http, &decision, &upstream, &mut call).await {
        Ok(mut answered) => match grpc_web::told(&mut answered, &mut call).await {
            Ok(told) => respond(&http, &decision, call, answered, told),
            Err(local) => answer(&decision, call, *local),
        },
        Err(mut local) => {
            if decision.host.include_attempt_count_in_response {
                let attempts = call.exchange.attempts.max(1);
                local.headers.insert(headers::ATTEMPT_COUNT, headers::number(attempts.into()));
            }
            answer(&decision, call, *local)
        }
    }
}

/// The proxy's own answer on a route, with what the route says about responses.
fn answer(decision: &Decision, mut call: Box<Call>, mut local: Local) -> HttpResponse {
    local.explain(&mut call.exchange);
    response_ops(decision, &call, &mut local.headers);
    if let Some((cors, origin)) = call.cors.take() {
        filters::cors_response(&cors, origin, &mut local.headers);
    }
    local.into_response(call.exchange)
}

/// What the routes say about a request.
enum Decided {
    Route(Decision),
    /// Its virtual host is for https alone.
    NeedsTls,
    Nothing,
}

/// Finds the route, and draws its cluster.
fn decide(http: &Rc<Http>, call: &mut Call) -> Decided {
    let Some(table) = http.routes.borrow().clone() else { return Decided::Nothing };
    let head = call.head();
    let Some(host) = table.routes.virtual_host(head.authority) else { return Decided::Nothing };
    let needs_tls = match host.require_tls {
        RequireTls::None => false,
        RequireTls::ExternalOnly | RequireTls::All => {
            call.parts.headers.get(headers::FORWARDED_PROTO).is_none_or(|proto| proto != "https")
        }
    };
    if needs_tls {
        return Decided::NeedsTls;
    }
    let Some(route) = router::match_route(host, &head, call.certificate(), http.worker.random()) else {
        return Decided::Nothing;
    };
    let (host, route) = (Arc::clone(host), Arc::clone(route));
    call.exchange.route = Some(Arc::clone(&route));
    if let Action::Forward(forward) = &route.action
        && let Some(idle) = forward.idle_timeout
    {
        call.exchange.timing.set_idle(idle);
    }
    let mut decision = Decision { table, host, route, drawn: None };
    let (drawn, upstream) = match decision.forward().map(|f| &f.cluster) {
        None => (None, None),
        Some(ClusterChoice::One(cluster)) => (None, decision.table.upstream(&http.worker, *cluster)),
        Some(ClusterChoice::Weighted(weighted)) => {
            let at = http.worker.split.next(weighted.total);
            let drawn = weighted.clusters.iter().position(|c| at < c.until);
            let cluster = drawn.and_then(|d| weighted.clusters.get(d)).map(|c| c.cluster);
            (drawn, cluster.and_then(|c| decision.table.upstream(&http.worker, c)))
        }
        Some(ClusterChoice::Header(name)) => {
            let named = call.parts.headers.get(name).and_then(|v| v.to_str().ok());
            (None, named.and_then(|n| http.worker.upstream(n)))
        }
    };
    decision.drawn = drawn;
    call.exchange.upstream = upstream;
    Decided::Route(decision)
}

fn redirect(location: String, status: StatusCode) -> Local {
    let local = Local::text(status, "").details("direct_response");
    match HeaderValue::try_from(location) {
        Ok(value) => local.header(header::LOCATION, value),
        Err(_) => Local::text(StatusCode::BAD_REQUEST, ""),
    }
}

/// Redirects, direct responses, and routes that lead nowhere.
fn answer_here(http: &Http, decision: &Decision, call: &mut Call) -> Option<Local> {
    let matched = &decision.route.matches.path;
    Some(match &decision.route.action {
        Action::Forward(_) => return None,
        Action::Redirect(r) => {
            let local = redirect(rewrite::location(r, matched, &call.head()), r.status);
            // header operations see the new path, as in Envoy
            if matches!(r.path, PathRewrite::Prefix(_) | PathRewrite::Regex(_)) {
                rewrite_path(http, &r.path, matched, call);
            }
            local
        }
        Action::Direct(d) => {
            let text = String::from_utf8_lossy(&d.body).into_owned();
            let local = Local::text(d.status, text).details("direct_response");
            let elsewhere = d.status == StatusCode::CREATED || d.status.is_redirection();
            match HeaderValue::try_from(rewrite::own_location(&call.head())) {
                Ok(here) if elsewhere => local.header(header::LOCATION, here),
                _ => local,
            }
        }
        Action::NonForwarding => {
            Local::text(StatusCode::NOT_FOUND, "").flag(Flags::NO_ROUTE).details("route_not_found")
        }
    })
}

/// What became of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rewritten {
    Same,
    Other,
    /// The new one is none.
    Broken,
}

/// Gives the request another path, and keeps the old one in a header.
fn rewrite_path(http: &Http, rewrite: &PathRewrite, matched: &PathMatch, call: &mut Call) -> Rewritten {
    let Some(new) = rewrite::path(rewrite, matched, call.path.as_str()) else { return Rewritten::Same };
    // a path without its slash is none: no server reads it
    let new = if new.starts_with('/') { new } else { format!("/{new}") };
    let Ok(new) = PathAndQuery::try_from(new) else { return Rewritten::Broken };
    let old = std::mem::replace(&mut call.path, new);
    if !http.router.suppress_envoy_headers
        && let Ok(old) = HeaderValue::from_str(old.as_str())
    {
        call.parts.headers.insert(headers::ORIGINAL_PATH, old);
    }
    Rewritten::Other
}

/// Carries out what the route says about the request: first its header operations, which see what came.
///
/// # Errors
///
/// The answer to a request whose rewritten path is none.
fn prepare(http: &Http, decision: &Decision, call: &mut Call) -> Result<(), Box<Local>> {
    let Some(forward) = decision.forward() else { return Ok(()) };
    let suppress = http.router.suppress_envoy_headers;
    let mut changed = request_ops(decision, call);
    if let Some(host) = rewritten_host(forward, call) {
        changed = true;
        let old = std::mem::replace(&mut call.authority, host);
        if forward.append_x_forwarded_host {
            headers::append(&mut call.parts.headers, &headers::FORWARDED_HOST, old.clone());
        }
        if !suppress {
            call.parts.headers.insert(headers::ORIGINAL_HOST, old);
        }
    }
    match rewrite_path(http, &forward.path_rewrite, &decision.route.matches.path, call) {
        Rewritten::Same => {}
        Rewritten::Other => changed = true,
        // the old one was not meant for the server
        Rewritten::Broken => {
            let local = Local::text(StatusCode::BAD_REQUEST, "").details("path_rewrite_failed");
            return Err(Box::new(local));
        }
    }
    if changed {
        call.note_changes();
    }
    Ok(())
}

fn rewritten_host(forward: &Forward, call: &Call) -> Option<HeaderValue> {
    use crate::xds::route::action::HostRewrite;
    match &forward.host_rewrite {
        HostRewrite::None | HostRewrite::Auto => None,
        HostRewrite::Literal(host) => Some(host.clone()),
        HostRewrite::Header(name) => call.parts.headers.get(name).filter(|host| !host.is_empty()).cloned(),
        HostRewrite::PathRegex(r) => HeaderValue::try_from(rewrite::host_from_path(r, &call.head())).ok(),
    }
}

/// The levels of header operations, the most specific first unless the configuration says otherwise. Those of a
/// weighted cluster come before them in any case.
fn levels<T>(decision: &Decision, route: T, host: T, config: T) -> [T; 3] {
    if decision.table.routes.config.most_specific_header_mutations_wins {
        [config, host, route]
    } else {
        [route, host, config]
    }
}

/// `true` when there was something to do.
fn request_ops(decision: &Decision, call: &mut Call) -> bool {
    let config = &decision.table.routes.config;
    let (route, host) = (&decision.route.request_headers, &decision.host.request_headers);
    let mut changed = false;
    if let Some(weighted) = decision.weighted() {
        changed |= carry_out(&weighted.request_headers, call);
        if let Some(host) = &weighted.host_rewrite {
            changed = true;
            call.authority = host.clone();
        }
    }
    for ops in levels(decision, route, host, &config.request_headers) {
        changed |= carry_out(ops, call);
    }
    changed
}

fn carry_out(ops: &HeaderOps, call: &mut Call) -> bool {
    if ops.is_empty() {
        return false;
    }
    let mut map = std::mem::take(&mut call.parts.headers);
    headers::apply(ops, &mut map, &|f, now| call.render(f, Some(now), None));
    call.parts.headers = map;
    true
}

fn response_ops(decision: &Decision, call: &Call, map: &mut HeaderMap) {
    let config = &decision.table.routes.config;
    let (route, host) = (&decision.route.response_headers, &decision.host.response_headers);
    let weighted = decision.weighted().map(|w| &w.response_headers);
    let levels = levels(decision, route, host, &config.response_headers);
    for ops in weighted.into_iter().chain(levels).filter(|ops| !ops.is_empty()) {
        headers::apply(ops, map, &|f, now| call.render(f, None, Some(now)));
    }
}

/// Sends copies elsewhere; their answers are read and thrown away.
fn mirror(http: &Rc<Http>, decision: &Decision, call: &mut Call) {
    let Some(forward) = decision.forward() else { return };
    for policy in &forward.mirrors {
        if !policy.fraction.hits(http.worker.random()) {
            continue;
        }
        let Some(upstream) = decision.table.upstream(&http.worker, policy.cluster) else { continue };
        attempts::shadow(http, policy, &upstream, call);
    }
}

/// Turns an upstream's answer into the client's. `told`: its body, when that goes into its head.
fn respond(
    http: &Rc<Http>,
    decision: &Decision,
    mut call: Box<Call>,
    answer: attempts::Answered,
    told: Option<Vec<u8>>,
) -> HttpResponse {
    let attempts::Answered { mut parts, reply, began, at, cookie } = answer;
    let upgraded = call.upgrade && parts.status == StatusCode::SWITCHING_PROTOCOLS;
    headers::strip_response(&mut parts.headers, upgraded);
    // a request to leave HTTP does not end, and the time counts from its end
    if !http.router.suppress_envoy_headers && !call.upgrade {
        let ms = u64::try_from(at.duration_since(began).as_millis()).unwrap_or(u64::MAX);
        parts.headers.insert(headers::UPSTREAM_SERVICE_TIME, headers::number(ms));
    }
    if decision.host.include_attempt_count_in_response {
        parts.headers.insert(headers::ATTEMPT_COUNT, headers::number(call.exchange.attempts.into()));
    }
    if let Some(cookie) = cookie {
        parts.headers.append(header::SET_COOKIE, cookie);
    }
    call.exchange.status = Some(parts.status);
    call.exchange.details = "via_upstream".into();
    response_ops(decision, &call, &mut parts.headers);
    if let Some((cors, origin)) = call.cors.take() {
        filters::cors_response(&cors, origin, &mut parts.headers);
    }
    if let Some(web) = &call.exchange.web {
        web.finish_headers(parts.status, &mut parts.headers, told.as_deref());
    }
    let upgrade = parts.headers.get(header::CONNECTION).filter(|_| upgraded).cloned();
    http.finish_headers(&call.exchange, &mut parts.headers);
    if let Some(upgrade) = upgrade {
        parts.headers.insert(header::CONNECTION, upgrade);
    }
    let mut exchange = call.exchange;
    exchange.respond(parts.status, &parts.headers, at);
    if exchange.version == Version::HTTP_2 {
        parts.headers.remove(header::CONNECTION);
        if upgraded {
            parts.headers.remove(header::UPGRADE);
            parts.status = StatusCode::OK;
        }
    }
    parts.version = exchange.version;
    if upgraded {
        let leaving = if exchange.version == Version::HTTP_2 {
            call.parts.extensions.remove::<OnUpgrade>().map(Leaving::H2)
        } else {
            Some(Leaving::H1(exchange.connection.leave()))
        };
        if let (Some(server), Some(client)) = (reply.into_left(), leaving) {
            let worker = Rc::clone(&http.worker);
            let shadows = call.shadows;
            http.worker.connections.spawn_local(tunnel::run(worker, client, server, shadows, exchange));
        }
        return Response::from_parts(parts, ResponseBody::default());
    }
    let body = match told {
        None => ResponseBody::upstream(reply, exchange),
        Some(_) => ResponseBody::local(Bytes::new(), Some(exchange)),
    };
    Response::from_parts(parts, body)
}
