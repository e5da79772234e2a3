//! The thread around a [`Driver`]: queues in, answers out, ticks between. It decides nothing.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use raft::eraftpb::{ConfState, Message};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{Answer, Driver, Event, Fatal, Forward, Job, Output, Refusal, Status, Transport};
use crate::raft::machine::StateMachine;
use crate::raft::metrics::Metrics;
use crate::raft::wire;

/// Requests waiting for the raft thread. Full means that the disk is the bottleneck: proposers wait, and
/// `istiod_raft_commit_seconds` shows it.
const REQUESTS: usize = 1024;
/// Messages from peers waiting for the raft thread. Full means that it is stuck: they are dropped, Raft sends again.
const MESSAGES: usize = 4096;
/// Requests taken in one step, which share one fdatasync.
const BATCH: usize = 512;

/// Commits that follow each other within this time are told with the next one,
const OFTEN: Duration = Duration::from_millis(10);
/// or after this.
const TELL_WITHIN: Duration = Duration::from_millis(1);

/// Numbers of requests that are no proposals begin here.
const OTHERS: u64 = 1 << 63;

/// A running member. Clones are handles to the same one.
pub struct Node<M: StateMachine> {
    requests: mpsc::Sender<Request<M>>,
    messages: mpsc::Sender<Event>,
    status: watch::Receiver<Status>,
    ended: watch::Receiver<Option<Arc<Fatal>>>,
}

impl<M: StateMachine> Clone for Node<M> {
    fn clone(&self) -> Self {
        Self {
            requests: self.requests.clone(),
            messages: self.messages.clone(),
            status: self.status.clone(),
            ended: self.ended.clone(),
        }
    }
}

/// Why a request got no result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RequestError {
    /// Raft said no, or nothing in time.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// This member has stopped. Whether the command was applied is not known.
    #[error("this member has stopped")]
    Stopped(#[source] Option<Arc<Fatal>>),
}

enum Request<M: StateMachine> {
    Propose(Vec<u8>, oneshot::Sender<Result<(u64, M::Answer), Refusal>>),
    Members(wire::ConfChangeV2, oneshot::Sender<Result<(u64, ConfState), Refusal>>),
    Read(oneshot::Sender<Result<u64, Refusal>>),
    Forwarded(Bytes, oneshot::Sender<Result<(), Refusal>>),
    Inspect(Inspect<M>),
}

/// The thread; its result says why it ended, if it was not told to.
pub type Ending = JoinHandle<Result<(), Arc<Fatal>>>;

/// Something to be done with the state machine between two steps.
type Inspect<M> = Box<dyn FnOnce(&M) + Send>;

enum Reply<A> {
    Propose(oneshot::Sender<Result<(u64, A), Refusal>>, Instant),
    Members(oneshot::Sender<Result<(u64, ConfState), Refusal>>),
    Read(oneshot::Sender<Result<u64, Refusal>>),
    Forwarded(oneshot::Sender<Result<(), Refusal>>),
}

