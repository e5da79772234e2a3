//! Who serves agents and proxies, and how many streams each holds: from the members and what they say of themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xds::balance::Fleet;

use crate::raft::Raft;
use crate::raft::peers::links::Connected;
use crate::raft::wire::LoadRequest;

/// How often the members are asked for their streams.
const ASK: Duration = Duration::from_secs(1);

/// Keeps the fleet as the members are, until `stop`.
pub(crate) async fn keep(raft: Raft, peers: Connected, fleet: watch::Sender<Fleet>, stop: CancellationToken) {
    let mut asks = tokio::time::interval(ASK);
    asks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(asks.tick()).await.is_some() {
        let clients = peers.all().into_iter().map(|(id, mut client)| async move {
            let asked = tokio::time::timeout(ASK, client.load(LoadRequest::default())).await;
            Some((id, asked.ok()?.ok()?.into_inner().streams))
        });
        let told: BTreeMap<u64, u64> = join_all(clients).await.into_iter().flatten().collect();
        let cluster = raft.cluster().borrow().clone();
        let own = fleet.borrow().own.clone();
        let members = cluster.members().iter();
        let mut members: BTreeMap<String, Option<u64>> =
            members.map(|(id, member)| (member.description.xds.clone(), told.get(id).copied())).collect();
        members.entry(own).or_default();
        fleet.send_if_modified(|shown| {
            let changed = shown.members != members;
            shown.members = members;
            changed
        });
    }
}
