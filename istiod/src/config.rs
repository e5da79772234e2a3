//! Every setting of a member, its default and its unit. Read once; all mistakes are told together, with their places.
//!
//! ```yaml
//! dataDir: /var/lib/istiod        # required
//! memberId: 1                     # of the founder; who joins is given a number. Never used again for another disk
//! name: mesh-a                    # for people
//! trustDomain: cluster.local
//! xds: {address: 0.0.0.0:15012, advertise: istiod.example.com:15012}
//! peers: {address: 0.0.0.0:15019, advertise: mesh-a.example.com:15019}
//! admin: {address: 127.0.0.1:15080, tls: true, names: [mesh.example.com], callsPerSecond: 1000, callBurst: 2000,
//!         guessesPerSecond: 5, guessBurst: 50}
//! metrics: {address: 0.0.0.0:15014}
//! ca: {directory: /etc/istio/cacerts, leafLifetime: 24h, maxLeafLifetime: 2160h, dormancy: 7d}
//! push: {debounceQuiet: 10ms, debounceLongest: 1s, workers: 2}
//! raft: {electionTimeout: 800ms, heartbeat: 200ms, snapshotEntries: 50000, snapshotBytes: 67108864, answerWithin: 5s,
//!        slowSync: 1s, slowSyncFor: 10s, leastFreeBytes: 67108864}
//! workloads: {lease: 30s, removeAfter: 10m, massLossShare: 20, massLossWindow: 60s, massLossLeast: 3, massLossHold: 24h}
//! sources: {files: [/etc/istio/mesh]}
//! log: {level: info, format: text}
//! ```

pub mod consul;
mod reader;
mod reference;
mod silence;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ca::authority::Lifetimes;
use ca::dormancy::{DEFAULT_DORMANCY, LONGEST_DORMANCY};
use ca::identity::TrustDomain;
use registry::lease::Terms;
use xds::debounce::Limits;

use self::reader::{Reader, address, answer, host_port, name, span, whole};
pub use self::reference::{SETTINGS, Setting};
use crate::api::limits::{Rate, Rates};
use crate::{authority, push, raft};

/// The settings of one member.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Folder of the log, the state and this member's keys.
    pub data_dir: PathBuf,
    /// This member's number in the Raft group, from 1. Of the founder; one that joins is given its number.
    pub member_id: u64,
    /// What people call it; its advertised peer address when `None`.
    pub name: Option<String>,
    /// Where other members reach this one.
    pub peer: SocketAddr,
    /// How they reach that, `HOST:PORT`; without it this member stands alone and the port is not opened.
    pub peer_advertise: Option<String>,
    /// With what a new machine joins a cluster; from the command line.
    pub join: Option<crate::cluster::ticket::Ticket>,
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
    /// Names and addresses by which operators call it, besides those of [`advertise`](Self::advertise).
    pub admin_names: Vec<String>,
    /// How often operators may call it.
    pub rates: Rates,
    /// The operator API asks nobody who they are; only in `istiod dev`.
    pub open_admin: bool,
    /// Where `/metrics` is served.
    pub metrics: SocketAddr,
    /// Folder with a plugged-in authority (`ca-cert.pem`, `ca-key.pem`, `cert-chain.pem`, `root-cert.pem`).
    pub ca_directory: Option<PathBuf>,
    /// Lifetimes of leaves.
    pub lifetimes: Lifetimes,
    /// How long after its certificate has ended a machine may come back with it; zero: not at all.
    pub dormancy: Duration,
    /// How changes are merged before a push.
    pub debounce: Limits,
    /// Translations at the same time; 0: one per core.
    pub push_workers: usize,
    /// How the log of changes behaves.
    pub consensus: Consensus,
    /// What becomes of workloads whose agents are silent.
    pub silence: Terms,
    /// Folders of Istio's objects that are watched.
    pub folders: Vec<PathBuf>,
    /// A Consul cluster whose services are followed.
    pub consul: Option<consul::Consul>,
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter of `tracing`.
    pub log_level: String,
    /// Logs are JSON.
    pub log_json: bool,
}

