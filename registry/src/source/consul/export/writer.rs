//! When a catalog is read and written, and what becomes of failures. A machine without IO.
//!
//! One question watches the node of the mesh, so that whatever happens to it is seen and made good at once: entries that
//! somebody removed, a catalog that was restored to before. One transaction is under way at a time. An answer counts
//! only when nothing was written since its question, for it may be from before.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Settings;
use super::desired::Desired;
use super::plan::{Change, Export, Plan, Transaction, Work};
use crate::source::consul::answer::{self, Answer, Node, Registered};
use crate::source::consul::poll::{Ask, Consistency, Poll, Verdict};
use crate::source::consul::servers::Servers;

/// The node is asked for at least this often while its answers come at once.
const SLOWEST: Duration = Duration::from_secs(2);
/// A call that does not block is answered within this time, and a blocking one so long after its wait.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the rate leaves to be written is looked at again after this time.
const WAITING: Duration = Duration::from_secs(1);
/// What must not go yet is looked at again after this time.
const DEFERRED: Duration = Duration::from_secs(5);
/// Another owner's lease is looked at again after this time.
const LEFT: Duration = Duration::from_secs(5);
/// The pause after a failed transaction, at first,
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
/// and at last.
const BACKOFF_LAST: Duration = Duration::from_secs(60);

/// A moment, by both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time {
    /// For what lies between two moments.
    pub at: Instant,
    /// Seconds since 1970, for leases.
    pub unix: u64,
}

/// A call to a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// Names the answer.
    pub id: u64,
    /// Position of the server in the settings.
    pub server: usize,
    /// Path and query.
    pub path: String,
    /// What is put there; nothing is, when it is a question.
    pub body: Option<Value>,
    /// No answer within this time is a failure.
    pub timeout: Duration,
}

/// How the writing stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Everything that should be in the catalog was there when it was read last.
    pub synced: bool,
    /// Entries of the mesh that should be there.
    pub entries: usize,
    /// Entries that wait for the rate.
    pub waiting: usize,
    /// Entries that should go, and wait because not much goes at once.
    pub deferred: usize,
    /// What is on our node and is not ours, with the reason; or whose the whole node is.
    pub conflicts: Vec<String>,
    /// Services and entries that are not written as they are, with the reason.
    pub problems: Vec<String>,
    /// Why the last transaction or question failed, while they fail.
    pub failure: Option<String>,
    /// Entries that were written.
    pub written: u64,
    /// Entries that were removed.
    pub removed: u64,
    /// Calls that failed.
    pub failures: u64,
}

#[derive(Debug)]
struct Reading {
    id: u64,
    ask: Ask,
    server: usize,
    at: Instant,
    /// How much had been written when it was asked; `None` when something was being written.
    writes: Option<u64>,
}

#[derive(Debug)]
struct Writing {
    id: u64,
    server: usize,
    at: Instant,
    /// `None` for a claim.
    transaction: Option<Transaction>,
}

/// What is known of the catalog.
#[derive(Debug)]
enum Seen {
    /// Nothing that holds.
    Nothing,
    /// Our node; `None` when it is not there.
    Node(Option<Node>),
}

/// The writer of one catalog.
#[derive(Debug)]
pub struct Writer {
    settings: Settings,
    random: fastrand::Rng,
    servers: Servers,
    poll: Poll,
    export: Export,
    desired: Option<Desired>,
    seen: Seen,
    reading: Option<Reading>,
    writing: Option<Writing>,
    queue: VecDeque<Transaction>,
    /// Entries that Consul did not take, with the reason, as they were.
    refused: BTreeMap<String, (Registered, String)>,
    /// Entries that were written and not read since.
    unconfirmed: BTreeSet<String>,
    /// When there may be something to write; at once after a change.
    due: Option<Instant>,
    /// Nothing is written before.
    hold: Option<Instant>,
    retry_refused: Instant,
    writes: u64,
    /// Transactions that failed in a row, and why the last one did.
    failures: u32,
    not_written: Option<String>,
    not_read: Option<String>,
    next_id: u64,
    unfit: Vec<String>,
    status: Status,
}

