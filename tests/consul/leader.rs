//! Three members that write the mesh's services into a real Consul, and lose their leader while it writes.

use anyhow::{Context, ensure};
use registry::source::consul::export::EPOCH;
use serde_json::json;
use tests::cluster::Cluster;
use tests::{PATIENCE, eventually};
use tokio::time::Instant;

use crate::export::{Peer, service, yaml};

/// Services of the mesh: writing them takes some seconds.
const SERVICES: usize = 300;
/// Entries written in a second.
const RATE: usize = 100;
/// Services that go.
const GOING: usize = 6;

/// What is in the catalog of ours is all there and only that, and nothing of others has changed.
async fn whole(peer: &Peer, ours: usize) -> anyhow::Result<()> {
    let entries = peer.entries().await?;
    ensure!(entries == (ours, 1), "{entries:?} of ({ours}, 1)");
    ensure!(peer.node("other").await?.services.len() == 1, "another node's service");
    Ok(())
}

/// The epoch in which our node was claimed.
async fn epoch(peer: &Peer) -> anyhow::Result<u64> {
    let node = peer.node("mesh-m1").await?;
    Ok(node.meta.get(EPOCH).context("no epoch")?.parse()?)
}

/// Kills the member that leads, and starts it again when another one leads.
async fn lose_leader(cluster: &mut Cluster) -> anyhow::Result<()> {
    let leader = cluster.leader(0).await?;
    cluster.member_mut(leader)?.kill()?;
    let other = usize::from(leader == 0);
    eventually(PATIENCE, "another member leads", || async {
        let now = cluster.leader(other).await?;
        ensure!(now != leader, "still {leader}");
        Ok(())
    })
    .await?;
    cluster.member_mut(leader)?.restart().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_lost_while_it_writes_leaves_nothing_out_and_takes_nothing_of_others() -> anyhow::Result<()>
{
    let folder = tempfile::tempdir()?;
    let (consul, members) = (folder.path().join("consul"), folder.path().join("members"));
    std::fs::create_dir(&consul)?;
    std::fs::create_dir(&members)?;
    let peer = Peer::real(&consul).await?;
    let server = peer.connection.servers.first().context("no server")?;
    let export = json!({"owner": "m1", "rate": RATE});
    let address = format!("http://{}:{}", server.host, server.port);
    let source = json!({"addresses": [address], "export": export});
    let settings = format!("sources: {}\n", json!({ "consul": source }));
    let mut cluster = Cluster::start_with(&members, 3, &settings).await?;

    // What others have: a service on their node, and one on ours.
    let theirs = |node: &str, name: &str| {
        let service =
            json!({"ID": format!("{name}-theirs"), "Service": name, "Address": "10.9.9.9", "Port": 1});
        json!({"Node": node, "Address": "127.0.0.1", "SkipNodeUpdate": node == "mesh-m1", "Service": service})
    };
    let register = "/v1/catalog/register";
    ensure!(peer.put(register, &theirs("other", "others")).await?.status == 200);
    let services: Vec<_> = (0..SERVICES).map(service).collect();
    cluster.member(0)?.apply(&yaml(&services))?;
    let first = eventually(PATIENCE, "our node is claimed", || epoch(&peer)).await?;
    ensure!(peer.put(register, &theirs("mesh-m1", "theirs")).await?.status == 200);
    let half = eventually(PATIENCE, "some are written", || async {
        let (ours, _) = peer.entries().await?;
        ensure!(ours > RATE, "{ours}");
        Ok(ours)
    })
    .await?;
    ensure!(half < SERVICES, "all were written before the leader went");
    lose_leader(&mut cluster).await?;
    let began = Instant::now();
    eventually(PATIENCE, "nothing of ours is missing", || whole(&peer, SERVICES)).await?;
    let next = epoch(&peer).await?;
    ensure!(next > first, "epoch {next} after {first}");
    println!(
        "{half} of {SERVICES} written when the leader went; whole {:.2?} after the next",
        began.elapsed()
    );

    // And while it removes: what was deleted just now is still in the catalog.
    let (gone, stay) = services.get(2..).and_then(|all| all.split_at_checked(GOING)).context("too few")?;
    for (name, _, _) in gone {
        cluster.member(0)?.istioctl(&["delete", "serviceentry", name, "-n", "shop"])?;
    }
    lose_leader(&mut cluster).await?;
    let left = SERVICES - GOING;
    eventually(PATIENCE, "what has gone is gone, and no more", || whole(&peer, left)).await?;
    for (name, _, _) in stay.iter().step_by(20) {
        ensure!(!peer.instances(name).await?.is_empty(), "{name} is not there");
    }
    Ok(())
}
