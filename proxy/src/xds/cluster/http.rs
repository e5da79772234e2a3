//! HTTP towards the endpoints.

use std::collections::BTreeMap;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as http_pb;

use crate::xds::decode::{Invalid, Under as _, is, timeout, unpack};
use crate::xds::listener::hcm::{Http1, Http2, http1, http2};

/// Which version of HTTP upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/1
    Http1,
    /// HTTP/2, with prior knowledge on plain connections.
    Http2,
    /// The version that the client speaks.
    Downstream,
    /// By ALPN.
    Alpn,
}

/// HTTP towards the endpoints.
#[derive(Debug, Clone)]
pub struct UpstreamHttp {
    /// Which version.
    pub version: HttpVersion,
    /// HTTP/1 settings.
    pub http1: Http1,
    /// HTTP/2 settings.
    pub http2: Http2,
    /// How long a connection may be without requests; `None`: for ever.
    pub idle_timeout: Option<Duration>,
    /// The life of a connection: an older one gets no more requests.
    pub max_connection_duration: Option<Duration>,
    /// The most requests on one connection.
    pub max_requests_per_connection: Option<u32>,
    /// The server name is the request's authority.
    pub auto_sni: bool,
    /// The certificate must be for the request's authority.
    pub auto_san_validation: bool,
}

const EXTENSION: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

pub(super) fn upstream_http(pb: &mut pb::Cluster) -> Result<UpstreamHttp, Invalid> {
    let mut options = None;
    let sorted: BTreeMap<_, _> =
        std::mem::take(&mut pb.typed_extension_protocol_options).into_iter().collect();
    for (name, any) in sorted {
        if name != EXTENSION || !is::<http_pb::HttpProtocolOptions>(&any) {
            return Err(Invalid::unsupported(format!("typed_extension_protocol_options[{name}]")));
        }
        options = Some(unpack::<http_pb::HttpProtocolOptions>(&any));
    }
    let field = "typed_extension_protocol_options";
    match options.transpose().under(field)? {
        Some(options) => from_extension(options).under(field),
        None => from_cluster(pb),
    }
}

fn base() -> UpstreamHttp {
    UpstreamHttp {
        version: HttpVersion::Http1,
        http1: Http1::default(),
        http2: Http2::default(),
        idle_timeout: Some(Duration::from_secs(3600)),
        max_connection_duration: None,
        max_requests_per_connection: None,
        auto_sni: false,
        auto_san_validation: false,
    }
}

fn from_extension(pb: http_pb::HttpProtocolOptions) -> Result<UpstreamHttp, Invalid> {
    use http_pb::http_protocol_options::UpstreamProtocolOptions as Pb;
    use http_pb::http_protocol_options::explicit_http_config::ProtocolConfig;
    let codec = "envoy.filters.http.upstream_codec";
    for (set, field) in [
        (pb.http_filters.iter().any(|f| f.name != codec && !f.is_optional), "http_filters"),
        (pb.header_validation_config.is_some(), "header_validation_config"),
        (pb.outlier_detection.is_some(), "outlier_detection"),
        (!pb.request_mirror_policies.is_empty(), "request_mirror_policies"),
        (!pb.hash_policy.is_empty(), "hash_policy"),
        (pb.retry_policy.is_some(), "retry_policy"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    let (version, h1, h2) = match pb.upstream_protocol_options {
        None => return Err(Invalid::missing("upstream_protocol_options")),
        Some(Pb::ExplicitHttpConfig(e)) => match e.protocol_config {
            Some(ProtocolConfig::HttpProtocolOptions(o)) => (HttpVersion::Http1, Some(o), None),
            Some(ProtocolConfig::Http2ProtocolOptions(o)) => (HttpVersion::Http2, None, Some(o)),
            Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                return Err(Invalid::unsupported("explicit_http_config.http3_protocol_options"));
            }
            None => return Err(Invalid::missing("explicit_http_config.protocol_config")),
        },
        Some(Pb::UseDownstreamProtocolConfig(o)) => {
            (HttpVersion::Downstream, o.http_protocol_options, o.http2_protocol_options)
        }
        Some(Pb::AutoConfig(o)) => {
            if o.http3_protocol_options.is_some() {
                return Err(Invalid::unsupported("auto_config.http3_protocol_options"));
            }
            (HttpVersion::Alpn, o.http_protocol_options, o.http2_protocol_options)
        }
    };
    let mut http = base();
    http.version = version;
    http.http1 = h1.map(http1).transpose().under("http_protocol_options")?.unwrap_or_default();
    http.http2 = h2.map(http2).transpose().under("http2_protocol_options")?.unwrap_or_default();
    if let Some(common) = pb.common_http_protocol_options {
        http.common(&common).under("common_http_protocol_options")?;
    }
    if let Some(upstream) = pb.upstream_http_protocol_options {
        if !upstream.override_auto_sni_header.is_empty() {
            return Err(Invalid::unsupported("upstream_http_protocol_options.override_auto_sni_header"));
        }
        http.auto_sni = upstream.auto_sni;
        http.auto_san_validation = upstream.auto_san_validation;
    }
    Ok(http)
}

/// The older form: fields of the cluster itself.
#[expect(deprecated, reason = "configuration files still use it")]
fn from_cluster(pb: &mut pb::Cluster) -> Result<UpstreamHttp, Invalid> {
    let mut http = base();
    if pb.protocol_selection != 0 {
        http.version = HttpVersion::Downstream;
    } else if pb.http2_protocol_options.is_some() {
        http.version = HttpVersion::Http2;
    }
    if let Some(o) = pb.http_protocol_options.take() {
        http.http1 = http1(o).under("http_protocol_options")?;
    }
    if let Some(o) = pb.http2_protocol_options.take() {
        http.http2 = http2(o).under("http2_protocol_options")?;
    }
    if let Some(common) = pb.common_http_protocol_options.take() {
        http.common(&common).under("common_http_protocol_options")?;
    }
    http.max_requests_per_connection = http
        .max_requests_per_connection
        .or(pb.max_requests_per_connection.map(|n| n.value).filter(|n| *n > 0));
    if let Some(upstream) = pb.upstream_http_protocol_options.take() {
        http.auto_sni = upstream.auto_sni;
        http.auto_san_validation = upstream.auto_san_validation;
    }
    Ok(http)
}

impl UpstreamHttp {
    fn common(
        &mut self,
        pb: &envoy_types::pb::envoy::config::core::v3::HttpProtocolOptions,
    ) -> Result<(), Invalid> {
        self.idle_timeout = timeout(pb.idle_timeout, self.idle_timeout, "idle_timeout")?;
        self.max_connection_duration = timeout(pb.max_connection_duration, None, "max_connection_duration")?;
        self.max_requests_per_connection = pb.max_requests_per_connection.map(|n| n.value).filter(|n| *n > 0);
        Ok(())
    }
}
