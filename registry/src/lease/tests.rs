use super::*;
use crate::model::service::Locality;
use crate::state::{Batch, Revision, State};

const LEASE: Duration = Duration::from_secs(5);
const REMOVE_AFTER: Duration = Duration::from_secs(100);
const HOLD: Duration = Duration::from_secs(1000);
const WINDOW: Duration = Duration::from_secs(20);
/// When the machine begins, in milliseconds since 1970.
const BEGIN: i64 = 1_700_000_000_000;

#[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
fn origin() -> Instant {
    Instant::now()
}

fn terms() -> Terms {
    let mass_loss = MassLoss { share: 20, window: WINDOW, least: 3, hold: HOLD };
    Terms { lease: LEASE, remove_after: REMOVE_AFTER, mass_loss }
}

/// The state, and the leases of whoever leads: each command is applied, as the log would.
struct World {
    state: State,
    leases: Leases,
    begin: Instant,
    /// Seconds since the beginning.
    now: u64,
    revision: u64,
}

impl World {
    /// Groups with so many workloads each, called `GROUP-NUMBER`.
    fn of(groups: &[(&str, usize)]) -> Self {
        let mut world = Self {
            state: State::default(),
            leases: Leases::new(terms()),
            begin: origin(),
            now: 0,
            revision: 0,
        };
        for (group, number) in groups {
            for number in 0..*number {
                world.register(group, number, "s1");
            }
        }
        world
    }

    fn register(&mut self, group: &str, number: usize, session: &str) {
        let registration = Registration {
            namespace: "shop".into(),
            name: format!("{group}-{number}"),
            address: "10.0.0.1".into(),
            ports: [].into(),
            labels: [].into(),
            annotations: [].into(),
            network: String::new(),
            locality: Locality::default(),
            weight: 1,
            service_account: group.into(),
            cluster: String::new(),
            group: String::new(),
            instance: String::new(),
            session: session.into(),
            lease_ms: 0,
            healthy: true,
            presence: Presence::Heard,
            lost_ms: 0,
            reason: String::new(),
        };
        self.apply(Command::RegisterWorkload { registration: Arc::new(registration) });
        self.follow();
    }

    fn apply(&mut self, command: Command) {
        self.revision += 1;
        let time_ms = BEGIN + i64::try_from(self.now * 1000).unwrap();
        let batch = Batch { time_ms, author: String::new(), commands: vec![command] };
        self.state.apply(Revision(self.revision), &batch);
    }

    fn instant(&self) -> Instant {
        self.begin + Duration::from_secs(self.now)
    }

    fn follow(&mut self) {
        let (now, at) = (self.instant(), BEGIN + i64::try_from(self.now * 1000).unwrap());
        let since = |ms: i64| Duration::from_millis(u64::try_from(at - ms).unwrap_or(0));
        self.leases.follow(self.state.workloads(), since, now);
    }

    /// Another member leads, and knows what the state says.
    fn other_leader(&mut self) {
        self.leases = Leases::new(terms());
        self.follow();
    }

    fn key(name: &str) -> WorkloadKey {
        WorkloadKey { namespace: "shop".into(), name: name.into() }
    }

    /// Every agent but those of `silent` is heard each second until `second`; what is decided is applied.
    fn until(&mut self, second: u64, silent: &[&str]) {
        while self.now < second {
            self.now += 1;
            let now = self.instant();
            let names: Vec<WorkloadKey> = self.state.workloads().map(|(key, _)| key.clone()).collect();
            for key in names.iter().filter(|key| !silent.contains(&key.name.as_str())) {
                self.hear(key);
            }
            self.follow();
            for command in self.leases.due(now) {
                self.apply(command);
            }
        }
    }

    /// As the member does that an agent talks to.
    fn hear(&mut self, key: &WorkloadKey) {
        let Some(registration) = self.state.workload(key).cloned() else { return };
        let session = registration.session.clone();
        assert!(self.leases.renew(key, &session, self.instant()));
        if registration.presence != Presence::Heard {
            self.apply(Command::WorkloadHealth {
                key: key.clone(),
                session,
                healthy: true,
                reason: String::new(),
            });
        }
    }

    /// What becomes of the workloads: `name:presence` of those that are not heard.
    fn told(&self) -> String {
        let lost = self.state.workloads().filter(|(_, r)| r.presence != Presence::Heard);
        let told: Vec<_> = lost.map(|(key, r)| format!("{}:{:?}", key.name, r.presence)).collect();
        told.join(" ")
    }

    fn serving(&self) -> usize {
        self.state.workloads().filter(|(_, registration)| registration.serves()).count()
    }
}

