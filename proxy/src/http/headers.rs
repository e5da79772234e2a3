//! Headers that change on the way through a proxy: hop-by-hop ones go (RFC 9110, section 7.6.1), forwarding ones
//! come, and the operations of routes are carried out. Pure.

use std::net::{IpAddr, SocketAddr};

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use smallvec::SmallVec;

use crate::h1::head::length;
use crate::tls::Peer;
use crate::xds::format::Format;
use crate::xds::mutation::{Append, HeaderOps, NewValue};

/// The name of a header that this proxy reads or writes.
macro_rules! names {
    ($($constant:ident = $name:literal;)*) => {
        $(
            #[doc = concat!("`", $name, "`")]
            pub const $constant: HeaderName = HeaderName::from_static($name);
        )*
    };
}

names! {
    ATTEMPT_COUNT = "x-envoy-attempt-count";
    EXPECTED_TIMEOUT = "x-envoy-expected-rq-timeout-ms";
    EXTERNAL_ADDRESS = "x-envoy-external-address";
    FORWARDED_CLIENT_CERT = "x-forwarded-client-cert";
    FORWARDED_FOR = "x-forwarded-for";
    FORWARDED_HOST = "x-forwarded-host";
    FORWARDED_PORT = "x-forwarded-port";
    FORWARDED_PROTO = "x-forwarded-proto";
    GRPC_MESSAGE = "grpc-message";
    GRPC_STATUS = "grpc-status";
    GRPC_TIMEOUT = "grpc-timeout";
    KEEP_ALIVE = "keep-alive";
    ORIGINAL_PATH = "x-envoy-original-path";
    ORIGINAL_HOST = "x-envoy-original-host";
    OVERLOADED = "x-envoy-overloaded";
    PEER_METADATA = "x-envoy-peer-metadata";
    PEER_METADATA_ID = "x-envoy-peer-metadata-id";
    PROXY_CONNECTION = "proxy-connection";
    RATELIMITED = "x-envoy-ratelimited";
    REQUEST_ID = "x-request-id";
    UPSTREAM_SERVICE_TIME = "x-envoy-upstream-service-time";
}

/// Which headers there are, of those that need a second look. What was not found is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found(u16);

impl Found {
    /// `connection`
    pub const CONNECTION: Self = Self(1);
    /// `transfer-encoding`
    pub const TRANSFER_ENCODING: Self = Self(1 << 2);
    /// `upgrade`
    pub const UPGRADE: Self = Self(1 << 3);
    /// Another one that is meant for one hop.
    pub const HOP_BY_HOP: Self = Self(1 << 4);
    /// `content-type`
    pub const CONTENT_TYPE: Self = Self(1 << 5);
    /// `expect`
    pub const EXPECT: Self = Self(1 << 6);
    /// `x-envoy-peer-metadata` or `x-envoy-peer-metadata-id`
    pub const PEER_METADATA: Self = Self(1 << 7);
    /// Another one of Envoy's own.
    pub const INTERNAL: Self = Self(1 << 8);
    /// `x-forwarded-for`
    pub const FORWARDED_FOR: Self = Self(1 << 9);
    /// `x-forwarded-proto`
    pub const FORWARDED_PROTO: Self = Self(1 << 10);
    /// `x-forwarded-client-cert`
    pub const CLIENT_CERT: Self = Self(1 << 11);
    /// `x-request-id`
    pub const REQUEST_ID: Self = Self(1 << 12);
    /// A name that is none.
    pub const NO_NAME: Self = Self(1 << 13);
    /// `content-length`
    pub const CONTENT_LENGTH: Self = Self(1 << 14);
    /// White space around a value.
    pub const SPACE: Self = Self(1 << 15);

    /// Whether any of these may be there.
    #[must_use]
    pub fn has(self, any: Self) -> bool {
        self.0 & any.0 != 0
    }

