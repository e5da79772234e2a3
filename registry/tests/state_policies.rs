//! Which routes, rules and policies hold for whom: one table per rule of precedence.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "what is not there has failed the test")]

#[path = "state/support.rs"]
mod support;

use registry::config::{Kind, Object};
use registry::model::security::MutualTlsMode::{self, Disable, Permissive, Strict};
use registry::model::traffic::TrafficPolicy;
use registry::snapshot::Snapshot;
use serde_json::{Value, json};
use support::{Mesh, entry, labels, names, object, put, routes};

// ---- routes ---------------------------------------------------------------------------

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
    assert_eq!(told(&mesh), std::slice::from_ref(&last));
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
