//! Applications that are checked as their group says: who fails is sent nothing, and comes back.

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::echo::Echo;
use tests::mesh::Mesh;
use tests::workload::WorkloadSpec;
use tests::{PATIENCE, eventually, load, text};

/// A group of workloads with their own service account, which are checked like this.
fn group(probe: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {{name: bank}}\nspec:\n  \
         metadata: {{labels: {{app: pay, version: v2}}}}\n  template: {{serviceAccount: bank}}\n{probe}"
    )
}

/// Waits until the group's workload is shown with a reason of these words; with none, until it is healthy.
async fn shown(mesh: &Mesh, reason: &str) -> anyhow::Result<Value> {
    eventually(PATIENCE, "the reason is shown", || async {
        let rows = mesh.istiod.rows("/workloads").await?;
        let row =
            rows.into_iter().find(|row| text(row, "/name").starts_with("bank-")).context("no workload")?;
        let (health, told) = (text(&row, "/health"), text(&row, "/reason"));
        ensure!((health == "Healthy") == reason.is_empty() && told.contains(reason), "{row}");
        Ok(row)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_fails_its_probe_is_sent_nothing_until_it_succeeds_again() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&["--lease", "3"], &["pay-v1"], &["client"]).await?;
    let http = "  probe: {httpGet: {path: /ready, port: 80}, periodSeconds: 1, failureThreshold: 1}\n";
    mesh.istiod.apply(&group(http)).await?;
    let echo = Echo::start("pay-v2").await?;
    echo.turn(503);
    let mut spec = WorkloadSpec::server("pay", "v2", echo.address);
    spec.service_account = "bank".to_owned();
    mesh.workload(&spec).await?;
    // It begins unhealthy, and nobody was sent to it.
    let row = shown(&mesh, "/ready: status 503").await?;
    ensure!(text(&row, "/health") == "Unhealthy", "{row}");
    mesh.istiod.healthy("pay", 1).await?;
    let table = mesh.istiod.istioctl_ok(&["workloads"]).await?;
    ensure!(table.contains("Unhealthy: GET http://127.0.0.1:"), "{table}");

    let address = mesh.address("client", "pay", 80).await?;
    for _turn in 0..2 {
        echo.turn(200);
        shown(&mesh, "").await?;
        mesh.istiod.healthy("pay", 2).await?;
        eventually(PATIENCE, "both are called", || async {
            let counts = load::burst(address, "pay", "/", 20, 2).await?;
            ensure!(counts.len() == 2 && counts.contains_key("pay-v2"), "{counts:?}");
            Ok(())
        })
        .await?;
        echo.turn(503);
        shown(&mesh, "/ready: status 503").await?;
        mesh.istiod.healthy("pay", 1).await?;
        eventually(PATIENCE, "it is sent nothing", || async {
            let counts = load::burst(address, "pay", "/", 20, 2).await?;
            ensure!(counts.len() == 1 && counts.contains_key("pay-v1"), "{counts:?}");
            Ok(())
        })
        .await?;
    }

    // What the group says anew reaches an agent that is there.
    mesh.istiod.apply(&group("  probe: {exec: {command: [\"true\"]}}\n")).await?;
    shown(&mesh, "execProbes").await?;
    mesh.istiod.apply(&group("  probe: {tcpSocket: {port: 80}, periodSeconds: 1}\n")).await?;
    shown(&mesh, "").await?;
    drop(echo);
    shown(&mesh, "onnection refused").await?;
    mesh.istiod.apply(&group("")).await?;
    shown(&mesh, "").await?;
    mesh.finish(&["the application is not healthy"])
}
