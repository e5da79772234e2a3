//! Istio's standard metrics: their names, their labels, and who the two ends of an exchange are.
//!
//! The labels of an exchange come from few things: our own workload, the peer's, the service, the outcome. Each has
//! a number of its own on the worker, so that the series of a request is found by comparing a handful of numbers.

use std::cell::{Cell, RefCell};
use std::hash::Hash;
use std::rc::Rc;

use ahash::AHashMap;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use envoy_types::pb::google::protobuf::{Struct, Value, value};
use http::HeaderValue;
use prost::Message as _;
use serde_json::{Map, Value as Json};

use super::{Counter, Histogram, Registry};
use crate::http::flags::Flags;

const UNKNOWN: &str = "unknown";
/// Most label sets remembered by number; beyond it the memory starts anew, the series themselves stay.
const MAX_REMEMBERED: usize = 50_000;
/// Most parties known by value; beyond it they get numbers anew.
const MAX_INTERNED: usize = 10_000;

/// Who stands at one end of an exchange.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Workload {
    /// Workload name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Label `app`.
    pub app: String,
    /// Label `version`.
    pub version: String,
    /// Canonical service.
    pub canonical_service: String,
    /// Canonical revision.
    pub canonical_revision: String,
    /// The cluster (in the sense of a fleet) it is in.
    pub cluster: String,
}

impl Default for Workload {
    fn default() -> Self {
        let unknown = || UNKNOWN.to_owned();
        Self {
            name: unknown(),
            namespace: unknown(),
            app: unknown(),
            version: unknown(),
            canonical_service: unknown(),
            canonical_revision: "latest".to_owned(),
            cluster: unknown(),
        }
    }
}

fn or_unknown(text: Option<&str>) -> String {
    text.filter(|t| !t.is_empty()).unwrap_or(UNKNOWN).to_owned()
}

impl Workload {
    /// From a node's metadata, or from what a peer sends of its own.
    #[must_use]
    pub fn from_metadata(metadata: &Map<String, Json>) -> Self {
        let text = |key: &str| metadata.get(key).and_then(Json::as_str);
        let labels = metadata.get("LABELS").and_then(Json::as_object);
        let label = |key: &str| labels.and_then(|l| l.get(key)).and_then(Json::as_str);
        let name = text("WORKLOAD_NAME").or(text("NAME"));
        let app = label("app").or(label("app.kubernetes.io/name"));
        let version = label("version").or(label("app.kubernetes.io/version"));
        let revision = label("service.istio.io/canonical-revision").or(version).unwrap_or("latest");
        Self {
            name: or_unknown(name),
            namespace: or_unknown(text("NAMESPACE")),
            app: or_unknown(app),
            version: or_unknown(version),
            canonical_service: or_unknown(label("service.istio.io/canonical-name").or(app).or(name)),
            canonical_revision: revision.to_owned(),
            cluster: or_unknown(text("CLUSTER_ID")),
        }
    }

    /// From an endpoint's metadata: `workload;namespace;canonical name;canonical revision;cluster`.
    #[must_use]
    pub fn from_endpoint(text: &str) -> Self {
        let mut fields = text.split(';');
        let mut next = || or_unknown(fields.next());
        let (name, namespace, service, revision, cluster) = (next(), next(), next(), next(), next());
        Self {
            name,
            namespace,
            app: service.clone(),
            version: revision.clone(),
            canonical_service: service,
            canonical_revision: revision,
            cluster,
        }
    }

    /// From the header in which a peer tells who it is; `None` when it is not readable.
    #[must_use]
    pub fn from_header(value: &HeaderValue) -> Option<Self> {
        let bytes = BASE64_STANDARD.decode(value.as_bytes()).ok()?;
        let metadata = Struct::decode(bytes.as_slice()).ok()?;
        Some(Self::from_metadata(&crate::xds::decode::json(metadata)))
    }
}

/// The header in which a node with this metadata tells its peers who it is.
#[must_use]
pub fn peer_header(metadata: &Map<String, Json>) -> Option<HeaderValue> {
    let keys = ["NAME", "NAMESPACE", "WORKLOAD_NAME", "LABELS", "CLUSTER_ID"];
    let told: Map<String, Json> =
        keys.iter().filter_map(|k| Some(((*k).to_owned(), metadata.get(*k)?.clone()))).collect();
    if told.is_empty() {
        return None;
    }
    HeaderValue::try_from(BASE64_STANDARD.encode(to_struct(&told).encode_to_vec())).ok()
}

