//! `RouteConfiguration` from its proto, validated once.
//!
//! Levels above a route are folded into it here: what the virtual host and the configuration say about filters,
//! retries and mirrors is found on the route itself.

pub mod action;
pub mod retry;

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use regex::bytes::Regex;

use self::action::{Action, MirrorPolicy};
use self::retry::RetryPolicy;
use super::decode::{Fraction, Invalid, Kind, Metadata, Rejected, Under as _, bool_or, runtime_fraction};
use super::filter::{PerFilter, per_filter};
use super::matcher::{HeaderMatcher, QueryMatcher, full_regex, headers};
use super::mutation::HeaderOps;

/// Numbers the clusters that a resource names, so that the request path looks them up by number, not by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterNames(Vec<Arc<str>>);

/// The number of a cluster in the [`ClusterNames`] of the resource that names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterRef(pub usize);

impl ClusterNames {
    /// The number of this name, which is given one if it has none yet.
    pub fn intern(&mut self, name: &str) -> ClusterRef {
        if let Some(i) = self.0.iter().position(|n| **n == *name) {
            return ClusterRef(i);
        }
        self.0.push(name.into());
        ClusterRef(self.0.len() - 1)
    }

    /// The name behind a number.
    #[must_use]
    pub fn name(&self, cluster: ClusterRef) -> Option<&Arc<str>> {
        self.0.get(cluster.0)
    }

    /// All names, by number.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<str>> {
        self.0.iter()
    }
}

/// The routes of a connection manager.
#[derive(Debug)]
pub struct RouteConfiguration {
    /// Its name.
    pub name: Arc<str>,
    /// Virtual hosts; no domain is in two of them.
    pub virtual_hosts: Box<[Arc<VirtualHost>]>,
    /// Operations on requests, at this level.
    pub request_headers: HeaderOps,
    /// Operations on responses, at this level.
    pub response_headers: HeaderOps,
    /// Carry out the configuration's operations first and the route's last, instead of the other way round.
    pub most_specific_header_mutations_wins: bool,
    /// Match domains without the port of the request's authority.
    pub ignore_port_in_host_matching: bool,
    /// The clusters named anywhere in it.
    pub clusters: ClusterNames,
}

/// One virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: Arc<str>,
    /// Domains in lower case: `a.b`, `*.b`, `a.*` or `*`.
    pub domains: Box<[Box<str>]>,
    /// Routes; the first that matches is taken.
    pub routes: Box<[Arc<Route>]>,
    /// Requests that must come over TLS.
    pub require_tls: RequireTls,
    /// Operations on requests, at this level.
    pub request_headers: HeaderOps,
    /// Operations on responses, at this level.
    pub response_headers: HeaderOps,
    /// Tell the server which attempt this is (`x-envoy-attempt-count`).
    pub include_request_attempt_count: bool,
    /// Tell the client how many attempts there were.
    pub include_attempt_count_in_response: bool,
}

/// Which plain-text requests are redirected to https.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequireTls {
    /// None.
    None,
    /// Those from outside.
    ExternalOnly,
    /// All.
    All,
}

/// One route.
#[derive(Debug)]
pub struct Route {
    /// Its name, empty if it has none.
    pub name: Arc<str>,
    /// Which requests.
    pub matches: RouteMatch,
    /// What happens to them.
    pub action: Action,
    /// Operations on requests, at this level.
    pub request_headers: HeaderOps,
    /// Operations on responses, at this level.
    pub response_headers: HeaderOps,
    /// What this level and those above say about filters.
    pub per_filter: Arc<PerFilter>,
    /// Free-form data.
    pub metadata: Metadata,
    /// The name of its span and of its statistics.
    pub operation: Option<Box<str>>,
    /// How much of a body may be held back for a retry or a mirror, in bytes.
    pub buffer_limit: Option<u64>,
}

