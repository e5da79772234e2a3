//! What a stream tells about itself: the source of `proxy-status` and of `apply --wait`.

use std::collections::BTreeMap;

use crate::resources::Type;

/// A rejected response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nack {
    /// The type of the response.
    pub type_: Type,
    /// Its nonce.
    pub nonce: String,
    /// The revision it was made from.
    pub revision: u64,
    /// The client's words.
    pub message: String,
    /// The resources it rejects: those its words name, or all of the response when they name none.
    pub resources: Vec<String>,
}

/// How far a client is with one type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sync {
    /// It has accepted everything it should have.
    Synced,
    /// Something is on its way, or waits for its turn.
    Stale,
    /// It rejected something that it should have, and keeps the last good.
    Nacked,
    /// It never asked for the type, or never got an answer.
    #[default]
    NotSent,
}

/// One type of one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TypeReport {
    /// How far the client is.
    pub sync: Sync,
    /// Nonce of the last response sent.
    pub sent_nonce: Option<String>,
    /// Revision of the last response sent.
    pub sent_revision: Option<u64>,
    /// Nonce of the last response accepted.
    pub acked_nonce: Option<String>,
    /// The newest revision of which the client has everything of this type.
    pub acked_revision: Option<u64>,
    /// What the client has rejected and not made good since.
    pub nack: Option<Nack>,
    /// How many resources the client has.
    pub resources: usize,
}

/// A whole stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The newest revision of which the client has accepted everything that it must have; 0 before the first.
    pub synced_revision: u64,
    /// The revision that the client should be at; 0 before the first.
    pub view_revision: u64,
    /// Nothing is on its way, and nothing is expected of the client.
    pub at_rest: bool,
    /// By type; types that the client never asked for are absent.
    pub types: BTreeMap<Type, TypeReport>,
}

impl std::fmt::Display for Sync {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Synced => "SYNCED",
            Self::Stale => "STALE",
            Self::Nacked => "NACKED",
            Self::NotSent => "NOT SENT",
        })
    }
}
