//! Registers in the configuration: clients that write and read them through the admin API of every member, and a
//! verdict on what they were told.
//!
//! A register is a `ServiceEntry` whose label and endpoint are its value, so that writing it is also a push to the
//! proxies of its namespace. Every client does one thing after the other and keeps its connections; what nobody
//! answered may or may not have happened, and the history says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::{Admin, Door};
use crate::history::{Act, History, Swap};
use crate::http::Answer;
use crate::text;

/// Who is not answered in this time asks somebody else; what became of the call is not known.
const ANSWER: Duration = Duration::from_secs(4);
/// Every so many writes of a client, one is conditional on what it read last.
const CONDITIONAL: u64 = 4;
/// Audit entries that are read at once.
const PAGE: u64 = 1000;

/// How much is written.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Registers.
    pub keys: usize,
    /// Namespaces that they are spread over.
    pub areas: usize,
    /// Clients; each has one register, which others share when there are fewer.
    pub clients: usize,
    /// Writes of all clients in a second; each is followed by a read through another member.
    pub writes_per_second: u32,
}

/// The clients at work.
#[derive(Debug)]
pub struct Registers {
    shared: Arc<Shared>,
    stop: CancellationToken,
    tasks: TaskTracker,
    began: Instant,
}

#[derive(Debug)]
struct Shared {
    doors: Vec<Door>,
    rate: Rate,
    values: AtomicU64,
    book: Mutex<Book>,
}

/// What happened.
#[derive(Debug, Default)]
struct Book {
    history: History,
    /// The revision and the register of every acknowledged write that changed something.
    written: Vec<(u64, usize)>,
    unknown: usize,
    reads: usize,
    /// Answers that no fault explains.
    strange: Vec<String>,
}

/// What all clients were told, judged.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// Writes that were acknowledged.
    pub acknowledged: usize,
    /// Writes without an answer.
    pub unknown: usize,
    /// Reads that were answered.
    pub reads: usize,
    /// Acknowledged writes that the audit trail does not have at their revision.
    pub lost: Vec<String>,
    /// Why no order of reads and writes explains the answers.
    pub not_linearizable: Option<String>,
    /// Answers that no fault explains.
    pub strange: Vec<String>,
    /// How long the clients worked.
    pub took: Duration,
}

impl Registers {
    /// Starts the clients.
    ///
    /// # Errors
    ///
    /// When the audit trail cannot be told to keep everything.
    pub async fn start(doors: Vec<Door>, rate: Rate) -> anyhow::Result<Self> {
        let first = doors.first().context("no member")?;
        let keep = json!({"entries": 1_000_000, "ageSeconds": 0});
        let kept = first.call("PUT", "/api/v1/audit/retention", Some(&keep)).await?;
        ensure!(kept.status == 204, "{kept:?}");
        let shared =
            Arc::new(Shared { doors, rate, values: AtomicU64::new(1), book: Mutex::new(Book::default()) });
        let registers =
            Self { shared, stop: CancellationToken::new(), tasks: TaskTracker::new(), began: Instant::now() };
        for number in 0..rate.clients {
            let client = Client::new(registers.shared.clone(), number);
            registers.tasks.spawn(client.work(registers.began, registers.stop.clone()));
        }
        Ok(registers)
    }

    /// Writes acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.shared.book().written.len()
    }

    /// Stops the clients, reads every register once more, and judges.
    ///
    /// # Errors
    ///
    /// When the end state cannot be read.
    pub async fn finish(self) -> anyhow::Result<Verdict> {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let took = self.began.elapsed();
        for key in 0..self.shared.rate.keys {
            let mut way = Way::new(&self.shared, key);
            self.shared.read(&mut way, key).await.with_context(|| format!("register {key} at the end"))?;
        }
        let trail = self.shared.trail().await?;
        let book = self.shared.book();
        let missing = |(revision, key): &&(u64, usize)| {
            !trail.get(revision).is_some_and(|objects| objects.contains(&self.shared.rate.what(*key)))
        };
        let lost = book.written.iter().filter(missing);
        Ok(Verdict {
            acknowledged: book.written.len(),
            unknown: book.unknown,
            reads: book.reads,
            lost: lost.map(|(revision, key)| format!("register {key} at revision {revision}")).collect(),
            not_linearizable: book.history.check().err(),
            strange: book.strange.clone(),
            took,
        })
    }
}

