//! What becomes of open connections when the configuration changes under them.

use std::net::SocketAddr;
use std::sync::Arc;

use proxy::drain::Drain;
use proxy::supervisor::Inherited;
use proxy::tables::{Change, TableStore, TableWriter, Update};
use proxy::worker::{self, Handle, Options};
use proxy::xds::decode::Kind;
use proxy::xds::parse::{Resource, parse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A listener whose one chain is for connections of this kind.
fn listener(transport: &str) -> String {
    format!(
        r#"
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    listener_filters: [{{name: t, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}}}]
    filter_chains:
    - filter_chain_match: {{transport_protocol: {transport}}}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config: {{name: r, virtual_hosts: [{{name: v, domains: ["*"], routes: [{{match: {{prefix: "/"}}, direct_response: {{status: 200}}}}]}}]}}
          http_filters: [{{name: r, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]
"#
    )
}

fn apply(writer: &mut TableWriter, text: &str) {
    let config = proxy::bootstrap::parse(text, jiff::Timestamp::UNIX_EPOCH).expect("bootstrap");
    assert_eq!(writer.apply(&config.static_resources), []);
}

fn start(text: &str) -> (TableWriter, Arc<TableStore>, Drain, Handle, SocketAddr) {
    let (tables, mut writer) = TableStore::new(1);
    apply(&mut writer, text);
    let drain = Drain::new();
    let options = Options::new(Arc::clone(&tables), Arc::default(), drain.clone());
    let worker = worker::start(0, options).expect("a worker");
    let address = tables.load().listeners["in"].sockets.local()[0];
    (writer, tables, drain, worker, address)
}

/// An open connection that has had an answer.
async fn connected(to: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200"));
    stream
}

#[tokio::test]
async fn a_plain_connection_ends_when_only_tls_is_served_any_more() {
    let (mut writer, _tables, drain, worker, address) = start(&listener("raw_buffer"));
    let mut open = connected(address).await;
    apply(&mut writer, &listener("tls"));
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(10), open.read_to_end(&mut rest));
    assert_eq!(ended.await.expect("it is closed").unwrap(), 0);
    // nor is a new one served
    let mut new = TcpStream::connect(address).await.unwrap();
    new.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let _refused = new.read_to_end(&mut rest).await;
    assert_eq!(rest, b"");
    drain.stop_accepting();
    worker.ended().await;
}

#[tokio::test]
async fn a_connection_goes_on_under_the_chain_that_takes_the_place_of_its_own() {
    let (mut writer, _tables, drain, worker, address) = start(&listener("raw_buffer"));
    let mut open = connected(address).await;
    apply(&mut writer, &listener("raw_buffer").replace("status: 200", "status: 418"));
    open.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    open.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 418"), "{answer}");
    drain.stop_accepting();
    worker.ended().await;
}

/// A listener on this port, for this many workers, over the sockets that another left.
fn start_over(
    left: Vec<std::net::TcpListener>,
    port: u16,
    workers: usize,
) -> (Arc<TableStore>, Drain, Vec<Handle>) {
    let (tables, mut writer) = TableStore::new(workers);
    writer.inherit(Inherited::new(left));
    apply(&mut writer, &listener("raw_buffer").replace("port_value: 0", &format!("port_value: {port}")));
    let drain = Drain::new();
    let options = Options::new(Arc::clone(&tables), Arc::default(), drain.clone());
    let workers =
        (0..workers).map(|index| worker::start(index, options.clone()).expect("a worker")).collect();
    (tables, drain, workers)
}

#[tokio::test]
async fn who_connects_between_two_processes_is_served_by_the_second() {
    for (before, after) in [(1, 3), (3, 1), (2, 2)] {
        let (tables, drain, workers) = start_over(Vec::new(), 0, before);
        let address = tables.load().listeners["in"].sockets.local()[0];
        drop(connected(address).await);
        let left: Vec<_> =
            tables.load().sockets().flat_map(|s| s.tcp().map(|s| s.try_clone().unwrap())).collect();
        assert_eq!(left.len(), before);
        drain.leave_sockets_open();
        drain.stop_accepting();
        for worker in workers {
            worker.ended().await;
        }
        drop(tables);
        // Nobody accepts now, and nobody is refused.
        let mut waiting = Vec::new();
        for _ in 0..16 {
            let mut stream = TcpStream::connect(address).await.expect("not refused");
            stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
            waiting.push(stream);
        }
        let (_tables, drain, workers) = start_over(left, address.port(), after);
        for mut stream in waiting {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{before} then {after} workers: {answer:?}");
        }
        drain.stop_accepting();
        for worker in workers {
            worker.ended().await;
        }
        assert!(TcpStream::connect(address).await.is_err(), "an ordinary end closes the sockets");
    }
}

/// A listener whose requests go to a cluster with endpoints from discovery.
fn forwarding() -> String {
    crate::harness::bootstrap(
        "              - {match: {prefix: \"/\"}, route: {cluster: up}}",
        "",
        "  - {name: up, type: EDS, eds_cluster_config: {service_name: s, eds_config: {ads: {}}}}",
    )
}

/// One endpoint with what is said of it.
fn endpoint(at: SocketAddr, rest: &str) -> Change {
    let yaml = format!(
        "{{cluster_name: s, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}{rest}}}]}}]}}",
        at.ip(),
        at.port()
    );
    let message: envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment =
        wire::json::message_from_yaml(&yaml).unwrap();
    let resource = Resource { name: None, version: rest.into(), any: wire::canonical::any(&message) };
    parse(Kind::Endpoints, resource, jiff::Timestamp::UNIX_EPOCH).unwrap().change
}

#[tokio::test]
async fn an_endpoint_of_another_weight_keeps_its_connections() {
    let (listener, to) = crate::backend::listen().await;
    let (mut writer, _tables, drain, worker, address) = start(&forwarding());
    let mut client = None;
    let mut server = None;
    for rest in ["", ", load_balancing_weight: 7", ", health_status: DEGRADED", ", load_balancing_weight: 2"]
    {
        assert_eq!(writer.apply(&Update { changes: vec![endpoint(to, rest)] }), []);
        let client = match &mut client {
            Some(client) => client,
            None => client.insert(TcpStream::connect(address).await.unwrap()),
        };
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let server = match &mut server {
            Some(server) => server,
            None => server.insert(listener.accept().await.unwrap().0),
        };
        for (stream, answer) in
            [(&mut *server, Some("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")), (client, None)]
        {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap_or_else(|e| panic!("{rest}: {e}")));
            }
            if let Some(answer) = answer {
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        }
    }
    drain.stop_accepting();
    drop(client);
    worker.ended().await;
}
