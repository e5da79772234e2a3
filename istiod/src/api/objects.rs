//! Configuration objects: apply, create, replace, delete, get and list.

use std::collections::BTreeSet;
use std::sync::Arc;

use registry::config::{Kind, Object, Severity};
use registry::model::mesh::MeshConfig;
use registry::state::{Batch, Command as Change, Delete, ObjectKey, ObjectResult, Put, Revision};
use serde_json::Value;

use super::page::{Wanted, key_of};
use super::select::Selection;
use super::types::{Action, Applied, ApplyReport, ApplyRequest, Consistency, List, Listing, Mistake};
use super::{Api, ApiError, Caller, aside};
use crate::raft::{Command, Outcome};

/// The name that mistakes in a body have as that of a file; it is not shown.
const BODY: &str = "body";

impl Api {
    /// Commits every object of every file, or none.
    ///
    /// # Errors
    ///
    /// Every mistake of every file; [`ApiError::Forbidden`] for an object outside the caller's namespaces.
    pub async fn apply(&self, caller: &Caller, request: ApplyRequest) -> Result<ApplyReport, ApiError> {
        let (api, dry_run, who) = (self.clone(), request.dry_run, caller.clone());
        let (objects, warnings) = aside(move || {
            let (objects, mut warnings) = read(&request)?;
            objects.iter().try_for_each(|object| may_change(&who, object.kind, &object.namespace))?;
            warnings.extend(api.check_together(&objects)?);
            Ok((objects, warnings))
        })
        .await?;
        if dry_run {
            return Ok(self.foresee(&objects, warnings));
        }
        let batch = Batch::put_objects(self.time_ms(), &caller.name, objects);
        self.commit(caller, "apply", batch, warnings).await
    }

    /// Makes one object, which must not exist.
    ///
    /// # Errors
    ///
    /// Every mistake of the object; [`ApiError::Conflict`] when there is one of its name.
    pub async fn create(
        &self,
        caller: &Caller,
        kind: &str,
        namespace: &str,
        object: Value,
    ) -> Result<ApplyReport, ApiError> {
        let kind = parse_kind(kind)?;
        self.put(caller, "create", (kind, namespace, None), object, Some(Revision(0))).await
    }

    /// Makes or replaces one object; only if it is at `expected` now, when that is said here or in its
    /// `metadata.resourceVersion`.
    ///
    /// # Errors
    ///
    /// Every mistake of the object; [`ApiError::Conflict`] when it is not as expected.
    pub async fn replace(
        &self,
        caller: &Caller,
        (kind, namespace, name): (&str, &str, &str),
        object: Value,
        expected: Option<u64>,
    ) -> Result<ApplyReport, ApiError> {
        let said = object.pointer("/metadata/resourceVersion").and_then(Value::as_str);
        let said = said.filter(|text| !text.is_empty()).map(str::parse::<u64>).transpose();
        let said = said.map_err(|_| {
            ApiError::invalid_field("metadata.resourceVersion", "is not a revision, which is a number")
        })?;
        let kind = parse_kind(kind)?;
        let expected = expected.or(said).map(Revision);
        self.put(caller, "replace", (kind, namespace, Some(name)), object, expected).await
    }

    async fn put(
        &self,
        caller: &Caller,
        action: &str,
        (kind, namespace, name): (Kind, &str, Option<&str>),
        object: Value,
        expected: Option<Revision>,
    ) -> Result<ApplyReport, ApiError> {
        may_change(caller, kind, namespace)?;
        let (api, of, named) = (self.clone(), namespace.to_owned(), name.map(str::to_owned));
        let (object, warnings) = aside(move || {
            let (object, mut warnings) = read_one(&of, &object)?;
            is_the_one(&object, kind, &of, named.as_deref())?;
            warnings.extend(api.check_together(std::slice::from_ref(&object))?);
            Ok((object, warnings))
        })
        .await?;
        let put = Put { object: Arc::new(object), expected };
        let change = Change::Change { puts: vec![put], deletes: Vec::new() };
        let batch = Batch { time_ms: self.time_ms(), author: caller.name.clone(), commands: vec![change] };
        self.commit(caller, action, batch, warnings).await
    }

    /// Deletes one object; only if it is at `expected` now, when that is said.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when it is not there, [`ApiError::Conflict`] when it is not as expected.
    pub async fn delete(
        &self,
        caller: &Caller,
        (kind, namespace, name): (&str, &str, &str),
        expected: Option<u64>,
    ) -> Result<ApplyReport, ApiError> {
        let key = key(kind, namespace, name)?;
        may_change(caller, key.kind, namespace)?;
        if self.snapshot().object(&key).is_none() {
            return Err(ApiError::NotFound(format!("there is no {key}")));
        }
        let delete = Delete { key, expected: expected.map(Revision) };
        let change = Change::Change { puts: Vec::new(), deletes: vec![delete] };
        let batch = Batch { time_ms: self.time_ms(), author: caller.name.clone(), commands: vec![change] };
        self.commit(caller, "delete", batch, Vec::new()).await
    }

