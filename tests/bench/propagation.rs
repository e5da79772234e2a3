//! From the apply of a change to the last of ten proxies that serves it.
//!
//! `cargo build --release --bins && cargo bench -p tests --bench propagation` prints p50 and p99, and fails when they
//! are above 20 ms and 100 ms.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::load::percentile;
use tests::mesh::{Mesh, routes, strict};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::task::TaskTracker;

/// Proxies that must all serve a change.
const PROXIES: usize = 10;
/// Changes.
const CHANGES: usize = 60;
/// Between two changes that come each by itself.
const APART: Duration = Duration::from_millis(100);
/// Between two looks at one proxy; the figures are too large by up to this much.
const LOOK: Duration = Duration::from_millis(1);
/// Half of the changes are served everywhere within this time.
const P50: Duration = Duration::from_millis(20);
/// All but one in a hundred are served everywhere within this time.
const P99: Duration = Duration::from_millis(100);

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
async fn main() -> anyhow::Result<()> {
    let names: Vec<String> = (0..PROXIES).map(|i| format!("client{i}")).collect();
    let clients: Vec<&str> = names.iter().map(String::as_str).collect();
    let mesh = Mesh::start(&[], &["echo-v1"], &clients).await?;
    mesh.istiod.apply_and_wait(&(strict().to_owned() + &change(0))).await?;
    let tasks = TaskTracker::new();
    let (wanted, seen) = (watch::Sender::new(0), Arc::new(watch::Sender::new([0; PROXIES])));
    for (index, name) in clients.iter().enumerate() {
        let address = mesh.address(name, "echo", 80).await?;
        tasks.spawn(look(index, address, wanted.subscribe(), seen.clone()));
    }
    let mut served = seen.subscribe();
    let mut number = 0;
    let mut slow = Vec::new();
    for (how, pause) in [("one after the other", None), ("each by itself", Some(APART))] {
        let (mut took, mut committed) = (Vec::new(), Vec::new());
        for _ in 0..CHANGES {
            if let Some(pause) = pause {
                // paced: a change that comes alone finds nothing to be merged with
                tokio::time::sleep(pause).await;
            }
            number += 1;
            wanted.send_replace(number);
            let started = Instant::now();
            mesh.istiod.apply(&change(number)).await?;
            committed.push(started.elapsed());
            let all = served.wait_for(|seen| seen.iter().all(|n| *n == number));
            tokio::time::timeout(tests::PATIENCE, all)
                .await
                .context("a change is not served everywhere")??;
            took.push(started.elapsed());
        }
        let [p50, p99, acknowledged] =
            [(&took, 0.5), (&took, 0.99), (&committed, 0.5)].map(|(t, s)| percentile(t, s));
        println!(
            "{CHANGES} changes, {how}, to the last of {PROXIES} proxies: p50 {p50:.2?}, p99 {p99:.2?}; answered to the \
             operator: p50 {acknowledged:.2?}"
        );
        if p50 > P50 || p99 > P99 {
            slow.push(how);
        }
    }
    drop(wanted);
    mesh.finish(&[])?;
    ensure!(slow.is_empty(), "{slow:?}: wanted: p50 {P50:?}, p99 {P99:?}");
    Ok(())
}

fn change(number: usize) -> String {
    routes("echo", &format!("  - directResponse: {{status: 200, body: {{string: \"change {number};\"}}}}"))
}

/// Asks one proxy, again and again over one connection, until it serves what is wanted, and says so.
async fn look(
    index: usize,
    address: SocketAddr,
    mut wanted: watch::Receiver<usize>,
    seen: Arc<watch::Sender<[usize; PROXIES]>>,
) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut every = tokio::time::interval(LOOK);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut buffer = vec![0; 4096];
    loop {
        let number = *wanted.wait_for(|n| seen.borrow().get(index) != Some(n)).await?;
        let expected = format!("change {number};");
        loop {
            every.tick().await;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: echo\r\n\r\n").await?;
            let mut answer = String::new();
            while !answer.ends_with(';') {
                let read = stream.read(&mut buffer).await?;
                ensure!(read > 0, "the proxy closed: {answer}");
                answer.push_str(&String::from_utf8_lossy(buffer.get(..read).unwrap_or_default()));
            }
            if answer.ends_with(&expected) {
                break;
            }
        }
        seen.send_modify(|seen| {
            if let Some(seen) = seen.get_mut(index) {
                *seen = number;
            }
        });
    }
}
