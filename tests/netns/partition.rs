//! A leader that its peers do not reach, while proxies and operators reach all members.

use std::time::Duration;

use anyhow::ensure;
use tests::failover::{Fault, Plan, run};
use tests::mesh::last_words;
use tests::netns::{Lan, is_root};
use tests::registers::Rate;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_is_replaced_and_keeps_its_streams_and_takes_no_write_and_no_read()
-> anyhow::Result<()> {
    if !is_root() {
        println!("not run: network namespaces need root");
        return Ok(());
    }
    let lan = Lan::new(4)?;
    let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
    let plan = Plan {
        proxies: 30,
        rate: Rate { keys: 12, areas: 4, clients: 30, writes_per_second: 30 },
        faults: vec![Fault::CutOff],
        every: Duration::from_secs(2),
    };
    let report = run(folder.path(), Some(&lan), &plan).await.inspect_err(|_| last_words(folder.path()))?;
    println!("{report}");
    let broken = report.broken(Duration::from_secs(10));
    ensure!(broken.is_empty(), "{broken:#?}");
    ensure!(report.seen.lost == 0 && report.verdict.reads > 0, "{report}");
    Ok(())
}
