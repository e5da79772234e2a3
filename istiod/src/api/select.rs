//! Which objects a caller means: Kubernetes' label and field selectors (pure).
//!
//! Labels: `a=b`, `a==b`, `a!=b`, `a in (b,c)`, `a notin (b,c)`, `a`, `!a`. Fields: `path=value`, `path!=value`, where
//! the path goes through the object's JSON. Terms are separated by commas, and all must hold.

use std::collections::{BTreeMap, BTreeSet};

use registry::config::Object;
use serde_json::Value;

use super::ApiError;
use super::types::{Listing, Watching};

/// The most terms of one selector.
const MOST_TERMS: usize = 64;

/// The objects that are meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    namespace: Option<String>,
    labels: Vec<LabelTerm>,
    fields: Vec<FieldTerm>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum LabelTerm {
    /// The label has one of these values.
    In(String, BTreeSet<String>),
    /// It has none of these values, or is not there.
    NotIn(String, BTreeSet<String>),
    /// It is there, whatever its value.
    Exists(String),
    /// It is not there.
    Missing(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct FieldTerm {
    path: Vec<String>,
    value: String,
    equal: bool,
}

impl Selection {
    /// What a list is asked for.
    ///
    /// # Errors
    ///
    /// [`ApiError::Invalid`] names the parameter and the term.
    pub fn parse(listing: &Listing) -> Result<Self, ApiError> {
        let Listing { namespace, label_selector, field_selector, .. } = listing;
        Self::of(namespace.as_deref(), label_selector.as_deref(), field_selector.as_deref())
    }

    /// What a watch is asked for.
    ///
    /// # Errors
    ///
    /// As [`Selection::parse`].
    pub fn watched(watching: &Watching) -> Result<Self, ApiError> {
        let Watching { namespace, label_selector, field_selector, .. } = watching;
        Self::of(namespace.as_deref(), label_selector.as_deref(), field_selector.as_deref())
    }

    fn of(namespace: Option<&str>, labels: Option<&str>, fields: Option<&str>) -> Result<Self, ApiError> {
        let namespace = namespace.filter(|n| !n.is_empty()).map(str::to_owned);
        let labels = terms(labels.unwrap_or_default()).into_iter().map(label_term);
        let labels: Result<Vec<_>, String> = labels.collect();
        let labels = labels.map_err(|e| ApiError::invalid_field("labelSelector", e))?;
        let fields = terms(fields.unwrap_or_default()).into_iter().map(field_term);
        let fields: Result<Vec<_>, String> = fields.collect();
        let fields = fields.map_err(|e| ApiError::invalid_field("fieldSelector", e))?;
        if labels.len() + fields.len() > MOST_TERMS {
            return Err(ApiError::invalid_field("labelSelector", format!("more than {MOST_TERMS} terms")));
        }
        Ok(Self { namespace, labels, fields })
    }

    /// Whether this object is meant.
    #[must_use]
    pub fn matches(&self, object: &Object) -> bool {
        self.namespace.as_ref().is_none_or(|namespace| *namespace == object.namespace)
            && self.labels.iter().all(|term| term.holds(&object.labels))
            && self.fields.iter().all(|term| term.holds(object))
    }
}

impl LabelTerm {
    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Self::Exists(key) => labels.contains_key(key),
            Self::Missing(key) => !labels.contains_key(key),
        }
    }
}

impl FieldTerm {
    fn holds(&self, object: &Object) -> bool {
        let steps: Vec<&str> = self.path.iter().map(String::as_str).collect();
        let equal = match steps.as_slice() {
            ["kind"] => object.kind.as_str() == self.value,
            ["metadata", "name"] => object.name == self.value,
            ["metadata", "namespace"] => object.namespace == self.value,
            ["spec", rest @ ..] => reaches(&object.raw, rest, &self.value),
            other => reaches(&object.to_json(), other, &self.value),
        };
        equal == self.equal
    }
}

/// Whether the scalar at this path is written so. A list is entered at every place; what is not there is empty.
fn reaches(value: &Value, path: &[&str], wanted: &str) -> bool {
    if let Value::Array(items) = value {
        return items.iter().any(|item| reaches(item, path, wanted));
    }
    match path.split_first() {
        Some((step, rest)) => match value.get(step) {
            Some(inner) => reaches(inner, rest, wanted),
            None => wanted.is_empty(),
        },
        None => match value {
            Value::String(text) => text == wanted,
            Value::Null => wanted.is_empty(),
            Value::Bool(on) => wanted == if *on { "true" } else { "false" },
            Value::Number(number) => *number.to_string() == *wanted,
            Value::Array(_) | Value::Object(_) => false,
        },
    }
}

