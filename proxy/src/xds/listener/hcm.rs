//! The HTTP connection manager filter.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use http::HeaderValue;

use super::Names;
use crate::xds::access_log::{AccessLog, access_logs};
use crate::xds::decode::{
    Invalid, Under as _, ads_only, bool_or, header_value, opt_duration, timeout, u32_or,
};
use crate::xds::filter::{HttpFilter, http_filters};
use crate::xds::route::RouteConfiguration;

/// HTTP on a filter chain.
#[derive(Debug)]
pub struct HttpConnectionManager {
    /// The name in its statistics.
    pub stat_prefix: Box<str>,
    /// Which version of HTTP.
    pub codec: Codec,
    /// Its routes.
    pub routes: RouteSource,
    /// Its filters, the router last.
    pub filters: Box<[HttpFilter]>,
    /// Lines about each request.
    pub access_logs: Arc<[AccessLog]>,
    /// The `server` response header.
    pub server_name: HeaderValue,
    /// What happens to a `server` header of the upstream.
    pub server_header: ServerHeader,
    /// The `via` header, if one is written.
    pub via: Option<HeaderValue>,
    /// Who the client is, and what is told about it.
    pub client: ClientAddress,
    /// Request ids.
    pub request_id: RequestId,
    /// What `x-forwarded-client-cert` says.
    pub client_cert: ClientCert,
    /// How paths are cleaned before anything looks at them.
    pub path: PathCleaning,
    /// How the authority is cleaned.
    pub strip_port: StripPort,
    /// Upgrades in lower case (`websocket`), allowed or not.
    pub upgrades: Upgrades,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// The most bytes of request headers.
    pub max_request_headers: usize,
    /// The most request headers.
    pub max_headers_count: u32,
    /// The most requests on one connection.
    pub max_requests_per_connection: Option<u32>,
    /// Headers with `_` in their names.
    pub underscores: Underscores,
    /// HTTP/1 settings.
    pub http1: Http1,
    /// HTTP/2 settings.
    pub http2: Http2,
    /// The scheme that requests get, whatever they came over.
    pub scheme_overwrite: Option<http::uri::Scheme>,
    /// Write `x-forwarded-port`.
    pub append_x_forwarded_port: bool,
}

/// Kinds of upgrades in lower case, and whether they are allowed.
pub type Upgrades = Box<[(Box<str>, bool)]>;

/// An index into [`super::Listener::rds`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rds(pub usize);

/// Where routes come from.
#[derive(Debug, Clone)]
pub enum RouteSource {
    /// From the tables, by name.
    Rds(Rds),
    /// Part of the listener.
    Inline(Arc<RouteConfiguration>),
}

/// Which version of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// By ALPN, or else by the first bytes.
    Auto,
    /// HTTP/1
    Http1,
    /// HTTP/2, with prior knowledge on plain connections.
    Http2,
}

/// What happens to a `server` header of the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerHeader {
    /// Ours takes its place.
    Overwrite,
    /// It stays; ours is written if there is none.
    AppendIfAbsent,
    /// It stays; ours is never written.
    PassThrough,
}

/// Who the client is.
#[derive(Debug, Clone, Copy)]
pub struct ClientAddress {
    /// The connection's other end is the client, and `x-forwarded-for` gets it.
    pub use_remote_address: bool,
    /// How many proxies in front are trusted to write `x-forwarded-for`.
    pub xff_num_trusted_hops: u32,
    /// Leave `x-forwarded-for` as it is.
    pub skip_xff_append: bool,
}

/// Request ids.
#[derive(Debug, Clone, Copy)]
pub struct RequestId {
    /// Make one where there is none.
    pub generate: bool,
    /// Keep one from outside.
    pub preserve_external: bool,
    /// Send it back.
    pub in_response: bool,
}

/// What happens to `x-forwarded-client-cert`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardClientCert {
    /// It is removed.
    Sanitize,
    /// It is sent on if the connection is mTLS.
    ForwardOnly,
    /// Ours is added if the connection is mTLS.
    AppendForward,
    /// Ours takes its place if the connection is mTLS.
    SanitizeSet,
    /// It is sent on.
    AlwaysForwardOnly,
}

