//! From an applied change to the acknowledgement of every proxy it concerns: state, snapshot, translation, ADS
//! and gRPC clients on loopback, all real.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "push/client.rs"]
mod client;
#[path = "push/control.rs"]
mod control;

use std::collections::BTreeMap;
use std::time::Duration;

use control::{Control, TIMEOUT};
use tokio::time::Instant;
use xds::debounce::Limits;
use xds::resources::Type;

/// Bookinfo: six services, one proxy each, and a few of the same service.
const SERVICES: [&str; 6] = ["productpage", "details", "ratings", "reviews", "reviews", "reviews"];

fn service(name: &str, endpoints: &[(u32, &str)]) -> String {
    let list: Vec<String> = endpoints
        .iter()
        .map(|(n, version)| {
            format!(
                "{{address: 10.0.0.{n}, labels: {{app: {name}, version: {version}}}, serviceAccount: {name}}}"
            )
        })
        .collect();
    format!(
        "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: default}}
spec:
  hosts: [{name}.default.svc.cluster.local]
  ports: [{{number: 9080, name: http, protocol: HTTP}}]
  location: MESH_INTERNAL
  resolution: STATIC
  endpoints: [{}]
",
        list.join(", ")
    )
}

fn route(timeout_ms: u64) -> String {
    format!(
        "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: reviews, namespace: default}}
spec:
  hosts: [reviews]
  http:
    - timeout: {}ms
      route: [{{destination: {{host: reviews}}}}]
",
        timeout_ms.max(1)
    )
}

fn bookinfo() -> String {
    let mut by_name: BTreeMap<&str, Vec<(u32, &str)>> = BTreeMap::new();
    for (number, name) in (1..).zip(SERVICES) {
        by_name.entry(name).or_default().push((number, "v1"));
    }
    by_name.iter().map(|(name, endpoints)| service(name, endpoints)).collect::<Vec<_>>().join("---\n")
}

async fn started(proxies: u32) -> (Control, Vec<client::Held>) {
    started_with(Limits::default(), proxies).await
}

async fn started_with(debounce: Limits, proxies: u32) -> (Control, Vec<client::Held>) {
    let mut control = Control::start(debounce).await;
    let revision = control.apply(&bookinfo());
    let mut clients = Vec::new();
    for number in 1..=proxies {
        clients.push(control.proxy(number, number % 2 == 0).await);
    }
    control.acknowledged(revision, proxies as usize).await;
    clients.iter().for_each(client::Held::forget_counts);
    (control, clients)
}

#[tokio::test]
async fn a_change_reaches_every_proxy_it_concerns_and_the_wait_says_so() {
    let (mut control, clients) = started(6).await;
    let revision = control.apply(&route(100));
    let report = control.acknowledged(revision, 6).await;
    assert_eq!(report.affected.len(), 6);
    for client in &clients {
        // The route alone is sent: clusters, endpoints and listeners are what they were.
        assert_eq!(client.counts(), BTreeMap::from([(Type::Route, 1)]));
        assert_eq!(client.versions(), control.wanted(client.number(), client.native()));
    }
    control.stop().await;
}

#[tokio::test]
async fn endpoints_alone_are_pushed_alone() {
    let (mut control, clients) = started(6).await;
    let revision = control.apply(&service("details", &[(2, "v1"), (77, "v1")]));
    let report = control.acknowledged(revision, 6).await;
    assert_eq!(report.affected.len(), 6);
    for client in &clients {
        assert_eq!(client.counts(), BTreeMap::from([(Type::Endpoint, 1)]), "proxy {}", client.number());
        assert_eq!(client.versions(), control.wanted(client.number(), client.native()));
    }
    assert!(control.metrics().contains("pilot_push_triggers{type=\"endpoint\"}"));
    control.stop().await;
}

#[tokio::test]
async fn what_concerns_nobody_is_run_by_all_at_once() {
    let (mut control, clients) = started(3).await;
    let revision = control.apply(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: elsewhere}
spec: {}
",
    );
    let report = control.acknowledged(revision, 3).await;
    assert!(report.affected.is_empty());
    assert!(clients.iter().all(|client| client.counts().is_empty()));
    control.stop().await;
}

#[tokio::test]
async fn a_storm_is_merged_and_ends_with_the_latest() {
    let (mut control, clients) = started(4).await;
    let mut last = 0;
    for timeout in 1..=500 {
        last = control.apply(&route(timeout));
    }
    control.acknowledged(last, 4).await;
    for client in &clients {
        let routes = client.counts().get(&Type::Route).copied().unwrap_or_default();
        assert!((1..=20).contains(&routes), "{routes} responses for 500 changes");
        assert_eq!(client.versions(), control.wanted(client.number(), client.native()));
    }
    control.stop().await;
}

