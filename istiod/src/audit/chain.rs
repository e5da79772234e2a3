//! The hash chain: the canonical form of an entry, and following the chain.

use ca::authn::Hash;

use super::{Anchor, AuditEntry, AuditObject, Origin};

/// The first bytes of every canonical form. Hashed alone, they are what the first entry of all follows.
pub(super) const FORM: &[u8] = b"istiod audit entry 1\n";

/// Why a chain does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// An entry does not say what it said when it was made.
    #[error("the entry of revision {revision} has been changed: its content does not have its hash")]
    Changed {
        /// Its revision.
        revision: u64,
    },
    /// Something between two entries is missing, or they are in another order.
    #[error(
        "the entry of revision {revision} does not follow the one before it: entries are missing or moved"
    )]
    Gap {
        /// The revision of the later one.
        revision: u64,
    },
}

impl Broken {
    /// The revision of the entry at which it shows.
    #[must_use]
    pub fn revision(&self) -> u64 {
        match self {
            Self::Changed { revision } | Self::Gap { revision } => *revision,
        }
    }
}

/// Follows the chain from its anchor over `entries`, oldest first; gives the hash of the last one.
///
/// It shows every change of what is there. That the newest entries were cut off shows when the hash is compared with
/// one that was noted elsewhere.
///
/// # Errors
///
/// [`Broken`] at the first entry that does not fit.
pub fn verify<'a>(
    anchor: &Anchor,
    entries: impl IntoIterator<Item = &'a AuditEntry>,
) -> Result<Hash, Broken> {
    let (mut head, mut newest) = (anchor.hash, anchor.revision);
    for entry in entries {
        let revision = entry.revision;
        if entry.previous != head || revision <= newest {
            return Err(Broken::Gap { revision });
        }
        if hash(entry.previous, revision, &entry.origin, &entry.objects).0 != entry.hash {
            return Err(Broken::Changed { revision });
        }
        (head, newest) = (entry.hash, revision);
    }
    Ok(head)
}

/// SHA-256 over the canonical form of an entry, and the bytes of that form.
///
/// The form: [`FORM`], the hash before, the revision and the time as eight bytes each (big endian), then `who`, `from`
/// and `action`, then the number of objects and for each its name and its two digests. A text is its length in eight
/// bytes and its bytes; a digest that may be missing is a byte 0, or a byte 1 and its text.
pub(super) fn hash(previous: Hash, revision: u64, origin: &Origin, objects: &[AuditObject]) -> (Hash, usize) {
    let mut form = FORM.to_vec();
    text(&mut form, &previous.to_string());
    form.extend_from_slice(&revision.to_be_bytes());
    form.extend_from_slice(&origin.at_ms.to_be_bytes());
    for part in [&origin.who, &origin.from, &origin.action] {
        text(&mut form, part);
    }
    form.extend_from_slice(&(objects.len() as u64).to_be_bytes());
    for object in objects {
        text(&mut form, &object.what);
        for digest in [object.before, object.after] {
            form.push(u8::from(digest.is_some()));
            if let Some(digest) = digest {
                text(&mut form, &digest.to_string());
            }
        }
    }
    (Hash::of(&form), form.len())
}

fn text(form: &mut Vec<u8>, text: &str) {
    form.extend_from_slice(&(text.len() as u64).to_be_bytes());
    form.extend_from_slice(text.as_bytes());
}
