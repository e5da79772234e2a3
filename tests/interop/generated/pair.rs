//! Our proxy and a stock Envoy, each with every scenario on a listener of its own.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::echo::Echo;
use tests::http::Answer;
use tests::program::Program;
use tests::workload::{free_block, own_address};
use tests::{PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::request::Request;
use super::scenario::{SERVED, Scenario};
use crate::alone::{PORT, launch, listens, port};
use crate::oracle::answer_lines;

/// Scenarios that are asked at the same time.
const AT_ONCE: usize = 8;
/// What is logged of a request, behind its name.
const LOGGED: &str =
    "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %ROUTE_NAME% %UPSTREAM_CLUSTER%";
/// The name of the request that comes last.
const LAST: &str = "last";
/// A malformed request is answered within this time.
const QUIET: Duration = Duration::from_secs(10);

/// A scenario and what is asked of it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) scenario: Scenario,
    pub(crate) requests: Vec<Request>,
}

/// What came of a request: the answer, what the server saw, and the line of the access log.
pub(crate) type Lines = Vec<String>;

/// Asks both proxies everything: for each case and each of its requests, what came from ours and from Envoy.
pub(crate) async fn ask(cases: &[Case]) -> anyhow::Result<Vec<Vec<(Lines, Lines)>>> {
    let scenarios: Vec<&Scenario> = cases.iter().map(|case| &case.scenario).collect();
    let (ours, theirs) = (Seat::start(true, &scenarios).await?, Seat::start(false, &scenarios).await?);
    let (ours, theirs) = futures::try_join!(ours.ask(cases), theirs.ask(cases))?;
    Ok(ours.into_iter().zip(theirs).map(|(ours, theirs)| ours.into_iter().zip(theirs).collect()).collect())
}

/// One of the two proxies, with servers of its own.
struct Seat {
    address: Ipv4Addr,
    program: Program,
    folder: TempDir,
    _servers: Vec<Echo>,
}

impl Seat {
    async fn start(ours: bool, scenarios: &[&Scenario]) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let address = own_address(free_block()?);
        let mut servers = Vec::new();
        let mut clusters = vec![cluster("empty", None)];
        for name in SERVED {
            let server = Echo::start(name).await?;
            clusters.push(cluster(name, Some(server.address)));
            servers.push(server);
        }
        // Nobody listens there.
        clusters.push(cluster("closed", Some((address, PORT - 1).into())));
        let listeners = scenarios
            .iter()
            .enumerate()
            .map(|(at, scenario)| listener((address, port(at)?).into(), scenario, folder.path()))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let resources = json!({"listeners": listeners, "clusters": clusters});
        let mut program = launch(ours, folder.path(), &resources)?;
        listens(&mut program, address, scenarios.len()).await?;
        Ok(Self { address, program, folder, _servers: servers })
    }

    async fn ask(mut self, cases: &[Case]) -> anyhow::Result<Vec<Vec<Lines>>> {
        let each = cases.iter().enumerate().map(|(at, case)| self.ask_one(at, case));
        let mut answers: Vec<Vec<Lines>> =
            futures::stream::iter(each).buffered(AT_ONCE).try_collect().await?;
        self.program.check()?;
        let last = Request {
            method: "GET",
            target: b"/".to_vec(),
            headers: vec![("host".to_owned(), b"x".to_vec())],
            body: None,
        };
        Connection::new((self.address, PORT).into()).ask(&last, LAST).await?;
        let log = eventually(PATIENCE, "the access log is written", || async {
            let log = std::fs::read_to_string(self.folder.path().join("access.log"))?;
            ensure!(log.lines().any(|line| line.starts_with(&format!("{LAST} "))), "{log}");
            Ok(log)
        })
        .await?;
        let logged: BTreeMap<&str, &str> = log.lines().filter_map(|line| line.split_once(' ')).collect();
        for (at, answers) in answers.iter_mut().enumerate() {
            for (n, answer) in answers.iter_mut().enumerate() {
                answer.extend(logged.get(name(at, n).as_str()).map(|line| format!("logged {line}")));
            }
        }
        Ok(answers)
    }

    async fn ask_one(&self, at: usize, case: &Case) -> anyhow::Result<Vec<Lines>> {
        let mut connection = Connection::new((self.address, port(at)?).into());
        let mut answers = Vec::new();
        for (n, request) in case.requests.iter().enumerate() {
            let answer = connection.ask(request, &name(at, n)).await;
            // The two listen on different addresses.
            let own = self.address.to_string();
            answers.push(answer_lines(answer).into_iter().map(|line| line.replace(&own, "OWN")).collect());
        }
        Ok(answers)
    }
}

fn name(case: usize, request: usize) -> String {
    format!("{case}.{request}")
}

fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn cluster(name: &str, server: Option<SocketAddr>) -> Value {
    let endpoints: Vec<Value> =
        server.map(|s| json!({"endpoint": {"address": socket(s)}})).into_iter().collect();
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        // Retries never meet a budget.
        "circuit_breakers": {"thresholds": [{"max_retries": 1000}]},
    })
}

