//! Builders shared by the tests of the state and of the snapshot.

#![allow(dead_code, reason = "each test program uses its own part")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a builder that fails has failed its test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use registry::config::{Kind, Object};
use registry::model::service::{
    Endpoint, Health, Locality, Location, Protocol, Resolution, Service, ServicePort, SourceId, TlsMode,
};
use registry::snapshot::{Snapshot, Typed};
use registry::state::{
    Batch, Changes, Command, Delete, ObjectKey, Outcome, Presence, Put, Registration, Revision, State,
    WorkloadKey,
};
use serde_json::{Value, json};

pub(crate) type Labels = BTreeMap<String, String>;

pub(crate) fn labels(text: &str) -> Labels {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap()).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

pub(crate) fn object(kind: Kind, id: &str, spec: Value) -> Object {
    let (namespace, name) = id.split_once('/').unwrap();
    Object::new(kind, namespace, name, spec)
}

pub(crate) fn key(kind: Kind, id: &str) -> ObjectKey {
    let (namespace, name) = id.split_once('/').unwrap();
    ObjectKey { kind, namespace: namespace.to_owned(), name: name.to_owned() }
}

pub(crate) fn workload_key(id: &str) -> WorkloadKey {
    let (namespace, name) = id.split_once('/').unwrap();
    WorkloadKey { namespace: namespace.to_owned(), name: name.to_owned() }
}

pub(crate) fn service(host: &str, namespace: &str, source: SourceId) -> Service {
    Service {
        hostname: host.to_owned(),
        name: host.split('.').next().unwrap().to_owned(),
        namespace: namespace.to_owned(),
        ports: vec![ServicePort {
            name: "http".to_owned(),
            number: 80,
            target_port: Some(8080),
            protocol: Protocol::Http,
        }],
        addresses: Vec::new(),
        vip_index: 0,
        resolution: Resolution::Static,
        location: Location::Internal,
        export_to: Vec::new(),
        subject_alt_names: Vec::new(),
        labels: Labels::new(),
        created: 0,
        source,
    }
}

pub(crate) fn endpoint(address: &str) -> Endpoint {
    Endpoint {
        address: address.to_owned(),
        ports: BTreeMap::new(),
        weight: 1,
        locality: Locality::default(),
        network: String::new(),
        labels: Labels::new(),
        workload: "w".to_owned(),
        namespace: "shop".to_owned(),
        cluster: "default".to_owned(),
        service_account: String::new(),
        tls_mode: TlsMode::Disabled,
        health: Health::Healthy,
    }
}

pub(crate) fn registration(id: &str, address: &str, text: &str, session: &str) -> Registration {
    let WorkloadKey { namespace, name } = workload_key(id);
    Registration {
        namespace,
        name,
        address: address.to_owned(),
        ports: BTreeMap::new(),
        labels: labels(text),
        annotations: Labels::new(),
        network: String::new(),
        locality: Locality::default(),
        weight: 0,
        service_account: "sa".to_owned(),
        cluster: "default".to_owned(),
        group: String::new(),
        instance: "i".to_owned(),
        session: session.to_owned(),
        lease_ms: 30_000,
        healthy: true,
        presence: Presence::Heard,
        lost_ms: 0,
        reason: String::new(),
    }
}

pub(crate) fn entry(id: &str, spec: Value) -> Object {
    let mut whole = json!({"ports": [{"number": 80, "name": "http"}], "resolution": "STATIC", "location": "MESH_INTERNAL"});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    object(Kind::ServiceEntry, id, whole)
}

pub(crate) fn routes(id: &str, spec: Value) -> Object {
    let mut whole = json!({"hosts": ["x"], "http": [{"route": [{"destination": {"host": "x"}}]}]});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    object(Kind::VirtualService, id, whole)
}

pub(crate) fn names<T>(objects: &[Typed<T>]) -> Vec<String> {
    objects.iter().map(|(object, _)| format!("{}/{}", object.namespace, object.name)).collect()
}

