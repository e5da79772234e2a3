//! Real gRPC clients over loopback against the server, with a push side that the tests play.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

#[path = "stream_server/mesh.rs"]
mod mesh;

use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::google::rpc;
use mesh::{Client, Mesh, TIMEOUT, WholeClient, resources};
use prost::Message;
use tokio::time::Instant;
use tonic::Code;
use wire::members::{self, Hint};
use xds::balance::Fleet;
use xds::resources::Type;
use xds::server::Authentication;
use xds::stream::{Sync, Variant};

#[tokio::test]
async fn a_delta_client_gets_its_view_and_the_status_follows() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut client = Client::connect(&mesh, 1).await;
    client.ask(Type::Cluster, &[]).await;
    client.ask(Type::Listener, &[]).await;
    let proxy = mesh.joined().await;
    assert_eq!(mesh.status.proxies(mesh::now())[0].types[&Type::Cluster].sync, Sync::NotSent);

    mesh.push(&proxy, 5, &resources(&[(Type::Cluster, "a", 1), (Type::Listener, "l", 1)]));
    let clusters = client.next().await;
    assert_eq!((clusters.nonce.as_str(), clusters.resources[0].name.as_str()), ("5-1", "a"));
    assert_eq!(mesh.status.proxies(mesh::now())[0].types[&Type::Cluster].sync, Sync::Stale);
    client.ack(&clusters).await;
    let listeners = client.next().await;
    assert_eq!(listeners.type_url, Type::Listener.url());
    client.ack(&listeners).await;

    let report = mesh.status.wait(5, Instant::now() + TIMEOUT).await;
    assert_eq!(report.acknowledged, [mesh::node_id(1)]);
    assert_eq!(report.affected, [mesh::node_id(1)]);
    assert!(report.pending.is_empty());
    let row = mesh.status.proxies(mesh::now()).remove(0);
    assert_eq!((row.revision, row.variant, row.version.as_str()), (5, Variant::Delta, "1.2.3"));
    let held = mesh.status.resources(&mesh::node_id(1)).await.unwrap();
    assert_eq!(held.by_type[&Type::Cluster].keys().collect::<Vec<_>>(), ["a"]);
    assert!(mesh.status.resources("nobody").await.is_none());

    drop(client);
    mesh.eventually("the proxy is gone", |mesh| mesh.status.proxies(mesh::now()).is_empty()).await;
    assert!(mesh.metrics().contains("pilot_xds 0\n"));
    mesh.stop().await;
}

#[tokio::test]
async fn a_state_of_the_world_client_is_served_too() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut client = WholeClient::connect(&mesh, 1).await;
    let ask = |t: Type| DiscoveryRequest {
        node: Some(mesh::node(1)),
        type_url: t.url().to_owned(),
        ..DiscoveryRequest::default()
    };
    client.send(ask(Type::Cluster)).await;
    let proxy = mesh.joined().await;
    mesh.push(&proxy, 3, &resources(&[(Type::Cluster, "a", 1), (Type::Cluster, "b", 1)]));
    let response = client.next().await;
    assert_eq!((response.nonce.as_str(), response.resources.len()), ("3-1", 2));
    client
        .send(DiscoveryRequest {
            version_info: response.version_info.clone(),
            response_nonce: response.nonce.clone(),
            ..ask(Type::Cluster)
        })
        .await;
    client.send(ask(Type::Listener)).await;
    let listeners = client.next().await;
    assert!(listeners.resources.is_empty());
    client.send(DiscoveryRequest { response_nonce: listeners.nonce.clone(), ..ask(Type::Listener) }).await;
    assert_eq!(mesh.status.wait(3, Instant::now() + TIMEOUT).await.acknowledged.len(), 1);
    assert_eq!(mesh.status.proxies(mesh::now())[0].variant, Variant::StateOfTheWorld);
    mesh.stop().await;
}

