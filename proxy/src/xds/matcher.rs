//! Matchers on strings, headers, query parameters and metadata: compiled once, run per request.

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use http::HeaderName;
use regex::bytes::Regex;
use serde_json::Value as Json;

use super::decode::{Invalid, Under as _, header_name};

/// The most memory one compiled regular expression may use, in bytes.
const REGEX_LIMIT: usize = 2 << 20;

/// A regular expression that must match the whole value, as RE2's `FullMatch` in Envoy.
///
/// # Errors
///
/// An expression that does not compile, or compiles to more than 2 MiB.
pub fn full_regex(pb: &pb::RegexMatcher) -> Result<Regex, Invalid> {
    partial_regex(pb)?;
    let build = |text: &str| regex::bytes::RegexBuilder::new(text).size_limit(REGEX_LIMIT).build();
    build(&format!(r"\A(?:{})\z", pb.regex)).map_err(|e| Invalid::new("regex", e.to_string()))
}

/// A regular expression that may match anywhere in the value.
fn partial_regex(pb: &pb::RegexMatcher) -> Result<regex::Regex, Invalid> {
    if pb.regex.is_empty() {
        return Err(Invalid::missing("regex"));
    }
    regex::RegexBuilder::new(&pb.regex)
        .size_limit(REGEX_LIMIT)
        .build()
        .map_err(|e| Invalid::new("regex", e.to_string()))
}

/// Replace every match of a pattern.
#[derive(Debug, Clone)]
pub struct RegexRewrite {
    /// What is replaced, wherever it is found.
    pub pattern: regex::Regex,
    /// What comes in its place; `${1}` is the first group (Envoy's `\1`, already translated).
    pub substitution: String,
}

impl RegexRewrite {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// A pattern that does not compile, or a substitution that names a group the pattern does not have.
    pub fn new(pb: pb::RegexMatchAndSubstitute) -> Result<Self, Invalid> {
        let pattern =
            partial_regex(&pb.pattern.ok_or_else(|| Invalid::missing("pattern"))?).under("pattern")?;
        let substitution = substitution(&pb.substitution, pattern.captures_len())?;
        Ok(Self { pattern, substitution })
    }

    /// The rewritten text.
    #[must_use]
    pub fn apply(&self, text: &str) -> String {
        self.pattern.replace_all(text, self.substitution.as_str()).into_owned()
    }
}

fn substitution(text: &str, groups: usize) -> Result<String, Invalid> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '$' => out.push_str("$$"),
            '\\' => match chars.next() {
                Some('\\') => out.push('\\'),
                Some(d) if d.is_ascii_digit() && d.to_digit(10).is_some_and(|d| (d as usize) < groups) => {
                    out.push_str(&format!("${{{d}}}"));
                }
                _ => {
                    return Err(Invalid::new(
                        "substitution",
                        format!("`{text}`: after `\\` comes `\\` or the number of a group below {groups}"),
                    ));
                }
            },
            c => out.push(c),
        }
    }
    Ok(out)
}

/// How a string must look.
#[derive(Debug, Clone)]
pub enum StringMatcher {
    /// These very bytes.
    Exact(Box<str>),
    /// Bytes at the beginning.
    Prefix(Box<str>),
    /// Bytes at the end.
    Suffix(Box<str>),
    /// Bytes anywhere.
    Contains(Box<str>),
    /// The whole value matches.
    Regex(Regex),
    /// One of the others, letters compared without case (ASCII). The inner text is in lower case.
    IgnoreCase(Box<StringMatcher>),
}

impl StringMatcher {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// No pattern, an empty prefix, suffix or infix, a broken expression, or a custom matcher.
    pub fn new(pb: pb::StringMatcher) -> Result<Self, Invalid> {
        use pb::string_matcher::MatchPattern;
        let fold = |s: String| if pb.ignore_case { s.to_ascii_lowercase() } else { s };
        let filled = |s: String, field: &str| {
            if s.is_empty() { Err(Invalid::missing(field)) } else { Ok(fold(s).into_boxed_str()) }
        };
        let plain = match pb.match_pattern {
            None => return Err(Invalid::missing("match_pattern")),
            Some(MatchPattern::Custom(_)) => return Err(Invalid::unsupported("custom")),
            Some(MatchPattern::SafeRegex(r)) => return full_regex(&r).under("safe_regex").map(Self::Regex),
            Some(MatchPattern::Exact(s)) => Self::Exact(fold(s).into()),
            Some(MatchPattern::Prefix(s)) => Self::Prefix(filled(s, "prefix")?),
            Some(MatchPattern::Suffix(s)) => Self::Suffix(filled(s, "suffix")?),
            Some(MatchPattern::Contains(s)) => Self::Contains(filled(s, "contains")?),
        };
        Ok(if pb.ignore_case { Self::IgnoreCase(Box::new(plain)) } else { plain })
    }