impl<M: StateMachine> Node<M> {
    /// Starts the thread. It ends when `stop` is cancelled, or by itself with a [`Fatal`].
    ///
    /// # Errors
    ///
    /// The operating system's, if it gives no thread.
    pub fn spawn(
        driver: Driver<M>,
        transport: Box<dyn Transport>,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> std::io::Result<(Self, Ending)> {
        let (requests, request_queue) = mpsc::channel(REQUESTS);
        let (messages, message_queue) = mpsc::channel(MESSAGES);
        let (status_out, status) = watch::channel(driver.status());
        let (ended_out, ended) = watch::channel(None);
        let worker = Worker {
            driver,
            transport,
            metrics,
            requests: request_queue,
            messages: message_queue,
            to_self: messages.clone(),
            status: status_out,
            replies: BTreeMap::new(),
            proposals: 0,
            others: OTHERS,
            tell_at: None,
            committed_at: None,
            jobs: Vec::new(),
        };
        // The runtime is only for the timer and the queues; everything that blocks blocks this thread alone.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let thread = std::thread::Builder::new().name("raft".to_owned()).spawn(move || {
            let result = runtime.block_on(worker.run(stop)).map_err(Arc::new);
            if let Err(fatal) = &result {
                ended_out.send_replace(Some(fatal.clone()));
            }
            result
        })?;
        Ok((Self { requests, messages, status, ended }, thread))
    }

    /// Has a command committed and applied; gives its index and what it made. The queue is bounded: under load this
    /// waits.
    ///
    /// # Errors
    ///
    /// [`RequestError`].
    pub async fn propose(&self, command: Vec<u8>) -> Result<(u64, M::Answer), RequestError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Propose(command, reply), answer).await
    }

    /// Changes the members; gives the index and the members afterwards.
    ///
    /// # Errors
    ///
    /// [`RequestError`].
    pub async fn change_members(&self, change: wire::ConfChangeV2) -> Result<(u64, ConfState), RequestError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Members(change, reply), answer).await
    }

    /// Waits until everything is applied here that was committed anywhere when this was called; gives the index.
    /// What is read afterwards is linearizable.
    ///
    /// # Errors
    ///
    /// [`RequestError`].
    pub async fn read_index(&self) -> Result<u64, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Read(reply), answer).await
    }

    /// Puts another member's proposal into the log that this member leads. That member learns what becomes of it.
    ///
    /// # Errors
    ///
    /// [`RequestError`].
    pub async fn take_forwarded(&self, proposal: Bytes) -> Result<(), RequestError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Forwarded(proposal, reply), answer).await
    }

    /// Looks at the state machine as it is after some step; no command is applied meanwhile, so `look` must be short.
    ///
    /// # Errors
    ///
    /// [`RequestError::Stopped`].
    pub async fn inspect<R: Send + 'static>(
        &self,
        look: impl FnOnce(&M) -> R + Send + 'static,
    ) -> Result<R, RequestError> {
        let (reply, answer) = oneshot::channel();
        let look: Inspect<M> = Box::new(move |machine| {
            if reply.send(look(machine)).is_err() {
                tracing::trace!("nobody waits for what was looked at");
            }
        });
        self.ask(Request::Inspect(look), async { answer.await.map(Ok) }).await
    }

    /// Hands over a message from a peer; dropped if the thread is far behind.
    pub fn deliver(&self, message: Message) {
        self.tell(Event::Message(Box::new(message)));
    }

    /// Tells the member what became of a message to a peer.
    pub fn tell(&self, event: Event) {
        if self.messages.try_send(event).is_err() {
            tracing::debug!("a message for the raft thread was dropped");
        }
    }

    /// How this member stands, always the latest.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Why the thread ended by itself, once it has.
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<Option<Arc<Fatal>>> {
        self.ended.clone()
    }

    async fn ask<R>(
        &self,
        request: Request<M>,
        answer: impl Future<Output = Result<Result<R, Refusal>, oneshot::error::RecvError>>,
    ) -> Result<R, RequestError> {
        let stopped = || RequestError::Stopped(self.ended.borrow().clone());
        self.requests.send(request).await.map_err(|_| stopped())?;
        Ok(answer.await.map_err(|_| stopped())??)
    }
}

struct Worker<M: StateMachine> {
    driver: Driver<M>,
    transport: Box<dyn Transport>,
    metrics: Metrics,
    requests: mpsc::Receiver<Request<M>>,
    messages: mpsc::Receiver<Event>,
    to_self: mpsc::Sender<Event>,
    status: watch::Sender<Status>,
    replies: BTreeMap<u64, Reply<M::Answer>>,
    /// Numbers of proposals are without gaps, because the table of sessions remembers gaps.
    proposals: u64,
    others: u64,
    /// When others are told what is committed, and when something last was.
    tell_at: Option<Instant>,
    committed_at: Option<Instant>,
    /// Threads that do slow work; each gives its event if nobody took it.
    jobs: Vec<JoinHandle<Option<Event>>>,
}

