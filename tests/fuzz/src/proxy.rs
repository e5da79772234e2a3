//! Parsers of the data plane.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
use bytes::BytesMut;
use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::JwtAuthentication;
use envoy_types::pb::google::protobuf::Any;
use http::Method;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use proxy::authz::jwt;
use proxy::h1::body::Piece;
use proxy::h1::head::Malformed;
use proxy::h1::request::{Limits, may_be_whole, read_request};
use proxy::h1::response::read_response;
use proxy::http::flood::Meter;
use proxy::http::grpc_web::codec::{Decoder, Encoder};
use proxy::http::head::Head;
use proxy::http::headers;
use proxy::http::path::{Normalized, normalize};
use proxy::listener::{detect, proxy_protocol};
use proxy::metrics::standard::{Workload, peer_header};
use proxy::tables::{Tables, Update};
use proxy::xds::decode::Kind;
use proxy::xds::format::{Format, JsonFormat};
use proxy::xds::jwt::JwtAuthn;
use proxy::xds::listener::hcm::{EscapedSlashes, PathCleaning};
use proxy::xds::parse::{Resource, parse};

use crate::dns_message::{Kind as DnsKind, Reply, query, reply};
use crate::{choice, text};

/// A path has one form: what was normal stays, whatever the steps are.
pub fn path(bytes: &[u8]) {
    let Some((how, rest)) = choice(bytes) else { return };
    let Some(path) = text(rest) else { return };
    let escaped_slashes = match how & 3 {
        0 => EscapedSlashes::Keep,
        1 => EscapedSlashes::Reject,
        2 => EscapedSlashes::UnescapeAndRedirect,
        _ => EscapedSlashes::UnescapeAndForward,
    };
    let how = PathCleaning { normalize: how & 4 != 0, merge_slashes: how & 8 != 0, escaped_slashes };
    let once = match normalize(path, how) {
        Normalized::Path(once) => once.into_owned(),
        Normalized::Redirect(once) => once,
        Normalized::Invalid => return,
    };
    assert!(once.len() <= 3 * path.len() + 1, "{path:?} became {once:?}");
    assert_eq!(normalize(&once, how), Normalized::Path(once.as_str().into()), "{path:?}");
    let plain = once.split('?').next().unwrap_or_default();
    assert!(!once.contains('#'));
    if how.normalize {
        assert!(!plain.contains('\\'), "{path:?} became {once:?}");
        let dots = |s: &str| s == "." || s == ".." || s.starts_with("..;");
        assert!(!plain.split('/').any(dots), "{path:?} became {once:?}");
    }
    if how.merge_slashes {
        assert!(!plain.contains("//"), "{path:?} became {once:?}");
    }
    let slash = |w: &[u8]| w.eq_ignore_ascii_case(b"%2f") || w.eq_ignore_ascii_case(b"%5c");
    if how.escaped_slashes != EscapedSlashes::Keep {
        assert!(!plain.as_bytes().windows(3).any(slash), "{path:?} became {once:?}");
    }
}

fn header_map(bytes: &[u8]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for line in bytes.split(|b| *b == b'\n').take(100) {
        let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
        let (name, value) = line.split_at(colon);
        let parsed = (HeaderName::from_bytes(name), HeaderValue::from_bytes(&value[1..]));
        if let (Ok(name), Ok(value)) = parsed {
            map.append(name, value);
        }
    }
    map
}

