//! What instances of a catalog say of themselves, and what the mesh makes of it.

use registry::model::service::Health;
use serde_json::json;

use crate::world::{MINUTE, SECOND, address, json_of, of_web, registration, web};

#[test]
fn instances_without_a_usable_address_or_port_are_told_and_others_serve() {
    let mut world = web();
    for (n, (address, port)) in
        [("0.0.0.0", 80), ("db.example.com", 80), ("::", 80), ("10.0.0.9", 0)].into_iter().enumerate()
    {
        let mut body = registration("web", &format!("bad{n}"), address, "passing");
        body["Service"]["Port"] = json!(port);
        world.put(&body);
    }
    world.register("web", "v6", "2001:db8::1");
    let mut nodes = registration("web", "node", "", "passing");
    nodes["Address"] = json!("10.0.0.77");
    world.put(&nodes);
    world.run(SECOND);
    assert_eq!(world.addresses("web"), ["10.0.0.1", "10.0.0.77", "2001:db8::1"]);
    assert_eq!(world.status().problems.len(), 4, "{:?}", world.status().problems);
}

#[test]
fn the_same_id_on_two_nodes_is_two_instances() {
    let mut world = web();
    let mut body = registration("web", "w1", "10.0.0.2", "passing");
    body["Node"] = json!("another-node");
    world.put(&body);
    world.run(SECOND);
    assert_eq!(world.addresses("web"), ["10.0.0.1", "10.0.0.2"]);
}

#[test]
fn tags_in_another_order_are_the_same() {
    let mut world = web();
    let published = world.published.len();
    let mut body = registration("web", "w1", "10.0.0.1", "passing");
    body["Service"]["Tags"] = json!(["b", "a"]);
    world.put(&body);
    world.run(MINUTE);
    assert_eq!(world.published.len(), published);
}

#[test]
fn a_megabyte_of_metadata_reaches_no_proxy() {
    let mut world = web();
    let mut body = registration("web", "w1", "10.0.0.1", "passing");
    body["Service"]["Meta"] = json!({"big": "x".repeat(1 << 20), "version": "v1"});
    world.put(&body);
    world.run(SECOND);
    let labels = world.endpoints("web")[0].labels.clone();
    assert_eq!(labels.get("version").map(String::as_str), Some("v1"));
    assert!(labels.values().all(|value| value.len() < 64));
}

#[test]
fn names_with_capitals_underscores_and_dots_become_hosts_and_collisions_are_told() {
    let mut world = web();
    for (n, name) in ["Db", "my_app", "a.b", "my-app", "ü"].into_iter().enumerate() {
        world.register(name, &format!("x{n}"), &address(n + 50));
    }
    world.run(SECOND);
    let expect = ["a-b", "db", "my-app", "web"].map(|name| format!("{name}.service.consul"));
    assert_eq!(world.hosts(), expect);
    let problems = world.status().problems;
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems.iter().any(|told| told.starts_with("my_app: has the same host as the service my-app")));
}

#[test]
fn maintenance_drains() {
    let mut world = web();
    let mut body = registration("web", "w1", "10.0.0.1", "passing");
    body["Checks"] = json!([{"CheckID": "_node_maintenance", "Name": "m", "Status": "critical"}]);
    world.put(&body);
    world.run(SECOND);
    assert_eq!(world.endpoints("web")[0].health, Health::Draining);
}

#[test]
fn weights_that_are_missing_are_one() {
    let mut world = web();
    world.fault = Some(Box::new(|_, request, mut response| {
        if of_web(request) {
            let mut body = json_of(&response);
            body[0]["Service"].as_object_mut().unwrap().remove("Weights");
            response.body = body.to_string().into_bytes();
        }
        Some(response)
    }));
    world.check("web", "w1", "10.0.0.1", "warning");
    world.run(SECOND);
    assert_eq!(world.endpoints("web")[0].weight, 1);
    let mut body = registration("db", "d", "10.0.1.1", "warning");
    body["Service"]["Weights"] = json!({"Passing": 10, "Warning": 3});
    world.put(&body);
    world.run(SECOND);
    assert_eq!(world.endpoints("db")[0].weight, 3);
}

#[test]
fn what_the_mesh_wrote_itself_does_not_come_back() {
    let mut world = web();
    for (service, id) in [("web", "mine"), ("payments", "other")] {
        let mut body = registration(service, id, "10.0.5.5", "passing");
        body["Service"]["Meta"] = json!({"mesh-owner": "me"});
        world.put(&body);
    }
    world.run(SECOND);
    assert_eq!(world.addresses("web"), ["10.0.0.1"]);
    assert_eq!(world.hosts(), ["web.service.consul"]);
    // Nor when it goes.
    world.deregister("other");
    for _ in 0..50 {
        world.run(SECOND);
        assert_eq!(world.hosts(), ["web.service.consul"]);
    }
}
