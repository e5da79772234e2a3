//! What the admin API says, as JSON. Shared with `istioctl`; field names are the API's.

mod access;
pub mod members;
mod nodes;
mod problem;
mod query;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::preview::PreviewReport;

pub use self::access::{ApiTokenCreated, ApiTokenRequest, ApiTokenRow, BindingRequest, BindingRow, WhoAmI};
pub use self::nodes::{NodeRevocation, NodeRevoked, NodeRow};
pub use self::problem::{Mistake, Problem};
pub use self::query::{
    Changing, Consistency, DryRun, Expected, Listing, Patience, ProxyTypes, Read, Rows, Since, Watching,
};

/// A Kubernetes `List`: what `istioctl get -o json` prints.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct List {
    /// `v1`
    pub api_version: String,
    /// `List`
    pub kind: String,
    /// Revision of the mesh at which the list was read.
    pub metadata: ListMeta,
    /// Objects in Kubernetes' shape.
    pub items: Vec<Value>,
}

/// One page of rows, or all of them.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Page<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Where they were read, and where to go on.
    pub metadata: ListMeta,
}

/// Metadata of a [`List`] or a [`Page`].
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ListMeta {
    /// Revision, decimal.
    pub resource_version: String,
    /// Where to go on, for the next call's `continue`; empty at the end.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub r#continue: String,
    /// A member did not answer in time: what it serves is missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}

/// Body of `POST /api/v1/apply`: all files are one commit.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApplyRequest {
    /// What to apply.
    pub files: Vec<SourceFile>,
    /// Namespace of objects that name none.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// Check everything and commit nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Commit even if it touches more proxies than the mesh allows in one change.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
    /// In the same commit, delete what is no longer among the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<Prune>,
}

/// Which objects are deleted when they are not among the files of an apply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Prune {
    /// Those of this set. Every object of the files becomes one of it, by the label
    /// `applyset.kubernetes.io/part-of`.
    Set(String),
    /// Those with such labels, as in `labelSelector`; every object of the files must have them.
    Selector(String),
}

fn default_namespace() -> String {
    "default".to_owned()
}

/// One YAML or JSON file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Its name, for error messages.
    pub name: String,
    /// Its content.
    pub text: String,
}

/// What an apply did to one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It did not exist.
    Created,
    /// It existed and is different now.
    Configured,
    /// It existed and is the same.
    Unchanged,
    /// It is gone.
    Deleted,
}

/// One object of an [`ApplyReport`].
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Applied {
    /// Kind, `VirtualService`.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// What happened.
    pub action: Action,
}

/// Answer to an apply or a delete.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ApplyReport {
    /// The revision that has the change; unchanged objects keep the revision they have.
    pub revision: u64,
    /// Objects in the order of the files.
    pub objects: Vec<Applied>,
    /// What is legal and probably not meant.
    pub warnings: Vec<String>,
    /// What proxies would be sent, if that was asked for; then nothing was committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<PreviewReport>,
}

/// Who has acknowledged a revision.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct WaitReport {
    /// The revision that was waited for.
    pub revision: u64,
    /// Connected proxies that run it.
    pub acknowledged: Vec<String>,
    /// Connected proxies that do not.
    pub pending: Vec<PendingProxy>,
}

/// A proxy that does not run a revision yet.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PendingProxy {
    /// Node id.
    pub proxy: String,
    /// What it refused, by type and with its own words; empty when it has only not answered.
    pub rejected: Vec<Rejection>,
    /// It was connected when the waiting began and has not come back.
    #[serde(default)]
    pub gone: bool,
}

/// A refused resource type.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Rejection {
    /// `CDS`, `EDS`, `LDS` or `RDS`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Revision that was refused.
    pub revision: u64,
    /// The proxy's words.
    pub error: String,
}

/// One row of `istioctl proxy-status`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyRow {
    /// Node id.
    pub id: String,
    /// `name.namespace`
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The member that serves it.
    pub member: u64,
    /// Cluster id.
    pub cluster: String,
    /// `delta` or `sotw`
    pub protocol: String,
    /// Version the proxy tells.
    pub version: String,
    /// SPIFFE identity of its certificate.
    pub identity: String,
    /// Status of each type: `SYNCED`, `STALE`, `NACKED`, `NOT SENT`.
    pub types: BTreeMap<String, String>,
    /// Highest revision whose every resource it has acknowledged.
    pub revision: u64,
    /// Refusals that still hold.
    pub rejected: Vec<Rejection>,
    /// Seconds since it connected.
    pub connected_seconds: u64,
}

/// One change in the history.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HistoryEntry {
    /// Revision.
    pub revision: u64,
    /// RFC 3339 time of the commit.
    pub time: String,
    /// Who.
    pub author: String,
    /// `+VirtualService/default/reviews` (created), `~...` (changed), `-...` (deleted).
    pub changes: Vec<String>,
}

/// One row of `istioctl services`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRow {
    /// Host.
    pub hostname: String,
    /// Namespace.
    pub namespace: String,
    /// `9080/HTTP`
    pub ports: Vec<String>,
    /// Source.
    pub source: String,
    /// Declared and automatic addresses.
    pub addresses: Vec<String>,
    /// Index of the service among automatic addresses and in loopback blocks.
    pub vip_index: u32,
    /// Healthy endpoints.
    pub healthy: usize,
    /// All endpoints.
    pub endpoints: usize,
    /// What sources disagree about.
    pub conflicts: Vec<String>,
}

