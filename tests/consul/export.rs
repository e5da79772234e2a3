//! The mesh's services in a catalog: the same with a real Consul and with the fake, over sockets.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use ca::renewal::Clock;
use http::Method;
use registry::config;
use registry::snapshot::Snapshot;
use registry::source::consul::answer::{self, Condition, Instance, Node};
use registry::source::consul::client::{Client, Server as Place};
use registry::source::consul::drive::Connection;
use registry::source::consul::export::desired::desired;
use registry::source::consul::export::drive::{self, World};
use registry::source::consul::export::writer::{Call, Status, Time, Writer};
use registry::source::consul::export::{EPOCH, Settings};
use registry::state::{Batch, Revision, State};
use serde_json::{Value, json};
use tests::istiod::Istiod;
use tests::{PATIENCE, eventually};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use tests::consul::catalog::Catalog;
use tests::consul::fake::Server;
use tests::consul::real::{Consul, client};

/// A catalog to write into, and ways to look at it.
pub(crate) struct Peer {
    client: Client,
    pub(crate) connection: Connection,
    fake: Option<Server>,
    _real: Option<Consul>,
}

/// The catalog as it was.
enum Saved {
    Fake(Box<Catalog>),
    Real(Vec<u8>),
}

impl Peer {
    pub(crate) async fn real(folder: &Path) -> anyhow::Result<Self> {
        let consul = Consul::start(folder).await?;
        let (client, connection) = (client(consul.address, "")?, plain(consul.address));
        Ok(Self { client, connection, fake: None, _real: Some(consul) })
    }

    async fn fake() -> anyhow::Result<Self> {
        let fake = Server::start(Catalog::new("dc1")).await?;
        let (client, connection) = (client(fake.address, "")?, plain(fake.address));
        Ok(Self { client, connection, fake: Some(fake), _real: None })
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> anyhow::Result<answer::Answer> {
        Ok(self.client.send(0, Method::PUT, path, body.to_string().into_bytes()).await?)
    }

    /// What clients of Consul find under a name.
    pub(crate) async fn instances(&self, name: &str) -> anyhow::Result<Vec<Instance>> {
        let answer = self.client.get(0, &format!("/v1/health/service/{name}?dc=dc1&consistent")).await?;
        ensure!(answer.status == 200, "{}", answer.reason());
        Ok(answer::instances(&answer.body)?)
    }

    pub(crate) async fn node(&self, name: &str) -> anyhow::Result<Node> {
        let answer = self.client.get(0, &format!("/v1/catalog/node/{name}?dc=dc1&consistent")).await?;
        answer::node(&answer.body)?.with_context(|| format!("no node {name}"))
    }

    /// The entries of the mesh, and others of its node.
    pub(crate) async fn entries(&self) -> anyhow::Result<(usize, usize)> {
        let node = self.node("mesh-m1").await?;
        let ours = node.services.values().filter(|entry| entry.meta.contains_key(EPOCH)).count();
        Ok((ours, node.services.len() - ours))
    }

    async fn save(&self) -> anyhow::Result<Saved> {
        if let Some(fake) = &self.fake {
            let mut saved = None;
            fake.change(|catalog| saved = Some(Box::new(catalog.clone())));
            return Ok(Saved::Fake(saved.context("nothing")?));
        }
        Ok(Saved::Real(self.client.get(0, "/v1/snapshot").await?.body))
    }

    async fn restore(&self, saved: &Saved) -> anyhow::Result<()> {
        match (saved, &self.fake) {
            (Saved::Fake(saved), Some(fake)) => fake.change(|catalog| *catalog = Catalog::clone(saved)),
            (Saved::Real(saved), None) => {
                let done = self.client.send(0, Method::PUT, "/v1/snapshot", saved.clone()).await?;
                ensure!(done.status == 200, "{}", done.reason());
            }
            _ => anyhow::bail!("of another peer"),
        }
        Ok(())
    }
}

fn plain(address: std::net::SocketAddr) -> Connection {
    let servers = vec![Place { host: address.ip().to_string(), port: address.port() }];
    Connection { servers, token: None, tls: None }
}

#[expect(clippy::disallowed_methods, reason = "a test's one clock")]
fn clock() -> Clock {
    Arc::new(SystemTime::now)
}

fn now() -> Time {
    Time { at: Instant::now().into_std(), unix: ca::state::unix_seconds(clock()()) }
}

/// These services of namespace `shop`, each with one instance that is healthy or drains.
pub(crate) fn yaml(services: &[(String, String, bool)]) -> String {
    let entry = |(name, address, healthy): &(String, String, bool)| {
        let draining = if *healthy { "" } else { ", istio.io/draining: 'true'" };
        format!(
            "---\n{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: {name}, namespace: shop}}, \
             spec: {{hosts: [{name}.shop.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, \
             ports: [{{number: 80, name: http}}, {{number: 9000, name: admin}}], \
             endpoints: [{{address: {address}, ports: {{http: 8080}}, labels: {{version: v2{draining}}}, \
             serviceAccount: {name}, weight: 3}}]}}}}\n"
        )
    };
    services.iter().map(entry).collect()
}

fn mesh(services: &[(String, String, bool)]) -> anyhow::Result<Arc<Snapshot>> {
    let parsed = config::parse_in("shop", "mesh", &yaml(services));
    let (objects, _) = parsed.map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    let mut state = State::default();
    state.apply(Revision(1), &Batch::put_objects(1_000, "t", objects));
    Ok(Arc::new(Snapshot::build(&state)))
}

pub(crate) fn service(n: usize) -> (String, String, bool) {
    (format!("s{n:03}"), format!("10.3.{}.{}", n / 250, n % 250 + 1), true)
}

fn settings() -> Settings {
    let (tags, wait) = (["mesh".to_owned()].into(), Duration::from_secs(2));
    Settings { rate: 1_000, tags, wait, ..Settings::new("m1", "dc1", 1) }
}

/// A writer that runs until it is dropped.
struct Running {
    mesh: watch::Sender<Arc<Snapshot>>,
    status: watch::Receiver<Status>,
    _ends: DropGuard,
}

impl Running {
    fn start(
        connection: &Connection,
        epoch: u64,
        services: &[(String, String, bool)],
    ) -> anyhow::Result<Self> {
        let (mesh, snapshots) = watch::channel(mesh(services)?);
        let (told, status) = watch::channel(Status::default());
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let writer = Writer::new(settings(), epoch, fastrand::Rng::new(), now().at);
        let world = World { connection: connection.clone(), snapshots, clock: clock() };
        tasks.spawn(drive::write(writer, world, told, stop.clone()));
        Ok(Self { mesh, status, _ends: stop.drop_guard() })
    }

