//! Operators: their tokens, the roles of certificates, and who a caller is.

use std::collections::BTreeSet;

use ca::authn::Secret;
use ca::identity::SpiffeId;

use super::types::{ApiTokenCreated, ApiTokenRequest, ApiTokenRow, BindingRequest, BindingRow, WhoAmI};
use super::view::rfc3339;
use super::{Api, ApiError, Caller};
use crate::access::{AccessCommand, AccessOutcome, ApiSecret, ApiToken, Binding, Grant, MOST_TOKENS, Role};
use crate::raft::{Command, Outcome};

/// Longest lifetime of a token of an operator, in seconds: a leap year.
const LONGEST_TOKEN: u64 = 366 * 24 * 3600;

/// Longest name of a token, in characters.
const LONGEST_NAME: usize = 200;

/// Letters of a token's identifier: enough that two are never the same.
const ID_LENGTH: usize = 12;

impl Api {
    /// Who calls, and what it may do.
    #[must_use]
    pub fn whoami(caller: &Caller) -> WhoAmI {
        WhoAmI {
            name: caller.name.clone(),
            role: caller.role,
            namespaces: listed(caller.namespaces.as_ref()),
            from: caller.from.to_string(),
        }
    }

    /// Makes a token for an operator or a program; its secret is in the answer and nowhere else.
    ///
    /// # Errors
    ///
    /// A lifetime out of range; [`ApiError::Forbidden`] for rights that the caller does not have.
    pub async fn create_api_token(
        &self,
        caller: &Caller,
        request: &ApiTokenRequest,
    ) -> Result<ApiTokenCreated, ApiError> {
        if request.ttl_seconds == 0 || request.ttl_seconds > LONGEST_TOKEN {
            return Err(ApiError::invalid_field(
                "ttlSeconds",
                format!("from 1 to {LONGEST_TOKEN} (366 days)"),
            ));
        }
        if request.name.chars().count() > LONGEST_NAME {
            return Err(ApiError::invalid_field("name", format!("at most {LONGEST_NAME} characters")));
        }
        let grant = given(caller, request.role, &request.namespaces)?;
        let no_chance = |e: ca::authn::TokenError| ApiError::Internal(e.to_string());
        let id = id(&Secret::random().map_err(no_chance)?);
        let secret = ApiSecret::random(id.clone()).map_err(no_chance)?;
        let now = self.seconds();
        let expires_at = now.saturating_add(request.ttl_seconds);
        let token = ApiToken {
            id: id.clone(),
            hash: secret.hash(),
            name: request.name.clone(),
            grant,
            created_at: now,
            expires_at,
            created_by: caller.name.clone(),
            last_used: None,
        };
        self.change_access(caller, "create API token", AccessCommand::AddToken(token)).await?;
        Ok(ApiTokenCreated { id, token: secret.to_text(), expires: rfc3339(expires_at) })
    }

    /// Tokens of operators that the caller may give, without their secrets.
    #[must_use]
    pub fn api_tokens(&self, caller: &Caller) -> Vec<ApiTokenRow> {
        let state = self.access.borrow().clone();
        let seen = state.tokens().filter(|token| caller.grant().includes(&token.grant));
        let row = |token: &ApiToken| ApiTokenRow {
            id: token.id.clone(),
            name: token.name.clone(),
            role: token.grant.role,
            namespaces: listed(token.grant.namespaces.as_ref()),
            created: rfc3339(token.created_at),
            created_by: token.created_by.clone(),
            expires: rfc3339(token.expires_at),
            last_used: token.last_used.map(rfc3339).unwrap_or_default(),
        };
        seen.map(row).collect()
    }

    /// Makes a token worthless from now on.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when there is none that the caller may give.
    pub async fn revoke_api_token(&self, caller: &Caller, id: &str) -> Result<(), ApiError> {
        let state = self.access.borrow().clone();
        let known = state.token(id).is_some_and(|token| caller.grant().includes(&token.grant));
        if !known {
            return Err(ApiError::NotFound(format!("there is no token `{id}`")));
        }
        let revoke = AccessCommand::RevokeToken { id: id.to_owned() };
        self.change_access(caller, "revoke API token", revoke).await
    }

