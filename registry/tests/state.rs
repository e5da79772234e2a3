//! How the state follows its log: creation, conflicts, indexes, sessions, history, and stored forms.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "what is not there has failed the test")]

#[path = "state/support.rs"]
mod support;

use std::path::Path;
use std::sync::Arc;

use registry::config::Kind;
use registry::model::service::{Health, SourceId, TlsMode};
use registry::snapshot::Snapshot;
use registry::state::history;
use registry::state::{
    Batch, Command, CommandOutcome, DecodeError, Delete, ObjectResult, Presence, Put, Revision, State,
    StoredCommand,
};
use serde_json::json;
use support::{Mesh, delete, endpoint, key, object, put, registration, service, workload_key};

fn rule(id: &str, host: &str) -> registry::config::Object {
    object(Kind::DestinationRule, id, json!({"host": host}))
}

#[track_caller]
fn results(mesh: &mut Mesh, command: Command) -> Vec<ObjectResult> {
    let (_, outcome) = mesh.apply(vec![command]);
    outcome.objects().map(|object| object.result).collect()
}

#[test]
fn creation_time_and_generation_survive_updates() {
    let mut mesh = Mesh { seconds: 100, ..Mesh::default() };
    assert_eq!(results(&mut mesh, put(vec![rule("a/r", "x")])), [ObjectResult::Created]);
    assert_eq!(results(&mut mesh, put(vec![rule("a/r", "x")])), [ObjectResult::Unchanged(Revision(1))]);
    assert_eq!(results(&mut mesh, put(vec![rule("a/r", "y")])), [ObjectResult::Configured]);
    let mut labelled = rule("a/r", "y");
    labelled.labels.insert("l".into(), "v".into());
    labelled.created = 1;
    assert_eq!(results(&mut mesh, put(vec![labelled])), [ObjectResult::Configured]);
    let stored = mesh.state.object(&key(Kind::DestinationRule, "a/r")).unwrap();
    // The label is no change of the specification, and the author cannot choose the age.
    assert_eq!((stored.created, stored.revision, stored.generation), (100, 4, 2));
    assert_eq!(results(&mut mesh, delete(vec![key(Kind::DestinationRule, "a/r")])), [ObjectResult::Deleted]);
    assert_eq!(results(&mut mesh, delete(vec![key(Kind::DestinationRule, "a/r")])), [ObjectResult::NotFound]);
    assert_eq!(results(&mut mesh, put(vec![rule("a/r", "x")])), [ObjectResult::Created]);
    let stored = mesh.state.object(&key(Kind::DestinationRule, "a/r")).unwrap();
    assert_eq!((stored.created, stored.revision, stored.generation), (106, 7, 1), "born again");
}

#[test]
fn a_change_is_applied_as_a_whole_or_not_at_all() {
    let mut mesh = Mesh::default().with(vec![rule("a/one", "x"), rule("a/two", "x")]);
    let expecting = |id: &str, host: &str, expected: u64| Put {
        object: Arc::new(rule(id, host)),
        expected: Some(Revision(expected)),
    };
    let change = |puts, deletes| Command::Change { puts, deletes };
    let conflict =
        |expected, found| ObjectResult::Conflict { expected: Revision(expected), found: Revision(found) };

    let stale = change(vec![expecting("a/one", "y", 1), expecting("a/two", "y", 1)], Vec::new());
    let (changes, outcome) = mesh.apply(vec![stale]);
    assert!(changes.is_empty());
    let told: Vec<_> = outcome.objects().map(|o| o.result).collect();
    assert_eq!(told, [ObjectResult::NotApplied, conflict(1, 2)]);
    assert_eq!(outcome.conflict().unwrap().key, key(Kind::DestinationRule, "a/two"));

    let right = change(vec![expecting("a/one", "y", 1), expecting("a/two", "y", 2)], Vec::new());
    assert_eq!(results(&mut mesh, right.clone()), [ObjectResult::Configured; 2]);
    let again = [ObjectResult::Unchanged(Revision(4)); 2];
    assert_eq!(results(&mut mesh, right), again, "a replay of what was applied is no conflict");

    let create = change(vec![expecting("a/one", "z", 0)], Vec::new());
    assert_eq!(results(&mut mesh, create), [conflict(0, 4)], "it exists");
    let gone = Delete { key: key(Kind::DestinationRule, "a/one"), expected: Some(Revision(1)) };
    assert_eq!(results(&mut mesh, change(Vec::new(), vec![gone])), [conflict(1, 4)]);
    let gone = Delete { key: key(Kind::DestinationRule, "a/one"), expected: Some(Revision(4)) };
    assert_eq!(results(&mut mesh, change(Vec::new(), vec![gone.clone()])), [ObjectResult::Deleted]);
    assert_eq!(results(&mut mesh, change(Vec::new(), vec![gone])), [ObjectResult::NotFound]);
}