/// What is meant for one hop goes, what others rest on stays, and a second look finds nothing more to do.
pub fn headers(bytes: &[u8]) {
    let Some((flags, rest)) = choice(bytes) else { return };
    let upgrade = flags & 1 != 0;
    let came = header_map(rest);
    let mut map = came.clone();
    let found = headers::look_over(&map);
    headers::strip_hop_by_hop(&mut map, found, upgrade);
    headers::strip_internal(&mut map, found);
    headers::join_cookies(&mut map);
    headers::join_lines(&mut map);
    for name in [header::TRANSFER_ENCODING, headers::KEEP_ALIVE, headers::PROXY_CONNECTION] {
        assert!(!map.contains_key(&name), "{name} in {map:?}");
    }
    assert!(map.get_all(header::CONNECTION).iter().all(|v| upgrade && v == "upgrade"), "{map:?}");
    assert!(upgrade || !map.contains_key(header::UPGRADE));
    assert!(map.get_all(header::TE).iter().all(|v| v == "trailers"));
    for name in [header::HOST, header::CONTENT_LENGTH, header::AUTHORIZATION] {
        assert!(came.get_all(&name).iter().eq(map.get_all(&name).iter()), "{name} of {came:?} in {map:?}");
    }
    assert!(map.get_all(header::COOKIE).iter().count() <= 1);
    let mut again = map.clone();
    let found = headers::look_over(&again);
    headers::strip_hop_by_hop(&mut again, found, upgrade);
    headers::strip_internal(&mut again, found);
    headers::join_cookies(&mut again);
    headers::join_lines(&mut again);
    assert_eq!(map, again);
    let _client = headers::forwarded_for(&map, u32::from(flags >> 1));
    if let Some(timeout) = headers::grpc_timeout(&map) {
        assert!(timeout.as_secs() < 100_000_000 * 3600);
    }
}

/// A request's head is read the same in whatever pieces it comes, and what another parser finds ambiguous in it is not
/// read at all.
pub fn request_head(bytes: &[u8]) {
    let Some((piece, bytes)) = choice(bytes) else { return };
    let limits = Limits { headers: 100, bytes: 8192 };
    let whole = read_request(&mut BytesMut::from(bytes), limits);
    let (mut came, mut seen, mut parts) = (BytesMut::new(), 0, Ok(None));
    for piece in bytes.chunks(usize::from(piece) + 1) {
        came.extend_from_slice(piece);
        if seen == 0 || may_be_whole(&came, seen) {
            parts = read_request(&mut came, limits);
            if !matches!(parts, Ok(None)) {
                break;
            }
        }
        seen = came.len();
    }
    let Ok(Some(request)) = whole else {
        assert!(!matches!(parts, Ok(Some(_))), "{whole:?} but {parts:?}");
        return;
    };
    let Ok(Some(parts)) = parts else { panic!("{request:?} but {parts:?}") };
    assert_eq!(format!("{request:?}"), format!("{parts:?}"));
    let mut fields = [httparse::EMPTY_HEADER; 100];
    let mut other = httparse::Request::new(&mut fields);
    let Ok(httparse::Status::Complete(_)) = other.parse(bytes) else { panic!("{request:?} is no request") };
    let count = |name: &str| other.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name)).count();
    let (lengths, codings) = (count("content-length"), count("transfer-encoding"));
    assert!(lengths < 2 && (lengths == 0 || codings == 0), "{lengths} lengths, {codings} encodings");
    assert_eq!(other.method, Some(request.method.as_str()));
    assert_eq!(other.headers.len(), request.headers.len());
}

/// A response and its body are read the same in whatever pieces they come.
pub fn response(bytes: &[u8]) {
    let Some((how, bytes)) = choice(bytes) else { return };
    let method = if how & 1 == 0 { Method::GET } else { Method::HEAD };
    let whole = whole_response(bytes, bytes.len().max(1), &method);
    let parts = whole_response(bytes, usize::from(how >> 1) + 1, &method);
    assert!(whole == parts || (whole.is_err() && parts.is_err()), "{whole:?} but {parts:?}");
}

/// Head, body, trailers, and whether the connection stays, of a response that comes in pieces of `step`.
fn whole_response(
    bytes: &[u8],
    step: usize,
    method: &Method,
) -> Result<Option<(HeaderMap, Vec<u8>, HeaderMap, bool)>, Malformed> {
    let (mut came, mut pieces) = (BytesMut::new(), bytes.chunks(step));
    let head = loop {
        if let Some(head) = read_response(&mut came, method)? {
            break head;
        }
        let Some(piece) = pieces.next() else { return Ok(None) };
        came.extend_from_slice(piece);
    };
    let (mut decoder, mut ended) = (head.body, false);
    let (mut data, mut trailers) = (Vec::new(), HeaderMap::new());
    loop {
        match decoder.next(&mut came, ended)? {
            Piece::Data(piece) => data.extend_from_slice(&piece),
            Piece::Trailers(found) => trailers = found,
            Piece::Over => return Ok(Some((head.headers, data, trailers, head.keep_alive))),
            Piece::NeedMore => match pieces.next() {
                Some(piece) => came.extend_from_slice(piece),
                None => ended = true,
            },
        }
    }
}

