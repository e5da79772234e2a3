//! `Listener` from its proto, validated once.

pub mod chain;
pub mod hcm;
pub mod tcp;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::listener as filter;

use self::chain::{FilterChain, FilterChainMatch};
use self::hcm::Rds;
use super::access_log::{AccessLog, access_logs};
use super::decode::{
    Address, Invalid, Kind, Metadata, Rejected, Under as _, address, bool_or, is, timeout, u32_or, unpack,
};
use super::proxy_protocol::PassTlvs;
use super::route::ClusterNames;

/// One listener.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub name: Arc<str>,
    /// Where it listens: the first, then additional ones. IP addresses and Unix sockets only.
    pub addresses: Box<[Address]>,
    /// Whether it has a socket of its own; without one it only gets connections handed over by a listener with
    /// `use_original_dst`.
    pub bind_to_port: bool,
    /// Hand connections over to the listener on their original destination, if there is one.
    pub use_original_dst: bool,
    /// What looks at a connection before a chain is chosen.
    pub filters: Box<[ListenerFilter]>,
    /// How long those may take; `None`: for ever.
    pub filters_timeout: Option<Duration>,
    /// Go on with the connection after that time, instead of closing it.
    pub continue_on_filters_timeout: bool,
    /// Chains, in configuration's order.
    pub chains: Box<[Arc<FilterChain>]>,
    /// The chain for connections that fit none of the others.
    pub default_chain: Option<Arc<FilterChain>>,
    /// Lines about connections that fit no chain.
    pub access_logs: Arc<[AccessLog]>,
    /// From whose point of view: `Inbound` traffic comes to the workload, `Outbound` traffic leaves it.
    pub direction: Direction,
    /// How many bytes of one connection may wait in memory.
    pub buffer_limit: u32,
    /// Addresses that are not there yet may be bound.
    pub freebind: bool,
    /// Keep the client's source address (`IP_TRANSPARENT`).
    pub transparent: bool,
    /// How many connections may wait to be accepted.
    pub backlog: Option<u32>,
    /// Named route configurations that its connection managers use; an [`Rds`] is an index into it.
    pub rds: Box<[RdsName]>,
    /// Clusters named by its TCP proxies.
    pub clusters: ClusterNames,
    /// Free-form data.
    pub metadata: Metadata,
}

/// A route configuration that a listener asks for by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdsName {
    /// The name.
    pub name: Arc<str>,
    /// How long the listener waits for it before it starts without; `None`: for ever.
    pub fetch_timeout: Option<Duration>,
}

/// Which way traffic goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Not said.
    Unspecified,
    /// To the workload.
    Inbound,
    /// From the workload.
    Outbound,
}

/// What looks at a connection before a chain is chosen.
#[derive(Debug, Clone)]
pub struct ListenerFilter {
    /// What it does.
    pub kind: ListenerFilterKind,
    /// Not for these connections.
    pub disabled: Option<Predicate>,
}

/// What a listener filter does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenerFilterKind {
    /// Asks the kernel where the connection wanted to go.
    OriginalDst,
    /// Reads server name and protocols from a TLS hello, if it is one.
    TlsInspector,
    /// Tells HTTP/1, HTTP/2 and others apart by the first bytes.
    HttpInspector,
    /// Reads a PROXY protocol header.
    ProxyProtocol {
        /// Take connections without one, too.
        optional: bool,
        /// Accept version 1.
        v1: bool,
        /// Accept version 2.
        v2: bool,
        /// What of it is remembered besides addresses.
        pass: PassTlvs,
    },
}

/// A condition on a connection's destination port.
#[derive(Debug, Clone)]
pub enum Predicate {
    /// Always.
    Any,
    /// From the first (inclusive) to the second (exclusive).
    Ports(i32, i32),
    /// All of these.
    And(Box<[Predicate]>),
    /// One of these.
    Or(Box<[Predicate]>),
    /// Not this.
    Not(Box<Predicate>),
}

