//! Access logs: which, by the mesh's settings and the `Telemetry` objects, and in what form.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::accesslog::v3 as accesslog;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3 as pb_file;
use envoy_types::pb::envoy::extensions::access_loggers::filters::cel::v3::ExpressionFilter;
use envoy_types::pb::google::protobuf::Struct;
use registry::model::extension::WorkloadMode;
use registry::model::mesh::{AccessLogEncoding, LogFormatKind, MeshConfig, Provider};
use registry::model::telemetry::AccessLogging;
use serde_json::Value;

use super::pb;

/// The provider that every mesh has: standard output, in the mesh's format.
const BUILT_IN: &str = "envoy";

/// On which side of a call the proxy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// It calls for its application.
    Client,
    /// It is called for its application.
    Server,
}

/// The access logs of one side. `layers` are what the mesh, the namespace and the workload say, in this order;
/// `expressions` is whether the proxy can evaluate filters (without, everything is logged).
pub(super) fn access_logs(
    mesh: &MeshConfig,
    layers: &[&[AccessLogging]],
    side: Side,
    expressions: bool,
) -> Vec<accesslog::AccessLog> {
    let defaults = mesh.default_providers.as_ref().map(|d| d.access_logging.as_slice()).unwrap_or_default();
    if defaults.is_empty() && layers.iter().all(|layer| layer.is_empty()) {
        return mesh_file(mesh, &mesh.access_log_file).into_iter().collect();
    }
    providers(defaults, layers, side)
        .into_iter()
        .filter_map(|(name, filter)| {
            let mut log = provider(mesh, name)?;
            log.filter = filter.filter(|_| expressions).map(expression);
            Some(log)
        })
        .collect()
}

/// The providers that log, each with the expression that selects what. A narrower layer replaces the providers that it
/// inherits when it names its own, and switches off what it disables.
fn providers<'a>(
    defaults: &'a [String],
    layers: &[&'a [AccessLogging]],
    side: Side,
) -> BTreeMap<&'a str, Option<&'a str>> {
    let mut out: BTreeMap<&str, Option<&str>> = defaults.iter().map(|name| (name.as_str(), None)).collect();
    for layer in layers {
        let own: Vec<&AccessLogging> = layer.iter().filter(|logging| concerns(logging, side)).collect();
        let inherited: Vec<&str> = out.keys().copied().collect();
        if own.iter().any(|logging| !logging.providers.is_empty() && logging.disabled != Some(true)) {
            out.clear();
        }
        for logging in own {
            let mut names: Vec<&str> = logging.providers.iter().map(|p| p.name.as_str()).collect();
            if names.is_empty() {
                names.clone_from(&inherited);
            }
            let filter = logging.filter.as_ref().map(|f| f.expression.as_str()).filter(|e| !e.is_empty());
            for name in names {
                if logging.disabled == Some(true) {
                    out.remove(name);
                } else {
                    out.insert(name, filter);
                }
            }
        }
    }
    out
}

fn concerns(logging: &AccessLogging, side: Side) -> bool {
    match logging.r#match.as_ref().map(|selector| selector.mode).unwrap_or_default() {
        WorkloadMode::Undefined | WorkloadMode::ClientAndServer => true,
        WorkloadMode::Client => side == Side::Client,
        WorkloadMode::Server => side == Side::Server,
    }
}

/// The log of a provider; none for kinds that are not files.
fn provider(mesh: &MeshConfig, name: &str) -> Option<accesslog::AccessLog> {
    match mesh.provider(name).and_then(|provider| provider.provider.as_ref()) {
        Some(Provider::EnvoyFileAccessLog(file)) => {
            let path = if file.path.is_empty() { "/dev/stdout" } else { file.path.as_str() };
            match file.log_format.as_ref().and_then(|format| format.log_format.as_ref()) {
                None => mesh_file(mesh, path),
                Some(LogFormatKind::Text(text)) => Some(file_log(path, text_format(text))),
                Some(LogFormatKind::Labels(labels)) => Some(file_log(path, json_format(labels.as_object()))),
            }
        }
        Some(_) => None,
        None if name == BUILT_IN => mesh_file(mesh, "/dev/stdout"),
        None => None,
    }
}

fn expression(text: &str) -> accesslog::AccessLogFilter {
    let filter = ExpressionFilter { expression: text.to_owned(), ..Default::default() };
    accesslog::AccessLogFilter {
        filter_specifier: Some(accesslog::access_log_filter::FilterSpecifier::ExtensionFilter(
            accesslog::ExtensionFilter {
                name: "envoy.access_loggers.extension_filters.cel".to_owned(),
                config_type: Some(accesslog::extension_filter::ConfigType::TypedConfig(pb::any(&filter))),
            },
        )),
    }
}

/// A file in the mesh's own format; none without a path.
fn mesh_file(mesh: &MeshConfig, path: &str) -> Option<accesslog::AccessLog> {
    let format = match mesh.access_log_encoding {
        AccessLogEncoding::Text => text_format(&mesh.access_log_format),
        AccessLogEncoding::Json => {
            let given: Option<Value> = serde_json::from_str(&mesh.access_log_format).ok();
            json_format(given.as_ref().and_then(Value::as_object))
        }
    };
    (!path.is_empty()).then(|| file_log(path, format))
}

fn file_log(path: &str, format: core::substitution_format_string::Format) -> accesslog::AccessLog {
    let config = pb_file::FileAccessLog {
        path: path.to_owned(),
        access_log_format: Some(pb_file::file_access_log::AccessLogFormat::LogFormat(
            core::SubstitutionFormatString { format: Some(format), ..Default::default() },
        )),
    };
    accesslog::AccessLog {
        name: "envoy.access_loggers.file".to_owned(),
        filter: None,
        config_type: Some(accesslog::access_log::ConfigType::TypedConfig(pb::any(&config))),
    }
}

/// One line per entry; Istio's when no format is given.
fn text_format(format: &str) -> core::substitution_format_string::Format {
    let text = if format.is_empty() { DEFAULT_LINE } else { format };
    let line = if text.ends_with('\n') { text.to_owned() } else { format!("{text}\n") };
    core::substitution_format_string::Format::TextFormatSource(pb::inline_string(line))
}

/// One JSON object per entry, with the given keys or Istio's.
fn json_format(given: Option<&serde_json::Map<String, Value>>) -> core::substitution_format_string::Format {
    let fields = match given {
        Some(given) => {
            given.iter().map(|(k, v)| (k.clone(), pb::text(v.as_str().unwrap_or_default()))).collect()
        }
        None => DEFAULT_FIELDS.iter().map(|(k, v)| ((*k).to_owned(), pb::text(*v))).collect(),
    };
    core::substitution_format_string::Format::JsonFormat(Struct { fields })
}

/// Istio's default access log line.
const DEFAULT_LINE: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% \
%PROTOCOL%\" %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
\"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% \
%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

/// The keys of Istio's default access log in JSON, with the command that fills each.
const DEFAULT_FIELDS: &[(&str, &str)] = &[
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
];
