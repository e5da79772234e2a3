//! Role-based access rules, compiled: what may be done, and by whom.

use std::sync::Arc;

use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as http_pb;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as network_pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use ipnet::IpNet;

use super::decode::{Invalid, Under as _, cidr, port};
use super::matcher::{HeaderMatcher, MetadataMatcher, StringMatcher};

/// How deep `and`, `or` and `not` may nest.
const MAX_DEPTH: u8 = 32;

/// What a matching policy means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Only what a policy matches is allowed.
    Allow,
    /// What a policy matches is denied.
    Deny,
    /// Nothing is denied; matches are noted.
    Log,
}

/// The rules of one filter.
#[derive(Debug, Clone)]
pub struct Rules {
    /// What a match means.
    pub action: Action,
    /// Policies by name; the first that matches decides, and names itself in the response's details.
    pub policies: Box<[Policy]>,
}

/// One policy: it matches when one permission and one principal do.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Its name.
    pub name: Box<str>,
    /// What is done.
    pub permissions: Box<[Permission]>,
    /// By whom.
    pub principals: Box<[Principal]>,
}

impl Policy {
    /// Whether it cannot be answered for a plain connection.
    fn asks_for_a_request(&self) -> bool {
        self.permissions.iter().any(Permission::asks_for_a_request)
            || self.principals.iter().any(Principal::asks_for_a_request)
    }
}

impl Permission {
    fn asks_for_a_request(&self) -> bool {
        match self {
            Self::And(all) | Self::Or(all) => all.iter().any(Self::asks_for_a_request),
            Self::Not(inner) => inner.asks_for_a_request(),
            Self::Header(_) | Self::UrlPath(_) => true,
            Self::Any(_)
            | Self::DestinationIp(_)
            | Self::DestinationPort(_)
            | Self::DestinationPorts(..)
            | Self::RequestedServerName(_)
            | Self::Metadata(_) => false,
        }
    }
}

impl Principal {
    fn asks_for_a_request(&self) -> bool {
        match self {
            Self::And(all) | Self::Or(all) => all.iter().any(Self::asks_for_a_request),
            Self::Not(inner) => inner.asks_for_a_request(),
            Self::Header(_) | Self::UrlPath(_) => true,
            Self::Any(_)
            | Self::Authenticated(_)
            | Self::DirectRemoteIp(_)
            | Self::RemoteIp(_)
            | Self::Metadata(_)
            | Self::PeerPrincipal(_) => false,
        }
    }
}

/// What is done.
#[derive(Debug, Clone)]
pub enum Permission {
    /// Anything (`false`: nothing).
    Any(bool),
    /// All of these.
    And(Box<[Permission]>),
    /// One of these.
    Or(Box<[Permission]>),
    /// Not this.
    Not(Box<Permission>),
    /// A request with this header.
    Header(HeaderMatcher),
    /// A request for this path, without its query.
    UrlPath(StringMatcher),
    /// To this address.
    DestinationIp(IpNet),
    /// To this port.
    DestinationPort(u16),
    /// To a port from the first (inclusive) to the second (exclusive).
    DestinationPorts(u32, u32),
    /// With this server name in the TLS hello.
    RequestedServerName(StringMatcher),
    /// With this metadata.
    Metadata(MetadataMatcher),
}

/// By whom.
#[derive(Debug, Clone)]
pub enum Principal {
    /// Anybody (`false`: nobody).
    Any(bool),
    /// All of these.
    And(Box<[Principal]>),
    /// One of these.
    Or(Box<[Principal]>),
    /// Not this.
    Not(Box<Principal>),
    /// A peer whose certificate was verified, with this name in it (`None`: any name). URI SANs count first,
    /// then DNS SANs, then the subject.
    Authenticated(Option<StringMatcher>),
    /// The address of the connection's other end.
    DirectRemoteIp(IpNet),
    /// The address of the client, with forwarding headers taken into account.
    RemoteIp(IpNet),
    /// A request with this header.
    Header(HeaderMatcher),
    /// A request for this path, without its query.
    UrlPath(StringMatcher),
    /// With this metadata.
    Metadata(MetadataMatcher),
    /// The peer's SPIFFE id (Istio's filter state object `io.istio.peer_principal`).
    PeerPrincipal(StringMatcher),
}

/// The rules of one RBAC filter.
#[derive(Debug, Clone, Default)]
pub struct Rbac {
    /// Rules that are enforced.
    pub rules: Option<Arc<Rules>>,
    /// Rules that are only counted.
    pub shadow_rules: Option<Arc<Rules>>,
    /// Stands before the names of the shadow rules' metrics.
    pub shadow_prefix: Box<str>,
}

impl Rbac {
    /// From an HTTP filter's proto.
    ///
    /// # Errors
    ///
    /// A rule this proxy cannot evaluate: it must not be left out.
    pub fn http(pb: http_pb::Rbac) -> Result<Self, Invalid> {
        if pb.matcher.is_some() {
            return Err(Invalid::unsupported("matcher"));
        }
        if pb.shadow_matcher.is_some() {
            return Err(Invalid::unsupported("shadow_matcher"));
        }
        Ok(Self {
            rules: rules(pb.rules).under("rules")?,
            shadow_rules: rules(pb.shadow_rules).under("shadow_rules")?,
            shadow_prefix: pb.shadow_rules_stat_prefix.into(),
        })
    }

