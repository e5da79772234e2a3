//! From a message to the request of a route, and from its answer to a message (pure).
//!
//! The JSON form of the message (proto3's) is taken apart: fields that the path names go there, fields that the query
//! knows go there, and the rest is the body, or the field `object` alone when the message has one.

use std::collections::BTreeSet;

use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use schemars::SchemaGenerator;
use serde_json::{Map, Value};
use tonic::Status;

use super::pb;
use crate::api::routes::{Form, Route};
use crate::api::types::Problem;

/// Characters that need no escape in a segment of a path or in a query (RFC 3986).
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The field of a message that is a body or an answer of any shape.
const OBJECT: &str = "object";

/// The request of a route.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Path and query.
    pub(super) uri: String,
    /// JSON; empty when the route takes none.
    pub(super) body: String,
}

/// The request that a message stands for.
pub(super) fn request(route: &Route, input: &MessageDescriptor, bytes: &[u8]) -> Result<Call, Status> {
    let message = DynamicMessage::decode(input.clone(), bytes);
    let message = message.map_err(|e| Status::invalid_argument(format!("not a {}: {e}", input.name())))?;
    let options = SerializeOptions::new().stringify_64_bit_integers(false);
    let json = message.serialize_with_options(serde_json::value::Serializer, &options);
    let mut fields = match json.map_err(|e| Status::invalid_argument(e.to_string()))? {
        Value::Object(fields) => fields,
        // Well-known messages may have other forms; none of the requests is such.
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => Map::new(),
    };
    let path = path(route.path, &mut fields)?;
    let known = query_fields(route);
    let mut query = String::new();
    for name in known.iter().filter(|name| name.as_str() != OBJECT) {
        if let Some(value) = fields.remove(name) {
            query += if query.is_empty() { "?" } else { "&" };
            query += &format!("{name}={}", escaped(&value));
        }
    }
    let body = match (route.body, fields.remove(OBJECT)) {
        (Form::Json(_), Some(object)) => whole(object).to_string(),
        (Form::Json(_), None) if input.get_field_by_name(OBJECT).is_some() => {
            return Err(Status::invalid_argument("object: is needed"));
        }
        (Form::Json(_), None) => whole(Value::Object(fields)).to_string(),
        (Form::Nothing | Form::Lines(_) | Form::Text(_) | Form::Bytes | Form::Grpc, _) => String::new(),
    };
    Ok(Call { uri: path + &query, body })
}

/// The path with its parameters in their places.
fn path(template: &str, fields: &mut Map<String, Value>) -> Result<String, Status> {
    let mut path = String::new();
    for segment in template.split('/').skip(1) {
        path.push('/');
        match segment.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
            None => path += segment,
            Some(name) => {
                // A number that is 0 is not written; a text that is empty is no segment.
                let value = fields.remove(name);
                let number = name == "revision";
                let value = value.or_else(|| number.then(|| Value::from(0)));
                let value = value.ok_or_else(|| Status::invalid_argument(format!("{name}: is needed")))?;
                path += &escaped(&value);
            }
        }
    }
    Ok(path)
}

fn escaped(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    utf8_percent_encode(&text, PLAIN).to_string()
}

/// The names of what may follow the question mark.
pub(super) fn query_fields(route: &Route) -> BTreeSet<String> {
    let Some(schema) = route.query else { return BTreeSet::new() };
    let mut generator = SchemaGenerator::default();
    let schema = schema(&mut generator);
    let name = schema.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next());
    let definition = name.and_then(|name| generator.definitions().get(name)).unwrap_or(schema.as_value());
    let fields = definition.get("properties").and_then(Value::as_object);
    fields.into_iter().flatten().map(|(name, _)| name.clone()).collect()
}

