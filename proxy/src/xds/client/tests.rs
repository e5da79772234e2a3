//! Scripted conversations.

use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3 as pb;
use envoy_types::pb::google::protobuf::Any;

use super::*;
use crate::tables::tests::{cluster, endpoints, listener, routes};
use crate::tables::{TableStore, TableWriter};

/// A client, its tables, and a clock that a test moves.
struct Conversation {
    client: Client,
    writer: TableWriter,
    now: Instant,
}

/// One line for each request: what a server reads in it.
fn lines(requests: Vec<Request>) -> Vec<String> {
    requests.iter().map(line).collect()
}

fn line(request: &Request) -> String {
    let (url, mut out) = match request {
        Request::Delta(r) => (&r.type_url, {
            let mut out = String::new();
            let mut held: Vec<_> =
                r.initial_resource_versions.iter().map(|(n, v)| format!("{n}={v}")).collect();
            held.sort();
            for (mark, names) in
                [("+", &r.resource_names_subscribe), ("-", &r.resource_names_unsubscribe), ("held ", &held)]
            {
                for name in names {
                    out.push_str(&format!(" {mark}{name}"));
                }
            }
            out + &nonce(&r.response_nonce) + &error(r.error_detail.as_ref()) + node(r.node.is_some())
        }),
        Request::Sotw(r) => (&r.type_url, {
            let names: String = r.resource_names.iter().map(|n| format!(" {n}")).collect();
            let version =
                if r.version_info.is_empty() { String::new() } else { format!(" v{}", r.version_info) };
            names
                + &version
                + &nonce(&r.response_nonce)
                + &error(r.error_detail.as_ref())
                + node(r.node.is_some())
        }),
    };
    let kind = Kind::from_url(url).unwrap();
    out.insert_str(0, &kind.to_string());
    out
}

fn nonce(nonce: &str) -> String {
    if nonce.is_empty() { String::new() } else { format!(" nonce {nonce}") }
}

fn error(error: Option<&envoy_types::pb::google::rpc::Status>) -> String {
    error.map(|e| format!(" NACK {}: {}", e.code, e.message)).unwrap_or_default()
}

fn node(there: bool) -> &'static str {
    if there { " node" } else { "" }
}

impl Conversation {
    fn new(protocol: Protocol) -> Self {
        let node = Node { id: "sidecar~1.1.1.1~a.b~b.svc.cluster.local".into(), ..Default::default() };
        let (_, writer) = TableStore::new(1);
        Self { client: Client::new(node, protocol), writer, now: tokio::time::Instant::now().into_std() }
    }

    fn receive(&mut self, response: Response) -> Vec<String> {
        let received = self.client.on_response(response, jiff::Timestamp::UNIX_EPOCH).unwrap();
        let refused = self.writer.apply(&received.update);
        lines(self.client.on_applied(received, refused, self.now))
    }

    /// A delta response with resources of one version and names of removed ones.
    fn delta(
        &mut self,
        kind: Kind,
        nonce: &str,
        resources: &[(&str, &str, Any)],
        removed: &[&str],
    ) -> Vec<String> {
        let resources = resources.iter().map(|(name, version, any)| pb::Resource {
            name: (*name).into(),
            version: (*version).into(),
            resource: Some(any.clone()),
            ..Default::default()
        });
        self.receive(Response::Delta(Box::new(pb::DeltaDiscoveryResponse {
            system_version_info: "7".into(),
            type_url: kind.url().into(),
            nonce: nonce.into(),
            resources: resources.collect(),
            removed_resources: removed.iter().map(ToString::to_string).collect(),
            ..Default::default()
        })))
    }

    fn sotw(&mut self, kind: Kind, version: &str, nonce: &str, resources: Vec<Any>) -> Vec<String> {
        self.receive(Response::Sotw(Box::new(pb::DiscoveryResponse {
            version_info: version.into(),
            type_url: kind.url().into(),
            nonce: nonce.into(),
            resources,
            ..Default::default()
        })))
    }

    fn tables(&self) -> Arc<crate::tables::Tables> {
        self.writer.store().load()
    }
}

fn bad_cluster(name: &str) -> Any {
    let pb = envoy_types::pb::envoy::config::cluster::v3::Cluster {
        name: name.into(),
        lb_policy: 77,
        ..Default::default()
    };
    wire::canonical::any(&pb)
}

fn started() -> Conversation {
    let mut c = Conversation::new(Protocol::Delta);
    assert_eq!(lines(c.client.on_connect()), ["Cluster node", "Listener"]);
    assert_eq!(
        c.delta(Kind::Cluster, "n1", &[("a", "1", cluster("a", "s"))], &[]),
        ["Cluster nonce n1", "ClusterLoadAssignment +s"]
    );
    assert_eq!(
        c.delta(Kind::Listener, "n2", &[("l", "1", listener("l", 80, "r"))], &[]),
        ["Listener nonce n2", "RouteConfiguration +r"]
    );
    assert!(!c.client.is_initialized());
    assert_eq!(
        c.delta(Kind::Endpoints, "n3", &[("s", "1", endpoints("s", 1))], &[]),
        ["ClusterLoadAssignment nonce n3"]
    );
    assert_eq!(
        c.delta(Kind::Routes, "n4", &[("r", "1", routes("r", "a"))], &[]),
        ["RouteConfiguration nonce n4"]
    );
    assert!(c.client.is_initialized());
    c
}

