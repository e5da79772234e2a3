//! Whatever is pushed, acknowledged and rejected in whatever order: the client ends with what it should have.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::google::rpc::Status;
use proptest::prelude::*;
use xds::cache::View;
use xds::resources::{Resources, Type};
use xds::stream::{Action, GRACE, Response, Stream, Sync, Variant, version_text};

use super::conversation::resource;

/// Resources whose version is a multiple of this are bad: the client rejects them.
const BAD: u64 = 7;

/// A mesh: services by name with the version of their cluster, endpoints and route.
type Mesh = BTreeMap<u8, (u64, u64, u64)>;

/// The view of a mesh: a cluster, endpoints and a route for each service, one listener for each route.
fn view(revision: u64, mesh: &Mesh) -> View {
    let mut resources = Resources::default();
    for (service, (cluster, endpoints, route)) in mesh {
        let mut put = |t, name: String, version| {
            let map: &mut BTreeMap<_, _> = resources.by_type.entry(t).or_default();
            map.insert(name.clone(), resource(&name, version));
        };
        put(Type::Cluster, format!("c{service}"), *cluster);
        put(Type::Endpoint, format!("c{service}"), *endpoints);
        put(Type::Listener, format!("r{service}"), *endpoints);
        put(Type::Route, format!("r{service}"), *route);
    }
    View::new(revision, resources)
}

/// A client as the protocol describes one: it asks for the endpoints of its clusters and the routes of its
/// listeners, takes the good part of a response, and rejects the bad.
struct Client {
    variant: Variant,
    names_culprit: bool,
    has: BTreeMap<Type, BTreeMap<String, u64>>,
    subscribed: BTreeMap<Type, BTreeSet<String>>,
    versions: BTreeMap<Type, String>,
    nonces: BTreeMap<Type, String>,
    inbox: VecDeque<Response>,
}

impl Client {
    fn start(&mut self, stream: &mut Stream, now: Instant) -> Vec<Action> {
        self.inbox.clear();
        self.nonces.clear();
        let mut actions = Vec::new();
        for t in Type::ALL {
            let names: Vec<String> = self.subscribed.entry(t).or_default().iter().cloned().collect();
            if names.is_empty() && matches!(t, Type::Endpoint | Type::Route) {
                continue;
            }
            actions.extend(match self.variant {
                Variant::Delta => {
                    let has = self.has.entry(t).or_default().iter();
                    let has = has.map(|(name, version)| (name.clone(), version_text(*version)));
                    let request = DeltaDiscoveryRequest {
                        type_url: t.url().to_owned(),
                        resource_names_subscribe: names,
                        initial_resource_versions: has.collect(),
                        ..DeltaDiscoveryRequest::default()
                    };
                    stream.on_delta(request, now)
                }
                Variant::StateOfTheWorld => {
                    let request = DiscoveryRequest {
                        type_url: t.url().to_owned(),
                        version_info: self.versions.get(&t).cloned().unwrap_or_default(),
                        resource_names: names,
                        ..DiscoveryRequest::default()
                    };
                    stream.on_whole(request, now)
                }
            });
        }
        actions
    }

