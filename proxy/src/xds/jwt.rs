//! Settings of the token filter: who issues tokens, where they are looked for, and which requests need one.

use std::collections::BTreeMap;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use http::HeaderName;

use super::decode::{Invalid, Under as _, data_source, header_name};
use super::matcher::StringMatcher;
use super::route::RouteMatch;
use crate::authz::jwt::KeySet;

/// The token filter.
#[derive(Debug, Clone)]
pub struct JwtAuthn {
    /// Issuers by name.
    pub providers: BTreeMap<Box<str>, JwtProvider>,
    /// The first rule whose match fits decides what a request needs.
    pub rules: Box<[JwtRule]>,
    /// Named requirements, for routes.
    pub requirements: BTreeMap<Box<str>, JwtRequirement>,
    /// Let CORS preflight requests through without a token.
    pub bypass_cors_preflight: bool,
}

/// One issuer.
#[derive(Debug, Clone)]
pub struct JwtProvider {
    /// The `iss` claim; `None`: any.
    pub issuer: Option<Box<str>>,
    /// One of the token's `aud` claims must be among these; empty: any.
    pub audiences: Box<[Box<str>]>,
    /// What the `sub` claim must be.
    pub subjects: Option<StringMatcher>,
    /// Where its keys come from.
    pub keys: JwksSource,
    /// Leave the token in the request.
    pub forward: bool,
    /// Headers that may hold the token, and what stands before it there.
    pub from_headers: Box<[(HeaderName, Box<str>)]>,
    /// Query parameters that may hold it.
    pub from_params: Box<[Box<str>]>,
    /// Cookies that may hold it.
    pub from_cookies: Box<[Box<str>]>,
    /// Send the payload on in this header (base64url), and pad it or not.
    pub forward_payload: Option<(HeaderName, bool)>,
    /// Leave the payload in dynamic metadata under this key.
    pub payload_in_metadata: Option<Box<str>>,
    /// Claims whose words, parted by spaces, become lists.
    pub space_delimited_claims: Box<[Box<str>]>,
    /// Send claims on as headers.
    pub claims_to_headers: Box<[(HeaderName, Box<str>)]>,
    /// How far clocks may differ.
    pub clock_skew: Duration,
}

/// Where an issuer's keys come from.
#[derive(Debug, Clone)]
pub enum JwksSource {
    /// A JSON web key set.
    Local(KeySet),
    /// From nowhere: no token of this issuer can be checked, so none is good.
    Unavailable,
}

/// The cluster that leads nowhere. A server that does not know an issuer's keys has them fetched through it.
const NOWHERE: &str = "BlackHoleCluster";

/// What some requests need.
#[derive(Debug, Clone)]
pub struct JwtRule {
    /// Which requests.
    pub matches: RouteMatch,
    /// What they need; `None`: nothing.
    pub requires: Option<JwtRequirement>,
}

/// A requirement.
#[derive(Debug, Clone)]
pub enum JwtRequirement {
    /// A valid token of this issuer, for one of these audiences (empty: the issuer's own).
    Provider(Box<str>, Box<[Box<str>]>),
    /// One of these.
    Any(Box<[JwtRequirement]>),
    /// All of these.
    All(Box<[JwtRequirement]>),
    /// Nothing, but good tokens are read.
    AllowMissingOrFailed,
    /// No token, or a good one.
    AllowMissing,
}

/// What a route says.
#[derive(Debug, Clone)]
pub enum JwtOverride {
    /// Nothing is needed.
    Disabled,
    /// The named requirement.
    Requirement(Box<str>),
}

impl JwtOverride {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// `disabled: false`, or nothing.
    pub fn new(pb: pb::PerRouteConfig) -> Result<Self, Invalid> {
        use pb::per_route_config::RequirementSpecifier as Pb;
        match pb.requirement_specifier {
            Some(Pb::Disabled(true)) => Ok(Self::Disabled),
            Some(Pb::RequirementName(name)) if !name.is_empty() => Ok(Self::Requirement(name.into())),
            _ => Err(Invalid::missing("requirement_specifier")),
        }
    }
}

