//! Properties of the translation that hold for every mesh.

#![expect(clippy::expect_used, reason = "a test that cannot be set up must fail")]

#[path = "golden/support.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use registry::snapshot::Snapshot;
use serde_json::{Map, Value, json};
use xds::proxy::Proxy;
use xds::resources::{Resource, Resources, Type};
use xds::translate::{endpoints, translate, visible_hosts};

/// The meshes of the golden files: settings, objects, node.
fn documents() -> Vec<Map<String, Value>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).expect("golden files").flatten().map(|e| e.path()).collect();
    files.sort();
    files
        .into_iter()
        .filter(|file| file.extension().is_some_and(|e| e == "yaml"))
        .map(|file| {
            let text = std::fs::read_to_string(file).expect("a readable file");
            serde_saphyr::from_str(&text).expect("YAML")
        })
        .collect()
}

fn objects(document: &Map<String, Value>) -> Vec<Value> {
    document.get("objects").and_then(Value::as_array).cloned().unwrap_or_default()
}

fn versions(resources: &Resources) -> BTreeMap<(Type, &str), (u64, &[u8])> {
    let all = resources.by_type.iter();
    all.flat_map(|(kind, all)| {
        all.iter().map(|(n, r)| ((*kind, n.as_str()), (r.version, r.body.value.as_slice())))
    })
    .collect()
}

/// What listeners and clusters ask for by name is there.
fn check_references(resources: &Resources) {
    let shown = support::resources_as_json(resources);
    let of = |kind: &str| shown.get(kind).and_then(Value::as_object).cloned().unwrap_or_default();
    let (clusters, assignments, routes) = (of("Cluster"), of("Endpoint"), of("Route"));
    let eds: BTreeSet<&String> =
        clusters.iter().filter(|(_, c)| c["type"] == "EDS").map(|(n, _)| n).collect();
    assert_eq!(eds, assignments.keys().collect(), "every EDS cluster has endpoints, and nothing else does");
    let mut wanted = BTreeSet::new();
    for listener in of("Listener").values() {
        find(listener, "route_config_name", &mut wanted);
        let mut forwards = BTreeSet::new();
        find(listener, "cluster", &mut forwards);
        for cluster in forwards {
            let subset = cluster.split('|').nth(2).is_some_and(|subset| !subset.is_empty());
            assert!(subset || clusters.contains_key(&cluster), "{cluster} is missing");
        }
    }
    assert_eq!(
        wanted,
        routes.keys().cloned().collect(),
        "every named route configuration is there, and no other"
    );
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

fn check(snapshot: &Snapshot, proxy: &Proxy) {
    let (first, second) = (translate(snapshot, proxy), translate(snapshot, proxy));
    assert_eq!(versions(&first), versions(&second), "the same bytes twice");
    check_references(&first);
    let hosts = visible_hosts(snapshot, proxy);
    let alone: BTreeMap<String, Arc<Resource>> =
        endpoints(snapshot, proxy, &hosts).into_iter().map(|r| (r.name.clone(), r)).collect();
    assert_eq!(Some(&alone), first.by_type.get(&Type::Endpoint), "endpoints alone are the same endpoints");
}

#[test]
fn every_golden_mesh_translates_the_same_way_twice_and_names_only_what_exists() {
    for document in documents() {
        let snapshot = support::mesh(document.get("mesh"), &objects(&document));
        check(&snapshot, &support::proxy(document.get("proxy").expect("a proxy")));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any mixture of the objects of all golden files, in any order, for any of their proxies.
    #[test]
    fn any_mesh_translates_the_same_way_twice_and_names_only_what_exists(
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..24),
        node in any::<prop::sample::Index>(),
    ) {
        let documents = documents();
        let pool: Vec<Value> = documents.iter().flat_map(objects).collect();
        let chosen: Vec<Value> = picks.iter().map(|index| index.get(&pool).clone()).collect();
        let snapshot = support::mesh(None, &chosen);
        check(&snapshot, &support::proxy(node.get(&documents).get("proxy").expect("a proxy")));
    }
}

#[test]
fn a_large_mesh_translates_and_says_how_long_it_takes() {
    const SERVICES: usize = 1000;
    let service = |n: usize| {
        let endpoints: Vec<Value> = (0..10)
            .map(|e| {
                json!({"address": format!("10.{}.{}.{}", n / 250, n % 250, e + 1), "serviceAccount": "sa",
                    "labels": {"app": format!("s{n}"), "version": "v1"}})
            })
            .collect();
        json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
            "metadata": {"name": format!("s{n}"), "namespace": "default"},
            "spec": {"hosts": [format!("s{n}.default.svc.cluster.local")], "location": "MESH_INTERNAL",
                "resolution": "STATIC", "ports": [{"number": 9080, "name": "http", "protocol": "HTTP"}],
                "endpoints": endpoints}})
    };
    let all: Vec<Value> = (0..SERVICES).map(service).collect();
    let snapshot = support::mesh(None, &all);
    let proxy = support::proxy(&json!({"id": "sidecar~10.9.9.9~a.default~default.svc.cluster.local"}));
    let (resources, took) = timed(|| translate(&snapshot, &proxy));
    let bytes: usize =
        resources.by_type.values().flat_map(BTreeMap::values).map(|r| r.body.value.len()).sum();
    let one = BTreeSet::from(["s7.default.svc.cluster.local".to_owned()]);
    let (few, alone) = timed(|| endpoints(&snapshot, &proxy, &one));
    println!("{SERVICES} services x 10 endpoints: {bytes} bytes in {took:?}; endpoints of one: {alone:?}");
    assert_eq!(resources.by_type.get(&Type::Endpoint).map(BTreeMap::len), Some(SERVICES));
    assert_eq!(few.len(), 1);
}

#[expect(clippy::disallowed_methods, reason = "only printed")]
fn timed<T>(work: impl FnOnce() -> T) -> (T, std::time::Duration) {
    let start = std::time::Instant::now();
    let out = work();
    (out, start.elapsed())
}
