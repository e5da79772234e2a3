//! Simulated proxies: raw delta streams that choose their member as our proxies do, hold what they are sent, and note
//! what must never happen to them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, ensure};
use ca::authn::JoinToken;
use ca::client::{CertificateSource, Remote};
use ca::identity::SpiffeId;
use ca::tls::{ExpectedIdentities, IdentityWatch};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use proxy::xds::decode::Address;
use proxy::xds::members::{Choice, Ended};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataMap;
use tonic::transport::{Endpoint, Uri};
use tonic::{Request, Status, Streaming};
use wire::members::{self, Hint};

use crate::netns::Machine;
use crate::registers::area;
use crate::{PATIENCE, eventually};

const CLUSTERS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const LISTENERS: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
/// Requests on their way; full means that the member does not read.
const REQUESTS: usize = 64;
/// A response with everything of a large mesh.
const MAX_MESSAGE: usize = 512 << 20;
/// The name that is asked for in handshakes; who answers is decided by its identity.
const SERVER_NAME: &str = "istiod.istio-system.svc";

/// Proxies with their streams.
#[derive(Debug)]
pub struct Proxies {
    seen: Arc<Mutex<Seen>>,
    count: usize,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// What happened to all of them.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Streams that are open now, by member.
    pub open: BTreeMap<SocketAddr, usize>,
    /// Responses.
    pub responses: usize,
    /// Streams that ended with a member that was killed.
    pub lost: usize,
    /// Streams that a member ended with a hint to go elsewhere.
    pub moved: usize,
    /// Streams that ended without a reason with a member that nothing was done to.
    pub cut: Vec<String>,
    /// Responses of an older revision than what the proxy had.
    pub backward: Vec<String>,
    /// The endpoints of each cluster: how often any proxy acknowledged some, and when one did last.
    pub endpoints: BTreeMap<String, (usize, Option<Instant>)>,
    /// Members that may lose their streams.
    dying: BTreeSet<SocketAddr>,
}

/// How the proxies reach the members.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// The xDS ports.
    pub members: Vec<SocketAddr>,
    /// The machine on which the proxies are, if it is not this one.
    pub machine: Option<Machine>,
    /// Join tokens, one for each namespace `area-0`, `area-1`, ...
    pub tokens: Vec<String>,
}

impl Proxies {
    /// Starts `count` proxies, spread evenly over the namespaces, and waits until all have a stream.
    ///
    /// # Errors
    ///
    /// When one has none.
    pub async fn start(fleet: Fleet, count: usize) -> anyhow::Result<Self> {
        let proxies =
            Self { seen: Arc::default(), count, stop: CancellationToken::new(), tasks: TaskTracker::new() };
        let mut identities = Vec::new();
        for token in &fleet.tokens {
            identities.push(proxies.identity(&fleet, token).await?);
        }
        for number in 0..count {
            let home = number.checked_rem(identities.len()).context("no namespace")?;
            let identity = identities.get(home).context("no identity")?;
            let control_plane = SpiffeId::control_plane(&identity.borrow().spiffe_id.trust_domain());
            let tls =
                ca::tls::client_config(identity.clone(), ExpectedIdentities::one(control_plane), &[b"h2"])?;
            let own = Proxy {
                node: node(number, &area(home))?,
                machine: fleet.machine.clone(),
                tls,
                seen: proxies.seen.clone(),
                held: Held::default(),
            };
            let addresses = fleet.members.iter().map(|member| Address::Socket(*member)).collect();
            proxies.tasks.spawn(own.live(addresses, proxies.stop.clone()));
        }
        proxies.all_open().await?;
        Ok(proxies)
    }

