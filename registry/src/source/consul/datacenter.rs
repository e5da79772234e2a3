//! One datacenter: which questions are asked, and what their answers make of the mesh.
//!
//! A machine without IO: answers, failures and the time go in, questions and commands come out. One question watches the
//! list of services, one more watches each service, with bounds on how many are under way. An answer that is not
//! believed changes nothing: what was known stays, and the status tells how old it is.

mod publish;
mod queues;
mod status;
mod watched;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::answer::{self, Answer};
use super::convert::{Mapping, convert};
use super::losses::Losses;
use super::poll::{Ask, Consistency, Poll, Verdict};
use super::servers::Servers;
use crate::model::service::Hostname;
use crate::source::Catalog;
use crate::state::Command;

use self::publish::Publishing;
use self::queues::Queues;
pub use self::status::Status;
use self::watched::Watched;

/// Consul's own service, which is none of the mesh.
const OWN: &str = "consul";
/// Services of this ending are sidecars of Consul's own mesh.
const SIDECAR: &str = "-sidecar-proxy";
/// The list of services is asked for at least this often while its answers come at once.
const LIST_SLOWEST: Duration = Duration::from_secs(1);
/// And each service.
const SERVICE_SLOWEST: Duration = Duration::from_secs(5);
/// A loss waits so long for others, so that many are seen as many.
const SETTLE: Duration = Duration::from_secs(1);
/// With more services than may be watched at once, each is looked at this often, if a second for each look allows it.
const ROTATION: Duration = Duration::from_secs(15);
/// A question that does not block is answered within this time, and a blocking one so long after its wait.
const PATIENCE: Duration = Duration::from_secs(20);

/// How a datacenter is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where its services go.
    pub mapping: Mapping,
    /// How many servers there are to ask.
    pub servers: usize,
    /// Blocking questions at the same time. Consul takes 200 connections of an address, and those of a program that has
    /// gone count until their wait ends.
    pub watches: usize,
    /// Questions at the same time that come back at once.
    pub fetches: usize,
    /// How long a question blocks, at most 10 minutes.
    pub wait: Duration,
    /// Every question is asked again from nothing this often, give or take a fifth.
    pub resync: Duration,
    /// A service that has vanished stays so long, without endpoints.
    pub grace: Duration,
    /// While a loss is held, the list is asked for this often.
    pub confirm_every: Duration,
    /// Only these services; all when empty.
    pub only: BTreeSet<String>,
}

impl Settings {
    /// The usual settings for so many servers.
    #[must_use]
    pub fn new(mapping: Mapping, servers: usize) -> Self {
        Self {
            mapping,
            servers,
            watches: 48,
            fetches: 12,
            wait: Duration::from_secs(60),
            resync: Duration::from_secs(600),
            grace: Duration::from_secs(30),
            confirm_every: Duration::from_secs(10),
            only: BTreeSet::new(),
        }
    }

    fn wants(&self, name: &str) -> bool {
        name != OWN && !name.ends_with(SIDECAR) && (self.only.is_empty() || self.only.contains(name))
    }
}

/// What a question is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    /// The list of services.
    Services,
    /// The instances of a service.
    Instances(String),
}

/// A question to a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// Names the answer.
    pub id: u64,
    /// Position of the server in the settings.
    pub server: usize,
    /// Path and query of the request.
    pub path: String,
    /// No answer within this time is a failure.
    pub timeout: Duration,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Ask, and tell the answer.
    Ask(Query),
    /// Propose these, and tell whether it was done. Nothing more is to be proposed before.
    Publish(Vec<Command>),
}

/// A question under way.
#[derive(Debug)]
struct Asked {
    target: Target,
    ask: Ask,
    server: usize,
    at: Instant,
}

