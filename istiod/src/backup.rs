//! A backup: the whole replicated state at one revision, sealed so that only its owner reads it and nobody changes it.
//!
//! A file is a header that anybody may read, and chunks that nobody may. The key of the chunks is made for this file
//! alone, from a passphrase (Argon2id) or a key file (HKDF-SHA256) and the salt in the header. Each chunk is sealed
//! with AES-256-GCM; its nonce is its number and whether it is the last, and the header is authenticated with each, so
//! that chunks cannot be changed, reordered, left out, taken from another file, or cut off at the end. What is sealed
//! is a [`Manifest`] and then the state as a snapshot has it. Neither side holds more of it than a chunk.

mod contents;
mod key;

use std::io::{Read, Write};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};

pub use self::contents::{AuthorityFiles, Manifest, State, restorable};
pub use self::key::{Cost, KeySource, Secret};

/// First bytes of a file,
const NAME: &[u8; 7] = b"MESHBAK";
/// and the version of its form after them.
const VERSION: u8 = 1;
/// Bytes of plaintext in every chunk but the last.
const CHUNK: usize = 64 << 10;
/// Bytes that sealing adds to a chunk.
const TAG: usize = 16;
/// The longest header.
const HEADER: usize = 4096;

/// What anybody may read of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Header {
    /// How the key is made.
    pub key: KeySource,
    /// 32 random bytes, hexadecimal: the key is this file's alone.
    pub salt: String,
}

/// Why a backup cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file cannot be read or written.
    #[error("the backup cannot be read or written")]
    Io(#[from] std::io::Error),
    /// It is no backup.
    #[error("this is not a backup: {0}")]
    Foreign(&'static str),
    /// A newer program wrote it.
    #[error("the backup has version {0}, which this program does not know; use a newer one")]
    Version(u8),
    /// It opens with another kind of secret.
    #[error("the backup opens with {needed}, not with {given}")]
    OtherSecret {
        /// What is needed.
        needed: &'static str,
        /// What was given.
        given: &'static str,
    },
    /// The secret is wrong, or the file has been changed.
    #[error(
        "the backup does not open: the passphrase or key is wrong, or the file is damaged (chunk {chunk})"
    )]
    Sealed {
        /// The chunk at which it showed, from 0.
        chunk: u64,
    },
    /// The file ends too early.
    #[error("the backup is cut off after chunk {chunk}")]
    Cut {
        /// The last whole chunk, from 0.
        chunk: u64,
    },
    /// The system has no randomness, or not enough memory for the key.
    #[error("the key of the backup cannot be made: {0}")]
    Key(String),
    /// What was sealed is not what this program seals.
    #[error("the content of the backup cannot be used: {0}")]
    Content(String),
}

/// Writes a backup.
pub struct Sealer<W: Write> {
    out: W,
    key: LessSafeKey,
    header: Vec<u8>,
    buffer: Vec<u8>,
    chunk: u64,
}

impl<W: Write> Sealer<W> {
    /// Begins a file. `salt` is random and never used again.
    ///
    /// # Errors
    ///
    /// [`BackupError::Io`] and [`BackupError::Key`].
    pub fn new(mut out: W, secret: &Secret, cost: Cost, salt: [u8; 32]) -> Result<Self, BackupError> {
        let header = Header { key: secret.source(cost), salt: hex(&salt) };
        let key = sealing(&*secret.key(&header.key, &salt)?)?;
        let text = serde_json::to_vec(&header).map_err(|error| BackupError::Key(error.to_string()))?;
        let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
        let header = [NAME.as_slice(), &[VERSION], &len.to_be_bytes(), &text].concat();
        out.write_all(&header)?;
        Ok(Self { out, key, header, buffer: Vec::with_capacity(CHUNK + TAG), chunk: 0 })
    }

