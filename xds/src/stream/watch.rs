//! One type of one stream: what the client asked for, what it has, and what is on its way to it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::Xxh3;

use super::held::Held;
use super::report::{Nack, Sync, TypeReport};
use super::{Response, Variant};
use crate::cache::{Map, View};
use crate::resources::{Resource, Type};

/// What a client asked for.
#[derive(Debug, Default)]
pub(super) struct Subscription {
    /// Everything of the type (`*`, or an empty first request for listeners and clusters).
    pub(super) wildcard: bool,
    /// These, also when there is no wildcard.
    pub(super) names: BTreeSet<String>,
}

impl Subscription {
    pub(super) fn covers(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }
}

/// A response that the client has not answered yet.
#[derive(Debug)]
struct Outstanding {
    nonce: String,
    revision: u64,
    changed: Vec<Arc<Resource>>,
    removed: Vec<String>,
    sent_at: Instant,
}

/// What the client should be told next, were it allowed.
#[derive(Debug, Default)]
pub(super) struct Diff {
    /// New or changed resources, and those the client asked for again.
    pub(super) changed: Vec<Arc<Resource>>,
    /// What the client has and should not have.
    pub(super) removed: Vec<String>,
    /// What the client asked for and does not exist.
    absent: Vec<String>,
    /// Among `changed` is a resource of which the client has no version at all.
    pub(super) missing: bool,
    /// The client rejected something that it should have.
    pub(super) blocked: bool,
    /// There are resources that the client did not ask for (yet).
    pub(super) unsubscribed: bool,
}

impl Diff {
    fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty() && self.absent.is_empty()
    }
}

/// What a step may do, as the other types allow it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gate {
    pub(super) send: bool,
    pub(super) remove: bool,
}

/// What a step did.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing to do, or not allowed to.
    Nothing,
    /// Only the record of the client changed.
    Silent,
    /// A response is to be sent.
    Send(Response),
}

/// What became of a response.
#[derive(Debug)]
pub(super) enum Verdict {
    Accepted { revision: u64, took: Duration },
    Rejected(Nack),
}

#[derive(Debug)]
pub(super) struct Watch {
    t: Type,
    pub(super) sub: Subscription,
    pub(super) held: Held,
    /// Names that the client is owed an answer about, even if it seems to have them.
    pub(super) owed: BTreeSet<String>,
    /// Names of which the client may have the version that `held` says or a later one that was part of a
    /// response that it rejected. They are sent until it accepts them.
    doubtful: BTreeSet<String>,
    /// An answer is owed even if there is nothing to say.
    pub(super) reply_owed: bool,
    /// State of the world: the version that the client has from an earlier stream.
    pub(super) claimed: Option<String>,
    /// What the client rejected: name and version, or none for a removal.
    refused: BTreeMap<String, Option<u64>>,
    /// Resources of responses that were rejected without naming one: each group is tried alone, then halved.
    suspects: Vec<BTreeSet<String>>,
    outstanding: Option<Outstanding>,
    sent: Option<(String, u64)>,
    acked_nonce: Option<String>,
    acked_revision: Option<u64>,
    nack: Option<Nack>,
    /// When the client last said something that may be followed by subscriptions to what it names.
    pub(super) heard_at: Instant,
    diff: Diff,
    diff_of: Option<Map>,
}

impl Watch {
    pub(super) fn new(t: Type, now: Instant) -> Self {
        Self {
            t,
            sub: Subscription::default(),
            held: Held::default(),
            owed: BTreeSet::new(),
            doubtful: BTreeSet::new(),
            reply_owed: false,
            claimed: None,
            refused: BTreeMap::new(),
            suspects: Vec::new(),
            outstanding: None,
            sent: None,
            acked_nonce: None,
            acked_revision: None,
            nack: None,
            heard_at: now,
            diff: Diff::default(),
            diff_of: None,
        }
    }

    /// The client (again) asks for `name`: it is owed an answer, whatever we believe it has.
    pub(super) fn subscribe(&mut self, name: &str) {
        self.sub.names.insert(name.to_owned());
        self.owed.insert(name.to_owned());
        self.refused.remove(name);
        self.touch();
    }

    /// The client forgets `name`, unless it has it through the wildcard; then it is told what holds now.
    pub(super) fn unsubscribe(&mut self, name: &str) {
        self.sub.names.remove(name);
        if self.sub.wildcard {
            self.owed.insert(name.to_owned());
        } else {
            self.owed.remove(name);
            self.forget(name);
        }
        self.touch();
    }

    /// The client does not have `name`.
    fn forget(&mut self, name: &str) {
        self.refused.remove(name);
        self.doubtful.remove(name);
        self.held.remove(name);
    }