    /// These, too.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Looks over the headers once, so that the usual request, which has few of these, costs few look-ups.
#[must_use]
pub fn look_over(headers: &HeaderMap) -> Found {
    headers.iter().fold(Found::default(), |found, (name, value)| {
        let space = if is_spaced(value.as_bytes()) { Found::SPACE } else { Found::default() };
        found.and(what_it_is(name.as_str())).and(space)
    })
}

fn is_spaced(value: &[u8]) -> bool {
    [value.first(), value.last()].iter().any(|end| matches!(end, Some(b' ' | b'\t')))
}

/// Takes the white space around values away, as HTTP/1 does (RFC 9110, section 5.5): a policy must see what the server
/// will see.
pub fn trim(headers: &mut HeaderMap) {
    for value in headers.values_mut().filter(|value| is_spaced(value.as_bytes())) {
        let trimmed = HeaderValue::from_bytes(value.as_bytes().trim_ascii());
        *value = trimmed.unwrap_or_else(|_| HeaderValue::from_static(""));
    }
}

fn what_it_is(name: &str) -> Found {
    match name {
        "connection" => Found::CONNECTION,
        "transfer-encoding" => Found::TRANSFER_ENCODING.and(Found::HOP_BY_HOP),
        "upgrade" => Found::UPGRADE.and(Found::HOP_BY_HOP),
        "te" | "proxy-authenticate" | "keep-alive" | "proxy-connection" => Found::HOP_BY_HOP,
        "content-type" => Found::CONTENT_TYPE,
        "content-length" => Found::CONTENT_LENGTH,
        "expect" => Found::EXPECT,
        "x-forwarded-for" => Found::FORWARDED_FOR,
        "x-forwarded-proto" => Found::FORWARDED_PROTO,
        "x-forwarded-client-cert" => Found::CLIENT_CERT,
        "x-request-id" => Found::REQUEST_ID,
        "x-envoy-peer-metadata" | "x-envoy-peer-metadata-id" => Found::PEER_METADATA,
        _ if !is_token(name) => Found::NO_NAME,
        _ if name.starts_with("x-envoy-") => Found::INTERNAL,
        _ => Found::default(),
    }
}

/// Whether headers mean the same everywhere, which must be asked of those that came over HTTP/2: each name is a token
/// (RFC 9110, section 5.1), a length is a number.
#[must_use]
pub fn are_clear(headers: &HeaderMap) -> bool {
    have_clear_length(headers) && headers.keys().all(|name| is_token(name.as_str()))
}

/// Whether no length is anything but a number; the library of HTTP/2 takes none for 0.
#[must_use]
pub fn have_clear_length(headers: &HeaderMap) -> bool {
    headers.get_all(header::CONTENT_LENGTH).iter().all(|value| length(value).is_some())
}

/// The library of HTTP/2 lets nothing through that is no token, but a quotation mark.
fn is_token(name: &str) -> bool {
    memchr::memchr(b'"', name.as_bytes()).is_none()
}

/// Takes away what is meant for one hop, with the headers that `connection` names. `te: trailers` stays, because
/// gRPC needs it end to end; upgrade headers stay when an upgrade is on its way.
pub fn strip_hop_by_hop(headers: &mut HeaderMap, found: Found, upgrade: bool) {
    if found.has(Found::CONNECTION) && !is_about_the_connection_alone(headers) {
        strip_named(headers);
    }
    if found.has(Found::HOP_BY_HOP) {
        let has_trailers = |line: &[u8]| {
            line.split(|b| *b == b',').any(|te| te.trim_ascii().eq_ignore_ascii_case(b"trailers"))
        };
        let trailers = headers.get_all(header::TE).iter().any(|v| has_trailers(v.as_bytes()));
        for name in [header::TE, header::TRANSFER_ENCODING, KEEP_ALIVE, PROXY_CONNECTION] {
            headers.remove(name);
        }
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
        if !upgrade {
            headers.remove(header::UPGRADE);
        }
    }
    if upgrade && found.has(Found::CONNECTION.and(Found::HOP_BY_HOP)) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    } else if found.has(Found::CONNECTION) {
        headers.remove(header::CONNECTION);
    }
}

