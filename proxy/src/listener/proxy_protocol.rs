//! The PROXY protocol, versions 1 and 2: who really called, told by a load balancer in front. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::xds::proxy_protocol::Tlv;

/// How a header of version 2 begins.
pub const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Longest header of version 1, with its line end.
const V1_MAX: usize = 107;
/// Longest header of version 2 that is accepted: addresses and a modest list of TLVs.
const V2_MAX: usize = 16 + 2048;

/// What the first bytes of a connection say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proxied {
    /// More bytes are needed.
    NeedMore,
    /// A whole header of `length` bytes; the addresses are absent for LOCAL and UNKNOWN.
    Header {
        /// How many bytes the header takes.
        length: usize,
        /// Source and destination of the original connection.
        addresses: Option<(SocketAddr, SocketAddr)>,
    },
    /// No PROXY protocol header, or a malformed one.
    Invalid,
}

/// Reads a PROXY protocol header at the start of `bytes`.
#[must_use]
pub fn parse(bytes: &[u8]) -> Proxied {
    if bytes.starts_with(V2_SIGNATURE) {
        return v2(bytes);
    }
    if bytes.starts_with(b"PROXY ") {
        return v1(bytes);
    }
    if V2_SIGNATURE.starts_with(bytes) || b"PROXY ".starts_with(bytes) {
        return Proxied::NeedMore;
    }
    Proxied::Invalid
}

/// What a whole header says besides addresses.
#[must_use]
pub fn tlvs(header: &[u8]) -> Vec<Tlv> {
    let behind = match header.get(12..14) {
        Some([0x21, 0x11]) if header.starts_with(V2_SIGNATURE) => 16 + 12,
        Some([0x21, 0x21]) if header.starts_with(V2_SIGNATURE) => 16 + 36,
        Some(_) | None => return Vec::new(),
    };
    let (mut rest, mut found) = (header.get(behind..).unwrap_or_default(), Vec::new());
    while let Some((&[kind, hi, lo], tail)) = rest.split_first_chunk::<3>()
        && let Some((value, next)) = tail.split_at_checked(usize::from(u16::from_be_bytes([hi, lo])))
    {
        found.push(Tlv { kind, value: value.into() });
        rest = next;
    }
    found
}

fn v1(bytes: &[u8]) -> Proxied {
    let window = bytes.get(..V1_MAX.min(bytes.len())).unwrap_or_default();
    let Some(end) = window.windows(2).position(|w| w == b"\r\n") else {
        return if bytes.len() >= V1_MAX { Proxied::Invalid } else { Proxied::NeedMore };
    };
    let Some(line) = window.get(..end).and_then(|l| std::str::from_utf8(l).ok()) else {
        return Proxied::Invalid;
    };
    let fields: Vec<&str> = line.split(' ').collect();
    let length = end + 2;
    match fields.as_slice() {
        ["PROXY", "UNKNOWN", ..] => Proxied::Header { length, addresses: None },
        ["PROXY", family @ ("TCP4" | "TCP6"), src, dst, sport, dport] => {
            let pair = |ip: &str, port: &str| -> Option<SocketAddr> {
                let ip: IpAddr = ip.parse().ok()?;
                (ip.is_ipv4() == (*family == "TCP4")).then_some(SocketAddr::new(ip, port.parse().ok()?))
            };
            match (pair(src, sport), pair(dst, dport)) {
                (Some(s), Some(d)) => Proxied::Header { length, addresses: Some((s, d)) },
                _ => Proxied::Invalid,
            }
        }
        _ => Proxied::Invalid,
    }
}

