//! What proxies tell about traffic (`Telemetry`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::extension::WorkloadMode;
use super::security::ExtensionProviderName;
use super::traffic::{PolicyTargetReference, WorkloadSelector};
use crate::config::decode::{enumeration, message, oneof};

message! {
    /// Traces, metrics and access logs of workloads.
    pub struct Telemetry {
        /// Workloads; none is every workload in scope.
        selector: Option<WorkloadSelector> = "selector";
        /// The object it is attached to instead.
        target_ref: Option<PolicyTargetReference> = "targetRef" ~ "use targetRefs";
        /// The objects it is attached to instead.
        target_refs: Vec<PolicyTargetReference> = "targetRefs";
        /// Traces.
        tracing: Vec<Tracing> = "tracing";
        /// Metrics.
        metrics: Vec<Metrics> = "metrics";
        /// Access logs.
        access_logging: Vec<AccessLogging> = "accessLogging";
    }

    /// Traces.
    pub struct Tracing {
        /// Direction.
        r#match: Option<TracingSelector> = "match";
        /// Where they are sent.
        providers: Vec<ExtensionProviderName> = "providers";
        /// Share of requests in percent, 0 to 100; absent takes the wider scope's.
        random_sampling_percentage: Option<f64> = "randomSamplingPercentage";
        /// Send no spans.
        disable_span_reporting: Option<bool> = "disableSpanReporting";
        /// Do not pass on the context.
        disable_context_propagation: Option<bool> = "disableContextPropagation";
        /// Tags of the spans.
        custom_tags: BTreeMap<String, CustomTag> = "customTags";
        /// Derive the decision from the request id; absent is true.
        use_request_id_for_trace_sampling: Option<bool> = "useRequestIdForTraceSampling";
        /// Istio's own tags; absent is true.
        enable_istio_tags: Option<bool> = "enableIstioTags";
    }

    /// A direction.
    pub struct TracingSelector {
        /// The direction.
        mode: WorkloadMode = "mode";
    }

    /// A tag of a span.
    pub struct CustomTag {
    } oneof {
        /// Where its value is from.
        r#type: CustomTagType;
    }

    /// A fixed value.
    pub struct Literal {
        /// The value.
        value: String = "value";
    }

    /// A value of the proxy's environment.
    pub struct Environment {
        /// Variable.
        name: String = "name";
        /// When it is not set.
        default_value: String = "defaultValue";
    }

    /// A header of the request.
    pub struct RequestHeader {
        /// Name.
        name: String = "name";
        /// When it is missing.
        default_value: String = "defaultValue";
    }

    /// A value in Envoy's format of access logs.
    pub struct Formatter {
        /// The format.
        value: String = "value";
    }

    /// Metrics.
    pub struct Metrics {
        /// Where they are sent.
        providers: Vec<ExtensionProviderName> = "providers";
        /// Changes of single metrics.
        overrides: Vec<MetricsOverrides> = "overrides";
        /// Between reports of TCP metrics; absent is 5 s.
        reporting_interval: Option<Duration> = "reportingInterval";
    }

    /// Changes of metrics.
    pub struct MetricsOverrides {
        /// Which.
        r#match: Option<MetricSelector> = "match";
        /// Not reported.
        disabled: Option<bool> = "disabled";
        /// Changes of labels.
        tag_overrides: BTreeMap<String, TagOverride> = "tagOverrides";
    }

    /// Which metrics.
    pub struct MetricSelector {
        /// Direction.
        mode: WorkloadMode = "mode";
    } oneof {
        /// The metric.
        metric_match: MetricMatch;
    }

    /// A change of a label.
    pub struct TagOverride {
        /// What is done.
        operation: TagOverrideOperation = "operation";
        /// CEL expression of the value.
        value: String = "value";
    }

    /// Access logs.
    pub struct AccessLogging {
        /// Direction.
        r#match: Option<LogSelector> = "match";
        /// Where they are written.
        providers: Vec<ExtensionProviderName> = "providers";
        /// Not written.
        disabled: Option<bool> = "disabled";
        /// Which requests are written.
        filter: Option<AccessLogFilter> = "filter";
    }

    /// A direction.
    pub struct LogSelector {
        /// The direction.
        mode: WorkloadMode = "mode";
    }

    /// Which requests are written.
    pub struct AccessLogFilter {
        /// CEL expression; true is written.
        expression: String = "expression";
    }
}

oneof! {
    /// Where the value of a tag is from.
    pub enum CustomTagType {
        /// Fixed.
        Literal(Literal) = "literal",
        /// The proxy's environment.
        Environment(Environment) = "environment",
        /// A header.
        Header(RequestHeader) = "header",
        /// Envoy's format of access logs.
        Formatter(Formatter) = "formatter",
    }

    /// A metric.
    pub enum MetricMatch {
        /// One of Istio's.
        Metric(IstioMetric) = "metric",
        /// By name.
        CustomMetric(String) = "customMetric",
    }
}

enumeration! {
    /// Istio's metrics.
    pub enum IstioMetric {
        /// All.
        AllMetrics = "ALL_METRICS",
        /// `istio_requests_total`.
        RequestCount = "REQUEST_COUNT",
        /// `istio_request_duration_milliseconds`.
        RequestDuration = "REQUEST_DURATION",
        /// `istio_request_bytes`.
        RequestSize = "REQUEST_SIZE",
        /// `istio_response_bytes`.
        ResponseSize = "RESPONSE_SIZE",
        /// `istio_tcp_connections_opened_total`.
        TcpOpenedConnections = "TCP_OPENED_CONNECTIONS",
        /// `istio_tcp_connections_closed_total`.
        TcpClosedConnections = "TCP_CLOSED_CONNECTIONS",
        /// `istio_tcp_sent_bytes_total`.
        TcpSentBytes = "TCP_SENT_BYTES",
        /// `istio_tcp_received_bytes_total`.
        TcpReceivedBytes = "TCP_RECEIVED_BYTES",
        /// `istio_request_messages_total`.
        GrpcRequestMessages = "GRPC_REQUEST_MESSAGES",
        /// `istio_response_messages_total`.
        GrpcResponseMessages = "GRPC_RESPONSE_MESSAGES",
    }

    /// What is done with a label.
    pub enum TagOverrideOperation {
        /// Added or changed.
        Upsert = "UPSERT",
        /// Removed.
        Remove = "REMOVE",
    }
}
