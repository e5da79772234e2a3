//! Who may use the admin API, as the log knows it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::raft::part::{Part, PartError, PartWrites};

/// The grants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessState {}

/// A change of the grants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessCommand {}

/// What became of a [`AccessCommand`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessOutcome;

impl Part for AccessState {
    type Command = AccessCommand;
    type Outcome = AccessOutcome;

    fn apply(&mut self, _index: u64, command: AccessCommand) -> AccessOutcome {
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
