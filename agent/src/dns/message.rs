//! DNS messages (RFC 1035), as far as a server needs them that answers addresses and hands the rest on.

use std::net::IpAddr;

/// Bytes of a message's header.
const HEADER: usize = 12;
/// The largest answer over UDP to a client that does not say how much it takes (RFC 1035, 4.2.1).
const PLAIN_LIMIT: u16 = 512;
/// The largest answer over UDP to any client: it fits into every network's packets (DNS flag day 2020).
const LIMIT: u16 = 1232;
/// How long an answer may be kept, in seconds: services come and go.
const TTL: u32 = 30;

/// Types of records.
const A: u16 = 1;
const AAAA: u16 = 28;
const OPT: u16 = 41;
const ANY: u16 = 255;
/// The class Internet.
const IN: u16 = 1;

/// Bits of the header's flags.
const RESPONSE: u16 = 0x8000;
const OPCODE: u16 = 0x7800;
const TRUNCATED: u16 = 0x0200;
const RECURSION_DESIRED: u16 = 0x0100;
const RECURSION_AVAILABLE: u16 = 0x0080;

/// What an answer says besides its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Code {
    /// There is an answer, perhaps without records.
    NoError = 0,
    /// The query cannot be read.
    FormErr = 1,
    /// Nobody could be asked.
    ServFail = 2,
    /// There is no such name.
    NxDomain = 3,
    /// This kind of query is not served.
    NotImp = 4,
}

/// A query with one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    id: u16,
    flags: u16,
    /// The name in lower case, without the last dot.
    pub name: String,
    kind: u16,
    class: u16,
    /// The question as it came: clients compare it letter for letter.
    question: Vec<u8>,
    /// How large an answer the client takes, when it says so (EDNS, RFC 6891).
    size: Option<u16>,
}

/// A query that cannot be read, and what is answered to it; `None` when nothing is.
pub type Refused = Option<Vec<u8>>;

impl Query {
    /// Reads a query.
    ///
    /// # Errors
    ///
    /// With what is to be answered.
    pub fn parse(bytes: &[u8]) -> Result<Self, Refused> {
        let mut reader = Reader { bytes, at: 0 };
        let (Some(id), Some(flags)) = (reader.u16(), reader.u16()) else { return Err(None) };
        if flags & RESPONSE != 0 {
            return Err(None); // answering answers, two servers would never end
        }
        let refuse = |code: Code| Err(Some(header(id, flags, code, [0; 4]).to_vec()));
        if flags & OPCODE != 0 {
            return refuse(Code::NotImp);
        }
        match Self::read(id, flags, &mut reader) {
            Some(query) => Ok(query),
            None => refuse(Code::FormErr),
        }
    }

    fn read(id: u16, flags: u16, reader: &mut Reader<'_>) -> Option<Self> {
        let [questions, answers, authorities, additional] =
            [reader.u16()?, reader.u16()?, reader.u16()?, reader.u16()?];
        if (questions, answers, authorities) != (1, 0, 0) {
            return None;
        }
        let name = reader.name()?;
        let (kind, class) = (reader.u16()?, reader.u16()?);
        let question = reader.bytes.get(HEADER..reader.at)?.to_vec();
        let mut size = None;
        for _ in 0..additional {
            reader.name()?;
            let (kind, class) = (reader.u16()?, reader.u16()?);
            reader.skip(4)?;
            let length = reader.u16()?;
            reader.skip(length.into())?;
            if kind == OPT {
                size = Some(class.max(PLAIN_LIMIT));
            }
        }
        Some(Self { id, flags, name, kind, class, question, size })
    }

    /// The answer with those of these addresses that are asked for: none is an answer, too (RFC 2308, 2.2). `limit` is
    /// for UDP: what is larger is cut, and the client asks again over TCP.
    #[must_use]
    pub fn answer(&self, code: Code, addresses: &[IpAddr], limit: bool) -> Vec<u8> {
        let wanted = |address: &&IpAddr| match self.kind {
            _ if self.class != IN && self.class != ANY => false,
            A => address.is_ipv4(),
            AAAA => address.is_ipv6(),
            ANY => true,
            _ => false,
        };
        let records: Vec<&IpAddr> = addresses.iter().filter(wanted).collect();
        let whole = self.message(code, &records, false);
        let most = usize::from(self.size.unwrap_or(PLAIN_LIMIT).min(LIMIT));
        if limit && whole.len() > most { self.message(code, &[], true) } else { whole }
    }

    fn message(&self, code: Code, records: &[&IpAddr], cut: bool) -> Vec<u8> {
        let flags = self.flags | if cut { TRUNCATED } else { 0 };
        let count = u16::try_from(records.len()).unwrap_or(u16::MAX);
        let mut out = header(self.id, flags, code, [1, count, 0, u16::from(self.size.is_some())]).to_vec();
        out.extend_from_slice(&self.question);
        for address in records.iter().take(count.into()) {
            let (kind, data) = match address {
                IpAddr::V4(address) => (A, address.octets().to_vec()),
                IpAddr::V6(address) => (AAAA, address.octets().to_vec()),
            };
            // The name is that of the question, which begins after the header (RFC 1035, 4.1.4).
            out.extend_from_slice(&[0xc0, 0x0c]);
            out.extend([kind, IN].into_iter().flat_map(u16::to_be_bytes));
            out.extend(TTL.to_be_bytes());
            out.extend([0, u8::try_from(data.len()).unwrap_or(0)]);
            out.extend(data);
        }
        if self.size.is_some() {
            out.push(0);
            out.extend([OPT, LIMIT, 0, 0, 0].into_iter().flat_map(u16::to_be_bytes));
        }
        out
    }
}

