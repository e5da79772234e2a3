//! Writers of the mesh's services, a fake Consul and virtual time: nothing waits, nothing is random.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use registry::source::consul::answer::{self, Answer, Node, Registered};
use registry::source::consul::export::desired::Desired;
use registry::source::consul::export::writer::{Call, Status, Time, Writer};
use registry::source::consul::export::{HEALTHY, Settings};

use crate::world::origin;
use tests::consul::catalog::{Catalog, Request, Response};

/// A call takes so long to its server, and its answer back.
const LATENCY: Duration = Duration::from_millis(2);
const UNIX: u64 = 1_000_000;

/// What becomes of an answer on its way.
pub(crate) type Fault = Box<dyn FnMut(&Request, Response) -> Option<Response>>;

struct Under {
    request: Request,
    /// When it is at the server.
    arrives: Instant,
    until: Instant,
    /// Answered, and on its way.
    answer: Option<(Instant, Response)>,
}

/// One writer, with its calls.
pub(crate) struct Member {
    pub(crate) writer: Writer,
    under: BTreeMap<u64, Under>,
    /// Transactions that it sent.
    pub(crate) sent: usize,
    /// Time by which its transactions are late.
    pub(crate) late: Duration,
}

/// All of it.
pub(crate) struct World {
    pub(crate) consul: Catalog,
    pub(crate) members: Vec<Member>,
    pub(crate) now: Instant,
    pub(crate) fault: Option<Fault>,
    start: Instant,
    /// Transactions of writers that have ended, and when they arrive.
    strays: Vec<(Instant, Request)>,
    /// Every call, with its time.
    pub(crate) calls: Vec<(Instant, Request)>,
}

pub(crate) fn settings() -> Settings {
    Settings::new("m1", "dc1", 2)
}

/// So many entries that should be there, from `first` on.
pub(crate) fn entries(first: usize, count: usize) -> Desired {
    (first..first + count).map(entry).map(|entry| (entry.id.clone(), entry)).collect()
}

