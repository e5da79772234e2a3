//! Who may do what with the admin API: roles, the tokens of operators, and the roles of client certificates.
//!
//! [`AccessState`] is a part of the replicated state: a pure value that [`AccessCommand`]s change. A token's secret is
//! never in it, only its SHA-256: 256 random bits need no slower hash. When a token was last used is kept to the hour,
//! so that reading costs the log next to nothing.

mod secret;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ca::authn::Hash;
use ca::identity::SpiffeId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::secret::{ApiSecret, NotAToken};
use crate::raft::part::{Part, PartError};

/// The most tokens at a time: each is a few hundred bytes of every member's memory.
pub const MOST_TOKENS: usize = 10_000;

/// The most identities that have a role.
pub const MOST_BINDINGS: usize = 10_000;

/// A token that has ended stays visible for this long, in seconds; then the next new token takes its place.
const KEPT_AFTER_EXPIRY: u64 = 30 * 24 * 3600;

/// When a token was last used is known to this many seconds.
pub const USE_GRAIN: u64 = 3600;

/// Keys of tokens and of bindings in the store.
const TOKEN: &str = "t/";
const BINDING: &str = "b/";

/// What somebody is trusted with. Each role may do all that the one before may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads.
    Viewer,
    /// Reads, and changes configuration.
    Editor,
    /// Everything, also tokens, members and backups.
    Admin,
}

impl Role {
    /// All roles, the least first.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Editor, Self::Admin];

    /// Whether this role has the permission.
    #[must_use]
    pub fn grants(self, permission: Permission) -> bool {
        match permission {
            Permission::Open | Permission::Read => true,
            Permission::Write => self >= Self::Editor,
            Permission::Administer => self >= Self::Admin,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::Editor => "editor",
            Self::Admin => "admin",
        })
    }
}

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// Nothing: anybody who reaches the port may call.
    Open,
    /// To see the mesh.
    Read,
    /// To change its configuration.
    Write,
    /// To decide who may do what, who is a member, and what is kept.
    Administer,
}

/// Whom a token or a certificate speaks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The role.
    pub role: Role,
    /// The namespaces in which it holds; all when none is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<BTreeSet<String>>,
}

impl Grant {
    /// A role in the whole mesh.
    #[must_use]
    pub fn everywhere(role: Role) -> Self {
        Self { role, namespaces: None }
    }

    /// Whether it holds in this namespace.
    #[must_use]
    pub fn covers(&self, namespace: &str) -> bool {
        self.namespaces.as_ref().is_none_or(|some| some.contains(namespace))
    }

    /// Whether whoever has this may give `other` to somebody: nobody gives more than one has.
    #[must_use]
    pub fn includes(&self, other: &Self) -> bool {
        let within = match (&self.namespaces, &other.namespaces) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(ours), Some(theirs)) => theirs.is_subset(ours),
        };
        within && self.role >= other.role
    }
}

/// A token of an operator, as the log knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiToken {
    /// Identifier: public, part of the token's text.
    pub id: String,
    /// SHA-256 of the secret.
    pub hash: Hash,
    /// What for, in the operator's words.
    pub name: String,
    /// What it may do, and where.
    pub grant: Grant,
    /// When it was made, in seconds since 1970.
    pub created_at: u64,
    /// When it ends, in seconds since 1970.
    pub expires_at: u64,
    /// Who made it.
    pub created_by: String,
    /// When it was last used, in seconds since 1970 and to [`USE_GRAIN`]; none if never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used: Option<u64>,
}

/// The role of whoever presents a certificate with this identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// SPIFFE id.
    pub identity: String,
    /// What it may do, and where.
    pub grant: Grant,
    /// When it was made, in seconds since 1970.
    pub created_at: u64,
    /// Who made it.
    pub created_by: String,
}

/// A change of who may do what. Variants are only ever added: the log keeps them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessCommand {
    /// A new token.
    AddToken(ApiToken),
    /// A token is worth nothing any more.
    RevokeToken {
        /// Which.
        id: String,
    },
    /// Tokens were used.
    Used {
        /// Which.
        ids: BTreeSet<String>,
        /// When, in seconds since 1970; kept to [`USE_GRAIN`].
        at: u64,
    },
    /// An identity has a role from now on, whatever it had before.
    Bind(Binding),
    /// An identity has no role any more.
    Unbind {
        /// SPIFFE id.
        identity: String,
    },
}

/// What became of an [`AccessCommand`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessOutcome {
    /// It was done.
    Changed,
    /// It was so before.
    Unchanged,
    /// There is no such token or binding.
    NotFound,
    /// There is a token with this identifier.
    Exists,
    /// There are [`MOST_TOKENS`] or [`MOST_BINDINGS`].
    Full,
}

/// Why a token opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// It was never made, was revoked, or its secret is another; a caller is not told which.
    #[error("the token is not known")]
    Unknown,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
}

/// Tokens and bindings at one revision.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct AccessState {
    tokens: BTreeMap<String, ApiToken>,
    bindings: BTreeMap<String, Binding>,
    /// Keys that changed and are not written.
    unwritten: BTreeSet<String>,
}

impl AccessState {
    fn note(&mut self, known: bool, key: String) -> AccessOutcome {
        if !known {
            return AccessOutcome::NotFound;
        }
        self.unwritten.insert(key);
        AccessOutcome::Changed
    }