/// What `x-forwarded-client-cert` says.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "five independent switches, as in the protocol")]
pub struct ClientCert {
    /// What happens to the header.
    pub forward: ForwardClientCert,
    /// Say the subject.
    pub subject: bool,
    /// Say the certificate itself.
    pub cert: bool,
    /// Say the chain.
    pub chain: bool,
    /// Say DNS names.
    pub dns: bool,
    /// Say URIs.
    pub uri: bool,
}

/// How paths are cleaned.
#[derive(Debug, Clone, Copy)]
pub struct PathCleaning {
    /// By RFC 3986: dot segments removed, escapes of unreserved characters undone.
    pub normalize: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// What happens to `%2F` and `%5C`.
    pub escaped_slashes: EscapedSlashes,
}

/// What happens to `%2F` and `%5C`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EscapedSlashes {
    /// Nothing.
    Keep,
    /// The request is answered with 400.
    Reject,
    /// The client is redirected to the path with slashes.
    UnescapeAndRedirect,
    /// They become slashes.
    UnescapeAndForward,
}

/// How the authority's port is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StripPort {
    /// It stays.
    Never,
    /// It goes if it is the listener's.
    Matching,
    /// It goes.
    Any,
}

/// Timeouts; `None` is for ever.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// A connection without requests.
    pub idle: Option<Duration>,
    /// A stream on which nothing moves.
    pub stream_idle: Option<Duration>,
    /// Until the whole request is here.
    pub request: Option<Duration>,
    /// Until the request's headers are here.
    pub request_headers: Option<Duration>,
    /// The life of a connection.
    pub max_connection_duration: Option<Duration>,
    /// Between the two GOAWAYs of a draining HTTP/2 connection. The codec sends the second one when a round trip shows
    /// that the first has arrived, so nothing waits for this.
    pub drain: Duration,
    /// Between our last byte and closing. The codec closes its half and reads the client's to its end, so nothing
    /// waits for this either.
    pub delayed_close: Option<Duration>,
}

/// Headers with `_` in their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underscores {
    /// As all others.
    Allow,
    /// The request is answered with 400.
    Reject,
    /// The header is left out.
    Drop,
}

/// HTTP/1 settings.
#[derive(Debug, Clone, Default)]
pub struct Http1 {
    /// Take HTTP/1.0, instead of answering 426.
    pub accept_http_10: bool,
    /// The authority of an HTTP/1.0 request without one.
    pub default_host_for_http_10: Option<HeaderValue>,
    /// Send and take trailers.
    pub enable_trailers: bool,
    /// Write header names as Proper-Case words.
    pub proper_case: bool,
}

/// HTTP/2 settings.
#[derive(Debug, Clone)]
pub struct Http2 {
    /// Streams at once on one connection.
    pub max_concurrent_streams: u32,
    /// Flow-control window of a stream, in bytes.
    pub initial_stream_window: u32,
    /// Flow-control window of a connection, in bytes.
    pub initial_connection_window: u32,
    /// Pings: how often, and how long for an answer.
    pub keepalive: Option<(Duration, Duration)>,
    /// Take extended CONNECT, by which WebSockets come over HTTP/2 (RFC 8441). What a server takes that we send
    /// requests to, its own settings tell.
    pub allow_connect: bool,
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            max_concurrent_streams: 1024,
            initial_stream_window: 16 << 20,
            initial_connection_window: 24 << 20,
            keepalive: None,
            allow_connect: false,
        }
    }
}

