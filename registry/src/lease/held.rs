//! The lease of one workload.

use std::time::{Duration, Instant};

use super::Terms;
use crate::state::{Presence, Registration};

/// The agents among which losses are counted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    /// All.
    Mesh,
    /// Those of a group.
    Group(Group),
}

/// Namespace, and name of the `WorkloadGroup`; those who joined none are told apart by their service account.
pub(super) type Group = (String, Option<String>, String);

#[derive(Debug)]
pub(super) struct Lease {
    pub(super) session: String,
    pub(super) group: Group,
    /// When the next step is due.
    pub(super) due: Instant,
    pub(super) step: Step,
    /// When it was lost, if that counts among the losses of a window.
    lost: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Signs of life come; when due, it is lost.
    Alive,
    /// Lost, or given up; when due, the workload is removed.
    Silent,
    /// Lost with many others; when due, it is given up.
    Unknown,
}

impl Lease {
    /// The lease of what is registered, whose agent was lost `ago`.
    pub(super) fn of(registration: &Registration, terms: &Terms, ago: Duration, now: Instant) -> Self {
        let in_any_case = now + terms.lease;
        let left = |term: Duration| (now + term.saturating_sub(ago)).max(in_any_case);
        let lost = now.checked_sub(ago);
        let (step, due, lost) = match registration.presence {
            Presence::Heard => (Step::Alive, in_any_case, None),
            Presence::Silent => (Step::Silent, left(terms.remove_after), lost),
            Presence::Unknown => (Step::Unknown, left(terms.mass_loss.hold), lost),
            Presence::Released => (Step::Silent, left(terms.remove_after), None),
        };
        Self { session: registration.session.clone(), group: Self::group_of(registration), due, step, lost }
    }

    pub(super) fn group_of(registration: &Registration) -> Group {
        let Registration { namespace, group, service_account, .. } = registration;
        if group.is_empty() {
            (namespace.clone(), None, service_account.clone())
        } else {
            (namespace.clone(), Some(group.clone()), String::new())
        }
    }

    /// Its agent is heard.
    pub(super) fn renew(&mut self, term: Duration, now: Instant) {
        (self.step, self.due, self.lost) = (Step::Alive, now + term, None);
    }

    /// Its agent is lost; the workload is removed after `grace`.
    pub(super) fn lose(&mut self, grace: Duration, now: Instant) -> Presence {
        (self.step, self.due, self.lost) = (Step::Silent, now + grace, Some(now));
        Presence::Silent
    }

    /// It was lost with many others, and is held for this time since.
    pub(super) fn hold(&mut self, hold: Duration) -> Presence {
        self.step = Step::Unknown;
        if let Some(lost) = self.lost {
            self.due = lost + hold;
        }
        Presence::Unknown
    }

    /// It is held no longer; the workload is removed after `grace`. Who is given up is no new loss.
    pub(super) fn release(&mut self, grace: Duration, now: Instant) -> Presence {
        (self.step, self.due, self.lost) = (Step::Silent, now + grace, None);
        Presence::Released
    }

    pub(super) fn lost_within(&self, window: Duration, now: Instant) -> bool {
        self.lost.is_some_and(|lost| now.saturating_duration_since(lost) < window)
    }
}
