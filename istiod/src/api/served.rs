//! The proxies that one member serves, as it tells of them: to its operators, and to other members for theirs.

use std::sync::Arc;

use registry::snapshot::Snapshot;
use registry::state::{Batch, Revision};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch::Receiver;
use tokio::time::Instant;
use xds::status::Status;

use super::preview::{self, PreviewReport};
use super::types::ProxyRow;
use super::{ApiError, aside, view};
use crate::preview::Foreseen;
use crate::raft::wire::LookRequest;
use crate::raft::wire::look_request::At;
use crate::raft::{Command, Raft};

/// The proxies that this member serves, and the mesh from which it does. Clones are the same.
#[derive(Clone)]
pub struct Served {
    /// The log.
    pub raft: Raft,
    /// The newest snapshot.
    pub snapshots: Receiver<Arc<Snapshot>>,
    /// What proxies have acknowledged.
    pub status: Status,
}

/// What a proxy was given, with the namespace that says who may see it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Given {
    pub(super) namespace: String,
    pub(super) config: Value,
}

impl Served {
    /// Applies a batch to a copy of the state as it is now; also gives the revision of that state.
    pub(super) async fn foresee(&self, batch: Batch) -> Result<(Arc<Foreseen>, u64), ApiError> {
        let state = self.raft.view().await?.registry;
        let snapshot = self.snapshots.borrow().clone();
        aside(move || {
            let revision = state.revision();
            // The newest snapshot may be of a later entry than the state that was looked at.
            let before =
                if snapshot.revision() == revision { snapshot } else { Arc::new(snapshot.rebuild(&state)) };
            Ok((Arc::new(Foreseen::of(&state, before, &batch)), revision.0))
        })
        .await
    }

    /// What `foreseen`, which was put on revision `base`, would do to the proxies of this member.
    pub(super) async fn preview(
        &self,
        foreseen: Arc<Foreseen>,
        base: u64,
    ) -> Result<PreviewReport, ApiError> {
        let connected = self.status.proxies(Instant::now().into_std());
        let member = self.raft.status().borrow().id;
        aside(move || preview::report(&foreseen, &connected, base, member)).await
    }

    /// What each proxy has acknowledged.
    pub(super) fn rows(&self) -> Vec<ProxyRow> {
        let member = self.raft.status().borrow().id;
        let statuses = self.status.proxies(Instant::now().into_std());
        statuses.iter().map(|status| view::proxy_row(status, member)).collect()
    }

    /// What a proxy was given, of the types that `kind` stands for; nothing if this member does not serve it.
    pub(super) async fn given(&self, id: &str, kind: &str) -> Result<Option<Given>, ApiError> {
        let types = view::types_named(kind).ok_or_else(|| {
            let detail = format!("`{kind}` is not one of listener, route, cluster, endpoint, all");
            ApiError::invalid_field("type", detail)
        })?;
        let statuses = self.status.proxies(Instant::now().into_std());
        let Some(status) = statuses.iter().find(|status| status.proxy.id == id) else { return Ok(None) };
        let Some(resources) = self.status.resources(id).await else { return Ok(None) };
        let namespace = status.proxy.namespace.clone();
        aside(move || {
            let shown = view::resources(&resources, &types);
            let config = shown.map_err(|error| ApiError::Internal(error.to_string()))?;
            Ok(Some(Given { namespace, config }))
        })
        .await
    }

    /// Answers another member, in JSON.
    pub(crate) async fn look(&self, request: LookRequest) -> Result<Vec<u8>, ApiError> {
        self.raft.applied(Revision(request.revision)).await?;
        let json = match request.at {
            Some(At::Change(command)) => {
                let unknown = || ApiError::invalid("not a change of the mesh that this member knows");
                let command = Command::decode(request.revision, &command).map_err(|_| unknown())?;
                let Command::Registry(batch) = command else { return Err(unknown()) };
                let (foreseen, base) = self.foresee(batch).await?;
                serde_json::to_vec(&self.preview(foreseen, base).await?)
            }
            Some(At::Proxies(_)) => serde_json::to_vec(&self.rows()),
            Some(At::Given(asked)) => serde_json::to_vec(&self.given(&asked.proxy, &asked.kind).await?),
            None => return Err(ApiError::invalid("this member does not know what is asked")),
        };
        json.map_err(|error| ApiError::Internal(error.to_string()))
    }
}
