//! Configuration objects.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{delete, get, post, put};
use serde_json::Value;

use super::super::routes::{Form, Route, Scope, schema};
use super::super::types::{
    ApplyReport, ApplyRequest, Changing, Expected, List, Listing, Read, WatchEvent, Watching,
};
use super::super::{Api, ApiError, Caller};
use super::{Answer, Body, Path, Query, lines};
use crate::access::Permission;

/// Largest set of files of one commit, in bytes.
const LARGEST: usize = 16 * 1024 * 1024;

const OBJECT: &str = "/api/v1/config/{kind}/{namespace}/{name}";

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::post("/api/v1/apply", Permission::Write, Scope::Each, || post(apply))
        .named("apply", "Commits every object of every file, or none.")
        .query(schema::<Changing>)
        .takes(Form::Json(schema::<ApplyRequest>), LARGEST)
        .json(schema::<ApplyReport>)
        .rpc("Config/Apply"),
    Route::get("/api/v1/config/{kind}", Permission::Read, Scope::Each, || get(list))
        .named("listObjects", "Objects of a kind, or of all kinds (`all`).")
        .query(schema::<Listing>)
        .json(schema::<List>)
        .rpc("Config/List"),
    Route::get("/api/v1/watch/{kind}", Permission::Read, Scope::Each, || get(watch))
        .named("watchObjects", "Changes of objects of a kind, or of all kinds (`all`), as they happen.")
        .query(schema::<Watching>)
        .answers(200, Form::Lines(schema::<WatchEvent>))
        .rpc("Config/Watch"),
    Route::post("/api/v1/config/{kind}/{namespace}", Permission::Write, Scope::Path, || post(create))
        .named("createObject", "Makes an object, which must not exist.")
        .query(schema::<Changing>)
        .takes_json(schema::<Value>)
        .answers(201, Form::Json(schema::<ApplyReport>))
        .rpc("Config/Create"),
    Route::get(OBJECT, Permission::Read, Scope::Path, || get(object))
        .named("getObject", "One object in Kubernetes' shape.")
        .query(schema::<Read>)
        .json(schema::<Value>)
        .rpc("Config/Get"),
    Route::put(OBJECT, Permission::Write, Scope::Path, || put(replace))
        .named("replaceObject", "Makes or replaces an object, if it is as expected.")
        .query(schema::<Expected>)
        .takes_json(schema::<Value>)
        .json(schema::<ApplyReport>)
        .rpc("Config/Replace"),
    Route::delete(OBJECT, Permission::Write, Scope::Path, || delete(remove))
        .named("deleteObject", "Deletes an object, if it is as expected.")
        .query(schema::<Expected>)
        .json(schema::<ApplyReport>)
        .rpc("Config/Delete"),
];

type ObjectPath = (String, String, String);

async fn apply(
    State(api): State<Api>,
    caller: Caller,
    Query(changing): Query<Changing>,
    Body(request): Body<ApplyRequest>,
) -> Answer<ApplyReport> {
    Ok(Json(api.apply(&caller, request, changing.mode()).await?))
}

async fn list(
    State(api): State<Api>,
    caller: Caller,
    Path(kind): Path<String>,
    Query(listing): Query<Listing>,
) -> Answer<List> {
    Ok(Json(api.list(&caller, &kind, &listing).await?))
}

async fn watch(
    State(api): State<Api>,
    caller: Caller,
    Path(kind): Path<String>,
    Query(watching): Query<Watching>,
) -> Result<Response, ApiError> {
    let events = api.watch(&caller, &kind, &watching)?;
    Ok(lines(events))
}

async fn create(
    State(api): State<Api>,
    caller: Caller,
    Path((kind, namespace)): Path<(String, String)>,
    Query(changing): Query<Changing>,
    Body(object): Body<Value>,
) -> Result<(StatusCode, Json<ApplyReport>), ApiError> {
    let made = api.create(&caller, &kind, &namespace, object, changing.mode()).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

async fn object(
    State(api): State<Api>,
    caller: Caller,
    Path((kind, namespace, name)): Path<ObjectPath>,
    Query(read): Query<Read>,
) -> Answer<Value> {
    let consistency = read.consistency.unwrap_or_default();
    Ok(Json(api.get(&caller, (&kind, &namespace, &name), consistency).await?))
}

async fn replace(
    State(api): State<Api>,
    caller: Caller,
    Path((kind, namespace, name)): Path<ObjectPath>,
    Query(expected): Query<Expected>,
    Body(object): Body<Value>,
) -> Answer<ApplyReport> {
    let expected = (expected.expected_revision, expected.mode());
    Ok(Json(api.replace(&caller, (&kind, &namespace, &name), object, expected).await?))
}

async fn remove(
    State(api): State<Api>,
    caller: Caller,
    Path((kind, namespace, name)): Path<ObjectPath>,
    Query(expected): Query<Expected>,
) -> Answer<ApplyReport> {
    let expected = (expected.expected_revision, expected.mode());
    Ok(Json(api.delete(&caller, (&kind, &namespace, &name), expected).await?))
}
