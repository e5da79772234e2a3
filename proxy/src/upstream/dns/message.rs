//! DNS messages (RFC 1035), as far as a client needs them that asks for addresses. Pure; replies are a stranger's bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// Bytes of a message's header.
const HEADER: usize = 12;
/// The largest reply over UDP that is asked for: it fits into every network's packets (DNS flag day 2020).
const UDP_SIZE: u16 = 1232;
/// The longest way from a name to the one that has addresses.
const MOST_ALIASES: usize = 16;
/// The longest name and label (RFC 1035, 2.3.4).
const MOST_NAME: usize = 253;
const MOST_LABEL: usize = 63;

const CNAME: u16 = 5;
const OPT: u16 = 41;
/// The class Internet.
const IN: u16 = 1;
const RESPONSE: u16 = 0x8000;
const TRUNCATED: u16 = 0x0200;
const RECURSION_DESIRED: u16 = 0x0100;
const CODE: u16 = 0x000f;
const NO_SUCH_NAME: u16 = 3;

/// Which addresses are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Kind {
    /// A records.
    V4 = 1,
    /// AAAA records.
    V6 = 28,
}

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    /// The addresses, perhaps none, and how long they may be kept.
    Addresses(Vec<IpAddr>, Option<Duration>),
    /// There is no such name.
    NoSuchName,
    /// There is more than fits: it must be asked for over TCP.
    Cut,
    /// The server cannot say, with its code.
    Failure(u16),
}

/// A query; `None` for what can be no name.
pub(super) fn query(id: u16, name: &str, kind: Kind) -> Option<Vec<u8>> {
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() || name.len() > MOST_NAME {
        return None;
    }
    let mut out = Vec::with_capacity(HEADER + name.len() + 17);
    for field in [id, RECURSION_DESIRED, 1, 0, 0, 1] {
        out.extend(field.to_be_bytes());
    }
    for label in name.split('.') {
        let length =
            u8::try_from(label.len()).ok().filter(|n| (1..=MOST_LABEL).contains(&usize::from(*n)))?;
        out.push(length);
        out.extend(label.bytes());
    }
    out.push(0);
    out.extend([kind as u16, IN].into_iter().flat_map(u16::to_be_bytes));
    // EDNS (RFC 6891): the root's name, the size in place of a class, no flags, no data
    out.push(0);
    out.extend([OPT, UDP_SIZE, 0, 0, 0].into_iter().flat_map(u16::to_be_bytes));
    Some(out)
}

/// Reads the reply to a query; `None` when it is none.
pub(super) fn reply(query: &[u8], bytes: &[u8]) -> Option<Reply> {
    let (mut asked, mut reader) = (Reader { bytes: query, at: 0 }, Reader { bytes, at: 0 });
    if asked.u16()? != reader.u16()? {
        return None;
    }
    let flags = reader.u16()?;
    let (questions, answers) = (reader.u16()?, reader.u16()?);
    reader.skip(4)?;
    asked.skip(HEADER - 2)?;
    if flags & RESPONSE == 0 {
        return None;
    }
    let name = asked.name()?;
    let kind = asked.u16()?;
    if questions == 0 && flags & CODE != 0 {
        return Some(Reply::Failure(flags & CODE)); // servers that cannot read a query repeat nothing of it
    }
    if questions != 1 || reader.name()? != name || reader.u16()? != kind || reader.u16()? != IN {
        return None;
    }
    match flags & CODE {
        _ if flags & TRUNCATED != 0 => return Some(Reply::Cut),
        0 => {}
        NO_SUCH_NAME => return Some(Reply::NoSuchName),
        code => return Some(Reply::Failure(code)),
    }
    let records: Vec<Record> = (0..answers).map_while(|_| reader.record()).collect();
    Some(addresses(name, kind, &records))
}