#[test]
fn a_first_connection_asks_for_what_each_answer_names() {
    let c = started();
    let tables = c.tables();
    assert!(tables.clusters.contains_key("a") && tables.listeners.contains_key("l"));
}

#[test]
fn a_reconnect_tells_what_is_held_and_keeps_serving() {
    let mut c = started();
    assert_eq!(
        lines(c.client.on_connect()),
        [
            "Cluster held a=1 node",
            "ClusterLoadAssignment +s held s=1",
            "Listener held l=1",
            "RouteConfiguration +r held r=1"
        ]
    );
    assert!(c.client.is_initialized());
    // Only what changed comes; what is gone meanwhile is told as removed.
    assert_eq!(c.delta(Kind::Cluster, "m1", &[("b", "2", cluster("b", "s"))], &["a"]), ["Cluster nonce m1"]);
    let tables = c.tables();
    assert_eq!(
        tables.clusters.keys().map(|k| &**k).collect::<Vec<_>>(),
        ["b"],
        "its endpoints were known already"
    );
}

#[test]
fn a_nack_names_the_bad_resource_and_keeps_its_last_good_value() {
    let mut c = started();
    assert_eq!(
        c.delta(Kind::Cluster, "n5", &[("a", "2", bad_cluster("a")), ("b", "2", cluster("b", "s2"))], &[]),
        ["Cluster nonce n5 NACK 3: Cluster a: lb_policy: unknown value 77", "ClusterLoadAssignment +s2"]
    );
    let tables = c.tables();
    assert!(tables.clusters.contains_key("a"), "the last good one serves on");
    assert!(tables.known.clusters.contains_key("b"), "the good one of the same response is taken");
    let status = c.client.status();
    assert_eq!(status[&Kind::Cluster].last_error.as_deref(), Some("Cluster a: lb_policy: unknown value 77"));
    // The version that is told later is the one that is held.
    assert_eq!(lines(c.client.on_connect())[0], "Cluster held a=1 held b=2 node");
    assert_eq!(c.delta(Kind::Cluster, "n6", &[("a", "3", cluster("a", "s"))], &[]), ["Cluster nonce n6"]);
    assert_eq!(c.client.status()[&Kind::Cluster].last_error, None);
}

#[test]
fn what_the_tables_refuse_is_in_the_nack() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let pb: envoy_types::pb::envoy::config::listener::v3::Listener =
        wire::json::message_from_yaml(&format!(
            "{{name: x, address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}, filter_chains: [{{}}]}}"
        ))
        .unwrap();
    let mut c = started();
    let answer = c.delta(Kind::Listener, "n5", &[("x", "1", wire::canonical::any(&pb))], &[]);
    assert!(
        answer[0].starts_with(&format!(
            "Listener nonce n5 NACK 3: Listener x: address: cannot bind 127.0.0.1:{port}"
        )),
        "{answer:?}"
    );
    assert_eq!(lines(c.client.on_connect())[2], "Listener held l=1", "a refused one is not held");
}

#[test]
fn names_that_do_not_fit_or_come_twice_are_refused() {
    let mut c = started();
    assert_eq!(
        c.delta(Kind::Cluster, "n5", &[("z", "1", cluster("a", "s"))], &[]),
        ["Cluster nonce n5 NACK 3: Cluster z: name: the resource `z` calls itself `a`"]
    );
    assert_eq!(
        c.delta(Kind::Cluster, "n6", &[("q", "1", cluster("q", "s")), ("q", "2", cluster("q", "s"))], &[]),
        ["Cluster nonce n6 NACK 3: Cluster q: name: is twice in one response"]
    );
    let wrong_type = c.delta(Kind::Cluster, "n7", &[("q", "1", listener("q", 1, "r"))], &[]);
    assert!(
        wrong_type[0]
            .contains("NACK 3: Cluster q: is a `type.googleapis.com/envoy.config.listener.v3.Listener`")
            || wrong_type[0].contains("expected `envoy.config.cluster.v3.Cluster`"),
        "{wrong_type:?}"
    );
}

