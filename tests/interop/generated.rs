//! Generated scenarios: routes and requests from a seed, given to our proxy and to a stock Envoy, which must do the same.
//!
//! [`scenario`] makes the routes and [`request`] what is asked of them, [`pair`] runs both proxies and asks them over
//! [`connection`]s, [`differences`] says what may differ, and [`shrink`] makes what does small enough to be read.
//!
//! `INTEROP_SEEDS=1000 cargo test --profile quick -p tests --test interop generated` runs as many scenarios as it says, from
//! `INTEROP_SEED_START` on: with `INTEROP_SEED_START=17 INTEROP_SEEDS=1` what seed 17 asks is asked again, alone.
//! `INTEROP_SHOWN` says of how many kinds of differences one is shrunken and shown.

mod action;
mod connection;
mod dice;
mod differences;
mod filters;
mod pair;
mod request;
mod resources;
mod scenario;
mod shrink;

use std::collections::BTreeMap;

use serde_json::json;

use self::differences::{differ, kind, told};
use self::pair::Case;
use self::request::Request;
use self::scenario::Scenario;

/// Scenarios of a plain run of the tests.
const SEEDS: u64 = 150;
/// Requests of a scenario.
const REQUESTS: usize = 140;
/// Scenarios that a pair of proxies has at once.
const BATCH: u64 = 50;

#[expect(clippy::disallowed_methods, reason = "the settings of a test run")]
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn case(seed: u64) -> Case {
    let scenario = Scenario::new(seed);
    let requests = Request::some(&scenario, seed, REQUESTS);
    Case { scenario, requests }
}

/// A difference in words: the smallest scenario that shows it, the request, and what each proxy did.
async fn report(seed: u64, case: Case) -> String {
    let small = shrink::shrink(case).await;
    let request = &small.requests[0];
    let yaml =
        serde_saphyr::to_string(&json!({"manager": small.scenario.manager, "routes": small.scenario.routes}))
            .expect("YAML");
    let answers = pair::ask(std::slice::from_ref(&small)).await.expect("answers");
    let (ours, theirs) = &answers[0][0];
    let all = |lines: &[String]| lines.join("\n  ");
    format!(
        "seed {seed}\n{yaml}\n{request}\n{}\n\nours:\n  {}\nEnvoy:\n  {}\n",
        told(ours, theirs),
        all(ours),
        all(theirs)
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_proxy_does_what_envoy_does_with_generated_routes_and_requests() -> anyhow::Result<()> {
    let (first, count) = (setting("INTEROP_SEED_START", 1), setting("INTEROP_SEEDS", SEEDS));
    let mut found = BTreeMap::<String, Vec<(u64, Case, String)>>::new();
    let mut statuses = BTreeMap::<String, u64>::new();
    let mut asked = 0;
    for start in (first..first + count).step_by(usize::try_from(BATCH)?) {
        let seeds: Vec<u64> = (start..(first + count).min(start + BATCH)).collect();
        let cases: Vec<Case> = seeds.iter().copied().map(case).collect();
        for ((seed, case), answers) in seeds.iter().zip(&cases).zip(pair::ask(&cases).await?) {
            for (request, (ours, theirs)) in case.requests.iter().zip(answers) {
                asked += 1;
                *statuses.entry(theirs.first().cloned().unwrap_or_default()).or_default() += 1;
                if differ(&case.scenario, request, &ours, &theirs) {
                    let case = Case { scenario: case.scenario.clone(), requests: vec![request.clone()] };
                    let told = format!("{request}\n{}", told(&ours, &theirs));
                    found.entry(kind(&ours, &theirs)).or_default().push((*seed, case, told));
                }
            }
        }
    }
    println!("{asked} requests of {count} scenarios from seed {first} on: {statuses:?}");
    let number: usize = found.values().map(Vec::len).sum();
    let mut kinds: Vec<_> = found.into_iter().collect();
    kinds.sort_by_key(|(_, cases)| std::cmp::Reverse(cases.len()));
    for (kind, cases) in &kinds {
        let (seed, _, told) = &cases[0];
        println!(
            "\n{} times {kind}, first with INTEROP_SEED_START={seed} INTEROP_SEEDS=1:\n{told}",
            cases.len()
        );
    }
    for (kind, cases) in kinds.into_iter().take(usize::try_from(setting("INTEROP_SHOWN", 2))?) {
        for (seed, case, _) in cases.into_iter().take(1) {
            println!("\n{kind}: {}", report(seed, case).await);
        }
    }
    assert!(number == 0, "{number} of {asked} requests were answered otherwise");
    let served = statuses.get("status 200").copied().unwrap_or_default();
    assert!(served * 5 > asked, "few requests reached a server: {statuses:?}");
    Ok(())
}

#[test]
fn a_seed_makes_the_same_scenario_and_requests_twice() {
    for seed in 1..20 {
        let [once, again] = [case(seed), case(seed)];
        assert_eq!((once.scenario, once.requests), (again.scenario, again.requests), "seed {seed}");
    }
    assert_ne!(case(1).scenario, case(2).scenario);
}

#[test]
fn scenarios_have_everything_that_is_compared() {
    let all: String = (1..100).map(|seed| case(seed).scenario.routes.to_string()).collect();
    for word in [
        "path_separated_prefix",
        "safe_regex",
        "case_sensitive",
        "range_match",
        "present_match",
        "ignore_case",
        "invert_match",
        "treat_missing_header_as_empty",
        "query_parameters",
        "weighted_clusters",
        "cluster_header",
        "prefix_rewrite",
        "regex_rewrite",
        "host_rewrite_literal",
        "host_rewrite_header",
        "host_rewrite_path_regex",
        "scheme_redirect",
        "https_redirect",
        "port_redirect",
        "host_redirect",
        "path_redirect",
        "strip_query",
        "PERMANENT_REDIRECT",
        "direct_response",
        "APPEND_IF_EXISTS_OR_ADD",
        "ADD_IF_ABSENT",
        "OVERWRITE_IF_EXISTS_OR_ADD",
        "OVERWRITE_IF_EXISTS",
        "keep_empty_value",
        "request_headers_to_remove",
        "response_headers_to_remove",
        "retry_policy",
        "CorsPolicy",
        "require_tls",
        "\"*.",
        ".*\"",
        ":8080",
        "most_specific_header_mutations_wins",
        "ignore_port_in_host_matching",
        "request_mirror_policies",
        "per_try_timeout",
        "fixed_delay",
        "http_status",
        "grpc_status",
        "\"silent\"",
    ] {
        assert!(all.contains(word), "no {word}");
    }
}
