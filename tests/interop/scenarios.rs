//! Scenarios: what the proxies are told, what servers there are, and what is asked. Our proxy and a stock Envoy get the
//! same resources and must do the same: what the servers see, what the client gets, what the access log says, which
//! endpoint is chosen or how often each is.
//!
//! The files in this folder hold them, one for each kind of feature; [`scenario`] says how they read. A difference is
//! fixed or has its reason in the scenario (`differs`), or below, where it holds for all.
//! `INTEROP_SCENARIO=words cargo test --release -p tests --test interop scenarios` asks those whose names have the words.

mod client;
mod pair;
mod resources;
mod scenario;
pub(crate) mod server;
mod wire;

use self::pair::Did;
use self::scenario::{Ask, Scenario};

/// The files.
const FILES: [&str; 14] = [
    "balancing.yaml",
    "breakers.yaml",
    "connections.yaml",
    "faults.yaml",
    "grpc_web.yaml",
    "hashing.yaml",
    "headers.yaml",
    "mirrors.yaml",
    "outliers.yaml",
    "protocols.yaml",
    "proxied.yaml",
    "retries.yaml",
    "routing.yaml",
    "timeouts.yaml",
];

/// What is compared of a line, and why not all of it.
type Difference = (fn(&str) -> Option<String>, &'static str);

/// Lines that may differ wherever they come.
const DIFFERENCES: [Difference; 5] = [
    (
        |line| {
            let own = ["x-envoy-internal: ", "x-forwarded-for: ", "x-envoy-expected-rq-timeout-ms: "];
            let copied = line.strip_prefix("  m").and_then(|line| line.split_once("'s header "));
            let told = copied.is_some_and(|(_, header)| own.iter().any(|name| header.starts_with(name)));
            (!told).then(|| line.to_owned())
        },
        "a copy has the headers of its original; Envoy's goes out as a request of its own client, with that one's headers",
    ),
    (
        |line| {
            let ends = ["closed", "ended", "broken off"];
            Some(if ends.contains(&line) { "closed" } else { line }.to_owned())
        },
        "whether a connection ends or breaks off depends on what was left unread",
    ),
    (
        |line| (!line.ends_with("'s header content-length: 0")).then(|| line.to_owned()),
        "a request without content needs no content-length (RFC 9110, section 8.6)",
    ),
    (
        |line| {
            let (before, ms) =
                line.split_once("header x-envoy-expected-rq-timeout-ms: ").unwrap_or((line, ""));
            let seconds = ms.parse::<u64>().ok().map(|ms| ms.div_ceil(1000));
            Some(seconds.map_or_else(|| line.to_owned(), |s| format!("{before}expected within {s} s")))
        },
        "Envoy begins to count when the body has come",
    ),
    (
        |line| {
            let Some(flags) = line.strip_prefix("logged flags ") else { return Some(line.to_owned()) };
            let mut flags: Vec<&str> = flags.split(',').collect();
            flags.sort_unstable();
            Some(format!("logged flags {}", flags.join(",")))
        },
        "flags come in the order of their list; Envoy's come in the order in which they were set",
    ),
];

#[expect(clippy::disallowed_methods, reason = "the settings of a test run")]
fn wanted() -> String {
    std::env::var("INTEROP_SCENARIO").unwrap_or_default()
}

/// What is compared of the lines; `left`: beginnings of those that may differ.
fn settled<'a>(did: &'a Did, left: &'a [&String]) -> Vec<String> {
    let lines =
        did.lines.iter().filter(|line| !left.iter().any(|begin| line.trim_start().starts_with(*begin)));
    lines
        .filter_map(|line| DIFFERENCES.iter().try_fold(line.clone(), |line, (settle, _)| settle(&line)))
        .collect()
}

