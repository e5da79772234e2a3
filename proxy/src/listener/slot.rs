//! A listener on one worker: its sockets stay while its configuration is replaced under them.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::Poll;

use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

use super::accept;
use super::connection::Connection;
use crate::access_log::Logs;
use crate::http::Http;
use crate::metrics::standard::Reporter;
use crate::signal::{Signal, Subscription};
use crate::sockets::Listening;
use crate::tables::ActiveListener;
use crate::tls::Acceptor;
use crate::worker::Worker;
use crate::xds::decode::Address;
use crate::xds::listener::chain::{FilterChain, Terminal};
use crate::xds::listener::{Direction, Listener};

/// A filter chain on one worker.
#[derive(Debug)]
pub struct Chain {
    /// Its configuration.
    pub config: Arc<FilterChain>,
    /// Its TLS; a context that could not be prepared refuses connections.
    pub tls: Option<Result<Acceptor, String>>,
    /// Its connection manager, if it speaks HTTP.
    pub http: Option<Rc<Http>>,
    /// The access logs of its TCP proxy.
    pub logs: Logs,
    /// From which side it reports standard metrics, if from any.
    pub reporter: Option<Reporter>,
}

/// One configuration of a listener.
#[derive(Debug)]
pub struct Runtime {
    /// The listener with its routes.
    pub active: Arc<ActiveListener>,
    chains: Vec<Rc<Chain>>,
    own_logs: Logs,
}

impl Runtime {
    /// The runtime form of a chain.
    #[must_use]
    pub fn chain(&self, config: &Arc<FilterChain>) -> Option<Rc<Chain>> {
        self.chains.iter().find(|c| Arc::ptr_eq(&c.config, config)).map(Rc::clone)
    }

    /// Where connections are logged that no chain serves: the listener's own access logs, or else those of the
    /// first chain that has any.
    #[must_use]
    pub fn logs(&self) -> &Logs {
        let mut chains = self.chains.iter().map(|c| c.http.as_ref().map_or(&c.logs, |http| &http.logs));
        if self.own_logs.is_empty() {
            chains.find(|l| !l.is_empty()).unwrap_or(&self.own_logs)
        } else {
            &self.own_logs
        }
    }
}

/// From which side a chain reports standard metrics. A listener without a direction does so only when it is asked for:
/// then whoever asks clients for their certificates is taken for the server's side.
fn reporter(worker: &Worker, listener: &Listener, chain: &FilterChain) -> Option<Reporter> {
    match listener.direction {
        Direction::Inbound => Some(Reporter::Destination),
        Direction::Outbound => Some(Reporter::Source),
        Direction::Unspecified if !worker.reports_all => None,
        Direction::Unspecified if chain.tls.as_ref().is_some_and(|tls| tls.require_client_certificate) => {
            Some(Reporter::Destination)
        }
        Direction::Unspecified => Some(Reporter::Source),
    }
}

/// A listener on one worker.
#[derive(Debug)]
pub struct Slot {
    worker: Weak<Worker>,
    current: RefCell<Rc<Runtime>>,
    closed: CancellationToken,
    accepting: RefCell<CancellationToken>,
    /// Told when the configuration is another, or gone.
    changed: Rc<Signal>,
}

impl Slot {
    /// Opens a listener: from now on it accepts, if it has sockets of its own.
    #[must_use]
    pub fn open(worker: &Rc<Worker>, active: &Arc<ActiveListener>) -> Rc<Self> {
        let slot = Rc::new(Self {
            worker: Rc::downgrade(worker),
            current: RefCell::new(Rc::new(runtime(worker, active, None))),
            closed: CancellationToken::new(),
            accepting: RefCell::default(),
            changed: Rc::default(),
        });
        slot.accept(worker, active);
        slot
    }

    /// Takes another configuration; open connections go on under it where they fit into it.
    pub fn update(self: &Rc<Self>, active: &Arc<ActiveListener>) {
        let old = self.runtime();
        if Arc::ptr_eq(&old.active, active) {
            return;
        }
        let Some(worker) = self.worker.upgrade() else { return };
        let next = runtime(&worker, active, Some(&old));
        *self.current.borrow_mut() = Rc::new(next);
        if !Arc::ptr_eq(&old.active.sockets, &active.sockets) {
            self.accept(&worker, active);
        }
        self.changed.raise();
    }

    /// The chain that serves this one's connections under the configuration of this moment.
    fn successor(&self, old: &FilterChain) -> Option<Rc<Chain>> {
        let same =
            |c: &&Rc<Chain>| c.config.matches == old.matches && c.config.tls.is_some() == old.tls.is_some();
        self.runtime().chains.iter().find(same).map(Rc::clone)
    }

