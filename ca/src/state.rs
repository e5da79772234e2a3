//! Replicated state of the certificate authority: join tokens, revoked nodes and the trust bundle; its commands and
//! `apply`.
//!
//! [`CaState::apply`] is deterministic and cannot fail: a command that does not apply is answered with an outcome and
//! changes nothing. Time enters as a field of the command. A command or a stored value is JSON; new fields are
//! optional, so that old ones decode for ever.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::authn::{Hash, JoinToken, PresentedToken};
use crate::bundle::Bundle;
use crate::identity::{CONTROL_PLANE_ACCOUNT, IdentityError, ROOT_NAMESPACE, SpiffeId, TrustDomain};
use crate::node::{NodeId, Revocation, Revocations};

/// Key of the bundle in the key/value form.
const BUNDLE_KEY: &str = "bundle";
/// Beginning of a token's key in the key/value form.
const TOKEN_KEY: &str = "token/";
/// Beginning of a revoked node's key in the key/value form.
const REVOKED_KEY: &str = "revoked/";

/// A join token as the control plane stores it: bound, limited, and without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Public id.
    pub id: String,
    /// Hash of the secret.
    pub hash: Hash,
    /// Namespace of the identity that the token gives.
    pub namespace: String,
    /// Service account of the identity that the token gives.
    pub service_account: String,
    /// Last second (since 1970) at which the token can be redeemed.
    pub expires_at: u64,
    /// How many more keys may redeem it.
    pub uses_left: u32,
    /// Workload group, `namespace/name`, that the joining workload becomes a member of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_group: Option<String>,
    /// Who made the token.
    #[serde(default)]
    pub created_by: String,
    /// Hashes of the public keys that have redeemed it, with the second at which they first did.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub redeemed_by: BTreeMap<Hash, u64>,
    /// Where machines must call from to redeem it; from anywhere when empty. Never changes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cidrs: Vec<IpNet>,
}

impl TokenRecord {
    /// What is stored of a new token: everything but the secret.
    #[must_use]
    pub fn of(token: &JoinToken, expires_at: SystemTime, uses: u32, created_by: impl Into<String>) -> Self {
        Self {
            id: token.id.clone(),
            hash: token.secret.hash(),
            namespace: token.namespace.clone(),
            service_account: token.service_account.clone(),
            expires_at: unix_seconds(expires_at),
            uses_left: uses,
            workload_group: None,
            created_by: created_by.into(),
            redeemed_by: BTreeMap::new(),
            cidrs: Vec::new(),
        }
    }

    /// Whether it may be redeemed by a machine that calls from there.
    ///
    /// # Errors
    ///
    /// [`RedeemRefused::Elsewhere`], also when it is not known from where.
    pub fn admits(&self, from: Option<IpAddr>) -> Result<(), RedeemRefused> {
        let from = from.map(|address| address.to_canonical());
        let within = |address: IpAddr| self.cidrs.iter().any(|cidr| cidr.contains(&address));
        if self.cidrs.is_empty() || from.is_some_and(within) {
            return Ok(());
        }
        Err(RedeemRefused::Elsewhere(from))
    }

    /// The identity that the token gives.
    ///
    /// # Errors
    ///
    /// When namespace or service account cannot be part of an identity, or it is the control plane's own.
    pub fn identity(&self, domain: &TrustDomain) -> Result<SpiffeId, TokenRefused> {
        if self.namespace == ROOT_NAMESPACE && self.service_account == CONTROL_PLANE_ACCOUNT {
            return Err(TokenRefused::ControlPlane);
        }
        Ok(SpiffeId::workload(domain, &self.namespace, &self.service_account)?)
    }

    fn ended(&self, at: u64) -> bool {
        at > self.expires_at
    }
}

/// Why a token is not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// The namespace or the service account cannot be part of an identity.
    #[error("namespace or service account cannot be part of an identity")]
    Identity(#[from] IdentityError),
    /// Nobody joins as the control plane.
    #[error("`{ROOT_NAMESPACE}/{CONTROL_PLANE_ACCOUNT}` is the control plane's own identity")]
    ControlPlane,
}

