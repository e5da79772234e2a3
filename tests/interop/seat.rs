//! A stock Envoy in one service's sidecar seat.

use std::collections::BTreeSet;

use anyhow::ensure;
use tests::echo::Seen;
use tests::envoy::Form;
use tests::load::{self, Load};
use tests::mesh::{Mesh, routes, strict, subsets};
use tests::workload::WorkloadSpec;
use tests::{PATIENCE, eventually, http};

/// Where an Envoy's seat forwards to is filled in when it is taken.
fn seat(app: &str, version: &str) -> WorkloadSpec {
    WorkloadSpec::server(app, version, ([127, 0, 0, 1], 1).into())
}

#[expect(clippy::print_stdout, reason = "the shares that were measured are part of the result")]
async fn takes_the_seat(form: Form) -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&[], &["echo-v1", "web-v1"], &["client", "stranger"]).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    mesh.seat_envoy(seat("echo", "v2"), form).await?;
    mesh.istiod.healthy("echo", 2).await?;
    let row = mesh.istiod.proxy("echo-v2.default").await?;
    let expected = if form == Form::Delta { "delta" } else { "sotw" };
    ensure!(tests::text(&row, "/protocol") == expected, "{row}");

    // Both ways over mTLS, each server told who called.
    for (from, to, header, server, caller) in [
        ("client", "echo", "v2", "echo-v2", "client"),
        ("echo-v2", "web", "v1", "web-v1", "echo"),
        ("echo-v2", "echo", "v1", "echo-v1", "echo"),
        ("echo-v2", "echo", "v2", "echo-v2", "echo"),
    ] {
        let by_version = |v: &str| {
            format!(
                "  - match: [{{headers: {{version: {{exact: {v}}}}}}}]\n    route: [{{destination: {{host: {to}, subset: {v}}}}}]\n"
            )
        };
        let yaml = subsets(to, &["v1", "v2"]) + &routes(to, &(by_version("v1") + &by_version("v2")));
        mesh.istiod.apply_and_wait(&yaml).await?;
        let answer = mesh.get(from, to, "/", &[("version", header)]).await?;
        ensure!(answer.status == 200, "{from} to {to} {header}: {answer:?}");
        let seen: Seen = answer.json()?;
        ensure!(seen.name == server, "{from} to {to} {header}: {seen:?}");
        let uri = format!("URI=spiffe://cluster.local/ns/default/sa/{caller}");
        ensure!(seen.header("x-forwarded-client-cert").contains(&uri), "{from} to {to} {header}: {seen:?}");
    }

    // Splits hold from our proxy to both, and from Envoy to both.
    let half = |host: &str| {
        routes(
            host,
            "  - route: [{destination: {host: echo, subset: v1}, weight: 80}, {destination: {host: echo, subset: v2}, weight: 20}]",
        )
    };
    mesh.istiod.apply_and_wait(&half("echo")).await?;
    for from in ["client", "echo-v2"] {
        let counts = load::burst(mesh.address(from, "echo", 80).await?, "echo", "/", 3000, 8).await?;
        let v2 = f64::from(counts.get("echo-v2").copied().unwrap_or_default()) / 30.0;
        println!("{expected}: of 3000 requests from {from}, {v2:.2} % went to the one behind Envoy");
        ensure!((17.0..23.0).contains(&v2) && counts.len() == 2, "{from}: {counts:?}");
    }

    // Envoy enforces what ours enforces.
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: echo}\nspec:\n  \
                selector: {matchLabels: {app: echo}}\n  action: DENY\n  rules:\n  \
                - from: [{source: {principals: [cluster.local/ns/default/sa/stranger]}}]\n";
    mesh.istiod.apply_and_wait(deny).await?;
    for _ in 0..20 {
        let denied = mesh.get("stranger", "echo", "/", &[]).await?;
        ensure!(denied.status == 403 && denied.text() == "RBAC: access denied", "{denied:?}");
        let allowed = mesh.get("client", "echo", "/", &[]).await?;
        ensure!(allowed.status == 200, "{allowed:?}");
    }
    let inbound = tests::workload::own_address(mesh.envoy("echo-v2")?.block);
    let plain = http::get((inbound, 80).into(), "echo", "/", &[]).await;
    ensure!(plain.is_err(), "Envoy answered plaintext under STRICT: {plain:?}");

    // And it has refused nothing of what it was given.
    mesh.envoy("echo-v2")?.refused_nothing().await?;
    let row = mesh.istiod.proxy("echo-v2.default").await?;
    ensure!(row.get("rejected") == Some(&serde_json::json!([])), "{row}");
    let status = mesh.istiod.istioctl_ok(&["proxy-status"]).await?;
    ensure!(!status.contains("NACKED") && !status.contains("STALE"), "{status}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_takes_a_seat_over_delta_xds() -> anyhow::Result<()> {
    takes_the_seat(Form::Delta).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_takes_a_seat_over_state_of_the_world_xds() -> anyhow::Result<()> {
    takes_the_seat(Form::Sotw).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoys_certificate_is_renewed_while_it_serves_and_calls() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&["--leaf-lifetime", "4"], &["web-v1"], &["client"]).await?;
    mesh.istiod.apply_and_wait(&(strict().to_owned() + &tests::mesh::service("echo"))).await?;
    mesh.seat_envoy(seat("echo", "v1"), Form::Delta).await?;
    mesh.istiod.healthy("echo", 1).await?;
    mesh.answers("client", "echo").await?;
    mesh.answers("echo-v1", "web").await?;
    let to_envoy = Load::start(mesh.address("client", "echo", 80).await?, "echo", 100);
    let from_envoy = Load::start(mesh.address("echo-v1", "web", 80).await?, "web", 100);
    let serials = tokio::sync::Mutex::new(BTreeSet::new());
    eventually(PATIENCE, "the certificate is renewed three times", || async {
        let mut serials = serials.lock().await;
        serials.insert(mesh.envoy("echo-v1")?.certificate().await?);
        ensure!(serials.len() >= 4, "{serials:?}");
        Ok(())
    })
    .await?;
    for load in [to_envoy, from_envoy] {
        load.more(100).await?;
        load.stop().await.no_failures()?;
    }
    // A connection that is made now is made with the newest certificate.
    mesh.answers("client", "echo").await?;
    mesh.envoy("echo-v1")?.refused_nothing().await?;
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_follows_changes_and_keeps_serving_while_istiod_is_killed() -> anyhow::Result<()> {
    for form in [Form::Delta, Form::Sotw] {
        let mut mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
        mesh.seat_envoy(WorkloadSpec::client("theirs"), form).await?;
        mesh.istiod.apply_and_wait(strict()).await?;
        mesh.answers("theirs", "echo").await?;
        let load = Load::start(mesh.address("theirs", "echo", 80).await?, "echo", 100);
        load.more(100).await?;
        mesh.istiod.kill()?;
        load.more(100).await?;
        mesh.istiod.restart().await?;
        mesh.istiod.synced("theirs.default").await?;
        load.more(100).await?;
        load.stop().await.no_failures()?;
        mesh.istiod.apply_and_wait(&routes("echo", "  - directResponse: {status: 299}")).await?;
        let answer = mesh.get("theirs", "echo", "/", &[]).await?;
        ensure!(answer.status == 299, "{form:?}: {answer:?}");
        mesh.envoy("theirs")?.refused_nothing().await?;
        mesh.finish(&["xds", "stream", "connect", "control plane"])?;
    }
    Ok(())
}
