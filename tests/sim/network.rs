//! The network between the members: it loses, delays, doubles, reorders and parts.

use std::collections::BTreeSet;

use istiod::raft::node::{Forward, Transport};
use istiod::raft::wire;
use prost::Message as _;
use raft::eraftpb::Message;

use crate::power::Power;

/// How the network is at the moment.
pub(crate) struct Network {
    /// Pairs from sender to receiver between which nothing goes.
    cut: BTreeSet<(u64, u64)>,
    /// Parts of a thousand that are lost,
    pub(crate) loss: u64,
    /// or come twice,
    pub(crate) twice: u64,
    /// or come very late.
    pub(crate) late: u64,
    /// The usual delay, in microseconds.
    pub(crate) delay_us: (u64, u64),
}

impl Network {
    pub(crate) fn new() -> Self {
        Self { cut: BTreeSet::new(), loss: 0, twice: 0, late: 0, delay_us: (200, 5_000) }
    }

    /// Everything works again.
    pub(crate) fn heal(&mut self) {
        *self = Self::new();
    }

    /// Nothing goes from one member to another any more.
    pub(crate) fn cut(&mut self, from: u64, to: u64) {
        self.cut.insert((from, to));
    }

    /// All members can reach each other again; loss and delay stay.
    pub(crate) fn mend(&mut self) {
        self.cut.clear();
    }

    /// When a message arrives, in microseconds from now: never, once, or more than once.
    pub(crate) fn route(&self, rng: &mut fastrand::Rng, from: u64, to: u64) -> Vec<u64> {
        if self.cut.contains(&(from, to)) || rng.u64(0..1000) < self.loss {
            return Vec::new();
        }
        let copies = if rng.u64(0..1000) < self.twice { 2 } else { 1 };
        let mut delay = || {
            let usual = rng.u64(self.delay_us.0..=self.delay_us.1);
            if rng.u64(0..1000) < self.late { usual + rng.u64(0..2_000_000) } else { usual }
        };
        (0..copies).map(|_| delay()).collect()
    }
}

/// A message on its way, as the bytes that go over a real wire.
pub(crate) struct Packet {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) bytes: Vec<u8>,
    /// It carries a snapshot.
    pub(crate) snapshot: bool,
    /// How long after the beginning of the step it was sent, in microseconds.
    pub(crate) after_us: u64,
}

/// What a member sends in one step. Each message is a point at which the member can end.
pub(crate) struct Outbox {
    pub(crate) power: Power,
    pub(crate) packets: Vec<Packet>,
    pub(crate) forwards: Vec<Forward>,
}

impl Transport for Outbox {
    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            if self.power.draw().is_err() {
                return;
            }
            self.packets.push(Packet {
                from: message.from,
                to: message.to,
                snapshot: message.snapshot.is_some(),
                bytes: wire::Message::from(&message).encode_to_vec(),
                after_us: self.power.spent_us(),
            });
        }
    }

    fn forward(&mut self, forwards: Vec<Forward>) {
        for forward in forwards {
            if self.power.draw().is_err() {
                return;
            }
            self.forwards.push(forward);
        }
    }
}

/// The message that some bytes are.
pub(crate) fn decode(bytes: &[u8]) -> Result<Message, String> {
    let message = wire::Message::decode(bytes).map_err(|error| error.to_string())?;
    Message::try_from(message).map_err(|error| error.to_string())
}