fn to_struct(map: &Map<String, Json>) -> Struct {
    Struct { fields: map.iter().map(|(k, v)| (k.clone(), Value { kind: Some(to_kind(v)) })).collect() }
}

fn to_kind(json: &Json) -> value::Kind {
    match json {
        Json::Null | Json::Array(_) => value::Kind::NullValue(0),
        Json::Bool(b) => value::Kind::BoolValue(*b),
        Json::Number(n) => value::Kind::NumberValue(n.as_f64().unwrap_or_default()),
        Json::String(s) => value::Kind::StringValue(s.clone()),
        Json::Object(o) => value::Kind::StructValue(to_struct(o)),
    }
}

/// Which side reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's proxy.
    Source,
    /// The server's proxy.
    Destination,
}

/// A party of an exchange with a number that stands for its labels.
#[derive(Debug)]
pub struct Numbered<T> {
    number: u32,
    /// The party.
    pub value: T,
}

/// The service that was called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Host name.
    pub host: String,
    /// Short name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
}

/// What identifies the series of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestKey {
    /// Who reports.
    pub reporter: Reporter,
    /// The other workload.
    pub peer: u32,
    /// The called service.
    pub service: u32,
    /// The identities of both ends.
    pub principals: u32,
    /// HTTP status, 0 when there was none.
    pub status: u16,
    /// Response flags.
    pub flags: Flags,
    /// gRPC status, when it is a gRPC call and there is one.
    pub grpc: Option<u16>,
    /// Whether the call is gRPC.
    pub is_grpc: bool,
    /// Whether this side saw mutual TLS.
    pub mutual_tls: bool,
}

/// The identities of both ends, as they were verified.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Principals {
    /// Of the client.
    pub source: Option<String>,
    /// Of the server.
    pub destination: Option<String>,
}

/// The series of one label set of requests.
#[derive(Debug)]
pub struct RequestSeries {
    /// `istio_requests_total`
    pub requests: Rc<Counter>,
    /// `istio_request_duration_milliseconds`
    pub duration: Rc<Histogram>,
    /// `istio_request_bytes`
    pub request_bytes: Rc<Histogram>,
    /// `istio_response_bytes`
    pub response_bytes: Rc<Histogram>,
}

/// What identifies the series of a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct TcpKey {
    reporter: Reporter,
    peer: u32,
    service: u32,
    principals: u32,
    flags: Flags,
    mutual_tls: bool,
}

/// The series of one label set of TCP connections.
#[derive(Debug)]
pub struct TcpSeries {
    /// `istio_tcp_connections_opened_total`
    pub opened: Rc<Counter>,
    /// `istio_tcp_connections_closed_total`
    pub closed: Rc<Counter>,
    /// `istio_tcp_sent_bytes_total`
    pub sent: Rc<Counter>,
    /// `istio_tcp_received_bytes_total`
    pub received: Rc<Counter>,
}

/// The standard metrics of one worker.
#[derive(Debug)]
pub struct Standard {
    registry: Rc<Registry>,
    own: Workload,
    next_number: Cell<u32>,
    workloads: RefCell<AHashMap<Workload, Rc<Numbered<Workload>>>>,
    principals: RefCell<AHashMap<Principals, Rc<Numbered<Principals>>>>,
    remembered: RefCell<AHashMap<RequestKey, Rc<RequestSeries>>>,
    remembered_tcp: RefCell<AHashMap<TcpKey, Rc<TcpSeries>>>,
}

/// Both ends, the service and the outcome, resolved to text.
#[derive(Clone, Copy, Debug)]
pub struct Parties<'a> {
    /// The other workload.
    pub peer: &'a Numbered<Workload>,
    /// The called service.
    pub service: &'a Numbered<Service>,
    /// The identities of both ends.
    pub principals: &'a Numbered<Principals>,
}

impl Standard {
    /// For a node with this metadata.
    #[must_use]
    pub fn new(registry: Rc<Registry>, metadata: &Map<String, Json>) -> Self {
        let own = Workload::from_metadata(metadata);
        Self {
            registry,
            own,
            next_number: Cell::new(0),
            workloads: RefCell::default(),
            principals: RefCell::default(),
            remembered: RefCell::default(),
            remembered_tcp: RefCell::default(),
        }
    }

    /// The number of a workload: the same one for the same workload, whatever connection it comes on.
    pub fn workload(&self, value: Workload) -> Rc<Numbered<Workload>> {
        self.intern(&self.workloads, value)
    }

