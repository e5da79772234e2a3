//! The operator API over HTTP (axum).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{self, DefaultBodyLimit, FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Json, Router};
use serde::Deserialize;
use serde_json::Value;

use super::types::{
    ApplyReport, ApplyRequest, HistoryEntry, List, Problem, ProxyRow, ServiceRow, TokenCreated, TokenRequest,
    TokenRow, Version, WaitReport, WorkloadRow,
};
use super::{Api, ApiError};

/// Largest request body, in bytes.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// Who may call.
#[derive(Clone)]
pub enum Access {
    /// Anybody who reaches the port: only for a member on loopback that was started to try things out.
    Open,
    /// Whoever has this bearer token.
    Bearer(Arc<str>),
}

/// Who calls, for the history.
#[derive(Debug, Clone)]
struct Author(&'static str);

/// Every route of the API, behind one check of who may call.
pub fn router(api: Api, access: Access) -> Router {
    let guarded = Router::new()
        .route("/api/v1/version", get(version))
        .route("/api/v1/apply", post(apply))
        .route("/api/v1/config/{kind}", get(list))
        .route("/api/v1/config/{kind}/{namespace}/{name}", get(object).delete(remove))
        .route("/api/v1/history", get(history))
        .route("/api/v1/proxies", get(proxies))
        .route("/api/v1/proxies/{id}/config", get(proxy_config))
        .route("/api/v1/wait/{revision}", get(wait))
        .route("/api/v1/services", get(services))
        .route("/api/v1/workloads", get(workloads))
        .route("/api/v1/tokens", get(tokens).post(create_token))
        .route("/api/v1/tokens/{id}", delete(revoke_token))
        .route("/api/v1/ca/root", get(root))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(access, authorize));
    guarded.route("/ready", get(ready)).fallback(nothing_here).with_state(api)
}

/// The one check in front of every route.
async fn authorize(State(access): State<Access>, mut request: Request, next: Next) -> Response {
    let author = match &access {
        Access::Open if is_loopback(request.headers()) => Author("local"),
        // A page of a browser on this machine reaches the port by a name of its own site (DNS rebinding).
        Access::Open => {
            return refusal(StatusCode::FORBIDDEN, "the open API is only for callers of a loopback address");
        }
        Access::Bearer(token) => {
            let presented = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
            let presented = presented.and_then(|v| v.strip_prefix("Bearer ")).unwrap_or_default();
            let same =
                ca::authn::Hash::of(presented.as_bytes()).matches(&ca::authn::Hash::of(token.as_bytes()));
            // An empty token, of a file that was cut, is what a caller without one presents.
            if presented.is_empty() || !same {
                let mut response = refusal(
                    StatusCode::UNAUTHORIZED,
                    "a bearer token is needed; istioctl takes it with --token-file",
                );
                response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                return response;
            }
            Author("admin")
        }
    };
    request.extensions_mut().insert(author);
    next.run(request).await
}

/// The caller calls this host by a loopback address, or by `localhost`; none is no browser.
fn is_loopback(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(authority) = host.to_str().unwrap_or_default().parse::<Authority>() else { return false };
    let host = authority.host().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn refusal(status: StatusCode, detail: &str) -> Response {
    let title = status.canonical_reason().unwrap_or_default().to_lowercase();
    let problem = Problem {
        kind: "about:blank".to_owned(),
        title,
        status: status.as_u16(),
        detail: detail.to_owned(),
        errors: Vec::new(),
    };
    answer(&problem)
}

fn answer(problem: &Problem) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(problem).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        answer(&self.problem())
    }
}

/// A JSON body whose mistakes are told as problems.
struct Body<T>(T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(refusal(rejection.status(), &rejection.body_text())),
        }
    }
}

/// What the path says; mistakes are told as problems.
struct Path<T>(T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        match extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(extract::Path(value)) => Ok(Self(value)),
            Err(rejection) => Err(refusal(rejection.status(), &rejection.body_text())),
        }
    }
}

