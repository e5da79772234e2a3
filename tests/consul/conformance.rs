//! The same conversation with a real Consul and with the fake: what the fake says, Consul says too.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use http::Method;
use registry::source::consul::answer::{self, Answer, Condition};
use registry::source::consul::client::Client;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::world::registration;
use tests::consul::catalog::Catalog;
use tests::consul::fake::Server;
use tests::consul::real::{Consul, client};
use tests::{PATIENCE, eventually};

/// Connections that Consul takes of an address, unless `limits.http_max_conns_per_client` says otherwise.
const CONNECTIONS: usize = 200;

struct Peer(Client);

impl Peer {
    async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.0.get(0, path).await.with_context(|| path.to_owned())
    }

    async fn put(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        Ok(self.0.send(0, Method::PUT, path, body.to_string().into_bytes()).await?)
    }

    async fn register(&self, body: &Value) -> anyhow::Result<()> {
        let answer = self.put("/v1/catalog/register", body).await?;
        ensure!(answer.status == 200, "{body}: {}", answer.reason());
        Ok(())
    }

    async fn node(&self, name: &str) -> anyhow::Result<Option<answer::Node>> {
        Ok(answer::node(&self.get(&format!("/v1/catalog/node/{name}?dc=dc1&consistent")).await?.body)?)
    }

    async fn index(&self, path: &str) -> anyhow::Result<u64> {
        self.get(path).await?.index.context("no index")
    }
}

/// What the source and the writer rely on.
async fn conform(client: Client) -> anyhow::Result<()> {
    let peer = Peer(client);
    listing(&peer).await?;
    health(&peer).await?;
    Box::pin(blocking(&peer)).await?;
    going(&peer).await?;
    writing(&peer).await?;
    Box::pin(claiming(&peer)).await
}

async fn listing(peer: &Peer) -> anyhow::Result<()> {
    let list = peer.get("/v1/catalog/services?dc=dc1&stale").await?;
    ensure!(list.known_leader == Some(true) && !list.filtered, "{list:?}");
    ensure!(list.last_contact < Duration::from_secs(5), "{list:?}");
    ensure!(answer::services(&list.body)?.contains_key("consul"));
    let wrong = peer.get("/v1/catalog/services?dc=nowhere").await?;
    ensure!(wrong.status == 500 && wrong.reason().contains("No path to datacenter"), "{}", wrong.reason());
    let both = peer.get("/v1/catalog/services?stale&consistent").await?;
    ensure!(both.status == 400, "{}", both.reason());
    let nobody = peer.get("/v1/health/service/nobody?dc=dc1&consistent").await?;
    ensure!(nobody.index.is_some_and(|index| index > 0), "{nobody:?}");
    ensure!(answer::instances(&nobody.body)?.is_empty());
    Ok(())
}

async fn health(peer: &Peer) -> anyhow::Result<()> {
    let mut body = registration("web", "w1", "10.0.0.1", "passing");
    body["Service"]["Meta"] = json!({"version": "v1"});
    body["Service"]["Weights"] = json!({"Passing": 7, "Warning": 2});
    peer.register(&body).await?;
    peer.register(&registration("web", "w2", "", "warning")).await?;
    let all = answer::instances(&peer.get("/v1/health/service/web?dc=dc1&stale").await?.body)?;
    ensure!(all.len() == 2, "{all:?}");
    ensure!(
        all[0].meta["version"] == "v1" && all[0].passing_weight == 7 && all[0].warning_weight == 2,
        "{all:?}"
    );
    ensure!(all[0].ports[0].number == 8080 && all[0].tags.len() == 2, "{all:?}");
    ensure!(all[1].address == "10.255.0.1" && all[1].condition == Condition::Warning, "{all:?}");
    let passing = peer.get("/v1/health/service/web?passing").await?;
    ensure!(answer::instances(&passing.body)?.len() == 1);
    let tags = answer::services(&peer.get("/v1/catalog/services").await?.body)?;
    ensure!(tags["web"].iter().eq(["a", "b"]), "{tags:?}");
    Ok(())
}

