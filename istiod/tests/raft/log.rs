//! The log keeps what was synced, whatever the disk does, and never pretends.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use istiod::raft::disk::Disk;
use istiod::raft::disk::memory::MemoryDisk;
use istiod::raft::log::wal::Wal;
use istiod::raft::log::{Log, LogError};
use raft::eraftpb::{Entry, HardState};

const LIFE: u64 = 77;
const SEGMENT: u64 = 4 << 10;

fn dir() -> &'static Path {
    Path::new("/log")
}

fn open(disk: &MemoryDisk) -> Result<Wal, LogError> {
    Wal::open(Arc::new(disk.clone()), dir(), LIFE, SEGMENT)
}

fn entry(index: u64, term: u64, size: usize) -> Entry {
    let mut entry = Entry::default();
    (entry.index, entry.term) = (index, term);
    entry.data = vec![u8::try_from(index % 250).expect("small") + 1; size].into();
    entry
}

fn hard_state(term: u64, commit: u64) -> HardState {
    let mut state = HardState::default();
    (state.term, state.vote, state.commit) = (term, 1, commit);
    state
}

/// What a log must hold.
#[derive(Debug, Clone, Default, PartialEq)]
struct Content {
    start: (u64, u64),
    entries: Vec<Entry>,
    hard_state: HardState,
}

fn content(log: &Wal) -> Content {
    let entries = log.entries(log.first_index(), log.last_index() + 1, None).expect("reads");
    Content { start: log.start(), entries, hard_state: log.hard_state().clone() }
}

/// Does something random to the log and to what is expected of it; true if it is durable now.
fn act(log: &mut Wal, expect: &mut Content, rng: &mut fastrand::Rng) -> Result<bool, LogError> {
    let last = expect.start.0 + expect.entries.len() as u64;
    let term = expect.hard_state.term.max(expect.start.1).max(1);
    match rng.u32(0..20) {
        0 => {
            let index = rng.u64(expect.start.0..=last);
            let found = log.term(index).expect("is there");
            if index == expect.start.0 {
                return Ok(false);
            }
            expect.entries.drain(..usize::try_from(index - expect.start.0).expect("small"));
            expect.start = (index, found);
            log.compact(index)?;
            Ok(true)
        }
        1 => {
            *expect = Content { start: (last + 5, term), entries: Vec::new(), ..expect.clone() };
            log.reset(last + 5, term)?;
            Ok(true)
        }
        2..6 => {
            expect.hard_state = hard_state(term + 1, last);
            log.set_hard_state(expect.hard_state.clone());
            Ok(false)
        }
        6..8 => {
            log.sync()?;
            Ok(true)
        }
        choice => {
            let first = if choice < 10 { rng.u64(expect.start.0 + 1..=last + 1) } else { last + 1 };
            let count = rng.u64(1..5);
            let size = if rng.u32(0..10) == 0 { rng.usize(0..3000) } else { rng.usize(0..60) };
            let new: Vec<_> = (first..first + count).map(|index| entry(index, term, size)).collect();
            expect.entries.truncate(usize::try_from(first - expect.start.0 - 1).expect("small"));
            expect.entries.extend(new.clone());
            log.append(new)?;
            log.sync()?;
            Ok(true)
        }
    }
}

#[test]
fn what_was_synced_is_there_after_any_power_cut() {
    for seed in 0..600 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let disk = MemoryDisk::new();
        let mut log = open(&disk).expect("opens");
        let mut expect = Content::default();
        for _ in 0..6 {
            let mut durable = expect.clone();
            disk.fail_sync(rng.u64(0..25));
            let mut broken = false;
            for _ in 0..40 {
                match act(&mut log, &mut expect, &mut rng) {
                    Ok(true) => durable = expect.clone(),
                    Ok(false) => {}
                    Err(_) => {
                        broken = true;
                        break;
                    }
                }
            }
            drop(log);
            disk.heal();
            disk.power_cut(&mut || rng.bool());
            log = open(&disk).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let found = content(&log);
            let ok = found == durable || (broken && found == expect);
            assert!(ok, "seed {seed}: found {found:?}, durable {durable:?}, written {expect:?}");
            expect = found;
        }
    }
}

#[test]
fn any_byte_that_changes_is_told_or_does_not_matter() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    for index in 1..60 {
        log.append(vec![entry(index, 1, 150)]).expect("appends");
        log.set_hard_state(hard_state(1, index));
        log.sync().expect("syncs");
    }
    let expect = content(&log);
    let files = disk.list(dir()).expect("lists");
    assert!(files.len() > 2, "several segments");
    let (mut told, mut silent) = (0, 0);
    for name in files {
        let path = dir().join(&name);
        for offset in (0..5 << 10).step_by(3) {
            let disk = disk.copy();
            disk.flip(&path, offset);
            match open(&disk) {
                Ok(log) => {
                    silent += 1;
                    assert_eq!(content(&log), expect, "{name} at {offset}: the log changed without a word");
                }
                Err(LogError::Corrupt { path: told_path, .. }) => {
                    told += 1;
                    assert!(told_path.starts_with(dir()));
                }
                Err(other) => panic!("{name} at {offset}: {other}"),
            }
        }
    }
    assert!(told > 3_000, "told {told}, silent {silent}");
}

