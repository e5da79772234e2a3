use std::sync::Mutex;
use std::time::SystemTime;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Code;
use tonic::transport::{Channel, Server};

use super::pb::istio_certificate_service_client::IstioCertificateServiceClient as Client;
use super::*;
use crate::authn::{Secret, TokenBinding};
use crate::client::{CertificateSource, Issuance as _, Presented, Remote, RequestError, bootstrap_tls};
use crate::fixtures::{Ca, HOUR, ca, domain, now, reviews};
use crate::identity::SpiffeId;
use crate::keystore::KeyStore;
use crate::node::Revocation;
use crate::state::{CaCommand, CaOutcome, CaState, TokenRecord};
use crate::svid::{Identity, PrivateKey};
use crate::tls::accept::incoming;
use crate::tls::{self, ClientAuth, ExpectedIdentities, ServerContext};

/// The control plane as far as the service sees it.
struct OneMember {
    authority: Arc<Authority>,
    state: Mutex<CaState>,
    clock: Clock,
}

impl Backend for OneMember {
    async fn redeem(
        &self,
        token: PresentedToken,
        key_hash: Hash,
        from: Option<IpAddr>,
    ) -> Result<Caller, RedeemError> {
        self.state.lock().unwrap().check_redeem(&token, key_hash, from, (self.clock)())?;
        let command = CaCommand::redeem(&token, key_hash, (self.clock)());
        match self.state.lock().unwrap().apply(command).outcome {
            CaOutcome::Redeemed { namespace, service_account, .. } => {
                let id = SpiffeId::workload(self.authority.trust_domain(), &namespace, &service_account);
                Ok(Caller::from_redeemed_token(id.map_err(TokenRefused::from)?, token.id))
            }
            CaOutcome::Refused(reason) => Err(reason.into()),
            CaOutcome::Changed | CaOutcome::Unchanged => Err(RedeemError::Unavailable("?".to_owned())),
        }
    }

    async fn admit(&self, caller: &Caller) -> Result<(), NotAdmitted> {
        let state = self.state.lock().unwrap();
        match caller.node().and_then(|node| state.revoked().get(&node)) {
            Some(revocation) => Err(NotAdmitted::Revoked(format!("revoked: {}", revocation.reason))),
            None => Ok(()),
        }
    }

    fn dormancy(&self) -> Duration {
        HOUR
    }

    fn authority(&self) -> Arc<Authority> {
        Arc::clone(&self.authority)
    }
}

struct Fixture {
    ca: Ca,
    backend: Arc<OneMember>,
    address: String,
    skew: Arc<Mutex<Duration>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

async fn start() -> Fixture {
    let ca = ca();
    let skew = Arc::new(Mutex::new(Duration::ZERO));
    let clock: Clock = {
        let skew = Arc::clone(&skew);
        Arc::new(move || now() + *skew.lock().unwrap())
    };
    let state = Mutex::new(CaState::default());
    let authority = Arc::clone(&ca.authority);
    let backend = Arc::new(OneMember { authority, state, clock: Arc::clone(&clock) });
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (_, own) = watch::channel(ca.control_plane());
    let config = tls::server_config_with_roots(own, ClientAuth::Optional, &[b"h2"]).unwrap();
    let connections = incoming(listener, ServerContext::from(config), &tasks, stop.clone());
    let service = CertificateService::new(Arc::clone(&backend), clock).into_server();
    let stopped = stop.clone().cancelled_owned();
    tasks.spawn(async move {
        let router = Server::builder().add_service(service);
        router.serve_with_incoming_shutdown(connections, stopped).await.unwrap();
    });
    Fixture { ca, backend, address, skew, tasks, stop }
}

impl Fixture {
    fn token(&self, uses: u32) -> JoinToken {
        self.token_for(uses, &[])
    }

    fn token_for(&self, uses: u32, cidrs: &[&str]) -> JoinToken {
        let binding = TokenBinding {
            namespace: "default".to_owned(),
            service_account: "reviews".to_owned(),
            trust_domain: domain(),
        };
        let root = Hash::of(&self.ca.root.roots()[0]);
        let token = JoinToken::generate(binding, vec![self.address.clone()], root).unwrap();
        let mut record = TokenRecord::of(&token, now() + Duration::from_secs(600), uses, "test");
        record.cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        self.backend.state.lock().unwrap().apply(CaCommand::AddJoinToken(record));
        token
    }

