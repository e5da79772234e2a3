//! One member: it leads at once, keeps what it acknowledged, and stops rather than differ.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use istiod::raft::disk::memory::MemoryDisk;
use istiod::raft::disk::{Disk, RealDisk};
use istiod::raft::metrics::Metrics;
use istiod::raft::node::files::Beginning;
use istiod::raft::node::thread::{NoPeers, Node, RequestError};
use istiod::raft::node::{Answer, Driver, Event, Fatal, Output, Refusal, Settings};
use istiod::raft::store::memory::MemoryStore;
use istiod::raft::store::sled::SledStore;
use tokio_util::sync::CancellationToken;

use crate::toy::{Toy, busy, now, start};

struct Rig {
    disk: MemoryDisk,
    store: MemoryStore,
    rng: fastrand::Rng,
    sequence: u64,
}

impl Rig {
    fn new(seed: u64) -> Self {
        let rng = fastrand::Rng::with_seed(seed);
        Self { disk: MemoryDisk::new(), store: MemoryStore::new(), rng, sequence: 0 }
    }

    fn start(&mut self) -> Result<Driver<Toy>, Fatal> {
        let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
        let store = self.store.clone();
        let open_store = move |_: &Path, _| Ok(Box::new(store.clone()) as Box<_>);
        start(&disk, &open_store, Path::new("/m"), (busy(1, 3), Beginning::Found(&[1])), &mut self.rng)
    }

