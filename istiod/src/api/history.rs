//! History: the configuration as it was, what changed between two revisions, and the way back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use registry::config::Object;
use registry::state::{Batch, Command as Change, Delete, ObjectKey, Past, PastError, Put, Revision, State};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::change::{Mode, Plan};
use super::objects::{key, parse_kind};
use super::types::{ApplyReport, List, ListMeta};
use super::{Api, ApiError, Caller, aside, diff};
use crate::raft::Command;

/// What changed between two revisions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiffReport {
    /// The revision that is compared.
    pub from: u64,
    /// The revision it is compared with.
    pub to: u64,
    /// Objects that differ, by kind, namespace and name.
    pub objects: Vec<ObjectDiff>,
}

/// How one object differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ObjectDiff {
    /// `Kind/namespace/name`
    pub object: String,
    /// `added`, `changed` or `removed`.
    pub change: Difference,
    /// Unified diff of what was written, as YAML.
    pub diff: String,
}

/// What became of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Difference {
    /// It was not there before.
    Added,
    /// It is different.
    Changed,
    /// It is gone.
    Removed,
}

/// Body of `POST /api/v1/rollback`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RollbackRequest {
    /// The revision at which the configuration was as it shall be.
    pub to: u64,
    /// Only objects of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// How much of history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HistoryRetention {
    /// Number of changes.
    pub entries: u32,
    /// Seconds between a change and the newest one; 0 keeps them whatever their age.
    pub age_seconds: u64,
}

impl From<PastError> for ApiError {
    fn from(error: PastError) -> Self {
        match error {
            PastError::Future { .. } | PastError::Forgotten { .. } => Self::NotFound(error.to_string()),
            PastError::Unreadable { .. } => Self::Conflict(error.to_string()),
        }
    }
}

impl Api {
    /// One object as it was at a revision, in Kubernetes' shape.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when it was not there, or history does not reach back so far.
    pub async fn get_at(
        &self,
        caller: &Caller,
        (kind, namespace, name): (&str, &str, &str),
        revision: u64,
    ) -> Result<Value, ApiError> {
        let key = key(kind, namespace, name)?;
        caller.must_cover(namespace)?;
        let past = self.past(revision).await?;
        let object = past.objects.get(&key).map(|object| object.to_json());
        object.ok_or_else(|| ApiError::NotFound(format!("there was no {key} at revision {revision}")))
    }

    /// Objects of a kind, or of all kinds (`all`), of one of the caller's namespaces or of all, as they were at a
    /// revision.
    ///
    /// # Errors
    ///
    /// When the kind is unknown, or history does not reach back so far.
    pub async fn list_at(
        &self,
        caller: &Caller,
        (kind, namespace): (&str, Option<&str>),
        revision: u64,
    ) -> Result<List, ApiError> {
        let kind = if kind == "all" { None } else { Some(parse_kind(kind)?) };
        let past = self.past(revision).await?;
        let of_kind = past.objects.values().filter(|object| kind.is_none_or(|kind| object.kind == kind));
        let scoped = of_kind.filter(|object| {
            caller.covers(&object.namespace)
                && namespace.is_none_or(|namespace| object.namespace == namespace)
        });
        Ok(List {
            api_version: "v1".to_owned(),
            kind: "List".to_owned(),
            metadata: ListMeta { resource_version: revision.to_string(), ..ListMeta::default() },
            items: scoped.map(|object| object.to_json()).collect(),
        })
    }

    /// What differs in the caller's namespaces between two revisions; without `to`, between `from` and now.
    ///
    /// # Errors
    ///
    /// When history does not reach back so far.
    pub async fn diff(&self, caller: &Caller, from: u64, to: Option<u64>) -> Result<DiffReport, ApiError> {
        let who = caller.clone();
        let state = self.view().await?.registry;
        let to = to.unwrap_or(state.revision().0);
        aside(move || {
            let (old, new) = (state.past(Revision(from))?, state.past(Revision(to))?);
            let sides = [format!("revision {from}"), format!("revision {to}")];
            let differing = differences(&old.objects, &new.objects);
            let differing = differing.into_iter().filter(|(key, ..)| who.covers(&key.namespace));
            let objects = differing.map(|(key, before, after)| object_diff(&key, &sides, before, after));
            Ok(DiffReport { from, to, objects: objects.collect() })
        })
        .await
    }

    /// Makes the configuration what it was at a revision, in one commit of all objects that differ. An object that
    /// somebody changes meanwhile refuses it all.
    ///
    /// # Errors
    ///
    /// When history does not reach back so far, when what was then is not valid together with what stays, or when
    /// somebody else changed an object in between.
    pub async fn rollback(
        &self,
        caller: &Caller,
        request: &RollbackRequest,
        mode: Mode,
    ) -> Result<ApplyReport, ApiError> {
        match &request.namespace {
            Some(namespace) => caller.must_cover(namespace)?,
            None => caller.must_be_unlimited("a rollback of all namespaces")?,
        }
        self.raft.read_index().await?;
        let state = self.view().await?.registry;
        let (to, namespace) = (Revision(request.to), request.namespace.clone());
        let plan = aside(move || Ok(way_back(&state, &state.past(to)?, namespace.as_deref()))).await?;
        self.carry_out(caller, &format!("rollback to {to}"), plan, mode).await
    }

