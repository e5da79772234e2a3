//! Listener filters: what is learnt of a connection before a chain is chosen.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::config::listener::v3 as pb_listener;
use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::{MatchSet, Rule};
use envoy_types::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use prost::{Message, Name};

use super::super::pb;

type Predicate = pb_listener::ListenerFilterChainMatchPredicate;

/// Restores the destination that capture replaced.
pub(in crate::translate) fn original_destination() -> pb_listener::ListenerFilter {
    filter("envoy.filters.listener.original_dst", &OriginalDst::default(), None)
}

/// Finds out whether a connection is TLS, its server name and its ALPN.
pub(in crate::translate) fn tls(disabled: Option<Predicate>) -> pb_listener::ListenerFilter {
    filter("envoy.filters.listener.tls_inspector", &TlsInspector::default(), disabled)
}

/// Finds out whether a connection is HTTP.
pub(in crate::translate) fn http(disabled: Option<Predicate>) -> pb_listener::ListenerFilter {
    filter("envoy.filters.listener.http_inspector", &HttpInspector::default(), disabled)
}

/// Switches a filter off on these destination ports.
pub(in crate::translate) fn not_on(ports: BTreeSet<u16>) -> Option<Predicate> {
    let mut rules: Vec<Predicate> = ports.into_iter().map(on_port).collect();
    if rules.len() > 1 {
        return Some(Predicate { rule: Some(Rule::OrMatch(MatchSet { rules })) });
    }
    rules.pop()
}

fn on_port(port: u16) -> Predicate {
    let start = i32::from(port);
    Predicate { rule: Some(Rule::DestinationPortRange(Int32Range { start, end: start + 1 })) }
}

fn filter<M: Message + Name>(
    name: &str,
    config: &M,
    filter_disabled: Option<Predicate>,
) -> pb_listener::ListenerFilter {
    pb_listener::ListenerFilter {
        name: name.to_owned(),
        filter_disabled,
        config_type: Some(pb_listener::listener_filter::ConfigType::TypedConfig(pb::any(config))),
    }
}