/// Which requests.
#[derive(Debug, Clone)]
pub struct RouteMatch {
    /// What the path must be.
    pub path: PathMatch,
    /// All of these headers.
    pub headers: Box<[HeaderMatcher]>,
    /// All of these query parameters.
    pub query: Box<[QueryMatcher]>,
    /// Only gRPC.
    pub grpc: bool,
    /// Only this share; the rest goes on to the next route.
    pub fraction: Option<Fraction>,
    /// Only with (or without) a client certificate, and only with a verified one.
    pub tls: Option<TlsMatch>,
}

/// A condition on the client's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsMatch {
    /// It was shown (or was not).
    pub presented: Option<bool>,
    /// It was verified (or was not).
    pub validated: Option<bool>,
}

/// What the path must be, without its query.
#[derive(Debug, Clone)]
pub enum PathMatch {
    /// It begins like this.
    Prefix(Box<str>),
    /// It is this.
    Exact(Box<str>),
    /// It is this, or begins with this and a slash.
    SeparatedPrefix(Box<str>),
    /// The whole of it matches.
    Regex(Regex),
    /// Like one of the others, letters without case. The inner text is in lower case.
    IgnoreCase(Box<PathMatch>),
}

impl PathMatch {
    /// Whether the path of a request (without its query; not CONNECT) is as it must be.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Prefix(p) => path.starts_with(&**p),
            Self::Exact(p) => path == &**p,
            Self::SeparatedPrefix(p) => {
                path.strip_prefix(&**p).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Regex(r) => r.is_match(path.as_bytes()),
            Self::IgnoreCase(inner) => inner.matches(&path.to_ascii_lowercase()),
        }
    }
}

/// What the levels above pass down to a route.
struct Above {
    per_filter: Arc<PerFilter>,
    retry: Option<Arc<RetryPolicy>>,
    mirrors: Box<[MirrorPolicy]>,
    buffer_limit: Option<u64>,
    cors: Option<pb::CorsPolicy>,
}

impl TryFrom<pb::RouteConfiguration> for RouteConfiguration {
    type Error = Rejected;

    fn try_from(pb: pb::RouteConfiguration) -> Result<Self, Rejected> {
        let name = pb.name.clone();
        Self::new(pb).map_err(|invalid| Rejected { kind: Kind::Routes, name, invalid })
    }
}

impl RouteConfiguration {
    /// From its proto; unlike `try_from` for routes that are part of a listener.
    ///
    /// # Errors
    ///
    /// Anything in it that is not valid or not carried out by this proxy.
    pub fn new(pb: pb::RouteConfiguration) -> Result<Self, Invalid> {
        if pb.vhds.is_some() {
            return Err(Invalid::unsupported("vhds"));
        }
        if !pb.cluster_specifier_plugins.iter().all(|p| p.is_optional) {
            return Err(Invalid::unsupported("cluster_specifier_plugins"));
        }
        if !pb.vhost_header.is_empty() {
            return Err(Invalid::unsupported("vhost_header"));
        }
        if !pb.route_specifiers.is_empty() {
            return Err(Invalid::unsupported("route_specifiers"));
        }
        let mut clusters = ClusterNames::default();
        let above = Above {
            per_filter: per_filter(&Arc::default(), pb.typed_per_filter_config)?,
            retry: None,
            mirrors: action::mirrors(pb.request_mirror_policies, &mut clusters)?,
            buffer_limit: None,
            cors: None,
        };
        let virtual_hosts = pb
            .virtual_hosts
            .into_iter()
            .enumerate()
            .map(|(i, v)| virtual_host(v, &above, &mut clusters).map(Arc::new).at("virtual_hosts", i))
            .collect::<Result<Box<[_]>, _>>()?;
        unique_domains(&virtual_hosts)?;
        Ok(Self {
            name: pb.name.into(),
            virtual_hosts,
            request_headers: HeaderOps::new(
                pb.request_headers_to_add,
                &pb.request_headers_to_remove,
                "request",
            )?,
            response_headers: HeaderOps::new(
                pb.response_headers_to_add,
                &pb.response_headers_to_remove,
                "response",
            )?,
            most_specific_header_mutations_wins: pb.most_specific_header_mutations_wins,
            ignore_port_in_host_matching: pb.ignore_port_in_host_matching,
            clusters,
        })
    }