/// Numbers of a `google.protobuf.Struct` are floats; whole ones are meant as integers.
fn whole(value: Value) -> Value {
    match value {
        Value::Number(number) => {
            let float = number.as_f64().filter(|f| number.is_f64() && f.fract() == 0.0 && f.abs() < 9e15);
            // Its text has no point and no exponent, and fits.
            float
                .and_then(|f| format!("{f:.0}").parse::<i64>().ok())
                .map_or(Value::Number(number), Value::from)
        }
        Value::Array(items) => Value::Array(items.into_iter().map(whole).collect()),
        Value::Object(fields) => Value::Object(fields.into_iter().map(|(k, v)| (k, whole(v))).collect()),
        other @ (Value::Null | Value::Bool(_) | Value::String(_)) => other,
    }
}

/// The message that an answer stands for.
pub(super) fn response(output: &MessageDescriptor, form: Form, body: &[u8]) -> Result<Bytes, Status> {
    let wrong = |e: &dyn std::fmt::Display| Status::internal(format!("not a {}: {e}", output.name()));
    let value: Value = match form {
        Form::Nothing => return Ok(Bytes::new()),
        Form::Text(_) => serde_json::json!({ "text": String::from_utf8_lossy(body) }),
        Form::Json(_) | Form::Lines(_) | Form::Bytes | Form::Grpc => {
            serde_json::from_slice(body).map_err(|e| wrong(&e))?
        }
    };
    let only_object = output.fields().len() == 1 && output.get_field_by_name(OBJECT).is_some();
    let value = if only_object {
        serde_json::json!({ OBJECT: value })
    } else if value.is_array() {
        serde_json::json!({ "items": value })
    } else {
        value
    };
    let message = DynamicMessage::deserialize_with_options(output.clone(), value, &lenient());
    message.map(|message| message.encode_to_vec().into()).map_err(|e| wrong(&e))
}

fn lenient() -> prost_reflect::DeserializeOptions {
    prost_reflect::DeserializeOptions::new().deny_unknown_fields(false)
}

/// A refusal in words, and as `google.rpc.Status` with the problem in it.
pub(super) struct Refused {
    pub(super) message: String,
    pub(super) details: Bytes,
}

/// What a problem says.
pub(super) fn problem(pool: &DescriptorPool, code: i32, body: &[u8]) -> Refused {
    let problem: Option<Problem> = serde_json::from_slice(body).ok();
    let message = problem.as_ref().map(|problem| problem.detail.clone()).unwrap_or_default();
    let descriptor = pool.get_message_by_name("istiod.admin.v1.Problem");
    let value = problem.and_then(|problem| serde_json::to_value(problem).ok());
    let dynamic = descriptor.zip(value).and_then(|(descriptor, value)| {
        DynamicMessage::deserialize_with_options(descriptor, value, &lenient()).ok()
    });
    let any = dynamic.map(|dynamic| prost_types::Any {
        type_url: "type.googleapis.com/istiod.admin.v1.Problem".to_owned(),
        value: dynamic.encode_to_vec(),
    });
    let refusal = pb::Refusal { code, message: message.clone(), details: any.into_iter().collect() };
    Refused { message, details: refusal.encode_to_vec().into() }
}

#[cfg(test)]
mod tests {
    use super::super::{DESCRIPTORS, method};
    use super::*;
    use crate::api::routes;

    fn check(message: &impl prost::Message, rpc: &str, uri: &str, body: &str) {
        let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
        let route = routes::all().find(|route| route.rpc == Some(rpc)).unwrap();
        let input = method(&pool, rpc).unwrap().input();
        let call = request(route, &input, &message.encode_to_vec()).unwrap();
        assert_eq!(call, Call { uri: uri.to_owned(), body: body.to_owned() });
    }

