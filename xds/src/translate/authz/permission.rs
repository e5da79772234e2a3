//! The `to` part of a rule, and the conditions about what is called.

use envoy_types::pb::envoy::config::rbac::v3::{Permission, permission};
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use registry::model::security::{Condition, Operation, RuleTo};

use super::matching::{self, Pattern};
use super::{Field, Scope, Unreadable, conjunction, pb};

/// Whether a condition's key is about the destination; all others are about the source.
pub(super) fn is_about(key: &str) -> bool {
    matches!(key, "destination.ip" | "destination.port" | "connection.sni")
}

/// Any of these; `None` when the rule matches nothing.
pub(super) fn permissions(
    to: &[RuleTo],
    conditions: &[&Condition],
    scope: Scope<'_>,
    unreadable: Unreadable,
) -> Option<Vec<Permission>> {
    let when = || conditions.iter().flat_map(|condition| condition_fields(condition)).collect::<Vec<_>>();
    if to.is_empty() {
        return Some(vec![all(conjunction(when(), unreadable)?)]);
    }
    let any: Vec<Permission> = to
        .iter()
        .filter_map(|to| {
            let mut fields = to.operation.as_ref().map(|o| operation_fields(o, scope)).unwrap_or_default();
            fields.extend(when());
            conjunction(fields, unreadable).map(all)
        })
        .collect();
    (!any.is_empty()).then_some(any)
}

fn operation_fields(operation: &Operation, scope: Scope<'_>) -> Vec<Field<Permission>> {
    let http = |values: &[String], one: fn(&str) -> Permission| match (values.is_empty(), scope.tcp) {
        (true, _) => Field::Unset,
        (false, true) => Field::Unreadable,
        (false, false) => any_of(values, |value| Some(one(value))),
    };
    vec![
        http(&operation.hosts, host),
        negate(http(&operation.not_hosts, host)),
        http(&operation.methods, method),
        negate(http(&operation.not_methods, method)),
        http(&operation.paths, path),
        negate(http(&operation.not_paths, path)),
        any_of(&operation.ports, port),
        negate(any_of(&operation.not_ports, port)),
    ]
}

fn condition_fields(condition: &Condition) -> Vec<Field<Permission>> {
    let one: fn(&str) -> Option<Permission> = match condition.key.as_str() {
        "destination.ip" => ip,
        "destination.port" => port,
        _ => |value| Some(rule(permission::Rule::RequestedServerName(Pattern::parse(value).matcher()))),
    };
    vec![any_of(&condition.values, one), negate(any_of(&condition.not_values, one))]
}

fn host(value: &str) -> Permission {
    rule(permission::Rule::Header(matching::host(value)))
}

fn method(value: &str) -> Permission {
    rule(permission::Rule::Header(matching::header_pattern(":method", value)))
}

fn path(value: &str) -> Permission {
    let pattern = if value.contains("{*}") || value.contains("{**}") {
        pb::regex(template(value))
    } else {
        Pattern::parse(value).matcher()
    };
    let matcher = matcher::PathMatcher { rule: Some(matcher::path_matcher::Rule::Path(pattern)) };
    rule(permission::Rule::UrlPath(matcher))
}

/// A path template as a regular expression: `{*}` is one segment, `{**}` any number of them.
fn template(value: &str) -> String {
    let one = |text: &str| text.split("{*}").map(matching::escape).collect::<Vec<_>>().join("[^/]+");
    value.split("{**}").map(one).collect::<Vec<_>>().join(".*")
}

fn port(value: &str) -> Option<Permission> {
    value.parse::<u16>().ok().map(|port| rule(permission::Rule::DestinationPort(port.into())))
}

fn ip(value: &str) -> Option<Permission> {
    pb::parse_net(value).map(|net| rule(permission::Rule::DestinationIp(pb::cidr(net))))
}

fn rule(rule: permission::Rule) -> Permission {
    Permission { rule: Some(rule) }
}

/// Any of the values; one that does not parse makes the whole field one that cannot be evaluated.
fn any_of(values: &[String], one: impl Fn(&str) -> Option<Permission>) -> Field<Permission> {
    if values.is_empty() {
        return Field::Unset;
    }
    let rules: Vec<Permission> = values.iter().filter_map(|value| one(value)).collect();
    if rules.len() != values.len() {
        return Field::Unreadable;
    }
    Field::Is(rule(permission::Rule::OrRules(permission::Set { rules })))
}

fn negate(field: Field<Permission>) -> Field<Permission> {
    match field {
        Field::Is(inner) => Field::Is(rule(permission::Rule::NotRule(Box::new(inner)))),
        Field::Unset => Field::Unset,
        Field::Unreadable => Field::Unreadable,
    }
}

fn all(rules: Vec<Permission>) -> Permission {
    if rules.is_empty() {
        return rule(permission::Rule::Any(true));
    }
    rule(permission::Rule::AndRules(permission::Set { rules }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_become_expressions_with_everything_else_quoted() {
        assert_eq!(template("/api/{*}/v1.0/{**}"), r"/api/[^/]+/v1\.0/.*");
        assert_eq!(template("/{**}/x{*}"), "/.*/x[^/]+");
    }

    #[test]
    fn one_value_that_cannot_be_read_makes_the_field_unreadable() {
        let ports =
            |values: &[&str]| any_of(&values.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>(), port);
        assert!(matches!(ports(&["80", "eighty"]), Field::Unreadable));
        assert!(matches!(ports(&["80"]), Field::Is(_)));
        assert!(matches!(ports(&[]), Field::Unset));
    }
}
