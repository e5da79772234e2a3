//! Active health checks: our proxy and a stock Envoy check the same kinds of servers in the same ways, and must come to
//! the same conclusions.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use ::http::{HeaderMap, HeaderValue, Request, Response};
use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tests::program;
use tests::workload::free_port;
use tests::{PATIENCE, eventually, http, peers};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::alone::{Alone, socket};

/// How a server behaves when it is asked how it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Serves,
    /// Says that it does not; over TCP, closes.
    Refuses,
    /// Says so with a status that needs a second time.
    Retriable,
    Degraded,
    Silent,
}

const MANNERS: [Manner; 5] =
    [Manner::Serves, Manner::Refuses, Manner::Retriable, Manner::Degraded, Manner::Silent];

/// One server, and what it was asked.
#[derive(Debug)]
struct Patient {
    name: String,
    manner: AtomicU8,
    checks: Mutex<BTreeSet<String>>,
}

impl Patient {
    fn manner(&self) -> Manner {
        let now = usize::from(self.manner.load(Ordering::SeqCst));
        MANNERS.get(now).copied().unwrap_or(Manner::Silent)
    }

    fn set(&self, manner: Manner) {
        let at = MANNERS.iter().position(|m| *m == manner).and_then(|at| u8::try_from(at).ok());
        self.manner.store(at.unwrap_or(u8::MAX), Ordering::SeqCst);
    }

    fn note(&self, asked: String) {
        if let Ok(mut checks) = self.checks.lock() {
            checks.insert(asked);
        }
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> anyhow::Result<Response<BoxBody<Bytes, std::convert::Infallible>>> {
        let path = request.uri().path().to_owned();
        let is_grpc = path == "/grpc.health.v1.Health/Check";
        if path != "/healthy" && !is_grpc {
            return Ok(Response::new(Full::from(self.name.clone()).boxed()));
        }
        let shown = shown(request).await?;
        self.note(shown);
        let mut response = Response::builder();
        let status = match self.manner() {
            Manner::Silent => std::future::pending().await,
            Manner::Serves => 200,
            Manner::Refuses => 503,
            Manner::Retriable => 429,
            Manner::Degraded => {
                response = response.header("x-envoy-degraded", "1");
                200
            }
        };
        if !is_grpc {
            return Ok(response.status(status).body(Full::default().boxed())?);
        }
        // HealthCheckResponse: field 1, SERVING or NOT_SERVING
        let message = [0, 0, 0, 0, 2, 8, if status == 200 { 1 } else { 2 }];
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        let frames = [Ok(Frame::data(Bytes::from_iter(message))), Ok(Frame::trailers(trailers))];
        let body = BodyExt::boxed(StreamBody::new(stream::iter(frames)));
        Ok(response.header("content-type", "application/grpc").body(body)?)
    }

    /// `ping` is answered by `pong`.
    async fn answer_tcp(self: Arc<Self>, mut stream: TcpStream) -> std::io::Result<()> {
        let mut ping = [0; 4];
        while stream.read_exact(&mut ping).await.is_ok() {
            self.note(String::from_utf8_lossy(&ping).into_owned());
            match self.manner() {
                Manner::Silent => std::future::pending::<()>().await,
                Manner::Refuses => return Ok(()),
                Manner::Serves | Manner::Retriable | Manner::Degraded => stream.write_all(b"pong").await?,
            }
        }
        Ok(())
    }
}

/// A request as text, without what differs from server to server.
async fn shown(request: Request<Incoming>) -> anyhow::Result<String> {
    let (parts, body) = request.into_parts();
    let headers: BTreeSet<String> = parts
        .headers
        .iter()
        .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())))
        .collect();
    let host = parts.uri.authority().map(ToString::to_string).unwrap_or_default();
    let body = body.collect().await?.to_bytes();
    Ok(format!("{} {host}{} {headers:?} {body:?}", parts.method, parts.uri.path()))
}