pub(crate) fn put(objects: Vec<Object>) -> Command {
    let puts = objects.into_iter().map(|o| Put { object: Arc::new(o), expected: None }).collect();
    Command::Change { puts, deletes: Vec::new() }
}

pub(crate) fn delete(keys: Vec<ObjectKey>) -> Command {
    let deletes = keys.into_iter().map(|key| Delete { key, expected: None }).collect();
    Command::Change { puts: Vec::new(), deletes }
}

/// A state, its snapshots, and a clock that a test moves.
#[derive(Default)]
pub(crate) struct Mesh {
    pub(crate) state: State,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) seconds: i64,
}

impl Mesh {
    pub(crate) fn apply(&mut self, commands: Vec<Command>) -> (Changes, Outcome) {
        let batch = Batch { time_ms: self.seconds * 1000 + 7, author: "test".to_owned(), commands };
        self.seconds += 1;
        let revision = Revision(self.state.revision().0 + 1);
        let (changes, outcome) = self.state.apply(revision, &batch);
        self.snapshot = Arc::new(Snapshot::next(&self.snapshot, &self.state, &changes));
        (changes, outcome)
    }

    /// One object per entry, each a second younger than the one before.
    pub(crate) fn with(mut self, objects: Vec<Object>) -> Self {
        for object in objects {
            self.apply(vec![put(vec![object])]);
        }
        self
    }

    pub(crate) fn and(mut self, command: Command) -> Self {
        self.apply(vec![command]);
        self
    }
}

const NAMESPACES: [&str; 3] = ["a", "b", "istio-system"];
const HOSTS: [&str; 5] =
    ["x.a.svc.cluster.local", "y.b.svc.cluster.local", "api.example.com", "*.example.com", "Z"];

fn pick<'a>(of: &[&'a str], at: u8) -> &'a str {
    of[usize::from(at) % of.len()]
}

fn export_to(at: u8) -> Value {
    match at % 5 {
        0 => json!(["."]),
        1 => json!(["a"]),
        2 => json!(["~"]),
        _ => json!([]),
    }
}

fn workload_labels(at: u8) -> Value {
    json!({"app": pick(&["p", "q"], at), "version": pick(&["v1", "v2"], at / 2)})
}

