//! Configuration objects: apply, create, replace, delete, get and list.

use std::sync::Arc;

use registry::config::{Kind, Object};
use registry::state::{Delete, ObjectKey, Put, Revision};
use serde_json::Value;

use super::change::{Mode, Plan, may_change, mistakes};
use super::page::{Wanted, key_of};
use super::select::Selection;
use super::types::{ApplyReport, ApplyRequest, Consistency, List, Listing, Mistake};
use super::{Api, ApiError, Caller, LITTLE_BYTES, aside, aside_unless, prune};

/// The name that mistakes in a body have as that of a file; it is not shown.
const BODY: &str = "body";

impl Api {
    /// Commits every object of every file, or none.
    ///
    /// # Errors
    ///
    /// Every mistake of every file; [`ApiError::Forbidden`] for an object outside the caller's namespaces.
    pub async fn apply(
        &self,
        caller: &Caller,
        request: ApplyRequest,
        asked: Mode,
    ) -> Result<ApplyReport, ApiError> {
        let mode = Mode {
            dry_run: request.dry_run || asked.dry_run,
            force: request.force || asked.force,
            preview: asked.preview,
        };
        let prune = request.prune.clone();
        if prune.is_some() {
            // What is removed follows from what is there now, not from what was there a while ago.
            self.raft.read_index().await?;
        }
        let (snapshot, who) = (self.snapshot(), caller.clone());
        let plan = aside(move || {
            let (mut objects, warnings) = read(&request)?;
            let deletes = match &prune {
                Some(prune) => prune::deletes(prune, &mut objects, &snapshot, &who)?,
                None => Vec::new(),
            };
            let puts = objects.into_iter().map(|o| Put { object: Arc::new(o), expected: None }).collect();
            Ok(Plan { puts, deletes, warnings })
        })
        .await?;
        self.carry_out(caller, "apply", plan, mode).await
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
        mode: Mode,
    ) -> Result<ApplyReport, ApiError> {
        let kind = parse_kind(kind)?;
        self.put(caller, (kind, namespace, None), object, (Some(Revision(0)), mode)).await
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
        (expected, mode): (Option<u64>, Mode),
    ) -> Result<ApplyReport, ApiError> {
        let said = object.pointer("/metadata/resourceVersion").and_then(Value::as_str);
        let said = said.filter(|text| !text.is_empty()).map(str::parse::<u64>).transpose();
        let said = said.map_err(|_| {
            ApiError::invalid_field("metadata.resourceVersion", "is not a revision, which is a number")
        })?;
        let kind = parse_kind(kind)?;
        let expected = expected.or(said).map(Revision);
        self.put(caller, (kind, namespace, Some(name)), object, (expected, mode)).await
    }

    async fn put(
        &self,
        caller: &Caller,
        (kind, namespace, name): (Kind, &str, Option<&str>),
        object: Value,
        (expected, mode): (Option<Revision>, Mode),
    ) -> Result<ApplyReport, ApiError> {
        may_change(caller, kind, namespace)?;
        let action = if name.is_some() { "replace" } else { "create" };
        let (of, named) = (namespace.to_owned(), name.map(str::to_owned));
        let plan = aside_unless(bytes(&object) <= LITTLE_BYTES, move || {
            let (object, warnings) = read_one(&of, &object)?;
            is_the_one(&object, kind, &of, named.as_deref())?;
            let puts = vec![Put { object: Arc::new(object), expected }];
            Ok(Plan { puts, deletes: Vec::new(), warnings })
        })
        .await?;
        self.carry_out(caller, action, plan, mode).await
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
        (expected, mode): (Option<u64>, Mode),
    ) -> Result<ApplyReport, ApiError> {
        let key = key(kind, namespace, name)?;
        may_change(caller, key.kind, namespace)?;
        if self.snapshot().object(&key).is_none() {
            return Err(ApiError::NotFound(format!("there is no {key}")));
        }
        let deletes = vec![Delete { key, expected: expected.map(Revision) }];
        self.carry_out(caller, "delete", Plan { deletes, ..Plan::default() }, mode).await
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

/// About as many bytes as the value has as text.
fn bytes(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(bytes).sum(),
        Value::Object(map) => map.iter().map(|(key, value)| key.len() + bytes(value)).sum(),
    }
}

/// The one object of a JSON body; mistakes point into the body.
fn read_one(namespace: &str, body: &Value) -> Result<(Object, Vec<String>), ApiError> {
    let read = registry::config::parse_value(namespace, BODY, body);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_body_become_pointers() {
        assert_eq!(pointer("spec.http[0].timeout"), "/spec/http/0/timeout");
        assert_eq!(pointer("metadata.labels[\"a/b\"]"), "/metadata/labels/a~1b");
        assert_eq!(pointer(""), "");
    }
}