    /// Sets how much of history is kept.
    ///
    /// # Errors
    ///
    /// When the log cannot be written.
    pub async fn keep_history(&self, caller: &Caller, keep: HistoryRetention) -> Result<(), ApiError> {
        let age_ms = keep.age_seconds.saturating_mul(1000);
        let commands = vec![Change::SetHistoryRetention { entries: keep.entries, age_ms }];
        let batch = Batch { time_ms: self.time_ms(), author: caller.name.clone(), commands };
        self.propose(caller, "set history retention", &Command::Registry(batch)).await?;
        Ok(())
    }

    /// How much of history is kept.
    #[must_use]
    pub fn history_retention(&self) -> HistoryRetention {
        let snapshot = self.snapshot();
        let history = snapshot.history();
        HistoryRetention { entries: history.limit(), age_seconds: history.age_ms() / 1000 }
    }

    async fn past(&self, revision: u64) -> Result<Past, ApiError> {
        let state = self.view().await?.registry;
        aside(move || Ok(state.past(Revision(revision))?)).await
    }
}

type Objects = BTreeMap<ObjectKey, Arc<Object>>;
type Differing<'a> = (ObjectKey, Option<&'a Arc<Object>>, Option<&'a Arc<Object>>);

/// Every object that its author would call different, by key, as it is in both.
fn differences<'a>(old: &'a Objects, new: &'a Objects) -> Vec<Differing<'a>> {
    let keys: BTreeSet<&ObjectKey> = old.keys().chain(new.keys()).collect();
    let pairs = keys.into_iter().map(|key| (key.clone(), old.get(key), new.get(key)));
    pairs.filter(|(_, before, after)| !same(*before, *after)).collect()
}

fn same(a: Option<&Arc<Object>>, b: Option<&Arc<Object>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b) || diff::written(a) == diff::written(b),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

fn object_diff(
    key: &ObjectKey,
    [from, to]: &[String; 2],
    before: Option<&Arc<Object>>,
    after: Option<&Arc<Object>>,
) -> ObjectDiff {
    let change = match (before, after) {
        (None, _) => Difference::Added,
        (Some(_), Some(_)) => Difference::Changed,
        (Some(_), None) => Difference::Removed,
    };
    let [old, new] = [before, after].map(|object| object.map(|object| diff::written(object)));
    let name = key.to_string();
    ObjectDiff { diff: diff::unified(&name, [from, to], old.as_ref(), new.as_ref()), object: name, change }
}

/// What leads from `state` back to `past`, each object at the revision that it has now.
fn way_back(state: &State, past: &Past, namespace: Option<&str>) -> Plan {
    let now: Objects = state.objects().map(|(key, object)| (key.clone(), object.clone())).collect();
    let mut plan = Plan::default();
    for (key, current, then) in differences(&now, &past.objects) {
        if namespace.is_some_and(|namespace| key.namespace != namespace) {
            continue;
        }
        let expected = Some(Revision(current.map_or(0, |object| object.revision)));
        match then {
            Some(object) => plan.puts.push(Put { object: object.clone(), expected }),
            None => plan.deletes.push(Delete { key, expected }),
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Vec<Object> {
        let rule = |(name, host): (&str, &str)| {
            format!(
                "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}}}\nspec: {{host: {host}}}\n"
            )
        };
        let text: String = text.split(' ').filter_map(|part| part.split_once('=')).map(rule).collect();
        registry::config::parse("test.yaml", &text).unwrap().0
    }

    #[test]
    fn the_way_back_leads_to_the_past_and_expects_what_is_now() {
        let mut state = State::default();
        state.apply(Revision(1), &Batch::put_objects(1, "a", rules("a=x b=y")));
        state.apply(Revision(2), &Batch::put_objects(2, "a", rules("a=z c=y")));
        let gone = state.objects().map(|(key, _)| key.clone()).find(|key| key.name == "b").unwrap();
        state.apply(Revision(3), &Batch::delete_objects(3, "a", [gone]));
        let past = state.past(Revision(1)).unwrap();
        let plan = way_back(&state, &past, None);
        assert_eq!(plan.puts.iter().map(|put| put.expected.unwrap().0).collect::<Vec<_>>(), [2, 0]);
        let delete = &plan.deletes[0];
        assert_eq!((delete.key.name.as_str(), delete.expected), ("c", Some(Revision(2))));
        assert!(way_back(&state, &past, Some("other")).is_empty());

        let command = Change::Change { puts: plan.puts, deletes: plan.deletes };
        let batch = Batch { time_ms: 4, author: "a".to_owned(), commands: vec![command] };
        let (_, outcome) = state.apply(Revision(4), &batch);
        assert!(outcome.conflict().is_none());
        let now = state.past(Revision(4)).unwrap();
        assert!(differences(&past.objects, &now.objects).is_empty());
        assert!(way_back(&state, &past, None).is_empty());
        // The way back can be taken back too.
        assert_eq!(way_back(&state, &state.past(Revision(3)).unwrap(), None).puts.len(), 2);
    }
}
