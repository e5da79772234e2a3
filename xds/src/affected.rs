//! Whom a change concerns, and how much of what they hold.
//!
//! [`Impact::of`] looks at the change once; [`Impact::on`] is asked for every proxy and must stay cheap. Both are
//! pure. They may say too much (the translation then finds that nothing differs and nothing is sent), never too
//! little.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use registry::config::{Kind, Object, Spec};
use registry::model::service::{Hostname, Resolution, Service};
use registry::snapshot::{Candidate, Snapshot};
use registry::state::{Changes, ObjectKey};

use crate::proxy::Proxy;

/// What has to be translated anew for one proxy. Ordered: the greater includes the smaller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Affected {
    /// Nothing.
    #[default]
    Nothing,
    /// The endpoints of these hosts, and nothing else.
    Endpoints(BTreeSet<Hostname>),
    /// Everything.
    Full,
}

impl Affected {
    /// Both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Full, _) | (_, Self::Full) => Self::Full,
            (Self::Nothing, other) => other,
            (this, Self::Nothing) => this,
            (Self::Endpoints(mut hosts), Self::Endpoints(more)) => {
                hosts.extend(more);
                Self::Endpoints(hosts)
            }
        }
    }
}

/// Namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Scope {
    everywhere: bool,
    namespaces: BTreeSet<String>,
}

impl Scope {
    fn has(&self, namespace: &str) -> bool {
        self.everywhere || self.namespaces.contains(namespace)
    }

    /// Adds the namespaces that something in `namespace` is exported to; an empty list is the default: all.
    fn export(&mut self, namespace: &str, export_to: &[String]) {
        self.everywhere |= export_to.is_empty();
        for to in export_to {
            match to.as_str() {
                "*" => self.everywhere = true,
                "." => _ = self.namespaces.insert(namespace.to_owned()),
                "~" => {}
                name => _ = self.namespaces.insert(name.to_owned()),
            }
        }
    }
}

/// What changed about one host.
#[derive(Debug, Clone, Default)]
struct HostImpact {
    /// Its clusters are what they were: endpoints can be pushed alone.
    endpoints_only: bool,
    /// Who sees it, or saw it.
    seen: Scope,
    /// Addresses of its endpoints, before and after: for their proxies it is an inbound service.
    addresses: BTreeSet<String>,
}

/// A change, as far as proxies can be concerned by it.
#[derive(Debug, Clone, Default)]
pub struct Impact {
    full: Scope,
    hosts: BTreeMap<Hostname, HostImpact>,
}

impl Impact {
    /// What `changes` mean, which led from `old` to `new`.
    #[must_use]
    pub fn of(changes: &Changes, old: &Snapshot, new: &Snapshot) -> Self {
        let mut impact = Self::default();
        impact.full.everywhere = changes.mesh;
        for key in &changes.objects {
            let versions = [old, new].map(|snapshot| snapshot.object(key));
            impact.add_object(key, versions, new.root_namespace());
        }
        for host in &changes.hosts {
            impact.hosts.insert(host.clone(), HostImpact::of(host, old, new));
        }
        impact
    }

    /// What it means for this proxy, which has endpoints of `hosts`.
    #[must_use]
    pub fn on(&self, proxy: &Proxy, hosts: &BTreeSet<Hostname>) -> Affected {
        if self.full.has(&proxy.namespace) {
            return Affected::Full;
        }
        let own: Vec<String> = match self.hosts.is_empty() {
            true => Vec::new(),
            false => proxy.addresses.iter().map(ToString::to_string).collect(),
        };
        let mut endpoints = BTreeSet::new();
        for (host, impact) in &self.hosts {
            let inbound = own.iter().any(|address| impact.addresses.contains(address));
            if inbound || (!impact.endpoints_only && impact.seen.has(&proxy.namespace)) {
                return Affected::Full;
            }
            if impact.endpoints_only && hosts.contains(host) {
                endpoints.insert(host.clone());
            }
        }
        if endpoints.is_empty() { Affected::Nothing } else { Affected::Endpoints(endpoints) }
    }

    fn add_object(&mut self, key: &ObjectKey, versions: [Option<&Arc<Object>>; 2], root: &str) {
        match key.kind {
            // What they declare is in the hosts that changed; groups are templates.
            Kind::ServiceEntry | Kind::WorkloadEntry | Kind::WorkloadGroup => {}
            // Clients follow the servers' mode, wherever they are.
            Kind::PeerAuthentication | Kind::Gateway | Kind::MeshConfig => self.full.everywhere = true,
            Kind::VirtualService | Kind::DestinationRule => {
                for object in versions.into_iter().flatten() {
                    self.full.export(&key.namespace, exported_to(object));
                }
            }
            Kind::Sidecar
            | Kind::RequestAuthentication
            | Kind::AuthorizationPolicy
            | Kind::Telemetry
            | Kind::EnvoyFilter
            | Kind::ProxyConfig
            | Kind::WasmPlugin
            | Kind::TrafficExtension => {
                self.full.everywhere |= key.namespace == root;
                self.full.namespaces.insert(key.namespace.clone());
            }
        }
    }
}

/// To which namespaces an object says it is exported. A delegate concerns whoever sees the route that names it.
fn exported_to(object: &Object) -> &[String] {
    #[expect(clippy::wildcard_enum_match_arm, reason = "only these kinds have an export and come here")]
    match object.spec.as_ref() {
        Spec::VirtualService(spec) if !spec.hosts.is_empty() => &spec.export_to,
        Spec::DestinationRule(spec) => &spec.export_to,
        _ => &[],
    }
}

impl HostImpact {
    fn of(host: &str, old: &Snapshot, new: &Snapshot) -> Self {
        let candidates = || old.candidates(host).iter().chain(new.candidates(host));
        let mut impact = Self { endpoints_only: new.same_service(old, host), ..Self::default() };
        for Candidate { service, endpoints, .. } in candidates() {
            impact.endpoints_only &= has_endpoints_of_its_own(service);
            impact.seen.export(&service.namespace, &service.export_to);
            impact.addresses.extend(endpoints.iter().map(|endpoint| endpoint.address.clone()));
        }
        impact
    }
}

/// Whether its clusters get their endpoints from EDS. Those of DNS services are part of the cluster.
fn has_endpoints_of_its_own(service: &Service) -> bool {
    match service.resolution {
        Resolution::Static => true,
        Resolution::None | Resolution::Dns | Resolution::DnsRoundRobin | Resolution::DynamicDns => false,
    }
}
