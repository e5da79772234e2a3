//! What a change would do to the proxies that are connected to this member, for people and programs to read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use wire::json::any_to_json;
use xds::resources::{Resource, Type};

use super::history::Difference;
use super::{Api, ApiError, aside, diff, view};
use crate::preview::{Foreseen, ProxyChange, ResourceChange};

/// So many resources are told with their differences; of the rest only names.
const MOST_DIFFS: usize = 200;

/// Which proxies and resources a change would touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreviewReport {
    /// The revision that the change was put on.
    pub base: u64,
    /// The member whose proxies were looked at.
    pub member: u64,
    /// How many proxies are connected to it.
    pub connected: usize,
    /// Whether proxies may be connected to other members, which were not looked at.
    pub partial: bool,
    /// Bytes of resources that would be pushed to all of them, without the envelopes of messages.
    pub bytes: u64,
    /// How many proxies would be sent something that the caller may not see.
    pub hidden: usize,
    /// The proxies that would be sent something, by node id.
    pub proxies: Vec<PreviewProxy>,
    /// The resources that would be added, changed or removed; the same one for several proxies is one.
    pub resources: Vec<PreviewResource>,
}

/// What one proxy would be sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PreviewProxy {
    /// Node id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// How many resources it would get that it does not have.
    pub added: usize,
    /// How many would be different.
    pub changed: usize,
    /// How many it would be told to drop.
    pub removed: usize,
    /// How many it would be sent again although they are the same, as a stock Envoy needs it.
    pub resent: usize,
    /// Bytes of resources.
    pub bytes: u64,
}

/// One resource that would be different, for some proxies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PreviewResource {
    /// `CDS`, `EDS`, `LDS` or `RDS`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its name.
    pub name: String,
    /// What would become of it.
    pub change: Difference,
    /// Node ids of the proxies concerned.
    pub proxies: Vec<String>,
    /// Unified diff as YAML; absent when there are too many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff: Option<String>,
}

impl Api {
    /// What `foreseen`, which was put on revision `base`, would do to the proxies of this member.
    ///
    /// # Errors
    ///
    /// When a resource cannot be shown.
    pub(super) async fn preview(
        &self,
        foreseen: Arc<Foreseen>,
        base: u64,
    ) -> Result<PreviewReport, ApiError> {
        let connected = self.status.proxies(Instant::now().into_std());
        let raft = self.raft.status().borrow().clone();
        aside(move || {
            let changes: Vec<_> = connected
                .iter()
                .filter_map(|status| {
                    Some((status.proxy.clone(), foreseen.on(&status.proxy, status.variant)?))
                })
                .collect();
            let touched = changes
                .iter()
                .map(|(proxy, change)| preview_proxy([&proxy.id, &proxy.name, &proxy.namespace], change));
            let proxies: Vec<PreviewProxy> = touched.collect();
            Ok(PreviewReport {
                base,
                member: raft.id,
                connected: connected.len(),
                partial: raft.voters.len() + raft.learners.len() > 1,
                hidden: 0,
                bytes: proxies.iter().map(|proxy| proxy.bytes).sum(),
                proxies,
                resources: resources(changes.iter().map(|(proxy, change)| (proxy.id.as_str(), change)))?,
            })
        })
        .await
    }
}

impl PreviewReport {
    /// The part that a caller may see whose rights are limited to some namespaces.
    pub(super) fn visible_to(mut self, covers: impl Fn(&str) -> bool) -> Self {
        let all = self.proxies.len();
        self.proxies.retain(|proxy| covers(&proxy.namespace));
        self.hidden = all - self.proxies.len();
        if self.hidden == 0 {
            return self;
        }
        self.bytes = self.proxies.iter().map(|proxy| proxy.bytes).sum();
        let seen: BTreeSet<&str> = self.proxies.iter().map(|proxy| proxy.id.as_str()).collect();
        for resource in &mut self.resources {
            resource.proxies.retain(|proxy| seen.contains(proxy.as_str()));
        }
        self.resources.retain(|resource| !resource.proxies.is_empty());
        self
    }
}

