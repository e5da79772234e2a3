//! How long a stream may take. [`Timing`] is pure: it tells which limit comes next, and when. [`Timer`] waits for it.
//!
//! A stream has one timer at most, however many limits it has. The timer is not moved when something moves on the
//! stream; it is looked at when it fires, and only then set to what comes next.

use std::cell::RefCell;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// The most timers that a worker keeps for its next streams.
pub const OF_WORKER: usize = 512;
/// The most timers that a connection keeps for its next streams.
pub const OF_CONNECTION: usize = 1;

/// A limit that has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// Nothing moved for too long (`stream_idle_timeout`, a route's `idle_timeout`).
    Idle,
    /// The whole request did not come in time (`request_timeout`).
    Request,
    /// The response did not end in time (a route's `timeout`).
    Route,
    /// One attempt took too long (`per_try_timeout`).
    Try,
}

/// How far the request has come.
#[derive(Clone, Copy, Debug)]
pub struct Upload {
    /// When the whole request was here; `None` while more of it is to come.
    pub whole: Option<Instant>,
    /// When its last piece came, if one came after its head.
    pub moved: Option<Instant>,
}

/// One attempt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attempt {
    /// How long it may take.
    pub timeout: Option<Duration>,
    /// When it had a connection.
    pub ready: Option<Instant>,
}

/// The limits of one stream.
#[derive(Debug)]
pub struct Timing {
    idle: Option<Duration>,
    moved: Instant,
    request: Option<Instant>,
    route: Option<Duration>,
    forwarded: Instant,
}

impl Timing {
    /// A stream whose head has come just now. `idle`: how long nothing may move; `request`: how long the whole
    /// request may take.
    #[must_use]
    pub fn new(now: Instant, idle: Option<Duration>, request: Option<Duration>) -> Self {
        Self { idle, moved: now, request: request.map(|t| now + t), route: None, forwarded: now }
    }

    /// The route says how long nothing may move; zero is for ever.
    pub fn set_idle(&mut self, idle: Duration) {
        self.idle = (!idle.is_zero()).then_some(idle);
    }

    /// How long nothing may move.
    #[must_use]
    pub fn idle(&self) -> Option<Duration> {
        self.idle
    }

    /// The request is sent on from now. The route's timeout begins when all of the request is here, and not before
    /// filters have let it through.
    pub fn forward(&mut self, now: Instant, timeout: Option<Duration>) {
        (self.forwarded, self.route) = (now, timeout);
        self.on_move(now);
    }

    /// Something moved.
    pub fn on_move(&mut self, now: Instant) {
        self.moved = self.moved.max(now);
    }

    /// Which limit passes next, and when.
    #[must_use]
    pub fn next(&self, upload: Upload, attempt: Option<Attempt>) -> Option<(Instant, Late)> {
        let moved = upload.moved.map_or(self.moved, |at| at.max(self.moved));
        let idle = self.idle.map(|t| (moved + t, Late::Idle));
        let request = self.request.filter(|_| upload.whole.is_none()).map(|at| (at, Late::Request));
        // While there is no connection nobody reads the request, so nobody can tell whether all of it is here.
        let connecting = attempt.is_some_and(|a| a.ready.is_none());
        let whole = match upload.whole {
            Some(at) => Some(at.max(self.forwarded)),
            None => connecting.then_some(self.forwarded),
        };
        let route = self.route.zip(whole).map(|(t, at)| (at + t, Late::Route));
        let one = attempt.and_then(|a| {
            let began = a.ready?.max(upload.whole?);
            a.timeout.map(|t| (began + t, Late::Try))
        });
        [route, one, request, idle].into_iter().flatten().min_by_key(|(at, _)| *at)
    }
}

/// A timer that is looked at with every request and hardly ever fires: between, a look costs a comparison.
#[derive(Debug)]
pub struct Alarm {
    sleep: Pin<Box<Sleep>>,
    /// Who will be woken.
    task: Option<Waker>,
}

impl Alarm {
    /// Fires at this time.
    #[must_use]
    pub fn new(at: Instant) -> Self {
        Self { sleep: Box::pin(tokio::time::sleep_until(at)), task: None }
    }

    /// When it fires.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.sleep.deadline()
    }

    /// Lets it fire at another time.
    pub fn reset(&mut self, at: Instant) {
        self.task = None;
        self.sleep.as_mut().reset(at);
    }

    /// Ready when it has fired.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) && !self.sleep.is_elapsed() {
            return Poll::Pending;
        }
        self.task = Some(cx.waker().clone());
        self.sleep.as_mut().poll(cx)
    }
}

/// Timers that no stream uses just now. They stay registered with the runtime, so the next stream has one at once.
#[derive(Debug)]
pub struct Spare {
    alarms: RefCell<Vec<Alarm>>,
    most: usize,
}

impl Spare {
    /// Keeps up to `most`.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { alarms: RefCell::default(), most }
    }

    fn take(&self) -> Option<Alarm> {
        self.alarms.borrow_mut().pop()
    }

    /// Keeps the timer, or gives it back when there are enough.
    fn put(&self, alarm: Alarm) -> Option<Alarm> {
        let mut alarms = self.alarms.borrow_mut();
        if alarms.len() >= self.most {
            return Some(alarm);
        }
        alarms.push(alarm);
        None
    }
}