    /// The same, but letters are compared without case. An expression says itself what it means by case.
    fn without_case(self) -> Self {
        let fold = |s: Box<str>| s.to_ascii_lowercase().into_boxed_str();
        let folded = match self {
            Self::Exact(s) => Self::Exact(fold(s)),
            Self::Prefix(s) => Self::Prefix(fold(s)),
            Self::Suffix(s) => Self::Suffix(fold(s)),
            Self::Contains(s) => Self::Contains(fold(s)),
            same @ (Self::Regex(_) | Self::IgnoreCase(_)) => return same,
        };
        Self::IgnoreCase(Box::new(folded))
    }

    /// Whether the value is as it must be.
    #[must_use]
    pub fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(s) => value == s.as_bytes(),
            Self::Prefix(s) => value.starts_with(s.as_bytes()),
            Self::Suffix(s) => value.ends_with(s.as_bytes()),
            Self::Contains(s) => contains(value, s.as_bytes()),
            Self::Regex(r) => r.is_match(value),
            Self::IgnoreCase(inner) => inner.matches(&value.to_ascii_lowercase()),
        }
    }
}

fn contains(value: &[u8], part: &[u8]) -> bool {
    part.is_empty() || value.windows(part.len()).any(|w| w == part)
}

/// What a header matcher or operation looks at: a header, or a part of the request line (RFC 9113, 8.3.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderKey {
    /// `:method`
    Method,
    /// `:path`, with the query
    Path,
    /// `:authority`, also under the name `host`
    Authority,
    /// `:scheme`
    Scheme,
    /// Any other header.
    Name(HeaderName),
}

impl HeaderKey {
    /// From a configured name.
    ///
    /// # Errors
    ///
    /// Something that is no header name, or another pseudo header.
    pub fn new(name: &str, field: &str) -> Result<Self, Invalid> {
        Ok(match name.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":authority" | "host" => Self::Authority,
            ":scheme" => Self::Scheme,
            _ => Self::Name(header_name(name, field)?),
        })
    }
}

/// What is asked of a header's value.
#[derive(Debug, Clone)]
pub enum HeaderTest {
    /// It is there (or, for `false`, is not).
    Present(bool),
    /// It looks like this.
    String(StringMatcher),
    /// It is a decimal number from the first (inclusive) to the second (exclusive).
    Range(i64, i64),
}

/// One condition on one header.
#[derive(Debug, Clone)]
pub struct HeaderMatcher {
    /// Which header.
    pub key: HeaderKey,
    /// What it must be.
    pub test: HeaderTest,
    /// Take the opposite of the test's answer.
    pub invert: bool,
    /// Test a missing header as if it were empty.
    pub missing_is_empty: bool,
}

