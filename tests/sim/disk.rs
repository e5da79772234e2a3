//! The disk of one member: istiod's memory disk, drawing on the member's power.

use std::io;
use std::path::Path;
use std::time::Duration;

use istiod::raft::disk::memory::MemoryDisk;
use istiod::raft::disk::{Disk, DiskFile};

use crate::mistake::Mistake;
use crate::power::Power;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// A disk on which every operation that changes something is a point at which the member can end.
pub(crate) struct SimDisk {
    pub(crate) inner: MemoryDisk,
    pub(crate) power: Power,
    pub(crate) mistake: Option<Mistake>,
}

impl SimDisk {
    fn file(&self, path: &Path, inner: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        let log = path.extension().is_some_and(|extension| extension == "wal");
        let forgetful = log && self.mistake == Some(Mistake::LoseFsync);
        Box::new(SimFile { inner, power: self.power.clone(), forgetful })
    }
}

impl Disk for SimDisk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.create_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.inner.read(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.power.draw()?;
        Ok(self.file(path, self.inner.create(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.file(path, self.inner.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.power.draw()?;
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.power.draw()?;
        self.inner.remove(path)
    }

    fn free(&self, path: &Path) -> Option<u64> {
        self.inner.free(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.power.draw()?;
        self.power.spend_sync();
        self.inner.sync_dir(dir)
    }
}

struct SimFile {
    inner: Box<dyn DiskFile>,
    power: Power,
    /// Says that it has synced, and has not.
    forgetful: bool,
}

impl DiskFile for SimFile {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self.power.draw_write(bytes.len()) {
            Ok(()) => self.inner.write_at(bytes, offset),
            Err(written) => {
                // A write that is interrupted ends at a sector.
                let start = usize::try_from(offset).unwrap_or(0);
                let written = ((start + written) / SECTOR * SECTOR).saturating_sub(start);
                self.inner.write_at(bytes.get(..written).unwrap_or_default(), offset)?;
                Err(io::Error::other("the power is cut"))
            }
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.power.draw()?;
        self.power.spend_sync();
        if self.forgetful { Ok(()) } else { self.inner.sync() }
    }

    fn sync_took(&self) -> Duration {
        self.power.sync_time()
    }
}
