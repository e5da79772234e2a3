//! Snapshot files: the whole state at one index, so that the log before it may go.
//!
//! ```text
//! "ISTIODSN" version:u32 length:u32 crc32c:u32 SnapshotHead, then chunks: length:u32 crc32c:u32 bytes
//! ```
//!
//! A file is written under a temporary name, synced and renamed, so a file under its final name is whole. The log
//! is compacted only up to the newest of them; the one before it is kept as well.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

mod transfer;

pub use self::transfer::{Incoming, Outgoing};
use super::disk::{Disk, TEMPORARY};
use super::wire::{SnapshotHead, SnapshotMetadata};

const MAGIC: &[u8; 8] = b"ISTIODSN";
const VERSION: u32 = 1;
const CHUNK: usize = 256 << 10;
const SUFFIX: &str = ".snapshot";
/// The head of a file, with its members, is within this many bytes.
const HEAD_BYTES: usize = 64 << 10;
/// How many files are kept.
const KEEP: usize = 2;

/// What can be wrong with a snapshot file.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The disk refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The content does not match its checksums.
    #[error("{} is damaged at byte {offset}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: usize,
    },
    /// Written by a newer program.
    #[error("{} has format {found}, this program reads up to {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// No file can be used.
    #[error("no snapshot in {}", dir.display())]
    None {
        /// Where they should be.
        dir: PathBuf,
    },
}

/// The folder of a member's snapshots. Clones name the same folder.
#[derive(Clone)]
pub struct Snapshots {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
}

