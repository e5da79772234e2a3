//! Warming, sharing and swapping.

use super::*;
use crate::xds::parse::{Resource, parse};
use envoy_types::pb::envoy::config;

pub(crate) fn cluster(name: &str, service: &str) -> Any {
    let yaml = format!(
        "{{name: {name}, type: EDS, eds_cluster_config: {{eds_config: {{ads: {{}}}}, service_name: {service}}}}}"
    );
    wire::canonical::any(&wire::json::message_from_yaml::<config::cluster::v3::Cluster>(&yaml).unwrap())
}

pub(crate) fn endpoints(name: &str, port: u16) -> Any {
    let yaml = format!(
        "{{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}"
    );
    wire::canonical::any(
        &wire::json::message_from_yaml::<config::endpoint::v3::ClusterLoadAssignment>(&yaml).unwrap(),
    )
}

pub(crate) fn listener(name: &str, port: u16, rds: &str) -> Any {
    let yaml = format!(
        r#"{{name: {name}, bind_to_port: false, address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}, filter_chains: [{{filters: [{{name: h, typed_config: {{
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: s,
          rds: {{route_config_name: "{rds}", config_source: {{ads: {{}}, initial_fetch_timeout: 0s}}}},
          http_filters: [{{name: r, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}]}}]}}"#
    );
    wire::canonical::any(&wire::json::message_from_yaml::<config::listener::v3::Listener>(&yaml).unwrap())
}

pub(crate) fn routes(name: &str, cluster: &str) -> Any {
    let yaml = format!(
        r#"{{name: "{name}", virtual_hosts: [{{name: v, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: "{cluster}"}}}}]}}]}}"#
    );
    wire::canonical::any(
        &wire::json::message_from_yaml::<config::route::v3::RouteConfiguration>(&yaml).unwrap(),
    )
}

fn change(kind: Kind, any: Any) -> Change {
    parse(kind, Resource { name: None, version: "1".into(), any }, jiff::Timestamp::UNIX_EPOCH)
        .unwrap()
        .change
}

fn with(tables: &Tables, changes: Vec<Change>) -> Tables {
    let (next, rejected) = tables.with(&Update { changes }, &BoundSockets::new());
    assert_eq!(rejected, []);
    next
}

#[test]
fn a_cluster_is_active_when_its_endpoints_are_known() {
    let t1 = with(&Tables::default(), vec![change(Kind::Cluster, cluster("a", "s"))]);
    assert!(t1.clusters.is_empty());
    assert_eq!(t1.warming().0, ["a".into()]);
    let t2 = with(&t1, vec![change(Kind::Endpoints, endpoints("s", 1))]);
    assert_eq!(t2.clusters["a"].endpoints.endpoints().count(), 1);
    assert!(t2.warming().0.is_empty());
}

#[test]
fn a_changed_listener_waits_for_its_new_routes_and_the_old_one_serves_on() {
    let t1 = with(
        &Tables::default(),
        vec![change(Kind::Listener, listener("l", 80, "r1")), change(Kind::Routes, routes("r1", "a"))],
    );
    assert_eq!(&*t1.listeners["l"].routes[0].name, "r1");
    let t2 = with(&t1, vec![change(Kind::Listener, listener("l", 80, "r2"))]);
    assert!(Arc::ptr_eq(&t1.listeners["l"], &t2.listeners["l"]));
    assert_eq!(t2.warming().1, ["l".into()]);
    let t3 = with(&t2, vec![change(Kind::Routes, routes("r2", "b"))]);
    assert_eq!(&*t3.listeners["l"].routes[0].name, "r2");
}

#[test]
fn what_did_not_change_is_shared() {
    let t1 = with(
        &Tables::default(),
        vec![
            change(Kind::Cluster, cluster("a", "sa")),
            change(Kind::Cluster, cluster("b", "sb")),
            change(Kind::Endpoints, endpoints("sa", 1)),
            change(Kind::Endpoints, endpoints("sb", 2)),
        ],
    );
    let t2 = with(&t1, vec![change(Kind::Endpoints, endpoints("sa", 3))]);
    assert!(!Arc::ptr_eq(&t1.clusters["a"], &t2.clusters["a"]));
    assert!(Arc::ptr_eq(&t1.clusters["a"].cluster, &t2.clusters["a"].cluster));
    assert!(Arc::ptr_eq(&t1.clusters["b"], &t2.clusters["b"]));
    assert_eq!(t2.generation, 2);
}

#[test]
fn what_comes_again_unchanged_stays_the_same_thing_and_takes_the_new_version() {
    let all = || {
        vec![
            change(Kind::Cluster, cluster("a", "s")),
            change(Kind::Endpoints, endpoints("s", 1)),
            change(Kind::Listener, listener("l", 80, "r")),
            change(Kind::Routes, routes("r", "a")),
        ]
    };
    let t1 = with(&Tables::default(), all());
    let mut again = all();
    for change in &mut again {
        let version = Arc::from("2");
        match change {
            Change::Cluster(held) => held.version = version,
            Change::Endpoints(held) => held.version = version,
            Change::Listener(held) => held.version = version,
            Change::Routes(held) => held.version = version,
            Change::Secret(..) | Change::Remove(..) | Change::Absent(..) => {}
        }
    }
    let t2 = with(&t1, again);
    assert!(Arc::ptr_eq(&t1.clusters["a"], &t2.clusters["a"]));
    assert!(Arc::ptr_eq(&t1.listeners["l"], &t2.listeners["l"]));
    assert!(Arc::ptr_eq(&t1.known.endpoints["s"].value, &t2.known.endpoints["s"].value));
    assert_eq!((&*t2.known.clusters["a"].version, &*t2.known.routes["r"].version), ("2", "2"));
}