#[tokio::test]
async fn a_bad_resource_is_told_by_the_wait_and_the_rest_runs() {
    let (mut control, clients) = started(2).await;
    if let Some(first) = clients.first() {
        first.reject("9080: this proxy likes no timeouts", Type::Route);
    }
    let revision = control.apply(&route(5));
    let report = control.status.wait(revision, Instant::now() + TIMEOUT).await;
    assert_eq!((report.acknowledged.len(), report.pending.len()), (1, 1));
    let nack = report.pending.first().and_then(|pending| pending.nacks.first()).unwrap();
    assert_eq!((nack.message.as_str(), nack.revision), ("9080: this proxy likes no timeouts", revision));
    control.stop().await;
}

/// One random change of the mesh, as YAML, or as the removal of an object.
fn random_change(rng: &mut fastrand::Rng) -> (String, bool) {
    let name = rng.choice(["details", "ratings", "reviews"]).unwrap_or("details");
    let remove = rng.u8(..4) == 0;
    let object = |group: &str, kind: &str, name: &str, namespace: &str, spec: &str| {
        format!(
            "apiVersion: {group}.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
        )
    };
    let namespace = rng.choice(["default", "istio-system", "elsewhere"]).unwrap_or("default");
    let text = match rng.u8(..8) {
        0 => route(rng.u64(1..5)),
        1 | 2 => {
            let endpoints: Vec<(u32, &str)> = (0..rng.u32(1..4)).map(|_| (rng.u32(1..9), "v1")).collect();
            let mut unique = endpoints.clone();
            unique.sort_unstable();
            unique.dedup();
            service(name, &unique)
        }
        3 => {
            let export = rng.choice(["[\".\"]", "[\"*\"]", "[elsewhere]"]).unwrap_or("[]");
            let spec = format!(
                "{{hosts: [extra.example.com], exportTo: {export}, ports: [{{number: {}, name: http, protocol: HTTP}}], resolution: STATIC, endpoints: [{{address: 10.0.0.{}}}]}}",
                rng.choice([80, 9080]).unwrap_or(80),
                rng.u8(1..9)
            );
            object("networking", "ServiceEntry", "extra", "default", &spec)
        }
        4 => {
            let spec = format!(
                "{{host: {name}.default.svc.cluster.local, trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: {}}}}}}}, subsets: [{{name: v1, labels: {{version: v1}}}}]}}",
                rng.u8(1..5)
            );
            object("networking", "DestinationRule", name, namespace, &spec)
        }
        5 => {
            let mode = rng.choice(["STRICT", "PERMISSIVE", "DISABLE"]).unwrap_or("STRICT");
            object(
                "security",
                "PeerAuthentication",
                "default",
                namespace,
                &format!("{{mtls: {{mode: {mode}}}}}"),
            )
        }
        6 => object(
            "security",
            "AuthorizationPolicy",
            "deny",
            namespace,
            "{action: DENY, rules: [{to: [{operation: {methods: [PUT]}}]}]}",
        ),
        _ => object("networking", "Sidecar", "default", namespace, "{egress: [{hosts: [\"./*\"]}]}"),
    };
    (text, remove)
}

#[tokio::test]
async fn whatever_changes_every_proxy_ends_with_exactly_what_a_full_translation_gives() {
    let seed = 20_261_121;
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut control, clients) = started(6).await;
    for step in 0..150 {
        let (text, remove) = random_change(&mut rng);
        let revision = if remove { control.delete(&text) } else { control.apply(&text) };
        if rng.u8(..3) == 0 {
            control.acknowledged(revision, 6).await;
            for client in &clients {
                let wanted = control.wanted(client.number(), client.native());
                assert_eq!(
                    client.versions(),
                    wanted,
                    "seed {seed}, step {step}, proxy {}, after\n{text}",
                    client.number()
                );
            }
        }
    }
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_proxies_run_a_change_within_milliseconds() {
    // Each change counts as one that comes alone: without a quiet time there are no storms.
    let calm = Limits { quiet: Duration::ZERO, ..Limits::default() };
    let (mut control, clients) = started_with(calm, 10).await;
    let mut times = Vec::new();
    for timeout in 0..100 {
        let start = Instant::now();
        let revision = control.apply(&route(100 + timeout));
        control.acknowledged(revision, 10).await;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    println!("change to the last of 10 acknowledgements: p50 {:?}, p99 {:?}", at(50), at(99));
    drop(clients);
    control.stop().await;
}
