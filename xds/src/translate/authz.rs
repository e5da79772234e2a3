//! Authorization policies as RBAC filters: audit, then deny, then allow; what cannot be evaluated denies.
//!
//! A rule that uses HTTP on a connection that is not HTTP gets tighter, never wider: an `ALLOW` rule is dropped, a
//! `DENY` rule forgets the field (Istio, "Authorization Policy", TCP).

mod matching;
mod permission;
mod principal;

use std::collections::HashMap;

use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::config::rbac::v3 as rbac;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
use registry::model::security::{AuthorizationAction, AuthorizationPolicy, Condition, Rule};

use super::pb;
pub(super) use matching::claim;

const HTTP_FILTER: &str = "envoy.filters.http.rbac";
const NETWORK_FILTER: &str = "envoy.filters.network.rbac";

/// A policy that applies to the workload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy<'a> {
    /// Namespace of the object.
    pub(super) namespace: &'a str,
    /// Name of the object.
    pub(super) name: &'a str,
    /// Only counted, not enforced (annotation `istio.io/dry-run`).
    pub(super) dry_run: bool,
    /// What it says.
    pub(super) spec: &'a AuthorizationPolicy,
}

/// What the rules are read for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scope<'a> {
    /// The connection carries something that is not HTTP.
    pub(super) tcp: bool,
    /// The mesh's trust domain and its aliases: they name the same workloads.
    pub(super) trust_domains: &'a [String],
    /// A caller without an identity satisfies no rule, not even one that says who the caller must not be.
    pub(super) needs_identity: bool,
}

/// The filters of an HTTP connection, in order.
pub(super) fn http_filters(policies: &[Policy<'_>], trust_domains: &[String]) -> Vec<HttpFilter> {
    let scope = Scope { tcp: false, trust_domains, needs_identity: false };
    stages(policies, scope)
        .into_iter()
        .map(|stage| {
            let config = http_rbac::Rbac {
                rules: stage.rules,
                shadow_rules: stage.shadow,
                shadow_rules_stat_prefix: stage.shadow_prefix,
                ..Default::default()
            };
            pb::http_filter(HTTP_FILTER, &config)
        })
        .collect()
}

/// The filters of a connection of which only the bytes are known, in order.
pub(super) fn network_filters(policies: &[Policy<'_>], trust_domains: &[String]) -> Vec<Filter> {
    let scope = Scope { tcp: true, trust_domains, needs_identity: false };
    stages(policies, scope)
        .into_iter()
        .map(|stage| {
            let config = network_rbac::Rbac {
                rules: stage.rules,
                shadow_rules: stage.shadow,
                shadow_rules_stat_prefix: stage.shadow_prefix,
                stat_prefix: "tcp.".to_owned(),
                ..Default::default()
            };
            pb::network_filter(NETWORK_FILTER, &config)
        })
        .collect()
}

/// One filter: enforced rules, and rules that only count.
struct Stage {
    rules: Option<rbac::Rbac>,
    shadow: Option<rbac::Rbac>,
    shadow_prefix: String,
}

/// Audit, deny and allow, in the order in which they are asked. A `CUSTOM` policy names an external authorizer, of
/// which none is configured; its requests are denied, after those of `DENY`.
fn stages(policies: &[Policy<'_>], scope: Scope<'_>) -> Vec<Stage> {
    use AuthorizationAction::{Allow, Audit, Custom, Deny};
    [(Custom, "custom"), (Audit, "audit"), (Deny, "deny"), (Allow, "allow")]
        .into_iter()
        .filter_map(|(action, label)| {
            let of = |dry_run| {
                let mut of_action =
                    policies.iter().filter(|p| p.spec.action == action && p.dry_run == dry_run).peekable();
                of_action.peek()?;
                Some(rules(action, of_action, scope))
            };
            let (enforced, shadow) = (of(false), of(true));
            let shadow_prefix =
                shadow.as_ref().map(|_| format!("istio_dry_run_{label}_")).unwrap_or_default();
            (enforced.is_some() || shadow.is_some()).then_some(Stage {
                rules: enforced,
                shadow,
                shadow_prefix,
            })
        })
        .collect()
}

/// The rules of one action. Without any entry, `ALLOW` denies everything, as an empty policy shall.
fn rules<'a>(
    action: AuthorizationAction,
    policies: impl Iterator<Item = &'a Policy<'a>>,
    scope: Scope<'_>,
) -> rbac::Rbac {
    let mut out = HashMap::new();
    for policy in policies {
        for (index, rule) in policy.spec.rules.iter().enumerate() {
            let name = format!("ns[{}]-policy[{}]-rule[{index}]", policy.namespace, policy.name);
            if let Some(translated) = translate_rule(rule, policy.namespace, action, scope) {
                out.insert(name, translated);
            }
        }
    }
    let envoy_action = match action {
        AuthorizationAction::Allow => rbac::rbac::Action::Allow,
        AuthorizationAction::Deny | AuthorizationAction::Custom => rbac::rbac::Action::Deny,
        AuthorizationAction::Audit => rbac::rbac::Action::Log,
    };
    rbac::Rbac { action: envoy_action.into(), policies: out, ..Default::default() }
}

/// What to do with a field that the connection cannot evaluate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// The rule does not match.
    DropRule,
    /// The field is taken to match.
    Ignore,
}

/// A field's matcher, or what stands for it.
#[derive(Debug)]
pub(super) enum Field<T> {
    /// It restricts the rule.
    Is(T),
    /// It is not set.
    Unset,
    /// This connection does not have what it looks at.
    Unreadable,
}

/// Collects the fields of one conjunction; `None` when the rule has to be dropped.
pub(super) fn conjunction<T>(fields: Vec<Field<T>>, unreadable: Unreadable) -> Option<Vec<T>> {
    let mut out = Vec::new();
    for field in fields {
        match field {
            Field::Is(matcher) => out.push(matcher),
            Field::Unset => {}
            Field::Unreadable => match unreadable {
                Unreadable::DropRule => return None,
                Unreadable::Ignore => {}
            },
        }
    }
    Some(out)
}

fn translate_rule(
    rule: &Rule,
    namespace: &str,
    action: AuthorizationAction,
    scope: Scope<'_>,
) -> Option<rbac::Policy> {
    let unreadable = match action {
        AuthorizationAction::Allow => Unreadable::DropRule,
        AuthorizationAction::Deny | AuthorizationAction::Audit | AuthorizationAction::Custom => {
            Unreadable::Ignore
        }
    };
    let scope = Scope { needs_identity: action == AuthorizationAction::Allow, ..scope };
    let (of_permissions, of_principals): (Vec<&Condition>, Vec<&Condition>) =
        rule.when.iter().partition(|condition| permission::is_about(&condition.key));
    let permissions = permission::permissions(&rule.to, &of_permissions, scope, unreadable)?;
    let principals = principal::principals(&rule.from, &of_principals, namespace, scope, unreadable)?;
    Some(rbac::Policy { permissions, principals, ..Default::default() })
}
