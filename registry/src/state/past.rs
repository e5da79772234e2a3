//! The configuration as it was: today's, with what history remembers taken back.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::command::{ObjectKey, Revision};
use super::{State, history};
use crate::config::Object;

/// The configuration at one revision.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// The revision.
    pub revision: Revision,
    /// The objects by key, each as it was, with the revision that it had.
    pub objects: BTreeMap<ObjectKey, Arc<Object>>,
}

/// Why the configuration at a revision is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PastError {
    /// There was no such revision yet.
    #[error("revision {asked} has not been made yet, the newest is {newest}")]
    Future {
        /// What was asked for.
        asked: Revision,
        /// The newest.
        newest: Revision,
    },
    /// History does not reach back so far.
    #[error("revision {asked} is no longer known, history reaches back to {oldest}")]
    Forgotten {
        /// What was asked for.
        asked: Revision,
        /// The oldest revision at which the configuration is known.
        oldest: Revision,
    },
    /// An object of that time is of a kind that this program does not know.
    #[error("{what} at revision {revision} cannot be read by this program")]
    Unreadable {
        /// The object.
        what: String,
        /// The revision that changed it.
        revision: Revision,
    },
}

impl State {
    /// The configuration objects as they were when `revision` was the newest.
    ///
    /// # Errors
    ///
    /// [`PastError`].
    pub fn past(&self, revision: Revision) -> Result<Past, PastError> {
        if revision > self.revision {
            return Err(PastError::Future { asked: revision, newest: self.revision });
        }
        let oldest = self.history.forgotten();
        if revision < oldest {
            return Err(PastError::Forgotten { asked: revision, oldest });
        }
        let mut objects = self.objects.iter().map(|(key, object)| (key.clone(), object.clone())).collect();
        for entry in self.history.entries().rev().take_while(|entry| entry.revision > revision) {
            for change in entry.changes.iter().rev().filter(|change| change.what != history::MESH) {
                take_back(&mut objects, entry.revision, change)?;
            }
        }
        Ok(Past { revision, objects })
    }
}

fn take_back(
    objects: &mut BTreeMap<ObjectKey, Arc<Object>>,
    revision: Revision,
    change: &history::Change,
) -> Result<(), PastError> {
    let unreadable = || PastError::Unreadable { what: change.what.clone(), revision };
    let object = |value: &Option<history::Value>| match value {
        Some(history::Value::Object(object)) => Ok(Some(object.clone())),
        Some(history::Value::Json(_)) => Err(unreadable()),
        None => Ok(None),
    };
    let (before, after) = (object(&change.before)?, object(&change.after)?);
    match (before, after) {
        (Some(before), _) => drop(objects.insert(ObjectKey::of(&before), before)),
        (None, Some(after)) => drop(objects.remove(&ObjectKey::of(&after))),
        (None, None) => {}
    }
    Ok(())
}
