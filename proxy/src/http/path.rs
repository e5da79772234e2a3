//! One form of a path for policy, routing and forwarding (RFC 3986, section 6). Pure.

use std::borrow::Cow;

use crate::xds::listener::hcm::{EscapedSlashes, PathCleaning};

/// The outcome of normalisation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Normalized<'a> {
    /// Path and query to use from here on.
    Path(Cow<'a, str>),
    /// Answer with a redirect to this path and query.
    Redirect(String),
    /// Answer 400.
    Invalid,
}

/// Normalises the path of `path_and_query` and drops a fragment; the query stays as it is.
#[must_use]
pub fn normalize(path_and_query: &str, how: PathCleaning) -> Normalized<'_> {
    let whole = path_and_query.split_once('#').map_or(path_and_query, |(before, _)| before);
    let (path, query) = match whole.find('?') {
        Some(at) => whole.split_at(at),
        None => (whole, ""),
    };
    if !path.starts_with('/') {
        return if path == "*" { Normalized::Path(Cow::Borrowed(whole)) } else { Normalized::Invalid };
    }
    if is_plain(path) {
        return Normalized::Path(Cow::Borrowed(whole));
    }
    let mut out = Cow::Borrowed(path);
    let mut redirect = false;
    if how.escaped_slashes != EscapedSlashes::Keep && has_escaped_slash(&out) {
        match how.escaped_slashes {
            EscapedSlashes::Reject => return Normalized::Invalid,
            EscapedSlashes::UnescapeAndRedirect => redirect = true,
            EscapedSlashes::Keep | EscapedSlashes::UnescapeAndForward => {}
        }
        out = Cow::Owned(unescape_slashes(&out));
    }
    if how.normalize {
        match canonical(&out) {
            Some(path) => out = Cow::Owned(path),
            None => return Normalized::Invalid,
        }
        // an escape of an escape must not bring back what was just taken out
        if how.escaped_slashes != EscapedSlashes::Keep && has_escaped_slash(&out) {
            return Normalized::Invalid;
        }
    }
    if how.merge_slashes && out.contains("//") {
        out = Cow::Owned(merge(&out));
    }
    if redirect {
        return Normalized::Redirect(format!("{out}{query}"));
    }
    if out == path {
        return Normalized::Path(Cow::Borrowed(whole));
    }
    Normalized::Path(Cow::Owned(format!("{out}{query}")))
}

/// Nothing in it that any step could change; most paths of most services are like this.
fn is_plain(path: &str) -> bool {
    let mut previous = 0;
    for b in path.bytes() {
        let dotted = b == b'.' && previous == b'/';
        let doubled = b == b'/' && previous == b'/';
        if b == b'%' || b == b'\\' || dotted || doubled || is_escaped(b) {
            return false;
        }
        previous = b;
    }
    true
}

/// Characters that no path may have (RFC 3986, section 3.3), and that come all the same.
fn is_escaped(b: u8) -> bool {
    matches!(b, b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}')
}

fn has_escaped_slash(path: &str) -> bool {
    path.as_bytes().windows(3).any(|w| w.eq_ignore_ascii_case(b"%2f") || w.eq_ignore_ascii_case(b"%5c"))
}

fn unescape_slashes(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let (before, tail) = rest.split_at(at);
        out.push_str(before);
        let code = tail.get(1..3).unwrap_or_default();
        let decoded = if code.eq_ignore_ascii_case("2f") {
            '/'
        } else if code.eq_ignore_ascii_case("5c") {
            '\\'
        } else {
            '%'
        };
        out.push(decoded);
        rest = tail.get(if decoded == '%' { 1 } else { 3 }..).unwrap_or_default();
    }
    out.push_str(rest);
    out
}

/// Decodes unreserved characters, upper-cases other escapes, escapes what no path may have, turns backslashes into
/// slashes and removes dot segments. A `%` that begins no escape stays; where what is decoded behind it would make it
/// one, it is escaped itself, so that the outcome has one meaning. `None` when an escape stands for NUL.
fn canonical(path: &str) -> Option<String> {
    let mut signs = Vec::new();
    let mut decoded = String::with_capacity(path.len());
    let mut rest = path;
    let special = |c: char| matches!(c, '%' | '\\') || u8::try_from(c).is_ok_and(is_escaped);
    while let Some(at) = rest.find(special) {
        let (before, tail) = rest.split_at(at);
        decoded.push_str(before);
        if tail.starts_with('\\') {
            decoded.push('/');
            rest = tail.get(1..)?;
            continue;
        }
        if let Some(b) = tail.bytes().next().filter(|b| is_escaped(*b)) {
            decoded.push_str(&format!("%{b:02X}"));
            rest = tail.get(1..)?;
            continue;
        }
        let code = tail.get(1..3).filter(|code| code.bytes().all(|b| b.is_ascii_hexdigit()));
        let Some((code, byte)) = code.and_then(|code| Some((code, u8::from_str_radix(code, 16).ok()?)))
        else {
            signs.push(decoded.len());
            decoded.push('%');
            rest = tail.get(1..)?;
            continue;
        };
        match byte {
            0 => return None,
            b if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => decoded.push(char::from(b)),
            _ => {
                decoded.push('%');
                decoded.push_str(&code.to_ascii_uppercase());
            }
        }
        rest = tail.get(3..)?;
    }
    decoded.push_str(rest);
    let mut whole = String::with_capacity(decoded.len() + 2 * signs.len());
    let mut from = 0;
    for at in signs {
        let code = decoded.get(at + 1..at + 3);
        if code.is_some_and(|code| code.bytes().all(|b| b.is_ascii_hexdigit())) {
            whole.push_str(decoded.get(from..=at)?);
            whole.push_str("25");
            from = at + 1;
        }
    }
    whole.push_str(decoded.get(from..)?);
    Some(remove_dot_segments(&whole))
}

