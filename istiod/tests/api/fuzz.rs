//! Calls drawn from the OpenAPI document: whatever is sent, the answer is one that the document has, and none is the
//! server's fault.
//!
//! `API_FUZZ_SECONDS=600 API_FUZZ_SEED=7 cargo test -p istiod --test api fuzz` runs longer, and another way.

use std::time::Duration;

use http::Request;
use http_body_util::Full;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::member::{ADMIN, Member};
use crate::roles::rule;
use crate::schema::{mistakes, resolve};

/// Calls at the same time.
const WORKERS: u64 = 4;

/// An operation of the document.
struct Operation<'a> {
    path: &'a str,
    verb: &'a str,
    says: &'a Value,
}

/// Draws calls.
struct Draw<'a> {
    document: &'a Value,
    random: fastrand::Rng,
}

impl Draw<'_> {
    fn one_in(&mut self, n: u32) -> bool {
        self.random.u32(0..n) == 0
    }

    fn text(&mut self) -> String {
        let words = [
            "shop",
            "bank",
            "a",
            "b",
            "default",
            "all",
            "destinationrules",
            "vs",
            "reviews.shop",
            "admin",
            "viewer",
            "istio-system",
            "0",
            "-1",
            "18446744073709551615",
            "app=web",
            "metadata.name=a",
            "cluster",
            "spiffe://cluster.local/ns/shop/sa/ops",
            "linearizable",
            "stale",
            "..",
            "%2e%2e",
            "a/b",
            "\u{0}",
            "é\u{202e}",
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: f}\nspec: {host: f}\n",
        ];
        match self.random.u32(0..8) {
            0 => String::new(),
            1 => "x".repeat(self.random.usize(1..5000)),
            2 => (0..self.random.usize(1..20)).map(|_| self.random.char(..)).collect(),
            _ => (*self.random.choice(words.iter()).unwrap()).to_owned(),
        }
    }

    fn number(&mut self, schema: &Value) -> Value {
        let bound = |name: &str, or: i64| schema.get(name).and_then(Value::as_i64).unwrap_or(or);
        let (least, most) = (bound("minimum", 0), bound("maximum", 100_000));
        match self.random.u32(0..8) {
            0 => json!(least),
            1 => json!(most),
            2 => json!(least - 1),
            3 => json!(most.saturating_add(1)),
            4 => json!(1.5),
            5 => json!(u64::MAX),
            _ => json!(self.random.i64(least..=most.min(least + 50))),
        }
    }

    /// Something that fits a schema, or nearly.
    fn value(&mut self, schema: &Value, depth: u32) -> Value {
        if self.one_in(12) {
            return self.junk(depth);
        }
        let schema = resolve(self.document, schema);
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            return self.random.choice(values.iter()).unwrap().clone();
        }
        if let Some(several) = schema.get("anyOf").or(schema.get("oneOf")).and_then(Value::as_array) {
            let one = self.random.choice(several.iter()).unwrap().clone();
            return self.value(&one, depth);
        }
        if let Some(only) = schema.get("const") {
            return only.clone();
        }
        let kinds = schema.get("type").cloned().unwrap_or(json!("object"));
        let kind = match &kinds {
            Value::Array(several) => self.random.choice(several.iter()).unwrap().clone(),
            one => one.clone(),
        };
        match kind.as_str().unwrap() {
            "null" => Value::Null,
            "boolean" => json!(self.random.bool()),
            "integer" | "number" => self.number(schema),
            "string" => json!(self.text()),
            "array" => {
                let items = schema.get("items").cloned().unwrap_or(Value::Bool(true));
                (0..self.random.u32(0..3)).map(|_| self.value(&items, depth + 1)).collect()
            }
            _ if schema.get("properties").is_none() => self.object(),
            _ => self.fields(schema, depth),
        }
    }

    fn fields(&mut self, schema: &Value, depth: u32) -> Value {
        let required = schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut fields = Map::new();
        for (name, schema) in schema["properties"].as_object().unwrap() {
            let needed = required.contains(&json!(name)) && !self.one_in(20);
            if needed || self.random.bool() {
                fields.insert(name.clone(), self.value(schema, depth + 1));
            }
        }
        Value::Object(fields)
    }

    /// A configuration object, or nearly.
    fn object(&mut self) -> Value {
        let mut object = json!({
            "apiVersion": "networking.istio.io/v1",
            "kind": "DestinationRule",
            "metadata": { "name": "a", "namespace": "shop" },
            "spec": { "host": "a" },
        });
        for pointer in ["/metadata/name", "/metadata/namespace", "/spec/host", "/spec", "/kind", "/metadata"]
        {
            if self.one_in(6) {
                let junk = self.junk(0);
                object.pointer_mut(pointer).into_iter().for_each(|place| *place = junk.clone());
            }
        }
        object
    }

    fn junk(&mut self, depth: u32) -> Value {
        match self.random.u32(0..7) {
            0 => Value::Null,
            1 => json!(self.random.bool()),
            2 => json!(self.random.i64(..)),
            3 => json!(self.random.f64() * 1e300),
            4 if depth < 4 => (0..3).map(|_| self.junk(depth + 1)).collect(),
            5 if depth < 4 => Value::Object((0..3).map(|_| (self.text(), self.junk(depth + 1))).collect()),
            _ => json!(self.text()),
        }
    }

    fn uri(&mut self, operation: &Operation<'_>) -> String {
        let (mut path, mut query) = (operation.path.to_owned(), Vec::new());
        for parameter in operation.says["parameters"].as_array().unwrap() {
            let name = parameter["name"].as_str().unwrap();
            let value = match self.value(&parameter["schema"], 0) {
                // A call that waits for long is not wrong, only slow.
                _ if name == "timeoutMilliseconds" => if self.one_in(10) { "x" } else { "5" }.to_owned(),
                Value::String(text) => text,
                other => other.to_string(),
            };
            let value =
                percent_encoding::percent_encode(value.as_bytes(), percent_encoding::NON_ALPHANUMERIC)
                    .to_string();
            if parameter["in"] == "path" {
                path = path.replace(&format!("{{{name}}}"), &value);
            } else if name == "timeoutMilliseconds" || self.random.bool() {
                query.push(format!("{name}={value}"));
            }
        }
        if self.one_in(30) {
            query.push("nonsense=%ff".to_owned());
        }
        if query.is_empty() { path } else { format!("{path}?{}", query.join("&")) }
    }

    fn body(&mut self, operation: &Operation<'_>) -> Vec<u8> {
        let Some(content) = operation.says.get("requestBody").map(|body| &body["content"]) else {
            return if self.one_in(20) { self.text().into_bytes() } else { Vec::new() };
        };
        let schema = content.get("application/json").and_then(|json| json.get("schema"));
        let schema = schema.cloned().unwrap_or(Value::Bool(true));
        let mut bytes = serde_json::to_vec(&self.value(&schema, 0)).unwrap();
        match self.random.u32(0..25) {
            0 => bytes.truncate(self.random.usize(0..=bytes.len())),
            1 => bytes = "[".repeat(self.random.usize(1..10_000)).into_bytes(),
            2 => bytes.iter_mut().take(20).for_each(|byte| *byte = self.random.u8(..)),
            _ => {}
        }
        bytes
    }

    fn request(&mut self, operation: &Operation<'_>) -> Option<Request<Full<bytes::Bytes>>> {
        let uri = self.uri(operation);
        let mut request =
            Request::builder().method(operation.verb.to_uppercase().as_str()).uri(uri).header("host", "a");
        if !self.one_in(50) {
            request = request.header("authorization", format!("Bearer {ADMIN}"));
        }
        let kinds =
            ["application/json", "application/json; charset=utf-8", "text/plain", "application/x-protobuf"];
        let kind = if self.one_in(20) { *self.random.choice(kinds.iter()).unwrap() } else { kinds[0] };
        let body = self.body(operation);
        request.header("content-type", kind).body(Full::new(body.into())).ok()
    }
}

