//! placeholder

pub mod raft;
pub mod publish;
pub mod push;