impl HeaderMatcher {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// A name or matcher that is not valid.
    pub fn new(pb: route::HeaderMatcher) -> Result<Self, Invalid> {
        use pb::string_matcher::MatchPattern;
        use route::header_matcher::HeaderMatchSpecifier as Spec;
        let string = |pattern| {
            StringMatcher::new(pb::StringMatcher { match_pattern: Some(pattern), ignore_case: false })
        };
        let test = match pb.header_match_specifier {
            None => HeaderTest::Present(true),
            Some(Spec::PresentMatch(present)) => HeaderTest::Present(present),
            Some(Spec::RangeMatch(r)) => HeaderTest::Range(r.start, r.end),
            Some(Spec::StringMatch(m)) => HeaderTest::String(StringMatcher::new(m).under("string_match")?),
            #[expect(deprecated, reason = "older servers still send it")]
            Some(Spec::ExactMatch(s)) => {
                HeaderTest::String(string(MatchPattern::Exact(s)).under("exact_match")?)
            }
            #[expect(deprecated, reason = "older servers still send it")]
            Some(Spec::PrefixMatch(s)) => {
                HeaderTest::String(string(MatchPattern::Prefix(s)).under("prefix_match")?)
            }
            #[expect(deprecated, reason = "older servers still send it")]
            Some(Spec::SuffixMatch(s)) => {
                HeaderTest::String(string(MatchPattern::Suffix(s)).under("suffix_match")?)
            }
            #[expect(deprecated, reason = "older servers still send it")]
            Some(Spec::ContainsMatch(s)) => HeaderTest::String(string(MatchPattern::Contains(s))?),
            #[expect(deprecated, reason = "older servers still send it")]
            Some(Spec::SafeRegexMatch(r)) => {
                HeaderTest::String(string(MatchPattern::SafeRegex(r)).under("safe_regex_match")?)
            }
        };
        let key = HeaderKey::new(&pb.name, "name")?;
        // A host is the same in capital letters (RFC 9110, section 4.2.3), to routes and so to policies.
        let test = match test {
            HeaderTest::String(m) if key == HeaderKey::Authority => HeaderTest::String(m.without_case()),
            other @ (HeaderTest::Present(_) | HeaderTest::String(_) | HeaderTest::Range(..)) => other,
        };
        Ok(Self { key, test, invert: pb.invert_match, missing_is_empty: pb.treat_missing_header_as_empty })
    }

    /// Whether a header with this value (`None`: there is none) fulfils the condition.
    ///
    /// A missing header fulfils only conditions on presence, even when they are inverted, unless it counts as
    /// empty (Envoy's rule).
    #[must_use]
    pub fn matches(&self, value: Option<&[u8]>) -> bool {
        let value = if self.missing_is_empty { Some(value.unwrap_or_default()) } else { value };
        let answer = match (&self.test, value) {
            (HeaderTest::Present(present), value) => value.is_some() == *present,
            (_, None) => return false,
            (HeaderTest::String(m), Some(value)) => m.matches(value),
            (HeaderTest::Range(start, end), Some(value)) => std::str::from_utf8(value)
                .ok()
                .and_then(|s| s.parse::<i64>().ok())
                .is_some_and(|n| *start <= n && n < *end),
        };
        answer != self.invert
    }
}

/// Several header conditions.
///
/// # Errors
///
/// As [`HeaderMatcher::new`].
pub fn headers(pb: Vec<route::HeaderMatcher>, field: &str) -> Result<Box<[HeaderMatcher]>, Invalid> {
    pb.into_iter().enumerate().map(|(i, m)| HeaderMatcher::new(m).at(field, i)).collect()
}

/// One condition on one query parameter.
#[derive(Debug, Clone)]
pub struct QueryMatcher {
    /// The parameter's name.
    pub name: Box<str>,
    /// What its value must be; `None` asks for the parameter alone.
    pub value: Option<StringMatcher>,
    /// Whether it must be there (`false` only without a value).
    pub present: bool,
}

impl QueryMatcher {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// No name, or a broken matcher.
    pub fn new(pb: route::QueryParameterMatcher) -> Result<Self, Invalid> {
        use route::query_parameter_matcher::QueryParameterMatchSpecifier as Spec;
        if pb.name.is_empty() {
            return Err(Invalid::missing("name"));
        }
        let (value, present) = match pb.query_parameter_match_specifier {
            None => (None, true),
            Some(Spec::PresentMatch(present)) => (None, present),
            Some(Spec::StringMatch(m)) => (Some(StringMatcher::new(m).under("string_match")?), true),
        };
        Ok(Self { name: pb.name.into(), value, present })
    }

    /// Whether a parameter with this value (`None`: there is none) fulfils the condition.
    #[must_use]
    pub fn matches(&self, value: Option<&str>) -> bool {
        match (&self.value, value) {
            (Some(m), Some(value)) => m.matches(value.as_bytes()),
            (Some(_), None) => false,
            (None, value) => value.is_some() == self.present,
        }
    }
}