    /// From a network filter's proto.
    ///
    /// # Errors
    ///
    /// A rule this proxy cannot evaluate, or one that looks at a request.
    pub fn network(pb: network_pb::Rbac) -> Result<Self, Invalid> {
        if pb.matcher.is_some() || pb.shadow_matcher.is_some() {
            return Err(Invalid::unsupported("matcher"));
        }
        if pb.delay_deny.is_some() {
            return Err(Invalid::unsupported("delay_deny"));
        }
        if pb.enforcement_type != network_pb::rbac::EnforcementType::OneTimeOnFirstByte as i32 {
            return Err(Invalid::unsupported("enforcement_type"));
        }
        let this = Self {
            rules: rules(pb.rules).under("rules")?,
            shadow_rules: rules(pb.shadow_rules).under("shadow_rules")?,
            shadow_prefix: pb.shadow_rules_stat_prefix.into(),
        };
        for (rules, field) in [(&this.rules, "rules"), (&this.shadow_rules, "shadow_rules")] {
            if let Some(policy) = rules.iter().flat_map(|r| &r.policies).find(|p| p.asks_for_a_request()) {
                let reason =
                    format!("policy `{}` looks at a request, which a connection does not have", policy.name);
                return Err(Invalid::new(field, reason));
            }
        }
        Ok(this)
    }

    /// Whether nothing is asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_none() && self.shadow_rules.is_none()
    }
}

fn rules(pb: Option<pb::Rbac>) -> Result<Option<Arc<Rules>>, Invalid> {
    let Some(pb) = pb else { return Ok(None) };
    let action = match pb.action {
        0 => Action::Allow,
        1 => Action::Deny,
        2 => Action::Log,
        other => return Err(Invalid::new("action", format!("unknown value {other}"))),
    };
    if pb.audit_logging_options.is_some_and(|a| a.audit_condition != 0) {
        return Err(Invalid::unsupported("audit_logging_options"));
    }
    let mut policies = pb
        .policies
        .into_iter()
        .map(|(name, p)| {
            let field = format!("policies[{name}]");
            policy(name, p).under(&field)
        })
        .collect::<Result<Vec<_>, _>>()?;
    policies.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(Some(Arc::new(Rules { action, policies: policies.into() })))
}

fn policy(name: String, pb: pb::Policy) -> Result<Policy, Invalid> {
    if pb.condition.is_some() || pb.checked_condition.is_some() {
        return Err(Invalid::unsupported("condition"));
    }
    if pb.permissions.is_empty() || pb.principals.is_empty() {
        return Err(Invalid::new("", "needs at least one permission and one principal"));
    }
    Ok(Policy {
        name: name.into(),
        permissions: permissions(pb.permissions, MAX_DEPTH).under("permissions")?,
        principals: principals(pb.principals, MAX_DEPTH).under("principals")?,
    })
}

fn deeper(depth: u8) -> Result<u8, Invalid> {
    depth.checked_sub(1).ok_or_else(|| Invalid::new("", format!("nested deeper than {MAX_DEPTH}")))
}

fn permissions(pb: Vec<pb::Permission>, depth: u8) -> Result<Box<[Permission]>, Invalid> {
    pb.into_iter().enumerate().map(|(i, p)| permission(p, depth).at("", i)).collect()
}

fn permission(pb: pb::Permission, depth: u8) -> Result<Permission, Invalid> {
    use pb::permission::Rule;
    let depth = deeper(depth)?;
    #[expect(deprecated, reason = "plain metadata is what servers send")]
    Ok(match pb.rule {
        None => return Err(Invalid::missing("rule")),
        Some(Rule::Any(b)) => Permission::Any(b),
        Some(Rule::AndRules(s)) => Permission::And(permissions(s.rules, depth).under("and_rules")?),
        Some(Rule::OrRules(s)) => Permission::Or(permissions(s.rules, depth).under("or_rules")?),
        Some(Rule::NotRule(p)) => Permission::Not(Box::new(permission(*p, depth).under("not_rule")?)),
        Some(Rule::Header(h)) => Permission::Header(HeaderMatcher::new(h).under("header")?),
        Some(Rule::UrlPath(p)) => Permission::UrlPath(url_path(p)?),
        Some(Rule::DestinationIp(c)) => Permission::DestinationIp(cidr(&c).under("destination_ip")?),
        Some(Rule::DestinationPort(p)) => Permission::DestinationPort(port(p, "destination_port")?),
        Some(Rule::DestinationPortRange(r)) => match (u32::try_from(r.start), u32::try_from(r.end)) {
            (Ok(start), Ok(end)) if start < end && end <= 65536 => Permission::DestinationPorts(start, end),
            _ => return Err(Invalid::new("destination_port_range", "is not a range of ports")),
        },
        Some(Rule::RequestedServerName(m)) => {
            Permission::RequestedServerName(StringMatcher::new(m).under("requested_server_name")?)
        }
        Some(Rule::Metadata(m)) => Permission::Metadata(MetadataMatcher::new(m).under("metadata")?),
        Some(Rule::SourcedMetadata(m)) => Permission::Metadata(sourced(m)?),
        Some(Rule::Matcher(_)) => return Err(Invalid::unsupported("matcher")),
        Some(Rule::UriTemplate(_)) => return Err(Invalid::unsupported("uri_template")),
    })
}

