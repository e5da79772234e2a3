//! Who this member is: its number and the life of its data, in one small file.
//!
//! A number is never used again after its data is lost, because the others would count on what it once promised.
//! The incarnation, drawn when the data is made, is in every file, so that files of two lives are never mixed.

use std::path::{Path, PathBuf};

use prost::Message as _;

use super::disk::{Disk, write_atomically};
use super::wire::MemberIdentity;

const NAME: &str = "member";
const MAGIC: &[u8; 8] = b"ISTIODME";

/// Why the identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// The disk refused.
    #[error("cannot read or write {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The content does not match its checksum.
    #[error("{} is damaged; remove this member and let it join again under a new id", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
    /// The settings name another member than the data.
    #[error("the data in {} is that of member {found}, the settings say {expected}; an id is never used again", path.display())]
    OtherMember {
        /// The file.
        path: PathBuf,
        /// What the settings say.
        expected: u64,
        /// What the data says.
        found: u64,
    },
    /// There is a log, but nobody knows whose.
    #[error(
        "{} is missing, but there is a log beside it: put the file back, or remove this member and let it join again under a new id",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
}

/// Reads the identity in `dir`; nothing if there is none.
///
/// # Errors
///
/// [`MemberError`].
pub fn read(disk: &dyn Disk, dir: &Path) -> Result<Option<MemberIdentity>, MemberError> {
    let path = dir.join(NAME);
    let names = disk.list(dir).map_err(|source| MemberError::Io { path: path.clone(), source })?;
    if !names.iter().any(|name| name == NAME) {
        return Ok(None);
    }
    let bytes = disk.read(&path).map_err(|source| MemberError::Io { path: path.clone(), source })?;
    decode(&bytes).map(Some).ok_or(MemberError::Corrupt { path })
}

/// Writes the identity, durably.
///
/// # Errors
///
/// [`MemberError::Io`].
pub fn write(disk: &dyn Disk, dir: &Path, identity: &MemberIdentity) -> Result<(), MemberError> {
    let body = identity.encode_to_vec();
    let crc = crc32c::crc32c(&body).to_le_bytes();
    write_atomically(disk, dir, NAME, &[MAGIC, &crc, &body])
        .map_err(|source| MemberError::Io { path: dir.join(NAME), source })
}

/// Where the identity is kept.
#[must_use]
pub fn path(dir: &Path) -> PathBuf {
    dir.join(NAME)
}

fn decode(bytes: &[u8]) -> Option<MemberIdentity> {
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let (crc, body) = rest.split_first_chunk::<4>()?;
    if magic != MAGIC || u32::from_le_bytes(*crc) != crc32c::crc32c(body) {
        return None;
    }
    MemberIdentity::decode(body).ok()
}
