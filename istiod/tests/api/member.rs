//! A member's log and its admin API on a port of loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use ca::authority::{Lifetimes, Serial, SigningRoot};
use ca::identity::TrustDomain;
use ca::renewal::Clock;
use ca::tls::IdentityWatch;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use istiod::access::Role;
use istiod::api::events::Events;
use istiod::api::gate::{Access, Gate};
use istiod::api::limits::{Rate, Rates};
use istiod::api::types::{ApiTokenCreated, ApiTokenRequest};
use istiod::api::{Api, Caller};
use istiod::ports::serve_operators;
use istiod::raft::metrics::Metrics;
use istiod::raft::node::Settings;
use istiod::raft::{Place, Raft, RaftThread};
use prometheus_client::registry::Registry;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use xds::balance::Fleet;

/// A call that takes longer has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The operator's own token.
pub(crate) const ADMIN: &str = "the-operator";

/// What answered, and what it said.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{}: {e}: {text}", self.status))
    }
}

/// One member.
pub(crate) struct Member {
    pub(crate) address: SocketAddr,
    pub(crate) api: Api,
    _folder: TempDir,
    thread: RaftThread,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[expect(clippy::disallowed_methods, reason = "a test's one clock")]
fn clock() -> Clock {
    Arc::new(SystemTime::now)
}

/// More than a test can call.
pub(crate) const PLENTY: Rate = Rate { per_second: 1_000_000, burst: 1_000_000 };

/// How a member is started.
pub(crate) struct Start {
    pub(crate) access: Access,
    pub(crate) rates: Rates,
    pub(crate) identity: Option<IdentityWatch>,
    pub(crate) log: Settings,
}

impl Default for Start {
    fn default() -> Self {
        Self {
            access: Access::Bearer(ADMIN.into()),
            rates: Rates { calls: PLENTY, guesses: PLENTY },
            identity: None,
            log: Settings::new(1, 1),
        }
    }
}

impl Member {
    pub(crate) async fn start() -> Self {
        let (root, clock) = root();
        Self::start_as(Start::default(), root, clock).await
    }

    pub(crate) async fn start_as(start: Start, root: SigningRoot, clock: Clock) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let started = {
            let place = Place { data_dir: folder.path(), trust_domain: &TrustDomain::default() };
            let metrics = Metrics::registered(&mut Registry::default());
            let (mut random, now) = (fastrand::Rng::new(), tokio::time::Instant::now().into_std());
            Raft::start(place, start.log, metrics, &mut random, now, stop.clone()).unwrap()
        };
        while started.raft.read_index().await.is_err() {
            tokio::task::yield_now().await;
        }
        let domain = TrustDomain::default();
        let authority =
            root.member(&domain, "istiod-1", Lifetimes::default(), clock(), Serial::random().unwrap());
        let api = Api {
            raft: started.raft.clone(),
            snapshots: started.snapshots,
            access: started.access.clone(),
            status: xds::status::Status::new(xds::status::Metrics::register(&mut Registry::default())),
            issuing: Arc::new(ArcSwap::from_pointee(authority.unwrap())),
            clock: clock.clone(),
            xds: "127.0.0.1:15012".to_owned(),
            fleet: tokio::sync::watch::Sender::new(Fleet::alone("127.0.0.1:15012")).subscribe(),
            watches: Arc::new(Semaphore::new(istiod::api::watch::MOST)),
            events: Events::default(),
            members: istiod::cluster::members::Members::new(started.raft.clone(), None, clock.clone()),
            kept: Arc::default(),
        };
        let gate = Gate::new(start.access, (started.access, started.revoked), clock.clone(), start.rates);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        serve_operators(listener, start.identity, api.clone(), &gate, &tasks, &stop).unwrap();
        Self { address, api, _folder: folder, thread: started.thread, tasks, stop }
    }

    /// A token with a role in these namespaces, or in all.
    pub(crate) async fn token(&self, role: Role, namespaces: &[&str]) -> ApiTokenCreated {
        let request = ApiTokenRequest {
            name: "test".to_owned(),
            role,
            namespaces: namespaces.iter().map(|n| (*n).to_owned()).collect(),
            ttl_seconds: 600,
        };
        self.api.create_api_token(&Caller::local(), &request).await.unwrap()
    }

    /// One call on a connection of its own.
    pub(crate) async fn call(&self, method: Method, path: &str, token: Option<&str>, body: &str) -> Answer {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.address.to_string())
            .header("content-type", "application/json");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        self.send(request.body(Full::new(Bytes::from(body.to_owned()))).unwrap()).await
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        let read = async |response: Response<Incoming>| {
            let (parts, body) = response.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Answer { status: parts.status.as_u16(), headers: parts.headers, body }
        };
        self.exchange(request, read).await
    }

    /// The status of a call whose answer may never end: the rest of it is not awaited.
    pub(crate) async fn status(&self, method: Method, path: &str, token: Option<&str>) -> u16 {
        let request = Request::builder().method(method).uri(path).header("host", self.address.to_string());
        let authorized = token.map(|token| format!("Bearer {token}"));
        let request =
            authorized.into_iter().fold(request, |request, value| request.header("authorization", value));
        let request = request.body(Full::default()).unwrap();
        self.exchange(request, async |response: Response<Incoming>| response.status().as_u16()).await
    }

    async fn exchange<T>(
        &self,
        request: Request<Full<Bytes>>,
        read: impl AsyncFnOnce(Response<Incoming>) -> T,
    ) -> T {
        let exchange = async {
            let tcp = TcpStream::connect(self.address).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await.unwrap();
            let answer = async { read(sender.send_request(request).await.unwrap()).await };
            tokio::select! {
                answer = answer => answer,
                _ = async { connection.await.unwrap_or_default(); std::future::pending::<()>().await } => unreachable!(),
            }
        };
        tokio::time::timeout(PATIENCE, exchange).await.unwrap()
    }

    /// A call of the operator that must go well.
    #[track_caller]
    pub(crate) fn admin(
        &self,
        method: Method,
        path: &str,
        body: &str,
    ) -> impl Future<Output = Answer> + use<'_> {
        let (path, body) = (path.to_owned(), body.to_owned());
        async move {
            let answer = self.call(method, &path, Some(ADMIN), &body).await;
            let good = StatusCode::from_u16(answer.status).unwrap().is_success();
            assert!(good, "{path}: {answer:?}");
            answer
        }
    }

    /// Commits objects, written as YAML.
    pub(crate) async fn apply(&self, yaml: &str) -> u64 {
        let body = serde_json::json!({ "files": [{ "name": "test.yaml", "text": yaml }] });
        let answer = self.admin(Method::POST, "/api/v1/apply", &body.to_string()).await;
        answer.json()["revision"].as_u64().unwrap()
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        tokio::time::timeout(PATIENCE, self.tasks.wait()).await.unwrap();
        self.thread.join().await.unwrap();
    }
}

/// An authority, and the time.
pub(crate) fn root() -> (SigningRoot, Clock) {
    let clock = clock();
    let root = SigningRoot::generate(&TrustDomain::default(), clock(), Serial::random().unwrap()).unwrap();
    (root, clock)
}
