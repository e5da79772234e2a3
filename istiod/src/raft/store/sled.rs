//! The applied state in sled: one tree, one atomic batch with the mark, every value checked.
//!
//! sled 0.34 is guarded as what it is, a beta. A value is cut into chunks of at most 48 KiB, so that sled never
//! uses its unsynced blob files; each chunk carries a version, a CRC32C over key and content, and how many chunks
//! there are. The mark holds the number of chunks and the sum of their hashes, so that a chunk which sled lost or
//! served from the past is found when the store is opened. `sync` is sled's flush and then an fdatasync on a
//! descriptor of our own, because sled's flush alone does not reach the disk. A panic inside sled is an error here.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use prost::Message as _;

use super::{KvStore, Pairs, StoreError, Write};
use crate::raft::node::thread::panic_text;
use crate::raft::wire::AppliedMark;

/// Bytes of a value in one chunk.
const CHUNK: usize = 48 << 10;
/// The format of a chunk.
const VERSION: u8 = 1;
/// sled's page cache. The state is in our own memory too, so a small one does.
const CACHE_BYTES: u64 = 64 << 20;
/// The key of the mark; the keys of chunks begin with `d`.
const MARK: &[u8] = b"a/mark";
const DATA: u8 = b'd';
/// version, CRC32C, number of chunks.
const CHUNK_HEAD: usize = 9;

/// Pairs in a sled database.
pub struct SledStore {
    dir: PathBuf,
    db: sled::Db,
    /// For fdatasync.
    file: File,
    incarnation: u64,
    pairs: u64,
    sum: u64,
}

impl SledStore {
    /// Opens the store in `dir`, or makes an empty one, and reads all of it to see that it is whole.
    ///
    /// # Errors
    ///
    /// Anything that makes the store doubtful: the caller should use [`SledStore::open_or_move_aside`].
    pub fn open(dir: &Path, incarnation: u64) -> Result<Self, StoreError> {
        guard(|| {
            let db = sled::Config::new()
                .path(dir)
                .cache_capacity(CACHE_BYTES)
                .flush_every_ms(None)
                .mode(sled::Mode::HighThroughput)
                .open()?;
            let path = dir.join("db");
            let file = File::options().read(true).write(true).open(&path);
            let file = file.map_err(|source| StoreError::Io { action: "open", path, source })?;
            let mut store = Self { dir: dir.to_owned(), db, file, incarnation, pairs: 0, sum: 0 };
            store.verify()?;
            Ok(store)
        })
    }

    /// Opens the store in `dir`; a doubtful one is moved aside, and kept for study, and an empty one takes its place.
    ///
    /// # Errors
    ///
    /// [`StoreError::Version`] if a newer program wrote it; the file system's if it cannot be moved; sled's if not
    /// even an empty store can be made.
    pub fn open_or_move_aside(dir: &Path, incarnation: u64) -> Result<Self, StoreError> {
        match Self::open(dir, incarnation) {
            Ok(store) => Ok(store),
            Err(error @ StoreError::Version(_)) => Err(error),
            Err(StoreError::Sled(sled::Error::Io(source)))
                if source.kind() == std::io::ErrorKind::WouldBlock =>
            {
                // Another process holds the lock: nothing is wrong with the data.
                Err(StoreError::Io { action: "lock", path: dir.to_owned(), source })
            }
            Err(error) => {
                let aside = free_name(dir);
                tracing::error!(%error, aside = %aside.display(), "the store of applied state is moved aside and built anew");
                std::fs::rename(dir, &aside).map_err(|source| StoreError::Io {
                    action: "move aside",
                    path: dir.to_owned(),
                    source,
                })?;
                Self::open(dir, incarnation)
            }
        }
    }

