use super::*;
use proptest::prelude::*;

fn record(id: &str, uses: u32) -> TokenRecord {
    TokenRecord {
        id: id.to_owned(),
        hash: Hash::of(b"secret"),
        namespace: "shop".to_owned(),
        service_account: "payments".to_owned(),
        expires_at: 100,
        uses_left: uses,
        workload_group: Some("shop/payments".to_owned()),
        created_by: "ann".to_owned(),
        redeemed_by: BTreeMap::new(),
        cidrs: Vec::new(),
    }
}

fn redeem(state: &mut CaState, id: &str, secret: &str, key: &str, at: u64) -> Result<(), RedeemRefused> {
    let command = CaCommand::Redeem {
        id: id.to_owned(),
        secret_hash: Hash::of(secret.as_bytes()),
        key_hash: Hash::of(key.as_bytes()),
        at,
    };
    let token = PresentedToken { id: id.to_owned(), secret_hash: Hash::of(secret.as_bytes()) };
    let now = UNIX_EPOCH + Duration::from_secs(at);
    let foreseen = state.check_redeem(&token, Hash::of(key.as_bytes()), None, now);
    let effect = state.apply(command);
    match foreseen {
        Ok(redemption) => assert_eq!(redemption == Redemption::First, effect.writes.len() == 1),
        Err(reason) => assert_eq!(effect, CaEffect::refused(reason)),
    }
    match effect.outcome {
        CaOutcome::Refused(reason) => Err(reason),
        outcome @ (CaOutcome::Redeemed { .. } | CaOutcome::Changed | CaOutcome::Unchanged) => {
            let expected = CaOutcome::Redeemed {
                namespace: "shop".to_owned(),
                service_account: "payments".to_owned(),
                workload_group: Some("shop/payments".to_owned()),
            };
            assert_eq!(outcome, expected);
            Ok(())
        }
    }
}

