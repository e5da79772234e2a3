//! The `from` part of a rule, and the conditions about who calls.

use envoy_types::pb::envoy::config::rbac::v3::{MetadataSource, Principal, SourcedMetadata, principal};
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use registry::model::security::{Condition, RuleFrom, Source};

use super::matching::{self, Pattern};
use super::{Field, Scope, Unreadable, conjunction, pb};

/// Any character of one part of a SPIFFE id.
const PART: &str = "[^/]";

/// Any of these; `None` when the rule matches nothing.
pub(super) fn principals(
    from: &[RuleFrom],
    conditions: &[&Condition],
    namespace: &str,
    scope: Scope<'_>,
    unreadable: Unreadable,
) -> Option<Vec<Principal>> {
    let when = || conditions.iter().flat_map(|c| condition_fields(c, namespace, scope)).collect::<Vec<_>>();
    if from.is_empty() {
        return Some(vec![all(conjunction(when(), unreadable)?)]);
    }
    let any: Vec<Principal> = from
        .iter()
        .filter_map(|from| {
            let mut fields =
                from.source.as_ref().map(|s| source_fields(s, namespace, scope)).unwrap_or_default();
            fields.extend(when());
            conjunction(fields, unreadable).map(all)
        })
        .collect();
    (!any.is_empty()).then_some(any)
}

fn source_fields(source: &Source, namespace: &str, scope: Scope<'_>) -> Vec<Field<Principal>> {
    let workload = |value: &str| principal(value, scope);
    let account = |value: &str| service_account(value, namespace);
    let http = |values: &[String]| readable_http(values, scope, |value| Some(request_principal(value)));
    vec![
        any_of(&source.principals, workload),
        not_identity(any_of(&source.not_principals, workload), scope),
        http(&source.request_principals),
        negate(http(&source.not_request_principals)),
        any_of(&source.namespaces, in_namespace),
        not_identity(any_of(&source.not_namespaces, in_namespace), scope),
        any_of(&source.service_accounts, account),
        not_identity(any_of(&source.not_service_accounts, account), scope),
        any_of(&source.trust_domains, trust_domain),
        not_identity(any_of(&source.not_trust_domains, trust_domain), scope),
        any_of(&source.ip_blocks, direct_ip),
        negate(any_of(&source.not_ip_blocks, direct_ip)),
        any_of(&source.remote_ip_blocks, remote_ip),
        negate(any_of(&source.not_remote_ip_blocks, remote_ip)),
    ]
}

fn condition_fields(condition: &Condition, namespace: &str, scope: Scope<'_>) -> Vec<Field<Principal>> {
    let of = |values: &[String]| condition_field(&condition.key, values, namespace, scope);
    let about_identity = matches!(
        condition.key.as_str(),
        "source.namespace" | "source.principal" | "source.serviceAccount" | "source.trustDomain"
    );
    let not = of(&condition.not_values);
    let not = if about_identity { not_identity(not, scope) } else { negate(not) };
    vec![of(&condition.values), not]
}

fn condition_field(key: &str, values: &[String], namespace: &str, scope: Scope<'_>) -> Field<Principal> {
    match key {
        "source.ip" => any_of(values, direct_ip),
        "remote.ip" => any_of(values, remote_ip),
        "source.namespace" => any_of(values, in_namespace),
        "source.principal" => any_of(values, |value| principal(value, scope)),
        "source.serviceAccount" => any_of(values, |value| service_account(value, namespace)),
        "source.trustDomain" => any_of(values, trust_domain),
        "request.auth.principal" => readable_http(values, scope, |value| Some(request_principal(value))),
        "request.auth.audiences" => readable_http(values, scope, |value| Some(claim(&["aud"], value))),
        "request.auth.presenter" => readable_http(values, scope, |value| Some(claim(&["azp"], value))),
        _ => bracketed_field(key, values, scope),
    }
}

