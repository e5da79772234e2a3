//! Every setting of a member, its default and its unit. Read once; all mistakes are told together.
//!
//! ```yaml
//! dataDir: /var/lib/istiod        # required
//! memberId: 1                     # from 1; never used again for another disk
//! trustDomain: cluster.local
//! xds: {address: 0.0.0.0:15012, advertise: istiod.example.com:15012}
//! admin: {address: 127.0.0.1:15080, tls: true}
//! metrics: {address: 0.0.0.0:15014}
//! ca: {directory: /etc/istio/cacerts, leafLifetime: 24h, maxLeafLifetime: 2160h}
//! push: {debounceQuiet: 10ms, debounceLongest: 1s, workers: 2}
//! log: {level: info, format: text}
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ca::authority::Lifetimes;
use ca::identity::TrustDomain;
use registry::config::decode::parse_duration;
use serde_json::{Map, Value};
use xds::debounce::Limits;

use crate::{authority, push, raft};

/// The settings of one member.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder of the log, the state and this member's keys.
    pub data_dir: PathBuf,
    /// This member's number in the Raft group, from 1.
    pub member_id: u64,
    /// Trust domain of every identity.
    pub trust_domain: TrustDomain,
    /// Where xDS and certificates are served.
    pub xds: SocketAddr,
    /// How agents reach that, `HOST:PORT`; the address itself when `None`.
    pub advertise: Option<String>,
    /// Where the operator API is served.
    pub admin: SocketAddr,
    /// The operator API is served over TLS.
    pub admin_tls: bool,
    /// The operator API asks nobody who they are; only in `istiod dev`.
    pub open_admin: bool,
    /// Where `/metrics` is served.
    pub metrics: SocketAddr,
    /// Folder with a plugged-in authority (`ca-cert.pem`, `ca-key.pem`, `cert-chain.pem`, `root-cert.pem`).
    pub ca_directory: Option<PathBuf>,
    /// Lifetimes of leaves.
    pub lifetimes: Lifetimes,
    /// How changes are merged before a push.
    pub debounce: Limits,
    /// Translations at the same time; 0: one per core.
    pub push_workers: usize,
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter of `tracing`.
    pub log_level: String,
    /// Logs are JSON.
    pub log_json: bool,
}

/// What `istiod dev` is told.
#[derive(Debug, Clone)]
pub struct Dev {
    /// Folder of the log, the state and this member's keys.
    pub data_dir: PathBuf,
    /// Where the operator API is served.
    pub admin: SocketAddr,
    /// Where xDS and certificates are served.
    pub xds: SocketAddr,
    /// Where `/metrics` is served.
    pub metrics: SocketAddr,
    /// Lifetime of leaves.
    pub leaf_lifetime: Duration,
}

impl Config {
    /// The settings of `istiod dev`.
    ///
    /// # Errors
    ///
    /// Every address that is not loopback: the operator API of such a member is open.
    pub fn dev(dev: Dev) -> Result<Self, Vec<String>> {
        let ports = [("--admin", dev.admin), ("--xds", dev.xds), ("--metrics", dev.metrics)];
        let open: Vec<_> = ports.iter().filter(|(_, address)| !address.ip().is_loopback()).collect();
        if !open.is_empty() {
            let told = |(flag, address): &&(&str, SocketAddr)| {
                format!("{flag}: {address} is not loopback; `istiod dev` has an open admin API, use `istiod run`")
            };
            return Err(open.iter().map(told).collect());
        }
        let mut reader = Reader::default();
        let mut config = reader.config(&Value::Object(Map::new()), dev.data_dir);
        config.admin = dev.admin;
        config.xds = dev.xds;
        config.metrics = dev.metrics;
        config.open_admin = true;
        config.admin_tls = false;
        config.lifetimes.default = dev.leaf_lifetime;
        if dev.leaf_lifetime.is_zero() || dev.leaf_lifetime > config.lifetimes.max {
            return Err(vec!["--leaf-lifetime: from 1 s to 90 days".to_owned()]);
        }
        Ok(config)
    }

    /// Reads the settings of `istiod run` from a YAML file.
    ///
    /// # Errors
    ///
    /// Every mistake in it.
    pub fn read(file: &Path) -> Result<Self, Vec<String>> {
        let text = std::fs::read_to_string(file).map_err(|e| vec![format!("cannot read {}: {e}", file.display())])?;
        Self::parse(&text).map_err(|mistakes| mistakes.into_iter().map(|m| format!("{}: {m}", file.display())).collect())
    }

