//! How host names relate: short names, wildcards, and which of several is the most specific.
//!
//! A wildcard is a leading `*` only. Source: Istio, `pkg/config/host`.

use std::net::IpAddr;

/// The fully qualified form of a host in an object of `namespace`, in lower case: a name without a dot belongs to that
/// namespace; `*` and IP addresses stay.
#[must_use]
pub fn resolve(host: &str, namespace: &str, domain_suffix: &str) -> String {
    let host = host.to_ascii_lowercase();
    if host.is_empty() || host.contains('.') || host.starts_with('*') || host.parse::<IpAddr>().is_ok() {
        return host;
    }
    format!("{host}.{namespace}.svc.{domain_suffix}")
}

/// One of the two covers the other, or they are equal.
#[must_use]
pub fn matches(a: &str, b: &str) -> bool {
    subset_of(a, b) || subset_of(b, a)
}

/// Every host that `a` stands for, `b` stands for too.
#[must_use]
pub fn subset_of(a: &str, b: &str) -> bool {
    let Some(suffix) = b.strip_prefix('*') else { return a == b };
    match a.strip_prefix('*') {
        Some(own) => own.ends_with(suffix),
        None => a.ends_with(suffix),
    }
}

/// The most specific of `patterns` that covers `host`: the host itself, else the longest wildcard.
#[must_use]
pub fn most_specific<'a>(host: &str, patterns: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    patterns
        .into_iter()
        .filter(|pattern| subset_of(host, pattern))
        .max_by_key(|pattern| (*pattern == host, pattern.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_a_dot_belong_to_the_objects_namespace() {
        for (host, expect) in [
            ("reviews", "reviews.shop.svc.cluster.local"),
            ("Reviews", "reviews.shop.svc.cluster.local"),
            ("reviews.other", "reviews.other"),
            ("api.Example.com", "api.example.com"),
            ("*", "*"),
            ("*.example.com", "*.example.com"),
            ("10.0.0.1", "10.0.0.1"),
            ("2001:db8::1", "2001:db8::1"),
            ("", ""),
        ] {
            assert_eq!(resolve(host, "shop", "cluster.local"), expect);
        }
    }

    #[test]
    fn wildcards_cover_longer_names_only() {
        for (a, b, subset, either) in [
            ("a.foo.com", "a.foo.com", true, true),
            ("a.foo.com", "*.foo.com", true, true),
            ("*.foo.com", "a.foo.com", false, true),
            ("foo.com", "*.foo.com", false, false),
            ("*.a.foo.com", "*.foo.com", true, true),
            ("*.foo.com", "*.a.foo.com", false, true),
            ("anything", "*", true, true),
            ("*", "*", true, true),
            ("*.bar.com", "*.foo.com", false, false),
        ] {
            assert_eq!(subset_of(a, b), subset, "{a} of {b}");
            assert_eq!(matches(a, b), either, "{a} and {b}");
        }
    }

    #[test]
    fn the_exact_host_outranks_the_longest_wildcard() {
        let patterns = ["*", "*.com", "*.foo.com", "a.foo.com"];
        for (host, expect) in [
            ("a.foo.com", Some("a.foo.com")),
            ("b.foo.com", Some("*.foo.com")),
            ("foo.com", Some("*.com")),
            ("x", Some("*")),
        ] {
            assert_eq!(most_specific(host, patterns), expect);
        }
        assert_eq!(most_specific("x.org", ["*.com"]), None);
    }
}
