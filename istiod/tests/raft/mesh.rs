//! The mesh as the log drives it: what istiod sees of a member.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ca::authn::{Hash, JoinToken, Secret};
use ca::identity::TrustDomain;
use ca::node::Revocation;
use ca::state::{CaCommand, CaOutcome, RedeemRefused, TokenRecord};
use istiod::raft::metrics::Metrics;
use istiod::raft::node::Settings;
use istiod::raft::part::Part as _;
use istiod::raft::{Command, Origin, Outcome, Place, Raft, StartError, Started, View};
use prometheus_client::registry::Registry;
use registry::state::{Batch, Command as Change, Presence, Registration, Revision};
use tokio_util::sync::CancellationToken;

use crate::toy::now;

pub(crate) const ROUTE: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews]
  http: [{route: [{destination: {host: reviews, subset: v1}}]}]
";

pub(crate) fn start(dir: &Path, stop: &CancellationToken) -> Result<Started, StartError> {
    let settings = Settings { snapshot_entries: 20, keep_entries: 5, ..Settings::new(1, 1) };
    let mut metrics = Registry::default();
    let metrics = Metrics::registered(&mut metrics);
    Raft::start(
        Place { data_dir: dir, trust_domain: &TrustDomain::default() },
        settings,
        metrics,
        &mut fastrand::Rng::new(),
        now(),
        stop.clone(),
    )
}

pub(crate) fn batch(text: &str, time_ms: i64) -> Batch {
    let (objects, _) = registry::config::parse("test.yaml", text).expect("parses");
    Batch::put_objects(time_ms, "admin", objects)
}

pub(crate) fn registration(name: &str) -> Batch {
    let registration = Registration {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        address: "10.0.0.9".to_owned(),
        ports: [("http".to_owned(), 8080)].into(),
        labels: [("app".to_owned(), "pay".to_owned())].into(),
        annotations: [].into(),
        network: String::new(),
        locality: registry::model::service::Locality::default(),
        weight: 1,
        service_account: "pay".to_owned(),
        cluster: "default".to_owned(),
        group: String::new(),
        instance: name.to_owned(),
        session: "1".to_owned(),
        lease_ms: 30_000,
        healthy: false,
        presence: Presence::Heard,
        lost_ms: 0,
        reason: String::new(),
    };
    let commands = vec![Change::RegisterWorkload { registration: registration.into() }];
    Batch { time_ms: 1_800_000_000_000, author: "agent".to_owned(), commands }
}

fn token() -> JoinToken {
    JoinToken {
        id: "t1".to_owned(),
        secret: Secret::random().expect("draws"),
        endpoints: Vec::new(),
        root_sha256: Hash::of(b"root"),
        namespace: "shop".to_owned(),
        service_account: "pay".to_owned(),
        trust_domain: TrustDomain::default(),
    }
}

fn time() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

pub(crate) async fn end(started: Started, stop: CancellationToken) {
    stop.cancel();
    started.thread.join().await.expect("stops");
}

#[tokio::test]
async fn objects_keep_their_revisions_over_a_restart_and_readers_see_them_first() {
    let dir = tempfile::tempdir().expect("makes a folder");
    let stop = CancellationToken::new();
    let mut started = start(dir.path(), &stop).expect("starts");
    let raft = started.raft.clone();
    let command = Command::Registry(batch(ROUTE, 1_800_000_000_000));
    let (revision, outcome) = raft.propose(&command).await.expect("commits");
    assert_eq!(started.snapshots.borrow().revision(), revision, "published before it is answered");
    let Outcome::Registry(outcome) = outcome else { panic!("{outcome:?}") };
    assert!(outcome.conflict().is_none());
    assert_eq!(raft.read_index().await.expect("reads"), revision);
    let update = started.updates.next().await.expect("goes on");
    assert!(update.changes.mesh, "the first update says that everything is new");
    raft.applied(revision).await.expect("is applied");
    // The same again makes a revision, but no change.
    let (again, _) = raft.propose(&command).await.expect("commits");
    assert_eq!(again, Revision(revision.0 + 1));
    for number in 0..50 {
        let text = ROUTE.replace("name: reviews", &format!("name: r{}", number % 9));
        raft.propose(&Command::Registry(batch(&text, 1_800_000_000_000 + number))).await.expect("commits");
    }
    let before = raft.view().await.expect("views");
    assert_eq!(before.registry.objects().count(), 10);
    let first =
        before.registry.objects().find(|(key, _)| key.name == "reviews").expect("is there").1.revision;
    assert_eq!(first, revision.0);
    let busy = start(dir.path(), &stop);
    assert!(matches!(busy, Err(StartError::InUse { .. })), "two members on one folder");
    end(started, stop).await;

    let stop = CancellationToken::new();
    let started = start(dir.path(), &stop).expect("starts again");
    let raft = started.raft.clone();
    let covered = raft.read_index().await.expect("reads");
    assert!(covered > before.revision, "the new term has an entry of its own");
    let after = raft.view().await.expect("views");
    assert_eq!(after.registry.encode(), before.registry.encode());
    assert_eq!(after.ca, before.ca);
    assert_eq!(started.snapshots.borrow().revision(), before.registry.revision());
    end(started, stop).await;
}