#[tokio::test]
async fn waiting_ends_at_once_when_a_proxy_refuses_and_tells_its_words() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut good = Client::connect(&mesh, 1).await;
    let mut bad = Client::connect(&mesh, 2).await;
    let mut proxies = Vec::new();
    for client in [&mut good, &mut bad] {
        client.ask(Type::Cluster, &[]).await;
        client.ask(Type::Listener, &[]).await;
        proxies.push(mesh.joined().await);
    }
    for proxy in &proxies {
        mesh.push(proxy, 1, &resources(&[(Type::Cluster, "a", 1)]));
    }
    for client in [&mut good, &mut bad] {
        client.ack_next(2).await;
    }
    assert_eq!(mesh.status.wait(1, Instant::now() + TIMEOUT).await.acknowledged.len(), 2);

    for proxy in &proxies {
        mesh.push(proxy, 2, &resources(&[(Type::Cluster, "a", 2)]));
    }
    good.ack_next(1).await;
    let response = bad.next().await;
    bad.nack(&response, "cluster a: no such thing").await;
    let report = mesh.status.wait(2, Instant::now() + TIMEOUT).await;
    assert_eq!(report.acknowledged, [mesh::node_id(1)]);
    assert_eq!(report.pending.len(), 1);
    assert_eq!(report.pending[0].proxy.id, mesh::node_id(2));
    assert_eq!(report.pending[0].types, [Type::Cluster]);
    let nack = &report.pending[0].nacks[0];
    assert_eq!((nack.message.as_str(), nack.revision), ("cluster a: no such thing", 2));
    assert_eq!(nack.resources, ["a"]);
    let metrics = mesh.metrics();
    assert!(metrics.contains("pilot_xds_cds_reject 1\n") && metrics.contains("pilot_total_xds_rejects 1\n"));

    // A revision that does not concern the good one is run by it at once.
    mesh.status.decide(3, &[proxies[1].key]);
    let report = mesh.status.wait(3, Instant::now()).await;
    assert_eq!(report.acknowledged, [mesh::node_id(1)]);
    mesh.push(&proxies[1], 3, &resources(&[(Type::Cluster, "a", 3)]));
    bad.ack_next(1).await;
    let report = mesh.status.wait(3, Instant::now() + TIMEOUT).await;
    assert_eq!(report.acknowledged.len(), 2);
    assert_eq!(report.affected, [mesh::node_id(2)]);
    assert!(mesh.metrics().contains("pilot_xds_cds_reject 0\n"));
    mesh.stop().await;
}

#[tokio::test]
async fn a_client_that_reconnects_costs_next_to_nothing() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let names: Vec<String> =
        (0..1000).map(|i| format!("outbound|80||s{i:04}.default.svc.cluster.local")).collect();
    let all: Vec<_> = names.iter().map(|name| (Type::Cluster, name.as_str(), 1)).collect();

    let mut client = Client::connect(&mesh, 1).await;
    client.ask(Type::Cluster, &[]).await;
    client.ask(Type::Listener, &[]).await;
    let proxy = mesh.joined().await;
    mesh.push(&proxy, 7, &resources(&all));
    let first = client.next().await;
    let versions = first.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
    client.ack(&first).await;
    client.ack_next(1).await;
    mesh.status.wait(7, Instant::now() + TIMEOUT).await;
    let whole = mesh.bytes_to_clients();
    assert!(whole > first.encoded_len() as u64);
    drop(client);
    mesh.eventually("the proxy is gone", |mesh| mesh.status.proxies(mesh::now()).is_empty()).await;

    let before = mesh.bytes_to_clients();
    let mut client = Client::connect(&mesh, 1).await;
    client
        .send(DeltaDiscoveryRequest {
            node: Some(mesh::node(1)),
            type_url: Type::Cluster.url().to_owned(),
            initial_resource_versions: versions,
            ..DeltaDiscoveryRequest::default()
        })
        .await;
    client.ask(Type::Listener, &[]).await;
    let proxy = mesh.joined().await;
    mesh.push(&proxy, 7, &resources(&all));
    client.ack_next(1).await; // the listeners, of which there are none
    assert_eq!(mesh.status.wait(7, Instant::now() + TIMEOUT).await.acknowledged.len(), 1);
    let again = mesh.bytes_to_clients() - before;
    println!("bytes to a client with 1000 clusters: {whole} at first, {again} after it reconnected");
    assert!(again < 1024, "{again} bytes were sent to a client that has everything");
    mesh.stop().await;
}

