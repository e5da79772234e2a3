//! Nodes: whose keys a certificate belongs to, through all renewals, and which of them are revoked.
//!
//! A node is a machine, or whatever else joined with a key of its own. Its name is derived from that key, and every
//! certificate that follows from the first one has it as the first half of its serial number: no certificate says more
//! to peers than its identity, and the control plane can tell two machines of one service account apart without keeping
//! a list of certificates.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::authn::Hash;

/// Digits of a node's name.
const DIGITS: usize = 16;
/// Digits of the serial numbers that are made here: a node's name, and as many by chance.
const SERIAL_DIGITS: usize = 2 * DIGITS;

/// Name of a node: 63 bits, as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeId([u8; 8]);

impl NodeId {
    /// The node that joins with the public key of this hash.
    #[must_use]
    pub fn of_key(key: Hash) -> Self {
        Self::masked(key.first_bytes())
    }

    /// The node of a certificate with this serial number, in hexadecimal; none when the number is too short to be one of
    /// ours.
    #[must_use]
    pub fn of_serial(serial: &str) -> Option<Self> {
        let digits = serial.trim_start_matches('0');
        if digits.len() <= DIGITS {
            return None;
        }
        let width = SERIAL_DIGITS.max(digits.len());
        format!("{digits:0>width$}").get(..DIGITS)?.parse().ok()
    }

    /// The first half of its serial numbers.
    #[must_use]
    pub fn bytes(self) -> [u8; 8] {
        self.0
    }

    /// Serial numbers are positive (RFC 5280, 4.1.2.2), so the first bit is none of a name's.
    fn masked(mut bytes: [u8; 8]) -> Self {
        bytes[0] &= 0x7f;
        Self(bytes)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::x509::hex(&self.0))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not the name of a node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the name of a node has {DIGITS} hexadecimal digits")]
pub struct NotANode;

impl std::str::FromStr for NodeId {
    type Err = NotANode;

    fn from_str(text: &str) -> Result<Self, NotANode> {
        let plain = text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u64::from_str_radix(text, 16).ok().filter(|_| plain).ok_or(NotANode)?;
        Ok(Self::masked(number.to_be_bytes()))
    }
}

impl TryFrom<String> for NodeId {
    type Error = NotANode;

    fn try_from(text: String) -> Result<Self, NotANode> {
        text.parse()
    }
}

impl From<NodeId> for String {
    fn from(node: NodeId) -> Self {
        node.to_string()
    }
}

/// That a node gets no certificates and is not served any more, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Which node.
    pub node: NodeId,
    /// Namespace of its identity; empty when nobody knew.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Service account of its identity; empty when nobody knew.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service_account: String,
    /// Seconds since 1970, by the clock of the member that proposed.
    pub at: u64,
    /// Who did it.
    #[serde(default)]
    pub by: String,
    /// What the operator gave as the reason; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Last second (since 1970) at which a certificate of the node can be good for anything; later this is forgotten.
    pub until: u64,
}

/// The revoked nodes.
pub type Revocations = BTreeMap<NodeId, Revocation>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Serial;
    use crate::fixtures::{ca, now};
    use crate::x509::{Facts, hex};

    #[test]
    fn a_certificate_has_the_name_of_its_node_in_its_serial_number() {
        for n in 0..200_u8 {
            let node = NodeId::of_key(Hash::of(&[n]));
            let serial = Serial::of_node(node).unwrap();
            assert_eq!(NodeId::of_serial(&hex(serial.bytes())), Some(node));
        }
        // leading zeros are not written into a certificate
        let node: NodeId = "0000000000abcdef".parse().unwrap();
        let serial = Serial::of_node(node).unwrap();
        let digits = hex(serial.bytes());
        assert_eq!(NodeId::of_serial(digits.trim_start_matches('0')), Some(node));
        // what is not of ours has a node all the same, if it is long enough to be told apart
        let chain = ca().control_plane();
        let facts = Facts::parse(chain.chain.first().unwrap()).unwrap();
        assert!(facts.node().is_some() && facts.is_valid_at(now()));
        assert_eq!(NodeId::of_serial("2a"), None);
    }

    #[test]
    fn a_name_has_sixteen_digits() {
        let node = NodeId::of_key(Hash::of(b"abc"));
        assert_eq!(node.to_string(), "3a7816bf8f01cfea");
        assert_eq!(node.to_string().parse(), Ok(node));
        for text in ["", "3a7816bf8f01cfe", "3a7816bf8f01cfea0", "+a7816bf8f01cfea", "3a7816bf8f01cfeg"] {
            assert_eq!(text.parse::<NodeId>(), Err(NotANode), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn foreign_texts_never_panic(text: String) {
            drop(text.parse::<NodeId>());
            assert!(NodeId::of_serial(&text).is_none_or(|node| node.to_string().len() == DIGITS));
        }
    }
}
