//! The OpenAPI 3.1 document, made of the table of routes and the schemas of its types.
//!
//! Schemas are `schemars`' JSON Schema 2020-12, which is OpenAPI 3.1's own dialect, derived from the types that are read
//! and written; paths, parameters and permissions are the table's. So nothing is said twice, and nothing can differ.

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::routes::{Form, Route, SchemaOf, Scope, schema};
use super::types::Problem;
use crate::access::Permission;

/// Where schemas are in the document.
const SCHEMAS: &str = "/components/schemas";

/// The document.
pub fn document(routes: impl Iterator<Item = &'static Route>) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = SCHEMAS.into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let problem = schema::<Problem>(&mut generator);
    let refused = json!({
        "description": "What is wrong (RFC 9457).",
        "content": { "application/problem+json": { "schema": problem } },
    });
    let mut paths = Map::new();
    for route in routes.filter(|route| !matches!(route.answer, Form::Grpc)) {
        let operation = operation(route, &mut generator);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        if let Some(path) = path.as_object_mut() {
            path.insert(route.verb.as_str().to_lowercase(), operation);
        }
    }
    json!({
        "openapi": "3.1.1",
        "info": {
            "title": "istiod admin API",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Configuration, state and members of the mesh. The same calls are served in gRPC.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "responses": { "Refused": refused },
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "certificate": { "type": "mutualTLS" },
            },
        },
    })
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let mut operation = json!({
        "operationId": route.id,
        "summary": route.does,
        "tags": [tag(route.path)],
        "parameters": parameters(route, generator),
        "responses": {
            route.status.to_string(): answer(route, generator),
            "default": { "$ref": "#/components/responses/Refused" },
        },
        "security": if route.needs == Permission::Open {
            json!([])
        } else {
            json!([{ "bearer": [] }, { "certificate": [] }])
        },
        "x-permission": permission(route.needs),
        "x-scope": scope(route.scope),
    });
    let body = content(route.body, generator);
    if let Some(fields) = operation.as_object_mut() {
        if let Some(content) = body {
            fields.insert("requestBody".to_owned(), json!({ "required": true, "content": content }));
        }
        if let Some(rpc) = route.rpc {
            fields.insert("x-grpc".to_owned(), json!(format!("istiod.admin.v1.{rpc}")));
        }
    }
    operation
}

/// The first word of a path below the version.
fn tag(path: &str) -> &str {
    path.strip_prefix("/api/v1/").and_then(|rest| rest.split('/').next()).unwrap_or("member")
}

fn permission(needs: Permission) -> &'static str {
    match needs {
        Permission::Open => "open",
        Permission::Read => "read",
        Permission::Write => "write",
        Permission::Administer => "administer",
    }
}

fn scope(scope: Scope) -> &'static str {
    match scope {
        Scope::Nobody => "nobody",
        Scope::Path => "path",
        Scope::Each => "each",
        Scope::Mesh => "mesh",
    }
}

fn answer(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let mut answer = json!({ "description": route.does });
    if let (Some(content), Some(fields)) = (content(route.answer, generator), answer.as_object_mut()) {
        fields.insert("content".to_owned(), content);
    }
    answer
}

fn content(form: Form, generator: &mut SchemaGenerator) -> Option<Value> {
    match form {
        Form::Nothing | Form::Grpc => None,
        Form::Json(schema) => Some(json!({ "application/json": { "schema": schema(generator) } })),
        // A schema of each line.
        Form::Lines(schema) => Some(json!({ "application/jsonl": { "schema": schema(generator) } })),
        Form::Text(kind) => Some(json!({ kind: { "schema": { "type": "string" } } })),
        Form::Bytes => Some(json!({ "application/octet-stream": {} })),
    }
}

fn parameters(route: &Route, generator: &mut SchemaGenerator) -> Vec<Value> {
    let segments = route.path.split('/');
    let named = segments.filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'));
    let in_path = |name: &str| {
        let schema = match name {
            "revision" => json!({ "type": "integer", "format": "uint64", "minimum": 0 }),
            _ => json!({ "type": "string", "minLength": 1 }),
        };
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    };
    let mut parameters: Vec<Value> = named.map(in_path).collect();
    parameters.extend(route.query.into_iter().flat_map(|query| in_query(query, generator)));
    parameters
}

/// Each field of the object is a parameter.
fn in_query(query: SchemaOf, generator: &mut SchemaGenerator) -> Vec<Value> {
    let schema = query(generator);
    let name = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.rsplit('/').next());
    let definition = name.and_then(|name| generator.definitions().get(name).cloned());
    let definition = definition.unwrap_or_else(|| schema.to_value());
    let required = definition.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
    let fields = definition.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
    let parameter = |(name, mut schema): (String, Value)| {
        let about = schema.as_object_mut().and_then(|schema| schema.remove("description"));
        json!({
            "name": name,
            "in": "query",
            "required": required.contains(&json!(name)),
            "description": about.unwrap_or_default(),
            "schema": schema,
        })
    };
    fields.into_iter().map(parameter).collect()
}
