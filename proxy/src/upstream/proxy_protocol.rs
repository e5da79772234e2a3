//! The PROXY protocol towards endpoints: the header with which a connection begins. Pure.

use std::net::{IpAddr, SocketAddr};

use crate::listener::connection::Origin;
use crate::listener::proxy_protocol::V2_SIGNATURE;
use crate::xds::proxy_protocol::{MOST_TLVS, ProxyProtocol, Tlv, Version};

/// The first bytes of a connection to an endpoint. `origin`: for whom it is; nobody's is the proxy's own, as those of
/// checks. `ends`: its own two ends. `of_endpoint`: what the endpoint itself is to be told.
#[must_use]
pub fn header(
    settings: &ProxyProtocol,
    origin: Option<&Origin>,
    ends: Option<(SocketAddr, SocketAddr)>,
    of_endpoint: &[Tlv],
) -> Vec<u8> {
    match settings.version {
        Version::V1 => v1(origin.map(|o| (o.source, o.destination)).or(ends)),
        Version::V2 => match origin {
            None => v2(0x20, 0, &[]),
            Some(origin) => on_behalf(origin, &told(settings, origin, of_endpoint)),
        },
    }
}

fn v1(addresses: Option<(SocketAddr, SocketAddr)>) -> Vec<u8> {
    let family = match addresses {
        Some((SocketAddr::V4(_), SocketAddr::V4(_))) => "TCP4",
        Some((SocketAddr::V6(_), SocketAddr::V6(_))) => "TCP6",
        // the format has no words for those
        Some(_) | None => return b"PROXY UNKNOWN\r\n".to_vec(),
    };
    let Some((from, to)) = addresses else { return Vec::new() };
    format!("PROXY {family} {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port()).into_bytes()
}

/// What is told besides addresses: what is the endpoint's own, what is the cluster's, and what the client said; a type
/// that comes before is not told again by those that come after.
fn told(settings: &ProxyProtocol, origin: &Origin, of_endpoint: &[Tlv]) -> Vec<u8> {
    let is_new = |tlv: &&Tlv, before: &[Tlv]| !before.iter().any(|b| b.kind == tlv.kind);
    let of_cluster = settings.added.iter().filter(|tlv| is_new(tlv, of_endpoint));
    let passed = origin.tlvs.iter().filter(|tlv| {
        settings.pass.takes(tlv.kind) && is_new(tlv, of_endpoint) && is_new(tlv, &settings.added)
    });
    let mut bytes = Vec::new();
    for tlv in of_endpoint.iter().chain(of_cluster).chain(passed) {
        if bytes.len() + tlv.length() <= MOST_TLVS
            && let Ok(length) = u16::try_from(tlv.value.len())
        {
            bytes.push(tlv.kind);
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(&tlv.value);
        }
    }
    bytes
}

fn on_behalf(origin: &Origin, tlvs: &[u8]) -> Vec<u8> {
    let (source, destination) = (origin.source, origin.destination);
    let mut rest = Vec::new();
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            rest.extend_from_slice(&from.octets());
            rest.extend_from_slice(&to.octets());
            0x11
        }
        // both are of one family in a header
        (from, to) => {
            rest.extend_from_slice(&as_v6(from));
            rest.extend_from_slice(&as_v6(to));
            0x21
        }
    };
    rest.extend_from_slice(&source.port().to_be_bytes());
    rest.extend_from_slice(&destination.port().to_be_bytes());
    rest.extend_from_slice(tlvs);
    v2(0x21, family, &rest)
}

fn as_v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).unwrap_or(u16::MAX);
    let mut bytes = V2_SIGNATURE.to_vec();
    bytes.extend_from_slice(&[command, family]);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(rest);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listener::proxy_protocol::{Proxied, parse, tlvs};
    use crate::xds::proxy_protocol::PassTlvs;

    fn tlv(kind: u8, value: &str) -> Tlv {
        Tlv { kind, value: value.as_bytes().into() }
    }

    fn origin(source: &str, destination: &str) -> Origin {
        let tlvs = [tlv(1, "h2"), tlv(2, "name"), tlv(0xe0, "own")].into();
        Origin::new(source.parse().unwrap(), destination.parse().unwrap(), tlvs)
    }

    fn settings(version: Version) -> ProxyProtocol {
        ProxyProtocol { version, pass: PassTlvs::Only([1, 0xe0].into()), added: [tlv(0xe0, "ours")].into() }
    }

    #[track_caller]
    fn check(version: Version, origin: &Origin, of_endpoint: &[Tlv], expected: &[Tlv]) {
        let bytes = header(&settings(version), Some(origin), None, of_endpoint);
        let addresses = Some((origin.source, origin.destination));
        assert_eq!(parse(&bytes), Proxied::Header { length: bytes.len(), addresses });
        assert_eq!(tlvs(&bytes), expected);
    }

    #[test]
    fn a_header_reads_as_it_was_meant() {
        let all = [tlv(0xe0, "ours"), tlv(1, "h2")];
        for (source, destination) in [("192.0.2.1:5000", "198.51.100.2:80"), ("[2001:db8::1]:1", "[::1]:2")] {
            check(Version::V1, &origin(source, destination), &[], &[]);
            check(Version::V2, &origin(source, destination), &[], &all);
        }
        let of_endpoint = [tlv(0xe0, "its"), tlv(5, "")];
        let all = [tlv(0xe0, "its"), tlv(5, ""), tlv(1, "h2")];
        check(Version::V2, &origin("192.0.2.1:5000", "198.51.100.2:80"), &of_endpoint, &all);
    }

    #[test]
    fn a_connection_of_the_proxys_own_tells_of_nobody() {
        let ends = Some(("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap()));
        assert_eq!(
            header(&settings(Version::V1), None, ends, &[]),
            b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n"
        );
        assert_eq!(header(&settings(Version::V1), None, None, &[]), b"PROXY UNKNOWN\r\n");
        let local = [V2_SIGNATURE, &[0x20, 0, 0, 0]].concat();
        assert_eq!(header(&settings(Version::V2), None, ends, &[tlv(1, "x")]), local);
    }

    #[test]
    fn what_has_no_room_is_left_out() {
        let long = Tlv { kind: 1, value: vec![0; 60_000].into() };
        let origin = Origin::new(([1; 4], 1).into(), ([2; 4], 2).into(), [long.clone()].into());
        let settings = ProxyProtocol { version: Version::V2, pass: PassTlvs::All, added: [long].into() };
        let other = Tlv { kind: 2, value: vec![0; 6_000].into() };
        let bytes = header(&settings, Some(&origin), None, std::slice::from_ref(&other));
        assert_eq!(bytes.len(), 16 + 12 + other.length());
    }
}