    /// What a join token makes of its bearer.
    async fn identity(&self, fleet: &Fleet, token: &str) -> anyhow::Result<IdentityWatch> {
        let token = JoinToken::parse(token)?;
        let source = CertificateSource {
            issuance: Remote::with_token(token),
            clock: Arc::new(now),
            store: None,
            lifetime: None,
            expected: None,
            rng: fastrand::Rng::new(),
        };
        let Some(machine) = fleet.machine.clone() else {
            return Ok(source.start(&self.tasks, self.stop.clone()).await?);
        };
        // The request is made by a runtime of that machine; nothing is renewed as soon as it has ended.
        let (tasks, stop) = (TaskTracker::new(), self.stop.clone());
        let asking = tokio::task::spawn_blocking(move || {
            machine.inside(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                Ok(runtime.block_on(source.start(&tasks, stop))?)
            })
        });
        asking.await?
    }

    /// Waits until every proxy has a stream.
    ///
    /// # Errors
    ///
    /// When some have none.
    pub async fn all_open(&self) -> anyhow::Result<()> {
        eventually(PATIENCE * 2, "every proxy has a stream", || async {
            let open = self.seen().open;
            ensure!(open.values().sum::<usize>() == self.count, "{open:?} of {}", self.count);
            Ok(())
        })
        .await
    }

    /// How often any proxy acknowledged endpoints of a cluster, and when one did last.
    #[must_use]
    pub fn endpoints(&self, cluster: &str) -> (usize, Option<Instant>) {
        lock(&self.seen).endpoints.get(cluster).copied().unwrap_or_default()
    }

    /// Says that a member is about to be killed, or runs again.
    pub fn dying(&self, member: SocketAddr, dying: bool) {
        let mut seen = lock(&self.seen);
        if dying {
            seen.dying.insert(member);
        } else {
            seen.dying.remove(&member);
        }
    }

    /// What happened so far.
    #[must_use]
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Ends all streams, and tells what happened.
    pub async fn finish(self) -> Seen {
        let seen = self.seen();
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        seen
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(clippy::disallowed_methods, reason = "the clock of the simulated proxies' certificates")]
fn now() -> SystemTime {
    SystemTime::now()
}

fn node(number: usize, namespace: &str) -> anyhow::Result<Node> {
    let [.., high, low] = number.to_be_bytes();
    let node = json!({
        "id": format!("sidecar~10.200.{high}.{low}~app-{number}.{namespace}~{namespace}.svc.cluster.local"),
        "metadata": {
            "NAMESPACE": namespace, "SERVICE_ACCOUNT": "default", "LABELS": {"app": format!("app-{number}")},
            "PROXY_KIND": "istio-proxy",
        },
    });
    wire::json::message_from_json(&node).context("not a node")
}

/// One proxy.
struct Proxy {
    node: Node,
    machine: Option<Machine>,
    tls: Arc<ClientConfig>,
    seen: Arc<Mutex<Seen>>,
    held: Held,
}

/// Versions of what it has, by type and name, and the clusters whose endpoints it wants.
#[derive(Debug, Default)]
struct Held {
    versions: BTreeMap<String, BTreeMap<String, String>>,
    wanted: BTreeSet<String>,
}