/// What is asked of a value of dynamic metadata, such as a JWT's claims.
#[derive(Debug, Clone)]
pub enum ValueMatcher {
    /// It is null.
    Null,
    /// It is a string like this.
    String(StringMatcher),
    /// It is this boolean.
    Bool(bool),
    /// It is this number.
    Number(f64),
    /// It is a number from the first (inclusive) to the second (exclusive).
    Range(f64, f64),
    /// It is there (or is not).
    Present(bool),
    /// It is a list, and one element is like this.
    OneOf(Box<ValueMatcher>),
    /// Any of these.
    Or(Box<[ValueMatcher]>),
}

impl ValueMatcher {
    fn new(pb: pb::ValueMatcher, depth: u8) -> Result<Self, Invalid> {
        use pb::double_matcher::MatchPattern as Double;
        use pb::list_matcher::MatchPattern as List;
        use pb::value_matcher::MatchPattern as Pb;
        let Some(depth) = depth.checked_sub(1) else { return Err(Invalid::new("", "nested too deep")) };
        Ok(match pb.match_pattern {
            None => return Err(Invalid::missing("match_pattern")),
            Some(Pb::NullMatch(_)) => Self::Null,
            Some(Pb::StringMatch(m)) => Self::String(StringMatcher::new(m).under("string_match")?),
            Some(Pb::BoolMatch(b)) => Self::Bool(b),
            Some(Pb::PresentMatch(b)) => Self::Present(b),
            Some(Pb::DoubleMatch(d)) => match d.match_pattern {
                Some(Double::Exact(n)) => Self::Number(n),
                Some(Double::Range(r)) => Self::Range(r.start, r.end),
                None => return Err(Invalid::missing("double_match")),
            },
            Some(Pb::ListMatch(l)) => match l.match_pattern {
                Some(List::OneOf(m)) => Self::OneOf(Box::new(Self::new(*m, depth)?)),
                None => return Err(Invalid::missing("list_match")),
            },
            Some(Pb::OrMatch(or)) => Self::Or(
                or.value_matchers.into_iter().map(|m| Self::new(m, depth)).collect::<Result<_, _>>()?,
            ),
        })
    }

    /// Whether the value is as it must be.
    #[must_use]
    pub fn matches(&self, value: Option<&Json>) -> bool {
        match (self, value) {
            (Self::Present(present), value) => value.is_some() == *present,
            (Self::Or(any), value) => any.iter().any(|m| m.matches(value)),
            (_, None) => false,
            (Self::Null, Some(v)) => v.is_null(),
            (Self::String(m), Some(v)) => v.as_str().is_some_and(|s| m.matches(s.as_bytes())),
            (Self::Bool(b), Some(v)) => v.as_bool() == Some(*b),
            (Self::Number(n), Some(v)) => v.as_f64() == Some(*n),
            (Self::Range(start, end), Some(v)) => v.as_f64().is_some_and(|n| *start <= n && n < *end),
            (Self::OneOf(m), Some(v)) => {
                v.as_array().is_some_and(|list| list.iter().any(|item| m.matches(Some(item))))
            }
        }
    }
}

/// A condition on dynamic metadata.
#[derive(Debug, Clone)]
pub struct MetadataMatcher {
    /// The filter that wrote the metadata, such as `envoy.filters.http.jwt_authn`.
    pub filter: Box<str>,
    /// The keys on the way to the value.
    pub path: Box<[Box<str>]>,
    /// What the value must be.
    pub value: ValueMatcher,
    /// Take the opposite.
    pub invert: bool,
}

impl MetadataMatcher {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// No filter, no path, no value matcher, or a broken one.
    pub fn new(pb: pb::MetadataMatcher) -> Result<Self, Invalid> {
        use pb::metadata_matcher::path_segment::Segment;
        if pb.filter.is_empty() {
            return Err(Invalid::missing("filter"));
        }
        let path = pb
            .path
            .into_iter()
            .map(|s| match s.segment {
                Some(Segment::Key(k)) if !k.is_empty() => Ok(k.into_boxed_str()),
                _ => Err(Invalid::new("path", "every segment needs a key")),
            })
            .collect::<Result<Box<[_]>, _>>()?;
        if path.is_empty() {
            return Err(Invalid::missing("path"));
        }
        let value =
            ValueMatcher::new(pb.value.ok_or_else(|| Invalid::missing("value"))?, 16).under("value")?;
        Ok(Self { filter: pb.filter.into(), path, value, invert: pb.invert })
    }

