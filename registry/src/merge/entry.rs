//! Services and endpoints out of `ServiceEntry`, `WorkloadEntry` and registered workloads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::declare::{self, Labels};
use super::{Conflict, DEFAULT_CLUSTER, Declaration, Family, Settings};
use crate::config::{Kind, Object};
use crate::model::service::{
    Endpoint, Health, Locality, Location, Protocol, Resolution, Service, ServicePort, SourceId, TlsMode,
};
use crate::model::traffic::{Port, ServiceEntry, ServiceEntryLocation, ServiceEntryResolution};
use crate::model::workload::WorkloadEntry;
use crate::state::{ObjectKey, Registration, State, WorkloadKey};

/// Overrides whether an endpoint speaks mTLS.
const TLS_MODE_LABEL: &str = "security.istio.io/tlsMode";
/// Overrides the locality; parts are separated by dots, for labels cannot hold slashes.
const LOCALITY_LABEL: &str = "istio-locality";
/// Network of a workload that names none itself.
const NETWORK_LABEL: &str = "topology.istio.io/network";
/// On a workload that finishes what it has.
const DRAINING_LABEL: &str = "istio.io/draining";
/// Name of the workload, for telemetry.
const WORKLOAD_NAME_LABEL: &str = "service.istio.io/workload-name";

/// A workload outside any platform: an entry of the configuration, or one that its agent registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Namespace and name of its entry.
    pub key: WorkloadKey,
    /// IP address, DNS name, or `unix:///path`.
    pub address: String,
    /// Service port name to port of the workload.
    pub ports: BTreeMap<String, u16>,
    /// Labels, which selectors match on.
    pub labels: Labels,
    /// Network; empty is the default one.
    pub network: String,
    /// Where it runs.
    pub locality: Locality,
    /// Load-balancing weight, 1 or more.
    pub weight: u32,
    /// Service account; empty when it has none.
    pub service_account: String,
    /// Cluster id.
    pub cluster: String,
    /// mTLS or not.
    pub tls_mode: TlsMode,
    /// May it be sent traffic.
    pub health: Health,
    /// The agent's registration, if there is one.
    pub registration: Option<Arc<Registration>>,
}

/// The workloads of a namespace, by name. An entry of the configuration outranks a registration of the same name,
/// which then tells its health.
#[must_use]
pub fn workloads(state: &State, namespace: &str) -> BTreeMap<WorkloadKey, Workload> {
    let registered = state.workloads_in(namespace).map(|(key, r)| (key.clone(), workload_of_registration(r)));
    let mut all: BTreeMap<_, _> = registered.collect();
    for (key, object) in state.objects_in(Kind::WorkloadEntry, namespace) {
        let key = WorkloadKey { namespace: key.namespace.clone(), name: key.name.clone() };
        let registration = state.workload(&key);
        if let Some(workload) = workload_of_entry(object, registration) {
            all.insert(key, workload);
        }
    }
    all
}

/// The workload that a `WorkloadEntry` object describes; `registration` is that of the same name, if there is one.
#[must_use]
pub fn workload_of_entry(object: &Object, registration: Option<&Arc<Registration>>) -> Option<Workload> {
    let entry = declare::workload_entry(object)?;
    let labels = declare::workload_labels(object)?;
    let healthy = registration.is_none_or(|registration| registration.serves());
    Some(Workload {
        key: WorkloadKey { namespace: object.namespace.clone(), name: object.name.clone() },
        address: entry.address.clone(),
        ports: entry.ports.clone(),
        network: network(&entry.network, &labels),
        locality: locality(&entry.locality, &labels),
        weight: entry.weight.max(1),
        service_account: entry.service_account.clone(),
        cluster: registration.map_or(DEFAULT_CLUSTER, |r| cluster(&r.cluster)).to_owned(),
        tls_mode: tls_mode(&labels, &entry.service_account),
        health: health(&labels, healthy),
        labels,
        registration: registration.cloned(),
    })
}

/// The workload that an agent registered.
#[must_use]
pub fn workload_of_registration(r: &Arc<Registration>) -> Workload {
    let declared = r.locality.to_string();
    Workload {
        key: r.key(),
        address: r.address.clone(),
        ports: r.ports.clone(),
        labels: r.labels.clone(),
        network: network(&r.network, &r.labels),
        locality: if declared.is_empty() { locality("", &r.labels) } else { r.locality.clone() },
        weight: r.weight.max(1),
        service_account: r.service_account.clone(),
        cluster: cluster(&r.cluster).to_owned(),
        tls_mode: tls_mode(&r.labels, &r.service_account),
        health: health(&r.labels, r.serves()),
        registration: Some(Arc::clone(r)),
    }
}

fn cluster(told: &str) -> &str {
    if told.is_empty() { DEFAULT_CLUSTER } else { told }
}

fn locality(declared: &str, labels: &Labels) -> Locality {
    if !declared.is_empty() {
        return Locality::parse(declared);
    }
    labels.get(LOCALITY_LABEL).map(|text| Locality::parse(&text.replace('.', "/"))).unwrap_or_default()
}