/// Frames are counted the same in whatever pieces they come, and what passes is within the limits.
pub fn flood(bytes: &[u8]) {
    let Some((piece, bytes)) = choice(bytes) else { return };
    let now = tokio::time::Instant::now();
    let (mut whole, mut parts) = (Meter::new(now), Meter::new(now));
    let outcome = whole.on_read(bytes, now);
    let pieces = bytes.chunks(usize::from(piece) + 1).try_for_each(|piece| parts.on_read(piece, now));
    assert_eq!(outcome, pieces);
    if outcome.is_err() {
        return;
    }
    let mut rest = bytes.get(detect::H2_PREFACE.len()..).unwrap_or_default();
    let mut kinds = BTreeMap::<u8, u64>::new();
    while let Some(([a, b, c, kind, flags, ..], tail)) = rest.split_first_chunk::<9>() {
        let acknowledges = matches!(kind, 4 | 6) && flags & 1 != 0;
        *kinds.entry(*kind).or_default() += u64::from(!acknowledges);
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        rest = tail.get(length..).unwrap_or_default();
    }
    let of = |kind: u8| kinds.get(&kind).copied().unwrap_or_default();
    assert!(of(3) <= of(1) + 100, "resets in {kinds:?}");
    assert!(of(4) + of(6) <= 1000, "control frames in {kinds:?}");
    assert!(of(2) <= 100 * (1 + of(1)), "priorities in {kinds:?}");
}

/// A ClientHello and a request line are told from their beginnings, and the name in it is the one that rustls reads.
pub fn detect(bytes: &[u8]) {
    let (tls, http) = (detect::tls(bytes), detect::http(bytes));
    if let Some(at) = bytes.first().map(|b| usize::from(*b) % bytes.len()) {
        let before = &bytes[..at];
        match detect::tls(before) {
            detect::Tls::NeedMore => {}
            found => assert_eq!(found, tls, "after {at} bytes"),
        }
        match detect::http(before) {
            detect::Http::NeedMore => {}
            found => assert_eq!(found, http, "after {at} bytes"),
        }
    }
    if bytes.len() > detect::MAX_PEEK {
        return;
    }
    let mut acceptor = rustls::server::Acceptor::default();
    if acceptor.read_tls(&mut &bytes[..]).is_err() {
        return;
    }
    let Ok(Some(accepted)) = acceptor.accept() else { return };
    let theirs = accepted.client_hello();
    let detect::Tls::Hello(ours) = tls else { panic!("rustls takes it, we say {tls:?}") };
    if let Some(name) = theirs.server_name() {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        assert_eq!(ours.server_name, Some(name));
    }
    let alpn = |protocol: &[u8]| String::from_utf8_lossy(protocol).into_owned();
    let theirs: Vec<String> = theirs.alpn().into_iter().flatten().map(alpn).collect();
    assert_eq!(ours.alpn, theirs);
}

/// A header ends where it says; nothing of it is different with other bytes behind it.
pub fn proxy_protocol(bytes: &[u8]) {
    use proxy_protocol::{Proxied, parse, tlvs};
    let whole = parse(bytes);
    let Proxied::Header { length, addresses } = whole else { return };
    assert!(length <= bytes.len() && length <= 16 + 2048);
    assert_eq!(parse(&bytes[..length]), whole);
    assert_eq!(parse(&bytes[..length - 1]), Proxied::NeedMore);
    let told: usize = tlvs(&bytes[..length]).iter().map(|tlv| 3 + tlv.value.len()).sum();
    assert!(told < length);
    if let Some((from, to)) = addresses {
        let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
        let (ip, port) = ((from.ip(), to.ip()), (from.port(), to.port()));
        let text = format!("PROXY {family} {} {} {} {}\r\n", ip.0, ip.1, port.0, port.1);
        let plain = |a: std::net::SocketAddr| std::net::SocketAddr::new(a.ip(), a.port());
        let expected = Some((plain(from), plain(to)));
        assert_eq!(parse(text.as_bytes()), Proxied::Header { length: text.len(), addresses: expected });
    }
}

