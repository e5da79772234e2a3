//! Secrets that lie where others may read: sealed under a key that only those hold who may open them, such as the members
//! of a control plane, or one agent.
//!
//! AES-256-GCM with a random nonce of 96 bits in front of what it seals (NIST SP 800-38D, 8.2.2); a key seals far less
//! than the 2^32 values that such nonces allow. What the secret is for is authenticated with it, so that one cannot stand in for another.

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::rand;
use zeroize::Zeroizing;

/// Bytes of a key.
pub const KEY_LEN: usize = 32;

/// Why a secret is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The bytes are not a key.
    #[error("a key has {KEY_LEN} bytes")]
    Key,
    /// Another key sealed it, for another purpose, or it is damaged.
    #[error("it was sealed under another key or for another purpose, or is damaged")]
    Damaged,
    /// The system has no randomness.
    #[error("the system has no randomness")]
    NoRandomness,
}

/// The key under which secrets are sealed. Wiped when dropped, never printed.
#[derive(Clone)]
pub struct SealingKey(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealingKey(..)")
    }
}

impl SealingKey {
    /// A new one.
    ///
    /// # Errors
    ///
    /// [`SealError::NoRandomness`].
    pub fn random() -> Result<Self, SealError> {
        let mut bytes = Zeroizing::new(vec![0; KEY_LEN]);
        rand::fill(&mut bytes).map_err(|_| SealError::NoRandomness)?;
        Ok(Self(bytes))
    }

    /// One that was kept.
    ///
    /// # Errors
    ///
    /// [`SealError::Key`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SealError> {
        if bytes.len() == KEY_LEN { Ok(Self(Zeroizing::new(bytes.to_vec()))) } else { Err(SealError::Key) }
    }

    /// The key itself, to be kept or handed to somebody else who may open.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Seals `secret` for `purpose`.
    ///
    /// # Errors
    ///
    /// [`SealError::NoRandomness`].
    pub fn seal(&self, purpose: &str, secret: &[u8]) -> Result<Vec<u8>, SealError> {
        let mut body = secret.to_vec();
        let nonce = self.aead()?.seal_in_place_append_tag(Aad::from(purpose), &mut body);
        let nonce = nonce.map_err(|_| SealError::NoRandomness)?;
        let mut sealed = nonce.as_ref().to_vec();
        sealed.append(&mut body);
        Ok(sealed)
    }

    /// The secret that was sealed for `purpose`.
    ///
    /// # Errors
    ///
    /// [`SealError::Damaged`].
    pub fn open(&self, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (nonce, body) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(SealError::Damaged)?;
        let mut body = Zeroizing::new(body.to_vec());
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = self.aead()?.open_in_place(nonce, Aad::from(purpose), &mut body);
        let length = opened.map_err(|_| SealError::Damaged)?.len();
        body.truncate(length);
        Ok(body)
    }

    fn aead(&self) -> Result<RandomizedNonceKey, SealError> {
        RandomizedNonceKey::new(&AES_256_GCM, &self.0).map_err(|_| SealError::Key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_key_opens_for_the_same_purpose() {
        let (key, other) = (SealingKey::random().unwrap(), SealingKey::random().unwrap());
        let sealed = key.seal("root", b"secret").unwrap();
        assert_eq!(&key.open("root", &sealed).unwrap()[..], b"secret");
        let again = SealingKey::from_bytes(key.expose()).unwrap();
        assert_eq!(&again.open("root", &sealed).unwrap()[..], b"secret");
        assert_eq!(key.open("backup", &sealed).unwrap_err(), SealError::Damaged);
        assert_eq!(other.open("root", &sealed).unwrap_err(), SealError::Damaged);
        assert_ne!(key.seal("root", b"secret").unwrap(), sealed, "every nonce is new");
        assert_eq!(SealingKey::from_bytes(b"short").unwrap_err(), SealError::Key);
    }

    #[test]
    fn every_changed_byte_is_told() {
        let key = SealingKey::random().unwrap();
        let sealed = key.seal("root", b"secret").unwrap();
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert_eq!(key.open("root", &damaged).unwrap_err(), SealError::Damaged, "byte {at}");
        }
        for length in 0..sealed.len() {
            assert_eq!(key.open("root", &sealed[..length]).unwrap_err(), SealError::Damaged);
        }
    }
}
