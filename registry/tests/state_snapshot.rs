//! Which object holds for whom: one table per rule of precedence.

#[path = "state/support.rs"]
mod support;

use std::net::IpAddr;
use std::sync::Arc;

use registry::config::{Kind, Object};
use registry::model::security::MutualTlsMode::{self, Disable, Permissive, Strict};
use registry::model::service::{Health, Locality, Location, Protocol, Resolution, SourceId, TlsMode};
use registry::model::traffic::TrafficPolicy;
use registry::snapshot::{Snapshot, Typed};
use registry::state::Command;
use serde_json::{Value, json};
use support::{Mesh, endpoint, labels, object, put, registration, service, workload_key};

fn names<T>(objects: &[Typed<T>]) -> Vec<String> {
    objects.iter().map(|(object, _)| format!("{}/{}", object.namespace, object.name)).collect()
}

fn hosts(services: &[Arc<registry::model::service::Service>]) -> Vec<&str> {
    services.iter().map(|service| service.hostname.as_str()).collect()
}

fn entry(id: &str, spec: Value) -> Object {
    let mut whole = json!({"ports": [{"number": 80, "name": "http"}], "resolution": "STATIC", "location": "MESH_INTERNAL"});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    object(Kind::ServiceEntry, id, whole)
}

// ---- services -------------------------------------------------------------------------

#[test]
fn a_kubernetes_service_beats_any_service_entry_and_else_the_oldest_wins() {
    let kubernetes = service("x.com", "b", SourceId::Kubernetes("k".into()));
    let mesh = Mesh::default().with(vec![
        entry("a/old", json!({"hosts": ["x.com"]})),
        entry("c/young", json!({"hosts": ["x.com"]})),
    ]);
    let best = |mesh: &Mesh, ns| mesh.snapshot.service("x.com", ns).unwrap().namespace.clone();
    assert_eq!(best(&mesh, None), "a");
    assert_eq!(best(&mesh, Some("c")), "c", "its own namespace's first");
    assert_eq!(best(&mesh, Some("z")), "a");
    let mesh = mesh.and(Command::PutService { service: Arc::new(kubernetes) });
    assert_eq!(best(&mesh, None), "b");
    assert_eq!(best(&mesh, Some("z")), "b");
    assert_eq!(best(&mesh, Some("a")), "a");

    let squatter = Mesh::default()
        .with(vec![entry("b/squatter", json!({"hosts": ["x.com"], "endpoints": [{"address": "6.6.6.6"}]}))])
        .and(Command::PutService {
            service: Arc::new(service("x.com", "b", SourceId::Kubernetes("k".into()))),
        });
    assert!(squatter.snapshot.endpoints("x.com").is_empty(), "they are never merged");
    let conflict = squatter.snapshot.conflicts().next().unwrap();
    assert_eq!((conflict.loser.as_str(), conflict.namespace.as_str()), ("squatter", "b"));
}

#[test]
fn clusters_of_one_platform_share_their_endpoints() {
    let source = |id: &str| SourceId::Kubernetes(id.into());
    let mut mesh = Mesh::default();
    for (id, address) in [("k1", "10.0.0.1"), ("k2", "10.0.0.2")] {
        mesh.apply(vec![
            Command::PutService { service: Arc::new(service("x.com", "a", source(id))) },
            Command::ReplaceEndpoints {
                host: "x.com".into(),
                source: source(id),
                endpoints: vec![endpoint(address)],
            },
        ]);
    }
    assert_eq!(mesh.snapshot.endpoints("x.com").len(), 2);
    assert_eq!(mesh.snapshot.conflicts().count(), 0);
}

#[test]
fn service_entries_are_merged_only_when_all_but_ports_and_endpoints_is_equal() {
    let with = |port: u16, extra: Value| {
        let mut spec = json!({"hosts": ["x.com"], "ports": [{"number": port, "name": format!("http-{port}")}],
            "endpoints": [{"address": format!("10.0.0.{port}")}]});
        spec.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec
    };
    let ports = |mesh: &Mesh| -> Vec<u16> {
        mesh.snapshot.service("x.com", None).unwrap().ports.iter().map(|p| p.number).collect()
    };
    for (extra, merged) in [
        (json!({}), true),
        (json!({"exportTo": ["."]}), false),
        (json!({"resolution": "DNS"}), false),
        (json!({"location": "MESH_EXTERNAL"}), false),
    ] {
        let mesh = Mesh::default()
            .with(vec![entry("a/one", with(81, json!({}))), entry("a/two", with(82, extra.clone()))]);
        assert_eq!(ports(&mesh), if merged { vec![81, 82] } else { vec![81] }, "{extra}");
        assert_eq!(mesh.snapshot.endpoints("x.com").len(), if merged { 2 } else { 1 }, "{extra}");
        assert_eq!(mesh.snapshot.conflicts().count(), usize::from(!merged), "{extra}");
    }
}

