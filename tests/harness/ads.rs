//! A control plane of a few resources that a test changes: the incremental form of ADS, without an istiod behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use proxy::xds::decode::Kind;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

/// Responses waiting for one proxy. Full means that it does not read: its stream waits.
const RESPONSES: usize = 16;

/// A resource's type and name.
type Key = (Kind, String);

/// Each resource in its newest version.
type World = BTreeMap<Key, (u64, Any)>;

/// What one stream's proxy has acknowledged, by version.
type Held = BTreeMap<Key, u64>;

/// A running control plane; it stops when dropped.
#[derive(Debug)]
pub struct Ads {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    version: AtomicU64,
    _stop: DropGuard,
}

#[derive(Debug)]
struct Shared {
    world: watch::Sender<World>,
    held: watch::Sender<BTreeMap<u64, Held>>,
    refused: watch::Sender<Vec<String>>,
    streams: AtomicU64,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Ads {
    /// Listens on a free loopback port.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn start() -> anyhow::Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            world: watch::Sender::default(),
            held: watch::Sender::default(),
            refused: watch::Sender::default(),
            streams: AtomicU64::new(0),
            stop: stop.clone(),
            tasks: TaskTracker::new(),
        });
        let service = AggregatedDiscoveryServiceServer::new(Service(Arc::clone(&shared)));
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(service);
        let serving = server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        // Who is served tells what went wrong.
        shared.tasks.spawn(async move { serving.await.unwrap_or_default() });
        Ok(Self { address, shared, version: AtomicU64::new(0), _stop: stop.drop_guard() })
    }

    /// From now on there is this resource, in the place of another of its type and name.
    pub fn put<M: Message + Name>(&self, kind: Kind, name: &str, message: &M) -> u64 {
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        let any = Any { type_url: M::type_url(), value: message.encode_to_vec() };
        self.shared.world.send_modify(|world| {
            world.insert((kind, name.to_owned()), (version, any));
        });
        version
    }

    /// From now on there is no such resource.
    pub fn remove(&self, kind: Kind, name: &str) {
        self.shared.world.send_modify(|world| {
            world.remove(&(kind, name.to_owned()));
        });
    }

    /// Waits until every proxy has taken this version of a resource, or a newer one.
    ///
    /// # Errors
    ///
    /// When one does not.
    pub async fn taken(&self, kind: Kind, name: &str, version: u64) -> anyhow::Result<()> {
        let key = (kind, name.to_owned());
        self.all(|held| held.get(&key).is_some_and(|have| *have >= version))
            .await
            .with_context(|| format!("{kind} {name} was not taken"))
    }

    /// Waits until no proxy has a resource any more.
    ///
    /// # Errors
    ///
    /// When one still has it.
    pub async fn gone(&self, kind: Kind, name: &str) -> anyhow::Result<()> {
        let key = (kind, name.to_owned());
        self.all(|held| !held.contains_key(&key)).await.with_context(|| format!("{kind} {name} was kept"))
    }

    async fn all(&self, holds: impl Fn(&Held) -> bool) -> anyhow::Result<()> {
        let mut held = self.shared.held.subscribe();
        let wanted = held.wait_for(|streams| !streams.is_empty() && streams.values().all(&holds));
        tokio::time::timeout(crate::PATIENCE, wanted).await??;
        Ok(())
    }

    /// What proxies refused, in their words.
    #[must_use]
    pub fn refused(&self) -> Vec<String> {
        self.shared.refused.borrow().clone()
    }
}