impl HttpConnectionManager {
    pub(super) fn new(pb: pb::HttpConnectionManager, names: &mut Names) -> Result<Self, Invalid> {
        refuse_unsupported(&pb)?;
        let codec = match pb.codec_type {
            0 => Codec::Auto,
            1 => Codec::Http1,
            2 => Codec::Http2,
            3 => return Err(Invalid::unsupported("codec_type")),
            other => return Err(Invalid::new("codec_type", format!("unknown value {other}"))),
        };
        let server_header = match pb.server_header_transformation {
            0 => ServerHeader::Overwrite,
            1 => ServerHeader::AppendIfAbsent,
            2 => ServerHeader::PassThrough,
            other => {
                return Err(Invalid::new("server_header_transformation", format!("unknown value {other}")));
            }
        };
        let common = pb.common_http_protocol_options.unwrap_or_default();
        let underscores = match common.headers_with_underscores_action {
            0 => Underscores::Allow,
            1 => Underscores::Reject,
            2 => Underscores::Drop,
            other => {
                let field = "common_http_protocol_options.headers_with_underscores_action";
                return Err(Invalid::new(field, format!("unknown value {other}")));
            }
        };
        let server_name = if pb.server_name.is_empty() { "envoy" } else { &pb.server_name };
        Ok(Self {
            codec,
            server_name: header_value(server_name, "server_name")?,
            server_header,
            via: if pb.via.is_empty() { None } else { Some(header_value(&pb.via, "via")?) },
            client: ClientAddress {
                use_remote_address: bool_or(pb.use_remote_address, false),
                xff_num_trusted_hops: pb.xff_num_trusted_hops,
                skip_xff_append: pb.skip_xff_append,
            },
            request_id: RequestId {
                generate: bool_or(pb.generate_request_id, true),
                preserve_external: pb.preserve_external_request_id,
                in_response: pb.always_set_request_id_in_response,
            },
            client_cert: client_cert(&pb)?,
            path: path_cleaning(&pb)?,
            strip_port: match pb.strip_port_mode {
                Some(pb::http_connection_manager::StripPortMode::StripAnyHostPort(true)) => StripPort::Any,
                _ if pb.strip_matching_host_port => StripPort::Matching,
                _ => StripPort::Never,
            },
            timeouts: timeouts(&pb, &common)?,
            max_request_headers: max_headers(pb.max_request_headers_kb.map(|n| n.value))?,
            max_headers_count: u32_or(common.max_headers_count, 100).clamp(1, MAX_HEADERS),
            max_requests_per_connection: common
                .max_requests_per_connection
                .map(|n| n.value)
                .filter(|n| *n > 0),
            underscores,
            http1: pb
                .http_protocol_options
                .map(http1)
                .transpose()
                .under("http_protocol_options")?
                .unwrap_or_default(),
            http2: pb
                .http2_protocol_options
                .map(http2)
                .transpose()
                .under("http2_protocol_options")?
                .unwrap_or_default(),
            scheme_overwrite: scheme(pb.scheme_header_transformation)?,
            append_x_forwarded_port: pb.append_x_forwarded_port,
            upgrades: upgrades(pb.upgrade_configs)?,
            routes: routes(pb.route_specifier, names)?,
            filters: http_filters(pb.http_filters)?,
            access_logs: access_logs(pb.access_log)?.into(),
            stat_prefix: pb.stat_prefix.into(),
        })
    }
}

/// The codec makes room for as many headers as it may read, so no configuration may ask for the whole memory.
const MAX_HEADERS: u32 = 4096;