    /// Gives whoever presents a certificate of this identity a role.
    ///
    /// # Errors
    ///
    /// An identity that is no SPIFFE id; [`ApiError::Forbidden`] for rights that the caller does not have.
    pub async fn bind(&self, caller: &Caller, request: &BindingRequest) -> Result<BindingRow, ApiError> {
        let identity = SpiffeId::parse(&request.identity)
            .map_err(|e| ApiError::invalid_field("identity", e.to_string()))?;
        let grant = given(caller, request.role, &request.namespaces)?;
        self.may_take(caller, identity.as_str())?;
        let binding = Binding {
            identity: identity.as_str().to_owned(),
            grant,
            created_at: self.seconds(),
            created_by: caller.name.clone(),
        };
        self.change_access(caller, "bind role", AccessCommand::Bind(binding.clone())).await?;
        Ok(row(&binding))
    }

    /// The roles of certificates that the caller may give.
    #[must_use]
    pub fn bindings(&self, caller: &Caller) -> Vec<BindingRow> {
        let state = self.access.borrow().clone();
        state.bindings().filter(|binding| caller.grant().includes(&binding.grant)).map(row).collect()
    }

    /// Takes the role of an identity away.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when it has none, [`ApiError::Forbidden`] when it has more than the caller.
    pub async fn unbind(&self, caller: &Caller, identity: &str) -> Result<(), ApiError> {
        self.may_take(caller, identity)?;
        let state = self.access.borrow().clone();
        if !state.bindings().any(|binding| binding.identity == identity) {
            return Err(ApiError::NotFound(format!("`{identity}` has no role")));
        }
        let unbind = AccessCommand::Unbind { identity: identity.to_owned() };
        self.change_access(caller, "unbind role", unbind).await
    }

    /// Nobody takes from others what one could not give.
    fn may_take(&self, caller: &Caller, identity: &str) -> Result<(), ApiError> {
        let state = self.access.borrow().clone();
        let held = state.bindings().find(|binding| binding.identity == identity);
        match held {
            Some(held) if !caller.grant().includes(&held.grant) => Err(ApiError::Forbidden(format!(
                "`{identity}` has rights that {} does not have",
                caller.name
            ))),
            Some(_) | None => Ok(()),
        }
    }

    async fn change_access(
        &self,
        caller: &Caller,
        action: &str,
        command: AccessCommand,
    ) -> Result<(), ApiError> {
        match self.propose(caller, action, &Command::Access(command)).await? {
            (_, Outcome::Access(AccessOutcome::Changed | AccessOutcome::Unchanged)) => Ok(()),
            (_, Outcome::Access(AccessOutcome::NotFound)) => {
                Err(ApiError::NotFound("somebody else was faster: it is gone already".to_owned()))
            }
            (_, Outcome::Access(AccessOutcome::Exists)) => {
                Err(ApiError::Conflict("there is one already".to_owned()))
            }
            (_, Outcome::Access(AccessOutcome::Full)) => {
                Err(ApiError::Conflict(format!("there are {MOST_TOKENS}; revoke some first")))
            }
            _ => Err(ApiError::Internal("not an outcome of access".to_owned())),
        }
    }
}

/// The rights that a request asks for, if the caller has them.
fn given(caller: &Caller, role: Role, namespaces: &[String]) -> Result<Grant, ApiError> {
    let is_name = |name: &String| {
        let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        !name.is_empty() && name.len() <= 63 && name.chars().all(known)
    };
    if let Some(wrong) = namespaces.iter().find(|name| !is_name(name)) {
        return Err(ApiError::invalid_field("namespaces", format!("`{wrong}` is not a namespace")));
    }
    let set: BTreeSet<String> = namespaces.iter().cloned().collect();
    let grant = Grant { role, namespaces: (!set.is_empty()).then_some(set) };
    if caller.grant().includes(&grant) {
        return Ok(grant);
    }
    Err(ApiError::Forbidden(format!("{} cannot give rights that it does not have", caller.name)))
}

fn listed(namespaces: Option<&BTreeSet<String>>) -> Vec<String> {
    namespaces.into_iter().flatten().cloned().collect()
}

/// Public letters out of chance: not of the secret that the token has.
fn id(chance: &Secret) -> String {
    let letters = chance.expose().chars().filter(char::is_ascii_alphanumeric);
    letters.take(ID_LENGTH).map(|c| c.to_ascii_lowercase()).collect()
}

fn row(binding: &Binding) -> BindingRow {
    BindingRow {
        identity: binding.identity.clone(),
        role: binding.grant.role,
        namespaces: listed(binding.grant.namespaces.as_ref()),
        created: rfc3339(binding.created_at),
        created_by: binding.created_by.clone(),
    }
}
