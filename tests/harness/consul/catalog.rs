//! A Consul catalog without IO: what a request changes, and what it answers or waits for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Map, Value, json};

/// A request as a server reads it.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET` or `PUT`.
    pub method: String,
    /// The path, without its query.
    pub path: String,
    /// The query.
    pub query: BTreeMap<String, String>,
    /// The ACL token; empty for none.
    pub token: String,
    /// What is put.
    pub body: Vec<u8>,
}

impl Request {
    /// `GET` of a path with its query.
    pub fn get(target: &str) -> Self {
        Self::new("GET", target, "", Vec::new())
    }

    /// A request of any kind.
    pub fn new(method: &str, target: &str, token: &str, body: Vec<u8>) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let query = pairs.map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key.to_owned(), unescape(value))
        });
        Self {
            method: method.to_owned(),
            path: unescape(path),
            query: query.collect(),
            token: token.to_owned(),
            body,
        }
    }

    fn flag(&self, name: &str) -> bool {
        self.query.contains_key(name)
    }

    /// The index that is waited for to be passed; none when the answer is to come at once.
    pub fn index(&self) -> Option<u64> {
        self.query.get("index")?.parse().ok().filter(|index| *index > 0)
    }

    /// How long an answer may be waited for, with the jitter that a server adds at most.
    pub fn wait(&self) -> Duration {
        let told = self.query.get("wait").and_then(|text| span(text)).unwrap_or(Duration::from_secs(300));
        let told = told.min(Duration::from_secs(600));
        told + told / 16
    }
}

fn span(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_secs(60 * number)),
        _ => None,
    }
}

fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// An answer of a server.
#[derive(Debug, Clone, Default)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Headers, by their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// What is answered.
    pub body: Vec<u8>,
}

impl Response {
    /// A refusal with its reason.
    pub fn error(status: u16, text: &str) -> Self {
        Self { status, headers: BTreeMap::new(), body: text.as_bytes().to_vec() }
    }

    /// Sets a header, or removes it.
    pub fn with(mut self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.headers.insert(name.to_owned(), value.to_owned()),
            None => self.headers.remove(name),
        };
        self
    }
}

