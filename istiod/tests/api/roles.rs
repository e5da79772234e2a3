//! Every route, with every role and with none.

use http::Method;
use istiod::access::{Permission, Role};
use istiod::api::routes::{self, Form, Route, Scope, Verb};

use crate::member::{ADMIN, Answer, Member};

/// Somebody who calls.
struct Who {
    name: &'static str,
    role: Option<Role>,
    /// Limited to the namespace `shop`.
    limited: bool,
    token: Option<String>,
}

async fn everybody(member: &Member) -> Vec<Who> {
    let mut all = vec![
        Who { name: "nobody", role: None, limited: false, token: None },
        Who { name: "a stranger", role: None, limited: false, token: Some("guess".to_owned()) },
        Who { name: "the operator", role: Some(Role::Admin), limited: false, token: Some(ADMIN.to_owned()) },
    ];
    let names = [("viewer", "viewer of shop"), ("editor", "editor of shop"), ("admin", "admin of shop")];
    for (role, (name, limited)) in Role::ALL.into_iter().zip(names) {
        let token = Some(member.token(role, &[]).await.token);
        all.push(Who { name, role: Some(role), limited: false, token });
        let token = Some(member.token(role, &["shop"]).await.token);
        all.push(Who { name: limited, role: Some(role), limited: true, token });
    }
    all
}

fn path(route: &Route, namespace: &str) -> String {
    let path = route.path.replace("{namespace}", namespace).replace("{kind}", "virtualservices");
    let path = path.replace("{revision}", "0").replace("{name}", "absent").replace("{id}", "absent");
    assert!(!path.contains('{'), "{path}: a parameter that this test does not know");
    path + if route.id == "wait" { "?timeoutMilliseconds=0" } else { "" }
}

fn method(route: &Route) -> Method {
    match route.verb {
        Verb::Get => Method::GET,
        Verb::Post => Method::POST,
        Verb::Put => Method::PUT,
        Verb::Delete => Method::DELETE,
    }
}

/// What the gate says; nothing when it lets the call through.
fn expected(route: &Route, who: &Who, namespace: &str) -> Option<u16> {
    if route.needs == Permission::Open {
        return None;
    }
    let Some(role) = who.role else { return Some(401) };
    let enough = match route.needs {
        Permission::Open | Permission::Read => true,
        Permission::Write => role != Role::Viewer,
        Permission::Administer => role == Role::Admin,
    };
    let covered = match route.scope {
        Scope::Nobody | Scope::Each => true,
        Scope::Path => !who.limited || namespace == "shop",
        Scope::Mesh => !who.limited,
    };
    (!enough || !covered).then_some(403)
}

