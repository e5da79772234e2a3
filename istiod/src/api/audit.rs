//! The audit trail over the API: to read it, to take it away, and to say how much of it is kept.

use std::sync::Arc;

use ca::authn::Hash;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Api, ApiError, Caller};
use crate::audit::{Anchor, AuditCommand, AuditEntry, Broken, Retention, verify};
use crate::raft::Command;

/// The most entries of one answer.
pub const MOST_ENTRIES: usize = 1000;

/// A piece of the audit trail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditPage {
    /// What is before the first of these entries: they are verified from here.
    pub anchor: Anchor,
    /// The hash of the newest entry of the whole trail.
    #[schemars(with = "String")]
    pub head: Hash,
    /// Oldest first.
    pub entries: Vec<Arc<AuditEntry>>,
    /// Whether there are newer ones.
    pub more: bool,
}

impl AuditPage {
    /// Follows the chain over this piece; gives the hash of its last entry.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn verify(&self) -> Result<Hash, Broken> {
        let head = verify(&self.anchor, self.entries.iter().map(AsRef::as_ref))?;
        match self.entries.last() {
            Some(last) if !self.more && head != self.head => Err(Broken::Gap { revision: last.revision }),
            Some(_) | None => Ok(head),
        }
    }
}

/// How much of the trail is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuditRetention {
    /// Number of entries.
    pub entries: u32,
    /// Seconds between an entry and the newest one; 0 keeps them whatever their age.
    pub age_seconds: u64,
}

impl Api {
    /// The entries after a revision, oldest first, at most `limit`.
    ///
    /// # Errors
    ///
    /// When this member has stopped.
    pub async fn audit(&self, after: u64, limit: usize) -> Result<AuditPage, ApiError> {
        let trail = self.view().await?.audit;
        let limit = limit.clamp(1, MOST_ENTRIES);
        let before = trail.entries().take_while(|entry| entry.revision <= after).last();
        let anchor = before.map_or(trail.anchor(), |entry| Anchor {
            dropped: trail.anchor().dropped,
            revision: entry.revision,
            hash: entry.hash,
        });
        let mut rest = trail.entries().skip_while(|entry| entry.revision <= after);
        let entries: Vec<_> = rest.by_ref().take(limit).cloned().collect();
        Ok(AuditPage { anchor, head: trail.head(), more: rest.next().is_some(), entries })
    }

    /// Sets how much of the trail is kept.
    ///
    /// # Errors
    ///
    /// When the log cannot be written.
    pub async fn keep_audit(&self, caller: &Caller, keep: AuditRetention) -> Result<(), ApiError> {
        let age_ms = keep.age_seconds.saturating_mul(1000);
        let command = AuditCommand::SetRetention(Retention { entries: keep.entries, age_ms });
        self.propose(caller, "set audit retention", &Command::Audit(command)).await?;
        Ok(())
    }

    /// How much of the trail is kept.
    ///
    /// # Errors
    ///
    /// When this member has stopped.
    pub async fn audit_retention(&self) -> Result<AuditRetention, ApiError> {
        let retention = self.view().await?.audit.retention();
        Ok(AuditRetention { entries: retention.entries, age_seconds: retention.age_ms / 1000 })
    }
}
