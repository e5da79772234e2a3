//! What a mesh is made of.
//!
//! [`service`] is what `translate` reads; the other modules are Istio's objects, field by field, each with a
//! struct for every message. The list of fields of a message is its only definition: the struct and its
//! reading from YAML come from it.

pub mod extension;
pub mod mesh;
pub mod security;
pub mod service;
pub mod telemetry;
pub mod traffic;
pub mod workload;
