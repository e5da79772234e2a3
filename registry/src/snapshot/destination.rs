//! Which DestinationRule a client's calls to a host follow.
//!
//! Source: Istio, `PushContext.destinationRule` and `mergeDestinationRule`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::host_match;
use super::scoped::age;
use crate::config::{Kind, Object, Spec};
use crate::merge::Settings;
use crate::merge::declare::{Labels, contains};
use crate::model::traffic::{DestinationRule, PortTrafficPolicy, TrafficPolicy};
use crate::state::State;

/// The rules of one host in one namespace as one: the oldest with what the younger add.
#[derive(Debug, Clone, PartialEq)]
pub struct MergedDestinationRule {
    /// Namespace of the rules.
    pub namespace: String,
    /// Their host, fully qualified; may be a wildcard.
    pub host: String,
    /// What they say together.
    pub rule: DestinationRule,
    /// The objects, oldest first.
    pub from: Vec<Arc<Object>>,
    /// Namespaces that see it.
    pub export_to: BTreeSet<String>,
}

impl MergedDestinationRule {
    /// The policy for `port` of `subset`: the host's, under the subset's block by block; a policy of the port replaces
    /// all blocks of its level, so that what it omits falls to the default and not to the parent.
    #[must_use]
    pub fn traffic_policy(&self, port: u16, subset: Option<&str>) -> Option<TrafficPolicy> {
        let host = self.rule.traffic_policy.as_ref().map(|policy| for_port(policy, port));
        let named = |name: &str| self.rule.subsets.iter().find(|subset| subset.name == name);
        let Some(subset) = subset.and_then(named).and_then(|subset| subset.traffic_policy.as_ref()) else {
            return host;
        };
        if let Some(own) = port_policy(subset, port) {
            return Some(own);
        }
        let mut merged = host.unwrap_or_default();
        let subset = subset.clone();
        merged.load_balancer = subset.load_balancer.or(merged.load_balancer);
        merged.connection_pool = subset.connection_pool.or(merged.connection_pool);
        merged.outlier_detection = subset.outlier_detection.or(merged.outlier_detection);
        merged.tls = subset.tls.or(merged.tls);
        merged.tunnel = subset.tunnel.or(merged.tunnel);
        merged.proxy_protocol = subset.proxy_protocol.or(merged.proxy_protocol);
        merged.retry_budget = subset.retry_budget.or(merged.retry_budget);
        Some(merged)
    }
}

fn for_port(policy: &TrafficPolicy, port: u16) -> TrafficPolicy {
    let whole = || TrafficPolicy { port_level_settings: Vec::new(), ..policy.clone() };
    port_policy(policy, port).unwrap_or_else(whole)
}

fn port_policy(policy: &TrafficPolicy, port: u16) -> Option<TrafficPolicy> {
    let of_port = |p: &&PortTrafficPolicy| p.port.as_ref().is_some_and(|selector| selector.number == port);
    let own = policy.port_level_settings.iter().find(of_port)?.clone();
    Some(TrafficPolicy {
        load_balancer: own.load_balancer,
        connection_pool: own.connection_pool,
        outlier_detection: own.outlier_detection,
        tls: own.tls,
        ..TrafficPolicy::default()
    })
}

type Merged = Vec<Arc<MergedDestinationRule>>;

/// Rules by host.
#[derive(Debug, Clone, Default)]
struct ByHost {
    exact: BTreeMap<String, Merged>,
    /// Longest first.
    wildcards: Vec<(String, Merged)>,
}

impl ByHost {
    fn build(rules: &[Rule], include: impl Fn(&Rule) -> bool) -> Self {
        let mut hosts: BTreeMap<String, Merged> = BTreeMap::new();
        for rule in rules.iter().filter(|rule| include(rule)) {
            merge_into(hosts.entry(rule.host.clone()).or_default(), rule);
        }
        let (wildcards, exact): (BTreeMap<_, _>, BTreeMap<_, _>) =
            hosts.into_iter().partition(|(host, _)| host.starts_with('*'));
        let mut wildcards: Vec<_> = wildcards.into_iter().collect();
        wildcards.sort_by_key(|(host, _)| std::cmp::Reverse(host.len()));
        Self { exact, wildcards }
    }

    fn find(&self, host: &str) -> Option<&Merged> {
        self.exact.get(host).or_else(|| {
            let covering = self.wildcards.iter().find(|(pattern, _)| host_match::subset_of(host, pattern));
            covering.map(|(_, merged)| merged)
        })
    }
}

/// One object, resolved.
struct Rule {
    object: Arc<Object>,
    rule: DestinationRule,
    host: String,
    export_to: BTreeSet<String>,
}

impl Rule {
    fn new(object: &Arc<Object>, settings: &Settings) -> Option<Self> {
        let Spec::DestinationRule(rule) = &*object.spec else { return None };
        let host = host_match::resolve(&rule.host, &object.namespace, &settings.domain_suffix);
        let export_to: BTreeSet<String> = if rule.workload_selector.is_some() {
            BTreeSet::from([".".to_owned()])
        } else if rule.export_to.is_empty() {
            settings.destination_rule_export_to.iter().cloned().collect()
        } else {
            rule.export_to.iter().cloned().collect()
        };
        let rule = DestinationRule { host: host.clone(), ..DestinationRule::clone(rule) };
        Some(Self { object: Arc::clone(object), rule, host, export_to })
    }

