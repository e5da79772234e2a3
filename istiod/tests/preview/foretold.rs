//! The preview of a change is what proxies then receive: generated meshes and changes, the real push queue, the real
//! streams, and clients that behave as proxies do.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use istiod::preview::{Foreseen, ProxyChange, ResourceChange};
use istiod::publish::Update;
use istiod::push::queue::Queue;
use proptest::prelude::*;
use registry::config::Kind;
use registry::snapshot::Snapshot;
use registry::state::{Batch, Command, Delete, ObjectKey, Put, Revision, State};
use serde_json::{Value, json};
use tokio::sync::watch;
use xds::cache::{Interner, View};
use xds::proxy::Proxy;
use xds::resources::Type;
use xds::server::{Joined, resource_len};
use xds::stream::{Action, GRACE, Response, Stream, Variant};

type Name = (Type, String);

/// A proxy on a stream of its own, which accepts everything.
struct Client {
    proxy: Arc<Proxy>,
    variant: Variant,
    stream: Stream,
    views: watch::Receiver<Option<Arc<View>>>,
    has: BTreeMap<Name, u64>,
    /// What it had before it took the newest view.
    had: BTreeMap<Name, u64>,
    /// Of the last response of each type.
    nonces: BTreeMap<Type, String>,
    names: BTreeMap<Name, BTreeSet<String>>,
    asked: BTreeMap<Type, BTreeSet<String>>,
    sent: BTreeMap<Name, u64>,
    bytes: u64,
    now: Instant,
}

