//! Backups.

use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;

use super::super::routes::{Form, Route, Scope};
use super::super::{Api, ApiError, Caller};
use crate::access::Permission;

/// The revision of the state that is the body.
pub const REVISION: &str = "mesh-revision";
/// The trust domain of the mesh whose state is the body.
pub const TRUST_DOMAIN: &str = "mesh-trust-domain";

/// Encoding a large state takes its time.
const WITHIN: Duration = Duration::from_secs(120);

/// Bytes that are given to the connection at a time.
const PIECE: usize = 64 << 10;

pub(in crate::api) const ROUTES: &[Route] =
    &[Route::get("/api/v1/backup", Permission::Administer, Scope::Mesh, || get(backup))
        .named("getBackup", "The whole replicated state at one revision, for `istioctl backup` to seal.")
        .answers(200, Form::Bytes)
        .rpc("Backup/Get")
        .within(WITHIN)];

async fn backup(State(api): State<Api>, caller: Caller) -> Result<Response, ApiError> {
    let backup = api.backup(&caller).await?;
    let bytes = Bytes::from(backup.bytes);
    let length = bytes.len();
    let pieces = (0..length).step_by(PIECE).map(move |at| bytes.slice(at..length.min(at + PIECE)));
    let body = Body::from_stream(futures::stream::iter(pieces.map(Ok::<_, std::convert::Infallible>)));
    let domain = HeaderValue::from_str(&backup.trust_domain);
    let domain = domain.map_err(|error| ApiError::Internal(error.to_string()))?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::CONTENT_LENGTH, HeaderValue::from(length)),
        (HeaderName::from_static(REVISION), HeaderValue::from(backup.revision)),
        (HeaderName::from_static(TRUST_DOMAIN), domain),
    ];
    Ok((headers, body).into_response())
}
