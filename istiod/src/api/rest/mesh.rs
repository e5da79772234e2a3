//! The mesh as it is: services, workloads, proxies, members and revisions.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::routing::{get, post};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::routes::{Route, Scope, schema};
use super::super::types::{
    EventRow, HistoryEntry, Page, Patience, ProxyRow, ProxyTypes, ReleaseRequest, Released, Revisions, Rows,
    ServiceRow, Since, WaitReport, WorkloadRow,
};
use super::super::{Api, Caller, LONGEST_WAIT};
use super::{Answer, Body, Path, Query};
use crate::access::Permission;

/// An answer to a wait begins a little after the longest one.
const WAIT: Duration = LONGEST_WAIT.saturating_add(Duration::from_secs(30));

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/api/v1/services", Permission::Read, Scope::Each, || get(services))
        .named("listServices", "Services.")
        .query(schema::<Rows>)
        .json(schema::<Page<ServiceRow>>)
        .rpc("Mesh/ListServices"),
    Route::get("/api/v1/workloads", Permission::Read, Scope::Each, || get(workloads))
        .named("listWorkloads", "Workloads.")
        .query(schema::<Rows>)
        .json(schema::<Page<WorkloadRow>>)
        .rpc("Mesh/ListWorkloads"),
    Route::post("/api/v1/workloads/release", Permission::Write, Scope::Each, || post(release))
        .named("releaseWorkloads", "Gives up workloads that are held as unknown since a mass loss.")
        .takes_json(schema::<ReleaseRequest>)
        .json(schema::<Released>)
        .rpc("Mesh/ReleaseWorkloads"),
    Route::get("/api/v1/proxies", Permission::Read, Scope::Each, || get(proxies))
        .named("listProxies", "Proxies that are connected to any member, and what each has acknowledged.")
        .query(schema::<Rows>)
        .json(schema::<Page<ProxyRow>>)
        .rpc("Mesh/ListProxies"),
    Route::get("/api/v1/proxies/{id}/config", Permission::Read, Scope::Each, || get(proxy_config))
        .named("getProxyConfig", "What a proxy was given.")
        .query(schema::<ProxyTypes>)
        .json(schema::<Value>)
        .rpc("Mesh/GetProxyConfig"),
    Route::get("/api/v1/wait/{revision}", Permission::Read, Scope::Each, || get(wait))
        .named("wait", "Waits until every connected proxy runs a revision, or has refused it.")
        .query(schema::<Patience>)
        .json(schema::<WaitReport>)
        .within(WAIT)
        .rpc("Mesh/Wait"),
    Route::get("/api/v1/history", Permission::Read, Scope::Each, || get(history))
        .named("listHistory", "The newest changes, newest first.")
        .query(schema::<Limit>)
        .json(schema::<Vec<HistoryEntry>>)
        .rpc("History/List"),
    Route::get("/api/v1/events", Permission::Read, Scope::Each, || get(events))
        .named("listEvents", "What happened lately on this member, oldest first.")
        .query(schema::<Since>)
        .json(schema::<Page<EventRow>>)
        .rpc("Mesh/ListEvents"),
    Route::get("/api/v1/revisions", Permission::Read, Scope::Nobody, || get(revisions))
        .named("getRevisions", "Where this member stands in the log, and what it remembers.")
        .json(schema::<Revisions>)
        .rpc("Mesh/GetRevisions"),
];

async fn services(
    State(api): State<Api>,
    caller: Caller,
    Query(rows): Query<Rows>,
) -> Answer<Page<ServiceRow>> {
    Ok(Json(api.services(&caller, &rows).await?))
}

async fn workloads(
    State(api): State<Api>,
    caller: Caller,
    Query(rows): Query<Rows>,
) -> Answer<Page<WorkloadRow>> {
    Ok(Json(api.workloads(&caller, &rows).await?))
}

async fn release(
    State(api): State<Api>,
    caller: Caller,
    Body(request): Body<ReleaseRequest>,
) -> Answer<Released> {
    Ok(Json(api.release(&caller, &request).await?))
}

async fn proxies(State(api): State<Api>, caller: Caller, Query(rows): Query<Rows>) -> Answer<Page<ProxyRow>> {
    Ok(Json(api.proxies(&caller, &rows).await?))
}

async fn proxy_config(
    State(api): State<Api>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<ProxyTypes>,
) -> Answer<Value> {
    Ok(Json(api.proxy_config(&caller, &id, query.r#type.as_deref().unwrap_or("all")).await?))
}

async fn wait(
    State(api): State<Api>,
    caller: Caller,
    Path(revision): Path<u64>,
    Query(query): Query<Patience>,
) -> Json<WaitReport> {
    let timeout = Duration::from_millis(query.timeout_milliseconds.unwrap_or(30_000));
    Json(api.wait(&caller, revision, timeout).await)
}

/// How many changes to show.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Limit {
    /// The most changes, 100 unless said.
    #[schemars(range(min = 0, max = 100_000))]
    limit: Option<usize>,
}

async fn history(
    State(api): State<Api>,
    caller: Caller,
    Query(query): Query<Limit>,
) -> Json<Vec<HistoryEntry>> {
    Json(api.history(&caller, query.limit.unwrap_or(100)))
}

async fn events(
    State(api): State<Api>,
    caller: Caller,
    Query(since): Query<Since>,
) -> Answer<Page<EventRow>> {
    Ok(Json(api.events(&caller, &since)?))
}

async fn revisions(State(api): State<Api>) -> Json<Revisions> {
    Json(api.revisions())
}