fn bracketed_field(key: &str, values: &[String], scope: Scope<'_>) -> Field<Principal> {
    if let Some([name]) = matching::brackets(key, "request.headers").as_deref() {
        let header =
            |value: &str| Some(id(principal::Identifier::Header(matching::header_pattern(name, value))));
        return readable_http(values, scope, header);
    }
    if let Some(path) = matching::brackets(key, "request.auth.claims") {
        return readable_http(values, scope, |value| Some(claim(&path, value)));
    }
    if let Some((filter, _)) = key.strip_prefix("experimental.").and_then(|rest| rest.split_once('[')) {
        let path = matching::brackets(key, &format!("experimental.{filter}")).unwrap_or_default();
        return any_of(values, |value| filter_metadata(filter, &path, value));
    }
    if values.is_empty() { Field::Unset } else { Field::Unreadable }
}

fn filter_metadata(filter: &str, path: &[&str], value: &str) -> Option<Principal> {
    if path.is_empty() {
        return None;
    }
    let inner = value.strip_prefix('[').and_then(|value| value.strip_suffix(']'));
    let string = matching::string_value(Pattern::parse(inner.unwrap_or(value)).matcher());
    let value = match inner {
        None => string,
        Some(_) => matcher::ValueMatcher {
            match_pattern: Some(matcher::value_matcher::MatchPattern::ListMatch(Box::new(
                matcher::ListMatcher {
                    match_pattern: Some(matcher::list_matcher::MatchPattern::OneOf(Box::new(string))),
                },
            ))),
        },
    };
    Some(metadata(matching::metadata(filter, path, value)))
}

/// An identity as policies name it: `<trust domain>/ns/<namespace>/sa/<account>`, without `spiffe://`. The trust
/// domains of the mesh name the same workloads.
fn principal(value: &str, scope: Scope<'_>) -> Option<Principal> {
    let (head, tail) = value.split_once('/').unwrap_or((value, ""));
    let same_domain = !tail.is_empty() && scope.trust_domains.iter().any(|domain| domain == head);
    if !same_domain {
        return Some(authenticated(identity(value)));
    }
    let aliases: Vec<Principal> = scope
        .trust_domains
        .iter()
        .map(|domain| authenticated(identity(&format!("{domain}/{tail}"))))
        .collect();
    Some(or(aliases))
}

fn identity(pattern: &str) -> matcher::StringMatcher {
    match Pattern::parse(pattern) {
        Pattern::Exact(text) => pb::exact(format!("spiffe://{text}")),
        Pattern::Prefix(text) => pb::prefix(format!("spiffe://{text}")),
        other @ (Pattern::Suffix(_) | Pattern::Present) => {
            pb::regex(format!("spiffe://{}", other.expression(".")))
        }
    }
}

fn in_namespace(value: &str) -> Option<Principal> {
    let namespace = Pattern::parse(value).expression(PART);
    Some(authenticated(pb::regex(format!("spiffe://{PART}+/ns/{namespace}/sa/{PART}+"))))
}

/// `<namespace>/<account>`, or an account of the policy's own namespace.
fn service_account(value: &str, own: &str) -> Option<Principal> {
    let (namespace, account) = value.split_once('/').unwrap_or((own, value));
    let (namespace, account) = (matching::escape(namespace), matching::escape(account));
    Some(authenticated(pb::regex(format!("spiffe://{PART}+/ns/{namespace}/sa/{account}"))))
}

fn trust_domain(value: &str) -> Option<Principal> {
    let domain = Pattern::parse(value).expression(PART);
    Some(authenticated(pb::regex(format!("spiffe://{domain}/.+"))))
}

fn direct_ip(value: &str) -> Option<Principal> {
    pb::parse_net(value).map(|net| id(principal::Identifier::DirectRemoteIp(pb::cidr(net))))
}

fn remote_ip(value: &str) -> Option<Principal> {
    pb::parse_net(value).map(|net| id(principal::Identifier::RemoteIp(pb::cidr(net))))
}