impl Writer {
    /// A writer that is the owner of `epoch`. It reads from `now` on, and writes when it knows what is desired; `random`
    /// spreads what must not come together.
    #[must_use]
    pub fn new(settings: Settings, epoch: u64, mut random: fastrand::Rng, now: Instant) -> Self {
        let resync = settings.resync;
        Self {
            servers: Servers::new(settings.servers, random.usize(..settings.servers.max(1))),
            poll: Poll::new(now, now + resync, SLOWEST),
            export: Export::new(settings.clone(), epoch),
            settings,
            random,
            desired: None,
            seen: Seen::Nothing,
            reading: None,
            writing: None,
            queue: VecDeque::new(),
            refused: BTreeMap::new(),
            unconfirmed: BTreeSet::new(),
            due: None,
            hold: None,
            retry_refused: now + resync,
            writes: 0,
            failures: 0,
            not_written: None,
            not_read: None,
            next_id: 0,
            unfit: Vec::new(),
            status: Status::default(),
        }
    }

    /// Where and how it writes.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What should be in the catalog from now on, and what of the mesh cannot be.
    pub fn on_desired(&mut self, desired: Desired, unfit: Vec<String>, now: Time) -> Vec<Call> {
        self.unfit = unfit;
        if self.desired.as_ref() != Some(&desired) {
            self.refused.retain(|id, (entry, _)| desired.get(id) == Some(entry));
            self.status.entries = desired.len();
            self.desired = Some(desired);
            // What was planned before may be wrong now.
            self.queue.clear();
            self.due = Some(now.at);
        }
        self.tick(now)
    }

    /// The time has come to `now`.
    pub fn tick(&mut self, now: Time) -> Vec<Call> {
        if self.retry_refused <= now.at {
            self.retry_refused = now.at + self.settings.resync;
            if !self.refused.is_empty() {
                self.refused.clear();
                self.due = Some(now.at);
            }
        }
        let write = self.write(now);
        write.into_iter().chain(self.read(now.at)).collect()
    }

    /// The server answered the call `id`.
    pub fn on_answer(&mut self, id: u64, answer: &Answer, now: Time) -> Vec<Call> {
        if let Some(reading) = self.reading.take_if(|reading| reading.id == id) {
            self.on_read(&reading, answer, now.at);
        } else if let Some(writing) = self.writing.take_if(|writing| writing.id == id) {
            self.on_written(writing, answer, now.at);
        }
        self.tick(now)
    }

    /// The call `id` has no answer.
    pub fn on_failure(&mut self, id: u64, reason: &str, now: Time) -> Vec<Call> {
        if let Some(reading) = self.reading.take_if(|reading| reading.id == id) {
            self.servers.on_failure(reading.server, reading.at, now.at);
            self.read_failed(reason.to_owned(), None, now.at);
        } else if let Some(writing) = self.writing.take_if(|writing| writing.id == id) {
            self.servers.on_failure(writing.server, writing.at, now.at);
            self.write_failed(reason.to_owned(), now.at);
        }
        self.tick(now)
    }

    /// The token, or a certificate, is another one: what failed before may not any more.
    pub fn on_credentials(&mut self, now: Time) -> Vec<Call> {
        self.poll.hurry(now.at);
        self.refused.clear();
        self.write_succeeded();
        self.due = Some(now.at);
        self.tick(now)
    }