    /// The number of a pair of identities.
    pub fn principals(&self, value: Principals) -> Rc<Numbered<Principals>> {
        self.intern(&self.principals, value)
    }

    fn intern<T: Clone + Eq + Hash>(
        &self,
        known: &RefCell<AHashMap<T, Rc<Numbered<T>>>>,
        value: T,
    ) -> Rc<Numbered<T>> {
        let mut known = known.borrow_mut();
        if let Some(numbered) = known.get(&value) {
            return Rc::clone(numbered);
        }
        if known.len() >= MAX_INTERNED {
            known.clear();
        }
        let numbered = self.number(value.clone());
        known.insert(value, Rc::clone(&numbered));
        numbered
    }

    /// Gives a party its number.
    pub fn number<T>(&self, value: T) -> Rc<Numbered<T>> {
        let number = self.next_number.get();
        self.next_number.set(number.wrapping_add(1));
        Rc::new(Numbered { number, value })
    }

    /// The series of a request.
    pub fn request(&self, mut key: RequestKey, parties: Parties<'_>) -> Rc<RequestSeries> {
        key.peer = parties.peer.number;
        key.service = parties.service.number;
        key.principals = parties.principals.number;
        remember(&self.remembered, key, || self.resolve(key, parties))
    }

    fn resolve(&self, key: RequestKey, parties: Parties<'_>) -> RequestSeries {
        let status = key.status.to_string();
        let grpc = key.grpc.map(|g| g.to_string()).unwrap_or_default();
        let flags = key.flags.text();
        let mut labels = self.labels(key.reporter, parties, key.mutual_tls, &flags);
        labels.push(("request_protocol", if key.is_grpc { "grpc" } else { "http" }));
        labels.push(("response_code", &status));
        labels.push(("grpc_response_status", &grpc));
        RequestSeries {
            requests: self.registry.counter("istio_requests_total", &labels),
            duration: self.registry.histogram("istio_request_duration_milliseconds", &labels),
            request_bytes: self.registry.histogram("istio_request_bytes", &labels),
            response_bytes: self.registry.histogram("istio_response_bytes", &labels),
        }
    }

    /// The series of a TCP connection.
    pub fn tcp(
        &self,
        reporter: Reporter,
        parties: Parties<'_>,
        mutual_tls: bool,
        flags: Flags,
    ) -> Rc<TcpSeries> {
        let Parties { peer, service, principals } = parties;
        let (peer, service, principals) = (peer.number, service.number, principals.number);
        let key = TcpKey { reporter, peer, service, principals, flags, mutual_tls };
        remember(&self.remembered_tcp, key, || self.resolve_tcp(key, parties))
    }

    fn resolve_tcp(&self, key: TcpKey, parties: Parties<'_>) -> TcpSeries {
        let TcpKey { reporter, flags, mutual_tls, .. } = key;
        let flags = flags.text();
        let mut labels = self.labels(reporter, parties, mutual_tls, &flags);
        labels.push(("request_protocol", "tcp"));
        TcpSeries {
            opened: self.registry.counter("istio_tcp_connections_opened_total", &labels),
            closed: self.registry.counter("istio_tcp_connections_closed_total", &labels),
            sent: self.registry.counter("istio_tcp_sent_bytes_total", &labels),
            received: self.registry.counter("istio_tcp_received_bytes_total", &labels),
        }
    }

    fn labels<'a>(
        &'a self,
        reporter: Reporter,
        parties: Parties<'a>,
        mutual_tls: bool,
        flags: &'a str,
    ) -> Vec<(&'static str, &'a str)> {
        let (source, destination, name) = match reporter {
            Reporter::Source => (&self.own, &parties.peer.value, "source"),
            Reporter::Destination => (&parties.peer.value, &self.own, "destination"),
        };
        let service = &parties.service.value;
        let text = |t: &'a str| if t.is_empty() { UNKNOWN } else { t };
        let principal = |p: &'a Option<String>| p.as_deref().unwrap_or(UNKNOWN);
        let security = match reporter {
            Reporter::Destination if mutual_tls => "mutual_tls",
            Reporter::Destination => "none",
            Reporter::Source => UNKNOWN,
        };
        vec![
            ("reporter", name),
            ("source_workload", &source.name),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.canonical_revision),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", principal(&parties.principals.value.source)),
            ("source_app", &source.app),
            ("source_version", &source.version),
            ("source_cluster", &source.cluster),
            ("destination_workload", &destination.name),
            ("destination_workload_namespace", &destination.namespace),
            ("destination_principal", principal(&parties.principals.value.destination)),
            ("destination_app", &destination.app),
            ("destination_version", &destination.version),
            ("destination_service", text(&service.host)),
            ("destination_canonical_service", &destination.canonical_service),
            ("destination_canonical_revision", &destination.canonical_revision),
            ("destination_service_name", text(&service.name)),
            ("destination_service_namespace", text(&service.namespace)),
            ("destination_cluster", &destination.cluster),
            ("response_flags", flags),
            ("connection_security_policy", security),
        ]
    }
}

