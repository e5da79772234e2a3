//! Meshes and what one proxy is told about them: `tests/golden/*.yaml`.
//!
//! A file holds `proxy` (the node it sends), `mesh` (`MeshConfig`, optional), `objects` (in order of creation), and
//! `expect`: from `<type> <resource name> <JSON pointer>` to the value there, `null` when there is none; `<type> *` is
//! the list of all names of a type. `UPDATE=1` rewrites the values; `GOLDEN_BOOTSTRAPS=DIR` writes each file's
//! resources there as an Envoy bootstrap, for `envoy --mode validate`.

#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot be set up must fail")]

#[path = "golden/support.rs"]
mod support;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use support::{mesh, proxy, resources_as_json};

#[test]
fn every_golden_file_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder of golden files")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    assert!(files.len() >= 25, "only {} golden files", files.len());
    let update = update();
    let failures: Vec<String> = files.iter().flat_map(|file| check(file, update)).collect();
    assert!(failures.is_empty(), "\n{}\nUPDATE=1 rewrites what is expected", failures.join("\n"));
}

fn check(file: &Path, update: bool) -> Vec<String> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let text = std::fs::read_to_string(file).expect("a readable file");
    let document: Map<String, Value> =
        serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    let expected = document.get("expect").and_then(Value::as_object).cloned().unwrap_or_default();
    let found = translated(&document);
    write_bootstrap(&name, &found);
    let mut failures = Vec::new();
    let mut now = Map::new();
    for (key, wanted) in expected {
        let value = look_up(&found, &key);
        if value != wanted {
            failures.push(format!("{name}: {key}\n  expected {wanted}\n  found    {value}"));
        }
        now.insert(key, value);
    }
    if update && !failures.is_empty() {
        rewrite(file, &text, &now);
        return Vec::new();
    }
    failures
}

fn translated(document: &Map<String, Value>) -> Value {
    let objects = document.get("objects").and_then(Value::as_array).cloned().unwrap_or_default();
    let snapshot = mesh(document.get("mesh"), &objects);
    let proxy = proxy(document.get("proxy").unwrap_or(&Value::Null));
    resources_as_json(&xds::translate::translate(&snapshot, &proxy))
}

fn look_up(found: &Value, key: &str) -> Value {
    let mut parts = key.splitn(3, ' ');
    let of_type = found.get(parts.next().unwrap_or_default()).unwrap_or(&Value::Null);
    let name = parts.next().unwrap_or_default();
    if name == "*" {
        return of_type.as_object().map_or(Value::Null, |all| json!(all.keys().collect::<Vec<_>>()));
    }
    let resource = of_type.get(name).unwrap_or(&Value::Null);
    resource.pointer(parts.next().unwrap_or_default()).cloned().unwrap_or_default()
}

/// Keeps everything before `expect:`, comments included.
fn rewrite(file: &Path, text: &str, now: &Map<String, Value>) {
    let kept = text.split("\nexpect:").next().unwrap_or_default();
    let mut out = format!("{kept}\nexpect:\n");
    for (key, value) in now {
        let short = value.to_string();
        let shown = if short.len() > 100 {
            let pretty = serde_json::to_string_pretty(value).expect("JSON");
            format!("\n    {}", pretty.replace('\n', "\n    "))
        } else {
            format!(" {short}")
        };
        writeln!(out, "  {}:{shown}", json!(key)).expect("a string takes everything");
    }
    std::fs::write(file, out).expect("a writable file");
}

/// Whether expectations are to be rewritten.
fn update() -> bool {
    std::env::var_os("UPDATE").is_some_and(|value| value == "1")
}

/// Writes the resources as a static bootstrap, when a folder for it is given.
fn write_bootstrap(name: &str, resources: &Value) {
    let Some(folder) = std::env::var_os("GOLDEN_BOOTSTRAPS") else { return };
    let of = |kind: &str| -> Vec<Value> {
        let all = resources.get(kind).and_then(Value::as_object).cloned().unwrap_or_default();
        all.into_iter().map(|(_, value)| without_type(value)).collect()
    };
    let grpc = |name: &str| {
        json!({"name": name, "connect_timeout": "1s", "type": "STATIC", "http2_protocol_options": {},
            "load_assignment": {"cluster_name": name}})
    };
    let mut clusters = of("Cluster");
    for cluster in &mut clusters {
        let name = cluster["name"].as_str().unwrap_or_default().to_owned();
        let endpoints = resources.get("Endpoint").and_then(|all| all.get(&name)).cloned();
        if let (Some(fields), Some(endpoints)) = (cluster.as_object_mut(), endpoints) {
            fields.shift_remove("eds_cluster_config");
            fields.insert("type".to_owned(), json!("STATIC"));
            fields.insert("load_assignment".to_owned(), without_type(endpoints));
        }
    }
    clusters.extend([grpc("xds-grpc"), grpc("sds-grpc")]);
    let mut listeners = of("Listener");
    let routes = of("Route").into_iter().enumerate().map(|(index, route)| {
        let manager = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "routes", "route_config": route,
            "http_filters": [{"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
        });
        json!({"name": format!("routes-{index}"),
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 20000 + index}},
            "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]})
    });
    listeners.extend(routes);
    let source = json!({"api_type": "GRPC", "transport_api_version": "V3",
        "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}]});
    let bootstrap = json!({
        "node": {"id": "test", "cluster": "test"},
        "dynamic_resources": {"ads_config": source},
        "static_resources": {"clusters": clusters, "listeners": listeners},
    });
    let path = std::path::Path::new(&folder).join(name.replace(".yaml", ".json"));
    std::fs::write(path, bootstrap.to_string()).expect("a writable folder");
}

fn without_type(mut value: Value) -> Value {
    if let Some(fields) = value.as_object_mut() {
        fields.shift_remove("@type");
    }
    value
}