fn refused_by_the_gate(answer: &Answer) -> bool {
    matches!(answer.status, 401 | 403)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_asks_every_caller_for_its_role() {
    let member = Member::start().await;
    let everybody = everybody(&member).await;
    let mut calls = 0;
    for route in routes::all().filter(|route| !matches!(route.answer, Form::Grpc)) {
        for who in &everybody {
            for namespace in ["shop", "bank"] {
                let (method, path) = (method(route), path(route, namespace));
                let wanted = expected(route, who, namespace);
                if matches!(route.answer, Form::Lines(_)) {
                    let status = member.status(method, &path, who.token.as_deref()).await;
                    let told = format!("{path} by {}: {status}", who.name);
                    assert!(
                        wanted.map_or(![401, 403].contains(&status), |wanted| wanted == status),
                        "{told}"
                    );
                    calls += 1;
                    continue;
                }
                let answer = member.call(method, &path, who.token.as_deref(), "").await;
                let told = format!("{} {path} by {}: {answer:?}", route.verb.as_str(), who.name);
                match wanted {
                    Some(status) => {
                        assert_eq!(answer.status, status, "{told}");
                        assert_eq!(answer.json()["status"], status, "{told}");
                    }
                    None => assert!(!refused_by_the_gate(&answer) && answer.status < 500, "{told}"),
                }
                calls += 1;
            }
        }
    }
    assert!(calls > 400, "{calls}");
    member.stop().await;
}

#[test]
fn the_table_gives_no_route_away() {
    let mut seen = std::collections::BTreeSet::new();
    for route in routes::all() {
        let told = format!("{} {}", route.verb.as_str(), route.path);
        assert!(!route.id.is_empty() && !route.does.is_empty(), "{told} has no name");
        assert!(seen.insert(route.id), "{told}: `{}` is another route's name", route.id);
        let open =
            ["/ready", "/openapi.json", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];
        assert_eq!(route.needs == Permission::Open, open.contains(&route.path), "{told}");
        if route.path.starts_with("/api/") && !route.verb.is_safe() {
            assert!(route.needs >= Permission::Write, "{told} changes something");
        }
        for secret in ["/access/", "/tokens", "/nodes", "/backup", "/audit", "/members/"] {
            let guarded = !route.path.contains(secret) || route.needs == Permission::Administer;
            assert!(guarded, "{told} is for admins");
        }
        let named = route.path.contains("{namespace}");
        assert_eq!(named, route.scope == Scope::Path, "{told}: the scope is the path's");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_of_one_namespace_sees_and_changes_nothing_of_another() {
    let member = Member::start().await;
    for namespace in ["shop", "bank"] {
        member.apply(&rule(namespace, "a")).await;
    }
    let token = member.token(Role::Admin, &["shop"]).await.token;
    let token = Some(token.as_str());
    let list = member.call(Method::GET, "/api/v1/config/all", token, "").await.json();
    let seen: Vec<_> =
        list["items"].as_array().unwrap().iter().map(|o| &o["metadata"]["namespace"]).collect();
    assert_eq!(seen, ["shop"]);
    let asked = member.call(Method::GET, "/api/v1/config/all?namespace=bank", token, "").await.json();
    assert_eq!(asked["items"], serde_json::json!([]));
    for (yaml, status) in [(rule("bank", "b"), 403), (rule("shop", "b"), 200)] {
        let files = serde_json::json!({ "files": [{ "name": "a", "text": yaml }] }).to_string();
        assert_eq!(member.call(Method::POST, "/api/v1/apply", token, &files).await.status, status);
    }
    let mesh =
        "{apiVersion: mesh.istio.io/v1alpha1, kind: MeshConfig, metadata: {name: mesh, namespace: shop}}";
    let files = serde_json::json!({ "files": [{ "name": "a", "text": mesh }] }).to_string();
    assert_ne!(member.call(Method::POST, "/api/v1/apply", token, &files).await.status, 200);
    for (role, namespaces, status) in [
        ("admin", vec!["shop"], 201),
        ("viewer", vec!["bank"], 403),
        ("viewer", vec![], 403),
        ("viewer", vec!["No Name"], 422),
    ] {
        let body = serde_json::json!({ "role": role, "namespaces": namespaces }).to_string();
        let answer = member.call(Method::POST, "/api/v1/access/tokens", token, &body).await;
        assert_eq!(answer.status, status, "{answer:?}");
    }
    let rows = member.call(Method::GET, "/api/v1/access/tokens", token, "").await.json();
    assert_eq!(rows["items"].as_array().unwrap().len(), 2, "its own and the one that it made: {rows}");
    let history = member.call(Method::GET, "/api/v1/history", token, "").await;
    assert!(!String::from_utf8_lossy(&history.body).contains("bank"), "{history:?}");
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_revoked_once_and_one_that_nobody_knows_only_with_force() {
    let member = Member::start().await;
    let limited = member.token(Role::Admin, &["shop"]).await.token;
    let revoke = async |token: &str, node: &str, reason: &str, force: bool| {
        let body = serde_json::json!({ "node": node, "reason": reason, "force": force }).to_string();
        member.call(Method::POST, "/api/v1/nodes/revoke", Some(token), &body).await
    };
    let admin = member.token(Role::Admin, &[]).await.token;
    let node = "3a7816bf8f01cfea";
    assert_eq!(revoke(&admin, "3a78", "", true).await.status, 422);
    assert_eq!(revoke(&admin, node, &"x".repeat(257), true).await.status, 422);
    assert_eq!(revoke(&admin, node, "a\nb", true).await.status, 422);
    assert_eq!(revoke(&admin, node, "", false).await.status, 404);
    assert_eq!(revoke(&limited, node, "", true).await.status, 404);
    let revoked = revoke(&admin, node, "stolen", true).await;
    assert_eq!((revoked.status, &revoked.json()["revoked"]["reason"]), (200, &"stolen".into()));
    let again = revoke(&admin, node, "lost", false).await;
    assert_eq!((again.status, &again.json()["revoked"]["reason"]), (200, &"stolen".into()));
    let rows = member.call(Method::GET, "/api/v1/nodes", Some(&admin), "").await.json();
    assert_eq!((&rows["items"][0]["id"], rows["items"].as_array().unwrap().len()), (&node.into(), 1));
    let rows = member.call(Method::GET, "/api/v1/nodes", Some(&limited), "").await.json();
    assert_eq!(rows["items"], serde_json::json!([]));
    let audit = member.call(Method::GET, "/api/v1/audit", Some(&admin), "").await;
    let audit = String::from_utf8_lossy(&audit.body).into_owned();
    assert!(audit.contains("revoke node") && audit.contains(&format!("RevokedNode/{node}")), "{audit}");
    member.stop().await;
}

/// A destination rule.
pub(crate) fn rule(namespace: &str, name: &str) -> String {
    format!(
        "{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: {name}, namespace: {namespace}}}, spec: {{host: {name}}}}}"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_revoked_opens_nothing_from_then_on() {
    let member = Member::start().await;
    let token = member.token(Role::Editor, &[]).await;
    let mine = async || member.call(Method::GET, "/api/v1/whoami", Some(&token.token), "").await;
    let me = mine().await.json();
    assert_eq!((&me["role"], &me["name"]), (&"editor".into(), &format!("token/{}", token.id).into()));
    member.admin(Method::DELETE, &format!("/api/v1/access/tokens/{}", token.id), "").await;
    assert_eq!(mine().await.status, 401);
    let rows = member.admin(Method::GET, "/api/v1/access/tokens", "").await.json();
    assert_eq!(rows["items"], serde_json::json!([]));
    member.stop().await;
}
