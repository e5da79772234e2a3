//! A state of 50,000 services with 200,000 endpoints: how large it is, how long it takes to start with it, whether
//! writers notice a snapshot, and whether a backup of it comes back byte for byte.
//!
//! `cargo bench -p istiod --bench state` prints the figures, and fails when a restart takes 10 s, a write stalls for
//! 100 ms while a snapshot is taken, or the restored state differs. `STATE_SERVICES` sets another number of services.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ca::identity::TrustDomain;
use istiod::backup::{Cost, Manifest, Opener, Sealer, Secret, header, restorable};
use istiod::raft::metrics::Metrics;
use istiod::raft::node::Settings;
use istiod::raft::part::Part as _;
use istiod::raft::restore::{Target, restore};
use istiod::raft::{Command, Place, Raft, Started, View};
use prometheus_client::registry::Registry;
use registry::model::service::{
    Endpoint, Health, Locality, Location, Protocol, Resolution, Service, ServicePort, SourceId, TlsMode,
};
use registry::state::{Batch, Command as Change};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

/// Endpoints of each service.
const ENDPOINTS: usize = 4;
/// Services in one entry of the log while the state is filled.
const TOGETHER: usize = 100;
/// Writes that are timed while a snapshot is taken, at least.
const TIMED: usize = 300;
/// A start with this state takes less.
const RESTART: Duration = Duration::from_secs(10);
/// A write takes less, also while a snapshot is taken.
const STALL: Duration = Duration::from_millis(100);

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#[expect(clippy::disallowed_methods, reason = "a benchmark takes its settings and the time from outside")]
async fn main() -> anyhow::Result<()> {
    let services = std::env::var("STATE_SERVICES").ok().map_or(Ok(50_000), |text| text.parse())?;
    let (old, new) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let empty = resident()?;

    let stop = CancellationToken::new();
    let started = start(old.path(), &stop)?;
    let began = Instant::now();
    for first in (0..services).step_by(TOGETHER) {
        let batch = filling(first..services.min(first + TOGETHER));
        started.raft.propose(&Command::Registry(batch)).await?;
    }
    let filled = began.elapsed();
    println!("services {services}, endpoints {}, filled in {filled:.1?}", services * ENDPOINTS);
    println!("memory: {} MiB more than empty", resident()?.saturating_sub(empty) >> 20);

    let stalls = write_during_snapshot(&started).await?;
    println!(
        "writes while a snapshot is taken: {}, p50 {:.2?}, p99 {:.2?}, longest {:.2?}",
        stalls.len(),
        at(&stalls, 50),
        at(&stalls, 99),
        at(&stalls, 100)
    );

    let began = Instant::now();
    let view = started.raft.view().await?;
    let bytes = view.encode();
    println!("encoded in {:.2?}: {} MiB", began.elapsed(), bytes.len() >> 20);
    let began = Instant::now();
    let file = old.path().join("backup");
    seal(&view, &bytes, &file)?;
    let size = std::fs::metadata(&file)?.len();
    println!("sealed in {:.2?}: {} MiB", began.elapsed(), size >> 20);
    let before = Before::of(&view, bytes);
    drop(view);
    end(started, stop).await?;

    let began = Instant::now();
    let stop = CancellationToken::new();
    let started = start(old.path(), &stop)?;
    started.raft.read_index().await?;
    let restart = began.elapsed();
    println!("restart to ready: {restart:.2?}");
    ensure!(started.raft.view().await?.registry.encode() == before.registry, "the restarted state differs");
    end(started, stop).await?;

    let began = Instant::now();
    open_and_restore(&file, new.path())?;
    println!("opened and restored in {:.2?}", began.elapsed());
    let began = Instant::now();
    let stop = CancellationToken::new();
    let started = start(new.path(), &stop)?;
    started.raft.read_index().await?;
    println!("first start from the snapshot, as on a new member: {:.2?}", began.elapsed());
    let after = started.raft.view().await?;
    ensure!(Before::of(&after, Vec::new()).same_parts(&before), "the restored state differs");
    println!("the restored state is byte-equal: {} bytes of the registry", before.registry.len());
    drop(after);
    end(started, stop).await?;

    ensure!(restart < RESTART, "a restart takes {restart:?}");
    ensure!(at(&stalls, 100) < STALL, "a write stalls for {:?}", at(&stalls, 100));
    Ok(())
}

/// The encoded parts that a restored cluster must have.
struct Before {
    registry: Vec<u8>,
    ca: Vec<u8>,
    others: [std::collections::BTreeMap<Vec<u8>, Vec<u8>>; 2],
    _whole: Vec<u8>,
}

impl Before {
    fn of(view: &View, whole: Vec<u8>) -> Self {
        let others = [view.access.pairs(), view.audit.pairs()];
        Self { registry: view.registry.encode(), ca: view.ca.encode(), others, _whole: whole }
    }