    /// Routes that match nothing: what a listener has whose routes do not exist.
    #[must_use]
    pub fn empty(name: &str) -> Self {
        Self {
            name: name.into(),
            virtual_hosts: Box::default(),
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            most_specific_header_mutations_wins: false,
            ignore_port_in_host_matching: false,
            clusters: ClusterNames::default(),
        }
    }
}

fn unique_domains(hosts: &[Arc<VirtualHost>]) -> Result<(), Invalid> {
    let mut seen = std::collections::BTreeMap::new();
    for (i, host) in hosts.iter().enumerate() {
        for domain in &host.domains {
            if let Some(other) = seen.insert(&**domain, &host.name) {
                let reason = format!("`{domain}` is also a domain of virtual host `{other}`");
                return Err(Invalid::new(format!("virtual_hosts[{i}].domains"), reason));
            }
        }
    }
    Ok(())
}

fn virtual_host(
    pb: pb::VirtualHost,
    above: &Above,
    clusters: &mut ClusterNames,
) -> Result<VirtualHost, Invalid> {
    if pb.name.is_empty() {
        return Err(Invalid::missing("name"));
    }
    for (set, field) in [
        (pb.matcher.is_some(), "matcher"),
        (!pb.rate_limits.is_empty(), "rate_limits"),
        (pb.hedge_policy.is_some(), "hedge_policy"),
        (pb.retry_policy_typed_config.is_some(), "retry_policy_typed_config"),
        (!pb.route_specifiers.is_empty(), "route_specifiers"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    let domains = pb
        .domains
        .into_iter()
        .enumerate()
        .map(|(i, d)| domain(&d).at("domains", i))
        .collect::<Result<Box<[_]>, _>>()?;
    if domains.is_empty() {
        return Err(Invalid::missing("domains"));
    }
    let require_tls = match pb.require_tls {
        0 => RequireTls::None,
        1 => RequireTls::ExternalOnly,
        2 => RequireTls::All,
        other => return Err(Invalid::new("require_tls", format!("unknown value {other}"))),
    };
    let own_mirrors = action::mirrors(pb.request_mirror_policies, clusters)?;
    #[expect(deprecated, reason = "older servers still send it")]
    let buffer_limit = pb
        .request_body_buffer_limit
        .map(|l| l.value)
        .or(pb.per_request_buffer_limit_bytes.map(|l| l.value.into()));
    #[expect(deprecated, reason = "older servers still send it")]
    let cors = pb.cors;
    let level = Above {
        per_filter: per_filter(&above.per_filter, pb.typed_per_filter_config)?,
        retry: pb.retry_policy.map(RetryPolicy::new).transpose().under("retry_policy")?.map(Arc::new),
        mirrors: if own_mirrors.is_empty() { above.mirrors.clone() } else { own_mirrors },
        buffer_limit,
        cors,
    };
    let routes = pb
        .routes
        .into_iter()
        .enumerate()
        .map(|(i, r)| route(r, &level, clusters).map(Arc::new).at("routes", i))
        .collect::<Result<_, _>>()?;
    Ok(VirtualHost {
        name: pb.name.into(),
        domains,
        routes,
        require_tls,
        request_headers: HeaderOps::new(pb.request_headers_to_add, &pb.request_headers_to_remove, "request")?,
        response_headers: HeaderOps::new(
            pb.response_headers_to_add,
            &pb.response_headers_to_remove,
            "response",
        )?,
        include_request_attempt_count: pb.include_request_attempt_count,
        include_attempt_count_in_response: pb.include_attempt_count_in_response,
    })
}

/// A domain: whole, with a leading or a trailing `*`, or `*`; in lower case.
fn domain(text: &str) -> Result<Box<str>, Invalid> {
    let stars = text.matches('*').count();
    if text.is_empty() || stars > 1 || (stars == 1 && !text.starts_with('*') && !text.ends_with('*')) {
        let reason = format!("`{text}` is not a domain: one `*` may stand first or last");
        return Err(Invalid::new("", reason));
    }
    Ok(text.to_ascii_lowercase().into())
}

fn route(pb: pb::Route, above: &Above, clusters: &mut ClusterNames) -> Result<Route, Invalid> {
    if !pb.route_specifiers.is_empty() {
        return Err(Invalid::unsupported("route_specifiers"));
    }
    let matches = RouteMatch::new(pb.r#match.ok_or_else(|| Invalid::missing("match"))?).under("match")?;
    let mut level = per_filter(&above.per_filter, pb.typed_per_filter_config)?;
    let action = Action::new(pb.action, above, &mut level, clusters)?;
    #[expect(deprecated, reason = "older servers still send it")]
    let buffer_limit = pb
        .request_body_buffer_limit
        .map(|l| l.value)
        .or(pb.per_request_buffer_limit_bytes.map(|l| l.value.into()))
        .or(above.buffer_limit);
    Ok(Route {
        name: pb.name.into(),
        matches,
        action,
        request_headers: HeaderOps::new(pb.request_headers_to_add, &pb.request_headers_to_remove, "request")?,
        response_headers: HeaderOps::new(
            pb.response_headers_to_add,
            &pb.response_headers_to_remove,
            "response",
        )?,
        per_filter: level,
        metadata: Metadata::new(pb.metadata),
        operation: pb.decorator.map(|d| d.operation.into()),
        buffer_limit,
    })
}

impl RouteMatch {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// No path condition, or a condition this proxy cannot test.
    pub fn new(pb: pb::RouteMatch) -> Result<Self, Invalid> {
        for (set, field) in [
            (!pb.dynamic_metadata.is_empty(), "dynamic_metadata"),
            (!pb.filter_state.is_empty(), "filter_state"),
            (!pb.cookies.is_empty(), "cookies"),
        ] {
            if set {
                return Err(Invalid::unsupported(field));
            }
        }
        let path = path(pb.path_specifier, bool_or(pb.case_sensitive, true))?;
        let query = pb
            .query_parameters
            .into_iter()
            .enumerate()
            .map(|(i, q)| QueryMatcher::new(q).at("query_parameters", i))
            .collect::<Result<_, _>>()?;
        let tls = pb.tls_context.map(|t| TlsMatch {
            presented: t.presented.map(|b| b.value),
            validated: t.validated.map(|b| b.value),
        });
        Ok(Self {
            path,
            headers: headers(pb.headers, "headers")?,
            query,
            grpc: pb.grpc.is_some(),
            fraction: runtime_fraction(pb.runtime_fraction, "runtime_fraction")?,
            tls,
        })
    }
}

fn path(pb: Option<pb::route_match::PathSpecifier>, case_sensitive: bool) -> Result<PathMatch, Invalid> {
    use pb::route_match::PathSpecifier as Pb;
    let fold = |s: String| if case_sensitive { s } else { s.to_ascii_lowercase() };
    let plain = match pb {
        None => return Err(Invalid::missing("path_specifier")),
        Some(Pb::PathMatchPolicy(_)) => return Err(Invalid::unsupported("path_match_policy")),
        Some(Pb::ConnectMatcher(_)) => return Err(Invalid::unsupported("connect_matcher")),
        Some(Pb::SafeRegex(r)) => return full_regex(&r).under("safe_regex").map(PathMatch::Regex),
        Some(Pb::Prefix(p)) => PathMatch::Prefix(fold(p).into()),
        Some(Pb::Path(p)) => PathMatch::Exact(fold(p).into()),
        Some(Pb::PathSeparatedPrefix(p)) => {
            if !p.starts_with('/') || p.ends_with('/') || p.contains(['?', '#']) {
                let reason = format!("`{p}` must begin with `/`, not end with it, and hold no `?` or `#`");
                return Err(Invalid::new("path_separated_prefix", reason));
            }
            PathMatch::SeparatedPrefix(fold(p).into())
        }
    };
    Ok(if case_sensitive { plain } else { PathMatch::IgnoreCase(Box::new(plain)) })
}

#[cfg(test)]
mod tests;
