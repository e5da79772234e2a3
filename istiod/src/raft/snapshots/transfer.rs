//! A snapshot's file on its way to another member: read in pieces there, written in pieces here.
//!
//! The file goes as it is. Its own checksums are looked at when it is whole; a transfer that was cut goes on where it
//! stopped, also after a restart of either side.

use std::path::PathBuf;

use bytes::Bytes;

use super::{SnapshotError, Snapshots, io};
use crate::raft::disk::DiskFile;
use crate::raft::wire::SnapshotMetadata;

/// The end of the name of a file that is being received.
const INCOMING: &str = ".incoming";

/// A snapshot's file, to be sent.
pub struct Outgoing {
    snapshots: Snapshots,
    path: PathBuf,
    length: u64,
}

impl Outgoing {
    /// Bytes of the file.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Up to `length` bytes from `offset` on; none at the end.
    ///
    /// # Errors
    ///
    /// The disk's; the file may have gone because newer ones took its place.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, SnapshotError> {
        self.snapshots.disk.read_at(&self.path, offset, length).map_err(io("read", &self.path))
    }
}

/// A snapshot's file, being received.
pub struct Incoming {
    snapshots: Snapshots,
    path: PathBuf,
    point: (u64, u64),
    file: Box<dyn DiskFile>,
    offset: u64,
    length: u64,
}

impl Incoming {
    /// Bytes that are here.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether all bytes are here.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.offset >= self.length
    }

    /// Adds the next bytes. False if they are not the next, or too many.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<bool, SnapshotError> {
        let end = offset.saturating_add(bytes.len() as u64);
        if offset != self.offset || end > self.length {
            return Ok(false);
        }
        self.file.write_at(bytes, offset).map_err(io("write", &self.path))?;
        self.offset = end;
        Ok(true)
    }

    /// The snapshot, once all bytes are here. The received file is gone afterwards: the driver writes its own.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::Corrupt`] if the bytes are not the announced snapshot; the transfer must begin anew.
    pub fn finish(self) -> Result<(SnapshotMetadata, Bytes), SnapshotError> {
        let Self { snapshots, path, point, file, .. } = self;
        drop(file);
        let found = snapshots.read_file(&path, point);
        snapshots.disk.remove(&path).map_err(io("remove", &path))?;
        found
    }
}

impl Snapshots {
    /// The file of one snapshot, to be sent.
    ///
    /// # Errors
    ///
    /// The disk's, if there is no such file.
    pub fn outgoing(&self, index: u64, term: u64) -> Result<Outgoing, SnapshotError> {
        let path = self.path(index, term);
        let length = self.disk.size(&path).map_err(io("examine", &path))?;
        Ok(Outgoing { snapshots: self.clone(), path, length })
    }

    /// A place for a snapshot's file of `length` bytes from another member; what an earlier transfer of the same file
    /// left is kept, what one of another file left is removed.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn incoming(&self, (index, term): (u64, u64), length: u64) -> Result<Incoming, SnapshotError> {
        let name = format!("{index:016x}-{term:016x}-{length:x}{INCOMING}");
        let path = self.dir.join(&name);
        let mut offset = 0;
        for found in self.disk.list(&self.dir).map_err(io("list", &self.dir))? {
            let other = self.dir.join(&found);
            if found == name {
                offset = self.disk.size(&other).map_err(io("examine", &other))?;
            } else if found.ends_with(INCOMING) {
                self.disk.remove(&other).map_err(io("remove", &other))?;
            }
        }
        let file = if offset == 0 { self.disk.create(&path) } else { self.disk.open(&path) };
        let file = file.map_err(io("create", &path))?;
        let offset = offset.min(length);
        Ok(Incoming { snapshots: self.clone(), path, point: (index, term), file, offset, length })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::raft::disk::memory::MemoryDisk;

    fn pair() -> (Snapshots, Snapshots, Vec<u8>) {
        let data: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
        let open = || Snapshots::open(Arc::new(MemoryDisk::new()), Path::new("/s")).expect("opens");
        let (from, to) = (open(), open());
        let metadata = SnapshotMetadata { index: 40, term: 3, conf_state: None };
        from.save(&metadata, &data).expect("saves");
        (from, to, data)
    }

    fn carry(outgoing: &Outgoing, incoming: &mut Incoming, until: u64) {
        while incoming.offset() < until {
            let length = usize::try_from(until - incoming.offset()).expect("is small").min(100_000);
            let bytes = outgoing.read(incoming.offset(), length).expect("reads");
            assert!(incoming.write(incoming.offset(), &bytes).expect("writes"));
        }
    }

    #[test]
    fn a_transfer_that_was_cut_goes_on_where_it_stopped() {
        let (from, to, data) = pair();
        let outgoing = from.outgoing(40, 3).expect("is there");
        let mut incoming = to.incoming((40, 3), outgoing.length()).expect("begins");
        carry(&outgoing, &mut incoming, 1_000_000);
        let before = incoming.offset();
        drop(incoming);
        let mut incoming = to.incoming((40, 3), outgoing.length()).expect("goes on");
        assert_eq!(incoming.offset(), before);
        assert!(!incoming.write(0, &[1]).expect("is refused"), "only the next bytes");
        carry(&outgoing, &mut incoming, outgoing.length());
        assert!(incoming.is_whole());
        let (metadata, found) = incoming.finish().expect("is right");
        assert_eq!((metadata.index, found.len()), (40, data.len()));
        assert!(found == data);
        assert!(from.point_at(41).is_err() && from.point_at(12).expect("is there").index == 40);
    }

    #[test]
    fn bytes_that_are_not_the_snapshot_are_told_and_the_transfer_begins_anew() {
        let (from, to, _) = pair();
        let outgoing = from.outgoing(40, 3).expect("is there");
        let mut incoming = to.incoming((40, 3), outgoing.length()).expect("begins");
        carry(&outgoing, &mut incoming, outgoing.length() - 1);
        assert!(incoming.write(incoming.offset(), &[0x55]).expect("writes"));
        assert!(matches!(incoming.finish(), Err(SnapshotError::Corrupt { .. })));
        let incoming = to.incoming((40, 3), outgoing.length()).expect("begins anew");
        assert_eq!(incoming.offset(), 0);
    }
}