#[tokio::test]
async fn a_reader_that_was_away_gets_the_latest_only() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut client = Client::connect(&mesh, 1).await;
    client.ask(Type::Cluster, &[]).await;
    let proxy = mesh.joined().await;
    mesh.push(&proxy, 1, &resources(&[(Type::Cluster, "a", 1)]));
    let first = client.next().await;
    for revision in 2..500 {
        mesh.push(&proxy, revision, &resources(&[(Type::Cluster, "a", revision)]));
        tokio::task::yield_now().await;
    }
    client.ack(&first).await;
    let next = client.next().await;
    client.ack(&next).await;
    // The push side may have been overtaken once by the acknowledgement; a backlog would be hundreds.
    let last = if next.nonce.starts_with("499-") { next } else { client.next().await };
    assert!(last.nonce.starts_with("499-"), "{}", last.nonce);
    mesh.stop().await;
}

#[tokio::test]
async fn without_a_certificate_nobody_is_served() {
    let mesh = Mesh::start(Authentication::Required, None).await;
    assert_eq!(Client::refused(&mesh, 1).await.code(), Code::Unauthenticated);
    mesh.stop().await;
}

#[tokio::test]
async fn a_node_must_be_who_its_certificate_says() {
    let mesh =
        Mesh::start(Authentication::Required, Some("spiffe://cluster.local/ns/other/sa/reviews")).await;
    let refusal = Client::refused(&mesh, 1).await;
    assert_eq!(refusal.code(), Code::PermissionDenied);
    assert!(refusal.message().contains("default/reviews"), "{refusal}");
    mesh.stop().await;

    let mut mesh =
        Mesh::start(Authentication::Required, Some("spiffe://cluster.local/ns/default/sa/reviews")).await;
    let mut client = Client::connect(&mesh, 1).await;
    client.ask(Type::Cluster, &[]).await;
    let joined = mesh.joined().await;
    assert_eq!(joined.proxy.identity.as_ref().unwrap().namespace(), Some("default"));
    mesh.stop().await;
}

#[tokio::test]
async fn a_node_that_is_none_is_refused() {
    let mesh = Mesh::start(Authentication::Optional, None).await;
    let mut client = Client::connect(&mesh, 1).await;
    client
        .send(DeltaDiscoveryRequest { type_url: Type::Cluster.url().to_owned(), ..Default::default() })
        .await;
    assert_eq!(client.end().await.code(), Code::InvalidArgument);
    mesh.stop().await;
}

#[tokio::test]
async fn streams_end_with_the_server() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut client = Client::connect(&mesh, 1).await;
    client.ask(Type::Cluster, &[]).await;
    mesh.joined().await;
    mesh.end_streams();
    assert_eq!(client.end().await.code(), Code::Unavailable);
    mesh.stop().await;
}

#[tokio::test]
async fn a_new_stream_of_a_node_replaces_the_old_in_the_status() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut old = Client::connect(&mesh, 1).await;
    old.ask(Type::Cluster, &[]).await;
    mesh.joined().await;
    let mut new = Client::connect(&mesh, 1).await;
    new.ask(Type::Cluster, &[]).await;
    new.ask(Type::Listener, &[]).await;
    let proxy = mesh.joined().await;
    mesh.push(&proxy, 4, &resources(&[(Type::Cluster, "a", 1)]));
    new.ack_next(2).await;
    // The old stream is open still and was never given anything.
    assert_eq!(mesh.status.wait(4, Instant::now() + TIMEOUT).await.acknowledged, [mesh::node_id(1)]);
    assert_eq!(mesh.status.proxies(mesh::now()).len(), 1);
    mesh.stop().await;
}