impl JwtAuthn {
    /// Headers that only this filter may write: a client's are taken out.
    pub fn own_headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.providers.values().flat_map(|p| {
            p.forward_payload
                .iter()
                .map(|(name, _)| name)
                .chain(p.claims_to_headers.iter().map(|(name, _)| name))
        })
    }

    /// From its proto.
    ///
    /// # Errors
    ///
    /// An issuer without keys, a rule that names an unknown issuer, or a setting this proxy does not carry out.
    pub fn new(pb: pb::JwtAuthentication) -> Result<Self, Invalid> {
        if pb.filter_state_rules.is_some() {
            return Err(Invalid::unsupported("filter_state_rules"));
        }
        let mut providers = BTreeMap::new();
        let mut sorted: Vec<_> = pb.providers.into_iter().collect();
        sorted.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        for (name, p) in sorted {
            let field = format!("providers[{name}]");
            providers.insert(name.into_boxed_str(), provider(p).under(&field)?);
        }
        let mut requirements = BTreeMap::new();
        let mut sorted: Vec<_> = pb.requirement_map.into_iter().collect();
        sorted.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        for (name, r) in sorted {
            let field = format!("requirement_map[{name}]");
            if let Some(r) = requirement(r, &providers, 8).under(&field)? {
                requirements.insert(name.into_boxed_str(), r);
            }
        }
        let rules = pb
            .rules
            .into_iter()
            .enumerate()
            .map(|(i, r)| rule(r, &providers, &requirements).at("rules", i))
            .collect::<Result<_, _>>()?;
        Ok(Self { providers, rules, requirements, bypass_cors_preflight: pb.bypass_cors_preflight })
    }
}

fn boxed(list: Vec<String>) -> Box<[Box<str>]> {
    list.into_iter().map(Into::into).collect()
}

