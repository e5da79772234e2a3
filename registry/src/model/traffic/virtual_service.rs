//! How requests are routed (`VirtualService`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Destination, Percent, StringMatch};
use crate::config::decode::{Bytes, enumeration, message, oneof};

message! {
    /// Routes for a set of hosts.
    pub struct VirtualService {
        /// Hosts whose requests are routed; empty only for a delegate.
        hosts: Vec<String> = "hosts";
        /// Gateways (`namespace/name` or `name`) and `mesh` for sidecars; none means `mesh`.
        gateways: Vec<String> = "gateways";
        /// Routes for HTTP, the first match wins.
        http: Vec<HttpRoute> = "http";
        /// Routes for TLS that is passed through, by SNI.
        tls: Vec<TlsRoute> = "tls";
        /// Routes for TCP.
        tcp: Vec<TcpRoute> = "tcp";
        /// Namespaces that see it: `*`, `.`, `~` or names; none takes the mesh's default.
        export_to: Vec<String> = "exportTo";
    }

    /// Another VirtualService that continues a route.
    pub struct Delegate {
        /// Its name.
        name: String = "name";
        /// Its namespace; empty is that of the root.
        namespace: String = "namespace";
    }

    /// Changes to the headers of requests and responses.
    pub struct Headers {
        /// Before a request is forwarded.
        request: Option<HeaderOperations> = "request";
        /// Before a response is returned.
        response: Option<HeaderOperations> = "response";
    }

    /// Changes to one set of headers.
    pub struct HeaderOperations {
        /// Overwritten.
        set: BTreeMap<String, String> = "set";
        /// Appended.
        add: BTreeMap<String, String> = "add";
        /// Removed.
        remove: Vec<String> = "remove";
    }

    /// A rule for HTTP.
    pub struct HttpRoute {
        /// A name for logs.
        name: String = "name";
        /// Any of these; none matches everything.
        r#match: Vec<HttpMatchRequest> = "match";
        /// Weighted destinations.
        route: Vec<HttpRouteDestination> = "route";
        /// Answer with a redirect.
        redirect: Option<HttpRedirect> = "redirect";
        /// Answer with a fixed response.
        direct_response: Option<HttpDirectResponse> = "directResponse";
        /// Continue in another VirtualService.
        delegate: Option<Delegate> = "delegate";
        /// Change path or authority before forwarding.
        rewrite: Option<HttpRewrite> = "rewrite";
        /// Time for the whole request with its retries; none is no limit.
        timeout: Option<Duration> = "timeout";
        /// Retries; none takes the mesh's default.
        retries: Option<HttpRetry> = "retries";
        /// Injected delays and errors.
        fault: Option<HttpFaultInjection> = "fault";
        /// A copy of the requests goes here.
        mirror: Option<Destination> = "mirror";
        /// Copies of the requests go here.
        mirrors: Vec<HttpMirrorPolicy> = "mirrors";
        /// Share of requests that are mirrored, in percent.
        mirror_percent: Option<u32> = "mirrorPercent" | "mirror_percent" ~ "use mirrorPercentage";
        /// Share of requests that are mirrored.
        mirror_percentage: Option<Percent> = "mirrorPercentage";
        /// Cross-origin requests.
        cors_policy: Option<CorsPolicy> = "corsPolicy";
        /// Changes to headers.
        headers: Option<Headers> = "headers";
    }

    /// Conditions on a request, all of which must hold.
    pub struct HttpMatchRequest {
        /// A name for logs.
        name: String = "name";
        /// The path.
        uri: Option<StringMatch> = "uri";
        /// `http` or `https`.
        scheme: Option<StringMatch> = "scheme";
        /// The method.
        method: Option<StringMatch> = "method";
        /// The host and port that were asked for.
        authority: Option<StringMatch> = "authority";
        /// Headers by lower-case name.
        headers: BTreeMap<String, StringMatch> = "headers";
        /// Port of the listener; 0 is every port.
        port: u16 = "port";
        /// Labels that the client's workload must have.
        source_labels: BTreeMap<String, String> = "sourceLabels";
        /// Gateways where the rule holds instead of those of the VirtualService.
        gateways: Vec<String> = "gateways";
        /// Parameters of the query, by name.
        query_params: BTreeMap<String, StringMatch> = "queryParams";
        /// Compare the path without regard to case; not for `regex`.
        ignore_uri_case: bool = "ignoreUriCase";
        /// Headers that must not match.
        without_headers: BTreeMap<String, StringMatch> = "withoutHeaders";
        /// Namespace of the client's workload.
        source_namespace: String = "sourceNamespace";
        /// Prefix of the statistics of this route.
        stat_prefix: String = "statPrefix";
    }

    /// One destination of several.
    pub struct HttpRouteDestination {
        /// Where to.
        destination: Option<Destination> = "destination";
        /// Share relative to the other destinations.
        weight: i32 = "weight";
        /// Changes to headers for this destination only.
        headers: Option<Headers> = "headers";
    }

    /// A rule for TLS that is passed through.
    pub struct TlsRoute {
        /// Any of these; at least one.
        r#match: Vec<TlsMatchAttributes> = "match";
        /// Weighted destinations.
        route: Vec<RouteDestination> = "route";
    }

    /// A rule for TCP.
    pub struct TcpRoute {
        /// Any of these; none matches everything.
        r#match: Vec<L4MatchAttributes> = "match";
        /// Weighted destinations.
        route: Vec<RouteDestination> = "route";
    }

    /// Conditions on a TLS connection, all of which must hold.
    pub struct TlsMatchAttributes {
        /// Server names; a leading `*` is a wildcard.
        sni_hosts: Vec<String> = "sniHosts";
        /// IPv4 or IPv6 addresses or ranges of the destination.
        destination_subnets: Vec<String> = "destinationSubnets";
        /// Port of the listener; 0 is every port.
        port: u16 = "port";
        /// Address or range of the client.
        source_subnet: String = "sourceSubnet" ~ "it has no effect";
        /// Labels that the client's workload must have.
        source_labels: BTreeMap<String, String> = "sourceLabels";
        /// Gateways where the rule holds.
        gateways: Vec<String> = "gateways";
        /// Namespace of the client's workload.
        source_namespace: String = "sourceNamespace";
    }

    /// Conditions on a TCP connection, all of which must hold.
    pub struct L4MatchAttributes {
        /// IPv4 or IPv6 addresses or ranges of the destination.
        destination_subnets: Vec<String> = "destinationSubnets";
        /// Port of the listener; 0 is every port.
        port: u16 = "port";
        /// Address or range of the client.
        source_subnet: String = "sourceSubnet" ~ "it has no effect";
        /// Labels that the client's workload must have.
        source_labels: BTreeMap<String, String> = "sourceLabels";
        /// Gateways where the rule holds.
        gateways: Vec<String> = "gateways";
        /// Namespace of the client's workload.
        source_namespace: String = "sourceNamespace";
    }

    /// One destination of several, for TLS and TCP.
    pub struct RouteDestination {
        /// Where to.
        destination: Option<Destination> = "destination";
        /// Share relative to the other destinations.
        weight: i32 = "weight";
    }

    /// An answer that sends the client elsewhere.
    pub struct HttpRedirect {
        /// Replaces the whole path.
        uri: String = "uri";
        /// Replaces the matched prefix of the path.
        prefix_rewrite: String = "prefixRewrite";
        /// Replaces the authority.
        authority: String = "authority";
        /// Replaces the scheme.
        scheme: String = "scheme";
        /// 301 (when 0), 302, 303, 307 or 308.
        redirect_code: u32 = "redirectCode";
    } oneof {
        /// Which port the new location has.
        redirect_port: RedirectPort;
    }

    /// A fixed answer.
    pub struct HttpDirectResponse {
        /// Status code, 100 to 599.
        status: u32 = "status";
        /// Body; none is empty.
        body: Option<HttpBody> = "body";
    }

    /// The body of a fixed answer, at most 1 MiB.
    pub struct HttpBody {
    } oneof {
        /// As text or as bytes.
        specifier: HttpBodySpecifier;
    }

    /// Changes to the path and the authority.
    pub struct HttpRewrite {
        /// Replaces the matched prefix, or the whole path.
        uri: String = "uri";
        /// Replaces the authority.
        authority: String = "authority";
        /// Replaces by regular expression.
        uri_regex_rewrite: Option<RegexRewrite> = "uriRegexRewrite";
    }

    /// A replacement by regular expression.
    pub struct RegexRewrite {
        /// RE2 expression that the path must match.
        r#match: String = "match";
        /// What it becomes; `\1` is the first group.
        rewrite: String = "rewrite";
    }

    /// Retries.
    pub struct HttpRetry {
        /// How often at most; 0 and less is never.
        attempts: i32 = "attempts";
        /// Time for each attempt; none is the route's timeout.
        per_try_timeout: Option<Duration> = "perTryTimeout";
        /// Conditions, separated by commas; numbers are status codes.
        retry_on: String = "retryOn";
        /// Prefer other localities for retries.
        retry_remote_localities: Option<bool> = "retryRemoteLocalities";
        /// Avoid endpoints that were tried; absent is true.
        retry_ignore_previous_hosts: Option<bool> = "retryIgnorePreviousHosts";
        /// First interval of the exponential back-off.
        backoff: Option<Duration> = "backoff";
    }

    /// A destination that gets copies.
    pub struct HttpMirrorPolicy {
        /// Where to.
        destination: Option<Destination> = "destination";
        /// Share of requests; none is all.
        percentage: Option<Percent> = "percentage";
    }

    /// Cross-origin requests.
    pub struct CorsPolicy {
        /// Allowed origins, literally.
        allow_origin: Vec<String> = "allowOrigin" ~ "use allowOrigins";
        /// Allowed origins.
        allow_origins: Vec<StringMatch> = "allowOrigins";
        /// `Access-Control-Allow-Methods`.
        allow_methods: Vec<String> = "allowMethods";
        /// `Access-Control-Allow-Headers`.
        allow_headers: Vec<String> = "allowHeaders";
        /// `Access-Control-Expose-Headers`.
        expose_headers: Vec<String> = "exposeHeaders";
        /// `Access-Control-Max-Age`.
        max_age: Option<Duration> = "maxAge";
        /// `Access-Control-Allow-Credentials`.
        allow_credentials: Option<bool> = "allowCredentials";
        /// What happens to a preflight of another origin.
        unmatched_preflights: UnmatchedPreflights = "unmatchedPreflights";
    }

    /// Injected faults.
    pub struct HttpFaultInjection {
        /// Wait before forwarding.
        delay: Option<FaultDelay> = "delay";
        /// Answer instead of forwarding.
        abort: Option<FaultAbort> = "abort";
    }

    /// An injected delay.
    pub struct FaultDelay {
        /// Share of requests, in percent.
        percent: i32 = "percent" ~ "use percentage";
        /// Share of requests; absent is none.
        percentage: Option<Percent> = "percentage";
    } oneof {
        /// How long.
        http_delay_type: HttpDelayType;
    }

    /// An injected error.
    pub struct FaultAbort {
        /// Share of requests; absent is none.
        percentage: Option<Percent> = "percentage";
    } oneof {
        /// Which error.
        error_type: ErrorType;
    }
}

