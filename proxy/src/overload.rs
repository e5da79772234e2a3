//! What is done when there is too much: new work is shed, and never old.
//!
//! A sampler asks once in a while how much of each resource is in use; [`levels`] says from that how strongly each action
//! is to be carried out, as Envoy's overload manager does. Where a connection is accepted and where a request begins, that
//! is read as one number. Connections are counted when they are accepted, so their limits hold at once. Without any setting
//! they are limited to what the process may open.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::telemetry::resident_bytes;

/// Between two looks at resources, unless the bootstrap says otherwise (Envoy's).
pub const REFRESH: Duration = Duration::from_secs(1);
/// An allocation that is so large that the allocator gets and returns it as a whole, and what was freed with it.
const SHRINK_BYTES: usize = 4 << 20;

/// A resource, by Envoy's name of its monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// `envoy.resource_monitors.fixed_heap`: memory of the process.
    Heap,
    /// `envoy.resource_monitors.global_downstream_max_connections`: clients' connections.
    Connections,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Who connects waits.
    StopAcceptingConnections,
    /// Who connects is turned away.
    RejectIncomingConnections,
    /// Requests are answered with 503.
    StopAcceptingRequests,
    /// Connections end with their next response.
    DisableHttpKeepalive,
    /// Memory that is not used is given back.
    ShrinkHeap,
}

impl Action {
    /// Each action with Envoy's name of it, without `envoy.overload_actions.`.
    pub const NAMES: [(Self, &str); 5] = [
        (Self::StopAcceptingConnections, "stop_accepting_connections"),
        (Self::RejectIncomingConnections, "reject_incoming_connections"),
        (Self::StopAcceptingRequests, "stop_accepting_requests"),
        (Self::DisableHttpKeepalive, "disable_http_keepalive"),
        (Self::ShrinkHeap, "shrink_heap"),
    ];
}

/// How strongly an action follows from the share of a resource that is in use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trigger {
    /// Not at all below this share, and fully from there.
    Threshold(f64),
    /// Not at all up to the first share, fully from the second, and in between in proportion.
    Scaled(f64, f64),
}

impl Trigger {
    /// From 0, not at all, to 1, fully.
    fn level(self, share: f64) -> f64 {
        match self {
            Self::Threshold(from) => f64::from(u8::from(share >= from)),
            Self::Scaled(from, _) if share <= from => 0.0,
            Self::Scaled(from, to) if share < to => (share - from) / (to - from),
            Self::Scaled(..) => 1.0,
        }
    }
}

/// What is too much, and what is done then.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Between two looks at resources.
    pub refresh: Duration,
    /// Memory of the process in bytes that counts as all.
    pub heap: Option<u64>,
    /// Most connections of clients at once; `None`: as many as the process may open, with a reserve.
    pub connections: Option<u64>,
    /// Most connections of clients at once by listener.
    pub listeners: BTreeMap<Arc<str>, u64>,
    /// Actions, each with what triggers it. The strongest trigger counts.
    pub actions: Vec<(Action, Vec<(Resource, Trigger)>)>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            refresh: REFRESH,
            heap: None,
            connections: None,
            listeners: BTreeMap::new(),
            actions: Vec::new(),
        }
    }
}

/// How strongly each action is carried out, from 0 to 65,535; one number, so that it is read at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Levels(u64);

impl Levels {
    const FULL: u64 = u16::MAX as u64;

    fn shift(action: Action) -> Option<u32> {
        match action {
            Action::StopAcceptingConnections => Some(0),
            Action::RejectIncomingConnections => Some(16),
            Action::StopAcceptingRequests => Some(32),
            Action::DisableHttpKeepalive => Some(48),
            Action::ShrinkHeap => None,
        }
    }

    fn of(self, action: Action) -> u64 {
        Self::shift(action).map_or(0, |shift| (self.0 >> shift) & Self::FULL)
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of 65,535"
    )]
    fn raise(&mut self, action: Action, level: f64) {
        let level = (level.clamp(0.0, 1.0) * Self::FULL as f64).round() as u64;
        if let Some(shift) = Self::shift(action)
            && level > self.of(action)
        {
            self.0 = (self.0 & !(Self::FULL << shift)) | (level << shift);
        }
    }

    /// Whether nothing is shed.
    #[must_use]
    pub fn are_none(self) -> bool {
        self.0 == 0
    }

    /// Whether a request that begins now is not served.
    pub fn shed(self, chance: impl FnOnce() -> u64) -> bool {
        self.strikes(Action::StopAcceptingRequests, chance)
    }

    /// Whether the connection of a request that begins now ends with it.
    pub fn end_connection(self, chance: impl FnOnce() -> u64) -> bool {
        self.strikes(Action::DisableHttpKeepalive, chance)
    }

    /// The names of what is done.
    fn names(self) -> Vec<&'static str> {
        Action::NAMES.iter().filter(|(action, _)| self.of(*action) > 0).map(|(_, name)| *name).collect()
    }

    /// Whether one chance, of all that 64 bits hold, falls to the action.
    fn strikes(self, action: Action, chance: impl FnOnce() -> u64) -> bool {
        match self.of(action) {
            0 => false,
            Self::FULL => true,
            level => chance() % Self::FULL < level,
        }
    }
}

