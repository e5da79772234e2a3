//! Connections to one endpoint: idle HTTP/1 ones, the last used first, and shared HTTP/2 ones.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use ahash::AHashMap;
use bytes::Bytes;
use http::HeaderValue;
use http_body::{Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Active;
use super::h1::H1;
use super::h2::{H2, Streams, Tunnel};
use super::send::{Link, Opened};
use crate::http::body::BodyError;
use crate::listener::connection::Origin;
use crate::tcp::io::Io;

/// The most authorities for which an endpoint's connections are kept apart. Beyond it connections serve one request.
const AUTHORITIES: usize = 1024;

/// How long connections for a client are kept when its own has ended: a balancer in front may call again from the same
/// port.
const LINGER: Duration = Duration::from_secs(5);

/// Which requests may use some connections.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Apart {
    /// Those to this authority.
    authority: Option<HeaderValue>,
    /// Those of the client with these addresses, whom the endpoint was told.
    ends: Option<(SocketAddr, SocketAddr)>,
}

/// Connections that only some requests may use.
#[derive(Debug)]
struct OfFew {
    pool: Rc<Pool>,
    origin: Option<Rc<Origin>>,
}

impl OfFew {
    /// Whether nobody comes any more who might use them.
    fn is_over(&self, now: Instant) -> bool {
        let ended = self.origin.as_ref().and_then(|origin| origin.ended());
        ended.is_some_and(|ended| now.duration_since(ended) > LINGER)
    }
}

/// All connections of one endpoint on one worker. They outlive changes of the endpoint's weight and health.
#[derive(Debug, Default)]
pub struct Pools {
    /// For every authority.
    pub one: Rc<Pool>,
    /// Each for some requests only.
    apart: RefCell<AHashMap<Apart, OfFew>>,
    /// Whether TLS agreed on HTTP/2, for clusters that leave it to ALPN.
    pub(super) alpn_h2: Cell<Option<bool>>,
}

impl Pools {
    /// The connections for an authority and a client; `None` where they serve every one.
    pub(super) fn of(&self, authority: Option<&HeaderValue>, origin: Option<&Rc<Origin>>) -> Rc<Pool> {
        if authority.is_none() && origin.is_none() {
            return Rc::clone(&self.one);
        }
        let ends = origin.map(|o| (o.source, o.destination));
        let key = Apart { authority: authority.cloned(), ends };
        let mut apart = self.apart.borrow_mut();
        if let Some(known) = apart.get_mut(&key) {
            known.origin = origin.cloned(); // the latest connection from there
            return Rc::clone(&known.pool);
        }
        let pool = Rc::new(Pool::default());
        // clients are as many as their connections, but each may name as many authorities as it likes
        if self.one.is_closed() || (authority.is_some() && apart.len() >= AUTHORITIES) {
            pool.close();
        } else {
            apart.insert(key, OfFew { pool: Rc::clone(&pool), origin: origin.cloned() });
        }
        pool
    }

    /// Drops connections that were idle too long or that the server has closed.
    pub fn sweep(&self, idle_timeout: Option<Duration>, now: Instant) {
        self.one.sweep(idle_timeout, now);
        let apart: Vec<_> =
            self.apart.borrow().values().map(|few| (Rc::clone(&few.pool), few.is_over(now))).collect();
        for (pool, is_over) in &apart {
            let idle_timeout = if *is_over { Some(Duration::ZERO) } else { idle_timeout };
            pool.sweep(idle_timeout, now);
        }
        drop(apart);
        self.apart.borrow_mut().retain(|_, few| !few.pool.is_empty() || Rc::strong_count(&few.pool) > 1);
    }

    /// Drops idle connections and takes none back: the endpoint is gone. Requests under way finish.
    pub fn close(&self) {
        self.one.close();
        let apart = std::mem::take(&mut *self.apart.borrow_mut());
        apart.into_iter().for_each(|(_, few)| few.pool.close());
    }

    /// Whether no connection is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.one.is_empty() && self.apart.borrow().is_empty()
    }
}

