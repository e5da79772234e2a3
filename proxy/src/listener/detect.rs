//! First bytes of a connection to a protocol: TLS, HTTP/1, HTTP/2 or anything else. Pure.
//!
//! The driver peeks without consuming, so whatever serves the connection later still sees every byte. Nothing
//! here allocates more than the names it returns, and every length is bounded by the buffer it is given.

/// The connection preface of HTTP/2 (RFC 9113, section 3.4).
pub const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How many first bytes a detector looks at before it gives up: one TLS record with a post-quantum key share
/// fits many times over.
pub const MAX_PEEK: usize = 16 * 1024;

/// What the TLS inspector reads from a ClientHello.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// Server name, lower case, without a trailing dot; `None` when the client sent none.
    pub server_name: Option<String>,
    /// Offered application protocols, in the client's order.
    pub alpn: Vec<String>,
}

/// What the TLS inspector found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// The bytes so far may be the beginning of a ClientHello.
    NeedMore,
    /// A whole ClientHello.
    Hello(ClientHello),
    /// Not TLS.
    No,
}

/// What the HTTP inspector found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Http {
    /// The bytes so far may be the beginning of HTTP.
    NeedMore,
    /// A request line of HTTP/1.0.
    Http10,
    /// A request line of HTTP/1.1.
    Http11,
    /// The HTTP/2 preface.
    Http2,
    /// Not HTTP.
    No,
}

impl Http {
    /// The application protocol that filter chains match on, as Envoy's HTTP inspector sets it.
    #[must_use]
    pub fn application_protocol(self) -> Option<&'static str> {
        match self {
            Self::Http10 => Some("http/1.0"),
            Self::Http11 => Some("http/1.1"),
            Self::Http2 => Some("h2c"),
            Self::NeedMore | Self::No => None,
        }
    }
}

/// Looks for a TLS ClientHello at the start of `bytes` (RFC 8446, section 4.1.2).
#[must_use]
pub fn tls(bytes: &[u8]) -> Tls {
    match bytes.first() {
        None => return Tls::NeedMore,
        Some(0x16) => {}
        Some(_) => return Tls::No,
    }
    if bytes.get(1).is_some_and(|b| *b != 3) || bytes.get(5).is_some_and(|b| *b != 1) {
        return Tls::No;
    }
    match handshake_bytes(bytes) {
        Some(Handshake::Whole(body)) => client_hello(&body).map_or(Tls::No, Tls::Hello),
        None if bytes.len() < MAX_PEEK => Tls::NeedMore,
        Some(Handshake::Broken) | None => Tls::No,
    }
}

enum Handshake {
    Whole(Vec<u8>),
    Broken,
}

/// Joins the handshake fragments of as many records as the message needs; `None` while some are missing.
fn handshake_bytes(bytes: &[u8]) -> Option<Handshake> {
    let mut rest = bytes;
    let mut message = Vec::new();
    loop {
        let header = rest.get(..5)?;
        let [kind, major, _, hi, lo] = *header else { return Some(Handshake::Broken) };
        let length = usize::from(u16::from_be_bytes([hi, lo]));
        if kind != 0x16 || major != 3 || length == 0 || length > 16_640 {
            return Some(Handshake::Broken);
        }
        let body = rest.get(5..)?;
        let fragment = body.get(..length);
        message.extend_from_slice(fragment.unwrap_or(body));
        if let Some(whole) = whole_message(&message) {
            return Some(whole);
        }
        fragment?;
        rest = body.get(length..)?;
    }
}

fn whole_message(message: &[u8]) -> Option<Handshake> {
    let [kind, a, b, c] = *message.get(..4)? else { return None };
    let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).ok()?;
    if kind != 1 || length > MAX_PEEK {
        return Some(Handshake::Broken);
    }
    message.get(4..4 + length).map(|body| Handshake::Whole(body.to_vec()))
}

