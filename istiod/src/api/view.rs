//! From the mesh to the API's JSON.

use ca::state::TokenRecord;
use registry::merge::Workload;
use registry::model::service::{Health, Protocol, Service, SourceId};
use registry::snapshot::Snapshot;
use registry::state::history::Entry;
use registry::state::{Presence, Registration};
use serde_json::{Map, Value};
use wire::json::{JsonError, any_to_json};
use xds::resources::{Resources, Type};
use xds::status::ProxyStatus;
use xds::stream::{Nack, Sync, Variant};

use super::types::{
    HistoryEntry, PendingProxy, ProxyRow, Rejection, ServiceRow, TokenRow, WaitReport, WorkloadRow,
};
use crate::raft::wire as peers;

/// `CDS`, `EDS`, `LDS`, `RDS`
pub(super) fn short(kind: Type) -> &'static str {
    match kind {
        Type::Cluster => "CDS",
        Type::Endpoint => "EDS",
        Type::Listener => "LDS",
        Type::Route => "RDS",
    }
}

/// The types that a name stands for, with their names in a dump.
pub(super) fn types_named(kind: &str) -> Option<Vec<(Type, &'static str)>> {
    let all = [
        (Type::Listener, "listeners"),
        (Type::Route, "routes"),
        (Type::Cluster, "clusters"),
        (Type::Endpoint, "endpoints"),
    ];
    match kind {
        "all" => Some(all.to_vec()),
        one => {
            all.into_iter().find(|(_, plural)| plural.strip_suffix('s') == Some(one)).map(|found| vec![found])
        }
    }
}

