//! The mesh as data.
//!
//! [`model`] says what a mesh is made of; [`config`] reads Istio's YAML into it and tells every mistake with its
//! place; [`source`] turns what a registry says into commands; [`state`] applies commands, the same way on
//! every member; [`lease`] tells which workloads went silent; [`merge`] makes one service of what several sources say about one host; [`snapshot`] is what
//! the rest of the control plane reads. Nothing here knows the wire format of a proxy, or Raft.

pub mod chunks;
pub mod config;
pub mod lease;
pub mod merge;
pub mod model;
pub mod snapshot;
pub mod source;
pub mod state;