#[test]
fn tls_that_cannot_be_prepared_refuses_the_cluster_by_name_and_keeps_the_last_good_one() {
    let with_secret = |name: &str| {
        let yaml = format!(
            r#"{{name: a, type: STATIC, load_assignment: {{cluster_name: a}}, transport_socket: {{name: tls, typed_config: {{
              "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: a,
              common_tls_context: {{tls_certificate_sds_secret_configs: [{{name: "{name}"}}]}}}}}}}}"#
        );
        let pb = wire::json::message_from_yaml::<config::cluster::v3::Cluster>(&yaml).unwrap();
        change(Kind::Cluster, wire::canonical::any(&pb))
    };
    let t1 = with(&Tables::default(), vec![with_secret("default")]);
    let update = Update { changes: vec![with_secret("not-there")] };
    let (t2, rejected) = t1.with(&update, &BoundSockets::new());
    assert_eq!(rejected[0].name, "a");
    assert!(rejected[0].to_string().contains("no secret `not-there`"), "{rejected:?}");
    assert!(Arc::ptr_eq(&t1.clusters["a"], &t2.clusters["a"]));
}

#[test]
fn endpoints_and_routes_go_with_the_last_that_names_them() {
    let t1 = with(
        &Tables::default(),
        vec![change(Kind::Cluster, cluster("a", "s")), change(Kind::Endpoints, endpoints("s", 1))],
    );
    let t2 = with(&t1, vec![Change::Remove(Kind::Cluster, "a".into())]);
    assert!(t2.clusters.is_empty() && t2.known.endpoints.is_empty());
}

#[test]
fn what_does_not_exist_is_not_waited_for() {
    let t1 = with(
        &Tables::default(),
        vec![change(Kind::Cluster, cluster("a", "s")), change(Kind::Listener, listener("l", 80, "r"))],
    );
    let t2 = with(
        &t1,
        vec![Change::Absent(Kind::Endpoints, "s".into()), Change::Absent(Kind::Routes, "r".into())],
    );
    assert_eq!(t2.clusters["a"].endpoints.endpoints().count(), 0);
    assert!(t2.listeners["l"].routes[0].virtual_hosts.is_empty());
    let t3 = with(&t2, vec![change(Kind::Endpoints, endpoints("s", 1))]);
    assert_eq!(t3.clusters["a"].endpoints.endpoints().count(), 1);
}

#[test]
fn discovery_does_not_touch_static_resources() {
    let any = cluster("a", "s");
    let fixed =
        crate::xds::parse::parse_static(Kind::Cluster, any, jiff::Timestamp::UNIX_EPOCH).unwrap().change;
    let t1 = with(&Tables::default(), vec![fixed]);
    let t2 = with(&t1, vec![change(Kind::Cluster, cluster("a", "other"))]);
    assert_eq!(&**t2.known.clusters["a"].value.eds_service().unwrap(), "s");
    let t3 = with(&t2, vec![Change::Remove(Kind::Cluster, "a".into())]);
    assert!(t3.known.clusters.contains_key("a"));
}

fn bound_listener(name: &str, port: u16) -> Change {
    let mut change = change(Kind::Listener, listener(name, port, "r"));
    if let Change::Listener(held) = &mut change {
        Arc::get_mut(&mut held.value).unwrap().bind_to_port = true;
    }
    change
}

#[test]
fn an_address_that_is_taken_refuses_the_listener_by_name_and_keeps_the_rest() {
    let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = occupied.local_addr().unwrap().port();
    let (store, mut writer) = TableStore::new(2);
    let changes =
        vec![bound_listener("bad", port), bound_listener("good", 0), change(Kind::Routes, routes("r", "a"))];
    let rejected = writer.apply(&Update { changes });
    assert_eq!(rejected.len(), 1);
    assert!(
        rejected[0].to_string().starts_with(&format!("Listener bad: address: cannot bind 127.0.0.1:{port}"))
    );
    let tables = store.load();
    assert_eq!(tables.listeners.keys().map(|k| &**k).collect::<Vec<_>>(), ["good"]);
    let sockets = &tables.listeners["good"].sockets;
    assert_eq!(
        (sockets.of(0).unwrap().len(), sockets.of(1).unwrap().len(), sockets.of(2).unwrap().len()),
        (1, 1, 0)
    );
    // The same address again: the sockets stay.
    let before = Arc::clone(sockets);
    assert_eq!(writer.apply(&Update { changes: vec![bound_listener("good", 0)] }), []);
    assert!(Arc::ptr_eq(&before, &store.load().listeners["good"].sockets));
}

#[test]
fn two_listeners_cannot_share_an_address() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let (_store, mut writer) = TableStore::new(1);
    assert_eq!(writer.apply(&Update { changes: vec![bound_listener("one", port)] }), []);
    let rejected = writer.apply(&Update { changes: vec![bound_listener("two", port)] });
    assert!(rejected[0].to_string().contains("is taken by listener `one`"), "{rejected:?}");
    // In one step from one to the other it is no conflict.
    let swap = vec![bound_listener("two", port), Change::Remove(Kind::Listener, "one".into())];
    assert_eq!(writer.apply(&Update { changes: swap }), []);
}

#[test]
fn readers_see_the_old_or_the_new_and_are_told() {
    let (store, mut writer) = TableStore::new(1);
    let mut watch = store.watch();
    let old = store.load();
    assert_eq!(*watch.borrow_and_update(), 0);
    writer.apply(&Update { changes: vec![change(Kind::Cluster, cluster("a", "s"))] });
    assert!(watch.has_changed().unwrap());
    assert_eq!((old.generation, store.load().generation), (0, 1));
}