    /// What the client asks for is now this, and all else is forgotten.
    pub(super) fn replace_subscription(&mut self, sub: Subscription) {
        self.sub = sub;
        let sub = &self.sub;
        self.held.retain(|name| sub.covers(name));
        self.refused.retain(|name, _| sub.covers(name));
        self.doubtful.retain(|name| sub.covers(name));
        self.touch();
    }

    /// The cached difference is no longer true.
    pub(super) fn touch(&mut self) {
        self.diff_of = None;
    }

    /// The nonce of the last response sent.
    pub(super) fn last_nonce(&self) -> Option<&str> {
        self.sent.as_ref().map(|(nonce, _)| nonce.as_str())
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.outstanding.is_some()
    }

    /// Whether there is a resource of which the client has no version, on its way or not.
    ///
    /// What is on its way still differs from what the client has, so the difference tells both.
    pub(super) fn lacks_new(&self) -> bool {
        self.diff.missing
    }

    /// Whether the client has all that it asked for and nothing else.
    pub(super) fn is_clean(&self) -> bool {
        self.outstanding.is_none() && !self.reply_owed && self.diff.is_empty() && !self.diff.blocked
    }

    /// The difference between what the client has and what it should have, as of the last [`Self::refresh`].
    pub(super) fn diff(&self) -> &Diff {
        &self.diff
    }

    /// Brings the difference up to date with `wanted`.
    pub(super) fn refresh(&mut self, wanted: &Map) {
        if self.diff_of.as_ref().is_some_and(|map| Arc::ptr_eq(map, wanted)) {
            return;
        }
        self.diff = self.compare(wanted);
        let whole = self.diff.is_empty() && !self.diff.blocked && !self.diff.unsubscribed;
        if whole && !self.held.is(wanted) {
            self.held.settle(wanted);
        }
        self.diff_of = Some(wanted.clone());
    }

    fn compare(&self, wanted: &Map) -> Diff {
        let mut diff = Diff::default();
        // Who asks for a few of many is looked up by what it asks for.
        let few = !self.sub.wildcard && !self.held.is_shared();
        let mut names = if few { self.held.names().collect() } else { self.held.may_differ(wanted) };
        let asked = few.then_some(&self.sub.names).into_iter().flatten();
        names.extend(asked.chain(&self.owed).chain(&self.doubtful).map(String::as_str));
        let (mut covered, mut uncovered) = (0, 0);
        for name in names {
            match wanted.get(name) {
                Some(resource) if self.sub.covers(name) => {
                    covered += 1;
                    self.compare_one(resource, &mut diff);
                }
                Some(_) => uncovered += 1,
                None => self.compare_gone(name, &mut diff),
            }
        }
        // What the client has is covered, so where it is walked, none of what is passed over is left unasked for.
        diff.unsubscribed = if few { covered < wanted.len() } else { uncovered > 0 };
        diff
    }

    fn compare_one(&self, resource: &Arc<Resource>, diff: &mut Diff) {
        let held = self.held.version(&resource.name);
        let certain = !self.owed.contains(&resource.name) && !self.doubtful.contains(&resource.name);
        if held == Some(resource.version) && certain {
            return;
        }
        if self.refused.get(&resource.name) == Some(&Some(resource.version)) {
            diff.blocked = true;
            return;
        }
        diff.missing |= held.is_none();
        diff.changed.push(resource.clone());
    }

    fn compare_gone(&self, name: &str, diff: &mut Diff) {
        let had = self.held.version(name).is_some() || self.doubtful.contains(name);
        match self.refused.get(name) {
            Some(None) if had => diff.blocked = true,
            Some(_) | None if had => diff.removed.push(name.to_owned()),
            Some(_) | None if self.owed.contains(name) => diff.absent.push(name.to_owned()),
            Some(_) | None => {}
        }
    }

    /// Sends what is due, if the gate allows it and nothing is on its way.
    pub(super) fn step(
        &mut self,
        variant: Variant,
        view: &View,
        gate: Gate,
        nonce: u64,
        now: Instant,
    ) -> Step {
        if self.outstanding.is_some() {
            return Step::Nothing;
        }
        if self.has_claimed(view.of(self.t)) {
            return Step::Silent;
        }
        if !gate.send {
            return Step::Nothing;
        }
        let changed = self.due();
        let removed =
            if gate.remove && self.suspects.is_empty() { self.diff.removed.clone() } else { Vec::new() };
        match variant {
            Variant::Delta => self.delta(view.revision(), changed, removed, nonce, now),
            Variant::StateOfTheWorld => self.whole(view.revision(), changed, removed, nonce, now),
        }
    }

