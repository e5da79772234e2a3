//! A bootstrap file with which a stock Envoy takes a sidecar's seat.
//!
//! Envoy gets its configuration from istiod over mTLS, and its certificate over SDS from the agent's Unix socket,
//! so its key never leaves the machine and renewals need no restart.

use anyhow::{Context, ensure};
use proxy::xds::decode::Address;
use serde_json::{Map, Value, json};

use crate::cli::Bootstrap;

/// The bootstrap as Envoy's JSON, for a control plane whose members serve xDS at these addresses (`HOST:PORT`).
pub(super) fn envoy(args: &Bootstrap, xds: &[String], trust_domain: &str) -> anyhow::Result<Value> {
    let (name, namespace) = args.workload.split_once('.').context("the workload is `name.namespace`")?;
    ensure!(!name.is_empty() && !namespace.is_empty(), "the workload is `name.namespace`");
    let node = node(args, name, namespace);
    let id = node.get("id").and_then(Value::as_str).unwrap_or_default();
    let members = members(id, xds)?;
    let api_type = if args.sotw { "GRPC" } else { "DELTA_GRPC" };
    let ads = json!({ "ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s" });
    Ok(json!({
        "node": node,
        "admin": { "address": socket("127.0.0.1", args.admin_port) },
        "dynamic_resources": {
            "ads_config": {
                "api_type": api_type,
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "xds-grpc" } }],
            },
            "cds_config": ads,
            "lds_config": ads,
        },
        "static_resources": { "clusters": [control_plane(&members, trust_domain), secrets(args)] },
    }))
}

fn node(args: &Bootstrap, name: &str, namespace: &str) -> Value {
    let labels: Map<String, Value> = args.labels.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    let forward: Map<String, Value> = args.forward.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    let mut metadata = json!({
        "NAME": name,
        "NAMESPACE": namespace,
        "WORKLOAD_NAME": name,
        "SERVICE_ACCOUNT": args.service_account,
        "CLUSTER_ID": "default",
        "LABELS": labels,
        "INTERCEPTION_MODE": if args.loopback_block.is_some() { "NONE" } else { "REDIRECT" },
    });
    if let (Some(block), Some(fields)) = (&args.loopback_block, metadata.as_object_mut()) {
        fields.insert("LOOPBACK_BLOCK".to_owned(), json!(block));
        fields.insert("INBOUND_FORWARD".to_owned(), Value::Object(forward));
    }
    json!({
        "id": format!("sidecar~{}~{name}.{namespace}~{namespace}.svc.cluster.local", args.address),
        "cluster": format!("{name}.{namespace}"),
        "metadata": metadata,
    })
}

fn socket(host: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": host, "port_value": port } })
}

fn assignment(name: &str, address: &Value) -> Value {
    json!({ "cluster_name": name, "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address } }] }] })
}

fn http2() -> Value {
    json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": { "http2_protocol_options": {
            "connection_keepalive": { "interval": "30s", "timeout": "10s" }
        } },
    } })
}

/// The members as endpoints, in the order in which this node prefers them; Envoy takes the next one when a stream
/// fails, since they are of one priority: without health checks it would not leave a better one that is down. Whether
/// one is a name that DNS must resolve.
fn members(node: &str, xds: &[String]) -> anyhow::Result<(Value, bool)> {
    let mut endpoints = Vec::new();
    let mut named = false;
    for member in wire::members::order(node, xds.iter().map(String::as_str)) {
        let address = Address::parse(member).with_context(|| format!("`{member}` is not HOST:PORT"))?;
        let (host, port) = member.rsplit_once(':').with_context(|| format!("`{member}` is not HOST:PORT"))?;
        named |= address.socket().is_none();
        let address = socket(host.trim_matches(['[', ']']), port.parse()?);
        endpoints.push(json!({ "endpoint": { "address": address } }));
    }
    ensure!(!endpoints.is_empty(), "no member of the control plane is known");
    Ok((Value::Array(endpoints), named))
}

fn control_plane((members, named): &(Value, bool), trust_domain: &str) -> Value {
    let sds = json!({
        "api_config_source": {
            "api_type": "GRPC",
            "transport_api_version": "V3",
            "set_node_on_first_message_only": true,
            "grpc_services": [{ "envoy_grpc": { "cluster_name": "sds-grpc" } }],
        },
        "resource_api_version": "V3",
        "initial_fetch_timeout": "0s",
    });
    json!({
        "name": "xds-grpc",
        "type": if *named { "STRICT_DNS" } else { "STATIC" },
        "connect_timeout": "5s",
        "typed_extension_protocol_options": http2(),
        "load_assignment": { "cluster_name": "xds-grpc", "endpoints": [{ "lb_endpoints": members }] },
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": "istiod.istio-system.svc",
                "common_tls_context": {
                    "alpn_protocols": ["h2"],
                    "tls_params": { "tls_minimum_protocol_version": "TLSv1_2" },
                    "tls_certificate_sds_secret_configs": [{ "name": "default", "sds_config": sds }],
                    "combined_validation_context": {
                        "default_validation_context": { "match_typed_subject_alt_names": [{
                            "san_type": "URI",
                            "matcher": { "exact": format!("spiffe://{trust_domain}/ns/istio-system/sa/istiod") },
                        }] },
                        "validation_context_sds_secret_config": { "name": "ROOTCA", "sds_config": sds },
                    },
                },
            },
        },
    })
}

fn secrets(args: &Bootstrap) -> Value {
    json!({
        "name": "sds-grpc",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": http2(),
        "load_assignment": assignment("sds-grpc", &json!({ "pipe": { "path": args.secrets } })),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap as EnvoyBootstrap;

    use super::*;
    use crate::cli::{Cli, Command, ProxyConfig};

    #[test]
    fn the_bootstrap_is_envoys() {
        let cli = Cli::parse_from([
            "istioctl",
            "proxy-config",
            "bootstrap",
            "--envoy",
            "reviews-v1.shop",
            "--secrets",
            "/run/sds.sock",
            "--loopback-block",
            "127.240.16.0/20",
            "--forward",
            "9080=127.0.0.1:8080",
            "--labels",
            "app=reviews,version=v1",
        ]);
        let Command::ProxyConfig(ProxyConfig::Bootstrap(args)) = cli.command else {
            panic!("not a bootstrap")
        };
        let xds = ["127.0.0.1:15012", "127.0.0.2:15012", "[::1]:15012"].map(str::to_owned);
        let json = envoy(&args, &xds, "cluster.local").unwrap();
        let bootstrap: EnvoyBootstrap = wire::json::message_from_json(&json).unwrap();
        assert_eq!(bootstrap.node.unwrap().id, "sidecar~127.0.0.1~reviews-v1.shop~shop.svc.cluster.local");
        let clusters = bootstrap.static_resources.unwrap().clusters;
        assert_eq!(clusters.len(), 2);
        let endpoints = &clusters[0].load_assignment.as_ref().unwrap().endpoints;
        assert_eq!(endpoints.iter().map(|e| e.lb_endpoints.len()).collect::<Vec<_>>(), [3]);
        assert!(json.to_string().contains(r#""address":"::1""#), "{json}");
        for wrong in [&["nonsense".to_owned()][..], &[]] {
            assert!(envoy(&args, wrong, "cluster.local").is_err());
        }
    }
}
