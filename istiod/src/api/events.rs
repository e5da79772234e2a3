//! What happened lately, as an operator would tell it: changes of configuration, proxies that come, go and refuse,
//! agents that are lost and found, and changes of the leader.
//!
//! Kept by each member for itself, bounded, and gone with it; the durable records are the history and the audit log.
//! [`Observer`] is pure: it is shown the state from time to time and tells what is different.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ca::renewal::Clock;
use registry::snapshot::Snapshot;
use registry::state::{Presence, WorkloadKey};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use xds::status::{ProxyStatus, Status};

use super::types::{EventKind, EventRow, ListMeta, Page, Since};
use super::{Api, ApiError, Caller, page, view};
use crate::raft::node::Status as RaftStatus;

/// Events that are kept; the oldest go first.
const MOST: usize = 10_000;

/// Events of one page unless the caller says otherwise.
const PAGE: u32 = 1000;

/// When more workloads of a namespace than this are told the same of, they are told of together.
const SINGLY: usize = 20;

/// How often the state is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// The events that are kept. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Events {
    kept: Arc<Mutex<Kept>>,
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    events: VecDeque<EventRow>,
}

impl Events {
    fn push(&self, time: &str, told: impl IntoIterator<Item = Told>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for Told { kind, namespace, about, message } in told {
            kept.last += 1;
            let sequence = kept.last;
            kept.events.push_back(EventRow {
                sequence,
                time: time.to_owned(),
                kind,
                namespace,
                about,
                message,
            });
            if kept.events.len() > MOST {
                kept.events.pop_front();
            }
        }
    }

    fn after(&self, sequence: u64, limit: usize, seen: impl Fn(&EventRow) -> bool) -> Vec<EventRow> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let newer = kept.events.iter().filter(|event| event.sequence > sequence && seen(event));
        newer.take(limit).cloned().collect()
    }
}

/// An event before it is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    kind: EventKind,
    namespace: String,
    about: String,
    message: String,
}

/// A connected proxy as it was seen last: its namespace and what it refuses.
type Seen = (String, BTreeSet<String>);

/// Tells what is different from what it was shown before.
#[derive(Debug, Default)]
pub struct Observer {
    proxies: BTreeMap<String, Seen>,
    leader: Option<(u64, Option<u64>)>,
    revision: u64,
    /// The workloads whose agents are not heard.
    lost: BTreeMap<WorkloadKey, Presence>,
}

impl Observer {
    /// An observer for whom everything up to a snapshot is old.
    fn starting_at(snapshot: &Snapshot) -> Self {
        Self { revision: snapshot.revision().0, lost: lost(snapshot), ..Self::default() }
    }

    fn look(&mut self, snapshot: &Snapshot, proxies: &[ProxyStatus], raft: &RaftStatus) -> Vec<Told> {
        let mut told =
            if snapshot.revision().0 == self.revision { Vec::new() } else { self.agents(snapshot) };
        told.extend(self.configuration(snapshot));
        told.extend(self.leader((raft.term, raft.leader)));
        let refusals = |p: &ProxyStatus| p.rejections().map(|nack| nack.message.clone()).collect();
        let now = proxies.iter().map(|p| (p.proxy.id.clone(), (p.proxy.namespace.clone(), refusals(p))));
        told.extend(self.proxies(now.collect()));
        told
    }

    fn configuration(&mut self, snapshot: &Snapshot) -> Vec<Told> {
        let last = std::mem::replace(&mut self.revision, snapshot.revision().0);
        let newest = snapshot.history().entries().rev().take_while(|entry| entry.revision.0 > last);
        let mut entries: Vec<_> = newest.collect();
        entries.reverse();
        let changes =
            entries.iter().flat_map(|entry| entry.changes.iter().map(move |change| (entry, change)));
        let tell = changes.map(|(entry, change)| {
            let verb = match (&change.before, &change.after) {
                (None, _) => "created",
                (Some(_), Some(_)) => "changed",
                (Some(_), None) => "deleted",
            };
            Told {
                kind: EventKind::Config,
                namespace: change.what.split('/').nth(1).unwrap_or_default().to_owned(),
                about: change.what.clone(),
                message: format!("{verb} by {} at revision {}", entry.author, entry.revision),
            }
        });
        tell.collect()
    }

