//! The mesh at one revision, as the rest of the control plane reads it.
//!
//! A [`Snapshot`] never changes. [`Snapshot::next`] makes the one after it and shares everything that the
//! [`Changes`] do not touch, so its cost follows the change and not the mesh. All answers are in a fixed order: services
//! and objects oldest first, then by name, then by namespace; nothing depends on the order of arrival.

mod delegate;
mod destination;
pub mod host_match;
mod inbound;
mod policy;
mod routing;
mod scope;
mod scoped;
mod services;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ca::identity::TrustDomain;
use serde_json::Value;

use self::destination::DestinationRules;
use self::routing::Routing;
use self::scoped::Collection;
use self::services::Services;
use crate::chunks::Chunks;
use crate::config::{Kind, Object, Spec};
use crate::merge::declare::Labels;
use crate::merge::{self, Settings};
use crate::model::extension::{EnvoyFilter, ProxyConfigResource, TrafficExtension, WasmPlugin};
use crate::model::mesh::MeshConfig;
use crate::model::security::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication};
use crate::model::service::{Endpoint, Service, ServicePort};
use crate::model::telemetry::Telemetry;
use crate::model::traffic::{Gateway, Sidecar, VirtualService};
use crate::state::history::History;
use crate::state::{Changes, ObjectKey, Revision, State, WorkloadKey};

pub use self::destination::MergedDestinationRule;
pub use self::policy::PeerPolicy;
pub use self::routing::MESH_GATEWAY;
pub use self::scoped::Typed;
pub use crate::merge::{Candidate, Conflict, Workload};

/// The mesh at one revision.
#[derive(Debug, Clone)]
pub struct Snapshot {
    revision: Revision,
    mesh: Arc<MeshConfig>,
    settings: Arc<Settings>,
    issued: Option<Arc<str>>,
    objects: Chunks<ObjectKey, Arc<Object>>,
    history: History,
    services: Services,
    workloads: Chunks<WorkloadKey, Arc<Workload>>,
    workload_addresses: Chunks<(String, WorkloadKey), ()>,
    routing: Routing,
    destination_rules: DestinationRules,
    sidecars: Collection<Sidecar>,
    gateways: Collection<Gateway>,
    peer_authentications: Collection<PeerAuthentication>,
    request_authentications: Collection<RequestAuthentication>,
    authorization_policies: Collection<AuthorizationPolicy>,
    telemetries: Collection<Telemetry>,
    envoy_filters: Collection<EnvoyFilter>,
    proxy_configs: Collection<ProxyConfigResource>,
    wasm_plugins: Collection<WasmPlugin>,
    traffic_extensions: Collection<TrafficExtension>,
}

impl Default for Snapshot {
    /// The empty mesh, before any revision.
    fn default() -> Self {
        Self::build(&State::default())
    }
}

impl Snapshot {
    /// The snapshot of `state` from scratch, of a mesh whose trust domain is what its settings say.
    #[must_use]
    pub fn build(state: &State) -> Self {
        Self::build_in(None, state)
    }

    /// The snapshot of `state` from scratch, of a mesh whose authority issues identities of `trust_domain`: those are
    /// what workloads have, whatever the settings say.
    #[must_use]
    pub fn build_issued(trust_domain: &TrustDomain, state: &State) -> Self {
        Self::build_in(Some(trust_domain.as_str().into()), state)
    }

    /// The snapshot of `state` from scratch, of the same mesh as this one.
    #[must_use]
    pub fn rebuild(&self, state: &State) -> Self {
        Self::build_in(self.issued.clone(), state)
    }

