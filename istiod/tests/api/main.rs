//! The admin API as its callers meet it: over sockets, with every role and without one.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test that cannot go on fails"
)]

mod certificate;
mod document;
mod fuzz;
mod garbage;
mod grpc;
mod history;
mod limits;
mod member;
mod objects;
mod roles;
mod schema;
mod workloads;
