//! The mesh as it is: services, workloads, proxies and members.

use std::sync::Arc;
use std::time::Duration;

use ca::identity::TrustDomain;
use registry::snapshot::Snapshot;
use registry::state::{Batch, Command as Change, Presence, Registration, WorkloadKey};
use serde_json::Value;
use tokio::time::Instant;

use super::page::{After, Wanted, key_of};
use super::served::Given;
use super::types::{
    HistoryEntry, Page, ProxyRow, ReleaseRequest, Released, Revisions, Rows, ServiceRow, Version, WaitReport,
    WorkloadRow,
};
use super::{Api, ApiError, Caller, LONGEST_WAIT, aside, view};
use crate::raft::Command;
use crate::raft::wire::look_request::At;
use crate::raft::wire::{AllProxies, GivenTo, LookRequest};

impl Api {
    /// The newest changes in the caller's namespaces, newest first.
    #[must_use]
    pub fn history(&self, caller: &Caller, limit: usize) -> Vec<HistoryEntry> {
        let snapshot = self.snapshot();
        let entries = snapshot.history().entries().rev().map(|entry| view::history_entry(entry));
        let seen = entries.filter_map(|mut entry| {
            entry.changes.retain(|change| caller.is_unlimited() || caller.covers(namespace_of(change)));
            (!entry.changes.is_empty()).then_some(entry)
        });
        seen.take(limit).collect()
    }

    /// Connected proxies of the caller's namespaces, whichever member serves them.
    ///
    /// # Errors
    ///
    /// [`ApiError::Invalid`] for a page that is none.
    pub async fn proxies(&self, caller: &Caller, rows: &Rows) -> Result<Page<ProxyRow>, ApiError> {
        let wanted = Wanted::parse(rows.limit, rows.r#continue.as_deref())?;
        let all = At::Proxies(AllProxies::default());
        let told = self.members.look::<Vec<ProxyRow>>(LookRequest { revision: 0, at: Some(all) }).await;
        let mut proxies = self.served().rows();
        proxies.extend(told.answers.into_iter().flatten());
        proxies.retain(|proxy| seen(caller, rows, &proxy.namespace));
        // Who went from one member to another is where it came last.
        proxies.sort_by(|a, b| (&a.id, a.connected_seconds).cmp(&(&b.id, b.connected_seconds)));
        proxies.dedup_by(|a, b| a.id == b.id);
        let revision = self.snapshot().revision().0;
        let mut page = wanted.page(revision, proxies.into_iter(), |row| row.id.clone(), |row| row);
        page.metadata.partial = told.partial;
        Ok(page)
    }

    /// What a proxy was given, of one type or of `all`, by whichever member serves it.
    ///
    /// # Errors
    ///
    /// When it is not connected, or the type is unknown.
    pub async fn proxy_config(&self, caller: &Caller, id: &str, kind: &str) -> Result<Value, ApiError> {
        let mut partial = false;
        let mut given = self.served().given(id, kind).await?;
        if given.is_none() {
            let asked = At::Given(GivenTo { proxy: id.to_owned(), kind: kind.to_owned() });
            let told = self.members.look::<Option<Given>>(LookRequest { revision: 0, at: Some(asked) }).await;
            given = told.answers.into_iter().flatten().next();
            partial = told.partial;
        }
        let shown = given.filter(|given| caller.covers(&given.namespace));
        let known = shown.map(|given| given.config);
        known.ok_or_else(|| {
            let who = if partial { "a member that answers" } else { "any member" };
            ApiError::NotFound(format!("no proxy `{id}` is connected to {who}"))
        })
    }

    /// Waits until every connected proxy of the caller's namespaces, whichever member serves it, runs `revision` or
    /// refused it, at most `timeout`.
    pub async fn wait(&self, caller: &Caller, revision: u64, timeout: Duration) -> WaitReport {
        let timeout = timeout.min(LONGEST_WAIT);
        let here = self.status.wait(revision, Instant::now() + timeout);
        let (mut report, elsewhere) = tokio::join!(here, self.members.wait(revision, timeout));
        if !caller.is_unlimited() {
            report.pending.retain(|pending| caller.covers(&pending.proxy.namespace));
            let statuses = self.status.proxies(Instant::now().into_std());
            let theirs =
                |id: &String| statuses.iter().any(|s| s.proxy.id == *id && caller.covers(&s.proxy.namespace));
            report.acknowledged.retain(theirs);
        }
        let mut all = view::wait_report(&report);
        for report in elsewhere {
            view::add_waited(&mut all, report, |id| caller.covers(namespace_of_node(id)));
        }
        all
    }

    /// Services of the caller's namespaces.
    ///
    /// # Errors
    ///
    /// [`ApiError::Invalid`] for a page that is none, [`ApiError::Gone`] for one that is not kept any more.
    pub async fn services(&self, caller: &Caller, rows: &Rows) -> Result<Page<ServiceRow>, ApiError> {
        let (who, of) = (caller.clone(), rows.clone());
        self.rows(rows, move |snapshot, wanted| {
            let services = snapshot.services().filter(|s| seen(&who, &of, &s.namespace));
            let key = |s: &&std::sync::Arc<_>| key_of_service(s);
            wanted.page(snapshot.revision().0, services, key, |s| view::service_row(snapshot, s))
        })
        .await
    }

    /// Workloads of the caller's namespaces.
    ///
    /// # Errors
    ///
    /// As [`Api::services`].
    pub async fn workloads(&self, caller: &Caller, rows: &Rows) -> Result<Page<WorkloadRow>, ApiError> {
        let (who, of) = (caller.clone(), rows.clone());
        self.rows(rows, move |snapshot, wanted| {
            let workloads = snapshot.workloads().filter(|w| seen(&who, &of, &w.key.namespace));
            let key =
                |w: &&std::sync::Arc<registry::merge::Workload>| key_of(&[&w.key.namespace, &w.key.name]);
            wanted.page(snapshot.revision().0, workloads, key, |w| view::workload_row(w))
        })
        .await
    }

    /// Gives up workloads of the caller's namespaces that are held as unknown: from now on their agents are silent.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when no workload that is meant is held; when the log cannot be written.
    pub async fn release(&self, caller: &Caller, request: &ReleaseRequest) -> Result<Released, ApiError> {
        if let Some(namespace) = &request.namespace {
            caller.must_cover(namespace)?;
        }
        self.raft.read_index().await?;
        let view = self.view().await?;
        let meant = |key: &WorkloadKey| {
            caller.covers(&key.namespace)
                && request.namespace.as_ref().is_none_or(|namespace| *namespace == key.namespace)
                && request.name.as_ref().is_none_or(|name| *name == key.name)
        };
        let held = view.registry.workloads().filter(|(_, workload)| workload.presence == Presence::Unknown);
        let release = |(key, workload): (&WorkloadKey, &Arc<Registration>)| {
            let (key, session) = (key.clone(), workload.session.clone());
            (key.to_string(), Change::WorkloadPresence { key, session, presence: Presence::Released })
        };
        let (workloads, commands): (Vec<String>, Vec<Change>) =
            held.filter(|(key, _)| meant(key)).map(release).unzip();
        drop(view);
        if commands.is_empty() {
            return Err(ApiError::NotFound("no such workload is held as unknown".to_owned()));
        }
        let batch = Batch { time_ms: self.time_ms(), author: caller.name.clone(), commands };
        let (revision, _) = self.propose(caller, "release workloads", &Command::Registry(batch)).await?;
        Ok(Released { workloads, revision: revision.0 })
    }

    /// Rows of a snapshot, in pages.
    async fn rows<T: Send + 'static>(
        &self,
        rows: &Rows,
        list: impl FnOnce(&Snapshot, &Wanted) -> Page<T> + Send + 'static,
    ) -> Result<Page<T>, ApiError> {
        let wanted = Wanted::parse(rows.limit, rows.r#continue.as_deref())?;
        let consistency = rows.consistency.unwrap_or_default();
        let after: Option<&After> = wanted.after.as_ref();
        let snapshot = self.read_page(after, consistency).await?;
        let read = snapshot.clone();
        let page = aside(move || Ok(list(&read, &wanted))).await?;
        if !page.metadata.r#continue.is_empty() {
            self.keep(&snapshot);
        }
        Ok(page)
    }

