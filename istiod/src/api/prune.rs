//! What an apply deletes because it is no longer among its files.

use std::collections::BTreeSet;

use registry::config::Object;
use registry::snapshot::Snapshot;
use registry::state::{Delete, ObjectKey, Revision};

use super::change::{may_change, mistakes};
use super::select::Selection;
use super::types::{Listing, Mistake, Prune};
use super::{ApiError, Caller};

/// The label by which objects belong to a set, as kubectl's.
pub(super) const SET_LABEL: &str = "applyset.kubernetes.io/part-of";

/// The longest value of a label.
const LONGEST_LABEL: usize = 63;

/// The objects that go, each at the revision that it has now; those of the files become members of their set. What the
/// caller may not change stays.
pub(super) fn deletes(
    prune: &Prune,
    objects: &mut [Object],
    snapshot: &Snapshot,
    caller: &Caller,
) -> Result<Vec<Delete>, ApiError> {
    let selection = match prune {
        Prune::Set(name) => {
            check_name(name)?;
            for object in objects.iter_mut() {
                object.labels.insert(SET_LABEL.to_owned(), name.clone());
            }
            selecting(&format!("{SET_LABEL}={name}"))?
        }
        Prune::Selector(selector) if selector.trim().is_empty() => {
            return Err(ApiError::invalid_field(
                "prune.selector",
                "is empty: it would delete everything else",
            ));
        }
        Prune::Selector(selector) => {
            let selection = selecting(selector)?;
            let others = objects.iter().filter(|object| !selection.matches(object));
            let errors: Vec<_> = others.map(|object| not_selected(object, selector)).collect();
            if !errors.is_empty() {
                return Err(mistakes(errors));
            }
            selection
        }
    };
    let kept: BTreeSet<ObjectKey> = objects.iter().map(ObjectKey::of).collect();
    let selected = snapshot.objects().filter(|object| selection.matches(object));
    let gone = selected.filter(|object| {
        !kept.contains(&ObjectKey::of(object)) && may_change(caller, object.kind, &object.namespace).is_ok()
    });
    let delete =
        |object: &Object| Delete { key: ObjectKey::of(object), expected: Some(Revision(object.revision)) };
    Ok(gone.map(|object| delete(object)).collect())
}

fn selecting(labels: &str) -> Result<Selection, ApiError> {
    Selection::parse(&Listing { label_selector: Some(labels.to_owned()), ..Listing::default() })
}

fn not_selected(object: &Object, selector: &str) -> Mistake {
    let detail =
        format!("does not have the labels of prune.selector `{selector}`, so it would never be pruned");
    Mistake { object: object.id(), ..Mistake::of_field("metadata.labels", detail) }
}

/// A set's name is the value of a label.
fn check_name(name: &str) -> Result<(), ApiError> {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let outer = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let good = name.len() <= LONGEST_LABEL
        && name.chars().all(inner)
        && outer(name.chars().next())
        && outer(name.chars().next_back());
    let wrong =
        "must be up to 63 letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit";
    if good { Ok(()) } else { Err(ApiError::invalid_field("prune.set", wrong)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_set_is_the_value_of_a_label() {
        for good in ["shop", "a", "team-1.prod_x", &"x".repeat(63)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a b", "a,b=c", "ä", &"x".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
