//! A proxy from a bootstrap text, and clients that speak to it.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proxy::Proxy;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// A running proxy; ends when it is dropped or asked to.
pub(crate) struct Running {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    tables: std::sync::Arc<proxy::tables::TableStore>,
    stats: SocketAddr,
    admin: Option<SocketAddr>,
}

impl Running {
    /// Starts a proxy with one worker from a bootstrap file's text.
    pub(crate) async fn start(bootstrap: &str) -> Self {
        Self::start_with(bootstrap, 1).await
    }

    /// Starts a proxy with so many workers.
    pub(crate) async fn start_with(bootstrap: &str, workers: usize) -> Self {
        let mut config = proxy::bootstrap::parse(bootstrap, jiff::Timestamp::UNIX_EPOCH).expect("bootstrap");
        config.workers = workers;
        config.stats = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        let proxy = Proxy::start(config, None).await.expect("proxy starts");
        let tables = std::sync::Arc::clone(proxy.tables());
        let stats = proxy.bound().stats.expect("statistics port");
        let admin = proxy.bound().admin;
        let stop = CancellationToken::new();
        let token = stop.clone();
        #[expect(clippy::disallowed_methods, reason = "the test owns it")]
        let task = tokio::spawn(async move { proxy.run(token).await });
        Self { stop, task, tables, stats, admin }
    }

    /// Where the listener `in` listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.listener("in")
    }

    /// Where a listener listens.
    pub(crate) fn listener(&self, name: &str) -> SocketAddr {
        self.tables.load().listeners[name].sockets.local()[0]
    }

    /// The admin port, if the bootstrap has one.
    pub(crate) fn admin(&self) -> SocketAddr {
        self.admin.expect("an admin port")
    }

    /// What Prometheus would scrape.
    pub(crate) async fn metrics(&self) -> String {
        get(self.stats, "/stats/prometheus", &[]).await.text()
    }

    /// Ends the proxy, which must not take long.
    pub(crate) async fn end(self) {
        self.stop.cancel();
        tokio::time::timeout(std::time::Duration::from_secs(20), self.task)
            .await
            .expect("ends in time")
            .unwrap();
    }
}

/// A response whose body is here.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<http::HeaderMap>,
}

impl Got {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    async fn collect(response: Response<hyper::body::Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let collected = body.collect().await.expect("whole body");
        let trailers = collected.trailers().cloned();
        Self { status: parts.status.as_u16(), headers: parts.headers, body: collected.to_bytes(), trailers }
    }
}

/// A request over HTTP/1.1 on a connection of its own.
pub(crate) async fn send(to: SocketAddr, request: Request<Full<Bytes>>) -> Got {
    let stream = TcpStream::connect(to).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driver = async move {
        let _over = connection.await;
    };
    let exchange = async move { Got::collect(sender.send_request(request).await.expect("a response")).await };
    let (got, ()) = tokio::join!(exchange, driver);
    got
}

/// Several requests over one HTTP/2 connection, one after the other.
pub(crate) async fn send_h2(to: SocketAddr, requests: Vec<Request<Full<Bytes>>>) -> Vec<Got> {
    let stream = TcpStream::connect(to).await.unwrap();
    let executor = TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await.unwrap();
    let driver = async move {
        let _over = connection.await;
    };
    let exchange = async move {
        let mut all = Vec::new();
        for request in requests {
            all.push(Got::collect(sender.send_request(request).await.expect("a response")).await);
        }
        all
    };
    let (all, ()) = tokio::join!(exchange, driver);
    all
}

/// A GET with headers.
pub(crate) fn request(path: &str, headers: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let mut builder = Request::get(path);
    if !headers.iter().any(|(name, _)| *name == "host") && path.starts_with('/') {
        builder = builder.header("host", "test.local");
    }
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(Full::default()).unwrap()
}

/// GETs a path.
pub(crate) async fn get(to: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Got {
    send(to, request(path, headers)).await
}

/// Asks for the metrics until one of their lines is this.
pub(crate) async fn eventually(proxy: &Running, line: &str) {
    let waiting = async {
        while !proxy.metrics().await.lines().any(|l| l == line) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), waiting).await.expect(line);
}

/// Writes bytes and reads all that comes until the other side closes.
pub(crate) async fn raw(to: SocketAddr, bytes: &str) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut out = Vec::new();
    stream.read_to_end(&mut out).await.unwrap();
    String::from_utf8_lossy(&out).into_owned()
}

/// A bootstrap with one listener `in` and its routes, and one cluster per backend.
pub(crate) fn bootstrap(routes: &str, hcm: &str, clusters: &str) -> String {
    format!(
        r#"
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          upgrade_configs: [{{upgrade_type: websocket}}]
{hcm}
          route_config:
            name: r
            virtual_hosts:
            - name: v
              domains: ["*"]
              include_request_attempt_count: true
              routes:
{routes}
          http_filters:
          - name: envoy.filters.http.fault
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault}}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
{clusters}
"#
    )
}

/// A static cluster of these endpoints; `extra` are further fields, indented by four.
pub(crate) fn cluster(name: &str, endpoints: &[SocketAddr], extra: &str) -> String {
    let endpoints: Vec<String> = endpoints
        .iter()
        .map(|a| {
            format!(
                "{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}",
                a.ip(),
                a.port()
            )
        })
        .collect();
    format!(
        "  - name: {name}\n    type: STATIC\n    connect_timeout: 2s\n{extra}\n    load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{}]}}]}}\n",
        endpoints.join(", ")
    )
}