impl<M: StateMachine> Worker<M> {
    async fn run(mut self, stop: CancellationToken) -> Result<(), Fatal> {
        let mut ticks = tokio::time::interval(self.driver.settings.tick);
        // A disk that was slow must not make a leader believe that its followers were silent.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut events, mut requests) = (Vec::new(), Vec::new());
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => events.push(Event::Tick),
                () = until(self.tell_at) => events.push(Event::TellCommitted),
                _ = self.messages.recv_many(&mut events, BATCH) => {}
                count = self.requests.recv_many(&mut requests, BATCH) => {
                    if count == 0 {
                        break; // all handles are gone
                    }
                }
            }
            // Whatever else has come in shares the step, and its fdatasync.
            while events.len() < BATCH
                && let Ok(event) = self.messages.try_recv()
            {
                events.push(event);
            }
            while requests.len() < BATCH
                && let Ok(request) = self.requests.try_recv()
            {
                requests.push(request);
            }
            self.step(&mut events, &mut requests, tokio::time::Instant::now().into_std())?;
        }
        // A snapshot's file is complete under its name or not there at all; but the store is to be had back.
        self.messages.close();
        let mut late: Vec<Event> =
            self.jobs.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect();
        while let Ok(event) = self.messages.try_recv() {
            late.push(event);
        }
        self.driver.close(late)
    }

    fn step(
        &mut self,
        events: &mut Vec<Event>,
        requests: &mut Vec<Request<M>>,
        now: Instant,
    ) -> Result<(), Fatal> {
        let mut looks = Vec::new();
        for request in requests.drain(..) {
            match request {
                Request::Inspect(look) => looks.push(look),
                other @ (Request::Propose(..)
                | Request::Members(..)
                | Request::Read(_)
                | Request::Forwarded(..)) => {
                    events.extend(self.note(other, now));
                }
            }
        }
        let mut out = Output::default();
        let (driver, transport) = (&mut self.driver, self.transport.as_mut());
        let result =
            catch_unwind(AssertUnwindSafe(|| driver.steps(events.drain(..), now, transport, &mut out)));
        result.unwrap_or_else(|panic| Err(Fatal::Panicked(panic_text(panic.as_ref()))))?;
        let status = self.driver.status();
        self.metrics.show(&status);
        self.status.send_if_modified(|shown| {
            let changed = *shown != status;
            *shown = status;
            changed
        });
        if !out.forwards.is_empty() {
            self.transport.forward(out.forwards);
        }
        for (sequence, answer) in out.answers {
            self.answer(sequence, answer);
        }
        self.plan_telling(now);
        looks.into_iter().for_each(|look| look(self.driver.machine()));
        out.jobs.into_iter().try_for_each(|job| self.start_job(job))
    }

    /// Others are told at once what is committed, unless one commit follows the other: then the next one says it too.
    fn plan_telling(&mut self, now: Instant) {
        if !self.driver.owes_committed() {
            self.tell_at = None;
        } else if self.tell_at.is_none() {
            let often = self.committed_at.is_some_and(|before| now - before < OFTEN);
            self.tell_at = Some(if often { now + TELL_WITHIN } else { now });
            self.committed_at = Some(now);
        }
    }

    fn note(&mut self, request: Request<M>, now: Instant) -> Option<Event> {
        let next =
            if matches!(request, Request::Propose(..)) { &mut self.proposals } else { &mut self.others };
        *next += 1;
        let sequence = *next;
        let (reply, event) = match request {
            Request::Propose(command, reply) => {
                (Reply::Propose(reply, now), Event::Propose { sequence, command })
            }
            Request::Members(change, reply) => {
                (Reply::Members(reply), Event::ChangeMembers { sequence, change })
            }
            Request::Read(reply) => (Reply::Read(reply), Event::Read { sequence }),
            Request::Forwarded(proposal, reply) => {
                (Reply::Forwarded(reply), Event::Forwarded { sequence, proposal })
            }
            Request::Inspect(_) => return None,
        };
        self.replies.insert(sequence, reply);
        Some(event)
    }

    /// Tells whoever waits. That nobody waits any more is not an error: the caller may have gone.
    fn answer(&mut self, sequence: u64, answer: Answer<M::Answer>) {
        let refused = |refusal: &Refusal| tracing::debug!(error = %refusal, "request refused");
        let gone = match (self.replies.remove(&sequence), answer) {
            (Some(Reply::Propose(reply, since)), Answer::Applied(index, answer)) => {
                self.metrics.committed(tokio::time::Instant::now().into_std() - since);
                reply.send(Ok((index, answer))).is_err()
            }
            (Some(Reply::Members(reply)), Answer::Members(index, state)) => {
                reply.send(Ok((index, state))).is_err()
            }
            (Some(Reply::Read(reply)), Answer::Readable(index)) => reply.send(Ok(index)).is_err(),
            (Some(Reply::Forwarded(reply)), Answer::Accepted) => reply.send(Ok(())).is_err(),
            (Some(reply), Answer::Refused(refusal)) => {
                refused(&refusal);
                self.metrics.refused();
                match reply {
                    Reply::Propose(reply, _) => reply.send(Err(refusal)).is_err(),
                    Reply::Members(reply) => reply.send(Err(refusal)).is_err(),
                    Reply::Read(reply) => reply.send(Err(refusal)).is_err(),
                    Reply::Forwarded(reply) => reply.send(Err(refusal)).is_err(),
                }
            }
            (None, _)
            | (Some(_), Answer::Applied(..) | Answer::Accepted | Answer::Members(..) | Answer::Readable(_)) => {
                true
            }
        };
        if gone {
            tracing::trace!(sequence, "nobody waits for this answer");
        }
    }

    /// Does slow work on a thread of its own; what it needs of the state is frozen already.
    fn start_job(&mut self, job: Job) -> Result<(), Fatal> {
        let (to_self, metrics) = (self.to_self.clone(), self.metrics.clone());
        let name = if matches!(job, Job::Snapshot(_)) { "raft-snapshot" } else { "raft-store" };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let event = metrics.timed(job);
            to_self.blocking_send(event).err().map(|unsent| unsent.0)
        });
        self.jobs.retain(|thread| !thread.is_finished());
        self.jobs.push(thread.map_err(|error| Fatal::Raft(raft::Error::Io(error)))?);
        Ok(())
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}

/// The transport of a member without peers.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPeers;

impl Transport for NoPeers {
    fn send(&mut self, messages: Vec<Message>) {
        tracing::trace!(dropped = messages.len(), "messages to peers that nobody carries");
    }

    fn forward(&mut self, forwards: Vec<Forward>) {
        tracing::trace!(dropped = forwards.len(), "proposals to a leader that nobody reaches");
    }
}