#[test]
fn a_service_entry_says_all_about_its_service() {
    let mut declared = entry(
        "shop/pay",
        json!({"hosts": ["Pay.shop.svc.cluster.local", "*.pay.example.com"],
        "addresses": ["10.1.1.1/32", "10.2.0.0/16"],
        "ports": [
            {"number": 80, "name": "web", "protocol": "HTTP", "targetPort": 8080},
            {"number": 3306, "name": "db"},
            {"number": 90, "name": "grpc-x"},
        ],
        "subjectAltNames": ["spiffe://cluster.local/ns/shop/sa/pay"],
        "endpoints": [
            {"address": "10.0.0.1", "serviceAccount": "pay", "weight": 3, "locality": "r/z/s", "network": "n1",
             "ports": {"web": 9090, "unknown": 1}, "labels": {"version": "v1"}},
            {"address": "10.0.0.2", "labels": {"istio-locality": "r.z2"}, "ports": {"web": 8080}},
            {"address": "10.0.0.3", "labels": {"security.istio.io/tlsMode": "istio"}},
            {"address": "10.0.0.4", "serviceAccount": "pay", "labels": {"security.istio.io/tlsMode": "disabled"}},
            {"address": "unix:///run/pay.sock", "ports": {"web": 1}},
        ]}),
    );
    declared.labels = labels("team=pay");
    let mesh = Mesh { seconds: 77, ..Mesh::default() }.with(vec![declared]);
    let snapshot = &mesh.snapshot;
    let service = snapshot.service("pay.shop.svc.cluster.local", None).unwrap();
    assert_eq!((service.name.as_str(), service.namespace.as_str(), service.created), ("pay", "shop", 77));
    assert_eq!((service.resolution, service.location), (Resolution::Static, Location::Internal));
    assert_eq!(service.addresses, ["10.1.1.1", "10.2.0.0/16"]);
    assert_eq!(service.export_to, ["*"]);
    assert_eq!(service.labels, labels("team=pay"));
    let ports: Vec<_> = service.ports.iter().map(|p| (p.number, p.target_port, p.protocol)).collect();
    let expect = [(80, Some(8080), Protocol::Http), (3306, None, Protocol::Tcp), (90, None, Protocol::Grpc)];
    assert_eq!(ports, expect);
    let wildcard = snapshot.service("*.pay.example.com", None).unwrap();
    assert_eq!(wildcard.name, "*.pay.example.com");
    assert_ne!(wildcard.vip_index, service.vip_index);

    let endpoints = snapshot.endpoints("pay.shop.svc.cluster.local");
    let told: Vec<_> = endpoints.iter().map(|e| (e.address.as_str(), e.weight, e.tls_mode)).collect();
    let expect = [
        ("10.0.0.1", 3, TlsMode::Istio),
        ("10.0.0.2", 1, TlsMode::Disabled),
        ("10.0.0.3", 1, TlsMode::Istio),
        ("10.0.0.4", 1, TlsMode::Disabled),
        ("unix:///run/pay.sock", 1, TlsMode::Disabled),
    ];
    assert_eq!(told, expect);
    assert_eq!(endpoints[0].locality, Locality::parse("r/z/s"));
    assert_eq!(endpoints[0].ports, [("web".to_owned(), 9090)].into());
    assert_eq!(endpoints[1].locality, Locality::parse("r/z2"));
    assert!(endpoints[1].ports.is_empty(), "its own port is the service's target port anyway");
    assert!(endpoints[4].ports.is_empty(), "a Unix socket has no port");
    let identities: Vec<_> = snapshot.identities("pay.shop.svc.cluster.local").iter().cloned().collect();
    assert_eq!(identities, ["spiffe://cluster.local/ns/shop/sa/pay"]);
}

#[test]
fn resolution_decides_where_endpoints_come_from() {
    let spec = |resolution: &str, endpoints: Value| {
        json!({"hosts": ["x.com"], "resolution": resolution, "location": "MESH_EXTERNAL", "endpoints": endpoints,
            "ports": [{"number": 443, "name": "https", "targetPort": 8443}]})
    };
    for (resolution, endpoints, expect) in [
        ("NONE", json!([]), vec![]),
        ("DYNAMIC_DNS", json!([]), vec![]),
        ("DNS", json!([]), vec!["x.com"]),
        ("DNS_ROUND_ROBIN", json!([]), vec!["x.com"]),
        ("DNS", json!([{"address": "eu.x.com", "serviceAccount": "s"}]), vec!["eu.x.com"]),
        ("STATIC", json!([{"address": "1.2.3.4"}]), vec!["1.2.3.4"]),
    ] {
        let mesh = Mesh::default().with(vec![entry("a/x", spec(resolution, endpoints))]);
        let found: Vec<_> = mesh.snapshot.endpoints("x.com").iter().map(|e| e.address.clone()).collect();
        assert_eq!(found, expect, "{resolution}");
        let external = mesh.snapshot.endpoints("x.com").iter().all(|e| e.tls_mode == TlsMode::Disabled);
        assert!(external, "outside the mesh nobody speaks our mTLS");
    }
}

