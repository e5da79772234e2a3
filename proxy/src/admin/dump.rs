//! What the proxy holds, in Envoy's form.

use std::sync::Arc;

use ca::x509::Facts;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{Admin, Answer, JSON, TEXT, json_reply, reply, text};
use crate::tables::{ActiveCluster, Held, Tables};
use crate::upstream::check::Standing;
use crate::xds::cluster::endpoint::{ClusterLoadAssignment, Endpoint, Health};
use crate::xds::listener::chain::Terminal;
use crate::xds::listener::hcm::RouteSource;

const TYPE: &str = "type.googleapis.com/envoy.admin.v3.";

/// `/config_dump`
pub(super) fn config(admin: &Admin, include_eds: bool, only: Option<&str>) -> Answer {
    let tables = admin.tables.load();
    let mut configs = Vec::new();
    if let Some(bootstrap) = &admin.config.bootstrap {
        let bootstrap = wire::json::message_to_json(&**bootstrap).unwrap_or_default();
        configs.push(
            json!({ "@type": format!("{TYPE}BootstrapConfigDump"), "bootstrap": blank_keys(bootstrap) }),
        );
    }
    configs.push(clusters_dump(&tables));
    if include_eds {
        configs.push(endpoints_dump(&tables));
    }
    configs.push(listeners_dump(&tables));
    configs.push(routes_dump(&tables));
    match only {
        None => json_reply(&json!({ "configs": configs })),
        // As Envoy: the elements of one repeated field, such as `dynamic_listeners`.
        Some(field) => {
            let found = configs.iter_mut().find_map(|c| c.get_mut(field).map(Value::take));
            match found {
                Some(Value::Array(items)) => json_reply(&json!({ "configs": items })),
                _ => reply(StatusCode::NOT_FOUND, TEXT, format!("{field} not found in config dump\n")),
            }
        }
    }
}