/// What is said when a change touches more proxies than `percent` of those connected.
pub(super) fn too_many(report: &PreviewReport, percent: u32) -> Option<String> {
    let (touched, connected) = (report.proxies.len(), report.connected);
    let allowed = usize::try_from(percent).unwrap_or(usize::MAX).saturating_mul(connected);
    (touched.saturating_mul(100) > allowed).then(|| {
        format!(
            "the change touches {touched} of {connected} proxies; maxAffectedProxiesPercent of the mesh allows {percent} %"
        )
    })
}

fn preview_proxy(names: [&str; 3], change: &ProxyChange) -> PreviewProxy {
    let [id, name, namespace] = names.map(str::to_owned);
    let bytes = change.bytes;
    let mut proxy = PreviewProxy { id, name, namespace, added: 0, changed: 0, removed: 0, resent: 0, bytes };
    for resource in change.resources.values() {
        match resource {
            ResourceChange::Added(_) => proxy.added += 1,
            ResourceChange::Changed { .. } => proxy.changed += 1,
            ResourceChange::Removed(_) => proxy.removed += 1,
            ResourceChange::Resent(_) => proxy.resent += 1,
        }
    }
    proxy
}

/// A resource before and after, which several proxies may have in common.
struct Shared<'a> {
    before: Option<&'a Arc<Resource>>,
    after: Option<&'a Arc<Resource>>,
    proxies: Vec<String>,
}

/// The resources that differ, each once for all the proxies that have the same before and after.
fn resources<'a>(
    changes: impl Iterator<Item = (&'a str, &'a ProxyChange)>,
) -> Result<Vec<PreviewResource>, ApiError> {
    let mut shared: BTreeMap<(Type, &str, [Option<u64>; 2]), Shared<'_>> = BTreeMap::new();
    for (proxy, change) in changes {
        for ((kind, name), resource) in &change.resources {
            let (before, after) = match resource {
                ResourceChange::Added(after) => (None, Some(after)),
                ResourceChange::Changed { before, after } => (Some(before), Some(after)),
                ResourceChange::Removed(before) => (Some(before), None),
                ResourceChange::Resent(_) => continue,
            };
            let versions = [before, after].map(|resource| resource.map(|resource| resource.version));
            let entry = shared.entry((*kind, name, versions));
            entry
                .or_insert_with(|| Shared { before, after, proxies: Vec::new() })
                .proxies
                .push(proxy.to_owned());
        }
    }
    let mut out = Vec::with_capacity(shared.len());
    for (at, ((kind, name, _), shared)) in shared.into_iter().enumerate() {
        let change = match (shared.before, shared.after) {
            (None, _) => Difference::Added,
            (Some(_), Some(_)) => Difference::Changed,
            (Some(_), None) => Difference::Removed,
        };
        let diff = if at < MOST_DIFFS { Some(readable(kind, name, &shared)?) } else { None };
        let (kind, name) = (view::short(kind).to_owned(), name.to_owned());
        out.push(PreviewResource { kind, name, change, proxies: shared.proxies, diff });
    }
    Ok(out)
}

fn readable(kind: Type, name: &str, shared: &Shared<'_>) -> Result<String, ApiError> {
    let json =
        |resource: Option<&Arc<Resource>>| resource.map(|resource| any_to_json(&resource.body)).transpose();
    let failed = |error: wire::json::JsonError| ApiError::Internal(error.to_string());
    let (before, after) = (json(shared.before).map_err(failed)?, json(shared.after).map_err(failed)?);
    let name = format!("{} {name}", view::short(kind));
    Ok(diff::unified(&name, ["now", "then"], before.as_ref(), after.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_may_touch_the_share_of_proxies_that_the_mesh_allows() {
        let report = |touched: usize, connected: usize| {
            let change = ProxyChange { resources: BTreeMap::new(), bytes: 1 };
            let proxy = |at: usize| preview_proxy([&at.to_string(), "a", "b"], &change);
            PreviewReport {
                connected,
                proxies: (0..touched).map(proxy).collect(),
                ..PreviewReport::default()
            }
        };
        for (touched, connected, percent, allowed) in [
            (0, 0, 0, true),
            (0, 9, 0, true),
            (1, 9, 0, false),
            (5, 20, 25, true),
            (6, 20, 25, false),
            (20, 20, 100, true),
        ] {
            let refusal = too_many(&report(touched, connected), percent);
            assert_eq!(refusal.is_none(), allowed, "{touched} of {connected} at {percent} %: {refusal:?}");
        }
    }
}