impl Snapshots {
    /// The snapshots in `dir`; unfinished files are removed.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<Self, SnapshotError> {
        disk.create_dir(dir).map_err(io("create folder", dir))?;
        for name in disk.list(dir).map_err(io("list", dir))? {
            if name.ends_with(TEMPORARY) {
                let path = dir.join(&name);
                disk.remove(&path).map_err(io("remove", &path))?;
            }
        }
        // A process that was killed may have named a file and not synced its name; from now on it counts.
        disk.sync_dir(dir).map_err(io("sync folder", dir))?;
        Ok(Self { disk, dir: dir.to_owned() })
    }

    /// Writes a snapshot durably and removes all but the newest few.
    ///
    /// # Errors
    ///
    /// The disk's. Final: the member must stop.
    pub fn save(&self, metadata: &SnapshotMetadata, data: &[u8]) -> Result<(), SnapshotError> {
        let temporary = self.dir.join(format!("{}{TEMPORARY}", name(metadata)));
        let saved = self.write(metadata, data, &temporary);
        if saved.is_err() {
            // What is there of it takes room that somebody else may need; at start it would be removed as well.
            self.disk.remove(&temporary).unwrap_or_default();
        }
        saved
    }

    fn write(&self, metadata: &SnapshotMetadata, data: &[u8], temporary: &Path) -> Result<(), SnapshotError> {
        let head =
            SnapshotHead { metadata: Some(metadata.clone()), length: data.len() as u64 }.encode_to_vec();
        let mut start = Vec::with_capacity(head.len() + 20);
        start.extend_from_slice(MAGIC);
        start.extend_from_slice(&VERSION.to_le_bytes());
        push_chunk_head(&mut start, &head);
        start.extend_from_slice(&head);
        let path = self.dir.join(name(metadata));
        let mut file = self.disk.create(temporary).map_err(io("create", temporary))?;
        let mut offset = 0;
        let mut write = |bytes: &[u8]| {
            let result = file.write_at(bytes, offset);
            offset += bytes.len() as u64;
            result.map_err(io("write", temporary))
        };
        write(&start)?;
        for chunk in data.chunks(CHUNK) {
            let mut framed = Vec::with_capacity(chunk.len() + 8);
            push_chunk_head(&mut framed, chunk);
            framed.extend_from_slice(chunk);
            write(&framed)?;
        }
        file.sync().map_err(io("sync", temporary))?;
        self.disk.rename(temporary, &path).map_err(io("rename", temporary))?;
        self.disk.sync_dir(&self.dir).map_err(io("sync folder", &self.dir))?;
        self.remove_all_but(KEEP)
    }

    /// The newest snapshot's point, as its file name says; nothing is read.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn newest(&self) -> Result<Option<(u64, u64)>, SnapshotError> {
        Ok(self.points()?.last().copied())
    }

    /// The newest snapshot that can be read and is at or after `index`. Damaged ones are told and passed over.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::None`] if there is none, [`SnapshotError::Version`] if the newest is from a newer program.
    pub fn load(&self, index: u64) -> Result<(SnapshotMetadata, Bytes), SnapshotError> {
        for (at, term) in self.points()?.into_iter().rev().filter(|(at, _)| *at >= index) {
            match self.read(at, term) {
                Ok(found) => return Ok(found),
                Err(error @ SnapshotError::Corrupt { .. }) => {
                    tracing::error!(%error, "a snapshot is damaged; trying the one before it");
                }
                Err(error) => return Err(error),
            }
        }
        Err(SnapshotError::None { dir: self.dir.clone() })
    }

    /// Removes all snapshots.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn clear(&self) -> Result<(), SnapshotError> {
        self.remove_all_but(0)
    }

    /// The point of the newest snapshot at or after `index`, from the head of its file; the data is not read.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::None`] if there is none, and what [`Snapshots::load`] says of the newest.
    pub fn point_at(&self, index: u64) -> Result<SnapshotMetadata, SnapshotError> {
        let newest = self.points()?.last().copied().filter(|(at, _)| *at >= index);
        let (index, term) = newest.ok_or_else(|| SnapshotError::None { dir: self.dir.clone() })?;
        let path = self.path(index, term);
        let bytes = self.disk.read_at(&path, 0, HEAD_BYTES).map_err(io("read", &path))?;
        let (head, _) = read_head(&bytes, &path)?;
        Ok(head.metadata.unwrap_or_default())
    }

    fn path(&self, index: u64, term: u64) -> PathBuf {
        self.dir.join(format!("{index:016x}-{term:016x}{SUFFIX}"))
    }

    fn read(&self, index: u64, term: u64) -> Result<(SnapshotMetadata, Bytes), SnapshotError> {
        self.read_file(&self.path(index, term), (index, term))
    }

    fn read_file(&self, path: &Path, point: (u64, u64)) -> Result<(SnapshotMetadata, Bytes), SnapshotError> {
        let bytes = self.disk.read(path).map_err(io("read", path))?;
        let corrupt = |offset| SnapshotError::Corrupt { path: path.to_owned(), offset };
        let (head, mut at) = read_head(&bytes, path)?;
        let mut data = Vec::with_capacity(usize::try_from(head.length).unwrap_or(0).min(bytes.len()));
        while at < bytes.len() {
            let chunk = take_chunk(&bytes, &mut at).ok_or_else(|| corrupt(at))?;
            data.extend_from_slice(chunk);
        }
        let metadata = head.metadata.unwrap_or_default();
        if data.len() as u64 != head.length || (metadata.index, metadata.term) != point {
            return Err(corrupt(at));
        }
        Ok((metadata, data.into()))
    }

    /// Index and term of each file, oldest first.
    fn points(&self) -> Result<Vec<(u64, u64)>, SnapshotError> {
        let names = self.disk.list(&self.dir).map_err(io("list", &self.dir))?;
        let mut points: Vec<_> = names.iter().filter_map(|name| point(name)).collect();
        points.sort_unstable();
        Ok(points)
    }

    fn remove_all_but(&self, keep: usize) -> Result<(), SnapshotError> {
        let points = self.points()?;
        for (index, term) in points.iter().take(points.len().saturating_sub(keep)) {
            let path = self.path(*index, *term);
            self.disk.remove(&path).map_err(io("remove", &path))?;
        }
        Ok(())
    }
}