    fn build_in(issued: Option<Arc<str>>, state: &State) -> Self {
        let mesh = mesh_config(state);
        let settings = Arc::new(settings(&mesh, issued.as_deref()));
        let mut snapshot = Self {
            revision: state.revision(),
            objects: state.objects().map(|(key, object)| (key.clone(), Arc::clone(object))).collect(),
            history: state.history().clone(),
            services: Services::default(),
            workloads: Chunks::default(),
            workload_addresses: Chunks::default(),
            routing: Routing::build(state, &settings),
            destination_rules: DestinationRules::build(state, &settings),
            sidecars: Collection::build(state),
            gateways: Collection::build(state),
            peer_authentications: Collection::build(state),
            request_authentications: Collection::build(state),
            authorization_policies: Collection::build(state),
            telemetries: Collection::build(state),
            envoy_filters: Collection::build(state),
            proxy_configs: Collection::build(state),
            wasm_plugins: Collection::build(state),
            traffic_extensions: Collection::build(state),
            mesh,
            settings,
            issued,
        };
        for host in state.hosts() {
            let merged = merge::host(state, &snapshot.settings, host);
            snapshot.services.set(host, merged);
        }
        let entries = state.objects_of(Kind::WorkloadEntry).map(|(key, _)| workload_key(key));
        let keys: BTreeSet<_> = entries.chain(state.workloads().map(|(key, _)| key.clone())).collect();
        for key in keys {
            snapshot.set_workload(state, &key);
        }
        snapshot
    }

    /// The snapshot after `changes`, which led from the state of `previous` to `state`.
    #[must_use]
    pub fn next(previous: &Arc<Self>, state: &State, changes: &Changes) -> Self {
        let touches_mesh = changes.objects.iter().any(|key| key.kind == Kind::MeshConfig);
        if changes.mesh || touches_mesh {
            return previous.rebuild(state);
        }
        let mut next = Self::clone(previous);
        next.revision = state.revision();
        if changes.is_empty() {
            next.history = state.history().clone();
            return next;
        }
        next.history = state.history().clone();
        for host in &changes.hosts {
            next.services.set(host, merge::host(state, &next.settings, host));
        }
        for key in &changes.workloads {
            next.set_workload(state, key);
        }
        next.update_objects(state, &changes.objects);
        next
    }

    fn update_objects(&mut self, state: &State, changed: &BTreeSet<ObjectKey>) {
        let mut by_kind: BTreeMap<Kind, BTreeSet<ObjectKey>> = BTreeMap::new();
        for key in changed {
            match state.object(key) {
                Some(object) => self.objects.insert(key.clone(), Arc::clone(object)),
                None => drop(self.objects.remove(key)),
            }
            by_kind.entry(key.kind).or_default().insert(key.clone());
        }
        for (kind, keys) in by_kind {
            let namespaces: BTreeSet<String> = keys.iter().map(|key| key.namespace.clone()).collect();
            match kind {
                Kind::VirtualService => self.routing.update(state, &self.settings, &keys),
                Kind::DestinationRule => self.destination_rules.update(state, &self.settings, &namespaces),
                Kind::WorkloadEntry => {
                    keys.iter().for_each(|key| self.set_workload(state, &workload_key(key)))
                }
                Kind::Sidecar => self.sidecars.update(state, &namespaces),
                Kind::Gateway => self.gateways.update(state, &namespaces),
                Kind::PeerAuthentication => self.peer_authentications.update(state, &namespaces),
                Kind::RequestAuthentication => self.request_authentications.update(state, &namespaces),
                Kind::AuthorizationPolicy => self.authorization_policies.update(state, &namespaces),
                Kind::Telemetry => self.telemetries.update(state, &namespaces),
                Kind::EnvoyFilter => self.envoy_filters.update(state, &namespaces),
                Kind::ProxyConfig => self.proxy_configs.update(state, &namespaces),
                Kind::WasmPlugin => self.wasm_plugins.update(state, &namespaces),
                Kind::TrafficExtension => self.traffic_extensions.update(state, &namespaces),
                // Their hosts are in the changes; groups are read as objects; mesh settings rebuild everything.
                Kind::ServiceEntry | Kind::WorkloadGroup | Kind::MeshConfig => {}
            }
        }
    }

    fn set_workload(&mut self, state: &State, key: &WorkloadKey) {
        let object =
            ObjectKey { kind: Kind::WorkloadEntry, namespace: key.namespace.clone(), name: key.name.clone() };
        let registration = state.workload(key);
        let workload = match state.object(&object) {
            Some(object) => merge::workload_of_entry(object, registration),
            None => registration.map(merge::workload_of_registration),
        };
        if let Some(old) = self.workloads.remove(key) {
            self.workload_addresses.remove(&(old.address.clone(), key.clone()));
        }
        if let Some(workload) = workload {
            self.workload_addresses.insert((workload.address.clone(), key.clone()), ());
            self.workloads.insert(key.clone(), Arc::new(workload));
        }
    }
}

