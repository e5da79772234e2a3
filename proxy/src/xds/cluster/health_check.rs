//! Active health checks of a cluster, from their proto, validated once.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::core::v3::health_check as pb;
use envoy_types::pb::envoy::r#type::v3::Int64Range;
use envoy_types::pb::google::protobuf::UInt32Value;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::xds::decode::{Invalid, Under as _, bool_or, header_name, header_value, opt_duration, port};

/// How and when endpoints are asked whether they serve.
#[derive(Debug, Clone)]
pub struct HealthCheck {
    /// How long one check may take.
    pub timeout: Duration,
    /// How long after a check the next one begins.
    pub pace: Pace,
    /// Failures in a row until an endpoint is out. An answer that says so itself needs only one.
    pub unhealthy_threshold: u32,
    /// Successes in a row until it is in again.
    pub healthy_threshold: u32,
    /// Where all endpoints are checked, unless they say otherwise.
    pub port: Option<u16>,
    /// One connection serves all checks of an endpoint.
    pub reuse_connection: bool,
    /// What is asked.
    pub kind: CheckKind,
}

/// How long after a check the next one begins.
#[derive(Debug, Clone)]
pub struct Pace {
    /// After a success.
    pub healthy: Duration,
    /// After a success of an endpoint that stays out until there are more.
    pub healthy_edge: Duration,
    /// After a failure.
    pub unhealthy: Duration,
    /// After a failure of an endpoint that stays in until there are more.
    pub unhealthy_edge: Duration,
    /// After a success in a cluster that never had a connection.
    pub no_traffic_healthy: Duration,
    /// After any other result in such a cluster.
    pub no_traffic: Duration,
    /// Before the first check, up to this by chance.
    pub initial_jitter: Duration,
    /// Up to this more by chance.
    pub jitter: Duration,
    /// Up to this share more by chance, in percent.
    pub jitter_percent: u32,
}

/// What is asked.
#[derive(Debug, Clone)]
pub enum CheckKind {
    /// A request whose status tells.
    Http(HttpCheck),
    /// A connection, and bytes if there are any.
    Tcp {
        /// What is sent.
        send: Bytes,
        /// What must come back, in this order.
        receive: Box<[Bytes]>,
    },
    /// `grpc.health.v1.Health.Check`
    Grpc {
        /// The service that is asked for; empty: the server as a whole.
        service: Box<str>,
        /// Authority, if not the cluster's name.
        authority: Option<HeaderValue>,
        /// Headers of the request.
        headers: HeaderMap,
    },
}

/// A request whose status tells.
#[derive(Debug, Clone)]
pub struct HttpCheck {
    /// Host, if not the cluster's name.
    pub host: Option<HeaderValue>,
    /// Path and query.
    pub path: http::uri::PathAndQuery,
    /// Method.
    pub method: Method,
    /// Headers that come, each set.
    pub add: HeaderMap,
    /// Headers that go.
    pub remove: Box<[HeaderName]>,
    /// Statuses of health.
    pub expected: Box<[Range<i64>]>,
    /// Other statuses that do not put an endpoint out at once.
    pub retriable: Box<[Range<i64>]>,
    /// Over HTTP/2.
    pub h2: bool,
}

impl HealthCheck {
    /// Whether it asks by gRPC.
    #[must_use]
    pub fn is_grpc(&self) -> bool {
        matches!(self.kind, CheckKind::Grpc { .. })
    }

