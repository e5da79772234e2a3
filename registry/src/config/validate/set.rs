//! Rules across objects: what one names and another does not have.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::grammar;
use crate::config::node::{Path, Segment};
use crate::config::object::{Kind, Object, Spec};
use crate::model::mesh::MeshConfig;
use crate::model::security::{AuthorizationPolicy, PeerAuthentication};
use crate::model::telemetry::Telemetry;
use crate::model::traffic::{
    Destination, DestinationRule, Gateway, HttpRoute, ServiceEntry, Sidecar, VirtualService,
};

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Some of what was written cannot have an effect, now or later.
    Error,
    /// Something named does not exist, or not yet, or something has no effect.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// Something that is wrong among objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// `Kind/namespace/name` of the object to change.
    pub object: String,
    /// Which value of it.
    pub path: Path,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}: {}", self.severity, self.object, self.path, self.message)
    }
}

/// What is wrong among these objects, in a stable order. Services of other sources are not known here, so
/// nothing is said about hosts.
#[must_use]
pub fn validate_set(objects: &[&Object]) -> Vec<Problem> {
    let set = Set::new(objects);
    let mut problems = Vec::new();
    for object in objects {
        let mut cx = About { object, problems: &mut problems };
        if is_namespace_wide(object) {
            namespace_wide(&mut cx, &set);
        }
        if let Some(spec) = object.get::<VirtualService>() {
            virtual_service(&mut cx, &set, spec);
        } else if let Some(spec) = object.get::<PeerAuthentication>() {
            let selects = spec.selector.as_ref().is_some_and(|selector| !selector.match_labels.is_empty());
            if selects && object.namespace == set.root_namespace() {
                cx.warn(Path::spec().key("selector"), "has no effect in the root namespace");
            }
        } else if let Some(spec) = object.get::<Telemetry>() {
            telemetry_providers(&mut cx, &set, spec);
        } else if let Some(provider) =
            object.get::<AuthorizationPolicy>().and_then(|spec| spec.provider.as_ref())
        {
            known_provider(&mut cx, &set, Path::spec().key("provider").key("name"), &provider.name);
        }
    }
    shared_hosts(&set, &mut problems);
    shared_ports(&set, &mut problems);
    conflicting_subsets(&set, &mut problems);
    problems.sort();
    problems
}

/// On which objects it depends what [`validate_set`] says of those that change: without the others it says the same.
#[derive(Debug)]
pub struct Related {
    kinds: BTreeSet<Kind>,
    /// In lower case, of the `ServiceEntry` objects that change.
    hosts: BTreeSet<String>,
}

impl Related {
    /// For a change of these objects.
    #[must_use]
    pub fn to(changed: &[&Object]) -> Self {
        let entries = changed.iter().filter_map(|object| object.get::<ServiceEntry>());
        Self {
            kinds: changed.iter().flat_map(|object| looked_at(object.kind)).copied().collect(),
            hosts: entries.flat_map(|entry| &entry.hosts).map(|host| host.to_ascii_lowercase()).collect(),
        }
    }

    /// The kinds that matter.
    pub fn kinds(&self) -> impl Iterator<Item = Kind> {
        self.kinds.iter().copied()
    }

    /// Whether an object of one of these kinds matters.
    #[must_use]
    pub fn concern(&self, object: &Object) -> bool {
        let entry = object.get::<ServiceEntry>();
        entry.is_none_or(|entry| entry.hosts.iter().any(|host| self.hosts.contains(&*lower(host))))
    }
}

fn lower(host: &str) -> Cow<'_, str> {
    let upper = host.bytes().any(|byte| byte.is_ascii_uppercase());
    if upper { host.to_ascii_lowercase().into() } else { host.into() }
}

