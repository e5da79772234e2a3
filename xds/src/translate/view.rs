//! What one proxy sees of the mesh: the part of a snapshot that its resources are made from.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use registry::config::Kind;
use registry::model::mesh::{MeshConfig, NormalizationType};
use registry::model::security::{AuthorizationPolicy, JwtRule, MutualTlsMode, RequestAuthentication};
use registry::model::service::{Endpoint, Hostname, Protocol, Service};
use registry::model::traffic::{
    ConnectionPoolSettings, LocalityLbSetting, OutboundTrafficPolicyMode, Sidecar, TlsProtocol,
    VirtualService,
};
use registry::snapshot::{MergedDestinationRule, PeerPolicy, Snapshot, Typed};

use super::access_log::{self, Side};
use super::authz;
use super::endpoint::{self, Spread};
use super::http::PathForm;
use super::inbound::{self, InboundPort};
use super::policy::Policy;
use super::route;
use super::tls::{Lowest, MeshTls};
use crate::proxy::Proxy;

/// A `VirtualService` that this proxy follows.
#[derive(Debug, Clone)]
pub(super) struct RoutingRule {
    /// What it says.
    pub(super) spec: Arc<VirtualService>,
    /// Where it is found, as Istio writes it into metadata.
    pub(super) path: String,
}

/// What one proxy sees.
pub(super) struct View<'a> {
    snapshot: &'a Snapshot,
    pub(super) proxy: &'a Proxy,
    pub(super) mesh: &'a MeshConfig,
    /// Services, oldest first.
    pub(super) services: Vec<Arc<Service>>,
    /// Routing rules, in the order in which they claim hosts.
    pub(super) virtual_services: Vec<RoutingRule>,
    /// Whether calls to hosts that nobody declares are let through.
    pub(super) allow_any: bool,
    by_host: BTreeMap<Hostname, usize>,
    owners: BTreeMap<Hostname, usize>,
    rules: BTreeMap<Hostname, Arc<MergedDestinationRule>>,
    /// Access logs of calls from the application.
    pub(super) client_log: Vec<AccessLog>,
    /// Access logs of calls to the application.
    pub(super) server_log: Vec<AccessLog>,
    sidecar: Option<Typed<Sidecar>>,
    no_upgrade: MeshConfig,
    peer_policies: bool,
}

impl<'a> View<'a> {
    /// Everything that the proxy sees.
    pub(super) fn new(snapshot: &'a Snapshot, proxy: &'a Proxy) -> Self {
        let services = snapshot.services_for(&proxy.namespace, &proxy.labels);
        let virtual_services: Vec<RoutingRule> = snapshot
            .virtual_services_in_scope(&proxy.namespace, &proxy.labels)
            .into_iter()
            .map(|(object, spec)| RoutingRule {
                spec,
                path: config_path("virtual-service", &object.namespace, &object.name),
            })
            .collect();
        let mut view = Self::over(snapshot, proxy, services);
        view.owners = route::owners(&view.services, &virtual_services);
        view.virtual_services = virtual_services;
        let telemetries = snapshot.telemetries(&proxy.namespace, &proxy.labels);
        let layers: Vec<_> = telemetries.iter().map(|(_, t)| t.access_logging.as_slice()).collect();
        let logs = |side| access_log::access_logs(view.mesh, &layers, side, !proxy.native);
        (view.client_log, view.server_log) = (logs(Side::Client), logs(Side::Server));
        view
    }

    /// Only these hosts, without routing: enough for their endpoints.
    pub(super) fn of_hosts(snapshot: &'a Snapshot, proxy: &'a Proxy, hosts: &BTreeSet<Hostname>) -> Self {
        if snapshot.sidecar_for(&proxy.namespace, &proxy.labels).is_some() {
            // A Sidecar may take the service of another namespace than the proxy would see without it.
            let mut services = snapshot.services_for(&proxy.namespace, &proxy.labels);
            services.retain(|service| hosts.contains(&service.hostname));
            return Self::over(snapshot, proxy, services);
        }
        let of = |host: &Hostname| snapshot.service(host, Some(&proxy.namespace)).cloned();
        Self::over(snapshot, proxy, hosts.iter().filter_map(of).collect())
    }