    async fn commit(
        &self,
        caller: &Caller,
        action: &str,
        batch: Batch,
        warnings: Vec<String>,
    ) -> Result<ApplyReport, ApiError> {
        let (revision, outcome) = self.propose(caller, action, &Command::Registry(batch)).await?;
        let Outcome::Registry(outcome) = outcome else {
            return Err(ApiError::Internal("not an outcome of the registry".to_owned()));
        };
        if let Some(conflict) = outcome.conflict() {
            return Err(conflicting(&conflict.key, conflict.result));
        }
        let objects = outcome.objects().filter_map(|o| Some(applied(&o.key, done(o.result)?))).collect();
        Ok(ApplyReport { revision: revision.0, objects, warnings })
    }

    /// What only shows when all objects are seen together: errors refuse the change, warnings are told.
    fn check_together(&self, objects: &[Object]) -> Result<Vec<String>, ApiError> {
        let snapshot = self.snapshot();
        let replaced: BTreeSet<ObjectKey> = objects.iter().map(ObjectKey::of).collect();
        let kept = snapshot.objects().filter(|o| !replaced.contains(&ObjectKey::of(o))).map(AsRef::as_ref);
        let all: Vec<&Object> = kept.chain(objects).collect();
        let changed: BTreeSet<String> = objects.iter().map(Object::id).collect();
        let issuing = self.issuing.load();
        let mut errors = foreign_domains(objects, issuing.trust_domain().as_str());
        let mut warnings = Vec::new();
        for problem in registry::config::validate_set(&all) {
            let ours = changed.contains(&problem.object);
            match problem.severity {
                Severity::Error if ours => errors.push(Mistake::from(&problem)),
                Severity::Warning if ours => warnings.push(problem.to_string()),
                Severity::Error | Severity::Warning => {}
            }
        }
        if errors.is_empty() { Ok(warnings) } else { Err(mistakes(errors)) }
    }

    fn foresee(&self, objects: &[Object], warnings: Vec<String>) -> ApplyReport {
        let snapshot = self.snapshot();
        let foreseen = objects.iter().map(|object| {
            let key = ObjectKey::of(object);
            let action = match snapshot.object(&key) {
                None => Action::Created,
                Some(old)
                    if old.raw == object.raw
                        && old.labels == object.labels
                        && old.annotations == object.annotations =>
                {
                    Action::Unchanged
                }
                Some(_) => Action::Configured,
            };
            applied(&key, action)
        });
        ApplyReport { revision: snapshot.revision().0, objects: foreseen.collect(), warnings }
    }

    /// One object in Kubernetes' shape.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when it is not there.
    pub async fn get(
        &self,
        caller: &Caller,
        (kind, namespace, name): (&str, &str, &str),
        consistency: Consistency,
    ) -> Result<Value, ApiError> {
        let key = key(kind, namespace, name)?;
        caller.must_cover(namespace)?;
        let snapshot = self.read(consistency).await?;
        let object = snapshot.object(&key).map(|o| o.to_json());
        object.ok_or_else(|| ApiError::NotFound(format!("there is no {key}")))
    }

    /// Objects of a kind, or of all kinds (`all`), of the caller's namespaces.
    ///
    /// # Errors
    ///
    /// When the kind is unknown, or the selection cannot be read.
    pub async fn list(&self, caller: &Caller, kind: &str, listing: &Listing) -> Result<List, ApiError> {
        let kind = if kind == "all" { None } else { Some(parse_kind(kind)?) };
        let wanted = Wanted::parse(listing.limit, listing.r#continue.as_deref())?;
        let selection = Selection::parse(listing)?;
        let snapshot = self.read_page(wanted.after.as_ref(), listing.consistency.unwrap_or_default()).await?;
        let (read, who) = (snapshot.clone(), caller.clone());
        let page = aside(move || {
            let of_kind = read.objects().filter(|o| kind.is_none_or(|kind| o.kind == kind));
            let seen = of_kind.filter(|o| who.covers(&o.namespace) && selection.matches(o));
            let key = |o: &&Arc<Object>| {
                // In the order of the snapshot, which is that of the kinds' declaration.
                let place = Kind::ALL.iter().position(|kind| *kind == o.kind).unwrap_or_default();
                key_of(&[&format!("{place:02}"), &o.namespace, &o.name])
            };
            Ok(wanted.page(read.revision().0, seen, key, |o| o.to_json()))
        })
        .await?;
        if !page.metadata.r#continue.is_empty() {
            self.keep(&snapshot);
        }
        Ok(List {
            api_version: "v1".to_owned(),
            kind: "List".to_owned(),
            metadata: page.metadata,
            items: page.items,
        })
    }
}