    /// Ends when the connections of this chain have no place any more.
    pub async fn outlived(&self, chain: &FilterChain) {
        let mut changes = self.changed.subscribe();
        std::future::poll_fn(|cx| {
            if changes.changed(cx) && self.has_outlived(chain) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn has_outlived(&self, chain: &FilterChain) -> bool {
        self.is_closed() || self.successor(chain).is_none()
    }

    /// Accepts on the sockets of this configuration, and no more on those of the one before.
    fn accept(self: &Rc<Self>, worker: &Rc<Worker>, active: &Arc<ActiveListener>) {
        let stop = self.closed.child_token();
        self.accepting.replace(stop.clone()).cancel();
        let sockets = match active.sockets.of(worker.index) {
            Ok(sockets) => sockets,
            Err(error) => {
                tracing::error!(%error, listener = %active.listener.name, "sockets cannot be shared");
                return;
            }
        };
        for socket in sockets {
            let (slot, of, stop) = (Rc::clone(self), Rc::clone(worker), stop.clone());
            let started = match socket {
                Listening::Tcp(socket) => TcpListener::from_std(socket)
                    .map(|s| worker.connections.spawn_local(accept::tcp(slot, of, s, stop))),
                Listening::Unix(socket) => UnixListener::from_std(socket)
                    .map(|s| worker.connections.spawn_local(accept::unix(slot, of, s, stop))),
            };
            if let Err(error) = started {
                tracing::error!(%error, listener = %active.listener.name, "socket cannot be used");
            }
        }
    }

    /// The configuration of this moment.
    #[must_use]
    pub fn runtime(&self) -> Rc<Runtime> {
        Rc::clone(&self.current.borrow())
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.runtime().active.listener.addresses.iter().filter_map(Address::socket).collect()
    }

    /// Whether the listener is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Accepts nothing more: what is connected is told to end, and ends in its own time.
    pub fn close(&self) {
        self.closed.cancel();
        self.changed.raise();
    }
}

fn runtime(worker: &Rc<Worker>, active: &Arc<ActiveListener>, old: Option<&Runtime>) -> Runtime {
    let listener = &active.listener;
    let all = listener.chains.iter().chain(&listener.default_chain);
    let chains: Vec<Rc<Chain>> = all
        .map(|config| match old.and_then(|o| o.chain(config)) {
            Some(chain) => chain,
            None => Rc::new(chain(worker, listener, config)),
        })
        .collect();
    for chain in &chains {
        if let (Some(http), Terminal::Http(config)) = (&chain.http, &chain.config.terminal)
            && let Some(routes) = active.routes(&config.routes)
        {
            http.set_routes(routes);
        }
    }
    let own_logs = Logs::new(&listener.access_logs, worker);
    Runtime { active: Arc::clone(active), chains, own_logs }
}

fn chain(worker: &Rc<Worker>, listener: &Listener, config: &Arc<FilterChain>) -> Chain {
    let tls = config.tls.as_ref().map(|tls| worker.shared.secrets.acceptor(tls).map_err(|e| e.to_string()));
    if let Some(Err(error)) = &tls {
        tracing::warn!(%error, listener = %listener.name, chain = %config.name, "tls of a filter chain cannot be prepared");
    }
    let reporter = reporter(worker, listener, config);
    let (http, logs) = match &config.terminal {
        Terminal::Http(hcm) => (Some(Http::new(Arc::clone(hcm), worker, reporter)), Logs::default()),
        Terminal::Tcp(tcp) => (None, Logs::new(&tcp.access_logs, worker)),
        Terminal::Close => (None, Logs::default()),
    };
    Chain { config: Arc::clone(config), tls, http, logs, reporter }
}

/// Where a connection is served: its listener and chain, kept up to date.
#[derive(Debug)]
pub struct Place {
    slot: Rc<Slot>,
    runtime: RefCell<Rc<Runtime>>,
    http: RefCell<Rc<Http>>,
    chain: RefCell<Rc<Chain>>,
}

impl Place {
    /// A connection on this chain.
    #[must_use]
    pub fn new(slot: Rc<Slot>, runtime: Rc<Runtime>, chain: Rc<Chain>, http: Rc<Http>) -> Self {
        Self { slot, runtime: RefCell::new(runtime), http: RefCell::new(http), chain: RefCell::new(chain) }
    }

    /// The connection manager for the next request. When the listener was replaced, the connection goes on under
    /// the new one's chain for the same connections; when it is gone, it ends in its own time under the last one.
    ///
    /// # Errors
    ///
    /// The connection manager of before, to answer with, when there is no such chain: what was configured since may
    /// forbid what this connection was let in for.
    pub fn http(&self, connection: &Connection) -> Result<Rc<Http>, Rc<Http>> {
        let current = self.slot.runtime();
        if self.slot.is_closed() {
            connection.drain();
        }
        if Rc::ptr_eq(&current, &self.runtime.borrow()) {
            return Ok(Rc::clone(&self.http.borrow()));
        }
        let successor = self.slot.successor(&self.chain.borrow().config);
        let Some((chain, http)) = successor.and_then(|c| c.http.clone().map(|http| (c, http))) else {
            connection.drain();
            return Err(Rc::clone(&self.http.borrow()));
        };
        *self.chain.borrow_mut() = chain;
        *self.http.borrow_mut() = Rc::clone(&http);
        *self.runtime.borrow_mut() = current;
        Ok(http)
    }

    /// Changes of the listener.
    #[must_use]
    pub fn changes(&self) -> Subscription {
        self.slot.changed.subscribe()
    }

    /// Whether the connection has no place any more.
    #[must_use]
    pub fn is_outlived(&self) -> bool {
        self.slot.has_outlived(&self.chain.borrow().config)
    }
}