/// What a question is about.
enum Subject<'a> {
    Services,
    Datacenters,
    Leader,
    Health(&'a str),
    Node(&'a str),
}

#[derive(Debug, Clone)]
struct Node {
    address: String,
    meta: Value,
    index: u64,
}

#[derive(Debug, Clone)]
struct Service {
    name: String,
    value: Value,
    index: u64,
}

#[derive(Debug, Clone)]
struct Check {
    service_id: String,
    value: Value,
}

/// The catalog of one datacenter.
#[derive(Debug, Clone)]
pub struct Catalog {
    /// Name of the datacenter.
    pub datacenter: String,
    index: u64,
    nodes: BTreeMap<String, Node>,
    services: BTreeMap<(String, String), Service>,
    checks: BTreeMap<(String, String), Check>,
    /// Something has changed in the request that is being done.
    dirty: bool,
    /// Index of the last change of any service, and when the last of one went.
    any_service: u64,
    extinction: u64,
    by_name: BTreeMap<String, u64>,
    ids: BTreeMap<String, BTreeSet<(String, String)>>,
    /// Tokens that may do everything; everybody may when it is empty.
    pub tokens: BTreeSet<String>,
}

impl Catalog {
    /// The catalog of a server that knows only itself.
    pub fn new(datacenter: &str) -> Self {
        let mut catalog = Self {
            datacenter: datacenter.to_owned(),
            index: 1,
            nodes: BTreeMap::new(),
            services: BTreeMap::new(),
            checks: BTreeMap::new(),
            dirty: false,
            any_service: 1,
            extinction: 0,
            by_name: BTreeMap::new(),
            ids: BTreeMap::new(),
            tokens: BTreeSet::new(),
        };
        let own = json!({"Node": "server-1", "Address": "127.0.0.1", "Service": {"Service": "consul", "Port": 8300}});
        catalog.register(&own);
        catalog
    }

    /// What a request changes, if it is one that does.
    pub fn change(&mut self, request: &Request) -> Option<Response> {
        if request.method != "PUT" {
            return None;
        }
        if let Some(refused) = self.refused(request) {
            return Some(refused);
        }
        let Ok(body) = serde_json::from_slice::<Value>(&request.body) else {
            return Some(Response::error(400, "Request decode failed"));
        };
        let done = match request.path.as_str() {
            "/v1/catalog/register" => self.register(&body),
            "/v1/catalog/deregister" => self.deregister(&body),
            "/v1/txn" => return Some(self.transact(&body)),
            _ => return Some(Response::error(404, "")),
        };
        Some(if done {
            self.found(&json!(true), None)
        } else {
            Response::error(400, "Must provide node and address")
        })
    }

    /// The answer to a question as things stand, and the index of what it is about.
    pub fn read(&self, request: &Request) -> (Response, u64) {
        let (subject, index) = match self.subject(request) {
            Ok(found) => found,
            Err(refused) => return (refused, u64::MAX),
        };
        let body = match subject {
            Subject::Services => self.list(),
            Subject::Datacenters => json!([self.datacenter]),
            Subject::Leader => json!("127.0.0.1:8300"),
            Subject::Health(name) => self.health(name, request.flag("passing")),
            Subject::Node(name) => self.node(name),
        };
        (self.found(&body, Some(index)), index)
    }

    /// The index of what a question is about; the largest when its answer does not wait.
    pub fn index_of(&self, request: &Request) -> u64 {
        self.subject(request).map_or(u64::MAX, |(_, index)| index)
    }

    fn subject<'a>(&self, request: &'a Request) -> Result<(Subject<'a>, u64), Response> {
        if request.flag("stale") && request.flag("consistent") {
            let told = "Cannot specify ?stale with ?consistent, conflicting semantics.";
            return Err(Response::error(400, told));
        }
        if let Some(refused) = self.refused(request) {
            return Err(refused);
        }
        if request.query.get("dc").is_some_and(|dc| *dc != self.datacenter) {
            return Err(Response::error(500, "No path to datacenter"));
        }
        match request.path.strip_prefix("/v1/") {
            Some("catalog/services") => Ok((Subject::Services, self.any_service)),
            Some("catalog/datacenters") => Ok((Subject::Datacenters, self.index)),
            Some("status/leader") => Ok((Subject::Leader, self.index)),
            Some(path) if path.starts_with("health/service/") => {
                let name = path.trim_start_matches("health/service/");
                let index = self.by_name.get(name).copied().unwrap_or(self.extinction).max(1);
                Ok((Subject::Health(name), index))
            }
            Some(path) if path.starts_with("catalog/node-services/") || path.starts_with("catalog/node/") => {
                Ok((Subject::Node(path.rsplit('/').next().unwrap_or_default()), self.index))
            }
            _ => Err(Response::error(404, "")),
        }
    }

    fn refused(&self, request: &Request) -> Option<Response> {
        if self.tokens.is_empty() || self.tokens.contains(&request.token) {
            return None;
        }
        let reason = if request.token.is_empty() { "Permission denied" } else { "ACL not found" };
        Some(Response::error(403, reason))
    }

    fn found(&self, body: &Value, index: Option<u64>) -> Response {
        let mut response =
            Response { status: 200, headers: BTreeMap::new(), body: body.to_string().into_bytes() };
        if let Some(index) = index {
            let headers =
                [("index", index.to_string()), ("knownleader", "true".into()), ("lastcontact", "0".into())];
            for (name, value) in headers {
                response.headers.insert(format!("x-consul-{name}"), value);
            }
        }
        response
    }

    // ---- changes ------------------------------------------------------------------

    /// `PUT /v1/catalog/register`; what is the same changes no index.
    pub fn register(&mut self, body: &Value) -> bool {
        let (Some(name), Some(address)) = (text(body, "Node"), text(body, "Address")) else { return false };
        if name.is_empty() || address.is_empty() && !body["SkipNodeUpdate"].as_bool().unwrap_or(false) {
            return false;
        }
        let next = self.index + 1;
        let meta = body.get("NodeMeta").cloned().unwrap_or(json!({}));
        let known = self.nodes.get(&name).is_some_and(|node| {
            body["SkipNodeUpdate"].as_bool().unwrap_or(false) || node.address == address && node.meta == meta
        });
        let mut touched = BTreeSet::new();
        if !known {
            self.dirty = true;
            self.nodes.insert(name.clone(), Node { address, meta, index: next });
            touched.extend(self.names_on(&name));
        }
        if let Some(service) = body.get("Service").filter(|service| service.is_object()) {
            touched.extend(self.put_service(&name, service, next));
        }
        let checks = body.get("Checks").and_then(Value::as_array).cloned().unwrap_or_default();
        for check in checks.iter().chain(body.get("Check")).filter(|check| check.is_object()) {
            touched.extend(self.put_check(&name, check));
        }
        self.touch(touched, next);
        true
    }

    fn put_service(&mut self, node: &str, told: &Value, next: u64) -> Option<String> {
        let name = text(told, "Service").unwrap_or_default();
        let id = text(told, "ID").filter(|id| !id.is_empty()).unwrap_or_else(|| name.clone());
        let or =
            |key: &str, default: Value| told.get(key).filter(|v| !v.is_null()).cloned().unwrap_or(default);
        let mut value = json!({
            "Kind": or("Kind", json!("")), "ID": id, "Service": name, "Tags": or("Tags", json!([])),
            "Address": or("Address", json!("")), "Port": or("Port", json!(0)), "Meta": or("Meta", json!({})),
            "Weights": or("Weights", json!({"Passing": 1, "Warning": 1})), "EnableTagOverride": false,
        });
        for key in ["TaggedAddresses", "Connect", "Proxy", "Locality", "Ports"] {
            if let Some(given) = told.get(key) {
                value[key] = given.clone();
            }
        }
        let key = (node.to_owned(), id);
        if self.services.get(&key).is_some_and(|known| known.value == value && known.name == name) {
            return None;
        }
        self.ids.entry(name.clone()).or_default().insert(key.clone());
        self.services.insert(key, Service { name: name.clone(), value, index: next });
        Some(name)
    }

    fn put_check(&mut self, node: &str, told: &Value) -> Vec<String> {
        let name = text(told, "Name").unwrap_or_default();
        let id = text(told, "CheckID").filter(|id| !id.is_empty()).unwrap_or(name.clone());
        let service_id = text(told, "ServiceID").unwrap_or_default();
        let of =
            self.services.get(&(node.to_owned(), service_id.clone())).map(|service| service.name.clone());
        let value = json!({
            "Node": node, "CheckID": id, "Name": name, "Status": text(told, "Status").unwrap_or("critical".into()),
            "Notes": "", "Output": text(told, "Output").unwrap_or_default(), "ServiceID": service_id,
            "ServiceName": of.clone().unwrap_or_default(),
        });
        let key = (node.to_owned(), id);
        if self.checks.get(&key).is_some_and(|known| known.value == value) {
            return Vec::new();
        }
        self.dirty = true;
        self.checks.insert(key, Check { service_id, value });
        of.map_or_else(|| self.names_on(node), |name| vec![name])
    }

    /// `PUT /v1/catalog/deregister`.
    pub fn deregister(&mut self, body: &Value) -> bool {
        let Some(node) = text(body, "Node") else { return false };
        let next = self.index + 1;
        let (service, check) = (text(body, "ServiceID"), text(body, "CheckID"));
        let mut touched = BTreeSet::new();
        match (service.filter(|s| !s.is_empty()), check.filter(|c| !c.is_empty())) {
            (Some(id), _) => touched.extend(self.remove_service(&node, &id)),
            (None, Some(id)) => {
                if let Some(check) = self.checks.remove(&(node.clone(), id)) {
                    self.dirty = true;
                    let of = self.services.get(&(node.clone(), check.service_id)).map(|s| s.name.clone());
                    touched.extend(of.map_or_else(|| self.names_on(&node), |name| vec![name]));
                }
            }
            (None, None) => {
                let ids: Vec<String> =
                    self.services.keys().filter(|(n, _)| *n == node).map(|(_, id)| id.clone()).collect();
                for id in ids {
                    touched.extend(self.remove_service(&node, &id));
                }
                self.checks.retain(|(n, _), _| *n != node);
                self.dirty |= self.nodes.remove(&node).is_some();
            }
        }
        self.touch(touched, next);
        true
    }

    fn remove_service(&mut self, node: &str, id: &str) -> Option<String> {
        let key = (node.to_owned(), id.to_owned());
        let service = self.services.remove(&key)?;
        self.checks.retain(|(n, _), check| n != node || check.service_id != id);
        if let Some(ids) = self.ids.get_mut(&service.name) {
            ids.remove(&key);
        }
        Some(service.name)
    }

    /// `PUT /v1/txn`, all or nothing.
    fn transact(&mut self, body: &Value) -> Response {
        let none = Vec::new();
        let operations = body.as_array().unwrap_or(&none);
        if operations.len() > 64 {
            return Response::error(413, "Transaction contains too many operations (%d > 64)");
        }
        let before = self.clone();
        for (position, operation) in operations.iter().enumerate() {
            let done = match operation.as_object().and_then(|o| o.iter().next()) {
                Some((kind, operation)) => self.operate(kind, operation),
                None => false,
            };
            if !done {
                *self = before;
                let body = json!({"Results": null, "Errors": [{"OpIndex": position, "What": "failed"}]});
                return Response { status: 409, ..self.found(&body, None) };
            }
        }
        self.found(&json!({"Results": [], "Errors": null}), None)
    }

    fn operate(&mut self, kind: &str, operation: &Value) -> bool {
        let verb = text(operation, "Verb").unwrap_or_default();
        let node = text(operation, "Node").unwrap_or_default();
        match (kind, verb.as_str()) {
            ("Node", "set") => {
                let given = &operation["Node"];
                self.register(&json!({"Node": given["Node"], "Address": given["Address"], "NodeMeta": given["Meta"]}))
            }
            ("Node", "cas") => {
                let given = &operation["Node"];
                let index = text(given, "Node").and_then(|name| self.nodes.get(&name)).map_or(0, |n| n.index);
                given["ModifyIndex"].as_u64().unwrap_or_default() == index
                    && self.operate("Node", &json!({"Verb": "set", "Node": given}))
            }
            ("Service", "set") if operation["Service"]["Address"] == "0.0.0.0" => false,
            ("Service", "set") if self.nodes.contains_key(&node) => {
                self.register(&json!({"Node": node, "Address": "", "SkipNodeUpdate": true, "Service": operation["Service"]}))
            }
            // Consul wants the name too.
            ("Service", "delete") if text(&operation["Service"], "Service").is_some() => self.deregister(&json!({"Node": node, "ServiceID": operation["Service"]["ID"]})),
            ("Check", "set") => {
                let check = &operation["Check"];
                self.register(&json!({"Node": check["Node"], "Address": "", "SkipNodeUpdate": true, "Check": check}))
            }
            ("Check", "delete") => {
                let check = &operation["Check"];
                self.deregister(&json!({"Node": check["Node"], "CheckID": check["CheckID"]}))
            }
            _ => false,
        }
    }

    fn names_on(&self, node: &str) -> Vec<String> {
        let own = self.services.range((node.to_owned(), String::new())..).take_while(|((n, _), _)| n == node);
        own.map(|(_, service)| service.name.clone()).collect()
    }

    fn touch(&mut self, names: BTreeSet<String>, next: u64) {
        if std::mem::take(&mut self.dirty) || !names.is_empty() {
            self.index = next;
        }
        for name in names {
            self.any_service = next;
            if self.ids.get(&name).is_none_or(BTreeSet::is_empty) {
                self.ids.remove(&name);
                self.by_name.remove(&name);
                self.extinction = next;
            } else {
                self.by_name.insert(name, next);
            }
        }
    }

    // ---- questions ----------------------------------------------------------------

    fn list(&self) -> Value {
        let mut names: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for service in self.services.values() {
            let tags = service.value["Tags"].as_array().into_iter().flatten();
            names
                .entry(&service.name)
                .or_default()
                .extend(tags.filter_map(|t| t.as_str().map(str::to_owned)));
        }
        json!(names)
    }

    fn health(&self, name: &str, passing: bool) -> Value {
        let entries = self.ids.get(name).into_iter().flatten().filter_map(|(node, id)| {
            let service = self.services.get(&(node.clone(), id.clone()))?;
            let checks: Vec<Value> = self
                .checks
                .range((node.clone(), String::new())..)
                .take_while(|((n, _), _)| n == node)
                .filter(|(_, c)| c.service_id.is_empty() || c.service_id == *id)
                .map(|(_, c)| c.value.clone())
                .collect();
            let good = checks.iter().all(|check| check["Status"] == "passing");
            (good || !passing)
                .then(|| json!({"Node": self.node_value(node), "Service": service.value, "Checks": checks}))
        });
        Value::Array(entries.collect())
    }

    fn node_value(&self, name: &str) -> Value {
        let node = self.nodes.get(name);
        json!({
            "Node": name, "Datacenter": self.datacenter, "Address": node.map(|n| n.address.clone()),
            "Meta": node.map(|n| n.meta.clone()), "ModifyIndex": node.map(|n| n.index),
        })
    }

    fn node(&self, name: &str) -> Value {
        if !self.nodes.contains_key(name) {
            return Value::Null;
        }
        let own = self.services.iter().filter(|((node, _), _)| node == name);
        let services: Map<String, Value> = own
            .map(|((_, id), service)| {
                let mut value = service.value.clone();
                value["ModifyIndex"] = json!(service.index);
                (id.clone(), value)
            })
            .collect();
        json!({"Node": self.node_value(name), "Services": services})
    }
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key)?.as_str().map(str::to_owned)
}
