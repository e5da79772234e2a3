//! A proxy by itself: a file says what a control plane would.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use serde_json::Value;
use tests::program::{self, Program};
use tests::workload::free_port;
use tests::{PATIENCE, eventually, peers};
use tokio::net::TcpStream;

/// A running proxy without a control plane.
pub(crate) struct Alone {
    pub(crate) listener: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) program: Program,
}

impl Alone {
    /// Starts a proxy with clusters, each by its name and its YAML; paths below `/NAME/` lead to it. The file is the last
    /// of the program's arguments.
    pub(crate) fn start(
        program: &Path,
        folder: &Path,
        (name, args): (&str, &[&str]),
        clusters: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        let at = || anyhow::Ok(SocketAddr::from(([127, 0, 0, 1], free_port()?)));
        let (listener, admin, file) = (at()?, at()?, folder.join(format!("{name}.yaml")));
        std::fs::write(&file, bootstrap(listener, admin, clusters))?;
        let mut all: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        all.push(file.display().to_string());
        Ok(Self { listener, admin, program: Program::start(program, folder, name, &all)? })
    }
}

/// Starts our proxy, or a stock Envoy, with one worker from resources that need no control plane.
pub(crate) fn launch(ours: bool, folder: &Path, resources: &Value) -> anyhow::Result<Program> {
    let file = folder.join("bootstrap.json");
    std::fs::write(&file, serde_json::json!({"static_resources": resources}).to_string())?;
    let file = file.display().to_string();
    let (path, args) = if ours {
        (program::ours("istio-proxy")?, format!("--bootstrap {file} --concurrency 1 -l warn"))
    } else {
        let args =
            format!("-c {file} --concurrency 1 -l error --disable-hot-restart --file-flush-interval-msec 50");
        (peers::find("envoy/envoy")?, args)
    };
    let args: Vec<String> = args.split(' ').map(str::to_owned).collect();
    Program::start(&path, folder, if ours { "ours" } else { "envoy" }, &args)
}

/// The port of the first listener of a proxy that has many.
pub(crate) const PORT: u16 = 10_000;

/// The port of a listener of a proxy that has many.
pub(crate) fn port(at: usize) -> anyhow::Result<u16> {
    Ok(PORT + u16::try_from(at)?)
}

/// Waits until a proxy listens on the ports of its first listeners.
pub(crate) async fn listens(program: &mut Program, address: Ipv4Addr, count: usize) -> anyhow::Result<()> {
    for at in 0..count {
        let address = (address, port(at)?);
        let program = tokio::sync::Mutex::new(&mut *program);
        eventually(PATIENCE, "the proxy listens", || async {
            // a proxy that has ended is not waited for
            if let Err(ended) = program.lock().await.check() {
                return Ok(Err(ended));
            }
            Ok(Ok(TcpStream::connect(address).await?))
        })
        .await??;
    }
    Ok(())
}

/// An address as Envoy's YAML has it.
pub(crate) fn socket(address: SocketAddr) -> String {
    format!("{{socket_address: {{address: {}, port_value: {}}}}}", address.ip(), address.port())
}

fn bootstrap(listener: SocketAddr, admin: SocketAddr, clusters: &[(&str, String)]) -> String {
    let route = |name: &str| format!("{{match: {{prefix: /{name}/}}, route: {{cluster: {name}}}}}");
    let routes: Vec<String> = clusters.iter().map(|(name, _)| route(name)).collect();
    let clusters: String = clusters.iter().map(|(_, yaml)| yaml.as_str()).collect();
    format!(
        r#"
admin: {{address: {}}}
static_resources:
  listeners:
  - name: in
    address: {}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config: {{name: in, virtual_hosts: [{{name: v, domains: ["*"], routes: [{}]}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
{clusters}"#,
        socket(admin),
        socket(listener),
        routes.join(", ")
    )
}
