//! The session of a registration, kept while one process of the agent follows another.
//!
//! A workload that is registered again with the session it has stays as healthy as it was: for the control plane and
//! for other proxies nothing happens.

use ca::keystore::{KeyStore, KeyStoreError};

/// File of the key store with the session for the next process.
const FILE: &str = "session";

/// Leaves a session to the process that follows.
///
/// # Errors
///
/// When it cannot be written; the next process then registers anew.
pub fn leave(store: &KeyStore, session: &str) -> Result<(), KeyStoreError> {
    store.store(FILE, session.as_bytes())
}

/// The session that the process before this one left. It is not there a second time: whoever starts later, after a crash
/// for example, is a new session.
#[must_use]
pub fn take(store: &KeyStore) -> Option<String> {
    let kept = store
        .load(FILE)
        .and_then(|kept| kept.map_or(Ok(None), |kept| store.remove(FILE).map(|()| Some(kept))));
    match kept {
        Ok(kept) => kept.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok()),
        Err(error) => {
            tracing::warn!(%error, "the session of before cannot be used");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = KeyStore::open(folder.path()).unwrap();
        assert_eq!(take(&store), None);
        leave(&store, "a").unwrap();
        assert_eq!(take(&store).as_deref(), Some("a"));
        assert_eq!(take(&store), None);
    }
}
