//! A member in a process of its own is killed in the middle of its work, again and again.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use istiod::raft::disk::{Disk, RealDisk};
use istiod::raft::metrics::Metrics;
use istiod::raft::node::files::Beginning;
use istiod::raft::node::thread::{NoPeers, Node};
use istiod::raft::node::{Driver, Event, Output};
use istiod::raft::store::sled::SledStore;
use tokio_util::sync::CancellationToken;

use crate::toy::{Toy, busy, start};

const FOLDER: &str = "ISTIOD_TEST_KILLED_FOLDER";
const ROUNDS: u32 = 40;
const WRITERS: u64 = 6;

fn member(dir: &Path) -> Driver<Toy> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let open_store = |dir: &Path, life| Ok(Box::new(SledStore::open_or_move_aside(dir, life)?) as Box<_>);
    let parts = (busy(1, 1), Beginning::Found(&[1]));
    start(&disk, &open_store, dir, parts, &mut fastrand::Rng::new()).expect("starts")
}

#[test]
#[expect(clippy::disallowed_methods, reason = "how the parent tells its child the folder")]
fn the_child_writes_until_it_is_killed() {
    let Ok(dir) = std::env::var(FOLDER) else { return };
    let driver = member(Path::new(&dir));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("builds");
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let (node, _thread) =
            Node::spawn(driver, Box::new(NoPeers), Metrics::default(), stop).expect("spawns");
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..WRITERS {
            let node = node.clone();
            writers.spawn(async move {
                for number in 0_u64.. {
                    let key = format!("{}-{writer}-{}", std::process::id(), number % 50);
                    let command = format!("{key}={number}");
                    let (index, _) = node.propose(command.into_bytes()).await.expect("commits");
                    // One write, so that a line is there whole or, if it was cut, has no end.
                    let line = format!("\nacknowledged {key} {number} {index} .\n");
                    std::io::stderr().write_all(line.as_bytes()).expect("tells the parent");
                }
            });
        }
        writers.join_next().await;
    });
}

#[test]
#[expect(clippy::disallowed_methods, reason = "bounds the test")]
fn after_kill_9_the_state_is_what_was_acknowledged() {
    let dir = tempfile::tempdir().expect("makes a folder");
    let mut rng = fastrand::Rng::with_seed(11);
    let mut acknowledged: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut total = 0;
    let began = Instant::now();
    for round in 0..ROUNDS {
        let lines = run_and_kill(dir.path(), &mut rng);
        for (key, number, index) in lines {
            acknowledged.insert(key, (number, index));
            total += 1;
        }
        let mut driver = member(dir.path());
        driver.step(Event::Tick, Instant::now(), &mut NoPeers, &mut Output::default()).expect("steps");
        let map = &driver.machine().map;
        for (key, (number, index)) in &acknowledged {
            let (found_index, found) = map.get(key).unwrap_or_else(|| panic!("round {round}: {key} is lost"));
            let found: u64 = found.parse().expect("is a number");
            // A write whose answer did not reach the parent any more may be there; an older value may not.
            assert!(
                (found == *number && found_index == index) || (found > *number && found_index > index),
                "round {round}: {key} is {found} at {found_index}, acknowledged was {number} at {index}"
            );
        }
        driver.close([]).expect("closes");
    }
    println!("{ROUNDS} kills, {total} acknowledged writes, none lost, {:?}", began.elapsed());
    assert!(total > u64::from(ROUNDS) * 20, "only {total} writes were acknowledged");
    let names = std::fs::read_dir(dir.path()).expect("reads").map(|entry| entry.expect("reads").file_name());
    assert_eq!(
        names.filter(|name| name.to_string_lossy().contains("doubtful")).count(),
        0,
        "no store was doubted"
    );
}

/// What the child acknowledged before it was killed.
fn run_and_kill(dir: &Path, rng: &mut fastrand::Rng) -> Vec<(String, u64, u64)> {
    let mut child = Command::new(std::env::current_exe().expect("is known"))
        .args(["--exact", "killed::the_child_writes_until_it_is_killed", "--nocapture"])
        .env(FOLDER, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(child.stderr.take().expect("is piped")).lines();
    let mut out = Vec::new();
    // Let it acknowledge something, then kill it somewhere in the following work.
    let until = rng.usize(1..60);
    while out.len() < until {
        let line = lines.next().expect("the child goes on").expect("reads");
        out.extend(parse(&line));
    }
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let moment = Duration::from_micros(rng.u64(0..20_000));
    let killer = std::thread::spawn(move || {
        // Times out, as nobody sends: the moment of the kill.
        assert!(wait.recv_timeout(moment).is_err());
        child.kill().expect("kills");
        child.wait().expect("ends");
    });
    for line in lines {
        out.extend(line.ok().and_then(|line| parse(&line)));
    }
    killer.join().expect("kills");
    drop(done);
    out
}

fn parse(line: &str) -> Option<(String, u64, u64)> {
    let rest = line.strip_prefix("acknowledged ")?.strip_suffix(" .")?;
    let mut words = rest.split(' ');
    let key = words.next()?.to_owned();
    Some((key, words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}
