//! Which member of the control plane is called next, and after which pause: a state machine without socket or clock.
//!
//! Members are preferred in rendezvous order (`wire::members`), so that clients spread evenly. A round tries each
//! once; pauses grow from round to round, not within one. A member may send a client elsewhere ([`Hint`]): it is then
//! the last to be tried. The newest revision that was received is remembered and told, so that no member that is
//! behind takes the client back in time. Only when all members say that they are behind, what we have is of another
//! history (the control plane was restored from a backup), and is told no more.

use std::collections::BTreeSet;
use std::time::Duration;

use wire::members::{Hint, order};

use super::decode::Address;

/// The shortest and the longest pause between two rounds.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// No stream came about, or nothing came on it.
    Failed,
    /// The member refused the stream, and says why another should be called.
    Refused(Hint),
    /// A stream that had worked has ended; with a hint, if the member asked to leave.
    Lost(Option<Hint>),
}

/// What a client knows of the members, and whom it has tried.
#[derive(Debug)]
pub struct Choice {
    node: String,
    /// What the client was set up with: it may be a name for all members, or an address on this side of a gateway.
    first: Vec<Address>,
    /// What the control plane tells of itself; preferred.
    told: Vec<Address>,
    /// Whom this round has tried, as text.
    tried: BTreeSet<String>,
    /// Rounds without a stream.
    rounds: u32,
    refusals: u64,
    behind: BTreeSet<String>,
    revision: Option<u64>,
}

impl Choice {
    /// Nobody was tried yet. `node` is the node id, on which the preference depends.
    #[must_use]
    pub fn new(node: &str, members: Vec<Address>) -> Self {
        Self {
            node: node.to_owned(),
            first: members,
            told: Vec::new(),
            tried: BTreeSet::new(),
            rounds: 0,
            refusals: 0,
            behind: BTreeSet::new(),
            revision: None,
        }
    }

    /// The member to call now; `None` when there is none at all.
    #[must_use]
    pub fn next(&self) -> Option<Address> {
        self.preferred().into_iter().find(|member| !self.tried.contains(&member.to_string()))
    }

    /// How many members have refused since a stream came about.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals
    }

    /// The newest revision that was received, which a member must have to serve us.
    #[must_use]
    pub fn revision(&self) -> Option<u64> {
        self.revision
    }

    /// The control plane says who its members are. What is no address is left out; an empty list says nothing.
    pub fn on_members(&mut self, members: &[String]) {
        let told: Vec<Address> = members.iter().filter_map(|member| Address::parse(member)).collect();
        if !told.is_empty() {
            self.told = told;
        }
        if self.next().is_none() {
            // Whom this round had left is no member any more.
            self.tried.clear();
        }
    }

    /// A member has accepted a stream.
    pub fn on_open(&mut self) {
        self.refusals = 0;
        self.behind.clear();
    }

    /// Something of this revision was received.
    pub fn on_revision(&mut self, revision: u64) {
        self.revision = self.revision.max(Some(revision));
    }

    /// An attempt with this member has ended: the pause before [`Self::next`] is called.
    pub fn on_end(&mut self, member: &Address, ended: &Ended, rng: &mut fastrand::Rng) -> Duration {
        let name = member.to_string();
        match ended {
            Ended::Failed => {}
            Ended::Refused(Hint::Surplus) => self.refusals += 1,
            Ended::Refused(Hint::Behind) => drop(self.behind.insert(name.clone())),
            Ended::Refused(Hint::Drain) => {}
            Ended::Lost(_) => {
                self.rounds = 0;
                self.tried.clear();
            }
        }
        self.tried.insert(name);
        let serving = if self.told.is_empty() { &self.first } else { &self.told };
        if self.revision.is_some() && serving.iter().all(|member| self.behind.contains(&member.to_string())) {
            tracing::warn!(
                revision = self.revision,
                "no member has the revision that we have: its log is another"
            );
            self.revision = None;
            self.behind.clear();
        }
        if self.next().is_none() {
            self.tried.clear();
            self.rounds = self.rounds.saturating_add(1);
            return pause(self.rounds, rng);
        }
        match ended {
            // Somebody answered, and knows better who should be called.
            Ended::Refused(_) => Duration::ZERO,
            // All clients of a member lose it at once, and must not come to the next at once.
            Ended::Failed | Ended::Lost(_) => pause(1, rng),
        }
    }

    /// Every member once, in the order of preference.
    fn preferred(&self) -> Vec<Address> {
        let mut found: Vec<Address> = Vec::new();
        for tier in [&self.told, &self.first] {
            let names: Vec<String> = tier.iter().map(ToString::to_string).collect();
            for name in order(&self.node, names.iter().map(String::as_str)) {
                let named = tier.iter().find(|member| member.to_string() == name);
                found.extend(
                    named.filter(|member| !found.contains(member)).cloned().into_iter().collect::<Vec<_>>(),
                );
            }
        }
        found
    }
}

