//! Clusters: one per port and subset of every service this proxy sees, and those of its own application.

pub(super) mod inbound;
pub(super) mod settings;

use envoy_types::pb::envoy::config::cluster::v3 as pb_cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use registry::model::service::{Location, Protocol, Resolution, Service, ServicePort};
use registry::model::traffic::{ClientTlsMode, ClientTlsSettings, ProxyProtocolVersion};

use self::settings::{AutoSni, Upstream};
use super::policy::Policy;
use super::tls::{self, Alpn, Origination};
use super::view::View;
use super::{endpoint, names, pb};

/// One outbound cluster that a proxy shall have.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) service: &'a Service,
    pub(super) port: &'a ServicePort,
    /// Empty for the whole service.
    pub(super) subset: &'a str,
}

impl Target<'_> {
    pub(super) fn name(&self) -> String {
        names::outbound_cluster(self.port.number, self.subset, &self.service.hostname)
    }
}

/// Every target of a service: its ports, each whole and by subset.
pub(super) fn targets<'a>(view: &'a View<'_>, service: &'a Service) -> Vec<Target<'a>> {
    let subsets = view.rule(&service.hostname).map(|rule| rule.rule.subsets.as_slice()).unwrap_or_default();
    let mut out = Vec::with_capacity(service.ports.len() * (1 + subsets.len()));
    for port in service.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
        out.push(Target { service, port, subset: "" });
        out.extend(subsets.iter().map(|subset| Target { service, port, subset: &subset.name }));
    }
    out
}

/// How the endpoints of a service reach the proxy.
pub(super) fn discovery(service: &Service, policy: &Policy<'_>) -> DiscoveryType {
    if settings::is_passthrough(policy.load_balancer) {
        return DiscoveryType::OriginalDst;
    }
    match service.resolution {
        Resolution::Static => DiscoveryType::Eds,
        Resolution::Dns => DiscoveryType::StrictDns,
        Resolution::DnsRoundRobin => DiscoveryType::LogicalDns,
        Resolution::None | Resolution::DynamicDns => DiscoveryType::OriginalDst,
    }
}

/// The cluster for a target, or `None` when it could not have any endpoint.
pub(super) fn outbound(view: &View<'_>, target: Target<'_>) -> Option<pb_cluster::Cluster> {
    let Target { service, port, subset } = target;
    let policy = view.policy(&service.hostname, port.number, subset);
    let kind = discovery(service, &policy);
    let name = target.name();
    let mut cluster = pb_cluster::Cluster {
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind.into())),
        metadata: Some(metadata(view, target)),
        name,
        ..Default::default()
    };
    settings::connection_pool(&mut cluster, policy.connection_pool, policy.retry_budget, view.mesh);
    settings::outlier_detection(&mut cluster, policy.outlier_detection);
    match kind {
        DiscoveryType::OriginalDst => cluster.lb_policy = LbPolicy::ClusterProvided.into(),
        DiscoveryType::Eds | DiscoveryType::StrictDns | DiscoveryType::LogicalDns | DiscoveryType::Static => {
            settings::load_balancer(&mut cluster, policy.load_balancer);
            weigh_localities(&mut cluster, &view.spread(&policy));
        }
    }
    match kind {
        DiscoveryType::Eds => {
            cluster.eds_cluster_config = Some(pb_cluster::cluster::EdsClusterConfig {
                eds_config: pb::ads(),
                service_name: cluster.name.clone(),
            });
        }
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => resolve(&mut cluster, view, target, kind)?,
        DiscoveryType::OriginalDst | DiscoveryType::Static => {}
    }
    let upstream = settings::upstream(port.protocol, policy.connection_pool, view.mesh);
    let auto_sni = secure(&mut cluster, view, target, &policy, upstream);
    settings::http_options(&mut cluster, upstream, policy.connection_pool, auto_sni);
    if let Some(proxy_protocol) = policy.proxy_protocol {
        wrap_in_proxy_protocol(&mut cluster, proxy_protocol.version);
    }
    Some(cluster)
}

/// The endpoints of a target: what an EDS cluster is sent, and what a DNS cluster holds.
pub(super) fn load_assignment(view: &View<'_>, target: Target<'_>) -> ClusterLoadAssignment {
    let Target { service, port, subset } = target;
    let policy = view.policy(&service.hostname, port.number, subset);
    let none = std::collections::BTreeMap::new();
    let labels = view
        .rule(&service.hostname)
        .and_then(|rule| rule.rule.subsets.iter().find(|s| !subset.is_empty() && s.name == subset))
        .map_or(&none, |subset| &subset.labels);
    let endpoints = view.endpoints(service);
    let inputs = endpoint::Inputs {
        cluster: &target.name(),
        port,
        endpoints: &endpoints,
        labels,
        spread: view.spread(&policy),
        unhealthy: policy.outlier_detection.is_some_and(|outlier| outlier.min_health_percent > 0),
        resolves: matches!(service.resolution, Resolution::Dns | Resolution::DnsRoundRobin),
        mtls: &|endpoint, port| view.speaks_mtls(endpoint, port),
    };
    endpoint::load_assignment(&inputs, view.proxy)
}