    /// Takes one response and answers it.
    fn digest(&mut self, stream: &mut Stream, now: Instant) -> Vec<Action> {
        let Some(response) = self.inbox.pop_front() else { return Vec::new() };
        let t = Type::from_url(&response.type_url).unwrap();
        let bad: Vec<_> = response.resources.iter().filter(|r| r.version % BAD == 0).collect();
        // What it did not ask for, or no longer, it does not look at.
        let asked = self.subscribed.entry(t).or_default();
        let named = matches!(t, Type::Endpoint | Type::Route);
        let good: BTreeMap<String, u64> = response
            .resources
            .iter()
            .filter(|r| r.version % BAD != 0 && (!named || asked.contains(&r.name)))
            .map(|r| (r.name.clone(), r.version))
            .collect();
        let error = (!bad.is_empty()).then(|| match self.names_culprit {
            true => bad.iter().map(|r| format!("{}: bad", r.name)).collect::<Vec<_>>().join(", "),
            false => "bad".to_owned(),
        });
        self.nonces.insert(t, response.nonce.clone());
        // A client that does not say which is bad takes nothing at all of the response.
        if error.is_none() || self.names_culprit {
            let has = self.has.entry(t).or_default();
            if self.variant == Variant::StateOfTheWorld && matches!(t, Type::Cluster | Type::Listener) {
                let listed: BTreeSet<&String> = response.resources.iter().map(|r| &r.name).collect();
                has.retain(|name, _| listed.contains(name));
            }
            has.extend(good);
            for name in &response.removed {
                has.remove(name);
            }
        }
        match error {
            None => _ = self.versions.insert(t, response.version.clone()),
            Some(_) => _ = self.versions.remove(&t), // what it has now is no version's content
        }
        let mut actions = self.answer(stream, t, error, now);
        match t {
            Type::Cluster => actions.extend(self.follow(stream, Type::Cluster, Type::Endpoint, now)),
            Type::Listener => actions.extend(self.follow(stream, Type::Listener, Type::Route, now)),
            Type::Endpoint | Type::Route => {}
        }
        actions
    }

    fn answer(&mut self, stream: &mut Stream, t: Type, error: Option<String>, now: Instant) -> Vec<Action> {
        let error_detail = error.map(|message| Status { code: 3, message, details: Vec::new() });
        let response_nonce = self.nonces.get(&t).cloned().unwrap_or_default();
        match self.variant {
            Variant::Delta => {
                let type_url = t.url().to_owned();
                let request =
                    DeltaDiscoveryRequest { type_url, response_nonce, error_detail, ..Default::default() };
                stream.on_delta(request, now)
            }
            Variant::StateOfTheWorld => {
                let request = DiscoveryRequest {
                    type_url: t.url().to_owned(),
                    version_info: self.versions.get(&t).cloned().unwrap_or_default(),
                    resource_names: self.subscribed.entry(t).or_default().iter().cloned().collect(),
                    response_nonce,
                    error_detail,
                    ..DiscoveryRequest::default()
                };
                stream.on_whole(request, now)
            }
        }
    }

    /// Asks for what the resources of `parent` name.
    fn follow(&mut self, stream: &mut Stream, parent: Type, child: Type, now: Instant) -> Vec<Action> {
        let wanted: BTreeSet<String> = self.has.entry(parent).or_default().keys().cloned().collect();
        let before = std::mem::replace(self.subscribed.entry(child).or_default(), wanted.clone());
        if before == wanted {
            return Vec::new();
        }
        self.has.entry(child).or_default().retain(|name, _| wanted.contains(name));
        match self.variant {
            Variant::Delta => {
                let request = DeltaDiscoveryRequest {
                    type_url: child.url().to_owned(),
                    resource_names_subscribe: wanted.difference(&before).cloned().collect(),
                    resource_names_unsubscribe: before.difference(&wanted).cloned().collect(),
                    ..DeltaDiscoveryRequest::default()
                };
                stream.on_delta(request, now)
            }
            Variant::StateOfTheWorld => self.answer(stream, child, None, now),
        }
    }

    /// Every route's cluster is there, and once it was given endpoints it keeps them.
    fn check_nothing_dangles(&self) {
        let has = |t| self.has.get(&t).into_iter().flatten().map(|(name, _)| name.get(1..).unwrap());
        let clusters: BTreeSet<&str> = has(Type::Cluster).collect();
        for route in has(Type::Route) {
            assert!(clusters.contains(route), "route r{route} names a cluster that the client does not have");
        }
    }
}

#[derive(Debug, Clone)]
enum Event {
    Push(Mesh),
    Digest,
    Reconnect,
    Wait(u64),
}