#[test]
fn an_object_named_twice_in_a_change_has_its_last_value() {
    let mut mesh = Mesh::default();
    let told = results(&mut mesh, put(vec![rule("a/r", "x"), rule("a/r", "y")]));
    assert_eq!(told, [ObjectResult::NotApplied, ObjectResult::Created]);
    let stored = mesh.state.object(&key(Kind::DestinationRule, "a/r")).unwrap();
    assert_eq!(stored.raw, json!({"host": "y"}));
}

fn entry(id: &str, hosts: &[&str]) -> registry::config::Object {
    object(
        Kind::ServiceEntry,
        id,
        json!({"hosts": hosts, "ports": [{"number": 80, "name": "http"}], "resolution": "STATIC", "location": "MESH_INTERNAL",
            "workloadSelector": {"labels": {"app": "p"}}}),
    )
}

#[test]
fn a_host_keeps_its_index_while_anybody_declares_it() {
    let source = SourceId::Kubernetes("k".into());
    let mut mesh = Mesh::default().with(vec![entry("a/one", &["x.com", "y.com"])]);
    mesh.apply(vec![Command::PutService { service: Arc::new(service("z.com", "a", source.clone())) }]);
    mesh.apply(vec![Command::PutService { service: Arc::new(service("x.com", "b", source.clone())) }]);
    let index = |mesh: &Mesh, host: &str| mesh.state.vip_index(host);
    assert_eq!(
        (index(&mesh, "x.com"), index(&mesh, "y.com"), index(&mesh, "z.com")),
        (Some(0), Some(1), Some(2))
    );
    mesh.apply(vec![delete(vec![key(Kind::ServiceEntry, "a/one")])]);
    assert_eq!((index(&mesh, "x.com"), index(&mesh, "y.com")), (Some(0), None), "a source still has x.com");
    mesh.apply(vec![Command::RemoveService { host: "x.com".into(), source }]);
    mesh.apply(vec![put(vec![entry("b/two", &["N.com"])])]);
    assert_eq!(
        (index(&mesh, "x.com"), index(&mesh, "n.com"), index(&mesh, "z.com")),
        (None, Some(0), Some(2))
    );
    assert_eq!(mesh.snapshot.service("z.com", None).unwrap().vip_index, 2);
}

#[test]
fn why_a_workload_is_not_healthy_is_kept_and_changes_no_endpoint() {
    let mut mesh = Mesh::default().with(vec![entry("a/one", &["x.com"])]);
    let registration = Arc::new(registration("a/w", "10.0.0.1", "app=p", "s1"));
    mesh.apply(vec![Command::RegisterWorkload { registration }]);
    let mut touched = |healthy, reason: &str| {
        let (key, session, reason) = (workload_key("a/w"), "s1".to_owned(), reason.to_owned());
        let (changes, _) =
            mesh.apply(vec![Command::WorkloadHealth { key: key.clone(), session, healthy, reason }]);
        let workload = mesh.state.workload(&key).unwrap();
        (changes.hosts.contains("x.com"), changes.is_empty(), workload.reason.clone())
    };
    assert_eq!(touched(false, "status 503"), (true, false, "status 503".to_owned()));
    assert_eq!(touched(false, "status 503"), (false, true, "status 503".to_owned()), "nothing is new");
    assert_eq!(touched(false, "refused"), (false, false, "refused".to_owned()), "only the reason is new");
    assert_eq!(touched(true, ""), (true, false, String::new()));
}

