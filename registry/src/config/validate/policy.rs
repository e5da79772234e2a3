//! Rules of `AuthorizationPolicy` and `PeerAuthentication`.

use super::{Checker, grammar};
use crate::model::security::{
    AuthorizationAction, AuthorizationPolicy, Condition, Operation, PeerAuthentication, Rule, Source,
};

/// Most entries of `serviceAccounts`.
const MAX_SERVICE_ACCOUNTS: usize = 16;

pub(super) fn check_authorization(cx: &mut Checker, namespace: &str, policy: &AuthorizationPolicy) {
    cx.targets(namespace, policy.selector.as_ref(), policy.target_ref.as_ref(), &policy.target_refs);
    let custom = policy.action == AuthorizationAction::Custom;
    match &policy.provider {
        None => cx.refuse(custom, "provider", "is required with action CUSTOM"),
        Some(_) if !custom => cx.error_at("provider", "is for action CUSTOM only"),
        Some(provider) => cx.at("provider", |cx| {
            cx.required("name", &provider.name);
        }),
    }
    if policy.rules.is_empty() && policy.action != AuthorizationAction::Allow {
        let message = format!(
            "is required with action {}: without rules the policy has no effect",
            policy.action.as_str()
        );
        cx.error_at("rules", message);
    }
    cx.each("rules", &policy.rules, check_rule);
}

fn check_rule(cx: &mut Checker, rule: &Rule) {
    cx.each("from", &rule.from, |cx, from| match &from.source {
        None => cx.error_at("source", "is required"),
        Some(source) => cx.at("source", |cx| check_source(cx, source)),
    });
    cx.each("to", &rule.to, |cx, to| match &to.operation {
        None => cx.error_at("operation", "is required"),
        Some(operation) => cx.at("operation", |cx| check_operation(cx, operation)),
    });
    cx.each("when", &rule.when, check_condition);
}

fn check_source(cx: &mut Checker, source: &Source) {
    if *source == Source::default() {
        cx.error("must have at least one field; leave out from to accept any source");
    }
    for (field, values) in [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
    ] {
        patterns(cx, field, values);
    }
    for (field, values) in [("principals", &source.principals), ("notPrincipals", &source.not_principals)] {
        cx.each(field, values, |cx, principal| {
            if principal.starts_with("spiffe://") {
                cx.error("must be an identity without spiffe://, as cluster.local/ns/default/sa/web");
            }
        });
    }
    for (field, blocks) in [
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ] {
        cx.each(field, blocks, |cx, block| {
            if !grammar::is_subnet(block) {
                cx.error("must be an IP address or a range such as 10.0.0.0/8");
            }
        });
    }
    check_service_accounts(cx, source);
}

fn check_service_accounts(cx: &mut Checker, source: &Source) {
    let wide = !source.principals.is_empty() || !source.namespaces.is_empty();
    let not_wide = !source.not_principals.is_empty() || !source.not_namespaces.is_empty();
    for (field, accounts, excluded) in [
        ("serviceAccounts", &source.service_accounts, wide),
        ("notServiceAccounts", &source.not_service_accounts, not_wide),
    ] {
        if accounts.is_empty() {
            continue;
        }
        cx.refuse(
            excluded,
            field,
            "cannot be set together with principals or namespaces, which it stands for",
        );
        cx.refuse(accounts.len() > MAX_SERVICE_ACCOUNTS, field, "must have at most 16 entries");
        cx.each(field, accounts, |cx, account| {
            let fits = match account.split_once('/') {
                Some((namespace, name)) => grammar::is_label(namespace) && grammar::is_subdomain(name),
                None => grammar::is_subdomain(account),
            };
            if !fits {
                cx.error(
                    "must be the name of a service account, or namespace/name; wildcards are not possible",
                );
            }
        });
    }
}

fn check_operation(cx: &mut Checker, operation: &Operation) {
    if *operation == Operation::default() {
        cx.error("must have at least one field; leave out to to accept any operation");
    }
    for (field, values) in [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
    ] {
        patterns(cx, field, values);
    }
    for (field, ports) in [("ports", &operation.ports), ("notPorts", &operation.not_ports)] {
        cx.each(field, ports, |cx, port| check_port(cx, port));
    }
    for (field, paths) in [("paths", &operation.paths), ("notPaths", &operation.not_paths)] {
        cx.each(field, paths, |cx, path| check_path(cx, path));
    }
}