    fn delta(
        &mut self,
        revision: u64,
        changed: Vec<Arc<Resource>>,
        removed: Vec<String>,
        nonce: u64,
        now: Instant,
    ) -> Step {
        let absent = std::mem::take(&mut self.diff.absent);
        if changed.is_empty() && removed.is_empty() && absent.is_empty() && !self.reply_owed {
            return Step::Nothing;
        }
        for name in &absent {
            self.owed.remove(name);
        }
        let response = Response {
            type_url: self.t.url().to_owned(),
            nonce: nonce_text(revision, nonce),
            revision,
            version: revision.to_string(),
            resources: changed.clone(),
            removed: removed.iter().cloned().chain(absent).collect(),
        };
        self.sent(&response, changed, removed, now);
        Step::Send(response)
    }

    fn whole(
        &mut self,
        revision: u64,
        changed: Vec<Arc<Resource>>,
        removed: Vec<String>,
        nonce: u64,
        now: Instant,
    ) -> Step {
        if !is_whole(self.t) && !removed.is_empty() {
            // The protocol has no words for it: the client drops such a resource with what named it.
            removed.iter().for_each(|name| self.forget(name));
            self.touch();
            return Step::Silent;
        }
        let told_nothing = self.forget_absent();
        if changed.is_empty() && removed.is_empty() && !self.reply_owed {
            return if told_nothing { Step::Silent } else { Step::Nothing };
        }
        let mut content = self.held.resources();
        removed.iter().for_each(|name| _ = content.remove(name.as_str()));
        content.extend(changed.iter().map(|resource| (resource.name.as_str(), resource)));
        if content.is_empty() && removed.is_empty() && !self.sub.wildcard {
            self.reply_owed = false;
            return Step::Silent;
        }
        let resources: Vec<Arc<Resource>> = content.into_values().cloned().collect();
        let response = Response {
            type_url: self.t.url().to_owned(),
            nonce: nonce_text(revision, nonce),
            revision,
            version: content_version(&resources),
            resources,
            removed: Vec::new(),
        };
        self.sent(&response, changed, removed, now);
        Step::Send(response)
    }

    /// State of the world: what does not exist is not mentioned. Says whether the record changed.
    fn forget_absent(&mut self) -> bool {
        let absent = std::mem::take(&mut self.diff.absent);
        for name in &absent {
            self.owed.remove(name);
        }
        self.touch();
        !absent.is_empty()
    }

    fn sent(
        &mut self,
        response: &Response,
        changed: Vec<Arc<Resource>>,
        removed: Vec<String>,
        sent_at: Instant,
    ) {
        for resource in &changed {
            self.owed.remove(&resource.name);
        }
        self.reply_owed = false;
        self.sent = Some((response.nonce.clone(), response.revision));
        let (nonce, revision) = (response.nonce.clone(), response.revision);
        self.outstanding = Some(Outstanding { nonce, revision, changed, removed, sent_at });
        self.touch();
    }

    /// The changed resources to send now: all of them, or of the first group of suspects those that still differ.
    fn due(&mut self) -> Vec<Arc<Resource>> {
        while let Some(group) = self.suspects.last() {
            let some: Vec<_> =
                self.diff.changed.iter().filter(|r| group.contains(&r.name)).cloned().collect();
            if !some.is_empty() {
                return some;
            }
            self.suspects.pop();
        }
        self.diff.changed.clone()
    }

    /// State of the world: the client has exactly this content from an earlier stream.
    fn has_claimed(&mut self, wanted: &Map) -> bool {
        let Some(claim) = self.claimed.take() else {
            return false;
        };
        let covered = wanted.values().filter(|resource| self.sub.covers(&resource.name));
        let content: Vec<_> = covered.cloned().collect();
        if content_version(&content) != claim {
            return false;
        }
        content.iter().for_each(|resource| self.held.accept(resource));
        self.reply_owed = false;
        self.touch();
        true
    }

    /// The client answers the response with this nonce; stale nonces say nothing.
    pub(super) fn answer(&mut self, nonce: &str, error: Option<&str>, now: Instant) -> Option<Verdict> {
        let out = self.outstanding.take_if(|out| out.nonce == nonce)?;
        self.heard_at = now;
        self.touch();
        match error {
            None => {
                self.accept(&out);
                let took = now.saturating_duration_since(out.sent_at);
                self.acked_nonce = Some(out.nonce);
                Some(Verdict::Accepted { revision: out.revision, took })
            }
            Some(message) => Some(Verdict::Rejected(self.reject(out, message))),
        }
    }

    fn accept(&mut self, out: &Outstanding) {
        for resource in out.changed.iter().filter(|resource| self.sub.covers(&resource.name)) {
            self.held.accept(resource);
            self.refused.remove(&resource.name);
            self.doubtful.remove(&resource.name);
        }
        for name in &out.removed {
            self.forget(name);
        }
    }

