//! Istio's value patterns (`exact`, `prefix*`, `*suffix`, `*`) as string matchers.

use envoy_types::pb::envoy::config::route::v3::{HeaderMatcher, header_matcher};
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;

use super::super::pb;

/// A value pattern of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pattern<'a> {
    /// This text.
    Exact(&'a str),
    /// Text that begins so.
    Prefix(&'a str),
    /// Text that ends so.
    Suffix(&'a str),
    /// Any text that is not empty.
    Present,
}

impl<'a> Pattern<'a> {
    pub(super) fn parse(text: &'a str) -> Self {
        match (text, text.strip_suffix('*'), text.strip_prefix('*')) {
            ("*", _, _) => Self::Present,
            (_, Some(prefix), _) => Self::Prefix(prefix),
            (_, None, Some(suffix)) => Self::Suffix(suffix),
            (_, None, None) => Self::Exact(text),
        }
    }

    /// The pattern over the whole of a text.
    pub(super) fn matcher(self) -> matcher::StringMatcher {
        match self {
            Self::Exact(text) => pb::exact(text),
            Self::Prefix(text) => pb::prefix(text),
            Self::Suffix(text) => pb::suffix(text),
            Self::Present => pb::regex(".+"),
        }
    }

    /// The pattern over a part of a text: a regular expression in which `any` stands for any one character.
    pub(super) fn expression(self, any: &str) -> String {
        match self {
            Self::Exact(text) => escape(text),
            Self::Prefix(text) => format!("{}{any}*", escape(text)),
            Self::Suffix(text) => format!("{any}*{}", escape(text)),
            Self::Present => format!("{any}+"),
        }
    }
}

/// Quotes everything that a regular expression would interpret.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A header whose value matches; a header that is not sent never does.
pub(super) fn header(name: &str, value: matcher::StringMatcher) -> HeaderMatcher {
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(header_matcher::HeaderMatchSpecifier::StringMatch(value)),
        ..Default::default()
    }
}

/// A header that is there, whatever its value.
pub(super) fn header_present(name: &str) -> HeaderMatcher {
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(header_matcher::HeaderMatchSpecifier::PresentMatch(true)),
        ..Default::default()
    }
}

/// The header of a policy's key `request.headers[<name>]`.
pub(super) fn header_pattern(name: &str, value: &str) -> HeaderMatcher {
    match Pattern::parse(value) {
        Pattern::Present => header_present(name),
        pattern @ (Pattern::Exact(_) | Pattern::Prefix(_) | Pattern::Suffix(_)) => {
            header(name, pattern.matcher())
        }
    }
}

/// The host of a request, without regard to case; a pattern without a port takes any port.
pub(super) fn host(value: &str) -> HeaderMatcher {
    const PORT: &str = "(:[0-9]+)?";
    let has_port = value.rsplit_once(':').is_some_and(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
    let tail = if has_port { "" } else { PORT };
    let expression = match Pattern::parse(value) {
        Pattern::Present => return header_present(":authority"),
        Pattern::Prefix(text) => format!("(?i){}.*", escape(text)),
        Pattern::Exact(text) => format!("(?i){}{tail}", escape(text)),
        Pattern::Suffix(text) => format!("(?i).*{}{tail}", escape(text)),
    };
    header(":authority", pb::regex(expression))
}

/// The parts of a key such as `request.auth.claims[a][b]` behind its name.
pub(super) fn brackets<'a>(key: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let inner = key.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']')?;
    let parts: Vec<&str> = inner.split("][").collect();
    parts.iter().all(|part| !part.is_empty() && !part.contains(['[', ']'])).then_some(parts)
}

/// A claim of the verified token.
pub(in crate::translate) fn claim(path: &[&str], value: matcher::StringMatcher) -> matcher::MetadataMatcher {
    let of_list = matcher::ListMatcher {
        match_pattern: Some(matcher::list_matcher::MatchPattern::OneOf(Box::new(string_value(
            value.clone(),
        )))),
    };
    let either = matcher::OrMatcher {
        value_matchers: vec![
            string_value(value),
            matcher::ValueMatcher {
                match_pattern: Some(matcher::value_matcher::MatchPattern::ListMatch(Box::new(of_list))),
            },
        ],
    };
    let segments: Vec<&str> = ["payload"].iter().chain(path).copied().collect();
    metadata(
        super::super::jwt::FILTER,
        &segments,
        matcher::ValueMatcher { match_pattern: Some(matcher::value_matcher::MatchPattern::OrMatch(either)) },
    )
}

/// A value in the dynamic metadata of a filter.
pub(super) fn metadata(
    filter: &str,
    path: &[&str],
    value: matcher::ValueMatcher,
) -> matcher::MetadataMatcher {
    let segment = |key: &&str| matcher::metadata_matcher::PathSegment {
        segment: Some(matcher::metadata_matcher::path_segment::Segment::Key((*key).to_owned())),
    };
    matcher::MetadataMatcher {
        filter: filter.to_owned(),
        path: path.iter().map(segment).collect(),
        value: Some(value),
        invert: false,
    }
}

pub(super) fn string_value(value: matcher::StringMatcher) -> matcher::ValueMatcher {
    matcher::ValueMatcher { match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(value)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_host(pattern: &str, expected: &str) {
        let expression = match host(pattern).header_match_specifier {
            Some(header_matcher::HeaderMatchSpecifier::StringMatch(matcher)) => match matcher.match_pattern {
                Some(matcher::string_matcher::MatchPattern::SafeRegex(regex)) => regex.regex,
                other => format!("{other:?}"),
            },
            other => format!("{other:?}"),
        };
        assert_eq!(expression, expected);
    }

    #[test]
    fn hosts_match_with_any_port_unless_one_is_given() {
        check_host("a.example.com", r"(?i)a\.example\.com(:[0-9]+)?");
        check_host("*.example.com", r"(?i).*\.example\.com(:[0-9]+)?");
        check_host("a.example.com:80", r"(?i)a\.example\.com:80");
        check_host("a.*", r"(?i)a\..*");
    }

    #[test]
    fn patterns_over_a_part_do_not_cross_its_border() {
        assert_eq!(Pattern::parse("prod-*").expression("[^/]"), "prod-[^/]*");
        assert_eq!(Pattern::parse("*").expression("[^/]"), "[^/]+");
        assert_eq!(Pattern::parse("a.b").expression("[^/]"), r"a\.b");
    }

    #[test]
    fn keys_in_brackets_have_whole_parts() {
        assert_eq!(brackets("request.auth.claims[a][b.c]", "request.auth.claims"), Some(vec!["a", "b.c"]));
        assert_eq!(brackets("request.headers[]", "request.headers"), None);
        assert_eq!(brackets("request.headers", "request.headers"), None);
    }
}