/// A change of the replicated state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaCommand {
    /// Adds a join token. One that has the same id already stays as it is.
    AddJoinToken(TokenRecord),
    /// Removes a join token. Certificates that it gave stay valid.
    RevokeJoinToken {
        /// The token's id.
        id: String,
    },
    /// Redeems a token for a public key.
    Redeem {
        /// The token's id.
        id: String,
        /// Hash of the presented secret.
        secret_hash: Hash,
        /// Hash of the public key that is to be certified (its `SubjectPublicKeyInfo`).
        key_hash: Hash,
        /// Seconds since 1970, by the clock of the member that proposed.
        at: u64,
    },
    /// Revokes a node: it gets no certificates and is not served. One that is revoked already stays as it is.
    RevokeNode(Revocation),
    /// Removes tokens, and revocations that nothing depends on any more, that ended before this second since 1970.
    Prune {
        /// Seconds since 1970.
        before: u64,
    },
    /// Replaces the trust bundle as a whole.
    SetBundle(Bundle),
}

impl CaCommand {
    /// The redemption of a presented token.
    #[must_use]
    pub fn redeem(token: &PresentedToken, key_hash: Hash, now: SystemTime) -> Self {
        Self::Redeem { id: token.id.clone(), secret_hash: token.secret_hash, key_hash, at: unix_seconds(now) }
    }
}

/// Why a token was not redeemed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RedeemRefused {
    /// There is no such token, or the secret is wrong: a caller is not told which.
    #[error("unknown join token: it was revoked, has ended long ago, or is another mesh's")]
    Unknown,
    /// The token's time is over.
    #[error("the join token has expired; make another one with `istioctl token create`")]
    Expired,
    /// The token was used by another key.
    #[error("the join token is used up by another machine; make another one with `istioctl token create`")]
    UsedUp,
    /// The machine calls from where it may not be used.
    #[error(
        "the join token is not for machines that call from {}; make another one with `istioctl token create --cidr`",
        .0.map_or_else(|| "an unknown address".to_owned(), |address| address.to_string())
    )]
    Elsewhere(Option<IpAddr>),
    /// The key is of a node that was revoked.
    #[error(
        "this machine's key is of node {0}, which was revoked; join with a new key, from an empty data folder, and a \
         new token"
    )]
    Revoked(NodeId),
}

/// What a redemption does to its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redemption {
    /// It uses the token for a key that has not used it.
    First,
    /// It changes nothing: the key has used the token already.
    Repeated,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CaOutcome {
    /// Nothing is different.
    Unchanged,
    /// The state is different.
    Changed,
    /// The token was redeemed, now or earlier by the same key.
    Redeemed {
        /// Namespace of the identity.
        namespace: String,
        /// Service account of the identity.
        service_account: String,
        /// Workload group that the workload becomes a member of.
        workload_group: Option<String>,
    },
    /// The token was not redeemed.
    Refused(RedeemRefused),
}

/// One key of the key/value form that a command changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The key.
    pub key: String,
    /// The new value; `None` when the key is gone.
    pub value: Option<Vec<u8>>,
}

/// The outcome of a command and what is to be written because of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaEffect {
    /// What the command did.
    pub outcome: CaOutcome,
    /// Changed keys of the key/value form.
    pub writes: Vec<Write>,
}

/// The stored state cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the stored CA state cannot be read at `{key}`")]
pub struct DecodeError {
    key: String,
    #[source]
    source: Option<serde_json::Error>,
}

/// The replicated state of the certificate authority.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaState {
    #[serde(default)]
    tokens: BTreeMap<String, TokenRecord>,
    #[serde(default)]
    bundle: Bundle,
    #[serde(default, skip_serializing_if = "Revocations::is_empty")]
    revoked: Revocations,
}

impl CaState {
    /// The join tokens by id, expired ones included until they are pruned.
    pub fn tokens(&self) -> impl Iterator<Item = &TokenRecord> {
        self.tokens.values()
    }

    /// One join token.
    #[must_use]
    pub fn token(&self, id: &str) -> Option<&TokenRecord> {
        self.tokens.get(id)
    }

