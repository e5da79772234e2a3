//! What a workload's proxy sees and listens for (`Sidecar`).

use super::{CaptureMode, ConnectionPoolSettings, Destination, LabelsSelector, Port, ServerTlsSettings};
use crate::config::decode::{enumeration, message};

message! {
    /// The configuration of the selected proxies.
    pub struct Sidecar {
        /// Workloads of the namespace; none is all of them.
        workload_selector: Option<LabelsSelector> = "workloadSelector";
        /// Listeners for traffic to the application; none is what the services say.
        ingress: Vec<IstioIngressListener> = "ingress";
        /// Listeners for traffic from the application.
        egress: Vec<IstioEgressListener> = "egress";
        /// Limits of connections to the application.
        inbound_connection_pool: Option<ConnectionPoolSettings> = "inboundConnectionPool";
        /// Where unknown destinations go; absent takes the mesh's.
        outbound_traffic_policy: Option<OutboundTrafficPolicy> = "outboundTrafficPolicy";
    }

    /// A listener for traffic to the application.
    pub struct IstioIngressListener {
        /// The port.
        port: Option<Port> = "port";
        /// Address to listen on.
        bind: String = "bind";
        /// How traffic reaches the listener.
        capture_mode: CaptureMode = "captureMode";
        /// Where the application listens: `127.0.0.1:PORT`, `0.0.0.0:PORT`, `[::1]:PORT` or `unix:///path`.
        default_endpoint: String = "defaultEndpoint";
        /// TLS instead of the mesh's.
        tls: Option<ServerTlsSettings> = "tls";
        /// Limits of connections to the application.
        connection_pool: Option<ConnectionPoolSettings> = "connectionPool";
    }

    /// A listener for traffic from the application.
    pub struct IstioEgressListener {
        /// The port; absent is every port that no other listener has.
        port: Option<Port> = "port";
        /// Address to listen on, or `unix:///path`.
        bind: String = "bind";
        /// How traffic reaches the listener.
        capture_mode: CaptureMode = "captureMode";
        /// Services that are seen, as `namespace/host`.
        hosts: Vec<String> = "hosts";
    }

    /// Where unknown destinations go, for one Sidecar.
    pub struct OutboundTrafficPolicy {
        /// Allowed or not.
        mode: OutboundTrafficPolicyMode = "mode";
        /// A gateway for unknown destinations.
        egress_proxy: Option<Destination> = "egressProxy";
    }
}

enumeration! {
    /// What happens to traffic for unknown destinations.
    pub enum OutboundTrafficPolicyMode {
        /// Refused.
        RegistryOnly = "REGISTRY_ONLY",
        /// Forwarded as it is.
        AllowAny = "ALLOW_ANY",
        /// Forwarded by the name that was asked for.
        AllowAnyDynamicDns = "ALLOW_ANY_DYNAMIC_DNS",
    }
}
