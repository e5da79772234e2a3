//! Systems outside the mesh that proxies talk to (`extensionProviders`).

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::config::decode::{enumeration, message, oneof};

message! {
    /// A system that objects name.
    pub struct ExtensionProvider {
        /// Its name.
        name: String = "name";
    } oneof {
        /// What it is.
        provider: Provider;
    }

    /// How much of a request's body is sent along.
    pub struct ExtAuthzRequestBody {
        /// At most, in bytes.
        max_request_bytes: u32 = "maxRequestBytes";
        /// Cut longer bodies instead of refusing them.
        allow_partial_message: bool = "allowPartialMessage";
        /// As bytes, not as text; gRPC only.
        pack_as_bytes: bool = "packAsBytes";
    }

    /// External authorization over HTTP.
    pub struct EnvoyExtAuthzHttp {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Time to answer; absent is 600 s.
        timeout: Option<Duration> = "timeout";
        /// Put before the path.
        path_prefix: String = "pathPrefix";
        /// Allow when there is no answer.
        fail_open: bool = "failOpen";
        /// Status when there is no answer; empty is 403.
        status_on_error: String = "statusOnError";
        /// Headers that are sent along.
        include_headers_in_check: Vec<String> = "includeHeadersInCheck" ~ "use includeRequestHeadersInCheck";
        /// Headers that are sent along.
        include_request_headers_in_check: Vec<String> = "includeRequestHeadersInCheck";
        /// Headers that are added.
        include_additional_headers_in_check: BTreeMap<String, String> = "includeAdditionalHeadersInCheck";
        /// The body.
        include_request_body_in_check: Option<ExtAuthzRequestBody> = "includeRequestBodyInCheck";
        /// Headers of the answer for the application.
        headers_to_upstream_on_allow: Vec<String> = "headersToUpstreamOnAllow";
        /// Headers of a refusal for the client.
        headers_to_downstream_on_deny: Vec<String> = "headersToDownstreamOnDeny";
        /// Headers of the answer for the client.
        headers_to_downstream_on_allow: Vec<String> = "headersToDownstreamOnAllow";
        /// Choose the route again afterwards.
        clear_route_cache: bool = "clearRouteCache";
    }

    /// External authorization over gRPC.
    pub struct EnvoyExtAuthzGrpc {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Time to answer; absent is 600 s.
        timeout: Option<Duration> = "timeout";
        /// Allow when there is no answer.
        fail_open: bool = "failOpen";
        /// Status when there is no answer; empty is 403.
        status_on_error: String = "statusOnError";
        /// The body.
        include_request_body_in_check: Option<ExtAuthzRequestBody> = "includeRequestBodyInCheck";
        /// Choose the route again afterwards.
        clear_route_cache: bool = "clearRouteCache";
    }

    /// Traces for Zipkin.
    pub struct ZipkinProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Longest path in a span.
        max_tag_length: u32 = "maxTagLength";
        /// Short trace ids.
        enable_64bit_trace_id: bool = "enable64bitTraceId";
        /// Path of the collector; empty is `/api/v2/spans`.
        path: String = "path";
        /// Which headers carry the context.
        trace_context_option: ZipkinTraceContext = "traceContextOption";
        /// Time to answer.
        timeout: Option<Duration> = "timeout";
        /// Headers that are added.
        headers: Vec<ProviderHeader> = "headers";
    }

    /// Traces for Lightstep.
    pub struct LightstepProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Token.
        access_token: String = "accessToken";
        /// Longest path in a span.
        max_tag_length: u32 = "maxTagLength";
    }

    /// Traces for Datadog.
    pub struct DatadogProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Longest path in a span.
        max_tag_length: u32 = "maxTagLength";
    }

    /// Google's operations suite.
    pub struct StackdriverProvider {
        /// Print traces.
        debug: bool = "debug" ~ "it has no effect";
        /// Most attributes of a span.
        max_number_of_attributes: Option<i64> = "maxNumberOfAttributes" ~ "it has no effect";
        /// Most annotations of a span.
        max_number_of_annotations: Option<i64> = "maxNumberOfAnnotations" ~ "it has no effect";
        /// Most events of a span.
        max_number_of_message_events: Option<i64> = "maxNumberOfMessageEvents" ~ "it has no effect";
        /// Longest path in a span.
        max_tag_length: u32 = "maxTagLength";
        /// Logs.
        logging: Option<StackdriverLogging> = "logging";
    }

    /// Logs for Google's operations suite.
    pub struct StackdriverLogging {
        /// Names and CEL expressions.
        labels: BTreeMap<String, String> = "labels";
    }

    /// Traces for an OpenCensus agent.
    pub struct OpenCensusProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Which headers carry the context.
        context: Vec<OpenCensusTraceContext> = "context";
        /// Longest path in a span.
        max_tag_length: u32 = "maxTagLength";
    }

    /// Traces for SkyWalking.
    pub struct SkyWalkingProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Token.
        access_token: String = "accessToken";
    }

    /// Traces over OTLP.
    pub struct OpenTelemetryProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Longest path in a span.
        max_tag_length: u32 = "maxTagLength";
        /// Over HTTP; absent is gRPC.
        http: Option<ProviderHttpService> = "http";
        /// Over gRPC.
        grpc: Option<ProviderGrpcService> = "grpc";
        /// What describes the process.
        resource_detectors: Option<ResourceDetectors> = "resourceDetectors";
        /// A sampler of Dynatrace, as written.
        dynatrace_sampler: Option<Value> = "dynatraceSampler";
    }

    /// How a system is asked over HTTP.
    pub struct ProviderHttpService {
        /// Path.
        path: String = "path";
        /// Time to answer; absent is 3 s.
        timeout: Option<Duration> = "timeout";
        /// Headers that are added.
        headers: Vec<ProviderHeader> = "headers";
    }

    /// How a system is asked over gRPC.
    pub struct ProviderGrpcService {
        /// Time to answer.
        timeout: Option<Duration> = "timeout";
        /// Metadata that is added.
        initial_metadata: Vec<ProviderHeader> = "initialMetadata";
    }

    /// A header that is added.
    pub struct ProviderHeader {
        /// Name.
        name: String = "name";
        /// Value.
        value: String = "value";
        /// Variable of the proxy's environment with the value.
        env_name: String = "envName";
    }

    /// What describes the process.
    pub struct ResourceDetectors {
        /// The variable `OTEL_RESOURCE_ATTRIBUTES`.
        environment: Option<Empty> = "environment";
        /// The files of Dynatrace.
        dynatrace: Option<Empty> = "dynatrace";
    }

    /// Something that has no settings.
    pub struct Empty {
    }

    /// Access log in a file.
    pub struct EnvoyFileAccessLogProvider {
        /// File; empty is `/dev/stdout`.
        path: String = "path";
        /// Format.
        log_format: Option<LogFormat> = "logFormat";
        /// Leave out fields without a value.
        omit_empty_values: bool = "omitEmptyValues";
    }

    /// A format of access logs.
    pub struct LogFormat {
    } oneof {
        /// Text or JSON.
        log_format: LogFormatKind;
    }

    /// Access log of HTTP over gRPC.
    pub struct EnvoyHttpGrpcV3LogProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Name of the log.
        log_name: String = "logName";
        /// Filter state.
        filter_state_objects_to_log: Vec<String> = "filterStateObjectsToLog";
        /// Headers of requests.
        additional_request_headers_to_log: Vec<String> = "additionalRequestHeadersToLog";
        /// Headers of responses.
        additional_response_headers_to_log: Vec<String> = "additionalResponseHeadersToLog";
        /// Trailers of responses.
        additional_response_trailers_to_log: Vec<String> = "additionalResponseTrailersToLog";
    }

    /// Access log of TCP over gRPC.
    pub struct EnvoyTcpGrpcV3LogProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Name of the log.
        log_name: String = "logName";
        /// Filter state.
        filter_state_objects_to_log: Vec<String> = "filterStateObjectsToLog";
    }

    /// Access log over OTLP.
    pub struct EnvoyOpenTelemetryLogProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Name of the log.
        log_name: String = "logName";
        /// Format.
        log_format: Option<OpenTelemetryLogFormat> = "logFormat";
    }

    /// A format of access logs over OTLP.
    pub struct OpenTelemetryLogFormat {
        /// The body.
        text: String = "text";
        /// The attributes.
        labels: Option<Value> = "labels";
    }

    /// Certificates from an SDS server.
    pub struct SdsProvider {
        /// `[namespace/]host` of the service.
        service: String = "service";
        /// Port of the service.
        port: u16 = "port";
        /// Name that certificates are asked by.
        name: String = "name";
    }
}

