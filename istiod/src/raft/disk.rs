//! The few file operations under the log and the snapshots, behind a trait, so that tests can break them.
//!
//! [`RealDisk`] is the file system; [`memory::MemoryDisk`] forgets, on a simulated power cut, what was not synced,
//! tears writes at sectors, and fails where a test asks it to.

pub mod memory;

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prometheus_client::metrics::histogram::Histogram;

/// Where files live.
pub trait Disk: Send + Sync {
    /// Makes a directory and its parents.
    ///
    /// # Errors
    ///
    /// The file system's.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// The names of the files in a directory, sorted.
    ///
    /// # Errors
    ///
    /// The file system's.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// A whole file.
    ///
    /// # Errors
    ///
    /// The file system's.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// Up to `length` bytes of a file from `offset` on; fewer at its end.
    ///
    /// # Errors
    ///
    /// The file system's.
    fn read_at(&self, path: &Path, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let bytes = self.read(path)?;
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        Ok(bytes.into_iter().skip(from).take(length).collect())
    }

    /// The length of a file in bytes.
    ///
    /// # Errors
    ///
    /// The file system's.
    fn size(&self, path: &Path) -> io::Result<u64> {
        Ok(self.read(path)?.len() as u64)
    }

    /// An empty file in place of what was there.
    ///
    /// # Errors
    ///
    /// The file system's.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// A file that exists, for writing.
    ///
    /// # Errors
    ///
    /// The file system's.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Gives a file another name, in place of what had that name. Durable after [`Disk::sync_dir`].
    ///
    /// # Errors
    ///
    /// The file system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file. Durable after [`Disk::sync_dir`].
    ///
    /// # Errors
    ///
    /// The file system's.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Bytes that this process may still write where `path` is; nothing if that is not known.
    fn free(&self, _path: &Path) -> Option<u64> {
        None
    }

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    ///
    /// The file system's. What is durable then is unknown, for ever: the caller must stop.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// One open file.
pub trait DiskFile: Send {
    /// Writes all of `bytes` at `offset`; the file grows as needed. Durable after [`DiskFile::sync`].
    ///
    /// # Errors
    ///
    /// The file system's.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    ///
    /// The file system's. What is durable then is unknown, for ever, because the kernel may have dropped the
    /// dirty pages: the caller must stop and never try again.
    fn sync(&mut self) -> io::Result<()>;

    /// How long the last [`DiskFile::sync`] took.
    fn sync_took(&self) -> Duration {
        Duration::ZERO
    }
}

/// Writes a whole file so that it is either all there under its name, durably, or not at all.
///
/// # Errors
///
/// The disk's.
pub fn write_atomically(disk: &dyn Disk, dir: &Path, name: &str, parts: &[&[u8]]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}{TEMPORARY}"));
    let mut file = disk.create(&temporary)?;
    let mut offset = 0;
    for part in parts {
        file.write_at(part, offset)?;
        offset += part.len() as u64;
    }
    file.sync()?;
    drop(file);
    disk.rename(&temporary, &dir.join(name))?;
    disk.sync_dir(dir)
}

/// The end of the name of a file that is not whole yet; such files are removed at start.
pub const TEMPORARY: &str = ".tmp";

/// The file system of this machine.
#[derive(Debug, Clone, Default)]
pub struct RealDisk {
    sync_seconds: Option<Histogram>,
}

impl RealDisk {
    /// A disk that tells how long each fdatasync took.
    #[must_use]
    pub fn measured(sync_seconds: Histogram) -> Self {
        Self { sync_seconds: Some(sync_seconds) }
    }
}

impl Disk for RealDisk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut made: Vec<PathBuf> = Vec::new();
        let mut at = Some(dir);
        while let Some(missing) = at.filter(|path| !path.as_os_str().is_empty() && !path.exists()) {
            made.push(missing.to_owned());
            at = missing.parent();
        }
        fs::create_dir_all(dir)?;
        for path in made.iter().filter_map(|path| path.parent()) {
            self.sync_dir(if path.as_os_str().is_empty() { Path::new(".") } else { path })?;
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn read_at(&self, path: &Path, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let file = fs::File::open(path)?;
        let rest = file.metadata()?.len().saturating_sub(offset);
        let mut bytes = vec![0; length.min(usize::try_from(rest).unwrap_or(usize::MAX))];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn size(&self, path: &Path) -> io::Result<u64> {
        Ok(fs::metadata(path)?.len())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Box::new(RealFile { file, sync_seconds: self.sync_seconds.clone(), took: Duration::ZERO }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Box::new(RealFile { file, sync_seconds: self.sync_seconds.clone(), took: Duration::ZERO }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn free(&self, path: &Path) -> Option<u64> {
        let told = nix::sys::statvfs::statvfs(path).ok()?;
        Some(told.blocks_available().saturating_mul(told.fragment_size()))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::File::open(dir)?.sync_all()
    }
}

struct RealFile {
    file: fs::File,
    sync_seconds: Option<Histogram>,
    took: Duration,
}

impl DiskFile for RealFile {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    #[expect(clippy::disallowed_methods, reason = "measures the disk")]
    fn sync(&mut self) -> io::Result<()> {
        let before = std::time::Instant::now();
        self.file.sync_data()?;
        self.took = before.elapsed();
        if let Some(histogram) = &self.sync_seconds {
            histogram.observe(self.took.as_secs_f64());
        }
        Ok(())
    }

    fn sync_took(&self) -> Duration {
        self.took
    }
}
