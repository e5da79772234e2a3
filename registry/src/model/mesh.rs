//! Mesh-wide settings (`MeshConfig`), with Istio's defaults in the accessors.
//!
//! A field holds what was written; a method of the same meaning says what holds. An empty `MeshConfig` is a
//! mesh with Istio's defaults.

use std::time::Duration;

use serde_json::Value;

use super::traffic::{
    ClientTlsSettings, ConnectionPoolSettings, HttpRetry, LocalityLbSetting, OutboundTrafficPolicyMode,
    OutlierDetection, TcpKeepalive, TlsProtocol, ZoneAwareLbSetting,
};
use crate::config::decode::{enumeration, message, oneof};

mod provider;
mod proxy_config;

pub use provider::*;
pub use proxy_config::*;

message! {
    /// Settings of the whole mesh.
    pub struct MeshConfig {
        /// Where proxies listen for captured traffic from applications; absent is 15001.
        proxy_listen_port: Option<u16> = "proxyListenPort";
        /// Where proxies listen for captured traffic to applications; absent is 15006.
        proxy_inbound_listen_port: Option<u16> = "proxyInboundListenPort";
        /// Where proxies listen as HTTP proxies; absent is nowhere.
        proxy_http_port: Option<u16> = "proxyHttpPort";
        /// Time to connect; absent is 10 s.
        connect_timeout: Option<Duration> = "connectTimeout";
        /// Longest idle time of HBONE connections.
        hbone_idle_timeout: Option<Duration> = "hboneIdleTimeout";
        /// How long a proxy waits for the first bytes to guess a protocol; absent is for ever.
        protocol_detection_timeout: Option<Duration> = "protocolDetectionTimeout";
        /// Keepalive of connections; absent is the system's.
        tcp_keepalive: Option<TcpKeepalive> = "tcpKeepalive";
        /// Class of the Kubernetes Ingress objects that are ours; empty is `istio`.
        ingress_class: String = "ingressClass";
        /// Service of the ingress gateway.
        ingress_service: String = "ingressService";
        /// Which Ingress objects are ours.
        ingress_controller_mode: IngressControllerMode = "ingressControllerMode";
        /// Label `istio` of the ingress gateway's proxies.
        ingress_selector: String = "ingressSelector";
        /// Traces and request ids; absent is on.
        enable_tracing: Option<bool> = "enableTracing";
        /// File of the access log; empty is none.
        access_log_file: String = "accessLogFile";
        /// Format of the access log; empty is Istio's.
        access_log_format: String = "accessLogFormat";
        /// Text or JSON.
        access_log_encoding: AccessLogEncoding = "accessLogEncoding";
        /// Access log over gRPC.
        enable_envoy_access_log_service: bool = "enableEnvoyAccessLogService";
        /// No log of connections that no route takes.
        disable_envoy_listener_log: bool = "disableEnvoyListenerLog";
        /// Agents merge the application's metrics; absent is on.
        enable_prometheus_merge: Option<bool> = "enablePrometheusMerge";
        /// Pattern of the statistics of inbound clusters.
        inbound_cluster_stat_name: String = "inboundClusterStatName";
        /// Pattern of the statistics of outbound clusters.
        outbound_cluster_stat_name: String = "outboundClusterStatName";
        /// Systems that other objects name.
        extension_providers: Vec<ExtensionProvider> = "extensionProviders";
        /// Providers that are used when an object names none.
        default_providers: Option<DefaultProviders> = "defaultProviders";
        /// Traffic for unknown destinations.
        outbound_traffic_policy: Option<MeshOutboundTrafficPolicy> = "outboundTrafficPolicy";
        /// Traffic to applications.
        inbound_traffic_policy: Option<InboundTrafficPolicy> = "inboundTrafficPolicy";
        /// Locality preference.
        locality_lb_setting: Option<LocalityLbSetting> = "localityLbSetting";
        /// Zone-aware routing.
        zone_aware_lb_setting: Option<ZoneAwareLbSetting> = "zoneAwareLbSetting";
        /// Between DNS queries; absent is 60 s.
        dns_refresh_rate: Option<Duration> = "dnsRefreshRate";
        /// Whether HTTP/1.1 connections become HTTP/2.
        h2_upgrade_policy: MeshH2UpgradePolicy = "h2UpgradePolicy";
        /// Retries of requests; absent are Istio's.
        default_http_retry_policy: Option<HttpRetry> = "defaultHttpRetryPolicy";
        /// Retries towards the application; absent are Istio's.
        default_inbound_http_retry_policy: Option<HttpRetry> = "defaultInboundHttpRetryPolicy";
        /// Limits that hold where no DestinationRule says otherwise.
        default_traffic_policy: Option<MeshTrafficPolicy> = "defaultTrafficPolicy";
        /// How paths are normalized.
        path_normalization: Option<ProxyPathNormalization> = "pathNormalization";
        /// Mutual TLS wherever both ends have a proxy; absent is on.
        enable_auto_mtls: Option<bool> = "enableAutoMtls";
        /// Trust domain of the identities; empty is `cluster.local`.
        trust_domain: String = "trustDomain";
        /// Trust domains that count as our own.
        trust_domain_aliases: Vec<String> = "trustDomainAliases";
        /// Further roots for traffic inside the mesh.
        ca_certificates: Vec<CertificateData> = "caCertificates";
        /// DNS certificates.
        certificates: Vec<Certificate> = "certificates" ~ "use a certificate manager";
        /// An external certificate authority.
        ca: Option<CertificateAuthority> = "ca";
        /// Clients verify certificates of servers outside; absent is on.
        verify_certificate_at_client: Option<bool> = "verifyCertificateAtClient" ~ "it is always on";
        /// TLS inside the mesh.
        mesh_mtls: Option<TlsConfig> = "meshMTLS";
        /// TLS of everything else.
        tls_defaults: Option<TlsConfig> = "tlsDefaults";
        /// Where configuration is read.
        config_sources: Vec<ConfigSource> = "configSources";
        /// `exportTo` of services that have none; none is `*`.
        default_service_export_to: Vec<String> = "defaultServiceExportTo";
        /// `exportTo` of VirtualServices that have none; none is `*`.
        default_virtual_service_export_to: Vec<String> = "defaultVirtualServiceExportTo";
        /// `exportTo` of DestinationRules that have none; none is `*`.
        default_destination_rule_export_to: Vec<String> = "defaultDestinationRuleExportTo";
        /// Namespace whose policies hold everywhere; empty is `istio-system`.
        root_namespace: String = "rootNamespace";
        /// Settings of single services.
        service_settings: Vec<ServiceSettings> = "serviceSettings";
        /// Which services are local to their cluster, by label.
        service_scope_configs: Vec<ServiceScopeConfig> = "serviceScopeConfigs";
        /// Namespaces that are read; none is all.
        discovery_selectors: Vec<LabelSelector> = "discoverySelectors";
        /// Limits of the visibility of ServiceEntries, as written.
        service_entry_visibility: Option<Value> = "serviceEntryVisibility";
        /// Settings of proxies.
        default_config: Option<ProxyConfig> = "defaultConfig";
        /// Largest share of the connected proxies, in percent, that one change of the configuration may touch unless
        /// it is forced; absent is all of them. Not one of Istio's.
        max_affected_proxies_percent: Option<u32> = "maxAffectedProxiesPercent";
    }

    /// Traffic for unknown destinations.
    pub struct MeshOutboundTrafficPolicy {
        /// Allowed or not; an empty policy is `REGISTRY_ONLY`.
        mode: OutboundTrafficPolicyMode = "mode";
    }

    /// Traffic to applications.
    pub struct InboundTrafficPolicy {
        /// Where it goes.
        mode: InboundTrafficPolicyMode = "mode";
    }

    /// Limits that hold where no DestinationRule says otherwise.
    pub struct MeshTrafficPolicy {
        /// Limits of connections and requests.
        connection_pool: Option<ConnectionPoolSettings> = "connectionPool";
        /// Ejection of failing endpoints.
        outlier_detection: Option<OutlierDetection> = "outlierDetection";
    }

    /// How paths are normalized.
    pub struct ProxyPathNormalization {
        /// How far.
        normalization: NormalizationType = "normalization";
    }

    /// Roots.
    pub struct CertificateData {
        /// Kubernetes signers they are for.
        cert_signers: Vec<String> = "certSigners";
        /// Trust domains they are for.
        trust_domains: Vec<String> = "trustDomains";
    } oneof {
        /// Where they are.
        certificate_data: CertificateDataSource;
    }

    /// A DNS certificate.
    pub struct Certificate {
        /// Secret it is kept in.
        secret_name: String = "secretName";
        /// Names.
        dns_names: Vec<String> = "dnsNames";
    }

    /// An external certificate authority.
    pub struct CertificateAuthority {
        /// Address with port.
        address: String = "address";
        /// TLS towards it.
        tls_settings: Option<ClientTlsSettings> = "tlsSettings";
        /// Time for a request; absent is 10 s.
        request_timeout: Option<Duration> = "requestTimeout";
        /// Asked by istiod, not by agents; absent is true.
        istiod_side: Option<bool> = "istiodSide";
    }

    /// Limits of TLS.
    pub struct TlsConfig {
        /// Lowest version.
        min_protocol_version: TlsProtocol = "minProtocolVersion";
        /// Curves.
        ecdh_curves: Vec<String> = "ecdhCurves";
        /// Cipher suites for TLS 1.2.
        cipher_suites: Vec<String> = "cipherSuites";
    }

    /// Where configuration is read.
    pub struct ConfigSource {
        /// `k8s://`, `fs:///path` or `xds://host:port`.
        address: String = "address";
        /// TLS towards it.
        tls_settings: Option<ClientTlsSettings> = "tlsSettings";
        /// Which kinds it has.
        subscribed_resources: Vec<ConfigSourceResource> = "subscribedResources";
    }

    /// Settings of single services.
    pub struct ServiceSettings {
        /// The settings.
        settings: Option<ServiceSetting> = "settings";
        /// Hosts they are for.
        hosts: Vec<String> = "hosts";
    }

    /// Settings of a service.
    pub struct ServiceSetting {
        /// Served only inside the client's cluster.
        cluster_local: bool = "clusterLocal";
    }

    /// Which services are local to their cluster.
    pub struct ServiceScopeConfig {
        /// Namespaces.
        namespace_selector: Option<LabelSelector> = "namespaceSelector";
        /// Services.
        services_selector: Option<LabelSelector> = "servicesSelector";
        /// Local or not.
        scope: ServiceScope = "scope";
    }

    /// A label selector of Kubernetes: all parts must hold.
    pub struct LabelSelector {
        /// Labels with these values.
        match_labels: std::collections::BTreeMap<String, String> = "matchLabels";
        /// Conditions.
        match_expressions: Vec<LabelSelectorRequirement> = "matchExpressions";
    }

    /// A condition on a label.
    pub struct LabelSelectorRequirement {
        /// Which label.
        key: String = "key";
        /// The condition.
        operator: LabelSelectorOperator = "operator";
        /// Values for `In` and `NotIn`.
        values: Vec<String> = "values";
    }

    /// Providers that are used when an object names none.
    pub struct DefaultProviders {
        /// For traces.
        tracing: Vec<String> = "tracing";
        /// For metrics.
        metrics: Vec<String> = "metrics";
        /// For access logs.
        access_logging: Vec<String> = "accessLogging";
    }
}