/// The head of a file, and where its chunks begin.
fn read_head(bytes: &[u8], path: &Path) -> Result<(SnapshotHead, usize), SnapshotError> {
    let corrupt = |offset| SnapshotError::Corrupt { path: path.to_owned(), offset };
    if bytes.get(..8) != Some(MAGIC) {
        return Err(corrupt(0));
    }
    let version = u32_at(bytes, 8).ok_or_else(|| corrupt(8))?;
    if version > VERSION {
        return Err(SnapshotError::Version { path: path.to_owned(), found: version });
    }
    let mut at = 12;
    let head = take_chunk(bytes, &mut at).ok_or_else(|| corrupt(12))?;
    Ok((SnapshotHead::decode(head).map_err(|_| corrupt(12))?, at))
}

fn name(metadata: &SnapshotMetadata) -> String {
    format!("{:016x}-{:016x}{SUFFIX}", metadata.index, metadata.term)
}

fn point(name: &str) -> Option<(u64, u64)> {
    let (index, term) = name.strip_suffix(SUFFIX)?.split_once('-')?;
    Some((u64::from_str_radix(index, 16).ok()?, u64::from_str_radix(term, 16).ok()?))
}

fn push_chunk_head(out: &mut Vec<u8>, chunk: &[u8]) {
    out.extend_from_slice(&u32::try_from(chunk.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(chunk).to_le_bytes());
}

fn take_chunk<'a>(bytes: &'a [u8], at: &mut usize) -> Option<&'a [u8]> {
    let length = usize::try_from(u32_at(bytes, *at)?).ok()?;
    let crc = u32_at(bytes, *at + 4)?;
    let chunk = bytes.get(*at + 8..(*at + 8).checked_add(length)?)?;
    if crc32c::crc32c(chunk) != crc {
        return None;
    }
    *at += 8 + length;
    Some(chunk)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::disk::memory::MemoryDisk;

    fn metadata(index: u64) -> SnapshotMetadata {
        SnapshotMetadata { index, term: 3, conf_state: None }
    }

    #[test]
    fn the_newest_is_loaded_and_two_are_kept() {
        let disk = Arc::new(MemoryDisk::new());
        let snapshots = Snapshots::open(disk.clone(), Path::new("/s")).expect("opens");
        for index in [10, 20, 30] {
            let data = vec![u8::try_from(index).expect("small"); CHUNK + 17];
            snapshots.save(&metadata(index), &data).expect("saves");
        }
        let (found, data) = snapshots.load(0).expect("loads");
        assert_eq!((found.index, data.len(), data[0]), (30, CHUNK + 17, 30));
        assert_eq!(disk.list(Path::new("/s")).expect("lists").len(), KEEP);
    }

    #[test]
    fn a_damaged_file_is_passed_over_wherever_the_damage_is() {
        for offset in [0, 9, 13, 17, 25, 60, CHUNK / 2, CHUNK + 60] {
            let disk = Arc::new(MemoryDisk::new());
            let snapshots = Snapshots::open(disk.clone(), Path::new("/s")).expect("opens");
            snapshots.save(&metadata(1), b"old").expect("saves");
            snapshots.save(&metadata(2), &vec![7; CHUNK + 100]).expect("saves");
            disk.flip(&Path::new("/s").join(name(&metadata(2))), offset);
            match snapshots.load(0) {
                Ok((found, data)) => {
                    assert_eq!((found.index, &data[..]), (1, &b"old"[..]), "offset {offset}")
                }
                Err(SnapshotError::Version { .. }) => assert_eq!(offset, 9),
                Err(error) => panic!("offset {offset}: {error}"),
            }
        }
    }

    #[test]
    fn a_power_cut_while_saving_leaves_the_one_before() {
        for seed in 0..50 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let disk = Arc::new(MemoryDisk::new());
            let snapshots = Snapshots::open(disk.clone(), Path::new("/s")).expect("opens");
            snapshots.save(&metadata(1), b"old").expect("saves");
            disk.fail_sync(rng.u64(0..2));
            assert!(snapshots.save(&metadata(2), &[5; 3000]).is_err());
            disk.power_cut(&mut || rng.bool());
            let snapshots = Snapshots::open(disk, Path::new("/s")).expect("opens again");
            let (found, data) = snapshots.load(0).expect("loads");
            match found.index {
                1 => assert_eq!(&data[..], b"old"),
                _ => assert_eq!(&data[..], &[5; 3000]),
            }
        }
    }
}
