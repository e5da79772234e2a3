//! What a push costs one stream: 1,000 clusters with 10 endpoints each, and what sharing saves.
//!
//! `cargo bench -p xds --bench push` prints the figures; nothing is asserted.

#![expect(clippy::print_stdout, reason = "the figures are the point")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use envoy_types::pb::google::protobuf::Any;
use tokio::time::Instant;
use xds::cache::{Interner, View};
use xds::resources::{Resource, Resources, Type};
use xds::stream::{Action, Stream, Variant};

const CLUSTERS: u64 = 1_000;
const ROUNDS: u32 = 200;
/// The size of a cluster, and of ten endpoints, as they are encoded.
const BYTES: usize = 900;

fn main() {
    let interner = Interner::default();
    let first = interner.share(view(1, 0));
    let mut stream = Stream::new(Variant::Delta, true);
    let time = measure(|| {
        stream = Stream::new(Variant::Delta, true);
        connect(&mut stream, &first);
    });
    println!("connect and take {CLUSTERS} clusters and their endpoints: {:?}", time / ROUNDS);

    let mut changed = 0;
    let time = measure(|| {
        changed += 1;
        let next =
            Arc::new(first.clone().with(Type::Endpoint, interner.map(Type::Endpoint, &endpoints(changed))));
        let actions = stream.on_view(next, Instant::now().into_std());
        accept(&mut stream, actions);
    });
    println!("share, send and accept one changed set of endpoints: {:?}", time / ROUNDS);

    let same = Arc::new(first.clone().at(9));
    accept_all(&mut stream, same.clone());
    let time = measure(|| accept_all(&mut stream, same.clone()));
    println!("a view that changes nothing: {:?}", time / ROUNDS);

    let mut views: Vec<_> = (0..ROUNDS).map(|_| view(1, 0)).collect();
    let time = measure(|| drop(views.pop().map(|view| interner.share(view))));
    println!("share a view that others hold already: {:?}", time / ROUNDS);
}

fn measure(mut work: impl FnMut()) -> Duration {
    let start = Instant::now();
    (0..ROUNDS).for_each(|_| work());
    start.elapsed()
}

fn name(cluster: u64) -> String {
    format!("outbound|80||service-{cluster:04}.default.svc.cluster.local")
}

fn map(t: Type, version: impl Fn(u64) -> u64) -> BTreeMap<String, Arc<Resource>> {
    let resource = |cluster| {
        let body = Any { type_url: t.url().to_owned(), value: vec![7; BYTES] };
        (name(cluster), Arc::new(Resource { name: name(cluster), version: version(cluster), body }))
    };
    (0..CLUSTERS).map(resource).collect()
}

/// The endpoints, of which one set has this version.
fn endpoints(version: u64) -> Arc<BTreeMap<String, Arc<Resource>>> {
    Arc::new(map(Type::Endpoint, |cluster| if cluster == 500 { version } else { 0 }))
}

fn view(revision: u64, version: u64) -> View {
    let clusters = map(Type::Cluster, |_| version);
    let endpoints = map(Type::Endpoint, |_| 0);
    let by_type = BTreeMap::from([(Type::Cluster, clusters), (Type::Endpoint, endpoints)]);
    View::new(revision, Resources { by_type })
}

fn connect(stream: &mut Stream, view: &View) {
    let now = Instant::now().into_std();
    let ask = |t: Type, names: Vec<String>| DeltaDiscoveryRequest {
        type_url: t.url().to_owned(),
        resource_names_subscribe: names,
        ..DeltaDiscoveryRequest::default()
    };
    let mut actions = stream.on_view(Arc::new(view.clone()), now);
    actions.extend(stream.on_delta(ask(Type::Cluster, Vec::new()), now));
    actions.extend(stream.on_delta(ask(Type::Endpoint, (0..CLUSTERS).map(name).collect()), now));
    actions.extend(stream.on_delta(ask(Type::Listener, Vec::new()), now));
    accept(stream, actions);
}

fn accept_all(stream: &mut Stream, view: Arc<View>) {
    let actions = stream.on_view(view, Instant::now().into_std());
    accept(stream, actions);
}

fn accept(stream: &mut Stream, mut actions: Vec<Action>) {
    while let Some(action) = actions.pop() {
        if let Action::Send(response) = action {
            let answer = DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                ..DeltaDiscoveryRequest::default()
            };
            actions.extend(stream.on_delta(answer, Instant::now().into_std()));
        }
    }
}