/// What is wrong with what the two did, if something is.
fn wrong(scenario: &Scenario, ask: &Ask, ours: &Did, theirs: &Did) -> Option<String> {
    let whole = format!("{}\n{:?}", theirs.lines.join("\n"), theirs.spread);
    if let Some(missing) = ask.shows.all().iter().find(|piece| !whole.contains(*piece)) {
        return Some(format!("Envoy does not show `{missing}`:\n    {}", whole.replace('\n', "\n    ")));
    }
    let left: Vec<&String> = scenario.differs.keys().collect();
    let (a, b) = (settled(ours, &left), settled(theirs, &left));
    let only = |a: &[String], b: &[String]| {
        let lines = a.iter().filter(|line| !b.contains(line)).map(|line| format!("\n      {line}"));
        lines.collect::<String>()
    };
    if a != b {
        let order =
            if only(&a, &b).is_empty() && only(&b, &a).is_empty() { " (their order or number)" } else { "" };
        return Some(format!("only ours:{}\n    only Envoy's:{}{order}", only(&a, &b), only(&b, &a)));
    }
    let (total, mut apart) = (ask.times.unwrap_or(1), 0);
    for server in ours.spread.keys().chain(theirs.spread.keys()) {
        let count = |did: &Did| did.spread.get(server).copied().unwrap_or_default();
        apart = apart.max(count(ours).abs_diff(count(theirs)));
    }
    #[expect(clippy::cast_precision_loss, reason = "a few hundred requests")]
    let percent = 100.0 * apart as f64 / total as f64;
    (percent > ask.within).then(|| format!("ours {:?}\n    Envoy's {:?}", ours.spread, theirs.spread))
}

/// Whether the two differ in a line that may.
fn is_excused(scenario: &Scenario, beginning: &String, asks: &[(Did, Did)]) -> bool {
    let of = |did: &Did| {
        did.lines.iter().filter(|l| l.trim_start().starts_with(beginning)).cloned().collect::<Vec<_>>()
    };
    let differs = asks.iter().any(|(ours, theirs)| of(ours) != of(theirs));
    if differs {
        println!("{}: `{beginning}` differs: {}", scenario.name, scenario.differs[beginning]);
    }
    differs
}

async fn both_do_the_same(file: &str) -> anyhow::Result<()> {
    let wanted = wanted();
    let all: Vec<Scenario> =
        Scenario::read(file)?.into_iter().filter(|scenario| scenario.name.contains(&wanted)).collect();
    if all.is_empty() {
        return Ok(());
    }
    let mut found = Vec::new();
    let mut requests = 0;
    for (scenario, asks) in all.iter().zip(pair::ask(&all).await?) {
        for (n, (ask, (ours, theirs))) in scenario.asks.iter().zip(&asks).enumerate() {
            requests += ask.times.or(ask.at_once).unwrap_or(1);
            if let Some(what) = wrong(scenario, ask, ours, theirs) {
                found.push(format!("  {}, ask {}:\n    {what}", scenario.name, n + 1));
            }
        }
        let same = scenario.differs.keys().filter(|beginning| !is_excused(scenario, beginning, &asks));
        found.extend(
            same.map(|b| format!("  {}: `{b}` is listed as different and is the same", scenario.name)),
        );
    }
    println!("{file}: {} scenarios, {requests} requests", all.len());
    assert!(found.is_empty(), "{file}: {} differ:\n{}", found.len(), found.join("\n"));
    Ok(())
}

macro_rules! files {
    ($($test:ident $file:literal;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() -> anyhow::Result<()> {
                both_do_the_same($file).await
            }
        )*
    };
}

files! {
    both_balance_the_same "balancing.yaml";
    both_break_the_same_circuits "breakers.yaml";
    both_handle_connections_the_same "connections.yaml";
    both_inject_the_same_faults "faults.yaml";
    both_translate_the_same_grpc_web "grpc_web.yaml";
    both_hash_to_the_same_endpoints "hashing.yaml";
    both_change_the_same_headers "headers.yaml";
    both_mirror_the_same "mirrors.yaml";
    both_eject_the_same_outliers "outliers.yaml";
    both_speak_the_same_protocols "protocols.yaml";
    both_tell_the_same_of_clients "proxied.yaml";
    both_retry_the_same "retries.yaml";
    both_route_the_same "routing.yaml";
    both_time_out_the_same "timeouts.yaml";
}

#[test]
fn there_are_150_scenarios_and_more_and_each_has_a_name_of_its_own() {
    let mut names = std::collections::BTreeSet::new();
    for file in FILES {
        for scenario in Scenario::read(file).unwrap() {
            assert!(!scenario.asks.is_empty(), "{}: nothing is asked", scenario.name);
            assert!(names.insert(scenario.name.clone()), "{}: twice", scenario.name);
        }
    }
    assert!(names.len() >= 150, "{} scenarios", names.len());
}
