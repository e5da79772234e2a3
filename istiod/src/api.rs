//! The operator API: one service layer, above which [`rest`] is one way to call it.
//!
//! Reads come from the newest snapshot of this member; writes are proposed to the log and answered after they are
//! applied here. All checks are made before a proposal: what is in the log is a fact.

pub mod rest;
pub mod types;
mod view;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use ca::authn::{Hash, JoinToken, TokenBinding};
use ca::authority::Authority;
use ca::renewal::Clock;
use ca::state::{CaCommand, TokenRecord};
use registry::config::{Kind, Object, Severity};
use registry::model::mesh::MeshConfig;
use registry::snapshot::Snapshot;
use registry::state::{Batch, ObjectKey, ObjectResult};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;
use xds::balance::Fleet;
use xds::status::Status;

use crate::raft::{Command, Outcome, ProposeError, Raft, View};
use types::{
    Action, Applied, ApplyReport, ApplyRequest, HistoryEntry, List, ListMeta, Problem, ProxyRow, ServiceRow,
    TokenCreated, TokenRequest, TokenRow, Version, WaitReport, WorkloadRow,
};

/// Longest time that a caller may wait for a revision.
pub const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// Longest lifetime of a join token.
const LONGEST_TOKEN: Duration = Duration::from_secs(30 * 24 * 3600);

/// The most machines that may join with one token: each leaves its key's hash in the state.
const MOST_USES: u32 = 10_000;

/// Why a call was not answered.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The input is wrong; every mistake is told.
    #[error("{detail}")]
    Invalid {
        /// What was looked at.
        detail: String,
        /// One line for each mistake.
        errors: Vec<String>,
    },
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// The state is not what the caller expected.
    #[error("{0}")]
    Conflict(String),
    /// It cannot be decided now.
    #[error("the log cannot be written now")]
    Unavailable(#[from] ProposeError),
    /// The program itself is wrong.
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    fn invalid(detail: impl Into<String>) -> Self {
        Self::Invalid { detail: detail.into(), errors: Vec::new() }
    }

    /// The problem's details (RFC 9457).
    #[must_use]
    pub fn problem(&self) -> Problem {
        let (status, title) = match self {
            Self::Invalid { .. } => (422, "invalid input"),
            Self::NotFound(_) => (404, "not found"),
            Self::Conflict(_) => (409, "conflict"),
            Self::Unavailable(_) => (503, "unavailable"),
            Self::Internal(_) => (500, "internal error"),
        };
        let errors = match self {
            Self::Invalid { errors, .. } => errors.clone(),
            Self::Unavailable(cause) => vec![cause.to_string()],
            Self::NotFound(_) | Self::Conflict(_) | Self::Internal(_) => Vec::new(),
        };
        Problem {
            kind: "about:blank".to_owned(),
            title: title.to_owned(),
            status,
            detail: self.to_string(),
            errors,
        }
    }
}

/// The operator API of one member.
#[derive(Clone)]
pub struct Api {
    /// The log.
    pub raft: Raft,
    /// The newest snapshot.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// What proxies have acknowledged.
    pub status: Status,
    /// This member's authority.
    pub issuing: Arc<ArcSwap<Authority>>,
    /// What time it is.
    pub clock: Clock,
    /// Where agents reach the xDS port, `host:port`.
    pub xds: String,
    /// Who serves agents: the members, this one among them.
    pub fleet: watch::Receiver<Fleet>,
}

