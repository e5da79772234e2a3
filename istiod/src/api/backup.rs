//! The state for a backup, as it is at one revision.

use super::{Api, ApiError, Caller, aside};
use crate::raft::View;

/// The state, ready to be sealed by whoever asked for it.
#[derive(Debug, Clone)]
pub(super) struct Backup {
    /// Its revision: everything up to it, and nothing after.
    pub(super) revision: u64,
    /// Trust domain of the mesh.
    pub(super) trust_domain: String,
    /// As a snapshot has it.
    pub(super) bytes: Vec<u8>,
}

impl Api {
    /// The whole replicated state as it was when this was called: with every acknowledged change, with tokens, roles and
    /// the audit trail, without any private key in the clear.
    ///
    /// # Errors
    ///
    /// When the log does not answer.
    pub(super) async fn backup(&self, caller: &Caller) -> Result<Backup, ApiError> {
        caller.must_be_unlimited("a backup")?;
        self.raft.read_index().await?;
        let view: View = self.view().await?;
        tracing::info!(revision = view.revision.0, who = caller.name, "backup taken");
        let trust_domain = self.issuing.load().trust_domain().as_str().to_owned();
        aside(move || Ok(Backup { revision: view.revision.0, trust_domain, bytes: view.encode() })).await
    }
}