    /// Proposes and gives the index.
    fn write(&mut self, driver: &mut Driver<Toy>, text: &str) -> Result<u64, Fatal> {
        self.sequence += 1;
        let event = Event::Propose { sequence: self.sequence, command: text.as_bytes().to_vec() };
        let mut out = Output::default();
        driver.step(event, now(), &mut NoPeers, &mut out)?;
        for job in out.jobs {
            driver.step(job.run(), now(), &mut NoPeers, &mut Output::default())?;
        }
        match out.answers.as_slice() {
            [(sequence, Answer::Applied(index, _))] if *sequence == self.sequence => Ok(*index),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_member_that_is_alone_leads_and_answers_in_the_step_that_proposed() {
    let mut rig = Rig::new(1);
    let mut driver = rig.start().expect("starts");
    assert_eq!(
        rig.write(&mut driver, "a=1").expect("writes"),
        3,
        "after the snapshot at 1 and the leader's entry at 2"
    );
    assert_eq!(rig.write(&mut driver, "b=2").expect("writes"), 4);
    let status = driver.status();
    assert!(status.leading && status.applied == 4 && status.committed == 4 && status.voters == [1]);
    assert_eq!(*driver.machine().shown.lock().expect("not poisoned"), (4, 2));
}

#[test]
fn many_commands_share_one_fdatasync() {
    let mut rig = Rig::new(1);
    let mut driver = rig.start().expect("starts");
    rig.write(&mut driver, "a=1").expect("writes");
    let before = rig.disk.syncs();
    let events = (100..130).map(|sequence| Event::Propose { sequence, command: b"k=v".to_vec() });
    let mut out = Output::default();
    driver.steps(events, now(), &mut NoPeers, &mut out).expect("steps");
    assert_eq!(out.answers.len(), 30);
    assert_eq!(rig.disk.syncs() - before, 1);
}

#[test]
fn a_read_is_confirmed_and_covers_what_was_written() {
    let mut rig = Rig::new(1);
    let mut driver = rig.start().expect("starts");
    let index = rig.write(&mut driver, "a=1").expect("writes");
    let mut out = Output::default();
    driver.step(Event::Read { sequence: 900 }, now(), &mut NoPeers, &mut out).expect("steps");
    assert!(matches!(out.answers.as_slice(), [(900, Answer::Readable(read))] if *read >= index));
}

#[test]
fn the_very_first_read_waits_for_the_leaders_own_entry_and_not_for_a_timer() {
    let mut rig = Rig::new(1);
    let mut driver = rig.start().expect("starts");
    let mut out = Output::default();
    driver.step(Event::Read { sequence: 900 }, now(), &mut NoPeers, &mut out).expect("steps");
    assert!(matches!(out.answers.as_slice(), [(900, Answer::Readable(2))]));
}

#[test]
fn what_was_acknowledged_survives_any_power_cut_at_any_sync() {
    for seed in 0..150 {
        let mut rig = Rig::new(seed);
        let mut acknowledged: Vec<(String, u64)> = Vec::new();
        for round in 0..5 {
            rig.disk.fail_sync(rig.rng.u64(8..90));
            let result = rig.start().and_then(|mut driver| {
                for (key, index) in &acknowledged {
                    let found = driver.machine().map.get(key).map(|(index, _)| *index);
                    // What is in the log but not yet known to be committed is applied in the first step.
                    assert!(found.is_none() || found == Some(*index), "seed {seed} round {round}: {key}");
                }
                for number in 0..100 {
                    let key = format!("{round}-{number}");
                    let index = rig.write(&mut driver, &format!("{key}=x"))?;
                    acknowledged.push((key, index));
                }
                Ok(())
            });
            if let Err(error) = result {
                assert!(
                    matches!(error, Fatal::Log(_) | Fatal::Snapshot(_) | Fatal::Member(_)),
                    "seed {seed}: {error}"
                );
            }
            rig.disk.heal();
            rig.disk.power_cut(&mut || rig.rng.bool());
            if rig.rng.bool() {
                rig.store.power_cut();
            }
        }
        let mut driver = rig.start().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        driver.step(Event::Tick, now(), &mut NoPeers, &mut Output::default()).expect("steps");
        for (key, index) in &acknowledged {
            let found = driver.machine().map.get(key).map(|(index, _)| *index);
            assert_eq!(found, Some(*index), "seed {seed}: {key}");
        }
        assert!(acknowledged.len() > 5, "seed {seed}: {} writes", acknowledged.len());
    }
}

#[test]
fn a_failed_fsync_stops_the_member_and_acknowledges_nothing() {
    let mut rig = Rig::new(1);
    let mut driver = rig.start().expect("starts");
    rig.write(&mut driver, "a=1").expect("writes");
    rig.disk.fail_sync(0);
    let mut out = Output::default();
    let event = Event::Propose { sequence: 500, command: b"b=2".to_vec() };
    assert!(matches!(driver.step(event, now(), &mut NoPeers, &mut out), Err(Fatal::Log(_))));
    assert!(out.answers.is_empty());
}

#[test]
fn the_log_is_compacted_behind_snapshots_and_the_state_survives_a_lost_store() {
    let mut rig = Rig::new(1);
    let mut driver = rig.start().expect("starts");
    for number in 0..500 {
        rig.write(&mut driver, &format!("k{}={number}", number % 7)).expect("writes");
    }
    let status = driver.status();
    assert!(status.first_index > 400 && status.snapshot > 440, "{status:?}");
    assert!(status.first_index + 9 <= status.snapshot, "some entries stay: {status:?}");
    let expect = driver.machine().map.clone();
    drop(driver);
    rig.store = MemoryStore::new();
    let mut driver = rig.start().expect("starts from the snapshot");
    driver.step(Event::Tick, now(), &mut NoPeers, &mut Output::default()).expect("steps");
    assert_eq!(driver.machine().map, expect);
}

#[test]
fn an_unknown_command_halts_the_member_before_it_differs() {
    let mut rig = Rig::new(1);
    let mut driver = rig.start().expect("starts");
    rig.write(&mut driver, "a=1").expect("writes");
    let halted = rig.write(&mut driver, "from the future").expect_err("halts");
    assert!(matches!(&halted, Fatal::Halt(halt) if halt.reason.contains("newer program")), "{halted}");
    drop(driver);
    let mut driver = rig.start().expect("starts");
    let again = driver.step(Event::Tick, now(), &mut NoPeers, &mut Output::default());
    assert!(matches!(again, Err(Fatal::Halt(_))), "halts again until it is upgraded");
}

#[test]
fn a_log_older_than_the_applied_state_is_refused() {
    let mut rig = Rig::new(1);
    let mut driver = rig.start().expect("starts");
    rig.write(&mut driver, "a=1").expect("writes");
    driver.close([]).expect("stores all");
    let newer = rig.store.clone();
    let mut other = Rig::new(2);
    drop(other.start().expect("starts"));
    other.store = newer;
    assert!(matches!(other.start(), Err(Fatal::Contradiction(_))));
}

#[test]
fn proposals_and_reads_without_answer_are_told_so_in_time() {
    let mut rig = Rig::new(1);
    let disk: Arc<dyn Disk> = Arc::new(rig.disk.clone());
    let store = rig.store.clone();
    let open_store = move |_: &Path, _| Ok(Box::new(store.clone()) as Box<_>);
    let beginning = Beginning::Found(&[1, 2, 3]);
    let mut driver =
        start(&disk, &open_store, Path::new("/m"), (busy(1, 3), beginning), &mut rig.rng).expect("starts");
    let (mut out, t0) = (Output::default(), now());
    driver.step(Event::Read { sequence: 1 }, t0, &mut NoPeers, &mut out).expect("steps");
    let propose = Event::Propose { sequence: 2, command: b"a=1".to_vec() };
    driver.step(propose, t0, &mut NoPeers, &mut out).expect("steps");
    assert!(out.answers.is_empty() && out.forwards.is_empty(), "it waits for a leader");
    let later = t0 + Duration::from_secs(60);
    driver.step(Event::Tick, later, &mut NoPeers, &mut out).expect("steps");
    assert!(matches!(
        out.answers.as_slice(),
        [(2, Answer::Refused(Refusal::NoLeader)), (1, Answer::Refused(Refusal::Unknown))]
    ));
}

fn on_disk(dir: &Path) -> Result<Driver<Toy>, Fatal> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let open_store = |dir: &Path, life| Ok(Box::new(SledStore::open_or_move_aside(dir, life)?) as Box<_>);
    let settings = Settings { snapshot_entries: 2_000, keep_entries: 100, ..Settings::new(1, 1) };
    start(&disk, &open_store, dir, (settings, Beginning::Found(&[1])), &mut fastrand::Rng::new())
}

#[tokio::test]
async fn commits_are_batched_and_the_rate_is_printed() {
    let dir = tempfile::tempdir().expect("makes a folder");
    let stop = CancellationToken::new();
    let driver = on_disk(dir.path()).expect("starts");
    let (node, thread) =
        Node::spawn(driver, Box::new(NoPeers), Metrics::default(), stop.clone()).expect("spawns");
    let before = now();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..64 {
        let node = node.clone();
        writers.spawn(async move {
            let value = "x".repeat(1024);
            for number in 0..100 {
                let command = format!("{writer}-{}={value}", number % 10);
                node.propose(command.into_bytes()).await.expect("commits");
            }
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer.expect("does not panic");
    }
    let rate = 6400.0 / before.elapsed().as_secs_f64();
    let before = now();
    for number in 0..100 {
        node.propose(format!("one={number}").into_bytes()).await.expect("commits");
    }
    let alone = before.elapsed() / 100;
    println!("64 writers of 1 KiB: {rate:.0} commits/s; one writer: {} us per commit", alone.as_micros());
    assert!(node.read_index().await.expect("reads") >= 6502);
    stop.cancel();
    thread.join().expect("does not panic").expect("stops");
    assert!(matches!(node.propose(b"late=1".to_vec()).await, Err(RequestError::Stopped(None))));
    let mut driver = on_disk(dir.path()).expect("starts again");
    driver.step(Event::Tick, now(), &mut NoPeers, &mut Output::default()).expect("steps");
    assert_eq!(driver.machine().map.len(), 641);
}