impl Rate {
    fn area(&self, key: usize) -> String {
        area(key.checked_rem(self.areas).unwrap_or(0))
    }

    /// As the audit trail names it.
    fn what(&self, key: usize) -> String {
        format!("ServiceEntry/{}/register-{key}", self.area(key))
    }

    fn path(&self, key: usize) -> String {
        format!("/api/v1/config/{}", self.what(key))
    }

    fn object(&self, key: usize, value: u64) -> Value {
        let (area, name) = (self.area(key), format!("register-{key}"));
        let [.., a, b, c] = value.to_be_bytes();
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
            "metadata": {"name": name, "namespace": area, "labels": {"value": value.to_string()}},
            "spec": {
                "hosts": [format!("{name}.{area}.example")], "exportTo": ["."], "resolution": "STATIC",
                "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
                "endpoints": [{"address": format!("10.{a}.{b}.{c}")}],
            },
        })
    }
}

/// The namespace with this number.
#[must_use]
pub fn area(number: usize) -> String {
    format!("area-{number}")
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a value; if `known` is said, only over this value at this revision.
    async fn write(&self, way: &mut Way, key: usize, known: Option<(u64, u64)>) {
        if !way.is_ready().await {
            return;
        }
        let value = self.values.fetch_add(1, Ordering::Relaxed);
        let expected = known.map(|(value, _)| value);
        let act = |end| match known {
            Some(_) => Act::Swap { expected, value, end },
            None => Act::Put(value),
        };
        let condition =
            known.map(|(_, revision)| format!("?expectedRevision={revision}")).unwrap_or_default();
        let ticket = self.book().history.invoke(key, act(Swap::Maybe));
        let object = self.rate.object(key, value);
        let answer = way.call("PUT", &(self.rate.path(key) + &condition), Some(&object)).await;
        let mut book = self.book();
        match answer.map(|answer| (answer.status.as_u16(), answer)) {
            None => book.unknown += 1,
            Some((200, answer)) => {
                book.history.returned(ticket, act(Swap::Done));
                book.written.push((revision(&answer), key));
            }
            Some((409, _)) if known.is_some() => book.history.returned(ticket, act(Swap::Conflict)),
            Some((status, answer)) => {
                book.history.refused(ticket);
                book.strange.push(format!("a write of register {key}: {status} {}", answer.text()));
            }
        }
    }

    /// Reads a register: its value and revision.
    async fn read(&self, way: &mut Way, key: usize) -> anyhow::Result<Option<(u64, u64)>> {
        ensure!(way.is_ready().await, "no member takes connections");
        let ticket = self.book().history.invoke(key, Act::Get(None));
        let answer = way.call("GET", &self.rate.path(key), None).await.context("no answer")?;
        let found = match answer.status.as_u16() {
            200 => Some(value(&answer)?),
            404 => None,
            status => {
                let words = format!("a read of register {key}: {status} {}", answer.text());
                self.book().strange.push(words);
                return Ok(None);
            }
        };
        let mut book = self.book();
        book.history.returned(ticket, Act::Get(found.map(|(value, _)| value)));
        book.reads += 1;
        Ok(found)
    }

    /// What the audit trail has at each revision.
    async fn trail(&self) -> anyhow::Result<BTreeMap<u64, BTreeSet<String>>> {
        let (mut trail, mut after) = (BTreeMap::new(), 0);
        let mut way = Way::new(self, 0);
        loop {
            ensure!(way.is_ready().await, "no member takes connections");
            let path = format!("/api/v1/audit?after={after}&limit={PAGE}");
            let answer = way.call("GET", &path, None).await.context("no audit trail")?;
            let page: Value = answer.json()?;
            for entry in page.get("entries").and_then(Value::as_array).into_iter().flatten() {
                after = entry.get("revision").and_then(Value::as_u64).context("an entry without revision")?;
                let objects = entry.get("objects").and_then(Value::as_array).into_iter().flatten();
                trail.insert(after, objects.map(|object| text(object, "/what").to_owned()).collect());
            }
            if page.get("more") != Some(&Value::Bool(true)) {
                return Ok(trail);
            }
        }
    }
}

