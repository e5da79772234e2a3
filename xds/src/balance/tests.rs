//! A control plane of some members and many clients, played without a socket.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Members by their number, and where each client's stream is.
#[derive(Debug, Default)]
struct Played {
    members: BTreeSet<usize>,
    at: BTreeMap<usize, usize>,
}

fn address(member: usize) -> String {
    format!("10.0.0.{member}:15012")
}

fn node(client: usize) -> String {
    format!("sidecar~10.1.{}.{}~a.b~b.svc.cluster.local", client / 256, client % 256)
}

impl Played {
    fn new(members: usize) -> Self {
        Self { members: (0..members).collect(), ..Self::default() }
    }

    fn held(&self, member: usize) -> u64 {
        self.at.values().filter(|at| **at == member).count() as u64
    }

    fn fleet(&self, own: usize) -> Fleet {
        let members = self.members.iter().map(|m| (address(*m), Some(self.held(*m)))).collect();
        Fleet { own: address(own), members }
    }

    /// The client asks one member after the other in its order, first all but `last`.
    fn connect(&mut self, client: usize, last: Option<usize>) {
        let addresses: BTreeMap<String, usize> = self.members.iter().map(|m| (address(*m), *m)).collect();
        let mut order: Vec<usize> = order(&node(client), addresses.keys().map(String::as_str))
            .iter()
            .map(|a| addresses[*a])
            .collect();
        order.sort_by_key(|m| Some(*m) == last);
        for (refusals, member) in order.into_iter().enumerate() {
            if self.fleet(member).admits(self.held(member), refusals as u64) {
                self.at.insert(client, member);
                return;
            }
        }
        panic!("client {client} was refused by all");
    }

    /// Members ask streams to move until nobody holds too many; how many moved.
    fn settle(&mut self) -> usize {
        let mut moved = 0;
        for _ in 0..1000 {
            let mut calm = true;
            for member in self.members.clone() {
                let nodes: Vec<(u64, String)> = self
                    .at
                    .iter()
                    .filter(|(_, at)| **at == member)
                    .map(|(c, _)| (*c as u64, node(*c)))
                    .collect();
                let streams: Vec<(u64, &str)> =
                    nodes.iter().map(|(key, node)| (*key, node.as_str())).collect();
                for client in self.fleet(member).surplus(streams.len() as u64, &streams) {
                    let client = usize::try_from(client).unwrap();
                    self.at.remove(&client);
                    self.connect(client, Some(member));
                    (moved, calm) = (moved + 1, false);
                }
            }
            if calm {
                return moved;
            }
        }
        panic!("members ask for ever: {:?}", self.at);
    }

    fn check(&self) {
        let mean = self.at.len() as f64 / self.members.len() as f64;
        for member in &self.members {
            let held = self.held(*member);
            assert!(held as f64 <= mean * 1.1 + 1.0, "member {member} holds {held}, the mean is {mean}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_member_holds_more_than_its_share_whoever_comes_and_goes(
        members in 1_usize..=5, clients in 1_usize..=1000, leaves in 0_usize..5
    ) {
        let mut played = Played::new(members);
        for client in 0..clients {
            played.connect(client, None);
        }
        played.check();

        // A member joins: not many more move than it is to have.
        let before = played.at.clone();
        played.members.insert(members);
        let asked = played.settle();
        played.check();
        let moved = before.iter().filter(|(client, at)| played.at[client] != **at).count();
        let share = clients.div_ceil(members + 1);
        prop_assert!(moved <= share + 1 && asked <= share + 1, "{moved} moved and {asked} asked of a share of {share}");

        // A member leaves: its own streams move; of the others none but what the bound asks for.
        let leaver = leaves % (members + 1);
        played.members.remove(&leaver);
        let before = played.at.clone();
        let orphans: Vec<usize> = before.iter().filter(|(_, at)| **at == leaver).map(|(c, _)| *c).collect();
        played.at.retain(|_, at| *at != leaver);
        for client in orphans {
            played.connect(client, None);
        }
        let asked = played.settle();
        played.check();
        prop_assert!(asked <= clients / 10 + members, "{asked} of {clients} were asked though nobody joined");
    }
}

#[test]
fn nothing_is_expected_of_members_that_have_not_told() {
    let mut fleet = Fleet { own: address(0), members: [(address(0), None), (address(1), None)].into() };
    assert!(fleet.admits(1000, 0));
    let streams: Vec<(u64, &str)> = (0..1000).map(|key| (key, "n")).collect();
    assert!(fleet.surplus(1000, &streams).is_empty());
    fleet.members.insert(address(1), Some(0));
    assert!(!fleet.admits(1000, 0), "the other has room");
    assert!(fleet.admits(1000, 1), "the other has refused");
    assert_eq!(fleet.surplus(1000, &streams).len(), 100, "a tenth at once");
    // Who is not among the members serves whoever comes.
    fleet.own = address(9);
    assert!(fleet.admits(1000, 0) && fleet.surplus(1000, &streams).is_empty());
}

#[tokio::test]
async fn only_who_understands_a_hint_is_refused_or_asked() {
    let fleet = Fleet { own: address(0), members: [(address(0), None), (address(1), Some(0))].into() };
    let (_keep, fleet) = watch::channel(fleet);
    let spread = Spread::new(fleet);
    let ours = spread.admit(Some(0)).unwrap();
    let envoys: Vec<Place> = (0..10).map(|_| spread.admit(None).unwrap()).collect();
    assert_eq!(spread.admit(Some(0)).unwrap_err(), Hint::Surplus);
    assert_eq!(*spread.streams().borrow(), 11);
    ours.belongs_to("a");
    assert_eq!((spread.ask(), spread.ask()), (1, 0), "nobody is asked twice");
    ours.moved().await;
    drop((ours, envoys));
    assert_eq!(*spread.streams().borrow(), 0);
}
