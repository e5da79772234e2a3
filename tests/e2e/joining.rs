//! Who may not join, and is told why.

use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use ca::authn::{Hash, JoinToken, Secret};
use ca::authority::BACK_DATE;
use ca::client::{Issuance, Presented, Remote};
use ca::svid::{Chain, Identity, PrivateKey};
use ca::x509::Facts;
use rustls_pki_types::CertificateSigningRequestDer;
use serde_json::json;
use tests::http;
use tests::istiod::Istiod;
use tests::mesh::Mesh;
use tests::workload::{Workload, WorkloadSpec};
use tests::{PATIENCE, eventually, text};

/// An agent that ends because it may not join; what it said.
async fn refused(mesh: &Mesh, name: &str, token: &str) -> anyhow::Result<String> {
    let mut agent = Workload::start_with(mesh.folder(), &WorkloadSpec::client(name), token)?.agent;
    ensure!(!agent.ended().await?.success(), "{name} has joined");
    Ok(agent.output())
}

fn changed(token: &str, change: impl FnOnce(&mut JoinToken)) -> anyhow::Result<String> {
    let mut token = JoinToken::parse(token)?;
    change(&mut token);
    Ok(token.to_text())
}

/// A token that nobody can use in time.
async fn short_lived(istiod: &Istiod) -> anyhow::Result<String> {
    let body = json!({ "namespace": "default", "serviceAccount": "late", "ttlSeconds": 1, "uses": 1 });
    let made: serde_json::Value = http::post(istiod.admin, "/api/v1/tokens", &body).await?.json()?;
    let since = tokio::time::Instant::now();
    eventually(PATIENCE, "the token's time is over", || async {
        // Its end is told in whole seconds.
        ensure!(since.elapsed() > Duration::from_secs(3), "only {:?}", since.elapsed());
        Ok(())
    })
    .await?;
    Ok(text(&made, "/token").to_owned())
}

