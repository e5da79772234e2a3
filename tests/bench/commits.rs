//! Commits in a second, and how long each takes: three members with fsync, beside three of etcd on the same disk.
//!
//! `cargo build --release --bins && cargo bench -p tests --bench commits` takes turns between the two, so that what else
//! the machine does hits both; `-- ROUNDS SECONDS` says how often and how long. A turn begins when the machine is at rest,
//! so that nobody pays for what another put off. Everything goes over the network as a
//! client would have it: etcd by its gRPC, istiod by its admin API, which checks, audits and keeps the history of
//! what it is given. Each writer has a connection of its own to the leader and overwrites an object of its own with
//! 1 KiB that was not there before. Beside them istiod's log alone ([`log`]), which tells how much of the time is the log's.
//! Exits with 1 when istiod commits less than etcd.

mod etcd;
mod log;

use std::fmt;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use istiod::raft::node::thread::Node;
use serde_json::json;
use tests::admin::{Admin, Door};
use tests::cluster::Cluster;
use tests::load::percentile;
use tests::{PATIENCE, eventually, text};
use tokio::time::Instant;

use self::etcd::Etcd;
use self::log::{Log, Values};

/// Writers of the two claims.
const WRITERS: [usize; 2] = [64, 1];
/// Bytes of a value.
const VALUE: usize = 1024;
/// How often it is looked whether the machine is at rest.
const REST: u32 = 20;
/// Rounds of each, and seconds of a round, unless others are asked for.
const ROUNDS: [u64; 2] = [5, 5];

/// Somebody who writes to one of the three.
enum Writer {
    Etcd(etcd::Writer),
    Istiod(Admin),
    Log(Node<Values>),
}

/// What rounds came to.
#[derive(Default)]
struct Figures {
    /// Commits in a second, of each round.
    rates: Vec<f64>,
    took: Vec<Duration>,
}

impl Figures {
    /// The median of the rounds.
    fn rate(&self) -> f64 {
        let mut sorted = self.rates.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or_default()
    }