fn v2(bytes: &[u8]) -> Proxied {
    let Some(&[command, family, hi, lo]) = bytes.get(12..16).and_then(|b| b.first_chunk::<4>()) else {
        return Proxied::NeedMore;
    };
    let payload = usize::from(u16::from_be_bytes([hi, lo]));
    let length = 16 + payload;
    if command >> 4 != 2 || length > V2_MAX {
        return Proxied::Invalid;
    }
    let Some(body) = bytes.get(16..length) else { return Proxied::NeedMore };
    match (command & 0xf, family) {
        (0, _) | (1, 0x00) => Proxied::Header { length, addresses: None },
        (1, 0x11) => v2_addresses::<4>(body, length, |a| Ipv4Addr::from(a).into()),
        (1, 0x21) => v2_addresses::<16>(body, length, |a| Ipv6Addr::from(a).into()),
        _ => Proxied::Invalid,
    }
}

fn v2_addresses<const N: usize>(body: &[u8], length: usize, ip: impl Fn([u8; N]) -> IpAddr) -> Proxied {
    let at = |start: usize| body.get(start..)?.first_chunk::<N>().map(|a| ip(*a));
    let port = |start: usize| body.get(start..)?.first_chunk::<2>().map(|p| u16::from_be_bytes(*p));
    let found =
        (|| Some((SocketAddr::new(at(0)?, port(2 * N)?), SocketAddr::new(at(N)?, port(2 * N + 2)?))))();
    match found {
        Some(pair) if tlvs_fit(body.get(2 * N + 4..).unwrap_or_default()) => {
            Proxied::Header { length, addresses: Some(pair) }
        }
        _ => Proxied::Invalid,
    }
}

/// Every TLV ends inside the header, so that none can claim bytes of the request behind it.
fn tlvs_fit(mut rest: &[u8]) -> bool {
    while let Some((&[_, hi, lo], tail)) = rest.split_first_chunk::<3>() {
        match tail.get(usize::from(u16::from_be_bytes([hi, lo]))..) {
            Some(next) => rest = next,
            None => return false,
        }
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn version_one_tells_both_addresses() {
        let line = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 80\r\nGET /";
        let want = Some(("192.0.2.1:5000".parse().unwrap(), "198.51.100.2:80".parse().unwrap()));
        assert_eq!(parse(line), Proxied::Header { length: line.len() - 5, addresses: want });
        assert_eq!(parse(b"PROXY UNKNOWN\r\n"), Proxied::Header { length: 15, addresses: None });
        assert_eq!(parse(b"PROXY TCP6 1.2.3.4 1.2.3.4 1 1\r\n"), Proxied::Invalid);
        assert_eq!(parse(b"PROXY TC"), Proxied::NeedMore);
        assert_eq!(parse(b"GET / HTTP/1.1\r\n"), Proxied::Invalid);
    }

    fn v2_header(command: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = V2_SIGNATURE.to_vec();
        out.extend_from_slice(&[command, 0x11]);
        out.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn version_two_tells_both_addresses_and_skips_tlvs() {
        let mut payload = vec![192, 0, 2, 1, 198, 51, 100, 2, 0x13, 0x88, 0, 80];
        payload.extend_from_slice(&[4, 0, 1, 9]);
        let want = Some(("192.0.2.1:5000".parse().unwrap(), "198.51.100.2:80".parse().unwrap()));
        assert_eq!(parse(&v2_header(0x21, &payload)), Proxied::Header { length: 32, addresses: want });
        assert_eq!(parse(&v2_header(0x20, &[])), Proxied::Header { length: 16, addresses: None });
    }

    #[test]
    fn a_tlv_longer_than_the_header_is_refused() {
        let mut payload = vec![192, 0, 2, 1, 198, 51, 100, 2, 0x13, 0x88, 0, 80];
        payload.extend_from_slice(&[4, 0xff, 0xff, 9]);
        assert_eq!(parse(&v2_header(0x21, &payload)), Proxied::Invalid);
        assert_eq!(parse(&v2_header(0x31, &payload)), Proxied::Invalid);
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(parse(&bytes), parse(&bytes));
            let header = v2_header(0x21, &bytes);
            prop_assert_eq!(parse(&header), parse(&header));
        }
    }
}
