//! A server on loopback, clients of both forms, and the push side.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use ca::tls::PeerCertificates;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::google::protobuf::{Any, Struct, Value, value};
use envoy_types::pb::google::rpc;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Server};
use tonic::{Request, Status as Refusal, Streaming};
use xds::balance::{Fleet, Spread};
use xds::cache::View;
use xds::resources::{Resource, Resources, Type};
use xds::server::{Ads, Authentication, JOINS, Joined, tune};
use xds::status::{Metrics, Status};

/// A test that waits longer than this has failed.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}

pub(crate) fn node_id(number: u32) -> String {
    format!("sidecar~10.0.0.{number}~reviews-{number}.default~default.svc.cluster.local")
}

pub(crate) fn node(number: u32) -> Node {
    let text = |text: &str| Value { kind: Some(value::Kind::StringValue(text.to_owned())) };
    let fields = [
        ("PROXY_KIND", "istio-proxy"),
        ("NAMESPACE", "default"),
        ("SERVICE_ACCOUNT", "reviews"),
        ("ISTIO_VERSION", "1.2.3"),
    ];
    let fields = fields.into_iter().map(|(key, value)| (key.to_owned(), text(value))).collect();
    Node { id: node_id(number), metadata: Some(Struct { fields }), ..Node::default() }
}

pub(crate) fn resources(list: &[(Type, &str, u64)]) -> Resources {
    let mut resources = Resources::default();
    for (t, name, version) in list {
        let body = Any { type_url: t.url().to_owned(), value: version.to_le_bytes().repeat(8) };
        let resource = Arc::new(Resource { name: (*name).to_owned(), version: *version, body });
        resources.by_type.entry(*t).or_default().insert((*name).to_owned(), resource);
    }
    resources
}

/// The server and what is around it.
pub(crate) struct Mesh {
    pub(crate) status: Status,
    /// Who the members are.
    pub(crate) fleet: watch::Sender<Fleet>,
    address: String,
    joins: mpsc::Receiver<Joined>,
    registry: Registry,
    sent: Arc<AtomicU64>,
    tasks: TaskTracker,
    end_streams: CancellationToken,
    end_server: CancellationToken,
}

impl Mesh {
    /// A server whose clients all have a certificate with this identity, or none.
    pub(crate) async fn start(authentication: Authentication, identity: Option<&str>) -> Self {
        let mut registry = Registry::default();
        let status = Status::new(Metrics::register(&mut registry));
        let (sender, joins) = mpsc::channel(JOINS);
        let (tasks, end_streams) = (TaskTracker::new(), CancellationToken::new());
        let (fleet_sender, fleet) = watch::channel(Fleet::alone("own:1"));
        let spread = Spread::new(fleet);
        tasks.spawn(spread.clone().keep(end_streams.clone()));
        let ads = Ads {
            joins: sender,
            status: status.clone(),
            spread,
            authentication,
            tasks: tasks.clone(),
            stop: end_streams.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let sent = Arc::new(AtomicU64::new(0));
        let count = sent.clone();
        let incoming = TcpListenerStream::new(listener)
            .map(move |stream| stream.map(|stream| Counted { stream, sent: count.clone() }));
        let peer = identity.map(certificate);
        let ads = InterceptedService::new(ads, move |mut request: Request<()>| {
            request.extensions_mut().extend(
                peer.clone()
                    .map(|peer| {
                        let mut extensions = tonic::Extensions::new();
                        extensions.insert(peer);
                        extensions
                    })
                    .unwrap_or_default(),
            );
            Ok(request)
        });
        let end_server = CancellationToken::new();
        let ended = end_server.clone().cancelled_owned();
        let server = tune(Server::builder()).add_service(ads);
        tasks.spawn(async move { server.serve_with_incoming_shutdown(incoming, ended).await.unwrap() });
        Self { status, fleet: fleet_sender, address, joins, registry, sent, tasks, end_streams, end_server }
    }

    /// The next proxy that connects.
    pub(crate) async fn joined(&mut self) -> Joined {
        let joined = tokio::time::timeout(TIMEOUT, self.joins.recv()).await.unwrap().unwrap();
        self.status.decide(0, &[joined.key]);
        joined
    }

    /// What the push side does for one proxy.
    pub(crate) fn push(&self, proxy: &Joined, revision: u64, resources: &Resources) {
        let from = proxy.views.borrow().as_ref().map_or(0, |view| view.revision());
        self.status.note_change(proxy.key, from, revision);
        let view = View::new(revision, resources.clone()).committed_at(Some(now()));
        proxy.views.send_replace(Some(Arc::new(view)));
        self.status.decide(revision, &[proxy.key]);
    }

    pub(crate) fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    /// Bytes that the server has written to all clients.
    pub(crate) fn bytes_to_clients(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until this holds, looking again whenever the clock allows.
    pub(crate) async fn eventually(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + TIMEOUT;
        while !holds(self) {
            assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
            tokio::task::yield_now().await;
        }
    }

    pub(crate) fn run(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.end_server.clone();
        self.tasks.spawn(async move {
            tokio::select! { () = stop.cancelled() => {}, () = task => {} }
        });
    }

    pub(crate) fn end_streams(&self) {
        self.end_streams.cancel();
    }

    /// Ends everything; nothing may be left.
    pub(crate) async fn stop(self) {
        self.end_streams.cancel();
        self.end_server.cancel();
        self.tasks.close();
        tokio::time::timeout(TIMEOUT, self.tasks.wait()).await.unwrap();
    }
}

fn certificate(identity: &str) -> PeerCertificates {
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(identity.try_into().unwrap())];
    let key = rcgen::KeyPair::generate().unwrap();
    PeerCertificates::new(&[params.self_signed(&key).unwrap().der().clone()])
}

type Service = AggregatedDiscoveryServiceClient<Channel>;

async fn service(mesh: &Mesh) -> Service {
    let service = Service::connect(mesh.address.clone()).await.unwrap();
    service.max_decoding_message_size(64 << 20)
}

/// A delta client. It says only what the test tells it to.
pub(crate) struct Client {
    number: u32,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    pub(crate) async fn connect(mesh: &Mesh, number: u32) -> Self {
        let (requests, outgoing) = mpsc::channel(16);
        let mut service = service(mesh).await;
        let responses = service.delta_aggregated_resources(ReceiverStream::new(outgoing)).await.unwrap();
        Self { number, requests, responses: responses.into_inner() }
    }

