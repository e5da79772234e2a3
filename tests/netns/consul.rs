//! A Consul cluster beside the mesh: its services are called from a machine of the mesh, by their names, whatever becomes
//! of its servers.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use http::Method;
use serde_json::{Value, json};
use tests::consul::servers::{Servers, Site};
use tests::echo::{Echo, Seen};
use tests::istiod::sum;
use tests::netns::{Lan, Machine, is_root};
use tests::{PATIENCE, eventually};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::dns::{self, A, Answer, Elsewhere};
use crate::machines::{Captured, ControlPlane, folder, get};

/// What changes in Consul is so on a machine of the mesh within this time.
const WITHIN: Duration = Duration::from_secs(1);
/// Answers in a row that show that an instance is called no more.
const ENOUGH: usize = 50;
/// Whole seconds of silence after which a datacenter is away.
const AWAY: f64 = 2.0;

/// Services that are there all the time: name, port and application.
const STEADY: [(&str, u16, &str); 3] = [
    ("pay.service.consul", 8083, "pay"),
    ("pay.service.dc1.consul", 8083, "pay"),
    ("far.service.dc2.consul", 8084, "far"),
];

/// Who answers an application of the machine that calls a service by its name.
async fn called(vm: &Captured, name: &str, port: u16) -> anyhow::Result<Seen> {
    let found = dns::ask(&vm.machine, name, A, false).await?;
    let Answer::Addresses(addresses) = &found else { anyhow::bail!("{name}: {found:?}") };
    let address = addresses.first().filter(|address| **address != dns::ELSEWHERE);
    let to = SocketAddr::new(*address.with_context(|| format!("{name} is not of the mesh"))?, port);
    let answer = vm.get(to, name, "/").await?;
    ensure!(answer.status == 200, "{name} at {to}: {}: {}", answer.status, answer.text());
    answer.json()
}

async fn put(servers: &Servers, place: usize, path: &str, body: &Value) -> anyhow::Result<()> {
    servers.call(place, Method::PUT, path, Some(body)).await.map(drop)
}

/// Registers an instance on a node that no agent has.
async fn register(
    servers: &Servers,
    place: usize,
    (datacenter, name): (&str, &str),
    to: (&Machine, u16),
) -> anyhow::Result<()> {
    let (address, port) = (to.0.v4, to.1);
    let body = json!({
        "Datacenter": datacenter, "Node": format!("node-{name}"), "Address": address,
        "Service": {"ID": name, "Service": name, "Address": address, "Port": port, "Meta": {"protocol": "http"}},
        "Check": {"CheckID": format!("check-{name}"), "Name": "check", "Status": "passing", "ServiceID": name},
    });
    put(servers, place, "/v1/catalog/register", &body).await
}

/// A service with a check, registered at the agents of two servers; one of its checks fails.
#[expect(clippy::print_stdout, reason = "the times that were measured are part of the result")]
async fn follows(servers: &Servers, vm: &Captured, at: &Machine) -> anyhow::Result<()> {
    let instance = |number: u16| {
        json!({
            "ID": format!("web-{number}"), "Name": "web", "Address": at.v4, "Port": 8080 + number,
            "Meta": {"protocol": "http"},
            "Check": {"CheckID": format!("alive-{number}"), "TTL": "10m", "Status": "passing"},
        })
    };
    let began = Instant::now();
    put(servers, 0, "/v1/agent/service/register", &instance(1)).await?;
    let web = || called(vm, "web.service.consul", 8081);
    eventually(PATIENCE, "the new service is called", || async {
        let seen = web().await?;
        ensure!(seen.name == "one", "{seen:?}");
        Ok(())
    })
    .await?;
    let took = began.elapsed();
    println!("called {took:.2?} after its registration");
    ensure!(took < WITHIN, "called after {took:?} only");

    put(servers, 1, "/v1/agent/service/register", &instance(2)).await?;
    let second = || async {
        let seen = web().await?;
        ensure!(seen.name == "two", "{seen:?}");
        Ok(())
    };
    eventually(PATIENCE, "the second instance is called", second).await?;
    let failed = Instant::now();
    put(servers, 1, "/v1/agent/check/fail/alive-2", &json!(null)).await?;
    let (mut last, mut others) = (Duration::ZERO, 0);
    while others < ENOUGH {
        others = if web().await?.name == "two" { 0 } else { others + 1 };
        if others == 0 {
            last = failed.elapsed();
        }
        ensure!(failed.elapsed() < PATIENCE, "it is called on");
    }
    println!("called last {last:.2?} after its check failed");
    ensure!(last < WITHIN, "called for {last:?}");
    Ok(())
}

/// For how long nothing was heard of a datacenter, in whole seconds.
async fn silence(control_plane: &Machine, datacenter: &str) -> anyhow::Result<f64> {
    let metrics = SocketAddr::from(([127, 0, 0, 1], 15014));
    let told = get(control_plane, metrics, "istiod", "/metrics").await?.text();
    Ok(sum(&told, "istiod_consul_age_seconds", &format!("consul/{datacenter}")))
}

