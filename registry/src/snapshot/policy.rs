//! Which connections a workload accepts.
//!
//! Source: Istio, `ComposePeerAuthentication`.

use std::collections::BTreeMap;

use super::scoped::Scoped as _;
use super::scoped::{Collection, Typed, selects};
use crate::merge::declare::Labels;
use crate::model::security::{MutualTls, MutualTlsMode, PeerAuthentication};

/// What the PeerAuthentications of the mesh, the namespace and the workload say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerPolicy {
    /// For every port; never `Unset`.
    pub mode: MutualTlsMode,
    /// For single ports of the workload, where they differ; never `Unset`.
    pub port_level: BTreeMap<u16, MutualTlsMode>,
}

impl PeerPolicy {
    /// The mode of one port of the workload.
    #[must_use]
    pub fn mode_of(&self, workload_port: u16) -> MutualTlsMode {
        self.port_level.get(&workload_port).copied().unwrap_or(self.mode)
    }
}

pub(super) fn peer(
    policies: &Collection<PeerAuthentication>,
    root: &str,
    namespace: &str,
    labels: &Labels,
) -> PeerPolicy {
    let without = |ns: &str| policies.in_namespace(ns).iter().find(|(_, p)| p.selector().is_none());
    // A selector in the root namespace would select workloads everywhere; such an object is ignored.
    let workload = (namespace != root)
        .then(|| {
            let own = policies.in_namespace(namespace).iter();
            own.filter(|(_, p)| p.selector().is_some()).find(|(_, p)| selects(&**p, labels))
        })
        .flatten();
    let layers: [Option<&Typed<PeerAuthentication>>; 3] = [without(root), without(namespace), workload];
    let mut mode = MutualTlsMode::Permissive;
    for (_, policy) in layers.into_iter().flatten() {
        mode = set(policy.mtls.as_ref()).unwrap_or(mode);
    }
    let ports = workload.into_iter().flat_map(|(_, policy)| &policy.port_level_mtls);
    let port_level = ports.map(|(port, mtls)| (*port, set(Some(mtls)).unwrap_or(mode))).collect();
    PeerPolicy { mode, port_level }
}

fn set(mtls: Option<&MutualTls>) -> Option<MutualTlsMode> {
    mtls.map(|mtls| mtls.mode).filter(|mode| *mode != MutualTlsMode::Unset)
}
