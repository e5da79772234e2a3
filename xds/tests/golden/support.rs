//! Meshes and proxies for tests of the translation.

use registry::config::Object;
use registry::snapshot::Snapshot;
use registry::state::{Batch, Command, Revision, State};
use serde_json::{Map, Value, json};
use xds::proxy::Proxy;
use xds::resources::{Resources, Type};

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