/// `connection: keep-alive` or `close`, as nearly every peer says it, names no header.
fn is_about_the_connection_alone(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(header::CONNECTION).iter().map(HeaderValue::as_bytes);
    values.all(|value| value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close"))
}

/// Takes away the headers that `connection` names.
fn strip_named(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(is_removable)
        .collect();
    for name in named {
        headers.remove(name);
    }
}

/// A client may not use `connection` to take away headers that policies or the framing rest on.
fn is_removable(name: &HeaderName) -> bool {
    let kept = [header::HOST, header::CONTENT_LENGTH, header::TE, header::UPGRADE, header::AUTHORIZATION];
    !kept.contains(name)
        && !name.as_str().starts_with("x-forwarded-")
        && !name.as_str().starts_with("x-envoy-")
}

/// Takes away Envoy's own request headers that a client sent: nobody outside this proxy may steer it by them, and
/// no address counts as internal. What the mesh itself exchanges stays for whoever reads it.
pub fn strip_internal(headers: &mut HeaderMap, found: Found) {
    if !found.has(Found::INTERNAL) {
        return;
    }
    let own: Vec<HeaderName> = headers
        .keys()
        .filter(|n| n.as_str().starts_with("x-envoy-"))
        .filter(|n| {
            **n != PEER_METADATA && **n != PEER_METADATA_ID && **n != ATTEMPT_COUNT && **n != EXPECTED_TIMEOUT
        })
        .cloned()
        .collect();
    for name in own {
        headers.remove(name);
    }
}

/// Joins the pieces into which HTTP/2 may split `cookie` (RFC 9113, section 8.2.3).
pub fn join_cookies(headers: &mut HeaderMap) {
    let crumbs = || headers.get_all(header::COOKIE).iter();
    if crumbs().nth(1).is_none() && crumbs().all(|only| !only.is_empty()) {
        return;
    }
    let mut whole = Vec::new();
    for crumb in crumbs() {
        if !whole.is_empty() {
            whole.extend_from_slice(b"; ");
        }
        whole.extend_from_slice(crumb.as_bytes());
    }
    headers.remove(header::COOKIE);
    if let Ok(value) = HeaderValue::from_bytes(&whole)
        && !whole.is_empty()
    {
        headers.insert(header::COOKIE, value);
    }
}

/// Takes hop-by-hop headers out of a response.
pub fn strip_response(headers: &mut HeaderMap, upgrade: bool) {
    let found = look_over(headers);
    strip_hop_by_hop(headers, found, upgrade);
}

/// Whether a header has one value, to which others are added with commas; Envoy keeps these as one line.
fn is_one_line(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "accept"
            | "accept-encoding"
            | "access-control-request-headers"
            | "access-control-request-method"
            | "cache-control"
            | "content-type"
            | "date"
            | "expect"
            | "grpc-message"
            | "grpc-status"
            | "grpc-timeout"
            | "location"
            | "origin"
            | "server"
            | "te"
            | "user-agent"
            | "via"
            | "x-client-trace-id"
            | "x-envoy-attempt-count"
            | "x-envoy-decorator-operation"
            | "x-envoy-original-path"
            | "x-envoy-upstream-service-time"
            | "x-forwarded-client-cert"
            | "x-forwarded-for"
            | "x-forwarded-host"
            | "x-forwarded-port"
            | "x-forwarded-proto"
            | "x-request-id"
    )
}