impl Api {
    /// The addresses of the xDS and certificate port of all members.
    fn addresses(&self) -> Vec<String> {
        self.fleet.borrow().addresses().map(str::to_owned).collect()
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    fn time_ms(&self) -> i64 {
        let since = (self.clock)().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }

    /// Commits every object of every file, or none.
    ///
    /// # Errors
    ///
    /// Every mistake of every file.
    pub async fn apply(&self, author: &str, request: ApplyRequest) -> Result<ApplyReport, ApiError> {
        let (api, dry_run) = (self.clone(), request.dry_run);
        let (objects, warnings) = aside(move || {
            let (objects, mut warnings) = read(&request)?;
            warnings.extend(api.check_together(&objects)?);
            Ok((objects, warnings))
        })
        .await?;
        if dry_run {
            return Ok(self.foresee(&objects, warnings));
        }
        let batch = Batch::put_objects(self.time_ms(), author, objects);
        self.commit(batch, warnings).await
    }

    /// Deletes one object.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when it is not there.
    pub async fn delete(
        &self,
        author: &str,
        kind: &str,
        namespace: &str,
        name: &str,
    ) -> Result<ApplyReport, ApiError> {
        let key = key(kind, namespace, name)?;
        if self.snapshot().object(&key).is_none() {
            return Err(ApiError::NotFound(format!("there is no {key}")));
        }
        self.commit(Batch::delete_objects(self.time_ms(), author, [key]), Vec::new()).await
    }

    async fn commit(&self, batch: Batch, warnings: Vec<String>) -> Result<ApplyReport, ApiError> {
        let (revision, outcome) = self.raft.propose(&Command::Registry(batch)).await?;
        let Outcome::Registry(outcome) = outcome else {
            return Err(ApiError::Internal("not an outcome of the registry".to_owned()));
        };
        if let Some(conflict) = outcome.conflict() {
            return Err(ApiError::Conflict(format!("{} was changed by somebody else", conflict.key)));
        }
        let objects = outcome.objects().filter_map(|o| Some(applied(&o.key, action(o.result)?))).collect();
        Ok(ApplyReport { revision: revision.0, objects, warnings })
    }

    /// What only shows when all objects are seen together: errors refuse the change, warnings are told.
    fn check_together(&self, objects: &[Object]) -> Result<Vec<String>, ApiError> {
        let snapshot = self.snapshot();
        let replaced: std::collections::BTreeSet<ObjectKey> = objects.iter().map(ObjectKey::of).collect();
        let kept = snapshot.objects().filter(|o| !replaced.contains(&ObjectKey::of(o))).map(AsRef::as_ref);
        let all: Vec<&Object> = kept.chain(objects).collect();
        let changed: std::collections::BTreeSet<String> = objects.iter().map(Object::id).collect();
        let issuing = self.issuing.load();
        let mut errors = foreign_domains(objects, issuing.trust_domain().as_str());
        let mut warnings = Vec::new();
        for problem in registry::config::validate_set(&all) {
            let ours = changed.contains(&problem.object);
            match problem.severity {
                Severity::Error if ours => errors.push(problem.to_string()),
                Severity::Warning if ours => warnings.push(problem.to_string()),
                Severity::Error | Severity::Warning => {}
            }
        }
        if errors.is_empty() {
            return Ok(warnings);
        }
        Err(ApiError::Invalid { detail: format!("{} mistake(s)", errors.len()), errors })
    }

    fn foresee(&self, objects: &[Object], warnings: Vec<String>) -> ApplyReport {
        let snapshot = self.snapshot();
        let foreseen = objects.iter().map(|object| {
            let key = ObjectKey::of(object);
            let action = match snapshot.object(&key) {
                None => Action::Created,
                Some(old)
                    if old.raw == object.raw
                        && old.labels == object.labels
                        && old.annotations == object.annotations =>
                {
                    Action::Unchanged
                }
                Some(_) => Action::Configured,
            };
            applied(&key, action)
        });
        ApplyReport { revision: snapshot.revision().0, objects: foreseen.collect(), warnings }
    }

    /// One object in Kubernetes' shape.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when it is not there.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Result<Value, ApiError> {
        let key = key(kind, namespace, name)?;
        self.snapshot()
            .object(&key)
            .map(|o| o.to_json())
            .ok_or_else(|| ApiError::NotFound(format!("there is no {key}")))
    }

    /// Objects of a kind, or of all kinds (`all`), in one namespace or in all.
    ///
    /// # Errors
    ///
    /// When the kind is unknown.
    pub async fn list(&self, kind: &str, namespace: Option<String>) -> Result<List, ApiError> {
        let kind = if kind == "all" { None } else { Some(parse_kind(kind)?) };
        let snapshot = self.snapshot();
        let read = snapshot.clone();
        let items = aside(move || {
            let of_kind = read.objects().filter(|o| kind.is_none_or(|kind| o.kind == kind));
            let scoped = of_kind.filter(|o| namespace.as_deref().is_none_or(|ns| o.namespace == ns));
            Ok(scoped.map(|o| o.to_json()).collect())
        })
        .await?;
        Ok(List {
            api_version: "v1".to_owned(),
            kind: "List".to_owned(),
            metadata: ListMeta { resource_version: snapshot.revision().to_string() },
            items,
        })
    }