fn network(declared: &str, labels: &Labels) -> String {
    let labelled = || labels.get(NETWORK_LABEL).cloned().unwrap_or_default();
    if declared.is_empty() { labelled() } else { declared.to_owned() }
}

fn tls_mode(labels: &Labels, service_account: &str) -> TlsMode {
    match labels.get(TLS_MODE_LABEL).map(String::as_str) {
        Some("istio") => TlsMode::Istio,
        Some(_) => TlsMode::Disabled,
        None if service_account.is_empty() => TlsMode::Disabled,
        None => TlsMode::Istio,
    }
}

fn health(labels: &Labels, healthy: bool) -> Health {
    match (healthy, labels.contains_key(DRAINING_LABEL)) {
        (false, _) => Health::Unhealthy,
        (true, true) => Health::Draining,
        (true, false) => Health::Healthy,
    }
}

/// What the `ServiceEntry` objects say about `host`: one declaration per namespace.
pub(super) fn declarations(
    state: &State,
    settings: &Settings,
    host: &str,
    conflicts: &mut Vec<Conflict>,
) -> Vec<Declaration> {
    let mut objects: Vec<&Arc<Object>> = state.declaring(host).collect();
    objects.sort_by_key(|o| (&o.namespace, o.created, &o.name));
    let mut out: Vec<Declaration> = Vec::new();
    let mut first: Option<&Arc<Object>> = None;
    for object in objects {
        let Some(entry) = declare::service_entry(object) else { continue };
        let oldest = first.filter(|oldest| oldest.namespace == object.namespace);
        match (oldest, out.last_mut()) {
            (Some(oldest), Some(into)) if mergeable(oldest, object) => {
                extend_ports(&mut into.service.ports, &entry.ports);
                into.endpoints.extend(endpoints(state, object, entry, &into.service));
            }
            (Some(_), _) => conflicts.push(Conflict {
                host: host.to_owned(),
                namespace: object.namespace.clone(),
                loser: object.name.clone(),
                reason: "an older ServiceEntry of the same host differs in resolution, location, labels, selector or exportTo",
            }),
            (None, _) => {
                let service = service(settings, host, object, entry);
                let endpoints = endpoints(state, object, entry, &service);
                out.push(Declaration {
                    service,
                    endpoints,
                    family: Family::Config,
                    loser: object.name.clone(),
                });
                first = Some(object);
            }
        }
    }
    out
}

/// Two entries of one namespace describe one service when they differ in ports and endpoints only.
fn mergeable(a: &Object, b: &Object) -> bool {
    let (Some(x), Some(y)) = (declare::service_entry(a), declare::service_entry(b)) else { return false };
    let sorted = |names: &[String]| names.iter().cloned().collect::<BTreeSet<_>>();
    x.resolution == y.resolution
        && x.location == y.location
        && x.workload_selector == y.workload_selector
        && sorted(&x.export_to) == sorted(&y.export_to)
        && a.labels == b.labels
}

fn service(settings: &Settings, host: &str, object: &Object, entry: &ServiceEntry) -> Service {
    let mut ports = Vec::new();
    extend_ports(&mut ports, &entry.ports);
    Service {
        hostname: host.to_owned(),
        name: short_name(settings, host).to_owned(),
        namespace: object.namespace.clone(),
        ports,
        addresses: entry.addresses.iter().map(|address| plain_address(address)).collect(),
        vip_index: 0,
        resolution: match entry.resolution {
            ServiceEntryResolution::None => Resolution::None,
            ServiceEntryResolution::Static => Resolution::Static,
            ServiceEntryResolution::Dns => Resolution::Dns,
            ServiceEntryResolution::DnsRoundRobin => Resolution::DnsRoundRobin,
            ServiceEntryResolution::DynamicDns => Resolution::DynamicDns,
        },
        location: match entry.location {
            ServiceEntryLocation::MeshExternal => Location::External,
            ServiceEntryLocation::MeshInternal => Location::Internal,
        },
        export_to: if entry.export_to.is_empty() {
            settings.service_export_to.clone()
        } else {
            entry.export_to.clone()
        },
        subject_alt_names: entry.subject_alt_names.clone(),
        labels: object.labels.clone(),
        created: object.created,
        source: SourceId::Config,
    }
}

/// The first label of a host of the mesh's own domain, else the whole host.
fn short_name<'a>(settings: &Settings, host: &'a str) -> &'a str {
    let suffix = format!(".svc.{}", settings.domain_suffix);
    match host.strip_suffix(suffix.as_str()).and_then(|rest| rest.split('.').next()) {
        Some(name) if !name.is_empty() && name != "*" => name,
        _ => host,
    }
}

/// A range of one address is that address.
fn plain_address(address: &str) -> String {
    match address.parse::<ipnet::IpNet>() {
        Ok(net) if net.prefix_len() == net.max_prefix_len() => net.addr().to_string(),
        _ => address.to_owned(),
    }
}