/// Adds a value: to the line of a header that has only one, or else as a line of its own.
pub fn append(headers: &mut HeaderMap, name: &HeaderName, value: HeaderValue) {
    match headers.get(name).filter(|_| is_one_line(name)) {
        None => {
            headers.append(name.clone(), value);
        }
        Some(there) if there.is_empty() => {
            headers.insert(name.clone(), value);
        }
        Some(_) if value.is_empty() => {}
        Some(there) => {
            let whole = [there.as_bytes(), b",", value.as_bytes()].concat();
            if let Ok(whole) = HeaderValue::from_bytes(&whole) {
                headers.insert(name.clone(), whole);
            }
        }
    }
}

/// Makes one line of each header that has one value and came in several lines.
pub fn join_lines(headers: &mut HeaderMap) {
    if headers.len() == headers.keys_len() {
        return;
    }
    let repeated = |name: &&HeaderName| is_one_line(name) && headers.get_all(*name).iter().nth(1).is_some();
    let names: Vec<HeaderName> = headers.keys().filter(repeated).cloned().collect();
    for name in names {
        let lines: Vec<HeaderValue> = headers.get_all(&name).iter().cloned().collect();
        headers.remove(&name);
        for line in lines {
            append(headers, &name, line);
        }
    }
}

/// Carries out one level's operations. `render` evaluates values that are made from the request or response.
///
/// What goes, goes first. What is there then decides which values come; those that replace come before those that are
/// added (Envoy's order).
pub fn apply(ops: &HeaderOps, headers: &mut HeaderMap, render: &dyn Fn(&Format, &HeaderMap) -> String) {
    for name in &ops.remove {
        headers.remove(name);
    }
    let mut added = SmallVec::<[(&HeaderName, HeaderValue); 4]>::new();
    let mut replaced = SmallVec::<[(&HeaderName, HeaderValue); 4]>::new();
    for add in &ops.add {
        let value = match &add.value {
            NewValue::Static(value) => value.clone(),
            NewValue::Format(format) => match HeaderValue::try_from(render(format, headers)) {
                Ok(value) => value,
                Err(_) => continue, // bytes that no header may hold: there is no value
            },
        };
        if value.is_empty() && !add.keep_empty {
            continue;
        }
        match add.append {
            Append::AppendOrAdd => added.push((&add.name, value)),
            Append::AddIfAbsent if headers.contains_key(&add.name) => {}
            Append::AddIfAbsent => added.push((&add.name, value)),
            Append::OverwriteIfExists if !headers.contains_key(&add.name) => {}
            Append::Overwrite | Append::OverwriteIfExists => replaced.push((&add.name, value)),
        }
    }
    for (name, value) in replaced {
        headers.insert(name, value);
    }
    for (name, value) in added {
        append(headers, name, value);
    }
}

/// The client's address out of `x-forwarded-for`: the entry that `trusted_hops` proxies in front have added, or the
/// last one.
#[must_use]
pub fn forwarded_for(headers: &HeaderMap, trusted_hops: u32) -> Option<IpAddr> {
    let mut entries = Vec::new();
    for value in headers.get_all(FORWARDED_FOR) {
        entries.extend(value.to_str().ok()?.split(',').map(str::trim));
    }
    let back = usize::try_from(trusted_hops).ok()?;
    let at = entries.len().checked_sub(1 + back)?;
    let entry = entries.get(at)?;
    entry.parse().ok().or_else(|| entry.parse::<SocketAddr>().ok().map(|a| a.ip()))
}

/// Appends the client's address to `x-forwarded-for`.
pub fn append_forwarded_for(headers: &mut HeaderMap, address: IpAddr) {
    let mut text = String::new();
    for value in headers.get_all(FORWARDED_FOR) {
        if let Ok(value) = value.to_str() {
            text.push_str(value);
            text.push(',');
        }
    }
    text.push_str(&address.to_string());
    if let Ok(value) = HeaderValue::try_from(text) {
        headers.insert(FORWARDED_FOR, value);
    }
}

/// A number as a header value.
#[must_use]
pub fn number(n: u64) -> HeaderValue {
    HeaderValue::from(n)
}