    /// The revoked nodes, until nothing depends on it any more.
    #[must_use]
    pub fn revoked(&self) -> &Revocations {
        &self.revoked
    }

    /// Whether [`CaCommand::Prune`] would remove anything.
    #[must_use]
    pub fn has_ended(&self, before: u64) -> bool {
        self.tokens.values().any(|token| token.expires_at < before)
            || self.revoked.values().any(|revocation| revocation.until < before)
    }

    /// The trust bundle.
    #[must_use]
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Applies one command. The same commands give the same state and the same outcomes on every member.
    pub fn apply(&mut self, command: CaCommand) -> CaEffect {
        match command {
            CaCommand::AddJoinToken(record) => self.add(record),
            CaCommand::RevokeJoinToken { id } => self.remove(&[id]),
            CaCommand::Redeem { id, secret_hash, key_hash, at } => {
                self.redeem(&id, secret_hash, key_hash, at)
            }
            CaCommand::RevokeNode(revocation) => self.revoke(revocation),
            CaCommand::Prune { before } => self.prune(before),
            CaCommand::SetBundle(bundle) if bundle == self.bundle => CaEffect::unchanged(),
            CaCommand::SetBundle(bundle) => {
                self.bundle = bundle;
                CaEffect { outcome: CaOutcome::Changed, writes: vec![self.bundle_write()] }
            }
        }
    }

    fn add(&mut self, record: TokenRecord) -> CaEffect {
        if self.tokens.contains_key(&record.id) {
            return CaEffect::unchanged();
        }
        let write = token_write(&record);
        self.tokens.insert(record.id.clone(), record);
        CaEffect { outcome: CaOutcome::Changed, writes: vec![write] }
    }

    fn remove(&mut self, ids: &[String]) -> CaEffect {
        let gone: Vec<_> = ids.iter().filter_map(|id| self.tokens.remove(id)).collect();
        if gone.is_empty() {
            return CaEffect::unchanged();
        }
        let writes =
            gone.iter().map(|t| Write { key: format!("{TOKEN_KEY}{}", t.id), value: None }).collect();
        CaEffect { outcome: CaOutcome::Changed, writes }
    }

    fn revoke(&mut self, revocation: Revocation) -> CaEffect {
        if self.revoked.contains_key(&revocation.node) {
            return CaEffect::unchanged();
        }
        let write = revoked_write(&revocation);
        self.revoked.insert(revocation.node, revocation);
        CaEffect { outcome: CaOutcome::Changed, writes: vec![write] }
    }

    fn prune(&mut self, before: u64) -> CaEffect {
        let ended: Vec<_> =
            self.tokens.values().filter(|t| t.expires_at < before).map(|t| t.id.clone()).collect();
        let mut effect = self.remove(&ended);
        let forgotten = self.revoked.extract_if(.., |_, revocation| revocation.until < before);
        let forgotten: Vec<_> =
            forgotten.map(|(node, _)| Write { key: format!("{REVOKED_KEY}{node}"), value: None }).collect();
        if !forgotten.is_empty() {
            effect.outcome = CaOutcome::Changed;
            effect.writes.extend(forgotten);
        }
        effect
    }

    /// What a redemption by a machine that calls from there would do at `now`, without doing it.
    ///
    /// To be asked before a redemption is proposed: callers without a good token write nothing to the log, and from
    /// where they call is looked at here alone. A member that may be behind must catch up first.
    ///
    /// # Errors
    ///
    /// When the redemption would be refused.
    pub fn check_redeem(
        &self,
        token: &PresentedToken,
        key_hash: Hash,
        from: Option<IpAddr>,
        now: SystemTime,
    ) -> Result<Redemption, RedeemRefused> {
        let redemption = self.decide(&token.id, token.secret_hash, key_hash, unix_seconds(now))?;
        self.tokens.get(&token.id).map_or(Ok(()), |token| token.admits(from))?;
        Ok(redemption)
    }

