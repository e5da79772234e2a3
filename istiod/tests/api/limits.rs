//! How often, and how much.

use http::Method;
use istiod::access::Role;
use istiod::api::limits::{Rate, Rates};
use istiod::raft::node::Settings;

use crate::member::{ADMIN, Member, PLENTY, Start, root};

const FEW: Rate = Rate { per_second: 1, burst: 5 };

async fn limited(rates: Rates) -> Member {
    let (root, clock) = root();
    Member::start_as(Start { rates, ..Start::default() }, root, clock).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_calls_too_often_is_told_when_to_come_again_and_nobody_else_is() {
    let member = limited(Rates { calls: FEW, guesses: PLENTY }).await;
    let (one, other) = (member.token(Role::Viewer, &[]).await, member.token(Role::Viewer, &[]).await);
    let call = async |token: &str| member.call(Method::GET, "/api/v1/version", Some(token), "").await;
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(call(&one.token).await);
    }
    let refused = answers.iter().find(|answer| answer.status == 429).unwrap();
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.headers["content-type"], "application/problem+json");
    assert!(answers.iter().filter(|answer| answer.status == 200).count() >= 5);
    assert_eq!(call(&other.token).await.status, 200);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_guesses_is_slowed_down_and_who_knows_is_not() {
    let member = limited(Rates { calls: PLENTY, guesses: FEW }).await;
    let token = member.token(Role::Viewer, &[]).await;
    let mut seen = Vec::new();
    for n in 0..20 {
        let guess = format!("istio-api.{}.{n}", token.id);
        seen.push(member.call(Method::GET, "/api/v1/version", Some(&guess), "").await.status);
    }
    assert!(seen.contains(&401) && seen.contains(&429), "{seen:?}");
    assert_eq!(member.call(Method::GET, "/api/v1/version", Some(&token.token), "").await.status, 200);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_too_large_is_refused_before_it_is_read() {
    let member = Member::start().await;
    let large = format!("{{\"role\": \"viewer\", \"name\": \"{}\"}}", "x".repeat(2 << 20));
    let token = Some(crate::member::ADMIN);
    let answer = member.call(Method::POST, "/api/v1/access/tokens", token, &large).await;
    assert_eq!(answer.status, 413, "{answer:?}");
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_the_disk_has_no_room_for_is_refused_with_the_reason_and_reads_go_on() {
    let (root, clock) = root();
    // No disk has so much.
    let log = Settings { least_free_bytes: u64::MAX, ..Settings::new(1, 1) };
    let member = Member::start_as(Start { log, ..Start::default() }, root, clock).await;
    let mut status = member.api.raft.status();
    status.wait_for(|status| status.free_bytes.is_some()).await.unwrap();
    let yaml =
        "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: a}, spec: {host: a}}";
    let body = serde_json::json!({ "files": [{ "name": "a.yaml", "text": yaml }] }).to_string();
    let answer = member.call(Method::POST, "/api/v1/apply", Some(ADMIN), &body).await;
    assert_eq!((answer.status, &answer.json()["title"]), (507, &serde_json::json!("insufficient storage")));
    let why = answer.json()["errors"][0].to_string();
    assert!(why.contains("nearly full") && why.contains("free some space"), "{why}");
    let read = member.call(Method::GET, "/api/v1/config/destinationrule", Some(ADMIN), "").await;
    assert_eq!(read.status, 200, "{read:?}");
    member.stop().await;
}
