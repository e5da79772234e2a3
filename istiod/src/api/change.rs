//! A change of the configuration, from a plan to a commit: checked as a whole, foreseen if that is asked for or the
//! mesh demands it, and committed in one entry of the log.

use std::collections::BTreeSet;
use std::sync::Arc;

use registry::config::{Kind, Object, Related, Severity};
use registry::model::mesh::MeshConfig;
use registry::snapshot::Snapshot;
use registry::state::{
    Batch, Command as Change, Delete, ObjectKey, ObjectResult, Outcome as RegistryOutcome, Put, Revision,
};

use super::preview;
use super::types::{Action, Applied, ApplyReport, Mistake};
use super::{Api, ApiError, Caller, LITTLE, aside_unless};
use crate::raft::{Command, Outcome};

/// What shall be different.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Objects created or replaced.
    pub puts: Vec<Put>,
    /// Objects removed.
    pub deletes: Vec<Delete>,
    /// What was noticed while it was made.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Nothing shall be different.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.deletes.is_empty()
    }

    fn keys(&self) -> BTreeSet<ObjectKey> {
        let puts = self.puts.iter().map(|put| ObjectKey::of(&put.object));
        puts.chain(self.deletes.iter().map(|delete| delete.key.clone())).collect()
    }

    fn batch(self, time_ms: i64, author: &str) -> Batch {
        let command = Change::Change { puts: self.puts, deletes: self.deletes };
        Batch { time_ms, author: author.to_owned(), commands: vec![command] }
    }
}

/// How a plan is carried out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mode {
    /// Check everything and commit nothing.
    pub dry_run: bool,
    /// Also tell which proxies and resources would change; commits nothing either.
    pub preview: bool,
    /// Commit even if it touches more proxies than the mesh allows in one change.
    pub force: bool,
}

impl Api {
    /// Carries out a plan in one commit, or tells what that would do. `action` is what the caller did, for the audit
    /// trail.
    ///
    /// # Errors
    ///
    /// An object that the caller may not change; every mistake that shows when the objects are seen together with those
    /// that stay; a conflict with somebody else's change; more proxies than the mesh allows.
    pub(super) async fn carry_out(
        &self,
        caller: &Caller,
        action: &str,
        plan: Plan,
        mode: Mode,
    ) -> Result<ApplyReport, ApiError> {
        plan.keys().iter().try_for_each(|key| may_change(caller, key.kind, &key.namespace))?;
        let snapshot = self.snapshot();
        let domain = self.issuing.load().trust_domain().as_str().to_owned();
        let little = snapshot.objects().take(LITTLE).count() + plan.puts.len() < LITTLE;
        let (plan, warnings) = aside_unless(little, move || {
            let mut plan = plan;
            let mut warnings = std::mem::take(&mut plan.warnings);
            warnings.extend(check(&snapshot, &plan, &domain)?);
            Ok((plan, warnings))
        })
        .await?;
        let batch = plan.batch(self.time_ms(), &caller.name);
        let limit = self.snapshot().mesh().max_affected_proxies_percent.filter(|_| !mode.force);
        let only_told = mode.dry_run || mode.preview;
        if only_told || limit.is_some() {
            let (foreseen, base) = self.served().foresee(batch.clone()).await?;
            let preview = match mode.preview || limit.is_some() {
                true => Some(self.preview(foreseen.clone(), base, &batch).await?),
                false => None,
            };
            let refusal = limit.zip(preview.as_ref()).and_then(|(limit, all)| preview::too_many(all, limit));
            if only_told {
                let mut report = report(base, &foreseen.outcome, warnings)?;
                report.warnings.extend(refusal);
                let shown = preview.filter(|_| mode.preview);
                report.preview = shown.map(|all| all.visible_to(|namespace| caller.covers(namespace)));
                return Ok(report);
            }
            if let Some(refusal) = refusal {
                return Err(ApiError::Conflict(format!("{refusal}; force it if that is meant")));
            }
        }
        let (revision, outcome) = self.propose(caller, action, &Command::Registry(batch)).await?;
        let Outcome::Registry(outcome) = outcome else {
            return Err(ApiError::Internal("not an outcome of the registry".to_owned()));
        };
        report(revision.0, &outcome, warnings)
    }
}

/// The answer to a change, from what became of its objects.
fn report(revision: u64, outcome: &RegistryOutcome, warnings: Vec<String>) -> Result<ApplyReport, ApiError> {
    if let Some(conflict) = outcome.conflict() {
        return Err(conflicting(&conflict.key, conflict.result));
    }
    let objects = outcome.objects().filter_map(|o| Some(applied(&o.key, done(o.result)?))).collect();
    Ok(ApplyReport { revision, objects, warnings, preview: None })
}

/// Whoever is limited to namespaces changes nothing that holds for the whole mesh.
pub(super) fn may_change(caller: &Caller, kind: Kind, namespace: &str) -> Result<(), ApiError> {
    caller.must_cover(namespace)?;
    if kind == Kind::MeshConfig { caller.must_be_unlimited("settings of the whole mesh") } else { Ok(()) }
}