/// Follows aliases to the addresses.
fn addresses(mut name: Vec<u8>, kind: u16, records: &[Record]) -> Reply {
    let mut least: Option<u32> = None;
    let mut shorten = |ttl: u32| least = Some(least.map_or(ttl, |l| l.min(ttl)));
    for _ in 0..MOST_ALIASES {
        let alias = records.iter().find_map(|record| match &record.data {
            Value::Alias(target) if record.name == name => Some((record.ttl, target)),
            Value::Alias(_) | Value::Address(_) | Value::Other => None,
        });
        let Some((ttl, target)) = alias else { break };
        shorten(ttl);
        name.clone_from(target);
    }
    let mut found = Vec::new();
    for record in records.iter().filter(|record| record.kind == kind && record.name == name) {
        if let Value::Address(address) = record.data {
            shorten(record.ttl);
            found.push(address);
        }
    }
    Reply::Addresses(found, least.map(|seconds| Duration::from_secs(seconds.into())))
}

struct Record {
    name: Vec<u8>,
    kind: u16,
    /// Seconds.
    ttl: u32,
    data: Value,
}

enum Value {
    Address(IpAddr),
    Alias(Vec<u8>),
    Other,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn u8(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes([self.u8()?, self.u8()?]))
    }

    fn skip(&mut self, n: usize) -> Option<()> {
        self.at += n;
        (self.at <= self.bytes.len()).then_some(())
    }

    /// A name in lower case, each label after its length. Each pointer must lead further back, so that none goes round.
    fn name(&mut self) -> Option<Vec<u8>> {
        let (mut out, mut at, mut end, mut before) = (Vec::new(), self.at, None, self.at);
        loop {
            let length = *self.bytes.get(at)?;
            match length {
                0 => {
                    self.at = end.unwrap_or(at + 1);
                    return Some(out);
                }
                1..=63 => {
                    let label = self.bytes.get(at..=at + usize::from(length))?;
                    out.push(length);
                    out.extend(label.get(1..)?.iter().map(u8::to_ascii_lowercase));
                    at += 1 + usize::from(length);
                    if out.len() > MOST_NAME + 1 {
                        return None;
                    }
                }
                0xc0.. => {
                    let low = *self.bytes.get(at + 1)?;
                    end = end.or(Some(at + 2));
                    at = usize::from(length & 0x3f) << 8 | usize::from(low);
                    if at >= before {
                        return None;
                    }
                    before = at;
                }
                64..0xc0 => return None,
            }
        }
    }

    fn record(&mut self) -> Option<Record> {
        let name = self.name()?;
        let (kind, class) = (self.u16()?, self.u16()?);
        let ttl = u32::from(self.u16()?) << 16 | u32::from(self.u16()?);
        // a lifetime with the highest bit counts as none (RFC 2181, 8)
        let ttl = if ttl > i32::MAX.unsigned_abs() { 0 } else { ttl };
        let length = usize::from(self.u16()?);
        let data = self.bytes.get(self.at..self.at + length)?;
        let value = match (class, kind) {
            (IN, CNAME) => Value::Alias(Reader { bytes: self.bytes, at: self.at }.name()?),
            (IN, k) if k == Kind::V4 as u16 => {
                Value::Address(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into())
            }
            (IN, k) if k == Kind::V6 as u16 => {
                Value::Address(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into())
            }
            _ => Value::Other,
        };
        self.skip(length)?;
        Some(Record { name, kind, ttl, data: value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The name of the question.
    const ASKED: [u8; 2] = [0xc0, 12];

    fn record(name: &[u8], kind: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
        let mut out = name.to_vec();
        out.extend([kind, IN].into_iter().flat_map(u16::to_be_bytes));
        out.extend(ttl.to_be_bytes());
        out.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        out.extend(data);
        out
    }

    /// The answer to a question for `a.b` of this kind.
    fn answered(kind: Kind, flags: u16, records: &[Vec<u8>]) -> Option<Reply> {
        let asked = query(7, "a.b", kind).unwrap();
        let question = &asked[HEADER..HEADER + 9];
        let count = u16::try_from(records.len()).unwrap();
        let mut bytes: Vec<u8> =
            [7, RESPONSE | flags, 1, count, 0, 0].into_iter().flat_map(u16::to_be_bytes).collect();
        bytes.extend(question.to_ascii_uppercase());
        bytes.extend(records.concat());
        reply(&asked, &bytes)
    }

    fn found(addresses: &[&str], seconds: u64) -> Option<Reply> {
        let addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
        Some(Reply::Addresses(addresses, Some(Duration::from_secs(seconds))))
    }

    #[test]
    fn addresses_come_with_the_shortest_lifetime_on_the_way_to_them() {
        let v4 = |name: &[u8], ttl, last| record(name, 1, ttl, &[10, 0, 0, last]);
        let two = [v4(&ASKED, 60, 1), v4(&ASKED, 30, 2)];
        assert_eq!(answered(Kind::V4, 0, &two), found(&["10.0.0.1", "10.0.0.2"], 30));
        let c = [1, b'C', 0];
        let alias = [v4(&[1, b'c', 0], 60, 3), record(&ASKED, CNAME, 5, &c), v4(&[1, b'x', 0], 1, 4)];
        assert_eq!(answered(Kind::V4, 0, &alias), found(&["10.0.0.3"], 5));
        let v6 = [record(&ASKED, 28, 9, &Ipv6Addr::LOCALHOST.octets()), v4(&ASKED, 1, 1)];
        assert_eq!(answered(Kind::V6, 0, &v6), found(&["::1"], 9));
        assert_eq!(answered(Kind::V4, 0, &[v4(&ASKED, u32::MAX, 1)]), found(&["10.0.0.1"], 0));
        assert_eq!(answered(Kind::V4, 0, &[]), Some(Reply::Addresses(vec![], None)));
    }

    #[test]
    fn what_a_server_cannot_say_is_told_apart() {
        assert_eq!(answered(Kind::V4, 3, &[]), Some(Reply::NoSuchName));
        assert_eq!(answered(Kind::V4, 2, &[]), Some(Reply::Failure(2)));
        assert_eq!(answered(Kind::V4, TRUNCATED, &[]), Some(Reply::Cut));
        let asked = query(7, "a.b", Kind::V4).unwrap();
        assert_eq!(reply(&asked, &[0, 7, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0]), Some(Reply::Failure(1)));
        assert_eq!(reply(&asked, &asked), None, "a query is no reply");
        let other = query(7, "a.c", Kind::V4).unwrap();
        let mut bytes = other.clone();
        bytes[2] |= 0x80;
        assert_eq!(reply(&asked, &bytes), None, "the reply to another question");
        assert_eq!(reply(&other, &bytes), Some(Reply::Addresses(vec![], None)));
    }

    #[test]
    fn aliases_that_go_round_end() {
        let round = [record(&ASKED, CNAME, 5, &ASKED)];
        assert_eq!(
            answered(Kind::V4, 0, &round),
            Some(Reply::Addresses(vec![], Some(Duration::from_secs(5))))
        );
    }

    #[test]
    fn what_can_be_no_name_is_not_asked_for() {
        let long = "x".repeat(64);
        for name in ["", ".", "a..b", long.as_str(), &"a.".repeat(130)] {
            assert_eq!(query(1, name, Kind::V4), None, "{name}");
        }
        assert_eq!(query(1, "a.b.", Kind::V4), query(1, "a.b", Kind::V4));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(rest in proptest::collection::vec(any::<u8>(), 0..300), keep in 0_usize..30) {
            let asked = query(7, "a.b", Kind::V4).unwrap();
            let mut bytes = asked.clone();
            bytes[2] |= 0x80;
            bytes[7] = 3; // answers
            bytes.truncate(keep.min(HEADER + 9));
            bytes.extend(rest);
            let _any = reply(&asked, &bytes);
        }
    }
}