    /// Remembers what was rejected, so that it is sent again only when it has changed.
    ///
    /// The client may have taken the rest of the response or not, so whatever is not named is in doubt: it is
    /// sent once more, without the bad ones. A rejection that names nothing is narrowed down by halves.
    fn reject(&mut self, out: Outstanding, message: &str) -> Nack {
        let versions = out.changed.iter().map(|r| (r.name.as_str(), Some(r.version)));
        let all: Vec<_> = versions.chain(out.removed.iter().map(|name| (name.as_str(), None))).collect();
        let mut named: Vec<_> = all.iter().copied().filter(|(name, _)| mentions(message, name)).collect();
        if named.is_empty() && (out.changed.len() <= 1) {
            named.clone_from(&all);
        }
        if named.is_empty() {
            self.suspects.pop();
            let (left, right) = out.changed.split_at(out.changed.len() / 2);
            let group = |half: &[Arc<Resource>]| half.iter().map(|r| r.name.clone()).collect();
            self.suspects.extend([group(right), group(left)]);
        }
        for (name, version) in &named {
            self.refused.insert((*name).to_owned(), *version);
        }
        let blameless = all.iter().filter(|(name, _)| !named.iter().any(|(other, _)| other == name));
        self.doubtful.extend(blameless.map(|(name, _)| (*name).to_owned()));
        let blamed = if named.is_empty() { &all } else { &named };
        let resources = blamed.iter().map(|(name, _)| (*name).to_owned()).collect();
        let message = message.to_owned();
        let nack = Nack { type_: self.t, nonce: out.nonce, revision: out.revision, message, resources };
        self.nack = Some(nack.clone());
        nack
    }

    /// The client is known to have everything of this type at `revision`.
    pub(super) fn settled(&mut self, revision: u64) {
        self.acked_revision = Some(revision);
    }

    pub(super) fn report(&self) -> TypeReport {
        let doubtful = self.diff.blocked || !self.suspects.is_empty();
        let resources = self.held.len();
        let sync = if self.diff.blocked {
            Sync::Nacked
        } else if self.is_clean() {
            Sync::Synced
        } else if self.sent.is_none() && resources == 0 {
            Sync::NotSent
        } else {
            Sync::Stale
        };
        TypeReport {
            sync,
            sent_nonce: self.sent.as_ref().map(|(nonce, _)| nonce.clone()),
            sent_revision: self.sent.as_ref().map(|(_, revision)| *revision),
            acked_nonce: self.acked_nonce.clone(),
            acked_revision: self.acked_revision,
            nack: self.nack.clone().filter(|_| doubtful),
            resources,
        }
    }

    /// What the client has, as far as its content is known.
    pub(super) fn resources(&self) -> BTreeMap<&str, &Arc<Resource>> {
        self.held.resources()
    }
}

/// Types of which a state-of-the-world response is everything, so that leaving one out removes it.
pub(super) fn is_whole(t: Type) -> bool {
    matches!(t, Type::Cluster | Type::Listener)
}

/// The nonce of a response: the revision it was made from, and its number on the stream.
pub(super) fn nonce_text(revision: u64, number: u64) -> String {
    format!("{revision}-{number}")
}

/// The version of a state-of-the-world response: a hash of its content, equal on every member.
fn content_version(resources: &[Arc<Resource>]) -> String {
    let mut hash = Xxh3::new();
    for resource in resources {
        hash.update(resource.name.as_bytes());
        hash.update(&[0]);
        hash.update(&resource.version.to_le_bytes());
    }
    format!("{:016x}", hash.digest())
}

/// Whether `text` has `name` as a word of its own.
fn mentions(text: &str, name: &str) -> bool {
    let part_of_a_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '|' | '-' | '*');
    !name.is_empty()
        && text.match_indices(name).any(|(at, _)| {
            let before = text.get(..at).and_then(|t| t.chars().next_back());
            let mut after = text.get(at + name.len()..).unwrap_or_default().chars();
            let next = after.next();
            // A full stop ends a sentence; a stop with more behind it is inside a name.
            let goes_on = next == Some('.') && after.next().is_some_and(part_of_a_name);
            !before.is_some_and(|c| part_of_a_name(c) || c == '.')
                && !next.is_some_and(part_of_a_name)
                && !goes_on
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_only_as_a_word() {
        for (text, name, expected) in [
            ("Error adding/updating cluster(s) outbound|80||a: bad, b: worse", "outbound|80||a", true),
            ("Error adding/updating cluster(s) outbound|80||a: bad, b: worse", "b", true),
            ("Error adding/updating cluster(s) outbound|80||a.example: bad", "outbound|80||a", false),
            ("no such cluster outbound|80||a.", "outbound|80||a", true),
            ("listener 0.0.0.0_9080 is bad", "9080", false),
            ("route 9080: bad", "9080", true),
            ("bad", "", false),
        ] {
            assert_eq!(mentions(text, name), expected, "{name} in {text}");
        }
    }
}
