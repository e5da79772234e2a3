//! What must hold for every log: the same state everywhere, the same bytes, and snapshots that follow.

#[path = "state/support.rs"]
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use registry::snapshot::Snapshot;
use registry::state::{Batch, PastError, Revision, State, StoredCommand};
use support::{batches, dump};

fn replay(batches: &[Batch]) -> State {
    let mut state = State::default();
    for (index, batch) in (1..).zip(batches) {
        state.apply(Revision(index), batch);
    }
    state
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn the_same_log_gives_the_same_bytes(log in batches(40)) {
        let stored: Vec<Vec<u8>> = log.iter().map(StoredCommand::encode).collect();
        let read: Vec<Batch> = stored.iter().map(|bytes| StoredCommand::decode(bytes).unwrap()).collect();
        prop_assert_eq!(replay(&log).encode(), replay(&read).encode());
    }

    #[test]
    fn a_decoded_state_is_the_state(log in batches(40), later in batches(20)) {
        let mut state = replay(&log);
        let bytes = state.encode();
        let mut decoded = State::decode(&bytes).unwrap();
        prop_assert_eq!(decoded.encode(), bytes);
        // Not only its bytes: what follows is the same too, so the derived indexes were rebuilt.
        let next = state.revision().0 + 1;
        for (index, batch) in (next..).zip(&later) {
            prop_assert_eq!(state.apply(Revision(index), batch), decoded.apply(Revision(index), batch));
        }
        prop_assert_eq!(decoded.encode(), state.encode());
    }

    #[test]
    fn a_batch_applied_again_changes_nothing(log in batches(20), last in batches(8)) {
        let mut state = replay(&log);
        for batch in last {
            // Two commands of one batch may undo each other; one at a time they are whole values.
            for command in batch.commands {
                let batch = Batch { commands: vec![command], time_ms: batch.time_ms, author: batch.author.clone() };
                let next = Revision(state.revision().0 + 1);
                state.apply(next, &batch);
                let before = dump(&Snapshot::build(&state));
                let (changes, _) = state.apply(Revision(next.0 + 1), &batch);
                prop_assert!(changes.is_empty(), "{:?} changed {:?}", batch, changes);
                prop_assert_eq!(dump(&Snapshot::build(&state)), before);
            }
        }
    }

    #[test]
    fn a_snapshot_that_followed_equals_one_from_scratch(log in batches(30)) {
        let mut state = State::default();
        let mut snapshot = Arc::new(Snapshot::build(&state));
        for (index, batch) in (1..).zip(&log) {
            let (changes, _) = state.apply(Revision(index), batch);
            snapshot = Arc::new(Snapshot::next(&snapshot, &state, &changes));
            prop_assert_eq!(snapshot.revision(), Revision(index));
        }
        prop_assert_eq!(dump(&snapshot), dump(&Snapshot::build(&state)));
    }

    #[test]
    fn merged_changes_lead_to_the_same_snapshot(log in batches(30)) {
        let mut state = State::default();
        let first = Arc::new(Snapshot::build(&state));
        let mut all = registry::state::Changes::default();
        for (index, batch) in (1..).zip(&log) {
            let (changes, _) = state.apply(Revision(index), batch);
            all.merge(changes);
        }
        prop_assert_eq!(dump(&Snapshot::next(&first, &state, &all)), dump(&Snapshot::build(&state)));
    }

    #[test]
    fn what_is_written_makes_the_state_again(log in batches(30)) {
        let mut state = State::default();
        let mut store: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        for (index, batch) in (1..).zip(&log) {
            let (changes, _) = state.apply(Revision(index), batch);
            for (key, value) in state.writes(&changes) {
                match value {
                    Some(value) => store.insert(key, value),
                    None => store.remove(&key),
                };
            }
        }
        if !log.is_empty() {
            prop_assert_eq!(&store, &state.pairs());
        }
        prop_assert_eq!(State::from_pairs(store).unwrap().encode(), state.encode());
    }

    #[test]
    fn the_past_is_what_was_as_far_as_history_reaches(log in batches(40)) {
        let mut state = State::default();
        let objects = |state: &State| -> BTreeMap<_, _> {
            state.objects().map(|(key, object)| (key.clone(), object.clone())).collect()
        };
        let mut seen = vec![objects(&state)];
        for (index, batch) in (1..).zip(&log) {
            state.apply(Revision(index), batch);
            seen.push(objects(&state));
        }
        let restored = State::decode(&state.encode()).unwrap();
        for (revision, objects) in (0..).map(Revision).zip(seen) {
            for state in [&state, &restored] {
                match state.past(revision) {
                    Ok(past) => prop_assert_eq!(&past.objects, &objects, "at {}", revision),
                    Err(error) => {
                        let oldest = state.history().forgotten();
                        prop_assert_eq!(error, PastError::Forgotten { asked: revision, oldest });
                        prop_assert!(revision < oldest);
                    }
                }
            }
        }
        let next = Revision(state.revision().0 + 1);
        let future = PastError::Future { asked: next, newest: state.revision() };
        prop_assert_eq!(state.past(next), Err(future));
    }

    #[test]
    fn damaged_bytes_are_an_error(log in batches(6), at in any::<proptest::sample::Index>(), bit in 0u8..8) {
        let bytes = replay(&log).encode();
        let mut damaged = bytes.clone();
        damaged[at.index(bytes.len())] ^= 1 << bit;
        prop_assert!(State::decode(&damaged).is_err());
        prop_assert!(State::decode(&bytes[..at.index(bytes.len())]).is_err());
    }

    #[test]
    fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(State::decode(&bytes).is_err());
        prop_assert!(StoredCommand::decode(&bytes).is_err());
        prop_assert!(State::from_pairs([(b"object/x", &bytes)]).is_err());
    }
}