/// Token, secret, key, second, what is answered.
type RedeemStep = (&'static str, &'static str, &'static str, u64, Result<(), RedeemRefused>);

#[track_caller]
fn check(uses: u32, steps: &[RedeemStep]) {
    let mut state = CaState::default();
    state.apply(CaCommand::AddJoinToken(record("t", uses)));
    for (at, (id, secret, key, second, expected)) in steps.iter().enumerate() {
        assert_eq!(redeem(&mut state, id, secret, key, *second), *expected, "step {at}");
    }
}

#[test]
fn one_key_redeems_and_may_repeat() {
    use RedeemRefused::*;
    check(
        1,
        &[
            ("t", "secret", "key1", 50, Ok(())),
            ("t", "secret", "key1", 60, Ok(())),
            ("t", "secret", "key2", 60, Err(UsedUp)),
            ("t", "wrong", "key1", 60, Err(Unknown)),
            ("t", "secret", "key1", 100, Ok(())),
            ("t", "secret", "key1", 101, Err(Expired)),
            ("t", "wrong", "key1", 101, Err(Unknown)),
        ],
    );
}

#[test]
fn several_uses_are_several_keys() {
    use RedeemRefused::*;
    check(
        2,
        &[
            ("t", "secret", "key1", 1, Ok(())),
            ("t", "secret", "key1", 1, Ok(())),
            ("t", "secret", "key2", 1, Ok(())),
            ("t", "secret", "key3", 1, Err(UsedUp)),
            ("t", "secret", "key2", 1, Ok(())),
        ],
    );
}

#[test]
fn unknown_expired_and_unusable_tokens_are_refused() {
    use RedeemRefused::*;
    check(1, &[("u", "secret", "key1", 1, Err(Unknown)), ("t", "secret", "key1", 101, Err(Expired))]);
    check(0, &[("t", "secret", "key1", 1, Err(UsedUp))]);
}

#[test]
fn a_wrong_secret_uses_nothing_up() {
    check(1, &[("t", "wrong", "k", 1, Err(RedeemRefused::Unknown)), ("t", "secret", "k", 1, Ok(()))]);
}

#[test]
fn a_revoked_token_is_unknown_even_to_its_key() {
    let mut state = CaState::default();
    state.apply(CaCommand::AddJoinToken(record("t", 1)));
    redeem(&mut state, "t", "secret", "key1", 1).unwrap();
    let effect = state.apply(CaCommand::RevokeJoinToken { id: "t".to_owned() });
    assert_eq!(effect.writes, [Write { key: "token/t".to_owned(), value: None }]);
    assert_eq!(redeem(&mut state, "t", "secret", "key1", 1), Err(RedeemRefused::Unknown));
    assert_eq!(state.apply(CaCommand::RevokeJoinToken { id: "t".to_owned() }), CaEffect::unchanged());
}

#[test]
fn adding_again_does_not_refill_a_token() {
    let mut state = CaState::default();
    state.apply(CaCommand::AddJoinToken(record("t", 1)));
    redeem(&mut state, "t", "secret", "key1", 1).unwrap();
    assert_eq!(state.apply(CaCommand::AddJoinToken(record("t", 1))), CaEffect::unchanged());
    assert_eq!(redeem(&mut state, "t", "secret", "key2", 1), Err(RedeemRefused::UsedUp));
}

#[test]
fn pruning_removes_what_has_ended_before() {
    let mut state = CaState::default();
    state.apply(CaCommand::AddJoinToken(record("t", 1)));
    assert_eq!(state.apply(CaCommand::Prune { before: 100 }), CaEffect::unchanged());
    assert_eq!(state.apply(CaCommand::Prune { before: 101 }).outcome, CaOutcome::Changed);
    assert_eq!(state.tokens().count(), 0);
}

fn revocation(key: &str, until: u64) -> Revocation {
    Revocation {
        node: NodeId::of_key(Hash::of(key.as_bytes())),
        namespace: "shop".to_owned(),
        service_account: "payments".to_owned(),
        at: 5,
        by: "ann".to_owned(),
        reason: "stolen".to_owned(),
        until,
    }
}

#[test]
fn a_revoked_node_redeems_no_token_again_and_others_do() {
    let mut state = CaState::default();
    state.apply(CaCommand::AddJoinToken(record("t", 2)));
    redeem(&mut state, "t", "secret", "key1", 1).unwrap();
    let revoked = revocation("key1", 50);
    assert_eq!(state.apply(CaCommand::RevokeNode(revoked.clone())).outcome, CaOutcome::Changed);
    let refused = redeem(&mut state, "t", "secret", "key1", 2).unwrap_err();
    assert_eq!(refused, RedeemRefused::Revoked(revoked.node));
    assert!(refused.to_string().contains(&format!("node {}, which was revoked", revoked.node)), "{refused}");
    redeem(&mut state, "t", "secret", "key2", 2).unwrap();
    // A stranger learns nothing of it.
    assert_eq!(redeem(&mut state, "t", "wrong", "key1", 2), Err(RedeemRefused::Unknown));
    // Who revoked it first, and why, stays.
    let again = Revocation { by: "bob".to_owned(), ..revoked.clone() };
    assert_eq!(state.apply(CaCommand::RevokeNode(again)), CaEffect::unchanged());
    assert_eq!(state.revoked().get(&revoked.node), Some(&revoked));
}

#[test]
fn a_revocation_is_forgotten_when_nothing_depends_on_it() {
    let mut state = CaState::default();
    let revoked = revocation("key1", 50);
    state.apply(CaCommand::RevokeNode(revoked.clone()));
    assert_eq!((state.has_ended(50), state.has_ended(51)), (false, true));
    assert_eq!(state.apply(CaCommand::Prune { before: 50 }), CaEffect::unchanged());
    let gone = Write { key: format!("revoked/{}", revoked.node), value: None };
    let expected = CaEffect { outcome: CaOutcome::Changed, writes: vec![gone] };
    assert_eq!(state.apply(CaCommand::Prune { before: 51 }), expected);
    assert_eq!(state, CaState::default());
}

#[test]
fn no_token_gives_the_control_planes_identity() {
    let td = TrustDomain::default();
    let mut token = record("t", 1);
    assert_eq!(token.identity(&td).unwrap().path(), "/ns/shop/sa/payments");
    token.namespace = "istio-system".to_owned();
    token.service_account = "istiod".to_owned();
    assert_eq!(token.identity(&td), Err(TokenRefused::ControlPlane));
    token.service_account = "x/../istiod".to_owned();
    assert!(matches!(token.identity(&td), Err(TokenRefused::Identity(_))));
}

/// Commands as they are in logs that exist: they must decode for ever.
#[test]
fn stored_commands_decode() {
    let hash = Hash::of(b"secret");
    let old = format!(
        r#"[{{"add_join_token":{{"id":"t","hash":"{hash}","namespace":"shop","service_account":"payments","expires_at":100,"uses_left":1}}}},
        {{"redeem":{{"id":"t","secret_hash":"{hash}","key_hash":"{hash}","at":5}}}},
        {{"revoke_join_token":{{"id":"t"}}}},{{"prune":{{"before":7}}}},{{"set_bundle":[]}},
        {{"revoke_node":{{"node":"3a7816bf8f01cfea","at":5,"until":9}}}}]"#
    );
    let commands: Vec<CaCommand> = serde_json::from_str(&old).unwrap();
    assert_eq!(commands.len(), 6);
}