#[test]
fn a_silent_workload_is_unhealthy_and_then_removed() {
    let mut world = World::of(&[("a", 10)]);
    world.until(4, &["a-3"]);
    assert_eq!(world.told(), "");
    world.until(5, &["a-3"]);
    assert_eq!((world.told().as_str(), world.serving()), ("a-3:Silent", 9));
    world.until(104, &["a-3"]);
    assert_eq!(world.told(), "a-3:Silent");
    world.until(105, &["a-3"]);
    assert_eq!((world.told().as_str(), world.state.workloads().count()), ("", 9));
}

#[test]
fn a_workload_that_speaks_again_is_not_removed() {
    let mut world = World::of(&[("a", 10)]);
    world.until(60, &["a-3"]);
    world.until(61, &[]);
    assert_eq!((world.told().as_str(), world.serving()), ("", 10));
    world.until(300, &["a-3"]);
    assert_eq!(world.state.workloads().count(), 9, "silent once more, from then on");
}

#[test]
fn reports_about_an_old_session_change_nothing() {
    let mut world = World::of(&[("a", 1)]);
    world.until(4, &["a-0"]);
    world.register("a", 0, "s2");
    assert!(!world.leases.renew(&World::key("a-0"), "s1", world.instant()));
    world.leases.release(&World::key("a-0"), "s1");
    world.until(8, &["a-0"]);
    assert_eq!(world.told(), "", "the new session has a lease of its own");
    world.leases.release(&World::key("a-0"), "s2");
    assert_eq!(world.leases.next_due(), None);
}

#[test]
fn a_mass_loss_is_held_as_unknown_and_serves_until_its_agents_are_heard() {
    let mut world = World::of(&[("a", 10), ("b", 30)]);
    let lost = ["a-0", "a-1", "a-2"];
    world.until(900, &lost);
    assert_eq!((world.told().as_str(), world.serving()), ("a-0:Unknown a-1:Unknown a-2:Unknown", 40));
    assert_eq!(world.leases.count(), Count { heard: 37, silent: 0, unknown: 3 });
    world.until(901, &["a-2"]);
    assert_eq!(world.told(), "a-2:Unknown", "each comes back by itself");
    world.until(902, &[]);
    assert_eq!(world.told(), "");
}

#[test]
fn few_losses_are_no_mass_loss() {
    // Exactly the share; and more than it, of a group that is too small to tell.
    let mut world = World::of(&[("a", 15), ("b", 2), ("c", 30)]);
    world.until(6, &["a-0", "a-1", "a-2", "b-0", "b-1"]);
    assert_eq!(world.told(), "a-0:Silent a-1:Silent a-2:Silent b-0:Silent b-1:Silent");
    world.until(110, &["a-0", "a-1", "a-2", "b-0", "b-1"]);
    assert_eq!(world.state.workloads().count(), 42);
}

