//! The members of the control plane, as the log knows them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::raft::part::{Part, PartError, PartWrites};

/// The members.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterState {}

/// A change of the members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterCommand {}

/// What became of a [`ClusterCommand`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterOutcome;

impl Part for ClusterState {
    type Command = ClusterCommand;
    type Outcome = ClusterOutcome;

    fn apply(&mut self, _index: u64, command: ClusterCommand) -> ClusterOutcome {
        match command {}
    }

    fn take_writes(&mut self) -> PartWrites {
        Vec::new()
    }

    fn pairs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        BTreeMap::new()
    }

    fn from_pairs<'a>(mut pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, PartError> {
        pairs.next().map_or(Ok(Self {}), |(key, _)| Err(PartError::new(key, "unknown key")))
    }
}
