//! The wire that the control plane and the proxy share: Envoy's xDS messages.
//!
//! The messages themselves are `envoy-types`; this crate adds what protobuf gives only through descriptors:
//! [`json`] reads and prints messages in protobuf's JSON form with every nested `Any` expanded, as Envoy's
//! bootstrap files and config dumps have it, and [`canonical`] encodes a message to the same bytes every time.
//! [`members`] is how clients choose among the members of a control plane.

pub mod canonical;
pub mod json;
pub mod members;
mod pool;

pub use pool::forget_descriptors;

/// What agents say about their workloads, and what they are told of members (`istio.mesh.v1`, `proto/mesh.proto`).
pub mod mesh {
    #![expect(
        missing_docs,
        clippy::allow_attributes_without_reason,
        clippy::too_many_lines,
        reason = "generated; the proto has the comments"
    )]
    tonic::include_proto!("istio.mesh.v1");
}

/// Prefix of every type URL we write (xDS protocol, "Resource Types").
pub const TYPE_URL_PREFIX: &str = "type.googleapis.com/";
