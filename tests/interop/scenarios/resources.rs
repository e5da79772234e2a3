//! The resources that both proxies get for a scenario, in Envoy's JSON. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value, json};

use super::scenario::{Cluster, Scenario};

/// Short names of types.
const TYPES: [(&str, &str); 20] = [
    ("manager", "filters.network.http_connection_manager.v3.HttpConnectionManager"),
    ("tcp_proxy", "filters.network.tcp_proxy.v3.TcpProxy"),
    ("router", "filters.http.router.v3.Router"),
    ("fault", "filters.http.fault.v3.HTTPFault"),
    ("cors", "filters.http.cors.v3.Cors"),
    ("cors_policy", "filters.http.cors.v3.CorsPolicy"),
    ("grpc_web", "filters.http.grpc_web.v3.GrpcWeb"),
    ("grpc_stats", "filters.http.grpc_stats.v3.FilterConfig"),
    ("rbac", "filters.http.rbac.v3.RBAC"),
    ("local_ratelimit", "filters.http.local_ratelimit.v3.LocalRateLimit"),
    ("file", "access_loggers.file.v3.FileAccessLog"),
    ("http_options", "upstreams.http.v3.HttpProtocolOptions"),
    ("proxy_protocol", "filters.listener.proxy_protocol.v3.ProxyProtocol"),
    ("upstream_proxy_protocol", "transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport"),
    ("tls", "transport_sockets.tls.v3.UpstreamTlsContext"),
    ("raw_buffer", "transport_sockets.raw_buffer.v3.RawBuffer"),
    ("tls_inspector", "filters.listener.tls_inspector.v3.TlsInspector"),
    ("http_inspector", "filters.listener.http_inspector.v3.HttpInspector"),
    ("previous_hosts", "retry.host.previous_hosts.v3.PreviousHostsPredicate"),
    ("wrr_locality", "load_balancing_policies.wrr_locality.v3.WrrLocality"),
];

/// What is logged of a request, behind its name.
const REQUEST: &str = "code %RESPONSE_CODE%|flags %RESPONSE_FLAGS%|details %RESPONSE_CODE_DETAILS%|\
                       route %ROUTE_NAME%|cluster %UPSTREAM_CLUSTER%|upstream %UPSTREAM_HOST%|\
                       attempts %UPSTREAM_REQUEST_ATTEMPT_COUNT%|grpc %GRPC_STATUS%|protocol %PROTOCOL%|\
                       received %BYTES_RECEIVED%|sent %BYTES_SENT%|line %REQ(:METHOD)% %REQ(:PATH)% %REQ(:AUTHORITY)%|\
                       client %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%";
/// What is logged of a TCP connection, behind its client's port.
const CONNECTION: &str = "flags %RESPONSE_FLAGS%|cluster %UPSTREAM_CLUSTER%|upstream %UPSTREAM_HOST%|\
                          received %BYTES_RECEIVED%|sent %BYTES_SENT%|name %REQUESTED_SERVER_NAME%|\
                          client %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%|details %CONNECTION_TERMINATION_DETAILS%";

/// An address as Envoy has it.
pub(crate) fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// The listener of a scenario at an address, and its clusters.
pub(crate) fn resources(
    scenario: &Scenario,
    prefix: &str,
    address: SocketAddr,
    servers: &BTreeMap<String, SocketAddr>,
    folder: &Path,
) -> anyhow::Result<(Value, Vec<Value>)> {
    let mut listener = listener(scenario, prefix, address, folder);
    let mut clusters = Vec::new();
    for (name, one) in &scenario.clusters {
        clusters.push(cluster(name, one, servers)?);
    }
    settle(&mut listener, prefix)?;
    for cluster in &mut clusters {
        settle(cluster, prefix)?;
    }
    Ok((listener, clusters))
}

