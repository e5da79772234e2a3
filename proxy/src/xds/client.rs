//! The xDS client as a state machine: subscriptions, versions, ACK and NACK. No socket, no clock.
//!
//! A response is taken in two steps, because an ACK may only be sent when its resources are in the tables:
//! [`Client::on_response`] parses it into an [`Update`], and when that was carried out, [`Client::on_applied`] gives
//! the requests that answer it. A resource that is not valid keeps its last good value and is named in the NACK; the
//! good ones of the same response are taken.

mod message;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Node;

use self::message::{Incoming, Outgoing, request};
pub use self::message::{Request, Response};
use super::cluster::Discovery;
use super::decode::{Kind, Rejected};
use super::listener::RdsName;
use super::parse::{Parsed, parse};
use crate::tables::{Change, Update};

/// Which form of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Incremental: only what changes is sent.
    Delta,
    /// State of the world: all resources of a type each time.
    Sotw,
}

/// The client's side of the protocol.
#[derive(Debug)]
pub struct Client {
    node: Node,
    protocol: Protocol,
    /// The node is told once per stream.
    node_sent: bool,
    types: BTreeMap<Kind, Subscription>,
    /// The endpoints each cluster wants.
    services: BTreeMap<Arc<str>, (Arc<str>, Option<Duration>)>,
    /// The routes each listener wants.
    routes: BTreeMap<Arc<str>, Box<[RdsName]>>,
    /// Until when to wait for endpoints and routes that something needs.
    waiting: BTreeMap<(Kind, Arc<str>), Option<Instant>>,
}

/// What is known of one type.
#[derive(Debug, Default)]
struct Subscription {
    /// Names that were asked for; unused for clusters and listeners, of which all are wanted.
    names: BTreeSet<Arc<str>>,
    /// Resources we hold, and their versions.
    versions: BTreeMap<Arc<str>, Arc<str>>,
    /// The version of the last response all of which was taken.
    accepted: String,
    /// The nonce of the last response on this stream.
    nonce: String,
    /// Something of this type was asked for on this stream.
    requested: bool,
    /// A response of this type was taken since the process started.
    answered: bool,
    /// What the last NACK said.
    last_error: Option<String>,
}

/// What a response means: an update to carry out, and then an answer.
#[derive(Debug)]
pub struct Received {
    /// To be carried out on the tables.
    pub update: Update,
    verdict: Verdict,
}

#[derive(Debug)]
struct Verdict {
    kind: Kind,
    nonce: String,
    version: String,
    taken: Vec<Parsed>,
    removed: Vec<Arc<str>>,
    absent: Vec<Arc<str>>,
    rejected: Vec<Rejected>,
}

/// What the client knows of a type, for whoever looks from outside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TypeStatus {
    /// The version of the last response all of which was taken.
    pub version: String,
    /// How many resources are held.
    pub resources: usize,
    /// Why the last response was refused in part, if it was.
    pub last_error: Option<String>,
}

impl Client {
    /// A client that knows nothing yet.
    #[must_use]
    pub fn new(node: Node, protocol: Protocol) -> Self {
        let types = Kind::SUBSCRIBED.into_iter().map(|k| (k, Subscription::default())).collect();
        Self {
            node,
            protocol,
            node_sent: false,
            types,
            services: BTreeMap::new(),
            routes: BTreeMap::new(),
            waiting: BTreeMap::new(),
        }
    }

    /// The node id.
    #[must_use]
    pub fn node_id(&self) -> &str {
        &self.node.id
    }

    /// A stream came about: what it is opened with. What is held already is told, so that it need not come again.
    pub fn on_connect(&mut self) -> Vec<Request> {
        self.node_sent = false;
        for subscription in self.types.values_mut() {
            subscription.nonce.clear();
            subscription.requested = false;
        }
        let mut requests = Vec::new();
        for kind in Kind::SUBSCRIBED {
            let wanted = self.types.get(&kind).is_some_and(|s| is_wildcard(kind) || !s.names.is_empty());
            if wanted {
                requests.extend(self.initial(kind));
            }
        }
        requests
    }

