//! What happens after routing (`DestinationRule`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Percent, PortSelector, WorkloadSelector};
use crate::config::decode::{enumeration, message, oneof};

message! {
    /// Policies for the clients of a host.
    pub struct DestinationRule {
        /// Host of a service; a short name belongs to the namespace of the object.
        host: String = "host";
        /// For every port and subset that does not say otherwise.
        traffic_policy: Option<TrafficPolicy> = "trafficPolicy";
        /// Named parts of the endpoints.
        subsets: Vec<Subset> = "subsets";
        /// Namespaces that see it: `*`, `.`, `~` or names; none takes the mesh's default.
        export_to: Vec<String> = "exportTo";
        /// Client workloads it holds for; none is all.
        workload_selector: Option<WorkloadSelector> = "workloadSelector";
    }

    /// How connections to a host are made.
    pub struct TrafficPolicy {
        /// Balancing.
        load_balancer: Option<LoadBalancerSettings> = "loadBalancer";
        /// Limits of connections and requests.
        connection_pool: Option<ConnectionPoolSettings> = "connectionPool";
        /// Ejection of failing endpoints.
        outlier_detection: Option<OutlierDetection> = "outlierDetection";
        /// TLS towards the endpoints.
        tls: Option<ClientTlsSettings> = "tls";
        /// Policies of single ports; such a policy replaces this one whole.
        port_level_settings: Vec<PortTrafficPolicy> = "portLevelSettings";
        /// Through an HTTP proxy.
        tunnel: Option<TunnelSettings> = "tunnel";
        /// PROXY protocol towards the endpoints.
        proxy_protocol: Option<ProxyProtocol> = "proxyProtocol";
        /// Retries in proportion to active requests.
        retry_budget: Option<RetryBudget> = "retryBudget";
    }

    /// The policy of one port.
    pub struct PortTrafficPolicy {
        /// The port of the service.
        port: Option<PortSelector> = "port";
        /// Balancing.
        load_balancer: Option<LoadBalancerSettings> = "loadBalancer";
        /// Limits of connections and requests.
        connection_pool: Option<ConnectionPoolSettings> = "connectionPool";
        /// Ejection of failing endpoints.
        outlier_detection: Option<OutlierDetection> = "outlierDetection";
        /// TLS towards the endpoints.
        tls: Option<ClientTlsSettings> = "tls";
    }

    /// TCP egress through an HTTP proxy.
    pub struct TunnelSettings {
        /// `CONNECT` or `POST`; empty is `CONNECT`.
        protocol: String = "protocol";
        /// Host the proxy connects to.
        target_host: String = "targetHost";
        /// Port the proxy connects to.
        target_port: u16 = "targetPort";
    }

    /// PROXY protocol.
    pub struct ProxyProtocol {
        /// Version.
        version: ProxyProtocolVersion = "version";
    }

    /// Limits retries in proportion to active requests.
    pub struct RetryBudget {
        /// Share of active requests in percent; absent is 20.
        percent: Option<Percent> = "percent";
        /// The budget never falls below; absent is 3.
        min_retry_concurrency: u32 = "minRetryConcurrency";
        /// Over what time active requests are counted.
        budget_interval: Option<Duration> = "budgetInterval";
    }

    /// A named part of the endpoints.
    pub struct Subset {
        /// Name, as routes use it.
        name: String = "name";
        /// Labels that the endpoints must have.
        labels: BTreeMap<String, String> = "labels";
        /// For this subset instead of the host's, block by block.
        traffic_policy: Option<TrafficPolicy> = "trafficPolicy";
    }

    /// Balancing.
    pub struct LoadBalancerSettings {
        /// Locality preference; overrides the mesh's.
        locality_lb_setting: Option<LocalityLbSetting> = "localityLbSetting";
        /// Slow start.
        warmup_duration_secs: Option<Duration> = "warmupDurationSecs" ~ "use warmup";
        /// Slow start.
        warmup: Option<WarmupConfiguration> = "warmup";
        /// Zone-aware routing.
        zone_aware_lb_setting: Option<ZoneAwareLbSetting> = "zoneAwareLbSetting";
    } oneof {
        /// The algorithm.
        lb_policy: LbPolicy;
    }

    /// Balancing by a hash of the request.
    pub struct ConsistentHashLb {
        /// Smallest number of ring entries.
        minimum_ring_size: Option<u64> = "minimumRingSize" ~ "use ringHash.minimumRingSize";
    } oneof {
        /// What is hashed.
        hash_key: HashKey;
        /// How the hash chooses.
        hash_algorithm: HashAlgorithm;
    }

    /// A cookie to hash; made when `ttl` is set and it is missing.
    pub struct HttpCookie {
        /// Name.
        name: String = "name";
        /// Path.
        path: String = "path";
        /// Lifetime; 0 is a session cookie.
        ttl: Option<Duration> = "ttl";
        /// Further attributes.
        attributes: Vec<HttpCookieAttribute> = "attributes";
    }

    /// An attribute of a cookie.
    pub struct HttpCookieAttribute {
        /// Name.
        name: String = "name";
        /// Value.
        value: String = "value";
    }

    /// Ring hash.
    pub struct RingHash {
        /// Smallest number of ring entries; absent is 1024.
        minimum_ring_size: Option<u64> = "minimumRingSize";
    }

    /// Maglev.
    pub struct MagLev {
        /// Size of the table, a prime; absent is 65537.
        table_size: Option<u64> = "tableSize";
    }

    /// Slow start of new endpoints.
    pub struct WarmupConfiguration {
        /// How long.
        duration: Option<Duration> = "duration";
        /// Smallest share of the full weight in percent; absent is 10.
        minimum_percent: Option<f64> = "minimumPercent";
        /// Shape of the ramp, at least 1; absent is 1.
        aggression: Option<f64> = "aggression";
    }

    /// Limits of connections and requests.
    pub struct ConnectionPoolSettings {
        /// For HTTP and TCP.
        tcp: Option<TcpSettings> = "tcp";
        /// For HTTP.
        http: Option<HttpSettings> = "http";
    }

    /// Limits of connections.
    pub struct TcpSettings {
        /// Most connections; absent is 4294967295.
        max_connections: Option<i32> = "maxConnections";
        /// Time to connect; absent takes the mesh's, 10 s.
        connect_timeout: Option<Duration> = "connectTimeout";
        /// Keepalive probes.
        tcp_keepalive: Option<TcpKeepalive> = "tcpKeepalive";
        /// Longest life of a connection.
        max_connection_duration: Option<Duration> = "maxConnectionDuration";
        /// Longest idle time of a TCP connection; absent is 1 h.
        idle_timeout: Option<Duration> = "idleTimeout";
    }

    /// Keepalive probes; absent fields take the system's.
    pub struct TcpKeepalive {
        /// Unanswered probes before the connection is dead.
        probes: u32 = "probes";
        /// Idle time before the first probe.
        time: Option<Duration> = "time";
        /// Between probes.
        interval: Option<Duration> = "interval";
    }

    /// Limits of requests.
    pub struct HttpSettings {
        /// Most requests that wait for a connection.
        http1_max_pending_requests: Option<i32> = "http1MaxPendingRequests";
        /// Most requests at once.
        http2_max_requests: Option<i32> = "http2MaxRequests";
        /// Requests before a connection is closed; 0 is no limit.
        max_requests_per_connection: Option<i32> = "maxRequestsPerConnection";
        /// Most retries at once.
        max_retries: Option<i32> = "maxRetries";
        /// Longest idle time of a connection; absent is 1 h.
        idle_timeout: Option<Duration> = "idleTimeout";
        /// Whether connections become HTTP/2.
        h2_upgrade_policy: H2UpgradePolicy = "h2UpgradePolicy";
        /// Speak what the client speaks.
        use_client_protocol: bool = "useClientProtocol";
        /// Most streams of one HTTP/2 connection.
        max_concurrent_streams: Option<i32> = "maxConcurrentStreams";
        /// PINGs on HTTP/2 connections.
        http2_keep_alive: Option<Http2KeepAlive> = "http2KeepAlive";
    }

    /// PINGs on HTTP/2 connections.
    pub struct Http2KeepAlive {
        /// Between PINGs.
        interval: Option<Duration> = "interval";
        /// Time to answer.
        timeout: Option<Duration> = "timeout";
    }

    /// Ejection of failing endpoints.
    pub struct OutlierDetection {
        /// Errors in a row.
        consecutive_errors: i32 = "consecutiveErrors" ~ "use consecutive5xxErrors or consecutiveGatewayErrors";
        /// Count errors made here and there apart.
        split_external_local_origin_errors: bool = "splitExternalLocalOriginErrors";
        /// Errors in a row made here; absent is 5.
        consecutive_local_origin_failures: Option<u32> = "consecutiveLocalOriginFailures";
        /// 502, 503 and 504 in a row; absent or 0 is off.
        consecutive_gateway_errors: Option<u32> = "consecutiveGatewayErrors";
        /// 5xx in a row; absent is 5, 0 is off.
        consecutive_5xx_errors: Option<u32> = "consecutive5xxErrors";
        /// Between sweeps; absent is 10 s.
        interval: Option<Duration> = "interval";
        /// Ejection time, multiplied by the number of ejections; absent is 30 s.
        base_ejection_time: Option<Duration> = "baseEjectionTime";
        /// Most endpoints ejected at once, in percent; 0 is the default of 10.
        max_ejection_percent: i32 = "maxEjectionPercent";
        /// Below this share of healthy endpoints all are used, in percent.
        min_health_percent: i32 = "minHealthPercent";
        /// What counts as an error instead of 5xx: `500`, `429`, `500-599`.
        outlier_detection_http_error_codes: Vec<String> = "outlierDetectionHttpErrorCodes";
    }

    /// TLS towards the endpoints.
    pub struct ClientTlsSettings {
        /// Which kind of TLS.
        mode: ClientTlsMode = "mode";
        /// File of the client's certificate.
        client_certificate: String = "clientCertificate";
        /// File of the client's key.
        private_key: String = "privateKey";
        /// File of the accepted authorities.
        ca_certificates: String = "caCertificates";
        /// Secret with certificate, key and authorities.
        credential_name: String = "credentialName";
        /// Names of which the server's certificate must have one.
        subject_alt_names: Vec<String> = "subjectAltNames";
        /// Server name; empty is the request's host.
        sni: String = "sni";
        /// Accept any certificate.
        insecure_skip_verify: Option<bool> = "insecureSkipVerify";
        /// File of revoked certificates.
        ca_crl: String = "caCrl";
    }

    /// Locality preference.
    pub struct LocalityLbSetting {
        /// Shares by locality.
        distribute: Vec<Distribute> = "distribute";
        /// Where to go when a region fails.
        failover: Vec<Failover> = "failover";
        /// Labels by which endpoints are ranked.
        failover_priority: Vec<String> = "failoverPriority";
        /// On or off; absent takes the mesh's.
        enabled: Option<bool> = "enabled";
    }

    /// Zone-aware routing.
    pub struct ZoneAwareLbSetting {
        /// Where to go when a region fails.
        failover: Vec<Failover> = "failover";
        /// Labels by which endpoints are ranked.
        failover_priority: Vec<String> = "failoverPriority";
        /// On or off; absent takes the mesh's.
        enabled: Option<bool> = "enabled";
        /// Fewest endpoints for which zones matter; absent is 6.
        min_cluster_size: Option<u64> = "minClusterSize";
    }

    /// Shares of the traffic that comes from one locality.
    pub struct Distribute {
        /// `region/zone/subzone`, each may be `*` at the end.
        from: String = "from";
        /// Locality to percent; together 100.
        to: BTreeMap<String, u32> = "to";
    }

    /// Where the traffic of a region goes when it fails.
    pub struct Failover {
        /// Region.
        from: String = "from";
        /// Region.
        to: String = "to";
    }
}

