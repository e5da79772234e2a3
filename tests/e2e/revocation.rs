//! Machines that are revoked, and machines that come back after their certificate has ended.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use ca::authority::BACK_DATE;
use ca::client::{Issuance, Presented, Remote, RequestError, connect};
use ca::identity::SpiffeId;
use ca::keystore::KeyStore;
use ca::node::NodeId;
use ca::seal::SealingKey;
use ca::svid::{Chain, Identity, PrivateKey};
use ca::tls::{ExpectedIdentities, client_config};
use ca::x509::{Facts, certificates_from_pem};
use serde_json::Value;
use tests::cluster::Cluster;
use tests::echo::Echo;
use tests::mesh::{Mesh, last_words, service, strict};
use tests::workload::{Workload, WorkloadSpec};
use tests::{PATIENCE, eventually, text};
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};
use wire::mesh::workload_service_client::WorkloadServiceClient;
use wire::mesh::{Members, WatchMembersRequest};

/// What is open of a revoked node ends within this time, on every member.
const CUT: Duration = Duration::from_secs(3);

/// The identity in an agent's folder: what somebody has who copied the disk.
fn stolen(data: &Path) -> anyhow::Result<Identity> {
    let store = KeyStore::open(data)?;
    let key = store.load("sealing-key")?.context("no key")?;
    let stored = store.sealed(SealingKey::from_bytes(&key)?).load("identity")?.context("no identity")?;
    let (own, roots) = std::str::from_utf8(&stored)?.split_once("roots:\n").context("no roots")?;
    let mut chain = certificates_from_pem(own.as_bytes())?.into_iter();
    let leaf = chain.next().context("no leaf")?;
    let chain =
        Chain { leaf, intermediates: chain.collect(), roots: certificates_from_pem(roots.as_bytes())? };
    let issued = Facts::parse(&chain.leaf)?.not_before + BACK_DATE;
    Ok(Identity::new(chain, PrivateKey::from_pem(own.as_bytes())?, issued)?)
}

fn node_of(identity: &Identity) -> anyhow::Result<NodeId> {
    Facts::parse(identity.chain.first().context("no leaf")?)?.node().context("no node")
}

/// Opens a stream of a member, with a certificate.
async fn watch(
    member: SocketAddr,
    identity: &Arc<Identity>,
) -> anyhow::Result<Result<Streaming<Members>, Status>> {
    let control_plane = SpiffeId::control_plane(&identity.spiffe_id.trust_domain());
    let (_, source) = tokio::sync::watch::channel(Arc::clone(identity));
    let tls = client_config(source, ExpectedIdentities::one(control_plane), &[b"h2"])?;
    let channel = connect(&member.to_string(), tls).await?;
    let answer = WorkloadServiceClient::new(channel).watch_members(WatchMembersRequest {}).await;
    Ok(answer.map(tonic::Response::into_inner))
}

/// Reads what was told before a stream's end, and why it has ended.
async fn end(stream: &mut Streaming<Members>) -> anyhow::Result<Status> {
    loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => anyhow::bail!("no reason is told"),
            Err(status) => return Ok(status),
        }
    }
}

fn ensure_told(status: &Status, node: NodeId) -> anyhow::Result<()> {
    ensure!(status.code() == Code::PermissionDenied, "{status}");
    let told = status.message();
    ensure!(told.contains(&format!("node {node} was revoked at ")) && told.contains("(stolen)"), "{told}");
    Ok(())
}

/// Whatever somebody tries with a certificate and its key at a member.
async fn refused_everywhere(
    member: SocketAddr,
    identity: &Arc<Identity>,
    node: NodeId,
) -> anyhow::Result<()> {
    let status = watch(member, identity).await?.err().context("a stream was opened")?;
    ensure_told(&status, node)?;
    let (new, own) = (PrivateKey::generate()?.request()?, identity.key.request()?);
    for (csr, presented) in [
        (new.der(), Presented::Certificate(Arc::clone(identity))),
        (own.der(), Presented::Ended(Arc::clone(identity))),
    ] {
        // A member that has just started may not know a leader to ask yet.
        let refused = eventually(PATIENCE, "the member decides", || async {
            match Remote::renew_only(vec![member.to_string()]).request(csr, &presented, None).await {
                Err(RequestError::Refused(why)) => Ok(why),
                Err(undecided) => Err(undecided.into()),
                Ok(_) => anyhow::bail!("{presented:?} was renewed"),
            }
        })
        .await?;
        ensure!(refused.contains(&format!("node {node} was revoked at ")), "{refused}");
    }
    Ok(())
}

