//! Which filter chain serves a connection. Pure.
//!
//! Envoy's order: destination port, destination address, server name, transport, application protocol, then the
//! source. At each step only the best matches stay, and there is no going back.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::xds::listener::chain::{FilterChain, FilterChainMatch, SourceType};

/// What a connection shows before a chain is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// Where it was made to.
    pub local: SocketAddr,
    /// The client.
    pub remote: SocketAddr,
    /// The other end.
    pub direct_remote: SocketAddr,
    /// Server name of its TLS hello, in lower case.
    pub server_name: Option<&'a str>,
    /// `tls` or `raw_buffer`.
    pub transport: &'a str,
    /// Application protocols that it offers or speaks.
    pub protocols: &'a [String],
}

/// How well a chain's condition fits; `None` when it does not.
type Step<'a> = &'a dyn Fn(&FilterChainMatch) -> Option<usize>;

/// The chain for a connection; `None` when none fits.
#[must_use]
pub fn find<'a>(chains: &'a [Arc<FilterChain>], shown: &Shown<'_>) -> Option<&'a Arc<FilterChain>> {
    let mut left: Vec<&Arc<FilterChain>> = chains.iter().collect();
    let steps: [Step<'_>; 9] = [
        &|m| exact(m.destination_port.as_ref(), &shown.local.port()),
        &|m| longest(&m.prefix_ranges, shown.local.ip()),
        &|m| server_name(m, shown.server_name),
        &|m| match &*m.transport_protocol {
            "" => Some(0),
            wanted => (wanted == shown.transport).then_some(1),
        },
        &|m| match &*m.application_protocols {
            [] => Some(0),
            wanted => shown.protocols.iter().any(|p| wanted.iter().any(|w| **w == **p)).then_some(1),
        },
        &|m| longest(&m.direct_source_prefix_ranges, shown.direct_remote.ip()),
        &|m| source_type(m.source_type, shown),
        &|m| longest(&m.source_prefix_ranges, shown.remote.ip()),
        &|m| match &*m.source_ports {
            [] => Some(0),
            ports => ports.contains(&shown.remote.port()).then_some(1),
        },
    ];
    for step in steps {
        let best = left.iter().filter_map(|c| step(&c.matches)).max()?;
        left.retain(|c| step(&c.matches) == Some(best));
    }
    left.first().copied()
}

fn exact<T: PartialEq>(wanted: Option<&T>, value: &T) -> Option<usize> {
    match wanted {
        None => Some(0),
        Some(wanted) => (wanted == value).then_some(1),
    }
}

fn longest(wanted: &[IpNet], ip: IpAddr) -> Option<usize> {
    if wanted.is_empty() {
        return Some(0);
    }
    wanted.iter().filter(|net| net.contains(&ip)).map(|net| 1 + usize::from(net.prefix_len())).max()
}

/// An exact name beats a longer suffix, which beats a shorter one, which beats no condition.
fn server_name(m: &FilterChainMatch, shown: Option<&str>) -> Option<usize> {
    if m.server_names.is_empty() {
        return Some(0);
    }
    let shown = shown?;
    let score = |wanted: &str| match wanted.strip_prefix('*') {
        None => (wanted == shown).then_some(usize::MAX),
        Some(suffix) => (shown.len() > suffix.len() && shown.ends_with(suffix)).then_some(suffix.len()),
    };
    m.server_names.iter().filter_map(|n| score(n)).max()
}

fn source_type(wanted: SourceType, shown: &Shown<'_>) -> Option<usize> {
    let ip = shown.remote.ip();
    let local = ip.is_loopback() || ip == shown.local.ip();
    match wanted {
        SourceType::Any => Some(0),
        SourceType::SameIpOrLoopback => local.then_some(1),
        SourceType::External => (!local).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xds::decode::Metadata;
    use crate::xds::listener::chain::Terminal;

    fn chain(name: &str, change: impl Fn(&mut FilterChainMatch)) -> Arc<FilterChain> {
        let mut matches = FilterChainMatch::default();
        change(&mut matches);
        Arc::new(FilterChain {
            name: name.into(),
            matches,
            tls: None,
            handshake_timeout: None,
            rbac: Box::default(),
            terminal: Terminal::Close,
            metadata: Metadata::default(),
        })
    }

    #[track_caller]
    fn check<'a>(chains: &[Arc<FilterChain>], change: impl Fn(&mut Shown<'a>), expected: Option<&str>) {
        let mut shown = Shown {
            local: "10.0.0.1:9080".parse().unwrap(),
            remote: "10.0.0.2:5000".parse().unwrap(),
            direct_remote: "10.0.0.2:5000".parse().unwrap(),
            server_name: None,
            transport: "raw_buffer",
            protocols: &[],
        };
        change(&mut shown);
        assert_eq!(find(chains, &shown).map(|c| &*c.name), expected);
    }

    #[test]
    fn mutual_tls_and_plain_text_find_their_chains() {
        let chains = [
            chain("mtls", |m| {
                m.transport_protocol = "tls".into();
                m.application_protocols = ["istio".into(), "istio-http/1.1".into()].into();
            }),
            chain("plain", |m| m.transport_protocol = "raw_buffer".into()),
        ];
        let istio = ["istio".to_owned()];
        let http = ["h2".to_owned()];
        check(&chains, |_| {}, Some("plain"));
        check(
            &chains,
            |s| {
                s.transport = "tls";
                s.protocols = &istio;
            },
            Some("mtls"),
        );
        check(
            &chains,
            |s| {
                s.transport = "tls";
                s.protocols = &http;
            },
            None,
        );
    }

    #[test]
    fn ports_come_before_addresses_and_names() {
        let chains = [
            chain("port", |m| m.destination_port = Some(9080)),
            chain("address", |m| m.prefix_ranges = ["10.0.0.1/32".parse().unwrap()].into()),
            chain("any", |_| {}),
        ];
        check(&chains, |_| {}, Some("port"));
        check(&chains, |s| s.local.set_port(80), Some("address"));
        check(&chains, |s| s.local = "10.9.9.9:80".parse().unwrap(), Some("any"));
        let no_way_back = [
            chain("port", |m| {
                m.destination_port = Some(9080);
                m.transport_protocol = "tls".into();
            }),
            chain("any", |_| {}),
        ];
        check(&no_way_back, |_| {}, None);
    }

    #[test]
    fn the_most_specific_server_name_wins() {
        let names = |n: &str| {
            let n: Box<str> = n.into();
            move |m: &mut FilterChainMatch| m.server_names = [n.clone()].into()
        };
        let chains = [
            chain("suffix", names("*.example.com")),
            chain("exact", names("a.example.com")),
            chain("longer", names("*.b.example.com")),
            chain("none", |_| {}),
        ];
        check(&chains, |s| s.server_name = Some("a.example.com"), Some("exact"));
        check(&chains, |s| s.server_name = Some("x.b.example.com"), Some("longer"));
        check(&chains, |s| s.server_name = Some("x.example.com"), Some("suffix"));
        check(&chains, |s| s.server_name = Some("example.com"), Some("none"));
        check(&chains, |_| {}, Some("none"));
    }

    #[test]
    fn sources_are_told_apart() {
        let chains = [
            chain("local", |m| m.source_type = SourceType::SameIpOrLoopback),
            chain("external", |m| m.source_type = SourceType::External),
        ];
        check(&chains, |_| {}, Some("external"));
        check(&chains, |s| s.remote = "127.0.0.1:1".parse().unwrap(), Some("local"));
    }
}