/// Values that may have a `*` at one end.
fn patterns(cx: &mut Checker, field: &str, values: &[String]) {
    cx.each(field, values, |cx, value| check_pattern(cx, value));
}

fn check_pattern(cx: &mut Checker, value: &str) {
    if value.is_empty() {
        cx.error("must not be empty");
    } else if value != "*"
        && value.strip_prefix('*').or_else(|| value.strip_suffix('*')).is_some_and(|rest| rest.contains('*'))
    {
        cx.warn(
            "only one * at the beginning or the end is a wildcard; this value matches literally otherwise",
        );
    }
}

fn check_port(cx: &mut Checker, port: &str) {
    if !port.parse::<u16>().is_ok_and(|port| port != 0) {
        cx.error("must be a port number in quotes, 1 to 65535");
    }
}

/// A path, or a template with `{*}` for one part and `{**}` for the rest.
fn check_path(cx: &mut Checker, path: &str) {
    if path.is_empty() {
        cx.error("must not be empty");
        return;
    }
    if !path.contains(['{', '}']) {
        check_pattern(cx, path);
        return;
    }
    let parts: Vec<&str> = path.split('/').collect();
    let mut rest = false;
    for part in &parts {
        match *part {
            "{*}" if rest => return cx.error("{**} must be the last operator of a template"),
            "{**}" if rest => return cx.error("{**} may be there only once"),
            "{**}" => rest = true,
            "{*}" => {}
            part if part.contains(['{', '}']) => {
                return cx.error(
                    "must be a path or a template: {*} and {**} stand for whole parts between slashes",
                );
            }
            part if part.contains('*') => {
                return cx.error("must be a path or a template: * and {*} cannot be mixed");
            }
            _ => {}
        }
    }
    if !path.starts_with('/') {
        cx.error("a template must begin with /");
    }
}

/// Keys of conditions without an argument.
const KEYS: &[&str] = &[
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "destination.ip",
    "destination.port",
    "connection.sni",
];
/// Keys of conditions with an argument in brackets.
const KEYS_WITH_ARGUMENT: &[&str] = &["request.headers", "request.auth.claims"];

fn check_condition(cx: &mut Checker, condition: &Condition) {
    if !cx.required("key", &condition.key) {
        return;
    }
    if condition.values.is_empty() && condition.not_values.is_empty() {
        cx.error("must have at least one of values and notValues");
    }
    let key = condition.key.as_str();
    if let Err(why) = known_key(key) {
        cx.error_at("key", why);
        return;
    }
    for (field, values) in [("values", &condition.values), ("notValues", &condition.not_values)] {
        cx.each(field, values, |cx, value| match key {
            "source.ip" | "remote.ip" | "destination.ip" => {
                if !grammar::is_subnet(value) {
                    cx.error("must be an IP address or a range such as 10.0.0.0/8");
                }
            }
            "destination.port" => check_port(cx, value),
            _ => check_pattern(cx, value),
        });
    }
}

fn known_key(key: &str) -> Result<(), String> {
    if KEYS.contains(&key) || key.starts_with("experimental.envoy.filters.") {
        return Ok(());
    }
    for name in KEYS_WITH_ARGUMENT {
        if let Some(argument) = key.strip_prefix(name) {
            let inner = argument.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            return match inner {
                Some(inner) if !inner.is_empty() => Ok(()),
                _ => Err(format!("must be {name}[NAME]")),
            };
        }
    }
    let mut known = KEYS.to_vec();
    known.extend(["request.headers[NAME]", "request.auth.claims[NAME]"]);
    Err(match super::super::decode::nearest(key, &known) {
        Some(near) => format!("is no key of a condition; did you mean {near}?"),
        None => format!("is no key of a condition; keys are: {}", known.join(", ")),
    })
}

pub(super) fn check_peer_authentication(cx: &mut Checker, policy: &PeerAuthentication) {
    cx.opt("selector", policy.selector.as_ref(), |cx, selector| {
        cx.selector("matchLabels", &selector.match_labels)
    });
    let selects = policy.selector.as_ref().is_some_and(|selector| !selector.match_labels.is_empty());
    cx.refuse(
        !policy.port_level_mtls.is_empty() && !selects,
        "portLevelMtls",
        "needs a selector with labels: ports belong to workloads",
    );
}
