//! What a backup holds, and what of it a new cluster begins with.

use std::io::{Read, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::BackupError;
use crate::raft::View;

/// The longest manifest.
const MANIFEST: u32 = 1 << 20;
/// The newest version of what is sealed that this program reads.
const VERSION: u32 = 1;

/// What a backup says of itself, sealed with it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Version of the content.
    pub version: u32,
    /// The revision of the state: everything up to it, and nothing after.
    pub revision: u64,
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: i64,
    /// The root of the mesh's certificates with its private key, if the operator asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<AuthorityFiles>,
}

impl std::fmt::Debug for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { version, revision, trust_domain, created_ms, authority } = self;
        f.debug_struct("Manifest")
            .field("version", version)
            .field("revision", revision)
            .field("trust_domain", trust_domain)
            .field("created_ms", created_ms)
            .field("authority", &authority.is_some())
            .finish()
    }
}

/// The files of a member's authority, by name, as PEM.
pub type AuthorityFiles = std::collections::BTreeMap<String, Zeroizing<String>>;

impl Manifest {
    /// A manifest in today's form.
    #[must_use]
    pub fn new(
        revision: u64,
        trust_domain: &str,
        created_ms: i64,
        authority: Option<AuthorityFiles>,
    ) -> Self {
        Self { version: VERSION, revision, trust_domain: trust_domain.to_owned(), created_ms, authority }
    }

    /// Writes it, to be followed by the state.
    ///
    /// # Errors
    ///
    /// [`BackupError::Io`].
    pub fn write(&self, out: &mut impl Write) -> Result<(), BackupError> {
        let text = serde_json::to_vec(self).map(Zeroizing::new);
        let text = text.map_err(|error| BackupError::Content(error.to_string()))?;
        let len = u32::try_from(text.len()).ok().filter(|len| *len <= MANIFEST);
        let len =
            len.ok_or_else(|| BackupError::Content("the files of the authority are too large".to_owned()))?;
        out.write_all(&len.to_be_bytes())?;
        Ok(out.write_all(&text)?)
    }

    /// Reads what [`Manifest::write`] wrote; the state follows.
    ///
    /// # Errors
    ///
    /// [`BackupError::Io`], also when the backup does not open, and [`BackupError::Content`].
    pub fn read(from: &mut impl Read) -> Result<Self, BackupError> {
        let mut len = [0; 4];
        from.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len);
        if len > MANIFEST {
            return Err(BackupError::Content("its manifest is too long".to_owned()));
        }
        let mut text = Zeroizing::new(Vec::new());
        from.take(u64::from(len)).read_to_end(&mut text)?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| BackupError::Content(error.to_string()))?;
        if manifest.version > VERSION {
            let newer = format!("it has version {}, this program knows up to {VERSION}", manifest.version);
            return Err(BackupError::Content(newer));
        }
        Ok(manifest)
    }
}

/// The state that a new cluster begins with.
#[derive(Debug, Clone)]
pub struct State {
    /// Its revision; the log of the new cluster begins after it, so that no revision comes twice.
    pub revision: u64,
    /// As a snapshot has it.
    pub bytes: Vec<u8>,
}

/// What of a backed-up state a new cluster begins with: everything but the members, which are its own.
///
/// # Errors
///
/// [`BackupError::Content`] when it is not a state that this program knows.
pub fn restorable(revision: u64, bytes: &[u8]) -> Result<State, BackupError> {
    let view = View::decode(revision, bytes).map_err(|halt| BackupError::Content(halt.reason))?;
    if view.registry.revision().0 > revision {
        return Err(BackupError::Content("its state is newer than its revision".to_owned()));
    }
    let view = View { cluster: Arc::default(), ..view };
    Ok(State { revision, bytes: view.encode() })
}