oneof! {
    /// Where roots are.
    pub enum CertificateDataSource {
        /// Here.
        Pem(String) = "pem",
        /// At a SPIFFE bundle endpoint.
        SpiffeBundleUrl(String) = "spiffeBundleUrl",
    }
}

enumeration! {
    /// Which Ingress objects are ours.
    pub enum IngressControllerMode {
        /// As `STRICT`.
        Unspecified = "UNSPECIFIED",
        /// None.
        Off = "OFF",
        /// Those of our class, and those without one.
        Default = "DEFAULT",
        /// Those of our class.
        Strict = "STRICT",
    }

    /// Form of the access log.
    pub enum AccessLogEncoding {
        /// Text.
        Text = "TEXT",
        /// JSON.
        Json = "JSON",
    }

    /// Where traffic to applications goes.
    pub enum InboundTrafficPolicyMode {
        /// To the address it was sent to.
        Passthrough = "PASSTHROUGH",
        /// To 127.0.0.1.
        Localhost = "LOCALHOST",
    }

    /// Whether HTTP/1.1 connections become HTTP/2.
    pub enum MeshH2UpgradePolicy {
        /// No.
        DoNotUpgrade = "DO_NOT_UPGRADE",
        /// Yes.
        Upgrade = "UPGRADE",
    }

    /// How far paths are normalized.
    pub enum NormalizationType {
        /// As `BASE`.
        Default = "DEFAULT",
        /// Not at all.
        None = "NONE",
        /// RFC 3986.
        Base = "BASE",
        /// And slashes are merged.
        MergeSlashes = "MERGE_SLASHES",
        /// And escaped slashes are decoded before.
        DecodeAndMergeSlashes = "DECODE_AND_MERGE_SLASHES",
    }

    /// A kind of configuration.
    pub enum ConfigSourceResource {
        /// The service registry.
        ServiceRegistry = "SERVICE_REGISTRY",
    }

    /// Where a service is reachable.
    pub enum ServiceScope {
        /// In its cluster.
        Local = "LOCAL",
        /// Everywhere.
        Global = "GLOBAL",
    }

    /// A condition on a label.
    pub enum LabelSelectorOperator {
        /// Has one of the values.
        In = "In",
        /// Has none of the values.
        NotIn = "NotIn",
        /// Is there.
        Exists = "Exists",
        /// Is not there.
        DoesNotExist = "DoesNotExist",
    }
}

