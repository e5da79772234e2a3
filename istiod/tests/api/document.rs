//! The OpenAPI document: valid, whole, and true.

use std::collections::BTreeSet;

use http::Method;
use istiod::api::routes::{self, Form};
use serde_json::Value;

use crate::member::Member;
use crate::roles::rule;
use crate::schema::{is_a_schema, mistakes, resolve};

/// The schema of the good answer of an operation, if it is JSON.
pub(crate) fn answer_schema<'a>(
    document: &'a Value,
    path: &str,
    verb: &str,
    status: u16,
) -> Option<&'a Value> {
    let operation = &document["paths"][path][verb];
    operation["responses"][status.to_string()].get("content")?.get("application/json")?.get("schema")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_is_served_is_valid_and_has_every_route() {
    let member = Member::start().await;
    let document = member.call(Method::GET, "/openapi.json", None, "").await.json();
    assert_eq!(document["openapi"], "3.1.1");
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        is_a_schema(&document, schema, name);
    }
    let mut operations = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (verb, operation) in item.as_object().unwrap() {
            check(&document, path, operation);
            operations.insert(format!("{} {path}", verb.to_uppercase()));
        }
    }
    let table = routes::all().filter(|route| !matches!(route.answer, Form::Grpc));
    let table: BTreeSet<String> = table.map(|r| format!("{} {}", r.verb.as_str(), r.path)).collect();
    assert_eq!(operations, table);
    member.stop().await;
}

/// One operation: its parameters are those of its path, its schemas are some, and a refusal is a problem.
fn check(document: &Value, path: &str, operation: &Value) {
    let in_path: BTreeSet<&str> =
        path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}')).collect();
    let parameters = operation["parameters"].as_array().unwrap();
    let said = parameters.iter().filter(|p| p["in"] == "path").map(|p| p["name"].as_str().unwrap());
    assert_eq!(said.collect::<BTreeSet<_>>(), in_path, "{path}");
    for parameter in parameters {
        assert!(parameter["required"].is_boolean() && parameter["name"].is_string(), "{path}: {parameter}");
        is_a_schema(document, &parameter["schema"], path);
    }
    let responses = operation["responses"].as_object().unwrap();
    let refused = resolve(document, &responses["default"]);
    assert!(refused["content"]["application/problem+json"]["schema"].is_object(), "{path}");
    let bodies = responses.values().chain(operation.get("requestBody")).map(|body| resolve(document, body));
    for (_, content) in bodies.filter_map(|body| body.get("content")?.as_object()).flatten() {
        if let Some(schema) = content.get("schema") {
            is_a_schema(document, schema, path);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_what_the_document_says() {
    let member = Member::start().await;
    member.apply(&rule("shop", "a")).await;
    let document = member.call(Method::GET, "/openapi.json", None, "").await.json();
    let created = member.token(istiod::access::Role::Viewer, &["shop"]).await;
    assert!(created.token.starts_with("istio-api."));
    let mut checked = 0;
    for route in routes::all().filter(|route| matches!(route.answer, Form::Json(_)) && route.verb.is_safe()) {
        let path = route.path.replace("{kind}", "destinationrules").replace("{namespace}", "shop");
        let path = path.replace("{name}", "a").replace("{revision}", "0?timeoutMilliseconds=0");
        let answer = member.call(Method::GET, &path, Some(crate::member::ADMIN), "").await;
        if answer.status != route.status {
            continue; // what needs a proxy, or a thing that is not there
        }
        let schema = answer_schema(&document, route.path, "get", route.status).unwrap();
        let told = mistakes(&document, schema, &answer.json());
        assert!(told.is_empty(), "{path}: {told:#?}");
        checked += 1;
    }
    assert!(checked >= 15, "{checked}");
    member.stop().await;
}
