//! Requests through two proxies: who answers, and how.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::Full;
use tests::echo::{Echo, Seen};
use tests::mesh::{Mesh, routes, service_with, strict, subsets};
use tests::{http, istiod, load};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Share of `name` among the counted answers, in percent.
fn share(counts: &std::collections::BTreeMap<String, u32>, name: &str) -> f64 {
    let total: u32 = counts.values().sum();
    f64::from(counts.get(name).copied().unwrap_or_default()) * 100.0 / f64::from(total.max(1))
}

fn weights(v1: u32, v2: u32) -> String {
    let to = |version: &str, weight: u32| {
        format!("    - destination: {{host: echo, subset: {version}}}\n      weight: {weight}\n")
    };
    routes("echo", &format!("  - route:\n{}{}", to("v1", v1), to("v2", v2)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn splits_hold_within_two_points_while_they_change() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &["echo-v1", "echo-v2"], &["client"]).await?;
    mesh.istiod.apply_and_wait(&(strict().to_owned() + &subsets("echo", &["v1", "v2"]))).await?;
    let address = mesh.address("client", "echo", 80).await?;
    for (v1, v2) in [(90, 10), (50, 50), (0, 100)] {
        mesh.istiod.apply_and_wait(&weights(v1, v2)).await?;
        let counts = load::burst(address, "echo", "/", 5000, 16).await?;
        let seen = share(&counts, "echo-v2");
        ensure!((seen - f64::from(v2)).abs() <= 2.0, "{v1}/{v2}: v2 got {seen:.2} %: {counts:?}");
        ensure!(counts.keys().all(|name| name.starts_with("echo-")), "{v1}/{v2}: {counts:?}");
        println!("{v1}/{v2}: v2 got {seen:.2} % of 5000");
    }
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_outranks_the_default_route_and_routes_may_change_the_request() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &["echo-v1", "echo-v2"], &["client"]).await?;
    let yaml = subsets("echo", &["v1", "v2"])
        + &routes(
            "echo",
            "  - match: [{headers: {end-user: {exact: jason}}}]\n    route: [{destination: {host: echo, subset: v2}}]\n  \
             - match: [{uri: {prefix: /old/}}]\n    rewrite: {uri: /new/, authority: other.example}\n    \
             headers: {request: {set: {x-team: mesh}, remove: [x-secret]}, response: {add: {x-seen: \"yes\"}}}\n    \
             route: [{destination: {host: echo, subset: v1}}]\n  \
             - match: [{uri: {exact: /away}}]\n    redirect: {uri: /here, redirectCode: 302}\n  \
             - match: [{uri: {exact: /teapot}}]\n    directResponse: {status: 418, body: {string: short and stout}}\n  \
             - route: [{destination: {host: echo, subset: v1}}]",
        );
    mesh.istiod.apply_and_wait(&yaml).await?;
    for (user, expected) in [("jason", "echo-v2"), ("anna", "echo-v1")] {
        let seen: Seen = mesh.get("client", "echo", "/", &[("end-user", user)]).await?.json()?;
        ensure!(seen.name == expected, "{user}: {seen:?}");
        let caller = "URI=spiffe://cluster.local/ns/default/sa/client";
        ensure!(seen.header("x-forwarded-client-cert").contains(caller), "{user}: {seen:?}");
    }
    let answer = mesh.get("client", "echo", "/old/path?q=1", &[("x-secret", "1")]).await?;
    let seen: Seen = answer.json()?;
    ensure!(seen.path == "/new/path?q=1" && seen.header("host") == "other.example", "{seen:?}");
    ensure!(seen.header("x-team") == "mesh" && seen.header("x-secret").is_empty(), "{seen:?}");
    ensure!(answer.header("x-seen") == "yes", "{answer:?}");
    let redirect = mesh.get("client", "echo", "/away", &[]).await?;
    ensure!(redirect.status == 302 && redirect.header("location") == "http://echo/here", "{redirect:?}");
    let teapot = mesh.get("client", "echo", "/teapot", &[]).await?;
    ensure!(teapot.status == 418 && teapot.text() == "short and stout", "{teapot:?}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_retried_as_often_as_the_route_says_and_slow_answers_are_given_up() -> anyhow::Result<()>
{
    let mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    let route =
        |policy: &str| routes("echo", &format!("  - route: [{{destination: {{host: echo}}}}]\n    {policy}"));
    mesh.istiod.apply_and_wait(&route("retries: {attempts: 2, retryOn: \"5xx,reset\"}")).await?;
    let requests = || anyhow::Ok(mesh.echo("echo-v1")?.requests());
    for (query, status, tries) in [
        ("status=500&fail=2&key=a", 200, 3),
        ("status=500&fail=3&key=b", 500, 3),
        ("status=404&fail=2&key=c", 404, 1),
        ("reset=1&fail=1&key=d", 200, 2),
    ] {
        let before = requests()?;
        let answer = mesh.get("client", "echo", &format!("/?{query}"), &[]).await?;
        let tried = requests()? - before;
        ensure!(
            answer.status == status && tried == tries,
            "{query}: {} after {tried} tries: {}",
            answer.status,
            answer.text()
        );
    }
    mesh.istiod.apply_and_wait(&route("retries: {attempts: 0}")).await?;
    let answer = mesh.get("client", "echo", "/?status=503&fail=1&key=e", &[]).await?;
    ensure!(answer.status == 503, "without retries: {answer:?}");

    mesh.istiod.apply_and_wait(&route("timeout: 300ms")).await?;
    let started = Instant::now();
    let answer = mesh.get("client", "echo", "/?delay_ms=5000", &[]).await?;
    let took = started.elapsed();
    ensure!(answer.status == 504 && answer.text() == "upstream request timeout", "{answer:?}");
    ensure!((Duration::from_millis(295)..Duration::from_secs(2)).contains(&took), "{took:?}");

    mesh.istiod
        .apply_and_wait(&route("retries: {attempts: 1, perTryTimeout: 200ms, retryOn: \"5xx\"}"))
        .await?;
    let before = requests()?;
    let answer = mesh.get("client", "echo", "/?delay_ms=5000", &[]).await?;
    ensure!(answer.status == 504 && requests()? - before == 2, "{} tries: {answer:?}", requests()? - before);
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_websocket_and_tcp_pass_through_two_proxies_with_mtls() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    let rpc = service_with("rpc", "{number: 80, name: grpc, protocol: GRPC}");
    let line = service_with("line", "{number: 80, name: tcp, protocol: TCP}");
    mesh.istiod.apply(&(strict().to_owned() + &rpc + &line)).await?;
    mesh.server("rpc-v1").await?;
    mesh.serve("line-v1", Echo::tcp("line-v1").await?).await?;
    for (service, proxy) in [("rpc", "rpc-v1.default"), ("line", "line-v1.default")] {
        mesh.istiod.healthy(service, 1).await?;
        mesh.istiod.synced(proxy).await?;
    }
    mesh.istiod.apply_and_wait(strict()).await?;

    let address = mesh.address("client", "rpc", 80).await?;
    for (method, status) in [("Call", "0"), ("Call/7", "7")] {
        let request = ::http::Request::post(format!("http://rpc/echo.Echo/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(Bytes::from_static(b"\0\0\0\0\x05hello")))?;
        let answer = http::send_http2(address, request).await?;
        ensure!(answer.status == 200 && answer.body == b"\0\0\0\0\x05hello"[..], "{answer:?}");
        let trailer =
            |name: &str| answer.trailers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        ensure!(trailer("grpc-status") == status && trailer("grpc-message") == "echoed", "{answer:?}");
    }

    let address = mesh.address("client", "echo", 80).await?;
    let message = vec![7; 100_000];
    let (name, back) = http::websocket(address, "echo", &message).await?;
    ensure!(name == "echo-v1" && back == message, "{name}: {} bytes", back.len());

    let mut stream = TcpStream::connect(mesh.address("client", "line", 80).await?).await?;
    let bytes: Vec<u8> = (0..300_000u32).map(|i| u8::try_from(i % 251)).collect::<Result<_, _>>()?;
    let (mut read, mut write) = stream.split();
    let mut back = Vec::new();
    let send = async {
        write.write_all(&bytes).await?;
        write.shutdown().await
    };
    let exchange = futures::future::try_join(send, read.read_to_end(&mut back));
    tokio::time::timeout(tests::PATIENCE, exchange).await.context("the half-closed connection ends")??;
    ensure!(back == bytes, "{} of {} bytes came back", back.len(), bytes.len());

    for (workload, metric) in
        [("line-v1", "istio_tcp_connections_opened_total"), ("rpc-v1", "istio_requests_total")]
    {
        tests::eventually(tests::PATIENCE, "metrics tell mTLS", || async {
            let metrics = mesh.of(workload)?.metrics().await?;
            let secured = istiod::sum(&metrics, metric, "connection_security_policy=\"mutual_tls\"");
            ensure!(secured >= 1.0, "{workload}: {metrics}");
            Ok(())
        })
        .await?;
    }
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_are_injected_for_whom_they_are_meant() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    let fault = |user: &str, fault: &str| {
        format!(
            "  - match: [{{headers: {{end-user: {{exact: {user}}}}}}}]\n    fault: {{{fault}}}\n    route: [{{destination: {{host: echo}}}}]\n"
        )
    };
    let http = fault("tester", "abort: {httpStatus: 555, percentage: {value: 100}}")
        + &fault("snail", "delay: {fixedDelay: 300ms, percentage: {value: 100}}")
        + "  - route: [{destination: {host: echo}}]";
    mesh.istiod.apply_and_wait(&routes("echo", &http)).await?;
    let aborted = mesh.get("client", "echo", "/", &[("end-user", "tester")]).await?;
    ensure!(aborted.status == 555 && aborted.text() == "fault filter abort", "{aborted:?}");
    let started = Instant::now();
    let delayed = mesh.get("client", "echo", "/", &[("end-user", "snail")]).await?;
    ensure!(
        delayed.status == 200 && started.elapsed() >= Duration::from_millis(299),
        "{:?}",
        started.elapsed()
    );
    let other = mesh.get("client", "echo", "/", &[]).await?;
    ensure!(other.status == 200, "{other:?}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_proxies_count_a_request_with_the_names_of_both_sides() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    for _ in 0..5 {
        let answer = mesh.answers("client", "echo").await?;
        ensure!(answer.status == 200);
    }
    for (workload, reporter) in [("client", "source"), ("echo-v1", "destination")] {
        tests::eventually(tests::PATIENCE, "requests are counted", || async {
            let metrics = mesh.of(workload)?.metrics().await?;
            let reported = format!("reporter=\"{reporter}\"");
            let lines: Vec<&str> = metrics
                .lines()
                .filter(|l| l.starts_with("istio_requests_total{") && l.contains(&reported))
                .collect();
            let expected = [
                "source_workload=\"client\"",
                "source_principal=\"spiffe://cluster.local/ns/default/sa/client\"",
                "destination_workload=\"echo-v1\"",
                "destination_principal=\"spiffe://cluster.local/ns/default/sa/echo\"",
                "destination_service=\"echo.default.svc.cluster.local\"",
                "destination_version=\"v1\"",
                "response_code=\"200\"",
            ];
            let counted =
                lines.iter().any(|line| expected.iter().all(|e| line.contains(e)) && line.ends_with(" 5"));
            ensure!(counted, "{workload}: {lines:?}");
            Ok(())
        })
        .await?;
    }
    mesh.finish(&[])
}
