//! What is known of one service.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::convert::Converted;
use super::super::poll::Poll;
use crate::model::service::{Hostname, Service};
use crate::source::Catalog;

/// A service that is watched.
#[derive(Debug)]
pub(super) struct Watched {
    /// The question for its instances.
    pub(super) poll: Poll,
    /// The hosts it has in the mesh.
    pub(super) hosts: Vec<Hostname>,
    /// It was asked for at least once.
    pub(super) fetched: bool,
    /// What it should be in the mesh; `None` while that is not known, and when it should not be there.
    pub(super) wanted: Option<Arc<Converted>>,
    /// What was published of it; `None` while only the state knows.
    pub(super) published: Option<Option<Arc<Converted>>>,
    /// The list lacks it since then.
    pub(super) vanished: Option<Instant>,
    /// The leader knows no instance of it since then.
    pub(super) emptied: Option<Instant>,
    /// It has lost its endpoints, because it is gone.
    pub(super) drained: bool,
    /// It is to be forgotten when that is published.
    pub(super) removed: bool,
    seeded: Option<Service>,
}

impl Watched {
    /// A service of which the state holds `seeded`.
    pub(super) fn new(
        poll: Poll,
        hosts: Vec<Hostname>,
        seeded: Option<Service>,
        vanished: Option<Instant>,
    ) -> Self {
        Self {
            poll,
            hosts,
            fetched: false,
            wanted: None,
            published: None,
            vanished,
            emptied: None,
            drained: false,
            removed: false,
            seeded,
        }
    }

    /// What it was before, for its ports.
    pub(super) fn previous(&self) -> Option<&Service> {
        self.wanted.as_ref().map(|converted| &converted.service).or(self.seeded.as_ref())
    }

    /// The mesh sends, or may send, traffic to instances of it.
    pub(super) fn has_endpoints(&self, seed: &Catalog) -> bool {
        match (&self.wanted, self.fetched) {
            (Some(wanted), _) => !wanted.endpoints.is_empty(),
            (None, true) => false,
            (None, false) => {
                self.hosts.iter().any(|host| seed.endpoints.get(host).is_some_and(|all| !all.is_empty()))
            }
        }
    }

    /// Takes over what so many instances make of it; whether that is to be published.
    pub(super) fn take_over(&mut self, converted: Converted, instances: usize) -> bool {
        // One without instances that never was in the mesh does not come into it: entries of others have gone.
        let never_ours = converted.skipped > 0 || instances == 0 && self.previous().is_none();
        let absent = converted.endpoints.is_empty() && never_ours && converted.problems.is_empty();
        let wanted = (!absent).then(|| Arc::new(converted));
        let differs = self.wanted != wanted || self.published.is_none();
        self.wanted = wanted;
        differs
    }

    /// It has instances.
    pub(super) fn came_back(&mut self) {
        self.emptied = None;
        self.drained = false;
        self.removed = false;
    }

    /// When the next step of its loss is due: neither the list nor its own question know it any more.
    pub(super) fn loss_due(&self, settle: Duration, grace: Duration) -> Option<Instant> {
        let vanished = self.vanished?;
        let known_empty =
            self.fetched && self.wanted.as_ref().is_none_or(|wanted| wanted.endpoints.is_empty());
        let emptied = if known_empty { Some(vanished) } else { self.emptied };
        match (self.drained, self.removed) {
            (_, true) => None,
            (true, false) => Some(vanished + grace),
            (false, false) => emptied.map(|emptied| emptied.max(vanished) + settle),
        }
    }
}
