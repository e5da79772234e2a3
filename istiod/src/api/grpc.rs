//! The operator API in gRPC (tonic), on the port of REST.
//!
//! A call of `istiod.admin.v1` is the call of the route that names it in the table, in another form: [`transcode`]
//! makes a request of that route from the message, the route answers behind its gate as it does for REST, and its
//! answer becomes a message again. So both protocols have one check of who may call, one set of limits, and one service
//! layer. Reflection and health are tonic's, as rows of the same table.

mod codec;
mod transcode;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, post, post_service};
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use http_body_util::BodyExt;
use prost_reflect::{DescriptorPool, MethodDescriptor};
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;
use tonic::{Code, Status};
use tower::ServiceExt;

use self::codec::Raw;
use self::transcode::Refused;
use super::Api;
use super::gate::Peer;
use super::routes::{Form, Route, Scope};
use crate::access::Permission;

/// Messages and clients of the admin API (`proto/admin.proto`).
pub mod pb {
    #![expect(
        missing_docs,
        clippy::allow_attributes_without_reason,
        reason = "generated; the proto has the comments"
    )]
    tonic::include_proto!("istiod.admin.v1");
}

/// What reflection tells, and what messages are read by.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/admin.bin"));

/// The package of the services.
const PACKAGE: &str = "istiod.admin.v1";

/// Largest message of a request, in bytes: the largest body of a route, and its envelope.
const LARGEST: usize = 17 * 1024 * 1024;

/// Largest line of an answer that is a stream, in bytes.
const LONGEST_LINE: usize = 16 * 1024 * 1024;

pub(in crate::api) const ROUTES: &[Route] = &[
    Route::post(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Permission::Read,
        Scope::Nobody,
        reflection,
    )
    .named("reflect", "gRPC reflection.")
    .answers(200, Form::Grpc),
    Route::post(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        Permission::Read,
        Scope::Nobody,
        old_reflection,
    )
    .named("reflectAlpha", "gRPC reflection, for clients that know only its first version.")
    .answers(200, Form::Grpc),
    Route::post("/grpc.health.v1.Health/Check", Permission::Open, Scope::Nobody, health)
        .named("healthCheck", "gRPC health.")
        .answers(200, Form::Grpc),
    Route::post("/grpc.health.v1.Health/Watch", Permission::Open, Scope::Nobody, health)
        .named("healthWatch", "gRPC health, followed.")
        .answers(200, Form::Grpc),
];

fn reflection() -> MethodRouter<Api> {
    let builder = tonic_reflection::server::Builder::configure();
    match builder.register_encoded_file_descriptor_set(DESCRIPTORS).build_v1() {
        Ok(service) => post_service(service),
        Err(error) => broken(&error),
    }
}

fn old_reflection() -> MethodRouter<Api> {
    let builder = tonic_reflection::server::Builder::configure();
    match builder.register_encoded_file_descriptor_set(DESCRIPTORS).build_v1alpha() {
        Ok(service) => post_service(service),
        Err(error) => broken(&error),
    }
}

/// The descriptors are of this program's own making; if they are wrong, everything else still serves.
fn broken(error: &tonic_reflection::server::Error) -> MethodRouter<Api> {
    tracing::error!(%error, "no reflection");
    MethodRouter::new()
}

fn health() -> MethodRouter<Api> {
    // A member that answers serves: the port opens when it does.
    let (_, service) = tonic_health::server::health_reporter();
    post_service(service)
}

/// Adds a path for each route that has a name in gRPC. `rest` is the router of all routes, with their gates.
pub(super) fn add(router: Router, rest: &Router, routes: impl Iterator<Item = &'static Route>) -> Router {
    let pool = match DescriptorPool::decode(DESCRIPTORS) {
        Ok(pool) => pool,
        Err(error) => {
            tracing::error!(%error, "no gRPC");
            return router;
        }
    };
    routes.fold(router, |router, route| {
        let Some(method) = route.rpc.and_then(|rpc| method(&pool, rpc)) else { return router };
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        let call = Arc::new(Call { route, method, rest: rest.clone() });
        router.route(&path, post(move |request: Request| answer(call.clone(), request)))
    })
}

/// The method that a row calls `Service/Method`.
#[must_use]
pub fn method(pool: &DescriptorPool, rpc: &str) -> Option<MethodDescriptor> {
    let (service, method) = rpc.split_once('/')?;
    let service = pool.get_service_by_name(&format!("{PACKAGE}.{service}"))?;
    service.methods().find(|candidate| candidate.name() == method)
}

