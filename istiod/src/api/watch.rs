//! Changes of configuration as they happen, from any revision that is still remembered.
//!
//! [`Watch`] is the machine: snapshots in, events out, no socket. A caller that comes back with the revision of the
//! last event it saw misses nothing and sees nothing twice; when the changes since then are not remembered any more it
//! is told so, and lists again. Revisions never go back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use registry::config::{Kind, Object};
use registry::snapshot::Snapshot;
use registry::state::history::{Entry, Value as Past};
use registry::state::{ObjectKey, Revision};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use super::objects::parse_kind;
use super::select::Selection;
use super::types::{WatchEvent, WatchKind, Watching};
use super::{Api, ApiError, Caller};

/// A watcher that nothing happens to is told the revision this often: it knows that the connection lives, and where to
/// come back.
const BOOKMARK: Duration = Duration::from_secs(10);

/// A watch ends after this time, and the caller comes back: rights that were taken away end with it.
pub const LONGEST: Duration = Duration::from_secs(300);

/// Watches at the same time. Full means that many follow the mesh: more are told to come again.
pub const MOST: usize = 512;

/// What one caller watches, and up to where it has seen it.
#[derive(Debug)]
pub struct Watch {
    kind: Option<Kind>,
    selection: Selection,
    caller: Caller,
    seen: Arc<Snapshot>,
    /// Changes up to here are told, or were known before.
    after: Revision,
}

impl Watch {
    /// A watch at a snapshot, and the events that it begins with: all objects when no revision is said, else the
    /// changes since.
    ///
    /// # Errors
    ///
    /// [`ApiError::Gone`] when changes since that revision are forgotten.
    pub fn begin(
        snapshot: &Arc<Snapshot>,
        kind: Option<Kind>,
        selection: Selection,
        caller: Caller,
        from: Option<u64>,
    ) -> Result<(Self, Vec<WatchEvent>), ApiError> {
        let now = snapshot.revision();
        let after = from.map_or(now, Revision);
        let watch = Self { kind, selection, caller, seen: snapshot.clone(), after: after.max(now) };
        let mut events = Vec::new();
        match from {
            None => {
                let all = snapshot.objects().filter(|object| watch.wants(object));
                events.extend(all.map(|object| event(WatchKind::Added, now, Some(object))));
                events.push(event(WatchKind::Bookmark, now, None));
            }
            Some(_) if after >= now => {}
            Some(from) => {
                if after < snapshot.history().forgotten() {
                    return Err(ApiError::Gone(format!(
                        "changes since revision {from} are not remembered; list, and watch from that revision"
                    )));
                }
                let entries = snapshot.history().entries().filter(|entry| entry.revision > after);
                entries.for_each(|entry| watch.replay(entry, &mut events));
            }
        }
        Ok((watch, events))
    }

    /// What happened between the last snapshot and this one.
    pub fn next(&mut self, snapshot: &Arc<Snapshot>) -> Vec<WatchEvent> {
        let mut events = Vec::new();
        let (after, now) = (self.after, snapshot.revision());
        if now <= after {
            return events;
        }
        if after >= snapshot.history().forgotten() {
            let entries = snapshot.history().entries().rev().take_while(|entry| entry.revision > after);
            let entries: Vec<_> = entries.collect();
            entries.into_iter().rev().for_each(|entry| self.replay(entry, &mut events));
        } else {
            // Too much happened at once for the history: what differs is told.
            self.compare(snapshot, &mut events);
        }
        (self.seen, self.after) = (snapshot.clone(), now);
        events
    }

    /// Tells the revision that all earlier events lead to.
    #[must_use]
    pub fn bookmark(&self) -> WatchEvent {
        event(WatchKind::Bookmark, self.after, None)
    }

    fn wants(&self, object: &Object) -> bool {
        self.kind.is_none_or(|kind| object.kind == kind)
            && self.caller.covers(&object.namespace)
            && self.selection.matches(object)
    }

    fn replay(&self, entry: &Entry, events: &mut Vec<WatchEvent>) {
        for change in &entry.changes {
            self.tell(entry.revision, object(change.before.as_ref()), object(change.after.as_ref()), events);
        }
    }