/// The kinds among which the rules for an object of this kind look.
const fn looked_at(kind: Kind) -> &'static [Kind] {
    match kind {
        Kind::VirtualService => &[Kind::VirtualService, Kind::DestinationRule, Kind::Gateway],
        Kind::DestinationRule => &[Kind::DestinationRule],
        Kind::ServiceEntry => &[Kind::ServiceEntry],
        Kind::Sidecar => &[Kind::Sidecar],
        Kind::PeerAuthentication => &[Kind::PeerAuthentication, Kind::MeshConfig],
        Kind::Telemetry => &[Kind::Telemetry, Kind::MeshConfig],
        Kind::AuthorizationPolicy => &[Kind::MeshConfig],
        Kind::Gateway
        | Kind::WorkloadEntry
        | Kind::WorkloadGroup
        | Kind::EnvoyFilter
        | Kind::ProxyConfig
        | Kind::WasmPlugin
        | Kind::TrafficExtension
        | Kind::RequestAuthentication
        | Kind::MeshConfig => &[],
    }
}

/// A short name belongs to the namespace of the object that has it.
fn full_host(host: &str, namespace: &str) -> String {
    let host = host.to_ascii_lowercase();
    if host.contains(['.', ':', '*']) { host } else { format!("{host}.{namespace}.svc.cluster.local") }
}

struct Set<'a> {
    objects: &'a [&'a Object],
    mesh: Option<&'a MeshConfig>,
    named: BTreeMap<(Kind, &'a str, &'a str), &'a Object>,
    /// DestinationRules by their full host.
    exact: BTreeMap<String, Vec<(&'a Object, &'a DestinationRule)>>,
    /// DestinationRules whose host has a wildcard.
    wildcards: Vec<(String, &'a Object, &'a DestinationRule)>,
}

impl<'a> Set<'a> {
    fn new(objects: &'a [&'a Object]) -> Self {
        let mesh = objects.iter().find_map(|object| object.get::<MeshConfig>());
        let key = |object: &'a Object| (object.kind, object.namespace.as_str(), object.name.as_str());
        let named = objects.iter().map(|object| (key(object), *object)).collect();
        let mut set = Self { objects, mesh, named, exact: BTreeMap::new(), wildcards: Vec::new() };
        for (object, rule) in
            objects.iter().filter_map(|object| Some((*object, object.get::<DestinationRule>()?)))
        {
            let host = full_host(&rule.host, &object.namespace);
            if host.starts_with('*') {
                set.wildcards.push((host, object, rule));
            } else {
                set.exact.entry(host).or_default().push((object, rule));
            }
        }
        set
    }

    fn root_namespace(&self) -> &str {
        self.mesh.map_or("istio-system", MeshConfig::root_namespace)
    }

    fn named(&self, kind: Kind, namespace: &str, name: &str) -> Option<&'a Object> {
        self.named.get(&(kind, namespace, name)).copied()
    }

    /// DestinationRules for a host, those with exactly this host first.
    fn rules_for(&self, host: &str) -> Vec<(&'a Object, &'a DestinationRule)> {
        let exact = self.exact.get(host).into_iter().flatten().copied();
        let wide = self.wildcards.iter().filter(|(pattern, ..)| grammar::covers(pattern, host));
        exact.chain(wide.map(|(_, object, rule)| (*object, *rule))).collect()
    }

    fn rules(&self) -> impl Iterator<Item = (&'a Object, &'a DestinationRule)> {
        self.objects.iter().filter_map(|object| Some((*object, object.get::<DestinationRule>()?)))
    }

    fn services(&self) -> impl Iterator<Item = (&'a Object, &'a VirtualService)> {
        self.objects.iter().filter_map(|object| Some((*object, object.get::<VirtualService>()?)))
    }

    /// Objects of the same kind in the same namespace, the oldest first.
    fn siblings(&self, object: &Object) -> Vec<&'a Object> {
        let mut all: Vec<&Object> = self
            .objects
            .iter()
            .copied()
            .filter(|o| o.kind == object.kind && o.namespace == object.namespace && is_namespace_wide(o))
            .collect();
        all.sort_by_key(|o| (o.created, o.name.clone()));
        all
    }
}

fn is_namespace_wide(object: &Object) -> bool {
    if let Some(spec) = object.get::<PeerAuthentication>() {
        return spec.selector.as_ref().is_none_or(|selector| selector.match_labels.is_empty());
    }
    if let Some(spec) = object.get::<Telemetry>() {
        return spec.selector.is_none() && spec.target_ref.is_none() && spec.target_refs.is_empty();
    }
    object.get::<Sidecar>().is_some_and(|spec| spec.workload_selector.is_none())
}