    /// Reads the settings of `istiod run` from YAML.
    ///
    /// # Errors
    ///
    /// Every mistake in it, each with its field.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let value: Value = serde_saphyr::from_str(text).map_err(|e| vec![format!("not YAML: {e}")])?;
        let mut reader = Reader::default();
        let data_dir = reader.text(&value, "dataDir").map(PathBuf::from);
        if data_dir.is_none() {
            reader.mistakes.push("dataDir: is required, for example `/var/lib/istiod`".to_owned());
        }
        let config = reader.config(&value, data_dir.unwrap_or_default());
        if !config.admin_tls && !config.admin.ip().is_loopback() {
            reader.mistakes.push(format!("admin.tls: false is only possible on loopback, not on {}", config.admin));
        }
        if reader.mistakes.is_empty() { Ok(config) } else { Err(reader.mistakes) }
    }

    pub(crate) fn authority(&self) -> authority::Settings<'_> {
        authority::Settings {
            folder: &self.data_dir,
            plugged_in: self.ca_directory.as_deref(),
            domain: self.trust_domain.clone(),
            lifetimes: self.lifetimes,
            member: self.member_id.to_string(),
        }
    }

    /// `seed` makes this member's elections differ from those of others.
    pub(crate) fn raft(&self, seed: u64) -> raft::node::Settings {
        raft::node::Settings::new(self.member_id, seed)
    }

    pub(crate) fn push(&self) -> push::Settings {
        let defaults = push::Settings::default();
        let workers = if self.push_workers == 0 { defaults.workers } else { self.push_workers };
        push::Settings { debounce: self.debounce, workers }
    }
}

/// Reads values, and keeps every mistake.
#[derive(Default)]
struct Reader {
    mistakes: Vec<String>,
}

/// Every field, by the group it is in.
const KNOWN: [(&str, &[&str]); 7] = [
    ("", &["dataDir", "memberId", "trustDomain", "xds", "admin", "metrics", "ca", "push", "log"]),
    ("xds", &["address", "advertise"]),
    ("admin", &["address", "tls"]),
    ("metrics", &["address"]),
    ("ca", &["directory", "leafLifetime", "maxLeafLifetime"]),
    ("push", &["debounceQuiet", "debounceLongest", "workers"]),
    ("log", &["level", "format"]),
];