/// Adds the ports whose number and name are new.
fn extend_ports(ports: &mut Vec<ServicePort>, declared: &[Port]) {
    for port in declared {
        if ports.iter().any(|p| p.number == port.number || p.name == port.name) {
            continue;
        }
        let app_protocol = Some(port.protocol.as_str()).filter(|p| !p.is_empty());
        let target = Some(port.target_port).filter(|target| *target != 0 && *target != port.number);
        ports.push(ServicePort {
            name: port.name.clone(),
            number: port.number,
            target_port: target,
            protocol: Protocol::parse(&port.name, app_protocol, port.number),
        });
    }
}

fn endpoints(state: &State, object: &Object, entry: &ServiceEntry, service: &Service) -> BTreeSet<Endpoint> {
    if let Some(selector) = declare::selector(object) {
        return selected(state, &object.namespace, selector)
            .map(|workload| endpoint_of(&workload, service))
            .collect();
    }
    let declared = || entry.endpoints.iter().map(|inline| inline_endpoint(inline, object, service)).collect();
    match entry.resolution {
        ServiceEntryResolution::None | ServiceEntryResolution::DynamicDns => BTreeSet::new(),
        ServiceEntryResolution::Static => declared(),
        ServiceEntryResolution::Dns | ServiceEntryResolution::DnsRoundRobin if entry.endpoints.is_empty() => {
            let itself = WorkloadEntry { address: service.hostname.clone(), ..WorkloadEntry::default() };
            BTreeSet::from([inline_endpoint(&itself, object, service)])
        }
        ServiceEntryResolution::Dns | ServiceEntryResolution::DnsRoundRobin => declared(),
    }
}

/// The workloads of `namespace` that have all labels of `selector`.
fn selected(state: &State, namespace: &str, selector: &Labels) -> impl Iterator<Item = Workload> {
    let entries = state.objects_in(Kind::WorkloadEntry, namespace).filter_map(|(key, object)| {
        if !declare::workload_has(object, selector) {
            return None;
        }
        let key = WorkloadKey { namespace: key.namespace.clone(), name: key.name.clone() };
        workload_of_entry(object, state.workload(&key))
    });
    let namespace = namespace.to_owned();
    let hidden = |key: &WorkloadKey| {
        let kind = Kind::WorkloadEntry;
        let entry = ObjectKey { kind, namespace: key.namespace.clone(), name: key.name.clone() };
        state.object(&entry).is_some()
    };
    let registered = state
        .workloads_in(&namespace)
        .filter(move |(key, registration)| declare::contains(&registration.labels, selector) && !hidden(key));
    entries.chain(registered.map(|(_, registration)| workload_of_registration(registration)))
}

fn endpoint_of(workload: &Workload, service: &Service) -> Endpoint {
    let group = workload.registration.as_ref().map(|r| &r.group).filter(|group| !group.is_empty());
    let named = workload.labels.get(WORKLOAD_NAME_LABEL).or(group).cloned();
    Endpoint {
        address: workload.address.clone(),
        ports: own_ports(&workload.address, &workload.ports, service),
        weight: workload.weight,
        locality: workload.locality.clone(),
        network: workload.network.clone(),
        labels: workload.labels.clone(),
        workload: named.unwrap_or_else(|| workload.key.name.clone()),
        namespace: workload.key.namespace.clone(),
        cluster: workload.cluster.clone(),
        service_account: workload.service_account.clone(),
        tls_mode: workload.tls_mode,
        health: workload.health,
    }
}

fn inline_endpoint(entry: &WorkloadEntry, object: &Object, service: &Service) -> Endpoint {
    Endpoint {
        address: entry.address.clone(),
        ports: own_ports(&entry.address, &entry.ports, service),
        weight: entry.weight.max(1),
        locality: locality(&entry.locality, &entry.labels),
        network: network(&entry.network, &entry.labels),
        labels: entry.labels.clone(),
        workload: entry.labels.get(WORKLOAD_NAME_LABEL).cloned().unwrap_or_default(),
        namespace: object.namespace.clone(),
        cluster: DEFAULT_CLUSTER.to_owned(),
        service_account: entry.service_account.clone(),
        tls_mode: tls_mode(&entry.labels, &entry.service_account),
        health: health(&entry.labels, true),
    }
}

/// The ports that the endpoint names itself: they outrank the service's own. A Unix socket has no ports.
fn own_ports(address: &str, named: &BTreeMap<String, u16>, service: &Service) -> BTreeMap<String, u16> {
    if address.starts_with("unix://") {
        return BTreeMap::new();
    }
    let differs = |name: &str, port: u16| {
        let own = service.ports.iter().find(|p| p.name == name);
        own.is_some_and(|p| p.target_port.unwrap_or(p.number) != port)
    };
    named
        .iter()
        .filter(|(name, port)| differs(name, **port))
        .map(|(name, port)| (name.clone(), *port))
        .collect()
}
