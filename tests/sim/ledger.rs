//! What the rig knows of all members together, and the invariants that every new fact must keep.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use istiod::raft::wire::ConfState;

use crate::journal::Fact;
use crate::log::LogView;

/// An invariant that does not hold.
#[derive(Debug, Clone)]
pub(crate) struct Broken {
    /// Its name.
    pub(crate) invariant: &'static str,
    /// What was seen.
    pub(crate) seen: String,
}

impl Broken {
    pub(crate) fn new(invariant: &'static str, seen: impl Into<String>) -> Self {
        Self { invariant, seen: seen.into() }
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} does not hold: {}", self.invariant, self.seen)
    }
}

/// Whether an invariant holds.
pub(crate) type Check = Result<(), Broken>;

/// A committed entry.
struct Committed {
    term: u64,
    hash: u64,
    /// The term of the member that was first seen to know of it: leaders of later terms must have the entry.
    in_term: u64,
}

/// All facts of a run.
#[derive(Default)]
pub(crate) struct Ledger {
    /// Who led in each term.
    leaders: BTreeMap<u64, u64>,
    /// By index and term: the term before it and the hash.
    entries: BTreeMap<(u64, u64), (Option<u64>, u64)>,
    committed: BTreeMap<u64, Committed>,
    /// By index: the command's hash and the outcome's.
    applied: BTreeMap<u64, (u64, u64)>,
    encoded: BTreeMap<u64, u64>,
    published: BTreeMap<u64, u64>,
    members: (u64, ConfState),
    /// Everybody who was ever a member.
    ever: BTreeSet<u64>,
}

impl Ledger {
    /// Who the members are, as far as anybody has applied, and as of which index.
    pub(crate) fn members(&self) -> &(u64, ConfState) {
        &self.members
    }

    /// The founders, before anything is applied.
    pub(crate) fn found(&mut self, voters: &[u64]) {
        self.members = (1, ConfState { voters: voters.to_vec(), ..ConfState::default() });
        self.ever.extend(voters);
    }

    /// Everybody who was ever a member.
    pub(crate) fn ever(&self) -> &BTreeSet<u64> {
        &self.ever
    }

    /// The highest index that anybody knows to be committed.
    pub(crate) fn committed(&self) -> u64 {
        self.committed.last_key_value().map_or(1, |(index, _)| *index)
    }

    /// How many entries are known to be committed.
    pub(crate) fn commits(&self) -> usize {
        self.committed.len()
    }

    /// In how many terms somebody led.
    pub(crate) fn terms_led(&self) -> usize {
        self.leaders.len()
    }

    /// The hash of the command that was applied at an index.
    pub(crate) fn applied(&self, index: u64) -> Option<u64> {
        self.applied.get(&index).map(|(hash, _)| *hash)
    }

    /// Takes a fact of a member.
    pub(crate) fn take(&mut self, member: u64, fact: Fact) -> Check {
        match fact {
            Fact::Appended { index, term, before, hash } => {
                self.appended(member, (index, term), (before, hash))
            }
            Fact::Applied { index, hash, outcome } => {
                let known = *self.applied.entry(index).or_insert((hash, outcome));
                if known == (hash, outcome) {
                    return Ok(());
                }
                let what = if known.0 == hash { "with another outcome" } else { "another command" };
                Err(Broken::new(
                    "state machine safety",
                    format!("member {member} applied {what} at {index} than others"),
                ))
            }
            Fact::Encoded { index, hash } => {
                let known = *self.encoded.entry(index).or_insert(hash);
                if known == hash {
                    return Ok(());
                }
                let seen =
                    format!("the encoded state of member {member} at {index} differs from that of others");
                Err(Broken::new("identical encoded state", seen))
            }
            Fact::Published { revision, hash } => {
                let known = *self.published.entry(revision).or_insert(hash);
                if known == hash {
                    return Ok(());
                }
                let seen = format!("member {member} published another snapshot at {revision} than others");
                Err(Broken::new("identical snapshots at a revision", seen))
            }
            Fact::Members(index, members) => {
                self.ever
                    .extend(members.voters.iter().chain(&members.learners).chain(&members.learners_next));
                if index > self.members.0 {
                    self.members = (index, members);
                }
                Ok(())
            }
        }
    }

    /// Log matching (Raft, section 5.3): two logs that have an entry of the same index and term are the same up to
    /// it. It is enough that the entry and the term before it are the same: the rest follows from the entry before.
    fn appended(&mut self, member: u64, place: (u64, u64), (before, hash): (Option<u64>, u64)) -> Check {
        let known = *self.entries.entry(place).or_insert((before, hash));
        let same_before = known.0.is_none() || before.is_none() || known.0 == before;
        if known.1 == hash && same_before {
            return Ok(());
        }
        let (index, term) = place;
        let seen = format!("member {member} has another entry {index} of term {term} than others");
        Err(Broken::new("log matching", seen))
    }

    /// A member leads: the only one in this term, and with every entry that was committed before it.
    pub(crate) fn leads(&mut self, member: u64, term: u64, log: &LogView) -> Check {
        let known = *self.leaders.entry(term).or_insert(member);
        if known != member {
            let seen = format!("members {known} and {member} both lead in term {term}");
            return Err(Broken::new("election safety", seen));
        }
        let (start, _) = log.start();
        for (index, committed) in self.committed.range(start + 1..) {
            let found = log.entry(*index);
            if committed.in_term < term && found != Some((committed.term, committed.hash)) {
                let seen = format!(
                    "member {member} leads term {term} and has {} entry at {index}, which was committed by term {}",
                    found.map_or("no", |_| "another"),
                    committed.in_term
                );
                return Err(Broken::new("leader completeness", seen));
            }
        }
        Ok(())
    }

    /// A member in `term` knows that everything up to `until` is committed; `from` was checked before.
    pub(crate) fn commits_to(
        &mut self,
        member: u64,
        term: u64,
        (from, until): (u64, u64),
        log: &LogView,
    ) -> Check {
        for index in from.max(log.start().0) + 1..=until {
            let Some((entry_term, hash)) = log.entry(index) else {
                let seen = format!("member {member} has no entry {index}, which it holds to be committed");
                return Err(Broken::new("committed entries are in the log", seen));
            };
            let fresh = Committed { term: entry_term, hash, in_term: term };
            let known = self.committed.entry(index).or_insert(fresh);
            known.in_term = known.in_term.min(term);
            if (known.term, known.hash) != (entry_term, hash) {
                let seen = format!(
                    "member {member} committed entry {index} of term {entry_term}, others one of term {}",
                    known.term
                );
                return Err(Broken::new("state machine safety", seen));
            }
        }
        Ok(())
    }
}