/// Base64 in any pieces is what it is in one, and what is written as base64 reads as what it was.
pub fn grpc_web(bytes: &[u8]) {
    let Some((size, body)) = choice(bytes) else { return };
    let size = usize::from(size).max(1);
    let mut whole = Decoder::default();
    let expected = whole.piece(body).map(|read| read.to_vec());
    let mut decoder = Decoder::default();
    let pieces: Result<Vec<_>, _> = body.chunks(size).map(|piece| decoder.piece(piece)).collect();
    assert_eq!(pieces.map(|pieces| pieces.concat()), expected);
    assert!(expected.is_err() || decoder.is_whole() == whole.is_whole());
    let mut encoder = Encoder::new(true);
    let text: Vec<_> = body.chunks(size).map(|piece| encoder.piece(piece.to_vec().into())).collect();
    let mut reader = Decoder::default();
    let again = reader.piece(&text.concat()).expect("our own base64");
    assert!(reader.is_whole() && body.starts_with(&again));
}

/// Replies of name servers: what is no reply to the query is none, and addresses are of the kind that was asked for.
pub fn dns_reply(bytes: &[u8]) {
    let Some((kind, bytes)) = choice(bytes) else { return };
    let kind = if kind & 1 == 0 { DnsKind::V4 } else { DnsKind::V6 };
    let Some((id, rest)) = bytes.split_first_chunk::<2>() else { return };
    let Some(asked) = query(u16::from_be_bytes(*id), "a.example", kind) else { panic!("a name") };
    // the id and the question are right as they come, so that what follows is reached
    let mut answer = bytes.to_vec();
    if rest.first() == Some(&0x81) {
        answer.splice(12.min(answer.len()).., asked.get(12..27).unwrap_or_default().iter().copied());
        answer.extend(rest.get(10..).unwrap_or_default());
    }
    for bytes in [bytes, &answer] {
        if let Some(Reply::Addresses(found, ttl)) = reply(&asked, bytes) {
            assert!(found.iter().all(|a| a.is_ipv4() == (kind == DnsKind::V4)));
            assert!(found.len() * 16 <= bytes.len() * 2);
            assert!(ttl.is_none_or(|ttl| ttl.as_secs() <= 0x7fff_ffff));
        }
    }
    // our own server reads our own query
    if let Some(name) = text(rest)
        && let Some(asked) = query(7, name, kind)
        && name.is_ascii()
    {
        let read = agent::dns::message::Query::parse(&asked).expect("a query that we made");
        assert_eq!(read.name, name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase());
    }
}

static JWT: LazyLock<JwtAuthn> = LazyLock::new(|| {
    // public keys of RFC 7517 (A.1) and RFC 8037 (A.2)
    let keys = r#"{"keys":[{"kty":"EC","crv":"P-256","kid":"1",
        "x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"},
        {"kty":"OKP","crv":"Ed25519","kid":"2","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
        {"kty":"RSA","kid":"3","e":"AQAB","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"}]}"#;
    let yaml = serde_json::json!({
        "providers": {"p": {
            "issuer": "i", "local_jwks": {"inline_string": keys}, "audiences": ["me"],
            "from_headers": [{"name": "authorization", "value_prefix": "Bearer "}],
            "from_params": ["token"], "from_cookies": ["token"],
        }},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}],
    });
    let pb = wire::json::message_from_json::<JwtAuthentication>(&yaml).expect("a filter");
    JwtAuthn::new(pb).expect("a filter")
});