/// The state of one datacenter.
#[derive(Debug)]
pub struct Datacenter {
    settings: Settings,
    random: fastrand::Rng,
    servers: Servers,
    list: Poll,
    listed: bool,
    services: BTreeMap<String, Watched>,
    claims: BTreeMap<Hostname, String>,
    unfit: BTreeMap<String, String>,
    seed: Catalog,
    losses: Losses,
    /// Services that the list lacks.
    leaving: BTreeSet<String>,
    forbidden: BTreeMap<Target, String>,
    queues: Queues,
    asked: BTreeMap<u64, Asked>,
    blocking: usize,
    next_id: u64,
    publishing: Publishing,
    totals: status::Totals,
    last_failure: Option<String>,
    away: Option<Instant>,
}

impl Datacenter {
    /// A datacenter of which the state holds `seed`. It is asked from `now` on; `random` spreads what must not come
    /// together.
    #[must_use]
    pub fn new(settings: Settings, seed: Catalog, mut random: fastrand::Rng, now: Instant) -> Self {
        let servers = Servers::new(settings.servers, random.usize(..settings.servers.max(1)));
        let resync = now + spread(settings.resync, &mut random);
        Self {
            list: Poll::new(now, resync, LIST_SLOWEST),
            queues: Queues::starting(now),
            settings,
            random,
            servers,
            listed: false,
            services: BTreeMap::new(),
            claims: BTreeMap::new(),
            unfit: BTreeMap::new(),
            seed,
            losses: Losses::default(),
            leaving: BTreeSet::new(),
            forbidden: BTreeMap::new(),
            asked: BTreeMap::new(),
            blocking: 0,
            next_id: 0,
            publishing: Publishing::default(),
            totals: status::Totals::default(),
            last_failure: None,
            away: None,
        }
    }

