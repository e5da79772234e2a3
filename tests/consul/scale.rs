//! Ten thousand services with ten instances each (a tenth of that without optimisation): first sync, idleness, a change.

use std::time::Duration;

use anyhow::{Context, ensure};
use registry::source::Catalog as Known;
use registry::source::consul::client::Server as Place;
use registry::source::consul::convert::Mapping;
use registry::source::consul::datacenter::{Datacenter, Settings, Status};
use registry::source::consul::drive::{self, Connection, Proposal};
use registry::state::{Batch, Command, Revision, State};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use tests::consul::catalog::Catalog;
use tests::consul::fake::Server;

const SERVICES: usize = if cfg!(debug_assertions) { 1_000 } else { 10_000 };
const INSTANCES: usize = 10;
const PATIENCE: Duration = Duration::from_secs(120);

fn instance(service: usize, n: usize, status: &str) -> serde_json::Value {
    let at = service * INSTANCES + n;
    json!({
        "Node": format!("node-{}", at % 2_000), "Address": format!("10.{}.{}.1", at % 2_000 / 250, at % 250),
        "Service": {"ID": format!("s{service}-{n}"), "Service": format!("s{service}"), "Port": 1024 + at % 60_000,
            "Address": format!("10.{}.{}.{}", at / 62_500, at / 250 % 250, at % 250 + 1), "Tags": ["a"], "Meta": {"version": "v1"}},
        "Check": {"CheckID": format!("s{service}-{n}"), "Name": "c", "Status": status, "ServiceID": format!("s{service}-{n}")},
    })
}

/// What a control plane does with proposals, without its log.
async fn apply(mut due: mpsc::Receiver<Proposal>, told: watch::Sender<(u64, usize)>) -> State {
    let mut state = State::default();
    while let Some(Proposal { commands, done }) = due.recv().await {
        let revision = Revision(state.revision().0 + 1);
        let replaced = |command: &Command| {
            let Command::ReplaceEndpoints { endpoints, .. } = command else { return 0 };
            endpoints.len()
        };
        let endpoints: usize = commands.iter().map(replaced).sum();
        state.apply(revision, &Batch { time_ms: 1_000, author: String::new(), commands });
        told.send_modify(|(revision, all)| {
            *revision += 1;
            *all += endpoints;
        });
        done.send(true).unwrap_or_default();
    }
    state
}

/// Resident memory of this process, in MiB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap_or_default() / 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_catalog_is_read_once_and_then_followed() -> anyhow::Result<()> {
    let mut catalog = Catalog::new("dc1");
    for (service, n) in (0..SERVICES).flat_map(|service| (0..INSTANCES).map(move |n| (service, n))) {
        catalog.register(&instance(service, n, "passing"));
    }
    let before = resident();
    let fake = Server::start(catalog).await?;
    let servers = vec![Place { host: fake.address.ip().to_string(), port: fake.address.port() }];
    // Whoever raises Consul's limit of connections may watch each service.
    let mut settings = Settings::new(Mapping::new("c", "dc1"), 1);
    settings.watches = 400;
    let machine =
        Datacenter::new(settings, Known::default(), fastrand::Rng::with_seed(1), Instant::now().into_std());
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let (proposals, due) = mpsc::channel(1);
    let (told, mut applied) = watch::channel((0, 0));
    let (tell, mut status) = watch::channel(Status::default());
    let applying = tasks.spawn(apply(due, told));
    let connection = Connection { servers, token: None, tls: None };
    let began = Instant::now();
    let _ends = stop.clone().drop_guard();
    let driving = tasks.spawn(drive::watch(machine, connection, proposals, tell, stop.clone()));
    tokio::time::timeout(PATIENCE, status.wait_for(|status| status.synced)).await.context("never read")??;
    let first = began.elapsed();
    let read = status.borrow().clone();
    ensure!(read.services == SERVICES && read.endpoints == SERVICES * INSTANCES, "{read:?}");
    ensure!(
        applied.borrow().1 == 2 * SERVICES * INSTANCES,
        "each under both hosts, once: {:?}",
        applied.borrow()
    );
    let resident = resident().saturating_sub(before);

    // A change of one service, and a new one.
    let revision = applied.borrow().0;
    let began = Instant::now();
    fake.change(|catalog| assert!(catalog.register(&instance(SERVICES, 0, "passing"))));
    tokio::time::timeout(PATIENCE, applied.wait_for(|(now, _)| *now > revision))
        .await
        .context("not followed")??;
    let followed = began.elapsed();

    // Idle: questions that come back because their wait is over.
    let (questions, began) = (status.borrow().questions, Instant::now());
    let later =
        tokio::time::timeout(PATIENCE, status.wait_for(|status| status.questions > questions + 200)).await;
    let idle = later.ok().map(|_| 200.0 / began.elapsed().as_secs_f64());
    stop.cancel();
    driving.await?;
    let state = applying.await?;
    ensure!(state.services().count() == 2 * (SERVICES + 1), "{}", state.services().count());
    println!(
        "{SERVICES} services of {INSTANCES} instances: first sync {first:?}, a new service after {followed:?}, \
         {} questions, idle {idle:.0?}/s, {resident} MiB with the fake's answers",
        read.questions
    );
    Ok(())
}
