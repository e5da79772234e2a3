//! A disk in memory that fails like a real one: for tests and simulation.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Disk, DiskFile};

/// Writes reach a disk in units of this many bytes, in any order, until they are synced.
const SECTOR: usize = 512;

/// A disk in memory. Clones share it, so that a member can be started again on what the last one left.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default, Clone)]
struct Inner {
    files: BTreeMap<u64, Content>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    next: u64,
    syncs: u64,
    fail_sync_at: Option<u64>,
    writes: u64,
    fail_write_at: Option<u64>,
    slow: Duration,
    free: Option<u64>,
    no_room: Option<String>,
}

#[derive(Default, Clone)]
struct Content {
    cached: Vec<u8>,
    durable: Vec<u8>,
    /// Byte ranges written since the last sync.
    dirty: Vec<(usize, usize)>,
}

impl MemoryDisk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Another disk with the same content.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { inner: Arc::new(Mutex::new(self.with(|inner| inner.clone()))) }
    }

    /// How often files and directories have been synced.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.with(|inner| inner.syncs)
    }

    /// Lets the `nth` sync from now fail (0 is the next one), as often as it is tried.
    pub fn fail_sync(&self, nth: u64) {
        self.with(|inner| inner.fail_sync_at = Some(inner.syncs + nth));
    }

    /// Lets the `nth` write from now fail (0 is the next one) as on a full disk.
    pub fn fail_write(&self, nth: u64) {
        self.with(|inner| inner.fail_write_at = Some(inner.writes + nth));
    }

    /// From now on each sync takes so long.
    pub fn slow_down(&self, took: Duration) {
        self.with(|inner| inner.slow = took);
    }

    /// From now on so many bytes are free.
    pub fn leave_free(&self, bytes: u64) {
        self.with(|inner| inner.free = Some(bytes));
    }

    /// There is no room for new files with this in their names.
    pub fn refuse_room(&self, name: Option<&str>) {
        self.with(|inner| inner.no_room = name.map(str::to_owned));
    }

    /// No more failures.
    pub fn heal(&self) {
        self.with(|inner| (inner.fail_sync_at, inner.fail_write_at) = (None, None));
    }

    /// Cuts the power: of what was not synced, each sector and each name is kept or lost as `chance` says.
    pub fn power_cut(&self, chance: &mut dyn FnMut() -> bool) {
        self.with(|inner| {
            let Inner { files, names, durable_names, .. } = inner;
            for (path, file) in names.iter() {
                if durable_names.get(path) != Some(file) && chance() {
                    durable_names.insert(path.clone(), *file);
                }
            }
            durable_names.retain(|path, _| names.contains_key(path) || !chance());
            names.clone_from(durable_names);
            for content in files.values_mut() {
                content.tear(chance);
            }
            (inner.fail_sync_at, inner.fail_write_at) = (None, None);
        });
    }

    /// Changes one byte of a file, as a bad sector or a stray write would.
    ///
    /// # Panics
    ///
    /// Never: a file or byte that is not there is left alone.
    pub fn flip(&self, path: &Path, offset: usize) {
        self.with(|inner| {
            let Some(content) = inner.names.get(path).and_then(|file| inner.files.get_mut(file)) else {
                return;
            };
            for bytes in [&mut content.cached, &mut content.durable] {
                if let Some(byte) = bytes.get_mut(offset) {
                    *byte ^= 0x40;
                }
            }
        });
    }

    fn with<R>(&self, action: impl FnOnce(&mut Inner) -> R) -> R {
        action(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Content {
    fn write(&mut self, bytes: &[u8], offset: usize) {
        let end = offset + bytes.len();
        if self.cached.len() < end {
            self.cached.resize(end, 0);
        }
        if let Some(target) = self.cached.get_mut(offset..end) {
            target.copy_from_slice(bytes);
        }
        self.dirty.push((offset, end));
    }

    fn sync(&mut self) {
        self.durable.clone_from(&self.cached);
        self.dirty.clear();
    }

    fn tear(&mut self, chance: &mut dyn FnMut() -> bool) {
        for (start, end) in std::mem::take(&mut self.dirty) {
            let mut at = start;
            while at < end {
                let next = ((at / SECTOR + 1) * SECTOR).min(end);
                if chance() {
                    if self.durable.len() < next {
                        self.durable.resize(next, 0);
                    }
                    if let (Some(to), Some(from)) =
                        (self.durable.get_mut(at..next), self.cached.get(at..next))
                    {
                        to.copy_from_slice(from);
                    }
                }
                at = next;
            }
        }
        self.cached.clone_from(&self.durable);
    }
}

impl Inner {
    fn sync_allowed(&mut self) -> io::Result<()> {
        if self.fail_sync_at.is_some_and(|at| self.syncs >= at) {
            return Err(io::Error::other("simulated failure of fsync"));
        }
        self.syncs += 1;
        Ok(())
    }

    fn write_allowed(&mut self) -> io::Result<()> {
        if self.fail_write_at.is_some_and(|at| self.writes >= at) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.writes += 1;
        Ok(())
    }
}

fn missing(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

impl Disk for MemoryDisk {
    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        Ok(self.with(|inner| {
            let here = inner.names.keys().filter(|path| path.parent() == Some(dir));
            here.filter_map(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned()).collect()
        }))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.with(|inner| {
            let file = inner.names.get(path).and_then(|file| inner.files.get(file));
            file.map(|content| content.cached.clone()).ok_or_else(|| missing(path))
        })
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.with(|inner| {
            inner.write_allowed()?;
            let refused = inner.no_room.as_ref();
            if refused.is_some_and(|name| path.to_string_lossy().contains(name.as_str())) {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            inner.next += 1;
            let file = inner.next;
            inner.files.insert(file, Content::default());
            inner.names.insert(path.to_owned(), file);
            Ok(Box::new(MemoryFile { disk: self.clone(), file }) as Box<dyn DiskFile>)
        })
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = self.with(|inner| inner.names.get(path).copied()).ok_or_else(|| missing(path))?;
        Ok(Box::new(MemoryFile { disk: self.clone(), file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.with(|inner| {
            let file = inner.names.remove(from).ok_or_else(|| missing(from))?;
            inner.names.insert(to.to_owned(), file);
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.with(|inner| inner.names.remove(path).map(drop).ok_or_else(|| missing(path)))
    }

    fn free(&self, _path: &Path) -> Option<u64> {
        self.with(|inner| inner.free)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.with(|inner| {
            inner.sync_allowed()?;
            let Inner { names, durable_names, .. } = inner;
            durable_names.retain(|path, _| path.parent() != Some(dir));
            let here = names.iter().filter(|(path, _)| path.parent() == Some(dir));
            durable_names.extend(here.map(|(path, file)| (path.clone(), *file)));
            Ok(())
        })
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    file: u64,
}

impl DiskFile for MemoryFile {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        self.disk.with(|inner| {
            inner.write_allowed()?;
            if let Some(content) = inner.files.get_mut(&self.file) {
                content.write(bytes, offset);
            }
            Ok(())
        })
    }

    fn sync_took(&self) -> Duration {
        self.disk.with(|inner| inner.slow)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.with(|inner| {
            inner.sync_allowed()?;
            if let Some(content) = inner.files.get_mut(&self.file) {
                content.sync();
            }
            Ok(())
        })
    }
}