    /// A response came. `None`: it is of a type that was not asked for.
    pub fn on_response(&mut self, response: Response, at: jiff::Timestamp) -> Option<Received> {
        let incoming = Incoming::new(response)?;
        let kind = incoming.kind;
        let wanted =
            |name: &str| is_wildcard(kind) || self.types.get(&kind).is_some_and(|s| s.names.contains(name));
        let mut verdict = Verdict {
            kind,
            nonce: incoming.nonce,
            version: incoming.version,
            taken: Vec::new(),
            removed: Vec::new(),
            absent: Vec::new(),
            rejected: Vec::new(),
        };
        let mut seen = BTreeSet::new();
        let mut update = Update::default();
        for resource in incoming.resources {
            match parse(kind, resource, at) {
                Ok(parsed) if !wanted(&parsed.name) => {
                    tracing::debug!(kind = %kind, name = %parsed.name, "left out a resource that was not asked for");
                }
                Ok(parsed) if !seen.insert(Arc::clone(&parsed.name)) => verdict.rejected.push(Rejected {
                    kind,
                    name: parsed.name.to_string(),
                    invalid: super::decode::Invalid::new("name", "is twice in one response"),
                }),
                Ok(parsed) => {
                    update.changes.push(parsed.change.clone());
                    verdict.taken.push(parsed);
                }
                Err(rejected) => {
                    seen.insert(rejected.name.as_str().into());
                    verdict.rejected.push(rejected);
                }
            }
        }
        let gone: Vec<Arc<str>> = match incoming.removed {
            Some(removed) => removed,
            // State of the world: clusters and listeners that are not named any more are gone.
            None if is_wildcard(kind) => {
                let held = self.types.get(&kind).into_iter().flat_map(|s| s.versions.keys());
                held.filter(|name| !seen.contains(*name)).cloned().collect()
            }
            None => Vec::new(),
        };
        for name in gone {
            if is_wildcard(kind) {
                update.changes.push(Change::Remove(kind, Arc::clone(&name)));
                verdict.removed.push(name);
            } else if self.waiting.contains_key(&(kind, Arc::clone(&name))) {
                update.changes.push(Change::Absent(kind, Arc::clone(&name)));
                verdict.absent.push(name);
            }
        }
        Some(Received { update, verdict })
    }

    /// The update of a response was carried out, except for what the tables refused: the requests that follow, the
    /// ACK or NACK first, then changed subscriptions.
    pub fn on_applied(&mut self, received: Received, refused: Vec<Rejected>, now: Instant) -> Vec<Request> {
        let Verdict { kind, nonce, version, taken, removed, absent, mut rejected } = received.verdict;
        for parsed in taken {
            if !refused.iter().any(|r| *r.name == *parsed.name) {
                self.hold(kind, parsed);
            }
        }
        for name in &removed {
            match kind {
                Kind::Cluster => drop(self.services.remove(name)),
                Kind::Listener => drop(self.routes.remove(name)),
                Kind::Endpoints | Kind::Routes | Kind::Secret => {}
            }
        }
        for name in absent {
            self.waiting.remove(&(kind, name));
        }
        rejected.extend(refused);
        let error = nack_text(&rejected);
        let Some(subscription) = self.types.get_mut(&kind) else { return Vec::new() };
        for name in removed {
            subscription.versions.remove(&name);
        }
        subscription.nonce.clone_from(&nonce);
        subscription.answered = true;
        subscription.last_error.clone_from(&error);
        if error.is_none() {
            subscription.accepted = version;
        }
        let mut requests: Vec<Request> = self.answer(kind, nonce, error).into_iter().collect();
        requests.extend(self.resubscribe(Kind::Endpoints, now));
        requests.extend(self.resubscribe(Kind::Routes, now));
        requests
    }

