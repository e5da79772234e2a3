//! How long a control plane of three members is without a leader that accepts writes, and what that costs.
//!
//! `cargo build --release --bins && cargo bench -p tests --bench failover` kills the leader every 10 s for 3 minutes and
//! stops it with SIGSTOP, and, when this is root, cuts it off in a network of its own; `-- KILLS STOPS PARTITIONS` says
//! other numbers. Exits with 1 when a claim does not hold.

use std::time::Duration;

use anyhow::{Context, ensure};
use tests::failover::{Fault, Plan, Report, run};
use tests::netns::{Lan, is_root};
use tests::registers::Rate;

/// A new leader accepts writes within this time, but for one failover in a hundred.
const P99: Duration = Duration::from_secs(2);
/// From one failover to the next.
const EVERY: Duration = Duration::from_secs(10);
/// Failovers by each fault, unless others are asked for.
const COUNTS: [usize; 3] = [18, 3, 3];
/// Proxies.
const PROXIES: usize = 200;
/// What is written and read all the while.
const RATE: Rate = Rate { keys: 60, areas: 20, clients: 100, writes_per_second: 100 };

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
async fn main() -> anyhow::Result<()> {
    let [kills, stops, partitions] = counts()?;
    let folder = tempfile::Builder::new().prefix("failover-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    println!(
        "{PROXIES} proxies, {} writes and as many reads a second, a failover every {EVERY:?}",
        RATE.writes_per_second
    );
    let faults = [vec![Fault::Kill; kills], vec![Fault::Freeze; stops]].concat();
    let plan = Plan { proxies: PROXIES, rate: RATE, faults, every: EVERY };
    let mut broken = judge(run(folder.path(), None, &plan).await);
    if partitions > 0 && is_root() {
        let plan = Plan { faults: vec![Fault::CutOff; partitions], ..plan };
        let lan = Lan::new(4)?;
        let folder = tempfile::Builder::new().prefix("partition-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        broken.extend(judge(run(folder.path(), Some(&lan), &plan).await));
    } else {
        println!("not run: partitions, which need root");
    }
    ensure!(broken.is_empty(), "{broken:#?}");
    Ok(())
}

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
fn judge(report: anyhow::Result<Report>) -> Vec<String> {
    match report {
        Ok(report) => {
            println!("{report}");
            report.broken(P99)
        }
        Err(error) => vec![format!("{error:#}")],
    }
}

/// The numbers of failovers that the command line asks for.
fn counts() -> anyhow::Result<[usize; 3]> {
    let told: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    if told.is_empty() {
        return Ok(COUNTS);
    }
    let numbers: Result<Vec<usize>, _> = told.iter().map(|word| word.parse()).collect();
    let numbers = numbers.context("not a number")?;
    numbers.try_into().map_err(|_| anyhow::anyhow!("wanted: KILLS STOPS PARTITIONS"))
}