#[test]
fn a_token_for_some_addresses_is_refused_from_all_others() {
    let mut state = CaState::default();
    let cidrs = ["10.1.0.0/16", "2001:db8::/32"].map(|cidr| cidr.parse().unwrap());
    let restricted = TokenRecord { cidrs: cidrs.to_vec(), ..record("t", 1) };
    state.apply(CaCommand::AddJoinToken(restricted));
    let token = PresentedToken { id: "t".to_owned(), secret_hash: Hash::of(b"secret") };
    let key = Hash::of(b"key");
    let asked = |state: &CaState, from: Option<&str>| {
        let from = from.map(|address| address.parse().unwrap());
        state.check_redeem(&token, key, from, UNIX_EPOCH)
    };
    for good in ["10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1"] {
        assert_eq!(asked(&state, Some(good)), Ok(Redemption::First), "{good}");
    }
    for wrong in [Some("10.2.0.1"), Some("2001:db9::1"), Some("::ffff:10.2.0.1"), None] {
        assert!(matches!(asked(&state, wrong), Err(RedeemRefused::Elsewhere(_))), "{wrong:?}");
    }
    let told = asked(&state, Some("10.2.0.1")).unwrap_err().to_string();
    assert!(told.contains("that call from 10.2.0.1"), "{told}");
    // The same key again is no exception.
    state.apply(CaCommand::redeem(&token, key, UNIX_EPOCH));
    assert_eq!(asked(&state, Some("10.1.2.3")), Ok(Redemption::Repeated));
    assert!(asked(&state, Some("10.2.0.1")).is_err());
    assert_eq!(CaState::decode(&state.encode()).unwrap(), state);
}

fn commands() -> impl Strategy<Value = Vec<CaCommand>> {
    let id = prop_oneof![Just("a".to_owned()), Just("b".to_owned())];
    let hash = (0..3_u8).prop_map(|n| Hash::of(&[n]));
    let add = (id.clone(), hash.clone(), 0..3_u32, 0..10_u64).prop_map(|(id, hash, uses, expires_at)| {
        CaCommand::AddJoinToken(TokenRecord { hash, expires_at, ..record(&id, uses) })
    });
    let redeem = (id.clone(), hash.clone(), hash, 0..12_u64)
        .prop_map(|(id, secret_hash, key_hash, at)| CaCommand::Redeem { id, secret_hash, key_hash, at });
    let revoke = id.prop_map(|id| CaCommand::RevokeJoinToken { id });
    let prune = (0..12_u64).prop_map(|before| CaCommand::Prune { before });
    let node = (0..3_u8, 0..12_u64).prop_map(|(key, until)| {
        let node = NodeId::of_key(Hash::of(&[key]));
        CaCommand::RevokeNode(Revocation { node, ..revocation("key", until) })
    });
    prop::collection::vec(prop_oneof![3 => add, 6 => redeem, 1 => revoke, 1 => prune, 1 => node], 0..40)
}

proptest! {
    #[test]
    fn writes_follow_the_state_and_every_form_round_trips(commands in commands()) {
        let mut state = CaState::default();
        let mut stored: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for command in commands {
            let json = serde_json::to_vec(&command).unwrap();
            let decoded: CaCommand = serde_json::from_slice(&json).unwrap();
            prop_assert_eq!(&decoded, &command);
            for write in state.apply(command).writes {
                match write.value {
                    Some(value) => { stored.insert(write.key, value); }
                    None => { stored.remove(&write.key); }
                }
            }
        }
        let rebuilt = CaState::from_entries(stored.iter().map(|(k, v)| (k.as_str(), v.as_slice()))).unwrap();
        prop_assert_eq!(&rebuilt, &state);
        prop_assert_eq!(&CaState::decode(&state.encode()).unwrap(), &state);
        let entries = state.entries();
        let pairs = entries.iter().map(|w| (w.key.as_str(), w.value.as_deref().unwrap()));
        prop_assert_eq!(&CaState::from_entries(pairs).unwrap(), &state);
    }
}
