//! Endpoints that are names: our proxy and a stock Envoy ask the same name server, keep its answers as long as they say,
//! and start with them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use anyhow::ensure;
use tests::echo::{Echo, Seen};
use tests::program;
use tests::{PATIENCE, eventually, http, peers};
use tokio::net::UdpSocket;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::alone::{Alone, socket};

/// What names have: addresses, and for how many seconds.
type Zone = BTreeMap<&'static str, (Vec<Ipv4Addr>, u32)>;

/// A name server on loopback; it ends when it is dropped.
struct Names {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    _stop: DropGuard,
}

impl Names {
    async fn start(zone: Zone) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
        let (address, stop) = (socket.local_addr()?, CancellationToken::new());
        let (zone, token) = (Arc::new(Mutex::new(zone)), stop.clone());
        let known = zone.clone();
        let serving = async move {
            let mut query = [0; 512];
            while let Ok((length, client)) = socket.recv_from(&mut query).await {
                let reply = query.get(..length).and_then(|query| answer(query, &known));
                if let Some(reply) = reply {
                    socket.send_to(&reply, client).await.unwrap_or_default();
                }
            }
        };
        TaskTracker::new().spawn(async move { token.run_until_cancelled(serving).await });
        Ok(Self { address, zone, _stop: stop.drop_guard() })
    }

    fn set(&self, name: &'static str, addresses: &[Ipv4Addr], ttl: u32) {
        if let Ok(mut zone) = self.zone.lock() {
            zone.insert(name, (addresses.to_vec(), ttl));
        }
    }
}

/// The reply to a query with one question.
fn answer(query: &[u8], zone: &Mutex<Zone>) -> Option<Vec<u8>> {
    let mut labels = Vec::new();
    let mut at = 12;
    while let Some(length @ 1..) = query.get(at).copied().map(usize::from) {
        labels.push(String::from_utf8_lossy(query.get(at + 1..=at + length)?).to_lowercase());
        at += 1 + length;
    }
    let (kind, end) = (*query.get(at + 2)?, at + 5);
    let found = zone.lock().ok()?.get(labels.join(".").as_str()).cloned();
    let code = if found.is_some() { 0 } else { 3 };
    let (addresses, ttl) = found.filter(|_| kind == 1).unwrap_or_default();
    let count = u8::try_from(addresses.len()).ok()?;
    let mut reply = query.get(..2)?.to_vec();
    reply.extend([0x81, 0x80 | code, 0, 1, 0, count, 0, 0, 0, 0]);
    reply.extend(query.get(12..end)?);
    for address in addresses {
        reply.extend([0xc0, 12, 0, 1, 0, 1]);
        reply.extend(ttl.to_be_bytes());
        reply.extend([0, 4]);
        reply.extend(address.octets());
    }
    Some(reply)
}

/// `/short/` leads to a name whose answers may be kept for a second, although the usual rate is a minute; `/usual/` to
/// one whose lifetime does not count.
fn clusters(names: SocketAddr, port: u16) -> [(&'static str, String); 3] {
    let cluster = |name: &str, more: &str| {
        format!(
            "  - name: {name}\n    type: STRICT_DNS\n    connect_timeout: 1s\n    dns_lookup_family: V4_ONLY\n    {more}\n    \
             typed_dns_resolver_config:\n      name: envoy.network.dns_resolver.cares\n      typed_config:\n        \
             \"@type\": type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig\n        \
             resolvers: [{}]\n        dns_resolver_options: {{no_default_search_domain: true}}\n    \
             load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: \
             {{socket_address: {{address: {name}.test, port_value: {port}}}}}}}}}]}}]}}\n",
            socket(names)
        )
    };
    [
        ("short", cluster("short", "respect_dns_ttl: true\n    dns_refresh_rate: 60s")),
        ("usual", cluster("usual", "dns_refresh_rate: 60s")),
        ("never", cluster("never", "dns_refresh_rate: 60s")),
    ]
}

/// Who answers on a path.
async fn who(proxy: SocketAddr, path: &str) -> anyhow::Result<String> {
    let answer = http::get(proxy, "x", path, &[]).await?;
    if answer.status == 200 {
        Ok(answer.json::<Seen>()?.name)
    } else {
        Ok(answer.status.as_u16().to_string())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_keep_the_answers_of_name_servers_as_long_as_they_say() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (one, two) = (Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 2));
    let first = std::net::TcpListener::bind((one, 0))?;
    let port = first.local_addr()?.port();
    let second = std::net::TcpListener::bind((two, port))?;
    let (_first, _second) = (Echo::on("first", first)?, Echo::on("second", second)?);
    let known = [("short.test", (vec![one], 1)), ("usual.test", (vec![one], 1))];
    let names = Names::start(known.into()).await?;

    let quiet = ["--disable-hot-restart", "--concurrency", "1", "-l", "error", "-c"];
    let (envoy, clusters) = (peers::find("envoy/envoy")?, clusters(names.address, port));
    let proxy = program::ours("istio-proxy")?;
    let mut ours = Alone::start(&proxy, folder.path(), ("ours", &["--bootstrap"]), &clusters)?;
    let mut theirs = Alone::start(&envoy, folder.path(), ("theirs", &quiet), &clusters)?;
    for (name, proxy) in [("ours", ours.listener), ("theirs", theirs.listener)] {
        let answered = eventually(PATIENCE, "the proxy listens", || who(proxy, "/short/")).await?;
        // the first answer of all is no 503: requests wait for the names
        ensure!(answered == "first", "{name}: {answered}");
        for (path, expected) in [("/usual/", "first"), ("/never/", "503")] {
            let answered = who(proxy, path).await?;
            ensure!(answered == expected, "{name}, {path}: {answered}");
        }
    }
    names.set("short.test", &[two], 1);
    names.set("usual.test", &[two], 1);
    for (name, proxy) in [("ours", ours.listener), ("theirs", theirs.listener)] {
        eventually(PATIENCE, "the other address", || async {
            let answered = who(proxy, "/short/").await?;
            ensure!(answered == "second", "{name}: {answered}");
            Ok(())
        })
        .await?;
        let answered = who(proxy, "/usual/").await?;
        ensure!(answered == "first", "{name}: {answered} before its time");
    }
    ours.program.check()?;
    theirs.program.check()
}
