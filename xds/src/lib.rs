//! From snapshot to stream.
//!
//! [`resources`] says what a proxy holds and [`cache`] shares it; [`stream`] speaks the protocol. Nothing here
//! knows Raft.

pub mod proxy;
pub mod resources;
pub mod translate;
pub mod cache;
pub mod stream;
