//! The clients: each does one thing after the other, and gives up what takes too long.

use istiod::raft::node::{Event, Refusal};
use istiod::raft::{Command, Outcome, View};
use registry::config::{Kind, Object};
use registry::state::{Batch, Command as Change, Delete, ObjectKey, Put, Revision};
use serde_json::json;
use tests::history::{Act, Swap, Ticket};
use xxhash_rust::xxh3::xxh3_64;

use crate::ledger::{Broken, Check};
use crate::member::Waiter;
use crate::mistake::Mistake;
use crate::world::{Happening, Reply, World};

/// One client.
#[derive(Default)]
pub(crate) struct Client {
    doing: Option<Doing>,
    /// Who it believes leads.
    leader: Option<u64>,
    /// What it last read of each key: value and revision.
    read: Vec<Option<(u64, u64)>>,
}

/// What a client waits for.
#[derive(Clone)]
struct Doing {
    ticket: Ticket,
    key: usize,
    /// Whom it asked: member, life and number.
    asked: (u64, u64, u64),
    /// What it asked, if it writes.
    command: Option<Vec<u8>>,
    /// How long it still waits, in rounds.
    patience: u32,
}

const LABEL: &str = "value";

/// What stands for each key: objects that make services, routes and nothing.
fn object_key(key: usize) -> ObjectKey {
    let kinds = [Kind::ServiceEntry, Kind::VirtualService, Kind::Telemetry, Kind::WorkloadGroup];
    let kind = kinds.get(key % kinds.len()).copied().unwrap_or(Kind::Telemetry);
    ObjectKey { kind, namespace: "shop".to_owned(), name: format!("key-{key}") }
}

fn object(key: usize, value: u64) -> Object {
    let ObjectKey { kind, namespace, name } = object_key(key);
    let spec = match key % 4 {
        0 => {
            json!({"hosts": [format!("key-{key}.example")], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
            "resolution": "STATIC", "endpoints": [{"address": format!("10.0.0.{}", value % 250 + 1)}]})
        }
        1 => json!({"hosts": [format!("key-{}.example", key - 1)],
            "http": [{"route": [{"destination": {"host": format!("key-{}.example", key - 1)}}]}]}),
        _ => json!({}),
    };
    let mut object = Object::new(kind, &namespace, &name, spec);
    object.labels.insert(LABEL.to_owned(), value.to_string());
    object
}

/// Value and revision of a key.
fn find(view: &View, key: usize) -> Option<(u64, u64)> {
    let object = view.registry.object(&object_key(key))?;
    Some((object.labels.get(LABEL)?.parse().ok()?, object.revision))
}

impl World {
    /// Does a client's next thing.
    pub(crate) fn client_acts(&mut self, client: usize) -> Check {
        let pause = 1 + self.rng.u64(0..self.plan.operation_each_us * 2);
        if !self.calm {
            self.after(pause, Happening::Client(client));
        }
        let Some(Client { doing, .. }) = self.clients.get_mut(client) else { return Ok(()) };
        match doing.as_mut() {
            None if self.calm => Ok(()),
            None => self.begin(client),
            Some(waits) if waits.patience == 0 => {
                *doing = None; // whatever becomes of it
                Ok(())
            }
            Some(waits) => {
                waits.patience -= 1;
                Ok(())
            }
        }
    }

    fn begin(&mut self, client: usize) -> Check {
        if self.rng.u32(0..12) == 0 {
            return self.make_noise();
        }
        let key = self.rng.usize(0..self.plan.keys);
        let act = self.draw_act(client, key);
        let reads = matches!(act, Act::Get(_));
        let Some(member) = self.whom(client, reads) else { return Ok(()) };
        let time_ms = 1_800_000_000_000 + i64::try_from(self.now / 1000).unwrap_or(0);
        let command = match act {
            Act::Get(_) => None,
            Act::Put(value) => Some(Batch::put_objects(time_ms, "client", [object(key, value)])),
            Act::Delete => Some(Batch::delete_objects(time_ms, "client", [object_key(key)])),
            Act::Swap { value, .. } => Some(self.swap(time_ms, client, key, value)),
        };
        let command = command.map(|batch| Command::Registry(batch).encode()).transpose();
        let command = command.map_err(|error| Broken::new("commands encode", error.to_string()))?;
        let ticket = self.history.invoke(key, act);
        self.note(|| format!("client {client} asks member {member}: key {key} {act:?}"));
        let patience = self.rng.u32(2..30);
        self.ask(client, member, Doing { ticket, key, asked: (0, 0, 0), command, patience })
    }