fn weigh_localities(cluster: &mut pb_cluster::Cluster, spread: &endpoint::Spread<'_>) {
    use pb_cluster::cluster::common_lb_config::{LocalityConfigSpecifier, LocalityWeightedLbConfig};
    if spread.distribute.is_some() {
        settings::common_lb(cluster).locality_config_specifier =
            Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(LocalityWeightedLbConfig {}));
    }
}

/// Puts the names to resolve into the cluster; `None` when there are none.
#[expect(deprecated, reason = "proxies in the field do not all read the DNS cluster extension")]
fn resolve(
    cluster: &mut pb_cluster::Cluster,
    view: &View<'_>,
    target: Target<'_>,
    kind: DiscoveryType,
) -> Option<()> {
    let mut assignment = load_assignment(view, target);
    if kind == DiscoveryType::LogicalDns {
        assignment.endpoints.truncate(1);
        for group in &mut assignment.endpoints {
            group.lb_endpoints.truncate(1);
            group.priority = 0;
        }
    }
    if assignment.endpoints.is_empty() {
        return None;
    }
    cluster.load_assignment = Some(assignment);
    cluster.dns_refresh_rate = Some(pb::duration(view.mesh.dns_refresh_rate()));
    cluster.dns_lookup_family = lookup_family(view).into();
    cluster.respect_dns_ttl = true;
    Some(())
}

fn lookup_family(view: &View<'_>) -> pb_cluster::cluster::DnsLookupFamily {
    use pb_cluster::cluster::DnsLookupFamily;
    let has = |v6: bool| view.proxy.addresses.iter().any(|address| address.is_ipv6() == v6);
    match (has(false), has(true)) {
        (true, true) => DnsLookupFamily::All,
        (false, true) => DnsLookupFamily::V6Only,
        (_, false) => DnsLookupFamily::V4Only,
    }
}

/// Chooses how connections are secured, and whether server names follow the request.
fn secure(
    cluster: &mut pb_cluster::Cluster,
    view: &View<'_>,
    target: Target<'_>,
    policy: &Policy<'_>,
    upstream: Upstream,
) -> AutoSni {
    let alpn = match upstream {
        Upstream::Http1 => Alpn::Http1,
        Upstream::Http2 => Alpn::Http2,
        Upstream::AsClient | Upstream::Opaque => Alpn::Tcp,
    };
    match policy.tls {
        Some(settings) => explicit_tls(cluster, view, target, settings, (upstream, alpn)),
        None => {
            let plain_port = matches!(cluster.cluster_discovery_type, Some(ClusterDiscoveryType::Type(t))
                if t == i32::from(DiscoveryType::OriginalDst));
            if view.mesh.auto_mtls() && target.service.location == Location::Internal && !plain_port {
                cluster.transport_socket_matches = auto_mtls(view, target, alpn);
            }
            AutoSni::default()
        }
    }
}

fn mesh_socket(
    view: &View<'_>,
    target: Target<'_>,
    alpn: Alpn,
    settings: Option<&ClientTlsSettings>,
) -> core::TransportSocket {
    let Target { service, port, subset } = target;
    let own = settings.map(|s| s.subject_alt_names.as_slice()).unwrap_or_default();
    let identities = view.identities(service);
    let sans: Vec<&str> =
        [own, service.subject_alt_names.as_slice()].into_iter().find(|sans| !sans.is_empty()).map_or_else(
            || identities.iter().map(String::as_str).collect(),
            |s| s.iter().map(String::as_str).collect(),
        );
    let given = settings.map(|s| s.sni.as_str()).filter(|sni| !sni.is_empty());
    let sni = given.map_or_else(|| names::sni(port.number, subset, &service.hostname), str::to_owned);
    tls::upstream_mesh(sni, alpn, view.mesh_tls(), sans)
}

/// mTLS towards endpoints that have a proxy, plain text towards the others.
fn auto_mtls(
    view: &View<'_>,
    target: Target<'_>,
    alpn: Alpn,
) -> Vec<pb_cluster::cluster::TransportSocketMatch> {
    vec![
        pb_cluster::cluster::TransportSocketMatch {
            name: "tlsMode-istio".to_owned(),
            r#match: Some(pb::structure([("tlsMode", pb::text("istio"))])),
            transport_socket: Some(mesh_socket(view, target, alpn, None)),
        },
        pb_cluster::cluster::TransportSocketMatch {
            name: "tlsMode-disabled".to_owned(),
            r#match: Some(pb::structure([])),
            transport_socket: Some(tls::plaintext()),
        },
    ]
}

