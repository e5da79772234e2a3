//! The sockets around [`crate::stream`]: one task per stream. It decides nothing.
//!
//! [`Ads`] is a tonic service. It needs the client's certificates in the request's extensions
//! ([`PeerCertificates`], as `ca::tls::accept` leaves them), and somebody who takes the proxies that connect
//! from a channel and gives each its views.

mod codec;

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ca::identity::SpiffeId;
use ca::tls::PeerCertificates;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::value::Kind;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::codegen::{Body, BoxFuture, Service, StdError, http};
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status as Refusal, Streaming};
use wire::members::{self, Hint};

use crate::balance::{Place, Spread};
use crate::cache::View;
use crate::proxy::Proxy;
use crate::status::{Connection, Status};
use crate::stream::{self, Action, Stream, Variant};
use codec::Codec;
pub use codec::{Incoming, resource_len};

/// Responses written and not yet taken by HTTP/2. A stream has at most one on its way per type, so full means
/// that the client asks for types we do not serve faster than it reads the answers; it waits then.
const OUTBOX: usize = 8;

/// Proxies that have connected and wait to be taken over by the push side. Full means that translation is
/// behind: further proxies wait, and `pilot_proxy_queue_time` shows it.
pub const JOINS: usize = 1024;

/// A client that says nothing for this long after it opened a stream is cut.
const FIRST_REQUEST: Duration = Duration::from_secs(15);

/// A client that has more than we have waits this long for us to catch up before it is sent elsewhere.
const CATCH_UP: Duration = Duration::from_secs(5);

/// The largest request. A proxy with ten thousand resources tells the version of each when it reconnects.
const REQUEST_BYTES: usize = 16 * 1024 * 1024;

/// A proxy that has connected and wants views.
#[derive(Debug)]
pub struct Joined {
    /// Names the connection to [`Status`].
    pub key: u64,
    /// Who it is.
    pub proxy: Arc<Proxy>,
    /// Where its views go; only the latest counts. Closed when the stream has ended.
    pub views: watch::Sender<Option<Arc<View>>>,
}

/// Whom to serve without a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authentication {
    /// Nobody.
    Required,
    /// Anybody: for tests and plain connections on loopback.
    Optional,
}

/// The aggregated discovery service. A handle; clones serve the same.
#[derive(Debug, Clone)]
pub struct Ads {
    /// Where proxies that connect are announced.
    pub joins: mpsc::Sender<Joined>,
    /// Where streams report.
    pub status: Status,
    /// How streams spread over the members.
    pub spread: Spread,
    /// Whether a certificate is needed.
    pub authentication: Authentication,
    /// Owns the streams' tasks.
    pub tasks: TaskTracker,
    /// Ends all streams.
    pub stop: CancellationToken,
}

/// HTTP/2 settings that long-lived streams need: a peer that has vanished is noticed within 40 seconds.
#[must_use]
pub fn tune(server: tonic::transport::Server) -> tonic::transport::Server {
    server
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .tcp_nodelay(true)
        .max_concurrent_streams(100)
}

const DELTA: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const WHOLE: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";

impl NamedService for Ads {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl<B> Service<http::Request<B>> for Ads
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let variant = match request.uri().path() {
            DELTA => Variant::Delta,
            WHOLE => Variant::StateOfTheWorld,
            path => {
                let refusal = Refusal::unimplemented(format!("no method {path}"));
                return Box::pin(async move { Ok(refusal.into_http()) });
            }
        };
        let open = Open { ads: self.clone(), variant };
        Box::pin(async move {
            let limits = |grpc: Grpc<Codec>| grpc.max_decoding_message_size(REQUEST_BYTES);
            Ok(limits(Grpc::new(Codec { variant })).streaming(open, request).await)
        })
    }
}

/// Opens a stream.
struct Open {
    ads: Ads,
    variant: Variant,
}

impl StreamingService<Incoming> for Open {
    type Response = stream::Response;
    type ResponseStream = ReceiverStream<Result<stream::Response, Refusal>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Refusal>;

