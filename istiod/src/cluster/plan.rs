//! What the leader does next, so that Raft's members become those of [`ClusterState`]. Pure.
//!
//! A step at a time: who is new becomes a learner, who has gone leaves, and the voters change in one joint change when
//! all that shall vote have caught up and a majority of them is heard. A leader that shall not vote any more hands over
//! first. Members that want to vote are let in two at a time, so that one becomes three and three become five.

use std::collections::{BTreeMap, BTreeSet};

use super::{ClusterCommand, ClusterState};
use crate::raft::node::{Progress, Status};
use crate::raft::wire::{ConfChangeSingle, ConfChangeType, ConfChangeV2};

/// A member whose log is at most this many entries behind has caught up: one or two messages bring the rest.
pub const LAG: u64 = 500;

/// The leader's next step.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Raft's members change.
    Change(ConfChangeV2),
    /// The log is asked for other voters.
    Propose(ClusterCommand),
    /// Leadership moves to this member.
    Transfer(u64),
    /// Nothing, or not yet: why, for people.
    Wait(Option<String>),
}

/// The next step of the leader whose `status` this is. `progress` is how far the others are, and who was heard.
#[must_use]
pub fn next(cluster: &ClusterState, status: &Status, progress: &BTreeMap<u64, Progress>) -> Step {
    if !status.leading || cluster.members().is_empty() || !status.outgoing.is_empty() {
        return Step::Wait(None);
    }
    let now = Now::new(cluster, status, progress);
    now.hand_over()
        .or_else(|| now.change_learners())
        .or_else(|| now.change_voters())
        .or_else(|| now.replacement())
        .or_else(|| now.promotion())
        .unwrap_or(Step::Wait(None))
}

/// Whether a member has caught up with a leader whose log ends at `last`. One that has nothing yet has not, however
/// short the log is.
#[must_use]
pub fn caught_up(progress: Progress, last: u64) -> bool {
    progress.active && progress.matched > 0 && progress.matched + LAG >= last
}

struct Now<'a> {
    cluster: &'a ClusterState,
    status: &'a Status,
    progress: &'a BTreeMap<u64, Progress>,
    voters: BTreeSet<u64>,
    learners: BTreeSet<u64>,
    wanted: &'a BTreeSet<u64>,
}

impl<'a> Now<'a> {
    fn new(cluster: &'a ClusterState, status: &'a Status, progress: &'a BTreeMap<u64, Progress>) -> Self {
        Self {
            cluster,
            status,
            progress,
            voters: status.voters.iter().copied().collect(),
            learners: status.learners.iter().copied().collect(),
            wanted: cluster.voters(),
        }
    }

    fn is_here(&self, id: u64) -> bool {
        id == self.status.id || self.progress.get(&id).is_some_and(|progress| progress.active)
    }

    fn is_ready(&self, id: u64) -> bool {
        let ready = |progress: &Progress| caught_up(*progress, self.status.last_index);
        id == self.status.id || self.progress.get(&id).is_some_and(ready)
    }

    /// A leader that does not vote, or shall not, lets a voter lead.
    fn hand_over(&self) -> Option<Step> {
        let id = self.status.id;
        if self.voters.contains(&id) && self.wanted.contains(&id) {
            return None;
        }
        let stay: BTreeSet<u64> = self.voters.intersection(self.wanted).copied().collect();
        let among = if stay.is_empty() && !self.voters.contains(&id) { &self.voters } else { &stay };
        let matched = |id: &u64| self.progress.get(id).map_or(0, |progress| progress.matched);
        let best = among.iter().filter(|other| **other != id && self.is_here(**other));
        best.max_by_key(|id| (matched(id), **id)).map(|id| Step::Transfer(*id))
    }

    /// New members become learners, and learners that are no members leave.
    fn change_learners(&self) -> Option<Step> {
        let mut known = self.voters.union(&self.learners);
        let known: BTreeSet<u64> = known.by_ref().copied().collect();
        let new = self.cluster.members().keys().find(|id| !known.contains(id));
        if let Some(id) = new {
            return Some(one(ConfChangeType::AddLearnerNode, *id));
        }
        let gone = self.learners.iter().find(|id| self.cluster.member(**id).is_none());
        gone.map(|id| one(ConfChangeType::RemoveNode, *id))
    }

    /// All voters that are to change, in one joint change.
    fn change_voters(&self) -> Option<Step> {
        if self.voters == *self.wanted {
            return None;
        }
        let coming: Vec<u64> = self.wanted.difference(&self.voters).copied().collect();
        let late: BTreeSet<u64> = coming.iter().copied().filter(|id| !self.is_ready(*id)).collect();
        if !late.is_empty() {
            return Some(wait(format!("waiting for {} to catch up before it votes", super::listed(&late))));
        }
        let here = self.wanted.iter().filter(|id| self.is_here(**id)).count();
        if here * 2 <= self.wanted.len() {
            return Some(wait(format!(
                "only {here} of the members that shall vote ({}) are heard: the voters stay as they are",
                super::listed(self.wanted)
            )));
        }
        let mut changes: Vec<ConfChangeSingle> =
            coming.into_iter().map(|id| single(ConfChangeType::AddNode, id)).collect();
        changes.extend(self.voters.difference(self.wanted).map(|id| {
            let stays = self.cluster.member(*id).is_some();
            single(if stays { ConfChangeType::AddLearnerNode } else { ConfChangeType::RemoveNode }, *id)
        }));
        Some(Step::Change(ConfChangeV2 { changes, ..ConfChangeV2::default() }))
    }

