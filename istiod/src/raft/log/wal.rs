//! The log in files of its own: `<dir>/<number>.wal`.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use raft::eraftpb::{Entry, HardState};

use super::segment::{self, BadHeader, Scan, Tail};
use super::{Log, LogError};
use crate::raft::disk::{Disk, DiskFile, TEMPORARY};
use crate::raft::wire::{self, LogBatch, LogStart};

/// The usual size of a segment: a new one is begun when the current one has grown to this many bytes.
pub const SEGMENT_BYTES: u64 = 16 << 20;
/// Zeros are written this far ahead, so that most syncs need not write the file's size as well.
const AHEAD: u64 = 1 << 20;
/// What is written ahead, a piece at a time.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// The room for a frame that is kept from one write to the next.
const BUFFER: usize = 1 << 20;
/// The end of a segment's name.
const SUFFIX: &str = ".wal";

/// The log in segments on a disk; all entries after its start are in memory too.
pub struct Wal {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    incarnation: u64,
    segment_bytes: u64,
    /// Segments that are full, oldest first.
    full: VecDeque<Segment>,
    current: Segment,
    file: Box<dyn DiskFile>,
    /// Where the next frame goes.
    end: u64,
    /// Zeros (or frames) are in the file up to here.
    ahead: u64,
    /// Where frames are put together.
    buffer: Vec<u8>,
    sequence: u64,
    entries: VecDeque<Entry>,
    bytes: u64,
    start: LogStart,
    hard_state: HardState,
    pending: Pending,
    failed: bool,
    /// The longest that a sync took of late.
    took: Option<Duration>,
}

/// A file of the log.
struct Segment {
    number: u64,
    /// The highest index among its entries.
    last_index: u64,
}

/// What has been given to the log since the last sync.
#[derive(Default)]
struct Pending {
    entries: Vec<wire::Entry>,
    hard_state: bool,
    start: bool,
    reset: bool,
}

/// What reading all segments gives.
#[derive(Default)]
struct Replay {
    entries: VecDeque<Entry>,
    start: Option<LogStart>,
    hard_state: HardState,
    sequence: Option<u64>,
    /// The last entry that is only in files older than the first one here.
    elsewhere: u64,
}