/// How the log of changes behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consensus {
    /// A follower that hears nothing for this long, or up to twice as long, asks for votes.
    pub election_timeout: Duration,
    /// A leader makes itself heard this often.
    pub heartbeat: Duration,
    /// A snapshot is taken after so many entries,
    pub snapshot_entries: u64,
    /// or after so many bytes of entries.
    pub snapshot_bytes: u64,
    /// A request without an answer in this time is told so.
    pub answer_within: Duration,
    /// A disk is slow whose every sync takes at least this long
    pub slow_sync: Duration,
    /// for this long: a leader then hands leadership over.
    pub slow_sync_for: Duration,
    /// With less than this free on its disk a leader takes no writes.
    pub least_free_bytes: u64,
}

impl Default for Consensus {
    fn default() -> Self {
        Self {
            election_timeout: Duration::from_millis(800),
            heartbeat: Duration::from_millis(200),
            snapshot_entries: 50_000,
            snapshot_bytes: 64 << 20,
            answer_within: Duration::from_secs(5),
            slow_sync: Duration::from_secs(1),
            slow_sync_for: Duration::from_secs(10),
            least_free_bytes: 64 << 20,
        }
    }
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
    /// How long after its certificate has ended a machine may come back with it.
    pub dormancy: Duration,
    /// How long an agent may be silent.
    pub lease: Duration,
    /// File with the settings of sources.
    pub sources: Option<PathBuf>,
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
                format!(
                    "{flag}: {address} is not loopback; `istiod dev` has an open admin API, use `istiod run`"
                )
            };
            return Err(open.iter().map(told).collect());
        }
        let mut config = Self::defaults(dev.data_dir);
        config.admin = dev.admin;
        config.xds = dev.xds;
        config.metrics = dev.metrics;
        config.open_admin = true;
        config.admin_tls = false;
        config.lifetimes.default = dev.leaf_lifetime;
        if dev.leaf_lifetime.is_zero() || dev.leaf_lifetime > config.lifetimes.max {
            return Err(vec!["--leaf-lifetime: from 1 s to 90 days".to_owned()]);
        }
        if dev.dormancy > LONGEST_DORMANCY {
            return Err(vec!["--dormancy: at most 30 days".to_owned()]);
        }
        config.dormancy = dev.dormancy;
        if dev.lease.is_zero() {
            return Err(vec!["--lease: at least 1 s".to_owned()]);
        }
        config.silence.lease = dev.lease;
        if let Some(file) = &dev.sources {
            config.take_sources(file)?;
        }
        Ok(config)
    }

    /// Reads the settings of `istiod run` from a YAML file.
    ///
    /// # Errors
    ///
    /// Every mistake in it.
    pub fn read(file: &Path) -> Result<Self, Vec<String>> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).map_err(|e| vec![format!("cannot read {name}: {e}")])?;
        Self::parse(&name, &text)
    }

    /// Reads the settings of `istiod run` from the text of a file.
    ///
    /// # Errors
    ///
    /// Every mistake in it, each with its place and field.
    pub fn parse(file: &str, text: &str) -> Result<Self, Vec<String>> {
        let mut reader = Reader::new(text);
        let config = taken(&mut reader);
        check(&mut reader, &config);
        let mistakes = reader.mistakes(file);
        if mistakes.is_empty() { Ok(config) } else { Err(mistakes) }
    }

    /// Takes the settings of sources from a file, which may have no others.
    fn take_sources(&mut self, file: &Path) -> Result<(), Vec<String>> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).map_err(|e| vec![format!("cannot read {name}: {e}")])?;
        let mut reader = Reader::new(&text);
        for setting in SETTINGS.iter().filter(|setting| !setting.name.starts_with("sources.")) {
            if reader.has(setting.name) {
                reader.wrong(setting.name, "only `sources` is possible here".to_owned());
            }
        }
        self.folders = reader.take_list("sources.files", |text| Ok(text.into()));
        self.consul = consul::taken(&mut reader);
        let mistakes = reader.mistakes(&name);
        if mistakes.is_empty() { Ok(()) } else { Err(mistakes) }
    }

    fn defaults(data_dir: PathBuf) -> Self {
        let address = |ip: [u8; 4], port| SocketAddr::from((ip, port));
        Self {
            data_dir,
            member_id: 1,
            name: None,
            peer: address([0, 0, 0, 0], 15019),
            peer_advertise: None,
            join: None,
            trust_domain: TrustDomain::default(),
            xds: address([0, 0, 0, 0], 15012),
            advertise: None,
            admin: address([127, 0, 0, 1], 15080),
            admin_tls: true,
            admin_names: Vec::new(),
            rates: Rates::default(),
            open_admin: false,
            metrics: address([0, 0, 0, 0], 15014),
            ca_directory: None,
            lifetimes: Lifetimes::default(),
            dormancy: DEFAULT_DORMANCY,
            debounce: Limits::default(),
            push_workers: 0,
            consensus: Consensus::default(),
            silence: silence::DEFAULT,
            folders: Vec::new(),
            consul: None,
            log_level: "info".to_owned(),
            log_json: false,
        }
    }

    /// What the control plane's certificate is for, besides its identity: where agents and operators call it.
    pub(crate) fn names(&self) -> Vec<String> {
        let advertised = self.advertise.as_deref().and_then(|text| text.rsplit_once(':'));
        let host = advertised.map(|(host, _)| host.trim_matches(['[', ']']).to_owned());
        let bound = [self.xds.ip(), self.admin.ip()].into_iter().filter(|ip| !ip.is_unspecified());
        let mut names: Vec<String> = self.admin_names.iter().cloned().chain(host).collect();
        names.extend(bound.map(|ip| ip.to_string()));
        names.sort_unstable();
        names.dedup();
        names
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
        let Consensus {
            election_timeout,
            heartbeat,
            snapshot_entries,
            snapshot_bytes,
            answer_within,
            slow_sync,
            slow_sync_for,
            least_free_bytes,
        } = self.consensus;
        let mut settings = raft::node::Settings::new(self.member_id, seed);
        settings.tick = heartbeat / u32::try_from(settings.heartbeat_ticks).unwrap_or(1);
        let ticks = election_timeout.as_millis() / settings.tick.as_millis().max(1);
        settings.election_ticks =
            usize::try_from(ticks).unwrap_or(usize::MAX).max(settings.heartbeat_ticks + 1);
        raft::node::Settings {
            snapshot_entries,
            snapshot_bytes,
            answer_within,
            slow_sync,
            slow_sync_for,
            least_free_bytes,
            ..settings
        }
    }

    pub(crate) fn push(&self) -> push::Settings {
        let defaults = push::Settings::default();
        let workers = if self.push_workers == 0 { defaults.workers } else { self.push_workers };
        push::Settings { debounce: self.debounce, workers }
    }
}

