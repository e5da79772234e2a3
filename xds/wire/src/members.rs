//! How clients know the members of a control plane and choose among them: what both sides must agree on.
//!
//! A client prefers members in rendezvous order: each pair of node and member has a score, and the highest comes
//! first. So clients spread evenly without talking to each other, and when a member joins or leaves, only those move
//! whose first choice it is. A member is named by the address that clients call, `HOST:PORT`.
//!
//! On a stream the members are told in gRPC metadata: [`MEMBERS`] with every answer, [`MOVE`] where a client is sent
//! elsewhere. Clients that do not know these words are served all the same.

use std::fmt;

use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use xxhash_rust::xxh3::xxh3_64;

/// Metadata that lists the members, `HOST:PORT` with commas between.
pub const MEMBERS: &str = "x-istiod-members";
/// Metadata that says why a client should go to another member: a [`Hint`].
pub const MOVE: &str = "x-istiod-move";
/// Metadata in which a client tells the newest revision that it has; nobody may send it an older one.
pub const REVISION: &str = "x-istiod-revision";
/// Metadata in which a client tells how many members have refused it since it was last served. Who sends it
/// understands [`MOVE`].
pub const REFUSALS: &str = "x-istiod-refusals";

/// The most members that are listened to: no control plane has so many.
const MOST: usize = 64;

/// Why a client should go to another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// This member serves more than its share.
    Surplus,
    /// This member is going to stop.
    Drain,
    /// This member has not yet applied what the client has.
    Behind,
}

impl Hint {
    /// The word on the wire.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Surplus => "surplus",
            Self::Drain => "drain",
            Self::Behind => "behind",
        }
    }

    /// The hint in the metadata of an answer, if there is one.
    #[must_use]
    pub fn from_metadata(metadata: &MetadataMap) -> Option<Self> {
        let word = metadata.get(MOVE)?.to_str().ok()?;
        [Self::Surplus, Self::Drain, Self::Behind].into_iter().find(|hint| hint.word() == word)
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How much `node` prefers `member`; every build on every machine gives the same.
#[must_use]
pub fn score(node: &str, member: &str) -> u64 {
    let mut text = Vec::with_capacity(node.len() + member.len() + 1);
    text.extend_from_slice(member.as_bytes());
    text.push(0);
    text.extend_from_slice(node.as_bytes());
    xxh3_64(&text)
}

/// The members in the order in which `node` prefers them; each once.
#[must_use]
pub fn order<'a>(node: &str, members: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut scored: Vec<(u64, &str)> = members.into_iter().map(|m| (score(node, m), m)).collect();
    scored.sort_unstable_by(|a, b| b.cmp(a));
    scored.dedup();
    scored.into_iter().map(|(_, member)| member).collect()
}

/// Writes the list of members, unless it is empty.
pub fn tell<'a>(metadata: &mut MetadataMap, members: impl IntoIterator<Item = &'a str>) {
    let text = members.into_iter().collect::<Vec<_>>().join(",");
    if !text.is_empty()
        && let Ok(value) = AsciiMetadataValue::try_from(text)
    {
        metadata.insert(MEMBERS, value);
    }
}

/// The list of members in the metadata of an answer; `None` when it has none that can be read.
#[must_use]
pub fn told(metadata: &MetadataMap) -> Option<Vec<String>> {
    let text = metadata.get(MEMBERS)?.to_str().ok()?;
    let members: Vec<String> =
        text.split(',').map(str::trim).filter(|m| is_address(m)).take(MOST).map(str::to_owned).collect();
    (!members.is_empty()).then_some(members)
}

/// Whether this can be the address of a member: `HOST:PORT`.
#[must_use]
pub fn is_address(text: &str) -> bool {
    let parts = text.rsplit_once(':');
    text.len() <= 300
        && parts.is_some_and(|(host, port)| {
            let named = host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._[]:%".contains(&b));
            !host.is_empty() && named && port.parse::<u16>().is_ok_and(|port| port > 0)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: [&str; 3] = ["10.0.0.1:15012", "10.0.0.2:15012", "istiod.example.com:15012"];

    #[test]
    fn the_order_is_the_same_wherever_it_is_made() {
        // Written down once: other builds and other programs must agree.
        assert_eq!(order("a", THREE), order("a", [THREE[2], THREE[0], THREE[1], THREE[0]]));
        assert_eq!(score("sidecar~10.0.0.1~a.b~c", THREE[0]), 6407408190767877299);
    }

    #[test]
    fn first_choices_are_even() {
        let mut counts = [0_u32; 3];
        for node in 0..3000 {
            let first = order(&format!("sidecar~10.0.{node}"), THREE)[0];
            counts[THREE.iter().position(|m| *m == first).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    #[test]
    fn only_those_move_whose_first_choice_comes_or_goes() {
        for node in 0..500 {
            let node = format!("node-{node}");
            let (two, three) = (order(&node, [THREE[0], THREE[1]]), order(&node, THREE));
            let without: Vec<_> = three.into_iter().filter(|m| *m != THREE[2]).collect();
            assert_eq!(without, two);
        }
    }

    #[test]
    fn what_is_told_is_read_again_and_nonsense_is_left_out() {
        let mut metadata = MetadataMap::new();
        tell(&mut metadata, []);
        assert_eq!(told(&metadata), None);
        tell(&mut metadata, THREE);
        assert_eq!(told(&metadata).unwrap(), THREE);
        metadata.insert(MEMBERS, " a:1 ,b:0,:1,no port,x y:1,[::1]:15012".parse().unwrap());
        assert_eq!(told(&metadata).unwrap(), ["a:1", "[::1]:15012"]);
        assert_eq!(Hint::from_metadata(&metadata), None);
        for hint in [Hint::Surplus, Hint::Drain, Hint::Behind] {
            metadata.insert(MOVE, hint.word().parse().unwrap());
            assert_eq!(Hint::from_metadata(&metadata), Some(hint));
        }
    }
}