/// A cursor over length-prefixed fields.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn u8(&mut self) -> Option<usize> {
        self.take(1)?.first().map(|b| usize::from(*b))
    }

    fn u16(&mut self) -> Option<usize> {
        match *self.take(2)? {
            [hi, lo] => Some(usize::from(u16::from_be_bytes([hi, lo]))),
            _ => None,
        }
    }

    fn vec8(&mut self) -> Option<Reader<'a>> {
        let n = self.u8()?;
        self.take(n).map(Reader)
    }

    fn vec16(&mut self) -> Option<Reader<'a>> {
        let n = self.u16()?;
        self.take(n).map(Reader)
    }
}

fn client_hello(body: &[u8]) -> Option<ClientHello> {
    let mut hello = ClientHello::default();
    let mut r = Reader(body);
    r.take(2 + 32)?;
    r.vec8()?;
    r.vec16()?;
    r.vec8()?;
    if r.0.is_empty() {
        return Some(hello);
    }
    let mut extensions = r.vec16()?;
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let mut value = extensions.vec16()?;
        match kind {
            0 => hello.server_name = server_name(&mut value)?,
            16 => hello.alpn = alpn(&mut value)?,
            _ => {}
        }
    }
    Some(hello)
}

/// RFC 6066, section 3. A name that is not printable ASCII is taken as absent.
#[expect(
    clippy::option_option,
    reason = "the outer None is a malformed message, the inner one an absent name"
)]
fn server_name(value: &mut Reader<'_>) -> Option<Option<String>> {
    let mut list = value.vec16()?;
    while !list.0.is_empty() {
        let kind = list.u8()?;
        let name = list.vec16()?.0;
        if kind == 0 {
            let text = std::str::from_utf8(name).ok().filter(|t| t.bytes().all(|b| b.is_ascii_graphic()));
            return Some(text.map(|t| t.strip_suffix('.').unwrap_or(t).to_ascii_lowercase()));
        }
    }
    Some(None)
}

/// RFC 7301, section 3.1.
fn alpn(value: &mut Reader<'_>) -> Option<Vec<String>> {
    let mut list = value.vec16()?;
    let mut names = Vec::new();
    while !list.0.is_empty() {
        let name = list.vec8()?.0;
        names.push(String::from_utf8_lossy(name).into_owned());
    }
    Some(names)
}

/// Looks for an HTTP request at the start of `bytes`: the HTTP/2 preface, or a request line that ends in
/// `HTTP/1.x`.
#[must_use]
pub fn http(bytes: &[u8]) -> Http {
    if bytes.len() >= H2_PREFACE.len() && bytes.starts_with(H2_PREFACE) {
        return Http::Http2;
    }
    if H2_PREFACE.starts_with(bytes) {
        return Http::NeedMore;
    }
    let line_end = bytes.iter().position(|b| *b == b'\n');
    let line = bytes.get(..line_end.unwrap_or(bytes.len())).unwrap_or_default();
    let method = line.iter().take_while(|b| is_token(**b)).count();
    if method == 0 || method > 32 || line.get(method).is_some_and(|b| *b != b' ') {
        return Http::No;
    }
    match line_end {
        None if bytes.len() >= MAX_PEEK => Http::No,
        None => Http::NeedMore,
        Some(_) => version(line),
    }
}

fn version(line: &[u8]) -> Http {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.ends_with(b" HTTP/1.1") {
        Http::Http11
    } else if line.ends_with(b" HTTP/1.0") {
        Http::Http10
    } else {
        Http::No
    }
}

