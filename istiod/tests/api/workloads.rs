//! Workloads that are held since many agents were lost, operators who give them up, and why a workload is not healthy.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use istiod::access::Role;
use istiod::raft::Command;
use registry::source::vm::{self, Join};
use registry::state::{Batch, Command as Change, Presence, Registration};
use serde_json::json;

use crate::member::{Answer, Member};

fn registration(namespace: &str, number: u8) -> Arc<Registration> {
    let join = Join {
        namespace: namespace.to_owned(),
        service_account: "pay".to_owned(),
        workload: format!("w{number}"),
        address: IpAddr::from([10, 0, 0, number]),
        ports: [].into(),
        labels: [].into(),
        network: String::new(),
        locality: String::new(),
        cluster: String::new(),
        instance: String::new(),
        session: "s".to_owned(),
        lease: Duration::ZERO,
    };
    Arc::new(vm::register(None, &join).unwrap())
}

/// Workloads of two namespaces; all but the last one of `shop` are held since 2027.
async fn held(member: &Member) {
    let all = [("bank", 1), ("shop", 2), ("shop", 3), ("shop", 4)];
    let registrations = all.map(|(namespace, number)| registration(namespace, number));
    let held = registrations.iter().take(3).map(|registration| Change::WorkloadPresence {
        key: registration.key(),
        session: "s".to_owned(),
        presence: Presence::Unknown,
    });
    let held: Vec<Change> = held.collect();
    let register = registrations.map(|registration| Change::RegisterWorkload { registration });
    let commands = register.into_iter().chain(held).collect();
    let batch = Batch { time_ms: 1_800_000_000_000, author: "leases".to_owned(), commands };
    member.api.raft.propose(&Command::Registry(batch)).await.unwrap();
}

async fn agents(member: &Member) -> Vec<String> {
    let answer = member.admin(Method::GET, "/api/v1/workloads", "").await.json();
    let rows = answer["items"].as_array().unwrap().iter();
    let told = |row: &serde_json::Value, field: &str| row[field].as_str().unwrap().to_owned();
    rows.map(|row| format!("{} {} {}", told(row, "name"), told(row, "agent"), told(row, "agentSince")))
        .collect()
}

async fn release(member: &Member, token: &str, body: serde_json::Value) -> Answer {
    member.call(Method::POST, "/api/v1/workloads/release", Some(token), &body.to_string()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_workloads_are_shown_and_given_up_where_the_caller_may() {
    let member = Member::start().await;
    held(&member).await;
    let since = "2027-01-15T08:00:00Z";
    let shown = agents(&member).await;
    let expected = [
        format!("w1-10.0.0.1 unknown {since}"),
        format!("w2-10.0.0.2 unknown {since}"),
        format!("w3-10.0.0.3 unknown {since}"),
        "w4-10.0.0.4 heard ".to_owned(),
    ];
    assert_eq!(shown, expected);

    let editor = member.token(Role::Editor, &["shop"]).await.token;
    let viewer = member.token(Role::Viewer, &["shop"]).await.token;
    assert_eq!(release(&member, &viewer, json!({})).await.status, 403);
    assert_eq!(release(&member, &editor, json!({"namespace": "bank"})).await.status, 403);
    assert_eq!(release(&member, &editor, json!({"name": "w4-10.0.0.4"})).await.status, 404, "not held");
    assert_eq!(release(&member, &editor, json!({"workload": "w"})).await.status, 422, "no such field");

    let answer = release(&member, &editor, json!({"namespace": "shop", "name": "w3-10.0.0.3"})).await;
    assert_eq!(answer.json()["workloads"], json!(["shop/w3-10.0.0.3"]));
    // Without a namespace: those of the caller's.
    let answer = release(&member, &editor, json!({})).await;
    assert_eq!(answer.json()["workloads"], json!(["shop/w2-10.0.0.2"]));
    let shown = agents(&member).await;
    assert_eq!(shown[0], expected[0]);
    assert!(shown[1].starts_with("w2-10.0.0.2 released 20") && shown[2].contains(" released "), "{shown:?}");

    let audit = member.admin(Method::GET, "/api/v1/audit", "").await.json().to_string();
    assert!(audit.contains("release workloads") && audit.contains("Workload/shop/w3-10.0.0.3"), "{audit}");
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_a_workload_is_not_healthy_is_shown_until_it_is() {
    let member = Member::start().await;
    let registration = registration("shop", 1);
    let key = registration.key();
    let health = |healthy, reason: &str| Change::WorkloadHealth {
        key: key.clone(),
        session: "s".to_owned(),
        healthy,
        reason: reason.to_owned(),
    };
    let found = [health(false, "GET http://127.0.0.1:80/: status 503"), health(true, "")];
    let mut shown = Vec::new();
    for commands in
        [vec![Change::RegisterWorkload { registration }]].into_iter().chain(found.map(|c| vec![c]))
    {
        let batch = Batch { time_ms: 1_800_000_000_000, author: "agent".to_owned(), commands };
        member.api.raft.propose(&Command::Registry(batch)).await.unwrap();
        let answer = member.admin(Method::GET, "/api/v1/workloads", "").await.json();
        let row = &answer["items"][0];
        shown.push(format!("{} {}", row["health"].as_str().unwrap(), row["reason"].as_str().unwrap()));
    }
    assert_eq!(shown, ["Healthy ", "Unhealthy GET http://127.0.0.1:80/: status 503", "Healthy "]);
    member.stop().await;
}
