//! One ADS stream, delta or state-of-the-world, as a state machine. No socket, no clock, no task.
//!
//! A driver feeds it requests and views, and sends the responses it asks for. What it holds to (xDS protocol,
//! "Eventual consistency considerations" and "Incremental xDS"):
//!
//! * One response of a type is on its way at a time. What changes meanwhile is merged: the next response brings
//!   the latest, so a slow client never builds a backlog.
//! * Make before break: clusters, then their endpoints, then listeners and routes. New listeners and routes wait
//!   until the client has accepted the new clusters and their endpoints; clusters go only when no listener or
//!   route that names them is left.
//! * A rejected resource is remembered by its version and sent again only when it has changed. The record of
//!   what the client has stays true, so that the last good is known.
//! * A client that reconnects says what it has, and is sent only what differs.

mod held;
mod report;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};

use crate::cache::View;
use crate::resources::{Resource, Resources, Type};
use watch::{Gate, Step, Subscription, Verdict, Watch};

pub use report::{Nack, Report, Sync, TypeReport};

/// How long new listeners and routes wait for a client to ask for endpoints that its new clusters should make
/// it ask for. A client that does not want them must not wait for ever.
pub const GRACE: Duration = Duration::from_millis(500);

/// Types we do not serve that one stream may ask for; further ones are ignored.
const OTHER_TYPES: usize = 32;

/// The form of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// `DeltaAggregatedResources`
    Delta,
    /// `StreamAggregatedResources`
    StateOfTheWorld,
}

/// A response, in the words of both forms.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// The type's URL.
    pub type_url: String,
    /// `<revision>-<number on this stream>`
    pub nonce: String,
    /// The revision it brings.
    pub revision: u64,
    /// Delta: the revision. State of the world: a hash of the content.
    pub version: String,
    /// The resources: what changed (delta), or everything (state of the world).
    pub resources: Vec<Arc<Resource>>,
    /// Names of what is gone (delta only).
    pub removed: Vec<String>,
}

/// What the driver is asked to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send this.
    Send(Response),
    /// Count an accepted response.
    Accepted {
        /// Its type.
        type_: Type,
        /// Its revision.
        revision: u64,
        /// From sending it to its ACK.
        took: Duration,
    },
    /// Count and log a rejected response.
    Rejected(Nack),
}

/// The state of one stream.
#[derive(Debug)]
pub struct Stream {
    variant: Variant,
    /// Envoy waits for endpoints after every update of a cluster, also when they did not change.
    resend_endpoints: bool,
    view: Option<Arc<View>>,
    watches: BTreeMap<Type, Watch>,
    others: BTreeSet<String>,
    responses: u64,
    synced: u64,
    at_rest: bool,
}

impl Stream {
    /// A stream on which nothing was said yet. `native` clients keep endpoints over updates of their cluster.
    #[must_use]
    pub fn new(variant: Variant, native: bool) -> Self {
        Self {
            variant,
            resend_endpoints: !native,
            view: None,
            watches: BTreeMap::new(),
            others: BTreeSet::new(),
            responses: 0,
            synced: 0,
            at_rest: false,
        }
    }

    /// A delta request: a subscription, an ACK or a NACK, or several of them at once.
    pub fn on_delta(&mut self, request: DeltaDiscoveryRequest, now: Instant) -> Vec<Action> {
        let Some(t) = Type::from_url(&request.type_url) else {
            let asked: Vec<String> =
                request.resource_names_subscribe.into_iter().filter(|name| name != "*").collect();
            return self.on_other(request.type_url, &request.response_nonce, asked);
        };
        let first = !self.watches.contains_key(&t);
        let watch = self.watches.entry(t).or_insert_with(|| Watch::new(t, now));
        if first {
            watch.sub.wildcard = request.resource_names_subscribe.is_empty() && watch::is_whole(t);
            watch.reply_owed = watch.sub.wildcard && request.initial_resource_versions.is_empty();
        }
        for name in &request.resource_names_unsubscribe {
            match name.as_str() {
                "*" => {
                    let names = std::mem::take(&mut watch.sub.names);
                    watch.replace_subscription(Subscription { wildcard: false, names });
                }
                name => watch.unsubscribe(name),
            }
        }
        for name in &request.resource_names_subscribe {
            match name.as_str() {
                "*" if watch.sub.wildcard => {}
                "*" => {
                    watch.sub.wildcard = true;
                    watch.reply_owed = request.initial_resource_versions.is_empty();
                    watch.touch();
                }
                name => watch.subscribe(name),
            }
        }
        if first {
            claim(watch, request.initial_resource_versions.into_iter().collect());
        }
        let error = request.error_detail.map(|status| status.message);
        let verdict = watch.answer(&request.response_nonce, error.as_deref(), now);
        self.conclude(t, verdict, now)
    }

