//! A service of the demo: a small HTTP server that knows nothing of the mesh. It answers with its name, version,
//! and who called it (which its proxy tells in `x-forwarded-client-cert`), and calls the services below it first.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

use crate::output::data;

/// Headers that a service passes on to the services it calls, so that routing and tracing work end to end.
const PASSED_ON: [&str; 8] = [
    "end-user",
    "x-request-id",
    "traceparent",
    "tracestate",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
];

/// Flags of one service.
#[derive(Debug, Args)]
pub(crate) struct Service {
    /// Name
    #[arg(long)]
    name: String,
    /// Version
    #[arg(long)]
    version: String,
    /// Address to listen on; it is printed when the service is ready
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Service to call, `ratings=127.240.16.5:9080`; may be repeated
    #[arg(long = "call", value_parser = upstream)]
    calls: Vec<(String, SocketAddr)>,
}

/// What a service answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Name.
    pub(crate) service: String,
    /// Version.
    pub(crate) version: String,
    /// SPIFFE identity of the caller, as the mesh verified it; empty when it came without one.
    pub(crate) caller: String,
    /// What the services below answered.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) calls: BTreeMap<String, Call>,
}

/// Outcome of a call to a service below.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Call {
    /// HTTP status; 0 when there was no answer.
    pub(crate) status: u16,
    /// Its answer, when it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) answer: Option<Box<Answer>>,
    /// Its text, when it was something else.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) text: String,
}

type Upstreams = Client<HttpConnector, Empty<Bytes>>;

/// Serves until the process is ended.
///
/// # Errors
///
/// When the address cannot be listened on.
pub(crate) async fn run(service: &Service) -> anyhow::Result<()> {
    let listener = TcpListener::bind(service.listen)
        .await
        .with_context(|| format!("cannot listen on {}", service.listen))?;
    data(&format!("{}\n", listener.local_addr()?))?;
    let app = Arc::new(App {
        name: service.name.clone(),
        version: service.version.clone(),
        calls: service.calls.clone(),
        client: Client::builder(TokioExecutor::new()).build_http(),
    });
    let tasks = TaskTracker::new();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let app = app.clone();
        tasks.spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let app = app.clone();
                async move { Ok::<_, Infallible>(app.answer(request).await) }
            });
            // A client that goes away ends its own connection and nothing else.
            hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await
                .unwrap_or_default();
        });
    }
}

struct App {
    name: String,
    version: String,
    calls: Vec<(String, SocketAddr)>,
    client: Upstreams,
}

impl App {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let mut answer = Answer {
            service: self.name.clone(),
            version: self.version.clone(),
            caller: caller(request.headers()),
            calls: BTreeMap::new(),
        };
        let calls = self.calls.iter().map(|(name, address)| self.call(name, *address, request.headers()));
        for (result, (name, _)) in futures::future::join_all(calls).await.into_iter().zip(&self.calls) {
            answer.calls.insert(name.clone(), result);
        }
        let body = serde_json::to_vec(&answer).unwrap_or_default();
        let mut response = Response::new(Full::new(Bytes::from(body)));
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
        response
    }

    async fn call(&self, name: &str, address: SocketAddr, from: &HeaderMap) -> Call {
        let mut request = Request::builder().uri(format!("http://{address}/")).header("host", name);
        for header in PASSED_ON {
            if let Some(value) = from.get(header) {
                request = request.header(header, value);
            }
        }
        let Ok(request) = request.body(Empty::new()) else {
            return Call { status: 0, answer: None, text: "the call is not a request".to_owned() };
        };
        let response = match self.client.request(request).await {
            Ok(response) => response,
            Err(error) => return Call { status: 0, answer: None, text: error.to_string() },
        };
        let status = response.status().as_u16();
        match response.into_body().collect().await {
            Ok(body) => read(status, &body.to_bytes()),
            Err(error) => Call { status: 0, answer: None, text: error.to_string() },
        }
    }
}

fn read(status: u16, body: &[u8]) -> Call {
    match serde_json::from_slice::<Answer>(body) {
        Ok(answer) => Call { status, answer: Some(Box::new(answer)), text: String::new() },
        Err(_) => Call { status, answer: None, text: String::from_utf8_lossy(body).into_owned() },
    }
}

/// The `URI=` of the last element of `x-forwarded-client-cert`: the caller as our own proxy verified it.
fn caller(headers: &HeaderMap) -> String {
    let value = headers.get("x-forwarded-client-cert").and_then(|v| v.to_str().ok()).unwrap_or_default();
    let last = value.rsplit(',').next().unwrap_or_default();
    last.split(';').find_map(|part| part.trim().strip_prefix("URI=")).unwrap_or_default().to_owned()
}

fn upstream(text: &str) -> Result<(String, SocketAddr), String> {
    let (name, address) = text.split_once('=').ok_or("write `name=address:port`")?;
    Ok((name.to_owned(), address.parse().map_err(|_| format!("`{address}` is not address:port"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_is_the_last_one_in_the_header() {
        let mut headers = HeaderMap::new();
        assert_eq!(caller(&headers), "");
        let value = "By=spiffe://a/ns/x/sa/y;URI=spiffe://forged,By=spiffe://a/ns/x/sa/y;Hash=00;Subject=\"\";URI=spiffe://a/ns/n/sa/s";
        headers.insert("x-forwarded-client-cert", value.parse().unwrap());
        assert_eq!(caller(&headers), "spiffe://a/ns/n/sa/s");
    }

    #[test]
    fn an_answer_that_is_none_keeps_its_text() {
        let call = read(403, b"RBAC: access denied");
        assert_eq!((call.status, call.answer, call.text.as_str()), (403, None, "RBAC: access denied"));
    }
}
