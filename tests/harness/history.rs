//! What clients asked and were told, and whether one register per key could have told them so. For clients of the
//! simulation and of real processes alike.

use std::collections::BTreeMap;

use todc_utils::linearizability::WGLChecker;
use todc_utils::linearizability::history::{Action, History as Actions};
use todc_utils::specifications::Specification;

/// How a conditional write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swap {
    /// The condition held.
    Done,
    /// It did not.
    Conflict,
    /// Nobody knows.
    Maybe,
}

/// One operation on a key, with its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Read this.
    Get(Option<u64>),
    /// Wrote this value; no other operation writes it.
    Put(u64),
    /// Removed what was there.
    Delete,
    /// Wrote a value if another one was there.
    Swap {
        /// The condition.
        expected: Option<u64>,
        /// The new value.
        value: u64,
        /// What became of it.
        end: Swap,
    },
}

#[derive(Debug)]
struct Operation {
    key: usize,
    act: Act,
    invoked: usize,
    returned: Option<usize>,
    /// It was refused and had no effect.
    void: bool,
}

/// Names an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(usize);

/// Everything that clients did, in the order in which it began and ended.
#[derive(Debug, Default)]
pub struct History {
    operations: Vec<Operation>,
    moments: usize,
}

impl History {
    fn moment(&mut self) -> usize {
        self.moments += 1;
        self.moments
    }

    /// An operation begins.
    pub fn invoke(&mut self, key: usize, act: Act) -> Ticket {
        let invoked = self.moment();
        self.operations.push(Operation { key, act, invoked, returned: None, void: false });
        Ticket(self.operations.len() - 1)
    }

    /// An operation ends, with its answer.
    pub fn returned(&mut self, ticket: Ticket, act: Act) {
        let now = self.moment();
        if let Some(operation) = self.operations.get_mut(ticket.0) {
            (operation.act, operation.returned) = (act, Some(now));
        }
    }

    /// An operation was refused: it has no effect.
    pub fn refused(&mut self, ticket: Ticket) {
        if let Some(operation) = self.operations.get_mut(ticket.0) {
            operation.void = true;
        }
    }

    /// What an operation asked for.
    #[must_use]
    pub fn act(&self, ticket: Ticket) -> Option<Act> {
        self.operations.get(ticket.0).map(|operation| operation.act)
    }

    /// How many operations were answered.
    #[must_use]
    pub fn answered(&self) -> usize {
        self.operations.iter().filter(|operation| operation.returned.is_some()).count()
    }

    /// Linearizability (Herlihy and Wing): it holds for the whole if it holds for each key.
    ///
    /// # Errors
    ///
    /// The first key whose operations no order explains, with all of them.
    pub fn check(&self) -> Result<(), String> {
        let mut keys: BTreeMap<usize, Vec<&Operation>> = BTreeMap::new();
        for operation in self.operations.iter().filter(|operation| operation.counts()) {
            keys.entry(operation.key).or_default().push(operation);
        }
        for (key, operations) in keys {
            if !WGLChecker::<Register>::is_linearizable(Actions::from_actions(actions(&operations))) {
                let shown: Vec<String> = operations.iter().map(|operation| operation.show()).collect();
                return Err(format!("key {key}: no order explains\n  {}", shown.join("\n  ")));
            }
        }
        Ok(())
    }
}

impl Operation {
    /// A read without an answer says nothing, and what was refused did nothing.
    fn counts(&self) -> bool {
        !self.void && (self.returned.is_some() || !matches!(self.act, Act::Get(_)))
    }

    fn show(&self) -> String {
        let end = self.returned.map_or("never".to_owned(), |end| end.to_string());
        format!("{} .. {end}: {:?}", self.invoked, self.act)
    }
}

/// Calls and responses in order. What was never answered may take effect at any time, or after all that was seen,
/// which is as good as never: its response comes last.
fn actions(operations: &[&Operation]) -> Vec<(usize, Action<Act>)> {
    let mut moments: Vec<(usize, usize, Action<Act>)> = Vec::new();
    for (process, operation) in operations.iter().enumerate() {
        moments.push((operation.invoked, process, Action::Call(operation.act)));
        let returned = operation.returned.unwrap_or(usize::MAX);
        moments.push((returned, process, Action::Response(operation.act)));
    }
    moments.sort_by_key(|(moment, process, _)| (*moment, *process));
    moments.into_iter().map(|(_, process, action)| (process, action)).collect()
}

struct Register;

impl Specification for Register {
    type State = Option<u64>;
    type Operation = Act;

    fn init() -> Self::State {
        None
    }

    fn apply(act: &Act, state: &Self::State) -> (bool, Self::State) {
        match *act {
            Act::Get(found) => (found == *state, *state),
            Act::Put(value) => (true, Some(value)),
            Act::Delete => (true, None),
            Act::Swap { expected, value, end } => match (end, expected == *state) {
                (Swap::Done | Swap::Maybe, true) => (true, Some(value)),
                (Swap::Conflict | Swap::Maybe, false) => (true, *state),
                (Swap::Done, false) | (Swap::Conflict, true) => (false, *state),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each operation is `(act, invoked, returned)`, on one key.
    fn linearizable(operations: &[(Act, usize, Option<usize>)]) -> bool {
        let operations = operations.iter().map(|(act, invoked, returned)| Operation {
            key: 0,
            act: *act,
            invoked: *invoked,
            returned: *returned,
            void: false,
        });
        History { operations: operations.collect(), moments: 0 }.check().is_ok()
    }

    #[test]
    fn a_read_after_a_write_must_see_it() {
        assert!(linearizable(&[(Act::Put(1), 1, Some(2)), (Act::Get(Some(1)), 3, Some(4))]));
        assert!(!linearizable(&[(Act::Put(1), 1, Some(2)), (Act::Get(None), 3, Some(4))]));
        assert!(linearizable(&[(Act::Put(1), 1, Some(3)), (Act::Get(None), 2, Some(4))]), "they overlap");
    }

    #[test]
    fn what_was_never_answered_may_have_happened_once_but_not_twice() {
        let (put, other) = ((Act::Put(1), 1, None), (Act::Put(2), 2, Some(3)));
        assert!(linearizable(&[put, other, (Act::Get(Some(1)), 4, Some(5))]));
        assert!(linearizable(&[put, other, (Act::Get(Some(2)), 4, Some(5))]));
        let back = [put, other, (Act::Get(Some(1)), 4, Some(5)), (Act::Get(Some(2)), 6, Some(7))];
        assert!(!linearizable(&back), "2 cannot come back");
    }

    #[test]
    fn a_conditional_write_is_held_to_its_condition() {
        let swap = |end| Act::Swap { expected: Some(1), value: 2, end };
        let put = (Act::Put(1), 1, Some(2));
        assert!(linearizable(&[put, (swap(Swap::Done), 3, Some(4)), (Act::Get(Some(2)), 5, Some(6))]));
        assert!(!linearizable(&[put, (swap(Swap::Conflict), 3, Some(4))]));
        assert!(!linearizable(&[put, (Act::Delete, 3, Some(4)), (swap(Swap::Done), 5, Some(6))]));
        assert!(linearizable(&[put, (swap(Swap::Maybe), 3, None), (Act::Get(Some(1)), 5, Some(6))]));
    }
}