/// Readers.
impl Snapshot {
    /// The index of the log entry that made it.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The mesh-wide settings.
    #[must_use]
    pub fn mesh(&self) -> &Arc<MeshConfig> {
        &self.mesh
    }

    /// What merging and visibility take from the mesh-wide settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Trust domain of the identities.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.settings.trust_domain
    }

    /// Namespace whose configuration holds for the whole mesh.
    #[must_use]
    pub fn root_namespace(&self) -> &str {
        &self.settings.root_namespace
    }

    /// Domain of the mesh's own hosts.
    #[must_use]
    pub fn domain_suffix(&self) -> &str {
        &self.settings.domain_suffix
    }

    /// One object.
    #[must_use]
    pub fn object(&self, key: &ObjectKey) -> Option<&Arc<Object>> {
        self.objects.get(key)
    }

    /// All objects, by kind, namespace and name.
    pub fn objects(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.objects.iter().map(|(_, object)| object)
    }

    /// The objects of one kind, by namespace and name.
    pub fn objects_of(&self, kind: Kind) -> impl Iterator<Item = &Arc<Object>> {
        let first = ObjectKey { kind, namespace: String::new(), name: String::new() };
        let from = self.objects.iter_from(&first);
        from.take_while(move |(key, _)| key.kind == kind).map(|(_, object)| object)
    }

    /// The configuration changes that are remembered, oldest first.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The best service of every host, by host.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.hosts().filter_map(|(_, host)| host.candidates.first()).map(|best| &best.service)
    }

    /// The namespaces that have an object, a service or a workload, in order.
    #[must_use]
    pub fn namespaces(&self) -> BTreeSet<&str> {
        let objects = self.objects.iter().map(|(key, _)| key.namespace.as_str());
        let candidates = self.services.hosts().flat_map(|(_, host)| &host.candidates);
        let services = candidates.map(|candidate| candidate.service.namespace.as_str());
        let workloads = self.workloads.iter().map(|(key, _)| key.namespace.as_str());
        objects.chain(services).chain(workloads).collect()
    }

    /// How many hosts there are.
    #[must_use]
    pub fn host_count(&self) -> usize {
        self.services.len()
    }

    /// What `host` stands for, to a client of `namespace`: its own namespace's service, else the best that it sees.
    /// Without a namespace: the best of all.
    #[must_use]
    pub fn service(&self, host: &str, namespace: Option<&str>) -> Option<&Arc<Service>> {
        self.candidate(host, namespace).map(|candidate| &candidate.service)
    }

    /// Like [`service`](Self::service), with its endpoints and identities.
    #[must_use]
    pub fn candidate(&self, host: &str, namespace: Option<&str>) -> Option<&Candidate> {
        self.services.candidate(host, namespace)
    }

    /// All services that `host` stands for, best first; each belongs to another namespace.
    #[must_use]
    pub fn candidates(&self, host: &str) -> &[Candidate] {
        self.services.get(host).map_or(&[], |host| &host.candidates)
    }

    /// The endpoints of the best service of `host`; none when it is unknown.
    #[must_use]
    pub fn endpoints(&self, host: &str) -> &Arc<[Endpoint]> {
        self.services.endpoints(host)
    }

    /// The endpoints of this service, which came out of this snapshot.
    #[must_use]
    pub fn endpoints_of(&self, service: &Service) -> &Arc<[Endpoint]> {
        self.services.endpoints_of(service)
    }

    /// SPIFFE ids of which a server of the best service of `host` must have one.
    #[must_use]
    pub fn identities(&self, host: &str) -> &BTreeSet<String> {
        self.services.identities(host)
    }

    /// SPIFFE ids of which a server of this service must have one.
    #[must_use]
    pub fn identities_of(&self, service: &Service) -> &BTreeSet<String> {
        self.services.identities_of(service)
    }

    /// Declarations of hosts that have no effect, by host.
    pub fn conflicts(&self) -> impl Iterator<Item = &Conflict> {
        self.services.hosts().flat_map(|(_, host)| &host.conflicts)
    }

    /// A client's cluster of `host` is the same as in `previous`: only endpoints may differ.
    #[must_use]
    pub fn same_service(&self, previous: &Self, host: &str) -> bool {
        self.services.same_service(&previous.services, host)
    }

    /// The services exported to `namespace`, oldest first; one per host.
    #[must_use]
    pub fn visible_services(&self, namespace: &str) -> Vec<Arc<Service>> {
        self.services.visible(namespace).cloned().collect()
    }

    /// The services that a workload's proxy is told of: those exported to its namespace that its Sidecar's egress
    /// names, and the destinations of the routes it imports; oldest first. A listener of a Sidecar with a port takes
    /// that port of a service only.
    #[must_use]
    pub fn services_for(&self, namespace: &str, labels: &Labels) -> Vec<Arc<Service>> {
        scope::services(self, namespace, labels)
    }

    /// The Sidecar object that holds for a workload: one that selects it, else the namespace's, else the root's.
    #[must_use]
    pub fn sidecar_for(&self, namespace: &str, labels: &Labels) -> Option<&Typed<Sidecar>> {
        scope::sidecar(self, namespace, labels)
    }

    /// The VirtualServices of a gateway (`mesh` or `namespace/name`) that a client of `namespace` sees, with hosts,
    /// gateways and destinations resolved and delegates merged. The first that names a host owns it on the mesh.
    #[must_use]
    pub fn virtual_services_for(&self, namespace: &str, gateway: &str) -> Vec<Typed<VirtualService>> {
        self.routing.visible(namespace, gateway)
    }

    /// Like [`virtual_services_for`](Self::virtual_services_for) `mesh`, without those that the workload's Sidecar does
    /// not import.
    #[must_use]
    pub fn virtual_services_in_scope(&self, namespace: &str, labels: &Labels) -> Vec<Typed<VirtualService>> {
        scope::virtual_services(self, namespace, labels)
    }

    /// The rule that calls of a workload to `host` follow.
    #[must_use]
    pub fn destination_rule(
        &self,
        client_namespace: &str,
        client_labels: &Labels,
        host: &str,
    ) -> Option<Arc<MergedDestinationRule>> {
        let service = self.service(host, Some(client_namespace)).map(|service| service.namespace.as_str());
        self.destination_rules.find(&self.settings, (client_namespace, client_labels), host, service)
    }

    /// Which connections a workload accepts.
    #[must_use]
    pub fn peer_authentication(&self, namespace: &str, labels: &Labels) -> PeerPolicy {
        policy::peer(&self.peer_authentications, self.root_namespace(), namespace, labels)
    }

    /// The policies that hold for a workload: those of the root namespace first, each namespace's oldest first.
    #[must_use]
    pub fn authorization_policies(
        &self,
        namespace: &str,
        labels: &Labels,
    ) -> Vec<Typed<AuthorizationPolicy>> {
        self.authorization_policies.selecting(self.root_namespace(), namespace, labels)
    }

    /// The token rules that hold for a workload, all together; the root namespace's first.
    #[must_use]
    pub fn request_authentications(
        &self,
        namespace: &str,
        labels: &Labels,
    ) -> Vec<Typed<RequestAuthentication>> {
        self.request_authentications.selecting(self.root_namespace(), namespace, labels)
    }

    /// At most three: the mesh's, the namespace's, the workload's; a later one overrides.
    #[must_use]
    pub fn telemetries(&self, namespace: &str, labels: &Labels) -> Vec<Typed<Telemetry>> {
        self.telemetries.layers(self.root_namespace(), namespace, labels)
    }

    /// At most three: the mesh's, the namespace's, the workload's; a later one overrides.
    #[must_use]
    pub fn proxy_configs(&self, namespace: &str, labels: &Labels) -> Vec<Typed<ProxyConfigResource>> {
        self.proxy_configs.layers(self.root_namespace(), namespace, labels)
    }

    /// The patches for a workload, in the order in which they are applied.
    #[must_use]
    pub fn envoy_filters(&self, namespace: &str, labels: &Labels) -> Vec<Typed<EnvoyFilter>> {
        let mut filters = self.envoy_filters.selecting(self.root_namespace(), namespace, labels);
        filters.sort_by_key(|(_, filter)| filter.priority); // stable: root first, then oldest
        filters
    }

    /// The Wasm plugins for a workload; the root namespace's first.
    #[must_use]
    pub fn wasm_plugins(&self, namespace: &str, labels: &Labels) -> Vec<Typed<WasmPlugin>> {
        self.wasm_plugins.selecting(self.root_namespace(), namespace, labels)
    }

    /// The extensions for a workload; the root namespace's first.
    #[must_use]
    pub fn traffic_extensions(&self, namespace: &str, labels: &Labels) -> Vec<Typed<TrafficExtension>> {
        self.traffic_extensions.selecting(self.root_namespace(), namespace, labels)
    }

    /// The Gateways that select a workload, of any namespace, oldest first.
    #[must_use]
    pub fn gateways_for(&self, labels: &Labels) -> Vec<Typed<Gateway>> {
        let selecting = self.gateways.iter().filter(|(_, gateway)| scoped::selects(&**gateway, labels));
        let mut gateways: Vec<_> = selecting.cloned().collect();
        gateways.sort_by(|a, b| scoped::age(&a.0).cmp(&scoped::age(&b.0)));
        gateways
    }

    /// The ports that a workload serves: every port of a service of its namespace with an endpoint at one of its
    /// addresses, and the port of the workload behind it. By service, oldest first.
    #[must_use]
    pub fn inbound_services(
        &self,
        namespace: &str,
        addresses: &[IpAddr],
        labels: &Labels,
    ) -> Vec<(Arc<Service>, ServicePort, u16)> {
        inbound::services(&self.services, namespace, addresses, labels)
    }

    /// All workloads outside platforms, by namespace and name.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|(_, workload)| workload)
    }

    /// One workload outside platforms.
    #[must_use]
    pub fn workload(&self, key: &WorkloadKey) -> Option<&Arc<Workload>> {
        self.workloads.get(key)
    }

    /// The workload at this address; the first by namespace and name when there are several.
    #[must_use]
    pub fn workload_by_address(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        let address = address.to_string();
        let first = WorkloadKey { namespace: String::new(), name: String::new() };
        let ((found, key), ()) = self.workload_addresses.iter_from(&(address.clone(), first)).next()?;
        (*found == address).then(|| self.workloads.get(key)).flatten()
    }
}