/// What only shows when objects are seen together: errors refuse the change, warnings are told.
fn check(snapshot: &Snapshot, plan: &Plan, domain: &str) -> Result<Vec<String>, ApiError> {
    let changed = plan.keys();
    let puts: Vec<&Object> = plan.puts.iter().map(|put| put.object.as_ref()).collect();
    let stays = |object: &&Arc<Object>| !changed.contains(&ObjectKey::of(object));
    // What was wrong before is not the fault of this change; what stays and becomes wrong is, where something is removed on
    // which it may depend.
    let known = known_problems(snapshot, plan);
    let related = Related::to(&puts);
    let mut all: Vec<&Object> = if known.is_some() {
        snapshot.objects().filter(stays).map(AsRef::as_ref).collect()
    } else {
        let kept = related.kinds().flat_map(|kind| snapshot.objects_of(kind));
        kept.filter(|object| related.concern(object)).filter(stays).map(AsRef::as_ref).collect()
    };
    all.extend(&puts);
    let ours: BTreeSet<String> = puts.iter().map(|object| object.id()).collect();
    let mut errors = foreign_domains(&puts, domain);
    let mut warnings = Vec::new();
    for problem in registry::config::validate_set(&all) {
        let told = problem.to_string();
        let new = known.as_ref().is_some_and(|known| !known.contains(&told));
        if !new && !ours.contains(&problem.object) {
            continue;
        }
        match problem.severity {
            Severity::Error => errors.push(Mistake::from(&problem)),
            Severity::Warning => warnings.push(told),
        }
    }
    if errors.is_empty() { Ok(warnings) } else { Err(mistakes(errors)) }
}

/// What is wrong today, if the plan removes something on which what stays may depend.
fn known_problems(snapshot: &Snapshot, plan: &Plan) -> Option<BTreeSet<String>> {
    if plan.deletes.is_empty() {
        return None;
    }
    let today: Vec<&Object> = snapshot.objects().map(AsRef::as_ref).collect();
    Some(registry::config::validate_set(&today).iter().map(ToString::to_string).collect())
}

fn conflicting(key: &ObjectKey, result: ObjectResult) -> ApiError {
    ApiError::Conflict(match result {
        ObjectResult::Conflict { expected: Revision(0), found } => {
            format!("{key} exists, at revision {found}")
        }
        ObjectResult::Conflict { expected, found: Revision(0) } => {
            format!("{key} does not exist, expected was revision {expected}")
        }
        ObjectResult::Conflict { expected, found } => {
            format!("{key} is at revision {found}, expected was {expected}")
        }
        ObjectResult::Created
        | ObjectResult::Configured
        | ObjectResult::Unchanged(_)
        | ObjectResult::Deleted
        | ObjectResult::NotFound
        | ObjectResult::NotApplied => format!("{key} was changed by somebody else"),
    })
}

/// Identities are of the domain that the authority issues; settings cannot say otherwise.
fn foreign_domains(objects: &[&Object], ours: &str) -> Vec<Mistake> {
    let said = objects.iter().filter_map(|object| Some((object, object.get::<MeshConfig>()?)));
    let foreign = said.filter(|(_, mesh)| !mesh.trust_domain.is_empty() && mesh.trust_domain != ours);
    let told = foreign.map(|(object, mesh)| {
        let detail = format!(
            "is {}, the certificates of this mesh are of {ours}; that is set by trustDomain in the settings of istiod",
            mesh.trust_domain
        );
        Mistake { object: object.id(), ..Mistake::of_field("spec.trustDomain", detail) }
    });
    told.collect()
}

pub(super) fn mistakes(errors: Vec<Mistake>) -> ApiError {
    ApiError::Invalid { detail: format!("{} mistake(s)", errors.len()), errors }
}

fn applied(key: &ObjectKey, action: Action) -> Applied {
    Applied { kind: key.kind.to_string(), namespace: key.namespace.clone(), name: key.name.clone(), action }
}

fn done(result: ObjectResult) -> Option<Action> {
    match result {
        ObjectResult::Created => Some(Action::Created),
        ObjectResult::Configured => Some(Action::Configured),
        ObjectResult::Unchanged(_) => Some(Action::Unchanged),
        ObjectResult::Deleted => Some(Action::Deleted),
        ObjectResult::NotFound | ObjectResult::Conflict { .. } | ObjectResult::NotApplied => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mesh_settings_of_another_trust_domain_are_refused_with_the_place_that_sets_it() {
        let said = |domain: &str| {
            let spec = serde_json::json!({ "trustDomain": domain });
            let object = Object::new(Kind::MeshConfig, "istio-system", "mesh", spec);
            foreign_domains(&[&object], "mesh.example")
        };
        assert!(said("mesh.example").is_empty() && said("").is_empty());
        let told: Vec<_> = said("other.example").iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("is other.example") && told[0].contains("settings of istiod"), "{told:?}");
    }

    #[test]
    fn the_settings_of_the_mesh_are_for_callers_of_the_whole_mesh() {
        use crate::access::{Grant, Role};
        let of = |namespaces: &[&str]| {
            let set = namespaces.iter().map(|n| (*n).to_owned()).collect();
            let grant = Grant { role: Role::Editor, namespaces: Some(set) };
            Caller::new("a", grant, super::super::Source::Local)
        };
        let system = of(&["istio-system"]);
        assert!(may_change(&system, Kind::VirtualService, "istio-system").is_ok());
        assert!(may_change(&system, Kind::MeshConfig, "istio-system").is_err());
        assert!(may_change(&system, Kind::VirtualService, "shop").is_err());
        assert!(may_change(&Caller::local(), Kind::MeshConfig, "istio-system").is_ok());
    }
}
