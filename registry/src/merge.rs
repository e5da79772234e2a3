//! One service of what several sources say about one host.
//!
//! [`host`] reads the state and gives the [`Candidate`]s of a host, best first: at most one per namespace, for several
//! namespaces may declare the same host, and a client prefers its own. Within a namespace a Kubernetes service beats a
//! `ServiceEntry`, else the oldest wins; what loses is told as a [`Conflict`], never silently mixed in. Clusters of one
//! platform add to each other's endpoints, and so do Consul and the configuration: one service may have instances in a
//! catalog and on machines of the mesh. The oldest declares ports and protocols then, and where the other differs is told.

pub mod declare;
mod entry;
mod join;
mod protocol;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub use self::entry::{Workload, workload_of_entry, workload_of_registration, workloads};
use crate::model::service::{Endpoint, Location, Service, SourceId, TlsMode};
use crate::state::State;

/// Cluster id of workloads that no platform's cluster announces.
pub const DEFAULT_CLUSTER: &str = "default";

/// What merging must know of the mesh-wide settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Trust domain of the identities.
    pub trust_domain: String,
    /// Other trust domains whose identities are accepted as ours.
    pub trust_domain_aliases: Vec<String>,
    /// Namespace whose configuration holds for the whole mesh.
    pub root_namespace: String,
    /// Domain of the mesh's own hosts.
    pub domain_suffix: String,
    /// `exportTo` of services that have none.
    pub service_export_to: Vec<String>,
    /// `exportTo` of VirtualServices that have none.
    pub virtual_service_export_to: Vec<String>,
    /// `exportTo` of DestinationRules that have none.
    pub destination_rule_export_to: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        let everybody = || vec!["*".to_owned()];
        Self {
            trust_domain: "cluster.local".to_owned(),
            trust_domain_aliases: Vec::new(),
            root_namespace: "istio-system".to_owned(),
            domain_suffix: "cluster.local".to_owned(),
            service_export_to: everybody(),
            virtual_service_export_to: everybody(),
            destination_rule_export_to: everybody(),
        }
    }
}

/// A service that a host may stand for, with its endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The service.
    pub service: Arc<Service>,
    /// Its endpoints, sorted, each once.
    pub endpoints: Arc<[Endpoint]>,
    /// SPIFFE ids of which a server of this service must have one.
    pub identities: Arc<BTreeSet<String>>,
}

/// A declaration of a host that has no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The host.
    pub host: String,
    /// Namespace of the declaration.
    pub namespace: String,
    /// Who declared it: a source, or the name of a `ServiceEntry`.
    pub loser: String,
    /// Why it has no effect.
    pub reason: &'static str,
}

/// All that is known about one host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Services of this host, best first, each of another namespace. Never empty in a snapshot.
    pub candidates: Vec<Candidate>,
    /// What has no effect.
    pub conflicts: Vec<Conflict>,
}

/// One declaration, before the choice.
struct Declaration {
    service: Service,
    endpoints: BTreeSet<Endpoint>,
    /// Sources of one family may add to each other's endpoints.
    family: Family,
    loser: String,
}

/// Which declarations describe one thing: clusters of one platform do, a platform and a `ServiceEntry` do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    Kubernetes,
    Consul,
    File,
    Config,
}

fn family(source: &SourceId) -> Family {
    match source {
        SourceId::Kubernetes(_) => Family::Kubernetes,
        SourceId::Consul(_) => Family::Consul,
        SourceId::File(_) => Family::File,
        SourceId::Config | SourceId::Workload => Family::Config,
    }
}

