//! Applications on as many loopback addresses as a test wants, each an endpoint that comes and goes: what was taken out of
//! discovery goes on to answer, and it is seen who still speaks to it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::http::{Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// Endpoints' addresses are counted from here, below those of tests' proxies.
const FIRST: Ipv4Addr = Ipv4Addr::new(127, 64, 0, 1);
/// And begin there again after so many.
const ADDRESSES: u32 = 1 << 20;
/// What they answer.
const BODY: &[u8] = &[b'.'; 200];

/// The protocol that an endpoint speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
}

/// Running endpoints; they stop when dropped.
#[derive(Debug)]
pub struct Fleet {
    ports: [u16; 2],
    shared: Arc<Shared>,
    _stop: DropGuard,
}

#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    requests: AtomicU64,
    begun: Instant,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Known {
    next: u32,
    endpoints: BTreeMap<Ipv4Addr, Arc<Endpoint>>,
}

/// One of them.
#[derive(Debug)]
struct Endpoint {
    /// Connections to it that are open.
    open: AtomicU64,
    /// Milliseconds after the beginning at which it was removed; 0: it was not.
    removed: AtomicU64,
    /// Milliseconds after the beginning at which it was asked last after that.
    asked: AtomicU64,
}

impl Fleet {
    /// Listens on every loopback address, on a port for each protocol.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn start() -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            known: Mutex::default(),
            requests: AtomicU64::new(0),
            begun: Instant::now(),
            tasks: TaskTracker::new(),
            stop: stop.clone(),
        });
        let mut ports = [0; 2];
        for (port, speaks) in ports.iter_mut().zip([Speaks::Http1, Speaks::Http2]) {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
            *port = listener.local_addr()?.port();
            shared.tasks.spawn(accept(Arc::clone(&shared), listener, speaks));
        }
        Ok(Self { ports, shared, _stop: stop.drop_guard() })
    }

    /// An endpoint that was not there before.
    pub fn add(&self, speaks: Speaks) -> SocketAddr {
        let mut known = self.shared.known();
        let ip = Ipv4Addr::from_bits(FIRST.to_bits() + known.next % ADDRESSES);
        known.next += 1;
        let endpoint =
            Endpoint { open: AtomicU64::new(0), removed: AtomicU64::new(0), asked: AtomicU64::new(0) };
        known.endpoints.insert(ip, Arc::new(endpoint));
        let [http1, http2] = self.ports;
        SocketAddr::from((ip, if speaks == Speaks::Http1 { http1 } else { http2 }))
    }

    /// Nobody is sent there any more: who comes after a while is wrong.
    pub fn remove(&self, address: SocketAddr) {
        let IpAddr::V4(ip) = address.ip() else { return };
        let now = self.shared.now();
        let known = self.shared.known();
        if let Some(endpoint) = known.endpoints.get(&ip) {
            endpoint.removed.store(now, Ordering::Relaxed);
        }
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Open connections: all, and those to endpoints that were removed longer ago than `grace`.
    #[must_use]
    pub fn connections(&self, grace: Duration) -> (u64, u64) {
        let now = self.shared.now();
        let grace = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.shared.known().endpoints.values().fold((0, 0), |(all, left), endpoint| {
            let open = endpoint.open.load(Ordering::Relaxed);
            let removed = endpoint.removed.load(Ordering::Relaxed);
            (all + open, left + if removed != 0 && now > removed + grace { open } else { 0 })
        })
    }

    /// How long after its removal an endpoint was asked at most.
    #[must_use]
    pub fn longest_after_removal(&self) -> Duration {
        let known = self.shared.known();
        let after = known.endpoints.values().map(|endpoint| {
            let asked = endpoint.asked.load(Ordering::Relaxed);
            asked.saturating_sub(endpoint.removed.load(Ordering::Relaxed))
        });
        Duration::from_millis(after.max().unwrap_or_default())
    }
}

impl Shared {
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since the beginning.
    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, speaks: Speaks) {
    while let Some(Ok((stream, _))) = shared.stop.run_until_cancelled(listener.accept()).await {
        let (of, stop) = (Arc::clone(&shared), shared.stop.clone());
        shared.tasks.spawn(async move {
            // A client that goes away ends its own connection and nothing else.
            stop.run_until_cancelled(serve(&of, stream, speaks)).await
        });
    }
}

async fn serve(shared: &Arc<Shared>, stream: TcpStream, speaks: Speaks) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let IpAddr::V4(ip) = stream.local_addr()?.ip() else { return Ok(()) };
    let Some(endpoint) = shared.known().endpoints.get(&ip).cloned() else { return Ok(()) };
    endpoint.open.fetch_add(1, Ordering::Relaxed);
    let asked = Arc::clone(&endpoint);
    let of = Arc::clone(shared);
    let service = service_fn(move |request| answer(Arc::clone(&of), Arc::clone(&asked), request));
    let io = TokioIo::new(stream);
    match speaks {
        Speaks::Http1 => {
            let served = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
            served.unwrap_or_default();
        }
        Speaks::Http2 => {
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder.serve_connection(io, service).await.unwrap_or_default();
        }
    }
    endpoint.open.fetch_sub(1, Ordering::Relaxed);
    Ok(())
}

async fn answer(
    shared: Arc<Shared>,
    endpoint: Arc<Endpoint>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    shared.requests.fetch_add(1, Ordering::Relaxed);
    if endpoint.removed.load(Ordering::Relaxed) != 0 {
        endpoint.asked.store(shared.now(), Ordering::Relaxed);
    }
    // A body that breaks off is the client's affair.
    request.into_body().collect().await.map(drop).unwrap_or_default();
    Ok(Response::new(Full::new(Bytes::from_static(BODY))))
}
