//! One blocking query: when it is asked, with which index, and whether its answer is believed.
//!
//! Source: Consul, "Blocking Queries" and "Consistency Modes". A machine without IO: the time is an argument.

use std::time::{Duration, Instant};

use super::answer::Answer;

/// How answers are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Any server may answer from what it has.
    Stale,
    /// The leader answers, after it has asked a quorum.
    Consistent,
}

/// Answers in a row before a query is slowed down; returning is not changing.
const BURST: u32 = 5;
/// The pause of a query that always returns at once, at first.
const CHURN_FIRST: Duration = Duration::from_millis(500);
/// Between questions whose answers carry no index, so that nothing blocks.
const UNINDEXED: Duration = Duration::from_secs(15);
/// The pause after a failure, at first,
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
/// and at last.
const BACKOFF_LAST: Duration = Duration::from_secs(60);
/// How old an answer may be.
pub const MAX_STALE: Duration = Duration::from_secs(10);

/// A token bucket whose refill slows down while it stays empty.
#[derive(Debug, Clone)]
struct Pace {
    tokens: u32,
    every: Duration,
    slowest: Duration,
    last: Option<Instant>,
}

impl Pace {
    fn new(slowest: Duration) -> Self {
        Self { tokens: BURST, every: CHURN_FIRST, slowest, last: None }
    }

    /// When the next question may be asked, one answer having come at `now`.
    fn next(&mut self, now: Instant) -> Instant {
        if let Some(last) = self.last {
            let refills = now.saturating_duration_since(last).as_millis() / self.every.as_millis().max(1);
            let refills = u32::try_from(refills).unwrap_or(u32::MAX);
            self.tokens = self.tokens.saturating_add(refills).min(BURST);
            if self.tokens == BURST {
                self.every = CHURN_FIRST;
            }
        }
        self.last = Some(now);
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                now
            }
            None => {
                let due = now + self.every;
                // The pause gives the token that it then spends.
                self.last = Some(due);
                self.every = (self.every * 2).min(self.slowest);
                due
            }
        }
    }
}

/// What becomes of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Its content holds.
    Believe,
    /// Its content may be older than what is known: the question is asked again, of the leader.
    Doubt,
    /// It counts as a failure: what was known stays.
    Refuse(String),
    /// The token does not allow the question, or not all of its answer.
    Forbidden(String),
}

/// The state of one query.
#[derive(Debug, Clone)]
pub struct Poll {
    index: Option<u64>,
    consistency: Consistency,
    /// The next question begins from nothing: its server may be another one.
    afresh: bool,
    answered: bool,
    filtered_from_the_start: bool,
    failures: u32,
    pace: Pace,
    due: Instant,
    resync: Instant,
    heard: Option<Instant>,
}

/// What the next request carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// `index=`; without one the answer comes at once.
    pub index: Option<u64>,
    /// `wait=`; meaningful with an index only.
    pub wait: Duration,
    /// `stale` or `consistent`.
    pub consistency: Consistency,
}

impl Poll {
    /// A query to be asked first at `due`, and again from nothing at `resync`. While its answers always come at once it is
    /// slowed down to one in `slowest`.
    #[must_use]
    pub fn new(due: Instant, resync: Instant, slowest: Duration) -> Self {
        Self {
            index: None,
            consistency: Consistency::Stale,
            afresh: false,
            answered: false,
            filtered_from_the_start: false,
            failures: 0,
            pace: Pace::new(slowest),
            due,
            resync,
            heard: None,
        }
    }