    pub(super) fn new(pb: core::HealthCheck) -> Result<Self, Invalid> {
        refuse_unsupported(&pb)?;
        let timeout = required(pb.timeout, "timeout")?;
        let port = pb.alt_port.map(|p| port(p.value, "alt_port")).transpose()?;
        Ok(Self {
            timeout,
            unhealthy_threshold: at_least_one(pb.unhealthy_threshold, "unhealthy_threshold")?,
            healthy_threshold: at_least_one(pb.healthy_threshold, "healthy_threshold")?,
            port,
            reuse_connection: bool_or(pb.reuse_connection, true),
            pace: pace(&pb)?,
            kind: match pb.health_checker {
                None => return Err(Invalid::missing("health_checker")),
                Some(pb::HealthChecker::HttpHealthCheck(h)) => {
                    CheckKind::Http(http(h).under("http_health_check")?)
                }
                Some(pb::HealthChecker::TcpHealthCheck(t)) => tcp(t).under("tcp_health_check")?,
                Some(pb::HealthChecker::GrpcHealthCheck(g)) => grpc(g, timeout).under("grpc_health_check")?,
                Some(pb::HealthChecker::CustomHealthCheck(_)) => {
                    return Err(Invalid::unsupported("custom_health_check"));
                }
            },
        })
    }
}

