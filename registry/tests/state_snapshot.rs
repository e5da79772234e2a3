//! Services, endpoints, workloads and Sidecars as readers of a snapshot see them.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "what is not there has failed the test")]

#[path = "state/support.rs"]
mod support;

use std::net::IpAddr;
use std::sync::Arc;

use registry::config::{Kind, Object};
use registry::model::service::{Health, Locality, Location, Protocol, Resolution, SourceId, TlsMode};
use registry::snapshot::Snapshot;
use registry::state::Command;
use serde_json::{Value, json};
use support::{Mesh, endpoint, entry, labels, names, object, registration, routes, service, workload_key};

fn hosts(services: &[Arc<registry::model::service::Service>]) -> Vec<&str> {
    services.iter().map(|service| service.hostname.as_str()).collect()
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
fn endpoints_that_are_what_one_source_says_are_in_memory_once() {
    let source = SourceId::Consul("dc1".into());
    let service = service("x.com", "a", source.clone());
    let endpoints = vec![endpoint("10.0.0.2"), endpoint("10.0.0.1")];
    let replace = Command::ReplaceEndpoints { host: "x.com".into(), source, endpoints };
    let mesh = Mesh::default().and(Command::PutService { service: Arc::new(service) }).and(replace);
    let (_, said) = mesh.state.endpoints_of("x.com").next().unwrap();
    assert!(said.len() == 2 && Arc::ptr_eq(said, mesh.snapshot.endpoints("x.com")));
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
        .and(Command::WorkloadHealth {
            key: workload_key("a/vm"),
            session: "s1".into(),
            healthy: false,
            reason: String::new(),
        });
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
fn of_several_services_of_a_host_an_imported_one_is_taken() {
    let declared = || {
        ["b/old", "c/young", "a/own"]
            .map(|id| entry(id, json!({"hosts": ["x.com"], "exportTo": ["*"]})))
            .to_vec()
    };
    for (hosts_of, expect) in [
        (json!(["*/*"]), "a"),
        (json!(["b/*", "c/*"]), "b"),
        (json!(["c/*"]), "c"),
        (json!(["./*", "c/*"]), "a"),
    ] {
        let mesh = Mesh::default().with(declared()).with(vec![sidecar("a/s", "", hosts_of.clone())]);
        let seen = mesh.snapshot.services_for("a", &labels(""));
        let owners: Vec<_> = seen.iter().map(|service| service.namespace.as_str()).collect();
        assert_eq!(owners, [expect], "{hosts_of}");
        assert_eq!(mesh.snapshot.namespaces().into_iter().collect::<Vec<_>>(), ["a", "b", "c"]);
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
