//! Parsers of the control plane: what members send and keep, and what operators send.

use std::path::Path;
use std::sync::Arc;

use istiod::api::page::After;
use istiod::api::select::Selection;
use istiod::api::types::Listing;
use istiod::cluster::ticket::Ticket;
use istiod::raft::disk::Disk;
use istiod::raft::disk::memory::MemoryDisk;
use istiod::raft::log::Log;
use istiod::raft::log::wal::Wal;
use istiod::raft::sessions::Sessions;
use istiod::raft::state_machine::{Command, View};
use istiod::raft::wire as raft_wire;
use prost::Message as _;
use raft::eraftpb;
use registry::config::{Kind, Object};

use crate::{choice, text};

/// Messages of peers: what the mirror reads, Raft's own form holds, and nothing is added or lost.
pub fn message(bytes: &[u8]) {
    let Some((kind, rest)) = choice(bytes) else { return };
    match kind % 3 {
        0 => {
            let Ok(message) = raft_wire::Message::decode(rest) else { return };
            let Ok(raft) = eraftpb::Message::try_from(message) else { return };
            let back = raft_wire::Message::decode(&*raft_wire::Message::from(&raft).encode_to_vec());
            let again = eraftpb::Message::try_from(back.expect("what was written is read"));
            assert_eq!(again.as_ref(), Ok(&raft));
        }
        1 => {
            let Ok(change) = raft_wire::ConfChangeV2::decode(rest) else { return };
            let _change = eraftpb::ConfChangeV2::try_from(change);
        }
        _ => {
            let Ok(sessions) = raft_wire::Sessions::decode(rest) else { return };
            let mut table = Sessions::from_wire(sessions);
            for client in table.to_wire().sessions {
                for sequence in [0, 1, client.last_index, u64::MAX] {
                    let first = table.admit(client.client, sequence, client.last_index);
                    assert!(
                        !table.admit(client.client, sequence, client.last_index),
                        "{first}: admitted twice"
                    );
                }
            }
        }
    }
}

/// Entries of the log and states in snapshots: what is read is written the same.
pub fn command(bytes: &[u8]) {
    let Some((kind, rest)) = choice(bytes) else { return };
    if kind & 1 == 0 {
        let Ok((command, origin)) = Command::decode_as(1, rest) else { return };
        let write = |command: &Command| match &origin {
            Some(origin) => command.encode_as(origin),
            None => command.encode(),
        };
        let written = write(&command).expect("a command that was read has a stored form");
        let (again, same) = Command::decode_as(1, &written).expect("what was written is read");
        assert_eq!(same, origin);
        assert_eq!(write(&again).ok(), Some(written));
    } else if let Ok(view) = View::decode(1, rest) {
        let written = view.encode();
        let again = View::decode(1, &written).expect("what was written is read");
        assert_eq!(again.encode(), written);
    }
}

const FOLDER: &str = "log";
const FIRST_FRAME: usize = 512;

/// One frame of the log's first file at `offset`, whose checksums are right whatever the body is.
fn frame(sequence: u64, body: &[u8], offset: usize) -> Vec<u8> {
    let mut out = b"ISFR".to_vec();
    out.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(sequence.to_le_bytes());
    out.extend(crc32c::crc32c(body).to_le_bytes());
    let place = [1_u64.to_le_bytes(), (offset as u64).to_le_bytes()].concat();
    out.extend(crc32c::crc32c_append(crc32c::crc32c(&place), &out).to_le_bytes());
    out.extend(body);
    out.push(0xa5);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// A log as it lies on disk: it is opened whole, and then again with the same content, or what is wrong is told.
pub fn log(bytes: &[u8]) {
    let Some((how, mut rest)) = choice(bytes) else { return };
    let disk = MemoryDisk::new();
    let folder = Path::new(FOLDER);
    drop(Wal::open(Arc::new(disk.clone()), folder, 7, 1 << 20).expect("an empty log"));
    let name = disk.list(folder).expect("a folder").remove(0);
    let mut content = Vec::new();
    if how & 1 == 0 {
        content.extend_from_slice(rest);
    } else {
        for sequence in 1.. {
            let Some(([hi, lo], tail)) = rest.split_first_chunk::<2>() else { break };
            let length = usize::from(u16::from_be_bytes([*hi, *lo])).min(tail.len());
            let (body, tail) = tail.split_at(length);
            rest = tail;
            // the sequence in the body is the one in the head
            let body = match raft_wire::LogBatch::decode(body) {
                Ok(batch) => raft_wire::LogBatch { sequence, ..batch }.encode_to_vec(),
                Err(_) => body.to_vec(),
            };
            content.extend(frame(sequence, &body, FIRST_FRAME + content.len()));
        }
    }
    let mut file = disk.open(&folder.join(name)).expect("the first file");
    file.write_at(&content, FIRST_FRAME as u64).expect("room");
    let Ok(wal) = Wal::open(Arc::new(disk.clone()), folder, 7, 1 << 20) else { return };
    let seen = (wal.start(), wal.last_index(), wal.hard_state().clone());
    assert!(wal.last_index() >= wal.start().0);
    let all = |wal: &Wal| wal.entries(wal.first_index(), wal.last_index() + 1, None);
    let entries = all(&wal).expect("entries from the first to the last");
    for (at, entry) in entries.iter().enumerate() {
        assert_eq!(entry.index, wal.first_index() + at as u64);
    }
    drop(wal);
    let again = Wal::open(Arc::new(disk), folder, 7, 1 << 20).expect("what was opened once");
    assert_eq!((again.start(), again.last_index(), again.hard_state().clone()), seen);
    assert_eq!(all(&again).expect("the same entries"), entries);
}

/// Texts of operators: tickets, places in lists, selectors, headers of backups.
pub fn texts(bytes: &[u8]) {
    let Some((kind, rest)) = choice(bytes) else { return };
    if kind % 4 == 3 {
        let _header = istiod::backup::header(&mut &*rest);
        return;
    }
    let Some(text) = text(rest) else { return };
    match kind % 4 {
        0 => {
            use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
            let encoded = format!("istiod-ticket-{}", BASE64_URL_SAFE_NO_PAD.encode(text));
            let Ok(ticket) = Ticket::parse(text).or_else(|_| Ticket::parse(&encoded)) else { return };
            let written = ticket.to_text();
            assert!(written.len() > 8192 || Ticket::parse(&written) == Ok(ticket));
        }
        1 => {
            let Ok(after) = After::parse(text) else { return };
            assert_eq!(After::parse(&after.to_text()).ok(), Some(after));
        }
        _ => {
            let (labels, fields) = text.split_once('\n').unwrap_or((text, ""));
            let listing = Listing {
                label_selector: Some(labels.to_owned()),
                field_selector: Some(fields.to_owned()),
                ..Listing::default()
            };
            let Ok(selection) = Selection::parse(&listing) else { return };
            let spec = serde_json::json!({"host": "a", "http": [{"match": []}]});
            let _meant = selection.matches(&Object::new(Kind::VirtualService, "shop", "a", spec));
        }
    }
}