fn revision(answer: &Answer) -> u64 {
    let report: Value = answer.json().unwrap_or_default();
    report.get("revision").and_then(Value::as_u64).unwrap_or_default()
}

fn value(answer: &Answer) -> anyhow::Result<(u64, u64)> {
    let object: Value = answer.json()?;
    let number = |pointer| text(&object, pointer).parse().with_context(|| format!("{pointer} of {object}"));
    Ok((number("/metadata/labels/value")?, number("/metadata/resourceVersion")?))
}

/// A client: it writes through one member and reads through another, and moves on when one does not answer.
struct Client {
    shared: Arc<Shared>,
    number: usize,
    writes: Way,
    reads: Way,
}

impl Client {
    fn new(shared: Arc<Shared>, number: usize) -> Self {
        let (writes, reads) = (Way::new(&shared, number), Way::new(&shared, number + 1));
        Self { shared, number, writes, reads }
    }

    async fn work(mut self, began: Instant, stop: CancellationToken) {
        let Rate { keys, clients, writes_per_second, .. } = self.shared.rate;
        let period = Duration::from_secs(1).mul_f64(f64_of(clients) / f64::from(writes_per_second.max(1)));
        let first = began + period.mul_f64(f64_of(self.number) / f64_of(clients));
        let mut turns = tokio::time::interval_at(first, period);
        turns.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let key = self.number.checked_rem(keys).unwrap_or(0);
        let (mut known, mut count) = (None, 0);
        while stop.run_until_cancelled(turns.tick()).await.is_some() {
            count += 1;
            let condition = known.filter(|_| count % CONDITIONAL == 0);
            self.shared.write(&mut self.writes, key, condition).await;
            known = self.shared.read(&mut self.reads, key).await.ok().flatten();
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a small number")]
fn f64_of(number: usize) -> f64 {
    number as f64
}

/// The way to the members: the one that is asked, for as long as it answers.
struct Way {
    doors: Vec<Door>,
    at: usize,
    open: Option<Admin>,
}

impl Way {
    fn new(shared: &Shared, first: usize) -> Self {
        Self { doors: shared.doors.clone(), at: first, open: None }
    }

    /// Whether there is a connection; if there was none, every member is tried once.
    async fn is_ready(&mut self) -> bool {
        self.open = self.open.take().filter(Admin::is_open);
        for _ in 0..self.doors.len() {
            if self.open.is_some() {
                break;
            }
            let door = self.at.checked_rem(self.doors.len()).and_then(|at| self.doors.get(at));
            match door {
                Some(door) => self.open = door.open().await.ok(),
                None => return false,
            }
            self.at += usize::from(self.open.is_none());
        }
        self.open.is_some()
    }

    /// The answer, if there is one; otherwise somebody else is asked next.
    async fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> Option<Answer> {
        let mut admin = self.open.take()?;
        let called = tokio::time::timeout(ANSWER, admin.call(method, path, body)).await;
        let answer = called.ok().and_then(Result::ok).filter(|answer| answer.status != 503);
        match answer {
            Some(_) => self.open = Some(admin),
            None => self.at += 1,
        }
        answer
    }
}