    /// Waits until its status is as it should be.
    async fn until(&self, what: &str, good: impl Fn(&Status) -> bool) -> anyhow::Result<Status> {
        let mut status = self.status.clone();
        let found = tokio::time::timeout(PATIENCE, status.wait_for(good)).await;
        let told = self.status.borrow().clone();
        Ok(found.map_err(|_| anyhow::anyhow!("not {what}: {told:?}"))??.clone())
    }
}

/// A writer that is moved by hand: so many of its transactions are done. The next one, which it has sent, is the answer.
async fn by_hand(
    peer: &Peer,
    epoch: u64,
    services: &[(String, String, bool)],
    transactions: usize,
) -> anyhow::Result<Call> {
    let (desired, _) = desired(&*mesh(services)?, &settings());
    let mut writer = Writer::new(settings(), epoch, fastrand::Rng::new(), now().at);
    let mut calls: VecDeque<Call> = writer.on_desired(desired, Vec::new(), now()).into();
    let mut done = 0;
    loop {
        let call = calls.pop_front().context("it has nothing more to do")?;
        let answer = match &call.body {
            Some(_) if done == transactions => return Ok(call),
            Some(body) => {
                done += 1;
                peer.put(&call.path, body).await?
            }
            // What waits for a change is asked without waiting.
            None => peer.client.get(0, call.path.split("&index=").next().unwrap_or_default()).await?,
        };
        calls.extend(writer.on_answer(call.id, &answer, now()));
    }
}

/// A service of the mesh is there within a second with all that is known of it, changes, and goes.
#[expect(clippy::print_stdout, reason = "the time that was measured is part of the result")]
async fn follows(peer: &Peer) -> anyhow::Result<()> {
    let writer = Running::start(&peer.connection, 1, &[service(1)])?;
    writer.until("synced", |status| status.synced && status.entries == 1).await?;
    let pay = |healthy| ("pay".to_owned(), "10.1.1.1".to_owned(), healthy);
    let began = Instant::now();
    writer.mesh.send(mesh(&[service(1), pay(true)])?)?;
    let found = eventually(PATIENCE, "the service is in the catalog", || async {
        peer.instances("pay").await?.pop().context("not yet")
    })
    .await?;
    let took = began.elapsed();
    println!("in the catalog after {took:.2?}");
    ensure!(took < Duration::from_secs(2), "{took:?}");
    ensure!((found.address.as_str(), found.ports[0].number) == ("10.1.1.1", 8080), "{found:?}");
    ensure!(found.condition == Condition::Passing && found.passing_weight == 3, "{found:?}");
    ensure!(found.tags.iter().eq(["mesh"]) && found.node == "mesh-m1", "{found:?}");
    for (key, value) in [
        ("mesh-owner", "m1"),
        ("mesh-epoch", "1"),
        ("mesh-namespace", "shop"),
        ("mesh-service-account", "pay"),
        ("port-admin", "9000"),
        ("version", "v2"),
    ] {
        ensure!(found.meta.get(key).is_some_and(|is| is == value), "{key}: {found:?}");
    }
    writer.mesh.send(mesh(&[service(1), pay(false)])?)?;
    eventually(PATIENCE, "it is not served any more", || async {
        let found = peer.instances("pay").await?.pop().context("gone")?;
        ensure!(found.condition == Condition::Critical, "{found:?}");
        Ok(())
    })
    .await?;
    writer.mesh.send(mesh(&[service(1)])?)?;
    eventually(PATIENCE, "it is gone", || async {
        ensure!(peer.instances("pay").await?.is_empty());
        Ok(())
    })
    .await?;
    ensure!(peer.instances("s001").await?.len() == 1);
    Ok(())
}

/// Two owners at once, one killed between its transactions, and a catalog that is restored to before.
#[expect(clippy::print_stdout, reason = "the time that was measured is part of the result")]
async fn survives(peer: &Peer) -> anyhow::Result<()> {
    let services: Vec<_> = (0..120).map(service).collect();
    // Others have services of the same name, and one on our own node.
    let foreign = json!({"Node": "other", "Address": "10.9.9.8", "Service": {"ID": "f1", "Service": "s001", "Port": 1}});
    ensure!(peer.put("/v1/catalog/register", &foreign).await?.status == 200);
    let first = by_hand(peer, 1, &services, 1).await?;
    let theirs = json!({"ID": "theirs", "Service": "theirs", "Address": "10.9.9.9", "Port": 1});
    let theirs =
        json!({"Node": "mesh-m1", "Address": "127.0.0.1", "SkipNodeUpdate": true, "Service": theirs});
    ensure!(peer.put("/v1/catalog/register", &theirs).await?.status == 200);
    ensure!(peer.put(&first.path, first.body.as_ref().context("none")?).await?.status == 200);
    let saved = peer.save().await?;
    let late = by_hand(peer, 1, &services, 2).await?;
    let (half, _) = peer.entries().await?;
    ensure!((60..120).contains(&half), "{half}");

    // It is killed there. The next owner begins; another of the first epoch knows a mesh that lacks most.
    let new = Running::start(&peer.connection, 2, &services)?;
    let old = Running::start(&peer.connection, 1, &services[..10])?;
    let whole = || async {
        let entries = peer.entries().await?;
        ensure!(entries == (120, 1), "{entries:?}");
        let node = peer.node("mesh-m1").await?;
        ensure!(node.meta[EPOCH] == "2", "{node:?}");
        ensure!(peer.node("other").await?.services.len() == 1);
        Ok(())
    };
    eventually(PATIENCE, "nothing of ours is missing", whole).await?;
    let later = |status: &Status| status.conflicts.iter().any(|told| told.contains("later epoch 2"));
    old.until("told of the later owner", later).await?;
    // What the first one had under way arrives now, and comes to nothing.
    let refused = peer.put(&late.path, late.body.as_ref().context("none")?).await?;
    ensure!(refused.status == 409, "{}", refused.reason());
    whole().await?;

    let written = new.status.borrow().written;
    peer.restore(&saved).await?;
    let began = Instant::now();
    eventually(PATIENCE, "nothing of ours is missing after the restore", whole).await?;
    println!("whole {:.2?} after the restore", began.elapsed());
    new.until("at rest again", |status| status.written > written && status.failure.is_none()).await?;
    whole().await
}

#[tokio::test]
async fn a_mesh_service_is_in_a_real_consul_within_a_second_and_goes_when_it_goes() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    Box::pin(follows(&Peer::real(folder.path()).await?)).await
}

