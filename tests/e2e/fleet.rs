//! A control plane of three members: who serves whom, and what is lost when one goes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::cluster::Cluster;
use tests::echo::Echo;
use tests::load::Load;
use tests::mesh::{last_words, service, strict};
use tests::workload::{Workload, WorkloadSpec};
use tests::{PATIENCE, eventually, http, istiod, text};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Proxies without an application, besides the two servers and the client.
const IDLE: u32 = 6;
/// Streams in all.
const STREAMS: u32 = IDLE + 3;
/// Requests a second.
const RATE: u32 = 50;
/// Bytes of configuration that a member has sent.
const SENT: &str = "pilot_xds_config_size_bytes_sum";

/// A mesh whose control plane has three members.
struct Fleet {
    cluster: Cluster,
    workloads: Vec<Workload>,
    _apps: [Echo; 2],
    vip: SocketAddr,
}

impl Fleet {
    async fn start(folder: &Path) -> anyhow::Result<Self> {
        let cluster = Cluster::start(folder, 3).await?;
        let others: String = (0..20).map(|i| service(&format!("other-{i}"))).collect();
        // Any member takes it.
        cluster.member(1)?.apply(&(strict().to_owned() + &service("echo") + &others))?;
        let apps = [Echo::start("echo-v1").await?, Echo::start("echo-v2").await?];
        let [v1, v2] = &apps;
        let mut specs = vec![
            WorkloadSpec::server("echo", "v1", v1.address),
            WorkloadSpec::server("echo", "v2", v2.address),
            WorkloadSpec::client("client"),
        ];
        specs.extend((0..IDLE).map(|i| WorkloadSpec::client(&format!("idle-{i}"))));
        let mut workloads = Vec::new();
        for (number, spec) in specs.iter().enumerate() {
            let member = cluster.member(number % 3)?;
            let token = member.istioctl(&["token", "create", "--service-account", &spec.service_account])?;
            workloads.push(Workload::start_with(folder, spec, token.trim())?);
        }
        let index = eventually(PATIENCE, "both servers are healthy", || async {
            let rows: Value =
                serde_json::from_str(&cluster.member(2)?.istioctl(&["services", "-o", "json"])?)?;
            let rows = rows.as_array().context("no list")?;
            let row = rows.iter().find(|row| text(row, "/hostname").starts_with("echo."));
            let row = row.context("no service echo")?;
            ensure!(row.get("healthy").and_then(Value::as_u64) == Some(2), "{row}");
            row.get("vipIndex").and_then(Value::as_u64).context("no index")
        })
        .await?;
        let client = workloads.get(2).context("no client")?;
        let vip = xds::translate::names::block_address(client.block, 20, u32::try_from(index)?);
        let vip = SocketAddr::from((vip.context("the block is too small")?, 80));
        eventually(PATIENCE, "the service answers", || async {
            let answer = http::get(vip, "echo", "/", &[]).await?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })
        .await?;
        Ok(Self { cluster, workloads, _apps: apps, vip })
    }

    /// The revision that each proxy has.
    async fn revisions(&self) -> anyhow::Result<BTreeMap<String, f64>> {
        let mut revisions = BTreeMap::new();
        for workload in &self.workloads {
            revisions
                .insert(workload.name.clone(), istiod::sum(&workload.metrics().await?, "xds_revision", ""));
        }
        Ok(revisions)
    }

    /// Whichever member is asked tells of the proxies of all, and previews a change for all.
    fn told_by_every_member(&self) -> anyhow::Result<()> {
        let change = tempfile::NamedTempFile::with_suffix(".yaml")?;
        std::fs::write(change.path(), service("previewed"))?;
        let file = change.path().display().to_string();
        let mut told = Vec::new();
        for place in 0..3 {
            let json = |args: &[&str]| -> anyhow::Result<Value> {
                Ok(serde_json::from_str(&self.cluster.member(place)?.istioctl(args)?)?)
            };
            let rows = json(&["proxy-status", "-o", "json"])?;
            let rows = rows.as_array().context("no list")?;
            let serving: BTreeSet<_> = rows.iter().filter_map(|row| row.get("member")?.as_u64()).collect();
            ensure!(rows.len() == STREAMS as usize && serving.len() == 3, "{rows:?}");
            for row in rows {
                let id = text(row, "/id");
                let config = json(&["proxy-config", "listener", id, "-o", "json"])?;
                ensure!(config.pointer("/listeners/0/name").is_some(), "{id}: {config}");
            }
            let preview = json(&["apply", "--dry-run", "-f", &file, "-o", "json"])?;
            let preview = preview.get("preview").context("no preview")?.clone();
            let proxies = preview.get("proxies").and_then(Value::as_array).map(Vec::len);
            let looked = (proxies, preview.get("partial").and_then(Value::as_bool));
            ensure!(looked == (Some(STREAMS as usize), Some(false)), "{preview}");
            told.push(preview);
        }
        ensure!(told.iter().all(|preview| Some(preview) == told.first()), "{told:?}");
        Ok(())
    }

