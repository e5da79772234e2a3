//! What everybody may know, and who the caller is.

use axum::Json;
use axum::extract::State;
use axum::routing::get;

use super::super::routes::{Form, Route, Scope, schema};
use super::super::types::{Version, WhoAmI};
use super::super::{Api, Caller};
use crate::access::Permission;

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/ready", Permission::Open, Scope::Nobody, || get(ready))
        .named("ready", "Whether this member serves.")
        .answers(200, Form::Text("text/plain; charset=utf-8")),
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

async fn version(State(api): State<Api>) -> Json<Version> {
    Json(api.version())
}

async fn whoami(caller: Caller) -> Json<WhoAmI> {
    Json(Api::whoami(&caller))
}
