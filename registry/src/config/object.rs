//! Objects: a kind, a name, and a specification both as written and as read.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::decode::{Decode, Decoder};
use super::node::Node;
use super::written::Memo;
use crate::model::extension::{EnvoyFilter, ProxyConfigResource, TrafficExtension, WasmPlugin};
use crate::model::mesh::MeshConfig;
use crate::model::security::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication};
use crate::model::telemetry::Telemetry;
use crate::model::traffic::{DestinationRule, Gateway, ServiceEntry, Sidecar, VirtualService};
use crate::model::workload::{WorkloadEntry, WorkloadGroup};

/// The specification type of one kind.
pub trait Typed {
    /// The kind whose specification it is.
    const KIND: Kind;

    /// The typed specification, if `spec` is of this kind.
    fn of(spec: &Spec) -> Option<&Self>;
}

/// The group of the kinds about traffic.
const NETWORKING: &str = "networking.istio.io";
/// The group of the kinds about security.
const SECURITY: &str = "security.istio.io";

macro_rules! kinds {
    ($( $(#[$meta:meta])* $kind:ident($spec:ty, $held:ty) $plural:literal [$($short:literal),*] $group:expr, [$($version:literal),*]; )*) => {
        /// What an object is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $( $(#[$meta])* $kind, )*
        }

        /// The specification of an object, typed.
        #[expect(clippy::large_enum_variant, reason = "there is one for each object, behind an Arc")]
        #[derive(Debug, Clone, PartialEq)]
        pub enum Spec {
            $( $(#[$meta])* $kind($held), )*
        }

        $(
            impl Typed for $spec {
                const KIND: Kind = Kind::$kind;

                fn of(spec: &Spec) -> Option<&Self> {
                    match spec {
                        Spec::$kind(spec) => Some(spec),
                        _ => None,
                    }
                }
            }
        )*

        impl Kind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$kind),*];

            /// The name as it is written in `kind`.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $( Self::$kind => stringify!($kind), )* }
            }

            /// The name for several, in lower case, as in paths of Kubernetes.
            #[must_use]
            pub fn plural(self) -> &'static str {
                match self { $( Self::$kind => $plural, )* }
            }

            /// The abbreviations of the command line.
            #[must_use]
            pub fn short_names(self) -> &'static [&'static str] {
                match self { $( Self::$kind => &[$($short),*], )* }
            }

            /// The API group.
            #[must_use]
            pub fn group(self) -> &'static str {
                match self { $( Self::$kind => $group, )* }
            }

            /// The API versions, newest first; the schema is the same in all of them.
            #[must_use]
            pub fn versions(self) -> &'static [&'static str] {
                match self { $( Self::$kind => &[$($version),*], )* }
            }

            /// Reads a specification; every mistake is recorded in `cx`.
            pub(crate) fn decode(self, node: &Node, cx: &mut Decoder) -> Option<Spec> {
                match self { $( Self::$kind => <$held>::decode(node, cx).map(Spec::$kind), )* }
            }

            /// A specification in which nothing is written.
            #[must_use]
            pub fn empty(self) -> Spec {
                match self { $( Self::$kind => Spec::$kind(<$held>::default()), )* }
            }
        }

        impl Spec {
            /// The kind of object it belongs to.
            #[must_use]
            pub fn kind(&self) -> Kind {
                match self { $( Self::$kind(_) => Kind::$kind, )* }
            }
        }
    };
}