fn provider(pb: pb::JwtProvider) -> Result<JwtProvider, Invalid> {
    for (set, field) in [
        (pb.max_lifetime.is_some(), "max_lifetime"),
        (pb.require_expiration, "require_expiration"),
        (!pb.header_in_metadata.is_empty(), "header_in_metadata"),
        (!pb.failed_status_in_metadata.is_empty(), "failed_status_in_metadata"),
        (pb.clear_route_cache, "clear_route_cache"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    let from_headers = pb
        .from_headers
        .into_iter()
        .map(|h| Ok((header_name(&h.name, "from_headers.name")?, h.value_prefix.into())))
        .collect::<Result<_, Invalid>>()?;
    let claims_to_headers = pb
        .claim_to_headers
        .into_iter()
        .map(|c| {
            if !c.claim_path.is_empty() {
                return Err(Invalid::unsupported("claim_to_headers.claim_path"));
            }
            Ok((header_name(&c.header_name, "claim_to_headers.header_name")?, c.claim_name.into()))
        })
        .collect::<Result<_, Invalid>>()?;
    let forward_payload = if pb.forward_payload_header.is_empty() {
        None
    } else {
        Some((
            header_name(&pb.forward_payload_header, "forward_payload_header")?,
            pb.pad_forward_payload_header,
        ))
    };
    let skew = if pb.clock_skew_seconds == 0 { 60 } else { pb.clock_skew_seconds };
    Ok(JwtProvider {
        issuer: (!pb.issuer.is_empty()).then(|| pb.issuer.into()),
        audiences: boxed(pb.audiences),
        subjects: pb.subjects.map(StringMatcher::new).transpose().under("subjects")?,
        keys: keys(pb.jwks_source_specifier)?,
        forward: pb.forward,
        from_headers,
        from_params: boxed(pb.from_params),
        from_cookies: boxed(pb.from_cookies),
        forward_payload,
        payload_in_metadata: (!pb.payload_in_metadata.is_empty()).then(|| pb.payload_in_metadata.into()),
        space_delimited_claims: boxed(
            pb.normalize_payload_in_metadata.map(|n| n.space_delimited_claims).unwrap_or_default(),
        ),
        claims_to_headers,
        clock_skew: Duration::from_secs(skew.into()),
    })
}

fn keys(pb: Option<pb::jwt_provider::JwksSourceSpecifier>) -> Result<JwksSource, Invalid> {
    use pb::jwt_provider::JwksSourceSpecifier as Pb;
    match pb {
        None => Err(Invalid::missing("local_jwks")),
        Some(Pb::LocalJwks(source)) => {
            let bytes = data_source(source).under("local_jwks")?;
            let text = String::from_utf8(bytes).map_err(|_| Invalid::new("local_jwks", "is not UTF-8"))?;
            KeySet::parse(&text).map(JwksSource::Local).map_err(|e| Invalid::new("local_jwks", e))
        }
        Some(Pb::RemoteJwks(remote)) => match remote.http_uri.and_then(|u| u.http_upstream_type) {
            Some(core::http_uri::HttpUpstreamType::Cluster(cluster)) if cluster == NOWHERE => {
                Ok(JwksSource::Unavailable)
            }
            _ => Err(Invalid::unsupported("remote_jwks")),
        },
    }
}

fn rule(
    pb: pb::RequirementRule,
    providers: &BTreeMap<Box<str>, JwtProvider>,
    named: &BTreeMap<Box<str>, JwtRequirement>,
) -> Result<JwtRule, Invalid> {
    use pb::requirement_rule::RequirementType as Pb;
    let matches = RouteMatch::new(pb.r#match.ok_or_else(|| Invalid::missing("match"))?).under("match")?;
    let requires = match pb.requirement_type {
        None => None,
        Some(Pb::Requires(r)) => requirement(r, providers, 8).under("requires")?,
        Some(Pb::RequirementName(name)) => Some(
            named
                .get(name.as_str())
                .cloned()
                .ok_or_else(|| Invalid::new("requirement_name", format!("no requirement `{name}`")))?,
        ),
    };
    Ok(JwtRule { matches, requires })
}

/// `None`: nothing is required.
fn requirement(
    pb: pb::JwtRequirement,
    providers: &BTreeMap<Box<str>, JwtProvider>,
    depth: u8,
) -> Result<Option<JwtRequirement>, Invalid> {
    use pb::jwt_requirement::RequiresType as Pb;
    let Some(depth) = depth.checked_sub(1) else { return Err(Invalid::new("", "nested too deep")) };
    let known = |name: String| {
        if providers.contains_key(name.as_str()) {
            Ok(name.into_boxed_str())
        } else {
            Err(Invalid::new("provider_name", format!("no provider `{name}`")))
        }
    };
    let all = |list: Vec<pb::JwtRequirement>| {
        list.into_iter()
            .map(|r| requirement(r, providers, depth)?.ok_or_else(|| Invalid::missing("requires_type")))
            .collect::<Result<Box<[_]>, Invalid>>()
    };
    Ok(match pb.requires_type {
        None => None,
        Some(Pb::ProviderName(name)) => Some(JwtRequirement::Provider(known(name)?, Box::default())),
        Some(Pb::ProviderAndAudiences(p)) => {
            Some(JwtRequirement::Provider(known(p.provider_name)?, boxed(p.audiences)))
        }
        Some(Pb::RequiresAny(l)) => Some(JwtRequirement::Any(all(l.requirements).under("requires_any")?)),
        Some(Pb::RequiresAll(l)) => Some(JwtRequirement::All(all(l.requirements).under("requires_all")?)),
        Some(Pb::AllowMissingOrFailed(_)) => Some(JwtRequirement::AllowMissingOrFailed),
        Some(Pb::AllowMissing(_)) => Some(JwtRequirement::AllowMissing),
        Some(Pb::ExtractOnlyWithoutValidation(_)) => {
            return Err(Invalid::unsupported("extract_only_without_validation"));
        }
    })
}
