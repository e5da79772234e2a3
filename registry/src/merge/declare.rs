//! What a `ServiceEntry` or a `WorkloadEntry` object says, read from the object.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{Object, Spec};
use crate::model::service::Hostname;
use crate::model::traffic::ServiceEntry;
use crate::model::workload::WorkloadEntry;

/// Label names and values.
pub type Labels = BTreeMap<String, String>;

/// The `ServiceEntry` in `object`, if it is one.
#[must_use]
pub fn service_entry(object: &Object) -> Option<&ServiceEntry> {
    if let Spec::ServiceEntry(entry) = &*object.spec { Some(entry) } else { None }
}

/// The `WorkloadEntry` in `object`, if it is one.
#[must_use]
pub fn workload_entry(object: &Object) -> Option<&WorkloadEntry> {
    if let Spec::WorkloadEntry(entry) = &*object.spec { Some(entry) } else { None }
}

/// The hosts that a `ServiceEntry` declares, in lower case; none for other kinds.
#[must_use]
pub fn hosts(object: &Object) -> BTreeSet<Hostname> {
    service_entry(object).into_iter().flat_map(|entry| &entry.hosts).map(|h| h.to_ascii_lowercase()).collect()
}

/// The labels that a `ServiceEntry` selects workloads by.
#[must_use]
pub fn selector(object: &Object) -> Option<&Labels> {
    let labels = &service_entry(object)?.workload_selector.as_ref()?.labels;
    (!labels.is_empty()).then_some(labels)
}

/// A `ServiceEntry` that selects workloads.
#[must_use]
pub fn has_selector(object: &Object) -> bool {
    selector(object).is_some()
}

/// A `ServiceEntry` that selects a workload with these labels, of its own namespace.
#[must_use]
pub fn selects(object: &Object, labels: &Labels) -> bool {
    selector(object).is_some_and(|wanted| contains(labels, wanted))
}

/// All of `wanted` are among `labels`.
#[must_use]
pub fn contains(labels: &Labels, wanted: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The labels of the workload that a `WorkloadEntry` describes: those of its spec, under those of its metadata.
#[must_use]
pub fn workload_labels(object: &Object) -> Option<Labels> {
    let mut labels = workload_entry(object)?.labels.clone();
    labels.extend(object.labels.iter().map(|(key, value)| (key.clone(), value.clone())));
    Some(labels)
}

/// The workload that a `WorkloadEntry` describes has all labels of `wanted`.
#[must_use]
pub fn workload_has(object: &Object, wanted: &Labels) -> bool {
    let own = |key: &String| object.labels.get(key).or_else(|| workload_entry(object)?.labels.get(key));
    wanted.iter().all(|(key, value)| own(key) == Some(value))
}