    /// The newest changes, newest first.
    #[must_use]
    pub fn history(&self, limit: usize) -> Vec<HistoryEntry> {
        self.snapshot()
            .history()
            .entries()
            .rev()
            .take(limit)
            .map(|entry| view::history_entry(entry))
            .collect()
    }

    /// Connected proxies.
    #[must_use]
    pub fn proxies(&self) -> Vec<ProxyRow> {
        self.status.proxies(Instant::now().into_std()).iter().map(view::proxy_row).collect()
    }

    /// What a proxy was given, of one type or of `all`.
    ///
    /// # Errors
    ///
    /// When it is not connected, or the type is unknown.
    pub async fn proxy_config(&self, id: &str, kind: &str) -> Result<Value, ApiError> {
        let types = view::types_named(kind).ok_or_else(|| {
            ApiError::invalid(format!("`{kind}` is not one of listener, route, cluster, endpoint, all"))
        })?;
        let resources = self.status.resources(id).await;
        let resources = resources
            .ok_or_else(|| ApiError::NotFound(format!("no proxy `{id}` is connected to this member")))?;
        aside(move || view::resources(&resources, &types).map_err(|e| ApiError::Internal(e.to_string())))
            .await
    }

    /// Waits until every connected proxy runs `revision` or refused it, at most `timeout`.
    pub async fn wait(&self, revision: u64, timeout: Duration) -> WaitReport {
        let deadline = Instant::now() + timeout.min(LONGEST_WAIT);
        view::wait_report(&self.status.wait(revision, deadline).await)
    }

    /// Services.
    #[must_use]
    pub fn services(&self) -> Vec<ServiceRow> {
        let snapshot = self.snapshot();
        snapshot.services().map(|service| view::service_row(&snapshot, service)).collect()
    }

    /// Workloads.
    #[must_use]
    pub fn workloads(&self) -> Vec<WorkloadRow> {
        self.snapshot().workloads().map(|workload| view::workload_row(workload)).collect()
    }

    /// Makes a join token; its secret is in the answer and nowhere else.
    ///
    /// # Errors
    ///
    /// A namespace or service account that no identity can have, or a lifetime out of range.
    pub async fn create_token(&self, author: &str, request: &TokenRequest) -> Result<TokenCreated, ApiError> {
        let lifetime = Duration::from_secs(request.ttl_seconds);
        if lifetime.is_zero() || lifetime > LONGEST_TOKEN {
            return Err(ApiError::invalid("ttlSeconds: from 1 to 2592000 (30 days)"));
        }
        if request.uses == 0 || request.uses > MOST_USES {
            return Err(ApiError::invalid(format!("uses: from 1 to {MOST_USES}")));
        }
        let issuing = self.issuing.load_full();
        let binding = TokenBinding {
            namespace: request.namespace.clone(),
            service_account: request.service_account.clone(),
            trust_domain: self.issuing.load().trust_domain().clone(),
        };
        let root = issuing.roots().first().ok_or_else(|| ApiError::Internal("no root".to_owned()))?;
        let token = JoinToken::generate(binding, self.addresses(), Hash::of(root))
            .map_err(|e| ApiError::Internal(e.to_string()))?;
        let expires = (self.clock)() + lifetime;
        let record = TokenRecord::of(&token, expires, request.uses, author);
        record.identity(self.issuing.load().trust_domain()).map_err(|e| ApiError::invalid(e.to_string()))?;
        let created = TokenCreated {
            id: token.id.clone(),
            token: token.to_text(),
            expires: view::rfc3339(record.expires_at),
        };
        self.raft.propose(&Command::Ca(CaCommand::AddJoinToken(record))).await?;
        Ok(created)
    }

    /// Join tokens, without their secrets.
    ///
    /// # Errors
    ///
    /// When this member has stopped.
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, ApiError> {
        Ok(self.view().await?.ca.tokens().map(view::token_row).collect())
    }

    async fn view(&self) -> Result<View, ApiError> {
        Ok(self.raft.view().await?)
    }