fn random_object(r: [u8; 6]) -> Object {
    let namespace = pick(&NAMESPACES, r[1]);
    let name = pick(&["n0", "n1", "n2"], r[2]);
    let host = pick(&HOSTS, r[3]);
    let selector = || json!({"matchLabels": {"app": pick(&["p", "q"], r[4])}});
    let (kind, spec) = match r[0] % 11 {
        0 | 1 => {
            let mut spec = json!({
                "hosts": [host, pick(&HOSTS, r[4])],
                "ports": [{"number": 80 + u16::from(r[5] % 2), "name": "http", "protocol": "HTTP"}],
                "resolution": pick(&["STATIC", "DNS", "NONE"], r[5]),
                "location": pick(&["MESH_INTERNAL", "MESH_EXTERNAL"], r[5] / 4),
                "exportTo": export_to(r[5] / 8),
            });
            if r[4].is_multiple_of(2) {
                spec["workloadSelector"] = json!({"labels": {"app": pick(&["p", "q"], r[5])}});
            } else {
                spec["endpoints"] = json!([{"address": format!("10.0.0.{}", r[4]), "serviceAccount": "sa"}]);
            }
            (Kind::ServiceEntry, spec)
        }
        2 => (
            Kind::WorkloadEntry,
            json!({"address": format!("10.1.0.{}", r[3] % 8), "labels": workload_labels(r[4]), "serviceAccount": "s"}),
        ),
        3 => (
            Kind::VirtualService,
            match r[4] % 3 {
                0 => json!({"http": [{"route": [{"destination": {"host": "d"}}], "timeout": "1s"}]}),
                1 => json!({"hosts": [host], "exportTo": export_to(r[5]), "http": [
                    {"match": [{"uri": {"prefix": "/p"}}],
                     "delegate": {"name": pick(&["n0", "n1", "n2"], r[5]), "namespace": pick(&NAMESPACES, r[5] / 3)}},
                    {"route": [{"destination": {"host": host}}]}]}),
                _ => json!({"hosts": [host], "exportTo": export_to(r[5]), "gateways": ["mesh", "gw"],
                    "http": [{"route": [{"destination": {"host": pick(&HOSTS, r[5])}}]}]}),
            },
        ),
        4 => (
            Kind::DestinationRule,
            json!({"host": host, "exportTo": export_to(r[4]),
                "subsets": [{"name": pick(&["v1", "v2"], r[5]), "labels": {"version": pick(&["v1", "v2"], r[5])}}]}),
        ),
        5 => {
            (Kind::PeerAuthentication, json!({"mtls": {"mode": pick(&["STRICT", "DISABLE", "UNSET"], r[3])}}))
        }
        6 => (
            Kind::PeerAuthentication,
            json!({"selector": selector(), "portLevelMtls": {"80": {"mode": pick(&["STRICT", "UNSET"], r[3])}}}),
        ),
        7 => (
            Kind::AuthorizationPolicy,
            json!({"selector": selector(), "action": pick(&["ALLOW", "DENY"], r[3])}),
        ),
        8 => (Kind::Sidecar, json!({"egress": [{"hosts": [format!("{}/*", pick(&["*", ".", "a"], r[3]))]}]})),
        9 => (
            Kind::Sidecar,
            json!({"workloadSelector": {"labels": {"app": "p"}},
                "egress": [{"hosts": ["./*"], "port": {"number": 80, "protocol": "HTTP", "name": "h"}}]}),
        ),
        _ => (
            Kind::MeshConfig,
            json!({"trustDomain": pick(&["td", "cluster.local"], r[3]), "defaultServiceExportTo": export_to(r[4])}),
        ),
    };
    Object::new(kind, namespace, name, spec)
}

fn random_source(at: u8) -> SourceId {
    match at % 4 {
        0 => SourceId::Kubernetes("k1".to_owned()),
        1 => SourceId::Kubernetes("k2".to_owned()),
        2 => SourceId::Consul("c/dc1".to_owned()),
        _ => SourceId::File("f".to_owned()),
    }
}

fn random_command(r: [u8; 6]) -> Command {
    let host = pick(&HOSTS, r[2]).to_owned();
    let source = random_source(r[3]);
    let id = format!("{}/{}", pick(&NAMESPACES, r[2]), pick(&["n0", "w1"], r[3]));
    let session = pick(&["s1", "s2"], r[4]).to_owned();
    let rest = [r[1], r[2], r[3], r[4], r[5], r[0]];
    match r[0] % 16 {
        0..=6 => put(vec![random_object(rest)]),
        7 => put(vec![random_object(rest), random_object([r[5], r[4], r[3], r[2], r[1], r[0]])]),
        8 => {
            let object = random_object(rest);
            delete(vec![ObjectKey { kind: object.kind, namespace: object.namespace, name: object.name }])
        }
        9 => Command::PutService {
            service: Arc::new(Service {
                export_to: if r[5].is_multiple_of(3) { vec![".".to_owned()] } else { Vec::new() },
                ..service(&host, pick(&NAMESPACES, r[4]), source)
            }),
        },
        10 => Command::RemoveService { host, source },
        11 => {
            let addresses = (0..r[4] % 4).map(|i| format!("10.2.{}.{i}", r[5] % 3));
            let endpoints = addresses.map(|a| endpoint(&a)).collect();
            Command::ReplaceEndpoints { host, source, endpoints }
        }
        12 => {
            let text = format!("app={}", pick(&["p", "q"], r[5]));
            let address = format!("10.1.0.{}", r[5] % 8);
            Command::RegisterWorkload { registration: Arc::new(registration(&id, &address, &text, &session)) }
        }
        13 => Command::WorkloadHealth {
            key: workload_key(&id),
            session,
            healthy: r[5].is_multiple_of(2),
            reason: pick(&["", "status 503"], r[5]).to_owned(),
        },
        14 if r[5].is_multiple_of(2) => {
            let all = [Presence::Heard, Presence::Silent, Presence::Unknown, Presence::Released];
            let presence = all.get(usize::from(r[5] / 2 % 4)).copied().unwrap_or_default();
            Command::WorkloadPresence { key: workload_key(&id), session, presence }
        }
        14 => Command::RemoveWorkload { key: workload_key(&id), session },
        _ if r[1].is_multiple_of(4) => Command::SetHistoryLimit { entries: u32::from(r[2] % 8) },
        _ if r[1] % 4 == 1 => {
            Command::SetHistoryRetention { entries: u32::from(r[2] % 16), age_ms: u64::from(r[3]) * 20 }
        }
        _ => Command::PutMesh { config: json!({"trustDomain": pick(&["m1", "m2"], r[2]), "x": 0.1}) },
    }
}

