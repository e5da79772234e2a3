//! The configuration as it was, and the way back.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::history::{DiffReport, HistoryRetention, RollbackRequest};
use super::super::routes::{Form, Route, Scope, schema};
use super::super::types::{ApplyReport, Changing, List};
use super::super::{Api, ApiError, Caller};
use super::{Answer, Body, Path, Query};
use crate::access::Permission;

const RETENTION: &str = "/api/v1/history/retention";

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/api/v1/diff", Permission::Read, Scope::Each, || get(diff))
        .named("getDiff", "What differs between two revisions.")
        .query(schema::<Between>)
        .json(schema::<DiffReport>)
        .rpc("History/Diff"),
    Route::get("/api/v1/history/{revision}/config/{kind}", Permission::Read, Scope::Each, || get(list))
        .named("listObjectsAt", "Objects of a kind, or of all kinds (`all`), as they were at a revision.")
        .query(schema::<Of>)
        .json(schema::<List>)
        .rpc("History/ListAt"),
    Route::get(
        "/api/v1/history/{revision}/config/{kind}/{namespace}/{name}",
        Permission::Read,
        Scope::Path,
        || get(object),
    )
    .named("getObjectAt", "One object as it was at a revision.")
    .json(schema::<Value>)
    .rpc("History/GetAt"),
    Route::post("/api/v1/rollback", Permission::Write, Scope::Each, || post(rollback))
        .named("rollback", "Makes the configuration what it was at a revision, in one commit.")
        .query(schema::<Changing>)
        .takes_json(schema::<RollbackRequest>)
        .json(schema::<ApplyReport>)
        .rpc("History/Rollback"),
    Route::get(RETENTION, Permission::Read, Scope::Nobody, || get(retention))
        .named("getHistoryRetention", "How much of history is kept.")
        .json(schema::<HistoryRetention>)
        .rpc("History/GetRetention"),
    Route::put(RETENTION, Permission::Administer, Scope::Mesh, || put(keep))
        .named("setHistoryRetention", "Sets how much of history is kept.")
        .takes_json(schema::<HistoryRetention>)
        .answers(204, Form::Nothing)
        .rpc("History/SetRetention"),
];

/// Two revisions.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Between {
    /// The one that is compared.
    from: u64,
    /// The one that it is compared with; now unless said.
    to: Option<u64>,
}

/// Of which namespace.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Of {
    /// Of this namespace only.
    namespace: Option<String>,
}

async fn diff(State(api): State<Api>, caller: Caller, Query(query): Query<Between>) -> Answer<DiffReport> {
    Ok(Json(api.diff(&caller, query.from, query.to).await?))
}

async fn list(
    State(api): State<Api>,
    caller: Caller,
    Path((revision, kind)): Path<(u64, String)>,
    Query(of): Query<Of>,
) -> Answer<List> {
    Ok(Json(api.list_at(&caller, (&kind, of.namespace.as_deref()), revision).await?))
}

async fn object(
    State(api): State<Api>,
    caller: Caller,
    Path((revision, kind, namespace, name)): Path<(u64, String, String, String)>,
) -> Answer<Value> {
    Ok(Json(api.get_at(&caller, (&kind, &namespace, &name), revision).await?))
}

async fn rollback(
    State(api): State<Api>,
    caller: Caller,
    Query(changing): Query<Changing>,
    Body(request): Body<RollbackRequest>,
) -> Answer<ApplyReport> {
    Ok(Json(api.rollback(&caller, &request, changing.mode()).await?))
}

async fn retention(State(api): State<Api>) -> Json<HistoryRetention> {
    Json(api.history_retention())
}

async fn keep(
    State(api): State<Api>,
    caller: Caller,
    Body(keep): Body<HistoryRetention>,
) -> Result<StatusCode, ApiError> {
    api.keep_history(&caller, keep).await?;
    Ok(StatusCode::NO_CONTENT)
}
