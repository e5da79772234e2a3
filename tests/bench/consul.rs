//! A Consul catalog of 10,000 services with ten instances each: what it costs a control plane, and when proxies see what
//! changes in it.
//!
//! `cargo build --release --bins && cargo bench -p tests --bench consul` follows a fake Consul over TLS and HTTP/2 with a
//! real istiod and simulated proxies that want every service; `-- SERVICES PROXIES CHANGES` says other numbers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use registry::config;
use registry::snapshot::Snapshot;
use registry::source::consul::export::Settings;
use registry::source::consul::export::desired::desired;
use registry::state::{Batch, Revision, State};
use serde_json::json;
use tests::consul::catalog::Catalog;
use tests::consul::fake::Server;
use tests::consul::real::Secured;
use tests::eventually;
use tests::istiod::Istiod;
use tests::load::percentile;
use tests::proxies::{Fleet, Proxies};
use tests::registers::area;
use tokio::time::{Instant, MissedTickBehavior};

/// Services, proxies and changes, unless others are asked for.
const COUNTS: [usize; 3] = [10_000, 10, 200];
/// Instances of a service.
const INSTANCES: usize = 10;
/// Anything happens within this time.
const LONGEST: Duration = Duration::from_secs(180);
/// All questions are asked again within this time, for each waits a minute at most, and the server adds some of its own.
const ROUND: Duration = Duration::from_secs(64);
/// Changes in a second, of services in turn, and for how long.
const CHURN: (u32, Duration) = (20, Duration::from_secs(15));
/// Ticks of a processor's clock in a second, as Linux tells times.
const TICKS: f64 = 100.0;
/// How often the export is computed.
const EXPORTS: usize = 20;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let [services, proxies, changes] = counts()?;
    let folder = tempfile::Builder::new().prefix("consul-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    exported(services)?;
    let world = World::start(folder.path(), services).await?;
    world.idle().await?;
    let token = world.istiod.token(&area(0), "default").await?;
    let fleet = Fleet { members: vec![world.istiod.xds], machine: None, tokens: vec![token] };
    let (began, busy) = (Instant::now(), world.busy()?);
    let proxies = Proxies::start(fleet, proxies).await?;
    world.all_sent(&proxies).await?;
    world.told("proxies have everything", began, busy)?;
    world.follow(&proxies, changes).await?;
    world.churn(&proxies).await?;
    let seen = proxies.finish().await;
    ensure!(seen.cut.is_empty() && seen.backward.is_empty(), "{:?} {:?}", seen.cut, seen.backward);
    Ok(())
}

/// The numbers that the command line asks for.
fn counts() -> anyhow::Result<[usize; 3]> {
    let told: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    if told.is_empty() {
        return Ok(COUNTS);
    }
    let numbers: Result<Vec<usize>, _> = told.iter().map(|word| word.parse()).collect();
    let numbers = numbers.context("not a number")?;
    numbers.try_into().map_err(|_| anyhow::anyhow!("wanted: SERVICES PROXIES CHANGES"))
}

fn instance(service: usize, number: usize, passing: bool) -> serde_json::Value {
    let at = service * INSTANCES + number;
    let node = at % 2_000;
    json!({
        "Node": format!("node-{node}"), "Address": format!("10.{}.{}.1", node / 250, node % 250),
        "Service": {"ID": format!("s{service}-{number}"), "Service": format!("s{service}"), "Port": 8080,
            "Address": format!("10.{}.{}.{}", at / 62_500, at / 250 % 250, at % 250 + 1), "Tags": ["a"],
            "Meta": {"version": "v1", "protocol": "http"}},
        "Check": {"CheckID": format!("s{service}-{number}"), "Name": "c", "ServiceID": format!("s{service}-{number}"),
            "Status": if passing { "passing" } else { "critical" }},
    })
}

fn cluster(service: usize) -> String {
    format!("outbound|8080||s{service}.service.consul")
}