impl Client {
    fn delta(t: Type, answer: Option<&str>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: t.url().to_owned(),
            response_nonce: answer.unwrap_or_default().to_owned(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// The first request of a type, or the answer to a response.
    fn request(&mut self, t: Type, answer: Option<&str>) -> Vec<Action> {
        match self.variant {
            Variant::Delta => self.stream.on_delta(Self::delta(t, answer), self.now),
            Variant::StateOfTheWorld => self.whole(t),
        }
    }

    /// All that it asks for of a type, and the last response of it that it has.
    fn whole(&mut self, t: Type) -> Vec<Action> {
        let request = DiscoveryRequest {
            type_url: t.url().to_owned(),
            resource_names: self.asked.get(&t).into_iter().flatten().cloned().collect(),
            response_nonce: self.nonces.get(&t).cloned().unwrap_or_default(),
            ..DiscoveryRequest::default()
        };
        self.stream.on_whole(request, self.now)
    }

    fn start(&mut self) {
        for t in [Type::Cluster, Type::Listener] {
            let actions = self.request(t, None);
            self.settle(actions);
        }
    }

    /// Takes the newest view, and talks until both sides are at rest.
    fn catch_up(&mut self) {
        self.sent.clear();
        self.bytes = 0;
        self.had.clone_from(&self.has);
        let view = self.views.borrow_and_update().clone();
        let actions = view.map(|view| self.stream.on_view(view, self.now)).unwrap_or_default();
        self.settle(actions);
    }

    fn settle(&mut self, actions: Vec<Action>) {
        let mut due = VecDeque::from(actions);
        for _ in 0..10_000 {
            match due.pop_front() {
                Some(Action::Send(response)) => due.extend(self.take(&response)),
                Some(Action::Accepted { .. }) => {}
                Some(Action::Rejected(nack)) => panic!("{nack:?}"),
                None if self.stream.deadline(self.now).is_some() => {
                    self.now += GRACE;
                    due.extend(self.stream.on_tick(self.now));
                }
                None => return,
            }
        }
        panic!("the stream does not come to rest");
    }

    fn take(&mut self, response: &Response) -> Vec<Action> {
        let t = Type::from_url(&response.type_url).unwrap();
        let whole = self.variant == Variant::StateOfTheWorld;
        self.nonces.insert(t, response.nonce.clone());
        if whole && matches!(t, Type::Cluster | Type::Listener) {
            let named: BTreeSet<&str> = response.resources.iter().map(|r| r.name.as_str()).collect();
            self.has.retain(|(kind, name), _| *kind != t || named.contains(name.as_str()));
            self.names.retain(|(kind, name), _| *kind != t || named.contains(name.as_str()));
        }
        for resource in &response.resources {
            let name = (t, resource.name.clone());
            self.bytes += resource_len(self.variant, resource) as u64;
            // Said before the server has heard that it is not asked for any more.
            let asked = self.asked.get(&t).is_none_or(|asked| asked.contains(&resource.name));
            if whole && !asked {
                continue;
            }
            // A type comes whole in this form: what is new about it counts.
            if !whole || self.had.get(&name) != Some(&resource.version) {
                self.sent.insert(name.clone(), resource.version);
            }
            self.has.insert(name.clone(), resource.version);
            let json = wire::json::any_to_json(&resource.body).unwrap();
            self.names.insert(name, names_in(t, &json));
        }
        for name in &response.removed {
            self.has.remove(&(t, name.clone()));
            self.names.remove(&(t, name.clone()));
        }
        let mut actions = self.request(t, Some(&response.nonce));
        let child = match t {
            Type::Cluster => Type::Endpoint,
            Type::Listener => Type::Route,
            Type::Endpoint | Type::Route => return actions,
        };
        let named = self.names.iter().filter(|((kind, _), _)| *kind == t);
        let wanted: BTreeSet<String> = named.flat_map(|(_, names)| names.iter().cloned()).collect();
        let before = self.asked.insert(child, wanted.clone()).unwrap_or_default();
        if before != wanted {
            self.has.retain(|(kind, name), _| *kind != child || wanted.contains(name));
            let follow = DeltaDiscoveryRequest {
                resource_names_subscribe: wanted.difference(&before).cloned().collect(),
                resource_names_unsubscribe: before.difference(&wanted).cloned().collect(),
                ..Self::delta(child, None)
            };
            actions.extend(match self.variant {
                Variant::Delta => self.stream.on_delta(follow, self.now),
                Variant::StateOfTheWorld => self.whole(child),
            });
        }
        actions
    }
}

/// The resources that this one makes a client ask for.
fn names_in(t: Type, resource: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    match t {
        Type::Cluster if resource.get("type").and_then(Value::as_str) == Some("EDS") => {
            names.extend(resource.get("name").and_then(Value::as_str).map(str::to_owned));
        }
        Type::Listener => find(resource, "route_config_name", &mut names),
        Type::Cluster | Type::Endpoint | Type::Route => {}
    }
    names
}

fn find(value: &Value, key: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get(key).and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|value| find(value, key, found));
        }
        Value::Array(values) => values.iter().for_each(|value| find(value, key, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The control plane's side: state, snapshots and pushes.
struct Mesh {
    state: State,
    snapshot: Arc<Snapshot>,
    queue: Queue,
    interner: Interner,
    clients: Vec<Client>,
    now: Instant,
}

impl Mesh {
    fn new() -> Self {
        let state = State::default();
        let snapshot = Arc::new(Snapshot::build(&state));
        let now = tokio::time::Instant::now().into_std();
        let mut mesh = Self {
            queue: Queue::new(snapshot.clone()),
            state,
            snapshot,
            interner: Interner::default(),
            clients: Vec::new(),
            now,
        };
        // Our proxy and a stock Envoy, each in two namespaces, and stock Envoys on the other form of streams; 10.0.0.1
        // and 10.0.0.2 also serve.
        let (delta, whole) = (Variant::Delta, Variant::StateOfTheWorld);
        let all = [("a", true, delta), ("b", true, delta), ("a", false, delta), ("c", false, delta)];
        for (key, (namespace, native, variant)) in
            (1..).zip(all.into_iter().chain([("a", false, whole), ("b", false, whole)]))
        {
            mesh.join(key, (namespace, native, variant));
        }
        mesh.push();
        mesh.clients.iter_mut().for_each(Client::start);
        mesh
    }

    fn join(&mut self, key: u64, (namespace, native, variant): (&str, bool, Variant)) {
        let node = json!({
            "id": format!("sidecar~10.0.0.{key}~app-{key}.{namespace}~{namespace}.svc.cluster.local"),
            "metadata": {
                "LABELS": {"app": format!("x{}", key % 2)}, "PROXY_KIND": if native { "istio-proxy" } else { "" },
            },
        });
        let proxy = Proxy::from_node(&wire::json::message_from_json(&node).unwrap(), None).unwrap();
        let proxy = Arc::new(proxy);
        let (views, receiver) = watch::channel(None);
        self.queue.join(Joined { key, proxy: proxy.clone(), views }, self.now);
        self.clients.push(Client {
            stream: Stream::new(variant, proxy.native),
            proxy,
            variant,
            views: receiver,
            has: BTreeMap::new(),
            had: BTreeMap::new(),
            nonces: BTreeMap::new(),
            names: BTreeMap::new(),
            asked: BTreeMap::new(),
            sent: BTreeMap::new(),
            bytes: 0,
            now: self.now,
        });
    }

    fn commit(&mut self, batch: &Batch) {
        let (changes, _) = self.state.apply(Revision(self.state.revision().0 + 1), batch);
        self.snapshot = Arc::new(Snapshot::next(&self.snapshot, &self.state, &changes));
        self.queue.update(Update { snapshot: self.snapshot.clone(), changes, committed: self.now });
        self.queue.flush(self.now);
        self.push();
    }

    fn push(&mut self) {
        while let Some(job) = self.queue.next_job() {
            let done = job.run(&self.interner);
            self.queue.done(done);
        }
        self.clients.iter_mut().for_each(Client::catch_up);
    }
}

/// One object out of a few that meet each other, or its absence.
fn object(r: [u8; 6]) -> (Option<String>, ObjectKey) {
    let namespace = ["a", "b", "istio-system"][usize::from(r[1] % 3)];
    let (host, other) = (format!("h{}.example", r[2] % 3), format!("h{}.example", r[3] % 3));
    let name = format!("n{}", r[4] % 2);
    let export = ["*", ".", "b"][usize::from(r[5] % 3)];
    let mut spec = String::new();
    let kind = match r[0] % 8 {
        0..=2 => {
            let resolution = ["STATIC", "DNS"][usize::from(r[4] / 128)];
            let address =
                if r[4] / 128 == 1 { "d.example".to_owned() } else { format!("10.0.0.{}", r[3] % 5) };
            write!(
                spec,
                "hosts: [{host}], exportTo: ['{export}'], location: MESH_INTERNAL, resolution: {resolution}, \
                 ports: [{{number: 80, name: http, protocol: HTTP}}, {{number: 90, name: tcp, protocol: TCP}}], \
                 endpoints: [{{address: {address}, labels: {{version: v{}}}}}]",
                r[5] % 2
            )
            .unwrap();
            Kind::ServiceEntry
        }
        3 => {
            write!(
                spec,
                "hosts: [{host}], exportTo: ['{export}'], http: [{{timeout: {}s, route: [{{destination: {{host: {other}}}}}]}}]",
                r[3] % 4 + 1
            )
            .unwrap();
            Kind::VirtualService
        }
        4 => {
            write!(
                spec,
                "host: {host}, exportTo: ['{export}'], trafficPolicy: {{loadBalancer: {{simple: {}}}}}, \
                 subsets: [{{name: v1, labels: {{version: v{}}}}}]",
                ["ROUND_ROBIN", "RANDOM"][usize::from(r[3] % 2)],
                r[5] % 2
            )
            .unwrap();
            Kind::DestinationRule
        }
        5 => {
            write!(spec, "mtls: {{mode: {}}}", ["STRICT", "PERMISSIVE"][usize::from(r[3] % 2)]).unwrap();
            Kind::PeerAuthentication
        }
        6 => {
            write!(
                spec,
                "workloadSelector: {{labels: {{app: x{}}}}}, egress: [{{hosts: ['*/{host}']}}]",
                r[3] % 2
            )
            .unwrap();
            Kind::Sidecar
        }
        _ => {
            write!(
                spec,
                "selector: {{matchLabels: {{app: x{}}}}}, action: DENY, rules: [{{to: [{{operation: {{paths: [/p{}]}}}}]}}]",
                r[3] % 2,
                r[5] % 2
            )
            .unwrap();
            Kind::AuthorizationPolicy
        }
    };
    let key = ObjectKey { kind, namespace: namespace.to_owned(), name: name.clone() };
    let text = format!(
        "{{apiVersion: {}, kind: {}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {{{spec}}}}}",
        kind.api_version(),
        kind.as_str()
    );
    (r[5].is_multiple_of(5).then_some(()).map_or(Some(text), |()| None), key)
}

fn batch(objects: &[[u8; 6]]) -> Batch {
    let (mut puts, mut deletes) = (Vec::new(), Vec::new());
    for (text, key) in objects.iter().map(|r| object(*r)) {
        match text {
            Some(text) => {
                let (objects, _) = registry::config::parse("generated", &text).expect("is valid");
                puts.extend(objects.into_iter().map(|o| Put { object: Arc::new(o), expected: None }));
            }
            None => deletes.push(Delete { key, expected: None }),
        }
    }
    Batch { time_ms: 1000, author: "test".to_owned(), commands: vec![Command::Change { puts, deletes }] }
}

/// What a preview says that a proxy is sent, and what it loses. What is the same is told of streams that bring only what
/// is sent.
fn foretold(variant: Variant, change: Option<ProxyChange>) -> (BTreeMap<Name, u64>, BTreeSet<Name>, u64) {
    let (mut sent, mut removed) = (BTreeMap::new(), BTreeSet::new());
    let bytes = change.as_ref().map_or(0, |change| change.bytes);
    for (name, change) in change.into_iter().flat_map(|change| change.resources) {
        match change {
            ResourceChange::Resent(_) if variant == Variant::StateOfTheWorld => {}
            ResourceChange::Added(after)
            | ResourceChange::Changed { after, .. }
            | ResourceChange::Resent(after) => _ = sent.insert(name, after.version),
            ResourceChange::Removed(_) => _ = removed.insert(name),
        }
    }
    (sent, removed, bytes)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_preview_of_a_change_is_what_proxies_then_receive(
        base in proptest::collection::vec(any::<[u8; 6]>(), 0..14),
        changes in proptest::collection::vec(proptest::collection::vec(any::<[u8; 6]>(), 1..4), 1..6),
    ) {
        let mut mesh = Mesh::new();
        mesh.commit(&batch(&base));
        for change in &changes {
            let change = batch(change);
            let foreseen = Foreseen::of(&mesh.state, mesh.snapshot.clone(), &change);
            let told: Vec<_> =
                mesh.clients.iter().map(|c| foretold(c.variant, foreseen.on(&c.proxy, c.variant))).collect();
            let had: Vec<_> = mesh.clients.iter().map(|client| client.has.clone()).collect();
            mesh.commit(&change);
            for ((client, had), (sent, removed, bytes)) in mesh.clients.iter().zip(had).zip(told) {
                let id = &client.proxy.id;
                let lost: BTreeSet<Name> =
                    had.into_keys().filter(|name| !client.has.contains_key(name)).collect();
                prop_assert_eq!(&client.sent, &sent, "sent to {}", id);
                prop_assert_eq!(lost, removed, "lost by {}", id);
                // A type of the other form may come twice: before and after the proxy has asked for more of it.
                let exact = client.variant == Variant::Delta;
                prop_assert!(client.bytes == bytes || !exact && client.bytes >= bytes, "bytes to {}", id);
            }
        }
    }
}