    /// A member that replaces another one and has caught up takes its place.
    fn replacement(&self) -> Option<Step> {
        let mut members = self.cluster.members().iter();
        members.find_map(|(id, member)| {
            let old = member.replaces.filter(|old| self.cluster.member(*old).is_some())?;
            if !self.is_ready(*id) {
                return None;
            }
            let mut voters = self.wanted.clone();
            if voters.remove(&old) {
                voters.insert(*id);
            }
            Some(self.propose(voters, [old].into()))
        })
    }

    /// Two more voters, as long as there are fewer than five.
    fn promotion(&self) -> Option<Step> {
        let candidates = self.cluster.members().iter().filter(|(id, member)| {
            let waits = member.replaces.is_some_and(|old| self.cluster.member(old).is_some());
            member.wants_vote && !waits && !self.wanted.contains(id) && self.is_ready(**id)
        });
        let next: Vec<u64> = candidates.map(|(id, _)| *id).take(2).collect();
        if self.wanted.len() >= 5 || next.len() < 2 {
            return None;
        }
        let mut voters = self.wanted.clone();
        voters.extend(next);
        Some(self.propose(voters, BTreeSet::new()))
    }

    fn propose(&self, voters: BTreeSet<u64>, remove: BTreeSet<u64>) -> Step {
        Step::Propose(ClusterCommand::Change { expected: self.wanted.clone(), voters, remove })
    }
}

fn wait(why: String) -> Step {
    Step::Wait(Some(why))
}

fn single(kind: ConfChangeType, id: u64) -> ConfChangeSingle {
    ConfChangeSingle { change_type: kind.into(), node_id: id }
}

fn one(kind: ConfChangeType, id: u64) -> Step {
    Step::Change(ConfChangeV2 { changes: vec![single(kind, id)], ..ConfChangeV2::default() })
}

#[cfg(test)]
mod tests {
    use ca::authn::Hash;

    use super::*;
    use crate::cluster::{Description, TicketRecord};
    use crate::raft::part::Part as _;

    /// Members of which the first vote: `(number, what it replaces)`.
    fn cluster(voters: &[u64], others: &[(u64, Option<u64>)]) -> ClusterState {
        let mut state = ClusterState::default();
        state.apply(1, ClusterCommand::Found { id: 1, description: Description::default() });
        let mut add = |id: u64, replaces: Option<u64>| {
            let secret = Hash::of(&id.to_be_bytes());
            let ticket = TicketRecord { secret, expires_at: 9, wants_vote: true, replaces, redeemed: None };
            let name = id.to_string();
            state.apply(2, ClusterCommand::AddTicket { id: name.clone(), ticket });
            let description = Description::default();
            let enrol = ClusterCommand::Enrol { ticket: name, secret, instance: secret, description, now: 1 };
            state.apply(3, enrol);
        };
        voters.iter().filter(|id| **id != 1).for_each(|id| add(*id, None));
        others.iter().for_each(|(id, replaces)| add(*id, *replaces));
        let command = ClusterCommand::Change {
            expected: [1].into(),
            voters: voters.iter().copied().collect(),
            remove: BTreeSet::new(),
        };
        state.apply(4, command);
        state
    }

    fn status(id: u64, voters: &[u64], learners: &[u64]) -> Status {
        Status {
            id,
            leading: true,
            last_index: 10_000,
            voters: voters.to_vec(),
            learners: learners.to_vec(),
            ..Status::default()
        }
    }

    fn progress(of: &[(u64, u64, bool)]) -> BTreeMap<u64, Progress> {
        of.iter()
            .map(|(id, matched, active)| (*id, Progress { matched: *matched, active: *active }))
            .collect()
    }

    fn changes(step: &Step) -> Vec<(ConfChangeType, u64)> {
        let Step::Change(change) = step else { panic!("{step:?}") };
        change.changes.iter().map(|single| (single.change_type(), single.node_id)).collect()
    }

    fn proposed(step: &Step) -> (Vec<u64>, Vec<u64>) {
        let Step::Propose(ClusterCommand::Change { voters, remove, .. }) = step else { panic!("{step:?}") };
        (voters.iter().copied().collect(), remove.iter().copied().collect())
    }

    use ConfChangeType::{AddLearnerNode, AddNode, RemoveNode};

