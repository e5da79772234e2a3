//! The simulated cluster: one queue of what happens when, and the members that it happens to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use istiod::raft::node::{Answer, Event, Fatal, Forward, Job, Output, Refusal, Status, Transport as _};
use istiod::raft::{Outcome, View};
use tests::history::{History, Ticket};
use xxhash_rust::xxh3::xxh3_64;

use crate::clients::Client;
use crate::ledger::{Broken, Check, Ledger};
use crate::member::{Member, Start, Waiter};
use crate::mistake::Mistake;
use crate::network::{self, Network, Outbox, Packet};
use crate::plan::Plan;
use crate::proxies::Proxy;

/// Something that happens at its time.
pub(crate) enum Happening {
    /// A tick of a member's clock, in one of its lives.
    Tick(u64, u64),
    /// A member is done with its last step.
    Wake(u64, u64),
    /// A packet arrives.
    Arrive(Packet),
    /// A proposal of a member, in one of its lives, arrives at the one that it takes for the leader.
    Forwarded(u64, u64, Forward),
    /// Something to tell a member, in one of its lives.
    Tell(u64, u64, Event),
    /// A member's snapshot is written.
    Write(u64, u64, Job),
    /// A client does the next thing.
    Client(usize),
    /// A proxy looks at its stream.
    Proxy(usize),
    /// A client hears the end of an operation.
    Answer(usize, Ticket, Reply),
    /// A member starts again.
    Start(u64),
    /// A removed member is switched off.
    Retire(u64),
    /// Something goes wrong.
    Fault,
}

/// What a client hears.
pub(crate) enum Reply {
    /// Applied, with this outcome.
    Applied(Outcome),
    /// Read this state.
    Read(View),
    /// Refused, or nobody knows.
    Refused(Refusal),
    /// The member that was asked is gone.
    Gone,
}

/// The cluster, its clients and all that is known of them.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: fastrand::Rng,
    /// Simulated microseconds since the beginning.
    pub(crate) now: u64,
    epoch: Instant,
    queue: BTreeMap<(u64, u64), Happening>,
    queued: u64,
    pub(crate) steps: u64,
    pub(crate) members: BTreeMap<u64, Member>,
    pub(crate) network: Network,
    pub(crate) ledger: Ledger,
    pub(crate) clients: Vec<Client>,
    pub(crate) proxies: Vec<Proxy>,
    pub(crate) history: History,
    /// Nothing goes wrong any more.
    pub(crate) calm: bool,
    /// The highest id that a member had.
    pub(crate) last_id: u64,
    /// Counts values, no two of which are the same.
    pub(crate) values: u64,
    /// Of everything that happened, in order.
    pub(crate) fingerprint: u64,
    pub(crate) trace: Option<Vec<String>>,
}

impl World {
    /// The founders, started, and everything else at rest.
    #[expect(clippy::disallowed_methods, reason = "where the simulated clock begins; only differences count")]
    pub(crate) fn new(plan: Plan, traced: bool) -> Result<Self, Broken> {
        let mut world = Self {
            rng: fastrand::Rng::with_seed(plan.seed),
            now: 0,
            epoch: Instant::now(),
            queue: BTreeMap::new(),
            queued: 0,
            steps: 0,
            members: BTreeMap::new(),
            network: Network::new(),
            ledger: Ledger::default(),
            clients: (0..plan.clients).map(|_| Client::default()).collect(),
            proxies: (0..plan.proxies).map(Proxy::new).collect(),
            history: History::default(),
            calm: false,
            last_id: plan.founders,
            values: 0,
            fingerprint: 0,
            trace: traced.then(Vec::new),
            plan,
        };
        let founders = world.founders();
        world.ledger.found(&founders);
        for id in founders {
            world.members.insert(id, Member::new(id));
            world.start(id)?;
        }
        for client in 0..world.plan.clients {
            world.after(1_000, Happening::Client(client));
        }
        for proxy in 0..world.plan.proxies {
            world.after(500_000, Happening::Proxy(proxy));
        }
        world.after(1_000_000, Happening::Fault);
        Ok(world)
    }