#[test]
fn a_selector_takes_workloads_of_its_namespace_however_they_came() {
    let workload = |id: &str, address: &str, text: &str| {
        object(
            Kind::WorkloadEntry,
            id,
            json!({"address": address, "labels": labels(text), "serviceAccount": "s"}),
        )
    };
    let mut by_metadata = workload("a/meta", "10.0.0.3", "app=q");
    by_metadata.labels = labels("app=p");
    let register = |id: &str, address: &str, text: &str| {
        let mut r = registration(id, address, text, "s1");
        r.group = "vms".into();
        Command::RegisterWorkload { registration: Arc::new(r) }
    };
    let mesh = Mesh::default()
        .with(vec![
            entry("a/x", json!({"hosts": ["x.com"], "workloadSelector": {"labels": {"app": "p"}}})),
            workload("a/one", "10.0.0.1", "app=p,istio.io/draining=1"),
            workload("a/other", "10.0.0.2", "app=q"),
            by_metadata,
            workload("b/elsewhere", "10.0.0.4", "app=p"),
        ])
        .and(register("a/vm", "10.0.0.5", "app=p"))
        .and(register("a/one", "10.0.0.99", "app=p"))
        .and(Command::WorkloadHealth { key: workload_key("a/vm"), session: "s1".into(), healthy: false });
    let found: Vec<_> = mesh
        .snapshot
        .endpoints("x.com")
        .iter()
        .map(|e| (e.address.as_str(), e.workload.as_str(), e.health))
        .collect();
    let expect = [
        ("10.0.0.1", "vms", Health::Draining),
        ("10.0.0.3", "meta", Health::Healthy),
        ("10.0.0.5", "vms", Health::Unhealthy),
    ];
    assert_eq!(found, expect);
    assert_eq!(mesh.snapshot.workloads().count(), 5);
    let at = |last: u8| {
        mesh.snapshot.workload_by_address(IpAddr::from([10, 0, 0, last])).map(|w| w.key.to_string())
    };
    assert_eq!((at(5).as_deref(), at(99), at(4).as_deref()), (Some("a/vm"), None, Some("b/elsewhere")));
}

#[test]
fn services_are_seen_where_they_are_exported_oldest_first() {
    let export = |id: &str, host: &str, to: Value| entry(id, json!({"hosts": [host], "exportTo": to}));
    let mesh = Mesh::default().with(vec![
        export("a/1", "zz.com", json!([])),
        export("a/2", "private.com", json!(["."])),
        export("a/3", "named.com", json!(["b", "."])),
        export("a/4", "nobody.com", json!(["~"])),
        export("a/5", "aa.com", json!(["*"])),
    ]);
    let seen = |ns: &str| hosts(&mesh.snapshot.visible_services(ns)).join(" ");
    assert_eq!(seen("a"), "zz.com private.com named.com aa.com");
    assert_eq!(seen("b"), "zz.com named.com aa.com");
    assert_eq!(seen("c"), "zz.com aa.com");
    let default = object(Kind::MeshConfig, "istio-system/mesh", json!({"defaultServiceExportTo": ["."]}));
    let mesh = mesh.with(vec![default]);
    assert_eq!(hosts(&mesh.snapshot.visible_services("c")), ["aa.com"], "the mesh's default applies");
}

#[test]
fn a_workload_serves_the_services_of_its_namespace_at_its_address() {
    let spec = |host: &str, selector: &str| {
        json!({"hosts": [host], "ports": [{"number": 80, "name": "http", "targetPort": 8080}, {"number": 90, "name": "tcp"}],
            "workloadSelector": {"labels": labels(selector)}})
    };
    let workload = object(
        Kind::WorkloadEntry,
        "a/w",
        json!({"address": "10.0.0.1", "labels": {"app": "p", "version": "v1"}, "ports": {"tcp": 9999}}),
    );
    let sharing = object(Kind::WorkloadEntry, "a/w2", json!({"address": "10.0.0.1", "labels": {"app": "q"}}));
    let mesh = Mesh::default().with(vec![
        entry("a/one", spec("one.com", "app=p")),
        entry("a/two", spec("two.com", "app=q")),
        entry("b/three", spec("three.com", "app=p")),
        workload,
        sharing,
    ]);
    let served = |ns: &str, address: [u8; 4], text: &str| -> Vec<String> {
        let served = mesh.snapshot.inbound_services(ns, &[IpAddr::from(address)], &labels(text));
        served.iter().map(|(s, port, own)| format!("{}:{}->{own}", s.hostname, port.number)).collect()
    };
    let one = ["one.com:80->8080", "one.com:90->9999"];
    let two = ["two.com:80->8080", "two.com:90->90"];
    assert_eq!(served("a", [10, 0, 0, 1], "app=p,version=v1,more=x"), one);
    assert_eq!(served("a", [10, 0, 0, 1], "app=q"), two);
    assert_eq!(served("a", [10, 0, 0, 1], ""), [one, two].concat());
    assert!(served("b", [10, 0, 0, 1], "app=p").is_empty());
    assert!(served("a", [10, 0, 0, 2], "app=p").is_empty());
}

// ---- routes ---------------------------------------------------------------------------

fn routes(id: &str, spec: Value) -> Object {
    let mut whole = json!({"hosts": ["x"], "http": [{"route": [{"destination": {"host": "x"}}]}]});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    object(Kind::VirtualService, id, whole)
}

