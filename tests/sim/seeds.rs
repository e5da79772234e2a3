//! The tests: seeds that must hold, and mistakes that must be found.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ledger::Broken;
use crate::mistake::Mistake;
use crate::run::{Tally, control, run, trace};

/// How many seeds a plain run of the tests tries.
const SEEDS: u64 = 300;
/// How many seeds a mistake may take to be found.
const PATIENCE: u64 = 2_000;
/// Lines shown of a run that failed.
const LINES: usize = 60;

#[expect(clippy::disallowed_methods, reason = "the settings of a test run")]
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs seeds on all cores; gives the sum, and the seed that failed first.
fn sweep(first: u64, count: u64, mistake: Option<Mistake>) -> (Tally, Option<(u64, Broken)>) {
    let next = AtomicU64::new(first);
    let failed: Mutex<Option<(u64, Broken)>> = Mutex::new(None);
    let sum = Mutex::new(Tally::default());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count || failed.lock().expect("not poisoned").is_some() {
                        return;
                    }
                    match run(seed, mistake) {
                        Ok(tally) => sum.lock().expect("not poisoned").add(&tally),
                        Err(broken) => {
                            let mut failed = failed.lock().expect("not poisoned");
                            if failed.as_ref().is_none_or(|(known, _)| seed < *known) {
                                *failed = Some((seed, broken));
                            }
                        }
                    }
                }
            });
        }
    });
    (sum.into_inner().expect("not poisoned"), failed.into_inner().expect("not poisoned"))
}

#[test]
fn seeds_hold_every_invariant() {
    let (first, count) = (setting("SIM_SEED_START", 1), setting("SIM_SEEDS", SEEDS));
    let (sum, failed) = sweep(first, count, None);
    if let Some((seed, broken)) = failed {
        let lines = trace(seed, None, LINES).join("\n");
        panic!(
            "{lines}\nseed {seed}: {broken}\nreplay: SIM_SEED_START={seed} SIM_SEEDS=1 cargo test -p tests --test sim \
             seeds_hold_every_invariant -- --nocapture"
        );
    }
    println!("{count} seeds from {first} on: {sum:?}");
    assert!(sum.commits as u64 > count * 10, "hardly anything was committed: {sum:?}");
    assert!(sum.lives > sum.members as u64, "hardly anybody was restarted: {sum:?}");
}

#[test]
fn a_seed_runs_in_the_same_way_twice() {
    for seed in [3, 4, 5, 6] {
        let once = run(seed, None).expect("holds");
        assert_eq!(once, run(seed, None).expect("holds"), "seed {seed}");
    }
}

#[test]
fn every_planted_mistake_is_found() {
    let only = setting("SIM_MISTAKE", u64::MAX);
    let mut missed = Vec::new();
    for (number, mistake) in Mistake::ALL.into_iter().enumerate() {
        if only != u64::MAX && only != number as u64 {
            continue;
        }
        let (_, found) = sweep(1, PATIENCE, Some(mistake));
        match found {
            Some((seed, broken)) => {
                println!("{mistake}: found by seed {seed}, because {}", broken.invariant);
                if let Err(broken) = control(seed, mistake) {
                    panic!("seed {seed} of {mistake} fails without the mistake, too: {broken}");
                }
                if only != u64::MAX {
                    println!("{}\n{broken}", trace(seed, Some(mistake), LINES).join("\n"));
                }
            }
            None => missed.push(mistake),
        }
    }
    assert!(missed.is_empty(), "not found in {PATIENCE} seeds: {missed:?}");
}