/// `<issuer>/<subject>` of the verified token. Both may contain slashes, so every way to cut the pattern counts.
fn request_principal(value: &str) -> Principal {
    let both = |issuer: matcher::StringMatcher, subject: matcher::StringMatcher| {
        let claim = |name, value| metadata(matching::claim(&[name], value));
        all(vec![claim("iss", issuer), claim("sub", subject)])
    };
    let present = || Pattern::Present.matcher();
    let cuts = |text: &str| -> Vec<(String, String)> {
        text.match_indices('/')
            .filter_map(|(at, _)| Some((text.get(..at)?.to_owned(), text.get(at + 1..)?.to_owned())))
            .collect()
    };
    let or_present = |text: &str, m: fn(String) -> matcher::StringMatcher| match text {
        "" => Pattern::Present.matcher(),
        _ => m(text.to_owned()),
    };
    match Pattern::parse(value) {
        Pattern::Present => both(present(), present()),
        Pattern::Exact(text) => {
            or(cuts(text).into_iter().map(|(iss, sub)| both(pb::exact(iss), pb::exact(sub))).collect())
        }
        Pattern::Prefix(text) => {
            let cut =
                cuts(text).into_iter().map(|(iss, sub)| both(pb::exact(iss), or_present(&sub, pb::prefix)));
            or(cut.chain([both(pb::prefix(text), present())]).collect())
        }
        Pattern::Suffix(text) => {
            let cut =
                cuts(text).into_iter().map(|(iss, sub)| both(or_present(&iss, pb::suffix), pb::exact(sub)));
            or(cut.chain([both(present(), pb::suffix(text))]).collect())
        }
    }
}

fn claim(path: &[&str], value: &str) -> Principal {
    metadata(matching::claim(path, Pattern::parse(value).matcher()))
}

fn authenticated(name: matcher::StringMatcher) -> Principal {
    id(principal::Identifier::Authenticated(principal::Authenticated { principal_name: Some(name) }))
}

fn metadata(matcher: matcher::MetadataMatcher) -> Principal {
    id(principal::Identifier::SourcedMetadata(SourcedMetadata {
        metadata_matcher: Some(matcher),
        metadata_source: MetadataSource::Dynamic.into(),
    }))
}

fn id(identifier: principal::Identifier) -> Principal {
    Principal { identifier: Some(identifier) }
}

/// Any of these; no alternative means nobody.
fn or(ids: Vec<Principal>) -> Principal {
    if ids.is_empty() {
        return id(principal::Identifier::NotId(Box::new(id(principal::Identifier::Any(true)))));
    }
    id(principal::Identifier::OrIds(principal::Set { ids }))
}

fn readable_http(
    values: &[String],
    scope: Scope<'_>,
    one: impl Fn(&str) -> Option<Principal>,
) -> Field<Principal> {
    if scope.tcp && !values.is_empty() { Field::Unreadable } else { any_of(values, one) }
}

/// Any of the values; one that does not parse makes the whole field one that cannot be evaluated.
fn any_of(values: &[String], one: impl Fn(&str) -> Option<Principal>) -> Field<Principal> {
    if values.is_empty() {
        return Field::Unset;
    }
    let ids: Vec<Principal> = values.iter().filter_map(|value| one(value)).collect();
    if ids.len() == values.len() { Field::Is(or(ids)) } else { Field::Unreadable }
}

fn negate(field: Field<Principal>) -> Field<Principal> {
    match field {
        Field::Is(inner) => Field::Is(id(principal::Identifier::NotId(Box::new(inner)))),
        Field::Unset => Field::Unset,
        Field::Unreadable => Field::Unreadable,
    }
}

/// Not this identity; where the scope asks for it, some identity though.
fn not_identity(field: Field<Principal>, scope: Scope<'_>) -> Field<Principal> {
    match negate(field) {
        Field::Is(not) if scope.needs_identity => {
            Field::Is(all(vec![authenticated(pb::regex("spiffe://.+")), not]))
        }
        other @ (Field::Is(_) | Field::Unset | Field::Unreadable) => other,
    }
}

fn all(ids: Vec<Principal>) -> Principal {
    if ids.is_empty() {
        return id(principal::Identifier::Any(true));
    }
    id(principal::Identifier::AndIds(principal::Set { ids }))
}