    fn over(snapshot: &'a Snapshot, proxy: &'a Proxy, services: Vec<Arc<Service>>) -> Self {
        let rules = services
            .iter()
            .filter_map(|service| {
                let host = &service.hostname;
                let rule = snapshot.destination_rule(&proxy.namespace, &proxy.labels, host)?;
                Some((host.clone(), rule))
            })
            .collect();
        let by_host = services.iter().enumerate().map(|(index, s)| (s.hostname.clone(), index)).collect();
        let mesh: &MeshConfig = snapshot.mesh();
        let sidecar = snapshot.sidecar_for(&proxy.namespace, &proxy.labels).cloned();
        let of_sidecar =
            sidecar.as_ref().and_then(|(_, s)| s.outbound_traffic_policy.as_ref()).map(|p| p.mode);
        let mode = of_sidecar.unwrap_or_else(|| mesh.outbound_traffic_mode());
        Self {
            snapshot,
            proxy,
            mesh,
            services,
            virtual_services: Vec::new(),
            allow_any: mode != OutboundTrafficPolicyMode::RegistryOnly,
            by_host,
            owners: BTreeMap::new(),
            rules,
            client_log: Vec::new(),
            server_log: Vec::new(),
            sidecar,
            no_upgrade: MeshConfig::default(),
            peer_policies: snapshot.objects_of(Kind::PeerAuthentication).next().is_some(),
        }
    }

    pub(super) fn domain_suffix(&self) -> &str {
        self.snapshot.domain_suffix()
    }

    /// Settings in which nothing upgrades a protocol: what the application itself speaks is what its port declares.
    pub(super) fn mesh_without_upgrade(&self) -> &MeshConfig {
        &self.no_upgrade
    }

    pub(super) fn service(&self, host: &str) -> Option<&Arc<Service>> {
        self.services.get(*self.by_host.get(host)?)
    }

    /// The `VirtualService` that routes a host.
    pub(super) fn routing_of(&self, host: &str) -> Option<&RoutingRule> {
        self.virtual_services.get(*self.owners.get(host)?)
    }

    /// The `DestinationRule` for a host.
    pub(super) fn rule(&self, host: &str) -> Option<&MergedDestinationRule> {
        self.rules.get(host).map(|rule| &**rule)
    }

    /// Where the host's `DestinationRule` is found.
    pub(super) fn rule_path(&self, host: &str) -> Option<String> {
        let object = self.rule(host)?.from.first()?;
        Some(config_path("destination-rule", &object.namespace, &object.name))
    }