/// The parts between commas that are not in parentheses.
fn terms(text: &str) -> Vec<&str> {
    let mut depth = 0_u32;
    let parts = text.split(|c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty()).collect()
}

fn label_term(term: &str) -> Result<LabelTerm, String> {
    let one = |value: &str| BTreeSet::from([value.trim().to_owned()]);
    if let Some((key, value)) = term.split_once("!=") {
        return Ok(LabelTerm::NotIn(label(key)?, one(value)));
    }
    if let Some((key, value)) = term.split_once('=') {
        return Ok(LabelTerm::In(label(key)?, one(value.strip_prefix('=').unwrap_or(value))));
    }
    if let Some(key) = term.strip_prefix('!') {
        return Ok(LabelTerm::Missing(label(key)?));
    }
    let Some((key, rest)) = term.split_once(char::is_whitespace) else {
        return Ok(LabelTerm::Exists(label(term)?));
    };
    let set = |text: &str| {
        let inner = text.trim().strip_prefix('(').and_then(|text| text.strip_suffix(')'));
        let inner = inner.ok_or_else(|| format!("`{term}`: write `{key} in (a,b)`"))?;
        Ok::<_, String>(inner.split(',').map(|value| value.trim().to_owned()).collect())
    };
    let rest = rest.trim_start();
    if let Some(values) = rest.strip_prefix("notin") {
        return Ok(LabelTerm::NotIn(label(key)?, set(values)?));
    }
    if let Some(values) = rest.strip_prefix("in") {
        return Ok(LabelTerm::In(label(key)?, set(values)?));
    }
    Err(format!("`{term}`: after a label comes `=`, `!=`, `in` or `notin`"))
}

fn label(key: &str) -> Result<String, String> {
    let key = key.trim();
    let known = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if key.is_empty() || !key.chars().all(known) {
        return Err(format!("`{key}` is not the name of a label"));
    }
    Ok(key.to_owned())
}

fn field_term(term: &str) -> Result<FieldTerm, String> {
    let (path, value, equal) = match (term.split_once("!="), term.split_once('=')) {
        (Some((path, value)), _) => (path, value, false),
        (None, Some((path, value))) => (path, value.strip_prefix('=').unwrap_or(value), true),
        (None, None) => return Err(format!("`{term}`: write `path=value` or `path!=value`")),
    };
    let path: Vec<String> = path.trim().split('.').map(str::to_owned).collect();
    if path.iter().any(String::is_empty) {
        return Err(format!("`{term}`: a path is names with dots between them"));
    }
    Ok(FieldTerm { path, value: value.trim().to_owned(), equal })
}

#[cfg(test)]
mod tests {
    use registry::config::Kind;
    use serde_json::json;

    use super::*;

    fn check(labels: &str, fields: &str, expect: bool) {
        let spec = json!({"host": "reviews", "subsets": [{"name": "v1"}, {"name": "v2"}], "on": true});
        let mut object = Object::new(Kind::DestinationRule, "shop", "reviews", spec);
        object.labels = [("app".to_owned(), "web".to_owned()), ("env".to_owned(), String::new())].into();
        let selection = Selection::of(None, Some(labels), Some(fields)).unwrap();
        assert_eq!(selection.matches(&object), expect, "{labels} {fields}");
    }

    #[test]
    fn labels_are_chosen_as_kubernetes_does() {
        for yes in ["", "app", "app=web", "app==web", "app!=db", "app in (db, web),env", "tier!=x", "!tier"] {
            check(yes, "", true);
        }
        for no in ["tier", "app=db", "app!=web", "app notin (web,db)", "!app", "app,tier", "env=prod"] {
            check(no, "", false);
        }
        check("env=,tier notin (a)", "", true);
    }

    #[test]
    fn fields_are_reached_by_their_path() {
        for yes in
            ["metadata.name=reviews", "kind=DestinationRule", "spec.host=reviews", "spec.subsets.name=v2"]
        {
            check("", yes, true);
        }
        for no in ["metadata.namespace!=shop", "spec.host!=reviews", "spec.subsets.name=v3", "spec.host=x"] {
            check("", no, false);
        }
        check("", "spec.on=true,spec.nothing=,apiVersion!=x", true);
    }

    #[test]
    fn what_is_no_selector_is_told_with_its_term() {
        for (labels, fields) in [("a b c", ""), ("a in b", ""), ("=x", ""), ("", "name"), ("", "a..b=c")] {
            let refused = Selection::of(None, Some(labels), Some(fields));
            assert!(matches!(refused, Err(ApiError::Invalid { .. })), "{labels} {fields}");
        }
        assert!(Selection::of(None, Some(&"a,".repeat(65)), None).is_err());
    }
}
