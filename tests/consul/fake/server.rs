//! The fake catalog behind HTTP/1.1: what blocks waits for a change.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request as HttpRequest, Response as HttpResponse};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::catalog::{Catalog, Request, Response};

/// A fake Consul that listens; it ends when it is dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    _ends: DropGuard,
}

struct Shared {
    catalog: Mutex<Catalog>,
    changes: watch::Sender<u64>,
}

impl Server {
    /// Serves a catalog on a port of its own.
    pub(crate) async fn start(catalog: Catalog) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let shared = Arc::new(Shared { catalog: Mutex::new(catalog), changes: watch::Sender::new(0) });
        tasks.spawn(accept(listener, shared.clone(), tasks.clone(), stop.clone()));
        Ok(Self { address, shared, _ends: stop.drop_guard() })
    }

    /// Changes the catalog, and wakes whoever waits for that.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Catalog)) {
        change(&mut self.shared.catalog.lock().unwrap());
        self.shared.changes.send_modify(|changes| *changes += 1);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, tasks: TaskTracker, stop: CancellationToken) {
    while let Some(Ok((stream, _))) = stop.run_until_cancelled(listener.accept()).await {
        let (shared, stop) = (shared.clone(), stop.clone());
        let service = service_fn(move |request| answer(shared.clone(), request));
        let connection =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tasks.spawn(async move { stop.run_until_cancelled(connection).await.is_some() });
    }
}

async fn answer(
    shared: Arc<Shared>,
    request: HttpRequest<Incoming>,
) -> Result<HttpResponse<Full<Bytes>>, Infallible> {
    let token = request.headers().get("x-consul-token").and_then(|t| t.to_str().ok()).unwrap_or_default();
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let (method, token) = (request.method().as_str().to_owned(), token.to_owned());
    let body = request.into_body().collect().await.map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    let request = Request::new(&method, &target, &token, body);
    let changed = shared.catalog.lock().unwrap().change(&request);
    let response = match changed {
        Some(response) => {
            shared.changes.send_modify(|changes| *changes += 1);
            response
        }
        None => wait(&shared, &request).await,
    };
    Ok(written(response))
}

/// The answer to a question, when there is something new.
async fn wait(shared: &Shared, request: &Request) -> Response {
    let mut changes = shared.changes.subscribe();
    let deadline = tokio::time::Instant::now() + request.wait();
    loop {
        changes.mark_unchanged();
        let (response, index) = shared.catalog.lock().unwrap().read(request);
        if request.index().is_none_or(|known| index > known) {
            return response;
        }
        if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
            return response;
        }
    }
}

fn written(response: Response) -> HttpResponse<Full<Bytes>> {
    let Response { status, headers, body } = response;
    let mut written = HttpResponse::builder().status(status);
    for (name, value) in BTreeMap::into_iter(headers) {
        written = written.header(name, value);
    }
    written.body(Full::new(Bytes::from(body))).unwrap()
}