    /// Connects with metadata, as a client does that understands hints.
    pub(crate) async fn open(
        mesh: &Mesh,
        number: u32,
        metadata: &[(&'static str, u64)],
    ) -> Result<Self, Refusal> {
        let (requests, outgoing) = mpsc::channel(16);
        let mut request = Request::new(ReceiverStream::new(outgoing));
        for (key, value) in metadata {
            request.metadata_mut().insert(*key, (*value).into());
        }
        let answer = service(mesh).await.delta_aggregated_resources(request).await?;
        assert!(wire::members::told(answer.metadata()).is_some(), "members are told with every answer");
        Ok(Self { number, requests, responses: answer.into_inner() })
    }

    /// Connects and asks, and is refused.
    pub(crate) async fn refused(mesh: &Mesh, number: u32) -> Refusal {
        let (requests, outgoing) = mpsc::channel(16);
        let mut service = service(mesh).await;
        let opened = service.delta_aggregated_resources(ReceiverStream::new(outgoing)).await;
        match opened {
            Err(refusal) => refusal,
            Ok(responses) => {
                let mut client = Self { number, requests, responses: responses.into_inner() };
                client.ask(Type::Cluster, &[]).await;
                client.end().await
            }
        }
    }

    pub(crate) async fn send(&mut self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn ask(&mut self, t: Type, names: &[&str]) {
        let request = DeltaDiscoveryRequest {
            node: Some(node(self.number)),
            type_url: t.url().to_owned(),
            resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
            ..DeltaDiscoveryRequest::default()
        };
        self.send(request).await;
    }

    pub(crate) async fn next(&mut self) -> DeltaDiscoveryResponse {
        tokio::time::timeout(TIMEOUT, self.responses.message()).await.unwrap().unwrap().unwrap()
    }

    /// The status that the stream ends with.
    pub(crate) async fn end(&mut self) -> Refusal {
        loop {
            match tokio::time::timeout(TIMEOUT, self.responses.message()).await.unwrap() {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without a status"),
                Err(refusal) => return refusal,
            }
        }
    }

    pub(crate) async fn ack(&mut self, response: &DeltaDiscoveryResponse) {
        self.send(answer(response, None)).await;
    }

    pub(crate) async fn nack(&mut self, response: &DeltaDiscoveryResponse, words: &str) {
        let error = rpc::Status { code: 3, message: words.to_owned(), details: Vec::new() };
        self.send(answer(response, Some(error))).await;
    }

    pub(crate) async fn ack_next(&mut self, count: usize) {
        for _ in 0..count {
            let response = self.next().await;
            self.ack(&response).await;
        }
    }

    pub(crate) async fn accept_everything(mut self) {
        while let Ok(Some(response)) = self.responses.message().await {
            if self.requests.send(answer(&response, None)).await.is_err() {
                return;
            }
        }
    }
}

fn answer(response: &DeltaDiscoveryResponse, error_detail: Option<rpc::Status>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        error_detail,
        ..DeltaDiscoveryRequest::default()
    }
}

/// A state-of-the-world client.
pub(crate) struct WholeClient {
    requests: mpsc::Sender<DiscoveryRequest>,
    responses: Streaming<DiscoveryResponse>,
}

impl WholeClient {
    pub(crate) async fn connect(mesh: &Mesh, _number: u32) -> Self {
        let (requests, outgoing) = mpsc::channel(16);
        let mut service = service(mesh).await;
        let responses = service.stream_aggregated_resources(ReceiverStream::new(outgoing)).await.unwrap();
        Self { requests, responses: responses.into_inner() }
    }

    pub(crate) async fn send(&mut self, request: DiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> DiscoveryResponse {
        tokio::time::timeout(TIMEOUT, self.responses.message()).await.unwrap().unwrap().unwrap()
    }
}

/// A connection that counts what the server writes.
struct Counted {
    stream: TcpStream,
    sent: Arc<AtomicU64>,
}

impl Connected for Counted {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(count)) = &written {
            self.sent.fetch_add(*count as u64, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