/// What the file says, with defaults for the rest.
fn taken(reader: &mut Reader) -> Config {
    let base = Config::defaults(PathBuf::new());
    let second = Duration::from_secs(1);
    if !reader.has("dataDir") {
        reader.wrong("dataDir", "is required, for example /var/lib/istiod".to_owned());
    }
    Config {
        data_dir: reader.take("dataDir", base.data_dir, |text| Ok(text.into())),
        member_id: reader.take("memberId", base.member_id, |text| whole(text, 1)),
        name: reader.take("name", base.name, |text| name(text).map(Some)),
        peer: reader.take("peers.address", base.peer, address),
        peer_advertise: reader.take("peers.advertise", base.peer_advertise, host_port),
        join: base.join,
        trust_domain: reader.take("trustDomain", base.trust_domain, |text| {
            TrustDomain::parse(text)
                .map_err(|error| format!("must be a trust domain such as example.org: {error}"))
        }),
        xds: reader.take("xds.address", base.xds, address),
        advertise: reader.take("xds.advertise", base.advertise, host_port),
        admin: reader.take("admin.address", base.admin, address),
        admin_tls: reader.take("admin.tls", base.admin_tls, answer),
        admin_names: reader.take_list("admin.names", name),
        rates: rates(reader, base.rates),
        open_admin: base.open_admin,
        metrics: reader.take("metrics.address", base.metrics, address),
        ca_directory: reader.take("ca.directory", base.ca_directory, |text| Ok(Some(text.into()))),
        lifetimes: Lifetimes {
            default: reader.take("ca.leafLifetime", base.lifetimes.default, |text| span(text, second)),
            max: reader.take("ca.maxLeafLifetime", base.lifetimes.max, |text| span(text, second)),
        },
        dormancy: reader.take("ca.dormancy", base.dormancy, |text| span(text, Duration::ZERO)),
        debounce: Limits {
            quiet: reader.take("push.debounceQuiet", base.debounce.quiet, |text| span(text, Duration::ZERO)),
            longest: reader
                .take("push.debounceLongest", base.debounce.longest, |text| span(text, Duration::ZERO)),
        },
        push_workers: reader.take("push.workers", base.push_workers, |text| {
            usize::try_from(whole(text, 0)?).map_err(|error| error.to_string())
        }),
        consensus: consensus(reader, base.consensus),
        silence: silence::taken(reader, base.silence),
        folders: reader.take_list("sources.files", |text| Ok(text.into())),
        consul: consul::taken(reader),
        log_level: reader.take("log.level", base.log_level, level),
        log_json: reader.take("log.format", base.log_json, |text| match text {
            "text" => Ok(false),
            "json" => Ok(true),
            other => Err(format!("must be text or json, this is {other:?}")),
        }),
    }
}