/// What `host` stands for, or nothing when nobody declares it.
#[must_use]
pub fn host(state: &State, settings: &Settings, host: &str) -> Option<Host> {
    let mut conflicts = Vec::new();
    let mut declarations = sources(state, settings, host);
    declarations.extend(entry::declarations(state, settings, host, &mut conflicts));
    // Kubernetes first, then the oldest; the name of the source decides ties, the same way on every member.
    declarations.sort_by(|a, b| rank(a).cmp(&rank(b)));

    let mut chosen: Vec<Declaration> = Vec::new();
    for declaration in declarations {
        let namespace = &declaration.service.namespace;
        match chosen.iter_mut().find(|c| c.service.namespace == *namespace) {
            None => chosen.push(declaration),
            Some(winner) if winner.family == declaration.family && winner.family != Family::Config => {
                winner.endpoints.extend(declaration.endpoints);
            }
            Some(winner) if join::may(winner, &declaration) => {
                let told = join::join(winner, &declaration);
                conflicts.extend(told.into_iter().map(|reason| Conflict {
                    host: host.to_owned(),
                    namespace: namespace.clone(),
                    loser: declaration.loser.clone(),
                    reason,
                }));
            }
            Some(winner) => conflicts.push(Conflict {
                host: host.to_owned(),
                namespace: namespace.clone(),
                loser: declaration.loser,
                reason: match winner.family {
                    Family::Kubernetes => "a Kubernetes service of the same host has precedence",
                    Family::Consul | Family::File | Family::Config => "an older declaration has precedence",
                },
            }),
        }
    }
    let index = state.vip_index(host).unwrap_or_default();
    let candidates = chosen.into_iter().map(|d| shared(state, host, candidate(d, index, settings)));
    let candidates: Vec<_> = candidates.collect();
    (!candidates.is_empty()).then_some(Host { candidates, conflicts })
}

fn rank(d: &Declaration) -> (bool, i64, &str, Family, &str) {
    (d.family != Family::Kubernetes, d.service.created, &d.service.namespace, d.family, &d.loser)
}

fn candidate(declaration: Declaration, vip_index: u32, settings: &Settings) -> Candidate {
    let Declaration { mut service, mut endpoints, .. } = declaration;
    service.vip_index = vip_index;
    if service.location == Location::External {
        let plain = |mut endpoint: Endpoint| {
            endpoint.tls_mode = TlsMode::Disabled;
            endpoint
        };
        endpoints = endpoints.into_iter().map(plain).collect();
    }
    let identities = endpoints
        .iter()
        .filter(|endpoint| !endpoint.service_account.is_empty())
        .flat_map(|endpoint| identities_of(settings, &endpoint.namespace, &endpoint.service_account))
        .collect();
    Candidate {
        service: Arc::new(service),
        endpoints: endpoints.into_iter().collect(),
        identities: Arc::new(identities),
    }
}

/// Endpoints that are just what one source says are the state's own: most are, and they are most of a mesh.
fn shared(state: &State, host: &str, mut candidate: Candidate) -> Candidate {
    let mut said = state.endpoints_of(host).map(|(_, endpoints)| endpoints);
    if let Some(same) = said.find(|endpoints| **endpoints == candidate.endpoints) {
        candidate.endpoints = Arc::clone(same);
    }
    candidate
}

/// The SPIFFE ids of a service account: one per trust domain that counts as ours.
fn identities_of<'a>(
    settings: &'a Settings,
    namespace: &'a str,
    service_account: &'a str,
) -> impl Iterator<Item = String> + 'a {
    std::iter::once(&settings.trust_domain)
        .chain(&settings.trust_domain_aliases)
        .map(move |domain| format!("spiffe://{domain}/ns/{namespace}/sa/{service_account}"))
}

/// What the sources other than the configuration say.
fn sources(state: &State, settings: &Settings, host: &str) -> Vec<Declaration> {
    let endpoints: BTreeMap<_, _> = state.endpoints_of(host).collect();
    let declaration = |(source, service): (&SourceId, &Arc<Service>)| {
        let mut service = Service::clone(service);
        if service.export_to.is_empty() {
            service.export_to.clone_from(&settings.service_export_to);
        }
        let endpoints =
            endpoints.get(source).map(|endpoints| endpoints.iter().cloned().map(with_weight).collect());
        Declaration {
            service,
            endpoints: endpoints.unwrap_or_default(),
            family: family(source),
            loser: format!("{source:?}"),
        }
    };
    state.services_of(host).map(declaration).collect()
}

/// A weight of 0 means nobody said one.
fn with_weight(mut endpoint: Endpoint) -> Endpoint {
    endpoint.weight = endpoint.weight.max(1);
    endpoint
}
