//! What an operator is told of a datacenter.

use std::time::{Duration, Instant};

use super::Datacenter;

/// Counts since the beginning.
#[derive(Debug, Clone, Default)]
pub(super) struct Totals {
    pub(super) questions: u64,
    pub(super) answers: u64,
    pub(super) failures: u64,
    pub(super) published: u64,
    pub(super) last_list: usize,
}

/// How a datacenter stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Everything that is in the datacenter was read at least once, and is published.
    pub synced: bool,
    /// How old what is known may be; zero while a question blocks at a server that answered the last one.
    pub age: Duration,
    /// Services that are watched.
    pub services: usize,
    /// Their endpoints.
    pub endpoints: usize,
    /// Questions under way.
    pub under_way: usize,
    /// Services that have vanished and are held until that is confirmed.
    pub held: usize,
    /// Nothing is removed, because the token does not allow to see everything.
    pub frozen: Option<String>,
    /// Why the last question failed, while questions fail.
    pub failure: Option<String>,
    /// Services and instances that have no place in the mesh, with the reason; the first of them.
    pub problems: Vec<String>,
    /// Questions so far.
    pub questions: u64,
    /// Questions that failed, or whose answers were refused.
    pub failures: u64,
    /// Changes of services that were published.
    pub published: u64,
}

/// Problems that are told.
const MOST_PROBLEMS: usize = 100;

impl Datacenter {
    /// How it stands at `now`.
    #[must_use]
    pub fn status(&self, now: Instant) -> Status {
        let known = self.services.values().filter_map(|watched| watched.wanted.as_ref());
        let unfit = self.unfit.iter().map(|(name, reason)| format!("{name}: {reason}"));
        let told = known.clone().flat_map(|converted| converted.problems.iter().cloned());
        let contradicted = self.services.iter().filter(|(_, w)| w.emptied.is_some() && w.vanished.is_none());
        let contradicted = contradicted
            .map(|(name, _)| format!("{name}: is listed, but without instances; its last ones stay"));
        let away = self.servers.all_down() || self.list.failures() > 0;
        let since = self.list.heard().or(self.away);
        let behind = away || !self.listed;
        Status {
            synced: self.listed
                && self.services.values().all(|watched| watched.fetched)
                && self.publishing.waiting() == 0,
            age: since
                .filter(|_| behind)
                .map(|since| now.saturating_duration_since(since))
                .unwrap_or_default(),
            services: self.services.len(),
            endpoints: known.map(|converted| converted.endpoints.len()).sum(),
            under_way: self.asked.len(),
            held: if self.losses.held() { self.losses.count() } else { 0 },
            frozen: self.forbidden.values().next().cloned(),
            failure: self.last_failure.clone().filter(|_| away),
            problems: unfit.chain(contradicted).chain(told).take(MOST_PROBLEMS).collect(),
            questions: self.totals.questions,
            failures: self.totals.failures,
            published: self.totals.published,
        }
    }

    /// Blocking questions, and all questions, that are under way.
    #[must_use]
    pub fn under_way(&self) -> (usize, usize) {
        (self.blocking, self.asked.len())
    }

    /// Answers that were read.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.totals.answers
    }

    /// When the list of services was believed last.
    #[must_use]
    pub fn heard(&self) -> Option<Instant> {
        self.list.heard()
    }
}