    /// An object that begins or ceases to be meant is added or deleted, whatever it was before.
    fn tell(
        &self,
        revision: Revision,
        before: Option<&Arc<Object>>,
        after: Option<&Arc<Object>>,
        events: &mut Vec<WatchEvent>,
    ) {
        let (before, after) = (before.filter(|o| self.wants(o)), after.filter(|o| self.wants(o)));
        let told = match (before, after) {
            (None, None) => return,
            (None, Some(object)) => (WatchKind::Added, object),
            (Some(_), Some(object)) => (WatchKind::Modified, object),
            (Some(object), None) => (WatchKind::Deleted, object),
        };
        events.push(event(told.0, revision, Some(told.1)));
    }

    fn compare(&self, snapshot: &Snapshot, events: &mut Vec<WatchEvent>) {
        let now = snapshot.revision();
        let before: BTreeMap<ObjectKey, &Arc<Object>> =
            self.seen.objects().map(|object| (ObjectKey::of(object), object)).collect();
        for object in snapshot.objects() {
            let old = before.get(&ObjectKey::of(object)).copied();
            if old.is_none_or(|old| old.revision != object.revision) {
                self.tell(Revision(object.revision), old, Some(object), events);
            }
        }
        let gone = before.iter().filter(|(key, _)| snapshot.object(key).is_none());
        gone.for_each(|(_, object)| self.tell(now, Some(object), None, events));
        // The order of revisions is the order of events.
        events.sort_by_key(|event| event.revision);
    }
}

fn object(value: Option<&Past>) -> Option<&Arc<Object>> {
    match value {
        Some(Past::Object(object)) => Some(object),
        Some(Past::Json(_)) | None => None,
    }
}

fn event(kind: WatchKind, revision: Revision, object: Option<&Arc<Object>>) -> WatchEvent {
    WatchEvent { kind, revision: revision.0, object: object.map(|object| object.to_json()) }
}

impl Api {
    /// Changes of objects of a kind, or of all kinds (`all`), in the caller's namespaces; each item has at least one.
    /// It ends after [`LONGEST`], or when this member stops.
    ///
    /// # Errors
    ///
    /// [`ApiError::Gone`] when changes since the revision are forgotten, [`ApiError::Busy`] when too many watch.
    pub fn watch(
        &self,
        caller: &Caller,
        kind: &str,
        watching: &Watching,
    ) -> Result<impl Stream<Item = Vec<WatchEvent>> + Send + use<>, ApiError> {
        let kind = if kind == "all" { None } else { Some(parse_kind(kind)?) };
        let selection = Selection::watched(watching)?;
        let place = self.watches.clone().try_acquire_owned();
        let place = place.map_err(|_| ApiError::Busy(format!("{MOST} watch already; come again later")))?;
        let mut snapshots = self.snapshots.clone();
        let snapshot = snapshots.borrow_and_update().clone();
        let (watch, events) = Watch::begin(&snapshot, kind, selection, caller.clone(), watching.revision)?;
        let first = if events.is_empty() { vec![watch.bookmark()] } else { events };
        let driver =
            Driver { watch, snapshots, first: Some(first), until: Instant::now() + LONGEST, _place: place };
        Ok(futures::stream::unfold(driver, Driver::step))
    }
}

/// Moves snapshots into a watch.
struct Driver {
    watch: Watch,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    first: Option<Vec<WatchEvent>>,
    until: Instant,
    /// Its place, which is free when this ends.
    _place: OwnedSemaphorePermit,
}