/// One row of `istioctl workloads`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadRow {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Address.
    pub address: String,
    /// Identity.
    pub service_account: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// `Healthy`, `Unhealthy` or `Draining`.
    pub health: String,
    /// Why it is not healthy, as its agent said; empty when nobody said.
    pub reason: String,
    /// Registered by an agent or declared.
    pub source: String,
    /// Whether its agent is `heard`; `silent`, so that it is sent no traffic; `unknown`, lost with many others and held
    /// as it was; or `released`, held no longer. Empty when it has none.
    pub agent: String,
    /// Since when its agent is not heard, or was given up, as RFC 3339 time; empty when it is heard.
    pub agent_since: String,
}

/// Body of `POST /api/v1/workloads/release`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReleaseRequest {
    /// Those of this namespace; all when none is said.
    #[serde(default)]
    pub namespace: Option<String>,
    /// The workload of this name; all when none is said.
    #[serde(default)]
    pub name: Option<String>,
}

/// Answer of `POST /api/v1/workloads/release`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Released {
    /// `namespace/name` of the workloads that are not held any more.
    pub workloads: Vec<String>,
    /// Revision of the mesh that has it so.
    pub revision: u64,
}

/// Body of `POST /api/v1/tokens`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenRequest {
    /// Namespace of the workload that will join.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Seconds until the token expires, at most 30 days.
    #[serde(default = "default_ttl")]
    #[schemars(range(min = 1, max = 2_592_000))]
    pub ttl_seconds: u64,
    /// How many workloads may join with it.
    #[serde(default = "default_uses")]
    #[schemars(range(min = 1, max = 10_000))]
    pub uses: u32,
    /// Blocks of addresses, `10.0.0.0/8`, from which machines must call to join with it; from anywhere when none is said.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub cidrs: Vec<String>,
}

fn default_ttl() -> u64 {
    900
}

fn default_uses() -> u32 {
    1
}

/// A new token; the secret is shown this once.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenCreated {
    /// Identifier, for `token revoke`.
    pub id: String,
    /// What `istio-agent join` takes.
    pub token: String,
    /// RFC 3339 time.
    pub expires: String,
}

impl std::fmt::Debug for TokenCreated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { id, token: _, expires } = self;
        f.debug_struct("TokenCreated").field("id", id).field("expires", expires).finish_non_exhaustive()
    }
}

/// A token as the log knows it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenRow {
    /// Identifier.
    pub id: String,
    /// Namespace it is bound to.
    pub namespace: String,
    /// Service account it is bound to.
    pub service_account: String,
    /// RFC 3339 time.
    pub expires: String,
    /// Uses that are left.
    pub uses_left: u32,
    /// Blocks of addresses from which machines must call to join with it; empty: from anywhere.
    pub cidrs: Vec<String>,
}

/// Answer of `/api/v1/version`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    /// Version of the program.
    pub version: String,
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// Applied revision.
    pub revision: u64,
    /// Raft member id.
    pub member: u64,
    /// `leader` or `follower`.
    pub role: String,
    /// Address of the xDS and certificate port.
    pub xds: String,
    /// The same of every member that serves, this one among them.
    #[serde(default)]
    pub xds_members: Vec<String>,
}

/// Where a member stands in the log, and what it remembers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Revisions {
    /// Revision of the mesh: the last entry that changed it.
    pub configuration: u64,
    /// The last entry that this member has applied.
    pub applied: u64,
    /// The last entry that this member knows to be committed.
    pub committed: u64,
    /// Raft's term.
    pub term: u64,
    /// The oldest change that is remembered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest: Option<u64>,
    /// The newest change that is remembered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<u64>,
}

/// Whom certificates of the mesh are trusted for, and what a member signs with.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuthorityReport {
    /// Trust domain of every identity.
    pub trust_domain: String,
    /// RFC 3339 time from which this member's own authority is valid.
    pub not_before: String,
    /// RFC 3339 time until which it is.
    pub not_after: String,
    /// The trust bundle.
    pub roots: Vec<RootRow>,
}

/// One root of the trust bundle.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RootRow {
    /// SHA-256 of the certificate, hexadecimal.
    pub fingerprint: String,
    /// RFC 3339 time.
    pub not_before: String,
    /// RFC 3339 time.
    pub not_after: String,
}

/// What happened to an object that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum WatchKind {
    /// It is there, or is meant by the selection now.
    Added,
    /// It is different.
    Modified,
    /// It is gone, or is not meant by the selection any more.
    Deleted,
    /// Nothing: everything up to this revision was told.
    Bookmark,
}

/// One line of a watch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WatchEvent {
    /// What happened.
    #[serde(rename = "type")]
    pub kind: WatchKind,
    /// The revision at which it did; where to come back.
    pub revision: u64,
    /// The object afterwards, or before it went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<Value>,
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// Configuration.
    Config,
    /// A proxy.
    Proxy,
    /// Who leads.
    Leader,
    /// The agent of a workload, or those of many.
    Agent,
}

/// Something that happened on a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventRow {
    /// Counts the events of this member since it started.
    pub sequence: u64,
    /// RFC 3339 time.
    pub time: String,
    /// What it is about.
    pub kind: EventKind,
    /// Namespace, if it is of one.
    pub namespace: String,
    /// Object, proxy or member.
    pub about: String,
    /// What happened.
    pub message: String,
}