kinds! {
    /// Routes for hosts.
    VirtualService(VirtualService, VirtualService) "virtualservices" ["vs"] NETWORKING, ["v1", "v1beta1", "v1alpha3"];
    /// Policies for the clients of a host.
    DestinationRule(DestinationRule, DestinationRule) "destinationrules" ["dr"] NETWORKING, ["v1", "v1beta1", "v1alpha3"];
    /// Load balancers at the edge.
    Gateway(Gateway, Gateway) "gateways" ["gw"] NETWORKING, ["v1", "v1beta1", "v1alpha3"];
    /// Services that no platform announces.
    ServiceEntry(ServiceEntry, ServiceEntry) "serviceentries" ["se"] NETWORKING, ["v1", "v1beta1", "v1alpha3"];
    /// What a workload's proxy sees.
    Sidecar(Sidecar, Sidecar) "sidecars" ["sc"] NETWORKING, ["v1", "v1beta1", "v1alpha3"];
    /// One workload that no platform announces.
    WorkloadEntry(WorkloadEntry, WorkloadEntry) "workloadentries" ["we"] NETWORKING, ["v1", "v1beta1", "v1alpha3"];
    /// What registered workloads have in common.
    WorkloadGroup(WorkloadGroup, WorkloadGroup) "workloadgroups" ["wg"] NETWORKING, ["v1", "v1beta1", "v1alpha3"];
    /// Patches of Envoy's configuration.
    EnvoyFilter(EnvoyFilter, EnvoyFilter) "envoyfilters" ["ef"] NETWORKING, ["v1alpha3"];
    /// Settings of proxies.
    ProxyConfig(ProxyConfigResource, ProxyConfigResource) "proxyconfigs" ["pc"] NETWORKING, ["v1beta1"];
    /// WebAssembly in the proxies.
    WasmPlugin(WasmPlugin, WasmPlugin) "wasmplugins" ["wp"] "extensions.istio.io", ["v1alpha1"];
    /// WebAssembly or Lua in the proxies.
    TrafficExtension(TrafficExtension, TrafficExtension) "trafficextensions" ["te"] "extensions.istio.io", ["v1alpha1"];
    /// Which requests are allowed.
    AuthorizationPolicy(AuthorizationPolicy, AuthorizationPolicy) "authorizationpolicies" ["ap"] SECURITY, ["v1", "v1beta1"];
    /// Which connections are accepted.
    PeerAuthentication(PeerAuthentication, PeerAuthentication) "peerauthentications" ["pa"] SECURITY, ["v1", "v1beta1"];
    /// Which tokens are valid.
    RequestAuthentication(RequestAuthentication, RequestAuthentication) "requestauthentications" ["ra"] SECURITY, ["v1", "v1beta1"];
    /// Traces, metrics and access logs.
    Telemetry(Telemetry, Telemetry) "telemetries" ["telemetry"] "telemetry.istio.io", ["v1", "v1alpha1"];
    /// Settings of the whole mesh; our own form of Istio's configuration map.
    MeshConfig(MeshConfig, Box<MeshConfig>) "meshconfigs" ["mesh"] "mesh.istio.io", ["v1alpha1"];
}

impl Kind {
    /// The kind that a person means: its name, its plural or an abbreviation, in any case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.to_lowercase();
        let bare = text.split_once('.').map_or(text.as_str(), |(kind, _)| kind);
        Self::ALL.iter().copied().find(|kind| {
            kind.as_str().to_lowercase() == bare
                || kind.plural() == bare
                || kind.short_names().contains(&bare)
        })
    }

    /// The API version that new objects get: `networking.istio.io/v1`.
    #[must_use]
    pub fn api_version(self) -> String {
        format!("{}/{}", self.group(), self.versions().first().copied().unwrap_or("v1"))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A configuration object.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// The API version it was written in.
    pub api_version: String,
    /// Its name, unique among its kind and namespace.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// When it was created, in seconds since 1970; 0 before the store has it.
    pub created: i64,
    /// Counts changes of the specification; 0 before the store has it.
    pub generation: u64,
    /// Revision of the last change; 0 before the store has it.
    pub revision: u64,
    /// The specification, typed.
    pub spec: Arc<Spec>,
    /// The specification as it was written.
    pub raw: Value,
    /// What was measured of it.
    pub(super) memo: Memo,
}

/// A stored value that is no object of a known kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an object of a known kind: {found}")]
pub struct NotAnObject {
    /// What it says it is.
    pub found: String,
}

impl Object {
    /// An object made here, from a specification in JSON; fields that are unknown are kept in `raw` only.
    #[must_use]
    pub fn new(kind: Kind, namespace: &str, name: &str, raw: Value) -> Self {
        Self {
            kind,
            api_version: kind.api_version(),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            created: 0,
            generation: 0,
            revision: 0,
            spec: Arc::new(lenient(kind, &raw)),
            raw,
            memo: Memo::default(),
        }
    }