#[tokio::test]
async fn an_error_detail_without_words_is_a_rejection_too() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut client = Client::connect(&mesh, 1).await;
    client.ask(Type::Cluster, &[]).await;
    let proxy = mesh.joined().await;
    mesh.push(&proxy, 1, &resources(&[(Type::Cluster, "a", 1)]));
    let response = client.next().await;
    client
        .send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: Some(rpc::Status::default()),
            ..DeltaDiscoveryRequest::default()
        })
        .await;
    mesh.eventually("the rejection shows", |mesh| {
        mesh.status.proxies(mesh::now())[0].types[&Type::Cluster].sync == Sync::Nacked
    })
    .await;
    mesh.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_clients_converge_within_milliseconds() {
    const CLIENTS: u32 = 10;
    const PUSHES: u64 = 200;
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut proxies = Vec::new();
    for number in 0..CLIENTS {
        let mut client = Client::connect(&mesh, number).await;
        client.ask(Type::Cluster, &[]).await;
        client.ask(Type::Listener, &[]).await;
        proxies.push(mesh.joined().await);
        mesh.run(client.accept_everything());
    }
    let mut times = Vec::new();
    for revision in 1..=PUSHES {
        let start = Instant::now();
        let keys: Vec<u64> = proxies.iter().map(|proxy| proxy.key).collect();
        mesh.status.decide(revision, &keys);
        for proxy in &proxies {
            mesh.push(
                proxy,
                revision,
                &resources(&[(Type::Cluster, "a", revision), (Type::Listener, "l", revision)]),
            );
        }
        let report = mesh.status.wait(revision, start + TIMEOUT).await;
        assert_eq!(report.acknowledged.len(), CLIENTS as usize, "{report:?}");
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let at = |percent: usize| times[times.len() * percent / 100].max(Duration::ZERO);
    println!("push to the last of {CLIENTS} acknowledgements: p50 {:?}, p99 {:?}", at(50), at(99));
    mesh.stop().await;
}

#[tokio::test]
async fn a_proxy_that_leaves_while_somebody_waits_is_not_taken_for_done() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut client = Client::connect(&mesh, 1).await;
    client.ask(Type::Cluster, &[]).await;
    client.ask(Type::Listener, &[]).await;
    let proxy = mesh.joined().await;
    mesh.push(&proxy, 1, &resources(&[(Type::Cluster, "a", 1)]));
    client.ack_next(2).await;
    assert!(mesh.status.wait(1, Instant::now() + TIMEOUT).await.pending.is_empty());

    mesh.push(&proxy, 2, &resources(&[(Type::Cluster, "a", 2)]));
    let leave = async {
        drop(client.next().await);
        drop(client);
    };
    let (report, ()) = tokio::join!(mesh.status.wait(2, Instant::now() + TIMEOUT), leave);
    assert!(report.acknowledged.is_empty(), "{report:?}");
    let gone: Vec<_> = report.pending.iter().map(|p| (p.proxy.id.as_str(), p.gone)).collect();
    assert_eq!(gone, [(mesh::node_id(1).as_str(), true)]);
    // Nobody misses it later.
    assert!(mesh.status.wait(2, Instant::now() + TIMEOUT).await.pending.is_empty());
    mesh.stop().await;
}

#[tokio::test]
async fn a_proxy_that_refuses_a_later_revision_runs_the_earlier_one() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let mut client = Client::connect(&mesh, 1).await;
    client.ask(Type::Cluster, &[]).await;
    client.ask(Type::Listener, &[]).await;
    let proxy = mesh.joined().await;
    mesh.push(&proxy, 1, &resources(&[(Type::Cluster, "a", 1)]));
    client.ack_next(2).await;
    assert!(mesh.status.wait(1, Instant::now() + TIMEOUT).await.pending.is_empty());
    // The second revision concerns nobody, and the third is refused.
    mesh.status.decide(2, &[]);
    mesh.push(&proxy, 3, &resources(&[(Type::Cluster, "a", 3)]));
    let response = client.next().await;
    client.nack(&response, "cluster a: no such thing").await;
    assert_eq!(mesh.status.wait(3, Instant::now() + TIMEOUT).await.pending.len(), 1);
    assert!(mesh.status.wait(2, Instant::now() + TIMEOUT).await.pending.is_empty());
    assert!(mesh.status.wait(1, Instant::now() + TIMEOUT).await.pending.is_empty());
    mesh.stop().await;
}

