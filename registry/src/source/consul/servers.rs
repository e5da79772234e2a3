//! Which server is asked. A machine without IO.
//!
//! All questions go to one server while it answers, for the indexes of two servers need not agree. One that fails is left
//! alone for a while, longer each time; when all fail, a single question at a time finds out who is back.

use std::time::{Duration, Instant};

/// A server that failed is not asked for so long, at first,
const FIRST: Duration = Duration::from_millis(500);
/// and at last.
const LAST: Duration = Duration::from_secs(30);

/// A server that had failed is asked one question in this time, until it answers.
const PROBE: Duration = Duration::from_secs(5);

/// The servers of a datacenter, by their position in the settings.
#[derive(Debug, Clone)]
pub struct Servers {
    current: usize,
    each: Vec<Server>,
}

#[derive(Debug, Clone, Default)]
struct Server {
    failures: u32,
    failed: Option<Instant>,
    until: Option<Instant>,
}

impl Servers {
    /// So many servers, none of which has failed; `first` is asked first.
    #[must_use]
    pub fn new(count: usize, first: usize) -> Self {
        let count = count.max(1);
        Self { current: first % count, each: vec![Server::default(); count] }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.each.len()
    }

    /// The server to ask: the current one, or the next that has not failed lately.
    pub fn pick(&mut self, now: Instant) -> Option<usize> {
        let count = self.each.len();
        let order = (0..count).map(|step| (self.current + step) % count);
        let usable =
            |server: &usize| self.each.get(*server).is_some_and(|s| s.until.is_none_or(|u| u <= now));
        let picked = order.into_iter().find(usable)?;
        self.current = picked;
        if self.all_down()
            && let Some(server) = self.each.get_mut(picked)
        {
            server.until = Some(now + PROBE);
        }
        Some(picked)
    }

    /// The server after `server`, for an answer that must not come from the same one.
    #[must_use]
    pub fn after(&self, server: usize) -> usize {
        (server + 1) % self.each.len().max(1)
    }

    /// No server answers.
    #[must_use]
    pub fn all_down(&self) -> bool {
        self.each.iter().all(|server| server.failures > 0)
    }

    /// When the first of them may be asked again.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.each.iter().map(|server| server.until).min().flatten()
    }

    /// It answered; whether it is the first to do so after all had failed.
    pub fn on_success(&mut self, server: usize) -> bool {
        let first = self.all_down();
        if let Some(server) = self.each.get_mut(server) {
            *server = Server::default();
        }
        first
    }

    /// It failed a question that was asked at `asked`. Questions that were under way together count once.
    pub fn on_failure(&mut self, server: usize, asked: Instant, now: Instant) {
        if let Some(server) = self.each.get_mut(server) {
            if server.failed.is_some_and(|failed| asked <= failed) {
                return;
            }
            let pause = FIRST * 2u32.saturating_pow(server.failures.min(8));
            server.failures = server.failures.saturating_add(1);
            server.failed = Some(now);
            server.until = Some(now + pause.min(LAST));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
    fn origin() -> Instant {
        Instant::now()
    }

    #[test]
    fn the_next_server_is_asked_when_one_fails_and_nobody_when_all_do() {
        let t0 = origin();
        let mut servers = Servers::new(2, 0);
        assert_eq!(servers.pick(t0), Some(0));
        servers.on_failure(0, t0, t0);
        assert_eq!(servers.pick(t0), Some(1));
        servers.on_failure(1, t0, t0);
        assert_eq!(servers.pick(t0), None);
        assert!(servers.all_down());
        let due = servers.next_due().unwrap();
        assert_eq!(due, t0 + FIRST);
        assert!(servers.pick(due).is_some() && servers.pick(due).is_some(), "each is asked once");
        assert_eq!(servers.pick(due), None);
        assert!(servers.on_success(1), "the first after all had failed");
        assert!(!servers.on_success(1));
        assert_eq!(servers.pick(t0), Some(1), "and it is stayed with");
    }

    #[test]
    fn a_thousand_questions_under_way_fail_as_one() {
        let t0 = origin();
        let mut servers = Servers::new(1, 0);
        for _ in 0..1000 {
            servers.on_failure(0, t0, t0);
        }
        assert_eq!(servers.next_due(), Some(t0 + FIRST));
        let mut now = t0;
        for _ in 0..20 {
            now = servers.next_due().unwrap();
            servers.on_failure(0, now, now);
        }
        assert_eq!(servers.next_due(), Some(now + LAST));
    }
}
