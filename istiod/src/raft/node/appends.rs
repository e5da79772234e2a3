//! Appends to one peer that continue each other leave as one message.
//!
//! The raft crate makes one for each proposal. It can join them itself (`batch_append`), but in 0.7 it also joins
//! entries to an empty append of another index, and the peer then takes them without the check of what is before.

use raft::eraftpb::{Message, MessageType};

/// Joins what belongs together, in order, up to `most_bytes` of entries in one message.
pub(super) fn join(messages: Vec<Message>, most_bytes: u64) -> Vec<Message> {
    let mut joined: Vec<(Message, u64)> = Vec::with_capacity(messages.len());
    for mut message in messages {
        let bytes = message.entries.iter().map(|entry| entry.data.len() as u64).sum::<u64>();
        let before = joined.iter_mut().rev().find(|(before, _)| before.to == message.to);
        match before {
            Some((before, held)) if continues(before, &message) && *held + bytes <= most_bytes => {
                let entries = before.take_entries().into_iter().chain(message.take_entries());
                before.set_entries(entries.collect());
                before.commit = message.commit;
                *held += bytes;
            }
            Some(_) | None => joined.push((message, bytes)),
        }
    }
    joined.into_iter().map(|(message, _)| message).collect()
}

/// Whether an append begins just where another ends.
fn continues(before: &Message, next: &Message) -> bool {
    let append = |message: &Message| message.get_msg_type() == MessageType::MsgAppend;
    let end =
        before.entries.last().map_or((before.index, before.log_term), |entry| (entry.index, entry.term));
    append(before) && append(next) && before.term == next.term && end == (next.index, next.log_term)
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;

    fn append(to: u64, (index, log_term): (u64, u64), entries: &[(u64, u64)]) -> Message {
        let entry = |(index, term): &(u64, u64)| Entry {
            index: *index,
            term: *term,
            data: vec![0; 10].into(),
            ..Entry::default()
        };
        let entries: Vec<Entry> = entries.iter().map(entry).collect();
        let mut message = Message {
            to,
            term: 5,
            index,
            log_term,
            commit: index,
            entries: entries.into(),
            ..Message::default()
        };
        message.set_msg_type(MessageType::MsgAppend);
        message
    }

    fn shape(messages: &[Message]) -> Vec<(u64, u64, usize, u64)> {
        messages.iter().map(|m| (m.to, m.index, m.entries.len(), m.commit)).collect()
    }

    #[test]
    fn appends_that_continue_each_other_are_one_and_others_stay_apart() {
        let messages = vec![
            append(2, (3, 1), &[(4, 5)]),
            append(3, (3, 1), &[(4, 5)]),
            append(2, (4, 5), &[(5, 5), (6, 5)]),
            append(2, (6, 5), &[]),
            append(3, (9, 5), &[(10, 5)]),
            append(2, (6, 4), &[(7, 5)]),
        ];
        let joined = join(messages, 1 << 20);
        assert_eq!(shape(&joined), [(2, 3, 3, 6), (3, 3, 1, 3), (3, 9, 1, 9), (2, 6, 1, 6)]);
    }

    #[test]
    fn an_empty_append_takes_no_entries_of_another_index() {
        let joined = join(vec![append(2, (8, 5), &[]), append(2, (5, 5), &[(6, 5)])], 1 << 20);
        assert_eq!(shape(&joined), [(2, 8, 0, 8), (2, 5, 1, 5)]);
    }

    #[test]
    fn a_message_is_cut_at_its_bytes() {
        let joined = join(vec![append(2, (3, 5), &[(4, 5)]), append(2, (4, 5), &[(5, 5)])], 19);
        assert_eq!(joined.len(), 2);
    }
}