#[tokio::test]
async fn a_mesh_service_is_in_the_fake_within_a_second_and_goes_when_it_goes() -> anyhow::Result<()> {
    Box::pin(follows(&Peer::fake().await?)).await
}

#[tokio::test]
async fn two_owners_a_kill_and_a_restore_cost_a_real_consul_nothing() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    Box::pin(survives(&Peer::real(folder.path()).await?)).await
}

#[tokio::test]
async fn two_owners_a_kill_and_a_restore_cost_the_fake_nothing() -> anyhow::Result<()> {
    Box::pin(survives(&Peer::fake().await?)).await
}

#[tokio::test]
async fn a_token_for_its_node_and_services_is_enough_and_is_read_again() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (consul, secured) = Consul::secured(folder.path()).await?;
    let admin = secured.client(consul.address)?;
    let rules = "node \"mesh-m1\" { policy = \"write\" } service_prefix \"\" { policy = \"write\" }";
    let (policy, token) = ("/v1/acl/policy", "/v1/acl/token");
    let secret = "c0ffee00-1111-2222-3333-444444444444";
    for (path, body) in [
        (policy, json!({"Name": "mesh", "Rules": rules})),
        (token, json!({"SecretID": secret, "Policies": [{"Name": "mesh"}]})),
    ] {
        let done = admin.send(0, Method::PUT, path, body.to_string().into_bytes()).await?;
        ensure!(done.status == 200, "{path}: {}", done.reason());
    }
    let file = folder.path().join("write-token");
    std::fs::write(&file, "00000000-1111-2222-3333-444444444444")?;
    let mut connection = plain(consul.address);
    (connection.token, connection.tls) = (Some(file.clone()), Some(secured.tls.clone()));
    let writer = Running::start(&connection, 1, &[service(1), service(2)])?;
    let told = writer.until("refused", |status| status.failure.is_some()).await?;
    ensure!(told.failure.as_deref().is_some_and(|told| told.contains("403")), "{told:?}");
    std::fs::write(&file, secret)?;
    writer.until("synced", |status| status.synced && status.written == 2).await?;
    let answer = admin.get(0, "/v1/health/service/s002?passing").await?;
    ensure!(answer::instances(&answer.body)?.len() == 1, "{}", answer.reason());
    Ok(())
}

