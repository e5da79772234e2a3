//! Grammars of names: hosts, namespaces, labels, addresses, expressions.

use std::net::IpAddr;

use ipnet::IpNet;
use regex::RegexBuilder;

/// Longest regular expression, in bytes.
const MAX_REGEX: usize = 1024;
/// Largest program that a regular expression may become, in bytes.
const MAX_REGEX_PROGRAM: usize = 1 << 20;

/// An RFC 1123 label: the name of a namespace.
pub(crate) fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// An RFC 1123 subdomain: the name of an object.
pub(crate) fn is_subdomain(text: &str) -> bool {
    (1..=253).contains(&text.len()) && text.split('.').all(is_label)
}

/// The key of a label or an annotation: `[prefix/]name`.
pub(crate) fn label_key(key: &str) -> Result<(), &'static str> {
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if prefix.is_some_and(|prefix| !is_subdomain(prefix)) {
        return Err("the prefix of a key must be a DNS name in lower case");
    }
    if !(1..=63).contains(&name.len()) || !is_qualified(name) {
        return Err(
            "a key must have 1 to 63 letters, digits, -, _ and ., with a letter or digit at both ends",
        );
    }
    Ok(())
}

/// The value of a label.
pub(crate) fn label_value(value: &str) -> Result<(), &'static str> {
    if value.is_empty() || value.len() <= 63 && is_qualified(value) {
        Ok(())
    } else {
        Err(
            "the value of a label must have at most 63 letters, digits, -, _ and ., with a letter or digit at both ends",
        )
    }
}