enumeration! {
    /// What happens to a preflight whose origin does not match.
    pub enum UnmatchedPreflights {
        /// Forward it, as `FORWARD` does.
        Unspecified = "UNSPECIFIED",
        /// Forward it.
        Forward = "FORWARD",
        /// Answer it without allowing anything.
        Ignore = "IGNORE",
    }

    /// Which port a redirect names when none is given.
    pub enum RedirectPortSelection {
        /// 80 for http, 443 for https.
        FromProtocolDefault = "FROM_PROTOCOL_DEFAULT",
        /// The port of the request.
        FromRequestPort = "FROM_REQUEST_PORT",
    }
}

oneof! {
    /// Which port the new location has.
    pub enum RedirectPort {
        /// This one.
        Port(u16) = "port",
        /// Derived.
        DerivePort(RedirectPortSelection) = "derivePort",
    }

    /// The body of a fixed answer.
    pub enum HttpBodySpecifier {
        /// As text.
        String(String) = "string",
        /// As bytes.
        Bytes(Bytes) = "bytes",
    }

    /// How long an injected delay is.
    pub enum HttpDelayType {
        /// Always the same.
        FixedDelay(Duration) = "fixedDelay",
        /// Mean of an exponential distribution; Istio hides it.
        ExponentialDelay(Duration) = "exponentialDelay",
    }

    /// Which error is injected.
    pub enum ErrorType {
        /// HTTP status code, 200 to 599.
        HttpStatus(i32) = "httpStatus",
        /// gRPC status by name or number, for example `UNAVAILABLE`.
        GrpcStatus(String) = "grpcStatus",
        /// HTTP/2 error; read, never injected.
        Http2Error(String) = "http2Error",
    }
}

/// The gRPC status codes by number (gRPC, "Status codes and their use in gRPC").
pub const GRPC_STATUS: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// A gRPC status by name or number.
#[must_use]
pub fn grpc_status(text: &str) -> Option<u32> {
    let by_name = GRPC_STATUS.iter().position(|known| *known == text).and_then(|n| u32::try_from(n).ok());
    by_name.or_else(|| text.parse().ok().filter(|code| *code <= 16))
}