impl MeshConfig {
    /// Where proxies listen for captured traffic from applications.
    #[must_use]
    pub fn outbound_port(&self) -> u16 {
        self.proxy_listen_port.filter(|port| *port != 0).unwrap_or(15001)
    }

    /// Where proxies listen for captured traffic to applications.
    #[must_use]
    pub fn inbound_port(&self) -> u16 {
        self.proxy_inbound_listen_port.filter(|port| *port != 0).unwrap_or(15006)
    }

    /// Time to connect to an endpoint.
    #[must_use]
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout.unwrap_or(Duration::from_secs(10))
    }

    /// How long a proxy waits for the first bytes to guess a protocol; `None` is for ever.
    #[must_use]
    pub fn protocol_detection_timeout(&self) -> Option<Duration> {
        self.protocol_detection_timeout.filter(|timeout| !timeout.is_zero())
    }

    /// Between DNS queries.
    #[must_use]
    pub fn dns_refresh_rate(&self) -> Duration {
        self.dns_refresh_rate.unwrap_or(Duration::from_secs(60))
    }

    /// Trust domain of the identities.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        or(&self.trust_domain, "cluster.local")
    }

    /// Namespace whose policies hold everywhere.
    #[must_use]
    pub fn root_namespace(&self) -> &str {
        or(&self.root_namespace, "istio-system")
    }

    /// Mutual TLS wherever both ends have a proxy.
    #[must_use]
    pub fn auto_mtls(&self) -> bool {
        self.enable_auto_mtls.unwrap_or(true)
    }

    /// Traces and request ids.
    #[must_use]
    pub fn tracing(&self) -> bool {
        self.enable_tracing.unwrap_or(true)
    }

    /// Agents merge the application's metrics.
    #[must_use]
    pub fn prometheus_merge(&self) -> bool {
        self.enable_prometheus_merge.unwrap_or(true)
    }

    /// What happens to traffic for unknown destinations.
    #[must_use]
    pub fn outbound_traffic_mode(&self) -> OutboundTrafficPolicyMode {
        self.outbound_traffic_policy
            .as_ref()
            .map_or(OutboundTrafficPolicyMode::AllowAny, |policy| policy.mode)
    }

    /// Where traffic to applications goes.
    #[must_use]
    pub fn inbound_traffic_mode(&self) -> InboundTrafficPolicyMode {
        self.inbound_traffic_policy.as_ref().map(|policy| policy.mode).unwrap_or_default()
    }

    /// Locality preference, on unless it is switched off.
    #[must_use]
    pub fn locality_lb_enabled(&self) -> bool {
        self.locality_lb_setting.as_ref().and_then(|setting| setting.enabled).unwrap_or(true)
    }

    /// How paths are normalized.
    #[must_use]
    pub fn normalization(&self) -> NormalizationType {
        let chosen = self.path_normalization.as_ref().map(|path| path.normalization).unwrap_or_default();
        if chosen == NormalizationType::Default { NormalizationType::Base } else { chosen }
    }

    /// The retries of a route that has none: two, on errors that are safe to repeat.
    #[must_use]
    pub fn http_retry_policy(&self) -> HttpRetry {
        self.default_http_retry_policy.clone().unwrap_or_else(|| HttpRetry {
            attempts: 2,
            retry_on: "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes,503"
                .to_owned(),
            ..HttpRetry::default()
        })
    }

    /// `exportTo` of services that have none.
    #[must_use]
    pub fn service_export_to(&self) -> Vec<String> {
        or_public(&self.default_service_export_to)
    }

    /// `exportTo` of VirtualServices that have none.
    #[must_use]
    pub fn virtual_service_export_to(&self) -> Vec<String> {
        or_public(&self.default_virtual_service_export_to)
    }

    /// `exportTo` of DestinationRules that have none.
    #[must_use]
    pub fn destination_rule_export_to(&self) -> Vec<String> {
        or_public(&self.default_destination_rule_export_to)
    }

    /// The provider with this name.
    #[must_use]
    pub fn provider(&self, name: &str) -> Option<&ExtensionProvider> {
        self.extension_providers.iter().find(|provider| provider.name == name)
    }

    /// Settings of proxies, Istio's defaults where nothing is written.
    #[must_use]
    pub fn proxy_config(&self) -> ProxyConfig {
        self.default_config.clone().unwrap_or_default()
    }
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn or_public(namespaces: &[String]) -> Vec<String> {
    if namespaces.is_empty() { vec!["*".to_owned()] } else { namespaces.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_mesh_has_istios_defaults() {
        let mesh = MeshConfig::default();
        assert_eq!(mesh.trust_domain(), "cluster.local");
        assert_eq!(mesh.root_namespace(), "istio-system");
        assert_eq!(mesh.outbound_port(), 15001);
        assert_eq!(mesh.inbound_port(), 15006);
        assert_eq!(mesh.outbound_traffic_mode(), OutboundTrafficPolicyMode::AllowAny);
        assert_eq!(mesh.connect_timeout(), Duration::from_secs(10));
        assert_eq!(mesh.normalization(), NormalizationType::Base);
        assert_eq!(mesh.http_retry_policy().attempts, 2);
        assert!(mesh.auto_mtls());
        let empty = MeshConfig {
            outbound_traffic_policy: Some(MeshOutboundTrafficPolicy::default()),
            ..MeshConfig::default()
        };
        assert_eq!(empty.outbound_traffic_mode(), OutboundTrafficPolicyMode::RegistryOnly);
    }
}
