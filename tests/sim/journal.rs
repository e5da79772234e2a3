//! What the parts of one member have seen since the rig last looked.

use std::sync::{Arc, Mutex, PoisonError};

use istiod::raft::wire::ConfState;

/// A list of facts; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Journal(Arc<Mutex<Vec<Fact>>>);

/// One thing that happened in a member.
#[derive(Debug)]
pub(crate) enum Fact {
    /// An entry was given to the log.
    Appended {
        /// Its place.
        index: u64,
        /// Its term.
        term: u64,
        /// The term of the entry before it, as far as the log knows.
        before: Option<u64>,
        /// Of its content.
        hash: u64,
    },
    /// A command was applied.
    Applied {
        /// Its place.
        index: u64,
        /// Of the command.
        hash: u64,
        /// Of what its proposer is told.
        outcome: u64,
    },
    /// The whole state was encoded.
    Encoded {
        /// As of this index.
        index: u64,
        /// Of the encoding.
        hash: u64,
    },
    /// A snapshot was shown to readers.
    Published {
        /// Its revision.
        revision: u64,
        /// Of what it holds.
        hash: u64,
    },
    /// The members, as of an applied index.
    Members(u64, ConfState),
}

impl Journal {
    /// Notes a fact.
    pub(crate) fn note(&self, fact: Fact) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(fact);
    }

    /// Notes who the members are, if that is news.
    pub(crate) fn members(&self, index: u64, members: &ConfState) {
        let mut facts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        facts.push(Fact::Members(index, members.clone()));
    }

    /// Everything noted since the last call.
    pub(crate) fn take(&self) -> Vec<Fact> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