fn mesh(bad: bool) -> impl Strategy<Value = Mesh> {
    let version = move || (1..9u64).prop_map(move |v| if v == BAD && !bad { 1 } else { v });
    proptest::collection::btree_map(0..5u8, (version(), version(), version()), 0..5)
}

fn event(bad: bool) -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => mesh(bad).prop_map(Event::Push),
        6 => Just(Event::Digest),
        1 => Just(Event::Reconnect),
        1 => (0..700u64).prop_map(Event::Wait),
    ]
}

struct Run {
    stream: Stream,
    client: Client,
    view: Arc<View>,
    now: Instant,
    sent: usize,
}

impl Run {
    fn new(variant: Variant, names_culprit: bool, native: bool) -> Self {
        let client = Client {
            variant,
            names_culprit,
            has: BTreeMap::new(),
            subscribed: BTreeMap::new(),
            versions: BTreeMap::new(),
            nonces: BTreeMap::new(),
            inbox: VecDeque::new(),
        };
        let now = tokio::time::Instant::now().into_std();
        let view = Arc::new(view(0, &Mesh::new()));
        let mut run = Self { stream: Stream::new(variant, native), client, view, now, sent: 0 };
        run.reconnect(native);
        run
    }

    fn reconnect(&mut self, native: bool) {
        self.stream = Stream::new(self.client.variant, native);
        let actions = self.client.start(&mut self.stream, self.now);
        self.take(actions);
        let actions = self.stream.on_view(self.view.clone(), self.now);
        self.take(actions);
    }

    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            if let Action::Send(response) = action {
                self.sent += 1;
                let same =
                    self.client.inbox.iter().filter(|other| other.type_url == response.type_url).count();
                assert_eq!(same, 0, "two responses of one type are on their way");
                self.client.inbox.push_back(response);
            }
        }
    }

    fn digest(&mut self) {
        let actions = self.client.digest(&mut self.stream, self.now);
        self.take(actions);
    }

    fn push(&mut self, view: View) {
        self.view = Arc::new(view);
        let actions = self.stream.on_view(self.view.clone(), self.now);
        self.take(actions);
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        let actions = self.stream.on_tick(self.now);
        self.take(actions);
    }

    fn settle(&mut self) {
        for _ in 0..500 {
            while !self.client.inbox.is_empty() {
                self.digest();
            }
            match self.stream.deadline(self.now) {
                Some(at) => {
                    self.now = at;
                    let actions = self.stream.on_tick(at);
                    self.take(actions);
                }
                None => return,
            }
        }
        panic!("the stream does not come to rest");
    }

    fn wanted(&self, t: Type) -> BTreeMap<String, u64> {
        self.view.of(t).iter().map(|(name, r)| (name.clone(), r.version)).collect()
    }
}

fn play(variant: Variant, native: bool, names_culprit: bool, events: Vec<Event>) -> Run {
    let mut run = Run::new(variant, names_culprit, native);
    let mut revision = 0;
    for event in events {
        match event {
            Event::Push(mesh) => {
                revision += 1;
                run.push(view(revision, &mesh));
            }
            Event::Digest => run.digest(),
            Event::Reconnect => run.reconnect(native),
            Event::Wait(ms) => run.wait(Duration::from_millis(ms)),
        }
    }
    run
}