/// Private keys that a bootstrap file holds are not shown.
fn blank_keys(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            for (name, inner) in fields.iter_mut() {
                *inner = if name == "private_key" { json!("[redacted]") } else { blank_keys(inner.take()) };
            }
        }
        Value::Array(items) => {
            for item in items {
                *item = blank_keys(item.take());
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
    value
}

fn raw<T>(held: &Held<T>) -> Value {
    match wire::json::any_to_json(&held.raw) {
        Ok(value) => blank_keys(value),
        Err(error) => json!({ "@type": held.raw.type_url, "error": error.to_string() }),
    }
}

fn entry<T>(held: &Held<T>, field: &str) -> Value {
    let mut fields = Map::new();
    if !held.is_static {
        fields.insert("version_info".into(), json!(&*held.version));
    }
    fields.insert(field.into(), raw(held));
    fields.insert("last_updated".into(), json!(held.updated.to_string()));
    Value::Object(fields)
}

fn clusters_dump(tables: &Tables) -> Value {
    let (warming, _) = tables.warming();
    let all = || tables.known.clusters.iter();
    let of = |wanted: &dyn Fn(&Arc<str>, bool) -> bool| -> Vec<Value> {
        all().filter(|(name, h)| wanted(name, h.is_static)).map(|(_, h)| entry(h, "cluster")).collect()
    };
    json!({
        "@type": format!("{TYPE}ClustersConfigDump"),
        "static_clusters": of(&|_, is_static| is_static),
        "dynamic_active_clusters": of(&|name, is_static| !is_static && !warming.contains(name)),
        "dynamic_warming_clusters": of(&|name, is_static| !is_static && warming.contains(name)),
    })
}

fn endpoints_dump(tables: &Tables) -> Value {
    let dynamic: Vec<Value> = tables.known.endpoints.values().map(|h| entry(h, "endpoint_config")).collect();
    json!({ "@type": format!("{TYPE}EndpointsConfigDump"), "dynamic_endpoint_configs": dynamic })
}

fn listeners_dump(tables: &Tables) -> Value {
    let (_, warming) = tables.warming();
    let mut fixed = Vec::new();
    let mut dynamic = Vec::new();
    for (name, held) in &tables.known.listeners {
        if held.is_static {
            fixed.push(entry(held, "listener"));
        } else {
            let state = if warming.contains(name) { "warming_state" } else { "active_state" };
            dynamic.push(json!({ "name": &**name, (state): entry(held, "listener") }));
        }
    }
    json!({
        "@type": format!("{TYPE}ListenersConfigDump"),
        "static_listeners": fixed,
        "dynamic_listeners": dynamic,
    })
}

fn routes_dump(tables: &Tables) -> Value {
    let dynamic: Vec<Value> = tables.known.routes.values().map(|h| entry(h, "route_config")).collect();
    let mut inline = Vec::new();
    for active in tables.listeners.values() {
        for chain in active.listener.chains.iter().chain(&active.listener.default_chain) {
            if let Terminal::Http(hcm) = &chain.terminal
                && let RouteSource::Inline(routes) = &hcm.routes
            {
                inline.push(json!({ "route_config": { "name": &*routes.name } }));
            }
        }
    }
    json!({
        "@type": format!("{TYPE}RoutesConfigDump"),
        "static_route_configs": inline,
        "dynamic_route_configs": dynamic,
    })
}

fn health(health: Health) -> (&'static str, &'static str) {
    match health {
        Health::Healthy => ("healthy", "HEALTHY"),
        Health::Degraded => ("/eds_status_degraded", "DEGRADED"),
        Health::Unhealthy => ("/failed_eds_health", "UNHEALTHY"),
        Health::Draining => ("/eds_status_draining", "DRAINING"),
    }
}

/// The endpoints of a cluster, those of its names where DNS gave any.
fn endpoints(active: &ActiveCluster) -> Arc<ClusterLoadAssignment> {
    active.state.resolved().unwrap_or_else(|| Arc::clone(&active.endpoints))
}

/// Why an endpoint is not healthy: Envoy's flags in its order, as `/clusters` and its JSON form call them.
fn health_flags(active: &ActiveCluster, endpoint: &Endpoint) -> Vec<(&'static str, &'static str)> {
    let found = active.state.standing(&endpoint.address);
    let out = matches!(found, Some(Standing::Failed | Standing::Late | Standing::Unknown));
    [
        (out, ("/failed_active_hc", "failed_active_health_check")),
        (active.state.is_ejected(&endpoint.address), ("/failed_outlier_check", "failed_outlier_check")),
        (found == Some(Standing::Degraded), ("/degraded_active_hc", "failed_active_degraded_check")),
        (found == Some(Standing::Unknown), ("/pending_active_hc", "pending_active_hc")),
        (found == Some(Standing::Late), ("/active_hc_timeout", "active_hc_timeout")),
    ]
    .into_iter()
    .filter_map(|(set, names)| set.then_some(names))
    .collect()
}

fn health_text(active: &ActiveCluster, endpoint: &Endpoint) -> String {
    let found: String = health_flags(active, endpoint).iter().map(|(text, _)| *text).collect();
    match (found.is_empty(), endpoint.health) {
        (true, health) => self::health(health).0.to_owned(),
        (false, Health::Healthy) => found,
        (false, health) => found + self::health(health).0,
    }
}

/// `/clusters`
pub(super) fn clusters(admin: &Admin, as_json: bool) -> Answer {
    let tables = admin.tables.load();
    if as_json {
        let statuses: Vec<Value> = tables.clusters.values().map(|c| cluster_json(c, &tables)).collect();
        return json_reply(&json!({ "cluster_statuses": statuses }));
    }
    let mut out = String::new();
    for (name, active) in &tables.clusters {
        let limits = &active.cluster.limits;
        for (key, value) in [
            ("max_connections", limits.max_connections),
            ("max_pending_requests", limits.max_pending),
            ("max_requests", limits.max_requests),
            ("max_retries", limits.max_retries),
        ] {
            out.push_str(&format!("{name}::default_priority::{key}::{value}\n"));
        }
        for locality in &endpoints(active).localities {
            for endpoint in &locality.endpoints {
                let address = &endpoint.address;
                let place = &locality.locality;
                for (key, value) in [
                    ("health_flags", health_text(active, endpoint)),
                    ("weight", endpoint.weight.to_string()),
                    ("region", place.region.to_string()),
                    ("zone", place.zone.to_string()),
                    ("sub_zone", place.sub_zone.to_string()),
                    ("priority", locality.priority.to_string()),
                    ("hostname", endpoint.hostname.to_string()),
                ] {
                    out.push_str(&format!("{name}::{address}::{key}::{value}\n"));
                }
            }
        }
    }
    text(out)
}

fn cluster_json(active: &ActiveCluster, tables: &Tables) -> Value {
    let added_via_api = tables.known.clusters.get(&active.cluster.name).is_some_and(|h| !h.is_static);
    let hosts: Vec<Value> = endpoints(active)
        .localities
        .iter()
        .flat_map(|l| l.endpoints.iter().map(move |e| (l, e)))
        .map(|(l, e)| {
            let address = match e.address.socket() {
                Some(a) => {
                    json!({ "socket_address": { "address": a.ip().to_string(), "port_value": a.port() } })
                }
                None => json!({ "pipe": { "path": e.address.to_string() } }),
            };
            let found = health_flags(active, e).into_iter().map(|(_, name)| (name.to_owned(), json!(true)));
            let said = ("eds_health_status".to_owned(), json!(health(e.health).1));
            json!({
                "address": address,
                "health_status": found.chain([said]).collect::<Map<_, _>>(),
                "weight": e.weight,
                "priority": l.priority,
                "hostname": &*e.hostname,
                "locality": {
                    "region": &*l.locality.region,
                    "zone": &*l.locality.zone,
                    "sub_zone": &*l.locality.sub_zone,
                },
            })
        })
        .collect();
    json!({ "name": &*active.cluster.name, "added_via_api": added_via_api, "host_statuses": hosts })
}

/// `/listeners`
pub(super) fn listeners(admin: &Admin, as_json: bool) -> Answer {
    let tables = admin.tables.load();
    if as_json {
        let statuses: Vec<Value> = tables
            .listeners
            .values()
            .map(|a| {
                let addresses: Vec<String> = a.listener.addresses.iter().map(ToString::to_string).collect();
                json!({ "name": &*a.listener.name, "local_address": addresses.first(), "addresses": addresses })
            })
            .collect();
        return json_reply(&json!({ "listener_statuses": statuses }));
    }
    let lines = tables.listeners.values().flat_map(|a| {
        a.listener.addresses.iter().map(move |address| format!("{}::{address}\n", a.listener.name))
    });
    text(lines.collect::<String>())
}

/// `/init_dump`
pub(super) fn init(admin: &Admin) -> Answer {
    let (clusters, listeners) = admin.tables.load().warming();
    let names = |list: Vec<Arc<str>>| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let waiting = [("clusters", names(clusters)), ("listeners", names(listeners))];
    let dumps: Vec<Value> = waiting
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(name, target_names)| json!({ "name": name, "target_names": target_names }))
        .collect();
    json_reply(&json!({ "unready_targets_dumps": dumps }))
}

/// `/certs`
pub(super) fn certificates(admin: &Admin) -> Answer {
    let mut chain = Vec::new();
    let held = admin.config.identity.as_ref().map(|watch| watch.borrow().chain.clone());
    for der in held.unwrap_or_default() {
        match Facts::parse(&der) {
            Ok(facts) => chain.push(facts_json(&facts)),
            Err(error) => {
                return reply(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    JSON,
                    json!({ "error": error.to_string() }).to_string(),
                );
            }
        }
    }
    let certificates: Vec<Value> =
        if chain.is_empty() { Vec::new() } else { vec![json!({ "cert_chain": chain })] };
    json_reply(&json!({ "certificates": certificates }))
}

fn facts_json(facts: &Facts) -> Value {
    let time =
        |t: std::time::SystemTime| jiff::Timestamp::try_from(t).map(|t| t.to_string()).unwrap_or_default();
    let names: Vec<Value> = facts
        .uris
        .iter()
        .map(|u| json!({ "uri": u }))
        .chain(facts.dns.iter().map(|d| json!({ "dns": d })))
        .collect();
    json!({
        "subject": facts.subject,
        "subject_alt_names": names,
        "valid_from": time(facts.not_before),
        "expiration_time": time(facts.not_after),
    })
}
