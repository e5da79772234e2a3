//! Which route serves a request. Pure: the request's head, one random number, and what is known of the client's
//! certificate go in; a route comes out.

pub mod rewrite;
pub mod split;

use std::sync::Arc;

use ahash::AHashMap;
use http::Method;

use crate::http::head::Head;
use crate::xds::matcher::QueryMatcher;
use crate::xds::route::{Route, RouteConfiguration, RouteMatch, TlsMatch, VirtualHost};

/// A route configuration with its domains indexed.
#[derive(Debug)]
pub struct Routes {
    /// The configuration.
    pub config: Arc<RouteConfiguration>,
    exact: AHashMap<Box<str>, usize>,
    /// `*.b`, the longest first, without the star.
    suffixes: Vec<(Box<str>, usize)>,
    /// `a.*`, the longest first, without the star.
    prefixes: Vec<(Box<str>, usize)>,
    any: Option<usize>,
}

/// What a route may ask about the client's certificate.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientCertificate {
    /// One was shown.
    pub presented: bool,
    /// It was verified.
    pub validated: bool,
}

impl Routes {
    /// Indexes a configuration.
    #[must_use]
    pub fn new(config: Arc<RouteConfiguration>) -> Self {
        let mut this = Self {
            exact: AHashMap::new(),
            suffixes: Vec::new(),
            prefixes: Vec::new(),
            any: None,
            config: Arc::clone(&config),
        };
        for (index, host) in config.virtual_hosts.iter().enumerate() {
            for domain in &host.domains {
                if &**domain == "*" {
                    this.any = Some(index);
                } else if let Some(suffix) = domain.strip_prefix('*') {
                    this.suffixes.push((suffix.into(), index));
                } else if let Some(prefix) = domain.strip_suffix('*') {
                    this.prefixes.push((prefix.into(), index));
                } else {
                    this.exact.insert(domain.clone(), index);
                }
            }
        }
        this.suffixes.sort_by_key(|(s, _)| std::cmp::Reverse(s.len()));
        this.prefixes.sort_by_key(|(p, _)| std::cmp::Reverse(p.len()));
        this
    }

    /// The virtual host of an authority.
    #[must_use]
    pub fn virtual_host(&self, authority: &str) -> Option<&Arc<VirtualHost>> {
        let only_any = self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty();
        let index = if only_any { self.any } else { self.find(authority) };
        self.config.virtual_hosts.get(index?)
    }

    fn find(&self, authority: &str) -> Option<usize> {
        let lowered;
        let host = if authority.bytes().any(|b| b.is_ascii_uppercase()) {
            lowered = authority.to_ascii_lowercase();
            lowered.as_str()
        } else {
            authority
        };
        let host = if self.config.ignore_port_in_host_matching { without_port(host) } else { host };
        if let Some(index) = self.exact.get(host) {
            return Some(*index);
        }
        let longer = |part: &str| host.len() > part.len();
        let suffix = self.suffixes.iter().find(|(s, _)| longer(s) && host.ends_with(&**s));
        let prefix = || self.prefixes.iter().find(|(p, _)| longer(p) && host.starts_with(&**p));
        suffix.or_else(prefix).map(|(_, index)| *index).or(self.any)
    }
}

/// The authority's host: without `:port`, with the brackets of an IPv6 address.
#[must_use]
pub fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => {
            if host.contains(':') && !host.ends_with(']') { authority } else { host }
        }
        _ => authority,
    }
}

/// The one form of an authority that policies, routes and servers see: no dot at the end of its name, no colon
/// without a port. `None` when no name is left.
#[must_use]
pub fn canonical_authority(authority: &str) -> Option<std::borrow::Cow<'_, str>> {
    let bare = without_port(authority);
    let port = authority.get(bare.len()..).filter(|p| p.len() > 1).unwrap_or_default();
    let host = bare.trim_end_matches('.');
    if host.is_empty() {
        return None;
    }
    Some(if host.len() + port.len() == authority.len() {
        authority.into()
    } else {
        format!("{host}{port}").into()
    })
}

/// The first route of a virtual host that matches; `random` decides about shares of requests.
#[must_use]
pub fn match_route<'a>(
    host: &'a VirtualHost,
    head: &Head<'_>,
    certificate: ClientCertificate,
    random: u64,
) -> Option<&'a Arc<Route>> {
    let path = head.path();
    host.routes.iter().find(|r| matches(&r.matches, head, path, certificate, random))
}

/// Whether a request fulfils a match that stands alone, outside of a route.
#[must_use]
pub fn fits(wanted: &RouteMatch, head: &Head<'_>, certificate: ClientCertificate, random: u64) -> bool {
    matches(wanted, head, head.path(), certificate, random)
}

fn matches(
    wanted: &RouteMatch,
    head: &Head<'_>,
    path: &str,
    certificate: ClientCertificate,
    random: u64,
) -> bool {
    // a CONNECT request has no path, and no route is for it
    *head.method != Method::CONNECT
        && wanted.path.matches(path)
        && wanted.headers.iter().all(|m| head.fulfils(m))
        && (wanted.query.is_empty() || query_fulfils(&wanted.query, head.query()))
        && (!wanted.grpc || is_grpc(head))
        && wanted.tls.is_none_or(|t| tls_fits(t, certificate))
        && wanted.fraction.is_none_or(|f| f.hits(random))
}

/// Whether a request or response is gRPC, by its content type.
#[must_use]
pub fn is_grpc(head: &Head<'_>) -> bool {
    head.headers.get(http::header::CONTENT_TYPE).is_some_and(|v| is_grpc_type(v.as_bytes()))
}

