//! What leaves the proxy instead of what came: rewritten paths and hosts, redirects. Pure.

use std::borrow::Cow;

use crate::http::head::Head;
use crate::http::headers::FORWARDED_PROTO;
use crate::router::without_port;
use crate::xds::matcher::RegexRewrite;
use crate::xds::route::PathMatch;
use crate::xds::route::action::{PathRewrite, Redirect};

/// The path and query to send on; `None` when they stay as they are.
#[must_use]
pub fn path(rewrite: &PathRewrite, matched: &PathMatch, path_and_query: &str) -> Option<String> {
    let (path, query) = match path_and_query.find('?') {
        Some(at) => path_and_query.split_at(at),
        None => (path_and_query, ""),
    };
    match rewrite {
        PathRewrite::None => None,
        PathRewrite::Full(new) => Some(format!("{new}{query}")),
        PathRewrite::Regex(r) => Some(format!("{}{query}", r.apply(path))),
        PathRewrite::Prefix(new) => {
            let rest = path.get(matched_length(matched, path)..).unwrap_or_default();
            Some(format!("{new}{rest}{query}"))
        }
    }
}

/// How much of the path the route matched: a prefix, or all of it.
fn matched_length(matched: &PathMatch, path: &str) -> usize {
    match matched {
        PathMatch::Prefix(p) | PathMatch::SeparatedPrefix(p) => p.len(),
        PathMatch::IgnoreCase(inner) => matched_length(inner, path),
        PathMatch::Exact(_) | PathMatch::Regex(_) => path.len(),
    }
}

/// The authority that a path turns into.
#[must_use]
pub fn host_from_path(rewrite: &RegexRewrite, head: &Head<'_>) -> String {
    rewrite.apply(head.path())
}

/// The `location` of a redirect.
#[must_use]
pub fn location(redirect: &Redirect, matched: &PathMatch, head: &Head<'_>) -> String {
    let scheme = redirect.scheme.as_ref().map_or(head.scheme, |s| s.as_str());
    let host = redirect.host.as_deref().unwrap_or_else(|| {
        // a new scheme or port goes with the bare host
        let before = forwarded_proto(head);
        let renamed = redirect.port.is_some() || scheme != before && has_port_of(head.authority, before);
        if renamed { without_port(head.authority) } else { head.authority }
    });
    let port = redirect.port.map(|port| format!(":{port}")).unwrap_or_default();
    let path = match &redirect.path {
        // its own query stands for the request's, and stays
        PathRewrite::Full(new) if new.contains('?') => Cow::Borrowed(&**new),
        PathRewrite::None | PathRewrite::Prefix(_) | PathRewrite::Regex(_) | PathRewrite::Full(_) => {
            let new = path(&redirect.path, matched, head.path_and_query);
            let whole = new.map_or(head.path_and_query.into(), Cow::Owned);
            let end = whole.find('?').filter(|_| redirect.strip_query).unwrap_or(whole.len());
            Cow::Owned(whole.get(..end).unwrap_or_default().to_owned())
        }
    };
    let slash = if path.starts_with('/') { "" } else { "/" };
    format!("{scheme}://{host}{port}{slash}{path}")
}

/// Where a request is, as a `location`.
#[must_use]
pub fn own_location(head: &Head<'_>) -> String {
    format!("{}://{}{}", head.scheme, head.authority, head.path_and_query)
}

/// The scheme by which the client came, as the proxy before this one says.
fn forwarded_proto<'a>(head: &Head<'a>) -> &'a str {
    head.headers.get(FORWARDED_PROTO).and_then(|v| v.to_str().ok()).unwrap_or(head.scheme)
}

fn has_port_of(authority: &str, scheme: &str) -> bool {
    match scheme {
        "https" => authority.ends_with(":443"),
        "http" => authority.ends_with(":80"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderMap, Method, StatusCode};

    #[track_caller]
    fn check_path(rewrite: PathRewrite, matched: PathMatch, from: &str, to: Option<&str>) {
        assert_eq!(path(&rewrite, &matched, from).as_deref(), to);
    }

    #[test]
    fn the_matched_part_is_replaced_and_the_query_stays() {
        let prefix = |p: &str| PathMatch::Prefix(p.into());
        let new = |p: &str| PathRewrite::Prefix(p.into());
        check_path(PathRewrite::None, prefix("/"), "/a?b", None);
        check_path(new("/v2"), prefix("/v1"), "/v1/x?y=1", Some("/v2/x?y=1"));
        check_path(new("/"), prefix("/api/"), "/api/x", Some("/x"));
        check_path(new("/new"), PathMatch::Exact("/old".into()), "/old?q", Some("/new?q"));
        check_path(new("/n"), PathMatch::IgnoreCase(Box::new(prefix("/old"))), "/OLD/x", Some("/n/x"));
        check_path(PathRewrite::Full("/f".into()), prefix("/"), "/old?q", Some("/f?q"));
        let regex = RegexRewrite {
            pattern: regex::Regex::new("^/([a-z]+)/v1").unwrap(),
            substitution: "/v2/${1}".into(),
        };
        check_path(PathRewrite::Regex(regex), prefix("/"), "/cart/v1/x?v1", Some("/v2/cart/x?v1"));
    }

    #[track_caller]
    fn check_redirect(change: impl Fn(&mut Redirect), authority: &str, to: &str) {
        let mut redirect = Redirect {
            status: StatusCode::MOVED_PERMANENTLY,
            scheme: None,
            host: None,
            port: None,
            path: PathRewrite::None,
            strip_query: false,
        };
        change(&mut redirect);
        let headers = HeaderMap::new();
        let head = Head {
            method: &Method::GET,
            path_and_query: "/p?q",
            authority,
            scheme: "http",
            headers: &headers,
        };
        assert_eq!(location(&redirect, &PathMatch::Prefix("/".into()), &head), to);
    }

    #[test]
    fn redirects_change_only_what_they_name() {
        check_redirect(|r| r.host = Some("new".into()), "old:8080", "http://new/p?q");
        check_redirect(|r| r.scheme = Some(http::uri::Scheme::HTTPS), "old:80", "https://old/p?q");
        check_redirect(|r| r.port = Some(8443), "old:8080", "http://old:8443/p?q");
        check_redirect(|r| r.port = Some(80), "old:8080", "http://old:80/p?q");
        check_redirect(|r| r.strip_query = true, "old", "http://old/p");
        check_redirect(|r| r.path = PathRewrite::Full("/n".into()), "old", "http://old/n?q");
        let own_query = |r: &mut Redirect| {
            r.path = PathRewrite::Full("/n?own".into());
            r.strip_query = true;
        };
        check_redirect(own_query, "old", "http://old/n?own");
    }
}