    fn draw_act(&mut self, client: usize, key: usize) -> Act {
        self.values += 1;
        let value = self.values;
        match self.rng.u32(0..100) {
            0..45 => Act::Put(value),
            45..53 => Act::Delete,
            53..68 => {
                let known =
                    self.clients.get(client).and_then(|client| client.read.get(key).copied().flatten());
                Act::Swap { expected: known.map(|(value, _)| value), value, end: Swap::Maybe }
            }
            _ => Act::Get(None),
        }
    }

    fn swap(&self, time_ms: i64, client: usize, key: usize, value: u64) -> Batch {
        let known = self.clients.get(client).and_then(|client| client.read.get(key).copied().flatten());
        let expected = Some(Revision(known.map_or(0, |(_, revision)| revision)));
        let puts = vec![Put { object: object(key, value).into(), expected }];
        let commands = vec![Change::Change { puts, deletes: Vec::<Delete>::new() }];
        Batch { time_ms, author: "client".to_owned(), commands }
    }

    /// Whom a client asks: mostly whom it believes to lead, for a read more often anybody.
    fn whom(&mut self, client: usize, reads: bool) -> Option<u64> {
        let running = self.running();
        let believed = self.clients.get(client).and_then(|client| client.leader);
        let believed = believed.filter(|id| running.contains(id));
        if self.rng.u32(0..100) < if reads { 50 } else { 85 } && believed.is_some() {
            return believed;
        }
        self.rng.choice(running)
    }

    /// Something that is no key: other commands that the log carries.
    fn make_noise(&mut self) -> Check {
        let Some(member) = self.leader() else { return Ok(()) };
        self.values += 1;
        let commands = match self.rng.u32(0..3) {
            0 => vec![Change::SetHistoryLimit { entries: self.rng.u32(1..20) }],
            1 => vec![Change::PutMesh { config: json!({"rootNamespace": format!("r{}", self.values % 3)}) }],
            _ => Vec::new(),
        };
        let batch = Batch { time_ms: 0, author: "noise".to_owned(), commands };
        let command = Command::Registry(batch).encode();
        let command = command.map_err(|error| Broken::new("commands encode", error.to_string()))?;
        let Some((life, sequence)) = self.number(member, Waiter::Nobody) else { return Ok(()) };
        self.tell(member, life, Event::Propose { sequence, command })
    }

    /// A new number for a request to a member, and who waits for its answer.
    pub(crate) fn number(&mut self, id: u64, waiter: Waiter) -> Option<(u64, u64)> {
        let member = self.members.get_mut(&id)?;
        let running = member.running.as_mut()?;
        let proposes = matches!(waiter, Waiter::Client(_, _, 1..) | Waiter::Nobody);
        let next = if proposes { &mut running.proposals } else { &mut running.others };
        *next += 1;
        running.waiting.insert(*next, waiter);
        Some((member.life, *next))
    }

    fn ask(&mut self, client: usize, member: u64, mut doing: Doing) -> Check {
        let hash = doing.command.as_deref().map_or(0, xxh3_64);
        let waiter = Waiter::Client(client, doing.ticket, hash);
        let Some((life, sequence)) = self.number(member, waiter) else { return Ok(()) };
        doing.asked = (member, life, sequence);
        let (ticket, key, command) = (doing.ticket, doing.key, doing.command.clone());
        if let Some(client) = self.clients.get_mut(client) {
            client.doing = Some(doing);
        }
        if command.is_none() && self.plants(Mistake::ReadWithoutIndex) {
            let Some(running) = self.members.get(&member).and_then(|member| member.running.as_ref()) else {
                return Ok(());
            };
            let view = running.machine.view();
            self.after(1_000, Happening::Answer(client, ticket, Reply::Read(view)));
            return Ok(());
        }
        let writes = command.is_some();
        let event = match command {
            Some(command) => Event::Propose { sequence, command },
            None => Event::Read { sequence },
        };
        self.tell(member, life, event)?;
        if writes && self.plants(Mistake::AcknowledgeBeforeQuorum) {
            self.acknowledge_early(client, ticket, key, (member, life, sequence));
        }
        Ok(())
    }

