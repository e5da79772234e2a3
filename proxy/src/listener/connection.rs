//! What is known of a client's connection, for as long as it lives.

use std::cell::{Cell, OnceCell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use http::HeaderValue;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::http::flood::Resets;
use crate::http::timing::{OF_CONNECTION, Spare};
use crate::metrics::standard::{Numbered, Principals, Standard, Workload};
use crate::ratelimit::Bucket;
use crate::tcp::io::Io;
use crate::tls::Peer;
use crate::xds::filter::LocalRateLimit;
use crate::xds::proxy_protocol::Tlv;

/// A client's connection.
#[derive(Debug)]
pub struct Connection {
    /// Its number on this worker.
    pub id: u64,
    /// The address it was made to: the original one, where it was redirected.
    pub local: SocketAddr,
    /// The client: the other end, or whom the PROXY protocol names.
    pub remote: SocketAddr,
    /// The other end.
    pub direct_remote: SocketAddr,
    /// What the PROXY protocol says besides addresses and is handed on.
    pub tlvs: Box<[Tlv]>,
    /// The TLS session's peer; `None` on plain text.
    pub peer: Option<Peer>,
    /// Server name of the TLS hello, also when somebody else terminates it.
    pub server_name: Option<String>,
    /// URI names of our own certificate.
    pub own_uris: Arc<[String]>,
    /// Requests so far.
    pub requests: Cell<u32>,
    /// Requests that the client gave up, beside those that ended.
    pub resets: Cell<Resets>,
    /// A timer for its next request.
    pub timers: Spare,
    /// Requests under way.
    open: Cell<u32>,
    /// When the last one ended; at first, when the connection was made.
    ended: Cell<tokio::time::Instant>,
    /// Pieces of responses that wait for the client to take them.
    held: Cell<u32>,
    /// When the client took a piece last.
    taken: Cell<Option<tokio::time::Instant>>,
    stalled: Cell<bool>,
    draining: Cell<bool>,
    cut: CancellationToken,
    bucket: RefCell<Option<Bucket>>,
    told: RefCell<Option<(HeaderValue, Rc<Numbered<Workload>>)>>,
    principals: RefCell<Option<Rc<Numbered<Principals>>>>,
    origin: OnceCell<Rc<Origin>>,
    /// Who waits for the connection to leave HTTP/1.
    leaving: RefCell<Option<oneshot::Sender<Io>>>,
}

/// Who called and whom, as servers are told it by the PROXY protocol.
#[derive(Debug)]
pub struct Origin {
    /// Who.
    pub source: SocketAddr,
    /// Whom.
    pub destination: SocketAddr,
    /// What else the client's own header says.
    pub tlvs: Box<[Tlv]>,
    /// When the client's connection ended.
    ended: Cell<Option<tokio::time::Instant>>,
}

impl Origin {
    /// A caller whose connection is open.
    #[must_use]
    pub fn new(source: SocketAddr, destination: SocketAddr, tlvs: Box<[Tlv]>) -> Self {
        Self { source, destination, tlvs, ended: Cell::new(None) }
    }

    /// When the client's connection ended; `None` while it is open.
    #[must_use]
    pub fn ended(&self) -> Option<tokio::time::Instant> {
        self.ended.get()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(origin) = self.origin.get() {
            origin.ended.set(Some(tokio::time::Instant::now()));
        }
    }
}

impl Connection {
    /// A connection that was just made.
    #[must_use]
    pub fn new(id: u64, local: SocketAddr, remote: SocketAddr, direct_remote: SocketAddr) -> Self {
        Self {
            id,
            local,
            remote,
            direct_remote,
            tlvs: Box::default(),
            peer: None,
            server_name: None,
            own_uris: Arc::default(),
            requests: Cell::new(0),
            resets: Cell::default(),
            timers: Spare::new(OF_CONNECTION),
            open: Cell::new(0),
            ended: Cell::new(tokio::time::Instant::now()),
            held: Cell::new(0),
            taken: Cell::new(None),
            stalled: Cell::new(false),
            draining: Cell::new(false),
            cut: CancellationToken::new(),
            bucket: RefCell::new(None),
            told: RefCell::new(None),
            principals: RefCell::new(None),
            origin: OnceCell::new(),
            leaving: RefCell::default(),
        }
    }

    /// Who called and whom, for servers that are told.
    #[must_use]
    pub fn origin(&self) -> Rc<Origin> {
        let origin = || Rc::new(Origin::new(self.remote, self.local, self.tlvs.clone()));
        Rc::clone(self.origin.get_or_init(origin))
    }

    /// The stream below HTTP/1, for whoever goes on with it once the response is written.
    pub fn leave(&self) -> oneshot::Receiver<Io> {
        let (tell, told) = oneshot::channel();
        *self.leaving.borrow_mut() = Some(tell);
        told
    }

    /// Hands the stream on; nobody may be there to take it.
    pub fn leave_with(&self, io: Io) {
        if let Some(taker) = self.leaving.take() {
            drop(taker.send(io));
        }
    }

    /// Lets the connection end with the response to its next request.
    pub fn drain(&self) {
        self.draining.set(true);
    }

    /// Notes that a request has come.
    pub fn begin(&self) {
        self.open.set(self.open.get() + 1);
    }

    /// Notes that a request and its response are over.
    pub fn end(&self, now: tokio::time::Instant) {
        self.open.set(self.open.get().saturating_sub(1));
        self.ended.set(now);
    }

    /// Since when there has been no request under way; `None` while there is one.
    #[must_use]
    pub fn quiet_since(&self) -> Option<tokio::time::Instant> {
        (self.open.get() == 0).then(|| self.ended.get())
    }

    /// Notes that a piece of a response waits for the client.
    pub fn hold(&self, now: tokio::time::Instant) {
        self.held.set(self.held.get() + 1);
        self.taken.set(Some(now));
    }

    /// Notes that the client has room for the next piece, or that there is none.
    pub fn take(&self) {
        self.held.set(self.held.get().saturating_sub(1));
    }

    /// Since when the client has taken nothing of what waits for it, and no other of its requests has ended; `None`
    /// while nothing waits.
    #[must_use]
    pub fn held_since(&self) -> Option<tokio::time::Instant> {
        let taken = self.taken.get().filter(|_| self.held.get() > 0)?;
        Some(taken.max(self.ended.get()))
    }

    /// Notes that the connection ends because the client takes nothing.
    pub fn stall(&self) {
        self.stalled.set(true);
    }

    /// Whether the connection ends because the client takes nothing.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.stalled.get()
    }

    /// Closes the connection, whatever it is doing.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    /// Ends when the connection must be closed.
    pub async fn was_cut(&self) {
        self.cut.cancelled().await;
    }

    /// Whether the connection ends soon.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Takes a token of this connection's own bucket.
    pub fn take_token(&self, limit: &LocalRateLimit, now: Instant) -> bool {
        self.bucket.borrow_mut().get_or_insert_with(|| Bucket::new(limit, now)).take(limit, now)
    }

    /// Whether the client showed a verified certificate.
    #[must_use]
    pub fn is_mutual_tls(&self) -> bool {
        self.peer.as_ref().is_some_and(|p| p.has_certificate)
    }

    /// The workload that a peer's header names; read once for as long as the header stays the same.
    pub fn peer_workload(&self, header: &HeaderValue, standard: &Standard) -> Option<Rc<Numbered<Workload>>> {
        if let Some((known, workload)) = &*self.told.borrow()
            && known == header
        {
            return Some(Rc::clone(workload));
        }
        let workload = standard.workload(Workload::from_header(header)?);
        *self.told.borrow_mut() = Some((header.clone(), Rc::clone(&workload)));
        Some(workload)
    }

    /// The identities of both ends of an inbound exchange.
    pub fn principals(&self, standard: &Standard) -> Rc<Numbered<Principals>> {
        let mut principals = self.principals.borrow_mut();
        let known = principals.get_or_insert_with(|| {
            standard.principals(Principals {
                source: self.peer.as_ref().and_then(Peer::spiffe_id).map(str::to_owned),
                destination: self.own_uris.first().filter(|_| self.is_mutual_tls()).cloned(),
            })
        });
        Rc::clone(known)
    }
}