enumeration! {
    /// Version of the PROXY protocol.
    pub enum ProxyProtocolVersion {
        /// Text.
        V1 = "V1",
        /// Binary.
        V2 = "V2",
    }

    /// An algorithm that needs no settings.
    pub enum SimpleLb {
        /// The default: least requests.
        Unspecified = "UNSPECIFIED",
        /// Old name of least requests.
        LeastConn = "LEAST_CONN",
        /// At random.
        Random = "RANDOM",
        /// The address that the client asked for.
        Passthrough = "PASSTHROUGH",
        /// One after the other.
        RoundRobin = "ROUND_ROBIN",
        /// The one of two with fewer requests.
        LeastRequest = "LEAST_REQUEST",
    }

    /// Whether HTTP/1.1 connections become HTTP/2.
    pub enum H2UpgradePolicy {
        /// As the mesh says.
        Default = "DEFAULT",
        /// No.
        DoNotUpgrade = "DO_NOT_UPGRADE",
        /// Yes.
        Upgrade = "UPGRADE",
    }

    /// Which kind of TLS a client speaks.
    pub enum ClientTlsMode {
        /// None.
        Disable = "DISABLE",
        /// TLS without a client certificate.
        Simple = "SIMPLE",
        /// TLS with the given client certificate.
        Mutual = "MUTUAL",
        /// TLS with the workload's certificate.
        IstioMutual = "ISTIO_MUTUAL",
    }
}

oneof! {
    /// The algorithm of balancing.
    pub enum LbPolicy {
        /// Without settings.
        Simple(SimpleLb) = "simple",
        /// By a hash of the request.
        ConsistentHash(ConsistentHashLb) = "consistentHash",
    }

    /// What is hashed.
    pub enum HashKey {
        /// A header.
        HttpHeaderName(String) = "httpHeaderName",
        /// A cookie.
        HttpCookie(HttpCookie) = "httpCookie",
        /// The client's address.
        UseSourceIp(bool) = "useSourceIp",
        /// A parameter of the query.
        HttpQueryParameterName(String) = "httpQueryParameterName",
    }

    /// How the hash chooses an endpoint.
    pub enum HashAlgorithm {
        /// Ring hash.
        RingHash(RingHash) = "ringHash",
        /// Maglev.
        Maglev(MagLev) = "maglev",
    }
}