    /// Makes a token useless.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when it is not there.
    pub async fn revoke_token(&self, id: &str) -> Result<(), ApiError> {
        if self.view().await?.ca.token(id).is_none() {
            return Err(ApiError::NotFound(format!("there is no token `{id}`")));
        }
        self.raft.propose(&Command::Ca(CaCommand::RevokeJoinToken { id: id.to_owned() })).await?;
        Ok(())
    }

    /// The trust bundle in PEM.
    #[must_use]
    pub fn roots(&self) -> String {
        ca::x509::certificates_to_pem(self.issuing.load().roots())
    }

    /// Who answers.
    #[must_use]
    pub fn version(&self) -> Version {
        let status = self.raft.status().borrow().clone();
        Version {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_domain: self.issuing.load().trust_domain().as_str().to_owned(),
            revision: self.snapshot().revision().0,
            member: status.id,
            role: if status.leading { "leader" } else { "follower" }.to_owned(),
            xds: self.xds.clone(),
            xds_members: self.addresses(),
        }
    }
}

/// Work that takes as long as its input is large: off the tasks that serve everybody.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::Internal("the work was not finished".to_owned())))
}

/// Identities are of the domain that the authority issues; settings cannot say otherwise.
fn foreign_domains(objects: &[Object], ours: &str) -> Vec<String> {
    let said = objects.iter().filter_map(|object| Some((object, object.get::<MeshConfig>()?)));
    let foreign = said.filter(|(_, mesh)| !mesh.trust_domain.is_empty() && mesh.trust_domain != ours);
    let told = foreign.map(|(object, mesh)| {
        format!(
            "error: {}: spec.trustDomain: is {}, the certificates of this mesh are of {ours}; that is set by trustDomain in the settings of istiod",
            object.id(),
            mesh.trust_domain
        )
    });
    told.collect()
}

/// Every object of every file with warnings, or every mistake.
fn read(request: &ApplyRequest) -> Result<(Vec<Object>, Vec<String>), ApiError> {
    let (mut objects, mut warnings, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for file in &request.files {
        match registry::config::parse_in(&request.namespace, &file.name, &file.text) {
            Ok((found, remarks)) => {
                objects.extend(found);
                warnings.extend(remarks.iter().map(ToString::to_string));
            }
            Err(mistakes) => errors.extend(mistakes.iter().map(ToString::to_string)),
        }
    }
    if !errors.is_empty() {
        return Err(ApiError::Invalid { detail: format!("{} mistake(s)", errors.len()), errors });
    }
    if objects.is_empty() {
        return Err(ApiError::invalid("there is no object in the input"));
    }
    Ok((objects, warnings))
}

fn parse_kind(kind: &str) -> Result<Kind, ApiError> {
    Kind::parse(kind).ok_or_else(|| {
        let known: Vec<_> = Kind::ALL.iter().map(|k| k.plural()).collect();
        ApiError::NotFound(format!("unknown kind `{kind}`; known are: {}", known.join(", ")))
    })
}

fn key(kind: &str, namespace: &str, name: &str) -> Result<ObjectKey, ApiError> {
    Ok(ObjectKey { kind: parse_kind(kind)?, namespace: namespace.to_owned(), name: name.to_owned() })
}

fn applied(key: &ObjectKey, action: Action) -> Applied {
    Applied { kind: key.kind.to_string(), namespace: key.namespace.clone(), name: key.name.clone(), action }
}

fn action(result: ObjectResult) -> Option<Action> {
    match result {
        ObjectResult::Created => Some(Action::Created),
        ObjectResult::Configured => Some(Action::Configured),
        ObjectResult::Unchanged(_) => Some(Action::Unchanged),
        ObjectResult::Deleted => Some(Action::Deleted),
        ObjectResult::NotFound | ObjectResult::Conflict { .. } | ObjectResult::NotApplied => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mesh_settings_of_another_trust_domain_are_refused_with_the_place_that_sets_it() {
        let said = |domain: &str| {
            let spec = serde_json::json!({ "trustDomain": domain });
            foreign_domains(&[Object::new(Kind::MeshConfig, "istio-system", "mesh", spec)], "mesh.example")
        };
        assert!(said("mesh.example").is_empty() && said("").is_empty());
        let told = said("other.example");
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("is other.example") && told[0].contains("settings of istiod"), "{told:?}");
    }
}