    /// When [`tick`](Self::tick) has something to do next, if nothing else happens.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        let known = self.desired.is_some() && matches!(self.seen, Seen::Node(_));
        let planned = if self.queue.is_empty() { self.due.filter(|_| known) } else { self.hold.or(self.due) };
        let write =
            planned.filter(|_| self.writing.is_none()).map(|due| self.hold.map_or(due, |h| h.max(due)));
        let read = self.reading.is_none().then(|| self.poll.due());
        let calls = [write, read].into_iter().flatten().min();
        let calls = match self.servers.next_due() {
            Some(up) if self.servers.all_down() => calls.map(|due| due.max(up)),
            _ => calls,
        };
        [calls, Some(self.retry_refused)].into_iter().flatten().min()
    }

    /// How it stands.
    #[must_use]
    pub fn status(&self) -> Status {
        let refused =
            self.refused.iter().map(|(id, (_, reason))| format!("{id}: Consul refused it: {reason}"));
        Status {
            problems: self.unfit.iter().cloned().chain(refused).collect(),
            failure: self.not_read.clone().or_else(|| self.not_written.clone()),
            ..self.status.clone()
        }
    }

    // ---- reading ------------------------------------------------------------------

    fn read(&mut self, now: Instant) -> Option<Call> {
        if self.reading.is_some() || self.poll.due() > now {
            return None;
        }
        let server = self.servers.pick(now)?;
        let every = self.settings.resync.mul_f64(0.8 + 0.4 * self.random.f64());
        let ask = self.poll.ask(self.settings.wait, every, now);
        // Who writes needs to know what is there, not what was: the leader answers always.
        let ask = Ask { consistency: Consistency::Consistent, ..ask };
        let mut path =
            format!("/v1/catalog/node/{}?dc={}&consistent", self.settings.node(), self.settings.datacenter);
        let mut timeout = PATIENCE;
        if let Some(index) = ask.index {
            path += &format!("&index={index}&wait={}s", ask.wait.as_secs());
            timeout += ask.wait + ask.wait / 16;
        }
        let id = self.id();
        let writes = self.writing.is_none().then_some(self.writes);
        self.reading = Some(Reading { id, ask, server, at: now, writes });
        Some(Call { id, server, path, body: None, timeout })
    }

    fn on_read(&mut self, reading: &Reading, answer: &Answer, now: Instant) {
        match self.poll.on_answer(answer, reading.ask, now) {
            Verdict::Believe if answer.filtered => {
                self.read_failed(
                    "the token does not show everything: results are filtered by ACLs".into(),
                    None,
                    now,
                );
            }
            Verdict::Believe => match answer::node(&answer.body) {
                Ok(node) => {
                    self.servers.on_success(reading.server);
                    self.poll.on_believed(answer, now);
                    self.believe(node, reading, now);
                }
                Err(error) => self.read_failed(error.to_string(), None, now),
            },
            // Only answers of other servers than the leader are doubted.
            Verdict::Doubt => {}
            Verdict::Refuse(reason) => {
                self.servers.on_failure(reading.server, reading.at, now);
                self.read_failed(reason, answer.retry_after, now);
            }
            Verdict::Forbidden(reason) => self.read_failed(reason, None, now),
        }
    }

    fn believe(&mut self, node: Option<Node>, reading: &Reading, now: Instant) {
        if reading.writes != Some(self.writes) || self.writing.is_some() {
            // It may be from before what was written: asked again, without waiting for a change.
            self.poll.confirm(self.poll.due());
            return;
        }
        let is_there = |id: &String| node.as_ref().is_some_and(|node| node.services.contains_key(id));
        let lost = self.unconfirmed.iter().find(|id| !is_there(id)).cloned();
        let confirmed = lost.is_none() && !self.unconfirmed.is_empty();
        self.unconfirmed.clear();
        self.seen = Seen::Node(node);
        self.due = Some(now);
        self.not_read = None;
        if confirmed {
            self.write_succeeded();
        }
        if let Some(id) = lost {
            let reason = "was written and is not there: somebody removes it, or the token may not read it";
            self.write_failed(format!("{id} {reason}"), now);
        }
    }

    fn read_failed(&mut self, reason: String, retry_after: Option<Duration>, now: Instant) {
        self.status.failures += 1;
        self.not_read = Some(reason);
        self.poll.on_failure(self.servers.count() > 1, retry_after, &mut self.random, now);
    }

    // ---- writing ------------------------------------------------------------------

    fn write(&mut self, now: Time) -> Option<Call> {
        if self.writing.is_some() || self.hold.is_some_and(|hold| hold > now.at) {
            return None;
        }
        if self.queue.is_empty() && self.due.is_some_and(|due| due <= now.at) {
            self.due = None;
            if let Some(claim) = self.plan(now) {
                return self.put(claim, None, now.at);
            }
        }
        let transaction = self.queue.pop_front()?;
        self.put(transaction.body.clone(), Some(transaction), now.at)
    }

    /// Makes the queue of transactions; a claim that must come before, if one must.
    fn plan(&mut self, now: Time) -> Option<Value> {
        let (Some(desired), Seen::Node(node)) = (&self.desired, &self.seen) else { return None };
        let fit = || desired.iter().filter(|(id, _)| !self.refused.contains_key(*id));
        let without: Option<Desired> = (!self.refused.is_empty())
            .then(|| fit().map(|(id, entry)| (id.clone(), entry.clone())).collect());
        let plan = self.export.plan(without.as_ref().unwrap_or(desired), node.as_ref(), now.unix, now.at);
        self.status.synced = false;
        match plan {
            Plan::Leave(reason) => {
                self.status.conflicts = vec![reason];
                self.due = Some(now.at + LEFT);
                None
            }
            Plan::Claim(claim) => Some(claim),
            Plan::Write(Work { transactions, conflicts, deferred, waiting }) => {
                self.status.synced =
                    transactions.is_empty() && conflicts.is_empty() && deferred + waiting == 0;
                self.status.conflicts = conflicts;
                (self.status.deferred, self.status.waiting) = (deferred, waiting);
                self.queue = transactions.into();
                let quiet = self.queue.is_empty();
                let renewal = node.as_ref().map(|node| self.export.renewal(node).saturating_sub(now.unix));
                let again = [
                    (waiting > 0).then_some(WAITING),
                    (deferred > 0).then_some(DEFERRED),
                    renewal.map(Duration::from_secs),
                ];
                self.due = again.into_iter().flatten().min().map(|pause| now.at + pause);
                if quiet {
                    self.write_succeeded();
                }
                None
            }
        }
    }

    fn put(&mut self, body: Value, transaction: Option<Transaction>, now: Instant) -> Option<Call> {
        let Some(server) = self.servers.pick(now) else {
            // Planned again when a server may be asked.
            self.queue.clear();
            self.due = Some(now);
            return None;
        };
        let id = self.id();
        self.writes += 1;
        self.writing = Some(Writing { id, server, at: now, transaction });
        let path = format!("/v1/txn?dc={}", self.settings.datacenter);
        Some(Call { id, server, path, body: Some(body), timeout: PATIENCE })
    }

    fn on_written(&mut self, writing: Writing, answer: &Answer, now: Instant) {
        match (answer.status, writing.transaction) {
            (200, None) => {
                // What it is now, with its new index, is read.
                self.seen = Seen::Nothing;
                self.poll.confirm(now);
            }
            (200, Some(transaction)) => {
                self.servers.on_success(writing.server);
                for change in transaction.changes {
                    self.apply(change, now);
                }
                if self.queue.is_empty() && self.due.is_none() {
                    self.due = Some(now);
                }
            }
            (409, transaction) => self.on_refused(transaction.as_ref(), answer, now),
            (429 | 500.., _) => {
                self.servers.on_failure(writing.server, writing.at, now);
                self.write_failed(answer.reason(), now);
            }
            _ => self.write_failed(answer.reason(), now),
        }
    }

    /// What a transaction has done is known without reading it.
    fn apply(&mut self, change: Change, now: Instant) {
        let Seen::Node(Some(node)) = &mut self.seen else { return };
        match change.becomes {
            Some(entry) => {
                self.status.written += 1;
                self.unconfirmed.insert(change.id.clone());
                node.services.insert(change.id, entry);
            }
            None => {
                self.status.removed += 1;
                self.export.on_removed(now);
                self.unconfirmed.remove(&change.id);
                node.services.remove(&change.id);
            }
        }
    }

    /// Consul took no part of a transaction: our claim does not hold, or an entry is not to its liking.
    fn on_refused(&mut self, transaction: Option<&Transaction>, answer: &Answer, now: Instant) {
        let refusals = answer::refusals(&answer.body).unwrap_or_default();
        let mut entries = 0;
        for (position, reason) in &refusals {
            let change = transaction.and_then(|transaction| transaction.entry_of(*position));
            let wanted = change.and_then(|change| self.desired.as_ref()?.get_key_value(&change.id));
            if let Some((id, entry)) = wanted {
                self.refused.insert(id.clone(), (entry.clone(), reason.clone()));
                entries += 1;
            }
        }
        if entries > 0 {
            // The others are written without them.
            self.queue.clear();
            self.due = Some(now);
            self.status.failures += 1;
            return;
        }
        // Somebody has changed the node: what it is now is read.
        self.seen = Seen::Nothing;
        let reason = refusals.first().map_or_else(|| answer.reason(), |(_, reason)| reason.clone());
        self.write_failed(format!("the claim of {} was refused: {reason}", self.settings.node()), now);
        self.poll.confirm(now);
    }

    fn write_failed(&mut self, reason: String, now: Instant) {
        let pause = (BACKOFF_FIRST * 2u32.saturating_pow(self.failures.min(8))).min(BACKOFF_LAST);
        self.failures = self.failures.saturating_add(1);
        self.hold = Some(now + pause.mul_f64(0.75 + self.random.f64() / 2.0));
        self.status.failures += 1;
        self.not_written = Some(reason);
        self.status.synced = false;
        self.queue.clear();
        self.due = Some(now);
    }

    fn write_succeeded(&mut self) {
        (self.failures, self.hold, self.not_written) = (0, None, None);
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}