    /// Whether the metadata of a request (by filter) is as it must be.
    #[must_use]
    pub fn matches(&self, metadata: &serde_json::Map<String, Json>) -> bool {
        let mut at = metadata.get(&*self.filter);
        for key in &self.path {
            at = at.and_then(|v| v.get(&**key));
        }
        self.value.matches(at) != self.invert
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::string_matcher::MatchPattern;

    fn string(pattern: MatchPattern, ignore_case: bool) -> Result<StringMatcher, Invalid> {
        StringMatcher::new(pb::StringMatcher { match_pattern: Some(pattern), ignore_case })
    }

    #[track_caller]
    fn check(pattern: MatchPattern, ignore_case: bool, value: &str, expected: bool) {
        assert_eq!(string(pattern, ignore_case).unwrap().matches(value.as_bytes()), expected, "{value}");
    }

    fn regex(text: &str) -> MatchPattern {
        MatchPattern::SafeRegex(pb::RegexMatcher { regex: text.into(), engine_type: None })
    }

    #[test]
    fn strings_match_by_kind_and_case() {
        check(MatchPattern::Exact("a".into()), false, "a", true);
        check(MatchPattern::Exact("a".into()), false, "A", false);
        check(MatchPattern::Exact("A".into()), true, "a", true);
        check(MatchPattern::Prefix("/api".into()), false, "/api/x", true);
        check(MatchPattern::Suffix(".com".into()), true, "x.COM", true);
        check(MatchPattern::Contains("b".into()), false, "abc", true);
        check(regex("a+"), false, "aaa", true);
        check(regex("a+"), false, "aaab", false);
        check(regex("a|b"), false, "ab", false);
    }

    #[test]
    fn empty_and_broken_patterns_are_refused() {
        assert!(string(MatchPattern::Prefix(String::new()), false).is_err());
        assert!(string(regex(""), false).is_err());
        assert!(string(regex("a)(b"), false).is_err());
        assert!(string(regex("("), false).is_err());
        assert!(StringMatcher::new(pb::StringMatcher::default()).is_err());
    }

    fn header(
        spec: Option<route::header_matcher::HeaderMatchSpecifier>,
        invert: bool,
        missing: bool,
    ) -> HeaderMatcher {
        HeaderMatcher::new(route::HeaderMatcher {
            name: "x-a".into(),
            invert_match: invert,
            treat_missing_header_as_empty: missing,
            header_match_specifier: spec,
        })
        .unwrap()
    }

    #[test]
    fn missing_headers_match_as_in_envoy() {
        use route::header_matcher::HeaderMatchSpecifier::*;
        let exact = || {
            Some(StringMatch(pb::StringMatcher {
                match_pattern: Some(MatchPattern::Exact("v".into())),
                ignore_case: false,
            }))
        };
        assert!(!header(exact(), false, false).matches(None));
        assert!(!header(exact(), true, false).matches(None));
        assert!(header(exact(), true, true).matches(None));
        assert!(header(exact(), true, false).matches(Some(b"w")));
        assert!(header(Some(PresentMatch(true)), true, false).matches(None));
        assert!(header(Some(PresentMatch(false)), false, false).matches(None));
        assert!(header(None, false, false).matches(Some(b"")));
        let range = RangeMatch(envoy_types::pb::envoy::r#type::v3::Int64Range { start: -10, end: 0 });
        assert!(header(Some(range.clone()), false, false).matches(Some(b"-1")));
        assert!(!header(Some(range.clone()), false, false).matches(Some(b"0")));
        assert!(!header(Some(range.clone()), false, false).matches(Some(b"-1x")));
    }

    #[test]
    fn substitutions_are_translated_and_checked() {
        let rewrite = |regex: &str, substitution: &str| {
            RegexRewrite::new(pb::RegexMatchAndSubstitute {
                pattern: Some(pb::RegexMatcher { regex: regex.into(), engine_type: None }),
                substitution: substitution.into(),
            })
        };
        assert_eq!(rewrite("^/a/(.*)$", r"/b/\1").unwrap().apply("/a/x"), "/b/x");
        assert_eq!(rewrite("a", "$1").unwrap().apply("a"), "$1");
        assert!(rewrite("a", r"\1").is_err());
        assert!(rewrite("a", r"\x").is_err());
    }
}