#[test]
fn only_the_registered_session_speaks_for_a_workload() {
    let mut mesh = Mesh::default().with(vec![entry("a/one", &["x.com"])]);
    let register = |address: &str, session: &str| Command::RegisterWorkload {
        registration: Arc::new(registration("a/w", address, "app=p", session)),
    };
    let health = |session: &str, healthy| Command::WorkloadHealth {
        key: workload_key("a/w"),
        session: session.into(),
        healthy,
        reason: String::new(),
    };
    let remove =
        |session: &str| Command::RemoveWorkload { key: workload_key("a/w"), session: session.into() };
    let fenced = |mesh: &mut Mesh, command| mesh.apply(vec![command]).1.commands == [CommandOutcome::Fenced];

    let (changes, _) = mesh.apply(vec![register("10.0.0.1", "s1")]);
    assert!(changes.hosts.contains("x.com") && changes.workloads.contains(&workload_key("a/w")));
    assert!(mesh.apply(vec![register("10.0.0.1", "s1")]).0.is_empty());
    let endpoint = mesh.snapshot.endpoints("x.com").first().unwrap().clone();
    assert_eq!((endpoint.address.as_str(), endpoint.weight), ("10.0.0.1", 1));
    assert_eq!((endpoint.tls_mode, endpoint.health), (TlsMode::Istio, Health::Healthy));

    let mut of_another = registration("a/w", "10.0.0.1", "app=p", "s9");
    of_another.service_account = "another".into();
    assert!(fenced(&mut mesh, Command::RegisterWorkload { registration: Arc::new(of_another) }));

    let (changes, _) = mesh.apply(vec![register("10.0.0.1", "s2")]);
    assert!(changes.hosts.is_empty(), "the same endpoint, whoever speaks for it");
    assert!(fenced(&mut mesh, health("s1", false)) && fenced(&mut mesh, remove("s1")));
    assert_eq!(mesh.snapshot.endpoints("x.com")[0].health, Health::Healthy);

    assert!(mesh.apply(vec![health("s2", false)]).0.hosts.contains("x.com"));
    assert_eq!(mesh.snapshot.endpoints("x.com")[0].health, Health::Unhealthy);
    assert!(mesh.apply(vec![health("s2", false)]).0.is_empty());
    assert!(mesh.apply(vec![remove("s2")]).0.hosts.contains("x.com"));
    assert!(mesh.snapshot.endpoints("x.com").is_empty());
    assert!(mesh.apply(vec![remove("s2")]).0.is_empty());
    assert!(fenced(&mut mesh, health("s2", true)));
}

#[test]
fn endpoints_are_whole_values_in_any_order() {
    let source = SourceId::Consul("c/dc".into());
    let mut mesh = Mesh::default();
    mesh.apply(vec![Command::PutService { service: Arc::new(service("X.com", "a", source.clone())) }]);
    let replace = |addresses: &[&str]| Command::ReplaceEndpoints {
        host: "x.com".into(),
        source: source.clone(),
        endpoints: addresses.iter().map(|a| endpoint(a)).collect(),
    };
    assert!(!mesh.apply(vec![replace(&["10.0.0.2", "10.0.0.1"])]).0.is_empty());
    assert!(mesh.apply(vec![replace(&["10.0.0.1", "10.0.0.2", "10.0.0.1"])]).0.is_empty());
    let addresses: Vec<_> = mesh.snapshot.endpoints("x.com").iter().map(|e| e.address.clone()).collect();
    assert_eq!(addresses, ["10.0.0.1", "10.0.0.2"]);
    assert!(!mesh.apply(vec![replace(&[])]).0.is_empty());
    assert!(mesh.apply(vec![replace(&[])]).0.is_empty());
    assert!(mesh.snapshot.service("x.com", None).is_some(), "a service without endpoints is a service");
}

#[test]
fn history_remembers_who_changed_what_within_its_bound() {
    let mut mesh = Mesh { seconds: 50, ..Mesh::default() };
    mesh.apply(vec![put(vec![rule("a/r", "x")])]);
    mesh.apply(vec![put(vec![rule("a/r", "x")])]);
    mesh.apply(vec![put(vec![rule("a/r", "y"), rule("a/s", "z")])]);
    mesh.apply(vec![delete(vec![key(Kind::DestinationRule, "a/r")])]);
    mesh.apply(vec![Command::PutMesh { config: json!({"trustDomain": "td"}) }]);
    let told: Vec<_> = mesh.snapshot.history().entries().map(|e| (e.revision.0, e.summary())).collect();
    let expect = [
        (1, "+DestinationRule/a/r"),
        (3, "~DestinationRule/a/r +DestinationRule/a/s"),
        (4, "-DestinationRule/a/r"),
        (5, "+MeshConfig"),
    ];
    assert_eq!(told, expect.map(|(r, s)| (r, s.to_owned())));
    let third = mesh.state.history().entry(Revision(3)).unwrap();
    assert_eq!((third.time_ms, third.author.as_str()), (52_007, "test"));
    let specs = |v: &Option<history::Value>| {
        serde_json::to_value(v.as_ref().unwrap()).unwrap().pointer("/spec/host").unwrap().clone()
    };
    assert_eq!((specs(&third.changes[0].before), specs(&third.changes[0].after)), (json!("x"), json!("y")));
    assert_eq!(mesh.snapshot.trust_domain(), "td");

    let (changes, _) = mesh.apply(vec![Command::SetHistoryLimit { entries: 2 }]);
    let removed = mesh.state.writes(&changes).into_iter().filter(|(_, value)| value.is_none()).count();
    assert_eq!(removed, 2, "what is forgotten is removed from the store");
    let kept: Vec<_> = mesh.state.history().entries().map(|e| e.revision.0).collect();
    assert_eq!(kept, [4, 5]);
}

