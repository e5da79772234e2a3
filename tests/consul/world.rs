//! A datacenter machine, a fake Consul and the mesh's state in one virtual time: nothing waits, nothing is random.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use registry::model::service::Endpoint;
use registry::source::Catalog as Known;
use registry::source::consul::answer::Answer;
use registry::source::consul::convert::Mapping;
use registry::source::consul::datacenter::{Action, Datacenter, Query, Settings, Status};
use registry::state::{Batch, Command, Revision, State};
use serde_json::{Value, json};

use tests::consul::catalog::{Catalog, Request, Response};

/// An answer takes so long.
const LATENCY: Duration = Duration::from_millis(2);
pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const MINUTE: Duration = Duration::from_secs(60);

/// What becomes of an answer on its way: server, question and answer to another answer, or to none.
pub(crate) type Fault = Box<dyn FnMut(usize, &Request, Response) -> Option<Response>>;

struct Asked {
    query: Query,
    request: Request,
    since: Instant,
    until: Instant,
    /// Answered, and on its way.
    answer: Option<(Instant, Option<Response>)>,
}

/// All of it.
pub(crate) struct World {
    pub(crate) consul: Catalog,
    pub(crate) machine: Datacenter,
    pub(crate) state: State,
    pub(crate) now: Instant,
    pub(crate) fault: Option<Fault>,
    /// Most questions that were under way at once: those that block, and the others.
    pub(crate) most: (usize, usize),
    /// Every question, with its time and server.
    pub(crate) asked: Vec<(Instant, usize, String)>,
    /// When something was published.
    pub(crate) published: Vec<Instant>,
    /// Publishing succeeds.
    pub(crate) publishes: bool,
    pending: BTreeMap<u64, Asked>,
    changed: bool,
}

#[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
pub(crate) fn origin() -> Instant {
    Instant::now()
}

