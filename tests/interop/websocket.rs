//! WebSockets over either version of HTTP on either side, through our proxy and through a stock Envoy that run from the
//! same bootstrap, and from each to the other.

use std::net::SocketAddr;
use std::path::Path;

use ::http::Version;
use anyhow::ensure;
use tests::echo::Echo;
use tests::envoy::Form;
use tests::mesh::{Mesh, service, strict};
use tests::program::{self, Program};
use tests::workload::{WorkloadSpec, free_port};
use tests::{PATIENCE, eventually, http, peers};

use crate::oracle::{Ask, Asked, Case, compare};

/// Cases in which the two may differ, and why.
const DIFFERENCES: [(&str, &str); 4] = [
    ("HTTP/1, the server stays with HTTP", "Envoy drops the body of that answer; ours brings it"),
    (
        "HTTP/1, the server behind HTTP/2 stays with HTTP",
        "502; Envoy tells the client that it has left HTTP (RFC 8441, section 5: by 2xx), and resets it",
    ),
    ("HTTP/2, the server stays with HTTP", "502, because a 200 would say that the client has left HTTP"),
    (
        "HTTP/2, the server behind HTTP/2 stays with HTTP",
        "502, because a 200 would say that the client has left HTTP",
    ),
];

/// Where a proxy is asked, and where it is asked by proxies.
#[derive(Clone, Copy)]
struct Seat {
    outer: SocketAddr,
    inner: SocketAddr,
}

