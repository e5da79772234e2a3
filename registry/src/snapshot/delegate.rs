//! A root VirtualService and those it delegates to, as one.
//!
//! Source: Istio, `mergeVirtualServicesIfNeeded`. A delegate's match must be a subset of the root's, else its route is
//! left out; what the delegate sets outranks the root.

use std::collections::BTreeMap;

use crate::model::traffic::{HttpMatchRequest, HttpRoute, StringMatch};

/// The routes of `delegate` under the conditions of `root`.
pub(super) fn merge_routes(root: &HttpRoute, delegate: &[HttpRoute]) -> Vec<HttpRoute> {
    delegate.iter().filter_map(|route| merge_route(root, route)).collect()
}

fn merge_route(root: &HttpRoute, delegate: &HttpRoute) -> Option<HttpRoute> {
    // One level only: a delegate that delegates is left out.
    if delegate.delegate.is_some() {
        return None;
    }
    let r#match = merge_matches(&root.r#match, &delegate.r#match)?;
    let delegate = delegate.clone();
    Some(HttpRoute {
        name: joined(&root.name, &delegate.name),
        r#match,
        rewrite: delegate.rewrite.or_else(|| root.rewrite.clone()),
        direct_response: delegate.direct_response.or_else(|| root.direct_response.clone()),
        timeout: delegate.timeout.or(root.timeout),
        retries: delegate.retries.or_else(|| root.retries.clone()),
        fault: delegate.fault.or_else(|| root.fault.clone()),
        mirror: delegate.mirror.or_else(|| root.mirror.clone()),
        mirrors: if delegate.mirrors.is_empty() { root.mirrors.clone() } else { delegate.mirrors },
        mirror_percent: delegate.mirror_percent.or(root.mirror_percent),
        mirror_percentage: delegate.mirror_percentage.or_else(|| root.mirror_percentage.clone()),
        cors_policy: delegate.cors_policy.or_else(|| root.cors_policy.clone()),
        headers: delegate.headers.or_else(|| root.headers.clone()),
        route: delegate.route,
        redirect: delegate.redirect,
        delegate: None,
    })
}

fn joined(root: &str, own: &str) -> String {
    match (root.is_empty(), own.is_empty()) {
        (_, true) => root.to_owned(),
        (true, false) => own.to_owned(),
        (false, false) => format!("{root}-{own}"),
    }
}

/// Every match of the delegate under each of the root's that it is a subset of; none when one fits nowhere.
fn merge_matches(root: &[HttpMatchRequest], delegate: &[HttpMatchRequest]) -> Option<Vec<HttpMatchRequest>> {
    if root.is_empty() || delegate.is_empty() {
        return Some(if root.is_empty() { delegate } else { root }.to_vec());
    }
    let mut merged = Vec::new();
    for own in delegate {
        let before = merged.len();
        merged.extend(root.iter().filter(|root| !conflict(root, own)).map(|root| merge_match(root, own)));
        if merged.len() == before {
            return None;
        }
    }
    Some(merged)
}

fn merge_match(root: &HttpMatchRequest, own: &HttpMatchRequest) -> HttpMatchRequest {
    fn both<V: Clone>(root: &BTreeMap<String, V>, own: &BTreeMap<String, V>) -> BTreeMap<String, V> {
        let mut merged = root.clone();
        merged.extend(own.iter().map(|(key, value)| (key.clone(), value.clone())));
        merged
    }
    let or = |own: &str, root: &str| if own.is_empty() { root.to_owned() } else { own.to_owned() };
    HttpMatchRequest {
        name: joined(&root.name, &own.name),
        uri: own.uri.clone().or_else(|| root.uri.clone()),
        scheme: own.scheme.clone().or_else(|| root.scheme.clone()),
        method: own.method.clone().or_else(|| root.method.clone()),
        authority: own.authority.clone().or_else(|| root.authority.clone()),
        headers: both(&root.headers, &own.headers),
        without_headers: both(&root.without_headers, &own.without_headers),
        query_params: both(&root.query_params, &own.query_params),
        port: if own.port == 0 { root.port } else { own.port },
        source_labels: both(&root.source_labels, &own.source_labels),
        gateways: if own.gateways.is_empty() { root.gateways.clone() } else { own.gateways.clone() },
        ignore_uri_case: own.ignore_uri_case || root.ignore_uri_case,
        source_namespace: or(&own.source_namespace, &root.source_namespace),
        stat_prefix: or(&own.stat_prefix, &root.stat_prefix),
    }
}

