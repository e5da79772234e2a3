//! One service with instances in a Consul catalog and on machines of the mesh.

#![allow(clippy::unwrap_used, reason = "what is not there has failed the test")]

use std::collections::BTreeSet;

use registry::config::{Kind, Object};
use registry::model::service::{Endpoint, Health, TlsMode};
use registry::snapshot::Snapshot;
use registry::source::Catalog;
use registry::source::consul::answer::{self, Instance};
use registry::source::consul::convert::{Converted, Mapping, convert};
use registry::source::diff;
use registry::state::{Batch, Command, Revision, State};
use serde_json::json;

const HOST: &str = "web.service.consul";

fn instance(address: &str, port: u16, meta: serde_json::Value) -> Instance {
    let body = json!([{
        "Node": {"Node": "n", "Address": "10.0.0.1"},
        "Service": {"ID": address, "Service": "web", "Address": address, "Port": port, "Meta": meta},
    }]);
    answer::instances(body.to_string().as_bytes()).unwrap().remove(0)
}

/// What a catalog and a `ServiceEntry` of these ports make together.
fn merged(instances: &[Instance], ports: serde_json::Value) -> Snapshot {
    let mut state = State::default();
    let mapping = Mapping::new("consul", "dc1");
    let Converted { service, endpoints, .. } = convert("web", instances, &mapping, None);
    let service = registry::model::service::Service { hostname: HOST.into(), ..service };
    let catalog =
        Catalog { services: [(HOST.into(), service)].into(), endpoints: [(HOST.into(), endpoints)].into() };
    let commands = diff(&mapping.source(), &Catalog::default(), &catalog);
    apply(&mut state, 1, commands);
    let entry = json!({
        "hosts": [HOST], "location": "MESH_INTERNAL", "resolution": "STATIC", "ports": ports,
        "endpoints": [{"address": "10.9.0.1", "serviceAccount": "web-vm", "locality": "dc1/z9"}],
    });
    let text = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "web", "namespace": "consul"}, "spec": entry,
    });
    let (objects, _): (Vec<Object>, _) =
        registry::config::parse_in("consul", "test", &text.to_string()).unwrap();
    assert!(objects.iter().all(|object| object.kind == Kind::ServiceEntry));
    apply(&mut state, 2, Batch::put_objects(0, "", objects).commands);
    Snapshot::build(&state)
}

fn apply(state: &mut State, revision: u64, commands: Vec<Command>) {
    state.apply(Revision(revision), &Batch { time_ms: 1_000, author: String::new(), commands });
}

fn told(endpoint: &Endpoint) -> (&str, Option<u16>, &str, TlsMode, Health) {
    let port = endpoint.ports.values().next().copied();
    (&endpoint.address, port, &endpoint.service_account, endpoint.tls_mode, endpoint.health)
}

#[test]
fn instances_of_both_serve_with_their_own_identities_and_localities() {
    let instances =
        [instance("10.0.0.1", 80, json!({"protocol": "http", "mesh-service-account": "web-consul"}))];
    let snapshot = merged(&instances, json!([{"number": 80, "name": "http", "protocol": "HTTP"}]));
    let endpoints = snapshot.endpoints(HOST);
    let all: Vec<_> = endpoints.iter().map(told).collect();
    let expect = [
        ("10.0.0.1", None, "web-consul", TlsMode::Istio, Health::Healthy),
        ("10.9.0.1", None, "web-vm", TlsMode::Istio, Health::Healthy),
    ];
    assert_eq!(all, expect);
    let localities: BTreeSet<String> = endpoints.iter().map(|e| e.locality.to_string()).collect();
    assert_eq!(localities, ["dc1".to_owned(), "dc1/z9".to_owned()].into());
    let identities = snapshot.identities(HOST);
    assert!(
        ["web-consul", "web-vm"].iter().all(|who| identities.iter().any(|id| id.ends_with(who))),
        "{identities:?}"
    );
    assert_eq!(snapshot.conflicts().count(), 0);
}

#[test]
fn the_older_declaration_says_ports_and_protocols_and_what_differs_is_told() {
    let instances = [instance("10.0.0.1", 8080, json!({"protocol": "grpc"}))];
    let snapshot = merged(&instances, json!([{"number": 80, "name": "http", "protocol": "HTTP"}]));
    let service = snapshot.service(HOST, None).unwrap();
    assert_eq!((service.ports.len(), service.ports[0].number), (1, 8080), "the catalog was first");
    let all: Vec<_> = snapshot.endpoints(HOST).iter().map(|e| (told(e).0, told(e).1)).collect();
    assert_eq!(all, [("10.0.0.1", None), ("10.9.0.1", Some(80))]);
    let reasons: Vec<&str> = snapshot.conflicts().map(|conflict| conflict.reason).collect();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].contains("protocol") && reasons[1].contains("number"), "{reasons:?}");
}

#[test]
fn endpoints_that_lack_a_port_are_left_out_and_told() {
    let mut two = instance("10.0.0.1", 80, json!({}));
    two.ports = vec![
        answer::Port { name: "http".into(), number: 80, default: true },
        answer::Port { name: "admin".into(), number: 81, default: false },
    ];
    let snapshot = merged(&[two], json!([{"number": 80, "name": "http", "protocol": "HTTP"}]));
    assert_eq!(snapshot.endpoints(HOST).len(), 1);
    assert!(snapshot.conflicts().next().unwrap().reason.contains("lacks a port"));
}

#[test]
fn a_catalog_without_instances_takes_the_ports_of_the_configuration() {
    let snapshot = merged(&[], json!([{"number": 80, "name": "http", "protocol": "HTTP"}]));
    assert_eq!(snapshot.service(HOST, None).unwrap().ports[0].number, 80);
    assert_eq!(snapshot.endpoints(HOST).len(), 1);
}