/// Fills in what files leave short.
fn settle(value: &mut Value, prefix: &str) -> anyhow::Result<()> {
    match value {
        Value::String(text) => {
            if let Some(name) = text.strip_prefix('~') {
                *text = format!("{prefix}{name}");
            }
        }
        Value::Array(list) => {
            for inner in list {
                settle(inner, prefix)?;
            }
        }
        Value::Object(fields) => {
            if let Some(short) = fields.shift_remove("@") {
                let short = short.as_str().unwrap_or_default();
                let found = TYPES.iter().find(|(name, _)| *name == short);
                let (_, name) = found.with_context(|| format!("no type `{short}`"))?;
                let name = format!("type.googleapis.com/envoy.extensions.{name}");
                fields.shift_insert(0, "@type".to_owned(), json!(name));
            }
            for inner in fields.values_mut() {
                settle(inner, prefix)?;
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    Ok(())
}

/// `more` in place of, or beside, what is there.
fn merge(into: &mut Value, more: &Map<String, Value>) {
    for (field, value) in more {
        into[field.as_str()] = value.clone();
    }
}

fn log(folder: &Path, key: &str, format: &str) -> Value {
    let line = format!("{key}|{format}\n");
    json!([{"name": "log", "typed_config": {
        "@": "file",
        "path": folder.join("access.log"),
        "log_format": {"text_format_source": {"inline_string": line}},
    }}])
}

fn listener(scenario: &Scenario, prefix: &str, address: SocketAddr, folder: &Path) -> Value {
    let connection_log = log(folder, &format!("tcp-{prefix}%DOWNSTREAM_DIRECT_REMOTE_PORT%"), CONNECTION);
    let bytes_to = |fields: &Map<String, Value>| {
        let mut proxy = json!({"@": "tcp_proxy", "stat_prefix": "tcp", "access_log": connection_log});
        merge(&mut proxy, fields);
        json!([{"name": "tcp", "typed_config": proxy}])
    };
    let mut chains: Vec<Value> = Vec::new();
    for chain in &scenario.chains {
        let to = Map::from_iter([("cluster".to_owned(), json!(chain.to))]);
        chains.push(json!({"filter_chain_match": chain.on, "filters": bytes_to(&to)}));
    }
    match &scenario.tcp {
        Some(fields) => chains.push(json!({"filters": bytes_to(fields)})),
        None if scenario.closed => {}
        None => {
            chains.push(json!({"filters": [{"name": "http", "typed_config": manager(scenario, folder)}]}))
        }
    }
    let mut listener =
        json!({"name": address.to_string(), "address": socket(address), "filter_chains": chains});
    merge(&mut listener, &scenario.listener);
    listener
}

fn manager(scenario: &Scenario, folder: &Path) -> Value {
    let mut filters: Vec<Value> = Vec::new();
    for filter in &scenario.filters {
        let short = filter["@"].as_str().unwrap_or_default();
        filters.push(json!({"name": format!("envoy.filters.http.{short}"), "typed_config": filter}));
    }
    filters.push(json!({"name": "envoy.filters.http.router", "typed_config": {"@": "router"}}));
    let routes = if scenario.routes.is_empty() {
        let mut route = json!({});
        let chosen = ["cluster", "weighted_clusters", "cluster_header"];
        if !chosen.iter().any(|field| scenario.route.contains_key(*field)) {
            route["cluster"] = json!("~c");
        }
        merge(&mut route, &scenario.route);
        vec![json!({"name": "only", "match": {"prefix": "/"}, "route": route})]
    } else {
        scenario.routes.clone()
    };
    let mut host = json!({"name": "host", "domains": ["*"], "routes": routes});
    merge(&mut host, &scenario.host);
    let mut manager = json!({
        "@": "manager",
        "stat_prefix": "scenario",
        "route_config": {"name": "routes", "validate_clusters": false, "virtual_hosts": [host]},
        "http_filters": filters,
        "access_log": log(folder, "%REQ(x-case)%", REQUEST),
    });
    merge(&mut manager, &scenario.manager);
    manager
}

fn cluster(name: &str, cluster: &Cluster, servers: &BTreeMap<String, SocketAddr>) -> anyhow::Result<Value> {
    // in the order of the file
    let mut localities: Vec<Value> = Vec::new();
    for endpoint in cluster.endpoints()? {
        let address = servers.get(&endpoint.server).context("a server for each endpoint")?;
        let mut one = json!({"endpoint": {"address": socket(*address), "hostname": endpoint.server}});
        if let Some(weight) = endpoint.weight {
            one["load_balancing_weight"] = json!(weight);
        }
        if let Some(health) = endpoint.health {
            one["health_status"] = json!(health);
        }
        let place = json!({"region": "r", "zone": endpoint.zone});
        let same = |l: &&mut Value| l["locality"] == place && l["priority"] == json!(endpoint.priority);
        let locality = match localities.iter_mut().find(same) {
            Some(locality) => locality,
            None => {
                localities
                    .push(json!({"locality": place, "priority": endpoint.priority, "lb_endpoints": []}));
                localities.last_mut().context("the one that was added")?
            }
        };
        if let Some(weight) = endpoint.zone_weight {
            locality["load_balancing_weight"] = json!(weight);
        }
        locality["lb_endpoints"].as_array_mut().context("a list")?.push(one);
    }
    let mut fields = json!({
        "name": format!("~{name}"),
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": format!("~{name}"), "endpoints": localities},
    });
    if cluster.http2 {
        let options = json!({"@": "http_options", "explicit_http_config": {"http2_protocol_options": {"allow_connect": true}}});
        fields["typed_extension_protocol_options"] =
            json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options});
    }
    merge(&mut fields, &cluster.fields);
    // ones that pass bytes on take endpoints from nowhere
    if fields["type"] == json!("ORIGINAL_DST")
        && let Some(all) = fields.as_object_mut()
    {
        all.shift_remove("load_assignment");
    }
    Ok(fields)
}

#[test]
fn short_names_are_filled_in() {
    let mut value = json!([{"@": "fault", "cluster": "~c"}]);
    settle(&mut value, "s1.").unwrap();
    let expected = json!([{"@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault", "cluster": "s1.c"}]);
    assert_eq!(value, expected);
    assert!(settle(&mut json!({"@": "none"}), "").is_err());
}