fn golden() -> Batch {
    let mut labelled = object(
        Kind::VirtualService,
        "shop/reviews",
        json!({"hosts": ["reviews"], "http": [{"route": [{"destination": {"host": "reviews"}}], "fault":
            {"delay": {"percentage": {"value": 0.1}, "fixedDelay": "5s"}}}]}),
    );
    labelled.api_version = "networking.istio.io/v1beta1".into();
    labelled.labels = support::labels("app=reviews");
    labelled.annotations = support::labels("note=hello");
    let mut full = service("reviews.shop.svc.cluster.local", "shop", SourceId::Kubernetes("k".into()));
    full.addresses = vec!["10.9.0.1".into()];
    full.export_to = vec![".".into()];
    full.subject_alt_names = vec!["spiffe://a".into()];
    full.labels = support::labels("a=b");
    full.created = 1_700_000_000;
    let mut other = endpoint("10.0.0.1");
    other.ports = [("http".to_owned(), 9080)].into();
    other.locality = registry::model::service::Locality::parse("r/z/s");
    other.labels = support::labels("version=v1");
    other.service_account = "sa".into();
    other.tls_mode = TlsMode::Istio;
    other.health = Health::Draining;
    let mut workload = registration("shop/vm-1", "10.0.0.9", "app=vm", "s-1");
    workload.ports = [("http".to_owned(), 8080)].into();
    workload.annotations = support::labels("x=y");
    workload.group = "vm".into();
    workload.weight = 5;
    let source = SourceId::Consul("c/dc1".into());
    Batch {
        time_ms: 1_763_683_200_123,
        author: "admin".into(),
        commands: vec![
            Command::Change {
                puts: vec![Put { object: Arc::new(labelled), expected: Some(Revision(7)) }],
                deletes: vec![Delete { key: key(Kind::Gateway, "shop/gw"), expected: None }],
            },
            Command::PutService { service: Arc::new(full) },
            Command::RemoveService { host: "old.example.com".into(), source: SourceId::File("f".into()) },
            Command::ReplaceEndpoints { host: "reviews".into(), source, endpoints: vec![other] },
            Command::RegisterWorkload { registration: Arc::new(workload) },
            Command::WorkloadHealth {
                key: workload_key("shop/vm-1"),
                session: "s-1".into(),
                healthy: false,
                reason: String::new(),
            },
            Command::RemoveWorkload { key: workload_key("shop/vm-1"), session: "s-1".into() },
            Command::PutMesh { config: json!({"enableAutoMtls": true}) },
            Command::SetHistoryLimit { entries: 10 },
        ],
    }
}

/// The recorded bytes must decode for ever; never write this file anew for a form that was released.
#[test]
fn entries_of_version_1_decode_for_ever() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/state/log-v1.json");
    if std::env::vars_os().any(|(name, _)| name == "UPDATE") {
        std::fs::write(&path, StoredCommand::encode(&golden())).unwrap();
    }
    let recorded = std::fs::read(&path).unwrap();
    assert_eq!(StoredCommand::decode(&recorded).unwrap(), golden());
    assert_eq!(StoredCommand::encode(&golden()), recorded, "today's form is the recorded one");
}

/// A state with something of everything.
fn golden_state() -> State {
    let mut mesh =
        Mesh { seconds: 1_763_683_200, ..Mesh::default() }.with(vec![entry("shop/se", &["vm.example.com"])]);
    for command in golden().commands {
        if !matches!(command, Command::RemoveWorkload { .. }) {
            mesh.apply(vec![command]);
        }
    }
    let mut changed = rule("shop/r", "x");
    mesh.apply(vec![put(vec![changed.clone()])]);
    changed.raw = json!({"host": "y"});
    mesh.apply(vec![put(vec![changed])]);
    mesh.state
}

