//! What members say to each other on the peer port, over mutual TLS with a certificate authority used for nothing
//! else.
//!
//! [`tls`] says who is who, [`links`] carries what the driver sends, [`service`] takes what others send, and
//! [`snapshot`] moves whole snapshots, file to file. A peer's certificate names its member; certificates of workloads
//! and agents come from another authority and do not get past the handshake. Whatever a peer's bytes do, only its own
//! connection ends.

pub mod links;
pub mod service;
pub mod snapshot;
pub mod tls;

use std::collections::{BTreeMap, BTreeSet};

/// Where the members are, and which numbers will never be used again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    /// `HOST:PORT` of each member's peer port.
    pub addresses: BTreeMap<u64, String>,
    /// Members that were removed.
    pub retired: BTreeSet<u64>,
}

/// What a removed member is told by its former peers.
const REMOVED: &str = "this member was removed from the cluster";

/// A message with one very large entry still passes; in bytes.
const MESSAGE_LIMIT: usize = 256 << 20;