/// The settings in force: the oldest `MeshConfig` object, else those set by command, else Istio's defaults.
fn mesh_config(state: &State) -> Arc<MeshConfig> {
    let objects = state.objects_of(Kind::MeshConfig).map(|(_, object)| Arc::clone(object));
    let oldest = objects.min_by(|a, b| scoped::age(a).cmp(&scoped::age(b)));
    let by_command = || {
        let raw = Value::clone(state.mesh()?);
        Some(Arc::new(Object::new(Kind::MeshConfig, "", "", raw)))
    };
    let object = oldest.or_else(by_command);
    let Some(Spec::MeshConfig(mesh)) = object.as_ref().map(|object| &*object.spec) else {
        return Arc::default();
    };
    Arc::new(MeshConfig::clone(mesh))
}

fn settings(mesh: &MeshConfig, issued: Option<&str>) -> Settings {
    Settings {
        trust_domain: issued.unwrap_or_else(|| mesh.trust_domain()).to_owned(),
        trust_domain_aliases: mesh.trust_domain_aliases.clone(),
        root_namespace: mesh.root_namespace().to_owned(),
        service_export_to: mesh.service_export_to(),
        virtual_service_export_to: mesh.virtual_service_export_to(),
        destination_rule_export_to: mesh.destination_rule_export_to(),
        ..Settings::default()
    }
}

fn workload_key(key: &ObjectKey) -> WorkloadKey {
    WorkloadKey { namespace: key.namespace.clone(), name: key.name.clone() }
}
