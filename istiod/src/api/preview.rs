//! What a change would do to the proxies that are connected to the members, for people and programs to read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use registry::state::Batch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use wire::json::any_to_json;
use xds::resources::{Resource, Type};
use xds::status::ProxyStatus;

use super::history::Difference;
use super::{Api, ApiError, diff, view};
use crate::preview::{Foreseen, ProxyChange, ResourceChange};
use crate::raft::Command;
use crate::raft::wire::LookRequest;
use crate::raft::wire::look_request::At;

/// So many resources are told with their differences; of the rest only names.
const MOST_DIFFS: usize = 200;

/// Which proxies and resources a change would touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreviewReport {
    /// The revision that the change was put on.
    pub base: u64,
    /// The members whose proxies were looked at.
    pub members: Vec<u64>,
    /// How many proxies are connected to them.
    pub connected: usize,
    /// A member did not answer in time: its proxies were not looked at.
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
    /// Hash of what they have, hexadecimal; absent when they have nothing of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// Hash of what they would have; absent when it would be removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

impl Api {
    /// What `foreseen`, which is `batch` on revision `base`, would do to the proxies of all members.
    ///
    /// # Errors
    ///
    /// When a resource cannot be shown.
    pub(super) async fn preview(
        &self,
        foreseen: Arc<Foreseen>,
        base: u64,
        batch: &Batch,
    ) -> Result<PreviewReport, ApiError> {
        let command = Command::Registry(batch.clone()).encode();
        let command = command.map_err(|error| ApiError::Internal(error.to_string()))?;
        let request = LookRequest { revision: base, at: Some(At::Change(command.into())) };
        let served = self.served();
        let (own, told) = tokio::join!(served.preview(foreseen, base), self.members.look(request));
        let mut report = own?;
        report.partial = told.partial;
        told.answers.into_iter().for_each(|other| report.add(other));
        Ok(report)
    }
}

/// What `foreseen`, which was put on revision `base`, would do to the proxies that are connected to `member`.
pub(super) fn report(
    foreseen: &Foreseen,
    connected: &[ProxyStatus],
    base: u64,
    member: u64,
) -> Result<PreviewReport, ApiError> {
    let changes: Vec<_> = connected
        .iter()
        .filter_map(|status| Some((status.proxy.clone(), foreseen.on(&status.proxy, status.variant)?)))
        .collect();
    let touched = changes
        .iter()
        .map(|(proxy, change)| preview_proxy([&proxy.id, &proxy.name, &proxy.namespace], change));
    let proxies: Vec<PreviewProxy> = touched.collect();
    Ok(PreviewReport {
        base,
        members: vec![member],
        connected: connected.len(),
        partial: false,
        hidden: 0,
        bytes: proxies.iter().map(|proxy| proxy.bytes).sum(),
        proxies,
        resources: resources(changes.iter().map(|(proxy, change)| (proxy.id.as_str(), change)))?,
    })
}

impl PreviewReport {
    /// Adds what another member says of its proxies. Who is on the way from one member to another counts once.
    fn add(&mut self, other: Self) {
        self.members.extend(other.members);
        self.members.sort_unstable();
        self.connected += other.connected;
        let known: BTreeSet<String> = self.proxies.iter().map(|proxy| proxy.id.clone()).collect();
        self.proxies.extend(other.proxies.into_iter().filter(|proxy| !known.contains(&proxy.id)));
        self.proxies.sort_by(|a, b| a.id.cmp(&b.id));
        self.bytes = self.proxies.iter().map(|proxy| proxy.bytes).sum();
        self.resources.extend(other.resources);
        self.resources.sort_by(|a, b| a.key().cmp(&b.key()));
        self.resources.dedup_by(|later, kept| {
            let same = later.key() == kept.key();
            if same {
                kept.proxies.append(&mut later.proxies);
                kept.proxies.sort_unstable();
                kept.proxies.dedup();
                kept.diff = kept.diff.take().or_else(|| later.diff.take());
            }
            same
        });
        self.resources.iter_mut().skip(MOST_DIFFS).for_each(|resource| resource.diff = None);
    }

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

impl PreviewResource {
    /// The same resource with the same values, for other proxies.
    fn key(&self) -> (&str, &str, &Option<String>, &Option<String>) {
        (&self.kind, &self.name, &self.before, &self.after)
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
    for (at, ((kind, name, versions), shared)) in shared.into_iter().enumerate() {
        let change = match (shared.before, shared.after) {
            (None, _) => Difference::Added,
            (Some(_), Some(_)) => Difference::Changed,
            (Some(_), None) => Difference::Removed,
        };
        let diff = if at < MOST_DIFFS { Some(readable(kind, name, &shared)?) } else { None };
        let (kind, name) = (view::short(kind).to_owned(), name.to_owned());
        let [before, after] = versions.map(|version| version.map(|version| format!("{version:016x}")));
        out.push(PreviewResource { kind, name, change, proxies: shared.proxies, diff, before, after });
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
    use std::time::Duration;

    use registry::state::State;
    use xds::proxy::Proxy;
    use xds::stream::Variant;

    use super::*;

    const ENTRY: &str = "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: e, namespace: a}, \
        spec: {hosts: [e.example], exportTo: ['.'], resolution: STATIC, \
        ports: [{number: 80, name: http, protocol: HTTP}], endpoints: [{address: 10.1.0.1}]}}";

    fn status(number: usize, namespace: &str) -> ProxyStatus {
        let id = format!("sidecar~10.0.0.{number}~app-{number}.{namespace}~{namespace}.svc.cluster.local");
        let node = wire::json::message_from_json(&serde_json::json!({ "id": id })).unwrap();
        ProxyStatus {
            proxy: Arc::new(Proxy::from_node(&node, None).unwrap()),
            variant: Variant::Delta,
            version: String::new(),
            connected: Duration::ZERO,
            revision: 0,
            types: BTreeMap::new(),
        }
    }

    #[test]
    fn what_members_say_of_their_proxies_is_together_what_one_would_say_of_all() {
        let state = State::default();
        let before = Arc::new(registry::snapshot::Snapshot::build(&state));
        let (objects, _) = registry::config::parse("entry", ENTRY).unwrap();
        let foreseen = Foreseen::of(&state, before, &Batch::put_objects(1, "ann", objects));
        // Proxies of two namespaces see different things; one that moved is told by two members.
        let all: Vec<_> = (0..6).map(|n| status(n, if n % 2 == 0 { "a" } else { "b" })).collect();
        let whole = report(&foreseen, &all, 7, 1).unwrap();
        assert!(!whole.proxies.is_empty() && whole.resources.len() > 1, "{whole:?}");
        for split in [0, 1, 3, 6] {
            let (ours, theirs) = all.split_at(split);
            let mut merged = report(&foreseen, ours, 7, 1).unwrap();
            merged.add(report(&foreseen, theirs, 7, 3).unwrap());
            merged.add(report(&foreseen, &all[..1], 7, 2).unwrap());
            assert_eq!((merged.members.as_slice(), merged.connected), (&[1, 2, 3][..], 7));
            let expect = PreviewReport { members: merged.members.clone(), connected: 7, ..whole.clone() };
            assert_eq!(merged, expect, "{split}");
        }
    }

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
