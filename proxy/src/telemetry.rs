//! Logs, and the names and units of every metric.

use std::fmt::Write as _;
use std::future::Future;
use std::io::IsTerminal as _;
use std::pin::Pin;
use std::sync::Arc;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::xds::decode::Kind;
use crate::xds::transport::Status;

/// Every metric of the process itself: name, type, meaning. Metrics of traffic are listed where they are counted
/// (`metrics/standard.rs`).
pub const METRICS: &[(&str, &str, &str)] = &[
    ("envoy_server_live", "gauge", "1 while the proxy takes traffic, 0 while it starts or drains."),
    ("envoy_server_state", "gauge", "0 live, 1 draining, 2 before initialisation, 3 initialising."),
    ("envoy_server_uptime", "gauge", "Seconds since the process started."),
    ("envoy_server_concurrency", "gauge", "Data workers."),
    ("envoy_server_memory_physical_size", "gauge", "Resident memory in bytes."),
    ("envoy_control_plane_connected_state", "gauge", "1 while a stream to the control plane is open."),
    ("envoy_cluster_manager_active_clusters", "gauge", "Clusters that can be sent to."),
    ("envoy_cluster_manager_warming_clusters", "gauge", "Clusters that wait for endpoints."),
    ("envoy_listener_manager_total_listeners_active", "gauge", "Listeners that accept."),
    ("envoy_listener_manager_total_listeners_warming", "gauge", "Listeners that wait for routes."),
    ("xds_revision", "gauge", "The newest revision that a control plane of ours has sent."),
    ("xds_resources", "gauge", "Resources held, by type."),
    ("xds_rejected", "gauge", "1 while the last response of a type was refused in part, by type."),
];

/// How far the proxy has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum State {
    /// Not all that it needs is there.
    #[default]
    Initializing,
    /// It takes traffic.
    Live,
    /// It is about to end.
    Draining,
}

impl State {
    /// Envoy's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Initializing => "INITIALIZING",
            Self::Live => "LIVE",
            Self::Draining => "DRAINING",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Live => 0,
            Self::Draining => 1,
            Self::Initializing => 3,
        }
    }
}

/// What all workers counted, added up.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    /// The text form that Prometheus scrapes.
    pub prometheus: String,
    /// Counters and gauges: name with labels, value.
    pub values: Vec<(String, u64)>,
}

/// Asks all workers for what they counted.
pub type Scrape = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Traffic> + Send>> + Send + Sync>;

/// Changes the level of the log while the process runs.
#[derive(Debug, Clone)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl LogLevel {
    /// Sets the level, or a list of levels by module (`info,proxy::xds=debug`).
    ///
    /// # Errors
    ///
    /// Text that is no level.
    pub fn set(&self, directives: &str) -> Result<(), String> {
        let filter = EnvFilter::try_new(directives).map_err(|e| e.to_string())?;
        self.0.reload(filter).map_err(|e| e.to_string())
    }

    /// What is set.
    #[must_use]
    pub fn current(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// Starts the log of the process on standard error: text, or one JSON object per line.
///
/// # Errors
///
/// Text that is no level, or a log that was started before.
pub fn init(directives: &str, json: bool) -> Result<LogLevel, String> {
    let filter = EnvFilter::try_new(directives).map_err(|e| e.to_string())?;
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let started = if json {
        registry.with(fmt::layer().json().flatten_event(true).with_writer(std::io::stderr)).try_init()
    } else {
        let colours = std::io::stderr().is_terminal();
        registry.with(fmt::layer().with_writer(std::io::stderr).with_ansi(colours)).try_init()
    };
    started.map_err(|e| e.to_string())?;
    Ok(LogLevel(handle))
}

/// What the process itself measures.
#[derive(Debug, Clone, Default)]
pub struct Process {
    /// How far it has come.
    pub state: State,
    /// Seconds since it started.
    pub uptime: u64,
    /// Data workers.
    pub workers: usize,
    /// Clusters: active, warming.
    pub clusters: (usize, usize),
    /// Listeners: active, warming.
    pub listeners: (usize, usize),
    /// The stream to the control plane.
    pub xds: Status,
}

impl Process {
    /// The text form that Prometheus scrapes.
    #[must_use]
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        for (name, kind, help) in METRICS {
            line(&mut out, format_args!("# HELP {name} {help}"));
            line(&mut out, format_args!("# TYPE {name} {kind}"));
            self.values(name, &mut out);
        }
        out
    }

    fn values(&self, name: &str, out: &mut String) {
        let value: u64 = match name {
            "envoy_server_live" => u64::from(self.state == State::Live),
            "envoy_server_state" => u64::from(self.state.number()),
            "envoy_server_uptime" => self.uptime,
            "envoy_server_concurrency" => self.workers as u64,
            "envoy_server_memory_physical_size" => resident_bytes(),
            "envoy_control_plane_connected_state" => u64::from(self.xds.connected.is_some()),
            "xds_revision" => self.xds.revision.unwrap_or_default(),
            "envoy_cluster_manager_active_clusters" => self.clusters.0 as u64,
            "envoy_cluster_manager_warming_clusters" => self.clusters.1 as u64,
            "envoy_listener_manager_total_listeners_active" => self.listeners.0 as u64,
            "envoy_listener_manager_total_listeners_warming" => self.listeners.1 as u64,
            _ => {
                for kind in Kind::SUBSCRIBED {
                    let status = self.xds.types.get(&kind).cloned().unwrap_or_default();
                    let value = match name {
                        "xds_resources" => status.resources,
                        _ => usize::from(status.last_error.is_some()),
                    };
                    line(out, format_args!("{name}{{type=\"{kind}\"}} {value}"));
                }
                return;
            }
        };
        line(out, format_args!("{name} {value}"));
    }
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    if writeln!(out, "{text}").is_err() {
        out.push('\n');
    }
}

/// Resident memory in bytes; 0 where the system does not tell.
#[must_use]
pub fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages =
        pages.as_deref().and_then(|s| s.split_whitespace().nth(1)).and_then(|s| s.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_a_value() {
        let text = Process { state: State::Live, workers: 2, ..Process::default() }.prometheus();
        for (name, ..) in METRICS {
            let has = |l: &str| l.starts_with(&format!("{name} ")) || l.starts_with(&format!("{name}{{"));
            assert!(text.lines().any(has), "{name}");
        }
        assert!(text.contains("envoy_server_live 1\n"));
        assert!(text.contains("xds_resources{type=\"Cluster\"} 0\n"));
    }
}