    /// A key that has redeemed the token may do so again until the token ends: its first answer may have been lost.
    fn decide(&self, id: &str, secret: Hash, key: Hash, at: u64) -> Result<Redemption, RedeemRefused> {
        let token = self.tokens.get(id).filter(|token| token.hash.matches(&secret));
        let token = token.ok_or(RedeemRefused::Unknown)?;
        if token.ended(at) {
            return Err(RedeemRefused::Expired);
        }
        let node = NodeId::of_key(key);
        if self.revoked.contains_key(&node) {
            return Err(RedeemRefused::Revoked(node));
        }
        match (token.redeemed_by.contains_key(&key), token.uses_left) {
            (true, _) => Ok(Redemption::Repeated),
            (false, 0) => Err(RedeemRefused::UsedUp),
            (false, _) => Ok(Redemption::First),
        }
    }

    fn redeem(&mut self, id: &str, secret: Hash, key: Hash, at: u64) -> CaEffect {
        let decision = self.decide(id, secret, key, at);
        let (first, token) = match (decision, self.tokens.get_mut(id)) {
            (Ok(redemption), Some(token)) => (redemption == Redemption::First, token),
            (Err(reason), _) => return CaEffect::refused(reason),
            (Ok(_), None) => return CaEffect::refused(RedeemRefused::Unknown),
        };
        if first {
            token.uses_left = token.uses_left.saturating_sub(1);
            token.redeemed_by.insert(key, at);
        }
        let outcome = CaOutcome::Redeemed {
            namespace: token.namespace.clone(),
            service_account: token.service_account.clone(),
            workload_group: token.workload_group.clone(),
        };
        CaEffect { outcome, writes: if first { vec![token_write(token)] } else { Vec::new() } }
    }

    fn bundle_write(&self) -> Write {
        Write { key: BUNDLE_KEY.to_owned(), value: Some(to_json(&self.bundle)) }
    }

    /// The key/value form: every key with its value, in the order of the keys.
    #[must_use]
    pub fn entries(&self) -> Vec<Write> {
        let tokens = self.tokens.values().map(token_write);
        std::iter::once(self.bundle_write())
            .chain(self.revoked.values().map(revoked_write))
            .chain(tokens)
            .collect()
    }

    /// Reads the key/value form.
    ///
    /// # Errors
    ///
    /// At the first key that is unknown or whose value cannot be read.
    pub fn from_entries<'a>(
        entries: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<Self, DecodeError> {
        let mut state = Self::default();
        for (key, value) in entries {
            let failed = |source| DecodeError { key: key.to_owned(), source: Some(source) };
            if key == BUNDLE_KEY {
                state.bundle = serde_json::from_slice(value).map_err(failed)?;
            } else if key.starts_with(TOKEN_KEY) {
                let token: TokenRecord = serde_json::from_slice(value).map_err(failed)?;
                state.tokens.insert(token.id.clone(), token);
            } else if key.starts_with(REVOKED_KEY) {
                let revocation: Revocation = serde_json::from_slice(value).map_err(failed)?;
                state.revoked.insert(revocation.node, revocation);
            } else {
                return Err(DecodeError { key: key.to_owned(), source: None });
            }
        }
        Ok(state)
    }

    /// The whole state as one value, for a Raft snapshot.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        to_json(self)
    }

    /// Reads what [`CaState::encode`] wrote.
    ///
    /// # Errors
    ///
    /// When the bytes are not such a value.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let failed = |source| DecodeError { key: "state".to_owned(), source: Some(source) };
        serde_json::from_slice(bytes).map_err(failed)
    }
}

impl CaEffect {
    fn unchanged() -> Self {
        Self { outcome: CaOutcome::Unchanged, writes: Vec::new() }
    }

    fn refused(reason: RedeemRefused) -> Self {
        Self { outcome: CaOutcome::Refused(reason), writes: Vec::new() }
    }
}

/// Whole seconds since 1970, as commands carry time.
#[must_use]
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

fn token_write(token: &TokenRecord) -> Write {
    Write { key: format!("{TOKEN_KEY}{}", token.id), value: Some(to_json(token)) }
}

fn revoked_write(revocation: &Revocation) -> Write {
    Write { key: format!("{REVOKED_KEY}{}", revocation.node), value: Some(to_json(revocation)) }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    // maps with text keys, texts and numbers always have a JSON form
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
#[path = "state/tests.rs"]
mod tests;