#[test]
fn what_nothing_names_any_more_is_let_go() {
    let mut c = started();
    assert_eq!(
        c.delta(Kind::Listener, "n5", &[("l", "2", listener("l", 80, "r2"))], &[]),
        ["Listener nonce n5", "RouteConfiguration +r2 -r"]
    );
    assert_eq!(
        &*c.tables().listeners["l"].routes[0].name,
        "r",
        "the old one serves until the new routes are there"
    );
    c.delta(Kind::Routes, "n6", &[("r2", "1", routes("r2", "a"))], &[]);
    assert_eq!(&*c.tables().listeners["l"].routes[0].name, "r2");
    assert_eq!(c.delta(Kind::Cluster, "n7", &[], &["a"]), ["Cluster nonce n7", "ClusterLoadAssignment -s"]);
    assert!(c.tables().clusters.is_empty());
}

#[test]
fn a_cluster_waits_for_endpoints_only_so_long() {
    let mut c = started();
    c.delta(Kind::Cluster, "n5", &[("b", "1", cluster("b", "s2"))], &[]);
    assert_eq!(c.client.deadline(), Some(c.now + Duration::from_secs(15)));
    assert!(!c.tables().clusters.contains_key("b"));
    let update = c.client.on_tick(c.now + Duration::from_secs(15));
    c.writer.apply(&update);
    assert_eq!(c.tables().clusters["b"].endpoints.endpoints().count(), 0);
    assert_eq!(c.client.deadline(), None);
    // Told not to exist: no waiting at all.
    c.delta(Kind::Cluster, "n6", &[("d", "1", cluster("d", "s3"))], &[]);
    c.delta(Kind::Endpoints, "n7", &[], &["s3"]);
    assert!(c.tables().clusters.contains_key("d"));
    // Routes of this listener are waited for without an end, as it says.
    c.delta(Kind::Listener, "n8", &[("m", "1", listener("m", 81, "r9"))], &[]);
    assert_eq!(c.client.deadline(), None);
}

#[test]
fn removed_endpoints_that_are_in_use_stay() {
    let mut c = started();
    assert_eq!(c.delta(Kind::Endpoints, "n5", &[], &["s"]), ["ClusterLoadAssignment nonce n5"]);
    assert_eq!(c.tables().clusters["a"].endpoints.endpoints().count(), 1);
}

#[test]
fn state_of_the_world_is_spoken_too() {
    let mut c = Conversation::new(Protocol::Sotw);
    assert_eq!(lines(c.client.on_connect()), ["Cluster node", "Listener"]);
    assert_eq!(
        c.sotw(Kind::Cluster, "1", "n1", vec![cluster("a", "sa"), cluster("b", "sb")]),
        ["Cluster v1 nonce n1", "ClusterLoadAssignment sa sb"]
    );
    assert_eq!(
        c.sotw(
            Kind::Endpoints,
            "1",
            "n2",
            vec![endpoints("sa", 1), endpoints("sb", 2), endpoints("other", 3)]
        ),
        ["ClusterLoadAssignment sa sb v1 nonce n2"]
    );
    // What is not named any more is gone; a bad one keeps its old value and the old version.
    assert_eq!(
        c.sotw(Kind::Cluster, "2", "n3", vec![bad_cluster("a")]),
        [
            "Cluster v1 nonce n3 NACK 3: Cluster a: lb_policy: unknown value 77",
            "ClusterLoadAssignment sa v1 nonce n2"
        ]
    );
    assert_eq!(c.tables().clusters.keys().map(|k| &**k).collect::<Vec<_>>(), ["a"]);
    assert_eq!(lines(c.client.on_connect()), ["Cluster v1 node", "ClusterLoadAssignment sa v1", "Listener"]);
}

#[test]
fn a_type_that_was_not_asked_for_is_left_alone() {
    let mut c = started();
    let response =
        pb::DeltaDiscoveryResponse { type_url: "type.googleapis.com/x.Y".into(), ..Default::default() };
    assert!(c.client.on_response(Response::Delta(Box::new(response)), jiff::Timestamp::UNIX_EPOCH).is_none());
}

mod any_bytes {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Whatever bytes a server sends as a resource, the client answers and lives.
        #[test]
        fn never_panic(kind in 0..4_usize, bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let kind = Kind::SUBSCRIBED[kind];
            let any = Any { type_url: kind.url().into(), value: bytes };
            let resource = crate::xds::parse::Resource { name: Some("x".into()), version: "1".into(), any };
            drop(crate::xds::parse::parse(kind, resource, jiff::Timestamp::UNIX_EPOCH));
        }

        /// A valid resource with one byte changed either parses or is refused.
        #[test]
        fn nor_do_almost_good_ones(which in 0..4_usize, at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let (kind, mut any) = match which {
                0 => (Kind::Cluster, cluster("a", "s")),
                1 => (Kind::Endpoints, endpoints("s", 1)),
                2 => (Kind::Listener, listener("l", 80, "r")),
                _ => (Kind::Routes, routes("r", "a")),
            };
            let at = at.index(any.value.len());
            any.value[at] = byte;
            let resource = crate::xds::parse::Resource { name: None, version: "1".into(), any };
            drop(crate::xds::parse::parse(kind, resource, jiff::Timestamp::UNIX_EPOCH));
        }
    }
}