    fn call(&mut self, request: Request<Streaming<Incoming>>) -> Self::Future {
        let (ads, variant) = (self.ads.clone(), self.variant);
        let identity = request.extensions().get::<PeerCertificates>().and_then(PeerCertificates::identity);
        Box::pin(async move {
            if identity.is_none() && ads.authentication == Authentication::Required {
                ads.status.metrics().unauthenticated.inc();
                return Err(Refusal::unauthenticated("a client certificate with a SPIFFE id is needed"));
            }
            let place = ads.admit(request.metadata()).await?;
            let (outbox, responses) = mpsc::channel(OUTBOX);
            let tasks = ads.tasks.clone();
            let mut response = Response::new(ReceiverStream::new(responses));
            members::tell(response.metadata_mut(), ads.spread.fleet().borrow().addresses());
            let task = Task { ads, variant, identity, place, requests: request.into_inner(), outbox };
            tasks.spawn(task.run());
            Ok(response)
        })
    }
}

impl Ads {
    /// A place for a stream with this metadata, once all that its client has is here too.
    async fn admit(&self, metadata: &MetadataMap) -> Result<Place, Refusal> {
        if self.stop.is_cancelled() {
            return Err(self.elsewhere(Hint::Drain));
        }
        let number = |key: &str| metadata.get(key)?.to_str().ok()?.parse::<u64>().ok();
        let place = self.spread.admit(number(members::REFUSALS)).map_err(|hint| self.elsewhere(hint))?;
        match number(members::REVISION) {
            Some(revision) if !self.catches_up(revision).await => Err(self.elsewhere(Hint::Behind)),
            Some(_) | None => Ok(place),
        }
    }

    /// Waits until views are of this revision or a later one; whether they are in time.
    async fn catches_up(&self, revision: u64) -> bool {
        tokio::select! {
            reached = tokio::time::timeout(CATCH_UP, self.status.reached(revision)) => reached.is_ok(),
            () = self.stop.cancelled() => false,
        }
    }

    /// Tells a client to go to another member.
    fn elsewhere(&self, hint: Hint) -> Refusal {
        let text = match hint {
            Hint::Surplus => "this member serves its share, go to another",
            Hint::Drain => "the server is shutting down",
            Hint::Behind => "this member has not applied what the client has, go to another",
        };
        let mut refusal = Refusal::unavailable(text);
        let metadata = refusal.metadata_mut();
        metadata.insert(members::MOVE, AsciiMetadataValue::from_static(hint.word()));
        members::tell(metadata, self.spread.fleet().borrow().addresses());
        refusal
    }
}

/// One open stream.
struct Task {
    ads: Ads,
    variant: Variant,
    identity: Option<SpiffeId>,
    place: Place,
    requests: Streaming<Incoming>,
    outbox: mpsc::Sender<Result<stream::Response, Refusal>>,
}

