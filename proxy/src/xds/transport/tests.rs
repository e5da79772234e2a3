//! A real stream over loopback.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request as Asked, Response as Answer, Status as GrpcStatus, Streaming};

use super::*;
use crate::tables::TableStore;
use crate::tables::tests::{cluster, endpoints};

/// A control plane that has one cluster, and ends each stream when it was acknowledged.
#[derive(Clone, Default)]
struct Server {
    seen: Arc<Mutex<Vec<DeltaDiscoveryRequest>>>,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, GrpcStatus>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Server {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Asked<Streaming<DiscoveryRequest>>,
    ) -> Result<Answer<Self::StreamAggregatedResourcesStream>, GrpcStatus> {
        Err(GrpcStatus::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        requests: Asked<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Answer<Self::DeltaAggregatedResourcesStream>, GrpcStatus> {
        let seen = Arc::clone(&self.seen);
        let answers = requests.into_inner().filter_map(move |request| {
            let request = request.ok()?;
            let kind = Kind::from_url(&request.type_url)?;
            let first = request.response_nonce.is_empty();
            let held = !request.initial_resource_versions.is_empty();
            seen.lock().unwrap().push(request);
            let resource = |name: &str, any| Resource {
                name: name.into(),
                version: "1".into(),
                resource: Some(any),
                ..Default::default()
            };
            let resources = match kind {
                _ if !first => {
                    let acknowledged_endpoints = kind == Kind::Endpoints;
                    return acknowledged_endpoints.then(|| Err(GrpcStatus::unavailable("going away")));
                }
                _ if held => Vec::new(),
                Kind::Cluster => vec![resource("a", cluster("a", "s"))],
                Kind::Endpoints => vec![resource("s", endpoints("s", 1))],
                Kind::Listener | Kind::Routes | Kind::Secret => Vec::new(),
            };
            Some(Ok(DeltaDiscoveryResponse {
                type_url: kind.url().into(),
                nonce: format!("n-{kind}"),
                resources,
                ..Default::default()
            }))
        });
        Ok(Answer::new(Box::pin(answers)))
    }
}

#[tokio::test]
async fn a_lost_stream_is_opened_again_with_what_is_held_and_tables_stay() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::default();
    let seen = Arc::clone(&server.seen);
    let (stop, tasks) = (CancellationToken::new(), tokio_util::task::TaskTracker::new());
    let service = AggregatedDiscoveryServiceServer::new(server);
    let serving = tonic::transport::Server::builder().add_service(service).serve_with_incoming_shutdown(
        tokio_stream::wrappers::TcpListenerStream::new(listener),
        stop.clone().cancelled_owned(),
    );
    tasks.spawn(serving);

    let (tables, writer) = TableStore::new(1);
    let (status, mut watch) = watch::channel(Status::default());
    // The first server does not exist: the next one is tried.
    let nobody = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    let transport = Transport {
        settings: Settings {
            servers: vec![Address::Socket(nobody), Address::Socket(address)],
            members: None,
            tls: None,
            protocol: Protocol::Delta,
            authority: None,
        },
        client: Client::new(Node { id: "n".into(), ..Default::default() }, Protocol::Delta),
        writer,
        status,
        rng: fastrand::Rng::with_seed(7),
        clock: || jiff::Timestamp::UNIX_EPOCH,
    };
    tasks.spawn(transport.run(stop.clone()));

    let reconnected = |seen: &[DeltaDiscoveryRequest]| {
        seen.iter()
            .any(|r| r.type_url == Kind::Endpoints.url() && r.initial_resource_versions.contains_key("s"))
    };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !reconnected(&seen.lock().unwrap()) {
        let changed = tokio::time::timeout_at(deadline, watch.changed()).await;
        assert!(changed.is_ok(), "no second stream in time: {:?}", seen.lock().unwrap());
    }
    assert_eq!(tables.load().clusters["a"].endpoints.endpoints().count(), 1);
    assert!(watch.borrow().initialized);
    stop.cancel();
    tasks.close();
    tokio::time::timeout_at(deadline, tasks.wait()).await.unwrap();
}

/// What clients said of earlier refusals when they asked, in order.
type Said = Arc<Mutex<Vec<(Option<u64>, Option<u64>)>>>;

/// A member that accepts streams, or refuses each with a hint; it tells what its clients said.
struct Member {
    address: std::net::SocketAddr,
    asked: Said,
}

impl Member {
    /// `hint`: why it refuses everybody who has not been refused by somebody else, and whom it names then.
    async fn start(
        hint: Option<(Hint, Vec<String>)>,
        tasks: &tokio_util::task::TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Said::default();
        let seen = Arc::clone(&asked);
        let intercept = move |request: Asked<()>| {
            let number = |key: &str| request.metadata().get(key)?.to_str().ok()?.parse::<u64>().ok();
            let said = (number(members::REFUSALS), number(members::REVISION));
            seen.lock().unwrap().push(said);
            match hint.as_ref().filter(|_| said.0 == Some(0)) {
                None => Ok(request),
                Some((hint, named)) => {
                    let mut refusal = GrpcStatus::unavailable("go elsewhere");
                    refusal.metadata_mut().insert(members::MOVE, hint.word().parse().unwrap());
                    members::tell(refusal.metadata_mut(), named.iter().map(String::as_str));
                    Err(refusal)
                }
            }
        };
        let service = AggregatedDiscoveryServiceServer::with_interceptor(Server::default(), intercept);
        tasks.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming_shutdown(
            tokio_stream::wrappers::TcpListenerStream::new(listener),
            stop.clone().cancelled_owned(),
        ));
        Self { address, asked }
    }
}