/// What waits for a stream's next limit; made when it first has to wait.
#[derive(Debug, Default)]
pub struct Timer(Option<Alarm>);

impl Timer {
    /// Ready when `at` has passed. It may be woken earlier, and is then set to `at`. A new timer is taken from the
    /// first of `spare` that has one: one of the same connection knows its task already.
    pub fn poll(&mut self, at: Instant, spare: [&Spare; 2], cx: &mut Context<'_>) -> Poll<()> {
        let alarm = self
            .0
            .get_or_insert_with(|| spare.into_iter().find_map(Spare::take).unwrap_or_else(|| Alarm::new(at)));
        if at < alarm.deadline() {
            alarm.reset(at);
        }
        while alarm.poll(cx).is_ready() {
            if alarm.deadline() >= at {
                return Poll::Ready(());
            }
            alarm.reset(at);
        }
        Poll::Pending
    }

    /// Leaves the timer to the next stream.
    pub fn leave(&mut self, spare: [&Spare; 2]) {
        if let Some(alarm) = self.0.take() {
            drop(spare.into_iter().try_fold(alarm, |alarm, spare| spare.put(alarm).ok_or(())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Option<Duration> = Some(Duration::from_secs(300));

    fn at(t0: Instant, s: u64) -> Instant {
        t0 + Duration::from_secs(s)
    }

    fn waits(whole: Option<Instant>, moved: Option<Instant>) -> Upload {
        Upload { whole, moved }
    }

    #[tokio::test(start_paused = true)]
    async fn a_routes_timeout_begins_when_the_request_is_whole() {
        let t0 = Instant::now();
        let mut timing = Timing::new(t0, IDLE, None);
        timing.forward(at(t0, 2), Some(Duration::from_secs(15)));
        let sent = Some(Attempt { timeout: None, ready: Some(at(t0, 2)) });
        assert_eq!(timing.next(waits(None, None), sent), Some((at(t0, 302), Late::Idle)));
        assert_eq!(timing.next(waits(None, Some(at(t0, 9))), sent), Some((at(t0, 309), Late::Idle)));
        assert_eq!(timing.next(waits(Some(at(t0, 10)), None), sent), Some((at(t0, 25), Late::Route)));
        // a delay before it was sent on does not count
        assert_eq!(timing.next(waits(Some(t0), None), sent), Some((at(t0, 17), Late::Route)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempts_timeout_begins_when_it_has_a_connection_and_the_request_is_whole() {
        let t0 = Instant::now();
        let mut timing = Timing::new(t0, IDLE, None);
        timing.forward(t0, None);
        let one = |ready| Some(Attempt { timeout: Some(Duration::from_secs(1)), ready });
        assert_eq!(timing.next(waits(Some(t0), None), one(None)), Some((at(t0, 300), Late::Idle)));
        assert_eq!(timing.next(waits(Some(t0), None), one(Some(at(t0, 3)))), Some((at(t0, 4), Late::Try)));
        assert_eq!(timing.next(waits(None, None), one(Some(at(t0, 3)))), Some((at(t0, 300), Late::Idle)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_waits_for_a_connection_is_under_the_routes_timeout() {
        let t0 = Instant::now();
        let mut timing = Timing::new(t0, IDLE, None);
        timing.forward(t0, Some(Duration::from_secs(15)));
        let waiting = Some(Attempt::default());
        assert_eq!(timing.next(waits(None, None), waiting), Some((at(t0, 15), Late::Route)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_whole_request_must_come_in_time_and_idling_can_be_allowed() {
        let t0 = Instant::now();
        let mut timing = Timing::new(t0, IDLE, Some(Duration::from_secs(5)));
        assert_eq!(timing.next(waits(None, Some(at(t0, 4))), None), Some((at(t0, 5), Late::Request)));
        timing.set_idle(Duration::ZERO);
        assert_eq!(timing.next(waits(Some(at(t0, 4)), None), None), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_fires_early_is_set_to_what_comes_next() {
        let (one, many, t0) = (Spare::new(OF_CONNECTION), Spare::new(OF_WORKER), Instant::now());
        let spare = [&one, &many];
        let mut timer = Timer::default();
        let first = std::future::poll_fn(|cx| timer.poll(at(t0, 1), spare, cx));
        first.await;
        assert_eq!(Instant::now(), at(t0, 1));
        timer.leave(spare);
        let mut next = Timer::default();
        std::future::poll_fn(|cx| next.poll(at(t0, 7), spare, cx)).await;
        assert_eq!(Instant::now(), at(t0, 7));
        next.leave(spare);
        let mut sooner = Timer::default();
        let mut due = at(t0, 60);
        // looked at once with a far limit, then with a near one
        std::future::poll_fn(|cx| {
            let polled = sooner.poll(due, spare, cx);
            if due == at(t0, 60) {
                due = at(t0, 9);
                cx.waker().wake_by_ref();
            }
            polled
        })
        .await;
        assert_eq!(Instant::now(), at(t0, 9));
    }
}