/// A call that is not in the table, as gRPC tells it.
pub(super) fn unknown(request: &Request) -> Option<Response> {
    let kind = request.headers().get(header::CONTENT_TYPE)?.to_str().ok()?;
    let told = || Status::unimplemented("there is no such method").into_http::<tonic::body::Body>();
    kind.starts_with("application/grpc").then(|| told().into_response())
}

/// One method and the route that it is.
struct Call {
    route: &'static Route,
    method: MethodDescriptor,
    rest: Router,
}

async fn answer(call: Arc<Call>, request: Request) -> Response {
    let mut grpc = tonic::server::Grpc::new(Raw).max_decoding_message_size(LARGEST);
    let streams = call.method.is_server_streaming();
    let service = move |request: tonic::Request<Bytes>| {
        let call = call.clone();
        async move { call.run(request).await.map(tonic::Response::new) }
    };
    let response = if streams {
        grpc.server_streaming(tower::service_fn(service), request).await
    } else {
        let one = move |request| {
            let answers = service(request);
            async move {
                let (metadata, mut messages, extensions) = answers.await?.into_parts();
                let message = messages.next().await.unwrap_or_else(|| Ok(Bytes::new()))?;
                Ok::<_, Status>(tonic::Response::from_parts(metadata, message, extensions))
            }
        };
        grpc.unary(tower::service_fn(one), request).await
    };
    response.into_response()
}

impl Call {
    /// Has the route answer, as it does for REST.
    async fn run(
        &self,
        request: tonic::Request<Bytes>,
    ) -> Result<BoxStream<'static, Result<Bytes, Status>>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let call = transcode::request(self.route, &self.method.input(), &message)?;
        let mut inner = Request::builder().method(self.route.verb.as_str()).uri(call.uri);
        let headers = metadata.into_headers();
        for name in [header::AUTHORIZATION, header::HOST] {
            inner = headers.get(&name).into_iter().fold(inner, |inner, value| inner.header(&name, value));
        }
        let inner = inner.header(header::CONTENT_TYPE, "application/json").body(Body::from(call.body));
        let mut inner = inner.map_err(|e| Status::invalid_argument(e.to_string()))?;
        if let Some(peer) = extensions.get::<Peer>() {
            inner.extensions_mut().insert(peer.clone());
        }
        let response = self.rest.clone().oneshot(inner).await.unwrap_or_else(|never| match never {});
        self.messages(response).await
    }

    async fn messages(
        &self,
        response: Response,
    ) -> Result<BoxStream<'static, Result<Bytes, Status>>, Status> {
        let (parts, body) = response.into_parts();
        let output = self.method.output();
        if !parts.status.is_success() {
            return Err(refusal(parts.status, body, &output).await);
        }
        let lost = |e: axum::Error| Status::unavailable(e.to_string());
        match self.route.answer {
            Form::Lines(_) => {
                let reader =
                    StreamReader::new(TryStreamExt::map_err(body.into_data_stream(), std::io::Error::other));
                let lines = FramedRead::new(reader, LinesCodec::new_with_max_length(LONGEST_LINE));
                let messages = lines.map(move |line| {
                    let line = line.map_err(|e| Status::unavailable(e.to_string()))?;
                    transcode::response(&output, Form::Lines(super::routes::schema::<()>), line.as_bytes())
                });
                Ok(messages.boxed())
            }
            Form::Bytes if self.method.is_server_streaming() => {
                let chunk = |data: Bytes| {
                    Bytes::from(prost::Message::encode_to_vec(&pb::Chunk { data: data.into() }))
                };
                Ok(TryStreamExt::map_err(body.into_data_stream().map_ok(chunk), lost).boxed())
            }
            form @ (Form::Bytes | Form::Json(_) | Form::Text(_) | Form::Nothing | Form::Grpc) => {
                let body = body.collect().await.map_err(lost)?.to_bytes();
                let message = transcode::response(&output, form, &body);
                Ok(futures::stream::once(std::future::ready(message)).boxed())
            }
        }
    }
}

/// What the route refused, with its problem in the details.
async fn refusal(status: StatusCode, body: Body, output: &prost_reflect::MessageDescriptor) -> Status {
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let Refused { message, details } = transcode::problem(output.parent_pool(), code(status) as i32, &body);
    Status::with_details(code(status), message, details)
}

/// The code that stands for an HTTP status here.
fn code(status: StatusCode) -> Code {
    match status.as_u16() {
        400 | 415 | 422 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::NotFound,
        409 => Code::Aborted,
        410 => Code::OutOfRange,
        413 | 429 | 507 => Code::ResourceExhausted,
        503 => Code::Unavailable,
        504 => Code::DeadlineExceeded,
        _ => Code::Internal,
    }
}