    /// Reads every chunk, and compares number and sum with the mark.
    fn verify(&mut self) -> Result<(), StoreError> {
        let Some(mark) = self.mark()? else {
            // It was emptied, or built anew, when the member was killed.
            return Ok(self.db.clear().map(drop)?);
        };
        if mark.incarnation != self.incarnation {
            return Err(StoreError::Damaged("it belongs to another life of this member".to_owned()));
        }
        let mut expected_next: Option<(Vec<u8>, u32, u32)> = None;
        for item in self.db.scan_prefix([DATA]) {
            let (key, chunk) = item?;
            let total = check(&key, &chunk)?;
            let (base, number) = split_key(&key)?;
            let fits = match &expected_next {
                Some((expected, next, of)) => expected == base && *next == number && *of == total,
                None => number == 0,
            };
            if !fits {
                return Err(StoreError::Damaged("a part of a value is missing".to_owned()));
            }
            expected_next = (number + 1 < total).then(|| (base.to_vec(), number + 1, total));
            self.pairs += 1;
            self.sum = self.sum.wrapping_add(hash(&key, &chunk));
        }
        if expected_next.is_some() || self.pairs != mark.pairs || self.sum != mark.sum {
            return Err(StoreError::Damaged("values are missing or out of date".to_owned()));
        }
        Ok(())
    }

    /// Removes the chunks that a key has now.
    fn remove_old(&mut self, base: &[u8], batch: &mut sled::Batch) -> Result<(), StoreError> {
        let mut number = 0;
        loop {
            let key = chunk_key(base, number);
            let Some(chunk) = self.db.get(&key)? else { return Ok(()) };
            let total = check(&key, &chunk)?;
            self.pairs = self.pairs.wrapping_sub(1);
            self.sum = self.sum.wrapping_sub(hash(&key, &chunk));
            batch.remove(key);
            number += 1;
            if number >= total {
                return Ok(());
            }
        }
    }

    fn insert(&mut self, base: &[u8], value: &[u8], batch: &mut sled::Batch) -> Result<(), StoreError> {
        let total = u32::try_from(value.len().div_ceil(CHUNK).max(1))
            .map_err(|_| StoreError::Damaged("a value is too large".to_owned()))?;
        let mut rest = value;
        for number in 0..total {
            let (content, next) = rest.split_at(rest.len().min(CHUNK));
            rest = next;
            let key = chunk_key(base, number);
            let chunk = chunk(&key, total, content);
            self.pairs = self.pairs.wrapping_add(1);
            self.sum = self.sum.wrapping_add(hash(&key, &chunk));
            batch.insert(key, chunk);
        }
        Ok(())
    }
}

impl KvStore for SledStore {
    fn mark(&self) -> Result<Option<AppliedMark>, StoreError> {
        guard(|| {
            let Some(stored) = self.db.get(MARK)? else { return Ok(None) };
            check(MARK, &stored)?;
            let content = stored.get(CHUNK_HEAD..).unwrap_or_default();
            let mark = AppliedMark::decode(content);
            mark.map(Some).map_err(|error| StoreError::Damaged(format!("the mark: {error}")))
        })
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let base = escape(key);
        guard(|| {
            let mut value = Vec::new();
            let mut number = 0;
            loop {
                let key = chunk_key(&base, number);
                match self.db.get(&key)? {
                    None if number == 0 => return Ok(None),
                    None => return Err(StoreError::Damaged("a part of a value is missing".to_owned())),
                    Some(chunk) => {
                        let total = check(&key, &chunk)?;
                        value.extend_from_slice(chunk.get(CHUNK_HEAD..).unwrap_or_default());
                        number += 1;
                        if number >= total {
                            return Ok(Some(value));
                        }
                    }
                }
            }
        })
    }