    /// When it is to be asked next, if it is not being asked now.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.due
    }

    /// The next question blocks until something changes.
    #[must_use]
    pub fn blocks(&self) -> bool {
        self.index.is_some()
            && !self.afresh
            && self.consistency == Consistency::Stale
            && self.due < self.resync
    }

    /// When an answer was believed last.
    #[must_use]
    pub fn heard(&self) -> Option<Instant> {
        self.heard
    }

    /// Failures since the last answer.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The request to be sent now. From time to time it begins from nothing, which repairs whatever was lost.
    pub fn ask(&mut self, longest: Duration, every: Duration, now: Instant) -> Ask {
        if self.resync <= now {
            self.resync = now + every;
            self.afresh = true;
        }
        let wait = longest.min(self.resync.saturating_duration_since(now)).max(Duration::from_secs(1));
        let consistency = self.consistency;
        let index = match consistency {
            Consistency::Stale if !self.afresh => self.index,
            Consistency::Stale | Consistency::Consistent => None,
        };
        Ask { index, wait, consistency }
    }

    /// Reads the head of an answer.
    ///
    /// An index of 0 stands for 1, a missing one for a server that cannot block; an index that goes back means that the
    /// data went back (a snapshot was restored, or a server lags), so the leader is asked.
    pub fn on_answer(&mut self, answer: &Answer, asked: Ask, now: Instant) -> Verdict {
        if answer.status == 403 {
            return Verdict::Forbidden(answer.reason());
        }
        if answer.status != 200 {
            return Verdict::Refuse(answer.reason());
        }
        if answer.last_contact > MAX_STALE {
            let age = answer.last_contact.as_millis();
            return Verdict::Refuse(format!("the server heard from its leader {age} ms ago"));
        }
        if answer.known_leader == Some(false) && self.answered {
            return Verdict::Refuse("the server knows no leader".to_owned());
        }
        if answer.filtered && !self.filtered_from_the_start {
            if self.answered {
                return Verdict::Forbidden("results are filtered by ACLs".to_owned());
            }
            self.filtered_from_the_start = true;
        }
        let back = matches!((self.index, answer.index), (Some(known), Some(index)) if index.max(1) < known);
        if back && asked.consistency == Consistency::Stale {
            self.doubt(now);
            return Verdict::Doubt;
        }
        Verdict::Believe
    }

    /// The content of an answer was taken over.
    pub fn on_believed(&mut self, answer: &Answer, now: Instant) {
        self.answered = true;
        self.afresh = false;
        self.failures = 0;
        self.consistency = Consistency::Stale;
        self.heard = Some(now);
        self.index = answer.index.map(|index| index.max(1));
        let paced = self.pace.next(now);
        // Without an index nothing blocks, so the question is only asked from time to time.
        self.due = if self.index.is_none() { now + UNINDEXED } else { paced };
    }

    /// The next question goes to the leader, soon, and its answer holds whatever its index is.
    pub fn doubt(&mut self, now: Instant) {
        self.consistency = Consistency::Consistent;
        self.due = self.pace.next(now);
    }

    /// The next question goes to the leader, at `due`.
    pub fn confirm(&mut self, due: Instant) {
        self.consistency = Consistency::Consistent;
        self.due = due;
    }

    /// Nothing came, or nothing that is believed. `elsewhere`: another server may be asked at once.
    pub fn on_failure(
        &mut self,
        elsewhere: bool,
        retry_after: Option<Duration>,
        random: &mut fastrand::Rng,
        now: Instant,
    ) {
        self.failures = self.failures.saturating_add(1);
        self.afresh = true;
        if elsewhere && self.failures == 1 {
            self.due = now;
            return;
        }
        let exponent = self.failures.saturating_sub(1).min(8);
        let pause = (BACKOFF_FIRST * 2u32.saturating_pow(exponent)).min(BACKOFF_LAST);
        let jittered = pause.mul_f64(0.75 + random.f64() / 2.0);
        self.due = now + retry_after.map_or(jittered, |told| told.min(BACKOFF_LAST).max(jittered));
    }

    /// Asked again no later than at `due`: the reason for the last failures may have gone.
    pub fn hurry(&mut self, due: Instant) {
        self.failures = 0;
        self.due = self.due.min(due);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_secs(300);
    const EVERY: Duration = Duration::from_secs(600);

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn poll(t0: Instant) -> Poll {
        Poll::new(t0, t0 + EVERY, Duration::from_secs(15))
    }

    fn index(index: u64) -> Answer {
        Answer { status: 200, index: Some(index), known_leader: Some(true), ..Answer::default() }
    }

    /// Asks, and believes the answer if the poll does; what was asked and what became of it.
    fn turn(poll: &mut Poll, answer: &Answer, now: Instant) -> (Ask, Verdict) {
        let ask = poll.ask(WAIT, EVERY, now);
        let verdict = poll.on_answer(answer, ask, now);
        if verdict == Verdict::Believe {
            poll.on_believed(answer, now);
        }
        (ask, verdict)
    }

    #[test]
    fn the_first_question_has_no_index_and_the_next_one_the_index_of_the_answer() {
        let t0 = origin();
        let mut poll = poll(t0);
        assert_eq!(turn(&mut poll, &index(7), t0).0.index, None);
        assert_eq!(poll.ask(WAIT, EVERY, t0).index, Some(7));
        assert_eq!(poll.due(), t0, "and is asked at once");
    }

    #[test]
    fn an_index_of_0_stands_for_1() {
        let t0 = origin();
        let mut poll = poll(t0);
        turn(&mut poll, &index(0), t0);
        assert_eq!(poll.ask(WAIT, EVERY, t0).index, Some(1));
    }

    #[test]
    fn an_index_that_goes_back_is_confirmed_by_the_leader_and_then_followed() {
        let t0 = origin();
        let mut poll = poll(t0);
        turn(&mut poll, &index(9), t0);
        assert_eq!(turn(&mut poll, &index(5), t0).1, Verdict::Doubt);
        let (ask, verdict) = turn(&mut poll, &index(5), t0);
        assert_eq!((ask.index, ask.consistency, verdict), (None, Consistency::Consistent, Verdict::Believe));
        assert_eq!(poll.ask(WAIT, EVERY, t0).index, Some(5));
    }

    #[test]
    fn without_an_index_the_question_is_asked_only_from_time_to_time() {
        let t0 = origin();
        let mut poll = poll(t0);
        turn(&mut poll, &Answer { status: 200, ..Answer::default() }, t0);
        assert_eq!(poll.ask(WAIT, EVERY, t0).index, None);
        assert_eq!(poll.due(), t0 + UNINDEXED);
    }

    #[test]
    fn answers_that_come_at_once_are_paced_and_a_quiet_time_makes_up_for_it() {
        let t0 = origin();
        let mut poll = poll(t0);
        let (mut now, mut asked) = (t0, 0);
        while now < t0 + Duration::from_secs(120) {
            turn(&mut poll, &index(1000 + asked), now);
            asked += 1;
            now = poll.due().max(now + Duration::from_millis(1));
        }
        assert!((10..=22).contains(&asked), "{asked} questions in two minutes");
        now += Duration::from_secs(120);
        turn(&mut poll, &index(5000), now);
        assert_eq!(poll.due(), now);
    }

    #[test]
    fn what_is_old_or_without_a_leader_is_refused_once_something_is_known() {
        let t0 = origin();
        let mut poll = poll(t0);
        let leaderless = Answer { known_leader: Some(false), ..index(9) };
        assert_eq!(turn(&mut poll, &leaderless, t0).1, Verdict::Believe, "better than nothing");
        assert!(matches!(turn(&mut poll, &leaderless, t0).1, Verdict::Refuse(_)));
        let old = Answer { last_contact: Duration::from_secs(3600), ..index(9) };
        assert!(matches!(turn(&mut poll, &old, t0).1, Verdict::Refuse(_)));
    }

    #[test]
    fn results_that_become_filtered_are_forbidden_and_such_as_always_were_are_not() {
        let t0 = origin();
        let filtered = Answer { filtered: true, ..index(9) };
        let mut known = poll(t0);
        turn(&mut known, &index(8), t0);
        assert!(matches!(turn(&mut known, &filtered, t0).1, Verdict::Forbidden(_)));
        let mut narrow = poll(t0);
        assert_eq!(turn(&mut narrow, &filtered, t0).1, Verdict::Believe);
        assert_eq!(turn(&mut narrow, &filtered, t0).1, Verdict::Believe);
        let denied = Answer { status: 403, ..Answer::default() };
        assert!(matches!(turn(&mut narrow, &denied, t0).1, Verdict::Forbidden(_)));
    }

    #[test]
    fn failures_try_another_server_once_and_then_back_off_with_jitter() {
        let t0 = origin();
        let mut poll = poll(t0);
        let mut random = fastrand::Rng::with_seed(1);
        poll.on_failure(true, None, &mut random, t0);
        assert_eq!(poll.due(), t0);
        let mut pauses = Vec::new();
        for _ in 0..12 {
            poll.on_failure(true, None, &mut random, t0);
            pauses.push(poll.due() - t0);
        }
        assert!(pauses[0] < Duration::from_secs(1) && pauses[11] >= BACKOFF_LAST.mul_f64(0.75));
        assert!(pauses[11] <= BACKOFF_LAST.mul_f64(1.25));
        poll.on_failure(false, Some(Duration::from_secs(3600)), &mut random, t0);
        assert!(poll.due() <= t0 + BACKOFF_LAST.mul_f64(1.25), "nobody tells us to wait for ever");
        poll.hurry(t0);
        assert_eq!((poll.due(), poll.failures()), (t0, 0));
    }

    #[test]
    fn from_time_to_time_it_begins_from_nothing() {
        let t0 = origin();
        let mut poll = poll(t0);
        turn(&mut poll, &index(7), t0);
        let ask = poll.ask(WAIT, EVERY, t0 + EVERY - Duration::from_secs(20));
        assert_eq!((ask.index, ask.wait), (Some(7), Duration::from_secs(20)), "waits no longer than that");
        assert_eq!(poll.ask(WAIT, EVERY, t0 + EVERY).index, None);
    }
}
