//! A backup of one cluster is the beginning of another.

use std::io::{Read as _, Write as _};
use std::path::Path;

use ca::identity::TrustDomain;
use istiod::backup::{Cost, Manifest, Opener, Sealer, Secret, header, restorable};
use istiod::raft::part::Part as _;
use istiod::raft::restore::{RestoreError, Target, restore};
use istiod::raft::{Command, View};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::mesh::{ROUTE, batch, end, origin, registration, start};

fn target<'a>(data_dir: &'a Path, trust_domain: &'a TrustDomain, force: bool) -> Target<'a> {
    Target { data_dir, id: 1, trust_domain, force }
}

fn secret() -> Secret {
    Secret::passphrase(Zeroizing::new("correct horse".to_owned())).expect("is long enough")
}

fn sealed(view: &View) -> Vec<u8> {
    let cost = Cost { memory_kib: 8, passes: 1, lanes: 1 };
    let mut sealer = Sealer::new(Vec::new(), &secret(), cost, [9; 32]).expect("begins");
    Manifest::new(view.revision.0, "cluster.local", 7, None).write(&mut sealer).expect("writes");
    sealer.write_all(&view.encode()).expect("writes");
    sealer.finish().expect("ends")
}

fn opened(mut file: &[u8]) -> (Manifest, Vec<u8>) {
    let header = header(&mut file).expect("has a header");
    let mut opener = Opener::new(file, header, &secret()).expect("opens");
    let manifest = Manifest::read(&mut opener).expect("has a manifest");
    let mut state = Vec::new();
    opener.read_to_end(&mut state).expect("reads to the end");
    (manifest, state)
}

#[tokio::test]
async fn a_restored_cluster_has_the_same_state_and_goes_on_after_it() {
    let (old, new) =
        (tempfile::tempdir().expect("makes a folder"), tempfile::tempdir().expect("makes a folder"));
    let stop = CancellationToken::new();
    let started = start(old.path(), &stop).expect("starts");
    for number in 0..30 {
        let text = ROUTE.replace("name: reviews", &format!("name: r{}", number % 9));
        let command = Command::Registry(batch(&text, 1_800_000_000_000 + number));
        started.raft.propose_as(&command, &origin(number)).await.expect("commits");
    }
    started.raft.propose(&Command::Registry(registration("vm-1"))).await.expect("commits");
    let view = started.raft.view().await.expect("views");
    let file = sealed(&view);
    end(started, stop).await;

    let (manifest, bytes) = opened(&file);
    assert_eq!(manifest.revision, view.revision.0);
    let state = restorable(manifest.revision, &bytes).expect("is a state");
    let domain = TrustDomain::default();
    let empty = target(new.path(), &domain, false);
    assert_eq!(restore(empty, &state, &mut fastrand::Rng::new()).expect("restores"), None);
    let again = restore(empty, &state, &mut fastrand::Rng::new());
    assert!(matches!(again, Err(RestoreError::NotEmpty { .. })), "{again:?}");

    for forced in [false, true] {
        if forced {
            let moved = restore(target(new.path(), &domain, true), &state, &mut fastrand::Rng::new());
            assert!(moved.expect("restores").expect("moves the old data aside").exists());
        }
        let stop = CancellationToken::new();
        let started = start(new.path(), &stop).expect("starts");
        started.raft.read_index().await.expect("reads");
        let restored = started.raft.view().await.expect("views");
        assert_eq!(restored.registry.encode(), view.registry.encode());
        assert_eq!(restored.ca.encode(), view.ca.encode());
        assert_eq!(restored.access.pairs(), view.access.pairs());
        assert_eq!(restored.audit.pairs(), view.audit.pairs());
        let (revision, _) =
            started.raft.propose_as(&Command::Registry(batch(ROUTE, 5)), &origin(5)).await.expect("commits");
        assert!(revision > view.revision, "revisions go on where the backup ended");
        let trail = started.raft.view().await.expect("views").audit;
        let head = istiod::audit::verify(&trail.anchor(), trail.entries().map(AsRef::as_ref));
        assert_eq!(head, Ok(trail.head()), "the chain goes on");
        end(started, stop).await;
    }
}

#[test]
fn a_state_that_is_none_is_not_restored() {
    assert!(restorable(5, b"nonsense").is_err());
}