    fn agents(&mut self, snapshot: &Snapshot) -> Vec<Told> {
        let now = lost(snapshot);
        let before = std::mem::replace(&mut self.lost, now);
        let came = before.keys().filter(|key| !self.lost.contains_key(*key)).map(|key| {
            let back = snapshot.workload(key).is_some_and(|workload| workload.registration.is_some());
            (key, if back { "the agent is heard again" } else { "the workload is removed" })
        });
        let went = self.lost.iter().filter(|(key, presence)| before.get(*key) != Some(*presence));
        let went = went.map(|(key, presence)| match presence {
            Presence::Heard | Presence::Silent => {
                (key, "the agent is silent: no traffic is sent to the workload")
            }
            Presence::Unknown => (key, "the agent was lost with many others: the workload is held as it was"),
            Presence::Released => (key, "the agent was given up: no traffic is sent to the workload"),
        });
        let mut same: BTreeMap<(&str, &str), Vec<&WorkloadKey>> = BTreeMap::new();
        for (key, message) in came.chain(went) {
            same.entry((message, key.namespace.as_str())).or_default().push(key);
        }
        let mut told = Vec::new();
        for ((message, namespace), keys) in same {
            let mut tell = |about: String, message: String| {
                told.push(Told { kind: EventKind::Agent, namespace: namespace.to_owned(), about, message });
            };
            if keys.len() > SINGLY {
                tell(String::new(), format!("of {} workloads: {message}", keys.len()));
            } else {
                keys.iter().for_each(|key| tell(key.to_string(), message.to_owned()));
            }
        }
        told
    }

    fn leader(&mut self, now: (u64, Option<u64>)) -> Option<Told> {
        if self.leader.replace(now) == Some(now) {
            return None;
        }
        let (term, leader) = now;
        let told = |about: String, message: String| {
            Some(Told { kind: EventKind::Leader, namespace: String::new(), about, message })
        };
        match leader {
            Some(id) => told(id.to_string(), format!("leads in term {term}")),
            None => told(String::new(), format!("no leader is known in term {term}")),
        }
    }

    fn proxies(&mut self, now: BTreeMap<String, Seen>) -> Vec<Told> {
        let before = std::mem::replace(&mut self.proxies, now);
        let mut told = Vec::new();
        let mut tell = |id: &str, namespace: &str, message: String| {
            let (about, namespace) = (id.to_owned(), namespace.to_owned());
            told.push(Told { kind: EventKind::Proxy, namespace, about, message });
        };
        for (id, (namespace, refused)) in &self.proxies {
            let known = before.get(id);
            if known.is_none() {
                tell(id, namespace, "connected".to_owned());
            }
            let old = known.map(|(_, refused)| refused);
            for reason in refused.iter().filter(|reason| old.is_none_or(|old| !old.contains(*reason))) {
                tell(id, namespace, format!("refused: {reason}"));
            }
        }
        for (id, (namespace, _)) in before.iter().filter(|(id, _)| !self.proxies.contains_key(*id)) {
            tell(id, namespace, "disconnected".to_owned());
        }
        told
    }
}

/// The workloads whose agents are not heard.
fn lost(snapshot: &Snapshot) -> BTreeMap<WorkloadKey, Presence> {
    let registered =
        snapshot.workloads().filter_map(|workload| Some((workload, workload.registration.as_ref()?)));
    let lost = registered.filter(|(_, registration)| registration.presence != Presence::Heard);
    lost.map(|(workload, registration)| (workload.key.clone(), registration.presence)).collect()
}

/// Watches the member until `stop`.
pub(crate) async fn observe(
    events: Events,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    status: Status,
    raft: watch::Receiver<RaftStatus>,
    clock: Clock,
    stop: CancellationToken,
) {
    let mut observer = Observer::starting_at(&snapshots.borrow());
    let mut looks = tokio::time::interval(LOOK);
    while stop.run_until_cancelled(looks.tick()).await.is_some() {
        let (snapshot, member) = (snapshots.borrow().clone(), raft.borrow().clone());
        let told = observer.look(&snapshot, &status.proxies(Instant::now().into_std()), &member);
        if !told.is_empty() {
            events.push(&view::rfc3339(ca::state::unix_seconds(clock())), told);
        }
    }
}