fn header(id: u16, flags: u16, code: Code, counts: [u16; 4]) -> [u8; HEADER] {
    let kept = flags & (OPCODE | RECURSION_DESIRED | TRUNCATED);
    let flags = RESPONSE | kept | RECURSION_AVAILABLE | code as u16;
    let mut out = [0; HEADER];
    let words = [id, flags].into_iter().chain(counts).flat_map(u16::to_be_bytes);
    out.iter_mut().zip(words).for_each(|(byte, word)| *byte = word);
    out
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn u8(&mut self) -> Option<u8> {
        let byte = self.bytes.get(self.at).copied();
        self.at += 1;
        byte
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes([self.u8()?, self.u8()?]))
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.at = self.at.checked_add(bytes).filter(|at| *at <= self.bytes.len())?;
        Some(())
    }

    /// A name in lower case, at most 255 bytes long. There is nothing before a question's name that it could point to,
    /// so pointers are refused.
    fn name(&mut self) -> Option<String> {
        let mut name = String::new();
        loop {
            match self.u8()? {
                0 => return Some(name),
                length @ 1..=63 => {
                    if !name.is_empty() {
                        name.push('.');
                    }
                    for _ in 0..length {
                        // Whatever is not ASCII is in no table, and is handed on as it came.
                        name.push(char::from(self.u8()?).to_ascii_lowercase());
                    }
                    if name.len() > 253 {
                        return None;
                    }
                }
                64.. => return None,
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    pub(crate) fn query(name: &str, kind: u16, edns: Option<u16>) -> Vec<u8> {
        let mut out = vec![0x12, 0x34, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())];
        for label in name.split('.') {
            out.push(u8::try_from(label.len()).unwrap());
            out.extend_from_slice(label.as_bytes());
        }
        out.push(0);
        out.extend([kind, IN].into_iter().flat_map(u16::to_be_bytes));
        if let Some(size) = edns {
            out.push(0);
            out.extend([OPT, size, 0, 0, 0].into_iter().flat_map(u16::to_be_bytes));
        }
        out
    }

    fn addresses() -> Vec<IpAddr> {
        vec![Ipv4Addr::new(10, 0, 0, 1).into(), Ipv6Addr::LOCALHOST.into()]
    }

    #[test]
    fn each_family_is_answered_by_itself_and_the_question_comes_back_as_it_was() {
        let asked = query("ReViews.Default", A, None);
        let read = Query::parse(&asked).unwrap();
        assert_eq!(read.name, "reviews.default");
        let answer = read.answer(Code::NoError, &addresses(), true);
        assert_eq!(answer[..4], [0x12, 0x34, 0x81, 0x80]);
        assert_eq!(answer[4..12], [0, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(answer[12..asked.len()], asked[12..]);
        assert_eq!(answer[asked.len()..], [0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 10, 0, 0, 1]);
        let v6 = Query::parse(&query("a", AAAA, None)).unwrap().answer(Code::NoError, &addresses(), true);
        assert_eq!((v6[7], &v6[v6.len() - 16..]), (1, &Ipv6Addr::LOCALHOST.octets()[..]));
    }

    #[test]
    fn a_name_without_such_a_record_is_answered_with_none_and_an_unknown_one_is_said_to_be() {
        let read = Query::parse(&query("a.b", 16, Some(4096))).unwrap();
        let none = read.answer(Code::NoError, &addresses(), true);
        assert_eq!((none[3] & 0xf, none[7], none[11]), (0, 0, 1), "no error, no record, EDNS");
        let unknown = read.answer(Code::NxDomain, &[], true);
        assert_eq!(unknown[3] & 0xf, 3);
    }

    #[test]
    fn what_does_not_fit_is_cut_over_udp_alone() {
        let many: Vec<IpAddr> = (0..60).map(|n| IpAddr::from([10, 0, 0, n])).collect();
        for (edns, fits) in [(None, false), (Some(600), false), (Some(4096), true)] {
            let read = Query::parse(&query("a.b", A, edns)).unwrap();
            let answer = read.answer(Code::NoError, &many, true);
            assert_eq!((answer[2] & 2 == 0, answer[7]), (fits, if fits { 60 } else { 0 }), "{edns:?}");
            assert_eq!(read.answer(Code::NoError, &many, false)[7], 60);
        }
    }

    #[test]
    fn what_is_no_query_is_refused_and_no_answer_is_answered() {
        assert_eq!(Query::parse(b"\0\0\0"), Err(None));
        let mut answer = query("a", A, None);
        answer[2] |= 0x80;
        assert_eq!(Query::parse(&answer), Err(None));
        let mut notify = query("a", A, None);
        notify[2] |= 0x20;
        assert_eq!(Query::parse(&notify).unwrap_err().unwrap()[3] & 0xf, 4);
        let mut pointer = query("a", A, None);
        pointer[12] = 0xc0;
        assert_eq!(Query::parse(&pointer).unwrap_err().unwrap()[3] & 0xf, 1);
        let long = query(&vec!["a".repeat(60); 5].join("."), A, None);
        assert!(Query::parse(&long).is_err());
    }

    #[test]
    fn any_bytes_end_in_an_answer_or_none() {
        let mut rng = fastrand::Rng::with_seed(7);
        let whole = query("reviews.default.svc.cluster.local", A, Some(1232));
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..rng.usize(1..6) {
                let at = rng.usize(..bytes.len());
                bytes[at] = rng.u8(..);
            }
            bytes.truncate(rng.usize(..=bytes.len()));
            if let Ok(read) = Query::parse(&bytes) {
                assert!(read.answer(Code::NoError, &addresses(), true).len() <= usize::from(LIMIT));
            }
        }
    }
}
