//! Pushes: which proxy gets what, in which order, and how many at a time.
//!
//! [`queue`] decides; the loop here takes what comes in and moves translations to threads where they may take
//! their time. A change that comes after a calm goes out at once; a storm is merged (see `xds::debounce`).

pub mod queue;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use registry::config::Kind;
use registry::snapshot::Snapshot;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use xds::cache::Interner;
use xds::debounce::{Debounce, Limits};
use xds::server::Joined;
use xds::status::{Status, TypeLabel};

use crate::publish::{Update, Updates};
use queue::{Done, Job, Queue};

/// How pushes are paced.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How changes are merged.
    pub debounce: Limits,
    /// Translations at the same time, at least one.
    pub workers: usize,
}

impl Default for Settings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        Self { debounce: Limits::default(), workers: cores }
    }
}

/// The push side: takes updates and proxies that connect, and gives each proxy its views.
#[derive(Debug)]
pub struct Push {
    settings: Settings,
    updates: Updates,
    joins: mpsc::Receiver<Joined>,
    status: Status,
    tasks: TaskTracker,
    interner: Arc<Interner>,
}

impl Push {
    /// Ready to run. Translations are spawned on `tasks`.
    #[must_use]
    pub fn new(
        settings: Settings,
        updates: Updates,
        joins: mpsc::Receiver<Joined>,
        status: Status,
        tasks: TaskTracker,
    ) -> Self {
        Self { settings, updates, joins, status, tasks, interner: Arc::default() }
    }

    /// Runs until `stop`, or until the publisher is gone. All streams end with it.
    pub async fn run(mut self, stop: CancellationToken) {
        let snapshot = self.updates.current();
        self.count_objects(&snapshot);
        self.status.decide(snapshot.revision().0, &[]);
        let mut queue = Queue::new(snapshot);
        let mut debounce = Debounce::new(self.settings.debounce);
        let mut running: FuturesUnordered<JoinHandle<Result<Done, u64>>> = FuturesUnordered::new();
        loop {
            if let Some(waited) = debounce.fire(now()) {
                self.status.metrics().debounce_time.observe(waited.as_secs_f64());
                let decision = queue.flush(now());
                if !decision.concerned.is_empty() {
                    let proxies = decision.concerned.len();
                    tracing::info!(revision = decision.revision, proxies, "pushing");
                }
                self.status.decide(decision.revision, &decision.concerned);
            }
            while running.len() < self.settings.workers.max(1)
                && let Some(job) = queue.next_job()
            {
                running.push(self.start(job));
            }
            let due = debounce.deadline().map(Instant::from_std);
            tokio::select! {
                () = stop.cancelled() => return,
                update = self.updates.next() => match update {
                    Some(update) => {
                        self.on_update(&mut queue, update);
                        debounce.on_change(now());
                    }
                    None => return,
                },
                joined = self.joins.recv() => match joined {
                    Some(joined) => {
                        self.status.require(joined.key, queue.revision());
                        queue.join(joined, now());
                    }
                    None => return,
                },
                Some(done) = running.next() => match done {
                    Ok(Ok(done)) => self.on_done(&mut queue, done),
                    Ok(Err(key)) => {
                        tracing::error!(connection = key, "translation failed, its proxy keeps what it has");
                        queue.failed(key);
                    }
                    // Only a runtime that shuts down cancels what it runs.
                    Err(_) => return,
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
    }

    fn on_update(&self, queue: &mut Queue, update: Update) {
        let inbound = &self.status.metrics().inbound;
        let counts = [
            ("config", update.changes.objects.len()),
            ("eds", update.changes.hosts.len()),
            ("mesh", usize::from(update.changes.mesh)),
        ];
        for (kind, count) in counts.into_iter().filter(|(_, count)| *count > 0) {
            inbound.get_or_create(&TypeLabel::new(kind)).inc_by(count as u64);
        }
        self.count_objects(&update.snapshot);
        queue.update(update);
    }

    fn count_objects(&self, snapshot: &Snapshot) {
        let metrics = self.status.metrics();
        metrics.services.set(i64::try_from(snapshot.host_count()).unwrap_or(i64::MAX));
        let routes = snapshot.objects_of(Kind::VirtualService).count();
        metrics.virtual_services.set(i64::try_from(routes).unwrap_or(i64::MAX));
    }

    fn start(&self, job: Job) -> JoinHandle<Result<Done, u64>> {
        let metrics = self.status.metrics();
        metrics.queue_time.observe(now().saturating_duration_since(job.queued_at()).as_secs_f64());
        metrics.triggers.get_or_create(&TypeLabel::new(job.kind())).inc();
        let interner = self.interner.clone();
        let key = job.key();
        // A fault in the translation of one proxy must not end the pushes of all others.
        let run = AssertUnwindSafe(move || job.run(&interner));
        self.tasks.spawn_blocking(move || std::panic::catch_unwind(run).map_err(|_| key))
    }

    fn on_done(&self, queue: &mut Queue, done: Done) {
        if let Some((from, to)) = done.changed() {
            self.status.note_change(done.key(), from, to);
        }
        queue.done(done);
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}