    /// A state-of-the-world request: the names it wants from now on, with an ACK or a NACK.
    pub fn on_whole(&mut self, request: DiscoveryRequest, now: Instant) -> Vec<Action> {
        let Some(t) = Type::from_url(&request.type_url) else {
            return self.on_other(request.type_url, &request.response_nonce, Vec::new());
        };
        let first = !self.watches.contains_key(&t);
        let watch = self.watches.entry(t).or_insert_with(|| Watch::new(t, now));
        let nonce = request.response_nonce.as_str();
        if watch.last_nonce().is_some_and(|last| !nonce.is_empty() && last != nonce) {
            return Vec::new(); // stale: its answer to the newer response will say everything again
        }
        let mut names: BTreeSet<String> = request.resource_names.into_iter().collect();
        let star = names.remove("*");
        let still_legacy = first || (watch.sub.wildcard && watch.sub.names.is_empty());
        let wildcard = star || (names.is_empty() && still_legacy && watch::is_whole(t));
        let widened = wildcard && !watch.sub.wildcard;
        watch.replace_subscription(Subscription { wildcard, names });
        if first && watch::is_whole(t) {
            // For the others the version says nothing: names may have been dropped and asked for again since.
            watch.claimed = Some(request.version_info).filter(|version| !version.is_empty());
        }
        watch.reply_owed |= widened;
        let error = request.error_detail.map(|status| status.message);
        let verdict = watch.answer(nonce, error.as_deref(), now);
        self.conclude(t, verdict, now)
    }

    /// The proxy should now hold this. Only the latest counts; an older one is forgotten.
    pub fn on_view(&mut self, view: Arc<View>, now: Instant) -> Vec<Action> {
        self.view = Some(view);
        self.advance(now)
    }

    /// Time has passed: call it at [`Self::deadline`].
    pub fn on_tick(&mut self, now: Instant) -> Vec<Action> {
        self.advance(now)
    }