oneof! {
    /// What a provider is.
    pub enum Provider {
        /// External authorization over HTTP.
        EnvoyExtAuthzHttp(EnvoyExtAuthzHttp) = "envoyExtAuthzHttp",
        /// External authorization over gRPC.
        EnvoyExtAuthzGrpc(EnvoyExtAuthzGrpc) = "envoyExtAuthzGrpc",
        /// Traces for Zipkin.
        Zipkin(ZipkinProvider) = "zipkin",
        /// Traces for Lightstep; read, never used.
        Lightstep(LightstepProvider) = "lightstep",
        /// Traces for Datadog.
        Datadog(DatadogProvider) = "datadog",
        /// Google's operations suite.
        Stackdriver(StackdriverProvider) = "stackdriver",
        /// Traces for an OpenCensus agent; read, never used.
        Opencensus(OpenCensusProvider) = "opencensus",
        /// Traces for SkyWalking.
        Skywalking(SkyWalkingProvider) = "skywalking",
        /// Traces over OTLP.
        Opentelemetry(OpenTelemetryProvider) = "opentelemetry",
        /// Metrics for Prometheus.
        Prometheus(Empty) = "prometheus",
        /// Access log in a file.
        EnvoyFileAccessLog(EnvoyFileAccessLogProvider) = "envoyFileAccessLog",
        /// Access log of HTTP over gRPC.
        EnvoyHttpAls(EnvoyHttpGrpcV3LogProvider) = "envoyHttpAls",
        /// Access log of TCP over gRPC.
        EnvoyTcpAls(EnvoyTcpGrpcV3LogProvider) = "envoyTcpAls",
        /// Access log over OTLP.
        EnvoyOtelAls(EnvoyOpenTelemetryLogProvider) = "envoyOtelAls",
        /// Certificates from an SDS server.
        Sds(SdsProvider) = "sds",
    }

    /// A format of access logs.
    pub enum LogFormatKind {
        /// Text.
        Text(String) = "text",
        /// JSON.
        Labels(Value) = "labels",
    }
}

enumeration! {
    /// Which headers carry the context of Zipkin's traces.
    pub enum ZipkinTraceContext {
        /// `x-b3-*`.
        UseB3 = "USE_B3",
        /// `x-b3-*` and `traceparent`.
        UseB3WithW3cPropagation = "USE_B3_WITH_W3C_PROPAGATION",
    }

    /// Which headers carry the context of OpenCensus traces.
    pub enum OpenCensusTraceContext {
        /// Not said.
        Unspecified = "UNSPECIFIED",
        /// `traceparent`.
        W3cTraceContext = "W3C_TRACE_CONTEXT",
        /// `grpc-trace-bin`.
        GrpcBin = "GRPC_BIN",
        /// `x-cloud-trace-context`.
        CloudTraceContext = "CLOUD_TRACE_CONTEXT",
        /// `x-b3-*`.
        B3 = "B3",
    }
}
