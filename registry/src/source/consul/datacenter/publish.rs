//! From what services should be to commands, a batch at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::convert::Converted;
use super::Datacenter;
use crate::model::service::{Hostname, Service, SourceId};
use crate::source::{Catalog, diff};
use crate::state::Command;

/// Changes that come within this time are published together.
const QUIET: Duration = Duration::from_millis(30);
/// What could not be published is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);
/// Endpoints of one batch, more or less: an entry of the log stays small.
const BATCH: usize = 2_000;
/// A host without endpoints counts as much as so many.
const HOST: usize = 4;

/// What is to be published, and what is being.
#[derive(Debug, Default)]
pub(super) struct Publishing {
    dirty: BTreeSet<String>,
    due: Option<Instant>,
    outstanding: Option<Vec<(String, Option<Arc<Converted>>)>>,
}

impl Publishing {
    /// A service differs from what was published of it.
    pub(super) fn dirty(&mut self, name: &str, now: Instant) {
        self.dirty.insert(name.to_owned());
        self.due.get_or_insert(now + QUIET);
    }

    /// When something is to be published, if nothing is being.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.filter(|_| self.outstanding.is_none() && !self.dirty.is_empty())
    }

    /// Services that wait.
    pub(super) fn waiting(&self) -> usize {
        self.dirty.len() + self.outstanding.as_ref().map_or(0, Vec::len)
    }
}

impl Datacenter {
    /// The next batch, when it is time.
    pub(super) fn flush(&mut self, now: Instant) -> Vec<Command> {
        let mut commands = Vec::new();
        while commands.is_empty() && self.publishing.due().is_some_and(|due| due <= now) {
            let mut batch = Vec::new();
            let mut size = 0;
            while size < BATCH
                && let Some(name) = self.publishing.dirty.pop_first()
            {
                let (changes, wanted) = self.changes(&name);
                if !changes.is_empty() {
                    let hosts = self.settings.mapping.hosts(&name).map_or(1, |hosts| hosts.len());
                    let endpoints = wanted.as_ref().map_or(0, |wanted| wanted.endpoints.len());
                    size += hosts * (endpoints + HOST);
                }
                commands.extend(changes);
                batch.push((name, wanted));
            }
            if self.publishing.dirty.is_empty() {
                self.publishing.due = None;
            }
            self.publishing.outstanding = Some(batch);
            if commands.is_empty() {
                // The state has it already.
                self.published(true, now);
            }
        }
        commands
    }

    /// What leads from what was published of a service to what it should be.
    fn changes(&self, name: &str) -> (Vec<Command>, Option<Arc<Converted>>) {
        let Some(watched) = self.services.get(name) else { return (Vec::new(), None) };
        let source = self.settings.mapping.source();
        let mut commands = Vec::new();
        for host in &watched.hosts {
            let before = match &watched.published {
                Some(published) => catalog(host, &source, published.as_deref()),
                None => Catalog {
                    services: one(host, self.seed.services.get(host)),
                    endpoints: one(host, self.seed.endpoints.get(host)),
                },
            };
            commands.extend(diff(&source, &before, &catalog(host, &source, watched.wanted.as_deref())));
        }
        (commands, watched.wanted.clone())
    }

    /// The outstanding batch is in the state, or is to be tried again.
    pub(super) fn published(&mut self, done: bool, now: Instant) {
        for (name, wanted) in self.publishing.outstanding.take().unwrap_or_default() {
            let Some(watched) = self.services.get_mut(&name) else { continue };
            if !done {
                self.publishing.dirty.insert(name);
                self.publishing.due = Some(now + RETRY);
                continue;
            }
            for host in &watched.hosts {
                self.seed.services.remove(host);
                self.seed.endpoints.remove(host);
            }
            watched.published = Some(wanted);
            self.totals.published += 1;
            if watched.removed {
                self.forget(&name);
            }
        }
        if done && !self.publishing.dirty.is_empty() {
            self.publishing.due.get_or_insert(now);
        }
    }
}

fn one<T: Clone>(host: &Hostname, value: Option<&T>) -> BTreeMap<Hostname, T> {
    value.map(|value| (host.clone(), value.clone())).into_iter().collect()
}

fn catalog(host: &Hostname, source: &SourceId, converted: Option<&Converted>) -> Catalog {
    let service = converted.map(|converted| Service {
        hostname: host.clone(),
        source: source.clone(),
        ..converted.service.clone()
    });
    Catalog {
        services: one(host, service.as_ref()),
        endpoints: one(host, converted.map(|converted| &converted.endpoints)),
    }
}