/// Why a stream ends.
enum End {
    /// The client has gone; there is nobody to tell.
    Gone,
    /// We end it, and say why.
    Refused(Refusal),
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Task {
    async fn run(mut self) {
        let Err(end) = self.serve().await;
        if let End::Refused(refusal) = end {
            tracing::debug!(error = refusal.message(), "stream ended by us");
            // The client may have gone meanwhile; then it needs no reason.
            _ = self.outbox.try_send(Err(refusal));
        }
    }

    async fn serve(&mut self) -> Result<Infallible, End> {
        let first = self.first_request().await?;
        let node = first.node();
        let proxy = Arc::new(self.identify(node)?);
        self.place.belongs_to(&proxy.id);
        // A stock Envoy tells what it has in its first request, and understands no hint: it is served in any case.
        if let Some(revision) = first.told_revision() {
            self.ads.catches_up(revision).await;
        }
        let version = node.map(proxy_version).unwrap_or_default();
        let mut connection = self.ads.status.connect(proxy.clone(), self.variant, version, now());
        let (views, mut latest) = watch::channel(None);
        let joined = Joined { key: connection.key(), proxy: proxy.clone(), views };
        self.ads.joins.send(joined).await.map_err(|_| self.moves(Hint::Drain))?;
        tracing::info!(proxy = proxy.id, variant = ?self.variant, "proxy connected");
        let result = self.converse(&proxy, first, &mut connection, &mut latest).await;
        tracing::info!(proxy = proxy.id, "proxy disconnected");
        result
    }

    async fn converse(
        &mut self,
        proxy: &Proxy,
        first: Incoming,
        connection: &mut Connection,
        latest: &mut watch::Receiver<Option<Arc<View>>>,
    ) -> Result<Infallible, End> {
        let mut stream = Stream::new(self.variant, proxy.native);
        let mut view: Option<Arc<View>> = None;
        let mut actions = on_request(&mut stream, first);
        loop {
            connection.update(stream.report(), &actions, view.as_deref(), now());
            self.carry_out(proxy, actions).await?;
            let wake = stream.deadline(now()).map(Instant::from_std);
            actions = tokio::select! {
                () = self.ads.stop.cancelled() => return Err(self.moves(Hint::Drain)),
                () = self.place.moved() => return Err(self.moves(Hint::Surplus)),
                request = self.requests.message() => match request {
                    Ok(Some(request)) => on_request(&mut stream, request),
                    Ok(None) | Err(_) => return Err(End::Gone),
                },
                changed = latest.changed() => {
                    changed.map_err(|_| self.moves(Hint::Drain))?;
                    view = latest.borrow_and_update().clone();
                    view.clone().map(|view| stream.on_view(view, now())).unwrap_or_default()
                }
                Some(reader) = connection.dump_request() => {
                    // A reader that does not wait any more needs no answer.
                    _ = reader.send(stream.held());
                    Vec::new()
                }
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {
                    stream.on_tick(now())
                }
            };
        }
    }

    async fn carry_out(&self, proxy: &Proxy, actions: Vec<Action>) -> Result<(), End> {
        for action in actions {
            match action {
                Action::Send(response) => tokio::select! {
                    () = self.ads.stop.cancelled() => return Err(self.moves(Hint::Drain)),
                    sent = self.outbox.send(Ok(response)) => sent.map_err(|_| End::Gone)?,
                },
                Action::Accepted { .. } => {}
                Action::Rejected(nack) => tracing::warn!(
                    proxy = proxy.id, revision = nack.revision, type_url = nack.type_.url(),
                    resources = ?nack.resources, error = nack.message, "proxy rejected resources"
                ),
            }
        }
        Ok(())
    }

    async fn first_request(&mut self) -> Result<Incoming, End> {
        let first = tokio::select! {
            () = self.ads.stop.cancelled() => return Err(self.moves(Hint::Drain)),
            first = tokio::time::timeout(FIRST_REQUEST, self.requests.message()) => first,
        };
        match first {
            Ok(Ok(Some(request))) => Ok(request),
            Ok(Ok(None) | Err(_)) => Err(End::Gone),
            Err(_) => Err(Refusal::deadline_exceeded("no request on the stream").into()),
        }
    }

    fn moves(&self, hint: Hint) -> End {
        End::Refused(self.ads.elsewhere(hint))
    }

    /// Who it is: the node says so, and the certificate must say the same.
    fn identify(&self, node: Option<&Node>) -> Result<Proxy, Refusal> {
        let node = node.ok_or_else(|| Refusal::invalid_argument("the first request must have a node"))?;
        let proxy = Proxy::from_node(node, self.identity.clone())
            .map_err(|error| Refusal::invalid_argument(error.to_string()))?;
        let Some(identity) = &self.identity else {
            return Ok(proxy);
        };
        match identity.workload_parts() {
            Some(parts) if parts == (proxy.namespace.as_str(), proxy.service_account.as_str()) => Ok(proxy),
            _ => {
                self.ads.status.metrics().unauthenticated.inc();
                let told = (&proxy.namespace, &proxy.service_account);
                let text = format!("identity {identity} is not {}/{}, which the node claims", told.0, told.1);
                tracing::warn!(proxy = proxy.id, peer = %identity, "node claims another identity than its certificate");
                Err(Refusal::permission_denied(text))
            }
        }
    }
}

fn on_request(stream: &mut Stream, request: Incoming) -> Vec<Action> {
    match request {
        Incoming::Delta(request) => stream.on_delta(request, now()),
        Incoming::Whole(request) => stream.on_whole(request, now()),
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// The version that a node tells: Istio's, else its user agent's.
fn proxy_version(node: &Node) -> String {
    let istio = node.metadata.as_ref().and_then(|metadata| metadata.fields.get("ISTIO_VERSION"));
    match istio.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(version)) if !version.is_empty() => version.clone(),
        _ => user_agent(node),
    }
}

fn user_agent(node: &Node) -> String {
    use envoy_types::pb::envoy::config::core::v3::node::UserAgentVersionType;
    match &node.user_agent_version_type {
        Some(UserAgentVersionType::UserAgentVersion(version)) => version.clone(),
        Some(UserAgentVersionType::UserAgentBuildVersion(build)) => {
            let version = build.version.as_ref();
            version.map(|v| format!("{}.{}.{}", v.major_number, v.minor_number, v.patch)).unwrap_or_default()
        }
        None => String::new(),
    }
}
