//! How streams spread over the members: whom this member serves, and whom it asks to go elsewhere.
//!
//! Clients choose by rendezvous order (`wire::members`), which is even on average; [`Fleet`] bounds what chance leaves:
//! a member holds at most 1.1 times the mean, and one. A new stream above that is refused with a hint, and the client
//! tries its next choice; when a member joins or comes back, those above the bound ask as many streams as are too many
//! to move. Who was refused by all others is served. Members tell each other their number of streams now and then;
//! of whom nothing is known lately, nothing is expected. Only clients that understand hints are refused or asked.
//!
//! [`Spread`] is the handle that streams and the server hold.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use wire::members::{Hint, order};

/// How often this member looks whether it holds too many streams.
const LOOK: Duration = Duration::from_secs(1);
/// The share of its streams that a member asks to move at one look, as a divisor: a tenth.
const AT_ONCE: usize = 10;

/// The members of the control plane as this one sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fleet {
    /// The address at which clients call this member.
    pub own: String,
    /// Every member that serves clients, this one too, by the address at which they call it; and how many streams it
    /// has told to hold, if it has told lately. The number of this member itself is not read.
    pub members: BTreeMap<String, Option<u64>>,
}

impl Fleet {
    /// A control plane of one member.
    #[must_use]
    pub fn alone(own: impl Into<String>) -> Self {
        let own = own.into();
        Self { members: [(own.clone(), None)].into(), own }
    }

    /// The addresses of all members.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// The streams of those of whom it is known, this member with `held` among them.
    fn known(&self, held: u64) -> impl Iterator<Item = (&str, u64)> {
        self.members.iter().filter_map(move |(member, told)| {
            let streams = if *member == self.own { Some(held) } else { *told };
            Some((member.as_str(), streams?))
        })
    }

    /// How many streams each member may hold while this one holds `held`, `more` of them still to come: 1.1 times the
    /// mean, and one. `None`: as many as come, since of no other member is anything known.
    #[must_use]
    pub fn bound(&self, held: u64, more: u64) -> Option<u64> {
        let (members, streams) = self
            .known(held)
            .fold((0_u64, more), |(n, sum), (_, streams)| (n + 1, sum.saturating_add(streams)));
        let known_elsewhere = members > 1 && self.members.contains_key(&self.own);
        known_elsewhere.then(|| streams.saturating_mul(11) / members.saturating_mul(10) + 1)
    }

    /// Whether to serve one more stream besides `held` of a client that `refusals` others have refused.
    #[must_use]
    pub fn admits(&self, held: u64, refusals: u64) -> bool {
        let others = self.members.len().saturating_sub(1) as u64;
        refusals >= others || self.bound(held, 1).is_none_or(|bound| held < bound)
    }

    /// Which of these streams (key and node id), which can move, should do so while this member holds `held`; at most
    /// a tenth of them at once: first those that prefer a member with room to this one, then those whose next choice
    /// has room.
    #[must_use]
    pub fn surplus(&self, held: u64, streams: &[(u64, &str)]) -> Vec<u64> {
        let Some(bound) = self.bound(held, 0).filter(|bound| held > *bound) else { return Vec::new() };
        let room: Vec<&str> = self
            .known(held)
            .filter(|(member, streams)| *member != self.own && *streams < bound)
            .map(|(member, _)| member)
            .collect();
        let mut ranked: Vec<(usize, u64)> = streams
            .iter()
            .map(|(key, node)| {
                let order = order(node, self.addresses());
                let own = order.iter().position(|m| *m == self.own).unwrap_or(order.len());
                let better = order.iter().take(own).any(|m| room.contains(m));
                let next = order.get(own + 1).is_some_and(|m| room.contains(m));
                (if better { 0 } else { 2 - usize::from(next) }, *key)
            })
            .collect();
        ranked.sort_unstable();
        let most = (streams.len() / AT_ONCE).max(1);
        let too_many = usize::try_from(held - bound).unwrap_or(usize::MAX);
        ranked.into_iter().take(too_many.min(most)).map(|(_, key)| key).collect()
    }
}