/// Nobody makes a token without a key, wherever it is; key sets are read or refused.
pub fn jwt(bytes: &[u8]) {
    let Some((place, rest)) = choice(bytes) else { return };
    if place & 3 == 3 {
        let Some(keys) = text(rest) else { return };
        let _set = jwt_keys(keys);
        return;
    }
    let Some(token) = text(rest) else { return };
    // most inputs are the parts of a token in plain text, encoded here
    let parts: Vec<&str> = token.splitn(3, '\n').collect();
    let token = match parts.as_slice() {
        [a, b, c] => [a, b, c].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part)).join("."),
        _ => token.to_owned(),
    };
    let mut map = HeaderMap::new();
    let mut path = "/".to_owned();
    match place & 3 {
        0 => path = format!("/?a=b&token={token}"),
        1 => drop(HeaderValue::try_from(format!("Bearer {token}")).map(|v| map.append("authorization", v))),
        _ => drop(HeaderValue::try_from(format!("a=b; token={token}")).map(|v| map.append("cookie", v))),
    }
    let head =
        Head { method: &Method::GET, path_and_query: &path, authority: "h", scheme: "http", headers: &map };
    let requirement = JWT.rules[0].requires.as_ref().expect("a requirement");
    assert!(jwt::check(&JWT, requirement, &head, 1_000_000).is_err(), "a forged token: {token}");
    let without = jwt::without_parameter(&path, "token");
    assert_eq!(jwt::without_parameter(&without, "token"), without);
}

fn jwt_keys(keys: &str) -> Option<JwtAuthn> {
    let yaml = serde_json::json!({
        "providers": {"p": {"local_jwks": {"inline_string": keys}}},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}],
    });
    JwtAuthn::new(wire::json::message_from_json::<JwtAuthentication>(&yaml).ok()?).ok()
}

/// Resources of any content become tables or are refused by name, the same each time.
pub fn resources(bytes: &[u8]) {
    let Some((kind, mut rest)) = choice(bytes) else { return };
    let mut tables = Tables::default();
    let mut kind = usize::from(kind);
    // several resources: each after its length
    while let Some(([hi, lo], tail)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes([*hi, *lo])).min(tail.len());
        let (value, tail) = tail.split_at(length);
        rest = tail;
        let of = Kind::SUBSCRIBED[kind % 4];
        kind /= 4;
        let any = Any { type_url: of.url().to_owned(), value: value.to_vec() };
        let resource = Resource { name: None, version: String::new(), any };
        let parsed = match parse(of, resource.clone(), jiff::Timestamp::UNIX_EPOCH) {
            Ok(parsed) => parsed,
            Err(rejected) => {
                let again = parse(of, resource, jiff::Timestamp::UNIX_EPOCH).expect_err("as before");
                assert_eq!((rejected.kind, rejected.name), (again.kind, again.name));
                continue;
            }
        };
        assert!(!parsed.name.is_empty());
        let (next, _rejected) = tables.with(&Update { changes: vec![parsed.change] }, &BTreeMap::new());
        tables = next;
    }
    let (clusters, listeners) = tables.warming();
    assert!(clusters.len() <= tables.known.clusters.len());
    assert!(listeners.len() <= tables.known.listeners.len());
}

/// Bootstrap files, as text.
pub fn bootstrap(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    let Ok(pb) = wire::json::message_from_yaml::<Bootstrap>(text) else { return };
    let printed = wire::json::message_to_json(&pb).expect("what was read can be printed");
    let again = wire::json::message_from_json::<Bootstrap>(&printed).expect("what was printed can be read");
    assert_eq!(wire::canonical::any(&pb), wire::canonical::any(&again), "{printed}");
    let _config = proxy::bootstrap::parse(text, jiff::Timestamp::UNIX_EPOCH);
}

/// Access log formats. What is escaped comes out as it was.
pub fn format(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    let escaped = text.replace('%', "%%");
    let plain = Format::parse(&escaped).expect("nothing in it means anything");
    assert_eq!(plain.constant(), Some(text));
    let _format = Format::parse(text);
    if let Ok(json) = serde_json::from_str(text) {
        let _format = JsonFormat::new(&json);
    }
}

/// What a peer tells of itself: what we tell, we read.
pub fn peer(bytes: &[u8]) {
    if let Ok(value) = HeaderValue::from_bytes(bytes) {
        let _workload = Workload::from_header(&value);
    }
    let Some(text) = text(bytes) else { return };
    let workload = Workload::from_endpoint(text);
    assert!(!workload.name.is_empty() && !workload.canonical_service.is_empty());
    let Ok(metadata) = serde_json::from_str::<serde_json::Map<_, _>>(text) else { return };
    let Some(header) = peer_header(&metadata) else { return };
    assert_eq!(Workload::from_header(&header), Some(Workload::from_metadata(&metadata)), "{metadata:?}");
}