#[test]
fn losses_over_a_longer_time_are_no_mass_loss() {
    let mut world = World::of(&[("a", 10)]);
    for (second, silent) in [(6, 1), (30, 2), (54, 3), (78, 4)] {
        let names: Vec<String> = (0..silent).map(|number| format!("a-{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        world.until(second, &names);
        assert_eq!(world.leases.count().unknown, 0, "{}", world.told());
    }
    assert_eq!(world.leases.count().silent, 4);
}

#[test]
fn who_was_lost_shortly_before_is_held_with_the_others_and_who_was_unhealthy_stays_so() {
    let mut world = World::of(&[("a", 10)]);
    let ill = Command::WorkloadHealth {
        key: World::key("a-2"),
        session: "s1".into(),
        healthy: false,
        reason: String::new(),
    };
    world.apply(ill);
    world.until(10, &["a-0"]);
    assert_eq!(world.told(), "a-0:Silent");
    world.until(15, &["a-0", "a-1", "a-2"]);
    assert_eq!(world.told(), "a-0:Unknown a-1:Unknown a-2:Unknown");
    assert_eq!(world.serving(), 9, "its own report about itself holds");
    let lost = world.state.workload(&World::key("a-0")).unwrap().lost_ms;
    assert_eq!(lost, BEGIN + 5000, "that it is held does not make it lost later");
}

#[test]
fn a_loss_across_the_mesh_is_held_though_no_group_lost_much() {
    let groups: Vec<String> = (0..9).map(|number| format!("g{number}")).collect();
    let sizes: Vec<(&str, usize)> = groups.iter().map(|group| (group.as_str(), 4)).collect();
    let mut world = World::of(&sizes);
    // Two of four are too few to be a mass loss of their group; eight of 36 are one of the mesh.
    let lost = ["g0-0", "g0-1", "g1-0", "g1-1", "g2-0", "g2-1", "g3-0", "g3-1"];
    world.until(6, &lost[..6]);
    assert_eq!(world.leases.count(), Count { heard: 30, silent: 6, unknown: 0 });
    world.until(11, &lost);
    assert_eq!(world.leases.count(), Count { heard: 28, silent: 0, unknown: 8 });
    assert_eq!(world.serving(), 36);
}

#[test]
fn what_is_held_too_long_is_silent_and_then_removed_and_is_no_new_loss() {
    let mut world = World::of(&[("a", 10)]);
    let lost = ["a-0", "a-1", "a-2", "a-3"];
    world.until(1004, &lost);
    assert_eq!(world.leases.count().unknown, 4);
    world.until(1005, &lost);
    assert_eq!((world.told().matches("Released").count(), world.serving()), (4, 6));
    world.until(1105, &lost);
    assert_eq!((world.told().as_str(), world.state.workloads().count()), ("", 6));
}

#[test]
fn an_operator_gives_up_what_is_held() {
    let mut world = World::of(&[("a", 10)]);
    let lost = ["a-0", "a-1", "a-2", "a-3"];
    // At once, while the loss is still within the window.
    world.until(6, &lost);
    let presence = Presence::Released;
    world.apply(Command::WorkloadPresence { key: World::key("a-1"), session: "s1".into(), presence });
    world.until(50, &lost);
    assert_eq!(world.told(), "a-0:Unknown a-1:Released a-2:Unknown a-3:Unknown");
    world.until(107, &lost);
    assert_eq!(world.told(), "a-0:Unknown a-2:Unknown a-3:Unknown");
}

#[test]
fn another_leader_forgets_nothing_and_gives_everybody_a_lease() {
    let mut world = World::of(&[("a", 10), ("b", 30)]);
    let lost = ["a-0", "a-1", "a-2", "b-0"];
    world.until(60, &lost);
    let told = "a-0:Unknown a-1:Unknown a-2:Unknown b-0:Silent";
    assert_eq!(world.told(), told);
    world.other_leader();
    world.until(104, &lost);
    assert_eq!(world.told(), told);
    world.until(105, &lost);
    assert_eq!(world.told(), &told[..told.len() - 11], "removed when the one before would have removed it");
    world.until(1003, &lost[..3]);
    world.other_leader();
    world.until(1007, &lost[..3]);
    assert_eq!(world.leases.count().unknown, 3, "they had no chance to be heard yet");
    world.until(1008, &lost[..3]);
    assert_eq!(world.told(), "a-0:Released a-1:Released a-2:Released");
    world.other_leader();
    world.until(1108, &[]);
    assert_eq!(world.serving(), 39);
}

#[test]
fn another_leader_counts_what_was_lost_before_it() {
    let mut world = World::of(&[("a", 10)]);
    world.until(6, &["a-0", "a-1"]);
    assert_eq!(world.told(), "a-0:Silent a-1:Silent");
    world.other_leader();
    world.until(15, &["a-0", "a-1", "a-2"]);
    assert_eq!(world.told(), "a-0:Unknown a-1:Unknown a-2:Unknown");
}

#[test]
fn who_was_heard_elsewhere_has_a_lease_again() {
    let mut world = World::of(&[("a", 10)]);
    world.until(50, &["a-0"]);
    assert_eq!(world.told(), "a-0:Silent");
    let heard = Command::WorkloadHealth {
        key: World::key("a-0"),
        session: "s1".into(),
        healthy: true,
        reason: String::new(),
    };
    world.apply(heard);
    world.until(54, &["a-0"]);
    assert_eq!((world.told().as_str(), world.leases.count().heard), ("", 10));
    world.until(56, &["a-0"]);
    assert_eq!(world.told(), "a-0:Silent");
    world.until(140, &["a-0"]);
    assert_eq!(world.state.workloads().count(), 10, "the time of before does not count");
}

#[test]
fn who_said_good_bye_is_not_lost() {
    let mut world = World::of(&[("a", 10)]);
    for number in 0..6 {
        let key = World::key(&format!("a-{number}"));
        // At another member: the leases learn it from the state.
        world.apply(Command::RemoveWorkload { key, session: "s1".into() });
    }
    world.until(10, &["a-9"]);
    assert_eq!(world.told(), "a-9:Silent");
    assert_eq!(world.leases.count(), Count { heard: 3, silent: 1, unknown: 0 });
}

#[test]
fn a_share_of_all_holds_nobody() {
    let mut world = World::of(&[("a", 4)]);
    let mut none = terms();
    none.mass_loss.share = 100;
    world.leases = Leases::new(none);
    world.follow();
    world.until(6, &["a-0", "a-1", "a-2", "a-3"]);
    assert_eq!(world.leases.count(), Count { heard: 0, silent: 4, unknown: 0 });
}
