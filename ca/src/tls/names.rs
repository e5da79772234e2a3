//! Matchers of certificate names, as Envoy's certificate validation contexts have them.

use std::net::IpAddr;

use regex::Regex;

use crate::x509::Facts;

/// Largest compiled regular expression, in bytes.
const REGEX_SIZE: usize = 64 * 1024;

/// Which names of a certificate a matcher looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameKind {
    /// URI, DNS and IP address names.
    Any,
    /// URI names.
    Uri,
    /// DNS names.
    Dns,
    /// IP address names, in their text form.
    Ip,
}

/// How a name is compared.
#[derive(Debug, Clone)]
pub enum NameMatch {
    /// The whole name. A DNS name of the certificate may begin with the label `*`, which stands for one label.
    Exact(String),
    /// The beginning of the name.
    Prefix(String),
    /// The end of the name.
    Suffix(String),
    /// Some part of the name.
    Contains(String),
    /// The whole name matches a regular expression; made by [`NameMatch::regex`].
    Regex(Regex),
}

impl NameMatch {
    /// A regular expression that must match the whole name.
    ///
    /// # Errors
    ///
    /// When it is not a regular expression, or is too large.
    pub fn regex(pattern: &str) -> Result<Self, regex::Error> {
        // compiled alone first, so that a pattern like `a)|(b` cannot break out of the group
        regex::RegexBuilder::new(pattern).size_limit(REGEX_SIZE).build()?;
        let whole = format!("^(?:{pattern})$");
        Ok(Self::Regex(regex::RegexBuilder::new(&whole).size_limit(REGEX_SIZE).build()?))
    }

    fn matches(&self, name: &str, ignore_case: bool) -> bool {
        let fold = |text: &str| if ignore_case { text.to_ascii_lowercase() } else { text.to_owned() };
        let name = fold(name);
        match self {
            Self::Exact(text) => name == fold(text),
            Self::Prefix(text) => name.starts_with(&fold(text)),
            Self::Suffix(text) => name.ends_with(&fold(text)),
            Self::Contains(text) => name.contains(&fold(text)),
            Self::Regex(regex) => regex.is_match(&name),
        }
    }
}

/// One matcher of names. A certificate is accepted when one of its names matches one of the matchers.
#[derive(Debug, Clone)]
pub struct NameMatcher {
    /// The names it looks at.
    pub kind: NameKind,
    /// How a name is compared.
    pub rule: NameMatch,
    /// Whether upper and lower case are the same (ASCII; not for regular expressions).
    pub ignore_case: bool,
}

impl NameMatcher {
    /// A URI name that is exactly this, for example a SPIFFE identity.
    #[must_use]
    pub fn uri(text: impl Into<String>) -> Self {
        Self { kind: NameKind::Uri, rule: NameMatch::Exact(text.into()), ignore_case: false }
    }

    /// A DNS name that is exactly this, or is covered by the certificate's wildcard.
    #[must_use]
    pub fn dns(text: impl Into<String>) -> Self {
        Self { kind: NameKind::Dns, rule: NameMatch::Exact(text.into()), ignore_case: false }
    }

    /// Whether one of the certificate's names matches.
    #[must_use]
    pub fn matches(&self, facts: &Facts) -> bool {
        let looks_at = |kind| self.kind == NameKind::Any || self.kind == kind;
        let rule = |name: &str| self.rule.matches(name, self.ignore_case);
        (looks_at(NameKind::Uri) && facts.uris.iter().any(|name| rule(name)))
            || (looks_at(NameKind::Dns) && facts.dns.iter().any(|name| self.matches_dns(name)))
            || (looks_at(NameKind::Ip) && facts.ips.iter().any(|ip| rule(&IpAddr::to_string(ip))))
    }

    fn matches_dns(&self, name: &str) -> bool {
        match &self.rule {
            NameMatch::Exact(wanted) => dns_name_covers(name, wanted),
            NameMatch::Prefix(_) | NameMatch::Suffix(_) | NameMatch::Contains(_) | NameMatch::Regex(_) => {
                self.rule.matches(name, self.ignore_case)
            }
        }
    }
}

/// Whether a certificate's DNS name, which may begin with a wildcard label, covers a host (RFC 6125, 6.4.3).
fn dns_name_covers(name: &str, host: &str) -> bool {
    if name.eq_ignore_ascii_case(host) {
        return true;
    }
    match (name.strip_prefix("*."), host.split_once('.')) {
        (Some(name), Some((first, rest))) => {
            !first.is_empty() && first != "*" && name.eq_ignore_ascii_case(rest)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    fn facts() -> Facts {
        Facts {
            not_before: UNIX_EPOCH,
            not_after: UNIX_EPOCH,
            uris: vec!["spiffe://td/ns/a/sa/b".to_owned()],
            dns: vec!["*.example.com".to_owned(), "a.test".to_owned()],
            ips: vec!["10.0.0.1".parse().unwrap()],
            is_ca: false,
            can_sign: false,
            path_len: None,
            subject: String::new(),
            serial: String::new(),
            public_key: Vec::new(),
        }
    }

    #[track_caller]
    fn check(kind: NameKind, rule: NameMatch, expected: bool) {
        let matcher = NameMatcher { kind, rule, ignore_case: false };
        assert_eq!(matcher.matches(&facts()), expected, "{matcher:?}");
    }

    #[test]
    fn each_kind_looks_at_its_own_names() {
        use NameKind::*;
        let exact = |text: &str| NameMatch::Exact(text.to_owned());
        check(Uri, exact("spiffe://td/ns/a/sa/b"), true);
        check(Dns, exact("spiffe://td/ns/a/sa/b"), false);
        check(Any, exact("spiffe://td/ns/a/sa/b"), true);
        check(Uri, exact("spiffe://td/ns/a/sa/bb"), false);
        check(Uri, exact("spiffe://td/ns/a/sa/"), false);
        check(Dns, exact("a.test"), true);
        check(Ip, exact("10.0.0.1"), true);
        check(Ip, exact("10.0.0.11"), false);
    }

    #[test]
    fn a_wildcard_stands_for_one_label() {
        let exact = |text: &str| NameMatch::Exact(text.to_owned());
        check(NameKind::Dns, exact("www.example.com"), true);
        check(NameKind::Dns, exact("WWW.Example.com"), true);
        check(NameKind::Dns, exact("a.b.example.com"), false);
        check(NameKind::Dns, exact("example.com"), false);
        check(NameKind::Dns, exact(".example.com"), false);
    }

    #[test]
    fn parts_and_expressions() {
        use NameKind::*;
        check(Uri, NameMatch::Prefix("spiffe://td/ns/a/".to_owned()), true);
        check(Uri, NameMatch::Prefix("spiffe://td/ns/b/".to_owned()), false);
        check(Uri, NameMatch::Suffix("/sa/b".to_owned()), true);
        check(Uri, NameMatch::Contains("/ns/a/".to_owned()), true);
        check(Uri, NameMatch::regex("spiffe://td/ns/[ab]/sa/b").unwrap(), true);
        check(Uri, NameMatch::regex("spiffe://td/ns/a").unwrap(), false);
        check(Uri, NameMatch::regex("x|spiffe").unwrap(), false);
        assert!(NameMatch::regex("a)|(b").is_err());
        assert!(NameMatch::regex("(a{1000}){1000}").is_err());
    }
}