fn operations(document: &Value) -> Vec<Operation<'_>> {
    let paths = document["paths"].as_object().unwrap().iter();
    let all = paths.flat_map(|(path, item)| {
        item.as_object().unwrap().iter().map(move |(verb, says)| Operation { path, verb, says })
    });
    // A watch does not end; the waiting for its first line is another test's.
    all.filter(|operation| !operation.says["responses"].to_string().contains("application/jsonl")).collect()
}

/// Sends one call, and refuses an answer that the document does not have.
async fn call(
    member: &Member,
    document: &Value,
    operation: &Operation<'_>,
    request: Request<Full<bytes::Bytes>>,
) -> u16 {
    let told = format!("{} {}", operation.verb, request.uri());
    let answer = member.send(request).await;
    assert!(answer.status < 500, "{told}: {answer:?}");
    if answer.status >= 400 {
        assert_eq!(answer.headers["content-type"], "application/problem+json", "{told}: {answer:?}");
        let problem = mistakes(document, &json!({ "$ref": "#/components/schemas/Problem" }), &answer.json());
        assert!(problem.is_empty(), "{told}: {problem:#?}");
        return answer.status;
    }
    let response = operation.says["responses"].get(answer.status.to_string());
    let response = response.unwrap_or_else(|| panic!("{told}: {} is not in the document", answer.status));
    if let Some(schema) = response.pointer("/content/application~1json/schema") {
        let wrong = mistakes(document, schema, &answer.json());
        assert!(wrong.is_empty(), "{told}: {wrong:#?}");
    }
    answer.status
}

fn setting(name: &str) -> Option<u64> {
    #[expect(
        clippy::disallowed_methods,
        reason = "how long and which way a fuzz runs is asked of whoever starts it"
    )]
    let value = std::env::var(name);
    value.ok().and_then(|text| text.parse().ok())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_of_the_document_is_the_servers_fault() {
    let member = Member::start().await;
    member.apply(&rule("shop", "a")).await;
    let document = member.call(http::Method::GET, "/openapi.json", None, "").await.json();
    let (seconds, seed) = (setting("API_FUZZ_SECONDS"), setting("API_FUZZ_SEED").unwrap_or(1));
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(20));
    let most = if seconds.is_some() { u64::MAX } else { 3000 };
    let worker = async |number: u64| {
        let (operations, mut done) = (operations(&document), [0_u64; 6]);
        for turn in 0..most {
            if Instant::now() >= until {
                break;
            }
            // Each call has a seed of its own: what it sends does not depend on answers.
            let random =
                fastrand::Rng::with_seed(seed.wrapping_mul(1_000_003).wrapping_add(turn * WORKERS + number));
            let mut draw = Draw { document: &document, random };
            let operation = draw.random.choice(operations.iter()).unwrap();
            let Some(request) = draw.request(operation) else { continue };
            let status = call(&member, &document, operation, request).await;
            done[usize::from(status / 100)] += 1;
        }
        done
    };
    let done = futures::future::join_all((0..WORKERS).map(worker)).await;
    let sum = |class: usize| done.iter().map(|of| of[class]).sum::<u64>();
    let (good, refused) = (sum(2), sum(4));
    println!("seed {seed}: {good} good, {refused} refused");
    assert!(good > 50 && refused > 50, "{good} good and {refused} refused calls are too few to say anything");
    member.stop().await;
}
