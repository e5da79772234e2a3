//! Whether a proxy stays as it is while everything around it changes: an hour at half of what it can do, ten endpoints a
//! second that come and go, another configuration every five seconds.
//!
//! `cargo build --release -p proxy && cargo bench -p tests --bench soak -- SECONDS` runs one `istio-proxy` with one worker
//! behind a control plane and in front of endpoints that are in this process, and prints a line a minute. Exits with 1
//! when a claim does not hold: a request failed, a resource was refused, an endpoint that was removed is still spoken to,
//! memory did not stay flat after the first ten minutes (the first sixth of a shorter run), the log has a warning.

use std::collections::VecDeque;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, ensure};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use proxy::xds::decode::Kind;
use tests::ads::{self, Ads};
use tests::fleet::{Fleet, Speaks};
use tests::paced::{Connected, Counts, GENERATION, Paced, Plan, Seen};
use tests::program::{Program, ours};
use tests::workload::free_port;
use tests::{PATIENCE, eventually, http};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::json::message_from_yaml;

/// How long, unless another time is asked for.
const HOUR: Duration = Duration::from_secs(3600);
/// Memory is let settle for so long, or for a sixth of a shorter run.
const SETTLING: Duration = Duration::from_secs(600);
/// Medians of memory over so many equal parts of the rest are compared.
const PARTS: usize = 6;
/// They differ by no more than this share.
const FLAT: f64 = 0.05;
/// What the proxy can do is measured for so long.
const MEASURED: Duration = Duration::from_secs(5);
/// Of what this process can send and answer, so much is asked of it at most.
const SPARE: f64 = 0.8;
/// One endpoint is removed and another one added this often.
const CHURN: Duration = Duration::from_millis(100);
/// The configuration changes this often.
const CHANGE: Duration = Duration::from_secs(5);
/// Clusters; every other one speaks HTTP/2.
const CLUSTERS: usize = 8;
/// Endpoints of each.
const ENDPOINTS: usize = 6;
/// An endpoint may be spoken to for so long after its removal was taken.
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main(flavor = "current_thread")]
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
async fn main() -> anyhow::Result<()> {
    let time = time()?;
    let folder = tempfile::Builder::new().prefix("soak-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let world = World::start(folder.path()).await?;
    let rate = world.half().await?;
    println!("{CLUSTERS} clusters of {ENDPOINTS} endpoints, {time:?} at {rate:.0} requests a second");
    let broken = soak(world, time, rate).await?;
    for claim in &broken {
        println!("BROKEN: {claim}");
    }
    ensure!(broken.is_empty(), "{} claims do not hold", broken.len());
    println!("every claim holds");
    Ok(())
}

/// How long the command line asks for.
fn time() -> anyhow::Result<Duration> {
    let told = std::env::args().skip(1).find(|word| !word.starts_with("--"));
    told.map_or(Ok(HOUR), |word| Ok(Duration::from_secs(word.parse().context("wanted: SECONDS")?)))
}

/// A proxy, what it is told, and where it sends.
struct World {
    proxy: Program,
    listener: SocketAddr,
    ads: Ads,
    fleet: Fleet,
    members: Vec<VecDeque<SocketAddr>>,
}

impl World {
    async fn start(folder: &std::path::Path) -> anyhow::Result<Self> {
        let at = || anyhow::Ok(SocketAddr::from(([127, 0, 0, 1], free_port()?)));
        let (listener, admin) = (at()?, at()?);
        let (ads, fleet) = (Ads::start().await?, Fleet::start().await?);
        let mut members = Vec::new();
        for number in 0..CLUSTERS {
            let of_cluster: VecDeque<_> = (0..ENDPOINTS).map(|_| fleet.add(speaks(number))).collect();
            ads.put(Kind::Cluster, &name(number), &cluster(&name(number), speaks(number))?);
            ads.put(Kind::Endpoints, &name(number), &endpoints(number, &of_cluster)?);
            members.push(of_cluster);
        }
        ads.put(Kind::Listener, "in", &self::listener(listener, 0)?);
        ads.put(Kind::Routes, "main", &routes(0, false)?);
        let file = folder.join("bootstrap.yaml");
        std::fs::write(&file, ads::bootstrap(ads.address, admin))?;
        let args = ["--bootstrap", &file.display().to_string(), "--concurrency", "1"].map(str::to_owned);
        let proxy = Program::start(&ours("istio-proxy")?, folder, "proxy", &args)?;
        eventually(PATIENCE, "the proxy is ready", || async {
            let answer = http::get(admin, "proxy", "/ready", &[]).await?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })
        .await
        .with_context(|| proxy.output())?;
        Ok(Self { proxy, listener, ads, fleet, members })
    }

    /// What is sent, at this rate.
    fn plan(&self, rate: f64) -> Plan {
        let mut connections = vec![Connected::Http1 { requests: u64::MAX }; 40];
        connections.extend([Connected::Http1 { requests: 50 }; 8]);
        connections.extend([Connected::Http2 { lanes: 8, requests: u64::MAX }; 4]);
        connections.extend([Connected::Http2 { lanes: 4, requests: 2000 }; 2]);
        let paths = (0..CLUSTERS).map(|number| format!("/s{number}/x?y=z"));
        let paths = paths.chain(["/weighted/x".to_owned()]).collect();
        Plan { address: self.listener, paths, connections, rate, may_be_refused: false }
    }

    /// Half of the requests that the proxy can answer in a second, by what its processor is busy with when lanes send as fast
    /// as they can; less where this process could not go along.
    #[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
    #[expect(clippy::cast_precision_loss, reason = "a number of requests")]
    async fn half(&self) -> anyhow::Result<f64> {
        let counts = Arc::new(Counts::default());
        let load = Paced::start(&self.plan(0.0), Arc::clone(&counts));
        let before = (Instant::now(), self.proxy.processor_time()?, counts.seen());
        // paced: what it can do is a rate over this time
        tokio::time::sleep_until(before.0 + MEASURED).await;
        let (took, busy) = (before.0.elapsed(), self.proxy.processor_time()? - before.1);
        let answered = counts.seen().since(&before.2).good as f64;
        let all = load.stop().await;
        ensure!(all.failed == 0, "{:?}", counts.words());
        let (sent, can) = (answered / took.as_secs_f64(), answered / busy.as_secs_f64());
        println!(
            "{sent:.0} requests a second came through, with {:.0} % of a processor: the proxy can do {can:.0}",
            100.0 * busy.div_duration_f64(took)
        );
        Ok((can / 2.0).min(sent * SPARE))
    }
}

/// Everything at once, and the claims that do not hold.
async fn soak(mut world: World, time: Duration, rate: f64) -> anyhow::Result<Vec<String>> {
    let counts = Arc::new(Counts::default());
    let load = Paced::start(&world.plan(rate), Arc::clone(&counts));
    let stop = CancellationToken::new();
    let members = std::mem::take(&mut world.members);
    let churned = stop.run_until_cancelled(churn(&world.ads, &world.fleet, members));
    let changed = stop.run_until_cancelled(change(&world, &counts));
    let watched = async {
        let samples = watch(&world, &counts, time).await;
        stop.cancel();
        samples
    };
    let (churned, changed, samples) = tokio::join!(churned, changed, watched);
    let seen = load.stop().await;
    let mut broken = Vec::new();
    let failures = [churned, changed].into_iter().flatten().filter_map(Result::err);
    broken.extend(failures.map(|error: anyhow::Error| format!("{error:#}")));
    broken.extend(world.ads.refused().into_iter().map(|refusal| format!("refused: {refusal}")));
    if seen.failed > 0 {
        broken.push(format!("{} of {} requests failed", seen.failed, seen.failed + seen.good));
        broken.extend(counts.words());
    }
    match samples {
        Ok(samples) => broken.extend(not_flat(&samples, time)),
        Err(error) => broken.push(format!("{error:#}")),
    }
    broken.extend(not_left(&world).await);
    let ended = world.proxy.stop().await;
    match ended {
        Ok(status) if status.success() => {}
        ended => broken.push(format!("the proxy ended with {ended:?}")),
    }
    let log = world.proxy.output();
    broken.extend(log.lines().filter(|l| l.contains(" WARN ") || l.contains("ERROR")).map(str::to_owned));
    Ok(broken)
}

/// Endpoints that were removed and are spoken to still.
async fn not_left(world: &World) -> Option<String> {
    let left = eventually(GRACE * 2, "removed endpoints are left", || async {
        let (all, left) = world.fleet.connections(GRACE);
        ensure!(left == 0, "{left} of {all} connections are to endpoints that were removed {GRACE:?} ago");
        Ok(())
    })
    .await;
    let longest = world.fleet.longest_after_removal();
    let late = (longest > GRACE).then(|| format!("an endpoint was asked {longest:?} after its removal"));
    left.err().map(|error| format!("{error:#}")).or(late)
}

/// Prints what happens; memory each second, in KiB.
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#[expect(clippy::cast_precision_loss, reason = "numbers of requests and KiB")]
async fn watch(world: &World, counts: &Counts, time: Duration) -> anyhow::Result<Vec<u64>> {
    let begun = Instant::now();
    let every = (time / 6).min(Duration::from_secs(60)).as_secs().max(1);
    let mut samples: Vec<u64> = Vec::new();
    let mut seconds = tokio::time::interval(Duration::from_secs(1));
    seconds.tick().await;
    let mut before: (Seen, Duration, Instant) = (counts.seen(), world.proxy.processor_time()?, begun);
    println!(
        "    time   requests   per s  failed  left out  p50 ms  p99 ms  cpu %  MiB  connections: opened  ended  to endpoints  to removed ones"
    );
    while begun.elapsed() < time {
        seconds.tick().await;
        samples.push(world.proxy.resident().context("the proxy has ended")?);
        if !(samples.len() as u64).is_multiple_of(every) {
            continue;
        }
        let now = (counts.seen(), world.proxy.processor_time()?, Instant::now());
        let (part, took) = (now.0.since(&before.0), now.2 - before.2);
        let recent = samples.len().saturating_sub(usize::try_from(every)?);
        let (all, left) = world.fleet.connections(GRACE);
        let mut line = String::new();
        write!(
            line,
            "{:>8} {:>10}",
            format!("{}:{:02}", samples.len() / 60, samples.len() % 60),
            now.0.good
        )?;
        write!(line, " {:>7.0} {:>7}", part.good as f64 / took.as_secs_f64(), now.0.failed)?;
        write!(line, " {:>9}", now.0.left_out)?;
        write!(line, " {:>7.2} {:>7.2}", millis(part.percentile(0.5)), millis(part.percentile(0.99)))?;
        write!(line, " {:>6.1}", 100.0 * (now.1 - before.1).div_duration_f64(took))?;
        write!(line, " {:>5.2}", median(samples.get(recent..).unwrap_or_default()) as f64 / 1024.0)?;
        println!("{line} {:>18} {:>6} {all:>13} {left:>16}", part.connections, part.closings);
        before = now;
    }
    Ok(samples)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn median(samples: &[u64]) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// Says how much memory there was in each part of the run, and that it is not flat when it is not.
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#[expect(clippy::cast_precision_loss, reason = "KiB")]
fn not_flat(samples: &[u64], time: Duration) -> Option<String> {
    let settling = usize::try_from(SETTLING.min(time / 6).as_secs()).unwrap_or_default();
    let settled = samples.get(settling..).unwrap_or_default();
    let medians: Vec<u64> = settled.chunks((settled.len() / PARTS).max(1)).take(PARTS).map(median).collect();
    let (Some(least), Some(most)) = (medians.iter().min(), medians.iter().max()) else {
        return Some("memory was not looked at".to_owned());
    };
    let spread = (most - least) as f64 / *least as f64;
    let told = format!(
        "medians of memory in {PARTS} parts after {settling} s, KiB: {medians:?}, {:.1} % apart",
        100.0 * spread
    );
    println!("{told}");
    (spread > FLAT).then_some(told)
}

/// Takes an endpoint away and adds another one, of one cluster after the other, for ever.
async fn churn(ads: &Ads, fleet: &Fleet, mut members: Vec<VecDeque<SocketAddr>>) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(CHURN);
    loop {
        for (number, of_cluster) in members.iter_mut().enumerate() {
            ticks.tick().await;
            of_cluster.push_back(fleet.add(speaks(number)));
            let removed = of_cluster.pop_front();
            let version = ads.put(Kind::Endpoints, &name(number), &endpoints(number, of_cluster)?);
            ads.taken(Kind::Endpoints, &name(number), version).await?;
            removed.into_iter().for_each(|endpoint| fleet.remove(endpoint));
        }
    }
}

/// Changes routes, then the listener, then the number of clusters and listeners, and begins again, for ever.
async fn change(world: &World, counts: &Counts) -> anyhow::Result<()> {
    let ads = &world.ads;
    let mut ticks = tokio::time::interval(CHANGE);
    ticks.tick().await;
    let another = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let mut generation = 0;
    let mut has_more = false;
    loop {
        generation += 1;
        ticks.tick().await;
        let version = ads.put(Kind::Routes, "main", &routes(generation, has_more)?);
        ads.taken(Kind::Routes, "main", version).await?;
        counts.generation.store(generation, Ordering::Relaxed);

        ticks.tick().await;
        let version = ads.put(Kind::Listener, "in", &listener(world.listener, generation)?);
        ads.taken(Kind::Listener, "in", version).await?;

        ticks.tick().await;
        has_more = !has_more;
        if has_more {
            // What is referred to comes first and goes last.
            let more = [world.fleet.add(Speaks::Http1)].into();
            ads.put(Kind::Cluster, &name(CLUSTERS), &cluster(&name(CLUSTERS), Speaks::Http1)?);
            let version = ads.put(Kind::Endpoints, &name(CLUSTERS), &endpoints(CLUSTERS, &more)?);
            ads.taken(Kind::Endpoints, &name(CLUSTERS), version).await?;
            ads.put(Kind::Routes, "main", &routes(generation, true)?);
            let version = ads.put(Kind::Listener, "another", &another_listener(another)?);
            ads.taken(Kind::Listener, "another", version).await?;
        } else {
            let version = ads.put(Kind::Routes, "main", &routes(generation, false)?);
            ads.taken(Kind::Routes, "main", version).await?;
            ads.remove(Kind::Listener, "another");
            ads.gone(Kind::Listener, "another").await?;
            ads.remove(Kind::Cluster, &name(CLUSTERS));
            ads.gone(Kind::Cluster, &name(CLUSTERS)).await?;
            ads.remove(Kind::Endpoints, &name(CLUSTERS));
        }
    }
}

fn name(cluster: usize) -> String {
    format!("outbound|80||s{cluster}.default.svc.cluster.local")
}

fn speaks(cluster: usize) -> Speaks {
    if cluster.is_multiple_of(2) { Speaks::Http1 } else { Speaks::Http2 }
}

fn cluster(name: &str, speaks: Speaks) -> anyhow::Result<Cluster> {
    let protocol = match speaks {
        Speaks::Http1 => "http_protocol_options: {}",
        Speaks::Http2 => "http2_protocol_options: {}",
    };
    let host = name.rsplit('|').next().unwrap_or_default();
    Ok(message_from_yaml(&format!(
        r"
name: {name}
type: EDS
eds_cluster_config: {{eds_config: {{ads: {{}}, resource_api_version: V3}}}}
connect_timeout: 5s
lb_policy: LEAST_REQUEST
typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    explicit_http_config: {{{protocol}}}
metadata: {{filter_metadata: {{istio: {{services: [{{name: {host}, host: {host}, namespace: default}}]}}}}}}
"
    ))?)
}

fn endpoints(cluster: usize, members: &VecDeque<SocketAddr>) -> anyhow::Result<ClusterLoadAssignment> {
    let mut yaml = format!("cluster_name: {}\nendpoints:\n- lb_endpoints:\n", name(cluster));
    for member in members {
        let (ip, port) = (member.ip(), member.port());
        writeln!(
            yaml,
            "  - endpoint: {{address: {{socket_address: {{address: {ip}, port_value: {port}}}}}}}"
        )?;
    }
    Ok(message_from_yaml(&yaml)?)
}

/// What every listener of this proxy does but for its address and name.
fn listening(name: &str, address: SocketAddr, timeout: u64, source: &str) -> anyhow::Result<Listener> {
    Ok(message_from_yaml(&format!(
        r"
name: {name}
address: {{socket_address: {{address: {}, port_value: {}}}}}
traffic_direction: OUTBOUND
filter_chains:
- filters:
  - name: envoy.filters.network.http_connection_manager
    typed_config:
      '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: {name}
      stream_idle_timeout: {timeout}s
      access_log:
      - name: file
        typed_config: {{'@type': type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /dev/null}}
      {source}
      http_filters:
      - name: envoy.filters.http.router
        typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
",
        address.ip(),
        address.port()
    ))?)
}

fn listener(address: SocketAddr, generation: u64) -> anyhow::Result<Listener> {
    let source = "rds: {route_config_name: main, config_source: {ads: {}, resource_api_version: V3}}";
    listening("in", address, 300 + generation % 100, source)
}

fn another_listener(address: SocketAddr) -> anyhow::Result<Listener> {
    let own = "route_config: {name: own, virtual_hosts: [{name: own, domains: ['*'], routes: [{match: {prefix: /}, direct_response: {status: 200}}]}]}";
    listening("another", address, 300, own)
}

/// A route to each cluster, one to two of them by weights that differ with the generation, which answers tell.
fn routes(generation: u64, has_more: bool) -> anyhow::Result<RouteConfiguration> {
    let mut yaml = format!(
        "name: main\nresponse_headers_to_add: [{{header: {{key: {GENERATION}, value: '{generation}'}}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}}]\nvirtual_hosts:\n- name: all\n  domains: ['*']\n  routes:\n"
    );
    for number in 0..CLUSTERS + usize::from(has_more) {
        let name = name(number);
        writeln!(yaml, "  - {{match: {{prefix: /s{number}/}}, route: {{cluster: '{name}', timeout: 10s}}}}")?;
    }
    let share = 10 + generation % 80;
    writeln!(
        yaml,
        "  - {{match: {{prefix: /weighted/}}, route: {{weighted_clusters: {{clusters: [{{name: '{}', weight: {share}}}, {{name: '{}', weight: {}}}]}}}}}}",
        name(0),
        name(1),
        100 - share
    )?;
    Ok(message_from_yaml(&yaml)?)
}
