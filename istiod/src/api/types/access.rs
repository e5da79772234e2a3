//! Operators: their tokens, the roles of certificates, and who a caller is.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::access::Role;

/// Answer of `/api/v1/whoami`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WhoAmI {
    /// Whom the audit log names.
    pub name: String,
    /// What the caller may do.
    pub role: Role,
    /// Its rights hold in these namespaces only; in all when it is empty.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// Where it calls from.
    pub from: String,
}

/// Body of `POST /api/v1/access/tokens`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApiTokenRequest {
    /// What for, in the operator's words.
    #[serde(default)]
    #[schemars(length(max = 200))]
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// Its rights hold in these namespaces only; in all when it is empty.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// Seconds until it expires, at most a year.
    #[serde(default = "default_ttl")]
    #[schemars(range(min = 1, max = 31_622_400))]
    pub ttl_seconds: u64,
}

fn default_ttl() -> u64 {
    30 * 24 * 3600
}

/// A new token; the secret is shown this once.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiTokenCreated {
    /// Identifier, for `auth token revoke`.
    pub id: String,
    /// What `istioctl --token` takes.
    pub token: String,
    /// RFC 3339 time.
    pub expires: String,
}

impl std::fmt::Debug for ApiTokenCreated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { id, token: _, expires } = self;
        f.debug_struct("ApiTokenCreated").field("id", id).field("expires", expires).finish_non_exhaustive()
    }
}

/// A token of an operator as the log knows it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiTokenRow {
    /// Identifier.
    pub id: String,
    /// What for.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// Its rights hold in these namespaces only; in all when it is empty.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// RFC 3339 time.
    pub created: String,
    /// Who made it.
    pub created_by: String,
    /// RFC 3339 time.
    pub expires: String,
    /// RFC 3339 time, to the hour; empty if it was never used.
    #[serde(default)]
    pub last_used: String,
}

/// Body of `POST /api/v1/access/bindings`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BindingRequest {
    /// SPIFFE id of client certificates.
    pub identity: String,
    /// What whoever presents one may do.
    pub role: Role,
    /// Its rights hold in these namespaces only; in all when it is empty.
    #[serde(default)]
    pub namespaces: Vec<String>,
}

/// The role of a certificate's owner.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BindingRow {
    /// SPIFFE id.
    pub identity: String,
    /// What whoever presents one may do.
    pub role: Role,
    /// Its rights hold in these namespaces only; in all when it is empty.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// RFC 3339 time.
    pub created: String,
    /// Who made it.
    pub created_by: String,
}
