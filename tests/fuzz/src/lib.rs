//! What each fuzz target does with its bytes: one function for each, by the crate whose parser it drives.
//!
//! A target asserts more than that nothing panics: what was read and written again is the same, what was made normal
//! stays as it is, what is made of an input is not much larger, and two parsers that see the same bytes agree.
//! `tests/fuzz/run` builds and runs them; [`seeds`] has inputs to begin with.

pub mod agent;
pub mod ca;
pub mod connection;
// The proxy keeps it to itself.
#[path = "../../../proxy/src/upstream/dns/message.rs"]
mod dns_message;
pub mod istiod;
pub mod proxy;
pub mod registry;
pub mod seeds;
pub mod wire;
pub mod xds;

/// The first byte, which chooses among variants, and the rest.
fn choice(bytes: &[u8]) -> Option<(u8, &[u8])> {
    bytes.split_first().map(|(first, rest)| (*first, rest))
}

/// Bytes that are text.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}