    fn founders(&self) -> Vec<u64> {
        (1..=self.plan.founders).collect()
    }

    /// The true time, as an instant.
    pub(crate) fn clock(&self) -> Instant {
        self.epoch + Duration::from_micros(self.now)
    }

    /// Puts something into the queue, `after_us` from now.
    pub(crate) fn after(&mut self, after_us: u64, happening: Happening) {
        self.queued += 1;
        self.queue.insert((self.now + after_us, self.queued), happening);
    }

    /// Writes a line into the trace, if there is one.
    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>10.3} ms  {}", self.now as f64 / 1000.0, line()));
        }
    }

    /// Lets happen what happens until a time.
    pub(crate) fn run_until(&mut self, until: u64) -> Check {
        while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= until) {
            let ((at, _), happening) = entry.remove_entry();
            self.now = at;
            self.steps += 1;
            self.happen(happening)?;
        }
        self.now = until;
        Ok(())
    }

    fn happen(&mut self, happening: Happening) -> Check {
        match happening {
            Happening::Tick(id, life) => self.tick(id, life),
            Happening::Wake(id, life) => {
                if let Some(running) = self.living(id, life).and_then(|member| member.running.as_mut()) {
                    running.wakes = false;
                    return self.step(id);
                }
                Ok(())
            }
            Happening::Arrive(packet) => self.arrive(packet),
            Happening::Forwarded(from, life, forward) => self.forwarded(from, life, forward),
            Happening::Tell(id, life, event) => self.tell(id, life, event),
            Happening::Write(id, life, job) => self.write(id, life, job),
            Happening::Client(client) => self.client_acts(client),
            Happening::Proxy(proxy) => self.proxy_looks(proxy),
            Happening::Answer(client, ticket, reply) => self.client_hears(client, ticket, reply),
            Happening::Start(id) => self.start(id),
            Happening::Retire(id) => self.retire(id),
            Happening::Fault => self.fault(),
        }
    }

    fn living(&mut self, id: u64, life: u64) -> Option<&mut Member> {
        self.members.get_mut(&id).filter(|member| member.life == life && member.running.is_some())
    }

    fn tick(&mut self, id: u64, life: u64) -> Check {
        let (now, tick) = (self.now, self.plan.settings(id).tick);
        let Some(member) = self.living(id, life) else { return Ok(()) };
        let busy = member.running.as_ref().map_or(0, |running| running.busy_until.saturating_sub(now));
        let tick_us = u64::try_from(tick.as_micros()).unwrap_or(u64::MAX) * member.tick_percent / 100;
        self.after(busy.max(tick_us), Happening::Tick(id, life));
        self.tell(id, life, Event::Tick)
    }

    fn arrive(&mut self, packet: Packet) -> Check {
        let Some(member) = self.members.get(&packet.to).filter(|member| member.running.is_some()) else {
            return Ok(());
        };
        let life = member.life;
        let message = network::decode(&packet.bytes)
            .map_err(|error| Broken::new("messages survive the wire", error))?;
        self.fingerprint = self.fingerprint.rotate_left(5) ^ xxh3_64(&packet.bytes);
        self.tell(packet.to, life, Event::Message(Box::new(message)))
    }

    /// Gives an event to a member: at once, or when it is done with its last step.
    pub(crate) fn tell(&mut self, id: u64, life: u64, event: Event) -> Check {
        let now = self.now;
        let Some(running) = self.living(id, life).and_then(|member| member.running.as_mut()) else {
            return Ok(());
        };
        running.inbox.push(event);
        if running.busy_until <= now {
            return self.step(id);
        }
        if !std::mem::replace(&mut running.wakes, true) {
            let wait = running.busy_until - now;
            self.after(wait, Happening::Wake(id, life));
        }
        Ok(())
    }

    /// One step of a member with everything in its inbox, as its thread would make it.
    fn step(&mut self, id: u64) -> Check {
        let Some(member) = self.members.get_mut(&id) else { return Ok(()) };
        let clock = self.epoch + Duration::from_micros(self.now + member.ahead_us);
        let mut outbox = Outbox { power: member.power.clone(), packets: Vec::new(), forwards: Vec::new() };
        let Some(running) = member.running.as_mut() else { return Ok(()) };
        let mut out = Output::default();
        member.power.take_spent_us();
        let events = std::mem::take(&mut running.inbox);
        let stepped = running.driver.steps(events.into_iter(), clock, &mut outbox, &mut out);
        let late = running.log.sync_due();
        if stepped.is_ok() {
            outbox.forward(std::mem::take(&mut out.forwards));
        }
        let owes = running.driver.owes_committed();
        let spent = member.power.take_spent_us();
        running.busy_until = self.now + spent;
        let life = member.life;
        let went_out = member.power.is_out();
        for packet in outbox.packets {
            self.send(life, packet);
        }
        for forward in outbox.forwards {
            self.forward(id, life, spent, forward);
        }
        if went_out {
            self.note(|| format!("member {id} ends in a step"));
            return self.crash(id);
        }
        match stepped {
            Err(Fatal::Removed(_)) => return self.removed(id),
            stepped => {
                stepped.map_err(|fatal| Broken::new("members do not stop", format!("{id}: {fatal:?}")))?
            }
        }
        late.map_err(|error| Broken::new("members do not stop", format!("{id}: {error:?}")))?;
        self.look_at(id)?;
        for (sequence, answer) in out.answers {
            self.answer(id, spent, sequence, answer)?;
        }
        if owes {
            let soon = spent + self.rng.u64(0..2_000);
            self.after(soon, Happening::Tell(id, life, Event::TellCommitted));
        }
        for job in out.jobs {
            let takes = spent + self.rng.u64(0..100_000);
            self.after(takes, Happening::Write(id, life, job));
        }
        Ok(())
    }

    fn send(&mut self, life: u64, packet: Packet) {
        let arrivals = self.network.route(&mut self.rng, packet.from, packet.to);
        let (from, to, after_us) = (packet.from, packet.to, packet.after_us);
        if packet.snapshot {
            let delivered = !arrivals.is_empty();
            let told = arrivals.first().copied().unwrap_or(50_000) + self.rng.u64(0..10_000);
            self.after(after_us + told, Happening::Tell(from, life, Event::SnapshotSent { to, delivered }));
        } else if arrivals.is_empty() && self.rng.u32(0..4) == 0 {
            self.after(after_us + 1_000, Happening::Tell(from, life, Event::Unreachable(to)));
        }
        for delay in arrivals {
            let copy = Packet { bytes: packet.bytes.clone(), ..packet };
            self.after(after_us + delay, Happening::Arrive(copy));
        }
    }

    /// A proposal goes to the leader; a call that is lost either way ends in "unknown".
    fn forward(&mut self, from: u64, life: u64, after_us: u64, forward: Forward) {
        let arrivals = self.network.route(&mut self.rng, from, forward.to);
        if arrivals.is_empty() {
            self.unanswered(from, life, after_us, forward.sequence);
        }
        for delay in arrivals {
            self.after(after_us + delay, Happening::Forwarded(from, life, forward.clone()));
        }
    }

    fn unanswered(&mut self, from: u64, life: u64, after_us: u64, sequence: u64) {
        let patience = self.rng.u64(1_000..500_000);
        let event = Event::ForwardAnswered { sequence, result: Err(Refusal::Unknown) };
        self.after(after_us + patience, Happening::Tell(from, life, event));
    }

    fn forwarded(&mut self, from: u64, life: u64, forward: Forward) -> Check {
        let waiter = Waiter::Peer(from, life, forward.sequence);
        let Some((there, sequence)) = self.number(forward.to, waiter) else {
            self.unanswered(from, life, 0, forward.sequence);
            return Ok(());
        };
        self.tell(forward.to, there, Event::Forwarded { sequence, proposal: forward.proposal })
    }

    /// The leader's answer to a forwarded proposal goes back.
    fn answer_peer(
        &mut self,
        id: u64,
        spent: u64,
        (from, life, sequence): (u64, u64, u64),
        answer: &Answer<Outcome>,
    ) {
        let result = match answer {
            Answer::Refused(refusal) => Err(refusal.clone()),
            Answer::Accepted | Answer::Applied(..) | Answer::Members(..) | Answer::Readable(_) => Ok(()),
        };
        match self.network.route(&mut self.rng, id, from).first() {
            Some(delay) => {
                let event = Event::ForwardAnswered { sequence, result };
                self.after(spent + delay, Happening::Tell(from, life, event));
            }
            None => self.unanswered(from, life, spent, sequence),
        }
    }

    /// Checks everything that a step may have broken.
    fn look_at(&mut self, id: u64) -> Check {
        let Some(running) = self.members.get_mut(&id).and_then(|member| member.running.as_mut()) else {
            return Ok(());
        };
        let status = running.driver.status();
        for fact in running.journal.take() {
            if let crate::journal::Fact::Published { revision, .. } = fact {
                if revision < running.watched {
                    let seen = format!("member {id} shows {revision} after {}", running.watched);
                    return Err(Broken::new("revisions only grow", seen));
                }
                running.watched = revision;
            }
            self.ledger.take(id, fact)?;
        }
        if status.committed > running.checked {
            let range = (running.checked, status.committed);
            self.ledger.commits_to(id, status.term, range, &running.log)?;
            running.checked = status.committed;
        }
        if status.leading && running.led != status.term {
            running.led = status.term;
            self.ledger.leads(id, status.term, &running.log)?;
            self.note(|| format!("member {id} leads term {}", status.term));
        }
        if status.applied > status.committed {
            let seen = format!("member {id} applied {} and committed {}", status.applied, status.committed);
            return Err(Broken::new("only committed entries are applied", seen));
        }
        self.mark(id, &status);
        Ok(())
    }

    fn mark(&mut self, id: u64, status: &Status) {
        let words = [id, self.now, status.term, status.committed, status.applied, status.last_index];
        for word in words {
            self.fingerprint = self.fingerprint.rotate_left(9) ^ word.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }

    fn answer(&mut self, id: u64, spent: u64, sequence: u64, answer: Answer<Outcome>) -> Check {
        let Some(running) = self.members.get_mut(&id).and_then(|member| member.running.as_mut()) else {
            return Ok(());
        };
        let Some(waiter) = running.waiting.get(&sequence).copied() else { return Ok(()) };
        running.waiting.remove(&sequence);
        let (client, ticket, command) = match waiter {
            Waiter::Client(client, ticket, command) => (client, ticket, command),
            Waiter::Peer(from, life, number) => {
                self.answer_peer(id, spent, (from, life, number), &answer);
                return Ok(());
            }
            Waiter::Operator | Waiter::Nobody => return Ok(()),
        };
        let reply = match answer {
            Answer::Applied(index, outcome) => {
                if self.ledger.applied(index) != Some(command) || index > self.ledger.committed() {
                    let seen = format!("member {id} acknowledged at {index} what is not committed there");
                    return Err(Broken::new("acknowledged writes are committed", seen));
                }
                Reply::Applied(outcome)
            }
            Answer::Readable(_) => Reply::Read(running.machine.view()),
            Answer::Refused(refusal) => Reply::Refused(refusal),
            Answer::Members(..) | Answer::Accepted => return Ok(()),
        };
        let delay = spent + self.rng.u64(0..2_000);
        self.after(delay, Happening::Answer(client, ticket, reply));
        Ok(())
    }

    fn write(&mut self, id: u64, life: u64, job: Job) -> Check {
        let Some(member) = self.living(id, life) else { return Ok(()) };
        let done = job.run();
        if member.power.is_out() {
            self.note(|| format!("member {id} ends while it writes a snapshot or its store"));
            return self.crash(id);
        }
        self.tell(id, life, done)
    }

    /// Starts a member, on what its last life left.
    pub(crate) fn start(&mut self, id: u64) -> Check {
        let founders = self.founders();
        let settings = self.plan.settings(id);
        let Some(member) = self.members.get_mut(&id) else { return Ok(()) };
        if member.retired || member.running.is_some() {
            return Ok(());
        }
        let now = self.epoch + Duration::from_micros(self.now + member.ahead_us);
        let start = Start { settings, founders: &founders, mistake: self.plan.mistake, now };
        let alive = member.start(start, &mut self.rng)?;
        let life = member.life;
        if !alive {
            self.note(|| format!("member {id} ends while it starts"));
            return self.crash(id);
        }
        let delay = self.rng.u64(0..100_000);
        self.after(delay, Happening::Tick(id, life));
        self.note(|| format!("member {id} starts life {life}"));
        self.look_at(id)
    }

    /// Ends a member's life, with or without its power, and lets it start again later.
    pub(crate) fn crash(&mut self, id: u64) -> Check {
        let (power_cut, keep) = (self.rng.u32(0..3) > 0, self.rng.u64(0..=4));
        let mut rng = self.rng.fork();
        let Some(member) = self.members.get_mut(&id) else { return Ok(()) };
        let waiting = member.running.as_mut().map(|running| std::mem::take(&mut running.waiting));
        let mut chance = || rng.u64(0..4) < keep;
        member.end(if power_cut { Some(&mut chance) } else { None });
        let down = if self.calm { 100_000 } else { self.rng.u64(10_000..1_500_000) };
        self.after(down, Happening::Start(id));
        self.gone(waiting.unwrap_or_default());
        Ok(())
    }

    /// Tells those who wait for a member that it is gone.
    pub(crate) fn gone(&mut self, waiting: BTreeMap<u64, Waiter>) {
        for waiter in waiting.into_values() {
            match waiter {
                Waiter::Client(client, ticket, _) => {
                    self.after(1_000, Happening::Answer(client, ticket, Reply::Gone));
                }
                Waiter::Peer(from, life, sequence) => self.unanswered(from, life, 0, sequence),
                Waiter::Operator | Waiter::Nobody => {}
            }
        }
    }

    /// A member that was removed hears of it from a peer, or is switched off while it is down.
    fn retire(&mut self, id: u64) -> Check {
        // A change that was on its way when it was removed may have taken it in again.
        if self.listed(id) {
            return Ok(());
        }
        let Some(member) = self.members.get_mut(&id) else { return Ok(()) };
        let life = member.life;
        if member.running.is_some() {
            return self.tell(id, life, Event::Removed);
        }
        member.retired = true;
        Ok(())
    }

    fn removed(&mut self, id: u64) -> Check {
        let Some(member) = self.members.get_mut(&id) else { return Ok(()) };
        let waiting = member.running.as_mut().map(|running| std::mem::take(&mut running.waiting));
        member.end(None);
        member.retired = true;
        self.note(|| format!("member {id} was removed and stops"));
        self.gone(waiting.unwrap_or_default());
        Ok(())
    }

    /// Whether a member has any part in the cluster, as far as anybody has applied.
    pub(crate) fn listed(&self, id: u64) -> bool {
        let (_, members) = self.ledger.members();
        [&members.voters, &members.learners, &members.voters_outgoing, &members.learners_next]
            .into_iter()
            .any(|list| list.contains(&id))
    }

    /// The members that run.
    pub(crate) fn running(&self) -> Vec<u64> {
        self.members.values().filter(|member| member.running.is_some()).map(|member| member.id).collect()
    }

    /// The member that leads the highest term.
    pub(crate) fn leader(&self) -> Option<u64> {
        let running = self
            .members
            .values()
            .filter_map(|member| Some((member.id, member.running.as_ref()?.driver.status())));
        running.filter(|(_, status)| status.leading).max_by_key(|(_, status)| status.term).map(|(id, _)| id)
    }

    /// Whether a mistake is planted.
    pub(crate) fn plants(&self, mistake: Mistake) -> bool {
        self.plan.mistake == Some(mistake)
    }
}
