//! Nodes: which machines hold certificates, and which of them may not any more.

use axum::Json;
use axum::extract::State;
use axum::routing::{get, post};

use super::super::routes::{Route, Scope, schema};
use super::super::types::{ListMeta, NodeRevocation, NodeRow, Page};
use super::super::{Api, Caller};
use super::{Answer, Body};
use crate::access::Permission;

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::get("/api/v1/nodes", Permission::Administer, Scope::Each, || get(nodes))
        .named(
            "listNodes",
            "The machines that hold certificates, as far as they are known, and the revoked ones.",
        )
        .json(schema::<Page<NodeRow>>)
        .rpc("Nodes/List"),
    Route::post("/api/v1/nodes/revoke", Permission::Administer, Scope::Each, || post(revoke))
        .named("revokeNode", "Takes a node out of the mesh, and ends what it has open.")
        .takes_json(schema::<NodeRevocation>)
        .json(schema::<NodeRow>)
        .rpc("Nodes/Revoke"),
];

async fn nodes(State(api): State<Api>, caller: Caller) -> Answer<Page<NodeRow>> {
    Ok(Json(Page { items: api.nodes(&caller).await?, metadata: ListMeta::default() }))
}

async fn revoke(
    State(api): State<Api>,
    caller: Caller,
    Body(request): Body<NodeRevocation>,
) -> Answer<NodeRow> {
    Ok(Json(api.revoke_node(&caller, &request).await?))
}
