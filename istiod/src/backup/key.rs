//! The key of one backup, from a secret and the file's salt.

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::BackupError;

/// The fewest bytes of a key file.
const LEAST_KEY: usize = 32;
/// The fewest characters of a passphrase.
const LEAST_PASSPHRASE: usize = 8;
/// What the key is for: no other use of the same key file gives the same key.
const PURPOSE: &[u8] = b"istiod backup 1";

/// What opens a backup.
pub enum Secret {
    /// Words that somebody remembers.
    Passphrase(Zeroizing<String>),
    /// Bytes of a file, which are random.
    KeyFile(Zeroizing<Vec<u8>>),
}

/// What guessing a passphrase costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    /// Memory, in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Default for Cost {
    /// The second recommendation of RFC 9106, section 4.
    fn default() -> Self {
        Self { memory_kib: 64 << 10, passes: 3, lanes: 4 }
    }
}

impl Cost {
    /// The most that opening a file may ask of this machine: a header is not authenticated before the key is made.
    const MOST: Self = Self { memory_kib: 1 << 20, passes: 16, lanes: 16 };
}

/// How the key of a file is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KeySource {
    /// From a passphrase, by Argon2id (RFC 9106), version 19.
    Argon2id(Cost),
    /// From a key file, by HKDF-SHA256 (RFC 5869).
    Hkdf,
}

impl KeySource {
    fn needs(self) -> &'static str {
        match self {
            Self::Argon2id(_) => "a passphrase",
            Self::Hkdf => "a key file",
        }
    }
}

impl Secret {
    /// A passphrase.
    ///
    /// # Errors
    ///
    /// [`BackupError::Key`] when it is too short to be one.
    pub fn passphrase(text: Zeroizing<String>) -> Result<Self, BackupError> {
        if text.chars().count() < LEAST_PASSPHRASE {
            let why = format!("the passphrase has fewer than {LEAST_PASSPHRASE} characters");
            return Err(BackupError::Key(why));
        }
        Ok(Self::Passphrase(text))
    }

    /// The content of a key file.
    ///
    /// # Errors
    ///
    /// [`BackupError::Key`] when it is too short to be one.
    pub fn key_file(bytes: Zeroizing<Vec<u8>>) -> Result<Self, BackupError> {
        if bytes.len() < LEAST_KEY {
            let why = format!(
                "the key file has fewer than {LEAST_KEY} bytes; `openssl rand -out FILE 32` makes one"
            );
            return Err(BackupError::Key(why));
        }
        Ok(Self::KeyFile(bytes))
    }

    pub(super) fn source(&self, cost: Cost) -> KeySource {
        match self {
            Self::Passphrase(_) => KeySource::Argon2id(cost),
            Self::KeyFile(_) => KeySource::Hkdf,
        }
    }

    pub(super) fn key(
        &self,
        source: &KeySource,
        salt: &[u8; 32],
    ) -> Result<Zeroizing<[u8; 32]>, BackupError> {
        let mut key = Zeroizing::new([0; 32]);
        match (self, source) {
            (Self::Passphrase(text), KeySource::Argon2id(cost)) => {
                let most = Cost::MOST;
                if cost.memory_kib > most.memory_kib || cost.passes > most.passes || cost.lanes > most.lanes {
                    return Err(BackupError::Foreign("its header asks for too much memory or time"));
                }
                let failed = |error: argon2::Error| BackupError::Key(error.to_string());
                let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(key.len()));
                let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params.map_err(failed)?);
                argon.hash_password_into(text.as_bytes(), salt, key.as_mut()).map_err(failed)?;
            }
            (Self::KeyFile(bytes), KeySource::Hkdf) => {
                let failed = |_| BackupError::Key("the key derivation refused".to_owned());
                let extracted = Salt::new(HKDF_SHA256, salt).extract(bytes);
                let expanded = extracted.expand(&[PURPOSE], Length(key.len())).map_err(failed)?;
                expanded.fill(key.as_mut()).map_err(failed)?;
            }
            (given, needed) => {
                let given = given.source(Cost::default()).needs();
                return Err(BackupError::OtherSecret { needed: needed.needs(), given });
            }
        }
        Ok(key)
    }
}

/// How many bytes to make.
struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}