/// Connections of one endpoint on one worker that serve the same requests.
#[derive(Debug, Default)]
pub struct Pool {
    idle: RefCell<Vec<(Box<H1>, Instant)>>,
    shared: RefCell<Vec<Shared>>,
    dialing: RefCell<Option<Rc<Dial>>>,
    closed: Cell<bool>,
    /// Open connections, also those that requests hold just now.
    connections: Rc<Cell<u32>>,
    /// Told when an HTTP/1 connection came back.
    returned: Notify,
    /// How many wait for that.
    waiting: Cell<u32>,
}

struct Waits<'a>(&'a Cell<u32>);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[derive(Debug)]
struct Shared {
    connection: H2,
    born: Instant,
    last_used: Instant,
    uses: u32,
}

fn is_young(born: Instant, life: Option<Duration>) -> bool {
    life.is_none_or(|life| born.elapsed() < life)
}

/// An HTTP/2 connection that is being made, for all who wait for it.
#[derive(Debug, Default)]
pub(super) struct Dial {
    pub(super) over: Notify,
    pub(super) failure: RefCell<Option<Rc<super::Failure>>>,
    pub(super) done: Cell<bool>,
}

impl Pool {
    /// The most recently used idle HTTP/1 connection that is still alive and not older than `life`.
    pub(super) fn take_h1(&self, life: Option<Duration>) -> Option<Box<H1>> {
        loop {
            let (mut connection, _) = self.idle.borrow_mut().pop()?;
            if is_young(connection.born, life) && connection.is_alive() {
                return Some(connection);
            }
        }
    }

    /// Takes back an HTTP/1 connection whose exchange is over.
    pub(super) fn put_h1(&self, connection: Box<H1>, now: Instant) {
        if !self.closed.get() {
            self.idle.borrow_mut().push((connection, now));
            if self.waiting.get() > 0 {
                self.returned.notify_one();
            }
        }
    }

    /// How many connections to the endpoint are open.
    pub(super) fn connections(&self) -> &Rc<Cell<u32>> {
        &self.connections
    }

    /// Ends when an HTTP/1 connection came back.
    pub(super) async fn returned(&self) {
        self.waiting.set(self.waiting.get() + 1);
        let _waits = Waits(&self.waiting);
        self.returned.notified().await;
    }

    /// Whether it takes no connections any more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// A shared HTTP/2 connection with room for one more request.
    pub(super) fn get_h2(&self, most_uses: Option<u32>, life: Option<Duration>, now: Instant) -> Option<H2> {
        let mut shared = self.shared.borrow_mut();
        // requests under way hold a connection that is kept no longer
        shared.retain_mut(|s| is_young(s.born, life) && s.connection.room().is_some());
        let most = most_uses.unwrap_or(u32::MAX);
        let mut free = shared.iter_mut().filter(|s| s.uses < most);
        let found = free.find_map(|s| s.connection.room().is_some_and(|r| r > 0).then_some(s))?;
        found.last_used = now;
        found.uses += 1;
        Some(found.connection.clone())
    }

    pub(super) fn put_h2(&self, connection: H2, now: Instant) {
        if !self.closed.get() {
            self.shared.borrow_mut().push(Shared { connection, born: now, last_used: now, uses: 0 });
        }
    }

    /// Takes a connection that a request has taken already.
    pub(super) fn put_h2_used(&self, connection: H2, now: Instant) {
        if !self.closed.get() {
            self.shared.borrow_mut().push(Shared { connection, born: now, last_used: now, uses: 1 });
        }
    }

    /// The dial under way, or a new one that the caller must carry out (`true`).
    pub(super) fn dial(&self) -> (Rc<Dial>, bool) {
        let mut dialing = self.dialing.borrow_mut();
        match &*dialing {
            Some(dial) if !dial.done.get() => (Rc::clone(dial), false),
            _ => {
                let dial = Rc::new(Dial::default());
                *dialing = Some(Rc::clone(&dial));
                (dial, true)
            }
        }
    }