/// The delegate's match is not a subset of the root's.
fn conflict(root: &HttpMatchRequest, own: &HttpMatchRequest) -> bool {
    fn in_maps(root: &BTreeMap<String, StringMatch>, own: &BTreeMap<String, StringMatch>) -> bool {
        own.iter().any(|(key, value)| root.get(key).is_some_and(|root| wider(root, value)))
    }
    let texts = [
        (&root.uri, &own.uri),
        (&root.scheme, &own.scheme),
        (&root.method, &own.method),
        (&root.authority, &own.authority),
    ];
    let text = |(root, own): &(&Option<StringMatch>, &Option<StringMatch>)| match (root, own) {
        (Some(root), Some(own)) => wider(root, own),
        (None, _) | (_, None) => false,
    };
    let labels =
        |(key, value): (&String, &String)| root.source_labels.get(key).is_some_and(|root| root != value);
    texts.iter().any(text)
        || in_maps(&root.headers, &own.headers)
        || in_maps(&root.without_headers, &own.without_headers)
        || in_maps(&root.query_params, &own.query_params)
        || root.ignore_uri_case != own.ignore_uri_case
        || (root.port != 0 && own.port != 0 && root.port != own.port)
        || own.source_labels.iter().any(labels)
        || (!root.source_namespace.is_empty()
            && !own.source_namespace.is_empty()
            && root.source_namespace != own.source_namespace)
        || (!root.gateways.is_empty() && own.gateways.iter().any(|gateway| !root.gateways.contains(gateway)))
}

/// `own` matches something that `root` does not; expressions are never compared.
fn wider(root: &StringMatch, own: &StringMatch) -> bool {
    match (root, own) {
        (StringMatch::Present, _) => false,
        (StringMatch::Exact(root), StringMatch::Exact(own)) => root != own,
        (StringMatch::Prefix(root), StringMatch::Exact(own) | StringMatch::Prefix(own)) => {
            !own.starts_with(root)
        }
        (StringMatch::Regex(_), _) | (StringMatch::Exact(_) | StringMatch::Prefix(_), _) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: StringMatch) -> HttpMatchRequest {
        HttpMatchRequest { uri: Some(text), ..HttpMatchRequest::default() }
    }

    fn prefix(text: &str) -> StringMatch {
        StringMatch::Prefix(text.to_owned())
    }

    fn exact(text: &str) -> StringMatch {
        StringMatch::Exact(text.to_owned())
    }

    #[test]
    fn a_delegate_may_only_narrow_what_the_root_matches() {
        for (root, own, is_conflict) in [
            (prefix("/a"), prefix("/a/b"), false),
            (prefix("/a"), exact("/a/b"), false),
            (prefix("/a"), prefix("/b"), true),
            (prefix("/a"), exact("/b"), true),
            (exact("/a"), exact("/a"), false),
            (exact("/a"), prefix("/a"), true),
            (StringMatch::Regex("a".into()), exact("a"), true),
            (prefix("/a"), StringMatch::Regex("a".into()), true),
            (StringMatch::Present, exact("a"), false),
            (exact("a"), StringMatch::Present, true),
        ] {
            assert_eq!(conflict(&uri(root.clone()), &uri(own.clone())), is_conflict, "{root:?} {own:?}");
        }
        let port = |port| HttpMatchRequest { port, ..HttpMatchRequest::default() };
        assert!(conflict(&port(80), &port(81)));
        assert!(!conflict(&port(80), &port(0)));
    }

    #[test]
    fn what_the_delegate_sets_outranks_the_root() {
        use std::time::Duration;
        let root = HttpRoute {
            name: "root".into(),
            r#match: vec![uri(prefix("/a"))],
            timeout: Some(Duration::from_secs(1)),
            ..HttpRoute::default()
        };
        let child = HttpRoute {
            name: "child".into(),
            r#match: vec![uri(prefix("/a/b"))],
            timeout: Some(Duration::from_secs(2)),
            ..HttpRoute::default()
        };
        let silent = HttpRoute::default();
        let lost = HttpRoute { r#match: vec![uri(prefix("/z"))], ..HttpRoute::default() };
        let merged = merge_routes(&root, &[child, lost, silent]);
        let told: Vec<_> = merged.iter().map(|r| (r.name.as_str(), r.timeout, r.r#match.clone())).collect();
        assert_eq!(
            told,
            [
                ("root-child", Some(Duration::from_secs(2)), vec![uri(prefix("/a/b"))]),
                ("root", Some(Duration::from_secs(1)), vec![uri(prefix("/a"))]),
            ]
        );
    }
}
