//! Three members as processes, and leaders that go.

use std::time::Duration;

use anyhow::ensure;
use tests::failover::{Fault, Plan, run};
use tests::mesh::last_words;
use tests::registers::Rate;

/// A new leader accepts writes within this time, beside other tests; the bench of this name holds it to less.
const WITHIN: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_that_are_killed_or_stopped_lose_no_write_and_no_stream_of_another_member()
-> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
    let plan = Plan {
        proxies: 30,
        rate: Rate { keys: 12, areas: 4, clients: 30, writes_per_second: 30 },
        faults: vec![Fault::Kill, Fault::Freeze, Fault::Kill],
        every: Duration::from_secs(2),
    };
    let report = run(folder.path(), None, &plan).await.inspect_err(|_| last_words(folder.path()))?;
    println!("{report}");
    ensure!(report.failovers.len() == plan.faults.len() && report.verdict.reads > 0, "{report}");
    let broken = report.broken(WITHIN);
    ensure!(broken.is_empty(), "{broken:#?}");
    Ok(())
}
