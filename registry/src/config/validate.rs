//! Rules that a schema cannot say: within one object and across objects.
//!
//! The same code judges in istiod, before anything is proposed, and offline in `istioctl`. The rules are those of
//! Istio's CRDs and webhook; what Istio accepts with a warning is a warning here.

mod destination_rule;
mod extension;
mod gateway;
pub(crate) mod grammar;
mod mesh;
mod policy;
mod request_authentication;
mod service_entry;
mod set;
mod sidecar;
mod telemetry;
mod virtual_service;

pub use set::{Problem, Related, Severity, validate_set};

use std::collections::BTreeMap;
use std::time::Duration;

use super::decode::MAX_FINDINGS;
use super::node::{Path, Segment};
use super::object::Spec;
use crate::model::traffic::{PolicyTargetReference, WorkloadSelector};

/// Something to tell about a value, before its place is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// Which value.
    pub path: Path,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Walks an object and collects what is wrong with it.
#[derive(Debug, Default)]
pub struct Checker {
    path: Path,
    /// What must be corrected.
    pub errors: Vec<Remark>,
    /// What is accepted, and should be known.
    pub warnings: Vec<Remark>,
}

/// Checks the rules within one object.
#[must_use]
pub fn validate_spec(namespace: &str, spec: &Spec) -> Checker {
    let mut cx = Checker { path: Path::spec(), ..Checker::default() };
    match spec {
        Spec::VirtualService(spec) => virtual_service::check(&mut cx, spec),
        Spec::DestinationRule(spec) => destination_rule::check(&mut cx, spec),
        Spec::Gateway(spec) => gateway::check(&mut cx, spec),
        Spec::ServiceEntry(spec) => service_entry::check(&mut cx, spec),
        Spec::Sidecar(spec) => sidecar::check(&mut cx, spec),
        Spec::WorkloadEntry(spec) => service_entry::check_workload_entry(&mut cx, spec),
        Spec::WorkloadGroup(spec) => service_entry::check_workload_group(&mut cx, spec),
        Spec::EnvoyFilter(spec) => extension::check_envoy_filter(&mut cx, namespace, spec),
        Spec::ProxyConfig(spec) => extension::check_proxy_config(&mut cx, spec),
        Spec::WasmPlugin(spec) => extension::check_wasm_plugin(&mut cx, namespace, spec),
        Spec::TrafficExtension(spec) => extension::check_traffic_extension(&mut cx, namespace, spec),
        Spec::AuthorizationPolicy(spec) => policy::check_authorization(&mut cx, namespace, spec),
        Spec::PeerAuthentication(spec) => policy::check_peer_authentication(&mut cx, spec),
        Spec::RequestAuthentication(spec) => request_authentication::check(&mut cx, namespace, spec),
        Spec::Telemetry(spec) => telemetry::check(&mut cx, namespace, spec),
        Spec::MeshConfig(spec) => mesh::check(&mut cx, spec),
    }
    cx
}

impl Checker {
    /// A mistake in the current value.
    fn error(&mut self, message: impl Into<String>) {
        if self.errors.len() < MAX_FINDINGS {
            self.errors.push(Remark { path: self.path.clone(), message: message.into() });
        }
    }

    /// Something to know about the current value.
    fn warn(&mut self, message: impl Into<String>) {
        if self.warnings.len() < MAX_FINDINGS {
            self.warnings.push(Remark { path: self.path.clone(), message: message.into() });
        }
    }

    /// A mistake in a field of the current value.
    fn error_at(&mut self, field: &str, message: impl Into<String>) {
        self.at(field, |cx| cx.error(message));
    }

    /// A mistake if the condition holds.
    fn refuse(&mut self, condition: bool, field: &str, message: &str) {
        if condition {
            self.error_at(field, message);
        }
    }

    fn at<T>(&mut self, field: &str, check: impl FnOnce(&mut Self) -> T) -> T {
        self.step(Segment::Key(field.to_owned()), check)
    }

    fn step<T>(&mut self, segment: Segment, check: impl FnOnce(&mut Self) -> T) -> T {
        self.path.0.push(segment);
        let out = check(self);
        self.path.0.pop();
        out
    }

    /// Checks a message if it is there.
    fn opt<T>(&mut self, field: &str, value: Option<&T>, check: impl FnOnce(&mut Self, &T)) {
        if let Some(value) = value {
            self.at(field, |cx| check(cx, value));
        }
    }

    /// Checks every element of a list.
    fn each<T>(&mut self, field: &str, items: &[T], mut check: impl FnMut(&mut Self, &T)) {
        self.at(field, |cx| {
            for (index, item) in items.iter().enumerate() {
                cx.step(Segment::Index(index), |cx| check(cx, item));
            }
        });
    }

    /// Checks every entry of a map.
    fn entries<V>(
        &mut self,
        field: &str,
        map: &BTreeMap<String, V>,
        mut check: impl FnMut(&mut Self, &str, &V),
    ) {
        self.at(field, |cx| {
            for (key, value) in map {
                cx.step(Segment::Key(key.clone()), |cx| check(cx, key, value));
            }
        });
    }

