//! Tokens and bindings as a state.

use proptest::prelude::*;

use super::*;

fn grant(role: Role, namespaces: &[&str]) -> Grant {
    let set: BTreeSet<String> = namespaces.iter().map(|n| (*n).to_owned()).collect();
    Grant { role, namespaces: (!set.is_empty()).then_some(set) }
}

fn token(id: &str, expires_at: u64) -> (ApiToken, ApiSecret) {
    let secret = ApiSecret::random(id.to_owned()).unwrap();
    let token = ApiToken {
        id: id.to_owned(),
        hash: secret.hash(),
        name: "ci".to_owned(),
        grant: grant(Role::Editor, &["shop"]),
        created_at: 100,
        expires_at,
        created_by: "admin".to_owned(),
        last_used: None,
    };
    (token, secret)
}

#[test]
fn each_role_may_do_what_the_one_before_may() {
    let granted = |role: Role| {
        let all = [Permission::Open, Permission::Read, Permission::Write, Permission::Administer];
        all.map(|permission| role.grants(permission))
    };
    assert_eq!(granted(Role::Viewer), [true, true, false, false]);
    assert_eq!(granted(Role::Editor), [true, true, true, false]);
    assert_eq!(granted(Role::Admin), [true, true, true, true]);
}

#[test]
fn nobody_gives_more_than_one_has() {
    let everything = grant(Role::Admin, &[]);
    let of_shop = grant(Role::Admin, &["shop", "bank"]);
    assert!(everything.includes(&of_shop) && of_shop.includes(&grant(Role::Editor, &["shop"])));
    assert!(!of_shop.includes(&everything) && !of_shop.includes(&grant(Role::Viewer, &["till"])));
    assert!(!grant(Role::Editor, &[]).includes(&grant(Role::Admin, &["shop"])));
    assert!(of_shop.covers("bank") && !of_shop.covers("till") && everything.covers("till"));
}

#[test]
fn a_token_opens_until_it_ends_or_is_revoked() {
    let mut state = AccessState::default();
    let (one, secret) = token("a", 200);
    assert_eq!(state.apply(1, AccessCommand::AddToken(one.clone())), AccessOutcome::Changed);
    assert_eq!(state.apply(2, AccessCommand::AddToken(one)), AccessOutcome::Unchanged);
    assert_eq!(state.apply(3, AccessCommand::AddToken(token("a", 300).0)), AccessOutcome::Exists);
    let presented = ApiSecret::parse(&secret.to_text()).unwrap();
    assert_eq!(state.open(&presented, 199).unwrap().id, "a");
    assert_eq!(state.open(&presented, 200), Err(TokenRefused::Expired));
    assert_eq!(state.open(&ApiSecret::random("a".to_owned()).unwrap(), 1), Err(TokenRefused::Unknown));
    let revoke = || AccessCommand::RevokeToken { id: "a".to_owned() };
    assert_eq!(state.apply(4, revoke()), AccessOutcome::Changed);
    assert_eq!(state.apply(5, revoke()), AccessOutcome::NotFound);
    assert_eq!(state.open(&presented, 1), Err(TokenRefused::Unknown));
}

#[test]
fn the_state_knows_no_secret() {
    let mut state = AccessState::default();
    let (one, secret) = token("a", 200);
    state.apply(1, AccessCommand::AddToken(one));
    let text = secret.to_text();
    let bare = text.rsplit('.').next().unwrap();
    let stored = state.pairs();
    assert!(stored.iter().all(|(_, value)| !String::from_utf8_lossy(value).contains(bare)));
    assert!(!format!("{secret:?}").contains(bare));
}

