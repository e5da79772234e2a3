//! What both proxies are told. Pure.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};

use super::scenario::{HTTP2, Scenario};

/// What is logged of a request, behind its name.
const LOGGED: &str =
    "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %ROUTE_NAME% %UPSTREAM_CLUSTER%";

fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// A cluster whose only endpoint is this server.
pub(crate) fn cluster(name: &str, server: Option<SocketAddr>) -> Value {
    let endpoints: Vec<Value> =
        server.map(|s| json!({"endpoint": {"address": socket(s)}})).into_iter().collect();
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        // Retries never meet a budget.
        "circuit_breakers": {"thresholds": [{"max_retries": 1000}]},
    });
    if name == HTTP2 {
        let kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let options = json!({
            "@type": format!("type.googleapis.com/{kind}"),
            "explicit_http_config": {"http2_protocol_options": {}},
        });
        cluster["typed_extension_protocol_options"] = json!({kind: options});
    }
    cluster
}

/// The listener of a scenario.
pub(crate) fn listener(address: SocketAddr, scenario: &Scenario, folder: &Path) -> anyhow::Result<Value> {
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
