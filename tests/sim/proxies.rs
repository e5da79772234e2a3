//! Proxies: each has one delta stream to some member, moves to another when that one is gone, and never goes back.
//!
//! The member's side of a stream is the one that istiod serves with; the proxy accepts everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use registry::snapshot::Snapshot;
use xds::cache::View;
use xds::proxy::{Interception, Proxy as Node};
use xds::resources::Type;
use xds::stream::{Action, Response, Stream, Variant, version_text};
use xds::translate::translate;

use crate::ledger::{Broken, Check};
use crate::world::{Happening, World};

/// The mean time between two looks of a proxy at its stream, in microseconds.
const LOOK_US: u64 = 300_000;

/// One proxy.
pub(crate) struct Proxy {
    node: Node,
    stream: Option<Connection>,
    /// The highest revision of anything that it was sent.
    revision: u64,
    /// By type and name, the version that it holds.
    held: BTreeMap<Type, BTreeMap<String, u64>>,
}

struct Connection {
    member: u64,
    life: u64,
    stream: Stream,
    /// The revision of the view that the stream was given last.
    given: Option<u64>,
    /// Whose endpoints were asked for.
    asked: BTreeSet<String>,
}

impl Proxy {
    /// A sidecar that nobody has configured yet.
    pub(crate) fn new(number: usize) -> Self {
        let node = Node {
            id: format!("sidecar~10.1.0.{number}~app-{number}.shop~shop.svc.cluster.local"),
            name: format!("app-{number}"),
            workload: "app".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "app".to_owned(),
            identity: None,
            labels: BTreeMap::new(),
            addresses: Vec::new(),
            cluster: "default".to_owned(),
            network: String::new(),
            locality: registry::model::service::Locality::default(),
            interception: Interception::Captured,
            inbound_forward: BTreeMap::new(),
            native: true,
        };
        Self { node, stream: None, revision: 0, held: BTreeMap::new() }
    }

    fn connect(&mut self, member: u64, life: u64, now: Instant) -> Check {
        let stream = Stream::new(Variant::Delta, true);
        self.stream = Some(Connection { member, life, stream, given: None, asked: BTreeSet::new() });
        for t in [Type::Cluster, Type::Listener] {
            let has = self.held.get(&t).into_iter().flatten();
            let request = DeltaDiscoveryRequest {
                type_url: t.url().to_owned(),
                resource_names_subscribe: vec!["*".to_owned()],
                initial_resource_versions: has
                    .map(|(name, version)| (name.clone(), version_text(*version)))
                    .collect(),
                ..DeltaDiscoveryRequest::default()
            };
            self.say(request, now)?;
        }
        self.ask_endpoints(now)
    }

    /// Asks for the endpoints of the clusters that it has come to know.
    fn ask_endpoints(&mut self, now: Instant) -> Check {
        let known: BTreeSet<String> =
            self.held.get(&Type::Cluster).map(|held| held.keys().cloned().collect()).unwrap_or_default();
        let Some(connection) = &mut self.stream else { return Ok(()) };
        let new: Vec<String> = known.difference(&connection.asked).cloned().collect();
        let gone: Vec<String> = connection.asked.difference(&known).cloned().collect();
        if new.is_empty() && gone.is_empty() {
            return Ok(());
        }
        connection.asked = known;
        let held = self.held.entry(Type::Endpoint).or_default();
        held.retain(|name, _| !gone.contains(name));
        let has = new.iter().filter_map(|name| Some((name.clone(), version_text(*held.get(name)?))));
        let request = DeltaDiscoveryRequest {
            type_url: Type::Endpoint.url().to_owned(),
            initial_resource_versions: has.collect(),
            resource_names_subscribe: new,
            resource_names_unsubscribe: gone,
            ..DeltaDiscoveryRequest::default()
        };
        self.say(request, now)
    }

    fn say(&mut self, request: DeltaDiscoveryRequest, now: Instant) -> Check {
        let Some(connection) = &mut self.stream else { return Ok(()) };
        let actions = connection.stream.on_delta(request, now);
        self.hear(actions, now)
    }

