//! Takes connections and brings them to their filter chains.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt as _;
use socket2::SockRef;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::detect::{self, ClientHello};
use super::filter_chain::{Shown, find};
use super::original_dst;
use super::proxy_protocol::{Proxied, parse, tlvs};
use super::slot::{Chain, Place, Runtime, Slot};
use crate::access_log::Facts;
use crate::authz::{self, Subject, Verdict};
use crate::http::flags::Flags;
use crate::http::server;
use crate::overload::{Admitted, Excess};
use crate::tcp;
use crate::tcp::io::{Io, Socket};
use crate::worker::Worker;
use crate::xds::listener::chain::Terminal;
use crate::xds::listener::{Listener, ListenerFilterKind};
use crate::xds::proxy_protocol::PassTlvs;
use crate::xds::rbac::Rbac;

/// The pause after a failure to accept, such as running out of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a TCP connection goes on after its filter chain is gone, before it is cut.
const DRAIN: Duration = Duration::from_secs(5);

/// Accepts TCP connections until the listener is gone or the proxy drains.
pub async fn tcp(slot: Rc<Slot>, worker: Rc<Worker>, socket: TcpListener, stop: CancellationToken) {
    let mut accepting = worker.overload.accepting();
    loop {
        let accepts = *accepting.borrow_and_update();
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            () = worker.drain.draining() => None,
            Ok(()) = accepting.changed() => continue,
            accepted = socket.accept(), if accepts => Some(accepted),
        };
        if accepted.is_none() && worker.drain.leaves_sockets_open() && !slot.is_closed() {
            return; // whoever has the socket now serves who waits in its queue
        }
        // Who is connected already is still served; then the kernel turns others away.
        let Some(accepted) = accepted.or_else(|| socket.accept().now_or_never()) else {
            return stop_listening(&slot, SockRef::from(&socket));
        };
        match accepted {
            Ok((stream, remote)) => {
                let Some(admitted) = admit(&slot, &worker) else { continue };
                let (slot, tracked) = (Rc::clone(&slot), Rc::clone(&worker));
                worker.connections.spawn_local(async move {
                    let _admitted = admitted;
                    if let Err(error) = Box::pin(serve(slot, tracked, stream, remote)).await {
                        tracing::debug!(%error, %remote, "connection refused");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, listener = %slot.runtime().active.listener.name, "connection not accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Lets a new connection in, or counts why it is closed.
fn admit(slot: &Slot, worker: &Worker) -> Option<Admitted> {
    let listener = Arc::clone(&slot.runtime().active.listener.name);
    let excess = match worker.overload.admit(&listener, || worker.random()) {
        Ok(admitted) => return Some(admitted),
        Err(excess) => excess,
    };
    let counter = match excess {
        Excess::Connections => "envoy_listener_downstream_global_cx_overflow",
        Excess::OfListener => "envoy_listener_downstream_cx_overflow",
        Excess::Overload => "envoy_listener_downstream_cx_overload_reject",
    };
    worker.shared.registry.counter(counter, &[("listener", &listener)]).inc();
    None
}

/// Tables may hold the socket for longer than this worker accepts on it; nobody shall wait in its queue.
fn stop_listening(slot: &Slot, socket: SockRef<'_>) {
    if let Err(error) = socket.shutdown(std::net::Shutdown::Both) {
        let listener = &slot.runtime().active.listener.name;
        tracing::debug!(%error, %listener, "socket was not listening any more");
    }
}

/// Accepts connections on a Unix socket until the listener is gone or the proxy drains.
pub async fn unix(slot: Rc<Slot>, worker: Rc<Worker>, socket: UnixListener, stop: CancellationToken) {
    let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut accepting = worker.overload.accepting();
    loop {
        let accepts = *accepting.borrow_and_update();
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            () = worker.drain.draining() => None,
            Ok(()) = accepting.changed() => continue,
            accepted = socket.accept(), if accepts => Some(accepted),
        };
        if accepted.is_none() && worker.drain.leaves_sockets_open() && !slot.is_closed() {
            return; // whoever has the socket now serves who waits in its queue
        }
        let Some(accepted) = accepted.or_else(|| socket.accept().now_or_never()) else {
            return stop_listening(&slot, SockRef::from(&socket));
        };
        match accepted {
            Ok((stream, _)) => {
                let Some(admitted) = admit(&slot, &worker) else { continue };
                let (slot, tracked) = (Rc::clone(&slot), Rc::clone(&worker));
                worker.connections.spawn_local(async move {
                    let _admitted = admitted;
                    let connection = Connection::new(tracked.connection_id(), nowhere, nowhere, nowhere);
                    let socket = Socket::unix(stream);
                    let served = Box::pin(dispatch(slot, tracked, connection, socket, Seen::default()));
                    if let Err(error) = served.await {
                        tracing::debug!(%error, "connection refused");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, listener = %slot.runtime().active.listener.name, "connection not accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// What the first bytes told.
#[derive(Debug)]
struct Seen {
    transport: &'static str,
    server_name: Option<String>,
    protocols: Vec<String>,
}

impl Default for Seen {
    fn default() -> Self {
        Self { transport: "raw_buffer", server_name: None, protocols: Vec::new() }
    }
}

async fn serve(slot: Rc<Slot>, worker: Rc<Worker>, stream: TcpStream, remote: SocketAddr) -> io::Result<()> {
    worker.refresh();
    stream.set_nodelay(true)?;
    let listener = Arc::clone(&slot.runtime().active.listener);
    let local = destination(&listener, &stream)?;
    let mut connection = Connection::new(worker.connection_id(), local, remote, remote);
    let slot = if listener.use_original_dst { worker.listener_at(local).unwrap_or(slot) } else { slot };
    let listener = Arc::clone(&slot.runtime().active.listener);
    let mut stream = stream;
    let mut looked = Looked::default();
    let looking = Box::pin(look(&listener, &mut stream, &mut connection, &mut looked));
    match listener.filters_timeout {
        Some(timeout) => match tokio::time::timeout(timeout, looking).await {
            Ok(done) => done?,
            Err(_) if listener.continue_on_filters_timeout => {}
            Err(_) => return Err(io::Error::other("nothing came in time")),
        },
        None => looking.await?,
    }
    let mut socket = Socket::tcp(stream);
    socket.put_back(looked.ahead.freeze());
    dispatch(slot, worker, connection, socket, looked.seen).await
}

fn destination(listener: &Listener, stream: &TcpStream) -> io::Result<SocketAddr> {
    let asks = listener.use_original_dst
        || listener.filters.iter().any(|f| f.kind == ListenerFilterKind::OriginalDst);
    match asks.then(|| original_dst::of(stream)).flatten() {
        Some(original) => Ok(original),
        None => stream.local_addr(),
    }
}

/// The bytes that were read to look at them, and what they told.
#[derive(Debug, Default)]
struct Looked {
    ahead: BytesMut,
    seen: Seen,
}

/// Runs the listener filters. What was read and told so far stays when this is given up in the middle.
async fn look(
    listener: &Listener,
    stream: &mut TcpStream,
    connection: &mut Connection,
    looked: &mut Looked,
) -> io::Result<()> {
    let Looked { ahead, seen } = looked;
    let port = connection.local.port();
    for filter in &listener.filters {
        if filter.disabled.as_ref().is_some_and(|p| p.matches(port)) {
            continue;
        }
        match &filter.kind {
            ListenerFilterKind::OriginalDst => {}
            ListenerFilterKind::ProxyProtocol { optional, v1, v2, pass } => {
                proxied(stream, ahead, connection, *optional, (*v1, *v2), pass).await?;
            }
            ListenerFilterKind::TlsInspector => {
                if let Some(hello) = tls_hello(stream, ahead).await? {
                    seen.transport = "tls";
                    connection.server_name.clone_from(&hello.server_name);
                    (seen.server_name, seen.protocols) = (hello.server_name, hello.alpn);
                }
            }
            ListenerFilterKind::HttpInspector => {
                if seen.transport != "tls"
                    && let Some(protocol) = http_version(stream, ahead).await?
                {
                    seen.protocols = vec![protocol.to_owned()];
                }
            }
        }
    }
    Ok(())
}

/// Reads more; `false` at the end of the stream.
async fn more(stream: &mut TcpStream, ahead: &mut BytesMut) -> io::Result<bool> {
    ahead.reserve(2048);
    Ok(stream.read_buf(ahead).await? > 0)
}

async fn proxied(
    stream: &mut TcpStream,
    ahead: &mut BytesMut,
    connection: &mut Connection,
    optional: bool,
    (v1, v2): (bool, bool),
    pass: &PassTlvs,
) -> io::Result<()> {
    loop {
        match parse(ahead) {
            Proxied::Header { length, addresses } => {
                let allowed = if ahead.first() == Some(&b'P') { v1 } else { v2 };
                if !allowed {
                    return Err(io::Error::other("this version of the proxy protocol is not accepted"));
                }
                let header = ahead.split_to(length);
                if let Some((source, destination)) = addresses {
                    let passed = tlvs(&header).into_iter().filter(|tlv| pass.takes(tlv.kind));
                    connection.tlvs = passed.collect();
                    (connection.remote, connection.local) = (source, destination);
                }
                return Ok(());
            }
            Proxied::Invalid if optional => return Ok(()),
            Proxied::Invalid => return Err(io::Error::other("no proxy protocol header")),
            Proxied::NeedMore => {
                if !more(stream, ahead).await? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
    }
}

async fn tls_hello(stream: &mut TcpStream, ahead: &mut BytesMut) -> io::Result<Option<ClientHello>> {
    loop {
        match detect::tls(ahead) {
            detect::Tls::Hello(hello) => return Ok(Some(hello)),
            detect::Tls::No => return Ok(None),
            detect::Tls::NeedMore => {
                if !more(stream, ahead).await? {
                    return Ok(None);
                }
            }
        }
    }
}

async fn http_version(stream: &mut TcpStream, ahead: &mut BytesMut) -> io::Result<Option<&'static str>> {
    loop {
        match detect::http(ahead) {
            detect::Http::NeedMore => {
                if !more(stream, ahead).await? {
                    return Ok(None);
                }
            }
            found
            @ (detect::Http::Http10 | detect::Http::Http11 | detect::Http::Http2 | detect::Http::No) => {
                return Ok(found.application_protocol());
            }
        }
    }
}

/// Chooses the chain, does the handshake, asks the rules, and serves.
async fn dispatch(
    slot: Rc<Slot>,
    worker: Rc<Worker>,
    mut connection: Connection,
    socket: Socket,
    seen: Seen,
) -> io::Result<()> {
    let runtime = slot.runtime();
    let Some(chain) = choose(&runtime, &connection, &seen) else {
        no_chain(&worker, &runtime, &connection);
        return Err(io::Error::other("no filter chain"));
    };
    let io = match &chain.tls {
        None => Io::Plain(socket),
        Some(Err(error)) => return Err(io::Error::other(error.clone())),
        Some(Ok(acceptor)) => {
            let handshake = Box::pin(acceptor.accept(socket));
            let (io, peer) = match chain.config.handshake_timeout {
                Some(timeout) => tokio::time::timeout(timeout, handshake).await??,
                None => handshake.await?,
            };
            if chain.config.tls.as_ref().is_some_and(|t| t.require_sni) && peer.server_name.is_none() {
                return Err(io::Error::other("no server name"));
            }
            connection.own_uris = acceptor.own_uris();
            if connection.server_name.is_none() {
                connection.server_name.clone_from(&peer.server_name);
            }
            connection.peer = Some(peer);
            io
        }
    };
    if let Some(policy) = chain.config.rbac.iter().find_map(|rbac| denied(&worker, rbac, &connection)) {
        let details = format!("rbac_access_denied_matched_policy[{policy}]");
        let logs = chain.http.as_ref().map_or(&chain.logs, |http| &http.logs);
        logs.write_facts(&Facts::refused(&connection, Flags::NONE, &details), &worker);
        return Err(io::Error::other(details));
    }
    let connection = Rc::new(connection);
    match (&chain.config.terminal, &chain.http) {
        (Terminal::Http(_), Some(http)) => {
            let http = Rc::clone(http);
            let place = Place::new(slot, runtime, Rc::clone(&chain), Rc::clone(&http));
            server::serve(http, place, connection, io).await;
        }
        (Terminal::Tcp(config), _) => {
            let ends = async {
                slot.outlived(&chain.config).await;
                tokio::time::sleep(DRAIN).await;
                connection.cut();
                std::future::pending().await
            };
            tokio::select! {
                () = tcp::serve(&worker, &runtime, &chain, config, &connection, io) => {}
                () = ends => {}
            }
        }
        (Terminal::Http(_) | Terminal::Close, _) => {}
    }
    Ok(())
}

fn choose(runtime: &Runtime, connection: &Connection, seen: &Seen) -> Option<Rc<Chain>> {
    let listener = &runtime.active.listener;
    let shown = Shown {
        local: connection.local,
        remote: connection.remote,
        direct_remote: connection.direct_remote,
        server_name: seen.server_name.as_deref(),
        transport: seen.transport,
        protocols: &seen.protocols,
    };
    let config = find(&listener.chains, &shown).or(listener.default_chain.as_ref())?;
    runtime.chain(config)
}

/// Nobody was configured to serve this connection.
fn no_chain(worker: &Worker, runtime: &Runtime, connection: &Connection) {
    let name = &*runtime.active.listener.name;
    worker.shared.registry.counter("envoy_listener_no_filter_chain_match", &[("listener", name)]).inc();
    let facts = Facts::refused(connection, Flags::NO_ROUTE, "filter_chain_not_found");
    runtime.logs().write_facts(&facts, worker);
}

/// The name of the policy that turns the connection away, `none` when no policy lets it in.
fn denied<'r>(worker: &Worker, rbac: &'r Rbac, connection: &Connection) -> Option<&'r str> {
    let rules = rbac.rules.as_ref()?;
    let subject = Subject {
        destination: connection.local,
        direct_remote: connection.direct_remote,
        remote: connection.remote,
        peer: connection.peer.as_ref(),
        server_name: connection.server_name.as_deref(),
        request: None,
        metadata: None,
    };
    let count = |name| worker.shared.registry.counter(name, &[]).inc();
    match authz::allow(rules, &subject) {
        Verdict::Allow(_) => {
            count("envoy_tcp_rbac_allowed");
            None
        }
        Verdict::Deny(policy) => {
            count("envoy_tcp_rbac_denied");
            Some(policy.unwrap_or("none"))
        }
    }
}
