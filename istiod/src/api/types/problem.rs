//! What went wrong, for people and for programs (RFC 9457).

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Problem details (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// `about:blank`, or a name for problems a program may act on.
    #[serde(rename = "type")]
    pub kind: String,
    /// Short, the same for each occurrence.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// This occurrence.
    pub detail: String,
    /// Each mistake in the input, with its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<Mistake>,
}

/// One mistake in an input.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Mistake {
    /// What is wrong and what would be right.
    pub detail: String,
    /// Which value, `spec.http[0].timeout`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// Where in the request's body (RFC 6901), when the mistake is there and not in a file that it carries.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pointer: String,
    /// Object that is to be changed, `Kind/namespace/name`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub object: String,
    /// The file, as the caller named it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub file: String,
    /// Line in the file, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// Column in the file, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<u32>,
}

impl Mistake {
    /// A mistake in a value.
    #[must_use]
    pub fn of_field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { field: field.into(), detail: detail.into(), ..Self::default() }
    }

    /// A mistake without a place.
    #[must_use]
    pub fn plain(detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), ..Self::default() }
    }
}

impl From<&registry::config::ConfigError> for Mistake {
    fn from(error: &registry::config::ConfigError) -> Self {
        Self {
            detail: error.message.clone(),
            field: error.path.clone(),
            file: error.file.clone(),
            line: Some(error.line),
            column: Some(error.column),
            ..Self::default()
        }
    }
}

impl From<&registry::config::Problem> for Mistake {
    fn from(problem: &registry::config::Problem) -> Self {
        Self {
            detail: problem.message.clone(),
            field: problem.path.to_string(),
            object: problem.object.clone(),
            ..Self::default()
        }
    }
}

impl fmt::Display for Mistake {
    /// One line, as `istioctl validate` prints it: `reviews.yaml:14:7: spec.http[0].timeout: must be ...`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { detail, field, pointer, object, file, line, column } = self;
        if !file.is_empty() {
            write!(f, "{file}:")?;
            for place in [line, column].into_iter().flatten() {
                write!(f, "{place}:")?;
            }
            f.write_str(" ")?;
        }
        if !object.is_empty() {
            write!(f, "error: {object}: ")?;
        }
        for place in [field, pointer] {
            if !place.is_empty() {
                write!(f, "{place}: ")?;
            }
        }
        f.write_str(detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_reads_as_a_line_with_its_place() {
        let mistake = Mistake {
            file: "a.yaml".to_owned(),
            line: Some(3),
            column: Some(7),
            ..Mistake::of_field("spec.host", "is needed")
        };
        assert_eq!(mistake.to_string(), "a.yaml:3:7: spec.host: is needed");
        assert_eq!(Mistake::plain("no").to_string(), "no");
        let whole = serde_json::to_value(&mistake).unwrap();
        assert_eq!(
            whole,
            serde_json::json!({"detail": "is needed", "field": "spec.host", "file": "a.yaml", "line": 3, "column": 7})
        );
    }
}