async fn blocking(peer: &Peer) -> anyhow::Result<()> {
    let path = "/v1/health/service/web?dc=dc1&stale";
    let index = peer.index(path).await?;
    // The same again is no change.
    peer.register(&registration("web", "w2", "", "warning")).await?;
    ensure!(peer.index(path).await? == index, "an idempotent registration moved the index");
    let began = Instant::now();
    let quiet = peer.get(&format!("{path}&index={index}&wait=300ms")).await?;
    ensure!(quiet.index == Some(index), "{quiet:?}");
    ensure!(began.elapsed() >= Duration::from_millis(290), "it did not wait");
    let (waiting, change) =
        (format!("{path}&index={index}&wait=20s"), registration("web", "w2", "", "critical"));
    let (woken, changed) = tokio::join!(peer.get(&waiting), async {
        // Registered only after the question is known to wait, or before: both wake it.
        peer.register(&change).await
    });
    changed?;
    let woken = woken?;
    ensure!(woken.index.is_some_and(|next| next > index), "{woken:?}");
    let all = answer::instances(&woken.body)?;
    ensure!(all[1].condition == Condition::Critical, "{all:?}");
    ensure!(began.elapsed() < Duration::from_secs(15), "it slept on");
    // An index that is long past answers at once.
    peer.get(&format!("{path}&index=1&wait=20s")).await?;
    ensure!(began.elapsed() < Duration::from_secs(15));
    Ok(())
}

async fn going(peer: &Peer) -> anyhow::Result<()> {
    let before = peer.index("/v1/health/service/web").await?;
    let gone = peer.put("/v1/catalog/deregister", &json!({"Node": "node-w2", "ServiceID": "w2"})).await?;
    ensure!(gone.status == 200, "{}", gone.reason());
    let one = peer.get("/v1/health/service/web?consistent").await?;
    ensure!(
        answer::instances(&one.body)?.len() == 1 && one.index.is_some_and(|index| index > before),
        "{one:?}"
    );
    peer.put("/v1/catalog/deregister", &json!({"Node": "node-w1"})).await?;
    let none = peer.get("/v1/health/service/web").await?;
    ensure!(
        answer::instances(&none.body)?.is_empty() && none.index.is_some_and(|index| index > before),
        "{none:?}"
    );
    ensure!(!answer::services(&peer.get("/v1/catalog/services").await?.body)?.contains_key("web"));
    Ok(())
}

async fn writing(peer: &Peer) -> anyhow::Result<()> {
    let node = json!({"Node": {"Verb": "set", "Node": {"Node": "mesh-x", "Address": "127.0.0.1"}}});
    let service = |id: &str| {
        let service = json!({"ID": id, "Service": "pay", "Address": "10.1.1.1", "Port": 80, "Meta": {"mesh-owner": "x"}});
        json!({"Service": {"Verb": "set", "Node": "mesh-x", "Service": service}})
    };
    let check = json!({"Check": {"Verb": "set", "Check": {
        "Node": "mesh-x", "CheckID": "mesh:p1", "Name": "m", "Status": "passing", "ServiceID": "p1",
    }}});
    let done = peer.put("/v1/txn", &json!([node, service("p1"), check])).await?;
    ensure!(done.status == 200, "{}", done.reason());
    let seen = peer.node("mesh-x").await?.context("no node")?.services;
    ensure!(seen.len() == 1 && seen["p1"].meta["mesh-owner"] == "x" && seen["p1"].port == 80, "{seen:?}");
    let many: Vec<Value> = (0..65).map(|n| service(&format!("p{n}"))).collect();
    let refused = peer.put("/v1/txn", &Value::from(many)).await?;
    ensure!(refused.status == 413, "{}", refused.reason());
    let unknown =
        json!([{"Service": {"Verb": "set", "Node": "no-such-node", "Service": {"ID": "a", "Service": "a"}}}]);
    ensure!(peer.put("/v1/txn", &unknown).await?.status == 409);
    let delete =
        |service: Value| json!([{"Service": {"Verb": "delete", "Node": "mesh-x", "Service": service}}]);
    let nameless = peer.put("/v1/txn", &delete(json!({"ID": "p1"}))).await?;
    ensure!(nameless.status == 409, "{}", nameless.reason());
    let delete = delete(json!({"ID": "p1", "Service": "pay"}));
    let deleted = peer.put("/v1/txn", &delete).await?;
    ensure!(deleted.status == 200, "{}", deleted.reason());
    ensure!(peer.node("mesh-x").await?.context("no node")?.services.is_empty());
    Ok(())
}