/// Whoever is limited to namespaces changes nothing that holds for the whole mesh.
pub(super) fn may_change(caller: &Caller, kind: Kind, namespace: &str) -> Result<(), ApiError> {
    caller.must_cover(namespace)?;
    if kind == Kind::MeshConfig { caller.must_be_unlimited("settings of the whole mesh") } else { Ok(()) }
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
fn foreign_domains(objects: &[Object], ours: &str) -> Vec<Mistake> {
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

fn mistakes(errors: Vec<Mistake>) -> ApiError {
    ApiError::Invalid { detail: format!("{} mistake(s)", errors.len()), errors }
}

/// Every object of every file with warnings, or every mistake.
fn read(request: &ApplyRequest) -> Result<(Vec<Object>, Vec<String>), ApiError> {
    let (mut objects, mut warnings, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for file in &request.files {
        match registry::config::parse_in(&request.namespace, &file.name, &file.text) {
            Ok((found, remarks)) => {
                objects.extend(found);
                warnings.extend(remarks.iter().map(ToString::to_string));
            }
            Err(wrong) => errors.extend(wrong.iter().map(Mistake::from)),
        }
    }
    if !errors.is_empty() {
        return Err(mistakes(errors));
    }
    if objects.is_empty() {
        return Err(ApiError::invalid("there is no object in the input"));
    }
    Ok((objects, warnings))
}

/// The one object of a JSON body; mistakes point into the body.
fn read_one(namespace: &str, body: &Value) -> Result<(Object, Vec<String>), ApiError> {
    let read = registry::config::parse_in(namespace, BODY, &body.to_string());
    let (objects, warnings) = read.map_err(|wrong| {
        let in_body = |mistake: Mistake| Mistake {
            pointer: pointer(&mistake.field),
            file: String::new(),
            line: None,
            column: None,
            ..mistake
        };
        mistakes(wrong.iter().map(|error| in_body(Mistake::from(error))).collect())
    })?;
    let warnings = warnings.iter().map(|w| format!("{}: {}", w.path, w.message)).collect();
    match <[Object; 1]>::try_from(objects) {
        Ok([object]) => Ok((object, warnings)),
        Err(several) => Err(ApiError::invalid(format!("one object is needed, there are {}", several.len()))),
    }
}

/// `spec.http[0].timeout` as `/spec/http/0/timeout` (RFC 6901).
fn pointer(field: &str) -> String {
    let steps = field.split(['.', '[']).map(|step| step.trim_end_matches(']').trim_matches('"'));
    steps
        .filter(|step| !step.is_empty())
        .fold(String::new(), |pointer, step| pointer + "/" + &step.replace('~', "~0").replace('/', "~1"))
}

/// The object is what the path says.
fn is_the_one(object: &Object, kind: Kind, namespace: &str, name: Option<&str>) -> Result<(), ApiError> {
    let said = [
        ("kind", object.kind.as_str(), kind.as_str()),
        ("metadata.namespace", object.namespace.as_str(), namespace),
        ("metadata.name", object.name.as_str(), name.unwrap_or(&object.name)),
    ];
    match said.into_iter().find(|(_, body, path)| body != path) {
        None => Ok(()),
        Some((field, body, path)) => {
            Err(ApiError::invalid_field(field, format!("is `{body}`, the path says `{path}`")))
        }
    }
}

pub(super) fn parse_kind(kind: &str) -> Result<Kind, ApiError> {
    Kind::parse(kind).ok_or_else(|| {
        let known: Vec<_> = Kind::ALL.iter().map(|k| k.plural()).collect();
        ApiError::NotFound(format!("unknown kind `{kind}`; known are: {}", known.join(", ")))
    })
}

pub(super) fn key(kind: &str, namespace: &str, name: &str) -> Result<ObjectKey, ApiError> {
    Ok(ObjectKey { kind: parse_kind(kind)?, namespace: namespace.to_owned(), name: name.to_owned() })
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
            foreign_domains(&[Object::new(Kind::MeshConfig, "istio-system", "mesh", spec)], "mesh.example")
        };
        assert!(said("mesh.example").is_empty() && said("").is_empty());
        let told: Vec<_> = said("other.example").iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("is other.example") && told[0].contains("settings of istiod"), "{told:?}");
    }

    #[test]
    fn fields_of_a_body_become_pointers() {
        assert_eq!(pointer("spec.http[0].timeout"), "/spec/http/0/timeout");
        assert_eq!(pointer("metadata.labels[\"a/b\"]"), "/metadata/labels/a~1b");
        assert_eq!(pointer(""), "");
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