#[test]
fn use_is_known_to_the_hour_and_written_once_for_it() {
    let mut state = AccessState::default();
    state.apply(1, AccessCommand::AddToken(token("a", 1_000_000).0));
    state.take_changed();
    let used = |at| AccessCommand::Used { ids: ["a".to_owned(), "gone".to_owned()].into(), at };
    assert_eq!(state.apply(2, used(7300)), AccessOutcome::Changed);
    assert_eq!(state.token("a").unwrap().last_used, Some(7200));
    assert_eq!(state.take_changed().len(), 1);
    assert_eq!(state.apply(3, used(10_799)), AccessOutcome::Unchanged);
    assert_eq!(state.apply(4, used(3600)), AccessOutcome::Unchanged, "time does not go back");
    assert!(state.take_changed().is_empty());
}

#[test]
fn a_token_that_ended_long_ago_makes_room_for_new_ones() {
    let mut state = AccessState::default();
    state.apply(1, AccessCommand::AddToken(token("old", 200).0));
    let mut newer = token("new", u64::MAX).0;
    newer.created_at = 200 + KEPT_AFTER_EXPIRY;
    state.apply(2, AccessCommand::AddToken(newer));
    assert_eq!(state.tokens().map(|t| t.id.as_str()).collect::<Vec<_>>(), ["new"]);
    assert_eq!(AccessState::from_pairs(borrowed(&state.pairs())).unwrap().tokens().count(), 1);
}

#[test]
fn texts_that_are_no_token_are_refused() {
    for text in
        ["", "istio-api.", "istio-api.a", "istio-api.a.", "istio-api..b", "istio-join.a.b", "Bearer x"]
    {
        assert!(ApiSecret::parse(text).is_err(), "{text}");
    }
    assert!(ApiSecret::parse(&format!("istio-api.a.{}", "b".repeat(300))).is_err());
}

fn borrowed(pairs: &BTreeMap<Vec<u8>, Vec<u8>>) -> impl Iterator<Item = (&[u8], &[u8])> {
    pairs.iter().map(|(key, value)| (key.as_slice(), value.as_slice()))
}

fn command() -> impl Strategy<Value = AccessCommand> {
    let id = || prop_oneof![Just("a"), Just("b"), Just("c")].prop_map(str::to_owned);
    let role = prop_oneof![Just(Role::Viewer), Just(Role::Editor), Just(Role::Admin)];
    let bind = (id(), role).prop_map(|(id, role)| {
        AccessCommand::Bind(Binding {
            identity: format!("spiffe://mesh/ns/{id}/sa/ops"),
            grant: Grant::everywhere(role),
            created_at: 1,
            created_by: "x".to_owned(),
        })
    });
    let add = (id(), 1..5_u64).prop_map(|(id, day)| {
        let mut token = token("z", day * 86_400).0;
        token.hash = Hash::of(id.as_bytes());
        token.created_at = day * 40 * 86_400;
        token.id = id;
        AccessCommand::AddToken(token)
    });
    prop_oneof![
        add,
        bind,
        id().prop_map(|id| AccessCommand::RevokeToken { id }),
        id().prop_map(|id| AccessCommand::Unbind { identity: format!("spiffe://mesh/ns/{id}/sa/ops") }),
        (id(), 0..1_000_000_u64).prop_map(|(id, at)| AccessCommand::Used { ids: [id].into(), at }),
    ]
}

proptest! {
    /// What is written step by step is what the state is, and it comes back as it was.
    #[test]
    fn the_written_pairs_are_the_state(commands in prop::collection::vec(command(), 0..40)) {
        let mut state = AccessState::default();
        let mut stored: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        for (index, command) in commands.into_iter().enumerate() {
            let text = serde_json::to_vec(&command).unwrap();
            let index = u64::try_from(index).unwrap();
            state.apply(index, serde_json::from_slice(&text).unwrap());
            for key in state.take_changed() {
                match state.value(&key) {
                    Some(value) => { stored.insert(key, value); }
                    None => { stored.remove(&key); }
                }
            }
            prop_assert_eq!(&stored, &state.pairs());
        }
        prop_assert_eq!(AccessState::from_pairs(borrowed(&state.pairs())).unwrap(), state);
    }
}
