//! Changes to proxies that no other kind has: EnvoyFilter, WasmPlugin, TrafficExtension and ProxyConfig.

use std::collections::BTreeMap;

use serde_json::Value;

use super::traffic::{LabelsSelector, PolicyTargetReference, PortSelector, WorkloadSelector};
use crate::config::decode::{enumeration, message, oneof};

message! {
    /// Patches of the generated Envoy configuration.
    pub struct EnvoyFilter {
        /// Workloads of the namespace; none is all of them.
        workload_selector: Option<LabelsSelector> = "workloadSelector";
        /// The objects it is attached to instead.
        target_refs: Vec<PolicyTargetReference> = "targetRefs";
        /// The patches, applied in order.
        config_patches: Vec<EnvoyConfigObjectPatch> = "configPatches";
        /// Lower is applied earlier.
        priority: i32 = "priority";
    }

    /// One patch.
    pub struct EnvoyConfigObjectPatch {
        /// What is patched.
        apply_to: ApplyTo = "applyTo";
        /// Where.
        r#match: Option<EnvoyConfigObjectMatch> = "match";
        /// How.
        patch: Option<Patch> = "patch";
    }

    /// Where a patch is applied.
    pub struct EnvoyConfigObjectMatch {
        /// Which part of which proxies.
        context: PatchContext = "context";
        /// Properties of the proxy.
        proxy: Option<ProxyMatch> = "proxy";
    } oneof {
        /// Which object.
        object_types: EnvoyConfigObjectTypes;
    }

    /// Properties of a proxy.
    pub struct ProxyMatch {
        /// Regular expression for its version.
        proxy_version: String = "proxyVersion";
        /// Values of its metadata.
        metadata: BTreeMap<String, String> = "metadata";
    }

    /// A listener.
    pub struct ListenerMatch {
        /// Port; 0 is every port.
        port_number: u32 = "portNumber";
        /// Has no effect.
        port_name: String = "portName";
        /// A filter chain.
        filter_chain: Option<FilterChainMatch> = "filterChain";
        /// A listener filter by name.
        listener_filter: String = "listenerFilter";
        /// Name.
        name: String = "name";
    }

    /// A filter chain.
    pub struct FilterChainMatch {
        /// Name.
        name: String = "name";
        /// Server name.
        sni: String = "sni";
        /// `raw_buffer` or `tls`.
        transport_protocol: String = "transportProtocol";
        /// ALPN, separated by commas.
        application_protocols: String = "applicationProtocols";
        /// A network filter.
        filter: Option<FilterMatch> = "filter";
        /// Port.
        destination_port: u32 = "destinationPort";
    }

    /// A filter.
    pub struct FilterMatch {
        /// Name.
        name: String = "name";
        /// A filter in it.
        sub_filter: Option<SubFilterMatch> = "subFilter";
    }

    /// A filter in another, for example an HTTP filter.
    pub struct SubFilterMatch {
        /// Name.
        name: String = "name";
    }

    /// A route configuration.
    pub struct RouteConfigurationMatch {
        /// Port; 0 is every port.
        port_number: u32 = "portNumber";
        /// Name of the port of a gateway's server.
        port_name: String = "portName";
        /// `namespace/name` of a Gateway.
        gateway: String = "gateway";
        /// A virtual host.
        vhost: Option<VirtualHostMatch> = "vhost";
        /// Name.
        name: String = "name";
    }

    /// A virtual host.
    pub struct VirtualHostMatch {
        /// Name, `host:port`.
        name: String = "name";
        /// One of its domains.
        domain_name: String = "domainName";
        /// A route.
        route: Option<RouteMatch> = "route";
    }

    /// A route.
    pub struct RouteMatch {
        /// Name.
        name: String = "name";
        /// What it does.
        action: RouteAction = "action";
    }

    /// A cluster.
    pub struct ClusterMatch {
        /// Port of the service; 0 is every port.
        port_number: u32 = "portNumber";
        /// Host of the service.
        service: String = "service";
        /// Subset.
        subset: String = "subset";
        /// Name.
        name: String = "name";
    }

    /// A part of a waypoint.
    pub struct WaypointMatch {
        /// Port of the service; 0 is every port.
        port_number: u32 = "portNumber";
        /// A network filter.
        filter: Option<FilterMatch> = "filter";
        /// A route.
        route: Option<WaypointRouteMatch> = "route";
    }

    /// A route of a waypoint.
    pub struct WaypointRouteMatch {
        /// Name.
        name: String = "name";
    }

    /// How something is patched.
    pub struct Patch {
        /// What is done.
        operation: PatchOperation = "operation";
        /// Envoy's message.
        value: Option<Value> = "value";
        /// Where a filter is inserted when no filter is named.
        filter_class: FilterClass = "filterClass";
    }

    /// A WebAssembly module in the proxies.
    pub struct WasmPlugin {
        /// Workloads; none is every workload in scope.
        selector: Option<WorkloadSelector> = "selector";
        /// The object it is attached to instead.
        target_ref: Option<PolicyTargetReference> = "targetRef" ~ "use targetRefs";
        /// The objects it is attached to instead.
        target_refs: Vec<PolicyTargetReference> = "targetRefs";
        /// Where the module is: `oci://`, `http(s)://` or `file://`; without scheme it is `oci://`.
        url: String = "url";
        /// SHA-256 of the module, hexadecimal.
        sha256: String = "sha256";
        /// When it is fetched.
        image_pull_policy: PullPolicy = "imagePullPolicy";
        /// Secret for the registry.
        image_pull_secret: String = "imagePullSecret";
        /// Key that signed the module; has no effect in Istio.
        verification_key: String = "verificationKey";
        /// Passed to the module.
        plugin_config: Option<Value> = "pluginConfig";
        /// Name of the root context.
        plugin_name: String = "pluginName";
        /// Where in the chain of filters.
        phase: PluginPhase = "phase";
        /// Higher comes first within a phase; absent is 0.
        priority: Option<i64> = "priority";
        /// What happens when the module fails.
        fail_strategy: FailStrategy = "failStrategy";
        /// The module's environment.
        vm_config: Option<VmConfig> = "vmConfig";
        /// Traffic it is for; none is all.
        r#match: Vec<TrafficSelector> = "match";
        /// Kind of filter.
        r#type: PluginType = "type";
    }

    /// Traffic by direction and port.
    pub struct TrafficSelector {
        /// Direction.
        mode: WorkloadMode = "mode";
        /// Ports; none is every port.
        ports: Vec<PortSelector> = "ports";
    }

    /// The environment of a module.
    pub struct VmConfig {
        /// Variables.
        env: Vec<EnvVar> = "env";
    }

    /// A variable.
    pub struct EnvVar {
        /// Name.
        name: String = "name";
        /// Where the value is from.
        value_from: EnvValueSource = "valueFrom";
        /// The value; not with `HOST`.
        value: String = "value";
    }

    /// WebAssembly or Lua in the proxies.
    pub struct TrafficExtension {
        /// Workloads; none is every workload in scope.
        selector: Option<WorkloadSelector> = "selector";
        /// The objects it is attached to instead.
        target_refs: Vec<PolicyTargetReference> = "targetRefs";
        /// Where in the chain of filters.
        phase: PluginPhase = "phase";
        /// Higher comes first within a phase; absent is 0.
        priority: Option<i64> = "priority";
        /// Traffic it is for; none is all.
        r#match: Vec<TrafficSelector> = "match";
    } oneof {
        /// What runs.
        filter_config: TrafficExtensionFilter;
    }

    /// A module of a TrafficExtension.
    pub struct WasmConfig {
        /// Where the module is.
        url: String = "url";
        /// SHA-256 of the module, hexadecimal.
        sha256: String = "sha256";
        /// When it is fetched.
        image_pull_policy: PullPolicy = "imagePullPolicy";
        /// Secret for the registry.
        image_pull_secret: String = "imagePullSecret";
        /// Key that signed the module.
        verification_key: String = "verificationKey";
        /// Passed to the module.
        plugin_config: Option<Value> = "pluginConfig";
        /// Name of the root context.
        plugin_name: String = "pluginName";
        /// What happens when the module fails.
        fail_strategy: FailStrategy = "failStrategy";
        /// The module's environment.
        vm_config: Option<VmConfig> = "vmConfig";
        /// Kind of filter.
        r#type: PluginType = "type";
    }

    /// A script of a TrafficExtension.
    pub struct LuaConfig {
        /// The script.
        inline_code: String = "inlineCode";
    }

    /// Settings of proxies that take effect at their start (the kind `ProxyConfig`).
    pub struct ProxyConfigResource {
        /// Workloads; none is every workload in scope.
        selector: Option<WorkloadSelector> = "selector";
        /// Worker threads; 0 is one for each core, absent takes the mesh's.
        concurrency: Option<i32> = "concurrency";
        /// Variables of the proxy's environment.
        environment_variables: BTreeMap<String, String> = "environmentVariables";
        /// The proxy's image.
        image: Option<ProxyImage> = "image";
    }

    /// The proxy's image.
    pub struct ProxyImage {
        /// `default`, `debug` or `distroless`.
        image_type: String = "imageType";
    }
}