/// As above, for the state: what a member stored before an upgrade it reads after.
#[test]
fn a_state_of_version_1_decodes_for_ever() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/state/state-v1.bin");
    if std::env::vars_os().any(|(name, _)| name == "UPDATE") {
        std::fs::write(&path, golden_state().encode()).unwrap();
    }
    let recorded = std::fs::read(&path).unwrap();
    let state = State::decode(&recorded).unwrap();
    assert_eq!(state.objects().count(), 2, "the VirtualService expected a revision that never was");
    assert_eq!((state.workloads().count(), state.services().count(), state.endpoints().count()), (1, 1, 1));
    assert_eq!(state.history().entries().count(), 4);
    assert_eq!(state.encode(), recorded);
    assert_eq!(golden_state().encode(), recorded, "today's form is the recorded one");
}

#[test]
fn what_a_newer_program_stored_stops_this_one() {
    let newer = br#"{"version":2,"anything":[]}"#;
    assert!(matches!(StoredCommand::decode(newer), Err(DecodeError::Version { found: 2, newest: 1 })));
    let kind = br#"{"version":1,"time_ms":0,"commands":[{"change":{"deletes":[{"kind":"New","namespace":"a","name":"b"}]}}]}"#;
    assert!(matches!(StoredCommand::decode(kind), Err(DecodeError::Kind { found }) if found == "New"));
    let command = br#"{"version":1,"time_ms":0,"commands":[{"frobnicate":{}}]}"#;
    assert!(matches!(StoredCommand::decode(command), Err(DecodeError::Malformed(_))));

    let mut state = State::default().encode();
    state[7] = 2;
    assert!(matches!(State::decode(&state), Err(DecodeError::Version { found: 2, .. })));
    assert!(matches!(State::from_pairs([(b"meta", b"\x02{}")]), Err(DecodeError::Version { found: 2, .. })));
    assert!(matches!(State::from_pairs([(b"other", b"\x01{}")]), Err(DecodeError::Key { .. })));
}

#[test]
fn identities_are_of_the_domain_that_the_authority_issues() {
    let state = State::default();
    let domain = ca::identity::TrustDomain::parse("mesh.example").unwrap();
    let snapshot = Arc::new(Snapshot::build_issued(&domain, &state));
    assert_eq!(snapshot.trust_domain(), "mesh.example");
    let mut changed = registry::state::Changes::default();
    changed.mesh = true;
    assert_eq!(Snapshot::next(&snapshot, &state, &changed).trust_domain(), "mesh.example");
    assert_eq!(Snapshot::build(&state).trust_domain(), "cluster.local");
}

#[test]
fn a_lost_agent_takes_its_workload_out_and_one_that_is_held_does_not() {
    let mut mesh = Mesh::default().with(vec![entry("a/one", &["x.com"])]);
    let registration = Arc::new(registration("a/w", "10.0.0.1", "app=p", "s1"));
    mesh.apply(vec![Command::RegisterWorkload { registration }]);
    let presence = |presence| {
        vec![Command::WorkloadPresence { key: workload_key("a/w"), session: "s1".into(), presence }]
    };
    let healths = |mesh: &Mesh| mesh.snapshot.endpoints("x.com")[0].health;
    for (next, pushed, health) in [
        (Presence::Unknown, false, Health::Healthy),
        (Presence::Silent, true, Health::Unhealthy),
        (Presence::Unknown, true, Health::Healthy),
        (Presence::Released, true, Health::Unhealthy),
    ] {
        let (changes, _) = mesh.apply(presence(next));
        assert_eq!((changes.hosts.contains("x.com"), healths(&mesh)), (pushed, health), "{next:?}");
        assert!(mesh.apply(presence(next)).0.is_empty(), "{next:?} again");
    }
    let old = Command::WorkloadPresence {
        key: workload_key("a/w"),
        session: "s0".into(),
        presence: Presence::Heard,
    };
    assert_eq!(mesh.apply(vec![old]).1.commands, [CommandOutcome::Fenced]);
    let heard = Command::WorkloadHealth {
        key: workload_key("a/w"),
        session: "s1".into(),
        healthy: true,
        reason: String::new(),
    };
    mesh.apply(vec![heard]);
    assert_eq!(healths(&mesh), Health::Healthy);
    let registered = mesh.state.workload(&workload_key("a/w")).unwrap();
    assert_eq!((registered.presence, registered.lost_ms), (Presence::Heard, 0));
}