    /// When [`Self::on_tick`] is due next.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.waiting.values().flatten().min().copied()
    }

    /// Endpoints and routes that were waited for long enough count as absent.
    pub fn on_tick(&mut self, now: Instant) -> Update {
        let over: Vec<_> = self
            .waiting
            .iter()
            .filter(|(_, until)| until.is_some_and(|until| until <= now))
            .map(|(key, _)| key.clone())
            .collect();
        let mut update = Update::default();
        for (kind, name) in over {
            tracing::warn!(kind = %kind, %name, "waited long enough, going on without");
            self.waiting.remove(&(kind, Arc::clone(&name)));
            update.changes.push(Change::Absent(kind, name));
        }
        update
    }

    /// Clusters and listeners were answered at least once, and nothing waits for endpoints or routes.
    #[must_use]
    pub fn is_initialized(&self) -> bool {
        let answered = |kind| self.types.get(&kind).is_some_and(|s| s.answered);
        answered(Kind::Cluster) && answered(Kind::Listener) && self.waiting.is_empty()
    }

    /// What is held, by type.
    #[must_use]
    pub fn status(&self) -> BTreeMap<Kind, TypeStatus> {
        let status = |s: &Subscription| TypeStatus {
            version: s.accepted.clone(),
            resources: s.versions.len(),
            last_error: s.last_error.clone(),
        };
        self.types.iter().map(|(kind, s)| (*kind, status(s))).collect()
    }

    fn hold(&mut self, kind: Kind, parsed: Parsed) {
        let name = parsed.name;
        self.waiting.remove(&(kind, Arc::clone(&name)));
        match &parsed.change {
            Change::Cluster(held) => {
                match &held.value.discovery {
                    Discovery::Eds { service, fetch_timeout } => {
                        self.services.insert(Arc::clone(&name), (Arc::clone(service), *fetch_timeout))
                    }
                    Discovery::Static(_)
                    | Discovery::StrictDns(..)
                    | Discovery::LogicalDns(..)
                    | Discovery::OriginalDst(_) => self.services.remove(&name),
                };
            }
            Change::Listener(held) => {
                self.routes.insert(Arc::clone(&name), held.value.rds.clone());
            }
            Change::Endpoints(_)
            | Change::Routes(_)
            | Change::Secret(..)
            | Change::Remove(..)
            | Change::Absent(..) => {}
        }
        if let Some(subscription) = self.types.get_mut(&kind) {
            subscription.versions.insert(name, parsed.version);
        }
    }

    /// Names of endpoints or routes that something needs, and how long it waits for them.
    fn wanted(&self, kind: Kind) -> BTreeMap<Arc<str>, Option<Duration>> {
        match kind {
            Kind::Endpoints => self.services.values().cloned().collect(),
            Kind::Routes => {
                self.routes.values().flatten().map(|r| (Arc::clone(&r.name), r.fetch_timeout)).collect()
            }
            Kind::Cluster | Kind::Listener | Kind::Secret => BTreeMap::new(),
        }
    }

    /// Asks for what is newly needed, and lets go of what is not needed any more.
    fn resubscribe(&mut self, kind: Kind, now: Instant) -> Option<Request> {
        let wanted = self.wanted(kind);
        let subscription = self.types.get_mut(&kind)?;
        let added: Vec<Arc<str>> =
            wanted.keys().filter(|n| !subscription.names.contains(*n)).cloned().collect();
        let dropped: Vec<Arc<str>> =
            subscription.names.iter().filter(|n| !wanted.contains_key(*n)).cloned().collect();
        if added.is_empty() && dropped.is_empty() {
            return None;
        }
        for name in &added {
            subscription.names.insert(Arc::clone(name));
            let until = wanted.get(name).copied().flatten().and_then(|t| now.checked_add(t));
            self.waiting.insert((kind, Arc::clone(name)), until);
        }
        for name in &dropped {
            subscription.names.remove(name);
            subscription.versions.remove(name);
            self.waiting.remove(&(kind, Arc::clone(name)));
        }
        if !subscription.requested {
            return self.initial(kind);
        }
        let nonce = match self.protocol {
            // A change of subscription is no answer, so it carries no nonce.
            Protocol::Delta => String::new(),
            Protocol::Sotw => subscription.nonce.clone(),
        };
        let outgoing = Outgoing { added, dropped, ..Outgoing::new(subscription, nonce) };
        Some(request(self.protocol, kind, outgoing, self.node_once()))
    }

    /// The first request of a type on a stream.
    fn initial(&mut self, kind: Kind) -> Option<Request> {
        let node = self.node_once();
        let subscription = self.types.get_mut(&kind)?;
        subscription.requested = true;
        let outgoing = Outgoing {
            added: subscription.names.iter().cloned().collect(),
            held: subscription.versions.clone(),
            ..Outgoing::new(subscription, String::new())
        };
        Some(request(self.protocol, kind, outgoing, node))
    }

    fn answer(&mut self, kind: Kind, nonce: String, error: Option<String>) -> Option<Request> {
        let node = self.node_once();
        let subscription = self.types.get(&kind)?;
        let outgoing = Outgoing { error, ..Outgoing::new(subscription, nonce) };
        Some(request(self.protocol, kind, outgoing, node))
    }

    fn node_once(&mut self) -> Option<Node> {
        (!std::mem::replace(&mut self.node_sent, true)).then(|| self.node.clone())
    }
}

impl Outgoing {
    fn new(subscription: &Subscription, nonce: String) -> Self {
        Self {
            names: subscription.names.iter().cloned().collect(),
            version: subscription.accepted.clone(),
            nonce,
            ..Self::default()
        }
    }
}

/// All resources of this type are wanted, not only named ones.
fn is_wildcard(kind: Kind) -> bool {
    matches!(kind, Kind::Cluster | Kind::Listener)
}

/// One line for each refused resource.
fn nack_text(rejected: &[Rejected]) -> Option<String> {
    let lines: Vec<String> = rejected.iter().map(ToString::to_string).collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

#[cfg(test)]
mod tests;