    /// The policy for a port of a subset (empty for the whole host).
    pub(super) fn policy(&self, host: &str, port: u16, subset: &str) -> Policy<'_> {
        Policy::new(self.rule(host).map(|rule| &rule.rule), self.mesh, port, subset)
    }

    pub(super) fn endpoints(&self, service: &Service) -> Arc<[Endpoint]> {
        Arc::clone(self.snapshot.endpoints_of(service))
    }

    /// SPIFFE ids of which a server of this service must have one.
    pub(super) fn identities(&self, service: &Service) -> &BTreeSet<String> {
        self.snapshot.identities_of(service)
    }

    /// Whether an endpoint accepts mTLS on a port: it has a proxy, and no policy switches it off.
    pub(super) fn speaks_mtls(&self, endpoint: &Endpoint, port: u16) -> bool {
        endpoint::has_proxy(endpoint)
            && (!self.peer_policies
                || self.snapshot.peer_authentication(&endpoint.namespace, &endpoint.labels).mode_of(port)
                    != MutualTlsMode::Disable)
    }

    /// How load is spread over localities: the service's rule, else the mesh's.
    pub(super) fn spread<'s>(&'s self, policy: &Policy<'s>) -> Spread<'s> {
        let own = policy.load_balancer.and_then(|lb| lb.locality_lb_setting.as_ref());
        let Some(setting) = own.or(self.mesh.locality_lb_setting.as_ref()) else {
            return Spread { failover: policy.outlier_detection.is_some(), ..Spread::default() };
        };
        if setting.enabled == Some(false) {
            return Spread::default();
        }
        self.spread_of(setting, policy.outlier_detection.is_some())
    }

    fn spread_of<'s>(&'s self, setting: &'s LocalityLbSetting, ejects: bool) -> Spread<'s> {
        let here = &self.proxy.locality;
        let distribute = setting.distribute.iter().find(|d| endpoint::covers(&d.from, here)).map(|d| &d.to);
        let to = setting.failover.iter().find(|f| f.from == here.region).map(|f| f.to.as_str());
        Spread {
            distribute,
            failover: ejects && distribute.is_none(),
            failover_to: to,
            failover_priority: &setting.failover_priority,
        }
    }

    /// The mesh's trust domain, then its aliases.
    pub(super) fn trust_domains(&self) -> Vec<String> {
        let own = self.snapshot.trust_domain().to_owned();
        let aliases = self.snapshot.settings().trust_domain_aliases.iter().filter(|alias| **alias != own);
        [own.clone()].into_iter().chain(aliases.cloned()).collect()
    }

    /// Which connections the application's proxy accepts.
    pub(super) fn peer_policy(&self) -> PeerPolicy {
        self.snapshot.peer_authentication(&self.proxy.namespace, &self.proxy.labels)
    }

    /// What the application serves, one entry per workload port, in the order of ports: what a Sidecar's ingress
    /// says, else every port of the services in front of it.
    pub(super) fn inbound_ports(&self) -> Vec<InboundPort> {
        let served =
            self.snapshot.inbound_services(&self.proxy.namespace, &self.proxy.addresses, &self.proxy.labels);
        let ports = match &self.sidecar {
            Some((object, sidecar)) if !sidecar.ingress.is_empty() => {
                inbound::ingress_ports(object, sidecar, &served)
            }
            Some(_) | None => served
                .into_iter()
                .map(|(service, port, workload_port)| InboundPort {
                    service,
                    port,
                    workload_port,
                    endpoint: None,
                    pool: None,
                })
                .collect(),
        };
        let mut by_port: BTreeMap<u16, InboundPort> = BTreeMap::new();
        for port in ports.into_iter().filter(|port| port.port.protocol != Protocol::Udp) {
            by_port.entry(port.workload_port).or_insert(port);
        }
        by_port.into_values().collect()
    }

    /// The connection pool of an inbound port: its own, the Sidecar's, else that of the service's rule.
    pub(super) fn inbound_connection_pool<'s>(
        &'s self,
        port: &'s InboundPort,
    ) -> Option<&'s ConnectionPoolSettings> {
        let of_sidecar = self.sidecar.as_ref().and_then(|(_, s)| s.inbound_connection_pool.as_ref());
        let of_rule = || self.policy(&port.service.hostname, port.port.number, "").connection_pool;
        port.pool.as_ref().or(of_sidecar).or_else(of_rule)
    }

    pub(super) fn authorization_policies(&self) -> Vec<Typed<AuthorizationPolicy>> {
        self.snapshot.authorization_policies(&self.proxy.namespace, &self.proxy.labels)
    }

    pub(super) fn request_authentications(&self) -> Vec<Typed<RequestAuthentication>> {
        self.snapshot.request_authentications(&self.proxy.namespace, &self.proxy.labels)
    }

    /// How proxies speak TLS to one another.
    pub(super) fn mesh_tls(&self) -> MeshTls<'_> {
        let tls = self.mesh.mesh_mtls.as_ref();
        let lowest = match tls.map(|tls| tls.min_protocol_version) {
            Some(TlsProtocol::Tls13) => Lowest::Tls13,
            Some(TlsProtocol::Auto | TlsProtocol::Tls10 | TlsProtocol::Tls11 | TlsProtocol::Tls12) | None => {
                Lowest::Tls12
            }
        };
        MeshTls { lowest, curves: tls.map(|tls| tls.ecdh_curves.as_slice()).unwrap_or_default() }
    }

    pub(super) fn path_form(&self) -> PathForm {
        match self.mesh.normalization() {
            NormalizationType::None => PathForm::None,
            NormalizationType::Default | NormalizationType::Base => PathForm::Base,
            NormalizationType::MergeSlashes => PathForm::MergeSlashes,
            NormalizationType::DecodeAndMergeSlashes => PathForm::DecodeAndMergeSlashes,
        }
    }
}

/// The policies in the form in which filters are made from them.
pub(super) fn policies(found: &[Typed<AuthorizationPolicy>]) -> Vec<authz::Policy<'_>> {
    found
        .iter()
        .map(|(object, spec)| authz::Policy {
            namespace: &object.namespace,
            name: &object.name,
            dry_run: object.annotations.get("istio.io/dry-run").is_some_and(|value| value == "true"),
            spec,
        })
        .collect()
}

/// The token rules of all policies together.
pub(super) fn jwt_rules(found: &[Typed<RequestAuthentication>]) -> Vec<&JwtRule> {
    found.iter().flat_map(|(_, spec)| &spec.jwt_rules).collect()
}

fn config_path(kind: &str, namespace: &str, name: &str) -> String {
    format!("/apis/networking.istio.io/v1/namespaces/{namespace}/{kind}/{name}")
}
