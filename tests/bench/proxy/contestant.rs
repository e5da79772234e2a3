//! A proxy, or a pair of them with mutual TLS in between, from resources that both programs understand.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tests::program::{self, Program};
use tests::tls::Authority;
use tests::workload::free_port;
use tests::{PATIENCE, eventually, peers};
use tokio::net::TcpStream;

/// Clusters and routes of the large configuration, and endpoints of each cluster.
const LARGE: (u16, u16) = (1000, 10);

/// Which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Ours,
    Envoy,
}

/// What the proxies do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Bytes, not HTTP.
    pub(crate) tcp: bool,
    /// HTTP/2 behind the (first) proxy.
    pub(crate) http2: bool,
    /// Two of them.
    pub(crate) pair: bool,
}

/// Running proxies, on a processor of their own.
pub(crate) struct Contestant {
    pub(crate) front: SocketAddr,
    programs: Vec<Program>,
}

impl Contestant {
    /// Starts what stands in front of a server.
    pub(crate) async fn start(
        which: Which,
        shape: Shape,
        server: SocketAddr,
        authority: &Authority,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let front = at()?;
        let mut programs = Vec::new();
        if shape.pair {
            let between = at()?;
            let inner = listener(between, shape, Some(tls(authority, "b", shape, "Downstream")?));
            let server = cluster("c", &[server], shape, None);
            programs.push(launch(which, folder, "b", &[inner], &[server])?);
            reachable(between, &mut programs).await?;
            let peer = cluster("c", &[between], shape, Some(tls(authority, "a", shape, "Upstream")?));
            programs.push(launch(which, folder, "a", &[listener(front, shape, None)], &[peer])?);
        } else {
            let server = cluster("c", &[server], shape, None);
            programs.push(launch(which, folder, "a", &[listener(front, shape, None)], &[server])?);
        }
        reachable(front, &mut programs).await?;
        Ok(Self { front, programs })
    }

    /// Starts one that knows many clusters, and a route to each.
    pub(crate) async fn start_large(which: Which, folder: &Path) -> anyhow::Result<Self> {
        let (front, shape) = (at()?, Shape { tcp: false, http2: false, pair: false });
        let mut clusters = Vec::new();
        let mut routes = Vec::new();
        for n in 0..LARGE.0 {
            let [hi, lo] = n.to_be_bytes();
            let endpoints: Vec<SocketAddr> =
                (1..=LARGE.1).map(|e| ([127, hi + 1, lo, 1], e).into()).collect();
            clusters.push(cluster(&format!("c{n}"), &endpoints, shape, None));
            routes
                .push(json!({"match": {"prefix": format!("/{n}/")}, "route": {"cluster": format!("c{n}")}}));
        }
        let mut listener = listener(front, shape, None);
        listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"][0]["routes"] =
            json!(routes);
        let mut programs = vec![launch(which, folder, "large", &[listener], &clusters)?];
        reachable(front, &mut programs).await?;
        Ok(Self { front, programs })
    }

    /// Time on a processor.
    pub(crate) fn busy(&self) -> anyhow::Result<Duration> {
        self.programs.iter().map(Program::processor_time).sum()
    }

    /// Resident memory, in MiB.
    pub(crate) fn resident(&self) -> anyhow::Result<f64> {
        let kib: anyhow::Result<u64> = self.programs.iter().map(Program::resident).sum();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        Ok(kib? as f64 / 1024.0)
    }
}

fn at() -> anyhow::Result<SocketAddr> {
    Ok(([127, 0, 0, 1], free_port()?).into())
}

async fn reachable(address: SocketAddr, programs: &mut [Program]) -> anyhow::Result<()> {
    let connected =
        eventually(PATIENCE, "the proxy listens", || async { Ok(TcpStream::connect(address).await?) });
    let connected = connected.await;
    programs.iter_mut().try_for_each(Program::check)?;
    connected.map(drop)
}

fn launch(
    which: Which,
    folder: &Path,
    name: &str,
    listeners: &[Value],
    clusters: &[Value],
) -> anyhow::Result<Program> {
    let file = folder.join(format!("{name}.json"));
    let resources = json!({"static_resources": {"listeners": listeners, "clusters": clusters}});
    std::fs::write(&file, resources.to_string())?;
    let (path, first, rest) = match which {
        Which::Ours => (program::ours("istio-proxy")?, "--bootstrap", "--concurrency 1 -l warn"),
        Which::Envoy => (peers::find("envoy/envoy")?, "-c", "--concurrency 1 -l error --disable-hot-restart"),
    };
    let program = format!("-c 1 {} {first} {} {rest}", path.display(), file.display());
    let args: Vec<String> = program.split(' ').map(str::to_owned).collect();
    Program::start(Path::new("taskset"), folder, name, &args)
}

fn socket(address: &SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn typed(kind: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("type.googleapis.com/envoy.extensions.{kind}"));
    fields
}

fn listener(address: SocketAddr, shape: Shape, tls: Option<Value>) -> Value {
    let filter = if shape.tcp {
        typed("filters.network.tcp_proxy.v3.TcpProxy", json!({"stat_prefix": "in", "cluster": "c"}))
    } else {
        let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]);
        let router = json!({"name": "envoy.filters.http.router", "typed_config": typed("filters.http.router.v3.Router", json!({}))});
        typed(
            "filters.network.http_connection_manager.v3.HttpConnectionManager",
            json!({
                "stat_prefix": "in",
                "http_filters": [router],
                "route_config": {"name": "r", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
            }),
        )
    };
    let mut chain = json!({"filters": [{"name": "filter", "typed_config": filter}]});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({"name": "in", "address": socket(&address), "filter_chains": [chain]})
}

fn cluster(name: &str, endpoints: &[SocketAddr], shape: Shape, tls: Option<Value>) -> Value {
    let endpoints: Vec<Value> =
        endpoints.iter().map(|address| json!({"endpoint": {"address": socket(address)}})).collect();
    let mut cluster = json!({
        "name": name,
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    });
    if shape.http2 {
        let options = json!({"explicit_http_config": {"http2_protocol_options": {}}});
        let options = typed("upstreams.http.v3.HttpProtocolOptions", options);
        cluster["typed_extension_protocol_options"] =
            json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options});
    }
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    cluster
}

/// Mutual TLS as one of its sides has it.
fn tls(authority: &Authority, name: &str, shape: Shape, side: &str) -> anyhow::Result<Value> {
    let (chain, key) = authority.pems(&format!("spiffe://bench/{name}"))?;
    let protocol = if shape.http2 { "h2" } else { "http/1.1" };
    let common = json!({
        "tls_certificates": [{"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}],
        "validation_context": {"trusted_ca": {"inline_string": authority.certificate}},
        "alpn_protocols": if shape.tcp { json!([]) } else { json!([protocol]) },
    });
    let mut fields = json!({"common_tls_context": common});
    if side == "Downstream" {
        fields["require_client_certificate"] = json!(true);
    } else {
        fields["sni"] = json!("b.example");
    }
    let context = typed(&format!("transport_sockets.tls.v3.{side}TlsContext"), fields);
    Ok(json!({"name": "envoy.transport_sockets.tls", "typed_config": context}))
}