/// How long it takes to say what of a mesh of the same size should be in Consul.
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
fn exported(services: usize) -> anyhow::Result<()> {
    let endpoint = |at: usize| {
        format!("{{address: 10.{}.{}.{}, serviceAccount: s}}", at / 62_500, at / 250 % 250, at % 250 + 1)
    };
    let mut state = State::default();
    for (revision, part) in (1..).zip((0..services).collect::<Vec<_>>().chunks(500)) {
        let entry = |service: &usize| {
            let first = service * INSTANCES;
            let endpoints: Vec<String> = (first..first + INSTANCES).map(endpoint).collect();
            format!(
                "---\n{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: s{service}, namespace: shop}}, \
                 spec: {{hosts: [s{service}.shop.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, \
                 ports: [{{number: 80, name: http}}], endpoints: [{}]}}}}\n",
                endpoints.join(", ")
            )
        };
        let yaml: String = part.iter().map(entry).collect();
        let parsed = config::parse_in("shop", "mesh", &yaml);
        let (objects, _) = parsed.map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
        state.apply(Revision(revision), &Batch::put_objects(1_000, "t", objects));
    }
    let (snapshot, settings) = (Arc::new(Snapshot::build(&state)), Settings::new("m1", "dc1", 1));
    let mut took = Vec::new();
    for _ in 0..EXPORTS {
        let began = Instant::now();
        let (entries, unfit) = desired(&snapshot, &settings);
        took.push(began.elapsed());
        ensure!(entries.len() == services * INSTANCES && unfit.is_empty(), "{} {unfit:?}", entries.len());
    }
    println!("what should be in Consul of {services} services of the mesh: {:.1?}", percentile(&took, 0.5));
    Ok(())
}

/// A fake Consul and the istiod that follows it.
struct World {
    fake: Server,
    istiod: Istiod,
    services: usize,
}

impl World {
    /// Starts both, and waits until everything has been read.
    #[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
    async fn start(folder: &Path, services: usize) -> anyhow::Result<Self> {
        let mut catalog = Catalog::new("dc1");
        for (service, number) in (0..services).flat_map(|service| (0..INSTANCES).map(move |n| (service, n))) {
            ensure!(catalog.register(&instance(service, number, true)), "not registered");
        }
        let secured = Secured::new(folder)?;
        let fake = Server::secured(catalog, &secured).await?;
        let sources = folder.join("sources.yaml");
        let consul = json!({
            "addresses": [format!("https://{}", fake.address)], "caFile": folder.join("ca.pem"),
            "serverName": "server.dc1.consul",
        });
        std::fs::write(&sources, format!("sources: {}\n", json!({ "consul": consul })))?;
        let began = Instant::now();
        let istiod = Istiod::start(folder, &["--sources", &sources.display().to_string()]).await?;
        let world = Self { fake, istiod, services };
        eventually(LONGEST, "everything is read", || async {
            let published = world.istiod.metric("istiod_consul_published_services_total", "").await?;
            let endpoints = world.istiod.metric("istiod_consul_endpoints", "").await?;
            ensure!(published >= count(services) && endpoints >= count(services * INSTANCES), "{published}");
            Ok(())
        })
        .await?;
        println!(
            "{services} services with {INSTANCES} instances each: read {:.1?} after the start, with {} questions",
            began.elapsed(),
            world.fake.questions()
        );
        world.told("first sync", began, 0.0)?;
        Ok(world)
    }

    /// What a time cost.
    #[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
    fn told(&self, what: &str, began: Instant, busy: f64) -> anyhow::Result<()> {
        let (took, busy) = (began.elapsed(), self.busy()? - busy);
        let (resident, most) = (self.memory("VmRSS:")?, self.memory("VmHWM:")?);
        println!(
            "{what}: {:.1} s, {busy:.1} s of processor time ({:.0} % of a core); {resident} MiB, at most {most} MiB",
            took.as_secs_f64(),
            busy * 100.0 / took.as_secs_f64()
        );
        Ok(())
    }

