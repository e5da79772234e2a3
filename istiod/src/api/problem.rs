//! Why a call was not answered, and how that is told (RFC 9457).

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::types::{Mistake, Problem};
use crate::raft::ProposeError;
use crate::raft::node::Refusal;

/// Why a call was not answered.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The input is wrong; every mistake is told.
    #[error("{detail}")]
    Invalid {
        /// What was looked at.
        detail: String,
        /// Each mistake.
        errors: Vec<Mistake>,
    },
    /// The caller may not.
    #[error("{0}")]
    Forbidden(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// The state is not what the caller expected.
    #[error("{0}")]
    Conflict(String),
    /// It was there and is not remembered any more.
    #[error("{0}")]
    Gone(String),
    /// Too many ask for the same.
    #[error("{0}")]
    Busy(String),
    /// It cannot be decided now.
    #[error("the log cannot be written now")]
    Unavailable(#[from] ProposeError),
    /// The program itself is wrong.
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    /// A mistake of the whole input.
    pub(crate) fn invalid(detail: impl Into<String>) -> Self {
        Self::Invalid { detail: detail.into(), errors: Vec::new() }
    }

    /// A mistake in one field of the input.
    pub(crate) fn invalid_field(field: &str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        let errors = vec![Mistake::of_field(field, detail.clone())];
        Self::Invalid { detail: format!("{field}: {detail}"), errors }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Gone(_) => StatusCode::GONE,
            Self::Unavailable(ProposeError::Refused(Refusal::NoSpace(_))) => StatusCode::INSUFFICIENT_STORAGE,
            Self::Busy(_) | Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The problem's details (RFC 9457).
    #[must_use]
    pub fn problem(&self) -> Problem {
        let title = match self {
            Self::Invalid { .. } => "invalid input",
            Self::Forbidden(_) => "forbidden",
            Self::NotFound(_) => "not found",
            Self::Conflict(_) => "conflict",
            Self::Gone(_) => "gone",
            Self::Busy(_) => "busy",
            Self::Unavailable(ProposeError::Refused(Refusal::NoSpace(_))) => "insufficient storage",
            Self::Unavailable(_) => "unavailable",
            Self::Internal(_) => "internal error",
        };
        let errors = match self {
            Self::Invalid { errors, .. } => errors.clone(),
            Self::Unavailable(cause) => vec![Mistake::plain(cause.to_string())],
            Self::Forbidden(_)
            | Self::NotFound(_)
            | Self::Conflict(_)
            | Self::Gone(_)
            | Self::Busy(_)
            | Self::Internal(_) => Vec::new(),
        };
        Problem {
            kind: "about:blank".to_owned(),
            title: title.to_owned(),
            status: self.status().as_u16(),
            detail: self.to_string(),
            errors,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        answer(&self.problem())
    }
}

/// A refusal that no service function made.
pub(super) fn refusal(status: StatusCode, detail: &str) -> Response {
    refused(status, detail, Vec::new())
}

/// Like [`refusal`], with the places of mistakes.
pub(super) fn refused(status: StatusCode, detail: &str, errors: Vec<Mistake>) -> Response {
    let title = status.canonical_reason().unwrap_or_default().to_lowercase();
    answer(&Problem {
        kind: "about:blank".to_owned(),
        title,
        status: status.as_u16(),
        detail: detail.to_owned(),
        errors,
    })
}

fn answer(problem: &Problem) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(problem).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
}