/// The servers of one proxy; they end when it is dropped.
struct Ward {
    patients: BTreeMap<&'static str, Arc<Patient>>,
    /// Where each one answers HTTP, and where TCP.
    places: BTreeMap<&'static str, [SocketAddr; 2]>,
    tasks: TaskTracker,
    stop: CancellationToken,
    _end: DropGuard,
}

impl Ward {
    async fn start(names: &[&'static str]) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let mut ward = Self {
            patients: BTreeMap::new(),
            places: BTreeMap::new(),
            tasks: TaskTracker::new(),
            _end: stop.clone().drop_guard(),
            stop,
        };
        for name in names {
            let patient = Arc::new(Patient {
                name: (*name).to_owned(),
                manner: AtomicU8::new(0),
                checks: Mutex::default(),
            });
            let http = ward
                .listen(&patient, |patient, stream| async move {
                    let service = hyper::service::service_fn(move |request| patient.clone().answer(request));
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    builder.serve_connection(TokioIo::new(stream), service).await.unwrap_or_default();
                })
                .await?;
            let tcp = ward
                .listen(&patient, |patient, stream| async move {
                    patient.answer_tcp(stream).await.unwrap_or_default();
                })
                .await?;
            ward.places.insert(name, [http, tcp]);
            ward.patients.insert(name, patient);
        }
        Ok(ward)
    }

    async fn listen<F>(
        &self,
        patient: &Arc<Patient>,
        each: impl Fn(Arc<Patient>, TcpStream) -> F + Send + 'static,
    ) -> anyhow::Result<SocketAddr>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (tasks, stop, patient) = (self.tasks.clone(), self.stop.clone(), patient.clone());
        self.tasks.spawn(async move {
            while let Some(Ok((stream, _))) = stop.run_until_cancelled(listener.accept()).await {
                let (connection, stop) = (each(patient.clone(), stream), stop.clone());
                tasks.spawn(async move { stop.run_until_cancelled(connection).await });
            }
        });
        Ok(address)
    }

    fn set(&self, manners: &[(&str, Manner)]) {
        for (name, manner) in manners {
            if let Some(patient) = self.patients.get(name) {
                patient.set(*manner);
            }
        }
    }

    /// All that its servers were asked.
    fn checks(&self) -> BTreeSet<String> {
        let all = self.patients.values().filter_map(|p| p.checks.lock().ok().map(|c| c.clone()));
        all.flatten().collect()
    }
}

/// How each cluster checks, and whether it speaks HTTP/2.
const CLUSTERS: [(&str, &str, bool); 5] = [
    (
        "http",
        "http_health_check: {path: /healthy, retriable_statuses: [{start: 429, end: 430}], \
         request_headers_to_add: [{header: {key: x-check, value: one}}]}",
        false,
    ),
    ("named", "http_health_check: {path: /healthy, host: who.are.you, method: HEAD}", false),
    ("http2", "http_health_check: {path: /healthy, codec_client_type: HTTP2}", true),
    ("grpc", "grpc_health_check: {service_name: s, authority: a.b}", true),
    (
        "tcp",
        "tcp_health_check: {send: {text: \"70696e67\"}, receive: [{text: \"706f\"}, {text: \"6e67\"}]}",
        false,
    ),
];

const SERVERS: [&str; 3] = ["a", "b", "c"];

fn clusters(ward: &Ward, closed: SocketAddr) -> Vec<(&'static str, String)> {
    let mut clusters = Vec::new();
    for (name, check, h2) in CLUSTERS {
        let mut endpoints: Vec<String> = ward
            .places
            .values()
            .map(|[http, tcp]| {
                let port = if name == "tcp" { tcp.port() } else { 0 };
                format!(
                    "{{endpoint: {{address: {}, health_check_config: {{port_value: {port}}}}}}}",
                    socket(*http)
                )
            })
            .collect();
        endpoints.push(format!("{{endpoint: {{address: {}}}}}", socket(closed)));
        let options = if h2 {
            "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
             \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
             explicit_http_config: {http2_protocol_options: {}}\n"
        } else {
            ""
        };
        let yaml = format!(
            "  - name: {name}\n    type: STATIC\n    connect_timeout: 1s\n{options}    \
             health_checks: [{{timeout: 0.5s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 2, \
             healthy_threshold: 2, {check}}}]\n    \
             common_lb_config: {{healthy_panic_threshold: {{value: 1}}}}\n    \
             load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{}]}}]}}\n",
            endpoints.join(", ")
        );
        clusters.push((name, yaml));
    }
    clusters
}