fn explicit_tls(
    cluster: &mut pb_cluster::Cluster,
    view: &View<'_>,
    target: Target<'_>,
    settings: &ClientTlsSettings,
    (upstream, alpn): (Upstream, Alpn),
) -> AutoSni {
    match settings.mode {
        ClientTlsMode::Disable => AutoSni::default(),
        ClientTlsMode::IstioMutual => {
            cluster.transport_socket = Some(mesh_socket(view, target, alpn, Some(settings)));
            AutoSni::default()
        }
        ClientTlsMode::Simple | ClientTlsMode::Mutual => {
            let (socket, auto_sni) = originate(target.service, settings, upstream, alpn);
            cluster.transport_socket = Some(socket);
            auto_sni
        }
    }
}

fn originate(
    service: &Service,
    settings: &ClientTlsSettings,
    upstream: Upstream,
    alpn: Alpn,
) -> (core::TransportSocket, AutoSni) {
    let insecure = settings.insecure_skip_verify == Some(true);
    let sans = if settings.subject_alt_names.is_empty() {
        service.subject_alt_names.as_slice()
    } else {
        settings.subject_alt_names.as_slice()
    };
    let http = upstream != Upstream::Opaque;
    let auto_sni =
        AutoSni { sni: http && settings.sni.is_empty(), san: http && sans.is_empty() && !insecure };
    // Bytes name no host, so the service's own name has to do, for the server to choose and for us to check.
    let host = (!http && !service.hostname.starts_with('*')).then_some(service.hostname.as_str());
    let sni = if settings.sni.is_empty() { host.unwrap_or_default() } else { settings.sni.as_str() };
    let checked = [sni.to_owned()];
    let mutual = settings.mode == ClientTlsMode::Mutual && !settings.client_certificate.is_empty();
    let origination = Origination {
        sni,
        sans: if sans.is_empty() && !http && !sni.is_empty() { &checked } else { sans },
        roots: &settings.ca_certificates,
        crl: &settings.ca_crl,
        certificate: mutual.then_some((settings.client_certificate.as_str(), settings.private_key.as_str())),
        insecure,
    };
    (tls::upstream_origination(&origination, alpn.origin()), auto_sni)
}

fn wrap_in_proxy_protocol(cluster: &mut pb_cluster::Cluster, version: ProxyProtocolVersion) {
    let version = match version {
        ProxyProtocolVersion::V1 => core::proxy_protocol_config::Version::V1,
        ProxyProtocolVersion::V2 => core::proxy_protocol_config::Version::V2,
    };
    let wrap = |inner: core::TransportSocket| {
        let config = ProxyProtocolUpstreamTransport {
            config: Some(core::ProxyProtocolConfig { version: version.into(), ..Default::default() }),
            transport_socket: Some(inner),
            ..Default::default()
        };
        pb::transport_socket("envoy.transport_sockets.upstream_proxy_protocol", &config)
    };
    for socket_match in &mut cluster.transport_socket_matches {
        socket_match.transport_socket = socket_match.transport_socket.take().map(wrap);
    }
    if cluster.transport_socket_matches.is_empty() {
        cluster.transport_socket = Some(wrap(cluster.transport_socket.take().unwrap_or_else(tls::plaintext)));
    }
}

/// What proxies put on metrics about this cluster, and where it came from.
fn metadata(view: &View<'_>, target: Target<'_>) -> core::Metadata {
    let Target { service, port, subset } = target;
    let of_service = pb::structure([
        ("host", pb::text(&service.hostname)),
        ("name", pb::text(&service.name)),
        ("namespace", pb::text(&service.namespace)),
    ]);
    let mut istio = pb::structure([
        ("services", pb::list(vec![pb::nested(of_service)])),
        ("default_original_port", pb::number(port.number.into())),
    ]);
    if !subset.is_empty() {
        istio.fields.insert("subset".to_owned(), pb::text(subset));
    }
    if let Some(config) = view.rule_path(&service.hostname) {
        istio.fields.insert("config".to_owned(), pb::text(config));
    }
    pb::metadata([("istio", istio)])
}

/// Where unknown destinations go: `PassthroughCluster` to wherever the client wanted, `BlackHoleCluster` to nowhere.
pub(super) fn fallbacks(view: &View<'_>) -> [pb_cluster::Cluster; 2] {
    let mut passthrough = pb_cluster::Cluster {
        name: names::PASSTHROUGH.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())),
        lb_policy: LbPolicy::ClusterProvided.into(),
        ..Default::default()
    };
    settings::connection_pool(&mut passthrough, None, None, view.mesh);
    settings::http_options(&mut passthrough, Upstream::AsClient, None, AutoSni::default());
    let blackhole = pb_cluster::Cluster {
        name: names::BLACKHOLE.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        connect_timeout: Some(pb::duration(view.mesh.connect_timeout())),
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: names::BLACKHOLE.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    [passthrough, blackhole]
}
