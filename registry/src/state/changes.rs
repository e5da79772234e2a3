//! What an entry of the log changed, and what it means to its author.

use std::collections::BTreeSet;

use super::command::{ObjectKey, Revision, WorkloadKey};
use super::encode::StoreKey;
use crate::model::service::Hostname;

/// What differs after an entry. Empty when nothing does: then nothing is built and nothing is pushed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Hosts whose service or endpoints may differ.
    pub hosts: BTreeSet<Hostname>,
    /// Objects created, replaced or removed.
    pub objects: BTreeSet<ObjectKey>,
    /// Workloads registered, removed, or of other health.
    pub workloads: BTreeSet<WorkloadKey>,
    /// The mesh-wide settings differ.
    pub mesh: bool,
    /// What must be written.
    pub(super) written: BTreeSet<StoreKey>,
}

impl Changes {
    /// Nothing that a reader could see differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty() && self.objects.is_empty() && self.workloads.is_empty() && !self.mesh
    }

    /// Adds what `later` changed.
    pub fn merge(&mut self, later: Self) {
        self.hosts.extend(later.hosts);
        self.objects.extend(later.objects);
        self.workloads.extend(later.workloads);
        self.mesh |= later.mesh;
        self.written.extend(later.written);
    }

    /// Takes out what must be written.
    #[must_use]
    pub fn split_written(&mut self) -> Self {
        Self { written: std::mem::take(&mut self.written), ..Self::default() }
    }
}

/// What became of each command of a batch, in its order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// One per command.
    pub commands: Vec<CommandOutcome>,
}

impl Outcome {
    /// What became of the objects, over all commands.
    pub fn objects(&self) -> impl Iterator<Item = &ObjectOutcome> {
        self.commands.iter().flat_map(|command| match command {
            CommandOutcome::Objects(objects) => objects.as_slice(),
            CommandOutcome::Applied { .. } | CommandOutcome::Fenced => &[],
        })
    }

    /// The first object whose expected revision did not hold.
    #[must_use]
    pub fn conflict(&self) -> Option<&ObjectOutcome> {
        self.objects().find(|object| matches!(object.result, ObjectResult::Conflict { .. }))
    }
}

/// What became of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandOutcome {
    /// A change of objects: puts first, then deletes, in their order.
    Objects(Vec<ObjectOutcome>),
    /// Anything else that was applied.
    Applied {
        /// False when the state had this value already.
        changed: bool,
    },
    /// A report of a session that does not speak for the workload any more; ignored.
    Fenced,
}

/// What became of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectOutcome {
    /// Which.
    pub key: ObjectKey,
    /// What happened.
    pub result: ObjectResult,
}

/// What happened to an object. The words are those that `istioctl apply` and `delete` print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectResult {
    /// It did not exist before.
    Created,
    /// It has a new value.
    Configured,
    /// It had this value already, since this revision.
    Unchanged(Revision),
    /// It is gone.
    Deleted,
    /// It did not exist.
    NotFound,
    /// It was not at the expected revision, so nothing of its change was applied.
    Conflict {
        /// What the author expected; 0: that it does not exist.
        expected: Revision,
        /// What is; 0: it does not exist.
        found: Revision,
    },
    /// Not applied: another object of the same change was in conflict, or the change named this one again later.
    NotApplied,
}
