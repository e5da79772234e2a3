//! The ports of a member: sockets and servers around what the other modules decide.

use std::convert::Infallible;
use std::sync::Arc;

use anyhow::Context;
use axum::http::{StatusCode, header};
use axum::routing::get;
use axum::{Extension, Router};
use ca::service::CertificateService;
use ca::tls::{ClientAuth, IdentityWatch, ServerContext, accept};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::mesh::workload_service_server::WorkloadServiceServer;
use xds::server::Ads;

use crate::api::gate::{Access, Gate, Peer};
use crate::api::{Api, rest};
use crate::config::Config;
use crate::join::Joining;
use crate::revoked::Refusing;

/// File with the operator's bearer token, in the data folder.
const TOKEN_FILE: &str = "admin-token";

/// Who may call the operator API: anybody in `istiod dev`, else whoever has the token, which is made at first start.
///
/// # Errors
///
/// When the token cannot be read or written.
pub(crate) fn access(config: &Config) -> anyhow::Result<Access> {
    if config.open_admin {
        return Ok(Access::Open);
    }
    let store = ca::keystore::KeyStore::open(config.data_dir.join("operator"))?;
    if let Some(token) = store.load(TOKEN_FILE)? {
        return Ok(Access::Bearer(String::from_utf8(token.to_vec())?.trim().into()));
    }
    let token = ca::authn::Secret::random().context("no token for the operator API")?;
    store.store(TOKEN_FILE, token.expose().as_bytes())?;
    tracing::info!(file = %store.dir().join(TOKEN_FILE).display(), "made a token for the operator API");
    Ok(Access::Bearer(token.expose().into()))
}

/// xDS, certificates and registration, over TLS.
///
/// # Errors
///
/// When TLS cannot be set up.
pub(crate) fn serve_agents(
    listener: TcpListener,
    identity: IdentityWatch,
    ads: Ads,
    joining: Joining,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let clock = joining.clock.clone();
    let refusing = Refusing(joining.revoked.clone());
    let config = ca::tls::server_config_with_roots(identity, ClientAuth::Optional, &[b"h2"])?;
    let connections = accept::incoming(listener, ServerContext::from(config), tasks, stop.clone());
    let router = xds::server::tune(tonic::transport::Server::builder())
        .layer(refusing)
        .add_service(ads)
        .add_service(CertificateService::new(Arc::new(joining.clone()), clock).into_server())
        .add_service(WorkloadServiceServer::new(joining));
    let (stopped, stop) = (stop.clone().cancelled_owned(), stop.clone());
    tasks.spawn(async move {
        let too_late = async {
            stop.cancelled().await;
            tokio::time::sleep(GRACE).await;
        };
        tokio::select! {
            served = router.serve_with_incoming_shutdown(connections, stopped) => {
                if let Err(error) = served {
                    tracing::error!(%error, "the xDS port has ended");
                }
            }
            () = too_late => {}
        }
    });
    Ok(())
}

/// The operator API; over TLS when there is an identity for it.
///
/// # Errors
///
/// When TLS cannot be set up.
pub fn serve_operators(
    listener: TcpListener,
    identity: Option<IdentityWatch>,
    api: Api,
    gate: &Gate,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let router = rest::router(api, gate);
    match identity {
        None => serve(listener, router, tasks, stop),
        Some(identity) => {
            let config = ca::tls::server_config(identity, ClientAuth::Optional, &[b"h2", b"http/1.1"])?;
            let mut connections =
                accept::incoming(listener, ServerContext::from(config), tasks, stop.clone());
            let (tasks, stop) = (tasks.clone(), stop.clone());
            tasks.clone().spawn(async move {
                let open = Open::default();
                while let Some(Some(Ok(connection))) = stop.run_until_cancelled(connections.next()).await {
                    let certificates = connection.peer().clone();
                    let stream = connection.into_stream();
                    let address = stream.get_ref().0.peer_addr().ok();
                    let router = router.clone().layer(Extension(Peer { address, certificates }));
                    spawn_connection(stream, router, &open, &tasks);
                }
                open.end().await;
            });
        }
    }
    Ok(())
}

/// Whether a member serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Not yet or not any more, because of this.
    Not(&'static str),
    /// It does, and has all that was acknowledged before it started.
    Ready,
}

/// `/metrics` and `/ready`, for everybody.
pub(crate) fn serve_metrics(
    listener: TcpListener,
    registry: Registry,
    readiness: watch::Receiver<Readiness>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let registry = Arc::new(registry);
    let metrics = get(move || {
        let mut text = String::new();
        // Writing into a string cannot fail.
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap_or_default();
        async move {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
        }
    });
    let ready = get(move || {
        let told = match *readiness.borrow() {
            Readiness::Ready => (StatusCode::OK, "ready\n".to_owned()),
            Readiness::Not(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        };
        async move { told }
    });
    let router = Router::new().route("/metrics", metrics).route("/ready", ready);
    serve(listener, router, tasks, stop);
}

fn serve(listener: TcpListener, router: Router, tasks: &TaskTracker, stop: &CancellationToken) {
    let (tasks, stop) = (tasks.clone(), stop.clone());
    tasks.clone().spawn(async move {
        let open = Open::default();
        while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
            match accepted {
                Ok((stream, address)) => {
                    stream.set_nodelay(true).unwrap_or_default();
                    let peer = Peer { address: Some(address), ..Peer::default() };
                    spawn_connection(stream, router.clone().layer(Extension(peer)), &open, &tasks);
                }
                Err(error) => {
                    // Out of file descriptors: what is open may close meanwhile.
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        open.end().await;
    });
}

/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// Open calls may take this long to end.
const GRACE: std::time::Duration = std::time::Duration::from_secs(2);

/// The open connections of one port.
#[derive(Default)]
struct Open {
    graceful: GracefulShutdown,
    cut: CancellationToken,
}

impl Open {
    /// Lets open calls end within [`GRACE`], and cuts what is left.
    async fn end(self) {
        tokio::time::timeout(GRACE, self.graceful.shutdown()).await.unwrap_or_default();
        self.cut.cancel();
    }
}

fn spawn_connection<IO>(io: IO, router: Router, open: &Open, tasks: &TaskTracker)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(hyper_util::rt::TokioTimer::new());
    let service = TowerToHyperService::new(router.into_service::<hyper::body::Incoming>());
    let connection = builder.serve_connection(TokioIo::new(io), service).into_owned();
    let (connection, cut) = (open.graceful.watch(connection), open.cut.clone());
    tasks.spawn(async move {
        // A client that goes away ends its own connection and nothing else.
        cut.run_until_cancelled(connection).await.unwrap_or(Ok(())).unwrap_or_default();
        Ok::<(), Infallible>(())
    });
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_call_that_does_not_end_holds_up_the_stop_for_no_longer_than_the_grace() {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let called = Arc::new(tokio::sync::Notify::new());
        let notify = called.clone();
        let never = get(move || async move {
            notify.notify_one();
            std::future::pending::<&str>().await
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener, Router::new().route("/", never), &tasks, &stop);
        let mut caller = tokio::net::TcpStream::connect(address).await.unwrap();
        caller.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        called.notified().await;
        stop.cancel();
        tasks.close();
        tokio::time::timeout(GRACE * 3, tasks.wait()).await.unwrap();
    }
}