    /// Where this member stands in the log, and what it remembers.
    #[must_use]
    pub fn revisions(&self) -> Revisions {
        let (snapshot, status) = (self.snapshot(), self.raft.status().borrow().clone());
        let mut entries = snapshot.history().entries();
        let oldest = entries.next().map(|entry| entry.revision.0);
        Revisions {
            configuration: snapshot.revision().0,
            applied: status.applied,
            committed: status.committed,
            term: status.term,
            oldest,
            newest: entries.next_back().map(|entry| entry.revision.0).or(oldest),
        }
    }

    /// Who answers.
    #[must_use]
    pub fn version(&self) -> Version {
        let status = self.raft.status().borrow().clone();
        let issuing = self.issuing.load();
        let domain: &TrustDomain = issuing.trust_domain();
        Version {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_domain: domain.as_str().to_owned(),
            revision: self.snapshot().revision().0,
            member: status.id,
            role: if status.leading { "leader" } else { "follower" }.to_owned(),
            xds: self.xds.clone(),
            xds_members: self.addresses(),
        }
    }
}

/// The row is of a namespace that the caller asked for and may see.
fn seen(caller: &Caller, rows: &Rows, namespace: &str) -> bool {
    caller.covers(namespace) && rows.namespace.as_deref().is_none_or(|wanted| wanted == namespace)
}

fn key_of_service(service: &registry::model::service::Service) -> String {
    service.hostname.clone()
}

/// The namespace in `+VirtualService/shop/reviews`; none for what is of the whole mesh.
fn namespace_of(change: &str) -> &str {
    change.split('/').nth(1).unwrap_or_default()
}

/// The namespace in a node id, `sidecar~IP~NAME.NAMESPACE~DOMAIN`.
fn namespace_of_node(node: &str) -> &str {
    let name = node.split('~').nth(2).unwrap_or_default();
    name.rsplit_once('.').map_or("", |(_, namespace)| namespace)
}
