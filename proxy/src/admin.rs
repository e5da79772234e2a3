//! The admin port: state, statistics and configuration of this proxy, and a few switches.
//!
//! Paths and answers are Envoy's, because `istioctl`, dashboards and scripts ask for them. [`answer`] is a function
//! from a request to an answer; [`serve`] moves the bytes.

pub mod dump;
pub mod serve;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode, header};
use http_body_util::Full;
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::drain::Drain;
use crate::tables::TableStore;
use crate::telemetry::{LogLevel, Process, Scrape, State, resident_bytes};
use crate::xds::transport::Status;

/// The version that `/server_info` tells.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the admin port can look at and switch.
#[derive(Clone)]
pub struct Admin {
    /// The configuration that the proxy was started with.
    pub config: Arc<Config>,
    /// The tables.
    pub tables: Arc<TableStore>,
    /// The stream to the control plane.
    pub xds: watch::Receiver<Status>,
    /// How far the proxy has come.
    pub state: watch::Receiver<State>,
    /// The workers' counters.
    pub scrape: Scrape,
    /// Draining.
    pub drain: Drain,
    /// Ends the proxy.
    pub quit: CancellationToken,
    /// The level of the log, where it can be changed.
    pub log: Option<LogLevel>,
    /// When the proxy started.
    pub started: tokio::time::Instant,
    /// Data workers.
    pub workers: usize,
}

/// A request, as far as answers depend on it.
#[derive(Debug, Clone)]
pub struct Asked {
    /// GET, HEAD or POST.
    pub method: Method,
    /// The path.
    pub path: String,
    /// The query, decoded.
    pub query: Vec<(String, String)>,
    /// It comes from a page in a browser, which must not change anything.
    pub has_origin: bool,
}

impl Asked {
    fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    fn flag(&self, name: &str) -> bool {
        self.query.iter().any(|(n, _)| n == name)
    }
}

/// An answer.
pub type Answer = http::Response<Full<Bytes>>;

const TEXT: &str = "text/plain; charset=UTF-8";
const JSON: &str = "application/json";

const HELP: &str = "admin commands are:
  /: this text
  /certs: the certificate in use (GET)
  /clusters: clusters and their endpoints (GET; ?format=json)
  /config_dump: all configuration (GET; ?include_eds, ?resource=NAME)
  /drain_listeners: accept nothing more (POST)
  /init_dump: what is waited for (GET)
  /listeners: listeners and their addresses (GET; ?format=json)
  /logging: the level of the log (POST; ?level=LEVEL)
  /memory: memory in use (GET)
  /quitquitquit: end the process (POST)
  /ready: 200 if the proxy takes traffic (GET)
  /server_info: version, state, node (GET)
  /stats: statistics (GET; ?filter=TEXT, ?usedonly, ?format=prometheus|json)
  /stats/prometheus: statistics for Prometheus (GET)
";

fn reply(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = http::Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-cache, max-age=0"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    response
}

fn text(body: impl Into<Bytes>) -> Answer {
    reply(StatusCode::OK, TEXT, body)
}

fn json_reply(value: &serde_json::Value) -> Answer {
    reply(StatusCode::OK, JSON, format!("{value:#}\n"))
}

/// The answer of the admin port.
pub async fn answer(admin: &Admin, asked: &Asked) -> Answer {
    match asked.path.as_str() {
        "/drain_listeners" | "/quitquitquit" | "/logging" => match switch_refused(asked) {
            Some(refused) => refused,
            None => switch(admin, asked),
        },
        "/" | "/help" => text(HELP),
        "/ready" => ready(admin),
        "/stats" => stats(admin, asked).await,
        "/stats/prometheus" => prometheus(admin).await,
        "/config_dump" => {
            let answer = dump::config(admin, asked.flag("include_eds"), asked.parameter("resource"));
            // Seldom asked for, so not worth keeping what it took.
            wire::forget_descriptors();
            answer
        }
        "/clusters" => dump::clusters(admin, asked.parameter("format") == Some("json")),
        "/listeners" => dump::listeners(admin, asked.parameter("format") == Some("json")),
        "/init_dump" => dump::init(admin),
        "/server_info" => server_info(admin),
        "/certs" => dump::certificates(admin),
        "/memory" => json_reply(&json!({ "total_physical_bytes": resident_bytes().to_string() })),
        _ => reply(StatusCode::NOT_FOUND, TEXT, format!("invalid path. {HELP}")),
    }
}

/// The answer of the port that only tells statistics.
pub async fn stats_answer(admin: &Admin, asked: &Asked) -> Answer {
    match asked.path.as_str() {
        "/stats/prometheus" | "/metrics" => prometheus(admin).await,
        "/healthz/ready" | "/ready" => ready(admin),
        _ => reply(StatusCode::NOT_FOUND, TEXT, "ask for /stats/prometheus\n"),
    }
}