    fn share(&self, share: f64) -> Duration {
        percentile(&self.took, share)
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rate, p50, p99) = (self.rate(), self.share(0.5), self.share(0.99));
        write!(f, "{rate:.0} commits/s ({:.0?}), p50 {p50:.2?}, p99 {p99:.2?}", self.rates)
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
async fn main() -> anyhow::Result<()> {
    let [rounds, seconds] = rounds()?;
    let folder = tempfile::Builder::new().prefix("commits-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let cluster = Cluster::start(folder.path(), 3).await?;
    let (etcd, version) = Etcd::start(folder.path()).await?;
    let log = Log::start(folder.path()).await?;
    println!("three members each; {rounds} rounds of {seconds} s, in turns; etcd {version}");
    let mut slow = Vec::new();
    for count in WRITERS {
        let mut all = [
            (istiod_writers(&cluster, count).await?, Figures::default()),
            (etcd.writers(count).await?.into_iter().map(Writer::Etcd).collect(), Figures::default()),
            (vec![log.leader().await?; count].into_iter().map(Writer::Log).collect(), Figures::default()),
        ];
        // One round more: the first only warms up.
        for round in 0..=rounds {
            for (writers, figures) in &mut all {
                rest().await?;
                let (commits, took) = write(writers, Duration::from_secs(seconds)).await?;
                if round > 0 {
                    figures.rates.push(commits);
                    figures.took.extend(took);
                }
            }
        }
        let [ours, theirs, alone] = all.each_ref().map(|(_, figures)| figures);
        for (name, figures) in [("istiod", ours), ("etcd", theirs), ("istiod's log alone", alone)] {
            println!("{count} writers, {name}: {figures}");
        }
        for (name, figures) in [("istiod", ours), ("istiod's log alone", alone)] {
            let commits = figures.rate() / theirs.rate();
            let p99 = figures.share(0.99).as_secs_f64() / theirs.share(0.99).as_secs_f64();
            println!("{count} writers, {name} to etcd: commits {commits:.2}, p99 {p99:.2}");
        }
        if ours.rate() < theirs.rate() {
            slow.push(format!("{count} writers: {:.2}", ours.rate() / theirs.rate()));
        }
    }
    ensure!(slow.is_empty(), "commits of istiod to those of etcd, wanted at least 1.0: {slow:?}");
    Ok(())
}

/// Waits until the processors have had little to do for a moment; not for long, if others keep them busy.
async fn rest() -> anyhow::Result<()> {
    let mut before = idle()?;
    for _ in 0..REST {
        // paced: idle time is measured over a while.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = idle()?;
        let (idle, all) = (now.0 - before.0, now.1 - before.1);
        if idle * 10 >= all * 9 {
            break;
        }
        before = now;
    }
    Ok(())
}

/// Ticks that all processors were idle, and all their ticks (proc(5), `/proc/stat`).
fn idle() -> anyhow::Result<(u64, u64)> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let ticks = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<u64> = ticks.map(str::parse).collect::<Result<_, _>>()?;
    Ok((ticks.iter().skip(3).take(2).sum(), ticks.iter().take(8).sum()))
}

/// Writes for so long; gives the commits in a second, and how long each took.
async fn write(writers: &mut [Writer], within: Duration) -> anyhow::Result<(f64, Vec<Duration>)> {
    let began = Instant::now();
    let writing = writers.iter_mut().enumerate().map(async |(number, writer)| {
        let (name, mut took) = (format!("value-{number}"), Vec::new());
        while began.elapsed() < within {
            let (value, sent) = (value(), Instant::now());
            match writer {
                Writer::Etcd(etcd) => etcd.put(&name, &value).await?,
                Writer::Istiod(admin) => put(admin, &name, &value).await?,
                Writer::Log(node) => node.propose(format!("{name}={value}").into()).await.map(drop)?,
            }
            took.push(sent.elapsed());
        }
        anyhow::Ok(took)
    });
    let took = try_join_all(writing).await?.concat();
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let rate = took.len() as f64 / began.elapsed().as_secs_f64();
    Ok((rate, took))
}

/// Text that was not there before.
fn value() -> String {
    std::iter::repeat_with(fastrand::alphanumeric).take(VALUE).collect()
}

/// Connections to the leader, each with a token of its own: no caller is limited in what the others do.
async fn istiod_writers(cluster: &Cluster, count: usize) -> anyhow::Result<Vec<Writer>> {
    let leader = eventually(PATIENCE, "somebody leads", || cluster.leader(0)).await?;
    let door = cluster.member(leader)?.door()?;
    let mut writers = Vec::new();
    for _ in 0..count {
        let wanted = json!({"role": "editor"});
        let made = door.call("POST", "/api/v1/access/tokens", Some(&wanted)).await?;
        ensure!(made.status == 201, "{made:?}");
        let made: serde_json::Value = made.json()?;
        let door = Door { token: text(&made, "/token").to_owned(), ..door.clone() };
        writers.push(Writer::Istiod(door.open().await?));
    }
    Ok(writers)
}

async fn put(writer: &mut Admin, name: &str, value: &str) -> anyhow::Result<()> {
    let object = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": "default", "annotations": {"value": value}},
        "spec": {"hosts": [format!("{name}.example")], "resolution": "DNS",
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]},
    });
    let answer =
        writer.call("PUT", &format!("/api/v1/config/ServiceEntry/default/{name}"), Some(&object)).await?;
    ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
    Ok(())
}

fn rounds() -> anyhow::Result<[u64; 2]> {
    let told: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    if told.is_empty() {
        return Ok(ROUNDS);
    }
    let numbers: Result<Vec<u64>, _> = told.iter().map(|word| word.parse()).collect();
    numbers.context("not a number")?.try_into().map_err(|_| anyhow::anyhow!("wanted: ROUNDS SECONDS"))
}
