//! Nodes as the API shows them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A machine that holds certificates, or did.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRow {
    /// Its name: 16 hexadecimal digits, the first half of the serial number of each of its certificates.
    pub id: String,
    /// Namespace of its identity; empty when it is not known.
    pub namespace: String,
    /// Service account of its identity; empty when it is not known.
    pub service_account: String,
    /// The join token that it used, until that is forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// RFC 3339 time at which it joined, until the token is forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joined: Option<String>,
    /// The workloads that it has registered.
    pub workloads: Vec<String>,
    /// That it was revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<NodeRevoked>,
}

/// When, by whom and why a node was revoked.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRevoked {
    /// RFC 3339 time.
    pub at: String,
    /// Who.
    pub by: String,
    /// Why.
    pub reason: String,
}

/// Body of `POST /api/v1/nodes/revoke`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeRevocation {
    /// Its name.
    pub node: String,
    /// Why; the node is told.
    #[serde(default)]
    #[schemars(length(max = 256))]
    pub reason: String,
    /// Also when nobody knows the node.
    #[serde(default)]
    pub force: bool,
}