impl Proxy {
    /// Keeps a stream until `stop`.
    async fn live(mut self, members: Vec<Address>, stop: CancellationToken) {
        let mut choice = Choice::new(&self.node.id, members);
        let mut rng = fastrand::Rng::new();
        while let Some(address) = choice.next() {
            let Some(member) = address.socket() else { return };
            let ended = stop.run_until_cancelled(self.stream(member, &mut choice)).await;
            let Some(ended) = ended else { return };
            let pause = choice.on_end(&address, &ended, &mut rng);
            // paced: as our proxies are
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// One stream to its end.
    async fn stream(&mut self, member: SocketAddr, choice: &mut Choice) -> Ended {
        let opened = self.open(member, choice).await;
        let (mut responses, requests) = match opened {
            Ok((told, responses, requests)) => {
                choice.on_open();
                choice.on_members(&members::told(&told).unwrap_or_default());
                (responses, requests)
            }
            Err(status) => {
                return Hint::from_metadata(status.metadata()).map_or(Ended::Failed, Ended::Refused);
            }
        };
        *lock(&self.seen).open.entry(member).or_default() += 1;
        let ended = self.converse(member, &mut responses, &requests, choice).await;
        self.ended(member, ended)
    }

    /// Notes the end of a stream.
    fn ended(&self, member: SocketAddr, status: Status) -> Ended {
        let hint = Hint::from_metadata(status.metadata());
        let mut seen = lock(&self.seen);
        if let Some(open) = seen.open.get_mut(&member) {
            *open -= 1;
        }
        if seen.dying.contains(&member) {
            seen.lost += 1;
        } else if hint.is_some() {
            seen.moved += 1;
        } else {
            seen.cut.push(format!("{} by {member}: {status}", self.node.id));
        }
        Ended::Lost(hint)
    }

    /// Takes what comes until the stream ends, and says why it did.
    async fn converse(
        &mut self,
        member: SocketAddr,
        responses: &mut Streaming<DeltaDiscoveryResponse>,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
        choice: &mut Choice,
    ) -> Status {
        loop {
            let response = match responses.message().await {
                Ok(Some(response)) => response,
                Ok(None) => return Status::ok("ended"),
                Err(status) => return status,
            };
            let revision = response.system_version_info.parse().unwrap_or_default();
            {
                let mut seen = lock(&self.seen);
                seen.responses += 1;
                if choice.revision().is_some_and(|held| held > revision) {
                    let words = format!("{}: {:?}, then {revision}", self.node.id, choice.revision());
                    seen.backward.push(format!("{words} by {member}"));
                }
            }
            choice.on_revision(revision);
            for request in self.held.take(&response) {
                // Why nobody takes it any more is told instead of the next response.
                requests.send(request).await.unwrap_or_default();
            }
            if response.type_url == ENDPOINTS {
                let (now, mut seen) = (Instant::now(), lock(&self.seen));
                for resource in response.resources {
                    let (count, last) = seen.endpoints.entry(resource.name).or_default();
                    *count += 1;
                    *last = Some(now);
                }
            }
        }
    }

    async fn open(
        &self,
        member: SocketAddr,
        choice: &Choice,
    ) -> Result<(MetadataMap, Streaming<DeltaDiscoveryResponse>, mpsc::Sender<DeltaDiscoveryRequest>), Status>
    {
        let refused = |error: &dyn std::fmt::Display| Status::unavailable(error.to_string());
        let uri = Endpoint::from_shared(format!("http://{member}")).map_err(|e| refused(&e))?;
        let (machine, tls) = (self.machine.clone(), self.tls.clone());
        let connector = tower::service_fn(move |_: Uri| {
            let (machine, tls) = (machine.clone(), tls.clone());
            async move {
                let socket = match machine {
                    Some(machine) => machine.connect(member).await.map_err(std::io::Error::other)?,
                    None => TcpStream::connect(member).await?,
                };
                socket.set_nodelay(true)?;
                let name = ServerName::try_from(SERVER_NAME).map_err(std::io::Error::other)?;
                Ok::<_, std::io::Error>(TokioIo::new(TlsConnector::from(tls).connect(name, socket).await?))
            }
        });
        let connecting = tokio::time::timeout(PATIENCE, uri.connect_with_connector(connector));
        let channel = connecting.await.map_err(|e| refused(&e))?.map_err(|e| refused(&e))?;
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        for request in self.held.opening(&self.node) {
            requests.try_send(request).map_err(|e| refused(&e))?;
        }
        let mut request = Request::new(ReceiverStream::new(outgoing));
        request.metadata_mut().insert(members::REFUSALS, choice.refusals().into());
        if let Some(revision) = choice.revision() {
            request.metadata_mut().insert(members::REVISION, revision.into());
        }
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let (told, responses, _) = client.delta_aggregated_resources(request).await?.into_parts();
        Ok((told, responses, requests))
    }
}

impl Held {
    /// The first requests of a stream: who asks, and what it has already.
    fn opening(&self, node: &Node) -> Vec<DeltaDiscoveryRequest> {
        let first = |kind: &str, names: Vec<String>| DeltaDiscoveryRequest {
            node: Some(node.clone()),
            type_url: kind.to_owned(),
            resource_names_subscribe: names,
            initial_resource_versions: self
                .versions
                .get(kind)
                .into_iter()
                .flatten()
                .map(|(name, version)| (name.clone(), version.clone()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        };
        let mut opening = vec![first(CLUSTERS, Vec::new()), first(LISTENERS, Vec::new())];
        if !self.wanted.is_empty() {
            opening.push(first(ENDPOINTS, self.wanted.iter().cloned().collect()));
        }
        opening
    }

    /// Takes a response; gives its acknowledgement, and what is asked for because of it.
    fn take(&mut self, response: &DeltaDiscoveryResponse) -> Vec<DeltaDiscoveryRequest> {
        let has = self.versions.entry(response.type_url.clone()).or_default();
        for resource in &response.resources {
            has.insert(resource.name.clone(), resource.version.clone());
        }
        for name in &response.removed_resources {
            has.remove(name);
        }
        let mut answers = vec![DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        }];
        if response.type_url == CLUSTERS {
            let clusters = response.resources.iter().filter_map(|resource| resource.resource.as_ref());
            let dynamic = clusters.filter_map(|any| Cluster::decode(any.value.as_slice()).ok());
            let fresh: Vec<String> = dynamic
                .filter(|cluster| cluster.eds_cluster_config.is_some())
                .map(|cluster| cluster.name)
                .filter(|name| self.wanted.insert(name.clone()))
                .collect();
            if !fresh.is_empty() {
                answers.push(DeltaDiscoveryRequest {
                    type_url: ENDPOINTS.to_owned(),
                    resource_names_subscribe: fresh,
                    ..DeltaDiscoveryRequest::default()
                });
            }
        }
        answers
    }
}
