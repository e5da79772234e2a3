//! Configuration over REST: one object at a time, lists in pages, and changes as they happen.

use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};

use crate::member::{ADMIN, Answer, Member};
use crate::roles::rule;

const RULES: &str = "/api/v1/config/destinationrules";

fn object(name: &str, host: &str) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": { "name": name, "namespace": "shop", "labels": { "app": name } },
        "spec": { "host": host },
    })
}

async fn call(member: &Member, method: Method, path: &str, body: &Value) -> Answer {
    member.call(method, path, Some(ADMIN), &body.to_string()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_is_changed_only_if_it_is_as_expected() {
    let member = Member::start().await;
    let at = format!("{RULES}/shop/a");
    let created = call(&member, Method::POST, &format!("{RULES}/shop"), &object("a", "a")).await;
    assert_eq!((created.status, &created.json()["objects"][0]["action"]), (201, &json!("created")));
    let first = created.json()["revision"].as_u64().unwrap();
    let again = call(&member, Method::POST, &format!("{RULES}/shop"), &object("a", "b")).await;
    assert_eq!(again.status, 409, "{again:?}");
    let stale = format!("{at}?expectedRevision={}", first + 100);
    assert_eq!(call(&member, Method::PUT, &stale, &object("a", "b")).await.status, 409);
    let right = format!("{at}?expectedRevision={first}");
    let replaced = call(&member, Method::PUT, &right, &object("a", "b")).await;
    assert_eq!(replaced.status, 200, "{replaced:?}");
    let mut read = call(&member, Method::GET, &at, &Value::Null).await.json();
    assert_eq!(read["spec"]["host"], "b");
    // What was read can be written back, and only once.
    read["spec"]["host"] = json!("c");
    assert_eq!(call(&member, Method::PUT, &at, &read).await.status, 200);
    assert_eq!(call(&member, Method::PUT, &at, &object_at(&read, "d")).await.status, 409);
    assert_eq!(call(&member, Method::DELETE, &right, &Value::Null).await.status, 409);
    assert_eq!(call(&member, Method::DELETE, &at, &Value::Null).await.status, 200);
    assert_eq!(call(&member, Method::GET, &at, &Value::Null).await.status, 404);
    member.stop().await;
}

fn object_at(read: &Value, host: &str) -> Value {
    let mut object = read.clone();
    object["spec"]["host"] = json!(host);
    object
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mistake_is_told_with_its_field_and_its_place() {
    let member = Member::start().await;
    let mut wrong = object("a", "a");
    wrong["spec"]["subsets"] = json!([{ "name": 7, "nonsense": true }]);
    let told = call(&member, Method::POST, &format!("{RULES}/shop"), &wrong).await;
    assert_eq!(told.status, 422);
    assert_eq!(told.headers["content-type"], "application/problem+json");
    let pointers: Vec<_> =
        told.json()["errors"].as_array().unwrap().iter().map(|e| e["pointer"].clone()).collect();
    assert!(pointers.contains(&json!("/spec/subsets/0/nonsense")), "{pointers:?}");
    let elsewhere = call(&member, Method::POST, &format!("{RULES}/bank"), &object("a", "a")).await;
    assert_eq!(elsewhere.json()["errors"][0]["field"], "metadata.namespace");
    let file =
        json!({ "files": [{ "name": "x.yaml", "text": "kind: DestinationRule\nspec: {hosts: 3}\n" }] });
    let told = call(&member, Method::POST, "/api/v1/apply", &file).await.json();
    let place = &told["errors"][0];
    assert!(place["file"] == "x.yaml" && place["line"].is_u64() && place["column"].is_u64(), "{told}");
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_show_one_revision_whatever_happens_meanwhile() {
    let member = Member::start().await;
    for n in 0..25 {
        member.apply(&rule("shop", &format!("r{n:02}"))).await;
    }
    let (mut names, mut revisions, mut next) = (Vec::new(), Vec::new(), String::new());
    loop {
        let path = format!("{RULES}?limit=10&fieldSelector=metadata.name!=r03&continue={next}");
        let page = call(&member, Method::GET, &path, &Value::Null).await.json();
        let items = page["items"].as_array().unwrap().iter();
        names.extend(items.map(|o| o["metadata"]["name"].as_str().unwrap().to_owned()));
        revisions.push(page["metadata"]["resourceVersion"].clone());
        next = page["metadata"]["continue"].as_str().unwrap_or_default().to_owned();
        if next.is_empty() {
            break;
        }
        // Neither what comes nor what goes is in the pages that follow.
        call(&member, Method::DELETE, &format!("{RULES}/shop/r24"), &Value::Null).await;
        member.apply(&rule("shop", "r99")).await;
    }
    let wanted: Vec<_> = (0..25).filter(|n| *n != 3).map(|n| format!("r{n:02}")).collect();
    assert_eq!(names, wanted);
    assert!(revisions.iter().all(|revision| revision == &revisions[0]), "{revisions:?}");
    let now = call(&member, Method::GET, &format!("{RULES}?consistency=stale"), &Value::Null).await.json();
    assert_eq!(now["items"].as_array().unwrap().len(), 25);
    let wrong = call(&member, Method::GET, &format!("{RULES}?continue=x"), &Value::Null).await;
    assert_eq!((wrong.status, &wrong.json()["errors"][0]["field"]), (422, &json!("continue")));
    member.stop().await;
}

/// The first events of a watch.
async fn watched(member: &Member, query: &str, count: usize) -> Vec<Value> {
    let stream = tokio::net::TcpStream::connect(member.address).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    let request = Request::get(format!("/api/v1/watch/destinationrules?{query}"))
        .header("host", "localhost")
        .header("accept-encoding", "gzip")
        .header("authorization", format!("Bearer {ADMIN}"));
    let read = async {
        let request = request.body(Full::new(bytes::Bytes::new())).unwrap();
        let mut body = sender.send_request(request).await.unwrap().into_body();
        let mut text = String::new();
        while text.lines().count() < count {
            let frame = body.frame().await.unwrap().unwrap();
            text += std::str::from_utf8(&frame.into_data().unwrap()).unwrap();
        }
        text.lines().take(count).map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    tokio::time::timeout(crate::member::PATIENCE, async {
        tokio::select! {
            read = read => read,
            _ = async { connection.await.unwrap_or_default(); std::future::pending::<()>().await } => unreachable!(),
        }
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_tells_changes_and_goes_on_where_it_ended() {
    let member = Member::start().await;
    let first = member.apply(&rule("shop", "a")).await;
    let (events, _) = tokio::join!(watched(&member, "", 3), async {
        member.apply(&rule("shop", "b")).await;
    });
    let kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert!(kinds[..2] == ["ADDED", "BOOKMARK"] || kinds[..2] == ["ADDED", "ADDED"], "{events:?}");
    let last = member.apply(&rule("shop", "c")).await;
    let events = watched(&member, &format!("revision={first}"), 2).await;
    let names: Vec<_> = events.iter().map(|event| &event["object"]["metadata"]["name"]).collect();
    assert_eq!(names, ["b", "c"]);
    assert_eq!(events[1]["revision"], last);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_answers_are_compressed_when_the_caller_wants_it() {
    let member = Member::start().await;
    let request = Request::get("/openapi.json").header("host", "localhost").header("accept-encoding", "gzip");
    let answer = member.send(request.body(Full::new(bytes::Bytes::new())).unwrap()).await;
    assert_eq!(answer.headers["content-encoding"], "gzip");
    assert!(answer.body.starts_with(&[0x1f, 0x8b]), "gzip's magic (RFC 1952)");
    let plain = member.call(Method::GET, "/openapi.json", None, "").await;
    assert!(answer.body.len() < plain.body.len() / 3, "{} of {}", answer.body.len(), plain.body.len());
    member.stop().await;
}