impl Api {
    /// What happened lately on this member in the caller's namespaces, oldest first.
    ///
    /// # Errors
    ///
    /// [`ApiError::Invalid`] for a limit out of range.
    pub fn events(&self, caller: &Caller, since: &Since) -> Result<Page<EventRow>, ApiError> {
        let limit = since.limit.unwrap_or(PAGE);
        if limit == 0 || limit > page::LARGEST {
            return Err(ApiError::invalid_field("limit", format!("from 1 to {}", page::LARGEST)));
        }
        let seen = |event: &EventRow| event.namespace.is_empty() || caller.covers(&event.namespace);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let items = self.events.after(since.after.unwrap_or(0), limit, seen);
        let resource_version = self.snapshot().revision().to_string();
        Ok(Page { items, metadata: ListMeta { resource_version, ..ListMeta::default() } })
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use registry::source::vm::{self, Join};
    use registry::state::{Batch, Command, Revision, State};

    use super::*;

    fn seen(refused: &[&str]) -> Seen {
        ("shop".to_owned(), refused.iter().map(|r| (*r).to_owned()).collect())
    }

    fn words(told: &[Told]) -> Vec<String> {
        told.iter().map(|told| format!("{} {}", told.about, told.message)).collect()
    }

    #[test]
    fn proxies_come_refuse_and_go() {
        let mut observer = Observer::default();
        let mut look = |now: &[(&str, Seen)]| {
            let now = now.iter().map(|(id, seen)| ((*id).to_owned(), seen.clone())).collect();
            words(&observer.proxies(now))
        };
        assert_eq!(look(&[("a", seen(&[]))]), ["a connected"]);
        assert_eq!(look(&[("a", seen(&["bad"])), ("b", seen(&[]))]), ["a refused: bad", "b connected"]);
        assert!(look(&[("a", seen(&["bad"])), ("b", seen(&[]))]).is_empty());
        assert_eq!(look(&[("a", seen(&[]))]), ["b disconnected"]);
    }

    #[test]
    fn agents_are_lost_and_found_one_by_one_or_many_together() {
        let mut state = State::default();
        let mut revision = 0;
        let mut commit = |state: &mut State, commands: Vec<Command>| {
            revision += 1;
            let batch = Batch { time_ms: 0, author: String::new(), commands };
            state.apply(Revision(revision), &batch);
            Snapshot::build(state)
        };
        let many = SINGLY + 1;
        let keys: Vec<WorkloadKey> = (0..many)
            .map(|n| WorkloadKey { namespace: "shop".to_owned(), name: format!("w{n}-10.0.0.{n}") })
            .collect();
        let register = |n: usize| {
            let join = Join {
                namespace: "shop".to_owned(),
                service_account: "pay".to_owned(),
                workload: format!("w{n}"),
                address: IpAddr::from([10, 0, 0, u8::try_from(n).unwrap()]),
                ports: [].into(),
                labels: [].into(),
                network: String::new(),
                locality: String::new(),
                cluster: String::new(),
                instance: String::new(),
                session: "s".to_owned(),
                lease: Duration::ZERO,
            };
            Command::RegisterWorkload { registration: Arc::new(vm::register(None, &join).unwrap()) }
        };
        let presence = |key: &WorkloadKey, presence| Command::WorkloadPresence {
            key: key.clone(),
            session: "s".to_owned(),
            presence,
        };
        let snapshot = commit(&mut state, (0..many).map(register).collect());
        let mut observer = Observer::starting_at(&snapshot);
        let silent = commit(&mut state, vec![presence(&keys[0], Presence::Silent)]);
        let silence = "the agent is silent: no traffic is sent to the workload";
        assert_eq!(words(&observer.agents(&silent)), [format!("{} {silence}", keys[0])]);
        assert!(observer.agents(&silent).is_empty(), "told once");
        let all = keys.iter().map(|key| presence(key, Presence::Unknown)).collect();
        let held = observer.agents(&commit(&mut state, all));
        let words_of_all =
            "of 21 workloads: the agent was lost with many others: the workload is held as it was";
        assert_eq!(words(&held), [format!(" {words_of_all}")]);
        assert_eq!((held[0].kind, held[0].namespace.as_str()), (EventKind::Agent, "shop"));
        let mut last: Vec<Command> = keys.iter().map(|key| presence(key, Presence::Heard)).collect();
        last.push(Command::RemoveWorkload { key: keys[0].clone(), session: "s".to_owned() });
        let told = words(&observer.agents(&commit(&mut state, last)));
        assert_eq!(told.len(), 21);
        assert!(told.contains(&format!("{} the workload is removed", keys[0])), "{told:?}");
        assert!(told.contains(&format!("{} the agent is heard again", keys[1])), "{told:?}");
    }

    #[test]
    fn a_leader_is_told_once() {
        let mut observer = Observer::default();
        assert!(observer.leader((1, Some(1))).is_some());
        assert!(observer.leader((1, Some(1))).is_none());
        assert_eq!(observer.leader((2, None)).unwrap().message, "no leader is known in term 2");
    }

    #[test]
    fn events_are_counted_and_bounded() {
        let events = Events::default();
        let told = Told {
            kind: EventKind::Leader,
            namespace: String::new(),
            about: String::new(),
            message: String::new(),
        };
        events.push("now", std::iter::repeat_n(told, MOST + 5));
        let all = events.after(0, usize::MAX, |_| true);
        assert_eq!((all.len(), all[0].sequence), (MOST, 6));
        assert_eq!(events.after(u64::try_from(MOST).unwrap(), 2, |_| true).len(), 2);
    }
}
