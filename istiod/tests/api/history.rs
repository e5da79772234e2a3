//! History, previews, pruning, the audit trail and backups over the API.

use std::sync::Arc;

use http::Method;
use istiod::access::Role;
use istiod::api::audit::AuditPage;
use istiod::raft::View;
use istiod::raft::part::Part as _;
use serde_json::{Value, json};
use xds::proxy::Proxy;
use xds::status::Connection;
use xds::stream::Variant;

use crate::member::{ADMIN, Member};
use crate::roles::rule;

fn files(yaml: &[String]) -> Value {
    json!({ "files": [{ "name": "test.yaml", "text": yaml.join("\n---\n") }] })
}

fn rule_to(name: &str, host: &str) -> String {
    rule("shop", name).replace(&format!("host: {name}"), &format!("host: {host}"))
}

/// `name=action ...`
fn actions(report: &Value) -> String {
    let objects = report["objects"].as_array().unwrap_or_else(|| panic!("{report}"));
    let told = objects.iter().map(|o| format!("{}={}", o["name"], o["action"]).replace('"', ""));
    told.collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_is_shown_compared_and_brought_back_in_one_commit() {
    let member = Member::start().await;
    let first = member.apply(&[rule_to("a", "one"), rule_to("b", "one")].join("\n---\n")).await;
    let second = member.apply(&[rule_to("a", "two"), rule_to("c", "one")].join("\n---\n")).await;
    let gone = "/api/v1/config/destinationrule/shop/b";
    member.admin(Method::DELETE, gone, "").await;

    let at = format!("/api/v1/history/{first}/config/dr/shop/a");
    assert_eq!(member.admin(Method::GET, &at, "").await.json()["spec"]["host"], "one");
    let at = format!("/api/v1/history/{second}/config/all");
    let list = member.admin(Method::GET, &at, "").await.json();
    let names: Vec<_> = list["items"].as_array().unwrap().iter().map(|o| &o["metadata"]["name"]).collect();
    assert_eq!(names, ["a", "b", "c"]);
    for (path, status) in [
        ("/api/v1/history/99999/config/dr/shop/a".to_owned(), 404),
        (format!("/api/v1/history/{first}/config/dr/shop/c"), 404),
        (format!("/api/v1/diff?from={first}&to=99999"), 404),
    ] {
        let answer = member.call(Method::GET, &path, Some(ADMIN), "").await;
        assert_eq!(answer.status, status, "{path}: {answer:?}");
    }

    let diff = member.admin(Method::GET, &format!("/api/v1/diff?from={first}"), "").await.json();
    let told: Vec<String> = diff["objects"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| format!("{} {}", o["change"], o["object"]).replace('"', ""))
        .collect();
    let expect =
        ["changed DestinationRule/shop/a", "removed DestinationRule/shop/b", "added DestinationRule/shop/c"];
    assert_eq!(told, expect);
    let lines = diff["objects"][0]["diff"].as_str().unwrap();
    assert!(lines.contains("-  host: one\n+  host: two\n"), "{lines}");

    let back = json!({ "to": first }).to_string();
    let dry = member.admin(Method::POST, "/api/v1/rollback?dryRun=all", &back).await.json();
    assert_eq!(actions(&dry), "a=configured b=created c=deleted");
    let done = member.admin(Method::POST, "/api/v1/rollback", &back).await.json();
    assert_eq!(actions(&done), "a=configured b=created c=deleted", "a dry run had changed nothing");
    let diff = member.admin(Method::GET, &format!("/api/v1/diff?from={first}"), "").await.json();
    assert_eq!(diff["objects"], json!([]));
    let again = member.admin(Method::POST, "/api/v1/rollback", &back).await.json();
    assert_eq!(again["objects"], json!([]));

    let token = member.token(Role::Editor, &["bank"]).await.token;
    for body in [back, json!({ "to": first, "namespace": "shop" }).to_string()] {
        assert_eq!(member.call(Method::POST, "/api/v1/rollback", Some(&token), &body).await.status, 403);
    }
    let keep = json!({ "entries": 1, "ageSeconds": 60 }).to_string();
    member.admin(Method::PUT, "/api/v1/history/retention", &keep).await;
    let kept = member.admin(Method::GET, "/api/v1/history/retention", "").await.json();
    assert_eq!(kept, json!({ "entries": 1, "ageSeconds": 60 }));
    let path = format!("/api/v1/history/{first}/config/all");
    let forgotten = member.call(Method::GET, &path, Some(ADMIN), "").await;
    assert_eq!(forgotten.status, 404, "{forgotten:?}");
    assert!(forgotten.json()["detail"].as_str().unwrap().contains("reaches back to"), "{forgotten:?}");
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_to_what_is_not_valid_with_what_stays_is_refused() {
    let member = Member::start().await;
    let service = |namespace: &str, name: &str, spec: &str| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: VirtualService, \
             metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"
        )
    };
    let http = "http: [{route: [{destination: {host: a}}]}]";
    let root = service("shop", "v", "{hosts: [a.example], http: [{delegate: {name: d, namespace: bank}}]}");
    let delegate = service("bank", "d", &format!("{{{http}}}"));
    let first = member.apply(&[root, delegate].join("\n---\n")).await;
    member.admin(Method::DELETE, "/api/v1/config/vs/shop/v", "").await;
    let second = member.apply(&service("bank", "d", &format!("{{hosts: [d.example], {http}}}"))).await;
    // What stays in `bank` cannot be delegated to any more.
    let body = json!({ "to": first, "namespace": "shop" }).to_string();
    let refused = member.call(Method::POST, "/api/v1/rollback", Some(ADMIN), &body).await;
    assert_eq!(refused.status, 422, "{refused:?}");
    let told = refused.json()["errors"][0].clone();
    assert!(told["detail"].as_str().unwrap().contains("a delegate must have none"), "{told}");
    assert_eq!(told["object"], "VirtualService/shop/v");
    let now = member.admin(Method::GET, "/api/v1/revisions", "").await.json();
    assert_eq!(now["configuration"], second, "nothing was committed");
    let whole = member.admin(Method::POST, "/api/v1/rollback", &json!({ "to": first }).to_string()).await;
    assert_eq!(actions(&whole.json()), "d=configured v=created");
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_is_pruned_in_the_same_commit_and_a_second_run_changes_nothing() {
    let member = Member::start().await;
    member.apply(&rule("shop", "foreign")).await;
    let apply = async |names: &[&str], prune: Value| {
        let mut body = files(&names.iter().map(|name| rule("shop", name)).collect::<Vec<_>>());
        body["prune"] = prune;
        member.call(Method::POST, "/api/v1/apply", Some(ADMIN), &body.to_string()).await
    };
    let set = || json!({ "set": "shop" });
    assert_eq!(actions(&apply(&["a", "b"], set()).await.json()), "a=created b=created");
    let first = apply(&["b", "c"], set()).await.json();
    assert_eq!(actions(&first), "b=unchanged c=created a=deleted");
    let second = apply(&["b", "c"], set()).await.json();
    assert_eq!(actions(&second), "b=unchanged c=unchanged");
    let diff = member.admin(Method::GET, &format!("/api/v1/diff?from={}", first["revision"]), "").await;
    assert_eq!(diff.json()["objects"], json!([]));

    let other = apply(&["d"], json!({ "selector": "applyset.kubernetes.io/part-of=shop" })).await;
    assert_eq!(other.status, 422, "d does not have the labels: {other:?}");
    for wrong in [
        json!({ "selector": " " }),
        json!({ "set": "a b" }),
        json!({}),
        json!({ "set": "a", "selector": "b" }),
    ] {
        let status = apply(&["d"], wrong.clone()).await.status;
        assert!(matches!(status, 400 | 422), "{wrong}: {status}");
    }
    let left = member.admin(Method::GET, "/api/v1/config/dr", "").await.json();
    let names: Vec<_> = left["items"].as_array().unwrap().iter().map(|o| &o["metadata"]["name"]).collect();
    assert_eq!(names, ["b", "c", "foreign"]);
    member.stop().await;
}

fn connect(member: &Member, number: u8, namespace: &str) -> Connection {
    let node =
        json!({ "id": format!("sidecar~10.0.0.{number}~app.{namespace}~{namespace}.svc.cluster.local") });
    let proxy = Proxy::from_node(&wire::json::message_from_json(&node).unwrap(), None).unwrap();
    let now = tokio::time::Instant::now().into_std();
    member.api.status.connect(Arc::new(proxy), Variant::Delta, "test".to_owned(), now)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preview_names_proxies_and_resources_and_too_many_are_refused_unless_forced() {
    let member = Member::start().await;
    let places = [(1, "shop"), (2, "bank"), (3, "bank")];
    let _connections = places.map(|(number, namespace)| connect(&member, number, namespace));
    let entry = |export: &str| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: e, namespace: shop}}, \
             spec: {{hosts: [e.example], exportTo: ['{export}'], resolution: STATIC, \
             ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: 10.1.0.1}}]}}}}"
        )
    };
    let preview = async |export: &str, token: &str| {
        let body = files(&[entry(export)]).to_string();
        let answer = member.call(Method::POST, "/api/v1/apply?dryRun=preview", Some(token), &body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["preview"].clone()
    };
    let told = preview(".", ADMIN).await;
    assert_eq!(
        (&told["connected"], &told["partial"], &told["hidden"]),
        (&json!(3), &json!(false), &json!(0))
    );
    assert_eq!(told["proxies"].as_array().unwrap().len(), 1, "{told}");
    assert_eq!(told["proxies"][0]["namespace"], "shop");
    assert!(told["bytes"].as_u64().unwrap() > 100, "{told}");
    let cluster = told["resources"].as_array().unwrap().iter().find(|r| r["type"] == "CDS").unwrap();
    assert_eq!((&cluster["name"], &cluster["change"]), (&json!("outbound|80||e.example"), &json!("added")));
    let diff = cluster["diff"].as_str().unwrap();
    assert!(diff.starts_with("--- /dev/null\n+++ CDS outbound|80||e.example (then)\n"), "{diff}");
    let token = member.token(Role::Editor, &["shop"]).await.token;
    let limited = preview("*", &token).await;
    assert_eq!(
        (limited["proxies"].as_array().unwrap().len(), &limited["hidden"]),
        (1, &json!(2)),
        "{limited}"
    );
    assert!(
        member.api.raft.view().await.unwrap().registry.objects().next().is_none(),
        "nothing is committed"
    );

    let mesh = "{apiVersion: mesh.istio.io/v1alpha1, kind: MeshConfig, metadata: {name: mesh, namespace: istio-system}, \
         spec: {maxAffectedProxiesPercent: 50}}";
    member.apply(mesh).await;
    let apply = async |export: &str, query: &str| {
        let body = files(&[entry(export)]).to_string();
        member.call(Method::POST, &format!("/api/v1/apply{query}"), Some(ADMIN), &body).await
    };
    let refused = apply("*", "").await;
    assert_eq!(refused.status, 409, "{refused:?}");
    assert!(refused.json()["detail"].as_str().unwrap().contains("touches 3 of 3 proxies"), "{refused:?}");
    assert_eq!(apply(".", "").await.status, 200, "one of three is allowed");
    let warned = apply("*", "?dryRun=preview").await.json();
    assert!(warned["warnings"][0].as_str().unwrap().contains("2 of 3"), "{warned}");
    assert_eq!(apply("*", "?force=true").await.status, 200);
    let gone = "/api/v1/config/serviceentry/shop/e";
    assert_eq!(member.call(Method::DELETE, gone, Some(ADMIN), "").await.status, 409);
    assert_eq!(member.call(Method::DELETE, &format!("{gone}?force=true"), Some(ADMIN), "").await.status, 200);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_trail_names_callers_and_verifies_piece_by_piece() {
    let member = Member::start().await;
    let created = member.token(Role::Editor, &[]).await;
    let body = files(&[rule("shop", "a")]).to_string();
    member.call(Method::POST, "/api/v1/apply", Some(&created.token), &body).await;
    for name in ["b", "c", "d"] {
        member.apply(&rule("shop", name)).await;
    }
    let page = async |query: &str| -> AuditPage {
        let answer = member.admin(Method::GET, &format!("/api/v1/audit{query}"), "").await;
        serde_json::from_slice(&answer.body).unwrap()
    };
    let all = page("").await;
    assert_eq!((all.verify(), all.more), (Ok(all.head), false));
    let mine = all.entries.iter().find(|e| e.origin.who == format!("token/{}", created.id)).unwrap();
    assert_eq!(
        (mine.origin.action.as_str(), mine.objects[0].what.as_str()),
        ("apply", "DestinationRule/shop/a")
    );
    assert!(mine.origin.from.starts_with("127.0.0.1:") && mine.objects[0].after.is_some());
    assert!(all.entries.iter().any(|e| e.objects.iter().any(|o| o.what.starts_with("Access/"))));

    let (mut after, mut seen) = (0, Vec::new());
    let mut head = all.anchor.hash;
    loop {
        let piece = page(&format!("?limit=2&after={after}")).await;
        assert_eq!(piece.anchor.hash, head, "pieces follow each other");
        head = piece.verify().unwrap();
        after = piece.entries.last().map_or(after, |entry| entry.revision);
        seen.extend(piece.entries);
        if !piece.more {
            break;
        }
    }
    assert_eq!((seen, head), (all.entries.clone(), all.head));
    let mut cut = all.clone();
    cut.entries.pop();
    assert!(cut.verify().is_err(), "the newest entry cannot be cut off");
    let keep = json!({ "entries": 2, "ageSeconds": 0 }).to_string();
    member.admin(Method::PUT, "/api/v1/audit/retention", &keep).await;
    let left = page("").await;
    assert_eq!((left.entries.len(), left.verify()), (2, Ok(left.head)));
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_is_the_state_at_its_revision() {
    let member = Member::start().await;
    member.token(Role::Viewer, &["shop"]).await;
    member.apply(&rule("shop", "a")).await;
    let answer = member.admin(Method::GET, "/api/v1/backup", "").await;
    let view = member.api.raft.view().await.unwrap();
    assert_eq!(answer.headers["mesh-revision"], view.revision.to_string());
    assert_eq!(answer.headers["mesh-trust-domain"], "cluster.local");
    assert_eq!(answer.body, view.encode());
    let again = View::decode(view.revision.0, &answer.body).unwrap();
    assert_eq!(again.access.pairs(), view.access.pairs());
    member.stop().await;
}
