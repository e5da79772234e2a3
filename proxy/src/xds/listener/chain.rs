//! Filter chains: which connections, over which transport, and what is done with them.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network as filter;
use envoy_types::pb::google::protobuf::Any;
use ipnet::IpNet;

use super::Names;
use super::hcm::HttpConnectionManager;
use super::tcp::TcpProxy;
use crate::xds::decode::{Invalid, Metadata, Under as _, bool_or, cidrs, is, port, timeout, unpack};
use crate::xds::rbac::Rbac;
use crate::xds::tls::{DownstreamTls, downstream};

/// One chain.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name, empty if it has none.
    pub name: Arc<str>,
    /// Which connections.
    pub matches: FilterChainMatch,
    /// TLS; `None`: plain text.
    pub tls: Option<Arc<DownstreamTls>>,
    /// How long the TLS handshake may take; `None`: for ever.
    pub handshake_timeout: Option<Duration>,
    /// Rules that are asked first, in order.
    pub rbac: Box<[Arc<Rbac>]>,
    /// What is done with the connection.
    pub terminal: Terminal,
    /// Free-form data.
    pub metadata: Metadata,
}

/// What is done with a connection.
#[derive(Debug, Clone)]
pub enum Terminal {
    /// HTTP.
    Http(Arc<HttpConnectionManager>),
    /// Bytes.
    Tcp(Arc<TcpProxy>),
    /// It is closed: a chain without filters.
    Close,
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourceType {
    /// Anywhere.
    #[default]
    Any,
    /// This machine.
    SameIpOrLoopback,
    /// Another machine.
    External,
}

/// Which connections. Empty lists and `None` ask for nothing.
///
/// Envoy's order: destination port, then destination address (longest prefix), then server name (exact, then
/// longest `*.` suffix), transport protocol, application protocol, directly connected source address, source
/// type, source address, source port. The best match in each step is kept, and there is no going back.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FilterChainMatch {
    /// Destination port.
    pub destination_port: Option<u16>,
    /// Destination address.
    pub prefix_ranges: Box<[IpNet]>,
    /// Server names in lower case: whole, or with a leading `*.`.
    pub server_names: Box<[Box<str>]>,
    /// `tls` or `raw_buffer`; empty: either.
    pub transport_protocol: Box<str>,
    /// Application protocols, from TLS or seen in the first bytes.
    pub application_protocols: Box<[Box<str>]>,
    /// Address of the connection's other end.
    pub direct_source_prefix_ranges: Box<[IpNet]>,
    /// Where from.
    pub source_type: SourceType,
    /// Source address, as the PROXY protocol may have set it.
    pub source_prefix_ranges: Box<[IpNet]>,
    /// Source ports.
    pub source_ports: Box<[u16]>,
}

impl FilterChainMatch {
    fn new(pb: pb::FilterChainMatch) -> Result<Self, Invalid> {
        if !pb.address_suffix.is_empty() || pb.suffix_len.is_some() {
            return Err(Invalid::unsupported("address_suffix"));
        }
        let server_names = pb
            .server_names
            .into_iter()
            .map(|n| match n.strip_prefix("*.").unwrap_or(&n) {
                "" => Err(Invalid::new("server_names", format!("`{n}` is not a name"))),
                rest if rest.contains('*') => {
                    Err(Invalid::new("server_names", format!("`{n}`: only a leading `*.` is a wildcard")))
                }
                _ => Ok(n.to_ascii_lowercase().into_boxed_str()),
            })
            .collect::<Result<_, _>>()?;
        let source_type = match pb.source_type {
            0 => SourceType::Any,
            1 => SourceType::SameIpOrLoopback,
            2 => SourceType::External,
            other => return Err(Invalid::new("source_type", format!("unknown value {other}"))),
        };
        Ok(Self {
            destination_port: pb.destination_port.map(|p| port(p.value, "destination_port")).transpose()?,
            prefix_ranges: cidrs(&pb.prefix_ranges, "prefix_ranges")?,
            server_names,
            transport_protocol: pb.transport_protocol.into(),
            application_protocols: pb.application_protocols.into_iter().map(Into::into).collect(),
            direct_source_prefix_ranges: cidrs(
                &pb.direct_source_prefix_ranges,
                "direct_source_prefix_ranges",
            )?,
            source_type,
            source_prefix_ranges: cidrs(&pb.source_prefix_ranges, "source_prefix_ranges")?,
            source_ports: pb
                .source_ports
                .into_iter()
                .map(|p| port(p, "source_ports"))
                .collect::<Result<_, _>>()?,
        })
    }
}

pub(super) fn filter_chain(pb: pb::FilterChain, names: &mut Names) -> Result<FilterChain, Invalid> {
    #[expect(deprecated, reason = "refused")]
    let proxy_protocol = bool_or(pb.use_proxy_proto, false);
    if proxy_protocol {
        return Err(Invalid::new("use_proxy_proto", "use the proxy_protocol listener filter"));
    }
    let matches =
        FilterChainMatch::new(pb.filter_chain_match.unwrap_or_default()).under("filter_chain_match")?;
    let tls = downstream(pb.transport_socket).under("transport_socket")?;
    let mut rbac = Vec::new();
    let mut terminal = Terminal::Close;
    for (i, f) in pb.filters.into_iter().enumerate() {
        if !matches!(terminal, Terminal::Close) {
            return Err(Invalid::new(format!("filters[{i}]"), "stands behind a filter that ends the chain"));
        }
        match network_filter(f, names).at("filters", i)? {
            NetworkFilter::Rbac(r) if r.is_empty() => {}
            NetworkFilter::Rbac(r) => rbac.push(r),
            NetworkFilter::Terminal(t) => terminal = t,
        }
    }
    let default = Some(Duration::from_secs(15));
    let field = "transport_socket_connect_timeout";
    Ok(FilterChain {
        name: pb.name.into(),
        matches,
        tls,
        handshake_timeout: timeout(pb.transport_socket_connect_timeout, default, field)?,
        rbac: rbac.into(),
        terminal,
        metadata: Metadata::new(pb.metadata),
    })
}

enum NetworkFilter {
    Rbac(Arc<Rbac>),
    Terminal(Terminal),
}

fn network_filter(pb: pb::Filter, names: &mut Names) -> Result<NetworkFilter, Invalid> {
    let any: Any = match pb.config_type {
        Some(pb::filter::ConfigType::TypedConfig(any)) => any,
        Some(pb::filter::ConfigType::ConfigDiscovery(_)) => {
            return Err(Invalid::unsupported("config_discovery"));
        }
        None => return Err(Invalid::missing("typed_config")),
    };
    let field = "typed_config";
    if is::<filter::http_connection_manager::v3::HttpConnectionManager>(&any) {
        let pb = unpack(&any).under(field)?;
        let hcm = HttpConnectionManager::new(pb, names).under(field)?;
        Ok(NetworkFilter::Terminal(Terminal::Http(Arc::new(hcm))))
    } else if is::<filter::tcp_proxy::v3::TcpProxy>(&any) {
        let tcp = TcpProxy::new(unpack(&any).under(field)?, &mut names.clusters).under(field)?;
        Ok(NetworkFilter::Terminal(Terminal::Tcp(Arc::new(tcp))))
    } else if is::<filter::rbac::v3::Rbac>(&any) {
        let rbac = Rbac::network(unpack(&any).under(field)?).under(field)?;
        Ok(NetworkFilter::Rbac(Arc::new(rbac)))
    } else {
        let reason = format!("filter `{}` of type `{}` is not one this proxy has", pb.name, any.type_url);
        Err(Invalid::new(field, reason))
    }
}