    /// Processor time that istiod has used, in seconds.
    fn busy(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.istiod.pid()))?;
        let (_, fields) = stat.rsplit_once(')').context("no name")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
        Ok(ticks.collect::<Result<Vec<_>, _>>()?.iter().sum::<f64>() / TICKS)
    }

    /// A field of istiod's memory, in MiB.
    fn memory(&self, field: &str) -> anyhow::Result<usize> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.istiod.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<usize>()? / 1024)
    }

    /// Nothing changes for a while.
    #[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
    async fn idle(&self) -> anyhow::Result<()> {
        let (began, busy, asked) = (Instant::now(), self.busy()?, self.fake.questions());
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let (mut last, mut most) = (asked, 0);
        while began.elapsed() < ROUND {
            second.tick().await;
            let now = self.fake.questions();
            most = most.max(now - last);
            last = now;
        }
        let rate = count(last - asked) / began.elapsed().as_secs_f64();
        println!("idle: {rate:.0} questions/s, at most {most} in a second");
        self.told("idle", began, busy)
    }

    /// Waits until every proxy has the endpoints of every service.
    async fn all_sent(&self, proxies: &Proxies) -> anyhow::Result<()> {
        let wanted = proxies.seen().open.values().sum::<usize>();
        eventually(LONGEST, "proxies have everything", || async {
            let last = (0..self.services).find(|service| proxies.endpoints(&cluster(*service)).0 < wanted);
            ensure!(last.is_none(), "{last:?}");
            Ok(())
        })
        .await
    }

    /// An instance of a service fails.
    fn fail(&self, service: usize, number: usize) -> anyhow::Result<()> {
        let done = self.fake.change(|catalog| catalog.register(&instance(service, number, false)));
        ensure!(done, "not registered");
        Ok(())
    }

    /// One change after the other: from its registration to the last proxy's acknowledgement.
    #[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
    async fn follow(&self, proxies: &Proxies, changes: usize) -> anyhow::Result<()> {
        let wanted = proxies.seen().open.values().sum::<usize>();
        let (start, busy, mut took) = (Instant::now(), self.busy()?, Vec::new());
        for change in 0..changes {
            let service = change * 37 % self.services;
            let name = cluster(service);
            let (before, _) = proxies.endpoints(&name);
            let began = Instant::now();
            self.fail(service, 0)?;
            let last = eventually(LONGEST, "a change is acknowledged", || async {
                let (count, last) = proxies.endpoints(&name);
                ensure!(count >= before + wanted, "{} of {wanted}", count - before);
                last.context("never")
            })
            .await?;
            took.push(last.duration_since(began));
        }
        let [p50, p99, longest] = [0.5, 0.99, 1.0].map(|share| percentile(&took, share));
        println!(
            "{changes} changes to the last of {wanted} proxies: p50 {p50:.1?}, p99 {p99:.1?}, longest {longest:.1?}"
        );
        self.told("one change after the other", start, busy)
    }

    /// Changes at a steady rate.
    #[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
    async fn churn(&self, proxies: &Proxies) -> anyhow::Result<()> {
        let wanted = proxies.seen().open.values().sum::<usize>();
        let (start, busy, asked) = (Instant::now(), self.busy()?, self.fake.questions());
        let mut every = tokio::time::interval(Duration::from_secs(1) / CHURN.0);
        every.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut changed = Vec::new();
        while start.elapsed() < CHURN.1 {
            every.tick().await;
            let service = self.services / 2 + changed.len();
            let (before, _) = proxies.endpoints(&cluster(service));
            changed.push((service, before, Instant::now()));
            self.fail(service, 1)?;
        }
        let mut took = Vec::new();
        for (service, before, began) in &changed {
            let last = eventually(LONGEST, "a change is acknowledged", || async {
                let (count, last) = proxies.endpoints(&cluster(*service));
                ensure!(count >= before + wanted, "{} of {wanted}", count - before);
                last.context("never")
            });
            took.push(last.await?.duration_since(*began));
        }
        let [p50, p99, longest] = [0.5, 0.99, 1.0].map(|share| percentile(&took, share));
        let asked = self.fake.questions() - asked;
        println!(
            "{} changes at {} a second: p50 {p50:.1?}, p99 {p99:.1?}, longest {longest:.1?}; {asked} questions",
            changed.len(),
            CHURN.0
        );
        self.told("changes at a steady rate", start, busy)
    }
}

/// A number that is small enough.
fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}
