//! Replicated state of the certificate authority: join tokens and the trust bundle; its commands and `apply`.
//!
//! [`CaState::apply`] is deterministic and cannot fail: a command that does not apply is answered with an outcome and
//! changes nothing. Time enters as a field of the command. A command or a stored value is JSON; new fields are
//! optional, so that old ones decode for ever.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::authn::{Hash, JoinToken, PresentedToken};
use crate::bundle::Bundle;
use crate::identity::{CONTROL_PLANE_ACCOUNT, IdentityError, ROOT_NAMESPACE, SpiffeId, TrustDomain};

/// Key of the bundle in the key/value form.
const BUNDLE_KEY: &str = "bundle";
/// Beginning of a token's key in the key/value form.
const TOKEN_KEY: &str = "token/";

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
        }
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
    /// Removes tokens that ended before this second since 1970.
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
    #[error("unknown join token")]
    Unknown,
    /// The token's time is over.
    #[error("the join token has expired")]
    Expired,
    /// The token was used by another key.
    #[error("the join token is used up")]
    UsedUp,
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
            CaCommand::Prune { before } => {
                let ended: Vec<_> =
                    self.tokens.values().filter(|t| t.expires_at < before).map(|t| t.id.clone()).collect();
                self.remove(&ended)
            }
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

    /// A key that has redeemed the token may do so again until the token ends: its first answer may have been lost.
    fn redeem(&mut self, id: &str, secret: Hash, key: Hash, at: u64) -> CaEffect {
        let Some(token) = self.tokens.get_mut(id).filter(|token| token.hash.matches(&secret)) else {
            return CaEffect::refused(RedeemRefused::Unknown);
        };
        if token.ended(at) {
            return CaEffect::refused(RedeemRefused::Expired);
        }
        let again = token.redeemed_by.contains_key(&key);
        if !again && token.uses_left == 0 {
            return CaEffect::refused(RedeemRefused::UsedUp);
        }
        if !again {
            token.uses_left -= 1;
            token.redeemed_by.insert(key, at);
        }
        let outcome = CaOutcome::Redeemed {
            namespace: token.namespace.clone(),
            service_account: token.service_account.clone(),
            workload_group: token.workload_group.clone(),
        };
        CaEffect { outcome, writes: if again { Vec::new() } else { vec![token_write(token)] } }
    }

    fn bundle_write(&self) -> Write {
        Write { key: BUNDLE_KEY.to_owned(), value: Some(to_json(&self.bundle)) }
    }

    /// The key/value form: every key with its value, in the order of the keys.
    #[must_use]
    pub fn entries(&self) -> Vec<Write> {
        std::iter::once(self.bundle_write()).chain(self.tokens.values().map(token_write)).collect()
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

fn to_json(value: &impl Serialize) -> Vec<u8> {
    // maps with text keys, texts and numbers always have a JSON form
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(id: &str, uses: u32) -> TokenRecord {
        TokenRecord {
            id: id.to_owned(),
            hash: Hash::of(b"secret"),
            namespace: "shop".to_owned(),
            service_account: "payments".to_owned(),
            expires_at: 100,
            uses_left: uses,
            workload_group: Some("shop/payments".to_owned()),
            created_by: "ann".to_owned(),
            redeemed_by: BTreeMap::new(),
        }
    }

    fn redeem(state: &mut CaState, id: &str, secret: &str, key: &str, at: u64) -> Result<(), RedeemRefused> {
        let command = CaCommand::Redeem {
            id: id.to_owned(),
            secret_hash: Hash::of(secret.as_bytes()),
            key_hash: Hash::of(key.as_bytes()),
            at,
        };
        match state.apply(command).outcome {
            CaOutcome::Refused(reason) => Err(reason),
            outcome @ (CaOutcome::Redeemed { .. } | CaOutcome::Changed | CaOutcome::Unchanged) => {
                let expected = CaOutcome::Redeemed {
                    namespace: "shop".to_owned(),
                    service_account: "payments".to_owned(),
                    workload_group: Some("shop/payments".to_owned()),
                };
                assert_eq!(outcome, expected);
                Ok(())
            }
        }
    }

    /// Token, secret, key, second, what is answered.
    type RedeemStep = (&'static str, &'static str, &'static str, u64, Result<(), RedeemRefused>);

    #[track_caller]
    fn check(uses: u32, steps: &[RedeemStep]) {
        let mut state = CaState::default();
        state.apply(CaCommand::AddJoinToken(record("t", uses)));
        for (at, (id, secret, key, second, expected)) in steps.iter().enumerate() {
            assert_eq!(redeem(&mut state, id, secret, key, *second), *expected, "step {at}");
        }
    }

    #[test]
    fn one_key_redeems_and_may_repeat() {
        use RedeemRefused::*;
        check(
            1,
            &[
                ("t", "secret", "key1", 50, Ok(())),
                ("t", "secret", "key1", 60, Ok(())),
                ("t", "secret", "key2", 60, Err(UsedUp)),
                ("t", "wrong", "key1", 60, Err(Unknown)),
                ("t", "secret", "key1", 100, Ok(())),
                ("t", "secret", "key1", 101, Err(Expired)),
                ("t", "wrong", "key1", 101, Err(Unknown)),
            ],
        );
    }

    #[test]
    fn several_uses_are_several_keys() {
        use RedeemRefused::*;
        check(
            2,
            &[
                ("t", "secret", "key1", 1, Ok(())),
                ("t", "secret", "key1", 1, Ok(())),
                ("t", "secret", "key2", 1, Ok(())),
                ("t", "secret", "key3", 1, Err(UsedUp)),
                ("t", "secret", "key2", 1, Ok(())),
            ],
        );
    }

    #[test]
    fn unknown_expired_and_unusable_tokens_are_refused() {
        use RedeemRefused::*;
        check(1, &[("u", "secret", "key1", 1, Err(Unknown)), ("t", "secret", "key1", 101, Err(Expired))]);
        check(0, &[("t", "secret", "key1", 1, Err(UsedUp))]);
    }

    #[test]
    fn a_wrong_secret_uses_nothing_up() {
        check(1, &[("t", "wrong", "k", 1, Err(RedeemRefused::Unknown)), ("t", "secret", "k", 1, Ok(()))]);
    }

    #[test]
    fn a_revoked_token_is_unknown_even_to_its_key() {
        let mut state = CaState::default();
        state.apply(CaCommand::AddJoinToken(record("t", 1)));
        redeem(&mut state, "t", "secret", "key1", 1).unwrap();
        let effect = state.apply(CaCommand::RevokeJoinToken { id: "t".to_owned() });
        assert_eq!(effect.writes, [Write { key: "token/t".to_owned(), value: None }]);
        assert_eq!(redeem(&mut state, "t", "secret", "key1", 1), Err(RedeemRefused::Unknown));
        assert_eq!(state.apply(CaCommand::RevokeJoinToken { id: "t".to_owned() }), CaEffect::unchanged());
    }

    #[test]
    fn adding_again_does_not_refill_a_token() {
        let mut state = CaState::default();
        state.apply(CaCommand::AddJoinToken(record("t", 1)));
        redeem(&mut state, "t", "secret", "key1", 1).unwrap();
        assert_eq!(state.apply(CaCommand::AddJoinToken(record("t", 1))), CaEffect::unchanged());
        assert_eq!(redeem(&mut state, "t", "secret", "key2", 1), Err(RedeemRefused::UsedUp));
    }

    #[test]
    fn pruning_removes_what_has_ended_before() {
        let mut state = CaState::default();
        state.apply(CaCommand::AddJoinToken(record("t", 1)));
        assert_eq!(state.apply(CaCommand::Prune { before: 100 }), CaEffect::unchanged());
        assert_eq!(state.apply(CaCommand::Prune { before: 101 }).outcome, CaOutcome::Changed);
        assert_eq!(state.tokens().count(), 0);
    }

    #[test]
    fn no_token_gives_the_control_planes_identity() {
        let td = TrustDomain::default();
        let mut token = record("t", 1);
        assert_eq!(token.identity(&td).unwrap().path(), "/ns/shop/sa/payments");
        token.namespace = "istio-system".to_owned();
        token.service_account = "istiod".to_owned();
        assert_eq!(token.identity(&td), Err(TokenRefused::ControlPlane));
        token.service_account = "x/../istiod".to_owned();
        assert!(matches!(token.identity(&td), Err(TokenRefused::Identity(_))));
    }

    /// Commands as they are in logs that exist: they must decode for ever.
    #[test]
    fn stored_commands_decode() {
        let hash = Hash::of(b"secret");
        let old = format!(
            r#"[{{"add_join_token":{{"id":"t","hash":"{hash}","namespace":"shop","service_account":"payments","expires_at":100,"uses_left":1}}}},
            {{"redeem":{{"id":"t","secret_hash":"{hash}","key_hash":"{hash}","at":5}}}},
            {{"revoke_join_token":{{"id":"t"}}}},{{"prune":{{"before":7}}}},{{"set_bundle":[]}}]"#
        );
        let commands: Vec<CaCommand> = serde_json::from_str(&old).unwrap();
        assert_eq!(commands.len(), 5);
    }

    fn commands() -> impl Strategy<Value = Vec<CaCommand>> {
        let id = prop_oneof![Just("a".to_owned()), Just("b".to_owned())];
        let hash = (0..3_u8).prop_map(|n| Hash::of(&[n]));
        let add = (id.clone(), hash.clone(), 0..3_u32, 0..10_u64).prop_map(|(id, hash, uses, expires_at)| {
            CaCommand::AddJoinToken(TokenRecord { hash, expires_at, ..record(&id, uses) })
        });
        let redeem = (id.clone(), hash.clone(), hash, 0..12_u64)
            .prop_map(|(id, secret_hash, key_hash, at)| CaCommand::Redeem { id, secret_hash, key_hash, at });
        let revoke = id.prop_map(|id| CaCommand::RevokeJoinToken { id });
        let prune = (0..12_u64).prop_map(|before| CaCommand::Prune { before });
        prop::collection::vec(prop_oneof![3 => add, 6 => redeem, 1 => revoke, 1 => prune], 0..40)
    }

    proptest! {
        #[test]
        fn writes_follow_the_state_and_every_form_round_trips(commands in commands()) {
            let mut state = CaState::default();
            let mut stored: BTreeMap<String, Vec<u8>> = BTreeMap::new();
            for command in commands {
                let json = serde_json::to_vec(&command).unwrap();
                let decoded: CaCommand = serde_json::from_slice(&json).unwrap();
                prop_assert_eq!(&decoded, &command);
                for write in state.apply(command).writes {
                    match write.value {
                        Some(value) => { stored.insert(write.key, value); }
                        None => { stored.remove(&write.key); }
                    }
                }
            }
            let rebuilt = CaState::from_entries(stored.iter().map(|(k, v)| (k.as_str(), v.as_slice()))).unwrap();
            prop_assert_eq!(&rebuilt, &state);
            prop_assert_eq!(&CaState::decode(&state.encode()).unwrap(), &state);
            let entries = state.entries();
            let pairs = entries.iter().map(|w| (w.key.as_str(), w.value.as_deref().unwrap()));
            prop_assert_eq!(&CaState::from_entries(pairs).unwrap(), &state);
        }
    }
}
