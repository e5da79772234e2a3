//! Bytes that mean nothing, on every port that any of our programs listens on: each ends its own connection.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, ensure};
use tests::load::Load;
use tests::mesh::{Mesh, strict};
use tests::{PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Requests a second meanwhile.
const RATE: u32 = 50;
/// The state of a listening socket in `/proc/net/tcp`.
const LISTENING: &str = "0A";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Where a process listens for TCP.
fn listening(pid: u32) -> anyhow::Result<BTreeSet<SocketAddr>> {
    let mut sockets = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor may be closed while the folder is read.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        sockets.extend(
            target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')).map(str::to_owned),
        );
    }
    let mut found = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        for line in std::fs::read_to_string(format!("/proc/{pid}/net/{table}"))?.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, _, state, ..] = fields.as_slice() else { continue };
            if *state == LISTENING && fields.get(9).is_some_and(|inode| sockets.contains(*inode)) {
                found.insert(address(local).with_context(|| format!("not an address: {local}"))?);
            }
        }
    }
    Ok(found)
}

/// The address in `0100007F:3A98`, whose words are in the order of this machine; loopback where any address will do.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let words = ip.as_bytes().chunks(8).map(|word| {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        Some(word.to_ne_bytes())
    });
    let bytes: Vec<u8> = words.collect::<Option<Vec<_>>>()?.concat();
    let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(four) => IpAddr::from(four),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
    };
    let loopback =
        if ip.is_ipv4() { IpAddr::from(Ipv4Addr::LOCALHOST) } else { IpAddr::from(Ipv6Addr::LOCALHOST) };
    let ip = if ip.is_unspecified() { loopback } else { ip };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

fn texts() -> Vec<Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(15);
    let mut texts: Vec<Vec<u8>> = vec![
        Vec::new(),
        b"\n".to_vec(),
        b"GET / HT".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            .to_vec(),
        [&b"GET /"[..], &[b'a'; 1 << 18], b" HTTP/1.1\r\n\r\n"].concat(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"\x16\x03\x01\xff\xff\x01\xff\xff\xff\x00".to_vec(),
        [PREFACE, &[0xff; 64]].concat(),
        [PREFACE, b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00"].concat(),
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n".to_vec(),
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c".to_vec(),
    ];
    for _ in 0..12 {
        let junk: Vec<u8> = (0..random.usize(1..3000)).map(|_| random.u8(..)).collect();
        texts.push(if random.bool() { [PREFACE, &junk].concat() } else { junk });
    }
    texts
}

/// Sends bytes, and sees the connection end.
async fn send(to: SocketAddr, bytes: &[u8]) -> anyhow::Result<()> {
    let exchange = async {
        let mut stream = TcpStream::connect(to).await?;
        // Whoever has seen enough may have closed before all is sent: that is an end too.
        if stream.write_all(bytes).await.is_ok() && stream.shutdown().await.is_ok() {
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap_or_default();
        }
        anyhow::Ok(())
    };
    let ended = tokio::time::timeout(PATIENCE, exchange).await;
    let shown = String::from_utf8_lossy(bytes.get(..40).unwrap_or(bytes)).into_owned();
    ended
        .with_context(|| format!("{to} does not end its connection after {shown:?}"))?
        .with_context(|| to.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_any_port_ends_its_own_connection_only() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    let vip = mesh.address("client", "echo", 80).await?;
    let load = Load::start(vip, "echo", RATE);
    load.more(20).await?;
    let pids = [mesh.istiod.pid(), mesh.of("echo-v1")?.agent.pid(), mesh.of("client")?.agent.pid()];
    let mut ports = BTreeSet::new();
    for pid in pids {
        let own = listening(pid)?;
        ensure!(own.len() >= 3, "{pid} listens on {own:?}");
        ports.extend(own);
    }
    for known in [mesh.istiod.admin, mesh.istiod.xds, mesh.istiod.metrics, vip] {
        ensure!(ports.contains(&known), "{known} is not among {ports:?}");
    }
    let texts = texts();
    for port in &ports {
        let sent = texts.iter().map(|text| send(*port, text));
        futures::future::try_join_all(sent).await?;
    }
    println!("{} texts on each of {} ports", texts.len(), ports.len());
    load.more(20).await?;
    let tally = load.stop().await;
    tally.no_failures()?;
    // Both sides are the processes that they were, and talk to each other.
    let now = [mesh.istiod.pid(), mesh.of("echo-v1")?.agent.pid(), mesh.of("client")?.agent.pid()];
    ensure!(now == pids, "{now:?}, {pids:?}");
    for name in ["echo-v1", "client"] {
        mesh.of_mut(name)?.agent.check()?;
    }
    mesh.istiod.apply_and_wait(&tests::mesh::service("late")).await?;
    eventually(PATIENCE, "the service answers", || async {
        let answer = mesh.get("client", "echo", "/", &[]).await?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(())
    })
    .await?;
    mesh.finish(&[])
}
