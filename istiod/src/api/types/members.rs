//! Members of the control plane.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a new member shall be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemberRequest {
    /// It becomes a voter when there is room; otherwise it only serves.
    pub voter: bool,
    /// The member whose place it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<u64>,
    /// How long the ticket may be used, in seconds.
    pub ttl_seconds: u64,
}

/// A ticket, shown this once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberTicket {
    /// What the new member presents.
    pub ticket: String,
    /// What to run on its machine.
    pub command: String,
}

/// Some members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemberChange {
    /// Their numbers.
    pub ids: Vec<u64>,
}

/// Who shall lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LeaderRequest {
    /// Its number.
    pub to: u64,
}