    /// Drops connections that were idle too long or that the server has closed.
    pub fn sweep(&self, idle_timeout: Option<Duration>, now: Instant) {
        let fresh = |since: Instant| idle_timeout.is_none_or(|t| now.duration_since(since) < t);
        let mut idle = std::mem::take(&mut *self.idle.borrow_mut());
        idle.retain_mut(|(c, since)| fresh(*since) && c.is_alive());
        // the pool may have been used by a destructor meanwhile: what came back stays on top
        let mut current = self.idle.borrow_mut();
        idle.append(&mut current);
        *current = idle;
        drop(current);
        self.shared.borrow_mut().retain_mut(|s| {
            let used = s.connection.is_used();
            s.connection.room().is_some() && (used || fresh(s.last_used))
        });
    }

    /// Drops idle connections and takes none back: the endpoint is gone. Requests under way finish.
    pub fn close(&self) {
        self.closed.set(true);
        self.idle.borrow_mut().clear();
        self.shared.borrow_mut().clear();
    }

    /// How many connections are kept just now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.idle.borrow().len() + self.shared.borrow().len()
    }

    /// Whether none is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The body of an upstream's response, with what must be given back when it ends.
#[derive(Debug)]
pub struct Reply {
    source: Source,
    pool: Rc<Pool>,
    max_uses: Option<u32>,
    active: Option<Active>,
}

#[derive(Debug)]
enum Source {
    H1(Option<Box<H1>>),
    H2(Box<Streams>),
}

/// What an endpoint and a client agreed on after HTTP: bytes, still counted as a request.
#[derive(Debug)]
pub struct Left {
    /// The bytes.
    pub stream: LeftStream,
    _active: Option<Active>,
}

/// Bytes to and from an endpoint that has left HTTP.
#[derive(Debug)]
pub enum LeftStream {
    /// A whole connection.
    H1(Io, Opened),
    /// One stream of a connection.
    H2(Tunnel),
}

impl Reply {
    pub(super) fn h1(connection: Box<H1>, pool: Rc<Pool>, max_uses: Option<u32>, active: Active) -> Self {
        Self { source: Source::H1(Some(connection)), pool, max_uses, active: Some(active) }
    }

    pub(super) fn h2(streams: Streams, pool: Rc<Pool>, active: Active) -> Self {
        Self { source: Source::H2(Box::new(streams)), pool, max_uses: None, active: Some(active) }
    }

    /// Whether nothing more will come.
    #[must_use]
    pub fn is_end(&self) -> bool {
        match &self.source {
            Source::H1(connection) => connection.as_ref().is_none_or(|c| c.is_body_over()),
            Source::H2(streams) => streams.is_end(),
        }
    }

    /// What is known of the connection it comes on.
    #[must_use]
    pub fn link(&self) -> Option<Rc<Link>> {
        match &self.source {
            Source::H1(connection) => connection.as_ref()?.link(),
            Source::H2(streams) => streams.link.clone(),
        }
    }

    /// Gives the connection back to its pool once the exchange is over.
    pub fn release(&mut self, now: Instant) {
        self.active = None;
        if let Source::H1(connection) = &mut self.source
            && let Some(mut connection) = connection.take()
            && connection.settle()
            && self.max_uses.is_none_or(|most| connection.uses < most)
        {
            self.pool.put_h1(connection, now);
        }
    }

    /// The bytes below, when the endpoint has agreed to leave HTTP.
    #[must_use]
    pub fn into_left(self) -> Option<Left> {
        let stream = match self.source {
            Source::H1(connection) => {
                let (io, opened) = connection?.into_io();
                LeftStream::H1(io, opened)
            }
            Source::H2(streams) => LeftStream::H2(streams.into_tunnel()?),
        };
        Some(Left { stream, _active: self.active })
    }

    /// The next piece.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.source {
            Source::H1(Some(connection)) => connection.poll_body(cx),
            Source::H1(None) => Poll::Ready(None),
            Source::H2(streams) => streams.poll_body(cx),
        }
    }

    /// How much is to come, when it is known.
    #[must_use]
    pub fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::H1(connection) => connection.as_ref().map_or_else(SizeHint::default, |c| c.body_hint()),
            Source::H2(_) => SizeHint::default(),
        }
    }
}