/// One proxy with its servers.
struct Seat {
    ward: Ward,
    proxy: Alone,
}

impl Seat {
    async fn start(
        program: &Path,
        folder: &Path,
        name: &str,
        closed: SocketAddr,
        args: &[&str],
    ) -> anyhow::Result<Self> {
        let ward = Ward::start(&SERVERS).await?;
        ward.set(&FIRST);
        let proxy = Alone::start(program, folder, (name, args), &clusters(&ward, closed))?;
        Ok(Self { ward, proxy })
    }

    /// The flags of each server in each cluster; `closed` is where nobody listens.
    async fn flags(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let answer = http::get(self.proxy.admin, "admin", "/clusters", &[]).await?;
        ensure!(answer.status == 200, "{}", answer.status);
        let text = answer.text();
        let names: BTreeMap<String, &str> =
            self.ward.places.iter().map(|(name, [http, _])| (http.to_string(), *name)).collect();
        let flags = text.lines().filter_map(|line| {
            let (cluster, rest) = line.split_once("::")?;
            let (address, flags) = rest.split_once("::health_flags::")?;
            let name = names.get(address).copied().unwrap_or("closed");
            Some((format!("{cluster} {name}"), flags.to_owned()))
        });
        Ok(flags.collect())
    }

    /// Who answers requests of a cluster.
    async fn chosen(&self, cluster: &str) -> anyhow::Result<BTreeSet<String>> {
        let mut seen = BTreeSet::new();
        for _ in 0..24 {
            let answer = http::get(self.proxy.listener, "x", &format!("/{cluster}/"), &[]).await?;
            seen.insert(if answer.status == 200 {
                answer.text()
            } else {
                answer.status.as_u16().to_string()
            });
        }
        Ok(seen)
    }

    /// What it counted of checks, by name and cluster.
    async fn counted(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let answer = http::get(self.proxy.admin, "admin", "/stats/prometheus", &[]).await?;
        let text = answer.text();
        let counted = text.lines().filter_map(|line| {
            let (name, labels) = line.strip_prefix("envoy_cluster_health_check_")?.split_once('{')?;
            let cluster = labels.split_once("cluster_name=\"")?.1.split('"').next()?;
            let value = line.rsplit(' ').next()?.parse::<u64>().ok()?;
            Some((format!("{name} of {cluster}"), value))
        });
        Ok(counted.collect())
    }
}

/// How the servers behave first.
const FIRST: [(&str, Manner); 3] = [("a", Manner::Serves), ("b", Manner::Refuses), ("c", Manner::Degraded)];

/// What follows from a manner.
fn expected(cluster: &str, manner: Manner) -> &'static str {
    match (manner, cluster) {
        (Manner::Degraded, "http" | "named" | "http2") => "/degraded_active_hc",
        (Manner::Serves | Manner::Degraded, _) | (Manner::Retriable, "tcp") => "healthy",
        (Manner::Refuses | Manner::Retriable, _) => "/failed_active_hc",
        (Manner::Silent, _) => "/failed_active_hc/active_hc_timeout",
    }
}