/// `application/grpc`, with or without a format behind `+`.
#[must_use]
pub fn is_grpc_type(content_type: &[u8]) -> bool {
    content_type
        .strip_prefix(b"application/grpc")
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"+") || rest.starts_with(b";"))
}

fn tls_fits(wanted: TlsMatch, certificate: ClientCertificate) -> bool {
    wanted.presented.is_none_or(|p| p == certificate.presented)
        && wanted.validated.is_none_or(|v| v == certificate.validated)
}

fn query_fulfils(wanted: &[QueryMatcher], query: Option<&str>) -> bool {
    wanted.iter().all(|m| {
        let value = query.unwrap_or_default().split('&').find_map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            // Envoy compares them as they are written, escapes and all
            (name == &*m.name).then_some(value)
        });
        m.matches(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::route::v3 as pb;
    use http::HeaderMap;

    /// `domains > path-prefix[?header=value] -> name`, one route per line.
    fn routes(table: &str, ignore_port: bool) -> Routes {
        let mut hosts: Vec<pb::VirtualHost> = Vec::new();
        for (n, line) in table.lines().map(str::trim).filter(|l| !l.is_empty()).enumerate() {
            let (domains, rest) = line.split_once(" > ").unwrap();
            let (wanted, name) = rest.split_once(" -> ").unwrap();
            let (prefix, header) = wanted.split_once(" with ").map_or((wanted, None), |(p, h)| (p, Some(h)));
            let headers = header.map(|h| h.split_once('=').unwrap()).into_iter().map(|(name, value)| {
                use pb::header_matcher::HeaderMatchSpecifier;
                #[expect(deprecated, reason = "the shortest form")]
                let specifier = HeaderMatchSpecifier::ExactMatch(value.into());
                pb::HeaderMatcher {
                    name: name.into(),
                    header_match_specifier: Some(specifier),
                    ..Default::default()
                }
            });
            let route = pb::Route {
                name: name.into(),
                r#match: Some(pb::RouteMatch {
                    path_specifier: Some(pb::route_match::PathSpecifier::Prefix(prefix.into())),
                    headers: headers.collect(),
                    ..Default::default()
                }),
                action: Some(pb::route::Action::DirectResponse(pb::DirectResponseAction {
                    status: 200,
                    ..Default::default()
                })),
                ..Default::default()
            };
            let domains: Vec<String> = domains.split(' ').map(Into::into).collect();
            match hosts.iter_mut().find(|h| h.domains == domains) {
                Some(host) => host.routes.push(route),
                None => hosts.push(pb::VirtualHost {
                    name: format!("v{n}"),
                    domains,
                    routes: vec![route],
                    ..Default::default()
                }),
            }
        }
        let config = pb::RouteConfiguration {
            name: "r".into(),
            virtual_hosts: hosts,
            ignore_port_in_host_matching: ignore_port,
            ..Default::default()
        };
        Routes::new(Arc::new(RouteConfiguration::new(config).unwrap()))
    }

    #[track_caller]
    fn check(table: &str, request: &str, expected: &str) {
        let (target, header) = request.split_once(' ').map_or((request, None), |(t, h)| (t, Some(h)));
        let (authority, path) = target.split_at(target.find('/').unwrap());
        let mut headers = HeaderMap::new();
        if let Some((name, value)) = header.and_then(|h| h.split_once('=')) {
            headers.insert(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        }
        let head =
            Head { method: &Method::GET, path_and_query: path, authority, scheme: "http", headers: &headers };
        let routes = routes(table, true);
        let host = routes.virtual_host(authority);
        let got = host.and_then(|host| match_route(host, &head, ClientCertificate::default(), 0));
        assert_eq!(got.map_or("none", |r| &*r.name), expected, "{request}");
    }

    #[test]
    fn earlier_route_wins_over_longer_prefix() {
        check("* > / -> web\n* > /api -> api", "h/api/users", "web");
        check("* > /api -> api\n* > / -> web", "h/api/users", "api");
        check("* > /api -> api", "h/", "none");
    }

    #[test]
    fn exact_domain_beats_suffix_beats_prefix_beats_any() {
        let table =
            "a.b.c > / -> exact\n*.b.c > / -> suffix\n*.c > / -> short\na.* > / -> prefix\n* > / -> any";
        check(table, "a.b.c/", "exact");
        check(table, "A.B.C:8080/", "exact");
        check(table, "x.b.c/", "suffix");
        check(table, "x.c/", "short");
        check(table, "a.d/", "prefix");
        check(table, "d/", "any");
        check("a.b > / -> only", "c.d/", "none");
        check("[::1] > / -> v6", "[::1]:80/", "v6");
    }

    #[test]
    fn an_authority_has_one_form() {
        let form = |text| canonical_authority(text).map(std::borrow::Cow::into_owned);
        for (text, expected) in [
            ("a.b", Some("a.b")),
            ("a.b:80", Some("a.b:80")),
            ("a.b.", Some("a.b")),
            ("a.b..:80", Some("a.b:80")),
            ("a.b:", Some("a.b")),
            ("a.b.:", Some("a.b")),
            ("[::1]:", Some("[::1]")),
            ("[::1]:80", Some("[::1]:80")),
            ("::1", Some("::1")),
            (".", None),
            (":80", None),
        ] {
            assert_eq!(form(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn headers_choose_among_routes_of_one_prefix() {
        let table = "* > / with end-user=jason -> v2\n* > / -> v1";
        check(table, "reviews/ end-user=jason", "v2");
        check(table, "reviews/ end-user=other", "v1");
        check(table, "reviews/", "v1");
    }

    #[test]
    fn the_query_is_no_part_of_the_path() {
        check("* > /a?b -> q\n* > /a -> path", "h/a?b", "path");
    }
}