fn is_qualified(text: &str) -> bool {
    let ends = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    ends(text.bytes().next())
        && ends(text.bytes().next_back())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// A host name without wildcard, in any case: `reviews` or `api.example.com`.
pub(crate) fn is_host(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    (1..=255).contains(&text.len()) && text.split('.').all(is_host_label)
}

fn is_host_label(label: &str) -> bool {
    let ends = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    label.len() <= 63
        && ends(label.bytes().next())
        && ends(label.bytes().next_back())
        && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// A host name, `*`, or a host name whose first label is `*`.
pub(crate) fn is_wildcard_host(text: &str) -> bool {
    match text.strip_prefix('*') {
        Some("") => true,
        Some(rest) => rest.strip_prefix(['.', '-']).is_some_and(is_host),
        None => is_host(text),
    }
}

/// The name of a subset.
pub(crate) fn is_subset_name(text: &str) -> bool {
    (1..=63).contains(&text.len()) && is_qualified(text)
}

/// Does `host` stand for every name that `name` stands for? Only a leading `*` is a wildcard.
pub(crate) fn covers(host: &str, name: &str) -> bool {
    let (host, name) = (host.to_ascii_lowercase(), name.to_ascii_lowercase());
    match host.strip_prefix('*') {
        None => host == name,
        Some(suffix) => {
            let bare = name.strip_prefix('*').unwrap_or(&name);
            bare.ends_with(suffix) && (name.starts_with('*') || bare.len() > suffix.len())
        }
    }
}

/// An IP address.
pub(crate) fn is_ip(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok()
}

/// An IP address or a range of addresses.
pub(crate) fn is_subnet(text: &str) -> bool {
    is_ip(text) || text.parse::<IpNet>().is_ok()
}

/// The name of a header.
pub(crate) fn is_header_name(text: &str) -> bool {
    let bare = text.strip_prefix(':').unwrap_or(text);
    !bare.is_empty() && bare.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// A locality: `region`, `region/zone` or `region/zone/subzone`.
pub(crate) fn is_locality(text: &str) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    parts.len() <= 3 && parts.iter().all(|part| !part.is_empty() && !part.contains('*'))
}

/// A locality whose last part may be `*`.
pub(crate) fn is_locality_pattern(text: &str) -> bool {
    match text.strip_suffix('*') {
        Some("") => true,
        Some(rest) => rest.strip_suffix('/').is_some_and(is_locality) && rest.split('/').count() <= 3,
        None => is_locality(text),
    }
}

/// A regular expression that compiles within limits.
pub(crate) fn regex(pattern: &str) -> Result<(), String> {
    if pattern.is_empty() {
        return Err("must not be empty; leave out the match to accept any value".to_owned());
    }
    if pattern.len() > MAX_REGEX {
        return Err(format!("must have at most {MAX_REGEX} bytes, it has {}", pattern.len()));
    }
    match RegexBuilder::new(pattern).size_limit(MAX_REGEX_PROGRAM).build() {
        Ok(_) => Ok(()),
        Err(regex::Error::CompiledTooBig(_)) => {
            Err("must be a smaller regular expression: its repetitions multiply to too large a program"
                .to_owned())
        }
        Err(error) => {
            let text = error.to_string();
            let why = text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            Err(format!("must be a regular expression in RE2 syntax: {why}"))
        }
    }
}

/// A `http` or `https` URL with a host.
pub(crate) fn is_http_url(text: &str) -> bool {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    rest.is_some_and(|rest| {
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = authority.rsplit_once(':').map_or(authority, |(host, port)| {
            if port.bytes().all(|b| b.is_ascii_digit()) && !port.is_empty() { host } else { "" }
        });
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        is_host(host) || is_ip(bare)
    })
}

/// The protocols that a port may name.
pub(crate) const PROTOCOLS: &[&str] = &[
    "HTTP",
    "HTTPS",
    "GRPC",
    "GRPC-WEB",
    "HTTP2",
    "HTTP_PROXY",
    "MONGO",
    "MYSQL",
    "REDIS",
    "TCP",
    "TLS",
    "UDP",
    "HBONE",
];

/// Is this a protocol that a port may name?
pub(crate) fn is_protocol(text: &str) -> bool {
    PROTOCOLS.iter().any(|protocol| protocol.eq_ignore_ascii_case(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_a_wildcard_in_front_only() {
        for good in [
            "*",
            "*.example.com",
            "*-a.example.com",
            "a",
            "reviews.default.svc.cluster.local",
            "a_b.c",
            "A.b.",
        ] {
            assert!(is_wildcard_host(good), "{good}");
        }
        for bad in ["", "a.*.b", "*a.b", "a..b", "-a.b", "a-.b", "a b", "*.", "a/b", "a:80"] {
            assert!(!is_wildcard_host(bad), "{bad}");
        }
    }

    #[test]
    fn names_and_labels_follow_rfc_1123() {
        assert!(is_label("a-1") && !is_label("A") && !is_label("-a") && !is_label(&"a".repeat(64)));
        assert!(is_subdomain("a.b") && !is_subdomain("a..b"));
        assert!(
            label_key("app.kubernetes.io/name").is_ok() && label_key("a/").is_err() && label_key("").is_err()
        );
        assert!(label_value("").is_ok() && label_value("v1.2_x").is_ok() && label_value("a b").is_err());
    }

    #[test]
    fn expressions_have_limits() {
        assert!(regex("^/api/v[0-9]+$").is_ok());
        assert!(regex("(").unwrap_err().contains("RE2"));
        assert!(regex("(?=x)").is_err());
        assert!(regex(&"a".repeat(1025)).unwrap_err().contains("1024"));
        assert!(regex("((((a{100}){100}){100}){100})").unwrap_err().contains("smaller"));
        assert!(regex("").is_err());
    }

    #[test]
    fn localities_and_urls() {
        assert!(is_locality_pattern("us/*") && is_locality_pattern("*") && is_locality_pattern("us/a/b"));
        assert!(!is_locality_pattern("us/*/b") && !is_locality_pattern("") && !is_locality_pattern("us*"));
        assert!(
            is_http_url("https://a.b/keys")
                && is_http_url("http://127.0.0.1:80")
                && is_http_url("http://[::1]:80/")
        );
        assert!(!is_http_url("ftp://a") && !is_http_url("https://") && !is_http_url("https://a b/"));
    }
}
