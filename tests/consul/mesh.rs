//! From a registration in a real Consul to a request through a proxy of the mesh.

use std::time::Duration;

use anyhow::ensure;
use http::Method;
use registry::source::consul::client::Client;
use serde_json::{Value, json};
use tests::echo::Echo;
use tests::mesh::Mesh;
use tests::{PATIENCE, eventually};
use tokio::time::Instant;

use crate::real::Consul;

/// How fast the mesh follows is told; on a loaded machine it is only bounded.
const SOON: Duration = Duration::from_secs(15);

async fn register(client: &Client, address: std::net::SocketAddr, status: &str) -> anyhow::Result<()> {
    let body = json!({
        "Node": "db-host", "Address": address.ip().to_string(),
        "Service": {"ID": "web-1", "Service": "web", "Port": address.port(), "Meta": {"protocol": "http", "mesh-port": "80"}},
        "Check": {"CheckID": "web-1", "Name": "alive", "Status": status, "ServiceID": "web-1"},
    });
    let answer = client.send(0, Method::PUT, "/v1/catalog/register", body.to_string().into_bytes()).await?;
    ensure!(answer.status == 200, "{}", answer.reason());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_of_a_secured_consul_is_called_through_the_mesh_and_outlives_its_catalog()
-> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (consul, secured) = Consul::secured(folder.path()).await?;
    let client = secured.client(consul.address)?;
    let sources = folder.path().join("sources.yaml");
    std::fs::write(&sources, secured.settings(consul.address))?;
    let mesh = Mesh::start(&["--sources", &sources.display().to_string()], &[], &["client"]).await?;
    eventually(PATIENCE, "the catalog is read", || async {
        let log = mesh.istiod.log();
        ensure!(log.contains("Consul datacenter is read"), "{log}");
        Ok(())
    })
    .await?;

    let echo = Echo::start("web").await?;
    let began = Instant::now();
    register(&client, echo.address, "passing").await?;
    let answers = |status: u16| {
        let mesh = &mesh;
        eventually(SOON, "the service answers as its catalog says", move || async move {
            let answer = mesh.get("client", "web.service.consul", "/", &[]).await?;
            ensure!(answer.status == status, "{}: {}", answer.status, answer.text());
            Ok(())
        })
    };
    answers(200).await?;
    let called = began.elapsed();
    let began = Instant::now();
    register(&client, echo.address, "critical").await?;
    answers(503).await?;
    let out = began.elapsed();
    register(&client, echo.address, "passing").await?;
    answers(200).await?;
    let row: Value = mesh.istiod.service("web.service.consul").await?;
    ensure!(row.to_string().contains("consul/consul/dc1"), "{row}");

    // Without its catalog the service stays.
    drop(consul);
    eventually(PATIENCE, "the loss of the catalog is told", || async {
        let log = mesh.istiod.log();
        ensure!(log.contains("Consul datacenter does not answer"), "{log}");
        Ok(())
    })
    .await?;
    answers(200).await?;
    ensure!(mesh.istiod.metric("istiod_consul_services", "dc1").await? >= 1.0);
    report(called, out);
    mesh.finish(&["Consul datacenter does not answer"])
}

#[expect(clippy::print_stdout, reason = "a measurement")]
fn report(called: Duration, out: Duration) {
    println!("from registering to the first answer {called:?}, from a failing check to none {out:?}");
}
