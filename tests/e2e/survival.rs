//! Programs that die, end or are renewed, while requests go on.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::load::Load;
use tests::mesh::{Mesh, routes, service, strict, subsets};
use tests::workload::{Workload, WorkloadSpec};
use tests::{PATIENCE, eventually, text};

/// Bytes of configuration that istiod has sent.
const SENT: &str = "pilot_xds_config_size_bytes_sum";

/// Every object with its revision.
async fn objects(mesh: &Mesh) -> anyhow::Result<BTreeMap<String, String>> {
    let list: Value =
        serde_json::from_str(&mesh.istiod.istioctl_ok(&["get", "all", "-A", "-o", "json"]).await?)?;
    let items = list.get("items").and_then(Value::as_array).context("no items")?;
    let key = |item: &Value| {
        [text(item, "/kind"), text(item, "/metadata/namespace"), text(item, "/metadata/name")].join("/")
    };
    Ok(items.iter().map(|item| (key(item), text(item, "/metadata/resourceVersion").to_owned())).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_istiod_fails_no_request_loses_nothing_and_sends_proxies_nothing_again() -> anyhow::Result<()>
{
    let mut mesh = Mesh::start(&[], &["echo-v1", "echo-v2"], &["client"]).await?;
    let many: String = (0..40).map(|i| service(&format!("other-{i}"))).collect();
    let split = routes(
        "echo",
        "  - route: [{destination: {host: echo, subset: v1}, weight: 50}, {destination: {host: echo, subset: v2}, weight: 50}]",
    );
    mesh.istiod
        .apply_and_wait(&(strict().to_owned() + &many + &subsets("echo", &["v1", "v2"]) + &split))
        .await?;

    let before = mesh.istiod.metric(SENT, "").await?;
    mesh.workload(&WorkloadSpec::client("late")).await?;
    mesh.istiod.synced("late.default").await?;
    let initial = mesh.istiod.metric(SENT, "").await? - before;
    ensure!(initial > 10_000.0, "a new proxy was sent {initial} bytes");

    let load = Load::start(mesh.address("client", "echo", 80).await?, "echo", 300);
    load.more(300).await?;
    // What was acknowledged until the very moment of the kill counts.
    let mut acknowledged = BTreeMap::new();
    for i in 0..20 {
        let name = format!("late-{i}");
        acknowledged.insert(
            format!("ServiceEntry/default/{name}"),
            mesh.istiod.apply(&service(&name)).await?.to_string(),
        );
    }
    mesh.istiod.apply_and_wait(&service("settled")).await?;
    let expected = objects(&mesh).await?;
    ensure!(acknowledged.iter().all(|(k, v)| expected.get(k) == Some(v)), "{acknowledged:?} in {expected:?}");
    mesh.istiod.kill()?;
    load.more(300).await?;
    mesh.istiod.restart().await?;
    let found = objects(&mesh).await?;
    ensure!(found == expected, "after the restart: {found:?}, before: {expected:?}");

    for proxy in ["client.default", "late.default", "echo-v1.default", "echo-v2.default"] {
        mesh.istiod.synced(proxy).await?;
    }
    load.more(600).await?;
    let again = mesh.istiod.metric(SENT, "").await? / 4.0;
    println!(
        "a new proxy is sent {initial} bytes, one that reconnects {again}: {:.2} %",
        again * 100.0 / initial
    );
    ensure!(again < initial * 0.02, "a proxy that reconnects is sent {again} bytes of {initial}");
    let tally = load.stop().await;
    tally.no_failures()?;
    println!("{} requests around the kill, none failed", tally.total());

    // The new istiod goes on where the old one ended.
    mesh.istiod.apply_and_wait(&routes("echo", "  - directResponse: {status: 299}")).await?;
    let answer = mesh.get("client", "echo", "/", &[]).await?;
    ensure!(answer.status == 299, "{answer:?}");
    mesh.finish(&["xds", "stream", "connect", "control plane"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_under_load_and_no_request_fails() -> anyhow::Result<()> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the long form of this test is asked for by its one setting"
    )]
    let long: Option<u64> = std::env::var("MESH_RENEWAL_SECONDS").ok().and_then(|s| s.parse().ok());
    let (lifetime, seconds) = long.map_or(("3", 12), |seconds| ("20", seconds));
    let mesh = Mesh::start(&["--leaf-lifetime", lifetime], &["echo-v1", "echo-v2"], &["client"]).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    let load = Load::start(mesh.address("client", "echo", 80).await?, "echo", 500);
    let mut certificates = BTreeMap::<&str, BTreeSet<String>>::new();
    for _ in 0..seconds {
        load.more(500).await?;
        for name in ["client", "echo-v1", "echo-v2"] {
            certificates.entry(name).or_default().insert(mesh.of(name)?.certificate_since().await?);
        }
    }
    let tally = load.stop().await;
    tally.no_failures()?;
    for (name, seen) in &certificates {
        ensure!(seen.len() >= 3, "{name} had {seen:?}");
    }
    // Connections that are made now are made with certificates that are valid now.
    let counts = tests::load::burst(mesh.address("client", "echo", 80).await?, "echo", "/", 100, 8).await?;
    ensure!(counts.keys().all(|k| k.starts_with("echo")), "{counts:?}");
    let renewals: Vec<usize> = certificates.values().map(|seen| seen.len() - 1).collect();
    println!(
        "{} requests in {seconds} s with certificates of {lifetime} s, none failed; renewals seen: {renewals:?}; p50 {:.2?}, p99 {:.2?}, \
         slowest {:.2?}",
        tally.total(),
        tally.percentile(0.5),
        tally.percentile(0.99),
        tally.percentile(1.0)
    );
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_ends_drains_and_one_that_starts_again_needs_no_token() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&[], &["echo-v1", "echo-v2"], &["client"]).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    let load = Load::start(mesh.address("client", "echo", 80).await?, "echo", 300);
    load.more(300).await?;
    let status = mesh.of_mut("echo-v2")?.agent.stop().await?;
    ensure!(status.success(), "the agent ended with {status}");
    mesh.istiod.healthy("echo", 1).await?;
    let served = mesh.echo("echo-v2")?.requests();
    load.more(300).await?;
    ensure!(mesh.echo("echo-v2")?.requests() == served, "requests came after the agent had ended");

    mesh.of_mut("echo-v2")?.restart()?;
    mesh.istiod.healthy("echo", 2).await?;
    eventually(PATIENCE, "the restarted agent serves", || async {
        let now = mesh.echo("echo-v2")?.requests();
        ensure!(now > served + 20, "{now} requests, {served} before");
        Ok(())
    })
    .await?;
    let tally = load.stop().await;
    tally.no_failures()?;
    println!("{} requests around an agent's end and start, none failed", tally.total());
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_lets_one_workload_in_and_no_second() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &[], &[]).await?;
    let token = mesh.istiod.token("default", "client").await?;
    let first = Workload::start_with(mesh.folder(), &WorkloadSpec::client("first"), &token)?;
    mesh.istiod.synced("first.default").await?;
    let mut second = Workload::start_with(mesh.folder(), &WorkloadSpec::client("second"), &token)?;
    let status = second.agent.ended().await?;
    ensure!(
        !status.success() && second.agent.output().contains("token"),
        "{status}: {}",
        second.agent.output()
    );
    let mut third = Workload::start_with(mesh.folder(), &WorkloadSpec::client("third"), &tampered(&token)?)?;
    ensure!(!third.agent.ended().await?.success(), "{}", third.agent.output());
    ensure!(first.certificate_since().await.is_ok(), "the first went on");
    let (code, out, _) = mesh.istiod.istioctl(&["token", "list", "-o", "json"]).await?;
    ensure!(code == 0 && !out.contains(&token), "{out}");
    mesh.finish(&["token", "the agent ends", "certificate"])
}

