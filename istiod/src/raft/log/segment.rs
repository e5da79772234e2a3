//! One file of the log: a header, then frames, then zeros.
//!
//! ```text
//! header  "ISTIODWL" version:u32 segment:u64 incarnation:u64 crc32c:u32, zeros up to 512
//! frame   "ISFR" length:u32 sequence:u64 crc32c-of-body:u32 crc32c-of-head:u32, body (a LogBatch), 0xA5, zeros up to 8
//! ```
//!
//! Numbers are little endian. The checksum of a frame's head covers its segment and offset too, so that a
//! frame at the wrong place is not one. A frame is written only after the one before it is durable: a bad frame with a good one behind
//! it is damage, and a bad frame at the end was torn by a power cut only if a sector of it is still zero.

use prost::Message as _;

use crate::raft::wire::LogBatch;

/// The format that this program writes.
pub(super) const VERSION: u32 = 1;
/// Where the first frame is.
pub(super) const FIRST_FRAME: usize = 512;

const MAGIC: &[u8; 8] = b"ISTIODWL";
const FRAME_MAGIC: &[u8; 4] = b"ISFR";
const FRAME_HEAD: usize = 24;
const END_MARK: u8 = 0xA5;
const SECTOR: usize = 512;

/// The head of a segment's file.
pub(super) fn header(segment: u64, incarnation: u64) -> Vec<u8> {
    let mut head = Vec::with_capacity(FIRST_FRAME);
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&segment.to_le_bytes());
    head.extend_from_slice(&incarnation.to_le_bytes());
    let crc = crc32c::crc32c(&head);
    head.extend_from_slice(&crc.to_le_bytes());
    head.resize(FIRST_FRAME, 0);
    head
}

/// What is wrong with a header.
pub(super) enum BadHeader {
    Damaged,
    Version(u32),
    Foreign(u64),
}

/// Checks that a file is segment `segment` of this member.
pub(super) fn check_header(bytes: &[u8], segment: u64, incarnation: u64) -> Result<(), BadHeader> {
    let damaged = || BadHeader::Damaged;
    let covered = bytes.get(..28).ok_or_else(damaged)?;
    if covered.get(..8) != Some(MAGIC) || u32_at(bytes, 28) != Some(crc32c::crc32c(covered)) {
        return Err(BadHeader::Damaged);
    }
    let version = u32_at(bytes, 8).ok_or_else(damaged)?;
    if version > VERSION {
        return Err(BadHeader::Version(version));
    }
    let found = u64_at(bytes, 20).ok_or_else(damaged)?;
    if found != incarnation {
        return Err(BadHeader::Foreign(found));
    }
    if u64_at(bytes, 12) != Some(segment) { Err(BadHeader::Damaged) } else { Ok(()) }
}

/// A batch as the bytes that go to the file at `offset`, in `out`, which is emptied first.
pub(super) fn frame(batch: &LogBatch, segment: u64, offset: u64, out: &mut Vec<u8>) {
    out.clear();
    out.resize(FRAME_HEAD, 0);
    batch.encode_raw(out);
    let body = out.get(FRAME_HEAD..).unwrap_or_default();
    let mut head = Vec::with_capacity(FRAME_HEAD);
    head.extend_from_slice(FRAME_MAGIC);
    head.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    head.extend_from_slice(&batch.sequence.to_le_bytes());
    head.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
    let crc = head_checksum(segment, offset, &head);
    head.extend_from_slice(&crc.to_le_bytes());
    out.splice(..FRAME_HEAD, head);
    out.push(END_MARK);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// The checksum of a frame's head, which is bound to its place.
fn head_checksum(segment: u64, offset: u64, head: &[u8]) -> u32 {
    let place = crc32c::crc32c_append(crc32c::crc32c(&segment.to_le_bytes()), &offset.to_le_bytes());
    crc32c::crc32c_append(place, head.get(..20).unwrap_or_default())
}

/// The length of the body, if there is a good head at `at`.
fn body_length(bytes: &[u8], segment: u64, at: usize) -> Option<usize> {
    let head = bytes.get(at..at + FRAME_HEAD)?;
    if head.get(..4)? != FRAME_MAGIC || u32_at(head, 20)? != head_checksum(segment, at as u64, head) {
        return None;
    }
    usize::try_from(u32_at(head, 4)?).ok()
}

/// What a segment's file holds.
pub(super) struct Scan {
    /// The batches in order.
    pub(super) batches: Vec<LogBatch>,
    /// Where the next frame goes.
    pub(super) end: usize,
    /// How it ends.
    pub(super) tail: Tail,
}

/// What is behind the last good frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// Zeros.
    Clean,
    /// A frame that was being written when the power went; it was never durable.
    Torn,
    /// A frame that was durable once.
    Damaged,
}

/// Reads the frames of a file whose header is good.
pub(super) fn scan(bytes: &[u8], segment: u64) -> Scan {
    let mut batches: Vec<LogBatch> = Vec::new();
    let mut at = FIRST_FRAME;
    while let Some((batch, next)) = read_frame(bytes, segment, at) {
        if batches.last().is_some_and(|last| last.sequence + 1 != batch.sequence) {
            return Scan { batches, end: at, tail: Tail::Damaged };
        }
        batches.push(batch);
        at = next;
    }
    let tail = judge_tail(bytes, segment, at);
    Scan { batches, end: at, tail }
}

/// The good frame at `at` and where the next one begins.
fn read_frame(bytes: &[u8], segment: u64, at: usize) -> Option<(LogBatch, usize)> {
    let length = body_length(bytes, segment, at)?;
    let rest = bytes.get(at..)?;
    let body = rest.get(FRAME_HEAD..FRAME_HEAD.checked_add(length)?)?;
    if u32_at(rest, 16)? != crc32c::crc32c(body) || *rest.get(FRAME_HEAD + length)? != END_MARK {
        return None;
    }
    let batch = LogBatch::decode(body).ok()?;
    if batch.sequence != u64_at(rest, 8)? {
        return None;
    }
    Some((batch, at + (FRAME_HEAD + length + 1).next_multiple_of(8)))
}

fn judge_tail(bytes: &[u8], segment: u64, at: usize) -> Tail {
    let rest = bytes.get(at..).unwrap_or_default();
    let Some(last) = rest.iter().rposition(|byte| *byte != 0) else { return Tail::Clean };
    let mut later = (at + 8..=at + last).step_by(8);
    if later.any(|place| read_frame(bytes, segment, place).is_some()) {
        return Tail::Damaged;
    }
    // How far the bad frame was meant to reach: its own word if its head is good, else at least its head, which may
    // lie in two sectors, and the last byte written.
    let end = match body_length(bytes, segment, at) {
        Some(length) => at.saturating_add(FRAME_HEAD + 1).saturating_add(length),
        None => at + (last + 1).max(FRAME_HEAD),
    };
    if end > bytes.len() || has_zero_sector(bytes, at, end) { Tail::Torn } else { Tail::Damaged }
}

/// Whether one of the sectors that `start..end` touches is zero as far as it belongs to it.
fn has_zero_sector(bytes: &[u8], start: usize, end: usize) -> bool {
    let mut at = start;
    while at < end {
        let next = ((at / SECTOR + 1) * SECTOR).min(end);
        if bytes.get(at..next).unwrap_or_default().iter().all(|byte| *byte == 0) {
            return true;
        }
        at = next;
    }
    false
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}
