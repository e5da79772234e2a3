//! Rules of `EnvoyFilter`, `WasmPlugin`, `TrafficExtension` and `ProxyConfig`.

use super::Checker;
use crate::config::decode::OneOf as _;
use crate::model::extension::{
    ApplyTo, EnvValueSource, EnvoyConfigObjectPatch, EnvoyFilter, FilterClass, Patch, PatchOperation,
    ProxyConfigResource, TrafficExtension, TrafficExtensionFilter, TrafficSelector, VmConfig, WasmPlugin,
};

/// Longest script, in bytes.
const MAX_LUA: usize = 64 << 10;

pub(super) fn check_envoy_filter(cx: &mut Checker, namespace: &str, filter: &EnvoyFilter) {
    cx.opt("workloadSelector", filter.workload_selector.as_ref(), |cx, selector| {
        cx.selector("labels", &selector.labels);
    });
    cx.targets(namespace, None, None, &filter.target_refs);
    cx.refuse(
        filter.workload_selector.is_some() && !filter.target_refs.is_empty(),
        "targetRefs",
        "only one of workloadSelector and targetRefs may be set",
    );
    cx.refuse(filter.config_patches.is_empty(), "configPatches", "is required: at least one patch");
    cx.each("configPatches", &filter.config_patches, check_patch);
}

/// The objects of `match` that fit what is patched.
fn fitting(apply_to: ApplyTo) -> &'static [&'static str] {
    match apply_to {
        ApplyTo::Listener | ApplyTo::FilterChain | ApplyTo::NetworkFilter | ApplyTo::ListenerFilter => {
            &["listener"]
        }
        ApplyTo::HttpFilter => &["listener", "waypoint"],
        ApplyTo::RouteConfiguration | ApplyTo::VirtualHost => &["routeConfiguration"],
        ApplyTo::HttpRoute => &["routeConfiguration", "waypoint"],
        ApplyTo::Cluster => &["cluster"],
        ApplyTo::Bootstrap | ApplyTo::ExtensionConfig | ApplyTo::Invalid => &[],
    }
}

fn check_patch(cx: &mut Checker, patch: &EnvoyConfigObjectPatch) {
    let apply_to = patch.apply_to;
    cx.refuse(
        apply_to == ApplyTo::Invalid,
        "applyTo",
        "is required: what is patched, for example HTTP_FILTER",
    );
    cx.opt("match", patch.r#match.as_ref(), |cx, conditions| {
        if let Some(chosen) = conditions.object_types.as_ref().map(crate::config::decode::OneOf::name)
            && apply_to != ApplyTo::Invalid
            && !fitting(apply_to).contains(&chosen)
        {
            let fits = fitting(apply_to);
            let right = if fits.is_empty() {
                "it takes no object".to_owned()
            } else {
                format!("use {}", fits.join(" or "))
            };
            cx.error_at(chosen, format!("does not fit applyTo {}; {right}", apply_to.as_str()));
        }
        cx.opt("proxy", conditions.proxy.as_ref(), |cx, proxy| {
            if !proxy.proxy_version.is_empty() {
                cx.regex("proxyVersion", &proxy.proxy_version);
            }
        });
    });
    match &patch.patch {
        None => cx.error_at("patch", "is required"),
        Some(operation) => cx.at("patch", |cx| check_operation(cx, apply_to, patch, operation)),
    }
}

fn check_operation(cx: &mut Checker, apply_to: ApplyTo, whole: &EnvoyConfigObjectPatch, patch: &Patch) {
    let operation = patch.operation;
    match operation {
        PatchOperation::Invalid => cx.error_at("operation", "is required: what is done, for example MERGE"),
        PatchOperation::Remove => {
            if patch.value.is_some() {
                cx.at("value", |cx| cx.warn("has no effect with operation REMOVE"));
            }
        }
        PatchOperation::Merge
        | PatchOperation::Add
        | PatchOperation::InsertBefore
        | PatchOperation::InsertAfter
        | PatchOperation::InsertFirst
        | PatchOperation::Replace
        | PatchOperation::MergeAndReplaceList => {
            cx.refuse(patch.value.is_none(), "value", "is required with this operation");
            cx.refuse(patch.value.as_ref().is_some_and(|value| !value.is_object()), "value", "must be a map");
        }
    }
    let filters = matches!(apply_to, ApplyTo::NetworkFilter | ApplyTo::HttpFilter | ApplyTo::ListenerFilter);
    if operation == PatchOperation::Replace
        && !filters
        && apply_to != ApplyTo::Cluster
        && apply_to != ApplyTo::Invalid
    {
        cx.error_at("operation", "REPLACE is for filters and clusters only; use MERGE");
    }
    cx.refuse(
        patch.filter_class != FilterClass::Unspecified && operation != PatchOperation::Add,
        "filterClass",
        "is for operation ADD only",
    );
    let relative = matches!(operation, PatchOperation::InsertBefore | PatchOperation::InsertAfter);
    let ordered = filters || matches!(apply_to, ApplyTo::HttpRoute | ApplyTo::FilterChain);
    cx.refuse(
        relative && !ordered && apply_to != ApplyTo::Invalid,
        "operation",
        "is for filters, filter chains and routes only, which have an order",
    );
    if apply_to == ApplyTo::Bootstrap
        && operation != PatchOperation::Merge
        && operation != PatchOperation::Invalid
    {
        cx.error_at("operation", "must be MERGE with applyTo BOOTSTRAP");
    }
    if relative
        && whole.r#match.as_ref().and_then(|m| m.proxy.as_ref()).is_none_or(|p| p.proxy_version.is_empty())
    {
        cx.at("operation", |cx| {
            cx.warn("depends on the order of Istio's own filters, which may change between versions")
        });
    }
}