    /// A text that must be there.
    fn required(&mut self, field: &str, text: &str) -> bool {
        if text.is_empty() {
            self.error_at(field, "is required and must not be empty");
        }
        !text.is_empty()
    }

    /// No element may be there twice.
    fn unique<'a>(&mut self, field: &str, names: impl Iterator<Item = &'a str>, what: &str) {
        let mut seen = std::collections::BTreeSet::new();
        self.at(field, |cx| {
            for (index, name) in names.enumerate() {
                if !name.is_empty() && !seen.insert(name) {
                    cx.step(Segment::Index(index), |cx| {
                        cx.error(format!("the {what} {name} is there twice; it must be unique"));
                    });
                }
            }
        });
    }

    /// A duration of whole milliseconds, at least one.
    fn duration(&mut self, field: &str, duration: Option<Duration>) {
        if let Some(duration) = duration {
            self.at(field, |cx| {
                if duration < Duration::from_millis(1) {
                    cx.error("must be a duration of at least 1ms");
                } else if duration.subsec_nanos() % 1_000_000 != 0 {
                    cx.error("must be a duration of whole milliseconds");
                }
            });
        }
    }

    /// A duration of whole milliseconds; 0 switches something off.
    fn duration_or_zero(&mut self, field: &str, duration: Option<Duration>) {
        self.duration(field, duration.filter(|duration| !duration.is_zero()));
    }

    /// A share in percent.
    fn percent(&mut self, field: &str, value: Option<f64>) {
        if let Some(value) = value
            && !(0.0..=100.0).contains(&value)
        {
            self.error_at(field, "must be between 0 and 100");
        }
    }

    /// A port number.
    fn port(&mut self, field: &str, number: u16) {
        self.refuse(number == 0, field, "must be a port number, 1 to 65535");
    }

    /// A regular expression that compiles.
    fn regex(&mut self, field: &str, pattern: &str) {
        if let Err(why) = grammar::regex(pattern) {
            self.error_at(field, why);
        }
    }

    /// Namespaces that see an object.
    fn export_to(&mut self, namespaces: &[String]) {
        self.each("exportTo", namespaces, |cx, namespace| {
            if !matches!(namespace.as_str(), "*" | "." | "~") && !grammar::is_label(namespace) {
                cx.error("must be *, ., ~ or the name of a namespace");
            }
        });
        self.unique("exportTo", namespaces.iter().map(String::as_str), "namespace");
        if namespaces.len() > 1 {
            if namespaces.iter().any(|namespace| namespace == "~") {
                self.error_at("exportTo", "~ means no namespace and must stand alone");
            } else if namespaces.iter().any(|namespace| namespace == "*") {
                self.at("exportTo", |cx| {
                    cx.warn("* means every namespace; the other entries have no effect")
                });
            }
        }
    }

    /// Labels that workloads must have.
    fn selector(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        self.entries(field, labels, |cx, key, value| {
            if key.is_empty() || value.contains('*') || key.contains('*') {
                cx.error("must be a label without wildcards");
            } else {
                check_label(cx, key, value);
            }
        });
    }

    /// The workloads or the objects a policy is for; not both.
    fn targets(
        &mut self,
        namespace: &str,
        selector: Option<&WorkloadSelector>,
        one: Option<&PolicyTargetReference>,
        several: &[PolicyTargetReference],
    ) {
        self.opt("selector", selector, |cx, selector| cx.selector("matchLabels", &selector.match_labels));
        let set = [selector.is_some(), one.is_some(), !several.is_empty()];
        if set.iter().filter(|set| **set).count() > 1 {
            self.error("only one of selector, targetRef and targetRefs may be set");
        }
        self.opt("targetRef", one, |cx, target| check_target(cx, namespace, target));
        self.each("targetRefs", several, |cx, target| check_target(cx, namespace, target));
        self.refuse(several.len() > 16, "targetRefs", "must have at most 16 entries");
    }
}

fn check_target(cx: &mut Checker, namespace: &str, target: &PolicyTargetReference) {
    cx.required("name", &target.name);
    if !cx.required("kind", &target.kind) {
        return;
    }
    let known = matches!(
        (target.group.as_str(), target.kind.as_str()),
        ("gateway.networking.k8s.io", "Gateway" | "GatewayClass")
            | ("" | "core", "Service")
            | ("networking.istio.io", "ServiceEntry")
    );
    if !known {
        cx.error_at(
            "kind",
            "must be Gateway or GatewayClass of gateway.networking.k8s.io, Service of the core group, or ServiceEntry of networking.istio.io",
        );
    }
    let foreign = !target.namespace.is_empty() && target.namespace != namespace;
    cx.refuse(
        foreign,
        "namespace",
        "must be the namespace of the policy; other namespaces cannot be attached to",
    );
}

/// The grammar of a label.
fn check_label(cx: &mut Checker, key: &str, value: &str) {
    if let Err(why) = grammar::label_key(key) {
        cx.error(why);
    }
    if let Err(why) = grammar::label_value(value) {
        cx.error(why);
    }
}
