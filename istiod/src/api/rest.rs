//! The operator API over HTTP (axum): the router made of the table, and what handlers take.
//!
//! Each area has its handlers and its part of the table in one file. To add a call: a method of [`Api`], a handler,
//! and a row.

pub mod access;
pub mod audit;
pub mod backup;
pub mod history;
pub mod members;
pub mod mesh;
pub mod nodes;
pub mod objects;
pub mod plain;
pub mod trust;

use axum::extract::{self, DefaultBodyLimit, FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use serde::de::DeserializeOwned;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{DefaultPredicate, NotForContentType, Predicate};

use super::gate::{Gate, Guarded, guard};
use super::problem::{refusal, refused};
use super::types::Mistake;
use super::{Api, ApiError, grpc, routes};

/// What a handler gives.
pub type Answer<T> = Result<Json<T>, ApiError>;

/// Every route of the table, each behind the gate.
pub fn router(api: Api, gate: &Gate) -> Router {
    let mut router = Router::new();
    for route in routes::all() {
        let guarded = Guarded { gate: gate.clone(), route };
        let handler = (route.handler)()
            .route_layer(DefaultBodyLimit::max(route.largest))
            .route_layer(middleware::from_fn_with_state(guarded, guard));
        router = router.route(route.path, handler);
    }
    let rest = router.method_not_allowed_fallback(not_so).with_state(api);
    let all = grpc::add(rest.clone(), &rest, routes::all());
    all.fallback(nothing_here).layer(CompressionLayer::new().gzip(true).compress_when(large()))
}

/// What is worth compressing. Lines come one by one, and would wait in the compressor.
fn large() -> impl Predicate {
    DefaultPredicate::new().and(NotForContentType::const_new(LINES))
}

async fn nothing_here(request: Request) -> Response {
    if let Some(told) = grpc::unknown(&request) {
        return told;
    }
    refusal(StatusCode::NOT_FOUND, "there is nothing at this path; /openapi.json has all")
}

async fn not_so() -> Response {
    refusal(StatusCode::METHOD_NOT_ALLOWED, "this path is not called so; /openapi.json has all")
}

/// Values as they come, each on a line.
pub fn lines<T: serde::Serialize>(values: impl Stream<Item = Vec<T>> + Send + 'static) -> Response {
    let chunks = values.map(|values| {
        let mut chunk = Vec::new();
        for value in &values {
            serde_json::to_writer(&mut chunk, value)?;
            chunk.push(b'\n');
        }
        Ok::<_, serde_json::Error>(Bytes::from(chunk))
    });
    ([(header::CONTENT_TYPE, LINES)], axum::body::Body::from_stream(chunks)).into_response()
}

/// Media type of one JSON value on each line.
pub const LINES: &str = "application/jsonl";

/// A JSON body whose mistakes are told as problems, with pointers.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let kind = kind.and_then(|kind| kind.split(';').next()).map(str::trim).unwrap_or_default();
        if !kind.eq_ignore_ascii_case("application/json") && !kind.ends_with("+json") {
            return Err(refusal(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "content-type: application/json is needed",
            ));
        }
        let bytes = Bytes::from_request(request, state).await;
        let bytes = bytes.map_err(|rejection| refusal(rejection.status(), &rejection.body_text()))?;
        read(&bytes)
            .map(Self)
            .map_err(|(status, mistake)| refused(status, &format!("the body: {mistake}"), vec![*mistake]))
    }
}

/// Reads a body; a mistake is of its form (400) or of its content (422).
fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, (StatusCode, Box<Mistake>)> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value: Result<T, _> = serde_path_to_error::deserialize(&mut reader);
    let value = value.map_err(|error| {
        let status = match error.inner().classify() {
            serde_json::error::Category::Data => StatusCode::UNPROCESSABLE_ENTITY,
            serde_json::error::Category::Io
            | serde_json::error::Category::Syntax
            | serde_json::error::Category::Eof => StatusCode::BAD_REQUEST,
        };
        let place = |n: usize| u32::try_from(n).ok().filter(|n| *n > 0);
        let mistake = Mistake {
            detail: error.inner().to_string(),
            pointer: pointer(error.path()),
            line: place(error.inner().line()),
            column: place(error.inner().column()),
            ..Mistake::default()
        };
        (status, Box::new(mistake))
    })?;
    match reader.end() {
        Ok(()) => Ok(value),
        Err(error) => Err((StatusCode::BAD_REQUEST, Box::new(Mistake::plain(error.to_string())))),
    }
}

/// Where in a body, as RFC 6901 writes it.
fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter().fold(String::new(), |pointer, segment| match segment {
        Segment::Seq { index } => format!("{pointer}/{index}"),
        Segment::Map { key } | Segment::Enum { variant: key } => {
            format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"))
        }
        Segment::Unknown => pointer,
    })
}

/// What the path says; mistakes are told as problems.
#[derive(Debug)]
pub struct Path<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        match extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(extract::Path(value)) => Ok(Self(value)),
            Err(rejection) => Err(refusal(rejection.status(), &rejection.body_text())),
        }
    }
}

/// What follows the question mark; mistakes are told as problems.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        match extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(refusal(rejection.status(), &rejection.body_text())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::types::ApplyRequest;
    use super::*;

    #[test]
    fn a_wrong_body_is_told_with_its_pointer() {
        let told = |text: &str| read::<ApplyRequest>(text.as_bytes()).unwrap_err();
        let (status, mistake) = told(r#"{"files": [{"name": "a", "text": 1}]}"#);
        assert_eq!((status.as_u16(), mistake.pointer.as_str()), (422, "/files/0/text"));
        let (status, mistake) = told("{\"files\": [\n}");
        assert_eq!((status.as_u16(), mistake.line), (400, Some(2)));
        assert_eq!(told(r#"{"files": []} x"#).0, StatusCode::BAD_REQUEST);
        assert_eq!(told(r#"{"files": [], "dryrun": true}"#).0, StatusCode::UNPROCESSABLE_ENTITY);
    }
}