fn consensus(reader: &mut Reader, base: Consensus) -> Consensus {
    let least = Duration::from_millis(10);
    Consensus {
        election_timeout: reader
            .take("raft.electionTimeout", base.election_timeout, |text| span(text, least)),
        heartbeat: reader.take("raft.heartbeat", base.heartbeat, |text| span(text, least)),
        snapshot_entries: reader.take("raft.snapshotEntries", base.snapshot_entries, |text| whole(text, 1)),
        snapshot_bytes: reader.take("raft.snapshotBytes", base.snapshot_bytes, |text| whole(text, 1 << 20)),
        answer_within: reader.take("raft.answerWithin", base.answer_within, |text| span(text, least)),
        slow_sync: reader.take("raft.slowSync", base.slow_sync, |text| span(text, least)),
        slow_sync_for: reader.take("raft.slowSyncFor", base.slow_sync_for, |text| span(text, least)),
        least_free_bytes: reader.take("raft.leastFreeBytes", base.least_free_bytes, |text| whole(text, 0)),
    }
}

fn rates(reader: &mut Reader, base: Rates) -> Rates {
    let mut rate = |[per_second, burst]: [&str; 2], base: Rate| Rate {
        per_second: reader.take(per_second, base.per_second, count),
        burst: reader.take(burst, base.burst, count),
    };
    Rates {
        calls: rate(["admin.callsPerSecond", "admin.callBurst"], base.calls),
        guesses: rate(["admin.guessesPerSecond", "admin.guessBurst"], base.guesses),
    }
}

/// A whole number from 1 to 4 thousand million.
fn count(text: &str) -> Result<u32, String> {
    u32::try_from(whole(text, 1)?).map_err(|_| format!("must be at most {}", u32::MAX))
}

fn level(text: &str) -> Result<String, String> {
    let parsed = tracing_subscriber::EnvFilter::builder().parse(text);
    parsed.map(|_| text.to_owned()).map_err(|error| {
        format!("must be a level such as info, or levels by module such as info,xds=debug: {error}")
    })
}

/// What no single setting can say.
fn check(reader: &mut Reader, config: &Config) {
    let Config { lifetimes, debounce, consensus, .. } = config;
    if lifetimes.default > lifetimes.max {
        let (leaf, max) = (Span(lifetimes.default), Span(lifetimes.max));
        reader.wrong(
            "ca.leafLifetime",
            format!("must not be longer than ca.maxLeafLifetime: {leaf} is more than {max}"),
        );
    }
    if config.dormancy > LONGEST_DORMANCY {
        let (dormancy, longest) = (Span(config.dormancy), Span(LONGEST_DORMANCY));
        reader.wrong("ca.dormancy", format!("must be at most {longest}, this is {dormancy}"));
    }
    if debounce.quiet > debounce.longest {
        let (quiet, longest) = (Span(debounce.quiet), Span(debounce.longest));
        let message = format!("must not be longer than push.debounceLongest: {quiet} is more than {longest}");
        reader.wrong("push.debounceQuiet", message);
    }
    if consensus.heartbeat * 3 > consensus.election_timeout {
        let (beat, timeout) = (Span(consensus.heartbeat), Span(consensus.election_timeout));
        let message =
            format!("must be at most a third of raft.electionTimeout: {beat} is too long for {timeout}");
        reader.wrong("raft.heartbeat", message);
    }
    silence::check(reader, &config.silence);
    if config.xds.ip().is_unspecified() && !reader.has("xds.advertise") {
        let message = format!(
            "is required with xds.address {}: join tokens tell agents where to call, for example istiod.example.com:15012",
            config.xds
        );
        reader.wrong("xds.advertise", message);
    }
    if !config.admin_tls && !config.admin.ip().is_loopback() {
        reader.wrong("admin.tls", format!("false is only possible on loopback, not on {}", config.admin));
    }
    let addresses = [
        ("peers.address", config.peer),
        ("xds.address", config.xds),
        ("admin.address", config.admin),
        ("metrics.address", config.metrics),
    ];
    for (position, (name, address)) in addresses.iter().enumerate() {
        let before = addresses.iter().take(position);
        if let Some((other, _)) = before.clone().find(|(_, used)| used == address && address.port() != 0) {
            reader.wrong(name, format!("must differ from {other}, both are {address}"));
        }
    }
}

