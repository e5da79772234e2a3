//! Settings of proxies (`defaultConfig`, and the annotation `proxy.istio.io/config`).

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::config::decode::{enumeration, message, oneof};
use crate::model::extension::ProxyImage;
use crate::model::traffic::{ClientTlsSettings, TcpKeepalive};
use crate::model::workload::ReadinessProbe;

message! {
    /// Settings of proxies; most take effect at their start.
    pub struct ProxyConfig {
        /// Folder of generated files.
        config_path: String = "configPath";
        /// The proxy's program.
        binary_path: String = "binaryPath";
        /// Time for old connections at a hot restart; absent is 45 s.
        drain_duration: Option<Duration> = "drainDuration";
        /// Address of istiod.
        discovery_address: String = "discoveryAddress";
        /// Between queries.
        discovery_refresh_delay: Option<Duration> = "discoveryRefreshDelay" ~ "it has no effect";
        /// Address of Zipkin.
        zipkin_address: String = "zipkinAddress" ~ "use tracing.zipkin";
        /// Address of statsd.
        statsd_udp_address: String = "statsdUdpAddress";
        /// Address of a metrics service.
        envoy_metrics_service_address: String = "envoyMetricsServiceAddress" ~ "use envoyMetricsService";
        /// The admin port; absent is 15000.
        proxy_admin_port: Option<u16> = "proxyAdminPort";
        /// Where the proxy runs.
        availability_zone: String = "availabilityZone" ~ "it has no effect";
        /// How istiod is authenticated.
        control_plane_auth_policy: AuthenticationPolicy = "controlPlaneAuthPolicy";
        /// A bootstrap file of your own.
        custom_config_file: String = "customConfigFile";
        /// Longest name of a statistic; absent is 189.
        stat_name_length: Option<i32> = "statNameLength";
        /// Worker threads; absent follows the CPU limit, 0 is one for each core.
        concurrency: Option<i32> = "concurrency";
        /// Template of the bootstrap file.
        proxy_bootstrap_template_path: String = "proxyBootstrapTemplatePath";
        /// How traffic is captured.
        interception_mode: InboundInterceptionMode = "interceptionMode";
        /// Traces.
        tracing: Option<ProxyTracing> = "tracing";
        /// SDS, as written.
        sds: Option<Value> = "sds" ~ "it has no effect";
        /// Access log over gRPC.
        envoy_access_log_service: Option<RemoteService> = "envoyAccessLogService";
        /// Metrics over gRPC.
        envoy_metrics_service: Option<RemoteService> = "envoyMetricsService";
        /// Variables of the proxy's environment.
        proxy_metadata: BTreeMap<String, String> = "proxyMetadata";
        /// Envoy's runtime.
        runtime_values: BTreeMap<String, String> = "runtimeValues";
        /// The agent's port; absent is 15020.
        status_port: Option<u16> = "statusPort";
        /// Labels that metrics get besides Istio's.
        extra_stat_tags: Vec<String> = "extraStatTags";
        /// What is in front of gateways.
        gateway_topology: Option<Topology> = "gatewayTopology";
        /// Time for open connections at the end; absent is 5 s.
        termination_drain_duration: Option<Duration> = "terminationDrainDuration";
        /// The mesh's id; empty is the trust domain.
        mesh_id: String = "meshId";
        /// How agents check the application.
        readiness_probe: Option<ReadinessProbe> = "readinessProbe";
        /// Which statistics are kept.
        proxy_stats_matcher: Option<ProxyStatsMatcher> = "proxyStatsMatcher";
        /// Start applications after the proxy.
        hold_application_until_proxy_starts: Option<bool> = "holdApplicationUntilProxyStarts";
        /// Further roots.
        ca_certificates_pem: Vec<String> = "caCertificatesPem";
        /// The proxy's image.
        image: Option<ProxyImage> = "image";
        /// Private keys in hardware.
        private_key_provider: Option<PrivateKeyProvider> = "privateKeyProvider";
        /// Headers that proxies add.
        proxy_headers: Option<ProxyHeaders> = "proxyHeaders";
        /// Between writes of the access log; absent is 1 s.
        file_flush_interval: Option<Duration> = "fileFlushInterval";
        /// Write the access log above this size in KiB; absent is 64.
        file_flush_min_size_kb: Option<u32> = "fileFlushMinSizeKb";
        /// Compress statistics; absent is true.
        stats_compression: Option<bool> = "statsCompression";
        /// Limits of connections, as written.
        connection_settings: Option<Value> = "connectionSettings";
    }

    /// Traces.
    pub struct ProxyTracing {
        /// Tags of the spans.
        custom_tags: BTreeMap<String, TracingCustomTag> = "customTags";
        /// Longest path in a span; 0 is 256.
        max_path_tag_length: u32 = "maxPathTagLength";
        /// Share of requests in percent; absent is 1.
        sampling: Option<f64> = "sampling";
        /// TLS towards the system.
        tls_settings: Option<ClientTlsSettings> = "tlsSettings";
        /// Istio's own tags; absent is true.
        enable_istio_tags: Option<bool> = "enableIstioTags";
    } oneof {
        /// Where they are sent.
        tracer: Tracer;
    }

    /// Zipkin.
    pub struct ZipkinTracer {
        /// Address with port.
        address: String = "address";
    }

    /// Lightstep.
    pub struct LightstepTracer {
        /// Address with port.
        address: String = "address";
        /// Token.
        access_token: String = "accessToken";
    }

    /// Datadog.
    pub struct DatadogTracer {
        /// Address with port.
        address: String = "address";
    }

    /// Google's operations suite.
    pub struct StackdriverTracer {
        /// Print traces.
        debug: bool = "debug";
        /// Most attributes of a span.
        max_number_of_attributes: Option<i64> = "maxNumberOfAttributes";
        /// Most annotations of a span.
        max_number_of_annotations: Option<i64> = "maxNumberOfAnnotations";
        /// Most events of a span.
        max_number_of_message_events: Option<i64> = "maxNumberOfMessageEvents";
    }

    /// OpenCensus.
    pub struct OpenCensusTracer {
        /// Address with port.
        address: String = "address";
        /// Which headers carry the context.
        context: Vec<super::OpenCensusTraceContext> = "context";
    }

    /// A tag of a span.
    pub struct TracingCustomTag {
    } oneof {
        /// Where its value is from.
        r#type: TracingCustomTagType;
    }

    /// A fixed value.
    pub struct TracingLiteral {
        /// The value.
        value: String = "value";
    }

    /// A named value with a default.
    pub struct TracingNamed {
        /// The name.
        name: String = "name";
        /// When there is none.
        default_value: String = "defaultValue";
    }

    /// A gRPC service.
    pub struct RemoteService {
        /// Address with port.
        address: String = "address";
        /// TLS towards it.
        tls_settings: Option<ClientTlsSettings> = "tlsSettings";
        /// Keepalive.
        tcp_keepalive: Option<TcpKeepalive> = "tcpKeepalive";
    }

    /// What is in front of gateways.
    pub struct Topology {
        /// How many trusted proxies are in front.
        num_trusted_proxies: u32 = "numTrustedProxies";
        /// What happens to `x-forwarded-client-cert`.
        forward_client_cert_details: ForwardClientCertDetails = "forwardClientCertDetails";
        /// PROXY protocol from the load balancer.
        proxy_protocol: Option<super::Empty> = "proxyProtocol";
    }

    /// Which statistics are kept besides Istio's.
    pub struct ProxyStatsMatcher {
        /// By prefix.
        inclusion_prefixes: Vec<String> = "inclusionPrefixes";
        /// By suffix.
        inclusion_suffixes: Vec<String> = "inclusionSuffixes";
        /// By expression.
        inclusion_regexps: Vec<String> = "inclusionRegexps";
    }

    /// Private keys in hardware.
    pub struct PrivateKeyProvider {
    } oneof {
        /// Which hardware.
        provider: PrivateKeyProviderKind;
    }

    /// Settings of such hardware.
    pub struct PrivateKeyHardware {
        /// Longest wait for a batch.
        poll_delay: Option<Duration> = "pollDelay";
        /// Work without the hardware.
        fallback: Option<bool> = "fallback";
    }

    /// Headers that proxies add.
    pub struct ProxyHeaders {
        /// `x-forwarded-for`.
        forwarded_for: Option<DisabledHeader> = "forwardedFor";
        /// `x-forwarded-client-cert`.
        set_current_client_cert_details: Option<ClientCertDetails> = "setCurrentClientCertDetails";
        /// `x-request-id`.
        request_id: Option<DisabledHeader> = "requestId";
        /// `server`.
        server: Option<ServerHeader> = "server";
        /// `x-envoy-attempt-count`.
        attempt_count: Option<DisabledHeader> = "attemptCount";
        /// Envoy's debug headers.
        envoy_debug_headers: Option<DisabledHeader> = "envoyDebugHeaders";
        /// The headers that tell the peer's workload.
        metadata_exchange_headers: Option<MetadataExchangeHeaders> = "metadataExchangeHeaders";
        /// Keep upper and lower case of HTTP/1.1 headers.
        preserve_http1_header_case: Option<bool> = "preserveHttp1HeaderCase";
        /// `x-forwarded-host`.
        x_forwarded_host: Option<EnabledHeader> = "xForwardedHost";
        /// `x-forwarded-port`.
        x_forwarded_port: Option<EnabledHeader> = "xForwardedPort";
    }

    /// A header that can be switched off.
    pub struct DisabledHeader {
        /// Off.
        disabled: Option<bool> = "disabled";
    }

    /// A header that can be switched on.
    pub struct EnabledHeader {
        /// On.
        enabled: Option<bool> = "enabled";
    }

    /// The header `server`.
    pub struct ServerHeader {
        /// Off.
        disabled: Option<bool> = "disabled";
        /// Its value; empty is `istio-envoy`.
        value: String = "value";
    }

    /// What `x-forwarded-client-cert` says.
    pub struct ClientCertDetails {
        /// The subject.
        subject: Option<bool> = "subject";
        /// The certificate.
        cert: Option<bool> = "cert";
        /// The chain.
        chain: Option<bool> = "chain";
        /// The DNS names.
        dns: Option<bool> = "dns";
        /// The URI.
        uri: Option<bool> = "uri";
    }

    /// The headers that tell the peer's workload.
    pub struct MetadataExchangeHeaders {
        /// Where.
        mode: MetadataExchangeMode = "mode";
    }
}

