//! A smaller scenario that shows the same: one piece less at a time, for as long as the two still differ. Pure, but for
//! [`shrink`], which asks.

use serde_json::Value;

use super::differences::differ;
use super::pair::{Case, ask};

/// Lists whose elements may go, one by one.
const LISTS: [&str; 9] = [
    "virtual_hosts",
    "routes",
    "domains",
    "headers",
    "query_parameters",
    "request_headers_to_add",
    "response_headers_to_add",
    "request_headers_to_remove",
    "response_headers_to_remove",
];
/// Fields that no configuration is valid without.
const NEEDED: [&str; 21] = [
    "@type",
    "name",
    "match",
    "domains",
    "prefix",
    "path",
    "path_separated_prefix",
    "safe_regex",
    "route",
    "redirect",
    "direct_response",
    "status",
    "cluster",
    "cluster_header",
    "weighted_clusters",
    "header",
    "http_filters",
    "validate_clusters",
    "virtual_hosts",
    "routes",
    "string_match",
];
/// Messages whose fields are all needed, or none of them.
const WHOLE: [&str; 10] = [
    "allow_origin_string_match",
    "safe_regex",
    "regex_rewrite",
    "retry_policy",
    "weighted_clusters",
    "host_rewrite_path_regex",
    "header",
    "http_filters",
    "string_match",
    "body",
];
/// Candidates that are asked at once.
const MOST: usize = 100;
/// Pieces that are taken away at most.
const ROUNDS: usize = 60;

/// The smallest case found that still differs; it has one request.
pub(crate) async fn shrink(mut case: Case) -> Case {
    for _ in 0..ROUNDS {
        let mut candidates = smaller(&case);
        candidates.truncate(MOST);
        // What cannot be asked is not smaller.
        let Ok(answers) = ask(&candidates).await else { break };
        let differs = candidates.into_iter().zip(answers).find(|(case, answers)| {
            answers.iter().any(|(ours, theirs)| differ(&case.scenario, &case.requests[0], ours, theirs))
        });
        match differs {
            Some((smaller, _)) => case = smaller,
            None => break,
        }
    }
    case
}

/// The case without one of its pieces, the largest pieces first.
fn smaller(case: &Case) -> Vec<Case> {
    let mut routes = Vec::new();
    less(&case.scenario.routes, &mut |value| routes.push(value));
    routes.sort_by_key(|routes| routes.to_string().len());
    let routes = routes.into_iter().map(|routes| {
        let mut less = case.clone();
        less.scenario.routes = routes;
        less
    });
    let manager = case.scenario.manager.keys().filter(|key| !NEEDED.contains(&key.as_str())).map(|key| {
        let mut less = case.clone();
        less.scenario.manager.shift_remove(key);
        less
    });
    let requests = case.requests[0]
        .smaller()
        .into_iter()
        .map(|request| Case { requests: vec![request], ..case.clone() });
    routes.chain(requests).chain(manager).collect()
}

/// Every value that lacks one piece of this one.
fn less(value: &Value, give: &mut dyn FnMut(Value)) {
    match value {
        Value::Object(fields) => {
            for (key, inner) in fields {
                if let Value::Array(list) = inner
                    && LISTS.contains(&key.as_str())
                {
                    for at in (0..list.len()).filter(|_| list.len() > 1) {
                        let mut shorter = value.clone();
                        shorter[key] = Value::Array(vec![list[at].clone()]);
                        give(shorter.clone());
                        shorter[key] = Value::Array([&list[..at], &list[at + 1..]].concat());
                        give(shorter);
                    }
                }
                if !NEEDED.contains(&key.as_str()) {
                    let mut without = fields.clone();
                    without.shift_remove(key);
                    give(Value::Object(without));
                }
                if !WHOLE.contains(&key.as_str()) {
                    less(inner, &mut |inner| {
                        let mut changed = value.clone();
                        changed[key] = inner;
                        give(changed);
                    });
                }
            }
        }
        Value::Array(list) => {
            for (at, inner) in list.iter().enumerate() {
                less(inner, &mut |inner| {
                    let mut changed = list.clone();
                    changed[at] = inner;
                    give(Value::Array(changed));
                });
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_piece_but_what_is_needed_goes() {
    let value = serde_json::json!({"name": "r", "virtual_hosts": [{"routes": [1, 2], "require_tls": "ALL"}]});
    let mut all = Vec::new();
    less(&value, &mut |less| all.push(less.to_string()));
    let host = |inner: &str| format!(r#"{{"name":"r","virtual_hosts":[{{{inner}}}]}}"#);
    let expected =
        [r#""routes":[1],"require_tls":"ALL""#, r#""routes":[2],"require_tls":"ALL""#, r#""routes":[1,2]"#];
    for inner in expected {
        assert!(all.contains(&host(inner)), "{inner}: {all:?}");
    }
    assert_eq!(all.len(), 5, "{all:?}");
}