/// RFC 9110, section 5.6.2.
fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn short(n: usize) -> u16 {
        u16::try_from(n).unwrap()
    }

    fn hello(sni: &str, alpn: &[&str]) -> Vec<u8> {
        let mut ext = Vec::new();
        if !sni.is_empty() {
            let n = short(sni.len());
            ext.extend_from_slice(&[0, 0]);
            ext.extend_from_slice(&(n + 5).to_be_bytes());
            ext.extend_from_slice(&(n + 3).to_be_bytes());
            ext.push(0);
            ext.extend_from_slice(&n.to_be_bytes());
            ext.extend_from_slice(sni.as_bytes());
        }
        if !alpn.is_empty() {
            let list: Vec<u8> = alpn
                .iter()
                .flat_map(|a| std::iter::once(u8::try_from(a.len()).unwrap()).chain(a.bytes()))
                .collect();
            ext.extend_from_slice(&[0, 16]);
            ext.extend_from_slice(&(short(list.len()) + 2).to_be_bytes());
            ext.extend_from_slice(&short(list.len()).to_be_bytes());
            ext.extend_from_slice(&list);
        }
        let mut body = vec![3, 3];
        body.extend_from_slice(&[7; 32]);
        body.push(0);
        body.extend_from_slice(&[0, 2, 0x13, 1, 1, 0]);
        body.extend_from_slice(&short(ext.len()).to_be_bytes());
        body.extend_from_slice(&ext);
        let mut message = vec![1, 0];
        message.extend_from_slice(&short(body.len()).to_be_bytes());
        message.extend_from_slice(&body);
        message
    }

    fn record(message: &[u8]) -> Vec<u8> {
        let mut out = vec![0x16, 3, 1];
        out.extend_from_slice(&short(message.len()).to_be_bytes());
        out.extend_from_slice(message);
        out
    }

    #[test]
    fn a_client_hello_tells_name_and_protocols() {
        let bytes = record(&hello("Secret.COM.", &["istio-http/1.1", "istio"]));
        let want = ClientHello {
            server_name: Some("secret.com".into()),
            alpn: vec!["istio-http/1.1".into(), "istio".into()],
        };
        assert_eq!(tls(&bytes), Tls::Hello(want));
    }

    #[test]
    fn a_client_hello_may_come_in_pieces_and_in_several_records() {
        let message = hello("a.example", &["h2"]);
        let bytes = record(&message);
        for n in 0..bytes.len() {
            assert_eq!(tls(&bytes[..n]), Tls::NeedMore, "{n}");
        }
        let (a, b) = message.split_at(20);
        let split = [record(a), record(b)].concat();
        assert!(matches!(tls(&split), Tls::Hello(h) if h.server_name.as_deref() == Some("a.example")));
    }

    #[test]
    fn other_bytes_are_not_tls() {
        assert_eq!(tls(b"GET / HTTP/1.1\r\n"), Tls::No);
        assert_eq!(tls(&[0x16, 2]), Tls::No);
        assert_eq!(tls(&[0x16, 3, 1, 0, 4, 2, 0, 0, 0]), Tls::No);
    }

    #[track_caller]
    fn check(bytes: &str, want: Http) {
        assert_eq!(http(bytes.as_bytes()), want, "{bytes:?}");
    }

    #[test]
    fn http_is_told_by_its_first_line() {
        check("", Http::NeedMore);
        check("PRI * HT", Http::NeedMore);
        check("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Http::Http2);
        check("GET / HTTP/1.1\r\n", Http::Http11);
        check("M-SEARCH * HTTP/1.0\n", Http::Http10);
        check("GET / HTTP/1.1", Http::NeedMore);
        check("GE", Http::NeedMore);
        check("GET /\r\n", Http::No);
        check("\x01\x02", Http::No);
        check("SSH-2.0-OpenSSH_9.6\r\n", Http::No);
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert_eq!((tls(&bytes), http(&bytes)), (tls(&bytes), http(&bytes)));
        }

        #[test]
        fn any_record_body_ends_in_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..250)) {
            let mut message = vec![1, 0, 0, u8::try_from(bytes.len()).unwrap()];
            message.extend_from_slice(&bytes);
            prop_assert_eq!(tls(&record(&message)), tls(&record(&message)));
        }
    }
}
