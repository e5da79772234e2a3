//! How often, and how much.

use http::Method;
use istiod::access::Role;
use istiod::api::limits::{Rate, Rates};

use crate::member::{Member, PLENTY, Start, root};

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