    /// An object as [`Object::to_json`] wrote it, by this version or another: whatever can be read is read.
    ///
    /// # Errors
    ///
    /// [`NotAnObject`] when the kind is unknown.
    pub fn from_stored(value: &Value) -> Result<Self, NotAnObject> {
        let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let kind = Kind::ALL
            .iter()
            .copied()
            .find(|kind| kind.as_str() == text("/kind"))
            .ok_or_else(|| NotAnObject { found: text("/kind").to_owned() })?;
        let raw = value.get("spec").cloned().unwrap_or_else(|| json!({}));
        let mut object = Self::new(kind, text("/metadata/namespace"), text("/metadata/name"), raw);
        text("/apiVersion").clone_into(&mut object.api_version);
        object.labels = strings(value.pointer("/metadata/labels"));
        object.annotations = strings(value.pointer("/metadata/annotations"));
        object.created = seconds(text("/metadata/creationTimestamp"));
        object.generation = value.pointer("/metadata/generation").and_then(Value::as_u64).unwrap_or(0);
        object.revision = text("/metadata/resourceVersion").parse().unwrap_or(0);
        Ok(object)
    }

    /// The object as Kubernetes would show it; what the store has not set is left out.
    #[must_use]
    pub fn to_json(&self) -> Value {
        self.to_json_at(self.revision)
    }

    /// The object as Kubernetes would show it, at this revision.
    #[must_use]
    pub fn to_json_at(&self, resource_version: u64) -> Value {
        // Texts and numbers always have a JSON form.
        serde_json::to_value(self.shown(resource_version)).unwrap_or_default()
    }

    /// What [`Object::to_json_at`] gives, to be written without a copy.
    fn shown(&self, resource_version: u64) -> Shown<'_> {
        let created = jiff::Timestamp::from_second(self.created).ok().filter(|_| self.created != 0);
        Shown {
            api_version: &self.api_version,
            kind: self.kind.as_str(),
            metadata: Metadata {
                name: &self.name,
                namespace: &self.namespace,
                labels: &self.labels,
                annotations: &self.annotations,
                creation_timestamp: created.map(|time| time.to_string()),
                generation: Some(self.generation).filter(|generation| *generation != 0),
                resource_version: Some(resource_version).filter(|r| *r != 0).map(|r| r.to_string()),
            },
            spec: &self.raw,
        }
    }

    /// The specification, if the object is of that kind: `object.get::<VirtualService>()`.
    #[must_use]
    pub fn get<T: Typed>(&self) -> Option<&T> {
        T::of(&self.spec)
    }

    /// `Kind/namespace/name`, for messages.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

/// As [`Object::to_json`].
impl Serialize for Object {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.shown(self.revision).serialize(to)
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    api_version: &'a str,
    kind: &'a str,
    metadata: Metadata<'a>,
    spec: &'a Value,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata<'a> {
    name: &'a str,
    namespace: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    creation_timestamp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_version: Option<String>,
}

/// What can be read of a specification; the rest keeps its defaults.
fn lenient(kind: Kind, raw: &Value) -> Spec {
    let mut cx = Decoder::default().with_original_names();
    kind.decode(&Node::from_json(raw), &mut cx).unwrap_or_else(|| kind.empty())
}

fn strings(value: Option<&Value>) -> BTreeMap<String, String> {
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

pub(super) fn seconds(rfc3339: &str) -> i64 {
    rfc3339.parse::<jiff::Timestamp>().map_or(0, jiff::Timestamp::as_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_found_by_name_plural_and_abbreviation() {
        for text in ["VirtualService", "virtualservice", "virtualservices", "vs", "vs.networking.istio.io"] {
            assert_eq!(Kind::parse(text), Some(Kind::VirtualService), "{text}");
        }
        assert_eq!(Kind::parse("pods"), None);
        for kind in Kind::ALL {
            assert_eq!(kind.empty().kind(), *kind);
            assert_eq!(Kind::parse(kind.plural()), Some(*kind));
            assert_eq!(Kind::parse(kind.as_str()), Some(*kind));
        }
    }

    #[test]
    fn a_stored_object_comes_back_and_unknown_fields_do_not_stop_it() {
        let raw = json!({"host": "reviews", "added_later": {"x": [1]}, "subsets": [{"name": "v1", "labels": {"a": "b"}}]});
        let mut object = Object::new(Kind::DestinationRule, "default", "reviews", raw);
        object.created = 1_700_000_000;
        object.generation = 3;
        object.revision = 17;
        object.labels.insert("a".into(), "b".into());
        let back = Object::from_stored(&object.to_json()).unwrap();
        assert_eq!(back, object);
        let Spec::DestinationRule(rule) = &*back.spec else { panic!("kind") };
        assert_eq!(rule.host, "reviews");
        assert_eq!(rule.subsets.len(), 1);
        assert!(Object::from_stored(&json!({"kind": "Pod"})).is_err());
    }
}