/// A fresh request id.
#[must_use]
pub fn request_id(rng: &mut fastrand::Rng) -> HeaderValue {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let id = uuid::Builder::from_random_bytes(rng.u128(..).to_be_bytes()).into_uuid();
    HeaderValue::from_str(id.hyphenated().encode_lower(&mut text)).unwrap_or(HeaderValue::from_static("0"))
}

/// Which facts of the client's certificate go into `x-forwarded-client-cert`.
#[derive(Clone, Copy, Debug, Default)]
pub struct CertFacts {
    /// `Subject`
    pub subject: bool,
    /// `URI`
    pub uri: bool,
    /// `DNS`
    pub dns: bool,
}

/// One element of `x-forwarded-client-cert` about this peer; `by` are our own URI names.
#[must_use]
pub fn client_cert_element(peer: &Peer, by: &[String], facts: CertFacts) -> String {
    let mut parts: Vec<String> = by.iter().map(|uri| format!("By={uri}")).collect();
    parts.push(format!("Hash={}", peer.fingerprint));
    if facts.subject {
        parts.push(format!("Subject=\"{}\"", peer.subject.replace('\\', "\\\\").replace('"', "\\\"")));
    }
    if facts.uri {
        if peer.uris.is_empty() {
            parts.push("URI=".to_owned());
        }
        parts.extend(peer.uris.iter().map(|uri| format!("URI={uri}")));
    }
    if facts.dns {
        parts.extend(peer.dns.iter().map(|dns| format!("DNS={dns}")));
    }
    parts.join(";")
}