#[tokio::test]
async fn the_state_is_built_from_snapshot_and_log_when_the_store_is_lost_or_damaged() {
    let dir = tempfile::tempdir().expect("makes a folder");
    let stop = CancellationToken::new();
    let started = start(dir.path(), &stop).expect("starts");
    for number in 0..70 {
        let text = ROUTE.replace("name: reviews", &format!("name: r{}", number % 9));
        let command = Command::Registry(batch(&text, 1_800_000_000_000 + number));
        started.raft.propose(&command).await.expect("commits");
    }
    let before = started.raft.view().await.expect("views");
    end(started, stop).await;
    let store = dir.path().join("raft/db");
    for damage in ["lost", "damaged"] {
        match damage {
            "lost" => std::fs::remove_dir_all(&store).expect("removes"),
            _ => std::fs::write(store.join("db"), vec![0x5A; 100_000]).expect("writes"),
        }
        let stop = CancellationToken::new();
        let started = start(dir.path(), &stop).expect("starts again");
        started.raft.read_index().await.expect("reads");
        let after = started.raft.view().await.expect("views");
        assert_eq!(after.registry.encode(), before.registry.encode(), "{damage}");
        end(started, stop).await;
    }
}

#[tokio::test]
async fn a_revocation_is_shown_before_it_is_answered_and_is_in_every_form_of_the_state() {
    let dir = tempfile::tempdir().expect("makes a folder");
    let stop = CancellationToken::new();
    let started = start(dir.path(), &stop).expect("starts");
    let raft = started.raft.clone();
    let revocation = Revocation {
        node: "3a7816bf8f01cfea".parse().expect("is a node"),
        namespace: "shop".to_owned(),
        service_account: "pay".to_owned(),
        at: 5,
        by: "admin".to_owned(),
        reason: "stolen".to_owned(),
        until: 4_000_000_000,
    };
    let older = raft.view().await.expect("views").encode();
    let command = Command::Ca(CaCommand::RevokeNode(revocation.clone()));
    assert_eq!((command.version(), Command::Ca(CaCommand::Prune { before: 1 }).version()), (3, 1));
    raft.propose(&command).await.expect("commits");
    assert_eq!(started.revoked.borrow().get(&revocation.node), Some(&revocation));
    let view = raft.view().await.expect("views");
    let snapshot = View::decode(view.revision.0, &view.encode()).expect("is a state");
    assert_eq!(snapshot.ca, view.ca);
    // What an older program reads has its version for as long as there is nothing that it does not know.
    assert_eq!((older.get(..2), view.encode().get(..2)), (Some(&[8, 1][..]), Some(&[8, 3][..])));
    end(started, stop).await;

    let stop = CancellationToken::new();
    let started = start(dir.path(), &stop).expect("starts again");
    started.raft.read_index().await.expect("reads");
    assert_eq!(started.revoked.borrow().get(&revocation.node), Some(&revocation));
    let later = Command::Ca(CaCommand::Prune { before: revocation.until + 1 });
    started.raft.propose(&later).await.expect("commits");
    assert!(started.revoked.borrow().is_empty());
    end(started, stop).await;
}

#[tokio::test]
async fn a_join_redeems_and_registers_in_one_command_or_does_neither() {
    let dir = tempfile::tempdir().expect("makes a folder");
    let stop = CancellationToken::new();
    let started = start(dir.path(), &stop).expect("starts");
    let raft = &started.raft;
    let token = token();
    let record = TokenRecord::of(&token, time() + Duration::from_secs(60), 1, "admin");
    raft.propose(&Command::Ca(CaCommand::AddJoinToken(record))).await.expect("commits");
    let presented = token.presented();
    let join = |key: u8, name: &str| Command::Join {
        redeem: CaCommand::redeem(&presented, Hash::of(&[key]), time()),
        register: registration(name),
    };
    let (revision, outcome) = raft.propose(&join(1, "vm-1")).await.expect("commits");
    let Outcome::Join { redeemed: CaOutcome::Redeemed { .. }, registered: Some(_) } = outcome else {
        panic!("{outcome:?}")
    };
    let (_, outcome) = raft.propose(&join(1, "vm-1")).await.expect("commits");
    assert!(matches!(outcome, Outcome::Join { registered: Some(_), .. }), "the same key may ask again");
    let (_, outcome) = raft.propose(&join(2, "vm-2")).await.expect("commits");
    let refused = Outcome::Join { redeemed: CaOutcome::Refused(RedeemRefused::UsedUp), registered: None };
    assert_eq!(outcome, refused);
    let view = raft.view().await.expect("views");
    assert_eq!(view.registry.workloads().count(), 1);
    assert!(view.revision > revision);
    end(started, stop).await;

    let stop = CancellationToken::new();
    let started = start(dir.path(), &stop).expect("starts again");
    started.raft.read_index().await.expect("reads");
    let after = started.raft.view().await.expect("views");
    assert_eq!((after.ca, after.registry.workloads().count()), (view.ca, 1));
    end(started, stop).await;
}