fn principals(pb: Vec<pb::Principal>, depth: u8) -> Result<Box<[Principal]>, Invalid> {
    pb.into_iter().enumerate().map(|(i, p)| principal(p, depth).at("", i)).collect()
}

fn principal(pb: pb::Principal, depth: u8) -> Result<Principal, Invalid> {
    use matcher::filter_state_matcher::Matcher;
    use pb::principal::Identifier;
    let depth = deeper(depth)?;
    #[expect(deprecated, reason = "source_ip and plain metadata are what older servers send")]
    Ok(match pb.identifier {
        None => return Err(Invalid::missing("identifier")),
        Some(Identifier::Any(b)) => Principal::Any(b),
        Some(Identifier::AndIds(s)) => Principal::And(principals(s.ids, depth).under("and_ids")?),
        Some(Identifier::OrIds(s)) => Principal::Or(principals(s.ids, depth).under("or_ids")?),
        Some(Identifier::NotId(p)) => Principal::Not(Box::new(principal(*p, depth).under("not_id")?)),
        Some(Identifier::Authenticated(a)) => {
            let name = a.principal_name.map(StringMatcher::new).transpose();
            Principal::Authenticated(name.under("authenticated.principal_name")?)
        }
        // The older name of `direct_remote_ip`: what a request says of its sender must never count here.
        Some(Identifier::SourceIp(c)) => Principal::DirectRemoteIp(cidr(&c).under("source_ip")?),
        Some(Identifier::RemoteIp(c)) => Principal::RemoteIp(cidr(&c).under("remote_ip")?),
        Some(Identifier::DirectRemoteIp(c)) => Principal::DirectRemoteIp(cidr(&c).under("direct_remote_ip")?),
        Some(Identifier::Header(h)) => Principal::Header(HeaderMatcher::new(h).under("header")?),
        Some(Identifier::UrlPath(p)) => Principal::UrlPath(url_path(p)?),
        Some(Identifier::Metadata(m)) => Principal::Metadata(MetadataMatcher::new(m).under("metadata")?),
        Some(Identifier::SourcedMetadata(m)) => Principal::Metadata(sourced(m)?),
        Some(Identifier::FilterState(f)) => match (f.key.as_str(), f.matcher) {
            ("io.istio.peer_principal", Some(Matcher::StringMatch(m))) => {
                Principal::PeerPrincipal(StringMatcher::new(m).under("filter_state.string_match")?)
            }
            _ => return Err(Invalid::new("filter_state", "only `io.istio.peer_principal` is known")),
        },
        Some(Identifier::Custom(_)) => return Err(Invalid::unsupported("custom")),
    })
}

fn sourced(pb: pb::SourcedMetadata) -> Result<MetadataMatcher, Invalid> {
    if pb.metadata_source != pb::MetadataSource::Dynamic as i32 {
        return Err(Invalid::unsupported("sourced_metadata.metadata_source"));
    }
    let matcher = pb.metadata_matcher.ok_or_else(|| Invalid::missing("sourced_metadata.metadata_matcher"))?;
    MetadataMatcher::new(matcher).under("sourced_metadata.metadata_matcher")
}

fn url_path(pb: matcher::PathMatcher) -> Result<StringMatcher, Invalid> {
    match pb.rule {
        Some(matcher::path_matcher::Rule::Path(m)) => StringMatcher::new(m).under("url_path.path"),
        None => Err(Invalid::missing("url_path.path")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(yaml: &str) -> Result<Rbac, Invalid> {
        Rbac::network(wire::json::message_from_yaml::<network_pb::Rbac>(yaml).unwrap())
    }

    #[test]
    fn a_source_address_is_the_other_end_of_the_connection() {
        let rbac = network(
            "{stat_prefix: s, rules: {policies: {p: {permissions: [{any: true}], principals: [{source_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}]}}}}",
        )
        .unwrap();
        let rules = rbac.rules.unwrap();
        assert!(matches!(&*rules.policies[0].principals, [Principal::DirectRemoteIp(_)]));
    }

    #[test]
    fn rules_about_requests_are_refused_for_plain_connections() {
        for permission in [
            "{url_path: {path: {exact: /}}}",
            "{not_rule: {header: {name: x, present_match: true}}}",
            "{and_rules: {rules: [{any: true}, {header: {name: x, present_match: true}}]}}",
        ] {
            let yaml = format!(
                "{{stat_prefix: s, rules: {{action: DENY, policies: {{p: {{permissions: [{permission}], principals: [{{any: true}}]}}}}}}}}"
            );
            let error = network(&yaml).unwrap_err().to_string();
            assert!(error.contains("policy `p` looks at a request"), "{error}");
        }
    }
}
