//! A delta client that behaves as a proxy does: it asks for the endpoints of its clusters and the routes of its
//! listeners, and accepts what it is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_types::pb::google::rpc;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use xds::resources::Type;

use crate::control::Versions;

pub(crate) fn node(number: u32, native: bool) -> Node {
    let kind = if native { "istio-proxy" } else { "" };
    let node = json!({
        "id": format!("sidecar~10.0.0.{number}~app-{number}.default~default.svc.cluster.local"),
        "metadata": {
            "NAMESPACE": "default", "SERVICE_ACCOUNT": "default", "LABELS": {"app": format!("app-{number}")},
            "PROXY_KIND": kind,
        },
    });
    wire::json::message_from_json(&node).unwrap()
}

#[derive(Debug, Default)]
struct State {
    has: BTreeMap<Type, BTreeMap<String, (u64, BTreeSet<String>)>>,
    asked: BTreeMap<Type, BTreeSet<String>>,
    counts: BTreeMap<Type, usize>,
    reject: Option<(String, Type)>,
}

/// What the client has.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    number: u32,
    native: bool,
    state: Arc<Mutex<State>>,
}

impl Held {
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn native(&self) -> bool {
        self.native
    }

    /// Responses so far, by type.
    pub(crate) fn counts(&self) -> BTreeMap<Type, usize> {
        self.state.lock().unwrap().counts.clone()
    }

    pub(crate) fn forget_counts(&self) {
        self.state.lock().unwrap().counts.clear();
    }

    /// Rejects the next responses of a type with these words.
    pub(crate) fn reject(&self, words: &str, t: Type) {
        self.state.lock().unwrap().reject = Some((words.to_owned(), t));
    }

    pub(crate) fn versions(&self) -> Versions {
        let state = self.state.lock().unwrap();
        let all = state.has.iter();
        all.flat_map(|(t, map)| map.iter().map(|(name, (version, _))| ((*t, name.clone()), *version)))
            .collect()
    }

    /// Takes a response; says what to answer.
    fn take(&self, response: &DeltaDiscoveryResponse) -> Vec<DeltaDiscoveryRequest> {
        let mut state = self.state.lock().unwrap();
        let t = Type::from_url(&response.type_url).unwrap();
        *state.counts.entry(t).or_default() += 1;
        let mut answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        if let Some((words, _)) = state.reject.as_ref().filter(|(_, rejected)| *rejected == t) {
            let message = words.clone();
            answer.error_detail = Some(rpc::Status { code: 3, message, details: Vec::new() });
            return vec![answer];
        }
        let has = state.has.entry(t).or_default();
        for resource in &response.resources {
            let version = u64::from_str_radix(&resource.version, 16).unwrap();
            let names = names_in(t, &wire::json::any_to_json(resource.resource.as_ref().unwrap()).unwrap());
            has.insert(resource.name.clone(), (version, names));
        }
        for name in &response.removed_resources {
            has.remove(name);
        }
        let child = match t {
            Type::Cluster => Type::Endpoint,
            Type::Listener => Type::Route,
            Type::Endpoint | Type::Route => return vec![answer],
        };
        let wanted: BTreeSet<String> = has.values().flat_map(|(_, names)| names.iter().cloned()).collect();
        let before = std::mem::replace(state.asked.entry(child).or_default(), wanted.clone());
        if before == wanted {
            return vec![answer];
        }
        state.has.entry(child).or_default().retain(|name, _| wanted.contains(name));
        let follow = DeltaDiscoveryRequest {
            type_url: child.url().to_owned(),
            resource_names_subscribe: wanted.difference(&before).cloned().collect(),
            resource_names_unsubscribe: before.difference(&wanted).cloned().collect(),
            ..DeltaDiscoveryRequest::default()
        };
        vec![answer, follow]
    }
}

/// The resources that this one makes a client ask for.
fn names_in(t: Type, resource: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    match t {
        Type::Cluster if resource.get("type").and_then(Value::as_str) == Some("EDS") => {
            names.extend(resource.get("name").and_then(Value::as_str).map(str::to_owned));
        }
        Type::Listener => find(resource, "route_config_name", &mut names),
        Type::Cluster | Type::Endpoint | Type::Route => {}
    }
    names
}

fn find(value: &Value, key: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get(key).and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|value| find(value, key, found));
        }
        Value::Array(values) => values.iter().for_each(|value| find(value, key, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Connects; the future is the client's life.
pub(crate) async fn connect(
    address: &str,
    number: u32,
    native: bool,
) -> (Held, impl Future<Output = ()> + use<>) {
    let (requests, outgoing) = mpsc::channel(64);
    for t in [Type::Cluster, Type::Listener] {
        let first = DeltaDiscoveryRequest {
            node: Some(node(number, native)),
            type_url: t.url().to_owned(),
            ..DeltaDiscoveryRequest::default()
        };
        requests.send(first).await.unwrap();
    }
    let mut service = AggregatedDiscoveryServiceClient::connect(address.to_owned()).await.unwrap();
    let responses =
        service.delta_aggregated_resources(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let held = Held { number, native, state: Arc::default() };
    (held.clone(), live(held, requests, responses))
}

async fn live(
    held: Held,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    mut responses: Streaming<DeltaDiscoveryResponse>,
) {
    while let Ok(Some(response)) = responses.message().await {
        for request in held.take(&response) {
            if requests.send(request).await.is_err() {
                return;
            }
        }
    }
}
