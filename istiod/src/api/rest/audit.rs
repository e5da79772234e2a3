//! The audit trail.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, put};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::audit::{AuditPage, AuditRetention};
use super::super::routes::{Form, Route, Scope, schema};
use super::super::{Api, ApiError, Caller};
use super::{Answer, Body, Query};
use crate::access::Permission;

const RETENTION: &str = "/api/v1/audit/retention";

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/api/v1/audit", Permission::Administer, Scope::Mesh, || get(audit))
        .named("listAudit", "Who changed what, from where, oldest first: a piece of the hash chain.")
        .query(schema::<After>)
        .json(schema::<AuditPage>)
        .rpc("Audit/List"),
    Route::get(RETENTION, Permission::Administer, Scope::Mesh, || get(retention))
        .named("getAuditRetention", "How much of the audit trail is kept.")
        .json(schema::<AuditRetention>)
        .rpc("Audit/GetRetention"),
    Route::put(RETENTION, Permission::Administer, Scope::Mesh, || put(keep))
        .named("setAuditRetention", "Sets how much of the audit trail is kept.")
        .takes_json(schema::<AuditRetention>)
        .answers(204, Form::Nothing)
        .rpc("Audit/SetRetention"),
];

/// Which entries.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct After {
    /// Those after this revision.
    after: Option<u64>,
    /// The most entries, 1000 unless said.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<usize>,
}

async fn audit(State(api): State<Api>, Query(query): Query<After>) -> Answer<AuditPage> {
    let limit = query.limit.unwrap_or(super::super::audit::MOST_ENTRIES);
    Ok(Json(api.audit(query.after.unwrap_or_default(), limit).await?))
}

async fn retention(State(api): State<Api>) -> Answer<AuditRetention> {
    Ok(Json(api.audit_retention().await?))
}

async fn keep(
    State(api): State<Api>,
    caller: Caller,
    Body(keep): Body<AuditRetention>,
) -> Result<StatusCode, ApiError> {
    api.keep_audit(&caller, keep).await?;
    Ok(StatusCode::NO_CONTENT)
}
