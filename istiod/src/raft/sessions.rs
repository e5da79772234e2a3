//! Which proposals have been applied, so that one that was sent twice takes effect once.
//!
//! Part of the replicated state: every member computes the same table from the log.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;

use super::store::Write;
use super::wire;

/// Clients remembered; beyond it the one that has been silent for longest is forgotten.
const CLIENTS: usize = 256;
/// Gaps remembered for each client; beyond it the oldest gap counts as applied, so its proposals are refused.
const RANGES: usize = 1024;

/// The applied proposals of all clients.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Sessions {
    clients: BTreeMap<u64, Session>,
    dirty: BTreeSet<u64>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Session {
    last_index: u64,
    /// Applied numbers as ranges: first to last, both included, neither touching nor overlapping.
    applied: BTreeMap<u64, u64>,
}

impl Sessions {
    /// Notes that proposal `sequence` of `client` is applied at `index`; false if it was already.
    pub fn admit(&mut self, client: u64, sequence: u64, index: u64) -> bool {
        let session = self.clients.entry(client).or_default();
        session.last_index = index;
        let fresh = session.add(sequence);
        self.dirty.insert(client);
        if self.clients.len() > CLIENTS {
            let silent = self.clients.iter().min_by_key(|(client, session)| (session.last_index, **client));
            if let Some(client) = silent.map(|(client, _)| *client) {
                self.clients.remove(&client);
                self.dirty.insert(client);
            }
        }
        fresh
    }

    /// The pairs that changed since the last call, under keys that begin with `prefix`.
    pub fn take_writes(&mut self, prefix: &[u8]) -> Vec<Write> {
        let dirty = std::mem::take(&mut self.dirty);
        let write = |client: u64| {
            let mut key = prefix.to_vec();
            key.extend_from_slice(&client.to_be_bytes());
            let value = self.clients.get(&client).map(|session| session.to_wire(client).encode_to_vec());
            Write { key, value }
        };
        dirty.into_iter().map(write).collect()
    }

    /// The table as a snapshot carries it.
    #[must_use]
    pub fn to_wire(&self) -> wire::Sessions {
        let sessions = self.clients.iter().map(|(client, session)| session.to_wire(*client)).collect();
        wire::Sessions { sessions }
    }

    /// The table from a snapshot; all of it counts as changed.
    #[must_use]
    pub fn from_wire(sessions: wire::Sessions) -> Self {
        let mut table = Self::default();
        for session in sessions.sessions {
            table.dirty.insert(session.client);
            table.add(session);
        }
        table
    }

    /// The table from stored pairs.
    ///
    /// # Errors
    ///
    /// If a value is not a session.
    pub fn from_values<'a>(values: impl Iterator<Item = &'a [u8]>) -> Result<Self, prost::DecodeError> {
        let mut table = Self::default();
        for value in values {
            table.add(wire::Session::decode(value)?);
        }
        Ok(table)
    }

    fn add(&mut self, session: wire::Session) {
        let applied = session.applied.iter().map(|range| (range.first, range.last)).collect();
        self.clients.insert(session.client, Session { last_index: session.last_index, applied });
    }
}

impl Session {
    fn add(&mut self, sequence: u64) -> bool {
        let before = self.applied.range(..=sequence).next_back().map(|(first, last)| (*first, *last));
        if before.is_some_and(|(_, last)| sequence <= last) {
            return false;
        }
        let after = sequence.checked_add(1).and_then(|next| self.applied.remove(&next));
        let first = match before {
            Some((first, last)) if last + 1 == sequence => first,
            _ => sequence,
        };
        self.applied.insert(first, after.unwrap_or(sequence));
        if self.applied.len() > RANGES {
            self.close_oldest_gap();
        }
        true
    }

    fn close_oldest_gap(&mut self) {
        let Some((first, _)) = self.applied.pop_first() else { return };
        if let Some((_, last)) = self.applied.pop_first() {
            self.applied.insert(first, last);
        }
    }

    fn to_wire(&self, client: u64) -> wire::Session {
        let applied = self.applied.iter().map(|(first, last)| wire::Range { first: *first, last: *last });
        wire::Session { client, last_index: self.last_index, applied: applied.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_number_is_admitted_once_in_any_order() {
        let mut sessions = Sessions::default();
        for (index, (sequence, fresh)) in [
            (1, true),
            (1, false),
            (5, true),
            (3, true),
            (4, true),
            (5, false),
            (2, true),
            (3, false),
            (6, true),
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(sessions.admit(9, sequence, index as u64), fresh, "step {index}");
        }
        assert_eq!(sessions.clients[&9].applied, BTreeMap::from([(1, 6)]));
    }

    #[test]
    fn a_stored_range_that_ends_before_it_begins_does_no_harm() {
        let range = wire::Range { first: u64::MAX, last: 0 };
        let session = wire::Session { client: 9, last_index: 1, applied: vec![range] };
        let mut sessions = Sessions::from_wire(wire::Sessions { sessions: vec![session] });
        assert!(sessions.admit(9, u64::MAX, 2));
        assert!(!sessions.admit(9, u64::MAX, 3));
    }

    #[test]
    fn the_client_that_was_silent_for_longest_is_forgotten() {
        let mut sessions = Sessions::default();
        for client in 0..300 {
            assert!(sessions.admit(client, 1, client + 1));
        }
        assert_eq!(sessions.clients.len(), CLIENTS);
        assert_eq!(
            sessions.take_writes(b"s").iter().filter(|write| write.value.is_none()).count(),
            300 - CLIENTS
        );
    }

    proptest! {
        #[test]
        fn the_table_survives_both_of_its_stored_forms(numbers in prop::collection::vec((0_u64..4, 0_u64..600), 0..400)) {
            let mut sessions = Sessions::default();
            for (index, (client, sequence)) in numbers.into_iter().enumerate() {
                sessions.admit(client, sequence, index as u64);
            }
            let writes = sessions.take_writes(b"s");
            let values = writes.iter().filter_map(|write| write.value.as_deref());
            prop_assert_eq!(&Sessions::from_values(values).expect("decodes"), &sessions);
            let again = Sessions::from_wire(sessions.to_wire());
            prop_assert_eq!(again.clients, sessions.clients);
        }
    }
}