#[test]
fn a_changed_last_frame_is_damage_and_not_a_torn_write() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    log.append(vec![entry(1, 1, 100)]).expect("appends");
    log.sync().expect("syncs");
    let path = only_file(&disk);
    for offset in 512..512 + 130 {
        disk.flip(&path, offset);
        assert!(matches!(open(&disk), Err(LogError::Corrupt { offset: 512, .. })), "byte {offset}");
        disk.flip(&path, offset);
    }
    assert_eq!(open(&disk).expect("opens").last_index(), 1);
}

fn only_file(disk: &MemoryDisk) -> PathBuf {
    let files = disk.list(dir()).expect("lists");
    assert_eq!(files.len(), 1);
    dir().join(&files[0])
}

#[test]
fn a_missing_file_and_a_foreign_file_are_told() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    for index in 1..100 {
        log.append(vec![entry(index, 1, 150)]).expect("appends");
        log.sync().expect("syncs");
    }
    let foreign = Wal::open(Arc::new(disk.clone()), dir(), LIFE + 1, SEGMENT);
    assert!(matches!(foreign, Err(LogError::Foreign { found: LIFE, .. })));
    let files = disk.list(dir()).expect("lists");
    disk.remove(&dir().join(&files[1])).expect("removes");
    assert!(matches!(open(&disk), Err(LogError::Corrupt { .. })));
}

#[test]
fn the_first_missing_file_is_told_too() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    for index in 1..100 {
        log.append(vec![entry(index, 1, 150)]).expect("appends");
        log.sync().expect("syncs");
    }
    let files = disk.list(dir()).expect("lists");
    disk.remove(&dir().join(&files[0])).expect("removes");
    assert!(matches!(open(&disk), Err(LogError::Corrupt { .. })));
}

#[test]
fn after_a_failed_sync_nothing_is_tried_again() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    log.append(vec![entry(1, 1, 10)]).expect("appends");
    disk.fail_sync(0);
    assert!(matches!(log.sync(), Err(LogError::Io { action: "sync", .. })));
    disk.heal();
    log.append(vec![entry(2, 1, 10)]).expect("appends in memory");
    assert!(matches!(log.sync(), Err(LogError::Io { action: "go on with", .. })));
    assert!(log.compact(1).is_err());
}

#[test]
fn a_full_disk_is_an_error() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    log.append(vec![entry(1, 1, 10)]).expect("appends");
    disk.fail_write(0);
    assert!(matches!(log.sync(), Err(LogError::Io { action: "write", .. })));
}

#[test]
fn compaction_removes_files_and_their_entries() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    for index in 1..=200 {
        log.append(vec![entry(index, 1, 150)]).expect("appends");
        log.sync().expect("syncs");
    }
    let before = disk.list(dir()).expect("lists").len();
    log.compact(150).expect("compacts");
    assert!(disk.list(dir()).expect("lists").len() < before / 2);
    assert!(matches!(log.entries(150, 152, None), Err(LogError::Compacted(150))));
    assert_eq!((log.term(150), log.term(149), log.first_index()), (Some(1), None, 151));
    assert_eq!(content(&open(&disk).expect("opens")), content(&log));
}

#[test]
fn a_read_is_cut_by_size_but_never_empty() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    log.append((1..10).map(|index| entry(index, 1, 100)).collect()).expect("appends");
    assert_eq!(log.entries(1, 10, Some(0)).expect("reads").len(), 1);
    assert_eq!(log.entries(1, 10, Some(350)).expect("reads").len(), 3);
    assert_eq!(log.entries(4, 7, None).expect("reads").len(), 3);
    assert!(matches!(log.entries(4, 11, None), Err(LogError::Unavailable(10))));
}

proptest::proptest! {
    #[test]
    fn any_bytes_in_a_file_are_told_and_never_panic(
        offset in 0_usize..700,
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600),
    ) {
        let disk = MemoryDisk::new();
        let mut log = open(&disk).expect("opens");
        log.append(vec![entry(1, 1, 20)]).expect("appends");
        log.sync().expect("syncs");
        let mut file = disk.open(&only_file(&disk)).expect("opens");
        file.write_at(&bytes, offset as u64).expect("writes");
        if let Ok(log) = open(&disk) {
            proptest::prop_assert!(log.last_index() <= 1);
        }
    }
}

#[test]
fn what_a_killed_process_had_written_and_not_synced_is_durable_once_it_was_read() {
    let disk = MemoryDisk::new();
    let mut log = open(&disk).expect("opens");
    log.append(vec![entry(1, 1, 100)]).expect("appends");
    log.sync().expect("syncs");
    log.append(vec![entry(2, 1, 5_000)]).expect("appends");
    disk.fail_sync(0);
    log.sync().expect_err("the process ends between the write and its sync");
    drop(log);
    disk.heal();
    let mut log = open(&disk).expect("opens again: the page cache is still there");
    assert_eq!(log.last_index(), 2);
    // It counts for this member from now on, and what follows lies in another segment.
    for index in 3..6 {
        let copy = disk.copy();
        copy.power_cut(&mut || false);
        assert_eq!(open(&copy).expect("opens after a power cut").last_index(), index - 1);
        log.append(vec![entry(index, 1, 100)]).expect("appends");
        log.sync().expect("syncs");
    }
}