oneof! {
    /// Where traces are sent.
    pub enum Tracer {
        /// Zipkin.
        Zipkin(ZipkinTracer) = "zipkin",
        /// Lightstep.
        Lightstep(LightstepTracer) = "lightstep",
        /// Datadog.
        Datadog(DatadogTracer) = "datadog",
        /// Google's operations suite.
        Stackdriver(StackdriverTracer) = "stackdriver",
        /// OpenCensus.
        OpenCensusAgent(OpenCensusTracer) = "openCensusAgent",
    }

    /// Where the value of a tag is from.
    pub enum TracingCustomTagType {
        /// Fixed.
        Literal(TracingLiteral) = "literal",
        /// The proxy's environment.
        Environment(TracingNamed) = "environment",
        /// A header.
        Header(TracingNamed) = "header",
        /// Envoy's format of access logs.
        Formatter(TracingLiteral) = "formatter",
    }

    /// Which hardware keeps private keys.
    pub enum PrivateKeyProviderKind {
        /// AVX-512 instructions.
        Cryptomb(PrivateKeyHardware) = "cryptomb",
        /// QuickAssist.
        Qat(PrivateKeyHardware) = "qat",
    }
}

enumeration! {
    /// How istiod is authenticated.
    pub enum AuthenticationPolicy {
        /// Not at all.
        None = "NONE",
        /// By mutual TLS.
        MutualTls = "MUTUAL_TLS",
        /// As the wider scope says.
        Inherit = "INHERIT",
    }

    /// How traffic to the application is captured.
    pub enum InboundInterceptionMode {
        /// By redirection.
        Redirect = "REDIRECT",
        /// By TPROXY, which keeps the client's address.
        Tproxy = "TPROXY",
        /// Not at all.
        None = "NONE",
    }

    /// What happens to `x-forwarded-client-cert`.
    pub enum ForwardClientCertDetails {
        /// As Istio does.
        Undefined = "UNDEFINED",
        /// Removed.
        Sanitize = "SANITIZE",
        /// Passed on.
        ForwardOnly = "FORWARD_ONLY",
        /// Extended.
        AppendForward = "APPEND_FORWARD",
        /// Replaced.
        SanitizeSet = "SANITIZE_SET",
        /// Passed on without a look.
        AlwaysForwardOnly = "ALWAYS_FORWARD_ONLY",
    }

    /// Where the headers go that tell the peer's workload.
    pub enum MetadataExchangeMode {
        /// Everywhere.
        Undefined = "UNDEFINED",
        /// Only inside the mesh.
        InMesh = "IN_MESH",
    }
}

impl ProxyConfig {
    /// Time for open connections at the end.
    #[must_use]
    pub fn termination_drain_duration(&self) -> Duration {
        self.termination_drain_duration.unwrap_or(Duration::from_secs(5))
    }

    /// The agent's port.
    #[must_use]
    pub fn status_port(&self) -> u16 {
        self.status_port.unwrap_or(15020)
    }

    /// The proxy's admin port.
    #[must_use]
    pub fn proxy_admin_port(&self) -> u16 {
        self.proxy_admin_port.unwrap_or(15000)
    }

    /// Share of requests that are traced, in percent.
    #[must_use]
    pub fn sampling(&self) -> f64 {
        self.tracing.as_ref().and_then(|tracing| tracing.sampling).unwrap_or(1.0)
    }
}
