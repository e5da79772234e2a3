//! Private keys on disk: mode 0600, written to a new file, synced, then renamed.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::seal::{SealError, SealingKey};

/// Largest file that is read, in bytes: what a control plane tells a proxy of a large mesh is smaller.
const MAX_LEN: u64 = 512 << 20;

/// Why a key could not be stored or loaded.
#[derive(Debug, thiserror::Error)]
pub enum KeyStoreError {
    /// A file name that is empty or leads out of the folder.
    #[error("`{0}` is not a plain file name")]
    Name(String),
    /// Somebody else than the owner may read or write the file.
    #[error("{path} has mode {mode:o}: others than its owner can use it; run `chmod 600 {path}`")]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is larger than anything that is stored.
    #[error("{path} is too large")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be sealed, or what is there cannot be opened.
    #[error("cannot {doing} {path}")]
    Sealing {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: SealError,
    },
    /// The operating system refused.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
}

/// A folder of secrets that only its owner can use.
///
/// A file is either the old or the new one, whole, also after a power loss.
#[derive(Debug, Clone)]
pub struct KeyStore {
    dir: PathBuf,
    key: Option<SealingKey>,
}

impl KeyStore {
    /// Opens the folder and makes it with mode 0700 when it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be made or is not a folder.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, KeyStoreError> {
        let dir = dir.into();
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|source| KeyStoreError::Io {
            doing: "make",
            path: dir.clone(),
            source,
        })?;
        Ok(Self { dir, key: None })
    }

    /// The same folder, whose files are sealed under this key: each for its own name, so that none can stand in for
    /// another.
    #[must_use]
    pub fn sealed(self, key: SealingKey) -> Self {
        Self { key: Some(key), ..self }
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Stores `bytes` under `name`, replacing what was there.
    ///
    /// # Errors
    ///
    /// When `name` is not a plain file name, or the operating system refuses; the old file is then untouched.
    pub fn store(&self, name: &str, bytes: &[u8]) -> Result<(), KeyStoreError> {
        let path = self.path(name)?;
        let temporary = self.dir.join(format!(".{name}.new"));
        let failed = |source| KeyStoreError::Sealing { doing: "seal", path: path.clone(), source };
        match &self.key {
            Some(key) => self.write_new(&temporary, &key.seal(name, bytes).map_err(failed)?)?,
            None => self.write_new(&temporary, bytes)?,
        }
        fs::rename(&temporary, &path).map_err(io_error("rename to", &path))?;
        self.sync_dir()
    }

    /// What is stored under `name`; `None` when there is nothing.
    ///
    /// # Errors
    ///
    /// When somebody else may read or write the file, it is too large or was sealed under another key, or the operating
    /// system refuses.
    pub fn load(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, KeyStoreError> {
        let path = self.path(name)?;
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        let metadata = file.metadata().map_err(io_error("examine", &path))?;
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyStoreError::Permissions { path, mode });
        }
        if metadata.len() > MAX_LEN {
            return Err(KeyStoreError::TooLarge { path });
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0)));
        file.take(MAX_LEN).read_to_end(&mut bytes).map_err(io_error("read", &path))?;
        match &self.key {
            Some(key) => key.open(name, &bytes).map(Some).map_err(|source| KeyStoreError::Sealing {
                doing: "open",
                path,
                source,
            }),
            None => Ok(Some(bytes)),
        }
    }

    /// Removes what is stored under `name`, if anything is.
    ///
    /// # Errors
    ///
    /// When `name` is not a plain file name, or the operating system refuses.
    pub fn remove(&self, name: &str) -> Result<(), KeyStoreError> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            Ok(()) | Err(_) => self.sync_dir(),
        }
    }

    fn path(&self, name: &str) -> Result<PathBuf, KeyStoreError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(KeyStoreError::Name(name.to_owned()));
        }
        Ok(self.dir.join(name))
    }

    fn write_new(&self, path: &Path, bytes: &[u8]) -> Result<(), KeyStoreError> {
        // what a crashed writer left behind may have other permissions: it goes first
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", path)(error));
            }
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(io_error("make", path))?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(io_error("protect", path))?;
        file.write_all(bytes).map_err(io_error("write", path))?;
        file.sync_all().map_err(io_error("sync", path))
    }

    fn sync_dir(&self) -> Result<(), KeyStoreError> {
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(io_error("sync", &self.dir))
    }
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyStoreError {
    let path = path.to_owned();
    move |source| KeyStoreError::Io { doing, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn only_the_owner_can_use_what_is_stored() {
        let dir = tempfile::tempdir().unwrap();
        let store = KeyStore::open(dir.path().join("a/keys")).unwrap();
        store.store("key.pem", b"secret").unwrap();
        assert_eq!(mode(store.dir()), 0o700);
        assert_eq!(mode(&store.dir().join("key.pem")), 0o600);
        assert_eq!(store.load("key.pem").unwrap().unwrap().as_slice(), b"secret");
        let names: Vec<_> = fs::read_dir(store.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["key.pem"]);
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = KeyStore::open(dir.path()).unwrap();
        store.store("key.pem", b"secret").unwrap();
        let path = store.dir().join("key.pem");
        for mode in [0o640, 0o604, 0o620, 0o644] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(matches!(store.load("key.pem"), Err(KeyStoreError::Permissions { .. })), "{mode:o}");
        }
        store.store("key.pem", b"other").unwrap();
        assert_eq!(store.load("key.pem").unwrap().unwrap().as_slice(), b"other");
    }

    #[test]
    fn what_is_sealed_is_opened_with_the_same_key_under_the_same_name() {
        let dir = tempfile::tempdir().unwrap();
        let plain = KeyStore::open(dir.path()).unwrap();
        let (key, other) = (SealingKey::random().unwrap(), SealingKey::random().unwrap());
        let store = plain.clone().sealed(key);
        store.store("a", b"secret").unwrap();
        assert_eq!(store.load("a").unwrap().unwrap().as_slice(), b"secret");
        let on_disk = plain.load("a").unwrap().unwrap();
        assert!(!on_disk.windows(6).any(|window| window == b"secret"));
        plain.store("b", &on_disk).unwrap();
        plain.store("c", b"never sealed").unwrap();
        for name in ["b", "c"] {
            let refused = store.load(name).unwrap_err();
            assert!(matches!(refused, KeyStoreError::Sealing { .. }), "{name}: {refused}");
        }
        assert!(plain.sealed(other).load("a").is_err());
    }

    #[test]
    fn what_a_crashed_writer_left_is_no_obstacle_and_gives_no_rights() {
        let dir = tempfile::tempdir().unwrap();
        let store = KeyStore::open(dir.path()).unwrap();
        let left = store.dir().join(".key.pem.new");
        fs::write(&left, b"half").unwrap();
        fs::set_permissions(&left, Permissions::from_mode(0o666)).unwrap();
        assert!(store.load("key.pem").unwrap().is_none());
        store.store("key.pem", b"whole").unwrap();
        assert_eq!(mode(&store.dir().join("key.pem")), 0o600);
        assert!(!left.exists());
    }

    #[test]
    fn names_cannot_lead_out_of_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let store = KeyStore::open(dir.path()).unwrap();
        for name in ["", "..", ".x", "a/b", "../x", "a\0b"] {
            assert!(matches!(store.store(name, b""), Err(KeyStoreError::Name(_))), "{name}");
            assert!(matches!(store.load(name), Err(KeyStoreError::Name(_))), "{name}");
        }
    }

    #[test]
    fn removing_twice_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let store = KeyStore::open(dir.path()).unwrap();
        store.store("a", b"x").unwrap();
        store.remove("a").unwrap();
        store.remove("a").unwrap();
        assert!(store.load("a").unwrap().is_none());
    }
}