    /// The time has come to `now`.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        self.remove_lost(now);
        self.ask_due(now, &mut actions);
        let commands = self.flush(now);
        if !commands.is_empty() {
            actions.push(Action::Publish(commands));
        }
        actions
    }

    /// The server answered the question `id`.
    pub fn on_answer(&mut self, id: u64, answer: &Answer, now: Instant) -> Vec<Action> {
        let Some(asked) = self.finish(id) else { return self.tick(now) };
        self.totals.answers += 1;
        let verdict = self.poll(&asked.target).map(|poll| poll.on_answer(answer, asked.ask, now));
        match verdict {
            None => {}
            Some(Verdict::Believe) => self.believe(&asked, answer, now),
            Some(Verdict::Doubt) => self.schedule(&asked.target),
            Some(Verdict::Refuse(reason)) => {
                self.servers.on_failure(asked.server, asked.at, now);
                self.fail(&asked, reason, answer.retry_after, now);
            }
            Some(Verdict::Forbidden(reason)) => {
                self.forbidden.insert(asked.target.clone(), reason.clone());
                self.fail(&asked, reason, None, now);
            }
        }
        self.tick(now)
    }

    /// The question `id` has no answer.
    pub fn on_failure(&mut self, id: u64, reason: &str, now: Instant) -> Vec<Action> {
        if let Some(asked) = self.finish(id) {
            self.servers.on_failure(asked.server, asked.at, now);
            self.fail(&asked, reason.to_owned(), None, now);
        }
        self.tick(now)
    }

    /// What was to be published was, or was not.
    pub fn on_published(&mut self, done: bool, now: Instant) -> Vec<Action> {
        self.published(done, now);
        self.tick(now)
    }

    /// The token, or a certificate, is another one: what failed before may not any more.
    pub fn on_credentials(&mut self, now: Instant) -> Vec<Action> {
        let forbidden: Vec<Target> = self.forbidden.keys().cloned().collect();
        for target in forbidden {
            if let Some(poll) = self.poll(&target) {
                poll.hurry(now);
            }
            self.schedule(&target);
        }
        self.tick(now)
    }

    /// When [`tick`](Self::tick) has something to do next, if nothing else happens.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        let list = self.queues.list;
        let fetch = self.queues.fetch.first().filter(|_| self.may_fetch());
        let watch = self.queues.watch.first().filter(|_| self.may_watch());
        let asking =
            [list, fetch.map(|(due, _)| *due), watch.map(|(due, _)| *due)].into_iter().flatten().min();
        let asking = match self.servers.next_due() {
            Some(up) if self.servers.all_down() => asking.map(|due| due.max(up)),
            _ => asking,
        };
        [asking, self.publishing.due(), self.next_loss()].into_iter().flatten().min()
    }

    // ---- asking -------------------------------------------------------------------

    fn may_fetch(&self) -> bool {
        self.asked.len().saturating_sub(self.blocking) < self.settings.fetches
    }

    fn may_watch(&self) -> bool {
        self.blocking < self.settings.watches
    }

    fn ask_due(&mut self, now: Instant, actions: &mut Vec<Action>) {
        loop {
            let fetch = self.may_fetch();
            let watch = self.may_watch();
            let Some(target) = self.queues.next(now, fetch, watch) else { return };
            let Some(server) = self.servers.pick(now) else { return };
            self.queues.remove(&target);
            actions.extend(self.ask(target, server, now).map(Action::Ask));
        }
    }

    fn ask(&mut self, target: Target, server: usize, now: Instant) -> Option<Query> {
        let longest = self.longest_wait();
        let every = spread(self.settings.resync, &mut self.random);
        let confirming = self.losses.held() && target == Target::Services;
        let ask = self.poll(&target)?.ask(longest, every, now);
        let id = self.next_id;
        self.next_id += 1;
        self.totals.questions += 1;
        if ask.index.is_some() {
            self.blocking += 1;
        }
        // A loss is confirmed by servers in turn.
        let server = if confirming { self.servers.after(self.totals.last_list) } else { server };
        if target == Target::Services {
            self.totals.last_list = server;
        }
        let timeout = if ask.index.is_some() { ask.wait + ask.wait / 16 + PATIENCE } else { PATIENCE };
        let path = path(&target, ask, &self.settings.mapping);
        self.queues.busy(&target, true);
        self.asked.insert(id, Asked { target, ask, server, at: now });
        Some(Query { id, server, path, timeout })
    }

    /// With more services than watches each gets a short turn.
    fn longest_wait(&self) -> Duration {
        let (watches, services) = (self.settings.watches.max(1), self.services.len());
        if services <= watches {
            return self.settings.wait;
        }
        let turns = u32::try_from(services.div_ceil(watches)).unwrap_or(u32::MAX);
        (ROTATION / turns.max(1)).clamp(Duration::from_secs(1), self.settings.wait)
    }

    fn finish(&mut self, id: u64) -> Option<Asked> {
        let asked = self.asked.remove(&id)?;
        self.queues.busy(&asked.target, false);
        if asked.ask.index.is_some() {
            self.blocking = self.blocking.saturating_sub(1);
        }
        Some(asked)
    }

    fn poll(&mut self, target: &Target) -> Option<&mut Poll> {
        match target {
            Target::Services => Some(&mut self.list),
            Target::Instances(name) => self.services.get_mut(name).map(|watched| &mut watched.poll),
        }
    }

    /// Puts a question that is not under way into its queue, once.
    fn schedule(&mut self, target: &Target) {
        self.queues.remove(target);
        let Some((due, blocks)) = self.poll(target).map(|poll| (poll.due(), poll.blocks())) else { return };
        self.queues.insert(target, due, blocks);
    }

    fn fail(&mut self, asked: &Asked, reason: String, retry_after: Option<Duration>, now: Instant) {
        self.totals.failures += 1;
        let elsewhere = self.servers.count() > 1;
        self.last_failure = Some(reason);
        if asked.target == Target::Services {
            self.away.get_or_insert(now);
        }
        let mut random = self.random.fork();
        if let Some(poll) = self.poll(&asked.target) {
            poll.on_failure(elsewhere, retry_after, &mut random, now);
        }
        self.schedule(&asked.target);
    }

    // ---- believing ----------------------------------------------------------------

    fn believe(&mut self, asked: &Asked, answer: &Answer, now: Instant) {
        let understood = match &asked.target {
            Target::Services => {
                answer::services(&answer.body).map(|names| self.on_list(names, asked, answer, now))
            }
            Target::Instances(name) => {
                answer::instances(&answer.body).map(|all| self.on_instances(name, &all, asked, answer, now))
            }
        };
        match understood {
            Ok(()) => {
                self.forbidden.remove(&asked.target);
                if self.servers.on_success(asked.server) {
                    self.hurry_all(now);
                }
                self.schedule(&asked.target);
            }
            Err(error) => self.fail(asked, error.to_string(), None, now),
        }
    }

    /// A server is back: everything is asked again, spread so that it survives that.
    fn hurry_all(&mut self, now: Instant) {
        let names: Vec<String> = self.services.keys().cloned().collect();
        let span = Duration::from_millis(2 * names.len() as u64);
        for name in names {
            let due = now + span.mul_f64(self.random.f64());
            let target = Target::Instances(name);
            if let Some(poll) = self.poll(&target).filter(|poll| poll.failures() > 0) {
                poll.hurry(due);
                self.schedule(&target);
            }
        }
    }

    fn on_list(
        &mut self,
        names: BTreeMap<String, BTreeSet<String>>,
        asked: &Asked,
        answer: &Answer,
        now: Instant,
    ) {
        let wanted: BTreeSet<&str> =
            names.keys().map(String::as_str).filter(|name| self.settings.wants(name)).collect();
        self.claim(&wanted, now);
        let missing: BTreeSet<String> =
            self.services.keys().filter(|name| !wanted.contains(name.as_str())).cloned().collect();
        for name in &missing {
            if let Some(watched) = self.services.get_mut(name).filter(|watched| watched.vanished.is_none()) {
                watched.vanished = Some(now);
                self.leaving.insert(name.clone());
                // The leader is asked whether it still has instances.
                watched.poll.doubt(now);
                self.schedule(&Target::Instances(name.clone()));
            }
        }
        // A list without any service at all lacks even Consul's own.
        let listed = if names.is_empty() { BTreeSet::new() } else { wanted };
        let servers = (asked.server, self.servers.count());
        self.losses.on_list(&listed, &missing, self.services.len(), servers, now);
        self.listed = true;
        self.away = None;
        self.list.on_believed(answer, now);
        if self.losses.held() {
            self.list.confirm(now + self.settings.confirm_every);
        }
    }

    /// Watches the services of the list whose hosts nobody else has, and those that the state still has of earlier.
    fn claim(&mut self, wanted: &BTreeSet<&str>, now: Instant) {
        self.unfit.clear();
        for name in wanted {
            if let Some(watched) = self.services.get_mut(*name) {
                if watched.vanished.take().is_some() {
                    self.leaving.remove(*name);
                    watched.poll.doubt(now);
                    self.schedule(&Target::Instances((*name).to_owned()));
                }
                continue;
            }
            match self.hosts_for(name) {
                Ok(hosts) => self.watch(name, hosts, None, now),
                Err(reason) => drop(self.unfit.insert((*name).to_owned(), reason)),
            }
        }
        if !self.listed {
            let unclaimed = |host: &&Hostname| !self.claims.contains_key(*host);
            let hosts: Vec<Hostname> = self.seed.services.keys().filter(unclaimed).cloned().collect();
            for host in hosts {
                let name = host.split('.').next().unwrap_or_default().to_owned();
                let hosts = self.settings.mapping.hosts(&name).unwrap_or_default();
                if hosts.contains(&host) && hosts.iter().all(|host| !self.claims.contains_key(host)) {
                    self.watch(&name, hosts, Some(now), now);
                } else if !self.claims.contains_key(&host) {
                    self.watch(&host.clone(), vec![host], Some(now), now);
                }
            }
        }
    }

    fn hosts_for(&self, name: &str) -> Result<Vec<Hostname>, String> {
        let hosts = self.settings.mapping.hosts(name)?;
        match hosts.iter().find_map(|host| self.claims.get(host)) {
            Some(other) => Err(format!("has the same host as the service {other}")),
            None => Ok(hosts),
        }
    }

    fn watch(&mut self, name: &str, hosts: Vec<Hostname>, vanished: Option<Instant>, now: Instant) {
        let resync = now + spread(self.settings.resync, &mut self.random);
        let mut poll = Poll::new(now, resync, SERVICE_SLOWEST);
        if vanished.is_some() {
            poll.doubt(now);
        }
        for host in &hosts {
            self.claims.insert(host.clone(), name.to_owned());
        }
        if vanished.is_some() {
            self.leaving.insert(name.to_owned());
        }
        let seeded = hosts.first().and_then(|host| self.seed.services.get(host)).cloned();
        self.services.insert(name.to_owned(), Watched::new(poll, hosts, seeded, vanished));
        self.schedule(&Target::Instances(name.to_owned()));
    }

    fn on_instances(
        &mut self,
        name: &str,
        instances: &[answer::Instance],
        asked: &Asked,
        answer: &Answer,
        now: Instant,
    ) {
        let Some(watched) = self.services.get_mut(name) else { return };
        let had = watched.has_endpoints(&self.seed);
        let lost = instances.is_empty() && had;
        if lost && asked.ask.consistency == Consistency::Stale {
            watched.poll.doubt(now);
            return;
        }
        watched.poll.on_believed(answer, now);
        watched.fetched = true;
        if lost {
            // It is believed when the list does not have the service either.
            watched.emptied.get_or_insert(now);
            return;
        }
        watched.came_back();
        let converted = convert(name, instances, &self.settings.mapping, watched.previous());
        if watched.take_over(converted, instances.len()) {
            self.publishing.dirty(name, now);
        }
    }

    // ---- losing -------------------------------------------------------------------

    /// Nothing is removed while a loss is held or something is forbidden.
    fn may_remove(&self) -> bool {
        !self.losses.held() && self.forbidden.is_empty()
    }

    fn next_loss(&self) -> Option<Instant> {
        if !self.may_remove() {
            return None;
        }
        let leaving = self.leaving.iter().filter_map(|name| self.services.get(name));
        leaving.filter_map(|watched| watched.loss_due(SETTLE, self.settings.grace)).min()
    }

    fn remove_lost(&mut self, now: Instant) {
        if self.next_loss().is_none_or(|due| due > now) {
            return;
        }
        for name in &self.leaving {
            let Some(watched) = self.services.get_mut(name) else { continue };
            if watched.loss_due(SETTLE, self.settings.grace).is_none_or(|due| due > now) {
                continue;
            }
            if watched.drained {
                watched.wanted = None;
                watched.removed = true;
            } else {
                watched.drained = true;
                if watched.wanted.is_none() {
                    continue;
                }
                let drained = convert(name, &[], &self.settings.mapping, watched.previous());
                watched.wanted = Some(Arc::new(drained));
            }
            self.publishing.dirty(name, now);
        }
    }

    /// Forgets a service that is removed and published as such.
    fn forget(&mut self, name: &str) {
        if let Some(watched) = self.services.remove(name) {
            for host in &watched.hosts {
                self.claims.remove(host);
            }
            self.queues.remove(&Target::Instances(name.to_owned()));
        }
        self.leaving.remove(name);
        self.forbidden.remove(&Target::Instances(name.to_owned()));
    }
}

/// Give or take a fifth.
fn spread(span: Duration, random: &mut fastrand::Rng) -> Duration {
    span.mul_f64(0.8 + random.f64() * 0.4)
}

fn path(target: &Target, ask: Ask, mapping: &Mapping) -> String {
    let mut path = match target {
        Target::Services => "/v1/catalog/services".to_owned(),
        Target::Instances(name) => format!("/v1/health/service/{}", escape(name)),
    };
    path.push_str(&format!("?dc={}", escape(&mapping.datacenter)));
    path.push_str(match ask.consistency {
        Consistency::Stale => "&stale",
        Consistency::Consistent => "&consistent",
    });
    if let Some(index) = ask.index {
        path.push_str(&format!("&index={index}&wait={}ms", ask.wait.as_millis()));
    }
    path
}

/// Percent-encoding of everything that is not unreserved (RFC 3986).
#[must_use]
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(char::from(byte))
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