fn variant() -> impl Strategy<Value = Variant> {
    prop_oneof![Just(Variant::Delta), Just(Variant::StateOfTheWorld)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_client_that_accepts_everything_ends_with_exactly_the_view(
        variant in variant(),
        native in any::<bool>(),
        events in proptest::collection::vec(event(false), 0..60),
    ) {
        let mut run = play(variant, native, true, events);
        run.settle();
        for t in Type::ALL {
            prop_assert_eq!(run.client.has.entry(t).or_default().clone(), run.wanted(t), "{:?}", t);
        }
        prop_assert_eq!(run.stream.synced_revision(), run.view.revision());
        // And then there is silence.
        let sent = run.sent;
        run.wait(GRACE * 2);
        run.settle();
        prop_assert_eq!(run.sent, sent);
    }

    #[test]
    fn a_route_never_names_a_cluster_that_the_client_lacks(
        variant in variant(),
        events in proptest::collection::vec(event(false), 0..60),
    ) {
        let mut run = Run::new(variant, true, true);
        let mut revision = 0;
        for event in events {
            match event {
                Event::Push(mesh) => {
                    revision += 1;
                    run.push(view(revision, &mesh));
                }
                Event::Digest => run.digest(),
                Event::Wait(_) | Event::Reconnect => {}
            }
            run.client.check_nothing_dangles();
        }
    }

    #[test]
    fn bad_resources_are_rejected_once_and_hold_up_nothing_else(
        variant in variant(),
        names_culprit in any::<bool>(),
        events in proptest::collection::vec(event(true), 0..60),
    ) {
        let mut run = play(variant, true, names_culprit, events);
        run.settle();
        for t in [Type::Cluster, Type::Listener] {
            let has = run.client.has.entry(t).or_default().clone();
            for (name, version) in run.wanted(t) {
                if version % BAD != 0 {
                    prop_assert_eq!(has.get(&name), Some(&version), "{:?} {}", t, name);
                } else {
                    prop_assert_eq!(run.stream.report().types.get(&t).map(|r| r.sync), Some(Sync::Nacked));
                }
            }
        }
        let sent = run.sent;
        run.wait(GRACE * 2);
        run.settle();
        prop_assert_eq!(run.sent, sent, "rejected resources are not tried again");
    }
}

/// What any bytes that decode could say.
fn any_request()
-> impl Strategy<Value = (usize, Vec<String>, Vec<String>, BTreeMap<String, String>, String, bool)> {
    let name = || prop_oneof![Just("*".to_owned()), Just(String::new()), "[ar][0-4]"];
    let nonce = prop_oneof![Just(String::new()), "[0-3]-[1-9]", ".{0,8}"];
    (
        0..5usize,
        proptest::collection::vec(name(), 0..4),
        proptest::collection::vec(name(), 0..4),
        proptest::collection::btree_map(name(), ".{0,16}", 0..3),
        nonce,
        any::<bool>(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn nothing_that_a_client_says_breaks_the_stream(
        variant in variant(),
        requests in proptest::collection::vec((any_request(), mesh(true)), 0..40),
    ) {
        let now = tokio::time::Instant::now().into_std();
        let mut stream = Stream::new(variant, false);
        for (revision, ((kind, names, dropped, versions, nonce, refuses), mesh)) in requests.into_iter().enumerate() {
            let url = Type::ALL.get(kind).map_or("some.other/Type", |t| t.url());
            let error = refuses.then(|| Status { code: 3, message: names.join(" "), details: Vec::new() });
            let actions = match variant {
                Variant::Delta => stream.on_delta(DeltaDiscoveryRequest {
                    type_url: url.to_owned(),
                    resource_names_subscribe: names,
                    resource_names_unsubscribe: dropped,
                    initial_resource_versions: versions.into_iter().collect(),
                    response_nonce: nonce,
                    error_detail: error,
                    ..DeltaDiscoveryRequest::default()
                }, now),
                Variant::StateOfTheWorld => stream.on_whole(DiscoveryRequest {
                    version_info: versions.into_keys().collect(),
                    type_url: url.to_owned(),
                    resource_names: names,
                    response_nonce: nonce,
                    error_detail: error,
                    ..DiscoveryRequest::default()
                }, now),
            };
            prop_assert!(actions.len() <= 8, "a request is answered by a handful of responses");
            let revision = u64::try_from(revision).unwrap();
            stream.on_view(Arc::new(view(revision, &mesh)), now);
            prop_assert!(stream.synced_revision() <= revision);
            drop((stream.report(), stream.held()));
        }
    }
}
