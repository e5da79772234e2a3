//! Our proxy beside Envoy: requests a second, processor time for each, the slowest of a hundred, memory.
//!
//! `tests/bench/run [CASES] [ROUNDS] [-o json]` installs Envoy, builds, and runs this. Load and servers have the first
//! processor, proxies (one, or a pair with mutual TLS in between) the second. Both programs take turns in each round; what is
//! printed are medians over the rounds, and the median of each round's ratio. The processor time for a request says most: it
//! hardly moves when clients or other work are the limit. What else ran meanwhile is told.

#![expect(clippy::indexing_slicing, reason = "of JSON that is made here")]

mod backend;
mod contestant;
mod load;
mod table;

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;
use tests::tls::Authority;
use tokio_util::task::TaskTracker;

use backend::Speaks;
use contestant::{Contestant, Shape, Which};
use load::{Asks, Meter};
use table::{Row, Sample};

/// Before anything is counted.
const WARM_UP: Duration = Duration::from_secs(1);
/// How long is counted.
const COUNTED: Duration = Duration::from_secs(4);
/// Connections that do nothing.
const IDLE: usize = 10_000;
/// Rounds, unless others are asked for.
const ROUNDS: usize = 3;
/// What a proxy just started keeps doing is over by then.
const SETTLED: Duration = Duration::from_secs(2);

/// What is measured.
#[derive(Debug, Clone, Copy)]
enum Case {
    Load(Asks, Speaks, Shape),
    /// Memory with many connections that do nothing.
    Idle,
    /// Memory with many clusters and routes.
    Large,
}

const ONE: Shape = Shape { tcp: false, http2: false, pair: false };
const ONE_H2: Shape = Shape { http2: true, ..ONE };
const ONE_TCP: Shape = Shape { tcp: true, ..ONE };
const PAIR: Shape = Shape { pair: true, ..ONE };
const PAIR_H2: Shape = Shape { pair: true, ..ONE_H2 };
const PAIR_TCP: Shape = Shape { pair: true, ..ONE_TCP };

const CASES: [(&str, Case); 11] = [
    ("h1", Case::Load(Asks::Http1, Speaks::Http1, ONE)),
    ("h2-h1", Case::Load(Asks::Http2, Speaks::Http1, ONE)),
    ("h2-h2", Case::Load(Asks::Http2, Speaks::Http2, ONE_H2)),
    ("mesh-h1", Case::Load(Asks::Http1, Speaks::Http1, PAIR)),
    ("mesh-h2", Case::Load(Asks::Http2, Speaks::Http2, PAIR_H2)),
    ("mesh-grpc", Case::Load(Asks::Grpc, Speaks::Http2, PAIR_H2)),
    ("tcp-1k", Case::Load(Asks::Bytes, Speaks::Bytes, ONE_TCP)),
    ("mtcp-1k", Case::Load(Asks::Bytes, Speaks::Bytes, PAIR_TCP)),
    ("mtcp-conn", Case::Load(Asks::Connections, Speaks::Bytes, PAIR_TCP)),
    ("idle-10k", Case::Idle),
    ("large", Case::Large),
];

