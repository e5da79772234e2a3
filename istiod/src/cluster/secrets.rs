//! What a member keeps of its cluster: its number, the peers' certificate authority, and the cluster's key.
//!
//! All members hold both secrets, so that any of them can take in the next one when the founder is gone. They lie in
//! the folder `peers` of the data folder, readable by their owner alone, and never in the log. The root key of the mesh
//! lies in the log, sealed under the cluster's key: whoever is a member can issue, and a copy of the log alone cannot.
//! A member that was removed has held these secrets: if it is not trusted any more, both authorities must be rotated.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use ca::authn::{Hash, Secret, TokenError};
use ca::authority::{PluggedError, PluggedIn, Serial, SignError, SigningRoot};
use ca::keystore::{KeyStore, KeyStoreError};
use ca::seal::{SealError, SealingKey};
use ca::x509;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::ticket::Ticket;
use crate::raft::peers::tls;
use crate::raft::wire::EnrolReply;

/// In the data folder.
const FOLDER: &str = "peers";
const CERT: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const CLUSTER_KEY: &str = "cluster-key";
const MEMBERSHIP: &str = "membership.json";
const TICKET: &str = "ticket";

/// Which member lives here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Its number.
    pub id: u64,
    /// It began the cluster; the others were taken in.
    pub founded: bool,
    /// Where the members were when this one last knew.
    pub peers: BTreeMap<u64, String>,
    /// Its log was begun: if it is gone now, it was lost.
    #[serde(default)]
    pub started: bool,
}

/// What all members hold.
#[derive(Clone)]
pub struct Secrets {
    ca_cert: String,
    ca_key: Zeroizing<String>,
    /// Seals what lies in the log.
    pub key: SealingKey,
}