#[tokio::test]
async fn a_member_above_its_share_sends_streams_elsewhere_and_serves_whom_nobody_else_does() {
    let mesh = Mesh::start(Authentication::Optional, None).await;
    let understands = [(members::REFUSALS, 0)];
    let mut clients = Vec::new();
    for number in 0..4 {
        clients.push(Client::open(&mesh, number, &understands).await.unwrap());
    }
    // Somebody joins: this member may hold 1.1 times the mean of two, and one.
    let members = [("own:1".to_owned(), None), ("other:1".to_owned(), Some(0))];
    mesh.fleet.send_replace(Fleet { own: "own:1".to_owned(), members: members.into() });
    let refused = Client::open(&mesh, 9, &understands).await.err().unwrap();
    assert_eq!(
        (refused.code(), Hint::from_metadata(refused.metadata())),
        (Code::Unavailable, Some(Hint::Surplus))
    );
    assert_eq!(members::told(refused.metadata()).unwrap(), ["other:1", "own:1"]);
    let _after_all_others = Client::open(&mesh, 9, &[(members::REFUSALS, 1)]).await.unwrap();
    let _does_not_understand = Client::connect(&mesh, 10).await;
    // Those that are too many are asked to move, in the words of a refusal.
    for client in &mut clients {
        client.ask(Type::Cluster, &[]).await;
    }
    let (first, _, _) = futures::future::select_all(clients.iter_mut().map(|c| Box::pin(c.end()))).await;
    assert_eq!(Hint::from_metadata(first.metadata()), Some(Hint::Surplus));
    mesh.stop().await;
}

#[tokio::test]
async fn a_member_that_stops_names_the_others() {
    let mut mesh = Mesh::start(Authentication::Optional, None).await;
    let members = [("own:1".to_owned(), None), ("other:1".to_owned(), None)];
    mesh.fleet.send_replace(Fleet { own: "own:1".to_owned(), members: members.into() });
    let mut client = Client::open(&mesh, 1, &[(members::REFUSALS, 0)]).await.unwrap();
    client.ask(Type::Cluster, &[]).await;
    drop(mesh.joined().await);
    mesh.end_streams();
    let end = client.end().await;
    assert_eq!((end.code(), Hint::from_metadata(end.metadata())), (Code::Unavailable, Some(Hint::Drain)));
    assert_eq!(members::told(end.metadata()).unwrap(), ["other:1", "own:1"]);
    let refused = Client::open(&mesh, 2, &[(members::REFUSALS, 0)]).await.err().unwrap();
    assert_eq!(Hint::from_metadata(refused.metadata()), Some(Hint::Drain));
    mesh.stop().await;
}

#[tokio::test]
async fn nobody_goes_back_a_member_that_is_behind_catches_up_first_or_sends_the_client_elsewhere() {
    let mesh = Mesh::start(Authentication::Optional, None).await;
    mesh.status.decide(7, &[]);
    drop(Client::open(&mesh, 1, &[(members::REVISION, 7)]).await.unwrap());
    let status = mesh.status.clone();
    let opening = Client::open(&mesh, 1, &[(members::REVISION, 8)]);
    let (caught_up, ()) = futures::join!(opening, async {
        tokio::task::yield_now().await;
        status.decide(8, &[]);
    });
    drop(caught_up.unwrap());
    let behind = Client::open(&mesh, 1, &[(members::REVISION, 9)]).await.err().unwrap();
    assert_eq!(
        (behind.code(), Hint::from_metadata(behind.metadata())),
        (Code::Unavailable, Some(Hint::Behind))
    );
    mesh.stop().await;
}