/// Two machines of one service account, each behind a member of three.
struct Fleet {
    cluster: Cluster,
    workloads: Vec<Workload>,
    _apps: [Echo; 2],
}

impl Fleet {
    async fn start(folder: &Path) -> anyhow::Result<Self> {
        let cluster = Cluster::start(folder, 3).await?;
        cluster.member(1)?.apply(&(strict().to_owned() + &service("echo")))?;
        let apps = [Echo::start("echo-v1").await?, Echo::start("echo-v2").await?];
        let mut workloads = Vec::new();
        for (place, (version, app)) in ["v1", "v2"].into_iter().zip(&apps).enumerate() {
            let token = cluster.member(place)?.istioctl(&["token", "create", "--service-account", "echo"])?;
            let spec = WorkloadSpec::server("echo", version, app.address);
            workloads.push(Workload::start_with(folder, &spec, token.trim())?);
        }
        let fleet = Self { cluster, workloads, _apps: apps };
        fleet.healthy(2).await?;
        Ok(fleet)
    }

    fn rows(&self, place: usize, args: &[&str]) -> anyhow::Result<Vec<Value>> {
        let args = [args, &["-o", "json"]].concat();
        let rows: Value = serde_json::from_str(&self.cluster.member(place)?.istioctl(&args)?)?;
        Ok(rows.as_array().context("no list")?.clone())
    }

    async fn healthy(&self, endpoints: u64) -> anyhow::Result<()> {
        eventually(PATIENCE, "every member knows so many endpoints", || async {
            for place in 0..3 {
                let rows = self.rows(place, &["services"])?;
                let row = rows.iter().find(|row| text(row, "/hostname").starts_with("echo."));
                let row = row.context("no service echo")?;
                let number = |of: &str| row.get(of).and_then(Value::as_u64);
                ensure!(
                    (number("healthy"), number("endpoints")) == (Some(endpoints), Some(endpoints)),
                    "{row}"
                );
            }
            Ok(())
        })
        .await
    }