    #[test]
    fn fields_go_into_path_query_and_body() {
        let get = pb::GetRequest {
            kind: "vs".to_owned(),
            namespace: "a/b".to_owned(),
            name: "c d".to_owned(),
            consistency: Some("stale".to_owned()),
        };
        check(&get, "Config/Get", "/api/v1/config/vs/a%2Fb/c%20d?consistency=stale", "");
        let list = pb::ListObjectsRequest {
            kind: "all".to_owned(),
            label_selector: Some("a in (b,c)".to_owned()),
            limit: Some(3),
            ..Default::default()
        };
        check(&list, "Config/List", "/api/v1/config/all?labelSelector=a%20in%20%28b%2Cc%29&limit=3", "");
        let token =
            pb::ApiTokenRequest { role: "viewer".to_owned(), ttl_seconds: Some(60), ..Default::default() };
        check(&token, "Access/CreateToken", "/api/v1/access/tokens", r#"{"role":"viewer","ttlSeconds":60}"#);
        check(&pb::WaitRequest::default(), "Mesh/Wait", "/api/v1/wait/0", "");
    }

    #[test]
    fn an_object_is_the_body_and_its_numbers_stay_whole() {
        let number =
            |number| prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(number)) };
        let fields = [("port".to_owned(), number(9080.0)), ("share".to_owned(), number(0.5))];
        let object = prost_types::Struct { fields: fields.into() };
        let replace = pb::ReplaceRequest {
            kind: "vs".to_owned(),
            namespace: "shop".to_owned(),
            name: "a".to_owned(),
            object: Some(object),
            expected_revision: Some(7),
            ..Default::default()
        };
        let body = r#"{"port":9080,"share":0.5}"#;
        check(&replace, "Config/Replace", "/api/v1/config/vs/shop/a?expectedRevision=7", body);
    }

    #[test]
    fn what_is_missing_is_told() {
        let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
        let refused = |rpc: &str, bytes: &[u8]| {
            let route = routes::all().find(|route| route.rpc == Some(rpc)).unwrap();
            request(route, &method(&pool, rpc).unwrap().input(), bytes).unwrap_err().code()
        };
        for (rpc, bytes) in
            [("Config/Get", &b""[..]), ("Config/Get", b"\xff"), ("Config/Create", b"\x0a\x01a\x12\x01b")]
        {
            assert_eq!(refused(rpc, bytes), tonic::Code::InvalidArgument, "{rpc}");
        }
    }

    /// Every row's name is a method, every method is a row, and messages have every field that JSON has.
    #[test]
    fn the_proto_says_what_the_table_says() {
        let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
        let mut methods: BTreeSet<String> = pool
            .services()
            .flat_map(|s| s.methods().map(|m| format!("{}/{}", s.name(), m.name())).collect::<Vec<_>>())
            .collect();
        for route in routes::all() {
            let Some(rpc) = route.rpc else { continue };
            let method = method(&pool, rpc).unwrap_or_else(|| panic!("{rpc} is not in admin.proto"));
            assert!(methods.remove(rpc), "{rpc} is two routes");
            let input = method.input();
            let has = |name: &str| input.fields().any(|field| field.json_name() == name);
            let parameters = route.path.split('/').filter_map(|s| s.strip_prefix('{')?.strip_suffix('}'));
            parameters.for_each(|name| assert!(has(name), "{rpc}: {name} of the path"));
            query_fields(route).iter().for_each(|name| assert!(has(name), "{rpc}: {name} of the query"));
            let streams = matches!(route.answer, Form::Lines(_) | Form::Bytes);
            assert_eq!(method.is_server_streaming(), streams, "{rpc}");
            if let Form::Json(schema) | Form::Lines(schema) = route.answer {
                covers(&method.output(), schema, rpc);
            }
            if let Form::Json(schema) = route.body
                && input.get_field_by_name(OBJECT).is_none()
            {
                covers(&input, schema, rpc);
            }
        }
        assert!(methods.is_empty(), "no route is {methods:?}");
    }

    fn covers(message: &MessageDescriptor, schema: routes::SchemaOf, rpc: &str) {
        let mut generator = SchemaGenerator::default();
        let schema = schema(&mut generator);
        let name = schema.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next());
        let definition = name.and_then(|name| generator.definitions().get(name)).unwrap_or(schema.as_value());
        let fields = definition.get("properties").and_then(Value::as_object);
        for (field, _) in fields.into_iter().flatten() {
            let has = message.fields().any(|f| f.json_name() == field);
            assert!(has, "{rpc}: {} has no `{field}`", message.name());
        }
    }
}
