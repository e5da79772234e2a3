//! The members as a pure value.

use super::*;

fn description(name: &str) -> Description {
    Description { name: name.to_owned(), peer: format!("{name}:15019"), reads: 2, ..Description::default() }
}

fn founded() -> ClusterState {
    let mut state = ClusterState::default();
    let found = ClusterCommand::Found { id: 1, description: description("a") };
    assert_eq!(state.apply(1, found), ClusterOutcome::Done);
    state
}

fn ticket(state: &mut ClusterState, id: &str, replaces: Option<u64>) {
    let ticket = TicketRecord {
        secret: Hash::of(b"secret"),
        expires_at: 100,
        wants_vote: true,
        replaces,
        redeemed: None,
    };
    state.apply(2, ClusterCommand::AddTicket { id: id.to_owned(), ticket });
}

fn enrol(state: &mut ClusterState, id: &str, machine: &str, now: u64) -> ClusterOutcome {
    state.apply(
        3,
        ClusterCommand::Enrol {
            ticket: id.to_owned(),
            secret: Hash::of(b"secret"),
            instance: Hash::of(machine.as_bytes()),
            description: description(machine),
            now,
        },
    )
}

fn change(state: &mut ClusterState, voters: &[u64], remove: &[u64]) -> ClusterOutcome {
    let command = ClusterCommand::Change {
        expected: state.voters().clone(),
        voters: voters.iter().copied().collect(),
        remove: remove.iter().copied().collect(),
    };
    state.apply(4, command)
}

/// Four members of which three vote.
fn grown() -> ClusterState {
    let mut state = founded();
    for (id, machine) in [("x", "b"), ("y", "c"), ("z", "d")] {
        ticket(&mut state, id, None);
        enrol(&mut state, id, machine, 50);
    }
    assert_eq!(change(&mut state, &[1, 2, 3], &[]), ClusterOutcome::Done);
    state
}

#[test]
fn a_ticket_makes_one_member_however_often_its_machine_asks() {
    let mut state = founded();
    ticket(&mut state, "x", None);
    let wrong = ClusterCommand::Enrol {
        ticket: "x".to_owned(),
        secret: Hash::of(b"guess"),
        instance: Hash::of(b"b"),
        description: description("b"),
        now: 50,
    };
    assert_eq!(state.apply(3, wrong), ClusterOutcome::Refused(ClusterRefusal::NoTicket));
    assert_eq!(enrol(&mut state, "x", "b", 101), ClusterOutcome::Refused(ClusterRefusal::Expired));
    assert_eq!(enrol(&mut state, "x", "b", 50), ClusterOutcome::Enrolled(2));
    assert_eq!(
        enrol(&mut state, "x", "b", 500),
        ClusterOutcome::Enrolled(2),
        "its answer may have been lost"
    );
    assert_eq!(enrol(&mut state, "x", "c", 50), ClusterOutcome::Refused(ClusterRefusal::Used));
    assert_eq!(state.members().len(), 2);
    assert_eq!(state.voters(), &BTreeSet::from([1]), "a new member only learns");
    let again = ClusterCommand::Found { id: 9, description: description("z") };
    assert_eq!(state.apply(5, again), ClusterOutcome::Refused(ClusterRefusal::Founded));
}

#[test]
fn voters_are_one_three_or_five_and_every_other_wish_is_refused_with_a_reason() {
    let mut state = grown();
    let cases: [(&[u64], &[u64], &str); 6] = [
        (&[1, 2], &[3], "this would leave 2: replace the member instead (`istioctl members replace 3`)"),
        (&[1, 2, 3, 4], &[], "this would leave 4"),
        (&[], &[1, 2, 3], "the last voter cannot go"),
        (&[1, 2, 9], &[], "there is no member 9"),
        (&[1, 2, 3], &[3], "cannot both go and vote"),
        (&[1, 2, 3], &[8], "there is no member 8"),
    ];
    for (voters, remove, reason) in cases {
        let before = state.clone();
        let outcome = change(&mut state, voters, remove);
        let ClusterOutcome::Refused(refusal) = outcome else { panic!("{voters:?}: {outcome:?}") };
        assert!(refusal.to_string().contains(reason), "{refusal}");
        assert_eq!(state, before, "{voters:?}");
    }
    let stale =
        ClusterCommand::Change { expected: [1].into(), voters: [1, 2, 4].into(), remove: BTreeSet::new() };
    let refused = state.apply(5, stale);
    assert!(matches!(refused, ClusterOutcome::Refused(ClusterRefusal::Conflict(_))), "{refused:?}");
    assert_eq!(change(&mut state, &[1, 2, 4], &[3]), ClusterOutcome::Done, "one for another in one step");
}

#[test]
fn a_number_never_returns() {
    let mut state = grown();
    assert_eq!(change(&mut state, &[1, 2, 3], &[4]), ClusterOutcome::Done);
    ticket(&mut state, "w", None);
    assert_eq!(enrol(&mut state, "w", "e", 50), ClusterOutcome::Enrolled(5));
    assert_eq!(enrol(&mut state, "z", "d", 50), ClusterOutcome::Refused(ClusterRefusal::Used));
    assert_eq!(change(&mut state, &[1], &[2, 3]), ClusterOutcome::Done, "two voters may go together");
    assert_eq!(state.retired(), &BTreeSet::from([2, 3, 4]));
    let directory = state.directory();
    assert_eq!(directory.addresses.into_keys().collect::<Vec<_>>(), [1, 5]);
    let gone = state.apply(9, ClusterCommand::Describe { id: 4, description: description("d") });
    let ClusterOutcome::Refused(refusal) = gone else { panic!("{gone:?}") };
    assert!(refusal.to_string().contains("its number is never used again"), "{refusal}");
}

#[test]
fn a_member_that_lost_its_data_gets_a_new_number_that_takes_the_place_of_the_old_one() {
    let mut state = grown();
    let ask = ClusterCommand::Reenrol { old: 2, instance: Hash::of(b"b2"), description: description("b") };
    assert_eq!(state.apply(6, ask.clone()), ClusterOutcome::Enrolled(5));
    assert_eq!(state.apply(7, ask), ClusterOutcome::Enrolled(5));
    assert_eq!(state.member(5).map(|member| member.replaces), Some(Some(2)));
}

#[test]
fn the_state_survives_both_of_its_stored_forms() {
    let mut state = grown();
    state.apply(9, ClusterCommand::Seal { name: "root".to_owned(), sealed: "AAAA".to_owned() });
    state.apply(10, ClusterCommand::Seal { name: "root".to_owned(), sealed: "BBBB".to_owned() });
    assert_eq!(state.sealed("root"), Some("AAAA"), "a secret that is there stays");
    assert_eq!(state.level(), Some(2));
    let mut stored = BTreeMap::new();
    for key in state.take_changed() {
        match state.value(&key) {
            Some(value) => drop(stored.insert(key, value)),
            None => drop(stored.remove(&key)),
        }
    }
    assert_eq!(stored, state.pairs());
    let pairs = stored.iter().map(|(key, value)| (key.as_slice(), value.as_slice()));
    assert_eq!(ClusterState::from_pairs(pairs).expect("reads"), state);
    assert!(ClusterState::from_pairs([(&b"q"[..], &b""[..])].into_iter()).is_err());
}
