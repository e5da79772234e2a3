use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::time::Instant;

use super::*;
use crate::authn::Caller;
use crate::fixtures::{Ca, HOUR, ca_at, domain, ratings, reviews, serial};

/// What the authority does with the next requests; when the list is empty it signs.
#[derive(Clone, Copy)]
enum Next {
    Sign,
    Fail,
    Refuse,
    /// Signs, but the answer is lost.
    Lose,
}

/// A request as the authority saw it.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    after: Duration,
    by_certificate: bool,
    ended: bool,
    key: Vec<u8>,
}

#[derive(Clone)]
struct Scripted {
    ca: Arc<Ca>,
    clock: Clock,
    began: SystemTime,
    script: Arc<Mutex<VecDeque<Next>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    identity: SpiffeId,
}

impl Issuance for Scripted {
    async fn request(
        &mut self,
        csr: &CertificateSigningRequestDer<'static>,
        presented: &Presented,
        lifetime: Option<Duration>,
    ) -> Result<Chain, RequestError> {
        let now = (self.clock)();
        let seen = Seen {
            after: now.duration_since(self.began).unwrap(),
            by_certificate: matches!(presented, Presented::Certificate(_)),
            ended: matches!(presented, Presented::Ended(_)),
            key: x509::csr_public_key(csr).unwrap(),
        };
        self.seen.lock().unwrap().push(seen);
        let next = self.script.lock().unwrap().pop_front().unwrap_or(Next::Sign);
        let caller = Caller::from_redeemed_token(self.identity.clone(), "t");
        let sign = || self.ca.authority.sign(csr, &caller, lifetime, now, serial()).unwrap();
        match next {
            Next::Sign => Ok(sign()),
            Next::Fail => Err(RequestError::Unavailable("no".to_owned())),
            Next::Refuse => Err(RequestError::Refused("never".to_owned())),
            Next::Lose => {
                sign();
                Err(RequestError::Unavailable("lost".to_owned()))
            }
        }
    }

    fn can_join(&self) -> bool {
        true
    }
}

struct Fixture {
    authority: Scripted,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Virtual time: the clock moves with tokio's paused one.
fn fixture(script: &[Next]) -> Fixture {
    let began = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let start = Instant::now();
    let clock: Clock = Arc::new(move || began + start.elapsed());
    let authority = Scripted {
        ca: Arc::new(ca_at(&domain(), began)),
        clock,
        began,
        script: Arc::new(Mutex::new(script.iter().copied().collect())),
        seen: Arc::default(),
        identity: reviews(),
    };
    Fixture { authority, tasks: TaskTracker::new(), stop: CancellationToken::new() }
}

impl Fixture {
    fn source(&self, store: Option<KeyStore>) -> CertificateSource<Scripted> {
        CertificateSource {
            issuance: self.authority.clone(),
            clock: Arc::clone(&self.authority.clock),
            store,
            lifetime: Some(HOUR),
            expected: Some(reviews()),
            rng: fastrand::Rng::with_seed(3),
        }
    }

    fn seen(&self) -> Vec<Seen> {
        self.authority.seen.lock().unwrap().clone()
    }