    fn range(&self, prefix: &[u8]) -> Result<Pairs, StoreError> {
        let mut start = escape(prefix);
        start.truncate(start.len() - 2); // the end of a key is not the end of a prefix
        guard(|| {
            let mut out: Pairs = Vec::new();
            for item in self.db.scan_prefix(&start) {
                let (key, chunk) = item?;
                check(&key, &chunk)?;
                let content = chunk.get(CHUNK_HEAD..).unwrap_or_default();
                let (base, number) = split_key(&key)?;
                match out.last_mut().filter(|_| number > 0) {
                    Some((_, value)) => value.extend_from_slice(content),
                    None => out.push((unescape(base)?, content.to_vec())),
                }
            }
            Ok(out)
        })
    }

    fn batch(&mut self, writes: &[Write], mark: &AppliedMark) -> Result<(), StoreError> {
        guard(|| {
            let mut batch = sled::Batch::default();
            for write in last_of_each_key(writes) {
                let base = escape(&write.key);
                self.remove_old(&base, &mut batch)?;
                if let Some(value) = &write.value {
                    self.insert(&base, value, &mut batch)?;
                }
            }
            let mark = AppliedMark {
                pairs: self.pairs,
                sum: self.sum,
                incarnation: self.incarnation,
                ..mark.clone()
            };
            batch.insert(MARK, chunk(MARK, 1, &mark.encode_to_vec()));
            self.db.apply_batch(batch)?;
            Ok(())
        })
    }

    fn clear(&mut self) -> Result<(), StoreError> {
        guard(|| {
            self.db.remove(MARK)?;
            self.db.flush()?;
            self.db.clear()?;
            (self.pairs, self.sum) = (0, 0);
            Ok(())
        })
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        guard(|| self.db.flush().map(drop).map_err(StoreError::from))?;
        self.file.sync_data().map_err(|source| StoreError::Io {
            action: "sync",
            path: self.dir.join("db"),
            source,
        })
    }
}

/// Runs something inside sled, whose panics are errors to us.
fn guard<R>(action: impl FnOnce() -> Result<R, StoreError>) -> Result<R, StoreError> {
    catch_unwind(AssertUnwindSafe(action))
        .unwrap_or_else(|panic| Err(StoreError::Panicked(panic_text(panic.as_ref()))))
}

/// Of several writes to one key only the last counts, since they go into one batch.
fn last_of_each_key(writes: &[Write]) -> impl Iterator<Item = &Write> {
    let mut last = std::collections::BTreeMap::new();
    for write in writes {
        last.insert(&write.key, write);
    }
    last.into_values()
}

/// Keys end with two zeros, and a zero inside is followed by 255: the order stays, and no key begins another.
fn escape(key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len() + 8);
    out.push(DATA);
    for byte in key {
        out.push(*byte);
        if *byte == 0 {
            out.push(255);
        }
    }
    out.extend_from_slice(&[0, 0]);
    out
}

fn unescape(base: &[u8]) -> Result<Vec<u8>, StoreError> {
    let bad = || StoreError::Damaged("a key is malformed".to_owned());
    let inner = base.get(1..base.len().saturating_sub(2)).ok_or_else(bad)?;
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(byte) = bytes.next() {
        out.push(*byte);
        if *byte == 0 && bytes.next() != Some(&255) {
            return Err(bad());
        }
    }
    Ok(out)
}

fn chunk_key(base: &[u8], number: u32) -> Vec<u8> {
    let mut key = base.to_vec();
    key.extend_from_slice(&number.to_be_bytes());
    key
}

fn split_key(key: &[u8]) -> Result<(&[u8], u32), StoreError> {
    key.split_last_chunk::<4>()
        .map(|(base, number)| (base, u32::from_be_bytes(*number)))
        .ok_or_else(|| StoreError::Damaged("a key is malformed".to_owned()))
}

fn chunk(key: &[u8], total: u32, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHUNK_HEAD + content.len());
    out.push(VERSION);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&total.to_le_bytes());
    out.extend_from_slice(content);
    let crc = checksum(key, &out);
    if let Some(slot) = out.get_mut(1..5) {
        slot.copy_from_slice(&crc.to_le_bytes());
    }
    out
}