/// A token for machines that call from there.
async fn bound(mesh: &Mesh, cidr: &str) -> anyhow::Result<String> {
    let args = ["token", "create", "--service-account", "near", "--cidr", cidr, "-o", "json"];
    let made: serde_json::Value = serde_json::from_str(&mesh.istiod.istioctl_ok(&args).await?)?;
    Ok(text(&made, "/token").to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_are_no_good_are_refused_with_the_reason() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &[], &[]).await?;
    let used = mesh.istiod.token("default", "first").await?;
    let first = Workload::start_with(mesh.folder(), &WorkloadSpec::client("first"), &used)?;
    mesh.istiod.synced("first.default").await?;
    let good = mesh.istiod.token("default", "other").await?;
    let (abroad, here) = (bound(&mesh, "10.99.0.0/16").await?, bound(&mesh, "127.0.0.0/8").await?);
    let list = mesh.istiod.istioctl_ok(&["token", "list"]).await?;
    ensure!(list.contains("10.99.0.0/16") && list.contains("127.0.0.0/8"), "{list}");
    let secret = Secret::random()?;
    for (name, token, reason) in [
        ("again", used, "is used up by another machine"),
        ("late", short_lived(&mesh.istiod).await?, "the join token has expired"),
        ("abroad", abroad, "the join token is not for machines that call from 127.0.0.1"),
        ("guessed", changed(&good, |token| token.secret = secret)?, "unknown join token"),
        (
            "elsewhere",
            changed(&good, |token| token.root_sha256 = Hash::of(b"other"))?,
            "expected fingerprint",
        ),
        ("cut", good.get(..good.len() - 20).unwrap_or_default().to_owned(), "damaged or incomplete"),
    ] {
        let said = refused(&mesh, name, &token).await?;
        ensure!(said.contains(reason), "{name}: {said}");
    }
    // None of them has used the token up.
    let last = Workload::start_with(mesh.folder(), &WorkloadSpec::client("good"), &good)?;
    mesh.istiod.synced("good.default").await?;
    let near = Workload::start_with(mesh.folder(), &WorkloadSpec::client("near"), &here)?;
    mesh.istiod.synced("near.default").await?;
    drop((first, last, near));
    mesh.finish(&["token", "certificate", "the agent ends", "wrong usage"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_machines_with_one_token_one_joins_and_the_other_is_told() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &[], &[]).await?;
    let token = mesh.istiod.token("default", "twin").await?;
    let mut twins = Vec::new();
    for name in ["twin-a", "twin-b"] {
        twins.push(Workload::start_with(mesh.folder(), &WorkloadSpec::client(name), &token)?);
    }
    let (joined, lost) = eventually(PATIENCE, "one has joined and one has ended", || {
        let ended: Vec<bool> = twins.iter_mut().map(|twin| twin.agent.check().is_err()).collect();
        async move {
            let lost = ended.iter().position(|ended| *ended).context("nobody has ended")?;
            ensure!(!ended.iter().all(|ended| *ended), "nobody has joined");
            Ok((1 - lost, lost))
        }
    })
    .await?;
    let (joined, lost) = (twins.get(joined).context("nobody")?, twins.get(lost).context("nobody")?);
    mesh.istiod.synced(&joined.name).await?;
    ensure!(lost.agent.output().contains("is used up by another machine"), "{}", lost.agent.output());
    mesh.finish(&["token", "certificate", "the agent ends"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_that_is_not_what_its_group_says_stays_out_and_learns_what_is_needed() -> anyhow::Result<()>
{
    let mut mesh = Mesh::start(&[], &["pay-v1"], &[]).await?;
    let group = "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {name: bank}\nspec:\n  \
                 metadata: {labels: {app: bank}}\n  template: {serviceAccount: bank}\n";
    mesh.istiod.apply(group).await?;
    let behind = "127.0.0.1:9".parse()?;
    let mut pretender = WorkloadSpec::server("pay", "v2", behind);
    pretender.service_account = "bank".to_owned();
    mesh.workload(&pretender).await?;
    let agent = &mesh.of(&pretender.name)?.agent;
    eventually(PATIENCE, "the agent is told", || async {
        let reason = "those of WorkloadGroup default/bank are needed: app=bank";
        ensure!(agent.output().contains(reason), "{}", agent.output());
        Ok(())
    })
    .await?;
    mesh.istiod.healthy("pay", 1).await?;
    mesh.finish(&["cannot register"])
}

/// When a certificate was made.
fn issued(chain: &Chain) -> anyhow::Result<SystemTime> {
    Ok(Facts::parse(&chain.leaf)?.not_before + BACK_DATE)
}

/// Asks for a certificate as a machine does that joins.
async fn certified(token: &str, csr: &CertificateSigningRequestDer<'static>) -> anyhow::Result<Chain> {
    let mut remote = Remote::with_token(JoinToken::parse(token)?);
    Ok(remote.request(csr, &Presented::Initial, None).await?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_was_overheard_gives_nobody_else_a_certificate() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &[], &[]).await?;
    let created =
        mesh.istiod.istioctl_ok(&["token", "create", "--service-account", "web", "-o", "json"]).await?;
    let created: serde_json::Value = serde_json::from_str(&created)?;
    let (id, token) = (text(&created, "/id"), text(&created, "/token"));
    let (own, of_listener) = (PrivateKey::generate()?, PrivateKey::generate()?);
    let csr = own.request()?;
    let chain = certified(token, csr.der()).await?;
    let now = issued(&chain)?;
    Identity::new(chain, own, now)?;

    // The same bytes again: whoever has not the key can do nothing with the answer, and a key of one's own comes late.
    let replayed = certified(token, csr.der()).await?;
    let useless = Identity::new(replayed, of_listener.clone(), now);
    ensure!(useless.is_err(), "a certificate of another's key was taken: {useless:?}");
    let late = certified(token, of_listener.request()?.der()).await.err().context("two keys for one use")?;
    ensure!(late.to_string().contains("is used up by another machine"), "{late:#}");
    mesh.istiod.istioctl_ok(&["token", "revoke", id]).await?;
    let revoked = certified(token, csr.der()).await.err().context("a revoked token was taken")?;
    ensure!(revoked.to_string().contains("unknown join token: it was revoked"), "{revoked:#}");
    mesh.finish(&[])
}

/// A request that asks for these names, and to be an authority.
fn wishes(
    key: &rcgen::KeyPair,
    dns: &[&str],
    uris: &[&str],
) -> anyhow::Result<CertificateSigningRequestDer<'static>> {
    let mut wishes =
        rcgen::CertificateParams::new(dns.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())?;
    for name in uris {
        wishes.subject_alt_names.push(rcgen::SanType::URI((*name).try_into()?));
    }
    wishes.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    Ok(wishes.serialize_request(key)?.der().clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_for_names_of_others_is_refused_and_told_which() -> anyhow::Result<()> {
    const OWN: &str = "spiffe://cluster.local/ns/default/sa/web";
    const BANK: &str = "spiffe://cluster.local/ns/default/sa/bank";
    let mesh = Mesh::start(&[], &[], &[]).await?;
    let token = mesh.istiod.token("default", "web").await?;
    let key = rcgen::KeyPair::generate()?;
    let foreign = wishes(&key, &["istiod.istio-system.svc"], &[OWN, BANK])?;
    let told = format!("names that are not `{OWN}`'s: DNS:istiod.istio-system.svc, URI:{BANK}");
    let refused = certified(&token, &foreign).await.err().context("names of others were given")?;
    ensure!(refused.to_string().contains(&told), "{refused:#}");

    // The token is not used up; who asks for its own name, as agents of Istio do, gets that and nothing else.
    let chain = certified(&token, &wishes(&key, &[], &[OWN])?).await?;
    let facts = Facts::parse(&chain.leaf)?;
    ensure!(facts.uris == [OWN] && facts.dns.is_empty() && facts.ips.is_empty() && !facts.is_ca, "{facts:?}");
    // With a certificate nobody becomes somebody else either.
    let now = issued(&chain)?;
    let identity = Identity::new(chain, PrivateKey::from_pem(key.serialize_pem().as_bytes())?, now)?;
    let presented = Presented::Certificate(std::sync::Arc::new(identity));
    let mut remote = Remote::renew_only(vec![mesh.istiod.xds.to_string()]);
    let next = rcgen::KeyPair::generate()?;
    let refused = remote.request(&wishes(&next, &[], &[BANK])?, &presented, None).await;
    let refused = refused.err().context("the name of another was given")?.to_string();
    ensure!(refused.contains(&format!("names that are not `{OWN}`'s: URI:{BANK}")), "{refused}");
    let renewed = remote.request(&wishes(&next, &[], &[OWN])?, &presented, None).await?;
    ensure!(Facts::parse(&renewed.leaf)?.uris == [OWN]);
    mesh.finish(&[])
}