impl Driver {
    async fn step(mut self) -> Option<(Vec<WatchEvent>, Self)> {
        if let Some(first) = self.first.take() {
            return Some((first, self));
        }
        loop {
            if Instant::now() >= self.until {
                return None;
            }
            let changed = tokio::time::timeout(BOOKMARK, self.snapshots.changed()).await;
            let events = match changed {
                Ok(Ok(())) => {
                    let snapshot = self.snapshots.borrow_and_update().clone();
                    self.watch.next(&snapshot)
                }
                Ok(Err(_)) => return None,
                Err(_) => vec![self.watch.bookmark()],
            };
            if !events.is_empty() {
                return Some((events, self));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use registry::state::{Batch, State};

    use super::super::{Caller, Source};
    use super::*;
    use crate::access::{Grant, Role};

    struct Mesh {
        state: State,
        snapshot: Arc<Snapshot>,
    }

    impl Mesh {
        fn new() -> Self {
            Self { state: State::default(), snapshot: Arc::default() }
        }

        fn commit(&mut self, batch: &Batch) {
            let revision = Revision(self.state.revision().0 + 1);
            let (changes, _) = self.state.apply(revision, batch);
            self.snapshot = Arc::new(Snapshot::next(&self.snapshot, &self.state, &changes));
        }

        fn put(&mut self, namespace: &str, name: &str, host: &str) {
            let spec = serde_json::json!({ "host": host });
            let object = Object::new(Kind::DestinationRule, namespace, name, spec);
            self.commit(&Batch::put_objects(1, "test", [object]));
        }

        fn delete(&mut self, namespace: &str, name: &str) {
            let key = ObjectKey {
                kind: Kind::DestinationRule,
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            };
            self.commit(&Batch::delete_objects(1, "test", [key]));
        }

        fn watch(&self, from: Option<u64>) -> Result<(Watch, Vec<String>), ApiError> {
            let begun = Watch::begin(&self.snapshot, None, Selection::default(), Caller::local(), from);
            begun.map(|(watch, events)| (watch, told(&events)))
        }
    }

    fn told(events: &[WatchEvent]) -> Vec<String> {
        let line = |event: &WatchEvent| {
            let name = event.object.as_ref().and_then(|o| o.pointer("/metadata/name")?.as_str());
            format!("{} {:?} {}", event.revision, event.kind, name.unwrap_or("-"))
        };
        events.iter().map(line).collect()
    }

    #[test]
    fn a_watch_tells_what_is_there_and_then_what_happens() {
        let mut mesh = Mesh::new();
        mesh.put("shop", "a", "a");
        let (mut watch, events) = mesh.watch(None).unwrap();
        assert_eq!(events, ["1 Added a", "1 Bookmark -"]);
        mesh.put("shop", "a", "b");
        mesh.put("shop", "c", "c");
        mesh.delete("shop", "a");
        assert_eq!(told(&watch.next(&mesh.snapshot)), ["2 Modified a", "3 Added c", "4 Deleted a"]);
        assert!(watch.next(&mesh.snapshot).is_empty());
        assert_eq!(watch.bookmark().revision, 4);
    }

    #[test]
    fn who_comes_back_misses_nothing_and_sees_nothing_twice() {
        let mut mesh = Mesh::new();
        (0..5).for_each(|n| mesh.put("shop", &n.to_string(), "x"));
        for from in 0..=5_u64 {
            let (_, events) = mesh.watch(Some(from)).unwrap();
            let wanted: Vec<_> = (from..5).map(|n| format!("{} Added {n}", n + 1)).collect();
            assert_eq!(events, wanted);
        }
        let (mut ahead, events) = mesh.watch(Some(6)).unwrap();
        assert!(events.is_empty());
        mesh.put("shop", "6", "x");
        mesh.put("shop", "7", "x");
        assert_eq!(told(&ahead.next(&mesh.snapshot)), ["7 Added 7"], "6 was seen, on another member");
    }

    #[test]
    fn what_is_forgotten_is_told_so_and_a_slow_watcher_is_told_what_differs() {
        let mut mesh = Mesh::new();
        mesh.put("shop", "a", "a");
        mesh.put("shop", "b", "b");
        let (mut slow, _) = mesh.watch(None).unwrap();
        let change = registry::state::Command::SetHistoryLimit { entries: 1 };
        mesh.commit(&Batch { time_ms: 1, author: "test".to_owned(), commands: vec![change] });
        mesh.delete("shop", "a");
        mesh.put("shop", "b", "x");
        mesh.put("shop", "c", "x");
        assert!(matches!(mesh.watch(Some(1)), Err(ApiError::Gone(_))));
        assert_eq!(told(&slow.next(&mesh.snapshot)), ["5 Modified b", "6 Added c", "6 Deleted a"]);
    }

    #[test]
    fn what_begins_or_ceases_to_be_meant_is_added_or_deleted() {
        let mut mesh = Mesh::new();
        let grant = Grant { role: Role::Viewer, namespaces: Some(["shop".to_owned()].into()) };
        let caller = Caller::new("a", grant, Source::Local);
        let watching = Watching { field_selector: Some("spec.host=x".to_owned()), ..Watching::default() };
        let selection = Selection::watched(&watching).unwrap();
        let (mut watch, _) = Watch::begin(&mesh.snapshot, None, selection, caller, None).unwrap();
        for host in ["x", "y", "x"] {
            mesh.put("shop", "a", host);
            mesh.put("bank", "a", host);
        }
        let events = told(&watch.next(&mesh.snapshot));
        assert_eq!(events, ["1 Added a", "3 Deleted a", "5 Added a"]);
    }
}