    fn xds(&self) -> anyhow::Result<Vec<SocketAddr>> {
        (0..3).map(|place| Ok(self.cluster.member(place)?.xds())).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stolen_certificate_is_refused_by_every_member_and_its_streams_end_after_revocation()
-> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
    let mut fleet = Fleet::start(folder.path()).await?;
    let outcome = revoked(&mut fleet).await;
    if outcome.is_err() {
        last_words(folder.path());
    }
    outcome
}

async fn revoked(fleet: &mut Fleet) -> anyhow::Result<()> {
    let [victim, other] = fleet.workloads.as_slice() else { anyhow::bail!("two workloads") };
    let (identity, honest) = (Arc::new(stolen(&victim.data)?), Arc::new(stolen(&other.data)?));
    let node = node_of(&identity)?;
    let known = fleet.rows(1, &["nodes", "list"])?;
    let row =
        known.iter().find(|row| text(row, "/id") == node.to_string()).context("the node is not known")?;
    let workload = text(row, "/workloads/0").to_owned();
    ensure!(workload.starts_with("echo-v1") && !text(row, "/joined").is_empty(), "{row}");

    // The thief has a stream of each member, and so has who was not robbed.
    let mut streams = Vec::new();
    for member in fleet.xds()? {
        for identity in [&identity, &honest] {
            let mut stream = watch(member, identity).await??;
            stream.message().await?.context("nothing is told")?;
            streams.push((member, stream));
        }
    }
    let (honest_streams, thief): (Vec<_>, Vec<_>) =
        streams.into_iter().enumerate().partition(|(number, _)| number % 2 == 1);
    fleet.cluster.member(2)?.istioctl(&["nodes", "revoke", "--workload", &workload, "--reason", "stolen"])?;
    let since = Instant::now();
    for (_, (member, mut stream)) in thief {
        let ended = tokio::time::timeout(CUT, end(&mut stream)).await;
        ensure_told(&ended.with_context(|| format!("{member} goes on"))??, node)?;
    }
    ensure!(since.elapsed() < CUT, "{:?}", since.elapsed());
    fleet.healthy(1).await?;
    eventually(PATIENCE, "the proxy of the revoked node has no stream of any member", || async {
        let rows = fleet.rows(0, &["proxy-status"])?;
        ensure!(
            rows.len() == 1 && text(rows.first().context("none")?, "/id").contains("echo-v2"),
            "{rows:?}"
        );
        Ok(())
    })
    .await?;
    let agent = &victim.agent;
    eventually(PATIENCE, "the revoked agent says why", || async {
        ensure!(agent.output().contains("was revoked at "), "{}", agent.output());
        Ok(())
    })
    .await?;
    for (_, (member, mut stream)) in honest_streams {
        while let Ok(more) = tokio::time::timeout(Duration::from_millis(1), stream.message()).await {
            ensure!(matches!(more, Ok(Some(_))), "{member} ended the stream of another node: {more:?}");
        }
    }
    for member in fleet.xds()? {
        refused_everywhere(member, &identity, node).await?;
        let csr = PrivateKey::generate()?.request()?;
        let presented = Presented::Certificate(Arc::clone(&honest));
        Remote::renew_only(vec![member.to_string()]).request(csr.der(), &presented, None).await?;
    }
    let rows = fleet.rows(0, &["nodes", "list"])?;
    let row = rows.iter().find(|row| text(row, "/id") == node.to_string()).context("it was forgotten")?;
    ensure!(text(row, "/revoked/reason") == "stolen" && !text(row, "/revoked/by").is_empty(), "{row}");
    ensure!(row.pointer("/workloads/0").is_none(), "{row}");
    let audit = fleet.cluster.member(0)?.istioctl(&["audit", "list"])?;
    ensure!(audit.contains("revoke node"), "{audit}");

    // It is in the log, and outlives every member.
    for place in 0..3 {
        fleet.cluster.member_mut(place)?.stop().await?;
    }
    for place in 0..3 {
        fleet.cluster.member_mut(place)?.launch_again()?;
    }
    for place in 0..3 {
        fleet.cluster.member(place)?.ready().await?;
    }
    for member in fleet.xds()? {
        refused_everywhere(member, &identity, node).await?;
    }
    Ok(())
}

/// Kills an agent, and waits until its certificate has ended `ago`.
async fn switched_off(workload: &mut Workload, ago: Duration) -> anyhow::Result<Identity> {
    workload.agent.kill()?;
    let identity = stolen(&workload.data)?;
    eventually(PATIENCE, "the certificate has ended", || async {
        #[expect(clippy::disallowed_methods, reason = "certificates end by the system's clock")]
        let now = SystemTime::now();
        ensure!(now > identity.not_after + ago, "it ends at {:?}", identity.not_after);
        Ok(())
    })
    .await?;
    Ok(identity)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_was_off_for_longer_than_its_certificate_comes_back_until_it_is_revoked()
-> anyhow::Result<()> {
    let mut mesh = Mesh::start(&["--leaf-lifetime", "4"], &[], &["away"]).await?;
    mesh.istiod.synced("away.default").await?;
    let before = switched_off(mesh.of_mut("away")?, Duration::from_secs(1)).await?;
    mesh.of_mut("away")?.restart()?;
    mesh.istiod.synced("away.default").await?;

    let again = switched_off(mesh.of_mut("away")?, Duration::from_secs(1)).await?;
    let node = node_of(&again)?;
    ensure!(again.not_after > before.not_after && node == node_of(&before)?, "it is another node");
    mesh.istiod.istioctl_ok(&["nodes", "revoke", &node.to_string(), "--reason", "lost"]).await?;
    // Revocations are in the state, not in the memory of a process.
    mesh.istiod.kill()?;
    mesh.istiod.restart().await?;
    let away = mesh.of_mut("away")?;
    away.restart()?;
    ensure!(!away.agent.ended().await?.success(), "it has come back");
    let said = away.agent.output();
    ensure!(said.contains(&format!("node {node} was revoked at ")) && said.contains("(lost)"), "{said}");
    mesh.finish(&["certificate", "the agent ends", "cannot", "istiod", "stream", "connect"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_was_off_for_longer_than_allowed_is_told_to_join_again() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&["--leaf-lifetime", "4", "--dormancy", "1"], &[], &["away"]).await?;
    mesh.istiod.synced("away.default").await?;
    switched_off(mesh.of_mut("away")?, Duration::from_secs(3)).await?;
    let away = mesh.of_mut("away")?;
    away.restart()?;
    ensure!(!away.agent.ended().await?.success(), "it has come back");
    let said = away.agent.output();
    let told = "ago, and a machine may come back within 1 s; make a token with `istioctl token create`";
    ensure!(said.contains(told), "{said}");
    mesh.finish(&["certificate", "the agent ends", "stream", "connect"])
}
