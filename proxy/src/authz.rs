//! Who may do what: rules against a connection and a request. Pure.
//!
//! A policy that cannot be evaluated is refused when it is configured, so here every rule has an answer. A missing
//! identity, header or request fulfils no condition on it.

pub mod jwt;

use std::net::SocketAddr;

use serde_json::{Map, Value};

use crate::http::head::Head;
use crate::tls::Peer;
use crate::xds::matcher::StringMatcher;
use crate::xds::rbac::{Action, Permission, Policy, Principal, Rules};

/// What rules may look at.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The address the client connected to.
    pub destination: SocketAddr,
    /// The other end of the connection.
    pub direct_remote: SocketAddr,
    /// The client, with forwarding headers taken into account.
    pub remote: SocketAddr,
    /// The peer of the TLS session.
    pub peer: Option<&'a Peer>,
    /// The server name in the TLS hello.
    pub server_name: Option<&'a str>,
    /// The request; `None` for a plain TCP connection.
    pub request: Option<Head<'a>>,
    /// What filters found out about the request.
    pub metadata: Option<&'a Map<String, Value>>,
}

/// What the rules say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// Go on; with the policy that allowed it, if one had to.
    Allow(Option<&'a str>),
    /// Stop; with the policy that denied it, or none if no policy allowed it.
    Deny(Option<&'a str>),
}

/// Applies the rules of one filter.
#[must_use]
pub fn allow<'r>(rules: &'r Rules, subject: &Subject<'_>) -> Verdict<'r> {
    // with several values of one header, one is enough to deny and all are needed to allow
    let every = rules.action == Action::Allow;
    let matched = rules.policies.iter().find(|p| matches(p, subject, every)).map(|p| &*p.name);
    match (rules.action, matched) {
        (Action::Allow, None) => Verdict::Deny(None),
        (Action::Deny, Some(name)) => Verdict::Deny(Some(name)),
        (Action::Allow | Action::Log, name) | (Action::Deny, name @ None) => Verdict::Allow(name),
    }
}

fn matches(policy: &Policy, subject: &Subject<'_>, every: bool) -> bool {
    policy.permissions.iter().any(|p| permits(p, subject, every))
        && policy.principals.iter().any(|p| is_principal(p, subject, every))
}

fn permits(permission: &Permission, s: &Subject<'_>, every: bool) -> bool {
    match permission {
        Permission::Any(any) => *any,
        Permission::And(all) => all.iter().all(|p| permits(p, s, every)),
        Permission::Or(any) => any.iter().any(|p| permits(p, s, every)),
        Permission::Not(inner) => !permits(inner, s, !every),
        Permission::Header(m) => s.request.is_some_and(|r| r.values_fulfil(m, every)),
        Permission::UrlPath(m) => url_path(m, s),
        Permission::DestinationIp(net) => net.contains(&s.destination.ip()),
        Permission::DestinationPort(port) => s.destination.port() == *port,
        Permission::DestinationPorts(start, end) => (*start..*end).contains(&u32::from(s.destination.port())),
        Permission::RequestedServerName(m) => m.matches(s.server_name.unwrap_or_default().as_bytes()),
        Permission::Metadata(m) => m.matches(s.metadata.unwrap_or(&Map::new())),
    }
}

fn is_principal(principal: &Principal, s: &Subject<'_>, every: bool) -> bool {
    match principal {
        Principal::Any(any) => *any,
        Principal::And(all) => all.iter().all(|p| is_principal(p, s, every)),
        Principal::Or(any) => any.iter().any(|p| is_principal(p, s, every)),
        // who shows no identity is not "somebody else": that must neither allow nor excuse
        Principal::Not(inner) if lacks_identity(inner, s) => !every,
        Principal::Not(inner) => !is_principal(inner, s, !every),
        Principal::Authenticated(name) => authenticated(name.as_ref(), s.peer),
        Principal::DirectRemoteIp(net) => net.contains(&s.direct_remote.ip()),
        Principal::RemoteIp(net) => net.contains(&s.remote.ip()),
        Principal::Header(m) => s.request.is_some_and(|r| r.values_fulfil(m, every)),
        Principal::UrlPath(m) => url_path(m, s),
        Principal::Metadata(m) => m.matches(s.metadata.unwrap_or(&Map::new())),
        Principal::PeerPrincipal(m) => {
            s.peer.and_then(Peer::spiffe_id).is_some_and(|id| m.matches(id.as_bytes()))
        }
    }
}

/// Whether the answer hangs on an identity that the peer did not show.
fn lacks_identity(principal: &Principal, s: &Subject<'_>) -> bool {
    match principal {
        Principal::Authenticated(_) | Principal::PeerPrincipal(_) => {
            s.peer.and_then(Peer::spiffe_id).is_none()
        }
        Principal::And(all) | Principal::Or(all) => all.iter().any(|p| lacks_identity(p, s)),
        Principal::Not(inner) => lacks_identity(inner, s),
        Principal::Any(_)
        | Principal::DirectRemoteIp(_)
        | Principal::RemoteIp(_)
        | Principal::Header(_)
        | Principal::UrlPath(_)
        | Principal::Metadata(_) => false,
    }
}

fn url_path(matcher: &StringMatcher, s: &Subject<'_>) -> bool {
    s.request.is_some_and(|r| matcher.matches(r.path().as_bytes()))
}

/// URI names count first, then DNS names, then the subject.
fn authenticated(name: Option<&StringMatcher>, peer: Option<&Peer>) -> bool {
    let Some(peer) = peer.filter(|p| p.has_certificate) else { return false };
    let Some(matcher) = name else { return true };
    let any = |names: &[String]| names.iter().any(|n| matcher.matches(n.as_bytes()));
    if !peer.uris.is_empty() {
        any(&peer.uris)
    } else if !peer.dns.is_empty() {
        any(&peer.dns)
    } else {
        matcher.matches(peer.subject.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xds::matcher::{HeaderKey, HeaderMatcher, HeaderTest};
    use http::{HeaderMap, HeaderName, Method};

    fn header(name: &'static str, value: &str) -> HeaderMatcher {
        HeaderMatcher {
            key: HeaderKey::Name(HeaderName::from_static(name)),
            test: HeaderTest::String(StringMatcher::Exact(value.into())),
            invert: false,
            missing_is_empty: false,
        }
    }

    fn rules(action: Action, permission: Permission, principal: Principal) -> Rules {
        let policy =
            Policy { name: "p".into(), permissions: [permission].into(), principals: [principal].into() };
        Rules { action, policies: [policy].into() }
    }

    fn denied(rules: &Rules, path: &str, headers: &[(&'static str, &str)], uris: &[&str]) -> bool {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        let peer = Peer {
            uris: uris.iter().map(|u| (*u).to_owned()).collect(),
            has_certificate: !uris.is_empty(),
            ..Peer::default()
        };
        let subject = Subject {
            destination: "10.0.0.1:9080".parse().unwrap(),
            direct_remote: "10.0.0.2:1".parse().unwrap(),
            remote: "192.0.2.1:1".parse().unwrap(),
            peer: Some(&peer),
            server_name: None,
            request: Some(Head {
                method: &Method::GET,
                path_and_query: path,
                authority: "a",
                scheme: "http",
                headers: &map,
            }),
            metadata: None,
        };
        matches!(allow(rules, &subject), Verdict::Deny(_))
    }

    fn exact(text: &str) -> StringMatcher {
        StringMatcher::Exact(text.into())
    }

    #[test]
    fn allow_needs_a_match_and_deny_a_miss() {
        let any = || Principal::Any(true);
        let path = || Permission::UrlPath(StringMatcher::Prefix("/admin".into()));
        assert!(!denied(&rules(Action::Allow, path(), any()), "/admin/x?y=1", &[], &[]));
        assert!(denied(&rules(Action::Allow, path(), any()), "/", &[], &[]));
        assert!(denied(&rules(Action::Deny, path(), any()), "/admin", &[], &[]));
        assert!(!denied(&rules(Action::Deny, path(), any()), "/?q=/admin", &[], &[]));
        assert!(!denied(&rules(Action::Log, path(), any()), "/admin", &[], &[]));
        let none = Rules { action: Action::Allow, policies: [].into() };
        assert!(denied(&none, "/", &[], &[]), "no policy at all allows nothing");
    }

    #[test]
    fn a_missing_identity_satisfies_no_rule() {
        let who = |m| rules(Action::Allow, Permission::Any(true), Principal::Authenticated(m));
        let id = "spiffe://cluster.local/ns/a/sa/b";
        assert!(!denied(&who(Some(exact(id))), "/", &[], &[id]));
        assert!(denied(&who(Some(exact(id))), "/", &[], &["spiffe://cluster.local/ns/a/sa/c"]));
        assert!(denied(&who(Some(exact(id))), "/", &[], &[]));
        assert!(denied(&who(None), "/", &[], &[]));
        assert!(denied(&who(Some(StringMatcher::Exact("".into()))), "/", &[], &[]));
        let not = |action| {
            let inner = Principal::Authenticated(Some(exact(id)));
            rules(action, Permission::Any(true), Principal::Not(Box::new(inner)))
        };
        assert!(denied(&not(Action::Allow), "/", &[], &[]));
        assert!(denied(&not(Action::Deny), "/", &[], &[]));
        assert!(!denied(&not(Action::Allow), "/", &[], &["spiffe://cluster.local/ns/a/sa/c"]));
        let several = ["spiffe://cluster.local/ns/a/sa/c", "spiffe://cluster.local/ns/a/sa/d"];
        assert!(denied(&not(Action::Allow), "/", &[], &several), "who has several names has no identity");
        assert!(denied(&not(Action::Deny), "/", &[], &["https://example.com"]));
    }

    #[test]
    fn every_value_of_a_header_counts() {
        let any = || Principal::Any(true);
        let h = || Permission::Header(header("x-role", "admin"));
        let both = [("x-role", "user"), ("x-role", "admin")];
        assert!(denied(&rules(Action::Deny, h(), any()), "/", &both, &[]));
        assert!(denied(&rules(Action::Allow, h(), any()), "/", &both, &[]));
        assert!(!denied(&rules(Action::Allow, h(), any()), "/", &[("x-role", "admin")], &[]));
        let not = || Permission::Not(Box::new(h()));
        assert!(denied(&rules(Action::Deny, not(), any()), "/", &both, &[]));
        assert!(denied(&rules(Action::Allow, not(), any()), "/", &both, &[]));
    }

    #[test]
    fn addresses_and_ports_are_the_connections() {
        let at = |p| rules(Action::Deny, p, Principal::RemoteIp("192.0.2.0/24".parse().unwrap()));
        assert!(denied(&at(Permission::DestinationPort(9080)), "/", &[], &[]));
        assert!(!denied(&at(Permission::DestinationPorts(9081, 9090)), "/", &[], &[]));
        let direct = Principal::DirectRemoteIp("192.0.2.0/24".parse().unwrap());
        assert!(!denied(&rules(Action::Deny, Permission::Any(true), direct), "/", &[], &[]));
    }
}