/// The settings in force, as a file that gives them. There are no secrets among them.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = |path: &Path| serde_json::Value::from(path.display().to_string());
        writeln!(f, "dataDir: {}\nmemberId: {}", path(&self.data_dir), self.member_id)?;
        if let Some(name) = &self.name {
            writeln!(f, "name: {}", serde_json::Value::from(name.as_str()))?;
        }
        writeln!(f, "peers:\n  address: \"{}\"", self.peer)?;
        if let Some(advertise) = &self.peer_advertise {
            writeln!(f, "  advertise: \"{advertise}\"")?;
        }
        writeln!(f, "trustDomain: {}\nxds:\n  address: \"{}\"", self.trust_domain.as_str(), self.xds)?;
        if let Some(advertise) = &self.advertise {
            writeln!(f, "  advertise: \"{advertise}\"")?;
        }
        writeln!(f, "admin:\n  address: \"{}\"\n  tls: {}", self.admin, self.admin_tls)?;
        if !self.admin_names.is_empty() {
            writeln!(f, "  names: {}", serde_json::Value::from(self.admin_names.clone()))?;
        }
        let Rates { calls, guesses } = self.rates;
        writeln!(f, "  callsPerSecond: {}\n  callBurst: {}", calls.per_second, calls.burst)?;
        writeln!(f, "  guessesPerSecond: {}\n  guessBurst: {}", guesses.per_second, guesses.burst)?;
        writeln!(f, "metrics:\n  address: \"{}\"\nca:", self.metrics)?;
        if let Some(dir) = &self.ca_directory {
            writeln!(f, "  directory: {}", path(dir))?;
        }
        let (leaf, max) = (Span(self.lifetimes.default), Span(self.lifetimes.max));
        let dormancy = Span(self.dormancy);
        writeln!(f, "  leafLifetime: {leaf}\n  maxLeafLifetime: {max}\n  dormancy: {dormancy}\npush:")?;
        let (quiet, longest) = (Span(self.debounce.quiet), Span(self.debounce.longest));
        writeln!(
            f,
            "  debounceQuiet: {quiet}\n  debounceLongest: {longest}\n  workers: {}",
            self.push_workers
        )?;
        let raft = &self.consensus;
        let (election, beat) = (Span(raft.election_timeout), Span(raft.heartbeat));
        writeln!(f, "raft:\n  electionTimeout: {election}\n  heartbeat: {beat}")?;
        let (entries, bytes) = (raft.snapshot_entries, raft.snapshot_bytes);
        writeln!(f, "  snapshotEntries: {entries}\n  snapshotBytes: {bytes}")?;
        writeln!(f, "  answerWithin: {}", Span(raft.answer_within))?;
        writeln!(f, "  slowSync: {}\n  slowSyncFor: {}", Span(raft.slow_sync), Span(raft.slow_sync_for))?;
        writeln!(f, "  leastFreeBytes: {}", raft.least_free_bytes)?;
        silence::write(f, &self.silence)?;
        if !self.folders.is_empty() || self.consul.is_some() {
            let folders: serde_json::Value = self.folders.iter().map(|folder| path(folder)).collect();
            writeln!(f, "sources:\n  files: {folders}")?;
        }
        if let Some(consul) = &self.consul {
            write!(f, "{consul}")?;
        }
        let level = serde_json::Value::from(self.log_level.as_str());
        writeln!(f, "log:\n  level: {level}\n  format: {}", if self.log_json { "json" } else { "text" })
    }
}

/// A duration as the file has it.
struct Span(Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")];
        match units.into_iter().find(|(unit, _)| millis >= *unit && millis.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", millis / unit),
            None => write!(f, "{millis}ms"),
        }
    }
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