/// Lets the servers of both behave like this, and waits until both proxies know.
async fn known(both: [&Seat; 2], manners: &[(&str, Manner)]) -> anyhow::Result<()> {
    let mut all = BTreeMap::new();
    for (cluster, ..) in CLUSTERS {
        for (server, manner) in manners {
            all.insert(format!("{cluster} {server}"), expected(cluster, *manner).to_owned());
        }
        all.insert(format!("{cluster} closed"), "/failed_active_hc".to_owned());
    }
    for seat in both {
        seat.ward.set(manners);
    }
    for (name, seat) in ["ours", "theirs"].iter().zip(both) {
        eventually(PATIENCE, "the proxy knows how its servers are", || async {
            let flags = seat.flags().await?;
            ensure!(flags == all, "{name}: {flags:#?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Who answers, of either proxy, must be these as soon as its workers know what its checks found.
async fn answered(both: [&Seat; 2], cluster: &str, servers: &[&str]) -> anyhow::Result<()> {
    let servers: BTreeSet<String> = servers.iter().map(|s| (*s).to_owned()).collect();
    for (name, seat) in ["ours", "theirs"].iter().zip(both) {
        eventually(PATIENCE, "the right servers answer", || async {
            let chosen = seat.chosen(cluster).await?;
            ensure!(chosen == servers, "{name}, {cluster}: {chosen:?} in place of {servers:?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_find_the_same_servers_healthy() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let closed = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let quiet = ["--disable-hot-restart", "--concurrency", "1", "-l", "error", "-c"];
    let envoy = peers::find("envoy/envoy")?;
    let mut ours =
        Seat::start(&program::ours("istio-proxy")?, folder.path(), "ours", closed, &["--bootstrap"]).await?;
    let mut theirs = Seat::start(&envoy, folder.path(), "theirs", closed, &quiet).await?;
    {
        let both = [&ours, &theirs];
        known(both, &FIRST).await?;
        known(both, &[("a", Manner::Silent), ("b", Manner::Serves), ("c", Manner::Serves)]).await?;
        for (cluster, ..) in CLUSTERS {
            answered(both, cluster, &["b", "c"]).await?;
        }
        known(both, &[("a", Manner::Refuses), ("b", Manner::Retriable), ("c", Manner::Degraded)]).await?;
        answered(both, "http", &["c"]).await?;
        // Envoy goes on to call an endpoint degraded that fails; ours says what the last check said
        known(both, &[("a", Manner::Silent), ("b", Manner::Refuses), ("c", Manner::Serves)]).await?;
        for (cluster, ..) in CLUSTERS {
            answered(both, cluster, &["c"]).await?;
        }
        known(both, &[("a", Manner::Refuses), ("b", Manner::Refuses), ("c", Manner::Refuses)]).await?;
        // nobody is healthy, so everybody is asked
        answered(both, "http", &["503", "a", "b", "c"]).await?;
        same_words(&ours, &theirs).await?;
    }
    ours.proxy.program.check()?;
    theirs.proxy.program.check()
}

/// Both asked the same, and count the same under the same names.
async fn same_words(ours: &Seat, theirs: &Seat) -> anyhow::Result<()> {
    let (asked, by_envoy) = (ours.ward.checks(), theirs.ward.checks());
    ensure!(asked == by_envoy, "ours asked\n{asked:#?}\nEnvoy asked\n{by_envoy:#?}");
    let (counted, by_envoy) = (ours.counted().await?, theirs.counted().await?);
    ensure!(by_envoy.contains_key("attempt of grpc"), "{by_envoy:#?}");
    for (name, theirs) in by_envoy {
        if name.starts_with("verify_cluster") || name.starts_with("passive_failure") {
            continue; // of checks that ask for the server's name, and of answers that say how the server is
        }
        let ours = counted.get(&name).with_context(|| format!("{name} is not counted: {counted:#?}"))?;
        let same = match name.split(' ').next() {
            Some("healthy") => *ours == theirs,
            // Envoy adds whoever becomes degraded, and takes nobody off
            Some("degraded") => *ours == 0,
            Some(_) | None => (*ours > 0) == (theirs > 0),
        };
        ensure!(same, "{name}: {ours}, Envoy {theirs}");
    }
    Ok(())
}
