//! Objects of one kind by namespace, oldest first, and how a workload is selected.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::config::{Kind, Object, Spec};
use crate::merge::declare::{Labels, contains};
use crate::model::extension::{EnvoyFilter, ProxyConfigResource, TrafficExtension, WasmPlugin};
use crate::model::security::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication};
use crate::model::telemetry::Telemetry;
use crate::model::traffic::{Gateway, Sidecar};
use crate::state::State;

/// An object and its typed value, which several readers share.
pub type Typed<T> = (Arc<Object>, Arc<T>);

/// A kind whose objects hold for workloads in scope.
pub(super) trait Scoped: Clone {
    const KIND: Kind;
    /// The value in a spec of this kind.
    fn of(spec: &Spec) -> Option<&Self>;
    /// Labels that a workload must have; none is every workload in scope.
    fn selector(&self) -> Option<&Labels>;
    /// Attached to another object instead of selecting workloads: it holds for no sidecar.
    fn attached(&self) -> bool {
        false
    }
}

/// How the kinds that differ only in the names of their fields select.
macro_rules! scoped {
    ($kind:ident($type:ty), $selector:ident . $labels:ident $(, attached $(($one:ident))? $many:ident)?) => {
        impl Scoped for $type {
            const KIND: Kind = Kind::$kind;
            fn of(spec: &Spec) -> Option<&Self> {
                if let Spec::$kind(value) = spec { Some(value) } else { None }
            }
            fn selector(&self) -> Option<&Labels> {
                self.$selector.as_ref().map(|selector| &selector.$labels).filter(|labels| !labels.is_empty())
            }
            $(fn attached(&self) -> bool {
                !self.$many.is_empty() $(|| self.$one.is_some())?
            })?
        }
    };
}

scoped!(AuthorizationPolicy(AuthorizationPolicy), selector.match_labels, attached(target_ref) target_refs);
scoped!(RequestAuthentication(RequestAuthentication), selector.match_labels, attached(target_ref) target_refs);
scoped!(Telemetry(Telemetry), selector.match_labels, attached(target_ref) target_refs);
scoped!(WasmPlugin(WasmPlugin), selector.match_labels, attached(target_ref) target_refs);
scoped!(TrafficExtension(TrafficExtension), selector.match_labels, attached target_refs);
scoped!(EnvoyFilter(EnvoyFilter), workload_selector.labels, attached target_refs);
scoped!(PeerAuthentication(PeerAuthentication), selector.match_labels);
scoped!(ProxyConfig(ProxyConfigResource), selector.match_labels);
scoped!(Sidecar(Sidecar), workload_selector.labels);

impl Scoped for Gateway {
    const KIND: Kind = Kind::Gateway;
    fn of(spec: &Spec) -> Option<&Self> {
        if let Spec::Gateway(value) = spec { Some(value) } else { None }
    }
    fn selector(&self) -> Option<&Labels> {
        Some(&self.selector).filter(|labels| !labels.is_empty())
    }
}

/// Oldest first, then by name: the order in which conflicts are decided.
pub(super) fn age(object: &Object) -> (i64, &str, &str) {
    (object.created, &object.name, &object.namespace)
}

/// The objects of one kind. A copy shares the lists of all namespaces.
#[derive(Debug, Clone)]
pub(super) struct Collection<T> {
    by_namespace: Arc<BTreeMap<String, Arc<[Typed<T>]>>>,
}

impl<T> Default for Collection<T> {
    fn default() -> Self {
        Self { by_namespace: Arc::default() }
    }
}

impl<T: Scoped> Collection<T> {
    /// All objects of the kind.
    pub(super) fn build(state: &State) -> Self {
        let namespaces = state.objects_of(T::KIND).map(|(key, _)| key.namespace.clone()).collect();
        let mut collection = Self::default();
        collection.update(state, &namespaces);
        collection
    }

    /// Reads these namespaces again.
    pub(super) fn update(&mut self, state: &State, namespaces: &BTreeSet<String>) {
        if namespaces.is_empty() {
            return;
        }
        let all = Arc::make_mut(&mut self.by_namespace);
        for namespace in namespaces {
            let known: BTreeMap<&str, &Typed<T>> = all
                .get(namespace)
                .into_iter()
                .flat_map(|list| list.iter())
                .map(|t| (t.0.name.as_str(), t))
                .collect();
            let typed = |object: &Arc<Object>| -> Option<Typed<T>> {
                match known.get(object.name.as_str()) {
                    Some(same) if Arc::ptr_eq(&same.0, object) => Some(Typed::clone(same)),
                    _ => Some((Arc::clone(object), Arc::new(T::of(&object.spec)?.clone()))),
                }
            };
            let mut list: Vec<_> =
                state.objects_in(T::KIND, namespace).filter_map(|(_, o)| typed(o)).collect();
            list.sort_by(|a, b| age(&a.0).cmp(&age(&b.0)));
            if list.is_empty() {
                all.remove(namespace);
            } else {
                all.insert(namespace.clone(), list.into());
            }
        }
    }

    /// The objects of one namespace, oldest first.
    pub(super) fn in_namespace(&self, namespace: &str) -> &[Typed<T>] {
        self.by_namespace.get(namespace).map_or(&[], |list| list)
    }

    /// All objects, by namespace, then oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Typed<T>> {
        self.by_namespace.values().flat_map(|list| list.iter())
    }

    /// The namespaces whose objects hold for a workload of `namespace`: the root's first.
    pub(super) fn scopes<'a>(
        &'a self,
        root: &'a str,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Typed<T>> {
        let own = (namespace != root).then(|| self.in_namespace(namespace));
        self.in_namespace(root).iter().chain(own.into_iter().flatten())
    }

    /// The objects that hold for a workload: those of the root namespace first, each namespace's oldest first.
    pub(super) fn selecting(&self, root: &str, namespace: &str, labels: &Labels) -> Vec<Typed<T>> {
        self.scopes(root, namespace).filter(|(_, value)| selects(&**value, labels)).cloned().collect()
    }

    /// At most one object per scope, the oldest: the mesh's, the namespace's, the workload's.
    pub(super) fn layers(&self, root: &str, namespace: &str, labels: &Labels) -> Vec<Typed<T>> {
        let without = |ns: &str| {
            self.in_namespace(ns).iter().find(|(_, value)| value.selector().is_none() && !value.attached())
        };
        let own = (namespace != root).then(|| without(namespace)).flatten();
        let workload = self
            .in_namespace(namespace)
            .iter()
            .find(|(_, value)| value.selector().is_some() && selects(&**value, labels));
        [without(root), own, workload].into_iter().flatten().cloned().collect()
    }
}

/// The object holds for a workload with these labels.
pub(super) fn selects<T: Scoped>(value: &T, labels: &Labels) -> bool {
    !value.attached() && value.selector().is_none_or(|wanted| contains(labels, wanted))
}
