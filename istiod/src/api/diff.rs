//! Differences that people read: two values as YAML, line by line.

use registry::config::Object;
use serde_json::Value;
use similar::{Algorithm, TextDiff};

/// Lines around each difference.
const CONTEXT: usize = 3;

/// The unified diff of two values as YAML, under a heading with `name` and a word for each side. What is not there is
/// empty.
#[must_use]
pub fn unified(name: &str, sides: [&str; 2], before: Option<&Value>, after: Option<&Value>) -> String {
    let [old, new] = [before, after].map(|value| value.map(yaml).unwrap_or_default());
    let heading = |side: &str, value: Option<&Value>| match value {
        Some(_) => format!("{name} ({side})"),
        None => "/dev/null".to_owned(),
    };
    let (from, to) = (heading(sides[0], before), heading(sides[1], after));
    let diff = TextDiff::configure().algorithm(Algorithm::Patience).diff_lines(&old, &new);
    diff.unified_diff().context_radius(CONTEXT).header(&from, &to).to_string()
}

/// The value as YAML; as JSON if it has no YAML form.
#[must_use]
pub fn yaml(value: &Value) -> String {
    serde_saphyr::to_string(value).unwrap_or_else(|_| format!("{value:#}\n"))
}

/// An object as its author wrote it: without what the state adds.
#[must_use]
pub fn written(object: &Object) -> Value {
    let mut bare = object.clone();
    (bare.created, bare.generation) = (0, 0);
    bare.to_json_at(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_difference_is_lines_of_yaml() {
        let (old, new) =
            (json!({"host": "a", "subsets": [{"name": "v1"}]}), json!({"host": "b", "subsets": []}));
        let told = unified("DestinationRule/default/r", ["4", "7"], Some(&old), Some(&new));
        assert!(
            told.starts_with("--- DestinationRule/default/r (4)\n+++ DestinationRule/default/r (7)\n@@"),
            "{told}"
        );
        assert!(told.contains("\n-host: a\n") && told.contains("\n+host: b\n"), "{told}");
        assert!(unified("x", ["1", "2"], Some(&old), Some(&old)).is_empty());
        let created = unified("x", ["1", "2"], None, Some(&new));
        assert!(
            created.starts_with("--- /dev/null\n+++ x (2)\n") && created.contains("+host: b"),
            "{created}"
        );
    }
}