pub(crate) fn entry(n: usize) -> Registered {
    Registered {
        id: format!("s{n:04}-1"),
        service: format!("s{n:04}"),
        address: format!("10.3.{}.{}", n / 250, n % 250 + 1),
        port: 80,
        tags: ["mesh".to_owned()].into(),
        meta: [(HEALTHY.to_owned(), "true".to_owned())].into(),
        weight: 1,
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let now = origin();
        let consul = Catalog::new("dc1");
        Self {
            consul,
            members: Vec::new(),
            now,
            fault: None,
            start: now,
            strays: Vec::new(),
            calls: Vec::new(),
        }
    }

    /// A world in which the owner of epoch 1 has written these.
    pub(crate) fn written(desired: &Desired) -> Self {
        let mut world = Self::new();
        world.join(1, desired);
        world.run(Duration::from_secs(10));
        assert_eq!(world.ours(), desired.len(), "{:?}", world.status(0));
        assert!(world.status(0).synced, "{:?}", world.status(0));
        world
    }

    /// A writer begins, as the owner of `epoch`; its place.
    pub(crate) fn join(&mut self, epoch: u64, desired: &Desired) -> usize {
        let settings = Settings { rate: 1_000, ..settings() };
        self.join_with(settings, epoch, desired)
    }

    pub(crate) fn join_with(&mut self, settings: Settings, epoch: u64, desired: &Desired) -> usize {
        let writer = Writer::new(settings, epoch, fastrand::Rng::with_seed(epoch), self.now);
        self.members.push(Member { writer, under: BTreeMap::new(), sent: 0, late: Duration::ZERO });
        let place = self.members.len() - 1;
        self.desire(place, desired);
        place
    }

    pub(crate) fn desire(&mut self, place: usize, desired: &Desired) {
        let time = self.time();
        let calls = self.members[place].writer.on_desired(desired.clone(), Vec::new(), time);
        self.send(place, calls);
    }

    /// The token is another one.
    pub(crate) fn credentials(&mut self, place: usize) {
        let time = self.time();
        let calls = self.members[place].writer.on_credentials(time);
        self.send(place, calls);
    }

    /// A writer ends; what it had sent arrives `after` this time.
    pub(crate) fn kill(&mut self, place: usize, after: Duration) {
        let member = self.members.remove(place);
        let sent = member.under.into_values().filter(|under| under.request.method == "PUT");
        let lost = sent.filter(|under| under.answer.is_none());
        self.strays.extend(lost.map(|under| (self.now + after, under.request)));
    }

    /// The catalog is another one now. Who waits for a change sees it.
    pub(crate) fn restore(&mut self, consul: Catalog) {
        self.consul = consul;
        let now = self.now;
        for under in self.members.iter_mut().flat_map(|member| member.under.values_mut()) {
            if under.request.method == "GET" && under.answer.is_none() {
                under.answer = Some((now + LATENCY, self.consul.read(&under.request).0));
            }
        }
    }

    pub(crate) fn status(&self, place: usize) -> Status {
        self.members[place].writer.status()
    }

    /// The mesh's node, as the catalog has it.
    pub(crate) fn node(&self) -> Option<Node> {
        answer::node(&self.consul.read(&Request::get("/v1/catalog/node/mesh-m1")).0.body).unwrap()
    }

    /// Entries on it.
    pub(crate) fn ours(&self) -> usize {
        self.node().map_or(0, |node| node.services.len())
    }

    /// Calls since `from` with this method.
    pub(crate) fn count(&self, from: usize, method: &str) -> usize {
        self.calls[from..].iter().filter(|(_, request)| request.method == method).count()
    }

    fn time(&self) -> Time {
        Time { at: self.now, unix: UNIX + (self.now - self.start).as_secs() }
    }

    fn send(&mut self, place: usize, calls: Vec<Call>) {
        for Call { id, path, body, .. } in calls {
            let method = if body.is_some() { "PUT" } else { "GET" };
            let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
            let request = Request::new(method, &path, "", body);
            self.calls.push((self.now, request.clone()));
            let member = &mut self.members[place];
            let late = if method == "PUT" { member.late } else { Duration::ZERO };
            member.sent += usize::from(method == "PUT");
            let (arrives, until) = (self.now + LATENCY + late, self.now + request.wait());
            member.under.insert(id, Under { request, arrives, until, answer: None });
        }
    }

    /// Lets the time pass, or until `done`.
    pub(crate) fn run_until(&mut self, time: Duration, done: impl Fn(&Self) -> bool) {
        let end = self.now + time;
        let mut steps = 0u64;
        while !done(self) {
            steps += 1;
            assert!(steps < 1_000_000, "no end");
            self.serve();
            let dues = self.members.iter().filter_map(|member| member.writer.next_due());
            let each = self.members.iter().flat_map(|member| member.under.values());
            let under = each.map(|under| match &under.answer {
                Some((at, _)) => *at,
                None if under.arrives > self.now => under.arrives,
                None => under.until,
            });
            let next = dues.chain(under).chain(self.strays.iter().map(|(at, _)| *at)).min();
            let Some(next) = next.filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            self.serve();
            for place in 0..self.members.len() {
                self.deliver(place);
                let time = self.time();
                let calls = self.members[place].writer.tick(time);
                self.send(place, calls);
            }
        }
        if !done(self) {
            self.now = end;
        }
    }

    pub(crate) fn run(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// The server does what has arrived, and answers what can be answered.
    fn serve(&mut self) {
        let now = self.now;
        let (arrived, later) = std::mem::take(&mut self.strays).into_iter().partition(|(at, _)| *at <= now);
        self.strays = later;
        let arrived: Vec<(Instant, Request)> = arrived;
        arrived.iter().for_each(|(_, request)| drop(self.consul.change(request)));
        let all = self.members.iter_mut().flat_map(|member| member.under.values_mut());
        for under in all.filter(|under| under.answer.is_none() && under.arrives <= now) {
            if under.request.method == "PUT" {
                let response = self.consul.change(&under.request).unwrap();
                under.answer = Some((now + LATENCY, response));
            }
        }
        let all = self.members.iter_mut().flat_map(|member| member.under.values_mut());
        for under in all.filter(|under| under.answer.is_none() && under.arrives <= now) {
            let (response, index) = self.consul.read(&under.request);
            if under.request.index().is_none_or(|known| index > known) || under.until <= now {
                under.answer = Some((now + LATENCY, response));
            }
        }
    }

    fn deliver(&mut self, place: usize) {
        let now = self.now;
        let ready = |under: &Under| under.answer.as_ref().is_some_and(|(at, _)| *at <= now);
        let member = &mut self.members[place];
        let ids: Vec<u64> =
            member.under.iter().filter(|(_, under)| ready(under)).map(|(id, _)| *id).collect();
        for id in ids {
            let time = self.time();
            let member = &mut self.members[place];
            let Some(Under { request, answer: Some((_, response)), .. }) = member.under.remove(&id) else {
                continue;
            };
            let response = match &mut self.fault {
                Some(fault) => fault(&request, response),
                None => Some(response),
            };
            let calls = match response {
                Some(response) => {
                    let header = |name: &str| response.headers.get(name).map(String::as_str);
                    let answer = Answer::read(response.status, header, response.body.clone());
                    member.writer.on_answer(id, &answer, time)
                }
                None => member.writer.on_failure(id, "connection reset", time),
            };
            self.send(place, calls);
        }
    }
}