pub(crate) fn origin(at_ms: i64) -> Origin {
    let text = |text: &str| text.to_owned();
    Origin { who: text("ann"), from: text("127.0.0.1:40000"), at_ms, action: text("apply") }
}

#[tokio::test]
async fn the_audit_trail_tells_who_changed_what_and_verifies_after_a_restart() {
    let dir = tempfile::tempdir().expect("makes a folder");
    let stop = CancellationToken::new();
    let started = start(dir.path(), &stop).expect("starts");
    let raft = &started.raft;
    let put = Command::Registry(batch(ROUTE, 1_800_000_000_000));
    let (created, _) = raft.propose_as(&put, &origin(1)).await.expect("commits");
    let (again, _) = raft.propose_as(&put, &origin(2)).await.expect("commits");
    raft.propose(&Command::Registry(registration("vm-1"))).await.expect("commits");
    let record = TokenRecord::of(&token(), time() + Duration::from_secs(60), 1, "ann");
    let add = Command::Ca(CaCommand::AddJoinToken(record));
    let (token, _) = raft.propose_as(&add, &origin(3)).await.expect("commits");
    for number in 0..30 {
        // Enough for a snapshot file and a compacted log.
        let text = ROUTE.replace("name: reviews", &format!("name: r{number}"));
        raft.propose(&Command::Registry(batch(&text, 1_800_000_000_000))).await.expect("commits");
    }
    let before = raft.view().await.expect("views").audit.clone();
    end(started, stop).await;

    std::fs::remove_dir_all(dir.path().join("raft/db")).expect("removes");
    let stop = CancellationToken::new();
    let started = start(dir.path(), &stop).expect("starts again");
    started.raft.read_index().await.expect("reads");
    let view = started.raft.view().await.expect("views");
    assert_eq!(view.audit.pairs(), before.pairs());
    let entries: Vec<_> = view.audit.entries().cloned().collect();
    assert_eq!(entries.iter().map(|e| e.revision).collect::<Vec<_>>(), [created.0, again.0, token.0]);
    let names: Vec<Vec<_>> =
        entries.iter().map(|e| e.objects.iter().map(|o| o.what.as_str()).collect()).collect();
    assert_eq!(names, [vec!["VirtualService/default/reviews"], vec![], vec!["JoinToken/t1"]]);
    assert!(entries[0].objects[0].before.is_none() && entries[0].objects[0].after.is_some());
    let head = istiod::audit::verify(&view.audit.anchor(), entries.iter().map(AsRef::as_ref));
    assert_eq!(head, Ok(view.audit.head()));
    let again = View::decode(view.revision.0, &view.encode()).expect("decodes");
    assert_eq!(again.encode(), view.encode());
    end(started, stop).await;
}

/// What the log of an older version holds must decode for ever: these bytes were recorded and are never changed.
#[test]
fn recorded_commands_decode() {
    let recorded = [
        (&RECORDED_REVOKE[..20], None),
        (RECORDED_REVOKE, Some(Command::Ca(CaCommand::RevokeJoinToken { id: "abc".to_owned() }))),
        (
            RECORDED_EMPTY_BATCH,
            Some(Command::Registry(Batch { time_ms: 5, author: "a".to_owned(), commands: Vec::new() })),
        ),
    ];
    for (bytes, expect) in recorded {
        let found = Command::decode(7, &unhex(bytes)).ok();
        assert_eq!(found, expect, "{bytes}");
        if let Some(command) = expect {
            assert_eq!(
                command.encode().expect("encodes"),
                unhex(bytes),
                "what is written now is the same form"
            );
        }
    }
}

const RECORDED_REVOKE: &str = "08011a227b227265766f6b655f6a6f696e5f746f6b656e223a7b226964223a22616263227d7d";
const RECORDED_EMPTY_BATCH: &str = "080112347b2276657273696f6e223a312c2274696d655f6d73223a352c22617574686f72223a2261222c22636f6d6d616e6473223a5b5d7d";

#[test]
fn a_newer_command_halts_and_says_what_to_do() {
    let newer = unhex("08051200");
    let halt = Command::decode(9, &newer).expect_err("halts").to_string();
    assert!(halt.contains("entry 9") && halt.contains("upgrade this member"), "{halt}");
    let unknown_kind = unhex("0801");
    assert!(Command::decode(9, &unknown_kind).expect_err("halts").to_string().contains("unknown kind"));
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("is hexadecimal");
    (0..text.len()).step_by(2).map(byte).collect()
}