#[tokio::test]
async fn istiod_writes_what_is_applied_into_a_real_consul_also_after_kill_9() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let peer = Peer::real(folder.path()).await?;
    let server = &peer.connection.servers[0];
    let sources = folder.path().join("sources.yaml");
    let consul = format!(
        "sources:\n  consul:\n    addresses: ['http://{}:{}']\n    export: {{owner: m1, prefix: mesh-}}\n",
        server.host, server.port
    );
    std::fs::write(&sources, consul)?;
    let mut istiod = Istiod::start(folder.path(), &["--sources", &sources.display().to_string()]).await?;
    istiod.apply(&yaml(&[service(1), service(2)])).await?;
    let written = || async {
        for name in ["mesh-s001", "mesh-s002"] {
            let found = peer.instances(name).await?;
            ensure!(found.len() == 1 && found[0].condition == Condition::Passing, "{name}: {found:?}");
        }
        Ok(())
    };
    eventually(PATIENCE, "both services are in the catalog", written).await?;
    // What is removed while it is away is gone soon after, and what is not stays.
    istiod.kill()?;
    written().await?;
    istiod.restart().await?;
    istiod.istioctl_ok(&["delete", "serviceentry", "s002", "-n", "shop"]).await?;
    eventually(PATIENCE, "one has gone, the other is there", || async {
        ensure!(peer.instances("mesh-s002").await?.is_empty());
        Ok(())
    })
    .await?;
    ensure!(peer.instances("mesh-s001").await?.len() == 1);
    // Its own services do not come back as Consul's.
    let services = istiod.istioctl_ok(&["services"]).await?;
    ensure!(!services.contains("service.consul"), "{services}");
    let metrics = tests::http::get(istiod.metrics, "istiod", "/metrics", &[]).await?.text();
    for line in [
        "istiod_consul_export_writing{",
        "istiod_consul_export_entries{",
        "istiod_consul_export_written_entries_total{",
    ] {
        ensure!(metrics.contains(line), "{line} is not among the metrics");
    }
    Ok(())
}