impl Predicate {
    /// Whether a connection to this port fulfils it.
    #[must_use]
    pub fn matches(&self, port: u16) -> bool {
        match self {
            Self::Any => true,
            Self::Ports(start, end) => *start <= i32::from(port) && i32::from(port) < *end,
            Self::And(all) => all.iter().all(|p| p.matches(port)),
            Self::Or(any) => any.iter().any(|p| p.matches(port)),
            Self::Not(p) => !p.matches(port),
        }
    }

    fn new(pb: pb::ListenerFilterChainMatchPredicate, depth: u8) -> Result<Self, Invalid> {
        use pb::listener_filter_chain_match_predicate::Rule;
        let Some(depth) = depth.checked_sub(1) else { return Err(Invalid::new("", "nested too deep")) };
        let all = |rules: Vec<pb::ListenerFilterChainMatchPredicate>| {
            rules.into_iter().map(|r| Self::new(r, depth)).collect::<Result<Box<[_]>, _>>()
        };
        Ok(match pb.rule {
            None => return Err(Invalid::missing("rule")),
            Some(Rule::AnyMatch(true)) => Self::Any,
            Some(Rule::AnyMatch(false)) => return Err(Invalid::new("any_match", "can only be true")),
            Some(Rule::DestinationPortRange(r)) => Self::Ports(r.start, r.end),
            Some(Rule::AndMatch(s)) => Self::And(all(s.rules)?),
            Some(Rule::OrMatch(s)) => Self::Or(all(s.rules)?),
            Some(Rule::NotMatch(p)) => Self::Not(Box::new(Self::new(*p, depth)?)),
        })
    }
}

/// What chains of one listener collect: names that tables resolve later.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) rds: Vec<RdsName>,
    pub(super) clusters: ClusterNames,
}

impl Names {
    pub(super) fn rds(&mut self, name: &str, fetch_timeout: Option<Duration>) -> Rds {
        let found = self.rds.iter().position(|r| *r.name == *name);
        Rds(found.unwrap_or_else(|| {
            self.rds.push(RdsName { name: name.into(), fetch_timeout });
            self.rds.len() - 1
        }))
    }
}

impl TryFrom<pb::Listener> for Listener {
    type Error = Rejected;

    fn try_from(pb: pb::Listener) -> Result<Self, Rejected> {
        let name = pb.name.clone();
        listener(pb).map_err(|invalid| Rejected { kind: Kind::Listener, name, invalid })
    }
}

