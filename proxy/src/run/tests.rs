//! A whole proxy in this process.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::bootstrap;

const DIRECT: &str = r#"
static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config: {name: r, virtual_hosts: [{name: v, domains: ["*"], routes: [{match: {prefix: "/"}, direct_response: {status: 418, body: {inline_string: tea}}}]}]}
          http_filters:
          - {name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"#;

async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn get(address: SocketAddr, path: &str) -> String {
    ask(address, &format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")).await
}

async fn post(address: SocketAddr, path: &str, header: &str) -> String {
    ask(
        address,
        &format!("POST {path} HTTP/1.1\r\nhost: a\r\n{header}content-length: 0\r\nconnection: close\r\n\r\n"),
    )
    .await
}

async fn started() -> Proxy {
    let mut config = bootstrap::parse(DIRECT, jiff::Timestamp::UNIX_EPOCH).unwrap();
    let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
    (config.stats, config.ready, config.admin) =
        (Some(loopback), Some(loopback), Some(Address::Socket(loopback)));
    config.workers = 2;
    config.drain = Duration::from_secs(5);
    Proxy::start(config, None).await.unwrap()
}

#[tokio::test]
async fn it_serves_shows_itself_and_ends() {
    let proxy = started().await;
    let (bound, tables) = (proxy.bound(), Arc::clone(proxy.tables()));
    let (admin, stats, ready) = (bound.admin.unwrap(), bound.stats.unwrap(), bound.ready.unwrap());
    let traffic = tables.load().listeners["in"].sockets.local()[0];
    let tasks = TaskTracker::new();
    let running = tasks.spawn(proxy.run(CancellationToken::new()));

    let answer = get(traffic, "/").await;
    assert!(answer.starts_with("HTTP/1.1 418") && answer.ends_with("tea"), "{answer}");
    assert!(get(ready, "/healthz/ready").await.ends_with("LIVE\n"));
    assert!(get(ready, "/config_dump").await.starts_with("HTTP/1.1 404"));
    let metrics = get(stats, "/stats/prometheus").await;
    assert!(metrics.contains("envoy_server_live 1\n"), "{metrics}");
    assert!(get(stats, "/quitquitquit").await.starts_with("HTTP/1.1 404"));

    let dump = get(admin, "/config_dump").await;
    let json: serde_json::Value = serde_json::from_str(dump.split_once("\r\n\r\n").unwrap().1).unwrap();
    let listeners =
        json["configs"].as_array().unwrap().iter().find(|c| c.get("static_listeners").is_some()).unwrap();
    assert_eq!(listeners["static_listeners"][0]["listener"]["name"], "in");
    assert!(get(admin, "/listeners").await.contains("in::127.0.0.1:0"));
    assert!(get(admin, "/server_info").await.contains("\"state\": \"LIVE\""));
    assert!(get(admin, "/nothing").await.starts_with("HTTP/1.1 404"));

    assert!(get(admin, "/quitquitquit").await.starts_with("HTTP/1.1 405"));
    let from_a_page = post(admin, "/quitquitquit", "origin: https://evil.example\r\n").await;
    assert!(from_a_page.starts_with("HTTP/1.1 403"));
    assert!(post(admin, "/quitquitquit", "").await.starts_with("HTTP/1.1 200"));
    tokio::time::timeout(Duration::from_secs(20), running).await.expect("ends in time").unwrap();
    assert!(TcpStream::connect(traffic).await.is_err(), "nobody accepts any more");
}

#[tokio::test]
async fn a_drain_lets_nobody_in_and_is_told() {
    let proxy = started().await;
    let admin = proxy.bound().admin.unwrap();
    let mut state = proxy.state();
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let running = tasks.spawn(proxy.run(stop.clone()));
    assert!(post(admin, "/drain_listeners", "").await.starts_with("HTTP/1.1 200"));
    tokio::time::timeout(Duration::from_secs(10), state.wait_for(|s| *s == State::Draining))
        .await
        .unwrap()
        .unwrap();
    assert!(get(admin, "/ready").await.contains("503 Service Unavailable"));
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(20), running).await.expect("ends in time").unwrap();
}

#[tokio::test]
async fn what_was_counted_is_told_after_the_listeners_were_drained() {
    let proxy = started().await;
    let bound = proxy.bound();
    let (admin, stats) = (bound.admin.unwrap(), bound.stats.unwrap());
    let traffic = proxy.tables().load().listeners["in"].sockets.local()[0];
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let running = tasks.spawn(proxy.run(stop.clone()));
    assert!(get(traffic, "/").await.ends_with("tea"));
    assert!(post(admin, "/drain_listeners", "").await.starts_with("HTTP/1.1 200"));
    // the workers end at some moment of these, and nothing is lost then
    for _ in 0..50 {
        let told = get(stats, "/stats/prometheus").await;
        assert!(
            told.contains("envoy_http_downstream_rq_total{envoy_http_conn_manager_prefix=\"in\"} 1\n"),
            "{told}"
        );
    }
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(20), running).await.expect("ends in time").unwrap();
}

#[tokio::test]
async fn a_taken_address_stops_the_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let text = DIRECT.replace("port_value: 0", &format!("port_value: {}", address.port()));
    let config = bootstrap::parse(&text, jiff::Timestamp::UNIX_EPOCH).unwrap();
    let error = Proxy::start(config, None).await.unwrap_err().to_string();
    assert!(error.contains("Listener in: address: cannot bind"), "{error}");
    let mut config = bootstrap::parse(DIRECT, jiff::Timestamp::UNIX_EPOCH).unwrap();
    config.stats = Some(address);
    let error = Proxy::start(config, None).await.unwrap_err().to_string();
    assert!(error.contains("cannot bind the statistics port"), "{error}");
}
