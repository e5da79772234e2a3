//! Five machines, one of which the control plane loses while the loss counts as one of many: it is held as it was.
//!
//! `MESH_PARTITION_SECONDS=120 cargo test --profile quick -p tests --test netns held` keeps the network torn for as long as it
//! says.

use std::time::Duration;

use anyhow::{Context, ensure};
use tests::netns::{Lan, is_root};
use tests::{PATIENCE, eventually};
use tokio::time::Instant;

use crate::five::{Partition, Vm, start};
use crate::machines::{ControlPlane, folder};

/// Without the hold, a machine would be removed five seconds after it was heard last.
const HOLD: &str = "workloads: {lease: 2s, removeAfter: 3s, massLossWindow: 2s, massLossLeast: 1}\n";
/// How long the network is torn, unless the environment says otherwise.
const TORN: u64 = 10;

/// Whether a machine's agent is heard, as the control plane says; nothing when it is not registered.
fn agent(control_plane: &ControlPlane, vm: &Vm) -> anyhow::Result<Option<String>> {
    let rows: Vec<serde_json::Value> =
        serde_json::from_str(&control_plane.istioctl(&["workloads", "--output", "json"])?)?;
    let row = rows.iter().find(|row| tests::text(row, "/serviceAccount") == vm.name);
    Ok(row.map(|row| tests::text(row, "/agent").to_owned()))
}

async fn until_agent(control_plane: &ControlPlane, vm: &Vm, expected: Option<&str>) -> anyhow::Result<()> {
    eventually(PATIENCE, "the control plane says so of the agent", || async {
        let told = agent(control_plane, vm)?;
        ensure!(told.as_deref() == expected, "{}: {told:?} is not {expected:?}", vm.name);
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_is_held_is_served_and_called_while_it_is_cut_off_and_removed_when_it_is_given_up()
-> anyhow::Result<()> {
    if !is_root() {
        println!("not run: network namespaces need root");
        return Ok(());
    }
    #[expect(
        clippy::disallowed_methods,
        reason = "the long form of this test is asked for by its one setting"
    )]
    let long: Option<u64> = std::env::var("MESH_PARTITION_SECONDS").ok().and_then(|s| s.parse().ok());
    let (lan, folder) = (Lan::new(6)?, folder()?);
    let control_plane = ControlPlane::start(&lan, folder.path(), HOLD).await?;
    let vms = start(&control_plane, &lan)?;
    let (torn, others) = vms.split_first().context("no machine")?;
    for other in others {
        eventually(PATIENCE, "they serve each other", || other.asks(torn, false)).await?;
        eventually(PATIENCE, "they serve each other", || torn.asks(other, false)).await?;
    }

    // Everybody calls the machine, and it calls everybody, for much longer than it takes to be removed.
    let begun = Instant::now();
    let partition = Partition::between(&torn.captured.machine, lan.machine(0)?)?;
    let (mut requests, mut held) = (0, 0);
    while begun.elapsed() < Duration::from_secs(long.unwrap_or(TORN)) {
        for other in others {
            let v6 = requests % 4 < 2;
            let at = || format!("after {requests} requests and {:?}", begun.elapsed());
            other.asks(torn, v6).await.with_context(at)?;
            torn.asks(other, v6).await.with_context(at)?;
            requests += 2;
        }
        let told = agent(&control_plane, torn)?.context("it is registered no more")?;
        ensure!(told == "unknown" || told == "heard" && held == 0, "{told}");
        held += usize::from(told == "unknown");
    }
    ensure!(held > 0, "it was not held");
    println!("{requests} requests in {:?} without the control plane, none failed", begun.elapsed());

    // It comes back as it was.
    partition.heal()?;
    until_agent(&control_plane, torn, Some("heard")).await?;
    ensure!(!torn.captured.agent.output().contains("registering again"), "{}", torn.captured.agent.output());
    torn.asks(others.first().context("no other machine")?, true).await?;

    // Lost again, and given up by an operator: it is removed like any other, and comes back by itself all the same.
    let partition = Partition::between(&torn.captured.machine, lan.machine(0)?)?;
    until_agent(&control_plane, torn, Some("unknown")).await?;
    let released = control_plane.istioctl(&["workloads", "release", "--namespace", "default"])?;
    ensure!(released.contains(&format!("default/{}", torn.name)), "{released}");
    until_agent(&control_plane, torn, None).await?;
    partition.heal()?;
    for other in others {
        eventually(PATIENCE, "the machine is back", || other.asks(torn, true)).await?;
    }
    until_agent(&control_plane, torn, Some("heard")).await?;
    for vm in vms {
        let mut agent = vm.captured.agent;
        ensure!(agent.stop().await?.success(), "{}", agent.output());
    }
    Ok(())
}