/// The streams of this member among those of all. A handle; clones see the same.
#[derive(Debug, Clone)]
pub struct Spread {
    fleet: watch::Receiver<Fleet>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<Table>,
    count: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    streams: BTreeMap<u64, Held>,
}

#[derive(Debug)]
struct Held {
    node: String,
    /// `None`: it does not understand a hint.
    asked: Option<CancellationToken>,
}

impl Spread {
    /// No stream yet; `fleet` tells who the members are, always the latest.
    #[must_use]
    pub fn new(fleet: watch::Receiver<Fleet>) -> Self {
        Self { fleet, shared: Arc::default() }
    }

    /// The members, always the latest.
    #[must_use]
    pub fn fleet(&self) -> watch::Receiver<Fleet> {
        self.fleet.clone()
    }

    /// How many streams this member holds, always the latest: what it tells the others.
    #[must_use]
    pub fn streams(&self) -> watch::Receiver<u64> {
        self.shared.count.subscribe()
    }

    /// A place for a new stream. `refusals`: how many members refused the client, if it understands hints.
    ///
    /// # Errors
    ///
    /// [`Hint::Surplus`] when this member holds its share.
    pub fn admit(&self, refusals: Option<u64>) -> Result<Place, Hint> {
        let fleet = self.fleet.borrow();
        let mut table = self.table();
        let held = table.streams.len() as u64;
        if refusals.is_some_and(|refusals| !fleet.admits(held, refusals)) {
            return Err(Hint::Surplus);
        }
        let moved = CancellationToken::new();
        let key = table.next;
        table.next += 1;
        let asked = refusals.map(|_| moved.clone());
        table.streams.insert(key, Held { node: String::new(), asked });
        self.shared.count.send_replace(held + 1);
        Ok(Place { key, moved, spread: self.clone() })
    }

    /// Asks streams that are too many to move, until `stop`.
    pub async fn keep(self, stop: CancellationToken) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(looks.tick()).await.is_some() {
            let asked = self.ask();
            if asked > 0 {
                tracing::info!(streams = asked, "asked streams to move to members that serve fewer");
            }
        }
    }

    /// Asks those that are too many now; their number.
    fn ask(&self) -> usize {
        let fleet = self.fleet.borrow().clone();
        let table = self.table();
        // Whoever was asked already is as good as gone; who does not understand stays, and counts.
        let gone = |held: &&Held| held.asked.as_ref().is_some_and(CancellationToken::is_cancelled);
        let held = table.streams.values().filter(|held| !gone(held)).count() as u64;
        let can = |held: &Held| held.asked.as_ref().is_some_and(|asked| !asked.is_cancelled());
        let streams = table.streams.iter().filter(|(_, held)| can(held));
        let streams: Vec<(u64, &str)> = streams.map(|(key, held)| (*key, held.node.as_str())).collect();
        let surplus = fleet.surplus(held, &streams);
        let tokens = surplus.iter().filter_map(|key| table.streams.get(key)?.asked.as_ref());
        tokens.map(CancellationToken::cancel).count()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream's place on this member, until it is dropped.
#[derive(Debug)]
pub struct Place {
    key: u64,
    moved: CancellationToken,
    spread: Spread,
}

impl Place {
    /// Whose stream it is.
    pub fn belongs_to(&self, node: &str) {
        if let Some(held) = self.spread.table().streams.get_mut(&self.key) {
            node.clone_into(&mut held.node);
        }
    }

    /// Waits until the stream should move to another member. Cancel safe.
    pub async fn moved(&self) {
        self.moved.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.spread.table();
        table.streams.remove(&self.key);
        self.spread.shared.count.send_replace(table.streams.len() as u64);
    }
}

#[cfg(test)]
#[path = "balance/tests.rs"]
mod tests;