#[derive(Debug)]
struct Service(Arc<Shared>);

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("incremental only"))
    }

    async fn delta_aggregated_resources(
        &self,
        requests: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (sender, responses) = mpsc::channel(RESPONSES);
        let (shared, requests) = (Arc::clone(&self.0), requests.into_inner());
        self.0.tasks.spawn(async move {
            let number = shared.streams.fetch_add(1, Ordering::Relaxed);
            let stop = shared.stop.clone();
            // A stream ends when its proxy leaves.
            stop.run_until_cancelled(serve(&shared, number, requests, sender)).await.unwrap_or_default();
            shared.held.send_modify(|held| {
                held.remove(&number);
            });
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }
}

/// Moves the messages of one stream until it ends.
async fn serve(
    shared: &Shared,
    number: u64,
    mut requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) {
    let mut world = shared.world.subscribe();
    let mut conversation = Conversation::default();
    loop {
        tokio::select! {
            request = requests.message() => {
                let Ok(Some(request)) = request else { return };
                if let Some(refusal) = conversation.on_request(request) {
                    shared.refused.send_modify(|all| all.push(refusal));
                }
            }
            changed = world.changed() => if changed.is_err() { return },
        }
        let pending = conversation.responses(&world.borrow_and_update());
        for response in pending {
            if responses.send(Ok(response)).await.is_err() {
                return;
            }
        }
        shared.held.send_if_modified(|held| {
            let before = held.insert(number, conversation.held.clone());
            before.as_ref() != Some(&conversation.held)
        });
    }
}

/// What one proxy asked for, was sent, and took.
#[derive(Debug, Default)]
struct Conversation {
    /// Of clusters and listeners all are wanted.
    wanted: BTreeMap<Kind, BTreeSet<String>>,
    sent: BTreeMap<Key, u64>,
    /// By nonce, what the response said: a version, or that the resource is gone.
    unanswered: BTreeMap<u64, Vec<(Key, Option<u64>)>>,
    nonce: u64,
    held: Held,
}

impl Conversation {
    /// A subscription, or the answer to a response; what was refused.
    fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Option<String> {
        let kind = Kind::from_url(&request.type_url)?;
        let names = self.wanted.entry(kind).or_default();
        names.extend(request.resource_names_subscribe);
        for name in request.resource_names_unsubscribe {
            names.remove(&name);
            let key = (kind, name);
            self.sent.remove(&key);
            self.held.remove(&key);
        }
        let said = request.response_nonce.parse().ok().and_then(|nonce| self.unanswered.remove(&nonce));
        if let Some(error) = request.error_detail {
            return Some(format!("{kind}: {}", error.message));
        }
        for (key, version) in said.unwrap_or_default() {
            match version {
                Some(version) => self.held.insert(key, version),
                None => self.held.remove(&key),
            };
        }
        None
    }

    /// What the proxy has to be told, clusters before their endpoints and listeners before their routes.
    fn responses(&mut self, world: &World) -> Vec<DeltaDiscoveryResponse> {
        let kinds: Vec<Kind> =
            Kind::SUBSCRIBED.into_iter().filter(|kind| self.wanted.contains_key(kind)).collect();
        kinds.into_iter().filter_map(|kind| self.response(kind, world)).collect()
    }

    fn response(&mut self, kind: Kind, world: &World) -> Option<DeltaDiscoveryResponse> {
        let wanted = self.wanted.get(&kind)?;
        let all = matches!(kind, Kind::Cluster | Kind::Listener);
        let is_wanted = |name: &String| all || wanted.contains(name);
        let newer: Vec<(Key, u64, Any)> = world
            .iter()
            .filter(|(key, (version, _))| {
                key.0 == kind && is_wanted(&key.1) && self.sent.get(*key) != Some(version)
            })
            .map(|(key, (version, any))| (key.clone(), *version, any.clone()))
            .collect();
        let gone: Vec<Key> =
            self.sent.keys().filter(|key| key.0 == kind && !world.contains_key(*key)).cloned().collect();
        if newer.is_empty() && gone.is_empty() {
            return None;
        }
        self.nonce += 1;
        let said = newer.iter().map(|(key, version, _)| (key.clone(), Some(*version)));
        self.unanswered.insert(self.nonce, said.chain(gone.iter().map(|key| (key.clone(), None))).collect());
        for key in &gone {
            self.sent.remove(key);
        }
        self.sent.extend(newer.iter().map(|(key, version, _)| (key.clone(), *version)));
        Some(DeltaDiscoveryResponse {
            type_url: kind.url().to_owned(),
            nonce: self.nonce.to_string(),
            resources: newer.into_iter().map(resource).collect(),
            removed_resources: gone.into_iter().map(|(_, name)| name).collect(),
            ..DeltaDiscoveryResponse::default()
        })
    }
}

fn resource(((_, name), version, any): (Key, u64, Any)) -> Resource {
    Resource { name, version: version.to_string(), resource: Some(any), ..Resource::default() }
}

/// How a bootstrap names a control plane at this address: its `dynamic_resources`, and the cluster that they speak of.
#[must_use]
pub fn bootstrap(address: SocketAddr, admin: SocketAddr) -> String {
    let socket =
        |at: SocketAddr| format!("{{socket_address: {{address: {}, port_value: {}}}}}", at.ip(), at.port());
    let (address, admin) = (socket(address), socket(admin));
    format!(
        r"
node:
  id: sidecar~127.0.0.1~soak.default~default.svc.cluster.local
  cluster: soak.default
  metadata: {{NAME: soak, NAMESPACE: default, WORKLOAD_NAME: soak, CLUSTER_ID: Kubernetes, MESH_ID: mesh, LABELS: {{app: soak, version: v1}}}}
admin: {{address: {admin}}}
dynamic_resources:
  lds_config: {{ads: {{}}, resource_api_version: V3}}
  cds_config: {{ads: {{}}, resource_api_version: V3}}
  ads_config:
    api_type: DELTA_GRPC
    transport_api_version: V3
    grpc_services: [{{envoy_grpc: {{cluster_name: ads}}}}]
static_resources:
  clusters:
  - name: ads
    type: STATIC
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment: {{cluster_name: ads, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {address}}}}}]}}]}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(kind: Kind, names: &[&str], nonce: &str) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: kind.url().to_owned(),
            resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
            response_nonce: nonce.to_owned(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    fn told(conversation: &mut Conversation, world: &World) -> Vec<(String, Vec<String>, Vec<String>)> {
        let one = |response: DeltaDiscoveryResponse| {
            let names = response.resources.into_iter().map(|r| format!("{} {}", r.name, r.version)).collect();
            (response.nonce, names, response.removed_resources)
        };
        conversation.responses(world).into_iter().map(one).collect()
    }

    #[test]
    fn a_proxy_is_told_what_it_wants_and_holds_what_it_acknowledged() {
        let [a, b] = ["a", "b"].map(|name| (Kind::Endpoints, name.to_owned()));
        let mut world = World::from([(a.clone(), (1, Any::default())), (b, (2, Any::default()))]);
        let mut conversation = Conversation::default();
        assert_eq!(conversation.on_request(asks(Kind::Endpoints, &["a"], "")), None);
        assert_eq!(told(&mut conversation, &world), [("1".into(), vec!["a 1".into()], vec![])]);
        assert_eq!(told(&mut conversation, &world), []);
        assert!(conversation.held.is_empty());
        conversation.on_request(asks(Kind::Endpoints, &[], "1"));
        assert_eq!(conversation.held.get(&a), Some(&1));
        world.remove(&a);
        assert_eq!(told(&mut conversation, &world), [("2".into(), vec![], vec!["a".into()])]);
        let mut refusal = asks(Kind::Endpoints, &[], "2");
        refusal.error_detail = Some(envoy_types::pb::google::rpc::Status {
            message: "no".to_owned(),
            ..envoy_types::pb::google::rpc::Status::default()
        });
        assert_eq!(conversation.on_request(refusal).as_deref(), Some("ClusterLoadAssignment: no"));
        assert!(conversation.held.contains_key(&a));
    }
}
