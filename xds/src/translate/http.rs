//! HTTP connection managers: one function for both directions, so that they cannot drift apart.

use envoy_types::pb::envoy::config::accesslog::v3 as accesslog;
use envoy_types::pb::envoy::config::core::v3::Http2ProtocolOptions;
use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::Cors;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::HttpFault;
use envoy_types::pb::envoy::extensions::filters::http::grpc_stats::v3 as grpc_stats;
use envoy_types::pb::envoy::extensions::filters::http::grpc_web::v3::GrpcWeb;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;

use super::pb;

/// Name of the fault filter, also in a route's settings.
pub(super) const FAULT: &str = "envoy.filters.http.fault";
/// Name of the CORS filter, also in a route's settings.
pub(super) const CORS: &str = "envoy.filters.http.cors";
const MANAGER: &str = "envoy.filters.network.http_connection_manager";
const SERVER: &str = "istio-envoy";

/// How paths are brought to one form before anything looks at them (Istio `meshConfig.pathNormalization`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathForm {
    /// As they come.
    None,
    /// RFC 3986 normalisation.
    Base,
    /// Also `//` to `/`.
    MergeSlashes,
    /// Also `%2F` and `%5C` decoded.
    DecodeAndMergeSlashes,
}

/// What a connection manager is made of.
pub(super) struct Manager<'a> {
    /// Prefix of its statistics.
    pub(super) stat_prefix: String,
    /// Inbound managers tell the application who called.
    pub(super) inbound: bool,
    /// Where its routes come from.
    pub(super) routes: hcm::http_connection_manager::RouteSpecifier,
    /// Filters before the common ones.
    pub(super) first: Vec<hcm::HttpFilter>,
    /// How paths are normalised.
    pub(super) path_form: PathForm,
    /// Access logs.
    pub(super) access_log: &'a [accesslog::AccessLog],
}

/// Routes that come by name from the stream.
pub(super) fn rds(name: &str) -> hcm::http_connection_manager::RouteSpecifier {
    hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
        config_source: pb::ads(),
        route_config_name: name.to_owned(),
    })
}

/// Routes in the listener itself.
pub(super) fn inline(config: route::RouteConfiguration) -> hcm::http_connection_manager::RouteSpecifier {
    hcm::http_connection_manager::RouteSpecifier::RouteConfig(config)
}

/// The network filter.
pub(super) fn manager(parts: Manager<'_>) -> Filter {
    use hcm::http_connection_manager as inner;
    let mut http_filters = parts.first;
    http_filters.extend(common_filters());
    let (forward, details) = if parts.inbound {
        let details = inner::SetCurrentClientCertDetails {
            subject: pb::boolv(true),
            dns: true,
            uri: true,
            ..Default::default()
        };
        (inner::ForwardClientCertDetails::AppendForward, Some(details))
    } else {
        (inner::ForwardClientCertDetails::Sanitize, None)
    };
    let escaped = match parts.path_form {
        PathForm::DecodeAndMergeSlashes => inner::PathWithEscapedSlashesAction::UnescapeAndForward,
        PathForm::None | PathForm::Base | PathForm::MergeSlashes => {
            inner::PathWithEscapedSlashesAction::KeepUnchanged
        }
    };
    let config = hcm::HttpConnectionManager {
        stat_prefix: parts.stat_prefix,
        http_filters,
        server_name: SERVER.to_owned(),
        use_remote_address: pb::boolv(false),
        stream_idle_timeout: pb::zero(),
        access_log: parts.access_log.to_vec(),
        forward_client_cert_details: forward.into(),
        set_current_client_cert_details: details,
        proxy_100_continue: true,
        strip_trailing_host_dot: true,
        upgrade_configs: vec![inner::UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..Default::default()
        }],
        // RFC 8441: a WebSocket of a peer that speaks HTTP/2, as it does under `h2UpgradePolicy`
        http2_protocol_options: Some(Http2ProtocolOptions { allow_connect: true, ..Default::default() }),
        normalize_path: pb::boolv(parts.path_form != PathForm::None),
        merge_slashes: matches!(parts.path_form, PathForm::MergeSlashes | PathForm::DecodeAndMergeSlashes),
        path_with_escaped_slashes_action: escaped.into(),
        route_specifier: Some(parts.routes),
        ..Default::default()
    };
    pb::network_filter(MANAGER, &config)
}

/// Turns gRPC-Web of browsers into gRPC for the application.
pub(super) fn grpc_web() -> hcm::HttpFilter {
    pb::http_filter("envoy.filters.http.grpc_web", &GrpcWeb {})
}

/// gRPC statistics, faults, CORS, then the router: the end of every chain, in this order.
fn common_filters() -> [hcm::HttpFilter; 4] {
    let grpc = grpc_stats::FilterConfig {
        emit_filter_state: true,
        per_method_stat_specifier: Some(
            grpc_stats::filter_config::PerMethodStatSpecifier::StatsForAllMethods(
                envoy_types::pb::google::protobuf::BoolValue { value: false },
            ),
        ),
        ..Default::default()
    };
    [
        pb::http_filter("envoy.filters.http.grpc_stats", &grpc),
        pb::http_filter(FAULT, &HttpFault::default()),
        pb::http_filter(CORS, &Cors {}),
        pb::http_filter("envoy.filters.http.router", &Router::default()),
    ]
}