impl Wal {
    /// Opens the log in `dir`, or begins an empty one there.
    ///
    /// `incarnation` is this member's; files that carry another are refused. A new segment is begun when the current
    /// one has grown to `segment_bytes`.
    ///
    /// # Errors
    ///
    /// The disk's, and whatever is wrong with the files ([`LogError::Corrupt`] and its neighbours).
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        incarnation: u64,
        segment_bytes: u64,
    ) -> Result<Self, LogError> {
        disk.create_dir(dir).map_err(io("create folder", dir))?;
        let (numbers, left_over) = segments(disk.as_ref(), dir)?;
        let Some(&last) = numbers.last() else {
            return Self::begin(disk, dir, incarnation, segment_bytes);
        };
        let mut replay = Replay::default();
        let mut full = VecDeque::new();
        let (mut end, mut length, mut torn, mut empty) = (segment::FIRST_FRAME, 0, false, true);
        for &number in &numbers {
            let path = path(dir, number);
            let bytes = disk.read(&path).map_err(io("read", &path))?;
            check_header(&bytes, &path, number, incarnation)?;
            let scan = segment::scan(&bytes, number);
            (end, length, torn) = (scan.end, bytes.len(), scan.tail == Tail::Torn);
            empty = scan.batches.is_empty();
            let last_index = replay.take(scan, &path, number == last)?;
            full.push_back(Segment { number, last_index });
        }
        let current = full.pop_back().unwrap_or(Segment { number: last, last_index: 0 });
        let path = path(dir, last);
        let start = replay.finish(&path)?;
        remove(disk.as_ref(), dir, &left_over)?;
        let mut file = disk.open(&path).map_err(io("open", &path))?;
        if torn {
            tracing::warn!(file = %path.display(), offset = end, "cut off a write that a crash left unfinished");
            let zeros = vec![0; length.saturating_sub(end)];
            file.write_at(&zeros, end as u64).map_err(io("clear the end of", &path))?;
        }
        // A process that was killed may have written what is only in the page cache: it counts from now on, so it
        // must be durable. The older files were synced before this one was begun.
        file.sync().map_err(io("sync", &path))?;
        disk.sync_dir(dir).map_err(io("sync folder", dir))?;
        let bytes = replay.entries.iter().map(size).sum();
        Ok(Self {
            disk,
            dir: dir.to_owned(),
            incarnation,
            segment_bytes,
            full,
            current,
            file,
            end: end as u64,
            ahead: length as u64,
            buffer: Vec::new(),
            sequence: replay.sequence.unwrap_or(0),
            entries: replay.entries,
            bytes,
            start,
            hard_state: replay.hard_state,
            pending: Pending { start: empty, hard_state: empty, ..Pending::default() },
            failed: false,
            took: None,
        })
    }

    fn begin(
        disk: Arc<dyn Disk>,
        dir: &Path,
        incarnation: u64,
        segment_bytes: u64,
    ) -> Result<Self, LogError> {
        let file = make_segment(disk.as_ref(), dir, 1, incarnation)?;
        Ok(Self {
            disk,
            dir: dir.to_owned(),
            incarnation,
            segment_bytes,
            full: VecDeque::new(),
            current: Segment { number: 1, last_index: 0 },
            file,
            end: segment::FIRST_FRAME as u64,
            ahead: segment::FIRST_FRAME as u64,
            buffer: Vec::new(),
            sequence: 0,
            entries: VecDeque::new(),
            bytes: 0,
            start: LogStart::default(),
            hard_state: HardState::default(),
            pending: Pending { start: true, hard_state: true, ..Pending::default() },
            failed: false,
            took: None,
        })
    }

    /// Writes what is pending as one frame and syncs it.
    fn write(&mut self) -> Result<(), LogError> {
        if self.end >= self.segment_bytes {
            self.roll()?;
        }
        self.sequence += 1;
        let pending = std::mem::take(&mut self.pending);
        let last = pending.entries.first().map_or(self.last_index(), |entry| entry.index - 1);
        let batch = LogBatch {
            sequence: self.sequence,
            start: pending.start.then_some(LogStart { reset: pending.reset, last, ..self.start }),
            entries: pending.entries,
            hard_state: pending.hard_state.then(|| (&self.hard_state).into()),
        };
        segment::frame(&batch, self.current.number, self.end, &mut self.buffer);
        let end = self.end + self.buffer.len() as u64;
        let path = path(&self.dir, self.current.number);
        self.file.write_at(&self.buffer, self.end).map_err(io("write", &path))?;
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER);
        if end > self.ahead {
            let step = AHEAD.min(self.segment_bytes).max(1);
            self.ahead = (end + step).next_multiple_of(step);
            let mut at = end;
            while at < self.ahead {
                let left = usize::try_from(self.ahead - at).unwrap_or(usize::MAX);
                let zeros = ZEROS.get(..left).unwrap_or(&ZEROS);
                self.file.write_at(zeros, at).map_err(io("write", &path))?;
                at += zeros.len() as u64;
            }
        }
        self.file.sync().map_err(io("sync", &path))?;
        self.took = self.took.max(Some(self.file.sync_took()));
        self.end = end;
        let last = batch.entries.last().map_or(0, |entry| entry.index);
        self.current.last_index = self.current.last_index.max(last);
        Ok(())
    }

    /// Begins a new segment. Its first frame says where the log starts and the hard state, so that no older file is
    /// needed for them.
    fn roll(&mut self) -> Result<(), LogError> {
        let number = self.current.number + 1;
        self.file = make_segment(self.disk.as_ref(), &self.dir, number, self.incarnation)?;
        self.full.push_back(std::mem::replace(&mut self.current, Segment { number, last_index: 0 }));
        self.end = segment::FIRST_FRAME as u64;
        self.ahead = self.end;
        self.pending.start = true;
        self.pending.hard_state = true;
        Ok(())
    }

    /// Removes the files that hold nothing after the start of the log.
    fn remove_segments(&mut self) -> Result<(), LogError> {
        let index = self.start.index;
        let count = self.full.iter().take_while(|segment| segment.last_index <= index).count();
        let numbers: Vec<u64> = self.full.drain(..count).map(|segment| segment.number).collect();
        remove(self.disk.as_ref(), &self.dir, &numbers)
    }

    /// Forgets the entries from `index` on.
    fn cut_from(&mut self, index: u64) {
        let keep = usize::try_from(index.saturating_sub(self.start.index + 1)).unwrap_or(usize::MAX);
        let cut: u64 = self.entries.iter().skip(keep).map(size).sum();
        self.bytes -= cut;
        self.entries.truncate(keep);
        self.pending.entries.retain(|entry| entry.index < index);
    }

    fn position(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.start.index + 1)?).ok()
    }

    /// Runs a disk operation; after one has failed nothing is tried again.
    fn guarded(&mut self, action: impl FnOnce(&mut Self) -> Result<(), LogError>) -> Result<(), LogError> {
        if self.failed {
            let source = std::io::Error::other("an earlier write or sync failed; what is on disk is unknown");
            return Err(LogError::Io { action: "go on with", path: self.dir.clone(), source });
        }
        let result = action(self);
        self.failed = result.is_err();
        result
    }
}