/// The timeout in a `grpc-timeout` header (gRPC over HTTP/2): up to eight digits and a unit.
#[must_use]
pub fn grpc_timeout(headers: &HeaderMap) -> Option<std::time::Duration> {
    use std::time::Duration;
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(list: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn hop_by_hop_headers_go_with_those_they_name() {
        let mut headers = map(&[
            ("connection", "close, x-mine, host"),
            ("x-mine", "1"),
            ("host", "h"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("accept", "*/*"),
        ]);
        let found = look_over(&headers);
        strip_hop_by_hop(&mut headers, found, false);
        assert_eq!(names(&headers), ["accept", "host", "te"]);
    }

    #[test]
    fn white_space_around_values_goes_and_within_them_stays() {
        let mut headers = map(&[("x-a", "a b"), ("x-b", "")]);
        assert!(!look_over(&headers).has(Found::SPACE));
        for value in [" a b", "a b\t", "\t a b "] {
            headers.append("x-a", value.parse().unwrap());
            assert!(look_over(&headers).has(Found::SPACE));
            trim(&mut headers);
            assert!(!look_over(&headers).has(Found::SPACE));
        }
        assert!(headers.get_all("x-a").iter().all(|value| value == "a b"));
        headers.insert("x-b", " ".parse().unwrap());
        trim(&mut headers);
        assert_eq!(headers["x-b"], "");
    }

    #[test]
    fn an_upgrade_keeps_its_two_headers() {
        let mut headers = map(&[("connection", "Upgrade"), ("upgrade", "websocket")]);
        let found = look_over(&headers);
        strip_hop_by_hop(&mut headers, found, true);
        assert_eq!(names(&headers), ["connection", "upgrade"]);
    }

    #[test]
    fn clients_cannot_steer_the_proxy() {
        let mut headers = map(&[
            ("x-envoy-original-path", "/public"),
            ("x-envoy-retry-on", "5xx"),
            ("x-envoy-peer-metadata", "abc"),
            ("x-mine", "1"),
        ]);
        let found = look_over(&headers);
        strip_internal(&mut headers, found);
        assert_eq!(names(&headers), ["x-envoy-peer-metadata", "x-mine"]);
    }

    #[test]
    fn values_of_one_line_headers_are_joined_and_others_stay_apart() {
        let mut headers =
            map(&[("user-agent", "a"), ("x-a", "1"), ("user-agent", ""), ("x-a", "2"), ("user-agent", "b")]);
        join_lines(&mut headers);
        let all = |name| headers.get_all(name).iter().collect::<Vec<_>>();
        assert_eq!(all("user-agent"), ["a,b"]);
        assert_eq!(all("x-a"), ["1", "2"]);
    }

    #[test]
    fn what_was_there_decides_and_values_that_replace_come_first() {
        use core::header_value_option::HeaderAppendAction as Action;
        use envoy_types::pb::envoy::config::core::v3 as core;
        let add = |key: &str, value: &str, action: Action| core::HeaderValueOption {
            header: Some(core::HeaderValue { key: key.into(), value: value.into(), raw_value: Vec::new() }),
            append_action: action.into(),
            ..Default::default()
        };
        let ops = vec![
            add("x-a", "added", Action::AppendIfExistsOrAdd),
            add("x-a", "set", Action::OverwriteIfExistsOrAdd),
            add("x-b", "first", Action::AddIfAbsent),
            add("x-b", "second", Action::AddIfAbsent),
            add("x-b", "never", Action::OverwriteIfExists),
            add("x-c", "never", Action::AddIfAbsent),
        ];
        let ops = HeaderOps::new(ops, &["x-gone".into()], "request").unwrap();
        let mut headers = map(&[("x-a", "old"), ("x-c", "old"), ("x-gone", "1")]);
        apply(&ops, &mut headers, &|_, _| String::new());
        let all = |name| headers.get_all(name).iter().collect::<Vec<_>>();
        assert_eq!(all("x-a"), ["set", "added"]);
        assert_eq!(all("x-b"), ["first", "second"]);
        assert_eq!(all("x-c"), ["old"]);
        assert!(all("x-gone").is_empty());
    }

    #[test]
    fn the_client_is_the_entry_behind_the_trusted_hops() {
        let headers = map(&[("x-forwarded-for", "1.1.1.1, 2.2.2.2"), ("x-forwarded-for", "3.3.3.3")]);
        let ip = |hops| forwarded_for(&headers, hops).map(|ip| ip.to_string());
        assert_eq!(ip(0).as_deref(), Some("3.3.3.3"));
        assert_eq!(ip(2).as_deref(), Some("1.1.1.1"));
        assert_eq!(ip(3), None);
    }

    #[test]
    fn cookie_crumbs_become_one_cookie() {
        let mut headers = map(&[("cookie", "a=1"), ("accept", "*/*"), ("cookie", "b=2"), ("cookie", "c=3")]);
        join_cookies(&mut headers);
        let all: Vec<_> = headers.get_all("cookie").iter().collect();
        assert_eq!(all, ["a=1; b=2; c=3"]);
    }

    #[test]
    fn grpc_timeouts_have_units() {
        let t = |text| grpc_timeout(&map(&[("grpc-timeout", text)])).map(|d| d.as_millis());
        assert_eq!(t("2S"), Some(2000));
        assert_eq!(t("15m"), Some(15));
        assert_eq!(t("123456789S"), None);
        assert_eq!(t("S"), None);
        assert_eq!(t("1x"), None);
    }

    #[test]
    fn a_client_certificate_is_told_as_envoy_tells_it() {
        let peer = Peer {
            uris: vec!["spiffe://td/ns/a/sa/b".into()],
            subject: "CN=\"x\"".into(),
            fingerprint: "00ff".into(),
            ..Peer::default()
        };
        let facts = CertFacts { subject: true, uri: true, dns: true };
        assert_eq!(
            client_cert_element(&peer, &["spiffe://td/ns/c/sa/d".into()], facts),
            "By=spiffe://td/ns/c/sa/d;Hash=00ff;Subject=\"CN=\\\"x\\\"\";URI=spiffe://td/ns/a/sa/b"
        );
    }
}