oneof! {
    /// Which object a patch is for.
    pub enum EnvoyConfigObjectTypes {
        /// Listeners.
        Listener(ListenerMatch) = "listener",
        /// Route configurations.
        RouteConfiguration(RouteConfigurationMatch) = "routeConfiguration",
        /// Clusters.
        Cluster(ClusterMatch) = "cluster",
        /// Waypoints.
        Waypoint(WaypointMatch) = "waypoint",
    }

    /// What a TrafficExtension runs.
    pub enum TrafficExtensionFilter {
        /// WebAssembly.
        Wasm(WasmConfig) = "wasm",
        /// Lua.
        Lua(LuaConfig) = "lua",
    }
}

enumeration! {
    /// What a patch is for.
    pub enum ApplyTo {
        /// Not said.
        Invalid = "INVALID",
        /// Listeners.
        Listener = "LISTENER",
        /// Filter chains.
        FilterChain = "FILTER_CHAIN",
        /// Network filters.
        NetworkFilter = "NETWORK_FILTER",
        /// HTTP filters.
        HttpFilter = "HTTP_FILTER",
        /// Route configurations.
        RouteConfiguration = "ROUTE_CONFIGURATION",
        /// Virtual hosts.
        VirtualHost = "VIRTUAL_HOST",
        /// Routes.
        HttpRoute = "HTTP_ROUTE",
        /// Clusters.
        Cluster = "CLUSTER",
        /// Extension configurations.
        ExtensionConfig = "EXTENSION_CONFIG",
        /// Bootstrap.
        Bootstrap = "BOOTSTRAP",
        /// Listener filters.
        ListenerFilter = "LISTENER_FILTER",
    }

    /// Which part of which proxies.
    pub enum PatchContext {
        /// All.
        Any = "ANY",
        /// To a workload.
        SidecarInbound = "SIDECAR_INBOUND",
        /// From a workload.
        SidecarOutbound = "SIDECAR_OUTBOUND",
        /// Gateways.
        Gateway = "GATEWAY",
        /// Waypoints.
        Waypoint = "WAYPOINT",
    }

    /// What a route does.
    pub enum RouteAction {
        /// Anything.
        Any = "ANY",
        /// Forward.
        Route = "ROUTE",
        /// Redirect.
        Redirect = "REDIRECT",
        /// Answer.
        DirectResponse = "DIRECT_RESPONSE",
    }

    /// What a patch does.
    pub enum PatchOperation {
        /// Not said.
        Invalid = "INVALID",
        /// Merged as proto messages.
        Merge = "MERGE",
        /// Added.
        Add = "ADD",
        /// Removed.
        Remove = "REMOVE",
        /// Inserted before the match.
        InsertBefore = "INSERT_BEFORE",
        /// Inserted after the match.
        InsertAfter = "INSERT_AFTER",
        /// Inserted first.
        InsertFirst = "INSERT_FIRST",
        /// Replaced.
        Replace = "REPLACE",
        /// Merged, lists replaced.
        MergeAndReplaceList = "MERGE_AND_REPLACE_LIST",
    }

    /// Where a filter is inserted when no filter is named.
    pub enum FilterClass {
        /// Before the router.
        Unspecified = "UNSPECIFIED",
        /// After Istio's authentication.
        Authn = "AUTHN",
        /// After Istio's authorization.
        Authz = "AUTHZ",
        /// Before Istio's statistics.
        Stats = "STATS",
    }

    /// When a module is fetched.
    pub enum PullPolicy {
        /// `IfNotPresent`, and `Always` for the tag `latest`.
        UnspecifiedPolicy = "UNSPECIFIED_POLICY",
        /// Once.
        IfNotPresent = "IfNotPresent",
        /// At every change.
        Always = "Always",
    }

    /// Where in the chain of filters.
    pub enum PluginPhase {
        /// At the end.
        UnspecifiedPhase = "UNSPECIFIED_PHASE",
        /// Before authentication.
        Authn = "AUTHN",
        /// Before authorization.
        Authz = "AUTHZ",
        /// Before statistics.
        Stats = "STATS",
    }

    /// What happens when a module fails.
    pub enum FailStrategy {
        /// Requests fail.
        FailClose = "FAIL_CLOSE",
        /// Requests go on.
        FailOpen = "FAIL_OPEN",
        /// The module is started again.
        FailReload = "FAIL_RELOAD",
    }

    /// Kind of filter.
    pub enum PluginType {
        /// HTTP.
        UnspecifiedPluginType = "UNSPECIFIED_PLUGIN_TYPE",
        /// HTTP.
        Http = "HTTP",
        /// Network.
        Network = "NETWORK",
    }

    /// A direction of traffic.
    pub enum WorkloadMode {
        /// Both.
        Undefined = "UNDEFINED",
        /// From a workload; gateways.
        Client = "CLIENT",
        /// To a workload.
        Server = "SERVER",
        /// Both.
        ClientAndServer = "CLIENT_AND_SERVER",
    }

    /// Where the value of a variable is from.
    pub enum EnvValueSource {
        /// Written down.
        Inline = "INLINE",
        /// The proxy's environment.
        Host = "HOST",
    }
}