impl Log for Wal {
    fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    fn start(&self) -> (u64, u64) {
        (self.start.index, self.start.term)
    }

    fn last_index(&self) -> u64 {
        self.start.index + self.entries.len() as u64
    }

    fn term(&self, index: u64) -> Option<u64> {
        if index == self.start.index {
            return Some(self.start.term);
        }
        self.entries.get(self.position(index)?).map(|entry| entry.term)
    }

    fn entries(&self, low: u64, high: u64, max_bytes: Option<u64>) -> Result<Vec<Entry>, LogError> {
        let from = self.position(low).ok_or(LogError::Compacted(low))?;
        if high > self.last_index() + 1 {
            return Err(LogError::Unavailable(high - 1));
        }
        let count = usize::try_from(high.saturating_sub(low)).unwrap_or(usize::MAX);
        let mut budget = max_bytes.unwrap_or(u64::MAX);
        let mut out = Vec::new();
        for entry in self.entries.iter().skip(from).take(count) {
            let size = size(entry);
            if size > budget && !out.is_empty() {
                break;
            }
            budget = budget.saturating_sub(size);
            out.push(entry.clone());
        }
        Ok(out)
    }

    fn append(&mut self, entries: Vec<Entry>) -> Result<(), LogError> {
        let Some(first) = entries.first().map(|entry| entry.index) else { return Ok(()) };
        if first <= self.start.index {
            return Err(LogError::Compacted(first));
        }
        if first > self.last_index() + 1 {
            return Err(LogError::Unavailable(first - 1));
        }
        if first <= self.last_index() {
            self.cut_from(first);
        }
        self.bytes += entries.iter().map(size).sum::<u64>();
        self.pending.entries.extend(entries.iter().map(wire::Entry::from));
        self.entries.extend(entries);
        Ok(())
    }

    fn set_hard_state(&mut self, state: HardState) {
        // A commit index alone is not worth a write: it rides with the next one, and a vote or term forces one.
        self.pending.hard_state = true;
        self.hard_state = state;
    }

    fn sync(&mut self) -> Result<(), LogError> {
        let pending = &self.pending;
        if pending.entries.is_empty() && !pending.hard_state && !pending.start {
            return Ok(());
        }
        self.guarded(Self::write)
    }

    fn compact(&mut self, index: u64) -> Result<(), LogError> {
        if index <= self.start.index {
            return Ok(());
        }
        let term = self.term(index).ok_or(LogError::Unavailable(index))?;
        let forget = usize::try_from(index - self.start.index).unwrap_or(usize::MAX).min(self.entries.len());
        let forgotten: u64 = self.entries.drain(..forget).map(|entry| size(&entry)).sum();
        self.bytes -= forgotten;
        self.start = LogStart { index, term, ..LogStart::default() };
        self.pending.start = true;
        self.guarded(|wal| {
            wal.write()?;
            wal.remove_segments()
        })
    }

    fn reset(&mut self, index: u64, term: u64) -> Result<(), LogError> {
        self.entries.clear();
        self.bytes = 0;
        self.pending.entries.clear();
        self.start = LogStart { index, term, ..LogStart::default() };
        (self.pending.start, self.pending.reset) = (true, true);
        self.guarded(|wal| {
            wal.write()?;
            // Nothing in the older files counts any more.
            wal.full.iter_mut().for_each(|segment| segment.last_index = 0);
            wal.current.last_index = 0;
            wal.remove_segments()
        })
    }

    fn take_sync_time(&mut self) -> Option<Duration> {
        self.took.take()
    }