    /// When [`Self::on_tick`] has something to do, if nothing else happens before.
    #[must_use]
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let view = self.view.as_ref()?;
        let waits = [Type::Endpoint, Type::Route].into_iter().filter(|t| self.expects(*t, view, now));
        let parents = waits.filter_map(parent);
        let clusters = self.expects_listeners(now).then_some(Type::Cluster);
        let watches = parents.chain(clusters).filter_map(|t| self.watches.get(&t));
        watches.map(|watch| watch.heard_at + GRACE).filter(|at| *at > now).min()
    }

    /// The newest revision of which the client has accepted everything that it must have.
    #[must_use]
    pub fn synced_revision(&self) -> u64 {
        self.synced
    }

    /// How far the client is, by type.
    #[must_use]
    pub fn report(&self) -> Report {
        let types = self.watches.iter().map(|(t, watch)| (*t, watch.report())).collect();
        Report {
            synced_revision: self.synced,
            view_revision: self.view.as_ref().map_or(0, |view| view.revision()),
            at_rest: self.at_rest,
            types,
        }
    }

    /// What the client has accepted on this stream.
    #[must_use]
    pub fn held(&self) -> Resources {
        let mut by_type = BTreeMap::new();
        for (t, watch) in &self.watches {
            let of_type = watch.resources().into_iter().map(|(name, r)| (name.to_owned(), r.clone()));
            by_type.insert(*t, of_type.collect());
        }
        Resources { by_type }
    }

    /// A type that we do not serve (secrets come from the agent): an empty answer, once, is not an error.
    fn on_other(&mut self, type_url: String, nonce: &str, asked: Vec<String>) -> Vec<Action> {
        let known = self.others.contains(&type_url);
        if !known && self.others.len() >= OTHER_TYPES {
            return Vec::new();
        }
        let due = !known || nonce.is_empty() || !asked.is_empty();
        self.others.insert(type_url.clone());
        if !due {
            return Vec::new();
        }
        self.responses += 1;
        let revision = self.view.as_ref().map_or(0, |view| view.revision());
        vec![Action::Send(Response {
            type_url,
            nonce: watch::nonce_text(revision, self.responses),
            revision,
            version: revision.to_string(),
            resources: Vec::new(),
            removed: asked,
        })]
    }

    fn conclude(&mut self, type_: Type, verdict: Option<Verdict>, now: Instant) -> Vec<Action> {
        let told = verdict.map(|verdict| match verdict {
            Verdict::Accepted { revision, took } => Action::Accepted { type_, revision, took },
            Verdict::Rejected(nack) => Action::Rejected(nack),
        });
        told.into_iter().chain(self.advance(now)).collect()
    }

    /// Sends whatever is due: the one place where something is sent.
    fn advance(&mut self, now: Instant) -> Vec<Action> {
        let Some(view) = self.view.clone() else {
            return Vec::new();
        };
        let mut actions = Vec::new();
        // What one type does can open the gate of another. It ends: a send closes its type until the client
        // answers, and a silent step empties what it is about.
        while self.round(&view, now, &mut actions) {}
        self.refresh(&view);
        for watch in self.watches.values_mut().filter(|watch| watch.is_clean()) {
            watch.settled(view.revision());
        }
        if self.is_synced(&view, now) {
            self.synced = view.revision();
        }
        let waits = self.watches.values().any(Watch::is_waiting);
        self.at_rest = !waits && self.deadline(now).is_none();
        actions
    }

    fn round(&mut self, view: &View, now: Instant, actions: &mut Vec<Action>) -> bool {
        let mut progress = false;
        for t in Type::ALL {
            self.refresh(view);
            let gate = self.gate(t, view, now);
            let updated = self.clusters_to_warm(t);
            let Some(watch) = self.watches.get_mut(&t) else { continue };
            match watch.step(self.variant, view, gate, self.responses + 1, now) {
                Step::Nothing => continue,
                Step::Silent => {}
                Step::Send(response) => {
                    self.responses += 1;
                    self.owe_endpoints(&updated, &response);
                    actions.push(Action::Send(response));
                }
            }
            progress = true;
        }
        progress
    }

    fn refresh(&mut self, view: &View) {
        for (t, watch) in &mut self.watches {
            watch.refresh(view.of(*t));
        }
    }

    fn gate(&self, t: Type, view: &View, now: Instant) -> Gate {
        let missing = |t| self.watches.get(&t).is_some_and(Watch::lacks_new);
        let clean = |t| self.watches.get(&t).is_none_or(Watch::is_clean);
        let ready = || {
            !missing(Type::Cluster) && !missing(Type::Endpoint) && !self.expects(Type::Endpoint, view, now)
        };
        match t {
            Type::Cluster => {
                let unused =
                    clean(Type::Listener) && clean(Type::Route) && !self.expects(Type::Route, view, now);
                Gate { send: true, remove: unused && !self.expects_listeners(now) }
            }
            Type::Endpoint => Gate { send: true, remove: clean(Type::Cluster) },
            Type::Listener => Gate { send: ready(), remove: true },
            Type::Route => Gate { send: ready(), remove: clean(Type::Listener) },
        }
    }

    /// Whether the client can still be expected to ask for more of `t`, because of what it was just sent.
    fn expects(&self, t: Type, view: &View, now: Instant) -> bool {
        let Some(parent) = parent(t).and_then(|parent| self.watches.get(&parent)) else {
            return false;
        };
        let unasked = match self.watches.get(&t) {
            Some(watch) => watch.diff().unsubscribed,
            None => !view.of(t).is_empty(),
        };
        let busy = parent.is_waiting() || !parent.diff().changed.is_empty();
        unasked && parent.sub.wildcard && (busy || now < parent.heard_at + GRACE)
    }

    /// Whether a client that just asked for clusters can be expected to ask for listeners; it may still have some
    /// from an earlier stream, which name clusters that are to go.
    fn expects_listeners(&self, now: Instant) -> bool {
        let clusters = self.watches.get(&Type::Cluster);
        !self.watches.contains_key(&Type::Listener)
            && clusters.is_some_and(|watch| now < watch.heard_at + GRACE)
    }

    fn is_synced(&self, view: &View, now: Instant) -> bool {
        Type::ALL.into_iter().all(|t| match self.watches.get(&t) {
            Some(watch) => watch.is_clean() && !self.expects(t, view, now),
            None if watch::is_whole(t) => view.of(t).is_empty(),
            None => !self.expects(t, view, now),
        })
    }

    /// The clusters that the next response would update, if the client is one that warms them anew.
    fn clusters_to_warm(&self, t: Type) -> BTreeSet<String> {
        if t != Type::Cluster || !self.resend_endpoints {
            return BTreeSet::new();
        }
        let Some(watch) = self.watches.get(&t) else {
            return BTreeSet::new();
        };
        let updated = watch.diff().changed.iter().filter(|r| watch.held.version(&r.name).is_some());
        updated.map(|resource| resource.name.clone()).collect()
    }

    fn owe_endpoints(&mut self, updated: &BTreeSet<String>, response: &Response) {
        let Some(endpoints) = self.watches.get_mut(&Type::Endpoint) else {
            return;
        };
        for resource in response.resources.iter().filter(|r| updated.contains(&r.name)) {
            if endpoints.sub.covers(&resource.name) && endpoints.held.version(&resource.name).is_some() {
                endpoints.owed.insert(resource.name.clone());
                endpoints.touch();
            }
        }
    }
}

/// The type whose resources name those of `t`.
fn parent(t: Type) -> Option<Type> {
    match t {
        Type::Endpoint => Some(Type::Cluster),
        Type::Route => Some(Type::Listener),
        Type::Cluster | Type::Listener => None,
    }
}

/// Records what a client that reconnects already has. What it asks for and has is not owed to it.
fn claim(watch: &mut Watch, versions: BTreeMap<String, String>) {
    for (name, version) in versions {
        if !watch.sub.covers(&name) {
            continue;
        }
        watch.owed.remove(&name);
        // A version that is not one of ours equals none of ours, and the resource is sent.
        watch.held.claim(name, u64::from_str_radix(&version, 16).unwrap_or_default());
    }
    watch.touch();
}

/// A resource's version as the wire has it.
#[must_use]
pub fn version_text(version: u64) -> String {
    format!("{version:016x}")
}