    /// While a member is away, the others tell of all proxies that they serve, and that some may be missing.
    fn told_without_a_member(&self, survivor: usize) -> anyhow::Result<()> {
        let member = self.cluster.member(survivor)?;
        let rows: Value = serde_json::from_str(&member.istioctl(&["proxy-status", "-o", "json"])?)?;
        ensure!(rows.as_array().is_some_and(|rows| rows.len() == STREAMS as usize), "{rows}");
        let change = tempfile::NamedTempFile::with_suffix(".yaml")?;
        std::fs::write(change.path(), service("foretold"))?;
        let file = change.path().display().to_string();
        let preview: Value =
            serde_json::from_str(&member.istioctl(&["apply", "--dry-run", "-f", &file, "-o", "json"])?)?;
        let partial = preview.pointer("/preview/partial").and_then(Value::as_bool);
        ensure!(partial == Some(true), "{preview}");
        Ok(())
    }

    /// Commits a change by a member, and waits for every proxy.
    async fn change(&self, place: usize, name: &str) -> anyhow::Result<()> {
        let before = self.revisions().await?;
        eventually(PATIENCE, "a member takes writes", || async {
            self.cluster.member(place)?.apply(&service(name))
        })
        .await?;
        // A proxy that just moves is nobody's for a moment, so nobody waited for it; it is sent the change where it arrives.
        eventually(PATIENCE, "every proxy has the change", || async {
            let now = self.revisions().await?;
            ensure!(
                now.iter().all(|(name, revision)| Some(revision) > before.get(name)),
                "{now:?}, {before:?}"
            );
            Ok(())
        })
        .await
    }
}

/// Looks at the revision of every proxy all the time, until it is dropped: it only ever grows.
struct Watched {
    backward: Arc<Mutex<Vec<String>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Watched {
    fn start(fleet: &Fleet) -> Self {
        let watched =
            Self { backward: Arc::default(), stop: CancellationToken::new(), tasks: TaskTracker::new() };
        for workload in &fleet.workloads {
            let (name, stats) = (workload.name.clone(), workload.inbound(15090));
            let (backward, stop) = (watched.backward.clone(), watched.stop.clone());
            watched.tasks.spawn(async move {
                let mut looks = tokio::time::interval(std::time::Duration::from_millis(250));
                let mut newest = 0.0;
                while stop.run_until_cancelled(looks.tick()).await.is_some() {
                    let Ok(answer) = http::get(stats, "proxy", "/stats/prometheus", &[]).await else {
                        continue;
                    };
                    let revision = istiod::sum(&answer.text(), "xds_revision", "");
                    if revision < newest {
                        let words = format!("{name} went from {newest} to {revision}");
                        backward.lock().unwrap_or_else(PoisonError::into_inner).push(words);
                    }
                    newest = revision;
                }
            });
        }
        watched
    }

    async fn end(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let backward = self.backward.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ensure!(backward.is_empty(), "{backward:?}");
        Ok(())
    }
}

#[expect(clippy::print_stdout, reason = "what was sent again is part of the result")]
async fn lose_each_in_turn(fleet: &mut Fleet) -> anyhow::Result<()> {
    println!("streams of each member: {:?}", fleet.cluster.spread(STREAMS).await?);
    // A proxy that just moves is nobody's for a moment.
    eventually(PATIENCE, "every member tells of all", || async { fleet.told_by_every_member() }).await?;
    let initial: f64 = fleet.cluster.sums(SENT).await?.iter().sum::<f64>() / f64::from(STREAMS);
    let watched = Watched::start(fleet);
    let load = Load::start(fleet.vip, "echo", RATE);
    load.more(100).await?;
    for place in 0..3 {
        let (killed, survivor) = (place, (place + 1) % 3);
        let mut before = fleet.cluster.sums(SENT).await?;
        before.remove(killed);
        fleet.cluster.member_mut(killed)?.kill()?;
        let held = fleet.cluster.spread(STREAMS).await?;
        let after = fleet.cluster.sums(SENT).await?;
        let again: f64 = after.iter().sum::<f64>() - before.iter().sum::<f64>();
        println!(
            "without {}: {held:?}; {again} bytes were sent again, {initial:.0} to a new proxy",
            killed + 1
        );
        ensure!(again < initial * 0.02, "{again} bytes were sent again, {initial} to a new proxy");
        fleet.change(survivor, &format!("late-{place}")).await?;
        let told = || async { fleet.told_without_a_member(survivor) };
        eventually(PATIENCE, "a survivor tells of all that are served", told).await?;
        load.more(100).await?;
        fleet.cluster.member_mut(killed)?.restart().await?;
        fleet.cluster.voting(3).await?;
        println!("with {} again: {:?}", killed + 1, fleet.cluster.spread(STREAMS).await?);
    }
    // One that ends politely sends its streams elsewhere.
    fleet.cluster.member_mut(1)?.stop().await?;
    fleet.cluster.spread(STREAMS).await?;
    fleet.change(2, "last").await?;
    load.more(100).await?;
    let tally = load.stop().await;
    tally.no_failures()?;
    println!("{} requests, none failed; p99 {:.2?}", tally.total(), tally.percentile(0.99));
    watched.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_any_member_fails_no_request_sends_nothing_again_and_takes_no_proxy_back() -> anyhow::Result<()>
{
    let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
    let outcome = async { lose_each_in_turn(&mut Fleet::start(folder.path()).await?).await }.await;
    outcome.inspect_err(|_| last_words(folder.path()))
}