impl Reader {
    fn config(&mut self, value: &Value, data_dir: PathBuf) -> Config {
        self.refuse_unknown(value);
        let lifetimes = Lifetimes::default();
        let limits = Limits::default();
        let max = self.duration(value, "ca.maxLeafLifetime", lifetimes.max);
        let default = self.duration(value, "ca.leafLifetime", lifetimes.default);
        if default > max {
            self.mistakes.push("ca.leafLifetime: is longer than ca.maxLeafLifetime".to_owned());
        }
        let advertise = self.text(value, "xds.advertise");
        if let Some(address) = advertise.as_deref().filter(|a| a.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err())) {
            self.mistakes.push(format!("xds.advertise: `{address}` is not HOST:PORT"));
        }
        let member_id = self.number(value, "memberId", 1);
        if member_id == 0 {
            self.mistakes.push("memberId: from 1".to_owned());
        }
        let format = self.text(value, "log.format").unwrap_or_else(|| "text".to_owned());
        if !["text", "json"].contains(&format.as_str()) {
            self.mistakes.push(format!("log.format: `{format}` is neither text nor json"));
        }
        let domain = self.text(value, "trustDomain").unwrap_or_else(|| "cluster.local".to_owned());
        Config {
            data_dir,
            member_id,
            trust_domain: self.parsed("trustDomain", &domain, |text| TrustDomain::parse(text).map_err(|e| e.to_string()))
                .unwrap_or_else(fallback_domain),
            xds: self.address(value, "xds.address", ([0, 0, 0, 0], 15012)),
            advertise,
            admin: self.address(value, "admin.address", ([127, 0, 0, 1], 15080)),
            admin_tls: self.boolean(value, "admin.tls", true),
            open_admin: false,
            metrics: self.address(value, "metrics.address", ([0, 0, 0, 0], 15014)),
            ca_directory: self.text(value, "ca.directory").map(PathBuf::from),
            lifetimes: Lifetimes { default, max },
            debounce: Limits {
                quiet: self.duration(value, "push.debounceQuiet", limits.quiet),
                longest: self.duration(value, "push.debounceLongest", limits.longest),
            },
            push_workers: usize::try_from(self.number(value, "push.workers", 0)).unwrap_or_default(),
            log_level: self.text(value, "log.level").unwrap_or_else(|| "info".to_owned()),
            log_json: format == "json",
        }
    }

    fn refuse_unknown(&mut self, value: &Value) {
        for (group, known) in KNOWN {
            let place = if group.is_empty() { Some(value) } else { value.get(group) };
            let prefix = if group.is_empty() { String::new() } else { format!("{group}.") };
            match place {
                None | Some(Value::Null) => {}
                Some(Value::Object(fields)) => {
                    let unknown = fields.keys().filter(|key| !known.contains(&key.as_str()));
                    self.mistakes.extend(unknown.map(|key| format!("{prefix}{key}: unknown; known are {}", known.join(", "))));
                }
                Some(_) => self.mistakes.push(format!("{group}: must have fields: {}", known.join(", "))),
            }
        }
    }

    fn value<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
        let found = value.pointer(&format!("/{}", path.replace('.', "/")))?;
        (!found.is_null()).then_some(found)
    }

    fn text(&mut self, value: &Value, path: &str) -> Option<String> {
        match Self::value(value, path)? {
            Value::String(text) => Some(text.clone()),
            other => {
                self.mistakes.push(format!("{path}: must be text, not {other}"));
                None
            }
        }
    }

    fn parsed<T>(&mut self, path: &str, text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        parse(text).map_err(|e| self.mistakes.push(format!("{path}: `{text}`: {e}"))).ok()
    }

    fn address(&mut self, value: &Value, path: &str, default: ([u8; 4], u16)) -> SocketAddr {
        let text = self.text(value, path);
        let parse = |text: &str| SocketAddr::from_str(text).map_err(|_| "is not IP:PORT".to_owned());
        text.and_then(|text| self.parsed(path, &text, parse)).unwrap_or_else(|| default.into())
    }

    fn duration(&mut self, value: &Value, path: &str, default: Duration) -> Duration {
        let text = self.text(value, path);
        let parse = |text: &str| parse_duration(text).map_err(str::to_owned);
        text.and_then(|text| self.parsed(path, &text, parse)).unwrap_or(default)
    }

    fn number(&mut self, value: &Value, path: &str, default: u64) -> u64 {
        match Self::value(value, path).map(Value::as_u64) {
            None => default,
            Some(Some(number)) => number,
            Some(None) => {
                self.mistakes.push(format!("{path}: must be a whole number"));
                default
            }
        }
    }

    fn boolean(&mut self, value: &Value, path: &str, default: bool) -> bool {
        match Self::value(value, path).map(Value::as_bool) {
            None => default,
            Some(Some(answer)) => answer,
            Some(None) => {
                self.mistakes.push(format!("{path}: must be true or false"));
                default
            }
        }
    }
}

/// Stands in for a trust domain with a mistake that was told already.
#[expect(clippy::expect_used, reason = "`cluster.local` is a trust domain")]
fn fallback_domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").expect("a trust domain")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_settings_are_read() {
        let documented: String = include_str!("config.rs")
            .lines()
            .skip_while(|l| !l.starts_with("//! ```yaml"))
            .skip(1)
            .take_while(|l| !l.starts_with("//! ```"))
            .map(|l| format!("{}\n", l.trim_start_matches("//! ")))
            .collect();
        let config = Config::parse(&documented).unwrap();
        assert_eq!(config.advertise.as_deref(), Some("istiod.example.com:15012"));
        assert_eq!(config.lifetimes.max, Duration::from_secs(2160 * 3600));
        assert_eq!(config.push_workers, 2);
    }

    #[test]
    fn all_mistakes_are_told_together() {
        let text = "memberId: x\nxds: {address: here, port: 1}\nlog: {format: xml}\nadmin: {address: '10.0.0.1:1', tls: false}\nca: {leafLifetime: 5}";
        let mistakes = Config::parse(text).unwrap_err();
        for part in ["dataDir: is required", "memberId:", "xds.address:", "xds.port: unknown", "log.format:", "admin.tls:", "ca.leafLifetime:"] {
            assert!(mistakes.iter().any(|m| m.starts_with(part)), "{part}: {mistakes:?}");
        }
    }

    #[test]
    fn a_member_with_an_open_admin_api_stays_on_loopback() {
        let dev = |admin: &str| Dev {
            data_dir: "/x".into(),
            admin: admin.parse().unwrap(),
            xds: "127.0.0.1:0".parse().unwrap(),
            metrics: "127.0.0.1:0".parse().unwrap(),
            leaf_lifetime: Duration::from_secs(20),
        };
        assert!(Config::dev(dev("127.0.0.1:0")).is_ok());
        assert!(Config::dev(dev("0.0.0.0:0")).is_err());
    }
}