/// How strongly each action follows from the shares of resources that are in use, and whether memory is to be given back.
#[must_use]
pub fn levels(config: &Config, share: impl Fn(Resource) -> f64) -> (Levels, bool) {
    let mut levels = Levels::default();
    let mut shrinks = false;
    for (action, triggers) in &config.actions {
        let all = triggers.iter().map(|(resource, trigger)| trigger.level(share(*resource)));
        let level = all.fold(0.0, f64::max);
        levels.raise(*action, level);
        shrinks |= *action == Action::ShrinkHeap && level >= 1.0;
    }
    (levels, shrinks)
}

/// Connections of clients at once when the process may have so many descriptors: the rest is for upstream connections
/// and files.
#[must_use]
pub fn connections_below(descriptors: u64) -> u64 {
    descriptors - descriptors / 4
}

/// A limit on connections, and how many there are.
#[derive(Debug)]
struct Limit {
    most: u64,
    open: AtomicU64,
}

impl Limit {
    fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { most, open: AtomicU64::new(0) })
    }

    fn admit(self: &Arc<Self>) -> Option<Counted> {
        if self.open.fetch_add(1, Ordering::Relaxed) < self.most {
            return Some(Counted(Arc::clone(self)));
        }
        self.open.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

/// A connection that counts for as long as this is held.
#[derive(Debug)]
struct Counted(Arc<Limit>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A client's connection that was let in; it counts for as long as this is held.
#[derive(Debug)]
pub struct Admitted {
    _all: Counted,
    _of_listener: Option<Counted>,
}

/// Why a connection is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Excess {
    /// There are too many at all.
    Connections,
    /// The listener has too many.
    OfListener,
    /// An action says so.
    Overload,
}

/// What all workers go by.
#[derive(Debug)]
pub struct Overload {
    config: Config,
    levels: AtomicU64,
    connections: Arc<Limit>,
    listeners: BTreeMap<Arc<str>, Arc<Limit>>,
    /// Told when connections are accepted again, or no more.
    accepting: watch::Sender<bool>,
}

impl Default for Overload {
    fn default() -> Self {
        Self::new(Config::default(), u64::MAX)
    }
}

impl Overload {
    /// Nothing is too much yet. The process may have so many descriptors.
    #[must_use]
    pub fn new(config: Config, descriptors: u64) -> Self {
        let most = config.connections.unwrap_or_else(|| connections_below(descriptors));
        let listeners = config.listeners.iter().map(|(name, most)| (Arc::clone(name), Limit::new(*most)));
        Self {
            levels: AtomicU64::new(0),
            connections: Limit::new(most),
            listeners: listeners.collect(),
            accepting: watch::Sender::new(true),
            config,
        }
    }

    /// How strongly each action is carried out now.
    #[must_use]
    pub fn levels(&self) -> Levels {
        Levels(self.levels.load(Ordering::Relaxed))
    }

    /// Lets a connection to a listener in.
    ///
    /// # Errors
    ///
    /// Why it is turned away.
    pub fn admit(&self, listener: &str, chance: impl FnOnce() -> u64) -> Result<Admitted, Excess> {
        let of_listener = self.listeners.get(listener).map(|limit| limit.admit().ok_or(Excess::OfListener));
        let of_listener = of_listener.transpose()?;
        let all = self.connections.admit().ok_or(Excess::Connections)?;
        if self.levels().strikes(Action::RejectIncomingConnections, chance) {
            return Err(Excess::Overload);
        }
        Ok(Admitted { _all: all, _of_listener: of_listener })
    }

    /// Whether connections are accepted; changes are told.
    #[must_use]
    pub fn accepting(&self) -> watch::Receiver<bool> {
        self.accepting.subscribe()
    }

    /// The share of a resource that is in use.
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    fn share(&self, resource: Resource) -> f64 {
        match resource {
            Resource::Heap => self.config.heap.map_or(0.0, |most| resident_bytes() as f64 / most as f64),
            Resource::Connections => {
                self.connections.open.load(Ordering::Relaxed) as f64 / self.connections.most as f64
            }
        }
    }

    /// Looks at resources once.
    fn look(&self) {
        let (levels, shrinks) = levels(&self.config, |resource| self.share(resource));
        let before = Levels(self.levels.swap(levels.0, Ordering::Relaxed));
        let actions = levels.names();
        if before.names() != actions {
            tracing::warn!(?actions, "what is shed is another");
        }
        let accepts = levels.of(Action::StopAcceptingConnections) < Levels::FULL;
        self.accepting.send_if_modified(|accepting| std::mem::replace(accepting, accepts) != accepts);
        if shrinks {
            drop(std::hint::black_box(Vec::<u8>::with_capacity(SHRINK_BYTES)));
        }
    }

    /// Looks at resources for as long as the proxy runs, if anything is done about them.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        if self.config.actions.is_empty() {
            return;
        }
        let mut looks = tokio::time::interval(self.config.refresh);
        while stop.run_until_cancelled(looks.tick()).await.is_some() {
            self.look();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(actions: &[(Action, Resource, Trigger)]) -> Config {
        let actions =
            actions.iter().map(|(action, resource, trigger)| (*action, vec![(*resource, *trigger)]));
        Config { actions: actions.collect(), connections: Some(10), ..Config::default() }
    }

    #[test]
    fn actions_follow_from_the_share_in_use() {
        let (stop, scaled) = (Action::StopAcceptingConnections, Action::StopAcceptingRequests);
        let config = with(&[
            (stop, Resource::Connections, Trigger::Threshold(0.9)),
            (scaled, Resource::Connections, Trigger::Scaled(0.5, 0.75)),
        ]);
        for (share, stopped, shed) in [
            (0.0, 0.0, 0.0),
            (0.5, 0.0, 0.0),
            (0.55, 0.0, 0.2),
            (0.75, 0.0, 1.0),
            (0.9, 1.0, 1.0),
            (3.0, 1.0, 1.0),
        ] {
            let (levels, shrinks) = levels(&config, |_| share);
            assert_eq!(levels.of(stop) as f64, stopped * 65535.0, "{share}");
            assert!((levels.of(scaled) as f64 - shed * 65535.0).abs() < 1.0, "{share}: {levels:?}");
            assert!(!shrinks);
        }
    }

    #[test]
    fn the_strongest_trigger_counts_and_actions_do_not_touch_each_other() {
        let keepalive = Action::DisableHttpKeepalive;
        let mut config = with(&[(Action::ShrinkHeap, Resource::Heap, Trigger::Threshold(0.5))]);
        let triggers = vec![
            (Resource::Heap, Trigger::Scaled(0.0, 1.0)),
            (Resource::Connections, Trigger::Scaled(0.0, 1.0)),
        ];
        config.actions.push((keepalive, triggers));
        let share = |resource| if resource == Resource::Heap { 0.25 } else { 0.75 };
        let (found, shrinks) = levels(&config, share);
        assert_eq!(found.of(keepalive), 49_151);
        assert_eq!(found.of(Action::StopAcceptingRequests), 0);
        assert_eq!(found.names(), ["disable_http_keepalive"]);
        assert!(!found.are_none() && Levels::default().are_none());
        assert!(!shrinks && levels(&config, |_| 0.5).1);
    }

    #[test]
    fn chance_decides_in_proportion() {
        let mut levels = Levels::default();
        levels.raise(Action::StopAcceptingRequests, 0.25);
        let mut rng = fastrand::Rng::with_seed(1);
        let struck = (0..10_000).filter(|_| levels.strikes(Action::StopAcceptingRequests, || rng.u64(..)));
        assert!((2300..2700).contains(&struck.count()));
        assert!(!levels.strikes(Action::DisableHttpKeepalive, || 0));
    }

    #[test]
    fn connections_count_while_they_are_open() {
        let mut config = with(&[]);
        config.listeners.insert("in".into(), 2);
        config.connections = Some(3);
        let overload = Overload::new(config, 0);
        let admit = |name| overload.admit(name, || 0);
        let first = [admit("in"), admit("in")].map(Result::unwrap);
        assert_eq!(admit("in").unwrap_err(), Excess::OfListener);
        let other = admit("other").unwrap();
        assert_eq!(admit("other").unwrap_err(), Excess::Connections);
        drop(first);
        assert_eq!(admit("in").map(drop), Ok(()));
        drop(other);
        assert_eq!(overload.connections.open.load(Ordering::Relaxed), 0);
        assert!(overload.listeners.values().all(|l| l.open.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn without_a_setting_descriptors_are_left_for_the_rest() {
        assert_eq!(Overload::new(Config::default(), 1000).connections.most, 750);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_shed_ends_when_the_resource_is_free_again() {
        let reject = Action::StopAcceptingConnections;
        let config = with(&[(reject, Resource::Connections, Trigger::Threshold(0.2))]);
        let overload = Arc::new(Overload::new(config, 0));
        let mut accepting = overload.accepting();
        let stop = CancellationToken::new();
        let tasks = tokio_util::task::TaskTracker::new();
        tasks.spawn(Arc::clone(&overload).watch(stop.clone()));
        let open = [(); 2].map(|()| overload.admit("in", || 0).unwrap());
        assert!(accepting.wait_for(|accepting| !accepting).await.is_ok());
        drop(open);
        assert!(accepting.wait_for(|accepting| *accepting).await.is_ok());
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
