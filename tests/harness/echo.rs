//! The application behind a proxy: it answers with its name and what it was sent.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::http::{Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// What an [`Echo`] answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Name of the echo.
    pub name: String,
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// `HTTP/1.1`, `HTTP/2.0`
    pub version: String,
    /// Headers; several values of one name are joined by `, `.
    pub headers: BTreeMap<String, String>,
    /// Length of the body in bytes.
    pub body: usize,
}

/// A running echo; it stops when dropped.
#[derive(Debug)]
pub struct Echo {
    /// Where it listens.
    pub address: SocketAddr,
    requests: Arc<AtomicU64>,
    _stop: DropGuard,
}

impl Echo {
    /// Listens on a free loopback port and speaks HTTP/1.1 and HTTP/2 with prior knowledge.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn start(name: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let requests = Arc::new(AtomicU64::new(0));
        let tasks = TaskTracker::new();
        let (name, counter, stopped) = (name.to_owned(), requests.clone(), stop.clone());
        tasks.clone().spawn(async move {
            while let Some(Ok((stream, _))) = stopped.run_until_cancelled(listener.accept()).await {
                let (name, counter, stopped) = (name.clone(), counter.clone(), stopped.clone());
                tasks.spawn(async move {
                    let service = hyper::service::service_fn(move |request| answer(name.clone(), counter.clone(), request));
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let connection = builder.serve_connection(TokioIo::new(stream), service);
                    // A client that goes away ends its own connection and nothing else.
                    stopped.run_until_cancelled(connection).await.map(|_| ()).unwrap_or_default();
                });
            }
        });
        Ok(Self { address, requests, _stop: stop.drop_guard() })
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

async fn answer(name: String, counter: Arc<AtomicU64>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    counter.fetch_add(1, Ordering::Relaxed);
    let mut headers = BTreeMap::<String, String>::new();
    for (key, value) in request.headers() {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        headers.entry(key.to_string()).and_modify(|all| *all = format!("{all}, {value}")).or_insert(value);
    }
    let mut seen = Seen {
        name,
        method: request.method().to_string(),
        path: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
        version: format!("{:?}", request.version()),
        headers,
        body: 0,
    };
    seen.body = request.into_body().collect().await.map(|b| b.to_bytes().len()).unwrap_or_default();
    let body = serde_json::to_vec(&seen).unwrap_or_default();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    response.headers_mut().insert("content-type", ::http::HeaderValue::from_static("application/json"));
    Ok(response)
}