/// Resources as JSON, by type.
pub(super) fn resources(resources: &Resources, types: &[(Type, &'static str)]) -> Result<Value, JsonError> {
    let mut dump = Map::new();
    for (kind, name) in types {
        let of_type = resources.by_type.get(kind).into_iter().flat_map(|r| r.values());
        let items: Vec<Value> = of_type.map(|r| any_to_json(&r.body)).collect::<Result<_, _>>()?;
        dump.insert((*name).to_owned(), Value::Array(items));
    }
    Ok(Value::Object(dump))
}

pub(super) fn history_entry(entry: &Entry) -> HistoryEntry {
    HistoryEntry {
        revision: entry.revision.0,
        time: rfc3339(u64::try_from(entry.time_ms / 1000).unwrap_or_default()),
        author: entry.author.clone(),
        changes: entry.summary().split(' ').map(str::to_owned).collect(),
    }
}

pub(super) fn proxy_row(status: &ProxyStatus, member: u64) -> ProxyRow {
    let types = status
        .types
        .iter()
        .map(|(kind, report)| (short(*kind).to_owned(), state(report.sync).to_owned()))
        .collect();
    ProxyRow {
        id: status.proxy.id.clone(),
        name: format!("{}.{}", status.proxy.name, status.proxy.namespace),
        namespace: status.proxy.namespace.clone(),
        member,
        cluster: status.proxy.cluster.clone(),
        protocol: match status.variant {
            Variant::Delta => "delta",
            Variant::StateOfTheWorld => "sotw",
        }
        .to_owned(),
        version: status.version.clone(),
        identity: status.proxy.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
        types,
        revision: status.revision,
        rejected: status
            .types
            .iter()
            .filter_map(|(kind, r)| r.nack.as_ref().map(|nack| rejection(*kind, nack)))
            .collect(),
        connected_seconds: status.connected.as_secs(),
    }
}

fn state(sync: Sync) -> &'static str {
    match sync {
        Sync::Synced => "SYNCED",
        Sync::Stale => "STALE",
        Sync::Nacked => "NACKED",
        Sync::NotSent => "NOT SENT",
    }
}

fn rejection(kind: Type, nack: &Nack) -> Rejection {
    Rejection { kind: short(kind).to_owned(), revision: nack.revision, error: nack.message.clone() }
}

pub(super) fn wait_report(report: &xds::status::WaitReport) -> WaitReport {
    let pending = report.pending.iter().map(|pending| PendingProxy {
        proxy: pending.proxy.id.clone(),
        rejected: pending.nacks.iter().map(|nack| rejection(nack.type_, nack)).collect(),
        gone: pending.gone,
    });
    WaitReport {
        revision: report.revision,
        acknowledged: report.acknowledged.clone(),
        pending: pending.collect(),
    }
}

/// What another member says of its proxies, as it goes to the member that asked.
pub(crate) fn waited(report: &xds::status::WaitReport) -> peers::WaitReply {
    let pending = wait_report(report).pending.into_iter().map(|pending| peers::PendingProxy {
        proxy: pending.proxy,
        rejected: pending
            .rejected
            .into_iter()
            .map(|Rejection { kind, revision, error }| peers::RejectedType { r#type: kind, revision, error })
            .collect(),
        gone: pending.gone,
    });
    peers::WaitReply { acknowledged: report.acknowledged.clone(), pending: pending.collect() }
}

/// Adds what another member says of those proxies that may be shown. Who left one member for another is where it is.
pub(super) fn add_waited(all: &mut WaitReport, other: peers::WaitReply, shown: impl Fn(&str) -> bool) {
    let rejection =
        |peers::RejectedType { r#type, revision, error }| Rejection { kind: r#type, revision, error };
    let pending = other.pending.into_iter().map(|pending| PendingProxy {
        proxy: pending.proxy,
        rejected: pending.rejected.into_iter().map(rejection).collect(),
        gone: pending.gone,
    });
    all.pending.extend(pending.filter(|pending| shown(&pending.proxy)));
    all.acknowledged.extend(other.acknowledged.into_iter().filter(|id| shown(id)));
    let WaitReport { acknowledged, pending, .. } = all;
    acknowledged.sort_unstable();
    acknowledged.dedup();
    pending.sort_by(|a, b| (&a.proxy, a.gone).cmp(&(&b.proxy, b.gone)));
    pending.dedup_by(|a, b| a.proxy == b.proxy);
    pending.retain(|pending| !pending.gone || acknowledged.binary_search(&pending.proxy).is_err());
}

pub(super) fn service_row(snapshot: &Snapshot, service: &Service) -> ServiceRow {
    let endpoints = snapshot.endpoints_of(service);
    let addresses =
        xds::translate::names::service_addresses(service).iter().map(|net| net.addr().to_string()).collect();
    ServiceRow {
        hostname: service.hostname.clone(),
        namespace: service.namespace.clone(),
        ports: service
            .ports
            .iter()
            .map(|port| format!("{}/{}", port.number, protocol(port.protocol)))
            .collect(),
        source: source(&service.source),
        addresses,
        vip_index: service.vip_index,
        healthy: endpoints.iter().filter(|e| e.health == Health::Healthy).count(),
        endpoints: endpoints.len(),
        conflicts: snapshot
            .conflicts()
            .filter(|c| c.host == service.hostname)
            .map(|c| format!("{}: {}", c.loser, c.reason))
            .collect(),
    }
}

fn protocol(protocol: Protocol) -> String {
    format!("{protocol:?}").to_uppercase()
}

fn source(source: &SourceId) -> String {
    match source {
        SourceId::Config => "config".to_owned(),
        SourceId::Workload => "workload".to_owned(),
        SourceId::Kubernetes(cluster) => format!("kubernetes/{cluster}"),
        SourceId::Consul(datacenter) => format!("consul/{datacenter}"),
        SourceId::File(folder) => format!("file/{folder}"),
    }
}

pub(super) fn workload_row(workload: &Workload) -> WorkloadRow {
    WorkloadRow {
        name: workload.key.name.clone(),
        namespace: workload.key.namespace.clone(),
        address: workload.address.clone(),
        service_account: workload.service_account.clone(),
        labels: workload.labels.clone(),
        health: format!("{:?}", workload.health),
        reason: workload.registration.as_ref().map_or_else(String::new, |r| r.reason.clone()),
        source: if workload.registration.is_some() { "agent" } else { "config" }.to_owned(),
        agent: workload.registration.as_ref().map_or("", |r| presence(r.presence)).to_owned(),
        agent_since: workload.registration.as_ref().map_or_else(String::new, |r| agent_since(r)),
    }
}

fn presence(presence: Presence) -> &'static str {
    match presence {
        Presence::Heard => "heard",
        Presence::Silent => "silent",
        Presence::Unknown => "unknown",
        Presence::Released => "released",
    }
}

fn agent_since(registration: &Registration) -> String {
    match registration.presence {
        Presence::Heard => String::new(),
        Presence::Silent | Presence::Unknown | Presence::Released => {
            rfc3339(u64::try_from(registration.lost_ms / 1000).unwrap_or(0))
        }
    }
}

pub(super) fn token_row(token: &TokenRecord) -> TokenRow {
    TokenRow {
        id: token.id.clone(),
        namespace: token.namespace.clone(),
        service_account: token.service_account.clone(),
        expires: rfc3339(token.expires_at),
        uses_left: token.uses_left,
        cidrs: token.cidrs.iter().map(ToString::to_string).collect(),
    }
}

/// Seconds since 1970 as RFC 3339 in UTC.
pub(crate) fn rfc3339(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map(|t| t.to_string()).unwrap_or_default()
}
