//! Which registered workloads have gone silent, and which of them are believed to be gone.
//!
//! Signs of life stay in the memory of the member that holds the agent's stream; only what follows from their absence
//! becomes a command: first the workload is sent no traffic, and after a grace it is removed. Where many are lost at the
//! same time, a torn network is likelier than so many dead machines: they are held as unknown, and everything stays as it
//! was, until they are heard, an operator gives them up, or too much time has passed. Every command is fenced by the
//! session it is about, so that a workload which came back elsewhere is not touched.
//!
//! Who was lost, and when, is in the state: the leases of a new leader go on from there ([`Leases::follow`]).

mod held;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::held::{Lease, Scope, Step};
use crate::state::{Command, Presence, Registration, WorkloadKey};

/// What becomes of workloads whose agents are silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// A workload whose agent was not heard for so long is sent no traffic.
    pub lease: Duration,
    /// After this time more it is removed.
    pub remove_after: Duration,
    /// When so many are lost that they are held instead.
    pub mass_loss: MassLoss,
}

/// When so many agents are lost at the same time that their workloads are held as unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MassLoss {
    /// More than this share of the agents of a group, or of the mesh, in percent; 100 holds none.
    pub share: u8,
    /// Within this time, or within a lease where that is longer: agents that are lost together fall silent one by one.
    pub window: Duration,
    /// And at least so many.
    pub least: usize,
    /// They are held for so long.
    pub hold: Duration,
}

/// The leases of all registered workloads. A machine without IO: time is an argument.
#[derive(Debug)]
pub struct Leases {
    terms: Terms,
    leases: BTreeMap<WorkloadKey, Lease>,
}

/// How many workloads are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Their agents are heard.
    pub heard: usize,
    /// Their agents are silent, and not held.
    pub silent: usize,
    /// Lost with many others, and held.
    pub unknown: usize,
}

impl Leases {
    /// No leases.
    #[must_use]
    pub fn new(terms: Terms) -> Self {
        Self { terms, leases: BTreeMap::new() }
    }

    /// Takes over what is registered: a lease for each workload that has none for its session, and none for those that are
    /// not registered any more. `since` tells how long ago a time in milliseconds since 1970 was.
    ///
    /// Whose agent is heard has a fresh lease: who was not heard yet is not known to be silent. For whom it is not, time goes
    /// on where it was, but nobody is given up before a lease has passed in which it could have been heard. Between two calls
    /// what [`due`](Self::due) told must be in the state.
    pub fn follow<'a>(
        &mut self,
        registered: impl Iterator<Item = (&'a WorkloadKey, &'a Arc<Registration>)>,
        since: impl Fn(i64) -> Duration,
        now: Instant,
    ) {
        let mut before = std::mem::take(&mut self.leases);
        for (key, registration) in registered {
            let kept = before.remove(key).filter(|lease| lease.session == registration.session);
            let mut lease = kept
                .unwrap_or_else(|| Lease::of(registration, &self.terms, since(registration.lost_ms), now));
            lease.group = Lease::group_of(registration);
            if lease.step != Step::Alive && registration.presence == Presence::Heard {
                // Another member heard it, and has not told so yet.
                lease.renew(self.terms.lease, now);
            } else if lease.step == Step::Unknown && registration.presence == Presence::Released {
                lease.release(self.terms.remove_after, now);
            }
            self.leases.insert(key.clone(), lease);
        }
    }

    /// A sign of life of `session`; whether it has a lease.
    pub fn renew(&mut self, key: &WorkloadKey, session: &str, now: Instant) -> bool {
        let Some(lease) = self.leases.get_mut(key).filter(|lease| lease.session == session) else {
            return false;
        };
        lease.renew(self.terms.lease, now);
        true
    }

    /// The agent of `session` said good-bye: nothing more is due for it.
    pub fn release(&mut self, key: &WorkloadKey, session: &str) {
        if self.leases.get(key).is_some_and(|lease| lease.session == session) {
            self.leases.remove(key);
        }
    }

    /// What is due at `now`, in the order of the keys.
    pub fn due(&mut self, now: Instant) -> Vec<Command> {
        let Terms { remove_after, mass_loss, .. } = self.terms;
        let mut told: BTreeMap<WorkloadKey, Option<Presence>> = BTreeMap::new();
        for (key, lease) in self.leases.iter_mut().filter(|(_, lease)| lease.due <= now) {
            let next = match lease.step {
                Step::Alive => Some(lease.lose(remove_after, now)),
                Step::Unknown => Some(lease.release(remove_after, now)),
                Step::Silent => None,
            };
            told.insert(key.clone(), next);
        }
        if told.values().any(|next| *next == Some(Presence::Silent)) {
            let scopes = self.mass_losses(now);
            let window = self.window();
            let lost = |lease: &Lease| lease.step == Step::Silent && lease.lost_within(window, now);
            for (key, lease) in self.leases.iter_mut().filter(|(_, lease)| lost(lease)) {
                if scopes.contains(&Scope::Mesh) || scopes.contains(&Scope::Group(lease.group.clone())) {
                    told.insert(key.clone(), Some(lease.hold(mass_loss.hold)));
                }
            }
        }
        let mut commands = Vec::with_capacity(told.len());
        for (key, next) in told {
            let Some(session) = self.leases.get(&key).map(|lease| lease.session.clone()) else { continue };
            match next {
                Some(presence) => commands.push(Command::WorkloadPresence { key, session, presence }),
                None => {
                    self.leases.remove(&key);
                    commands.push(Command::RemoveWorkload { key, session });
                }
            }
        }
        commands
    }

    /// Where so many were lost that they are held.
    fn mass_losses(&self, now: Instant) -> BTreeSet<Scope> {
        let window = self.window();
        // Of each scope: lost within the window, and these with those who are heard.
        let mut counts: BTreeMap<Scope, (usize, usize)> = BTreeMap::new();
        for lease in self.leases.values() {
            let lost = usize::from(lease.lost_within(window, now));
            if lost == 1 || lease.step == Step::Alive {
                for scope in [Scope::Mesh, Scope::Group(lease.group.clone())] {
                    let count = counts.entry(scope).or_default();
                    *count = (count.0 + lost, count.1 + 1);
                }
            }
        }
        let MassLoss { share, least, .. } = self.terms.mass_loss;
        let many = |(lost, all): (usize, usize)| lost >= least && lost * 100 > all * usize::from(share);
        counts.into_iter().filter(|(_, count)| many(*count)).map(|(scope, _)| scope).collect()
    }

    fn window(&self) -> Duration {
        self.terms.mass_loss.window.max(self.terms.lease)
    }

    /// When [`due`](Self::due) has something to say next.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.due).min()
    }

    /// How many workloads are in which state.
    #[must_use]
    pub fn count(&self) -> Count {
        let mut count = Count::default();
        for lease in self.leases.values() {
            match lease.step {
                Step::Alive => count.heard += 1,
                Step::Silent => count.silent += 1,
                Step::Unknown => count.unknown += 1,
            }
        }
        count
    }
}

#[cfg(test)]
#[path = "lease/tests.rs"]
mod tests;