fn listener(address: SocketAddr, scenario: &Scenario, folder: &Path) -> anyhow::Result<Value> {
    let mut manager = scenario.manager.clone();
    let kind = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let log = json!({
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
        "path": folder.join("access.log"),
        "log_format": {"text_format_source": {"inline_string": format!("%REQ(x-case)% {LOGGED}\n")}},
    });
    for (field, value) in [
        ("@type", json!(kind)),
        ("stat_prefix", json!("generated")),
        ("route_config", scenario.routes.clone()),
        ("access_log", json!([{"name": "log", "typed_config": log}])),
    ] {
        manager.insert(field.to_owned(), value);
    }
    let filter = json!({"name": "http", "typed_config": manager});
    Ok(json!({
        "name": address.to_string(),
        "address": socket(address),
        "filter_chains": [{"filters": [filter]}],
    }))
}

/// A connection that is kept for as long as the proxy keeps it.
struct Connection {
    address: SocketAddr,
    stream: Option<TcpStream>,
}

impl Connection {
    fn new(address: SocketAddr) -> Self {
        Self { address, stream: None }
    }

    async fn ask(&mut self, request: &Request, name: &str) -> anyhow::Result<Answer> {
        let port = self.address.port().to_string();
        let mut request = request.clone();
        request.target = replaced(&request.target, &port);
        request.headers.iter_mut().for_each(|(_, value)| *value = replaced(value, &port));
        let bytes = request.bytes(name);
        if let Some(stream) = self.stream.take()
            && let Some(answer) = self.exchange(stream, &bytes, request.method).await?
        {
            return Ok(answer);
        }
        // The proxy had closed the last one, or there was none.
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        self.exchange(stream, &bytes, request.method).await?.context("closed without an answer")
    }

    /// `None` when the proxy closes before it answers.
    async fn exchange(
        &mut self,
        mut stream: TcpStream,
        bytes: &[u8],
        method: &str,
    ) -> anyhow::Result<Option<Answer>> {
        let exchange = async {
            if stream.write_all(bytes).await.is_err() {
                return Ok(None);
            }
            let mut read = Vec::new();
            loop {
                let more = stream.read_buf(&mut read).await.unwrap_or_default();
                if more == 0 && read.is_empty() {
                    return Ok(None);
                }
                if let Some((answer, keep)) = answer(&read, method, more == 0)? {
                    return Ok(Some((answer, keep)));
                }
                ensure!(more > 0, "closed within an answer: {}", read.escape_ascii());
            }
        };
        let answered: Option<(Answer, bool)> =
            tokio::time::timeout(QUIET, exchange).await.context("silence")??;
        let Some((answer, keep)) = answered else { return Ok(None) };
        self.stream = keep.then_some(stream);
        Ok(Some(answer))
    }
}

fn replaced(bytes: &[u8], port: &str) -> Vec<u8> {
    match bytes.windows(4).position(|w| w == b"PORT") {
        Some(at) => [&bytes[..at], port.as_bytes(), &bytes[at + 4..]].concat(),
        None => bytes.to_vec(),
    }
}

/// An answer, when all of it has come, and whether its connection goes on.
fn answer(bytes: &[u8], method: &str, ended: bool) -> anyhow::Result<Option<(Answer, bool)>> {
    let mut room = [httparse::EMPTY_HEADER; 100];
    let mut head = httparse::Response::new(&mut room);
    let httparse::Status::Complete(length) =
        head.parse(bytes).with_context(|| bytes.escape_ascii().to_string())?
    else {
        return Ok(None);
    };
    let mut headers = HeaderMap::new();
    for header in head.headers.iter() {
        headers
            .append(HeaderName::from_bytes(header.name.as_bytes())?, HeaderValue::from_bytes(header.value)?);
    }
    let status = StatusCode::from_u16(head.code.context("no status")?)?;
    let rest = &bytes[length..];
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let (body, framed) = if method == "HEAD" {
        // What Envoy's codec refuses gets a body in any case.
        (Vec::new(), rest.is_empty() && !status.is_client_error())
    } else if matches!(status.as_u16(), 204 | 304) {
        // Envoy sends a direct response's body in any case.
        (Vec::new(), rest.is_empty() && matches!(text("content-length"), "" | "0"))
    } else if text("transfer-encoding") == "chunked" {
        match unchunked(rest)? {
            Some(body) => (body, true),
            None => return Ok(None),
        }
    } else if let Ok(length) = text("content-length").parse::<usize>() {
        ensure!(rest.len() <= length, "more than its length: {}", bytes.escape_ascii());
        if rest.len() < length {
            return Ok(None);
        }
        (rest.to_vec(), true)
    } else if ended {
        (rest.to_vec(), false)
    } else {
        return Ok(None);
    };
    let keep = framed && text("connection") != "close";
    Ok(Some((Answer { status, headers, body: Bytes::from(body), trailers: HeaderMap::new() }, keep)))
}

/// The body in chunks, when its last one has come.
fn unchunked(mut bytes: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        let httparse::Status::Complete((start, size)) =
            httparse::parse_chunk_size(bytes).map_err(|_| anyhow::anyhow!("no chunk"))?
        else {
            return Ok(None);
        };
        let end = start + usize::try_from(size)?;
        if bytes.len() < end + 2 {
            return Ok(None);
        }
        ensure!(&bytes[end..end + 2] == b"\r\n", "a chunk without its end");
        body.extend_from_slice(&bytes[start..end]);
        if size == 0 {
            return Ok(Some(body));
        }
        bytes = &bytes[end + 2..];
    }
}