fn refuse_unsupported(pb: &pb::Listener) -> Result<(), Invalid> {
    for (set, field) in [
        (pb.udp_listener_config.is_some(), "udp_listener_config"),
        (pb.api_listener.is_some(), "api_listener"),
        (pb.filter_chain_matcher.is_some(), "filter_chain_matcher"),
        (pb.fcds_config.is_some(), "fcds_config"),
        (pb.listener_specifier.is_some(), "internal_listener"),
        (!pb.socket_options.is_empty(), "socket_options"),
        (u32_or(pb.tcp_fast_open_queue_length, 0) != 0, "tcp_fast_open_queue_length"),
        (pb.enable_mptcp, "enable_mptcp"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    Ok(())
}

fn listener(pb: pb::Listener) -> Result<Listener, Invalid> {
    if pb.name.is_empty() {
        return Err(Invalid::missing("name"));
    }
    refuse_unsupported(&pb)?;
    let mut addresses = vec![bindable(address(pb.address)).under("address")?];
    for (i, a) in pb.additional_addresses.into_iter().enumerate() {
        addresses.push(bindable(address(a.address)).at("additional_addresses", i)?);
    }
    let mut names = Names::default();
    let chains = pb
        .filter_chains
        .into_iter()
        .enumerate()
        .map(|(i, c)| chain::filter_chain(c, &mut names).map(Arc::new).at("filter_chains", i))
        .collect::<Result<Box<[_]>, _>>()?;
    let default_chain = pb
        .default_filter_chain
        .map(|c| chain::filter_chain(c, &mut names).map(Arc::new))
        .transpose()
        .under("default_filter_chain")?;
    if chains.is_empty() && default_chain.is_none() {
        return Err(Invalid::missing("filter_chains"));
    }
    distinct(&chains)?;
    let filters = pb
        .listener_filters
        .into_iter()
        .enumerate()
        .map(|(i, f)| listener_filter(f).at("listener_filters", i))
        .collect::<Result<_, _>>()?;
    let direction = match pb.traffic_direction {
        0 => Direction::Unspecified,
        1 => Direction::Inbound,
        2 => Direction::Outbound,
        other => return Err(Invalid::new("traffic_direction", format!("unknown value {other}"))),
    };
    Ok(Listener {
        name: pb.name.into(),
        addresses: addresses.into(),
        bind_to_port: bool_or(pb.bind_to_port, true),
        use_original_dst: bool_or(pb.use_original_dst, false),
        filters,
        filters_timeout: timeout(
            pb.listener_filters_timeout,
            Some(Duration::from_secs(15)),
            "listener_filters_timeout",
        )?,
        continue_on_filters_timeout: pb.continue_on_listener_filters_timeout,
        chains,
        default_chain,
        access_logs: access_logs(pb.access_log)?.into(),
        direction,
        buffer_limit: u32_or(pb.per_connection_buffer_limit_bytes, 1 << 20),
        freebind: bool_or(pb.freebind, false),
        transparent: bool_or(pb.transparent, false),
        backlog: pb.tcp_backlog_size.map(|n| n.value),
        rds: names.rds.into(),
        clusters: names.clusters,
        metadata: Metadata::new(pb.metadata),
    })
}

fn bindable(address: Result<Address, Invalid>) -> Result<Address, Invalid> {
    match address? {
        Address::Name(name, _) => {
            Err(Invalid::new("socket_address.address", format!("`{name}` is not an IP address")))
        }
        Address::Pipe(path) if path == PathBuf::new() => Err(Invalid::missing("pipe.path")),
        address @ (Address::Socket(_) | Address::Pipe(_)) => Ok(address),
    }
}

/// Two chains with the same conditions cannot be told apart.
fn distinct(chains: &[Arc<FilterChain>]) -> Result<(), Invalid> {
    let mut seen: std::collections::BTreeMap<&FilterChainMatch, usize> = std::collections::BTreeMap::new();
    for (i, chain) in chains.iter().enumerate() {
        if let Some(other) = seen.insert(&chain.matches, i) {
            let reason = format!("is the same as that of filter_chains[{other}]");
            return Err(Invalid::new(format!("filter_chains[{i}].filter_chain_match"), reason));
        }
    }
    Ok(())
}

fn listener_filter(pb: pb::ListenerFilter) -> Result<ListenerFilter, Invalid> {
    let any = match pb.config_type {
        Some(pb::listener_filter::ConfigType::TypedConfig(any)) => any,
        Some(pb::listener_filter::ConfigType::ConfigDiscovery(_)) => {
            return Err(Invalid::unsupported("config_discovery"));
        }
        None => return Err(Invalid::missing("typed_config")),
    };
    let kind = if is::<filter::original_dst::v3::OriginalDst>(&any) {
        ListenerFilterKind::OriginalDst
    } else if is::<filter::tls_inspector::v3::TlsInspector>(&any) {
        ListenerFilterKind::TlsInspector
    } else if is::<filter::http_inspector::v3::HttpInspector>(&any) {
        ListenerFilterKind::HttpInspector
    } else if is::<filter::proxy_protocol::v3::ProxyProtocol>(&any) {
        let p: filter::proxy_protocol::v3::ProxyProtocol = unpack(&any).under("typed_config")?;
        if !p.rules.is_empty() {
            return Err(Invalid::unsupported("typed_config.rules"));
        }
        ListenerFilterKind::ProxyProtocol {
            optional: p.allow_requests_without_proxy_protocol,
            v1: !p.disallowed_versions.contains(&0),
            v2: !p.disallowed_versions.contains(&1),
            pass: PassTlvs::new(p.pass_through_tlvs).under("typed_config.pass_through_tlvs")?,
        }
    } else {
        let reason = format!("filter `{}` of type `{}` is not one this proxy has", pb.name, any.type_url);
        return Err(Invalid::new("typed_config", reason));
    };
    let disabled = pb.filter_disabled.map(|p| Predicate::new(p, 16)).transpose().under("filter_disabled")?;
    Ok(ListenerFilter { kind, disabled })
}

#[cfg(test)]
mod tests;
