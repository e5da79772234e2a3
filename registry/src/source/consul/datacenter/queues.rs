//! Questions that wait for their time or for room.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::Target;

/// One queue for each kind of question, for their bounds differ.
#[derive(Debug, Default)]
pub(super) struct Queues {
    /// When the list of services is due, if it is not being asked.
    pub(super) list: Option<Instant>,
    /// Services to be asked for at once.
    pub(super) fetch: BTreeSet<(Instant, String)>,
    /// Services to be watched.
    pub(super) watch: BTreeSet<(Instant, String)>,
    /// Where each service stands.
    places: BTreeMap<String, Place>,
    list_busy: bool,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Fetch(Instant),
    Watch(Instant),
    Busy,
}

impl Queues {
    /// Only the list is due.
    pub(super) fn starting(now: Instant) -> Self {
        Self { list: Some(now), ..Self::default() }
    }

    /// What is due: the list first, then what waited longest and has room.
    pub(super) fn next(&self, now: Instant, fetch: bool, watch: bool) -> Option<Target> {
        if self.list.is_some_and(|due| due <= now) {
            return Some(Target::Services);
        }
        let first = |queue: &BTreeSet<(Instant, String)>, room: bool| {
            queue.first().filter(|(due, _)| room && *due <= now).cloned()
        };
        let next = first(&self.fetch, fetch).into_iter().chain(first(&self.watch, watch)).min();
        next.map(|(_, name)| Target::Instances(name))
    }

    /// Takes a question out of its queue.
    pub(super) fn remove(&mut self, target: &Target) {
        let Target::Instances(name) = target else {
            self.list = None;
            return;
        };
        match self.places.get(name).copied() {
            Some(Place::Fetch(due)) => drop(self.fetch.remove(&(due, name.clone()))),
            Some(Place::Watch(due)) => drop(self.watch.remove(&(due, name.clone()))),
            Some(Place::Busy) | None => return,
        }
        self.places.remove(name);
    }

    /// Puts a question into its queue, unless it is being asked.
    pub(super) fn insert(&mut self, target: &Target, due: Instant, blocks: bool) {
        let Target::Instances(name) = target else {
            self.list = (!self.list_busy).then_some(due);
            return;
        };
        if self.places.contains_key(name) {
            return;
        }
        let (queue, place) = match blocks {
            true => (&mut self.watch, Place::Watch(due)),
            false => (&mut self.fetch, Place::Fetch(due)),
        };
        queue.insert((due, name.clone()));
        self.places.insert(name.clone(), place);
    }

    /// A question is being asked now, or is so no more.
    pub(super) fn busy(&mut self, target: &Target, busy: bool) {
        match (target, busy) {
            (Target::Services, _) => self.list_busy = busy,
            (Target::Instances(name), true) => drop(self.places.insert(name.clone(), Place::Busy)),
            (Target::Instances(name), false) => drop(self.places.remove(name)),
        }
    }
}