struct About<'a, 'p> {
    object: &'a Object,
    problems: &'p mut Vec<Problem>,
}

impl About<'_, '_> {
    fn push(&mut self, severity: Severity, path: Path, message: impl Into<String>) {
        let object = self.object.id();
        self.problems.push(Problem { severity, object, path, message: message.into() });
    }

    fn warn(&mut self, path: Path, message: impl Into<String>) {
        self.push(Severity::Warning, path, message);
    }
}

fn namespace_wide(cx: &mut About<'_, '_>, set: &Set<'_>) {
    let siblings = set.siblings(cx.object);
    if let Some(first) = siblings.first().filter(|first| first.name != cx.object.name) {
        let message = format!(
            "{} is for the whole namespace already and is older; this object has no effect",
            first.id()
        );
        cx.warn(Path::spec(), message);
    }
}

fn known_provider(cx: &mut About<'_, '_>, set: &Set<'_>, path: Path, name: &str) {
    let Some(mesh) = set.mesh else { return };
    if mesh.provider(name).is_none() && !matches!(name, "prometheus" | "envoy" | "stackdriver") {
        let known: Vec<&str> = mesh.extension_providers.iter().map(|p| p.name.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        cx.warn(path, format!("no provider {name} in the mesh configuration; it has: {known}"));
    }
}

fn telemetry_providers(cx: &mut About<'_, '_>, set: &Set<'_>, spec: &Telemetry) {
    let lists = spec
        .tracing
        .iter()
        .map(|t| &t.providers)
        .enumerate()
        .map(|(i, p)| ("tracing", i, p))
        .chain(spec.metrics.iter().map(|m| &m.providers).enumerate().map(|(i, p)| ("metrics", i, p)))
        .chain(
            spec.access_logging
                .iter()
                .map(|l| &l.providers)
                .enumerate()
                .map(|(i, p)| ("accessLogging", i, p)),
        );
    for (field, index, providers) in lists {
        for (at, provider) in providers.iter().enumerate() {
            let path = Path::spec().key(field).index(index).key("providers").index(at).key("name");
            known_provider(cx, set, path, &provider.name);
        }
    }
}

fn virtual_service(cx: &mut About<'_, '_>, set: &Set<'_>, service: &VirtualService) {
    for (path, destination) in destinations(service) {
        subset(cx, set, path, destination);
    }
    for (index, gateway) in service.gateways.iter().enumerate().filter(|(_, gateway)| *gateway != "mesh") {
        gateway_of(cx, set, Path::spec().key("gateways").index(index), service, gateway);
    }
    foreign_hosts(cx, service);
    for (index, route) in service.http.iter().enumerate() {
        delegate(cx, set, Path::spec().key("http").index(index).key("delegate"), route);
    }
}

/// Routes for a host of another namespace hold for that host's callers wherever the object is exported to.
fn foreign_hosts(cx: &mut About<'_, '_>, service: &VirtualService) {
    let own_only = service.export_to.iter().all(|to| *to == "." || *to == cx.object.namespace);
    if own_only && !service.export_to.is_empty() {
        return;
    }
    for (index, host) in service.hosts.iter().enumerate() {
        let host = full_host(host, &cx.object.namespace);
        let Some(owner) = host.strip_suffix(".svc.cluster.local").and_then(|name| name.rsplit('.').next())
        else {
            continue;
        };
        if owner != cx.object.namespace && owner != "*" {
            let message = format!(
                "{host} belongs to namespace {owner}, and callers of other namespaces follow these routes too; \
                 exportTo: [\".\"] keeps them to callers of namespace {}",
                cx.object.namespace
            );
            cx.warn(Path::spec().key("hosts").index(index), message);
        }
    }
}

/// Every destination of a VirtualService with its path.
fn destinations(service: &VirtualService) -> Vec<(Path, &Destination)> {
    let mut out = Vec::new();
    for (i, route) in service.http.iter().enumerate() {
        let at = Path::spec().key("http").index(i);
        for (j, to) in route.route.iter().enumerate() {
            out.extend(
                to.destination.as_ref().map(|d| (at.clone().key("route").index(j).key("destination"), d)),
            );
        }
        out.extend(route.mirror.as_ref().map(|d| (at.clone().key("mirror"), d)));
        for (j, mirror) in route.mirrors.iter().enumerate() {
            out.extend(
                mirror
                    .destination
                    .as_ref()
                    .map(|d| (at.clone().key("mirrors").index(j).key("destination"), d)),
            );
        }
    }
    let tls = service.tls.iter().map(|route| &route.route).enumerate().map(|(i, r)| ("tls", i, r));
    let tcp = service.tcp.iter().map(|route| &route.route).enumerate().map(|(i, r)| ("tcp", i, r));
    for (field, i, routes) in tls.chain(tcp) {
        for (j, to) in routes.iter().enumerate() {
            let path = Path::spec().key(field).index(i).key("route").index(j).key("destination");
            out.extend(to.destination.as_ref().map(|d| (path, d)));
        }
    }
    out
}

fn subset(cx: &mut About<'_, '_>, set: &Set<'_>, path: Path, destination: &Destination) {
    if destination.subset.is_empty() {
        return;
    }
    let host = full_host(&destination.host, &cx.object.namespace);
    let rules = set.rules_for(&host);
    if rules.iter().any(|(_, rule)| rule.subsets.iter().any(|s| s.name == destination.subset)) {
        return;
    }
    let message = match rules.first() {
        None => format!(
            "no DestinationRule for {host}, so no subset {}; requests to it fail with 503",
            destination.subset
        ),
        Some((object, _)) => {
            let known: Vec<&str> =
                rules.iter().flat_map(|(_, rule)| &rule.subsets).map(|s| s.name.as_str()).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            format!(
                "no subset {} in {}; it has: {known}; requests to it fail with 503",
                destination.subset,
                object.id()
            )
        }
    };
    cx.warn(path.key("subset"), message);
}

fn gateway_of(cx: &mut About<'_, '_>, set: &Set<'_>, path: Path, service: &VirtualService, gateway: &str) {
    let (namespace, name) = gateway.split_once('/').unwrap_or((cx.object.namespace.as_str(), gateway));
    let namespace = if namespace == "." { cx.object.namespace.as_str() } else { namespace };
    let Some(object) = set.named(Kind::Gateway, namespace, name) else {
        cx.warn(path, format!("no Gateway {namespace}/{name}; the routes have no effect there"));
        return;
    };
    let Spec::Gateway(found) = &*object.spec else { return };
    for (index, host) in service.hosts.iter().enumerate() {
        if !serves(found, namespace, &cx.object.namespace, host) {
            let path = Path::spec().key("hosts").index(index);
            cx.warn(
                path,
                format!("no server of {} has this host; the routes have no effect there", object.id()),
            );
        }
    }
}

/// Does a server of the gateway take this host from this namespace?
fn serves(gateway: &Gateway, own: &str, namespace: &str, host: &str) -> bool {
    gateway.servers.iter().flat_map(|server| &server.hosts).any(|served| {
        let (scope, name) = served.split_once('/').unwrap_or(("*", served));
        let allowed = scope == "*" || scope == namespace || scope == "." && own == namespace;
        allowed && (grammar::covers(name, host) || grammar::covers(host, name))
    })
}

fn delegate(cx: &mut About<'_, '_>, set: &Set<'_>, path: Path, route: &HttpRoute) {
    let Some(delegate) = &route.delegate else { return };
    let own = cx.object.namespace.clone();
    let namespace = if delegate.namespace.is_empty() { own.as_str() } else { delegate.namespace.as_str() };
    let Some(object) = set.named(Kind::VirtualService, namespace, &delegate.name) else {
        cx.warn(path, format!("no VirtualService {namespace}/{}; the route has no effect", delegate.name));
        return;
    };
    let Spec::VirtualService(found) = &*object.spec else { return };
    if !found.hosts.is_empty() {
        cx.push(Severity::Error, path, format!("{} has hosts; a delegate must have none", object.id()));
    } else if found.http.iter().any(|route| route.delegate.is_some()) {
        cx.push(Severity::Error, path, format!("{} delegates again; one level is possible", object.id()));
    }
}

/// Two VirtualServices for one host of sidecars: the older has it, nothing is merged.
fn shared_hosts(set: &Set<'_>, problems: &mut Vec<Problem>) {
    let mut owners: BTreeMap<String, Vec<(&Object, usize)>> = BTreeMap::new();
    for (object, service) in set.services() {
        if service.gateways.is_empty() || service.gateways.iter().any(|gateway| gateway == "mesh") {
            for (index, host) in service.hosts.iter().enumerate() {
                owners.entry(full_host(host, &object.namespace)).or_default().push((object, index));
            }
        }
    }
    for (host, mut objects) in owners {
        objects.sort_by_key(|(object, _)| (object.created, object.name.clone(), object.namespace.clone()));
        let Some(((first, _), others)) = objects.split_first() else { continue };
        for (object, index) in others.iter().filter(|(object, _)| visible_together(object, first)) {
            About { object, problems }.warn(
                Path::spec().key("hosts").index(*index),
                format!(
                    "{} has routes for {host} already and is older; these routes have no effect there",
                    first.id()
                ),
            );
        }
    }
}

fn visible_together(a: &Object, b: &Object) -> bool {
    let private = |object: &Object| {
        object.get::<VirtualService>().is_some_and(|service| {
            !service.export_to.is_empty() && service.export_to.iter().all(|namespace| namespace == ".")
        })
    };
    a.namespace == b.namespace || !private(a) && !private(b)
}

/// One host whose port speaks two protocols.
fn shared_ports(set: &Set<'_>, problems: &mut Vec<Problem>) {
    let mut seen: BTreeMap<(String, u16), (&Object, String)> = BTreeMap::new();
    for object in set.objects {
        let Spec::ServiceEntry(entry) = &*object.spec else { continue };
        for host in &entry.hosts {
            for (index, port) in entry.ports.iter().enumerate() {
                let protocol = port.protocol.to_ascii_uppercase();
                let key = (host.to_ascii_lowercase(), port.number);
                let (first, other) = seen.entry(key).or_insert_with(|| (object, protocol.clone()));
                if *other != protocol && first.id() != object.id() {
                    let message = format!("{} has {other} on port {} of {host}", first.id(), port.number);
                    let path = Path::spec().key("ports").index(index).key("protocol");
                    About { object, problems }.warn(path, message);
                }
            }
        }
    }
}

/// Subsets of one name that select different endpoints; the first definition has it.
fn conflicting_subsets(set: &Set<'_>, problems: &mut Vec<Problem>) {
    type Definition<'a> = (&'a Object, &'a BTreeMap<String, String>);
    let mut seen: BTreeMap<(String, String, String), Definition<'_>> = BTreeMap::new();
    let mut rules: Vec<(&Object, &DestinationRule)> = set.rules().collect();
    rules.sort_by_key(|(object, _)| (object.created, object.name.clone()));
    for (object, rule) in rules.into_iter().filter(|(_, rule)| rule.workload_selector.is_none()) {
        for (index, subset) in rule.subsets.iter().enumerate() {
            let key =
                (object.namespace.clone(), full_host(&rule.host, &object.namespace), subset.name.clone());
            let (first, labels) = seen.entry(key).or_insert((object, &subset.labels));
            if first.id() != object.id() && *labels != &subset.labels {
                let path = Path(vec![
                    Segment::Key("spec".into()),
                    Segment::Key("subsets".into()),
                    Segment::Index(index),
                ]);
                let message = format!(
                    "{} has a subset {} with other labels; this one has no effect",
                    first.id(),
                    subset.name
                );
                About { object, problems }.warn(path, message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Objects that are wrong with one another in every way there is.
    const OBJECTS: &str = r#"
- {kind: VirtualService, metadata: {name: a}, spec: {hosts: [web], http: [{route: [{destination: {host: web, subset: v1}}]}]}}
- {kind: VirtualService, metadata: {name: b}, spec: {hosts: [web], gateways: [mesh, edge], http: [{delegate: {name: a}}]}}
- {kind: VirtualService, metadata: {name: c}, spec: {hosts: [shop.example], gateways: [edge, none], http: [{delegate: {name: d}}]}}
- {kind: VirtualService, metadata: {name: d}, spec: {http: [{route: [{destination: {host: web, subset: v9}}]}]}}
- {kind: DestinationRule, metadata: {name: a}, spec: {host: web, subsets: [{name: v1, labels: {version: v1}}]}}
- {kind: DestinationRule, metadata: {name: b}, spec: {host: web, subsets: [{name: v1, labels: {version: v2}}]}}
- {kind: Gateway, metadata: {name: edge}, spec: {servers: [{hosts: [other.example], port: {number: 80, name: http, protocol: HTTP}}]}}
- {kind: ServiceEntry, metadata: {name: a}, spec: {hosts: [a.example], ports: [{number: 80, name: x, protocol: HTTP}]}}
- {kind: ServiceEntry, metadata: {name: b}, spec: {hosts: [A.example, b.example], ports: [{number: 80, name: x, protocol: TCP}]}}
- {kind: ServiceEntry, metadata: {name: c}, spec: {hosts: [b.example], ports: [{number: 80, name: x, protocol: HTTP}]}}
- {kind: Sidecar, metadata: {name: a}, spec: {egress: [{hosts: ["*/*"]}]}}
- {kind: Sidecar, metadata: {name: b}, spec: {egress: [{hosts: ["./*"]}]}}
- {kind: PeerAuthentication, metadata: {name: a}, spec: {mtls: {mode: STRICT}}}
- {kind: PeerAuthentication, metadata: {name: b}, spec: {mtls: {mode: PERMISSIVE}}}
- {kind: PeerAuthentication, metadata: {name: c, namespace: root}, spec: {selector: {matchLabels: {app: web}}}}
- {kind: Telemetry, metadata: {name: a}, spec: {tracing: [{providers: [{name: nobody}]}]}}
- {kind: Telemetry, metadata: {name: b}, spec: {tracing: [{providers: [{name: zipkin}]}]}}
- {kind: AuthorizationPolicy, metadata: {name: a}, spec: {action: CUSTOM, provider: {name: nobody}}}
- {kind: MeshConfig, metadata: {name: mesh}, spec: {rootNamespace: root, extensionProviders: [{name: zipkin, zipkin: {service: z, port: 1}}]}}
"#;

    fn objects() -> Vec<Object> {
        let json = crate::config::yaml::read(OBJECTS).0.remove(0).to_json();
        let objects = json.as_array().unwrap().iter().map(|object| Object::from_stored(object).unwrap());
        objects.collect()
    }

    fn told(all: &[&Object], of: &[&Object]) -> Vec<Problem> {
        let ours: Vec<String> = of.iter().map(|object| object.id()).collect();
        validate_set(all).into_iter().filter(|problem| ours.contains(&problem.object)).collect()
    }

    #[test]
    fn what_is_said_of_a_change_depends_on_nothing_but_what_is_related_to_it() {
        let objects = objects();
        let mut problems = BTreeSet::new();
        for (i, first) in objects.iter().enumerate() {
            for second in objects.iter().skip(i) {
                let changed: BTreeMap<String, &Object> = [first, second].map(|o| (o.id(), o)).into();
                let changed: Vec<&Object> = changed.into_values().collect();
                let kept = || objects.iter().filter(|object| !changed.contains(object));
                let related = Related::to(&changed);
                let kinds: Vec<Kind> = related.kinds().collect();
                let some = kept().filter(|o| kinds.contains(&o.kind) && related.concern(o));
                let some: Vec<&Object> = some.chain(changed.iter().copied()).collect();
                let all: Vec<&Object> = kept().chain(changed.iter().copied()).collect();
                let expected = told(&all, &changed);
                assert_eq!(told(&some, &changed), expected, "{changed:?}");
                problems.extend(expected.into_iter().map(|problem| problem.object));
            }
        }
        assert!(problems.len() > 10, "there is something to be found: {problems:?}");
    }
}
