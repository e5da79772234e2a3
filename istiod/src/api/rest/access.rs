//! Operators: their tokens and the roles of certificates.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{delete, get, post};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::routes::{Form, Route, Scope, schema};
use super::super::types::{
    ApiTokenCreated, ApiTokenRequest, ApiTokenRow, BindingRequest, BindingRow, ListMeta, Page,
};
use super::super::{Api, ApiError, Caller};
use super::{Answer, Body, Path, Query};
use crate::access::Permission;

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/api/v1/access/tokens", Permission::Administer, Scope::Each, || get(tokens))
        .named("listApiTokens", "Tokens of operators, without their secrets.")
        .json(schema::<Page<ApiTokenRow>>)
        .rpc("Access/ListTokens"),
    Route::post("/api/v1/access/tokens", Permission::Administer, Scope::Each, || post(create_token))
        .named("createApiToken", "Makes a token for an operator, which is shown this once.")
        .takes_json(schema::<ApiTokenRequest>)
        .answers(201, Form::Json(schema::<ApiTokenCreated>))
        .rpc("Access/CreateToken"),
    Route::delete("/api/v1/access/tokens/{id}", Permission::Administer, Scope::Each, || delete(revoke_token))
        .named("revokeApiToken", "Makes a token of an operator worthless.")
        .answers(204, Form::Nothing)
        .rpc("Access/RevokeToken"),
    Route::get("/api/v1/access/bindings", Permission::Administer, Scope::Each, || get(bindings))
        .named("listBindings", "The roles of client certificates.")
        .json(schema::<Page<BindingRow>>)
        .rpc("Access/ListBindings"),
    Route::post("/api/v1/access/bindings", Permission::Administer, Scope::Each, || post(bind))
        .named("bind", "Gives an identity a role, in place of the one it had.")
        .takes_json(schema::<BindingRequest>)
        .json(schema::<BindingRow>)
        .rpc("Access/Bind"),
    Route::delete("/api/v1/access/bindings", Permission::Administer, Scope::Each, || delete(unbind))
        .named("unbind", "Takes the role of an identity away.")
        .query(schema::<Identity>)
        .answers(204, Form::Nothing)
        .rpc("Access/Unbind"),
];

async fn tokens(State(api): State<Api>, caller: Caller) -> Json<Page<ApiTokenRow>> {
    Json(Page { items: api.api_tokens(&caller), metadata: ListMeta::default() })
}

async fn create_token(
    State(api): State<Api>,
    caller: Caller,
    Body(request): Body<ApiTokenRequest>,
) -> Result<(StatusCode, Json<ApiTokenCreated>), ApiError> {
    Ok((StatusCode::CREATED, Json(api.create_api_token(&caller, &request).await?)))
}

async fn revoke_token(
    State(api): State<Api>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    api.revoke_api_token(&caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn bindings(State(api): State<Api>, caller: Caller) -> Json<Page<BindingRow>> {
    Json(Page { items: api.bindings(&caller), metadata: ListMeta::default() })
}

async fn bind(
    State(api): State<Api>,
    caller: Caller,
    Body(request): Body<BindingRequest>,
) -> Answer<BindingRow> {
    Ok(Json(api.bind(&caller, &request).await?))
}

/// Whose role.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Identity {
    /// SPIFFE id.
    identity: String,
}

async fn unbind(
    State(api): State<Api>,
    caller: Caller,
    Query(Identity { identity }): Query<Identity>,
) -> Result<StatusCode, ApiError> {
    api.unbind(&caller, &identity).await?;
    Ok(StatusCode::NO_CONTENT)
}
