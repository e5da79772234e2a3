//! Which registered workloads have gone silent.
//!
//! Signs of life stay in the memory of the member that holds the agent's stream; only what follows from their absence
//! becomes a command: first the workload is unhealthy, and after a grace it is removed. Both are fenced by the session
//! they are about, so that a workload which came back elsewhere is not touched.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::state::{Command, WorkloadKey};

/// The leases of the workloads whose agents talk to this member. A machine without IO: time is an argument.
#[derive(Debug)]
pub struct Leases {
    grace: Duration,
    held: BTreeMap<WorkloadKey, Lease>,
}

#[derive(Debug)]
struct Lease {
    session: String,
    term: Duration,
    /// When the next step is due.
    due: Instant,
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Signs of life come; when due, the workload is unhealthy.
    Alive,
    /// Told unhealthy; when due, it is removed.
    Silent,
}

impl Leases {
    /// No leases. A workload whose lease ended is removed after `grace` more.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self { grace, held: BTreeMap::new() }
    }

    /// The agent of `key` is connected with `session`; it will be heard from within `term`. A newer session replaces
    /// the older.
    pub fn hold(&mut self, key: WorkloadKey, session: String, term: Duration, now: Instant) {
        self.held.insert(key, Lease { session, term, due: now + term, step: Step::Alive });
    }

    /// A sign of life of `session`; whether its lease was held.
    pub fn renew(&mut self, key: &WorkloadKey, session: &str, now: Instant) -> bool {
        let Some(lease) = self.held.get_mut(key).filter(|lease| lease.session == session) else {
            return false;
        };
        lease.step = Step::Alive;
        lease.due = now + lease.term;
        true
    }

    /// The agent of `session` said good-bye: nothing more is due for it.
    pub fn release(&mut self, key: &WorkloadKey, session: &str) {
        if self.held.get(key).is_some_and(|lease| lease.session == session) {
            self.held.remove(key);
        }
    }

    /// What is due at `now`, in the order of the keys.
    pub fn due(&mut self, now: Instant) -> Vec<Command> {
        let mut commands = Vec::new();
        let grace = self.grace;
        self.held.retain(|key, lease| {
            if lease.due > now {
                return true;
            }
            let (key, session) = (key.clone(), lease.session.clone());
            match lease.step {
                Step::Alive => {
                    lease.step = Step::Silent;
                    lease.due = now + grace;
                    commands.push(Command::WorkloadHealth { key, session, healthy: false });
                    true
                }
                Step::Silent => {
                    commands.push(Command::RemoveWorkload { key, session });
                    false
                }
            }
        });
        commands
    }

    /// When [`due`](Self::due) has something to say next.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.held.values().map(|lease| lease.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Duration = Duration::from_secs(5);
    const GRACE: Duration = Duration::from_secs(10);

    fn key() -> WorkloadKey {
        WorkloadKey { namespace: "shop".into(), name: "payments-1".into() }
    }

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn health(healthy: bool) -> Command {
        Command::WorkloadHealth { key: key(), session: "s1".into(), healthy }
    }

    #[test]
    fn a_silent_workload_is_unhealthy_and_then_removed() {
        let t0 = origin();
        let mut leases = Leases::new(GRACE);
        leases.hold(key(), "s1".into(), TERM, t0);
        assert_eq!(leases.next_due(), Some(t0 + TERM));
        assert_eq!(leases.due(t0 + TERM - Duration::from_millis(1)), vec![]);
        assert!(leases.renew(&key(), "s1", t0 + Duration::from_secs(4)));
        assert_eq!(leases.due(t0 + TERM), vec![], "renewed");
        let silent = t0 + Duration::from_secs(9);
        assert_eq!(leases.due(silent), vec![health(false)]);
        assert_eq!(leases.due(silent), vec![], "told once");
        let gone = Command::RemoveWorkload { key: key(), session: "s1".into() };
        assert_eq!(leases.due(silent + GRACE), vec![gone]);
        assert_eq!(leases.next_due(), None);
    }

    #[test]
    fn a_workload_that_speaks_again_is_not_removed() {
        let t0 = origin();
        let mut leases = Leases::new(GRACE);
        leases.hold(key(), "s1".into(), TERM, t0);
        assert_eq!(leases.due(t0 + TERM), vec![health(false)]);
        assert!(leases.renew(&key(), "s1", t0 + TERM + TERM));
        assert_eq!(leases.due(t0 + TERM + GRACE - Duration::from_millis(1)), vec![], "the removal is off");
        assert_eq!(leases.due(t0 + TERM + TERM + TERM), vec![health(false)], "silent once more");
    }

    #[test]
    fn reports_about_an_old_session_change_nothing() {
        let t0 = origin();
        let mut leases = Leases::new(GRACE);
        leases.hold(key(), "s1".into(), TERM, t0);
        leases.hold(key(), "s2".into(), TERM, t0 + TERM);
        assert!(!leases.renew(&key(), "s1", t0 + TERM));
        leases.release(&key(), "s1");
        assert_eq!(leases.due(t0 + TERM), vec![]);
        assert!(leases.next_due().is_some(), "the new session is held");
        leases.release(&key(), "s2");
        assert_eq!(leases.next_due(), None);
    }
}