fn checksum(key: &[u8], chunk: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key), chunk.get(5..).unwrap_or_default())
}

/// Checks a chunk; gives how many chunks its value has.
fn check(key: &[u8], chunk: &[u8]) -> Result<u32, StoreError> {
    let cut = || StoreError::Damaged("a value is cut short".to_owned());
    let (version, rest) = chunk.split_first().ok_or_else(cut)?;
    let (crc, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
    let (total, _) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
    if u32::from_le_bytes(*crc) != checksum(key, chunk) {
        return Err(StoreError::Damaged("a value does not match its checksum".to_owned()));
    }
    if *version > VERSION {
        return Err(StoreError::Version(*version));
    }
    Ok(u32::from_le_bytes(*total))
}

/// Two checksums of a pair, in both orders, as one number.
fn hash(key: &[u8], chunk: &[u8]) -> u64 {
    let forward = crc32c::crc32c_append(crc32c::crc32c(key), chunk);
    let backward = crc32c::crc32c_append(crc32c::crc32c(chunk), key);
    (u64::from(forward) << 32) | u64::from(backward)
}

/// A name next to `dir` that is not taken.
fn free_name(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut number = 1_u64;
    loop {
        let candidate = dir.with_file_name(format!("{name}.doubtful-{number}"));
        if !candidate.exists() {
            return candidate;
        }
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(key: &[u8], value: Option<Vec<u8>>) -> Write {
        Write { key: key.to_vec(), value }
    }

    fn mark(index: u64) -> AppliedMark {
        AppliedMark { index, term: 1, ..AppliedMark::default() }
    }

    #[test]
    fn pairs_of_every_size_come_back_in_order_after_reopening() {
        let dir = tempfile::tempdir().expect("makes a folder");
        let path = dir.path().join("kv");
        let keys: [&[u8]; 6] = [b"a", b"a\0", b"a\0b", b"a\xff", b"ab", b"b"];
        {
            let mut store = SledStore::open(&path, 7).expect("opens");
            for (index, key) in keys.iter().enumerate() {
                let value = vec![1; index * CHUNK];
                store.batch(&[write(key, Some(value))], &mark(index as u64 + 1)).expect("writes");
            }
            store.batch(&[write(b"ab", Some(vec![2; 10])), write(b"b", None)], &mark(9)).expect("writes");
            store.sync().expect("syncs");
        }
        let store = SledStore::open(&path, 7).expect("opens again");
        let found = store.range(b"").expect("reads");
        let sizes: Vec<_> = found.iter().map(|(key, value)| (key.as_slice(), value.len())).collect();
        let expect: Vec<(&[u8], usize)> =
            vec![(b"a", 0), (b"a\0", CHUNK), (b"a\0b", 2 * CHUNK), (b"ab", 10), (b"a\xff", 3 * CHUNK)];
        assert_eq!(sizes, expect);
        assert_eq!(store.range(b"a\0").expect("reads").len(), 2);
        assert_eq!(store.get(b"ab").expect("reads"), Some(vec![2; 10]));
        assert_eq!(store.get(b"b").expect("reads"), None);
        assert_eq!(store.mark().expect("reads").expect("is there").index, 9);
    }

    #[test]
    fn a_store_that_was_not_completed_is_empty_when_it_is_opened_again() {
        let dir = tempfile::tempdir().expect("makes a folder");
        let path = dir.path().join("kv");
        {
            let mut store = SledStore::open(&path, 7).expect("opens");
            store.batch(&[write(b"x", Some(vec![1])), write(b"y", Some(vec![1]))], &mark(1)).expect("writes");
            store.db.remove(MARK).expect("removes");
            store.sync().expect("syncs");
        }
        let mut store = SledStore::open_or_move_aside(&path, 7).expect("opens");
        assert!(store.mark().expect("reads").is_none() && store.range(b"").expect("reads").is_empty());
        store.batch(&[write(b"z", Some(vec![2]))], &mark(2)).expect("writes");
        drop(store);
        let store = SledStore::open(&path, 7).expect("opens");
        assert_eq!(store.range(b"").expect("reads"), [(b"z".to_vec(), vec![2])]);
        assert!(!dir.path().join("kv.doubtful-1").exists());
    }

    #[test]
    fn a_lost_a_stale_and_a_changed_value_are_found_and_the_store_is_moved_aside() {
        for case in ["lost", "stale", "changed", "foreign"] {
            let dir = tempfile::tempdir().expect("makes a folder");
            let path = dir.path().join("kv");
            {
                let mut store = SledStore::open(&path, 7).expect("opens");
                let key = chunk_key(&escape(b"x"), 0);
                store
                    .batch(&[write(b"x", Some(vec![1])), write(b"y", Some(vec![1]))], &mark(1))
                    .expect("writes");
                let old = store.db.get(&key).expect("reads").expect("is there");
                store.batch(&[write(b"x", Some(vec![2]))], &mark(2)).expect("writes");
                match case {
                    "lost" => drop(store.db.remove(&key).expect("removes")),
                    "stale" => drop(store.db.insert(&key, old).expect("puts back")),
                    "changed" => {
                        drop(store.db.insert(&key, vec![1, 2, 3, 4, 5, 1, 0, 0, 0, 9]).expect("puts"))
                    }
                    _ => store.incarnation = 8,
                }
                if case == "foreign" {
                    store.batch(&[], &mark(3)).expect("writes");
                }
                store.sync().expect("syncs");
            }
            assert!(matches!(SledStore::open(&path, 7), Err(StoreError::Damaged(_))), "{case}");
            let store = SledStore::open_or_move_aside(&path, 7).expect("opens an empty one");
            assert_eq!(store.mark().expect("reads"), None);
            assert!(dir.path().join("kv.doubtful-1").exists());
        }
    }

    #[test]
    fn flipped_bytes_are_never_served() {
        let dir = tempfile::tempdir().expect("makes a folder");
        let path = dir.path().join("kv");
        {
            let mut store = SledStore::open(&path, 7).expect("opens");
            for index in 0..4_u64 {
                let keys = (0..50_u64).map(|key| (index * 50 + key).to_be_bytes());
                let writes: Vec<_> = keys.map(|key| write(&key, Some(vec![key[7] | 1; 700]))).collect();
                store.batch(&writes, &mark(index)).expect("writes");
            }
            store.sync().expect("syncs");
        }
        let bytes = std::fs::read(path.join("db")).expect("reads");
        let mut rng = fastrand::Rng::with_seed(5);
        let mut noticed = 0_u32;
        for round in 0..40 {
            let copy = dir.path().join(format!("copy{round}"));
            std::fs::create_dir_all(&copy).expect("makes a folder");
            let mut damaged = bytes.clone();
            let used = |at: &usize| bytes[*at..*at + 64].iter().all(|byte| *byte != 0);
            let at = std::iter::repeat_with(|| rng.usize(0..bytes.len() - 64)).find(used).expect("is found");
            damaged[at..at + 64].iter_mut().for_each(|byte| *byte ^= 0x55);
            std::fs::write(copy.join("db"), damaged).expect("writes");
            std::fs::copy(path.join("conf"), copy.join("conf")).expect("copies");
            match SledStore::open(&copy, 7) {
                Err(_) => noticed += 1,
                Ok(store) => {
                    let found = store.range(b"").expect("reads");
                    let index = store.mark().expect("reads").map_or(0, |mark| mark.index + 1);
                    assert_eq!(
                        found.len() as u64,
                        index * 50,
                        "round {round}: a whole earlier or the latest state"
                    );
                    noticed += u32::from(index < 4);
                }
            }
        }
        assert!(noticed > 0, "no damage hit anything that counts");
    }
}
