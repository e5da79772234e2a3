//! Machines as members of the mesh (`WorkloadEntry`, `WorkloadGroup`).

use std::collections::BTreeMap;

use crate::config::decode::{message, oneof};

message! {
    /// One workload that no platform announces.
    pub struct WorkloadEntry {
        /// IP address, DNS name or `unix:///path`.
        address: String = "address";
        /// Service port name to port of the workload.
        ports: BTreeMap<String, u16> = "ports";
        /// Labels.
        labels: BTreeMap<String, String> = "labels";
        /// Network it is reachable in.
        network: String = "network";
        /// `region/zone/subzone`.
        locality: String = "locality";
        /// Share of the traffic relative to the other endpoints; 0 is 1.
        weight: u32 = "weight";
        /// Service account, from which its identity follows.
        service_account: String = "serviceAccount";
    }

    /// What the workloads have in common that register for it.
    pub struct WorkloadGroup {
        /// Labels and annotations of their entries.
        metadata: Option<WorkloadGroupMetadata> = "metadata";
        /// What their entries are made from.
        template: Option<WorkloadEntry> = "template";
        /// How their agents check the application.
        probe: Option<ReadinessProbe> = "probe";
    }

    /// Labels and annotations of the entries of a group.
    pub struct WorkloadGroupMetadata {
        /// Labels.
        labels: BTreeMap<String, String> = "labels";
        /// Annotations.
        annotations: BTreeMap<String, String> = "annotations";
    }

    /// A check whether an application is ready, as Kubernetes has it.
    pub struct ReadinessProbe {
        /// Before the first check, in seconds.
        initial_delay_seconds: i32 = "initialDelaySeconds";
        /// Time for one check in seconds; 0 is 1.
        timeout_seconds: i32 = "timeoutSeconds";
        /// Between checks in seconds; 0 is 10.
        period_seconds: i32 = "periodSeconds";
        /// Successes in a row after a failure; 0 is 1.
        success_threshold: i32 = "successThreshold";
        /// Failures in a row; 0 is 3.
        failure_threshold: i32 = "failureThreshold";
    } oneof {
        /// How it is checked.
        health_check_method: HealthCheckMethod;
    }

    /// A check by HTTP.
    pub struct HttpHealthCheckConfig {
        /// Path; empty is `/`.
        path: String = "path";
        /// Port.
        port: u16 = "port";
        /// Host to connect to; empty is this machine.
        host: String = "host";
        /// `HTTP` (when empty) or `HTTPS`.
        scheme: String = "scheme";
        /// Headers of the request.
        http_headers: Vec<HttpHeader> = "httpHeaders";
    }

    /// A header.
    pub struct HttpHeader {
        /// Name.
        name: String = "name";
        /// Value.
        value: String = "value";
    }

    /// A check by connecting.
    pub struct TcpHealthCheckConfig {
        /// Host; empty is this machine.
        host: String = "host";
        /// Port.
        port: u16 = "port";
    }

    /// A check by running a command; 0 is healthy.
    pub struct ExecHealthCheckConfig {
        /// The program and its arguments; no shell.
        command: Vec<String> = "command";
    }

    /// A check by `grpc.health.v1.Health`.
    pub struct GrpcHealthCheckConfig {
        /// Port.
        port: u16 = "port";
        /// Service to ask for.
        service: String = "service";
    }
}

oneof! {
    /// How an application is checked.
    pub enum HealthCheckMethod {
        /// By HTTP.
        HttpGet(HttpHealthCheckConfig) = "httpGet",
        /// By connecting.
        TcpSocket(TcpHealthCheckConfig) = "tcpSocket",
        /// By a command.
        Exec(ExecHealthCheckConfig) = "exec",
        /// By gRPC.
        Grpc(GrpcHealthCheckConfig) = "grpc",
    }
}