    async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn changed(identities: &mut IdentityWatch) -> Arc<Identity> {
    identities.changed().await.unwrap();
    Arc::clone(&identities.borrow_and_update())
}

#[tokio::test(start_paused = true)]
async fn renewed_at_half_life_with_the_certificate_and_a_new_key() {
    let fixture = fixture(&[]);
    let mut identities = fixture.source(None).start(&fixture.tasks, fixture.stop.clone()).await.unwrap();
    assert_eq!(identities.borrow().spiffe_id, reviews());
    for _ in 0..3 {
        changed(&mut identities).await;
    }
    let seen = fixture.seen();
    assert_eq!(seen.iter().map(|s| s.by_certificate).collect::<Vec<_>>(), [false, true, true, true]);
    for pair in seen.windows(2) {
        let share = (pair[1].after - pair[0].after).as_secs_f64() / HOUR.as_secs_f64();
        assert!((0.485..=0.515).contains(&share), "{share}");
        assert_ne!(pair[0].key, pair[1].key);
    }
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_asked_for_again_with_the_same_key() {
    let fixture = fixture(&[Next::Lose, Next::Fail, Next::Lose, Next::Sign]);
    let identities = fixture.source(None).start(&fixture.tasks, fixture.stop.clone()).await.unwrap();
    let seen = fixture.seen();
    assert_eq!(seen.len(), 4);
    assert!(seen.windows(2).all(|pair| pair[0].key == pair[1].key && pair[0].after < pair[1].after));
    drop(identities);
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_longer_than_the_certificate_ends_with_a_new_one() {
    let fixture = fixture(&[]);
    let mut identities = fixture.source(None).start(&fixture.tasks, fixture.stop.clone()).await.unwrap();
    fixture.authority.script.lock().unwrap().extend([Next::Fail; 400]);
    let renewed = changed(&mut identities).await;
    assert!(renewed.obtained_at > fixture.authority.began + HOUR);
    let seen = fixture.seen();
    assert!(seen.iter().any(|s| s.by_certificate) && !seen.last().unwrap().by_certificate);
    fixture.end().await;
}

/// What a machine does at its next start whose certificate has ended; the requests of before are not counted.
async fn comes_back(script: &[Next]) -> (Result<Arc<Identity>, SourceError>, Arc<Identity>, Vec<Seen>) {
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::open(dir.path()).unwrap();
    let fixture = fixture(&[]);
    let stop = CancellationToken::new();
    let first = fixture.source(Some(store.clone())).start(&fixture.tasks, stop.clone()).await.unwrap();
    let first = Arc::clone(&first.borrow());
    stop.cancel();
    tokio::time::sleep(HOUR * 30).await;
    fixture.authority.script.lock().unwrap().extend(script);
    let again = fixture.source(Some(store)).start(&fixture.tasks, fixture.stop.clone()).await;
    let seen = fixture.seen().split_off(1);
    fixture.end().await;
    (again.map(|identity| Arc::clone(&identity.borrow())), first, seen)
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_was_off_for_long_comes_back_with_its_key() {
    let (again, first, seen) = comes_back(&[Next::Fail, Next::Lose, Next::Sign]).await;
    let again = again.unwrap();
    assert_eq!(again.key, first.key, "the key proves who it is");
    assert_ne!(again.chain, first.chain);
    assert_eq!(seen.iter().map(|seen| seen.ended).collect::<Vec<_>>(), [true, true, true]);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_may_not_come_back_joins_again_with_a_new_key_if_it_has_a_token() {
    let (again, first, seen) = comes_back(&[Next::Refuse, Next::Sign]).await;
    assert_ne!(again.unwrap().key, first.key);
    assert_eq!(seen.iter().map(|seen| seen.ended).collect::<Vec<_>>(), [true, false]);
    let (again, _, seen) = comes_back(&[Next::Refuse, Next::Refuse]).await;
    assert!(matches!(again, Err(SourceError::Refused(_))));
    assert_eq!(seen.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_ends_joining_but_never_renewing() {
    let refused = fixture(&[Next::Fail, Next::Refuse]);
    let result = refused.source(None).start(&refused.tasks, refused.stop.clone()).await;
    let Err(SourceError::Refused(reason)) = result else { panic!("must be refused") };
    assert!(reason.contains("never"), "{reason}");
    assert_eq!(refused.seen().len(), 2);
    let renewing = fixture(&[Next::Sign, Next::Refuse, Next::Refuse, Next::Sign]);
    let mut identities = renewing.source(None).start(&renewing.tasks, renewing.stop.clone()).await.unwrap();
    changed(&mut identities).await;
    assert_eq!(renewing.seen().len(), 4);
    renewing.end().await;
}

#[tokio::test(start_paused = true)]
async fn somebody_elses_identity_is_not_accepted() {
    let mut fixture = fixture(&[]);
    fixture.authority.identity = ratings();
    let result = fixture.source(None).start(&fixture.tasks, fixture.stop.clone()).await;
    let Err(SourceError::Refused(reason)) = result else { panic!("must be refused") };
    assert!(reason.contains("sa/ratings"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn stopping_ends_the_wait_for_the_first_certificate() {
    let fixture = fixture(&[Next::Fail; 1000]);
    let stop = fixture.stop.clone();
    fixture.tasks.spawn(async move {
        tokio::time::sleep(Duration::from_secs(30)).await;
        stop.cancel();
    });
    let result = fixture.source(None).start(&fixture.tasks, fixture.stop.clone()).await;
    assert!(matches!(result, Err(SourceError::Stopped)));
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_uses_what_is_stored_and_asks_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::open(dir.path()).unwrap();
    let fixture = fixture(&[]);
    let stop = CancellationToken::new();
    let first = fixture.source(Some(store.clone())).start(&fixture.tasks, stop.clone()).await.unwrap();
    let first = Arc::clone(&first.borrow());
    stop.cancel();
    tokio::time::sleep(HOUR / 4).await;
    let again =
        fixture.source(Some(store.clone())).start(&fixture.tasks, fixture.stop.clone()).await.unwrap();
    assert_eq!(again.borrow().chain, first.chain);
    assert_eq!(again.borrow().key, first.key);
    assert_eq!(again.borrow().roots, first.roots);
    assert_eq!(fixture.seen().len(), 1);
    let mut again = again;
    let renewed = changed(&mut again).await;
    let share =
        renewed.obtained_at.duration_since(first.obtained_at).unwrap().as_secs_f64() / HOUR.as_secs_f64();
    assert!((0.485..=0.515).contains(&share), "half-life counts from when it was obtained: {share}");
    assert!(store.load(PENDING_KEY_FILE).unwrap().is_none());
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_before_the_answer_repeats_the_same_request() {
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::open(dir.path()).unwrap();
    let fixture = fixture(&[Next::Lose, Next::Refuse]);
    let result = fixture.source(Some(store.clone())).start(&fixture.tasks, fixture.stop.clone()).await;
    assert!(matches!(result, Err(SourceError::Refused(_))));
    fixture.source(Some(store)).start(&fixture.tasks, fixture.stop.clone()).await.unwrap();
    let seen = fixture.seen();
    assert_eq!(seen.len(), 3);
    assert_eq!(seen[0].key, seen[2].key);
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_stored_identity_of_somebody_else_or_damaged_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::open(dir.path()).unwrap();
    let fixture = fixture(&[]);
    let other = fixture.authority.ca.issue_at(&ratings(), fixture.authority.began, HOUR);
    store.store(IDENTITY_FILE, to_text(&other).as_bytes()).unwrap();
    let stop = CancellationToken::new();
    let identities = fixture.source(Some(store.clone())).start(&fixture.tasks, stop.clone()).await.unwrap();
    assert_eq!(identities.borrow().spiffe_id, reviews());
    stop.cancel();
    let text = store.load(IDENTITY_FILE).unwrap().unwrap();
    for cut in [0, 5, 20, 200, text.len() / 2, text.len() - 40] {
        store.store(IDENTITY_FILE, &text[..cut]).unwrap();
        let stop = CancellationToken::new();
        let identities =
            fixture.source(Some(store.clone())).start(&fixture.tasks, stop.clone()).await.unwrap();
        assert_eq!(identities.borrow().spiffe_id, reviews());
        stop.cancel();
    }
    assert_eq!(fixture.seen().len(), 7, "nothing that was stored could be used");
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_control_plane_gets_its_own_identity_in_process() {
    let fixture = fixture(&[]);
    let authority = Arc::clone(&fixture.authority.ca.authority);
    let source = CertificateSource {
        issuance: Local {
            authority: Box::new(move || Arc::clone(&authority)),
            dns_names: vec!["istiod.istio-system.svc".to_owned()],
            clock: Arc::clone(&fixture.authority.clock),
        },
        clock: Arc::clone(&fixture.authority.clock),
        store: None,
        lifetime: None,
        expected: Some(SpiffeId::control_plane(&domain())),
        rng: fastrand::Rng::with_seed(1),
    };
    let mut identities = source.start(&fixture.tasks, fixture.stop.clone()).await.unwrap();
    let first = Arc::clone(&identities.borrow());
    let renewed = changed(&mut identities).await;
    assert!(renewed.not_after > first.not_after);
    fixture.end().await;
}