    fn free(&self) -> Option<u64> {
        self.disk.free(&self.dir)
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Replay {
    /// Takes one segment's batches; gives the highest index in it.
    fn take(&mut self, scan: Scan, path: &Path, last: bool) -> Result<u64, LogError> {
        let corrupt = |what| LogError::Corrupt { path: path.to_owned(), offset: scan.end as u64, what };
        if scan.tail == Tail::Damaged || (scan.tail == Tail::Torn && !last) {
            return Err(corrupt("a frame that was durable does not match its checksum"));
        }
        let mut highest = 0;
        for (position, batch) in scan.batches.into_iter().enumerate() {
            if position == 0 && batch.start.is_none() {
                return Err(corrupt("the first frame does not say where the log starts"));
            }
            if self.sequence.is_some_and(|sequence| sequence + 1 != batch.sequence) {
                return Err(LogError::Corrupt {
                    path: path.to_owned(),
                    offset: segment::FIRST_FRAME as u64,
                    what: "frames are missing before this one",
                });
            }
            highest = self.add(batch, highest).map_err(corrupt)?;
        }
        Ok(highest)
    }

    fn add(&mut self, batch: LogBatch, highest: u64) -> Result<u64, &'static str> {
        let first = self.sequence.replace(batch.sequence).is_none();
        let mut highest = highest;
        if let Some(start) = batch.start {
            if first {
                self.elsewhere = start.last;
            }
            if start.reset {
                self.entries.clear();
                (self.elsewhere, highest) = (0, 0);
            }
            self.start = Some(start);
        }
        for entry in batch.entries {
            highest = highest.max(entry.index);
            self.elsewhere = self.elsewhere.min(entry.index.saturating_sub(1));
            let entry = Entry::try_from(entry).map_err(|_| "an entry of an unknown type")?;
            self.entries.truncate(self.keep_before(entry.index));
            // A gap is where compaction removed files; the log's start must turn out to be behind it.
            if self.entries.back().is_some_and(|last| last.index + 1 != entry.index) {
                self.entries.clear();
            }
            self.entries.push_back(entry);
        }
        if let Some(state) = batch.hard_state {
            self.hard_state = state.into();
        }
        Ok(highest)
    }

    /// How many of the entries are before `index`.
    fn keep_before(&self, index: u64) -> usize {
        let first = self.entries.front().map_or(index, |entry| entry.index);
        usize::try_from(index.saturating_sub(first)).unwrap_or(usize::MAX)
    }

    /// Cuts the entries to the log's start and checks that none is missing.
    fn finish(&mut self, path: &Path) -> Result<LogStart, LogError> {
        let start = LogStart { reset: false, last: 0, ..self.start.unwrap_or_default() };
        let forget = self.keep_before(start.index + 1).min(self.entries.len());
        self.entries.drain(..forget);
        let whole = match self.entries.front() {
            Some(entry) => entry.index == start.index + 1,
            None => self.elsewhere <= start.index,
        };
        if whole {
            return Ok(start);
        }
        let what = "entries are missing: an older file of the log is gone";
        Err(LogError::Corrupt { path: path.to_owned(), offset: segment::FIRST_FRAME as u64, what })
    }
}

/// The numbers of the segments in `dir` that count, and of those that do not: a crash while files are removed may
/// leave any of them, but those after the last gap are all needed and none of those before it is.
fn segments(disk: &dyn Disk, dir: &Path) -> Result<(Vec<u64>, Vec<u64>), LogError> {
    let mut numbers = Vec::new();
    for name in disk.list(dir).map_err(io("list", dir))? {
        if name.ends_with(TEMPORARY) {
            let path = dir.join(&name);
            disk.remove(&path).map_err(io("remove", &path))?;
        } else if let Some(number) =
            name.strip_suffix(SUFFIX).and_then(|hex| u64::from_str_radix(hex, 16).ok())
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    let gap = numbers.iter().zip(numbers.iter().skip(1)).rposition(|(before, after)| before + 1 != *after);
    let counting = numbers.split_off(gap.map_or(0, |position| position + 1));
    Ok((counting, numbers))
}

fn check_header(bytes: &[u8], path: &Path, number: u64, incarnation: u64) -> Result<(), LogError> {
    let path = path.to_owned();
    segment::check_header(bytes, number, incarnation).map_err(|bad| match bad {
        BadHeader::Damaged => LogError::Corrupt { path, offset: 0, what: "the header is not a log's" },
        BadHeader::Version(found) => LogError::Version { path, found },
        BadHeader::Foreign(found) => LogError::Foreign { path, expected: incarnation, found },
    })
}

/// Makes an empty segment, durably, and opens it.
fn make_segment(
    disk: &dyn Disk,
    dir: &Path,
    number: u64,
    incarnation: u64,
) -> Result<Box<dyn DiskFile>, LogError> {
    let path = path(dir, number);
    let name = format!("{number:016x}{SUFFIX}");
    let header = segment::header(number, incarnation);
    crate::raft::disk::write_atomically(disk, dir, &name, &[&header]).map_err(io("create", &path))?;
    disk.open(&path).map_err(io("open", &path))
}

fn remove(disk: &dyn Disk, dir: &Path, numbers: &[u64]) -> Result<(), LogError> {
    for number in numbers {
        let path = path(dir, *number);
        disk.remove(&path).map_err(io("remove", &path))?;
    }
    if numbers.is_empty() { Ok(()) } else { disk.sync_dir(dir).map_err(io("sync folder", dir)) }
}

fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}{SUFFIX}"))
}

fn size(entry: &Entry) -> u64 {
    (entry.data.len() + entry.context.len() + 16) as u64
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LogError {
    let path = path.to_owned();
    move |source| LogError::Io { action, path, source }
}
