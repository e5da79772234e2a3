//! Commands as the log holds them, and what becomes of them.

use ca::state::{CaCommand, CaOutcome};
use prost::Message as _;
use registry::state::{Batch, Command as Change, Outcome as RegistryOutcome, StoredCommand};
use serde::de::DeserializeOwned;

use crate::access::{AccessCommand, AccessOutcome};
use crate::audit::{AuditCommand, AuditOutcome, Origin};
use crate::cluster::{ClusterCommand, ClusterOutcome};
use crate::raft::machine::Halt;
use crate::raft::wire::mesh_command::Part;
use crate::raft::wire::{self, JoinCommand, MeshCommand};

/// The newest version of commands and states that this program reads; it reads all before it too.
///
/// Version 2 added the members, access, the audit trail, origins, and how long history is kept; version 3 revoked nodes and
/// whether agents are heard; version 4 why a workload is not healthy, and where join tokens may be used.
pub const VERSION: u32 = 4;

/// The version from which on members know why a workload is not healthy.
pub(crate) const REASONS: u32 = 4;

/// One entry of the log.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A change of the mesh.
    Registry(Batch),
    /// A change of the certificate authority's state.
    Ca(CaCommand),
    /// A workload joins: the token is redeemed and, only if that is done, the workload registered.
    Join {
        /// The redemption.
        redeem: CaCommand,
        /// The registration.
        register: Batch,
    },
    /// A change of the members of the control plane.
    Cluster(ClusterCommand),
    /// A change of who may use the admin API.
    Access(AccessCommand),
    /// A change of how the audit trail is kept.
    Audit(AuditCommand),
}

/// What became of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Of [`Command::Registry`].
    Registry(RegistryOutcome),
    /// Of [`Command::Ca`].
    Ca(CaOutcome),
    /// Of [`Command::Join`].
    Join {
        /// What became of the token.
        redeemed: CaOutcome,
        /// What became of the registration; nothing if the token was refused.
        registered: Option<RegistryOutcome>,
    },
    /// Of [`Command::Cluster`].
    Cluster(ClusterOutcome),
    /// Of [`Command::Access`].
    Access(AccessOutcome),
    /// Of [`Command::Audit`].
    Audit(AuditOutcome),
}

impl Command {
    /// The bytes that the log holds, of a command that no operator caused.
    ///
    /// # Errors
    ///
    /// If a value has no stored form, which is a mistake of this program.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        self.encoded(None)
    }

    /// The bytes that the log holds, of a command that `origin` caused.
    ///
    /// # Errors
    ///
    /// As [`Command::encode`].
    pub fn encode_as(&self, origin: &Origin) -> Result<Vec<u8>, serde_json::Error> {
        self.encoded(Some(origin))
    }

    /// The lowest version of a program that reads this command, without an origin. With one it is 2 at least.
    #[must_use]
    pub fn version(&self) -> u32 {
        match self {
            Self::Registry(batch) | Self::Join { register: batch, .. } => {
                let version = |change: &Change| match change {
                    Change::WorkloadHealth { reason, .. } if !reason.is_empty() => REASONS,
                    Change::RegisterWorkload { registration } if !registration.reason.is_empty() => REASONS,
                    Change::WorkloadPresence { .. } => 3,
                    Change::SetHistoryRetention { .. } => 2,
                    Change::Change { .. }
                    | Change::PutService { .. }
                    | Change::RemoveService { .. }
                    | Change::ReplaceEndpoints { .. }
                    | Change::RegisterWorkload { .. }
                    | Change::WorkloadHealth { .. }
                    | Change::RemoveWorkload { .. }
                    | Change::PutMesh { .. }
                    | Change::SetHistoryLimit { .. } => 1,
                };
                batch.commands.iter().map(version).max().unwrap_or(1)
            }
            Self::Ca(CaCommand::AddJoinToken(record)) if !record.cidrs.is_empty() => 4,
            Self::Ca(CaCommand::RevokeNode(_)) => 3,
            Self::Ca(_) => 1,
            Self::Cluster(_) | Self::Access(_) | Self::Audit(_) => 2,
        }
    }

    fn encoded(&self, origin: Option<&Origin>) -> Result<Vec<u8>, serde_json::Error> {
        let part = match self {
            Self::Registry(batch) => Part::Registry(StoredCommand::encode(batch).into()),
            Self::Ca(command) => Part::Ca(serde_json::to_vec(command)?.into()),
            Self::Join { redeem, register } => Part::Join(JoinCommand {
                redeem: serde_json::to_vec(redeem)?.into(),
                register: StoredCommand::encode(register).into(),
            }),
            Self::Cluster(command) => Part::Cluster(serde_json::to_vec(command)?.into()),
            Self::Access(command) => Part::Access(serde_json::to_vec(command)?.into()),
            Self::Audit(command) => Part::Audit(serde_json::to_vec(command)?.into()),
        };
        let version = self.version().max(if origin.is_some() { 2 } else { 1 });
        let origin = origin.map(|origin| wire::Origin {
            who: origin.who.clone(),
            from: origin.from.clone(),
            at_ms: origin.at_ms,
            action: origin.action.clone(),
        });
        Ok(MeshCommand { version, part: Some(part), origin }.encode_to_vec())
    }

    /// The command that the log holds at `index`.
    ///
    /// # Errors
    ///
    /// [`Halt`] if a newer program wrote it, or the bytes are no command.
    pub fn decode(index: u64, bytes: &[u8]) -> Result<Self, Halt> {
        Self::decode_as(index, bytes).map(|(command, _)| command)
    }

    /// The command that the log holds at `index`, and the operator who caused it.
    ///
    /// # Errors
    ///
    /// As [`Command::decode`].
    pub fn decode_as(index: u64, bytes: &[u8]) -> Result<(Self, Option<Origin>), Halt> {
        let halt = |reason: String| Halt { index, reason };
        let stored = MeshCommand::decode(bytes).map_err(|error| halt(format!("not a command: {error}")))?;
        if stored.version > VERSION {
            return Err(halt(newer("the command", stored.version)));
        }
        let registry = |bytes: &[u8]| StoredCommand::decode(bytes).map_err(|error| halt(error.to_string()));
        let command = match stored.part {
            Some(Part::Registry(batch)) => Self::Registry(registry(&batch)?),
            Some(Part::Ca(command)) => Self::Ca(json(index, "the CA", &command)?),
            Some(Part::Join(join)) => Self::Join {
                redeem: json(index, "the CA", &join.redeem)?,
                register: registry(&join.register)?,
            },
            Some(Part::Cluster(command)) => Self::Cluster(json(index, "the cluster", &command)?),
            Some(Part::Access(command)) => Self::Access(json(index, "access", &command)?),
            Some(Part::Audit(command)) => Self::Audit(json(index, "the audit trail", &command)?),
            None => return Err(halt("a command of an unknown kind; upgrade this member".to_owned())),
        };
        let origin = stored.origin.map(|origin| Origin {
            who: origin.who,
            from: origin.from,
            at_ms: origin.at_ms,
            action: origin.action,
        });
        Ok((command, origin))
    }
}

/// A part's command in its stored form.
fn json<C: DeserializeOwned>(index: u64, whose: &str, bytes: &[u8]) -> Result<C, Halt> {
    serde_json::from_slice(bytes).map_err(|error| Halt {
        index,
        reason: format!("an unknown command of {whose}; upgrade this member: {error}"),
    })
}

/// What a member says of something that a newer program wrote.
pub(super) fn newer(what: &str, found: u32) -> String {
    format!("{what} has version {found}, this program knows up to {VERSION}; upgrade this member")
}