#[test]
fn private_routes_outrank_named_ones_and_those_public_ones_each_oldest_first() {
    let mesh = Mesh::default().with(vec![
        routes("b/public-1", json!({})),
        routes("b/named", json!({"exportTo": ["a"]})),
        routes("a/public-2", json!({"exportTo": ["*", "~"]})),
        routes("a/private-1", json!({"exportTo": ["."]})),
        routes("b/hidden", json!({"exportTo": ["."]})),
        routes("b/nobody", json!({"exportTo": ["~"]})),
        routes("a/private-2", json!({"exportTo": ["a"]})),
        routes("a/gateway", json!({"gateways": ["gw", "b/other"]})),
        routes("a/both", json!({"gateways": ["mesh", "./gw"]})),
    ]);
    let seen = |ns: &str, gateway: &str| names(&mesh.snapshot.virtual_services_for(ns, gateway)).join(" ");
    assert_eq!(seen("a", "mesh"), "a/private-1 a/private-2 b/named b/public-1 a/public-2 a/both");
    assert_eq!(seen("b", "mesh"), "b/hidden b/public-1 a/public-2 a/both");
    assert_eq!(seen("b", "a/gw"), "a/gateway a/both");
    assert_eq!(seen("a", "b/other"), "a/gateway");
    assert_eq!(seen("a", "gw"), "");
}

#[test]
fn equal_ages_are_decided_by_name_and_then_namespace() {
    let mut mesh = Mesh::default();
    mesh.apply(vec![put(vec![routes("b/m", json!({})), routes("a/z", json!({})), routes("a/m", json!({}))])]);
    assert_eq!(names(&mesh.snapshot.virtual_services_for("c", "mesh")), ["a/m", "b/m", "a/z"]);
}

