//! The certificate authority: join tokens and the trust bundle.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{delete, get, post};

use super::super::routes::{Form, Route, Scope, schema};
use super::super::types::{AuthorityReport, ListMeta, Page, TokenCreated, TokenRequest, TokenRow};
use super::super::{Api, ApiError, Caller};
use super::{Answer, Body, Path};
use crate::access::Permission;

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/api/v1/tokens", Permission::Administer, Scope::Each, || get(tokens))
        .named("listTokens", "Join tokens, without their secrets.")
        .json(schema::<Page<TokenRow>>)
        .rpc("Tokens/List"),
    Route::post("/api/v1/tokens", Permission::Administer, Scope::Each, || post(create_token))
        .named("createToken", "Makes a join token, which is shown this once.")
        .takes_json(schema::<TokenRequest>)
        .answers(201, Form::Json(schema::<TokenCreated>))
        .rpc("Tokens/Create"),
    Route::delete("/api/v1/tokens/{id}", Permission::Administer, Scope::Each, || delete(revoke_token))
        .named("revokeToken", "Makes a join token useless.")
        .answers(204, Form::Nothing)
        .rpc("Tokens/Revoke"),
    Route::get("/api/v1/ca", Permission::Read, Scope::Nobody, || get(authority))
        .named("getAuthority", "The trust bundle, and what this member signs with.")
        .json(schema::<AuthorityReport>)
        .rpc("Authority/Get"),
    Route::get("/api/v1/ca/root", Permission::Read, Scope::Nobody, || get(root))
        .named("getRoots", "The trust bundle in PEM.")
        .answers(200, Form::Text("text/plain; charset=utf-8"))
        .rpc("Authority/GetRoots"),
];

async fn tokens(State(api): State<Api>, caller: Caller) -> Answer<Page<TokenRow>> {
    Ok(Json(Page { items: api.tokens(&caller).await?, metadata: ListMeta::default() }))
}

async fn create_token(
    State(api): State<Api>,
    caller: Caller,
    Body(request): Body<TokenRequest>,
) -> Result<(StatusCode, Json<TokenCreated>), ApiError> {
    Ok((StatusCode::CREATED, Json(api.create_token(&caller, &request).await?)))
}

async fn revoke_token(
    State(api): State<Api>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    api.revoke_token(&caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn authority(State(api): State<Api>) -> Json<AuthorityReport> {
    Json(api.authority())
}

async fn root(State(api): State<Api>) -> String {
    api.roots()
}