    #[test]
    fn one_becomes_three_in_one_joint_change_and_never_two() {
        let state = cluster(&[1], &[(2, None), (3, None)]);
        let step = next(&state, &status(1, &[1], &[]), &progress(&[]));
        assert_eq!(changes(&step), [(AddLearnerNode, 2)]);
        let step = next(&state, &status(1, &[1], &[2]), &progress(&[(2, 0, true)]));
        assert_eq!(changes(&step), [(AddLearnerNode, 3)]);
        let both = status(1, &[1], &[2, 3]);
        let step = next(&state, &both, &progress(&[(2, 10_000, true), (3, 0, true)]));
        assert_eq!(step, Step::Wait(None), "one that has caught up waits for the other");
        let ready = progress(&[(2, 9_900, true), (3, 9_800, true)]);
        assert_eq!(proposed(&next(&state, &both, &ready)), (vec![1, 2, 3], vec![]));
        let decided = cluster(&[1, 2, 3], &[]);
        assert_eq!(changes(&next(&decided, &both, &ready)), [(AddNode, 2), (AddNode, 3)]);
        assert_eq!(next(&decided, &status(1, &[1, 2, 3], &[]), &ready), Step::Wait(None));
        let joint = Status { outgoing: vec![1], ..status(1, &[1, 2, 3], &[]) };
        assert_eq!(next(&decided, &joint, &ready), Step::Wait(None), "a change is under way");
    }

    #[test]
    fn who_is_silent_or_late_does_not_vote_yet() {
        let decided = cluster(&[1, 2, 3], &[]);
        let both = status(1, &[1], &[2, 3]);
        for late in [
            progress(&[(2, 10_000, true), (3, 9_000, true)]),
            progress(&[(2, 10_000, true), (3, 10_000, false)]),
        ] {
            let Step::Wait(Some(why)) = next(&decided, &both, &late) else { panic!("must wait") };
            assert!(why.contains("waiting for 3"), "{why}");
        }
    }

    #[test]
    fn voters_stay_when_most_of_the_new_ones_are_not_heard() {
        // From five to one that is silent: nobody could commit afterwards.
        let state = cluster(&[1], &[(2, None), (3, None)]);
        let silent = progress(&[(2, 10_000, true), (3, 10_000, true), (1, 10_000, false)]);
        let step = next(&state, &status(2, &[1, 2, 3], &[]), &silent);
        let Step::Wait(Some(why)) = step else { panic!("{step:?}") };
        assert!(why.contains("stay as they are"), "{why}");
    }

    #[test]
    fn a_member_that_replaces_another_takes_its_place_when_it_is_ready() {
        let state = cluster(&[1, 2, 3], &[(4, Some(3))]);
        let now = status(1, &[1, 2, 3], &[4]);
        let late = progress(&[(2, 10_000, true), (3, 50, false), (4, 50, true)]);
        assert_eq!(next(&state, &now, &late), Step::Wait(None));
        let ready = progress(&[(2, 10_000, true), (3, 50, false), (4, 10_000, true)]);
        assert_eq!(proposed(&next(&state, &now, &ready)), (vec![1, 2, 4], vec![3]));
        let mut after = state;
        let Step::Propose(command) = next(&after.clone(), &now, &ready) else { panic!("must propose") };
        after.apply(9, command);
        assert_eq!(changes(&next(&after, &now, &ready)), [(AddNode, 4), (RemoveNode, 3)]);
    }

    #[test]
    fn a_leader_that_shall_not_vote_hands_over_first() {
        let mut state = cluster(&[1, 2, 3], &[(4, None)]);
        let command = ClusterCommand::Change {
            expected: [1, 2, 3].into(),
            voters: [2, 3, 4].into(),
            remove: [1].into(),
        };
        state.apply(9, command);
        let far = progress(&[(2, 9_990, true), (3, 10_000, true), (4, 10_000, true)]);
        assert_eq!(next(&state, &status(1, &[1, 2, 3], &[4]), &far), Step::Transfer(3));
        let heard = progress(&[(1, 10_000, true), (2, 9_990, true), (4, 10_000, true)]);
        let step = next(&state, &status(3, &[1, 2, 3], &[4]), &heard);
        assert_eq!(changes(&step), [(AddNode, 4), (RemoveNode, 1)]);
        // A learner that was removed leaves by a simple change.
        let step = next(&state, &status(3, &[2, 3, 4], &[1]), &heard);
        assert_eq!(changes(&step), [(RemoveNode, 1)]);
    }

    #[test]
    fn the_only_voter_can_be_replaced() {
        let state = cluster(&[1], &[(2, Some(1))]);
        let ready = progress(&[(2, 10_000, true)]);
        let now = status(1, &[1], &[2]);
        assert_eq!(proposed(&next(&state, &now, &ready)), (vec![2], vec![1]));
        let mut after = state;
        let Step::Propose(command) = next(&after.clone(), &now, &ready) else { panic!("must propose") };
        after.apply(9, command);
        assert_eq!(changes(&next(&after, &now, &ready)), [(AddNode, 2), (RemoveNode, 1)]);
        assert_eq!(next(&after, &status(1, &[2], &[]), &ready), Step::Transfer(2));
    }
}