/// A pause that doubles with each round, half of it by chance.
fn pause(rounds: u32, rng: &mut fastrand::Rng) -> Duration {
    let (shortest, longest) = BACKOFF;
    let whole = shortest.saturating_mul(1 << rounds.saturating_sub(1).min(16)).min(longest);
    whole.mul_f64(0.5 + rng.f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = "sidecar~10.0.0.1~a.b~b.svc.cluster.local";

    fn address(member: &str) -> Address {
        Address::parse(member).unwrap()
    }

    fn of(members: &[&str]) -> Choice {
        Choice::new(NODE, members.iter().map(|m| address(m)).collect())
    }

    fn rng() -> fastrand::Rng {
        fastrand::Rng::with_seed(7)
    }

    const THREE: [&str; 3] = ["10.0.0.1:1", "10.0.0.2:1", "[fd00::3]:1"];

    #[test]
    fn members_are_tried_in_rendezvous_order_and_pauses_grow_from_round_to_round() {
        let (mut choice, mut rng) = (of(&THREE), rng());
        let order: Vec<Address> = order(NODE, THREE).into_iter().map(address).collect();
        for round in 1..12_u32 {
            for (place, member) in order.iter().enumerate() {
                assert_eq!(choice.next().as_ref(), Some(member));
                let pause = choice.on_end(member, &Ended::Failed, &mut rng);
                let longest = if place == 2 { BACKOFF.0 * (1 << (round - 1)) } else { BACKOFF.0 };
                assert!(pause <= longest.min(BACKOFF.1) && pause >= BACKOFF.0 / 2, "{round}: {pause:?}");
            }
        }
        assert!(of(&[]).next().is_none());
    }

    #[test]
    fn who_is_sent_elsewhere_returns_only_when_nobody_else_serves() {
        let (mut choice, mut rng) = (of(&THREE), rng());
        let home = choice.next().unwrap();
        choice.on_open();
        let pause = choice.on_end(&home, &Ended::Lost(Some(Hint::Surplus)), &mut rng);
        assert!(pause <= BACKOFF.0);
        let second = choice.next().unwrap();
        assert_ne!(second, home);
        assert_eq!(choice.on_end(&second, &Ended::Refused(Hint::Surplus), &mut rng), Duration::ZERO);
        let third = choice.next().unwrap();
        choice.on_end(&third, &Ended::Refused(Hint::Surplus), &mut rng);
        assert_eq!((choice.refusals(), choice.next()), (2, Some(home)));
        choice.on_open();
        assert_eq!(choice.refusals(), 0);
    }

    #[test]
    fn what_the_control_plane_tells_is_preferred_to_what_one_was_set_up_with() {
        let (mut choice, mut rng) = (of(&["istiod.example.com:15012"]), rng());
        choice.on_members(&["nonsense".to_owned()]);
        assert_eq!(choice.next(), Some(address("istiod.example.com:15012")));
        choice.on_members(&THREE.map(str::to_owned));
        for _ in 0..3 {
            let next = choice.next().unwrap();
            assert_ne!(next, address("istiod.example.com:15012"));
            choice.on_end(&next, &Ended::Failed, &mut rng);
        }
        assert_eq!(choice.next(), Some(address("istiod.example.com:15012")), "the last resort");
    }

    #[test]
    fn somebody_is_called_though_all_members_that_are_left_were_tried() {
        let (mut choice, mut rng) = (of(&[]), rng());
        choice.on_members(&THREE.map(str::to_owned));
        for _ in 0..2 {
            let next = choice.next().unwrap();
            choice.on_end(&next, &Ended::Refused(Hint::Surplus), &mut rng);
        }
        let tried: Vec<String> = choice.tried.iter().cloned().collect();
        choice.on_members(&tried);
        assert!(choice.next().is_some_and(|next| tried.contains(&next.to_string())));
    }

    #[test]
    fn a_member_that_comes_is_preferred_by_those_whose_first_choice_it_is() {
        let nodes: Vec<String> = (0..300).map(|n| format!("node-{n}")).collect();
        let two = THREE.map(str::to_owned);
        let moved = nodes.iter().filter(|node| {
            let mut choice = Choice::new(node, Vec::new());
            choice.on_members(&two[..2]);
            let before = choice.next();
            choice.on_members(&two);
            assert!(choice.next() == before || choice.next() == Some(address(THREE[2])));
            choice.next() != before
        });
        let moved = moved.count();
        assert!((70..130).contains(&moved), "{moved} of 300");
    }

    #[test]
    fn a_revision_is_told_until_all_members_are_behind_it() {
        let (mut choice, mut rng) = (of(&THREE), rng());
        choice.on_revision(9);
        choice.on_revision(7);
        assert_eq!(choice.revision(), Some(9));
        for left in [2, 1] {
            let next = choice.next().unwrap();
            choice.on_end(&next, &Ended::Refused(Hint::Behind), &mut rng);
            assert_eq!(choice.revision(), Some(9), "{left} members may have it");
        }
        let last = choice.next().unwrap();
        choice.on_end(&last, &Ended::Failed, &mut rng);
        assert_eq!(choice.revision(), Some(9), "the third has not answered");
        for _ in 0..3 {
            let next = choice.next().unwrap();
            choice.on_end(&next, &Ended::Refused(Hint::Behind), &mut rng);
        }
        assert_eq!(choice.revision(), None);
    }
}