    /// Seals what is left and ends the file. Without this it does not open.
    ///
    /// # Errors
    ///
    /// [`BackupError::Io`].
    pub fn finish(mut self) -> Result<W, BackupError> {
        self.seal(true)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn seal(&mut self, last: bool) -> Result<(), BackupError> {
        let nonce = nonce(self.chunk, last);
        let sealed = self.key.seal_in_place_append_tag(nonce, Aad::from(&self.header), &mut self.buffer);
        sealed.map_err(|_| BackupError::Key("the cipher refused".to_owned()))?;
        self.out.write_all(&self.buffer)?;
        self.buffer.clear();
        self.chunk += 1;
        Ok(())
    }
}

impl<W: Write> Write for Sealer<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.buffer.len() == CHUNK {
            // A full chunk is the last if nothing follows, so it is sealed only when something does.
            self.seal(false).map_err(std::io::Error::other)?;
        }
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend(bytes.iter().take(taken));
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// Reads a backup. A read that ends without an error has seen the whole file as it was written.
pub struct Opener<R: Read> {
    from: R,
    key: LessSafeKey,
    header: Vec<u8>,
    /// Sealed bytes that were read ahead: whether a chunk is the last shows by what follows it.
    ahead: Vec<u8>,
    plain: Vec<u8>,
    taken: usize,
    chunk: u64,
    ended: bool,
}

/// Reads the header of a backup, so that the right secret can be asked for.
///
/// # Errors
///
/// [`BackupError::Io`], [`BackupError::Foreign`] and [`BackupError::Version`].
pub fn header(from: &mut impl Read) -> Result<(Header, Vec<u8>), BackupError> {
    let mut magic = [0; 8];
    read_exactly(from, &mut magic, "it is too short")?;
    let [name @ .., version] = &magic;
    if name != NAME {
        return Err(BackupError::Foreign("it does not begin as a backup does"));
    }
    if *version != VERSION {
        return Err(BackupError::Version(*version));
    }
    let mut len = [0; 4];
    read_exactly(from, &mut len, "it is too short")?;
    let size = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
    if size > HEADER {
        return Err(BackupError::Foreign("its header is too long"));
    }
    let mut text = vec![0; size];
    read_exactly(from, &mut text, "its header is cut")?;
    let header =
        serde_json::from_slice(&text).map_err(|_| BackupError::Foreign("its header cannot be read"))?;
    Ok((header, [magic.as_slice(), &len, &text].concat()))
}

impl<R: Read> Opener<R> {
    /// Opens what follows a header.
    ///
    /// # Errors
    ///
    /// [`BackupError::OtherSecret`], [`BackupError::Foreign`] and [`BackupError::Key`].
    pub fn new(from: R, (header, bytes): (Header, Vec<u8>), secret: &Secret) -> Result<Self, BackupError> {
        let salt = unhex(&header.salt).ok_or(BackupError::Foreign("its salt cannot be read"))?;
        let key = sealing(&*secret.key(&header.key, &salt)?)?;
        let (ahead, plain) = (Vec::with_capacity(CHUNK + TAG + 1), Vec::new());
        Ok(Self { from, key, header: bytes, ahead, plain, taken: 0, chunk: 0, ended: false })
    }

    /// Opens the next chunk.
    fn open(&mut self) -> Result<(), BackupError> {
        // One byte more than a chunk says that another follows.
        let want = CHUNK + TAG + 1 - self.ahead.len();
        (&mut self.from).take(want as u64).read_to_end(&mut self.ahead)?;
        let last = self.ahead.len() <= CHUNK + TAG;
        let rest = self.ahead.split_off(self.ahead.len().min(CHUNK + TAG));
        self.plain = std::mem::replace(&mut self.ahead, rest);
        self.taken = 0;
        if self.plain.len() < TAG {
            return Err(BackupError::Cut { chunk: self.chunk.saturating_sub(1) });
        }
        let nonce = nonce(self.chunk, last);
        let opened = self.key.open_in_place(nonce, Aad::from(&self.header), &mut self.plain);
        let len = opened.map_err(|_| BackupError::Sealed { chunk: self.chunk })?.len();
        self.plain.truncate(len);
        self.ended = last;
        self.chunk += 1;
        Ok(())
    }
}

impl<R: Read> Read for Opener<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        while self.taken == self.plain.len() && !self.ended {
            self.open().map_err(std::io::Error::other)?;
        }
        let rest = self.plain.get(self.taken..).unwrap_or_default();
        let given = rest.len().min(into.len());
        for (to, from) in into.iter_mut().zip(rest) {
            *to = *from;
        }
        self.taken += given;
        Ok(given)
    }
}

fn sealing(key: &[u8; 32]) -> Result<LessSafeKey, BackupError> {
    let key = UnboundKey::new(&AES_256_GCM, key);
    Ok(LessSafeKey::new(key.map_err(|_| BackupError::Key("the cipher refused".to_owned()))?))
}

/// Never twice the same under one key: a number, and at its end whether the chunk is the last.
fn nonce(chunk: u64, last: bool) -> Nonce {
    let [a, b, c, d, e, f, g, h] = chunk.to_be_bytes();
    Nonce::assume_unique_for_key([0, 0, 0, a, b, c, d, e, f, g, h, u8::from(last)])
}

fn read_exactly(from: &mut impl Read, into: &mut [u8], short: &'static str) -> Result<(), BackupError> {
    from.read_exact(into).map_err(|error| {
        let cut = error.kind() == std::io::ErrorKind::UnexpectedEof;
        if cut { BackupError::Foreign(short) } else { BackupError::Io(error) }
    })
}

fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u32> = text.chars().map(|c| c.to_digit(16)).collect::<Option<_>>()?;
    let bytes = digits
        .chunks_exact(2)
        .map(|pair| pair.iter().fold(0_u8, |byte, digit| byte << 4 | u8::try_from(*digit).unwrap_or(0)));
    <[u8; 32]>::try_from(bytes.collect::<Vec<_>>()).ok().filter(|_| digits.len() == 64)
}

#[cfg(test)]
mod tests;
