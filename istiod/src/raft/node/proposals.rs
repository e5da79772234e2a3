//! Proposals of this member on their way into the log, whoever leads.
//!
//! Each is kept until it is applied here. The leader has it, or it waits for a leader; when the leader changes, it is
//! given to the next one under the same name, and the table of sessions lets it take effect once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use bytes::Bytes;

use super::{Answer, Output, Refusal};

/// The proposals that are not applied yet, by number.
#[derive(Default)]
pub(super) struct Proposals {
    open: BTreeMap<u64, Open>,
    /// Those that no leader of the current term was given.
    due: BTreeSet<u64>,
    /// Those to be given again after a tick.
    later: BTreeSet<u64>,
    /// The term in which all others were given.
    term: u64,
}

struct Open {
    proposal: Bytes,
    deadline: Instant,
    /// How often it was given to a leader.
    given: u32,
}

impl Proposals {
    pub(super) fn add(&mut self, sequence: u64, proposal: Bytes, deadline: Instant) {
        self.open.insert(sequence, Open { proposal, deadline, given: 0 });
        self.due.insert(sequence);
    }

    /// Takes what is to be given to the leader of `term`, in order; all of it counts as given.
    pub(super) fn give(&mut self, term: u64) -> Vec<(u64, Bytes)> {
        if self.term != term {
            self.term = term;
            // Whether the last leader's log still counts is not known: the next one is given everything.
            self.due = self.open.keys().copied().collect();
            self.later.clear();
        }
        let mut given = Vec::with_capacity(self.due.len());
        for sequence in std::mem::take(&mut self.due) {
            if let Some(open) = self.open.get_mut(&sequence) {
                open.given += 1;
                given.push((sequence, open.proposal.clone()));
            }
        }
        given
    }

    /// The leader did not take it; it is given again after a tick.
    pub(super) fn give_later(&mut self, sequence: u64) {
        if self.open.contains_key(&sequence) {
            self.later.insert(sequence);
        }
    }

    /// A tick has passed.
    pub(super) fn tick(&mut self) {
        self.due.append(&mut self.later);
    }

    /// The leader refused it. That is the answer, unless an earlier leader may have it in its log.
    pub(super) fn refused<A>(&mut self, sequence: u64, refusal: Refusal, out: &mut Output<A>) {
        match self.open.get(&sequence) {
            Some(open) if open.given > 1 => self.give_later(sequence),
            Some(_) => self.ended(sequence, Answer::Refused(refusal), out),
            None => {}
        }
    }

    pub(super) fn ended<A>(&mut self, sequence: u64, answer: Answer<A>, out: &mut Output<A>) {
        if self.open.remove(&sequence).is_some() {
            out.answers.push((sequence, answer));
        }
    }

    pub(super) fn expire<A>(&mut self, now: Instant, out: &mut Output<A>) {
        self.open.retain(|sequence, open| {
            let waits = open.deadline > now;
            if !waits {
                let refusal = if open.given == 0 { Refusal::NoLeader } else { Refusal::Unknown };
                out.answers.push((*sequence, Answer::Refused(refusal)));
            }
            waits
        });
        self.due.retain(|sequence| self.open.contains_key(sequence));
        self.later.retain(|sequence| self.open.contains_key(sequence));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn numbers(given: Vec<(u64, Bytes)>) -> Vec<u64> {
        given.into_iter().map(|(sequence, _)| sequence).collect()
    }

    #[test]
    fn each_leader_is_given_everything_once_and_what_it_did_not_take_again_after_a_tick() {
        let now = tokio::time::Instant::now().into_std();
        let (mut proposals, mut out) = (Proposals::default(), Output::<()>::default());
        for sequence in 1..=3 {
            proposals.add(sequence, Bytes::new(), now + Duration::from_secs(1));
        }
        assert_eq!(numbers(proposals.give(7)), [1, 2, 3]);
        assert!(proposals.give(7).is_empty(), "once");
        proposals.give_later(2);
        assert!(proposals.give(7).is_empty(), "not before a tick");
        proposals.tick();
        assert_eq!(numbers(proposals.give(7)), [2]);
        proposals.ended(1, Answer::Applied(9, ()), &mut out);
        assert_eq!(numbers(proposals.give(8)), [2, 3], "the next leader is given what is not applied");
    }

    #[test]
    fn a_refusal_is_the_answer_only_if_no_earlier_leader_may_have_it() {
        let now = tokio::time::Instant::now().into_std();
        let (mut proposals, mut out) = (Proposals::default(), Output::<()>::default());
        proposals.add(1, Bytes::new(), now + Duration::from_secs(1));
        proposals.give(7);
        proposals.add(2, Bytes::new(), now + Duration::from_secs(1));
        proposals.give(8);
        proposals.refused(1, Refusal::Busy, &mut out);
        proposals.refused(2, Refusal::Busy, &mut out);
        assert!(matches!(out.answers.as_slice(), [(2, Answer::Refused(Refusal::Busy))]), "{:?}", out.answers);
        proposals.add(3, Bytes::new(), now);
        proposals.expire(now + Duration::from_secs(1), &mut out);
        assert!(
            matches!(
                out.answers.as_slice(),
                [_, (1, Answer::Refused(Refusal::Unknown)), (3, Answer::Refused(Refusal::NoLeader))]
            ),
            "{:?}",
            out.answers
        );
    }
}