    fn hear(&mut self, actions: Vec<Action>, now: Instant) -> Check {
        for action in actions {
            if let Action::Send(response) = action {
                let request = DeltaDiscoveryRequest {
                    type_url: response.type_url.clone(),
                    response_nonce: response.nonce.clone(),
                    ..DeltaDiscoveryRequest::default()
                };
                let clusters = response.type_url == Type::Cluster.url();
                self.take(response)?;
                self.say(request, now)?;
                if clusters {
                    self.ask_endpoints(now)?;
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, response: Response) -> Check {
        if response.revision < self.revision {
            let seen = format!("{} holds {} and is sent {}", self.node.id, self.revision, response.revision);
            return Err(Broken::new("revisions of a proxy only grow", seen));
        }
        self.revision = response.revision;
        let Some(t) = Type::from_url(&response.type_url) else { return Ok(()) };
        let held = self.held.entry(t).or_default();
        for resource in response.resources {
            let known = held.insert(resource.name.clone(), resource.version);
            if known == Some(resource.version) {
                let seen = format!("{} is sent {}, which it has", self.node.id, resource.name);
                return Err(Broken::new("a proxy is sent only what it lacks", seen));
            }
        }
        held.retain(|name, _| !response.removed.contains(name));
        Ok(())
    }

    /// The stream is given what the proxy should hold, and the time.
    fn look(&mut self, snapshot: &Snapshot, now: Instant) -> Check {
        let revision = snapshot.revision().0;
        let Some(connection) = &mut self.stream else { return Ok(()) };
        let actions = if connection.given == Some(revision) {
            connection.stream.on_tick(now)
        } else {
            connection.given = Some(revision);
            connection.stream.on_view(View::new(revision, translate(snapshot, &self.node)).into(), now)
        };
        self.hear(actions, now)
    }

    /// Whether it holds just what a snapshot means for it.
    fn holds(&self, snapshot: &Snapshot) -> Check {
        let wanted = translate(snapshot, &self.node);
        for t in [Type::Cluster, Type::Listener] {
            let wanted = wanted.by_type.get(&t).into_iter().flatten();
            let wanted: BTreeMap<String, u64> =
                wanted.map(|(name, resource)| (name.clone(), resource.version)).collect();
            if self.held.get(&t).cloned().unwrap_or_default() != wanted {
                let seen = format!(
                    "{} at {}, given {:?} by a member, holds {:?} of {t:?} and should hold {wanted:?}",
                    self.node.id,
                    self.revision,
                    self.stream.as_ref().map(|connection| (connection.member, connection.given)),
                    self.held.get(&t)
                );
                return Err(Broken::new("a proxy comes to hold what the mesh says", seen));
            }
        }
        Ok(())
    }
}

impl World {
    /// A proxy looks at its stream, or for a member to open one to.
    pub(crate) fn proxy_looks(&mut self, number: usize) -> Check {
        let pause = 1 + self.rng.u64(0..LOOK_US * 2);
        self.after(pause, Happening::Proxy(number));
        let (cuts, mut running, clock) = (self.rng.u32(0..20) == 0, self.running(), self.clock());
        // Who was never taken in is never ready, and serves nobody.
        running.retain(|id| self.ledger.ever().contains(id));
        let next = self.rng.choice(running);
        let Some(proxy) = self.proxies.get_mut(number) else { return Ok(()) };
        let alive = proxy.stream.as_ref().is_some_and(|connection| {
            let member = self.members.get(&connection.member).filter(|member| member.running.is_some());
            member.is_some_and(|member| member.life == connection.life)
        });
        if !alive || cuts {
            proxy.stream = None;
        }
        let at = proxy.stream.as_ref().map(|connection| connection.member).or(next);
        let Some(member) = at.and_then(|id| self.members.get(&id)) else { return Ok(()) };
        let Some(running) = &member.running else { return Ok(()) };
        let snapshot: Arc<Snapshot> = running.machine.snapshot();
        if proxy.stream.is_none() {
            if snapshot.revision().0 < proxy.revision {
                return Ok(()); // the member is behind and refuses it
            }
            proxy.connect(member.id, member.life, clock)?;
        }
        proxy.look(&snapshot, clock)
    }

    /// Whether all proxies hold what the leader's snapshot means for them.
    pub(crate) fn proxies_agree(&self) -> Check {
        let running = self.leader().and_then(|id| self.members.get(&id)?.running.as_ref());
        let Some(running) = running else { return Ok(()) };
        let snapshot = running.machine.snapshot();
        self.proxies.iter().try_for_each(|proxy| proxy.holds(&snapshot))
    }
}