    fn own(&self) -> bool {
        let namespace = &self.object.namespace;
        self.export_to.iter().any(|to| to == "*" || to == "." || to == namespace)
    }

    fn private(&self) -> bool {
        self.export_to.iter().all(|to| to == "." || *to == self.object.namespace)
    }
}

fn merge_into(list: &mut Merged, new: &Rule) {
    let mut standalone = true;
    for merged in list.iter_mut() {
        let same_clients = merged.rule.workload_selector == new.rule.workload_selector;
        let same_readers = merged.export_to == new.export_to;
        if !same_clients || !(same_readers || new.export_to.is_superset(&merged.export_to)) {
            continue;
        }
        standalone &= !same_readers;
        let merged = Arc::make_mut(merged);
        for subset in &new.rule.subsets {
            if merged.rule.subsets.iter().all(|known| known.name != subset.name) {
                merged.rule.subsets.push(subset.clone());
            }
        }
        if merged.rule.traffic_policy.is_none() {
            merged.rule.traffic_policy.clone_from(&new.rule.traffic_policy);
        }
        merged.from.push(Arc::clone(&new.object));
    }
    if standalone {
        list.push(Arc::new(MergedDestinationRule {
            namespace: new.object.namespace.clone(),
            host: new.host.clone(),
            rule: new.rule.clone(),
            from: vec![Arc::clone(&new.object)],
            export_to: new.export_to.clone(),
        }));
    }
}

/// The rules of one namespace.
#[derive(Debug, Clone, Default)]
struct NamespaceRules {
    /// What clients of the namespace itself see.
    local: ByHost,
    /// What may be seen elsewhere.
    exported: ByHost,
    /// What only the namespace itself sees.
    private: ByHost,
}

/// All DestinationRules. A copy shares the rules of every namespace.
#[derive(Debug, Clone, Default)]
pub(super) struct DestinationRules {
    by_namespace: Arc<BTreeMap<String, Arc<NamespaceRules>>>,
}

impl DestinationRules {
    pub(super) fn build(state: &State, settings: &Settings) -> Self {
        let namespaces =
            state.objects_of(Kind::DestinationRule).map(|(key, _)| key.namespace.clone()).collect();
        let mut rules = Self::default();
        rules.update(state, settings, &namespaces);
        rules
    }

    /// Reads these namespaces again.
    pub(super) fn update(&mut self, state: &State, settings: &Settings, namespaces: &BTreeSet<String>) {
        if namespaces.is_empty() {
            return;
        }
        let all = Arc::make_mut(&mut self.by_namespace);
        for namespace in namespaces {
            let objects = state.objects_in(Kind::DestinationRule, namespace);
            let mut rules: Vec<Rule> =
                objects.filter_map(|(_, object)| Rule::new(object, settings)).collect();
            rules.sort_by(|a, b| age(&a.object).cmp(&age(&b.object)));
            if rules.is_empty() {
                all.remove(namespace);
                continue;
            }
            let rules = NamespaceRules {
                local: ByHost::build(&rules, Rule::own),
                exported: ByHost::build(&rules, |rule| !rule.private()),
                private: ByHost::build(&rules, |rule| rule.own() && rule.private()),
            };
            all.insert(namespace.clone(), Arc::new(rules));
        }
    }

    /// The rule for calls of a client to `host`, a service of `service_namespace` if it is known. The first namespace
    /// with any match wins: the client's, the service's, the root.
    pub(super) fn find(
        &self,
        settings: &Settings,
        client: (&str, &Labels),
        host: &str,
        service_namespace: Option<&str>,
    ) -> Option<Arc<MergedDestinationRule>> {
        let (namespace, labels) = client;
        let root = settings.root_namespace.as_str();
        let own = self.by_namespace.get(namespace).and_then(|rules| {
            // Rules that the root namespace exports are the mesh's last resort, not what its own clients meant.
            let index = if namespace == root { &rules.private } else { &rules.local };
            index.find(host)
        });
        if let Some(merged) = own {
            return pick(merged.iter(), namespace, labels);
        }
        for owner in service_namespace.into_iter().chain([root]) {
            let found = self.by_namespace.get(owner).and_then(|rules| rules.exported.find(host));
            let mut seen = found
                .into_iter()
                .flatten()
                .filter(|merged| visible(&merged.export_to, owner, namespace))
                .peekable();
            if seen.peek().is_some() {
                return pick(seen, namespace, labels);
            }
        }
        None
    }
}

fn visible(export_to: &BTreeSet<String>, owner: &str, client: &str) -> bool {
    export_to.iter().any(|to| to == "*" || to == client || (to == "." && owner == client))
}

/// A rule that selects the client outranks one for every client; among equals the oldest.
fn pick<'a>(
    rules: impl Iterator<Item = &'a Arc<MergedDestinationRule>>,
    namespace: &str,
    labels: &Labels,
) -> Option<Arc<MergedDestinationRule>> {
    let mut everybody = None;
    for merged in rules {
        match &merged.rule.workload_selector {
            None => everybody = everybody.or(Some(merged)),
            Some(selector) if merged.namespace == namespace && contains(labels, &selector.match_labels) => {
                return Some(Arc::clone(merged));
            }
            Some(_) => {}
        }
    }
    everybody.cloned()
}
