//! The members of the control plane.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};

use super::super::routes::{Form, Route, Scope, schema};
use super::super::types::members::{LeaderRequest, MemberChange, MemberRequest, MemberTicket};
use super::super::types::{ListMeta, Page};
use super::super::{Api, ApiError, Caller};
use super::{Answer, Body};
use crate::access::Permission;
use crate::cluster::members::MemberView;

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/api/v1/members", Permission::Read, Scope::Nobody, || get(members))
        .named("listMembers", "The members of the control plane, and how far each is.")
        .json(schema::<Page<MemberView>>)
        .rpc("Members/List"),
    Route::post("/api/v1/members", Permission::Administer, Scope::Mesh, || post(add))
        .named("addMember", "Makes a ticket for a new member, which is shown this once.")
        .takes_json(schema::<MemberRequest>)
        .answers(201, Form::Json(schema::<MemberTicket>))
        .rpc("Members/Add"),
    Route::post("/api/v1/members/promote", Permission::Administer, Scope::Mesh, || post(promote))
        .named("promoteMembers", "Lets learners vote that have caught up.")
        .takes_json(schema::<MemberChange>)
        .answers(204, Form::Nothing)
        .rpc("Members/Promote"),
    Route::post("/api/v1/members/remove", Permission::Administer, Scope::Mesh, || post(remove))
        .named("removeMembers", "Removes members for ever.")
        .takes_json(schema::<MemberChange>)
        .answers(204, Form::Nothing)
        .rpc("Members/Remove"),
    Route::post("/api/v1/members/transfer", Permission::Administer, Scope::Mesh, || post(transfer))
        .named("transferLeadership", "Lets another voter lead.")
        .takes_json(schema::<LeaderRequest>)
        .answers(204, Form::Nothing)
        .rpc("Members/Transfer"),
];

async fn members(State(api): State<Api>) -> Answer<Page<MemberView>> {
    Ok(Json(Page { items: api.members().await?, metadata: ListMeta::default() }))
}

async fn add(
    State(api): State<Api>,
    caller: Caller,
    Body(request): Body<MemberRequest>,
) -> Result<(StatusCode, Json<MemberTicket>), ApiError> {
    Ok((StatusCode::CREATED, Json(api.add_member(&caller, &request).await?)))
}

async fn promote(
    State(api): State<Api>,
    caller: Caller,
    Body(change): Body<MemberChange>,
) -> Result<StatusCode, ApiError> {
    api.promote_members(&caller, &change).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove(
    State(api): State<Api>,
    caller: Caller,
    Body(change): Body<MemberChange>,
) -> Result<StatusCode, ApiError> {
    api.remove_members(&caller, &change).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn transfer(
    State(api): State<Api>,
    Body(request): Body<LeaderRequest>,
) -> Result<StatusCode, ApiError> {
    api.transfer_leadership(request.to).await?;
    Ok(StatusCode::NO_CONTENT)
}