    fn same_parts(&self, other: &Self) -> bool {
        self.registry == other.registry && self.ca == other.ca && self.others == other.others
    }
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
fn start(dir: &Path, stop: &CancellationToken) -> anyhow::Result<Started> {
    let domain = TrustDomain::default();
    let place = Place { data_dir: dir, trust_domain: &domain };
    // The state is filled without a snapshot; one is due soon after.
    let settings = Settings { snapshot_entries: 600, snapshot_bytes: u64::MAX / 4, ..Settings::new(1, 1) };
    let metrics = Metrics::registered(&mut Registry::default());
    Ok(Raft::start(place, settings, metrics, &mut fastrand::Rng::new(), Instant::now(), stop.clone())?)
}

async fn end(started: Started, stop: CancellationToken) -> anyhow::Result<()> {
    stop.cancel();
    Ok(started.thread.join().await?)
}

fn filling(numbers: std::ops::Range<usize>) -> Batch {
    let commands = numbers.flat_map(|number| {
        let source = SourceId::Consul("dc1".to_owned());
        let host = format!("service-{number}.default.svc.cluster.local");
        let endpoints = (0..ENDPOINTS).map(|at| endpoint(number, at)).collect();
        [
            Change::PutService { service: Arc::new(service(number, &host, &source)) },
            Change::ReplaceEndpoints { host, source, endpoints },
        ]
    });
    Batch { time_ms: 1_800_000_000_000, author: "bench".to_owned(), commands: commands.collect() }
}

fn service(number: usize, host: &str, source: &SourceId) -> Service {
    let port = |name: &str, number, protocol| ServicePort {
        name: name.to_owned(),
        number,
        target_port: None,
        protocol,
    };
    Service {
        hostname: host.to_owned(),
        name: format!("service-{number}"),
        namespace: "default".to_owned(),
        ports: vec![port("http", 80, Protocol::Http), port("grpc", 90, Protocol::Grpc)],
        addresses: Vec::new(),
        vip_index: 0,
        resolution: Resolution::Static,
        location: Location::Internal,
        export_to: Vec::new(),
        subject_alt_names: Vec::new(),
        labels: [("app".to_owned(), format!("service-{number}"))].into(),
        created: 0,
        source: source.clone(),
    }
}

fn endpoint(number: usize, at: usize) -> Endpoint {
    let [_, b, c, d] = u32::try_from(number * ENDPOINTS + at).unwrap_or_default().to_be_bytes();
    Endpoint {
        address: format!("10.{b}.{c}.{d}"),
        ports: [("http".to_owned(), 8080)].into(),
        weight: 1,
        locality: Locality::parse("region/zone-1"),
        network: String::new(),
        labels: [("version".to_owned(), format!("v{at}"))].into(),
        workload: format!("service-{number}-{at}"),
        namespace: "default".to_owned(),
        cluster: "dc1".to_owned(),
        service_account: format!("service-{number}"),
        tls_mode: TlsMode::Istio,
        health: Health::Healthy,
    }
}

/// Small writes, one after the other, until a snapshot was begun and finished; how long each took, sorted.
#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
async fn write_during_snapshot(started: &Started) -> anyhow::Result<Vec<Duration>> {
    let status = started.raft.status();
    let before = status.borrow().snapshot;
    let mut took = Vec::new();
    for number in 0..100_000 {
        let host = format!("service-{}.default.svc.cluster.local", number % 100);
        let source = SourceId::Consul("dc1".to_owned());
        let endpoints = (0..=number % ENDPOINTS).map(|at| endpoint(number, at)).collect();
        let commands = vec![Change::ReplaceEndpoints { host, source, endpoints }];
        let batch = Batch { time_ms: 1_800_000_000_000, author: "bench".to_owned(), commands };
        let began = Instant::now();
        started.raft.propose(&Command::Registry(batch)).await?;
        took.push(began.elapsed());
        if took.len() >= TIMED && status.borrow().snapshot != before {
            took.sort_unstable();
            return Ok(took);
        }
    }
    anyhow::bail!("no snapshot was taken")
}

fn at(sorted: &[Duration], percent: usize) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * percent / 100).copied().unwrap_or_default()
}

fn secret() -> anyhow::Result<Secret> {
    Ok(Secret::passphrase(Zeroizing::new("correct horse battery".to_owned()))?)
}

fn seal(view: &View, bytes: &[u8], file: &Path) -> anyhow::Result<()> {
    let out = std::io::BufWriter::new(std::fs::File::create_new(file)?);
    let mut sealer = Sealer::new(out, &secret()?, Cost::default(), [7; 32])?;
    Manifest::new(view.revision.0, "cluster.local", 0, None).write(&mut sealer)?;
    sealer.write_all(bytes)?;
    let out = sealer.finish()?;
    Ok(out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?)
}

fn open_and_restore(file: &Path, data_dir: &Path) -> anyhow::Result<()> {
    let mut from = std::io::BufReader::new(std::fs::File::open(file)?);
    let header = header(&mut from)?;
    let mut opener = Opener::new(from, header, &secret()?)?;
    let manifest = Manifest::read(&mut opener)?;
    let mut bytes = Vec::new();
    opener.read_to_end(&mut bytes)?;
    let state = restorable(manifest.revision, &bytes)?;
    let trust_domain = &TrustDomain::default();
    restore(Target { data_dir, id: 1, trust_domain, force: false }, &state, &mut fastrand::Rng::new())?;
    Ok(())
}

/// Bytes of memory that this process has.
fn resident() -> anyhow::Result<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: usize = statm.split(' ').nth(1).context("no second field")?.parse()?;
    Ok(pages * 4096)
}
