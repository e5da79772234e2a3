//! The agent's folder: what is in it is sealed under a key that the service manager hands over, or else lies in the folder
//! itself for its owner alone.
//!
//! With the manager's key (systemd-creds(1), bound to the machine's TPM or to its root) a copy of the disk tells nothing.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use ca::keystore::KeyStore;
use ca::seal::SealingKey;
use zeroize::Zeroizing;

/// Name of the manager's credential.
const CREDENTIAL: &str = "istio-agent.key";
/// Where an administrator puts it, encrypted, for the service.
const ENCRYPTED: &str = "/etc/credstore.encrypted/istio-agent.key";
/// What the unit says when there is none.
const NO_CREDENTIAL: &[u8] = b"none";
/// The key in the folder.
const FILE: &str = "sealing-key";

/// Opens the folder, and makes it when it is not there. `key` is the one that was handed over.
///
/// # Errors
///
/// The folder or its key cannot be used.
pub fn open(folder: &Path, key: Option<SealingKey>) -> anyhow::Result<KeyStore> {
    let store = KeyStore::open(folder)?;
    let key = match key {
        Some(key) => key,
        None => own(&store)?,
    };
    Ok(store.sealed(key))
}

fn own(store: &KeyStore) -> anyhow::Result<SealingKey> {
    if let Some(bytes) = store.load(FILE)? {
        return SealingKey::from_bytes(&bytes).with_context(|| store.dir().join(FILE).display().to_string());
    }
    let key = SealingKey::random()?;
    store.store(FILE, key.expose())?;
    Ok(key)
}

/// The key that the service manager hands to the service; root, who joins by hand, asks the manager's tool for it.
///
/// # Errors
///
/// It cannot be read, or is no key.
#[expect(clippy::disallowed_methods, reason = "where credentials are, as systemd.exec(5) has it")]
pub fn handed_over() -> anyhow::Result<Option<SealingKey>> {
    let key = match std::env::var("CREDENTIALS_DIRECTORY") {
        Ok(folder) => match std::fs::read(Path::new(&folder).join(CREDENTIAL)) {
            Ok(key) => Zeroizing::new(key),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(CREDENTIAL),
        },
        Err(_) if Path::new(ENCRYPTED).exists() => decrypted()?,
        Err(_) => return Ok(None),
    };
    if *key == NO_CREDENTIAL {
        return Ok(None);
    }
    SealingKey::from_bytes(&key).map(Some).with_context(|| format!("the credential {CREDENTIAL}"))
}

fn decrypted() -> anyhow::Result<Zeroizing<Vec<u8>>> {
    let name = format!("--name={CREDENTIAL}");
    let output = Command::new("systemd-creds").args(["decrypt", &name, ENCRYPTED, "-"]).output();
    let output = output.context("cannot run systemd-creds")?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{ENCRYPTED}: {}", told.trim());
    Ok(Zeroizing::new(output.stdout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_sealed_and_there_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path(), None).unwrap().store("a", b"secret").unwrap();
        assert_eq!(open(folder.path(), None).unwrap().load("a").unwrap().unwrap().as_slice(), b"secret");
        assert!(!std::fs::read(folder.path().join("a")).unwrap().ends_with(b"secret"));
        std::fs::remove_file(folder.path().join(FILE)).unwrap();
        assert!(open(folder.path(), None).unwrap().load("a").is_err(), "another key opens nothing");
        std::fs::write(folder.path().join(FILE), b"short").unwrap();
        assert!(open(folder.path(), None).unwrap_err().to_string().contains(FILE));
    }
}