/// Log entries of a few commands each over a small world, so that they meet.
pub(crate) fn batches(most: usize) -> impl Strategy<Value = Vec<Batch>> {
    let batch =
        (proptest::collection::vec(any::<[u8; 6]>(), 1..4), 0i64..5000).prop_map(|(commands, time)| Batch {
            time_ms: time,
            author: "someone".to_owned(),
            commands: commands.into_iter().map(random_command).collect(),
        });
    proptest::collection::vec(batch, 0..most)
}

/// Everything that a reader can ask, as text.
pub(crate) fn dump(snapshot: &Snapshot) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let mut line = |what: String, value: &dyn std::fmt::Debug| writeln!(out, "{what}: {value:?}").unwrap();
    line("mesh".into(), snapshot.mesh());
    line("settings".into(), snapshot.settings());
    line("objects".into(), &snapshot.objects().map(|o| o.to_json()).collect::<Vec<_>>());
    line("history".into(), snapshot.history());
    line("services".into(), &snapshot.services().collect::<Vec<_>>());
    line("workloads".into(), &snapshot.workloads().collect::<Vec<_>>());
    line("conflicts".into(), &snapshot.conflicts().collect::<Vec<_>>());
    for host in HOSTS.iter().map(|host| host.to_ascii_lowercase()) {
        line(format!("candidates {host}"), &snapshot.candidates(&host));
    }
    for last in 0..8u8 {
        let address = std::net::IpAddr::from([10, 1, 0, last]);
        line(format!("at {address}"), &snapshot.workload_by_address(address));
    }
    for namespace in NAMESPACES {
        line(format!("visible {namespace}"), &snapshot.visible_services(namespace));
        line(format!("routes {namespace}"), &snapshot.virtual_services_for(namespace, "mesh"));
        for text in ["", "app=p,version=v1", "app=q"] {
            let own = labels(text);
            line(format!("services for {namespace} {text}"), &snapshot.services_for(namespace, &own));
            line(format!("sidecar {namespace} {text}"), &snapshot.sidecar_for(namespace, &own));
            line(
                format!("in scope {namespace} {text}"),
                &snapshot.virtual_services_in_scope(namespace, &own),
            );
            line(format!("peer {namespace} {text}"), &snapshot.peer_authentication(namespace, &own));
            line(format!("authz {namespace} {text}"), &snapshot.authorization_policies(namespace, &own));
            let addresses: Vec<_> = (0..8u8).map(|last| std::net::IpAddr::from([10, 1, 0, last])).collect();
            line(format!("inbound {namespace}"), &snapshot.inbound_services(namespace, &addresses, &own));
            for host in HOSTS.iter().map(|host| host.to_ascii_lowercase()) {
                line(format!("rule {namespace} {host}"), &snapshot.destination_rule(namespace, &own, &host));
            }
        }
    }
    out
}
