//! What everybody may know, and who the caller is.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::State;
use axum::routing::get;

use serde_json::Value;

use super::super::routes::{self, Form, Route, Scope, schema};
use super::super::types::{Version, WhoAmI};
use super::super::{Api, Caller, openapi};
use crate::access::Permission;

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/ready", Permission::Open, Scope::Nobody, || get(ready))
        .named("ready", "Whether this member serves.")
        .answers(200, Form::Text("text/plain; charset=utf-8")),
    Route::get("/openapi.json", Permission::Open, Scope::Nobody, || get(openapi))
        .named("getDocument", "This API, as OpenAPI 3.1.")
        .json(schema::<Value>),
    Route::get("/api/v1/version", Permission::Read, Scope::Nobody, || get(version))
        .named("getVersion", "Who answers: the program, its member id and its role.")
        .json(schema::<Version>)
        .rpc("Mesh/GetVersion"),
    Route::get("/api/v1/whoami", Permission::Read, Scope::Nobody, || get(whoami))
        .named("whoAmI", "Who calls, and what it may do.")
        .json(schema::<WhoAmI>)
        .rpc("Access/WhoAmI"),
];

async fn ready() -> &'static str {
    "ready\n"
}

/// The document is the same for as long as the program is.
static DOCUMENT: LazyLock<Value> = LazyLock::new(|| openapi::document(routes::all()));

async fn openapi() -> Json<&'static Value> {
    Json(&DOCUMENT)
}

async fn version(State(api): State<Api>) -> Json<Version> {
    Json(api.version())
}

async fn whoami(caller: Caller) -> Json<WhoAmI> {
    Json(Api::whoami(&caller))
}