fn refuse_unsupported(pb: &core::HealthCheck) -> Result<(), Invalid> {
    for (set, field) in [
        (!pb.event_logger.is_empty(), "event_logger"),
        (pb.event_service.is_some(), "event_service"),
        (pb.tls_options.is_some(), "tls_options"),
        (pb.transport_socket_match_criteria.is_some(), "transport_socket_match_criteria"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    #[expect(deprecated, reason = "configuration may still use it")]
    let logs = !pb.event_log_path.is_empty();
    if logs { Err(Invalid::unsupported("event_log_path")) } else { Ok(()) }
}

fn at_least_one(n: Option<UInt32Value>, field: &str) -> Result<u32, Invalid> {
    match n.ok_or_else(|| Invalid::missing(field))?.value {
        0 => Err(Invalid::new(field, "must be more than 0")),
        n => Ok(n),
    }
}

type PbDuration = Option<envoy_types::pb::google::protobuf::Duration>;

fn required(pb: PbDuration, field: &str) -> Result<Duration, Invalid> {
    positive(pb, field)?.ok_or_else(|| Invalid::missing(field))
}

fn positive(pb: PbDuration, field: &str) -> Result<Option<Duration>, Invalid> {
    match opt_duration(pb, field)? {
        Some(d) if d.is_zero() => Err(Invalid::new(field, "must be more than 0")),
        other => Ok(other),
    }
}

fn pace(pb: &core::HealthCheck) -> Result<Pace, Invalid> {
    let healthy = required(pb.interval, "interval")?;
    let unhealthy = positive(pb.unhealthy_interval, "unhealthy_interval")?.unwrap_or(healthy);
    let minute = Duration::from_secs(60);
    let no_traffic = positive(pb.no_traffic_interval, "no_traffic_interval")?.unwrap_or(minute);
    let field = "no_traffic_healthy_interval";
    Ok(Pace {
        healthy,
        healthy_edge: positive(pb.healthy_edge_interval, "healthy_edge_interval")?.unwrap_or(healthy),
        unhealthy,
        unhealthy_edge: positive(pb.unhealthy_edge_interval, "unhealthy_edge_interval")?.unwrap_or(unhealthy),
        no_traffic_healthy: positive(pb.no_traffic_healthy_interval, field)?.unwrap_or(no_traffic),
        no_traffic,
        initial_jitter: opt_duration(pb.initial_jitter, "initial_jitter")?.unwrap_or_default(),
        jitter: opt_duration(pb.interval_jitter, "interval_jitter")?.unwrap_or_default(),
        jitter_percent: pb.interval_jitter_percent.min(100),
    })
}

fn http(pb: pb::HttpHealthCheck) -> Result<HttpCheck, Invalid> {
    if pb.send.is_some() {
        return Err(Invalid::unsupported("send"));
    }
    if !pb.receive.is_empty() {
        return Err(Invalid::unsupported("receive"));
    }
    if pb.service_name_matcher.is_some() {
        return Err(Invalid::unsupported("service_name_matcher"));
    }
    let method = match core::RequestMethod::try_from(pb.method) {
        Ok(core::RequestMethod::MethodUnspecified) => Method::GET,
        Ok(core::RequestMethod::Connect) => return Err(Invalid::unsupported("method")),
        Ok(m) => Method::from_bytes(m.as_str_name().as_bytes())
            .map_err(|_| Invalid::new("method", "is not a method"))?,
        Err(_) => return Err(Invalid::new("method", format!("unknown value {}", pb.method))),
    };
    let path = &pb.path;
    let remove = pb.request_headers_to_remove.iter();
    let only_200 = 200..201;
    let expected = ranges(pb.expected_statuses).under("expected_statuses")?;
    Ok(HttpCheck {
        host: host(&pb.host, "host")?,
        path: path.parse().map_err(|_| Invalid::new("path", format!("`{path}` is not a path")))?,
        method,
        add: headers(pb.request_headers_to_add, "request_headers_to_add")?,
        remove: remove.map(|n| header_name(n, "request_headers_to_remove")).collect::<Result<_, _>>()?,
        expected: if expected.is_empty() { Box::new([only_200]) } else { expected },
        retriable: ranges(pb.retriable_statuses).under("retriable_statuses")?,
        h2: match pb.codec_client_type {
            0 => false,
            1 => true,
            _ => return Err(Invalid::unsupported("codec_client_type")),
        },
    })
}

fn host(text: &str, field: &str) -> Result<Option<HeaderValue>, Invalid> {
    (!text.is_empty()).then(|| header_value(text, field)).transpose()
}

fn ranges(pb: Vec<Int64Range>) -> Result<Box<[Range<i64>]>, Invalid> {
    let range = |(i, r): (usize, Int64Range)| {
        if r.start < 100 || r.end > 600 || r.start >= r.end {
            let reason = format!("[{}, {}) is no range of statuses from 100 to 599", r.start, r.end);
            return Err(Invalid::new(format!("[{i}]"), reason));
        }
        Ok(r.start..r.end)
    };
    pb.into_iter().enumerate().map(range).collect()
}

fn headers(pb: Vec<core::HeaderValueOption>, field: &str) -> Result<HeaderMap, Invalid> {
    let mut map = HeaderMap::new();
    for header in pb.into_iter().filter_map(|h| h.header) {
        if header.value.contains('%') {
            return Err(Invalid::unsupported(format!("{field}: a value that is made from the check")));
        }
        map.append(header_name(&header.key, field)?, header_value(&header.value, field)?);
    }
    Ok(map)
}

fn tcp(pb: pb::TcpHealthCheck) -> Result<CheckKind, Invalid> {
    if pb.proxy_protocol_config.is_some() {
        return Err(Invalid::unsupported("proxy_protocol_config"));
    }
    let send = pb.send.map(payload).transpose().under("send")?.unwrap_or_default();
    let receive = pb.receive.into_iter().map(payload).collect::<Result<_, _>>().under("receive")?;
    Ok(CheckKind::Tcp { send, receive })
}

/// Bytes, given as they are or as hexadecimal text.
fn payload(pb: pb::Payload) -> Result<Bytes, Invalid> {
    match pb.payload {
        Some(pb::payload::Payload::Binary(bytes)) if !bytes.is_empty() => Ok(bytes.into()),
        Some(pb::payload::Payload::Text(text)) if !text.is_empty() => {
            let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
            let pair = |p: &[u8]| match p {
                [a, b] => Some(digit(*a)? << 4 | digit(*b)?),
                _ => None,
            };
            let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
            bytes.map(Bytes::from).ok_or_else(|| Invalid::new("text", format!("`{text}` is not hexadecimal")))
        }
        _ => Err(Invalid::missing("payload")),
    }
}

fn grpc(pb: pb::GrpcHealthCheck, timeout: Duration) -> Result<CheckKind, Invalid> {
    let mut headers = headers(pb.initial_metadata, "initial_metadata")?;
    // at most eight digits
    let ms = timeout.as_millis();
    let told = if ms < 100_000_000 { format!("{ms}m") } else { format!("{}S", timeout.as_secs()) };
    headers.insert("grpc-timeout", header_value(&told, "timeout")?);
    Ok(CheckKind::Grpc {
        service: pb.service_name.into(),
        authority: host(&pb.authority, "authority")?,
        headers,
    })
}