/// What the command line asks for.
struct Wanted {
    cases: Vec<(&'static str, Case)>,
    rounds: usize,
    json: bool,
}

fn wanted() -> anyhow::Result<Wanted> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let mut wanted = Wanted { cases: CASES.to_vec(), rounds: ROUNDS, json: false };
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        match word {
            "-o" => wanted.json = words.next() == Some("json"),
            "all" => {}
            number if number.parse::<usize>().is_ok() => wanted.rounds = number.parse()?,
            names => {
                let find = |name: &str| CASES.iter().find(|(known, _)| *known == name).copied();
                let known: Vec<&str> = CASES.iter().map(|(name, _)| *name).collect();
                let named = names
                    .split(',')
                    .map(|name| find(name).with_context(|| format!("`{name}`: none of {known:?}")));
                wanted.cases = named.collect::<Result<_, _>>()?;
            }
        }
    }
    ensure!(wanted.rounds > 0, "no rounds");
    Ok(wanted)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let wanted = wanted()?;
    let mut first = CpuSet::new();
    first.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &first)?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    tokio::task::LocalSet::new().run_until(measure(&wanted)).await
}

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
async fn measure(wanted: &Wanted) -> anyhow::Result<()> {
    let (tasks, authority) = (TaskTracker::new(), Authority::new()?);
    let mut rows = Vec::new();
    for (name, case) in &wanted.cases {
        let mut row = Row::new(name);
        for round in 0..wanted.rounds {
            let turns =
                if round % 2 == 0 { [Which::Ours, Which::Envoy] } else { [Which::Envoy, Which::Ours] };
            for which in turns {
                let folder =
                    tempfile::Builder::new().prefix("bench-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
                let sample = sample(*case, which, &authority, &tasks, folder.path()).await;
                row.add(which, sample.with_context(|| format!("{name}, {which:?}"))?);
            }
        }
        if !wanted.json {
            if rows.is_empty() {
                println!("{}", table::HEAD);
            }
            println!("{row}");
        }
        rows.push(row);
    }
    if wanted.json {
        println!("{}", table::json(&rows));
    } else if let Some(warning) = table::warning(&rows) {
        println!("{warning}");
    }
    Ok(())
}

async fn sample(
    case: Case,
    which: Which,
    authority: &Authority,
    tasks: &TaskTracker,
    folder: &Path,
) -> anyhow::Result<Sample> {
    match case {
        Case::Load(asks, speaks, shape) => {
            let server = backend::start(speaks, tasks).await?;
            let contestant = Contestant::start(which, shape, server, authority, folder).await?;
            under_load(&contestant, asks).await
        }
        Case::Idle => {
            let server = backend::start(Speaks::Http1, tasks).await?;
            let contestant = Contestant::start(which, ONE, server, authority, folder).await?;
            let mut open = Vec::with_capacity(IDLE);
            for _ in 0..IDLE {
                open.push(load::opened(contestant.front).await.with_context(|| {
                    format!("connection {}; `ulimit -Hn` must be above {}", open.len() + 1, 2 * IDLE)
                })?);
            }
            at_rest(&contestant).await
        }
        Case::Large => at_rest(&Contestant::start_large(which, folder).await?).await,
    }
}

async fn at_rest(contestant: &Contestant) -> anyhow::Result<Sample> {
    // paced: what is measured is a state, not a change
    tokio::time::sleep(SETTLED).await;
    Ok(Sample { resident: contestant.resident()?, ..Sample::default() })
}

async fn under_load(contestant: &Contestant, asks: Asks) -> anyhow::Result<Sample> {
    let meter = Rc::new(Meter::default());
    let counted = async {
        // paced: connections are made and caches are full
        tokio::time::sleep(WARM_UP).await;
        let before = (contestant.busy()?, own()?, machine()?);
        meter.is_open.set(true);
        // paced: so long is counted
        tokio::time::sleep(COUNTED).await;
        meter.is_open.set(false);
        let (busy, own) = (contestant.busy()? - before.0, own()? - before.1);
        let other = (machine()? - before.2).checked_sub(busy + own).unwrap_or_default();
        let mut took = meter.took.take();
        took.sort_unstable();
        ensure!(!took.is_empty(), "nothing was answered");
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let requests = took.len() as f64;
        Ok(Sample {
            rate: requests / COUNTED.as_secs_f64(),
            busy: busy.as_secs_f64() * 1e6 / requests,
            p99: took.get(took.len() * 99 / 100).copied().map_or(0.0, f64::from),
            resident: contestant.resident()?,
            other: other.as_secs_f64() / COUNTED.as_secs_f64(),
        })
    };
    tokio::select! {
        sample = counted => sample,
        ended = load::run(asks, contestant.front, Rc::clone(&meter)) => ended.and(Err(anyhow::anyhow!("no more load"))),
    }
}

/// Time that this process had on a processor.
fn own() -> anyhow::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(micros.try_into()?))
}

/// Time that anything had on the two processors.
fn machine() -> anyhow::Result<Duration> {
    let all = std::fs::read_to_string("/proc/stat")?;
    let mut ticks = 0;
    for line in all.lines().filter(|line| line.starts_with("cpu0 ") || line.starts_with("cpu1 ")) {
        let numbers: Vec<u64> = line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
        // all but what was spent idle or waiting for disks (proc(5)); guests are in the first two
        ticks += [0, 1, 2, 5, 6].iter().filter_map(|at| numbers.get(*at)).sum::<u64>();
    }
    Ok(Duration::from_millis(ticks * 10))
}