    fn add(&mut self, token: ApiToken) -> AccessOutcome {
        match self.tokens.get(&token.id) {
            Some(same) if *same == token => return AccessOutcome::Unchanged,
            Some(_) => return AccessOutcome::Exists,
            None => {}
        }
        self.forget_expired(token.created_at);
        if self.tokens.len() >= MOST_TOKENS {
            return AccessOutcome::Full;
        }
        self.unwritten.insert(format!("{TOKEN}{}", token.id));
        self.tokens.insert(token.id.clone(), token);
        AccessOutcome::Changed
    }

    /// Time enters with a new token: whatever ended long before it goes.
    fn forget_expired(&mut self, now: u64) {
        let over = |token: &ApiToken| token.expires_at.saturating_add(KEPT_AFTER_EXPIRY) <= now;
        let gone: Vec<String> = self.tokens.values().filter(|t| over(t)).map(|t| t.id.clone()).collect();
        for id in gone {
            self.tokens.remove(&id);
            self.unwritten.insert(format!("{TOKEN}{id}"));
        }
    }

    fn used(&mut self, ids: &BTreeSet<String>, at: u64) -> AccessOutcome {
        let at = at - at % USE_GRAIN;
        let mut outcome = AccessOutcome::Unchanged;
        for id in ids {
            let Some(token) = self.tokens.get_mut(id) else { continue };
            if token.last_used.is_none_or(|before| before < at) {
                token.last_used = Some(at);
                self.unwritten.insert(format!("{TOKEN}{id}"));
                outcome = AccessOutcome::Changed;
            }
        }
        outcome
    }

    fn bind(&mut self, binding: Binding) -> AccessOutcome {
        if let Some(before) = self.bindings.get(&binding.identity) {
            if before.grant == binding.grant {
                return AccessOutcome::Unchanged;
            }
        } else if self.bindings.len() >= MOST_BINDINGS {
            return AccessOutcome::Full;
        }
        self.unwritten.insert(format!("{BINDING}{}", binding.identity));
        self.bindings.insert(binding.identity.clone(), binding);
        AccessOutcome::Changed
    }

    /// The token that this secret opens at `now`, in seconds since 1970.
    ///
    /// # Errors
    ///
    /// [`TokenRefused`].
    pub fn open(&self, secret: &ApiSecret, now: u64) -> Result<&ApiToken, TokenRefused> {
        let token = self.tokens.get(secret.id()).ok_or(TokenRefused::Unknown)?;
        if !token.hash.matches(&secret.hash()) {
            return Err(TokenRefused::Unknown);
        }
        if now >= token.expires_at { Err(TokenRefused::Expired) } else { Ok(token) }
    }

    /// The role of a certificate's owner, if it has one.
    #[must_use]
    pub fn binding(&self, identity: &SpiffeId) -> Option<&Binding> {
        self.bindings.get(identity.as_str())
    }

    /// All tokens, by identifier.
    pub fn tokens(&self) -> impl Iterator<Item = &ApiToken> {
        self.tokens.values()
    }

    /// One token.
    #[must_use]
    pub fn token(&self, id: &str) -> Option<&ApiToken> {
        self.tokens.get(id)
    }

    /// All bindings, by identity.
    pub fn bindings(&self) -> impl Iterator<Item = &Binding> {
        self.bindings.values()
    }
}

impl Part for AccessState {
    type Command = AccessCommand;
    type Outcome = AccessOutcome;

    fn apply(&mut self, _index: u64, command: AccessCommand) -> AccessOutcome {
        match command {
            AccessCommand::AddToken(token) => self.add(token),
            AccessCommand::RevokeToken { id } => {
                let known = self.tokens.remove(&id).is_some();
                self.note(known, format!("{TOKEN}{id}"))
            }
            AccessCommand::Used { ids, at } => self.used(&ids, at),
            AccessCommand::Bind(binding) => self.bind(binding),
            AccessCommand::Unbind { identity } => {
                let known = self.bindings.remove(&identity).is_some();
                self.note(known, format!("{BINDING}{identity}"))
            }
        }
    }

    fn take_changed(&mut self) -> BTreeSet<Vec<u8>> {
        std::mem::take(&mut self.unwritten).into_iter().map(String::into_bytes).collect()
    }

    fn value(&self, key: &[u8]) -> Option<Vec<u8>> {
        // Strings, numbers and sets of strings: a value that always has a JSON form.
        let key = std::str::from_utf8(key).ok()?;
        if let Some(id) = key.strip_prefix(TOKEN) {
            return self.tokens.get(id).and_then(|token| serde_json::to_vec(token).ok());
        }
        let identity = key.strip_prefix(BINDING)?;
        self.bindings.get(identity).and_then(|binding| serde_json::to_vec(binding).ok())
    }

    fn pairs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let bindings = self.bindings.keys().map(|identity| format!("{BINDING}{identity}"));
        let keys = bindings.chain(self.tokens.keys().map(|id| format!("{TOKEN}{id}")));
        keys.map(String::into_bytes).filter_map(|key| Some((key.clone(), self.value(&key)?))).collect()
    }

    fn from_pairs<'a>(pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, PartError> {
        let mut state = Self::default();
        for (key, value) in pairs {
            let wrong = |error: serde_json::Error| PartError::new(key, error);
            if key.starts_with(TOKEN.as_bytes()) {
                let token: ApiToken = serde_json::from_slice(value).map_err(wrong)?;
                state.tokens.insert(token.id.clone(), token);
            } else if key.starts_with(BINDING.as_bytes()) {
                let binding: Binding = serde_json::from_slice(value).map_err(wrong)?;
                state.bindings.insert(binding.identity.clone(), binding);
            } else {
                return Err(PartError::new(key, "neither a token nor a binding"));
            }
        }
        Ok(state)
    }
}