pub(crate) fn settings() -> Settings {
    Settings::new(Mapping::new("c", "dc1"), 3)
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(settings())
    }

    pub(crate) fn with(settings: Settings) -> Self {
        let now = origin();
        let random = fastrand::Rng::with_seed(7);
        Self {
            consul: Catalog::new("dc1"),
            machine: Datacenter::new(settings, Known::default(), random, now),
            state: State::default(),
            now,
            fault: None,
            most: (0, 0),
            asked: Vec::new(),
            published: Vec::new(),
            publishes: true,
            pending: BTreeMap::new(),
            changed: false,
        }
    }

    /// Another member takes over: it begins with what the state holds.
    pub(crate) fn succeed(&mut self, settings: Settings) {
        let seed = Known::of(&self.state, &settings.mapping.source());
        self.machine = Datacenter::new(settings, seed, fastrand::Rng::with_seed(8), self.now);
        self.pending.clear();
        self.run(Duration::ZERO);
    }

    /// One instance of a service on a node of its own, with a check.
    pub(crate) fn register(&mut self, service: &str, id: &str, address: &str) {
        self.put(&registration(service, id, address, "passing"));
    }

    pub(crate) fn put(&mut self, registration: &Value) {
        assert!(self.consul.register(registration), "{registration}");
        self.changed = true;
    }

    pub(crate) fn check(&mut self, service: &str, id: &str, address: &str, status: &str) {
        self.put(&registration(service, id, address, status));
    }

    /// Removes an instance with its node.
    pub(crate) fn deregister(&mut self, id: &str) {
        self.consul.deregister(&json!({"Node": format!("node-{id}")}));
        self.changed = true;
    }

    /// The token is another one, or a file has changed.
    pub(crate) fn credentials(&mut self) {
        let actions = self.machine.on_credentials(self.now);
        self.act(actions);
    }

    /// Everything that waits is answered again with what the catalog is now.
    pub(crate) fn restore(&mut self, consul: Catalog) {
        self.consul = consul;
        // Servers that were replaced end their connections.
        let ids: Vec<u64> = self.pending.keys().copied().collect();
        for id in ids {
            self.pending.remove(&id);
            let actions = self.machine.on_failure(id, "connection reset", self.now);
            self.act(actions);
        }
    }

    pub(crate) fn status(&self) -> Status {
        self.machine.status(self.now)
    }

    /// Lets the time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        let actions = self.machine.tick(self.now);
        self.act(actions);
        let mut steps = 0u64;
        loop {
            steps += 1;
            assert!(steps < 5_000_000, "no end");
            self.decide();
            let deadline = |asked: &Asked| match &asked.answer {
                Some((at, _)) => *at,
                None => asked.until,
            };
            let answer = self.pending.iter().map(|(id, asked)| (deadline(asked), *id)).min();
            let due = self.machine.next_due();
            let next = [answer.map(|(at, _)| at), due].into_iter().flatten().min();
            let Some(next) = next.filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            match answer.filter(|(at, _)| *at <= self.now) {
                Some((_, id)) => self.deliver(id),
                None => {
                    let actions = self.machine.tick(self.now);
                    self.act(actions);
                }
            }
        }
        self.now = end;
    }

    /// Answers what can be answered now.
    fn decide(&mut self) {
        let (now, all) = (self.now, std::mem::take(&mut self.changed));
        for asked in
            self.pending.values_mut().filter(|asked| asked.answer.is_none() && (all || asked.since == now))
        {
            let (response, index) = self.consul.read(&asked.request);
            if asked.request.index().is_none_or(|known| index > known) {
                asked.answer = Some((now + LATENCY, Some(response)));
            }
        }
    }

    fn deliver(&mut self, id: u64) {
        let Some(asked) = self.pending.remove(&id) else { return };
        let response = match asked.answer {
            Some((_, response)) => response,
            None => Some(self.consul.read(&asked.request).0),
        };
        let server = asked.query.server;
        let response = match &mut self.fault {
            Some(fault) => response.and_then(|response| fault(server, &asked.request, response)),
            None => response,
        };
        let actions = match response {
            Some(response) => {
                let header = |name: &str| response.headers.get(name).map(String::as_str);
                let answer = Answer::read(response.status, header, response.body.clone());
                self.machine.on_answer(id, &answer, self.now)
            }
            None => self.machine.on_failure(id, "connection reset", self.now),
        };
        self.act(actions);
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Ask(query) => {
                    self.asked.push((self.now, query.server, query.path.clone()));
                    let request = Request::get(&query.path);
                    let until = self.now + request.wait();
                    let asked = Asked { request, since: self.now, until, answer: None, query };
                    self.pending.insert(asked.query.id, asked);
                }
                Action::Publish(commands) => {
                    if self.publishes {
                        self.apply(commands);
                    }
                    self.published.push(self.now);
                    let actions = self.machine.on_published(self.publishes, self.now);
                    self.act(actions);
                }
            }
        }
        let blocking = self.pending.values().filter(|asked| asked.request.index().is_some()).count();
        self.most = (self.most.0.max(blocking), self.most.1.max(self.pending.len() - blocking));
    }

    fn apply(&mut self, commands: Vec<Command>) {
        let revision = Revision(self.state.revision().0 + 1);
        self.state.apply(revision, &Batch { time_ms: 1_000, author: String::new(), commands });
    }

    // ---- what the mesh knows ------------------------------------------------------

    /// Hosts without the datacenter.
    pub(crate) fn hosts(&self) -> Vec<String> {
        let hosts = self.state.services().map(|(host, _, _)| host.clone());
        hosts.filter(|host| host.ends_with(".service.consul")).collect()
    }

    /// The endpoints of `NAME.service.consul`.
    pub(crate) fn endpoints(&self, name: &str) -> Vec<Endpoint> {
        let host = format!("{name}.service.consul");
        self.state.endpoints_of(&host).flat_map(|(_, all)| all.iter().cloned()).collect()
    }

    /// Their addresses.
    pub(crate) fn addresses(&self, name: &str) -> Vec<String> {
        self.endpoints(name).into_iter().map(|endpoint| endpoint.address).collect()
    }
}

/// Body of a registration.
pub(crate) fn registration(service: &str, id: &str, address: &str, status: &str) -> Value {
    json!({
        "Node": format!("node-{id}"), "Address": "10.255.0.1",
        "Service": {"ID": id, "Service": service, "Address": address, "Port": 8080, "Tags": ["a", "b"]},
        "Check": {"CheckID": format!("check-{id}"), "Name": "check", "Status": status, "ServiceID": id},
    })
}

/// An address for each number.
pub(crate) fn address(n: usize) -> String {
    format!("10.{}.{}.{}", n / 65_536, n / 256 % 256, n % 256)
}

/// A world that knows services `s0000` and so on, each with one instance.
pub(crate) fn known(services: usize) -> World {
    let mut world = World::new();
    for n in 0..services {
        world.register(&format!("s{n:04}"), &format!("i{n:04}"), &address(n + 1));
    }
    world.run(2 * MINUTE);
    assert_eq!(world.hosts().len(), services);
    assert!(world.status().synced);
    world
}

/// A world that knows `web` with one instance.
pub(crate) fn web() -> World {
    let mut world = World::new();
    world.register("web", "w1", "10.0.0.1");
    world.run(SECOND);
    assert_eq!(world.addresses("web"), ["10.0.0.1"]);
    world
}

/// It asks for the instances of `web`.
pub(crate) fn of_web(request: &Request) -> bool {
    request.path == "/v1/health/service/web"
}

pub(crate) fn json_of(response: &Response) -> Value {
    serde_json::from_slice(&response.body).unwrap()
}
