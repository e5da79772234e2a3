//! One service of which one half is on a machine of the mesh and the other in a Consul catalog.

use anyhow::{Context, ensure};
use http::Method;
use registry::source::consul::client::Client;
use serde_json::{Value, json};
use tests::consul::real::{Consul, client};
use tests::echo::{Echo, Seen};
use tests::load::{Load, burst};
use tests::mesh::{Mesh, routes, strict, subsets};
use tests::workload::WorkloadSpec;
use tests::{PATIENCE, eventually};

const HOST: &str = "web.service.consul";
/// Both sides: name of the workload, and of its service account.
const MACHINE: &str = "web-machine";
const CATALOG: &str = "web-catalog";
/// Requests of one burst, and how many at the same time.
const BURST: (u32, usize) = (2000, 16);
/// Requests in a second while a side dies.
const RATE: u32 = 200;

/// The service, of which the workloads with its label are a part, beside those of the catalog.
fn entry() -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: web}}\nspec:\n  hosts: [{HOST}]\n  \
         location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  \
         workloadSelector: {{labels: {{app: web}}}}\n---\n"
    )
}

/// Half of the requests to each version, whoever has it.
fn halves() -> String {
    let to =
        |version: &str| format!("    - {{destination: {{host: {HOST}, subset: {version}}}, weight: 50}}\n");
    subsets(HOST, &["machine", "catalog"])
        + &routes(HOST, &format!("  - route:\n{}{}", to("machine"), to("catalog")))
}

/// All endpoints in turn, and one more try after a failure.
fn retried() -> String {
    let retries = "{attempts: 1, retryOn: \"connect-failure,refused-stream,unavailable,reset\"}";
    // The usual policy prefers whoever is faster at the moment.
    let in_turn = format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {HOST}}}\nspec:\n  host: {HOST}\n  \
         trafficPolicy: {{loadBalancer: {{simple: ROUND_ROBIN}}}}\n---\n"
    );
    in_turn
        + &routes(HOST, &format!("  - route: [{{destination: {{host: {HOST}}}}}]\n    retries: {retries}"))
}

/// The catalog, the mesh that follows it, and both sides.
struct World {
    mesh: Mesh,
    consul: Client,
    _server: Consul,
    _folder: tempfile::TempDir,
}

