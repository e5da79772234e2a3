//! `proxy-status` and `proxy-config`.

mod bootstrap;

use std::process::ExitCode;

use anyhow::bail;
use istiod::api::types::{ProxyRow, Version};
use serde_json::Value;

use crate::cli::{Output, ProxyConfig};
use crate::client::{Client, segment};
use crate::output::{Rows, data, note, print};

/// Shows each proxy and what it has acknowledged.
pub(super) async fn status(client: &Client, output: Output) -> anyhow::Result<ExitCode> {
    let mut proxies: Vec<ProxyRow> = client.rows("/proxies").await?;
    proxies.sort_by(|a, b| a.name.cmp(&b.name));
    print(output, &proxies, |wide| {
        let mut header = vec!["name", "cds", "lds", "eds", "rds", "revision", "version"];
        let more = ["member", "identity", "protocol", "connected", "id"];
        header.extend(wide.then_some(more).into_iter().flatten());
        let mut rows = Rows::new(header);
        for proxy in &proxies {
            let state = |kind: &str| proxy.types.get(kind).cloned().unwrap_or_default();
            let mut row = vec![
                proxy.name.clone(),
                state("CDS"),
                state("LDS"),
                state("EDS"),
                state("RDS"),
                proxy.revision.to_string(),
                proxy.version.clone(),
            ];
            if wide {
                row.extend([
                    proxy.member.to_string(),
                    proxy.identity.clone(),
                    proxy.protocol.clone(),
                    format!("{}s", proxy.connected_seconds),
                    proxy.id.clone(),
                ]);
            }
            rows.push(row);
        }
        rows
    })?;
    for proxy in &proxies {
        for rejection in &proxy.rejected {
            note(&format!(
                "{} refused {} of revision {}: {}",
                proxy.name, rejection.kind, rejection.revision, rejection.error
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows what a proxy was given.
pub(super) async fn config(
    client: &Client,
    output: Output,
    command: &ProxyConfig,
) -> anyhow::Result<ExitCode> {
    let (kind, name) = match command {
        ProxyConfig::Listener(name) => ("listener", name),
        ProxyConfig::Route(name) => ("route", name),
        ProxyConfig::Cluster(name) => ("cluster", name),
        ProxyConfig::Endpoint(name) => ("endpoint", name),
        ProxyConfig::All(name) => ("all", name),
        ProxyConfig::Bootstrap(args) => {
            let xds = match &args.xds {
                Some(xds) => vec![xds.clone()],
                None => {
                    let version = client.get::<Version>("/version").await?;
                    if version.xds_members.is_empty() { vec![version.xds] } else { version.xds_members }
                }
            };
            let trust_domain = match client.get::<Version>("/version").await {
                Ok(version) => version.trust_domain,
                Err(_) => "cluster.local".to_owned(),
            };
            let bootstrap = bootstrap::envoy(args, &xds, &trust_domain)?;
            let text = match output {
                Output::Yaml => serde_saphyr::to_string(&bootstrap)?,
                Output::Table | Output::Wide | Output::Json => {
                    format!("{}\n", serde_json::to_string_pretty(&bootstrap)?)
                }
            };
            data(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let id = find(client, &name.proxy).await?;
    let dump: Value = client.get(&format!("/proxies/{}/config?type={kind}", segment(&id))).await?;
    let output = if kind == "all" && output == Output::Table { Output::Json } else { output };
    print(output, &dump, |_| match kind {
        "listener" => listeners(&dump),
        "route" => routes(&dump),
        "cluster" => clusters(&dump),
        _ => endpoints(&dump),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The node id of the one proxy whose id or name is, or has in it, `wanted`.
async fn find(client: &Client, wanted: &str) -> anyhow::Result<String> {
    let proxies: Vec<ProxyRow> = client.rows("/proxies").await?;
    if let Some(exact) = proxies.iter().find(|p| p.id == wanted || p.name == wanted) {
        return Ok(exact.id.clone());
    }
    let similar: Vec<&ProxyRow> = proxies.iter().filter(|p| p.id.contains(wanted)).collect();
    match similar.as_slice() {
        [one] => Ok(one.id.clone()),
        [] => {
            let known: Vec<_> = proxies.iter().map(|p| p.name.as_str()).collect();
            bail!("no proxy `{wanted}` is connected; connected are: {}", known.join(", "))
        }
        several => {
            let names: Vec<_> = several.iter().map(|p| p.name.as_str()).collect();
            bail!("`{wanted}` could be any of: {}", names.join(", "))
        }
    }
}

fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn listeners(dump: &Value) -> Rows {
    let mut rows = Rows::new(["name", "address", "port", "filter chains"]);
    for listener in items(dump, "/listeners") {
        let chains: Vec<_> = items(listener, "/filter_chains").map(describe_chain).collect();
        rows.push([
            text(listener, "/name"),
            text(listener, "/address/socket_address/address"),
            text(listener, "/address/socket_address/port_value"),
            chains.join("; "),
        ]);
    }
    rows
}

/// What one filter chain does: the route configuration or cluster it leads to.
fn describe_chain(chain: &Value) -> String {
    let leads = items(chain, "/filters").find_map(|filter| {
        ["/typed_config/rds/route_config_name", "/typed_config/route_config/name", "/typed_config/cluster"]
            .iter()
            .map(|pointer| text(filter, pointer))
            .find(|found| !found.is_empty())
    });
    let protocol = text(chain, "/filter_chain_match/transport_protocol");
    let leads = leads.unwrap_or_else(|| text(chain, "/name"));
    if protocol.is_empty() { leads } else { format!("{protocol} -> {leads}") }
}

fn routes(dump: &Value) -> Rows {
    let mut rows = Rows::new(["name", "virtual host", "domains", "match", "cluster"]);
    for config in items(dump, "/routes") {
        for host in items(config, "/virtual_hosts") {
            let domains: Vec<_> = items(host, "/domains").filter_map(Value::as_str).collect();
            for route in items(host, "/routes") {
                rows.push([
                    text(config, "/name"),
                    text(host, "/name"),
                    domains.first().map(|d| format!("{d} +{}", domains.len() - 1)).unwrap_or_default(),
                    describe_match(route),
                    describe_action(route),
                ]);
            }
        }
    }
    rows
}

fn describe_match(route: &Value) -> String {
    let path = [
        ("/match/path", ""),
        ("/match/prefix", "*"),
        ("/match/path_separated_prefix", "/*"),
        ("/match/safe_regex/regex", "~"),
    ]
    .iter()
    .map(|(pointer, mark)| (text(route, pointer), mark))
    .find(|(found, _)| !found.is_empty())
    .map(|(found, mark)| format!("{found}{mark}"))
    .unwrap_or_default();
    let headers: Vec<_> = items(route, "/match/headers").map(|h| text(h, "/name")).collect();
    if headers.is_empty() { path } else { format!("{path} [{}]", headers.join(",")) }
}

fn describe_action(route: &Value) -> String {
    let cluster = text(route, "/route/cluster");
    if !cluster.is_empty() {
        return cluster;
    }
    let weighted: Vec<_> = items(route, "/route/weighted_clusters/clusters")
        .map(|c| format!("{} {}", text(c, "/weight"), text(c, "/name")))
        .collect();
    if !weighted.is_empty() {
        return weighted.join(", ");
    }
    let status = text(route, "/direct_response/status");
    if status.is_empty() { "redirect".to_owned() } else { format!("direct response {status}") }
}

fn clusters(dump: &Value) -> Rows {
    let mut rows = Rows::new(["name", "type", "balancing", "connect timeout"]);
    for cluster in items(dump, "/clusters") {
        rows.push([
            text(cluster, "/name"),
            text(cluster, "/type"),
            text(cluster, "/lb_policy"),
            text(cluster, "/connect_timeout"),
        ]);
    }
    rows
}

fn endpoints(dump: &Value) -> Rows {
    let mut rows = Rows::new(["cluster", "endpoint", "health", "weight", "workload"]);
    for assignment in items(dump, "/endpoints") {
        for locality in items(assignment, "/endpoints") {
            for endpoint in items(locality, "/lb_endpoints") {
                let health = text(endpoint, "/health_status");
                rows.push([
                    text(assignment, "/cluster_name"),
                    format!(
                        "{}:{}",
                        text(endpoint, "/endpoint/address/socket_address/address"),
                        text(endpoint, "/endpoint/address/socket_address/port_value")
                    ),
                    if health.is_empty() { "HEALTHY".to_owned() } else { health },
                    text(endpoint, "/load_balancing_weight"),
                    text(endpoint, "/metadata/filter_metadata/istio/workload"),
                ]);
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_weighted_route_shows_its_split() {
        let dump = json!({"routes": [{"name": "9080", "virtual_hosts": [{
            "name": "reviews:9080", "domains": ["reviews", "reviews.default"],
            "routes": [{"match": {"prefix": "/", "headers": [{"name": "end-user"}]},
                        "route": {"weighted_clusters": {"clusters": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}]}}}],
        }]}]});
        let shown = routes(&dump).render();
        assert!(
            shown.contains("reviews +1") && shown.contains("/* [end-user]") && shown.contains("90 v1, 10 v2"),
            "{shown}"
        );
    }
}