/// Why what is kept cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    /// The files.
    #[error("the secrets of the cluster cannot be read or written")]
    Store(#[from] KeyStoreError),
    /// The peers' authority.
    #[error("the peers' certificate authority cannot be used")]
    Authority(#[from] PluggedError),
    /// A new one cannot be made.
    #[error("no certificate authority for peers can be made")]
    Sign(#[from] SignError),
    /// The cluster's key.
    #[error("the cluster's key cannot be used")]
    Key(#[from] SealError),
    /// No randomness.
    #[error(transparent)]
    Random(#[from] TokenError),
    /// A file is not what was written.
    #[error("{0} is damaged or missing")]
    Damaged(String),
}

/// The folder.
#[derive(Debug, Clone)]
pub struct Kept {
    store: KeyStore,
}

impl Kept {
    /// Opens the folder, making it if it is not there.
    ///
    /// # Errors
    ///
    /// [`SecretsError::Store`].
    pub fn open(data_dir: &Path) -> Result<Self, SecretsError> {
        Ok(Self { store: KeyStore::open(data_dir.join(FOLDER))? })
    }

    /// Where it is.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.store.dir()
    }

    /// Which member lives here; nothing before it has founded or joined a cluster.
    ///
    /// # Errors
    ///
    /// [`SecretsError`].
    pub fn membership(&self) -> Result<Option<Membership>, SecretsError> {
        let Some(bytes) = self.store.load(MEMBERSHIP)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|_| self.damaged(MEMBERSHIP))
    }

    /// What all members hold.
    ///
    /// # Errors
    ///
    /// [`SecretsError`], also when there is nothing yet.
    pub fn secrets(&self) -> Result<Secrets, SecretsError> {
        let load = |name: &str| self.store.load(name)?.ok_or_else(|| self.damaged(name));
        let text = |name: &str| {
            let bytes = load(name)?;
            std::str::from_utf8(&bytes).map(str::to_owned).map_err(|_| self.damaged(name))
        };
        let key = SealingKey::from_bytes(&load(CLUSTER_KEY)?)?;
        Ok(Secrets { ca_cert: text(CERT)?, ca_key: Zeroizing::new(text(KEY)?), key })
    }

    /// Makes the secrets of a new cluster whose first member is `id`. Made before, they stay.
    ///
    /// # Errors
    ///
    /// [`SecretsError`].
    pub fn found(&self, id: u64, now: SystemTime) -> Result<(), SecretsError> {
        if self.membership()?.is_some() {
            return Ok(());
        }
        let files = SigningRoot::generate(&tls::domain(), now, Serial::random()?)?.to_files();
        let secrets = Secrets { ca_cert: files.ca_cert, ca_key: files.ca_key, key: SealingKey::random()? };
        self.keep(&secrets, &Membership { id, founded: true, peers: BTreeMap::new(), started: false })
    }

    /// Keeps what a member was given when it was taken in.
    ///
    /// # Errors
    ///
    /// [`SecretsError`].
    pub fn joined(&self, reply: EnrolReply, now: SystemTime) -> Result<Membership, SecretsError> {
        let secrets = Secrets {
            ca_cert: reply.ca_cert,
            ca_key: Zeroizing::new(reply.ca_key),
            key: SealingKey::from_bytes(&reply.cluster_key)?,
        };
        secrets.root(now)?;
        let peers = reply.peers.into_iter().map(|peer| (peer.id, peer.address)).collect();
        let membership = Membership { id: reply.id, founded: false, peers, started: false };
        self.keep(&secrets, &membership)?;
        Ok(membership)
    }

    /// The membership is written last, so that a start that was cut short begins anew.
    fn keep(&self, secrets: &Secrets, membership: &Membership) -> Result<(), SecretsError> {
        self.store.store(CERT, secrets.ca_cert.as_bytes())?;
        self.store.store(KEY, secrets.ca_key.as_bytes())?;
        self.store.store(CLUSTER_KEY, secrets.key.expose())?;
        self.note(membership)
    }

    /// Notes what has changed of the membership.
    ///
    /// # Errors
    ///
    /// [`SecretsError::Store`].
    pub fn note(&self, membership: &Membership) -> Result<(), SecretsError> {
        let text = serde_json::to_vec(membership).unwrap_or_default();
        Ok(self.store.store(MEMBERSHIP, &text)?)
    }

    /// A word that says which machine asks to be taken in under `purpose`; drawn once and kept.
    ///
    /// # Errors
    ///
    /// [`SecretsError`].
    pub fn instance(&self, purpose: &str) -> Result<String, SecretsError> {
        let name: String = format!("instance-{}", Hash::of(purpose.as_bytes())).chars().take(25).collect();
        if let Some(kept) = self.store.load(&name)? {
            return String::from_utf8(kept.to_vec()).map_err(|_| self.damaged(&name));
        }
        let drawn = Secret::random()?;
        self.store.store(&name, drawn.expose().as_bytes())?;
        Ok(drawn.expose().to_owned())
    }

    /// Keeps the ticket with which this machine will join, for its first start.
    ///
    /// # Errors
    ///
    /// [`SecretsError::Store`].
    pub fn keep_ticket(&self, ticket: &str) -> Result<(), SecretsError> {
        Ok(self.store.store(TICKET, ticket.as_bytes())?)
    }

    /// The ticket that was kept. It stays when it was used: who is a member never looks at it.
    ///
    /// # Errors
    ///
    /// [`SecretsError`].
    pub fn ticket(&self) -> Result<Option<Ticket>, SecretsError> {
        let Some(bytes) = self.store.load(TICKET)? else { return Ok(None) };
        let text = std::str::from_utf8(&bytes).map_err(|_| self.damaged(TICKET))?;
        Ticket::parse(text).map(Some).map_err(|_| self.damaged(TICKET))
    }

    fn damaged(&self, name: &str) -> SecretsError {
        SecretsError::Damaged(self.store.dir().join(name).display().to_string())
    }
}

impl Secrets {
    /// The peers' root.
    ///
    /// # Errors
    ///
    /// [`SecretsError::Authority`].
    pub fn root(&self, now: SystemTime) -> Result<SigningRoot, SecretsError> {
        let files = PluggedIn {
            ca_cert: self.ca_cert.clone(),
            ca_key: self.ca_key.clone(),
            cert_chain: String::new(),
            root_cert: self.ca_cert.clone(),
        };
        Ok(files.check(now)?)
    }

    /// The fingerprint of the peers' root.
    ///
    /// # Errors
    ///
    /// [`SecretsError::Damaged`].
    pub fn fingerprint(&self) -> Result<Hash, SecretsError> {
        let certs = x509::certificates_from_pem(self.ca_cert.as_bytes());
        let first = certs.ok().and_then(|certs| certs.into_iter().next());
        first.map(|cert| Hash::of(&cert)).ok_or_else(|| SecretsError::Damaged(CERT.to_owned()))
    }

    /// What a new member with number `id` is given.
    #[must_use]
    pub fn reply(&self, id: u64, trust_domain: &str) -> EnrolReply {
        EnrolReply {
            id,
            peers: Vec::new(),
            ca_cert: self.ca_cert.clone(),
            ca_key: self.ca_key.to_string(),
            cluster_key: self.key.expose().to_vec().into(),
            trust_domain: trust_domain.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn what_the_founder_made_is_what_the_next_member_keeps() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let founder = Kept::open(first.path()).unwrap();
        assert_eq!(founder.membership().unwrap(), None);
        assert!(founder.secrets().is_err());
        founder.found(1, now).unwrap();
        let secrets = founder.secrets().unwrap();
        founder.found(1, now).unwrap();
        assert_eq!(founder.secrets().unwrap().fingerprint().unwrap(), secrets.fingerprint().unwrap());
        let next = Kept::open(second.path()).unwrap();
        let instance = next.instance("x").unwrap();
        assert_eq!(next.instance("x").unwrap(), instance);
        assert_ne!(next.instance("y").unwrap(), instance);
        let mut reply = secrets.reply(2, "cluster.local");
        reply.peers.push(crate::raft::wire::PeerAddress { id: 1, address: "a:1".to_owned() });
        let membership = next.joined(reply, now).unwrap();
        assert_eq!((membership.id, membership.founded, membership.peers[&1].as_str()), (2, false, "a:1"));
        assert_eq!(next.membership().unwrap(), Some(membership));
        let kept = next.secrets().unwrap();
        assert_eq!(kept.root(now).unwrap().certificate(), secrets.root(now).unwrap().certificate());
        assert_eq!(kept.key.expose(), secrets.key.expose());
    }
}