impl World {
    async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let server = Consul::start(folder.path()).await?;
        let sources = folder.path().join("sources.yaml");
        // In the namespace of the service's other half, so that both are one.
        let consul = json!({"addresses": [format!("http://{}", server.address)], "namespace": "default"});
        std::fs::write(&sources, format!("sources: {}\n", json!({ "consul": consul })))?;
        let flags = ["--sources", &sources.display().to_string()].map(str::to_owned);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut mesh = Mesh::start(&flags, &[], &["client"]).await?;
        mesh.istiod.apply(&(strict().to_owned() + &entry())).await?;
        for (name, app, version) in [(MACHINE, "web", "machine"), (CATALOG, "other", "")] {
            let labels = [("app", app), ("version", version)];
            let labels = labels.into_iter().filter(|(_, value)| !value.is_empty());
            let echo = Echo::start(name).await?;
            let spec = WorkloadSpec {
                name: name.to_owned(),
                service_account: name.to_owned(),
                labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
                forward: [(80, echo.address)].into(),
                flags: Vec::new(),
            };
            mesh.hold(name, echo);
            mesh.workload(&spec).await?;
            mesh.istiod.synced(&format!("{name}.default")).await?;
        }
        let world = Self { consul: client(server.address, "")?, mesh, _server: server, _folder: folder };
        world.register(CATALOG).await?;
        world.mesh.istiod.healthy(HOST, 2).await?;
        Ok(world)
    }

    /// Tells Consul of the side that is its own, with the account that it has, or one that it has not.
    async fn register(&self, account: &str) -> anyhow::Result<()> {
        let at = self.mesh.of(CATALOG)?.inbound(80);
        let meta = json!({"protocol": "http", "version": "catalog", "mesh-service-account": account});
        let body = json!({
            "Node": "elsewhere", "Address": at.ip(),
            "Service": {"ID": "w1", "Service": "web", "Address": at.ip(), "Port": at.port(), "Meta": meta},
            "Check": {"CheckID": "c1", "Name": "c", "Status": "passing", "ServiceID": "w1"},
        });
        let body = body.to_string().into_bytes();
        let done = self.consul.send(0, Method::PUT, "/v1/catalog/register", body).await?;
        ensure!(done.status == 200, "{}", done.reason());
        Ok(())
    }

    /// Sends a burst; the share of the catalog's side, in percent.
    async fn share(&self) -> anyhow::Result<f64> {
        let address = self.mesh.address("client", HOST, 80).await?;
        let counts = burst(address, HOST, "/", BURST.0, BURST.1).await?;
        let of = |name: &str| f64::from(counts.get(name).copied().unwrap_or_default());
        let all: u32 = counts.values().sum();
        ensure!(of(MACHINE) + of(CATALOG) >= f64::from(all), "somebody else answered: {counts:?}");
        Ok(of(CATALOG) * 100.0 / f64::from(all.max(1)))
    }

    /// Both sides answer, each as who it is, and know their caller.
    async fn identities(&self) -> anyhow::Result<()> {
        for side in [MACHINE, CATALOG] {
            let seen: Seen = eventually(PATIENCE, "both sides answer", || async {
                let seen: Seen = self.mesh.get("client", HOST, "/", &[]).await?.json()?;
                ensure!(seen.name == side, "{seen:?}");
                Ok(seen)
            })
            .await?;
            let told = seen.header("x-forwarded-client-cert");
            for part in [
                format!("By=spiffe://cluster.local/ns/default/sa/{side}"),
                "URI=spiffe://cluster.local/ns/default/sa/client".to_owned(),
            ] {
                ensure!(told.contains(&part), "{part} is not in {told}");
            }
        }
        Ok(())
    }

    /// One side dies under load and comes back: nobody sees it.
    async fn survives(&mut self, side: &str, other: &str) -> anyhow::Result<()> {
        let address = self.mesh.address("client", HOST, 80).await?;
        let load = Load::start(address, HOST, RATE);
        load.more(100).await?;
        self.mesh.of_mut(side)?.agent.kill()?;
        let (alone, before) = (self.mesh.echo(other)?, self.mesh.echo(other)?.requests());
        eventually(PATIENCE, "the other side serves everybody", || async {
            let answered = alone.requests() - before;
            ensure!(answered >= 400, "{other} answered {answered} requests");
            Ok(())
        })
        .await?;
        self.mesh.of_mut(side)?.restart()?;
        let (echo, had) = (self.mesh.echo(side)?, self.mesh.echo(side)?.requests());
        eventually(PATIENCE, "the side serves again", || async {
            ensure!(echo.requests() > had, "no request");
            Ok(())
        })
        .await?;
        load.stop().await.no_failures().with_context(|| format!("{side} died"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_a_service_is_in_consul_and_either_half_may_die() -> anyhow::Result<()> {
    let mut world = World::start().await?;
    world.mesh.istiod.apply_and_wait(&halves()).await?;
    let share = world.share().await?;
    println!("50/50 by weights: the catalog's side got {share:.2} % of {}", BURST.0);
    ensure!((share - 50.0).abs() <= 2.0, "{share}");
    world.identities().await?;

    world.mesh.istiod.apply_and_wait(&retried()).await?;
    let share = world.share().await?;
    println!("two endpoints of the same weight: the catalog's side got {share:.2} %");
    ensure!((share - 50.0).abs() <= 10.0, "{share}");
    world.survives(CATALOG, MACHINE).await?;
    world.survives(MACHINE, CATALOG).await?;
    world.identities().await?;

    // Who is not who the catalog says is not spoken with.
    world.register("somebody").await?;
    eventually(PATIENCE, "the false account is known", || async {
        let row: Value = world.mesh.istiod.service(HOST).await?;
        let before = world.mesh.echo(CATALOG)?.requests();
        for _ in 0..20 {
            let answer = world.mesh.get("client", HOST, "/", &[]).await?;
            ensure!(answer.status == 200, "{}: {row}", answer.text());
        }
        ensure!(world.mesh.echo(CATALOG)?.requests() == before, "it is spoken with");
        Ok(())
    })
    .await?;
    world.mesh.finish(&[])
}