/// The answer of the port that only tells readiness.
#[must_use]
pub fn ready_answer(admin: &Admin, asked: &Asked) -> Answer {
    match asked.path.as_str() {
        "/healthz/ready" | "/ready" => ready(admin),
        _ => reply(StatusCode::NOT_FOUND, TEXT, "ask for /healthz/ready\n"),
    }
}

fn switch_refused(asked: &Asked) -> Option<Answer> {
    if asked.method != Method::POST {
        let reason = format!("Method {} not allowed, POST required.\n", asked.method);
        return Some(reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, reason));
    }
    // A page of any site may send a POST to loopback; browsers say where it came from.
    asked.has_origin.then(|| reply(StatusCode::FORBIDDEN, TEXT, "not from a browser\n"))
}

fn switch(admin: &Admin, asked: &Asked) -> Answer {
    match asked.path.as_str() {
        "/drain_listeners" => {
            tracing::info!("drain asked for on the admin port");
            admin.drain.stop_accepting();
            text("OK\n")
        }
        "/quitquitquit" => {
            tracing::info!("end asked for on the admin port");
            admin.quit.cancel();
            text("OK\n")
        }
        _ => logging(admin, asked),
    }
}

fn logging(admin: &Admin, asked: &Asked) -> Answer {
    let Some(log) = &admin.log else {
        return reply(StatusCode::NOT_IMPLEMENTED, TEXT, "the log belongs to another part of this process\n");
    };
    // As in Envoy: `?level=debug` for all, `?MODULE=debug` for one.
    let directives: Vec<String> = asked
        .query
        .iter()
        .map(|(name, value)| match name.as_str() {
            "level" => value.clone(),
            module => format!("{module}={value}"),
        })
        .collect();
    if !directives.is_empty()
        && let Err(reason) = log.set(&directives.join(","))
    {
        return reply(StatusCode::BAD_REQUEST, TEXT, format!("{reason}\n"));
    }
    text(format!("active loggers: {}\n", log.current()))
}

fn ready(admin: &Admin) -> Answer {
    let state = *admin.state.borrow();
    let status = if state == State::Live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    reply(status, TEXT, format!("{}\n", state.name()))
}

impl Admin {
    fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    fn process(&self) -> Process {
        let tables = self.tables.load();
        let (warming_clusters, warming_listeners) = tables.warming();
        Process {
            state: *self.state.borrow(),
            uptime: self.uptime().as_secs(),
            workers: self.workers,
            clusters: (tables.clusters.len(), warming_clusters.len()),
            listeners: (tables.listeners.len(), warming_listeners.len()),
            xds: self.xds.borrow().clone(),
        }
    }
}

async fn prometheus(admin: &Admin) -> Answer {
    let traffic = (admin.scrape)().await;
    let mut body = admin.process().prometheus();
    body.push_str(&traffic.prometheus);
    reply(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", body)
}

async fn stats(admin: &Admin, asked: &Asked) -> Answer {
    if asked.parameter("format") == Some("prometheus") {
        return prometheus(admin).await;
    }
    let traffic = (admin.scrape)().await;
    let filter = match asked.parameter("filter").map(regex::Regex::new).transpose() {
        Ok(filter) => filter,
        Err(e) => return reply(StatusCode::BAD_REQUEST, TEXT, format!("{e}\n")),
    };
    let used_only = asked.flag("usedonly");
    let wanted = |name: &str| filter.as_ref().is_none_or(|f| f.is_match(name));
    let chosen =
        traffic.values.into_iter().filter(|(name, value)| wanted(name) && !(used_only && *value == 0));
    if asked.parameter("format") == Some("json") {
        let stats: Vec<_> = chosen.map(|(name, value)| json!({ "name": name, "value": value })).collect();
        return json_reply(&json!({ "stats": stats }));
    }
    text(chosen.map(|(name, value)| format!("{name}: {value}\n")).collect::<String>())
}

fn server_info(admin: &Admin) -> Answer {
    let config = &admin.config;
    let node = wire::json::message_to_json(&config.node).unwrap_or_default();
    wire::forget_descriptors();
    let path = config.bootstrap_path.as_ref().map(|p| p.display().to_string()).unwrap_or_default();
    let uptime = format!("{}s", admin.uptime().as_secs());
    json_reply(&json!({
        "version": format!("istio-proxy/{VERSION}"),
        "state": admin.state.borrow().name(),
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "hot_restart_version": "disabled",
        "command_line_options": {
            "concurrency": admin.workers,
            "config_path": path,
            "drain_time": format!("{}s", config.drain.as_secs_f64()),
        },
        "node": node,
    }))
}