#[test]
fn names_in_routes_belong_to_the_namespace_of_the_object() {
    let declared = routes(
        "shop/r",
        json!({"hosts": ["Reviews", "*.foo.com"],
            "http": [{"match": [{"gateways": ["gw"]}], "route": [{"destination": {"host": "reviews"}}],
                "mirror": {"host": "copy"}, "mirrors": [{"destination": {"host": "c.d"}}]}],
            "tls": [{"match": [{"sniHosts": ["a.b"]}], "route": [{"destination": {"host": "t"}}]}],
            "tcp": [{"route": [{"destination": {"host": "10.0.0.1"}}]}]}),
    );
    let mesh = Mesh::default().with(vec![declared.clone()]);
    let all = mesh.snapshot.virtual_services_for("a", "mesh");
    let (object, found) = &all[0];
    assert_eq!(found.hosts, ["reviews.shop.svc.cluster.local", "*.foo.com"]);
    assert_eq!(found.gateways, ["mesh"]);
    let http = &found.http[0];
    let host = |d: &Option<registry::model::traffic::Destination>| d.as_ref().unwrap().host.clone();
    assert_eq!(http.r#match[0].gateways, ["shop/gw"]);
    assert_eq!(host(&http.route[0].destination), "reviews.shop.svc.cluster.local");
    assert_eq!(host(&http.mirror), "copy.shop.svc.cluster.local");
    assert_eq!(host(&http.mirrors[0].destination), "c.d");
    assert_eq!(host(&found.tls[0].route[0].destination), "t.shop.svc.cluster.local");
    assert_eq!(host(&found.tcp[0].route[0].destination), "10.0.0.1");
    assert_eq!(object.raw, declared.raw, "what the user wrote stays");
}

#[test]
fn a_root_has_the_routes_of_its_delegates_and_follows_them() {
    let root = routes(
        "a/root",
        json!({"http": [
            {"match": [{"uri": {"prefix": "/p"}}], "delegate": {"name": "child", "namespace": "b"}, "timeout": "3s"},
            {"match": [{"uri": {"prefix": "/q"}}], "delegate": {"name": "missing"}},
            {"match": [{"uri": {"prefix": "/h"}}], "delegate": {"name": "hidden", "namespace": "b"}},
            {"name": "last", "route": [{"destination": {"host": "x"}}]}]}),
    );
    let child = |name: &str, host: &str, to: Value| {
        object(
            Kind::VirtualService,
            name,
            json!({"exportTo": to,
            "http": [{"name": "c", "match": [{"uri": {"prefix": "/p/1"}}], "route": [{"destination": {"host": host}}]},
                {"match": [{"uri": {"prefix": "/outside"}}], "route": [{"destination": {"host": host}}]}]}),
        )
    };
    let told = |mesh: &Mesh| -> Vec<(String, String, Option<u64>)> {
        let all = mesh.snapshot.virtual_services_for("a", "mesh");
        assert_eq!(names(&all), ["a/root"], "a delegate is no root");
        let route = |r: &registry::model::traffic::HttpRoute| {
            let host = r.route[0].destination.as_ref().unwrap().host.clone();
            (r.name.clone(), host, r.timeout.map(|t| t.as_secs()))
        };
        all[0].1.http.iter().map(route).collect()
    };
    let last = ("last".to_owned(), "x.a.svc.cluster.local".to_owned(), None);
    let mesh = Mesh::default().with(vec![root]);
    assert_eq!(told(&mesh), [last.clone()]);
    let mesh = mesh.with(vec![child("b/child", "one", json!([])), child("b/hidden", "h", json!(["."]))]);
    let first = |host: &str| ("c".to_owned(), format!("{host}.b.svc.cluster.local"), Some(3));
    assert_eq!(told(&mesh), [first("one"), last.clone()]);
    let mesh = mesh.with(vec![child("b/child", "two", json!(["a"]))]);
    assert_eq!(told(&mesh), [first("two"), last]);
}

// ---- destination rules ----------------------------------------------------------------

fn rule(id: &str, host: &str, spec: Value) -> Object {
    let mut whole = json!({"host": host});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    object(Kind::DestinationRule, id, whole)
}

fn found(snapshot: &Snapshot, client: &str, text: &str, host: &str) -> String {
    let rule = snapshot.destination_rule(client, &labels(text), host);
    let Some(rule) = rule else { return "-".to_owned() };
    rule.from.iter().map(|o| format!("{}/{}", o.namespace, o.name)).collect::<Vec<_>>().join("+")
}

#[test]
fn the_first_namespace_with_any_rule_for_the_host_decides() {
    let x = "x.svc.svc.cluster.local";
    let declared = || entry("svc/x", json!({"hosts": [x]}));
    let client = || rule("client/c", x, json!({}));
    let owner = || rule("svc/s", "x", json!({}));
    let root = || rule("istio-system/r", "*", json!({}));
    for (objects, client_ns, expect) in [
        (vec![client(), owner(), root()], "client", "client/c"),
        (vec![client(), owner(), root()], "other", "svc/s"),
        (vec![client(), owner(), root()], "svc", "svc/s"),
        (vec![client(), root()], "other", "istio-system/r"),
        (vec![client()], "other", "-"),
        (vec![rule("svc/s", "x", json!({"exportTo": ["."]})), root()], "other", "istio-system/r"),
        (vec![rule("svc/s", "x", json!({"exportTo": ["."]})), root()], "svc", "svc/s"),
        (vec![rule("svc/s", "x", json!({"exportTo": ["client"]})), root()], "client", "svc/s"),
        (vec![rule("svc/s", "x", json!({"exportTo": ["client"]})), root()], "other", "istio-system/r"),
        (vec![rule("client/c", x, json!({"exportTo": ["other"]})), owner()], "client", "svc/s"),
        (vec![root(), owner()], "istio-system", "svc/s"),
        (
            vec![rule("istio-system/p", x, json!({"exportTo": ["."]})), owner()],
            "istio-system",
            "istio-system/p",
        ),
        (vec![rule("istio-system/p", x, json!({"exportTo": ["."]}))], "other", "-"),
    ] {
        let mesh = Mesh::default().with(vec![declared()]).with(objects.clone());
        assert_eq!(found(&mesh.snapshot, client_ns, "", x), expect, "{client_ns} {objects:?}");
    }
}

#[test]
fn within_a_namespace_the_exact_host_and_then_the_longest_wildcard_decide() {
    let mesh = Mesh::default().with(vec![
        rule("a/all", "*", json!({})),
        rule("a/com", "*.com", json!({})),
        rule("a/foo", "*.foo.com", json!({})),
        rule("a/exact", "a.foo.com", json!({})),
    ]);
    for (host, expect) in [
        ("a.foo.com", "a/exact"),
        ("b.foo.com", "a/foo"),
        ("foo.com", "a/com"),
        ("x.org", "a/all"),
        ("*.foo.com", "a/foo"),
    ] {
        assert_eq!(found(&mesh.snapshot, "a", "", host), expect, "{host}");
    }
}

#[test]
fn rules_of_one_host_and_namespace_add_subsets_to_the_oldest() {
    let subset = |name: &str, version: &str| json!({"name": name, "labels": {"version": version}});
    let policy = |simple: &str| json!({"loadBalancer": {"simple": simple}});
    let mesh = Mesh::default().with(vec![
        rule("a/one", "x", json!({"subsets": [subset("v1", "first")]})),
        rule(
            "a/two",
            "x.a.svc.cluster.local",
            json!({"subsets": [subset("v1", "second"), subset("v2", "second")],
            "trafficPolicy": policy("RANDOM")}),
        ),
        rule("a/three", "x", json!({"trafficPolicy": policy("ROUND_ROBIN")})),
        rule("a/apart", "x", json!({"exportTo": ["."], "subsets": [subset("v9", "apart")]})),
        rule("a/wild", "*.svc.cluster.local", json!({"subsets": [subset("v8", "wild")]})),
    ]);
    let merged = mesh.snapshot.destination_rule("a", &labels(""), "x.a.svc.cluster.local").unwrap();
    let told: Vec<_> =
        merged.rule.subsets.iter().map(|s| (s.name.as_str(), s.labels["version"].as_str())).collect();
    assert_eq!(told, [("v1", "first"), ("v2", "second")]);
    let simple = json!(format!("{:?}", merged.rule.traffic_policy));
    assert!(simple.as_str().unwrap().contains("Random"), "the first with a policy keeps it: {simple}");
    assert_eq!(found(&mesh.snapshot, "a", "", "x.a.svc.cluster.local"), "a/one+a/two+a/three");
    assert_eq!(
        found(&mesh.snapshot, "b", "", "x.a.svc.cluster.local"),
        "-",
        "no service, so no owner's namespace"
    );
}

#[test]
fn a_rule_that_selects_the_client_outranks_one_for_everybody_in_its_namespace_only() {
    let selector = json!({"workloadSelector": {"matchLabels": {"app": "p"}}});
    let mesh = Mesh::default().with(vec![
        entry("a/x", json!({"hosts": ["x.com"]})),
        rule("a/everybody", "x.com", json!({})),
        rule("a/selected", "x.com", selector),
    ]);
    assert_eq!(found(&mesh.snapshot, "a", "app=p", "x.com"), "a/selected");
    assert_eq!(found(&mesh.snapshot, "a", "app=q", "x.com"), "a/everybody");
    assert_eq!(found(&mesh.snapshot, "b", "app=p", "x.com"), "a/everybody");
}

#[test]
fn subsets_override_block_by_block_and_ports_replace_all_blocks() {
    let simple = |name: &str| json!({"simple": name});
    let declared = rule(
        "a/x",
        "x.com",
        json!({
            "trafficPolicy": {
                "loadBalancer": simple("RANDOM"), "tls": {"mode": "SIMPLE"}, "outlierDetection": {},
                "proxyProtocol": {"version": "V2"},
                "portLevelSettings": [{"port": {"number": 90}, "loadBalancer": simple("ROUND_ROBIN")}]},
            "subsets": [
                {"name": "plain"},
                {"name": "own", "trafficPolicy": {"tls": {"mode": "DISABLE"},
                    "portLevelSettings": [{"port": {"number": 95}, "outlierDetection": {}}]}}]}),
    );
    let mesh = Mesh::default().with(vec![declared]);
    let merged = mesh.snapshot.destination_rule("a", &labels(""), "x.com").unwrap();
    let told = |port: u16, subset: Option<&str>| {
        let policy = merged.traffic_policy(port, subset).unwrap_or_default();
        let TrafficPolicy { load_balancer, tls, outlier_detection, proxy_protocol, .. } = policy;
        let tls = tls.map_or_else(String::new, |tls| format!("{:?} ", tls.mode));
        let lb = load_balancer.map_or_else(String::new, |lb| format!("{:?}", lb.lb_policy));
        let balancer = ["Random", "RoundRobin"].into_iter().find(|name| lb.contains(name)).unwrap_or("-");
        format!("{tls}{balancer} {} {}", outlier_detection.is_some(), proxy_protocol.is_some())
    };
    for (port, subset, expect) in [
        (80, None, "Simple Random true true"),
        (90, None, "RoundRobin false false"),
        (80, Some("plain"), "Simple Random true true"),
        (90, Some("plain"), "RoundRobin false false"),
        (80, Some("own"), "Disable Random true true"),
        (90, Some("own"), "Disable RoundRobin false false"),
        (95, Some("own"), "- true false"),
        (95, Some("plain"), "Simple Random true true"),
    ] {
        assert_eq!(told(port, subset), expect, "{port} {subset:?}");
    }
}

// ---- policies -------------------------------------------------------------------------

fn peer(id: &str, selector: &str, mode: &str, ports: Value) -> Object {
    let mut spec = json!({"mtls": {"mode": mode}, "portLevelMtls": ports});
    if !selector.is_empty() {
        spec["selector"] = json!({"matchLabels": labels(selector)});
    }
    object(Kind::PeerAuthentication, id, spec)
}

#[test]
fn the_narrower_peer_authentication_overrides_and_unset_inherits() {
    let all = || json!({});
    let ports = |modes: &[(u16, MutualTlsMode)]| modes.iter().copied().collect();
    for (objects, expect, port_level) in [
        (vec![], Permissive, vec![]),
        (vec![peer("istio-system/m", "", "STRICT", all())], Strict, vec![]),
        (
            vec![peer("istio-system/m", "", "STRICT", all()), peer("a/n", "", "DISABLE", all())],
            Disable,
            vec![],
        ),
        (vec![peer("istio-system/m", "", "STRICT", all()), peer("a/n", "", "UNSET", all())], Strict, vec![]),
        (vec![peer("istio-system/m", "app=p", "STRICT", all())], Permissive, vec![]),
        (vec![peer("a/n", "", "STRICT", all()), peer("a/w", "app=p", "DISABLE", all())], Disable, vec![]),
        (vec![peer("a/n", "", "STRICT", all()), peer("a/w", "app=q", "DISABLE", all())], Strict, vec![]),
        (vec![peer("a/old", "", "STRICT", all()), peer("a/young", "", "DISABLE", all())], Strict, vec![]),
        (
            vec![peer("a/old", "app=p", "STRICT", all()), peer("a/young", "app=p", "DISABLE", all())],
            Strict,
            vec![],
        ),
        (vec![peer("b/n", "", "STRICT", all())], Permissive, vec![]),
        (
            vec![
                peer("a/n", "", "STRICT", all()),
                peer("a/w", "app=p", "UNSET", json!({"80": {"mode": "DISABLE"}, "90": {"mode": "UNSET"}})),
            ],
            Strict,
            vec![(80, Disable), (90, Strict)],
        ),
    ] {
        let mesh = Mesh::default().with(objects.clone());
        let policy = mesh.snapshot.peer_authentication("a", &labels("app=p"));
        assert_eq!((policy.mode, policy.port_level.clone()), (expect, ports(&port_level)), "{objects:?}");
        assert_eq!(policy.mode_of(12345), expect);
    }
}

#[test]
fn policies_select_by_label_in_their_namespace_or_everywhere_from_the_root() {
    let policy = |id: &str, spec: Value| object(Kind::AuthorizationPolicy, id, spec);
    let selector = |text: &str| json!({"selector": {"matchLabels": labels(text)}});
    let mesh = Mesh::default().with(vec![
        policy("a/all", json!({})),
        policy("a/p", selector("app=p")),
        policy("a/p1", selector("app=p,version=v1")),
        policy("b/all", json!({})),
        policy("istio-system/root", json!({})),
        policy("istio-system/root-p", selector("app=p")),
        policy("a/attached", json!({"targetRefs": [{"kind": "Gateway", "name": "g"}]})),
        policy("a/attached-too", json!({"targetRef": {"kind": "Gateway", "name": "g"}})),
    ]);
    let seen =
        |ns: &str, text: &str| names(&mesh.snapshot.authorization_policies(ns, &labels(text))).join(" ");
    assert_eq!(seen("a", "app=p"), "istio-system/root istio-system/root-p a/all a/p");
    assert_eq!(seen("a", "app=p,version=v1"), "istio-system/root istio-system/root-p a/all a/p a/p1");
    assert_eq!(seen("b", ""), "istio-system/root b/all");
    assert_eq!(seen("istio-system", "app=p"), "istio-system/root istio-system/root-p");
}

#[test]
fn one_telemetry_per_scope_holds_the_oldest_of_each() {
    let telemetry = |id: &str, text: &str| {
        let spec =
            if text.is_empty() { json!({}) } else { json!({"selector": {"matchLabels": labels(text)}}) };
        object(Kind::Telemetry, id, spec)
    };
    let mesh = Mesh::default().with(vec![
        telemetry("a/workload-1", "app=p"),
        telemetry("a/workload-2", "app=p"),
        telemetry("a/namespace-1", ""),
        telemetry("a/namespace-2", ""),
        telemetry("istio-system/mesh", ""),
    ]);
    let seen = |ns: &str, text: &str| names(&mesh.snapshot.telemetries(ns, &labels(text))).join(" ");
    assert_eq!(seen("a", "app=p"), "istio-system/mesh a/namespace-1 a/workload-1");
    assert_eq!(seen("a", ""), "istio-system/mesh a/namespace-1");
    assert_eq!(seen("b", ""), "istio-system/mesh");
}

#[test]
fn envoy_filters_are_applied_by_priority_then_root_first_then_oldest() {
    let filter = |id: &str, priority: i32| object(Kind::EnvoyFilter, id, json!({"priority": priority}));
    let mesh = Mesh::default().with(vec![
        filter("a/late", 10),
        filter("a/own", 0),
        filter("istio-system/root", 0),
        filter("a/early", -5),
    ]);
    let seen = names(&mesh.snapshot.envoy_filters("a", &labels("")));
    assert_eq!(seen, ["a/early", "istio-system/root", "a/own", "a/late"]);
}

#[test]
fn gateways_select_workloads_of_any_namespace() {
    let gateway = |id: &str, text: &str| object(Kind::Gateway, id, json!({"selector": labels(text)}));
    let mesh = Mesh::default().with(vec![
        gateway("b/one", "istio=in"),
        gateway("a/two", "istio=out"),
        gateway("a/three", ""),
    ]);
    assert_eq!(names(&mesh.snapshot.gateways_for(&labels("istio=in,x=y"))), ["b/one", "a/three"]);
}

// ---- sidecars -------------------------------------------------------------------------

fn sidecar(id: &str, selector: &str, hosts: Value) -> Object {
    let mut spec = json!({"egress": [{"hosts": hosts}]});
    if !selector.is_empty() {
        spec["workloadSelector"] = json!({"labels": labels(selector)});
    }
    object(Kind::Sidecar, id, spec)
}

#[test]
fn the_narrowest_sidecar_holds_and_the_oldest_of_equals() {
    let any = || json!(["*/*"]);
    let mesh = Mesh::default().with(vec![
        sidecar("a/everybody", "", any()),
        sidecar("a/everybody-2", "", any()),
        sidecar("a/selected", "app=p", any()),
        sidecar("a/selected-2", "app=p", any()),
        sidecar("istio-system/root", "", any()),
        sidecar("istio-system/root-selected", "app=p", any()),
    ]);
    let holds = |ns: &str, text: &str| mesh.snapshot.sidecar_for(ns, &labels(text)).map(|(o, _)| o.id());
    assert_eq!(holds("a", "app=p").as_deref(), Some("Sidecar/a/selected"));
    assert_eq!(holds("a", "app=q").as_deref(), Some("Sidecar/a/everybody"));
    assert_eq!(holds("b", "app=p").as_deref(), Some("Sidecar/istio-system/root"));
    assert_eq!(holds("istio-system", "app=p").as_deref(), Some("Sidecar/istio-system/root-selected"));
    assert!(Mesh::default().snapshot.sidecar_for("a", &labels("")).is_none());
}

#[test]
fn egress_hosts_say_which_services_a_proxy_sees() {
    let services = || {
        vec![
            entry("a/1", json!({"hosts": ["one.a.com"]})),
            entry("b/2", json!({"hosts": ["two.b.com"]})),
            entry("b/3", json!({"hosts": ["three.b.com"]})),
            entry("c/4", json!({"hosts": ["hidden.c.com"], "exportTo": ["."]})),
        ]
    };
    for (hosts_of, expect) in [
        (json!(["*/*"]), "one.a.com two.b.com three.b.com"),
        (json!(["./*"]), "one.a.com"),
        (json!(["b/*"]), "two.b.com three.b.com"),
        (json!(["b/two.b.com", "./*"]), "one.a.com two.b.com"),
        (json!(["*/*.b.com"]), "two.b.com three.b.com"),
        (json!(["~/*"]), ""),
        (json!(["c/*"]), ""),
        (json!(["*/*", "~b/two.b.com"]), "one.a.com three.b.com"),
        (json!(["*/*", "~b/*"]), "one.a.com"),
    ] {
        let mesh = Mesh::default().with(services()).with(vec![sidecar("a/s", "", hosts_of.clone())]);
        let seen = mesh.snapshot.services_for("a", &labels(""));
        assert_eq!(hosts(&seen).join(" "), expect, "{hosts_of}");
        assert_eq!(mesh.snapshot.services_for("b", &labels("")).len(), 3, "another namespace's Sidecar");
    }
}

#[test]
fn imported_routes_bring_their_destinations() {
    let mesh = Mesh::default().with(vec![
        entry("a/1", json!({"hosts": ["front.com"]})),
        entry("b/2", json!({"hosts": ["back.com"]})),
        entry("b/3", json!({"hosts": ["other.com"]})),
        routes(
            "a/r",
            json!({"hosts": ["front.com"], "http": [{"route": [{"destination": {"host": "back.com"}}]}]}),
        ),
        routes("b/r", json!({"hosts": ["other.com"]})),
        sidecar("a/s", "", json!(["./*"])),
    ]);
    assert_eq!(hosts(&mesh.snapshot.services_for("a", &labels(""))), ["front.com", "back.com"]);
    assert_eq!(names(&mesh.snapshot.virtual_services_in_scope("a", &labels(""))), ["a/r"]);
    assert_eq!(names(&mesh.snapshot.virtual_services_in_scope("b", &labels(""))), ["a/r", "b/r"]);
}

#[test]
fn a_listener_with_a_port_takes_that_port_of_a_service_only() {
    let two_ports =
        json!({"hosts": ["x.com"], "ports": [{"number": 80, "name": "http"}, {"number": 90, "name": "tcp"}]});
    let mut narrow = sidecar("a/s", "", json!(["./*"]));
    narrow = object(Kind::Sidecar, "a/s", {
        let mut spec = narrow.raw.clone();
        spec["egress"][0]["port"] = json!({"number": 90, "protocol": "TCP", "name": "t"});
        spec
    });
    let mesh = Mesh::default().with(vec![
        entry("a/x", two_ports),
        entry("a/y", json!({"hosts": ["y.com"]})),
        narrow,
    ]);
    let seen = mesh.snapshot.services_for("a", &labels(""));
    let ports: Vec<_> =
        seen.iter().map(|s| (s.hostname.as_str(), s.ports.len(), s.ports[0].number)).collect();
    assert_eq!(ports, [("x.com", 1, 90)]);
}

// ---- cost -----------------------------------------------------------------------------

#[test]
fn one_endpoint_among_ten_thousand_services_touches_one_host() {
    let source = || SourceId::Kubernetes("k".into());
    let host = |i: u32| format!("s{i}.ns{}.svc.cluster.local", i % 50);
    let mut mesh = Mesh::default();
    let commands = (0..10_000u32).flat_map(|i| {
        let declared = service(&host(i), &format!("ns{}", i % 50), source());
        let endpoints = vec![endpoint(&format!("10.{}.{}.1", i / 256, i % 256))];
        [
            Command::PutService { service: Arc::new(declared) },
            Command::ReplaceEndpoints { host: host(i), source: source(), endpoints },
        ]
    });
    mesh.apply(commands.collect());
    let before = Arc::clone(&mesh.snapshot);
    let (changes, _) = mesh.apply(vec![Command::ReplaceEndpoints {
        host: host(77),
        source: source(),
        endpoints: vec![endpoint("10.0.77.1"), endpoint("10.200.0.1")],
    }]);
    assert_eq!(changes.hosts.iter().collect::<Vec<_>>(), [&host(77)]);
    let changed: Vec<_> = (0..10_000)
        .map(host)
        .filter(|h| !Arc::ptr_eq(mesh.snapshot.endpoints(h), before.endpoints(h)))
        .collect();
    assert_eq!(changed, [host(77)], "all else is shared");
    assert!(mesh.snapshot.same_service(&before, &host(77)), "only its endpoints differ");

    #[expect(clippy::disallowed_methods, reason = "a figure for the reader, nothing depends on it")]
    let start = std::time::Instant::now();
    for _ in 0..100 {
        std::hint::black_box(Snapshot::next(&before, &mesh.state, &changes));
    }
    println!("next snapshot of 10,000 services after one endpoint: {:?}", start.elapsed() / 100);
}
