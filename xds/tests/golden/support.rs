//! Meshes and proxies for tests of the translation.

use registry::config::Object;
use registry::snapshot::Snapshot;
use registry::state::{Batch, Command, Revision, State};
use serde_json::{Map, Value, json};
use xds::proxy::Proxy;
use xds::resources::{Resources, Type};

/// Whether expectations are to be rewritten.
pub(crate) fn update() -> bool {
    std::env::var_os("UPDATE").is_some_and(|value| value == "1")
}

/// The mesh of these objects, created in this order, a second apart.
pub(crate) fn mesh(settings: Option<&Value>, objects: &[Value]) -> Snapshot {
    let mut state = State::default();
    let mut revision = 0;
    let mut apply = |batch: &Batch| {
        revision += 1;
        state.apply(Revision(revision), batch);
    };
    if let Some(config) = settings {
        let commands = vec![Command::PutMesh { config: config.clone() }];
        apply(&Batch { time_ms: 0, author: "test".to_owned(), commands });
    }
    for (index, value) in objects.iter().enumerate() {
        let object = Object::from_stored(value).expect("an object of a known kind");
        let seconds = i64::try_from(index).expect("few objects") + 1;
        apply(&Batch::put_objects(seconds * 1000, "test", [object]));
    }
    Snapshot::build(&state)
}

/// The proxy that sends this node.
pub(crate) fn proxy(node: &Value) -> Proxy {
    let node = wire::json::message_from_json(node).expect("a node");
    Proxy::from_node(&node, None).expect("a proxy of the mesh")
}

/// Resources by type and name.
pub(crate) fn resources_as_json(resources: &Resources) -> Value {
    let types = resources.by_type.iter().map(|(kind, all)| {
        let name = match kind {
            Type::Cluster => "Cluster",
            Type::Endpoint => "Endpoint",
            Type::Listener => "Listener",
            Type::Route => "Route",
        };
        let of_type: Map<String, Value> = all
            .iter()
            .map(|(name, resource)| {
                let value = wire::json::any_to_json(&resource.body).expect("a known message");
                (name.clone(), value)
            })
            .collect();
        (name.to_owned(), json!(of_type))
    });
    Value::Object(types.collect())
}

/// Writes the resources as a static bootstrap, when a folder for it is given.
pub(crate) fn write_bootstrap(name: &str, resources: &Value) {
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