/// Who takes the stream of a client that is told of these members by somebody who follows them.
async fn served_by(
    told: &[&Member],
    tasks: &tokio_util::task::TaskTracker,
    stop: &CancellationToken,
) -> String {
    let (_tables, writer) = TableStore::new(1);
    let (status, mut watch) = watch::channel(Status::default());
    let told = watch::Sender::new(told.iter().map(|member| member.address.to_string()).collect());
    let transport = Transport {
        settings: Settings {
            servers: Vec::new(),
            members: Some(told.subscribe()),
            tls: None,
            protocol: Protocol::Delta,
            authority: None,
        },
        client: Client::new(Node { id: "n".into(), ..Default::default() }, Protocol::Delta),
        writer,
        status,
        rng: fastrand::Rng::with_seed(7),
        clock: || jiff::Timestamp::UNIX_EPOCH,
    };
    tasks.spawn(transport.run(stop.clone()));
    let connected = tokio::time::timeout(PATIENCE, watch.wait_for(|status| status.connected.is_some())).await;
    let server = connected.unwrap().unwrap().connected.clone().unwrap();
    stop.cancel();
    tasks.close();
    tokio::time::timeout(PATIENCE, tasks.wait()).await.unwrap();
    server
}

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn who_is_refused_asks_the_next_member_at_once_and_says_so() {
    let (stop, tasks) = (CancellationToken::new(), tokio_util::task::TaskTracker::new());
    // Both refuse at first, whichever is preferred: one of them is asked again by who was refused.
    let first = Member::start(Some((Hint::Surplus, Vec::new())), &tasks, &stop).await;
    let second = Member::start(Some((Hint::Surplus, Vec::new())), &tasks, &stop).await;
    let server = served_by(&[&first, &second], &tasks, &stop).await;
    let (refused, served) =
        if server == first.address.to_string() { (&second, &first) } else { (&first, &second) };
    assert_eq!(refused.asked.lock().unwrap().first(), Some(&(Some(0), None)));
    assert_eq!(served.asked.lock().unwrap().first(), Some(&(Some(1), None)), "one has refused");
}

#[tokio::test]
async fn who_is_refused_asks_a_member_of_whom_the_refusal_is_the_first_to_tell() {
    let (stop, tasks) = (CancellationToken::new(), tokio_util::task::TaskTracker::new());
    let second = Member::start(None, &tasks, &stop).await;
    let named = vec![second.address.to_string()];
    let first = Member::start(Some((Hint::Surplus, named)), &tasks, &stop).await;
    assert_eq!(served_by(&[&first], &tasks, &stop).await, second.address.to_string());
    assert_eq!(second.asked.lock().unwrap().first(), Some(&(Some(1), None)));
}