    async fn channel(&self, config: Arc<rustls::ClientConfig>) -> Channel {
        crate::client::connect(&self.address, config).await.unwrap()
    }

    async fn anonymous(&self) -> Client<Channel> {
        let root = Hash::of(&self.ca.root.roots()[0]);
        Client::new(self.channel(bootstrap_tls(root, &domain()).unwrap()).await)
    }

    async fn with_certificate(&self, identity: Arc<Identity>) -> Client<Channel> {
        let (_, source) = watch::channel(identity);
        let expected = ExpectedIdentities::one(SpiffeId::control_plane(&domain()));
        Client::new(self.channel(tls::client_config(source, expected, &[b"h2"]).unwrap()).await)
    }

    async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

fn request(csr: &str, bearer: Option<&str>) -> Request<IstioCertificateRequest> {
    let mut request =
        Request::new(IstioCertificateRequest { csr: csr.to_owned(), validity_duration: 0, metadata: None });
    if let Some(bearer) = bearer {
        request.metadata_mut().insert("authorization", format!("Bearer {bearer}").parse().unwrap());
    }
    request
}

fn csr() -> String {
    PrivateKey::generate().unwrap().request().unwrap().pem().unwrap()
}

#[track_caller]
fn code<T>(result: Result<T, Status>) -> Code {
    result.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test]
async fn a_token_gives_a_certificate_that_renews_itself() {
    let fixture = start().await;
    let token = fixture.token(1);
    let mut remote = Remote::with_token(token);
    let key = PrivateKey::generate().unwrap();
    let csr = key.request().unwrap();
    let chain = remote.request(csr.der(), &Presented::Initial, Some(HOUR)).await.unwrap();
    let first = Arc::new(Identity::new(chain, key, now()).unwrap());
    assert_eq!(first.spiffe_id, reviews());
    assert!(first.not_after <= now() + HOUR);
    let key = PrivateKey::generate().unwrap();
    let csr = key.request().unwrap();
    let mut remote = Remote::renew_only(vec![fixture.address.clone()]);
    let chain = remote.request(csr.der(), &Presented::Certificate(first), None).await.unwrap();
    assert_eq!(Identity::new(chain, key, now()).unwrap().spiffe_id, reviews());
    fixture.end().await;
}

#[tokio::test]
async fn a_token_is_redeemed_from_its_addresses_alone() {
    let fixture = start().await;
    let mut client = fixture.anonymous().await;
    let elsewhere = fixture.token_for(1, &["10.0.0.0/8", "::1/128"]).to_text();
    let refused = client.create_certificate(request(&csr(), Some(&elsewhere))).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("that call from 127.0.0.1"), "{refused}");
    let here = fixture.token_for(1, &["10.0.0.0/8", "127.0.0.1/32"]).to_text();
    assert_eq!(code(client.create_certificate(request(&csr(), Some(&here))).await), Code::Ok);
    fixture.end().await;
}

#[tokio::test]
async fn a_token_serves_one_key_however_often_it_asks() {
    let fixture = start().await;
    let token = fixture.token(1).to_text();
    let mut client = fixture.anonymous().await;
    let first = csr();
    assert_eq!(code(client.create_certificate(request(&first, Some(&token))).await), Code::Ok);
    assert_eq!(code(client.create_certificate(request(&first, Some(&token))).await), Code::Ok);
    assert_eq!(code(client.create_certificate(request(&csr(), Some(&token))).await), Code::PermissionDenied);
    fixture.end().await;
}

#[tokio::test]
async fn callers_without_a_good_credential_get_clear_codes() {
    let fixture = start().await;
    let mut client = fixture.anonymous().await;
    assert_eq!(code(client.create_certificate(request(&csr(), None)).await), Code::Unauthenticated);
    assert_eq!(code(client.create_certificate(request(&csr(), Some("ey.a.b"))).await), Code::Unauthenticated);
    let damaged = "istio-join.v1.xx";
    assert_eq!(code(client.create_certificate(request(&csr(), Some(damaged))).await), Code::Unauthenticated);
    let mut wrong = fixture.token(1);
    wrong.secret = Secret::random().unwrap();
    let result = client.create_certificate(request(&csr(), Some(&wrong.to_text()))).await;
    assert_eq!(code(result), Code::Unauthenticated);
    let token = fixture.token(1);
    *fixture.skew.lock().unwrap() = Duration::from_secs(601);
    let result = client.create_certificate(request(&csr(), Some(&token.to_text()))).await;
    assert_eq!(code(result), Code::PermissionDenied);
    fixture.end().await;
}

#[tokio::test]
async fn a_malformed_request_does_not_use_the_token_up() {
    let fixture = start().await;
    let token = fixture.token(1).to_text();
    let mut client = fixture.anonymous().await;
    for bad in ["", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
        let result = client.create_certificate(request(bad, Some(&token))).await;
        assert_eq!(code(result), Code::InvalidArgument);
    }
    let huge = "x".repeat(MAX_REQUEST + 1);
    let result = client.create_certificate(request(&huge, Some(&token))).await;
    assert_eq!(code(result), Code::OutOfRange);
    assert_eq!(code(client.create_certificate(request(&csr(), Some(&token))).await), Code::Ok);
    fixture.end().await;
}

/// A request that asks for these names.
fn csr_for(names: &[&str]) -> String {
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names =
        names.iter().map(|name| rcgen::SanType::URI((*name).try_into().unwrap())).collect();
    params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

#[tokio::test]
async fn a_request_for_the_name_of_another_is_told_so_and_does_not_use_the_token_up() {
    let fixture = start().await;
    let token = fixture.token(1).to_text();
    let mut client = fixture.anonymous().await;
    let foreign = csr_for(&["spiffe://cluster.local/ns/default/sa/ratings"]);
    let refused = client.create_certificate(request(&foreign, Some(&token))).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let told = "asks for names that are not `spiffe://cluster.local/ns/default/sa/reviews`'s: \
                URI:spiffe://cluster.local/ns/default/sa/ratings";
    assert!(refused.message().contains(told), "{refused}");
    // Who changes what the token says only loses the token.
    let mut changed = JoinToken::parse(&token).unwrap();
    changed.service_account = "ratings".to_owned();
    let refused = client.create_certificate(request(&foreign, Some(&changed.to_text()))).await.unwrap_err();
    assert!(refused.message().contains(told), "{refused}");
    let own = csr_for(&[reviews().as_str()]);
    let other = fixture.token(1).to_text();
    assert_eq!(code(client.create_certificate(request(&own, Some(&other))).await), Code::Ok);
    fixture.end().await;
}

#[tokio::test]
async fn a_machine_comes_back_with_its_key_until_it_is_revoked_or_too_late() {
    let fixture = start().await;
    let old = fixture.ca.issue_at(&reviews(), now() - HOUR / 2, HOUR / 4);
    let node = x509::Facts::parse(&old.chain[0]).unwrap().node().unwrap();
    let mut remote = Remote::renew_only(vec![fixture.address.clone()]);
    let request = old.key.request().unwrap();
    let back = Presented::Ended(Arc::clone(&old));
    let chain = remote.request(request.der(), &back, None).await.unwrap();
    assert_eq!(x509::Facts::parse(&chain.leaf).unwrap().node(), Some(node), "it stays the same node");
    Identity::new(chain, old.key.clone(), now()).unwrap();

    let other = PrivateKey::generate().unwrap().request().unwrap();
    let stolen = remote.request(other.der(), &back, None).await.unwrap_err().to_string();
    assert!(stolen.contains("not signed by the key of the certificate"), "{stolen}");
    *fixture.skew.lock().unwrap() = HOUR;
    let late = remote.request(request.der(), &back, None).await.unwrap_err().to_string();
    assert!(late.contains("a machine may come back within 60 minutes; make a token"), "{late}");
    *fixture.skew.lock().unwrap() = Duration::ZERO;
    let revocation = Revocation {
        node,
        namespace: String::new(),
        service_account: String::new(),
        at: 0,
        by: String::new(),
        reason: "stolen".to_owned(),
        until: u64::MAX,
    };
    fixture.backend.state.lock().unwrap().apply(CaCommand::RevokeNode(revocation));
    let revoked = remote.request(request.der(), &back, None).await.unwrap_err();
    assert!(matches!(&revoked, RequestError::Refused(why) if why.contains("revoked: stolen")), "{revoked}");
    fixture.end().await;
}

#[tokio::test]
async fn a_connection_that_outlives_its_certificate_gets_no_other() {
    let fixture = start().await;
    let identity = fixture.ca.issue_at(&reviews(), now(), HOUR);
    let mut client = fixture.with_certificate(identity).await;
    assert_eq!(code(client.create_certificate(request(&csr(), None)).await), Code::Ok);
    *fixture.skew.lock().unwrap() = HOUR * 2;
    assert_eq!(code(client.create_certificate(request(&csr(), None)).await), Code::Unauthenticated);
    fixture.end().await;
}

#[tokio::test]
async fn nobody_gets_the_control_planes_identity_over_the_wire() {
    let fixture = start().await;
    let mut client = fixture.with_certificate(fixture.ca.control_plane()).await;
    assert_eq!(code(client.create_certificate(request(&csr(), None)).await), Code::PermissionDenied);
    fixture.end().await;
}

#[tokio::test]
async fn a_connection_that_fails_names_the_address_and_the_cause() {
    let fixture = start().await;
    let tls = bootstrap_tls(Hash::of(b"another root"), &domain()).unwrap();
    let text = crate::client::connect(&fixture.address, tls).await.unwrap_err().to_string();
    assert!(text.starts_with(&fixture.address) && text.contains("expected fingerprint"), "{text}");
    // Who joins does not try again: that is not the control plane which made the token.
    let mut token = fixture.token(1);
    token.root_sha256 = Hash::of(b"another root");
    let csr = PrivateKey::generate().unwrap().request().unwrap();
    let refused = Remote::with_token(token).request(csr.der(), &Presented::Initial, None).await.unwrap_err();
    assert!(matches!(refused, RequestError::Refused(_)), "{refused}");
    fixture.end().await;
}

#[tokio::test]
async fn bytes_that_are_no_tls_end_only_their_connection() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let fixture = start().await;
    let mut socket = TcpStream::connect(&fixture.address).await.unwrap();
    socket.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // the server may answer with an alert, or reset; in both cases the connection ends
    drop(socket.read_to_end(&mut answer).await);
    let token = fixture.token(1).to_text();
    let mut client = fixture.anonymous().await;
    assert_eq!(code(client.create_certificate(request(&csr(), Some(&token))).await), Code::Ok);
    fixture.end().await;
}

fn source(
    fixture: &Fixture,
    remote: Remote,
    store: KeyStore,
    lifetime: Duration,
) -> CertificateSource<Remote> {
    let skew = Arc::clone(&fixture.skew);
    let clock: Clock = Arc::new(move || -> SystemTime { now() + *skew.lock().unwrap() });
    CertificateSource {
        issuance: remote,
        clock,
        store: Some(store),
        lifetime: Some(lifetime),
        expected: Some(reviews()),
        rng: fastrand::Rng::with_seed(1),
    }
}

#[tokio::test]
async fn a_joined_workload_renews_over_the_wire_with_its_certificate() {
    let fixture = start().await;
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::open(dir.path()).unwrap();
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    // the token serves one key only: the second key is certified because of the first certificate
    let joined = source(&fixture, Remote::with_token(fixture.token(1)), store, Duration::from_secs(6));
    let mut identities = joined.start(&tasks, stop.clone()).await.unwrap();
    let first = Arc::clone(&identities.borrow());
    let renewed = identities.wait_for(|identity| !Arc::ptr_eq(identity, &first));
    let renewed = Arc::clone(&tokio::time::timeout(Duration::from_secs(20), renewed).await.unwrap().unwrap());
    assert_ne!(renewed.key, first.key, "each certificate has a key of its own");
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    fixture.end().await;
}

#[tokio::test]
async fn a_restarted_workload_needs_its_token_no_more() {
    let fixture = start().await;
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::open(dir.path()).unwrap();
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let token = fixture.token(1);
    let joined = source(&fixture, Remote::with_token(token.clone()), store.clone(), HOUR);
    let first = joined.start(&tasks, stop.clone()).await.unwrap();
    let again = source(&fixture, Remote::renew_only(vec![fixture.address.clone()]), store, HOUR);
    let second = again.start(&tasks, stop.clone()).await.unwrap();
    assert_eq!(first.borrow().chain, second.borrow().chain);
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    // whoever copies the token later has no use of it
    let mut stranger = Remote::with_token(token);
    let csr = PrivateKey::generate().unwrap().request().unwrap();
    let result = stranger.request(csr.der(), &Presented::Initial, None).await;
    assert!(matches!(result, Err(RequestError::Refused(_))));
    fixture.end().await;
}
