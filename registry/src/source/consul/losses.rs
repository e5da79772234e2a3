//! When services that have vanished are believed to be gone. A machine without IO.
//!
//! A catalog that loses a large part of itself within a minute was more likely restored, filtered, or asked of the wrong
//! place than emptied. Such a loss is held: everything stays until several answers in a row, from two servers where
//! there are two, say the same.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

/// Losses within this time count together.
const WINDOW: Duration = Duration::from_secs(60);
/// So many are always possible,
const LEAST: usize = 10;
/// and this part of what is known.
const SHARE: usize = 5;
/// So many answers in a row must say the same before a held loss is believed.
const ANSWERS: u32 = 3;

/// What has vanished lately.
#[derive(Debug, Clone, Default)]
pub struct Losses {
    vanished: BTreeMap<String, Instant>,
    /// Missing, and believed to be.
    confirmed: BTreeSet<String>,
    held: Option<Held>,
}

#[derive(Debug, Clone)]
struct Held {
    said: u64,
    answers: u32,
    servers: BTreeSet<usize>,
}

impl Losses {
    /// `server` listed exactly `names`; of `known` services these `missing` are not among them.
    pub fn on_list(
        &mut self,
        names: &BTreeSet<&str>,
        missing: &BTreeSet<String>,
        known: usize,
        (server, servers): (usize, usize),
        now: Instant,
    ) {
        let recent = |since: &Instant| now.saturating_duration_since(*since) < WINDOW;
        self.vanished
            .retain(|name, since| missing.contains(name) || recent(since) && !names.contains(name.as_str()));
        self.confirmed.retain(|name| missing.contains(name));
        for name in missing.difference(&self.confirmed) {
            self.vanished.entry(name.clone()).or_insert(now);
        }
        let said = digest(names);
        if let Some(held) = &mut self.held {
            if held.said == said {
                held.answers = held.answers.saturating_add(1);
                held.servers.insert(server);
            } else {
                *held = Held { said, answers: 1, servers: [server].into() };
            }
            let enough = held.answers >= ANSWERS && held.servers.len() >= servers.min(2);
            if missing.is_empty() || enough {
                self.held = None;
                self.vanished.clear();
                self.confirmed.clone_from(missing);
            }
            return;
        }
        let emptied = names.is_empty() && missing.len() > self.confirmed.len();
        if emptied || self.vanished.len() > LEAST.max(known / SHARE) {
            self.held = Some(Held { said, answers: 1, servers: [server].into() });
        }
    }

    /// Nothing may be removed now.
    #[must_use]
    pub fn held(&self) -> bool {
        self.held.is_some()
    }

    /// Services that have vanished lately.
    #[must_use]
    pub fn count(&self) -> usize {
        self.vanished.len()
    }
}

fn digest(names: &BTreeSet<&str>) -> u64 {
    let mut hasher = DefaultHasher::new();
    names.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
    fn origin() -> Instant {
        Instant::now()
    }

    /// `server` lists the services from `from` of 100; true when nothing may be removed now.
    fn list(losses: &mut Losses, from: usize, server: usize, now: Instant) -> bool {
        let all: Vec<String> = (0..100).map(|n| format!("s{n:03}")).collect();
        let names = all[from..].iter().map(String::as_str).collect();
        let missing = all[..from].iter().cloned().collect();
        losses.on_list(&names, &missing, 100, (server, 3), now);
        losses.held()
    }

    #[test]
    fn a_few_losses_pass_and_many_are_held_until_two_servers_have_said_the_same_three_times() {
        let t0 = origin();
        let mut losses = Losses::default();
        assert!(!list(&mut losses, 20, 0, t0));
        assert!(list(&mut losses, 21, 0, t0));
        assert!(list(&mut losses, 21, 0, t0));
        assert!(list(&mut losses, 21, 0, t0), "one server alone");
        assert!(!list(&mut losses, 21, 1, t0));
        assert!(!list(&mut losses, 21, 1, t0), "confirmed for good");
    }

    #[test]
    fn an_answer_that_differs_begins_anew_and_one_that_misses_nothing_ends_it() {
        let t0 = origin();
        let mut losses = Losses::default();
        assert!(list(&mut losses, 100, 0, t0), "an empty list");
        assert!(list(&mut losses, 100, 1, t0));
        assert!(list(&mut losses, 60, 2, t0));
        assert!(list(&mut losses, 60, 0, t0));
        assert!(!list(&mut losses, 0, 0, t0));
        assert_eq!(losses.count(), 0);
    }

    #[test]
    fn losses_over_a_longer_time_are_no_catastrophe() {
        let t0 = origin();
        let mut losses = Losses::default();
        let names = BTreeSet::from(["x"]);
        for n in 0..60 {
            let missing = BTreeSet::from([format!("s{n}")]);
            losses.on_list(&names, &missing, 20, (0, 1), t0 + Duration::from_secs(10 * n));
            assert!(!losses.held(), "{n}");
        }
        assert!(losses.count() <= 7);
    }

    #[test]
    fn even_a_small_catalog_that_becomes_empty_is_held() {
        let mut losses = Losses::default();
        losses.on_list(&BTreeSet::new(), &["web".to_owned()].into(), 1, (0, 1), origin());
        assert!(losses.held());
    }
}