    /// The mistake of answering as soon as the leader itself has the entry.
    fn acknowledge_early(&mut self, client: usize, ticket: Ticket, key: usize, asked: (u64, u64, u64)) {
        let (member, life, sequence) = asked;
        let taken =
            self.members.get_mut(&member).filter(|member| member.life == life).is_some_and(|member| {
                let running = member.running.as_mut().filter(|running| running.driver.status().leading);
                running.is_some_and(|running| running.waiting.remove(&sequence).is_some())
            });
        let puts = matches!(self.history.act(ticket), Some(Act::Put(_)));
        if taken && puts {
            self.note(|| format!("member {member} acknowledges key {key} too early"));
            let outcome = Outcome::Registry(registry::state::Outcome::default());
            self.after(500, Happening::Answer(client, ticket, Reply::Applied(outcome)));
        }
    }

    /// A client hears what became of an operation.
    pub(crate) fn client_hears(&mut self, client: usize, ticket: Ticket, reply: Reply) -> Check {
        let Some(state) = self.clients.get_mut(client) else { return Ok(()) };
        let Some(doing) = state.doing.clone().filter(|doing| doing.ticket == ticket) else {
            return Ok(()); // it has given up
        };
        let act = self.history.act(ticket).unwrap_or(Act::Get(None));
        let asked = doing.asked.0;
        match reply {
            Reply::Applied(outcome) => {
                state.doing = None;
                state.leader = Some(asked);
                self.history.returned(ticket, told(act, &outcome));
            }
            Reply::Read(view) => {
                state.doing = None;
                let found = find(&view, doing.key);
                state.read.resize(state.read.len().max(doing.key + 1), None);
                if let Some(known) = state.read.get_mut(doing.key) {
                    *known = found;
                }
                self.history.returned(ticket, Act::Get(found.map(|(value, _)| value)));
            }
            Reply::Gone => {
                state.doing = None;
                state.leader = None;
            }
            Reply::Refused(refusal) => return self.client_refused(client, &doing, &refusal),
        }
        Ok(())
    }

    fn client_refused(&mut self, client: usize, doing: &Doing, refusal: &Refusal) -> Check {
        if let Some(state) = self.clients.get_mut(client) {
            state.doing = None;
            state.leader = None;
        }
        match refusal {
            // Not done.
            Refusal::NotLeader(_)
            | Refusal::NoLeader
            | Refusal::Busy
            | Refusal::NoSpace(_)
            | Refusal::Invalid(_) => {
                self.history.refused(doing.ticket);
            }
            // Done; what came of it is not known.
            Refusal::Duplicate => {
                let act = self.history.act(doing.ticket).unwrap_or(Act::Get(None));
                self.history.returned(doing.ticket, act);
            }
            Refusal::Unknown if self.plants(Mistake::RetryUnderNewNumber) && doing.command.is_some() => {
                let Some(member) = self.whom(client, false) else { return Ok(()) };
                self.note(|| {
                    format!("client {client} asks member {member} for the same under another number")
                });
                return self.ask(client, member, doing.clone());
            }
            // It stays open: it may happen yet.
            Refusal::Unknown => {}
        }
        Ok(())
    }
}

/// An operation with the answer that its outcome means.
fn told(act: Act, outcome: &Outcome) -> Act {
    let Act::Swap { expected, value, .. } = act else { return act };
    let conflict = matches!(outcome, Outcome::Registry(outcome) if outcome.conflict().is_some());
    Act::Swap { expected, value, end: if conflict { Swap::Conflict } else { Swap::Done } }
}
