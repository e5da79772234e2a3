//! The text that an operator presents.

use std::fmt;

use ca::authn::{Hash, Secret, TokenError};

/// Every token of an operator begins so: scanners of source code find it, and nobody takes it for a join token.
const PREFIX: &str = "istio-api.";

/// Longer texts are not looked at.
const LONGEST: usize = 256;

/// A token of the admin API as its owner holds it: `istio-api.ID.SECRET`.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiSecret {
    id: String,
    secret: Secret,
}

/// A text that is not a token of the admin API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token of the admin API is written `{PREFIX}ID.SECRET`")]
pub struct NotAToken;

impl ApiSecret {
    /// A new secret of 256 random bits for the token `id`.
    ///
    /// # Errors
    ///
    /// When the system has no randomness.
    pub fn random(id: String) -> Result<Self, TokenError> {
        Ok(Self { id, secret: Secret::random()? })
    }

    /// Reads what a caller presented.
    ///
    /// # Errors
    ///
    /// [`NotAToken`].
    pub fn parse(text: &str) -> Result<Self, NotAToken> {
        let rest = text.strip_prefix(PREFIX).filter(|_| text.len() <= LONGEST).ok_or(NotAToken)?;
        let (id, secret) = rest.split_once('.').ok_or(NotAToken)?;
        if id.is_empty() || secret.is_empty() {
            return Err(NotAToken);
        }
        // `Secret` has no public constructor from text: it is read as it is stored in a join token.
        let secret = serde_json::from_value(serde_json::Value::String(secret.to_owned()));
        Ok(Self { id: id.to_owned(), secret: secret.map_err(|_| NotAToken)? })
    }

    /// The whole text, to be shown once.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("{PREFIX}{}.{}", self.id, self.secret.expose())
    }

    /// The public part.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What is stored in place of the secret.
    #[must_use]
    pub fn hash(&self) -> Hash {
        self.secret.hash()
    }
}

impl fmt::Debug for ApiSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiSecret({}, ..)", self.id)
    }
}
