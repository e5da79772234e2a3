//! What lies between a connection's bytes and HTTP or TCP.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;

use crate::xds::decode::{Invalid, Under as _, is, unpack};
use crate::xds::proxy_protocol::ProxyProtocol;
use crate::xds::tls::{UpstreamTls, upstream};

/// How connections to endpoints begin.
#[derive(Debug, Clone, Default)]
pub struct Transport {
    /// The header that tells who called, before anything else.
    pub proxy_protocol: Option<Arc<ProxyProtocol>>,
    /// TLS; `None`: plain text.
    pub tls: Option<Arc<UpstreamTls>>,
}

impl Transport {
    /// Whether this is the very same, so that connections of either are good for both.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        fn same<T>(a: Option<&Arc<T>>, b: Option<&Arc<T>>) -> bool {
            a.map(Arc::as_ptr) == b.map(Arc::as_ptr)
        }
        same(self.tls.as_ref(), other.tls.as_ref())
            && same(self.proxy_protocol.as_ref(), other.proxy_protocol.as_ref())
    }
}

/// The transport of a transport socket.
///
/// # Errors
///
/// A kind of socket that this proxy does not have, or one with wrong settings.
pub(super) fn transport(pb: Option<core::TransportSocket>) -> Result<Transport, Invalid> {
    let Some(core::transport_socket::ConfigType::TypedConfig(any)) =
        pb.as_ref().and_then(|socket| socket.config_type.as_ref())
    else {
        return Ok(Transport { proxy_protocol: None, tls: upstream(pb)? });
    };
    if !is::<ProxyProtocolUpstreamTransport>(any) {
        return Ok(Transport { proxy_protocol: None, tls: upstream(pb)? });
    }
    let outer: ProxyProtocolUpstreamTransport = unpack(any).under("typed_config")?;
    if outer.transport_socket.is_none() {
        return Err(Invalid::missing("typed_config.transport_socket"));
    }
    if outer.allow_unspecified_address || outer.tlv_as_pool_key {
        return Err(Invalid::unsupported("typed_config.allow_unspecified_address or tlv_as_pool_key"));
    }
    let settings = outer.config.unwrap_or_default();
    Ok(Transport {
        proxy_protocol: Some(Arc::new(ProxyProtocol::new(settings).under("typed_config.config")?)),
        tls: upstream(outer.transport_socket).under("typed_config.transport_socket")?,
    })
}