pub(super) fn check_proxy_config(cx: &mut Checker, config: &ProxyConfigResource) {
    cx.opt("selector", config.selector.as_ref(), |cx, selector| {
        cx.selector("matchLabels", &selector.match_labels)
    });
    cx.refuse(
        config.concurrency.is_some_and(|threads| threads < 0),
        "concurrency",
        "must not be negative; 0 is one thread for each core",
    );
    cx.entries("environmentVariables", &config.environment_variables, |cx, name, _| {
        if name.is_empty() || name.contains(['=', '\0']) {
            cx.error("must be the name of a variable");
        }
    });
}

pub(super) fn check_wasm_plugin(cx: &mut Checker, namespace: &str, plugin: &WasmPlugin) {
    cx.targets(namespace, plugin.selector.as_ref(), plugin.target_ref.as_ref(), &plugin.target_refs);
    check_module(cx, &plugin.url, &plugin.sha256, plugin.vm_config.as_ref());
    cx.each("match", &plugin.r#match, check_traffic);
}

pub(super) fn check_traffic_extension(cx: &mut Checker, namespace: &str, extension: &TrafficExtension) {
    cx.targets(namespace, extension.selector.as_ref(), None, &extension.target_refs);
    cx.each("match", &extension.r#match, check_traffic);
    match &extension.filter_config {
        None => cx.error(format!("must have one of {}", TrafficExtensionFilter::NAMES.join(" and "))),
        Some(TrafficExtensionFilter::Wasm(wasm)) => {
            cx.at("wasm", |cx| check_module(cx, &wasm.url, &wasm.sha256, wasm.vm_config.as_ref()));
        }
        Some(TrafficExtensionFilter::Lua(lua)) => cx.at("lua", |cx| {
            cx.required("inlineCode", &lua.inline_code);
            cx.refuse(lua.inline_code.len() > MAX_LUA, "inlineCode", "must have at most 65536 bytes");
        }),
    }
}

fn check_traffic(cx: &mut Checker, traffic: &TrafficSelector) {
    cx.each("ports", &traffic.ports, |cx, port| cx.port("number", port.number));
}

fn check_module(cx: &mut Checker, url: &str, sha256: &str, vm: Option<&VmConfig>) {
    if cx.required("url", url) {
        match url.split_once("://") {
            Some(("oci" | "http" | "https", rest)) if !rest.is_empty() => {}
            Some(("file", path)) if path.starts_with('/') => {}
            Some(("file", _)) => cx.error_at("url", "must have an absolute path after file://"),
            Some(_) => cx.error_at("url", "must begin with oci://, https://, http:// or file://"),
            None => {}
        }
    }
    let digits = sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit());
    cx.refuse(!sha256.is_empty() && !digits, "sha256", "must be a SHA-256 hash of 64 hexadecimal digits");
    cx.opt("vmConfig", vm, |cx, vm| {
        cx.each("env", &vm.env, |cx, variable| {
            if cx.required("name", &variable.name) {
                cx.refuse(variable.name.len() > 256, "name", "must have at most 256 bytes");
            }
            cx.refuse(
                variable.value_from == EnvValueSource::Host && !variable.value.is_empty(),
                "value",
                "must be empty with valueFrom HOST",
            );
            cx.refuse(variable.value.len() > 2048, "value", "must have at most 2048 bytes");
        });
        cx.unique("env", vm.env.iter().map(|variable| variable.name.as_str()), "variable");
        cx.refuse(vm.env.len() > 256, "env", "must have at most 256 entries");
    });
}