fn refuse_unsupported(pb: &pb::HttpConnectionManager) -> Result<(), Invalid> {
    // `proxy_100_continue` asks to leave the 100 to the server: the HTTP library answers it when the body is first
    // asked for, which is when the server has taken the request.
    // Tracing without a provider changes nothing but headers; with one, spans would be missed.
    let tracing = pb.tracing.as_ref().is_some_and(|t| t.provider.is_some());
    let local_reply = pb.local_reply_config.as_ref();
    let stream_duration = pb.common_http_protocol_options.as_ref().and_then(|o| o.max_stream_duration);
    let stream_duration = stream_duration.is_some_and(|d| d.seconds != 0 || d.nanos != 0);
    for (set, field) in [
        (tracing, "tracing.provider"),
        (local_reply.is_some_and(|l| !l.mappers.is_empty() || l.body_format.is_some()), "local_reply_config"),
        (!pb.original_ip_detection_extensions.is_empty(), "original_ip_detection_extensions"),
        (!pb.early_header_mutation_extensions.is_empty(), "early_header_mutation_extensions"),
        (pb.forward_client_cert_matcher.is_some(), "forward_client_cert_matcher"),
        (pb.typed_header_validation_config.is_some(), "typed_header_validation_config"),
        (pb.proxy_status_config.is_some(), "proxy_status_config"),
        (pb.path_normalization_options.is_some(), "path_normalization_options"),
        (pb.forward_proto_config.is_some(), "forward_proto_config"),
        (bool_or(pb.add_user_agent, false), "add_user_agent"),
        (stream_duration, "common_http_protocol_options.max_stream_duration"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    Ok(())
}

fn routes(
    pb: Option<pb::http_connection_manager::RouteSpecifier>,
    names: &mut Names,
) -> Result<RouteSource, Invalid> {
    use pb::http_connection_manager::RouteSpecifier as Pb;
    match pb {
        None => Err(Invalid::missing("route_specifier")),
        Some(Pb::ScopedRoutes(_)) => Err(Invalid::unsupported("scoped_routes")),
        Some(Pb::RouteConfig(r)) => {
            let routes = RouteConfiguration::new(r).under("route_config")?;
            Ok(RouteSource::Inline(Arc::new(routes)))
        }
        Some(Pb::Rds(rds)) => {
            if rds.route_config_name.is_empty() {
                return Err(Invalid::missing("rds.route_config_name"));
            }
            let fetch_timeout = ads_only(rds.config_source, "rds.config_source")?;
            Ok(RouteSource::Rds(names.rds(&rds.route_config_name, fetch_timeout)))
        }
    }
}

fn client_cert(pb: &pb::HttpConnectionManager) -> Result<ClientCert, Invalid> {
    let forward = match pb.forward_client_cert_details {
        0 => ForwardClientCert::Sanitize,
        1 => ForwardClientCert::ForwardOnly,
        2 => ForwardClientCert::AppendForward,
        3 => ForwardClientCert::SanitizeSet,
        4 => ForwardClientCert::AlwaysForwardOnly,
        other => return Err(Invalid::new("forward_client_cert_details", format!("unknown value {other}"))),
    };
    let details = pb.set_current_client_cert_details.unwrap_or_default();
    if details.issuer || details.format != 0 {
        return Err(Invalid::unsupported("set_current_client_cert_details"));
    }
    let subject = bool_or(details.subject, false);
    Ok(ClientCert {
        forward,
        subject,
        cert: details.cert,
        chain: details.chain,
        dns: details.dns,
        uri: details.uri,
    })
}

fn path_cleaning(pb: &pb::HttpConnectionManager) -> Result<PathCleaning, Invalid> {
    let escaped_slashes = match pb.path_with_escaped_slashes_action {
        0 | 1 => EscapedSlashes::Keep,
        2 => EscapedSlashes::Reject,
        3 => EscapedSlashes::UnescapeAndRedirect,
        4 => EscapedSlashes::UnescapeAndForward,
        other => {
            return Err(Invalid::new("path_with_escaped_slashes_action", format!("unknown value {other}")));
        }
    };
    Ok(PathCleaning {
        normalize: bool_or(pb.normalize_path, false),
        merge_slashes: pb.merge_slashes,
        escaped_slashes,
    })
}

fn timeouts(pb: &pb::HttpConnectionManager, common: &core::HttpProtocolOptions) -> Result<Timeouts, Invalid> {
    let secs = |n| Some(Duration::from_secs(n));
    let field = "common_http_protocol_options";
    Ok(Timeouts {
        idle: timeout(common.idle_timeout, secs(3600), "idle_timeout").under(field)?,
        stream_idle: timeout(pb.stream_idle_timeout, secs(300), "stream_idle_timeout")?,
        request: timeout(pb.request_timeout, None, "request_timeout")?,
        request_headers: timeout(pb.request_headers_timeout, None, "request_headers_timeout")?,
        max_connection_duration: timeout(common.max_connection_duration, None, "max_connection_duration")
            .under(field)?,
        drain: opt_duration(pb.drain_timeout, "drain_timeout")?.unwrap_or(Duration::from_secs(5)),
        delayed_close: timeout(pb.delayed_close_timeout, secs(1), "delayed_close_timeout")?,
    })
}

fn max_headers(kb: Option<u32>) -> Result<usize, Invalid> {
    let kb = kb.unwrap_or(60);
    if kb == 0 || kb > 8192 {
        return Err(Invalid::new("max_request_headers_kb", format!("{kb} is not from 1 to 8192")));
    }
    usize::try_from(kb)
        .map(|kb| kb * 1024)
        .map_err(|_| Invalid::new("max_request_headers_kb", "is too large"))
}

fn upgrades(pb: Vec<pb::http_connection_manager::UpgradeConfig>) -> Result<Upgrades, Invalid> {
    pb.into_iter()
        .enumerate()
        .map(|(i, u)| {
            if !u.filters.is_empty() {
                return Err(Invalid::unsupported(format!("upgrade_configs[{i}].filters")));
            }
            Ok((u.upgrade_type.to_ascii_lowercase().into(), bool_or(u.enabled, true)))
        })
        .collect()
}

fn scheme(pb: Option<core::SchemeHeaderTransformation>) -> Result<Option<http::uri::Scheme>, Invalid> {
    use core::scheme_header_transformation::Transformation::SchemeToOverwrite;
    let Some(pb) = pb else { return Ok(None) };
    let field = "scheme_header_transformation";
    if pb.match_upstream {
        return Err(Invalid::unsupported(format!("{field}.match_upstream")));
    }
    let Some(SchemeToOverwrite(s)) = pb.transformation else { return Ok(None) };
    s.parse().map(Some).map_err(|_| Invalid::new(field, format!("`{s}` is not a scheme")))
}

/// HTTP/1 settings.
///
/// # Errors
///
/// Settings this proxy does not carry out.
pub fn http1(pb: core::Http1ProtocolOptions) -> Result<Http1, Invalid> {
    use core::http1_protocol_options::header_key_format::HeaderFormat;
    for (set, field) in [
        (pb.allow_chunked_length, "allow_chunked_length"),
        (pb.send_fully_qualified_url, "send_fully_qualified_url"),
        (pb.allow_custom_methods, "allow_custom_methods"),
        (!pb.ignore_http_11_upgrade.is_empty(), "ignore_http_11_upgrade"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    let proper_case = match pb.header_key_format.and_then(|f| f.header_format) {
        None => false,
        Some(HeaderFormat::ProperCaseWords(_)) => true,
        Some(HeaderFormat::StatefulFormatter(_)) => {
            return Err(Invalid::unsupported("header_key_format.stateful_formatter"));
        }
    };
    let host = &pb.default_host_for_http_10;
    Ok(Http1 {
        accept_http_10: pb.accept_http_10,
        default_host_for_http_10: if host.is_empty() {
            None
        } else {
            Some(header_value(host, "default_host_for_http_10")?)
        },
        enable_trailers: pb.enable_trailers,
        proper_case,
    })
}

/// HTTP/2 settings. Limits on single kinds of frames are the HTTP library's own.
///
/// # Errors
///
/// Settings this proxy does not carry out, or windows outside of RFC 9113, section 6.9.2.
pub fn http2(pb: core::Http2ProtocolOptions) -> Result<Http2, Invalid> {
    if pb.allow_metadata {
        return Err(Invalid::unsupported("allow_metadata"));
    }
    if !pb.custom_settings_parameters.is_empty() {
        return Err(Invalid::unsupported("custom_settings_parameters"));
    }
    let default = Http2::default();
    let window = |n: Option<envoy_types::pb::google::protobuf::UInt32Value>, default: u32, field: &str| {
        let n = u32_or(n, default);
        if (65_535..=0x7fff_ffff).contains(&n) {
            Ok(n)
        } else {
            Err(Invalid::new(field, format!("{n} is not from 65535 to 2147483647")))
        }
    };
    let keepalive = match pb.connection_keepalive {
        None => None,
        Some(k) => {
            let interval = opt_duration(k.interval, "connection_keepalive.interval")?;
            let timeout = opt_duration(k.timeout, "connection_keepalive.timeout")?;
            interval.zip(timeout)
        }
    };
    Ok(Http2 {
        max_concurrent_streams: u32_or(pb.max_concurrent_streams, default.max_concurrent_streams).max(1),
        initial_stream_window: window(
            pb.initial_stream_window_size,
            default.initial_stream_window,
            "initial_stream_window_size",
        )?,
        initial_connection_window: window(
            pb.initial_connection_window_size,
            default.initial_connection_window,
            "initial_connection_window_size",
        )?,
        keepalive,
        allow_connect: pb.allow_connect,
    })
}
