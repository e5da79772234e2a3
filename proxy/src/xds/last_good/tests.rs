//! Two processes, one after the other, and a folder.

use ca::seal::SealingKey;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::Any;

use super::*;
use crate::tables::tests::{cluster, endpoints, listener, routes};
use crate::xds::client::{Client, Protocol, Request};
use crate::xds::transport::{Settings, Transport};

fn transport() -> (Transport, Arc<TableStore>, watch::Receiver<Status>) {
    let (tables, writer) = TableStore::new(1);
    let (status, receiver) = watch::channel(Status::default());
    let settings = Settings {
        servers: Vec::new(),
        members: None,
        tls: None,
        protocol: Protocol::Delta,
        authority: None,
    };
    let client = Client::new(Node { id: "sidecar~1.1.1.1~a.b~c".into(), ..Node::default() }, Protocol::Delta);
    let rng = fastrand::Rng::with_seed(1);
    let clock = || jiff::Timestamp::UNIX_EPOCH;
    (Transport { settings, client, writer, status, rng, clock }, tables, receiver)
}

fn response(kind: Kind, version: &str, resources: &[(&str, Any)], removed: &[&str]) -> Response {
    let resources = resources.iter().map(|(name, any)| Resource {
        name: (*name).into(),
        version: format!("{version}-{name}"),
        resource: Some(any.clone()),
        ..Resource::default()
    });
    Response::Delta(Box::new(DeltaDiscoveryResponse {
        system_version_info: version.into(),
        type_url: kind.url().into(),
        nonce: "n".into(),
        resources: resources.collect(),
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..DeltaDiscoveryResponse::default()
    }))
}

fn whole() -> Vec<Response> {
    vec![
        response(Kind::Cluster, "41", &[("a", cluster("a", "s")), ("b", cluster("b", "none"))], &[]),
        response(Kind::Endpoints, "42", &[("s", endpoints("s", 80))], &["none"]),
        response(Kind::Listener, "42", &[("l", listener("l", 1, "r"))], &[]),
        response(Kind::Routes, "42", &[("r", routes("r", "a"))], &[]),
    ]
}

fn held(request: &Request) -> Vec<(String, String)> {
    let Request::Delta(request) = request else { panic!("not incremental") };
    let mut held: Vec<_> = request.initial_resource_versions.clone().into_iter().collect();
    held.sort();
    held
}

#[tokio::test]
async fn the_next_process_has_what_this_one_was_told_and_tells_that_it_has_it() {
    let (mut first, tables, _) = transport();
    first.resume(whole());
    let bytes = encode(&tables.load(), Some(42));

    let (mut next, resumed, status) = transport();
    next.resume(decode(&bytes).unwrap());
    let (tables, resumed) = (tables.load(), resumed.load());
    assert_eq!(tables.clusters.keys().collect::<Vec<_>>(), resumed.clusters.keys().collect::<Vec<_>>());
    assert_eq!(resumed.clusters.len(), 2, "also the one without endpoints");
    assert_eq!(resumed.clusters["a"].endpoints.endpoints().count(), 1);
    assert_eq!(&*resumed.listeners["l"].routes[0].name, "r");
    assert!(status.borrow().initialized);
    assert_eq!(status.borrow().revision, Some(42));
    let (told, before) = (next.client.on_connect(), first.client.on_connect());
    assert_eq!(told.iter().map(held).collect::<Vec<_>>(), before.iter().map(held).collect::<Vec<_>>());
    assert_eq!(held(&told[1]), [("s".to_owned(), "42-s".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn what_changes_is_kept_until_the_workload_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let store = KeyStore::open(folder.path()).unwrap().sealed(SealingKey::random().unwrap());
    let until = CancellationToken::new();
    let last_good = LastGood { store: store.clone(), until: until.clone() };
    assert!(last_good.responses().await.is_empty());

    let (mut transport, tables, status) = transport();
    let tasks = tokio_util::task::TaskTracker::new();
    tasks.spawn(last_good.clone().keep(tables, status, CancellationToken::new()));
    transport.resume(whole());
    tokio::time::sleep(GATHER * 2).await;
    assert_eq!(last_good.responses().await.len(), Kind::SUBSCRIBED.len());

    transport.resume(vec![response(Kind::Cluster, "43", &[("c", cluster("c", "s"))], &["b"])]);
    tokio::time::sleep(GATHER * 2).await;
    let kept = last_good.responses().await;
    assert_eq!(revision(&kept), Some(43));
    let Response::Delta(clusters) = &kept[0] else { panic!("not incremental") };
    assert_eq!(clusters.resources.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["a", "c"]);

    until.cancel();
    transport.resume(vec![response(Kind::Cluster, "44", &[], &["a", "c"])]);
    tokio::time::sleep(GATHER * 2).await;
    assert_eq!(revision(&last_good.responses().await), Some(43));

    LastGood::forget(&store).unwrap();
    store.store(FILE, b"\x7fnothing of ours").unwrap();
    assert!(last_good.responses().await.is_empty(), "what is damaged counts for nothing");
}