/// What follows the question mark; mistakes are told as problems.
struct Query<T>(T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        match extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(refusal(rejection.status(), &rejection.body_text())),
        }
    }
}

type Answer<T> = Result<Json<T>, ApiError>;

async fn ready() -> &'static str {
    "ready\n"
}

async fn nothing_here() -> Response {
    refusal(StatusCode::NOT_FOUND, "there is nothing at this path")
}

async fn version(State(api): State<Api>) -> Json<Version> {
    Json(api.version())
}

async fn apply(
    State(api): State<Api>,
    Extension(author): Extension<Author>,
    Body(request): Body<ApplyRequest>,
) -> Answer<ApplyReport> {
    Ok(Json(api.apply(author.0, request).await?))
}

#[derive(Deserialize)]
struct Scope {
    namespace: Option<String>,
}

async fn list(State(api): State<Api>, Path(kind): Path<String>, Query(scope): Query<Scope>) -> Answer<List> {
    Ok(Json(api.list(&kind, scope.namespace).await?))
}

type ObjectPath = (String, String, String);

async fn object(State(api): State<Api>, Path((kind, namespace, name)): Path<ObjectPath>) -> Answer<Value> {
    Ok(Json(api.get(&kind, &namespace, &name)?))
}

async fn remove(
    State(api): State<Api>,
    Extension(author): Extension<Author>,
    Path((kind, namespace, name)): Path<ObjectPath>,
) -> Answer<ApplyReport> {
    Ok(Json(api.delete(author.0, &kind, &namespace, &name).await?))
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<usize>,
}

async fn history(State(api): State<Api>, Query(query): Query<Limit>) -> Json<Vec<HistoryEntry>> {
    Json(api.history(query.limit.unwrap_or(100)))
}

async fn proxies(State(api): State<Api>) -> Json<Vec<ProxyRow>> {
    Json(api.proxies())
}

#[derive(Deserialize)]
struct OfType {
    r#type: Option<String>,
}

async fn proxy_config(
    State(api): State<Api>,
    Path(id): Path<String>,
    Query(query): Query<OfType>,
) -> Answer<Value> {
    Ok(Json(api.proxy_config(&id, query.r#type.as_deref().unwrap_or("all")).await?))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Patience {
    timeout_milliseconds: Option<u64>,
}

async fn wait(
    State(api): State<Api>,
    Path(revision): Path<u64>,
    Query(query): Query<Patience>,
) -> Json<WaitReport> {
    let timeout = Duration::from_millis(query.timeout_milliseconds.unwrap_or(30_000));
    Json(api.wait(revision, timeout).await)
}

async fn services(State(api): State<Api>) -> Json<Vec<ServiceRow>> {
    Json(api.services())
}

async fn workloads(State(api): State<Api>) -> Json<Vec<WorkloadRow>> {
    Json(api.workloads())
}

async fn tokens(State(api): State<Api>) -> Answer<Vec<TokenRow>> {
    Ok(Json(api.tokens().await?))
}

async fn create_token(
    State(api): State<Api>,
    Extension(author): Extension<Author>,
    Body(request): Body<TokenRequest>,
) -> Result<(StatusCode, Json<TokenCreated>), ApiError> {
    Ok((StatusCode::CREATED, Json(api.create_token(author.0, &request).await?)))
}

async fn revoke_token(State(api): State<Api>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    api.revoke_token(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn root(State(api): State<Api>) -> String {
    api.roots()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_open_api_is_called_by_a_loopback_address() {
        let called = |host: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static(host));
            is_loopback(&headers)
        };
        for host in ["localhost:15080", "127.0.0.1", "127.3.2.1:80", "[::1]:15080", "LOCALHOST"] {
            assert!(called(host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:80", "10.0.0.1:15080", "", "127.0.0.1.nip.io"] {
            assert!(!called(host), "{host}");
        }
        assert!(is_loopback(&HeaderMap::new()));
    }
}