/// The leader of the servers is killed, then all of them, and they come back.
#[expect(clippy::print_stdout, reason = "the times that were measured are part of the result")]
async fn outlives(
    servers: &mut Servers,
    (vm, at): (&Captured, &Machine),
    control_plane: &ControlPlane,
) -> anyhow::Result<()> {
    let appears = async |servers: &Servers, name: &str| {
        let place = *servers.running("dc1").first().context("no server")?;
        register(servers, place, ("dc1", name), (at, 8083)).await?;
        let began = Instant::now();
        let host = format!("{name}.service.consul");
        eventually(PATIENCE, "a service that is new is called", || called(vm, &host, 8083)).await?;
        anyhow::Ok(began.elapsed())
    };
    servers.kill(servers.leader("dc1").await?)?;
    servers.ready().await?;
    println!("new service after the leader's death: {:.2?}", appears(servers, "after-leader").await?);

    for place in [servers.running("dc1"), servers.running("dc2")].concat() {
        servers.kill(place)?;
    }
    for datacenter in ["dc1", "dc2"] {
        eventually(PATIENCE, "the datacenter is away", || async {
            let silent = silence(at, datacenter).await?;
            ensure!(silent >= AWAY, "{datacenter}: {silent}");
            Ok(())
        })
        .await?;
    }
    let services = control_plane.istioctl(&["services"])?;
    for name in ["web", "pay", "after-leader"] {
        ensure!(services.contains(&format!("{name}.service.consul")), "{name} is not in {services}");
    }
    servers.restart().await?;
    let back = Instant::now();
    for datacenter in ["dc1", "dc2"] {
        eventually(PATIENCE, "the datacenter is back", || async {
            let silent = silence(at, datacenter).await?;
            ensure!(silent < 1.0, "{datacenter}: {silent}");
            Ok(())
        })
        .await?;
    }
    println!("both datacenters are read {:.2?} after all their servers are", back.elapsed());
    println!("new service after that: {:.2?}", appears(servers, "after-all").await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_of_a_consul_cluster_are_called_by_name_whatever_becomes_of_its_servers()
-> anyhow::Result<()> {
    if !is_root() {
        println!("not run: network namespaces need root");
        return Ok(());
    }
    let (lan, folder) = (Lan::new(6)?, folder()?);
    let (at, place) = (lan.machine(0)?, folder.path().join("consul"));
    std::fs::create_dir(&place)?;
    let near = (1..4).map(|number| Ok(Site::of(lan.machine(number)?))).collect::<anyhow::Result<_>>()?;
    let datacenters = [("dc1", near), ("dc2", vec![Site::of(lan.machine(4)?)])];
    let mut servers = Servers::start(&place, &datacenters).await?;
    let control_plane = ControlPlane::start(&lan, folder.path(), &servers.sources()).await?;
    let _elsewhere = Elsewhere::start(at)?;
    let apps = [("one", 8081), ("two", 8082), ("pay", 8083), ("far", 8084)];
    let apps = apps.into_iter().map(|(name, port)| Echo::on(name, at.listen(false, port)?));
    let apps = apps.collect::<anyhow::Result<Vec<_>>>()?;
    let machine = lan.machine(5)?;
    let mut vm = Captured::start(&control_plane, machine, "vm", &[machine.v4.into()], &["--no-register"])?;
    vm.ready().await?;

    let far = *servers.running("dc2").first().context("no server")?;
    register(&servers, 0, ("dc1", "pay"), (at, 8083)).await?;
    register(&servers, far, ("dc2", "far"), (at, 8084)).await?;
    for (name, port, app) in STEADY {
        let seen = eventually(PATIENCE, "it is called", || called(&vm, name, port)).await?;
        ensure!(seen.name == app, "{name}: {seen:?}");
    }
    follows(&servers, &vm, at).await?;

    let done = CancellationToken::new();
    let asking = async {
        let mut asked = 0;
        while !done.is_cancelled() {
            for (name, port, app) in STEADY {
                let seen =
                    called(&vm, name, port).await.with_context(|| format!("after {asked} requests"))?;
                ensure!(seen.name == app, "{name}: {seen:?}");
                asked += 1;
            }
        }
        anyhow::Ok(asked)
    };
    let failing = async {
        outlives(&mut servers, (&vm, at), &control_plane).await?;
        done.cancel();
        anyhow::Ok(())
    };
    let (asked, ()) = tokio::try_join!(asking, failing)?;
    println!("{asked} requests meanwhile, none failed");
    ensure!(asked > ENOUGH, "{asked}");
    ensure!(vm.agent.stop().await?.success(), "{}", vm.agent.output());
    drop(apps);
    Ok(())
}