/// RFC 3986, section 5.2.4. Empty segments stay: only `merge_slashes` removes them.
fn remove_dot_segments(path: &str) -> String {
    let mut out: Vec<&str> = Vec::new();
    let body = path.strip_prefix('/').unwrap_or(path);
    let mut trailing = false;
    for segment in body.split('/') {
        trailing = false;
        if is_dots(segment, "..") {
            out.pop();
            trailing = true;
        } else if is_dots(segment, ".") {
            trailing = true;
        } else {
            out.push(segment);
        }
    }
    if trailing {
        out.push("");
    }
    format!("/{}", out.join("/"))
}

/// Whether a segment is these dots; some servers take no notice of its parameters.
fn is_dots(segment: &str, dots: &str) -> bool {
    segment.strip_prefix(dots).is_some_and(|rest| rest.is_empty() || rest.starts_with(';'))
}

fn merge(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !out.ends_with('/') {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: PathCleaning =
        PathCleaning { normalize: true, merge_slashes: false, escaped_slashes: EscapedSlashes::Keep };
    const DECODE: PathCleaning = PathCleaning {
        normalize: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::UnescapeAndForward,
    };

    #[track_caller]
    fn check(how: PathCleaning, path: &str, want: &str) {
        let got = match normalize(path, how) {
            Normalized::Path(p) => p.into_owned(),
            Normalized::Redirect(p) => format!("redirect {p}"),
            Normalized::Invalid => "400".into(),
        };
        assert_eq!(got, want, "{path}");
    }

    #[test]
    fn base_resolves_dots_and_unreserved_escapes() {
        check(BASE, "/admin", "/admin");
        check(BASE, "/./admin", "/admin");
        check(BASE, "/x/../admin", "/admin");
        check(BASE, "/x/%2e%2e/admin", "/admin");
        check(BASE, "/%61dmin?q=%61", "/admin?q=%61");
        check(BASE, "/a\\b", "/a/b");
        check(BASE, "/../../x", "/x");
        check(BASE, "/a/..;p=1/x;p=2", "/x;p=2");
        check(BASE, "/a/.;p=1/x/.;", "/a/x/");
        check(BASE, "//%2e;/.;p=1?q=.;", "//?q=.;");
        check(BASE, "/.x;/..x;", "/.x;/..x;");
        check(BASE, "/a/..", "/");
        check(BASE, "/a/.", "/a/");
        check(BASE, "//admin", "//admin");
        check(BASE, "/a%2fb", "/a%2Fb");
        check(BASE, "/user/profile#x", "/user/profile");
        check(BASE, "/a#?b", "/a");
        check(BASE, "/{a|b}^\"?{q}", "/%7Ba%7Cb%7D%5E%22?{q}");
    }

    #[test]
    fn decode_and_merge_leaves_no_second_spelling() {
        check(DECODE, "//admin", "/admin");
        check(DECODE, "/a%2F%2fadmin", "/a/admin");
        check(DECODE, "/x%2f..%2fadmin", "/admin");
        check(DECODE, "/x%5c..%5Cadmin", "/admin");
        check(DECODE, "/a?x=//", "/a?x=//");
    }

    #[test]
    fn malformed_paths_are_refused() {
        check(BASE, "/%00", "400");
        check(BASE, "admin", "400");
        check(BASE, "*", "*");
    }

    #[test]
    fn a_percent_sign_that_begins_no_escape_stays_and_hides_nothing() {
        check(BASE, "/%zz", "/%zz");
        check(BASE, "/100%", "/100%");
        check(BASE, "/%+1/%0", "/%+1/%0");
        check(BASE, "/a/%61%z/../b", "/a/b");
        check(BASE, "/a/%%32e%%32e/b", "/a/%252e%252e/b");
        check(BASE, "/%%300", "/%2500");
        check(DECODE, "/a%%32fb", "/a%252fb");
        check(BASE, "/a%2%30b/%%%36%31", "/a%2520b/%%2561");
    }

    #[test]
    fn encoded_slashes_may_be_refused_or_redirected() {
        let how = |escaped_slashes| PathCleaning { escaped_slashes, ..DECODE };
        check(how(EscapedSlashes::Reject), "/a%2fb", "400");
        check(how(EscapedSlashes::UnescapeAndRedirect), "/a%2fb?q", "redirect /a/b?q");
    }

    proptest! {
        #[test]
        fn a_normal_path_stays(path in "/[a-zA-Z0-9%./\\\\?#~-]{0,40}") {
            let again = PathCleaning { escaped_slashes: EscapedSlashes::Keep, ..DECODE };
            if let Normalized::Path(once) = normalize(&path, DECODE)
                && let Normalized::Path(twice) = normalize(&once, again)
            {
                prop_assert_eq!(once.as_ref(), twice.as_ref());
            }
        }
    }
}
