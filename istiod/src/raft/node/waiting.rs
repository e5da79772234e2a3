//! Who waits for what: changes of members until they are applied, reads until what they may see is applied.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{Answer, Output, Refusal};

/// Changes of members on their way, with their deadlines.
#[derive(Default)]
pub(super) struct Waiting {
    deadlines: BTreeMap<u64, Instant>,
}

impl Waiting {
    /// Notes that a request is on its way, or answers that it is not.
    pub(super) fn started<A>(
        &mut self,
        sequence: u64,
        result: Result<(), Refusal>,
        deadline: Instant,
        out: &mut Output<A>,
    ) {
        match result {
            Ok(()) => drop(self.deadlines.insert(sequence, deadline)),
            Err(refusal) => out.answers.push((sequence, Answer::Refused(refusal))),
        }
    }

    pub(super) fn ended<A>(&mut self, sequence: u64, answer: Answer<A>, out: &mut Output<A>) {
        if self.deadlines.remove(&sequence).is_some() {
            out.answers.push((sequence, answer));
        }
    }

    pub(super) fn expire<A>(&mut self, now: Instant, out: &mut Output<A>) {
        self.deadlines.retain(|sequence, deadline| {
            let waits = *deadline > now;
            if !waits {
                out.answers.push((*sequence, Answer::Refused(Refusal::Unknown)));
            }
            waits
        });
    }
}

/// Reads on their way. All that arrive together share one round of Raft's read index.
pub(super) struct Reads {
    /// With the round's number this is unique in the cluster.
    client: u64,
    rounds: u64,
    new: Vec<(u64, Instant)>,
    asked: BTreeMap<u64, Round>,
    /// By the index that must be applied.
    confirmed: BTreeMap<u64, Vec<(u64, Instant)>>,
}

struct Round {
    reads: Vec<(u64, Instant)>,
    again_at: Instant,
}

impl Reads {
    pub(super) fn new(client: u64) -> Self {
        Self { client, rounds: 0, new: Vec::new(), asked: BTreeMap::new(), confirmed: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, sequence: u64, deadline: Instant) {
        self.new.push((sequence, deadline));
    }

    /// The context of a round to ask now, for new reads and for those whose round got no answer.
    pub(super) fn next_round(&mut self, now: Instant, retry: Duration) -> Option<Vec<u8>> {
        let stale: Vec<u64> =
            self.asked.iter().filter(|(_, round)| round.again_at <= now).map(|(number, _)| *number).collect();
        for number in stale {
            self.new.extend(self.asked.remove(&number).map(|round| round.reads).unwrap_or_default());
        }
        if self.new.is_empty() {
            return None;
        }
        self.rounds += 1;
        let round = Round { reads: std::mem::take(&mut self.new), again_at: now + retry };
        self.asked.insert(self.rounds, round);
        let mut context = self.client.to_be_bytes().to_vec();
        context.extend_from_slice(&self.rounds.to_be_bytes());
        Some(context)
    }

    /// A round has been confirmed: its reads may see everything up to `index`.
    pub(super) fn confirmed(&mut self, context: &[u8], index: u64) {
        let Some((client, number)) = context.split_first_chunk::<8>() else { return };
        let Ok(number) = <[u8; 8]>::try_from(number).map(u64::from_be_bytes) else { return };
        if u64::from_be_bytes(*client) != self.client {
            return;
        }
        if let Some(round) = self.asked.remove(&number) {
            self.confirmed.entry(index).or_default().extend(round.reads);
        }
    }

    pub(super) fn answer<A>(&mut self, applied: u64, out: &mut Output<A>) {
        while let Some(entry) = self.confirmed.first_entry().filter(|entry| *entry.key() <= applied) {
            let (index, reads) = entry.remove_entry();
            out.answers.extend(reads.into_iter().map(|(sequence, _)| (sequence, Answer::Readable(index))));
        }
    }

    pub(super) fn expire<A>(&mut self, now: Instant, out: &mut Output<A>) {
        let mut keep = |reads: &mut Vec<(u64, Instant)>| {
            reads.retain(|(sequence, deadline)| {
                let waits = *deadline > now;
                if !waits {
                    out.answers.push((*sequence, Answer::Refused(Refusal::Unknown)));
                }
                waits
            });
            !reads.is_empty()
        };
        keep(&mut self.new);
        self.asked.retain(|_, round| keep(&mut round.reads));
        self.confirmed.retain(|_, reads| keep(reads));
    }
}