fn remember<K: Hash + Eq, S>(known: &RefCell<AHashMap<K, Rc<S>>>, key: K, make: impl FnOnce() -> S) -> Rc<S> {
    if let Some(series) = known.borrow().get(&key) {
        return Rc::clone(series);
    }
    let series = Rc::new(make());
    let mut known = known.borrow_mut();
    if known.len() >= MAX_REMEMBERED {
        known.clear();
    }
    known.insert(key, Rc::clone(&series));
    series
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata() -> Map<String, Json> {
        let json = serde_json::json!({
            "NAME": "reviews-v1-abc", "NAMESPACE": "shop", "WORKLOAD_NAME": "reviews-v1", "CLUSTER_ID": "default",
            "LABELS": {"app": "reviews", "version": "v1"}, "OTHER": 1
        });
        json.as_object().unwrap().clone()
    }

    #[test]
    fn a_peer_tells_who_it_is_in_a_header() {
        let header = peer_header(&metadata()).unwrap();
        let peer = Workload::from_header(&header).unwrap();
        assert_eq!(peer, Workload::from_metadata(&metadata()));
        assert_eq!((peer.name.as_str(), peer.canonical_service.as_str()), ("reviews-v1", "reviews"));
        assert_eq!((peer.canonical_revision.as_str(), peer.cluster.as_str()), ("v1", "default"));
        assert_eq!(Workload::from_header(&HeaderValue::from_static("%%%")), None);
    }

    #[test]
    fn endpoints_tell_who_they_are_in_five_fields() {
        let workload = Workload::from_endpoint("ratings-v1;default;ratings;v1;east");
        assert_eq!((workload.name.as_str(), workload.cluster.as_str()), ("ratings-v1", "east"));
        assert_eq!(Workload::from_endpoint("").name, "unknown");
    }

    #[test]
    fn the_same_peer_has_the_same_number_on_every_connection() {
        let standard = Standard::new(Rc::default(), &metadata());
        let peer = || standard.workload(Workload::from_endpoint("ratings-v1;default;ratings;v1;east"));
        assert!(Rc::ptr_eq(&peer(), &peer()));
        let who = |id: &str| standard.principals(Principals { source: Some(id.into()), destination: None });
        assert!(Rc::ptr_eq(&who("a"), &who("a")) && !Rc::ptr_eq(&who("a"), &who("b")));
    }

    #[test]
    fn requests_carry_all_labels() {
        let registry = Rc::new(Registry::default());
        let standard = Standard::new(Rc::clone(&registry), &metadata());
        let peer = standard.number(Workload::from_endpoint("ratings-v1;default;ratings;v1;east"));
        let service = standard.number(Service { host: "ratings.default".into(), ..Service::default() });
        let principals = standard.number(Principals::default());
        let parties = Parties { peer: &peer, service: &service, principals: &principals };
        let key = RequestKey {
            reporter: Reporter::Source,
            peer: 0,
            service: 0,
            principals: 0,
            status: 200,
            flags: Flags::NONE,
            grpc: None,
            is_grpc: false,
            mutual_tls: true,
        };
        standard.request(key, parties).requests.inc();
        standard.request(key, parties).requests.inc();
        let snapshot = registry.snapshot();
        let having = [
            "reporter=\"source\"",
            "source_workload=\"reviews-v1\"",
            "destination_workload=\"ratings-v1\"",
            "destination_service=\"ratings.default\"",
            "destination_service_name=\"unknown\"",
            "response_code=\"200\"",
            "response_flags=\"-\"",
            "request_protocol=\"http\"",
            "connection_security_policy=\"unknown\"",
        ];
        assert_eq!(snapshot.sum("istio_requests_total", &having), 2);
    }
}