/// A node is changed only by who knows its last change, and what happens to its services is none.
async fn claiming(peer: &Peer) -> anyhow::Result<()> {
    let claim = |index: u64, epoch: &str| {
        let node =
            json!({"Node": "mesh-y", "Address": "127.0.0.1", "Meta": {"epoch": epoch}, "ModifyIndex": index});
        json!({"Node": {"Verb": "cas", "Node": node}})
    };
    let service = |id: &str, address: &str| {
        let service = json!({"ID": id, "Service": "pay", "Address": address, "Port": 80});
        json!({"Service": {"Verb": "set", "Node": "mesh-y", "Service": service}})
    };
    let path = "/v1/catalog/node/mesh-y?dc=dc1&consistent";
    ensure!(peer.node("mesh-y").await?.is_none());
    let before = peer.index(path).await?;
    ensure!(peer.put("/v1/txn?dc=dc1", &json!([claim(0, "1")])).await?.status == 200);
    let index = peer.node("mesh-y").await?.context("no node")?.index;
    ensure!(index > 0 && peer.index(path).await? > before);
    let again = peer.put("/v1/txn?dc=dc1", &json!([claim(0, "2")])).await?;
    ensure!(again.status == 409 && answer::refusals(&again.body)?[0].0 == 0, "{}", again.reason());
    // The same again, with a service: whoever waits for a change of the node sees it, and its index stays.
    let (waiting, body) = (
        format!("{path}&index={}&wait=20s", peer.index(path).await?),
        json!([claim(index, "1"), service("p1", "10.1.1.1")]),
    );
    let (seen, done) = tokio::join!(peer.get(&waiting), peer.put("/v1/txn?dc=dc1", &body));
    ensure!(done?.status == 200);
    let seen = answer::node(&seen?.body)?.context("no node")?;
    ensure!(seen.index == index && seen.services.contains_key("p1"), "{seen:?}");
    // One operation is refused: none is done, and it is told which.
    let body = json!([claim(index, "1"), service("p2", "10.1.1.2"), service("p3", "0.0.0.0")]);
    let refused = peer.put("/v1/txn?dc=dc1", &body).await?;
    ensure!(refused.status == 409, "{}", refused.reason());
    let told: Vec<usize> =
        answer::refusals(&refused.body)?.into_iter().map(|(position, _)| position).collect();
    ensure!(told == [2], "{told:?}");
    ensure!(peer.put("/v1/txn?dc=dc1", &json!([claim(index, "2")])).await?.status == 200);
    let late = peer.put("/v1/txn?dc=dc1", &json!([claim(index, "1"), service("p4", "10.1.1.4")])).await?;
    ensure!(late.status == 409 && answer::refusals(&late.body)?[0].0 == 0, "{}", late.reason());
    let left = peer.node("mesh-y").await?.context("no node")?;
    ensure!(left.meta["epoch"] == "2" && left.services.len() == 1, "{left:?}");
    Ok(())
}

#[tokio::test]
async fn a_real_consul_does_what_the_source_relies_on() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let consul = Consul::start(folder.path()).await?;
    Box::pin(conform(client(consul.address, "")?)).await
}

#[tokio::test]
async fn a_real_consul_with_certificates_and_tokens_does_the_same_over_http2() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (consul, secured) = Consul::secured(folder.path()).await?;
    Box::pin(conform(secured.client(consul.address)?)).await?;
    std::fs::write(&secured.token, "00000000-1111-2222-3333-444444444444")?;
    let refused = secured.client(consul.address)?.get(0, "/v1/catalog/services").await?;
    ensure!(refused.status == 403, "{}", refused.reason());
    let stranger = client(consul.address, "")?;
    ensure!(stranger.get(0, "/v1/catalog/services").await.map_or(true, |answer| answer.status != 200));
    Ok(())
}

#[tokio::test]
async fn whose_connections_a_real_consul_does_not_take_is_told_why() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let consul = Consul::start(folder.path()).await?;
    let many = Arc::new(client(consul.address, "")?);
    let waiting = Mutex::new(JoinSet::new());
    eventually(PATIENCE, "no connection is left", || async {
        {
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // A Consul that has just started may have answered some at once, that it has no leader.
            while waiting.try_join_next().is_some() {}
            while waiting.len() < CONNECTIONS + 20 {
                let one = Arc::clone(&many);
                let path = format!("/v1/health/service/nothing?index={}&wait=60s", u32::MAX);
                waiting.spawn(async move { one.get(0, &path).await });
            }
        }
        // On a connection of its own.
        let told = client(consul.address, "")?.get(0, "/v1/status/leader").await.err().context("answered")?;
        let told = format!("{:#}", anyhow::Error::from(told));
        ensure!(told.contains("limits.http_max_conns_per_client"), "{told}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_fake_consul_does_what_a_real_one_does() -> anyhow::Result<()> {
    let fake = Server::start(Catalog::new("dc1")).await?;
    Box::pin(conform(client(fake.address, "")?)).await?;
    fake.change(|catalog| catalog.tokens = ["secret".to_owned()].into());
    let refused = client(fake.address, "wrong")?.get(0, "/v1/catalog/services").await?;
    ensure!(refused.status == 403 && refused.reason().contains("ACL not found"), "{}", refused.reason());
    ensure!(client(fake.address, "secret")?.get(0, "/v1/catalog/services").await?.status == 200);
    Ok(())
}