/// The token with one character of its secret changed.
fn tampered(token: &str) -> anyhow::Result<String> {
    let middle = token.len() / 2;
    let (start, rest) = token.split_at_checked(middle).context("a short token")?;
    let first = rest.chars().next().context("a short token")?;
    let other = if first == 'a' { 'b' } else { 'a' };
    Ok(format!("{start}{other}{}", rest.get(first.len_utf8()..).unwrap_or_default()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_that_vanishes_is_no_longer_sent_requests() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&["--lease", "3"], &["echo-v1", "echo-v2"], &["client"]).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    let address = mesh.address("client", "echo", 80).await?;
    mesh.of_mut("echo-v2")?.agent.kill()?;
    // Until the control plane misses it, retries send most requests elsewhere.
    let counts = tests::load::burst(address, "echo", "/", 200, 4).await?;
    ensure!(counts.get("echo-v1").is_some_and(|n| *n >= 190), "{counts:?}");
    mesh.istiod.healthy("echo", 1).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    eventually(PATIENCE, "nothing is sent to the one that is gone", || async {
        let counts = tests::load::burst(address, "echo", "/", 100, 4).await?;
        ensure!(counts.get("echo-v1") == Some(&100), "{counts:?}");
        Ok(())
    })
    .await?;
    mesh.finish(&["echo-v2", "workload", "xds", "stream"])
}

/// When a workload's last good configuration was written.
fn kept(mesh: &Mesh, workload: &str) -> anyhow::Result<std::time::SystemTime> {
    Ok(std::fs::metadata(mesh.of(workload)?.data.join("configuration"))?.modified()?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workloads_that_start_without_the_control_plane_serve_as_before() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    mesh.answers("client", "echo").await?;
    let workloads = ["client", "echo-v1"];
    let mut before = Vec::new();
    for workload in workloads {
        let first = eventually(PATIENCE, "it is kept", || async { kept(&mesh, workload) }).await?;
        before.push((workload, first));
    }
    // What is written after this change has all that came before it.
    let address = mesh.address("client", "echo", 80).await?;
    mesh.istiod
        .apply_and_wait(
            &(service("more") + &routes("echo", "  - name: last\n    route: [{destination: {host: echo}}]")),
        )
        .await?;
    for (workload, first) in before {
        eventually(PATIENCE, "the change is kept", || async {
            ensure!(kept(&mesh, workload)? != first, "{workload} was not written");
            Ok(())
        })
        .await?;
    }
    mesh.istiod.kill()?;
    for workload in workloads {
        let workload = mesh.of_mut(workload)?;
        workload.agent.kill()?;
        workload.restart()?;
    }
    let answer = eventually(PATIENCE, "it serves as before", || async {
        let answer = tests::http::get(address, "echo", "/", &[]).await?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(answer)
    })
    .await?;
    let seen: tests::echo::Seen = answer.json()?;
    ensure!(seen.header("x-forwarded-client-cert").contains("sa/client"), "{seen:?}");

    // The control plane is no other to them than before, and tells what is new.
    mesh.istiod.restart().await?;
    for workload in workloads {
        mesh.istiod.synced(&format!("{workload}.default")).await?;
    }
    mesh.istiod.apply_and_wait(&routes("echo", "  - directResponse: {status: 299}")).await?;
    eventually(PATIENCE, "what is new counts", || async {
        let answer = tests::http::get(address, "echo", "/", &[]).await?;
        ensure!(answer.status == 299, "{answer:?}");
        Ok(())
    })
    .await?;
    mesh.finish(&[])
}