/// One proxy's file. `/h1` leads to the application over HTTP/1, `/h2` over HTTP/2 to the same proxy and then on,
/// `/cross` over HTTP/2 to the other proxy, `/none` over HTTP/2 to a server that takes no extended CONNECT.
fn bootstrap(own: Seat, other: Seat, app: SocketAddr) -> String {
    let cluster = |name: &str, to: SocketAddr, options: &str| {
        format!(
            "  - name: {name}\n    type: STATIC\n    connect_timeout: 2s\n{options}    load_assignment: {{cluster_name: {name}, \
             endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}]}}]}}\n",
            to.ip(),
            to.port()
        )
    };
    let h2 = "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
              \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
              explicit_http_config: {http2_protocol_options: {allow_connect: true}}\n";
    let listener = |name: &str, at: SocketAddr, routes: &str| {
        format!(
            r#"
  - name: {name}
    address: {{socket_address: {{address: {}, port_value: {}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {name}
          upgrade_configs: [{{upgrade_type: websocket}}]
          http2_protocol_options: {{allow_connect: true}}
          route_config: {{name: {name}, virtual_hosts: [{{name: v, domains: ["*"], routes: [{routes}]}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}"#,
            at.ip(),
            at.port()
        )
    };
    let routes = [
        "{match: {prefix: /h1}, route: {cluster: app}}",
        "{match: {prefix: /idle}, route: {cluster: app, idle_timeout: 0.3s}}",
        "{match: {prefix: /h2}, route: {cluster: own}}",
        "{match: {prefix: /cross}, route: {cluster: other}}",
        "{match: {prefix: /none}, route: {cluster: none}}",
    ];
    let listeners = listener("outer", own.outer, &routes.join(", "))
        + &listener("inner", own.inner, "{match: {prefix: /}, route: {cluster: app}}");
    let clusters = cluster("app", app, "")
        + &cluster("own", own.inner, h2)
        + &cluster("other", other.inner, h2)
        + &cluster("none", app, h2);
    format!("static_resources:\n  listeners:{listeners}\n  clusters:\n{clusters}")
}

fn cases() -> Vec<Case> {
    let (h1, h2) = (Version::HTTP_11, Version::HTTP_2);
    let ask = |name, version, path| (name, Ask::Upgrade(version, path, "websocket", false));
    vec![
        ask("HTTP/1 to HTTP/1", h1, "/h1/a?b=c"),
        ask("HTTP/1 to HTTP/2", h1, "/h2/a?b=c"),
        ask("HTTP/1 to HTTP/2 of the other", h1, "/cross/a?b=c"),
        ask("HTTP/2 to HTTP/1", h2, "/h1/a?b=c"),
        ask("HTTP/2 to HTTP/2", h2, "/h2/a?b=c"),
        ask("HTTP/2 to HTTP/2 of the other", h2, "/cross/a?b=c"),
        ask("HTTP/1, refused by the server", h1, "/h1?stay=1&status=404"),
        ask("HTTP/1, refused behind HTTP/2", h1, "/h2?stay=1&status=404"),
        ask("HTTP/2, refused by the server", h2, "/h1?stay=1&status=404"),
        ask("HTTP/2, refused behind HTTP/2", h2, "/h2?stay=1&status=404"),
        ask("HTTP/1, the server stays with HTTP", h1, "/h1?stay=1"),
        ask("HTTP/1, the server behind HTTP/2 stays with HTTP", h1, "/h2?stay=1"),
        ask("HTTP/2, the server stays with HTTP", h2, "/h1?stay=1"),
        ask("HTTP/2, the server behind HTTP/2 stays with HTTP", h2, "/h2?stay=1"),
        ask("HTTP/1, the next server takes no extended CONNECT", h1, "/none"),
        ask("HTTP/2, the next server takes no extended CONNECT", h2, "/none"),
        ask("HTTP/1, no route", h1, "/nowhere"),
        ask("HTTP/2, no route", h2, "/nowhere"),
        ("HTTP/1, another protocol", Ask::Upgrade(h1, "/h1", "other", false)),
        ("HTTP/2, another protocol", Ask::Upgrade(h2, "/h1", "other", false)),
        ("HTTP/1, another protocol in other case", Ask::Upgrade(h1, "/h1", "WebSocket", false)),
        ("HTTP/2, another protocol in other case", Ask::Upgrade(h2, "/h1", "WebSocket", false)),
        ("HTTP/1, idle", Ask::Upgrade(h1, "/idle", "websocket", true)),
        ("HTTP/2, idle", Ask::Upgrade(h2, "/idle", "websocket", true)),
        ("HTTP/2, h2c", Ask::Upgrade(h2, "/h1", "h2c", false)),
        ("HTTP/2, plain CONNECT", Ask::Http2("CONNECT", "/h1", &[], 0)),
    ]
}

fn start(program: &Path, folder: &Path, name: &str, text: &str, args: &[&str]) -> anyhow::Result<Program> {
    let file = folder.join(format!("{name}.yaml"));
    std::fs::write(&file, text)?;
    let mut all: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    all.push(file.display().to_string());
    Program::start(program, folder, name, &all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_cannot_tell_our_proxy_from_envoy() -> anyhow::Result<()> {
    let (folder, app) = (tempfile::tempdir()?, Echo::start("app").await?);
    let at = || anyhow::Ok(SocketAddr::from(([127, 0, 0, 1], free_port()?)));
    let (ours, theirs) = (Seat { outer: at()?, inner: at()? }, Seat { outer: at()?, inner: at()? });
    let envoy = peers::find("envoy/envoy")?;
    let quiet = ["--disable-hot-restart", "--concurrency", "1", "-l", "warning", "-c"];
    let of_ours = bootstrap(ours, theirs, app.address);
    let of_theirs = bootstrap(theirs, ours, app.address);
    let mut both = [
        start(&program::ours("istio-proxy")?, folder.path(), "ours", &of_ours, &["--bootstrap"])?,
        start(&envoy, folder.path(), "theirs", &of_theirs, &quiet)?,
    ];
    for seat in [ours, theirs] {
        eventually(PATIENCE, "the proxy answers", || http::get(seat.outer, "w", "/h1", &[])).await?;
        eventually(PATIENCE, "the proxy answers", || http::get(seat.inner, "w", "/h1", &[])).await?;
    }
    let asked = |name, seat: Seat| Asked { name, address: seat.outer, host: "w" };
    compare(asked("ours", ours), asked("theirs", theirs), cases(), &DIFFERENCES).await?;
    for program in &mut both {
        program.check()?;
    }
    Ok(())
}

/// A service whose callers are to speak HTTP/2 to its proxies, whatever they are spoken to.
fn upgraded(app: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {app}}}\nspec:\n  host: {app}\n  \
         trafficPolicy: {{connectionPool: {{http: {{h2UpgradePolicy: UPGRADE}}}}}}\n---\n"
    )
}

/// How often Envoy spoke HTTP/2, by the statistics of this name.
async fn spoken(mesh: &Mesh, envoy: &str, statistic: &str) -> anyhow::Result<u64> {
    let stats = mesh.envoy(envoy)?.admin(&format!("/stats?filter={statistic}")).await?;
    Ok(stats.lines().filter_map(|l| l.rsplit_once(": ")?.1.parse::<u64>().ok()).sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_crosses_a_mesh_that_upgrades_to_http2() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&[], &["serverours-v1"], &["client"]).await?;
    let both = ["serverours", "servertheirs"];
    let yaml = strict().to_owned() + &service("servertheirs") + &both.map(upgraded).concat();
    mesh.istiod.apply_and_wait(&yaml).await?;
    let server = WorkloadSpec::server("servertheirs", "v1", ([127, 0, 0, 1], 1).into());
    mesh.seat_envoy(server, Form::Delta).await?;
    mesh.seat_envoy(WorkloadSpec::client("envoy"), Form::Delta).await?;
    mesh.istiod.healthy("servertheirs", 1).await?;
    let (h1, h2) = (Version::HTTP_11, Version::HTTP_2);
    for client in ["client", "envoy"] {
        let mut asked = Vec::new();
        for name in both {
            mesh.answers(client, name).await?;
            asked.push(Asked { name, address: mesh.address(client, name, 80).await?, host: name });
        }
        let cases = vec![
            ("a WebSocket", Ask::Upgrade(h1, "/a?b=c", "websocket", false)),
            (
                "a WebSocket of an application that speaks HTTP/2",
                Ask::Upgrade(h2, "/a?b=c", "websocket", false),
            ),
            ("a WebSocket that is refused", Ask::Upgrade(h1, "/?stay=1&status=404", "websocket", false)),
            ("no WebSocket", Ask::Http1("GET", "/a", &[], 0)),
        ];
        let [ours, theirs] = *asked.as_slice() else { anyhow::bail!("two servers") };
        compare(ours, theirs, cases, &[]).await?;
        for asked in asked {
            let request = ::http::Request::get("/a").header("host", asked.host);
            let request = request.header("connection", "upgrade").header("upgrade", "websocket");
            let request = request.body(http_body_util::Empty::new())?;
            let opened = http::upgrade(asked.address, request, b"there", false).await?;
            ensure!(opened.status == 101 && opened.text() == "there", "{client}: {opened:?}");
        }
    }
    let (taken, made) = ("downstream_cx_http2_total", "outbound.*upstream_cx_http2_total");
    ensure!(spoken(&mesh, "servertheirs-v1", taken).await? > 0, "our proxy has spoken no HTTP/2");
    ensure!(spoken(&mesh, "envoy", made).await? > 0, "Envoy has spoken no HTTP/2");
    mesh.finish(&[])
}
